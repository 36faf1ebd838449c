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

from utils.console import UserError
from utils.influence.conjugate_gradient import conjugate_gradients
from utils.influence.traced_model import Gradients


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

    def product(coefficients: Gradients) -> Gradients:
        with torch.enable_grad():
            scores = gradient_scores(roots * coefficients["weights"].flatten())
        return {"weights": (scores.double() / roots)[None, None]}

    right = {"weights": (weights.double() / roots)[None, None]}  # (1, 1, N), a query with a single row
    tolerance = torch.finfo(torch.float32).eps
    solution = conjugate_gradients(product, right, lambda vectors: vectors, num_iterations, tolerance, verify=False)
    fitted = roots * solution.vectors["weights"].flatten()
    total = float(fitted.abs().sum())
    if not 0 < total < float("inf"):
        raise UserError("SCORES_TYPE = 'fitted': the weights are 0 or not finite; set DAMPING_FACTOR to more")
    return fitted / total, [after[0] for after in solution.residuals[1:]]
