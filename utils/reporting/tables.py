"""Tables as Markdown, LaTeX and CSV, and the paper's tables: mean and standard deviation over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.files import write_if_changed
from utils.intervals import interval_names
from utils.performance_functions import MEASUREMENTS
from utils.reporting.escaping import csv_cell, latex_text, markdown_text
from utils.results import Metric, Result, compare

Row = dict[str, Any]  # what one repair did with one seed
NO_PERCENTAGE = "‡"
MISSING_CELLS = frozenset({"", "-", "–", "—", "n/a", "nan"})
LEADING_NUMBER = re.compile(r"\s*([+\-−]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """A table of plain-text cells.

    Attributes:
        data: the unrounded rows behind the cells, for the CSV; if there are none, the CSV holds the cells.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    data: list[Row] = field(default_factory=list)

    @property
    def number_columns(self) -> list[bool]:
        """Whether each column holds numbers; a ValueError if a row is longer or shorter than the header."""
        return [is_number_column(cells) for _, *cells in zip(self.header, *self.rows, strict=True)]

    def markdown(self) -> str:
        """The caption, then the table."""
        return f"{markdown_text(self.caption)}\n\n{markdown_table(self.header, self.rows)}\n"

    def latex(self) -> str:
        """A booktabs table; columns of numbers are right-aligned, columns of words left-aligned."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(latex_text, cells)) + r" \\"

        alignment = "".join("r" if is_number else "l" for is_number in self.number_columns)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_text(self.caption)}}}",
            rf"\begin{{tabular}}{{{alignment}}}",
            r"\toprule",
            line(self.header),
            r"\midrule",
            *map(line, self.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Write `path` with .md, .tex and .csv added to its name; a file that would not change is left untouched."""
        rows = self.data or [dict(zip(self.header, row, strict=True)) for row in self.rows]
        for ending, text in (("md", self.markdown()), ("tex", self.latex()), ("csv", csv_text(rows))):
            write_if_changed(path.with_name(f"{path.name}.{ending}"), text)


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV; the columns are all the keys that occur."""
    import pandas as pd  # slow to import, and most steps never write a CSV

    escaped = [{csv_cell(name): csv_cell(value) for name, value in row.items()} for row in rows]
    return pd.DataFrame(escaped).to_csv(index=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also lines up in a terminal; all columns but the first are right-aligned."""
    header, *rows = [[*map(markdown_text, cells)] for cells in (header, *rows)]
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    alignments = [str.ljust, *[str.rjust] * (len(header) - 1)]

    def line(cells: Sequence[str]) -> str:
        aligned = [align(cell, width) for align, cell, width in zip(alignments, cells, widths, strict=True)]
        return f"| {' | '.join(aligned)} |"

    rule = f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
    return "\n".join([line(header), rule, *map(line, rows)])


def format_number(value: Any) -> str:  # noqa: ANN401
    """Floats with four decimals, everything else as it is."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def leading_number(cell: str) -> float | None:
    """The number that a cell begins with: 38.8 for "+38.8 %", 20 for "20 of 20"."""
    match = LEADING_NUMBER.match(cell)
    return float(match[1].replace(",", "").replace("−", "-")) if match else None


def is_missing(cell: str) -> bool:
    """Whether a cell stands for a missing value."""
    return cell.strip().lower() in MISSING_CELLS


def is_number_column(cells: Sequence[str]) -> bool:
    """Whether every cell that is not missing begins with a number, and at least one does."""
    numbers = [leading_number(cell) for cell in cells if not is_missing(cell)]
    return bool(numbers) and None not in numbers


def mean_std(values: Sequence[float], form: str = "+.1f", unit: str = "") -> str:
    """`mean ± standard deviation` (sample) over seeds; the mean alone for one seed, a dash for none."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):{form.lstrip('+')}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}{unit}"


class WithInterval(NamedTuple):
    """A number and the ends of its 95 % interval, which are None where no interval is known."""

    value: float
    low: float | None
    high: float | None

    @property
    def margins(self) -> tuple[float, float]:
        """How far the interval reaches below and above the number; 0 where it is not known."""
        return (0.0, 0.0) if None in (self.low, self.high) else (self.value - self.low, self.high - self.value)

    def shown(self, form: str, unit: str = "") -> str:
        """`value unit [low, high]`; the value alone where no interval is known."""
        return f"{self.value:{form}}{unit}{self.bracket(form)}"

    def bracket(self, form: str) -> str:
        """` [low, high]`; nothing where no interval is known, or where it has no width since nothing changed."""
        return f" [{self.low:{form}}, {self.high:{form}}]" if any(self.margins) else ""


def with_interval(row: Row, name: str) -> WithInterval:
    """A number of a flat row with NAME_low and NAME_high."""
    return WithInterval(row[name], row.get(f"{name}_low"), row.get(f"{name}_high"))


