"""More of what a user can get wrong, by kind: files in the way, tensors and reports that lie, numbers at the edges.

Each case ends in one readable line, exit code 1 and unchanged files, or, where the input is legal, in the right result.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Workspace, contents, read_rows, record, run_script, write_manifest, write_rows
from safetensors.torch import load_file, save_file
from test_bad_input import (
    ANTHROPIC,
    DPP,
    FACTORS,
    GRADIENT,
    INDICES,
    PROGRESS_BAR,
    REPRESENTATIONS,
    SCORES,
    STEP_1,
    STEP_2,
    STEP_3,
    STEP_4,
    STEP_5,
    all_in,
)

from utils.paths import PAPER_TABLES, PROJECT_ROOT, STEP_0

PREPARE, HARNESS = "data/prepare.py", "evaluation_scripts/harness_eval.py"
GRID = ["--TASKS", "truth", "--SCORES_TYPES", "dpp", "--PRESERVE_PERPLEXITY", "False", "--BOTTOM_K", 5, "--SEEDS", 42]
GRID += ["--IF_WEIGHT", 10, "--NUM_COMPLETIONS", 0, "--LEARNING_RATE", 0.02, "--SWEPT_RATES", "None"]
OF_BIAS = ["--TASK_NAME", "bias"]
OVERWRITE = ["--OVERWRITE", True]
LARGEST = "3.4e38"

Prepare = Callable[[Workspace], object]


@pytest.fixture(scope="module")
def finished(make_workspace) -> Workspace:
    """Steps 1 to 4 and the tables of one repair done, with 5 dialogues chosen by dpp."""
    workspace = make_workspace("pythia")
    for script, words in (
        (STEP_1, []),
        (STEP_2, []),
        (STEP_3, ["--BOTTOM_K", 5]),
        (STEP_4, ["--BOTTOM_K", 5, *DPP]),
        (PAPER_TABLES, GRID),
    ):
        workspace.run(script, *words)
    return workspace


@pytest.fixture
def ready(finished, tmp_path) -> Workspace:
    """A copy of the finished workspace, of its data and of its model that a test may spoil."""
    shutil.copytree(finished.output, tmp_path / "output")
    data = shutil.copytree(finished.data, tmp_path / "data")
    return Workspace(Path(shutil.copytree(finished.model, tmp_path / finished.model.name)), data, tmp_path / "output")


@pytest.fixture
def refusal(capsys, tmp_path) -> Callable[..., str]:
    """Runs a script that must refuse, and gives its one line.

    Args:
        adds: whether finished work of the part before the refusal may be new.
    """

    def run(workspace: Workspace | None, script: str, *words: object, adds: bool = False) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            workspace.run(script, *words) if workspace else run_script(script, *words)
        lines = [line for line in capsys.readouterr().err.splitlines() if line and not PROGRESS_BAR.search(line)]
        assert stop.value.code == 1
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 1_600
        assert "this is a bug" not in lines[0]
        assert "raceback" not in lines[0]
        after = contents(tmp_path)
        assert {name: after.get(name) for name in before} == before
        assert adds or after.keys() == before.keys()
        assert not [path for path in tmp_path.rglob("*.partial") if str(path.relative_to(tmp_path)) not in before]
        return lines[0]

    return run


# ------------------------------------------------------------------------------------------------- what is in the way


def put(kind: str, path: Path) -> None:
    """Put something into the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "mine").write_text("mine", encoding="utf-8")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link to nothing":
        path.symlink_to(path.parent / "nowhere" / "file")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(os.devnull)
    else:
        path.write_bytes(CONTENTS[kind])


CONTENTS = {
    "file": b"mine",
    "empty": b"",
    "binary": bytes(range(256)) * 40,
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "digits": b'{"a": ' + b"9" * 5_000 + b"}",
}
NO_FILES = ["folder", "loop", "link to nothing", "pipe", "device"]
SIX = ["--BOTTOM_K", 6, *OF_BIAS]

READ = [  # what a step reads, and what it must say of anything that is no file
    (SCORES, STEP_3, SIX, f"is missing or incomplete; run {STEP_1} first"),
    (REPRESENTATIONS, STEP_3, SIX, f"is missing or incomplete; run {STEP_2} first"),
    (f"{FACTORS}/manifest.json", STEP_4, SIX, f"is missing or incomplete; run {STEP_1} first"),
    (f"{FACTORS}/lambda_matrix.safetensors", STEP_4, SIX, "lambda_matrix.safetensors is missing; delete the folder"),
    (INDICES, STEP_4, ["--BOTTOM_K", 5, *DPP, *OF_BIAS], f"is missing or incomplete; run {STEP_3} first"),
    (GRADIENT, STEP_5, ["--BOTTOM_K", 5, *DPP, *OF_BIAS], f"is missing or incomplete; run {STEP_4} first"),
]


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize(("place", "script", "words", "told"), READ)
def test_no_file_in_the_place_of_an_artifact_that_is_read(ready, refusal, place, script, words, told, kind):
    put(kind, ready.output / place)
    assert all_in(refusal(ready, script, *words), told)


