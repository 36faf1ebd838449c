"""Links and paths that lead elsewhere: nothing outside of an artifact is written, deleted or uploaded."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import contents, write_manifest

from steps import load_script
from utils.artifacts import FileArtifact
from utils.console import UserError
from utils.files import has_links, read_json, remove, write_if_changed, write_locked, written_whole
from utils.fine_tuning import last_checkpoint
from utils.folder_artifacts import FolderArtifact
from utils.hub import HubAccess, push_folder
from utils.influence import factors
from utils.locks import locked

OTHER = {"LEARNING_RATE": 2.0}


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder of somebody's own, which looks like whatever a step might look for."""
    folder = tmp_path / "outside"
    for name in (
        "config.json",
        "model.safetensors",
        "manifest.json",
        "x.partial",
        "sub/trainer_state.json",
        "README.md",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


def save_json(path: Path) -> None:
    FileArtifact(path, "step.py").save_json({"a": 1}, time.monotonic())


def save_tensors(path: Path) -> None:
    FileArtifact(path, "step.py").save_tensors({"a": torch.ones(2)}, time.monotonic())


def save_folder(path: Path, **settings: float) -> None:
    artifact = FolderArtifact(path, "step.py", settings)
    artifact.is_finished(overwrite=True)
    with artifact.staging_folder() as folder:
        (folder / "model.safetensors").write_text("new", encoding="utf-8")
        (folder / "checkpoint-10").mkdir(exist_ok=True)
        artifact.publish_folder(time.monotonic(), {})
    assert artifact.is_finished()


def write(path: Path) -> None:
    write_locked(path, "new")
    write_if_changed(path, "newer")


def write_twice(path: Path) -> None:
    for _ in range(2):
        with locked(path), written_whole(path) as partial:
            partial.write_text("new", encoding="utf-8")


WRITERS = [save_json, save_tensors, save_folder, write, write_twice]
PLACES = ["{}", "{}.partial", "{}.replaced", ".{}.lock", "{stem}.manifest.json", "{stem}.manifest.json.partial"]
PLACES += [".{stem}.manifest.json.lock"]


@pytest.mark.parametrize("save", WRITERS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", [".", "config.json", "missing"])
def test_a_link_where_something_is_written_leads_nowhere(tmp_path, outside, save, place, target):
    before, path = contents(outside), tmp_path / "here" / "x.json"
    link = path.with_name(place.format(path.name, stem=path.stem))
    path.parent.mkdir()
    link.symlink_to(outside / target)
    with contextlib.suppress(OSError, UserError):  # a lock that is a link is refused, with a remedy
        save(path)
    assert contents(outside) == before
    assert not (outside / "missing").exists()


@pytest.mark.parametrize("name", ["checkpoint-10", "model.safetensors", "settings.json", "sub/deeper", ".hidden"])
@pytest.mark.parametrize("target", [".", "model.safetensors", "missing"])
def test_a_staging_folder_with_a_link_is_begun_anew(tmp_path, outside, name, target):
    artifact = FolderArtifact(tmp_path / "here", "step.py")
    with artifact.staging_folder() as folder:
        (folder / "done before").touch()
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    remove(link)
    link.symlink_to(outside / target)
    before = contents(outside)
    with artifact.staging_folder() as folder:
        assert not has_links(folder)
        assert not (folder / "done before").exists()
        for written in ("checkpoint-10", "sub"):
            (folder / written).mkdir(exist_ok=True)
        for written in ("checkpoint-10/model.safetensors", "model.safetensors", "sub/deeper", ".hidden"):
            (folder / written).write_text("new", encoding="utf-8")
        artifact.publish_folder(time.monotonic(), {})
    assert contents(outside) == before
    assert artifact.is_finished()


def test_a_staging_folder_without_links_is_continued(tmp_path):
    artifact = FolderArtifact(tmp_path / "here", "step.py")
    with artifact.staging_folder() as folder:
        (folder / "done before").touch()
    with artifact.staging_folder() as folder:
        assert (folder / "done before").exists()


def test_folders_may_lie_behind_links_of_the_users(tmp_path, outside):
    """A disk elsewhere is reached by a link; what is somebody's own there stays."""
    before = contents(outside)
    (tmp_path / "output").symlink_to(outside)
    for save in WRITERS:
        save(tmp_path / "output" / f"new-{save.__name__}")
    after = contents(outside)
    assert {name: after[name] for name in before} == before
    assert {name.partition("/")[0] for name in after if name not in before} >= {f"new-{s.__name__}" for s in WRITERS}


def test_a_finished_folder_is_tidied_and_nothing_else(tmp_path, outside):
    artifact = FolderArtifact(tmp_path / "here", "step.py")
    save_folder(artifact.path)
    (artifact.path / "a.partial").symlink_to(outside)
    (tmp_path / "here.replaced").symlink_to(outside)
    (tmp_path / "here.partial").mkdir()
    (tmp_path / "here.partial" / "inner").symlink_to(outside)
    before = contents(outside)
    assert artifact.is_finished()
    assert contents(outside) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "outside"]


def test_what_replaces_a_link_to_a_folder_leaves_the_folder(tmp_path):
    save_folder(tmp_path / "elsewhere", **OTHER)
    before = contents(tmp_path / "elsewhere")
    (tmp_path / "here").symlink_to(tmp_path / "elsewhere")
    save_folder(tmp_path / "here")
    assert contents(tmp_path / "elsewhere") == before
    assert not (tmp_path / "here").is_symlink()


def test_a_checkpoint_that_is_a_link_is_not_deleted_through(tmp_path, outside):
    before = contents(outside)
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging" / "checkpoint-3").symlink_to(outside)
    last_checkpoint(tmp_path / "staging")
    assert contents(outside) == before


# ------------------------------------------------------------------------------------------ uploading

FORGED = ["../outside/config.json", "{outside}/config.json", "sub/../../outside/config.json", "sub/config.json", "sub/"]
FORGED += ["", ".", "..", "./config.json", "link", "dangling"]


@pytest.mark.parametrize("name", FORGED)
def test_only_plain_files_of_the_folder_are_uploaded(tmp_path, outside, monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("a repository is made"))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *_, **__: pytest.fail("it is uploaded"))
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    for file in ("config.json", "sub/config.json"):
        (folder / file).write_text("{}", encoding="utf-8")
    (folder / "link").symlink_to(outside / "config.json")
    (folder / "dangling").symlink_to(outside / "missing")
    with pytest.raises(UserError, match="is not uploaded"):
        push_folder(folder, ["config.json", name.format(outside=outside)], "somebody", HubAccess(token="none"))


