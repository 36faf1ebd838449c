"""How much faster several processes are, of one thread each: `python benchmarks/scaling.py`.

Each number of processes is started by torchrun and measured in turn, as often as REPETITIONS says, on the same model
and data as the other benchmarks. Writes benchmarks/scaling.json and scaling.md, with a projection to 8 GPUs from that
of growth.py to one.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import growth
from benchmarks.floor import Operations
from benchmarks.measure import ADDED_UP_BYTES
from benchmarks.workload import PAPER_TRAIN, VOCABULARY, Workload, find_source, make_workload
from steps import run_step
from utils.artifacts import read_json, software_versions, to_json, write_atomically
from utils.console import banner, say
from utils.paths import PROJECT_ROOT, resolve_path
from utils.processes import first_process_only
from utils.reporting.tables import markdown_table
from utils.settings import PositiveInt, Settings

# ------------------------------------------------------------------------------------------------ constants
STEPS: list[Literal["step1_three_tasks", "step2_representations", "step4_gradients", "step6_evaluation"]] = [
    "step1_three_tasks",
    "step2_representations",
]  # steps to measure
PROCESSES: list[PositiveInt] = [1, 2]  # numbers of processes; the first is the baseline
OUTPUT_DIR: str = "runs/scaling"  # folder for the model, the data and the outputs
TRAIN_DIALOGUES: PositiveInt = 480  # 10,000 / 96,256 of them are used for the factors, as in the paper
TEST_DIALOGUES: PositiveInt = 64  # for step 6
REPETITIONS: PositiveInt = 3  # rounds; the median ratio counts
# -----------------------------------------------------------------------------------------------------------

PAIRS = {"bias": 18, "ethics": 4, "truth": 8}  # as in bench.py
NUM_GPUS = 8  # of the projection
FLOAT32, FLOAT64 = 4, 8  # bytes
RESULTS = PROJECT_ROOT / "benchmarks" / "scaling.json"


def measure(count: int, step: str, work: Workload) -> dict[str, Any]:
    """One run of a step by `count` processes of one thread each, without a warm-up.

    Raises:
        RuntimeError: the run failed; quotes the end of its output.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, str(PROJECT_ROOT / "benchmarks" / "measure.py"), "ours", step, str(work.folder), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n" + "\n".join(finished.stderr.splitlines()[-15:]))
    return json.loads(next(line for line in finished.stdout.splitlines() if line.startswith("{")))


def project(growth_results: dict[str, Any], bytes_per_second: float) -> list[dict[str, Any]]:
    """Seconds of steps 1 and 2 of the paper's models on 8 GPUs, from the projection to one in growth.json.

    Passes, and the sums behind factors and scores, are divided by 8; the eigendecompositions take as long as those of
    the largest Linear, if there is one block; then all that is added up goes once through main memory. Loading the
    model and tokenizing are not divided, and are left out on both sides.

    Args:
        bytes_per_second: of an all-reduce, as measured.
    """
    projections = []
    for on_one in growth_results["projection"]:
        hidden, blocks = growth.PAPER_MODELS[on_one["model"]]
        linears = [(out, inside + 1) for out, inside, _ in Operations(hidden, 4 * hidden, blocks, VOCABULARY).linears]
        squares = sum(out**2 + inside**2 for out, inside in linears)
        weights = sum(out * inside for out, inside in linears)
        cubes = [out**3 + inside**3 for out, inside in linears]
        bytes_reduced = {
            "covariances": FLOAT64 * squares,
            "eigenbases": FLOAT32 * squares,
            "Lambda": FLOAT64 * weights,
            "queries": 3 * FLOAT64 * weights,
            "scores": 3 * FLOAT32 * PAPER_TRAIN,
        }
        bytes_of_step2 = FLOAT32 * PAPER_TRAIN * hidden
        decompositions = on_one["eigendecompositions"] * max(cubes) / sum(cubes)
        step1 = (on_one["passes"] + on_one["sums"]) / NUM_GPUS + decompositions
        projections.append(
            {
                "model": on_one["model"],
                "step1_on_one": on_one["passes"] + on_one["sums"] + on_one["eigendecompositions"],
                "step1": step1 + sum(bytes_reduced.values()) / bytes_per_second,
                "step1_bytes_reduced": bytes_reduced,
                "step2_on_one": on_one["step2"],
                "step2": on_one["step2"] / NUM_GPUS + bytes_of_step2 / bytes_per_second,
                "step2_bytes_reduced": bytes_of_step2,
            }
        )
    return projections


def projection_table(projections: list[dict[str, Any]]) -> str:
    """A row for each model."""
    rows = [
        [
            row["model"],
            f"{row['step1_on_one'] / 60:.1f} min",
            f"{row['step1'] / 60:.1f} min",
            f"{sum(row['step1_bytes_reduced'].values()) / 1e9:.1f} GB",
            f"{row['step2_on_one'] / 60:.1f} min",
            f"{row['step2'] / 60:.1f} min",
            f"{row['step2_bytes_reduced'] / 1e9:.1f} GB",
        ]
        for row in projections
    ]
    on_8 = f"on {NUM_GPUS} GPUs"
    return markdown_table(["", "step 1", on_8, "added up", "step 2", on_8, "added up"], rows)


def results_table(results: dict[str, Any]) -> str:
    """A row for each step and number of processes."""
    rows = [
        [
            step,
            str(count),
            f"{statistics.median(run['seconds'][0] for run in runs):.1f}",
            f"{results['ratios'][step][count]:.2f}",
            f"{runs[0]['bytes_reduced'] / 1e6:,.1f}",
        ]
        for step, by_count in results["steps"].items()
        for count, runs in by_count.items()
    ]
    return markdown_table(["", "processes", "seconds", "times as fast", "MB added up by each"], rows)


@first_process_only
def main(settings: Settings) -> None:
    """Measure every step with every number of processes, in turn."""
    work = make_workload(
        resolve_path(settings.OUTPUT_DIR), settings.TRAIN_DIALOGUES, settings.TEST_DIALOGUES, PAIRS, find_source()
    )
    results: dict[str, Any] = {
        "dialogues": work.num_train,
        "factor_examples": work.num_factor_examples,
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads_per_process": 1,
        "dtype": str(torch.get_default_dtype()),
        "versions": software_versions(),
        "steps": {},
        "ratios": {},
    }
    for step in settings.STEPS:
        banner("scaling", step)
        runs: dict[int, list[dict[str, Any]]] = {count: [] for count in settings.PROCESSES}
        for _ in range(settings.REPETITIONS):
            for count, of_count in runs.items():
                of_count.append(measure(count, step, work))
                say(f"   {count} processes: {of_count[-1]['seconds'][0]:.1f} s")
        baseline = runs[settings.PROCESSES[0]]
        results["steps"][step] = runs
        results["ratios"][step] = {  # of runs beside each other
            count: statistics.median(
                one["seconds"][0] / many["seconds"][0] for one, many in zip(baseline, of_count, strict=True)
            )
            for count, of_count in runs.items()
        }
    seconds = [measure(2, "all_reduce", work)["seconds"][0] for _ in range(settings.REPETITIONS)]
    results["all_reduce_bytes_per_second"] = ADDED_UP_BYTES / statistics.median(seconds)
    results["projection"] = project(read_json(growth.RESULTS), results["all_reduce_bytes_per_second"])
    text = f"{results_table(results)}\n\n{projection_table(results['projection'])}"
    write_atomically(RESULTS, to_json(results))
    write_atomically(RESULTS.with_suffix(".md"), f"{text}\n")
    say(text)


if __name__ == "__main__":
    run_step(main)
