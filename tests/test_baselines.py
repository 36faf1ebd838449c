"""Unlearning and preference baselines against plain training of the whole model, one unpadded sequence at a time."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import OWN_LOGITS, make_model

from utils import baselines, processes
from utils.baselines import BaselineData, dpo_losses, npo_losses, trained_change
from utils.console import UserError
from utils.influence.traced_model import Curvature, TracedModel, traced_linears
from utils.influence.training import Minibatches, TrainedLinears
from utils.methods import TRAINED
from utils.models import load_model, load_tokenizer
from utils.performance_functions import losses
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import sequence_nll
from utils.trunk import Trunk

CPU = torch.device("cpu")
STEPS, RATE, BETA = 3, 1e-3, 0.1
LOSSES = [name for name in TRAINED if name != "npo_random"]  # whose loss is that of npo


def make_traced(folder, dtype: torch.dtype = torch.float64, num_blocks: int = 1) -> tuple[torch.nn.Module, TracedModel]:
    """The whole model and its traced form. AdamW divides by the gradient's size, rounding noise included: float64."""
    model = load_model(str(folder), CPU).to(dtype)
    linears = traced_linears(model, "auto", num_blocks)
    trunk = Trunk(model, "auto", num_blocks)
    tokenizer = load_tokenizer(str(folder), model)
    return model, TracedModel(trunk.tail, linears, Curvature(dtype=dtype), tokenizer, 400, trunk)


@pytest.fixture(params=["pythia", "qwen"])
def subject(request, tiny_models):
    return make_traced(tiny_models[request.param])


@pytest.fixture
def data(tiny_models, small_data) -> BaselineData:
    """Dialogues of many lengths, two of them without a label; half of another one's tokens count."""
    sequences = tokenize_dialogues(
        load_dialogues(str(small_data / "hh"), "train"), load_tokenizer(str(tiny_models["pythia"]))
    )
    for row in (3, 9):  # of the subset and of the retained ones
        sequences[row] = replace(sequences[row], label_start=len(sequences[row].input_ids))
    stretch = sequences[8].label_end - sequences[8].label_start
    sequences[8] = replace(sequences[8], is_counted=np.arange(stretch) % 2 == 0)
    weights = np.linspace(1, 3, 7)
    return BaselineData(sequences[:6], sequences[6:16], sequences[20:27], sequences[30:37], weights / weights.sum())


# -- the same, plainly -------------------------------------------------------------------------------------------------


