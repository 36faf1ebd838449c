"""After the steps: the paper's tables, ablations and pictures, and a report to read, from a grid of repairs.

    python evaluation_scripts/paper_tables.py
    python evaluation_scripts/paper_tables.py --SEEDS 42 --SCORES_TYPES dpp random --BOTTOM_K 100 50 200

Runs the step scripts for every model, seed, task and way of choosing, at the first BOTTOM_K and IF_WEIGHT; then
varies each of these alone. What is finished is not computed again, so a killed run resumes. Writes
results/tables/*.md, .tex and .csv, pictures, and results/report.html, which works offline.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steps import run_script, run_step
from utils import paths
from utils.artifacts import FileArtifact
from utils.console import UserError, banner, say, shown_path
from utils.kept_model import keep_model
from utils.locks import locked
from utils.methods import default_strategy
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, STEP_6
from utils.performance_functions.hh import load_dialogues, read_known_harm
from utils.repairs import CONSTANTS, RepairChoice
from utils.reporting.figures import ablation_figure
from utils.reporting.grid_report import report_on
from utils.reporting.html import write_report
from utils.reporting.sweeps import draw_overview, read_report, sweep_row
from utils.reporting.tables import Table, ablation_table, main_table, with_interval
from utils.selection import require_enough
from utils.settings import (
    TASK_NAMES,
    Choices,
    Family,
    ModelNames,
    NonNegativeFloat,
    NonNegativeInt,
    OneTask,
    PositiveFloat,
    PositiveInt,
    ScoresType,
    Seed,
    Settings,
    require_distinct_models,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: ModelNames = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
PRE_SFT_MODEL_NAMES: list[str] | None = None  # their base models, in the same order; adds a row for each
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; seeds but the first get a folder seed-N in it
SEEDS: Choices[Seed] = [42, 0]  # of the steps; tables show mean and standard deviation
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

TASKS: Choices[OneTask] = ["bias", "ethics", "truth", "combined"]  # that models are repaired for, of these four
SCORES_TYPES: Choices[ScoresType] = [  # methods, as in step 4
    "pure_ekfac",
    "dpp",
    "identity",
    "representation",
    "direct",
    "random",
]
TOP_K: PositiveInt | None = None  # as in step 4
HARMFUL_TOKENS_ONLY: Choices[bool] = [False]  # True: of chosen dialogues, only tokens with negative scores
PRESERVE_PERPLEXITY: Choices[bool] = [False, True]  # False: the paper's direction; True: preserves perplexity
PRESERVE_TASKS: Choices[bool] = [False]  # True: the direction that leaves the other tasks' measurements as they are
NUM_STEPS: Choices[PositiveInt] = [1]  # parts of the way from one gradient to the next
BOTTOM_K: Choices[PositiveInt] = [20, 5, 10, 40]  # the first in the main table, all in its ablation
IF_WEIGHT: Choices[NonNegativeFloat] = [10.0, 0.0, 1.0, 100.0]  # likewise, for dpp
ABLATED_SCORES_TYPES: Choices[ScoresType] = ["pure_ekfac", "dpp"]  # of SCORES_TYPES, in the ablation over BOTTOM_K
LEARNING_RATE: Literal["auto"] | PositiveFloat = "auto"  # a number, or "auto": searched within PPL_BUDGET
PPL_BUDGET: PositiveFloat = 0.01  # perplexity that a repair may cost, as a fraction
SWEPT_RATES: Choices[PositiveFloat] | None = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3]  # of the first seed's sweep pictures
NUM_COMPLETIONS: NonNegativeInt = 2  # prompts of each task whose completions the report shows

COMPUTE_PER_TOKEN_SCORES: bool = True  # as in step 1; the report colours the words of dialogues by them
NUM_BLOCKS: PositiveInt = 1  # as in step 1
DAMPING_FACTOR: NonNegativeFloat | None = None  # as in step 1
USE_HALF_PRECISION: bool = False  # as in step 1
# -----------------------------------------------------------------------------------------------------------

STEP_CONSTANTS = ("MODEL_FAMILY", "HH_DATASET", "DATA_DIR", "DEVICE", "OVERWRITE", "PPL_BUDGET", "NUM_COMPLETIONS")
STEP_CONSTANTS += ("NUM_BLOCKS", "DAMPING_FACTOR", "USE_HALF_PRECISION", "TRUST_REMOTE_CODE")
STEP_CONSTANTS += ("COMPUTE_PER_TOKEN_SCORES",)


# -- the grid ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepairConfig:
    """One repair of the grid, without the model and the seed: what is repaired for, and how."""

    task: str
    choice: RepairChoice

    def matches(self, row: dict[str, Any]) -> bool:
        """Whether a `repair_row` is of this repair."""
        return row["task"] == self.task and all(row[name] == value for name, value in vars(self.choice).items())


def plan_grid(settings: Settings) -> dict[str, list[RepairConfig]]:
    """The repairs of the main table, at the first value of each list, and of each ablation over several values.

    A method is without the options that do not fit it.
    """
    variants = {
        name: getattr(settings, CONSTANTS[name])
        for name in ("harmful_tokens_only", "preserve_perplexity", "preserve_tasks", "num_steps")
    }
    first = {name: values[0] for name, values in variants.items()} | {"top_k": settings.TOP_K}
    bottom_k, if_weight = settings.BOTTOM_K[0], settings.IF_WEIGHT[0]
    ablated_tasks = [task for task in settings.TASKS if task != "combined"] or settings.TASKS

    def repairs(choices: Iterable[RepairChoice], tasks: Sequence[str]) -> list[RepairConfig]:
        return list(dict.fromkeys(RepairConfig(task, choice.nearest(task)) for choice in choices for task in tasks))

    every = [dict(zip(variants, values, strict=True)) for values in itertools.product(*variants.values())]
    grid = {
        "main": repairs(
            (
                RepairChoice(scores_type, bottom_k, if_weight, settings.TOP_K, **variant)
                for scores_type in settings.SCORES_TYPES
                for variant in every
            ),
            settings.TASKS,
        )
    }
    if len(settings.BOTTOM_K) > 1:
        ablated = [
            RepairChoice(scores_type, k, if_weight, **first)
            for scores_type in settings.ABLATED_SCORES_TYPES
            for k in settings.BOTTOM_K
        ]
        grid["bottom_k"] = repairs(ablated, ablated_tasks)
    if len(settings.IF_WEIGHT) > 1:
        grid["if_weight"] = repairs(
            [RepairChoice("dpp", bottom_k, weight, **first) for weight in settings.IF_WEIGHT], ablated_tasks
        )
    return grid


def fewest_task_names(repairs: Sequence[RepairConfig]) -> list[str]:
    """The fewest values of TASK_NAME that cover these repairs' tasks; each value is a run that loads the model."""
    tasks = list(dict.fromkeys(repair.task for repair in repairs))
    if set(TASK_NAMES) <= set(tasks):
        return ["all", *(task for task in tasks if task not in TASK_NAMES)]
    return tasks