KINDS = {  # in the place of a data file
    "folder": "is a folder, and must be a file",
    "loop": "is a link to nothing, and must be a file",
    "link to nothing": "is a link to nothing, and must be a file",
    "pipe": "is a pipe or a device, and must be a file",
    "device": "is a pipe or a device, and must be a file",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("place", "script"),
    [
        ("hh/train.jsonl", STEP_2),
        ("bias/templates.json", STEP_1),
        ("ethics/cm_train.csv", STEP_1),
        ("ethics/prompt.txt", STEP_1),
        ("truthfulness/TruthfulQA.csv", STEP_1),
        ("hh/planted.json", PAPER_TABLES),
    ],
)
def test_no_file_in_the_place_of_data(ready, refusal, place, script, kind):
    """What may be missing, too: a link to nothing is no reason to do as if there were no such file."""
    put(kind, ready.data / place)
    assert all_in(refusal(ready, script), place, KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_in_the_place_of_a_split_of_the_questions(ready, refusal, kind):
    splits = ready.data / "truthfulness" / "splits"
    put(kind, splits / "TruthfulQA_train.csv")
    shutil.copy(ready.data / "truthfulness" / "TruthfulQA.csv", splits / "TruthfulQA_test.csv")
    assert all_in(refusal(ready, STEP_1), "splits/TruthfulQA_train.csv", KINDS[kind])


@pytest.mark.parametrize("kind", ["file", "pipe", "device", "link to nothing"])
@pytest.mark.parametrize("place", ["bias", "ethics", "truthfulness"])
def test_no_folder_in_the_place_of_a_folder_with_data(ready, refusal, place, kind):
    put(kind, ready.data / place)
    assert all_in(refusal(ready, STEP_1), ready.data / place, "must be a folder", "DATA_DIR")


@pytest.mark.parametrize("kind", [*NO_FILES, *CONTENTS])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_anything_in_the_place_of_a_models_file(ready, refusal, file, kind):
    put(kind, ready.model / file)
    shutil.rmtree(ready.output)
    assert all_in(refusal(ready, STEP_2), ready.model)


@pytest.mark.parametrize("kind", ["file", "pipe", "device"])
def test_no_folder_in_the_place_of_a_model(ready, refusal, kind):
    put(kind, ready.model)
    assert all_in(refusal(ready, STEP_2), ready.model, "is no folder, and a model is one")


@pytest.mark.parametrize("kind", ["pipe", "loop", "device"])
def test_no_folder_in_the_place_of_the_output(ready, refusal, kind):
    put(kind, ready.output)
    assert all_in(refusal(ready, STEP_2), "output")


CHECKPOINT = "gradient_ascent_models/bias_pythia-tiny_dpp_ifweight10_bottom5_lr0.05"
REPAIR = ["--BOTTOM_K", 5, *DPP, *OF_BIAS]
WRITTEN = [  # by a step, with the words that make it write
    ("representations/pythia-tiny_sumreps.safetensors", STEP_2, []),
    ("dpp/bias_pythia-tiny_indices_6_ifweight10.json", STEP_3, SIX),
    (GRADIENT.replace("dpp_ifweight10_bottom5", "pure_ekfac_bottom6"), STEP_4, SIX),
    ("results/pythia-tiny_anthropic_train.json", ANTHROPIC, ["--SPLIT", "train"]),
]


@pytest.mark.parametrize("part", ["artifact", "manifest", "lock"])
@pytest.mark.parametrize(("place", "script", "words"), WRITTEN)
def test_a_folder_where_a_file_is_written(ready, refusal, place, script, words, part):
    """It is found before the work."""
    artifact = ready.output / place
    artifact.unlink(missing_ok=True)
    in_the_way = {
        "artifact": artifact,
        "manifest": artifact.with_name(f"{artifact.stem}.manifest.json"),
        "lock": artifact.with_name(f".{artifact.name}.lock"),
    }[part]
    put("folder", in_the_way)
    line = refusal(ready, script, *words)
    assert all_in(line, in_the_way, "is a folder where a file is", "move it away")
    assert ".partial" not in line


@pytest.mark.parametrize("kind", ["loop", "link to nothing", "device"])
@pytest.mark.parametrize(("place", "script", "words"), WRITTEN)
def test_a_link_in_the_place_of_a_lock_is_not_followed(ready, refusal, place, script, words, kind):
    artifact = ready.output / place
    artifact.with_name(f"{artifact.stem}.manifest.json").unlink(missing_ok=True)
    lock = artifact.with_name(f".{artifact.name}.lock")
    put(kind, lock)
    assert all_in(refusal(ready, script, *words), lock, "stands where no link may be; remove it")


@pytest.mark.parametrize("kind", ["link to nothing", "loop", "pipe", "device"])
@pytest.mark.parametrize(("place", "script", "words"), WRITTEN)
def test_what_a_link_in_an_artifacts_place_leads_to_is_not_written(ready, place, script, words, kind):
    """The file takes the link's place."""
    artifact = ready.output / place
    put(kind, artifact)
    ready.run(script, *words)
    assert artifact.is_file()
    assert not artifact.is_symlink()


@pytest.mark.parametrize("overwrite", [[], OVERWRITE])
@pytest.mark.parametrize("kind", ["file", "folder", "loop", "link to nothing", "pipe", "device"])
def test_what_is_in_the_place_of_a_checkpoint_is_kept(ready, refusal, kind, overwrite):
    put(kind, ready.output / CHECKPOINT)
    line = refusal(ready, STEP_5, *REPAIR, *overwrite)
    assert all_in(line, ready.output / CHECKPOINT, "move it away, or choose another OUTPUT_DIR")
    assert os.path.lexists(ready.output / CHECKPOINT)


@pytest.mark.parametrize("kind", ["file", "pipe", "device", "link to nothing"])
@pytest.mark.parametrize("place", ["results/tables", "results/losses"])
def test_no_folder_where_results_go(ready, refusal, place, kind):
    put(kind, ready.output / place)
    assert all_in(refusal(ready, PAPER_TABLES, *GRID, adds=True), ready.output / place, "move")


@pytest.mark.parametrize("place", ["tables/main.md", "tables/main.csv", "tables/main.tex", "report.html"])
def test_a_folder_in_the_place_of_a_table_or_the_report(ready, refusal, place):
    for file in (ready.output / "results" / "tables").glob("*"):
        file.unlink()  # the tables that are written before are new
    put("folder", ready.output / "results" / place)
    line = refusal(ready, PAPER_TABLES, *GRID, adds=True)
    assert all_in(line, f"{ready.output / 'results' / place} is a folder where a file is needed; move it away")


@pytest.mark.parametrize("kind", ["folder", "pipe", *CONTENTS])
def test_anything_in_the_place_of_a_sweep(ready, refusal, kind):
    sweep = ready.output / "results" / "bias_pythia-tiny_dpp_ifweight10_bottom5_sweep.json"
    put(kind, sweep)
    words = [*REPAIR, "--LEARNING_RATE", 0.01, 0.02, "--SAVE_TO_DISK", False, "--COMPUTE_TASK_EVAL", False]
    assert all_in(refusal(ready, STEP_5, *words), sweep, "delete it and run")


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", *CONTENTS])
def test_anything_in_the_place_of_a_checkpoints_manifest(ready, refusal, kind):
    put(kind, ready.output / CHECKPOINT / "manifest.json")
    words = ["--MODEL_NAME", ready.model, "--OUTPUT_DIR", ready.output]
    assert all_in(refusal(None, HARNESS, *words), ready.output / CHECKPOINT, STEP_5)


# ----------------------------------------------------------------------- tensors, with a manifest that agrees with them


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda tensors: {name: change(tensor).contiguous() for name, tensor in tensors.items()}


OTHER_TENSORS = {
    "none": lambda _: {},
    "renamed": lambda tensors: {"x": next(iter(tensors.values()))},
    "one more": lambda tensors: {**tensors, "zz": torch.zeros(3)},
    "one less": lambda tensors: dict(list(tensors.items())[1:]),
    "float16": every(torch.Tensor.half),
    "float8": every(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "whole numbers": every(lambda tensor: tensor.clamp(-9, 9).byte()),
    "truth values": every(lambda tensor: tensor > 0),
    "complex": every(lambda tensor: tensor.to(torch.complex64)),
    "flat": every(lambda tensor: tensor.reshape(-1, 1, 1, 1)),
    "scalar": every(lambda tensor: tensor.flatten()[0]),
    "no rows": every(lambda tensor: tensor[:0]),
    "a row less": every(lambda tensor: tensor[1:]),
    "a column less": every(lambda tensor: tensor[..., 1:]),
    "doubled": every(lambda tensor: torch.cat([tensor, tensor])),
}
TENSORS = [
    (SCORES, STEP_3, SIX, STEP_1),
    (REPRESENTATIONS, STEP_3, SIX, STEP_2),
    (f"{FACTORS}/lambda_matrix.safetensors", STEP_4, SIX, STEP_1),
    (f"{FACTORS}/activation_eigenvectors.safetensors", STEP_4, SIX, STEP_1),
    (f"{FACTORS}/num_lambda_processed.safetensors", STEP_4, SIX, STEP_1),
    (GRADIENT, STEP_5, REPAIR, STEP_4),
    ("results/losses/pythia-tiny_anthropic_test_losses.safetensors", ANTHROPIC, [], ANTHROPIC),
    (
        "results/losses/pythia-tiny_truth_test_losses.safetensors",
        "evaluation_scripts/truth_loss.py",
        [],
        "evaluation_scripts/truth_loss.py",
    ),
]


@pytest.mark.parametrize("change", OTHER_TENSORS)
@pytest.mark.parametrize(("place", "script", "words", "made_by"), TENSORS, ids=[Path(case[0]).stem for case in TENSORS])
def test_other_tensors_with_a_manifest_that_agrees(ready, refusal, place, script, words, made_by, change):
    file = ready.output / place
    before = load_file(file)
    tensors = OTHER_TENSORS[change](before)
    save_file(tensors, file)
    record(file)
    manifest = file.with_name("manifest.json" if "factors" in place else f"{file.stem}.manifest.json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    write_manifest(manifest, {**content, "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}})
    adds = script == STEP_5  # the POST-SFT model's results
    assert all_in(refusal(ready, script, *words, adds=adds), file, "delete", f"run {made_by} again")


