"""Artifacts are complete or absent, say what they were made from, and lie where the documentation says."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import load_script
from killing import was_killed_at
from safetensors.torch import load_file

from utils import manifests, paths
from utils.artifacts import Artifact, FileArtifact
from utils.console import UserError
from utils.files import fingerprint_of, fingerprint_of_files, read_json, remove, to_json, write_if_changed, write_locked
from utils.folder_artifacts import FolderArtifact
from utils.locks import locked
from utils.repairs import RepairChoice
from utils.tensors import require_finite

STEP = "compute_factors_and_scores.py"
VALUES = {"numbers": torch.arange(6.0).reshape(2, 3)}


class Killed(BaseException):
    """Stands for the process's end: no handler for ordinary errors sees it."""


@pytest.fixture
def artifact(tmp_path):
    return make_artifact(tmp_path)


def make_artifact(folder: Path, **changes) -> FileArtifact:
    settings = {"NUM_BLOCKS": 1, "DAMPING_FACTOR": None, **changes.pop("settings", {})}
    inputs = {"model": "m0", "dataset": "d0", **changes.pop("inputs", {})}
    return FileArtifact(folder / "out" / "scores.safetensors", STEP, settings, inputs, **changes)


def make_folder_artifact(folder: Path, **settings) -> FolderArtifact:
    return FolderArtifact(folder / "out" / "factors", STEP, {"NUM_BLOCKS": 1, **settings}, {"model": "m0"})


def save_folder(artifact: FolderArtifact, **files: str) -> None:
    with artifact.staging_folder() as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        artifact.publish_folder(time.monotonic(), {})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------ fingerprints


def test_fingerprint_depends_on_values_and_not_on_order():
    assert fingerprint_of({"a": 1, "b": [2, "x"]}) == fingerprint_of({"b": [2, "x"], "a": 1})
    assert len({fingerprint_of(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, ["a", 1], "a1", None)}) == 6


def test_fingerprint_of_files_sees_contents_and_names_but_not_the_folder(tmp_path):
    def fingerprint(folder: str, **files: str) -> str:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text, encoding="utf-8")
        return fingerprint_of_files((tmp_path / folder).iterdir())

    first = fingerprint("one", a="1", b="2")
    assert fingerprint("two", b="2", a="1") == first
    others = [fingerprint("three", a="1", b="3"), fingerprint("four", a="1", c="2"), fingerprint("five", a="12", b="")]
    assert len({first, *others}) == 4


# --------------------------------------------------------------------------------------------- writing, reading


def test_what_is_saved_is_read_again(artifact):
    assert not artifact.is_finished()
    artifact.save_tensors(VALUES, time.monotonic())
    assert artifact.is_finished()
    assert torch.equal(artifact.load_tensors()["numbers"], VALUES["numbers"])
    assert names_in(artifact.path.parent) == ["scores.manifest.json", "scores.safetensors"]


def test_manifest_says_what_the_artifact_was_made_from(artifact):
    started = time.monotonic() - 2
    artifact.save_tensors(VALUES, started, sign="positive helps")
    manifest = artifact.require()
    assert manifest["made_by"] == STEP
    assert manifest["artifact"] == "scores.safetensors"
    assert manifest["settings"] == {"NUM_BLOCKS": 1, "DAMPING_FACTOR": None}
    assert manifest["inputs"] == {"model": "m0", "dataset": "d0"}
    assert manifest["fingerprint"] == artifact.fingerprint
    assert manifest["shapes"] == {"numbers": [2, 3]}
    assert 2 <= manifest["seconds"] < 10
    assert manifest["sign"] == "positive helps"
    assert torch.__version__.startswith(manifest["versions"]["torch"])  # "+cpu" may follow
    assert {"python", "transformers", "kronfluence", "accelerate", "datasets", "numpy"} <= set(manifest["versions"])
    assert manifest["versions"]["git_commit"]


