"""After step 5: how much of a repair's improvement is left after what happens to models in practice.

    python evaluation_scripts/robustness.py
    python evaluation_scripts/robustness.py --REPAIRED_MODEL_NAMES gradient_ascent_models/NAME --BITS 8

The POST-SFT model and its repaired checkpoints go through the same stresses, and are measured on the test split:

- none: as they are
- intN: weights rounded to N bits, those of every nn.Linear in the transformer blocks; embeddings, output head, norms,
  biases and activations stay as they are. Simulated: the rounded weights are computed with in float32
- fine-tuned: a few further steps on the training dialogues, the same ones in the same order for every model

A repaired model is compared with the POST-SFT model after the same stress. Every measurement is kept on its own, and a
run that was killed goes on with the next one. Writes results/robustness/.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from steps import run_step
from utils import paths
from utils.artifacts import FileArtifact
from utils.console import UserError, banner, progress_bar, say, shown_path
from utils.evaluation import EvaluationModel, Evaluator
from utils.fine_tuning import fine_tune, micro_batch_size, training_device
from utils.locks import locked
from utils.model_fingerprints import model_fingerprint
from utils.performance_functions.hh import Dialogues, load_dialogues, tokenize_dialogues
from utils.processes import launched
from utils.registry import repaired_checkpoints, stressed_artifacts
from utils.repair_record import repaired_task
from utils.reporting.robustness import robustness_table
from utils.reporting.tables import Row
from utils.results import Metric, Result, compare, improvement_sums, share_left
from utils.settings import (
    TASK_NAMES,
    Between,
    Choices,
    ModelNames,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Settings,
    require_distinct_models,
)
from utils.transformer_blocks import find_blocks, traced_linear_names

Bits = Annotated[int, Between(2, 8)]

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
REPAIRED_MODEL_NAMES: ModelNames | None = None  # folders that step 5 made from it; None = all of them below OUTPUT_DIR
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
SEED: Seed = 42  # of the dialogues to fine-tune on, and of their order
DEVICE: str = "auto"  # "auto", "cpu", "cuda"
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

BITS: Choices[Bits] | None = [8, 4]  # of rounded weights, 2 to 8; None rounds nothing
GROUP_SIZE: PositiveInt = 32  # inputs of a row that share a scale, below 8 bits; at 8 bits the whole row shares one
NUM_FINE_TUNING_STEPS: NonNegativeInt = 20  # optimizer steps; 0 leaves the fine-tuning out
BATCH_SIZE: PositiveInt = 16  # dialogues per optimizer step
BATCH_SIZE_PER_DEVICE: PositiveInt = 2  # most dialogues per forward pass; fewer take less memory
LEARNING_RATE: PositiveFloat = 1e-5  # peak
# -----------------------------------------------------------------------------------------------------------

METRICS = ("anthropic", *TASK_NAMES)
ONE_SCALE_PER_ROW = 8  # bits


class Stress(NamedTuple):
    """Something that happens to a model.

    Attributes:
        constants: that it depends on.
        inputs: fingerprints of what it depends on beside the model.
        apply: changes a model in place.
    """

    name: str
    constants: dict[str, Any]
    inputs: dict[str, str]
    apply: Callable[[EvaluationModel], None]


# -- weight rounding ---------------------------------------------------------------------------------------------------


def rounded(weight: torch.Tensor, bits: int, group_size: int | None) -> torch.Tensor:
    """Symmetric round-to-nearest: scale * round(w / scale), with scale = max |w| / (2^(bits - 1) - 1) of each group.

    The baseline that is called RTN in Frantar et al. (2023, GPTQ) and Lin et al. (2024, AWQ).

    Args:
        weight: (out, in).
        group_size: neighbouring inputs that share a scale; the last group of a row may be smaller. None: the whole row.
    """
    num_inputs = weight.shape[1]
    size = min(group_size or num_inputs, num_inputs)
    groups = F.pad(weight, (0, -num_inputs % size)).unflatten(1, (-1, size))  # (out, groups, size)
    scale = groups.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    whole = torch.where(scale > 0, groups / scale, 0.0).round()  # a group of zeros stays one
    return (scale * whole).flatten(1)[:, :num_inputs]


@torch.no_grad()
def round_weights(model: nn.Module, bits: int, group_size: int | None) -> None:
    """Replace the weight of every nn.Linear in the transformer blocks by the rounded one.

    Raises:
        UserError: the model has no such blocks, or they share a weight with another module.
    """
    num_blocks = len(model.get_submodule(find_blocks(model, "auto")))
    for name in traced_linear_names(model, "auto", num_blocks):
        weight = model.get_submodule(name).weight
        weight.copy_(rounded(weight, bits, group_size))


# -- further fine-tuning -----------------------------------------------------------------------------------------------


def fine_tuning_dialogues(settings: Settings, train: Dialogues) -> Dialogues:
    """As many random training dialogues as the steps take.

    Raises:
        UserError: there are too few, or BATCH_SIZE does not fit the number of processes.
    """
    micro_batch_size(settings, launched())
    count, most = settings.NUM_FINE_TUNING_STEPS * settings.BATCH_SIZE, len(train) // settings.BATCH_SIZE
    if count > len(train):
        raise UserError(
            f"NUM_FINE_TUNING_STEPS = {settings.NUM_FINE_TUNING_STEPS}: with BATCH_SIZE = {settings.BATCH_SIZE} they "
            f"take {count:,} dialogues, and {train.source} has {len(train):,}; allowed: 0 to {most}"
        )
    return train.at(random.Random(settings.SEED).sample(range(len(train)), count))


def fine_tune_further(settings: Settings, dialogues: Dialogues, evaluated: EvaluationModel) -> None:
    """Fine-tune a model once over the dialogues, with completion-only loss as in data/make_sft_model.py."""
    once = {"NUM_EPOCHS": 1, "GRADIENT_CHECKPOINTING": False, "SAVE_EVERY": None}
    recipe = Settings(**{**vars(settings), **once})
    examples = tokenize_dialogues(dialogues, evaluated.tokenizer)
    with (
        TemporaryDirectory(prefix="fine-tuning-") as folder,
        progress_bar(settings.NUM_FINE_TUNING_STEPS, "fine-tuning", "steps") as bar,
    ):
        fine_tune(evaluated.model, evaluated.tokenizer, examples, recipe, Path(folder), None, bar)


def stresses(settings: Settings) -> Iterator[Stress]:
    """All that the constants ask for, beginning with none.

    Raises:
        UserError: as `fine_tuning_dialogues`.
    """
    yield Stress("none", {}, {}, lambda _: None)
    for bits in settings.BITS or []:
        size = settings.GROUP_SIZE if bits < ONE_SCALE_PER_ROW else None
        apply = functools.partial(lambda bits, size, evaluated: round_weights(evaluated.model, bits, size), bits, size)
        yield Stress(f"int{bits}", {"BITS": bits, "GROUP_SIZE": size}, {}, apply)
    if settings.NUM_FINE_TUNING_STEPS:
        train = load_dialogues(settings.HH_DATASET, "train")
        constants = settings.pick("NUM_FINE_TUNING_STEPS", "BATCH_SIZE", "LEARNING_RATE", "SEED")
        apply = functools.partial(fine_tune_further, settings, fine_tuning_dialogues(settings, train))
        yield Stress("fine-tuned", constants, {"dataset": train.fingerprint}, apply)


# -- what is left ------------------------------------------------------------------------------------------------------


def repair_rows(
    model: str, task: str, before: Mapping[str, Mapping[Metric, Result]], after: Mapping[str, Mapping[Metric, Result]]
) -> Iterator[Row]:
    """What a repair changed under each stress, against the POST-SFT model under the same.

    Args:
        task: that the model was repaired for.
        before: results of the POST-SFT model, by stress and metric.
        after: results of the repaired model.
    """
    own = TASK_NAMES if task == "combined" else (task,)
    improvements = {
        stress: [improvement_sums(before[stress][name].losses, results[name].losses) for name in own]
        for stress, results in after.items()
    }
    for stress, results in after.items():
        row: Row = {"model": model, "task": task, "stress": stress}
        for metric, result in results.items():
            for name, numbers in compare(metric, before[stress][metric].losses, result.losses).items():
                row |= {f"{name}_{key}": value for key, value in numbers.items()}
        share = share_left(improvements["none"], improvements[stress])
        yield row | (share.fields("share_left") if share else {"share_left": None})


# -- the step ----------------------------------------------------------------------------------------------------------


class Measurer:
    """Measures models under stresses on the test split; a stored measurement is read.

    Args:
        fingerprints: of all models that will be measured.
    """

    def __init__(self, settings: Settings, fingerprints: Mapping[str, str]) -> None:
        self.settings, self.fingerprints = settings, fingerprints
        self.evaluator = Evaluator(settings, "test")

    def outputs(self, model: str, stress: Stress) -> dict[Metric, tuple[FileArtifact, FileArtifact]]:
        """Where the results and their losses are kept, by metric."""
        measured = (paths.model_short_name(model), self.fingerprints[model], *stress[:3])
        return {
            metric: stressed_artifacts(self.settings, *measured, metric, self.evaluator.data(metric))
            for metric in METRICS
        }

    def measure(self, model: str, stress: Stress) -> dict[Metric, Result]:
        """The results by metric; those without a stress are step 5's."""
        name, fingerprint = paths.model_short_name(model), self.fingerprints[model]

        @functools.cache
        def load() -> EvaluationModel:
            evaluated = EvaluationModel.load(model, training_device(self.settings.DEVICE))
            stress.apply(evaluated)
            return evaluated

        banner(f"robustness: {stress.name}", model)
        if stress.name == "none":
            return {metric: self.evaluator.result(metric, name, fingerprint, load) for metric in METRICS}
        outputs = self.outputs(model, stress)
        with locked(*(output.path for both in outputs.values() for output in both)):
            return {metric: self.evaluator.result_at(metric, name, load, *both) for metric, both in outputs.items()}