@pytest.mark.parametrize("change", [torch.zeros_like, lambda tensor: tensor * 1e30], ids=["zero", "huge"])
@pytest.mark.parametrize("side", ["activation", "gradient"])
def test_eigenvectors_of_another_norm(ready, refusal, side, change):
    file = ready.output / FACTORS / f"{side}_eigenvectors.safetensors"
    save_file(every(change)(load_file(file)), file)
    record(file)
    assert all_in(refusal(ready, STEP_4, *SIX), f"{file} holds no {side} eigenvectors of module gpt_neox.", STEP_1)


@pytest.mark.parametrize("count", [0, -3])
def test_a_number_of_examples_that_is_none(ready, refusal, count):
    file = ready.output / FACTORS / "num_lambda_processed.safetensors"
    save_file(every(lambda tensor: torch.full_like(tensor, count))(load_file(file)), file)
    record(file)
    assert all_in(refusal(ready, STEP_4, *SIX), f"{file} holds no num lambda processed of module", STEP_1)


def test_losses_that_are_not_those_of_the_result(ready, refusal):
    file = ready.output / "results" / "losses" / "pythia-tiny_anthropic_test_losses.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "nll": tensors["nll"] * 2}, file)
    record(file)
    line = refusal(ready, ANTHROPIC)
    assert all_in(line, "pythia-tiny_anthropic_test.json does not agree with", file, "delete both")


