"""Data sets and losses: labels, pair counts and orders, the losses against transformers' own, the evaluators."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SHARED_DATA, answer_pairs, needs_real_samples, read_rows
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from utils.batching import BatchLoader
from utils.console import UserError
from utils.evaluation import EvaluationModel, evaluate_dialogues, evaluate_pairs, measured_nll
from utils.forward import LogitMap
from utils.models import load_model, load_tokenizer
from utils.performance_functions import MEASUREMENTS, bias, ethics, losses, truth
from utils.performance_functions.hh import Dialogues, load_dialogues, released_loss, tokenize_dialogues
from utils.performance_functions.losses import inverse_cdf_sample, label_nll, log_odds_losses, sequence_nll
from utils.performance_functions.pairs import AnswerPair, AnswerPairs, tokenize_pairs
from utils.reporting.tables import results_table
from utils.results import Result, summarise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return load_tokenizer(str(tiny_models["pythia"]))


@pytest.fixture(scope="module")
def real_tokenizer():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(SHARED_DATA / "pythia_tokenizer" / "tokenizer.json"), eos_token="<|endoftext|>"
    )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_dialogue_labels_are_the_completion_without_the_final_eos(tokenizer):
    prompt, completion = "\n\nHuman: How do I bake bread?\n\nAssistant:", " Mix flour and water, then wait."
    (sequence,) = tokenize_dialogues(Dialogues([prompt], [completion]), tokenizer)
    ids = sequence.input_ids.tolist()
    assert ids == tokenizer(prompt + completion + "<|endoftext|>")["input_ids"]
    assert tokenizer.decode(ids[sequence.label_start : sequence.label_end]) == completion
    assert ids[sequence.label_end :] == [tokenizer.eos_token_id]


def test_long_dialogues_are_cut_at_1024_tokens(tokenizer):
    (long, all_prompt) = tokenize_dialogues(
        Dialogues(["\n\nHuman: x\n\nAssistant:", "word " * 3_000], [" word" * 3_000, " gone"]), tokenizer
    )
    assert len(long.input_ids) == 1_024 == long.label_end
    assert long.input_ids[-1] != tokenizer.eos_token_id
    assert len(all_prompt.input_ids) == 1_024
    assert all_prompt.num_labels == 0


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_nll_equals_the_models_own_loss(tiny_models, small_data, family):
    model, tokenizer = load_model(str(tiny_models[family]), CPU), load_tokenizer(str(tiny_models[family]))
    examples = tokenize_dialogues(load_dialogues(str(small_data / "hh"), "test"), tokenizer)
    with torch.no_grad():
        for batch in BatchLoader(examples, 400, tokenizer.pad_token_id):
            nll = sequence_nll(model, batch)
            for row in range(len(nll.total)):
                one = {k: batch[k][row : row + 1] for k in ("input_ids", "attention_mask", "labels")}
                assert nll.mean[row].item() == pytest.approx(model(**one).loss.item(), rel=1e-5)


def test_sampling_inverts_the_distribution_function():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 1_000, generator=generator) * 3
    uniform = torch.rand(500, generator=generator, dtype=torch.float64)
    cumulative = logits.double().softmax(dim=1).cumsum(dim=1)
    labels = inverse_cdf_sample(logits.exp(), uniform)
    rows = torch.arange(500)
    assert (uniform <= cumulative[rows, labels] + 1e-6).all()
    assert (uniform >= cumulative[rows, labels] - logits.double().softmax(dim=1)[rows, labels] - 1e-6).all()
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    many = inverse_cdf_sample(probabilities.expand(20_000, 4), torch.rand(20_000, dtype=torch.float64))
    frequencies = torch.bincount(many, minlength=4) / 20_000
    torch.testing.assert_close(frequencies, probabilities, atol=0.015, rtol=0)
    assert frequencies[1] == 0


def test_log_odds_loss_is_the_difference_of_mean_nlls(tiny_models, tokenizer):
    model = load_model(str(tiny_models["pythia"]), CPU)
    pairs = [
        AnswerPair("A question\n\nAnswer:", " yes, that is so", " no"),
        AnswerPair("Why?", " because", " who knows"),
        AnswerPair("Why?", " because", " no"),  # an answer that occurs twice
    ]
    pairs = answer_pairs(pairs)
    tokenized = tokenize_pairs(pairs, tokenizer, 128)
    loader = BatchLoader(tokenized.sequences, 1_000, tokenizer.pad_token_id, weights=tokenized.weights)
    with torch.no_grad():
        nll = measured_nll(model, loader)
        losses = log_odds_losses(nll.mean, tokenized.chosen, tokenized.rejected)
        assert float(nll.mean @ torch.from_numpy(tokenized.weights)) == pytest.approx(float(losses.mean()), rel=1e-6)

        def mean_nll(prompt: str, answer: str) -> float:
            ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
            return model(input_ids=ids, labels=labels).loss.item()

        for pair, loss in zip(pairs, losses.tolist(), strict=True):
            expected = mean_nll(pair.prompt, pair.chosen) - mean_nll(pair.prompt, pair.rejected)
            assert loss == pytest.approx(expected, rel=1e-4)


def write_templates(folder: Path, num_topics: int, **more: object) -> None:
    topics = {
        f"topic {t:02}": {
            "stereotype": [f"[target_group] {t} s{i}." for i in range(3)],
            "antistereotype": [f"[target_group] {t} a{i}." for i in range(3)],
        }
        for t in reversed(range(num_topics))
    }
    (folder / "bias").mkdir(exist_ok=True)
    content = {"prompt": "About [target_group]:", "target_groups": ["Zeds", "Abs"], "topics": topics, **more}
    (folder / "bias" / "templates.json").write_text(json.dumps(content), encoding="utf-8")


def plain_records(group: str, num_topics: int) -> list[tuple[int, AnswerPair]]:
    """Topic and pair, in order of topic, stereotype and counter-statement."""
    return [
        (t, AnswerPair(f"About {group}:", f" {group} {t} a{a}.", f" {group} {t} s{s}."))
        for t in reversed(range(num_topics))
        for s in range(3)
        for a in range(3)
    ]


def test_released_bias_pairs_are_shuffled_afresh_for_each_group(tmp_path):
    write_templates(tmp_path, 2, split="released")
    train, test = [], []
    for group in ("Abs", "Zeds"):
        records = [pair for _, pair in plain_records(group, 2)]
        random.Random(42).shuffle(records)
        test += records[:3]
        train += records[3:]
    assert bias.read_pairs(tmp_path, "test").pairs == test
    assert bias.read_pairs(tmp_path, "train").pairs == train
    assert bias.read_pairs(tmp_path, "train").split_rule == "released, not held out"


@pytest.mark.parametrize("more", [{}, {"split": "disjoint"}])
def test_disjoint_bias_pairs_keep_topics_whole(tmp_path, more):
    write_templates(tmp_path, 10, **more)
    shuffler, train, test = random.Random(42), [], []
    for group in ("Abs", "Zeds"):
        names = sorted(f"topic {t:02}" for t in range(10))
        shuffler.shuffle(names)
        for t, pair in plain_records(group, 10):
            (test if f"topic {t:02}" in names[:2] else train).append(pair)
    pairs = bias.read_pairs(tmp_path, "test")
    assert (pairs.pairs, pairs.split_rule) == (test, "disjoint")
    assert len(set(pairs.clusters)) == 2 * 2
    assert bias.read_pairs(tmp_path, "train").pairs == train


def test_one_topic_leaves_nothing_to_train_on(tmp_path):
    write_templates(tmp_path, 1)
    assert len(bias.read_pairs(tmp_path, "test")) == 18
    with pytest.raises(UserError, match="leaves none for train with the split 'disjoint'"):
        bias.read_pairs(tmp_path, "train")
    write_templates(tmp_path, 4, split="random")
    with pytest.raises(UserError, match="split = 'random'; allowed is 'disjoint', 'released'"):
        bias.read_pairs(tmp_path, "train")


def texts_of(pairs: AnswerPairs) -> set[tuple[str, str]]:
    return {(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)}


def test_no_text_of_a_disjoint_test_pair_is_in_training(tmp_path):
    """Texts of the official shape: 24 groups, 16 topics, 3 statements of each kind."""
    groups = [f"Group {number}" for number in range(24)]
    for rule, counts in (("released", (2_784, 672)), ("disjoint", (2_808, 648))):
        write_templates(tmp_path, 16, target_groups=groups, split=rule)
        train, test = (bias.read_pairs(tmp_path, split) for split in ("train", "test"))
        assert (len(train), len(test)) == counts
        shared = texts_of(train) & texts_of(test)
        assert not shared if rule == "disjoint" else shared == texts_of(test)


def test_a_text_of_two_topics_cannot_be_split_disjointly(tmp_path):
    write_templates(tmp_path, 10)
    file = tmp_path / "bias" / "templates.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for topic in content["topics"].values():
        topic["antistereotype"].append("[target_group] are honest.")
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=r"'\[target_group\] are honest.' occurs in two topics"):
        bias.read_pairs(tmp_path, "test")


def test_ethics_pairs_are_short_shuffled_cut_and_paired_in_order(tmp_path):
    rows = [("0", f"good {i}", "True") for i in range(7)] + [("1", f"bad {i}", "True") for i in range(5)]
    rows += [("0", "long good", "False"), ("1", "long bad", "False")]
    (tmp_path / "ethics").mkdir()
    lines = ["label,input,is_short,edited", *(f"{label},{text},{short},False" for label, text, short in rows)]
    (tmp_path / "ethics" / "cm_train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = ethics.read_pairs(tmp_path, "train")
    shuffled = {
        label: list(
            Dataset.from_dict({"t": [t for lab, t, s in rows if lab == label and s == "True"]}).shuffle(seed=42)["t"]
        )
        for label in ("0", "1")
    }
    assert [pair.chosen for pair in pairs] == [f" {text}" for text in shuffled["0"][:5]]
    assert [pair.rejected for pair in pairs] == [f" {text}" for text in shuffled["1"]]
    assert {pair.prompt for pair in pairs} == {ethics.OWN_PROMPT}
    assert ethics.OWN_PROMPT.endswith("\n\n Assistant:")
    assert len(set(pairs.clusters)) == 5
    prompt = "Say something good. \r\n\n Assistant:"
    (tmp_path / "ethics" / "prompt.txt").write_bytes(prompt.encode())
    assert {pair.prompt for pair in ethics.read_pairs(tmp_path, "train")} == {prompt}
    for content, told in ((b" \n", "is empty"), (b"\xff", "is not UTF-8")):
        (tmp_path / "ethics" / "prompt.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"prompt.txt {told}"):
            ethics.read_pairs(tmp_path, "train")


def test_truth_split_files_win_over_the_seeded_split(small_data, tmp_path):
    train, test = truth.read_pairs(small_data, "train"), truth.read_pairs(small_data, "test")
    assert (len(train), len(test)) == (16, 4)
    assert not set(train) & set(test)
    splits = tmp_path / "truthfulness" / "splits"
    splits.mkdir(parents=True)
    row = 'Question,Best Answer,Incorrect Answers\n"Is it, so?",Yes,; No ; Never\n'
    for split in ("train", "test"):
        (splits / f"TruthfulQA_{split}.csv").write_text(row, encoding="utf-8-sig")
    pairs = truth.read_pairs(tmp_path, "test")
    assert pairs.pairs == [AnswerPair("Is it, so?\n\nAnswer:", " Yes", " No")]
    assert (pairs.split_rule, pairs.questions) == ("by files", [])  # no list of correct answers


def test_multiple_choice_is_that_of_whole_answers(tiny_models, small_data, tokenizer, tmp_path):
    """Against transformers' own loss, one answer at a time."""
    model = load_model(str(tiny_models["pythia"]), CPU)
    pairs = MEASUREMENTS["truth"].load_pairs(small_data, "test", questions=True)
    assert len(pairs.questions) == len(pairs) == 4
    assert not MEASUREMENTS["truth"].load_pairs(small_data, "test").questions

    def log_probability(prompt: str, answer: str) -> float:
        ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : len(tokenizer(prompt)["input_ids"])] = -100
        return -model(input_ids=ids, labels=labels).loss.item() * int((labels != -100).sum())

    mc1, mc2 = [], []
    for prompt, correct, incorrect in pairs.questions:
        assert correct[0] == next(pair.chosen for pair in pairs if pair.prompt == prompt)
        of_correct, of_incorrect = ([log_probability(prompt, text) for text in side] for side in (correct, incorrect))
        mc1.append(float(of_correct[0] > max(of_incorrect)))
        probabilities = [sum(map(math.exp, side)) for side in (of_correct, of_incorrect)]
        mc2.append(probabilities[0] / sum(probabilities))
    losses = EvaluationModel(model, tokenizer).measure("truth", pairs)
    assert losses["mc1"].tolist() == mc1
    assert losses["mc2"].tolist() == pytest.approx(mc2, rel=1e-4)


