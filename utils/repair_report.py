"""What a repair did: each measurement before and after."""

from __future__ import annotations

from typing import Any


def improvement_percent(before: float, after: float) -> float:
    """(before - after) / |before|, in percent; positive is better, since lower losses are."""
    return 100 * (before - after) / abs(before) if before else 0.0


def change_percent(before: float, after: float) -> float:
    """(after - before) / before, in percent."""
    return 100 * (after - before) / before


def repair_report(recipe: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a repair did: its recipe, and each measurement before and after.

    Args:
        recipe: model, task and settings.
        before: results of the POST-SFT model, by metric.
        after: results of the repaired model, by the same metrics.
    """
    changes = {}
    for metric in before:
        if metric == "anthropic":
            old, new = before[metric]["perplexity"], after[metric]["perplexity"]
            changes["perplexity"] = {"before": old, "after": new, "change_percent": change_percent(old, new)}
        else:
            old, new = before[metric]["loss"], after[metric]["loss"]
            changes[metric] = {"before": old, "after": new, "improvement_percent": improvement_percent(old, new)}
    return {**recipe, "measurements": changes}
