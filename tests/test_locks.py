"""Runs at the same time: equal ones end as one alone, and no manifest names the settings of another run."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from conftest import DEMO, Workspace, contents, load_script
from killing import was_killed_at
from process_pool import Ended, Launch
from test_resume import ARGUMENTS, DPP, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, results

from utils import locks
from utils.files import read_json
from utils.folder_artifacts import FolderArtifact
from utils.locks import locked
from utils.paths import PAPER_TABLES

TRIES = int(os.environ.get("TRIES", "1"))  # of each pair of runs
MOMENTS = (0, 0.1, 0.2)  # seconds between the starts of two runs


def fork(work) -> int:
    """Run in a forked process; gives its number."""
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def hold_and_say_so(path: Path, seconds: float) -> None:
    with locked(path):
        path.with_name("held").touch()
        time.sleep(seconds)
        path.with_name("released").touch()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def held_by_another(path: Path, seconds: float) -> int:
    """Let a forked process hold a lock; gives its number once it does."""
    pid = fork(partial(hold_and_say_so, path, seconds))
    wait_for(path.with_name("held"))
    return pid


def assert_the_second_waits(path: Path, capsys) -> None:
    pid = held_by_another(path, 0.5)
    with locked(path):
        assert path.with_name("released").exists()
    assert os.waitpid(pid, 0)[1] == 0
    assert "waiting for another run, which works on" in capsys.readouterr().out
    assert not list(path.parent.glob(".*"))


def assert_the_lock_of_a_killed_run_is_free(path: Path) -> None:
    path.with_name("held").unlink(missing_ok=True)
    pid = held_by_another(path, 60)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert path.with_name(".x.json.lock").exists()
    with locked(path):
        pass
    assert not list(path.parent.glob(".*"))


def test_the_second_waits_says_so_and_leaves_nothing(tmp_path, capsys):
    assert_the_second_waits(tmp_path / "x.json", capsys)


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    assert_the_lock_of_a_killed_run_is_free(tmp_path / "x.json")


def test_what_lies_in_a_locked_folder_is_not_locked_again(tmp_path):
    with locked(tmp_path / "folder"), locked(tmp_path / "folder", tmp_path / "folder" / "file"):
        assert list(locks._held) == [tmp_path / "folder"]
    assert not locks._held


def test_a_link_where_a_lock_goes_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".x.json.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"), locked(tmp_path / "x.json"):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_file_locks(tmp_path, monkeypatch, capsys, recwarn, number):
    """A marker takes the lock's place; that of a process that has died is taken over."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(locks, "_has_flock_on", {})
    assert_the_second_waits(tmp_path / "x.json", capsys)
    assert_the_lock_of_a_killed_run_is_free(tmp_path / "x.json")
    assert not recwarn.list


def count_up(file: Path, times: int) -> None:
    for _ in range(times):
        with locked(file):
            number = int(file.read_text())
            file.write_text(str(number + 1))


def test_four_processes_count_together_though_some_are_killed(tmp_path):
    file = tmp_path / "count"
    file.write_text("0")
    pids = [fork(partial(count_up, file, 200)) for _ in range(4)]
    for operation in (3, 4, 5):  # while the lock is held, or let go of
        was_killed_at(operation, partial(count_up, tmp_path / "count", 0) if operation else None)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert file.read_text() == "800"


# ------------------------------------------------------------------------------------------------------- whole steps


