"""Step 4: the repair gradient of a chosen subset of training dialogues.

    python make_gradients.py
    python make_gradients.py --TASK_NAME combined --SCORES_TYPE dpp --IF_WEIGHT 10

    G = (F + damping I)^-1 mean_{i in S} grad Lbar(z_i),   Lbar = mean token loss

Reads the factors of step 1, and the scores of step 1 ("pure_ekfac": the BOTTOM_K most negative ones) or the indices
of step 3 ("dpp"). Writes one tensor for each traced Linear, (1, out, in) or (1, out, in + 1) with the bias last.
"""

from __future__ import annotations

import time
from typing import Literal

from tasks import BackwardTask
from utils.artifacts import fingerprint_of
from utils.console import UserError, banner, say, shown_path
from utils.influence import Gradients, mean_measurement_gradient, precondition, trace
from utils.models import resolve_device
from utils.paths import STEP_3
from utils.performance_functions.hh import tokenize_dialogues
from utils.pipeline import Pipeline, load_traceable, tasks_of
from utils.selection import most_harmful, random_subset, require_enough
from utils.settings import (
    Family,
    NonNegativeFloat,
    PositiveInt,
    RepairTask,
    ScoresType,
    Seed,
    Settings,
    Strategy,
    run_step,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: list[str] = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # of the random subset; as in step 1, whose factors are read
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASK_NAME: RepairTask = "all"  # whose scores; "combined" is the weighted sum, "all" does the three in turn
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn; the paper's tables use 100
SCORES_TYPE: ScoresType = "pure_ekfac"  # how they are chosen
IF_WEIGHT: NonNegativeFloat = 10.0  # for "dpp": weight of the influence term, as in step 3
GRADIENT_REDUCTION_TYPE: Literal["mean", "sum"] = "mean"  # "sum" is the sum over the subset divided by 100
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"

NUM_BLOCKS: PositiveInt = 1  # as in step 1
FACTOR_STRATEGY: Strategy = "ekfac"  # as in step 1
NUM_FACTOR_EXAMPLES: PositiveInt = 10_000  # as in step 1
DAMPING_FACTOR: NonNegativeFloat | None = None  # as in step 1
USE_HALF_PRECISION: bool = False  # as in step 1
FISHER_POSITIONS: Literal["completion", "all"] = "completion"  # as in step 1
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch
# -----------------------------------------------------------------------------------------------------------

SUM_IS_DIVIDED_BY = 100  # so that a sum over the paper's 100 dialogues is their mean


def choose_subset(pipeline: Pipeline, task: str) -> list[int]:
    """Indices of the training dialogues to unlearn.

    Raises:
        UserError: the scores or indices that SCORES_TYPE needs are missing or broken.
    """
    settings, total = pipeline.settings, len(pipeline.dialogues)
    require_enough(settings.BOTTOM_K, total)
    if settings.SCORES_TYPE == "random":
        return random_subset(total, settings.BOTTOM_K, settings.SEED)
    scores, fingerprints = pipeline.ranking_scores(task)
    if settings.SCORES_TYPE == "pure_ekfac":
        return most_harmful(scores, settings.BOTTOM_K)
    artifact = pipeline.dpp(task, **fingerprints)
    content = artifact.load_json()
    indices = content.get("indices") if isinstance(content, dict) else None
    are_indices = isinstance(indices, list) and all(index in range(total) for index in indices)
    if not are_indices or len(set(indices)) != settings.BOTTOM_K:
        raise UserError(
            f"{shown_path(artifact.path)} does not hold {settings.BOTTOM_K} indices below {total}; "
            f"delete it and run {STEP_3} again"
        )
    return indices


def reduce_gradient(mean_gradient: Gradients, bottom_k: int, reduction: str) -> Gradients:
    """The mean over the subset, or the sum divided by 100."""
    factor = 1.0 if reduction == "mean" else bottom_k / SUM_IS_DIVIDED_BY
    return {name: gradient * factor for name, gradient in mean_gradient.items()}


def main(settings: Settings) -> None:
    """Make the repair gradient of every model and task."""
    device = resolve_device(settings.DEVICE)
    for model_name in settings.MODEL_NAMES:
        pipeline = Pipeline.of(settings, model_name)
        subject = None
        for task_name in tasks_of(settings.TASK_NAME):
            banner("step 4: repair gradient", f"{task_name}, {settings.SCORES_TYPE}, {model_name}")
            started = time.monotonic()
            factors = pipeline.factors()
            factors.require()
            indices = choose_subset(pipeline, task_name)
            output = pipeline.gradients(task_name, subset=fingerprint_of(indices))
            if output.is_finished(settings.OVERWRITE):
                continue
            if subject is None:
                subject = load_traceable(settings, model_name, device)
                task = BackwardTask(subject.tracked_modules)
                trace(subject.whole, task)
                examples = tokenize_dialogues(pipeline.dialogues, subject.tokenizer)
            loader = subject.loader(examples, indices=indices, description="subset")
            mean_gradient = mean_measurement_gradient(subject.model, task, loader, subject.curvature)
            gradient = reduce_gradient(mean_gradient, settings.BOTTOM_K, settings.GRADIENT_REDUCTION_TYPE)
            repair_gradient = precondition(subject.model, gradient, subject.curvature, factors.path)
            output.save_tensors(repair_gradient, started, indices=indices)
    say(f"next: python gradient_ascent_and_save.py --SCORES_TYPE {settings.SCORES_TYPE}")


if __name__ == "__main__":
    run_step(main)
