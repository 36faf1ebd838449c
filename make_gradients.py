"""Step 4: the repair gradient of a chosen subset of training dialogues.

    python make_gradients.py
    python make_gradients.py --TASK_NAME combined --SCORES_TYPE dpp --IF_WEIGHT 10

    G = (F + damping I)^-1 sum_i w_i grad Lbar(z_i),   Lbar = mean token loss

Reads the factors of step 1, and what SCORES_TYPE takes the dialogues and their weights w from. Those of the paper, and
other ways to choose a subset S of BOTTOM_K dialogues to unlearn, w = 1 / BOTTOM_K:

    pure_ekfac       the smallest influence scores of step 1, by the FACTOR_STRATEGY given here (EKFAC by default)
    dpp              the diverse subset of step 3
    random           a seeded uniform sample
    ekfac_cg         the smallest influence scores with the Gauss-Newton matrix itself as curvature (step 1)
    identity         the smallest scores without curvature: plain gradient dot products (step 1)
    representation   the dialogues most similar to the task's untrustworthy answers (representations of step 2)
    mean_difference  the dialogues that lie towards those and away from its trustworthy answers (likewise)
    bm25             the dialogues worded like its untrustworthy and unlike its trustworthy answers

Beyond the paper, by the influence scores of step 1, but for "direct":

    contrast         up the loss of the BOTTOM_K most harmful, down that of the TOP_K most helpful
    weighted         every dialogue by its score
    fitted           every dialogue, with weights that bring the sum of gradients closest to the measurement's
    dpp_weighted     the diverse subset of step 3, each dialogue by its score
    direct           no dialogue: down the measurement itself, on the training pairs

What others do, for comparison; all change the same blocks and are scaled to the same perplexity budget in step 5.
Without curvature, and but for "ga" trained by AdamW for BASELINE_STEPS steps (utils/baselines.py has the formulas):

    ga               plain gradient ascent on the dialogues of "pure_ekfac"
    ga_kl            the same in several steps, with a KL term on retained dialogues
    npo              negative preference optimisation on them, with a term for retained dialogues
    task_vector      minus the change that fine-tuning on them makes
    dpo              direct preference optimisation on the training pairs
    sft_pairs        fine-tuning on their trustworthy answers

Controls:

    descent          down the loss of TOP_K random dialogues
    direct_shuffled  "direct" with the prompts of other pairs, which leaves only the style of good answers to learn
    npo_random       "npo" with random dialogues in place of those of "pure_ekfac", trained like it
    sft_retained     fine-tuning on the retained dialogues of "npo" alone, likewise

With HARMFUL_TOKENS_ONLY, Lbar is the mean over those tokens of a chosen dialogue whose own scores are negative. With
PRESERVE_PERPLEXITY, the component of G that changes the loss of retained dialogues is removed, with PRESERVE_TASKS
those that change the other tasks' measurements (utils/influence/repair_gradient.py). Writes one tensor for each traced
Linear, (1, out, in) or (1, out, in + 1) with the bias last.
"""

from __future__ import annotations

if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time
from functools import partial
from typing import Any, Literal

