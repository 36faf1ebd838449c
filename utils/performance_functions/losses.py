"""The losses that everything is measured with, as pure functions of a model and a batch.

Logits are formed only where a label is predicted, and only a bounded chunk at a time: the output embedding is
the most expensive part of a pass, and its full logits would be the largest tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from utils.batching import IGNORED_LABEL, Batch
from utils.forward import PLAIN_LOGITS, LogitMap, last_hidden_state, logit_map, prediction_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLING_BLOCK = 256  # vocabulary entries that are summed together when a label is drawn
LOGIT_BYTES_ON_CPU = 30 << 20  # a chunk of logits: stays in the cache, and in the heap that malloc reuses
LOGIT_BYTES_ON_GPU = 1 << 30
KNOWN_LABELS = "known_labels"  # in a batch: `KnownLabels`, for passes that see it again with the same weights
KnownLabels = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by kind of labels: NLL (n,), gradients (n, hidden size)


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


def logit_chunks(hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[slice]:
    """Stretches of hidden states (n, hidden size) whose logits, with the output embedding's weight, are small enough.

    Float32 is the precision of logits, or that of the states where it is wider.
    """
    logit_bytes = LOGIT_BYTES_ON_GPU if hidden.is_cuda else LOGIT_BYTES_ON_CPU
    rows = max(1, logit_bytes // (len(weight) * max(4, hidden.element_size())))
    for start in range(0, len(hidden), rows):
        yield slice(start, start + rows)


class _LabelNLL(torch.autograd.Function):
    """NLL of labels straight from hidden states; the gradient is computed with the loss, chunk by chunk.

    grad_hidden NLL_t = (slope_t * (softmax(logits_t) - onehot(label_t))) W, so no logits need to be kept for the
    backward pass; slope = d logits / d(W h + b), 1 unless the model scales or caps its logits.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor | None,
        uniform: torch.Tensor | None,
        mapping: LogitMap,
        known: KnownLabels | None,
        kind: str,
    ) -> torch.Tensor:
        if known and kind in known:
            nll, gradient = known[kind]
            ctx.save_for_backward(gradient)
            return nll.clone()
        at_least_float32 = torch.promote_types(hidden.dtype, torch.float32)
        nll = hidden.new_empty(len(hidden), dtype=at_least_float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for chunk in logit_chunks(hidden, weight):
            logits = mapping.apply(F.linear(hidden[chunk], weight, bias).to(at_least_float32))  # (rows, vocabulary)
            slope = mapping.slope(logits) if gradient is not None else None  # (rows, vocabulary) or a number
            logits -= logits.amax(dim=1, keepdim=True)
            labels = None if targets is None else targets[chunk, None]
            label_logits = None if targets is None else logits.gather(1, labels)
            unnormalised = logits.exp_()
            normaliser = unnormalised.sum(dim=1, keepdim=True)
            if targets is None:
                labels = inverse_cdf_sample(unnormalised, uniform[chunk])[:, None]
                label_logits = unnormalised.gather(1, labels).clamp_(min=torch.finfo(at_least_float32).tiny).log()
            nll[chunk] = (normaliser.log() - label_logits)[:, 0]
            if gradient is not None:
                probabilities = unnormalised.div_(normaliser)
                probabilities.scatter_add_(1, labels, -torch.ones_like(normaliser))
                if mapping != PLAIN_LOGITS:
                    probabilities *= slope
                gradient[chunk] = probabilities.to(weight.dtype) @ weight
        if known is not None and gradient is not None:
            known[kind] = (nll.clone(), gradient)
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None].to(gradient.dtype), *[None] * 7


def label_nll(
    output_embedding: nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor | None = None,
    uniform: torch.Tensor | None = None,
    mapping: LogitMap = PLAIN_LOGITS,
    known: KnownLabels | None = None,
    kind: str = "",
) -> torch.Tensor:
    """NLL of one label for each hidden state; differentiable in the hidden states alone.

    Args:
        output_embedding: frozen, where gradients are required.
        hidden: (n, hidden size).
        targets: (n,) labels.
        uniform: (n,) float64 in [0, 1), in place of targets: labels are drawn from the model by inverting its
            distribution function.
        mapping: from the output embedding's product to the model's logits.
        known: what an earlier pass found for the same states and labels, in place of all of these; filled in if empty.
        kind: of the labels, in `known`.

    Returns:
        (n,) nats, float32 or wider.

    Raises:
        ValueError: the output embedding requires a gradient, which is not computed here.
    """
    if torch.is_grad_enabled() and output_embedding.weight.requires_grad:
        raise ValueError("label_nll has no gradient for the output embedding; freeze it")
    weight, bias = output_embedding.weight, output_embedding.bias
    return _LabelNLL.apply(hidden, weight, bias, targets, uniform, mapping, known, kind)


