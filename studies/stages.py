"""What the study of a real model does with each fine-tuned model, in stages that can be run one by one.

The settings are those of studies/real_model.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steps import run_script
from studies.beyond_pairs import beyond_table, style_groups
from studies.comparison import REFERENCE, comparison_figure, comparison_table
from studies.copying import copy_new
from studies.methods import retrained_row, rows_at_budget
from studies.splits import write_category_split
from studies.tracing import recall_table, trace, traced_artifacts
from utils.console import say
from utils.dialogue_folders import write_folder
from utils.folder_artifacts import FolderArtifact
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
from utils.performance_functions.hh import load_dialogues, read_known_harm
from utils.rankings import ranked
from utils.repairs import RepairChoice
from utils.reporting.tables import Row
from utils.selection import random_subset
from utils.settings import ScoresType, Settings

BATCH_SIZE = 16  # of all fine-tunings
IN_LITTLE_MEMORY = {"BATCH_SIZE_PER_DEVICE": 1}  # 5 GB with the optimizer's state; and nothing is padded
FURTHER_STEPS = 20  # of fine-tuning after a repair
NUM_NARRATIVES = 200


def base_model(settings: Settings) -> str:
    """What is fine-tuned."""
    return settings.BASE_MODEL or f"{settings.OUTPUT_DIR}/smollm2-135m"


def data_dir(settings: Settings) -> str:
    """The measurements' data, with a split of ETHICS that no twins cross."""
    return f"{settings.OUTPUT_DIR}/data"


def training_seeds(settings: Settings) -> list[int]:
    """Those of the fine-tunings that the stages need."""
    return settings.TRAINING_SEEDS if "models" in settings.STAGES else settings.TRAINING_SEEDS[:1]


def model_name(settings: Settings, fine_tuning: str, training_seed: int | None = None) -> str:
    """The folder of a fine-tuned model, by default that of the first of TRAINING_SEEDS."""
    suffix = "" if training_seed in (None, settings.TRAINING_SEEDS[0]) else f"-seed{training_seed}"
    return f"{model_short_name(base_model(settings))}-{fine_tuning.replace('_', '-')}-sft{suffix}"


def steps_common(settings: Settings, fine_tuning: str, seed: int, training_seed: int | None = None) -> dict[str, Any]:
    """The constants that all steps share for one model and seed of the steps."""
    folder = seed_dir(f"{settings.OUTPUT_DIR}/{fine_tuning}", seed, settings.SEEDS[0])
    return {
        "MODEL_NAME": f"{settings.OUTPUT_DIR}/models/{model_name(settings, fine_tuning, training_seed)}",
        "HH_DATASET": f"{settings.OUTPUT_DIR}/dialogues/{fine_tuning}",
        "DATA_DIR": data_dir(settings),
        "OUTPUT_DIR": folder,
        "SEED": seed,
    }


def traced_and_repaired(settings: Settings, common: dict[str, Any], scores_types: Sequence[ScoresType]) -> list[Row]:
    """Trace a model, then repair it by every method at one budget."""
    run_script(STEP_1, common)
    run_script(STEP_2, common)
    return rows_at_budget(common, settings.TASKS, [RepairChoice(name, settings.BOTTOM_K) for name in scores_types])


def study_methods(settings: Settings, fine_tuning: str) -> None:
    """Every method at one budget, for every seed of the steps; two tables."""
    by_seed = []
    with keep_model():
        for seed in settings.SEEDS:
            types = [*settings.SCORES_TYPES, *(settings.FURTHER_SCORES_TYPES if seed == settings.SEEDS[0] else [])]
            by_seed.append(traced_and_repaired(settings, steps_common(settings, fine_tuning, seed), types))
    folder, name = resolve_path(settings.OUTPUT_DIR) / fine_tuning, model_name(settings, fine_tuning)
    table = comparison_table(by_seed, f"{name}.", are_models=False)
    table.write(folder / "methods")
    comparison_figure(table.data, folder / "methods.png")
    say(f"\n{table.markdown()}")
    comparison_table(by_seed[:1], f"{name}.", are_models=False).write(folder / "all_methods")


def study_tracing(settings: Settings, fine_tuning: str) -> None:
    """What is found by tracing the fine-tuned model, and by tracing its base, which has not learned the dialogues yet.

    Two tables: how much of the known harm, and what fine-tuning again without the dialogues found, or without as many
    random ones, does.
    """
    common = steps_common(settings, fine_tuning, settings.SEEDS[0])
    traced = {"base": {**common, "MODEL_NAME": base_model(settings)}, "fine_tuned": common}
    folder, name = resolve_path(settings.OUTPUT_DIR) / fine_tuning, model_name(settings, fine_tuning)
    num_dialogues = len(load_dialogues(common["HH_DATASET"], "train"))
    known_harm = read_known_harm(common["HH_DATASET"], num_dialogues)
    tasks = [task for task in settings.TASKS if task in (settings.RETRAIN_TASKS or [])]
    if known_harm or tasks:
        for constants in traced.values():
            trace(constants, is_ranked_in_every_way=bool(known_harm))
    if known_harm:
        table = recall_table(traced, known_harm, f"{name}.")
        table.write(folder / "recall")
        say(f"\n{table.markdown()}")
    if tasks:
        with keep_model():
            rows = rows_at_budget(common, tasks, [RepairChoice(REFERENCE, settings.BOTTOM_K)])
        recipe = {"BASE_MODEL": base_model(settings), **IN_LITTLE_MEMORY}
        control = random_subset(num_dialogues, settings.BOTTOM_K, common["SEED"])
        for task in tasks:  # one model for all
            rows.append(retrained_row(common, task, control, "retrain_random", model="retrain_random", **recipe))
        for (model, constants), task in itertools.product(traced.items(), tasks):
            found = ranked(traced_artifacts(constants), task, REFERENCE)[: settings.BOTTOM_K]
            rows.append(retrained_row(common, task, found, f"retrain_traced_by_{model}", **recipe))
        table = comparison_table([rows], f"{name}.", are_models=False)
        table.write(folder / "retrained")
        say(f"\n{table.markdown()}")


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
    with keep_model():
        run_script(PAPER_TABLES, common, **grid)


