"""Validation of scores: its statistics against scipy and plain loops, and retrainings that are killed and shared."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Workspace, run_process, run_script
from datasets import load_from_disk
from safetensors.torch import load_file, save_file
from scipy import stats

from steps import load_script
from utils import fine_tuning
from utils import retraining as retraining_module
from utils.locks import locked, locked_if_free
from utils.paths import PROJECT_ROOT

SCRIPT = "evaluation_scripts/validate_scores.py"
SFT = "data/make_sft_model.py"
RECIPE = ["--NUM_EPOCHS", "1", "--LEARNING_RATE", "1e-3", "--BATCH_SIZE", "16"]
SMALL = ["--NUM_SUBSETS", "5", "--NUM_REPEATS", "2", "--BOTTOM_K", "5", "--TRAINING_SEEDS", "0", "1"]
KILLS = int(os.environ.get("KILLS", "2"))  # more for a campaign, up to 12
NUM_RETRAININGS = 5 * 2 + 2 * (1 + 1 + 3 + 3)
TYPES = ["--SCORES_TYPES", "pure_ekfac", "bm25", "--REMOVED_TYPES", "pure_ekfac", "--HELPFUL_TYPES", "bm25"]


@pytest.fixture(scope="module")
def validate():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def fine_tuned(tiny_models, small_data, tmp_path_factory) -> Path:
    """A POST-SFT model made from the tiny one."""
    folder = tmp_path_factory.mktemp("sft") / "tiny-sft"
    where = ["--BASE_MODEL", tiny_models["pythia"], "--HH_DATASET", small_data / "hh", "--SFT_MODEL_DIR", folder]
    run_script(SFT, *where, *RECIPE)
    return folder


@pytest.fixture
def prepared(fine_tuned, tiny_models, small_data, tmp_path) -> tuple[Workspace, list[str]]:
    """A workspace, and the arguments of a small validation."""
    workspace = Workspace(fine_tuned, small_data, tmp_path / "output")
    return workspace, ["--BASE_MODEL", str(tiny_models["pythia"]), *RECIPE, *SMALL, *TYPES]


@pytest.fixture(scope="module")
def undisturbed(fine_tuned, tiny_models, small_data, tmp_path_factory) -> dict[str, dict]:
    """The manifests of a small validation that nothing stopped, by retraining."""
    workspace = Workspace(fine_tuned, small_data, tmp_path_factory.mktemp("undisturbed") / "output")
    workspace.run(SCRIPT, "--BASE_MODEL", tiny_models["pythia"], *RECIPE, *SMALL, *TYPES)
    return retrainings(workspace)


def retrainings(workspace: Workspace) -> dict[str, dict]:
    folder = workspace.output / "results" / "validation" / workspace.model.name / "retrainings"
    found = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.suffix != ".partial")
    return {path.name: json.loads((path / "manifest.json").read_text(encoding="utf-8")) for path in found}


def test_spearman_is_scipys(validate):
    generator = np.random.default_rng(0)
    a, b = generator.integers(6, size=(2, 4, 30)).astype(float)  # with ties
    a[3] = 1.0
    for row, value in enumerate(validate.spearman(a, b)):
        expected = 0.0 if row == 3 else stats.spearmanr(a[row], b[row]).statistic
        assert value == pytest.approx(expected, abs=1e-12)


def test_lds_is_the_mean_correlation_with_single_retrainings_and_resamples_pair(validate, monkeypatch):
    monkeypatch.setattr(validate, "NUM_RESAMPLES", 50)
    generator = np.random.default_rng(1)
    predicted, measured = generator.normal(size=(3, 20)), generator.normal(size=(2, 3, 20))
    measured += predicted
    values, resamples = validate.resampled_spearman(predicted, measured, seed=7)
    for task in range(3):
        expected = [stats.spearmanr(predicted[task], repeat[task]).statistic for repeat in measured]
        assert values[task] == pytest.approx(np.mean(expected))
    draws = np.random.default_rng(7).integers(20, size=(50, 20))
    expected = [stats.spearmanr(predicted[1][draws[9]], repeat[1][draws[9]]).statistic for repeat in measured]
    assert resamples[9, 1] == pytest.approx(np.mean(expected))
    intervals = validate.with_bootstrap(values, resamples)
    assert len(intervals) == 4
    assert intervals[3]["value"] == pytest.approx(values.mean())
    assert all(one["low"] < one["value"] < one["high"] for one in intervals)
    again, _ = validate.resampled_spearman(predicted, measured, seed=8)
    assert (again == values).all()


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say(validate, monkeypatch):
    """Of 200 samples of 60 correlated pairs, 95 % intervals of Spearman's correlation cover it about 190 times."""
    monkeypatch.setattr(validate, "NUM_RESAMPLES", 300)
    generator, truth, covered = np.random.default_rng(0), 6 / np.pi * np.arcsin(0.6 / 2), 0
    for _ in range(200):
        a, noise = generator.normal(size=(2, 60))
        b = 0.6 * a + 0.8 * noise
        value, resamples = validate.resampled_spearman(a[None], b[None, None], seed=0)
        (interval, _) = validate.with_bootstrap(value, resamples)
        covered += interval["low"] <= truth <= interval["high"]
    assert 178 <= covered <= 198