def label_hidden_states(
    model: PreTrainedModel, batch: Batch, predicts_label: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states that predict a label, ready for the output embedding.

    Args:
        predicts_label: (B, T - 1) bool, True at t where the token at t + 1 is a label.

    Returns:
        Hidden states (n, hidden size), and the row in the batch (n,) that each belongs to.
    """
    hidden = last_hidden_state(model, batch)[:, :-1][predicts_label]
    return prediction_states(model, hidden), predicts_label.nonzero()[:, 0]


def sequence_nll(model: PreTrainedModel, batch: Batch) -> SequenceNLL:
    """Teacher-forced NLL of every sequence in a batch."""
    targets = batch["labels"][:, 1:]
    is_label = targets != IGNORED_LABEL
    hidden, rows = label_hidden_states(model, batch, is_label)
    mapping, known = logit_map(model.config), batch.get(KNOWN_LABELS)
    token_nll = label_nll(
        model.get_output_embeddings(), hidden, targets[is_label], mapping=mapping, known=known, kind="of the data"
    )  # (n,)
    total = token_nll.new_zeros(len(targets)).index_add(0, rows, token_nll)
    return SequenceNLL(total, is_label.sum(dim=1))


def log_odds_losses(mean_nll: torch.Tensor, chosen: np.ndarray, rejected: np.ndarray) -> torch.Tensor:
    """The measurement of each answer pair; lower is better.

    f = NLL(chosen) / tokens(chosen) - NLL(rejected) / tokens(rejected)   (the paper's log-odds loss)

    Args:
        mean_nll: (U,) nats per answer token of each distinct sequence.
        chosen: (P,) positions in `mean_nll`.
        rejected: (P,) the same for the rejected answers.

    Returns:
        (P,) nats per token.
    """
    return mean_nll[chosen] - mean_nll[rejected]


def multiple_choice(
    total_nll: torch.Tensor, questions: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """TruthfulQA's MC1 and MC2 of each question, from log-probabilities of whole answers (Lin, Hilton and Evans 2022).

    MC1 = 1 where log p(best answer) > log p(answer) of every incorrect one, else 0
    MC2 = sum of p(answer) over the correct answers / the same over all answers

    Args:
        total_nll: (U,) nats of each distinct sequence.
        questions: for each question the positions of its correct answers, the best first, and of its incorrect ones.

    Returns:
        (Q,) and (Q,) float64.
    """
    mc1, mc2 = [], []
    for correct, incorrect in questions:
        log_probabilities = -total_nll[np.concatenate([correct, incorrect])].double()
        mc1.append(log_probabilities[0] > log_probabilities[len(correct) :].max())
        mc2.append(log_probabilities.softmax(dim=0)[: len(correct)].sum())
    return torch.stack(mc1).double(), torch.stack(mc2)


def fisher_draws(seed: int, index: int, count: int) -> np.ndarray:
    """Uniform draws for one example's sampled labels: they depend on the example alone, not on its batch."""
    return np.random.default_rng((seed, index)).random(count)


def fisher_positions(batch: Batch, all_positions: bool = False) -> torch.Tensor:
    """(B, T - 1) bool: the positions whose labels the Fisher is about, those of the training loss or all."""
    is_label = batch["labels"][:, 1:] != IGNORED_LABEL
    return torch.ones_like(is_label) if all_positions else is_label


def sampled_label_loss(model: PreTrainedModel, batch: Batch, seed: int, all_positions: bool = False) -> torch.Tensor:
    """Cross-entropy on labels drawn from the model itself; its gradient's covariance is the true Fisher.

    F = E_x E_{y ~ p(y | x)} [grad log p(y | x) grad log p(y | x)^T]   (Martens 2020; Grosse et al. 2023, section 2)

    Args:
        seed: of the draws.
        all_positions: draw labels at prompt and padding positions too, as the released code does.

    Returns:
        Scalar, summed over the positions.
    """
    predicts_label = fisher_positions(batch, all_positions)
    hidden, rows = label_hidden_states(model, batch, predicts_label)
    counts = torch.bincount(rows, minlength=len(predicts_label)).tolist()
    draws = [fisher_draws(seed, index, n) for index, n in zip(batch["index"].tolist(), counts, strict=True)]
    uniform = torch.from_numpy(np.concatenate(draws)).to(hidden.device)
    embedding, mapping, known = model.get_output_embeddings(), logit_map(model.config), batch.get(KNOWN_LABELS)
    return label_nll(embedding, hidden, uniform=uniform, mapping=mapping, known=known, kind="sampled").sum()


def inverse_cdf_sample(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draw from a discrete distribution by inverting its distribution function at uniform draws.

    The function is summed block by block, the blocks in float64: over 50,000 entries a float32 running sum would lose
    the small probabilities, and a float64 one of every single entry costs more than the model does.

    Args:
        weights: (n, vocabulary), not negative; they need not sum to 1.
        uniform: (n,) float64 in [0, 1).

    Returns:
        (n,) labels.
    """
    vocabulary = weights.shape[1]
    if vocabulary % SAMPLING_BLOCK:
        weights = F.pad(weights, (0, -vocabulary % SAMPLING_BLOCK))
    blocks = weights.unflatten(1, (-1, SAMPLING_BLOCK))  # (n, blocks, SAMPLING_BLOCK)
    block_sums = blocks.sum(dim=2).double()  # (n, blocks)
    cumulative = block_sums.cumsum(dim=1)
    target = uniform[:, None] * cumulative[:, -1:]  # (n, 1)
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks.shape[1] - 1)
    below = cumulative.gather(1, block) - block_sums.gather(1, block)
    within = blocks[torch.arange(len(blocks), device=weights.device), block[:, 0]].double().cumsum(dim=1)
    position = torch.searchsorted(within, target - below, right=True).clamp_(max=SAMPLING_BLOCK - 1)
    return (block * SAMPLING_BLOCK + position)[:, 0].clamp_(max=vocabulary - 1)
