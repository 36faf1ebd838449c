"""Splits of the measurements' data without what links training pairs to test pairs."""

from __future__ import annotations

import filecmp
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.console import UserError, say, shown_path
from utils.files import write_if_changed
from utils.performance_functions.data_files import read_csv
from utils.processes import first_process_only

TWINS = 0.6  # shared words of two statements, as a share of all words of both (Jaccard), that make them twins
ROWS_AT_ONCE = 500
SPLITS = ("train", "test")


def twin_groups(texts: Sequence[str]) -> np.ndarray:
    """Texts that have most words in common, or that are linked by others: (N,) number of each text's group.

    ETHICS has statements in twins that differ by a few words and have opposite labels.
    """
    from scipy.sparse import vstack
    from scipy.sparse.csgraph import connected_components
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(binary=True, token_pattern=r"(?u)\b\w+\b", dtype=np.int32).fit_transform(texts)
    sizes = np.asarray(words.sum(axis=1)).ravel()
    links = []
    for start in range(0, len(texts), ROWS_AT_ONCE):
        shared = (words[start : start + ROWS_AT_ONCE] @ words.T).tocoo()
        union = sizes[start + shared.row] + sizes[shared.col] - shared.data
        shared.data = (shared.data >= TWINS * union).astype(np.int32)
        shared.eliminate_zeros()
        links.append(shared)
    return connected_components(vstack(links), directed=False)[1]


@first_process_only
def write_twin_free_split(data_dir: Path, folder: Path, seed: int) -> None:
    """Copy DATA_DIR with the short statements of ETHICS split by whole groups of twins, in about the sizes they had.

    Where twins are in both files, a step down the training pairs is one up the test pairs: what is wrong in the one
    is, but for a word, acceptable in the other.
    """
    import pandas as pd

    files = [Path("ethics") / f"cm_{split}.csv" for split in SPLITS]
    (folder / "ethics").mkdir(parents=True, exist_ok=True)
    copy_parts(data_dir, folder, ("bias", "ethics", "truthfulness"), files)
    tables = [read_csv(data_dir / file, ["label", "input", "is_short"]) for file in files]
    is_short = [table["is_short"].str.lower().isin(["true", "1"]) for table in tables]
    train, test = (table[rows] for table, rows in zip(tables, is_short, strict=True))
    short = pd.concat([train, test], ignore_index=True)
    groups = twin_groups(short["input"].tolist())
    crossing = np.isin(groups[len(train) :], groups[: len(train)]).sum()
    say(f"   ETHICS: {crossing} of {len(test)} short test statements had a twin in the training file; split anew")
    is_test = np.zeros(len(short), dtype=bool)
    for group in random.Random(seed).sample(range(groups.max() + 1), groups.max() + 1):
        if is_test.sum() >= len(test):
            break
        is_test |= groups == group
    for file, table, rows, drawn in zip(files, tables, is_short, (~is_test, is_test), strict=True):
        write_if_changed(folder / file, pd.concat([short[drawn], table[~rows]]).to_csv(index=False))


@first_process_only
def write_category_split(data_dir: Path, folder: Path, seed: int) -> None:
    """Copy DATA_DIR with TruthfulQA split by category: no question is tested whose category was trained on.

    Half of the categories train, by a seeded draw, and the others test.

    Raises:
        UserError: TruthfulQA.csv has no two categories.
    """
    copy_parts(data_dir, folder, ("bias", "ethics"))
    file = data_dir / "truthfulness" / "TruthfulQA.csv"
    table = read_csv(file, ["Category", "Question"])
    categories = sorted(table["Category"].unique())
    if len(categories) < 2:
        raise UserError(f"{shown_path(file)} has {len(categories)} category, and to hold some out takes two")
    trained = set(random.Random(seed).sample(categories, len(categories) // 2))
    is_trained = table["Category"].isin(trained)
    splits = folder / "truthfulness" / "splits"
    splits.mkdir(parents=True, exist_ok=True)
    for split, rows in zip(SPLITS, (table[is_trained], table[~is_trained]), strict=True):
        write_if_changed(splits / f"TruthfulQA_{split}.csv", rows.to_csv(index=False))


def copy_parts(data_dir: Path, folder: Path, parts: Sequence[str], without: Sequence[Path] = ()) -> None:
    """Copy folders of DATA_DIR, but for some files."""
    for source in (path for part in parts for path in sorted((data_dir / part).rglob("*"))):
        target = folder / source.relative_to(data_dir)
        is_same = target.is_file() and filecmp.cmp(source, target, shallow=False)
        if source.is_file() and not is_same and source.relative_to(data_dir) not in without:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
