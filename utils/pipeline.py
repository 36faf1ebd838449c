"""What passes between the steps: each artefact with the constants and inputs it depends on, described once.

The writer of an artefact has all of its constants, and they make up its fingerprint. A later step that reads it has
some of them, and refuses it where one of those differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import paths
from utils.artifacts import Artifact
from utils.batching import BatchLoader, LabelledSequence, token_budget
from utils.console import UserError, shown_path
from utils.influence import SCORES_NAME, Curvature
from utils.models import (
    find_family,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    tracked_linear_names,
)
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, load_dialogues
from utils.selection import combined_scores
from utils.settings import Settings
from utils.trunk import KeptStates, Trunk

FACTOR_CONSTANTS = (
    "NUM_BLOCKS",
    "FACTOR_STRATEGY",
    "NUM_FACTOR_EXAMPLES",
    "USE_HALF_PRECISION",
    "FISHER_POSITIONS",
    "SEED",
)


def tasks_of(task_name: str) -> list[str]:
    """The tasks that TASK_NAME stands for; "all" is bias, ethics and truth."""
    return list(MEASUREMENTS) if task_name == "all" else [task_name]


def scored_tasks(task: str) -> list[str]:
    """The tasks whose scores a selection for `task` needs; "combined" needs those of all three."""
    return list(MEASUREMENTS) if task == "combined" else [task]


@dataclass(frozen=True)
class Pipeline:
    """The artefacts of one model and one set of training dialogues.

    Attributes:
        settings: the constants of the step that asks.
        model: hub id or folder.
        dialogues: the training split.
        inputs: fingerprints of the model's weights and of the dialogues.
    """

    settings: Settings
    model: str
    dialogues: Dialogues
    inputs: dict[str, str]

    @classmethod
    def of(cls, settings: Settings, model: str) -> Pipeline:
        """Find the model and load the training dialogues.

        Raises:
            UserError: one of them is missing, or the model is of an unsupported family.
        """
        find_family(load_config(model), settings.MODEL_FAMILY)
        dialogues = load_dialogues(settings.HH_DATASET, "train")
        inputs = {"model": model_fingerprint(model), "dataset": dialogues.fingerprint}
        return cls(settings, model, dialogues, inputs)

    @property
    def name(self) -> str:
        """The model's short name, as in file names."""
        return paths.model_short_name(self.model)

    def _known(self, *constants: str) -> dict[str, Any]:
        """Those of the constants that the asking step has."""
        return self.settings.pick(*(name for name in constants if hasattr(self.settings, name)))

    def _influence_location(self) -> tuple[str, bool, int]:
        return self.settings.FACTOR_STRATEGY, self.settings.USE_HALF_PRECISION, self.settings.SEED

    def factors(self) -> Artifact:
        """Step 1: the curvature factors."""
        path = paths.factors_dir(self.settings.OUTPUT_DIR, self.name, *self._influence_location())
        return Artifact(path, STEP_1, self._known(*FACTOR_CONSTANTS), self.inputs, is_folder=True)

    def scores(self, task: str, **inputs: str) -> Artifact:
        """Step 1: the influence scores of one task. The writer adds the fingerprint of the answer pairs."""
        return self._scored(paths.scores_file, task, inputs)

    def token_scores(self, task: str, **inputs: str) -> Artifact:
        """Step 1, with COMPUTE_PER_TOKEN_SCORES: the same for single tokens."""
        return self._scored(paths.token_scores_file, task, inputs)

    def _scored(self, file: Callable[..., Path], task: str, inputs: dict[str, str]) -> Artifact:
        path = file(self.settings.OUTPUT_DIR, task, self.name, *self._influence_location())
        return Artifact(path, STEP_1, self._known(*FACTOR_CONSTANTS, "DAMPING_FACTOR"), {**self.inputs, **inputs})

    def representations(self) -> Artifact:
        """Step 2: the representations of the training dialogues."""
        path = paths.representations_file(self.settings.OUTPUT_DIR, self.name)
        return Artifact(path, STEP_2, self._known("MAX_LENGTH"), self.inputs)

    def dpp(self, task: str, **inputs: str) -> Artifact:
        """Step 3: the diverse subset. The writer adds the fingerprints of the representations and scores."""
        settings = self.settings
        path = paths.dpp_file(settings.OUTPUT_DIR, task, self.name, settings.BOTTOM_K, settings.IF_WEIGHT)
        constants = self._known("BOTTOM_K", "IF_WEIGHT", "KERNEL", "NUM_FEATURES", "GAMMA", "SEED")
        return Artifact(path, STEP_3, {**constants, **self._weights_of(task)}, {**self.inputs, **inputs})

    def gradients(self, task: str, **inputs: str) -> Artifact:
        """Step 4: the repair gradient. The writer adds the fingerprint of the chosen subset."""
        constants = self._known(
            *FACTOR_CONSTANTS, "DAMPING_FACTOR", "SCORES_TYPE", "BOTTOM_K", "GRADIENT_REDUCTION_TYPE"
        )
        return gradients_artifact(
            self.settings, self.name, task, {**constants, **self._weights_of(task)}, {**self.inputs, **inputs}
        )

    def _weights_of(self, task: str) -> dict[str, Any]:
        return self._known("TASK_WEIGHTS") if task == "combined" else {}

    def ranking_scores(self, task: str) -> tuple[torch.Tensor, dict[str, str]]:
        """The scores by which `task` ranks the dialogues, smallest most harmful.

        Returns:
            (N,) float64 in [0, 1]: the task's scores, min-max normalised, or for "combined" the sum weighted by
            TASK_WEIGHTS; and the fingerprints of the artefacts that they come from.

        Raises:
            UserError: scores are missing, broken, made from something else, or of another length.
        """
        scores, fingerprints = [], {}
        for scored in scored_tasks(task):
            artifact = self.scores(scored)
            scores.append(artifact.load_tensors()[SCORES_NAME].squeeze(0))
            fingerprints[f"scores_{scored}"] = artifact.require()["fingerprint"]
            if len(scores[-1]) != len(self.dialogues):
                raise UserError(
                    f"{shown_path(artifact.path)} has {len(scores[-1])} scores for {len(self.dialogues)} dialogues; "
                    f"delete it and run {STEP_1} again"
                )
        return combined_scores(scores, self._checked_weights() if task == "combined" else [1.0]), fingerprints

    def _checked_weights(self) -> list[float]:
        weights = self.settings.TASK_WEIGHTS
        if len(weights) != len(MEASUREMENTS) or not any(weights):
            raise UserError(
                f"TASK_WEIGHTS = {weights}: allowed are {len(MEASUREMENTS)} numbers, for {', '.join(MEASUREMENTS)}, "
                "not all zero"
            )
        return weights


