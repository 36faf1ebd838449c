"""Step 5: repair the model, save it, and measure what the repair did and what it cost.

    python gradient_ascent_and_save.py
    python gradient_ascent_and_save.py --SCORES_TYPE dpp --LEARNING_RATE 0.003 0.006 0.012

    theta <- theta + LEARNING_RATE * G

Reads the model and the repair gradient of step 4. Writes a complete Hugging Face checkpoint with repair.json and a
model card, and the test-split measurements before and after to results/.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import paths
from utils.artifacts import Artifact, require_finite, to_json, write_atomically
from utils.console import banner, say, shown_path
from utils.hub import push_folder, require_hub_access
from utils.models import (
    copy_tokenizer,
    find_family,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_device,
)
from utils.performance_functions.evaluation import MEASUREMENTS, Evaluator
from utils.pipeline import STEP_5, gradients_artifact, scored_tasks, tasks_of
from utils.repair import ascend, model_card, original_weights, repair_report
from utils.settings import (
    Family,
    NonNegativeFloat,
    PositiveInt,
    RepairTask,
    ScoresType,
    Seed,
    Settings,
    run_step,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # as in steps 1 and 4, whose folders carry it
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASK_NAME: RepairTask = "all"  # as in step 4
SCORES_TYPE: ScoresType = "pure_ekfac"  # as in step 4
BOTTOM_K: PositiveInt = 20  # as in step 4
IF_WEIGHT: NonNegativeFloat = 10.0  # as in step 4
LEARNING_RATE: NonNegativeFloat | list[NonNegativeFloat] = 0.05  # step size; a list sweeps; try 0.012 on real models
SAVE_TO_DISK: bool = True  # write the repaired checkpoint
PUSH_TO_HUB: bool = False  # upload it; needs SAVE_TO_DISK, HUB_USERNAME and HUB_TOKEN in .env
HUB_USERNAME: str | None = None  # owner of the hub repository
COMPUTE_ANTHROPIC_EVAL: bool = True  # measure HH perplexity before and after
COMPUTE_TASK_EVAL: bool = True  # measure the repaired task's loss before and after
# -----------------------------------------------------------------------------------------------------------


class Repair:
    """One model and one gradient, repaired at each learning rate in turn; loads only when there is work."""

    def __init__(self, settings: Settings, task: str) -> None:
        self.settings, self.task = settings, task
        self.name = paths.model_short_name(settings.MODEL_NAME)
        self.fingerprint = model_fingerprint(settings.MODEL_NAME)
        self.gradients = gradients_artifact(settings, self.name, task, {}, {"model": self.fingerprint})
        self.gradients_manifest = self.gradients.require()
        self.metrics = ["anthropic"] if settings.COMPUTE_ANTHROPIC_EVAL else []
        self.metrics += scored_tasks(task) if settings.COMPUTE_TASK_EVAL else []
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    def model_at(self, learning_rate: float) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, updated at this learning rate (0 gives the POST-SFT model), and its tokenizer."""
        if self._loaded is None:
            model_name, device = self.settings.MODEL_NAME, resolve_device(self.settings.DEVICE)
            self._loaded = load_model(model_name, device), load_tokenizer(model_name)
            self._steps = self.gradients.load_tensors()
            self._originals = original_weights(self._loaded[0], self._steps)
        ascend(self._loaded[0], self._steps, learning_rate, self._originals)
        return self._loaded

    def checkpoint(self, learning_rate: float) -> Artifact:
        """The artefact that holds the repaired model."""
        s = self.settings
        path = paths.repaired_model_dir(
            s.OUTPUT_DIR, self.task, self.name, s.SCORES_TYPE, s.BOTTOM_K, s.IF_WEIGHT, learning_rate
        )
        inputs = {"model": self.fingerprint, "gradient": self.gradients_manifest["fingerprint"]}
        return Artifact(path, STEP_5, {"LEARNING_RATE": learning_rate}, inputs, is_folder=True)

    def save(self, checkpoint: Artifact, learning_rate: float) -> None:
        """Write the repaired checkpoint, unless it is there."""
        if checkpoint.is_finished(self.settings.OVERWRITE):
            return
        started = time.monotonic()
        model, _ = self.model_at(learning_rate)
        require_finite(dict(model.named_parameters()), f"LEARNING_RATE = {learning_rate:g}")
        with checkpoint.growing_folder() as folder:
            model.save_pretrained(folder)
            copy_tokenizer(self.settings.MODEL_NAME, folder)
            checkpoint.publish_folder(started, {name: list(step.shape) for name, step in self._steps.items()})

    def report(self, checkpoint: Artifact, learning_rate: float, evaluator: Evaluator) -> dict[str, Any]:
        """Measure before and after on the test split; results that are there are read."""
        is_saved = self.settings.SAVE_TO_DISK or checkpoint.is_finished(overwrite=True)
        after_fingerprint = model_fingerprint(str(checkpoint.path)) if is_saved else checkpoint.fingerprint
        before, after = {}, {}
        for metric in self.metrics:
            before[metric] = evaluator.result(metric, self.name, self.fingerprint, lambda: self.model_at(0.0))
            after[metric] = evaluator.result(
                metric,
                checkpoint.path.name,
                after_fingerprint,
                lambda: self.model_at(learning_rate),
                recipe=checkpoint.fingerprint,
            )
        recipe = {
            "model": self.settings.MODEL_NAME,
            "task": self.task,
            "scores_type": self.settings.SCORES_TYPE,
            "if_weight": self.settings.IF_WEIGHT if self.settings.SCORES_TYPE == "dpp" else None,
            "bottom_k": self.settings.BOTTOM_K,
            "learning_rate": learning_rate,
            "num_blocks": self.gradients_manifest["settings"]["NUM_BLOCKS"],
            "indices": self.gradients_manifest["indices"],
        }
        return repair_report(recipe, before, after)


