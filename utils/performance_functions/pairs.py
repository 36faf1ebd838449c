"""Answer pairs: one prompt with a trustworthy answer (chosen) and an untrustworthy one (rejected)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from utils.batching import LabelledSequence
from utils.console import UserError, say_read, shown_path
from utils.files import fingerprint_of
from utils.labels import label_texts
from utils.performance_functions.data_files import shown_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Far above the official data, which have at most 10,000 pairs with 2 million characters.
MAX_PAIRS = 200_000  # of one file
MAX_PAIR_CHARACTERS = 200_000_000  # of prompt + answer, over all answers of a file
SPLIT_SEED = 42  # of the data sets' own splits; SEED does not affect them


class AnswerPair(NamedTuple):
    """A prompt and its two answers, each beginning with a space."""

    prompt: str
    chosen: str
    rejected: str


class Question(NamedTuple):
    """A multiple-choice question: a prompt and its answers, each beginning with a space; the best comes first."""

    prompt: str
    correct: list[str]
    incorrect: list[str]


@dataclass(frozen=True)
class AnswerPairs:
    """The answer pairs of one split.

    Attributes:
        clusters: for each pair the name of the independent unit that it belongs to: the pairs of one cluster share
            texts, so that standard errors are clustered by it.
        split_rule: how train and test were told apart.
        questions: with all of their answers, where the data have them.
    """

    pairs: list[AnswerPair]
    clusters: list[str]
    split_rule: str
    questions: list[Question] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[AnswerPair]:
        return iter(self.pairs)

    def sample(self, count: int, seed: int) -> AnswerPairs:
        """At most `count` of the pairs, whole clusters as far as they fit: a seeded sample, in the order of the data.

        Questions are left out.
        """
        if len(self) <= count:
            return self
        rows_of: dict[str, list[int]] = {}
        for row, cluster in enumerate(self.clusters):
            rows_of.setdefault(cluster, []).append(row)
        order = random.Random(f"pairs {seed}").sample(list(rows_of), len(rows_of))
        rows = sorted([row for cluster in order for row in rows_of[cluster]][:count])
        return AnswerPairs([self.pairs[row] for row in rows], [self.clusters[row] for row in rows], self.split_rule)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of all texts in their order."""
        return fingerprint_of([self.pairs, self.clusters, self.questions])

    @property
    def cluster_numbers(self) -> np.ndarray:
        """(P,) the clusters as numbers from 0."""
        number_of = {cluster: number for number, cluster in enumerate(dict.fromkeys(self.clusters))}
        return np.array([number_of[cluster] for cluster in self.clusters])


@dataclass(frozen=True)
class Measurement:
    """One trust measurement: the mean log-odds loss over its answer pairs.

    Attributes:
        name: the task it belongs to.
        read_pairs: from DATA_DIR and a split ("train" or "test") to the pairs.
        max_tokens: where prompt + answer is cut.
    """

    name: str
    read_pairs: Callable[[Path, Literal["train", "test"]], AnswerPairs]
    max_tokens: int

    def load_pairs(self, data_dir: Path, split: Literal["train", "test"], questions: bool = False) -> AnswerPairs:
        """Read the pairs of a split, and say so.

        Args:
            questions: keep the questions with all of their answers, if there are any; they cost more to measure.

        Raises:
            UserError: the data are missing or malformed.
        """
        pairs = self.read_pairs(data_dir, split)
        say_read(f"{self.name} pairs below {shown_path(data_dir)}, {split}", f"{len(pairs):,} ({pairs.split_rule})")
        return pairs if questions else replace(pairs, questions=[])


@dataclass(frozen=True)
class TokenizedPairs:
    """Answer pairs as distinct sequences: an answer that occurs in several pairs is run through the model once.

    Attributes:
        sequences: the U distinct texts.
        chosen: (P,) for each pair, the position in `sequences` of its prompt with the chosen answer.
        rejected: (P,) the same for the rejected answer.
        clusters: (P,) number of each pair's cluster.
        questions: for each multiple-choice question the positions of its correct and of its incorrect answers.
    """

    sequences: list[LabelledSequence]
    chosen: np.ndarray
    rejected: np.ndarray
    clusters: np.ndarray
    questions: list[tuple[np.ndarray, np.ndarray]]

    @property
    def weights(self) -> np.ndarray:
        """(U,) the weight of each sequence's mean NLL in the measurement: f_task = sum_u weight_u NLL_u."""
        counts = [np.bincount(side, minlength=len(self.sequences)) for side in (self.chosen, self.rejected)]
        return (counts[0] - counts[1]) / len(self.chosen)


def tokenize_pairs(pairs: AnswerPairs, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TokenizedPairs:
    """Tokenize prompt + answer with the tokenizer's defaults, cut at `max_tokens`; labels are the answer's tokens.

    Raises:
        UserError: an answer has no token that counts, or as `label_texts`.
    """
    position_of: dict[tuple[str, str], int] = {}

    def positions(texts: Iterable[tuple[str, str]]) -> np.ndarray:
        return np.array([position_of.setdefault(text, len(position_of)) for text in texts])

    chosen = positions((pair.prompt, pair.chosen) for pair in pairs)
    rejected = positions((pair.prompt, pair.rejected) for pair in pairs)
    questions = [
        (positions((prompt, text) for text in correct), positions((prompt, text) for text in incorrect))
        for prompt, correct, incorrect in pairs.questions
    ]
    prompts, answers = zip(*position_of, strict=True)
    sequences = label_texts(prompts, answers, tokenizer, max_tokens, special_tokens=True)
    for prompt, answer, sequence in zip(prompts, answers, sequences, strict=True):
        if sequence.num_labels == 0:
            reason = f"is left after the cut at {min(max_tokens, tokenizer.model_max_length)} tokens"
            if not answer:
                reason = "is there: the answer is empty"
            elif sequence.label_start < len(sequence.input_ids):
                reason = "counts: the prompt is empty, and the answer a single token"
            raise UserError(f"no token of an answer {reason}; prompt: {shown_value(prompt)}")
    return TokenizedPairs(sequences, chosen, rejected, pairs.cluster_numbers, questions)


def require_size(path: Path, num_pairs: int, num_characters: int) -> None:
    """Refuse a file whose texts multiply beyond any real measurement, before they are put together.

    Args:
        path: the file that they are made of.
        num_pairs: pairs, or answers where a question has more than two.
        num_characters: of the prompts with each of their answers, in all.

    Raises:
        UserError: more than MAX_PAIRS or MAX_PAIR_CHARACTERS.
    """
    sizes = [(num_pairs, MAX_PAIRS, "pairs"), (num_characters, MAX_PAIR_CHARACTERS, "characters of pairs")]
    for number, limit, unit in sizes:
        if number > limit:
            raise UserError(
                f"{shown_path(path)} makes {number:,} {unit}; allowed are {limit:,}: give fewer or shorter texts"
            )
