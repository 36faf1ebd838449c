"""Why a diverse subset costs more perplexity: what dpp picks at other influence weights and kernel widths.

    python studies/diversity.py

For each IF_WEIGHT and kernel width: how harmful the picks are, how many are not harmful at all (positive influence),
what a step of one length costs on the test dialogues, and what the subset improves at one budget (studies/methods.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

from dataclasses import replace

from steps import load_script, run_script, run_step
from studies.methods import BUDGET, settings_of
from tasks import BackwardTask
from utils.console import banner, say, shown_path
from utils.devices import resolve_device
from utils.evaluation import Data, EvaluationModel, Evaluator
from utils.influence.preconditioning import load_preconditioner
from utils.influence.repair_gradient import repair_gradient
from utils.influence.traced_model import Gradients, load_traced_model
from utils.kept_model import keep_model, open_model
from utils.learning_rate_search import search_on
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, resolve_path
from utils.performance_functions.hh import tokenize_dialogues
from utils.rankings import load_representations, min_max_normalise, ranking_scores
from utils.registry import ModelArtifacts
from utils.repair_sources import choose_sources, weights_by_score
from utils.reporting.tables import Row, Table
from utils.results import Losses, Metric, compare
from utils.selection import most_harmful
from utils.settings import Choices, NonNegativeFloat, OneTask, PositiveFloat, PositiveInt, Settings

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "studies/output/diversity"  # folder for results
TASKS: Choices[OneTask] = ["bias", "ethics", "truth"]  # that subsets are chosen for: also "combined"
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
IF_WEIGHTS: Choices[NonNegativeFloat] = [0.0, 1.0, 10.0, 100.0, 1000.0]  # weights of the influence term
GAMMA_SCALES: Choices[PositiveFloat] = [0.1, 1.0, 10.0]  # kernel widths, times that of the median heuristic
LEARNING_RATE: PositiveFloat = 0.05  # step whose cost is shown
# -----------------------------------------------------------------------------------------------------------


class Subsets:
    """The subsets of one task, and what a repair by them does.

    Attributes:
        scores: what the task ranks by (N,), in [0, 1], smallest most harmful.
        is_harmful: (N,) whether influence says that training on the dialogue did harm.
    """

    def __init__(self, settings: Settings, task: str) -> None:
        common = {**settings.pick("MODEL_NAME", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR", "BOTTOM_K"), "TASK_NAME": task}
        step_4 = settings_of(load_script(STEP_4), {**common, "MODEL_NAMES": [settings.MODEL_NAME]})
        artifacts = ModelArtifacts(step_4, settings.MODEL_NAME)
        self.artifacts = artifacts.with_constants(artifacts.factors().require()["settings"])
        self.scores = ranking_scores(self.artifacts, task)[0]
        self.is_harmful = weights_by_score(self.artifacts, task) > 0
        self.sources = choose_sources(self.artifacts, task)
        self.traced = load_traced_model(self.artifacts.settings, settings.MODEL_NAME, resolve_device(step_4.DEVICE))
        self.examples = tokenize_dialogues(self.artifacts.dialogues, self.traced.tokenizer)
        self.precondition = load_preconditioner(self.artifacts.factors(), self.traced)
        step_5 = settings_of(load_script(STEP_5), common)
        device, num_blocks = resolve_device(step_5.DEVICE), self.artifacts.settings.NUM_BLOCKS
        self.evaluated = EvaluationModel(*open_model(step_5, settings.MODEL_NAME, device, num_blocks))
        evaluator = Evaluator(step_5, "test")
        self.dialogues = evaluator.data("anthropic")
        self.pairs = {name: evaluator.data(name) for name in self.sources.measurements}

    def gradient(self, indices: list[int]) -> Gradients:
        """Step 4's gradient of a subset."""
        sources = replace(self.sources, indices=indices, dialogues=dict.fromkeys(indices, 1 / len(indices)))
        task = BackwardTask(list(self.traced.linears))
        return repair_gradient(self.traced, task, self.examples, sources, self.precondition)[0]

    def measure(self, indices: list[int], learning_rate: float) -> Row:
        """What a step of one length costs, and what the best step within the budget improves."""
        gradient, step_5 = self.gradient(indices), load_script(STEP_5)
        originals = step_5.original_weights(self.evaluated.model, gradient)

        def losses_at(rate: float, metric: Metric, data: Data) -> Losses:
            step_5.ascend(self.evaluated.model, gradient, rate, originals)
            return self.evaluated.measure(metric, data, quiet=True)

        before, after = (losses_at(rate, "anthropic", self.dialogues) for rate in (0.0, learning_rate))
        weights = self.sources.measurements
        search = search_on(self.dialogues, self.pairs, weights, BUDGET, losses_at, counts_error=False)
        step_5.ascend(self.evaluated.model, gradient, 0.0, originals)
        gains = {trial.learning_rate: trial.gain for trial in search.trials}
        return {
            "cost": compare("anthropic", before, after)["perplexity"]["change_percent"],
            "improvement": gains.get(search.learning_rate, 0.0),
        }


