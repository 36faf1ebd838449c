"""Paths of all artifacts: one function for each, used by its writer and by every reader.

`model_name` is the last part of a model's name, `output_dir` the run's OUTPUT_DIR. Numbers in names are written
with `:g`, so that 10.0 is `10`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.console import UserError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
DEFAULT_SEED, PAPER_BUDGET = 42, 0.01  # in whose place a name has others

# The scripts, by their paths in the repository.
STEP_0, STEP_1 = "data/make_sft_model.py", "compute_factors_and_scores.py"
STEP_2, STEP_3 = "representations/train_reps.py", "dpp/greedy_dpp.py"
STEP_4, STEP_5 = "make_gradients.py", "gradient_ascent_and_save.py"
STEP_6 = {  # by metric
    "anthropic": "evaluation_scripts/anthropic_eval.py",
    "bias": "evaluation_scripts/bias_loss.py",
    "ethics": "evaluation_scripts/ethics_loss.py",
    "truth": "evaluation_scripts/truth_loss.py",
}
PAPER_TABLES = "evaluation_scripts/paper_tables.py"
VALIDATION = "evaluation_scripts/validate_scores.py"
ROBUSTNESS = "evaluation_scripts/robustness.py"
LIST_HARMFUL = "evaluation_scripts/list_harmful.py"


def resolve_path(path: str | Path) -> Path:
    """A path that a user gave: relative paths start at the repository, not at the working directory.

    Raises:
        UserError: no such home directory, or a link that leads back to itself.
    """
    try:
        return (PROJECT_ROOT / Path(path).expanduser()).resolve()
    except (RuntimeError, OSError) as error:
        raise UserError(f"{str(path)!r} is no path that can be followed ({error})") from None


def require_separate(constant: str, value: str, inside: Mapping[str, str | Path]) -> None:
    """Check that a folder that will be replaced as a whole holds nothing else.

    Args:
        constant: that names the folder.
        inside: paths, or hub ids, that may lie in it, by what they are called.

    Raises:
        UserError: one of them does, or this repository.
    """
    folder = resolve_path(value)
    for name, path in {"this repository": PROJECT_ROOT, **inside}.items():
        if resolve_path(path).is_relative_to(folder):
            raise UserError(f"{constant} = {value!r}: {name} lies there; give a folder of its own")


def may_be_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name, and the owner is not a folder in the repository."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not (PROJECT_ROOT / name).parent.is_dir()


def require_not_here(name: str) -> None:
    """Refuse a hub id that is also a folder in the working directory, which the hub's clients would take instead.

    Raises:
        UserError: there is such a folder.
    """
    if os.path.exists(name):  # noqa: PTH110 (which takes any name)
        raise UserError(
            f"{name}: is in the working directory, and relative paths start at the repository; give its full path, or "
            "run from another folder to take the hub's"
        )


def public_name(name: str) -> str:
    """A model or data set as others may read it: a hub id, a path in the repository, or the last part of another path.

    Where a user keeps folders is nobody's business.
    """
    if may_be_hub_id(name):
        return name
    path = Path(os.path.normpath(PROJECT_ROOT / Path(name).expanduser()))
    return path.relative_to(PROJECT_ROOT).as_posix() if path.is_relative_to(PROJECT_ROOT) else path.name


def model_short_name(model: str | Path) -> str:
    """Last part of a hub id or folder: `lomahony/pythia-70m-helpful-sft` -> `pythia-70m-helpful-sft`.

    A symbolic link keeps its own name; `.` and `..` stand for the folders that they mean.
    """
    return Path(os.path.normpath(PROJECT_ROOT / Path(model).expanduser())).name


def experiments_dir(output_dir: str | Path) -> Path:
    """Steps 1 and 4: factors, scores and gradients."""
    return resolve_path(output_dir) / "ekfac_experiments"


def _influence_dir(output_dir: str | Path, seed: int) -> Path:
    suffix = "" if seed == DEFAULT_SEED else f"-{seed}"
    return experiments_dir(output_dir) / f"influence_results{suffix}"


def seed_dir(output_dir: str | Path, seed: int, first_seed: int) -> str:
    """OUTPUT_DIR of one seed of a grid: that of the grid for the first, `seed-N` in it for the others."""
    return str(Path(output_dir) if seed == first_seed else Path(output_dir) / f"seed-{seed}")


def factors_dir(output_dir: str | Path, model_name: str, strategy: str, half_precision: bool, seed: int) -> Path:
    """Step 1: kronfluence's factor files, shared by all tasks."""
    return _influence_dir(output_dir, seed) / model_name / f"factors_{strategy}{'_half' * half_precision}"


