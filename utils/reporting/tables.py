"""Tables as Markdown, LaTeX and CSV, and the paper's tables: mean and standard deviation over seeds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.artifacts import write_if_changed
from utils.performance_functions import MEASUREMENTS

Row = dict[str, Any]  # what one repair did with one seed
LATEX_ESCAPES = str.maketrans({"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--"})
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
        return f"{self.caption}\n\n{markdown_table(self.header, self.rows)}\n"

    def latex(self) -> str:
        """A booktabs table; columns of numbers are right-aligned, columns of words left-aligned."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(cell.translate(LATEX_ESCAPES) for cell in cells) + r" \\"

        alignment = "".join("r" if is_number else "l" for is_number in self.number_columns)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{self.caption.translate(LATEX_ESCAPES)}}}",
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
        """Write `path` with the suffixes .md, .tex and .csv; a file that would not change is left untouched."""
        rows = self.data or [dict(zip(self.header, row, strict=True)) for row in self.rows]
        write_if_changed(path.with_suffix(".md"), self.markdown())
        write_if_changed(path.with_suffix(".tex"), self.latex())
        write_if_changed(path.with_suffix(".csv"), csv_text(rows))


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as CSV; the columns are all the keys that occur."""
    import pandas as pd  # slow to import, and most steps never write a CSV

    return pd.DataFrame(rows).to_csv(index=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also lines up in a terminal; all columns but the first are right-aligned."""
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


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Results of one metric as Markdown, one row per model."""
    columns = [name for name in results[0] if name not in ("model", "metric", "split")]
    rows = [[result["model"], *(format_number(result[column]) for column in columns)] for result in results]
    return markdown_table(["model", *columns], rows)


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


def main_table(
    baselines: Sequence[tuple[str, Mapping[str, Row]]],
    repairs: Sequence[Row],
    known_harm: Mapping[str, Collection[int]] | None,
) -> Table:
    """One row for each unrepaired model, then one for each repair.

    Args:
        baselines: a label and the measurements, by metric, of each model that is not repaired.
        repairs: one row for each repair and seed.
        known_harm: rows of the training split, by kind of harm; adds a column with how many of them a repair unlearned.
    """
    header = ["model", "repaired for", "method", "perplexity", "change", *MEASUREMENTS, "improvement"]
    header += ["step size", "seconds"] + (["known harm"] if known_harm else [])
    rows = []
    for label, results in baselines:
        perplexity = _over_seeds([results.get("anthropic", {})], "perplexity", ".3f")
        losses = [_over_seeds([results.get(task, {})], "loss", ".4f") for task in MEASUREMENTS]
        cells = [label, "–", "–", perplexity, "–", *losses]
        rows.append(cells + ["–"] * (len(header) - len(cells)))
    for group in group_by_repair(repairs):
        losses = [
            f"{_over_seeds(group, task, '.4f')} ({_over_seeds(group, f'{task}_improvement_percent', unit=' %')})"
            for task in MEASUREMENTS
        ]
        cells = [
            *(group[0][name] for name in ("model", "task", "method")),
            _over_seeds(group, "perplexity", ".3f"),
            _over_seeds(group, "perplexity_change_percent", "+.2f", " %"),
            *losses,
            _over_seeds(group, "improvement_percent", unit=" %"),
            _over_seeds(group, "learning_rate", ".3g"),
            _over_seeds(group, "seconds", ".1f"),
        ]
        rows.append(cells + ([_known_harm_found(group, known_harm)] if known_harm else []))
    caption = (
        "Effect of each repair. Perplexity on the HH test split; log-odds losses on the test pairs in nats per token, "
        "lower is better, with their improvement. Combined: the improvement is the mean over the three tasks."
    )
    return Table(caption, header, rows, [without_indices(row) for row in repairs])


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
            _over_seeds(group, "improvement_percent", unit=" %"),
            _over_seeds(group, "perplexity_change_percent", "+.2f", " %"),
            _over_seeds(group, "learning_rate", ".3g"),
        ]
        for group in groups
    ]
    caption = f"Effect of {varied.upper()}, with the other constants as in the main table."
    return Table(caption, header, rows, [without_indices(row) for row in repairs])
