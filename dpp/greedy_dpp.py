"""Step 3: pick a diverse subset of harmful training dialogues.

    python dpp/greedy_dpp.py
    python dpp/greedy_dpp.py --TASK_NAME combined --BOTTOM_K 50 --KERNEL rff

    F(S) = log det(I + K_S) + IF_WEIGHT * log(1 + sum_{i in S} q_i),   q = -score, min-max normalised to [0, 1]

Reads the scores of step 1 and the representations of step 2. Maximises F greedily, with K a kernel on the
representations, and writes the indices in pick order with each pick's gain in both terms.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import math
import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch

from steps import next_command, run_step
from utils.console import UserError, banner, progress_bar
from utils.locks import locked
from utils.paths import STEP_4
from utils.processes import first_process_only
from utils.rankings import load_representations, min_max_normalise, ranking_scores
from utils.registry import ModelArtifacts
from utils.selection import require_enough
from utils.settings import (
    Family,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RepairTask,
    Seed,
    Settings,
    Strategy,
    tasks_of,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the random features and of the sample behind GAMMA
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

TASK_NAME: RepairTask = "all"  # "bias", "ethics", "truth", "combined" (their weighted sum), "all" (the three in turn)
BOTTOM_K: PositiveInt = 20  # dialogues to pick; the paper's tables use 100
IF_WEIGHT: NonNegativeFloat = 10.0  # weight of the influence term against diversity
KERNEL: Literal["rbf", "rff"] = "rbf"  # "rbf" (exact), "rff" (random Fourier features, as in the paper)
NUM_FEATURES: PositiveInt = 2_048  # random Fourier features, for "rff"
GAMMA: PositiveFloat | None = None  # kernel width; None = 1 / median(pairwise distance)^2
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"
FACTOR_STRATEGY: Strategy = "ekfac"  # which scores: "ekfac", "kfac", "diagonal", "identity", "ekfac_cg"
USE_HALF_PRECISION: bool = False  # of the scores, as in step 1
# -----------------------------------------------------------------------------------------------------------

FEATURES_AT_ONCE = 1_024  # examples whose random features are computed together
CANDIDATES_AT_ONCE = 512  # whose gains the greedy algorithm updates together
MEDIAN_SAMPLE = 1_000  # examples in the seeded sample that the median distance is taken over


def center(representations: torch.Tensor) -> torch.Tensor:
    """Representations minus their mean, float32 (N, hidden): the same distances, with less cancellation."""
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
        reason = "half of the representations are the same" if total > 1 else "there is a single representation"
        raise UserError(f"GAMMA = None: {reason}, so the median heuristic is undefined; set GAMMA to a number")
    return 1 / median**2


class Kernel(Protocol):
    """A positive semi-definite kernel over the N training examples, evaluated a block at a time."""

    gamma: float
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


def require_memory(num_examples: int, hidden: int, num_features: int) -> None:
    """Check that the random features and their frequencies, float32, fit into the memory that is free.

    Raises:
        UserError: they do not.
    """
    import psutil

    needed, free = 4 * num_features * (num_examples + hidden), psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"NUM_FEATURES = {num_features}: those of {num_examples:,} dialogues take {needed / 1e9:,.1f} GB, and "
            f'{free / 1e9:,.1f} GB are free; give fewer, or set KERNEL = "rbf", which needs none'
        )


class FourierKernel:
    """The RBF kernel approximated by random Fourier features (Rahimi and Recht 2007).

    z(x) = sqrt(2 / D) cos(W x + b), W ~ N(0, 2 gamma), b ~ U(0, 2 pi); k(x, y) = z(x) . z(y)

    Args:
        representations: (N, hidden).
        num_features: D.

    Raises:
        UserError: the features do not fit into memory, or gamma is too large for them.
    """

    def __init__(self, representations: torch.Tensor, gamma: float, num_features: int, seed: int) -> None:
        require_memory(*representations.shape, num_features)
        self.gamma = gamma
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
        if not all_norms.isfinite().all():
            raise UserError(
                f"GAMMA = {gamma:g}: the kernel is too narrow for random Fourier features, whose frequencies overflow; "
                'give a smaller one, or set KERNEL = "rbf"'
            )
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
    Gains only fall, so an outdated one is an upper bound (Minoux 1978): those above the best exact gain are updated, a
    block at a time, until an exact one leads.

    Args:
        kernel: K over the N candidates.
        quality: (N,) in [0, 1].
        bottom_k: size of the subset.
        if_weight: weight of the influence term; 0 is diversity alone.
    """
    quality = quality.double()
    diversity = torch.log1p(kernel.diagonal)  # (N,) log d_i^2 after the first num_seen[i] picks
    num_seen = torch.zeros(len(quality), dtype=torch.int64)
    rows = torch.zeros(
        len(quality), bottom_k, dtype=torch.float64
    )  # row i: c_i = L^-1 k_{S,i} for the picks that i has seen
    factor = torch.zeros(bottom_k, bottom_k, dtype=torch.float64)  # L, with L L^T = I + K_S
    picks = torch.zeros(bottom_k, dtype=torch.int64)
    picked_quality = 0.0
    subset = GreedySubset([], [], [])

    def update(stale: torch.Tensor, k: int) -> None:
        """Forward substitution of the candidates' kernel values with the picks that they have not seen."""
        seen = int(num_seen[stale].min())
        new = kernel.block(stale, picks[seen:k]) - rows[stale, :seen] @ factor[seen:k, :seen].T
        upper = factor[seen:k, seen:k].T
        rows[stale, seen:k] = torch.linalg.solve_triangular(upper, new, upper=True, left=False)
        # I + K has no eigenvalue below 1, so neither has a Schur complement; the clamp undoes rounding.
        diversity[stale] = torch.log1p((kernel.diagonal[stale] - rows[stale, :k].square().sum(dim=1)).clamp_(min=0))
        num_seen[stale] = k

    with progress_bar(bottom_k, "greedy", "picks") as bar:
        for k in range(bottom_k):
            influence = if_weight * torch.log1p(quality / (1 + picked_quality))
            influence[picks[:k]] = -torch.inf  # no dialogue is picked twice
            gains = diversity + influence
            best_exact = -torch.inf
            while num_seen[j := int(gains.argmax())] < k:
                if best_exact == -torch.inf:
                    leaders = gains.topk(min(CANDIDATES_AT_ONCE, len(gains)), sorted=False).indices
                else:
                    leaders = (gains >= best_exact).nonzero()[:, 0]
                stale = leaders[(num_seen[leaders] < k) & (leaders != j)][: CANDIDATES_AT_ONCE - 1]
                stale = torch.cat([torch.tensor([j]), stale])
                update(stale, k)
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