def scores_file(
    output_dir: str | Path, task: str, model_name: str, strategy: str, half_precision: bool, seed: int
) -> Path:
    """Step 1: influence scores of one task, tensor `all_modules` (1, N_train)."""
    folder = f"scores_{strategy}{'_half' * half_precision}"
    return _influence_dir(output_dir, seed) / f"{task}_{model_name}" / folder / "pairwise_scores.safetensors"


def token_scores_file(
    output_dir: str | Path, task: str, model_name: str, strategy: str, half_precision: bool, seed: int
) -> Path:
    """Step 1, with COMPUTE_PER_TOKEN_SCORES: a score for the loss of every token, beside the scores."""
    scores = scores_file(output_dir, task, model_name, strategy, half_precision, seed)
    return scores.with_name("per_token_scores.safetensors")


def representations_file(output_dir: str | Path, model_name: str) -> Path:
    """Step 2: tensor `representations` (N_train, hidden)."""
    return resolve_path(output_dir) / "representations" / f"{model_name}_sumreps.safetensors"


def answer_representations_file(output_dir: str | Path, task: str, side: str, model_name: str) -> Path:
    """Step 2, with ANSWERS_OF: tensor `representations` (U, hidden) of a task's "chosen" or "rejected" answers."""
    kind = "answerreps" if side == "rejected" else "chosenreps"
    return resolve_path(output_dir) / "representations" / f"{task}_{model_name}_{kind}.safetensors"


def dpp_file(output_dir: str | Path, task: str, model_name: str, bottom_k: int, if_weight: float) -> Path:
    """Step 3: the chosen indices in pick order."""
    return resolve_path(output_dir) / "dpp" / f"{task}_{model_name}_indices_{bottom_k}_ifweight{if_weight:g}.json"


def gradients_file(output_dir: str | Path, task: str, model_name: str, repair: str, seed: int) -> Path:
    """Step 4: the repair gradient, one tensor for each traced module. `repair` is a `gradient_name`."""
    folder = _influence_dir(output_dir, seed) / f"{task}_{model_name}" / f"query_grads_{repair}"
    return folder / "aggregated_query_grads.safetensors"


def repaired_models_dir(output_dir: str | Path) -> Path:
    """Step 5: all repaired checkpoints."""
    return resolve_path(output_dir) / "gradient_ascent_models"


def repaired_model_dir(output_dir: str | Path, task: str, model_name: str, repair: str, learning_rate: float) -> Path:
    """Step 5: the repaired checkpoint."""
    name = f"{task}_{model_name}_{repair}_lr{learning_rate:g}"
    return repaired_models_dir(output_dir) / name


def results_dir(output_dir: str | Path) -> Path:
    """Everything that is measured, drawn and reported."""
    return resolve_path(output_dir) / "results"


def tables_dir(output_dir: str | Path) -> Path:
    """The tables and ablations of a grid of repairs."""
    return results_dir(output_dir) / "tables"


