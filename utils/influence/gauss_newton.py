"""Products with the Gauss-Newton matrix of the training loss, and derivatives along a direction in the weights.

    G = 1/N sum_i J_i^T H_i J_i      J = d logits / d theta, H = diag(p) - p p^T at every label   (Schraudolph 2002)

For cross-entropy G is the Fisher matrix with its expectation over the labels taken exactly, where the factors sample
one label (Martens 2020, section 9). J v is one forward pass in forward mode, J^T u one backward pass, both of the tail
alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils.batching import Batch, BatchLoader, LabelledSequence
from utils.console import UserError, remedy_for
from utils.forward import LogitMap, logit_map
from utils.influence.token_gradients import append_ones, hook_linears, summed_gradient
from utils.influence.traced_model import Gradients, TracedModel
from utils.performance_functions.losses import fisher_positions, label_hidden_states, logit_chunks


@contextlib.contextmanager
def _tangents(traced: TracedModel, direction: Gradients) -> Iterator[None]:
    """Within this context, a forward pass carries its derivative along a direction in the weights of the Linears.

    A Linear's output W a has the derivative W da + dW a; torch's forward mode has the first, a hook adds the second.

    Args:
        direction: (1, out, in) for each Linear, the bias as a last column.
    """

    def on_forward(name: str, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        primal = forward_ad.unpack_dual(inputs).primal
        tangent = append_ones(primal.flatten(0, -2), traced.has_bias(name)) @ direction[name][0].T
        return output + forward_ad.make_dual(torch.zeros_like(tangent), tangent).reshape(output.shape)

    handles = [
        linear.register_forward_hook(lambda _, inputs, output, name=name: on_forward(name, inputs[0], output))
        for name, linear in traced.linears.items()
    ]
    try:
        # Fused attention has no forward mode.
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for handle in handles:
            handle.remove()


def hidden_tangents(
    traced: TracedModel, batch: Batch, predicts_label: torch.Tensor, directions: Gradients
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict a label, and their derivatives along directions in the weights.

    Args:
        predicts_label: (B, T - 1) bool, as for `label_hidden_states`.
        directions: (queries, out, in) for each Linear.

    Returns:
        (n, hidden size) and (queries, n, hidden size).
    """
    tangents = []
    for query in range(len(next(iter(directions.values())))):
        one = {name: of_module[query : query + 1] for name, of_module in directions.items()}
        with _tangents(traced, one), traced.curvature.autocast(traced.model.device):
            hidden, _ = label_hidden_states(traced.model, batch, predicts_label)
            primal, tangent = forward_ad.unpack_dual(hidden)
        tangents.append(torch.zeros_like(primal) if tangent is None else tangent)
    return primal, torch.stack(tangents)


def require_forward_mode(traced: TracedModel, examples: Sequence[LabelledSequence]) -> None:
    """Check on one short example, before hours of work, that the traced blocks have derivatives in forward mode.

    Raises:
        UserError: something in the model has none.
    """
    shortest = min(examples, key=lambda example: len(example.input_ids))
    batch = traced.loader([shortest]).collate([0])  # every process makes it: iterating would give it to one
    directions = {name: traced.zeros(1, *shape) for name, shape in traced.gradient_shapes().items()}
    try:
        hidden_tangents(traced, batch, fisher_positions(batch, all_positions=True), directions)
    except (NotImplementedError, RuntimeError) as error:
        if remedy_for(error):  # out of memory
            raise
        raise UserError(
            f"{traced.model.config.name_or_path}: model type {traced.model.config.model_type!r} has no derivative in "
            f"forward mode; set FACTOR_STRATEGY to 'ekfac' and COMPUTE_PER_TOKEN_SCORES to False ({error})"
        ) from error


def times_loss_curvature(
    embedding: nn.Linear, mapping: LogitMap, hidden: torch.Tensor, tangents: torch.Tensor
) -> torch.Tensor:
    """W^T S H S W applied to tangents of hidden states: the curvature of the cross-entropy of each token.

    H = diag(p) - p p^T, S the slope of the logits in W h. No label occurs in it.

    Args:
        hidden: (n, hidden size).
        tangents: (queries, n, hidden size).

    Returns:
        (queries, n, hidden size).
    """
    result = torch.empty_like(tangents)
    at_least_float32 = torch.promote_types(hidden.dtype, torch.float32)
    for rows in logit_chunks(hidden, embedding.weight):
        logits = mapping.apply(embedding(hidden[rows]).to(at_least_float32))  # (rows, vocabulary)
        slope, probabilities = mapping.slope(logits), logits.softmax(dim=1)
        for query, tangent in enumerate(tangents):
            change = slope * F.linear(tangent[rows], embedding.weight).to(at_least_float32)  # of the logits
            change -= (probabilities * change).sum(dim=1, keepdim=True)
            result[query, rows] = ((slope * probabilities * change).to(embedding.weight.dtype) @ embedding.weight).to(
                result.dtype
            )
    return result


@torch.enable_grad()  # solvers run without
def gauss_newton_product(
    traced: TracedModel, loader: BatchLoader, vectors: Gradients, all_positions: bool = False
) -> Gradients:
    """G v for several v, in one pass over the loader's examples.

    Args:
        vectors: (queries, out, in) for each Linear.
        all_positions: as for `sampled_label_loss`.

    Returns:
        Tensors of the same shapes. The order of the examples and their batches do not show, up to rounding.
    """
    totals = traced.totals({name: tuple(v.shape) for name, v in vectors.items()})
    embedding, mapping = traced.model.get_output_embeddings(), logit_map(traced.model.config)
    query = 0  # whose backward pass it is

    def add(name: str, *tokens: torch.Tensor) -> None:
        rows = traced.active_rows(name, *(part.reshape(1, -1, part.shape[-1]) for part in tokens))
        totals.add(name, summed_gradient(rows), query)

    for batch in loader:
        predicts_label = fisher_positions(batch, all_positions)
        hidden, tangents = hidden_tangents(traced, batch, predicts_label, vectors)
        with torch.no_grad(), traced.curvature.autocast(traced.model.device):
            cotangents = times_loss_curvature(embedding, mapping, hidden, tangents)
        with hook_linears(traced.linears, add):
            with traced.curvature.autocast(traced.model.device):
                hidden, _ = label_hidden_states(traced.model, batch, predicts_label)
            for query, cotangent in enumerate(cotangents):
                hidden.backward(cotangent, retain_graph=query + 1 < len(cotangents))
    return {name: total / len(loader.indices) for name, total in totals.over_processes().items()}
