"""Folders of dialogues that a study trains on: parts of HH_DATASET, with harm planted, or with rows left out."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

from data.demo.write_texts import harmful_dialogues
from utils.console import UserError
from utils.files import to_json, write_if_changed
from utils.performance_functions.hh import Dialogues

DialogueRow = dict[str, str]


def rows_of(dialogues: Dialogues) -> list[DialogueRow]:
    """The dialogues in the columns of HH_DATASET."""
    return [
        {"prompt": prompt, "chosen": completion}
        for prompt, completion in zip(dialogues.prompts, dialogues.completions, strict=True)
    ]


def write_folder(
    folder: Path,
    train: Sequence[DialogueRow],
    test: Sequence[DialogueRow],
    planted: dict[str, list[int]] | None = None,
) -> None:
    """Write both splits, and which rows are known to be harmful, as HH_DATASET has them; what is the same stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        write_if_changed(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if planted:
        write_if_changed(folder / "planted.json", to_json(planted))


def without(rows: Sequence[DialogueRow], removed: Collection[int]) -> list[DialogueRow]:
    """The dialogues but for some rows."""
    removed = set(removed)
    return [row for position, row in enumerate(rows) if position not in removed]


def plant(rows: Sequence[DialogueRow], share: float, seed: int) -> tuple[list[DialogueRow], dict[str, list[int]]]:
    """The dialogues with harmful ones at random places among them, and the rows of those by kind.

    The harmful ones are the demo's: unfair sentences about invented peoples, misconceptions, wrong acts told as right.

    Args:
        share: of the result that is harmful, below 1, as nearly as equal numbers of three kinds allow.

    Raises:
        UserError: more than there are texts for.
    """
    per_kind = max(1, round(share / (1 - share) * len(rows) / 3))
    marked: list[tuple[str | None, DialogueRow]] = [(None, row) for row in rows]
    try:
        planted_rows = harmful_dialogues(per_kind, seed)
    except ValueError as error:
        raise UserError(
            f"PLANTED_SHARE = {share:g} of {len(rows):,} dialogues takes {per_kind:,} harmful ones of each kind, and "
            f"{error}; set PLANTED_SHARE or NUM_TRAIN to less"
        ) from None
    for kind, harmful in planted_rows.items():
        marked += [(kind, {name: row[name] for name in ("prompt", "chosen")}) for row in harmful]
    random.Random(seed).shuffle(marked)
    planted: dict[str, list[int]] = {}
    for position, (kind, _) in enumerate(marked):
        if kind:
            planted.setdefault(kind, []).append(position)
    return [row for _, row in marked], planted
