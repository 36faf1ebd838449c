"""The list of the most harmful dialogues: the ones that step 4 unlearns, and the dialogues without them."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
from conftest import Workspace, contents, read_rows, run_script, write_rows

from steps import load_script
from utils.console import shown_path
from utils.paths import LIST_HARMFUL, PROJECT_ROOT, STEP_1, STEP_2, STEP_4, gradients_file
from utils.settings import load_settings

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


def listed(workspace: Workspace, task: str, bottom_k: int, scores_type: str = "pure_ekfac") -> pd.DataFrame:
    name = f"{task}_{workspace.model.name}_{scores_type}_bottom{bottom_k}.csv"
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
    table = listed(traced, task, 7, scores_type)
    assert table["row"].tolist() == unlearned
    assert table["rank"].tolist() == list(range(1, 8))
    assert table["score"].is_monotonic_increasing
    rows = read_rows(traced.data / "hh" / "train.jsonl")
    assert table["chosen"].tolist() == [" ".join(rows[row]["chosen"].split()) for row in unlearned]
    shown = capsys.readouterr().out
    assert all(f" {row} |" in shown for row in unlearned)


def test_lists_by_other_scores_have_names_and_captions_of_their_own(copy_of, capsys):
    copy_of.run(STEP_1, "--TASK_NAME", "bias", "--FACTOR_STRATEGY", "kfac", "--SEED", 7)
    common = ["--TASK_NAME", "bias", "--BOTTOM_K", 3]
    for scores_type, name, told in (
        ("pure_ekfac", "pure_ekfac", "(FACTOR_STRATEGY ekfac, SEED 42, USE_HALF_PRECISION False)"),
        ("pure_ekfac", "pure_ekfac_kfac_seed7", "(FACTOR_STRATEGY kfac, SEED 7, USE_HALF_PRECISION False)"),
        ("bm25", "bm25", "that bm25 ranks"),
    ):
        capsys.readouterr()
        other = ["--FACTOR_STRATEGY", "kfac", "--SEED", 7] if "_kfac" in name else []
        copy_of.run(LIST_HARMFUL, *common, "--SCORES_TYPE", scores_type, *other)
        assert told in capsys.readouterr().out
        assert len(listed(copy_of, "bias", 3, name)) == 3


def test_lists_with_other_weights_of_the_tasks_have_names_of_their_own(copy_of, capsys):
    common = ["--TASK_NAME", "combined", "--BOTTOM_K", 5]
    for weights, name in (([1, 1, 1], "pure_ekfac"), ([1, 0, 0.5], "pure_ekfac_weights1-0-0.5")):
        capsys.readouterr()
        copy_of.run(LIST_HARMFUL, *common, "--TASK_WEIGHTS", *weights)
        assert f"TASK_WEIGHTS {[float(weight) for weight in weights]}" in capsys.readouterr().out
        assert len(listed(copy_of, "combined", 5, name)) == 5


def test_the_scores_are_those_of_step_1(traced):
    from safetensors.torch import load_file

    traced.run(LIST_HARMFUL, "--TASK_NAME", "bias", "--BOTTOM_K", 60)
    (file,) = (traced.output / "ekfac_experiments").rglob("bias_*/scores_ekfac/pairwise_scores.safetensors")
    scores = load_file(file)["all_modules"][0]
    table = listed(traced, "bias", 60)
    assert table["row"].tolist() == scores.argsort().tolist()
    assert table["score"].tolist() == pytest.approx(scores.sort().values.tolist())


def test_known_harm_is_shown(copy_of, tmp_path, capsys):
    arguments = ["--TASK_NAME", "truth", "--BOTTOM_K", 2]
    copy_of.run(LIST_HARMFUL, *arguments)
    assert "known harm" not in capsys.readouterr().out.lower()
    first, second = map(int, listed(copy_of, "truth", 2)["row"])
    others = [row for row in range(60) if row not in (first, second)]
    planted = {"truth": [second, others[-1]], "bias": [second, others[0]]}
    (copy_of.data / "hh" / "planted.json").write_text(json.dumps(planted))
    cleaned = tmp_path / "cleaned"
    copy_of.run(LIST_HARMFUL, *arguments, "--CLEANED_DATASET", cleaned)
    assert "Known harm: 1 of 2 of truth, 1 of 2 of bias." in capsys.readouterr().out
    assert listed(copy_of, "truth", 2)["known_harm"].tolist() == ["", "truth, bias"]
    left = json.loads((cleaned / "planted.json").read_text())
    rows, kept = (read_rows(folder / "train.jsonl") for folder in (copy_of.data / "hh", cleaned))
    for kind, row in (("truth", others[-1]), ("bias", others[0])):
        (position,) = left[kind]
        assert kept[position]["chosen"] == rows[row]["chosen"]


def test_every_model_has_its_own_list(traced, tiny_models, tmp_path, capsys):
    """Names with a dot, as those of the paper's models, are not cut at it."""
    names = ["tiny-1.4b", "tiny-1.4b-sft"]
    for name, family in zip(names, ("pythia", "qwen"), strict=True):
        shutil.copytree(tiny_models[family], tmp_path / name)
    models = [tmp_path / name for name in names]
    common = ["--HH_DATASET", traced.data / "hh", "--DATA_DIR", traced.data, "--OUTPUT_DIR", tmp_path / "output"]
    run_script(STEP_1, *common, "--MODEL_NAMES", *models, "--TASK_NAME", "bias")
    cleaned = tmp_path / "cleaned"
    arguments = ["--TASK_NAME", "bias", "--BOTTOM_K", 5, "--CLEANED_DATASET", cleaned]
    run_script(LIST_HARMFUL, *common, "--MODEL_NAMES", *models, *arguments)
    folder = tmp_path / "output" / "results" / "harmful"
    assert {file.name for file in folder.iterdir()} == {
        f"bias_{name}_pure_ekfac_bottom5.{ending}" for name in names for ending in ("csv", "md", "tex")
    }
    lists = [set(pd.read_csv(folder / f"bias_{name}_pure_ekfac_bottom5.csv")["row"]) for name in names]
    assert lists[0] != lists[1]
    assert len(read_rows(cleaned / "train.jsonl")) == 60 - len(lists[0] | lists[1])
    made = json.loads((cleaned / "manifest.json").read_text())
    assert made["settings"]["MODEL_NAMES"] == names
    assert made["settings"]["BOTTOM_K"] == 5