@pytest.fixture(scope="module")
def undisturbed(make_workspace, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """The output folders before and after each step."""
    workspace, root = make_workspace("pythia"), tmp_path_factory.mktemp("undisturbed")
    workspace.output.mkdir(exist_ok=True)
    folders = {}
    for script in (STEP_1, STEP_2, STEP_3, STEP_4, STEP_5):
        before, after = root / Path(script).stem / "before", root / Path(script).stem / "after"
        shutil.copytree(workspace.output, before)
        workspace.run(script, *ARGUMENTS[script])
        shutil.copytree(workspace.output, after)
        folders[script] = (before, after)
    return folders


def at_once(folder: Path, moment: float, *runs: tuple[Workspace, str, list]) -> list[Ended]:
    """Start the runs one after another, some moment apart."""
    launches = []
    for number, (workspace, script, words) in enumerate(runs):
        launches.append(Launch(folder / str(number), 1, [(script, [*workspace.arguments(script), *words])]))
        time.sleep(moment)
    return [launch.ended()[0] for launch in launches]


def assert_tidy(folder: Path) -> None:
    assert not [
        path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix in (".partial", ".replaced")
    ]


@pytest.mark.parametrize("script", [STEP_1, STEP_2, STEP_3, STEP_4, STEP_5])
@pytest.mark.parametrize("number", range(TRIES))
def test_two_equal_runs_end_as_one(undisturbed, make_workspace, tmp_path, script, number):
    before, after = undisturbed[script]
    workspace = make_workspace("pythia")
    shutil.copytree(before, workspace.output, dirs_exist_ok=True)
    ends = at_once(tmp_path, MOMENTS[number % 3], *[(workspace, script, ARGUMENTS[script])] * 2)
    assert [end.code for end in ends] == [0, 0], [end.err for end in ends]
    assert results(workspace.output) == results(after)
    assert_tidy(workspace.output)


OTHERS = {  # other settings of the same artifact
    STEP_1: ["--NUM_FACTOR_EXAMPLES", 20],
    STEP_2: ["--MAX_LENGTH", 50],
    STEP_3: ["--BOTTOM_K", 5, "--GAMMA", 0.5],
    STEP_4: [*DPP, "--GRADIENT_REDUCTION_TYPE", "sum"],
}


@pytest.mark.parametrize("script", OTHERS)
@pytest.mark.parametrize("number", range(TRIES))
def test_of_two_runs_with_different_settings_one_is_refused_and_no_manifest_lies(
    undisturbed, make_workspace, tmp_path, script, number
):
    """The one that comes second is refused; whichever it was, what is there is the whole work of the other."""
    before, after = undisturbed[script]
    workspace = make_workspace("pythia")
    shutil.copytree(before, workspace.output, dirs_exist_ok=True)
    runs = [(workspace, script, ARGUMENTS[script]), (workspace, script, OTHERS[script])]
    ends = at_once(tmp_path, MOMENTS[number % 3], *(runs if number % 2 else reversed(runs)))
    ends = ends if number % 2 else list(reversed(ends))
    assert sorted(end.code for end in ends) == [0, 1], [end.err for end in ends]
    (refused,) = (end for end in ends if end.code)
    assert "was made with other settings" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
    if ends[0].code == 0:
        assert results(workspace.output) == results(after)
    else:
        alone = make_workspace("pythia")
        shutil.copytree(before, alone.output, dirs_exist_ok=True)
        alone.run(script, *OTHERS[script])
        assert results(workspace.output) == results(alone.output)
    assert_tidy(workspace.output)


def test_a_grid_by_four_processes_is_the_grid_by_one(make_workspace, tmp_path):
    grid = [
        ["--TASKS", task, "--SCORES_TYPES", *methods, "--PRESERVE_PERPLEXITY", "False", "--BOTTOM_K", 5]
        + [
            "--IF_WEIGHT",
            10,
            "--SEEDS",
            42,
            "--NUM_COMPLETIONS",
            1,
            "--LEARNING_RATE",
            0.02,
            "--SWEPT_RATES",
            0.01,
            0.03,
        ]
        for task, methods in (("bias", ["pure_ekfac", "random"]), ("truth", ["pure_ekfac", "random"]))
        for methods in ([methods[0]], [methods[1]])
    ]
    together, alone = make_workspace("pythia"), make_workspace("pythia")
    ends = at_once(tmp_path, 0, *((together, PAPER_TABLES, words) for words in grid))
    assert [end.code for end in ends] == [0] * 4, [end.err for end in ends]
    for words in grid:
        alone.run(PAPER_TABLES, *words)
        together.run(PAPER_TABLES, *words)  # the last one's tables and report, whichever came last before
    assert_tidy(together.output)
    theirs, ours = contents(together.output), contents(alone.output)
    assert theirs.keys() == ours.keys()
    timeless = [name for name in ours if name.endswith((".safetensors", "_test.json", "_sweep.json", "_sweep.csv"))]
    assert len(timeless) > 20
    assert [name for name in timeless if theirs[name][0] != ours[name][0]] == []


# ----------------------------------------------------------- another run with OVERWRITE, while this one is under way


def meanwhile(monkeypatch, script: str, function: str, other_run) -> None:
    """Let another run come in between, before the first call of one of the script's functions."""
    module, has_run = load_script(script), []
    original = getattr(module, function)

    def call(*arguments: object, **keywords: object) -> object:
        if not has_run:
            has_run.append(True)
            other_run()
        return original(*arguments, **keywords)

    monkeypatch.setattr(module, function, call)


BIAS = ["--TASK_NAME", "bias"]


def test_a_gradient_that_is_replaced_under_way_is_not_taken_for_the_one_it_was(workspace, monkeypatch, capsys):
    workspace.run(STEP_1, *BIAS)
    step_4 = [STEP_4, *BIAS, "--BOTTOM_K", 5]
    workspace.run(*step_4)
    replace = partial(workspace.run, *step_4, "--GRADIENT_REDUCTION_TYPE", "sum", "--OVERWRITE", True)
    meanwhile(monkeypatch, STEP_5, "open_model", replace)
    with pytest.raises(SystemExit):
        workspace.run(STEP_5, *BIAS, "--BOTTOM_K", 5, "--LEARNING_RATE", 0.02)
    assert "was replaced by another run meanwhile" in capsys.readouterr().err
    assert not list((workspace.output / "gradient_ascent_models").glob("*"))


def test_factors_that_are_replaced_under_way_are_not_used(workspace, monkeypatch, capsys):
    workspace.run(STEP_1, *BIAS)
    others = ["--TASK_NAME", "truth", "--NUM_FACTOR_EXAMPLES", 20, "--OVERWRITE", True]
    meanwhile(monkeypatch, STEP_1, "load_traced_model", partial(workspace.run, STEP_1, *others))
    with pytest.raises(SystemExit):
        workspace.run(STEP_1, "--TASK_NAME", "ethics")
    assert "NUM_FACTOR_EXAMPLES = 20, but this step has NUM_FACTOR_EXAMPLES = 10000" in capsys.readouterr().err
    assert not list(workspace.output.rglob("ethics_*/*.safetensors"))


def test_indices_name_the_representations_that_they_were_picked_by(workspace, monkeypatch):
    """The kernel of all tasks comes from one look at the representations."""
    workspace.run(STEP_1)
    workspace.run(STEP_2)
    manifest = next(workspace.output.rglob("*_sumreps.manifest.json"))
    before = read_json(manifest)["fingerprint"]
    replace = partial(workspace.run, STEP_2, "--MAX_LENGTH", 30, "--OVERWRITE", True)
    meanwhile(monkeypatch, STEP_3, "greedy_dpp", replace)
    workspace.run(STEP_3, "--BOTTOM_K", 5)
    assert read_json(manifest)["fingerprint"] != before
    named = [
        read_json(file)["inputs"]["representations"] for file in (workspace.output / "dpp").glob("*.manifest.json")
    ]
    assert named == [before] * 3


def test_two_equal_runs_of_prepare_end_as_one(tmp_path):
    source = DEMO / "truthfulness" / "TruthfulQA.csv"
    words = ["--DATA_DIR", tmp_path / "data", "--ONLY", "truth", "--TRUTH_SOURCE", source, "--CHECK_COUNTS", "False"]
    for number in range(3):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        launches = [Launch(tmp_path / str(run), 1, [("data/prepare.py", words)]) for run in range(2)]
        assert [launch.ended()[0].code for launch in launches] == [0, 0], number
        assert_tidy(tmp_path / "data")
        prepared = (tmp_path / "data" / "truthfulness" / "TruthfulQA.csv").read_text(encoding="utf-8")
        assert prepared == source.read_text(encoding="utf-8-sig")


def test_asking_whether_it_is_finished_leaves_the_folder_in_which_another_run_replaces_it(tmp_path):
    artifact = FolderArtifact(tmp_path / "factors", STEP_1)
    with artifact.staging_folder() as folder:
        (folder / "factor").write_text("old")
        artifact.publish_folder(time.monotonic(), {})

    def replace() -> None:
        with artifact.staging_folder() as folder:
            (folder / "factor").write_text("new")
            hold_and_say_so(artifact.path, 0.5)
            artifact.publish_folder(time.monotonic(), {})

    pid = fork(replace)
    wait_for(tmp_path / "held")
    assert artifact.is_finished()
    assert os.waitpid(pid, 0)[1] == 0
    assert (artifact.path / "factor").read_text() == "new"