def run_grid(common: dict[str, Any], repairs: Sequence[RepairConfig], learning_rate: str | float | list[float]) -> None:
    """Run steps 1 to 5 for every repair; finished steps are not computed again.

    Args:
        common: constants that all steps share, with MODEL_NAME.
        learning_rate: LEARNING_RATE of step 5.
    """
    choices = [repair.choice for repair in repairs]
    scores_types = {choice.scores_type for choice in choices}
    run_script(STEP_1, common)
    by_tokens = {default_strategy(choice.scores_type) for choice in choices if choice.harmful_tokens_only}
    for strategy in sorted({*filter(None, map(default_strategy, scores_types))} - {"ekfac"}):
        # The report's colours are EKFAC's.
        run_script(STEP_1, common, FACTOR_STRATEGY=strategy, COMPUTE_PER_TOKEN_SCORES=strategy in by_tokens)
    by_answers = scores_types & {"representation", "mean_difference"}
    if by_answers or any(choice.method.subset == "diverse" for choice in choices):
        run_script(STEP_2, common, ANSWERS_OF="all" if by_answers else None)
    where = f" · {common['MODEL_NAME']}, SEED {common['SEED']}" + ", sweep" * isinstance(learning_rate, list)
    groups: dict[str, list[RepairConfig]] = {}
    for repair in repairs:
        groups.setdefault(repair.choice.name, []).append(repair)
    for number, group in enumerate(groups.values(), start=1):
        choice = group[0].choice
        constants = {**common, **choice.constants}
        banner(f"method {number} of {len(groups)}", f"{choice.name}{where}")
        for task_name in fewest_task_names(group):
            if choice.method.subset == "diverse":
                run_script(STEP_3, constants, TASK_NAME=task_name)
            run_script(STEP_4, constants, TASK_NAME=task_name)
            run_script(STEP_5, constants, TASK_NAME=task_name, LEARNING_RATE=learning_rate)


