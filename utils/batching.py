"""Token-budget batches: examples of similar length together, padded to the longest, a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from utils.console import progress_bar

IGNORED_LABEL = -100
AUTO_TOKENS_ON_CPU = 2_048  # past this, larger batches are no faster on a CPU
AUTO_TOKENS_ON_GPU = (2_048, 65_536)  # smallest and largest automatic budget on a GPU
SHARE_OF_GPU_MEMORY = 0.5  # of what is free when a step begins

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LabelledSequence:
    """One tokenized text and the stretch of it whose tokens count in a loss.

    Attributes:
        input_ids: (T,) int32.
        label_start: first position whose token is a label.
        label_end: one past the last such position.
    """

    input_ids: np.ndarray
    label_start: int
    label_end: int

    @property
    def num_labels(self) -> int:
        """Number of tokens that count in a loss; the first token of a text has nothing that predicts it."""
        return max(0, self.label_end - max(self.label_start, 1))


# A dialogue is one sequence; an answer pair is two, the chosen and the rejected.
Example = tuple[LabelledSequence, ...]


@dataclass(frozen=True)
class BatchLimits:
    """How much goes into one batch.

    Attributes:
        tokens: padded tokens.
        examples: examples, since their separate gradients take (out, in) floats each.
    """

    tokens: int
    examples: int = 1 << 30


def batch_limits(
    model: torch.nn.Module, tokens_per_batch: int | Literal["auto"], tracked_modules: Sequence[str] = ()
) -> BatchLimits:
    """Batch limits from TOKENS_PER_BATCH, or from the device's free memory where it is "auto".

    On a GPU a token is charged its logits (float32, three copies, a label at half of the positions) and, for each
    tracked Linear, its input and output and their gradients; an example is charged three copies of the largest
    gradient.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return BatchLimits(AUTO_TOKENS_ON_CPU if tokens_per_batch == "auto" else tokens_per_batch)
    free_bytes = SHARE_OF_GPU_MEMORY * torch.cuda.mem_get_info(device)[0]
    linears = [model.get_submodule(name) for name in tracked_modules]
    gradient_bytes = max((4 * 3 * linear.weight.numel() for linear in linears), default=1)
    examples = max(1, int(free_bytes / 2 / gradient_bytes))
    if tokens_per_batch != "auto":
        return BatchLimits(tokens_per_batch, examples)
    widths = sum(linear.in_features + linear.out_features for linear in linears) + 32 * model.config.hidden_size
    token_bytes = 4 * (3 * 0.5 * model.config.vocab_size + 3 * widths)
    smallest, largest = AUTO_TOKENS_ON_GPU
    return BatchLimits(int(np.clip(free_bytes / 2 / token_bytes, smallest, largest)), examples)


def plan_batches(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Group examples by length, longest first, so that what does not fit fails at once and not at the end.

    Args:
        lengths: padded tokens that each example needs, all of its sequences together.

    Returns:
        Positions in `lengths`, each once. An example longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * longest <= limits.tokens and len(batches[-1]) < limits.examples:
            batches[-1].append(position)
        else:
            batches.append([position])
            longest = lengths[position]
    return batches


class BatchLoader:
    """Batches of examples, length-sorted, with a progress bar over the examples.

    Each batch holds, for B examples of S sequences (all first sequences, then all second ones):
        input_ids, attention_mask, labels: (S * B, T); labels are IGNORED_LABEL where nothing counts
        index: (B,) positions in `examples`, to put results back in order

    Args:
        examples: the tokenized examples, all with the same number of sequences.
        indices: which of them to use; all by default.
        pad_to: pad every sequence to this length instead of the longest in the batch.
        description: text of the progress bar; no bar where it is empty.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        limits: BatchLimits,
        pad_token_id: int,
        device: torch.device | str = "cpu",
        indices: Sequence[int] | None = None,
        pad_to: int | None = None,
        description: str = "",
    ) -> None:
        self.examples = examples
        self.indices = list(range(len(examples))) if indices is None else list(indices)
        self.pad_token_id, self.device, self.pad_to = pad_token_id, device, pad_to
        self.description = description
        lengths = [
            len(examples[index]) * (pad_to or max(len(sequence.input_ids) for sequence in examples[index]))
            for index in self.indices
        ]
        self.batches = [[self.indices[i] for i in batch] for batch in plan_batches(lengths, limits)]

    def described(self, description: str) -> BatchLoader:
        """The same batches under another progress bar."""
        loader = object.__new__(BatchLoader)
        loader.__dict__.update(self.__dict__, description=description)
        return loader

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        if not self.description:
            yield from map(self._collate, self.batches)
            return
        with progress_bar(len(self.indices), self.description, "examples") as bar:
            for batch in self.batches:
                yield self._collate(batch)
                bar.update(len(batch))

    def _collate(self, batch: list[int]) -> Batch:
        sequences = [sequence for column in zip(*(self.examples[i] for i in batch), strict=True) for sequence in column]
        width = self.pad_to or max(len(sequence.input_ids) for sequence in sequences)
        input_ids = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(sequences), width), IGNORED_LABEL, dtype=np.int64)
        attention_mask = np.zeros((len(sequences), width), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            length = len(sequence.input_ids)
            input_ids[row, :length] = sequence.input_ids
            attention_mask[row, :length] = 1
            counted = slice(sequence.label_start, sequence.label_end)
            labels[row, counted] = sequence.input_ids[counted]
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "index": np.asarray(batch, dtype=np.int64),
        }
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
