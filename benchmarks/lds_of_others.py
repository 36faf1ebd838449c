"""The LDS of another library's scores, on the retrainings of validate_scores.py: same model, rows, queries and halves.

    python benchmarks/lds_of_others.py
    ANOTHER_ENVIRONMENT/bin/python benchmarks/bergson_scores.py MODEL runs/others/tokenized runs/others
    python benchmarks/lds_of_others.py --SCORES_FILE runs/others/bergson_scores.safetensors

Without SCORES_FILE it tokenizes the training dialogues and the answers of the training pairs, which bergson_scores.py
reads; with it, a table of LDS beside pure_ekfac's, after `make validate`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import torch
from safetensors.torch import load_file

from benchmarks.workload import save_rows
from steps import load_script, run_step
from utils import paths
from utils.console import say, shown_path
from utils.files import fingerprint_of
from utils.models import load_tokenizer
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.pairs import tokenize_pairs
from utils.rankings import task_scores
from utils.registry import ModelArtifacts
from utils.reporting.validation import lds_table
from utils.retraining import Measured, Retraining
from utils.settings import TASK_NAMES, Family, PositiveInt, Seed, Settings
from utils.tensors import require_shapes

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # as in validate_scores.py
MODEL_FAMILY: Family = "auto"  # as in validate_scores.py
HH_DATASET: str = "data/demo/hh"  # as in validate_scores.py
DATA_DIR: str = "data/demo"  # as in validate_scores.py
OUTPUT_DIR: str = "."  # as in validate_scores.py
SEED: Seed = 42  # as in validate_scores.py
NUM_SUBSETS: PositiveInt = 60  # as in validate_scores.py
NUM_REPEATS: PositiveInt = 2  # as in validate_scores.py
SCORES_FILE: str | None = None  # safetensors with a tensor (N_train,) for each task, positive where a dialogue helps
TOKENIZED: str = "runs/others/tokenized"  # folder for the tokenized texts
# -----------------------------------------------------------------------------------------------------------


def tokenize(settings: Settings) -> None:
    """Write `train`, and for each task `TASK_chosen` and `TASK_rejected` with an answer for every pair."""
    tokenizer, folder = load_tokenizer(settings.MODEL_NAME), paths.resolve_path(settings.TOKENIZED)
    save_rows(tokenize_dialogues(load_dialogues(settings.HH_DATASET, "train"), tokenizer), folder / "train")
    for task, measurement in MEASUREMENTS.items():
        pairs = measurement.load_pairs(paths.resolve_path(settings.DATA_DIR), "train")
        tokenized = tokenize_pairs(pairs, tokenizer, measurement.max_tokens)
        for side, positions in (("chosen", tokenized.chosen), ("rejected", tokenized.rejected)):
            save_rows((tokenized.sequences[position] for position in positions), folder / f"{task}_{side}")
    say(f"tokenized: {shown_path(folder)}")


def measurements_of(artifacts: ModelArtifacts, retraining: Retraining) -> Measured:
    """What a retraining of validate_scores.py measured."""
    constants = {"rows": fingerprint_of(retraining.rows), "seed": retraining.seed}
    return artifacts.retraining(retraining.name, constants, {}).require()["measured"]


def compare(settings: Settings) -> None:
    """Print the LDS of the file's scores and of pure_ekfac's, on both splits."""
    constants = {"FACTOR_STRATEGY": "ekfac", "USE_HALF_PRECISION": False}
    artifacts = ModelArtifacts(settings, settings.MODEL_NAME).with_constants(constants)
    theirs = load_file(paths.resolve_path(settings.SCORES_FILE))
    shapes = dict.fromkeys(TASK_NAMES, (len(artifacts.dialogues),))
    require_shapes(theirs, shapes, settings.SCORES_FILE, "give a file as bergson_scores.py writes it")
    ours = [task_scores(artifacts, "pure_ekfac", task)[0] for task in TASK_NAMES]
    name = Path(settings.SCORES_FILE).stem
    scores = {"pure_ekfac": torch.stack(ours), name: torch.stack([theirs[task].float() for task in TASK_NAMES])}
    for number, task in enumerate(TASK_NAMES):
        correlation = float(torch.corrcoef(torch.stack([of_type[number] for of_type in scores.values()]))[0, 1])
        say(f"   {task}: correlation of the two scores over dialogues {correlation:.3f}")
    validation = load_script(paths.VALIDATION)
    halves = validation.random_halves(settings, len(artifacts.dialogues))
    measured = [
        [measurements_of(artifacts, one) for one in repeat]
        for repeat in validation.retrainings_on_halves(settings, halves)
    ]
    rows = list(validation.lds_rows(settings, scores, halves, measured))
    for split in ("train", "test"):
        say(f"\n{lds_table(rows, split, {}, settings).markdown()}")


def main(settings: Settings) -> None:
    """Tokenize, or compare."""
    (compare if settings.SCORES_FILE else tokenize)(settings)


if __name__ == "__main__":
    run_step(main)
