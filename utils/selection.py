"""Ranking the training dialogues by the harm they do, and seeded samples of them.

The sign of a score: positive means that training on the dialogue lowers the measurement (helps), the most negative
scores are the most harmful.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch

from utils.console import UserError, shown_path
from utils.registry import SCORES_TENSOR, ModelArtifacts
from utils.settings import task_weights

ScoresOf = Callable[
    [str], tuple[torch.Tensor, dict[str, str]]
]  # task -> its scores (N,), fingerprints of their sources


def min_max_normalise(values: torch.Tensor) -> torch.Tensor:
    """(v - min) / (max - min); all zeros where every value is the same.

    Args:
        values: (N,).

    Returns:
        (N,) float64 in [0, 1].
    """
    values = values.double()
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)


def combined_scores(scores: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Weighted sum of the tasks' scores, each min-max normalised; the smallest are the most harmful.

    Args:
        scores: (N,) for each task.
        weights: one for each task.

    Returns:
        (N,) float64.
    """
    return torch.stack([w * min_max_normalise(s) for s, w in zip(scores, weights, strict=True)]).sum(dim=0)


def ranking_scores(
    artifacts: ModelArtifacts, task: str, scores_of: ScoresOf | None = None
) -> tuple[torch.Tensor, dict[str, str]]:
    """The scores by which `task` ranks the dialogues, smallest most harmful.

    Args:
        scores_of: gives one task's scores; by default its influence scores.

    Returns:
        (N,) float64: the task's scores, min-max normalised, or for "combined" the sum weighted by TASK_WEIGHTS, the
        largest of them taken as 1; and the fingerprints of the artifacts that they come from.

    Raises:
        UserError: scores are missing, broken, made from something else, or of another length.
    """
    weights = task_weights(artifacts.settings, task)
    scores, fingerprints = [], {}
    for name in weights:
        of_task, sources = scores_of(name) if scores_of else influence_scores(artifacts, name)
        scores.append(of_task)
        fingerprints.update(sources)
    largest = max(weights.values())  # the scale of the weights does not matter, and would overflow where it is huge
    return combined_scores(scores, [weight / largest for weight in weights.values()]), fingerprints


def influence_scores(
    artifacts: ModelArtifacts, task: str, strategy: str | None = None
) -> tuple[torch.Tensor, dict[str, str]]:
    """One task's influence scores (N,), made with `strategy` in place of FACTOR_STRATEGY, and their fingerprint."""
    artifact = artifacts.scores(task, strategy)
    fingerprint = artifact.require()["fingerprint"]
    scores = artifact.load_tensors({SCORES_TENSOR: (1, None)}, fingerprint=fingerprint)[SCORES_TENSOR].squeeze(0)
    if len(scores) != len(artifacts.dialogues):
        raise UserError(
            f"{shown_path(artifact.path)} has {len(scores)} scores for {len(artifacts.dialogues)} dialogues; "
            f"delete it and run {artifact.made_by} again"
        )
    return scores, {f"scores_{task}": fingerprint}


def load_representations(artifacts: ModelArtifacts, fingerprint: str) -> torch.Tensor:
    """The representations (N, hidden) of the training dialogues, whose manifest has this fingerprint."""
    shapes = {"representations": (len(artifacts.dialogues), artifacts.hidden_size)}
    return artifacts.representations().load_tensors(shapes, fingerprint=fingerprint)["representations"]


def dissimilarity(artifacts: ModelArtifacts, task: str) -> tuple[torch.Tensor, dict[str, str]]:
    """Minus the similarity (N,) of each dialogue to the task's untrustworthy answers, and the sources' fingerprints."""
    answers, dialogues = artifacts.answer_representations(task), artifacts.representations()
    fingerprints = {f"answers_{task}": answers.require()["fingerprint"]}
    fingerprints["representations"] = dialogues.require()["fingerprint"]
    shapes = {"representations": (None, artifacts.hidden_size)}
    of_answers = answers.load_tensors(shapes, fingerprint=fingerprints[f"answers_{task}"])["representations"]
    similarity = similarity_to(of_answers, load_representations(artifacts, fingerprints["representations"]))
    return -similarity, fingerprints


def similarity_to(answers: torch.Tensor, representations: torch.Tensor) -> torch.Tensor:
    """Mean cosine similarity of each example to the answers, after subtracting the examples' mean from both.

    Representation similarity as in Hanawa et al. 2021, the usual alternative to influence functions.

    Args:
        answers: (U, hidden).
        representations: (N, hidden).

    Returns:
        (N,) float64 in [-1, 1].
    """
    mean = representations.double().mean(dim=0)
    directions = (torch.nn.functional.normalize(rows.double() - mean, dim=1) for rows in (answers, representations))
    of_answers, of_examples = directions
    return of_examples @ of_answers.mean(dim=0)


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
            "set BOTTOM_K to less"
        )
    return sorted(free[: min(count, len(free) // 2)])


def require_enough(bottom_k: int, num_examples: int) -> None:
    """Check that BOTTOM_K does not exceed the number of training examples.

    Raises:
        UserError: BOTTOM_K is larger than the training split.
    """
    if bottom_k > num_examples:
        raise UserError(
            f"BOTTOM_K = {bottom_k}: there are {num_examples} training examples; allowed: 1 to {num_examples}"
        )