# ---------------------------------------------------------------------------- JSON, with a manifest that agrees with it


def change_recorded(file: Path, change: Callable[[object], object]) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")
    record(file)


OTHER_JSON = {
    "an empty object": lambda _: {},
    "an empty list": lambda _: [],
    "null": lambda _: None,
    "a number": lambda _: 5,
    "a text": lambda _: "text",
    "a list of it": lambda content: [content],
}


@pytest.mark.parametrize("change", OTHER_JSON)
@pytest.mark.parametrize(
    ("place", "script", "words"),
    [
        ("results/pythia-tiny_anthropic_test.json", ANTHROPIC, []),
        ("results/pythia-tiny_bias_test.json", "evaluation_scripts/bias_loss.py", []),
        ("results/truth_pythia-tiny_dpp_ifweight10_bottom5_lr0.02_repair.json", None, None),
        (INDICES, STEP_4, ["--BOTTOM_K", 5, *DPP, *OF_BIAS]),
    ],
)
def test_other_json_with_a_manifest_that_agrees(ready, refusal, place, script, words, change):
    change_recorded(ready.output / place, OTHER_JSON[change])
    if script is None:  # step 5 writes it again, so that the tables' own reader is asked
        assert all_in(unreadable_report(ready.output / place), place, f"run {STEP_5} again")
    else:
        assert all_in(refusal(ready, script, *words), ready.output / place, "delete")


def unreadable_report(file: Path) -> str:
    from utils.artifacts import FileArtifact
    from utils.console import UserError
    from utils.reporting.sweeps import read_report

    with pytest.raises(UserError) as refused:
        read_report(FileArtifact(file, STEP_5))
    return str(refused.value)


@pytest.mark.parametrize(
    "name", ["learning_rate", "seconds", "indices", "search", "split_rules", "measurements", "model", "task"]
)
@pytest.mark.parametrize("value", [..., None, "x", [1, "2"], {"a": 1}], ids=str)
def test_a_report_with_something_else_in_it(ready, name, value):
    file = ready.output / "results" / "truth_pythia-tiny_dpp_ifweight10_bottom5_lr0.02_repair.json"
    if name == "search" and value is None:
        value = {"stopped": 5}

    def change(report: dict) -> dict:
        changed = {**report, name: value}
        return {key: part for key, part in changed.items() if part is not ...}

    change_recorded(file, change)
    assert all_in(unreadable_report(file), file, "is not what this project wrote", f"run {STEP_5} again")


@pytest.mark.parametrize("name", ["loss", "perplexity", "model", "metric", "split", "dialogues"])
@pytest.mark.parametrize("value", [..., "x", 7])
def test_a_result_with_something_else_in_it(ready, refusal, name, value):
    def change(result: dict) -> dict:
        return {key: part for key, part in {**result, name: value}.items() if part is not ...}

    change_recorded(ready.output / "results" / "pythia-tiny_anthropic_test.json", change)
    assert all_in(refusal(ready, ANTHROPIC), "pythia-tiny_anthropic_test.json does not agree with", "delete both")


@pytest.mark.parametrize(
    ("name", "value"),
    [("indices", None), ("indices", [99]), ("indices", [True]), ("retained", "x"), ("seconds", "x"), ("shapes", [])],
)
def test_a_gradients_manifest_with_something_else_in_it(ready, refusal, name, value):
    manifest = (ready.output / GRADIENT).with_name("aggregated_query_grads.manifest.json")
    write_manifest(manifest, {**json.loads(manifest.read_text(encoding="utf-8")), name: value})
    assert all_in(refusal(ready, STEP_5, *REPAIR), manifest, "does not say what step 4 writes", f"run {STEP_4} again")