def rows_for(settings: Settings, task: str) -> list[Row]:
    """One row for each weight and width, and one for the most harmful dialogues."""
    subsets, step_3 = Subsets(settings, task), load_script(STEP_3)
    fingerprint = subsets.artifacts.representations().require()["fingerprint"]
    representations = step_3.center(load_representations(subsets.artifacts, fingerprint))
    gamma = step_3.median_heuristic_gamma(representations, subsets.artifacts.settings.SEED)
    harm = min_max_normalise(-subsets.scores)
    rows = []

    def add(name: str, scale: float | None, indices: list[int]) -> None:
        banner("diversity", f"{task}, {name}" + (f", {scale:g} x gamma" if scale else ""))
        facts = {"harm": float(harm[indices].mean()), "harmful": int(subsets.is_harmful[indices].sum())}
        shared = len(set(indices) & set(most_harmful(subsets.scores, settings.BOTTOM_K)))
        rows.append(
            {
                **{"task": task, "subset": name, "gamma_scale": scale, **facts, "shared": shared},
                **subsets.measure(indices, settings.LEARNING_RATE),
            }
        )

    add("pure_ekfac", None, most_harmful(subsets.scores, settings.BOTTOM_K))
    for scale in settings.GAMMA_SCALES:
        kernel = step_3.RBFKernel(representations, scale * gamma)
        for weight in settings.IF_WEIGHTS:
            picks = step_3.greedy_dpp(kernel, harm, settings.BOTTOM_K, weight).indices
            add(f"dpp {weight:g}", scale, picks)
    return rows


def table_of(rows: list[Row], settings: Settings) -> Table:
    """The rows as a table."""
    header = ["task", "subset", "gamma", "mean harm", "harmful", "shared", "cost", "improvement at the budget"]
    cells = [
        [
            row["task"],
            row["subset"],
            "–" if row["gamma_scale"] is None else f"x {row['gamma_scale']:g}",
            f"{row['harm']:.3f}",
            f"{row['harmful']} of {settings.BOTTOM_K}",
            f"{row['shared']}",
            f"{row['cost']:+.2f} %",
            f"{row['improvement']:+.3f}",
        ]
        for row in rows
    ]
    caption = (
        "Diverse subsets. Mean harm: of minus the influence scores, min-max normalised to [0, 1]; harmful: picks with "
        "a negative score; shared: picks that are among the most harmful; cost: change of test perplexity by a step of "
        f"{settings.LEARNING_RATE:g}; improvement in nats per token at {BUDGET:.0%} more test perplexity."
    )
    return Table(caption, header, cells, rows)


def main(settings: Settings) -> None:
    """Trace the model, then measure every subset."""
    common = settings.pick("MODEL_NAME", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR")
    with keep_model():
        run_script(STEP_1, common)
        run_script(STEP_2, common)
        rows = [row for task in settings.TASKS for row in rows_for(settings, task)]
    table = table_of(rows, settings)
    file = resolve_path(settings.OUTPUT_DIR) / "diversity"
    table.write(file)
    say(f"\n{table.markdown()}\ntable: {shown_path(file)}.md")


if __name__ == "__main__":
    run_step(main)
