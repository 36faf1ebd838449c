"""The repair itself: one step up the subset's loss along the natural gradient, and what it cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from utils import paths
from utils.artifacts import Artifact, require_finite, to_json, write_atomically
from utils.console import UserError, say, shown_path
from utils.influence import Gradients
from utils.models import (
    copy_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_device,
    weights_fingerprint,
)
from utils.performance_functions.evaluation import Evaluator, MeasurableModel
from utils.pipeline import gradients_artifact, scored_tasks
from utils.settings import Settings
from utils.trunk import Trunk


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


class Repair:
    """One model and one gradient, repaired at each learning rate in turn; loads only when there is work."""

    def __init__(self, settings: Settings, task: str) -> None:
        self.settings, self.task = settings, task
        self.name = paths.model_short_name(settings.MODEL_NAME)
        self.fingerprint = model_fingerprint(settings.MODEL_NAME)
        self.gradients = gradients_artifact(settings, self.name, task, {}, {"model": self.fingerprint})
        self.gradients_manifest = self.gradients.require()
        self.metrics = ["anthropic"] if settings.COMPUTE_ANTHROPIC_EVAL else []
        self.metrics += scored_tasks(task) if settings.COMPUTE_TASK_EVAL else []
        self._loaded: MeasurableModel | None = None

    def model_at(self, learning_rate: float) -> MeasurableModel:
        """The model, updated at this learning rate (0 gives the POST-SFT model)."""
        if self._loaded is None:
            name = self.settings.MODEL_NAME
            model = load_model(name, resolve_device(self.settings.DEVICE))
            num_blocks = self.gradients_manifest["settings"]["NUM_BLOCKS"]
            trunk = Trunk(model, self.settings.MODEL_FAMILY, num_blocks)
            self._loaded = MeasurableModel(model, load_tokenizer(name), trunk)
            self._steps = self.gradients.load_tensors()
            self._originals = original_weights(model, self._steps)
        ascend(self._loaded.model, self._steps, learning_rate, self._originals)
        return self._loaded

    def checkpoint(self, learning_rate: float) -> Artifact:
        """The artefact that holds the repaired model."""
        s = self.settings
        path = paths.repaired_model_dir(
            s.OUTPUT_DIR, self.task, self.name, s.SCORES_TYPE, s.BOTTOM_K, s.IF_WEIGHT, learning_rate
        )
        inputs = {"model": self.fingerprint, "gradient": self.gradients_manifest["fingerprint"]}
        return Artifact(path, paths.STEP_5, {"LEARNING_RATE": learning_rate}, inputs, is_folder=True)

    def save(self, learning_rate: float) -> None:
        """Write the repaired checkpoint, unless it is there."""
        checkpoint = self.checkpoint(learning_rate)
        if checkpoint.is_finished(self.settings.OVERWRITE):
            return
        started = time.monotonic()
        model = self.model_at(learning_rate).model
        require_finite(dict(model.named_parameters()), f"LEARNING_RATE = {learning_rate:g}")
        with checkpoint.growing_folder() as folder:
            model.save_pretrained(folder)
            copy_tokenizer(self.settings.MODEL_NAME, folder)
            shapes = {name: list(step.shape) for name, step in self._steps.items()}
            checkpoint.publish_folder(started, shapes, weights=weights_fingerprint(folder))

    def report(self, learning_rate: float, evaluator: Evaluator) -> dict[str, Any]:
        """Measure before and after on the evaluator's split; results that are there are read."""
        checkpoint = self.checkpoint(learning_rate)
        before, after = {}, {}
        for metric in self.metrics:
            before[metric] = evaluator.result(metric, self.name, self.fingerprint, lambda: self.model_at(0.0))
            after[metric] = evaluator.result(
                metric,
                checkpoint.path.name,
                checkpoint.fingerprint,
                lambda: self.model_at(learning_rate),
            )
        recipe = {
            "model": self.settings.MODEL_NAME,
            "task": self.task,
            "scores_type": self.settings.SCORES_TYPE,
            "if_weight": self.settings.IF_WEIGHT if self.settings.SCORES_TYPE == "dpp" else None,
            "bottom_k": self.settings.BOTTOM_K,
            "learning_rate": learning_rate,
            "num_blocks": self.gradients_manifest["settings"]["NUM_BLOCKS"],
            "indices": self.gradients_manifest["indices"],
        }
        return repair_report(recipe, before, after)

    def describe(self, learning_rate: float, report: dict[str, Any]) -> None:
        """Write repair.json and the model card into the checkpoint; what says the same already is left untouched."""
        folder = self.checkpoint(learning_rate).path
        for name, text in (("repair.json", to_json(report)), ("README.md", model_card(report))):
            if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text:
                write_atomically(folder / name, text)
        say(f"   repaired model: {shown_path(folder)}")
