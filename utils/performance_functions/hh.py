"""The dialogues (HH): the training data that is traced, and the perplexity that a repair must preserve."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from utils.batching import LabelledSequence
from utils.console import UserError, require_encodable, say_read, shown_path
from utils.files import fingerprint_of
from utils.hub import decide_on_dataset_code, hub_access
from utils.labels import label_texts
from utils.paths import may_be_hub_id, require_not_here, resolve_path
from utils.performance_functions.data_files import (
    is_there,
    parse_json,
    read_json_lines,
    read_text,
    require_length,
    shown_names,
    shown_value,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DIALOGUE_TOKENS = 1_024
FOLDER_NEEDS = "allowed is a folder with train.jsonl and test.jsonl"


@dataclass(frozen=True)
class Dialogues:
    """One split of the dialogues.

    Attributes:
        prompts: each ends with the last "Assistant:".
        completions: each begins with a space.
        source: where they were read from, for messages.
    """

    prompts: list[str]
    completions: list[str]
    source: str = field(default="the dialogues", compare=False)

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, rows: Sequence[int]) -> Dialogues:
        """Some of the dialogues."""
        return Dialogues([self.prompts[row] for row in rows], [self.completions[row] for row in rows], self.source)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the texts in their order."""
        return fingerprint_of([self.prompts, self.completions])


def load_dialogues(hh_dataset: str, split: Literal["train", "test"]) -> Dialogues:
    """Read a split of the dialogues, and say so.

    Raises:
        UserError: as `read_dialogues`.
    """
    dialogues = read_dialogues(hh_dataset, split)
    say_read(f"{hh_dataset}, {split}", f"{len(dialogues):,} dialogues")
    return dialogues


def read_dialogues(hh_dataset: str, split: Literal["train", "test"]) -> Dialogues:
    """Read the `prompt` and `chosen` columns of a hub data set, or of a folder with train.jsonl and test.jsonl.

    Raises:
        UserError: the data set is missing or empty, or a row lacks a text or has one that is far too long.
    """
    folder = resolve_path(hh_dataset)
    source = f"HH_DATASET = {hh_dataset!r}, split {split}"
    if folder.is_file():
        raise UserError(f"{source}: it is a file; {FOLDER_NEEDS}")
    rows = _read_folder(folder, split, source) if folder.is_dir() else _download(hh_dataset, split, source)
    if not rows:
        raise UserError(f"{source} is empty; it needs at least one dialogue")
    for position, row in enumerate(rows):
        for column in ("prompt", "chosen"):
            if column not in row:
                columns = f"it has {shown_names(list(row))}, and needs prompt and chosen"
                raise UserError(f"{source}, row {position}: no {column!r}; {columns}")
            where = f"{source}, row {position}: {column!r}"
            if not isinstance(row[column], str):
                raise UserError(f"{where} is {shown_value(row[column])}; it must be a text")
            require_length(row[column], where)
    return Dialogues([row["prompt"] for row in rows], [row["chosen"] for row in rows], source)


def _read_folder(folder: Path, split: str, source: str) -> list[dict[str, Any]]:
    rows = []
    try:
        for where, row in read_json_lines(folder / f"{split}.jsonl", FOLDER_NEEDS):
            for column in ("prompt", "chosen"):
                require_encodable(row.get(column), f"{where}: {column!r}")
            rows.append(row)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return rows


def _download(hh_dataset: str, split: str, source: str) -> list[dict[str, Any]]:
    if not may_be_hub_id(hh_dataset):
        raise UserError(
            f"{source}: no such folder; give one with train.jsonl and test.jsonl, which data/prepare.py makes, or a "
            "hub id like Dahoas/static-hh"
        )
    require_not_here(hh_dataset)
    from datasets import load_dataset  # slow to import

    decide_on_dataset_code()
    access = hub_access()
    try:
        return load_dataset(hh_dataset, split=split, cache_dir=access.cache, token=access.token).to_list()
    except Exception as error:  # datasets raises many types for hubs it cannot reach and files it cannot read
        raise UserError(f"{source}: no such folder, and not to be had from the hub ({access.reason(error)})") from error


