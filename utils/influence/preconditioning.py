"""Preconditioning: the inverse of the damped curvature, by the factors, applied to gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
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

from utils.console import UserError, shown_path
from utils.folder_artifacts import FolderArtifact
from utils.influence.factor_files import factor_file, load_factors
from utils.influence.traced_model import Curvature, Gradients, TracedModel
from utils.locks import locked
from utils.paths import STEP_1
from utils.tensors import require_shapes

LARGEST_NORM_ERROR = 1e-2  # of an eigenvector, whose norm is 1


class _Inverse(NamedTuple):
    """One module's part of a preconditioner: reciprocal damped eigenvalues (out, in), their basis if any, damping."""

    reciprocals: torch.Tensor
    gradient_basis: torch.Tensor | None
    activation_basis: torch.Tensor | None
    damping: float


class Preconditioner:
    """(F + damping I)^-1 applied to gradients, module by module; several queries at once.

    EKFAC:    Q_G ((Q_G^T V Q_A) / (Lambda + damping)) Q_A^T   (George et al. 2018; Grosse et al. 2023, eq. 21)
    KFAC:     the same with the outer product of the covariances' eigenvalues in place of Lambda
    diagonal: V / (Lambda + damping), Lambda in the standard basis
    identity: V

    Args:
        folder: of the factors.
        shapes: (out, in) of each module's gradient.

    Raises:
        UserError: the factors are broken, or do not belong to these modules; or the damping is too small for them.
    """

    def __init__(self, curvature: Curvature, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._inverses: dict[str, _Inverse] = {}
        if curvature.strategy == "identity":
            return
        names = EIGENDECOMPOSITION_FACTOR_NAMES * curvature.has_eigenbasis + LAMBDA_FACTOR_NAMES * curvature.has_lambda
        factors = load_factors(folder, names)
        require_factors(factors, shapes, folder)
        for module in shapes:
            self._inverses[module] = _invert({name: factors[name].pop(module) for name in names}, curvature, module)

    @torch.no_grad()
    def __call__(self, gradients: Gradients) -> Gradients:
        """The preconditioned gradients.

        Args:
            gradients: V, (queries, out, in) for each module.

        Returns:
            Tensors of the same shapes.
        """
        preconditioned = dict(gradients)
        for module, inverse in self._inverses.items():
            v = gradients[module]
            reciprocals = inverse.reciprocals.to(v)
            if inverse.activation_basis is None:
                preconditioned[module] = v * reciprocals
            else:
                q_a, q_g = inverse.activation_basis.to(v), inverse.gradient_basis.to(v)
                preconditioned[module] = q_g @ ((q_g.T @ (v @ q_a) * reciprocals) @ q_a.T)
        return preconditioned

    @property
    def dampings(self) -> dict[str, float]:
        """What was added to the eigenvalues of each module; nothing for "identity"."""
        return {module: inverse.damping for module, inverse in self._inverses.items()}


def _invert(factor: Mapping[str, torch.Tensor], curvature: Curvature, module: str) -> _Inverse:
    """The inverse of one module's damped curvature, from its factors by kronfluence's names."""
    if curvature.has_lambda:
        eigenvalues = factor[LAMBDA_MATRIX_NAME].double() / factor[NUM_LAMBDA_PROCESSED]  # (out, in)
    else:
        sides = (factor[name].double() for name in (GRADIENT_EIGENVALUES_NAME, ACTIVATION_EIGENVALUES_NAME))
        eigenvalues = torch.outer(*sides)  # (out, in)
    damping = float(HEURISTIC_DAMPING_SCALE * eigenvalues.mean()) if curvature.damping is None else curvature.damping
    require_invertible(eigenvalues + damping, curvature, module)
    reciprocals = (eigenvalues + damping).reciprocal().to(curvature.dtype)
    bases = (factor.get(name) for name in (GRADIENT_EIGENVECTORS_NAME, ACTIVATION_EIGENVECTORS_NAME))
    return _Inverse(reciprocals, *bases, damping)


def load_preconditioner(factors: FolderArtifact, traced: TracedModel) -> Preconditioner:
    """The preconditioner of a traced model, from factors that no other run replaces meanwhile.

    Raises:
        UserError: another run has replaced them by factors of other settings, or as `Preconditioner`.
    """
    with locked(factors.path, to_read=True):
        factors.require()
        return Preconditioner(traced.curvature, factors.path, traced.gradient_shapes())


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
