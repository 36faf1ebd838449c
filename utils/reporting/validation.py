"""Tables and picture of the validation of scores: linear datamodelling scores, and what removals changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.reporting.figures import FIGURE_STYLES, save_figure
from utils.reporting.tables import Row, Table, WithInterval, with_interval
from utils.settings import TASK_NAMES, Settings

CEILING_STYLE = ("#999999", "_")
TRAINED_AGAIN = "the same halves, trained again"


def _lds(row: Row) -> list[WithInterval]:
    return [WithInterval(**interval) for interval in row["lds"]]


def lds_table(rows: Sequence[Row], split: str, seconds: Mapping[str, float], settings: Settings) -> Table:
    """One row for each SCORES_TYPE, and the ceiling.

    Args:
        rows: of evaluation_scripts/validate_scores.py's `lds_rows`.
        split: of the pairs that the retrained models were measured on.
        seconds: that the scores of all tasks took, by SCORES_TYPE.
    """
    shown = [row for row in rows if row["split"] == split]
    cells = []
    for row in shown:
        took = seconds.get(row["predicted_by"])
        against = row.get("against_pure_ekfac")
        cells.append(
            [
                row["predicted_by"],
                "–" if took is None else f"{took:.1f}",
                *(value.shown("+.3f") for value in _lds(row)),
                WithInterval(**against).shown("+.3f") if against else "–",
            ]
        )
    pairs = "training pairs, of which the scores are gradients" if split == "train" else "test pairs"
    caption = (
        "Linear datamodelling score: Spearman's correlation of summed scores with the measurement after fine-tuning on "
        f"{settings.NUM_SUBSETS} random halves, on the {pairs}, with 95 % bootstrap intervals over the halves; mean of "
        f"{settings.NUM_REPEATS} retrainings of each half taken one at a time{_ceiling(shown)}"
    )
    header = ["scores", "seconds", *TASK_NAMES, "mean", "mean - pure_ekfac"]
    return Table(caption, header, cells, [_flat_lds(row, seconds) for row in shown])


def _ceiling(rows: Sequence[Row]) -> str:
    """What a perfect prediction could reach, in words; nothing where no half was trained again."""
    again = next((row["lds"][-1]["value"] for row in rows if row["predicted_by"] == TRAINED_AGAIN), None)
    if again is None:
        return ""
    reach = f"about {math.sqrt(again):.2f}" if again > 0 else "nothing that can be told"
    return f". Two retrainings of a half agree as the last row says, so a perfect prediction would reach {reach}"


def _flat_lds(row: Row, seconds: Mapping[str, float]) -> dict[str, Any]:
    flat: dict[str, Any] = {"split": row["split"], "scores": row["predicted_by"]}
    flat["seconds"] = seconds.get(row["predicted_by"])
    for name, interval in zip([*TASK_NAMES, "mean"], row["lds"], strict=True):
        flat |= {f"{name}_{part}".removesuffix("_value"): number for part, number in interval.items()}
    against = row.get("against_pure_ekfac", {})
    return flat | {f"mean_less_pure_ekfac_{part}".removesuffix("_value"): number for part, number in against.items()}


def removal_table(rows: Sequence[Row], settings: Settings) -> Table:
    """One row for each removal.

    Args:
        rows: of evaluation_scripts/validate_scores.py's `removal_rows`.
    """
    cells = []
    for row in rows:
        own = f"{row['task']}_beyond_random"
        percent = WithInterval(*(_percent(end) for end in with_interval(row, "log_perplexity")))
        cells.append(
            [
                f"{row['direction']} for {row['task']}" if row["task"] else "any",
                row["scores_type"],
                with_interval(row, own).shown("+.3f") if row["task"] else "–",
                *(with_interval(row, f"{name}_improvement").shown("+.3f") for name in TASK_NAMES),
                percent.shown("+.2f", " %"),
            ]
        )
    caption = (
        f"Fine-tuned again without {settings.BOTTOM_K} dialogues: improvement of the test pairs' loss (nats per token) "
        f"against fine-tuning on all, mean over {len(settings.TRAINING_SEEDS)} training seeds with its 95 % interval; "
        "beyond random is the task's own improvement less that of as many random dialogues"
    )
    header = ["removed", "chosen by", "beyond random", *TASK_NAMES, "perplexity"]
    return Table(caption, header, cells, list(rows))


def _percent(log_change: float | None) -> float | None:
    return None if log_change is None else 100 * math.expm1(log_change)


def validation_figure(lds: Sequence[Row], changes: Sequence[Row], path: Path) -> None:
    """Left the LDS on the training pairs of each task, right each task's own improvement beyond random removal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = [(row["predicted_by"], _lds(row)) for row in lds if row["split"] == "train"]
    for number, (label, values) in enumerate(lines):
        _draw(left, number - len(lines) / 2, label, values)
    left.set(title="LDS (training pairs)", xticks=range(len(TASK_NAMES) + 1), xticklabels=[*TASK_NAMES, "mean"])
    kinds = list(dict.fromkeys((row["scores_type"], row["direction"]) for row in changes if row["task"]))
    for number, (scores_type, direction) in enumerate(kinds):
        of_task = {
            row["task"]: row for row in changes if (row["scores_type"], row["direction"]) == (scores_type, direction)
        }
        values = [with_interval(of_task[task], f"{task}_beyond_random") for task in TASK_NAMES]
        _draw(right, number - len(kinds) / 2, f"{scores_type}, {direction} removed", values)
    title = "Improvement of the test loss (nats per token)\nbeyond that of removing random dialogues"
    right.set(title=title, xticks=range(len(TASK_NAMES)), xticklabels=TASK_NAMES)
    for panel in (left, right):
        panel.axhline(0, color="#444444", lw=0.8)
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)


def _draw(panel: Any, offset: float, label: str, values: Sequence[WithInterval]) -> None:  # noqa: ANN401
    """A point with its interval for each task, beside those of other lines."""
    name = next((name for name in FIGURE_STYLES if label.startswith(name)), None)
    colour, marker = FIGURE_STYLES[name] if name else CEILING_STYLE
    places = [task + 0.09 * offset for task in range(len(values))]
    # A percentile interval need not hold the value.
    margins = [[max(0.0, margin) for margin in side] for side in zip(*(v.margins for v in values), strict=True)]
    hollow = "white" if "helpful" in label else colour
    style = {"color": colour, "marker": marker, "markerfacecolor": hollow, "ls": "none", "ms": 6, "capsize": 2}
    panel.errorbar(places, [value.value for value in values], yerr=margins, label=label, **style)
