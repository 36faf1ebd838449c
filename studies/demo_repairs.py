"""Which repair wins on the demo: every method on models of several training seeds, at the same perplexity budget.

    python studies/demo_repairs.py

For each training seed data/make_sft_model.py makes the demo's model (its random weights and the order of its dialogues
differ), steps 1 and 2 trace it, and every method repairs it (studies/methods.py). The table compares the methods' means
over the models with those of the paper's direction.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

from dataclasses import replace

from steps import run_script, run_step
from studies.comparison import REFERENCE, comparison_figure, comparison_table, require_reference
from studies.methods import retrained_row, rows_at_budget
from studies.tracing import traced_artifacts
from utils.console import banner, say, shown_path
from utils.kept_model import keep_model
from utils.paths import STEP_0, STEP_1, STEP_2, resolve_path
from utils.rankings import ranked
from utils.repairs import RepairChoice
from utils.reporting.tables import Row
from utils.settings import Choices, NonNegativeFloat, OneTask, PositiveInt, ScoresType, Seed, Settings

# ------------------------------------------------------------------------------------------------ constants
OUTPUT_DIR: str = "studies/output/demo"  # folder for models and results
TRAINING_SEEDS: Choices[Seed] = [42, 0, 1]  # of the models
TASKS: Choices[OneTask] = ["bias", "ethics", "truth"]  # that models are repaired for: also "combined"
SCORES_TYPES: Choices[ScoresType] = [  # methods, as in step 4
    "pure_ekfac",
    "dpp",
    "dpp_weighted",
    "contrast",
    "weighted",
    "fitted",
    "direct",
    "direct_shuffled",
    "ga",
    "ga_kl",
    "npo",
    "task_vector",
    "dpo",
    "sft_pairs",
    "descent",
    "random",
]
SEVERAL_STEPS: Choices[ScoresType] = ["pure_ekfac", "contrast", "direct"]  # of SCORES_TYPES, also in steps
NUM_STEPS: Choices[PositiveInt] = [2, 4, 8]  # of those, as in step 5
PRESERVE_TASKS: Choices[ScoresType] = ["pure_ekfac", "contrast", "fitted", "direct"]  # of SCORES_TYPES, also with this
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
TOP_K: PositiveInt | None = None  # as in step 4
IF_WEIGHT: Choices[NonNegativeFloat] = [10.0, 0.0, 1.0, 100.0, 1000.0]  # the first for all, all of them for "dpp"
RETRAIN: bool = True  # True also fine-tunes again without the dialogues of "pure_ekfac"
# -----------------------------------------------------------------------------------------------------------


def planned_choices(settings: Settings) -> list[RepairChoice]:
    """Every method once, and its variants."""
    first = [
        RepairChoice(name, settings.BOTTOM_K, settings.IF_WEIGHT[0], settings.TOP_K) for name in settings.SCORES_TYPES
    ]
    in_steps = [
        replace(choice, num_steps=steps)
        for choice in first
        if choice.scores_type in settings.SEVERAL_STEPS
        for steps in settings.NUM_STEPS
    ]
    preserving = [
        replace(choice, preserve_tasks=True) for choice in first if choice.scores_type in settings.PRESERVE_TASKS
    ]
    weighed = [
        replace(choice, if_weight=weight)
        for choice in first
        if choice.scores_type == "dpp"
        for weight in settings.IF_WEIGHT[1:]
    ]
    return [*first, *in_steps, *preserving, *weighed]


def repair(settings: Settings, seed: int) -> list[Row]:
    """Train the model of one seed and repair it by every method; gives a row for each repair."""
    folder = f"{settings.OUTPUT_DIR}/seed-{seed}"
    model = f"{folder}/pythia-demo-sft"
    run_script(STEP_0, {}, SEED=seed, SFT_MODEL_DIR=model)
    common = {"MODEL_NAME": model, "OUTPUT_DIR": folder}
    run_script(STEP_1, common)
    run_script(STEP_2, common)
    rows = rows_at_budget(common, settings.TASKS, planned_choices(settings))
    if settings.RETRAIN:
        artifacts = traced_artifacts(common)
        for task in settings.TASKS:
            rows.append(retrained_row(common, task, ranked(artifacts, task, REFERENCE)[: settings.BOTTOM_K]))
    return rows


def main(settings: Settings) -> None:
    """Make, repair and compare the models."""
    banner("demo repairs", f"training seeds {', '.join(map(str, settings.TRAINING_SEEDS))}")
    require_reference(settings.SCORES_TYPES)
    with keep_model():
        models = [repair(settings, seed) for seed in settings.TRAINING_SEEDS]
    table = comparison_table(models, "The demo's model, trained with other seeds.")
    file = resolve_path(settings.OUTPUT_DIR) / "methods"
    table.write(file)
    comparison_figure(table.data, file.with_suffix(".png"))
    say(f"\n{table.markdown()}")
    say(f"table: {shown_path(file)}.md")


if __name__ == "__main__":
    run_step(main)
