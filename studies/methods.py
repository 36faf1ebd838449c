"""Every method at the same cost: the largest step whose perplexity on the test dialogues stays within the budget.

The search of step 5 looks at training dialogues, and leaves a margin for what it cannot know, so methods end at
different costs. Here every method spends the same: the step is found on the test split, to 1 %, and the improvement is
measured on it. So the number compares methods; it is no forecast of what a user gets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from steps import load_script, run_script
from studies.comparison import REFERENCE
from utils.artifacts import FileArtifact
from utils.console import banner
from utils.devices import resolve_device
from utils.dialogue_folders import rows_of, without, write_folder
from utils.evaluation import Data, EvaluationModel, Evaluator
from utils.folder_artifacts import FolderArtifact
from utils.learning_rate_search import search_on
from utils.locks import locked
from utils.model_fingerprints import model_fingerprint
from utils.paths import STEP_0, STEP_3, STEP_4, STEP_5, model_short_name, resolve_path, results_dir
from utils.performance_functions.hh import load_dialogues
from utils.registry import ModelArtifacts
from utils.repair_record import RepairRecord
from utils.repairs import RepairChoice
from utils.reporting.tables import Row
from utils.results import Losses, Metric, compare
from utils.settings import TASK_NAMES, Settings, load_settings, task_weights

BUDGET = 0.01  # more perplexity on the test dialogues
MADE_BY = "studies/methods.py"
METRICS: tuple[Metric, ...] = ("anthropic", *TASK_NAMES)
Known = dict[tuple[float, Metric, str], Losses]  # by learning rate, measurement and fingerprint of its data


def rows_at_budget(common: dict[str, Any], tasks: Sequence[str], choices: Sequence[RepairChoice]) -> list[Row]:
    """One row for each task and choice: step 4's gradient is made, and the best step within BUDGET measured.

    Args:
        common: constants that all steps share, with MODEL_NAME.
    """
    script, rows, model, unchanged = load_script(STEP_5), [], None, {}
    evaluator = Evaluator(settings_of(script, common), "test")
    clusters = clusters_of(evaluator)
    for choice in choices:
        constants = {**common, **choice.constants}
        for task in (task for task in tasks if choice.fits(task)):
            if choice.method.subset == "diverse":
                run_script(STEP_3, constants, TASK_NAME=task)
            run_script(STEP_4, constants, TASK_NAME=task)
            settings = settings_of(script, {**constants, "TASK_NAME": task})
            record = RepairRecord(ModelArtifacts(settings, settings.MODEL_NAME), task)
            model = model or script.SteppableModel(settings, record.num_blocks)
            content = _at_budget(record, model, evaluator, unchanged)
            of_repair = {name: record.gradient[name] for name in ("seconds", "indices")}
            rows.append({**vars(choice), **_row(task, choice.label, content), **of_repair, "clusters": clusters})
    return rows


def clusters_of(evaluator: Evaluator) -> dict[str, list[int]]:
    """The cluster of every test pair, by task."""
    return {task: evaluator.data(task).cluster_numbers.tolist() for task in TASK_NAMES}


def settings_of(script: Any, constants: dict[str, Any]) -> Settings:  # noqa: ANN401
    """A script's constants, those of them that are given replaced."""
    settings = load_settings(script, [])
    return Settings(**{name: constants.get(name, value) for name, value in vars(settings).items()})


def _row(task: str, method: str, content: dict[str, Any]) -> Row:
    """The improvement of the task (of "combined" the mean of the three), of every task, and the cost."""
    measured = content["measurements"]
    of_tasks = [measured[name] for name in (TASK_NAMES if task == "combined" else (task,))]
    return {
        "task": task,
        "method": method,
        "learning_rate": content["learning_rate"],
        "improvement": sum(of["improvement"] for of in of_tasks) / len(of_tasks),
        "perplexity_change_percent": measured["perplexity"]["change_percent"],
        "measurements": measured,
        "of_pairs": content["of_pairs"],
    }


def _all_losses(evaluator: Evaluator, measure: Callable[[Metric, Data], Losses]) -> dict[Metric, Losses]:
    return {metric: measure(metric, evaluator.data(metric)) for metric in METRICS}


def _changes(before: dict[Metric, Losses], after: dict[Metric, Losses]) -> dict[str, Any]:
    """The change of every measurement, and the improvement of every single pair."""
    measured: dict[str, Any] = {}
    for metric in METRICS:
        measured |= compare(metric, before[metric], after[metric])
    of_pairs = {task: (before[task]["loss"] - after[task]["loss"]).tolist() for task in TASK_NAMES}
    return {"measurements": measured, "of_pairs": of_pairs}