def test_a_long_list_is_printed_in_part(traced, capsys):
    traced.run(LIST_HARMFUL, "--TASK_NAME", "bias", "--BOTTOM_K", 50)
    shown = capsys.readouterr().out
    table = listed(traced, "bias", 50)
    assert len(re.findall(r"^\| .* \|$", shown, flags=re.MULTILINE)) == 21
    assert len(table) == 50
    assert f"{(table['score'] > 0).sum()} of these are positive" in shown


def test_the_cleaned_dialogues_are_the_others(traced, tmp_path, capsys):
    cleaned = tmp_path / "cleaned"
    arguments = ["--BOTTOM_K", 4, "--CLEANED_DATASET", cleaned]
    traced.run(LIST_HARMFUL, *arguments)
    left_out = {row for task in TASKS for row in listed(traced, task, 4)["row"]}
    assert len(left_out) > 4, "the tasks do not all list the same"
    rows = read_rows(traced.data / "hh" / "train.jsonl")
    kept = [{name: row[name] for name in ("prompt", "chosen")} for n, row in enumerate(rows) if n not in left_out]
    assert read_rows(cleaned / "train.jsonl") == kept
    test = read_rows(traced.data / "hh" / "test.jsonl")
    assert [row["chosen"] for row in read_rows(cleaned / "test.jsonl")] == [row["chosen"] for row in test]
    shown = capsys.readouterr().out
    assert f"{60 - len(left_out)} of 60 dialogues are left" in shown
    folders = f"--HH_DATASET {cleaned} --SFT_MODEL_DIR {cleaned}-sft\n"
    assert f"next: python data/make_sft_model.py --BASE_MODEL BASE {folders}" in shown
    settings = load_settings(load_script(LIST_HARMFUL), ["--CLEANED_DATASET", str(cleaned)])
    load_script(LIST_HARMFUL).say_next(settings)
    assert f"next: python data/make_sft_model.py {folders}" in capsys.readouterr().out, "the demo's model"
    assert json.loads((cleaned / "manifest.json").read_text())["left_out"] == sorted(left_out)
    before = contents(cleaned)
    traced.run(LIST_HARMFUL, *arguments)
    assert contents(cleaned) == before
    lists = contents(traced.output / "results" / "harmful")
    with pytest.raises(SystemExit):
        traced.run(LIST_HARMFUL, "--BOTTOM_K", 5, "--CLEANED_DATASET", cleaned)
    refusal = capsys.readouterr().err
    assert "BOTTOM_K = 4 there, 5 now" in refusal
    assert "another CLEANED_DATASET" in refusal
    assert contents(cleaned) == before
    assert contents(traced.output / "results" / "harmful") == lists
    traced.run(LIST_HARMFUL, "--BOTTOM_K", 5, "--CLEANED_DATASET", cleaned, "--OVERWRITE", True)
    assert len(read_rows(cleaned / "train.jsonl")) < len(kept)


