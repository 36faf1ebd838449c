"""The incremental greedy against a plain lazy greedy, against the log-determinant itself, and against brute force."""

from __future__ import annotations

import heapq
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dpp import greedy_dpp as greedy_script
from dpp.greedy_dpp import FourierKernel, Kernel, RBFKernel, center, greedy_dpp, median_heuristic_gamma
from utils import rankings
from utils.console import UserError
from utils.rankings import combined_scores, combined_token_scores, min_max_normalise, ranking_scores
from utils.selection import most_harmful, random_subset, require_enough
from utils.settings import TASK_NAMES


def full_kernel(kernel: Kernel) -> torch.Tensor:
    everything = torch.arange(len(kernel.diagonal))
    matrix = kernel.block(everything, everything).fill_diagonal_(0)
    return (matrix + matrix.T) / 2 + torch.diag(kernel.diagonal)


def objective(matrix: torch.Tensor, quality: torch.Tensor, subset: list[int], if_weight: float) -> float:
    """log det(I + K_S) + if_weight * log(1 + sum q), straight from its definition."""
    block = torch.eye(len(subset), dtype=torch.float64) + matrix[subset][:, subset]
    return float(torch.logdet(block)) + if_weight * math.log1p(float(quality[subset].sum()))


def lazy_greedy(matrix: torch.Tensor, quality: torch.Tensor, bottom_k: int, if_weight: float) -> list[int]:
    """Minoux's lazy greedy on a heap of stale gains, each gain from a full log-determinant."""
    picks: list[int] = []
    heap = [(-objective(matrix, quality, [i], if_weight), i, 0) for i in range(len(quality))]
    heapq.heapify(heap)
    value = 0.0
    while len(picks) < bottom_k:
        gain, i, age = heapq.heappop(heap)
        if age == len(picks):
            picks.append(i)
            value -= gain
        else:
            heapq.heappush(heap, (value - objective(matrix, quality, [*picks, i], if_weight), i, len(picks)))
    return picks


def make_kernel(name: str, count: int, seed: int) -> Kernel:
    generator = torch.Generator().manual_seed(seed)
    representations = center(torch.randn(count, 8, generator=generator) + 50)
    gamma = median_heuristic_gamma(representations, seed)
    return RBFKernel(representations, gamma) if name == "rbf" else FourierKernel(representations, gamma, 64, seed)


