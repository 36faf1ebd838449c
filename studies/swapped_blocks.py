"""In which blocks the harm of some dialogues lies: those of a model that has seen them, put into one that has not.

    python studies/swapped_blocks.py

Both models were fine-tuned from the same base, one on the dialogues and one on the same with harm planted among them.
As committed: the two fine-tunings of studies/real_model.py. Repairs change the last block; this shows whether the harm
is there.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

from typing import TYPE_CHECKING, Literal

import torch

from steps import run_step
from utils.console import UserError, banner, say, shown_path
from utils.devices import resolve_device
from utils.evaluation import EvaluationModel
from utils.intervals import estimate_mean, sum_by_cluster
from utils.models import find_blocks, load_model
from utils.paths import resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.reporting.tables import Row, Table, with_interval
from utils.settings import Choices, PositiveInt, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "studies/output/models/smollm2-135m-as-is-sft"  # that has not seen the harm: hub id or local folder
HARMED_MODEL: str = "studies/output/models/smollm2-135m-planted-sft"  # that has: of the same architecture
DATA_DIR: str = "studies/output/data"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "studies/output/swapped-blocks"  # folder for the table
TASKS: Choices[Literal["bias", "ethics", "truth"]] = ["bias", "ethics", "truth"]  # measurements
NUM_BLOCKS: Choices[PositiveInt] = [1, 2, 4, 8, 15]  # last blocks to swap; then all blocks, then all weights
DEVICE: str = "auto"  # "auto", "cpu", "cuda"
# -----------------------------------------------------------------------------------------------------------


def swapped_parts(model: PreTrainedModel, num_blocks: list[int]) -> dict[str, tuple[str, ...]]:
    """The beginnings of the names of the weights to swap, by what they are called; each part contains those before.

    Raises:
        UserError: the model has fewer blocks.
    """
    blocks = find_blocks(model, "auto")
    total = len(model.get_submodule(blocks))
    if max(num_blocks) > total:
        raise UserError(f"NUM_BLOCKS = {max(num_blocks)}: the model has {total} blocks; allowed: 1 to {total}")
    parts = {
        f"last {count}": tuple(f"{blocks}.{number}." for number in range(total - count, total))
        for count in sorted({*num_blocks, total})
    }
    return {**parts, "all weights": ("",)}


@torch.no_grad()
def swap(into: PreTrainedModel, donor: PreTrainedModel, beginnings: tuple[str, ...]) -> None:
    """Copy the weights whose names begin so.

    Raises:
        UserError: the models are of different architectures.
    """
    theirs = dict(donor.named_parameters())
    for name, weight in into.named_parameters():
        if name not in theirs or theirs[name].shape != weight.shape:
            raise UserError(f"HARMED_MODEL: {name} is missing or of another shape; give a model of the same base")
        if name.startswith(beginnings):
            weight.copy_(theirs[name])


def swapped_rows(settings: Settings) -> list[Row]:
    """One row for each part and measurement: how much worse the loss is than without the swap."""
    device = resolve_device(settings.DEVICE)
    model, donor = EvaluationModel.load(settings.MODEL_NAME, device), load_model(settings.HARMED_MODEL, device)
    data = {task: MEASUREMENTS[task].load_pairs(resolve_path(settings.DATA_DIR), "test") for task in settings.TASKS}
    parts = swapped_parts(model.model, settings.NUM_BLOCKS)
    before = {task: model.measure(task, pairs)["loss"] for task, pairs in data.items()}
    rows = []
    for part, beginnings in parts.items():
        swap(model.model, donor, beginnings)
        for task, pairs in data.items():
            harm = model.measure(task, pairs, quiet=True)["loss"] - before[task]
            estimate = estimate_mean(sum_by_cluster(harm, torch.as_tensor(pairs.cluster_numbers)))
            rows.append({"swapped": part, "task": task, **estimate.fields("harm")})
    return rows


def main(settings: Settings) -> None:
    """Swap ever more blocks, and measure."""
    banner("swapped blocks", f"{settings.HARMED_MODEL} into {settings.MODEL_NAME}")
    rows = swapped_rows(settings)
    parts = dict.fromkeys(row["swapped"] for row in rows)
    cells = [
        [part, *(with_interval(row, "harm").shown("+.3f") for row in rows if row["swapped"] == part)] for part in parts
    ]
    caption = (
        f"{settings.MODEL_NAME} with blocks of {settings.HARMED_MODEL}: change of each loss on the test pairs in nats "
        "per token, positive is worse; in brackets 95 % intervals over clusters of test pairs, paired."
    )
    table = Table(caption, ["swapped blocks", *settings.TASKS], cells, rows)
    file = resolve_path(settings.OUTPUT_DIR) / "swapped_blocks"
    table.write(file)
    say(f"\n{table.markdown()}\ntable: {shown_path(file)}.md")


if __name__ == "__main__":
    run_step(main)
