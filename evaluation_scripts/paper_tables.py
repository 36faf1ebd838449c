"""After the steps: the paper's tables, ablations and pictures, and a report to read, from a grid of repairs.

    python evaluation_scripts/paper_tables.py
    python evaluation_scripts/paper_tables.py --SEEDS 42 --SCORES_TYPES dpp random --BOTTOM_K 100 50 200

Runs the step scripts for every model, seed, task and way of choosing, at the first BOTTOM_K and IF_WEIGHT; then
varies each of these alone. What is finished is not computed again, so a killed run goes on where it was. Writes
results/tables/*.md, .tex and .csv, pictures, and results/report.html, which works offline.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import paths
from utils.artifacts import read_json
from utils.console import UserError, banner, say, shown_path
from utils.grid import Cell, grids, measured, repair_row, run_grid
from utils.performance_functions.evaluation import SCRIPTS
from utils.report import write_report
from utils.report_content import report_on
from utils.settings import (
    Family,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ScoresType,
    Seed,
    Settings,
    run_step,
)
from utils.steps import run_script
from utils.sweeps import draw_overview
from utils.tables import ShownTable, ablation_figure, ablation_table, main_table

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: list[str] = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
PRE_SFT_MODEL_NAMES: list[str] | None = None  # what they were before fine-tuning, for a row each
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; seeds but the first get a folder seed-N in it
SEEDS: list[Seed] = [42, 0]  # of the steps; tables show mean and standard deviation
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASKS: list[Literal["bias", "ethics", "truth", "combined"]] = ["bias", "ethics", "truth", "combined"]  # repaired for
SCORES_TYPES: list[ScoresType] = ["pure_ekfac", "dpp", "identity", "representation", "direct", "random"]  # methods
PRESERVE_PERPLEXITY: list[bool] = [False, True]  # the paper's direction; the one that leaves perplexity alone
BOTTOM_K: list[PositiveInt] = [20, 5, 10, 40]  # the first in the main table, all in its ablation
IF_WEIGHT: list[NonNegativeFloat] = [10.0, 0.0, 1.0, 100.0]  # likewise, for dpp
ABLATED_SCORES_TYPES: list[ScoresType] = ["pure_ekfac", "dpp"]  # methods in the ablation over BOTTOM_K
LEARNING_RATE: Literal["auto"] | PositiveFloat = "auto"  # of every repair; "auto" is searched within PPL_BUDGET
PPL_BUDGET: PositiveFloat = 0.01  # perplexity that a repair may cost, as a fraction
SWEPT_RATES: list[PositiveFloat] | None = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3]  # for the first seed's sweep pictures
NUM_COMPLETIONS: NonNegativeInt = 2  # prompts of each task whose completions the report shows

NUM_BLOCKS: PositiveInt = 1  # as in step 1
DAMPING_FACTOR: NonNegativeFloat | None = None  # as in step 1
USE_HALF_PRECISION: bool = False  # as in step 1
# -----------------------------------------------------------------------------------------------------------

STEP_CONSTANTS = ("MODEL_FAMILY", "HH_DATASET", "DATA_DIR", "DEVICE", "OVERWRITE", "PPL_BUDGET", "NUM_COMPLETIONS")
STEP_CONSTANTS += ("NUM_BLOCKS", "DAMPING_FACTOR", "USE_HALF_PRECISION")


def common_constants(settings: Settings, model: str, seed: int) -> dict[str, Any]:
    """What every step is told; each seed but the first has an output folder of its own."""
    output_dir = Path(settings.OUTPUT_DIR)
    folder = output_dir if seed == settings.SEEDS[0] else output_dir / f"seed-{seed}"
    shared = settings.pick(*STEP_CONSTANTS)
    return {**shared, "MODEL_NAME": model, "SEED": seed, "OUTPUT_DIR": str(folder), "SAVE_TO_DISK": False}


def run_everything(settings: Settings, cells: dict[str, list[Cell]]) -> list[dict[str, Any]]:
    """Run the grid for every model and seed, and read what each repair did; a row for each repair."""
    rows = []
    for model in settings.MODEL_NAMES:
        for seed in settings.SEEDS:
            common = common_constants(settings, model, seed)
            every = list(dict.fromkeys(cell for some in cells.values() for cell in some))
            run_grid(common, every, settings.LEARNING_RATE)
            name = paths.model_short_name(model)
            rows += [repair_row(common["OUTPUT_DIR"], name, cell, seed, settings.LEARNING_RATE) for cell in every]
        if settings.SWEPT_RATES:
            first = common_constants(settings, model, settings.SEEDS[0])
            run_grid({**first, "NUM_COMPLETIONS": 0}, cells["main"], settings.SWEPT_RATES)
    draw_overview(settings.OUTPUT_DIR, [*map(paths.model_short_name, settings.MODEL_NAMES)], 100 * settings.PPL_BUDGET)
    return rows


def measure_baselines(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """The models before any repair, as the first rows of the main table."""
    before = settings.PRE_SFT_MODEL_NAMES or [None] * len(settings.MODEL_NAMES)
    if len(before) != len(settings.MODEL_NAMES):
        raise UserError(
            f"PRE_SFT_MODEL_NAMES has {len(before)} names for {len(settings.MODEL_NAMES)} in MODEL_NAMES; "
            "allowed is one for each, in the same order, or None"
        )
    baselines = []
    for names in zip(before, settings.MODEL_NAMES, strict=True):
        for name, stage in zip(names, ("pre-SFT", "POST-SFT"), strict=True):
            if name:
                for script in SCRIPTS.values():
                    run_script(script, common_constants(settings, name, settings.SEEDS[0]))
                short = paths.model_short_name(name)
                baselines.append((f"{short} ({stage})", measured(settings.OUTPUT_DIR, short)))
    return baselines


def read_known_harm(hh_dataset: str) -> dict[str, list[int]] | None:
    """Rows of the training split that are known to be harmful, by task, from planted.json beside the dialogues.

    Returns:
        None where there is no such file.

    Raises:
        UserError: it is no such JSON.
    """
    file = paths.anchored(hh_dataset) / "planted.json"
    if not file.is_file():
        return None
    rows = read_json(file, "mend it, or remove it where no harm is known")
    if not isinstance(rows, dict) or not all(isinstance(some, list) for some in rows.values()):
        raise UserError(f"{shown_path(file)} must map tasks to lists of rows of the training split")
    return rows


def main(settings: Settings) -> None:
    """Run the grid, then write tables, pictures and the report."""
    banner("tables", ", ".join(settings.MODEL_NAMES))
    known_harm = read_known_harm(settings.HH_DATASET)
    baselines, cells = measure_baselines(settings), grids(settings)
    rows = run_everything(settings, cells)
    folder = paths.tables_dir(settings.OUTPUT_DIR)
    tables: list[ShownTable] = []
    for name, some in cells.items():
        chosen = [row for row in rows if any(cell.is_of(row) for cell in some)]
        tables.append(main_table(baselines, chosen, known_harm) if name == "main" else ablation_table(chosen, name))
        tables[-1].write(folder / name)
        if name != "main":
            ablation_figure(chosen, name, folder / f"{name}.png")
    write_report(report_on(settings, rows, tables, known_harm), paths.results_dir(settings.OUTPUT_DIR) / "report.html")
    say(f"\n{(folder / 'main.md').read_text(encoding='utf-8')}")
    say(f"tables: {shown_path(folder)}")


if __name__ == "__main__":
    run_step(main)
