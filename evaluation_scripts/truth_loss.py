"""Step 6: the truth log-odds loss of every model in MODEL_NAMES.

    python evaluation_scripts/truth_loss.py
    python evaluation_scripts/truth_loss.py --MODEL_NAMES gradient_ascent_models/NAME --SPLIT train

Writes results/MODEL_truth_SPLIT.json and prints a table, which compares further models with the first.
Lower losses are better.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

from typing import Literal

from steps import run_step
from utils.console import banner, say
from utils.evaluation import evaluate_models
from utils.reporting.tables import results_table
from utils.settings import ModelNames, Settings

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: ModelNames = ["data/demo/pythia-demo-sft"]  # models to measure: hub ids or local folders
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where results go; relative paths start at the repository
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces results that were made from other data or weights

SPLIT: Literal["train", "test"] = "test"  # "train", "test"
# -----------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Measure every model and print a table, which compares further models with the first."""
    banner("step 6: truth log-odds loss", f"{settings.SPLIT} split")
    say(results_table("truth", evaluate_models(settings, "truth")))


if __name__ == "__main__":
    run_step(main)