def test_git_commit_is_that_of_the_repository_or_unknown(monkeypatch, tmp_path):
    manifests.software_versions.cache_clear()
    monkeypatch.setattr(manifests, "PROJECT_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifests.software_versions()["git_commit"] == "unknown"
    manifests.software_versions.cache_clear()


@pytest.mark.parametrize("changes", [{"settings": {"NUM_BLOCKS": 2}}, {"inputs": {"model": "m1"}}])
def test_fingerprint_changes_with_settings_and_inputs(tmp_path, changes):
    assert make_artifact(tmp_path, **changes).fingerprint != make_artifact(tmp_path).fingerprint


def test_json_artifact(tmp_path):
    artifact = FileArtifact(tmp_path / "picks.json", STEP)
    artifact.save_json({"indices": [3, 1]}, time.monotonic())
    assert artifact.is_finished()
    assert json.loads(artifact.path.read_text(encoding="utf-8")) == {"indices": [3, 1]}
    assert names_in(tmp_path) == ["picks.json", "picks.manifest.json"]


def test_folder_artifact_carries_its_manifest_inside(tmp_path):
    artifact = make_folder_artifact(tmp_path)
    save_folder(artifact, a="1")
    assert artifact.is_finished()
    assert names_in(tmp_path) == ["a", "manifest.json"]


# ---------------------------------------------------------------------------------------------------- atomicity


def test_killed_at_any_file_operation_a_text_is_the_old_one_or_the_new_one(tmp_path):
    for operation in count(1):
        file = tmp_path / str(operation) / "settings.json"
        write_locked(file, "old")
        was_killed = was_killed_at(operation, partial(write_if_changed, file, "new"))
        assert file.read_text(encoding="utf-8") in ("old", "new")
        write_if_changed(file, "new")
        assert [path.name for path in file.parent.rglob("*")] == ["settings.json"]
        assert file.read_text(encoding="utf-8") == "new"
        if not was_killed:
            break
    assert operation > 5, "it was killed at many operations"


def grow_until_killed(artifact: FolderArtifact, name: str) -> None:
    with artifact.staging_folder() as folder:
        (folder / name).write_text("x", encoding="utf-8")
        raise Killed


def test_staging_folder_is_kept_for_the_same_settings_and_emptied_for_others(tmp_path):
    for blocks, name, kept in [(1, "a", ["a"]), (1, "b", ["a", "b"]), (2, "c", ["c"])]:
        artifact = make_folder_artifact(tmp_path, NUM_BLOCKS=blocks)
        with pytest.raises(Killed):
            grow_until_killed(artifact, name)
        assert not artifact.is_finished()
        assert names_in(artifact.partial_path) == [*kept, "settings.json"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", ["{", "[]", '{"name": "of an app"}'])
def test_a_folder_whose_manifest_is_broken_is_kept(tmp_path, content, overwrite):
    artifact = make_folder_artifact(tmp_path)
    save_folder(artifact, factor="1")
    artifact.manifest_path.write_text(content, encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"manifest.json .*delete the folder and run {STEP} again if that made it; else"
    ):
        artifact.is_finished(overwrite)
    assert (artifact.path / "factor").exists()


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_comes_to_the_place_during_the_work_is_kept(tmp_path, is_folder):
    artifact = make_folder_artifact(tmp_path)
    notes = artifact.path / "notes" if is_folder else artifact.path
    with artifact.staging_folder() as folder:
        (folder / "factor").write_text("1", encoding="utf-8")
        notes.parent.mkdir(exist_ok=True)
        notes.write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match="move it away"):
            artifact.publish_folder(time.monotonic(), {})
    assert notes.read_text(encoding="utf-8") == "mine"
    remove(artifact.path)
    with artifact.staging_folder():
        artifact.publish_folder(time.monotonic(), {})
    assert names_in(artifact.path) == ["factor", "manifest.json"]


@pytest.mark.parametrize("is_replacing", [False, True])
@pytest.mark.parametrize("make", [make_artifact, make_folder_artifact])
def test_killed_at_any_file_operation_it_is_whole_or_not_there_and_a_rerun_ends_as_undisturbed(
    tmp_path, make, is_replacing
):
    def save(artifact: Artifact) -> None:
        with locked(artifact.path):
            if artifact.is_finished(overwrite=True):
                return
            if isinstance(artifact, FolderArtifact):
                save_folder(artifact, factor=str(artifact.settings), other="2")
            else:
                artifact.save_tensors({"numbers": torch.full((4,), artifact.settings["NUM_BLOCKS"])}, 0.0)

    def content(artifact: Artifact) -> object:
        if isinstance(artifact, FolderArtifact):
            return {name: (artifact.path / name).read_text(encoding="utf-8") for name in ("factor", "other")}
        return artifact.load_tensors()["numbers"].tolist()

    undisturbed = make(tmp_path / "undisturbed")
    save(undisturbed)
    for operation in count(1):
        folder = tmp_path / str(operation)
        old = make(folder, settings={"NUM_BLOCKS": 3}) if make is make_artifact else make(folder, NUM_BLOCKS=3)
        new = make(folder)
        if is_replacing:
            save(old)
        if not was_killed_at(operation, partial(save, new)):
            break
        for artifact in (old, new):
            if artifact.is_finished(overwrite=True):
                content(artifact)  # can be read
        save(new)
        assert content(new) == content(undisturbed)
        everything = {str(path.relative_to(folder)) for path in folder.rglob("*")}
        assert everything == {
            str(path.relative_to(tmp_path / "undisturbed")) for path in undisturbed.path.parents[1].rglob("*")
        }
    assert operation > 12, "it was killed at many operations"


# --------------------------------------------------------------------------------------------- other settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": {"NUM_BLOCKS": 2}}, "NUM_BLOCKS = 1 there, 2 now"),
        ({"settings": {"DAMPING_FACTOR": 0.5}}, "DAMPING_FACTOR = None there, 0.5 now"),
        ({"settings": {"SEED": 7}}, "SEED = None there, 7 now"),
        ({"inputs": {"dataset": "d1"}}, "dataset = 'd0' there, 'd1' now"),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path, changes, told):
    artifact = make_artifact(tmp_path)
    artifact.save_tensors(VALUES, time.monotonic())
    other = make_artifact(tmp_path, **changes)
    with pytest.raises(UserError) as refusal:
        other.is_finished()
    message = str(refusal.value)
    assert told in message
    assert artifact.path.name in message
    assert "OVERWRITE = True" in message
    assert artifact.is_finished(), "refusing changes nothing"


def test_every_difference_is_shown(tmp_path):
    make_artifact(tmp_path).save_tensors(VALUES, time.monotonic())
    other = make_artifact(tmp_path, settings={"NUM_BLOCKS": 2, "DAMPING_FACTOR": 0.5}, inputs={"model": "m1"})
    with pytest.raises(UserError, match=r"DAMPING_FACTOR = .*; NUM_BLOCKS = .*; model = 'm0' there, 'm1' now"):
        other.is_finished()


def test_overwrite_replaces_what_other_settings_made_and_keeps_what_these_made(tmp_path):
    make_artifact(tmp_path).save_tensors(VALUES, time.monotonic())
    other = make_artifact(tmp_path, settings={"NUM_BLOCKS": 2})
    assert not other.is_finished(overwrite=True)
    other.save_tensors({"numbers": torch.ones(4)}, time.monotonic())
    assert other.is_finished(overwrite=True)
    assert other.load_tensors()["numbers"].shape == (4,)
    with pytest.raises(UserError, match="NUM_BLOCKS = 2 there, 1 now"):
        make_artifact(tmp_path).is_finished()


def test_a_reader_may_know_fewer_settings_but_none_that_differ(tmp_path):
    make_artifact(tmp_path).save_tensors(VALUES, time.monotonic())
    path = make_artifact(tmp_path).path
    assert FileArtifact(path, STEP, {"NUM_BLOCKS": 1}).require()["settings"]["DAMPING_FACTOR"] is None
    with pytest.raises(UserError, match=r"was made with NUM_BLOCKS = 1, but this step has NUM_BLOCKS = 2; .*" + STEP):
        FileArtifact(path, STEP, {"NUM_BLOCKS": 2}).require()
    with pytest.raises(UserError, match="was made with model = 'm0', but this step has model = 'm1'"):
        FileArtifact(path, STEP, {}, {"model": "m1"}).load_tensors()


# --------------------------------------------------------------------------------------------- what is broken


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("is_replacing", [False, True])
def test_nan_and_infinity_are_refused_before_anything_is_written(tmp_path, value, is_replacing):
    artifact = make_artifact(tmp_path)
    if is_replacing:
        artifact.save_tensors(VALUES, time.monotonic())
    broken = {"good": torch.ones(2), "bad": torch.tensor([1.0, value, value])}
    with pytest.raises(UserError, match=r"scores.safetensors: tensor 'bad' has 2 values .* of 3"):
        artifact.save_tensors(broken, time.monotonic())
    assert artifact.path.exists() == is_replacing
    assert names_in(tmp_path) == (["scores.manifest.json", "scores.safetensors"] if is_replacing else [])
    if is_replacing:
        assert torch.equal(load_file(artifact.path)["numbers"], VALUES["numbers"])


def test_json_with_nan_is_refused_before_anything_is_written(tmp_path):
    artifact = FileArtifact(tmp_path / "result.json", STEP)
    with pytest.raises(UserError, match="result.json is not written: a number is NaN or infinite"):
        artifact.save_json({"loss": float("nan")}, time.monotonic())
    assert names_in(tmp_path) == []


def test_whole_numbers_are_finite():
    require_finite({"offsets": torch.arange(3)}, "somewhere")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-4], lambda data: data[:5], lambda data: b"", lambda data: b"x" * 40]
)
def test_a_truncated_file_is_one_readable_error(artifact, damage):
    artifact.save_tensors(VALUES, time.monotonic())
    artifact.path.write_bytes(damage(artifact.path.read_bytes()))
    with pytest.raises(UserError) as refusal:
        artifact.load_tensors()
    assert "scores.safetensors has changed" in str(refusal.value)
    assert f"delete it and run {STEP} again" in str(refusal.value)
    artifact.path.unlink()
    assert not artifact.is_finished(), "once deleted, as the message says, it is made again"


