"""A model with its trunk, for the steps that change its last blocks: opened, and kept where many steps follow.

Scripts that run step after step in one process (tables, studies) keep the last model, and with it the hidden states
that enter its last blocks: on a large model most of the time of steps 4 and 5 would go into computing them again.
Steps 1, 2, 4 and 5 open models here, so that of these there is one in memory; what loads models itself (step 6, the
fine-tuning) has another beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from utils.model_fingerprints import model_fingerprint
from utils.models import load_model, load_tokenizer
from utils.settings import Settings
from utils.spreading import SPREAD
from utils.transformer_blocks import first_traced_block
from utils.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class OpenModel(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the model cut in two below its last blocks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    trunk: Trunk


@dataclass
class _Kept:
    """The last model that was opened within `keep_model`.

    Attributes:
        depth: how many such contexts there are.
        key: what was opened.
        originals: the parameters of the last blocks, which steps change, and copies of them as they were loaded.
    """

    depth: int = 0
    key: tuple[object, ...] | None = None
    opened: OpenModel | None = None
    originals: list[tuple[torch.nn.Parameter, torch.Tensor]] | None = None

    def clear(self) -> None:
        self.key = self.opened = self.originals = None


_kept = _Kept()


@contextmanager
def keep_model() -> Iterator[None]:
    """Within this context the last model that was opened stays in memory, for the next step that opens the same."""
    _kept.depth += 1
    try:
        yield
    finally:
        _kept.depth -= 1
        if not _kept.depth:
            _kept.clear()


def open_model(
    settings: Settings, model: str, device: torch.device, num_blocks: int, half_precision: bool = False
) -> OpenModel:
    """Load a model, or give the one that is kept, with its weights as they were loaded.

    Args:
        num_blocks: last blocks above the trunk.
        half_precision: of the trunk.

    Raises:
        UserError: as `load_model`.
    """
    is_spread = settings.DEVICE == SPREAD
    if not _kept.depth or is_spread:
        return _open(settings, model, device, num_blocks, half_precision)
    key = (model_fingerprint(model), settings.MODEL_FAMILY, str(device), num_blocks, half_precision)
    if _kept.key != key:
        _kept.clear()  # first, so that there is room
        _kept.opened = _open(settings, model, device, num_blocks, half_precision)
        _kept.opened.trunk.keeps_all = True
        path, first = first_traced_block(_kept.opened.model, settings.MODEL_FAMILY, num_blocks)
        blocks = _kept.opened.model.get_submodule(path)[first:]
        _kept.originals = [(parameter, parameter.detach().clone()) for parameter in blocks.parameters()]
        _kept.key = key
    with torch.no_grad():
        for parameter, original in _kept.originals:
            parameter.copy_(original)
    return _kept.opened


def _open(settings: Settings, model: str, device: torch.device, num_blocks: int, half_precision: bool) -> OpenModel:
    loaded = load_model(model, device, settings.DEVICE == SPREAD, num_blocks)
    trunk = Trunk(loaded, settings.MODEL_FAMILY, num_blocks, half_precision)
    return OpenModel(loaded, load_tokenizer(model, loaded), trunk)
