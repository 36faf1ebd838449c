"""Step 5: repair the model, save it, and measure what the repair did and what it cost.

    python gradient_ascent_and_save.py
    python gradient_ascent_and_save.py --SCORES_TYPE dpp --LEARNING_RATE 0.003 0.006 0.012
    python gradient_ascent_and_save.py --LEARNING_RATE auto --PPL_BUDGET 0.01

    theta <- theta + LEARNING_RATE * G

Reads the model and the repair gradient of step 4. Writes a complete Hugging Face checkpoint with repair.json and a
model card, and the test-split measurements before and after to results/. A list of learning rates is a sweep: table
and picture in results/. "auto" finds the rate that improves most within PPL_BUDGET, on held-out training dialogues.
"""

from __future__ import annotations

from typing import Any, Literal

from utils.artifacts import Artifact
from utils.console import banner, say
from utils.hub import push_folder, require_hub_access
from utils.models import require_supported
from utils.performance_functions.evaluation import Evaluator
from utils.pipeline import tasks_of
from utils.rates import search_learning_rate
from utils.repair import Repair
from utils.settings import (
    Family,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RepairTask,
    ScoresType,
    Seed,
    Settings,
    TrackerName,
    run_step,
)
from utils.steps import next_command
from utils.sweeps import sweep_row, write_sweep
from utils.tracker import Tracker, tracking

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # as in steps 1 and 4, whose folders carry it; of the validation dialogues
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASK_NAME: RepairTask = "all"  # as in step 4
SCORES_TYPE: ScoresType = "pure_ekfac"  # as in step 4
BOTTOM_K: PositiveInt = 20  # as in step 4
IF_WEIGHT: NonNegativeFloat = 10.0  # as in step 4
PRESERVE_PERPLEXITY: bool = False  # as in step 4
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # as in step 4
LEARNING_RATE: Literal["auto"] | NonNegativeFloat | list[NonNegativeFloat] = 0.05  # step size; a list sweeps
PPL_BUDGET: PositiveFloat = 0.01  # for "auto": perplexity that a repair may cost, as a fraction
NUM_VALIDATION_EXAMPLES: PositiveInt = 500  # for "auto": training dialogues that the cost is measured on, at most
SAVE_TO_DISK: bool = True  # write the repaired checkpoint
PUSH_TO_HUB: bool = False  # upload it; needs SAVE_TO_DISK, HUB_USERNAME and HUB_TOKEN in .env
HUB_USERNAME: str | None = None  # owner of the hub repository
COMPUTE_ANTHROPIC_EVAL: bool = True  # measure HH perplexity before and after
COMPUTE_TASK_EVAL: bool = True  # measure bias, ethics and truth before and after
NUM_COMPLETIONS: NonNegativeInt = 0  # prompts of the repaired tasks whose greedy completions are kept in results/
TRACKER: TrackerName | None = None  # also send the numbers to this experiment tracker, if it is installed
# -----------------------------------------------------------------------------------------------------------


def say_report(report: dict[str, Any]) -> None:
    """One line for each measurement."""
    for metric, row in report["measurements"].items():
        percent = row.get("improvement_percent", row.get("change_percent"))
        word = "change" if metric == "perplexity" else "improvement"
        say(f"   {metric}: {row['before']:.4f} -> {row['after']:.4f}, {word} {percent:+.2f} %")


def repair_task(settings: Settings, task: str, evaluator: Evaluator, tracker: Tracker) -> list[Artifact]:
    """Repair for one task at every learning rate; gives the repaired checkpoints."""
    repair = Repair(settings, task)
    for metric in repair.metrics:
        evaluator.data(metric)  # a missing file is found before the repair, not after it
    rates, search = settings.LEARNING_RATE, None
    if rates == "auto":
        banner("step 5: learning rate", f"{task}, {settings.SCORES_TYPE}, {settings.MODEL_NAME}")
        search = search_learning_rate(repair)
        rates = search["learning_rate"]
    reports, checkpoints = [], []
    for learning_rate in rates if isinstance(rates, list) else [rates]:
        subject = f"{task}, {settings.SCORES_TYPE}, learning rate {learning_rate:g}, {settings.MODEL_NAME}"
        banner("step 5: repair", subject)
        if settings.SAVE_TO_DISK:
            repair.save(learning_rate)
        report = repair.report(learning_rate, evaluator, search)
        reports.append(report)
        checkpoints.append(repair.checkpoint(learning_rate))
        say_report(report)
        tracker.log({f"{task}/{name}": value for name, value in sweep_row(report).items()})
        if settings.SAVE_TO_DISK:
            repair.describe(learning_rate, report)
        if settings.NUM_COMPLETIONS:
            repair.complete(learning_rate, evaluator)
    if isinstance(rates, list):
        write_sweep(repair, reports, 100 * settings.PPL_BUDGET)
    return checkpoints


def main(settings: Settings) -> None:
    """Repair for every task, and upload what was asked to be."""
    require_supported(settings.MODEL_NAME, settings.MODEL_FAMILY)
    access = require_hub_access(settings) if settings.PUSH_TO_HUB else None
    evaluator = Evaluator(settings, "test")
    with tracking(settings.TRACKER, settings.MODEL_NAME, vars(settings)) as tracker:
        for task in tasks_of(settings.TASK_NAME):
            checkpoints = repair_task(settings, task, evaluator, tracker)
            if access:
                for checkpoint in checkpoints:
                    push_folder(checkpoint.path, settings.HUB_USERNAME, access)


def tables_command(settings: Settings) -> str:
    """The command that compares all ways of choosing on this model."""
    names = ("MODEL_NAME", "MODEL_FAMILY", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR", "DEVICE")
    return next_command("evaluation_scripts/paper_tables.py", Settings(**settings.pick(*names)))


if __name__ == "__main__":
    run_step(main, next_command=tables_command)
