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

    The split is that of `truthfulness/splits/TruthfulQA_SPLIT.csv` where both of them exist, else a seeded 80/20 split
    of `truthfulness/TruthfulQA.csv`.

    Raises:
        UserError: the file is missing, lacks a column, a question lacks an answer, or one split file is there alone.
    """
    folder = data_dir / "truthfulness"
    split_paths = {name: folder / "splits" / f"TruthfulQA_{name}.csv" for name in ("train", "test")}
    missing = [path for path in split_paths.values() if not path.is_file()]
    if not missing:
        return _pairs(read_csv(split_paths[split], COLUMNS), split_paths[split])
    if len(missing) == 1:
        raise UserError(
            f"{shown_path(missing[0])} is missing, and the other split is there; give both or none: a split of "
            "TruthfulQA.csv has questions of both"
        )
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
