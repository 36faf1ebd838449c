"""Comparing methods over several models: what each improves beside the paper's direction, from tables on disk."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from utils import paths
from utils.intervals import estimate_values
from utils.reporting.tables import Row, Table, WithInterval

REFERENCE = "pure_ekfac"  # the paper's direction: up the loss of the most harmful dialogues
METHOD_KEY = ("task", "method", "bottom_k", "if_weight", "top_k")


def read_rows(output_dir: str | Path) -> list[Row]:
    """The unrounded rows of a main table that evaluation_scripts/paper_tables.py wrote below OUTPUT_DIR."""
    import pandas as pd

    rows = pd.read_csv(paths.tables_dir(output_dir) / "main.csv").to_dict("records")
    return [{name: None if value != value else value for name, value in row.items()} for row in rows]


def comparison_table(models: Sequence[Sequence[Row]], caption: str) -> Table:
    """One row for each task and method, with the mean over models of what it improves, and its ratio to REFERENCE.

    Args:
        models: the rows of each model's main table; seeds of the steps are averaged first.
    """
    by_model = [_means(rows) for rows in models]
    keys = [key for key in by_model[0] if all(key in means for means in by_model)]
    data = []
    for key in sorted(keys, key=lambda key: (key[0], -_mean(by_model, key, "improvement"))):
        reference = next(other for other in keys if other[0] == key[0] and other[1] == REFERENCE)
        gains, theirs = ([means[k]["improvement"] for means in by_model] for k in (key, reference))
        beyond = estimate_values([gain - other for gain, other in zip(gains, theirs, strict=True)])
        data.append(
            {
                **dict(zip(METHOD_KEY, key, strict=True)),
                "improvement": statistics.fmean(gains),
                "ratio": statistics.fmean(gains) / statistics.fmean(theirs),
                **beyond.fields("beyond"),
                "perplexity_change_percent": _mean(by_model, key, "perplexity_change_percent"),
                "seconds": _mean(by_model, key, "seconds"),
                "improvements": " ".join(f"{gain:+.3f}" for gain in gains),
            }
        )
    header = [
        "repaired for",
        "method",
        "improvement",
        "ratio",
        "beyond the paper's",
        "perplexity",
        "seconds",
        "each model",
    ]
    return Table(f"{caption} {_legend(len(models))}", header, [_cells(row) for row in data], data)


def _legend(num_models: int) -> str:
    return (
        f"Improvement in nats per token on the test pairs, mean over {num_models} model(s); ratio of that mean to the "
        f"mean of {REFERENCE}; beyond the paper's: the difference, with a 95 % interval over models (t) where "
        "there are several. All within the same perplexity budget, by the same search."
    )


def _cells(row: Row) -> list[str]:
    beyond = WithInterval(row["beyond"], row["beyond_low"], row["beyond_high"])
    return [
        row["task"],
        row["method"],
        f"{row['improvement']:+.3f}",
        f"{row['ratio']:.2f}",
        beyond.shown("+.3f") if row["method"] != REFERENCE else "–",
        f"{row['perplexity_change_percent']:+.2f} %",
        f"{row['seconds']:.1f}",
        row["improvements"],
    ]


def _means(rows: Sequence[Row]) -> dict[tuple, Row]:
    """The means over seeds of the steps, by `METHOD_KEY`."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in METHOD_KEY), []).append(row)
    names = ("improvement", "perplexity_change_percent", "seconds")
    return {
        key: {name: statistics.fmean(row[name] for row in group) for name in names} for key, group in groups.items()
    }


def _mean(by_model: Sequence[dict[tuple, Row]], key: tuple, name: str) -> float:
    return statistics.fmean(means[key][name] for means in by_model)
