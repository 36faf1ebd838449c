"""`make demo`: train a tiny model, run the steps on the embedded default, and show what the repairs did.

    python data/demo/run_demo.py

Runs data/make_sft_model.py and then evaluation_scripts/paper_tables.py on a small grid; `make tables` runs all of it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import paths
from utils.console import say, shown_path
from utils.settings import PositiveInt, ScoresType, Settings, run_step
from utils.steps import run_script

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # trained on first use
OUTPUT_DIR: str = "."  # where everything goes; relative paths start at the repository
SCORES_TYPES: list[ScoresType] = ["pure_ekfac", "dpp", "random"]  # ways of choosing what to unlearn
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
# -----------------------------------------------------------------------------------------------------------


def main(settings: Settings) -> None:
    """Make the model, repair it, show."""
    started = time.monotonic()
    run_script("data/make_sft_model.py", {"SFT_MODEL_DIR": settings.MODEL_NAME})
    grid = {
        "MODEL_NAMES": [settings.MODEL_NAME],
        "OUTPUT_DIR": settings.OUTPUT_DIR,
        "SCORES_TYPES": settings.SCORES_TYPES,
        "SEEDS": [42],
        "BOTTOM_K": [settings.BOTTOM_K],
        "IF_WEIGHT": [10.0],
    }
    run_script("evaluation_scripts/paper_tables.py", grid)
    say("known harm: how many of the unlearned dialogues are harm of that kind that the demo's data was seeded with.")
    say(f"seconds: {time.monotonic() - started:.0f}")
    say(f"picture: {shown_path(paths.overview_figure(settings.OUTPUT_DIR))}")
    say(f"open {shown_path(paths.results_dir(settings.OUTPUT_DIR) / 'report.html')} in a browser")
    say("next: make tables, for every method, two seeds and the ablations")


if __name__ == "__main__":
    run_step(main)
