"""After step 5: other people's benchmarks before and after the repairs, by EleutherAI's lm-evaluation-harness.

    python evaluation_scripts/harness_eval.py
    python evaluation_scripts/harness_eval.py --REPAIRED_MODEL_NAMES gradient_ascent_models/NAME --LIMIT 200

Evaluates the POST-SFT model and its repaired checkpoints on every task. Writes results/MODEL_harness_TASK.json with the
value of every document, prints the differences with their standard errors, paired over the documents, and writes them
to results/tables/harness.md, .tex and .csv. Needs the optional package: pip install "lm_eval[hf]".
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import difflib
import functools
import logging
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from steps import run_step
from utils import paths
from utils.artifacts import FileArtifact
from utils.console import UserError, banner, say
from utils.devices import resolve_device
from utils.hub import decide_on_dataset_code, hub_access
from utils.intervals import ClusterSums, Estimate, estimate_mean
from utils.locks import locked
from utils.model_fingerprints import model_fingerprint
from utils.models import load_model, locate
from utils.processes import first_process_only
from utils.registry import harness_result, repaired_checkpoints
from utils.reporting.tables import Row, Table, with_interval
from utils.settings import Choices, ModelNames, PositiveInt, Settings, require_distinct_models
from utils.spreading import SPREAD

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
REPAIRED_MODEL_NAMES: ModelNames | None = None  # hub ids or local folders; None = all repairs of it below OUTPUT_DIR
HARNESS_TASKS: Choices[str] = [  # names of the harness's tasks
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "ethics_cm",
    "ethics_deontology",
    "ethics_justice",
    "ethics_utilitarianism",
    "ethics_virtue",
    "crows_pairs_english",
    "bbq",
    "hellaswag",
    "arc_easy",
]
INCLUDE_PATH: str | None = None  # folder with task files of your own; functions that they name are run
LIMIT: PositiveInt | None = None  # documents of each task, the first ones; None = all
BATCH_SIZE: PositiveInt = 8  # requests that the model runs at once
OUTPUT_DIR: str = "."  # where results go; relative paths start at the repository
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces results that were made from other weights or settings
# -----------------------------------------------------------------------------------------------------------


@functools.cache
def task_manager(include_path: str | None, include_defaults: bool = True) -> TaskManager:
    """The harness's tasks; reading its thousands of task files takes a while.

    Raises:
        UserError: the harness is not installed.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about how it is called
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f'lm-evaluation-harness is not installed ({error}): pip install "lm_eval[hf]"') from None
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def find_tasks(settings: Settings) -> TaskManager:
    """The harness's tasks, after checking that all HARNESS_TASKS are among them.

    Raises:
        UserError: the harness is not installed, or it has no task of that name.
    """
    own = str(paths.resolve_path(settings.INCLUDE_PATH)) if settings.INCLUDE_PATH else None
    if own and not Path(own).is_dir():
        raise UserError(f"INCLUDE_PATH = {settings.INCLUDE_PATH!r}: no such folder; give one with task files, or None")
    if own and set(settings.HARNESS_TASKS) <= set(task_manager(own, include_defaults=False).all_tasks):
        return task_manager(own, include_defaults=False)
    manager = task_manager(own)
    for task in settings.HARNESS_TASKS:
        if task not in manager.all_tasks:
            similar = ", ".join(difflib.get_close_matches(task, manager.all_tasks)) or "none"
            raise UserError(f"HARNESS_TASKS: the harness has no task {task!r}; similar names: {similar}")
    return manager


def repaired_models(settings: Settings) -> list[str]:
    """REPAIRED_MODEL_NAMES, or every checkpoint below OUTPUT_DIR that step 5 made from MODEL_NAME.

    Raises:
        UserError: there is none, one is missing or has the name of the model, or the manifest of one is broken.
    """
    if settings.REPAIRED_MODEL_NAMES:
        for model in settings.REPAIRED_MODEL_NAMES:
            locate(model)  # a missing one is found before the work
            if paths.model_short_name(model) == paths.model_short_name(settings.MODEL_NAME):
                raise UserError(
                    f"REPAIRED_MODEL_NAMES has {model}, and MODEL_NAME = {settings.MODEL_NAME!r}: results are named by "
                    "the last part, which must differ"
                )
        return settings.REPAIRED_MODEL_NAMES
    found = repaired_checkpoints(settings.OUTPUT_DIR, model_fingerprint(settings.MODEL_NAME))
    if not found:
        raise UserError(
            f"REPAIRED_MODEL_NAMES = None: {paths.repaired_models_dir(settings.OUTPUT_DIR)} has no repaired checkpoint "
            f"of {settings.MODEL_NAME}; run {paths.STEP_5} first, or name one"
        )
    return found


def evaluate(settings: Settings, model: str, manager: TaskManager) -> dict[str, dict[str, Any]]:
    """The results of one model on every task, by task; stored results are read."""
    name, fingerprint = paths.model_short_name(model), model_fingerprint(model)
    outputs = {task: harness_result(settings, name, fingerprint, task) for task in settings.HARNESS_TASKS}
    with locked(*(output.path for output in outputs.values())):
        evaluate_unfinished(settings, model, manager, outputs)
        return {task: output.load_json() for task, output in outputs.items()}


