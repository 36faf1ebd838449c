"""Making a POST-SFT model: what is trained, that it learns, and that a run repeats."""

from __future__ import annotations

import json
import shutil
import subprocess

import accelerate.tracking
import pytest
import torch
import transformers
from conftest import DEMO, contents, make_model, read_rows, run_script, write_rows
from huggingface_hub import ModelCard
from process_pool import Launch
from safetensors.torch import load_file

from utils.files import read_json
from utils.fine_tuning import Progress, collate
from utils.folder_artifacts import FolderArtifact
from utils.models import load_model, load_tokenizer
from utils.paths import STEP_5
from utils.performance_functions.hh import Dialogues, tokenize_dialogues

SCRIPT = "data/make_sft_model.py"


def test_labels_are_the_completion_and_the_final_eos(tiny_models):
    tokenizer = load_tokenizer(str(tiny_models["pythia"]))
    examples = tokenize_dialogues(Dialogues(["\n\nHuman: Hi\n\nAssistant:"], [" Hello there."]), tokenizer)
    batch = collate(examples, tokenizer.pad_token_id)
    labels = batch["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == " Hello there.<|endoftext|>"
    assert batch["labels"].shape == batch["input_ids"].shape


def test_fine_tuning_learns_and_repeats(small_data, tmp_path):
    for name in ("first-sft", "second-sft"):
        arguments = ("--HH_DATASET", small_data / "hh", "--SFT_MODEL_DIR", tmp_path / name, "--NUM_EPOCHS", 2)
        run_script(SCRIPT, *arguments)
    perplexity = read_json(tmp_path / "first-sft" / "manifest.json")["perplexity"]
    assert perplexity["after"] < 0.7 * perplexity["before"]
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first-sft", "second-sft"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_model(str(tmp_path / "first-sft"), torch.device("cpu")).config.model_type == "gpt_neox"


def test_a_base_model_is_fine_tuned_further(tiny_models, small_data, tmp_path):
    data = tmp_path / "hh"
    for split in ("train", "test"):
        write_rows(data / f"{split}.jsonl", read_rows(small_data / "hh" / f"{split}.jsonl")[:10])
    base = tiny_models["qwen"]
    arguments = ("--BASE_MODEL", base, "--HH_DATASET", data, "--SFT_MODEL_DIR", tmp_path / "own", "--NUM_EPOCHS", 3)
    run_script(SCRIPT, *arguments, "--LEARNING_RATE", "1e-3")
    assert read_json(tmp_path / "own" / "config.json")["model_type"] == "qwen2"
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "own"))
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])


def test_a_killed_training_resumes_and_ends_as_well(small_data, tmp_path, monkeypatch, capsys):
    common = ["--HH_DATASET", str(small_data / "hh"), "--NUM_EPOCHS", "3", "--BATCH_SIZE", "10"]
    run_script(SCRIPT, *common, "--SFT_MODEL_DIR", str(tmp_path / "whole"))
    bar, steps = Progress, []
    original = bar.on_step_end

    def stop_in_the_middle(self, *arguments, **keywords):
        steps.append(1)
        if len(steps) in (1, 12):  # of 18, with a checkpoint at every second
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(bar, "on_step_end", stop_in_the_middle)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run_script(SCRIPT, *common, "--SFT_MODEL_DIR", str(tmp_path / "killed"))
        assert stop.value.code == 130
        assert not (tmp_path / "killed").exists()
        told = capsys.readouterr().out
        assert "going on with" not in told, "there was nothing to go on with"
        assert "resuming from" not in told
    monkeypatch.setattr(bar, "on_step_end", original)
    run_script(SCRIPT, *common, "--SFT_MODEL_DIR", str(tmp_path / "killed"))
    told = capsys.readouterr().out
    assert "going on with" in told
    assert "checkpoint-10" in told
    whole, killed = (read_json(tmp_path / name / "manifest.json")["perplexity"] for name in ("whole", "killed"))
    assert killed["before"] == whole["before"]
    assert killed["after"] == pytest.approx(whole["after"], rel=0.02)
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {
        file.name for file in (tmp_path / "killed").iterdir()
    }
    assert not list((tmp_path / "killed").glob("checkpoint-*"))


