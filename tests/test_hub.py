"""Pushing a repaired model: what is uploaded, what is refused, and that the token shows up nowhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Workspace
from huggingface_hub.utils import filter_repo_objects

from utils import hub
from utils.console import UserError
from utils.files import read_json
from utils.model_fingerprints import model_fingerprint, tokenizer_fingerprint
from utils.models import load_model, load_tokenizer, save_model

STEP_5 = "gradient_ascent_and_save.py"
TOKEN = "hf_not_a_real_token"
RECIPE = ["--BOTTOM_K", 5, "--SCORES_TYPE", "random", "--LEARNING_RATE", 0.01]
PUSH = [*RECIPE, "--PUSH_TO_HUB", True, "--HUB_USERNAME", "somebody"]
NAMES = [f"{task}_pythia-tiny_random_bottom5_lr0.01" for task in ("bias", "ethics", "truth")]


class FakeHub:
    """Stands for huggingface_hub.HfApi and keeps what it was asked to do."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []
        self.calls: list[tuple[str, str]] = []
        self.uploaded: dict[str, set[str]] = {}
        self.failures: dict[str, Exception] = {}

    def __call__(self, token: str | None = None) -> FakeHub:
        self.tokens.append(token)
        return self

    def whoami(self) -> dict[str, str]:
        self._called("whoami", "")
        return {"name": "somebody"}

    def create_repo(self, repo_id: str, exist_ok: bool) -> None:
        assert exist_ok, "a second push of the same model must not fail"
        self._called("create_repo", repo_id)

    def upload_folder(self, folder_path: str, repo_id: str, commit_message: str, allow_patterns: list[str]) -> None:
        assert commit_message
        self._called("upload_folder", repo_id)
        names = [file.relative_to(folder_path).as_posix() for file in Path(folder_path).rglob("*")]
        self.uploaded[repo_id] = set(filter_repo_objects(names, allow_patterns=allow_patterns))
        assert Path(folder_path).name == repo_id.partition("/")[2]

    def _called(self, name: str, repo_id: str) -> None:
        self.calls.append((name, repo_id))
        if name in self.failures:
            raise self.failures[name]


@pytest.fixture
def fake_hub(monkeypatch, tmp_path) -> FakeHub:
    """The hub, and HUB_TOKEN in an `.env` file of its own."""
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr(hub, "PROJECT_ROOT", tmp_path)
    for name in (*hub.TOKEN_VARIABLES, "HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text(f"HUB_TOKEN={TOKEN}\n", encoding="utf-8")
    return fake


@pytest.fixture(scope="module")
def with_gradients(make_workspace) -> Workspace:
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py", "--FACTOR_STRATEGY", "identity")
    workspace.run("make_gradients.py", "--FACTOR_STRATEGY", "identity", "--BOTTOM_K", 5, "--SCORES_TYPE", "random")
    return workspace


@pytest.fixture
def ready(with_gradients, tmp_path) -> Workspace:
    """A copy of a workspace in which step 5 is next."""
    shutil.copytree(with_gradients.output, tmp_path / "output")
    return Workspace(with_gradients.model, with_gradients.data, tmp_path / "output")


def refuse_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )


def files_with(text: str, folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and text.encode() in file.read_bytes()]


# ------------------------------------------------------------------------------------------------------- pushing


def test_nothing_is_pushed_unless_asked_for(ready, fake_hub):
    ready.run(STEP_5, *RECIPE)
    assert fake_hub.tokens == []
    assert fake_hub.calls == []


def test_every_repaired_model_is_pushed_whole(ready, fake_hub):
    ready.run(STEP_5, *PUSH)
    repositories = [f"somebody/{name}" for name in NAMES]
    calls = [(call, name) for name in repositories for call in ("create_repo", "upload_folder")]
    assert fake_hub.calls == [("whoami", ""), *calls]
    assert set(fake_hub.tokens) == {TOKEN}
    for repository in repositories:
        files = fake_hub.uploaded[repository]
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "repair.json"} <= files


STRAYS = [".tmpAbCdEf", "model.safetensors.partial", "settings.json", ".env", "notes.txt", "runs/config.json"]


def test_only_what_belongs_to_a_checkpoint_is_pushed(ready, fake_hub):
    ready.run(STEP_5, *RECIPE)
    for name in NAMES:
        for stray in STRAYS:
            file = ready.output / "gradient_ascent_models" / name / stray
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine", encoding="utf-8")
    ready.run(STEP_5, *PUSH)
    for files in fake_hub.uploaded.values():
        assert {"config.json", "model.safetensors", "manifest.json", "README.md"} <= files
        assert not files & set(STRAYS)