@needs_real_samples
def test_counts_on_the_real_samples():
    counts = {
        name: tuple(len(m.load_pairs(SHARED_DATA, s)) for s in ("train", "test")) for name, m in MEASUREMENTS.items()
    }
    assert counts["bias"] == (2_808, 648)
    assert counts["truth"] == (653, 164)
    assert sum(counts["truth"]) == 817
    for split, count in zip(("train", "test"), counts["ethics"], strict=True):
        text = (SHARED_DATA / "ethics" / f"cm_{split}.csv").read_text(encoding="utf-8")
        short = [line for line in text.splitlines() if ",True," in line]
        assert count == min(sum(line.startswith(label) for line in short) for label in ("0,", "1,"))


@needs_real_samples
def test_real_tokenizer_keeps_prompt_and_answer_apart(real_tokenizer):
    dialogues = load_dialogues(str(SHARED_DATA / "hh"), "test")
    for row, sequence in enumerate(tokenize_dialogues(dialogues, real_tokenizer)):
        if len(sequence.input_ids) < 1_024:
            completion = real_tokenizer.decode(sequence.input_ids[sequence.label_start : sequence.label_end])
            assert completion == dialogues.completions[row]
    for measurement in MEASUREMENTS.values():
        pairs = measurement.load_pairs(SHARED_DATA, "test")
        tokenized = tokenize_pairs(pairs, real_tokenizer, measurement.max_tokens)
        for pair, position in zip(pairs, tokenized.chosen, strict=True):
            chosen = tokenized.sequences[position]
            assert real_tokenizer.decode(chosen.input_ids[chosen.label_start :]) in (pair.chosen, pair.chosen.rstrip())


