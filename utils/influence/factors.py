"""Curvature factors of a model: fitted on training dialogues with sampled labels, in kronfluence's file format.

    covariances -> eigendecompositions -> Lambda      shared by every task of a model

The passes and their sums are our own: they look only at tokens that have a gradient, and share the trunk's output.
kronfluence decomposes the covariances and names the files. Of several processes each sums over its share of the
examples and decomposes its share of the modules; counts are those of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from kronfluence.arguments import FactorArguments
from kronfluence.factor.eigen import perform_eigendecomposition
from kronfluence.module.linear import TrackedLinear
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    ACTIVATION_EIGENVALUES_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    COVARIANCE_FACTOR_NAMES,
    EIGENDECOMPOSITION_FACTOR_NAMES,
    FACTOR_ARGUMENTS_NAME,
    FACTOR_TYPE,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    GRADIENT_EIGENVALUES_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_FACTOR_NAMES,
    LAMBDA_MATRIX_NAME,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
    NUM_LAMBDA_PROCESSED,
)
from torch import nn

from utils.batching import Batch, BatchLoader
from utils.console import say
from utils.files import to_json, write_whole
from utils.influence.factor_files import are_saved, load_factors, remove_strays, save_factors
from utils.influence.token_gradients import append_ones, second_moment, summed_squared_gradients
from utils.influence.traced_model import Curvature, TracedModel
from utils.processes import all_reduce, iterate_share


@dataclass(frozen=True)
class _SingleProcess:
    """The part of kronfluence's process state that its eigendecomposition reads."""

    device: torch.device
    is_main_process: bool = True


def factor_arguments(curvature: Curvature) -> FactorArguments:
    """kronfluence's arguments for these factors, stored beside them."""
    return FactorArguments(
        strategy=curvature.strategy,
        amp_dtype=torch.bfloat16 if curvature.half_precision else None,
        activation_covariance_dtype=curvature.dtype,
        gradient_covariance_dtype=curvature.dtype,
        eigendecomposition_dtype=torch.float64,
        per_sample_gradient_dtype=curvature.dtype,
        lambda_dtype=curvature.dtype,
    )


def fit_factors(traced: TracedModel, task: Task, loader: BatchLoader, folder: Path) -> None:
    """Fit the factors that the strategy needs, stage by stage; a stage whose files are there is not fitted again.

    Args:
        task: gives the loss on sampled labels.
        loader: the examples that the factors are fitted on.
        folder: where the files go.

    Raises:
        UserError: a factor is not finite; names the factor and the module.
    """
    curvature = traced.curvature
    arguments = factor_arguments(curvature).to_dict()
    remove_strays(folder, [*COVARIANCE_FACTOR_NAMES, *EIGENDECOMPOSITION_FACTOR_NAMES, *LAMBDA_FACTOR_NAMES])
    write_whole(folder / f"{FACTOR_ARGUMENTS_NAME}_arguments.json", to_json(arguments))
    if curvature.has_eigenbasis:
        if not are_saved(folder, COVARIANCE_FACTOR_NAMES, traced.linears):
            save_factors(folder, fit_covariances(traced, task, loader.described("covariances")))
        if not are_saved(folder, EIGENDECOMPOSITION_FACTOR_NAMES, traced.linears):
            save_factors(folder, fit_eigenbases(traced, load_factors(folder, COVARIANCE_FACTOR_NAMES)))
    if curvature.has_lambda and not are_saved(folder, LAMBDA_FACTOR_NAMES, traced.linears):
        eigenbases = load_factors(folder, EIGENDECOMPOSITION_FACTOR_NAMES) if curvature.has_eigenbasis else None
        save_factors(folder, fit_lambdas(traced, task, loader.described("Lambda"), eigenbases))


