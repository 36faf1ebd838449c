"""Influence scores: the gradient of a measurement, preconditioned, against the gradient of every training dialogue.

gradient of the measurement, for each task      grad f_task, (1, out, in)
stacked, preconditioned                         (F + damping I)^-1 grad f_task, (tasks, out, in)
scores of the training data                     (tasks, N) in one pass
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from kronfluence.task import Task

from utils.batching import Batch, BatchLoader
from utils.console import UserError
from utils.influence.token_gradients import TokenRows, row_scores, summed_gradient
from utils.influence.traced_model import Gradients, TracedModel
from utils.performance_functions.pairs import TokenizedPairs
from utils.processes import all_reduce


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


def pairs_gradient(traced: TracedModel, task: Task, pairs: TokenizedPairs, name: str) -> Gradients:
    """grad f of one measurement over its answer pairs, (1, out, in) for each Linear.

    Args:
        name: of the measurement, for the progress bar.
    """
    loader = traced.loader(pairs.sequences, weights=pairs.weights, description=f"{name} pairs")
    return mean_measurement_gradient(traced, task, loader)


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
        reason = "check the model's weights"
        if largest == 0:
            reason = "look whether the loss depends on the last NUM_BLOCKS blocks"
        if blamed := [f"{name} = {value}" for name, value in constants.items() if value is not None]:
            reason = f"change {' or '.join(blamed)}, or {reason}"
        dtype = str(largest.dtype).removeprefix("torch.")
        raise UserError(f"{what} are {float(largest):.0e} at most, which {dtype} cannot compute with: {reason}")


def score_training_examples(
    traced: TracedModel, task: Task, loader: BatchLoader, preconditioned: Gradients
) -> torch.Tensor:
    """Influence of every training example on every query, in one pass over the training data.

    s_i = grad f^T (F + damping I)^-1 grad L(z_i)   (Koh and Liang 2017; Grosse et al. 2023, eq. 5)

    Args:
        task: gives the training loss L, which is the same for all trust tasks.
        loader: the training examples.
        preconditioned: (queries, out, in) for each module, one query for each trust task.

    Returns:
        (queries, N) in dataset order; positive means that training on the example lowers the measurement (helps).
    """
    scores = traced.zeros(len(next(iter(preconditioned.values()))), len(loader.sequences))

    def add_scores(batch: Batch, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        rows = traced.active_rows(name, inputs, gradients)
        row, _ = rows.is_active.nonzero(as_tuple=True)
        scores.index_add_(1, batch["index"][row], row_scores(preconditioned[name], rows))

    traced.backward_passes(loader, lambda batch: task.compute_train_loss(batch, traced.model), add_scores)
    all_reduce(scores)
    return scores.cpu()


def weigh_by_score(
    traced: TracedModel,
    task: Task,
    loader: BatchLoader,
    query: Gradients,
    weights_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, Gradients]:
    """Score every training example, weigh it by its score, and sum the gradients: in one pass.

    sum_i w_i grad L(z_i),   w_i a function of s_i = <query, grad L(z_i)>

    Args:
        query: (1, out, in) for each module.
        weights_of: from rows of examples (B,) and their scores (B,) to their weights (B,).

    Returns:
        Scores (N,) in dataset order, and the sum, (1, out, in) for each module.
    """
    scores, totals = traced.zeros(len(loader.sequences)), traced.totals(traced.gradient_shapes())
    rows_of: dict[str, TokenRows] = {}  # of one batch

    def keep(_: Batch, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        rows_of[name] = traced.active_rows(name, inputs, gradients)

    def add(batch: Batch) -> None:
        examples = {name: rows.is_active.nonzero()[:, 0] for name, rows in rows_of.items()}  # (n,) of each token
        of_batch = traced.zeros(len(batch["index"]))
        for name, rows in rows_of.items():
            of_batch.index_add_(0, examples[name], row_scores(query[name], rows)[0])
        weights = weights_of(batch["index"], of_batch).to(of_batch)
        for name, rows in rows_of.items():
            weighted = rows._replace(gradients=weights[examples[name], None] * rows.gradients)
            totals.add(name, summed_gradient(weighted))
        scores[batch["index"]] = of_batch
        rows_of.clear()

    traced.backward_passes(loader, lambda batch: task.compute_train_loss(batch, traced.model), keep, add)
    all_reduce(scores)
    return scores, {name: total.unsqueeze(0) for name, total in totals.over_processes().items()}
