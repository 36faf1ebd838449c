"""Sweeps over learning rates: perplexity and the three tasks at each rate, as JSON, CSV and a figure."""

from __future__ import annotations

import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils import paths
from utils.artifacts import FileArtifact
from utils.console import UserError, say, shown_path
from utils.files import fingerprint_of_text, partial_of, read_json, remove, to_json, write_if_changed, write_locked
from utils.locks import locked
from utils.manifests import differing_values
from utils.performance_functions import MEASUREMENTS
from utils.processes import first_process_only
from utils.reporting.figures import FIGURE_STYLES, RepairPoint, is_whole_picture, repairs_figure
from utils.reporting.tables import Row, csv_text, with_interval


def sweep_row(report: dict[str, Any]) -> Row:
    """One learning rate's results in one flat row: each number after the repair, and its change with the interval.

    perplexity, and perplexity_change_percent with its _low and _high; each task, truth_mc1 and truth_mc2, and their
    _improvement with its _standard_error, _low and _high, and _improvement_percent; each task's _split.
    """
    row = {"learning_rate": report["learning_rate"]}
    for metric, measured in report["measurements"].items():
        change = "change_percent" if metric == "perplexity" else "improvement"
        row[metric] = measured["after"]
        row |= {f"{metric}_{name}": value for name, value in measured.items() if name.startswith(change)}
    return row | {f"{task}_split": rule for task, rule in report["split_rules"].items()}


