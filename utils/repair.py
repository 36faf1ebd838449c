"""The repair itself: one step up the subset's loss along the natural gradient, and what it cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from utils.console import UserError
from utils.influence import Gradients


def ascend(model: nn.Module, gradients: Gradients, learning_rate: float, originals: Gradients) -> None:
    """theta <- theta + learning_rate * G, in place, from the original weights.

    One gradient step that approximates the proximal Bregman response function (Bae et al. 2022), as in the paper.

    Args:
        gradients: (1, out, in), or (1, out, in + 1) with the bias last, by dotted module name.
        originals: theta before any update, from `original_weights`; a sweep starts from it at every rate.
    """
    with torch.no_grad():
        for name, gradient in gradients.items():
            module = model.get_submodule(name)
            step = gradient.squeeze(0).to(module.weight.device)  # (out, in) or (out, in + 1)
            weight_step = step[:, : module.in_features]
            module.weight.copy_(torch.add(originals[f"{name}.weight"], weight_step, alpha=learning_rate))
            if module.bias is not None:
                module.bias.copy_(torch.add(originals[f"{name}.bias"], step[:, -1], alpha=learning_rate))


def original_weights(model: nn.Module, gradients: Gradients) -> Gradients:
    """Copies of the weights and biases that the gradients belong to.

    Raises:
        UserError: a gradient names a module that the model lacks, or has another shape.
    """
    originals = {}
    modules = dict(model.named_modules())
    for name, gradient in gradients.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"the gradient has a tensor for {name}, and the model has no such Linear; run make_gradients.py again"
            )
        expected = (1, module.out_features, module.in_features + (module.bias is not None))
        if tuple(gradient.shape) != expected:
            raise UserError(f"the gradient of {name} has shape {tuple(gradient.shape)}, and the model needs {expected}")
        for parameter_name, parameter in module.named_parameters():
            originals[f"{name}.{parameter_name}"] = parameter.detach().clone()
    return originals


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
        f"One natural-gradient step up the loss of {report['bottom_k']} training dialogues, chosen by "
        f"`{report['scores_type']}`, at learning rate {report['learning_rate']:g}. Only the Linear layers of the last "
        f"{report['num_blocks']} transformer block(s) differ from the base model.",
        "",
    ]
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
