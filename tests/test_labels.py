"""Which tokens count: those whose characters end after the prompt; and what a model's tokens and positions allow."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO, SHARED_DATA, Workspace, answer_pairs, needs_real_samples, read_rows, run_script, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
)

from utils.batching import LabelledSequence
from utils.completions import greedy_completions
from utils.console import UserError
from utils.evaluation import EvaluationModel
from utils.fine_tuning import completion_loss
from utils.forward import position_limit
from utils.models import load_model, load_tokenizer
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, read_dialogues, released_loss, tokenize_dialogues
from utils.performance_functions.pairs import AnswerPair, tokenize_pairs

CASES = SHARED_DATA.parent / "cases"
ANTHROPIC = "evaluation_scripts/anthropic_eval.py"
STEP_1, STEP_2, STEP_4 = "compute_factors_and_scores.py", "representations/train_reps.py", "make_gradients.py"
PROMPT = "\n\nHuman: How do I bake bread?\n\nAssistant:"

needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the folder with cases (../shared/cases) is not here")


def byte_level_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer" / "tokenizer.json"),
        **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **tokens},
    )


def labelled_text(sequence: LabelledSequence, tokenizer: PreTrainedTokenizerFast) -> str:
    return tokenizer.decode(sequence.input_ids[sequence.label_start : sequence.label_end])


def one_dialogue(prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast) -> LabelledSequence:
    return tokenize_dialogues(Dialogues([prompt], [completion]), tokenizer)[0]


# ----------------------------------------------------------------------------------------------------- labels


def labels_by_counting(text: str, prompt: str, tokenizer: PreTrainedTokenizerFast, limit: int) -> tuple[int, int]:
    """The rule of the released code, for texts whose tokens do not merge across the seam."""
    return len(tokenizer(prompt)["input_ids"]), min(len(tokenizer(text)["input_ids"]), limit)


@pytest.mark.parametrize("data", [DEMO, pytest.param(SHARED_DATA, marks=needs_real_samples)], ids=["demo", "real"])
@pytest.mark.parametrize(
    "file",
    [
        DEMO / "tokenizer" / "tokenizer.json",
        pytest.param(SHARED_DATA / "pythia_tokenizer" / "tokenizer.json", marks=needs_real_samples),
    ],
    ids=["demo_tokenizer", "pythia_tokenizer"],
)
def test_labels_of_the_projects_data_are_those_of_the_released_rule(data, file):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    dialogues = read_dialogues(str(data / "hh"), "test")
    for prompt, completion, sequence in zip(
        dialogues.prompts, dialogues.completions, tokenize_dialogues(dialogues, tokenizer), strict=True
    ):
        expected = labels_by_counting(prompt + completion, prompt, tokenizer, 1_024)
        assert (sequence.label_start, sequence.label_end) == expected
        assert (
            sequence.input_ids.tolist()
            == [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id][:1_024]
        )
    for measurement in MEASUREMENTS.values():
        pairs = measurement.read_pairs(data, "test")
        tokenized = tokenize_pairs(pairs, tokenizer, measurement.max_tokens)
        for pair, chosen, rejected in zip(pairs, tokenized.chosen, tokenized.rejected, strict=True):
            for answer, position in ((pair.chosen, chosen), (pair.rejected, rejected)):
                sequence = tokenized.sequences[position]
                expected = labels_by_counting(pair.prompt + answer, pair.prompt, tokenizer, measurement.max_tokens)
                assert (sequence.label_start, sequence.label_end) == expected


@pytest.mark.parametrize(
    "completion", [" Mix flour.", "  Two spaces.", " 🍞 for all", " ", "\n\nA list:\n  - one", "x"]
)
def test_labels_are_the_completion(completion):
    tokenizer = byte_level_tokenizer()
    assert labelled_text(one_dialogue(PROMPT, completion, tokenizer), tokenizer) == completion


def test_a_token_that_merges_across_the_seam_is_a_label():
    tokenizer = byte_level_tokenizer()
    apart, merged = (one_dialogue(*texts, tokenizer) for texts in ((PROMPT, " Mix it."), (f"{PROMPT} ", "Mix it.")))
    assert merged.input_ids.tolist() == apart.input_ids.tolist()
    assert (merged.label_start, merged.label_end) == (apart.label_start, apart.label_end)


def test_all_tokens_of_a_character_are_labels():
    tokenizer = byte_level_tokenizer()
    sequence = one_dialogue(PROMPT, "🍞", tokenizer)
    assert sequence.num_labels == len(tokenizer("🍞")["input_ids"]) > 1


@pytest.mark.parametrize("trims", [True, False])
def test_a_newline_and_the_spaces_behind_it_can_be_one_token(trims):
    """The offsets of a byte-level tokenizer that trims them end before those spaces."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "ĊĠ", "ĊĠĠ"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ġ"), ("ĊĠ", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")
    for prompt, completion, text in (
        ("a:\n", "   b", "\n   b"),
        ("a:\n ", "  b", "\n   b"),
        ("a:\n  ", " b", " b"),
        ("a:  ", "b", "b"),
    ):
        assert labelled_text(one_dialogue(prompt, completion, tokenizer), tokenizer) == text


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> $A", "$A </s> </s>"])
def test_special_tokens_that_a_tokenizer_adds_are_no_labels(template):
    tokenizer = byte_level_tokenizer(bos_token="<s>", eos_token="</s>")
    plain = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    )
    pairs = [AnswerPair(PROMPT, " Yes.", " Not at all, no."), AnswerPair(PROMPT, " Yes.", " Never </s>")]
    tokenized, expected = (tokenize_pairs(answer_pairs(pairs[:1]), t, 128) for t in (tokenizer, plain))
    for sequence, same in zip(tokenized.sequences, expected.sequences, strict=True):
        before = template.startswith("<s>")
        assert sequence.input_ids.tolist() == tokenizer(tokenizer.decode(same.input_ids))["input_ids"]
        assert (sequence.label_start, sequence.label_end) == (same.label_start + before, same.label_end + before)
    written = tokenize_pairs(answer_pairs(pairs[1:]), tokenizer, 128).sequences[1]
    assert labelled_text(written, tokenizer).endswith("</s>"), "a special token that the text itself holds counts"
    (dialogue,) = tokenize_dialogues(Dialogues([PROMPT], [" Yes."]), tokenizer)
    assert dialogue.input_ids.tolist() == [*plain(PROMPT + " Yes.")["input_ids"], tokenizer.eos_token_id]