from steps import next_command, run_step
from tasks import BackwardTask
from utils.batching import LabelledSequence
from utils.console import banner
from utils.devices import resolve_device
from utils.influence.repair_gradient import preconditioner_for, repair_gradient
from utils.influence.scores import require_representable
from utils.influence.traced_model import Gradients, TracedModel, load_traced_model
from utils.locks import locked
from utils.paths import STEP_5
from utils.performance_functions.hh import tokenize_dialogues
from utils.registry import ModelArtifacts
from utils.repair_sources import RepairSources, choose_sources
from utils.repairs import RepairChoice
from utils.settings import (
    Family,
    ModelNames,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RepairTask,
    ScoresType,
    Seed,
    Settings,
    Strategy,
    tasks_of,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: ModelNames = ["data/demo/pythia-demo-sft"]  # POST-SFT models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # where pairs are needed: folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the random subset and the retained dialogues; as in step 1, whose factors are read
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

TASK_NAME: RepairTask = "all"  # "bias", "ethics", "truth", "combined" (their weighted sum), "all" (the three in turn)
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn; the paper's tables use 100
SCORES_TYPE: ScoresType = "pure_ekfac"  # how they are chosen, see above
TOP_K: PositiveInt | None = None  # for "contrast" and "descent": dialogues whose loss goes down; None = 5 x BOTTOM_K
IF_WEIGHT: NonNegativeFloat = 10.0  # for "dpp" and "dpp_weighted": weight of the influence term, as in step 3
HARMFUL_TOKENS_ONLY: bool = False  # True (beyond the paper): of chosen dialogues, only tokens with negative scores
PRESERVE_PERPLEXITY: bool = False  # True (beyond the paper): retained dialogues keep their loss, to first order
PRESERVE_TASKS: bool = False  # True (beyond the paper): the other tasks' measurements stay, to first order
NUM_RETAIN_EXAMPLES: PositiveInt = 500  # retained dialogues at most: PRESERVE_PERPLEXITY, "ga_kl", "npo", its controls
BASELINE_STEPS: PositiveInt = 20  # for baselines that are trained: optimizer steps
BASELINE_RATE: PositiveFloat = 1e-4  # for baselines that are trained: learning rate of AdamW
FIT_ITERATIONS: PositiveInt = 8  # for "fitted": iterations, each one pass over the dialogues
GRADIENT_REDUCTION_TYPE: Literal["mean", "sum"] = "mean"  # over the subset: "mean", "sum" (divided by 100)
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"

FACTOR_STRATEGY: Strategy = "ekfac"  # of step 1: "ekfac", "kfac", "diagonal", "identity", "ekfac_cg" (scores alone)
USE_HALF_PRECISION: bool = False  # which factors of step 1
DAMPING_FACTOR: NonNegativeFloat | None = None  # as in step 1: added to the eigenvalues; None = 0.1 x their mean
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch: a number or "auto"
# -----------------------------------------------------------------------------------------------------------


# -- the gradient ------------------------------------------------------------------------------------------------------


def make_gradient(
    artifacts: ModelArtifacts, traced: TracedModel, examples: list[LabelledSequence], sources: RepairSources
) -> tuple[Gradients, dict[str, Any]]:
    """G of one repair, or the change of weights that a baseline trains in its place; and facts for the manifest.

    The sum over dialogues is `source_gradient` in utils/influence/repair_gradient.py; `repair_gradient` below it
    applies (F + damping I)^-1, and keeps what is to be preserved.

    Args:
        examples: the training dialogues.
        sources: which of them count, with their weights w.
    """
    settings, method = artifacts.settings, RepairChoice.of(artifacts.settings).method
    if method.is_trained:
        from utils.baselines import baseline_data, trained_change

        data = baseline_data(traced, examples, sources)
        training = (settings.BASELINE_STEPS, settings.BASELINE_RATE, settings.SEED)
        return trained_change(settings.SCORES_TYPE, traced, data, *training), sources.facts
    task, precondition = BackwardTask(list(traced.linears)), preconditioner_for(method, artifacts.factors(), traced)
    fit_iterations = settings.FIT_ITERATIONS if method.is_fitted else 0
    return repair_gradient(traced, task, examples, sources, precondition, fit_iterations)


def scaled_by(settings: Settings, sources: RepairSources) -> dict[str, Any]:
    """The constants that can scale a gradient beyond what its numbers can represent."""
    method = RepairChoice.of(settings).method
    scales = {
        "BASELINE_RATE": method.is_trained,
        "DAMPING_FACTOR": method.step == "natural",
        "TASK_WEIGHTS": method.uses_pairs and len(sources.measurements) > 1,
    }
    return settings.pick(*filter(scales.get, scales))


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
            gradient, facts = make_gradient(artifacts, traced, examples, sources)
            constants = scaled_by(settings, sources)
            require_representable(gradient.values(), "the numbers of the repair gradient", constants)
            output.save_tensors(gradient, started, **facts)


def main(settings: Settings) -> None:
    """Make the repair gradients of every model."""
    for model in settings.MODEL_NAMES:
        make_model_gradients(settings, model)


if __name__ == "__main__":
    run_step(main, hint=partial(next_command, STEP_5, LEARNING_RATE="auto"))