@pytest.fixture
def refused(copy_of, capsys):
    """Runs the script, which must refuse before it changes anything, and gives its one line."""

    def run(*arguments: object) -> str:
        before = contents(copy_of.output.parent)
        with pytest.raises(SystemExit) as stop:
            copy_of.run(LIST_HARMFUL, *arguments)
        assert stop.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert contents(copy_of.output.parent) == before
        return line

    return run


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_must_stay_is_never_replaced(copy_of, refused, tmp_path, overwrite):
    own = tmp_path / "own"
    write_rows(own / "train.jsonl", [{"prompt": "mine", "chosen": "mine"}])
    copy_of.run(LIST_HARMFUL)
    inside = [copy_of.data / "hh", copy_of.data, copy_of.output, copy_of.model.parent, PROJECT_ROOT]
    others = [own, copy_of.output / "ekfac_experiments", copy_of.output / "results", PROJECT_ROOT / "utils"]
    others.append(next((copy_of.output / "ekfac_experiments").rglob("factors_ekfac")))  # has a manifest, another's
    for folder in (*inside, *others):
        line = refused("--CLEANED_DATASET", folder, "--OVERWRITE", overwrite)
        if folder in inside:
            assert f"CLEANED_DATASET = {str(folder)!r}: " in line
            assert "lies there" in line
        else:
            assert f"{shown_path(folder)} already exists and " in line
            assert "move it away, or choose another CLEANED_DATASET" in line
    assert "CLEANED_DATASET" in refused("--CLEANED_DATASET", own / "train.jsonl" / "below")
    for content in ("[]", "{", '{"made_by": "evaluation_scripts/list_harmful.py"}'):
        (own / "manifest.json").write_text(content)
        line = refused("--CLEANED_DATASET", own, "--OVERWRITE", overwrite)
        assert "move the folder away, or choose another CLEANED_DATASET" in line


def test_too_many_dialogues_are_one_line(copy_of, refused, tmp_path):
    assert "BOTTOM_K = 61: there are 60" in refused("--BOTTOM_K", 61)
    line = refused("--BOTTOM_K", 60, "--CLEANED_DATASET", tmp_path / "cleaned")
    assert "BOTTOM_K = 60: the lists hold all 60 training dialogues" in line


def test_missing_scores_name_step_1(copy_of, refused):
    shutil.rmtree(copy_of.output / "ekfac_experiments")
    assert "run compute_factors_and_scores.py first" in refused()
