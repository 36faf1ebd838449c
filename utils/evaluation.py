"""Measuring models: HH perplexity and the three log-odds losses, always in float32."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from utils import paths
from utils.artifacts import FileArtifact
from utils.batching import BatchLoader, token_budget
from utils.console import UserError, shown_path
from utils.devices import resolve_device
from utils.intervals import estimate_mean
from utils.locks import locked
from utils.model_fingerprints import model_fingerprint
from utils.models import load_model, load_tokenizer
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import SequenceNLL, log_odds_losses, multiple_choice, sequence_nll
from utils.performance_functions.pairs import AnswerPairs, TokenizedPairs, tokenize_pairs
from utils.processes import all_reduce
from utils.registry import losses_artifact, result_artifact
from utils.results import HIGHER_IS_BETTER, LARGEST_LOSS, Losses, Metric, Result, quantities, summarise
from utils.settings import Settings
from utils.spreading import SPREAD
from utils.tensors import Shapes
from utils.trunk import Trunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Data = Dialogues | AnswerPairs


@torch.no_grad()
def measured_nll(model: PreTrainedModel, loader: BatchLoader) -> SequenceNLL:
    """NLL of all of the loader's sequences, in their order: (U,) float64 nats and (U,) label tokens, on the CPU."""
    total = torch.zeros(len(loader.sequences), dtype=torch.float64)
    num_tokens = torch.zeros(len(loader.sequences), dtype=torch.int64)
    for batch in loader:
        nll, index = sequence_nll(model, batch), batch["index"].cpu()
        total[index], num_tokens[index] = nll.total.double().cpu(), nll.num_tokens.cpu()
    all_reduce(total, num_tokens)
    return SequenceNLL(total, num_tokens)


def evaluate_dialogues(model: PreTrainedModel, loader: BatchLoader) -> Losses:
    """The NLL of every dialogue: "nll" and "tokens"."""
    nll = measured_nll(model, loader)
    return {"nll": nll.total, "tokens": nll.num_tokens}


def evaluate_pairs(model: PreTrainedModel, loader: BatchLoader, pairs: TokenizedPairs) -> Losses:
    """A trust measurement: the log-odds loss of every pair and its cluster, and MC1 and MC2 of every question.

    Args:
        loader: over the pairs' distinct sequences.
    """
    nll = measured_nll(model, loader)
    losses = {
        "loss": log_odds_losses(nll.mean, pairs.chosen, pairs.rejected),
        "cluster": torch.from_numpy(pairs.clusters),
    }
    if pairs.questions:
        losses["mc1"], losses["mc2"] = multiple_choice(nll.total, pairs.questions)
    return losses


def losses_shapes(data: Data) -> tuple[Shapes, list[str]]:
    """The shapes of `evaluate_dialogues` or `evaluate_pairs` on these data, and which of them are whole numbers."""
    if isinstance(data, Dialogues):
        return dict.fromkeys(("nll", "tokens"), (len(data),)), ["tokens"]
    of_pairs = dict.fromkeys(("loss", "cluster"), (len(data),))
    of_questions = dict.fromkeys(HIGHER_IS_BETTER, (len(data.questions),)) if data.questions else {}
    return {**of_pairs, **of_questions}, ["cluster"]


def _is_close(stored: object, value: float) -> bool:
    return isinstance(stored, (int, float)) and math.isclose(stored, value, rel_tol=1e-6, abs_tol=1e-9)


def require_finite_loss(model_name: str, metric: Metric, losses: Losses) -> None:
    """Check that a model can be measured at all.

    Raises:
        UserError: its mean loss is not finite, or its perplexity would not be.
    """
    loss = estimate_mean(quantities(losses)["loss"]).value
    if not math.isfinite(loss) or loss >= LARGEST_LOSS:
        shown = "HH" if metric == "anthropic" else metric
        raise UserError(
            f"{model_name}: the {shown} loss is {loss}: a LEARNING_RATE far too large, or broken weights of the model"
        )


