"""The model cut in two: the tail on kept hidden states against the whole model, whatever the batches and the memory."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import Workspace

from utils import trunk as trunk_module
from utils.batching import BatchLoader
from utils.forward import last_hidden_state
from utils.models import load_model, load_tokenizer
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import sequence_nll
from utils.trunk import HiddenStateCache, Trunk

CPU = torch.device("cpu")


@pytest.fixture(params=["pythia", "qwen"])
def subject(request, tiny_models, small_data):
    folder = str(tiny_models[request.param])
    sequences = tokenize_dialogues(load_dialogues(str(small_data / "hh"), "train"), load_tokenizer(folder))
    return load_model(folder, CPU), sequences


def difference(trunk: Trunk, states: HiddenStateCache, model: torch.nn.Module, loader: BatchLoader) -> float:
    """Largest relative difference between the tail's and the whole model's label losses."""
    worst = 0.0
    with torch.no_grad():
        for batch in loader:
            ours = sequence_nll(trunk.tail, states.add_to(batch)).total
            plain = sequence_nll(model, batch).total
            worst = max(worst, float(((ours - plain).abs() / plain).max()))
    return worst


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_tail_equals_the_whole_model(subject, num_blocks):
    model, sequences = subject
    trunk = Trunk(model, "auto", num_blocks)
    states = HiddenStateCache(trunk)
    for budget in (400, 1_000, 400):  # the third pass finds what the first one kept
        assert difference(trunk, states, model, BatchLoader(sequences, budget, pad_token_id=0)) < 1e-5
    assert len(trunk.tail.base_model.get_submodule("layers")) == num_blocks
    assert len(model.base_model.get_submodule("layers")) == 3


def test_tail_shares_the_models_weights(subject):
    model, sequences = subject
    trunk = Trunk(model, "auto", 1)
    states, loader = HiddenStateCache(trunk), BatchLoader(sequences[:10], 500, pad_token_id=0)
    assert difference(trunk, states, model, loader) < 1e-5
    with torch.no_grad():
        before = sequence_nll(model, next(iter(loader))).total
        for parameter in model.base_model.get_submodule("layers")[-1].parameters():
            parameter.add_(0.05)
        assert not torch.allclose(before, sequence_nll(model, next(iter(loader))).total)
    assert difference(trunk, states, model, loader) < 1e-5


def test_states_are_computed_once_for_a_batch_that_comes_again(subject, monkeypatch):
    model, sequences = subject
    trunk, computed = Trunk(model, "auto", 1), []
    original = trunk.states
    monkeypatch.setattr(trunk, "states", lambda batch: (computed.append(len(batch["index"])), original(batch))[1])
    states = HiddenStateCache(trunk)
    some = BatchLoader(sequences, 500, pad_token_id=0, indices=range(0, 60, 3))
    for loader, total in ((some, 20), (some, 20), (BatchLoader(sequences, 900, pad_token_id=0), 80)):
        assert difference(trunk, states, model, loader) < 1e-5
        assert sum(computed) == total


@pytest.mark.parametrize("kept_bytes", [0, 50_000])
def test_what_memory_cannot_keep_is_computed_again(subject, monkeypatch, kept_bytes):
    model, sequences = subject
    monkeypatch.setattr(trunk_module, "CACHE_BYTES_ON_CPU", kept_bytes)
    trunk = Trunk(model, "auto", 1)
    states, loader = HiddenStateCache(trunk), BatchLoader(sequences, 200, pad_token_id=0)
    for _ in range(2):
        assert difference(trunk, states, model, loader) < 1e-5
    kept = sum(tensor.nbytes for tensor in states._cached.values())
    assert kept == kept_bytes - trunk.free_bytes <= kept_bytes
    assert bool(kept) == bool(kept_bytes)


def test_a_new_data_set_takes_the_memory_of_one_that_is_no_longer_used(subject, monkeypatch):
    """Of an earlier repair's data, say; two that are used in turn do not take it from each other."""
    model, sequences = subject
    loaders = [BatchLoader(sequences[part], 200, pad_token_id=0) for part in (slice(0, 20), slice(20, 40))]
    trunk = Trunk(model, "auto", 1)
    first = HiddenStateCache(trunk)
    difference(trunk, first, model, loaders[0])
    needed = sum(states.nbytes for states in first._cached.values())
    trunk.free_bytes = 0

    second = HiddenStateCache(trunk)
    difference(trunk, second, model, loaders[1])
    assert not first._cached
    assert second._cached
    kept = dict(second._cached)
    for _ in range(2):  # the first is used again, and does not displace what is in use
        assert difference(trunk, first, model, loaders[0]) < 1e-5
        assert difference(trunk, second, model, loaders[1]) < 1e-5
        assert second._cached == kept
    for cache in (first, second):
        cache.release()
    assert trunk.free_bytes == needed


def test_half_precision_is_that_of_the_whole_model(subject):
    model, sequences = subject
    trunk = Trunk(model, "auto", 1, half_precision=True)
    batch = next(iter(BatchLoader(sequences[:4], 500, pad_token_id=0)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = last_hidden_state(trunk.tail, HiddenStateCache(trunk).add_to(batch))
        torch.testing.assert_close(ours, last_hidden_state(model, batch), rtol=0, atol=0)


def test_padding_states_are_those_of_the_model(subject):
    """Sampled labels at padding positions (FISHER_POSITIONS = "all") need them."""
    model, sequences = subject
    trunk = Trunk(model, "auto", 1)
    for batch in BatchLoader(sequences[:6], 500, pad_token_id=0, pad_to=150):
        with torch.no_grad():
            ours = last_hidden_state(trunk.tail, HiddenStateCache(trunk, keep=False).add_to(batch))
            torch.testing.assert_close(ours, last_hidden_state(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_a_sweep_measures_what_the_saved_models_measure(make_workspace, family):
    workspace = make_workspace(family)
    workspace.run("compute_factors_and_scores.py")
    workspace.run("make_gradients.py", "--TASK_NAME", "combined", "--BOTTOM_K", 5)
    rates = [0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.2]
    workspace.run("gradient_ascent_and_save.py", "--TASK_NAME", "combined", "--BOTTOM_K", 5, "--LEARNING_RATE", *rates)
    assert len(list((workspace.output / "gradient_ascent_models").iterdir())) == 8
    for checkpoint in sorted((workspace.output / "gradient_ascent_models").iterdir()):
        fresh = Workspace(checkpoint, workspace.data, workspace.output.parent / f"fresh-{family}")
        for metric in ("anthropic_eval", "bias_loss", "ethics_loss", "truth_loss"):
            fresh.run(f"evaluation_scripts/{metric}.py")
            name = f"{checkpoint.name}_{metric.split('_')[0]}_test.json"
            swept = json.loads((workspace.output / "results" / name).read_text())
            alone = json.loads((fresh.output / "results" / name).read_text())
            assert swept["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        shutil.rmtree(fresh.output)
