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
from typing import Literal, NamedTuple

import torch

from steps import next_command, run_step
from tasks import TRUST_TASKS, BackwardTask
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
from utils.influence.scores import pairs_gradient, require_representable, score_training_examples
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
NUM_FACTOR_EXAMPLES: PositiveInt = 10_000  # training dialogues that the curvature is estimated on, at most
DAMPING_FACTOR: NonNegativeFloat | None = None  # added to the eigenvalues; None = 0.1 x their mean
CG_ITERATIONS: PositiveInt = 30  # for "ekfac_cg": passes over those dialogues, at most
CG_TOLERANCE: PositiveFloat = 0.01  # for "ekfac_cg": relative residual |b - A x| / |b| at which it stops early
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
    settings: Settings,
    traced: TracedModel,
    task: BackwardTask,
    examples: list[LabelledSequence],
    output: FolderArtifact,
) -> None:
    """Fit the factors of F."""
    started = time.monotonic()
    loader = curvature_loader(settings, traced, examples, keeps_labels=True)
    with output.staging_folder() as folder:
        fit_factors(traced, task, loader, folder)
        output.publish_folder(
            started, factor_shapes(folder), modules=list(traced.linears), examples=len(loader.indices)
        )


class Influence(NamedTuple):
    """What the training dialogues do to the measurement of each task.

    Attributes:
        scores: (tasks, N) of the dialogues.
        preconditioned: (F + damping I)^-1 grad f_task, (tasks, out, in) for each Linear.
        solution: for "ekfac_cg", how the systems were solved.
    """

    scores: torch.Tensor
    preconditioned: Gradients
    solution: Solution | None


def measurement_gradients(traced: TracedModel, queries: dict[TrustTask, TokenizedPairs]) -> Gradients:
    """grad f_task of every task over its training pairs, (tasks, out, in) for each Linear."""
    of_tasks = [pairs_gradient(traced, query, pairs, query.name) for query, pairs in queries.items()]
    return {name: torch.cat([of_task[name] for of_task in of_tasks]) for name in traced.linears}


def influence(
    settings: Settings,
    traced: TracedModel,
    task: BackwardTask,
    examples: list[LabelledSequence],
    queries: dict[TrustTask, TokenizedPairs],
    factors: FolderArtifact,
) -> Influence:
    """s_i = grad f_task^T (F + damping I)^-1 grad L(z_i), of every task and dialogue in one pass over the dialogues.

    Raises:
        UserError: the scores are too large or too small to be ranked by.
    """
    gradients = measurement_gradients(traced, queries)
    precondition, solution = load_preconditioner(factors, traced), None
    if settings.FACTOR_STRATEGY == "ekfac_cg":
        solution = solve(settings, traced, examples, gradients, precondition)
    preconditioned = solution.vectors if solution else precondition(gradients)
    del gradients  # they are as large, and the batches of the next pass were sized without them
    dialogues = traced.loader(examples, cached=True, description="training dialogues")
    scores = score_training_examples(traced, task, dialogues, preconditioned)  # (tasks, N)
    constants = settings.pick("DAMPING_FACTOR") if settings.FACTOR_STRATEGY != "identity" else {}
    for query, of_task in zip(queries, scores, strict=True):
        require_representable([of_task], f"the influence scores for {query.name}", constants)
    return Influence(scores, preconditioned, solution)


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
    residuals = ", ".join(f"{residual:.1e}" for residual in solution.final_residuals)
    say(f"   conjugate gradients: {len(solution.residuals) - 1} iterations, residuals {residuals}")
    if max(solution.final_residuals) > settings.CG_TOLERANCE:
        say(f"   stopped by CG_ITERATIONS = {settings.CG_ITERATIONS}, above CG_TOLERANCE = {settings.CG_TOLERANCE:g}")
    return solution


# -- the step ----------------------------------------------------------------------------------------------------------


class ScoreFiles(NamedTuple):
    """Where the scores of one task go; those of tokens only with COMPUTE_PER_TOKEN_SCORES."""

    dialogues: FileArtifact
    tokens: FileArtifact | None

    @property
    def written(self) -> list[FileArtifact]:
        """The files that this run writes."""
        return [file for file in self if file]


