"""Results of measurements: numbers with 95 % intervals, and what a repair changed, from the losses of single pairs.

The losses of one model on one data set are tensors by name, as they are stored beside its result:

- of dialogues: "nll" (N,) nats and "tokens" (N,) label tokens
- of answer pairs: "loss" (P,) nats per token and "cluster" (P,), the number of the pair's independent unit
- of multiple-choice questions, if the pairs have any: "mc1" (Q,), 1 where the best answer is likelier than every
  incorrect one, and "mc2" (Q,), the probability of the correct answers among all (Lin, Hilton and Evans 2022)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from utils.intervals import ClusterSums, Estimate, estimate_difference, estimate_mean, sum_by_cluster
from utils.performance_functions.hh import released_loss

Metric = Literal["anthropic", "bias", "ethics", "truth"]
Losses = dict[str, torch.Tensor]
LARGEST_LOSS = 700.0  # whose perplexity is still a float
HIGHER_IS_BETTER = ("mc1", "mc2")
STANDARD_ERRORS_FROM_ZERO = 2.0  # a loss closer to 0 than this is no base for a percentage


class Result(NamedTuple):
    """One measurement of one model: the numbers of its JSON file, and the losses that they were computed from."""

    numbers: dict[str, Any]
    losses: Losses


def quantities(losses: Losses) -> dict[str, ClusterSums]:
    """What is averaged over the losses: "loss"; of pairs also "accuracy"; of questions "mc1" and "mc2"."""
    if "nll" in losses:
        return {"loss": ClusterSums(losses["nll"], losses["tokens"])}
    of_pairs = {"loss": losses["loss"], "accuracy": losses["loss"] < 0}
    sums = {name: sum_by_cluster(values, losses["cluster"]) for name, values in of_pairs.items()}
    return sums | {
        name: ClusterSums(losses[name], torch.ones_like(losses[name])) for name in HIGHER_IS_BETTER if name in losses
    }


def summarise(losses: Losses) -> dict[str, Any]:
    """The numbers of one measurement, each mean with its standard error and the ends of its 95 % interval.

    Returns:
        Of dialogues: loss (nats per label token), perplexity, tokens, dialogues, and released_loss, the released code's
        batch-dependent mean. Of pairs: loss (nats per token), accuracy (the share of pairs whose chosen answer is
        likelier per token), pairs, clusters; mc1, mc2 and questions where there are any.
    """
    estimates = {name: estimate_mean(sums) for name, sums in quantities(losses).items()}
    numbers: dict[str, Any] = {}
    for name, estimate in estimates.items():
        numbers |= estimate.fields(name)
        if name != "loss" and numbers[f"{name}_low"] is not None:  # a share, which no interval takes beyond 0 or 1
            numbers |= {
                f"{name}_low": max(numbers[f"{name}_low"], 0.0),
                f"{name}_high": min(numbers[f"{name}_high"], 1.0),
            }
    if "nll" in losses:
        return numbers | {
            **_exponential_fields("perplexity", estimates["loss"]),
            "tokens": int(losses["tokens"].sum()),
            "dialogues": len(losses["nll"]),
            "released_loss": released_loss(losses["nll"].tolist(), losses["tokens"].tolist()),
        }
    numbers |= {"pairs": len(losses["loss"]), "clusters": estimates["loss"].clusters}
    return numbers | ({"questions": len(losses["mc1"])} if "mc1" in losses else {})


def perplexity(loss: float | None) -> float | None:
    """exp(loss); None where the loss is not known, or its perplexity too large for a float."""
    return None if loss is None or loss >= LARGEST_LOSS else math.exp(loss)


def _exponential_fields(name: str, log: Estimate, is_change: bool = False) -> dict[str, float | None]:
    """exp of an estimate, or 100 (exp - 1) for a change in percent; the standard error by the delta method."""
    fields, error = log.fields(name), f"{name}_standard_error"
    slope = (100 if is_change else 1) * math.exp(min(log.value, LARGEST_LOSS))
    mapped = {key: perplexity(value) for key, value in fields.items()}
    if is_change:
        mapped = {key: None if value is None else 100 * value - 100 for key, value in mapped.items()}
    return mapped | {error: None if fields[error] is None else slope * fields[error]}


def improvement_percent(before: float, after: float) -> float:
    """(before - after) / |before|, in percent; positive is better, since lower losses are."""
    return 100 * (before - after) / abs(before) if before else 0.0


def compare(metric: Metric, before: Losses, after: Losses) -> dict[str, dict[str, Any]]:
    """What a repair changed in one measurement; differences are paired over the same clusters.

    Returns:
        For "anthropic" the row "perplexity": before, after, and change_percent with its interval. For a task a row
        under its name: before, after, improvement (before - after, nats per token) with its interval, and
        improvement_percent, None where `before` is within two standard errors of 0. Rows TASK_mc1 and TASK_mc2, where
        there are questions, have improvement = after - before, and no percentage.
    """
    old, new = quantities(before), quantities(after)
    means = {name: (estimate_mean(old[name]), estimate_mean(new[name])) for name in old}
    base, repaired = means["loss"]
    if metric == "anthropic":
        rise = estimate_difference(new["loss"], old["loss"])  # of the log-perplexity
        row = {"before": perplexity(base.value), "after": perplexity(repaired.value)}
        return {"perplexity": row | _exponential_fields("change_percent", rise, is_change=True)}
    difference = estimate_difference(old["loss"], new["loss"])
    percent = improvement_percent(base.value, repaired.value)
    is_base = abs(base.value) > STANDARD_ERRORS_FROM_ZERO * base.standard_error
    rows = {metric: _row(base, repaired, difference, percent if is_base else None)}
    for name in (name for name in HIGHER_IS_BETTER if name in old):
        rows[f"{metric}_{name}"] = _row(*means[name], estimate_difference(new[name], old[name]), None)
    return rows


def _row(before: Estimate, after: Estimate, improvement: Estimate, percent: float | None) -> dict[str, Any]:
    values = {"before": before.value, "after": after.value}
    return {**values, **improvement.fields("improvement"), "improvement_percent": percent}


def improvement_sums(before: Losses, after: Losses) -> ClusterSums:
    """before - after of a task's losses, summed by cluster."""
    old, new = quantities(before)["loss"], quantities(after)["loss"]
    return ClusterSums(old.total - new.total, old.count)


def share_left(without: Sequence[ClusterSums], under: Sequence[ClusterSums]) -> Estimate | None:
    """The share of an improvement that is left: that under a stress, divided by that without, each summed over tasks.

    The standard error is the ratio estimator's (as in utils/intervals.py): that of d' - r d over the same clusters, d
    the improvement without and d' under the stress, divided by the mean of d. Tasks are independent of each other.

    Args:
        without, under: the improvement of each task that the model was repaired for.

    Returns:
        None where the improvement without the stress is within two standard errors of 0, and no base for a share.
    """
    base = [estimate_mean(sums) for sums in without]
    total, error = sum(one.value for one in base), math.hypot(*(one.standard_error for one in base))
    if not abs(total) > STANDARD_ERRORS_FROM_ZERO * error:
        return None
    share = sum(estimate_mean(sums).value for sums in under) / total
    pairs = zip(without, under, strict=True)
    residuals = [estimate_mean(ClusterSums(new.total - share * old.total, old.count)) for old, new in pairs]
    error = math.hypot(*(one.standard_error for one in residuals)) / abs(total)
    return Estimate(share, error, min(one.clusters for one in base))