def test_a_checkpoint_holds_nothing_that_a_killed_run_left(ready, monkeypatch):
    save = transformers.PreTrainedModel.save_pretrained

    def be_killed(model, folder: Path, **keywords) -> None:
        save(model, folder, **keywords)
        for stray in (".tmpAbCdEf", "model-00002-of-00002.safetensors"):
            (folder / stray).write_text("unfinished", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", be_killed)
        with pytest.raises(SystemExit):
            ready.run(STEP_5, *RECIPE, "--TASK_NAME", "bias")
    ready.run(STEP_5, *RECIPE, "--TASK_NAME", "bias")
    folder = ready.output / "gradient_ascent_models" / NAMES[0]
    names = {file.name for file in folder.iterdir()}
    assert not [name for name in names if name.startswith((".", "model-"))]
    assert names - {"manifest.json", "repair.json", "README.md"} == set(read_json(folder / "manifest.json")["files"])


def test_each_learning_rate_has_its_own_repository(ready, fake_hub):
    ready.run(STEP_5, *PUSH, "--TASK_NAME", "bias", "--LEARNING_RATE", 0.01, 0.02)
    assert list(fake_hub.uploaded) == [f"somebody/{NAMES[0]}", f"somebody/{NAMES[0].replace('0.01', '0.02')}"]


def test_a_finished_repair_is_pushed_without_being_made_again(ready, fake_hub, monkeypatch):
    ready.run(STEP_5, *RECIPE)
    refuse_to_load(monkeypatch)
    ready.run(STEP_5, *PUSH)
    assert list(fake_hub.uploaded) == [f"somebody/{name}" for name in NAMES]


def test_what_is_saved_does_not_say_where_the_model_was(ready, tmp_path, tiny_models):
    model = Path(shutil.copytree(tiny_models["pythia"], tmp_path / "hush-hush" / "model"))
    for file, more in {
        "config.json": {"_name_or_path": "/home/somebody/hush-hush"},
        "generation_config.json": {"_name_or_path": "/home/somebody/hush-hush"},
        "tokenizer_config.json": {
            "name_or_path": "hush-hush/model",
            "special_tokens_map_file": "/hush-hush/map",
        },
    }.items():
        content = read_json(model / file) | more
        (model / file).write_text(json.dumps(content), encoding="utf-8")
    loaded = load_model(str(model), torch.device("cpu"))
    (tmp_path / "saved").mkdir()
    save_model(loaded, str(model), tmp_path / "saved")
    assert files_with("hush-hush", tmp_path / "saved") == []
    assert load_tokenizer(str(tmp_path / "saved")).eos_token == "<|endoftext|>"


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--HUB_USERNAME", "None"], "error: HUB_USERNAME = None: PUSH_TO_HUB needs the name of the hub account"),
        (["--SAVE_TO_DISK", False], "error: SAVE_TO_DISK = False: PUSH_TO_HUB uploads the saved checkpoint"),
        *(
            (["--HUB_USERNAME", name], f"error: HUB_USERNAME = {name!r}: allowed is the name of a hub account alone")
            for name in ("some body", "somebody/else", "-somebody", "a--b", "https://hf.co/somebody", "some\nbody")
        ),
    ],
)
def test_missing_constants_are_refused_before_any_work(ready, fake_hub, monkeypatch, capsys, arguments, told):
    assert_refused_before_any_work(ready, fake_hub, monkeypatch, capsys, arguments, told)


def test_a_missing_token_is_refused_before_any_work(ready, fake_hub, monkeypatch, capsys, tmp_path):
    (tmp_path / ".env").unlink()
    told = "error: HUB_TOKEN is not set: PUSH_TO_HUB needs it in .env (see .env.example)"
    assert_refused_before_any_work(ready, fake_hub, monkeypatch, capsys, [], told)


@pytest.mark.parametrize("name", [f"a-{'long-' * 20}name", "a model", "a--model", "modèle"])
@pytest.mark.parametrize("rate", [0.01, "auto"])
def test_a_model_whose_checkpoints_the_hub_cannot_name_is_refused_before_any_work(
    ready, fake_hub, monkeypatch, capsys, tmp_path, name, rate
):
    ready.model = Path(shutil.copytree(ready.model, tmp_path / name))
    told = f"error: MODEL_NAME = '{ready.model}': the hub allows no repository somebody/bias_{name}_random_bottom5_lr"
    assert_refused_before_any_work(ready, fake_hub, monkeypatch, capsys, ["--LEARNING_RATE", rate], told)


def test_a_token_that_the_hub_refuses_is_found_before_any_work(ready, fake_hub, monkeypatch, capsys):
    fake_hub.failures["whoami"] = RuntimeError(f"401 Unauthorized\nBearer {TOKEN}")
    refuse_to_load(monkeypatch)
    with pytest.raises(SystemExit):
        ready.run(STEP_5, *PUSH)
    assert capsys.readouterr().err == (
        "error: HUB_TOKEN: PUSH_TO_HUB cannot use it, since the hub refuses it or cannot be reached: "
        "401 Unauthorized Bearer ***\n"
    )
    assert fake_hub.calls == [("whoami", "")]
    assert not (ready.output / "gradient_ascent_models").exists()