@pytest.mark.parametrize("value", [0, -1, "x", None, True, 1.5])
def test_a_gradients_manifest_with_another_number_of_blocks(ready, refusal, value):
    manifest = (ready.output / GRADIENT).with_name("aggregated_query_grads.manifest.json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["settings"]["NUM_BLOCKS"] = value
    write_manifest(manifest, content)
    assert all_in(refusal(ready, STEP_5, *REPAIR), manifest, f"run {STEP_4} again")


# ------------------------------------------------------------------------------------------------- numbers at the edges


DIRECT = ["--TASK_NAME", "combined", "--SCORES_TYPE", "direct", "--TASK_WEIGHTS"]


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        (STEP_1, ["--DAMPING_FACTOR", LARGEST, *OVERWRITE], ["influence scores", "change DAMPING_FACTOR = 3.4e+38"]),
        (STEP_1, ["--DAMPING_FACTOR", 1e38, *OVERWRITE], ["influence scores for bias", "float32", "DAMPING_FACTOR"]),
        (STEP_1, ["--DAMPING_FACTOR", 1e-320, *OVERWRITE], ["DAMPING_FACTOR = 1e-320", "rounding noise"]),
        (STEP_1, ["--NUM_BLOCKS", 2**31 - 1, *OVERWRITE], ["NUM_BLOCKS = 2147483647", "allowed: 1 to 3"]),
        (STEP_1, ["--NUM_BLOCKS", 2**31], ["NUM_BLOCKS = 2147483648", "at most 2,147,483,647"]),
        (STEP_2, ["--MAX_LENGTH", "1e30"], ["MAX_LENGTH = 1e30", "whole number"]),
        (STEP_2, ["--TOKENS_PER_BATCH", 0], ["TOKENS_PER_BATCH = 0", "at least 1"]),
        (STEP_3, ["--SEED", 2**32], ["SEED = 4294967296", "at most 4,294,967,295"]),
        (STEP_3, ["--IF_WEIGHT", "1e308"], ["IF_WEIGHT = 1e308", "at most 3.4e+38"]),
        (STEP_3, ["--KERNEL", "rff", "--NUM_FEATURES", 2**31 - 1, *SIX], ["NUM_FEATURES = 2147483647", "GB are free"]),
        (STEP_4, ["--DAMPING_FACTOR", LARGEST, "--SCORES_TYPE", "random"], ["repair gradient", "DAMPING_FACTOR = 3.4"]),
        (STEP_4, [*DIRECT, LARGEST, LARGEST, LARGEST], ["repair gradient", "change TASK_WEIGHTS = [3.4e+38, "]),
        (STEP_4, [*DIRECT, "1e-320", 0, 0], ["repair gradient", "change TASK_WEIGHTS = [1e-320, "]),
        (STEP_4, ["--BOTTOM_K", 60, "--PRESERVE_PERPLEXITY", True], ["60 of 60", "set BOTTOM_K, or TOP_K, to less"]),
        (STEP_5, [*REPAIR, "--PPL_BUDGET", 0], ["PPL_BUDGET = 0", "above 0"]),
        (STEP_5, [*REPAIR, "--NUM_VALIDATION_EXAMPLES", 0], ["NUM_VALIDATION_EXAMPLES = 0", "at least 1"]),
        (STEP_5, [*REPAIR, "--LEARNING_RATE", LARGEST], ["_lr3.4e+38: the ", "LEARNING_RATE far too large"]),
        (PAPER_TABLES, [*GRID, "--BOTTOM_K", 61], ["BOTTOM_K = 61", "allowed: 1 to 60"]),
        (PAPER_TABLES, [*GRID, "--LEARNING_RATE", 0], ["LEARNING_RATE = 0", "above 0"]),
        (PAPER_TABLES, [*GRID, "--PRE_SFT_MODEL_NAMES", "a", "b"], ["has 2 names for 1", "one for each"]),
    ],
)
def test_numbers_beyond_their_edges(ready, refusal, script, words, told):
    assert all_in(refusal(ready, script, *words), *told)


def tensors_of(output: Path, place: str) -> torch.Tensor:
    return next(iter(load_file(output / place).values()))


def test_one_token_in_a_batch_gives_the_same_representations(ready):
    before = tensors_of(ready.output, REPRESENTATIONS)
    (ready.output / REPRESENTATIONS).unlink()
    ready.run(STEP_2, "--TOKENS_PER_BATCH", 1)
    torch.testing.assert_close(tensors_of(ready.output, REPRESENTATIONS), before)


@pytest.mark.parametrize("weight", [0, 10, LARGEST])
def test_all_dialogues_are_picked_once(ready, weight):
    ready.run(STEP_3, "--BOTTOM_K", 60, "--IF_WEIGHT", weight, *OF_BIAS)
    file = ready.output / "dpp" / f"bias_pythia-tiny_indices_60_ifweight{float(weight):g}.json"
    assert sorted(json.loads(file.read_text(encoding="utf-8"))["indices"]) == list(range(60))


def test_a_huge_weight_of_influence_picks_the_most_harmful(ready):
    ready.run(STEP_3, "--BOTTOM_K", 6, "--IF_WEIGHT", LARGEST, *OF_BIAS)
    file = ready.output / "dpp" / "bias_pythia-tiny_indices_6_ifweight3.4e+38.json"
    scores = tensors_of(ready.output, SCORES)[0]
    assert set(json.loads(file.read_text(encoding="utf-8"))["indices"]) == set(scores.argsort()[:6].tolist())


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_first_and_the_last_seed(ready, seed):
    ready.run(STEP_1, "--SEED", seed, *OF_BIAS)
    ready.run(STEP_3, "--SEED", seed, *SIX, "--KERNEL", "rff")
    ready.run(STEP_4, "--SEED", seed, *SIX, "--SCORES_TYPE", "random")
    words = ["--SEED", seed, *SIX, "--SCORES_TYPE", "random", "--LEARNING_RATE", "auto", "--SAVE_TO_DISK", False]
    ready.run(STEP_5, *words, "--COMPUTE_TASK_EVAL", False, "--NUM_VALIDATION_EXAMPLES", 5)
    assert (ready.output / "results" / "bias_pythia-tiny_random_bottom6_search.json").is_file()


def test_more_validation_examples_than_there_are(ready):
    words = [*REPAIR, "--LEARNING_RATE", "auto", "--SAVE_TO_DISK", False, "--COMPUTE_TASK_EVAL", False]
    ready.run(STEP_5, *words, "--NUM_VALIDATION_EXAMPLES", 2**31 - 1)
    (search,) = (ready.output / "results").glob("bias_*_search.json")
    assert json.loads(search.read_text(encoding="utf-8"))["validation_dialogues"] == (60 - 5) // 2


@pytest.mark.parametrize(("budget", "is_nothing"), [("1e-300", True), (LARGEST, False)])
def test_budgets_that_allow_nothing_or_everything(ready, budget, is_nothing):
    words = [*REPAIR, "--LEARNING_RATE", "auto", "--SAVE_TO_DISK", False, "--COMPUTE_TASK_EVAL", False]
    ready.run(STEP_5, *words, "--PPL_BUDGET", budget)
    (search,) = (ready.output / "results").glob(f"bias_*_search_budget{float(budget):g}.json")
    content = json.loads(search.read_text(encoding="utf-8"))
    assert not is_nothing or content["learning_rate"] == 0
    assert content["budget"] == float(budget)


