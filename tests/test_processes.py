"""Several processes: the same numbers as one, and one readable end whatever happens to one of them."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Workspace
from process_pool import Ended, Launch
from safetensors.torch import load_file

from utils import batching, processes
from utils.influence import factors
from utils.paths import STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, STEP_6

TOLERANCE = 1e-5  # relative


def six_steps(workspace: Workspace, blocks: int = 1) -> list[tuple[str, list[object]]]:
    """The workflow with a search for the learning rate, token scores, completions and the preserving direction."""
    subset = ["--BOTTOM_K", 5]
    repair = [*subset, "--SCORES_TYPE", "dpp", "--TASK_NAME", "truth", "--PRESERVE_PERPLEXITY", True]
    calls = [
        (STEP_1, ["--NUM_BLOCKS", blocks, "--COMPUTE_PER_TOKEN_SCORES", True]),
        (STEP_2, ["--ANSWERS_OF", "truth"]),
        (STEP_3, subset),
        (STEP_4, repair),
        (STEP_4, [*subset, "--SCORES_TYPE", "direct", "--TASK_NAME", "bias"]),
        (STEP_5, [*repair, "--LEARNING_RATE", "auto", "--PPL_BUDGET", 0.05, "--NUM_COMPLETIONS", 2]),
        (STEP_6["truth"], []),
        (STEP_6["anthropic"], []),
    ]
    return [(script, [*workspace.arguments(script), *arguments]) for script, arguments in calls]


def contents(folder) -> dict[str, object]:
    """Every artifact below a folder by its path: tensors, or numbers of a JSON file, without times and manifests."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found |= {f"{name}/{key}": tensor for key, tensor in load_file(file).items()}
        elif file.suffix == ".json" and "manifest" not in file.name:
            found[name] = json.loads(file.read_text(encoding="utf-8"))
        elif file.is_file():
            found[name] = None
    return found


def assert_same(ours: object, theirs: object, where: str) -> None:
    """Equal; numbers and tensors to the tolerance, seconds not at all."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), where
        for number, (mine, yours) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(mine, yours, f"{where}[{number}]")
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype, where
        assert torch.norm((ours - theirs).double()) <= TOLERANCE * torch.norm(theirs.double()), where
    elif isinstance(theirs, float):
        if not where.endswith("seconds"):
            assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-9), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def undisturbed(make_workspace, tmp_path_factory):
    """Workspaces with the artifacts of one process, made on first use, by family and number of blocks."""
    made = {}

    def get(family: str, blocks: int) -> Workspace:
        if (family, blocks) not in made:
            workspace = make_workspace(family)
            (ended,) = Launch(tmp_path_factory.mktemp("log"), 1, six_steps(workspace, blocks)).ended()
            assert ended.code == 0, ended.err
            made[family, blocks] = workspace
        return made[family, blocks]

    return get


@pytest.mark.parametrize(
    ("family", "blocks", "count"), [("pythia", 1, 2), ("qwen", 2, 2), ("pythia", 2, 3), ("qwen", 1, 3)]
)
def test_several_processes_give_what_one_gives(family, blocks, count, undisturbed, make_workspace, tmp_path):
    workspace = make_workspace(family)
    ends = Launch(tmp_path, count, six_steps(workspace, blocks)).ended()
    assert [end.code for end in ends] == [0] * count, ends[0].err
    ours, theirs = contents(workspace.output), contents(undisturbed(family, blocks).output)
    assert_same(ours, theirs, "")


# -- failures ----------------------------------------------------------------------------------------------------------


def fail_in_pass(description: str, failing_rank: int, rank: int) -> None:
    """Makes one process raise an error when it begins its share of a pass."""
    iterate = processes.iterate_share

    def fail_or_iterate(pieces, costs, sizes, text, unit):
        if text == description and rank == failing_rank:
            raise RuntimeError("on purpose")
        return iterate(pieces, costs, sizes, text, unit)

    batching.iterate_share = factors.iterate_share = fail_or_iterate


def printed_lines(ends: list[Ended]) -> list[str]:
    """What was printed to stderr but progress bars."""
    return [line for end in ends for line in end.err.splitlines() if line.strip() and "%|" not in line]


PASSES = {  # the step that makes them
    STEP_1: ["covariances", "eigendecompositions", "Lambda", "truth queries", "training dialogues"],
    STEP_2: ["representations"],
    STEP_4: ["subset", "retained"],
    STEP_5: ["HH dialogues", "truth pairs"],
}
MADE_BY = {  # what each step adds to OUTPUT_DIR
    STEP_1: ["ekfac_experiments/*/*/factors_*", "ekfac_experiments/*/*/scores_*"],
    STEP_2: ["representations"],
    STEP_4: ["ekfac_experiments/*/*/query_grads_*"],
    STEP_5: ["gradient_ascent_models", "results"],
}


@pytest.fixture
def before(undisturbed, tmp_path):
    """Makes a workspace as it is before a step, and the step's command line."""

    def make(script: str) -> tuple[Workspace, list[tuple[str, list[object]]]]:
        whole = undisturbed("pythia", 1)
        workspace = Workspace(whole.model, whole.data, tmp_path / "output")
        shutil.copytree(whole.output, workspace.output, dirs_exist_ok=True)
        for pattern in MADE_BY[script]:
            for path in workspace.output.glob(pattern):
                shutil.rmtree(path)
        return workspace, [call for call in six_steps(workspace) if call[0] == script]

    return make


