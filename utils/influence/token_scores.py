"""Influence scores of single tokens: what the loss of each token, by itself, does to the measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from utils.batching import BatchLoader
from utils.forward import logit_map
from utils.influence.gauss_newton import hidden_tangents
from utils.influence.traced_model import Gradients, TracedModel
from utils.performance_functions.losses import fisher_positions, label_nll
from utils.processes import all_reduce


@dataclass(frozen=True)
class TokenScores:
    """Scores of all tokens of all examples; positive: training on the token lowers the measurement.

    Attributes:
        scores: (queries, total tokens), example after example; 0 for tokens without a loss, such as a prompt's.
        offsets: (N + 1,) where each example's tokens begin.
    """

    scores: torch.Tensor
    offsets: torch.Tensor


def score_tokens(traced: TracedModel, loader: BatchLoader, preconditioned: Gradients) -> TokenScores:
    """Influence of the loss of every token, in one forward pass over the training data with tangents.

    s_it = grad f^T (F + damping I)^-1 grad l_t(z_i),   L(z_i) = sum_t l_t(z_i)

    is the derivative of the token's loss l_t along the preconditioned gradient, so that the tokens' scores add up to
    their example's.

    Args:
        loader: the training examples.
        preconditioned: (queries, out, in) for each Linear.
    """
    lengths = torch.tensor([len(sequence.input_ids) for sequence in loader.sequences])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    num_queries = len(next(iter(preconditioned.values())))
    scores = torch.zeros(num_queries, int(offsets[-1]), dtype=traced.curvature.dtype)
    embedding, mapping = traced.model.get_output_embeddings(), logit_map(traced.model.config)
    for batch in loader:
        is_label = fisher_positions(batch)
        hidden, tangents = hidden_tangents(traced, batch, is_label, preconditioned)
        hidden = hidden.detach().requires_grad_()
        with traced.curvature.autocast(traced.model.device):
            losses = label_nll(embedding, hidden, batch["labels"][:, 1:][is_label], mapping=mapping)
        (gradient,) = torch.autograd.grad(losses.sum(), hidden)  # (n, hidden size)
        row, position = is_label.nonzero(as_tuple=True)
        places = offsets[batch["index"][row].cpu()] + position.cpu() + 1
        scores[:, places] = torch.einsum("nh,qnh->qn", gradient, tangents.to(gradient)).to(scores)
    all_reduce(scores)
    return TokenScores(scores, offsets)
