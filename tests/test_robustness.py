"""What is left of repairs: rounding against a plain loop, shares, whole runs that are killed, and wrong constants."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Workspace, contents, make_model, run_script

from steps import load_script
from utils import evaluation
from utils.console import UserError
from utils.evaluation import EvaluationModel
from utils.intervals import ClusterSums
from utils.models import load_model, load_tokenizer
from utils.paths import PROJECT_ROOT, ROBUSTNESS, STEP_1, STEP_4, STEP_5
from utils.results import improvement_sums, share_left
from utils.settings import TASK_NAMES, Settings

SMALL = ["--NUM_FINE_TUNING_STEPS", 2, "--BATCH_SIZE", 4, "--LEARNING_RATE", 1e-3]
STRESSES = ["none", "int8", "int4", "fine-tuned"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    return load_script(ROBUSTNESS)


@pytest.fixture(scope="module")
def repaired(make_workspace) -> Workspace:
    """Steps 1, 4 and 5 have repaired the tiny model for truth."""
    workspace = make_workspace("pythia")
    workspace.run(STEP_1, "--TASK_NAME", "truth")
    common = ["--TASK_NAME", "truth", "--BOTTOM_K", 5]
    workspace.run(STEP_4, *common)
    workspace.run(STEP_5, *common, "--LEARNING_RATE", 0.05)
    return workspace


@pytest.fixture
def copy_of(repaired, tmp_path) -> Workspace:
    """The same for a test that may spoil it."""
    return Workspace(repaired.model, repaired.data, Path(shutil.copytree(repaired.output, tmp_path / "output")))


def checkpoint(workspace: Workspace) -> Path:
    (folder,) = (workspace.output / "gradient_ascent_models").iterdir()
    return folder


def robustness(workspace: Workspace) -> Path:
    return workspace.output / "results" / "robustness" / workspace.model.name


def rows_of(workspace: Workspace) -> dict[str, dict]:
    rows = pd.read_csv(robustness(workspace) / "robustness.csv").to_dict("records")
    return {row["stress"]: row for row in rows}


def refusal(capsys: pytest.CaptureFixture, workspace: Workspace, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        workspace.run(ROBUSTNESS, *words)
    assert stop.value.code == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return error


# -- weight rounding ---------------------------------------------------------------------------------------------------


def rounded_by_a_loop(weight: list[list[float]], bits: int, group_size: int) -> list[list[float]]:
    largest, result = 2 ** (bits - 1) - 1, []
    for row in weight:
        new = []
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            scale = max(abs(value) for value in group) / largest
            new += [round(value / scale) * scale if scale else 0.0 for value in group]
        result.append(new)
    return result


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 1, 8, 20, 32, 100])  # 20 leaves a smaller group at the end of a row
def test_rounding_is_a_plain_loop(script, bits, group_size):
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[2], weight[3, :32] = 0.0, 0.0
    expected = torch.tensor(rounded_by_a_loop(weight.tolist(), bits, group_size or 48), dtype=torch.float64)
    assert torch.allclose(script.rounded(weight, bits, group_size), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
def test_rounding_changes_a_weight_by_half_a_scale_at_most_and_keeps_the_largest(script, bits, group_size):
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    groups = weight.reshape(16, -1, group_size or 64)
    scale = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    new = script.rounded(weight, bits, group_size).reshape(groups.shape)
    assert ((new - groups).abs() <= 0.5 * scale * (1 + 1e-5)).all()
    assert torch.allclose(new.abs().amax(dim=-1), groups.abs().amax(dim=-1))
    assert all(len(group.unique()) <= 2**bits - 1 for group in new.flatten(0, 1))
    again = script.rounded(new.reshape(weight.shape), bits, group_size).reshape(groups.shape)
    assert torch.allclose(again, new, rtol=1e-5)


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite(script):
    weight = torch.zeros(3, 40)
    weight[1] = 1e-45
    weight[2, 7] = -3.0
    for bits, group_size in ((8, None), (4, 32)):
        new = script.rounded(weight, bits, group_size)
        assert new.isfinite().all()
        assert (new[0] == 0).all()
        assert torch.allclose(new[2], weight[2])


@pytest.mark.parametrize(
    ("config_name", "more"),
    [("Qwen2Config", {"tie_word_embeddings": True}), ("GPTNeoXConfig", {}), ("LlamaConfig", {"mlp_bias": True})],
)
def test_only_the_weights_of_linear_layers_in_blocks_are_rounded(script, tmp_path, config_name, more):
    model = load_model(str(make_model(tmp_path / "model", config_name, **more)), CPU)
    before = {name: parameter.clone() for name, parameter in model.named_parameters(remove_duplicate=False)}
    script.round_weights(model, 4, 32)
    changed = {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not torch.equal(parameter, before[name])
    }
    linears = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    in_blocks = {name for name in linears if re.search(r"layers\.[012]\.", name)}
    assert changed == in_blocks
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is embedding) == bool(more.get("tie_word_embeddings"))
    name = next(iter(in_blocks))
    assert torch.equal(dict(model.named_parameters())[name], script.rounded(before[name], 4, 32))


# -- shares ------------------------------------------------------------------------------------------------------------


def task_losses(seed: int, shift: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    loss = torch.randn(60, generator=generator, dtype=torch.float64) * 0.1 + shift
    return {"loss": loss, "cluster": torch.arange(60) // 3}


def test_the_share_that_is_left_and_its_standard_error(monkeypatch):
    """The delta method's standard error is that of a bootstrap over the clusters."""
    before, after, stressed, stressed_after = (task_losses(seed, shift) for seed, shift in enumerate((1, 0, 1.1, 0.5)))
    without, under = improvement_sums(before, after), improvement_sums(stressed, stressed_after)
    share = share_left([without], [under])
    mean = float((stressed["loss"] - stressed_after["loss"]).mean() / (before["loss"] - after["loss"]).mean())
    assert share.value == pytest.approx(mean)
    assert share.clusters == 20
    draws = torch.randint(20, (20_000, 20), generator=torch.Generator().manual_seed(9))
    resampled = under.total[draws].sum(dim=1) / without.total[draws].sum(dim=1)
    assert share.standard_error == pytest.approx(float(resampled.std()), rel=0.1)


