"""LEARNING_RATE = "auto": the step size that improves most within a perplexity budget.

The search looks at the training split alone: perplexity on validation dialogues that are neither unlearned nor
retained, and improvement on the training pairs. The test split is measured once, at the rate that is chosen.
The validation dialogues are a sample, so a step counts with one standard error more than it cost on them: the largest
step whose measured cost is within the budget exceeds it on other dialogues half of the time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils import paths
from utils.artifacts import Artifact, fingerprint_of
from utils.console import say
from utils.performance_functions.evaluation import MEASUREMENTS, Metric
from utils.performance_functions.hh import Dialogues, load_dialogues
from utils.performance_functions.losses import SequenceNLL
from utils.performance_functions.pairs import AnswerPair
from utils.pipeline import task_weights, weights_setting
from utils.repair import Repair
from utils.repair_report import improvement_percent
from utils.selection import rows_apart

FIRST_RATE = 0.012  # the paper's
PRECISION = 0.01  # of the rate found, as a ratio
SMALLEST_RATE, LARGEST_RATE = FIRST_RATE * 2.0**-30, FIRST_RATE * 2.0**30  # beyond which the search gives up
LARGEST_STRIDE = 8.0  # from one rate to the next, as a ratio
MAX_CLIMBS = 30
LARGEST_RISE = 100.0  # nats per token, beyond which a cost counts as infinite


@dataclass(frozen=True)
class Probe:
    """One learning rate that was tried.

    Attributes:
        perplexity_change: (after - before) / before on the validation dialogues; infinite where the loss is no number.
        standard_error: of `perplexity_change`, over the validation dialogues.
        gain: what is to be made large; here the improvement on the training pairs, in percent.
    """

    learning_rate: float
    perplexity_change: float
    standard_error: float
    gain: float

    @property
    def cost(self) -> float:
        """What is held against the budget."""
        return self.perplexity_change + self.standard_error


@dataclass(frozen=True)
class Search:
    """The rate that was found (0 where none helps), why the search ended there, and every rate that was tried."""

    learning_rate: float
    stopped: str
    probes: list[Probe]


def largest_gain_within(budget: float, measure: Callable[[float], Probe]) -> Search:
    """Find the largest step within the budget to PRECISION; step back where the gain peaks before it.

    The cost of a step grows like a power of it (a quadratic one near a minimum), so the next rate to try is where a
    power law reaches the budget: with exponent 2 from the one point that is known, then through both ends of the
    bracket. Every third try halves the bracket instead, in ratio, so that it shrinks whatever the curve.

    Args:
        budget: largest allowed `cost`.
        measure: tries a rate above 0.
    """
    tried: dict[float, Probe] = {}

    def probe(rate: float) -> Probe:
        rate = float(f"{rate:.4g}")
        if rate not in tried:
            tried[rate] = measure(rate)
        return tried[rate]

    def ended(rate: float, stopped: str) -> Search:
        return Search(rate, stopped, sorted(tried.values(), key=lambda known: known.learning_rate))

    inside: Probe | None = None
    outside: Probe | None = None
    rate = FIRST_RATE
    while SMALLEST_RATE <= rate <= LARGEST_RATE:
        found = probe(rate)
        if found.cost <= budget:
            inside = found
        else:
            outside = found
        if inside and outside and outside.learning_rate / inside.learning_rate <= 1 + PRECISION:
            break
        rate = _next_rate(budget, inside, outside, bisect=len(tried) % 3 == 0)

    if inside is None:
        return ended(0.0, f"no step down to {SMALLEST_RATE:.3g} stays within the budget")
    best = _climb(probe, [known for known in tried.values() if known.cost <= budget], budget)
    if best.gain <= 0:
        return ended(0.0, "no step within the budget improves the training pairs")
    if best.learning_rate < inside.learning_rate:
        return ended(best.learning_rate, "improvement on the training pairs peaks before the budget is spent")
    if outside is None:
        return ended(best.learning_rate, "no step that was tried exceeds the budget")
    return ended(
        best.learning_rate, f"a step {PRECISION:.0%} larger exceeds the perplexity budget, a standard error included"
    )


def _next_rate(budget: float, inside: Probe | None, outside: Probe | None, bisect: bool) -> float:
    """Where the cost should reach the budget, kept apart from what is known by a quarter of PRECISION."""
    if inside is None or outside is None:
        known = inside or outside
        reach = math.sqrt(budget / known.cost) if known.cost > 0 else LARGEST_STRIDE
        stride = min(max(reach, 1.2), LARGEST_STRIDE) if inside else max(min(reach, 1 / 1.2), 1 / LARGEST_STRIDE)
        return known.learning_rate * stride
    low, high = math.log(inside.learning_rate), math.log(outside.learning_rate)
    middle = (low + high) / 2
    if not bisect and inside.cost > 0 and math.isfinite(outside.cost):
        cost_low, cost_high, target = (math.log(cost) for cost in (inside.cost, outside.cost, budget))
        middle = low + (high - low) * (target - cost_low) / (cost_high - cost_low)
        # Aim a little past the crossing, at the end of the bracket that is farther from it.
        middle += PRECISION / 4 * (1 if high - middle > middle - low else -1)
    margin = min(PRECISION / 4, (high - low) / 4)
    return math.exp(min(max(middle, low + margin), high - margin))


def _climb(probe: Callable[[float], Probe], within: list[Probe], budget: float) -> Probe:
    """From the best of the tried rates, halve the distance to its neighbours until they are close.

    Ends at once where even a step that costs a tenth of the budget does harm: gain is linear in smaller ones.
    """
    for _ in range(MAX_CLIMBS):
        within.sort(key=lambda known: known.learning_rate)
        position = max(range(len(within)), key=lambda i: within[i].gain)
        best = within[position]
        if best.gain <= 0 and best.cost <= budget / 10:
            return best
        rates = [known.learning_rate for known in within]
        below = rates[position - 1] if position else best.learning_rate / 4
        above = rates[position + 1] if position + 1 < len(rates) else best.learning_rate
        candidates = [math.sqrt(best.learning_rate * side) for side in (below, above)]
        wider = max(candidates, key=lambda rate: abs(math.log(rate / best.learning_rate)))
        if above == best.learning_rate or abs(math.log(wider / best.learning_rate)) < math.log(1 + 2.5 * PRECISION):
            return best  # the largest rate within the budget, or a peak that is known well enough
        found = probe(wider)
        within.append(dataclasses.replace(found, gain=-math.inf) if found.cost > budget else found)
    return best


def perplexity_change(before: SequenceNLL, after: SequenceNLL) -> tuple[float, float]:
    """The change of perplexity from one model to another on the same dialogues, and its standard error over them.

    The change of the loss per token is a ratio of two sums over dialogues, d / t. Its standard error is that of a
    ratio estimator, sqrt(n / (n - 1) sum_i (d_i - (d / t) t_i)^2) / t (Cochran 1977, section 2.11).

    Args:
        before, after: (n,) dialogues.

    Returns:
        (after - before) / before and its standard error, 0 for one dialogue; infinite and 0 where a loss is no number.
    """
    rise = after.per_token - before.per_token  # of the log-perplexity
    if not rise < LARGEST_RISE:
        return math.inf, 0.0
    residuals = after.total - before.total - rise * before.num_tokens
    n = len(residuals)
    error = float((n / max(n - 1, 1) * residuals.square().sum()).sqrt() / before.num_tokens.sum())
    return math.expm1(rise), math.exp(rise) * error


def _validation(repair: Repair) -> tuple[Artifact, Dialogues, dict[Metric, list[AnswerPair]]]:
    """The search's artefact, and what it measures on: validation dialogues, and training pairs by task."""
    settings, manifest = repair.settings, repair.gradients_manifest
    dialogues = load_dialogues(settings.HH_DATASET, "train")
    inputs = {"model": repair.fingerprint, "dataset": dialogues.fingerprint}
    dataclasses.replace(repair.gradients, inputs=inputs).require()  # its row numbers are those of these dialogues
    taken = {*manifest["indices"], *manifest.get("retained", [])}
    rows = rows_apart("validation", taken, len(dialogues), settings.NUM_VALIDATION_EXAMPLES, settings.SEED)
    data_dir = paths.anchored(settings.DATA_DIR)
    pairs = {task: MEASUREMENTS[task].load_pairs(data_dir, "train") for task in task_weights(settings, repair.task)}
    artifact = Artifact(
        paths.search_file(settings.OUTPUT_DIR, repair.task, repair.name, repair.repair_name),
        paths.STEP_5,
        {**settings.pick("PPL_BUDGET"), **weights_setting(settings, repair.task)},
        {
            **repair.inputs,
            "validation": fingerprint_of(rows),
            **{f"pairs_{task}": fingerprint_of(some) for task, some in pairs.items()},
        },
    )
    return artifact, dialogues.at(rows), pairs


