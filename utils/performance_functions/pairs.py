"""Answer pairs: one prompt with a trustworthy answer (chosen) and an untrustworthy one (rejected)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from utils.batching import LabelledSequence
from utils.console import UserError, say_read, shown_path
from utils.labels import label_texts

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

SPLIT_SEED = 42  # of the data sets' own splits; SEED does not affect them


class AnswerPair(NamedTuple):
    """A prompt and its two answers, each beginning with a space."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Measurement:
    """One trust measurement: the mean log-odds loss over its answer pairs.

    Attributes:
        name: the task it belongs to.
        read_pairs: from DATA_DIR and a split ("train" or "test") to the pairs.
        max_tokens: where prompt + answer is cut.
    """

    name: str
    read_pairs: Callable[[Path, Literal["train", "test"]], list[AnswerPair]]
    max_tokens: int

    def load_pairs(self, data_dir: Path, split: Literal["train", "test"]) -> list[AnswerPair]:
        """Read the pairs of a split, and say so.

        Raises:
            UserError: the data are missing or malformed.
        """
        pairs = self.read_pairs(data_dir, split)
        say_read(f"{self.name} pairs below {shown_path(data_dir)}, {split}", f"{len(pairs):,}")
        return pairs


@dataclass(frozen=True)
class TokenizedPairs:
    """Answer pairs as distinct sequences: an answer that occurs in several pairs is run through the model once.

    Attributes:
        sequences: the U distinct texts.
        chosen: (P,) for each pair, the position in `sequences` of its prompt with the chosen answer.
        rejected: (P,) the same for the rejected answer.
    """

    sequences: list[LabelledSequence]
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def weights(self) -> np.ndarray:
        """(U,) the weight of each sequence's mean NLL in the measurement: f_task = sum_u weight_u NLL_u."""
        counts = [np.bincount(side, minlength=len(self.sequences)) for side in (self.chosen, self.rejected)]
        return (counts[0] - counts[1]) / len(self.chosen)


def tokenize_pairs(pairs: Sequence[AnswerPair], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> TokenizedPairs:
    """Tokenize prompt + answer with the tokenizer's defaults, cut at `max_tokens`; labels are the answer's tokens.

    Raises:
        UserError: an answer has no token that counts, or as `label_texts`.
    """
    position_of: dict[tuple[str, str], int] = {}
    chosen, rejected = (
        np.array([position_of.setdefault((pair.prompt, answer), len(position_of)) for pair, answer in side])
        for side in ([(p, p.chosen) for p in pairs], [(p, p.rejected) for p in pairs])
    )
    prompts, answers = zip(*position_of, strict=True)
    sequences = label_texts(prompts, answers, tokenizer, max_tokens, special_tokens=True)
    for prompt, answer, sequence in zip(prompts, answers, sequences, strict=True):
        if sequence.num_labels == 0:
            limit = min(max_tokens, tokenizer.model_max_length)
            reason = f"is left after the cut at {limit} tokens" if answer else "is there: the answer is empty"
            raise UserError(f"no token of an answer {reason}; prompt: {prompt!r}")
    return TokenizedPairs(sequences, chosen, rejected)


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV file, with or without a byte-order mark, as text.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or lacks a column.
    """
    import pandas as pd  # only the steps that read pairs pay for importing it

    if not path.is_file():
        raise UserError(f"{shown_path(path)} is missing; DATA_DIR must hold it (data/demo is the embedded default)")
    try:
        table = pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{shown_path(path)} cannot be read as CSV ({error})") from None
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise UserError(f"{shown_path(path)} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    if table.empty:
        raise UserError(f"{shown_path(path)} has no rows; it needs at least one")
    return table
