"""After the steps: does the tracing find what did the harm? The model is fine-tuned again without some dialogues.

    python evaluation_scripts/validate_scores.py
    python evaluation_scripts/validate_scores.py --SCORES_TYPES pure_ekfac bm25 --REMOVED_TYPES bm25 --NUM_SUBSETS 20

Linear datamodelling score (LDS): over NUM_SUBSETS random halves of the dialogues, how well the summed scores of a half
rank the measurement of the model that was fine-tuned on it. Counterfactual: the measurement after fine-tuning without
the BOTTOM_K most harmful dialogues, and without the most helpful ones, against as many random ones.

Every retraining is kept on its own, and serves all SCORES_TYPES. A run that was killed goes on with the next one, and
several runs of the same command, one for each GPU say, share the retrainings between them. Writes results/validation/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import rankdata

from steps import run_script, run_step
from utils import paths
from utils.console import UserError, banner, say, shown_path
from utils.intervals import estimate_values
from utils.locks import locked
from utils.methods import default_strategy
from utils.rankings import task_scores
from utils.registry import ModelArtifacts
from utils.reporting.validation import TRAINED_AGAIN, lds_table, removal_table, validation_figure
from utils.retraining import Measured, Retrainer, Retraining
from utils.selection import most_harmful, random_subset
from utils.settings import (
    TASK_NAMES,
    Choices,
    Family,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RankingType,
    Seed,
    Settings,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model whose scores are checked: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the steps, the halves and the random removals
DEVICE: str = "auto"  # "auto", "cpu", "cuda"
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

SCORES_TYPES: Choices[RankingType] = [  # those that give each dialogue a score, as in step 4
    "pure_ekfac",
    "ekfac_cg",
    "identity",
    "bm25",
    "representation",
    "mean_difference",
]
NUM_SUBSETS: PositiveInt = 60  # random halves of the dialogues
NUM_REPEATS: PositiveInt = 2  # retrainings of each half, with other orders; from 2 on the ceiling is known
REMOVED_TYPES: Choices[RankingType] = ["pure_ekfac", "ekfac_cg", "bm25"]  # of SCORES_TYPES: most harmful removed
HELPFUL_TYPES: Choices[RankingType] = ["pure_ekfac"]  # of SCORES_TYPES: most helpful removed
BOTTOM_K: PositiveInt = 20  # dialogues to remove
TRAINING_SEEDS: Choices[Seed] = [0, 1, 2, 3, 4]  # orders of the dialogues in those retrainings

NUM_BLOCKS: PositiveInt = 1  # as in step 1
DAMPING_FACTOR: NonNegativeFloat | None = None  # as in step 1
USE_HALF_PRECISION: bool = False  # as in step 1

BASE_MODEL: str = "pythia-demo"  # from here on as in data/make_sft_model.py when it made MODEL_NAME
TOKENIZER: str | None = "data/demo/tokenizer"  # for a bare architecture
NUM_EPOCHS: PositiveInt = 4  # passes over what is left of the training split
BATCH_SIZE: PositiveInt = 16  # dialogues per optimizer step
BATCH_SIZE_PER_DEVICE: PositiveInt = 16  # most dialogues per forward pass; fewer take less memory
GRADIENT_CHECKPOINTING: bool = False  # recompute activations in the backward pass: less memory, a third more time
LEARNING_RATE: PositiveFloat = 2e-3  # peak
SAVE_EVERY: PositiveInt = 500  # optimizer steps between the checkpoints that a killed retraining resumes from
BASE_SEED: Seed = 42  # SEED there: of a bare architecture's random weights
# -----------------------------------------------------------------------------------------------------------

NUM_RESAMPLES = 2_000  # of the bootstrap
FEWEST_SUBSETS = 5  # a rank correlation of fewer says nothing
STEP_CONSTANTS = ("MODEL_NAME", "MODEL_FAMILY", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR", "SEED", "DEVICE", "OVERWRITE")
STEP_CONSTANTS += ("NUM_BLOCKS", "DAMPING_FACTOR", "USE_HALF_PRECISION", "TRUST_REMOTE_CODE")
Direction = Literal["harmful", "helpful"]


# -- retrainings on halves ---------------------------------------------------------------------------------------------


def random_halves(settings: Settings, total: int) -> list[list[int]]:
    """NUM_SUBSETS seeded random halves of the rows."""
    return [
        sorted(random.Random(f"half {settings.SEED} {number}").sample(range(total), total // 2))
        for number in range(settings.NUM_SUBSETS)
    ]


def retrainings_on_halves(settings: Settings, halves: Sequence[list[int]]) -> list[list[Retraining]]:
    """A retraining of every half, for each repeat, in another order."""
    return [
        [
            Retraining(f"half-{number}-{repeat}", rows, seed=1_000 * (repeat + 1) + number)
            for number, rows in enumerate(halves)
        ]
        for repeat in range(settings.NUM_REPEATS)
    ]


def without(name: str, removed: Sequence[int], total: int, seed: int) -> Retraining:
    """A retraining on all rows but some."""
    gone = set(removed)
    return Retraining(f"{name}-{seed}", [row for row in range(total) if row not in gone], seed)


# -- linear datamodelling score ----------------------------------------------------------------------------------------


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis, with mean ranks for ties; 0 where a side is constant."""
    a, b = (rankdata(values, axis=-1) for values in (a, b))
    a, b = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (a, b))
    norm = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), norm, out=np.zeros_like(norm), where=norm > 0)


