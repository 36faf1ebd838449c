"""Gradients of Linear layers, for single examples and single tokens, from their inputs and output gradients.

For a Linear with input a_t and output gradient g_t at token t, the gradient of example i is G_i = sum_t g_t [a_t, 1]^T.
Most tokens contribute nothing: in the last block only those that predict a label have an output gradient (the inputs of
queries, keys and values aside). So every formula here works on the rows (tokens) whose gradient is not zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn


class TokenRows(NamedTuple):
    """The tokens of a batch at which one Linear has a gradient.

    Attributes:
        inputs: (n, in), or (n, in + 1) with ones as the last column where the Linear has a bias.
        gradients: (n, out) gradients with respect to the Linear's output.
        is_active: (B, T) which tokens they are, in order.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    is_active: torch.Tensor

    @property
    def counts(self) -> list[int]:
        """Number of rows of each of the B examples."""
        return self.is_active.sum(dim=1).tolist()


@contextlib.contextmanager
def hook_linears(
    linears: Mapping[str, nn.Linear], on_gradient: Callable[[str, torch.Tensor, torch.Tensor], None]
) -> Iterator[None]:
    """Within this context, every backward pass calls `on_gradient(name, inputs, output_gradients)` for each Linear.

    Inputs are (B, T, in), output gradients (B, T, out). The model's weights may be frozen: gradients begin at the
    first of these Linears, and nothing below them is part of the graph.
    """

    def on_forward(name: str, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        if not output.requires_grad:
            output = output + output.new_zeros(1).requires_grad_()  # not a leaf, so models may change it in place
        output.register_hook(lambda gradient: on_gradient(name, inputs.detach(), gradient))
        return output

    handles = [
        linear.register_forward_hook(lambda _, inputs, output, name=name: on_forward(name, inputs[0], output))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def append_ones(inputs: torch.Tensor, has_bias: bool) -> torch.Tensor:
    """Rows (n, in) with a last column of ones, (n, in + 1), where there is a bias for them to multiply."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1) if has_bias else inputs


def active_rows(inputs: torch.Tensor, output_gradients: torch.Tensor, has_bias: bool, dtype: torch.dtype) -> TokenRows:
    """The tokens whose output gradient is not zero.

    Args:
        inputs: (B, T, in).
        output_gradients: (B, T, out).
        dtype: of the rows.
    """
    is_active = output_gradients.any(dim=2)
    inputs = append_ones(inputs[is_active].to(dtype), has_bias)
    return TokenRows(inputs, output_gradients[is_active].to(dtype), is_active)


def second_moment(rows: torch.Tensor) -> torch.Tensor:
    """sum_t x_t x_t^T for rows (n, d), (d, d)."""
    return rows.T @ rows


def summed_gradient(rows: TokenRows) -> torch.Tensor:
    """sum_t g_t a_t^T: the gradient of all examples together, (out, in)."""
    return rows.gradients.T @ rows.inputs


def summed_squared_gradients(rows: TokenRows) -> torch.Tensor:
    """sum_i G_i^2 elementwise, (out, in), one example's gradient at a time.

    In the eigenbasis G_i' = Q_G^T G_i Q_A is sum_t (Q_G^T g_t) (Q_A^T a_t)^T, so the caller rotates the rows first:
    that takes n (in^2 + out^2) operations for n tokens, and rotating a gradient takes in out (in + out).
    """
    total = rows.inputs.new_zeros(rows.gradients.shape[1], rows.inputs.shape[1])
    gradient = torch.empty_like(total)
    for gradients, inputs in zip(rows.gradients.split(rows.counts), rows.inputs.split(rows.counts), strict=True):
        torch.mm(gradients.T, inputs, out=gradient)
        total.addcmul_(gradient, gradient)
    return total


def row_scores(queries: torch.Tensor, rows: TokenRows) -> torch.Tensor:
    """g_t^T V_q a_t for every query gradient V_q and row: the row's share of the inner product <V_q, G_i>.

    Args:
        queries: (queries, out, in).

    Returns:
        (queries, n).
    """
    num_queries, out_features, in_features = queries.shape
    if out_features < in_features:
        projected = rows.inputs @ queries.flatten(0, 1).T  # (n, queries * out)
        return torch.einsum("nqo,no->qn", projected.unflatten(1, (num_queries, out_features)), rows.gradients)
    projected = rows.gradients @ queries.transpose(0, 1).flatten(1)  # (n, queries * in)
    return torch.einsum("nqi,ni->qn", projected.unflatten(1, (num_queries, in_features)), rows.inputs)
