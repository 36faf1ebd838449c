"""What other settings do for the baselines: more steps, a higher learning rate, each at the same perplexity budget.

    python studies/baselines.py

The baselines are trained by AdamW, and step 5 scales the change of weights that comes out. So the learning rate and the
number of steps choose its direction, not its length. Each setting is compared with the paper's direction and with
`direct` (studies/methods.py). The best of several settings on the same test pairs flatters a baseline, if anything.
As committed: 6 settings of 7 methods for 3 tasks.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import itertools
from typing import Any

from steps import run_script, run_step
from studies.comparison import REFERENCE, comparison_table
from studies.copying import copy_new
from studies.methods import rows_at_budget
from utils.console import UserError, banner, say, shown_path
from utils.kept_model import keep_model
from utils.methods import TRAINED
from utils.paths import STEP_1, experiments_dir, resolve_path
from utils.repairs import RepairChoice
from utils.reporting.tables import Row
from utils.settings import Choices, OneTask, PositiveFloat, PositiveInt, ScoresType, Settings

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "studies/output/baselines"  # folder for results
TASKS: Choices[OneTask] = ["bias", "ethics", "truth"]  # that models are repaired for: also "combined"
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
SCORES_TYPES: Choices[ScoresType] = [  # those that are trained
    "npo",
    "npo_random",
    "sft_retained",
    "ga_kl",
    "task_vector",
    "dpo",
    "sft_pairs",
]
BASELINE_STEPS: Choices[PositiveInt] = [20, 100, 400]  # optimizer steps, as in step 4
BASELINE_RATES: Choices[PositiveFloat] = [1e-4, 1e-3]  # learning rates of AdamW, each with every number of steps
# -----------------------------------------------------------------------------------------------------------


def rows_of_setting(settings: Settings, common: dict[str, Any], num_steps: int, rate: float) -> list[Row]:
    """Every baseline with one setting, in a folder of its own, since file names do not say the setting."""
    folder = f"{settings.OUTPUT_DIR}/baselines/{num_steps}-steps-at-{rate:g}"
    copy_new(experiments_dir(settings.OUTPUT_DIR), experiments_dir(folder), "query_grads_*")  # factors and scores
    choices = [RepairChoice(name, settings.BOTTOM_K) for name in settings.SCORES_TYPES]
    constants = {**common, "OUTPUT_DIR": folder, "BASELINE_STEPS": num_steps, "BASELINE_RATE": rate}
    rows = rows_at_budget(constants, settings.TASKS, choices)
    return [{**row, "method": f"{row['method']}, {num_steps} steps at {rate:g}"} for row in rows]


def main(settings: Settings) -> None:
    """Trace the model, then repair it by every baseline with every setting."""
    banner("baselines", settings.MODEL_NAME)
    if others := [name for name in settings.SCORES_TYPES if name not in TRAINED]:
        raise UserError(f"SCORES_TYPES = {' '.join(others)}: not trained by AdamW; allowed are {', '.join(TRAINED)}")
    common = settings.pick("MODEL_NAME", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR")
    with keep_model():
        run_script(STEP_1, common)
        references = [RepairChoice(name, settings.BOTTOM_K) for name in (REFERENCE, "direct")]
        rows = rows_at_budget(common, settings.TASKS, references)
        for num_steps, rate in itertools.product(settings.BASELINE_STEPS, settings.BASELINE_RATES):
            rows += rows_of_setting(settings, common, num_steps, rate)
    table = comparison_table([rows], f"{settings.MODEL_NAME}.", are_models=False)
    file = resolve_path(settings.OUTPUT_DIR) / "baselines"
    table.write(file)
    say(f"\n{table.markdown()}\ntable: {shown_path(file)}.md")


if __name__ == "__main__":
    run_step(main)