def require_finite_objective(bottom_k: int, if_weight: float) -> None:
    """Check that the largest possible objective is a float.

    Raises:
        UserError: IF_WEIGHT is too large.
    """
    largest = bottom_k * math.log(2) + if_weight * math.log1p(bottom_k)  # no q_i is above 1, and no K_ii
    if not math.isfinite(2 * largest):  # twice, for rounding
        raise UserError(
            f"IF_WEIGHT = {if_weight:g}: the objective overflows; give a smaller one (1e6 leaves diversity no say)"
        )


def make_kernel(settings: Settings, representations: torch.Tensor) -> Kernel:
    """The KERNEL on the representations, with GAMMA or that of the median heuristic."""
    representations = center(representations)
    gamma = settings.GAMMA or median_heuristic_gamma(representations, settings.SEED)
    if settings.KERNEL == "rbf":
        return RBFKernel(representations, gamma)
    return FourierKernel(representations, gamma, settings.NUM_FEATURES, settings.SEED)


@first_process_only
def main(settings: Settings) -> None:
    """Pick a subset for every task."""
    artifacts = ModelArtifacts(settings, settings.MODEL_NAME)
    require_enough(settings.BOTTOM_K, len(artifacts.dialogues))
    require_finite_objective(settings.BOTTOM_K, settings.IF_WEIGHT)
    source, source_fingerprint, kernel = artifacts.representations(), "", None
    for task in tasks_of(settings.TASK_NAME):
        banner("step 3: diverse subset", f"{task}, {settings.MODEL_NAME}")
        scores, fingerprints = ranking_scores(artifacts, task)
        source_fingerprint = source_fingerprint or source.require()["fingerprint"]
        output = artifacts.dpp(task, **fingerprints, representations=source_fingerprint)
        with locked(output.path):
            if output.is_finished(settings.OVERWRITE):
                continue
            if kernel is None:  # shared by the tasks
                kernel = make_kernel(settings, load_representations(artifacts, source_fingerprint))
            started = time.monotonic()
            subset = greedy_dpp(kernel, min_max_normalise(-scores), settings.BOTTOM_K, settings.IF_WEIGHT)
            output.save_json({**vars(subset), "objective": subset.objective, "gamma": kernel.gamma}, started)


if __name__ == "__main__":
    run_step(main, hint=partial(next_command, STEP_4, SCORES_TYPE="dpp"))
