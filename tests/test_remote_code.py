"""Code that comes with a model: it runs where TRUST_REMOTE_CODE allows it, and nowhere else."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Workspace, run_script

from utils.console import UserError
from utils.files import read_json
from utils.models import load_tokenizer

STEP_0, STEP_1, STEP_4 = "data/make_sft_model.py", "compute_factors_and_scores.py", "make_gradients.py"
STEP_5, BIAS = "gradient_ascent_and_save.py", "evaluation_scripts/bias_loss.py"
IDENTITY = ["--FACTOR_STRATEGY", "identity", "--TASK_NAME", "bias"]
REPAIR = ["--TASK_NAME", "bias", "--BOTTOM_K", 5]
TRUST = ["--TRUST_REMOTE_CODE", True]

OWN_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

open({mark!r}, "w").close()


class OwnConfig(Qwen2Config):
    model_type = {model_type!r}


class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


class Brought(Workspace):
    """A workspace whose model brings code; `mark` exists once that has run."""

    mark: Path


@pytest.fixture
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))


@pytest.fixture
def bring(tiny_models, small_data, tmp_path, nobody_is_asked):
    """Makes a workspace with a model of a type whose code comes with it."""

    def make(model_type: str) -> Brought:
        folder = Path(shutil.copytree(tiny_models["qwen"], tmp_path / "brought"))
        config = read_json(folder / "config.json")
        auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
        config |= {"model_type": model_type, "auto_map": auto_map}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        brought = Brought(folder, small_data, tmp_path / "output")
        brought.mark = tmp_path / "it ran"
        code = OWN_CODE.format(mark=str(brought.mark), model_type=model_type)
        (folder / "own_code.py").write_text(code, encoding="utf-8")
        return brought

    return make


@pytest.mark.parametrize("script", [STEP_1, "representations/train_reps.py", "dpp/greedy_dpp.py", STEP_4, STEP_5, BIAS])
def test_a_model_that_needs_its_own_code_is_refused_in_one_line(bring, capsys, script):
    brought = bring("a_new_kind")
    with pytest.raises(SystemExit):
        brought.run(script)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {brought.model}: needs code of its own (auto_map in config.json: ")
    assert "own_code.OwnConfig" in line
    assert "set TRUST_REMOTE_CODE = True" in line
    assert not brought.mark.exists()


def test_fine_tuning_refuses_it_too(bring, capsys):
    brought = bring("a_new_kind")
    arguments = ["--BASE_MODEL", brought.model, "--HH_DATASET", brought.data / "hh"]
    with pytest.raises(SystemExit):
        run_script(STEP_0, *arguments, "--SFT_MODEL_DIR", brought.output / "sft")
    assert "needs code of its own" in capsys.readouterr().err
    assert not brought.mark.exists()


def test_a_model_of_a_known_type_is_loaded_without_its_own_code(bring, capsys):
    brought = bring("qwen2")
    brought.run(BIAS)
    assert "has code of its own, which is not run: TRUST_REMOTE_CODE = False" in capsys.readouterr().out
    assert not brought.mark.exists()
    manifest = read_json(brought.output / "results" / "brought_bias_test.manifest.json")
    assert manifest["trust_remote_code"] is False


def test_code_that_is_allowed_runs_and_its_model_is_repaired(bring):
    brought = bring("a_kind_of_my_own")
    brought.run(STEP_1, *IDENTITY, *TRUST)
    assert brought.mark.exists()
    brought.run(STEP_4, *IDENTITY, *REPAIR, *TRUST)
    brought.run(STEP_5, *REPAIR, *TRUST, "--COMPUTE_ANTHROPIC_EVAL", False)
    (folder,) = (brought.output / "gradient_ascent_models").iterdir()
    assert read_json(folder / "manifest.json")["trust_remote_code"] is True
    assert str(brought.model) not in (folder / "config.json").read_text(encoding="utf-8")
    before = {file: file.stat().st_mtime_ns for file in (brought.output / "results").glob("*.*")}
    Brought(folder, brought.data, brought.output).run(BIAS, *TRUST)  # loads it as a model
    assert before == {file: file.stat().st_mtime_ns for file in (brought.output / "results").glob("*.*")}


def test_permission_ends_with_the_run(bring, capsys):
    brought = bring("another_kind")
    brought.run(BIAS, *TRUST)
    assert brought.mark.exists()
    with pytest.raises(SystemExit):
        brought.run(BIAS, "--SPLIT", "train")
    assert "needs code of its own" in capsys.readouterr().err


def test_a_tokenizers_code_does_not_run_either(workspace, tmp_path, nobody_is_asked):
    folder = Path(shutil.copytree(workspace.model, tmp_path / "brought"))
    config = read_json(folder / "tokenizer_config.json")
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')", encoding="utf-8")
    with suppress(UserError):  # transformers 5 takes a class of its own instead
        load_tokenizer(str(folder))
    assert not (tmp_path / "it ran").exists()
