"""Unlearning and preference baselines: published losses, by which the traced Linears alone are trained.

    ga_kl        up the loss of the subset, while the model's distribution on retained dialogues stays
    npo          negative preference optimization of the subset, with the loss of retained dialogues
    dpo          direct preference optimization of the training pairs' answers
    sft_pairs    fine-tuning on the pairs' trustworthy answers
    task_vector  minus what fine-tuning on the subset changes

and two controls of npo:

    npo_random   the same with a random subset, which shows what tracing adds
    sft_retained fine-tuning on the same retained dialogues alone, its second term

Each ends in a change of weights, which step 5 scales within a perplexity budget like any repair gradient. All that is
below the traced blocks is constant: it runs once for each sequence, as long as memory allows (utils/trunk.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from utils.batching import IGNORED_LABEL, Batch, LabelledSequence
from utils.console import UserError, progress_bar
from utils.forward import output_logits
from utils.influence.traced_model import Gradients, TracedModel
from utils.influence.training import Minibatches, TrainedLinears
from utils.methods import TRAINED
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.losses import SequenceNLL, label_hidden_states, logit_chunks, sequence_nll
from utils.performance_functions.pairs import tokenize_pairs
from utils.repair_sources import RepairSources

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BETA = 0.1  # of DPO (the default of Rafailov et al. 2023) and NPO (Zhang et al. 2024)
SUBSET_SIZE = 32  # dialogues to unlearn in a minibatch, at most
OTHERS_SIZE = 16  # retained dialogues, or pairs, in a minibatch, at most


@dataclass(frozen=True)
class BaselineData:
    """What the baselines are trained on.

    Attributes:
        subset: K dialogues to unlearn.
        retained: other training dialogues.
        chosen: the trustworthy answer of each of P training pairs, after its prompt.
        rejected: the untrustworthy answers, in the same order.
        weights: (P,) of the pairs; they sum to 1, and are 1 / P for a single task.
    """

    subset: list[LabelledSequence]
    retained: list[LabelledSequence]
    chosen: list[LabelledSequence]
    rejected: list[LabelledSequence]
    weights: np.ndarray


def baseline_data(traced: TracedModel, examples: list[LabelledSequence], sources: RepairSources) -> BaselineData:
    """What the baselines are trained on, from what a repair is computed from.

    The pairs of several measurements count by their weights, each measurement's alike.
    """
    chosen, rejected, weights, total = [], [], [], sum(sources.measurements.values())
    for name, weight in sources.measurements.items():
        if name in sources.pairs:
            pairs = tokenize_pairs(sources.pairs[name], traced.tokenizer, MEASUREMENTS[name].max_tokens)
            chosen += [pairs.sequences[position] for position in pairs.chosen]
            rejected += [pairs.sequences[position] for position in pairs.rejected]
            weights += [weight / total / len(pairs.chosen)] * len(pairs.chosen)
    subset, retained = ([examples[row] for row in rows] for rows in (sources.indices, sources.retained))
    return BaselineData(subset, retained, chosen, rejected, np.array(weights))


# -- losses ------------------------------------------------------------------------------------------------------------


def npo_losses(log_ratios: torch.Tensor, beta: float = BETA) -> torch.Tensor:
    """Negative preference optimization (Zhang et al. 2024): (2 / beta) log(1 + (pi / pi_ref)^beta).

    As beta goes to 0, its gradient becomes that of log pi, which is gradient ascent on the NLL.

    Args:
        log_ratios: (B,) log pi(y | x) - log pi_ref(y | x) of whole completions y, in nats.

    Returns:
        (B,).
    """
    return 2 / beta * F.softplus(beta * log_ratios)


def dpo_losses(chosen: torch.Tensor, rejected: torch.Tensor, beta: float = BETA) -> torch.Tensor:
    """Direct preference optimization (Rafailov et al. 2023, equation 7): -log sigmoid(beta (chosen - rejected)).

    Args:
        chosen: (P,) log pi(y | x) - log pi_ref(y | x) of the chosen answers, in nats.
        rejected: (P,) the same of the rejected answers.

    Returns:
        (P,), log 2 where pi is pi_ref.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def divergences_from(model: PreTrainedModel, reference: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """KL(p_reference || p) at each position: what keeps normal text as it is in Yao et al. (2023).

    The gradient is computed with the value, while the logits of a chunk of positions are in memory.

    Args:
        reference: (n, hidden size) the reference model's states, ready for the output embedding, which both share.
        states: (n, hidden size) those of the model in training.

    Returns:
        (n,) nats, differentiable in `states`.
    """

    at_least_float32 = torch.promote_types(states.dtype, torch.float32)
    value, gradient = states.new_empty(len(states), dtype=at_least_float32), torch.empty_like(states)
    for chunk in logit_chunks(states, model.get_output_embeddings().weight):
        inputs = states[chunk].detach().requires_grad_()
        before, now = (output_logits(model, s).to(at_least_float32).log_softmax(1) for s in (reference[chunk], inputs))
        divergences = F.kl_div(now, before, log_target=True, reduction="none").sum(dim=1)
        (gradient[chunk],) = torch.autograd.grad(divergences.sum(), inputs)
        value[chunk] = divergences.detach()
    return value + (gradient * (states - states.detach())).sum(dim=1)  # adds 0, whose gradient is `gradient`


# -- the baselines -----------------------------------------------------------------------------------------------------


class Term(NamedTuple):
    """A part of a baseline's loss: its minibatches, and what each of their batches adds to it."""

    minibatches: Minibatches
    loss_of: Callable[[Batch], torch.Tensor]


def loss_terms(name: str, trained: TrainedLinears, data: BaselineData, seed: int) -> list[Term]:
    """The loss of a baseline, as a sum of terms.

    Lbar is the mean NLL of a dialogue's label tokens, S the subset, R the retained dialogues, theta_0 the weights at
    the beginning; the ratios of `npo_losses` and `dpo_losses` are to the model with theta_0.

        ga_kl        -mean_S Lbar + KL(p_theta_0 || p_theta), the mean over all label tokens of R   (Yao et al. 2023;
                     KL minimization of TOFU, Maini et al. 2024)
        npo          mean_S npo_losses + mean_R Lbar             (Zhang et al. 2024, with their retain loss)
        dpo          sum_p w_p dpo_losses                        (Rafailov et al. 2023)
        sft_pairs    sum_p w_p Lbar(chosen_p)
        task_vector  mean_S Lbar, whose change is negated later  (Ilharco et al. 2023)
        sft_retained mean_R Lbar
    """
    traced = trained.traced
    model, autocast, device = traced.model, traced.curvature.autocast, traced.model.device
    reference_totals: dict[tuple[int, ...], torch.Tensor] = {}  # by the rows of a batch, each computed once

    def nll(batch: Batch) -> SequenceNLL:
        with autocast(device):
            return sequence_nll(model, batch)

    def log_ratios(batch: Batch) -> torch.Tensor:
        rows = tuple(batch["index"].tolist())
        if rows not in reference_totals:
            with trained.as_reference():
                reference_totals[rows] = nll(batch).total
        return reference_totals[rows] - nll(batch).total  # (B,) log pi - log pi_ref

    def mean_nll(batch: Batch) -> torch.Tensor:
        return (batch["weight"] * nll(batch).mean).sum()

    def ascent(batch: Batch) -> torch.Tensor:
        return -mean_nll(batch)

    def npo(batch: Batch) -> torch.Tensor:
        return (batch["weight"] * npo_losses(log_ratios(batch))).sum()

    def dpo(batch: Batch) -> torch.Tensor:
        chosen, rejected = log_ratios(batch).unflatten(0, (-1, 2)).unbind(dim=1)
        return (batch["weight"][::2] * dpo_losses(chosen, rejected)).sum()

    def divergence(batch: Batch) -> torch.Tensor:
        is_label = batch["labels"][:, 1:] != IGNORED_LABEL
        with trained.as_reference(), autocast(device):
            reference, rows = label_hidden_states(model, batch, is_label)
        with autocast(device):  # another context: within one, casts of the reference's weights could be found again
            states, _ = label_hidden_states(model, batch, is_label)
            return (batch["weight"][rows] * divergences_from(model, reference, states)).sum()

    def dialogues(sequences: list[LabelledSequence], size: int, weights: np.ndarray | None = None) -> Minibatches:
        return Minibatches(traced, [(sequence,) for sequence in sequences], size, seed, weights)

    if name == "dpo":
        pairs = list(zip(data.chosen, data.rejected, strict=True))
        return [Term(Minibatches(traced, pairs, OTHERS_SIZE, seed, data.weights), dpo)]
    if name == "sft_pairs":
        return [Term(dialogues(data.chosen, OTHERS_SIZE, data.weights), mean_nll)]
    if name == "sft_retained":
        return [Term(dialogues(data.retained, OTHERS_SIZE), mean_nll)]
    subset = dialogues(data.subset, SUBSET_SIZE)
    if name == "task_vector":
        return [Term(subset, mean_nll)]
    if name in ("npo", "npo_random"):
        return [Term(subset, npo), Term(dialogues(data.retained, OTHERS_SIZE), mean_nll)]
    if name == "ga_kl":
        num_labels = sum(sequence.num_labels for sequence in data.retained)
        by_token = np.full(len(data.retained), 1 / max(1, num_labels))
        return [Term(subset, ascent), Term(dialogues(data.retained, OTHERS_SIZE, by_token), divergence)]
    raise ValueError(f"no baseline {name!r}; there are {', '.join(TRAINED)}")


def trained_change(
    name: str, traced: TracedModel, data: BaselineData, num_steps: int, learning_rate: float, seed: int
) -> Gradients:
    """theta_T - theta_0 after T steps of AdamW on a baseline's loss, and its negative for "task_vector".

    AdamW (Loshchilov and Hutter 2019) with PyTorch's defaults, without weight decay, at a constant learning rate. The
    model is the same before and afterwards, also after an error. Several processes each do the whole of it.

    Args:
        name: one of TRAINED.
        seed: of the order of minibatches.

    Returns:
        (1, out, in), or (1, out, in + 1) with the bias last, for each traced Linear.

    Raises:
        UserError: the loss is not finite, or there is nothing to train on.
    """
    trained = TrainedLinears(traced)
    before, terms = trained.weights(), loss_terms(name, trained, data, seed)
    try:
        with trained.training(), progress_bar(num_steps, name, "steps") as bar:
            optimizer = torch.optim.AdamW(trained.parameters, lr=learning_rate, weight_decay=0.0)
            for step in range(num_steps):
                optimizer.zero_grad()
                total = traced.zeros()
                for term in terms:
                    for batch in term.minibatches.of_step(step):
                        loss = term.loss_of(batch)
                        loss.backward()
                        total += loss.detach()
                if not total.isfinite():
                    raise UserError(
                        f"SCORES_TYPE = {name!r}: the loss is {float(total)} at step {step + 1} of BASELINE_STEPS = "
                        f"{num_steps}; choose a smaller BASELINE_RATE than {learning_rate:g}, or fewer steps"
                    )
                optimizer.step()
                bar.set_postfix_str(f"loss {float(total):.3f}", refresh=False)
                bar.update()
            after = trained.weights()
    finally:
        for term in terms:
            term.minibatches.release()
    sign = -1 if name == "task_vector" else 1
    return {module: (sign * (after[module] - before[module])).to(traced.curvature.dtype) for module in before}
