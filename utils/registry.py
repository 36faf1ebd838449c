"""Every artifact of a model: where it is stored, and which constants and inputs it depends on.

The step that writes an artifact has all of its constants, and they make up its fingerprint. A later step that reads it
has some of them, and refuses the artifact if one of those differs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from utils import paths
from utils.artifacts import FileArtifact
from utils.folder_artifacts import FolderArtifact
from utils.methods import factors_for
from utils.model_fingerprints import model_fingerprint
from utils.models import load_config, require_supported
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, STEP_6
from utils.performance_functions.hh import Dialogues, load_dialogues
from utils.performance_functions.pairs import AnswerPairs
from utils.repairs import RepairChoice
from utils.settings import Settings

Side = Literal["chosen", "rejected"]  # the trustworthy and the untrustworthy answers
SCORES_TENSOR = "all_modules"  # kronfluence's name for scores that are summed over all modules
FISHER_CONSTANTS = ("NUM_FACTOR_EXAMPLES", "FISHER_POSITIONS", "DAMPING_FACTOR")  # no effect where F is the identity
SOLVER_CONSTANTS = ("CG_ITERATIONS", "CG_TOLERANCE")  # of "ekfac_cg"
FACTOR_CONSTANTS = (
    "NUM_BLOCKS",
    "FACTOR_STRATEGY",
    "NUM_FACTOR_EXAMPLES",
    "USE_HALF_PRECISION",
    "FISHER_POSITIONS",
    "SEED",
)


class ModelArtifacts:
    """The artifacts of one model, of its training dialogues and of its repairs.

    Attributes:
        settings: the constants of the calling step.
        model: hub id or folder.
        fingerprint: of the model.
    """

    def __init__(self, settings: Settings, model: str) -> None:
        """Find the model.

        Raises:
            UserError: it is missing, or its architecture is not supported.
        """
        require_supported(model, settings.MODEL_FAMILY, getattr(settings, "NUM_BLOCKS", 1))
        self.settings, self.model, self.fingerprint = settings, model, model_fingerprint(model)

    def with_constants(self, constants: dict[str, Any]) -> ModelArtifacts:
        """The same artifacts for a step that knows further constants."""
        other = copy.copy(self)
        other.settings = type(self.settings)(**{**vars(self.settings), **constants})
        return other

    @cached_property
    def dialogues(self) -> Dialogues:
        """The training split of HH_DATASET, read on first use."""
        return load_dialogues(self.settings.HH_DATASET, "train")

    @cached_property
    def hidden_size(self) -> int | None:
        """The size of the model's hidden states, if its configuration says so."""
        return getattr(load_config(self.model).get_text_config(), "hidden_size", None)

    @property
    def name(self) -> str:
        """The model's short name, as in file names."""
        return paths.model_short_name(self.model)

    @property
    def repair_name(self) -> str:
        """The name of the repair that the settings describe."""
        return RepairChoice.of(self.settings).name

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the model and of the training dialogues."""
        return {"model": self.fingerprint, "dataset": self.dialogues.fingerprint}

    def _known(self, *constants: str) -> dict[str, Any]:
        """Those of the constants that the calling step has."""
        return self.settings.pick(*(name for name in constants if hasattr(self.settings, name)))

    def _combination(self, task: str) -> dict[str, Any]:
        return self._known("TASK_WEIGHTS") if task == "combined" else {}

    def _influence_location(self, strategy: str | None = None) -> tuple[str, bool, int]:
        return strategy or self.settings.FACTOR_STRATEGY, self.settings.USE_HALF_PRECISION, self.settings.SEED

    def factors(self) -> FolderArtifact:
        """Step 1: the curvature factors."""
        strategy = factors_for(self.settings.FACTOR_STRATEGY)
        path = paths.factors_dir(self.settings.OUTPUT_DIR, self.name, *self._influence_location(strategy))
        constants = {**self._known(*FACTOR_CONSTANTS), "FACTOR_STRATEGY": strategy}
        return FolderArtifact(path, STEP_1, constants, self.inputs)

    def scores(self, task: str, strategy: str | None = None, **inputs: str) -> FileArtifact:
        """Step 1: the influence scores of one task. The writer adds the fingerprint of the answer pairs.

        Args:
            strategy: in place of FACTOR_STRATEGY.
        """
        return self._scored(paths.scores_file, task, strategy, inputs)

    def token_scores(self, task: str, strategy: str | None = None, **inputs: str) -> FileArtifact:
        """Step 1, with COMPUTE_PER_TOKEN_SCORES: the same for single tokens."""
        meaning = {"token_scores": "of each token's own loss"}  # those of earlier versions were of activations
        scored = self._scored(paths.token_scores_file, task, strategy, {**inputs, **meaning})
        return replace(scored, made_by=f"{scored.made_by} --COMPUTE_PER_TOKEN_SCORES True")

    def _scored(
        self, file: Callable[..., Path], task: str, strategy: str | None, inputs: dict[str, str]
    ) -> FileArtifact:
        constants = self._known(*FACTOR_CONSTANTS, "DAMPING_FACTOR")
        if self.settings.FACTOR_STRATEGY == "ekfac_cg":
            constants |= self._known(*SOLVER_CONSTANTS)
        made_by = STEP_1
        if strategy:
            constants["FACTOR_STRATEGY"], made_by = strategy, f"{STEP_1} --FACTOR_STRATEGY {strategy}"
            if strategy == "identity":
                constants = {name: value for name, value in constants.items() if name not in FISHER_CONSTANTS}
        path = file(self.settings.OUTPUT_DIR, task, self.name, *self._influence_location(strategy))
        return FileArtifact(path, made_by, constants, {**self.inputs, **inputs})

    def representations(self) -> FileArtifact:
        """Step 2: the representations of the training dialogues."""
        path = paths.representations_file(self.settings.OUTPUT_DIR, self.name)
        return FileArtifact(path, STEP_2, self._known("MAX_LENGTH"), self.inputs)

    def answer_representations(self, task: str, side: Side, **inputs: str) -> FileArtifact:
        """Step 2, with ANSWERS_OF: those of a task's answers of one side. The writer adds the pairs' fingerprint."""
        path = paths.answer_representations_file(self.settings.OUTPUT_DIR, task, side, self.name)
        made_by, constants = f"{STEP_2} --ANSWERS_OF {task}", self._known("MAX_LENGTH")
        return FileArtifact(path, made_by, constants, {"model": self.fingerprint, **inputs})

    def dpp(self, task: str, **inputs: str) -> FileArtifact:
        """Step 3: the diverse subset. The writer adds the fingerprints of the representations and scores."""
        settings = self.settings
        path = paths.dpp_file(settings.OUTPUT_DIR, task, self.name, settings.BOTTOM_K, settings.IF_WEIGHT)
        constants = self._known("BOTTOM_K", "IF_WEIGHT", "KERNEL", "NUM_FEATURES", "GAMMA", "SEED")
        return FileArtifact(path, STEP_3, {**constants, **self._combination(task)}, {**self.inputs, **inputs})

    def gradients(self, task: str, **inputs: str) -> FileArtifact:
        """Step 4: the repair gradient.

        Args:
            inputs: fingerprints. The writer gives all that the gradient is computed from, a reader `dataset`.
        """
        choice = RepairChoice.of(self.settings)
        path = paths.gradients_file(self.settings.OUTPUT_DIR, task, self.name, choice.gradient_name, self.settings.SEED)
        counts = {
            "BOTTOM_K": choice.counts_bottom_k,
            "GRADIENT_REDUCTION_TYPE": choice.method.subset and not choice.method.is_trained,
            "DAMPING_FACTOR": choice.method.step == "natural",
            "FIT_ITERATIONS": choice.method.is_fitted,
            "BASELINE_STEPS": choice.method.is_trained,
            "BASELINE_RATE": choice.method.is_trained,
        }
        constants = self._known(*FACTOR_CONSTANTS, "SCORES_TYPE", *filter(counts.get, counts))
        constants |= self._combination(task)
        return FileArtifact(path, STEP_4, constants, {"model": self.fingerprint, **inputs})

    def checkpoint(self, task: str, learning_rate: float, gradient: str) -> FolderArtifact:
        """Step 5: the repaired checkpoint.

        Args:
            gradient: fingerprint of step 4's gradient.
        """
        path = paths.repaired_model_dir(self.settings.OUTPUT_DIR, task, self.name, self.repair_name, learning_rate)
        inputs = {"model": self.fingerprint, "gradient": gradient}
        return FolderArtifact(path, STEP_5, {"LEARNING_RATE": learning_rate}, inputs)

    def learning_rate_search(self, task: str, **inputs: str) -> FileArtifact:
        """Step 5 with LEARNING_RATE "auto": the rates that were tried; `inputs` are what they were measured on."""
        path = paths.search_file(self.settings.OUTPUT_DIR, task, self.name, self.repair_name, self.settings.PPL_BUDGET)
        constants = {**self._known("PPL_BUDGET"), **self._combination(task)}
        constants |= RepairChoice.of(self.settings).search_constants
        return FileArtifact(path, STEP_5, constants, {"model": self.fingerprint, **inputs})

    def retraining(self, name: str, constants: dict[str, Any], inputs: dict[str, str]) -> FolderArtifact:
        """evaluation_scripts/validate_scores.py: a fine-tuning on some of the dialogues, of which numbers are kept."""
        path = paths.retraining_dir(self.settings.OUTPUT_DIR, self.name, name)
        return FolderArtifact(path, paths.VALIDATION, constants, inputs, quiet=True)

    def report(self, checkpoint: FolderArtifact, content: str) -> FileArtifact:
        """Step 5: what a repair did, saved or not; `content` is the report's fingerprint."""
        path = paths.report_file(self.settings.OUTPUT_DIR, checkpoint.path.name)
        return FileArtifact(path, STEP_5, inputs={"model": checkpoint.fingerprint, "content": content})

    def completions(self, checkpoint: FolderArtifact, split: str, pairs: str) -> FileArtifact:
        """Step 5: completions before and after a repair; `pairs` is the fingerprint of the pairs with the prompts."""
        path = paths.result_file(self.settings.OUTPUT_DIR, checkpoint.path.name, "completions", split)
        return FileArtifact(path, STEP_5, inputs={"model": checkpoint.fingerprint, "pairs": pairs})