@pytest.mark.parametrize("name", ["rbf", "rff"])
@pytest.mark.parametrize("if_weight", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("at_once", [1, 7, 1_024])
def test_greedy_equals_the_lazy_greedy(monkeypatch, name, if_weight, seed, at_once):
    monkeypatch.setattr(greedy_script, "CANDIDATES_AT_ONCE", at_once)
    kernel = make_kernel(name, 120, seed)
    quality = torch.rand(120, generator=torch.Generator().manual_seed(seed + 7), dtype=torch.float64)
    matrix = full_kernel(kernel)
    subset = greedy_dpp(kernel, quality, 15, if_weight)
    assert subset.indices == lazy_greedy(matrix, quality, 15, if_weight)
    assert subset.objective == pytest.approx(objective(matrix, quality, subset.indices, if_weight), rel=1e-6)
    for count in (1, 5, 10):
        so_far = math.fsum(subset.diversity_gains[:count]) + math.fsum(subset.influence_gains[:count])
        assert so_far == pytest.approx(objective(matrix, quality, subset.indices[:count], if_weight), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_within_its_guarantee_of_brute_force(seed):
    kernel = make_kernel("rbf", 10, seed)
    quality = torch.rand(10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = full_kernel(kernel)
    best = max(objective(matrix, quality, list(s), 2.0) for s in itertools.combinations(range(10), 4))
    found = greedy_dpp(kernel, quality, 4, 2.0).objective
    assert (1 - 1 / math.e) * best <= found <= best + 1e-6


def test_greedy_picks_everything_once_among_duplicates():
    representations = center(torch.tensor([[0.0], [0.0], [0.0], [9.0]]))
    subset = greedy_dpp(RBFKernel(representations, 1.0), torch.zeros(4), 4, 0.0)
    assert sorted(subset.indices) == [0, 1, 2, 3]
    assert set(subset.indices[:2]) & {3}, "the outlier is among the first two: it is the most diverse"
    assert all(math.isfinite(gain) for gain in subset.diversity_gains)


def test_a_heavy_influence_term_picks_by_quality():
    kernel = make_kernel("rbf", 50, 3)
    quality = torch.linspace(0, 1, 50)
    assert greedy_dpp(kernel, quality, 5, 1e6).indices == [49, 48, 47, 46, 45]


def test_rbf_block_is_the_exact_kernel():
    representations = center(torch.randn(40, 6) * 3 + 100)
    rows, columns = torch.tensor([7, 3]), torch.arange(8, 40)
    block = RBFKernel(representations, 0.05).block(rows, columns)
    exact = torch.exp(-0.05 * torch.cdist(representations[rows].double(), representations[columns].double()) ** 2)
    torch.testing.assert_close(block, exact, atol=1e-6, rtol=0)


def test_fourier_features_approximate_the_kernel():
    representations = center(torch.randn(60, 6))
    exact, rough = RBFKernel(representations, 0.1), FourierKernel(representations, 0.1, 16_384, seed=0)
    assert float((full_kernel(exact) - full_kernel(rough)).abs().max()) < 0.05


def test_gamma_is_the_inverse_squared_median_distance():
    representations = torch.tensor([[0.0], [1.0], [3.0]])  # distances 1, 2, 3
    assert median_heuristic_gamma(representations, seed=42) == pytest.approx(1 / 4)
    with pytest.raises(UserError, match="GAMMA"):
        median_heuristic_gamma(torch.zeros(5, 3), seed=42)


def test_min_max_normalise():
    assert min_max_normalise(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]
    assert min_max_normalise(torch.full((3,), 7.0)).tolist() == [0, 0, 0]


def test_combined_scores_weigh_normalised_tasks():
    scores = [torch.tensor([0.0, 10.0]), torch.tensor([5.0, -5.0]), torch.tensor([1.0, 1.0])]
    assert combined_scores(scores, [1, 1, 1]).tolist() == [1, 1]
    assert combined_scores(scores, [2, 0.5, 1]).tolist() == [0.5, 2]


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e308])
def test_combined_token_scores_add_up_to_combined_scores_but_for_a_constant(scale):
    weights = {"bias": 0.5 * scale, "ethics": 0.0, "truth": 1.0 * scale}
    of_tokens = {name: torch.randn(20, dtype=torch.float64) / 100 for name in weights}
    of_dialogues = {name: tokens.reshape(5, 4).sum(dim=1) for name, tokens in of_tokens.items()}
    of_dialogues["ethics"] = torch.zeros(5)  # no span
    combined = combined_scores(list(of_dialogues.values()), [0.5, 0.0, 1.0])
    constants = combined_token_scores(of_tokens, of_dialogues, weights).reshape(5, 4).sum(dim=1) - combined
    torch.testing.assert_close(constants, constants[:1].expand(5))


def test_most_harmful_are_the_smallest_in_order():
    assert most_harmful(torch.tensor([3.0, -1.0, -2.0, -1.0]), 3) == [2, 1, 3]


def test_random_subset_has_the_released_picks():
    import random

    random.seed(42)
    assert random_subset(96_256, 100, seed=42) == random.sample(range(96_256), 100)


def test_more_than_there_are_is_refused():
    require_enough(5, 5)
    with pytest.raises(UserError, match="BOTTOM_K = 6.*1 to 5"):
        require_enough(6, 5)


@pytest.mark.parametrize("if_weight", [0.0, 5e-324, 1e-300, 1e300, 1e307])
@pytest.mark.parametrize("gamma", [5e-324, 1e-300, 1e-8, 1.0, 1e30, 1e300, 1.7e308])
@pytest.mark.parametrize("name", ["rbf", "rff"])
def test_extreme_constants_give_a_result_or_one_line(name, gamma, if_weight, recwarn):
    representations = center(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)))
    representations[3] = representations[4]
    greedy_script.require_finite_objective(7, if_weight)
    try:
        kernel = RBFKernel(representations, gamma) if name == "rbf" else FourierKernel(representations, gamma, 16, 0)
    except UserError as error:
        kernel, told = None, str(error)
    if kernel is None:
        assert (name, gamma > 1e70) == ("rff", True)
        assert "GAMMA = " in told
        return
    subset = greedy_dpp(kernel, min_max_normalise(torch.arange(30.0)), 7, if_weight)
    assert len(set(subset.indices)) == 7
    assert all(map(math.isfinite, [*subset.diversity_gains, *subset.influence_gains, subset.objective]))
    assert not list(recwarn)


def test_a_weight_that_overflows_is_refused():
    with pytest.raises(UserError, match=r"IF_WEIGHT = 1e\+308: the objective overflows"):
        greedy_script.require_finite_objective(20, 1e308)


@pytest.mark.parametrize("num_features", [10**12, 2**40])
def test_features_that_do_not_fit_into_memory_are_refused_before_they_are_made(num_features):
    with pytest.raises(UserError, match=rf'NUM_FEATURES = {num_features}: .* GB are free; .*KERNEL = "rbf"'):
        FourierKernel(torch.zeros(30, 8), 1.0, num_features, 0)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e308])
def test_the_scale_of_the_task_weights_does_not_matter(scale, monkeypatch):
    scores = {name: torch.randn(9, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(TASK_NAMES)}

    monkeypatch.setattr(rankings, "task_scores", lambda _, __, name: (scores[name], {}))

    def ranked(weights: list[float]) -> torch.Tensor:
        artifacts = SimpleNamespace(settings=SimpleNamespace(TASK_WEIGHTS=weights))
        return ranking_scores(artifacts, "combined")[0]

    assert ranked([scale] * 3).tolist() == ranked([1.0, 1.0, 1.0]).tolist()
    assert ranked([scale, 0.0, 0.0]).tolist() == min_max_normalise(scores["bias"]).tolist()
