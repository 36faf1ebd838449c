"""All that touches kronfluence's insides: factors, preconditioned gradients, and the one pass that scores all tasks.

kronfluence wraps each traced Linear in a module with a mode (what its hooks compute) and a storage (what they
computed). Here the modes are run one after another on token-budget batches:

    covariance -> eigendecomposition -> Lambda      factors, shared by every task of a model
    gradient aggregation, once for each task        grad f_task, (1, out, in)
    stacked, preconditioned                         (F + damping I)^-1 grad f_task, (tasks, out, in)
    pairwise scores over the training data          (tasks, N) in one pass
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.factor.config import FactorConfig
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader, perform_eigendecomposition
from kronfluence.module.tracked_module import ModuleMode, TrackedModule
from kronfluence.module.utils import set_mode
from kronfluence.task import Task
from kronfluence.utils.constants import (
    ACCUMULATED_PRECONDITIONED_GRADIENT_NAME,
    AGGREGATED_GRADIENT_NAME,
    ALL_MODULE_NAME,
    COVARIANCE_FACTOR_NAMES,
    EIGENDECOMPOSITION_FACTOR_NAMES,
    FACTOR_ARGUMENTS_NAME,
    FACTOR_TYPE,
    LAMBDA_FACTOR_NAMES,
    PAIRWISE_SCORE_MATRIX_NAME,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from utils.artifacts import require_finite, to_json, write_atomically
from utils.batching import BatchLoader
from utils.console import UserError, say, shown_path

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


def _configure(model: PreTrainedModel, curvature: Curvature) -> None:
    for module in _traced_modules(model):
        module.update_factor_args(curvature.factor_arguments)
        module.update_score_args(curvature.score_arguments)


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
    # kronfluence's loops still name the gradient scaler by its old import path.
    warnings.filterwarnings("ignore", message=".*GradScaler.*", category=FutureWarning)
    config = FactorConfig.CONFIGS[curvature.strategy]
    arguments, state = curvature.factor_arguments, _OneProcess(model.device)
    write_atomically(folder / f"{FACTOR_ARGUMENTS_NAME}_arguments.json", to_json(arguments.to_dict()))

    def covariances() -> FACTOR_TYPE:
        described = loader.described("covariances")
        return fit_covariance_matrices_with_loader(model, state, task, described, arguments, disable_tqdm=True)[1]

    def eigenbases() -> FACTOR_TYPE:
        found = _load_factors(folder, COVARIANCE_FACTOR_NAMES)
        say(f"   eigendecompositions of {len(_traced_modules(model))} modules")
        try:
            return perform_eigendecomposition(found, model, state, arguments, disable_tqdm=True)
        except torch.linalg.LinAlgError:
            if state.device.type == "cpu":
                raise
            say("   failed on the GPU; trying the CPU")
            return perform_eigendecomposition(
                found, model, _OneProcess(torch.device("cpu")), arguments, disable_tqdm=True
            )

    def lambdas() -> FACTOR_TYPE:
        needs_basis = config.requires_eigendecomposition_for_lambda
        eigen_factors = _load_factors(folder, EIGENDECOMPOSITION_FACTOR_NAMES) if needs_basis else None
        described = loader.described("Lambda")
        return fit_lambda_matrices_with_loader(
            model, state, task, described, arguments, eigen_factors=eigen_factors, disable_tqdm=True
        )[1]

    stages: list[tuple[bool, list[str], Callable[[], FACTOR_TYPE]]] = [
        (config.requires_covariance_matrices, COVARIANCE_FACTOR_NAMES, covariances),
        (config.requires_eigendecomposition, EIGENDECOMPOSITION_FACTOR_NAMES, eigenbases),
        (config.requires_lambda_matrices, LAMBDA_FACTOR_NAMES, lambdas),
    ]
    for needed, names, fit in stages:
        if needed and not all(_factor_file(folder, name).exists() for name in names):
            _save_factors(folder, fit())


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
    """Gradient of the task's measurement, averaged over the loader's examples.

    Args:
        model: traced.

    Returns:
        For each traced module (1, out, in), with the bias as a last column where there is one.
    """
    _configure(model, curvature)
    set_mode(model, ModuleMode.GRADIENT_AGGREGATION, release_memory=True)
    for batch in loader:
        with curvature.autocast(model.device):
            measurement = task.compute_measurement(batch, model)
        measurement.backward()
        model.zero_grad(set_to_none=True)
    gradients = {
        module.name: module.get_factor(AGGREGATED_GRADIENT_NAME) / len(loader.indices)
        for module in _traced_modules(model)
    }
    set_mode(model, ModuleMode.DEFAULT, release_memory=True)
    return gradients


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
    _configure(model, curvature)
    config = FactorConfig.CONFIGS[curvature.strategy]
    names: list[str] = []
    if config.requires_eigendecomposition_for_precondition:
        names += EIGENDECOMPOSITION_FACTOR_NAMES
    if config.requires_lambda_matrices_for_precondition:
        names += LAMBDA_FACTOR_NAMES
    loaded = _load_factors(factors, names)
    set_mode(model, ModuleMode.PRECONDITION_GRADIENT, release_memory=True)
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
    _configure(model, curvature)
    modules = _traced_modules(model)
    set_mode(model, ModuleMode.PAIRWISE_SCORE, release_memory=True)
    for module in modules:
        module.score_args.compute_per_token_scores = per_token
        module.set_factor(ACCUMULATED_PRECONDITIONED_GRADIENT_NAME, preconditioned[module.name])
    num_queries = len(next(iter(preconditioned.values())))
    lengths = torch.tensor([len(sequence.input_ids) for (sequence,) in loader.examples])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    scores = torch.zeros(num_queries, len(loader.examples), dtype=curvature.dtype)
    token_scores = torch.zeros(num_queries, int(offsets[-1]) if per_token else 0, dtype=curvature.dtype)
    for batch in loader:
        with curvature.autocast(model.device):
            loss = task.compute_train_loss(batch, model)
        loss.backward()
        model.zero_grad(set_to_none=True)
        # (queries, B), or (queries, B, T) where tokens are scored
        batch_scores = sum(module.get_factor(PAIRWISE_SCORE_MATRIX_NAME) for module in modules).cpu()
        for module in modules:
            module.accumulate_iterations()
        index = batch["index"].cpu()
        if per_token:
            for row, example in enumerate(index.tolist()):
                begin, end = offsets[example], offsets[example + 1]
                token_scores[:, begin:end] = batch_scores[:, row, : end - begin]
            batch_scores = batch_scores.sum(dim=2)
        scores[:, index] = batch_scores
    set_mode(model, ModuleMode.DEFAULT, release_memory=True)
    return Scores(scores, token_scores, offsets) if per_token else Scores(scores)