@pytest.mark.parametrize("name", ["../outside/config.json", "{outside}/config.json", "..", ""])
def test_files_that_a_forged_manifest_names_are_not_touched(tmp_path, outside, name):
    save_folder(tmp_path / "here")
    manifest = read_json(tmp_path / "here" / "manifest.json")
    manifest["files"][name.format(outside=outside)] = 2
    write_manifest(tmp_path / "here" / "manifest.json", manifest)
    before = contents(outside)
    artifact = FolderArtifact(tmp_path / "here", "step.py", settings=OTHER)
    with contextlib.suppress(UserError):
        artifact.is_finished()
    assert not artifact.is_finished(overwrite=True)
    save_folder(tmp_path / "here")
    assert contents(outside) == before


# ------------------------------------------------------------------------------------------ whole steps


def link_everywhere(partial: Path, outside: Path) -> None:
    """Replace all that a killed run left by links to somebody's files, and plant more."""
    for parent, _, files in os.walk(partial, topdown=False):
        for name in files:
            if name != "settings.json":
                remove(Path(parent) / name)
                (Path(parent) / name).symlink_to(outside / "config.json")
    for number in range(1, 9):
        if not (partial / f"checkpoint-{number}").exists():
            (partial / f"checkpoint-{number}").symlink_to(outside)
    for name in ("model.safetensors", "config.json", "README.md", "lambda_matrix.safetensors"):
        remove(partial / name)
        (partial / name).symlink_to(outside / "config.json")


@pytest.mark.parametrize("step", ["fine-tuning", "factors"])
def test_a_resumed_step_writes_through_no_link(workspace, tmp_path, outside, monkeypatch, step):
    script, arguments, function = "compute_factors_and_scores.py", ["--TASK_NAME", "bias"], "save_factors"
    module = factors
    if step == "fine-tuning":
        script, function = "data/make_sft_model.py", "save_model"
        module = load_script(script)
        arguments = ["--SFT_MODEL_DIR", tmp_path / "sft", "--NUM_EPOCHS", 1, "--SAVE_EVERY", 2]
    run: Callable[[], None] = lambda: workspace.run(script, *arguments)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(module, function, interrupt)
        with pytest.raises(SystemExit):
            run()
    (partial,) = (path for path in tmp_path.rglob("*.partial") if path.parent != outside)
    link_everywhere(partial, outside)
    before = contents(outside)
    run()
    assert contents(outside) == before
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_checkpoint_whose_files_are_links_is_not_uploaded(workspace, tmp_path, outside, monkeypatch, capsys):
    uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_, **__: {"name": "somebody"})
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda *_, **keywords: uploads.append(keywords))
    monkeypatch.setenv("HUB_TOKEN", "not-a-real-token")
    common = ["--TASK_NAME", "bias", "--BOTTOM_K", 5]
    workspace.run("compute_factors_and_scores.py", "--FACTOR_STRATEGY", "identity", "--TASK_NAME", "bias")
    workspace.run("make_gradients.py", "--FACTOR_STRATEGY", "identity", *common)
    step_5 = ("gradient_ascent_and_save.py", *common, "--PUSH_TO_HUB", True, "--HUB_USERNAME", "somebody")
    workspace.run(*step_5)
    assert len(uploads) == 1
    (folder,) = (workspace.output / "gradient_ascent_models").iterdir()
    secret = outside / "secret"
    secret.write_bytes((folder / "config.json").read_bytes())
    remove(folder / "config.json")
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(SystemExit):
        workspace.run(*step_5)
    assert "config.json is not uploaded: it is a link" in capsys.readouterr().err
    assert len(uploads) == 1
