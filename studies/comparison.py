"""Comparing methods over several models: what each improves beside the paper's direction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from utils.intervals import estimate_values
from utils.reporting.tables import Row, Table, WithInterval
from utils.settings import TASK_NAMES

REFERENCE = "pure_ekfac"  # the paper's direction: up the loss of the most harmful dialogues
Key = tuple[str, str, float]  # task, method, weight of the influence term


def comparison_table(models: Sequence[Sequence[Row]], caption: str) -> Table:
    """One row for each task and method: the mean over models of what it improves, and its ratio to REFERENCE.

    Args:
        models: for each model a row for each repair (studies/methods.py); what only some have is left out.
    """
    by_model = [{_key(row): row for row in rows} for rows in models]
    data = [_compared(by_model, key) for key in by_model[0] if all(key in rows for rows in by_model)]
    data.sort(key=lambda row: (row["task"], -row["improvement"]))
    header = ["repaired for", "method", "improvement", "ratio", "beyond the paper's", "perplexity", "other tasks"]
    header += ["seconds", "each model"]
    legend = (
        f"Improvement in nats per token on the test pairs, mean over {len(models)} model(s); ratio: of that mean to "
        f"{REFERENCE}'s; beyond the paper's: the difference to that, with a 95 % interval over models (Student's t) "
        "where there are several. Perplexity: change on the test dialogues; other tasks: mean improvement of their "
        "losses, negative is worse. Seconds: of the gradient, or of the retraining."
    )
    return Table(f"{caption} {legend}", header, [_cells(row) for row in data], data)


def _key(row: Row) -> Key:
    return row["task"], row["method"], row["if_weight"]


def _compared(by_model: Sequence[dict[Key, Row]], key: Key) -> Row:
    task, method, if_weight = key
    reference = next(other for other in by_model[0] if other[:2] == (task, REFERENCE))
    rows, theirs = ([rows[k] for rows in by_model] for k in (key, reference))
    beyond = estimate_values([a["improvement"] - b["improvement"] for a, b in zip(rows, theirs, strict=True)])
    mean, other = (statistics.fmean(row["improvement"] for row in some) for some in (rows, theirs))
    others = [name for name in TASK_NAMES if task not in (name, "combined")]
    return {
        "task": task,
        "method": method + (f" {if_weight:g}" if method.startswith("dpp") else ""),
        "improvement": mean,
        "ratio": mean / other,
        **beyond.fields("beyond"),
        "perplexity_change_percent": statistics.fmean(row["perplexity_change_percent"] for row in rows),
        **{f"{name}_change": _mean_of(rows, name) for name in others},
        "seconds": statistics.fmean(row["seconds"] for row in rows),
        "improvements": " ".join(f"{row['improvement']:+.3f}" for row in rows),
    }


def _mean_of(rows: Sequence[Row], task: str) -> float:
    return statistics.fmean(row["measurements"][task]["improvement"] for row in rows)


def _cells(row: Row) -> list[str]:
    beyond = WithInterval(row["beyond"], row["beyond_low"], row["beyond_high"])
    others = [f"{name} {row[f'{name}_change']:+.3f}" for name in TASK_NAMES if f"{name}_change" in row]
    return [
        row["task"],
        row["method"],
        f"{row['improvement']:+.3f}",
        f"{row['ratio']:.2f}",
        beyond.shown("+.3f") if row["method"] != REFERENCE else "–",
        f"{row['perplexity_change_percent']:+.2f} %",
        ", ".join(others) or "–",
        f"{row['seconds']:.1f}",
        row["improvements"],
    ]
