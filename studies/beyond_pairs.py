"""Whether a repair on answer pairs learns more than these pairs: other categories, multiple choice, and style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from studies.style import answers_only_probabilities, is_close_in_length
from utils.intervals import Estimate, estimate_values
from utils.performance_functions import MEASUREMENTS
from utils.reporting.tables import Row, Table, WithInterval, with_interval

FEWEST = 5  # pairs that an interval is given for


def style_groups(data_dir: Path) -> dict[str, np.ndarray]:
    """Groups of the truth test pairs, each (P,) bool, by what the two answers without their question say."""
    train, test = (MEASUREMENTS["truth"].load_pairs(data_dir, split) for split in ("train", "test"))
    is_right = answers_only_probabilities(train, test) > 0.5
    is_close = is_close_in_length(test)
    return {
        "all": np.ones(len(test), dtype=bool),
        "style right": is_right,
        "style wrong": ~is_right,
        "same length": is_close,
        "same length, style wrong": is_close & ~is_right,
    }


def beyond_table(rows: Sequence[Row], groups: dict[str, np.ndarray], caption: str) -> Table:
    """Repairs for truth: the improvement of each group of pairs, and of MC1 and MC2, each with a 95 % interval."""
    header = ["method", *(f"{name} ({int(group.sum())})" for name, group in groups.items()), "MC1", "MC2", "perplexity"]
    cells, data = [], []
    for row in rows:
        improvements = np.array(row["of_pairs"]["truth"])
        of_groups = {
            name: estimate_values(improvements[group].tolist()) for name, group in groups.items() if group.any()
        }
        of_choices = {
            name: with_interval(row["measurements"][f"truth_{name}"], "improvement")
            for name in ("mc1", "mc2")
            if f"truth_{name}" in row["measurements"]
        }
        cells.append(
            [
                row["method"],
                *(_shown(of_groups.get(name)) for name in groups),
                *(of_choices[name].shown("+.3f") if name in of_choices else "–" for name in ("mc1", "mc2")),
                f"{row['perplexity_change_percent']:+.2f} %",
            ]
        )
        fields = {
            key: value for name, of in of_groups.items() for key, value in of.fields(name.replace(" ", "_")).items()
        }
        data.append({"method": row["method"], **fields, **{name: of.value for name, of in of_choices.items()}})
    legend = (
        "Improvement of the truth loss in nats per token, by groups of test pairs (their number in brackets); 'style' "
        "is what a logistic regression on words and length says of the two answers without their question, fitted on "
        "the training pairs; 'same length' is within 20 % of the words. MC1, MC2: change of TruthfulQA's "
        "multiple-choice scores over all of the test questions' answers."
    )
    return Table(f"{caption} {legend}", header, cells, data)


def _shown(estimate: Estimate | None) -> str:
    if estimate is None or estimate.clusters < FEWEST:
        return "–"
    return WithInterval(estimate.value, *estimate.interval).shown("+.3f")
