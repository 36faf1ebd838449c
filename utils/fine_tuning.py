"""Completion-only fine-tuning with transformers' Trainer, on one process or several."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from utils.batching import IGNORED_LABEL, LabelledSequence
from utils.console import UserError, say, shown_path
from utils.devices import resolve_device
from utils.files import partial_of
from utils.forward import output_logits
from utils.models import load_model
from utils.performance_functions.losses import label_hidden_states, logit_chunks
from utils.processes import first_process_only, launched
from utils.settings import Settings
from utils.spreading import SPREAD
from utils.tracker import Tracker

STEPS_BETWEEN_LOGS = 10
CHECKPOINTS = 10  # about, in a training; one replaces the other
LONGEST_WITHOUT_CHECKPOINT = 500  # steps


def collate(sequences: list[LabelledSequence], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch padded on the right, (B, T); its labels are the tokens of the completion and the final EOS."""
    tokens = [torch.from_numpy(sequence.input_ids).long() for sequence in sequences]
    labels = [row.clone() for row in tokens]
    for row, sequence in zip(labels, sequences, strict=True):
        row[: sequence.label_start] = IGNORED_LABEL
    return {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }


def completion_loss(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: object,
) -> dict[str, torch.Tensor]:
    """Replaces a model's `forward`: cross-entropy over the label tokens, with logits computed only for those.

    Args:
        num_items_in_batch: label tokens of the whole optimizer step, over micro-batches and processes. The Trainer
            passes it, so that the loss is a mean over tokens however the step is divided.
    """
    targets = labels[:, 1:]
    is_label = targets != IGNORED_LABEL
    hidden, _ = label_hidden_states(self, {"input_ids": input_ids}, is_label)
    total = summed_nll(self, hidden, targets[is_label])
    num_labels = torch.as_tensor(is_label.sum() if num_items_in_batch is None else num_items_in_batch)
    return {"loss": total / num_labels.clamp(min=1)}  # prompts that fill the whole context leave no label


def summed_nll(model: PreTrainedModel, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over labels, differentiable in all weights, with the logits of a chunk of them in memory.

    Args:
        states: (n, hidden size), ready for the output embedding.
        targets: (n,).
    """

    def of_chunk(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output_logits(model, states), targets, reduction="sum")

    chunks = list(logit_chunks(states, model.get_output_embeddings().weight))
    if len(chunks) <= 1:
        return of_chunk(states, targets)
    # The backward pass computes each chunk's logits again, instead of keeping them all.
    return sum(recompute(of_chunk, states[chunk], targets[chunk], use_reentrant=False) for chunk in chunks)


class Progress(TrainerCallback):
    """Shows one progress bar over the optimizer steps, and sends the training curve to the tracker."""

    def __init__(self, tracker: Tracker, bar: tqdm) -> None:
        self.tracker, self.bar = tracker, bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Advance the bar to where a killed run stopped."""
        self.bar.update(state.global_step)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Advance the bar."""
        self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: object, logs: dict[str, float], **__: object
    ) -> None:
        """Show and track the training loss."""
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")
            self.tracker.log({name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}, state.global_step)


def training_device(device: str) -> torch.device:
    """The device of this process.

    Raises:
        UserError: DEVICE names one GPU by its number, which the Trainer would not keep to, or spreads the model.
    """
    if device == SPREAD:
        raise UserError(
            f"DEVICE = {SPREAD!r}: allowed here are auto, cpu and cuda; fine-tuning changes all weights, and needs the "
            "whole model on one device"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"DEVICE = {device!r}: allowed here are auto, cpu and cuda; to choose a GPU, set "
            "CUDA_VISIBLE_DEVICES in the environment"
        )
    return resolve_device(device)


def num_steps(settings: Settings, num_examples: int) -> int:
    """Optimizer steps of a training."""
    return settings.NUM_EPOCHS * -(-num_examples // settings.BATCH_SIZE)


def micro_batch_size(settings: Settings, num_processes: int) -> int:
    """Dialogues per forward pass of one process.

    Raises:
        UserError: BATCH_SIZE is not a multiple of what all processes run at once.
    """
    size = min(settings.BATCH_SIZE_PER_DEVICE, max(1, settings.BATCH_SIZE // num_processes))
    if settings.BATCH_SIZE % (size * num_processes):
        raise UserError(
            f"BATCH_SIZE = {settings.BATCH_SIZE}: must be a multiple of {size * num_processes} ({num_processes} "
            f"process(es) with {size} dialogues each); change it or BATCH_SIZE_PER_DEVICE"
        )
    return size


@first_process_only
def set_checkpoints_aside(folder: Path) -> None:
    """Give the Trainer's checkpoints temporary names, under which they go when the finished model is published."""
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        checkpoint.rename(partial_of(checkpoint))


@first_process_only
def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, after deleting incomplete ones: the Trainer writes its state file last."""
    for aside in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*.partial"):  # whole, of a run killed before it had published
        aside.rename(aside.with_suffix(""))
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (checkpoint / TRAINER_STATE_NAME).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)
    return get_last_checkpoint(str(folder))


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[LabelledSequence],
    settings: Settings,
    folder: Path,
    checkpoint: str | None,
    bar: tqdm,
    tracker: Tracker | None = None,
) -> None:
    """Train with transformers' Trainer: AdamW, linear warm-up and decay, gradient clipping at 1.

    Args:
        settings: SAVE_EVERY = None keeps no checkpoint, "auto" takes one at every tenth of the way, or 500 steps.
        folder: where the last checkpoint is kept during training.
        checkpoint: the one to resume from, if any.
        bar: over optimizer steps, of which this training takes `num_steps`.
    """
    is_cuda = model.device.type == "cuda"
    size, save_every = micro_batch_size(settings, launched()), settings.SAVE_EVERY
    if save_every == "auto":
        save_every = min(-(-num_steps(settings, len(examples)) // CHECKPOINTS), LONGEST_WITHOUT_CHECKPOINT)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.NUM_EPOCHS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=settings.BATCH_SIZE // (size * launched()),
        learning_rate=settings.LEARNING_RATE,
        warmup_steps=max(1, len(examples) * settings.NUM_EPOCHS // settings.BATCH_SIZE // 20),
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 1,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=STEPS_BETWEEN_LOGS,
        disable_tqdm=True,
        report_to=[],
        seed=settings.SEED,
        use_cpu=not is_cuda,
        bf16=is_cuda and torch.cuda.is_bf16_supported(),
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        dataloader_pin_memory=is_cuda,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: no DataParallel
    model.forward = MethodType(completion_loss, model)
    if settings.GRADIENT_CHECKPOINTING:
        # Renamed in transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint:
        say(f"   resuming from {shown_path(Path(checkpoint))}")
        # The Trainer looks for the tensors' names in memory, but some models save them under other names.
        model.load_state_dict(load_model(checkpoint, model.device).state_dict())
    trainer.add_callback(Progress(tracker or Tracker(), bar))
    trainer.train(resume_from_checkpoint=checkpoint)
    del model.forward  # restores the class's own
    model.eval()