def resampled_spearman(predicted: np.ndarray, measured: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """LDS of each task (Park et al. 2023): the rank correlation of predictions with one retraining of each subset.

    Args:
        predicted: (tasks, S) for each subset, higher where the scores promise a lower measurement.
        measured: (repeats, tasks, S) minus the measurement of each retraining.

    Returns:
        (tasks,) averaged over the repeats, and (NUM_RESAMPLES, tasks) the same for subsets drawn with replacement, the
        same draws for whatever is predicted, so that differences are paired.
    """
    num_subsets = predicted.shape[-1]
    draws = np.random.default_rng(seed).integers(num_subsets, size=(NUM_RESAMPLES, num_subsets))
    value = spearman(np.broadcast_to(predicted, measured.shape), measured).mean(axis=0)
    resamples = [
        spearman(predicted[task, draws][None], measured[:, task][:, draws]).mean(axis=0)
        for task in range(len(predicted))
    ]
    return value, np.stack(resamples, axis=1)


def with_bootstrap(values: np.ndarray, resamples: np.ndarray) -> list[dict[str, float]]:
    """Each value, and the mean of all, with the ends of its 95 % percentile interval (Efron and Tibshirani 1993)."""
    values, resamples = np.append(values, values.mean()), np.c_[resamples, resamples.mean(axis=1)]
    ends = np.quantile(resamples, (0.025, 0.975), axis=0)
    return [
        {"value": float(value), "low": float(low), "high": float(high)}
        for value, low, high in zip(values, *ends, strict=True)
    ]


def lds_rows(
    settings: Settings, scores: dict[str, torch.Tensor], halves: Sequence[list[int]], measured: list[list[Measured]]
) -> Iterator[dict[str, Any]]:
    """The LDS of every SCORES_TYPE and its difference from pure_ekfac's, on the pairs of both splits; then the ceiling.

    The ceiling is the rank correlation r of two retrainings of the same halves, a mean over all pairs of repeats. Even
    the expected measurement would predict a single retraining with a correlation of about sqrt(r) only.

    Args:
        scores: (tasks, N) by SCORES_TYPE.
        measured: of every half, for each repeat.
    """
    for split in ("train", "test"):
        losses = [[[m[f"{task}_{split}"] for m in repeat] for task in TASK_NAMES] for repeat in measured]
        goodness = -np.array(losses)  # (repeats, tasks, S)
        resampled = {}
        for scores_type, of_type in scores.items():
            sums = np.stack([of_type[:, rows].double().sum(dim=1).numpy() for rows in halves], axis=1)  # (tasks, S)
            resampled[scores_type] = resampled_spearman(sums, goodness, settings.SEED)
        for scores_type, of_type in resampled.items():
            row = {"split": split, "predicted_by": scores_type, "lds": with_bootstrap(*of_type)}
            if "pure_ekfac" in resampled and scores_type != "pure_ekfac":
                against = zip(of_type, resampled["pure_ekfac"], strict=True)
                row["against_pure_ekfac"] = with_bootstrap(*(a - b for a, b in against))[-1]
            yield row
        if len(measured) > 1:
            pairs = itertools.combinations(goodness, 2)
            again = [resampled_spearman(one, other[None], settings.SEED) for one, other in pairs]
            mean = (np.mean(part, axis=0) for part in zip(*again, strict=True))
            yield {"split": split, "predicted_by": TRAINED_AGAIN, "lds": with_bootstrap(*mean)}


# -- counterfactuals ---------------------------------------------------------------------------------------------------


def removals(
    settings: Settings, scores: dict[str, torch.Tensor], total: int
) -> dict[tuple[str, str, Direction | None], list[Retraining]]:
    """The retrainings without some dialogues, one for each seed, by task, SCORES_TYPE and direction.

    ("", "none", None) removes nothing, and ("", "random", None) as many random dialogues, others for each seed.
    """
    k, seeds = settings.BOTTOM_K, settings.TRAINING_SEEDS
    planned: dict[tuple[str, str, Direction | None], list[Retraining]] = {
        ("", "none", None): [without("whole", [], total, seed) for seed in seeds],
        ("", "random", None): [
            without(f"without-{k}-random", random_subset(total, k, 1_000 * settings.SEED + seed), total, seed)
            for seed in seeds
        ],
    }
    chosen = [("harmful", 1, name) for name in settings.REMOVED_TYPES]
    chosen += [("helpful", -1, name) for name in settings.HELPFUL_TYPES]
    for direction, sign, scores_type in chosen:
        for task, of_task in zip(TASK_NAMES, scores[scores_type], strict=True):
            rows = most_harmful(sign * of_task.double(), k)
            name = f"without-{k}-{direction}-{task}-{scores_type}"
            planned[task, scores_type, direction] = [without(name, rows, total, seed) for seed in seeds]
    return planned


def removal_rows(
    planned: dict[tuple[str, str, Direction | None], list[Retraining]], measured: dict[str, Measured]
) -> Iterator[dict[str, Any]]:
    """What each removal changed on the test split, against fine-tuning on all dialogues, with intervals over the seeds.

    `improvement` is before - after of the task's loss; `beyond_random` the same less that of as many random dialogues,
    paired by seed; `log_perplexity` the change of the HH loss.
    """

    def losses(retrainings: Sequence[Retraining], name: str) -> np.ndarray:
        return np.array([measured[one.name][name] for one in retrainings])

    whole, at_random = planned["", "none", None], planned["", "random", None]
    for (task, scores_type, direction), retrainings in planned.items():
        if scores_type == "none":
            continue
        row: dict[str, Any] = {"task": task, "scores_type": scores_type, "direction": direction}
        for name in TASK_NAMES:
            before, after = losses(whole, f"{name}_test"), losses(retrainings, f"{name}_test")
            row |= estimate_values(before - after).fields(f"{name}_improvement")
            beyond = losses(at_random, f"{name}_test") - after
            row |= estimate_values(beyond).fields(f"{name}_beyond_random")
        change = losses(retrainings, "anthropic_test") - losses(whole, "anthropic_test")
        yield row | estimate_values(change).fields("log_perplexity")


# -- the step ----------------------------------------------------------------------------------------------------------


def make_scores(settings: Settings, artifacts: ModelArtifacts) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The scores (tasks, N) of every SCORES_TYPE, from steps 1 and 2, and the seconds that they took for all tasks."""
    common = settings.pick(*STEP_CONSTANTS)
    for strategy in filter(None, map(default_strategy, settings.SCORES_TYPES)):
        run_script(paths.STEP_1, common, FACTOR_STRATEGY=strategy)
    if {"representation", "mean_difference"} & {*settings.SCORES_TYPES}:
        run_script(paths.STEP_2, common, ANSWERS_OF="all")
    scores, seconds = {}, {}
    for scores_type in settings.SCORES_TYPES:
        started = time.monotonic()
        scored = [task_scores(artifacts, scores_type, task) for task in TASK_NAMES]
        scores[scores_type] = torch.stack([of_task for of_task, _ in scored])
        seconds[scores_type] = seconds_in_steps(artifacts, scores_type) or time.monotonic() - started
    return scores, seconds


def seconds_in_steps(artifacts: ModelArtifacts, scores_type: RankingType) -> float | None:
    """What all tasks' scores took in steps 1 and 2, from their manifests; None where no step makes them."""
    if scores_type == "bm25":
        return None
    if scores_type in ("representation", "mean_difference"):
        sides = ("rejected",) if scores_type == "representation" else ("chosen", "rejected")
        answers = [artifacts.answer_representations(task, side) for task in TASK_NAMES for side in sides]
        return sum(artifact.require()["seconds"] for artifact in [artifacts.representations(), *answers])
    strategy = default_strategy(scores_type)
    in_one_pass = max(artifacts.scores(task, strategy).require()["seconds"] for task in TASK_NAMES)
    return in_one_pass + (0 if scores_type == "identity" else artifacts.factors().require()["seconds"])


def require_possible(settings: Settings, total: int) -> None:
    """Check that what is removed is among what is scored, and that enough is left of the `total` dialogues.

    Raises:
        UserError: names the constant.
    """
    if total < 2 * settings.BOTTOM_K:
        raise UserError(
            f"BOTTOM_K = {settings.BOTTOM_K}: there are {total} training dialogues; allowed: 1 to {total // 2}"
        )
    if settings.NUM_SUBSETS < FEWEST_SUBSETS:
        raise UserError(f"NUM_SUBSETS = {settings.NUM_SUBSETS}: allowed are whole numbers from {FEWEST_SUBSETS}")
    for name in ("REMOVED_TYPES", "HELPFUL_TYPES"):
        if unknown := [one for one in getattr(settings, name) if one not in settings.SCORES_TYPES]:
            raise UserError(f"{name} has {unknown[0]!r}; allowed are those of SCORES_TYPES: {settings.SCORES_TYPES}")


def main(settings: Settings) -> None:
    """Retrain, score, and compare."""
    banner("validation of the scores", settings.MODEL_NAME)
    artifacts = ModelArtifacts(settings, settings.MODEL_NAME).with_constants({"FACTOR_STRATEGY": "ekfac"})
    total = len(artifacts.dialogues)
    require_possible(settings, total)
    retrainer, halves = Retrainer(settings, artifacts), random_halves(settings, total)
    scores, seconds = make_scores(settings, artifacts)
    on_halves, planned = retrainings_on_halves(settings, halves), removals(settings, scores, total)
    measured = retrainer.run_all([one for some in (*on_halves, *planned.values()) for one in some])

    of_halves = [[measured[one.name] for one in repeat] for repeat in on_halves]
    rows = list(lds_rows(settings, scores, halves, of_halves))
    changes = list(removal_rows(planned, measured))
    folder = paths.validation_dir(settings.OUTPUT_DIR, artifacts.name)
    tables = {f"lds_{split}": lds_table(rows, split, seconds, settings) for split in ("test", "train")}
    tables["removal"] = removal_table(changes, settings)
    with locked(folder / "tables"):
        for name, table in tables.items():
            table.write(folder / name)
        validation_figure(rows, changes, folder / "validation.png")
    for table in tables.values():
        say(f"\n{table.markdown()}")
    say(f"tables and picture: {shown_path(folder)}")


if __name__ == "__main__":
    run_step(main)
