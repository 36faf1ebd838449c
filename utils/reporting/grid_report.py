"""What the report on a grid of repairs shows: tables, figures, unlearned dialogues, completions before and after."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import torch

from utils import paths
from utils.artifacts import FileArtifact
from utils.locks import locked
from utils.manifests import software_versions
from utils.methods import METHODS
from utils.models import load_tokenizer
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues, kinds_of_rows, load_dialogues
from utils.rankings import combined_token_scores, load_token_scores
from utils.registry import SCORES_TENSOR
from utils.reporting.figures import is_whole_picture
from utils.reporting.html import STRONGEST, Completion, Example, Picture, Report, Subset
from utils.reporting.tables import Row, Table
from utils.settings import Settings

INTRODUCTION = (
    "Each repair finds the training dialogues that made the model less trustworthy and takes one natural-gradient step "
    "up their loss, in the last transformer block(s) only. Improvement is before - after of a log-odds loss on the "
    "test pairs, in nats per token, with its 95 % interval in brackets; perplexity is measured on the test dialogues. "
    "Both are relative to the same POST-SFT model.\n\n"
    "An improvement in one measurement does not make a model safe: look at what a repair did to the other tasks, and "
    "read what it unlearned."
)
NOTES = {  # how each SCORES_TYPE that has a subset chooses its dialogues
    "pure_ekfac": "The most negative influence scores, most harmful first.",
    "dpp": "The greedy picks in order, diverse and harmful; gains are what each pick added to the objective.",
    "ekfac_cg": "The most negative influence scores with the Gauss-Newton matrix itself as curvature.",
    "identity": "The smallest plain gradient dot products, without curvature.",
    "representation": "The dialogues most similar to the task's untrustworthy answers in representation space.",
    "mean_difference": "The dialogues that lie towards the task's untrustworthy and away from its trustworthy answers.",
    "bm25": "The dialogues worded like the task's untrustworthy and unlike its trustworthy answers.",
    "contrast": "The most negative influence scores, whose loss goes up; that of the most helpful goes down.",
    "dpp_weighted": "The greedy picks in order, each unlearned by its score.",
    **dict.fromkeys(("ga", "ga_kl", "npo", "task_vector"), "The most negative influence scores, most harmful first."),
    **dict.fromkeys(("random", "npo_random"), "A seeded uniform sample, for comparison."),
}


def report_on(
    settings: Settings,
    rows: Sequence[Row],
    tables: Sequence[Table],
    known_harm: Mapping[str, Collection[int]] | None,
) -> Report:
    """The report on a grid of repairs; dialogues and completions are those of the main table's first seed.

    Args:
        settings: constants of evaluation_scripts/paper_tables.py.
        rows: one row for each repair and seed.
        known_harm: rows of the training split, by kind of harm.
    """
    first = {"seed": settings.SEEDS[0], "bottom_k": settings.BOTTOM_K[0], "if_weight": settings.IF_WEIGHT[0]}
    detailed = [row for row in rows if all(row[name] == value for name, value in first.items())]
    unlearned: dict[tuple, Row] = {}  # preserving perplexity or not unlearns the same dialogues: shown once
    for row in detailed:
        if row["indices"]:
            unlearned.setdefault((row["model"], row["task"], row["scores_type"]), row)
    return Report(
        title="What the repairs did",
        introduction=INTRODUCTION,
        facts=_facts(settings),
        tables=list(tables),
        pictures=_pictures(settings),
        subsets=_subsets(settings, list(unlearned.values()), known_harm or {}),
        completions=[completion for row in detailed for completion in _completions(settings, row)],
    )


def _facts(settings: Settings) -> dict[str, str]:
    return {
        "models": ", ".join(settings.MODEL_NAMES),
        "dialogues": settings.HH_DATASET,
        "seeds": ", ".join(map(str, settings.SEEDS)),
        "learning rate": f"{settings.LEARNING_RATE}, perplexity budget {settings.PPL_BUDGET:.1%}",
        "CPU cores": str(os.cpu_count()),
        "versions": ", ".join(f"{name} {version}" for name, version in software_versions().items()),
    }


def _pictures(settings: Settings) -> list[Picture]:
    """The figures that have been drawn, and are whole: the overview, each task's sweeps, the ablations."""
    budget = f"shaded: at most {settings.PPL_BUDGET:.1%} more perplexity"
    captions = {paths.overview_figure(settings.OUTPUT_DIR): f"Improvement of the repaired task; {budget}"}
    for model in map(paths.model_short_name, settings.MODEL_NAMES):
        for task in settings.TASKS:
            figure = paths.sweep_figure(settings.OUTPUT_DIR, task, model)
            captions[figure] = f"{model}, repaired for {task}: the effect on every task"
    folder = paths.tables_dir(settings.OUTPUT_DIR)
    if len(settings.BOTTOM_K) > 1:  # otherwise it is of an earlier grid
        captions[folder / "bottom_k.png"] = "Effect of the number of unlearned dialogues"
    if len(settings.IF_WEIGHT) > 1:
        captions[folder / "if_weight.png"] = "Effect of the weight of influence against diversity"
    pictures = []
    for file, caption in captions.items():
        with locked(file):  # another run may be drawing it again
            if is_whole_picture(file):
                pictures.append(Picture(caption, file))
    return pictures