def test_the_sign_of_lds(validate):
    """Dialogues that help (positive score) lower the loss of the model fine-tuned on them: LDS 1."""
    settings = validate_settings(validate, NUM_SUBSETS=8, SEED=0)
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    halves = validate.random_halves(settings, 40)
    measured = [
        [
            {
                f"{task}_{split}": -float(scores[t, rows].sum())
                for t, task in enumerate(validate.TASK_NAMES)
                for split in ("train", "test")
            }
            for rows in halves
        ]
        for _ in range(2)
    ]
    rows = list(validate.lds_rows(settings, {"pure_ekfac": scores, "bm25": -scores}, halves, measured))
    by_name = {(row["split"], row["predicted_by"]): row["lds"][-1]["value"] for row in rows}
    assert by_name["train", "pure_ekfac"] == by_name["test", "pure_ekfac"] == pytest.approx(1)
    assert by_name["train", "bm25"] == pytest.approx(-1)
    assert by_name["train", "the same halves, trained again"] == pytest.approx(1)
    difference = next(row for row in rows if row["predicted_by"] == "bm25")["against_pure_ekfac"]
    assert difference["value"] == pytest.approx(-2)


def validate_settings(validate, **constants: object):
    defaults = {name: getattr(validate, name) for name in vars(validate) if name in validate.__annotations__}
    return validate.Settings(**{**defaults, **constants})


def test_halves_and_removals_are_what_they_say(validate):
    settings = validate_settings(validate, NUM_SUBSETS=5, BOTTOM_K=3, TRAINING_SEEDS=[0, 1], SCORES_TYPES=["bm25"])
    settings.REMOVED_TYPES = settings.HELPFUL_TYPES = ["bm25"]
    halves = validate.random_halves(settings, 31)
    assert all(len(set(rows)) == 15 and rows == sorted(rows) for rows in halves)
    assert len({tuple(rows) for rows in halves}) == 5
    runs = [one for repeat in validate.retrainings_on_halves(settings, halves) for one in repeat]
    assert len({one.seed for one in runs}) == len({one.name for one in runs}) == 10
    scores = {"bm25": torch.arange(31.0).repeat(3, 1)}
    planned = validate.removals(settings, scores, 31)
    assert planned["bias", "bm25", "harmful"][0].rows == list(range(3, 31))
    assert planned["truth", "bm25", "helpful"][1].rows == list(range(28))
    at_random = planned["", "random", None]
    assert {len(one.rows) for one in at_random} == {28}
    assert at_random[0].rows != at_random[1].rows
    assert [one.rows for one in planned["", "none", None]] == [list(range(31))] * 2


def test_removal_rows_pair_by_seed(validate):
    settings = validate_settings(validate, BOTTOM_K=3, TRAINING_SEEDS=[0, 1, 2], SCORES_TYPES=["bm25"])
    settings.REMOVED_TYPES, settings.HELPFUL_TYPES = ["bm25"], ["bm25"]
    planned = validate.removals(settings, {"bm25": torch.arange(31.0).repeat(3, 1)}, 31)
    generator = np.random.default_rng(0)
    names = [*(f"{task}_test" for task in validate.TASK_NAMES), "anthropic_test"]
    measured = {
        one.name: {name: float(generator.normal()) for name in names} for some in planned.values() for one in some
    }
    rows = {(row["task"], row["direction"]): row for row in validate.removal_rows(planned, measured)}
    after = [measured[one.name]["ethics_test"] for one in planned["ethics", "bm25", "harmful"]]
    at_random = [measured[one.name]["ethics_test"] for one in planned["", "random", None]]
    differences = np.array(at_random) - after
    row = rows["ethics", "harmful"]
    assert row["ethics_beyond_random"] == pytest.approx(differences.mean())
    interval = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert (row["ethics_beyond_random_low"], row["ethics_beyond_random_high"]) == pytest.approx(interval)