@pytest.mark.parametrize("text", ["{", "", '{"a": 1', "\x00"])
def test_broken_json_is_one_readable_error(tmp_path, text):
    file = tmp_path / "x.manifest.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="x.manifest.json is not valid JSON"):
        read_json(file)


def test_a_broken_manifest_names_the_file(artifact):
    artifact.save_tensors(VALUES, time.monotonic())
    artifact.manifest_path.write_text('{"settings":', encoding="utf-8")
    for read in (artifact.is_finished, artifact.require):
        with pytest.raises(UserError, match="scores.manifest.json is not valid JSON .*; delete it"):
            read()


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": {}}', "null"])
def test_a_manifest_that_is_none_names_the_file(artifact, text):
    artifact.save_tensors(VALUES, time.monotonic())
    artifact.manifest_path.write_text(text, encoding="utf-8")
    for read in (artifact.is_finished, artifact.require):
        with pytest.raises(UserError, match="scores.manifest.json"):
            read()


@pytest.mark.parametrize("part", ["path", "manifest_path"])
def test_a_missing_part_names_the_script_to_run(artifact, part):
    artifact.save_tensors(VALUES, time.monotonic())
    getattr(artifact, part).unlink()
    assert not artifact.is_finished()
    for read in (artifact.require, artifact.load_tensors):
        with pytest.raises(UserError, match=rf"scores.safetensors is missing or incomplete; run {STEP} first"):
            read()


