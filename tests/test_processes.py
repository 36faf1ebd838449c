"""Several processes: the same numbers as one, and one readable end whatever happens to one of them."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import DEMO, Workspace, read_rows, run_script, write_rows
from process_pool import Ended, Launch
from safetensors.torch import load_file

from steps import load_script
from utils import batching, completions, learning_rate_search, processes
from utils.console import UserError, progress_bar
from utils.devices import resolve_device
from utils.influence import factors
from utils.paths import PAPER_TABLES, PROJECT_ROOT, STEP_0, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, STEP_6

TOLERANCE = 1e-5  # relative
TELL_OF_THREADS = """import atexit, pathlib
names = lambda: sorted(file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm"))
atexit.register(lambda: print("threads at the end:", names()))
"""


def six_steps(workspace: Workspace, blocks: int = 1, strategy: str = "ekfac") -> list[tuple[str, list[object]]]:
    """The workflow with a search for the learning rate, token scores, completions and the preserving direction."""
    subset, factors_of = ["--BOTTOM_K", 5], ["--FACTOR_STRATEGY", strategy]
    repair = [*subset, "--SCORES_TYPE", "dpp", "--TASK_NAME", "truth", "--PRESERVE_PERPLEXITY", True]
    summed = ["--TASK_NAME", "combined", "--GRADIENT_REDUCTION_TYPE", "sum"]
    fitted = ["--SCORES_TYPE", "fitted", "--TASK_NAME", "ethics"]
    trained = ["--SCORES_TYPE", "npo", "--TASK_NAME", "ethics"]
    in_steps = ["--SCORES_TYPE", "direct", "--TASK_NAME", "bias"]
    calls = [
        (STEP_1, [*factors_of, "--NUM_BLOCKS", blocks, "--COMPUTE_PER_TOKEN_SCORES", True]),
        (STEP_2, ["--ANSWERS_OF", "truth"]),
        (STEP_3, [*subset, *factors_of]),
        (STEP_4, [*repair, *factors_of]),
        (STEP_4, [*subset, *factors_of, *in_steps]),
        (STEP_4, [*subset, *factors_of, *summed]),
        (STEP_4, [*factors_of, *fitted, "--PRESERVE_TASKS", True, "--FIT_ITERATIONS", 2]),
        (STEP_4, [*subset, *factors_of, *trained, "--BASELINE_STEPS", 3, "--NUM_RETAIN_EXAMPLES", 9]),
        (STEP_5, [*in_steps, "--NUM_STEPS", 2, "--LEARNING_RATE", 0.02, "--SAVE_TO_DISK", False]),
        (STEP_5, [*repair, "--LEARNING_RATE", "auto", "--PPL_BUDGET", 0.05, "--NUM_COMPLETIONS", 2]),
        *((script, []) for script in STEP_6.values()),
    ]
    return [(script, [*workspace.arguments(script), *arguments]) for script, arguments in calls]


def quick_search(_: int) -> None:
    """Searches for a learning rate end after a few trials, completions after a few tokens."""
    learning_rate_search.PRECISION, completions.MAX_NEW_TOKENS = 0.2, 4


def contents(folder) -> dict[str, object]:
    """Every artifact below a folder by its path: tensors, or the numbers of a JSON file."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".safetensors":
            found |= {f"{name}/{key}": tensor for key, tensor in load_file(file).items()}
        elif file.suffix == ".json":
            found[name] = json.loads(file.read_text(encoding="utf-8"))
            if "manifest" in file.name:
                found[name] = {
                    key: found[name].get(key) for key in ("settings", "shapes", "alphas", "indices", "examples")
                }
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
    """Workspaces with the artifacts of one process, made on first use."""
    made = {}

    def get(family: str, blocks: int = 1, strategy: str = "ekfac") -> Workspace:
        if (family, blocks) not in made:
            workspace = made[family, blocks] = make_workspace(family)
            calls = six_steps(workspace, blocks, strategy)
            (ended,) = Launch(tmp_path_factory.mktemp("log"), 1, calls, quick_search).ended()
            assert ended.code == 0, ended.err
        return made[family, blocks]

    return get


# EVERY_COUNT in the environment runs both numbers of processes on each.
CASES = {("pythia", 1, "ekfac"): 2, ("qwen", 2, "kfac"): 2, ("pythia", 2, "diagonal"): 3, ("qwen", 1, "ekfac"): 3}
COUNTED = [(*case, n) for case, count in CASES.items() for n in ((2, 3) if "EVERY_COUNT" in os.environ else (count,))]


@pytest.mark.parametrize(("family", "blocks", "strategy", "count"), COUNTED)
def test_several_processes_give_what_one_gives(family, blocks, strategy, count, undisturbed, make_workspace, tmp_path):
    workspace = make_workspace(family)
    ends = Launch(tmp_path, count, six_steps(workspace, blocks, strategy), quick_search).ended()
    assert [end.code for end in ends] == [0] * count, ends[0].err
    assert_same(contents(workspace.output), contents(undisturbed(family, blocks, strategy).output), "")


def test_artifacts_of_one_number_of_processes_are_finished_for_another(undisturbed, tmp_path):
    workspace = undisturbed("pythia", 1)
    before = {path: path.stat().st_mtime_ns for path in workspace.output.rglob("*") if path.is_file()}
    for count in (2, 3):
        ends = Launch(tmp_path, count, six_steps(workspace), quick_search).ended()
        assert [end.code for end in ends] == [0] * count, ends[0].err
        assert ends[0].out.count("finished before") >= 10
        assert not any(end.out for end in ends[1:])
    assert {path: path.stat().st_mtime_ns for path in workspace.output.rglob("*") if path.is_file()} == before


def test_processes_without_a_row(tiny_models, data_copy, tmp_path):
    """One dialogue and three processes."""
    for split in ("train", "test"):
        file = data_copy / "hh" / f"{split}.jsonl"
        file.write_text(file.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    common = ["--BOTTOM_K", 1, "--TASK_NAME", "ethics"]
    folders = []
    for count in (1, 3):
        workspace = Workspace(tiny_models["pythia"], data_copy, tmp_path / f"output{count}")
        steps = [
            (STEP_1, ["--TASK_NAME", "ethics"]),
            (STEP_2, []),
            (STEP_3, [*common, "--GAMMA", 1]),
            (STEP_4, [*common, "--SCORES_TYPE", "dpp"]),
            (STEP_5, [*common, "--SCORES_TYPE", "dpp", "--LEARNING_RATE", 0.01, 0.02]),
        ]
        calls = [(script, [*workspace.arguments(script), *arguments]) for script, arguments in steps]
        ends = Launch(tmp_path / "log", count, calls).ended()
        assert [end.code for end in ends] == [0] * count, ends[0].err
        folders.append(workspace.output)
    assert_same(*(contents(folder) for folder in reversed(folders)), "")


def test_the_tables_of_two_processes_are_those_of_one(tiny_models, small_data, tmp_path):
    grid = ["--SEEDS", 42, "--TASKS", "truth", "--SCORES_TYPES", "dpp", "--BOTTOM_K", 5, "--IF_WEIGHT", 10]
    grid += ["--PRESERVE_PERPLEXITY", False, "--LEARNING_RATE", 0.05, "--SWEPT_RATES", 0.02, 0.05]
    texts = []
    for count in (1, 2):
        workspace = Workspace(tiny_models["pythia"], small_data, tmp_path / f"output{count}")
        calls = [(PAPER_TABLES, [*workspace.arguments(PAPER_TABLES), *grid, "--NUM_COMPLETIONS", 1])]
        ends = Launch(tmp_path / "log", count, calls).ended()
        assert [end.code for end in ends] == [0] * count, ends[0].err
        results = workspace.output / "results"
        assert (results / "report.html").stat().st_size > 10_000
        assert list(results.glob("*.png"))
        texts.append((results / "tables" / "main.md").read_text(encoding="utf-8"))
        texts[-1] = re.sub(r"[\d.]+ s\b|\| +[\d.]+ +\|$", "", texts[-1], flags=re.MULTILINE)  # seconds
    assert texts[0] == texts[1]


def test_the_share_of_each_process(monkeypatch):
    costs = [random.Random(number).uniform(1, 5) for number in range(50)]
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "_world", processes._World(rank=rank, size=3))
        shares.append(processes.share(costs))
    assert sorted(piece for share in shares for piece in share) == list(range(50))
    loads = [sum(costs[piece] for piece in share) for share in shares]
    assert max(loads) <= 1.05 * min(loads)
    assert all(share == sorted(share) for share in shares), "the longest texts come first"


def test_a_pass_of_a_share_has_a_whole_bar(monkeypatch):
    monkeypatch.setattr(processes, "_world", processes._World(rank=0, size=2))
    bars = []
    monkeypatch.setattr(processes, "progress_bar", lambda *words: bars.append(progress_bar(*words)) or bars[-1])
    monkeypatch.setenv("CI", "")
    list(processes.iterate_share("abcde", [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], "a pass", "texts"))
    assert (bars[0].n, bars[0].total) == (15, 15)


# -- the launcher's environment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"WORLD_SIZE": "x"}, "error: WORLD_SIZE = 'x' in the environment: must be a whole number"),
        ({"WORLD_SIZE": "2"}, "error: RANK = '' in the environment: must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "error: RANK = 2 in the environment: must be below WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "error: WORLD_SIZE = 2 in the environment, but MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_an_environment_that_makes_no_sense(environment, line, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        run_script(STEP_1)
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(line)


def test_processes_that_never_come(monkeypatch, capsys):
    monkeypatch.setattr(processes, "START_TIMEOUT", timedelta(seconds=1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit):
        run_script(STEP_1)
    assert capsys.readouterr().err.startswith(f"error: process 0 of 2 could not join the others at 127.0.0.1:{port}")


@pytest.mark.parametrize(("device", "gpus"), [("cuda:1", 8), ("cuda", 2), ("auto", 2)])
def test_every_process_has_a_gpu_of_its_own(device, gpus, monkeypatch):
    monkeypatch.setattr(processes, "_world", processes._World(rank=3, size=4, local_rank=3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match="several processes take a GPU each|needs a GPU of its own, and there are 2"):
        resolve_device(device)


@pytest.mark.parametrize("launcher", ["torch.distributed.run --standalone --nproc_per_node", "accelerate"])
def test_launchers_start_the_processes(launcher, tiny_models, tmp_path, monkeypatch):
    """torchrun and step 2; `accelerate launch` and the fine-tuning.

    No thread of gloo is left when the interpreter ends: one that still let go of a tensor would abort the process.
    """
    (tmp_path / "sitecustomize.py").write_text(TELL_OF_THREADS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if launcher == "accelerate":
        launcher = "accelerate.commands.launch --multi_gpu --num_processes"
        script, hint = STEP_0, "next: torchrun --nproc_per_node 2 compute_factors_and_scores.py"
        arguments = ["--BASE_MODEL", tiny_models["qwen"], "--SFT_MODEL_DIR", tmp_path / "sft", "--NUM_EPOCHS", 1]
        for split, count in (("train", 20), ("test", 4)):
            write_rows(tmp_path / "hh" / f"{split}.jsonl", read_rows(DEMO / "hh" / f"{split}.jsonl")[:count])
        arguments += ["--HH_DATASET", tmp_path / "hh"]
    else:
        script, hint = STEP_2, "next: torchrun --nproc_per_node 2 dpp/greedy_dpp.py"
        arguments = ["--MODEL_NAME", tiny_models["qwen"], "--OUTPUT_DIR", tmp_path]
    command = [sys.executable, "-m", *launcher.split(), "2", str(PROJECT_ROOT / script), *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(hint) == 1
    assert finished.stdout.count("threads at the end: ") >= 2
    assert "gloo" not in finished.stdout


def test_a_mistake_is_printed_once(tiny_models, tmp_path):
    arguments = ["--MODEL_NAME", tiny_models["qwen"], "--OUTPUT_DIR", tmp_path]
    for words, line in (
        ([*arguments, "--HH_DATASET", "/no/such"], "error: HH_DATASET = '/no/such', split train: no such folder"),
        (["--NO_SUCH", 1], "error: unknown constant --NO_SUCH"),
        ([*arguments, "--DEVICE", "spread"], "error: DEVICE = 'spread': is for one process, and there are 3"),
    ):
        ends = Launch(tmp_path / "log", 3, [(STEP_2, words)]).ended(30)
        assert [end.code for end in ends] == [1, 1, 1]
        (printed,) = printed_lines(ends)
        assert printed.startswith(line)


# -- failures ----------------------------------------------------------------------------------------------------------


def fail_in_pass(description: str, failing_rank: int, rank: int) -> None:
    """Makes one process raise an error in a pass: after its first batch, if it has one."""
    quick_search(rank)
    processes.ECHO_SECONDS = 0.2
    iterate = processes.iterate_share

    def iterate_and_fail(pieces, costs, sizes, text, unit):
        share = iterate(pieces, costs, sizes, text, unit)
        if text != description or rank != failing_rank:
            yield from share
        else:
            yield from itertools.islice(share, 1)
            raise RuntimeError("on purpose")

    batching.iterate_share = factors.iterate_share = iterate_and_fail


def printed_lines(ends: list[Ended]) -> list[str]:
    """What was printed to stderr but progress bars."""
    return [line for end in ends for line in end.err.splitlines() if line.strip() and "%|" not in line]


PASSES = {  # the step that makes them
    STEP_1: ["covariances", "eigendecompositions", "Lambda", "truth pairs", "training dialogues"],
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
    ends = Launch(log, count, calls, quick_search).ended()
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
        launch = Launch(log, 2, calls, quick_search)
        joined = launch.joined()
        launch.ended()
        seconds_of[script] = time.monotonic() - joined
        shutil.rmtree(workspace.output)
    moments = random.Random(f"{script} {rank}")
    for number in range(int(os.environ.get("KILLS", "1"))):
        workspace, calls = before(script)
        launch = Launch(log, 2, calls, quick_search)
        time.sleep(max(0.0, launch.joined() + moments.uniform(0, seconds_of[script]) - time.monotonic()))
        launch.kill(rank)
        killed = time.monotonic()
        ends = launch.ended(60)
        assert time.monotonic() - killed < 30
        if ends[rank].code == -signal.SIGKILL and "added up" not in ends[0].out:  # the work was not done
            assert ends[1 - rank].code == 1, ends
            (line,) = printed_lines(ends)
            assert line.startswith(f"error: process {rank} "), line
        count = 1 + (number + rank + list(MADE_BY).index(script)) % 3
        assert_goes_on(workspace, calls, count, log, whole)
        shutil.rmtree(workspace.output)


def test_a_full_disk_ends_all_and_is_no_loss(before, undisturbed, make_disk, tmp_path):
    workspace, calls = before(STEP_1)
    disk = make_disk("100k")
    calls = [(STEP_1, [disk if word == str(workspace.output) else word for word in words]) for _, words in calls]
    ends = Launch(tmp_path / "log", 2, calls).ended(30)
    assert [end.code for end in ends] == [1, 1]
    (line,) = printed_lines(ends)
    assert line.startswith("error: the disk is full; free some space and run the same command to continue")
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    ends = Launch(tmp_path / "log", 3, calls).ended()
    assert [end.code for end in ends] == [0, 0, 0], ends[0].err
    whole = contents(undisturbed("pythia", 1).output)
    assert_same(contents(disk), {name: whole[name] for name in whole if re.search("factors_|/scores_", name)}, "")


def be_told_to_stop(error: type[BaseException], rank: int) -> None:
    """Raises an error in the second process, when it is to score the training dialogues."""

    def stop(*_: object) -> None:
        raise error("on purpose")

    if rank == 1:
        load_script(STEP_1).pairs_gradient = stop


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (torch.OutOfMemoryError, "error: out of memory; run the same command to continue", 1),
        (KeyboardInterrupt, "stopped; finished work is kept", 130),
        (UserError, "error: on purpose", 1),
        (MemoryError, "error: out of memory; run the same command to continue", 1),
        (PermissionError, "error: process 1: PermissionError: on purpose; the traceback is in", 1),
    ],
)
def test_how_a_process_ends_all_end(error, line, code, before, tmp_path):
    _, calls = before(STEP_1)
    ends = Launch(tmp_path / "log", 2, calls, partial(be_told_to_stop, error)).ended(30)
    assert [end.code for end in ends] == [code, code]
    (printed,) = printed_lines(ends)
    assert printed.startswith(line)
