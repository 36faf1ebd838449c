"""Conjugate gradients on the damped Gauss-Newton system, preconditioned by the curvature factors.

    (G + D) x = grad f,    D = the factors' damping of each module times I

EKFAC treats modules as independent of each other and each as a Kronecker product in its eigenbasis; the system has
neither approximation, and the factors' inverse (F + D)^-1 serves as the preconditioner (Martens 2010, section 4.7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from utils.console import progress_bar
from utils.influence.traced_model import Gradients
from utils.processes import first_process_only
from utils.tensors import require_finite

SMALLEST_NORM = 1e-300  # in place of 0, whose solution is 0


class Solution(NamedTuple):
    """The solutions of several systems with one matrix.

    Attributes:
        vectors: x, (queries, ...) by name.
        residuals: |b - A x| / |b| of each query after every iteration, the first for x = 0, as the recursion has them.
        final_residuals: the same at the end, from one more product: rounding makes the two differ.
    """

    vectors: Gradients
    residuals: list[list[float]]
    final_residuals: list[float]

    def of_query(self, query: int) -> list[float]:
        """One query's residuals after every iteration; in place of the last, the one that was computed anew."""
        return [*(after[query] for after in self.residuals[:-1]), self.final_residuals[query]]


def inner_products(a: Gradients, b: Gradients) -> torch.Tensor:
    """<a_q, b_q> of each query over all modules, (queries,) float64."""
    return sum((a[name].double() * b[name].double()).flatten(1).sum(dim=1) for name in a)


def _norms(vectors: Gradients) -> torch.Tensor:
    return inner_products(vectors, vectors).sqrt()


def _add(a: Gradients, factors: torch.Tensor, b: Gradients) -> Gradients:
    """a_q + factor_q b_q for each query."""
    scaled = {name: factors.to(v)[:, None, None] * v for name, v in b.items()}
    return {name: a[name] + scaled[name] for name in a}


@torch.no_grad()
def conjugate_gradients(
    product: Callable[[Gradients], Gradients],
    right_sides: Gradients,
    precondition: Callable[[Gradients], Gradients],
    max_iterations: int,
    tolerance: float,
) -> Solution:
    """Solve A x = b for several b at once, A symmetric and positive definite (Hestenes and Stiefel 1952).

    A query whose residual is small enough rests, while the others go on; all stop after `max_iterations`.

    Args:
        product: A applied to (queries, out, in) for each module.
        right_sides: b, likewise.
        precondition: an approximate inverse of A, symmetric and positive definite as well.
        tolerance: of |b - A x| / |b|.

    Raises:
        UserError: a residual is not finite.
    """
    norms = _norms(right_sides).clamp(min=SMALLEST_NORM)
    zeros = torch.zeros_like(norms)
    x = {name: torch.zeros_like(b) for name, b in right_sides.items()}
    residual, history = right_sides, [(_norms(right_sides) / norms).tolist()]

    @first_process_only  # where machines round differently, one of them decides for all
    def goes_on() -> bool:
        require_finite({"residual": torch.tensor(history[-1])}, "conjugate gradients (set DAMPING_FACTOR to more)")
        return max(history[-1]) > tolerance and len(history) <= max_iterations

    direction = preconditioned = precondition(residual)
    decrease = inner_products(residual, preconditioned)
    with progress_bar(max_iterations, "conjugate gradients", "iterations") as bar:
        while goes_on():
            rests = torch.tensor(history[-1], device=norms.device) <= tolerance
            image = product(direction)
            step = torch.where(rests, zeros, decrease / inner_products(direction, image))
            x, residual = _add(x, step, direction), _add(residual, -step, image)
            history.append((_norms(residual) / norms).tolist())
            preconditioned, previous = precondition(residual), decrease
            decrease = inner_products(residual, preconditioned)
            direction = _add(preconditioned, torch.where(rests, zeros, decrease / previous), direction)
            bar.set_postfix_str(f"residual {max(history[-1]):.1e}")
            bar.update()
    remainder = _add(right_sides, -torch.ones_like(norms), product(x))
    return Solution(x, history, (_norms(remainder) / norms).tolist())
