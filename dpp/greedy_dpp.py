"""Step 3: pick a diverse subset of harmful training dialogues.

    python dpp/greedy_dpp.py
    python dpp/greedy_dpp.py --TASK_NAME combined --BOTTOM_K 50 --KERNEL rff

Reads the scores of step 1 and the representations of step 2. Maximises, greedily,

    log det(I + K_S) + IF_WEIGHT * log(1 + sum_{i in S} q_i),   q = -score, min-max normalised to [0, 1]

and writes the indices in pick order with each pick's gain in both terms.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.console import banner
from utils.paths import STEP_4
from utils.pipeline import Pipeline, tasks_of
from utils.selection import (
    FourierKernel,
    Kernel,
    RBFKernel,
    centred,
    greedy_dpp,
    median_heuristic_gamma,
    min_max_normalise,
    require_enough,
)
from utils.settings import (
    Family,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    RepairTask,
    Seed,
    Settings,
    Strategy,
    run_step,
)
from utils.steps import next_command

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # of the random features and of the sample behind GAMMA
DEVICE: str = "auto"  # unused here: the greedy runs on the CPU
OVERWRITE: bool = False  # replace artefacts that were made with other settings

TASK_NAME: RepairTask = "all"  # whose scores; "combined" is the weighted sum, "all" does the three in turn
BOTTOM_K: PositiveInt = 20  # dialogues to pick; the paper's tables use 100
IF_WEIGHT: NonNegativeFloat = 10.0  # weight of the influence term against diversity
KERNEL: Literal["rbf", "rff"] = "rbf"  # exact kernel, or random Fourier features as in the paper
NUM_FEATURES: PositiveInt = 2_048  # random Fourier features, for "rff"
GAMMA: PositiveFloat | None = None  # kernel width; None = 1 / median(pairwise distance)^2
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"
FACTOR_STRATEGY: Strategy = "ekfac"  # the scores of which strategy, as in step 1
USE_HALF_PRECISION: bool = False  # the scores of which precision, as in step 1
# -----------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Pick a subset for every task."""
    started = time.monotonic()
    pipeline = Pipeline.of(settings, settings.MODEL_NAME)
    require_enough(settings.BOTTOM_K, len(pipeline.dialogues))
    kernel: Kernel | None = None
    for task in tasks_of(settings.TASK_NAME):
        banner("step 3: diverse subset", f"{task}, {settings.MODEL_NAME}")
        scores, fingerprints = pipeline.ranking_scores(task)
        representations_fingerprint = pipeline.representations().require()["fingerprint"]
        output = pipeline.dpp(task, **fingerprints, representations=representations_fingerprint)
        if output.is_finished(settings.OVERWRITE):
            continue
        if kernel is None:
            representations = centred(pipeline.representations().load_tensors()["representations"])
            gamma = settings.GAMMA or median_heuristic_gamma(representations, settings.SEED)
            if settings.KERNEL == "rbf":
                kernel = RBFKernel(representations, gamma)
            else:
                kernel = FourierKernel(representations, gamma, settings.NUM_FEATURES, settings.SEED)
        subset = greedy_dpp(kernel, min_max_normalise(-scores), settings.BOTTOM_K, settings.IF_WEIGHT)
        output.save_json(
            {
                "indices": subset.indices,
                "diversity_gains": subset.diversity_gains,
                "influence_gains": subset.influence_gains,
                "objective": subset.objective,
                "gamma": gamma,
            },
            started,
        )


if __name__ == "__main__":
    run_step(main, next_command=partial(next_command, STEP_4, SCORES_TYPE="dpp"))
