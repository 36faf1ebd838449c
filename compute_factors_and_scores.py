"""Step 1: fit the curvature factors of a model and score every training dialogue for the trust tasks.

    python compute_factors_and_scores.py
    python compute_factors_and_scores.py --TASK_NAME ethics --NUM_BLOCKS 2

    s_i = grad f_task^T (F + damping I)^-1 grad L(z_i)

FACTOR_STRATEGY says what F is: its factors, or for "ekfac_cg" the Gauss-Newton matrix itself, whose system conjugate
gradients solve with the inverse of the EKFAC factors as preconditioner.

Reads the model, the training split of HH_DATASET and the training pairs in DATA_DIR. Writes the factors of F, shared by
all tasks, and `all_modules` (1, N_train) for each task. Sign: a positive score means that training on the dialogue
lowers the measurement (helps); the most negative scores are the most harmful.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import random
import time
from functools import partial
from typing import Literal

import torch

from steps import next_command, run_step
from tasks import TRUST_TASKS
from tasks.backward_task import TrustTask
from utils.artifacts import Artifact, FileArtifact
from utils.batching import BatchLoader, LabelledSequence
from utils.console import banner, say
from utils.devices import resolve_device
from utils.folder_artifacts import FolderArtifact
from utils.influence.conjugate_gradient import Solution, conjugate_gradients
from utils.influence.factor_files import factor_shapes
from utils.influence.factors import fit_factors
from utils.influence.gauss_newton import gauss_newton_product, require_forward_mode
from utils.influence.preconditioning import Preconditioner, load_preconditioner
from utils.influence.scores import mean_measurement_gradient, require_representable, score_training_examples
from utils.influence.token_scores import score_tokens
from utils.influence.traced_model import Gradients, TracedModel, load_traced_model
from utils.locks import locked
from utils.paths import STEP_2, STEP_4, resolve_path
from utils.performance_functions.hh import MAX_DIALOGUE_TOKENS, require_labels, tokenize_dialogues
from utils.performance_functions.pairs import AnswerPairs, TokenizedPairs, tokenize_pairs
from utils.registry import SCORES_TENSOR, ModelArtifacts
from utils.settings import (
    Family,
    ModelNames,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    Strategy,
    TraceTask,
    tasks_of,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: ModelNames = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the factor subset and of the labels sampled for the Fisher
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

TASK_NAME: TraceTask = "all"  # measurement to trace: "bias", "ethics", "truth", "all" (the three in one pass)
NUM_BLOCKS: PositiveInt = 1  # last transformer blocks whose Linears are traced
FACTOR_STRATEGY: Strategy = "ekfac"  # curvature: "ekfac", "kfac", "diagonal", "identity", "ekfac_cg"
NUM_FACTOR_EXAMPLES: PositiveInt = 10_000  # training dialogues that the curvature is that of, at most
DAMPING_FACTOR: NonNegativeFloat | None = None  # added to the eigenvalues; None = 0.1 x their mean
CG_ITERATIONS: PositiveInt = 30  # for "ekfac_cg": passes over those dialogues, at most
CG_TOLERANCE: PositiveFloat = 0.01  # for "ekfac_cg": residual |b - A x| / |b| at which it stops before
USE_HALF_PRECISION: bool = False  # True: bfloat16 forward and backward passes (GPU only); sums stay float32
FISHER_POSITIONS: Literal["completion", "all"] = "completion"  # where labels are sampled; "all" as released
COMPUTE_PER_TOKEN_SCORES: bool = False  # True also writes a score for every token's loss
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch: a number or "auto"
# -----------------------------------------------------------------------------------------------------------


def curvature_loader(
    settings: Settings, traced: TracedModel, examples: list[LabelledSequence], keeps_labels: bool = False
) -> BatchLoader:
    """The seeded subset of the training dialogues whose curvature F is.

    Args:
        keeps_labels: for passes that sample the same labels.

    Raises:
        UserError: none of them has a label.
    """
    count = min(settings.NUM_FACTOR_EXAMPLES, len(examples))
    indices = sorted(random.Random(settings.SEED).sample(range(len(examples)), count))
    require_labels([examples[i] for i in indices], f"NUM_FACTOR_EXAMPLES = {count} of {settings.HH_DATASET}")
    longest = min(MAX_DIALOGUE_TOKENS, traced.tokenizer.model_max_length)
    pad_to = longest if settings.FISHER_POSITIONS == "all" else None
    return traced.loader(examples, cached=True, keeps_labels=keeps_labels, indices=indices, pad_to=pad_to)


def fit(
    settings: Settings, traced: TracedModel, task: TrustTask, examples: list[LabelledSequence], output: FolderArtifact
) -> None:
    """Fit the factors of F."""
    started = time.monotonic()
    loader = curvature_loader(settings, traced, examples, keeps_labels=True)
    with output.staging_folder() as folder:
        fit_factors(traced, task, loader, folder)
        output.publish_folder(
            started, factor_shapes(folder), modules=list(traced.linears), examples=len(loader.indices)
        )


def measurement_gradients(traced: TracedModel, queries: dict[TrustTask, TokenizedPairs]) -> Gradients:
    """grad f of every task, (tasks, out, in), so that one training pass scores all of them."""
    gradients = []
    for task, pairs in queries.items():
        loader = traced.loader(pairs.sequences, weights=pairs.weights, description=f"{task.name} queries")
        gradients.append(mean_measurement_gradient(traced, task, loader))
    return {name: torch.cat([gradient[name] for gradient in gradients]) for name in gradients[0]}


def solve(
    settings: Settings,
    traced: TracedModel,
    examples: list[LabelledSequence],
    gradients: Gradients,
    precondition: Preconditioner,
) -> Solution:
    """(G + damping I)^-1 grad f of every task, with the Gauss-Newton matrix G and the damping that the factors have."""
    loader = curvature_loader(settings, traced, examples)
    is_everywhere = settings.FISHER_POSITIONS == "all"

    def product(vectors: Gradients) -> Gradients:
        products = gauss_newton_product(traced, loader, vectors, is_everywhere)
        return {name: products[name] + precondition.dampings[name] * vectors[name] for name in vectors}

    solution = conjugate_gradients(product, gradients, precondition, settings.CG_ITERATIONS, settings.CG_TOLERANCE)
    residuals = ", ".join(f"{residual:.1e}" for residual in solution.residual)
    say(f"   conjugate gradients: {len(solution.residuals) - 1} iterations, residuals {residuals}")
    if max(solution.residual) > settings.CG_TOLERANCE:
        say(f"   stopped by CG_ITERATIONS = {settings.CG_ITERATIONS}, above CG_TOLERANCE = {settings.CG_TOLERANCE:g}")
    return solution


def trace_model(settings: Settings, model: str) -> None:
    """Factors and scores of one model; finished artifacts are not computed again."""
    banner("step 1: factors and scores", model)
    artifacts = ModelArtifacts(settings, model)
    data_dir, names = resolve_path(settings.DATA_DIR), tasks_of(settings.TASK_NAME)
    pairs = {name: TRUST_TASKS[name].measurement.load_pairs(data_dir, "train") for name in names}
    outputs: dict[str, list[FileArtifact]] = {}
    for name in names:
        fingerprint = pairs[name].fingerprint
        outputs[name] = [artifacts.scores(name, pairs=fingerprint)]
        if settings.COMPUTE_PER_TOKEN_SCORES:
            outputs[name].append(artifacts.token_scores(name, pairs=fingerprint))
    with locked(*(output.path for of_task in outputs.values() for output in of_task)):
        make_unfinished(artifacts, pairs, outputs)


def make_unfinished(
    artifacts: ModelArtifacts, pairs: dict[str, AnswerPairs], outputs: dict[str, list[FileArtifact]]
) -> None:
    """Fit the factors and compute the scores, unless they are finished.

    Args:
        pairs: the training pairs of each task.
        outputs: the scores of each task, with COMPUTE_PER_TOKEN_SCORES also those of tokens.
    """
    settings, factors, names = artifacts.settings, artifacts.factors(), list(pairs)
    is_finished = partial(Artifact.is_finished, overwrite=settings.OVERWRITE)
    device = resolve_device(settings.DEVICE)
    unfinished = [name for name in names if not all(is_finished(output) for output in outputs[name])]
    has_factors = is_finished(factors)
    if has_factors and not unfinished:
        return

    traced = load_traced_model(settings, artifacts.model, device)
    examples = tokenize_dialogues(artifacts.dialogues, traced.tokenizer)
    if settings.FACTOR_STRATEGY == "ekfac_cg" or settings.COMPUTE_PER_TOKEN_SCORES:
        require_forward_mode(traced, examples)
    say(f"   {len(examples)} dialogues, {len(traced.linears)} Linears, {traced.tokens_per_batch} tokens per batch")
    tasks = [
        TRUST_TASKS[name](list(traced.linears), settings.SEED, settings.FISHER_POSITIONS)
        for name in unfinished or names
    ]
    queries = {task: tokenize_pairs(pairs[task.name], traced.tokenizer, task.measurement.max_tokens) for task in tasks}
    with locked(factors.path):
        if not has_factors and not is_finished(factors):  # another run may have fitted them meanwhile
            fit(settings, traced, tasks[0], examples, factors)
    if not unfinished:
        return
    started = time.monotonic()
    gradients, precondition = measurement_gradients(traced, queries), load_preconditioner(factors, traced)
    solution = None
    if settings.FACTOR_STRATEGY == "ekfac_cg":
        solution = solve(settings, traced, examples, gradients, precondition)
    gradients = solution.vectors if solution else precondition(gradients)
    train = traced.loader(examples, cached=True, description="training dialogues")
    scores = score_training_examples(traced, tasks[0], train, gradients)
    for query, name in enumerate(unfinished):
        constants = settings.pick("DAMPING_FACTOR") if settings.FACTOR_STRATEGY != "identity" else {}
        require_representable([scores[query]], f"the influence scores for {name}", constants)
    for query, name in enumerate(unfinished):
        of_dialogues, *_ = outputs[name]
        if not is_finished(of_dialogues):
            sign = "positive: training on the dialogue lowers the measurement; most negative: most harmful"
            facts = {"residuals": solution.of_query(query)} if solution else {}
            of_dialogues.save_tensors({SCORES_TENSOR: scores[query : query + 1]}, started, sign=sign, **facts)
    if settings.COMPUTE_PER_TOKEN_SCORES:
        tokens = score_tokens(traced, train.described("tokens of the training dialogues"), gradients)
        for query, name in enumerate(unfinished):
            _, of_tokens = outputs[name]
            of_tokens.save_tensors({"scores": tokens.scores[query], "offsets": tokens.offsets}, started)


def main(settings: Settings) -> None:
    """Trace every model."""
    for model in settings.MODEL_NAMES:
        trace_model(settings, model)


def next_step(settings: Settings) -> str:
    """The command that uses these scores; some only rank, and step 4 preconditions with EKFAC."""
    if settings.FACTOR_STRATEGY in ("identity", "ekfac_cg"):
        return next_command(STEP_4, settings, SCORES_TYPE=settings.FACTOR_STRATEGY, FACTOR_STRATEGY="ekfac")
    return next_command(STEP_2, settings)


if __name__ == "__main__":
    run_step(main, hint=next_step)
