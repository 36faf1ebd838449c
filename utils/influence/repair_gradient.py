"""The repair gradient: preconditioned, and without what would change losses that are to stay.

    G = P (sum_i w_i grad Lbar(z_i) - sum_t v_t grad f_t),      P = (F + damping I)^-1

with dialogue weights w and measurement weights v from utils/repair_sources.py, one of the sums empty. With constraints
R_1, R_2, ... (the gradients of losses that are to stay, to first order)

    D = P (g - sum_j alpha_j R_j),   <R_j, D> = 0 for every j,   from the Gram system
    sum_k <R_j, P R_k> alpha_k = <R_j, P g>
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from kronfluence.task import Task

from utils.batching import LabelledSequence
from utils.console import UserError
from utils.folder_artifacts import FolderArtifact
from utils.influence.fitted_weights import fit_weights
from utils.influence.preconditioning import Preconditioner, load_preconditioner
from utils.influence.scores import mean_measurement_gradient, pairs_gradient, weigh_by_score
from utils.influence.traced_model import Gradients, TracedModel
from utils.methods import Method
from utils.paths import STEP_1
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import require_labels
from utils.performance_functions.pairs import AnswerPairs, tokenize_pairs
from utils.repair_sources import RepairSources

SMALLEST_EIGENVALUE = 1e-10  # of the Gram matrix with a diagonal of ones; below, constraints count as one


def with_harmful_tokens(
    examples: list[LabelledSequence], indices: list[int], scores: torch.Tensor, offsets: torch.Tensor
) -> tuple[dict[int, LabelledSequence], dict[str, int]]:
    """The chosen dialogues that have tokens with negative scores, with those alone as labels (as in IF-Guide, 2025).

    Args:
        scores: (total tokens,) of all dialogues.
        offsets: (N + 1,) where each dialogue's tokens begin.

    Returns:
        The dialogues by their row, and for the manifest how many of their labels are harmful.

    Raises:
        UserError: no chosen dialogue has a harmful token, or the scores are of other dialogues.
    """
    chosen, num_labels = {}, 0
    for row in indices:
        example, begin = examples[row], int(offsets[row])
        if int(offsets[row + 1]) - begin != len(example.input_ids):
            raise UserError(
                f"the token scores are of a dialogue {row} with {int(offsets[row + 1]) - begin} tokens, and it has "
                f"{len(example.input_ids)}: run {STEP_1} --COMPUTE_PER_TOKEN_SCORES True --OVERWRITE True"
            )
        labels = slice(begin + example.label_start, begin + example.label_end)
        harmful = replace(example, is_counted=(scores[labels] < 0).numpy())
        num_labels += example.num_labels
        if harmful.num_labels:
            chosen[row] = harmful
    if not chosen:
        raise UserError(
            f"HARMFUL_TOKENS_ONLY = True: no token of the {len(indices)} chosen dialogues has a negative score; "
            "set it to False, or choose by another SCORES_TYPE"
        )
    return chosen, {"harmful": sum(example.num_labels for example in chosen.values()), "of": num_labels}


def dialogue_gradient(
    traced: TracedModel, task: Task, examples: list[LabelledSequence], weights: dict[int, float], description: str
) -> Gradients:
    """sum_i w_i grad Lbar(z_i), Lbar the mean token loss; (1, out, in) for each Linear.

    Args:
        weights: w, by row.
    """
    by_row = np.zeros(len(examples))
    by_row[list(weights)] = list(weights.values())
    loader = traced.loader(examples, cached=True, indices=list(weights), weights=by_row, description=description)
    return mean_measurement_gradient(traced, task, loader)


def retained_gradient(traced: TracedModel, task: Task, examples: list[LabelledSequence], rows: list[int]) -> Gradients:
    """Gradient of the mean NLL of the retained dialogues' label tokens, whose exp is their perplexity."""
    total = max(1, sum(examples[row].num_labels for row in rows))
    # A mean over tokens weights each dialogue's own mean by its number of labels.
    weights = {row: examples[row].num_labels / total for row in rows}
    return dialogue_gradient(traced, task, examples, weights, "retained")


def measurement_gradient(traced: TracedModel, task: Task, name: str, pairs: AnswerPairs) -> Gradients:
    """grad f of one measurement over answer pairs, (1, out, in) for each Linear."""
    return pairs_gradient(traced, task, tokenize_pairs(pairs, traced.tokenizer, MEASUREMENTS[name].max_tokens), name)


def source_gradient(
    traced: TracedModel, task: Task, examples: list[LabelledSequence], sources: RepairSources
) -> tuple[Gradients, dict[str, Any]]:
    """g, what the repair goes up, before any preconditioning, and facts for the manifest."""
    if not sources.dialogues:
        total: Gradients = {}
        for name, weight in sources.measurements.items():
            gradients = measurement_gradient(traced, task, name, sources.pairs[name])
            total = {module: total.get(module, 0) - weight * gradient for module, gradient in gradients.items()}
        return total, {}
    weights, facts = sources.dialogues, {}
    if sources.tokens:
        harmful, facts["tokens"] = with_harmful_tokens(examples, sources.indices, *sources.tokens)
        examples = [harmful.get(row, example) for row, example in enumerate(examples)]
        left = sum(weights[row] for row in harmful)
        share = sum(weights.values()) / left if sources.is_mean and left else 1.0
        weights = {row: weights[row] * share for row in harmful}
    require_labels([examples[row] for row in weights], f"the {len(weights)} dialogues that SCORES_TYPE chooses")
    return dialogue_gradient(traced, task, examples, weights, "subset"), facts


