"""The report on a grid of repairs: one HTML file with everything in it, for reading offline.

Whatever comes from data is escaped: tables, captions and completions as HTML here, the unlearned dialogues as JSON that
the template's script turns into text nodes. So no text of a dialogue, however hostile, becomes markup or code.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from utils.artifacts import write_atomically
from utils.console import UserError, say, shown_path
from utils.reporting.tables import Table, is_missing, is_number_column, leading_number

TEMPLATE = Path(__file__).with_name("report_template.html")
LARGEST_BYTES = 3_000_000  # of the whole file, so that it can be mailed and opened on a phone
CUT_MARK = " […]"
WIDE_PICTURE = 1.8  # width / height from which a picture gets a row of its own
HEADINGS = {  # of each section, by the id that links and the template use
    "pictures": "Figures",
    "tables": "Tables",
    "dialogues": "Unlearned dialogues",
    "completions": "Before and after",
    "facts": "Setup",
}
READING_NOTES = {  # on the columns of the list of dialogues, by the attribute of Example that they show
    "scores": "The sign of a score: positive means that training on the dialogue lowers the measurement, so it helps; "
    "the most negative scores belong to the most harmful dialogues.",
    "gains": "Gains: how much each pick added to the two terms of the objective, diversity and influence.",
    "known_harm": "Known harm: the kind of harm a dialogue is known to contain, for example because it was planted.",
}

TEMPLATE_MARK = re.compile(r"<!--\{(\w+)\}-->")
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
        known_harm: the kind of harm that the dialogue is known to contain, None where nothing is known.
    """

    rank: int
    row: int
    scores: dict[str, float]
    gains: dict[str, float]
    known_harm: str | None
    prompt: str
    completion: str


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
    model: str
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
    write_atomically(path, page)
    say(f"   wrote {shown_path(path)} ({_byte_count(page) / 1e6:.1f} MB)")


