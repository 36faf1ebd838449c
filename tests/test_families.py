"""Architectures beyond the two of the paper, by one rule; and those that are refused, with the reason."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from conftest import DEMO, Workspace
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from utils.artifacts import read_json
from utils.batching import BatchLoader
from utils.console import UserError
from utils.models import find_blocks, load_model, load_tokenizer, require_supported, traced_linear_names
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import sequence_nll
from utils.trunk import HiddenStateCache, Trunk

STEP_1, STEP_4, STEP_5 = "compute_factors_and_scores.py", "make_gradients.py", "gradient_ascent_and_save.py"
SIZES = {
    "vocab_size": 1_536,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "olmo": ("OlmoConfig", {}),
    "phi": ("PhiConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
}


def make_model(folder, config_name: str, **more):
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**SIZES, **more})
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer" / "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    name, more = FAMILIES[request.param]
    return make_model(tmp_path_factory.mktemp("families") / f"{request.param}-tiny", name, **more)


def test_every_linear_of_the_last_block_is_traced_and_the_tail_is_the_model(model, small_data):
    require_supported(str(model), "auto")
    loaded = load_model(str(model), torch.device("cpu"))
    tracked = traced_linear_names(loaded, "auto", 1)
    block = loaded.get_submodule(f"{find_blocks(loaded, 'auto')}.2")
    assert len(tracked) == sum(isinstance(module, nn.Linear) for module in block.modules()) >= 6
    trunk = Trunk(loaded, "auto", 1)
    states = HiddenStateCache(trunk)
    sequences = tokenize_dialogues(load_dialogues(str(small_data / "hh"), "train"), load_tokenizer(str(model)))
    with torch.no_grad():
        for batch in BatchLoader(sequences[:20], 400, pad_token_id=0):
            ours = sequence_nll(trunk.tail, states.add_to(batch)).total
            torch.testing.assert_close(ours, sequence_nll(loaded, batch).total, rtol=1e-5, atol=1e-4)


def test_the_steps_repair_it(model, small_data, tmp_path):
    workspace = Workspace(model, small_data, tmp_path)
    workspace.run(STEP_1, "--TASK_NAME", "bias")
    workspace.run(STEP_4, "--TASK_NAME", "bias", "--BOTTOM_K", 4)
    workspace.run(STEP_5, "--TASK_NAME", "bias", "--BOTTOM_K", 4, "--LEARNING_RATE", 0.01)
    (folder,) = (tmp_path / "gradient_ascent_models").iterdir()
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (model, folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".layers.2." in name for name in changed)
    assert read_json(folder / "repair.json")["measurements"]["bias"]["before"] != 0


def test_a_model_that_shifts_what_is_embedded_has_no_trunk(tiny_models, monkeypatch, capsys):
    """The tail gets hidden states as embeddings; a model that scales those would give other numbers."""
    loaded = load_model(str(tiny_models["qwen"]), torch.device("cpu"))
    original = type(loaded.base_model).forward

    def scaled(self, input_ids=None, inputs_embeds=None, **keywords):
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return original(self, inputs_embeds=3 * embedded, **keywords)

    monkeypatch.setattr(type(loaded.base_model), "forward", scaled)
    trunk = Trunk(loaded, "auto", 1)
    assert trunk.is_empty
    assert trunk.tail is loaded
    assert "every pass runs all of the model" in capsys.readouterr().out


def test_weights_outside_of_linears_are_refused(tmp_path):
    folder = make_model(tmp_path / "gpt2", "GPT2Config", n_layer=3, n_embd=32, n_head=4)
    with pytest.raises(UserError, match="'gpt2' is not supported: .* is the weight of a Conv1D"):
        require_supported(str(folder), "auto")


@pytest.mark.skipif(int(transformers.__version__.split(".")[0]) < 5, reason="experts were Linears until transformers 5")
def test_fused_experts_are_refused(tmp_path):
    folder = make_model(tmp_path / "mixtral", "MixtralConfig", num_local_experts=2)
    with pytest.raises(UserError, match="is the weight of a Mixtral"):
        require_supported(str(folder), "auto")


def test_blocks_that_share_weights_are_refused(tmp_path):
    loaded = load_model(str(make_model(tmp_path / "model", "LlamaConfig")), torch.device("cpu"))
    layers = loaded.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight is shared with .*layers\.1"):
        find_blocks(loaded, "auto")


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_every_traced_block_is_checked_not_only_the_last(tmp_path, num_blocks):
    """A weight outside of a Linear, or shared, in the second-last block would be left untraced without a word."""
    loaded = load_model(str(make_model(tmp_path / "model", "LlamaConfig")), torch.device("cpu"))
    second_last = loaded.model.layers[1].mlp
    conv1d = transformers.pytorch_utils.Conv1D(64, 32)
    spoilt = {
        "is the weight of a Conv1D": lambda: setattr(second_last, "up_proj", conv1d),
        "is shared with": lambda: setattr(second_last.up_proj, "weight", loaded.model.layers[0].mlp.up_proj.weight),
    }
    original = second_last.up_proj
    for reason, spoil in reversed(spoilt.items()):
        spoil()
        if num_blocks == 1:
            find_blocks(loaded, "auto", num_blocks)
        else:
            with pytest.raises(UserError, match=rf"layers\.1\.mlp\.up_proj\.weight {reason}"):
                find_blocks(loaded, "auto", num_blocks)
        second_last.up_proj = original


def test_quantised_weights_encoders_and_adapters_are_refused(tmp_path):
    folder = make_model(tmp_path / "model", "LlamaConfig")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="its weights are quantised"):
        require_supported(str(folder), "auto")
    transformers.T5Config(d_model=32, num_layers=1).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="is not a causal language model"):
        require_supported(str(tmp_path / "t5"), "auto")
    (tmp_path / "adapter").mkdir()
    shutil.copy(folder / "tokenizer.json", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge_and_unload"):
        require_supported(str(tmp_path / "adapter"), "auto")


def test_a_family_that_is_insisted_on_must_be_the_models(tiny_models, tmp_path):
    require_supported(str(tiny_models["pythia"]), "pythia")
    require_supported(str(tiny_models["qwen"]), "qwen")
    with pytest.raises(UserError, match="MODEL_FAMILY = 'pythia'.*'qwen2'.*allowed: auto, qwen"):
        require_supported(str(tiny_models["qwen"]), "pythia")
    with pytest.raises(UserError, match="allowed: auto$"):
        require_supported(str(make_model(tmp_path / "llama", "LlamaConfig")), "qwen")