def log_softmaxes(model, sequence) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, vocabulary) at the positions that predict a label, and the labels (n,)."""
    tokens = torch.tensor(sequence.input_ids[None].astype("int64"))
    positions = np.arange(sequence.label_start, sequence.label_end)
    if sequence.is_counted is not None:
        positions = positions[sequence.is_counted]
    return torch.log_softmax(model(tokens).logits[0], dim=-1)[positions - 1], tokens[0, positions]


def log_probabilities(model, sequence) -> torch.Tensor:
    distributions, labels = log_softmaxes(model, sequence)
    return distributions[torch.arange(len(labels)), labels]


def mean_loss(model, sequences) -> torch.Tensor:
    token_nll = [-log_probabilities(model, sequence) for sequence in sequences]
    return sum(nll.sum() / max(1, len(nll)) for nll in token_nll) / len(sequences)


def plain_loss(name: str, model, reference, data: BaselineData) -> torch.Tensor:
    def ratio(sequence) -> torch.Tensor:
        return (log_probabilities(model, sequence) - log_probabilities(reference, sequence)).sum()

    if name == "ga_kl":
        total, count = 0.0, 0
        for sequence in data.retained:
            (now, _), (before, _) = log_softmaxes(model, sequence), log_softmaxes(reference, sequence)
            total, count = total + (before.exp() * (before - now)).sum(), count + len(now)
        return total / count - mean_loss(model, data.subset)
    if name == "npo":
        by_dialogue = [2 / BETA * torch.log(1 + ratio(sequence).exp() ** BETA) for sequence in data.subset]
        return sum(by_dialogue) / len(by_dialogue) + mean_loss(model, data.retained)
    if name == "dpo":
        margins = [BETA * (ratio(c) - ratio(r)) for c, r in zip(data.chosen, data.rejected, strict=True)]
        return -sum(w * torch.log(torch.sigmoid(m)) for w, m in zip(data.weights, margins, strict=True))
    if name == "sft_retained":
        return mean_loss(model, data.retained)
    if name == "sft_pairs":
        return sum(w * mean_loss(model, [c]) for w, c in zip(data.weights, data.chosen, strict=True))
    return mean_loss(model, data.subset)


def plain_change(name: str, model, names, data: BaselineData) -> dict[str, torch.Tensor]:
    """AdamW on the last Linears of a copy of the whole model, whose other weights stay."""
    model, reference = copy.deepcopy(model), model
    linears = {name: model.get_submodule(name) for name in names}
    parameters = [parameter for linear in linears.values() for parameter in linear.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        plain_loss(name, model, reference, data).backward()
        optimizer.step()
    changes = {}
    for module, linear in linears.items():
        before = reference.get_submodule(module)
        change = (linear.weight - before.weight).detach()
        if linear.bias is not None:
            change = torch.cat([change, (linear.bias - before.bias).detach()[:, None]], dim=1)
        changes[module] = -change[None] if name == "task_vector" else change[None]
    return changes


def relative_difference(ours, plain) -> float:
    apart = sum((ours[name] - plain[name]).square().sum() for name in plain)
    return float((apart / sum(change.square().sum() for change in plain.values())).sqrt())


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_untouched(model, before) -> bool:
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return same and not any(p.requires_grad or p.grad is not None for p in model.parameters()) and not model.training


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_baseline_is_plain_training(name, subject, data):
    model, traced = subject
    before = state(model)
    ours = trained_change(name, traced, data, STEPS, RATE, seed=0)
    plain = plain_change(name, model, traced.linears, data)
    assert {n: t.shape[1:] for n, t in ours.items()} == traced.gradient_shapes()
    assert relative_difference(ours, plain) < 1e-4
    assert is_untouched(model, before)


def test_without_a_trunk_the_training_is_the_same(tiny_models, data):
    model, traced = make_traced(tiny_models["qwen"])
    cached = trained_change("npo", traced, data, STEPS, RATE, seed=0)
    whole = trained_change("npo", replace(traced, model=model, trunk=None), data, STEPS, RATE, seed=0)
    assert relative_difference(whole, cached) < 1e-6


@pytest.mark.parametrize("own", ["gemma2", "cohere"])
def test_the_divergence_is_that_of_the_models_own_logits(own, tmp_path, data, monkeypatch):
    """Chunks of a few positions, of models that cap or scale their logits."""
    config, more = OWN_LOGITS[own]
    model, traced = make_traced(make_model(tmp_path, config, **more))
    monkeypatch.setattr(losses, "LOGIT_BYTES_ON_CPU", 1 << 16)
    ours = trained_change("ga_kl", traced, data, STEPS, RATE, seed=0)
    assert relative_difference(ours, plain_change("ga_kl", model, traced.linears, data)) < 1e-4


@pytest.mark.parametrize("name", LOSSES)
def test_padding_and_the_token_budget_do_not_matter(name, subject, data):
    _, traced = subject
    alone, together = (
        trained_change(name, replace(traced, tokens_per_batch=budget), data, STEPS, RATE, seed=0)
        for budget in (1, 20_000)
    )
    assert relative_difference(alone, together) < 1e-4


def test_a_round_of_minibatches_is_the_whole_weighted_sum(subject, data):
    _, traced = subject
    weights = np.arange(1.0, 48.0)
    items = [(data.retained[i % 10], data.subset[i % 6]) for i in range(47)]
    minibatches = Minibatches(traced, items, 16, seed=1, weights=weights)
    total, sizes = np.zeros(94), []
    for step in range(3):
        sizes.append(0)
        for batch in minibatches.of_step(step):
            rows = batch["index"].numpy()
            assert (rows[::2] % 2 == 0).all()
            assert (rows[1::2] == rows[::2] + 1).all()
            assert len(rows) == 2 or batch["input_ids"].numel() <= traced.tokens_per_batch
            total[rows] += batch["weight"].numpy() / 3
            sizes[-1] += len(rows) // 2
    assert sizes == [16, 16, 15]
    assert total == pytest.approx(np.repeat(weights, 2))
    first, fourth = ([b["index"].tolist() for b in minibatches.of_step(step)] for step in (0, 3))
    assert first == fourth


def test_minibatches_train_like_the_plain_loss_of_each(tiny_models, data):
    """One step on the 10 of 20 pairs that the seed puts first, with twice their weights: there are two minibatches."""
    model, traced = make_traced(tiny_models["qwen"])
    sequences = (data.subset + data.retained)[4:16]
    many = replace(data, chosen=sequences + sequences[:8], rejected=sequences[::-1] + sequences[4:])
    many = replace(many, weights=np.arange(1.0, 21.0) / 210)
    minibatches = Minibatches(traced, [(c,) for c in many.chosen], 16, seed=5)
    rows = [row for batch in minibatches.of_step(0) for row in batch["index"].tolist()]
    assert len(rows) == 10
    first = replace(
        many,
        chosen=[many.chosen[row] for row in rows],
        rejected=[many.rejected[row] for row in rows],
        weights=2 * many.weights[rows],
    )
    ours = trained_change("dpo", traced, many, 1, RATE, seed=5)
    plain = trained_change("dpo", traced, first, 1, RATE, seed=0)
    assert relative_difference(ours, plain) < 1e-6


def test_the_trunk_runs_once_for_each_sequence(subject, data, monkeypatch):
    _, traced = subject
    trunk, computed = traced.trunk, []
    original = trunk.states
    monkeypatch.setattr(trunk, "states", lambda batch: (computed.extend(batch["index"].tolist()), original(batch))[1])
    free = trunk.free_bytes
    trained_change("dpo", traced, data, 4, RATE, seed=0)
    assert sorted(computed) == list(range(14))
    assert trunk.free_bytes == free, "the cache is released"


def test_the_reference_is_computed_once_for_each_batch(subject, data, monkeypatch):
    _, traced = subject
    with_gradients = []

    def counted(model, batch):
        with_gradients.append(torch.is_grad_enabled())
        return sequence_nll(model, batch)

    monkeypatch.setattr(baselines, "sequence_nll", counted)
    trained_change("dpo", traced, data, 4, RATE, seed=0)
    assert with_gradients.count(True) == 4 * with_gradients.count(False)


def test_dpo_begins_at_log_2(subject, data, monkeypatch):
    _, traced = subject
    seen = []
    original = baselines.dpo_losses
    monkeypatch.setattr(baselines, "dpo_losses", lambda *ratios: (seen.append(original(*ratios)), seen[-1])[1])
    trained_change("dpo", traced, data, 1, RATE, seed=0)
    assert torch.cat(seen).tolist() == pytest.approx([math.log(2)] * 7, abs=1e-12)
    assert dpo_losses(torch.tensor([2.0]), torch.tensor([-1.0]), 0.5).item() == pytest.approx(
        math.log(1 + math.exp(-1.5))
    )


def test_npo_tends_to_gradient_ascent_as_beta_goes_to_0(subject, data):
    model, traced = subject
    rows = next(Minibatches(traced, [(s,) for s in data.subset], 32, seed=0).of_step(0))
    trained = TrainedLinears(traced)
    with trained.training(), torch.no_grad():
        for parameter in trained.parameters:  # away from the reference, where all beta agree
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        with trained.as_reference():
            reference = sequence_nll(traced.model, rows).total

        def gradient(loss_of) -> torch.Tensor:
            with torch.enable_grad():
                loss = loss_of(reference - sequence_nll(traced.model, rows).total).mean()
                return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained.parameters)])

        ascent = gradient(lambda ratios: ratios)
        for beta, low, high in ((1e-4, 0.9999, 1.01), (5.0, -1.0, 0.99)):
            cosine = torch.cosine_similarity(gradient(lambda ratios, b=beta: npo_losses(ratios, b)), ascent, dim=0)
            assert low < float(cosine) < high
        apart = gradient(lambda ratios: npo_losses(ratios, 1e-4)) - ascent
        assert apart.norm() < 0.02 * ascent.norm(), "not in direction alone"


@pytest.mark.parametrize("name", LOSSES)
def test_a_seed_gives_the_same_change(name, tiny_models, data):
    _, traced = make_traced(tiny_models["pythia"], torch.float32)
    many = replace(data, subset=data.subset * 6, chosen=data.chosen * 3, rejected=data.rejected * 3)
    many = replace(many, retained=data.retained * 3, weights=np.tile(data.weights, 3) / 3)
    first, second, other = (trained_change(name, traced, many, 2, RATE, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[module], second[module]) for module in first)
    assert not all(torch.equal(first[module], other[module]) for module in first)


@pytest.mark.parametrize("name", LOSSES)
def test_each_of_several_processes_does_all_of_it(name, subject, data, monkeypatch):
    _, traced = subject
    alone = trained_change(name, traced, data, STEPS, RATE, seed=0)
    monkeypatch.setattr(processes, "_world", processes._World(rank=1, size=3))  # no group: a collective would fail
    of_three = trained_change(name, traced, data, STEPS, RATE, seed=0)
    assert all(torch.equal(alone[module], of_three[module]) for module in alone)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_goes_the_same_way(name, tiny_models, data):
    """bfloat16 in forward and backward passes, weights and their changes in float32."""
    _, traced = make_traced(tiny_models["qwen"], torch.float32)
    full = trained_change(name, traced, data, STEPS, RATE, seed=0)
    half = replace(traced, curvature=Curvature(half_precision=True))
    ours = trained_change(name, half, data, STEPS, RATE, seed=0)
    assert all(change.dtype == torch.float32 for change in ours.values())
    flat = [torch.cat([changes[module].flatten() for module in full]) for changes in (full, ours)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.8


def test_two_blocks_are_trained(tiny_models, data):
    model, traced = make_traced(tiny_models["qwen"], num_blocks=2)
    ours = trained_change("ga_kl", traced, data, STEPS, RATE, seed=0)
    assert relative_difference(ours, plain_change("ga_kl", model, traced.linears, data)) < 1e-4


def test_a_step_goes_where_its_loss_falls(subject, data):
    """Up the loss of the subset, down that of trustworthy answers and retained dialogues, by what is returned."""
    model, traced = subject
    for name, sequences, sign in (
        ("ga_kl", data.subset, 1),
        ("npo", data.subset, 1),
        ("sft_retained", data.retained, -1),
        ("task_vector", data.subset, 1),
        ("sft_pairs", data.chosen, -1),
    ):
        changes = trained_change(name, traced, data, STEPS, RATE, seed=0)
        moved = copy.deepcopy(model)
        for module, change in changes.items():
            linear = moved.get_submodule(module)
            linear.weight += change[0, :, : linear.in_features]
            if linear.bias is not None:
                linear.bias += change[0, :, -1]
        with torch.no_grad():
            assert sign * (mean_loss(moved, sequences) - mean_loss(model, sequences)) > 0, name


def test_a_loss_that_is_not_finite_is_an_error_and_the_model_is_as_before(subject, data):
    model, traced = subject
    before = state(model)
    with pytest.raises(UserError, match=r"SCORES_TYPE = 'ga_kl': the loss is .* BASELINE_STEPS = 9; .* BASELINE_RATE"):
        trained_change("ga_kl", traced, data, 9, 1e300, seed=0)
    assert is_untouched(model, before)


def test_after_any_error_the_model_is_as_before(subject, data, monkeypatch):
    model, traced = subject
    before = state(model)
    calls = []

    def fails(*arguments) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return npo_losses(*arguments)

    monkeypatch.setattr(baselines, "npo_losses", fails)
    with pytest.raises(KeyboardInterrupt):
        trained_change("npo", replace(traced, tokens_per_batch=20_000), data, 9, RATE, seed=0)
    assert is_untouched(model, before)


def test_nothing_to_train_on_is_an_error(subject, data):
    model, traced = subject
    before = state(model)
    with pytest.raises(UserError, match="SCORES_TYPE"):
        trained_change("npo", traced, replace(data, retained=[]), 1, RATE, seed=0)
    with pytest.raises(ValueError, match="no baseline 'nop'"):
        trained_change("nop", traced, data, 1, RATE, seed=0)
    assert is_untouched(model, before)
