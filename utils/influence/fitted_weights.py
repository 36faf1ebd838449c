"""Weights of training dialogues whose gradients together come closest to that of the measurement.

    min_w  | grad f + sum_i w_i grad Lbar(z_i) |^2   in the norm  <g, P g>,   P = (F + damping I)^-1

A step up sum_i w_i Lbar(z_i) then is as near to a step down the measurement as the training dialogues allow. The normal
equations need no more than influence scores: those of step 1 on the right, and on the left those of a direction that is
itself a weighted sum. They are solved by conjugate gradients from w = 0, and few iterations are a regularisation: they
fit the directions first in which many dialogues agree. With rows divided by the root of their number of labels n_i, so
that long and short dialogues have gradients of one size, the first iteration gives the weights of "weighted":

    c_i = w_i / sqrt(n_i),   M c = sum_i c_i grad L_i / sqrt(n_i),   A = M^T P M,   b_i = -s_i / sqrt(n_i),   A c = b

An iteration takes A p and M r for the residual r = b - A c. Both come from one pass over the dialogues (`Weigher`): the
residual of a dialogue changes by its own score alone, so it is known by the time its gradient is summed. The loop of
conjugate_gradient.py asks for A p alone, which would take two passes: hence one of its own here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from utils.console import UserError, progress_bar
from utils.influence.conjugate_gradient import inner_products
from utils.influence.traced_model import Gradients
from utils.processes import first_process_only

# From a query (1, out, in) for each module, and a function from rows (B,) and their scores <grad L_i, query> (B,) to
# weights (B,): the scores (N,), and sum_i weight_i grad L_i.
Weigher = Callable[[Gradients, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]], tuple[torch.Tensor, Gradients]]


class Fit(NamedTuple):
    """Fitted weights.

    Attributes:
        weights: w (N,) float64, with absolute values that sum to 1.
        gradient: sum_i w_i grad Lbar(z_i), (1, out, in) for each module.
        residuals: |b - A c| / |b| before each iteration, the first for c = 0.
    """

    weights: torch.Tensor
    gradient: Gradients
    residuals: list[float]


def fit_weights(
    weights: torch.Tensor,
    num_labels: torch.Tensor,
    zeros: Gradients,
    weigh: Weigher,
    precondition: Callable[[Gradients], Gradients],
    num_iterations: int,
) -> Fit:
    """The weights after some iterations of conjugate gradients (Hestenes and Stiefel 1952).

    Args:
        weights: (N,) float64, minus the influence scores, on any scale.
        num_labels: (N,) of the dialogues.
        zeros: (1, out, in) for each module.
        precondition: P.
        num_iterations: each takes one pass over the dialogues; it ends earlier where nothing is left to fit.

    Raises:
        UserError: the weights are 0 or not finite.
    """
    roots = num_labels.double().clamp(min=1).sqrt()
    residual = weights.double() / roots  # r
    coefficients, direction = torch.zeros_like(residual), torch.zeros_like(residual)  # c, p
    total, image, query = zeros, zeros, zeros  # M c, M p, P M p
    step, previous, residuals = 0.0, float("inf"), []
    tiny, tolerance = torch.finfo(torch.float64).tiny, torch.finfo(torch.float32).eps
    norm = max(float(residual.norm()), tiny)

    def next_weights(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return (residual[rows] - step * scores / roots[rows]) / roots[rows]

    @first_process_only  # where machines round differently, one of them decides for all
    def is_solved() -> bool:
        return residuals[-1] <= tolerance

    with progress_bar(num_iterations, "fitted weights", "iterations") as bar:
        for _ in range(num_iterations):
            scores, of_residual = weigh(query, next_weights)
            residual = residual - step * scores.double() / roots
            residuals.append(float(residual.norm()) / norm)
            bar.set_postfix_str(f"residual {residuals[-1]:.1e}")
            bar.update()
            if is_solved():
                break
            squared = float(residual.square().sum())
            ratio, previous = squared / previous, squared
            direction = residual + ratio * direction
            image = {name: rows + ratio * image[name] for name, rows in of_residual.items()}
            query = precondition(image)
            step = squared / max(float(inner_products(image, query)), tiny)
            coefficients = coefficients + step * direction
            total = {name: total[name] + step * rows for name, rows in image.items()}
    fitted = roots * coefficients
    scale = float(fitted.abs().sum())
    if not 0 < scale < float("inf"):
        raise UserError("SCORES_TYPE = 'fitted': the weights are 0 or not finite; set DAMPING_FACTOR to more")
    return Fit(fitted / scale, {name: rows / scale for name, rows in total.items()}, residuals)
