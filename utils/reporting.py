"""Tables and pictures for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURE_STYLES = {  # colour and marker of each SCORES_TYPE
    "pure_ekfac": ("#e76f51", "o"),
    "dpp": ("#264653", "s"),
    "identity": ("#8a5fbf", "D"),
    "representation": ("#3a86c8", "v"),
    "direct": ("#2a9d8f", "P"),
    "random": ("#999999", "^"),
}


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


@dataclass(frozen=True)
class RepairPoint:
    """One repair in a picture of improvement against perplexity change.

    Attributes:
        panel: which panel it belongs to.
        line: which line; begins with the SCORES_TYPE, and ends with `preserve` where perplexity is preserved.
    """

    panel: str
    line: str
    learning_rate: float
    perplexity_change_percent: float
    improvement_percent: float


def repairs_figure(points: Sequence[RepairPoint], budget_percent: float, path: Path) -> None:
    """Improvement against perplexity change: a panel for each measurement, a line for each way of choosing, a point
    for each step size; what the budget allows is shaded. What costs ten times the budget is left out."""
    # pyplot takes a second to import, which only the caller of a figure should pay.
    from matplotlib.figure import Figure

    points = [point for point in points if point.perplexity_change_percent <= 10 * budget_percent] or points
    panels_of = list(dict.fromkeys(point.panel for point in points))
    lines_of = list(dict.fromkeys(point.line for point in points))
    figure = Figure(figsize=(4.2 * len(panels_of), 4.2), layout="constrained")
    panels = figure.subplots(1, len(panels_of), sharey=True, squeeze=False)[0]
    for panel, title in zip(panels, panels_of, strict=True):
        shown = [point for point in points if point.panel == title]
        panel.axvspan(-1e3, budget_percent, color="#2a9d8f", alpha=0.10, lw=0)
        panel.axhline(0, color="#999999", lw=0.8)
        for line in lines_of:
            own = sorted((point for point in shown if point.line == line), key=lambda point: point.learning_rate)
            colour, marker = next(style for name, style in FIGURE_STYLES.items() if line.startswith(name))
            is_preserving = line.endswith("preserve")
            panel.plot(
                [point.perplexity_change_percent for point in own],
                [point.improvement_percent for point in own],
                color=colour,
                marker=marker,
                markerfacecolor="white" if is_preserving else colour,
                ls="--" if is_preserving else "-",
                lw=1.2,
                ms=5,
                label=line,
            )
        costs = [point.perplexity_change_percent for point in shown]
        panel.set_xlim(min(0, *costs) - 0.1, max(budget_percent, *costs) * 1.05)
        panel.set_title(title)
        panel.set_xlabel("perplexity change, %")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("improvement of the loss, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(f"Each point is one repair; the shaded area costs at most {budget_percent:g} % perplexity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
