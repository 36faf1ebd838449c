"""Step 4: the repair gradient of a chosen subset of training dialogues.

    python make_gradients.py
    python make_gradients.py --TASK_NAME combined --SCORES_TYPE dpp --IF_WEIGHT 10

    G = (F + damping I)^-1 mean_{i in S} grad Lbar(z_i),   Lbar = mean token loss

Reads the factors of step 1, and what SCORES_TYPE chooses the subset S by:

    pure_ekfac       the smallest influence scores (step 1)
    dpp              the diverse subset of step 3
    random           a seeded uniform sample
    ekfac_cg         the smallest influence scores with the Gauss-Newton matrix itself as curvature (step 1)
    identity         the smallest scores without curvature: plain gradient dot products (step 1)
    representation   the dialogues most similar to the task's untrustworthy answers (representations of step 2)
    mean_difference  the dialogues that lie towards those and away from its trustworthy answers (likewise)
    bm25             the dialogues worded like its untrustworthy and unlike its trustworthy answers
    direct           no subset: the gradient is minus that of the measurement itself, on the training pairs

With HARMFUL_TOKENS_ONLY, Lbar is the mean over those tokens of a chosen dialogue whose own scores are negative. With
PRESERVE_PERPLEXITY, the component of G that changes the loss of retained dialogues is removed. Writes one tensor
for each traced Linear, (1, out, in) or (1, out, in + 1) with the bias last.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from steps import next_command, run_step
from tasks import BackwardTask
from utils.artifacts import Artifact
from utils.batching import LabelledSequence
from utils.console import UserError, banner
from utils.devices import resolve_device
from utils.files import fingerprint_of
from utils.influence.conjugate_gradient import inner_products
from utils.influence.preconditioning import load_preconditioner
from utils.influence.scores import mean_measurement_gradient, require_representable
from utils.influence.traced_model import Gradients, TracedModel, load_traced_model
from utils.locks import locked
from utils.paths import STEP_1, STEP_5, resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import require_labels, tokenize_dialogues
from utils.performance_functions.pairs import AnswerPairs, tokenize_pairs
from utils.rankings import token_scores
from utils.registry import ModelArtifacts
from utils.selection import choose_subset, held_out_rows
from utils.settings import (
    Family,
    ModelNames,
    NonNegativeFloat,
    PositiveInt,
    RepairTask,
    ScoresType,
    Seed,
    Settings,
    Strategy,
    task_weights,
    tasks_of,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: ModelNames = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # for "direct" and "bm25": folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the random subset and the retained dialogues; as in step 1, whose factors are read
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

TASK_NAME: RepairTask = "all"  # "bias", "ethics", "truth", "combined" (their weighted sum), "all" (the three in turn)
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn; the paper's tables use 100
SCORES_TYPE: ScoresType = "pure_ekfac"  # how they are chosen, see above
IF_WEIGHT: NonNegativeFloat = 10.0  # for "dpp": weight of the influence term, as in step 3
HARMFUL_TOKENS_ONLY: bool = False  # True (beyond the paper): of chosen dialogues, only tokens with negative scores
PRESERVE_PERPLEXITY: bool = False  # True (beyond the paper): retained dialogues keep their loss, to first order
NUM_RETAIN_EXAMPLES: PositiveInt = 500  # for PRESERVE_PERPLEXITY: retained dialogues, at most
GRADIENT_REDUCTION_TYPE: Literal["mean", "sum"] = "mean"  # over the subset: "mean", "sum" (divided by 100)
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"

FACTOR_STRATEGY: Strategy = "ekfac"  # of step 1: "ekfac", "kfac", "diagonal", "identity", "ekfac_cg" (scores alone)
USE_HALF_PRECISION: bool = False  # which factors of step 1
DAMPING_FACTOR: NonNegativeFloat | None = None  # as in step 1: added to the eigenvalues; None = 0.1 x their mean
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch: a number or "auto"
# -----------------------------------------------------------------------------------------------------------

SUM_DIVISOR = 100  # makes the "sum" over the paper's 100 dialogues their mean


# -- which dialogues ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientSources:
    """What a repair gradient is computed from.

    Attributes:
        weights: of the measurements that the model is repaired for.
        indices: rows of the training dialogues to unlearn.
        retained: rows of the training dialogues whose loss must not change, for PRESERVE_PERPLEXITY.
        pairs: training pairs by measurement, for "direct".
        tokens: for HARMFUL_TOKENS_ONLY, the scores of all tokens and where each dialogue's begin.
        token_fingerprints: of those scores, by task.
    """

    weights: dict[str, float]
    indices: list[int]
    retained: list[int]
    pairs: dict[str, AnswerPairs]
    tokens: tuple[torch.Tensor, torch.Tensor] | None
    token_fingerprints: dict[str, str]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of all but the weights."""
        retained = {"retained": fingerprint_of(self.retained)} if self.retained else {}
        of_pairs = {name: pairs.fingerprint for name, pairs in self.pairs.items()}
        subset = {"pairs": fingerprint_of(of_pairs)} if self.pairs else {"subset": fingerprint_of(self.indices)}
        return {**subset, **retained, **self.token_fingerprints}


