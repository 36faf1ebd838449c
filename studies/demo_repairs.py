"""Which repair wins on the demo: every method on models of several training seeds, at the same perplexity budget.

    python studies/demo_repairs.py

For each training seed data/make_sft_model.py makes the demo's model (its random weights and the order of its dialogues
differ), and evaluation_scripts/paper_tables.py repairs it by every method. The table compares the methods' means over
the models with those of the paper's direction.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

from steps import run_script, run_step
from studies.comparison import comparison_table, read_rows
from utils.console import banner, say, shown_path
from utils.paths import PAPER_TABLES, STEP_0, resolve_path
from utils.reporting.tables import Row
from utils.settings import Choices, OneTask, PositiveInt, ScoresType, Seed, Settings

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
NUM_STEPS: Choices[PositiveInt] = [1, 2, 4, 8]  # of the methods in SEVERAL_STEPS, as in step 5
SEVERAL_STEPS: Choices[ScoresType] = ["pure_ekfac", "contrast", "weighted", "direct"]  # of SCORES_TYPES
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
# -----------------------------------------------------------------------------------------------------------


def repair(settings: Settings, seed: int) -> list[Row]:
    """Train the model of one seed and repair it by every method; gives a row for each repair."""
    folder = f"{settings.OUTPUT_DIR}/seed-{seed}"
    model = f"{folder}/pythia-demo-sft"
    run_script(STEP_0, {}, SEED=seed, SFT_MODEL_DIR=model)
    grid = {
        "MODEL_NAMES": [model],
        "OUTPUT_DIR": folder,
        "SEEDS": [42],
        "TASKS": settings.TASKS,
        "BOTTOM_K": [settings.BOTTOM_K],
        "IF_WEIGHT": [10.0],
        "PRESERVE_PERPLEXITY": [False],
        "COMPUTE_PER_TOKEN_SCORES": False,
        "SWEPT_RATES": None,
        "NUM_COMPLETIONS": 0,
    }
    once = [name for name in settings.SCORES_TYPES if name not in settings.SEVERAL_STEPS]
    several = [name for name in settings.SCORES_TYPES if name in settings.SEVERAL_STEPS]
    rows = []
    for scores_types, num_steps in ((once, [1]), (several, settings.NUM_STEPS)):
        if scores_types:
            run_script(PAPER_TABLES, grid, SCORES_TYPES=scores_types, NUM_STEPS=num_steps)
            rows += read_rows(folder)
    return rows


def main(settings: Settings) -> None:
    """Make, repair and compare the models."""
    banner("demo repairs", ", ".join(map(str, settings.TRAINING_SEEDS)))
    models = [repair(settings, seed) for seed in settings.TRAINING_SEEDS]
    table = comparison_table(models, "The demo's model, trained with other seeds.")
    table.write(resolve_path(settings.OUTPUT_DIR) / "methods")
    say(f"\n{table.markdown()}")
    say(f"table: {shown_path(resolve_path(settings.OUTPUT_DIR) / 'methods.md')}")


if __name__ == "__main__":
    run_step(main)
