"""The report on a grid of repairs: one HTML file with everything in it, for reading offline.

The markup is in report_template.html, where Jinja2 escapes whatever comes from data; the unlearned dialogues go in as
JSON, which the template's script turns into text nodes. So no text, however hostile, becomes markup or code.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
import struct
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.console import UserError, say, shown_path
from utils.files import write_locked
from utils.locks import locked
from utils.reporting.tables import Table, is_missing, leading_number

TEMPLATE = Path(__file__).with_name("report_template.html")
LARGEST_BYTES = 3_000_000  # of the whole file, so that it can be mailed and opened on a phone
CUT_MARK = " […]"
STRONGEST = 9  # the score of a dialogue's strongest token, as the page has it
# What could end a script element, open a comment, or (the last two) end a line of JavaScript in old browsers.
JSON_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Picture:
    """A PNG file to embed; the caption is also its alternative text."""

    caption: str
    png: Path


@dataclass(frozen=True)
class Example:
    """One unlearned training dialogue.

    Attributes:
        rank: 1 is the first pick.
        row: row in the training split.
        scores: task -> influence score, negative is harmful; tasks may be missing.
        gains: what the pick added to the objective, "diversity" and "influence"; empty unless dpp picked it.
        known_harm: the kinds of harm that the dialogue is known to contain, None where nothing is known.
        pieces: the completion's tokens one after the other: how many characters, and the score from -STRONGEST to
            STRONGEST, relative to the dialogue's largest; none where token scores are not known.
    """

    rank: int
    row: int
    scores: dict[str, float]
    gains: dict[str, float]
    known_harm: str | None
    prompt: str
    completion: str
    pieces: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Subset:
    """The dialogues that one repair unlearned, and one sentence about how they were chosen."""

    title: str
    note: str
    examples: list[Example]


@dataclass(frozen=True)
class Completion:
    """The greedy completion of a prompt before and after one repair."""

    task: str
    repair: str
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; a section with nothing in it is left out."""

    title: str
    introduction: str
    facts: dict[str, str]
    tables: list[Table]
    pictures: list[Picture]
    subsets: list[Subset]
    completions: list[Completion]

    @property
    def examples(self) -> list[Example]:
        """The examples of all subsets, in order."""
        return [example for subset in self.subsets for example in subset.examples]


def write_report(report: Report, path: Path) -> None:
    """Write the page whole or not at all.

    Raises:
        UserError: it cannot be made as small as LARGEST_BYTES; nothing is written then.
    """
    page = render(report)
    write_locked(path, page)
    say(f"   wrote {shown_path(path)} ({len(_utf8(page)) / 1e6:.1f} MB)")


def render(report: Report) -> str:
    """The page's HTML, at most LARGEST_BYTES in UTF-8.

    Raises:
        UserError: it is larger even without the texts of the dialogues.
    """
    from jinja2 import Environment, StrictUndefined  # takes a while, and most steps write no report

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "STRONGEST": STRONGEST,
        "report": report,
        "paragraphs": re.split(r"\n\s*\n", report.introduction.strip()),
        "pictures": [_embedded(picture) for picture in report.pictures],
        "completions": _by_prompt(report.completions),
        "is_missing": is_missing,
        "leading_number": leading_number,
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    room = LARGEST_BYTES - len(_utf8(template.render(dialogues="")))
    return _utf8(template.render(dialogues=_fitting_json(_dialogues(report), room))).decode("utf-8")


def _utf8(text: str) -> bytes:
    """The text in UTF-8; lone surrogates, which UTF-8 cannot hold, become "?"."""
    return text.encode("utf-8", "replace")


def _embedded(picture: Picture) -> tuple[str, str, int, int]:
    """Caption, data URL, width and height; the size, from the PNG's header, keeps the page from jumping as it loads."""
    with locked(picture.png):  # another run may be drawing it again
        png = picture.png.read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    return picture.caption, f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}", width, height


def _by_prompt(completions: list[Completion]) -> dict[str, dict[tuple[str, str], list[tuple[str, str]]]]:
    """Labels and texts to show side by side: by task, then by the prompt and its completion before the repairs."""
    by_task: dict[str, dict[tuple[str, str], list[tuple[str, str]]]] = {}
    for completion in completions:
        of_task = by_task.setdefault(completion.task, {})
        cards = of_task.setdefault((completion.prompt, completion.before), [("before", completion.before)])
        unchanged = ", unchanged" if completion.after == completion.before else ""
        cards.append((f"after: {completion.repair}{unchanged}", completion.after))
    return by_task


def _fitting_json(data: dict[str, Any], room: int) -> str:
    """The dialogues as JSON of at most `room` bytes, safe inside a script element.

    If the whole texts take more, all are cut to the largest common length that fits, so that the longest lose first.
    """

    def encoded(longest: int | None) -> bytes:
        texts = [[cut(text, longest) for text in dialogue] for dialogue in data["texts"]]
        examples = [[*others, _cut_pieces(pieces, longest)] for *others, pieces in data["examples"]]
        shown = {**data, "texts": texts, "examples": examples, "longest": longest}
        as_json = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return _utf8(as_json.translate(JSON_ESCAPES))

    longest = None
    if len(encoded(longest)) > room:
        lengths = range(max((len(text) for dialogue in data["texts"] for text in dialogue), default=0))
        longest = bisect_left(lengths, True, key=lambda length: len(encoded(length)) > room) - 1
        if longest < 0:
            raise UserError(
                f"the report is larger than {LARGEST_BYTES / 1e6:g} MB even with all texts of the dialogues cut; "
                "give it fewer or smaller pictures, or fewer dialogues"
            )
    return encoded(longest).decode("utf-8")


def cut(text: str, longest: int | None) -> str:
    """The text in at most `longest` characters, including the mark (which stands alone if there is no more room)."""
    if longest is None or len(text) <= longest:
        return text
    return text[: max(longest - len(CUT_MARK), 0)].rstrip() + CUT_MARK


def _cut_pieces(pieces: list[int], longest: int | None) -> list[int]:
    """Those pieces, a length and a score each, that a text cut to `longest` characters may still show."""
    if longest is None:
        return pieces
    ends = list(itertools.accumulate(pieces[::2]))
    return pieces[: 2 * (bisect_left(ends, longest) + 1)]


def _dialogues(report: Report) -> dict[str, Any]:
    """What the template's script reads, with whole texts.

    Lists instead of objects, and each dialogue's text stored once however many subsets hold it, keep the file small.
    The script unpacks the values of an example in the order they have here.
    """
    tasks = list(dict.fromkeys(task for example in report.examples for task in example.scores))
    gains = list(dict.fromkeys(gain for example in report.examples for gain in example.gains))
    numbers: dict[tuple[str, str], int] = {}  # prompt and completion -> position among the texts
    examples = []
    for subset_number, subset in enumerate(report.subsets):
        for example in subset.examples:
            values = [_rounded(example.scores, tasks), _rounded(example.gains, gains)]
            number = numbers.setdefault((example.prompt, example.completion), len(numbers))
            pieces = [part for piece in example.pieces for part in piece]
            examples.append([subset_number, example.rank, example.row, *values, example.known_harm, number, pieces])
    subsets = [[subset.title, subset.note] for subset in report.subsets]
    return {"tasks": tasks, "gains": gains, "subsets": subsets, "texts": list(numbers), "examples": examples}


def _rounded(values: dict[str, float], names: list[str]) -> list[float | None]:
    """The named values in six significant digits: more than anybody reads, and a third of the bytes of a float."""
    return [float(f"{values[name]:.6g}") if name in values else None for name in names]
