"""Answer pairs: one prompt with a trustworthy answer (chosen) and an untrustworthy one (rejected)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from utils.batching import Example, LabelledSequence
from utils.console import UserError, shown_path

SPLIT_SEED = 42  # of the data sets' own splits; SEED does not move them


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
        load_pairs: from DATA_DIR and a split ("train" or "test") to the pairs.
        max_tokens: where prompt + answer is cut.
    """

    name: str
    load_pairs: Callable[[Path, Literal["train", "test"]], list[AnswerPair]]
    max_tokens: int


def tokenize_pairs(pairs: Sequence[AnswerPair], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[Example]:
    """Tokenize prompt + answer with the tokenizer's defaults, cut at `max_tokens`; labels are the answer's tokens.

    The answer's tokens are those after as many as the prompt alone has.

    Raises:
        UserError: the cut leaves nothing of an answer.
    """
    prompt_lengths = [len(ids) for ids in tokenizer([pair.prompt for pair in pairs])["input_ids"]]
    columns = []
    for answers in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
        texts = [pair.prompt + answer for pair, answer in zip(pairs, answers, strict=True)]
        columns.append(
            [
                LabelledSequence(np.asarray(ids[:max_tokens], dtype=np.int32), start, min(len(ids), max_tokens))
                for ids, start in zip(tokenizer(texts)["input_ids"], prompt_lengths, strict=True)
            ]
        )
    examples = list(zip(*columns, strict=True))
    for pair, example in zip(pairs, examples, strict=True):
        if any(sequence.num_labels == 0 for sequence in example):
            raise UserError(
                f"no token of an answer is left after the cut at {max_tokens} tokens; prompt: {pair.prompt!r}"
            )
    return examples


def read_csv(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read a CSV file, with or without a byte-order mark, as text.

    Raises:
        UserError: the file is missing, empty, not UTF-8, or lacks a column.
    """
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
