"""Model cards: what a checkpoint is, how it was made, what the repair cost, and what it is not for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from utils.methods import METHODS
from utils.paths import may_be_hub_id, public_name
from utils.reporting.escaping import markdown_text
from utils.reporting.tables import change_with_interval, format_number, markdown_table, with_interval

TAGS = ["tracing-llm-trust"]


def _front_matter(base_model: str, dataset: str, tags: list[str]) -> str:
    """The YAML header that the hub reads. It links to hub ids only, never to somebody's local folders."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base_model if may_be_hub_id(base_model) else None,
        datasets=[dataset] if may_be_hub_id(dataset) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---"


def _settings_list(settings: Mapping[str, Any]) -> str:
    """The settings that are set, of those that could be constants: a manifest may come from somebody else."""
    shown = {name: value for name, value in settings.items() if value is not None and name.isidentifier()}
    return "\n".join(f"- `{name}`: {markdown_text(value)}" for name, value in shown.items())


def _joined(paragraphs: Iterable[str | None]) -> str:
    return "\n\n".join(filter(None, paragraphs)) + "\n"


ALONG = {"natural": " of a natural gradient", "plain": "", "trained": " along a change of weights"}
WITHOUT_DIALOGUES = {  # what the step goes along, by scores_type
    "direct": "down the measurement itself, without any training dialogue",
    "direct_shuffled": "down the measurement with the prompts of other pairs, a control",
    "fitted": "that comes as near to one down the measurement as weights of all training dialogues allow",
    "weighted": "that counts every training dialogue by its influence score, harmful ones up and helpful ones down",
}


def _step_in_words(report: dict[str, Any]) -> str:
    kind, num_steps = report["scores_type"], report["num_steps"]
    method = METHODS[kind]
    step = ("One step" if num_steps == 1 else f"{num_steps} steps") + ALONG[method.step]
    what = "the tokens with negative scores of " if report["harmful_tokens_only"] else ""
    if method.is_trained:
        step += f" that the {'control' if method.is_control_of_npo else 'baseline'} `{kind}` trained"
    elif kind in WITHOUT_DIALOGUES:
        step += f" {WITHOUT_DIALOGUES[kind]}"
    elif kind == "descent":
        step += f" down the loss of {report['top_k']} random training dialogues, a control"
    else:
        step += f" up the loss of {what}{report['bottom_k']} training dialogues, chosen by `{kind}`"
        step += f", and down that of the {report['top_k']} most helpful" * bool(report["top_k"])
    kept = " To first order it leaves the loss of other training dialogues unchanged." * report["preserve_perplexity"]
    kept += " To first order it leaves the other measurements unchanged." * report["preserve_tasks"]
    return f"{step}, at learning rate {report['learning_rate']:g}.{kept}"


def _relation_to_the_paper(report: dict[str, Any]) -> str:
    is_papers = (
        report["scores_type"] in ("pure_ekfac", "dpp")
        and report["settings"].get("FACTOR_STRATEGY", "ekfac") == "ekfac"
        and report["num_steps"] == 1
        and not any(report[name] for name in ("harmful_tokens_only", "preserve_perplexity", "preserve_tasks"))
    )
    return "is" if is_papers else "extends, or is compared with,"


def _blocks_in_words(report: dict[str, Any]) -> str:
    return "transformer block" if report["num_blocks"] == 1 else f"{report['num_blocks']} transformer blocks"


def change_in_words(metric: str, row: dict[str, Any]) -> str:
    """A row of a report's measurements: `change +0.51 % [+0.31, +0.71]`, `improvement +0.042 [...] (+35.6 %)`."""
    change = f"{'change' if metric == 'perplexity' else 'improvement'} {change_with_interval(metric, row)}"
    percent = row.get("improvement_percent")
    return change if percent is None else f"{change} ({percent:+.1f} %)"


def _before_and_after(report: dict[str, Any]) -> list[str | None]:
    """Heading, table and legend; nothing where nothing was measured."""
    measurements, splits = report["measurements"], report["split_rules"]
    if not measurements:
        return []
    rows = [
        [metric, format_number(row["before"]), format_number(row["after"]), change_in_words(metric, row)]
        for metric, row in measurements.items()
    ]
    cost = "perplexity" in measurements and (
        f"Perplexity on the test dialogues: {change_in_words('perplexity', measurements['perplexity'])}."
    )
    legend = "Measured on the test split. Intervals are paired over its independent units."
    if splits:
        legend += (
            " Bias, ethics and truth are log-odds losses in nats per token, lower is better: the mean over answer "
            "pairs of NLL(trustworthy answer) - NLL(untrustworthy answer). MC1 and MC2 are TruthfulQA's "
            "multiple-choice scores, higher is better. No percentage is given where the loss before is within two "
            "standard errors of 0. How training and test pairs were split: "
            f"{', '.join(f'{task} {rule}' for task, rule in splits.items())}."
        )
    table = markdown_table(["measurement", "before", "after", "change [95 % interval]"], rows)
    return ["## Before and after", cost, table, legend]


def repair_card(report: dict[str, Any]) -> str:
    """The README.md of a repaired checkpoint.

    Args:
        report: as in repair.json.
    """
    model, dataset = markdown_text(report["model"]), markdown_text(report["dataset"])
    return _joined(
        [
            _front_matter(report["model"], report["dataset"], [*TAGS, "influence-functions", "model-repair"]),
            f"# {model}, repaired for {report['task']}",
            f"{_step_in_words(report)} Only the Linear layers of the last {_blocks_in_words(report)} differ "
            f"from the base model. The dialogues are those of {dataset}.",
            report["search"] and f"The learning rate was found by a search: {report['search']['stopped']}.",
            *_before_and_after(report),
            "## How it was made",
            f"The method {_relation_to_the_paper(report)} that of *Enhancing Trustworthiness of Fine-Tuned LLMs via "
            "Regularized Subset Selection* (ICLR 2026). In this folder, `repair.json` lists the unlearned rows and all "
            "results, and `manifest.json` the software versions.",
            _settings_list(report["settings"]),
            "## Intended use and limits",
            "For research on repairing fine-tuned models. The measurements are likelihoods of given answers, not\n"
            "behaviour. An improvement in one does not make the model safe, and others may have become worse: check\n"
            "them above, and test your own use case, before relying on it. All limitations of the base model remain.",
        ]
    )


def sft_card(settings: Mapping[str, Any], num_dialogues: int, perplexity: dict[str, float]) -> str:
    """The README.md of a POST-SFT model.

    Args:
        settings: constants of data/make_sft_model.py.
        perplexity: `before` and `after` fine-tuning on the test dialogues, with `after_low` and `after_high`.
    """
    names = ("NUM_EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "SEED")
    base, dataset = public_name(settings["BASE_MODEL"]), public_name(settings["HH_DATASET"])
    return _joined(
        [
            _front_matter(base, dataset, [*TAGS, "sft"]),
            f"# {markdown_text(base)}, fine-tuned on dialogues",
            f"Completion-only fine-tuning on {num_dialogues:,} dialogues of {markdown_text(dataset)}, including the "
            f"end-of-text token of each answer. Perplexity on the test dialogues: {perplexity['before']:.3f} before, "
            f"{with_interval(perplexity, 'after').shown('.3f')} after (95 % interval over the dialogues).",
            "AdamW, linear warm-up over the first 5 % of the steps, then linear decay, gradient clipping at 1:",
            _settings_list({name: settings[name] for name in names}),
            "## Intended use and limits",
            "A starting point for tracing and repair: it has learned whatever harm is in the dialogues. Not for "
            "deployment.",
        ]
    )
