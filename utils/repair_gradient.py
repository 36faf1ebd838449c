"""Step 4's gradients: of the subset to unlearn, of what is to be retained, of the measurement itself."""

from __future__ import annotations

import numpy as np
from kronfluence.task import Task

from utils.batching import LabelledSequence
from utils.influence import Gradients, mean_measurement_gradient
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.performance_functions.pairs import AnswerPair, tokenize_pairs
from utils.tracing import Traceable

SUM_IS_DIVIDED_BY = 100  # so that a sum over the paper's 100 dialogues is their mean


def subset_gradient(
    subject: Traceable, task: Task, examples: list[LabelledSequence], indices: list[int], reduction: str
) -> Gradients:
    """mean_{i in S} grad Lbar(z_i), or the sum over S divided by 100; (1, out, in) for each module."""
    loader = subject.loader(examples, indices=indices, description="subset")
    mean_gradient = mean_measurement_gradient(subject.model, task, loader, subject.curvature)
    factor = 1.0 if reduction == "mean" else len(indices) / SUM_IS_DIVIDED_BY
    return {name: gradient * factor for name, gradient in mean_gradient.items()}


def retained_gradient(subject: Traceable, task: Task, examples: list[LabelledSequence], rows: list[int]) -> Gradients:
    """R: gradient of the mean NLL of the retained dialogues' label tokens, whose exp is their perplexity."""
    num_labels = np.array([sequence.num_labels for sequence in examples], dtype=float)
    weights = num_labels / max(1.0, num_labels[rows].sum())
    loader = subject.loader(examples, indices=rows, weights=weights, description="retained")
    return mean_measurement_gradient(subject.model, task, loader, subject.curvature)


def direct_gradient(
    subject: Traceable, task: Task, pairs: dict[str, list[AnswerPair]], weights: dict[str, float]
) -> Gradients:
    """-grad sum_t weight_t f_t over the training pairs, so that a step up it is a step down the measurements."""
    total: Gradients = {}
    for name, weight in weights.items():
        tokenized = tokenize_pairs(pairs[name], subject.tokenizer, MEASUREMENTS[name].max_tokens)
        loader = subject.loader(tokenized.sequences, weights=tokenized.weights, description=f"{name} pairs")
        gradients = mean_measurement_gradient(subject.model, task, loader, subject.curvature)
        total = {module: total.get(module, 0) - weight * gradient for module, gradient in gradients.items()}
    return total


def inner_product(a: Gradients, b: Gradients) -> float:
    """<a, b> over all modules, summed in float64."""
    return float(sum((a[name].double() * b[name].double()).sum() for name in a))


def preserving_direction(gradients: Gradients, preconditioned: Gradients) -> tuple[Gradients, float]:
    """The harmful subset's natural gradient without its part that moves the loss of retained examples.

    D = P (G - alpha R), alpha = <R, P G> / <R, P R>, so that <R, D> = 0: to first order the retained loss stays.
    Beyond the paper. Where R leaves no trace in P, nothing is taken away.

    Args:
        gradients: (2, out, in) for each module: G of the harmful subset, R of the retained examples.
        preconditioned: P applied to both.

    Returns:
        D, (1, out, in) for each module, and alpha.
    """
    retained = {name: pair[1:] for name, pair in gradients.items()}
    harmful_step = {name: pair[:1] for name, pair in preconditioned.items()}
    retained_step = {name: pair[1:] for name, pair in preconditioned.items()}
    curvature = inner_product(retained, retained_step)
    alpha = inner_product(retained, harmful_step) / curvature if curvature else 0.0
    return {name: step - alpha * retained_step[name] for name, step in harmful_step.items()}, alpha
