"""The losses of the paper as small pure functions. Everything is built on one: the NLL of the label tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel

from utils.batching import IGNORED_LABEL, Batch
from utils.models import last_hidden_state

SAMPLING_BLOCK = 256  # vocabulary entries that are summed together when a label is drawn


class SequenceNLL(NamedTuple):
    """Negative log-likelihood of each sequence's label tokens.

    Attributes:
        total: (B,) sum over the sequence's label tokens, in nats.
        num_tokens: (B,) number of its label tokens.
    """

    total: torch.Tensor
    num_tokens: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """(B,) nats per label token; 0 for a sequence without labels (a prompt that fills the whole context)."""
        return self.total / self.num_tokens.clamp(min=1)


def label_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, predicts_label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits where a label is predicted, and only there: the output embedding is the dearest part of a pass.

    Args:
        input_ids: (B, T).
        predicts_label: (B, T - 1) bool, True at t where the token at t + 1 is a label.

    Returns:
        Logits (n, vocabulary) in float32, and the row in the batch (n,) that each belongs to.
    """
    hidden = last_hidden_state(model, input_ids)[:, :-1]  # (B, T - 1, hidden)
    logits = model.get_output_embeddings()(hidden[predicts_label])
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), predicts_label.nonzero()[:, 0]


def _sum_by_row(values: torch.Tensor, rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    return values.new_zeros(num_rows).index_add(0, rows, values)


def sequence_nll(model: PreTrainedModel, batch: Batch) -> SequenceNLL:
    """Teacher-forced NLL of every sequence in a batch."""
    targets = batch["labels"][:, 1:]
    is_label = targets != IGNORED_LABEL
    logits, rows = label_logits(model, batch["input_ids"], is_label)
    token_nll = F.cross_entropy(logits, targets[is_label], reduction="none")  # (n,)
    return SequenceNLL(_sum_by_row(token_nll, rows, len(targets)), is_label.sum(dim=1))


def log_odds_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The measurement of each answer pair; lower is better.

    f = NLL(chosen) / tokens(chosen) - NLL(rejected) / tokens(rejected)   (the paper's log-odds loss)

    Args:
        batch: B pairs, as 2 B sequences: the chosen answers, then the rejected ones.

    Returns:
        (B,) nats per token.
    """
    chosen, rejected = sequence_nll(model, batch).mean.chunk(2)
    return chosen - rejected


def fisher_draws(seed: int, index: int, count: int) -> np.ndarray:
    """Uniform draws for one example's sampled labels: they depend on the example alone, not on its batch."""
    return np.random.default_rng((seed, index)).random(count)


def sampled_label_loss(model: PreTrainedModel, batch: Batch, seed: int, all_positions: bool = False) -> torch.Tensor:
    """Cross-entropy on labels drawn from the model itself; its gradient's covariance is the true Fisher.

    F = E_x E_{y ~ p(y | x)} [grad log p(y | x) grad log p(y | x)^T]   (Martens 2020; Grosse et al. 2023, section 2)

    Args:
        seed: of the draws.
        all_positions: draw labels at prompt and padding positions too, as the released code does.

    Returns:
        Scalar, summed over the positions.
    """
    predicts_label = torch.ones_like(batch["labels"][:, 1:], dtype=torch.bool)
    if not all_positions:
        predicts_label = batch["labels"][:, 1:] != IGNORED_LABEL
    logits, rows = label_logits(model, batch["input_ids"], predicts_label)
    counts = torch.bincount(rows, minlength=len(predicts_label)).tolist()
    draws = [fisher_draws(seed, index, n) for index, n in zip(batch["index"].tolist(), counts, strict=True)]
    uniform = torch.from_numpy(np.concatenate(draws)).to(logits.device)
    return F.cross_entropy(logits, inverse_cdf_sample(logits.detach(), uniform), reduction="sum")


def inverse_cdf_sample(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from softmax(logits) by inverting its distribution function at uniform draws.

    The function is summed block by block, the blocks in float64: over 50,000 entries a float32 running sum would lose
    the small probabilities, and a float64 one of every single entry costs more than the model does.

    Args:
        logits: (n, vocabulary).
        uniform: (n,) float64 in [0, 1).

    Returns:
        (n,) labels.
    """
    vocabulary = logits.shape[1]
    padded = F.pad(logits.softmax(dim=1), (0, -vocabulary % SAMPLING_BLOCK))
    blocks = padded.unflatten(1, (-1, SAMPLING_BLOCK))  # (n, blocks, SAMPLING_BLOCK)
    block_sums = blocks.sum(dim=2).double()  # (n, blocks)
    cumulative = block_sums.cumsum(dim=1)
    target = uniform[:, None] * cumulative[:, -1:]  # (n, 1)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    below = cumulative.gather(1, block) - block_sums.gather(1, block)
    within = blocks[torch.arange(len(blocks), device=logits.device), block[:, 0]].double().cumsum(dim=1)
    position = torch.searchsorted(within, target - below, right=True).clamp_(max=SAMPLING_BLOCK - 1)
    return (block * SAMPLING_BLOCK + position)[:, 0].clamp_(max=vocabulary - 1)