# --------------------------------------------------------------------------------------------------- degenerate dialogu


@pytest.mark.parametrize(
    ("rows", "bottom_k", "told"),
    [(1, 1, "there is a single representation"), ("same", 2, "half of the representations are the same")],
)
def test_dialogues_without_a_distance(ready, refusal, rows, bottom_k, told):
    dialogues = read_rows(ready.data / "hh" / "train.jsonl")[:10]
    write_rows(ready.data / "hh" / "train.jsonl", dialogues[:1] if rows == 1 else dialogues[:1] * 10)
    shutil.rmtree(ready.output)
    ready.run(STEP_1, *OF_BIAS)
    ready.run(STEP_2)
    line = refusal(ready, STEP_3, "--BOTTOM_K", bottom_k, *OF_BIAS)
    assert all_in(line, "GAMMA = None", told, "set GAMMA to a number")
    ready.run(STEP_3, "--BOTTOM_K", bottom_k, *OF_BIAS, "--GAMMA", 1)
    file = ready.output / "dpp" / f"bias_pythia-tiny_indices_{bottom_k}_ifweight10.json"
    assert json.loads(file.read_text(encoding="utf-8"))["indices"] == list(range(bottom_k))
    ready.run(STEP_4, "--BOTTOM_K", bottom_k, *OF_BIAS)


def test_scores_that_are_all_the_same_leave_the_choice_to_diversity(ready):
    save_file({"all_modules": torch.full((1, 60), 3e38)}, ready.output / SCORES)
    record(ready.output / SCORES)
    ready.run(STEP_3, *SIX)
    content = json.loads((ready.output / "dpp" / "bias_pythia-tiny_indices_6_ifweight10.json").read_text("utf-8"))
    assert content["influence_gains"] == [0.0] * 6
    assert len(set(content["indices"])) == 6


@pytest.mark.parametrize("split", ["train", "test"])
def test_dialogues_without_an_answer(ready, refusal, split):
    file = ready.data / "hh" / f"{split}.jsonl"
    write_rows(file, [{**row, "chosen": ""} for row in read_rows(file)])
    shutil.rmtree(ready.output)
    line = refusal(ready, STEP_1 if split == "train" else ANTHROPIC)
    assert all_in(line, f"split {split}: none of", "completion token that counts")


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--"], "it takes one value"),
        (["-x"], "it takes one value"),
        ([""], "it takes one value"),
        (["—MAX_LENGTH", 9], "it takes one value"),
        (["–-MAX_LENGTH", 9], "it takes one value"),
        (["x" * 100_000], "it takes one value"),
        (["--MAX_LENGTH="], "MAX_LENGTH = nothing"),
        (["--MAX_LENGTH"], "MAX_LENGTH = nothing"),
        (["--MAX_LENGTH", "--"], "MAX_LENGTH = --: allowed is a whole number"),
        (["--MAX_LENGTH", "9" * 100_000], "MAX_LENGTH = 9"),
        (["--MAX_LENGTH", "9\n8"], "MAX_LENGTH = 9 8: allowed is a whole number"),
        (["--MAX_LENGTH", "0x10"], "MAX_LENGTH = 0x10: allowed is a whole number"),
        (["--MAX_LENGTH", "9.0"], "MAX_LENGTH = 9.0: allowed is a whole number"),
        (["--max_length", 9], "did you mean --MAX_LENGTH?"),
        (["--" + "X" * 100_000], "unknown constant --XXX"),
        (["--HH_DATASET", "a\0b"], r"HH_DATASET = 'a\x00b': character 2 is a zero byte"),
        (["--HH_DATASET", "a\x1b[31mb\x07"], r"HH_DATASET = 'a\x1b[31mb\x07'"),
        (["--HH_DATASET", "a\nb"], r"HH_DATASET = 'a\nb'"),
        (["--HH_DATASET", "a\udcffb"], r"HH_DATASET = 'a\udcffb'"),
        (["--HH_DATASET", "x" * 300], "is longer than the disk takes"),
        (["--HH_DATASET", "x/" * 2_500], "is longer than the disk takes"),
        (["--MODEL_NAME", ""], "a model's name is '', which is empty"),
        (["--MODEL_NAME", " "], "a model's name is ' ', which is empty"),
        (["--MODEL_NAME", "."], ".: the folder has no config.json"),
        (["--MODEL_NAME", "~nobody-of-that-name/x"], "'~nobody-of-that-name/x' is no path that can be followed"),
        (["--MODEL_NAME", os.devnull], f"{os.devnull}: is no folder"),
        (["--OUTPUT_DIR", ""], "OUTPUT_DIR = '': is empty"),
        (["--OUTPUT_DIR", "x/" * 2_500], "is longer than the disk takes"),
        (["--OUTPUT_DIR", os.devnull], f"OUTPUT_DIR = '{os.devnull}'"),
    ],
)
def test_words_that_cannot_be_read(ready, refusal, words, told):
    line = refusal(ready, STEP_2, *words)
    assert "\x1b" not in line
    assert all_in(line, told)


@pytest.mark.parametrize(
    "word",
    [
        '[0.1, "x"]',
        "[[0.1]]",
        "[]",
        "[1e400]",
        "[True]",
        "[None]",
        "[",
        "[0.1",
        "[x]",
        "{0.1}",
        "(0.1,)",
        "[1j]",
        "[-1]",
    ]
    + ["[__import__('os')]", "[" * 50_000 + "]" * 50_000, "[" + "1," * 50_000 + "]", "[" + "9" * 5_000 + "]", "1e39"],
    ids=lambda word: word[:12],
)
def test_learning_rates_that_are_none(ready, refusal, word):
    assert all_in(refusal(ready, STEP_5, *REPAIR, "--LEARNING_RATE", word), "LEARNING_RATE = ", "list of numbers of at")


