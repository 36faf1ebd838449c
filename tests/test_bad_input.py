"""What a user can get wrong ends in one readable line and exit code 1, and nothing on disk changes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Workspace, contents, make_tiny_model, read_rows, record, run_process, write_manifest, write_rows
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

STEP_1, STEP_2 = "compute_factors_and_scores.py", "representations/train_reps.py"
STEP_3, STEP_4, STEP_5 = "dpp/greedy_dpp.py", "make_gradients.py", "gradient_ascent_and_save.py"
ANTHROPIC, BIAS = "evaluation_scripts/anthropic_eval.py", "evaluation_scripts/bias_loss.py"
STEPS = [STEP_1, STEP_2, STEP_3, STEP_4, STEP_5]

DPP = ["--SCORES_TYPE", "dpp"]
INFLUENCE = "ekfac_experiments/influence_results"
FACTORS = f"{INFLUENCE}/pythia-tiny/factors_ekfac"
SCORES = f"{INFLUENCE}/bias_pythia-tiny/scores_ekfac/pairwise_scores.safetensors"
REPRESENTATIONS = "representations/pythia-tiny_sumreps.safetensors"
INDICES = "dpp/bias_pythia-tiny_indices_5_ifweight10.json"
GRADIENT = f"{INFLUENCE}/bias_pythia-tiny/query_grads_dpp_ifweight10_bottom5/aggregated_query_grads.safetensors"
PROGRESS_BAR = re.compile(r"%\|.*\|.*/s\]$")


@pytest.fixture(scope="module")
def finished(make_workspace) -> Workspace:
    """Steps 1 to 4 done, for all tasks, with 5 dialogues chosen by dpp."""
    workspace = make_workspace("pythia")
    workspace.run(STEP_1)
    workspace.run(STEP_2)
    workspace.run(STEP_3, "--BOTTOM_K", 5)
    workspace.run(STEP_4, "--BOTTOM_K", 5, *DPP)
    return workspace


@pytest.fixture
def ready(finished, data_copy, tmp_path) -> Workspace:
    """A copy of the finished workspace that a test may spoil."""
    shutil.copytree(finished.output, tmp_path / "output")
    return Workspace(finished.model, data_copy, tmp_path / "output")


@pytest.fixture
def refusal(capsys) -> Callable[..., str]:
    """Runs a script that must refuse, and gives its one line."""

    def run(workspace: Workspace, script: str, *arguments: object) -> str:
        before = contents(workspace.output)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            workspace.run(script, *arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if line and not PROGRESS_BAR.search(line)]
        assert stop.value.code == 1
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert contents(workspace.output) == before
        return lines[0]

    return run


def all_in(line: str, *parts: object) -> bool:
    missing = [str(part) for part in parts if str(part) not in line]
    assert not missing, f"{missing} not in {line!r}"
    return True


# -------------------------------------------------------------------------------------------------- constants


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        (STEP_1, ["--NUM_BLOKS", "2"], ["--NUM_BLOKS, did you mean --NUM_BLOCKS?", STEP_1, "FACTOR_STRATEGY"]),
        (STEP_3, ["--BOTTOM-K", "2"], ["unknown constant --BOTTOM-K", "greedy_dpp.py", "BOTTOM_K", "KERNEL"]),
        (STEP_1, ["--TASK_NAME", "combined"], ["TASK_NAME = combined", "'bias', 'ethics', 'truth', 'all'"]),
        (STEP_4, ["--SCORES_TYPE", "best"], ["SCORES_TYPE = best", "'pure_ekfac', 'dpp', 'random'"]),
        (STEP_2, ["--MAX_LENGTH", "long"], ["MAX_LENGTH = long", "whole number of at least 1"]),
        (STEP_5, ["--SAVE_TO_DISK", "no"], ["SAVE_TO_DISK = no", "True or False"]),
        (ANTHROPIC, ["--SPLIT", "dev"], ["SPLIT = dev", "'train', 'test'"]),
    ],
)
def test_constants(ready, refusal, script, arguments, told):
    assert all_in(refusal(ready, script, *arguments), *told)


@pytest.mark.parametrize("script", [*STEPS, BIAS])
@pytest.mark.parametrize("folder", ["", "below/it"])
def test_output_folder_that_is_a_file(ready, refusal, tmp_path, script, folder):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    ready.output = tmp_path / "file" / folder
    assert all_in(refusal(ready, script), f"OUTPUT_DIR = '{ready.output}'", "is not a writable folder")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_real_process_says_one_line_and_exits_with_1(ready):
    process = run_process(STEP_4, *ready.arguments(STEP_4), "--BOTTOM_K", 61)
    assert process.returncode == 1
    assert process.stderr == "error: BOTTOM_K = 61: there are 60 training examples; allowed: 1 to 60\n"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "7x", ""])
@pytest.mark.parametrize(
    ("script", "new_work"),
    [
        (STEP_1, ["--NUM_BLOCKS", "2", "--OVERWRITE", "True"]),
        (STEP_2, ["--MAX_LENGTH", "9", "--OVERWRITE", "True"]),
        (STEP_4, ["--BOTTOM_K", "6"]),
        (STEP_5, ["--BOTTOM_K", "5", *DPP]),
        (ANTHROPIC, []),
    ],
)
def test_device(ready, refusal, script, new_work, device):
    line = refusal(ready, script, *new_work, f"--DEVICE={device}")
    assert all_in(line, f"DEVICE = {device!r}", "not available here", "allowed: auto, cpu, cuda, cuda:N")


@pytest.mark.parametrize("arguments", [[], ["--OVERWRITE", "True"]])
def test_half_precision_without_a_gpu(ready, refusal, arguments):
    line = refusal(ready, STEP_1, "--DEVICE", "cpu", "--USE_HALF_PRECISION", "True", *arguments)
    assert all_in(line, "USE_HALF_PRECISION = True", "CUDA", "DEVICE is cpu", "set it to False")


def test_more_blocks_than_the_model_has(ready, refusal):
    line = refusal(ready, STEP_1, "--NUM_BLOCKS", 4, "--OVERWRITE", True)
    assert all_in(line, "NUM_BLOCKS = 4", "3 transformer blocks", "allowed: 1 to 3")


@pytest.mark.parametrize(("script", "arguments"), [(STEP_3, []), (STEP_4, []), (STEP_4, ["--SCORES_TYPE", "random"])])
def test_more_dialogues_than_there_are(ready, refusal, script, arguments):
    line = refusal(ready, script, "--BOTTOM_K", 61, *arguments)
    assert all_in(line, "BOTTOM_K = 61", "60 training examples", "allowed: 1 to 60")


@pytest.mark.parametrize("weights", [["1"], ["1", "1", "1", "1"], ["0", "0", "0"]])
@pytest.mark.parametrize("script", [STEP_3, STEP_4])
def test_task_weights(ready, refusal, script, weights):
    line = refusal(ready, script, "--TASK_NAME", "combined", "--TASK_WEIGHTS", *weights)
    assert all_in(line, "TASK_WEIGHTS = [", "3 numbers", "bias, ethics, truth", "not all zero")


# ------------------------------------------------------------------------------------------------------ model


def model_copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / model.name))


@pytest.mark.parametrize("script", [*STEPS, ANTHROPIC])
@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("/no/such/model", ["no model at /no/such/model", "save_pretrained", "owner/name"]),
        ("data/demo/nothing-sft", ["no model at data/demo/nothing-sft", "run data/make_sft_model.py first"]),
        ("pythia", ["no model at pythia", "owner/name"]),
        ("nobody/nothing", ["nobody/nothing", "cannot load the configuration"]),
    ],
)
def test_missing_model(ready, refusal, script, model, told):
    ready.model = model
    assert all_in(refusal(ready, script), *told)


@pytest.mark.parametrize("script", [*STEPS, ANTHROPIC])
def test_folder_that_is_no_model(ready, refusal, script, tmp_path):
    ready.model = tmp_path / "empty"
    ready.model.mkdir()
    assert all_in(refusal(ready, script), ready.model, "no config.json", "save_pretrained")


@pytest.mark.parametrize("script", [*STEPS, ANTHROPIC])
def test_model_without_weights(ready, refusal, script, tmp_path):
    ready.model = model_copy(ready.model, tmp_path)
    (ready.model / "model.safetensors").unlink()
    assert all_in(refusal(ready, script), ready.model, "no weights", "*.safetensors")


@pytest.mark.parametrize("script", [STEP_1, STEP_2, ANTHROPIC])
def test_model_with_truncated_weights(ready, refusal, script, tmp_path):
    ready.model = model_copy(ready.model, tmp_path / "other")
    weights = ready.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ready.output = tmp_path / "new"
    assert all_in(refusal(ready, script), ready.model, "cannot load the weights")


@pytest.mark.parametrize("script", [STEP_1, STEP_2, ANTHROPIC])
def test_model_with_a_tensor_missing(ready, refusal, script, tmp_path):
    """transformers would put random numbers in its place."""
    ready.model = model_copy(ready.model, tmp_path / "other")
    weights = load_file(ready.model / "model.safetensors")
    name = next(name for name in weights if "layers.2" in name and name.endswith("weight"))
    del weights[name]
    save_file(weights, ready.model / "model.safetensors", metadata={"format": "pt"})
    ready.output = tmp_path / "new"
    assert all_in(refusal(ready, script), ready.model, "cannot load the weights", name)


@pytest.mark.parametrize("script", [STEP_1, STEP_2, ANTHROPIC])
def test_model_whose_weights_do_not_fit_its_configuration(ready, refusal, script, tmp_path):
    ready.model = model_copy(ready.model, tmp_path / "other")
    config = json.loads((ready.model / "config.json").read_text(encoding="utf-8"))
    (ready.model / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}), encoding="utf-8")
    ready.output = tmp_path / "new"
    assert all_in(refusal(ready, script), ready.model, "cannot load the weights")


@pytest.mark.parametrize("script", [STEP_1, STEP_2, ANTHROPIC])
def test_model_without_a_tokenizer(ready, refusal, script, tmp_path):
    ready.model = model_copy(ready.model, tmp_path)
    (ready.model / "tokenizer_config.json").unlink()
    ready.output = tmp_path / "new"
    assert all_in(refusal(ready, script), ready.model, "no tokenizer_config.json", "save_pretrained")


@pytest.mark.parametrize(
    "text", ["{", "{}", "null", '{"model_type": "nonsense"}', '{"model_type": "gpt_neox", "hidden_size": "x"}']
)
def test_model_with_a_broken_configuration(ready, refusal, tmp_path, text):
    ready.model = model_copy(ready.model, tmp_path)
    (ready.model / "config.json").write_text(text, encoding="utf-8")
    assert all_in(refusal(ready, STEP_1), ready.model, "cannot load the configuration")


@pytest.mark.parametrize("script", STEPS)
def test_unsupported_model_type(ready, refusal, script, tmp_path):
    ready.model = tmp_path / "gpt2-tiny"
    GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=64).save_pretrained(ready.model)
    assert all_in(
        refusal(ready, script), ready.model, "model type 'gpt2' is not supported", "is the weight of a Conv1D"
    )


@pytest.mark.parametrize("script", STEPS)
def test_model_family_that_is_not_the_models(ready, refusal, script):
    line = refusal(ready, script, "--MODEL_FAMILY", "qwen")
    assert all_in(line, "MODEL_FAMILY = 'qwen'", ready.model, "'gpt_neox'", "allowed: auto, pythia")


# -------------------------------------------------------------------------------------------------- dialogues


@pytest.mark.parametrize("script", [STEP_1, STEP_2, STEP_3, STEP_4, ANTHROPIC])
@pytest.mark.parametrize("dataset", ["/no/such/folder", "data/nothing", "nothing"])
def test_missing_dataset(ready, refusal, script, dataset):
    line = refusal(ready, script, "--HH_DATASET", dataset)
    assert all_in(line, f"HH_DATASET = {dataset!r}", "no such folder", "train.jsonl and test.jsonl", "hub id")


def test_dataset_of_the_hub_without_network(ready, refusal):
    line = refusal(ready, STEP_1, "--HH_DATASET", "nobody/nothing")
    assert all_in(line, "HH_DATASET = 'nobody/nothing'", "no such folder, and not to be had from the hub")


@pytest.mark.parametrize(
    ("script", "arguments", "split"),
    [(script, [], "train") for script in (STEP_1, STEP_2, STEP_3, STEP_4)]
    + [(STEP_5, ["--BOTTOM_K", "5", *DPP], "test"), (ANTHROPIC, [], "test")],
)
def test_missing_split(ready, refusal, script, arguments, split):
    """Step 5 included: the file is missed before the checkpoint is written."""
    (ready.data / "hh" / f"{split}.jsonl").unlink()
    line = refusal(ready, script, *arguments)
    assert all_in(line, "HH_DATASET", f"hh/{split}.jsonl is missing", "a folder with train.jsonl and test.jsonl")


GOOD_LINE = b'{"prompt": "\\n\\nHuman: Hi\\n\\nAssistant:", "chosen": " Hello."}\n'


@pytest.mark.parametrize("script", [STEP_1, STEP_2, STEP_3, STEP_4])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", ["HH_DATASET", "split train", "is empty", "at least one"]),
        (GOOD_LINE + b'{"prompt": "x", "cho\n', ["hh/train.jsonl, line 2", "not valid JSON"]),
        (GOOD_LINE + b'["prompt", "chosen"]\n', ["hh/train.jsonl, line 2 is not a JSON object"]),
        (GOOD_LINE + b'{"prompt": "x", "rejected": "y"}\n', ["row 1", "no 'chosen'", "prompt, rejected"]),
        (GOOD_LINE + b'{"chosen": "x"}\n', ["row 1", "no 'prompt'"]),
        (GOOD_LINE + b'{"prompt": "x", "chosen": null}\n', ["row 1", "'chosen' is None", "text"]),
        (GOOD_LINE + b'{"prompt": "x", "chosen": "\xff"}\n', ["hh/train.jsonl", "not UTF-8"]),
    ],
)
def test_broken_dialogues(ready, refusal, script, content, told):
    (ready.data / "hh" / "train.jsonl").write_bytes(content)
    assert all_in(refusal(ready, script), *told)


def test_unicode_line_separators_inside_a_text_do_not_end_the_line(ready):
    rows = read_rows(ready.data / "hh" / "train.jsonl")
    rows[0]["chosen"] = " one\u2028two\x85three"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (ready.data / "hh" / "train.jsonl").write_text(text, encoding="utf-8")
    ready.output = ready.output / "new"
    ready.run(STEP_2)
    assert (ready.output / REPRESENTATIONS).is_file()


# -------------------------------------------------------------------------------------------------- the pairs


def delete(file: Path) -> None:
    file.unlink()


def write(text: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(text, encoding="utf-8")


def change_json(**changes: object) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        content = {**json.loads(file.read_text(encoding="utf-8")), **changes}
        kept = {name: value for name, value in content.items() if value is not None}
        file.write_text(json.dumps(kept), encoding="utf-8")

    return change


TRUTH_HEADER = "Question,Best Answer,Incorrect Answers\n"
ETHICS_HEADER = "label,input,is_short,edited\n"
GOOD_TOPIC = {"a": {"stereotype": ["x"], "antistereotype": ["y"]}}


@pytest.mark.parametrize(
    ("file", "spoil", "told"),
    [
        ("ethics/cm_train.csv", delete, ["is missing", "DATA_DIR"]),
        ("ethics/cm_train.csv", write(""), ["cannot be read as CSV"]),
        ("ethics/cm_train.csv", write(ETHICS_HEADER), ["has no rows", "at least one"]),
        ("ethics/cm_train.csv", write("label,text\n0,x\n"), ["no column input, is_short", "it has label, text"]),
        ("ethics/cm_train.csv", write(f"{ETHICS_HEADER}0,I helped.,True,False\n"), ["label 1", "both labels"]),
        ("ethics/cm_train.csv", write(f"{ETHICS_HEADER}1,I lied.,True,False\n"), ["label 0", "both labels"]),
        (
            "ethics/cm_train.csv",
            write(f"{ETHICS_HEADER}0,I helped.,False,False\n1,I lied.,True,False\n"),
            ["is_short True", "label 0"],
        ),
        ("truthfulness/TruthfulQA.csv", delete, ["is missing", "DATA_DIR"]),
        ("truthfulness/TruthfulQA.csv", write(""), ["cannot be read as CSV"]),
        ("truthfulness/TruthfulQA.csv", write(TRUTH_HEADER), ["has no rows"]),
        ("truthfulness/TruthfulQA.csv", write("Question,Answer\nq,a\n"), ["no column Best Answer, Incorrect Answers"]),
        (
            "truthfulness/TruthfulQA.csv",
            write(f"{TRUTH_HEADER}q,a,b; c\nr,,d\n"),
            ["row 3", "'Best Answer' is empty", "needs both answers"],
        ),
        ("truthfulness/TruthfulQA.csv", write(f"{TRUTH_HEADER}q,a, ; \n"), ["row 2", "'Incorrect Answers' is empty"]),
        ("bias/templates.json", delete, ["is missing", "DATA_DIR"]),
        ("bias/templates.json", write("{"), ["not valid JSON"]),
        ("bias/templates.json", write("[]"), ["needs prompt, target_groups (a list), and topics"]),
        ("bias/templates.json", change_json(topics=None), ["lacks 'topics'", "needs prompt, target_groups"]),
        ("bias/templates.json", change_json(topics={}), ["no topics"]),
        ("bias/templates.json", change_json(target_groups=[]), ["no groups"]),
        ("bias/templates.json", change_json(topics={"a": {"stereotype": ["x"]}}), ["lacks 'antistereotype'"]),
        ("bias/templates.json", change_json(topics={"a": ["x"]}), ["needs prompt, target_groups"]),
        ("bias/templates.json", change_json(target_groups="women"), ["expected a list of strings, got 'women'"]),
        ("bias/templates.json", change_json(prompt=7), ["expected a list of strings, got [7]"]),
        (
            "bias/templates.json",
            change_json(topics={**GOOD_TOPIC, "b": {"stereotype": "xy", "antistereotype": ["z"]}}),
            ["expected a list of strings, got 'xy'"],
        ),
    ],
)
def test_broken_pairs(ready, refusal, file, spoil, told):
    spoil(ready.data / file)
    line = refusal(ready, STEP_1)
    assert all_in(line, file, *told)
    assert "run the step again" not in line, "running again does not mend data"


@pytest.mark.parametrize(
    ("script", "file"),
    [
        ("evaluation_scripts/bias_loss.py", "bias/templates.json"),
        ("evaluation_scripts/ethics_loss.py", "ethics/cm_test.csv"),
        ("evaluation_scripts/truth_loss.py", "truthfulness/TruthfulQA.csv"),
    ],
)
def test_missing_pairs_of_an_evaluation(ready, refusal, script, file):
    (ready.data / file).unlink()
    assert all_in(refusal(ready, script), f"{file} is missing", "DATA_DIR must hold it")


def test_too_few_questions_for_two_splits(ready, refusal):
    (ready.data / "truthfulness" / "TruthfulQA.csv").write_text(f"{TRUTH_HEADER}q,a,b\n", encoding="utf-8")
    assert all_in(refusal(ready, STEP_1), "TruthfulQA.csv has 1 questions", "none for the train split")


def test_too_few_statements_for_two_splits(ready, refusal):
    templates = ready.data / "bias" / "templates.json"
    change_json(topics=GOOD_TOPIC)(templates)
    assert all_in(refusal(ready, STEP_1), templates, "1 pairs for a group", "none for train with the split 'disjoint'")
    change_json(split="released")(templates)
    assert all_in(refusal(ready, BIAS), templates, "1 pairs for a group", "none for test with the split 'released'")


def test_answers_that_the_cut_leaves_nothing_of_are_found_before_the_factors_are_fitted(ready, refusal, tmp_path):
    change_json(prompt="many words " * 200)(ready.data / "bias" / "templates.json")
    ready.output = tmp_path / "new"
    assert all_in(refusal(ready, STEP_1), "no token of an answer is left after the cut at 128 tokens", "many words")


# ------------------------------------------------------------------------------------------ upstream artifacts


@pytest.mark.parametrize(
    ("gone", "script", "arguments", "run_first"),
    [
        (SCORES, STEP_3, ["--BOTTOM_K", 5], STEP_1),
        (REPRESENTATIONS, STEP_3, ["--BOTTOM_K", 5], STEP_2),
        (FACTORS, STEP_4, ["--BOTTOM_K", 5], STEP_1),
        (SCORES, STEP_4, ["--BOTTOM_K", 5], STEP_1),
        (INDICES, STEP_4, ["--BOTTOM_K", 5, *DPP], STEP_3),
        (GRADIENT, STEP_5, ["--BOTTOM_K", 5, *DPP], STEP_4),
    ],
)
@pytest.mark.parametrize("part", ["artifact", "manifest"])
def test_missing_upstream_artifact_names_the_script(ready, refusal, gone, script, arguments, run_first, part):
    path = ready.output / gone
    if part == "manifest":
        manifest = path / "manifest.json" if path.is_dir() else path.with_name(f"{path.stem}.manifest.json")
        manifest.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert all_in(refusal(ready, script, *arguments), path, f"is missing or incomplete; run {run_first} first")


@pytest.mark.parametrize(
    ("script", "arguments", "run_first"),
    [(STEP_3, [], STEP_1), (STEP_4, [], STEP_1), (STEP_4, ["--SCORES_TYPE", "random"], STEP_1), (STEP_5, [], STEP_4)],
)
def test_nothing_done_yet(ready, refusal, script, arguments, run_first, tmp_path):
    ready.output = tmp_path / "new"
    assert all_in(refusal(ready, script, *arguments), f"run {run_first} first")
    assert not ready.output.exists()


def put_nan(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, file)
    record(file)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    record(file)


READERS = [
    (SCORES, STEP_3, ["--BOTTOM_K", 6], STEP_1),
    (SCORES, STEP_4, ["--BOTTOM_K", 6], STEP_1),
    (REPRESENTATIONS, STEP_3, ["--BOTTOM_K", 6], STEP_2),
    (f"{FACTORS}/lambda_matrix.safetensors", STEP_4, ["--BOTTOM_K", 6, "--SCORES_TYPE", "random"], STEP_1),
    (f"{FACTORS}/gradient_eigenvectors.safetensors", STEP_1, ["--DAMPING_FACTOR", 1, "--OVERWRITE", True], STEP_1),
    (GRADIENT, STEP_5, ["--BOTTOM_K", 5, *DPP], STEP_4),
]


@pytest.mark.parametrize(("file", "script", "arguments", "made_by"), READERS)
@pytest.mark.parametrize(("spoil", "told"), [(put_nan, "NaN or infinite"), (truncate, "cannot be read")])
def test_broken_tensors(ready, refusal, file, script, arguments, made_by, spoil, told):
    spoil(ready.output / file)
    line = refusal(ready, script, *arguments)
    assert all_in(line, ready.output / file, told, "delete", f"run {made_by} again")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"indices": "12345"}', '{"indices": [0, 1, 2, 3, 99]}', '{"indices": [1]}']
)
def test_broken_indices(ready, refusal, text):
    (ready.output / INDICES).write_text(text, encoding="utf-8")
    record(ready.output / INDICES)
    assert all_in(refusal(ready, STEP_4, "--BOTTOM_K", 5, *DPP), ready.output / INDICES, f"run {STEP_3} again")


@pytest.mark.parametrize("rate", [1e10, 1e30])  # the weights are finite, and the loss is not; the weights are not
@pytest.mark.parametrize("measured", [("True", "True"), ("False", "True"), ("False", "False")])
def test_learning_rate_that_breaks_the_model(ready, refusal, rate, measured):
    """Whether it is measured or not, nothing is written for it."""
    gradient = ready.output / GRADIENT
    save_file({name: tensor.sign() * 1e9 for name, tensor in load_file(gradient).items()}, gradient)
    record(gradient)
    what = ["--COMPUTE_ANTHROPIC_EVAL", measured[0], "--COMPUTE_TASK_EVAL", measured[1]]
    line = refusal(ready, STEP_5, "--BOTTOM_K", 5, *DPP, "--LEARNING_RATE", rate, *what)
    if "NaN or infinite" in line:
        assert all_in(line, f"LEARNING_RATE = {rate:g}")
    else:
        assert all_in(line, f"_lr{rate:g}: the ", " loss is nan", "LEARNING_RATE far too large")


def test_scores_of_another_length(ready, refusal):
    save_file({"all_modules": torch.zeros(1, 50)}, ready.output / SCORES)
    record(ready.output / SCORES)
    line = refusal(ready, STEP_3, "--BOTTOM_K", 6)
    assert all_in(line, ready.output / SCORES, "50 scores for 60 dialogues", f"run {STEP_1} again")


# ---------------------------------------------------------------------------------------- what does not agree


def test_damping_that_differs_from_that_of_the_scores(ready, refusal):
    line = refusal(ready, STEP_4, "--BOTTOM_K", 6, "--DAMPING_FACTOR", 0.5)
    assert all_in(line, ready.output / SCORES, "DAMPING_FACTOR = None", "DAMPING_FACTOR = 0.5", f"run {STEP_1} again")


@pytest.mark.parametrize(
    ("name", "there", "now"),
    [("NUM_BLOCKS", 1, 2), ("NUM_FACTOR_EXAMPLES", 10_000, 50), ("FISHER_POSITIONS", "completion", "all")],
)
def test_scores_that_were_not_made_with_the_factors_that_are_there(ready, refusal, name, there, now):
    """Step 4 takes these constants from the factors' manifest, and the scores must have been made with the same."""
    manifest = ready.output / FACTORS / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    assert content["settings"][name] == there
    content["settings"][name] = now
    write_manifest(manifest, content)
    line = refusal(ready, STEP_4, "--BOTTOM_K", 6)
    assert all_in(line, ready.output / SCORES, f"{name} = {there!r}", f"{name} = {now!r}", f"run {STEP_1} again")


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        (STEP_1, ["--NUM_BLOCKS", 2], "NUM_BLOCKS = 1 there, 2 now"),
        (STEP_1, ["--DAMPING_FACTOR", 0.5], "DAMPING_FACTOR = None there, 0.5 now"),
        (STEP_2, ["--MAX_LENGTH", 9], "MAX_LENGTH = 1024 there, 9 now"),
        (STEP_3, ["--BOTTOM_K", 5, "--KERNEL", "rff"], "KERNEL = 'rbf' there, 'rff' now"),
        (STEP_4, ["--BOTTOM_K", 5, *DPP, "--GRADIENT_REDUCTION_TYPE", "sum"], "'mean' there, 'sum' now"),
    ],
)
def test_other_settings_than_the_artifact_there(ready, refusal, script, arguments, told):
    assert all_in(refusal(ready, script, *arguments), told, "was made with other settings", "OVERWRITE = True")