class EvaluationInput(NamedTuple):
    """A tokenized data set: its batches, and its answer pairs if any."""

    loader: BatchLoader
    pairs: TokenizedPairs | None


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

    @classmethod
    def load(cls, name: str, device: torch.device, is_spread: bool = False) -> EvaluationModel:
        """A hub id or folder, with its tokenizer.

        Raises:
            UserError: as `load_model`.
        """
        model = load_model(name, device, is_spread)
        return cls(model, load_tokenizer(name, model))

    def measure(self, metric: Metric, data: Data, quiet: bool = False) -> Losses:
        """The losses of one measurement on the data; `quiet` shows no progress bar."""
        known = self._input(metric, data)
        loader = known.loader.described("") if quiet else known.loader
        if known.pairs is None:
            return evaluate_dialogues(self._tail, loader)
        return evaluate_pairs(self._tail, loader, known.pairs)

    def like(self, model: PreTrainedModel) -> EvaluationModel:
        """Another model with the same tokenizer, for which no data set is tokenized again.

        Raises:
            ValueError: this one has a trunk, whose cached hidden states are of this model alone.
        """
        if self.trunk:
            raise ValueError("the cached hidden states of a model with a trunk are not those of another model")
        other = copy.copy(self)
        other.model = other._tail = model
        return other

    def prepare(self, metric: Metric, data: Data, needs_labels: bool = True) -> None:
        """Tokenize data that will be measured many times: where memory is short, theirs are the hidden states to keep.

        Args:
            needs_labels: False for a portion of the dialogues, none of which need have a label.
        """
        self._inputs[metric, data.fingerprint] = self._tokenize(metric, data, needs_labels)

    def _input(self, metric: Metric, data: Data) -> EvaluationInput:
        if (metric, data.fingerprint) not in self._inputs:
            self.prepare(metric, data)
        return self._inputs[metric, data.fingerprint]

    def _tokenize(self, metric: Metric, data: Data, needs_labels: bool) -> EvaluationInput:
        pairs, description = None, "HH dialogues"
        if isinstance(data, Dialogues):
            sequences = tokenize_dialogues(data, self.tokenizer, needs_labels)
        else:
            pairs = tokenize_pairs(data, self.tokenizer, MEASUREMENTS[metric].max_tokens)
            sequences, description = pairs.sequences, f"{metric} pairs"
        cache = self.trunk.cache_for(sequences) if self.trunk else None
        loader = BatchLoader(
            sequences,
            token_budget(self.model, "auto"),
            self.tokenizer.pad_token_id,
            self.model.device,
            transform=cache.add_to if cache else None,
            description=description,
        )
        return EvaluationInput(loader, pairs)


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
                self._data[metric] = MEASUREMENTS[metric].load_pairs(data_dir, self.split, questions=True)
        return self._data[metric]

    def result(self, metric: Metric, model_name: str, fingerprint: str, load: Callable[[], EvaluationModel]) -> Result:
        """One measurement of one model, read from `results/` if it is stored there.

        Args:
            model_name: the name under which the result is stored.
            fingerprint: of the model.
            load: gives the model; called only if there is something to compute.

        Raises:
            UserError: data missing, a result of another model under this name, or a loss that is not finite.
        """
        location = (self.settings.OUTPUT_DIR, model_name, fingerprint, metric, self.split, self.data(metric))
        return self.result_at(metric, model_name, load, result_artifact(*location), losses_artifact(*location))

    def result_at(
        self,
        metric: Metric,
        model_name: str,
        load: Callable[[], EvaluationModel],
        artifact: FileArtifact,
        stored_losses: FileArtifact,
    ) -> Result:
        """As `result`, stored in the given artifacts."""
        with locked(artifact.path, stored_losses.path):
            if all(stored.is_finished(self.settings.OVERWRITE) for stored in (artifact, stored_losses)):
                return self._stored(metric, model_name, artifact, stored_losses)
            return self._measure(metric, model_name, load(), artifact, stored_losses)

    def _stored(self, metric: Metric, model_name: str, artifact: FileArtifact, stored_losses: FileArtifact) -> Result:
        """Read a measurement.

        Raises:
            UserError: the losses are not those of this data, or not those that the result was computed from.
        """
        shapes, counts = losses_shapes(self.data(metric))
        losses, numbers = stored_losses.load_tensors(shapes, counts), artifact.load_json()
        expected = {"model": model_name, **artifact.settings, **summarise(losses)}
        agree = isinstance(numbers, dict) and all(
            name in numbers
            and (numbers[name] == value or (isinstance(value, float) and _is_close(numbers[name], value)))
            for name, value in expected.items()
        )
        if not agree:
            raise UserError(
                f"{shown_path(artifact.path)} does not agree with {shown_path(stored_losses.path)}, which it was "
                f"computed from; delete both and run the same command again"
            )
        return Result(numbers, losses)

    def _measure(
        self,
        metric: Metric,
        model_name: str,
        model: EvaluationModel,
        artifact: FileArtifact,
        stored_losses: FileArtifact,
    ) -> Result:
        """Measure, and store the losses and the result."""
        started = time.monotonic()
        losses = model.measure(metric, self.data(metric))
        require_finite_loss(model_name, metric, losses)
        numbers = {"model": model_name, **artifact.settings, **summarise(losses)}
        stored_losses.save_tensors(losses, started)
        artifact.save_json(numbers, started)
        return Result(numbers, losses)


def evaluate_models(settings: Settings, metric: Metric) -> list[Result]:
    """Step 6: one measurement of every model in MODEL_NAMES."""
    device = resolve_device(settings.DEVICE)
    evaluator = Evaluator(settings, settings.SPLIT)

    load = partial(EvaluationModel.load, device=device, is_spread=settings.DEVICE == SPREAD)
    return [
        evaluator.result(metric, paths.model_short_name(name), model_fingerprint(name), partial(load, name))
        for name in settings.MODEL_NAMES
    ]
