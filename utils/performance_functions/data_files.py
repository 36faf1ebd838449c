"""Reading data files that somebody else wrote: checked, and bounded before anything grows out of them."""

from __future__ import annotations

import io
import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.console import UserError, shown_path

if TYPE_CHECKING:
    import pandas as pd

# Far above any real data: a dialogue is cut at 1,024 tokens, and the official CSV files have less than 20 MB.
MAX_CHARACTERS = 1_000_000  # of one text
MAX_LINE_BYTES = 32_000_000  # of one line of JSON: several texts, whose characters may be escaped
MAX_FILE_BYTES = 200_000_000  # of a file that is read in one piece: CSV, templates.json, prompt.txt
IN_DATA_DIR = "DATA_DIR must hold it (data/demo is the embedded default)"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown_value(value: object) -> str:
    """A value as Python writes it, cut where it is long or deep, for messages."""
    return _short.repr(value)


def shown_names(names: Sequence[object]) -> str:
    """Names of columns, cut where they are long, for messages."""
    line = ", ".join(map(str, names))
    return line if len(line) <= 300 else f"{line[:300]}..."


def require_length(text: str, where: str) -> None:
    """Refuse a text that is far longer than any real one, before it is tokenized whole.

    Raises:
        UserError: the text has more than MAX_CHARACTERS.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{where} has {len(text):,} characters; allowed are {MAX_CHARACTERS:,}: shorten or remove it")


def require_file(path: Path, remedy: str) -> None:
    """Check that a file is there.

    Raises:
        UserError: it is missing, or a folder, or one of the folders above it is a file.
    """
    if path.is_file():
        return
    kind = "missing"
    if path.is_dir():
        kind = "a folder, and must be a file"
    elif path.exists():
        kind = "a pipe or a device, and must be a file"
    elif path.is_symlink():
        kind = "a link to nothing, and must be a file"
    problem = f"{shown_path(path)} is {kind}"
    if in_the_way := next((parent for parent in path.parents if is_there(parent) and not parent.is_dir()), None):
        kind = "file" if in_the_way.is_file() else "link to nothing, a pipe or a device"
        problem = f"{shown_path(in_the_way)} is a {kind}, and must be a folder"
    raise UserError(f"{problem}; {remedy}")


def is_there(path: Path) -> bool:
    """Whether anything has this name, be it a link to nothing, which is no reason to do as if there were no file."""
    return os.path.lexists(path)


def read_text(path: Path, remedy: str = IN_DATA_DIR, encoding: str = "utf-8-sig") -> str:
    """Read a text file whole.

    Raises:
        UserError: it is missing, too large, not UTF-8, or has a zero byte.
    """
    require_file(path, remedy)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UserError(f"{shown_path(path)} has {size:,} bytes; allowed are {MAX_FILE_BYTES:,}: divide or shorten it")
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{shown_path(path)} is not UTF-8 ({error}); convert or replace it") from None
    if "\0" in text:
        raise UserError(f"{shown_path(path)} has a zero byte at character {text.index(chr(0)):,}; replace the file")
    return text


def parse_json(text: str, where: str) -> Any:  # noqa: ANN401
    """Strict JSON: no key twice, no NaN or infinity.

    Raises:
        UserError: the text is not that, too deeply nested, or has a number that is too long.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); fix or replace it") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown_value(next(name for name in names if names.count(name) > 1))} occurs twice")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def read_json_lines(path: Path, remedy: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each after where it is; a byte-order mark and blank lines are skipped.

    Raises:
        UserError: the file is missing, or a line is too long, not UTF-8 or not a JSON object.
    """
    require_file(path, remedy)
    with path.open("rb") as stream:  # not splitlines(), which also breaks at U+2028 inside a text
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{shown_path(path)}, line {number:,}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(f"{where} has more than {MAX_LINE_BYTES:,} bytes, which is the limit; shorten it")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 ({error}); fix or delete the line") from None
            if text.strip():
                row = parse_json(text, where)
                if not isinstance(row, dict):
                    raise UserError(f"{where} is not a JSON object: {shown_value(row)}; fix or delete the line")
                yield where, row


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV file, with or without a byte-order mark, as text.

    Raises:
        UserError: as `read_text`; or the file is empty, lacks a column, or its rows do not fit its header.
    """
    import pandas as pd  # only the steps that read pairs pay for importing it

    text = read_text(path)
    try:
        table = pd.read_csv(io.StringIO(text, newline=""), dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        raise UserError(f"{shown_path(path)} cannot be read as CSV ({error})") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(
            f"{shown_path(path)} has no column {', '.join(missing)}; it has {shown_names(list(table.columns))}"
        )
    if table.empty:
        raise UserError(f"{shown_path(path)} has no rows; it needs at least one")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the cells that are too many for names of the rows
        raise UserError(f"{shown_path(path)}: the rows have more cells than the header has columns; fix the header")
    return table