class MergingTokenizer(ByT5Tokenizer):
    """Bytes, but a space and the letter behind it are one token; it has no offsets."""

    def _tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        for token in super()._tokenize(text):
            if tokens and tokens[-1] == " ":
                tokens.pop()
                token = chr(ord(token) - 32)
            tokens.append(token)
        return tokens


def test_tokenizers_without_offsets_count_the_prompts_tokens():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    sequence = one_dialogue("Hi:", " yes", tokenizer)
    assert sequence.input_ids.tolist() == tokenizer("Hi: yes")["input_ids"], "its end-of-sequence token comes once"
    assert labelled_text(sequence, tokenizer) == " yes"
    pair = tokenize_pairs(answer_pairs([AnswerPair("Hi:", " yes", " no")]), tokenizer, 128)
    assert [labelled_text(sequence, tokenizer) for sequence in pair.sequences] == [" yes", " no"]
    assert pair.sequences[0].input_ids[-1] == tokenizer.eos_token_id


def test_tokenizers_without_offsets_are_refused_where_the_prompts_tokens_change():
    tokenizer = MergingTokenizer(name_or_path="some/model")
    assert one_dialogue("Hi:", " yes", tokenizer).num_labels == 3
    with pytest.raises(UserError, match=r"some/model: its tokenizer has no character offsets.*prompt: 'Hi: '"):
        one_dialogue("Hi: ", "yes", tokenizer)


# -------------------------------------------------------------------------------------------------- no labels