def gradients_artifact(
    settings: Settings, model_name: str, task: str, constants: dict[str, Any], inputs: dict[str, str]
) -> Artifact:
    """Step 4's artefact, for its writer and for step 5, which needs no training dialogues."""
    path = paths.gradients_file(
        settings.OUTPUT_DIR,
        task,
        model_name,
        settings.SCORES_TYPE,
        settings.BOTTOM_K,
        settings.IF_WEIGHT,
        settings.SEED,
    )
    return Artifact(path, STEP_4, constants, inputs)


@dataclass(frozen=True)
class Traceable:
    """A loaded model, cut below its tracked blocks, with what tracing it needs.

    Attributes:
        model: the tail, which runs on batches with trunk states.
        whole: the model before the cut.
        tracked_modules: dotted names in the whole model.
        kept_states: trunk states of the training dialogues.
    """

    whole: PreTrainedModel
    trunk: Trunk
    tokenizer: PreTrainedTokenizerBase
    tracked_modules: list[str]
    tokens_per_batch: int
    curvature: Curvature
    kept_states: KeptStates

    @property
    def model(self) -> PreTrainedModel:
        """The tail of the model."""
        return self.trunk.tail

    def loader(
        self,
        sequences: Sequence[LabelledSequence],
        keep: bool = False,
        **keywords: Any,  # noqa: ANN401
    ) -> BatchLoader:
        """Batches of sequences with their trunk states, within the token budget, on the model's device.

        Args:
            keep: keep the trunk states, for the training dialogues, which several passes see.
        """
        states = self.kept_states if keep else KeptStates(self.trunk, keep=False)
        return BatchLoader(
            sequences,
            self.tokens_per_batch,
            self.tokenizer.pad_token_id,
            self.whole.device,
            transform=states.add_to,
            **keywords,
        )


def load_traceable(settings: Settings, model: str, device: torch.device) -> Traceable:
    """Load a model and settle which Linears are traced, how, and how much goes into a batch.

    Raises:
        UserError: half precision without a GPU, more blocks than the model has, and all that loading raises.
    """
    if settings.USE_HALF_PRECISION and device.type != "cuda":
        raise UserError(f"USE_HALF_PRECISION = True: needs a CUDA device, and DEVICE is {device}; set it to False")
    loaded = load_model(model, device)
    tracked = tracked_linear_names(loaded, settings.MODEL_FAMILY, settings.NUM_BLOCKS)
    trunk = Trunk(loaded, settings.MODEL_FAMILY, settings.NUM_BLOCKS, settings.USE_HALF_PRECISION)
    return Traceable(
        whole=loaded,
        trunk=trunk,
        kept_states=KeptStates(trunk),
        tokenizer=load_tokenizer(model),
        tracked_modules=tracked,
        tokens_per_batch=token_budget(loaded, settings.TOKENS_PER_BATCH, tracked),
        curvature=Curvature(settings.FACTOR_STRATEGY, settings.DAMPING_FACTOR, settings.USE_HALF_PRECISION),
    )
