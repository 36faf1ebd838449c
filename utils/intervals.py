"""Standard errors and 95 % intervals, clustered by the independent units of a measurement.

Everything that is measured is a mean over values that come in clusters: the pairs of a (group, topic) for bias, the
pair of a question for truth, the tokens of a dialogue for perplexity. With d_c the sum and t_c the number of the values
of cluster c, the mean is r = sum_c d_c / sum_c t_c, and

    SE(r) = sqrt(C / (C - 1) sum_c (d_c - r t_c)^2) / sum_c t_c

which is the ratio estimator's (Cochran 1977, section 2.11) and, for means, the clustered one of Miller (2024, arXiv
2411.00640) with the correction C / (C - 1). Intervals use Student's t with C - 1 degrees of freedom, since C may be
small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

CONFIDENCE = 0.95


class ClusterSums(NamedTuple):
    """The values of a sample, summed by cluster.

    Attributes:
        total: (C,) sum of each cluster's values.
        count: (C,) number of its values.
    """

    total: torch.Tensor
    count: torch.Tensor


class Estimate(NamedTuple):
    """A mean, its standard error (infinite for a single cluster), and the number of clusters behind it."""

    value: float
    standard_error: float
    clusters: int

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval."""
        from scipy.special import stdtrit  # takes a second to import

        degrees = self.clusters - 1
        return float(stdtrit(degrees, (1 + CONFIDENCE) / 2)) * self.standard_error if degrees else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.value - self.margin, self.value + self.margin

    def fields(self, name: str) -> dict[str, float | None]:
        """NAME, and NAME_standard_error, NAME_low and NAME_high, which are None for a single cluster."""
        known = (self.standard_error, *self.interval) if math.isfinite(self.standard_error) else (None, None, None)
        return {name: self.value, **dict(zip(interval_names(name), known, strict=True))}


def interval_names(name: str) -> list[str]:
    """The names of a number's standard error and of the ends of its interval."""
    return [f"{name}_{suffix}" for suffix in ("standard_error", "low", "high")]


def sum_by_cluster(values: torch.Tensor, clusters: torch.Tensor) -> ClusterSums:
    """Values (P,) summed by their cluster numbers (P,), which begin at 0."""
    count = torch.bincount(clusters)
    total = torch.zeros(len(count), dtype=torch.float64).index_add(0, clusters, values.double())
    return ClusterSums(total, count)


def estimate_mean(sums: ClusterSums) -> Estimate:
    """The mean of a sample of clusters; those without a value count nothing."""
    num_values, num_clusters = sums.count.sum(), int((sums.count > 0).sum())
    mean = sums.total.sum() / num_values
    if num_clusters < 2:
        return Estimate(float(mean), math.inf, num_clusters)
    residuals = sums.total - mean * sums.count  # 0 where there is no value
    variance = num_clusters / (num_clusters - 1) * residuals.square().sum()
    return Estimate(float(mean), float(variance.sqrt() / num_values), num_clusters)


def estimate_values(values: Sequence[float]) -> Estimate:
    """The mean of independent values, each a cluster of its own."""
    total = torch.as_tensor(values, dtype=torch.float64)
    return estimate_mean(ClusterSums(total, torch.ones_like(total)))


def estimate_difference(minuend: ClusterSums, subtrahend: ClusterSums) -> Estimate:
    """The difference of two means over the same values, paired cluster by cluster."""
    return estimate_mean(ClusterSums(minuend.total - subtrahend.total, minuend.count))
