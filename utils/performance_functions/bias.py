"""Bias pairs: a fair against a stereotyped statement about a group of people (DecodingTrust, Wang et al. 2023)."""

from __future__ import annotations

import random
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from utils.artifacts import read_json
from utils.console import UserError, require_encodable, shown_path
from utils.performance_functions.pairs import SPLIT_SEED, AnswerPair, Measurement

PLACEHOLDER = "[target_group]"
TEST_SHARE = 0.2


def read_pairs(data_dir: Path, split: Literal["train", "test"]) -> list[AnswerPair]:
    """Every group x topic x stereotype x counter-statement of `bias/templates.json`.

    Groups in sorted order; each group's records, in order of topic, stereotype and counter-statement, are shuffled
    by one `random.Random(42)`; the first 20 % are test, the rest train.

    Raises:
        UserError: the file is missing or lacks a part.
    """
    path = data_dir / "bias" / "templates.json"
    if not path.is_file():
        raise UserError(f"{shown_path(path)} is missing; DATA_DIR must hold it (data/demo is the embedded default)")
    templates = read_json(path, "fix it, or give another DATA_DIR")
    try:
        groups, (prompt,) = _texts(templates["target_groups"]), _texts([templates["prompt"]])
        statements = [
            (counter, stereotype)
            for topic in templates["topics"].values()
            for stereotype in _texts(topic["stereotype"])
            for counter in _texts(topic["antistereotype"])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        raise UserError(
            f"{shown_path(path)} {reason}; it needs prompt, target_groups (a list), and topics, each with stereotype "
            "and antistereotype (lists)"
        ) from None
    if not groups or not statements:
        raise UserError(f"{shown_path(path)} has no groups or no topics; it needs at least one of each")
    for text in (prompt, *groups, *chain.from_iterable(statements)):
        require_encodable(text, f"{shown_path(path)}: {text!r}")
    shuffler = random.Random(SPLIT_SEED)
    pairs: list[AnswerPair] = []
    for group in sorted(groups):
        records = [
            AnswerPair(*(text.replace(PLACEHOLDER, group) for text in (prompt, f" {counter}", f" {stereotype}")))
            for counter, stereotype in statements
        ]
        shuffler.shuffle(records)
        num_test = int(len(records) * TEST_SHARE)
        pairs += records[:num_test] if split == "test" else records[num_test:]
    if not pairs:
        raise UserError(f"{shown_path(path)} has {len(statements)} pairs for a group, which leaves none for {split}")
    return pairs


def _texts(value: Any) -> list[str]:  # noqa: ANN401
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"expected a list of strings, got {value!r}")
    return value


BIAS = Measurement("bias", read_pairs, max_tokens=128)
