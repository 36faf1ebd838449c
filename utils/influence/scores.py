"""Influence scores: the gradient of a measurement, preconditioned, against the gradient of every training dialogue.

gradient of the measurement, for each task      grad f_task, (1, out, in)
stacked, preconditioned                         (F + damping I)^-1 grad f_task, (tasks, out, in)
scores of the training data                     (tasks, N) in one pass
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    EIGENDECOMPOSITION_FACTOR_NAMES,
    FACTOR_TYPE,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    HEURISTIC_DAMPING_SCALE,
    LAMBDA_FACTOR_NAMES,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)

from utils.artifacts import Artifact
from utils.batching import Batch, BatchLoader
from utils.console import UserError, shown_path
from utils.influence.factor_files import factor_file, load_factors
from utils.influence.token_gradients import summed_gradient, token_scores
from utils.influence.traced_model import Curvature, Gradients, TracedModel
from utils.locks import locked
from utils.paths import STEP_1
from utils.processes import all_reduce
from utils.tensors import require_shapes

LARGEST_NORM_ERROR = 1e-2  # of an eigenvector, whose norm is 1


def mean_measurement_gradient(traced: TracedModel, task: Task, loader: BatchLoader) -> Gradients:
    """Gradient of the task's measurement, the weighted sum over the loader's sequences.

    Returns:
        For each traced Linear (1, out, in), with the bias as a last column where there is one.
    """
    totals = traced.totals(traced.gradient_shapes())

    def add(_: Batch, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        totals.add(name, summed_gradient(traced.active_rows(name, inputs, gradients)))

    traced.backward_passes(loader, lambda batch: task.compute_measurement(batch, traced.model), add)
    return {name: total.unsqueeze(0) for name, total in totals.over_processes().items()}


@torch.no_grad()
def precondition(gradients: Gradients, curvature: Curvature, folder: Path) -> Gradients:
    """(F + damping I)^-1 applied to gradients, module by module; several queries at once.

    EKFAC:    Q_G ((Q_G^T V Q_A) / (Lambda + damping)) Q_A^T   (George et al. 2018; Grosse et al. 2023, eq. 21)
    KFAC:     the same with the outer product of the covariances' eigenvalues in place of Lambda
    diagonal: V / (Lambda + damping), Lambda in the standard basis
    identity: V

    Args:
        gradients: V, (queries, out, in) for each module.
        folder: of the factors.

    Returns:
        Tensors of the same shapes.

    Raises:
        UserError: the factors are broken, or do not belong to these modules; or the damping is too small for them.
    """
    if curvature.strategy == "identity":
        return gradients
    names = EIGENDECOMPOSITION_FACTOR_NAMES * curvature.has_eigenbasis + LAMBDA_FACTOR_NAMES * curvature.has_lambda
    loaded, preconditioned = load_factors(folder, names), {}
    require_factors(loaded, {module: tuple(v.shape[1:]) for module, v in gradients.items()}, folder)
    for module, v in gradients.items():
        factor = {name: by_module[module].to(v.device) for name, by_module in loaded.items()}
        if curvature.has_lambda:
            eigenvalues = factor[LAMBDA_MATRIX_NAME].double() / factor[NUM_LAMBDA_PROCESSED]  # (out, in)
        else:
            sides = (factor[name].double() for name in (GRADIENT_EIGENVALUES_NAME, ACTIVATION_EIGENVALUES_NAME))
            eigenvalues = torch.outer(*sides)  # (out, in)
        damping = HEURISTIC_DAMPING_SCALE * eigenvalues.mean() if curvature.damping is None else curvature.damping
        require_invertible(eigenvalues + damping, curvature, module)
        inverse = (eigenvalues + damping).reciprocal().to(v.dtype)
        if curvature.has_eigenbasis:
            q_a, q_g = (factor[name].to(v.dtype) for name in (ACTIVATION_EIGENVECTORS_NAME, GRADIENT_EIGENVECTORS_NAME))
            preconditioned[module] = q_g @ ((q_g.T @ (v @ q_a) * inverse) @ q_a.T)
        else:
            preconditioned[module] = v * inverse
    return preconditioned


def precondition_with(factors: Artifact, gradients: Gradients, curvature: Curvature) -> Gradients:
    """As `precondition`, by factors that no other run replaces meanwhile.

    Raises:
        UserError: another run has replaced them by factors of other settings, or as `precondition`.
    """
    with locked(factors.path, to_read=True):
        factors.require()
        return precondition(gradients, curvature, factors.path)


def require_factors(factors: FACTOR_TYPE, gradient_shapes: Mapping[str, tuple[int, int]], folder: Path) -> None:
    """Check that factors are those of these modules: their sizes, and that eigenvectors have the norm 1.

    Args:
        factors: by kronfluence's names, each by module.
        gradient_shapes: (out, in) of every module's gradient.

    Raises:
        UserError: names the file that is not.
    """
    sizes = {
        ACTIVATION_EIGENVECTORS_NAME: lambda _, inputs: (inputs, inputs),
        GRADIENT_EIGENVECTORS_NAME: lambda outputs, _: (outputs, outputs),
        ACTIVATION_EIGENVALUES_NAME: lambda _, inputs: (inputs,),
        GRADIENT_EIGENVALUES_NAME: lambda outputs, _: (outputs,),
        LAMBDA_MATRIX_NAME: lambda *shape: shape,
        NUM_LAMBDA_PROCESSED: lambda *_: (1,),
    }
    remedy = f"delete {shown_path(folder)} and run {STEP_1} again"
    for name, by_module in factors.items():
        file, shapes = shown_path(factor_file(folder, name)), {m: sizes[name](*s) for m, s in gradient_shapes.items()}
        require_shapes(by_module, shapes, file, remedy, counts=shapes if name == NUM_LAMBDA_PROCESSED else ())
        for module, factor in by_module.items():
            is_right = True
            if name in (ACTIVATION_EIGENVECTORS_NAME, GRADIENT_EIGENVECTORS_NAME):
                is_right = bool((torch.linalg.vector_norm(factor, dim=0) - 1).abs().max() < LARGEST_NORM_ERROR)
            elif name == NUM_LAMBDA_PROCESSED:
                is_right = bool(factor > 0)
            if not is_right:
                raise UserError(f"{file} holds no {name.replace('_', ' ')} of module {module}; {remedy}")


def require_representable(tensors: Iterable[torch.Tensor], what: str, constants: Mapping[str, Any]) -> None:
    """Refuse what a constant has scaled beyond the precision: ranks and steps would be rounding noise.

    Args:
        tensors: of one precision.
        constants: those that may have done it, by name.

    Raises:
        UserError: the largest number is not finite, or so small that others which matter are not normal numbers.
    """
    largest = torch.stack([tensor.abs().max().cpu() for tensor in tensors]).max()
    limits = torch.finfo(largest.dtype)
    if not limits.tiny / limits.eps <= float(largest) <= limits.max:
        reason = "they do not depend on the last NUM_BLOCKS blocks"
        if blamed := [f"{name} = {value}" for name, value in constants.items() if value is not None]:
            reason = f"change {' or '.join(blamed)}"
        dtype = str(largest.dtype).removeprefix("torch.")
        raise UserError(f"{what} are {float(largest):.0e} at most, which {dtype} cannot compute with: {reason}")


def require_invertible(damped: torch.Tensor, curvature: Curvature, module: str) -> None:
    """Refuse a damped curvature whose smallest eigenvalue is rounding noise: its inverse would swamp all the others.

    Eigenvalues are second moments, so that rounding gradients to a relative eps leaves up to eps^2 of the largest one
    in directions that have none: those that no example reaches, and those that a LayerNorm takes out. Rounding also
    turns some of KFAC's negative.

    Args:
        damped: (out, in) eigenvalues + damping.

    Raises:
        UserError: an eigenvalue is at most eps^2 of the largest, eps that of the gradients' precision.
    """
    precision = torch.bfloat16 if curvature.half_precision else curvature.dtype
    smallest, largest, eps = float(damped.min()), float(damped.max()), torch.finfo(precision).eps
    if not smallest > eps**2 * largest:
        raise UserError(
            f"DAMPING_FACTOR = {curvature.damping}: the damped eigenvalues of {module} reach from {smallest:.0e} to "
            f"{largest:.0e}, and the smallest are rounding noise, which the inverse would blow up; give "
            f"{'None (0.1 x their mean) or ' if largest > 0 else ''}a larger one, such as {eps * largest or 1e-8:.0e}, "
            "or more NUM_FACTOR_EXAMPLES"
        )


@dataclass(frozen=True)
class Scores:
    """Influence scores; positive means that training on the example lowers the measurement (helps).

    Attributes:
        examples: (queries, N) in dataset order.
        tokens: (queries, total tokens) scores of single tokens, example after example, or None.
        token_offsets: (N + 1,) where each example's tokens begin, or None.
    """

    examples: torch.Tensor
    tokens: torch.Tensor | None = None
    token_offsets: torch.Tensor | None = None


def score_training_examples(
    traced: TracedModel, task: Task, loader: BatchLoader, preconditioned: Gradients, per_token: bool = False
) -> Scores:
    """Influence of every training example on every query, in one pass over the training data.

    s_i = grad f^T (F + damping I)^-1 grad L(z_i)   (Koh and Liang 2017; Grosse et al. 2023, eq. 5)

    Args:
        task: gives the training loss L, which is the same for all trust tasks.
        loader: the training examples.
        preconditioned: (queries, out, in) for each module, one query for each trust task.
        per_token: also split each score over the tokens of the example.
    """
    num_queries = len(next(iter(preconditioned.values())))
    lengths = torch.tensor([len(sequence.input_ids) for sequence in loader.sequences])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    scores = traced.zeros(num_queries, len(loader.sequences))
    of_tokens = torch.zeros(num_queries, int(offsets[-1]) if per_token else 0, dtype=scores.dtype)

    def add_scores(batch: Batch, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        rows = traced.active_rows(name, inputs, gradients)
        of_rows = token_scores(preconditioned[name], rows)  # (queries, n)
        row, position = rows.is_active.nonzero(as_tuple=True)
        example = batch["index"][row]
        scores.index_add_(1, example, of_rows)
        if per_token:
            of_tokens.index_add_(1, offsets[example.cpu()] + position.cpu(), of_rows.cpu())

    traced.backward_passes(loader, lambda batch: task.compute_train_loss(batch, traced.model), add_scores)
    all_reduce(scores, of_tokens)
    return Scores(scores.cpu(), of_tokens, offsets) if per_token else Scores(scores.cpu())
