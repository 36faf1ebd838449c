"""Table of what is left of repairs under stresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from utils.reporting.tables import NO_PERCENTAGE, Row, Table, WithInterval, with_interval
from utils.results import Metric, Result
from utils.settings import TASK_NAMES


def robustness_table(name: str, before: Mapping[str, Mapping[Metric, Result]], rows: Sequence[Row]) -> Table:
    """A row for the POST-SFT model under each stress, then one for each repaired model under each.

    Args:
        name: of the POST-SFT model.
        before: its results, by stress and metric.
        rows: of evaluation_scripts/robustness.py's `repair_rows`.
    """
    cells = []
    for stress, results in before.items():
        perplexity = with_interval(results["anthropic"].numbers, "perplexity").shown(".3f")
        losses = (with_interval(results[task].numbers, "loss").shown(".3f") for task in TASK_NAMES)
        cells.append([name, "–", stress, perplexity, "–", *losses, "–"])
    for row in rows:
        left = with_interval(row, "share_left")
        percent = None if left.value is None else WithInterval(*(end and 100 * end for end in left))
        cells.append(
            [
                *(row[column] for column in ("model", "task", "stress")),
                f"{row['perplexity_after']:.3f}",
                with_interval(row, "perplexity_change_percent").shown("+.2f", " %"),
                *(with_interval(row, f"{task}_improvement").shown("+.3f") for task in TASK_NAMES),
                percent.shown(".0f", " %") if percent else NO_PERCENTAGE,
            ]
        )
    caption = (
        "What is left of each repair on the test split. The unrepaired model: perplexity, and log-odds losses in nats "
        "per token, lower is better. Repaired models: change of perplexity and improvement of each loss (before - "
        "after), against the unrepaired model under the same stress; left is the improvement of what the model was "
        "repaired for (combined: the sum of the three), divided by that without a stress. intN: weights of the blocks' "
        "linear layers rounded to N bits; fine-tuned: further steps on training dialogues. In brackets: 95 % "
        "intervals, paired over the independent units of the test split."
    )
    if any(row["share_left"] is None for row in rows):
        caption += f" {NO_PERCENTAGE}: the improvement without a stress is within two standard errors of 0."
    header = ["model", "repaired for", "stress", "perplexity", "change", *TASK_NAMES, "left"]
    return Table(caption, header, cells, list(rows))
