"""What a step tells its user: the same look everywhere, the next command, quiet where nobody watches."""

from __future__ import annotations

import errno
import re
import runpy
import shlex
import shutil
import sys
import warnings

import hostile
import pytest
import torch
from conftest import Workspace

import steps
from steps import load_script, next_command
from utils import console
from utils.console import UserError, banner, progress_bar, remedy_for, say, say_error, say_read, silence
from utils.files import write_whole
from utils.paths import PROJECT_ROOT, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, html_report
from utils.settings import Settings, load_settings


def run_as_user(command: str, monkeypatch, capsys) -> str:
    """Run a command as python does with a script; gives what it printed."""
    program, script, *words = shlex.split(command)
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(PROJECT_ROOT / script), run_name="__main__")
    return capsys.readouterr().out


def test_each_step_says_what_it_wrote_and_names_the_next_with_the_same_constants(
    workspace: Workspace, monkeypatch, capsys
):
    words = [*workspace.arguments(STEP_1), "--SEED", "7"]
    command, ran = shlex.join(["python", STEP_1, *words]), []
    while "paper_tables" not in command:
        if "greedy_dpp" in command:
            command += " --BOTTOM_K 5"
        ran.append(shlex.split(command)[1])
        told = run_as_user(command, monkeypatch, capsys)
        assert re.search(r"^== step \d", told, flags=re.MULTILINE)
        assert re.search(r"^   read \S+.*: ", told, flags=re.MULTILINE)
        assert re.search(r"^   wrote \S+.* in [\d.]+ s$", told, flags=re.MULTILINE)
        (command,) = re.findall(r"^next: (.*)$", told, flags=re.MULTILINE)
        unknown = re.findall(r"^ *\(and (.*) as before, where you have set them\)$", told, flags=re.MULTILINE)
        if command.startswith(f"python {STEP_3}"):  # step 2 has none of these
            assert unknown == ["SEED, FACTOR_STRATEGY and USE_HALF_PRECISION"]
            command += " --SEED 7"
        if command.startswith(f"python {STEP_4}"):
            assert unknown == ["DATA_DIR, DEVICE and DAMPING_FACTOR"]
            command += f" --DATA_DIR {workspace.data}"
    assert ran == [STEP_1, STEP_2, STEP_3, STEP_4, STEP_5]
    for word in (str(workspace.model), str(workspace.output), str(workspace.data / "hh")):
        assert word in command
    assert (workspace.output / "gradient_ascent_models").is_dir()


def test_after_another_repair_the_next_command_compares_it_with_the_papers(tmp_path):
    step_5 = load_script(STEP_5)
    settings = load_settings(step_5, ["--SCORES_TYPE", "fitted", "--TASK_NAME", "truth"])
    command = step_5.tables_command(settings)
    assert "--SCORES_TYPES pure_ekfac fitted" in command
    assert "--TASKS truth" in command
    assert "SCORES_TYPES" not in step_5.tables_command(load_settings(step_5, []))
    elsewhere = load_settings(step_5, ["--OUTPUT_DIR", str(tmp_path)])
    assert "replaces" not in step_5.tables_command(elsewhere)
    write_whole(html_report(tmp_path), "of another grid")
    assert f"(replaces the main table and {html_report(tmp_path)}" in step_5.tables_command(elsewhere)


def test_the_next_command_says_only_what_the_script_does_not():
    shared = {"DATA_DIR": "data/demo", "DEVICE": "auto", "SEED": 42}
    shared |= {"FACTOR_STRATEGY": "ekfac", "USE_HALF_PRECISION": False}
    settings = Settings(MODEL_NAMES=["data/demo/pythia-demo-sft"], OVERWRITE=True, NUM_BLOCKS=2, **shared)
    assert next_command(STEP_2, settings) == f"python {STEP_2}"
    (command, to_add) = next_command(STEP_4, settings, SCORES_TYPE="dpp").splitlines()
    assert command == f"python {STEP_4} --SCORES_TYPE dpp"
    assert to_add.strip() == "(and DAMPING_FACTOR as before, where you have set it)"
    assert next_command(STEP_1, settings) == f"python {STEP_1} --NUM_BLOCKS 2"


def test_a_broken_next_script_does_not_fail_a_finished_step(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "PROJECT_ROOT", tmp_path)
    (tmp_path / "broken.py").write_text("SEED: int = (\n", encoding="utf-8")
    for name in ("broken.py", "missing.py"):
        assert next_command(name, Settings(SEED=7)) == f"python {name}"