def assert_refused_before_any_work(workspace, fake_hub, monkeypatch, capsys, arguments, told):
    refuse_to_load(monkeypatch)
    before = {file: file.stat().st_mtime_ns for file in workspace.output.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        workspace.run(STEP_5, *PUSH, *arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1
    assert line.startswith(told)
    assert fake_hub.tokens == []
    assert {file: file.stat().st_mtime_ns for file in workspace.output.rglob("*")} == before


@pytest.mark.parametrize("call", ["create_repo", "upload_folder"])
def test_a_failed_push_is_one_line_without_the_token_and_loses_nothing(ready, fake_hub, monkeypatch, capsys, call):
    fake_hub.failures[call] = RuntimeError(f"401 Unauthorized\nheaders: Bearer {TOKEN}\nfor url https://{TOKEN}@hub")
    with pytest.raises(SystemExit) as stop:
        ready.run(STEP_5, *PUSH)
    shown = capsys.readouterr()
    assert stop.value.code == 1
    expected = (
        f"error: pushing to somebody/{NAMES[0]} failed: 401 Unauthorized headers: Bearer *** for url https://***@hub"
    )
    assert shown.err.splitlines()[-1] == expected
    assert TOKEN not in shown.out + shown.err
    assert files_with(TOKEN, ready.output) == []

    fake_hub.failures.clear()
    before = {file: file.stat().st_mtime_ns for file in (ready.output / "gradient_ascent_models").rglob("*")}
    ready.run(STEP_5, *PUSH)
    assert list(fake_hub.uploaded) == [f"somebody/{name}" for name in NAMES]
    assert {file: file.stat().st_mtime_ns for file in before} == before, "what was finished is kept"


def test_a_failed_push_does_not_pass_the_token_on(fake_hub, tmp_path):
    fake_hub.failures["upload_folder"] = OSError(f"bad token {TOKEN}")
    with pytest.raises(UserError) as failure:
        hub.push_folder(tmp_path, [], "somebody", hub.hub_access())
    assert str(failure.value) == f"pushing to somebody/{tmp_path.name} failed: bad token ***"
    assert failure.value.__cause__ is None


# ----------------------------------------------------------------------------------------------------- the token


@pytest.mark.parametrize("source", ["file", "environment"])
def test_the_token_reaches_no_file_and_no_output(ready, fake_hub, monkeypatch, capfd, tmp_path, source):
    if source == "environment":
        (tmp_path / ".env").unlink()
        monkeypatch.setenv("HUB_TOKEN", TOKEN)
    ready.run(STEP_5, *PUSH)
    ready.run("evaluation_scripts/bias_loss.py")
    shown = capfd.readouterr()
    assert set(fake_hub.tokens) == {TOKEN}
    assert "pushed to somebody/" in shown.out
    assert TOKEN not in shown.out + shown.err
    assert files_with(TOKEN, ready.output) == []


def test_models_of_the_hub_are_asked_for_with_token_and_cache(ready, fake_hub, monkeypatch, capsys, tmp_path):
    asked = {}

    def fail(name: str, **keywords: object) -> None:
        asked.update(name=name, **keywords)
        raise OSError(f"403 for {name} with {keywords['token']}\nmore lines")

    (tmp_path / ".env").write_text(f"HUB_TOKEN={TOKEN}\nHUB_CACHE=/some/cache\n", encoding="utf-8")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    ready.model = "somebody/gated"
    with pytest.raises(SystemExit):
        ready.run(STEP_5, *RECIPE)
    assert asked == {
        "name": "somebody/gated",
        "cache_dir": "/some/cache",
        "token": TOKEN,
        "trust_remote_code": False,
    }
    expected = (
        "error: somebody/gated: cannot load the configuration: no such folder, and not to be had from the hub: "
        "403 for somebody/gated with *** more lines\n"
    )
    assert capsys.readouterr().err == expected


def test_data_sets_of_the_hub_are_asked_for_with_token_and_cache(ready, fake_hub, monkeypatch, capsys, tmp_path):
    asked = {}

    def fail(name: str, **keywords: object) -> None:
        asked.update(name=name, **keywords)
        raise ConnectionError(f"403 for {name} with {keywords['token']}\nmore lines")

    (tmp_path / ".env").write_text(f"HUB_TOKEN={TOKEN}\nHUB_CACHE=/some/cache\n", encoding="utf-8")
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(SystemExit):
        ready.run("representations/train_reps.py", "--HH_DATASET", "somebody/gated")
    assert asked == {"name": "somebody/gated", "split": "train", "cache_dir": "/some/cache", "token": TOKEN}
    shown = capsys.readouterr().err
    assert (
        "HH_DATASET = 'somebody/gated', split train: no such folder, and not to be had from the hub (403 for "
        "somebody/gated with *** more lines)" in shown
    )
    assert TOKEN not in shown


def test_another_commit_of_a_hub_model_is_another_model(tiny_models, fake_hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--somebody--a-model"
    (repository / "refs").mkdir(parents=True)
    fingerprints = set()
    for digit in "abb":
        commit = 40 * digit
        shutil.copytree(tiny_models["pythia"], repository / "snapshots" / commit, dirs_exist_ok=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        fingerprints.add((model_fingerprint("somebody/a-model"), tokenizer_fingerprint("somebody/a-model")))
    assert len(fingerprints) == 2