def read_report(artifact: FileArtifact) -> dict[str, Any]:
    """Read the report on a repair.

    Raises:
        UserError: it is missing or broken, or not as step 5 writes it.
    """
    report = artifact.load_json()
    try:
        search = report["search"]
        is_ours = (
            _is_row(sweep_row(report))
            and {"perplexity", *MEASUREMENTS} <= report["measurements"].keys()
            and _is_number(report["seconds"])
            and all(type(row) is int for row in report["indices"])
            and (search is None or isinstance(search["stopped"], str))
            and artifact.require()["inputs"]["content"] == fingerprint_of_text(to_json(report))
        )
    except (KeyError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise UserError(f"{shown_path(artifact.path)} is not what this project wrote; {artifact.remedy}")
    return report


def read_sweep(file: Path) -> dict[str, Any]:
    """Read a sweep; it has no manifest, so that its content is checked here.

    Raises:
        UserError: it is not JSON, or not as `write_sweep` writes it.
    """
    remedy = f"delete it and run {paths.STEP_5} again"
    sweep = read_json(file, remedy)
    names = {"model": str, "task": str, "repair": str, "inputs": dict, "rates": list}
    is_ours = isinstance(sweep, dict) and all(isinstance(sweep.get(name), kind) for name, kind in names.items())
    if not is_ours or not sweep["repair"].startswith(tuple(FIGURE_STYLES)) or not all(map(_is_row, sweep["rates"])):
        raise UserError(f"{shown_path(file)} is not what this project wrote; {remedy}")
    return sweep


def _is_row(row: object) -> bool:
    """Whether a value is a `sweep_row`: a learning rate, numbers, and the splits of the measured tasks."""
    if not isinstance(row, dict) or not _is_number(row.get("learning_rate")):
        return False
    measured = {f"{task}_improvement": f"{task}_split" for task in MEASUREMENTS}
    known = [name for name in ("perplexity_change_percent", *measured) if name in row]
    numbers = {name: value for name, value in row.items() if not name.endswith("_split")}
    return (
        all(value is None or _is_number(value) for value in numbers.values())
        and all(row[name] is not None for name in known)
        and all(isinstance(row.get(measured[name]), str) for name in known if name in measured)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def earlier_rates(
    output_dir: str, model_name: str, task: str, repair: str, inputs: dict[str, str], overwrite: bool
) -> dict[float, Row]:
    """The rows of an existing sweep by learning rate; none if there is no sweep, or it is to be replaced.

    Args:
        inputs: fingerprints of the model, the gradient and what is measured.
        overwrite: whether to replace a sweep that was made from other inputs.

    Raises:
        UserError: the sweep was made from other inputs, and `overwrite` is false; or it is broken.
    """
    file = paths.sweep_file(output_dir, task, model_name, repair)
    if not file.exists():
        return {}
    earlier = read_sweep(file)
    differences = differing_values(earlier["inputs"], inputs)
    if differences and not overwrite:
        raise UserError(
            f"{shown_path(file)} was made from other inputs: {'; '.join(differences)}. "
            "Set OVERWRITE = True to replace it, or another OUTPUT_DIR to keep both"
        )
    return {} if differences else {row["learning_rate"]: row for row in earlier["rates"]}


@first_process_only
def write_sweep(
    output_dir: str,
    model_name: str,
    task: str,
    repair: str,
    inputs: dict[str, str],
    overwrite: bool,
    reports: Sequence[dict[str, Any]],
    budget_percent: float,
) -> None:
    """Add rates to a sweep, as JSON and CSV, and draw it beside the other methods' sweeps of the same model and task.

    Args:
        inputs, overwrite: as for `earlier_rates`.
        reports: one for each learning rate of this run.
        budget_percent: the perplexity change up to which the figure is shaded.
    """
    file = paths.sweep_file(output_dir, task, model_name, repair)
    figure = paths.sweep_figure(output_dir, task, model_name)
    with locked(file, figure):
        rates = earlier_rates(output_dir, model_name, task, repair, inputs, overwrite)
        rates |= {report["learning_rate"]: sweep_row(report) for report in reports}
        rows = [rates[rate] for rate in sorted(rates)]
        text = to_json({"model": model_name, "task": task, "repair": repair, "inputs": inputs, "rates": rows})
        write_if_changed(file.with_suffix(".csv"), csv_text(rows))
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            figure.unlink(missing_ok=True)  # first, so that a run killed here redraws it next time
            write_locked(file, text)
        if is_whole_picture(figure):
            remove(partial_of(figure))  # a run may have been killed at its last rename
        else:
            panels = {m: m if task in (m, "combined") else f"{m} (not repaired)" for m in MEASUREMENTS}
            if points := _points(output_dir, task, model_name, panels, inputs):
                repairs_figure(points, budget_percent, figure)
    drawn = f"; figure: {shown_path(figure)}" if figure.exists() else ""
    say(f"   sweep: {shown_path(file)} with .csv{drawn}")


def _sweeps(output_dir: str, task: str, model_name: str) -> dict[Path, dict[str, Any]]:
    """The sweeps of one model and task, by file."""
    any_repair = paths.sweep_file(output_dir, task, model_name, "")
    pattern = f"{glob.escape(any_repair.name.removesuffix('_sweep.json'))}*_sweep.json"
    sweeps = {file: read_sweep(file) for file in sorted(any_repair.parent.glob(pattern))}
    # The pattern also fits models whose name begins with this one.
    return {file: sweep for file, sweep in sweeps.items() if (sweep["model"], sweep["task"]) == (model_name, task)}


def _points(
    output_dir: str, task: str, model_name: str, panels: dict[str, str], inputs: dict[str, str]
) -> list[RepairPoint]:
    """Every swept repair of one task, once for each measurement of `panels`, under the title given there.

    Args:
        inputs: those of one sweep; another sweep whose model or measured data differ is named and left out.
    """
    points = []
    for file, sweep in _sweeps(output_dir, task, model_name).items():
        if {**sweep["inputs"], "gradient": None} != {**inputs, "gradient": None}:
            say(f"   not drawn, since it is of another model or was measured on other data: {shown_path(file)}")
            continue
        points += [
            RepairPoint(
                panel=f"{title} (split: {row[f'{metric}_split']})",
                line=sweep["repair"],
                learning_rate=row["learning_rate"],
                cost=with_interval(row, "perplexity_change_percent"),
                improvement=with_interval(row, f"{metric}_improvement"),
            )
            for metric, title in panels.items()
            for row in sweep["rates"]
            if {"perplexity_change_percent", f"{metric}_improvement"} <= set(row)
        ]
    return points


@first_process_only
def draw_overview(output_dir: str, model_names: Sequence[str], budget_percent: float) -> None:
    """All sweeps of all models: a panel per model and repaired task, with the improvement of that task."""
    figure = paths.overview_figure(output_dir)
    with locked(figure):
        _draw_overview(output_dir, model_names, budget_percent, figure)


def _draw_overview(output_dir: str, model_names: Sequence[str], budget_percent: float, figure: Path) -> None:
    points = []
    for name in model_names:
        prefix = "" if len(model_names) == 1 else f"{name}, "
        for task in MEASUREMENTS:
            sweeps = _sweeps(output_dir, task, name)
            if sweeps:
                newest = max(sweeps, key=lambda file: file.stat().st_mtime)
                title = f"{prefix}repaired for {task}"
                points += _points(output_dir, task, name, {task: title}, sweeps[newest]["inputs"])
    if points:
        repairs_figure(points, budget_percent, figure)
    else:
        figure.unlink(missing_ok=True)  # of other models
