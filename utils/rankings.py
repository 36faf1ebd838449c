"""Scores of the training dialogues, by which they are ranked: one function for each way of scoring.

The sign of a score: positive means that training on the dialogue lowers the measurement (helps), the most negative
scores are the most harmful. Influence scores come from step 1; the others are baselines that know nothing of gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from utils.artifacts import FileArtifact
from utils.console import UserError, shown_path
from utils.methods import INFLUENCE_TYPES, fixed_strategy
from utils.paths import resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues
from utils.performance_functions.pairs import AnswerPairs
from utils.registry import SCORES_TENSOR, ModelArtifacts, Side
from utils.selection import most_harmful
from utils.settings import RankingType, task_weights

Scored = tuple[torch.Tensor, dict[str, str]]  # scores (N,), fingerprints of what they come from


def task_scores(artifacts: ModelArtifacts, scores_type: RankingType, task: str) -> Scored:
    """One task's scores (N,) of the training dialogues, and the fingerprints of what they come from.

    Raises:
        UserError: what they are computed from is missing, broken, made from something else, or of another length.
    """
    score: dict[RankingType, Callable[[ModelArtifacts, str], Scored]] = {
        **{name: partial(influence_scores, strategy=fixed_strategy(name)) for name in INFLUENCE_TYPES},
        "representation": dissimilarity_scores,
        "mean_difference": mean_difference_scores,
        "bm25": text_scores,
    }
    return score[scores_type](artifacts, task)


def ranking_scores(artifacts: ModelArtifacts, task: str, scores_type: RankingType = "pure_ekfac") -> Scored:
    """The scores by which `task` ranks the dialogues, smallest most harmful.

    Returns:
        (N,) float64: the task's scores, min-max normalised, or for "combined" the sum weighted by TASK_WEIGHTS, the
        largest of them taken as 1; and the fingerprints of what they come from.

    Raises:
        UserError: as `task_scores`.
    """
    weights = relative_weights(task_weights(artifacts.settings, task))
    scored = [task_scores(artifacts, scores_type, name) for name in weights]
    fingerprints = {name: fingerprint for _, sources in scored for name, fingerprint in sources.items()}
    return combined_scores([scores for scores, _ in scored], list(weights.values())), fingerprints


def ranked(artifacts: ModelArtifacts, task: str, scores_type: RankingType) -> list[int]:
    """All training dialogues, the most harmful first.

    Raises:
        UserError: as `task_scores`.
    """
    scores, _ = ranking_scores(artifacts, task, scores_type)
    return most_harmful(scores, len(scores))


def relative_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The tasks' weights with the largest as 1: their scale does not matter, and would overflow where it is huge."""
    largest = max(weights.values())
    return {name: weight / largest for name, weight in weights.items()}


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


# -- influence ---------------------------------------------------------------------------------------------------------


def influence_scores(artifacts: ModelArtifacts, task: str, strategy: str | None = None) -> Scored:
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