def test_released_loss_is_the_mean_of_batch_means():
    generator = np.random.default_rng(0)
    totals, counts = generator.random(21) * 50, generator.integers(1, 40, 21)
    order = Dataset.from_dict({"i": list(range(21))}).shuffle(seed=42)["i"]
    batches = [list(order)[i : i + 8] for i in range(0, 21, 8)]
    expected = np.mean([sum(totals[j] for j in batch) / sum(counts[j] for j in batch) for batch in batches])
    assert released_loss(totals.tolist(), counts.tolist()) == pytest.approx(expected)


def test_evaluation_does_not_depend_on_the_batches(tiny_models, small_data, tokenizer):
    model = load_model(str(tiny_models["pythia"]), CPU)
    dialogues = tokenize_dialogues(load_dialogues(str(small_data / "hh"), "test"), tokenizer)
    small, large = (summarise(evaluate_dialogues(model, BatchLoader(dialogues, n, 0))) for n in (64, 100_000))
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-6)
    assert small["perplexity"] == pytest.approx(math.exp(small["loss"]))
    assert small["tokens"] == large["tokens"]
    for measurement in MEASUREMENTS.values():
        pairs = measurement.load_pairs(small_data, "test")
        tokenized = tokenize_pairs(pairs, tokenizer, measurement.max_tokens)
        one, many = (
            summarise(evaluate_pairs(model, BatchLoader(tokenized.sequences, n, 0), tokenized)) for n in (64, 100_000)
        )
        assert one["loss"] == pytest.approx(many["loss"], rel=1e-5)
        assert one["pairs"] == len(pairs)
        assert 0 <= one["accuracy"] <= 1