# ----------------------------------------------------------------------------------------------------- the environment


FIRST = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE = 'x' in the environment"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE = '' in the environment"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE = '-1' in the environment"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE = '²' in the environment"),
        ({"WORLD_SIZE": "2"}, "RANK = '' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK = 'x' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "5"}, "RANK = 5 in the environment: must be below WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "1000000000", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT not"),
        ({**FIRST, "MASTER_PORT": "x"}, "MASTER_PORT = 'x' in the environment"),
        ({**FIRST, "MASTER_PORT": "-5"}, "MASTER_PORT = '-5' in the environment"),
        ({**FIRST, "MASTER_PORT": "99999"}, "MASTER_PORT = 99999 in the environment: must be at most 65535"),
        ({**FIRST, "MASTER_PORT": "29511", "LOCAL_RANK": "x"}, "LOCAL_RANK = 'x' in the environment"),
    ],
)
def test_environments_of_a_launcher_that_make_no_sense(ready, refusal, monkeypatch, environment, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert all_in(refusal(ready, STEP_2), told)


@pytest.mark.parametrize(
    ("name", "value"), [("CI", "maybe"), ("TMPDIR", "/no/such/folder"), ("WORLD_SIZE", "0"), ("HOME", "relative")]
)
def test_environments_that_do_not_matter(ready, capsys, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    ready.run(STEP_2)
    assert "finished before" in capsys.readouterr().out


def in_a_shell(line: str, *words: object, **keywords: object) -> subprocess.CompletedProcess:
    """Run step 3 as a line of a shell, in which "$@" is the script with these words."""
    command = ["sh", "-c", line, "sh", sys.executable, str(PROJECT_ROOT / STEP_3), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **keywords)


def test_streams_that_are_closed_and_a_working_directory_that_is_gone(ready, tmp_path):
    words = [*ready.arguments(STEP_3), "--BOTTOM_K", 5]
    gone = tmp_path / "gone"
    gone.mkdir()
    for line, code, told in [
        ('"$@" >&- 2>&-', 0, ""),
        ('"$@" --BOTTOM_K 61 2>&-', 1, ""),
        (f'cd {gone} && rmdir {gone} && "$@" --BOTTOM_K 61', 1, "error: BOTTOM_K = 61: there are 60 "),
        ('("$@"; exit $?) > /dev/full', 1, "error: the disk is full"),
        ('LC_ALL=C PYTHONIOENCODING=ascii "$@" --HH_DATASET ü', 1, r"error: HH_DATASET = '\xfc', split train: no such"),
    ]:
        process = in_a_shell(line, *words)
        assert process.returncode == code, process.stderr
        assert process.stderr.startswith(told)
        assert process.stderr.count("\n") == bool(told)


# ----------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize("script", [STEP_1, STEP_2, ANTHROPIC, PAPER_TABLES])
def test_a_model_whose_name_is_too_long_for_its_artifacts(ready, refusal, tmp_path, script):
    ready.model = ready.model.rename(tmp_path / ("m" * 250))
    shutil.rmtree(ready.output)
    words = GRID if script == PAPER_TABLES else []
    assert all_in(refusal(ready, script, *words, adds=True), "mmm", "is longer than the disk takes; choose a shorter")


@pytest.mark.parametrize("name", ["*", "[ab]", "%s%d", "{}", "sp ace", "a\nb", "--NAME", "x.partial", "MANIFEST.JSON"])
def test_names_of_models_are_no_patterns(ready, capsys, tmp_path, name):
    """A model with such a name gets sweeps of its own, and the other models' files are left alone."""
    for other in ("b", "abc", "x"):
        put("file", ready.output / "results" / f"truth_{other}_dpp_ifweight10_bottom5_sweep.notes")
    ready.model = ready.model.rename(tmp_path / name)
    before = contents(ready.output)
    ready.run(STEP_1, "--TASK_NAME", "truth")
    ready.run(STEP_4, "--TASK_NAME", "truth", "--BOTTOM_K", 3)
    words = ["--TASK_NAME", "truth", "--BOTTOM_K", 3, "--LEARNING_RATE", 0.01, 0.02, "--SAVE_TO_DISK", False]
    ready.run(STEP_5, *words)
    assert (ready.output / "results" / f"truth_{name}_sweep.png").is_file()
    after = contents(ready.output)
    assert {file: after[file] for file in before} == before


def test_the_picture_of_a_model_is_not_that_of_one_with_a_longer_name(ready, tmp_path):
    from utils.reporting.sweeps import draw_overview

    results = ready.output / "results"
    ready.run(STEP_5, *REPAIR, "--LEARNING_RATE", 0.01, 0.02, "--SAVE_TO_DISK", False)
    sweep = results / "bias_pythia-tiny_dpp_ifweight10_bottom5_sweep.json"
    other = json.loads(sweep.read_text(encoding="utf-8"))
    other |= {"model": "pythia-tiny_other", "inputs": {"model": "m"}}
    newest = results / "bias_pythia-tiny_other_dpp_ifweight10_bottom5_sweep.json"
    newest.write_text(json.dumps(other), encoding="utf-8")
    os.utime(newest, (2e9, 2e9))
    draw_overview(str(ready.output), ["pythia-tiny"], 1.0)
    assert (results / "tables" / "sweeps.png").is_file()


@pytest.mark.parametrize("place", ["output", "data", "data/hh", "pythia-tiny", "pythia-tiny/below"])
def test_artifacts_may_lie_beside_what_they_are_made_from(ready, tmp_path, place):
    """And the model and the data are the same as before."""
    for folder in (ready.data, ready.model):
        (folder / "notes.md").write_text("mine", encoding="utf-8")
    before = {**contents(ready.data), **contents(ready.model)}
    ready.output = tmp_path / place
    for _ in range(2):
        ready.run(STEP_2)
    after = {**contents(ready.data), **contents(ready.model)}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("pythia-tiny", "BASE_MODEL lies there"),
        ("data/hh", "HH_DATASET lies there"),
        ("data", "HH_DATASET lies there"),
        ("", " lies there"),
        ("/", "this repository lies there"),
        (str(PROJECT_ROOT), "this repository lies there"),
    ],
)
def test_a_fine_tuning_does_not_replace_what_it_reads(ready, refusal, tmp_path, place, told, overwrite):
    words = ["--BASE_MODEL", ready.model, "--HH_DATASET", ready.data / "hh", "--SFT_MODEL_DIR", tmp_path / place]
    line = refusal(None, STEP_0, *words, "--OVERWRITE", overwrite)
    assert all_in(line, "SFT_MODEL_DIR = ", told, "give a folder of its own")