def tokenize_dialogues(
    dialogues: Dialogues, tokenizer: PreTrainedTokenizerBase, needs_labels: bool = True
) -> list[LabelledSequence]:
    """Tokenize prompt + completion + EOS, no special tokens added, cut at 1,024 tokens or the model's limit.

    Labels are the completion's tokens (`label_texts`). The final EOS is not a label. A dialogue may have no label.

    Args:
        needs_labels: False for part of what is measured, none of whose dialogues need have a label.

    Raises:
        UserError: none of the dialogues has a label although `needs_labels`, or as `label_texts`.
    """
    sequences = label_texts(
        dialogues.prompts,
        dialogues.completions,
        tokenizer,
        MAX_DIALOGUE_TOKENS,
        special_tokens=False,
        suffix=[tokenizer.eos_token_id],
    )
    if needs_labels:
        require_labels(sequences, dialogues.source)
    return sequences


def require_labels(sequences: Sequence[LabelledSequence], source: str) -> None:
    """Refuse dialogues that have no label at all: their losses, scores and curvature would be 0 or NaN.

    Args:
        sequences: as `tokenize_dialogues` gives them.
        source: where they come from, for the message.

    Raises:
        UserError: no dialogue has a label.
    """
    if any(sequence.num_labels for sequence in sequences):
        return
    num_cut = sum(sequence.label_start >= len(sequence.input_ids) for sequence in sequences)
    raise UserError(
        f"{source}: none of {len(sequences):,} dialogues has a completion token that counts: in {num_cut:,} the prompt "
        f"fills the context, in {len(sequences) - num_cut:,} 'chosen' is empty (or one token, without a prompt)"
    )


def released_loss(totals: Sequence[float], num_tokens: Sequence[int]) -> float:
    """The number that the released evaluation prints: mean over batches of 8 of each batch's mean token NLL.

    It depends on the batch size and on the order (`Dataset.shuffle(seed=42)`), so it is reported beside the
    token-level mean, only for comparison.

    Args:
        totals: sum of the NLL of each dialogue, in dataset order.
        num_tokens: number of its label tokens.
    """
    from datasets import Dataset  # slow to import

    order = Dataset.from_dict({"index": list(range(len(totals)))}).shuffle(seed=42)["index"]
    totals, num_tokens = np.asarray(totals)[list(order)], np.asarray(num_tokens)[list(order)]
    batches = [slice(start, start + 8) for start in range(0, len(totals), 8)]
    # A batch without a label token would be 0 / 0; it counts nothing, as its dialogues do.
    return float(np.mean([totals[i].sum() / num_tokens[i].sum() for i in batches if num_tokens[i].any()]))


def read_known_harm(hh_dataset: str, num_dialogues: int) -> dict[str, list[int]] | None:
    """Rows of the training split that are known to be harmful, by kind of harm, from planted.json beside the dialogues.

    A kind may be a task, whose repairs' recall is then known, or any other.

    Returns:
        None if there is no such file.

    Raises:
        UserError: the file is not JSON, or does not map kinds to lists of different rows of the `num_dialogues`.
    """
    file = resolve_path(hh_dataset) / "planted.json"
    if not is_there(file):
        return None
    remedy = "fix it, or remove it if no harm is known"
    rows = parse_json(read_text(file, remedy), shown_path(file))
    if not isinstance(rows, dict) or not all(isinstance(of_kind, list) for of_kind in rows.values()):
        raise UserError(f"{shown_path(file)} must map kinds of harm to lists of rows of the training split; {remedy}")
    for kind, of_kind in rows.items():
        known: set[int] = set()
        for row in of_kind:
            if type(row) is not int or not 0 <= row < num_dialogues or row in known:  # True is an int, too
                raise UserError(
                    f"{shown_path(file)}: {shown_value(kind)} has {shown_value(row)}; "
                    f"allowed are rows from 0 to {num_dialogues - 1}, each once: {remedy}"
                )
            known.add(row)
    return rows


def kinds_of_rows(known_harm: Mapping[str, Collection[int]]) -> dict[int, str]:
    """The kinds of harm of each row that is known to be harmful, separated by commas."""
    kinds: dict[int, list[str]] = {}
    for kind, rows in known_harm.items():
        for row in rows:
            kinds.setdefault(row, []).append(kind)
    return {row: ", ".join(of_row) for row, of_row in kinds.items()}