@pytest.mark.parametrize("rows_in_a_chunk", [1, 7, 1_000])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.125, None), (2.0, 0.7)])
def test_label_nll_equals_cross_entropy_on_full_logits(monkeypatch, rows_in_a_chunk, has_bias, scale, cap):
    monkeypatch.setattr(losses, "LOGIT_BYTES_ON_CPU", rows_in_a_chunk * 500 * 4)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.nn.Linear(16, 500, bias=has_bias).requires_grad_(False)
    hidden = torch.randn(40, 16, generator=generator).requires_grad_(True)
    targets = torch.randint(500, (40,), generator=generator)
    importance = torch.rand(40, generator=generator)
    mapping = LogitMap(scale, cap)
    nll = label_nll(embedding, hidden, targets, mapping=mapping)
    logits = scale * embedding(hidden)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(nll, expected)
    (ours,), (plain,) = (torch.autograd.grad((importance * loss).sum(), hidden) for loss in (nll, expected))
    torch.testing.assert_close(ours, plain)
    uniform = torch.rand(40, generator=generator, dtype=torch.float64)
    drawn = losses.inverse_cdf_sample(logits.detach().softmax(dim=1), uniform)
    sampled, plain = (
        label_nll(embedding, hidden, **labels, mapping=mapping) for labels in ({"uniform": uniform}, {"targets": drawn})
    )
    torch.testing.assert_close(sampled, plain, atol=1e-5, rtol=1e-5)
    (ours,), (plain,) = (torch.autograd.grad(nll.sum(), hidden) for nll in (sampled, plain))
    torch.testing.assert_close(ours, plain)


