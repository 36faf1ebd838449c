"""One side of one comparison, in its own process.

    python benchmarks/measure.py ours step2_representations runs/bench 3

Prints one JSON line: the seconds of every repetition (after a warm-up, if there are several) and their median, the
peak memory of the process, and the greedy's picks. "prepare" in place of a step makes the inputs of steps 4 and 5.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

import steps
from benchmarks import released
from benchmarks.timing import timed
from benchmarks.workload import Workload
from dpp.greedy_dpp import FourierKernel, RBFKernel, greedy_dpp, median_heuristic_gamma
from utils import paths, processes
from utils.paths import STEP_1, STEP_2, STEP_4, STEP_5, STEP_6
from utils.repairs import RepairChoice

BOTTOM_K = 100
LEARNING_RATES = [0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014]
NUM_FEATURES, IF_WEIGHT, SEED = 2_048, 10.0, 42
SUBSET = {"TASK_NAME": "combined", "SCORES_TYPE": "random", "BOTTOM_K": BOTTOM_K}  # of steps 4 and 5
REPAIR = RepairChoice("random", BOTTOM_K, IF_WEIGHT).name
ADDED_UP_BYTES = 1 << 29
PREPARED = "run"  # folder of the workload with the outputs of steps 1 and 4


def run_script(name: str, work: Workload, output: Path, **constants: Any) -> None:  # noqa: ANN401
    """Run a step as a user would, but in this process."""
    common = {
        "MODEL_NAME": work.model,
        "HH_DATASET": work.hh_dataset,
        "DATA_DIR": work.data_dir,
        "OUTPUT_DIR": str(output),
    }
    steps.run_script(name, common, **constants)


def prepare(work: Workload) -> None:
    """Make the inputs of steps 4 and 5: factors, scores, and one repair gradient."""
    output = work.folder / PREPARED
    shutil.rmtree(output, ignore_errors=True)  # the workload may have changed since
    run_script(STEP_1, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples)
    run_script(STEP_4, work, output, **SUBSET)


def _link_prepared(work: Workload, output: Path) -> None:
    shutil.copytree(work.folder / PREPARED, output, copy_function=lambda source, to: Path(to).hardlink_to(source))


def step_1(side: str, work: Workload, output: Path) -> None:
    """Factors, and scores for three tasks."""
    if side == "ours":
        run_script(STEP_1, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples)
    else:
        released.step_1(work.model, work.hh_dataset, work.data_dir, output, work.num_factor_examples)


def step_1_one_task(_: str, work: Workload, output: Path) -> None:
    """Ours only, to compare with bergson_side.py: one task, factors on all training dialogues."""
    run_script(STEP_1, work, output, TASK_NAME="truth")


def step_2(side: str, work: Workload, output: Path) -> None:
    """Representations of the training dialogues."""
    if side == "ours":
        run_script(STEP_2, work, output)
    else:
        released.step_2(work.model, work.hh_dataset)


def step_3(side: str, work: Workload, _: Path, is_exact: bool = False) -> list[int]:
    """The greedy's picks, on random Fourier features or (ours only) on the exact kernel."""
    inputs = load_file(work.folder / "greedy.safetensors")
    representations, quality = inputs["representations"], inputs["quality"]
    gamma = median_heuristic_gamma(representations, SEED)
    if is_exact:
        return greedy_dpp(RBFKernel(representations, gamma), quality, BOTTOM_K, IF_WEIGHT).indices
    kernel = FourierKernel(representations, gamma, NUM_FEATURES, SEED)
    if side == "ours":
        return greedy_dpp(kernel, quality, BOTTOM_K, IF_WEIGHT).indices
    return released.step_3(kernel.cosines.mul_(math.sqrt(kernel.scale)), quality, BOTTOM_K, IF_WEIGHT)


def step_4(side: str, work: Workload, output: Path) -> None:
    """The repair gradient of a subset of BOTTOM_K dialogues."""
    if side == "ours":
        _link_prepared(work, output)
        shutil.rmtree(paths.gradients_file(output, "combined", "model", REPAIR, SEED).parent)
        run_script(STEP_4, work, output, **SUBSET)
    else:
        factors = paths.factors_dir(work.folder / PREPARED, "model", "ekfac", False, SEED)
        released.step_4(work.model, work.hh_dataset, list(range(BOTTOM_K)), factors)


def step_5(side: str, work: Workload, output: Path) -> None:
    """Eight learning rates on the four test sets; ours also measures the model before the repair."""
    if side == "ours":
        _link_prepared(work, output)
        run_script(STEP_5, work, output, LEARNING_RATE=LEARNING_RATES, SAVE_TO_DISK=False, **SUBSET)
    else:
        file = paths.gradients_file(work.folder / PREPARED, "combined", "model", REPAIR, SEED)
        released.step_5(work.model, work.hh_dataset, work.data_dir, load_file(file), LEARNING_RATES)


def step_6(side: str, work: Workload, output: Path) -> None:
    """The four measurements of one model."""
    if side == "ours":
        for script in STEP_6.values():
            run_script(script, work, output)
    else:
        released.step_6(work.model, work.hh_dataset, work.data_dir)


def add_up(*_: object) -> None:
    """All-reduce of as many float64 numbers as a large block's covariances have in one matrix."""
    processes.all_reduce(torch.ones(ADDED_UP_BYTES // 8, dtype=torch.float64))


STEPS: dict[str, Callable[[str, Workload, Path], Any]] = {
    "step1_three_tasks": step_1,
    "step1_one_task": step_1_one_task,
    "step2_representations": step_2,
    "step3_dpp_rff": step_3,
    "step3_dpp_rbf": partial(step_3, is_exact=True),
    "step4_gradients": step_4,
    "step5_sweep": step_5,
    "step6_evaluation": step_6,
    "all_reduce": add_up,
}


if __name__ == "__main__":
    side, step, folder, repetitions = sys.argv[1:]
    work = Workload(Path(folder))
    if step == "prepare":
        with contextlib.redirect_stdout(sys.stderr):
            prepare(work)
        print("{}")
    else:
        output = work.folder / f"output_{side}_{step}"
        with processes.joined():
            result = timed(lambda: STEPS[step](side, work, output), output, int(repetitions))
            reduced, _ = processes.traffic()
            if processes.is_first():
                print(json.dumps({**result, "processes": processes.count(), "bytes_reduced": reduced}))