def result_artifact(
    output_dir: str, model_name: str, fingerprint: str, metric: str, split: str, data: Dialogues | AnswerPairs
) -> FileArtifact:
    """Steps 5 and 6: one measurement of any model.

    Args:
        model_name: its short name, or that of its checkpoint.
        fingerprint: of the model.
        data: what it is measured on.
    """
    path = paths.result_file(output_dir, model_name, metric, split)
    constants = {"metric": metric, "split": split}
    if not isinstance(data, Dialogues):
        constants["split_rule"] = data.split_rule
    return FileArtifact(path, STEP_6[metric], constants, {"model": fingerprint, "data": data.fingerprint})


def losses_artifact(
    output_dir: str, model_name: str, fingerprint: str, metric: str, split: str, data: Dialogues | AnswerPairs
) -> FileArtifact:
    """Steps 5 and 6: the losses of single pairs or dialogues that a result was computed from; as `result_artifact`."""
    result = result_artifact(output_dir, model_name, fingerprint, metric, split, data)
    return replace(result, path=paths.losses_file(output_dir, model_name, metric, split), quiet=True)


def stressed_artifacts(
    settings: Settings,
    model_name: str,
    fingerprint: str,
    stress: str,
    constants: dict[str, Any],
    inputs: dict[str, str],
    metric: str,
    data: Dialogues | AnswerPairs,
) -> tuple[FileArtifact, FileArtifact]:
    """evaluation_scripts/robustness.py: a result and its losses, as the two above, of a model after a stress.

    Args:
        model_name, fingerprint, metric, data: as for `result_artifact`, on the test split.
        stress: its name.
        constants, inputs: what it depends on beside the model.
    """
    of_model = paths.model_short_name(settings.MODEL_NAME)
    path = paths.stressed_result_file(settings.OUTPUT_DIR, of_model, stress, model_name, metric)
    result = result_artifact(settings.OUTPUT_DIR, model_name, fingerprint, metric, "test", data)
    result = replace(
        result,
        path=path,
        made_by=paths.ROBUSTNESS,
        settings={**result.settings, "stress": stress, **constants},
        inputs={**result.inputs, **inputs},
        quiet=True,
    )
    return result, replace(result, path=path.with_name(f"{path.stem}_losses.safetensors"))


