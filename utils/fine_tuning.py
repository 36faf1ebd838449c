"""Completion-only fine-tuning with transformers' Trainer, on one process or several."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import MethodType

import torch
from accelerate import PartialState
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
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
from utils.console import UserError, progress_bar, say, shown_path
from utils.models import load_model
from utils.performance_functions.losses import label_hidden_states
from utils.settings import Settings
from utils.tracker import Tracker

STEPS_BETWEEN_LOGS = 10


class DialogueDataset(Dataset):
    """Tokenized dialogues as the Trainer wants them; labels are the completion and the final EOS."""

    def __init__(self, examples: list[LabelledSequence]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> dict[str, list[int]]:
        sequence = self.examples[position]
        input_ids = sequence.input_ids.tolist()
        labels = [IGNORED_LABEL] * sequence.label_start + input_ids[sequence.label_start :]
        return {"input_ids": input_ids, "labels": labels[: len(input_ids)]}


class PadToLongest:
    """Collates dialogues of different lengths; padding is on the right and has no labels."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        return {"input_ids": padded("input_ids", self.pad_token_id), "labels": padded("labels", IGNORED_LABEL)}


def completion_loss(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: object,
) -> dict[str, torch.Tensor]:
    """In place of a model's `forward`: cross-entropy over the completions, with logits computed at those alone.

    Args:
        num_items_in_batch: label tokens of the whole optimizer step, over micro-batches and processes, as the Trainer
            gives it: the loss is a mean over tokens however the step is divided.
    """
    targets = labels[:, 1:]
    is_label = targets != IGNORED_LABEL
    hidden, _ = label_hidden_states(self, {"input_ids": input_ids}, is_label)
    total = F.cross_entropy(self.get_output_embeddings()(hidden), targets[is_label], reduction="sum")
    return {"loss": total / (is_label.sum() if num_items_in_batch is None else num_items_in_batch)}


class Progress(TrainerCallback):
    """One bar over the optimizer steps, as every other step of the project shows it; and the tracker's curve."""

    def __init__(self, tracker: Tracker, bar: tqdm) -> None:
        self.tracker, self.bar = tracker, bar

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Tell the bar how far a killed run had come."""
        self.bar.update(state.global_step)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Move it."""
        self.bar.update()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: object, logs: dict[str, float], **__: object
    ) -> None:
        """Show the training loss."""
        if "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}")
            self.tracker.log({name: logs[name] for name in ("loss", "learning_rate", "grad_norm")}, state.global_step)


def micro_batch(settings: Settings, processes: int) -> tuple[int, int]:
    """Dialogues that one process runs at once, and how often it does before an optimizer step.

    Raises:
        UserError: BATCH_SIZE is no multiple of what the processes run at once.
    """
    at_once = min(settings.BATCH_SIZE_PER_DEVICE, max(1, settings.BATCH_SIZE // processes))
    times, rest = divmod(settings.BATCH_SIZE, at_once * processes)
    if rest or not times:
        raise UserError(
            f"BATCH_SIZE = {settings.BATCH_SIZE}: must be a multiple of {at_once * processes}, that is {processes} "
            f"process(es) with {at_once} dialogues each; set it or BATCH_SIZE_PER_DEVICE"
        )
    return at_once, times


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that is whole, after removing those that are not: the Trainer writes its state last."""
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
    tracker: Tracker,
) -> None:
    """Train with transformers' Trainer: AdamW, linear warm-up and decay, gradient clipping at 1.

    Args:
        folder: keeps the last checkpoint while training lasts.
        checkpoint: where a killed run goes on.
    """
    is_cuda = model.device.type == "cuda"
    at_once, times = micro_batch(settings, PartialState().num_processes)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.NUM_EPOCHS,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=times,
        learning_rate=settings.LEARNING_RATE,
        warmup_steps=max(1, len(examples) * settings.NUM_EPOCHS // settings.BATCH_SIZE // 20),
        save_strategy="steps",
        save_steps=settings.SAVE_EVERY,
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
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})  # its name in transformers 5, or the one before
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=DialogueDataset(examples),
        data_collator=PadToLongest(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if checkpoint:
        say(f"   going on from {shown_path(Path(checkpoint))}")
        # The Trainer loads tensors by the names they have in memory, which some models rename when they are saved.
        model.load_state_dict(load_model(checkpoint, model.device).state_dict())
    num_steps = settings.NUM_EPOCHS * -(-len(examples) // settings.BATCH_SIZE)
    with progress_bar(num_steps, "fine-tuning", "steps") as bar:
        trainer.add_callback(Progress(tracker, bar))
        trainer.train(resume_from_checkpoint=checkpoint)
    del model.forward  # the class has its own again
    model.eval()
