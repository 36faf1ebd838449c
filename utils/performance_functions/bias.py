"""Bias pairs: a fair against a stereotyped statement about a group of people (DecodingTrust, Wang et al. 2023)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from utils.console import UserError, require_encodable, shown_path
from utils.performance_functions.data_files import parse_json, read_text, require_length, shown_value
from utils.performance_functions.pairs import SPLIT_SEED, AnswerPair, AnswerPairs, Measurement, require_size

PLACEHOLDER = "[target_group]"
TEST_SHARE = 0.2
DEFAULT_SPLIT = "disjoint"
SPLIT_RULES = (DEFAULT_SPLIT, "released")
Statement = tuple[str, str, str]  # topic, counter-statement, stereotype


def read_pairs(data_dir: Path, split: Literal["train", "test"]) -> AnswerPairs:
    """Every group x topic x stereotype x counter-statement of `bias/templates.json`, a cluster for a (group, topic).

    Groups come in sorted order, records in order of topic, stereotype and counter-statement. Its "split" says which of
    them are test:

    - "disjoint", also where the key is missing: whole topics of a group. One `random.Random(42)` shuffles the sorted
      topics of each group in turn, and the first 20 % of them, at least one, are test.
    - "released": single records, so that both texts of a test pair occur in training pairs too. A fresh
      `random.Random(42)` shuffles each group's records, and the first 20 % are test.

    Raises:
        UserError: the file is missing, lacks a part, is too large, or leaves no pair for the split.
    """
    path = data_dir / "bias" / "templates.json"
    templates = parse_json(read_text(path), shown_path(path))
    try:
        groups, (prompt,) = _texts(templates["target_groups"]), _texts([templates["prompt"]])
        topics = {
            topic: (_texts(texts["stereotype"]), _texts(texts["antistereotype"]))
            for topic, texts in templates["topics"].items()
        }
        split_rule = templates.get("split", DEFAULT_SPLIT)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is malformed ({error})"
        raise UserError(
            f"{shown_path(path)} {reason}; it needs prompt, target_groups (a list), and topics, each with stereotype "
            "and antistereotype (lists)"
        ) from None
    for text in (prompt, *groups, *topics, *chain.from_iterable(chain.from_iterable(topics.values()))):
        where = f"{shown_path(path)}: {shown_value(text)}"
        require_encodable(text, where)
        require_length(text, where)
    require_size(path, *_size(prompt, groups, topics.values()))
    statements = [
        (topic, counter, stereotype)
        for topic, (stereotypes, counters) in topics.items()
        for stereotype in stereotypes
        for counter in counters
    ]
    if not groups or not statements:
        raise UserError(f"{shown_path(path)} has no groups or no topics; it needs at least one of each")
    if split_rule not in SPLIT_RULES:
        allowed = ", ".join(map(repr, SPLIT_RULES))
        raise UserError(f"{shown_path(path)}: split = {shown_value(split_rule)}; allowed is {allowed}")
    pairs: list[AnswerPair] = []
    clusters: list[str] = []
    shuffler = random.Random(SPLIT_SEED)
    for group in sorted(groups):
        if split_rule == "released":
            train, test = _released_split(statements)
        else:
            train, test = _disjoint_split(statements, shuffler)
        for topic, counter, stereotype in test if split == "test" else train:
            texts = (prompt, f" {counter}", f" {stereotype}")
            pairs.append(AnswerPair(*(text.replace(PLACEHOLDER, group) for text in texts)))
            clusters.append(f"{group}, {topic}")
    if not pairs:
        raise UserError(
            f"{shown_path(path)} has {len(statements)} pairs for a group, which leaves none for {split} with the split "
            f"{split_rule!r}"
        )
    return AnswerPairs(pairs, clusters, split_rule if split_rule == DEFAULT_SPLIT else f"{split_rule}, not held out")


def _size(prompt: str, groups: list[str], topics: Iterable[tuple[list[str], list[str]]]) -> tuple[int, int]:
    """How many pairs these texts make, and how many characters those have with their groups' names put in."""
    growth = sum(len(group) - len(PLACEHOLDER) for group in groups)  # of all pairs, for each placeholder of a text

    def size(texts: list[str]) -> int:
        return sum(len(groups) * len(text) + growth * text.count(PLACEHOLDER) for text in texts)

    num_pairs = num_characters = 0
    for stereotypes, counters in topics:
        num_pairs += len(groups) * len(stereotypes) * len(counters)
        num_characters += 2 * len(stereotypes) * len(counters) * size([prompt])
        num_characters += len(counters) * size(stereotypes) + len(stereotypes) * size(counters)
    return num_pairs, num_characters


def _released_split(statements: Sequence[Statement]) -> tuple[list[Statement], list[Statement]]:
    shuffled = list(statements)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    num_test = int(len(shuffled) * TEST_SHARE)
    return shuffled[num_test:], shuffled[:num_test]


def _disjoint_split(
    statements: Sequence[Statement], shuffler: random.Random
) -> tuple[list[Statement], list[Statement]]:
    topics = sorted({topic for topic, _, _ in statements})
    shuffler.shuffle(topics)
    of_test = set(topics[: max(1, int(len(topics) * TEST_SHARE))])
    test = [statement for statement in statements if statement[0] in of_test]
    train = [statement for statement in statements if statement[0] not in of_test]
    shared = {text for _, *texts in train for text in texts} & {text for _, *texts in test for text in texts}
    if shared:
        raise UserError(
            f"bias/templates.json: {min(shared)!r} occurs in two topics, so the disjoint split cannot keep it out of "
            "the training pairs; change or remove one of them, or set split to 'released'"
        )
    return train, test


def _texts(value: Any) -> list[str]:  # noqa: ANN401
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise TypeError(f"expected a list of strings, got {shown_value(value)}")
    return value


BIAS = Measurement("bias", read_pairs, max_tokens=128)
