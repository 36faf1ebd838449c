"""Fine-tuning a model again on some of its training dialogues, and measuring what comes out."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from tqdm import tqdm
from transformers import set_seed

from utils import paths
from utils.base_models import base_fingerprints, start_model
from utils.batching import LabelledSequence
from utils.console import UserError, progress_bar, say
from utils.evaluation import Data, EvaluationModel, require_finite_loss
from utils.files import fingerprint_of, remove
from utils.fine_tuning import (
    fine_tune,
    last_checkpoint,
    micro_batch_size,
    num_steps,
    set_checkpoints_aside,
    training_device,
)
from utils.folder_artifacts import FolderArtifact
from utils.intervals import estimate_mean
from utils.locks import locked, locked_if_free
from utils.manifests import MANIFEST_NAME, differing_values
from utils.models import silence_transformers
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.processes import first_process_only, launched
from utils.registry import ModelArtifacts, sft_model
from utils.results import Metric, quantities
from utils.settings import Settings

RECIPE = ("NUM_EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "BASE_SEED")
Split = Literal["train", "test"]
Measured = dict[str, float]  # "bias_test" and the like -> loss in nats per token


@dataclass(frozen=True)
class Retraining:
    """A fine-tuning on some of the training dialogues.

    Attributes:
        name: of its folder.
        rows: of the training dialogues that it keeps, in dataset order.
        seed: of their order in the training.
    """

    name: str
    rows: list[int]
    seed: int


class Retrainer:
    """Fine-tunes the base again, by the recipe of the POST-SFT model, and measures the result on both splits.

    Args:
        settings: of evaluation_scripts/validate_scores.py.
        artifacts: of the POST-SFT model.

    Raises:
        UserError: the recipe is not that of the POST-SFT model.
    """

    def __init__(self, settings: Settings, artifacts: ModelArtifacts) -> None:
        self.settings, self.artifacts = settings, artifacts
        micro_batch_size(settings, launched())  # refuses a wrong BATCH_SIZE before anything is computed
        require_recipe(settings, artifacts)
        silence_transformers()
        self.device = training_device(settings.DEVICE)
        data_dir = paths.resolve_path(settings.DATA_DIR)
        self.data: dict[tuple[Metric, Split], Data] = {
            ("anthropic", "test"): load_dialogues(settings.HH_DATASET, "test")
        }
        for task, measurement in MEASUREMENTS.items():
            for split in ("train", "test"):
                self.data[task, split] = measurement.load_pairs(data_dir, split)
        self.inputs = {**base_fingerprints(settings), "dataset": artifacts.dialogues.fingerprint}
        self.inputs["measured"] = fingerprint_of([data.fingerprint for data in self.data.values()])

    @cached_property
    def _base(self) -> EvaluationModel:
        """The base with its tokenizer, made or loaded when the first retraining needs it."""
        set_seed(self.settings.BASE_SEED)
        return EvaluationModel(*start_model(self.settings, torch.device("cpu")))

    @cached_property
    def _examples(self) -> list[LabelledSequence]:
        return tokenize_dialogues(self.artifacts.dialogues, self._base.tokenizer)

    def artifact(self, retraining: Retraining) -> FolderArtifact:
        """Where a retraining's measurements are kept."""
        constants = {**self.settings.pick(*RECIPE), "seed": retraining.seed, "rows": fingerprint_of(retraining.rows)}
        return self.artifacts.retraining(retraining.name, constants, self.inputs)

    def run_all(self, retrainings: Sequence[Retraining]) -> dict[str, Measured]:
        """What every retraining measured, by name. Those that other runs are at come last."""
        steps = {one.name: num_steps(self.settings, len(one.rows)) for one in retrainings}
        measured: dict[str, Measured] = {}
        with progress_bar(sum(steps.values()), "retrainings", "steps") as bar:
            waiting = list(retrainings)
            while waiting:
                left = []
                for position, one in enumerate(waiting):
                    is_last_chance = len(left) == position and position == len(waiting) - 1
                    before = bar.n
                    found = self.run(one, bar, waits=is_last_chance)
                    if found is None:
                        left.append(one)
                        continue
                    measured[one.name] = found
                    bar.update(before + steps[one.name] - bar.n)
                waiting = left
        return measured

    def run(self, retraining: Retraining, bar: tqdm, waits: bool) -> Measured | None:
        """What one retraining measured; None where another run is at it and this one does not wait."""
        output = self.artifact(retraining)
        if waits:
            with locked(output.path):
                return self._finished(retraining, output, bar)
        with locked_if_free(output.path) as is_ours:
            return self._finished(retraining, output, bar) if is_ours else None

    def _finished(self, retraining: Retraining, output: FolderArtifact, bar: tqdm) -> Measured:
        if not output.is_finished(self.settings.OVERWRITE):
            self._retrain(retraining, output, bar)
        return output.require()["measured"]

    def _retrain(self, retraining: Retraining, output: FolderArtifact, bar: tqdm) -> None:
        started = time.monotonic()
        base = self._base
        model = copy.deepcopy(base.model).to(self.device)
        recipe = Settings(**{**vars(self.settings), "SEED": retraining.seed})
        examples = [self._examples[row] for row in retraining.rows]
        with output.staging_folder() as folder:
            fine_tune(model, base.tokenizer, examples, recipe, folder, last_checkpoint(folder), bar)
            try:
                measured = self._measure(retraining, base.like(model))
            except UserError:
                first_process_only(remove)(folder)  # nothing there is worth resuming from
                raise
            set_checkpoints_aside(folder)
            output.publish_folder(started, {}, measured=measured, rows=retraining.rows)

    def _measure(self, retraining: Retraining, model: EvaluationModel) -> Measured:
        """The loss of every measurement, in nats per token.

        Raises:
            UserError: one is not finite.
        """
        measured = {}
        for (metric, split), data in self.data.items():
            losses = model.measure(metric, data, quiet=True)
            require_finite_loss(retraining.name, metric, losses)
            measured[f"{metric}_{split}"] = estimate_mean(quantities(losses)["loss"]).value
        return measured


def require_recipe(settings: Settings, artifacts: ModelArtifacts) -> None:
    """Check that a model that data/make_sft_model.py made is fine-tuned again as it was then.

    Raises:
        UserError: names the constants that differ, or says that the dialogues do.
    """
    folder = paths.resolve_path(artifacts.model)
    if not (folder / MANIFEST_NAME).is_file():
        say(f"   {artifacts.model} has no record of how it was fine-tuned: the recipe's constants are taken as given")
        return
    made = FolderArtifact(folder, paths.STEP_0).require()
    if made["made_by"] != paths.STEP_0:
        raise UserError(
            f"MODEL_NAME = {artifacts.model!r} was made by {made['made_by']}, and only a fine-tuning can be repeated; "
            f"give a model of {paths.STEP_0}, or one from elsewhere with its recipe"
        )
    recipe = sft_model(
        Settings(**{**vars(settings), "SEED": settings.BASE_SEED, "SFT_MODEL_DIR": artifacts.model}),
        **base_fingerprints(settings),
        dataset=artifacts.dialogues.fingerprint,
    )
    differences = differing_values(made["settings"], recipe.settings)
    differences += differing_values(made["inputs"], recipe.inputs)
    if differences:
        raise UserError(
            f"MODEL_NAME = {artifacts.model!r} was fine-tuned with other settings: {'; '.join(differences)}; make the "
            "constants (BASE_SEED is SEED there) and HH_DATASET agree"
        )
