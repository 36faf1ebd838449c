"""What a repair did, for programs (repair.json) and for people (the model card)."""

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


def _step_in_words(report: dict[str, Any]) -> str:
    if report["scores_type"] == "direct":
        step = "One natural-gradient step down the measurement itself, without any training dialogue"
    else:
        step = (
            f"One natural-gradient step up the loss of {report['bottom_k']} training dialogues, chosen by "
            f"`{report['scores_type']}`"
        )
    kept = ", that leaves the loss of other training dialogues as it is to first order"
    return step + kept * report["preserve_perplexity"]


def model_card(report: dict[str, Any]) -> str:
    """The README.md of a repaired checkpoint: what it is, how it was made, what it cost."""
    lines = [
        "---",
        f"base_model: {report['model']}",
        "tags: [tracing-llm-trust, influence-functions, model-repair]",
        "---",
        "",
        f"# {report['model']}, repaired for {report['task']}",
        "",
        f"{_step_in_words(report)}, at learning rate {report['learning_rate']:g}. Only the Linear layers of the last "
        f"{report['num_blocks']} transformer block(s) differ from the base model.",
        "",
    ]
    if report["search"]:
        lines += [f"The learning rate was searched for: {report['search']['stopped']}.", ""]
    if report["measurements"]:
        lines += ["| measurement (test split) | before | after | change |", "|---|---|---|---|"]
        for metric, row in report["measurements"].items():
            if metric == "perplexity":
                change = f"{row['change_percent']:+.2f} %"
            else:
                change = f"{row['improvement_percent']:+.1f} % better"
            lines.append(f"| {metric} | {row['before']:.4f} | {row['after']:.4f} | {change} |")
        lines += ["", "Lower is better everywhere; bias, ethics and truth are log-odds losses in nats per token.", ""]
    lines += [
        "Limits: one measurement improved is not a safe model. Check the other measurements, and your own use, before",
        "you rely on it.",
        "",
    ]
    return "\n".join(lines)
