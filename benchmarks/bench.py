"""Every step compared with the released recipe, on the same machine in the same run: `make bench`.

    python benchmarks/bench.py
    python benchmarks/bench.py --STEPS step2_representations step6_evaluation

Each side of each comparison runs in its own process. Writes benchmarks/results.json, results.md and results.png;
steps that are not in STEPS keep their earlier numbers.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.floor import copy_rate, floors, matrix_rate
from benchmarks.workload import (
    PYTHIA_70M_HIDDEN,
    Workload,
    find_source,
    make_greedy_inputs,
    make_workload,
    save_tokenized,
)
from steps import run_step
from utils.console import banner, say
from utils.files import read_json, to_json, write_locked
from utils.manifests import software_versions
from utils.paths import PROJECT_ROOT, resolve_path
from utils.processes import first_process_only
from utils.reporting.tables import markdown_table
from utils.settings import Choices, PositiveInt, Settings

Step = Literal[
    "step1_three_tasks",
    "step2_representations",
    "step3_dpp_rff",
    "step3_dpp_rbf",
    "step4_gradients",
    "step5_sweep",
    "step6_evaluation",
]

# ------------------------------------------------------------------------------------------------ constants
STEPS: Choices[Step] = list(get_args(Step))  # steps to measure; all seven by default
BERGSON_PYTHON: str | None = None  # Python of an environment that has bergson, to compare step 1 with it; None skips it
OUTPUT_DIR: str = "runs/bench"  # folder for the model, the data and the outputs
TRAIN_DIALOGUES: PositiveInt = 176  # 10,000 / 96,256 of them are used for the factors, as in the paper
REPRESENTED_DIALOGUES: PositiveInt = 256  # for step 2, which is short
TEST_DIALOGUES: PositiveInt = 64  # for steps 5 and 6
GREEDY_EXAMPLES: PositiveInt = 96_256  # for step 3, as in the paper
REPETITIONS: PositiveInt = 3  # after a warm-up if there are several; the median counts
LONG_REPETITIONS: PositiveInt = 1  # of the released steps 1, 4 and 5, which take minutes
# -----------------------------------------------------------------------------------------------------------

PAIRS = {"bias": 18, "ethics": 4, "truth": 8}  # over both splits, at least one in each
LONG = {("step1_three_tasks", "released"), ("step4_gradients", "released"), ("step5_sweep", "released")}
# The least that each ratio should be; from the design of the benchmark, not from its results.
BARS = {
    "step1_three_tasks": 60,
    "step2_representations": 3.5,
    "step3_dpp_rff": 15,
    "step3_dpp_rbf": 35,
    "step4_gradients": 12,
    "step5_sweep": 25,
    "step6_evaluation": 10,
    "step1_peak_memory": 3,
}
REPRESENTATIONS = "step2_representations"
RESULTS = PROJECT_ROOT / "benchmarks" / "results.json"


def _run(command: list[str]) -> dict[str, Any]:
    """Run a command and parse the last line that it prints as JSON.

    Raises:
        RuntimeError: the command failed; quotes the end of its output.
    """
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n" + "\n".join(finished.stderr.splitlines()[-15:]))
    return json.loads(finished.stdout.splitlines()[-1])


def run_measure(side: str, step: str, work: Workload, repetitions: int) -> dict[str, Any]:
    """Measure one side of one step in its own process."""
    script = str(PROJECT_ROOT / "benchmarks" / "measure.py")
    return _run([sys.executable, script, side, step, str(work.folder), str(repetitions)])


def compare_with_bergson(python: str, work: Workload, repetitions: int) -> dict[str, Any]:
    """Step 1 for one task with factors on all training dialogues: ours and bergson's."""
    save_tokenized(work)
    script = str(PROJECT_ROOT / "benchmarks" / "bergson_side.py")
    sides = {
        "ours": run_measure("ours", "step1_one_task", work, repetitions),
        "bergson": _run([python, script, str(work.folder), str(repetitions)]),
    }
    for side, measured in sides.items():
        say_measured(side, measured)
    return {**sides, "ratio": sides["bergson"]["median_seconds"] / sides["ours"]["median_seconds"]}


def say_measured(side: str, measured: dict[str, Any]) -> None:
    """Print the time and memory of one side."""
    say(f"   {side}: {measured['median_seconds']:.2f} s, {measured['peak_bytes'] / 1e9:.2f} GB")