def test_to_json_is_readable_and_keeps_text():
    assert to_json({"text": "déjà", "numbers": [1]}) == '{\n  "text": "déjà",\n  "numbers": [\n    1\n  ]\n}\n'


# -------------------------------------------------------------------------------------------------------- paths


def repair(scores_type: str, if_weight: float = 10.0, preserve_perplexity: bool = False) -> str:
    return RepairChoice(scores_type, 100, if_weight, preserve_perplexity=preserve_perplexity).name


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            paths.factors_dir("/out", "M", "ekfac", False, 42),
            "/out/ekfac_experiments/influence_results/M/factors_ekfac",
        ),
        (
            paths.factors_dir("/out", "M", "kfac", True, 7),
            "/out/ekfac_experiments/influence_results-7/M/factors_kfac_half",
        ),
        (
            paths.scores_file("/out", "bias", "M", "ekfac", False, 42),
            "/out/ekfac_experiments/influence_results/bias_M/scores_ekfac/pairwise_scores.safetensors",
        ),
        (
            paths.scores_file("/out", "truth", "M", "identity", True, 0),
            "/out/ekfac_experiments/influence_results-0/truth_M/scores_identity_half/pairwise_scores.safetensors",
        ),
        (
            paths.token_scores_file("/out", "bias", "M", "ekfac", False, 42),
            "/out/ekfac_experiments/influence_results/bias_M/scores_ekfac/per_token_scores.safetensors",
        ),
        (paths.representations_file("/out", "M"), "/out/representations/M_sumreps.safetensors"),
        (paths.dpp_file("/out", "ethics", "M", 100, 10.0), "/out/dpp/ethics_M_indices_100_ifweight10.json"),
        (paths.dpp_file("/out", "combined", "M", 5, 0.5), "/out/dpp/combined_M_indices_5_ifweight0.5.json"),
        (
            paths.gradients_file("/out", "bias", "M", repair("pure_ekfac"), seed=42),
            "/out/ekfac_experiments/influence_results/bias_M/query_grads_pure_ekfac_bottom100/"
            "aggregated_query_grads.safetensors",
        ),
        (
            paths.gradients_file("/out", "bias", "M", repair("dpp"), seed=7),
            "/out/ekfac_experiments/influence_results-7/bias_M/query_grads_dpp_ifweight10_bottom100/"
            "aggregated_query_grads.safetensors",
        ),
        (
            paths.repaired_model_dir("/out", "bias", "M", repair("random"), learning_rate=0.012),
            "/out/gradient_ascent_models/bias_M_random_bottom100_lr0.012",
        ),
        (
            paths.repaired_model_dir("/out", "combined", "M", repair("dpp", 0.0), learning_rate=1.0),
            "/out/gradient_ascent_models/combined_M_dpp_ifweight0_bottom100_lr1",
        ),
        (
            paths.repaired_model_dir("/out", "bias", "M", repair("pure_ekfac"), learning_rate=1e-5),
            "/out/gradient_ascent_models/bias_M_pure_ekfac_bottom100_lr1e-05",
        ),
        (
            paths.repaired_model_dir("/out", "bias", "M", repair("dpp", preserve_perplexity=True), learning_rate=0.1),
            "/out/gradient_ascent_models/bias_M_dpp_ifweight10_bottom100_preserve_lr0.1",
        ),
        (
            paths.gradients_file("/out", "bias", "M", repair("direct"), seed=42),
            "/out/ekfac_experiments/influence_results/bias_M/query_grads_direct/aggregated_query_grads.safetensors",
        ),
        (paths.result_file("/out", "M", "anthropic", "test"), "/out/results/M_anthropic_test.json"),
        (
            paths.sweep_file("/out", "bias", "M", repair("dpp")),
            "/out/results/bias_M_dpp_ifweight10_bottom100_sweep.json",
        ),
    ],
)
def test_paths_are_the_documented_ones(path, expected):
    assert path == Path(expected).resolve()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("lomahony/pythia-70m-helpful-sft", "pythia-70m-helpful-sft"),
        ("/models/mine/", "mine"),
        ("data/demo/pythia-demo-sft", "pythia-demo-sft"),
        (Path("a/b"), "b"),
        ("models/mine/sub/..", "mine"),
        ("/models/mine/.", "mine"),
        ("/models/mine//", "mine"),
        ("..", paths.PROJECT_ROOT.parent.name),
        (".", paths.PROJECT_ROOT.name),
    ],
)
def test_short_name_of_a_model(model, expected):
    assert paths.model_short_name(model) == expected


