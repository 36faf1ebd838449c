"""Measuring models: HH perplexity and the three log-odds losses, always in float32, as plain dictionaries."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from utils import paths
from utils.artifacts import fingerprint_of, read_json
from utils.batching import BatchLoader, token_budget
from utils.console import UserError
from utils.models import load_model, load_tokenizer, model_fingerprint, resolve_device
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, load_dialogues, released_loss, tokenize_dialogues
from utils.performance_functions.losses import SequenceNLL, log_odds_losses, sequence_nll
from utils.performance_functions.pairs import AnswerPair, TokenizedPairs, tokenize_pairs
from utils.registry import result_artifact
from utils.settings import Settings
from utils.trunk import HiddenStateCache, Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LARGEST_LOSS = 700.0  # whose perplexity is still a float
MAX_NEW_TOKENS = 48  # of a completion
Metric = Literal["anthropic", "bias", "ethics", "truth"]
Data = Dialogues | list[AnswerPair]


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


class EvaluationInput(NamedTuple):
    """A tokenized data set: its batches, its answer pairs if any, and the cache of its hidden states if any."""

    loader: BatchLoader
    pairs: TokenizedPairs | None
    cache: HiddenStateCache | None


class EvaluationModel:
    """A loaded model that can be measured any number of times; each data set is tokenized once.

    Args:
        trunk: of the model, if its last blocks will change between measurements: the trunk's output is cached, and
            each further measurement runs the tail alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, trunk: Trunk | None = None) -> None:
        self.model, self.tokenizer, self.trunk = model, tokenizer, trunk
        self._tail = trunk.tail if trunk else model
        self._inputs: dict[tuple[Metric, str], EvaluationInput] = {}

    def measure(self, metric: Metric, data: Data, quiet: bool = False) -> dict[str, Any]:
        """The numbers of one measurement on the data; `quiet` shows no progress bar."""
        known = self._input(metric, data)
        loader = known.loader.described("") if quiet else known.loader
        if known.pairs is None:
            return evaluate_dialogues(self._tail, loader)
        return evaluate_pairs(self._tail, loader, known.pairs)

    def dialogue_nll(self, dialogues: Dialogues) -> SequenceNLL:
        """NLL of each dialogue, in their order; shows no progress bar."""
        return measured_nll(self._tail, self._input("anthropic", dialogues).loader.described(""))

    def release(self, metric: Metric, data: Data) -> None:
        """Free the cached hidden states of data that will not be measured again."""
        known = self._inputs.pop((metric, data_fingerprint(data)), None)
        if known and known.cache:
            known.cache.release()

    def _input(self, metric: Metric, data: Data) -> EvaluationInput:
        key = (metric, data_fingerprint(data))
        if key not in self._inputs:
            self._inputs[key] = self._tokenize(metric, data)
        return self._inputs[key]

    def _tokenize(self, metric: Metric, data: Data) -> EvaluationInput:
        pairs, description = None, "HH dialogues"
        if isinstance(data, Dialogues):
            sequences = tokenize_dialogues(data, self.tokenizer)
        else:
            pairs = tokenize_pairs(data, self.tokenizer, MEASUREMENTS[metric].max_tokens)
            sequences, description = pairs.sequences, f"{metric} pairs"
        cache = HiddenStateCache(self.trunk) if self.trunk else None
        loader = BatchLoader(
            sequences,
            token_budget(self.model, "auto"),
            self.tokenizer.pad_token_id,
            self.model.device,
            transform=cache.add_to if cache else None,
            description=description,
        )
        return EvaluationInput(loader, pairs, cache)

    @torch.no_grad()
    def greedy_completions(self, prompts: Sequence[str]) -> list[str]:
        """The greedy completion of each prompt, at most MAX_NEW_TOKENS tokens."""
        completions = []
        for prompt in prompts:
            inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=min(MAX_NEW_TOKENS, self.tokenizer.model_max_length - inputs["input_ids"].shape[1]),
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )
            new_tokens = output[0, inputs["input_ids"].shape[1] :]
            completions.append(self.tokenizer.decode(new_tokens, skip_special_tokens=True))
        return completions


def data_fingerprint(data: Data) -> str:
    """Fingerprint of dialogues or answer pairs."""
    return data.fingerprint if isinstance(data, Dialogues) else fingerprint_of(data)


class Evaluator:
    """Measures models on one split and stores each result in `results/`; a stored result is not computed again.

    Args:
        settings: HH_DATASET or DATA_DIR, OUTPUT_DIR and OVERWRITE of the calling step.
        split: of the data.
    """

    def __init__(self, settings: Settings, split: Literal["train", "test"]) -> None:
        self.settings, self.split = settings, split
        self._data: dict[Metric, Data] = {}

    def data(self, metric: Metric) -> Data:
        """The split's dialogues or pairs, loaded once.

        Raises:
            UserError: the data are missing or malformed.
        """
        if metric not in self._data:
            if metric == "anthropic":
                self._data[metric] = load_dialogues(self.settings.HH_DATASET, self.split)
            else:
                data_dir = paths.resolve_path(self.settings.DATA_DIR)
                self._data[metric] = MEASUREMENTS[metric].load_pairs(data_dir, self.split)
        return self._data[metric]

    def result(
        self, metric: Metric, model_name: str, fingerprint: str, load: Callable[[], EvaluationModel]
    ) -> dict[str, Any]:
        """One measurement of one model, read from `results/` if it is stored there.

        Args:
            model_name: the name under which the result is stored.
            fingerprint: of the model's weights.
            load: gives the model; called only if there is something to compute.

        Raises:
            UserError: data missing, a result of another model under this name, or a loss that is not finite.
        """
        data = self.data(metric)
        artifact = result_artifact(
            self.settings.OUTPUT_DIR, model_name, fingerprint, metric, self.split, data_fingerprint(data)
        )
        if artifact.is_finished(self.settings.OVERWRITE):
            return read_json(artifact.path)
        model = load()
        started = time.monotonic()
        numbers = model.measure(metric, data)
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

    def load(name: str) -> EvaluationModel:
        model = load_model(name, device)
        return EvaluationModel(model, load_tokenizer(name, model))

    return [
        evaluator.result(metric, paths.model_short_name(name), model_fingerprint(name), partial(load, name))
        for name in settings.MODEL_NAMES
    ]


def improvement_percent(before: float, after: float) -> float:
    """(before - after) / |before|, in percent; positive is better, since lower losses are."""
    return 100 * (before - after) / abs(before) if before else 0.0


def change_percent(before: float, after: float) -> float:
    """(after - before) / before, in percent."""
    return 100 * (after - before) / before


def compare_results(before: dict[Metric, Any], after: dict[Metric, Any]) -> dict[str, dict[str, float]]:
    """Each measurement before and after a repair, with its change in percent.

    Args:
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
    return changes
