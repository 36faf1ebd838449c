"""Writing dialogues as a folder that HH_DATASET can name."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from utils.files import to_json, write_if_changed
from utils.performance_functions.hh import Dialogues

DialogueRow = dict[str, str]


def rows_of(dialogues: Dialogues) -> list[DialogueRow]:
    """The dialogues in the columns of HH_DATASET."""
    return [
        {"prompt": prompt, "chosen": completion}
        for prompt, completion in zip(dialogues.prompts, dialogues.completions, strict=True)
    ]


def without(rows: Sequence[DialogueRow], removed: Collection[int]) -> list[DialogueRow]:
    """The dialogues but for some rows."""
    removed = set(removed)
    return [row for position, row in enumerate(rows) if position not in removed]


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
    if any((planted or {}).values()):
        write_if_changed(folder / "planted.json", to_json(planted))
