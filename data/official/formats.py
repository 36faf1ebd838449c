"""Turn the rows of a source into the text of an official file; columns and values are checked, texts left unchanged."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.official.sources import Source, hub_rows
from utils.console import UserError, progress_bar, say
from utils.performance_functions.data_files import read_csv, read_json_lines, shown_names, shown_value
from utils.performance_functions.ethics import ACCEPTABLE, WRONG

# Columns in the order of the official files, with the values that each allows; None allows any text.
HH_COLUMNS = dict.fromkeys(("prompt", "response", "chosen", "rejected"))
TRUTH_COLUMNS = dict.fromkeys(
    ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
)
TRUTH_HUB_NAMES = {column.lower().replace(" ", "_"): column for column in TRUTH_COLUMNS}  # best_answer: Best Answer
TRUTH_HUB_SUBSET = "generation"
IS_SHORT_VALUES = ("True", "False", "true", "false", "1", "0")
ETHICS_COLUMNS = {"label": (ACCEPTABLE, WRONG), "input": None, "is_short": IS_SHORT_VALUES, "edited": None}

# ETHICS: short examples have 1 or 2 sentences, long ones 1 to 6 paragraphs (Hendrycks et al. 2021, appendix). Where a
# mirror lacks is_short, it is derived from the length. That is right for all but one of the 3,885 official test rows:
# the longest short example has 185 characters, and all but one of the long ones have at least 213.
SHORT_BELOW_CHARACTERS = 200

Row = Mapping[str, Any]


class Content(NamedTuple):
    """What a source provides for one file."""

    text: str
    num_rows: int | None  # None where only the loader can count them
    notes: dict[str, str]  # further facts, for the manifest


def hh_content(source: Source, split: str, candidates: Sequence[str]) -> Content:
    """The dialogues of one split, as JSON lines."""
    rows = hub_rows(source, None, split) if source.path is None else json_rows(source, source.file(candidates))
    texts = texts_of(rows, HH_COLUMNS, f"{source}, split {split}")
    lines = [json.dumps(dict(zip(HH_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in texts]
    return Content("".join(lines), len(rows), {})


def truth_content(source: Source, split: str, candidates: Sequence[str]) -> Content:
    """TruthfulQA under the original CSV's column names; the hub's lists of answers are joined by "; "."""
    if source.path is None:
        hub = hub_rows(source, TRUTH_HUB_SUBSET, split)
        rows = [{TRUTH_HUB_NAMES.get(name, name): joined(value) for name, value in row.items()} for row in hub]
    else:
        rows = read_csv(source.file(candidates), TRUTH_COLUMNS).to_dict("records")
    return Content(csv_text(texts_of(rows, TRUTH_COLUMNS, str(source)), TRUTH_COLUMNS), len(rows), {})


def joined(value: str | list[str]) -> str:
    """A list of answers as the original CSV writes it; a text is returned unchanged."""
    return "; ".join(filter(None, map(str.strip, value))) if isinstance(value, list) else value


def ethics_content(source: Source, split: str, candidates: Sequence[str]) -> Content:
    """One split of ETHICS commonsense. If a mirror lacks is_short, it is derived; if it lacks edited, that is empty."""
    table, notes, origin = read_csv(source.file(candidates), ["label", "input"]), {}, f"{source}, split {split}"
    if "is_short" not in table:
        notes["is_short"] = f"derived: True where the input has fewer than {SHORT_BELOW_CHARACTERS} characters"
        say(f"   {origin}: no is_short; {notes['is_short']}")
        table["is_short"] = (table["input"].str.len() < SHORT_BELOW_CHARACTERS).astype(str)
    rows = [{"edited": "", **row} for row in table.to_dict("records")]
    return Content(csv_text(texts_of(rows, ETHICS_COLUMNS, origin), ETHICS_COLUMNS), len(rows), notes)


def texts_of(rows: Sequence[Row], columns: Mapping[str, Sequence[str] | None], origin: str) -> list[list[str]]:
    """The checked columns of each row; messages name `origin` as where the rows come from.

    Raises:
        UserError: a column is missing, or a value is not a text or not an allowed one.
    """
    texts: list[list[str]] = []
    with progress_bar(len(rows) or 1, "checking", "rows") as bar:
        for number, row in enumerate(rows, start=1):
            missing = ", ".join(column for column in columns if column not in row)
            if missing:
                columns_there = f"it has {shown_names(list(row))}, and needs {', '.join(columns)}"
                raise UserError(f"{origin}, row {number}: no column {missing}; {columns_there}")
            for column, allowed in columns.items():
                if not isinstance(row[column], str) or (allowed and row[column] not in allowed):
                    requirement = f"allowed: {', '.join(allowed)}" if allowed else "it must be a text"
                    raise UserError(f"{origin}, row {number}: {column!r} is {shown_value(row[column])}; {requirement}")
            texts.append([row[column] for column in columns])
            bar.update()
    return texts


def json_rows(source: Source, file: Path) -> list[Row]:
    """Rows of a JSON-lines file.

    Raises:
        UserError: as `read_json_lines`.
    """
    try:
        return [row for _, row in read_json_lines(file, source.local_form)]
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def csv_text(rows: Iterable[Sequence[str]], columns: Iterable[str]) -> str:
    """Rows as the text of a CSV file, column names first."""
    stream = io.StringIO(newline="")
    csv.writer(stream, lineterminator="\n").writerows([columns, *rows])
    return stream.getvalue()
