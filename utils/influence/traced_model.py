"""A model made ready for tracing: frozen, cut below its traced blocks, with its batches and its curvature."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from utils.batching import Batch, BatchLoader, LabelledSequence, token_budget
from utils.console import UserError
from utils.influence.label_gradients import LabelGradientCache
from utils.influence.token_gradients import TokenRows, active_rows, hook_linears
from utils.influence.totals import Totals
from utils.kept_model import open_model
from utils.methods import factors_for
from utils.settings import Settings
from utils.transformer_blocks import traced_linear_names
from utils.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Gradients = dict[str, torch.Tensor]  # name of a Linear -> (queries, out, in), the bias as a last column


@dataclass(frozen=True)
class Curvature:
    """How the curvature is approximated and in which precision.

    Attributes:
        strategy: "ekfac", "kfac", "diagonal" or "identity".
        damping: added to every eigenvalue before the inverse; None is 0.1 x the mean eigenvalue of a module.
        half_precision: bfloat16 autocast for forward and backward passes; sums stay in `dtype`.
        dtype: of all covariances, gradients and scores.
    """

    strategy: str = "ekfac"
    damping: float | None = None
    half_precision: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def has_eigenbasis(self) -> bool:
        """Whether the inverse is taken in the eigenbasis of the covariances."""
        return self.strategy in ("ekfac", "kfac")

    @property
    def has_lambda(self) -> bool:
        """Whether the eigenvalues are second moments of gradients (Lambda), measured in a pass of their own."""
        return self.strategy in ("ekfac", "diagonal")

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The precision of forward passes."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.half_precision)


@dataclass(frozen=True)
class TracedModel:
    """A frozen model with the Linears that are traced.

    Attributes:
        model: the whole model, or its tail (utils/trunk.py) if there is a trunk.
        linears: the traced Linears by their dotted names in the whole model.
        tokens_per_batch: padded tokens in a batch, at most.
        trunk: gives the hidden states that enter the tail; None if the model is whole.
    """

    model: PreTrainedModel
    linears: Mapping[str, nn.Linear]
    curvature: Curvature
    tokenizer: PreTrainedTokenizerBase
    tokens_per_batch: int
    trunk: Trunk | None = None

    def loader(
        self,
        sequences: Sequence[LabelledSequence],
        cached: bool = False,
        keeps_labels: bool = False,
        **keywords: Any,  # noqa: ANN401
    ) -> BatchLoader:
        """Batches of sequences within the token budget, on the model's device; `keywords` as for BatchLoader.

        Args:
            cached: cache the hidden states, for the training dialogues, which several passes see.
            keeps_labels: keep also the labels' gradients, as long as the loader lives, which must not see the model
                change.
        """
        states = self.trunk and self.trunk.cache_for(sequences, keep=cached)
        labels = LabelGradientCache(self.model.device) if keeps_labels else None

        def transform(batch: Batch) -> Batch:
            for cache in filter(None, (states, labels)):
                batch = cache.add_to(batch)
            return batch

        return BatchLoader(
            sequences,
            self.tokens_per_batch,
            self.tokenizer.pad_token_id,
            self.model.device,
            transform=transform,
            **keywords,
        )

    def backward_passes(
        self,
        loader: BatchLoader,
        loss_of: Callable[[Batch], torch.Tensor],
        on_gradient: Callable[[Batch, str, torch.Tensor, torch.Tensor], None],
        after_batch: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        """Forward and backward over every batch; `on_gradient(batch, name, inputs, output_gradients)` as it comes."""

        def on_tokens(batch: Batch, name: str, *tokens: torch.Tensor) -> None:
            # OPT runs its last two Linears on (B T, hidden).
            on_gradient(batch, name, *(rows.reshape(*batch["attention_mask"].shape, -1) for rows in tokens))

        for batch in loader:
            with hook_linears(self.linears, partial(on_tokens, batch)):
                with self.curvature.autocast(self.model.device):
                    loss = loss_of(batch)
                loss.backward()
            after_batch(batch)

    def active_rows(self, name: str, inputs: torch.Tensor, output_gradients: torch.Tensor) -> TokenRows:
        """The tokens at which a Linear has a gradient, in the curvature's precision."""
        return active_rows(inputs, output_gradients, self.has_bias(name), self.curvature.dtype)

    def has_bias(self, name: str) -> bool:
        """Whether a Linear has a bias, which is counted as the last column of its weight."""
        return self.linears[name].bias is not None

    def gradient_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every Linear's gradient, the bias counted as a column."""
        return {
            name: (linear.out_features, linear.in_features + self.has_bias(name))
            for name, linear in self.linears.items()
        }

    def zeros(self, *shape: int) -> torch.Tensor:
        """A tensor for results, on the model's device."""
        return torch.zeros(shape, dtype=self.curvature.dtype, device=self.model.device)

    def totals(self, shapes: Mapping[str, tuple[int, ...]]) -> Totals:
        """Sums over batches, by the Linears' names, on the model's device."""
        return Totals(shapes, self.curvature.dtype, self.model.device)


def traced_linears(model: PreTrainedModel, family: str, num_blocks: int) -> dict[str, nn.Linear]:
    """Freeze a model; gives the Linears of its last blocks, by dotted name."""
    model.eval().requires_grad_(False)
    return {name: model.get_submodule(name) for name in traced_linear_names(model, family, num_blocks)}


def load_traced_model(settings: Settings, model: str, device: torch.device) -> TracedModel:
    """Load a model and trace the Linears of its last NUM_BLOCKS blocks.

    Raises:
        UserError: half precision without a GPU, more blocks than the model has, or a model that cannot be loaded.
    """
    require_half_precision(settings, device)
    opened = open_model(settings, model, device, settings.NUM_BLOCKS, settings.USE_HALF_PRECISION)
    return trace_model(settings, *opened)


def require_half_precision(settings: Settings, device: torch.device) -> None:
    """Refuse half precision where it is not for speed.

    Raises:
        UserError: USE_HALF_PRECISION without a CUDA device.
    """
    if settings.USE_HALF_PRECISION and device.type != "cuda":
        raise UserError(f"USE_HALF_PRECISION = True: needs a CUDA device, and DEVICE is {device}; set it to False")


def trace_model(
    settings: Settings, loaded: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trunk: Trunk
) -> TracedModel:
    """Trace the Linears of a model's last NUM_BLOCKS blocks, all of which are above the trunk.

    Raises:
        UserError: as `require_half_precision`.
    """
    require_half_precision(settings, loaded.device)
    linears = traced_linears(loaded, settings.MODEL_FAMILY, settings.NUM_BLOCKS)
    return TracedModel(
        model=trunk.tail,
        linears=linears,
        curvature=Curvature(
            factors_for(settings.FACTOR_STRATEGY), settings.DAMPING_FACTOR, settings.USE_HALF_PRECISION
        ),
        tokenizer=tokenizer,
        tokens_per_batch=token_budget(loaded, settings.TOKENS_PER_BATCH, list(linears.values())),
        trunk=trunk,
    )
