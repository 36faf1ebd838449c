"""Choosing the training examples to unlearn: combined scores, and the diverse greedy subset of the paper.

The sign of a score: positive means that training on the example lowers the measurement (helps), the most negative
scores are the most harmful.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from utils.console import UserError, progress_bar

FEATURES_AT_ONCE = 1_024  # examples whose random features are computed together
CANDIDATES_AT_ONCE = 512  # whose gains the greedy brings up to date together
MEDIAN_SAMPLE = 1_000  # examples in the seeded sample that the median distance is taken over


def min_max_normalise(values: torch.Tensor) -> torch.Tensor:
    """(v - min) / (max - min); all zeros where every value is the same.

    Args:
        values: (N,).

    Returns:
        (N,) float64 in [0, 1].
    """
    values = values.double()
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)


def combined_scores(scores: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted sum of the tasks' scores, each min-max normalised; the smallest are the most harmful.

    Args:
        scores: (N,) for each task.
        weights: one for each task.

    Returns:
        (N,) float64.
    """
    return torch.stack([w * min_max_normalise(s) for s, w in zip(scores, weights, strict=True)]).sum(dim=0)


def most_harmful(scores: torch.Tensor, bottom_k: int) -> list[int]:
    """Indices of the `bottom_k` smallest scores, most harmful first; ties in dataset order."""
    return torch.argsort(scores, stable=True)[:bottom_k].tolist()


def random_subset(num_examples: int, bottom_k: int, seed: int) -> list[int]:
    """Seeded uniform sample without replacement."""
    return random.Random(seed).sample(range(num_examples), bottom_k)