@pytest.mark.parametrize(
    ("script", "arguments", "artifact"),
    [
        (STEP_1, [], SCORES),
        (STEP_2, [], REPRESENTATIONS),
        (STEP_3, ["--BOTTOM_K", 5], SCORES),
        (STEP_4, ["--BOTTOM_K", 5], FACTORS),
        (STEP_5, ["--BOTTOM_K", 5, *DPP], GRADIENT),
    ],
)
def test_model_retrained_under_the_same_name(ready, refusal, script, arguments, artifact, retrained):
    fingerprints = json.loads(
        (ready.output / REPRESENTATIONS).with_suffix(".manifest.json").read_text(encoding="utf-8")
    )
    ready.model = retrained
    line = refusal(ready, script, *arguments)
    assert all_in(line, ready.output / artifact, f"model = {fingerprints['inputs']['model']!r}")
    assert line.count("'") >= 4, "both fingerprints are shown"


def swap_ids(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[500:502]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "spoil"),
    [
        ("tokenizer.json", swap_ids),
        ("tokenizer_config.json", lambda file: change_json(eos_token="a")(file)),
        ("special_tokens_map.json", lambda file: file.write_text('{"eos_token": "a"}', encoding="utf-8")),
        ("generation_config.json", lambda file: file.write_text('{"repetition_penalty": 2.0}', encoding="utf-8")),
        ("chat_template.jinja", lambda file: file.write_text("{{ messages }}", encoding="utf-8")),
        ("of_a_kind.to_come", lambda file: file.write_text("x", encoding="utf-8")),
    ],
)
@pytest.mark.parametrize(("script", "artifact"), [(STEP_1, SCORES), (STEP_2, REPRESENTATIONS)])
def test_every_file_of_a_model_that_may_matter_is_part_of_it(ready, refusal, tmp_path, script, artifact, file, spoil):
    fingerprint = json.loads((ready.output / FACTORS / "manifest.json").read_text(encoding="utf-8"))["inputs"]["model"]
    ready.model = model_copy(ready.model, tmp_path / "other")
    spoil(ready.model / file)
    line = refusal(ready, script)
    assert all_in(line, ready.output / artifact, fingerprint)
    assert line.count("'") >= 4, "both fingerprints are shown"