def repaired_models(settings: Settings, fingerprint: str) -> dict[str, str]:
    """REPAIRED_MODEL_NAMES, or all repairs of MODEL_NAME below OUTPUT_DIR, each with the task that it was repaired for.

    Args:
        fingerprint: of MODEL_NAME.

    Raises:
        UserError: there is none, or one is not a folder that step 5 made from MODEL_NAME as it is now.
    """
    found = settings.REPAIRED_MODEL_NAMES or repaired_checkpoints(settings.OUTPUT_DIR, fingerprint)
    if not found:
        raise UserError(
            f"REPAIRED_MODEL_NAMES = None: {paths.repaired_models_dir(settings.OUTPUT_DIR)} has no repaired checkpoint "
            f"of {settings.MODEL_NAME}; run {paths.STEP_5} first, or name one"
        )
    require_distinct_models([settings.MODEL_NAME, *found], "MODEL_NAME and REPAIRED_MODEL_NAMES")
    return {repaired: repaired_task(repaired, settings.MODEL_NAME, fingerprint) for repaired in found}


def main(settings: Settings) -> None:
    """Measure the model and its repairs under every stress, and compare."""
    training_device(settings.DEVICE)  # a wrong one is refused before the work
    model, name = settings.MODEL_NAME, paths.model_short_name(settings.MODEL_NAME)
    fingerprints = {model: model_fingerprint(model)}
    repaired, planned = repaired_models(settings, fingerprints[model]), list(stresses(settings))
    measurer = Measurer(settings, fingerprints | {one: model_fingerprint(one) for one in repaired})
    for one, stress in itertools.product(measurer.fingerprints, planned[1:]):
        for output in itertools.chain(*measurer.outputs(one, stress).values()):
            output.is_finished(settings.OVERWRITE)  # one of other constants is refused before the work
    before = {stress.name: measurer.measure(model, stress) for stress in planned}
    rows = []
    for one, task in repaired.items():
        after = {stress.name: measurer.measure(one, stress) for stress in planned}
        rows += repair_rows(paths.model_short_name(one), task, before, after)
    table, path = robustness_table(name, before, rows), paths.robustness_dir(settings.OUTPUT_DIR, name) / "robustness"
    with locked(path):
        table.write(path)
    say(f"\n{table.markdown()}\ntable: {shown_path(path.with_suffix('.md'))}, .tex and .csv")


if __name__ == "__main__":
    run_step(main)