def test_the_share_without_a_stress_is_one():
    sums = improvement_sums(task_losses(0, 1.0), task_losses(1, 0.0))
    assert share_left([sums, sums], [sums, sums]) == pytest.approx((1.0, 0.0, 20), abs=1e-12)


def test_an_improvement_that_is_none_or_of_one_cluster_has_no_share():
    losses = task_losses(0, 1.0)
    nothing = improvement_sums(losses, losses)
    assert share_left([nothing], [nothing]) is None
    one = ClusterSums(torch.tensor([3.0]), torch.tensor([3]))
    assert share_left([one], [one]) is None


# -- fine-tuning -------------------------------------------------------------------------------------------------------


def fine_tuned(script, workspace: Workspace, model: Path, **constants: object) -> dict[str, torch.Tensor]:
    defaults = {name: getattr(script, name) for name in script.__annotations__}
    small = {
        "NUM_FINE_TUNING_STEPS": 2,
        "BATCH_SIZE": 4,
        "LEARNING_RATE": 1e-3,
        "HH_DATASET": str(workspace.data / "hh"),
    }
    settings = Settings(**{**defaults, **small, "BITS": None, **constants})
    (_, stress) = script.stresses(settings)
    loaded = load_model(str(model), CPU)
    stress.apply(EvaluationModel(loaded, load_tokenizer(str(model), loaded)))
    return loaded.state_dict()