def processor_name() -> str:
    """The CPU's name, if the system provides it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def conditions(settings: Settings, work: Workload, many: Workload, source: Path) -> dict[str, Any]:
    """Hardware, versions and sizes behind the numbers."""
    rate, bytes_rate = matrix_rate(), copy_rate()
    floor_seconds = floors(work, settings.GREEDY_EXAMPLES, PYTHIA_70M_HIDDEN, rate, bytes_rate)
    floor_seconds[REPRESENTATIONS] = floors(many, 1, PYTHIA_70M_HIDDEN, rate, bytes_rate)[REPRESENTATIONS]
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "versions": software_versions(),
        "matrix_gflops": rate / 1e9,
        "copy_gbytes": bytes_rate / 1e9,
        "data": "real dialogues and pairs" if source.name != "demo" else "embedded default",
        "train_dialogues": settings.TRAIN_DIALOGUES,
        "factor_dialogues": work.num_factor_examples,
        "represented_dialogues": settings.REPRESENTED_DIALOGUES,
        "test_dialogues": settings.TEST_DIALOGUES,
        "greedy_examples": settings.GREEDY_EXAMPLES,
        "floor_seconds": floor_seconds,
    }


@functools.cache
def run_released_step_3(work: Workload, repetitions: int) -> dict[str, Any]:
    """The baseline of both kernels, measured once."""
    return run_measure("released", "step3_dpp_rff", work, repetitions)


def compare(step: str, settings: Settings, work: Workload) -> dict[str, dict[str, Any]]:
    """Measure both sides of one step.

    Raises:
        RuntimeError: the two greedy algorithms picked different examples.
    """
    sides = {}
    for side in ("ours", "released"):
        repetitions = settings.LONG_REPETITIONS if (step, side) in LONG else settings.REPETITIONS
        if side == "released" and step.startswith("step3"):
            sides[side] = dict(run_released_step_3(work, repetitions))
        else:
            sides[side] = run_measure(side, step, work, repetitions)
        say_measured(side, sides[side])
    if step == "step3_dpp_rff" and sides["ours"]["result"] != sides["released"]["result"]:
        raise RuntimeError("the two greedy algorithms picked different examples")
    for side in sides.values():
        del side["result"]
    return sides


def results_table(results: dict[str, Any]) -> str:
    """A row for each ratio."""
    rows = []
    for key, ratio in results["ratios"].items():
        step = "step1_three_tasks" if key == "step1_peak_memory" else key
        ours, released = results["ours"][step], results["released"][step]
        if key == "step1_peak_memory":
            cells = [f"{released['peak_bytes'] / 1e9:.2f} GB", f"{ours['peak_bytes'] / 1e9:.2f} GB", "", ""]
        else:
            floor, median = results["conditions"]["floor_seconds"][step], ours["median_seconds"]
            cells = [
                f"{released['median_seconds']:.1f} s",
                f"{median:.2f} s",
                f"{floor:.2f} s",
                f"{median / floor:.1f}",
            ]
        rows.append([key, *cells, f"{ratio:.1f}", f"{BARS[key]:g}"])
    return markdown_table(["", "released", "ours", "floor", "ours / floor", "ratio", "bar"], rows)


def results_figure(results: dict[str, Any], path: Path) -> None:
    """The ratios as bars, on a logarithmic axis."""
    from matplotlib.figure import Figure

    names, ratios = list(results["ratios"]), list(results["ratios"].values())
    figure = Figure(figsize=(8, 0.5 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, ratios, color="#2a9d8f")
    for row, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        axes.text(ratio * 1.04, row, f"{ratio:.1f} x", va="center")
        axes.plot([BARS[name]] * 2, [row - 0.4, row + 0.4], color="#e76f51", lw=2)
    axes.set_xscale("log")
    axes.set_xlim(1, max(ratios) * 1.6)
    axes.invert_yaxis()
    axes.set_xlabel("released / ours (seconds; memory in the last row); red: what the benchmark asks for")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


@first_process_only
def main(settings: Settings) -> None:
    """Measure, then write numbers, table and figure."""
    source = find_source()
    folder = resolve_path(settings.OUTPUT_DIR)
    work = make_workload(folder, settings.TRAIN_DIALOGUES, settings.TEST_DIALOGUES, PAIRS, source)
    make_greedy_inputs(folder, settings.GREEDY_EXAMPLES, PYTHIA_70M_HIDDEN)
    many = make_workload(folder / "many", settings.REPRESENTED_DIALOGUES, 1, PAIRS, source)
    banner("benchmark", f"{settings.TRAIN_DIALOGUES} dialogues from {source}")
    run_measure("ours", "prepare", work, 1)
    results = read_json(RESULTS) if RESULTS.is_file() else {"ratios": {}, "ours": {}, "released": {}}
    results["conditions"] = conditions(settings, work, many, source)
    for step in settings.STEPS:
        banner("benchmark", step)
        sides = compare(step, settings, many if step == REPRESENTATIONS else work)
        for side, measured in sides.items():
            results[side][step] = measured
        results["ratios"][step] = sides["released"]["median_seconds"] / sides["ours"]["median_seconds"]
        if step == "step1_three_tasks":
            peaks = [sides[side]["peak_bytes"] for side in ("released", "ours")]
            results["ratios"]["step1_peak_memory"] = peaks[0] / peaks[1]
        results["ratios"] = {key: results["ratios"][key] for key in BARS if key in results["ratios"]}
        write_locked(RESULTS, to_json(results))
        write_locked(RESULTS.with_suffix(".md"), results_table(results) + "\n")
        results_figure(results, RESULTS.with_suffix(".png"))
    if settings.BERGSON_PYTHON:
        banner("benchmark", "step 1 for one task, beside bergson")
        results["bergson"] = compare_with_bergson(settings.BERGSON_PYTHON, work, settings.REPETITIONS)
        write_locked(RESULTS, to_json(results))
    say(results_table(results))
    say(f"   wrote {RESULTS} with .md and .png")


if __name__ == "__main__":
    run_step(main)