def trace_model(settings: Settings, model: str) -> None:
    """Factors and scores of one model; finished artifacts are not computed again."""
    banner("step 1: factors and scores", model)
    artifacts, data_dir = ModelArtifacts(settings, model), resolve_path(settings.DATA_DIR)
    pairs = {name: TRUST_TASKS[name].measurement.load_pairs(data_dir, "train") for name in tasks_of(settings.TASK_NAME)}
    outputs = {}
    for name, of_task in pairs.items():
        inputs = {"pairs": of_task.fingerprint}
        tokens = artifacts.token_scores(name, **inputs) if settings.COMPUTE_PER_TOKEN_SCORES else None
        outputs[name] = ScoreFiles(artifacts.scores(name, **inputs), tokens)
    with locked(*(file.path for files in outputs.values() for file in files.written)):
        make_unfinished(artifacts, pairs, outputs)


def make_unfinished(artifacts: ModelArtifacts, pairs: dict[str, AnswerPairs], outputs: dict[str, ScoreFiles]) -> None:
    """Fit the factors and compute the scores, unless they are finished.

    Args:
        pairs: the training pairs of each task.
        outputs: where each task's scores go.
    """
    settings, factors, device = artifacts.settings, artifacts.factors(), resolve_device(artifacts.settings.DEVICE)
    is_finished = partial(Artifact.is_finished, overwrite=settings.OVERWRITE)
    unfinished = [name for name, files in outputs.items() if not all(map(is_finished, files.written))]
    has_factors = is_finished(factors)
    if has_factors and not unfinished:
        return

    traced = load_traced_model(settings, artifacts.model, device)
    examples = tokenize_dialogues(artifacts.dialogues, traced.tokenizer)
    if settings.FACTOR_STRATEGY == "ekfac_cg" or settings.COMPUTE_PER_TOKEN_SCORES:
        require_forward_mode(traced, examples)
    say(f"   {len(examples)} dialogues, {len(traced.linears)} Linears, {traced.tokens_per_batch} tokens per batch")
    constants = (list(traced.linears), settings.SEED, settings.FISHER_POSITIONS)
    task, queries = BackwardTask(*constants), {}
    for name in unfinished:  # before the factors: what cannot be tokenized is found early
        query = TRUST_TASKS[name](*constants)
        queries[query] = tokenize_pairs(pairs[name], traced.tokenizer, query.measurement.max_tokens)
    with locked(factors.path):
        if not has_factors and not is_finished(factors):  # another run may have fitted them meanwhile
            fit(settings, traced, task, examples, factors)
    if not unfinished:
        return
    started = time.monotonic()
    scores, preconditioned, solution = influence(settings, traced, task, examples, queries, factors)
    for query, name in enumerate(unfinished):
        if not is_finished(outputs[name].dialogues):
            sign = "positive: training on the dialogue lowers the measurement; most negative: most harmful"
            facts = {"sign": sign} | ({"residuals": solution.of_query(query)} if solution else {})
            outputs[name].dialogues.save_tensors({SCORES_TENSOR: scores[query : query + 1]}, started, **facts)
    if settings.COMPUTE_PER_TOKEN_SCORES:
        dialogues = traced.loader(examples, cached=True, description="tokens of the training dialogues")
        tokens = score_tokens(traced, dialogues, preconditioned)
        for query, name in enumerate(unfinished):
            of_tokens = {"scores": tokens.scores[query], "offsets": tokens.offsets}
            outputs[name].tokens.save_tensors(of_tokens, started)


def main(settings: Settings) -> None:
    """Trace every model."""
    for model in settings.MODEL_NAMES:
        trace_model(settings, model)


def next_step(settings: Settings) -> str:
    """The command that uses these scores; some only rank, and step 4 preconditions with EKFAC."""
    if settings.FACTOR_STRATEGY in ("identity", "ekfac_cg"):
        return next_command(STEP_4, settings, SCORES_TYPE=settings.FACTOR_STRATEGY, FACTOR_STRATEGY="ekfac")
    return f"{next_command(STEP_2, settings)}\n      (for SCORES_TYPE = 'dpp'; most others go on with {STEP_4})"


if __name__ == "__main__":
    run_step(main, hint=next_step)
