"""Measure a model: HH perplexity and the three log-odds losses, always in float32, as plain dictionaries."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils import paths
from utils.artifacts import Artifact, fingerprint_of, read_json
from utils.batching import BatchLimits, BatchLoader, batch_limits
from utils.console import UserError
from utils.models import load_model, load_tokenizer, model_fingerprint, resolve_device
from utils.performance_functions.bias import BIAS
from utils.performance_functions.ethics import ETHICS
from utils.performance_functions.hh import Dialogues, load_dialogues, released_loss, tokenize_dialogues
from utils.performance_functions.losses import log_odds_loss, sequence_nll
from utils.performance_functions.pairs import AnswerPair, Measurement, tokenize_pairs
from utils.performance_functions.truth import TRUTH
from utils.settings import Settings

Metric = Literal["anthropic", "bias", "ethics", "truth"]
MEASUREMENTS: dict[str, Measurement] = {measurement.name: measurement for measurement in (BIAS, ETHICS, TRUTH)}
SCRIPTS = {
    "anthropic": "evaluation_scripts/anthropic_eval.py",
    **{name: f"evaluation_scripts/{name}_loss.py" for name in MEASUREMENTS},
}


@torch.no_grad()
def evaluate_dialogues(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dialogues: Dialogues, limits: BatchLimits
) -> dict[str, Any]:
    """Perplexity on the dialogues: exp of the mean NLL per label token.

    Returns:
        loss (nats per token), perplexity, tokens, and released_loss, the released code's batch-dependent mean.
    """
    examples = tokenize_dialogues(dialogues, tokenizer)
    loader = BatchLoader(examples, limits, tokenizer.pad_token_id, model.device, description="HH dialogues")
    totals = torch.zeros(len(examples), dtype=torch.float64)
    num_tokens = torch.zeros(len(examples), dtype=torch.int64)
    for batch in loader:
        nll = sequence_nll(model, batch)
        totals[batch["index"].cpu()] = nll.total.double().cpu()
        num_tokens[batch["index"].cpu()] = nll.num_tokens.cpu()
    loss = float(totals.sum() / num_tokens.sum())
    return {
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens": int(num_tokens.sum()),
        "released_loss": released_loss(totals.tolist(), num_tokens.tolist()),
    }


@torch.no_grad()
def evaluate_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[AnswerPair],
    measurement: Measurement,
    limits: BatchLimits,
) -> dict[str, Any]:
    """A trust measurement: the mean log-odds loss of the pairs.

    Returns:
        loss (nats per token), pairs, and accuracy: the share of pairs whose chosen answer is likelier per token.
    """
    examples = tokenize_pairs(pairs, tokenizer, measurement.max_tokens)
    description = f"{measurement.name} pairs"
    loader = BatchLoader(examples, limits, tokenizer.pad_token_id, model.device, description=description)
    losses = torch.zeros(len(examples), dtype=torch.float64)
    for batch in loader:
        losses[batch["index"].cpu()] = log_odds_loss(model, batch).double().cpu()
    return {
        "loss": float(losses.mean()),
        "pairs": len(pairs),
        "accuracy": float((losses < 0).double().mean()),
    }


class Evaluator:
    """Measures models on one split and keeps each result in `results/`; what is there already is not computed again.

    Args:
        settings: HH_DATASET, DATA_DIR, OUTPUT_DIR, OVERWRITE of the calling step.
        split: which half of the data.
    """

    def __init__(self, settings: Settings, split: Literal["train", "test"]) -> None:
        self.settings, self.split = settings, split
        self._data: dict[str, Any] = {}

    def data(self, metric: Metric) -> Any:  # noqa: ANN401
        """The split's dialogues or pairs, loaded once.

        Raises:
            UserError: missing or broken.
        """
        if metric not in self._data:
            if metric == "anthropic":
                self._data[metric] = load_dialogues(self.settings.HH_DATASET, self.split)
            else:
                data_dir = paths.anchored(self.settings.DATA_DIR)
                self._data[metric] = MEASUREMENTS[metric].load_pairs(data_dir, self.split)
        return self._data[metric]

    def result(
        self,
        metric: Metric,
        model_name: str,
        fingerprint: str,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    ) -> dict[str, Any]:
        """One measurement of one model, from `results/` where it is there.

        Args:
            model_name: the name under which the result is kept.
            fingerprint: of the model's weights.
            load: gives the model and its tokenizer; called only if there is something to compute.

        Raises:
            UserError: data missing, a result of another model under this name, or a loss that is not finite.
        """
        data = self.data(metric)
        data_fingerprint = data.fingerprint if metric == "anthropic" else fingerprint_of(data)
        artifact = Artifact(
            paths.result_file(self.settings.OUTPUT_DIR, model_name, metric, self.split),
            made_by=SCRIPTS[metric],
            settings={"metric": metric, "split": self.split},
            inputs={"model": fingerprint, "data": data_fingerprint},
        )
        if artifact.is_finished(self.settings.OVERWRITE):
            return read_json(artifact.path)
        started = time.monotonic()
        model, tokenizer = load()
        limits = batch_limits(model, "auto")
        if metric == "anthropic":
            numbers = evaluate_dialogues(model, tokenizer, data, limits)
        else:
            numbers = evaluate_pairs(model, tokenizer, data, MEASUREMENTS[metric], limits)
        if not math.isfinite(numbers["loss"]):
            raise UserError(f"{model_name}: the {metric} loss is {numbers['loss']}; the model's weights may be broken")
        content = {"model": model_name, "metric": metric, "split": self.split, **numbers}
        artifact.save_json(content, started)
        return content


def evaluate_models(settings: Settings, metric: Metric) -> list[dict[str, Any]]:
    """Step 6: one measurement of every model in MODEL_NAMES."""
    device = resolve_device(settings.DEVICE)
    evaluator = Evaluator(settings, settings.SPLIT)
    return [
        evaluator.result(
            metric,
            paths.model_short_name(name),
            model_fingerprint(name),
            lambda name=name: (load_model(name, device), load_tokenizer(name)),
        )
        for name in settings.MODEL_NAMES
    ]
