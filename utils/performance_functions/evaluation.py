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
from utils.batching import BatchLoader, token_budget
from utils.console import UserError
from utils.models import load_model, load_tokenizer, model_fingerprint, resolve_device
from utils.performance_functions.bias import BIAS
from utils.performance_functions.ethics import ETHICS
from utils.performance_functions.hh import Dialogues, load_dialogues, released_loss, tokenize_dialogues
from utils.performance_functions.losses import SequenceNLL, log_odds_losses, sequence_nll
from utils.performance_functions.pairs import AnswerPair, Measurement, TokenizedPairs, tokenize_pairs
from utils.performance_functions.truth import TRUTH
from utils.settings import Settings
from utils.trunk import KeptStates, Trunk

LARGEST_LOSS = 700.0  # whose perplexity is still a float
Metric = Literal["anthropic", "bias", "ethics", "truth"]
MEASUREMENTS: dict[str, Measurement] = {measurement.name: measurement for measurement in (BIAS, ETHICS, TRUTH)}
SCRIPTS = {
    "anthropic": "evaluation_scripts/anthropic_eval.py",
    **{name: f"evaluation_scripts/{name}_loss.py" for name in MEASUREMENTS},
}


@torch.no_grad()
def measured_nll(model: PreTrainedModel, loader: BatchLoader) -> SequenceNLL:
    """NLL of all of the loader's sequences, in their order: (U,) float64 nats and (U,) label tokens, on the CPU."""
    total = torch.zeros(len(loader.sequences), dtype=torch.float64)
    num_tokens = torch.zeros(len(loader.sequences), dtype=torch.int64)
    for batch in loader:
        nll, index = sequence_nll(model, batch), batch["index"].cpu()
        total[index], num_tokens[index] = nll.total.double().cpu(), nll.num_tokens.cpu()
    return SequenceNLL(total, num_tokens)


def evaluate_dialogues(model: PreTrainedModel, loader: BatchLoader) -> dict[str, Any]:
    """Perplexity on the dialogues: exp of the mean NLL per label token.

    Returns:
        loss (nats per token), perplexity, tokens, and released_loss, the released code's batch-dependent mean.
    """
    nll = measured_nll(model, loader)
    loss = nll.per_token
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < LARGEST_LOSS else math.inf,
        "tokens": int(nll.num_tokens.sum()),
        "released_loss": released_loss(nll.total.tolist(), nll.num_tokens.tolist()),
    }


def evaluate_pairs(model: PreTrainedModel, loader: BatchLoader, pairs: TokenizedPairs) -> dict[str, Any]:
    """A trust measurement: the mean log-odds loss of the pairs.

    Args:
        loader: over the pairs' distinct sequences.

    Returns:
        loss (nats per token), pairs, and accuracy: the share of pairs whose chosen answer is likelier per token.
    """
    losses = log_odds_losses(measured_nll(model, loader).mean, pairs.chosen, pairs.rejected)
    return {
        "loss": float(losses.mean()),
        "pairs": len(losses),
        "accuracy": float((losses < 0).double().mean()),
    }


class MeasurableModel:
    """A loaded model, ready to be measured any number of times; each data set is tokenized once.

    Args:
        trunk: of the model, where its last blocks will change between measurements: the trunk's output is kept, and
            each further measurement runs the tail alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trunk: Trunk | None = None) -> None:
        self.model, self.tokenizer, self.trunk = model, tokenizer, trunk
        self._inputs: dict[tuple[str, str], tuple[BatchLoader, TokenizedPairs | None]] = {}

    def measure(
        self, metric: Metric, split: str, data: Dialogues | list[AnswerPair], quiet: bool = False
    ) -> dict[str, Any]:
        """The numbers of one measurement on one split; `quiet` shows no bar."""
        loader, pairs = self._input(metric, split, data, quiet)
        model = self._evaluated
        return evaluate_dialogues(model, loader) if pairs is None else evaluate_pairs(model, loader, pairs)

    def dialogue_nll(self, split: str, dialogues: Dialogues) -> SequenceNLL:
        """NLL of each dialogue, in their order; shows no bar."""
        loader, _ = self._input("anthropic", split, dialogues, quiet=True)
        return measured_nll(self._evaluated, loader)

    @property
    def _evaluated(self) -> PreTrainedModel:
        return self.trunk.tail if self.trunk else self.model

    def _input(
        self, metric: Metric, split: str, data: Dialogues | list[AnswerPair], quiet: bool
    ) -> tuple[BatchLoader, TokenizedPairs | None]:
        if (metric, split) not in self._inputs:
            self._inputs[metric, split] = self._prepare(metric, data)
        loader, pairs = self._inputs[metric, split]
        return (loader.described("") if quiet else loader), pairs

    def _prepare(self, metric: Metric, data: Dialogues | list[AnswerPair]) -> tuple[BatchLoader, TokenizedPairs | None]:
        pairs, description = None, "HH dialogues"
        if isinstance(data, Dialogues):
            sequences = tokenize_dialogues(data, self.tokenizer)
        else:
            pairs = tokenize_pairs(data, self.tokenizer, MEASUREMENTS[metric].max_tokens)
            sequences, description = pairs.sequences, f"{metric} pairs"
        loader = BatchLoader(
            sequences,
            token_budget(self.model, "auto"),
            self.tokenizer.pad_token_id,
            self.model.device,
            transform=KeptStates(self.trunk).add_to if self.trunk else None,
            description=description,
        )
        return loader, pairs


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
        load: Callable[[], MeasurableModel],
    ) -> dict[str, Any]:
        """One measurement of one model, from `results/` where it is there.

        Args:
            model_name: the name under which the result is kept.
            fingerprint: of the model's weights.
            load: gives the model; called only if there is something to compute.

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
        numbers = load().measure(metric, self.split, data)
        if not math.isfinite(numbers["loss"]) or numbers["loss"] >= LARGEST_LOSS:
            raise UserError(
                f"{model_name}: the {metric} loss is {numbers['loss']}; the model's weights may be broken, or a "
                "LEARNING_RATE far too large"
            )
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
            lambda name=name: MeasurableModel(load_model(name, device), load_tokenizer(name)),
        )
        for name in settings.MODEL_NAMES
    ]