@pytest.mark.parametrize("kind", ["file", "folder", "loop", "pipe"])
def test_what_is_in_the_place_of_a_fine_tuned_model_is_kept(ready, refusal, tmp_path, kind):
    put(kind, tmp_path / "sft")
    words = ["--BASE_MODEL", ready.model, "--HH_DATASET", ready.data / "hh", "--SFT_MODEL_DIR", tmp_path / "sft"]
    assert "sft" in refusal(None, STEP_0, *words)


def test_a_fine_tuning_that_breaks_the_model(ready, refusal, tmp_path):
    words = ["--BASE_MODEL", ready.model, "--HH_DATASET", ready.data / "hh", "--SFT_MODEL_DIR", tmp_path / "sft"]
    line = refusal(None, STEP_0, *words, "--NUM_EPOCHS", 1, "--LEARNING_RATE", 1e30)
    assert all_in(line, tmp_path / "sft", "loss is nan", "LEARNING_RATE far too large")


# ------------------------------------------------------------------------------------- preparing data, and the harness


def prepared(ready: Workspace, target: Path, source: Path | None = None) -> list[object]:
    source = source or ready.data / "truthfulness" / "TruthfulQA.csv"
    return ["--DATA_DIR", target, "--ONLY", "truth", "--CHECK_COUNTS", False, "--TRUTH_SOURCE", source]


@pytest.mark.parametrize(
    ("place", "kind", "told"),
    [
        ("truthfulness/TruthfulQA.csv", "folder", "is a folder where a file is needed; move it away"),
        ("truthfulness/TruthfulQA.csv", "file", "already exists, has no manifest and differs"),
        ("truthfulness/TruthfulQA.csv", "pipe", "already exists, has no manifest and differs"),
        ("truthfulness/TruthfulQA.manifest.json", "folder", "is a folder where a file is needed; move it away"),
        (".truthfulness.lock", "folder", "is a folder where a file is needed; move it away"),
        (".truthfulness.lock", "loop", "stands where no link may be; remove it"),
        ("truthfulness", "file", "in the way"),
        ("truthfulness", "pipe", "in the way"),
        ("truthfulness", "link to nothing", "in the way"),
    ],
)
def test_what_is_in_the_way_of_prepared_data(ready, refusal, tmp_path, place, kind, told):
    (tmp_path / "new").mkdir()
    put(kind, tmp_path / "new" / place)
    assert all_in(refusal(None, PREPARE, *prepared(ready, tmp_path / "new")), tmp_path / "new" / place, told)


@pytest.mark.parametrize("kind", [*NO_FILES, *CONTENTS])
def test_anything_in_the_place_of_a_source(ready, refusal, tmp_path, kind):
    put(kind, tmp_path / "source.csv")
    line = refusal(None, PREPARE, *prepared(ready, tmp_path / "new", tmp_path / "source.csv"))
    assert all_in(line, "source.csv")
    assert not (tmp_path / "new" / "truthfulness" / "TruthfulQA.csv").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--REPAIRED_MODEL_NAMES", "/no/such/model"], "no model at /no/such/model"),
        (["--REPAIRED_MODEL_NAMES", "a/x", "b/x"], "differ in the last part"),
        (["--LIMIT", 0], "LIMIT = 0"),
        (["--BATCH_SIZE", -1], "BATCH_SIZE = -1"),
        ([], "has no repaired checkpoint"),
    ],
)
def test_wrong_constants_of_the_harness(ready, refusal, words, told):
    common = ["--MODEL_NAME", ready.model, "--OUTPUT_DIR", ready.output]
    assert all_in(refusal(None, HARNESS, *common, *words), told)


def test_a_repaired_model_of_the_same_name_and_task_files_that_are_no_folder(ready, refusal, tmp_path):
    common = ["--MODEL_NAME", ready.model, "--OUTPUT_DIR", ready.output, "--REPAIRED_MODEL_NAMES"]
    line = refusal(None, HARNESS, *common, ready.model)
    assert all_in(line, f"REPAIRED_MODEL_NAMES has {ready.model}", "the last part, which must differ")
    repaired = shutil.copytree(ready.model, tmp_path / "repaired")
    line = refusal(None, HARNESS, *common, repaired, "--INCLUDE_PATH", ready.data / "hh" / "test.jsonl")
    assert all_in(line, "INCLUDE_PATH = ", "test.jsonl", "no such folder")
