"""Which dialogues a tracing finds: the order of a ranking, and how many known harmful ones stand first in it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steps import load_script, run_script
from studies.methods import settings_of
from utils.kept_model import keep_model
from utils.paths import LIST_HARMFUL, STEP_1, STEP_2
from utils.rankings import ranked
from utils.registry import ModelArtifacts
from utils.reporting.tables import Row, Table, with_interval
from utils.settings import RankingType

# As SCORES_TYPE of evaluation_scripts/list_harmful.py. bm25 sees words alone: what a tracing has to beat.
RANKINGS: tuple[RankingType, ...] = ("pure_ekfac", "identity", "representation", "mean_difference", "bm25")


def trace(common: dict[str, Any], is_ranked_in_every_way: bool) -> None:
    """Run step 1 on a model, and with `is_ranked_in_every_way` what all of RANKINGS need."""
    with keep_model():
        run_script(STEP_1, common)
        if is_ranked_in_every_way:
            run_script(STEP_1, common, FACTOR_STRATEGY="identity")
            run_script(STEP_2, common, ANSWERS_OF="all")


def traced_artifacts(common: dict[str, Any]) -> ModelArtifacts:
    """The artifacts of a traced model, for `ranked`.

    Args:
        common: constants that all steps share, with MODEL_NAME.
    """
    return ModelArtifacts(settings_of(load_script(LIST_HARMFUL), common), common["MODEL_NAME"])


def recall_table(traced: Mapping[str, dict[str, Any]], known_harm: Mapping[str, Sequence[int]], caption: str) -> Table:
    """One row for each task, ranking and model; one model alone for BM25, which knows none.

    Args:
        traced: by the name of a model in the table, constants that all steps share, with MODEL_NAME; `trace` is done.
        known_harm: rows of the training split, by the task that they harm.
    """
    data, models = [], {model: traced_artifacts(common) for model, common in traced.items()}
    for (task, rows), name in itertools.product(known_harm.items(), RANKINGS):
        for model, artifacts in list(models.items())[: 1 if name == "bm25" else None]:
            order = ranked(artifacts, task, name)
            found = recall(np.isin(order, list(rows)))
            data.append({"task": task, "ranking": name, "traced": "–" if name == "bm25" else model, **found})
    header = [
        "task",
        "ranking",
        "traced model",
        "known",
        "among the first 20",
        "among as many",
        "of them",
        "average precision",
        "chance",
    ]
    cells = [
        [
            row["task"],
            row["ranking"],
            row["traced"],
            f"{row['known']}",
            f"{row['first_20']}",
            f"{row['found']}",
            with_interval(row, "recall").shown(".2f"),
            f"{row['average_precision']:.2f}",
            f"{row['chance']:.2f}",
        ]
        for row in data
    ]
    legend = (
        "Known: harmful dialogues of the task's kind; then how many of them stand among the first 20 of the ranking, "
        "and among as many as there are, as a share with its 95 % interval (Clopper and Pearson). Chance: their share "
        "of all dialogues, which a random order gives as recall and average precision."
    )
    return Table(f"{caption} {legend}", header, cells, data)


def recall(is_known: np.ndarray) -> Row:
    """What a ranking finds.

    Args:
        is_known: (N,) bool in the ranking's order, most harmful first.
    """
    from scipy.stats import binomtest

    known = int(is_known.sum())
    found = int(is_known[:known].sum())
    low, high = binomtest(found, known).proportion_ci()
    ranks = np.flatnonzero(is_known) + 1
    return {
        "known": known,
        "first_20": int(is_known[:20].sum()),
        "found": found,
        "recall": found / known,
        "recall_low": float(low),
        "recall_high": float(high),
        "average_precision": float((np.arange(1, known + 1) / ranks).mean()),
        "chance": known / len(is_known),
    }
