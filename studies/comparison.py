"""Comparing methods over several models: what each improves beside the paper's direction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from utils.console import UserError
from utils.intervals import Estimate, estimate_mean, estimate_values, sum_by_cluster
from utils.reporting.figures import save_figure
from utils.reporting.tables import Row, Table, with_interval
from utils.settings import TASK_NAMES

REFERENCE = "pure_ekfac"  # the paper's direction: up the loss of the most harmful dialogues
Key = tuple[str, str, float]  # task, method, weight of the influence term


def require_reference(scores_types: Sequence[str]) -> None:
    """Check, before the work, that there will be something to compare with.

    Raises:
        UserError: REFERENCE is not among the methods.
    """
    if REFERENCE not in scores_types:
        raise UserError(
            f"SCORES_TYPES = {' '.join(scores_types)}: needs {REFERENCE}, which the others are compared with"
        )


def comparison_table(runs: Sequence[Sequence[Row]], caption: str, are_models: bool = True) -> Table:
    """One row for each task and method: the mean over runs of what it improves, and its ratio to REFERENCE.

    Args:
        runs: for each a row for each repair (studies/methods.py); what only some have is left out.
        are_models: whether they are of several models; else of several seeds of the steps on one model, whose intervals
            are over its test pairs.
    """
    by_run = [{_key(row): row for row in rows} for rows in runs]
    estimate = _over_runs if are_models else _over_pairs
    data = [_compared(by_run, key, estimate) for key in by_run[0] if all(key in rows for rows in by_run)]
    data.sort(key=lambda row: (row["task"], -row["improvement"]))
    header = ["repaired for", "method", "improvement", "ratio", "beyond the paper's", "perplexity", "other tasks"]
    header += ["seconds", "each of them"]
    runs_are, over = ("models", "models (Student's t), which says nothing about other test pairs")
    if not are_models:
        runs_are, over = ("seeds of the steps", "clusters of test pairs, paired")
    legend = (
        f"Improvement in nats per token on the test pairs, mean over {runs_are} ({len(runs)}); ratio: of that mean to "
        f"{REFERENCE}'s; beyond the paper's: the difference to that. In brackets 95 % intervals over {over}. "
        "Perplexity: change on the test dialogues; other tasks: mean improvement of their losses, negative is worse. "
        "Seconds: of the gradient, or of the retraining."
    )
    return Table(f"{caption} {legend}", header, [_cells(row) for row in data], data)


def _key(row: Row) -> Key:
    return row["task"], row["method"], row["if_weight"]


def _compared(by_run: Sequence[dict[Key, Row]], key: Key, estimate: Callable[..., Estimate]) -> Row:
    task, method, if_weight = key
    reference = next(other for other in by_run[0] if other[:2] == (task, REFERENCE))
    rows, theirs = ([rows[k] for rows in by_run] for k in (key, reference))
    improvement, beyond, paper = estimate(rows), estimate(rows, theirs), estimate(theirs)
    others = [name for name in TASK_NAMES if task not in (name, "combined")]
    return {
        "task": task,
        "method": method + (f" {if_weight:g}" if method.startswith("dpp") else ""),
        **improvement.fields("improvement"),
        "ratio": improvement.value / paper.value if paper.value else None,
        **beyond.fields("beyond"),
        "perplexity_change_percent": statistics.fmean(row["perplexity_change_percent"] for row in rows),
        **{f"{name}_change": _mean_of(rows, name) for name in others},
        "seconds": statistics.fmean(row["seconds"] for row in rows),
        "improvements": " ".join(f"{row['improvement']:+.3f}" for row in rows),
    }


def _over_runs(rows: Sequence[Row], minus: Sequence[Row] | None = None) -> Estimate:
    """The mean improvement, less that of other rows of the same runs; runs are what is sampled."""
    values = [row["improvement"] for row in rows]
    if minus:
        values = [value - other["improvement"] for value, other in zip(values, minus, strict=True)]
    return estimate_values(values)


def _over_pairs(rows: Sequence[Row], minus: Sequence[Row] | None = None) -> Estimate:
    """The same; test pairs are what is sampled, by their clusters. Of "combined", the mean over the tasks."""
    names = TASK_NAMES if rows[0]["task"] == "combined" else (rows[0]["task"],)
    estimates = []
    for name in names:
        values = _of_pairs(rows, name) - (_of_pairs(minus, name) if minus else 0)
        estimates.append(estimate_mean(sum_by_cluster(values, torch.as_tensor(rows[0]["clusters"][name]))))
    error = math.hypot(*(one.standard_error for one in estimates)) / len(names)
    value = statistics.fmean(one.value for one in estimates)
    return Estimate(value, error, min(one.clusters for one in estimates))


def _of_pairs(rows: Sequence[Row], task: str) -> torch.Tensor:
    """(P,) the improvement of each test pair, mean over runs."""
    return torch.tensor([row["of_pairs"][task] for row in rows], dtype=torch.float64).mean(dim=0)


def _mean_of(rows: Sequence[Row], task: str) -> float:
    return statistics.fmean(row["measurements"][task]["improvement"] for row in rows)


def _cells(row: Row) -> list[str]:
    improvement, beyond = (with_interval(row, name) for name in ("improvement", "beyond"))
    others = [f"{name} {row[f'{name}_change']:+.3f}" for name in TASK_NAMES if f"{name}_change" in row]
    return [
        row["task"],
        row["method"],
        improvement.shown("+.3f"),
        "–" if row["ratio"] is None else f"{row['ratio']:.2f}",
        beyond.shown("+.3f") if row["method"] != REFERENCE else "–",
        f"{row['perplexity_change_percent']:+.2f} %",
        ", ".join(others) or "–",
        f"{row['seconds']:.1f}",
        row["improvements"],
    ]


def comparison_figure(data: Sequence[Row], path: Path) -> None:
    """The improvement of every method in one step: a panel for each task, a bar for each method."""
    from matplotlib.figure import Figure

    shown = [row for row in data if " in " not in row["method"] and "+" not in row["method"]]
    tasks = list(dict.fromkeys(row["task"] for row in shown))
    order = [row["method"] for row in shown if row["task"] == tasks[0]][::-1]
    figure = Figure(figsize=(3.6 * len(tasks) + 1.5, 0.26 * len(order) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for panel, task in zip(panels, tasks, strict=True):
        rows = {row["method"]: row for row in shown if row["task"] == task}
        paper = rows[REFERENCE]["improvement"]
        values = [rows[method]["improvement"] if method in rows else 0.0 for method in order]
        panel.barh(order, values, color=["#e76f51" if method == REFERENCE else "#2a9d8f" for method in order])
        for method, value in zip(order, values, strict=True):
            label = f" {value / paper:.2f}" if paper else f" {value:+.3f}"
            panel.annotate(label, (value, method), va="center", fontsize=7)
        panel.axvline(paper, color="#e76f51", lw=0.8)
        panel.set_title(f"repaired for {task}", parse_math=False)
        panel.set_xlabel("improvement, nats per token")
        panel.margins(x=0.15)
    figure.suptitle(
        "Improvement at 1 % more test perplexity (retrain: whatever it costs); numbers: ratio to pure_ekfac"
    )
    save_figure(figure, path)
