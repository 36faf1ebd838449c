"""Architectures beyond the two of the paper, by one rule; and those that are refused, with the reason."""

from __future__ import annotations

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import OWN_LOGITS, SHARED_CASES, SIZES, Workspace, make_model, needs_cases
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM

from utils import trunk as trunk_module
from utils.batching import SHARE_OF_GPU_MEMORY, BatchLoader, token_budget
from utils.console import UserError
from utils.evaluation import EvaluationModel
from utils.files import read_json
from utils.fine_tuning import completion_loss
from utils.models import load_config, load_model, load_tokenizer, require_supported
from utils.paths import STEP_1, STEP_2, STEP_4, STEP_5
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import sequence_nll
from utils.results import summarise
from utils.transformer_blocks import find_blocks, traced_linear_names
from utils.trunk import HiddenStateCache, Trunk

TRANSFORMERS_4 = int(transformers.__version__.split(".")[0]) < 5
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "olmo": ("OlmoConfig", {}),
    "phi": ("PhiConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    **OWN_LOGITS,
}


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
    sequences = tokenize_dialogues(load_dialogues(str(small_data / "hh"), "train"), load_tokenizer(str(model)))[:20]
    with torch.no_grad():
        own = torch.stack([own_nll(loaded, sequence) for sequence in sequences])
        for batch in BatchLoader(sequences, 400, pad_token_id=0):
            ours = sequence_nll(trunk.tail, states.add_to(batch)).total
            torch.testing.assert_close(ours, sequence_nll(loaded, batch).total, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(ours, own[batch["index"]], rtol=1e-5, atol=0)


def own_nll(model, sequence) -> torch.Tensor:
    """The NLL of one text's labels from the logits of the model's own forward pass."""
    (batch,) = BatchLoader([sequence], 1 << 30, pad_token_id=0)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")


def test_fine_tuning_minimises_the_models_own_loss(model):
    loaded = load_model(str(model), torch.device("cpu"))
    tokens = torch.randint(1_536, (2, 50), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(50) < 20, -100)
    ours, own = (
        loss_of(input_ids=tokens, labels=labels)["loss"] for loss_of in (partial(completion_loss, loaded), loaded)
    )
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=0)
    parameters = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    gradients = zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True)
    for gradient, expected in gradients:
        assert torch.norm(gradient - expected) <= 1e-4 * torch.norm(expected)


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


def test_a_model_of_text_and_images(small_data, tmp_path, monkeypatch):
    """Whose configuration has no sizes of its own, but a configuration for each of its parts."""
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {"text_config": {**SIZES, "head_dim": 8}, "vision_config": {**images, "image_size": 28, "patch_size": 14}}
    model = make_model(tmp_path / "gemma3-tiny", "Gemma3Config", **parts)
    assert not hasattr(load_config(str(model)), "hidden_size")
    workspace = Workspace(model, small_data, tmp_path / "output")
    workspace.run(STEP_1, "--TASK_NAME", "bias")
    workspace.run(STEP_2, "--ANSWERS_OF", "bias")
    workspace.run(STEP_4, "--TASK_NAME", "bias", "--BOTTOM_K", 4, "--SCORES_TYPE", "representation")
    free_bytes = 128 << 20  # so little that the hidden size decides
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 16 << 30))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=load_config(str(model)))
    of_text = SHARE_OF_GPU_MEMORY * free_bytes / (4 * 3 * 32 * SIZES["hidden_size"])
    assert token_budget(on_gpu, "auto") == int(of_text)


def test_a_model_of_several_language_models(tmp_path, tiny_models):
    """Which of them would be measured, nobody knows."""
    transformers.MusicgenConfig(
        text_encoder=transformers.T5Config(d_model=32, num_layers=1).to_dict(),
        audio_encoder=transformers.EncodecConfig().to_dict(),
        decoder={"hidden_size": 32, "num_hidden_layers": 1},
    ).save_pretrained(tmp_path / "musicgen")
    with pytest.raises(UserError, match="'musicgen' is not supported: config.json describes several language models"):
        load_config(str(tmp_path / "musicgen"))


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


