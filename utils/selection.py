"""Choosing the training dialogues to unlearn, and seeded samples of the others."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Literal

import torch

from utils.console import UserError, shown_path
from utils.paths import STEP_3
from utils.rankings import ranking_scores
from utils.registry import ModelArtifacts
from utils.repairs import DIVERSE, OF_RANDOM, RepairChoice
from utils.settings import RankingType, ranking_of


def choose_subset(artifacts: ModelArtifacts, task: str) -> list[int]:
    """Rows of the training dialogues to unlearn, by SCORES_TYPE; none where it chooses no subset.

    Raises:
        UserError: the scores or indices that SCORES_TYPE needs are missing or broken.
    """
    settings, total = artifacts.settings, len(artifacts.dialogues)
    if not RepairChoice.of(settings).has_subset:
        return []
    require_enough(settings.BOTTOM_K, total)
    if settings.SCORES_TYPE in OF_RANDOM:
        return random_subset(total, settings.BOTTOM_K, settings.SEED)
    if settings.SCORES_TYPE in DIVERSE:
        return diverse_subset(artifacts, task)
    return ranked(artifacts, task, ranking_of(settings.SCORES_TYPE))[: settings.BOTTOM_K]


def ranked(artifacts: ModelArtifacts, task: str, scores_type: RankingType) -> list[int]:
    """All training dialogues, the most harmful first.

    Raises:
        UserError: as `ranking_scores`.
    """
    scores, _ = ranking_scores(artifacts, task, scores_type)
    return most_harmful(scores, len(scores))


def diverse_subset(artifacts: ModelArtifacts, task: str) -> list[int]:
    """The indices that step 3 picked, after checking that they were picked by the scores that are there."""
    total, bottom_k = len(artifacts.dialogues), artifacts.settings.BOTTOM_K
    _, fingerprints = ranking_scores(artifacts, task)
    artifact = artifacts.dpp(task, **fingerprints)
    content = artifact.load_json()
    indices = content.get("indices") if isinstance(content, dict) else None
    are_indices = isinstance(indices, list) and all(index in range(total) for index in indices)
    if not are_indices or len(set(indices)) != bottom_k:
        raise UserError(
            f"{shown_path(artifact.path)} does not hold {bottom_k} indices below {total}; "
            f"delete it and run {STEP_3} again"
        )
    return indices


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
