"""The report of a grid of repairs: one HTML file with everything in it, for reading offline.

Whatever comes from data is escaped: tables, captions and completions as HTML here, the unlearned dialogues as JSON that
the template's script turns into text nodes. So no text of a dialogue, however hostile, becomes markup or code.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from utils.artifacts import write_atomically
from utils.console import UserError, say, shown_path

TEMPLATE = Path(__file__).with_name("report_template.html")
LARGEST_BYTES = 3_000_000  # of the whole file: it is to be sent by mail and opened on a phone
CUT_MARK = " […]"
WIDE_PICTURE = 1.8  # width / height from which a picture has a row of its own
MISSING_CELLS = frozenset({"", "-", "–", "—", "n/a", "nan"})

TEMPLATE_MARK = re.compile(r"<!--\{(\w+)\}-->")
LEADING_NUMBER = re.compile(r"\s*([+\-−]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)
# What could end a script element, open a comment, or (the last two) end a line of JavaScript in old browsers.
JSON_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Table:
    """A table of plain text cells. Columns of numbers are right-aligned, and a click on a header sorts by it."""

    caption: str
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file that becomes part of the page; the caption is its alternative text too."""

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
        known_harm: the kind of harm that the row is known to be, None where nothing is known.
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
    """What one repair did to the greedy completion of a prompt."""

    task: str
    model: str
    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows; an empty list leaves its section out."""

    title: str
    introduction: str
    facts: dict[str, str]
    tables: list[Table]
    pictures: list[Picture]
    subsets: list[Subset]
    completions: list[Completion]


def write_report(report: Report, path: Path) -> None:
    """Write the page whole or not at all.

    Raises:
        UserError: it cannot be made as small as LARGEST_BYTES; then nothing is written.
    """
    page = render(report)
    write_atomically(path, page)
    say(f"   wrote {shown_path(path)} ({byte_count(page) / 1e6:.1f} MB)")


def render(report: Report) -> str:
    """The page's HTML, at most LARGEST_BYTES in UTF-8.

    Raises:
        UserError: it is larger even without the texts of the dialogues.
    """
    parts = {
        "title": escape(report.title),
        "introduction": paragraphs(report.introduction),
        "contents": contents(report),
        "pictures": section("pictures", "Pictures", map(picture_figure, report.pictures)),
        "tables": section("tables", "Tables", map(table_figure, range(1, len(report.tables) + 1), report.tables)),
        "no_dialogues": "" if all_examples(report.subsets) else "hidden",
        "reading_notes": reading_notes(all_examples(report.subsets)),
        "completions": section("completions", "Before and after", completions_body(report.completions)),
        "facts": section("facts", "Conditions", facts_body(report.facts)),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    room = LARGEST_BYTES - byte_count(fill(template, {**parts, "data": ""}))
    return fill(template, {**parts, "data": fitting_json(report.subsets, room)})


def fill(template: str, parts: dict[str, str]) -> str:
    """Put the parts where the template has their marks, `<!--{name}-->`.

    One pass, so that nothing in a part is taken for a mark. Lone surrogates, which no UTF-8 file can hold, become "?".
    """
    page = TEMPLATE_MARK.sub(lambda mark: parts[mark[1]], template)
    return page.encode("utf-8", "replace").decode("utf-8")


def byte_count(text: str) -> int:
    """Bytes of a text in UTF-8, lone surrogates as in `fill`."""
    return len(text.encode("utf-8", "replace"))


# -- the parts that are HTML -------------------------------------------------------------------------------------------


def section(name: str, heading: str, blocks: Iterable[str]) -> str:
    """A section with its heading, empty where it has no blocks."""
    body = "\n".join(blocks)
    return f'<section id="{name}">\n<h2>{heading}</h2>\n{body}\n</section>' if body else ""


def contents(report: Report) -> str:
    """Links to the sections there are, and to each table."""
    counts = {
        ("pictures", "Pictures"): len(report.pictures),
        ("tables", "Tables"): len(report.tables),
        ("dialogues", "Unlearned dialogues"): len(all_examples(report.subsets)),
        ("completions", "Before and after"): len(report.completions),
        ("facts", "Conditions"): len(report.facts),
    }
    sections = [
        f'<li><a href="#{name}">{heading}</a>{"" if name == "facts" else f" <span>{count:,}</span>"}</li>'
        for (name, heading), count in counts.items()
        if count
    ]
    tables = [
        f'<li><a href="#table-{number}">{escape(table.caption)}</a></li>'
        for number, table in enumerate(report.tables, start=1)
    ]
    return "\n".join([*html_list("ul", sections), *html_list("ol", tables)])


def html_list(tag: str, items: Sequence[str]) -> list[str]:
    """The lines of a list, none where it has no items; the tag may have attributes."""
    return [f"<{tag}>", *items, f"</{tag.split()[0]}>"] if items else []


def paragraphs(text: str) -> str:
    """A paragraph for each block of lines between blank ones."""
    return "\n".join(f"<p>{escape(block.strip())}</p>" for block in re.split(r"\n\s*\n", text) if block.strip())


def picture_figure(picture: Picture) -> str:
    """A figure with the picture inside the page. Its size, from the PNG's header, keeps the page from jumping."""
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


