"""LEARNING_RATE = "auto": the step size that improves most within a perplexity budget.

The search looks at the training split alone: perplexity on validation dialogues that are neither unlearned nor
retained, and improvement on the training pairs. The test split is measured once, at the chosen rate. The validation
dialogues are a sample, so the cost of a step is its measured cost plus one standard error: otherwise the largest step
within the budget would exceed it on other dialogues half of the time. ("weighted" and "fitted" leave no dialogue
unused: their validation dialogues have weights too, so their cost on other dialogues may be higher.)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from utils.console import say
from utils.evaluation import Data, EvaluationModel
from utils.files import fingerprint_of
from utils.intervals import ClusterSums, estimate_difference
from utils.locks import locked
from utils.paths import resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, tokenize_dialogues
from utils.performance_functions.pairs import AnswerPairs
from utils.processes import first_process_only
from utils.registry import ModelArtifacts
from utils.repairs import FIRST_RATE, RepairChoice
from utils.results import Losses, Metric, quantities
from utils.selection import held_out_rows, shared_portions
from utils.settings import task_weights

PRECISION = 0.01  # relative, of the rate that is found
SMALLEST_RATE, LARGEST_RATE = FIRST_RATE * 2.0**-30, FIRST_RATE * 2.0**30  # the search gives up beyond these
LARGEST_STRIDE = 8.0  # from one rate to the next, as a ratio
MAX_CLIMBS = 30
LARGEST_RISE = 100.0  # nats per token; beyond it a cost counts as infinite


@dataclass(frozen=True)
class Trial:
    """One learning rate that was tried.

    Attributes:
        perplexity_change: (after - before) / before on the validation dialogues; infinite if the loss is not finite.
        standard_error: of `perplexity_change`, over the validation dialogues.
        gain: to be maximised; the improvement on the training pairs, in nats per token. None if it was not measured,
            because nothing depends on it.
    """

    learning_rate: float
    perplexity_change: float
    standard_error: float
    gain: float | None = None

    def as_row(self) -> dict[str, float | None]:
        """For a JSON file, which has no infinite numbers."""
        row = dataclasses.asdict(self)
        return row if self.gain is None or math.isfinite(self.gain) else {**row, "gain": None}

    @property
    def cost(self) -> float:
        """The cost that the budget limits: the measured change and one standard error."""
        return self.perplexity_change + self.standard_error


@dataclass(frozen=True)
class Search:
    """The rate that was found (0 if no step helps), why the search ended, and every rate that was tried."""

    learning_rate: float
    stopped: str
    trials: list[Trial]


def largest_gain_within(
    budget: float, cost_at: Callable[[float], Trial], gain_at: Callable[[float], float], first: float = FIRST_RATE
) -> Search:
    """Find the largest step within the budget to PRECISION, or a smaller one if the gain peaks before it.

    The cost of a step grows like a power of it (quadratically near a minimum), so the next rate to try is where a
    power law reaches the budget: with exponent 2 from a single point, then through both ends of the bracket. Every
    third trial bisects the bracket in log space instead, so that it shrinks whatever the curve.

    The gain is taken to have one peak, and is measured where that decides: at the largest rate within the budget and
    at smaller ones as long as they gain more.

    Args:
        budget: largest allowed `cost`.
        cost_at: tries a rate above 0; gives a trial without its gain.
        gain_at: the gain of a rate that was tried.
        first: rate that is tried first.
    """
    tried: dict[float, Trial] = {}

    def try_rate(rate: float) -> Trial:
        rate = float(f"{rate:.4g}")
        if rate not in tried:
            tried[rate] = cost_at(rate)
        return tried[rate]

    def with_gain(trial: Trial) -> Trial:
        if trial.gain is None:
            trial = tried[trial.learning_rate] = dataclasses.replace(trial, gain=gain_at(trial.learning_rate))
        return trial

    def ended(rate: float, stopped: str) -> Search:
        return Search(rate, stopped, sorted(tried.values(), key=lambda known: known.learning_rate))

    inside: Trial | None = None
    outside: Trial | None = None
    rate = first
    while SMALLEST_RATE <= rate <= LARGEST_RATE:
        trial = try_rate(rate)
        if trial.cost <= budget:
            inside = trial
        else:
            outside = trial
        if inside and outside and outside.learning_rate / inside.learning_rate <= 1 + PRECISION:
            break
        rate = _next_rate(budget, inside, outside, bisect=len(tried) % 3 == 0)

    if inside is None:
        return ended(0.0, f"no step down to {SMALLEST_RATE:.3g} stays within the budget")
    best = _climb(try_rate, with_gain, [known for known in tried.values() if known.cost <= budget], budget)
    if best.gain <= 0:
        return ended(0.0, "no step within the budget improves the training pairs")
    if best.learning_rate < inside.learning_rate:
        return ended(best.learning_rate, "improvement on the training pairs peaks before the budget is spent")
    if outside is None:
        return ended(best.learning_rate, "no step that was tried exceeds the budget")
    return ended(
        best.learning_rate, f"a step {PRECISION:.0%} larger exceeds the perplexity budget, a standard error included"
    )


def _next_rate(budget: float, inside: Trial | None, outside: Trial | None, bisect: bool) -> float:
    """Where the cost should reach the budget, at least a quarter of PRECISION away from rates already tried."""
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


def _climb(
    try_rate: Callable[[float], Trial], with_gain: Callable[[Trial], Trial], within: list[Trial], budget: float
) -> Trial:
    """From the largest rate down while the gain rises; then halve the distance to the best one's neighbours.

    Ends at once if even a step that costs a tenth of the budget does harm, since gain is linear in smaller ones.
    """
    within.sort(key=lambda known: -known.learning_rate)
    for position, trial in enumerate(within):
        within[position] = with_gain(trial)
        above = within[position - 1].gain if position else -math.inf
        if above > 0 and within[position].gain < above:
            break  # a gain below 0 is no peak: the steps may be so large that they do nothing but damage
    for _ in range(MAX_CLIMBS):
        within.sort(key=lambda known: known.learning_rate)
        position = max((i for i, known in enumerate(within) if known.gain is not None), key=lambda i: within[i].gain)
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
        trial = try_rate(wider)
        within.append(dataclasses.replace(trial, gain=-math.inf) if trial.cost > budget else with_gain(trial))
    return best


def perplexity_change(before: ClusterSums, after: ClusterSums) -> tuple[float, float]:
    """The change of perplexity from one model to another on the same dialogues, and its standard error over them.

    Args:
        before, after: NLL and label tokens of each dialogue.

    Returns:
        (after - before) / before and its standard error, 0 for one dialogue; infinite and 0 if a loss is not finite.
    """
    rise = estimate_difference(after, before)  # of the log-perplexity
    if not rise.value < LARGEST_RISE:
        return math.inf, 0.0
    return math.expm1(rise.value), math.exp(rise.value) * (rise.standard_error if rise.clusters > 1 else 0.0)


def search_learning_rate(
    artifacts: ModelArtifacts, task: str, gradient: dict[str, Any], model_at: Callable[[float], EvaluationModel]
) -> dict[str, Any]:
    """Find the learning rate of a repair, or read a search that was finished before.

    Args:
        task: what the model is repaired for.
        gradient: manifest of the repair gradient.
        model_at: gives the model, updated at a learning rate; 0 is the POST-SFT model.

    Returns:
        learning_rate, stopped (why the search ended), budget, validation_dialogues, split_rules (how training and test
        pairs were split, by task), seconds, and trials: for each rate with a finite loss the change of validation
        perplexity with its standard error, and the improvement of the training pairs, weighted over the tasks (None
        where it was not measured, or is not finite).
    """
    settings, dialogues, weights = artifacts.settings, artifacts.dialogues, task_weights(artifacts.settings, task)
    used = {row for name in ("indices", "helpful", "retained") for row in gradient[name]}
    rows = held_out_rows("validation", used, len(dialogues), settings.NUM_VALIDATION_EXAMPLES, settings.SEED)
    validation, data_dir = dialogues.at(rows), resolve_path(settings.DATA_DIR)
    pairs = {
        name: MEASUREMENTS[name].load_pairs(data_dir, "train").sample(settings.NUM_VALIDATION_PAIRS, settings.SEED)
        for name in weights
    }
    artifact = artifacts.learning_rate_search(
        task,
        gradient=gradient["fingerprint"],
        validation=fingerprint_of(rows),
        **{f"pairs_{name}": of_task.fingerprint for name, of_task in pairs.items()},
    )
    with locked(artifact.path):
        if artifact.is_finished(settings.OVERWRITE):
            return artifact.load_json()
        model = model_at(0.0)  # loads the model, which the search's seconds leave out
        started = time.monotonic()
        tokenize_dialogues(validation, model.tokenizer)  # refuses them if none has a label
        # They are measured by portions that other repairs share, for which the trunk has to run but once.
        portions = shared_portions(rows, "validation", len(dialogues), settings.NUM_VALIDATION_EXAMPLES, settings.SEED)
        position_of = {row: position for position, row in enumerate(itertools.chain(*portions))}
        positions = [position_of[row] for row in rows]
        of_portions = [dialogues.at(portion) for portion in portions]
        for portion in of_portions:
            model.prepare("anthropic", portion, needs_labels=False)
        for name, of_task in pairs.items():
            model.prepare(name, of_task)

        def losses_at(rate: float, metric: Metric, data: Data) -> Losses:
            stepped = model_at(rate)
            if metric != "anthropic":
                return stepped.measure(metric, data, quiet=True)
            measured = [stepped.measure(metric, portion, quiet=True) for portion in of_portions]
            return {name: torch.cat([losses[name] for losses in measured])[positions] for name in measured[0]}

        first = RepairChoice.of(settings).first_rate
        search = search_on(validation, pairs, weights, settings.PPL_BUDGET, losses_at, first)
        content = {
            "learning_rate": search.learning_rate,
            "stopped": search.stopped,
            "budget": settings.PPL_BUDGET,
            "validation_dialogues": len(validation),
            "split_rules": {name: of_task.split_rule for name, of_task in pairs.items()},
            "trials": [trial.as_row() for trial in search.trials if math.isfinite(trial.perplexity_change)],
            "seconds": round(time.monotonic() - started, 3),
        }
        artifact.save_json(content, started)
    say(f"   learning rate {search.learning_rate:g}: {search.stopped}")
    say_noise(search, settings.PPL_BUDGET, len(validation))
    return content


def say_noise(search: Search, budget: float, num_dialogues: int) -> None:
    """Say so where the budget is spent on how little is known of a step's cost, more than on the cost."""
    chosen = next((trial for trial in search.trials if trial.learning_rate == search.learning_rate), None)
    larger = [trial for trial in search.trials if trial.learning_rate > search.learning_rate]
    if chosen and larger and larger[0].cost > budget and chosen.standard_error > chosen.perplexity_change:
        error = f"± {100 * chosen.standard_error:.2f} %"
        say(
            f"   its cost is known to {error} alone, on {num_dialogues:,} dialogues: that limits the step more than "
            "the cost does; give more dialogues, or LEARNING_RATE a number"
        )


