"""One side of one comparison, in a process of its own.

    python benchmarks/measure.py ours step2_representations runs/bench 3

Prints one JSON line: the seconds of every repetition (after a warm-up, where there are several), the peak memory of
the process, and what the greedy picked.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

from benchmarks import released
from benchmarks.workload import Workload
from utils import paths, steps
from utils.paths import STEP_1, STEP_2, STEP_4, STEP_5
from utils.selection import FourierKernel, RBFKernel, greedy_dpp, median_heuristic_gamma

BOTTOM_K = 100
LEARNING_RATES = [0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014]
NUM_FEATURES, IF_WEIGHT, SEED = 2_048, 10.0, 42
EVALUATIONS = [f"evaluation_scripts/{name}.py" for name in ("anthropic_eval", "bias_loss", "ethics_loss", "truth_loss")]
SUBSET = {"TASK_NAME": "combined", "SCORES_TYPE": "random", "BOTTOM_K": BOTTOM_K}  # of steps 4 and 5
REPAIR = paths.repair_name("random", BOTTOM_K, IF_WEIGHT)
PREPARED = "run"  # folder of the workload that holds the outputs of steps 1 and 4


def run_script(name: str, work: Workload, output: Path, **constants: Any) -> None:  # noqa: ANN401
    """Run a step as a user does, but in this process."""
    common = {
        "MODEL_NAME": work.model,
        "HH_DATASET": work.hh_dataset,
        "DATA_DIR": work.data_dir,
        "OUTPUT_DIR": str(output),
    }
    steps.run_script(name, common, **constants)


def prepare(work: Workload) -> None:
    """Make what steps 4 and 5 start from: factors, scores, and one repair gradient."""
    output = work.folder / PREPARED
    shutil.rmtree(output, ignore_errors=True)  # the work may have changed since
    run_script(STEP_1, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples)
    run_script(STEP_4, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples, **SUBSET)


def ours_step_1(work: Workload, output: Path) -> None:
    """Factors and scores for three tasks."""
    run_script(STEP_1, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples)


def released_step_1(work: Workload, output: Path) -> None:
    """The same, as released."""
    released.step_1(work.model, work.hh_dataset, work.data_dir, output, work.num_factor_examples)


def ours_step_1_one_task(work: Workload, output: Path) -> None:
    """What bergson_side.py does: one task, factors on all training dialogues."""
    run_script(STEP_1, work, output, TASK_NAME="truth")


def ours_step_2(work: Workload, output: Path) -> None:
    """Representations of the training dialogues."""
    run_script(STEP_2, work, output)


def released_step_2(work: Workload, output: Path) -> None:
    """The same, as released."""
    released.step_2(work.model, work.hh_dataset)


def _greedy_inputs(work: Workload) -> tuple[torch.Tensor, torch.Tensor, float]:
    stored = load_file(work.folder / "greedy.safetensors")
    return stored["representations"], stored["quality"], median_heuristic_gamma(stored["representations"], SEED)


def ours_step_3_rff(work: Workload, output: Path) -> list[int]:
    """Random Fourier features and the greedy on them."""
    representations, quality, gamma = _greedy_inputs(work)
    kernel = FourierKernel(representations, gamma, NUM_FEATURES, SEED)
    return greedy_dpp(kernel, quality, BOTTOM_K, IF_WEIGHT).indices


def ours_step_3_rbf(work: Workload, output: Path) -> list[int]:
    """The greedy on the exact kernel."""
    representations, quality, gamma = _greedy_inputs(work)
    return greedy_dpp(RBFKernel(representations, gamma), quality, BOTTOM_K, IF_WEIGHT).indices


def released_step_3(work: Workload, output: Path) -> list[int]:
    """The same features, by the same code, and the greedy in a heap."""
    representations, quality, gamma = _greedy_inputs(work)
    kernel = FourierKernel(representations, gamma, NUM_FEATURES, SEED)
    return released.step_3(kernel.cosines.mul_(math.sqrt(kernel.scale)), quality, BOTTOM_K, IF_WEIGHT)


def _link_prepared(work: Workload, output: Path) -> None:
    shutil.copytree(work.folder / PREPARED, output, copy_function=lambda source, to: Path(to).hardlink_to(source))


def ours_step_4(work: Workload, output: Path) -> None:
    """The repair gradient of a random subset."""
    _link_prepared(work, output)
    made = paths.gradients_file(output, "combined", "model", REPAIR, SEED)
    shutil.rmtree(made.parent)
    run_script(STEP_4, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples, **SUBSET)


def released_step_4(work: Workload, output: Path) -> None:
    """The same, as released."""
    factors = paths.factors_dir(work.folder / PREPARED, "model", "ekfac", False, SEED)
    released.step_4(work.model, work.hh_dataset, list(range(BOTTOM_K)), factors)


def ours_step_5(work: Workload, output: Path) -> None:
    """Eight learning rates, and the model as it was, measured on the four test sets."""
    _link_prepared(work, output)
    run_script(STEP_5, work, output, LEARNING_RATE=LEARNING_RATES, SAVE_TO_DISK=False, **SUBSET)


def released_step_5(work: Workload, output: Path) -> None:
    """The same eight learning rates, as released."""
    file = paths.gradients_file(work.folder / PREPARED, "combined", "model", REPAIR, SEED)
    released.step_5(work.model, work.hh_dataset, work.data_dir, load_file(file), LEARNING_RATES)


def ours_step_6(work: Workload, output: Path) -> None:
    """The four evaluation scripts."""
    for name in EVALUATIONS:
        run_script(name, work, output)


def released_step_6(work: Workload, output: Path) -> None:
    """The same, as released."""
    released.step_6(work.model, work.hh_dataset, work.data_dir)


SIDES: dict[str, dict[str, Callable[[Workload, Path], Any]]] = {
    "step1_three_tasks": {"ours": ours_step_1, "released": released_step_1},
    "step1_one_task": {"ours": ours_step_1_one_task},
    "step2_representations": {"ours": ours_step_2, "released": released_step_2},
    "step3_dpp_rff": {"ours": ours_step_3_rff, "released": released_step_3},  # also what the exact kernel is held to
    "step3_dpp_rbf": {"ours": ours_step_3_rbf},
    "step4_gradients": {"ours": ours_step_4, "released": released_step_4},
    "step5_sweep": {"ours": ours_step_5, "released": released_step_5},
    "step6_evaluation": {"ours": ours_step_6, "released": released_step_6},
}


def peak_bytes() -> int:
    """Largest resident memory of this process; getrusage would count that of the process which started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1_024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def measure(step: str, side: str, work: Workload, repetitions: int) -> dict[str, Any]:
    """Time one side. Imports are not counted; loading the model, tokenizing and writing the artefacts are."""
    output = work.folder / f"output_{side}_{step}"
    seconds, result = [], None
    for number in range(repetitions + (repetitions > 1)):
        shutil.rmtree(output, ignore_errors=True)
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            result = SIDES[step][side](work, output)
        if number or repetitions == 1:
            seconds.append(time.perf_counter() - started)
    shutil.rmtree(output, ignore_errors=True)
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "result": result}


if __name__ == "__main__":
    side, step, folder, repetitions = sys.argv[1:]
    if step == "prepare":
        with contextlib.redirect_stdout(sys.stderr):
            prepare(Workload(Path(folder)))
        print("{}")
    else:
        print(json.dumps(measure(step, side, Workload(Path(folder)), int(repetitions))))