def fitted_gradient(
    traced: TracedModel,
    task: Task,
    examples: list[LabelledSequence],
    sources: RepairSources,
    precondition: Preconditioner,
    num_iterations: int,
) -> tuple[Gradients, dict[str, Any]]:
    """g with weights of all dialogues that are fitted from their scores, and facts for the manifest."""
    require_labels(examples, f"the {len(examples)} dialogues that SCORES_TYPE chooses")
    device, loader = traced.model.device, traced.loader(examples, cached=True, keeps_labels=True)
    num_labels = torch.tensor([example.num_labels for example in examples], device=device)
    by_score = torch.tensor([sources.dialogues[row] for row in range(len(examples))], dtype=torch.float64)
    zeros = {name: traced.zeros(1, *shape) for name, shape in traced.gradient_shapes().items()}
    weigh = partial(weigh_by_score, traced, task, loader)
    fit = fit_weights(by_score.to(device), num_labels, zeros, weigh, precondition, num_iterations)
    return fit.gradient, {"residuals": fit.residuals}


def constraint_gradients(
    traced: TracedModel, task: Task, examples: list[LabelledSequence], sources: RepairSources
) -> dict[str, Gradients]:
    """The gradients of the losses that are to stay, by name."""
    constraints = {name: measurement_gradient(traced, task, name, sources.pairs[name]) for name in sources.preserved}
    if sources.retained:
        constraints["retained"] = retained_gradient(traced, task, examples, sources.retained)
    return constraints


def inner_product_matrix(a: Gradients, b: Gradients) -> torch.Tensor:
    """<a_i, b_j> over all modules, in float64: (queries of a, queries of b)."""
    return sum(a[name].flatten(1).double() @ b[name].flatten(1).double().T for name in a)


def preserving_direction(gradients: Gradients, preconditioned: Gradients) -> tuple[Gradients, list[float]]:
    """The natural gradient without the part that changes losses which are to stay, to first order.

    D = P (g - sum_j alpha_j R_j) with <R_j, D> = 0. Constraints that depend on others, or are 0, are left out: the
    Gram system is scaled to a diagonal of ones, and solved where its eigenvalues are not rounding noise.

    Args:
        gradients: (1 + constraints, out, in) for each module: g, then the R_j.
        preconditioned: P applied to all of them.

    Returns:
        D, (1, out, in) for each module, and the alphas.
    """
    constraints = {name: rows[1:] for name, rows in gradients.items()}
    products = inner_product_matrix(constraints, preconditioned)  # (constraints, 1 + constraints)
    gram, right = products[:, 1:], products[:, 0]
    scale = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    normalised = inverse[:, None] * (gram + gram.T) / 2 * inverse
    alphas = inverse * (torch.linalg.pinv(normalised, hermitian=True, atol=SMALLEST_EIGENVALUE) @ (inverse * right))
    direction = {
        name: rows[:1] - torch.einsum("k,koi->oi", alphas.to(rows), rows[1:])[None]
        for name, rows in preconditioned.items()
    }
    return direction, alphas.tolist()


def preconditioner_for(method: Method, factors: FolderArtifact, traced: TracedModel) -> Preconditioner | None:
    """P of a method; None where it does without curvature.

    Raises:
        UserError: as `load_preconditioner`.
    """
    return load_preconditioner(factors, traced) if method.step == "natural" else None


def repair_gradient(
    traced: TracedModel,
    task: Task,
    examples: list[LabelledSequence],
    sources: RepairSources,
    precondition: Preconditioner | None,
    fit_iterations: int = 0,
) -> tuple[Gradients, dict[str, Any]]:
    """G, or with constraints D; (1, out, in) for each Linear, and facts for the manifest.

    Args:
        task: whose measurement is a weighted sum of mean token losses.
        precondition: P; None leaves the gradient as it is.
        fit_iterations: for "fitted", whose weights are fitted first; 0 for all others.
    """
    facts: dict[str, Any] = sources.facts
    if precondition is None:
        gradient, of_sources = source_gradient(traced, task, examples, sources)
        return gradient, facts | of_sources
    if fit_iterations:
        gradient, of_sources = fitted_gradient(traced, task, examples, sources, precondition, fit_iterations)
    else:
        gradient, of_sources = source_gradient(traced, task, examples, sources)
    facts |= of_sources
    constraints = constraint_gradients(traced, task, examples, sources)
    if not constraints:
        return precondition(gradient), facts
    together = {name: torch.cat([gradient[name], *(r[name] for r in constraints.values())]) for name in gradient}
    direction, alphas = preserving_direction(together, precondition(together))
    return direction, facts | {"alphas": dict(zip(constraints, alphas, strict=True))}
