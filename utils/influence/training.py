"""Training of the traced Linears alone: their weights as copies, and minibatches whose hidden states are cached."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from utils.batching import Batch, LabelledSequence, plan_batches
from utils.console import UserError
from utils.influence.traced_model import Gradients, TracedModel


class TrainedLinears:
    """The traced Linears, whose weights and biases are exchanged for copies while they train.

    The original tensors are never written to, so that they are the reference model, and are put back bit for bit.
    """

    def __init__(self, traced: TracedModel) -> None:
        self.traced = traced
        pairs = [(linear.weight, linear.bias) for linear in traced.linears.values()]
        self.parameters = [parameter for pair in pairs for parameter in pair if parameter is not None]
        self.originals = [parameter.data for parameter in self.parameters]

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Within this context the parameters are copies that take gradients; afterwards all is as before."""
        required = [parameter.requires_grad for parameter in self.parameters]
        try:
            self._exchange([original.clone() for original in self.originals])
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            self._exchange(self.originals)
            for parameter, was_required in zip(self.parameters, required, strict=True):
                parameter.requires_grad_(was_required)
                parameter.grad = None

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this context, which has no gradients, the model is the one that training began with."""
        trained = [parameter.data for parameter in self.parameters]
        try:
            self._exchange(self.originals)
            with torch.no_grad():
                yield
        finally:
            self._exchange(trained)

    def weights(self) -> Gradients:
        """Copies of the weights, (1, out, in) or (1, out, in + 1) with the bias last, by dotted name."""
        return {
            name: torch.cat([linear.weight, *([] if linear.bias is None else [linear.bias[:, None]])], 1).detach()[None]
            for name, linear in self.traced.linears.items()
        }

    def _exchange(self, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self.parameters, tensors, strict=True):
            parameter.data = tensor


class Minibatches:
    """Items (dialogues, or the two answers of a pair) in minibatches, in a seeded order that starts again at its end.

    The minibatches are the same in every round and of equal size, to within one item. In each, an item's weight is
    multiplied by the number M of minibatches, so that the mean over a round is the whole weighted sum:
    1/M sum_b sum_{i in b} M w_i l_i = sum_i w_i l_i.

    A minibatch is divided into batches within the token budget, whose losses add up. They recur, so that their hidden
    states are found in the cache. Every process iterates over all of them.

    Args:
        items: each of the same number of sequences, which stay together, one after the other.
        size: items in a minibatch, at most.
        weights: (N,) of the items; by default 1 / N.
    """

    def __init__(
        self,
        traced: TracedModel,
        items: Sequence[tuple[LabelledSequence, ...]],
        size: int,
        seed: int,
        weights: np.ndarray | None = None,
    ) -> None:
        if not items:
            raise UserError("there are no dialogues or pairs to train on: choose another SCORES_TYPE or BOTTOM_K")
        self.per_item, number = len(items[0]), -(-len(items) // size)
        weights = np.full(len(items), 1 / len(items)) if weights is None else weights
        sequences = [sequence for item in items for sequence in item]
        self.trunk, self.cache = traced.trunk, traced.trunk and traced.trunk.cache_for(sequences)
        self.loader = traced.loader(
            sequences,
            cached=True,
            weights=np.repeat(number * weights, self.per_item),
        )
        lengths = [self.per_item * max(len(sequence.input_ids) for sequence in item) for item in items]
        order = np.random.default_rng(seed).permutation(len(items))
        self.minibatches = [
            [part[batch] for batch in plan_batches([lengths[item] for item in part], traced.tokens_per_batch)]
            for part in np.array_split(order, number)
        ]

    def of_step(self, step: int) -> Iterator[Batch]:
        """The batches of one minibatch, as BatchLoader makes them; the rows of an item follow each other."""
        for items in self.minibatches[step % len(self.minibatches)]:
            rows = items[:, None] * self.per_item + np.arange(self.per_item)
            yield self.loader.collate(rows.flatten().tolist())  # iterating would share batches out among processes

    def release(self) -> None:
        """Give the memory of the cached hidden states back."""
        if self.trunk:
            self.trunk.forget(self.cache)
