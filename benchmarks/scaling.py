"""How much faster several processes are, of one thread each: `python benchmarks/scaling.py`.

Each number of processes is started by torchrun and measured in turn, as often as REPETITIONS says, on the same model
and data as the other benchmarks. Writes benchmarks/scaling.json and scaling.md, with a projection to 8 GPUs from that
of growth.py to one. Steps that are not in STEPS keep their earlier numbers.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import growth
from benchmarks.floor import Operations
from benchmarks.measure import ADDED_UP_BYTES
from benchmarks.workload import PAPER_TRAIN, VOCABULARY, Workload, find_source, make_workload
from steps import run_step
from utils.console import banner, say
from utils.files import read_json, to_json, write_locked
from utils.manifests import software_versions
from utils.paths import PROJECT_ROOT, resolve_path
from utils.processes import first_process_only
from utils.reporting.tables import markdown_table
from utils.settings import Choices, PositiveInt, Settings

# ------------------------------------------------------------------------------------------------ constants
STEPS: Choices[Literal["step1_three_tasks", "step2_representations", "step4_gradients", "step6_evaluation"]] = [
    "step1_three_tasks",
    "step2_representations",
]  # steps to measure
PROCESSES: Choices[PositiveInt] = [1, 2]  # numbers of processes, 1 first
OUTPUT_DIR: str = "runs/scaling"  # folder for the model, the data and the outputs
TRAIN_DIALOGUES: PositiveInt = 320  # 10,000 / 96,256 of them are used for the factors, as in the paper
TEST_DIALOGUES: PositiveInt = 64  # for step 6
REPETITIONS: PositiveInt = 2  # rounds; medians count
# -----------------------------------------------------------------------------------------------------------

PAIRS = {"bias": 18, "ethics": 4, "truth": 8}  # as in bench.py
NUM_GPUS = 8  # of the projection
FLOAT32, FLOAT64 = 4, 8  # bytes
RESULTS = PROJECT_ROOT / "benchmarks" / "scaling.json"


def start(count: int, step: str, work: Workload) -> subprocess.Popen[str]:
    """Start one run of a step by `count` processes of one thread each, without a warm-up."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command = [*launcher, str(PROJECT_ROOT / "benchmarks" / "measure.py"), "ours", step, str(work.folder), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def result_of(run: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run has measured.

    Raises:
        RuntimeError: the run failed; quotes the end of its output.
    """
    output, errors = run.communicate()
    if run.returncode:
        raise RuntimeError(f"{run.args} failed:\n" + "\n".join(errors.splitlines()[-15:]))
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def copy_of(work: Workload, number: int) -> Workload:
    """The same model and data in another folder, so that two runs do not share their output."""
    folder = work.folder / f"copy{number}"
    folder.mkdir(exist_ok=True)
    for name in ("model", "hh", "bias", "ethics", "truthfulness"):
        if not (folder / name).exists():
            (folder / name).symlink_to(work.folder / name)
    return Workload(folder)


def measure_round(step: str, work: Workload, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Each number of processes once, and as many runs of one process each at the same time.

    Processes share the machine's memory and caches, and so cannot be as many times as fast as one that has them for
    itself: as many independent runs, which share them but divide nothing, show the most that can be reached.
    """
    measured, seconds_of_one = [], None
    for count in counts:
        result = result_of(start(count, step, work))
        seconds = result["seconds"][0]
        seconds_of_one = seconds if count == 1 else seconds_of_one
        most = 1.0
        if count > 1:
            runs = [start(1, step, copy_of(work, number)) for number in range(count)]
            at_once = statistics.fmean(result_of(run)["seconds"][0] for run in runs)
            most = count * seconds_of_one / at_once
        measured.append(
            {
                "processes": count,
                "seconds": seconds,
                "ratio": seconds_of_one / seconds,
                "most": most,
                "bytes_reduced": result["bytes_reduced"],
            }
        )
        say(f"   {count} processes: {seconds:.1f} s, {measured[-1]['ratio']:.2f} times as fast; at most {most:.2f}")
    return measured


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
    """A row for each step and number of processes; medians over the rounds."""
    rows = []
    for step, rounds in results["steps"].items():
        for runs in zip(*rounds, strict=True):
            middle = {name: statistics.median(run[name] for run in runs) for name in ("seconds", "ratio", "most")}
            row = [step, f"{runs[0]['processes']}", f"{middle['seconds']:.1f}"]
            rows.append(
                [*row, f"{middle['ratio']:.2f}", f"{middle['most']:.2f}", f"{runs[0]['bytes_reduced'] / 1e6:.1f}"]
            )
    return markdown_table(["", "processes", "seconds", "times as fast", "at most", "MB added up by each"], rows)


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
        "steps": read_json(RESULTS)["steps"] if RESULTS.exists() else {},
    }
    for step in settings.STEPS:
        banner("scaling", step)
        results["steps"][step] = [measure_round(step, work, settings.PROCESSES) for _ in range(settings.REPETITIONS)]
        write_locked(RESULTS, to_json(results))
    seconds = [result_of(start(2, "all_reduce", work))["seconds"][0] for _ in range(settings.REPETITIONS)]
    results["all_reduce_bytes_per_second"] = ADDED_UP_BYTES / statistics.median(seconds)
    results["projection"] = project(read_json(growth.RESULTS), results["all_reduce_bytes_per_second"])
    text = f"{results_table(results)}\n\n{projection_table(results['projection'])}"
    write_locked(RESULTS, to_json(results))
    write_locked(RESULTS.with_suffix(".md"), f"{text}\n")
    say(text)


if __name__ == "__main__":
    run_step(main)
