"""A loaded model made ready for tracing: cut below its tracked blocks, with its loaders and its curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.batching import BatchLoader, LabelledSequence, token_budget
from utils.console import UserError
from utils.influence import Curvature
from utils.models import load_model, load_tokenizer, tracked_linear_names
from utils.settings import Settings
from utils.trunk import KeptStates, Trunk


@dataclass(frozen=True)
class Traceable:
    """A loaded model, cut below its tracked blocks, with what tracing it needs.

    Attributes:
        model: the tail, which runs on batches with trunk states.
        whole: the model before the cut.
        tracked_modules: dotted names in the whole model.
        kept_states: trunk states of the training dialogues.
    """

    whole: PreTrainedModel
    trunk: Trunk
    tokenizer: PreTrainedTokenizerBase
    tracked_modules: list[str]
    tokens_per_batch: int
    curvature: Curvature
    kept_states: KeptStates

    @property
    def model(self) -> PreTrainedModel:
        """The tail of the model."""
        return self.trunk.tail

    def loader(
        self,
        sequences: Sequence[LabelledSequence],
        keep: bool = False,
        **keywords: Any,  # noqa: ANN401
    ) -> BatchLoader:
        """Batches of sequences with their trunk states, within the token budget, on the model's device.

        Args:
            keep: keep the trunk states, for the training dialogues, which several passes see.
        """
        states = self.kept_states if keep else KeptStates(self.trunk, keep=False)
        return BatchLoader(
            sequences,
            self.tokens_per_batch,
            self.tokenizer.pad_token_id,
            self.whole.device,
            transform=states.add_to,
            **keywords,
        )


def load_traceable(settings: Settings, model: str, device: torch.device) -> Traceable:
    """Load a model and settle which Linears are traced, how, and how much goes into a batch.

    Raises:
        UserError: half precision without a GPU, more blocks than the model has, and all that loading raises.
    """
    if settings.USE_HALF_PRECISION and device.type != "cuda":
        raise UserError(f"USE_HALF_PRECISION = True: needs a CUDA device, and DEVICE is {device}; set it to False")
    loaded = load_model(model, device)
    tracked = tracked_linear_names(loaded, settings.MODEL_FAMILY, settings.NUM_BLOCKS)
    trunk = Trunk(loaded, settings.MODEL_FAMILY, settings.NUM_BLOCKS, settings.USE_HALF_PRECISION)
    return Traceable(
        whole=loaded,
        trunk=trunk,
        kept_states=KeptStates(trunk),
        tokenizer=load_tokenizer(model),
        tracked_modules=tracked,
        tokens_per_batch=token_budget(loaded, settings.TOKENS_PER_BATCH, tracked),
        curvature=Curvature(settings.FACTOR_STRATEGY, settings.DAMPING_FACTOR, settings.USE_HALF_PRECISION),
    )
