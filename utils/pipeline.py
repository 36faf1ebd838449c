"""What passes between the steps: each artefact with the constants and inputs it depends on, described once.

The writer of an artefact has all of its constants, and they make up its fingerprint. A later step that reads it has
some of them, and refuses it where one of those differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils import paths
from utils.artifacts import Artifact
from utils.console import UserError, shown_path
from utils.influence import SCORES_NAME
from utils.models import model_fingerprint, require_supported
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, load_dialogues
from utils.selection import combined_scores, similarity_to
from utils.settings import Settings

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


def task_weights(settings: Settings, task: str) -> dict[str, float]:
    """What each measurement counts in `task`; "combined" is all three, weighted by TASK_WEIGHTS.

    Raises:
        UserError: TASK_WEIGHTS are not three, or all zero.
    """
    if task != "combined":
        return {task: 1.0}
    weights = settings.TASK_WEIGHTS
    if len(weights) != len(MEASUREMENTS) or not any(weights):
        raise UserError(
            f"TASK_WEIGHTS = {weights}: allowed are {len(MEASUREMENTS)} numbers, for {', '.join(MEASUREMENTS)}, "
            "not all zero"
        )
    return dict(zip(MEASUREMENTS, weights, strict=True))


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
        require_supported(model, settings.MODEL_FAMILY)
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

    def _influence_location(self, strategy: str | None = None) -> tuple[str, bool, int]:
        return strategy or self.settings.FACTOR_STRATEGY, self.settings.USE_HALF_PRECISION, self.settings.SEED

    def factors(self) -> Artifact:
        """Step 1: the curvature factors."""
        path = paths.factors_dir(self.settings.OUTPUT_DIR, self.name, *self._influence_location())
        return Artifact(path, STEP_1, self._known(*FACTOR_CONSTANTS), self.inputs, is_folder=True)

    def scores(self, task: str, strategy: str | None = None, **inputs: str) -> Artifact:
        """Step 1: the influence scores of one task. The writer adds the fingerprint of the answer pairs.

        Args:
            strategy: in place of FACTOR_STRATEGY.
        """
        return self._scored(paths.scores_file, task, strategy, inputs)

    def token_scores(self, task: str, **inputs: str) -> Artifact:
        """Step 1, with COMPUTE_PER_TOKEN_SCORES: the same for single tokens."""
        return self._scored(paths.token_scores_file, task, None, inputs)

    def _scored(self, file: Callable[..., Path], task: str, strategy: str | None, inputs: dict[str, str]) -> Artifact:
        location = self._influence_location(strategy)
        constants = {**self._known(*FACTOR_CONSTANTS, "DAMPING_FACTOR"), "FACTOR_STRATEGY": location[0]}
        made_by = f"{STEP_1} --FACTOR_STRATEGY {strategy}" if strategy else STEP_1
        path = file(self.settings.OUTPUT_DIR, task, self.name, *location)
        return Artifact(path, made_by, constants, {**self.inputs, **inputs})

    def representations(self) -> Artifact:
        """Step 2: the representations of the training dialogues."""
        path = paths.representations_file(self.settings.OUTPUT_DIR, self.name)
        return Artifact(path, STEP_2, self._known("MAX_LENGTH"), self.inputs)

    def answer_representations(self, task: str, **inputs: str) -> Artifact:
        """Step 2, with ANSWERS_OF: those of a task's untrustworthy answers. The writer adds the pairs' fingerprint."""
        path = paths.answer_representations_file(self.settings.OUTPUT_DIR, task, self.name)
        constants = self._known("MAX_LENGTH")
        return Artifact(path, f"{STEP_2} --ANSWERS_OF {task}", constants, {"model": self.inputs["model"], **inputs})

    def dpp(self, task: str, **inputs: str) -> Artifact:
        """Step 3: the diverse subset. The writer adds the fingerprints of the representations and scores."""
        settings = self.settings
        path = paths.dpp_file(settings.OUTPUT_DIR, task, self.name, settings.BOTTOM_K, settings.IF_WEIGHT)
        constants = self._known("BOTTOM_K", "IF_WEIGHT", "KERNEL", "NUM_FEATURES", "GAMMA", "SEED")
        return Artifact(path, STEP_3, {**constants, **weights_setting(self.settings, task)}, {**self.inputs, **inputs})

    def gradients(self, task: str, **inputs: str) -> Artifact:
        """Step 4: the repair gradient. The writer adds fingerprints of what the gradient is taken of."""
        of_subset = [] if self.settings.SCORES_TYPE == "direct" else ["BOTTOM_K", "GRADIENT_REDUCTION_TYPE"]
        constants = self._known(*FACTOR_CONSTANTS, "DAMPING_FACTOR", "SCORES_TYPE", *of_subset)
        return gradients_artifact(
            self.settings,
            self.name,
            task,
            {**constants, **weights_setting(self.settings, task)},
            {**self.inputs, **inputs},
        )

    def ranking_scores(
        self, task: str, read: Callable[[str], tuple[torch.Tensor, dict[str, str]]] | None = None
    ) -> tuple[torch.Tensor, dict[str, str]]:
        """The scores by which `task` ranks the dialogues, smallest most harmful.

        Args:
            read: gives one task's scores (N,) and the fingerprints of what they come from; `influence` by default.

        Returns:
            (N,) float64 in [0, 1]: the task's scores, min-max normalised, or for "combined" the sum weighted by
            TASK_WEIGHTS; and the fingerprints of the artefacts that they come from.

        Raises:
            UserError: scores are missing, broken, made from something else, or of another length.
        """
        weights = task_weights(self.settings, task)
        scores, fingerprints = [], {}
        for scored in weights:
            of_task, sources = (read or self.influence)(scored)
            scores.append(of_task)
            fingerprints.update(sources)
        return combined_scores(scores, list(weights.values())), fingerprints

    def influence(self, task: str, strategy: str | None = None) -> tuple[torch.Tensor, dict[str, str]]:
        """One task's influence scores (N,), with FACTOR_STRATEGY or another strategy."""
        artifact = self.scores(task, strategy)
        scores = artifact.load_tensors()[SCORES_NAME].squeeze(0)
        if len(scores) != len(self.dialogues):
            raise UserError(
                f"{shown_path(artifact.path)} has {len(scores)} scores for {len(self.dialogues)} dialogues; "
                f"delete it and run {artifact.made_by} again"
            )
        return scores, {f"scores_{task}": artifact.require()["fingerprint"]}

    def dissimilarity(self, task: str) -> tuple[torch.Tensor, dict[str, str]]:
        """Minus the similarity (N,) of every dialogue to the task's untrustworthy answers, in representation space."""
        dialogues, answers = self.representations(), self.answer_representations(task)
        similarity = similarity_to(*(artifact.load_tensors()["representations"] for artifact in (answers, dialogues)))
        sources = {"representations": dialogues, f"answers_{task}": answers}
        return -similarity, {name: artifact.require()["fingerprint"] for name, artifact in sources.items()}


def weights_setting(settings: Settings, task: str) -> dict[str, Any]:
    """TASK_WEIGHTS as a setting of an artefact, where they matter."""
    return settings.pick("TASK_WEIGHTS") if task == "combined" else {}


def repair_name(settings: Settings) -> str:
    """The name of the repair that a step's constants describe."""
    return paths.repair_name(settings.SCORES_TYPE, settings.BOTTOM_K, settings.IF_WEIGHT, settings.PRESERVE_PERPLEXITY)


def gradients_artifact(
    settings: Settings, model_name: str, task: str, constants: dict[str, Any], inputs: dict[str, str]
) -> Artifact:
    """Step 4's artefact, for its writer and for step 5, which needs no training dialogues."""
    path = paths.gradients_file(settings.OUTPUT_DIR, task, model_name, repair_name(settings), settings.SEED)
    return Artifact(path, STEP_4, constants, inputs)
