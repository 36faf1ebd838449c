"""A grid of repairs: which steps it takes, and what each repair did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from utils import paths
from utils.artifacts import Artifact, read_json
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4, STEP_5
from utils.performance_functions.evaluation import MEASUREMENTS, SCRIPTS
from utils.repair_report import repair_report
from utils.settings import Settings
from utils.steps import run_script
from utils.sweeps import sweep_row


@dataclass(frozen=True)
class Cell:
    """One repair of a grid, but for the model and the seed."""

    task: str
    scores_type: str
    preserve_perplexity: bool
    bottom_k: int
    if_weight: float

    @property
    def name(self) -> str:
        """The repair's name in paths."""
        return paths.repair_name(self.scores_type, self.bottom_k, self.if_weight, self.preserve_perplexity)

    @property
    def method(self) -> str:
        """How it is called in tables."""
        return self.scores_type + (" + preserve" if self.preserve_perplexity else "")

    def is_of(self, row: dict[str, Any]) -> bool:
        """Whether a `repair_row` is of this cell."""
        return all(row[name] == value for name, value in vars(self).items())

    @property
    def constants(self) -> dict[str, Any]:
        """What steps 3 to 5 need to be told, but for the task."""
        return {
            "SCORES_TYPE": self.scores_type,
            "PRESERVE_PERPLEXITY": self.preserve_perplexity,
            "BOTTOM_K": self.bottom_k,
            "IF_WEIGHT": self.if_weight,
        }


def grids(settings: Settings) -> dict[str, list[Cell]]:
    """The repairs of the main table, and of each ablation where there is more than one value.

    Args:
        settings: constants of evaluation_scripts/paper_tables.py; the first value of a list is that of the main table.
    """
    bottom_k, if_weight, preserve = settings.BOTTOM_K[0], settings.IF_WEIGHT[0], settings.PRESERVE_PERPLEXITY[0]
    ablated_tasks = [task for task in settings.TASKS if task != "combined"] or settings.TASKS
    cells = {
        "main": [
            Cell(task, scores_type, preserves, bottom_k, if_weight)
            for scores_type in settings.SCORES_TYPES
            for preserves in settings.PRESERVE_PERPLEXITY
            for task in settings.TASKS
        ],
        "bottom_k": [
            Cell(task, scores_type, preserve, k, if_weight)
            for scores_type in settings.ABLATED_SCORES_TYPES
            for k in settings.BOTTOM_K
            for task in ablated_tasks
        ],
        "if_weight": [Cell(task, "dpp", preserve, bottom_k, w) for w in settings.IF_WEIGHT for task in ablated_tasks],
    }
    for name, values in (("bottom_k", settings.BOTTOM_K), ("if_weight", settings.IF_WEIGHT)):
        if len(values) == 1:
            del cells[name]
    return cells


def task_names(cells: Sequence[Cell]) -> list[str]:
    """As few values of TASK_NAME as name the tasks of these cells; each is a run of a step, and a model loaded."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    if set(MEASUREMENTS) <= set(tasks):
        return ["all", *(task for task in tasks if task not in MEASUREMENTS)]
    return tasks


def run_grid(common: dict[str, Any], cells: Sequence[Cell], learning_rate: str | float | list[float]) -> None:
    """Run steps 1 to 5 for every cell; what is finished is not computed again.

    Args:
        common: constants that all steps share, with MODEL_NAME.
        learning_rate: LEARNING_RATE of step 5.
    """
    scores_types = {cell.scores_type for cell in cells}
    run_script(STEP_1, common)
    if "identity" in scores_types:
        run_script(STEP_1, common, FACTOR_STRATEGY="identity")
    if scores_types & {"dpp", "representation"}:
        run_script(STEP_2, common, ANSWERS_OF="all" if "representation" in scores_types else None)
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.name, []).append(cell)
    for group in groups.values():
        constants = {**common, **group[0].constants}
        for task_name in task_names(group):
            if group[0].scores_type == "dpp":
                run_script(STEP_3, constants, TASK_NAME=task_name)
            run_script(STEP_4, constants, TASK_NAME=task_name)
            run_script(STEP_5, constants, TASK_NAME=task_name, LEARNING_RATE=learning_rate)


def measured(output_dir: str, model: str) -> dict[str, dict[str, Any]]:
    """The test-split results of one model, by metric, those that are there."""
    files = {metric: paths.result_file(output_dir, model, metric, "test") for metric in SCRIPTS}
    return {metric: read_json(file) for metric, file in files.items() if file.exists()}


def repair_row(output_dir: str, model: str, cell: Cell, seed: int, learning_rate: str | float) -> dict[str, Any]:
    """What one repair did, from the results of its steps.

    Args:
        model: short name.
        learning_rate: as it was given to step 5; "auto" is looked up in the search.

    Returns:
        The cell, seed, seconds, learning rate, chosen rows (`indices`), why a search `stopped`, and for perplexity and
        each task the loss after and its change in percent.
    """
    gradients = Artifact(paths.gradients_file(output_dir, cell.task, model, cell.name, seed), STEP_4).require()
    seconds, stopped = gradients["seconds"], None
    if learning_rate == "auto":
        search = read_json(paths.search_file(output_dir, cell.task, model, cell.name))
        learning_rate, stopped = search["learning_rate"], search["stopped"]
        seconds += search["seconds"]
    folder = paths.repaired_model_dir(output_dir, cell.task, model, cell.name, learning_rate)
    before, after = measured(output_dir, model), measured(output_dir, folder.name)
    report = repair_report({"learning_rate": learning_rate}, {metric: before[metric] for metric in after}, after)
    row = sweep_row(report)
    gains = [row[f"{task}_improvement_percent"] for task in MEASUREMENTS if cell.task in (task, "combined")]
    return {
        "model": model,
        "seed": seed,
        **vars(cell),
        "method": cell.method,
        "repair": cell.name,
        "improvement_percent": sum(gains) / len(gains),
        **row,
        "seconds": seconds,
        "stopped": stopped,
        "indices": gradients["indices"],
    }
