"""`make demo`: train a tiny model, trace and repair it on the embedded data, and show the results.

    python data/demo/run_demo.py

Runs data/make_sft_model.py and then evaluation_scripts/paper_tables.py on a small grid; `make tables` runs the whole
grid.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time

from steps import run_script, run_step
from utils import paths
from utils.console import say, shown_path
from utils.settings import Choices, PositiveInt, ScoresType, Settings

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # trained on first use
OUTPUT_DIR: str = "."  # folder for all output; a relative path is relative to the repository
SCORES_TYPES: Choices[ScoresType] = ["pure_ekfac", "dpp", "contrast", "random"]  # also: "fitted", "identity", "direct"
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
# -----------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Make the model, repair it, and say where the results are."""
    started = time.monotonic()
    run_script(paths.STEP_0, {"SFT_MODEL_DIR": settings.MODEL_NAME, **settings.pick("TRUST_REMOTE_CODE")})
    grid = {
        "MODEL_NAMES": [settings.MODEL_NAME],
        "OUTPUT_DIR": settings.OUTPUT_DIR,
        "SCORES_TYPES": settings.SCORES_TYPES,
        "SEEDS": [42],
        "BOTTOM_K": [settings.BOTTOM_K],
        "IF_WEIGHT": [10.0],
        "PRESERVE_PERPLEXITY": [False],
        **settings.pick("TRUST_REMOTE_CODE"),
    }
    run_script(paths.PAPER_TABLES, grid)
    say("known harm: how many of the unlearned dialogues are harmful ones that were planted in the demo's data.")
    say(f"seconds: {time.monotonic() - started:.0f}")
    say(f"picture: {shown_path(paths.overview_figure(settings.OUTPUT_DIR))}")
    say(f"open {shown_path(paths.html_report(settings.OUTPUT_DIR))} in a browser")
    say("next: make tables, which runs six methods, two seeds and the ablations")


if __name__ == "__main__":
    run_step(main)
