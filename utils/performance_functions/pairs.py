"""Answer pairs: one prompt with a trustworthy answer (chosen) and an untrustworthy one (rejected)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from utils.batching import LabelledSequence
from utils.console import UserError, say_read, shown_path

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

    The answer's tokens are those after as many as the prompt alone has.

    Raises:
        UserError: the cut leaves nothing of an answer.
    """
    position_of: dict[tuple[str, str], int] = {}
    chosen, rejected = (
        np.array([position_of.setdefault((pair.prompt, answer), len(position_of)) for pair, answer in side])
        for side in ([(p, p.chosen) for p in pairs], [(p, p.rejected) for p in pairs])
    )
    prompts = list(dict.fromkeys(prompt for prompt, _ in position_of))
    prompt_lengths = {prompt: len(ids) for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True)}
    texts = [prompt + answer for prompt, answer in position_of]
    sequences = [
        LabelledSequence(
            np.asarray(ids[:max_tokens], dtype=np.int32), prompt_lengths[prompt], min(len(ids), max_tokens)
        )
        for (prompt, _), ids in zip(position_of, tokenizer(texts)["input_ids"], strict=True)
    ]
    for (prompt, _), sequence in zip(position_of, sequences, strict=True):
        if sequence.num_labels == 0:
            raise UserError(f"no token of an answer is left after the cut at {max_tokens} tokens; prompt: {prompt!r}")
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