def test_a_link_to_a_model_keeps_its_own_name(tmp_path):
    (tmp_path / "a1b2c3").mkdir()
    (tmp_path / "my-model").symlink_to(tmp_path / "a1b2c3")
    assert paths.model_short_name(tmp_path / "my-model") == "my-model"


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("lomahony/pythia-70m-helpful-sft", "lomahony/pythia-70m-helpful-sft"),
        ("pythia-demo", "pythia-demo"),
        ("data/demo/hh", "data/demo/hh"),
        ("data/demo/../demo/hh/", "data/demo/hh"),
        (str(paths.PROJECT_ROOT / "data" / "demo" / "hh"), "data/demo/hh"),
        ("/home/somebody/models/mine", "mine"),
        ("~/models/mine", "mine"),
        ("../elsewhere/mine", "mine"),
    ],
)
def test_names_for_others_do_not_say_where_somebodys_folders_are(name, public):
    assert paths.public_name(name) == public


def test_relative_paths_start_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert paths.resolve_path("data/demo") == paths.PROJECT_ROOT / "data" / "demo"
    assert paths.resolve_path(".") == paths.PROJECT_ROOT
    assert paths.resolve_path(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.resolve_path("~/models") == tmp_path / "models"


def test_the_default_output_folder_is_ignored_by_git():
    output_dir = load_script(STEP).OUTPUT_DIR
    ignored = (paths.PROJECT_ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert paths.resolve_path(output_dir) == paths.PROJECT_ROOT
    assert {
        "/ekfac_experiments/",
        "/representations/*.safetensors",
        "/representations/*.json",
        "/dpp/*.json",
        "/gradient_ascent_models/",
        "/results/",
    } <= set(ignored)


def test_what_is_written_can_be_read_by_whom_the_umask_allows(tmp_path):
    """safetensors makes its files for their owner alone."""
    before = os.umask(0o027)
    try:
        make_artifact(tmp_path).save_tensors(VALUES, time.monotonic())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o640}