def search_learning_rate(repair: Repair) -> dict[str, Any]:
    """Find the learning rate of a repair, or read the search that was finished before.

    Returns:
        learning_rate, stopped (why there), budget, validation_dialogues, seconds, and probes: for each rate that was
        tried the change of validation perplexity with its standard error, and the improvement of the training pairs,
        weighted over the tasks.
    """
    settings, weights = repair.settings, task_weights(repair.settings, repair.task)
    artifact, dialogues, pairs = _validation(repair)
    if artifact.is_finished(settings.OVERWRITE):
        return artifact.load_json()
    started = time.monotonic()

    def losses(learning_rate: float) -> tuple[SequenceNLL, dict[str, float]]:
        model = repair.model_at(learning_rate)
        of_pairs = {task: model.measure(task, "train", some, quiet=True)["loss"] for task, some in pairs.items()}
        return model.dialogue_nll("validation", dialogues), of_pairs

    nll_before, before = losses(0.0)

    def measure(learning_rate: float) -> Probe:
        nll_after, after = losses(learning_rate)
        change, error = perplexity_change(nll_before, nll_after)
        gains = [weight * improvement_percent(before[task], after[task]) for task, weight in weights.items()]
        gain = sum(gains) / sum(weights.values())
        say(
            f"   tried {learning_rate:g}: validation perplexity {100 * change:+.2f} ± {100 * error:.2f} %, "
            f"training pairs {gain:+.1f} %"
        )
        return Probe(learning_rate, change, error, gain if math.isfinite(gain) else -math.inf)

    found = largest_gain_within(settings.PPL_BUDGET, measure)
    content = {
        "learning_rate": found.learning_rate,
        "stopped": found.stopped,
        "budget": settings.PPL_BUDGET,
        "validation_dialogues": len(dialogues),
        "probes": [
            dataclasses.asdict(known)
            for known in found.probes
            if math.isfinite(known.perplexity_change) and math.isfinite(known.gain)
        ],
        "seconds": round(time.monotonic() - started, 3),
    }
    artifact.save_json(content, started)
    say(f"   learning rate {found.learning_rate:g}: {found.stopped}")
    return content