def fit_covariances(traced: TracedModel, task: Task, loader: BatchLoader) -> FACTOR_TYPE:
    """Sums of a a^T over every token that is not padding, and of g g^T over every token, for each module.

    A = E[a a^T], G = E[g g^T], with labels sampled from the model   (Martens and Grosse 2015)

    Returns:
        kronfluence's four covariance factors: the sums (in, in) and (out, out), and the number of tokens in each.
    """
    shapes = traced.gradient_shapes()
    input_sums = traced.totals({name: (in_size, in_size) for name, (_, in_size) in shapes.items()})
    gradient_sums = traced.totals({name: (out_size, out_size) for name, (out_size, _) in shapes.items()})
    num_tokens = torch.zeros(1, dtype=torch.int64)

    def add_moments(batch: Batch, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        is_token = batch["attention_mask"].bool()
        tokens = inputs[is_token].to(traced.curvature.dtype)
        input_sums.add(name, second_moment(append_ones(tokens, traced.has_bias(name))))
        gradient_sums.add(name, second_moment(traced.active_rows(name, inputs, gradients).gradients))

    def loss_of(batch: Batch) -> torch.Tensor:
        num_tokens.add_(batch["attention_mask"].sum().cpu())
        return task.compute_train_loss(batch, traced.model, sample=True)

    traced.backward_passes(loader, loss_of, add_moments)
    all_reduce(num_tokens)
    return {
        ACTIVATION_COVARIANCE_MATRIX_NAME: {name: total.cpu() for name, total in input_sums.over_processes().items()},
        GRADIENT_COVARIANCE_MATRIX_NAME: {name: total.cpu() for name, total in gradient_sums.over_processes().items()},
        NUM_ACTIVATION_COVARIANCE_PROCESSED: {name: num_tokens.clone() for name in shapes},
        NUM_GRADIENT_COVARIANCE_PROCESSED: {name: num_tokens.clone() for name in shapes},
    }


def fit_eigenbases(traced: TracedModel, covariances: FACTOR_TYPE) -> FACTOR_TYPE:
    """Eigenvectors and eigenvalues of both covariances of every module, by kronfluence, in float64."""
    arguments = factor_arguments(traced.curvature)
    eigenbases: FACTOR_TYPE = {}
    for covariance, eigenvectors, eigenvalues in (
        (ACTIVATION_COVARIANCE_MATRIX_NAME, ACTIVATION_EIGENVECTORS_NAME, ACTIVATION_EIGENVALUES_NAME),
        (GRADIENT_COVARIANCE_MATRIX_NAME, GRADIENT_EIGENVECTORS_NAME, GRADIENT_EIGENVALUES_NAME),
    ):
        eigenbases[eigenvectors] = {name: torch.zeros_like(matrix) for name, matrix in covariances[covariance].items()}
        eigenbases[eigenvalues] = {
            name: torch.zeros_like(matrix[0]) for name, matrix in covariances[covariance].items()
        }

    def decompose(name: str, linear: nn.Linear, device: torch.device) -> FACTOR_TYPE:
        module = nn.ModuleList([TrackedLinear(name, linear)])
        return perform_eigendecomposition(covariances, module, _SingleProcess(device), arguments, disable_tqdm=True)

    names, ones = list(traced.linears), [1] * len(traced.linears)
    costs = [out_size**3 + in_size**3 for out_size, in_size in traced.gradient_shapes().values()]
    for name in iterate_share(names, costs, ones, "eigendecompositions", "modules"):
        linear = traced.linears[name]
        try:
            of_module = decompose(name, linear, traced.model.device)
        except torch.linalg.LinAlgError:
            if traced.model.device.type == "cpu":
                raise
            say(f"   the eigendecomposition of {name} failed on the GPU; trying the CPU")
            of_module = decompose(name, linear, torch.device("cpu"))
        for factor, by_module in of_module.items():
            eigenbases[factor][name].copy_(by_module[name])
    all_reduce(*(tensor for by_module in eigenbases.values() for tensor in by_module.values()))
    return eigenbases


def fit_lambdas(traced: TracedModel, task: Task, loader: BatchLoader, eigenbases: FACTOR_TYPE | None) -> FACTOR_TYPE:
    """Sum over examples of the squared gradient in the eigenbasis, for each module; without one, in the standard basis.

    Lambda = E[(Q_G^T grad Q_A)^2], with labels sampled from the model   (George et al. 2018)

    Returns:
        kronfluence's two Lambda factors: the sum (out, in), and the number of examples in it.
    """
    shapes = traced.gradient_shapes()
    totals = traced.totals(shapes)
    sides = (ACTIVATION_EIGENVECTORS_NAME, GRADIENT_EIGENVECTORS_NAME)
    like = traced.zeros(0)
    bases = {name: [eigenbases[side][name].to(like) for side in sides] for name in shapes if eigenbases}

    def add_squares(_: Batch, name: str, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        rows = traced.active_rows(name, inputs, gradients)
        if eigenbases:
            q_a, q_g = bases[name]
            rows = rows._replace(inputs=rows.inputs @ q_a, gradients=rows.gradients @ q_g)
        totals.add(name, summed_squared_gradients(rows))

    def loss_of(batch: Batch) -> torch.Tensor:
        return task.compute_train_loss(batch, traced.model, sample=True)

    traced.backward_passes(loader, loss_of, add_squares)
    return {
        LAMBDA_MATRIX_NAME: {name: total.cpu() for name, total in totals.over_processes().items()},
        NUM_LAMBDA_PROCESSED: {name: torch.tensor([len(loader.indices)]) for name in shapes},
    }