def test_fine_tuning_is_the_same_each_time_and_depends_on_the_seed(script, repaired):
    first, again = (fine_tuned(script, repaired, repaired.model) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    small_batches = fine_tuned(script, repaired, repaired.model, BATCH_SIZE_PER_DEVICE=4)
    assert all(torch.allclose(first[name], small_batches[name], atol=1e-5) for name in first)
    other = fine_tuned(script, repaired, repaired.model, SEED=7)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_a_whole_run(copy_of, capsys, monkeypatch):
    copy_of.run(ROBUSTNESS, *SMALL)
    rows = rows_of(copy_of)
    assert list(rows) == STRESSES
    report = json.loads((checkpoint(copy_of) / "repair.json").read_text(encoding="utf-8"))["measurements"]
    for task in TASK_NAMES:
        for name in ("before", "after", "improvement", "improvement_low", "improvement_high"):
            assert rows["none"][f"{task}_{name}"] == pytest.approx(report[task][name], rel=1e-6)
    assert rows["none"]["perplexity_change_percent"] == pytest.approx(report["perplexity"]["change_percent"], rel=1e-6)
    assert rows["none"]["share_left"] == pytest.approx(1)
    for stress, row in rows.items():
        assert (row["model"], row["task"]) == (checkpoint(copy_of).name, "truth")
        assert row["share_left"] == pytest.approx(row["truth_improvement"] / rows["none"]["truth_improvement"])
        assert row["share_left_low"] <= row["share_left"] <= row["share_left_high"]
        if stress != "none":
            assert row["perplexity_before"] != rows["none"]["perplexity_before"]
    int8, int4 = (
        abs(math.log(rows[name]["perplexity_before"] / rows["none"]["perplexity_before"])) for name in STRESSES[1:3]
    )
    assert int8 < int4
    shown = capsys.readouterr().out
    folder = robustness(copy_of)
    assert (folder / "robustness.md").read_text(encoding="utf-8") in shown
    assert {path.name for path in folder.iterdir()} == {
        "measurements",
        *(f"robustness.{s}" for s in ("md", "csv", "tex")),
    }
    assert not [path for path in copy_of.output.rglob("*") if path.suffix in (".partial", ".lock")]

    monkeypatch.setattr(EvaluationModel, "measure", lambda *_, **__: pytest.fail("it is measured again"))
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: pytest.fail("it is loaded again"))
    unchanged = contents(copy_of.output)
    copy_of.run(ROBUSTNESS, *SMALL)
    assert contents(copy_of.output) == unchanged


def test_a_killed_run_resumes_without_measuring_again(copy_of, monkeypatch, capsys):
    measured, measure = [], EvaluationModel.measure

    def interrupted(self: EvaluationModel, metric: str, *arguments: object, **keywords: object) -> dict:
        if len(measured) == 6:  # within the second stress
            raise KeyboardInterrupt
        measured.append(metric)
        return measure(self, metric, *arguments, **keywords)

    words = ["--REPAIRED_MODEL_NAMES", checkpoint(copy_of), "--NUM_FINE_TUNING_STEPS", 0]
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationModel, "measure", interrupted)
        with pytest.raises(SystemExit):
            copy_of.run(ROBUSTNESS, *words)
    made = contents(robustness(copy_of))
    assert len([name for name in made if name.endswith("_test.json")]) == 6
    measured.clear()
    monkeypatch.setattr(EvaluationModel, "measure", lambda *a, **k: (measured.append(a[1]), measure(*a, **k))[1])
    copy_of.run(ROBUSTNESS, *words)
    assert len(measured) == 2 * 2 * 4 - 6, "two models, two roundings, four measurements"
    assert contents(robustness(copy_of)).items() >= made.items()
    assert list(rows_of(copy_of)) == STRESSES[:3]


def test_other_constants_of_a_stress_are_refused_and_replaced_with_overwrite(copy_of, capsys, monkeypatch):
    only = ["--BITS", 4, "--NUM_FINE_TUNING_STEPS", 0]
    copy_of.run(ROBUSTNESS, *only)
    capsys.readouterr()
    first = rows_of(copy_of)
    with monkeypatch.context() as patch:
        patch.setattr(EvaluationModel, "measure", lambda *_, **__: pytest.fail("it is refused after work"))
        told = refusal(capsys, copy_of, "--BITS", 8, 4, "--GROUP_SIZE", 8, "--NUM_FINE_TUNING_STEPS", 0)
    assert "was made with other settings: GROUP_SIZE" in told
    assert "OVERWRITE = True" in told
    copy_of.run(ROBUSTNESS, *only, "--GROUP_SIZE", 8, "--OVERWRITE", True)
    assert rows_of(copy_of)["int4"]["perplexity_before"] != first["int4"]["perplexity_before"]
    copy_of.run(ROBUSTNESS, "--BITS", 8, "--NUM_FINE_TUNING_STEPS", 0, "--GROUP_SIZE", 16)  # it means nothing for these
    copy_of.run(ROBUSTNESS, "--BITS", 8, "--NUM_FINE_TUNING_STEPS", 0)