def choose_sources(artifacts: ModelArtifacts, task: str) -> GradientSources:
    """The dialogues, and for "direct" the answer pairs, that the gradient is computed from."""
    settings, total, pairs, retained = artifacts.settings, len(artifacts.dialogues), {}, []
    tokens, token_fingerprints = None, {}
    if settings.HARMFUL_TOKENS_ONLY:
        if settings.SCORES_TYPE == "direct":
            raise UserError("HARMFUL_TOKENS_ONLY = True: SCORES_TYPE 'direct' has no dialogues; choose another")
        *tokens, token_fingerprints = token_scores(artifacts, task)
    weights, indices = task_weights(settings, task), choose_subset(artifacts, task)
    if settings.SCORES_TYPE == "direct":
        data_dir = resolve_path(settings.DATA_DIR)
        pairs = {name: MEASUREMENTS[name].load_pairs(data_dir, "train") for name in weights}
    if settings.PRESERVE_PERPLEXITY:
        retained = held_out_rows("retain", indices, total, settings.NUM_RETAIN_EXAMPLES, settings.SEED)
    return GradientSources(weights, indices, retained, pairs, tokens, token_fingerprints)


# -- their gradient ----------------------------------------------------------------------------------------------------


def with_harmful_tokens(
    examples: list[LabelledSequence], indices: list[int], scores: torch.Tensor, offsets: torch.Tensor
) -> tuple[dict[int, LabelledSequence], dict[str, int]]:
    """The chosen dialogues that have tokens with negative scores, with those alone as labels (as in IF-Guide, 2025).

    Args:
        scores: (total tokens,) of all dialogues.
        offsets: (N + 1,) where each dialogue's tokens begin.

    Returns:
        The dialogues by their row, and for the manifest how many of their labels are harmful.

    Raises:
        UserError: no chosen dialogue has a harmful token, or the scores are of other dialogues.
    """
    chosen, num_labels = {}, 0
    for row in indices:
        example, begin = examples[row], int(offsets[row])
        if int(offsets[row + 1]) - begin != len(example.input_ids):
            raise UserError(
                f"the token scores are of a dialogue {row} with {int(offsets[row + 1]) - begin} tokens, and it has "
                f"{len(example.input_ids)}: run {STEP_1} --COMPUTE_PER_TOKEN_SCORES True --OVERWRITE True"
            )
        labels = slice(begin + example.label_start, begin + example.label_end)
        harmful = replace(example, is_counted=(scores[labels] < 0).numpy())
        num_labels += example.num_labels
        if harmful.num_labels:
            chosen[row] = harmful
    if not chosen:
        raise UserError(
            f"HARMFUL_TOKENS_ONLY = True: no token of the {len(indices)} chosen dialogues has a negative score; "
            "set it to False, or choose by another SCORES_TYPE"
        )
    return chosen, {"harmful": sum(example.num_labels for example in chosen.values()), "of": num_labels}


def subset_gradient(
    traced: TracedModel, task: BackwardTask, examples: list[LabelledSequence], indices: list[int], reduction: str
) -> Gradients:
    """mean_{i in S} grad Lbar(z_i), or the sum over S divided by 100; (1, out, in) for each Linear."""
    require_labels([examples[i] for i in indices], f"the subset of BOTTOM_K = {len(indices)}")
    loader = traced.loader(examples, indices=indices, description="subset")
    factor = 1.0 if reduction == "mean" else len(indices) / SUM_DIVISOR
    return {name: mean * factor for name, mean in mean_measurement_gradient(traced, task, loader).items()}


def retained_gradient(
    traced: TracedModel, task: BackwardTask, examples: list[LabelledSequence], rows: list[int]
) -> Gradients:
    """R: gradient of the mean NLL of the retained dialogues' label tokens, whose exp is their perplexity."""
    num_labels = np.array([sequence.num_labels for sequence in examples], dtype=float)
    weights = num_labels / max(1.0, num_labels[rows].sum())
    loader = traced.loader(examples, indices=rows, weights=weights, description="retained")
    return mean_measurement_gradient(traced, task, loader)


def direct_gradient(
    traced: TracedModel, task: BackwardTask, pairs: dict[str, AnswerPairs], weights: dict[str, float]
) -> Gradients:
    """-grad sum_t weight_t f_t over the training pairs, so that a step up it is a step down the measurements."""
    total: Gradients = {}
    for name, weight in weights.items():
        tokenized = tokenize_pairs(pairs[name], traced.tokenizer, MEASUREMENTS[name].max_tokens)
        loader = traced.loader(tokenized.sequences, weights=tokenized.weights, description=f"{name} pairs")
        gradients = mean_measurement_gradient(traced, task, loader)
        total = {module: total.get(module, 0) - weight * gradient for module, gradient in gradients.items()}
    return total


