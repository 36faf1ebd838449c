"""Rows of training dialogues: the first of a ranking, and seeded samples."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal

import torch

from utils.console import UserError


def most_harmful(scores: torch.Tensor, bottom_k: int) -> list[int]:
    """Indices of the `bottom_k` smallest scores, most harmful first; ties in dataset order."""
    return torch.argsort(scores, stable=True)[:bottom_k].tolist()


def random_subset(num_examples: int, bottom_k: int, seed: int) -> list[int]:
    """Seeded uniform sample without replacement."""
    return random.Random(seed).sample(range(num_examples), bottom_k)


def held_out_rows(
    purpose: Literal["retain", "validation"], used: Collection[int], num_examples: int, count: int, seed: int
) -> list[int]:
    """A seeded sample of the training examples that are not used yet, at most half of them, in dataset order.

    The order of drawing does not depend on `used`, so that different repairs are evaluated on nearly the same examples.

    Raises:
        UserError: fewer than two examples are left.
    """
    order = random.Random(f"{purpose} {seed}").sample(range(num_examples), num_examples)
    used = set(used)
    free = [row for row in order if row not in used]
    if len(free) < 2:
        raise UserError(
            f"{len(used)} of {num_examples} training examples are taken, which leaves none for {purpose}; "
            "set BOTTOM_K, or TOP_K, to less"
        )
    return sorted(free[: min(count, len(free) // 2)])


def require_enough(count: int, num_examples: int, constant: str = "BOTTOM_K") -> None:
    """Check that a constant does not exceed the number of training examples.

    Raises:
        UserError: it is larger than the training split.
    """
    if count > num_examples:
        raise UserError(
            f"{constant} = {count}: there are {num_examples} training examples; allowed: 1 to {num_examples}"
        )