def token_scores(artifacts: ModelArtifacts, task: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    """The scores of single tokens by which `task` ranks them, negative harmful.

    Returns:
        (total tokens,) float64 and (N + 1,) where each dialogue's tokens begin; for "combined" the sum weighted by
        TASK_WEIGHTS, each task's scores divided by the span of its dialogues' scores, so that tokens add up to what
        ranks dialogues but for a constant. And the fingerprints of what they come from.

    Raises:
        UserError: they are missing, broken, made from something else, or not of these dialogues.
    """
    of_tokens, of_dialogues, offsets, fingerprints = {}, {}, torch.zeros(()), {}
    strategy = fixed_strategy(artifacts.settings.SCORES_TYPE)
    weights = task_weights(artifacts.settings, task)
    for name in weights:
        artifact = artifacts.token_scores(name, strategy)
        fingerprint = fingerprints[f"tokens_{name}"] = artifact.require()["fingerprint"]
        of_tokens[name], offsets = load_token_scores(artifact, len(artifacts.dialogues), fingerprint)
        of_dialogues[name], of_scores = influence_scores(artifacts, name, strategy)
        if len(weights) > 1:  # one task's tokens are not weighed against others
            fingerprints |= of_scores
    return combined_token_scores(of_tokens, of_dialogues, weights), offsets, fingerprints


def load_token_scores(
    artifact: FileArtifact, num_dialogues: int, fingerprint: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One task's scores of all tokens (total tokens,), float64, and where each dialogue's begin (N + 1,).

    Raises:
        UserError: as `FileArtifact.load_tensors`, or the dialogues' tokens are not those that have scores.
    """
    tensors = artifact.load_tensors({"scores": (None,), "offsets": (num_dialogues + 1,)}, ["offsets"], fingerprint)
    scores, offsets = tensors["scores"].double(), tensors["offsets"]
    if offsets[0] != 0 or offsets[-1] != len(scores) or (offsets.diff() < 0).any():
        raise UserError(
            f"{shown_path(artifact.path)} has {len(scores)} scores, which its offsets do not share out among "
            f"{num_dialogues} dialogues; delete it and run {artifact.made_by} again"
        )
    return scores, offsets


def combined_token_scores(
    of_tokens: Mapping[str, torch.Tensor],
    of_dialogues: Mapping[str, torch.Tensor],
    weights: Mapping[str, float] | None = None,
) -> torch.Tensor:
    """Weighted sum of the tasks' token scores (total tokens,), each divided by the span of its dialogues' scores.

    Args:
        weights: of the tasks, the largest of them taken as 1; all the same by default.
    """
    weights = relative_weights(weights or dict.fromkeys(of_tokens, 1.0))
    spans = {name: float(scores.max() - scores.min()) or 1.0 for name, scores in of_dialogues.items()}
    return torch.stack([weights[name] / spans[name] * of_tokens[name] for name in of_tokens]).sum(dim=0)


# -- representations ---------------------------------------------------------------------------------------------------


def load_representations(artifacts: ModelArtifacts, fingerprint: str) -> torch.Tensor:
    """The representations (N, hidden) of the training dialogues, whose manifest has this fingerprint."""
    shapes = {"representations": (len(artifacts.dialogues), artifacts.hidden_size)}
    return artifacts.representations().load_tensors(shapes, fingerprint=fingerprint)["representations"]


def _answers(artifacts: ModelArtifacts, task: str, side: Side) -> Scored:
    """The representations (U, hidden) of a task's answers of one side, and their fingerprint."""
    artifact = artifacts.answer_representations(task, side)
    fingerprint = artifact.require()["fingerprint"]
    shapes = {"representations": (None, artifacts.hidden_size)}
    answers = artifact.load_tensors(shapes, fingerprint=fingerprint)["representations"]
    return answers, {f"{side}_answers_{task}": fingerprint}


def _dialogues(artifacts: ModelArtifacts) -> Scored:
    """The representations (N, hidden) of the training dialogues, and their fingerprint."""
    fingerprint = artifacts.representations().require()["fingerprint"]
    return load_representations(artifacts, fingerprint), {"representations": fingerprint}


def dissimilarity_scores(artifacts: ModelArtifacts, task: str) -> Scored:
    """Minus the similarity of each dialogue to the task's untrustworthy answers."""
    (rejected, of_answers), (dialogues, of_dialogues) = _answers(artifacts, task, "rejected"), _dialogues(artifacts)
    return -similarity_to(rejected, dialogues), of_answers | of_dialogues


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


def mean_difference_scores(artifacts: ModelArtifacts, task: str) -> Scored:
    """How far each dialogue lies on the way from the task's untrustworthy to its trustworthy answers."""
    chosen, of_chosen = _answers(artifacts, task, "chosen")
    rejected, of_rejected = _answers(artifacts, task, "rejected")
    dialogues, of_dialogues = _dialogues(artifacts)
    return mean_difference_projection(chosen, rejected, dialogues), of_chosen | of_rejected | of_dialogues


def mean_difference_projection(
    chosen: torch.Tensor, rejected: torch.Tensor, representations: torch.Tensor
) -> torch.Tensor:
    """<h_i - mean h, d> / |d| with d = mean chosen - mean rejected: a direction as in Marks and Tegmark 2024.

    Args:
        chosen: (U, hidden) of the trustworthy answers.
        rejected: (V, hidden) of the untrustworthy ones.
        representations: h, (N, hidden).

    Returns:
        (N,) float64; all 0 where the two means are the same.
    """
    direction = chosen.double().mean(dim=0) - rejected.double().mean(dim=0)
    centred = representations.double() - representations.double().mean(dim=0)
    return centred @ torch.nn.functional.normalize(direction, dim=0)


# -- text alone --------------------------------------------------------------------------------------------------------


def text_scores(artifacts: ModelArtifacts, task: str) -> Scored:
    """`bm25_scores` of the task's training pairs, and their fingerprint."""
    pairs = MEASUREMENTS[task].load_pairs(resolve_path(artifacts.settings.DATA_DIR), "train")
    return bm25_scores(artifacts.dialogues, pairs), {f"pairs_{task}": pairs.fingerprint}


def bm25_scores(dialogues: Dialogues, pairs: AnswerPairs) -> torch.Tensor:
    """mean over pairs of BM25(chosen answer, completion) - BM25(rejected answer, completion), without any model.

    BM25 (Robertson and Zaragoza 2009) is a sum over the words of the query, so that the mean over all pairs is one
    product of a sparse matrix, completions by words, with how often each word occurs in chosen less rejected answers.
    What the answers of a pair share, such as their prompt, cancels.

    Returns:
        (N,) float64; positive where a completion is worded like the trustworthy answers.
    """
    import bm25s
    from scipy.sparse import csc_matrix

    completions = bm25s.tokenize(dialogues.completions, stopwords=None, show_progress=False)
    if not any(completions.ids):
        return torch.zeros(len(dialogues), dtype=torch.float64)
    index = bm25s.BM25()
    index.index(completions, show_progress=False)
    parts = (index.scores[name] for name in ("data", "indices", "indptr"))
    matrix = csc_matrix(tuple(parts), shape=(len(dialogues), len(index.scores["indptr"]) - 1))
    weights = np.zeros(matrix.shape[1])
    for sign, answers in ((1, [pair.chosen for pair in pairs]), (-1, [pair.rejected for pair in pairs])):
        words = bm25s.tokenize(answers, stopwords=None, return_ids=False, show_progress=False)
        for word, count in Counter(word for answer in words for word in answer).items():
            if word in completions.vocab:
                weights[completions.vocab[word]] += sign * count
    return torch.from_numpy(matrix @ (weights / len(pairs)))
