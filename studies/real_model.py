"""`make study`: fine-tune a real pretrained model on real dialogues, trace it, repair it in every way, and compare.

    python studies/real_model.py --HH_DATASET Dahoas/static-hh --DATA_DIR data

Brings SmolLM2-135M-Instruct (studies/smollm2.py), chooses the learning rate and the number of epochs on held-out
training dialogues, and fine-tunes it twice: on the dialogues as they are, and on the same with 5 % of planted harm, so
that there are rows that a method has to find. Hours on two cores; what is finished is not done again, so that a stopped
study goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import random
from typing import Any

from steps import run_script, run_step
from studies.dialogues import plant, rows_of, write_folder
from utils.artifacts import Artifact
from utils.console import banner, say, shown_path
from utils.files import to_json, write_if_changed
from utils.paths import STEP_0, resolve_path
from utils.performance_functions.hh import load_dialogues
from utils.settings import Choices, PositiveFloat, PositiveInt, Seed, Settings

# ------------------------------------------------------------------------------------------------ constants
HH_DATASET: str = "Dahoas/static-hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
OUTPUT_DIR: str = "studies/output"  # folder for models and results
NUM_TRAIN: PositiveInt = 1800  # first training dialogues that are used, at most
NUM_TEST: PositiveInt = 200  # first test dialogues that are used, at most
PLANTED_SHARE: PositiveFloat = 0.05  # of the second fine-tuning's dialogues
SEED: Seed = 42  # of the fine-tunings, the choice of held-out dialogues and the planted harm
NUM_CHOICE_TRAIN: PositiveInt = 240  # training dialogues that learning rates are tried on
NUM_CHOICE_TEST: PositiveInt = 120  # other training dialogues, which decide between them
LEARNING_RATES: Choices[PositiveFloat] = [1e-5, 3e-5, 1e-4, 3e-4]  # tried with one epoch
NUM_EPOCHS: Choices[PositiveInt] = [1, 2]  # tried with the best of the rates
# -----------------------------------------------------------------------------------------------------------

SMOLLM2 = "studies/smollm2.py"
FINE_TUNINGS = ("as_is", "planted")
BATCH_SIZE, BATCH_SIZE_PER_DEVICE = 16, 2  # two long dialogues at a time: 5 GB with the optimizer's state
STEPS_BETWEEN_CHECKPOINTS = 20


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


def fine_tune(settings: Settings, dialogues: str, model: str, learning_rate: float, num_epochs: int) -> dict[str, Any]:
    """Fine-tune the base on a folder of dialogues; gives the perplexity of its test split, before and after."""
    folder = Path(settings.OUTPUT_DIR)
    run_script(
        STEP_0,
        {},
        BASE_MODEL=str(folder / "smollm2-135m"),
        HH_DATASET=str(folder / "dialogues" / dialogues),
        SFT_MODEL_DIR=str(folder / "models" / model),
        LEARNING_RATE=learning_rate,
        NUM_EPOCHS=num_epochs,
        BATCH_SIZE=BATCH_SIZE,
        BATCH_SIZE_PER_DEVICE=BATCH_SIZE_PER_DEVICE,
        SAVE_EVERY=STEPS_BETWEEN_CHECKPOINTS,
        SEED=settings.SEED,
    )
    return Artifact(resolve_path(folder / "models" / model), STEP_0, is_folder=True).require()["perplexity"]


def choose_recipe(settings: Settings) -> tuple[float, int]:
    """The learning rate and the number of epochs with the lowest perplexity of held-out training dialogues.

    The rates are tried with the first number of epochs, then the other numbers with the best rate.
    """
    tried: dict[tuple[float, int], dict[str, Any]] = {}

    def best() -> tuple[float, int]:
        return min(tried, key=lambda recipe: tried[recipe]["after"])

    def try_all(recipes: list[tuple[float, int]]) -> None:
        for rate, epochs in recipes:
            if (rate, epochs) not in tried:
                tried[rate, epochs] = fine_tune(settings, "choice", f"choice-lr{rate:g}-epochs{epochs}", rate, epochs)

    try_all([(rate, settings.NUM_EPOCHS[0]) for rate in settings.LEARNING_RATES])
    best_rate, _ = best()
    try_all([(best_rate, epochs) for epochs in settings.NUM_EPOCHS])
    rows = [{"learning_rate": rate, "epochs": epochs, **perplexity} for (rate, epochs), perplexity in tried.items()]
    write_if_changed(resolve_path(settings.OUTPUT_DIR) / "choice.json", to_json(rows))
    rate, epochs = best()
    say(f"   chosen: LEARNING_RATE = {rate:g}, NUM_EPOCHS = {epochs}")
    return rate, epochs


def main(settings: Settings) -> None:
    """Run every stage of the study."""
    folder = resolve_path(settings.OUTPUT_DIR)
    banner("study", shown_path(folder))
    run_script(SMOLLM2, {}, BASE_MODEL_DIR=str(Path(settings.OUTPUT_DIR) / "smollm2-135m"))
    write_dialogues(settings, folder / "dialogues")
    rate, epochs = choose_recipe(settings)
    for name in FINE_TUNINGS:
        fine_tune(settings, name, f"smollm2-{name.replace('_', '-')}-sft", rate, epochs)


if __name__ == "__main__":
    run_step(main)