def test_another_tokenizer_under_the_same_name_makes_another_model(sixty_four, tmp_path, capsys):
    tokenizer = shutil.copytree(DEMO / "tokenizer", tmp_path / "tokenizer")
    arguments = [*common_arguments(sixty_four, tmp_path / "model"), "--TOKENIZER", tokenizer]
    run_script(SCRIPT, *arguments)
    (tokenizer / "README.md").write_text("edited", encoding="utf-8")
    run_script(SCRIPT, *arguments)
    assert "finished before" in capsys.readouterr().out
    config = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "a"}), encoding="utf-8")
    with pytest.raises(SystemExit):
        run_script(SCRIPT, *arguments)
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "was made with other settings: tokenizer = '" in line


# ------------------------------------------------------------------------------- how the batch is divided


@pytest.fixture
def sixty_four(tmp_path):
    """Dialogues that fill four batches of 16."""
    rows = read_rows(DEMO / "hh" / "train.jsonl")
    write_rows(tmp_path / "hh64" / "train.jsonl", rows[:64])
    write_rows(tmp_path / "hh64" / "test.jsonl", rows[64:72])
    return tmp_path / "hh64"


def common_arguments(data, folder):
    return ["--HH_DATASET", data, "--SFT_MODEL_DIR", folder, "--NUM_EPOCHS", 1, "--SAVE_EVERY", 100]


def assert_same_model(folder, other):
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    for name, tensor in theirs.items():
        assert torch.norm(ours[name] - tensor) <= 1e-3 * torch.norm(tensor), name


def test_accumulated_gradients_give_the_same_model(sixty_four, tmp_path):
    for name, at_once, checkpointing in (("whole", 16, False), ("parts", 4, True)):
        run_script(
            SCRIPT,
            *common_arguments(sixty_four, tmp_path / name),
            *("--BATCH_SIZE_PER_DEVICE", at_once, "--GRADIENT_CHECKPOINTING", checkpointing),
        )
    assert_same_model(tmp_path / "parts", tmp_path / "whole")


def test_two_processes_give_the_same_model_and_print_each_line_once(sixty_four, tmp_path):
    run_script(SCRIPT, *common_arguments(sixty_four, tmp_path / "one"))
    ends = Launch(tmp_path / "log", 2, [(SCRIPT, common_arguments(sixty_four, tmp_path / "two"))]).ended()
    assert [end.code for end in ends] == [0, 0], ends
    assert read_json(tmp_path / "two" / "manifest.json")["processes"] == 2
    assert_same_model(tmp_path / "two", tmp_path / "one")
    for line in ("== POST-SFT model", "   test perplexity"):
        assert "".join(end.out for end in ends).count(line) == 1, line


# ------------------------------------------------------------------------------------------ what is written


def test_the_recipe_lies_beside_the_model(tiny_models, sixty_four, tmp_path):
    base, folder = tiny_models["pythia"], tmp_path / "own-sft"
    run_script(SCRIPT, "--BASE_MODEL", base, *common_arguments(sixty_four, folder), "--LEARNING_RATE", 1e-4)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None, "a local folder is not a hub id"
    perplexity = read_json(folder / "manifest.json")["perplexity"]
    for fragment in (
        "64 dialogues",
        "`LEARNING_RATE`: 0.0001",
        "`SEED`: 42",
        *(f"{p:.3f}" for p in perplexity.values()),
    ):
        assert fragment in card.text


# --------------------------------------------------------------------------------------------- wrong inputs