# ------------------------------------------------------------------------- blocks that differ by position


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A model whose last block alone sees all of a dialogue, without positions; the others see 40 tokens."""
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    more = {"sliding_window": 40, "layer_types": types, "initializer_range": 0.3}
    return make_model(tmp_path_factory.mktemp("windowed") / "cohere2-tiny", "Cohere2Config", **more)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_the_tails_blocks_keep_their_types(windowed, small_data, num_blocks):
    loaded = load_model(str(windowed), torch.device("cpu"))
    trunk = Trunk(loaded, "auto", num_blocks)
    assert not trunk.is_empty
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    assert loaded.config.layer_types == types
    assert trunk.tail.base_model.config.layer_types == types[-num_blocks:]
    states = HiddenStateCache(trunk)
    sequences = tokenize_dialogues(load_dialogues(str(small_data / "hh"), "train"), load_tokenizer(str(windowed)))
    assert max(len(sequence.input_ids) for sequence in sequences) > 2 * 40
    with torch.no_grad():
        own = torch.stack([own_nll(loaded, sequence) for sequence in sequences])
        for batch in BatchLoader(sequences, 1_000, pad_token_id=0):
            ours = sequence_nll(trunk.tail, states.add_to(batch)).total
            torch.testing.assert_close(ours, own[batch["index"]], rtol=1e-5, atol=0)


def test_only_models_with_windows_are_compared_on_a_long_sequence(tiny_models, windowed):
    """Others would pay for it at every start."""
    for folder, length in ((tiny_models["pythia"], 16), (tiny_models["qwen"], 16), (windowed, 1_024)):
        assert trunk_module._guard_length(load_config(str(folder)), 3) == length
    config = load_config(str(tiny_models["pythia"]))
    config.attention_span = 64  # a window under a name that nobody has thought of
    assert trunk_module._guard_length(config, 3) == 1_024


@pytest.mark.skipif(TRANSFORMERS_4, reason="blocks looked up their own types until transformers 5")
@pytest.mark.parametrize("config_name", ["Cohere2Config", "Gemma2Config"])
def test_a_tail_with_the_types_of_other_blocks_is_no_tail(config_name, tmp_path, monkeypatch):
    """Their windows are longer than the 16 tokens on which models without windows are compared."""
    types = ["sliding_attention", "full_attention", "full_attention"]
    folder = make_model(tmp_path / "model", config_name, sliding_window=300, layer_types=types, head_dim=8)
    loaded = load_model(str(folder), torch.device("cpu"))
    monkeypatch.setattr(trunk_module, "_settings_by_block", lambda *_: {})
    assert Trunk(loaded, "auto", 1).is_empty


def test_step_5_and_step_6_agree_about_a_windowed_model(windowed, small_data, tmp_path):
    workspace = Workspace(windowed, small_data, tmp_path / "output")
    workspace.run(STEP_1, "--TASK_NAME", "truth")
    workspace.run(STEP_4, "--TASK_NAME", "truth", "--BOTTOM_K", 4)
    workspace.run(STEP_5, "--TASK_NAME", "truth", "--BOTTOM_K", 4, "--LEARNING_RATE", 0.01)
    (folder,) = (workspace.output / "gradient_ascent_models").iterdir()
    measured = read_json(folder / "repair.json")["measurements"]
    for model, moment in ((windowed, "before"), (folder, "after")):
        fresh = Workspace(model, small_data, tmp_path / moment)
        for script, metric, name, number in (
            ("anthropic_eval", "anthropic", "perplexity", "perplexity"),
            ("truth_loss", "truth", "truth", "loss"),
        ):
            fresh.run(f"evaluation_scripts/{script}.py")
            alone = read_json(fresh.output / "results" / f"{model.name}_{metric}_test.json")
            assert measured[name][moment] == pytest.approx(alone[number], rel=1e-5)


# ------------------------------------------------------------------------------------------- what is refused


def test_logits_that_differ_from_the_models_own_are_refused(tmp_path, monkeypatch):
    """A forward pass that does something nobody has thought of."""
    folder = make_model(tmp_path / "model", "LlamaConfig")
    original = transformers.LlamaForCausalLM.forward

    def doubled(self, *arguments, **keywords):
        output = original(self, *arguments, **keywords)
        output.logits = 2 * output.logits
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", doubled)
    with pytest.raises(
        UserError, match="'llama' is not supported: its forward pass does other things .* by 0.5 "
    ) as refusal:
        load_model(str(folder), torch.device("cpu"))
    assert "\n" not in str(refusal.value)


def test_a_scale_in_config_json_that_the_forward_pass_ignores_is_refused(tmp_path):
    folder = make_model(tmp_path / "model", "LlamaConfig", logit_scale=0.5)
    with pytest.raises(UserError, match="'llama' is not supported: its forward pass does other things"):
        load_model(str(folder), torch.device("cpu"))


def test_a_forward_pass_that_needs_more_than_tokens_is_refused(tmp_path):
    """X-MOD wants to know the language."""
    model = make_model(tmp_path / "xmod", "XmodConfig", is_decoder=True, languages=["en_XX", "de_DE"])
    with pytest.raises(UserError, match=r"'xmod' is not supported: .* on tokens alone \(Input language unknown"):
        load_model(str(model), torch.device("cpu"))


def test_weights_that_give_no_finite_logits_are_refused(tmp_path):
    folder = make_model(tmp_path / "model", "LlamaConfig")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38  # finite, and too large
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its logits are NaN or infinite; the weights may be broken"):
        load_model(str(folder), torch.device("cpu"))


def test_attention_to_tokens_that_follow_is_refused(tmp_path):
    """Padding on the right would change the loss."""
    folder = make_model(tmp_path / "model", "BertGenerationConfig", initializer_range=0.3)
    with pytest.raises(UserError, match="'bert-generation' is not supported: its attention is not causal"):
        load_model(str(folder), torch.device("cpu"))


def test_weights_that_the_model_has_no_place_for_are_refused(tmp_path):
    """Fewer blocks in config.json than in the weights; buffers that older versions saved do not count."""
    folder = make_model(tmp_path / "model", "GPTNeoXConfig")
    tensors = load_file(folder / "model.safetensors")
    buffers = {f"gpt_neox.layers.0.attention.{name}": torch.ones(1) for name in ("bias", "masked_bias")}
    buffers["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(4)
    save_file({**tensors, **buffers}, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(str(folder), torch.device("cpu"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r": 12 tensors have no place .* config.json describes, first .*layers\.2\."):
        load_model(str(folder), torch.device("cpu"))


def test_weights_outside_of_linears_are_refused(tmp_path):
    folder = make_model(tmp_path / "gpt2", "GPT2Config", n_layer=3, n_embd=32, n_head=4)
    with pytest.raises(UserError, match="'gpt2' is not supported: .* is the weight of a Conv1D"):
        require_supported(str(folder), "auto")


@pytest.mark.skipif(TRANSFORMERS_4, reason="experts were Linears until transformers 5")
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


@needs_cases
@pytest.mark.skipif(TRANSFORMERS_4, reason="the models were saved with transformers 5")
@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("final_softcap_gemma2", 6.334147),
        ("logits_scaling_granite", 6.887881),
        ("head_transform_modernbert", 6.165887),
    ],
)
def test_the_cases_have_their_right_values(case, loss):
    model = str(SHARED_CASES / case / "model")
    measured = EvaluationModel(load_model(model, torch.device("cpu")), load_tokenizer(model))
    dialogues = load_dialogues(str(SHARED_CASES / "hh"), "test")
    assert summarise(measured.measure("anthropic", dialogues))["loss"] == pytest.approx(loss, rel=1e-6)


def test_a_family_that_is_insisted_on_must_be_the_models(tiny_models, tmp_path):
    require_supported(str(tiny_models["pythia"]), "pythia")
    require_supported(str(tiny_models["qwen"]), "qwen")
    with pytest.raises(UserError, match="MODEL_FAMILY = 'pythia'.*'qwen2'.*allowed: auto, qwen"):
        require_supported(str(tiny_models["qwen"]), "pythia")
    with pytest.raises(UserError, match="allowed: auto$"):
        require_supported(str(make_model(tmp_path / "llama", "LlamaConfig")), "qwen")
