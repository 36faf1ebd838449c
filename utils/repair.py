"""The repair itself: one step up the subset's loss along the natural gradient, and what it cost."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import nn

from utils import paths
from utils.artifacts import Artifact, fingerprint_of, read_json, require_finite, to_json, write_if_changed
from utils.cards import repair_card
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
from utils.performance_functions.completions import first_prompts, greedy_completions
from utils.performance_functions.evaluation import MEASUREMENTS, Evaluator, MeasurableModel
from utils.pipeline import gradients_artifact, repair_name, task_weights, weights_setting
from utils.repair_report import repair_report
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


class Repair:
    """One model and one gradient, repaired at each learning rate in turn; loads only when there is work."""

    def __init__(self, settings: Settings, task: str) -> None:
        self.settings, self.task = settings, task
        self.name = paths.model_short_name(settings.MODEL_NAME)
        self.repair_name = repair_name(settings)
        self.fingerprint = model_fingerprint(settings.MODEL_NAME)
        self.gradients = gradients_artifact(
            settings, self.name, task, weights_setting(settings, task), {"model": self.fingerprint}
        )
        self.gradients_manifest = self.gradients.require()
        self.metrics = ["anthropic"] if settings.COMPUTE_ANTHROPIC_EVAL else []
        self.metrics += list(MEASUREMENTS) if settings.COMPUTE_TASK_EVAL else []
        self._loaded: MeasurableModel | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what every repaired model is made from."""
        return {"model": self.fingerprint, "gradient": self.gradients_manifest["fingerprint"]}

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
        path = paths.repaired_model_dir(self.settings.OUTPUT_DIR, self.task, self.name, self.repair_name, learning_rate)
        return Artifact(path, paths.STEP_5, {"LEARNING_RATE": learning_rate}, self.inputs, is_folder=True)

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

    def report(self, learning_rate: float, evaluator: Evaluator, search: dict[str, Any] | None) -> dict[str, Any]:
        """Measure before and after on the evaluator's split; results that are there are read.

        Args:
            search: how the learning rate was found, where it was.
        """
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
            "bottom_k": len(self.gradients_manifest["indices"]),
            "preserve_perplexity": self.settings.PRESERVE_PERPLEXITY,
            "learning_rate": learning_rate,
            "num_blocks": self.gradients_manifest["settings"]["NUM_BLOCKS"],
            "seconds": self.gradients_manifest["seconds"] + (search["seconds"] if search else 0),
            "indices": self.gradients_manifest["indices"],
            "search": search,
            "dataset": self.settings.HH_DATASET,
            "settings": self.gradients_manifest["settings"],
        }
        return repair_report(recipe, before, after)

    def complete(self, learning_rate: float, evaluator: Evaluator) -> None:
        """Keep greedy completions of the repaired tasks' test prompts, before and after, unless as many are there."""
        checkpoint = self.checkpoint(learning_rate)
        pairs = {task: evaluator.data(task) for task in task_weights(self.settings, self.task)}
        prompts = {task: first_prompts(some, self.settings.NUM_COMPLETIONS) for task, some in pairs.items()}
        artifact = Artifact(
            paths.result_file(self.settings.OUTPUT_DIR, checkpoint.path.name, "completions", evaluator.split),
            paths.STEP_5,
            inputs={"model": checkpoint.fingerprint, "pairs": fingerprint_of(pairs)},
        )
        if artifact.is_finished(self.settings.OVERWRITE):
            kept = Counter(row["task"] for row in read_json(artifact.path))
            if all(kept[task] >= len(some) for task, some in prompts.items()):
                return
        started = time.monotonic()
        rows = [{"task": task, "prompt": prompt} for task, some in prompts.items() for prompt in some]
        for when, rate in (("before", 0.0), ("after", learning_rate)):
            measurable = self.model_at(rate)
            texts = greedy_completions(measurable.model, measurable.tokenizer, [row["prompt"] for row in rows])
            for row, text in zip(rows, texts, strict=True):
                row[when] = text
        artifact.save_json(rows, started)

    def describe(self, learning_rate: float, report: dict[str, Any]) -> None:
        """Write repair.json and the model card into the checkpoint; what says the same already is left untouched."""
        folder = self.checkpoint(learning_rate).path
        for name, text in (("repair.json", to_json(report)), ("README.md", repair_card(report))):
            write_if_changed(folder / name, text)
        say(f"   repaired model: {shown_path(folder)}")