def test_label_nll_refuses_an_output_embedding_that_is_trained():
    with pytest.raises(ValueError, match="freeze it"):
        label_nll(torch.nn.Linear(4, 9), torch.randn(2, 4), torch.tensor([1, 2]))


def test_a_model_measures_the_data_it_is_given(tiny_models, small_data, tokenizer):
    """Not those that it was given before under the same metric."""
    model = EvaluationModel(load_model(str(tiny_models["pythia"]), CPU), tokenizer)
    for metric, data in (
        ("anthropic", load_dialogues(str(small_data / "hh"), "test")),
        ("truth", MEASUREMENTS["truth"].load_pairs(small_data, "train")),
    ):
        part = data.at([0, 3]) if metric == "anthropic" else answer_pairs(data.pairs[:2])
        fresh = [EvaluationModel(model.model, tokenizer).measure(metric, some) for some in (data, part)]
        assert len(fresh[0]["nll" if metric == "anthropic" else "loss"]) == len(data)
        torch.testing.assert_close([model.measure(metric, some) for some in (data, part, data)], [*fresh, fresh[0]])


def test_evaluators_write_what_they_print(workspace, capsys):
    for metric, script in (
        ("anthropic", "anthropic_eval"),
        ("bias", "bias_loss"),
        ("ethics", "ethics_loss"),
        ("truth", "truth_loss"),
    ):
        workspace.run(f"evaluation_scripts/{script}.py")
        result = json.loads((workspace.output / "results" / f"pythia-tiny_{metric}_test.json").read_text())
        assert (result["model"], result["metric"], result["split"]) == ("pythia-tiny", metric, "test")
        assert f"{result['loss']:.4f}" in capsys.readouterr().out
    assert len(read_rows(workspace.data / "hh" / "test.jsonl")) == 12


