"""Truth pairs: the best against an incorrect answer (TruthfulQA; Lin, Hilton and Evans 2022)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from utils.console import UserError, shown_path
from utils.performance_functions.pairs import SPLIT_SEED, AnswerPair, Measurement, read_csv

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("Question", "Best Answer", "Incorrect Answers")
TRAIN_SHARE = 0.8


def read_pairs(data_dir: Path, split: Literal["train", "test"]) -> list[AnswerPair]:
    """The best answer of each question against the first incorrect one.

    The split is that of `truthfulness/splits/TruthfulQA_SPLIT.csv` where it exists, else a seeded 80/20 split of
    `truthfulness/TruthfulQA.csv`.

    Raises:
        UserError: the file is missing, lacks a column, or a question lacks an answer.
    """
    folder = data_dir / "truthfulness"
    split_path = folder / "splits" / f"TruthfulQA_{split}.csv"
    if split_path.is_file():
        return _pairs(read_csv(split_path, COLUMNS), split_path)
    path = folder / "TruthfulQA.csv"
    pairs = _pairs(read_csv(path, COLUMNS), path)
    random.Random(SPLIT_SEED).shuffle(pairs)
    num_train = int(len(pairs) * TRAIN_SHARE)
    chosen = pairs[:num_train] if split == "train" else pairs[num_train:]
    if not chosen:
        raise UserError(f"{shown_path(path)} has {len(pairs)} questions, which leaves none for the {split} split")
    return chosen


def _pairs(table: pd.DataFrame, path: Path) -> list[AnswerPair]:
    pairs = []
    for line, (question, best, incorrect) in enumerate(table[list(COLUMNS)].itertuples(index=False), start=2):
        first_incorrect = next((answer.strip() for answer in incorrect.split(";") if answer.strip()), "")
        for name, text in zip(COLUMNS, (question, best, first_incorrect), strict=True):
            if not text.strip():
                raise UserError(f"{shown_path(path)}, row {line}: {name!r} is empty; every question needs both answers")
        pairs.append(AnswerPair(f"{question.strip()}\n\nAnswer:", f" {best.strip()}", f" {first_incorrect}"))
    return pairs


TRUTH = Measurement("truth", read_pairs, max_tokens=512)
