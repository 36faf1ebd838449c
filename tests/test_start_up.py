"""A step imports only what it uses, and has no constant that it does not use."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import load_script

from utils.paths import (
    LIST_HARMFUL,
    PAPER_TABLES,
    PROJECT_ROOT,
    ROBUSTNESS,
    STEP_1,
    STEP_2,
    STEP_3,
    STEP_4,
    STEP_5,
    STEP_6,
)
from utils.settings import Settings, load_settings

HEAVY = {
    "transformers",
    "kronfluence",
    "pandas",
    "matplotlib",
    "datasets",
    "accelerate",
    "jinja2",
    "huggingface_hub",
    "scipy",
}


def imported_by(*commands: Sequence[str]) -> set[str]:
    """Top-level packages that scripts import beyond those of torch, run one after the other; all must end well."""
    code = f"""
import runpy, sys, torch
before = set(sys.modules)
for command in {[list(map(str, command)) for command in commands]!r}:
    sys.argv = command
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}), file=sys.stderr)
"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT_ROOT
    )
    return set(finished.stderr.splitlines()[-1].split())


def test_help_imports_nothing_heavy():
    assert not imported_by(*([script, "--help"] for script in (STEP_2, STEP_3, STEP_5, STEP_6["truth"]))) & HEAVY


def test_steps_2_3_5_and_6_run_without_kronfluence(workspace):
    """Steps 1 and 4 alone import it, for the factors and the preconditioning."""
    workspace.run(STEP_1)
    workspace.run(STEP_4, "--BOTTOM_K", "4")
    more = {STEP_2: [], STEP_3: ["--BOTTOM_K", "4"], STEP_5: ["--BOTTOM_K", "4"], STEP_6["truth"]: ["--SPLIT", "train"]}
    found = imported_by(*([script, *workspace.arguments(script), *words] for script, words in more.items()))
    assert "transformers" in found
    assert "kronfluence" not in found


class RecordingSettings(Settings):
    """Settings that keep the names of the constants that were read."""

    read: set[str] = set()

    def __getattribute__(self, name: str) -> object:
        if name.isupper():
            RecordingSettings.read.add(name)
        return super().__getattribute__(name)


COMBINED = ["--TASK_NAME", "combined", "--BOTTOM_K", "4"]
RUNS = {  # together they take every branch that reads a constant
    STEP_1: [["--COMPUTE_PER_TOKEN_SCORES", "True"], ["--FACTOR_STRATEGY", "ekfac_cg", "--CG_ITERATIONS", "2"]],
    STEP_2: [["--ANSWERS_OF", "bias"]],
    STEP_3: [[*COMBINED, "--KERNEL", "rff"]],
    STEP_4: [
        [*COMBINED, "--SCORES_TYPE", "dpp", "--PRESERVE_PERPLEXITY", "True"],
        *(["--TASK_NAME", "bias", "--SCORES_TYPE", name] for name in ("dpo", "fitted")),
    ],
    STEP_5: [[*COMBINED, "--SCORES_TYPE", "dpp", "--PRESERVE_PERPLEXITY", "True", "--LEARNING_RATE", "auto"]],
    **{script: [[]] for script in STEP_6.values()},
    LIST_HARMFUL: [COMBINED, [*COMBINED, "--SCORES_TYPE", "bm25", "--CLEANED_DATASET", "OUTPUT/cleaned"]],
    ROBUSTNESS: [["--BITS", "4", "--NUM_FINE_TUNING_STEPS", "1"]],
}
ONLY_WHEN_PUSHED = {"HUB_USERNAME"}
READ_BY_RUN_STEP = {"TRUST_REMOTE_CODE"}


@pytest.fixture(scope="module")
def shared_workspace(make_workspace):
    """Where each step finds what the ones before it made."""
    return make_workspace("pythia")


@pytest.mark.parametrize("script", RUNS)
def test_a_script_uses_each_of_its_constants(shared_workspace, script):
    module = load_script(script)
    RecordingSettings.read = set()
    for arguments in RUNS[script]:
        words = [word.replace("OUTPUT", str(shared_workspace.output)) for word in arguments]
        settings = load_settings(module, [*shared_workspace.arguments(script), *words])
        module.main(RecordingSettings(**vars(settings)))
    unused = set(vars(settings)) - RecordingSettings.read - ONLY_WHEN_PUSHED - READ_BY_RUN_STEP
    assert not unused, f"{script} never reads {', '.join(sorted(unused))}"


# --------------------------------------------------------------------------------------------------------- layers

SCRIPT_PACKAGES = {"steps", "data", "dpp", "representations", "evaluation_scripts", "benchmarks", "studies"}
STEP_MODULES = {STEP_1[:-3], STEP_4[:-3], STEP_5[:-3]}


def imports_of(path: Path) -> set[str]:
    """First parts of the modules that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.partition(".")[0] for name in names}


def test_utils_import_neither_tasks_nor_scripts_and_tasks_no_scripts():
    for path in (PROJECT_ROOT / "utils").rglob("*.py"):
        assert not imports_of(path) & {"tasks", *SCRIPT_PACKAGES, *STEP_MODULES}, path
    for path in (PROJECT_ROOT / "tasks").rglob("*.py"):
        assert not imports_of(path) & {*SCRIPT_PACKAGES, *STEP_MODULES}, path


def test_no_step_imports_another():
    for script in (STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, *STEP_6.values(), PAPER_TABLES, ROBUSTNESS, LIST_HARMFUL):
        assert imports_of(PROJECT_ROOT / script) & {*SCRIPT_PACKAGES, *STEP_MODULES} == {"steps"}, script


def test_one_package_knows_kronfluences_insides():
    """tasks/ has its Task base, and nothing else names it."""
    knowing = {
        str(path.relative_to(PROJECT_ROOT).parent)
        for folder in ("utils", "tasks", "dpp", "representations", "evaluation_scripts", "data")
        for path in (PROJECT_ROOT / folder).rglob("*.py")
        if "kronfluence" in imports_of(path)
    }
    assert knowing == {"utils/influence", "tasks"}
