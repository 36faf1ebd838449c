"""Step 1: fit the curvature factors of a model and score every training dialogue for the trust tasks.

    python compute_factors_and_scores.py
    python compute_factors_and_scores.py --TASK_NAME ethics --NUM_BLOCKS 2

Reads the model, the training split of HH_DATASET and the training pairs in DATA_DIR. Writes the factors once for
each model, and `all_modules` (1, N_train) for each task. Sign: a positive score means that training on the dialogue
lowers the measurement (helps); the most negative ones are the most harmful.
"""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from tasks import TRUST_TASKS
from tasks.base import TrustTask
from utils import paths
from utils.artifacts import Artifact, fingerprint_of
from utils.batching import BatchLoader, LabelledSequence
from utils.console import banner, say
from utils.influence import (
    SCORES_NAME,
    Scores,
    factor_shapes,
    fit_factors,
    mean_measurement_gradient,
    precondition,
    score_training_examples,
    trace,
)
from utils.models import resolve_device
from utils.paths import STEP_2
from utils.performance_functions.hh import MAX_DIALOGUE_TOKENS, tokenize_dialogues
from utils.performance_functions.pairs import TokenizedPairs, tokenize_pairs
from utils.pipeline import Pipeline, tasks_of
from utils.settings import Family, NonNegativeFloat, PositiveInt, Seed, Settings, Strategy, TraceTask, run_step
from utils.steps import next_command
from utils.tracing import Traceable, load_traceable

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: list[str] = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # of the factor subset and of the labels sampled for the Fisher
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASK_NAME: TraceTask = "all"  # which measurement to trace; "all" scores the three in one pass
NUM_BLOCKS: PositiveInt = 1  # last transformer blocks whose Linears are traced
FACTOR_STRATEGY: Strategy = "ekfac"  # approximation of the curvature
NUM_FACTOR_EXAMPLES: PositiveInt = 10_000  # training dialogues that the factors are fitted on, at most
DAMPING_FACTOR: NonNegativeFloat | None = None  # added to the eigenvalues; None = 0.1 x their mean
USE_HALF_PRECISION: bool = False  # bfloat16 forward and backward passes (GPU only); sums stay float32
FISHER_POSITIONS: Literal["completion", "all"] = "completion"  # where labels are sampled; "all" as released
COMPUTE_PER_TOKEN_SCORES: bool = False  # also write a score for every token
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch
# -----------------------------------------------------------------------------------------------------------


def fit_and_publish_factors(
    factors: Artifact, settings: Settings, subject: Traceable, task: TrustTask, examples: list[LabelledSequence]
) -> None:
    """Fit the factors on a seeded subset of the training dialogues."""
    started = time.monotonic()
    count = min(settings.NUM_FACTOR_EXAMPLES, len(examples))
    indices = sorted(random.Random(settings.SEED).sample(range(len(examples)), count))
    pad_to = MAX_DIALOGUE_TOKENS if settings.FISHER_POSITIONS == "all" else None
    loader = subject.loader(examples, keep=True, indices=indices, pad_to=pad_to)
    with factors.growing_folder() as folder:
        fit_factors(subject.model, task, loader, subject.curvature, folder)
        factors.publish_folder(started, factor_shapes(folder), modules=subject.tracked_modules, examples=count)


def score_tasks(
    subject: Traceable, queries: dict[TrustTask, TokenizedPairs], train: BatchLoader, factors: Path, per_token: bool
) -> Scores:
    """Stack the tasks' preconditioned gradients and score all of them in one pass over the training data."""
    model, curvature = subject.model, subject.curvature
    gradients = []
    for task, pairs in queries.items():
        loader = subject.loader(pairs.sequences, weights=pairs.weights, description=f"{task.name} queries")
        gradients.append(mean_measurement_gradient(model, task, loader, curvature))
    stacked = {name: torch.cat([gradient[name] for gradient in gradients]) for name in gradients[0]}  # (tasks, out, in)
    preconditioned = precondition(model, stacked, curvature, factors)
    return score_training_examples(model, next(iter(queries)), train, preconditioned, curvature, per_token)


def trace_model(settings: Settings, model_name: str) -> None:
    """Factors and scores of one model; what is finished is not computed again."""
    banner("step 1: factors and scores", model_name)
    started = time.monotonic()
    device = resolve_device(settings.DEVICE)
    pipeline = Pipeline.of(settings, model_name)
    data_dir, names = paths.anchored(settings.DATA_DIR), tasks_of(settings.TASK_NAME)
    pairs = {name: TRUST_TASKS[name].measurement.load_pairs(data_dir, "train") for name in names}
    fingerprints = {name: fingerprint_of(pairs[name]) for name in names}
    factors = pipeline.factors()
    is_finished = partial(Artifact.is_finished, overwrite=settings.OVERWRITE)
    outputs = {name: [pipeline.scores(name, pairs=fingerprints[name])] for name in names}
    if settings.COMPUTE_PER_TOKEN_SCORES:
        for name in names:
            outputs[name].append(pipeline.token_scores(name, pairs=fingerprints[name]))
    unfinished = [name for name in names if not all(is_finished(output) for output in outputs[name])]
    has_factors = is_finished(factors)
    if has_factors and not unfinished:
        return

    subject = load_traceable(settings, model_name, device)
    examples = tokenize_dialogues(pipeline.dialogues, subject.tokenizer)
    linears, tokens = len(subject.tracked_modules), subject.tokens_per_batch
    say(f"   {len(examples)} dialogues, {linears} Linears, {tokens} tokens per batch")
    tasks = [
        TRUST_TASKS[name](subject.tracked_modules, settings.SEED, settings.FISHER_POSITIONS)
        for name in unfinished or names
    ]
    queries = {task: tokenize_pairs(pairs[task.name], subject.tokenizer, task.measurement.max_tokens) for task in tasks}
    trace(subject.whole, tasks[0])
    if not has_factors:
        fit_and_publish_factors(factors, settings, subject, tasks[0], examples)
    if not unfinished:
        return
    train = subject.loader(examples, keep=True, description="training dialogues")
    scores = score_tasks(subject, queries, train, factors.path, settings.COMPUTE_PER_TOKEN_SCORES)
    for query, name in enumerate(unfinished):
        if settings.COMPUTE_PER_TOKEN_SCORES:
            tokens = {"scores": scores.tokens[query], "offsets": scores.token_offsets}
            outputs[name][1].save_tensors(tokens, started)
        sign = "positive: training on the dialogue lowers the measurement; most negative: most harmful"
        if not is_finished(outputs[name][0]):
            outputs[name][0].save_tensors({SCORES_NAME: scores.examples[query : query + 1]}, started, sign=sign)


def main(settings: Settings) -> None:
    """Trace every model."""
    for model_name in settings.MODEL_NAMES:
        trace_model(settings, model_name)


if __name__ == "__main__":
    run_step(main, next_command=partial(next_command, STEP_2))