def test_a_script_that_fails_to_import_is_imported_again(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "PROJECT_ROOT", tmp_path)
    script = tmp_path / "half_script.py"
    script.write_text("BEFORE = 1\nraise RuntimeError('in the middle')\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="in the middle"):
        load_script("half_script.py")
    script.write_text("BEFORE = 1\nAFTER = 2\n", encoding="utf-8")
    assert load_script("half_script.py").AFTER == 2
    del sys.modules["half_script"]


def test_several_models_have_a_command_each():
    settings = Settings(MODEL_NAMES=["a/b", "a/c d"], DATA_DIR="data/demo", DEVICE="auto", SEED=42)
    assert [line.strip() for line in next_command(STEP_2, settings).splitlines()] == [
        f"python {STEP_2} --MODEL_NAME a/b",
        f"python {STEP_2} --MODEL_NAME 'a/c d'",
    ]
    assert next_command(STEP_4, settings).splitlines()[0] == f"python {STEP_4} --MODEL_NAMES a/b 'a/c d'"


@pytest.mark.parametrize(
    ("in_ci", "is_silent", "lines", "bars"),
    [("true", False, True, False), ("false", False, True, True), ("false", True, False, False)],
)
def test_lines_and_bars_where_somebody_reads_them(monkeypatch, capsys, in_ci, is_silent, lines, bars):
    monkeypatch.setenv("CI", in_ci)
    monkeypatch.setattr(console, "_is_silent", False)
    if is_silent:
        with warnings.catch_warnings():
            silence()
    say("a line")
    with progress_bar(3, "work", "steps") as bar:
        bar.update(3)
    shown = capsys.readouterr()
    assert bool(shown.out) == lines
    assert ("3/3" in shown.err) == bars


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.EISDIR, "Is a directory", "results/x"), "results/x is a folder where a file is needed"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "long"), "long is longer than the disk takes"),
        (OSError(errno.ELOOP, "Too many levels", "loop"), "loop is a link that leads back to itself"),
        (RuntimeError("Os { code: 13, kind: PermissionDenied }"), "a file may not be read or written"),  # safetensors
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "smaller TOKENS_PER_BATCH"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "smaller TOKENS_PER_BATCH",
        ),
        (OSError(28, "No space left on device"), "the disk is full"),
        (ValueError("shapes differ"), None),
    ],
)
def test_what_to_do_about_errors_of_the_machine(error, told):
    remedy = remedy_for(error)
    assert remedy is None if told is None else told in remedy


# -- what a terminal obeys ---------------------------------------------------------------------------------------------

COMMANDS = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "a\rb",
    "a\x08b",
    "\u202eb",
    "\x00",
    "\x7f",
]
UNSHOWN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("text", [*COMMANDS, *hostile.NAMES])
def test_a_terminal_is_told_no_command(capsys, text):
    for tell in (say, say_error, lambda text: say_read(text, text), lambda text: banner(text, text)):
        tell(f"{text}\n\tÄ 模 é ± – 🤗")
    shown = capsys.readouterr()
    assert not UNSHOWN.search(shown.out + shown.err)
    assert (shown.out + shown.err).count("\n\tÄ 模 é ± – 🤗") >= 4


@pytest.mark.parametrize("text", COMMANDS)
def test_nor_by_an_error(capsys, text):
    for error in (UserError(text), RuntimeError(text), FileNotFoundError(2, text, text)):

        def main(_: Settings, error: Exception = error) -> None:
            raise error

        main.__module__ = "steps"
        with pytest.raises(SystemExit):
            steps.run_step(main, [])
    shown = capsys.readouterr()
    assert not UNSHOWN.search(shown.out + shown.err)


def test_nor_by_the_names_of_a_model_and_of_folders(workspace, tmp_path, capsys):
    name = "evil \x1b[31m\x1b]0;title\x07 $\\frac{1}{0$ <b>|=1;=2 *x* [a](b) \u202e"
    workspace.model = shutil.copytree(workspace.model, tmp_path / name)
    workspace.data = shutil.copytree(workspace.data, tmp_path / f"data {name}")
    workspace.output = tmp_path / f"output {name}"
    for script, *arguments in (
        ("evaluation_scripts/bias_loss.py",),
        (STEP_1, "--FACTOR_STRATEGY", "identity", "--TASK_NAME", "bias"),
        (STEP_4, "--FACTOR_STRATEGY", "identity", "--TASK_NAME", "bias", "--BOTTOM_K", 5),
        (STEP_5, "--TASK_NAME", "bias", "--BOTTOM_K", 5, "--LEARNING_RATE", 0.01, 0.02),
    ):
        workspace.run(script, *arguments)
    assert not UNSHOWN.search(capsys.readouterr().out)
    assert list((workspace.output / "results").glob("*sweep.png"))
    with pytest.raises(SystemExit):
        workspace.run(STEP_1, "--FACTOR_STRATEGY", "diagonal", "--TASK_NAME", "bias", "--HH_DATASET", name)
    assert not UNSHOWN.search(capsys.readouterr().err.splitlines()[-1])
