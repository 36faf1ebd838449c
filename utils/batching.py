"""Token-budget batches: sequences of similar length together, padded to the longest, a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from utils.processes import iterate_share, smallest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED_LABEL = -100
AUTO_TOKENS_ON_CPU = 2_048  # past this, larger batches are no faster on a CPU
AUTO_TOKENS_ON_GPU = (2_048, 65_536)  # smallest and largest automatic budget on a GPU
SHARE_OF_GPU_MEMORY = 0.25  # of what is free when a step begins
# A short pass has at least so many batches, for several processes to share, unless they would be smaller than this.
FEWEST_BATCHES, SMALLEST_BATCH = 16, 512

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LabelledSequence:
    """One tokenized text and the stretch of it whose tokens count in a loss.

    Attributes:
        input_ids: (T,) int32.
        label_start: first position whose token is a label.
        label_end: one past the last such position.
        is_counted: (label_end - label_start,) which tokens of the stretch count after all; None for all of them.
    """

    input_ids: np.ndarray
    label_start: int
    label_end: int
    is_counted: np.ndarray | None = None

    @property
    def num_labels(self) -> int:
        """Number of tokens that count in a loss; the first token of a text has nothing that predicts it."""
        if self.is_counted is not None:
            return int(self.is_counted[max(0, 1 - self.label_start) :].sum())
        return max(0, self.label_end - max(self.label_start, 1))


def token_budget(
    model: PreTrainedModel, tokens_per_batch: int | Literal["auto"], linears: Sequence[torch.nn.Linear] = ()
) -> int:
    """Padded tokens in a batch: TOKENS_PER_BATCH, or from the device's free memory where it is "auto".

    On a GPU the budget counts, per token, its hidden states and, for each traced Linear, its input and output and their
    gradients. Logits do not count: they exist a bounded chunk at a time.
    """
    device = model.device
    if tokens_per_batch != "auto":
        return tokens_per_batch
    if device.type != "cuda":
        return AUTO_TOKENS_ON_CPU
    free_bytes = SHARE_OF_GPU_MEMORY * torch.cuda.mem_get_info(device)[0]
    widths = sum(linear.in_features + linear.out_features for linear in linears)
    widths += 32 * model.config.get_text_config().hidden_size  # generous: activations of one block without a graph
    bytes_per_token = 4 * 3 * widths  # float32; the value, its gradient, and a temporary copy
    return smallest(int(np.clip(free_bytes / bytes_per_token, *AUTO_TOKENS_ON_GPU)))


def plan_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Group sequences by length, longest first, so that running out of memory shows in the first batch.

    Args:
        lengths: tokens of each sequence.
        tokens_per_batch: padded tokens in a batch, at most.

    Returns:
        Positions in `lengths`, each once. A sequence longer than the budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * longest <= tokens_per_batch:
            batches[-1].append(position)
        else:
            batches.append([position])
            longest = lengths[position]
    return batches


class BatchLoader:
    """Batches of sequences, length-sorted, with a progress bar over the sequences. Can be iterated many times.

    Several processes plan the same batches, and each iterates over its share of them, which may be none.

    Each batch holds, for B sequences padded to T tokens:
        input_ids, attention_mask, labels: (B, T); labels are IGNORED_LABEL where nothing counts
        index: (B,) positions in `sequences`, to put results back in order
        weight: (B,) float32, the sequence's share in a mean measurement
        padding_mask: the attention mask once more, if `pad_to` makes padding count too

    Args:
        sequences: the tokenized texts.
        indices: which of them to use; all by default.
        weights: one for each of `sequences`; by default 1 / (number used), so that a weighted sum is the mean.
        pad_to: pad every sequence to this length instead of the longest in the batch.
        transform: applied to every batch, to add what a pass needs.
        description: text of the progress bar; no bar where it is empty.
    """

    def __init__(
        self,
        sequences: Sequence[LabelledSequence],
        tokens_per_batch: int,
        pad_token_id: int,
        device: torch.device | str = "cpu",
        indices: Sequence[int] | None = None,
        weights: np.ndarray | None = None,
        pad_to: int | None = None,
        transform: Callable[[Batch], Batch] | None = None,
        description: str = "",
    ) -> None:
        self.sequences = sequences
        self.indices = list(range(len(sequences))) if indices is None else list(indices)
        self.weights = np.full(len(sequences), 1 / max(1, len(self.indices))) if weights is None else weights
        self.pad_token_id, self.device, self.pad_to = pad_token_id, device, pad_to
        self.transform, self.description = transform, description
        lengths = [pad_to or len(sequences[index].input_ids) for index in self.indices]
        tokens_per_batch = min(tokens_per_batch, max(SMALLEST_BATCH, sum(lengths) // FEWEST_BATCHES))
        planned = plan_batches(lengths, tokens_per_batch)
        self.batches = [[self.indices[i] for i in batch] for batch in planned]
        # Attention makes the tokens of long texts more expensive; how much more depends on the model. What matters is
        # that processes take batches in turn by length, so that all get long and short ones.
        widths = [max(lengths[i] for i in batch) for batch in planned]
        self._costs = [len(batch) * width * (1 + width / 4_096) for batch, width in zip(planned, widths, strict=True)]

    def described(self, description: str) -> BatchLoader:
        """The same batches under another progress bar."""
        loader = object.__new__(BatchLoader)
        loader.__dict__.update(self.__dict__, description=description)
        return loader

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        sizes = [len(batch) for batch in self.batches]
        yield from map(self.collate, iterate_share(self.batches, self._costs, sizes, self.description, "texts"))

    def collate(self, batch: list[int]) -> Batch:
        sequences = [self.sequences[i] for i in batch]
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
            if sequence.is_counted is not None:
                labels[row, counted][~sequence.is_counted] = IGNORED_LABEL
        arrays = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "index": np.asarray(batch, dtype=np.int64),
            "weight": self.weights[batch].astype(np.float32),
        }
        tensors = {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}
        if self.pad_to:
            tensors["padding_mask"] = tensors["attention_mask"]
        return self.transform(tensors) if self.transform else tensors