def search_on(
    dialogues: Dialogues,
    pairs: dict[str, AnswerPairs],
    weights: dict[str, float],
    budget: float,
    losses_at: Callable[[float, Metric, Data], Losses],
    first: float = FIRST_RATE,
    counts_error: bool = True,
) -> Search:
    """Search on these dialogues and pairs.

    Args:
        weights: of the tasks' gains.
        losses_at: gives the losses of the model updated at a learning rate; 0 is the POST-SFT model. It may be asked
            for a rate once more after others.
        first: learning rate that is tried first.
        counts_error: whether a standard error over the dialogues counts against the budget.
    """

    def nll_at(rate: float) -> ClusterSums:
        return quantities(losses_at(rate, "anthropic", dialogues))["loss"]

    def pairs_at(rate: float) -> dict[str, float]:
        return {name: float(losses_at(rate, name, of_task)["loss"].mean()) for name, of_task in pairs.items()}

    numbers = " and ".join(f"{len(of_task):,} pairs of {name}" for name, of_task in pairs.items())
    limit = f"at most {100 * budget:+.3g} %" + ", ± included" * counts_error
    say(f"   cost on {len(dialogues):,} dialogues, {limit}; improvement on {numbers}")
    nll_before, pairs_before = nll_at(0.0), pairs_at(0.0)

    # Decided by one process, so that none takes another branch for a last digit.
    @first_process_only
    def trial_of(rate: float, nll_after: ClusterSums) -> Trial:
        change, error = perplexity_change(nll_before, nll_after)
        trial = Trial(rate, change, error if counts_error else 0.0)
        is_over = ", over the budget" * (trial.cost > budget)
        say(f"   tried {rate:g}: perplexity {100 * change:+.2f} ± {100 * error:.2f} %{is_over}")
        return trial

    @first_process_only
    def gain_of(rate: float, pairs_after: dict[str, float]) -> float:
        gain = sum(weight * (pairs_before[name] - pairs_after[name]) for name, weight in weights.items())
        gain /= sum(weights.values())
        say(f"   at {rate:g} the pairs are {'better' if gain > 0 else 'worse'} by {abs(gain):.4f} nats per token")
        return gain if math.isfinite(gain) else -math.inf

    return largest_gain_within(
        budget, lambda rate: trial_of(rate, nll_at(rate)), lambda rate: gain_of(rate, pairs_at(rate)), first
    )
