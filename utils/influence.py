"""Factors, preconditioned gradients and scores: all that touches kronfluence's insides.

kronfluence wraps each traced Linear in a module, decomposes covariances, preconditions gradients and names the files.
The sums over examples are our own (utils/gradients.py): they look only at tokens that have a gradient, and work in
passes that share the trunk's output.

    covariance -> eigendecomposition -> Lambda      factors, shared by every task of a model
    gradient of the measurement, for each task      grad f_task, (1, out, in)
    stacked, preconditioned                         (F + damping I)^-1 grad f_task, (tasks, out, in)
    scores of the training data                     (tasks, N) in one pass

The model of every function here may be a tail (utils/trunk.py), if the loader's batches have `trunk_states`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.config import FactorConfig
from kronfluence.factor.eigen import perform_eigendecomposition
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.utils import set_mode
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACCUMULATED_PRECONDITIONED_GRADIENT_NAME,
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    AGGREGATED_GRADIENT_NAME,
    ALL_MODULE_NAME,
    COVARIANCE_FACTOR_NAMES,
    EIGENDECOMPOSITION_FACTOR_NAMES,
    FACTOR_ARGUMENTS_NAME,
    FACTOR_TYPE,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_FACTOR_NAMES,
    LAMBDA_MATRIX_NAME,
    NUM_ACTIVATION_COVARIANCE_PROCESSED,
    NUM_GRADIENT_COVARIANCE_PROCESSED,
    NUM_LAMBDA_PROCESSED,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from utils.artifacts import require_finite, to_json, write_atomically
from utils.batching import Batch, BatchLoader
from utils.console import UserError, progress_bar, say, shown_path
from utils.gradients import (
    active_rows,
    add_gradient,
    add_second_moment,
    add_squared_gradients,
    observing,
    token_scores,
    with_ones,
)

SCORES_NAME = ALL_MODULE_NAME  # the tensor's name in a scores file, as kronfluence has it

Gradients = dict[str, torch.Tensor]  # module name -> (queries, out, in), the bias as a last column


@dataclass(frozen=True)
class Curvature:
    """How the curvature is approximated and in which precision.

    Attributes:
        strategy: "ekfac", "kfac", "diagonal" or "identity".
        damping: added to every eigenvalue before the inverse; None is 0.1 x the mean eigenvalue of a module.
        half_precision: bfloat16 autocast for forward and backward passes; sums stay in `dtype`.
        dtype: of all covariances, gradients and scores.
    """

    strategy: str = "ekfac"
    damping: float | None = None
    half_precision: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def factor_arguments(self) -> FactorArguments:
        """kronfluence's arguments for the factors: every accumulator in `dtype`."""
        return FactorArguments(
            strategy=self.strategy,
            amp_dtype=torch.bfloat16 if self.half_precision else None,
            activation_covariance_dtype=self.dtype,
            gradient_covariance_dtype=self.dtype,
            eigendecomposition_dtype=torch.float64,
            per_sample_gradient_dtype=self.dtype,
            lambda_dtype=self.dtype,
        )

    @property
    def score_arguments(self) -> ScoreArguments:
        """kronfluence's arguments for preconditioning and scores."""
        return ScoreArguments(
            damping_factor=self.damping,
            amp_dtype=torch.bfloat16 if self.half_precision else None,
            per_sample_gradient_dtype=self.dtype,
            precondition_dtype=self.dtype,
            score_dtype=self.dtype,
        )

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The precision of forward passes."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.half_precision)


@dataclass(frozen=True)
class _OneProcess:
    """The part of kronfluence's process state that its loops read; ours is always a single process."""

    device: torch.device
    use_distributed: bool = False
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        """Nothing to wait for."""


def trace(model: PreTrainedModel, task: Task) -> PreTrainedModel:
    """Wrap the task's Linear modules for kronfluence and freeze the model, so that gradients begin at them.

    Everything below the first traced block (the trunk) then runs without a graph.
    """
    return prepare_model(model, task)


def _traced_modules(model: PreTrainedModel) -> list[TrackedModule]:
    return [module for module in model.modules() if isinstance(module, TrackedModule)]


# ---------------------------------------------------------------------------------------------------- factors


