"""Tables and pictures for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too; all but the first column are right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cells[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(aligned)} |"

    rule = f"|{'|'.join(['-' * (widths[0] + 2), *('-' * (width + 1) + ':' for width in widths[1:])])}|"
    return "\n".join([line(header), rule, *map(line, rows)])


def shown_number(value: Any) -> str:  # noqa: ANN401
    """Four decimals for a number with a fraction, everything else as it is."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def results_table(results: Sequence[dict[str, Any]]) -> str:
    """Results of one metric, a line for each model."""
    columns = [name for name in results[0] if name not in ("model", "metric", "split")]
    rows = [[result["model"], *(shown_number(result[column]) for column in columns)] for result in results]
    return markdown_table(["model", *columns], rows)