def render(report: Report) -> str:
    """The page's HTML, at most LARGEST_BYTES in UTF-8.

    Raises:
        UserError: it is larger even without the texts of the dialogues.
    """
    facts = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items()]
    parts = {
        "title": escape(report.title),
        "introduction": _paragraphs(report.introduction),
        "contents": _contents(report),
        "pictures": _section("pictures", map(_picture, report.pictures)),
        "tables": _section("tables", [_table(number, table) for number, table in enumerate(report.tables, start=1)]),
        "no_dialogues": "" if report.examples else "hidden",
        "reading_notes": _reading_notes(report.examples),
        "completions": _section("completions", _completions(report.completions)),
        "facts": _section("facts", _list("dl", facts)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    room = LARGEST_BYTES - _byte_count(_fill(template, {**parts, "data": ""}))
    return _fill(template, {**parts, "data": _fitting_json(report, room)})


def _fill(template: str, parts: dict[str, str]) -> str:
    """Put the parts where the template has their marks, `<!--{name}-->`.

    One pass, so that nothing in a part is taken for a mark. Lone surrogates, which no UTF-8 file can hold, become "?".
    """
    page = TEMPLATE_MARK.sub(lambda mark: parts[mark[1]], template)
    return page.encode("utf-8", "replace").decode("utf-8")


def _byte_count(text: str) -> int:
    """Bytes of a text in UTF-8, with lone surrogates replaced as in `_fill`."""
    return len(text.encode("utf-8", "replace"))


# -- the parts that are HTML -------------------------------------------------------------------------------------------


def _section(name: str, blocks: Iterable[str]) -> str:
    """A section with its heading, or nothing if it has no blocks."""
    body = "\n".join(blocks)
    return f'<section id="{name}">\n<h2>{HEADINGS[name]}</h2>\n{body}\n</section>' if body else ""


def _contents(report: Report) -> str:
    """Links to the sections that exist, and to each table."""
    counts = {
        "pictures": len(report.pictures),
        "tables": len(report.tables),
        "dialogues": len(report.examples),
        "completions": len(report.completions),
    }
    sections = [
        f'<li><a href="#{name}">{HEADINGS[name]}</a> <span>{count:,}</span></li>'
        for name, count in counts.items()
        if count
    ]
    if report.facts:
        sections.append(f'<li><a href="#facts">{HEADINGS["facts"]}</a></li>')
    tables = [
        f'<li><a href="#table-{number}">{escape(table.caption)}</a></li>'
        for number, table in enumerate(report.tables, start=1)
    ]
    return "\n".join([*_list("ul", sections), *_list("ol", tables)])


def _list(tag: str, items: Sequence[str]) -> list[str]:
    """The lines of an HTML list, none if it has no items; the tag may carry attributes."""
    return [f"<{tag}>", *items, f"</{tag.split()[0]}>"] if items else []


def _paragraphs(text: str) -> str:
    """A paragraph for each block of lines between blank ones."""
    return "\n".join(f"<p>{escape(block.strip())}</p>" for block in re.split(r"\n\s*\n", text) if block.strip())


def _picture(picture: Picture) -> str:
    """A figure with the PNG embedded; its size, from the PNG's header, keeps the page from jumping while it loads."""
    png = picture.png.read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    kind = "picture wide" if width >= WIDE_PICTURE * height else "picture"
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    caption = escape(picture.caption)
    return (
        f'<figure class="{kind}"><div class="card">'
        f'<img src="{source}" alt="{caption}" width="{width}" height="{height}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(number: int, table: Table) -> str:
    """A table in a container that scrolls sideways; the script sorts number columns by `data-value`."""
    are_numbers = [is_number_column(cells) for _, *cells in zip(table.header, *table.rows, strict=True)]
    tags = ['th scope="row"', *["td"] * (len(table.header) - 1)]

    def attributes(is_number: bool, cell: str) -> str:
        if is_missing(cell):
            return f' class="{"number " if is_number else ""}missing"'
        return f' class="number" data-value="{leading_number(cell):.17g}"' if is_number else ""

    def line(cells: Sequence[str]) -> str:
        shown = [
            f"<{tag}{attributes(is_number, cell)}>{escape(cell)}</{tag.split()[0]}>"
            for tag, is_number, cell in zip(tags, are_numbers, cells, strict=True)
        ]
        return f"<tr>{''.join(shown)}</tr>"

    header = "".join(
        f'<th scope="col"{" class=number" if is_number else ""}>{escape(name)}</th>'
        for name, is_number in zip(table.header, are_numbers, strict=True)
    )
    name = f"table-{number}"
    rows = "\n".join(map(line, table.rows))
    return (
        f'<figure class="table" id="{name}"><figcaption id="{name}-caption">{escape(table.caption)}</figcaption>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-caption">'
        f'<table class="sortable" aria-labelledby="{name}-caption">\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></figure>"
    )


def _reading_notes(examples: Sequence[Example]) -> str:
    """What the columns in the list of dialogues mean, for those that occur."""
    notes = [note for name, note in READING_NOTES.items() if any(getattr(example, name) for example in examples)]
    return "\n".join(_list('ul class="notes"', [f"<li>{note}</li>" for note in notes]))


def _completions(completions: Sequence[Completion]) -> list[str]:
    """A heading for each task; under it, for each prompt, the completion before and all those after side by side."""
    by_task: dict[str, dict[tuple[str, str], list[Completion]]] = {}
    for completion in completions:
        of_task = by_task.setdefault(completion.task, {})
        of_task.setdefault((completion.prompt, completion.before), []).append(completion)
    blocks = ["<p>Greedy completions of the same prompts before and after each repair.</p>"] if completions else []
    for task, by_prompt in by_task.items():
        blocks.append(f"<h3>{escape(task)}</h3>")
        for (prompt, before), repairs in by_prompt.items():
            cards = [_completion_card("before", before)]
            for repair in repairs:
                unchanged = ", unchanged" if repair.after == before else ""
                cards.append(_completion_card(f"after: {repair.model}{unchanged}", repair.after))
            blocks.append(
                f'<article class="completion"><p class="text prompt">{escape(prompt.strip())}</p>'
                f'<div class="pair">{"".join(cards)}</div></article>'
            )
    return blocks


def _completion_card(label: str, text: str) -> str:
    return f'<div><h4>{escape(label)}</h4><p class="text">{escape(text.strip())}</p></div>'


# -- the dialogues, as JSON --------------------------------------------------------------------------------------------


def _fitting_json(report: Report, room: int) -> str:
    """The dialogues as JSON of at most `room` bytes.

    If the whole texts take more, all are cut to the largest common length that fits, so that the longest lose first.

    Raises:
        UserError: it does not fit even with all texts cut.
    """
    whole = _dialogues_json(report, None)
    if _byte_count(whole) <= room:
        return whole

    def is_too_large(length: int) -> bool:
        return _byte_count(_dialogues_json(report, length)) > room

    longest = max((max(len(example.prompt), len(example.completion)) for example in report.examples), default=0)
    smallest_too_large = bisect_left(range(longest), True, key=is_too_large)
    if smallest_too_large == 0:
        raise UserError(
            f"the report is larger than {LARGEST_BYTES / 1e6:g} MB even with all texts of the dialogues cut; "
            "give it fewer or smaller pictures, or fewer dialogues"
        )
    return _dialogues_json(report, smallest_too_large - 1)


def cut(text: str, longest: int | None) -> str:
    """The text in at most `longest` characters, including the mark (which stands alone if there is no more room)."""
    if longest is None or len(text) <= longest:
        return text
    return text[: max(longest - len(CUT_MARK), 0)].rstrip() + CUT_MARK


def _dialogues_json(report: Report, longest: int | None) -> str:
    """What the template's script reads, safe inside a script element.

    Lists instead of objects, and each dialogue's text stored once however many subsets hold it, keep the file small.
    The script unpacks the values of an example in the order they have here.

    Args:
        longest: characters that a text may have; None leaves all whole.
    """
    examples = report.examples
    tasks = list(dict.fromkeys(task for example in examples for task in example.scores))
    gains = list(dict.fromkeys(gain for example in examples for gain in example.gains))
    texts = list(dict.fromkeys((example.prompt, example.completion) for example in examples))
    number_of = {text: number for number, text in enumerate(texts)}
    data = {
        "tasks": tasks,
        "gains": gains,
        "subsets": [[subset.title, subset.note] for subset in report.subsets],
        "texts": [[cut(prompt, longest), cut(completion, longest)] for prompt, completion in texts],
        "longest": longest,
        "examples": [
            [
                subset_number,
                example.rank,
                example.row,
                [_rounded(example.scores.get(task)) for task in tasks],
                [_rounded(example.gains.get(gain)) for gain in gains],
                example.known_harm,
                number_of[example.prompt, example.completion],
            ]
            for subset_number, subset in enumerate(report.subsets)
            for example in subset.examples
        ],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(JSON_ESCAPES)


def _rounded(value: float | None) -> float | None:
    """Six significant digits: more than anybody reads, and a third of the bytes of a float."""
    return None if value is None else float(f"{value:.6g}")
