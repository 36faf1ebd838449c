"""Figures: improvement against perplexity change over learning rates, and the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import written_whole
from utils.locks import locked
from utils.processes import first_process_only
from utils.reporting.escaping import one_line
from utils.reporting.tables import Row, WithInterval, group_by_repair, mean_with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURE_STYLES = {  # colour and marker of each SCORES_TYPE
    "pure_ekfac": ("#e76f51", "o"),
    "dpp_weighted": ("#4f772d", "p"),  # before "dpp", with which it begins
    "dpp": ("#264653", "s"),
    "contrast": ("#f4a261", "*"),
    "fitted": ("#d62828", "H"),
    "weighted": ("#e9c46a", "d"),
    "ekfac_cg": ("#c1121f", "h"),
    "identity": ("#8a5fbf", "D"),
    "representation": ("#3a86c8", "v"),
    "mean_difference": ("#5c7cfa", "<"),
    "bm25": ("#b08900", "X"),
    "direct_shuffled": ("#84a98c", "P"),
    "direct": ("#2a9d8f", "P"),
    "ga_kl": ("#7f5539", ">"),
    "ga": ("#b08968", ">"),
    "npo_random": ("#b8b8d1", "1"),  # before "npo"
    "npo": ("#9d4edd", "1"),
    "task_vector": ("#c77dff", "2"),
    "dpo": ("#0077b6", "3"),
    "sft_pairs": ("#00b4d8", "4"),
    "sft_retained": ("#adb5bd", "4"),
    "descent": ("#666666", "x"),
    "random": ("#999999", "^"),
}


PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def is_whole_picture(path: Path) -> bool:
    """Whether a PNG file is there and complete; a run that was killed, or a full disk, may have left a part of one."""
    png = path.read_bytes() if path.is_file() else b""
    return png.startswith(PNG_START) and png.endswith(PNG_END)


@dataclass(frozen=True)
class RepairPoint:
    """One repair in a figure of improvement against perplexity change.

    Attributes:
        panel: title of the panel it belongs to.
        line: label of its line: begins with the SCORES_TYPE, and has `_preserve` where something is preserved.
    """

    panel: str
    line: str
    learning_rate: float
    cost: WithInterval  # change of perplexity, %
    improvement: WithInterval  # nats per token


def _line_style(label: str) -> dict[str, Any]:
    """Style of a line whose label begins with a SCORES_TYPE."""
    colour, marker = next(style for name, style in FIGURE_STYLES.items() if label.startswith(name))
    return {"color": colour, "marker": marker, "lw": 1.2, "ms": 5, "label": label}


@first_process_only
def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    with locked(path), written_whole(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def repairs_figure(points: Sequence[RepairPoint], budget_percent: float, path: Path) -> None:
    """Improvement against perplexity change: a panel per measurement, a line per method, a point per learning rate.

    The area within the perplexity budget is shaded. Repairs that cost more than ten times the budget are left out,
    unless all do.
    """
    from matplotlib.figure import Figure

    points = [point for point in points if point.cost.value <= 10 * budget_percent] or points
    titles = list(dict.fromkeys(point.panel for point in points))
    lines = list(dict.fromkeys(point.line for point in points))
    figure = Figure(figsize=(4.2 * len(titles), 4.2), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(panels, titles, strict=True):
        shown = sorted((p for p in points if p.panel == title), key=lambda point: point.learning_rate)
        panel.axvspan(-1e3, budget_percent, color="#2a9d8f", alpha=0.10, lw=0)
        panel.axhline(0, color="#999999", lw=0.8)
        for line in lines:
            hollow = {"markerfacecolor": "white", "ls": "--"} if "_preserve" in line else {}
            costs, cost_bars = _bars([point.cost for point in shown if point.line == line])
            gains, gain_bars = _bars([point.improvement for point in shown if point.line == line])
            panel.errorbar(costs, gains, gain_bars, cost_bars, elinewidth=0.6, **_line_style(line), **hollow)
        all_costs = [point.cost.value for point in shown]
        panel.set_xlim(min(0, *all_costs) - 0.1, max(budget_percent, *all_costs) * 1.05)
        panel.set_title(one_line(title), parse_math=False)  # it may hold the name of a model
        panel.set_xlabel("perplexity change, %")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("improvement of the loss, nats per token")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(f"Repairs with 95 % intervals; shaded: at most {budget_percent:g} % more perplexity")
    save_figure(figure, path)


def _bars(numbers: Sequence[WithInterval]) -> tuple[list[float], list[list[float]]]:
    """The values, and how far their intervals reach below and above, as `errorbar` takes them."""
    margins = [number.margins for number in numbers]
    return [number.value for number in numbers], [list(side) for side in zip(*margins, strict=True)]


def ablation_figure(repairs: Sequence[Row], varied: str, path: Path) -> None:
    """Improvement and perplexity change against the varied constant: a column per task, a line per method.

    Values are means over seeds, error bars 95 % intervals over the test split.

    Args:
        varied: "bottom_k" or "if_weight".
    """
    from matplotlib.figure import Figure

    tasks, methods = (list(dict.fromkeys(row[name] for row in repairs)) for name in ("task", "method"))
    ticks = sorted({row[varied] for row in repairs})
    figure = Figure(figsize=(3.6 * len(tasks), 5.4), layout="constrained")
    panels = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    labels = {"improvement": "improvement, nats per token", "perplexity_change_percent": "perplexity change, %"}
    for column, task in zip(panels.T, tasks, strict=True):
        for panel, measured in zip(column, labels, strict=True):
            for method in methods:
                groups = group_by_repair([row for row in repairs if (row["task"], row["method"]) == (task, method)])
                groups.sort(key=lambda group: group[0][varied])
                values = [group[0][varied] for group in groups]
                means, errors = _bars([mean_with_interval(group, measured) for group in groups])
                panel.errorbar(values, means, errors, capsize=2, **_line_style(method))
            panel.set_xscale("symlog" if 0 in ticks else "log")  # a log axis cannot show 0
            panel.axhline(0, color="#999999", lw=0.8)
            panel.grid(alpha=0.25)
        column[0].set_title(task)
        column[1].set_xlabel(varied.upper())
        column[1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        column[1].minorticks_off()
    for panel, label in zip(panels[:, 0], labels.values(), strict=True):
        panel.set_ylabel(label)
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("Means over seeds; bars: 95 % intervals over the test split", fontsize=9)
    save_figure(figure, path)