def rows_apart(
    purpose: Literal["retain", "validation"], taken: Collection[int], num_examples: int, count: int, seed: int
) -> list[int]:
    """A seeded sample of the training examples that are not taken, at most half of them, in dataset order.

    The order of drawing does not depend on what is taken, so that repairs are held to nearly the same examples.

    Raises:
        UserError: nothing is left.
    """
    order = random.Random(f"{purpose} {seed}").sample(range(num_examples), num_examples)
    free = [row for row in order if row not in taken]
    if len(free) < 2:
        raise UserError(
            f"{len(taken)} of {num_examples} training examples are taken, which leaves none for {purpose}; "
            "set BOTTOM_K to less"
        )
    return sorted(free[: min(count, len(free) // 2)])


def require_enough(bottom_k: int, num_examples: int) -> None:
    """Refuse a BOTTOM_K that exceeds the number of training examples.

    Raises:
        UserError: it does.
    """
    if bottom_k > num_examples:
        raise UserError(
            f"BOTTOM_K = {bottom_k}: there are {num_examples} training examples; allowed: 1 to {num_examples}"
        )


def similarity_to(answers: torch.Tensor, representations: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each example to the answers, both taken from the examples' mean.

    Representation similarity as in Hanawa et al. 2021, the usual rival of influence functions.

    Args:
        answers: (U, hidden).
        representations: (N, hidden).

    Returns:
        (N,) float64 in [-1, 1].
    """
    mean = representations.double().mean(dim=0)
    directions = (torch.nn.functional.normalize(rows.double() - mean, dim=1) for rows in (answers, representations))
    of_answers, of_examples = directions
    return of_examples @ of_answers.mean(dim=0)


def centred(representations: torch.Tensor) -> torch.Tensor:
    """Representations minus their mean, float32: distances stay, and lose fewer digits. (N, hidden)"""
    return (representations.double() - representations.double().mean(dim=0)).float()


def median_heuristic_gamma(representations: torch.Tensor, seed: int) -> float:
    """gamma = 1 / median(pairwise distance)^2 over a seeded sample of 1,000 examples.

    Args:
        representations: (N, hidden).

    Raises:
        UserError: the median distance is zero.
    """
    total = len(representations)
    sample = sorted(random.Random(seed).sample(range(total), min(MEDIAN_SAMPLE, total)))
    distances = torch.pdist(representations[sample].double())
    median = float(distances.median()) if len(distances) else 0.0
    if median == 0:
        raise UserError(
            "GAMMA = None: half of the representations are the same, so no width follows; set GAMMA to a number"
        )
    return 1 / median**2


class Kernel(Protocol):
    """A positive semi-definite kernel over the N training examples, evaluated a block at a time."""

    diagonal: torch.Tensor  # k(x_i, x_i) for all i, (N,) float64

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """k(x_i, x_j) for i in rows and j in columns, (rows, columns) float64."""


class RBFKernel:
    """k(x, y) = exp(-gamma |x - y|^2), evaluated exactly.

    Args:
        representations: (N, hidden), centred.
    """

    def __init__(self, representations: torch.Tensor, gamma: float) -> None:
        self.representations, self.gamma = representations, gamma
        self.squared_norms = torch.linalg.vector_norm(representations, dim=1).square()  # (N,)
        self.diagonal = torch.ones(len(representations), dtype=torch.float64)

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """k(x_i, x_j) for i in rows and j in columns, (rows, columns) float64."""
        dot_products = self.representations.index_select(0, rows) @ self.representations.index_select(0, columns).T
        squared_distances = self.squared_norms[rows, None] + self.squared_norms[columns] - 2 * dot_products
        return torch.exp(-self.gamma * squared_distances.clamp_(min=0).double())


class FourierKernel:
    """The RBF kernel approximated by random Fourier features (Rahimi and Recht 2007).

    z(x) = sqrt(2 / D) cos(W x + b), W ~ N(0, 2 gamma), b ~ U(0, 2 pi); k(x, y) = z(x) . z(y)

    Args:
        representations: (N, hidden).
        num_features: D.
    """

    def __init__(self, representations: torch.Tensor, gamma: float, num_features: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        hidden = representations.shape[1]
        frequencies = torch.randn(hidden, num_features, generator=generator) * math.sqrt(2 * gamma)
        phases = torch.rand(num_features, generator=generator) * 2 * math.pi
        self.scale = 2 / num_features
        self.cosines = torch.empty(len(representations), num_features)  # (N, D): z without its factor
        all_norms = torch.empty(len(representations))
        # A chunk at a time, so that each pass over its cosines finds them in the cache.
        for some, cosines, norms in zip(
            *(tensor.split(FEATURES_AT_ONCE) for tensor in (representations, self.cosines, all_norms)), strict=True
        ):
            torch.addmm(phases, some, frequencies, out=cosines).cos_()
            torch.linalg.vector_norm(cosines, dim=1, out=norms)
        self.diagonal = self.scale * all_norms.double().square()

    def block(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """z(x_i) . z(x_j) for i in rows and j in columns, (rows, columns) float64."""
        cosines = self.cosines.index_select(0, rows) @ self.cosines.index_select(0, columns).T
        return self.scale * cosines.double()


@dataclass(frozen=True)
class GreedySubset:
    """The greedy's picks in order and each pick's gain in the objective, split into its two terms."""

    indices: list[int]
    diversity_gains: list[float]
    influence_gains: list[float]

    @property
    def objective(self) -> float:
        """Value of the objective at the whole subset."""
        return math.fsum(self.diversity_gains) + math.fsum(self.influence_gains)


def greedy_dpp(kernel: Kernel, quality: torch.Tensor, bottom_k: int, if_weight: float) -> GreedySubset:
    """Greedy maximisation of the paper's objective, within 1 - 1/e of the best subset (Nemhauser et al. 1978).

    F(S) = log det(I + K_S) + if_weight * log(1 + sum_{i in S} q_i)

    The gain of i is log d_i^2 + if_weight * log((1 + Q + q_i) / (1 + Q)), where Q is the quality picked so far and
    d_i^2 the Schur complement of i in I + K, kept by an incremental Cholesky factor (Chen, Zhang and Zhou 2018).
    Gains only fall, so an old one is an upper bound (Minoux 1978): those above the best exact gain are brought up to
    date, a block at a time, until an exact one leads.

    Args:
        kernel: K over the N candidates.
        quality: (N,) in [0, 1].
        bottom_k: size of the subset.
        if_weight: weight of the influence term; 0 is diversity alone.
    """
    quality = quality.double()
    diversity = torch.log1p(kernel.diagonal)  # (N,) log d_i^2 after the first num_seen[i] picks
    num_seen = torch.zeros(len(quality), dtype=torch.int64)
    rows = torch.zeros(len(quality), bottom_k, dtype=torch.float64)  # row i: c_i = L^-1 k_{S,i}, as far as seen
    factor = torch.zeros(bottom_k, bottom_k, dtype=torch.float64)  # L, with L L^T = I + K_S
    picks = torch.zeros(bottom_k, dtype=torch.int64)
    picked_quality = 0.0
    subset = GreedySubset([], [], [])

    def bring_up_to_date(stale: torch.Tensor, k: int) -> None:
        """Forward substitution of the candidates' kernel values with the picks that they have not seen."""
        seen = int(num_seen[stale].min())
        new = kernel.block(stale, picks[seen:k]) - rows[stale, :seen] @ factor[seen:k, :seen].T
        upper = factor[seen:k, seen:k].T
        rows[stale, seen:k] = torch.linalg.solve_triangular(upper, new, upper=True, left=False)
        # I + K has no eigenvalue below 1, so neither has a Schur complement; rounding must not say otherwise.
        diversity[stale] = torch.log1p((kernel.diagonal[stale] - rows[stale, :k].square().sum(dim=1)).clamp_(min=0))
        num_seen[stale] = k

    with progress_bar(bottom_k, "greedy", "picks") as bar:
        for k in range(bottom_k):
            influence = if_weight * torch.log1p(quality / (1 + picked_quality))
            influence[picks[:k]] = -torch.inf  # what is picked is not picked again
            gains = diversity + influence
            best_exact = -torch.inf
            while num_seen[j := int(gains.argmax())] < k:
                if best_exact == -torch.inf:
                    leaders = gains.topk(min(CANDIDATES_AT_ONCE, len(gains)), sorted=False).indices
                else:
                    leaders = (gains >= best_exact).nonzero()[:, 0]
                stale = leaders[(num_seen[leaders] < k) & (leaders != j)][: CANDIDATES_AT_ONCE - 1]
                stale = torch.cat([torch.tensor([j]), stale])
                bring_up_to_date(stale, k)
                gains[stale] = diversity[stale] + influence[stale]
                best_exact = max(best_exact, float(gains[stale].max()))
            subset.indices.append(j)
            subset.diversity_gains.append(float(diversity[j]))
            subset.influence_gains.append(float(influence[j]))
            factor[k, :k], factor[k, k] = rows[j, :k], torch.exp(diversity[j] / 2)
            picks[k] = j
            picked_quality += float(quality[j])
            bar.update()
    return subset
