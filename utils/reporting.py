"""Tables and pictures for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURE_STYLES = {"pure_ekfac": ("#e76f51", "o"), "dpp": ("#264653", "s"), "random": ("#999999", "^")}


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


def best_within_budget(repairs: Sequence[dict[str, Any]], budget_percent: float) -> list[dict[str, Any]]:
    """For each task and way of choosing, the largest improvement whose perplexity stays within the budget.

    Where no step size stays within it, the one that costs the least.
    """
    best: dict[tuple[str, str], dict[str, Any]] = {}

    def rank(repair: dict[str, Any]) -> tuple[bool, float]:
        cost = repair["perplexity_change_percent"]
        is_within = cost <= budget_percent
        return is_within, repair["improvement_percent"] if is_within else -cost

    for repair in repairs:
        key = repair["task"], repair["scores_type"]
        if key not in best or rank(repair) > rank(best[key]):
            best[key] = repair
    return list(best.values())


def repairs_table(repairs: Sequence[dict[str, Any]]) -> str:
    """One line for each repair: what it was, what it did to its task and to perplexity."""
    header = ["task", "chosen by", "step size", "before", "after", "improvement", "perplexity", "planted"]
    rows = [
        [
            repair["task"],
            repair["scores_type"],
            f"{repair['learning_rate']:g}",
            shown_number(repair["before"]),
            shown_number(repair["after"]),
            f"{repair['improvement_percent']:+.1f} %",
            f"{repair['perplexity_change_percent']:+.2f} %",
            f"{repair['planted_chosen']} of {repair['bottom_k']}",
        ]
        for repair in repairs
    ]
    return markdown_table(header, rows)


def repairs_figure(repairs: Sequence[dict[str, Any]], budget_percent: float, path: Path) -> None:
    """Improvement against perplexity change: a panel for each task, a line for each way of choosing, a point for
    each step size."""
    # pyplot takes a second to import, which only the caller of a figure should pay.
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(repair["task"] for repair in repairs))
    figure = Figure(figsize=(4.2 * len(tasks), 3.8), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        panel.axvspan(panel.get_xlim()[0] - 1e3, budget_percent, color="#2a9d8f", alpha=0.10, lw=0)
        panel.axhline(0, color="#999999", lw=0.8)
        for scores_type, (colour, marker) in FIGURE_STYLES.items():
            points = sorted(
                (repair["learning_rate"], repair["perplexity_change_percent"], repair["improvement_percent"])
                for repair in repairs
                if repair["task"] == task and repair["scores_type"] == scores_type
            )
            if points:
                _, costs, gains = zip(*points, strict=True)
                panel.plot(costs, gains, color=colour, marker=marker, lw=1.2, ms=6, label=scores_type)
        costs = [repair["perplexity_change_percent"] for repair in repairs if repair["task"] == task]
        panel.set_xlim(min(0, *costs) - 0.1, max(budget_percent, *costs) * 1.05)
        panel.set_title(task)
        panel.set_xlabel("perplexity change, %")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("improvement of the task's loss, %")
    panels[-1].legend(title="unlearned dialogues\nchosen by", loc="upper left", frameon=False)
    figure.suptitle(f"Each point is one repair; the shaded area costs at most {budget_percent:g} % perplexity")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
