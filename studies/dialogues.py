"""Dialogues that a study trains on, with harm planted among them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from data.demo.write_texts import harmful_dialogues
from utils.console import UserError
from utils.dialogue_folders import DialogueRow


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