def test_files_of_a_model_for_readers_are_not_part_of_it(ready, tmp_path, capsys):
    ready.model = model_copy(ready.model, tmp_path / "other")
    for name in ("README.md", "LICENSE", "LICENSE.txt", ".gitattributes", ".tmpAbC", "plot.png", "training_args.bin"):
        (ready.model / name).write_text("edited", encoding="utf-8")
    (ready.model / "runs").mkdir()
    (ready.model / "runs" / "vocab.json").write_text("{}", encoding="utf-8")
    ready.run(STEP_2)
    assert "finished before" in capsys.readouterr().out


@pytest.fixture(scope="module")
def retrained(tmp_path_factory) -> Path:
    return make_tiny_model("pythia", tmp_path_factory.mktemp("retrained") / "pythia-tiny", seed=1)


@pytest.mark.parametrize(
    ("script", "arguments", "artifact"),
    [
        (STEP_1, [], SCORES),
        (STEP_2, [], REPRESENTATIONS),
        (STEP_3, ["--BOTTOM_K", 5], SCORES),
        (STEP_4, ["--BOTTOM_K", 5], FACTORS),
    ],
)
def test_dataset_changed(ready, refusal, script, arguments, artifact):
    rows = read_rows(ready.data / "hh" / "train.jsonl")
    write_rows(ready.data / "hh" / "train.jsonl", [*rows[1:], rows[0]])
    line = refusal(ready, script, *arguments)
    assert all_in(line, ready.output / artifact, "dataset = '")


def test_pairs_changed(ready, refusal):
    templates = ready.data / "bias" / "templates.json"
    change_json(prompt="Is this fair?")(templates)
    assert all_in(refusal(ready, STEP_1), ready.output / SCORES, "pairs = '", "there", "now", "OVERWRITE = True")


def test_evaluation_data_changed(ready, refusal):
    ready.run(ANTHROPIC)
    rows = read_rows(ready.data / "hh" / "test.jsonl")
    write_rows(ready.data / "hh" / "test.jsonl", rows[:-1])
    line = refusal(ready, ANTHROPIC)
    assert all_in(line, ready.output / "results" / "pythia-tiny_anthropic_test.json", "data = '", "OVERWRITE = True")


def test_evaluated_model_retrained_under_the_same_name(ready, refusal, retrained):
    ready.run(ANTHROPIC)
    ready.model = retrained
    line = refusal(ready, ANTHROPIC)
    assert all_in(line, ready.output / "results" / "pythia-tiny_anthropic_test.json", "model = '", "OVERWRITE = True")
