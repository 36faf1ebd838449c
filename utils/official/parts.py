"""The four parts of the official data: their files, how many rows those have, and the loaders that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Literal, NamedTuple

from utils.console import UserError, shown_path
from utils.official.formats import Content, ethics_content, hh_content, truth_content
from utils.official.sources import Source
from utils.official.templates import bias_content
from utils.performance_functions.bias import BIAS
from utils.performance_functions.ethics import ETHICS
from utils.performance_functions.hh import read_dialogues
from utils.performance_functions.truth import TRUTH


class Part(NamedTuple):
    """What the files of one part have in common."""

    content: Callable[[Source, str, Sequence[str]], Content]  # from a source, a split and places to a file's content
    places: Sequence[str]  # where a source may have a file; the first that exists is taken
    load: Callable[[Path, Literal["train", "test"]], Sized]  # the project's loader, from DATA_DIR and a split
    local_form: str  # what a local copy must be, for messages
    may_be_file: bool  # whether that can be a single file
    unit: str = "rows"  # what the official number counts


class OfficialFile(NamedTuple):
    """One file below DATA_DIR."""

    part: Literal["hh", "truth", "ethics", "bias"]
    name: str  # its path below DATA_DIR
    split: str  # its split in the source
    official_count: int  # rows of the official one; for bias, pairs
    loads: Sequence[Literal["train", "test"]]  # the splits that the loader makes of it

    @property
    def places(self) -> list[str]:
        """Where a source may have it."""
        return [place.format(split=self.split) for place in PARTS[self.part].places]

    def count_loaded(self, source: Source, data_dir: Path) -> dict[str, int]:
        """How many dialogues or pairs the project's loader finds in each split.

        Raises:
            UserError: the loader refuses the file.
        """
        try:
            return {split: len(PARTS[self.part].load(data_dir, split)) for split in self.loads}
        except UserError as error:
            told = str(error).replace(f"{shown_path(data_dir)}/", "")
            raise UserError(f"{source} gives what cannot be used: {told}") from None

    def check_count(self, source: Source, count: int) -> None:
        """Compare with the official number. A local ETHICS folder may be any part of the official one.

        Raises:
            UserError: they differ.
        """
        if count != self.official_count and not (self.part == "ethics" and source.path is not None):
            raise UserError(
                f"{source} gives {count:,} {PARTS[self.part].unit} for {self.name} where {self.official_count:,} are "
                "expected; CHECK_COUNTS = False accepts it"
            )


def read_prepared_dialogues(data_dir: Path, split: Literal["train", "test"]) -> Sized:
    """The dialogues as the steps load them."""
    return read_dialogues(str(data_dir / "hh"), split)


ETHICS_PLACES = (
    "data/commonsense/{split}.csv",  # on the hub
    "cm_{split}.csv",
    "commonsense/cm_{split}.csv",  # in what the authors' tar unpacks to
    "data/commonsense/cm_{split}.csv",
)
HH_FORM, ETHICS_FORM = "a folder with train.jsonl and test.jsonl", "a folder with cm_train.csv and cm_test.csv"
TRUTH_FORM, BIAS_FORM = "the original TruthfulQA.csv", "a templates.json or the authors' Python file"
PARTS = {
    "hh": Part(hh_content, ["{split}.jsonl"], read_prepared_dialogues, HH_FORM, may_be_file=False),
    "truth": Part(truth_content, ["TruthfulQA.csv"], TRUTH.read_pairs, TRUTH_FORM, may_be_file=True),
    "ethics": Part(ethics_content, ETHICS_PLACES, ETHICS.read_pairs, ETHICS_FORM, may_be_file=False),
    "bias": Part(bias_content, ["templates.json"], BIAS.read_pairs, BIAS_FORM, may_be_file=True, unit="pairs"),
}
FILES = (
    OfficialFile("hh", "hh/train.jsonl", "train", 96_256, ["train"]),
    OfficialFile("hh", "hh/test.jsonl", "test", 5_103, ["test"]),
    OfficialFile("truth", "truthfulness/TruthfulQA.csv", "validation", 817, ["train", "test"]),
    OfficialFile("ethics", "ethics/cm_train.csv", "train", 13_910, ["train"]),
    OfficialFile("ethics", "ethics/cm_test.csv", "test", 3_885, ["test"]),
    OfficialFile("bias", "bias/templates.json", "all", 3_456, ["train", "test"]),
)
