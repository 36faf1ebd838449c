"""The list of the most harmful dialogues: the ones that step 4 unlearns, and the dialogues without them."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
from conftest import Workspace, contents, read_rows, write_rows

from utils.paths import LIST_HARMFUL, STEP_1, STEP_2, STEP_4, gradients_file

TASKS = ("bias", "ethics", "truth")


@pytest.fixture(scope="module")
def traced(make_workspace) -> Workspace:
    workspace = make_workspace("pythia")
    workspace.run(STEP_1)
    workspace.run(STEP_2, "--ANSWERS_OF", "all")
    return workspace


@pytest.fixture
def copy_of(traced, data_copy, tmp_path) -> Workspace:
    """The traced model in a workspace that a test may spoil."""
    output = shutil.copytree(traced.output, tmp_path / "output")
    return Workspace(traced.model, data_copy, output)


def listed(workspace: Workspace, task: str, scores_type: str = "pure_ekfac") -> pd.DataFrame:
    name = f"{task}_{workspace.model.name}_{scores_type}.csv"
    return pd.read_csv(workspace.output / "results" / "harmful" / name, keep_default_na=False)


@pytest.mark.parametrize("scores_type", ["pure_ekfac", "representation", "bm25"])
@pytest.mark.parametrize("task", ["ethics", "combined"])
def test_the_list_is_what_step_4_unlearns(traced, task, scores_type, capsys):
    arguments = ["--TASK_NAME", task, "--SCORES_TYPE", scores_type, "--BOTTOM_K", 7]
    traced.run(STEP_4, *arguments)
    gradients = gradients_file(traced.output, task, traced.model.name, f"{scores_type}_bottom7", seed=42)
    unlearned = json.loads(gradients.with_name("aggregated_query_grads.manifest.json").read_text())["indices"]
    capsys.readouterr()
    traced.run(LIST_HARMFUL, *arguments)
    table = listed(traced, task, scores_type)
    assert table["row"].tolist() == unlearned
    assert table["rank"].tolist() == list(range(1, 8))
    assert table["score"].is_monotonic_increasing
    rows = read_rows(traced.data / "hh" / "train.jsonl")
    assert table["chosen"].tolist() == [" ".join(rows[row]["chosen"].split()) for row in unlearned]
    shown = capsys.readouterr().out
    assert all(f" {row} |" in shown for row in unlearned)


def test_the_scores_are_those_of_step_1(traced):
    from safetensors.torch import load_file

    traced.run(LIST_HARMFUL, "--TASK_NAME", "bias", "--BOTTOM_K", 60)
    (file,) = (traced.output / "ekfac_experiments").rglob("bias_*/scores_ekfac/pairwise_scores.safetensors")
    scores = load_file(file)["all_modules"][0]
    table = listed(traced, "bias")
    assert table["row"].tolist() == scores.argsort().tolist()
    assert table["score"].tolist() == pytest.approx(scores.sort().values.tolist())


def test_known_harm_is_shown(copy_of, capsys):
    copy_of.run(LIST_HARMFUL, "--TASK_NAME", "truth", "--BOTTOM_K", 2)
    assert "known harm" not in capsys.readouterr().out.lower()
    first, second = listed(copy_of, "truth")["row"]
    (copy_of.data / "hh" / "planted.json").write_text(json.dumps({"truth": [int(second)]}))
    copy_of.run(LIST_HARMFUL, "--TASK_NAME", "truth", "--BOTTOM_K", 2)
    shown = capsys.readouterr().out
    assert "known harm |" in shown
    assert "Known harm among them: 1 of truth." in shown
    assert listed(copy_of, "truth")["known_harm"].tolist() == ["", "truth"]


def test_the_cleaned_dialogues_are_the_others(traced, tmp_path, capsys):
    cleaned = tmp_path / "cleaned"
    arguments = ["--BOTTOM_K", 4, "--CLEANED_DATASET", cleaned]
    traced.run(LIST_HARMFUL, *arguments)
    left_out = {row for task in TASKS for row in listed(traced, task)["row"]}
    assert len(left_out) > 4, "the tasks do not all list the same"
    rows = read_rows(traced.data / "hh" / "train.jsonl")
    kept = [{name: row[name] for name in ("prompt", "chosen")} for n, row in enumerate(rows) if n not in left_out]
    assert read_rows(cleaned / "train.jsonl") == kept
    test = read_rows(traced.data / "hh" / "test.jsonl")
    assert [row["chosen"] for row in read_rows(cleaned / "test.jsonl")] == [row["chosen"] for row in test]
    assert f"{60 - len(left_out)} of 60 dialogues are left" in capsys.readouterr().out
    assert json.loads((cleaned / "manifest.json").read_text())["left_out"] == sorted(left_out)
    before = contents(cleaned)
    traced.run(LIST_HARMFUL, *arguments)
    assert contents(cleaned) == before
    with pytest.raises(SystemExit):
        traced.run(LIST_HARMFUL, "--BOTTOM_K", 5, "--CLEANED_DATASET", cleaned)
    assert "was made with other settings" in capsys.readouterr().err
    assert contents(cleaned) == before
    traced.run(LIST_HARMFUL, "--BOTTOM_K", 5, "--CLEANED_DATASET", cleaned, "--OVERWRITE", True)
    assert len(read_rows(cleaned / "train.jsonl")) < len(kept)


def refused(workspace: Workspace, capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        workspace.run(LIST_HARMFUL, *arguments)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_must_stay_is_never_replaced(copy_of, tmp_path, capsys):
    own = tmp_path / "own"
    write_rows(own / "train.jsonl", [{"prompt": "mine", "chosen": "mine"}])
    before = contents(tmp_path)
    for folder in (copy_of.data / "hh", copy_of.data, copy_of.output):
        line = refused(copy_of, capsys, "--CLEANED_DATASET", folder, "--OVERWRITE", True)
        assert f"CLEANED_DATASET = {str(folder)!r}: " in line
        assert "lies there" in line
    assert "this project did not make" in refused(copy_of, capsys, "--CLEANED_DATASET", own)
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_too_many_dialogues_are_one_line(copy_of, tmp_path, capsys):
    assert "BOTTOM_K = 61: there are 60" in refused(copy_of, capsys, "--BOTTOM_K", 61)
    line = refused(copy_of, capsys, "--BOTTOM_K", 60, "--CLEANED_DATASET", tmp_path / "cleaned")
    assert "BOTTOM_K = 60: CLEANED_DATASET would be empty" in line
    assert not (tmp_path / "cleaned").exists()


def test_missing_scores_name_step_1(workspace, capsys):
    assert "run compute_factors_and_scores.py first" in refused(workspace, capsys)
    assert not (workspace.output / "results").exists()