def common_constants(settings: Settings, model: str, seed: int) -> dict[str, Any]:
    """The constants that all steps share; each seed but the first has an output folder of its own.

    The report shows the first seed's dialogues: those of others are split over tokens only to ascend harmful ones.
    """
    folder = paths.seed_dir(settings.OUTPUT_DIR, seed, settings.SEEDS[0])
    shared = settings.pick(*STEP_CONSTANTS)
    shared["COMPUTE_PER_TOKEN_SCORES"] &= seed == settings.SEEDS[0] or any(settings.HARMFUL_TOKENS_ONLY)
    measured = {"SAVE_TO_DISK": False, "COMPUTE_ANTHROPIC_EVAL": True, "COMPUTE_TASK_EVAL": True}
    return {**shared, **measured, "MODEL_NAME": model, "SEED": seed, "OUTPUT_DIR": folder}


# -- its results -------------------------------------------------------------------------------------------------------


def repair_row(
    output_dir: str, model: str, repair: RepairConfig, seed: int, learning_rate: str | float, budget: float
) -> dict[str, Any]:
    """What one repair did, from the report of step 5.

    Args:
        model: short name.
        learning_rate, budget: as they were given to step 5; the search's result replaces "auto".

    Returns:
        The repair, seed, seconds, learning rate, unlearned rows (`indices`), why a search `stopped`, the improvement
        of what the model was repaired for, and the columns of `sweep_row`.
    """
    if learning_rate == "auto":
        search = FileArtifact(paths.search_file(output_dir, repair.task, model, repair.choice.name, budget), STEP_5)
        learning_rate = search.load_json()["learning_rate"]
    checkpoint = paths.repaired_model_dir(output_dir, repair.task, model, repair.choice.name, learning_rate)
    report = read_report(FileArtifact(paths.report_file(output_dir, checkpoint.name), STEP_5))
    row = sweep_row(report)
    return {
        "model": model,
        "seed": seed,
        "task": repair.task,
        **vars(repair.choice),
        "method": repair.choice.label,
        "repair": repair.choice.name,
        **mean_improvement(row, [task for task in TASK_NAMES if repair.task in (task, "combined")]),
        **row,
        "seconds": report["seconds"],
        "stopped": report["search"]["stopped"] if report["search"] else None,
        "indices": report["indices"],
    }


def mean_improvement(row: dict[str, Any], tasks: Sequence[str]) -> dict[str, float | None]:
    """The mean improvement over the tasks a repair was made for, with its interval, and the mean percentage.

    The tasks' test pairs are independent of each other, so the margins add like standard errors: in squares.
    """
    improvements = [with_interval(row, f"{task}_improvement") for task in tasks]
    percents = [row[f"{task}_improvement_percent"] for task in tasks]
    mean = statistics.fmean(improvement.value for improvement in improvements)
    margin = None
    if all(improvement.high is not None for improvement in improvements):
        margin = math.hypot(*(improvement.high - improvement.value for improvement in improvements)) / len(tasks)
    return {
        "improvement": mean,
        "improvement_low": None if margin is None else mean - margin,
        "improvement_high": None if margin is None else mean + margin,
        "improvement_percent": None if None in percents else statistics.fmean(percents),
    }