@pytest.fixture
def refusal(data_copy, tmp_path, capsys):
    """Runs the script, which must refuse, and returns its error line; no model may be written."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as stop:
            run_script(
                SCRIPT,
                "--HH_DATASET",
                data_copy / "hh",
                "--SFT_MODEL_DIR",
                tmp_path / "sft",
                "--NUM_EPOCHS",
                1,
                *arguments,
            )
        assert stop.value.code == 1
        assert not (tmp_path / "sft").exists()
        return capsys.readouterr().err.splitlines()[-1]

    return refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64), "is the weight of a Conv1D"),
        (transformers.T5Config(d_model=32, num_layers=2, num_heads=2, vocab_size=64), "not a causal language model"),
    ],
)
def test_a_base_that_could_not_be_repaired_is_refused(refusal, tmp_path, config, message):
    (tmp_path / "base").mkdir()
    config.save_pretrained(tmp_path / "base")
    line = refusal("--BASE_MODEL", tmp_path / "base")
    assert line.startswith(f"error: {tmp_path / 'base'}: ")
    assert message in line


def test_a_base_whose_own_loss_is_another_is_refused(refusal, tmp_path):
    base = make_model(tmp_path / "base", "LlamaConfig", logit_scale=0.5)  # which the forward pass of Llama ignores
    line = refusal("--BASE_MODEL", base)
    assert line.startswith(f"error: {base}: model type 'llama' is not supported: its forward pass does other things ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--BASE_MODEL", "somebody/not-here"], "error: somebody/not-here: cannot load the configuration"),
        (["--BASE_MODEL", "no/such/folder"], "error: no model at no/such/folder"),
        (["--TOKENIZER", "None"], "error: TOKENIZER = None: the bare architecture pythia-demo needs one"),
        (["--BATCH_SIZE", 24], "error: BATCH_SIZE = 24: must be a multiple of 16"),
        (["--TRACKER", "trackio"], "error: TRACKER = 'trackio': the package trackio is not installed"),
        (["--TRACKER", "paper"], "error: TRACKER = paper: allowed is 'trackio', 'wandb' or None"),
        (["--HH_DATASET", "somebody/not-here"], "error: HH_DATASET = 'somebody/not-here', split train: "),
    ],
)
def test_wrong_constants_are_refused(refusal, monkeypatch, arguments, message):
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    assert refusal(*arguments).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "a", "answer": "b"}\n', "'prompt'"),
        (b"", "is empty; it needs at least one dialogue"),
        (b'{"prompt": "caf\xe9", "chosen": " b"}\n', "UTF-8"),
    ],
)
def test_wrong_dialogues_are_refused(refusal, data_copy, content, message):
    (data_copy / "hh" / "train.jsonl").write_bytes(content)
    line = refusal()
    assert "train.jsonl" in line or "split train" in line
    assert message in line


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_another_script_made_or_none_is_never_replaced(small_data, tmp_path, capsys, overwrite):
    own, repaired = tmp_path / "own", tmp_path / "repaired"
    own.mkdir()
    (own / "notes.txt").write_text("mine", encoding="utf-8")
    checkpoint = FolderArtifact(repaired, STEP_5)
    with checkpoint.staging_folder():
        checkpoint.publish_folder(0.0, {})
    before = contents(tmp_path)
    for folder, told in ((own, "has no manifest.json, so this project did not make it"), (repaired, f"by {STEP_5}")):
        arguments = ["--HH_DATASET", small_data / "hh", "--SFT_MODEL_DIR", folder, "--OVERWRITE", overwrite]
        with pytest.raises(SystemExit) as stop:
            run_script(SCRIPT, *arguments)
        assert stop.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
        assert "move it away, or choose another SFT_MODEL_DIR" in line
    assert contents(tmp_path) == before


def test_a_full_disk_is_one_line_and_the_training_resumes(small_data, make_disk, capsys):
    folder = make_disk("3m") / "sft"  # weights of 2 MB fit, not their optimizer's moments
    arguments = ["--HH_DATASET", small_data / "hh", "--SFT_MODEL_DIR", folder, "--NUM_EPOCHS", 1, "--SAVE_EVERY", 2]
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPT, *arguments)
    assert stop.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the disk is full; free some space and run the same command to continue (")
    assert not folder.exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder.parent)], check=True)
    run_script(SCRIPT, *arguments)
    load_model(str(folder), torch.device("cpu"))
