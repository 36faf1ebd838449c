"""`make demo`: run the six steps on the embedded default, as a user would, and show what the repairs did.

    python data/demo/run_demo.py

Ends with a table, a picture (results/demo.png) and results/summary.json.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils import paths
from utils.artifacts import read_json, to_json, write_atomically
from utils.console import say, shown_path
from utils.reporting import best_within_budget, repairs_figure, repairs_table
from utils.settings import PositiveFloat, PositiveInt, ScoresType, Settings, run_step

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # trained on first use
OUTPUT_DIR: str = "."  # where everything goes; relative paths start at the repository
SCORES_TYPES: list[ScoresType] = ["pure_ekfac", "dpp", "random"]  # ways of choosing what to unlearn
LEARNING_RATES: list[PositiveFloat] = [0.02, 0.04, 0.06, 0.08, 0.09, 0.1, 0.11]  # step sizes of each repair
BOTTOM_K: PositiveInt = 20  # dialogues to unlearn
IF_WEIGHT: PositiveFloat = 10.0  # for dpp: weight of the influence term
PERPLEXITY_BUDGET_PERCENT: PositiveFloat = 1.0  # a repair may cost this much perplexity
# -----------------------------------------------------------------------------------------------------------

TASKS = ("bias", "ethics", "truth")


def run(script: str, *arguments: str) -> float:
    """Run a script in a process of its own and give the seconds that it took; stop the demo where it fails."""
    started = time.monotonic()
    finished = subprocess.run([sys.executable, str(ROOT / script), *arguments], cwd=ROOT, check=False)
    if finished.returncode != 0:
        raise SystemExit(finished.returncode)
    return round(time.monotonic() - started, 1)


def run_steps(settings: Settings) -> dict[str, float]:
    """Every step as the script that a user would run; seconds by step."""
    output = ("--OUTPUT_DIR", settings.OUTPUT_DIR)
    one, many = ("--MODEL_NAME", settings.MODEL_NAME, *output), ("--MODEL_NAMES", settings.MODEL_NAME, *output)
    subset = ("--BOTTOM_K", str(settings.BOTTOM_K), "--IF_WEIGHT", str(settings.IF_WEIGHT))
    rates = ("--LEARNING_RATE", *map(str, settings.LEARNING_RATES))
    seconds = {"model": run("data/make_sft_model.py", "--SFT_MODEL_DIR", settings.MODEL_NAME)}
    seconds["step1"] = run("compute_factors_and_scores.py", *many)
    seconds["step2"] = run("representations/train_reps.py", *one)
    seconds["step3"] = run("dpp/greedy_dpp.py", *one, *subset)
    seconds["step4"] = sum(run("make_gradients.py", *many, *subset, "--SCORES_TYPE", t) for t in settings.SCORES_TYPES)
    seconds["step5"] = sum(
        run("gradient_ascent_and_save.py", *one, *subset, "--SCORES_TYPE", t, *rates) for t in settings.SCORES_TYPES
    )
    evaluators = ("anthropic_eval", "bias_loss", "ethics_loss", "truth_loss")
    seconds["step6"] = sum(run(f"evaluation_scripts/{name}.py", *many) for name in evaluators)
    return {step: round(spent, 1) for step, spent in seconds.items()}


def collect_repairs(settings: Settings) -> list[dict[str, Any]]:
    """What every repair did, from its repair.json, and how many planted dialogues of its kind it unlearned."""
    planted = read_json(ROOT / "data" / "demo" / "planted.json")
    model = paths.model_short_name(settings.MODEL_NAME)
    repairs = []
    for task in TASKS:
        for scores_type in settings.SCORES_TYPES:
            for rate in settings.LEARNING_RATES:
                folder = paths.repaired_model_dir(
                    settings.OUTPUT_DIR, task, model, scores_type, settings.BOTTOM_K, settings.IF_WEIGHT, rate
                )
                report = read_json(folder / "repair.json")
                measured, perplexity = report["measurements"][task], report["measurements"]["perplexity"]
                repairs.append(
                    {
                        **{
                            key: report[key]
                            for key in ("task", "scores_type", "if_weight", "bottom_k", "learning_rate")
                        },
                        "before": measured["before"],
                        "after": measured["after"],
                        "improvement_percent": measured["improvement_percent"],
                        "perplexity_before": perplexity["before"],
                        "perplexity_after": perplexity["after"],
                        "perplexity_change_percent": perplexity["change_percent"],
                        "planted_chosen": len(set(report["indices"]) & set(planted[task])),
                    }
                )
    return repairs


def main(settings: Settings) -> None:
    """Run the steps, then show."""
    seconds = run_steps(settings)
    repairs = collect_repairs(settings)
    results = paths.anchored(settings.OUTPUT_DIR) / "results"
    summary = {"model": settings.MODEL_NAME, "repairs": repairs, "seconds": seconds}
    write_atomically(results / "summary.json", to_json(summary))
    budget = settings.PERPLEXITY_BUDGET_PERCENT
    repairs_figure(repairs, budget, results / "demo.png")
    say(f"\n== what the repairs did: the best step size of each that costs at most {budget:g} % perplexity\n")
    say(repairs_table(best_within_budget(repairs, budget)))
    say("\nbefore and after: log-odds losses on the test pairs in nats per token, lower is better.")
    say("planted: how many of the unlearned dialogues are harm of that kind that the demo's data was seeded with.")
    say("\nseconds: " + ", ".join(f"{step} {spent:g}" for step, spent in seconds.items()))
    say(f"picture: {shown_path(results / 'demo.png')}   numbers: {shown_path(results / 'summary.json')}")


if __name__ == "__main__":
    run_step(main)