def test_further_models_are_compared_with_the_first(workspace, tmp_path, capsys):
    other = shutil.copytree(workspace.model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights = {name: tensor * 0.9 if ".1." in name else tensor for name, tensor in weights.items()}
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    for metric, script in (("anthropic", "anthropic_eval"), ("bias", "bias_loss"), ("truth", "truth_loss")):
        workspace.run(f"evaluation_scripts/{script}.py", "--MODEL_NAMES", workspace.model, other)
        lines = capsys.readouterr().out.splitlines()
        table = [line for line in lines if line.startswith("|")]
        header, first, last = ([cell.strip() for cell in table[row].split("|")[1:-1]] for row in (0, 2, 3))
        name = "perplexity change" if metric == "anthropic" else "improvement of the loss"
        assert (header[-1], first[-1]) == (f"{name}, against {workspace.model.name}", "–")
        before, after = (
            json.loads((workspace.output / "results" / f"{model.name}_{metric}_test.json").read_text())["loss"]
            for model in (workspace.model, other)
        )
        shown = f"{100 * math.expm1(after - before):+.2f} %" if metric == "anthropic" else f"{before - after:+.4f}"
        value, _, interval = last[-1].partition(" [")
        assert value == shown
        low, high = map(float, interval.rstrip("]").split(", "))
        assert low < float(shown.rstrip(" %")) < high
        measured = "perplexity" if metric == "anthropic" else metric
        better, worse = (high < 0, low > 0) if metric == "anthropic" else (low > 0, high < 0)
        verdict = f"{other.name}: no difference in {measured} from {workspace.model.name} that can be told from 0"
        if better or worse:
            verdict = f"{other.name}: {'better' if better else 'worse'} in {measured} than {workspace.model.name}"
        assert lines[-1] == verdict


def test_perplexities_of_other_tokenizers_are_not_compared():
    results = [
        Result({"model": name, "loss": 1.0}, {"nll": torch.ones(3), "tokens": torch.tensor(tokens)})
        for name, tokens in (("one", [4, 5, 6]), ("other", [5, 5, 6]))
    ]
    shown = results_table("anthropic", results)
    assert "other tokens" in shown
    assert shown.endswith("other: its tokens are not those of one, so perplexities cannot be compared")


def test_a_change_that_is_too_large_for_a_number_is_shown_as_that():
    results = [
        Result({"model": name, "loss": loss}, {"nll": torch.full((3,), 4 * loss), "tokens": torch.tensor([4, 4, 4])})
        for name, loss in (("one", 1.0), ("diverged", 705.0))
    ]
    shown = results_table("anthropic", results)
    assert "too large for a number" in shown
    assert shown.endswith("diverged: worse in perplexity than one")


def plain_pairs(data, split: str) -> dict[str, list[tuple[str, str, str]]]:
    """Prompt, chosen and rejected of every task, straight from the files and as the released code pairs them."""
    templates = json.loads((data / "bias" / "templates.json").read_text(encoding="utf-8"))
    of_bias = []
    for group in sorted(templates["target_groups"]):
        records = [
            [text.replace("[target_group]", group) for text in (templates["prompt"], f" {counter}", f" {stereotype}")]
            for topic in templates["topics"].values()
            for stereotype in topic["stereotype"]
            for counter in topic["antistereotype"]
        ]
        random.Random(42).shuffle(records)
        count = int(len(records) * 0.2)
        of_bias += records[:count] if split == "test" else records[count:]
    table = pd.read_csv(data / "ethics" / f"cm_{split}.csv")
    statements = [
        list(
            Dataset.from_dict({"text": table[table["is_short"] & (table["label"] == label)]["input"].tolist()}).shuffle(
                seed=42
            )["text"]
        )
        for label in (0, 1)
    ]
    prompt = (data / "ethics" / "prompt.txt").read_bytes().decode("utf-8")
    of_ethics = [(prompt, f" {good}", f" {bad}") for good, bad in zip(*statements, strict=False)]
    questions = pd.read_csv(data / "truthfulness" / "TruthfulQA.csv", encoding="utf-8-sig").to_dict("records")
    random.Random(42).shuffle(questions)
    count = int(len(questions) * 0.8)
    of_truth = [
        (
            f"{row['Question']}\n\nAnswer:",
            f" {row['Best Answer']}",
            f" {row['Incorrect Answers'].split(';')[0].strip()}",
        )
        for row in (questions[count:] if split == "test" else questions[:count])
    ]
    return {"bias": of_bias, "ethics": of_ethics, "truth": of_truth}


def plain_nll(model, tokenizer, prompt: str, answer: str, end: str, longest: int) -> tuple[float, int]:
    """Sum and number of the label tokens' NLL, from the full logits of one text at a time."""
    ids = tokenizer(prompt + answer + end)["input_ids"][:longest]
    labels = ids[len(tokenizer(prompt)["input_ids"]) : len(ids) - len(end and [end])]
    with torch.no_grad():
        log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
    first = len(tokenizer(prompt)["input_ids"]) - 1
    return -sum(float(log_probabilities[first + t, label]) for t, label in enumerate(labels)), len(labels)


@pytest.mark.parametrize("split", ["test", "train"])
def test_released_losses_are_those_of_a_plain_loop(workspace, split):
    """The released split and a prompt of DATA_DIR; every loss to 1e-6."""
    (workspace.data / "ethics" / "prompt.txt").write_text(
        "Be good. Say what you did. \n\n Assistant:", encoding="utf-8"
    )
    templates = workspace.data / "bias" / "templates.json"
    content = json.loads(templates.read_text(encoding="utf-8"))
    templates.write_text(json.dumps({**content, "split": "released"}), encoding="utf-8")
    model = load_model(str(workspace.model), CPU)
    tokenizer = load_tokenizer(str(workspace.model))
    for task, longest in (("bias", 128), ("ethics", 256), ("truth", 512)):
        workspace.run(f"evaluation_scripts/{task}_loss.py", "--SPLIT", split)
        losses = []
        for prompt, *answers in plain_pairs(workspace.data, split)[task]:
            sums = [plain_nll(model, tokenizer, prompt, answer, "", longest) for answer in answers]
            losses.append(sums[0][0] / sums[0][1] - sums[1][0] / sums[1][1])
        result = json.loads((workspace.output / "results" / f"pythia-tiny_{task}_{split}.json").read_text())
        assert result["pairs"] == len(losses) > 0
        assert result["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-6, abs=1e-6)
        assert (
            result["split_rule"]
            == {"bias": "released, not held out", "ethics": "by files", "truth": "seeded 80/20"}[task]
        )
    workspace.run("evaluation_scripts/anthropic_eval.py", "--SPLIT", split)
    sums = [
        plain_nll(model, tokenizer, row["prompt"], row["chosen"], tokenizer.eos_token, 1_024)
        for row in read_rows(workspace.data / "hh" / f"{split}.jsonl")
    ]
    result = json.loads((workspace.output / "results" / f"pythia-tiny_anthropic_{split}.json").read_text())
    totals, tokens = zip(*sums, strict=True)
    assert result["loss"] == pytest.approx(sum(totals) / sum(tokens), rel=1e-6)
    assert result["released_loss"] == pytest.approx(released_loss(totals, tokens), rel=1e-6)