def evaluate_unfinished(
    settings: Settings, model: str, manager: TaskManager, outputs: Mapping[str, FileArtifact]
) -> None:
    """Evaluate one model on the tasks whose results are not stored yet."""
    unfinished = [task for task, output in outputs.items() if not output.is_finished(settings.OVERWRITE)]
    if unfinished:
        from lm_eval.models.huggingface import HFLM

        device = resolve_device(settings.DEVICE)
        # With a model that is loaded, the harness does not look for other processes to divide its work among.
        pretrained = load_model(model, device, is_spread=settings.DEVICE == SPREAD)
        loaded = HFLM(
            pretrained,
            tokenizer=locate(model),
            trust_remote_code=settings.TRUST_REMOTE_CODE,
            device=str(device),
            batch_size=settings.BATCH_SIZE,
        )
    for task in unfinished:
        evaluate_task(settings, loaded, task, manager, outputs[task])


def evaluate_task(settings: Settings, loaded: Any, task: str, manager: TaskManager, output: FileArtifact) -> None:  # noqa: ANN401
    """Evaluate a loaded model on one task, and store every metric with the value of every document.

    Raises:
        UserError: the task's data cannot be loaded.
    """
    from lm_eval import simple_evaluate

    started = time.monotonic()
    decide_on_dataset_code()
    try:
        evaluated = simple_evaluate(loaded, tasks=[task], limit=settings.LIMIT, task_manager=manager, bootstrap_iters=0)
    except (OSError, ValueError, RuntimeError) as error:  # no network, or a data set that has moved
        raise UserError(f"HARNESS_TASKS: {task} cannot be evaluated ({hub_access().reason(error)})") from error
    metrics = {}
    for name, numbers in evaluated["results"].items():  # a group has several
        documents = sorted(evaluated["samples"].get(name, []), key=lambda document: document["doc_id"])
        for key, value in numbers.items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr") and is_finite(value):
                values = [document.get(metric) for document in documents if document["filter"] == filter_name]
                are_numbers = all(map(is_finite, values))
                shown = metric if filter_name == "none" else f"{metric},{filter_name}"
                metrics[f"{name}/{shown}" if name != task else shown] = {
                    "value": float(value),
                    "higher_is_better": evaluated["higher_is_better"].get(name, {}).get(metric),
                    "documents": [float(number) for number in values] if are_numbers else [],
                }
    output.save_json({"task": task, "metrics": metrics}, started)


def is_finite(value: object) -> bool:
    """Whether a metric is a number; some are NaN, where LIMIT leaves no document of their kind."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> Estimate:
    """after - before of one metric, paired over the documents; no standard error where it is not their values' mean."""
    change = after["value"] - before["value"]
    changes = [new - old for old, new in zip(before["documents"], after["documents"], strict=True)]
    if not changes:
        return Estimate(change, math.inf, 0)
    estimate = estimate_mean(ClusterSums(torch.tensor(changes, dtype=torch.float64), torch.ones(len(changes))))
    is_mean = math.isclose(estimate.value, change, abs_tol=1e-6)
    return estimate if is_mean else Estimate(change, math.inf, len(changes))


def comparison(before: Mapping[str, Any], after: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each repaired model, task and metric.

    Args:
        before: results of the POST-SFT model, by task.
        after: results of the repaired models, by name and task.
    """
    data: list[Row] = []
    for model, results in after.items():
        for task, result in results.items():
            for metric, new in result["metrics"].items():
                old = before[task]["metrics"].get(metric)
                if old is None:  # it was no number
                    continue
                row = {"model": model, "task": task, "metric": metric, "before": old["value"], "after": new["value"]}
                row |= difference(old, new).fields("difference")
                row |= {"documents": len(new["documents"]), "higher_is_better": new["higher_is_better"]}
                data.append(row)
    rows = [
        [
            *(row[name] for name in ("model", "task", "metric")),
            *(f"{row[name]:.4f}" for name in ("before", "after")),
            with_interval(row, "difference").shown("+.4f"),
        ]
        for row in data
    ]
    header = ["repaired model", "task", "metric", "before", "after", "difference"]
    caption = "lm-evaluation-harness before and after each repair; in brackets 95 % intervals, paired over documents."
    return Table(caption, header, rows, data)


@first_process_only
def main(settings: Settings) -> None:
    """Evaluate the model and its repairs, and compare."""
    repaired, manager = repaired_models(settings), find_tasks(settings)
    require_distinct_models([settings.MODEL_NAME, *repaired], "MODEL_NAME and REPAIRED_MODEL_NAMES")
    results = {}
    for model in (settings.MODEL_NAME, *repaired):
        banner("lm-evaluation-harness", model)
        results[paths.model_short_name(model)] = evaluate(settings, model, manager)
    before = results.pop(paths.model_short_name(settings.MODEL_NAME))
    table = comparison(before, results)
    table.write(paths.tables_dir(settings.OUTPUT_DIR) / "harness")
    say(f"\n{table.markdown()}")


if __name__ == "__main__":
    run_step(main)
