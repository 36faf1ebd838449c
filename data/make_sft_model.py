"""Before step 1: make the POST-SFT model that the steps start from.

    python data/make_sft_model.py
    python data/make_sft_model.py --BASE_MODEL EleutherAI/pythia-160m --HH_DATASET Dahoas/static-hh \
        --SFT_MODEL_DIR models/pythia-160m-hh-sft --LEARNING_RATE 1e-5 --NUM_EPOCHS 1
    accelerate launch --num_processes 4 data/make_sft_model.py ...

Fine-tunes a causal language model on the dialogues of HH_DATASET with completion-only loss. The base is a hub id, a
local folder, or the name of a bare architecture (utils/base_models.py), which starts from random weights and uses
TOKENIZER. The final EOS is trained too, so that the model learns to stop.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time
from typing import Literal

import torch
from transformers import set_seed

from steps import next_command, run_step
from utils.base_models import ARCHITECTURES, base_fingerprints, start_model
from utils.console import UserError, banner, progress_bar, say
from utils.evaluation import EvaluationModel, require_finite_loss
from utils.files import remove, write_whole
from utils.fine_tuning import (
    fine_tune,
    last_checkpoint,
    micro_batch_size,
    num_steps,
    set_checkpoints_aside,
    training_device,
)
from utils.folder_artifacts import FolderArtifact
from utils.locks import locked
from utils.models import save_model, silence_transformers
from utils.paths import STEP_1, require_separate
from utils.performance_functions.hh import Dialogues, load_dialogues, tokenize_dialogues
from utils.processes import first_process_only, launched
from utils.registry import sft_model
from utils.reporting.cards import sft_card
from utils.results import summarise
from utils.settings import PositiveFloat, PositiveInt, Seed, Settings, TrackerName
from utils.tracker import tracking

# ------------------------------------------------------------------------------------------------ constants
BASE_MODEL: str = "pythia-demo"  # hub id, local folder, or "pythia-demo", "pythia-14m", "pythia-70m", "qwen-demo"
TOKENIZER: str | None = "data/demo/tokenizer"  # hub id or local folder, for a bare architecture; others use their own
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
SFT_MODEL_DIR: str = "data/demo/pythia-demo-sft"  # folder to write the model to
NUM_EPOCHS: PositiveInt = 4  # passes over the training split
BATCH_SIZE: PositiveInt = 16  # dialogues per optimizer step, over all processes
BATCH_SIZE_PER_DEVICE: PositiveInt = 16  # most dialogues per forward pass of one process; fewer take less memory
GRADIENT_CHECKPOINTING: bool = False  # recompute activations in the backward pass: less memory, a third more time
LEARNING_RATE: PositiveFloat = 2e-3  # peak; 1e-5 suits a pretrained base
SAVE_EVERY: Literal["auto"] | PositiveInt = "auto"  # steps between checkpoints; "auto" = a tenth of all, at most 500
SEED: Seed = 42  # of the random weights and the order of the dialogues
DEVICE: str = "auto"  # "auto", "cpu", "cuda"
TRACKER: TrackerName | None = None  # also log the training curve to "trackio" or "wandb"
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # replace a model made with other settings
# -----------------------------------------------------------------------------------------------------------


def require_own_folder(settings: Settings) -> None:
    """Check that the model's folder, which OVERWRITE replaces as a whole, holds nothing else that is needed.

    Raises:
        UserError: it is or holds the base, the tokenizer, the dialogues or this repository.
    """
    inside = {"HH_DATASET": settings.HH_DATASET}
    if settings.BASE_MODEL not in ARCHITECTURES:
        inside["BASE_MODEL"] = settings.BASE_MODEL
    elif settings.TOKENIZER:
        inside["TOKENIZER"] = settings.TOKENIZER
    require_separate("SFT_MODEL_DIR", settings.SFT_MODEL_DIR, inside)


def main(settings: Settings) -> None:
    """Fine-tune the model, unless that is already done."""
    banner("POST-SFT model", settings.SFT_MODEL_DIR)
    require_own_folder(settings)
    device = training_device(settings.DEVICE)
    train, test = (load_dialogues(settings.HH_DATASET, split) for split in ("train", "test"))
    output = sft_model(settings, **base_fingerprints(settings), dataset=train.fingerprint)
    with locked(output.path):
        if not output.is_finished(settings.OVERWRITE):
            make_model(settings, device, output, train, test)


def make_model(
    settings: Settings, device: torch.device, output: FolderArtifact, train: Dialogues, test: Dialogues
) -> None:
    """Fine-tune on the training split, measure on the test split, and save."""
    started = time.monotonic()
    micro_batch_size(settings, launched())  # refuses a wrong BATCH_SIZE before the model is loaded
    set_seed(settings.SEED)
    silence_transformers()
    is_bare = settings.BASE_MODEL in ARCHITECTURES
    model, tokenizer = start_model(settings, device)
    evaluation_model = EvaluationModel(model, tokenizer)
    if is_bare:
        say(f"   {settings.BASE_MODEL} with random weights: {model.num_parameters():,} parameters")
    with (
        tracking(settings.TRACKER, settings.SFT_MODEL_DIR, vars(settings)) as tracker,
        output.staging_folder() as folder,
    ):
        checkpoint = last_checkpoint(folder)
        losses = evaluation_model.measure("anthropic", test)
        require_finite_loss(settings.BASE_MODEL, "anthropic", losses)
        before = summarise(losses)["perplexity"]
        examples = tokenize_dialogues(train, tokenizer)
        with progress_bar(num_steps(settings, len(examples)), "fine-tuning", "steps") as bar:
            fine_tune(model, tokenizer, examples, settings, folder, checkpoint, bar, tracker)
        losses = evaluation_model.measure("anthropic", test)
        try:
            require_finite_loss(settings.SFT_MODEL_DIR, "anthropic", losses)
        except UserError:
            first_process_only(remove)(folder)  # nothing there is worth resuming from
            raise
        after = summarise(losses)
        perplexity = {"before": before, "after": after["perplexity"]}
        perplexity |= {f"after_{end}": after[f"perplexity_{end}"] for end in ("low", "high")}
        tracker.log({"perplexity": perplexity["after"]})

        @first_process_only
        def save() -> None:
            save_model(model, settings.TOKENIZER if is_bare else settings.BASE_MODEL, folder)
            write_whole(folder / "README.md", sft_card(vars(settings), len(train), perplexity))
            set_checkpoints_aside(folder)
            output.publish_folder(started, {}, perplexity=perplexity)

        save()
    say(f"   test perplexity {before:.2f} -> {perplexity['after']:.2f}")


if __name__ == "__main__":
    run_step(
        main,
        hint=lambda settings: next_command(STEP_1, settings, MODEL_NAMES=[settings.SFT_MODEL_DIR]),
    )
