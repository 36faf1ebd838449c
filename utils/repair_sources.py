"""What a repair gradient is computed from: the dialogues with their weights, the answer pairs, what is preserved.

up the loss of      the subset S, w_i = 1 / K              "pure_ekfac", every other ranking, "dpp", "random"
up and down         1 / K of the K most harmful dialogues, -1 / T of the T most helpful      "contrast"
by the score        of all dialogues, w_i = -s_i / sum_j abs(s_j)                            "weighted"
                    of all, fitted from there on (utils/influence/fitted_weights.py)         "fitted"
                    of the diverse subset, w_i = q_i / sum_{j in S} q_j, q_i how harmful     "dpp_weighted"
down the loss of    T random dialogues, w_i = -1 / T, a control                              "descent"
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from utils.console import UserError, shown_path
from utils.files import fingerprint_of
from utils.paths import STEP_3, resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.pairs import AnswerPairs
from utils.rankings import Scored, min_max_normalise, ranking_scores, relative_weights, task_scores, token_scores
from utils.registry import ModelArtifacts
from utils.repairs import HELPFUL_FOR_EACH_HARMFUL, RepairChoice
from utils.selection import held_out_rows, most_harmful, random_subset, require_enough
from utils.settings import TASK_NAMES, task_weights

SUM_DIVISOR = 100  # makes the "sum" over the paper's 100 dialogues their mean


@dataclass(frozen=True)
class RepairSources:
    """What a repair gradient is computed from.

    Attributes:
        measurements: weights of the measurements that the model is repaired for.
        dialogues: weights of the mean token loss of training dialogues, by row; the step goes up where positive.
        is_mean: whether the weights of a subset are those of a mean, and not of a sum divided by SUM_DIVISOR.
        indices: rows of the dialogues to unlearn; none where no subset is chosen.
        helpful: rows of the dialogues that TOP_K counts, whose loss goes down.
        retained: rows of the training dialogues whose loss must not change.
        pairs: training pairs by measurement: those to descend, and those to preserve.
        preserved: measurements that must not change, for PRESERVE_TASKS.
        tokens: for HARMFUL_TOKENS_ONLY, the scores of all tokens and where each dialogue's begin.
        fingerprints: of all but the weights of the measurements.
    """

    measurements: dict[str, float]
    dialogues: dict[int, float]
    is_mean: bool
    indices: list[int]
    helpful: list[int]
    retained: list[int]
    pairs: dict[str, AnswerPairs]
    preserved: list[str]
    tokens: tuple[torch.Tensor, torch.Tensor] | None
    fingerprints: dict[str, str]

    @property
    def facts(self) -> dict[str, list[int]]:
        """The rows by what becomes of them, for the manifest."""
        return {"indices": self.indices, "helpful": self.helpful, "retained": self.retained}


def choose_sources(artifacts: ModelArtifacts, task: str, retained: list[int] | None = None) -> RepairSources:
    """What the gradient of the settings' repair is computed from.

    Args:
        retained: rows that were drawn before; by default they are drawn now.

    Raises:
        UserError: choices that do not go together, or the scores, subset or pairs that SCORES_TYPE needs are missing or
            broken.
    """
    settings, choice, total = artifacts.settings, RepairChoice.of(artifacts.settings), len(artifacts.dialogues)
    method, measurements = choice.method, task_weights(settings, task)
    choice.require_consistent(task)
    if method.is_fitted and settings.FACTOR_STRATEGY == "ekfac_cg":
        raise UserError(
            "FACTOR_STRATEGY = 'ekfac_cg': SCORES_TYPE 'fitted' takes scores and curvature of one kind, and step 4 "
            "preconditions with EKFAC; give 'ekfac'"
        )
    if method.subset:
        require_enough(choice.bottom_k, total)
    ranking = ranking_scores(artifacts, task, method.ranking) if method.ranking else None
    indices = choose_subset(artifacts, task, ranking)
    # A gradient without a subset has no GRADIENT_REDUCTION_TYPE in its manifest.
    is_mean = method.subset is None or settings.GRADIENT_REDUCTION_TYPE == "mean"
    weights, fingerprints = dialogue_weights(artifacts, task, ranking, indices, is_mean)
    helpful = [row for row, weight in weights.items() if weight < 0] if method.descends else []
    tokens = None
    if choice.harmful_tokens_only:
        *tokens, of_tokens = token_scores(artifacts, task)
        fingerprints |= of_tokens
    if not (choice.preserve_perplexity or method.retains):
        retained = []
    elif retained is None:
        used = [*indices, *helpful]
        if method.is_control_of_npo:  # retain what "npo" does
            used += most_harmful(ranking[0], choice.bottom_k)
        retained = held_out_rows("retain", used, total, settings.NUM_RETAIN_EXAMPLES, settings.SEED)
    if retained:
        fingerprints["retained"] = fingerprint_of(retained)
    preserved = [name for name in TASK_NAMES if choice.preserve_tasks and name not in measurements]
    descended = list(measurements) if method.uses_pairs else []
    pairs = {}
    if preserved or descended:
        data_dir = resolve_path(settings.DATA_DIR)
        pairs = {name: MEASUREMENTS[name].load_pairs(data_dir, "train") for name in [*descended, *preserved]}
        if choice.scores_type == "direct_shuffled":
            pairs |= {name: with_other_prompts(pairs[name], settings.SEED) for name in descended}
        fingerprints["pairs"] = fingerprint_of({name: of_task.fingerprint for name, of_task in pairs.items()})
    return RepairSources(
        measurements, weights, is_mean, indices, helpful, retained, pairs, preserved, tokens, fingerprints
    )


# -- which dialogues ---------------------------------------------------------------------------------------------------


def choose_subset(artifacts: ModelArtifacts, task: str, ranking: Scored | None) -> list[int]:
    """Rows of the BOTTOM_K training dialogues to unlearn, as SCORES_TYPE has it; none where it unlearns no subset.

    Args:
        ranking: what SCORES_TYPE goes by, from `ranking_scores`; None where it goes by none.
    """
    settings, choice = artifacts.settings, RepairChoice.of(artifacts.settings)
    if choice.method.subset is None:
        return []
    if choice.method.subset == "random":
        return random_subset(len(artifacts.dialogues), choice.bottom_k, settings.SEED)
    scores, fingerprints = ranking
    if choice.method.subset == "diverse":
        return diverse_subset(artifacts, task, fingerprints)
    return most_harmful(scores, choice.bottom_k)


def diverse_subset(artifacts: ModelArtifacts, task: str, fingerprints: dict[str, str]) -> list[int]:
    """The indices that step 3 picked.

    Args:
        fingerprints: of the scores that are there now, by which they must have been picked.
    """
    total, bottom_k = len(artifacts.dialogues), artifacts.settings.BOTTOM_K
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


# -- their weights -----------------------------------------------------------------------------------------------------


def dialogue_weights(
    artifacts: ModelArtifacts, task: str, ranking: Scored | None, indices: list[int], is_mean: bool
) -> tuple[dict[int, float], dict[str, str]]:
    """The weight of each dialogue's mean token loss by row, as SCORES_TYPE has it, and their fingerprints.

    Args:
        ranking: as for `choose_subset`.
        indices: what that has chosen.
        is_mean: whether the weights of a subset are those of a mean, and not of a sum divided by SUM_DIVISOR.
    """
    choice, total, seed = RepairChoice.of(artifacts.settings), len(artifacts.dialogues), artifacts.settings.SEED
    of_subset = {"subset": fingerprint_of(indices)}
    if choice.method.weighs_all:
        weights = weights_by_score(artifacts, task)
        return dict(enumerate(weights.tolist())), {"weights": fingerprint_of(weights.tolist())}
    if choice.scores_type == "descent":
        require_enough(choice.num_helpful, total, "TOP_K")
        rows = random_subset(total, choice.num_helpful, seed)
        return dict.fromkeys(rows, -1 / len(rows)), {"helpful": fingerprint_of(rows)}
    if not choice.method.subset:
        return {}, {}
    if choice.scores_type == "dpp_weighted":
        harm = min_max_normalise(-ranking[0])[indices]
        shares = harm / harm.sum() if harm.sum() > 0 else torch.full_like(harm, 1 / len(harm))
        scale = 1.0 if is_mean else len(indices) / SUM_DIVISOR
        weights = dict(zip(indices, (scale * shares).tolist(), strict=True))
        return weights, of_subset | {"weights": fingerprint_of(list(weights.values()))}
    weights = dict.fromkeys(indices, 1 / len(indices) if is_mean else 1 / SUM_DIVISOR)
    if choice.scores_type == "contrast":
        require_enough(
            choice.bottom_k + choice.num_helpful,
            total,
            f"BOTTOM_K and TOP_K (None: {HELPFUL_FOR_EACH_HARMFUL} x BOTTOM_K) together",
        )
        helpful = most_harmful(ranking[0], total)[::-1][: choice.num_helpful]
        weights |= dict.fromkeys(helpful, -1 / len(helpful) if is_mean else -1 / SUM_DIVISOR)
        return weights, of_subset | {"helpful": fingerprint_of(helpful)}
    return weights, of_subset


def weights_by_score(artifacts: ModelArtifacts, task: str) -> torch.Tensor:
    """w_i = -s_i / sum_j abs(s_j), (N,) float64; for "combined" the mean over the tasks, weighted by TASK_WEIGHTS."""
    weights = relative_weights(task_weights(artifacts.settings, task))
    total = torch.zeros(len(artifacts.dialogues), dtype=torch.float64)
    for name, weight in weights.items():
        scores = task_scores(artifacts, "pure_ekfac", name)[0].double()
        total -= weight / sum(weights.values()) * scores / scores.abs().sum().clamp(min=torch.finfo(scores.dtype).tiny)
    return total


# -- the control of "direct" -------------------------------------------------------------------------------------------


def with_other_prompts(pairs: AnswerPairs, seed: int) -> AnswerPairs:
    """The same answers, each pair with the prompt of another: what is left to learn is the style of good answers.

    Pairs with one prompt keep together. Where all have the same prompt, nothing changes.
    """
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    order = random.Random(f"prompts {seed}").sample(prompts, len(prompts))
    successor = dict(zip(order, _rotated(order), strict=True))
    return replace(pairs, pairs=[pair._replace(prompt=successor[pair.prompt]) for pair in pairs])


def _rotated(items: Sequence[str]) -> list[str]:
    return [*items[1:], *items[:1]]
