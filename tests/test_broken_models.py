"""A model folder with anything wrong in it: loading ends in one line that names the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from utils.console import UserError
from utils.model_fingerprints import model_fingerprint
from utils.models import load_model, load_tokenizer, require_supported

Spoil = Callable[[Path], None]
CPU = torch.device("cpu")


def load_all(folder: Path) -> None:
    """What a step does with a model before its own work."""
    require_supported(str(folder), "auto")
    model_fingerprint(str(folder))
    load_tokenizer(str(folder), load_model(str(folder), CPU))


def line_about(folder: Path) -> str:
    """The one line in which loading ends."""
    with pytest.raises(UserError) as refusal:
        load_all(folder)
    line = str(refusal.value)
    assert "\n" not in line
    assert line.startswith(str(folder))
    assert len(line) < 800
    assert "no such folder" not in line
    return line


@pytest.fixture
def folder(tiny_models, tmp_path) -> Path:
    """A model that a test may spoil."""
    return Path(shutil.copytree(tiny_models["pythia"], tmp_path / "model"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **values}), encoding="utf-8")


GARBAGE = [b"", b"{", b"null", b"[]", b"5", b"\xff\xfe", b"\0" * 50, b"[" * 100_000 + b"]" * 100_000]
WRONG_VALUES = {
    "hidden_act": ["nonsense", 3, None],
    "num_hidden_layers": [0, -1, 10**6, "3", None],
    "hidden_size": [0, -32, 10**12, "x", None, [1], 31],
    "vocab_size": [0, -1, 10**12, "x"],
    "num_attention_heads": [0, -4, "x"],
    "intermediate_size": [-1, 10**14, None],
    "model_type": [5, None, "nonsense", "t5"],
    "rope_parameters": [[], {"rope_type": "nonsense"}, {"rope_type": "default", "rope_theta": "x"}],
    "dtype": ["nonsense", 5],
    "text_config": [{}, 5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG_VALUES.items() for value in values]
)
def test_wrong_value_in_the_configuration(folder, name, value):
    change(folder / "config.json", **{name: value})
    line_about(folder)


@pytest.mark.parametrize("count", [0, -1, 10**6])
def test_impossible_number_of_blocks_says_what_is_allowed(folder, count):
    change(folder / "config.json", num_hidden_layers=count)
    told = f"config.json has num_hidden_layers = {count}; allowed is a whole number from 1 to 10,000"
    assert told in line_about(folder)
    with pytest.raises(UserError, match="num_hidden_layers"):
        load_model(str(folder), CPU)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_place_of_json(folder, file, content):
    (folder / file).write_bytes(content)
    line_about(folder)


@pytest.mark.parametrize("content", [b"[]", b'{"made_by": "gradient_ascent_and_save.py"}'])
def test_a_manifest_that_is_none_is_no_harm(folder, content):
    (folder / "manifest.json").write_bytes(content)
    load_all(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"garb", b"hello, these are no weights" * 50], ids=range(3))
def test_garbage_in_place_of_weights(folder, file, content):
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(content)
    assert "cannot load the weights" in line_about(folder)


@pytest.mark.parametrize("part", [0.01, 0.5, 0.99])
def test_truncated_weights(folder, part):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: int(part * len(weights))])
    assert "cannot load the weights" in line_about(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["gpt_neox.embed_in.weight", "gpt_neox.layers.1.mlp.dense_h_to_4h.bias"])
def test_weights_that_are_no_numbers_are_named(folder, name, value):
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    line = line_about(folder)
    assert f"the weights are broken; save the model again: tensor {name!r} has 1 values" in line


def test_finite_weights_whose_sum_is_not_are_loaded(folder):
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][-2:] = 3e38  # rows of no token that occurs
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_all(folder)


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_a_tokenizer_without_its_vocabulary(tiny_models, tmp_path, family):
    """Some classes make an empty tokenizer where the file is missing."""
    folder = Path(shutil.copytree(tiny_models[family], tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    assert "tokenizer" in line_about(folder)
