"""Checks of tensors before they are written and after they are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from utils.console import UserError

Shapes = Mapping[str, tuple[int | None, ...]]  # of tensors by name, None where any size will do


def require_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Check tensors for NaN and infinity.

    Raises:
        UserError: names the source and the first tensor that is not finite.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        is_finite = torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float())  # not known of 8 bits
        if not is_finite.all():
            count = int((~is_finite).sum())
            raise UserError(
                f"{source}: tensor {name!r} has {count} values that are NaN or infinite of {tensor.numel()}"
            )


def require_shapes(
    tensors: Mapping[str, torch.Tensor], shapes: Shapes, source: str, remedy: str, counts: Collection[str] = ()
) -> None:
    """Check that tensors are the ones that were once written, whatever their manifest says.

    Args:
        shapes: every tensor by name, with None where any size will do.
        counts: names of those that are whole numbers; the others are float32 or float64.

    Raises:
        UserError: names the source and what is there and what must be.
    """
    if tensors.keys() != shapes.keys():
        there, needed = (f"{len(names)} ({', '.join(sorted(names)) or 'none'})" for names in (tensors, shapes))
        raise UserError(
            f"{source} has other tensors than it must have: {there:.300} in place of {needed:.300}; {remedy}"
        )
    for name, shape in shapes.items():
        tensor, kinds = tensors[name], [torch.int64] if name in counts else [torch.float32, torch.float64]
        fits = len(tensor.shape) == len(shape) and all(
            needed in (None, size) for size, needed in zip(tensor.shape, shape, strict=True)
        )
        if not fits or tensor.dtype not in kinds:
            needed = " x ".join("any" if size is None else str(size) for size in shape)
            there = " x ".join(map(str, tensor.shape)) or "a single number"
            raise UserError(
                f"{source}: tensor {name!r} is {there} of {str(tensor.dtype).removeprefix('torch.')}, and must be "
                f"{needed} of {' or '.join(str(kind).removeprefix('torch.') for kind in kinds)}; {remedy}"
            )