def leading_number(cell: str) -> float | None:
    """The number that a cell begins with, by which it is sorted: 38.8 of "+38.8 %", 20 of "20 of 20"."""
    match = LEADING_NUMBER.match(cell)
    return float(match[1].replace(",", "").replace("−", "-")) if match else None


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value; such cells stay last, however a table is sorted."""
    return cell.strip().lower() in MISSING_CELLS


def is_number_column(cells: Sequence[str]) -> bool:
    """Whether every cell that is not missing begins with a number, and there is one."""
    numbers = [leading_number(cell) for cell in cells if not is_missing(cell)]
    return bool(numbers) and None not in numbers


def table_figure(number: int, table: Table) -> str:
    """A table in a container of its own that scrolls sideways; `data-value` is what the script sorts by."""
    columns = [[row[column] for row in table.rows] for column in range(len(table.header))]
    are_numbers = [is_number_column(cells) for cells in columns]

    def attributes(is_number: bool, cell: str) -> str:
        if is_missing(cell):
            return f' class="{"number " if is_number else ""}missing"'
        return f' class="number" data-value="{leading_number(cell):.17g}"' if is_number else ""

    def line(cells: Sequence[str]) -> str:
        shown = [
            f"<{tag}{attributes(is_number, cell)}>{escape(cell)}</{tag.split()[0]}>"
            for tag, is_number, cell in zip(
                ['th scope="row"', *["td"] * (len(table.header) - 1)], are_numbers, cells, strict=True
            )
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


def reading_notes(examples: Sequence[Example]) -> str:
    """What the columns of the list of dialogues mean, as far as they occur."""
    notes = []
    if any(example.scores for example in examples):
        notes.append(
            "The sign of a score: positive means that training on the dialogue lowers the measurement, it helps; "
            "the most negative scores belong to the most harmful dialogues."
        )
    if any(example.gains for example in examples):
        notes.append("Gains: what a pick added to the objective's two terms, diversity and influence, in its turn.")
    if any(example.known_harm for example in examples):
        notes.append("Known harm: what harm a dialogue is known to be, for example because it was planted.")
    return "\n".join(html_list('ul class="notes"', [f"<li>{note}</li>" for note in notes]))


def completions_body(completions: Sequence[Completion]) -> list[str]:
    """A heading for each task and, for each of its prompts, the completion before and those after beside it."""
    blocks = []
    if completions:
        blocks.append("<p>Greedy completions of the same prompts by the model before a repair and after it.</p>")
    for task in dict.fromkeys(completion.task for completion in completions):
        blocks.append(f"<h3>{escape(task)}</h3>")
        repairs_of: dict[tuple[str, str], list[Completion]] = {}
        for completion in completions:
            if completion.task == task:
                repairs_of.setdefault((completion.prompt, completion.before), []).append(completion)
        for (prompt, before), repairs in repairs_of.items():
            cards = [completion_card("before", before)]
            for repair in repairs:
                unchanged = ", unchanged" if repair.after == before else ""
                cards.append(completion_card(f"after: {repair.model}{unchanged}", repair.after))
            blocks.append(
                f'<article class="completion"><p class="text prompt">{escape(prompt.strip())}</p>'
                f'<div class="pair">{"".join(cards)}</div></article>'
            )
    return blocks


def completion_card(label: str, text: str) -> str:
    """One completion under its label."""
    return f'<div><h4>{escape(label)}</h4><p class="text">{escape(text.strip())}</p></div>'


def facts_body(facts: dict[str, str]) -> list[str]:
    """A definition list, or nothing where there are no facts."""
    return html_list("dl", [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()])


# -- the dialogues, as JSON --------------------------------------------------------------------------------------------


def all_examples(subsets: Sequence[Subset]) -> list[Example]:
    """The examples of all subsets, in order."""
    return [example for subset in subsets for example in subset.examples]


def fitting_json(subsets: Sequence[Subset], room: int) -> str:
    """The dialogues as JSON of at most `room` bytes.

    Where whole texts take more, all are cut to the longest common length that fits, so that the longest lose first.

    Raises:
        UserError: nothing that is left of them fits.
    """
    whole = dialogues_json(subsets, None)
    if byte_count(whole) <= room:
        return whole

    def fits(length: int) -> bool:
        return byte_count(dialogues_json(subsets, length)) <= room

    examples = all_examples(subsets)
    too_long = max((len(text) for example in examples for text in (example.prompt, example.completion)), default=0)
    return dialogues_json(subsets, longest_fitting_length(fits, too_long))


def longest_fitting_length(fits: Callable[[int], bool], too_long: int) -> int:
    """The largest length below `too_long` that fits, by bisection.

    Raises:
        UserError: not even 0 fits.
    """
    if not fits(0):
        raise UserError(
            f"the report is larger than {LARGEST_BYTES / 1e6:g} MB even with every text of a dialogue cut; "
            "give it fewer or smaller pictures, or fewer dialogues"
        )
    fitting = 0
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        fitting, too_long = (middle, too_long) if fits(middle) else (fitting, middle)
    return fitting


def cut(text: str, longest: int | None) -> str:
    """The text in at most `longest` characters, the mark included (alone where there is room for no more)."""
    if longest is None or len(text) <= longest:
        return text
    return text[: max(longest - len(CUT_MARK), 0)].rstrip() + CUT_MARK


def dialogues_json(subsets: Sequence[Subset], longest: int | None) -> str:
    """What the template's script reads, safe inside a script element.

    Lists instead of objects, and each dialogue's text once however many subsets hold it, keep the file small. The order
    within an example is the one that the script unpacks.

    Args:
        longest: characters that a text may have; None leaves all whole.
    """
    examples = all_examples(subsets)
    tasks = list(dict.fromkeys(task for example in examples for task in example.scores))
    gains = list(dict.fromkeys(gain for example in examples for gain in example.gains))
    texts = list(dict.fromkeys((example.prompt, example.completion) for example in examples))
    number_of = {text: number for number, text in enumerate(texts)}
    data = {
        "tasks": tasks,
        "gains": gains,
        "subsets": [[subset.title, subset.note] for subset in subsets],
        "texts": [[cut(prompt, longest), cut(completion, longest)] for prompt, completion in texts],
        "longest": longest,
        "examples": [
            [
                subset_number,
                example.rank,
                example.row,
                [rounded(example.scores.get(task)) for task in tasks],
                [rounded(example.gains.get(gain)) for gain in gains],
                example.known_harm,
                number_of[example.prompt, example.completion],
            ]
            for subset_number, subset in enumerate(subsets)
            for example in subset.examples
        ],
    }
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(JSON_ESCAPES)


def rounded(value: float | None) -> float | None:
    """Six significant digits: more than anybody reads, and a third of what a float takes."""
    return None if value is None else float(f"{value:.6g}")
