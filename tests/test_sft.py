"""Making a POST-SFT model: what is trained, that it learns, and that a run repeats."""

from __future__ import annotations

import pytest
import torch
from conftest import load_script, read_rows, run_script, write_rows
from safetensors.torch import load_file

from utils.artifacts import read_json
from utils.models import load_model, load_tokenizer
from utils.performance_functions.hh import Dialogues, tokenize_dialogues

SCRIPT = "data/make_sft_model.py"


def test_labels_are_the_completion_and_the_final_eos(tiny_models):
    sft = load_script(SCRIPT)
    tokenizer = load_tokenizer(str(tiny_models["pythia"]))
    examples = tokenize_dialogues(Dialogues(["\n\nHuman: Hi\n\nAssistant:"], [" Hello there."]), tokenizer)
    row = sft.DialogueDataset(examples)[0]
    labels = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(labels) == " Hello there.<|endoftext|>"
    assert len(row["labels"]) == len(row["input_ids"])


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


def test_a_killed_training_goes_on_and_ends_as_well(small_data, tmp_path, monkeypatch, capsys):
    script = load_script(SCRIPT)
    common = ["--HH_DATASET", str(small_data / "hh"), "--NUM_EPOCHS", "3", "--BATCH_SIZE", "10", "--SAVE_EVERY", "4"]
    run_script(SCRIPT, *common, "--SFT_MODEL_DIR", str(tmp_path / "whole"))
    bar, steps = script.ProgressBar, []
    original = bar.on_step_end

    def stop_in_the_middle(self, *arguments, **keywords):
        steps.append(1)
        if len(steps) == 11:  # of 18; the last checkpoint is that of step 8
            raise KeyboardInterrupt
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(bar, "on_step_end", stop_in_the_middle)
    with pytest.raises(SystemExit) as stop:
        run_script(SCRIPT, *common, "--SFT_MODEL_DIR", str(tmp_path / "killed"))
    assert stop.value.code == 130
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(bar, "on_step_end", original)
    run_script(SCRIPT, *common, "--SFT_MODEL_DIR", str(tmp_path / "killed"))
    assert "going on from" in capsys.readouterr().out
    whole, killed = (read_json(tmp_path / name / "manifest.json")["perplexity"] for name in ("whole", "killed"))
    assert killed["before"] == whole["before"]
    assert killed["after"] == pytest.approx(whole["after"], rel=0.02)
    assert {file.name for file in (tmp_path / "whole").iterdir()} == {
        file.name for file in (tmp_path / "killed").iterdir()
    }
    assert not list((tmp_path / "killed").glob("checkpoint-*"))