def test_a_whole_validation(prepared):
    workspace, arguments = prepared
    workspace.run(SCRIPT, *arguments)
    made = retrainings(workspace)
    assert len(made) == NUM_RETRAININGS
    folder = workspace.output / "results" / "validation" / workspace.model.name
    table = (folder / "lds_train.md").read_text(encoding="utf-8")
    assert "| pure_ekfac" in table
    assert "| the same halves, trained again" in table
    assert "harmful for truth" in (folder / "removal.md").read_text(encoding="utf-8")
    assert (folder / "validation.png").stat().st_size > 10_000
    assert not list(folder.rglob("*.partial"))
    assert not list(folder.rglob("checkpoint-*"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    workspace.run(SCRIPT, *arguments)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == before


def test_a_retraining_is_the_fine_tuning_of_step_0(prepared):
    """On all dialogues, with the seed of the model, the measurements are those of the POST-SFT model itself."""
    workspace, arguments = prepared
    workspace.run(SCRIPT, *arguments, "--TRAINING_SEEDS", 42, 0)
    whole = retrainings(workspace)["whole-42"]["measured"]
    for task, script in (("bias", "bias_loss"), ("truth", "truth_loss"), ("anthropic", "anthropic_eval")):
        workspace.run(f"evaluation_scripts/{script}.py")
        file = workspace.output / "results" / f"{workspace.model.name}_{task}_test.json"
        assert whole[f"{task}_test"] == pytest.approx(json.loads(file.read_text())["loss"], rel=1e-5)


def test_a_killed_validation_goes_on_with_the_next_retraining(prepared, undisturbed):
    """Killed any number of times, nothing that was finished is done again, and the rest comes out as undisturbed."""
    workspace, arguments = prepared
    folder = workspace.output / "results" / "validation" / workspace.model.name / "retrainings"
    command = [sys.executable, str(PROJECT_ROOT / SCRIPT), *workspace.arguments(SCRIPT), *arguments]
    finished: dict[Path, int] = {}
    for _ in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target, deadline = len(finished) + 2, time.monotonic() + 120
        while process.poll() is None and len(list(folder.glob("*/manifest.json"))) < target:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.random() / 2)
        process.kill()
        process.wait()
        found = {
            path: path.stat().st_mtime_ns for path in folder.glob("[!.]*/manifest.json") if ".partial" not in str(path)
        }
        assert finished.items() <= found.items()
        finished = found
    assert finished
    workspace.run(SCRIPT, *arguments)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    made = retrainings(workspace)
    assert made.keys() == undisturbed.keys()
    assert all(made[name]["measured"] == pytest.approx(undisturbed[name]["measured"], rel=1e-6) for name in made)
    assert not [path for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".partial"]


def test_two_runs_share_the_retrainings(prepared):
    """Both end well with one result, no retraining is computed twice, and each run does some."""
    workspace, arguments = prepared
    code = (
        "import sys; from steps import load_script; from utils import retraining\n"
        "script = load_script(sys.argv.pop(1))\n"
        "train = retraining.Retrainer._retrain\n"
        "def counted(self, one, *rest):\n    print('computes', one.name, flush=True); train(self, one, *rest)\n"
        "retraining.Retrainer._retrain = counted\n"
        "script.run_step(script.main, sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, SCRIPT, *workspace.arguments(SCRIPT), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": PROJECT_ROOT}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    computed = [re.findall("computes (.*)$", output, flags=re.MULTILINE) for output in outputs]
    assert all(computed)
    assert sorted(computed[0] + computed[1]) == sorted(retrainings(workspace))
    assert len(retrainings(workspace)) == NUM_RETRAININGS
    assert not list(workspace.output.rglob(".*.lock"))
    tables = [re.findall(r"^\| (?:harmful|helpful|any).*$", output, flags=re.MULTILINE) for output in outputs]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 7


def test_several_processes_train_one_model_together(prepared, undisturbed):
    """Started by torchrun, the same retrainings come out, but for what rounding makes of a training."""
    workspace, arguments = prepared
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(PROJECT_ROOT / SCRIPT)]
    command = [*launcher, *workspace.arguments(SCRIPT), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    together = retrainings(workspace)
    assert together.keys() == undisturbed.keys()
    for name, manifest in together.items():
        assert manifest["processes"] == 2
        assert manifest["measured"] == pytest.approx(undisturbed[name]["measured"], rel=0.02, abs=0.02)


def test_a_retraining_that_was_killed_goes_on_from_its_checkpoint(prepared, undisturbed, monkeypatch):
    """Killed between optimizer steps and at its very end, it measures what it would have."""
    workspace, arguments = prepared
    arguments = [*arguments, "--SAVE_EVERY", "1"]
    for attribute, owner in (("on_step_end", fine_tuning.Progress), ("set_checkpoints_aside", retraining_module)):
        with monkeypatch.context() as patch:
            original, calls = getattr(owner, attribute), []

            def killed(*positional: object, original=original, calls=calls, **keywords: object) -> object:
                calls.append(1)
                if len(calls) == 4:  # in the second retraining of two steps
                    raise KeyboardInterrupt
                return original(*positional, **keywords)

            patch.setattr(owner, attribute, killed)
            with pytest.raises(SystemExit) as stop:
                workspace.run(SCRIPT, *arguments)
            assert stop.value.code == 130
        assert list((workspace.output / "results").rglob("*.partial/checkpoint-*"))
    workspace.run(SCRIPT, *arguments)
    for name, manifest in retrainings(workspace).items():
        assert manifest["measured"] == pytest.approx(undisturbed[name]["measured"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--NUM_EPOCHS", "2"], "NUM_EPOCHS = 1 there, 2 now"),
        (["--LEARNING_RATE", "5e-4"], "LEARNING_RATE = 0.001 there, 0.0005 now"),
        (["--BASE_SEED", "7"], "SEED = 42 there, 7 now"),
        (["--BOTTOM_K", "31"], "BOTTOM_K = 31: there are 60 training dialogues; allowed: 1 to 30"),
        (["--NUM_SUBSETS", "4"], "NUM_SUBSETS = 4: allowed are whole numbers from 5"),
        (["--REMOVED_TYPES", "identity"], "REMOVED_TYPES has 'identity'; allowed are those of SCORES_TYPES"),
        (["--SCORES_TYPES", "random"], "SCORES_TYPES = random: allowed is a list of"),
        (["--DEVICE", "spread"], "DEVICE = 'spread': allowed here are auto, cpu and cuda"),
        (["--BATCH_SIZE", "24"], "BATCH_SIZE = 24: must be a multiple of 16"),
        (["--TRAINING_SEEDS", "1", "1"], "TRAINING_SEEDS = [1, 1]: 1 is given twice"),
    ],
)
def test_bad_constants_are_one_line(prepared, capsys, arguments, line):
    workspace, common = prepared
    with pytest.raises(SystemExit) as stop:
        workspace.run(SCRIPT, *common, *arguments)
    assert stop.value.code == 1
    (error,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error:")]
    assert line in error
    assert not (workspace.output / "results" / "validation").exists()


def test_a_bare_architecture_starts_from_its_own_random_weights(small_data, tmp_path):
    model = tmp_path / "bare-sft"
    bare = ["--BASE_MODEL", "qwen-demo", *RECIPE]
    run_script(SFT, *bare, "--HH_DATASET", small_data / "hh", "--SFT_MODEL_DIR", model, "--SEED", 7)
    workspace = Workspace(model, small_data, tmp_path / "output")
    few = ["--NUM_SUBSETS", 5, "--NUM_REPEATS", 1, "--BOTTOM_K", 5, "--TRAINING_SEEDS", 7, 0]
    types = ["--SCORES_TYPES", "bm25", "--REMOVED_TYPES", "bm25", "--HELPFUL_TYPES", "bm25"]
    workspace.run(SCRIPT, *bare, *few, *types, "--BASE_SEED", 7)
    workspace.run("evaluation_scripts/ethics_loss.py")
    file = workspace.output / "results" / "bare-sft_ethics_test.json"
    whole = retrainings(workspace)["whole-7"]["measured"]
    assert whole["ethics_test"] == pytest.approx(json.loads(file.read_text())["loss"], rel=1e-5)


def test_a_repaired_model_is_not_fine_tuned_again(prepared, capsys):
    workspace, arguments = prepared
    workspace.run("compute_factors_and_scores.py")
    workspace.run("make_gradients.py", "--TASK_NAME", "bias", "--BOTTOM_K", 5)
    workspace.run("gradient_ascent_and_save.py", "--TASK_NAME", "bias", "--BOTTOM_K", 5)
    (repaired,) = (workspace.output / "gradient_ascent_models").glob("bias_*")
    other = Workspace(repaired, workspace.data, workspace.output)
    with pytest.raises(SystemExit):
        other.run(SCRIPT, *arguments)
    assert "was made by gradient_ascent_and_save.py, and only a fine-tuning" in capsys.readouterr().err


def test_the_picture_of_a_perfect_score(validate, tmp_path):
    """A value at the very end of its interval, or outside of it, is no error."""
    interval = {"value": 1.0, "low": 1.0 + 1e-16, "high": 0.99}
    rows = [{"split": "train", "predicted_by": "bm25", "lds": [interval] * 4}]
    validate.validation_figure(rows, [], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1_000


def test_other_dialogues_than_those_of_the_model_are_refused(prepared, data_copy, capsys):
    workspace, arguments = prepared
    train = data_copy / "hh" / "train.jsonl"
    train.write_text("".join(train.read_text(encoding="utf-8").splitlines(keepends=True)[:50]), encoding="utf-8")
    with pytest.raises(SystemExit):
        workspace.run(SCRIPT, *arguments, "--HH_DATASET", data_copy / "hh")
    assert "was fine-tuned with other settings: dataset" in capsys.readouterr().err


def test_a_lock_that_another_run_holds_is_passed_over(tmp_path):
    path = tmp_path / "artifact"
    code = (
        "import sys, time; from pathlib import Path; from utils.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True, cwd=PROJECT_ROOT
    )
    try:
        assert other.stdout.readline() == "held\n"
        with locked_if_free(path) as is_ours:
            assert not is_ours
    finally:
        other.kill()
        other.wait()
    with locked_if_free(path) as is_ours:
        assert is_ours
        with locked(path):  # which this run holds already
            pass
    assert not list(tmp_path.iterdir())


def test_help_lists_the_constants():
    shown = run_process(SCRIPT, "--help")
    assert shown.returncode == 0
    assert "NUM_SUBSETS = 60" in shown.stdout


def test_other_libraries_scores_are_compared_on_the_same_retrainings(prepared, tmp_path, capsys):
    """Given this project's own scores in a file, the LDS is its own; and the texts for others are its own tokens."""
    workspace, arguments = prepared
    workspace.run(SCRIPT, *arguments)
    own = {
        task: load_file(next(workspace.output.rglob(f"{task}_*/scores_ekfac/pairwise_scores.safetensors")))
        for task in ("bias", "ethics", "truth")
    }
    file = tmp_path / "theirs.safetensors"
    save_file({task: scores["all_modules"][0].clone() for task, scores in own.items()}, file)
    capsys.readouterr()
    comparison = "benchmarks/lds_of_others.py"
    workspace.run(comparison, "--SCORES_FILE", file, "--NUM_SUBSETS", 5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in lines if "correlation of the two" in line] == ["1.000"] * 3
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if re.match(r"\| (pure_ekfac|theirs) ", line)]
    assert len(rows) == 4
    assert rows[0][3:7] == rows[1][3:7]
    assert rows[2][3:7] == rows[3][3:7]
    workspace.run(comparison, "--TOKENIZED", tmp_path / "tokenized")
    train = load_from_disk(tmp_path / "tokenized" / "train")
    assert len(train) == 60
    assert sum(label != -100 for label in train[3]["labels"]) > 0
    chosen, rejected = (load_from_disk(tmp_path / "tokenized" / f"truth_{side}") for side in ("chosen", "rejected"))
    assert len(chosen) == len(rejected) == 16
