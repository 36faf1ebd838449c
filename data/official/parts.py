"""The five parts of the official data: their files, their official row counts, and the loaders that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Literal, NamedTuple

from data.official.formats import Content, ethics_content, hh_content, truth_content
from data.official.sources import Source
from data.official.templates import bias_content, prompt_content
from utils.console import UserError, shown_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.ethics import read_prompt
from utils.performance_functions.hh import read_dialogues

PartName = Literal["hh", "truth", "ethics", "prompt", "bias"]


class Part(NamedTuple):
    """What the files of one part have in common."""

    content: Callable[..., Content]  # from source, split, candidates and the `options`' values to a file's content
    candidates: Sequence[str]  # paths that a source may have a file under, tried in order
    local_form: str  # what a local copy must be, for messages
    may_be_file: bool  # whether a local copy can be a single file
    unit: str = "rows"  # what the official count counts
    is_on_hub: bool = True  # whether the hub has it
    options: Sequence[str] = ()  # constants of data/prepare.py that change the content


class OfficialFile(NamedTuple):
    """One file below DATA_DIR."""

    part: PartName
    name: str  # its path below DATA_DIR
    split: str  # its split in the source
    official_count: int  # rows of the official file; for bias, pairs
    loads: Sequence[Literal["train", "test"]]  # the splits that the loader makes of it

    @property
    def candidates(self) -> list[str]:
        """Paths that a source may have it under, tried in order."""
        return [candidate.format(split=self.split) for candidate in PARTS[self.part].candidates]

    def _load(self, data_dir: Path, split: Literal["train", "test"]) -> Sized:
        if self.part == "hh":
            return read_dialogues(str(data_dir / "hh"), split)
        if self.part == "prompt":
            return [read_prompt(data_dir / "ethics" / "prompt.txt")]
        return MEASUREMENTS[self.part].read_pairs(data_dir, split)

    def count_loaded(self, source: Source, data_dir: Path) -> dict[str, int]:
        """How many dialogues or pairs the project's loader finds in each split.

        Raises:
            UserError: the loader refuses the file.
        """
        try:
            return {split: len(self._load(data_dir, split)) for split in self.loads}
        except UserError as error:
            reason = str(error).replace(f"{shown_path(data_dir)}/", "")  # the staging folder means nothing to the user
            raise UserError(f"{source}: the data cannot be used: {reason}") from None

    def check_count(self, source: Source, count: int) -> None:
        """Compare with the official count. A local ETHICS folder may hold any part of the official rows.

        Raises:
            UserError: `count` is not the official number.
        """
        if count != self.official_count and not (self.part == "ethics" and source.path is not None):
            raise UserError(
                f"{source} gives {count:,} {PARTS[self.part].unit} for {self.name}, but {self.official_count:,} are "
                "expected; set CHECK_COUNTS = False to accept it"
            )


ETHICS_CANDIDATES = (
    "data/commonsense/{split}.csv",  # on the hub
    "cm_{split}.csv",
    "commonsense/cm_{split}.csv",  # in the authors' tar file, unpacked
    "data/commonsense/cm_{split}.csv",
)
HH_FORM, ETHICS_FORM = "a folder with train.jsonl and test.jsonl", "a folder with cm_train.csv and cm_test.csv"
TRUTH_FORM = "the original TruthfulQA.csv"
CHECKOUT = "a local checkout of github.com/kyrs/tracing-llm-trust"
PROMPT_FORM, BIAS_FORM = (
    f"{CHECKOUT}, its ethics_dataset.py, or a prompt.txt",
    f"{CHECKOUT}, its bias_dataset.py, or a templates.json",
)
CODE = "utils/performance_functions"  # in the authors' repository
PROMPT_CANDIDATES = ("prompt.txt", "ethics_dataset.py", f"{CODE}/ethics_dataset.py")
BIAS_CANDIDATES = ("templates.json", "bias_dataset.py", f"{CODE}/bias_dataset.py")
PARTS = {
    "hh": Part(hh_content, ["{split}.jsonl"], HH_FORM, may_be_file=False),
    "truth": Part(truth_content, ["TruthfulQA.csv"], TRUTH_FORM, may_be_file=True),
    "ethics": Part(ethics_content, ETHICS_CANDIDATES, ETHICS_FORM, may_be_file=False),
    "prompt": Part(prompt_content, PROMPT_CANDIDATES, PROMPT_FORM, True, "text", is_on_hub=False),
    "bias": Part(bias_content, BIAS_CANDIDATES, BIAS_FORM, True, "pairs", is_on_hub=False, options=["BIAS_SPLIT"]),
}
FILES = (
    OfficialFile("hh", "hh/train.jsonl", "train", 96_256, ["train"]),
    OfficialFile("hh", "hh/test.jsonl", "test", 5_103, ["test"]),
    OfficialFile("truth", "truthfulness/TruthfulQA.csv", "validation", 817, ["train", "test"]),
    OfficialFile("ethics", "ethics/cm_train.csv", "train", 13_910, ["train"]),
    OfficialFile("ethics", "ethics/cm_test.csv", "test", 3_885, ["test"]),
    OfficialFile("prompt", "ethics/prompt.txt", "all", 1, ["train", "test"]),
    OfficialFile("bias", "bias/templates.json", "all", 3_456, ["train", "test"]),
)
