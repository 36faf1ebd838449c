"""Which training dialogues a repair unlearns: SCORES_TYPE, from the artefacts of steps 1 to 3."""

from __future__ import annotations

from functools import partial

from utils.console import UserError, shown_path
from utils.paths import STEP_3
from utils.pipeline import Pipeline
from utils.selection import most_harmful, random_subset, require_enough


def choose_subset(pipeline: Pipeline, task: str) -> list[int]:
    """Indices of the training dialogues to unlearn, by the pipeline's SCORES_TYPE.

    pure_ekfac      the smallest influence scores
    identity        the smallest scores without curvature: plain gradient dot products
    representation  those most like the task's untrustworthy answers in representation space
    dpp             the diverse subset of step 3
    random          a seeded uniform sample
    direct          none: the gradient is that of the measurement itself

    Raises:
        UserError: the scores or indices that SCORES_TYPE needs are missing or broken.
    """
    settings, total = pipeline.settings, len(pipeline.dialogues)
    if settings.SCORES_TYPE == "direct":
        return []
    require_enough(settings.BOTTOM_K, total)
    if settings.SCORES_TYPE == "random":
        return random_subset(total, settings.BOTTOM_K, settings.SEED)
    if settings.SCORES_TYPE == "dpp":
        return _diverse_subset(pipeline, task)
    read = {
        "pure_ekfac": pipeline.influence,
        "identity": partial(pipeline.influence, strategy="identity"),
        "representation": pipeline.dissimilarity,
    }[settings.SCORES_TYPE]
    scores, _ = pipeline.ranking_scores(task, read)
    return most_harmful(scores, settings.BOTTOM_K)


def _diverse_subset(pipeline: Pipeline, task: str) -> list[int]:
    total, bottom_k = len(pipeline.dialogues), pipeline.settings.BOTTOM_K
    _, fingerprints = pipeline.ranking_scores(task)
    artifact = pipeline.dpp(task, **fingerprints)
    content = artifact.load_json()
    indices = content.get("indices") if isinstance(content, dict) else None
    are_indices = isinstance(indices, list) and all(index in range(total) for index in indices)
    if not are_indices or len(set(indices)) != bottom_k:
        raise UserError(
            f"{shown_path(artifact.path)} does not hold {bottom_k} indices below {total}; "
            f"delete it and run {STEP_3} again"
        )
    return indices