def repaired_checkpoints(output_dir: str, fingerprint: str) -> list[str]:
    """Step 5: the folders of all checkpoints below OUTPUT_DIR that were repaired from the model of a fingerprint.

    Raises:
        UserError: the manifest of one is broken.
    """
    manifests = paths.repaired_models_dir(output_dir).glob("*/manifest.json")
    checkpoints = [FolderArtifact(path.parent, STEP_5) for path in manifests]
    ours = [checkpoint.path for checkpoint in checkpoints if checkpoint.require()["inputs"].get("model") == fingerprint]
    return sorted(map(str, ours))


def sft_model(settings: Settings, **inputs: str) -> FolderArtifact:
    """Before step 1: the POST-SFT model that data/make_sft_model.py makes.

    Args:
        inputs: fingerprints of the base model, of its tokenizer if it comes without one, and of the training split.
    """
    constants = settings.pick("NUM_EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "SEED")
    constants |= {
        name: value and paths.public_name(value) for name, value in settings.pick("BASE_MODEL", "TOKENIZER").items()
    }
    path = paths.resolve_path(settings.SFT_MODEL_DIR)
    return FolderArtifact(path, paths.STEP_0, constants, inputs, placed_by="SFT_MODEL_DIR")


def harness_result(settings: Settings, model_name: str, fingerprint: str, task: str) -> FileArtifact:
    """evaluation_scripts/harness_eval.py: one task of lm-evaluation-harness, of any model.

    Args:
        model_name: its short name, or that of its checkpoint.
        fingerprint: of the model.
    """
    path = paths.result_file(settings.OUTPUT_DIR, model_name, "harness", task)
    made_by = "evaluation_scripts/harness_eval.py"
    return FileArtifact(path, made_by, {"task": task, **settings.pick("LIMIT")}, {"model": fingerprint})
