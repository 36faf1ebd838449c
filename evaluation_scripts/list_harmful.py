"""After step 1: the training dialogues that did most harm, to be read, and to be left out of the next fine-tuning.

    python evaluation_scripts/list_harmful.py
    python evaluation_scripts/list_harmful.py --TASK_NAME ethics --BOTTOM_K 50 --CLEANED_DATASET data/cleaned

MODEL_NAMES may be the fine-tuned model, or what it was fine-tuned from: trace both in step 1. What the dialogues did is
seen at the base, which has not learned them yet; the fine-tuned model's scores say what one step of unlearning would do
(docs/METHOD.md, "Which model to trace").

Writes results/harmful/, the CSV with whole dialogues, each text on one line; and with CLEANED_DATASET the dialogues
without all that it lists, in a folder that step 0 can train on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import itertools
import shlex
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from steps import constants_in_source, require_writable, run_step
from utils import paths
from utils.console import UserError, banner, say, shown_path
from utils.dialogue_folders import rows_of, write_folder
from utils.files import fingerprint_of
from utils.folder_artifacts import FolderArtifact
from utils.locks import locked
from utils.methods import INFLUENCE_TYPES, fixed_strategy
from utils.performance_functions.hh import Dialogues, kinds_of_rows, load_dialogues, read_known_harm
from utils.processes import first_process_only, launcher
from utils.rankings import combined_scores, ranking_scores, task_scores
from utils.registry import ModelArtifacts
from utils.reporting.tables import Table
from utils.selection import most_harmful, require_enough
from utils.settings import (
    Family,
    ModelNames,
    NonNegativeFloat,
    PositiveInt,
    RankingType,
    RepairTask,
    Seed,
    Settings,
    Strategy,
    tasks_of,
)

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAMES: ModelNames = ["data/demo/pythia-demo-sft"]  # traced models: hub ids or local folders
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # for "bm25": folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the scores, as in step 1
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces a CLEANED_DATASET that was made with other settings

TASK_NAME: RepairTask = "all"  # "bias", "ethics", "truth", "combined" (their weighted sum), "all" (the three in turn)
SCORES_TYPE: RankingType = "pure_ekfac"  # as in step 4: those that give every dialogue a score
BOTTOM_K: PositiveInt = 20  # dialogues to list, for each task and model
CLEANED_DATASET: str | None = None  # folder for the dialogues without all of those, as OUTPUT_DIR; None writes none
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"
FACTOR_STRATEGY: Strategy = "ekfac"  # of the scores that "pure_ekfac" takes, as in step 1
USE_HALF_PRECISION: bool = False  # of the scores, as in step 1
# -----------------------------------------------------------------------------------------------------------

SHOWN_ROWS, SHOWN_CHARACTERS = 20, 90  # of a table in the terminal, and of a completion in it


# -- the list ----------------------------------------------------------------------------------------------------------


def rank(artifacts: ModelArtifacts, task: str) -> tuple[list[int], torch.Tensor]:
    """The BOTTOM_K rows that step 4 would choose by SCORES_TYPE, most harmful first, and the scores (N,) of all rows.

    Raises:
        UserError: as `task_scores`.
    """
    settings = artifacts.settings
    if task == "combined":
        scores, _ = ranking_scores(artifacts, task, settings.SCORES_TYPE)
        return most_harmful(scores, settings.BOTTOM_K), scores
    scores, _ = task_scores(artifacts, settings.SCORES_TYPE, task)
    return most_harmful(combined_scores([scores], [1.0]), settings.BOTTOM_K), scores  # as `ranking_scores` would


def scores_constants(settings: Settings) -> dict[str, Any]:
    """The constants that say which scores of step 1 are meant; none where SCORES_TYPE takes none of them."""
    if settings.SCORES_TYPE not in INFLUENCE_TYPES:
        return {}
    names = ["SEED", "USE_HALF_PRECISION"]
    return settings.pick(*names) if fixed_strategy(settings.SCORES_TYPE) else settings.pick("FACTOR_STRATEGY", *names)


def list_dialogues(
    artifacts: ModelArtifacts,
    task: str,
    rows: Sequence[int],
    scores: torch.Tensor,
    known_harm: Mapping[str, Sequence[int]],
) -> None:
    """Write the list of one model and task, and print its beginning.

    Args:
        rows, scores: as `rank` gives them.
        known_harm: as `read_known_harm` gives it; empty where nothing is known.
    """
    settings, total = artifacts.settings, len(artifacts.dialogues)
    banner("most harmful dialogues", f"{task}, {settings.SCORES_TYPE}, {artifacts.model}")
    constants = scores_constants(settings) | (settings.pick("TASK_WEIGHTS") if task == "combined" else {})
    of_scores = ", ".join(f"{name} {value}" for name, value in constants.items())
    caption = f"The {len(rows)} of {total:,} training dialogues that {settings.SCORES_TYPE}"
    caption += f" ({of_scores})" * bool(of_scores) + f" ranks as most harmful for {task}, {artifacts.name}."
    if settings.SCORES_TYPE in INFLUENCE_TYPES and task != "combined":
        caption += " Score: negative means that training on the dialogue harmed"
        caption += f"; {int((scores[rows] > 0).sum())} of these are positive."
    table = harmful_table(artifacts.dialogues, rows, scores, known_harm, caption)
    file = paths.harmful_file(settings.OUTPUT_DIR, task, artifacts.name, settings.SCORES_TYPE, constants, len(rows))
    table.write(file)
    say(f"\n{replace(table, rows=table.rows[:SHOWN_ROWS]).markdown()}")
    say(f"   all {len(rows):,}, with the whole texts: {shown_path(file)}.csv")


def harmful_table(
    dialogues: Dialogues,
    rows: Sequence[int],
    scores: torch.Tensor,
    known_harm: Mapping[str, Sequence[int]],
    caption: str,
) -> Table:
    """One row for each dialogue, in the order given; whole in the data, a line of its completion in the cells.

    Args:
        scores: (N,) of all dialogues.
        known_harm: as for `list_dialogues`; adds a column, and their number to the caption.
    """
    data, kinds = [], kinds_of_rows(known_harm)
    for rank, row in enumerate(rows, start=1):
        known = {"known_harm": kinds.get(row, "")} if known_harm else {}
        texts = {"prompt": dialogues.prompts[row], "chosen": dialogues.completions[row]}
        data.append({"rank": rank, "row": row, "score": float(scores[row]), **known, **texts})
    header = ["completion", "rank", "row", "score", *(["known harm"] if known_harm else [])]
    cells = [
        [
            _shortened(item["chosen"]),
            str(item["rank"]),
            str(item["row"]),
            f"{item['score']:+.4g}",
            *([item["known_harm"] or "–"] if known_harm else []),
        ]
        for item in data
    ]
    if known_harm:
        found = [f"{len({*rows} & {*some})} of {len(some)} of {kind}" for kind, some in known_harm.items()]
        caption += f" Known harm: {', '.join(found)}."
    return Table(f"{caption} Row: of the training split, from 0.", header, cells, data)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"


# -- the other dialogues -----------------------------------------------------------------------------------------------


def cleaned_dataset(settings: Settings, **inputs: str) -> FolderArtifact:
    """The folder CLEANED_DATASET.

    Args:
        inputs: fingerprints of both splits, and of the rows that are left out.
    """
    constants = settings.pick("TASK_NAME", "SCORES_TYPE", "BOTTOM_K", "TASK_WEIGHTS") | scores_constants(settings)
    constants["MODEL_NAMES"] = [paths.public_name(model) for model in settings.MODEL_NAMES]
    folder = paths.resolve_path(settings.CLEANED_DATASET)
    return FolderArtifact(folder, paths.LIST_HARMFUL, constants, inputs, placed_by="CLEANED_DATASET")


def require_free_folder(settings: Settings) -> None:
    """Check that CLEANED_DATASET is a new folder, an empty one, or one that this script has made.

    Raises:
        UserError: anything else is there, whatever OVERWRITE is, or it cannot be written.
    """
    inside = {"HH_DATASET": settings.HH_DATASET, "DATA_DIR": settings.DATA_DIR, "OUTPUT_DIR": settings.OUTPUT_DIR}
    inside |= {f"the model {model}": model for model in settings.MODEL_NAMES}
    paths.require_separate("CLEANED_DATASET", settings.CLEANED_DATASET, inside)
    require_writable("CLEANED_DATASET", settings.CLEANED_DATASET)
    cleaned_dataset(settings).require_place()


def write_cleaned(
    settings: Settings,
    train: Dialogues,
    test: Dialogues,
    left_out: Collection[int],
    known_harm: Mapping[str, Sequence[int]],
) -> None:
    """Write CLEANED_DATASET: both splits, the training split without some rows, and what is known of the others.

    Raises:
        UserError: no dialogue would be left; or as `FolderArtifact.is_finished`.
    """
    started = time.monotonic()
    kept = [row for row in range(len(train)) if row not in left_out]
    if not kept:
        raise UserError(
            f"BOTTOM_K = {settings.BOTTOM_K}: the lists hold all {len(train):,} training dialogues, and "
            "CLEANED_DATASET would be empty; give a smaller number, or fewer tasks or models"
        )
    inputs = {"dataset": train.fingerprint, "test": test.fingerprint, "rows": fingerprint_of(sorted(left_out))}
    output = cleaned_dataset(settings, **inputs)
    with locked(output.path):
        if not output.is_finished(settings.OVERWRITE):
            position = {row: number for number, row in enumerate(kept)}
            known = {kind: [position[row] for row in rows if row in position] for kind, rows in known_harm.items()}
            with output.staging_folder() as staging:
                rows = rows_of(train)
                write_folder(staging, [rows[row] for row in kept], rows_of(test), known)
                output.publish_folder(started, {}, left_out=sorted(left_out))
    say(f"   {len(kept):,} of {len(train):,} dialogues are left")


def say_next(settings: Settings) -> None:
    """Print the command that fine-tunes on the cleaned dialogues."""
    folder = settings.CLEANED_DATASET
    made_there = constants_in_source(paths.STEP_0).get("SFT_MODEL_DIR")
    is_made_there = all(model == made_there for model in settings.MODEL_NAMES)
    base = [] if is_made_there else ["--BASE_MODEL", "BASE"]
    words = [*base, "--HH_DATASET", folder, "--SFT_MODEL_DIR", f"{folder.rstrip('/')}-sft"]
    say(f"next: {shlex.join([*launcher(), paths.STEP_0, *words])}")
    if not is_made_there:
        say("      (BASE: what your model was fine-tuned from; add its recipe, such as LEARNING_RATE and NUM_EPOCHS)")


@first_process_only
def main(settings: Settings) -> None:
    """List the most harmful dialogues of every model and task."""
    is_cleaned = settings.CLEANED_DATASET is not None
    if is_cleaned:
        require_free_folder(settings)
        test = load_dialogues(settings.HH_DATASET, "test")
    traced = [ModelArtifacts(settings, model) for model in settings.MODEL_NAMES]
    train = traced[0].dialogues
    require_enough(settings.BOTTOM_K, len(train))
    known_harm = read_known_harm(settings.HH_DATASET, len(train)) or {}
    known_harm = {kind: rows for kind, rows in known_harm.items() if rows}
    lists = [
        (artifacts, task, *rank(artifacts, task))
        for artifacts, task in itertools.product(traced, tasks_of(settings.TASK_NAME))
    ]
    if is_cleaned:  # before the lists are written: it may be refused
        banner("cleaned dialogues", settings.CLEANED_DATASET)
        write_cleaned(settings, train, test, {row for _, _, rows, _ in lists for row in rows}, known_harm)
    for artifacts, task, rows, scores in lists:
        list_dialogues(artifacts, task, rows, scores, known_harm)
    if is_cleaned:
        say_next(settings)


if __name__ == "__main__":
    run_step(main)
