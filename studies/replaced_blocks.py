"""Which blocks carry the planted harm: those of the model fine-tuned with it, put into the one fine-tuned without.

    python studies/replaced_blocks.py

Both models were fine-tuned from the same base, one on the dialogues and one on the same with harm planted among them.
As committed: the two of studies/real_model.py, which runs first. Repairs change the last block; this shows whether the
harm is there.
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
from utils.intervals import estimate_difference
from utils.models import load_model
from utils.paths import resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.reporting.tables import Row, Table, with_interval
from utils.results import quantities
from utils.settings import Choices, PositiveInt, Settings
from utils.transformer_blocks import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "studies/output/models/smollm2-135m-as-is-sft"  # that has not seen the harm: hub id or local folder
HARMED_MODEL: str = "studies/output/models/smollm2-135m-planted-sft"  # that has: of the same architecture
DATA_DIR: str = "studies/output/data"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "studies/output/replaced-blocks"  # folder for the table
TASKS: Choices[Literal["bias", "ethics", "truth"]] = ["bias", "ethics", "truth"]  # measurements
REPLACED_BLOCKS: Choices[PositiveInt] = [1, 2, 4, 8, 15]  # last blocks to replace; then all, then all weights
DEVICE: str = "auto"  # "auto", "cpu", "cuda"
# -----------------------------------------------------------------------------------------------------------


def replaced_parts(model: PreTrainedModel, counts: list[int]) -> dict[str, tuple[str, ...]]:
    """The prefixes of the names of the weights to replace, by what they are called; each part contains those before.

    Raises:
        UserError: the model has fewer blocks.
    """
    blocks = find_blocks(model, "auto")
    total = len(model.get_submodule(blocks))
    if max(counts) > total:
        raise UserError(f"REPLACED_BLOCKS = {max(counts)}: the model has {total} blocks; allowed: 1 to {total}")
    parts = {
        f"last {count}" if count < total else f"all {total}": tuple(
            f"{blocks}.{number}." for number in range(total - count, total)
        )
        for count in sorted({*counts, total})
    }
    return {**parts, "all weights": ("",)}


def require_alike(model: PreTrainedModel, donor: PreTrainedModel, settings: Settings) -> None:
    """Check that two models have the same weights but for their values.

    Raises:
        UserError: they have not.
    """
    ours, theirs = ({name: weight.shape for name, weight in one.named_parameters()} for one in (model, donor))
    if differing := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
        raise UserError(
            f"HARMED_MODEL = {settings.HARMED_MODEL!r}: {differing[0]} is not as in MODEL_NAME = "
            f"{settings.MODEL_NAME!r}; give two models that were fine-tuned from one base"
        )


def harm_by_part(settings: Settings) -> list[Row]:
    """One row for each part and measurement: how much worse the loss is than before anything was replaced."""
    device = resolve_device(settings.DEVICE)
    data = {task: MEASUREMENTS[task].load_pairs(resolve_path(settings.DATA_DIR), "test") for task in settings.TASKS}
    measured, donor = EvaluationModel.load(settings.MODEL_NAME, device), load_model(settings.HARMED_MODEL, device)
    require_alike(measured.model, donor, settings)
    parts = replaced_parts(measured.model, settings.REPLACED_BLOCKS)
    before = {task: quantities(measured.measure(task, pairs))["loss"] for task, pairs in data.items()}
    theirs, rows = dict(donor.named_parameters()), []
    for part, prefixes in parts.items():
        with torch.no_grad():
            for name, weight in measured.model.named_parameters():
                if name.startswith(prefixes):
                    weight.copy_(theirs[name])
        for task, pairs in data.items():
            after = quantities(measured.measure(task, pairs, quiet=True))["loss"]
            rows.append({"replaced": part, "task": task, **estimate_difference(after, before[task]).fields("harm")})
    return rows


def main(settings: Settings) -> None:
    """Replace ever more blocks, and measure."""
    banner("replaced blocks", f"{settings.HARMED_MODEL} into {settings.MODEL_NAME}")
    rows = harm_by_part(settings)
    parts = dict.fromkeys(row["replaced"] for row in rows)
    cells = [
        [part, *(with_interval(row, "harm").shown("+.3f") for row in rows if row["replaced"] == part)] for part in parts
    ]
    caption = (
        f"{settings.MODEL_NAME} with blocks of {settings.HARMED_MODEL}: change of each loss on the test pairs in nats "
        "per token, positive is worse; in brackets 95 % intervals over clusters of test pairs, paired."
    )
    table = Table(caption, ["replaced blocks", *settings.TASKS], cells, rows)
    file = resolve_path(settings.OUTPUT_DIR) / "replaced_blocks"
    table.write(file)
    say(f"\n{table.markdown()}\ntable: {shown_path(file)}.md")


if __name__ == "__main__":
    run_step(main)
