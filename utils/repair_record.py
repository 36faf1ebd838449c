"""The record of a repair: the gradient it steps along, where its checkpoint goes, and what is written about it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import UserError, say, shown_path
from utils.files import fingerprint_of_text, read_json, to_json, write_if_changed
from utils.folder_artifacts import FolderArtifact
from utils.manifests import MANIFEST_NAME, differing_values
from utils.models import locate
from utils.paths import STEP_4, STEP_5, public_name
from utils.performance_functions.hh import Dialogues
from utils.processes import first_process_only
from utils.registry import ModelArtifacts
from utils.repairs import RepairChoice
from utils.reporting.cards import repair_card
from utils.results import Metric, Result, compare
from utils.settings import TASK_NAMES
from utils.tensors import Shapes

if TYPE_CHECKING:
    import torch


class RepairRecord:
    """One repair of a model, at any learning rate.

    Attributes:
        artifacts: of the POST-SFT model.
        task: what the model is repaired for.
        gradient: manifest of step 4's gradient.
    """

    def __init__(self, artifacts: ModelArtifacts, task: str) -> None:
        """Find the gradient.

        Raises:
            UserError: it is missing, or was made from another model, other dialogues or with other settings.
        """
        self.artifacts, self.task = artifacts, task
        self._gradients = artifacts.gradients(task, dataset=artifacts.dialogues.fingerprint)  # its rows are of these
        self.gradient = self._gradients.require()
        self._require_facts()

    def _require_facts(self) -> None:
        """Check what the gradient's manifest says beyond its settings and inputs.

        Raises:
            UserError: its blocks, dialogues or seconds are not what step 4 writes.
        """
        total, facts = len(self.artifacts.dialogues), self.gradient
        rows = [facts.get(name) for name in ("indices", "helpful", "retained")]
        num_blocks, seconds = facts["settings"].get("NUM_BLOCKS"), facts.get("seconds")
        are_rows = all(
            isinstance(some, list) and all(type(row) is int and 0 <= row < total for row in some) for some in rows
        )
        is_count = type(num_blocks) is int and num_blocks > 0
        if not (are_rows and is_count and isinstance(seconds, (int, float)) and isinstance(facts.get("shapes"), dict)):
            path = shown_path(self._gradients.manifest_path)
            raise UserError(f"{path} does not say what step 4 writes; {self._gradients.remedy}")

    def require_sources(self, fingerprints: dict[str, str]) -> None:
        """Check that the gradient would be computed from the same dialogues and pairs today.

        Raises:
            UserError: scores, a subset or pairs have been made anew since.
        """
        differences = differing_values({name: self.gradient["inputs"].get(name) for name in fingerprints}, fingerprints)
        if differences:
            raise UserError(
                f"{shown_path(self._gradients.path)} was made from other dialogues, scores or pairs than are there now "
                f"({'; '.join(differences)}), and NUM_STEPS > 1 takes the gradient again; run {STEP_4} with "
                "OVERWRITE = True"
            )

    def load_gradients(self, shapes: Shapes) -> dict[str, torch.Tensor]:
        """G by dotted module name.

        Args:
            shapes: of the gradient of every traced Linear.
        """
        return self._gradients.load_tensors(shapes, fingerprint=self.gradient["fingerprint"])

    @property
    def num_blocks(self) -> int:
        """Number of last transformer blocks that the repair changes."""
        return self.gradient["settings"]["NUM_BLOCKS"]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the model and the gradient."""
        return {"model": self.artifacts.fingerprint, "gradient": self.gradient["fingerprint"]}

    @property
    def probe(self) -> Dialogues:
        """One training dialogue, with the shortest prompt of those that have an answer, if there are any."""
        dialogues = self.artifacts.dialogues
        answered = [row for row in range(len(dialogues)) if dialogues.completions[row].strip()] or [0]
        return dialogues.at([min(answered, key=lambda row: len(dialogues.prompts[row]))])

    def checkpoint(self, learning_rate: float) -> FolderArtifact:
        """The artifact that holds the repaired model."""
        return self.artifacts.checkpoint(self.task, learning_rate, self.gradient["fingerprint"])

    def report(
        self,
        learning_rate: float,
        before: dict[Metric, Result],
        after: dict[Metric, Result],
        search: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """How the repair was made, and each measurement before and after.

        Args:
            before: results of the POST-SFT model, by metric.
            after: results of the repaired model.
            search: how the learning rate was found, if it was searched for.
        """
        settings, choice, measurements = self.artifacts.settings, RepairChoice.of(self.artifacts.settings), {}
        for metric, result in before.items():
            measurements |= compare(metric, result.losses, after[metric].losses)
        return {
            "model": public_name(settings.MODEL_NAME),
            "task": self.task,
            "scores_type": choice.scores_type,
            "if_weight": choice.if_weight if choice.method.subset == "diverse" else None,
            "bottom_k": len(self.gradient["indices"]),
            "top_k": len(self.gradient["helpful"]),
            "preserve_perplexity": choice.preserve_perplexity,
            "preserve_tasks": choice.preserve_tasks,
            "harmful_tokens_only": choice.harmful_tokens_only,
            "num_steps": choice.num_steps,
            "learning_rate": learning_rate,
            "num_blocks": self.num_blocks,
            "seconds": self.gradient["seconds"] + (search["seconds"] if search else 0),
            "indices": self.gradient["indices"],
            "search": search,
            "dataset": public_name(settings.HH_DATASET),
            "settings": self.gradient["settings"],
            "split_rules": {
                metric: result.numbers["split_rule"] for metric, result in before.items() if metric != "anthropic"
            },
            "measurements": measurements,
        }

    @first_process_only
    def write(self, report: dict[str, Any]) -> None:
        """Write the report to results/, and with the model card into the checkpoint if that was saved."""
        started = time.monotonic()
        checkpoint = self.checkpoint(report["learning_rate"])
        output = self.artifacts.report(checkpoint, fingerprint_of_text(to_json(report)))
        if not output.is_finished(overwrite=True):
            output.save_json(report, started)
        if self.artifacts.settings.SAVE_TO_DISK:
            write_if_changed(checkpoint.path / "repair.json", to_json(report))
            write_if_changed(checkpoint.path / "README.md", repair_card(report))
            say(f"   repaired model: {shown_path(checkpoint.path)}")


def repaired_task(repaired: str, model: str, fingerprint: str) -> str:
    """The task that a checkpoint in REPAIRED_MODEL_NAMES was repaired for, by its repair.json.

    Args:
        model, fingerprint: of the POST-SFT model, MODEL_NAME.

    Raises:
        UserError: it has no such file, or was repaired from another model.
    """
    where, folder = f"REPAIRED_MODEL_NAMES has {repaired}", Path(locate(repaired))
    needed = f"allowed are folders that {STEP_5} made from MODEL_NAME = {model!r}; run it first"
    if not (folder / "repair.json").is_file():
        raise UserError(f"{where}, which has no repair.json; {needed}")
    report = read_json(folder / "repair.json", needed)
    task, repaired_from = (report.get(name) if isinstance(report, dict) else None for name in ("task", "model"))
    if task not in (*TASK_NAMES, "combined"):
        raise UserError(f"{where}, whose repair.json has the task {task!r}; {needed}")
    if (folder / MANIFEST_NAME).is_file():  # the same model may have several names, or have been made anew since
        FolderArtifact(folder, STEP_5, inputs={"model": fingerprint}).require()
    elif repaired_from != public_name(model):
        raise UserError(f"{where}, which was repaired from {repaired_from!r} by its repair.json; {needed}")
    return task