def _at_budget(record: RepairRecord, model: Any, evaluator: Evaluator, unchanged: Known) -> dict[str, Any]:  # noqa: ANN401
    """The best step of one repair, and what it does to every measurement; kept beside the searches of step 5.

    Args:
        unchanged: the losses that the model is known to have before any repair; more are added.
    """
    artifacts = record.artifacts
    inputs = record.inputs | {metric: evaluator.data(metric).fingerprint for metric in METRICS}
    name = f"{record.task}_{artifacts.name}_{artifacts.repair_name}_at_budget.json"
    choice = RepairChoice.of(artifacts.settings)
    constants = {"BUDGET": BUDGET, **choice.search_constants}
    output = FileArtifact(results_dir(artifacts.settings.OUTPUT_DIR) / name, MADE_BY, constants, inputs)
    stepped: Known = {}

    def losses_at(rate: float, metric: Metric, data: Data) -> Losses:
        known, key = unchanged if rate == 0 else stepped, (rate, metric, data.fingerprint)
        if key not in known:
            known[key] = model.at(record, rate).measure(metric, data, quiet=True)
        return known[key]

    with locked(output.path):
        if not output.is_finished(overwrite=True):  # what was made from other inputs is made anew
            banner("at the budget", f"{record.task}, {artifacts.repair_name}, {artifacts.model}")
            started, weights = time.monotonic(), task_weights(artifacts.settings, record.task)
            pairs = {name: evaluator.data(name) for name in weights}
            of_search = (evaluator.data("anthropic"), pairs, weights, BUDGET, losses_at, choice.first_rate)
            search = search_on(*of_search, counts_error=False)
            rates = (0.0, search.learning_rate)
            before, after = (_all_losses(evaluator, partial(losses_at, rate)) for rate in rates)
            content = {"learning_rate": search.learning_rate, "stopped": search.stopped}
            output.save_json({**content, **_changes(before, after)}, started)
        return output.load_json()


def retrained_row(
    common: dict[str, Any],
    task: str,
    removed: Sequence[int],
    method: str = "retrain",
    model: str | None = None,
    **constants: Any,
) -> Row:
    """What fine-tuning again without some dialogues does for a task, whatever it costs: what repairs replace.

    Args:
        common: constants that all steps share, with MODEL_NAME, a model made by data/make_sft_model.py.
        removed: rows of the training split.
        method: its name in tables.
        model: name of the new model, by default that of the method and the task; one that is there is not made again.
        constants: of data/make_sft_model.py, where the model's record does not say them: BASE_MODEL where it is a path,
            and those that do not change what is made, as BATCH_SIZE_PER_DEVICE.
    """
    # What another model of the same name has measured is replaced.
    settings = settings_of(load_script(STEP_5), {**common, "TASK_NAME": task, "OVERWRITE": True})
    folder = f"{settings.OUTPUT_DIR}/retrained/{model or f'{method}-{task}'}"
    train, test = (rows_of(load_dialogues(settings.HH_DATASET, split)) for split in ("train", "test"))
    write_folder(resolve_path(f"{folder}-dialogues"), without(train, removed), test)
    recipe = FolderArtifact(resolve_path(settings.MODEL_NAME), STEP_0).require()["settings"]
    run_script(STEP_0, {**recipe, **constants}, HH_DATASET=f"{folder}-dialogues", SFT_MODEL_DIR=f"{folder}-sft")
    made = FolderArtifact(resolve_path(f"{folder}-sft"), STEP_0).require()
    evaluator = Evaluator(settings, "test")
    before, after = (_stored_losses(evaluator, name) for name in (settings.MODEL_NAME, f"{folder}-sft"))
    return {
        **vars(RepairChoice(REFERENCE, len(removed))),
        **_row(task, method, {"learning_rate": None, **_changes(before, after)}),
        "seconds": made["seconds"],
        "clusters": clusters_of(evaluator),
    }


def _stored_losses(evaluator: Evaluator, name: str) -> dict[Metric, Losses]:
    """Every measurement of a model, as step 6 takes and keeps it."""
    load = cache(partial(EvaluationModel.load, name, resolve_device(evaluator.settings.DEVICE)))
    of_model = (model_short_name(name), model_fingerprint(name), load)
    return {metric: evaluator.result(metric, *of_model).losses for metric in METRICS}