def say_report(report: dict[str, Any]) -> None:
    """One line for each measurement."""
    for metric, row in report["measurements"].items():
        percent = row.get("improvement_percent", row.get("change_percent"))
        word = "change" if metric == "perplexity" else "improvement"
        say(f"   {metric}: {row['before']:.4f} -> {row['after']:.4f}, {word} {percent:+.2f} %")


def write_if_changed(path: paths.Path, text: str) -> None:
    """Leave a file that already says this untouched."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def main(settings: Settings) -> None:
    """Repair for every task at every learning rate."""
    find_family(load_config(settings.MODEL_NAME), settings.MODEL_FAMILY)
    access = require_hub_access(settings) if settings.PUSH_TO_HUB else None
    rates = settings.LEARNING_RATE if isinstance(settings.LEARNING_RATE, list) else [settings.LEARNING_RATE]
    evaluator = Evaluator(settings, "test")
    for task in tasks_of(settings.TASK_NAME):
        repair = Repair(settings, task)
        for metric in repair.metrics:
            evaluator.data(metric)  # a missing file is found before the repair, not after it
        for learning_rate in rates:
            banner(
                "step 5: repair",
                f"{task}, {settings.SCORES_TYPE}, learning rate {learning_rate:g}, {settings.MODEL_NAME}",
            )
            checkpoint = repair.checkpoint(learning_rate)
            if settings.SAVE_TO_DISK:
                repair.save(checkpoint, learning_rate)
            report = repair.report(checkpoint, learning_rate, evaluator)
            say_report(report)
            if settings.SAVE_TO_DISK:
                write_if_changed(checkpoint.path / "repair.json", to_json(report))
                write_if_changed(checkpoint.path / "README.md", model_card(report))
                say(f"   repaired model: {shown_path(checkpoint.path)}")
            if access:
                push_folder(checkpoint.path, settings.HUB_USERNAME, access)
    say(f"next: python evaluation_scripts/bias_loss.py (or {', '.join(MEASUREMENTS)}, anthropic_eval) on any model")


if __name__ == "__main__":
    run_step(main)
