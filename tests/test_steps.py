"""Steps 2 to 5 through the real scripts: representations, subsets, gradients, the update, the checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter

import pytest
import torch
from conftest import Workspace, load_script
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import kept_model, paths, registry
from utils.evaluation import EvaluationModel, Evaluator
from utils.files import read_json
from utils.model_fingerprints import model_fingerprint
from utils.models import load_model, load_tokenizer
from utils.performance_functions.hh import Dialogues
from utils.results import improvement_percent
from utils.settings import load_settings
from utils.trunk import Trunk

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["pythia", "qwen"])
def finished(request, make_workspace):
    """A workspace with all steps done, for dpp."""
    workspace = make_workspace(request.param)
    workspace.run_all("dpp")
    return workspace


def only(workspace, pattern):
    (path,) = workspace.output.rglob(pattern)
    return path


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_representation_is_the_mean_of_the_models_own_hidden_states(tiny_models, family):
    script = load_script("representations/train_reps.py")
    model, tokenizer = load_model(str(tiny_models[family]), CPU), load_tokenizer(str(tiny_models[family]))
    dialogues = Dialogues(["\n\nHuman: Hi\n\nAssistant:", "Q:", "long " * 50], [" Hello there.", " A", " end"])
    texts = script.dialogue_texts(dialogues)
    small, large = (script.represent(model, tokenizer, texts, 40, tokens) for tokens in (16, 4_096))
    assert torch.norm(small - large) <= 1e-5 * torch.norm(large)
    for row, (prompt, chosen) in enumerate(zip(dialogues.prompts, dialogues.completions, strict=True)):
        inputs = tokenizer(f"{prompt} {chosen}", return_tensors="pt", truncation=True, max_length=40)
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(large[row], hidden[0].mean(dim=0), rtol=1e-4, atol=1e-5)


def test_artifacts_have_the_stated_names_and_shapes(finished):
    model = finished.model.name
    scores = load_file(
        finished.output / f"ekfac_experiments/influence_results/truth_{model}/scores_ekfac/pairwise_scores.safetensors"
    )
    assert {name: tuple(tensor.shape) for name, tensor in scores.items()} == {"all_modules": (1, 60)}
    assert scores["all_modules"].dtype == torch.float32
    representations = load_file(finished.output / f"representations/{model}_sumreps.safetensors")
    assert tuple(representations["representations"].shape) == (60, 32)
    picks = json.loads((finished.output / f"dpp/truth_{model}_indices_5_ifweight10.json").read_text())
    assert len(set(picks["indices"])) == len(picks["diversity_gains"]) == len(picks["influence_gains"]) == 5
    gradients = load_file(
        finished.output / f"ekfac_experiments/influence_results/truth_{model}"
        "/query_grads_dpp_ifweight10_bottom5/aggregated_query_grads.safetensors"
    )
    loaded = load_model(str(finished.model), CPU)
    for name, tensor in gradients.items():
        module = loaded.get_submodule(name)
        assert tuple(tensor.shape) == (1, module.out_features, module.in_features + (module.bias is not None))


def test_pure_ekfac_takes_the_most_negative_scores_and_sum_scales_the_mean(finished):
    common = ("--TASK_NAME", "bias", "--BOTTOM_K", 7)
    finished.run("make_gradients.py", *common)
    folder = only(finished, "query_grads_pure_ekfac_bottom7")
    scores = load_file(only(finished, "bias_*/scores_ekfac/pairwise_scores.safetensors"))["all_modules"][0]
    manifest = read_json(folder / "aggregated_query_grads.manifest.json")
    assert manifest["indices"] == scores.argsort()[:7].tolist()
    mean = load_file(folder / "aggregated_query_grads.safetensors")
    finished.run("make_gradients.py", *common, "--GRADIENT_REDUCTION_TYPE", "sum", "--OVERWRITE", "True")
    for name, tensor in load_file(folder / "aggregated_query_grads.safetensors").items():
        torch.testing.assert_close(tensor, mean[name] * 7 / 100)


def test_gradient_does_not_depend_on_the_batches(finished):
    common = ("--TASK_NAME", "ethics", "--SCORES_TYPE", "random", "--BOTTOM_K", 9)
    finished.run("make_gradients.py", *common)
    file = only(finished, "ethics_*/query_grads_random_bottom9/aggregated_query_grads.safetensors")
    first = load_file(file)
    file.unlink()
    finished.run("make_gradients.py", *common, "--TOKENS_PER_BATCH", 64)
    for name, tensor in load_file(file).items():
        assert torch.norm(tensor - first[name]) <= 1e-5 * torch.norm(tensor)


@pytest.mark.parametrize("scores_type", ["pure_ekfac", "dpp", "random"])
def test_combined_runs_through_every_step(finished, scores_type):
    common = ("--TASK_NAME", "combined", "--BOTTOM_K", 4)
    finished.run("dpp/greedy_dpp.py", *common)
    finished.run("make_gradients.py", *common, "--SCORES_TYPE", scores_type)
    finished.run("gradient_ascent_and_save.py", *common, "--SCORES_TYPE", scores_type, "--LEARNING_RATE", 0.01)
    folder = only(finished, f"combined_*_{scores_type}_*bottom4_lr0.01")
    assert set(read_json(folder / "repair.json")["measurements"]) == {
        *("perplexity", "bias", "ethics", "truth"),
        *("truth_mc1", "truth_mc2"),
    }


def test_update_is_exactly_the_learning_rate_times_the_saved_tensor(finished):
    checkpoint = only(finished, "truth_*_dpp_ifweight10_bottom5_lr0.05")
    gradients = load_file(
        only(finished, "truth_*/query_grads_dpp_ifweight10_bottom5/aggregated_query_grads.safetensors")
    )
    before = load_model(str(finished.model), CPU).state_dict()
    after = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    assert before.keys() == after.keys()
    changed = set()
    for name, gradient in gradients.items():
        step = gradient[0]
        weight = before[f"{name}.weight"]
        expected = {f"{name}.weight": torch.add(weight, step[:, : weight.shape[1]], alpha=0.05)}
        if f"{name}.bias" in before:
            expected[f"{name}.bias"] = torch.add(before[f"{name}.bias"], step[:, -1], alpha=0.05)
        for key, tensor in expected.items():
            assert torch.equal(after[key], tensor)
            assert not torch.equal(before[key], tensor)
            changed.add(key)
    last_block = {key for key in before if ".layers.2." in key}
    assert changed <= last_block
    for key in before.keys() - changed:
        assert torch.equal(before[key], after[key]), f"{key} is no traced Linear and must not move"


def test_saved_checkpoint_is_complete_and_reloads_bit_equal(finished, tmp_path):
    checkpoint = only(finished, "bias_*_dpp_ifweight10_bottom5_lr0.05")
    reloaded = load_model(str(checkpoint), CPU)
    reloaded.save_pretrained(tmp_path)
    stored, again = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert reloaded.dtype == torch.float32
    config = read_json(checkpoint / "config.json")
    assert config["model_type"] == read_json(finished.model / "config.json")["model_type"]
    inputs = AutoTokenizer.from_pretrained(checkpoint)("Human: Hello", return_tensors="pt")
    assert (
        reloaded.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[1]
        > inputs["input_ids"].shape[1]
    )
    card = (checkpoint / "README.md").read_text()
    assert "| perplexity " in card
    assert "| bias " in card


def test_learning_rate_zero_changes_nothing(finished):
    finished.run(
        "gradient_ascent_and_save.py",
        "--BOTTOM_K",
        5,
        "--SCORES_TYPE",
        "dpp",
        "--LEARNING_RATE",
        0,
        "--TASK_NAME",
        "bias",
    )
    checkpoint = only(finished, "bias_*_dpp_ifweight10_bottom5_lr0")
    before, after = (load_file(folder / "model.safetensors") for folder in (finished.model, checkpoint))
    assert all(torch.equal(before[name], after[name]) for name in before)
    measured = read_json(checkpoint / "repair.json")["measurements"]
    assert measured["perplexity"]["change_percent"] == 0
    assert measured["bias"]["improvement"] == 0


def test_sweep_equals_single_rates_and_results_equal_step_6(finished):
    common = ("--TASK_NAME", "truth", "--BOTTOM_K", 5, "--SCORES_TYPE", "dpp")
    finished.run("gradient_ascent_and_save.py", *common, "--LEARNING_RATE", 0.3, 0.02)
    folder = only(finished, "truth_*_dpp_ifweight10_bottom5_lr0.02")
    swept = load_file(folder / "model.safetensors")
    results = {m: only(finished, f"{folder.name}_{m}_test.json") for m in ("anthropic", "truth")}
    recorded = {metric: read_json(path)["loss"] for metric, path in results.items()}
    shutil.rmtree(folder)
    for path in results.values():
        path.unlink()
    finished.run(
        "gradient_ascent_and_save.py",
        *common,
        "--LEARNING_RATE",
        0.02,
        "--COMPUTE_ANTHROPIC_EVAL",
        "False",
        "--COMPUTE_TASK_EVAL",
        "False",
    )
    alone = load_file(folder / "model.safetensors")
    assert all(torch.equal(swept[name], alone[name]) for name in swept)
    repaired = Workspace(folder, finished.data, finished.output)
    for metric, script in (("anthropic", "anthropic_eval"), ("truth", "truth_loss")):
        repaired.run(f"evaluation_scripts/{script}.py")
        assert read_json(results[metric])["loss"] == pytest.approx(recorded[metric], rel=1e-6)


def test_without_saving_only_results_are_written(finished):
    finished.run(
        "gradient_ascent_and_save.py",
        "--TASK_NAME",
        "ethics",
        "--BOTTOM_K",
        5,
        "--SCORES_TYPE",
        "dpp",
        "--LEARNING_RATE",
        0.07,
        "--SAVE_TO_DISK",
        "False",
    )
    assert not list(finished.output.rglob("ethics_*_lr0.07"))
    assert len(list((finished.output / "results").glob("ethics_*_lr0.07_*_test.json"))) == 4


def test_a_checkpoint_with_other_weights_is_another_model(finished):
    common = ("--TASK_NAME", "bias", "--BOTTOM_K", 5, "--SCORES_TYPE", "dpp", "--LEARNING_RATE", 0.033)
    finished.run("gradient_ascent_and_save.py", *common)
    folder = only(finished, "bias_*_dpp_ifweight10_bottom5_lr0.033")
    saved = model_fingerprint(str(folder))
    assert saved == read_json(folder / "manifest.json")["fingerprint"]
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(str(folder)) != saved
    script = load_script("evaluation_scripts/bias_loss.py")
    arguments = finished.arguments("evaluation_scripts/bias_loss.py")
    arguments[arguments.index(str(finished.model))] = str(folder)
    with pytest.raises(SystemExit):
        script.run_step(script.main, arguments)


@pytest.mark.parametrize("strategy", ["kfac", "diagonal", "identity"])
def test_other_strategies_run_through_steps_1_and_4(finished, strategy):
    common = ("--TASK_NAME", "ethics", "--FACTOR_STRATEGY", strategy)
    finished.run("compute_factors_and_scores.py", *common, "--COMPUTE_PER_TOKEN_SCORES", "True")
    finished.run("make_gradients.py", *common, "--BOTTOM_K", 3, "--OVERWRITE", "True")
    scores = load_file(only(finished, f"ethics_*/scores_{strategy}/pairwise_scores.safetensors"))["all_modules"]
    tokens = load_file(only(finished, f"ethics_*/scores_{strategy}/per_token_scores.safetensors"))
    begin, end = tokens["offsets"][7:9]
    torch.testing.assert_close(tokens["scores"][begin:end].sum(), scores[0, 7], rtol=1e-3, atol=1e-4)
    manifest = read_json(only(finished, "ethics_*/query_grads_pure_ekfac_bottom3/*.manifest.json"))
    assert manifest["settings"]["FACTOR_STRATEGY"] == strategy
    assert manifest["indices"] == scores[0].argsort()[:3].tolist()


def test_percentages():
    assert improvement_percent(before=-2.0, after=-3.0) == pytest.approx(50)
    assert improvement_percent(before=2.0, after=3.0) == pytest.approx(-50)


def test_more_completions_replace_fewer_and_fewer_are_there_already(finished):
    common = ("--BOTTOM_K", 5, "--SCORES_TYPE", "dpp", "--TASK_NAME", "truth", "--LEARNING_RATE", 0.05)
    counts = []
    for count in (1, 3, 2):
        finished.run("gradient_ascent_and_save.py", *common, "--NUM_COMPLETIONS", count)
        counts.append(len(read_json(only(finished, "truth_*_completions_test.json"))))
    assert counts == [1, 3, 3]


def test_step_4_follows_the_factors_that_step_1_made(make_workspace):
    """NUM_FACTOR_EXAMPLES and the like are given once, to step 1."""
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py", "--NUM_FACTOR_EXAMPLES", 48, "--NUM_BLOCKS", 2)
    workspace.run("compute_factors_and_scores.py", "--NUM_BLOCKS", 2, "--FACTOR_STRATEGY", "identity")
    for scores_type in ("pure_ekfac", "identity"):
        workspace.run("make_gradients.py", "--TASK_NAME", "bias", "--BOTTOM_K", 3, "--SCORES_TYPE", scores_type)
        folder = only(workspace, f"bias_*/query_grads_{scores_type}_bottom3")
        settings = read_json(folder / "aggregated_query_grads.manifest.json")["settings"]
        assert (settings["NUM_FACTOR_EXAMPLES"], settings["NUM_BLOCKS"]) == (48, 2)
        names = load_file(folder / "aggregated_query_grads.safetensors")
        assert {int(name.split("layers.")[1].split(".")[0]) for name in names} == {1, 2}


def test_all_tasks_load_and_hash_the_model_once_and_run_the_trunk_once_for_each_data_set(make_workspace, monkeypatch):
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py")
    workspace.run("make_gradients.py", "--BOTTOM_K", 4)
    counts, ran = Counter(), Counter()
    for owner, name in ((kept_model, "load_model"), (registry, "model_fingerprint")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, f=original, n=name: (counts.update([n]), f(*a))[1])
    states = Trunk.states
    monkeypatch.setattr(
        Trunk,
        "states",
        lambda self, batch: (ran.update([batch["input_ids"].numpy().tobytes()]), states(self, batch))[1],
    )
    workspace.run("gradient_ascent_and_save.py", "--BOTTOM_K", 4, "--LEARNING_RATE", 0.01, 0.02, "--NUM_COMPLETIONS", 1)
    assert counts == {"load_model": 1, "model_fingerprint": 1}
    checked = 1  # trunk and tail are compared with the whole model once
    model, data = EvaluationModel(*loaded(workspace)), Evaluator(settings_of(workspace), "test")
    batches = sum(len(model._input(metric, data.data(metric)).loader) for metric in paths.STEP_6)
    assert sum(ran.values()) == batches + checked
    assert set(ran.values()) == {1}


def loaded(workspace):
    return load_model(str(workspace.model), CPU), load_tokenizer(str(workspace.model))


def settings_of(workspace):
    script = "gradient_ascent_and_save.py"
    return load_settings(load_script(script), workspace.arguments(script))


def test_seconds_are_those_of_the_artifact_alone(make_workspace, monkeypatch):
    """Of three tasks' picks and gradients, none counts the loading of the model or the tasks before it."""
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py")
    workspace.run("representations/train_reps.py")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes(script, name, seconds):
        module = load_script(script)
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a: (now.__setitem__(0, now[0] + seconds), original(*a))[1])

    takes("dpp/greedy_dpp.py", "median_heuristic_gamma", 100)
    takes("dpp/greedy_dpp.py", "greedy_dpp", 3)
    takes("make_gradients.py", "load_traced_model", 100)
    takes("make_gradients.py", "make_gradient", 5)
    workspace.run("dpp/greedy_dpp.py", "--BOTTOM_K", 4)
    workspace.run("make_gradients.py", "--BOTTOM_K", 4, "--SCORES_TYPE", "dpp")
    takes("gradient_ascent_and_save.py", "open_model", 100)
    takes("gradient_ascent_and_save.py", "ascend", 0)
    workspace.run("gradient_ascent_and_save.py", "--BOTTOM_K", 4, "--SCORES_TYPE", "dpp", "--LEARNING_RATE", "auto")
    for pattern in ("*_search.manifest.json", "*_test.manifest.json", "gradient_ascent_models/*/manifest.json"):
        manifests = list(workspace.output.rglob(pattern))
        assert len(manifests) >= 3
        assert {read_json(manifest)["seconds"] for manifest in manifests} == {0}
    for pattern, seconds in (("*_indices_4_*.manifest.json", 3), ("aggregated_query_grads.manifest.json", 5)):
        manifests = list(workspace.output.rglob(pattern))
        assert len(manifests) == 3
        assert [read_json(manifest)["seconds"] for manifest in manifests] == [seconds] * 3
