"""Sweeps over learning rates: perplexity and the three tasks at each rate, as JSON, CSV and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from utils import paths
from utils.artifacts import read_json, to_json, write_if_changed
from utils.console import say, shown_path
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.repair import Repair
from utils.reporting import RepairPoint, repairs_figure


def sweep_row(report: dict[str, Any]) -> dict[str, float]:
    """One learning rate's numbers in one flat row: each loss after the repair, and its change in percent."""
    row = {"learning_rate": report["learning_rate"]}
    for metric, measured in report["measurements"].items():
        row[metric] = measured["after"]
        change = "change_percent" if metric == "perplexity" else "improvement_percent"
        row[f"{metric}_{change}"] = measured[change]
    return row


def write_sweep(repair: Repair, reports: list[dict[str, Any]], budget_percent: float) -> None:
    """Add the rates to what was swept before with the same model and gradient, and draw all sweeps of the task.

    Args:
        reports: one for each learning rate.
        budget_percent: the perplexity change that the picture marks.
    """
    output_dir = repair.settings.OUTPUT_DIR
    file = paths.sweep_file(output_dir, repair.task, repair.name, repair.repair_name)
    content = {"model": repair.name, "task": repair.task, "repair": repair.repair_name, "inputs": repair.inputs}
    earlier = read_json(file) if file.exists() else {"rates": []}
    rates = {row["learning_rate"]: row for row in earlier["rates"] if earlier["inputs"] == repair.inputs}
    rates.update((report["learning_rate"], sweep_row(report)) for report in reports)
    rows = [rates[rate] for rate in sorted(rates)]
    write_if_changed(file.with_suffix(".csv"), pd.DataFrame(rows).to_csv(index=False))
    figure = paths.sweep_figure(output_dir, repair.task, repair.name)
    text = to_json({**content, "rates": rows})
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        figure.unlink(missing_ok=True)  # killed before it is drawn anew, the old one must not stand
    if write_if_changed(file, text) or not figure.exists():
        draw_sweeps(output_dir, repair.task, repair.name, budget_percent)
    say(f"   sweep: {shown_path(file)} with .csv; picture: {shown_path(figure)}")


def _points(output_dir: str, task: str, model_name: str, panels: dict[str, str]) -> list[RepairPoint]:
    """Every swept repair of one task, in a panel for each of these measurements."""
    pattern = paths.sweep_file(output_dir, task, model_name, "*")
    return [
        RepairPoint(
            panel=title,
            line=sweep["repair"],
            learning_rate=row["learning_rate"],
            perplexity_change_percent=row["perplexity_change_percent"],
            improvement_percent=row[f"{metric}_improvement_percent"],
        )
        for sweep in map(read_json, sorted(pattern.parent.glob(pattern.name)))
        if sweep["model"] == model_name
        for metric, title in panels.items()
        for row in sweep["rates"]
        if {"perplexity_change_percent", f"{metric}_improvement_percent"} <= set(row)
    ]


def draw_sweeps(output_dir: str, task: str, model_name: str, budget_percent: float) -> None:
    """All sweeps of one task's repairs: a panel for each measurement, a line for each way of choosing."""
    panels = {m: m if task in (m, "combined") else f"{m} (not repaired)" for m in MEASUREMENTS}
    if points := _points(output_dir, task, model_name, panels):
        repairs_figure(points, budget_percent, paths.sweep_figure(output_dir, task, model_name))


def draw_overview(output_dir: str, model_names: Sequence[str], budget_percent: float) -> None:
    """All sweeps of all tasks: a panel for each repaired task, with what became of that task."""
    points = []
    for name in model_names:
        of_model = "" if len(model_names) == 1 else f"{name}, "
        for task in MEASUREMENTS:
            points += _points(output_dir, task, name, {task: f"{of_model}repaired for {task}"})
    if points:
        repairs_figure(points, budget_percent, paths.overview_figure(output_dir))
