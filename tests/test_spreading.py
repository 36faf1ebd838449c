"""DEVICE = "spread" against a plain run: the same bytes, wherever the trunk's blocks are."""

from __future__ import annotations

import re
import shutil
import weakref

import pytest
import torch
from conftest import Workspace, contents
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from utils import models, spreading
from utils.console import UserError
from utils.devices import resolve_device
from utils.forward import last_hidden_state
from utils.models import load_model
from utils.spreading import free_memory, keep_hooks_on_trunk, num_bytes, place_modules
from utils.trunk import Trunk

STEP_1, STEP_2 = "compute_factors_and_scores.py", "representations/train_reps.py"
STEP_4, STEP_5 = "make_gradients.py", "gradient_ascent_and_save.py"
SPREAD = ["--DEVICE", "spread"]
CPU = torch.device("cpu")
BLOCKS = {"pythia": "gpt_neox.layers", "qwen": "model.layers"}
TOKENS = torch.arange(1, 21)[None]


@pytest.fixture(params=["pythia", "qwen"])
def family(request) -> str:
    return request.param


@pytest.fixture
def spread(tiny_models, family, monkeypatch) -> list[PreTrainedModel]:
    """So little memory that one block of a trunk of two or three stays there, and none of a trunk of one.

    Gives all models that are loaded from now on.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    free = num_bytes(model) + 3 * num_bytes(model.get_submodule(BLOCKS[family])[0]) // 2
    monkeypatch.setattr(spreading, "free_memory", lambda: {"cpu": free})
    loaded, original = [], models.keep_hooks_on_trunk
    monkeypatch.setattr(models, "keep_hooks_on_trunk", lambda *given: (loaded.append(given[0]), original(*given)))
    return loaded


def spread_blocks(model: nn.Module, family: str) -> list[int]:
    """The blocks whose weights, all of them, are not in memory; no other weights are."""
    blocks = model.get_submodule(BLOCKS[family])
    found = [i for i, block in enumerate(blocks) if all(parameter.is_meta for parameter in block.parameters())]
    assert sum(p.is_meta for p in model.parameters()) == sum(len(list(blocks[i].parameters())) for i in found)
    return found


def run_steps(workspace: Workspace, num_blocks: int, *device: str) -> dict[str, bytes]:
    """Steps 1, 4 and 5, and with one block all else; gives the content of every file, without the times it took."""
    task = ["--TASK_NAME", "truth", *device]
    workspace.run(STEP_1, *task, "--NUM_BLOCKS", num_blocks, "--NUM_FACTOR_EXAMPLES", 20)
    workspace.run(STEP_4, *task, "--BOTTOM_K", 5)
    more = ["--NUM_COMPLETIONS", 1] if num_blocks == 1 else ["--COMPUTE_TASK_EVAL", "False"]
    workspace.run(STEP_5, *task, "--BOTTOM_K", 5, "--LEARNING_RATE", 0.01, *more)
    if num_blocks == 1:
        workspace.run(STEP_2, *device)
        workspace.run("evaluation_scripts/bias_loss.py", "--SPLIT", "train", *device)
    files = {name: data for name, (data, _) in contents(workspace.output).items()}
    del files[next(name for name in files if name.endswith("_repair.manifest.json"))]  # a fingerprint of such a time
    return {name: re.sub(rb'"seconds": [0-9.e-]+', b"", data) for name, data in files.items()}


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_all_steps_give_what_they_give_on_one_device(make_workspace, spread, quick_repairs, family, num_blocks):
    plain, other = make_workspace(family), make_workspace(family)
    expected, found = (run_steps(where, num_blocks, *device) for where, device in ((plain, ()), (other, SPREAD)))
    for name in sorted(expected | found):
        assert found.get(name) == expected.get(name), name
    kinds = ["factors_ekfac", "pairwise_scores", "query_grads", "/model.safetensors", "anthropic_test", "repair.json"]
    if num_blocks == 1:
        kinds += ["bias_test", "ethics_test", "truth_test", "completions_test", "sumreps", "bias_train"]
    assert [kind for kind in kinds if not any(kind in name for name in expected)] == []
    on_disk = {1: [[1]] * 3 + [[1, 2]] * 2, 2: [[0]] * 3}[num_blocks]  # of the models of steps 1, 4, 5, 2 and 6
    assert [spread_blocks(model, family) for model in spread] == on_disk

    finished = contents(plain.output)  # DEVICE is none of the settings that an artifact was made with
    run_steps(plain, num_blocks, *SPREAD)
    assert contents(plain.output) == finished
    assert len(spread) == len(on_disk)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_trunk_is_cut_and_its_states_are_on_the_main_device(tiny_models, spread, family, num_blocks):
    model = load_model(str(tiny_models[family]), CPU, is_spread=True, num_blocks=num_blocks)
    trunk = Trunk(model, "auto", num_blocks)
    assert not trunk.is_empty
    assert model.device == trunk.tail.device == CPU
    calls = []
    for block in model.get_submodule(BLOCKS[family])[: 3 - num_blocks]:
        block.register_forward_hook(lambda *_: calls.append(1))
    states = trunk.states({"input_ids": TOKENS})
    assert len(calls) == 3 - num_blocks
    last_hidden_state(trunk.tail, {"trunk_states": states})
    assert len(calls) == 3 - num_blocks  # the tail is not the model that it is a copy of
    traced = model.get_submodule(BLOCKS[family])[3 - num_blocks :]
    assert not any(hasattr(module, "_hf_hook") or "forward" in vars(module) for module in traced.modules())


def test_a_spread_block_returns_its_output_on_the_main_device():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})
    keep_hooks_on_trunk(model, "layers", 1, torch.device("meta"))  # a device other than the blocks'
    assert [block(torch.ones(1, 2)).device.type for block in model["layers"]] == ["meta", "cpu"]


@pytest.mark.parametrize("where", ["cpu", "disk", "disk, copied"])
def test_weights_from_anywhere_are_those_of_the_checkpoint(tiny_models, family, spread, monkeypatch, tmp_path, where):
    """Here in half precision. "cpu" is memory from which they must be brought to a main device, as with a GPU."""
    source, offloaded = tmp_path / "model", tmp_path / "offloaded"
    shutil.copytree(tiny_models[family], source)
    half = AutoModelForCausalLM.from_pretrained(source).bfloat16()
    half.save_pretrained(source)
    if where == "disk, copied":  # those in safetensors are read where they are
        torch.save(half.state_dict(), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    offloaded.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(offloaded))

    def place(skeleton: nn.Module, blocks: str, first: int, main_device: torch.device) -> dict[str, object]:
        placed = place_modules(skeleton, blocks, first, main_device)
        main = main_device if where == "cpu" else "cpu"  # accelerate takes the word, not the device, for memory
        return {name: where[:4].strip(",") if name.startswith(f"{blocks}.") else main for name in placed}

    monkeypatch.setattr(models, "place_modules", place)
    plain = load_model(str(source), CPU)
    model = load_model(str(source), CPU, is_spread=True)
    assert spread_blocks(model, family) == [0, 1, 2]
    assert any(offloaded.rglob("*layers.0*")) == (where == "disk, copied")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    greedy = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **greedy), plain.generate(TOKENS, **greedy))
    model.save_pretrained(tmp_path / "saved")
    saved, expected = load_model(str(tmp_path / "saved"), CPU).state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)

    block = weakref.ref(model.get_submodule(BLOCKS[family])[0])
    del model
    spread.clear()
    free_memory()  # before the next model is placed, this one is gone, with what it had on disk
    assert block() is None
    assert not list(offloaded.iterdir())


def model_of_blocks(count: int) -> nn.ModuleDict:
    """Blocks of 400 bytes between two other modules of 200 bytes, one of which shares its weight with a third."""
    linears = {"embedding": nn.Linear(10, 5, bias=False), "norm": nn.Linear(10, 5, bias=False)}
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(10, 10, bias=False)) for _ in range(count))
    model = nn.ModuleDict(
        {**linears, "head": nn.Linear(10, 5, bias=False), "decoder": nn.ModuleDict({"layers": blocks})}
    )
    model["head"].weight = model["embedding"].weight
    return model


def test_gpus_are_filled_first_then_memory_then_disk(monkeypatch, capsys):
    stays = 2 * 200 + 2 * 400 + 400  # and room for a block
    free = {0: stays + 2 * 2.5 * 400, 1: 3.5 * 400 / 0.8, "cpu": 1.5 * 400 / 0.8}  # half, and four fifths, are used
    monkeypatch.setattr(spreading, "free_memory", lambda: free)
    placed = place_modules(model_of_blocks(10), "decoder.layers", 8, torch.device("cuda:0"))
    assert [placed.pop(f"decoder.layers.{i}") for i in range(8)] == [0, 0, 1, 1, 1, "cpu", "disk", "disk"]
    outside = {"embedding", "head", "norm", "decoder.layers.8.0", "decoder.layers.9.0"}
    assert placed == dict.fromkeys(outside, 0)
    assert "2 on cuda:0, 3 on cuda:1, 1 on cpu, 2 on disk" in capsys.readouterr().out


@pytest.mark.parametrize("free", [1_199, 1_200])
def test_what_stays_must_fit(monkeypatch, free):
    monkeypatch.setattr(spreading, "free_memory", lambda: {"cpu": free})
    if free == 1_200:  # the two others, the traced block and room for one more
        assert place_modules(model_of_blocks(2), "decoder.layers", 1, CPU)["decoder.layers.0"] == "disk"
        return
    with pytest.raises(UserError, match=r"DEVICE = 'spread': .*\(all but the first 1 block.* cpu has .* free; "):
        place_modules(model_of_blocks(2), "decoder.layers", 1, CPU)


def test_enough_memory_gives_an_ordinary_model(tiny_models, capsys):
    model = load_model(str(tiny_models["qwen"]), CPU, is_spread=True, num_blocks=1)
    assert "blocks that are spread: 2 on cpu" in capsys.readouterr().out
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    whole = load_model(str(tiny_models["qwen"]), CPU, is_spread=True, num_blocks=3)
    assert "spread" not in capsys.readouterr().out
    assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        (STEP_1, [], "error: DEVICE = 'spread': what is not spread"),
        (STEP_2, [], "error: DEVICE = 'spread': what is not spread"),
        (STEP_1, ["--NUM_BLOCKS", 4], "error: NUM_BLOCKS = 4: the model has 3"),
        ("data/make_sft_model.py", [], "error: DEVICE = 'spread': allowed here are auto, cpu and cuda"),
    ],
)
def test_refusals(workspace, monkeypatch, capsys, script, arguments, line):
    monkeypatch.setattr(spreading, "free_memory", lambda: {"cpu": 10_000})
    with pytest.raises(SystemExit):
        workspace.run(script, *arguments, *SPREAD)
    errors = [text for text in capsys.readouterr().err.splitlines() if text]
    assert len(errors) == 1
    assert errors[0].startswith(line)
    assert not contents(workspace.output)


def test_a_broken_weight_on_disk_is_refused(tiny_models, spread, family, tmp_path):
    shutil.copytree(tiny_models[family], tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if ".layers.1." in name)
    for value, message in ((None, "1 tensors are missing"), (float("nan") * weights[name], "NaN or infinite")):
        broken = {**weights, name: value} if value is not None else {n: w for n, w in weights.items() if n != name}
        save_file(broken, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path / "model"), CPU, is_spread=True)


def test_the_main_device():
    assert resolve_device("spread") == torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
