"""After step 1: the training dialogues that did most harm, to be read, and to be left out of the next fine-tuning.

    python evaluation_scripts/list_harmful.py
    python evaluation_scripts/list_harmful.py --TASK_NAME ethics --BOTTOM_K 50 --CLEANED_DATASET data/cleaned

MODEL_NAMES may be the fine-tuned model, or what it was fine-tuned from: trace both in step 1. A model that has learned
dialogues by heart has little to say about them any more, and its scores may miss them where those of its base find them
(docs/RESULTS.md). Repairs go by the fine-tuned model's scores, since they change that one.

Writes results/harmful/, the CSV with whole dialogues, each text on one line; and with CLEANED_DATASET the dialogues
without all that it lists.
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
from collections import Counter
from collections.abc import Iterable

import torch

from steps import run_step
from utils import paths
from utils.artifacts import Artifact
from utils.console import UserError, banner, say, shown_path
from utils.dialogue_folders import rows_of, without, write_folder
from utils.files import fingerprint_of
from utils.locks import locked
from utils.paths import resolve_path
from utils.performance_functions.hh import Dialogues, load_dialogues, read_known_harm
from utils.processes import first_process_only
from utils.rankings import ranking_scores, task_scores
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
CLEANED_DATASET: str | None = None  # folder for the dialogues without all of those; None writes none
TASK_WEIGHTS: list[NonNegativeFloat] = [1.0, 1.0, 1.0]  # bias, ethics, truth, for "combined"
FACTOR_STRATEGY: Strategy = "ekfac"  # of the scores that "pure_ekfac" takes, as in step 1
USE_HALF_PRECISION: bool = False  # of the scores, as in step 1
# -----------------------------------------------------------------------------------------------------------

SHOWN_CHARACTERS = 90  # of a completion in a table


def ranking(artifacts: ModelArtifacts, task: str) -> tuple[list[int], torch.Tensor]:
    """All training dialogues as SCORES_TYPE ranks them, and their scores.

    Returns:
        Rows, the most harmful first, and (N,) scores by row, for "combined" the weighted sum of normalised ones.

    Raises:
        UserError: as `task_scores`.
    """
    score = ranking_scores if task == "combined" else task_scores
    scores, _ = score(artifacts, task=task, scores_type=artifacts.settings.SCORES_TYPE)
    return most_harmful(scores, len(scores)), scores


def harmful_table(
    dialogues: Dialogues, rows: list[int], scores: torch.Tensor, kind_of: dict[int, str] | None, caption: str
) -> Table:
    """One row for each dialogue, in the order given; whole in the data, a line of its completion in the cells.

    Args:
        scores: (N,) of all dialogues.
        kind_of: the kind of harm by row, where harm is known; None if nothing is known of any.
    """
    data = []
    for rank, row in enumerate(rows, start=1):
        known = {} if kind_of is None else {"known_harm": kind_of.get(row, "")}
        texts = {"prompt": dialogues.prompts[row], "chosen": dialogues.completions[row]}
        data.append({"rank": rank, "row": row, "score": float(scores[row]), **known, **texts})
    header = ["completion", "rank", "row", "score"] + ["known harm"] * (kind_of is not None)
    cells = [
        [
            _shortened(item["chosen"]),
            str(item["rank"]),
            str(item["row"]),
            f"{item['score']:+.4g}",
            *([item["known_harm"] or "–"] if kind_of is not None else []),
        ]
        for item in data
    ]
    legend = (
        "Row: line of the training split, from 0. Score: negative means that training on the dialogue harmed, where "
        "it is an influence; only its order counts for the other rankings and for 'combined'."
    )
    if kind_of is not None:
        counts = Counter(kind_of[row] for row in rows if row in kind_of)
        of_kinds = ", ".join(f"{count} of {kind}" for kind, count in counts.most_common())
        legend = f"Known harm among them: {of_kinds or 'none'}. {legend}"
    return Table(f"{caption} {legend}", header, cells, data)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[: SHOWN_CHARACTERS - 1]}…"


def require_place(settings: Settings) -> None:
    """Check that CLEANED_DATASET is no folder that must stay.

    Raises:
        UserError: the dialogues, a model or this repository lie there, or anything else, as `Artifact.require_place`.
    """
    if settings.CLEANED_DATASET is not None:
        inside = {"HH_DATASET": settings.HH_DATASET, "DATA_DIR": settings.DATA_DIR, "OUTPUT_DIR": settings.OUTPUT_DIR}
        inside |= {f"the model {model}": model for model in settings.MODEL_NAMES}
        paths.require_separate("CLEANED_DATASET", settings.CLEANED_DATASET, inside)
        cleaned_dialogues(settings).require_place(settings.OVERWRITE)


def cleaned_dialogues(settings: Settings, **inputs: str) -> Artifact:
    """The folder CLEANED_DATASET; its writer gives fingerprints of the dialogues and of the rows left out."""
    return Artifact(resolve_path(settings.CLEANED_DATASET), paths.LIST_HARMFUL, inputs=inputs, is_folder=True)


def write_cleaned(settings: Settings, train: Dialogues, left_out: Iterable[int]) -> None:
    """Write CLEANED_DATASET: both splits, the training split without some rows.

    Raises:
        UserError: nothing would be left; or as `Artifact.is_finished`.
    """
    started, left_out, test = time.monotonic(), sorted(left_out), load_dialogues(settings.HH_DATASET, "test")
    if len(left_out) == len(train):
        raise UserError(f"BOTTOM_K = {settings.BOTTOM_K}: CLEANED_DATASET would be empty; give a smaller number")
    inputs = {"dataset": train.fingerprint, "test": test.fingerprint, "rows": fingerprint_of(left_out)}
    output = cleaned_dialogues(settings, **inputs)
    with locked(output.path):
        if not output.is_finished(settings.OVERWRITE):
            with output.staging_folder() as folder:
                write_folder(folder, without(rows_of(train), left_out), rows_of(test))
                output.publish_folder(started, {}, left_out=left_out)
    say(f"   {len(train) - len(left_out):,} of {len(train):,} dialogues are left")
    again = ["--HH_DATASET", settings.CLEANED_DATASET, "--SFT_MODEL_DIR", f"{settings.CLEANED_DATASET}-sft"]
    say(f"next: {shlex.join(['python', paths.STEP_0, *again])}, with the base and the recipe of your fine-tuning")


@first_process_only
def main(settings: Settings) -> None:
    """List the most harmful dialogues of every model and task."""
    require_place(settings)
    traced = [ModelArtifacts(settings, model) for model in settings.MODEL_NAMES]
    train = traced[0].dialogues
    require_enough(settings.BOTTOM_K, len(train))
    known_harm = read_known_harm(settings.HH_DATASET, len(train))
    kind_of = None if known_harm is None else {row: kind for kind, rows in known_harm.items() for row in rows}
    listed: set[int] = set()
    for artifacts, task in itertools.product(traced, tasks_of(settings.TASK_NAME)):
        banner("most harmful dialogues", f"{task}, {settings.SCORES_TYPE}, {artifacts.model}")
        order, scores = ranking(artifacts, task)
        rows = order[: settings.BOTTOM_K]
        caption = f"The {len(rows)} of {len(train):,} training dialogues that {settings.SCORES_TYPE} ranks as most "
        caption += f"harmful for {task}, {artifacts.name}."
        table = harmful_table(train, rows, scores, kind_of, caption)
        file = paths.harmful_file(settings.OUTPUT_DIR, task, artifacts.name, settings.SCORES_TYPE)
        table.write(file)
        say(f"\n{table.markdown()}")
        say(f"   whole dialogues: {shown_path(file)}.csv")
        listed.update(rows)
    if settings.CLEANED_DATASET is not None:
        banner("cleaned dialogues", settings.CLEANED_DATASET)
        write_cleaned(settings, train, listed)


if __name__ == "__main__":
    run_step(main)
