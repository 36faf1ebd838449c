"""kill -9 at random file operations and at random moments: the same command, run again, ends as if nothing had been.

KILLS=100 pytest tests/test_kills.py
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import DEMO, Workspace
from killing import count_into, kill_at
from process_pool import Call, Launch
from test_resume import ARGUMENTS, EVALUATIONS, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, results

from utils.paths import PAPER_TABLES, STEP_0

KILLS = int(os.environ.get("KILLS", "10"))
GRID = ["--TASKS", "truth", "--SCORES_TYPES", "dpp", "--PRESERVE_PERPLEXITY", "False", "--BOTTOM_K", 5, "--SEEDS", 42]
GRID += ["--IF_WEIGHT", 10, "--NUM_COMPLETIONS", 1, "--LEARNING_RATE", 0.02, "--SWEPT_RATES", 0.01, 0.02]


@dataclass
class Undisturbed:
    """A script's run that nothing disturbed: its command line, the output before and after it, how long it took."""

    call: Call
    before: Path
    after: Path
    operations: int
    seconds: float


def sft_call(workspace: Workspace) -> Call:
    words = ["--BASE_MODEL", "pythia-demo", "--TOKENIZER", DEMO / "tokenizer", "--HH_DATASET", workspace.data / "hh"]
    words += ["--SFT_MODEL_DIR", workspace.output / "models" / "sft", "--NUM_EPOCHS", 2, "--BATCH_SIZE", 20]
    return STEP_0, [*words, "--BATCH_SIZE_PER_DEVICE", 20, "--SAVE_EVERY", 2]


@pytest.fixture(scope="module")
def runs(make_workspace, tmp_path_factory) -> dict[str, Undisturbed]:
    """Steps 0 to 6 and the tables, each on what those before it left."""
    workspace, root = make_workspace("pythia"), tmp_path_factory.mktemp("undisturbed")
    workspace.output.mkdir(exist_ok=True)
    scripts = [STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, EVALUATIONS[3]]
    calls = [(script, [*workspace.arguments(script), *ARGUMENTS[script]]) for script in scripts]
    calls += [(PAPER_TABLES, [*workspace.arguments(PAPER_TABLES), *GRID]), sft_call(workspace)]
    found = {}
    for script, words in calls:
        before, after, counted = (root / Path(script).stem / name for name in ("before", "after", "counted"))
        if script == PAPER_TABLES:  # its steps are killed by themselves: here what it draws and writes
            assert Launch(root / "steps", 1, [(script, words)]).ended()[0].code == 0
            shutil.rmtree(workspace.output / "results" / "tables")
            for file in (workspace.output / "results").glob("*"):
                if file.suffix in (".html", ".png", ".csv") or "sweep" in file.name:
                    file.unlink()
        shutil.copytree(workspace.output, before)
        (end,) = Launch(root / "run", 1, [(script, words)], partial(count_into, counted)).ended()
        assert end.code == 0, end.err
        shutil.copytree(workspace.output, after)
        found[script] = Undisturbed((script, words), before, after, int(counted.read_text()), end.seconds)
    found["output"] = workspace.output
    return found


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_anywhere_and_run_again(runs, tmp_path, number):
    chance = random.Random(number)
    output = runs["output"]
    script = chance.choice([name for name in runs if name != "output"])
    run = runs[script]
    shutil.rmtree(output)
    shutil.copytree(run.before, output)
    operation = chance.randint(1, run.operations) if number % 2 else None
    launch = Launch(tmp_path / "killed", 1, [run.call], partial(kill_at, operation) if operation else None)
    if operation is None:
        time.sleep(chance.uniform(0, run.seconds))
        launch.kill(0)
    (end,) = launch.ended()
    assert end.code in (0, -signal.SIGKILL), end.err
    (again,) = Launch(tmp_path / "again", 1, [run.call]).ended()
    assert again.code == 0, again.err
    assert "error" not in again.err
    assert_same(output, run.after, is_trained=script == STEP_0)


def assert_same(output: Path, expected: Path, is_trained: bool) -> None:
    """Every file and folder; a fine-tuning that was taken up ends in nearly the same weights alone."""
    found, wanted = results(output), results(expected)
    names = [sorted(str(path.relative_to(root)) for path in root.rglob("*")) for root in (output, expected)]
    assert names[0] == names[1]
    differ = [name for name in found if found[name] != wanted[name]]
    if is_trained:
        after = [manifests["models/sft/manifest.json"]["perplexity"]["after"] for manifests in (found, wanted)]
        assert after[0] == pytest.approx(after[1], rel=0.05)
        differ = [name for name in differ if not name.startswith("models/sft/")]
    assert differ == []
