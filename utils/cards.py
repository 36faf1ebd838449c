"""Model cards: what a checkpoint is, how it was made, what it cost, and what it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from utils.paths import may_be_hub_id
from utils.reporting import markdown_table, shown_number

TAGS = ["tracing-llm-trust"]
LOWER_IS_BETTER = (
    "Lower is better everywhere; bias, ethics and truth are log-odds losses in nats per token: the mean over answer "
    "pairs of NLL(trustworthy answer) - NLL(untrustworthy answer)."
)


def _hub_id(name: str) -> str | None:
    """The name, if it is a hub id: a card on the hub links to those, and has no use for somebody's folders."""
    return name if may_be_hub_id(name) else None


def _front_matter(base_model: str, dataset: str, tags: list[str]) -> list[str]:
    """The YAML block by which the hub files a model."""
    data = ModelCardData(
        base_model=_hub_id(base_model),
        datasets=[dataset] if _hub_id(dataset) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return ["---", data.to_yaml(), "---", ""]


def _list_of(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a Markdown list, in their order."""
    return [f"- `{name}`: {value}" for name, value in settings.items() if value is not None]


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


def _measured_table(measurements: dict[str, dict[str, float]]) -> list[str]:
    rows = []
    for metric, row in measurements.items():
        if metric == "perplexity":
            change = f"{row['change_percent']:+.2f} %"
        else:
            gain = row["improvement_percent"]
            change = f"{abs(gain):.1f} % {'better' if gain >= 0 else 'worse'}"
        rows.append([metric, shown_number(row["before"]), shown_number(row["after"]), change])
    return [markdown_table(["measurement (test split)", "before", "after", "change"], rows), "", LOWER_IS_BETTER, ""]


def repair_card(report: dict[str, Any]) -> str:
    """The README.md of a repaired checkpoint.

    Args:
        report: as in repair.json.
    """
    lines = _front_matter(report["model"], report["dataset"], [*TAGS, "influence-functions", "model-repair"])
    lines += [
        f"# {report['model']}, repaired for {report['task']}",
        "",
        f"{_step_in_words(report)}, at learning rate {report['learning_rate']:g}. Only the Linear layers of the last "
        f"{report['num_blocks']} transformer block(s) differ from the base model; the dialogues are those of "
        f"{report['dataset']}.",
        "",
    ]
    if report["search"]:
        lines += [f"The learning rate was searched for: {report['search']['stopped']}.", ""]
    if report["measurements"]:
        cost = report["measurements"].get("perplexity")
        told = [f"It cost {cost['change_percent']:+.2f} % perplexity on the test dialogues.", ""] if cost else []
        lines += ["## Before and after", "", *told, *_measured_table(report["measurements"])]
    lines += [
        "## How it was made",
        "",
        "The method of *Enhancing Trustworthiness of Fine-Tuned LLMs via Regularized Subset Selection* (ICLR 2026). "
        "Beside this card, `repair.json` has the unlearned rows and all numbers, `manifest.json` the versions.",
        "",
        *_list_of(report["settings"]),
        "",
        "## Intended use and limits",
        "",
        "For research on repairing fine-tuned models. The measurements are likelihoods of given answers, no behaviour;",
        "one that improved does not make a safe model, and another may have become worse. Check the others above, and",
        "your own use, before you rely on it. All limits of the base model remain.",
        "",
    ]
    return "\n".join(lines)


def sft_card(settings: Mapping[str, Any], num_dialogues: int, perplexity: dict[str, float]) -> str:
    """The README.md of a POST-SFT model.

    Args:
        settings: constants of data/make_sft_model.py.
        perplexity: `before` and `after`, on the test dialogues.
    """
    names = ("NUM_EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "SEED")
    lines = _front_matter(settings["BASE_MODEL"], settings["HH_DATASET"], [*TAGS, "sft"])
    lines += [
        f"# {settings['BASE_MODEL']}, fine-tuned on dialogues",
        "",
        f"Completion-only fine-tuning on {num_dialogues:,} dialogues of {settings['HH_DATASET']}; the end of each "
        f"answer is trained too. Perplexity on the test dialogues: {perplexity['before']:.3f} before, "
        f"{perplexity['after']:.3f} after.",
        "",
        "AdamW, linear warm-up over a twentieth of the steps and linear decay, gradient clipping at 1:",
        "",
        *_list_of({name: settings[name] for name in names}),
        "",
        "## Intended use and limits",
        "",
        "The starting point of tracing and repair: what harm the dialogues hold, it has learned. Not for deployment.",
        "",
    ]
    return "\n".join(lines)