def test_two_runs_at_once_share_the_measurements(copy_of):
    words = [*copy_of.arguments(ROBUSTNESS), *SMALL]
    command = [sys.executable, str(PROJECT_ROOT / ROBUSTNESS), *map(str, words)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=300)
        assert run.returncode == 0, errors
    assert list(rows_of(copy_of)) == STRESSES
    made = contents(robustness(copy_of))
    assert not [name for name in made if name.endswith((".partial", ".lock"))]
    copy_of.run(ROBUSTNESS, *SMALL)
    assert contents(robustness(copy_of)) == made


def test_a_repair_for_all_tasks_has_the_share_of_their_sum(copy_of):
    folder = checkpoint(copy_of)
    write(folder, {**json.loads((folder / "repair.json").read_text(encoding="utf-8")), "task": "combined"})
    copy_of.run(ROBUSTNESS, "--BITS", 2, "--GROUP_SIZE", 16, "--NUM_FINE_TUNING_STEPS", 0)
    rows = rows_of(copy_of)
    none, int2 = (sum(rows[name][f"{task}_improvement"] for task in TASK_NAMES) for name in ("none", "int2"))
    assert rows["int2"]["task"] == "combined"
    assert rows["int2"]["share_left"] == pytest.approx(int2 / none)


def test_identical_models_stay_identical(repaired, tmp_path):
    """A copy of the model that calls itself a repair of it: nothing improves, whatever happens to both."""
    workspace = Workspace(repaired.model, repaired.data, tmp_path / "output")
    same = Path(shutil.copytree(repaired.model, tmp_path / "same"))
    shutil.copy(checkpoint(repaired) / "repair.json", same)
    workspace.run(ROBUSTNESS, "--REPAIRED_MODEL_NAMES", same, *SMALL)
    for row in rows_of(workspace).values():
        changes = [
            row["perplexity_change_percent"],
            *(row[f"{task}_improvement"] for task in TASK_NAMES),
        ]
        assert changes == [0, 0, 0, 0]
        assert math.isnan(row["share_left"])
    assert "‡" in (robustness(workspace) / "robustness.md").read_text(encoding="utf-8")


def test_the_same_results_as_a_checkpoint_that_was_rounded_by_hand(copy_of, script, tmp_path):
    copy_of.run(ROBUSTNESS, "--BITS", 4, "--NUM_FINE_TUNING_STEPS", 0)
    model = load_model(str(checkpoint(copy_of)), CPU)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            new = rounded_by_a_loop(module.weight.tolist(), 4, 32)
            module.weight.data = torch.tensor(new)
    model.save_pretrained(tmp_path / "by-hand")
    load_tokenizer(str(checkpoint(copy_of))).save_pretrained(tmp_path / "by-hand")
    output = tmp_path / "by-hand-output"
    data = ["--DATA_DIR", copy_of.data, "--OUTPUT_DIR", output]
    run_script("evaluation_scripts/truth_loss.py", "--MODEL_NAMES", tmp_path / "by-hand", *data)
    by_hand = json.loads((output / "results" / "by-hand_truth_test.json").read_text(encoding="utf-8"))
    assert rows_of(copy_of)["int4"]["truth_after"] == pytest.approx(by_hand["loss"], abs=1e-5)