def run_everything(settings: Settings, grid: dict[str, list[RepairConfig]]) -> list[dict[str, Any]]:
    """Run the grid for every model and seed; gives a row for each repair."""
    rows = []
    for model in settings.MODEL_NAMES:
        for seed in settings.SEEDS:
            common = common_constants(settings, model, seed)
            repairs = list(dict.fromkeys(repair for part in grid.values() for repair in part))
            run_grid(common, repairs, settings.LEARNING_RATE)
            name = paths.model_short_name(model)
            rate, budget = settings.LEARNING_RATE, settings.PPL_BUDGET
            rows += [repair_row(common["OUTPUT_DIR"], name, repair, seed, rate, budget) for repair in repairs]
        if settings.SWEPT_RATES:
            first = common_constants(settings, model, settings.SEEDS[0])
            run_grid({**first, "NUM_COMPLETIONS": 0}, grid["main"], settings.SWEPT_RATES)
    draw_overview(settings.OUTPUT_DIR, [*map(paths.model_short_name, settings.MODEL_NAMES)], 100 * settings.PPL_BUDGET)
    return rows


def measure_baselines(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """The models before any repair, as the first rows of the main table: a label, and test results by metric."""
    before = settings.PRE_SFT_MODEL_NAMES or [None] * len(settings.MODEL_NAMES)
    if len(before) != len(settings.MODEL_NAMES):
        raise UserError(
            f"PRE_SFT_MODEL_NAMES has {len(before)} names for {len(settings.MODEL_NAMES)} in MODEL_NAMES; "
            "allowed is one for each, in the same order, or None"
        )
    named = {*filter(None, before), *settings.MODEL_NAMES}  # several may have the same base
    require_distinct_models(sorted(named), "PRE_SFT_MODEL_NAMES and MODEL_NAMES")
    baselines = []
    for names in zip(before, settings.MODEL_NAMES, strict=True):
        for name, stage in zip(names, ("pre-SFT", "POST-SFT"), strict=True):
            if name:
                short, results = paths.model_short_name(name), {}
                for metric, script in STEP_6.items():
                    run_script(script, common_constants(settings, name, settings.SEEDS[0]))
                    result = paths.result_file(settings.OUTPUT_DIR, short, metric, "test")
                    results[metric] = FileArtifact(result, script).load_json()
                baselines.append((f"{short} ({stage})", results))
    return baselines


def main(settings: Settings) -> None:
    """Run the grid, then write tables, figures and the report."""
    banner("tables", ", ".join(settings.MODEL_NAMES))
    num_dialogues = len(load_dialogues(settings.HH_DATASET, "train"))
    if any(settings.HARMFUL_TOKENS_ONLY) and not settings.COMPUTE_PER_TOKEN_SCORES:
        raise UserError("HARMFUL_TOKENS_ONLY = True needs COMPUTE_PER_TOKEN_SCORES = True, and that is False")
    known_harm, grid = read_known_harm(settings.HH_DATASET, num_dialogues), plan_grid(settings)
    chosen = [repair.choice for part in grid.values() for repair in part if repair.choice.method.subset]
    require_enough(max((choice.bottom_k for choice in chosen), default=0), num_dialogues)
    baselines = measure_baselines(settings)
    with keep_model():
        rows = run_everything(settings, grid)
    folder = paths.tables_dir(settings.OUTPUT_DIR)
    tables: list[Table] = []
    with locked(folder):
        for name, repairs in grid.items():
            shown = [row for row in rows if any(repair.matches(row) for repair in repairs)]
            tables.append(main_table(baselines, shown, known_harm) if name == "main" else ablation_table(shown, name))
            tables[-1].write(folder / name)
            if name != "main":
                ablation_figure(shown, name, folder / f"{name}.png")
    write_report(report_on(settings, rows, tables, known_harm), paths.html_report(settings.OUTPUT_DIR))
    say(f"\n{tables[0].markdown()}")
    say(f"tables: {shown_path(folder)}")


if __name__ == "__main__":
    run_step(main)
