"""One side of one comparison in a process of its own: `python benchmarks/measure.py ours step2_representations DIR`.

Prints one JSON line: seconds of each repetition after a warm-up, peak memory of the process, and what was computed.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

from benchmarks import released
from benchmarks.workload import Workload
from utils import paths
from utils.paths import PROJECT_ROOT, STEP_1, STEP_2, STEP_4, STEP_5
from utils.selection import FourierKernel, RBFKernel, greedy_dpp, median_heuristic_gamma
from utils.settings import run_step

BOTTOM_K = 100
LEARNING_RATES = [0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012, 0.014]
NUM_FEATURES, IF_WEIGHT, SEED = 2_048, 10.0, 42
EVALUATIONS = [f"evaluation_scripts/{name}.py" for name in ("anthropic_eval", "bias_loss", "ethics_loss", "truth_loss")]


def load_script(name: str) -> ModuleType:
    """Import one of the step scripts."""
    module_name = f"script_{Path(name).stem}"
    if module_name not in sys.modules:
        specification = importlib.util.spec_from_file_location(module_name, PROJECT_ROOT / name)
        sys.modules[module_name] = module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
    return sys.modules[module_name]


def run_script(name: str, work: Workload, output: Path, **constants: Any) -> None:  # noqa: ANN401
    """Run a step as a user does, in this process."""
    script = load_script(name)
    plural = hasattr(script, "MODEL_NAMES")
    constants = {
        "MODEL_NAMES" if plural else "MODEL_NAME": work.model,
        "HH_DATASET": work.hh_dataset,
        "DATA_DIR": work.data_dir,
        "OUTPUT_DIR": output,
        **constants,
    }
    words = []
    for constant, value in constants.items():
        words += [f"--{constant}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    run_step(script.main, words)


def greedy_inputs(work: Workload) -> tuple[torch.Tensor, torch.Tensor]:
    """Representations (N, hidden) and quality (N,) that the workload holds."""
    stored = load_file(work.folder / "greedy.safetensors")
    return stored["representations"], stored["quality"]


def ours_step_1(work: Workload, output: Path) -> None:
    """Factors and scores for three tasks."""
    run_script(STEP_1, work, output, NUM_FACTOR_EXAMPLES=work.num_factor_examples)


def released_step_1(work: Workload, output: Path) -> None:
    """The same as released."""
    released.step_1(work.model, work.hh_dataset, work.data_dir, output, work.num_factor_examples)


def ours_step_2(work: Workload, output: Path) -> None:
    """Representations."""
    run_script(STEP_2, work, output)


def released_step_2(work: Workload, output: Path) -> None:
    """The same as released."""
    released.step_2(work.model, work.hh_dataset)


def ours_step_3_rff(work: Workload, output: Path) -> list[int]:
    """The greedy on random Fourier features."""
    representations, quality = greedy_inputs(work)
    gamma = median_heuristic_gamma(representations, SEED)
    kernel = FourierKernel(representations, gamma, NUM_FEATURES, SEED)
    return greedy_dpp(kernel, quality, BOTTOM_K, IF_WEIGHT).indices


def ours_step_3_rbf(work: Workload, output: Path) -> list[int]:
    """The greedy on the exact kernel."""
    representations, quality = greedy_inputs(work)
    gamma = median_heuristic_gamma(representations, SEED)
    return greedy_dpp(RBFKernel(representations, gamma), quality, BOTTOM_K, IF_WEIGHT).indices


def released_step_3(work: Workload, output: Path) -> list[int]:
    """The heap-based greedy on the same features."""
    representations, quality = greedy_inputs(work)
    gamma = median_heuristic_gamma(representations, SEED)
    features = FourierKernel(representations, gamma, NUM_FEATURES, SEED).features
    return released.step_3(features, quality, BOTTOM_K, IF_WEIGHT)


def _factors(work: Workload) -> Path:
    """The factors that a run of step 1 left in the workload's folder."""
    return paths.factors_dir(work.folder / "run", "model", "ekfac", False, SEED)


def ours_step_4(work: Workload, output: Path) -> None:
    """The repair gradient of a random subset."""
    shutil.copytree(work.folder / "run", output)
    run_script(
        STEP_4,
        work,
        output,
        TASK_NAME="combined",
        SCORES_TYPE="random",
        BOTTOM_K=BOTTOM_K,
        NUM_FACTOR_EXAMPLES=work.num_factor_examples,
    )


def released_step_4(work: Workload, output: Path) -> None:
    """The same as released."""
    released.step_4(work.model, work.hh_dataset, list(range(BOTTOM_K)), _factors(work))


def ours_step_5(work: Workload, output: Path) -> None:
    """Eight learning rates, measured on the four test sets."""
    shutil.copytree(work.folder / "run", output)
    run_script(
        STEP_5,
        work,
        output,
        TASK_NAME="combined",
        SCORES_TYPE="random",
        BOTTOM_K=BOTTOM_K,
        LEARNING_RATE=LEARNING_RATES,
        SAVE_TO_DISK=False,
    )


def released_step_5(work: Workload, output: Path) -> None:
    """The same as released."""
    file = paths.gradients_file(work.folder / "run", "combined", "model", "random", BOTTOM_K, IF_WEIGHT, SEED)
    released.step_5(work.model, work.hh_dataset, work.data_dir, load_file(file), LEARNING_RATES)


def ours_step_6(work: Workload, output: Path) -> None:
    """The four evaluation scripts."""
    for name in EVALUATIONS:
        run_script(name, work, output)


def released_step_6(work: Workload, output: Path) -> None:
    """The same as released."""
    released.step_6(work.model, work.hh_dataset, work.data_dir)


SIDES: dict[str, dict[str, Callable[[Workload, Path], Any]]] = {
    "step1_three_tasks": {"ours": ours_step_1, "released": released_step_1},
    "step2_representations": {"ours": ours_step_2, "released": released_step_2},
    "step3_dpp_rff": {"ours": ours_step_3_rff, "released": released_step_3},
    "step3_dpp_rbf": {"ours": ours_step_3_rbf, "released": released_step_3},
    "step4_gradients": {"ours": ours_step_4, "released": released_step_4},
    "step5_sweep": {"ours": ours_step_5, "released": released_step_5},
    "step6_evaluation": {"ours": ours_step_6, "released": released_step_6},
}


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return 1_024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(step: str, side: str, work: Workload, warm_up: Workload | None, repetitions: int) -> dict[str, Any]:
    """Warm up on little work, then time the work itself."""
    run = SIDES[step][side]
    output = work.folder / f"output_{side}_{step}"
    seconds, result = [], None
    for number in range(-1 if warm_up else 0, repetitions):
        shutil.rmtree(output, ignore_errors=True)
        started = time.perf_counter()
        result = run(warm_up if number < 0 else work, output)
        if number >= 0:
            seconds.append(time.perf_counter() - started)
    shutil.rmtree(output, ignore_errors=True)
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "result": result}


if __name__ == "__main__":
    side, step, folder, repetitions = sys.argv[1:5]
    warm_up = Workload(Path(sys.argv[5])) if len(sys.argv) > 5 else None
    print(json.dumps(measure(step, side, Workload(Path(folder)), warm_up, int(repetitions))))
