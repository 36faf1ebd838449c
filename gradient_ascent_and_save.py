"""Step 5: repair the model, save it, and measure what the repair did and what it cost.

    python gradient_ascent_and_save.py
    python gradient_ascent_and_save.py --SCORES_TYPE dpp --LEARNING_RATE 0.003 0.006 0.012
    python gradient_ascent_and_save.py --LEARNING_RATE auto --PPL_BUDGET 0.01

    theta <- theta + LEARNING_RATE * G

Reads the model and the repair gradient G of step 4. With NUM_STEPS = n the way is divided into n parts: after each but
the last G is computed again, for the same dialogues at the weights reached so far, with the same curvature. Writes a
complete Hugging Face checkpoint with repair.json and a model card, and the test-split measurements before and after to
results/.
A list of learning rates is a sweep: table and figure in results/. "auto" finds the rate that improves most within
PPL_BUDGET, on held-out training dialogues.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from steps import next_command, run_step
from utils import paths
from utils.completions import write_completions
from utils.console import banner, say, shown_path
from utils.devices import resolve_device
from utils.evaluation import EvaluationModel, Evaluator, require_finite_loss
from utils.folder_artifacts import FolderArtifact
from utils.hub import push_folder, require_hub_access
from utils.kept_model import open_model
from utils.learning_rate_search import search_learning_rate
from utils.locks import locked
from utils.model_fingerprints import content_fingerprint
from utils.models import save_model
from utils.performance_functions.hh import tokenize_dialogues
from utils.processes import first_process_only
from utils.registry import ModelArtifacts
from utils.repair_record import RepairRecord
from utils.repair_sources import choose_sources
from utils.repairs import RepairChoice
from utils.reporting.cards import change_in_words
from utils.reporting.sweeps import earlier_rates, sweep_row, write_sweep
from utils.results import Metric, Result
from utils.settings import (
    TASK_NAMES,
    Choices,
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
    tasks_of,
)
from utils.spreading import SPREAD
from utils.tensors import Shapes, require_finite
from utils.tracker import Tracker, tracking
from utils.transformer_blocks import traced_linear_names

if TYPE_CHECKING:
    from utils.influence.traced_model import Gradients

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # as in steps 1 and 4, whose folders carry it; of the validation dialogues
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

TASK_NAME: RepairTask = "all"  # "bias", "ethics", "truth", "combined" (their weighted sum), "all" (the three in turn)
SCORES_TYPE: ScoresType = "pure_ekfac"  # as in step 4, whose docstring lists them
BOTTOM_K: PositiveInt = 20  # as in step 4
TOP_K: PositiveInt | None = None  # as in step 4
IF_WEIGHT: NonNegativeFloat = 10.0  # as in step 4
HARMFUL_TOKENS_ONLY: bool = False  # as in step 4
PRESERVE_PERPLEXITY: bool = False  # as in step 4
PRESERVE_TASKS: bool = False  # as in step 4
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # as in step 4
LEARNING_RATE: Literal["auto"] | NonNegativeFloat | Choices[NonNegativeFloat] = 0.05  # a number, a list (sweep), "auto"
NUM_STEPS: PositiveInt = 1  # parts of the way from one gradient to the next; more than 1 goes beyond the paper
PPL_BUDGET: PositiveFloat = 0.01  # for "auto": perplexity that a repair may cost, as a fraction
NUM_VALIDATION_EXAMPLES: PositiveInt = 500  # for "auto": training dialogues that the cost is measured on, at most
NUM_VALIDATION_PAIRS: PositiveInt = 1000  # for "auto": training pairs of a task that the gain is measured on, at most
SAVE_TO_DISK: bool = True  # True writes the repaired checkpoint; False measures it only
PUSH_TO_HUB: bool = False  # True uploads it; needs SAVE_TO_DISK, HUB_USERNAME and HUB_TOKEN in .env
HUB_USERNAME: str | None = None  # owner of the hub repository
COMPUTE_ANTHROPIC_EVAL: bool = True  # True measures HH perplexity before and after
COMPUTE_TASK_EVAL: bool = True  # True measures bias, ethics and truth before and after
NUM_COMPLETIONS: NonNegativeInt = 0  # prompts of the repaired tasks whose greedy completions are kept in results/
TRACKER: TrackerName | None = None  # also send the results to an experiment tracker: "trackio", "wandb"
# -----------------------------------------------------------------------------------------------------------


# -- theta + lr G ------------------------------------------------------------------------------------------------------


def ascend(model: nn.Module, gradients: Gradients, learning_rate: float, originals: Gradients) -> None:
    """theta <- theta + learning_rate * G, in place, from the original weights.

    One gradient step that approximates the proximal Bregman response function (Bae et al. 2022), as in the paper.

    Args:
        gradients: (1, out, in), or (1, out, in + 1) with the bias last, by dotted module name.
        originals: theta before any update, from `original_weights`.
    """
    with torch.no_grad():
        for name, gradient in gradients.items():
            module = model.get_submodule(name)
            step = gradient.squeeze(0).to(module.weight.device)  # (out, in) or (out, in + 1)
            weight_step = step[:, : module.in_features]
            module.weight.copy_(torch.add(originals[f"{name}.weight"], weight_step, alpha=learning_rate))
            if module.bias is not None:
                module.bias.copy_(torch.add(originals[f"{name}.bias"], step[:, -1], alpha=learning_rate))


def gradient_shapes(model: nn.Module, family: str, num_blocks: int) -> Shapes:
    """(1, out, in), or (1, out, in + 1) with the bias last, for every Linear that step 4 traces."""
    linears = {name: model.get_submodule(name) for name in traced_linear_names(model, family, num_blocks)}
    return {
        name: (1, linear.out_features, linear.in_features + (linear.bias is not None))
        for name, linear in linears.items()
    }


def original_weights(model: nn.Module, gradients: Gradients) -> Gradients:
    """Copies of the weights and biases that the gradients belong to."""
    return {
        f"{name}.{parameter_name}": parameter.detach().clone()
        for name in gradients
        for parameter_name, parameter in model.get_submodule(name).named_parameters()
    }


class SteppableModel:
    """The POST-SFT model, loaded on first use, at any step along any repair's gradient.

    Args:
        num_blocks: last blocks that any of the steps changes; everything below them runs once for each data set.
    """

    def __init__(self, settings: Settings, num_blocks: int) -> None:
        self.settings, self.num_blocks = settings, num_blocks
        self._repair: RepairRecord | None = None
        self._learning_rate = 0.0
        self._gradients: Gradients = {}
        self._originals: Gradients = {}
        self._gradient_here: Callable[[], Gradients] | None = None

    @cached_property
    def loaded(self) -> EvaluationModel:
        """The model, ready to be measured."""
        device = resolve_device(self.settings.DEVICE)
        return EvaluationModel(*open_model(self.settings, self.settings.MODEL_NAME, device, self.num_blocks))

    def at(self, repair: RepairRecord, learning_rate: float) -> EvaluationModel:
        """The model updated at a learning rate; 0 gives the POST-SFT model."""
        model = self.loaded.model
        if repair is not self._repair:
            ascend(model, self._gradients, 0.0, self._originals)  # undoes the last repair
            shapes = gradient_shapes(model, self.settings.MODEL_FAMILY, repair.num_blocks)
            self._repair, self._gradients = repair, repair.load_gradients(shapes)
            self._originals, self._learning_rate = original_weights(model, self._gradients), 0.0
            self._gradient_here = None
        if learning_rate != self._learning_rate:
            self._go(repair, learning_rate)
            self._learning_rate = learning_rate
        return self.loaded

    def _go(self, repair: RepairRecord, learning_rate: float) -> None:
        """Go NUM_STEPS equal parts of the way, each along the gradient of where it starts."""
        num_steps = RepairChoice.of(repair.artifacts.settings).num_steps if learning_rate else 1
        ascend(self.loaded.model, self._gradients, learning_rate / num_steps, self._originals)
        for _ in range(num_steps - 1):
            if self._gradient_here is None:
                self._gradient_here = gradient_function(repair, self.loaded)
            here = original_weights(self.loaded.model, self._gradients)
            ascend(self.loaded.model, self._gradient_here(), learning_rate / num_steps, here)


def gradient_function(repair: RepairRecord, evaluated: EvaluationModel) -> Callable[[], Gradients]:
    """Computes step 4's gradient of a repair at the weights that the model has by then.

    Raises:
        UserError: what step 4 chose the dialogues by has changed since, or is missing.
    """
    from tasks import BackwardTask  # these bring kronfluence, which a single step does without
    from utils.influence.repair_gradient import preconditioner_for, repair_gradient
    from utils.influence.traced_model import trace_model

    unset = {"DAMPING_FACTOR": None, "TOKENS_PER_BATCH": "auto"}  # "ga" has no damping
    artifacts = repair.artifacts.with_constants({**unset, **repair.gradient["settings"]})
    sources = choose_sources(artifacts, repair.task, retained=repair.gradient["retained"])
    repair.require_sources(sources.fingerprints)
    traced = trace_model(artifacts.settings, evaluated.model, evaluated.tokenizer, evaluated.trunk)
    examples = tokenize_dialogues(artifacts.dialogues, traced.tokenizer)
    task = BackwardTask(list(traced.linears))
    precondition = preconditioner_for(RepairChoice.of(artifacts.settings).method, artifacts.factors(), traced)
    return lambda: repair_gradient(traced, task, examples, sources, precondition)[0]


# -- the step ----------------------------------------------------------------------------------------------------------

RECORDS = ("manifest.json", "repair.json", "README.md")  # what lies beside the model in a checkpoint
LONGEST_RATE = 1.23457e-05  # as in a name
SPREAD_SAVING = {"max_shard_size": "5GB"}  # the weights of a spread model pass through CPU memory a file at a time


def save_checkpoint(repair: RepairRecord, learning_rate: float, model: SteppableModel, is_measured: bool) -> None:
    """Write the repaired checkpoint.

    Args:
        is_measured: its loss is known to be finite; otherwise that of one dialogue is tried first.

    Raises:
        UserError: its weights or its loss are not finite; then nothing is written.
    """
    checkpoint = repair.checkpoint(learning_rate)
    stepped = model.at(repair, learning_rate)
    # What is spread to CPU memory or disk (here on the meta device) does not change.
    weights = {name: weight for name, weight in stepped.model.named_parameters() if not weight.is_meta}
    require_finite(weights, f"LEARNING_RATE = {learning_rate:g}")
    if not is_measured:
        require_finite_loss(checkpoint.path.name, "anthropic", stepped.measure("anthropic", repair.probe, quiet=True))

    @first_process_only
    def save() -> None:
        started = time.monotonic()
        with checkpoint.staging_folder() as folder:
            keywords = SPREAD_SAVING if model.settings.DEVICE == SPREAD else {}
            save_model(stepped.model, model.settings.MODEL_NAME, folder, **keywords)
            checkpoint.publish_folder(started, repair.gradient["shapes"], content=content_fingerprint(folder))

    save()


def measure(
    repair: RepairRecord, learning_rate: float, model: SteppableModel, evaluator: Evaluator, metrics: list[Metric]
) -> tuple[dict[Metric, Result], dict[Metric, Result]]:
    """Results of the POST-SFT and of the repaired model by metric; stored results are read.

    Raises:
        UserError: a loss is not finite.
    """
    artifacts, checkpoint = repair.artifacts, repair.checkpoint(learning_rate)

    def results(name: str, fingerprint: str, rate: float) -> dict[Metric, Result]:
        at_rate = partial(model.at, repair, rate)
        return {metric: evaluator.result(metric, name, fingerprint, at_rate) for metric in metrics}

    after = results(checkpoint.path.name, checkpoint.fingerprint, learning_rate)  # first: it may turn out broken
    return results(artifacts.name, artifacts.fingerprint, 0.0), after


def say_report(report: dict[str, Any], search: dict[str, Any] | None, budget: float, is_sweep: bool) -> None:
    """One line for each measurement, and one if a step by itself costs more test perplexity than the budget."""
    measured = report["measurements"]
    for metric, row in measured.items():
        say(f"   {metric}: {row['before']:.4f} -> {row['after']:.4f}, {change_in_words(metric, row)}")
    if "perplexity" not in measured or measured["perplexity"]["change_percent"] <= 100 * budget:
        return
    if search:
        say(
            f"   PPL_BUDGET = {budget:g} was kept on {search['validation_dialogues']} training dialogues: the test "
            "dialogues cost more; for less give a smaller one"
        )
    elif not is_sweep:
        say(
            f"   this costs more perplexity than PPL_BUDGET = {budget:g}; --LEARNING_RATE auto looks for a step within "
            "it, on training dialogues"
        )


def repair_task(
    repair: RepairRecord, model: SteppableModel, evaluator: Evaluator, metrics: list[Metric], tracker: Tracker
) -> list[FolderArtifact]:
    """Repair for one task at every learning rate; gives the repaired checkpoints."""
    settings, task, rates, search = model.settings, repair.task, model.settings.LEARNING_RATE, None
    inputs = repair.inputs | {metric: evaluator.data(metric).fingerprint for metric in metrics}
    sweep = (settings.OUTPUT_DIR, repair.artifacts.name, task, repair.artifacts.repair_name, inputs)
    if isinstance(rates, list):
        earlier_rates(*sweep, settings.OVERWRITE)  # a sweep of other inputs is refused before the work
    if rates == "auto":
        banner("step 5: learning rate", f"{task}, {settings.SCORES_TYPE}, {settings.MODEL_NAME}")
        search = search_learning_rate(repair.artifacts, task, repair.gradient, partial(model.at, repair))
        rates = search["learning_rate"]
    reports = []
    for rate in rates if isinstance(rates, list) else [rates]:
        banner("step 5: repair", f"{task}, {settings.SCORES_TYPE}, learning rate {rate:g}, {settings.MODEL_NAME}")
        checkpoint = repair.checkpoint(rate)
        report_file = paths.report_file(settings.OUTPUT_DIR, checkpoint.path.name)
        with locked(report_file, *([checkpoint.path] if settings.SAVE_TO_DISK else [])):
            is_saved = not settings.SAVE_TO_DISK or checkpoint.is_finished(settings.OVERWRITE)
            report = repair.report(rate, *measure(repair, rate, model, evaluator, metrics), search)
            if not is_saved:
                save_checkpoint(repair, rate, model, is_measured=bool(metrics))
            repair.write(report)
            if settings.NUM_COMPLETIONS:
                write_completions(repair, rate, partial(model.at, repair), evaluator)
        say_report(report, search, settings.PPL_BUDGET, isinstance(rates, list))
        tracker.log({f"{task}/{name}": value for name, value in sweep_row(report).items() if value is not None})
        reports.append(report)
    if isinstance(rates, list):
        write_sweep(*sweep, settings.OVERWRITE, reports, 100 * settings.PPL_BUDGET)
    return [repair.checkpoint(report["learning_rate"]) for report in reports]


def checkpoint_names(settings: Settings) -> list[str]:
    """The names of the checkpoints to come; a rate that is yet to be searched for stands there at its longest."""
    rates = LONGEST_RATE if settings.LEARNING_RATE == "auto" else settings.LEARNING_RATE
    model = paths.model_short_name(settings.MODEL_NAME)
    repair = RepairChoice.of(settings).name
    return [
        paths.repaired_model_dir(settings.OUTPUT_DIR, task, model, repair, rate).name
        for task in tasks_of(settings.TASK_NAME)
        for rate in (rates if isinstance(rates, list) else [rates])
    ]


def main(settings: Settings) -> None:
    """Repair for every task, and upload the checkpoints if asked to."""
    access = require_hub_access(settings, checkpoint_names(settings)) if settings.PUSH_TO_HUB else None
    artifacts = ModelArtifacts(settings, settings.MODEL_NAME)
    for task in tasks_of(settings.TASK_NAME):
        RepairChoice.of(settings).require_consistent(task)
    repairs = [RepairRecord(artifacts, task) for task in tasks_of(settings.TASK_NAME)]
    model = SteppableModel(settings, max(repair.num_blocks for repair in repairs))
    evaluator = Evaluator(settings, "test")
    metrics: list[Metric] = ["anthropic"] if settings.COMPUTE_ANTHROPIC_EVAL else []
    metrics += TASK_NAMES if settings.COMPUTE_TASK_EVAL else ()
    for metric in metrics:
        evaluator.data(metric)  # a missing file is found before the repair, not after it
    with tracking(settings.TRACKER, settings.MODEL_NAME, vars(settings)) as tracker:
        for repair in repairs:
            checkpoints = repair_task(repair, model, evaluator, metrics, tracker)
            if access:
                for checkpoint in checkpoints:
                    with locked(checkpoint.path):
                        files = [*checkpoint.require()["files"], *RECORDS]
                        push_folder(checkpoint.path, files, settings.HUB_USERNAME, access)


def tables_command(settings: Settings) -> str:
    """The command that compares ways of choosing on this model: the tables' six, or the default with this one."""
    names = ("MODEL_NAME", "MODEL_FAMILY", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR", "DEVICE", "TRUST_REMOTE_CODE")
    own = ("BOTTOM_K", "IF_WEIGHT", "PRESERVE_PERPLEXITY", "PRESERVE_TASKS", "HARMFUL_TOKENS_ONLY", "NUM_STEPS")
    same = {name: [getattr(settings, name)] for name in own}
    same |= {"TOP_K": settings.TOP_K, "SEEDS": [settings.SEED], "SWEPT_RATES": None}
    if settings.SCORES_TYPE != "pure_ekfac":
        same["SCORES_TYPES"] = ["pure_ekfac", settings.SCORES_TYPE]
    if settings.TASK_NAME != "all":
        same["TASKS"] = [settings.TASK_NAME]
    command = next_command(paths.PAPER_TABLES, Settings(**settings.pick(*names)), **same)
    report = paths.html_report(settings.OUTPUT_DIR)
    return command + f"\n      (replaces the main table and {shown_path(report)}, of an earlier grid)" * report.exists()


if __name__ == "__main__":
    run_step(main, hint=tables_command)
