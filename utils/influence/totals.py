"""Sums over the batches of a pass, and over the processes that share them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from utils.processes import all_reduce


class Totals:
    """A sum over all batches for each Linear.

    Each batch's own sum comes in the curvature's precision; they are added in float64, so that the order of the
    batches does not show in the result, and so neither does the number of processes. With float32 it would: its
    rounding turns the eigenvectors of close eigenvalues.

    Args:
        shapes: of the sums, by name.
        dtype: of the result.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self._totals = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}
        self._dtype = dtype

    def add(self, name: str, of_batch: torch.Tensor, row: int | None = None) -> None:
        """Add a batch's sum, to one row of the whole if so said."""
        total = self._totals[name]
        (total if row is None else total[row]).add_(of_batch)

    def over_processes(self) -> dict[str, torch.Tensor]:
        """The sums over all batches of all processes; the end of a pass, which every process comes to."""
        results = {}
        for name in list(self._totals):
            total = self._totals.pop(name)  # freed before the next one is converted
            all_reduce(total)
            results[name] = total.to(self._dtype)
        return results
