"""The least time that each of our steps could take here: operations over the rate of a large matrix product.

Counted are the matrix products that a step cannot avoid: Linear layers at every token, logits at every label,
their backward passes, and the sums behind factors and scores. Not counted: attention, softmax, reading and writing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure import BOTTOM_K, LEARNING_RATES, NUM_FEATURES
from benchmarks.workload import Workload
from utils.batching import LabelledSequence
from utils.models import load_config, load_tokenizer
from utils.paths import DEFAULT_SEED
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.pairs import tokenize_pairs
from utils.selection import random_subset


def matrix_rate(size: int = 4_096, repetitions: int = 5) -> float:
    """Operations per second of a float32 product of two large square matrices; the best of a few."""
    a, b, out = (torch.randn(size, size) for _ in range(3))
    return 2 * size**3 / min(_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(repetitions))


def copy_rate(num_bytes: int = 1 << 29, repetitions: int = 5) -> float:
    """Bytes per second, read and written, of a large copy; the best of a few."""
    source, target = torch.ones(num_bytes // 4), torch.ones(num_bytes // 4)
    return 2 * num_bytes / min(_seconds(lambda: target.copy_(source)) for _ in range(repetitions))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Tokens:
    """Size of a set of sequences: all tokens, and those that are labels."""

    all: int
    labels: int

    @classmethod
    def of(cls, sequences: list[LabelledSequence]) -> Tokens:
        """Count the tokens of some sequences."""
        return cls(sum(len(s.input_ids) for s in sequences), sum(s.num_labels for s in sequences))

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.all + other.all, self.labels + other.labels)

    def __mul__(self, factor: float) -> Tokens:
        return Tokens(round(self.all * factor), round(self.labels * factor))


@dataclass(frozen=True)
class Operations:
    """Operations (two per multiply-add) of a GPT-NeoX model's passes."""

    hidden: int
    intermediate: int
    num_blocks: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int, bool]]:
        """(out, in, whether its gradient is zero at tokens that predict no label) of each Linear in the last block."""
        h, i = self.hidden, self.intermediate
        return [(3 * h, h, False), (h, h, True), (i, h, True), (h, i, True)]

    @property
    def block(self) -> int:
        """One token through one block."""
        return 2 * sum(out * inside for out, inside, _ in self.linears)

    def trunk(self, tokens: Tokens) -> int:
        """Forward through all blocks but the last."""
        return tokens.all * self.block * (self.num_blocks - 1)

    def tail(self, tokens: Tokens, backward: bool = False) -> int:
        """The last block and the logits; `backward` adds the gradients of the activations."""
        logits = 2 * self.hidden * self.vocabulary * tokens.labels
        return (tokens.all * self.block + logits) * (2 if backward else 1)

    def per_linear(self, tokens: Tokens, inputs: bool, outputs: bool, product: float) -> int:
        """Sums over tokens with a gradient: in^2 if `inputs`, out^2 if `outputs`, `product` times out x in."""
        total = 0
        for out, inside, is_idle_at_prompt in self.linears:
            rows = tokens.labels if is_idle_at_prompt else tokens.all
            total += 2 * rows * (inputs * inside**2 + outputs * out**2 + product * out * inside)
        return total

    def rotation(self) -> int:
        """One gradient into the eigenbasis and back."""
        return sum(4 * out * inside * (out + inside) for out, inside, _ in self.linears)


def floors(work: Workload, num_greedy: int, hidden: int, rate: float, bytes_rate: float) -> dict[str, float]:
    """Seconds for each step of the benchmark; for step 3, computing the features or reading the representations once.

    Args:
        num_greedy, hidden: size of step 3's representations.
        rate: operations per second.
        bytes_rate: bytes per second.
    """
    config, tokenizer = load_config(work.model), load_tokenizer(work.model)
    model = Operations(config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size)
    train = tokenize_dialogues(load_dialogues(work.hh_dataset, "train"), tokenizer)
    test = Tokens.of(tokenize_dialogues(load_dialogues(work.hh_dataset, "test"), tokenizer))
    pairs = {
        split: [
            tokenize_pairs(m.load_pairs(Path(work.data_dir), split), tokenizer, m.max_tokens).sequences
            for m in MEASUREMENTS.values()
        ]
        for split in ("train", "test")
    }
    queries, test_pairs = (sum(map(Tokens.of, pairs[split]), Tokens(0, 0)) for split in ("train", "test"))
    training = Tokens.of(train)
    factors = training * (work.num_factor_examples / len(train))
    subset = Tokens.of([train[i] for i in random_subset(len(train), min(BOTTOM_K, len(train)), DEFAULT_SEED)])
    evaluated = test + test_pairs
    covariances = factors.all * 2 * sum(inside**2 for _, inside, _ in model.linears) + model.per_linear(
        factors, inputs=False, outputs=True, product=0
    )
    gradients = {
        "covariance": model.tail(factors, backward=True) + covariances,
        "Lambda": model.tail(factors, backward=True) + model.per_linear(factors, True, True, 1),
        "queries": model.tail(queries, backward=True) + model.per_linear(queries, False, False, 1),
        "scores": model.tail(training, backward=True) + model.per_linear(training, False, False, len(MEASUREMENTS)),
    }
    operations = {
        "step1_three_tasks": model.trunk(factors + training + queries)
        + sum(gradients.values())
        + len(MEASUREMENTS) * model.rotation(),
        "step2_representations": training.all * model.block * model.num_blocks,
        "step3_dpp_rff": 2 * num_greedy * hidden * NUM_FEATURES,
        "step3_dpp_rbf": 0,
        "step4_gradients": model.trunk(subset)
        + model.tail(subset, backward=True)
        + model.per_linear(subset, False, False, 1)
        + model.rotation(),
        "step5_sweep": model.trunk(evaluated) + (1 + len(LEARNING_RATES)) * model.tail(evaluated),
        "step6_evaluation": model.trunk(evaluated) + model.tail(evaluated),
    }
    moved = {"step3_dpp_rff": 4 * num_greedy * NUM_FEATURES, "step3_dpp_rbf": 4 * num_greedy * hidden}
    seconds = {step: count / rate + moved.get(step, 0) / bytes_rate for step, count in operations.items()}
    sizes = [size + 1 for _, size, _ in model.linears] + [size for size, _, _ in model.linears]
    seconds["step1_three_tasks"] += sum(_eigendecomposition_seconds(size) for size in sizes)
    return seconds


def _eigendecomposition_seconds(size: int) -> float:
    """Measured: the rate of a matrix product says nothing about it."""
    rows = torch.randn(size, size, dtype=torch.float64)
    matrix = rows @ rows.T
    return _seconds(lambda: torch.linalg.eigh(matrix))
