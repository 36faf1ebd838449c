"""Rows of training dialogues: the first of a ranking, and seeded samples."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Literal

import torch

from utils.console import UserError

FEWEST_SHARED, MOST_SHARED = 64, 1.5  # rows of the first shared portion; all of them, as a multiple of those needed


def most_harmful(scores: torch.Tensor, bottom_k: int) -> list[int]:
    """Indices of the `bottom_k` smallest scores, most harmful first; ties in dataset order."""
    return torch.argsort(scores, stable=True)[:bottom_k].tolist()


def random_subset(num_examples: int, bottom_k: int, seed: int) -> list[int]:
    """Seeded uniform sample without replacement."""
    return random.Random(seed).sample(range(num_examples), bottom_k)


def _drawing_order(purpose: str, num_examples: int, seed: int) -> list[int]:
    """The examples in the order in which `held_out_rows` draws them; it does not depend on what is used."""
    return random.Random(f"{purpose} {seed}").sample(range(num_examples), num_examples)


def held_out_rows(
    purpose: Literal["retain", "validation"], used: Collection[int], num_examples: int, count: int, seed: int
) -> list[int]:
    """A seeded sample of the training examples that are not used yet, at most half of them, in dataset order.

    The order of drawing does not depend on `used`, so that different repairs are evaluated on nearly the same examples.

    Raises:
        UserError: fewer than two examples are left.
    """
    used = set(used)
    free = [row for row in _drawing_order(purpose, num_examples, seed) if row not in used]
    if len(free) < 2:
        raise UserError(
            f"{len(used)} of {num_examples} training examples are taken, which leaves none for {purpose}; "
            "set BOTTOM_K, or TOP_K, to less"
        )
    return sorted(free[: min(count, len(free) // 2)])


def shared_portions(rows: Sequence[int], purpose: str, num_examples: int, count: int, seed: int) -> list[list[int]]:
    """Portions of the order of drawing that hold all of these held-out rows, and some that are not among them.

    What the portions hold does not depend on `rows`, only how many there are does: what is computed for a portion
    serves every repair. The first has `count` rows, or half of all, each further one an eighth of that. Where they
    would be few, or more than MOST_SHARED times as many as the rows themselves, `rows` is the only portion.

    Args:
        rows: of `held_out_rows`, with the same other arguments.
    """
    order, missing = _drawing_order(purpose, num_examples, seed), set(rows)
    first = min(count, num_examples // 2)
    portions: list[list[int]] = []
    start, end = 0, first
    while missing and start < MOST_SHARED * len(rows):
        portions.append(sorted(order[start:end]))
        missing.difference_update(portions[-1])
        start, end = end, end + max(1, first // 8)
    is_worth_it = first >= FEWEST_SHARED and sum(map(len, portions)) <= MOST_SHARED * len(rows)
    return portions if is_worth_it and not missing else [sorted(rows)]


def require_enough(count: int, num_examples: int, constant: str = "BOTTOM_K") -> None:
    """Check that a constant does not exceed the number of training examples.

    Raises:
        UserError: it is larger than the training split.
    """
    if count > num_examples:
        raise UserError(
            f"{constant} = {count}: there are {num_examples} training examples; allowed: 1 to {num_examples}"
        )
