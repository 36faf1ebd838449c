"""A model that is kept for the next step: the same numbers with less work, and never another step's weights."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import Workspace
from safetensors.torch import load_file

from utils import kept_model, learning_rate_search, selection, trunk
from utils.files import read_json
from utils.kept_model import keep_model, open_model
from utils.settings import Settings

STEP_1, STEP_4, STEP_5 = "compute_factors_and_scores.py", "make_gradients.py", "gradient_ascent_and_save.py"
CPU = torch.device("cpu")


def run_steps(workspace: Workspace) -> None:
    workspace.run(STEP_1)
    for scores_type in ("weighted", "pure_ekfac", "direct"):
        common = ["--SCORES_TYPE", scores_type, "--BOTTOM_K", 5, "--TASK_NAME", "truth"]
        workspace.run(STEP_4, *common)
        workspace.run(STEP_5, *common, "--LEARNING_RATE", 0.02, 0.05, "--SAVE_TO_DISK", False)


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_the_same_numbers_with_less_work(make_workspace, monkeypatch, family):
    loads, passes = [], []
    load_model, states = kept_model.load_model, trunk.Trunk.states
    monkeypatch.setattr(kept_model, "load_model", lambda *args: loads.append(args[0]) or load_model(*args))
    monkeypatch.setattr(trunk.Trunk, "states", lambda self, batch: passes.append(1) or states(self, batch))
    apart, together = make_workspace(family), make_workspace(family)
    run_steps(apart)
    work_apart = len(loads), len(passes)
    loads.clear()
    passes.clear()
    with keep_model():
        run_steps(together)
    assert (work_apart[0], len(loads)) == (7, 1)
    assert len(passes) < work_apart[1] / 2
    files = sorted(file.relative_to(apart.output) for file in apart.output.rglob("*.safetensors"))
    assert len(files) > 10
    for file in files:
        plain, kept = load_file(apart.output / file), load_file(together.output / file)
        assert all(torch.equal(plain[name], kept[name]) for name in plain), file
    assert kept_model._kept.opened is None, "nothing stays when the context ends"


def test_searches_of_different_repairs_share_the_trunk(make_workspace, monkeypatch):
    """The validation dialogues of two repairs are not the same, and yet what was computed for one serves the other."""
    workspace, passes = make_workspace("pythia"), []
    states = trunk.Trunk.states
    monkeypatch.setattr(
        trunk.Trunk, "states", lambda self, batch: passes.append(len(batch["input_ids"])) or states(self, batch)
    )
    monkeypatch.setattr(learning_rate_search, "PRECISION", 0.5)
    workspace.run(STEP_1)

    def texts_run(scores_type: str) -> int:
        """How many texts the trunk was run on in step 5."""
        common = ["--SCORES_TYPE", scores_type, "--BOTTOM_K", 5, "--TASK_NAME", "truth"]
        workspace.run(STEP_4, *common)
        passes.clear()
        more = ["--SAVE_TO_DISK", False, "--COMPUTE_ANTHROPIC_EVAL", False, "--COMPUTE_TASK_EVAL", False]
        workspace.run(STEP_5, *common, *more, "--LEARNING_RATE", "auto")
        return sum(passes)

    def search(scores_type: str) -> dict:
        (file,) = workspace.output.glob(f"results/truth_*_{scores_type}_*_search.json")
        return read_json(file)

    monkeypatch.setattr(selection, "FEWEST_SHARED", 1)
    with keep_model():
        first, second = texts_run("pure_ekfac"), texts_run("random")
    assert first > 27
    assert second <= 3, "at most another portion"
    shared = search("random")
    monkeypatch.setattr(selection, "FEWEST_SHARED", 1_000)
    shutil.rmtree(workspace.output / "results")
    with keep_model():
        texts_run("pure_ekfac")
        assert texts_run("random") == 27, "all of its own validation dialogues"
    alone = search("random")
    assert [trial["perplexity_change"] for trial in shared["trials"]] == pytest.approx(
        [trial["perplexity_change"] for trial in alone["trials"]], rel=1e-4
    )


def test_a_model_is_given_as_it_was_loaded(tiny_models, tmp_path):
    settings = Settings(MODEL_FAMILY="auto", DEVICE="cpu")
    copy = shutil.copytree(tiny_models["pythia"], tmp_path / "copy-tiny")
    with keep_model():
        opened = open_model(settings, str(copy), CPU, 1)
        last = opened.model.gpt_neox.layers[-1].mlp.dense_h_to_4h
        before = last.weight.clone()
        with torch.no_grad():
            last.weight.zero_()
            last.bias.zero_()
        again = open_model(settings, str(copy), CPU, 1)
        assert again.model is opened.model
        assert torch.equal(last.weight, before)
        assert last.bias.abs().sum() > 0
        assert open_model(settings, str(copy), CPU, 2).model is not opened.model, "another cut"
        other = open_model(settings, str(tiny_models["qwen"]), CPU, 1)
        assert other.model.config.model_type == "qwen2"
    assert open_model(settings, str(copy), CPU, 1).model is not open_model(settings, str(copy), CPU, 1).model


def test_what_was_changed_on_disk_is_loaded_again(tiny_models, tmp_path):
    settings = Settings(MODEL_FAMILY="auto", DEVICE="cpu")
    folder = tmp_path / "model"
    shutil.copytree(tiny_models["pythia"], folder)
    with keep_model():
        first = open_model(settings, str(folder), CPU, 1)
        weights = first.model.state_dict()
        changed = {name: value + 1e-3 if name.endswith("dense.weight") else value for name, value in weights.items()}
        first.model.save_pretrained(folder, state_dict=changed)
        second = open_model(settings, str(folder), CPU, 1)
    assert second.model is not first.model
