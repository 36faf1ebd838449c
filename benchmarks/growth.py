"""How our cost grows with the size of the work, and what that means for the paper's models; `make bench` runs it last.

    python benchmarks/growth.py

Time and peak memory of steps 1 to 3 for four numbers of dialogues and four widths, each in its own process.
Writes benchmarks/growth.json, growth.md and growth.png.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.bench import PAIRS, run_measure
from benchmarks.floor import Operations, Tokens
from benchmarks.workload import (
    PAPER_FACTORS,
    PAPER_TEST,
    PAPER_TRAIN,
    PYTHIA_70M_HIDDEN,
    VOCABULARY,
    find_source,
    make_greedy_inputs,
    make_workload,
)
from steps import run_step
from utils.console import banner, say
from utils.files import to_json, write_locked
from utils.models import load_tokenizer
from utils.paths import PROJECT_ROOT, resolve_path
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.processes import first_process_only
from utils.reporting.tables import markdown_table
from utils.settings import Choices, PositiveInt, Settings

# ------------------------------------------------------------------------------------------------ constants
OUTPUT_DIR: str = "runs/bench/growth"  # folder for the models, the data and the outputs
DIALOGUES: Choices[PositiveInt] = [40, 80, 160, 320]  # at hidden 512
WIDTHS: Choices[PositiveInt] = [128, 256, 512, 1_024]  # hidden sizes, at the second number of dialogues
GREEDY_EXAMPLES: Choices[PositiveInt] = [12_032, 24_064, 48_128, 96_256]  # for step 3, in place of DIALOGUES
REPETITIONS: PositiveInt = 1  # after a warm-up if there are several; the median counts
# -----------------------------------------------------------------------------------------------------------

STEPS = ("step1_three_tasks", "step2_representations", "step3_dpp_rbf")
PAPER_MODELS = {"Pythia 1.4b": (2_048, 24), "Pythia 2.8b": (2_560, 32), "Pythia 6.9b": (4_096, 32)}  # hidden, blocks
# An H200's published dense rates in operations per second, and the shares of them that the projection assumes.
BFLOAT16_RATE, FLOAT32_RATE, FLOAT64_RATE = 989e12, 67e12, 67e12
SHARE_OF_RATE = 0.4
EIGENDECOMPOSITION_OPERATIONS, SHARE_OF_FLOAT64 = 9, 0.05  # times n^3; GPUs are slow at eigendecompositions
RESULTS = PROJECT_ROOT / "benchmarks" / "growth.json"


def measure_sizes(settings: Settings, axis: str) -> list[dict[str, Any]]:
    """Seconds and peak bytes of the three steps along one axis."""
    points = []
    sizes = settings.DIALOGUES if axis == "dialogues" else settings.WIDTHS
    for number, size in enumerate(sizes):
        dialogues = size if axis == "dialogues" else settings.DIALOGUES[1]
        hidden = size if axis == "width" else PYTHIA_70M_HIDDEN
        examples = settings.GREEDY_EXAMPLES[number if axis == "dialogues" else 1]
        folder = resolve_path(settings.OUTPUT_DIR) / f"{dialogues}_{hidden}"
        work = make_workload(folder, dialogues, 1, PAIRS, find_source(), hidden)
        make_greedy_inputs(folder, examples, hidden)
        train = Tokens.of(tokenize_dialogues(load_dialogues(work.hh_dataset, "train"), load_tokenizer(work.model)))
        point: dict[str, Any] = {
            "dialogues": dialogues,
            "hidden": hidden,
            "greedy_examples": examples,
            "tokens": train.all,
            "labels": train.labels,
        }
        for step in STEPS:
            measured = run_measure("ours", step, work, settings.REPETITIONS)
            point[step] = {"seconds": measured["median_seconds"], "peak_bytes": measured["peak_bytes"]}
        shutil.rmtree(folder)
        say(f"   {axis} {size}: " + ", ".join(f"{step} {point[step]['seconds']:.2f} s" for step in STEPS))
        points.append(point)
    return points


def size_along(axis: str, step: str, point: dict[str, Any]) -> int:
    """The size that the cost of a step grows with along an axis."""
    if axis == "width":
        return point["hidden"]
    return point["greedy_examples" if step.startswith("step3") else "dialogues"]


def fit(points: list[dict[str, Any]], axis: str) -> dict[str, dict[str, float]]:
    """For each step: seconds = fixed + per_unit * size along the dialogues; the exponent of the size along the width.

    The exponent is taken from the last doubling, where the fixed cost matters least.
    """
    fits = {}
    for step in STEPS:
        seconds = [point[step]["seconds"] for point in points]
        if axis == "dialogues":
            slope, fixed = np.polyfit([size_along(axis, step, point) for point in points], seconds, 1)
            fits[step] = {"seconds_fixed": float(fixed), "seconds_per_unit": float(slope)}
        else:
            fits[step] = {"exponent_of_last_doubling": math.log2(seconds[-1] / seconds[-2])}
    return fits


def project(tokens_per_dialogue: float, labels_per_dialogue: float) -> list[dict[str, Any]]:
    """Seconds of step 1 for three tasks, and of step 2, on all 96,256 dialogues on one H200: operations over rates.

    `evaluation` is the perplexity of the test split: at most this much for each repaired model, since the trunk runs
    once for a whole sweep. Passes in bfloat16, sums behind factors and scores in float32, eigendecompositions in
    float64. Queries are left out (below 2 % of the tokens). Memory: float32 weights, one bfloat16 copy of the largest
    Linears, and of one block the covariances in float64, other factors and three query gradients in float32.
    """
    projections = []
    for name, (hidden, blocks) in PAPER_MODELS.items():
        model = Operations(hidden, 4 * hidden, blocks, VOCABULARY)
        train, factors, test = (
            Tokens(round(count * tokens_per_dialogue), round(count * labels_per_dialogue))
            for count in (PAPER_TRAIN, PAPER_FACTORS, PAPER_TEST)
        )
        passes = (
            model.trunk(train + factors) + model.tail(train, backward=True) + 2 * model.tail(factors, backward=True)
        )
        sums = (
            factors.all * 2 * sum(inside**2 for _, inside, _ in model.linears)
            + model.per_linear(factors, inputs=False, outputs=True, product=0)
            + model.per_linear(factors, inputs=True, outputs=True, product=1)
            + model.per_linear(train, inputs=False, outputs=False, product=3)
        )
        sizes = [size for out, inside, _ in model.linears for size in (out, inside + 1)]
        decompositions = EIGENDECOMPOSITION_OPERATIONS * sum(size**3 for size in sizes)
        seconds = {
            "passes": passes / (SHARE_OF_RATE * BFLOAT16_RATE),
            "sums": sums / (SHARE_OF_RATE * FLOAT32_RATE),
            "eigendecompositions": decompositions / (SHARE_OF_FLOAT64 * FLOAT64_RATE),
            "step2": train.all * model.block * blocks / (SHARE_OF_RATE * FLOAT32_RATE),
            "evaluation": (test.all * model.block * blocks + test.labels * 2 * hidden * VOCABULARY)
            / (SHARE_OF_RATE * FLOAT32_RATE),
        }
        parameters = blocks * 12 * hidden**2 + 2 * VOCABULARY * hidden
        block_floats = 2 * sum(size**2 for size in sizes) + 5 * 12 * hidden**2
        projections.append({"model": name, **seconds, "memory_bytes": 4 * parameters + 4 * block_floats})
    return projections


def tables(results: dict[str, Any]) -> str:
    """The measurements, the fits and the projection, in Markdown."""
    rows = [
        [
            f"{point['dialogues']}",
            f"{point['hidden']}",
            f"{point['greedy_examples']:,}",
            *(f"{point[step]['seconds']:.2f} s, {point[step]['peak_bytes'] / 1e9:.2f} GB" for step in STEPS),
        ]
        for axis in ("dialogues", "width")
        for point in results[axis]
    ]
    projected = [
        [
            row["model"],
            *(f"{row[part]:.0f} s" for part in ("passes", "sums", "eigendecompositions")),
            f"{(row['passes'] + row['sums'] + row['eigendecompositions']) / 60:.1f} min",
            f"{row['step2'] / 60:.1f} min",
            f"{row['evaluation'] / 60:.1f} min",
            f"{row['memory_bytes'] / 1e9:.0f} GB",
        ]
        for row in results["projection"]
    ]
    fits = [
        [
            step,
            f"{results['fits']['dialogues'][step]['seconds_fixed']:.2f} s",
            f"{1e3 * results['fits']['dialogues'][step]['seconds_per_unit']:.3f} ms",
            f"{results['fits']['width'][step]['exponent_of_last_doubling']:.2f}",
        ]
        for step in STEPS
    ]
    return "\n\n".join(
        [
            markdown_table(["dialogues", "hidden", "greedy examples", "step 1", "step 2", "step 3 (rbf)"], rows),
            markdown_table(["", "fixed", "for each dialogue", "exponent of the last doubling of the width"], fits),
            markdown_table(
                ["", "passes", "sums", "eigendecompositions", "step 1", "step 2", "test split", "memory"],
                projected,
            ),
        ]
    )


def figure(results: dict[str, Any], path: Path) -> None:
    """Seconds and peak memory along both axes, with the linear fits along the dialogues."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 6.4), layout="constrained")
    panels = picture.subplots(2, 2)
    for column, axis in enumerate(("dialogues", "width")):
        for step, colour in zip(STEPS, ("#264653", "#2a9d8f", "#e76f51"), strict=True):
            sizes = np.array([size_along(axis, step, point) for point in results[axis]])
            seconds = [point[step]["seconds"] for point in results[axis]]
            peaks = [point[step]["peak_bytes"] / 1e9 for point in results[axis]]
            line = results["fits"][axis][step]
            curve = line["seconds_fixed"] + line["seconds_per_unit"] * sizes if axis == "dialogues" else seconds
            multiples = sizes / sizes[0]
            panels[0, column].loglog(multiples, seconds, "o", color=colour, label=step)
            panels[0, column].loglog(multiples, curve, "-", color=colour, lw=1)
            panels[1, column].loglog(multiples, peaks, "o-", color=colour, lw=1)
        panels[0, column].set_title(f"{axis}, in multiples of the smallest")
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("peak memory, GB")
    panels[0, 0].legend(frameon=False, fontsize=8)
    for panel in panels.flat:
        panel.grid(alpha=0.25, which="both")
    picture.savefig(path, dpi=130)


@first_process_only
def main(settings: Settings) -> None:
    """Measure along both axes, fit, project to the paper's models, and write numbers, tables and figure."""
    results: dict[str, Any] = {"fits": {}}
    for axis in ("dialogues", "width"):
        banner("growth", axis)
        results[axis] = measure_sizes(settings, axis)
        results["fits"][axis] = fit(results[axis], axis)
    largest = results["dialogues"][-1]
    results["projection"] = project(largest["tokens"] / largest["dialogues"], largest["labels"] / largest["dialogues"])
    write_locked(RESULTS, to_json(results))
    write_locked(RESULTS.with_suffix(".md"), tables(results) + "\n")
    figure(results, RESULTS.with_suffix(".png"))
    say(tables(results))


if __name__ == "__main__":
    run_step(main)