def fit_factors(model: PreTrainedModel, task: Task, loader: BatchLoader, curvature: Curvature, folder: Path) -> None:
    """Fit the factors that the strategy needs and save them as kronfluence does; a stage that is there is kept.

    Args:
        model: traced.
        task: gives the sampled-label loss.
        loader: the examples that the factors are fitted on.
        folder: where the files go.

    Raises:
        UserError: a factor is not finite; names the factor and the module.
    """
    config = FactorConfig.CONFIGS[curvature.strategy]
    write_atomically(folder / f"{FACTOR_ARGUMENTS_NAME}_arguments.json", to_json(curvature.factor_arguments.to_dict()))

    def eigenbases() -> FACTOR_TYPE:
        return fit_eigenbases(model, _load_factors(folder, COVARIANCE_FACTOR_NAMES), curvature)

    def lambdas() -> FACTOR_TYPE:
        needs_basis = config.requires_eigendecomposition_for_lambda
        eigenbases = _load_factors(folder, EIGENDECOMPOSITION_FACTOR_NAMES) if needs_basis else None
        return fit_lambdas(model, task, loader.described("Lambda"), curvature, eigenbases)

    stages: list[tuple[bool, list[str], Callable[[], FACTOR_TYPE]]] = [
        (
            config.requires_covariance_matrices,
            COVARIANCE_FACTOR_NAMES,
            lambda: fit_covariances(model, task, loader.described("covariances"), curvature),
        ),
        (config.requires_eigendecomposition, EIGENDECOMPOSITION_FACTOR_NAMES, eigenbases),
        (config.requires_lambda_matrices, LAMBDA_FACTOR_NAMES, lambdas),
    ]
    for needed, names, fit in stages:
        if needed and not all(_factor_file(folder, name).exists() for name in names):
            _save_factors(folder, fit())


def _backward_passes(
    loader: BatchLoader,
    curvature: Curvature,
    model: PreTrainedModel,
    loss_of: Callable[[Batch], torch.Tensor],
    consume: Callable[[Batch, TrackedModule, torch.Tensor, torch.Tensor], None],
) -> None:
    """Forward and backward over every batch; `consume` gets each module's inputs and output gradients."""
    set_mode(model, ModuleMode.DEFAULT, release_memory=True)
    for batch in loader:
        with observing(_traced_modules(model), lambda *seen, batch=batch: consume(batch, *seen)):
            with curvature.autocast(model.device):
                loss = loss_of(batch)
            loss.backward()
        model.zero_grad(set_to_none=True)


def _has_bias(module: TrackedModule) -> bool:
    return module.original_module.bias is not None


def _gradient_shape(module: TrackedModule) -> tuple[int, int]:
    """(out, in), the bias counted as a column."""
    linear = module.original_module
    return linear.out_features, linear.in_features + _has_bias(module)


def _zeros(model: PreTrainedModel, curvature: Curvature, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=curvature.dtype, device=model.device)