def refused(capsys: pytest.CaptureFixture, workspace: Workspace, script: str, *arguments: object) -> str:
    """Run a script that must refuse; its line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        workspace.run(script, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1
    assert len(lines) == 1
    return lines[0]


def test_dialogues_without_labels_count_nothing(workspace, capsys):
    """Nine test dialogues: the released loss has a batch of eight and one of one."""
    rows = read_rows(workspace.data / "hh" / "test.jsonl")[:8]
    empty = {**rows[0], "chosen": ""}
    results = []
    for number, test in enumerate([rows, [*rows, empty], [*rows, *[empty] * 9]]):
        write_rows(workspace.data / "hh" / "test.jsonl", test)
        workspace.output = workspace.output / str(number)
        workspace.run(ANTHROPIC)
        results.append(json.loads((workspace.output / "results" / "pythia-tiny_anthropic_test.json").read_text()))
    for result in results[1:]:
        assert result["loss"] == pytest.approx(results[0]["loss"])
        assert result["tokens"] == results[0]["tokens"]
        assert math.isfinite(result["released_loss"])
    assert released_loss([3.0] * 8 + [0.0], [2] * 8 + [0]) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("script", "split"), [(STEP_1, "train"), (ANTHROPIC, "test"), ("data/make_sft_model.py", "train")]
)
def test_no_label_at_all_is_refused(workspace, capsys, tmp_path, script, split):
    path = workspace.data / "hh" / f"{split}.jsonl"
    write_rows(path, [{**row, "chosen": ""} for row in read_rows(path)[:5]])
    arguments = ["--SFT_MODEL_DIR", tmp_path / "sft"] if "sft" in script else []
    line = refused(capsys, workspace, script, *arguments)
    assert f"HH_DATASET = '{workspace.data / 'hh'}', split {split}: none of 5 dialogues has a completion token" in line
    assert "in 5 'chosen' is empty" in line
    assert not workspace.output.exists() or not any(workspace.output.rglob("*.*"))


def test_completions_beyond_the_cut_are_told_from_empty_ones(tiny_models):
    tokenizer = load_tokenizer(str(tiny_models["pythia"]))
    with pytest.raises(UserError, match="none of 3 .* in 2 the prompt fills the context, in 1 'chosen' is empty"):
        tokenize_dialogues(Dialogues(["word " * 2_000] * 2 + ["Hi:"], [" gone", "", ""]), tokenizer)


def test_factors_and_subsets_of_dialogues_without_labels_are_refused(workspace, capsys):
    path = workspace.data / "hh" / "train.jsonl"
    good = read_rows(path)[0]
    write_rows(path, [*[{**good, "chosen": ""}] * 4, good])
    one = ("--TASK_NAME", "truth", "--NUM_FACTOR_EXAMPLES", 1)
    assert "NUM_FACTOR_EXAMPLES = 1 of" in refused(capsys, workspace, STEP_1, *one)
    workspace.run(STEP_1, *one[:2])
    random = ("--TASK_NAME", "truth", "--SCORES_TYPE", "random", "--BOTTOM_K", 1)
    assert "the 1 dialogues that SCORES_TYPE chooses: none of 1 dialogues" in refused(
        capsys, workspace, STEP_4, *random
    )


def test_answers_without_labels_say_why(tiny_models):
    tokenizer = load_tokenizer(str(tiny_models["pythia"]))
    with pytest.raises(UserError, match="no token of an answer is there: the answer is empty; prompt: 'Hi:'"):
        tokenize_pairs(answer_pairs([AnswerPair("Hi:", " yes", "")]), tokenizer, 128)


def test_fine_tuning_survives_a_batch_without_labels(tiny_models):
    model = load_model(str(tiny_models["pythia"]), torch.device("cpu"))
    ids = torch.arange(6)[None]
    for num_items in (None, torch.tensor(0)):
        loss = completion_loss(model, ids, torch.full_like(ids, -100), num_items)["loss"]
        loss.backward()
        assert loss.item() == 0


# ------------------------------------------------------------------------------------- the model's own limits


def with_added_tokens(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokenizer.add_tokens([f"<|extra {i}|>" for i in range(size + 2 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_without_an_embedding_are_refused_where_they_occur(workspace, capsys, tmp_path):
    workspace.model = with_added_tokens(workspace.model, tmp_path / "pythia-tiny")
    size = load_model(str(workspace.model), torch.device("cpu")).config.vocab_size
    workspace.run(ANTHROPIC)  # they do not occur
    last = AutoTokenizer.from_pretrained(workspace.model).convert_ids_to_tokens(size + 1)
    for split in ("train", "test"):
        path = workspace.data / "hh" / f"{split}.jsonl"
        write_rows(path, [{**row, "prompt": f"{last} {row['prompt']}"} for row in read_rows(path)])
    workspace.output = tmp_path / "new"
    for script in (STEP_1, STEP_2, ANTHROPIC):
        line = refused(capsys, workspace, script)
        assert f"{workspace.model}: its tokenizer has {size + 2:,} tokens and the model {size:,} embeddings" in line
        assert f"'{last}' (id {size + 1})" in line


@pytest.fixture(scope="module")
def small_opt(tmp_path_factory) -> Path:
    """An OPT with 64 learned positions."""
    folder = tmp_path_factory.mktemp("opt") / "opt-tiny"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = OPTConfig(
        **sizes,
        vocab_size=1_536,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    OPTForCausalLM(config).eval().save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def test_dialogues_are_cut_at_the_models_positions(workspace, small_opt, capsys):
    workspace.model = small_opt
    workspace.run(ANTHROPIC)
    assert "texts are cut: the model's max_position_embeddings is 64" in capsys.readouterr().out
    result = json.loads((workspace.output / "results" / "opt-tiny_anthropic_test.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small_opt), byte_level_tokenizer()
    total, count = 0.0, 0
    for row in read_rows(workspace.data / "hh" / "test.jsonl"):
        ids = tokenizer(row["prompt"] + row["chosen"])["input_ids"][:64]
        first = len(tokenizer(row["prompt"])["input_ids"])
        with torch.no_grad():
            log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(log_probabilities[t - 1, ids[t]].item() for t in range(first, len(ids)))
        count += max(0, len(ids) - first)
    assert 0 < count == result["tokens"]
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("positions", ["completion", "all"])
def test_every_step_keeps_to_the_models_positions(workspace, small_opt, positions):
    """OPT's last two Linears see the tokens of all examples in one dimension."""
    workspace.model = small_opt
    task = ("--TASK_NAME", "truth")
    workspace.run(STEP_1, *task, "--FISHER_POSITIONS", positions)
    workspace.run(STEP_2)
    workspace.run(STEP_4, *task, "--BOTTOM_K", 5)
    workspace.run("gradient_ascent_and_save.py", *task, "--BOTTOM_K", 5)


