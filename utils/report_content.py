"""What the report shows: tables, pictures, the unlearned dialogues with their scores, completions before and after."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

from safetensors.torch import load_file

from utils import paths
from utils.artifacts import read_json, software_versions
from utils.influence import SCORES_NAME
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, load_dialogues
from utils.report import Completion, Example, Picture, Report, Subset, Table
from utils.settings import Settings
from utils.tables import Row, ShownTable

INTRODUCTION = (
    "Each repair finds training dialogues that made the model less trustworthy, and takes one natural-gradient step up "
    "their loss in the last transformer block(s). Improvement is (before - after) / |before| of a log-odds loss on the "
    "test pairs; perplexity is measured on the test dialogues. Both are against the same POST-SFT model.\n\n"
    "One measurement improved is not a safe model: look at what a repair did to the other tasks, and read what it "
    "unlearned."
)
NOTES = {
    "pure_ekfac": "The most negative influence scores, most harmful first.",
    "dpp": "The greedy's picks in order: diverse and harmful; gains are each pick's share of the objective.",
    "identity": "The smallest plain gradient dot products, without curvature.",
    "representation": "Those most like the task's untrustworthy answers in representation space.",
    "random": "A seeded uniform sample, for comparison.",
}


def report_on(
    settings: Settings,
    rows: Sequence[Row],
    tables: Sequence[ShownTable],
    known_harm: Mapping[str, Collection[int]] | None,
) -> Report:
    """The report on a grid of repairs, of its first seed in detail.

    Args:
        settings: constants of evaluation_scripts/paper_tables.py.
        rows: `grid.repair_row` of every cell and seed.
        known_harm: rows of the training split, by kind.
    """
    first = [row for row in rows if row["seed"] == settings.SEEDS[0]]
    detailed = [row for row in first if row["bottom_k"] == settings.BOTTOM_K[0]]
    detailed = [row for row in detailed if row["if_weight"] == settings.IF_WEIGHT[0]]
    dialogues = load_dialogues(settings.HH_DATASET, "train")
    chosen = [row for row in detailed if row["indices"] and not row["preserve_perplexity"]]
    return Report(
        title="What the repairs did",
        introduction=INTRODUCTION,
        facts=_facts(settings),
        tables=[Table(table.caption, table.header, table.rows) for table in tables],
        pictures=_pictures(settings),
        subsets=[_subset(settings, row, dialogues, known_harm or {}) for row in chosen],
        completions=[completion for row in detailed for completion in _completions(settings, row)],
    )


def _facts(settings: Settings) -> dict[str, str]:
    versions = software_versions()
    return {
        "models": ", ".join(settings.MODEL_NAMES),
        "dialogues": settings.HH_DATASET,
        "seeds": ", ".join(map(str, settings.SEEDS)),
        "learning rate": f"{settings.LEARNING_RATE}, perplexity budget {settings.PPL_BUDGET:.1%}",
        "processor cores": str(os.cpu_count()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _pictures(settings: Settings) -> list[Picture]:
    budget = f"shaded: at most {settings.PPL_BUDGET:.1%} perplexity"
    captions = {paths.overview_figure(settings.OUTPUT_DIR): f"Improvement of the repaired task, {budget}"}
    for model in map(paths.model_short_name, settings.MODEL_NAMES):
        for task in settings.TASKS:
            figure = paths.sweep_figure(settings.OUTPUT_DIR, task, model)
            captions[figure] = f"{model}, repaired for {task}: what became of every task"
    for ablation, caption in (("bottom_k", "How many dialogues are unlearned"), ("if_weight", "Weight of influence")):
        captions[paths.tables_dir(settings.OUTPUT_DIR) / f"{ablation}.png"] = caption
    return [Picture(caption, file) for file, caption in captions.items() if file.exists()]


def _influence_scores(settings: Settings, model: str) -> dict[str, list[float]]:
    """Scores (N,) of every task, for a model that was traced with SEEDS[0]."""
    files = {
        task: paths.scores_file(
            settings.OUTPUT_DIR, task, model, "ekfac", settings.USE_HALF_PRECISION, settings.SEEDS[0]
        )
        for task in MEASUREMENTS
    }
    return {task: load_file(file)[SCORES_NAME][0].tolist() for task, file in files.items() if file.exists()}


def _subset(settings: Settings, row: Row, dialogues: Dialogues, known_harm: Mapping[str, Collection[int]]) -> Subset:
    gains: dict[str, list[float]] = {}
    if row["scores_type"] == "dpp":
        picks = read_json(
            paths.dpp_file(settings.OUTPUT_DIR, row["task"], row["model"], row["bottom_k"], row["if_weight"])
        )
        gains = {"diversity": picks["diversity_gains"], "influence": picks["influence_gains"]}
    scores = _influence_scores(settings, row["model"])
    kind_of = {index: kind for kind, rows in known_harm.items() for index in rows}
    examples = [
        Example(
            rank=position + 1,
            row=index,
            scores={task: values[index] for task, values in scores.items()},
            gains={name: values[position] for name, values in gains.items()},
            known_harm=kind_of.get(index),
            prompt=dialogues.prompts[index],
            completion=dialogues.completions[index],
        )
        for position, index in enumerate(row["indices"])
    ]
    title = f"{row['task']}, chosen by {row['scores_type']}"
    return Subset(
        title if len(settings.MODEL_NAMES) == 1 else f"{row['model']}: {title}", NOTES[row["scores_type"]], examples
    )


def _completions(settings: Settings, row: Row) -> list[Completion]:
    """Those that step 5 kept for a repair; none where NUM_COMPLETIONS is 0."""
    folder = paths.repaired_model_dir(
        settings.OUTPUT_DIR, row["task"], row["model"], row["repair"], row["learning_rate"]
    )
    file = paths.result_file(settings.OUTPUT_DIR, folder.name, "completions", "test")
    kept = read_json(file) if file.exists() else []
    name = f"{row['model']}, {row['task']}: {row['method']}"
    return [Completion(text["task"], name, text["prompt"], text["before"], text["after"]) for text in kept]