def inner_product(a: Gradients, b: Gradients) -> float:
    """<a, b> over all modules, summed in float64."""
    return float(inner_products(a, b).sum())


def preserving_direction(gradients: Gradients, preconditioned: Gradients) -> tuple[Gradients, float]:
    """The subset's natural gradient without the part that moves the loss of the retained dialogues.

    D = P (G - alpha R), alpha = <R, P G> / <R, P R>, so that <R, D> = 0: to first order the retained loss stays.
    Beyond the paper. If <R, P R> is 0, nothing is subtracted.

    Args:
        gradients: (2, out, in) for each module: G of the subset, R of the retained dialogues.
        preconditioned: P applied to both.

    Returns:
        D, (1, out, in) for each module, and alpha.
    """
    retained = {name: pair[1:] for name, pair in gradients.items()}
    subset_step = {name: pair[:1] for name, pair in preconditioned.items()}
    retained_step = {name: pair[1:] for name, pair in preconditioned.items()}
    curvature = inner_product(retained, retained_step)
    alpha = inner_product(retained, subset_step) / curvature if curvature else 0.0
    return {name: step - alpha * retained_step[name] for name, step in subset_step.items()}, alpha


def repair_gradient(
    settings: Settings,
    traced: TracedModel,
    examples: list[LabelledSequence],
    sources: GradientSources,
    factors: Artifact,
) -> tuple[Gradients, dict[str, Any]]:
    """G = P grad, the preconditioned gradient of the sources; with retained dialogues the preserving direction.

    Returns:
        G, (1, out, in) for each Linear, and facts for the manifest.
    """
    task = BackwardTask(list(traced.linears))
    facts: dict[str, Any] = {"indices": sources.indices, "retained": sources.retained}
    if settings.SCORES_TYPE == "direct":
        gradient = direct_gradient(traced, task, sources.pairs, sources.weights)
    else:
        indices, chosen = sources.indices, examples
        if sources.tokens:
            harmful, facts["tokens"] = with_harmful_tokens(examples, indices, *sources.tokens)
            indices, chosen = list(harmful), [harmful.get(row, example) for row, example in enumerate(examples)]
        gradient = subset_gradient(traced, task, chosen, indices, settings.GRADIENT_REDUCTION_TYPE)
    precondition = load_preconditioner(factors, traced)
    if not sources.retained:
        return precondition(gradient), facts
    retained = retained_gradient(traced, task, examples, sources.retained)
    both = {name: torch.cat([gradient[name], retained[name]]) for name in gradient}  # (2, out, in)
    direction, facts["alpha"] = preserving_direction(both, precondition(both))
    return direction, facts


# -- the step ----------------------------------------------------------------------------------------------------------


def make_model_gradients(settings: Settings, model: str) -> None:
    """The repair gradients of one model, which is loaded when the first of them is to be computed."""
    device, artifacts = resolve_device(settings.DEVICE), ModelArtifacts(settings, model)
    made_with = artifacts.factors().require()["settings"]  # NUM_BLOCKS and the like
    artifacts = artifacts.with_constants({**made_with, **settings.pick("FACTOR_STRATEGY")})
    traced: TracedModel | None = None
    for task_name in tasks_of(settings.TASK_NAME):
        banner("step 4: repair gradient", f"{task_name}, {settings.SCORES_TYPE}, {model}")
        sources = choose_sources(artifacts, task_name)
        output = artifacts.gradients(task_name, **sources.fingerprints, dataset=artifacts.dialogues.fingerprint)
        with locked(output.path):
            if output.is_finished(settings.OVERWRITE):
                continue
            if traced is None:
                traced = load_traced_model(artifacts.settings, model, device)
                examples = tokenize_dialogues(artifacts.dialogues, traced.tokenizer)
            started = time.monotonic()
            gradient, facts = repair_gradient(settings, traced, examples, sources, artifacts.factors())
            scaling = [
                "DAMPING_FACTOR",
                *["TASK_WEIGHTS"] * (settings.SCORES_TYPE == "direct" and len(sources.weights) > 1),
            ]
            require_representable(gradient.values(), "the numbers of the repair gradient", settings.pick(*scaling))
            output.save_tensors(gradient, started, **facts)


def main(settings: Settings) -> None:
    """Make the repair gradients of every model."""
    for model in settings.MODEL_NAMES:
        make_model_gradients(settings, model)


if __name__ == "__main__":
    run_step(main, hint=partial(next_command, STEP_5, LEARNING_RATE="auto"))
