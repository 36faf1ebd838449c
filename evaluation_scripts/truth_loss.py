"""Step 6: the truth log-odds loss of every model in MODEL_NAMES.

    python evaluation_scripts/truth_loss.py
    python evaluation_scripts/truth_loss.py --MODEL_NAMES gradient_ascent_models/NAME --SPLIT train

Writes results/MODEL_truth_SPLIT.json and prints a table. Lower is better.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.console import banner, say
from utils.performance_functions.evaluation import evaluate_models
from utils.reporting import results_table
from utils.settings import Family, Seed, Settings, run_step

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: list[str] = ["data/demo/pythia-demo-sft"]  # models to measure: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # unused here: any causal language model can be measured
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # unused here: nothing in this step is random
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace results that were made from other data or weights

SPLIT: Literal["train", "test"] = "test"  # which half of the data
# -----------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Measure every model and print a table."""
    banner("step 6: truth log-odds loss", f"{settings.SPLIT} split")
    say(results_table(evaluate_models(settings, "truth")))


if __name__ == "__main__":
    run_step(main)
