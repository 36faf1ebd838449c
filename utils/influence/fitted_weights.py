"""Weights of training dialogues whose gradients together come closest to that of the measurement.

    min_w  | grad f + sum_i w_i grad Lbar(z_i) |^2   in the norm  <g, P g>,   P = (F + damping I)^-1

A step up sum_i w_i Lbar(z_i) then is as near to a step down the measurement as the training dialogues allow. The normal
equations need no more than influence scores: those of step 1 on the right, and on the left those of a direction that is
itself a weighted sum. They are solved by conjugate gradients from w = 0, and few iterations are a regularisation: they
fit the directions first in which many dialogues agree. With rows divided by the root of their number of labels n_i, so
that long and short dialogues have gradients of one size, the first iteration gives the weights of "weighted":

    c_i = w_i / sqrt(n_i),   A_ij = <grad L_i, P grad L_j> / sqrt(n_i n_j),   b_i = -s_i / sqrt(n_i),   A c = b
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from utils.console import UserError, progress_bar
from utils.processes import first_process_only


def fit_weights(
    weights: torch.Tensor,
    num_labels: torch.Tensor,
    gradient_scores: Callable[[torch.Tensor], torch.Tensor],
    num_iterations: int,
) -> tuple[torch.Tensor, list[float]]:
    """The weights after some iterations.

    Args:
        weights: (N,) float64, minus the influence scores, on any scale.
        num_labels: (N,) of the dialogues.
        gradient_scores: from weights w (N,) to the scores (N,) of the dialogues on sum_j w_j grad Lbar(z_j):
            <grad L_i, P sum_j w_j grad Lbar(z_j)>.
        num_iterations: each takes two passes over the dialogues; it ends earlier where nothing is left to fit.

    Returns:
        (N,) with absolute values that sum to 1, and |b - A c| / |b| after each iteration.

    Raises:
        UserError: a number is not finite.
    """
    roots = num_labels.double().clamp(min=1).sqrt()
    right = weights.double() / roots
    solution, residual, direction, history = torch.zeros_like(right), right, right, []

    @first_process_only  # where machines round differently, one of them decides for all
    def goes_on() -> bool:
        return len(history) < num_iterations and float(residual.norm()) > torch.finfo(torch.float32).eps * float(
            right.norm()
        )

    with progress_bar(num_iterations, "fitting weights", "iterations") as bar:
        while goes_on():
            image = gradient_scores(roots * direction).double() / roots
            step = residual.square().sum() / (direction @ image)
            solution, previous = solution + step * direction, residual
            residual = residual - step * image
            direction = residual + residual.square().sum() / previous.square().sum() * direction
            history.append(float(residual.norm() / right.norm()))
            bar.set_postfix_str(f"residual {history[-1]:.2f}")
            bar.update()
    fitted = roots * solution
    total = float(fitted.abs().sum())
    if not 0 < total < float("inf"):
        raise UserError("SCORES_TYPE = 'fitted': the weights are 0 or not finite; set DAMPING_FACTOR to more")
    return fitted / total, history