def harmful_file(
    output_dir: str | Path, task: str, model_name: str, scores_type: str, constants: Mapping[str, Any], bottom_k: int
) -> Path:
    """evaluation_scripts/list_harmful.py: what one ranking of one model holds to be most harmful; no suffix.

    Args:
        constants: those that say which scores of step 1 the ranking takes, with which weights of the tasks; another
            strategy, precision, seed or weight than the default is part of the name.
    """
    strategy, seed = constants.get("FACTOR_STRATEGY", "ekfac"), constants.get("SEED", DEFAULT_SEED)
    weights = constants.get("TASK_WEIGHTS", [1.0])
    ranking = scores_type if strategy == "ekfac" else f"{scores_type}_{strategy}"
    ranking += "_half" * constants.get("USE_HALF_PRECISION", False) + ("" if seed == DEFAULT_SEED else f"_seed{seed}")
    ranking += "" if set(weights) == {1.0} else f"_weights{'-'.join(f'{weight:g}' for weight in weights)}"
    return results_dir(output_dir) / "harmful" / f"{task}_{model_name}_{ranking}_bottom{bottom_k}"


def validation_dir(output_dir: str | Path, model_name: str) -> Path:
    """evaluation_scripts/validate_scores.py: tables and picture of one model's scores."""
    return results_dir(output_dir) / "validation" / model_name


def retraining_dir(output_dir: str | Path, model_name: str, retraining: str) -> Path:
    """evaluation_scripts/validate_scores.py: what one retraining measured, in the manifest of a folder."""
    return validation_dir(output_dir, model_name) / "retrainings" / retraining


def robustness_dir(output_dir: str | Path, model_name: str) -> Path:
    """evaluation_scripts/robustness.py: the tables about one model's repairs."""
    return results_dir(output_dir) / "robustness" / model_name


def stressed_result_file(output_dir: str | Path, model_name: str, stress: str, measured: str, metric: str) -> Path:
    """evaluation_scripts/robustness.py: one measurement of `measured`, the model or a repair of it, after a stress."""
    return robustness_dir(output_dir, model_name) / "measurements" / stress / f"{measured}_{metric}_test.json"


def html_report(output_dir: str | Path) -> Path:
    """evaluation_scripts/paper_tables.py: the page of the last grid."""
    return results_dir(output_dir) / "report.html"


def overview_figure(output_dir: str | Path) -> Path:
    """The sweeps of a grid of repairs, a panel for each repaired task."""
    return tables_dir(output_dir) / "sweeps.png"


def result_file(output_dir: str | Path, model_name: str, metric: str, split: str) -> Path:
    """Steps 5 and 6: one measurement of one model."""
    return results_dir(output_dir) / f"{model_name}_{metric}_{split}.json"


def losses_file(output_dir: str | Path, model_name: str, metric: str, split: str) -> Path:
    """Steps 5 and 6: the losses of single pairs or dialogues that a result was computed from."""
    return results_dir(output_dir) / "losses" / f"{model_name}_{metric}_{split}_losses.safetensors"


def report_file(output_dir: str | Path, checkpoint_name: str) -> Path:
    """Step 5: what one repair did; the same content as repair.json in its checkpoint."""
    return results_dir(output_dir) / f"{checkpoint_name}_repair.json"


def search_file(output_dir: str | Path, task: str, model_name: str, repair: str, budget: float) -> Path:
    """Step 5 with LEARNING_RATE = "auto": the rates that were tried, and the one that was chosen.

    Args:
        budget: PPL_BUDGET; only another than the paper's is in the name.
    """
    of_budget = "" if budget == PAPER_BUDGET else f"_budget{budget:g}"
    return results_dir(output_dir) / f"{task}_{model_name}_{repair}_search{of_budget}.json"


def sweep_file(output_dir: str | Path, task: str, model_name: str, repair: str) -> Path:
    """Step 5 with a list of learning rates: perplexity and the three tasks at each; a CSV is stored beside it."""
    return results_dir(output_dir) / f"{task}_{model_name}_{repair}_sweep.json"


def sweep_figure(output_dir: str | Path, task: str, model_name: str) -> Path:
    """The sweeps of all methods, as one figure."""
    return results_dir(output_dir) / f"{task}_{model_name}_sweep.png"