# -- wrong constants ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--BITS", 1], ["BITS = 1", "at least 2 and at most 8"]),
        (["--BITS", 4, 4], ["BITS = ", "4 is given twice"]),
        (["--BITS", 16], ["BITS = 16", "at most 8"]),
        (["--GROUP_SIZE", 0], ["GROUP_SIZE = 0", "at least 1"]),
        (["--LEARNING_RATE", 0], ["LEARNING_RATE = 0", "above 0"]),
        (["--NUM_FINE_TUNING_STEPS", -1], ["NUM_FINE_TUNING_STEPS = -1", "at least 0"]),
        (["--NUM_FINE_TUNING_STEPS", 4], ["NUM_FINE_TUNING_STEPS = 4", "take 64 dialogues", "has 60", "0 to 3"]),
        (["--BATCH_SIZE", 3], ["BATCH_SIZE = 3", "multiple of 2", "BATCH_SIZE_PER_DEVICE"]),
        (["--DEVICE", "spread"], ["DEVICE = 'spread'", "auto, cpu and cuda"]),
        (["--REPAIRED_MODEL_NAMES", "/no/such/model"], ["/no/such/model"]),
    ],
)
def test_a_wrong_constant_is_one_line(repaired, capsys, words, told):
    error = refusal(capsys, repaired, *words)
    for part in told:
        assert part in error


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda folder, _: (folder / "repair.json").unlink(), "which has no repair.json"),
        (lambda folder, _: (folder / "repair.json").write_text("{"), "repair.json"),
        (lambda folder, _: (folder / "repair.json").write_text("[]"), "has the task None"),
        (lambda folder, report: write(folder, {**report, "task": "charm"}), "has the task 'charm'"),
        (
            lambda folder, report: [(folder / "manifest.json").unlink(), write(folder, {**report, "model": "other"})],
            "repaired from 'other'",
        ),
        (lambda folder, _: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    ],
)
def test_a_folder_that_is_no_repair_of_the_model_is_refused(copy_of, capsys, spoil, told):
    folder = checkpoint(copy_of)
    spoil(folder, json.loads((folder / "repair.json").read_text(encoding="utf-8")))
    error = refusal(capsys, copy_of, "--REPAIRED_MODEL_NAMES", folder)
    assert told in error
    assert not robustness(copy_of).exists()


def write(folder: Path, report: dict) -> None:
    (folder / "repair.json").write_text(json.dumps(report), encoding="utf-8")


def test_the_same_model_under_another_name_has_the_same_repairs(copy_of, tmp_path):
    model = Path(shutil.copytree(copy_of.model, tmp_path / "renamed"))
    renamed = Workspace(model, copy_of.data, copy_of.output)
    renamed.run(ROBUSTNESS, "--BITS", 8, "--NUM_FINE_TUNING_STEPS", 0)
    assert (copy_of.output / "results" / "robustness" / "renamed" / "robustness.md").is_file()


def test_a_repair_of_the_model_as_it_was_before_is_refused(copy_of, tmp_path, capsys):
    """The same name, other weights."""
    model = Path(shutil.copytree(copy_of.model, tmp_path / "other" / copy_of.model.name))
    loaded = load_model(str(model), CPU)
    loaded.get_output_embeddings().weight.data.mul_(1.01)
    loaded.save_pretrained(model)
    changed = Workspace(model, copy_of.data, copy_of.output)
    assert "was made with model = " in refusal(capsys, changed, "--REPAIRED_MODEL_NAMES", checkpoint(copy_of))
    assert f"run {STEP_5} first" in refusal(capsys, changed)


def test_the_model_itself_is_no_repair(repaired, capsys):
    assert "differ in the last part" in refusal(capsys, repaired, "--REPAIRED_MODEL_NAMES", repaired.model)


def test_a_learning_rate_that_breaks_the_model_is_one_line(copy_of, capsys):
    error = refusal(capsys, copy_of, *SMALL, "--LEARNING_RATE", 1e30, "--BITS", "None")
    assert "LEARNING_RATE far too large" in error


def test_rounding_refuses_what_has_no_blocks(script):
    class Config:
        model_type, name_or_path = "other", "other"

        def get_text_config(self) -> Config:
            return self

    model = torch.nn.Linear(2, 2)
    model.config = Config()
    with pytest.raises(UserError, match="is not supported"):
        script.round_weights(model, 4, 32)
