"""The files of the curvature factors, under kronfluence's names: one for each factor, with a tensor for each module."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from kronfluence.utils.constants import FACTOR_TYPE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from utils.console import UserError, shown_path
from utils.files import remove, written_whole
from utils.manifests import STAGING_MARKER
from utils.processes import first_process_only
from utils.tensors import require_finite


def factor_file(folder: Path, name: str) -> Path:
    """Where a factor is stored."""
    return folder / f"{name}.safetensors"


@first_process_only
def are_saved(folder: Path, names: list[str], modules: Collection[str]) -> bool:
    """Whether all of these factors are in a folder, in files that are whole and have a tensor for each module."""
    return all(_modules_in(factor_file(folder, name)) == set(modules) for name in names)


def _modules_in(file: Path) -> set[str]:
    """The modules that a file of factors has tensors for; none if it is missing or not whole."""
    try:
        with safe_open(file, framework="pt") as stored:
            return set(stored.keys())
    except (SafetensorError, OSError):
        return set()


@first_process_only
def remove_strays(folder: Path, names: Sequence[str]) -> None:
    """Remove from a staging folder whatever is no file of these factors."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {STAGING_MARKER, *(factor_file(folder, name).name for name in names)}
    for path in folder.iterdir():
        if path.name not in known:
            remove(path)


@first_process_only
def save_factors(folder: Path, factors: FACTOR_TYPE) -> None:
    """Write factors, each file under a temporary name first.

    Raises:
        UserError: a factor is not finite; then nothing is written.
    """
    for name, by_module in factors.items():
        require_finite(by_module, f"factor {name}")
    for name, by_module in factors.items():
        with written_whole(factor_file(folder, name)) as partial:
            save_file({module: tensor.contiguous() for module, tensor in by_module.items()}, partial)


def load_factors(folder: Path, names: list[str]) -> FACTOR_TYPE:
    """Read factors of a folder by their kronfluence names; each maps modules to tensors.

    Raises:
        UserError: a file is missing, truncated or not finite.
    """
    remedy = f"delete {shown_path(folder)} and run compute_factors_and_scores.py again"
    factors = {}
    for name in names:
        file = factor_file(folder, name)
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