def fit_covariances(model: PreTrainedModel, task: Task, loader: BatchLoader, curvature: Curvature) -> FACTOR_TYPE:
    """Sums of a a^T over every token that is not padding, and of g g^T over every token, for each module.

    A = E[a a^T], G = E[g g^T], with labels sampled from the model   (Martens and Grosse 2015)

    Returns:
        kronfluence's four covariance factors: the sums (in, in) and (out, out), and the number of tokens in each.
    """
    modules = _traced_modules(model)
    shapes = {module.name: _gradient_shape(module) for module in modules}
    inputs_total = {name: _zeros(model, curvature, in_size, in_size) for name, (_, in_size) in shapes.items()}
    gradients_total = {name: _zeros(model, curvature, out_size, out_size) for name, (out_size, _) in shapes.items()}
    num_tokens = 0

    def consume(batch: Batch, module: TrackedModule, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        is_token = batch["attention_mask"].bool()
        add_second_moment(inputs_total[module.name], with_ones(inputs[is_token].to(curvature.dtype), _has_bias(module)))
        rows = active_rows(inputs, gradients, _has_bias(module), curvature.dtype)
        add_second_moment(gradients_total[module.name], rows.gradients)

    def loss_of(batch: Batch) -> torch.Tensor:
        nonlocal num_tokens
        num_tokens += int(batch["attention_mask"].sum())
        return task.compute_train_loss(batch, model, sample=True)

    _backward_passes(loader, curvature, model, loss_of, consume)
    count = torch.tensor([num_tokens])
    return {
        ACTIVATION_COVARIANCE_MATRIX_NAME: {name: total.cpu() for name, total in inputs_total.items()},
        GRADIENT_COVARIANCE_MATRIX_NAME: {name: total.cpu() for name, total in gradients_total.items()},
        NUM_ACTIVATION_COVARIANCE_PROCESSED: {name: count.clone() for name in shapes},
        NUM_GRADIENT_COVARIANCE_PROCESSED: {name: count.clone() for name in shapes},
    }


def fit_eigenbases(model: PreTrainedModel, covariances: FACTOR_TYPE, curvature: Curvature) -> FACTOR_TYPE:
    """Eigenvectors and eigenvalues of both covariances of every module, by kronfluence, in float64."""
    arguments, device = curvature.factor_arguments, model.device
    bases: FACTOR_TYPE = {name: {} for name in EIGENDECOMPOSITION_FACTOR_NAMES}
    modules = _traced_modules(model)
    with progress_bar(len(modules), "eigendecompositions", "modules") as bar:
        for module in modules:
            alone = nn.ModuleList([module])
            try:
                found = perform_eigendecomposition(
                    covariances, alone, _OneProcess(device), arguments, disable_tqdm=True
                )
            except torch.linalg.LinAlgError:
                if device.type == "cpu":
                    raise
                say(f"   the eigendecomposition of {module.name} failed on the GPU; trying the CPU")
                device = torch.device("cpu")
                found = perform_eigendecomposition(
                    covariances, alone, _OneProcess(device), arguments, disable_tqdm=True
                )
            for name, by_module in found.items():
                bases[name].update(by_module)
            bar.update()
    return bases


def fit_lambdas(
    model: PreTrainedModel, task: Task, loader: BatchLoader, curvature: Curvature, eigenbases: FACTOR_TYPE | None
) -> FACTOR_TYPE:
    """Sum over examples of the squared gradient in the eigenbasis, for each module; without one, in the standard basis.

    Lambda = E[(Q_G^T grad Q_A)^2], with labels sampled from the model   (George et al. 2018)

    Returns:
        kronfluence's two Lambda factors: the sum (out, in), and the number of examples in it.
    """
    modules = _traced_modules(model)
    totals = {module.name: _zeros(model, curvature, *_gradient_shape(module)) for module in modules}
    bases = {}
    if eigenbases is not None:
        for module in modules:
            sides = (
                eigenbases[side][module.name] for side in (ACTIVATION_EIGENVECTORS_NAME, GRADIENT_EIGENVECTORS_NAME)
            )
            bases[module.name] = [side.to(model.device, curvature.dtype) for side in sides]

    def consume(_: Batch, module: TrackedModule, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        rows = active_rows(inputs, gradients, _has_bias(module), curvature.dtype)
        if module.name in bases:
            q_a, q_g = bases[module.name]
            rows = rows._replace(inputs=rows.inputs @ q_a, gradients=rows.gradients @ q_g)
        add_squared_gradients(totals[module.name], rows)

    _backward_passes(
        loader, curvature, model, lambda batch: task.compute_train_loss(batch, model, sample=True), consume
    )
    return {
        LAMBDA_MATRIX_NAME: {name: total.cpu() for name, total in totals.items()},
        NUM_LAMBDA_PROCESSED: {name: torch.tensor([len(loader.indices)]) for name in totals},
    }


def _factor_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _save_factors(folder: Path, factors: FACTOR_TYPE) -> None:
    for name, by_module in factors.items():
        require_finite(by_module, f"factor {name}")
    for name, by_module in factors.items():
        file = _factor_file(folder, name)
        partial = file.with_name(f"{file.name}.partial")
        save_file({module: tensor.contiguous() for module, tensor in by_module.items()}, partial)
        partial.replace(file)


def _load_factors(folder: Path, names: list[str]) -> FACTOR_TYPE:
    """Read factors of a folder.

    Raises:
        UserError: a file is missing, truncated or not finite.
    """
    remedy = f"delete {shown_path(folder)} and run compute_factors_and_scores.py again"
    factors = {}
    for name in names:
        file = _factor_file(folder, name)
        try:
            factors[name] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{shown_path(file)} cannot be read ({error}); {remedy}") from None
        require_finite(factors[name], f"{shown_path(file)} ({remedy})")
    return factors


def factor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of all factors in a folder, for its manifest."""
    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            shapes.update({f"{file.stem}/{module}": stored.get_slice(module).get_shape() for module in stored.keys()})  # noqa: SIM118
    return shapes


# --------------------------------------------------------------------------------------------------- gradients


def mean_measurement_gradient(
    model: PreTrainedModel, task: Task, loader: BatchLoader, curvature: Curvature
) -> Gradients:
    """Gradient of the task's measurement, the weighted sum over the loader's sequences.

    Args:
        model: traced.

    Returns:
        For each traced module (1, out, in), with the bias as a last column where there is one.
    """
    totals = {module.name: _zeros(model, curvature, *_gradient_shape(module)) for module in _traced_modules(model)}

    def consume(_: Batch, module: TrackedModule, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        add_gradient(totals[module.name], active_rows(inputs, gradients, _has_bias(module), curvature.dtype))

    _backward_passes(loader, curvature, model, lambda batch: task.compute_measurement(batch, model), consume)
    return {name: total.unsqueeze(0) for name, total in totals.items()}


def precondition(model: PreTrainedModel, gradients: Gradients, curvature: Curvature, factors: Path) -> Gradients:
    """(F + damping I)^-1 applied to gradients, module by module.

    For EKFAC: Q_G ((Q_G^T V Q_A) / (Lambda + damping)) Q_A^T   (George et al. 2018; Grosse et al. 2023, eq. 21)

    Args:
        model: traced.
        gradients: (queries, out, in) for each module; several queries are preconditioned at once.
        factors: folder of the factors.

    Returns:
        Tensors of the same shapes.

    Raises:
        UserError: the factors do not belong to these modules.
    """
    config = FactorConfig.CONFIGS[curvature.strategy]
    names: list[str] = []
    if config.requires_eigendecomposition_for_precondition:
        names += EIGENDECOMPOSITION_FACTOR_NAMES
    if config.requires_lambda_matrices_for_precondition:
        names += LAMBDA_FACTOR_NAMES
    loaded = _load_factors(factors, names)
    set_mode(model, ModuleMode.PRECONDITION_GRADIENT, release_memory=True)
    for module in _traced_modules(model):
        module.update_factor_args(curvature.factor_arguments)
        module.update_score_args(curvature.score_arguments)
    preconditioned = {}
    for module in _traced_modules(model):
        for name in names:
            if module.name not in loaded[name]:
                raise UserError(
                    f"{factors} has no {name} for module {module.name}; run compute_factors_and_scores.py first"
                )
            module.set_factor(name, loaded[name][module.name].clone())
        module.prepare_storage(model.device)
        module.set_factor(AGGREGATED_GRADIENT_NAME, gradients[module.name].to(model.device))
        module.finalize_all_iterations()
        preconditioned[module.name] = module.get_factor(ACCUMULATED_PRECONDITIONED_GRADIENT_NAME)
        for name in (*EIGENDECOMPOSITION_FACTOR_NAMES, *LAMBDA_FACTOR_NAMES):  # KFAC makes a Lambda of its own
            module.release_factor(name)
    set_mode(model, ModuleMode.DEFAULT, release_memory=True)
    return preconditioned


# ------------------------------------------------------------------------------------------------------ scores


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
    model: PreTrainedModel,
    task: Task,
    loader: BatchLoader,
    preconditioned: Gradients,
    curvature: Curvature,
    per_token: bool = False,
) -> Scores:
    """Influence of every training example on every query, in one pass over the training data.

    s_i = grad f^T (F + damping I)^-1 grad L(z_i)   (Koh and Liang 2017; Grosse et al. 2023, eq. 5)

    Args:
        model: traced.
        task: gives the training loss L, which no trust task changes.
        loader: the training examples.
        preconditioned: (queries, out, in) for each module, one query for each trust task.
        per_token: also split each score over the tokens of the example.
    """
    num_queries = len(next(iter(preconditioned.values())))
    lengths = torch.tensor([len(sequence.input_ids) for sequence in loader.sequences])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    scores = _zeros(model, curvature, num_queries, len(loader.sequences))
    of_tokens = torch.zeros(num_queries, int(offsets[-1]) if per_token else 0, dtype=curvature.dtype)

    def consume(batch: Batch, module: TrackedModule, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        rows = active_rows(inputs, gradients, _has_bias(module), curvature.dtype)
        of_rows = token_scores(preconditioned[module.name], rows)  # (queries, n)
        row, position = rows.is_active.nonzero(as_tuple=True)
        example = batch["index"][row]
        scores.index_add_(1, example, of_rows)
        if per_token:
            of_tokens.index_add_(1, offsets[example.cpu()] + position.cpu(), of_rows.cpu())

    _backward_passes(loader, curvature, model, lambda batch: task.compute_train_loss(batch, model), consume)
    return Scores(scores.cpu(), of_tokens, offsets) if per_token else Scores(scores.cpu())