def results_table(metric: Metric, results: Sequence[Result]) -> str:
    """Results of one metric as Markdown, one row per model; intervals in brackets behind their numbers.

    Of several models the last column has what each changed against the first, paired over the same pairs or dialogues,
    and a line below the table says of each whether that can be told from 0.
    """
    numbers = [result.numbers for result in results]
    hidden = {"model", "metric", "split", *(part for name in numbers[0] for part in interval_names(name))}
    columns = [name for name in numbers[0] if name not in hidden]
    header = ["model", *columns]
    rows = [[row["model"], *(_result_cell(row, name) for name in columns)] for row in numbers]
    if len(results) > 1:
        first, *others = results
        kind = "perplexity change" if metric == "anthropic" else "improvement of the loss"
        header.append(f"{kind}, against {first.numbers['model']}")
        differences = [_difference(metric, first, other) for other in others]
        cells = ["–", *(cell for cell, _ in differences)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
        return "\n".join([markdown_table(header, rows), "", *(verdict for _, verdict in differences)])
    return markdown_table(header, rows)


def _difference(metric: Metric, first: Result, other: Result) -> tuple[str, str]:
    """What a model changed against the first: a cell, and whether it is better or worse by its 95 % interval."""
    name, of_first = other.numbers["model"], first.numbers["model"]
    is_perplexity = metric == "anthropic"
    if is_perplexity and not first.losses["tokens"].equal(other.losses["tokens"]):
        return "–, other tokens", f"{name}: its tokens are not those of {of_first}, so perplexities cannot be compared"
    measurement = "perplexity" if is_perplexity else metric
    row = compare(metric, first.losses, other.losses)[measurement]
    cell = change_with_interval(measurement, row)
    change = with_interval(row, "change_percent" if is_perplexity else "improvement")
    if change.value is not None and (change.low is None or change.low <= 0 <= change.high):
        return cell, f"{name}: no difference in {measurement} from {of_first} that can be told from 0"
    is_more = change.value is None or change.value > 0  # None: perplexity beyond any number
    return cell, f"{name}: {'worse' if is_more == is_perplexity else 'better'} in {measurement} than {of_first}"


def change_with_interval(measurement: str, row: Row) -> str:
    """What a row of `compare` changed: `+0.51 % [+0.31, +0.71]` of "perplexity", else `+0.042 [+0.031, +0.053]`."""
    if measurement != "perplexity":
        return with_interval(row, "improvement").shown("+.4f")
    if row["change_percent"] is None:
        return "too large for a number"
    return with_interval(row, "change_percent").shown("+.2f", " %")


def _result_cell(result: Row, name: str) -> str:
    value = result.get(name, "–")
    return with_interval(result, name).shown(".4f") if isinstance(value, float) else str(value)


def group_by_repair(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each repair, one per seed, together."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "task", "method", "bottom_k", "if_weight"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def without_indices(row: Row) -> Row:
    """A repair's row without the list of dialogues it unlearned."""
    return {name: value for name, value in row.items() if name != "indices"}


def _over_seeds(group: Sequence[Row], name: str, form: str = "+.1f", unit: str = "") -> str:
    """`mean_std` of one number of a repair, over the seeds that have it."""
    return mean_std([row[name] for row in group if row.get(name) is not None], form, unit)


def mean_with_interval(group: Sequence[Row], name: str) -> WithInterval | None:
    """The mean of a number over the seeds that have it, and of the ends of its intervals.

    The repairs of all seeds are measured on the same test split, so as far as that split goes the standard error of
    their mean is at most the mean of their standard errors. The spread over seeds is not in the interval.
    """
    known = [with_interval(row, name) for row in group if row.get(name) is not None]
    if not known:
        return None
    return WithInterval(
        *(None if None in numbers else statistics.fmean(numbers) for numbers in zip(*known, strict=True))
    )


def _change_cell(group: Sequence[Row], name: str, form: str, unit: str = "") -> str:
    """The mean, its standard deviation over seeds, and the interval: `+0.58 ± 0.10 % [+0.31, +0.85]`."""
    mean = mean_with_interval(group, name)
    return _over_seeds(group, name, form, unit) + (mean.bracket(form) if mean else "")


def _improvement_cell(group: Sequence[Row]) -> str:
    """Nats with their interval, then percent, or a mark where the loss before is too close to 0 for a percentage."""
    percent = _over_seeds(group, "improvement_percent", unit=" %")
    return f"{_change_cell(group, 'improvement', '+.3f')} ({NO_PERCENTAGE if percent == '–' else percent})"


def main_table(
    baselines: Sequence[tuple[str, Mapping[str, Row]]],
    repairs: Sequence[Row],
    known_harm: Mapping[str, Collection[int]] | None,
) -> Table:
    """One row for each unrepaired model, then one for each repair.

    Args:
        baselines: a label and the results, by metric, of each model that is not repaired.
        repairs: one row for each repair and seed.
        known_harm: rows of the training split, by kind of harm; adds a column with how many of them a repair unlearned.
    """
    header = ["model", "repaired for", "method", "perplexity", "change", *MEASUREMENTS, "improvement"]
    header += ["step size", "seconds"] + (["known harm"] if known_harm else [])
    rows = []
    for label, results in baselines:
        numbers = [("anthropic", "perplexity"), *((task, "loss") for task in MEASUREMENTS)]
        perplexity, *losses = (_result_cell(results.get(metric, {}), name) for metric, name in numbers)
        cells = [label, "–", "–", perplexity, "–", *losses]
        rows.append(cells + ["–"] * (len(header) - len(cells)))
    for group in group_by_repair(repairs):
        cells = [
            *(group[0][name] for name in ("model", "task", "method")),
            _over_seeds(group, "perplexity", ".3f"),
            _change_cell(group, "perplexity_change_percent", "+.2f", " %"),
            *(_change_cell(group, f"{task}_improvement", "+.3f") for task in MEASUREMENTS),
            _improvement_cell(group),
            _over_seeds(group, "learning_rate", ".3g"),
            _over_seeds(group, "seconds", ".1f"),
        ]
        rows.append(cells + ([_known_harm_found(group, known_harm)] if known_harm else []))
    caption = (
        "Effect of each repair on the test split. Unrepaired models: perplexity, and log-odds losses in nats per "
        "token, lower is better. Repairs: change of perplexity, and improvement of each loss (before - after) in nats "
        "per token; the last improvement is that of what the model was repaired for (combined: the mean of the three), "
        "with its percentage. Step size 0: no step improved the training pairs within the budget. Seconds: of the "
        "gradient and the search, whose hidden states the first of a run computes for all. "
        f"{'Known harm: harmful dialogues among the unlearned. ' * bool(known_harm)}"
        f"{_legend(repairs)} {_units(baselines)}"
    )
    return Table(caption, header, rows, [without_indices(row) for row in repairs])


def _legend(repairs: Sequence[Row]) -> str:
    """What brackets and marks mean, as far as they occur, and how training and test pairs were split."""
    several_seeds = any(len(group) > 1 for group in group_by_repair(repairs))
    rules = sorted({(task, row.get(f"{task}_split")) for row in repairs for task in MEASUREMENTS})
    parts = [
        "In brackets: 95 % intervals, paired over the independent units of the test split"
        + (" (the mean of their ends over seeds); ±: standard deviation over seeds." if several_seeds else "."),
        f"{NO_PERCENTAGE}: no percentage, since the loss before is within two standard errors of 0."
        if any(row["improvement_percent"] is None for row in repairs)
        else "",
        f"Split of the pairs: {', '.join(f'{task} {rule}' for task, rule in rules if rule)}.",
    ]
    return " ".join(filter(None, parts))


def _units(baselines: Sequence[tuple[str, Mapping[str, Row]]]) -> str:
    """How many independent units each measurement has."""
    units = {
        metric.replace("anthropic", "dialogues"): result.get("dialogues" if metric == "anthropic" else "clusters")
        for _, results in baselines
        for metric, result in results.items()
    }
    known = ", ".join(f"{name} {count}" for name, count in units.items() if count)
    return f"Independent units: {known}." if known else ""


def _known_harm_found(group: Sequence[Row], known_harm: Mapping[str, Collection[int]]) -> str:
    harmful = {row for kind, rows in known_harm.items() if group[0]["task"] in (kind, "combined") for row in rows}
    found = [len(harmful & set(row["indices"])) for row in group]
    return f"{mean_std(found, '.3g')} of {len(group[0]['indices'])}" if group[0]["indices"] else "–"


def ablation_table(repairs: Sequence[Row], varied: str) -> Table:
    """One row for each task, method and value of the varied constant ("bottom_k" or "if_weight")."""
    header = ["repaired for", "method", varied.upper(), "improvement", "perplexity change", "step size"]
    groups = sorted(group_by_repair(repairs), key=lambda group: [group[0][name] for name in ("task", "method", varied)])
    rows = [
        [
            group[0]["task"],
            group[0]["method"],
            f"{group[0][varied]:g}",
            _improvement_cell(group),
            _change_cell(group, "perplexity_change_percent", "+.2f", " %"),
            _over_seeds(group, "learning_rate", ".3g"),
        ]
        for group in groups
    ]
    caption = f"Effect of {varied.upper()}, with the other constants as in the main table. {_legend(repairs)}"
    return Table(caption, header, rows, [without_indices(row) for row in repairs])
