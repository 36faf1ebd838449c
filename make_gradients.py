"""Step 4: the repair gradient of a chosen subset of training dialogues.

    python make_gradients.py
    python make_gradients.py --TASK_NAME combined --SCORES_TYPE dpp --IF_WEIGHT 10

    G = (F + damping I)^-1 mean_{i in S} grad Lbar(z_i),   Lbar = mean token loss

Reads the factors of step 1, and what SCORES_TYPE chooses the subset S by: "pure_ekfac", "identity": scores of step 1,
with and without curvature; "representation": representations of step 2; "dpp": indices of step 3. "direct" has no
subset: its gradient is minus that of the measurement itself. With PRESERVE_PERPLEXITY, G loses the part that moves the
loss of retained dialogues. Writes one tensor for each traced Linear, (1, out, in) or (1, out, in + 1) with the bias
last.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Literal

import torch

from tasks import BackwardTask
from utils.artifacts import fingerprint_of
from utils.console import banner
from utils.influence import precondition, trace
from utils.models import resolve_device
from utils.paths import STEP_5, anchored
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.performance_functions.hh import tokenize_dialogues
from utils.pipeline import Pipeline, task_weights, tasks_of
from utils.repair_gradient import direct_gradient, preserving_direction, retained_gradient, subset_gradient
from utils.selection import rows_apart
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
from utils.steps import next_command
from utils.subsets import choose_subset
from utils.tracing import load_traceable

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: list[str] = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # of the random subset and of what is retained; as in step 1, whose factors are read
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASK_NAME: RepairTask = "all"  # whose scores; "combined" is the weighted sum, "all" does the three in turn
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn; the paper's tables use 100
SCORES_TYPE: ScoresType = "pure_ekfac"  # how they are chosen
IF_WEIGHT: NonNegativeFloat = 10.0  # for "dpp": weight of the influence term, as in step 3
PRESERVE_PERPLEXITY: bool = False  # beyond the paper: leave the loss of retained dialogues as it is, to first order
NUM_RETAIN_EXAMPLES: PositiveInt = 500  # for PRESERVE_PERPLEXITY: dialogues whose loss is to stay, at most
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
            weights = task_weights(settings, task_name)
            indices, rows, pairs = choose_subset(pipeline, task_name), [], {}
            sources = {"subset": fingerprint_of(indices)}
            if settings.SCORES_TYPE == "direct":
                data_dir = anchored(settings.DATA_DIR)
                pairs = {name: MEASUREMENTS[name].load_pairs(data_dir, "train") for name in weights}
                sources = {"pairs": fingerprint_of(pairs)}
            if settings.PRESERVE_PERPLEXITY:
                total = len(pipeline.dialogues)
                rows = rows_apart("retain", indices, total, settings.NUM_RETAIN_EXAMPLES, settings.SEED)
                sources["retained"] = fingerprint_of(rows)
            output = pipeline.gradients(task_name, **sources)
            if output.is_finished(settings.OVERWRITE):
                continue
            if subject is None:
                subject = load_traceable(settings, model_name, device)
                task = BackwardTask(subject.tracked_modules)
                trace(subject.whole, task)
                examples = tokenize_dialogues(pipeline.dialogues, subject.tokenizer)
            if pairs:
                gradient = direct_gradient(subject, task, pairs, weights)
            else:
                gradient = subset_gradient(subject, task, examples, indices, settings.GRADIENT_REDUCTION_TYPE)
            details: dict[str, Any] = {"indices": indices, "retained": rows}
            if rows:
                retained = retained_gradient(subject, task, examples, rows)
                gradient = {name: torch.cat([gradient[name], retained[name]]) for name in retained}  # (2, out, in)
            repair_gradient = precondition(subject.model, gradient, subject.curvature, factors.path)
            if rows:
                repair_gradient, details["alpha"] = preserving_direction(gradient, repair_gradient)
            output.save_tensors(repair_gradient, started, **details)


if __name__ == "__main__":
    run_step(main, next_command=partial(next_command, STEP_5))