def test_position_limits(tiny_models, small_opt):
    limits = {name: position_limit(load_model(str(path), torch.device("cpu"))) for name, path in tiny_models.items()}
    assert set(limits.values()) == {None}, "rotary positions are computed"
    assert position_limit(AutoModelForCausalLM.from_pretrained(small_opt)) == 64
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = RobertaConfig(**sizes, vocab_size=50, max_position_embeddings=34, pad_token_id=1, is_decoder=True)
    assert position_limit(RobertaForCausalLM(config)) == 32


# ------------------------------------------------------------------------------------------------------ files


def test_lone_surrogates_name_file_and_line(workspace, capsys):
    for split, script in (("test", ANTHROPIC), ("train", STEP_2)):
        path = workspace.data / "hh" / f"{split}.jsonl"
        rows = read_rows(path)
        rows[3]["chosen"] = " a smile \ud83d and \U0001f600"
        write_rows(path, rows)
        line = refused(capsys, workspace, script)
        assert f"hh/{split}.jsonl, line 4: 'chosen' has half a character (\\ud83d alone) at position 9" in line
    templates = workspace.data / "bias" / "templates.json"
    content = json.loads(templates.read_text(encoding="utf-8"))
    templates.write_text(json.dumps({**content, "prompt": "Is \udc00 fair?"}), encoding="utf-8")
    assert "bias/templates.json: 'Is \\udc00 fair?' has half" in refused(
        capsys, workspace, "evaluation_scripts/bias_loss.py"
    )
    questions = workspace.data / "truthfulness" / "TruthfulQA.csv"
    questions.write_bytes(questions.read_bytes().replace(b"?", b"\xed\xa0\xbd?", 1))
    assert "TruthfulQA.csv is not UTF-8" in refused(capsys, workspace, "evaluation_scripts/truth_loss.py")


def test_a_byte_order_mark_in_front_of_json_lines(small_data, tmp_path):
    for split in ("train", "test"):
        content = (small_data / "hh" / f"{split}.jsonl").read_bytes()
        (tmp_path / f"{split}.jsonl").write_bytes(b"\xef\xbb\xbf" + content)
        assert read_dialogues(str(tmp_path), split) == read_dialogues(str(small_data / "hh"), split)


@pytest.mark.parametrize("there", ["train", "test"])
def test_one_split_of_the_questions_alone_is_refused(workspace, capsys, there):
    splits = workspace.data / "truthfulness" / "splits"
    splits.mkdir()
    shutil.copy(workspace.data / "truthfulness" / "TruthfulQA.csv", splits / f"TruthfulQA_{there}.csv")
    missing = "test" if there == "train" else "train"
    for script, arguments in ((STEP_1, ("--TASK_NAME", "truth")), ("evaluation_scripts/truth_loss.py", ())):
        line = refused(capsys, workspace, script, *arguments)
        assert f"splits/TruthfulQA_{missing}.csv is missing, and the other split is there; give both or none" in line