class _TokenColours:
    """The token scores of one model, as they are shown on a completion's text; nothing where there are none.

    Args:
        model: short name.
        scores: (N,) of every task, for "combined".
    """

    def __init__(
        self, settings: Settings, model: str, scores: Mapping[str, torch.Tensor], dialogues: Dialogues
    ) -> None:
        self.dialogues, self._of_task, self._offsets, self._tokenizer = dialogues, {}, None, None
        for task in scores if settings.COMPUTE_PER_TOKEN_SCORES else ():
            where = (task, model, "ekfac", settings.USE_HALF_PRECISION, settings.SEEDS[0])
            made_by = f"{paths.STEP_1} --COMPUTE_PER_TOKEN_SCORES True"
            file = FileArtifact(paths.token_scores_file(settings.OUTPUT_DIR, *where), made_by, quiet=True)
            self._of_task[task], self._offsets = load_token_scores(file, len(dialogues))
        if self._of_task:
            self._of_task["combined"] = combined_token_scores(self._of_task, scores)
            names = {paths.model_short_name(name): name for name in settings.MODEL_NAMES}
            self._tokenizer = load_tokenizer(names[model])

    def pieces(self, task: str, row: int) -> list[tuple[int, int]]:
        """As `Example.pieces`; tokens that share a character, such as the bytes of an emoji, are one piece."""
        if task not in self._of_task or not self._tokenizer.is_fast:
            return []
        scores = self._of_task[task][self._offsets[row] : self._offsets[row + 1]]
        prompt, text = self.dialogues.prompts[row], self.dialogues.prompts[row] + self.dialogues.completions[row]
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ends = [end - len(prompt) for _, end in encoded["offset_mapping"]]
        lengths, summed, start = [], [], 0
        for end, score in zip(ends, scores.tolist(), strict=False):  # a dialogue may be cut, or end with an EOS
            if end > start:
                lengths.append(end - start)
                summed.append(score)
                start = end
            elif summed:
                summed[-1] += score
        largest = max(map(abs, summed), default=0.0) or 1.0
        return [(length, round(STRONGEST * score / largest)) for length, score in zip(lengths, summed, strict=True)]


def _influence_scores(settings: Settings, model: str) -> dict[str, torch.Tensor]:
    """Scores (N,) of every task, for a model that was traced with SEEDS[0]."""
    where = (model, "ekfac", settings.USE_HALF_PRECISION, settings.SEEDS[0])
    files = {task: paths.scores_file(settings.OUTPUT_DIR, task, *where) for task in MEASUREMENTS}
    artifacts = {task: FileArtifact(file, paths.STEP_1, quiet=True) for task, file in files.items() if file.exists()}
    return {
        task: artifact.load_tensors({SCORES_TENSOR: (1, None)})[SCORES_TENSOR].squeeze(0)
        for task, artifact in artifacts.items()
    }


def _subsets(settings: Settings, rows: Sequence[Row], known_harm: Mapping[str, Collection[int]]) -> list[Subset]:
    dialogues = load_dialogues(settings.HH_DATASET, "train")
    kinds = kinds_of_rows(known_harm)
    scores = {model: _influence_scores(settings, model) for model in dict.fromkeys(row["model"] for row in rows)}
    colours = {model: _TokenColours(settings, model, scores[model], dialogues) for model in scores}
    subsets = []
    for row in rows:
        gains: dict[str, list[float]] = {}
        if METHODS[row["scores_type"]].subset == "diverse":
            location = (row["task"], row["model"], row["bottom_k"], row["if_weight"])
            picks = FileArtifact(paths.dpp_file(settings.OUTPUT_DIR, *location), paths.STEP_3).load_json()
            gains = {name: picks[f"{name}_gains"] for name in ("diversity", "influence")}
        examples = [
            Example(
                rank=position + 1,
                row=index,
                scores={task: float(values[index]) for task, values in scores[row["model"]].items()},
                gains={name: values[position] for name, values in gains.items()},
                known_harm=kinds.get(index),
                prompt=dialogues.prompts[index],
                completion=dialogues.completions[index],
                pieces=colours[row["model"]].pieces(row["task"], index),
            )
            for position, index in enumerate(row["indices"])
        ]
        model = "" if len(settings.MODEL_NAMES) == 1 else f"{row['model']}: "
        title = f"{model}{row['task']}, chosen by {row['scores_type']}"
        subsets.append(Subset(title, NOTES[row["scores_type"]], examples))
    return subsets


def _completions(settings: Settings, row: Row) -> list[Completion]:
    """The completions that step 5 kept for a repair; none where NUM_COMPLETIONS is 0."""
    location = (row["task"], row["model"], row["repair"], row["learning_rate"])
    folder = paths.repaired_model_dir(settings.OUTPUT_DIR, *location)
    file = paths.result_file(settings.OUTPUT_DIR, folder.name, "completions", "test")
    kept = FileArtifact(file, paths.STEP_5).load_json() if file.exists() else []
    name = f"{row['model']}, {row['task']}: {row['method']}"
    return [Completion(text["task"], name, text["prompt"], text["before"], text["after"]) for text in kept]
