"""Standard errors and intervals against a bootstrap, another library's numbers, and simulated data."""

from __future__ import annotations

import math

import pytest
import torch

from utils.intervals import ClusterSums, Estimate, estimate_difference, estimate_mean, sum_by_cluster
from utils.results import compare, quantities, summarise


def simulated(generator: torch.Generator, num_clusters: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Values around `shift` and their clusters, which differ in size and have an effect as large as the noise."""
    sizes = torch.randint(1, 8, (num_clusters,), generator=generator)
    clusters = torch.repeat_interleave(torch.arange(num_clusters), sizes)
    effects = torch.randn(num_clusters, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(clusters), generator=generator, dtype=torch.float64)
    return shift + effects[clusters] + noise, clusters


def test_mean_error_and_interval_are_those_of_statsmodels():
    """OLS on a constant, cov_type="cluster", use_t=True, in statsmodels 0.15.0."""
    values = torch.tensor([0.31, -0.12, 0.55, 0.08, 0.47, -0.3, 0.22, 0.91, 0.14, -0.05, 0.66, 0.39])
    clusters = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])
    estimate = estimate_mean(sum_by_cluster(values.double(), clusters))
    assert estimate.value == pytest.approx(0.2716666666666668, abs=1e-7)
    assert estimate.standard_error == pytest.approx(0.05739279794689263, rel=1e-6)
    assert estimate.interval == pytest.approx((0.11231871, 0.43101462), abs=1e-7)


def test_error_is_that_of_a_cluster_bootstrap():
    generator = torch.Generator().manual_seed(1)
    values, clusters = simulated(generator, 80)
    sums = sum_by_cluster(values, clusters)
    drawn = torch.randint(80, (20_000, 80), generator=generator)
    means = sums.total[drawn].sum(dim=1) / sums.count[drawn].sum(dim=1)
    error = estimate_mean(sums).standard_error
    assert error == pytest.approx(float(means.std()), rel=0.04)
    assert error > 1.3 * float(values.std()) / len(values) ** 0.5  # as if all values were independent


@pytest.mark.parametrize("num_clusters", [8, 60])
def test_intervals_cover_the_truth_in_95_percent(num_clusters):
    """Of 2,000 data sets; the mean, and a paired difference whose two sides share the clusters' effects."""
    generator = torch.Generator().manual_seed(num_clusters)
    covered = {"mean": 0, "difference": 0}
    for _ in range(2_000):
        before, clusters = simulated(generator, num_clusters, shift=0.5)
        change = torch.randn(num_clusters, generator=generator, dtype=torch.float64)[clusters] + 0.2
        sums, after = (sum_by_cluster(values, clusters) for values in (before, before - change))
        for name, estimate, truth in (
            ("mean", estimate_mean(sums), 0.5),
            ("difference", estimate_difference(sums, after), 0.2),
        ):
            low, high = estimate.interval
            covered[name] += low <= truth <= high
    assert all(0.93 <= count / 2_000 <= 0.97 for count in covered.values()), covered


def test_a_single_cluster_has_no_interval():
    estimate = estimate_mean(sum_by_cluster(torch.tensor([0.1, 0.4]), torch.tensor([0, 0])))
    assert math.isinf(estimate.margin)
    assert estimate.fields("loss") == {
        "loss": pytest.approx(0.25),
        "loss_standard_error": None,
        "loss_low": None,
        "loss_high": None,
    }


def test_clusters_without_a_value_count_nothing():
    """A dialogue may have no label."""
    total, count = torch.tensor([30.0, 44.0]).double(), torch.tensor([10, 20])
    empty = torch.zeros(4)
    padded = ClusterSums(torch.cat([total, empty.double()]), torch.cat([count, empty.long()]))
    assert estimate_mean(padded) == estimate_mean(ClusterSums(total, count))
    assert estimate_mean(ClusterSums(padded.total[1:], padded.count[1:])).fields("loss")["loss_low"] is None


def test_the_interval_is_students():
    assert Estimate(0.0, 1.0, 11).margin == pytest.approx(2.228139, abs=1e-6)  # the tabled value for 10 degrees
    assert Estimate(0.0, 1.0, 100_001).margin == pytest.approx(1.96, abs=1e-3)


# -------------------------------------------------------------------------------------------------- results


def test_perplexity_and_its_change_come_with_intervals():
    before = {"nll": torch.tensor([30.0, 44.0, 12.0, 70.0]).double(), "tokens": torch.tensor([10, 20, 5, 30])}
    after = {**before, "nll": before["nll"] + torch.tensor([0.5, 0.1, 0.3, 0.9]).double()}
    numbers = summarise(before)
    assert numbers["perplexity"] == pytest.approx(math.exp(156 / 65))
    assert numbers["perplexity_low"] == pytest.approx(math.exp(numbers["loss_low"]))
    assert (numbers["tokens"], numbers["dialogues"]) == (65, 4)
    row = compare("anthropic", before, after)["perplexity"]
    rise = estimate_mean(ClusterSums(after["nll"] - before["nll"], before["tokens"]))
    assert row["change_percent"] == pytest.approx(100 * (row["after"] - row["before"]) / row["before"])
    assert row["change_percent_high"] == pytest.approx(100 * math.expm1(rise.interval[1]))


def test_a_change_that_no_float_holds_has_no_end():
    before = {"nll": torch.tensor([30.0, 40.0, 35.0]).double(), "tokens": torch.tensor([10, 10, 10])}
    after = {**before, "nll": torch.tensor([800.0, 3000.0, 5000.0]).double()}
    row = compare("anthropic", before, after)["perplexity"]
    assert row["change_percent"] > 1e100
    assert row["change_percent_high"] is None
    assert summarise(after)["perplexity_high"] is None


def pair_losses(*values: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(values).double(), "cluster": torch.arange(len(values)) // 2}


def test_an_improvement_is_paired_and_comes_before_its_percentage():
    before, after = pair_losses(0.5, 0.7, 0.9, 0.4, 0.8, 0.6), pair_losses(0.4, 0.7, 0.7, 0.3, 0.6, 0.6)
    row = compare("bias", before, after)["bias"]
    assert row["improvement"] == pytest.approx(0.1)
    paired = estimate_difference(quantities(before)["loss"], quantities(after)["loss"])
    assert (row["improvement_low"], row["improvement_high"]) == paired.interval
    apart = [estimate_mean(quantities(losses)["loss"]).standard_error for losses in (before, after)]
    assert row["improvement_standard_error"] < math.hypot(*apart)
    assert row["improvement_percent"] == pytest.approx(100 * 0.1 / 0.65)
    assert list(row)[2] == "improvement"


def test_no_percentage_of_a_loss_that_may_be_zero():
    before = pair_losses(0.5, 0.7, -0.9, -0.4, 0.3, -0.1)
    base = estimate_mean(quantities(before)["loss"])
    assert abs(base.value) < 2 * base.standard_error
    row = compare("bias", before, pair_losses(0.4, 0.6, -1.0, -0.5, 0.2, -0.2))["bias"]
    assert row["improvement_percent"] is None
    assert row["improvement"] == pytest.approx(0.1)


def test_multiple_choice_improves_upwards():
    before, after = ({**pair_losses(0.1, 0.2), "mc1": mc1, "mc2": mc1 * 0.8} for mc1 in (torch.zeros(4), torch.ones(4)))
    rows = compare("truth", before, after)
    assert rows["truth_mc1"]["improvement"] == 1.0
    assert rows["truth_mc2"]["improvement"] == pytest.approx(0.8)
    assert rows["truth_mc2"]["improvement_percent"] is None
    assert summarise({**before, "mc2": torch.tensor([0.0, 0.0, 1.0])})["mc2_low"] == 0.0
    numbers = summarise(after)
    assert (numbers["mc1"], numbers["questions"], numbers["pairs"], numbers["clusters"]) == (1.0, 4, 2, 1)