def study_beyond(settings: Settings, fine_tuning: str) -> None:
    """Repairs for truth: style and multiple choice, then with whole categories held out."""
    folder, first = resolve_path(settings.OUTPUT_DIR) / fine_tuning, settings.SEEDS[0]
    common = steps_common(settings, fine_tuning, first)
    names = dict.fromkeys((*settings.SCORES_TYPES, "dpo", "direct_shuffled", "descent"))
    choices = [RepairChoice(name, settings.BOTTOM_K) for name in names]
    by_category = {
        **common,
        "DATA_DIR": f"{settings.OUTPUT_DIR}/data-by-category",
        "OUTPUT_DIR": f"{settings.OUTPUT_DIR}/{fine_tuning}/by-category",
    }
    run_script(STEP_1, common)
    run_script(STEP_2, common)
    write_category_split(resolve_path(data_dir(settings)), resolve_path(by_category["DATA_DIR"]), settings.SEED)
    factors = [
        factors_dir(constants["OUTPUT_DIR"], model_short_name(common["MODEL_NAME"]), "ekfac", False, common["SEED"])
        for constants in (common, by_category)
    ]
    copy_new(*factors)  # which do not depend on the pairs
    with keep_model():
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


def study_models(settings: Settings, fine_tuning: str) -> None:
    """Every method at one budget on models of several training seeds; one table of the means over them."""
    commons = [steps_common(settings, fine_tuning, settings.SEEDS[0], seed) for seed in settings.TRAINING_SEEDS]
    with keep_model():
        models = [traced_and_repaired(settings, common, settings.SCORES_TYPES) for common in commons]
    table = comparison_table(models, f"{model_name(settings, fine_tuning)}, fine-tuned with several seeds.")
    table.write(resolve_path(settings.OUTPUT_DIR) / fine_tuning / "models")
    say(f"\n{table.markdown()}")


def study_robustness(settings: Settings, fine_tuning: str) -> None:
    """Repaired checkpoints for truth: after rounding and further fine-tuning, and on text of another kind.

    The fine-tuning goes on at the learning rate of the model's own.
    """
    common = steps_common(settings, fine_tuning, settings.SEEDS[0])
    run_script(STEP_1, common)
    choices = [RepairChoice(name, settings.BOTTOM_K) for name in ("pure_ekfac", "fitted", "direct")]
    checkpoints = []
    for row, choice in zip(rows_at_budget(common, ["truth"], choices), choices, strict=True):
        constants = {**common, **choice.constants}
        run_script(STEP_5, constants, TASK_NAME="truth", LEARNING_RATE=row["learning_rate"])
        location = ("truth", model_short_name(common["MODEL_NAME"]), choice.name, row["learning_rate"])
        checkpoints.append(str(repaired_model_dir(common["OUTPUT_DIR"], *location)))
    made = FolderArtifact(resolve_path(common["MODEL_NAME"]), STEP_0).require()
    num_steps = min(FURTHER_STEPS, len(load_dialogues(common["HH_DATASET"], "train")) // BATCH_SIZE)
    further = {"NUM_FINE_TUNING_STEPS": num_steps, "LEARNING_RATE": made["settings"]["LEARNING_RATE"]}
    run_script(ROBUSTNESS, common, REPAIRED_MODEL_NAMES=checkpoints, **further)
    narratives = Path(settings.OUTPUT_DIR) / "dialogues" / "narratives"
    write_narratives(resolve_path(data_dir(settings)), resolve_path(narratives))
    other = {**common, "HH_DATASET": str(narratives), "OUTPUT_DIR": f"{common['OUTPUT_DIR']}/narratives"}
    run_script(STEP_6["anthropic"], other, MODEL_NAMES=[common["MODEL_NAME"], *checkpoints])


def write_narratives(data: Path, folder: Path) -> None:
    """The long statements of ETHICS commonsense, which no measurement uses, as text without a prompt.

    Personal stories of several paragraphs: their perplexity shows what a repair does to text that is no dialogue.
    """
    import pandas as pd

    table = pd.read_csv(data / "ethics" / "cm_test.csv")
    stories = table[~table["is_short"]]["input"].head(NUM_NARRATIVES)
    rows = [{"prompt": "", "chosen": f" {story}"} for story in stories]
    write_folder(folder, rows, rows)


STAGES = {
    "methods": study_methods,
    "tracing": study_tracing,
    "beyond": study_beyond,
    "tables": study_tables,
    "robustness": study_robustness,
    "models": study_models,
}


def compare_with_base(settings: Settings, fine_tuning: str) -> None:
    """Print what the fine-tuning did to each measurement, before any repair."""
    common = steps_common(settings, fine_tuning, settings.SEEDS[0])
    for script in STEP_6.values():
        run_script(script, common, MODEL_NAMES=[base_model(settings), common["MODEL_NAME"]])


def run_stages(settings: Settings, fine_tuning: str) -> None:
    """Compare one model with its base, then run the chosen stages on it."""
    compare_with_base(settings, fine_tuning)
    for name in settings.STAGES:
        STAGES[name](settings, fine_tuning)