# ------------------------------------------------------------------------------------------------------ cases


def measured(case: str, output: Path, hh: str = "hh") -> dict:
    folder = CASES / case
    data = folder / hh if (folder / hh).is_dir() else CASES / hh
    run_script(ANTHROPIC, "--MODEL_NAMES", folder / "model", "--HH_DATASET", data, "--OUTPUT_DIR", output)
    return json.loads((output / "results" / "model_anthropic_test.json").read_text(encoding="utf-8"))


@needs_cases
@pytest.mark.parametrize(
    ("case", "hh", "tokens", "perplexity"),
    [
        ("space_in_prompt", "hh", 557, 516.2450),
        ("space_in_prompt", "hh_same_texts", 557, 516.2450),
        ("one_token_completions", "hh", 16, 196.5568),
        ("positions_shorter_than_1024_opt", "hh", 642, 536.5179),  # a plain loop, cut at 512
    ],
)
def test_cases_with_a_right_value(tmp_path, case, hh, tokens, perplexity):
    result = measured(case, tmp_path, hh)
    assert result["tokens"] == tokens
    assert result["perplexity"] == pytest.approx(perplexity, rel=1e-5)


@needs_cases
@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("tokenizer_larger_than_embedding", "model: its tokenizer has 2,050 tokens and the model 2,048 embeddings"),
        ("lone_surrogate", "test.jsonl, line 4"),
    ],
)
def test_cases_that_are_refused(tmp_path, capsys, case, told):
    with pytest.raises(SystemExit):
        measured(case, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told in line


@needs_cases
def test_one_token_completions_are_scored(tmp_path):
    case = CASES / "one_token_completions"
    workspace = Workspace(case / "model", CASES / "data", tmp_path)
    arguments = ("--HH_DATASET", case / "hh", "--TASK_NAME", "truth")
    workspace.run(STEP_1, *arguments)
    workspace.run(STEP_4, *arguments, "--BOTTOM_K", 4)


HOSTILE = [
    "",
    " ",
    "\0",
    "\n\t",
    "\x01\x1b[31m",
    "\u200b\u202e",
    "\ufeff",
    "\U0010ffff",
    "<|endoftext|>",
    "\x7f\x85\u2028",
    "  x",
]


def test_hostile_texts_go_through_all_steps(workspace):
    """Empty, blank, of control characters, or of special tokens: they count what they have, often nothing."""
    ordinary = read_rows(workspace.data / "hh" / "train.jsonl")[:10]
    rows = [*ordinary, *({"prompt": prompt, "chosen": chosen} for prompt in HOSTILE for chosen in HOSTILE)]
    for split in ("train", "test"):
        write_rows(workspace.data / "hh" / f"{split}.jsonl", rows)
    templates = json.loads((workspace.data / "bias" / "templates.json").read_text(encoding="utf-8"))
    topics = {
        str(number): {"stereotype": [text], "antistereotype": [f"x{number}"]} for number, text in enumerate(HOSTILE)
    }
    content = {**templates, "prompt": "\0 ", "topics": topics}
    (workspace.data / "bias" / "templates.json").write_text(json.dumps(content), encoding="utf-8")
    subset = ("--BOTTOM_K", len(rows) - 4, "--SCORES_TYPE", "dpp", "--TASK_NAME", "bias")
    workspace.run(STEP_1)
    workspace.run(STEP_2)
    workspace.run("dpp/greedy_dpp.py", "--BOTTOM_K", len(rows) - 4, "--TASK_NAME", "bias")
    workspace.run(STEP_4, *subset)
    workspace.run("gradient_ascent_and_save.py", *subset, "--NUM_COMPLETIONS", 1, "--SAVE_TO_DISK", "False")


def test_no_prompt_at_all(workspace, capsys):
    model = load_model(str(workspace.model), torch.device("cpu"))
    evaluated = EvaluationModel(model, load_tokenizer(str(workspace.model)))
    end = "<|endoftext|>"
    assert greedy_completions(evaluated, ["", end])[0] == greedy_completions(evaluated, [end])[0]
    templates = workspace.data / "bias" / "templates.json"
    content = json.loads(templates.read_text(encoding="utf-8"))
    content["topics"] |= {"blank": {"stereotype": [""], "antistereotype": ["y"]}}
    templates.write_text(json.dumps({**content, "prompt": ""}), encoding="utf-8")
    assert "the prompt is empty, and the answer a single token; prompt: ''" in refused(capsys, workspace, STEP_1)