def assert_goes_on(workspace: Workspace, calls: list[tuple[str, list[object]]], count: int, log: Path, whole) -> None:
    """The same command again, with any number of processes, ends with the artifacts of an undisturbed run."""
    ends = Launch(log, count, calls).ended()
    assert [end.code for end in ends] == [0] * count, ends[0].err
    assert_same(contents(workspace.output), contents(whole.output), "")
    assert not list(workspace.output.rglob("*.partial*"))


@pytest.mark.parametrize(("script", "description"), [(s, d) for s, of_step in PASSES.items() for d in of_step])
def test_an_error_in_one_process_ends_all(script, description, before, undisturbed, tmp_path):
    workspace, calls = before(script)
    for rank in (1, 0):
        ends = Launch(tmp_path / "log", 2, calls, partial(fail_in_pass, description, rank)).ended(30)
        assert [end.code for end in ends] == [1, 1], [end.err for end in ends]
        (line,) = printed_lines(ends)
        assert line.startswith(f"error: process {rank}: RuntimeError: on purpose; this is a bug"), line
    assert_goes_on(workspace, calls, 1, tmp_path / "log", undisturbed("pythia", 1))


@pytest.fixture(scope="module")
def seconds_of():
    """How long two processes take for a step from joining to the end, by script."""
    return {}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("script", MADE_BY)
def test_a_killed_process_ends_all(script, rank, before, seconds_of, undisturbed, tmp_path):
    """KILLS in the environment is how many times each is killed."""
    log, whole = tmp_path / "log", undisturbed("pythia", 1)
    if script not in seconds_of:
        workspace, calls = before(script)
        launch = Launch(log, 2, calls)
        joined = launch.joined()
        launch.ended()
        seconds_of[script] = time.monotonic() - joined
        shutil.rmtree(workspace.output)
    moments = random.Random(f"{script} {rank}")
    for number in range(int(os.environ.get("KILLS", "1"))):
        workspace, calls = before(script)
        launch = Launch(log, 2, calls)
        time.sleep(max(0.0, launch.joined() + moments.uniform(0, seconds_of[script]) - time.monotonic()))
        launch.kill(rank)
        killed = time.monotonic()
        ends = launch.ended(60)
        assert time.monotonic() - killed < 30
        if ends[rank].code == -signal.SIGKILL and "added up" not in ends[0].out:  # the work was not done
            assert ends[1 - rank].code == 1, ends
            (line,) = printed_lines(ends)
            assert line.startswith(f"error: process {rank} "), line
        assert_goes_on(workspace, calls, 1 + number % 3, log, whole)
        shutil.rmtree(workspace.output)
