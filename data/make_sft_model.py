"""Before step 1: make the POST-SFT model that the steps start from.

    python data/make_sft_model.py
    python data/make_sft_model.py --BASE_MODEL EleutherAI/pythia-160m --HH_DATASET Dahoas/static-hh \
        --SFT_MODEL_DIR models/pythia-160m-hh-sft --LEARNING_RATE 1e-5 --NUM_EPOCHS 1

Fine-tunes a causal language model on the dialogues of HH_DATASET with completion-only loss. The base is a hub id, a
folder, or the name of a bare architecture below, which starts from random weights with TOKENIZER's tokenizer. The
final EOS is trained too, so that the model learns to stop.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import paths
from utils.artifacts import Artifact, fingerprint_of
from utils.batching import IGNORED_LABEL, Batch, LabelledSequence
from utils.console import UserError, banner, progress_bar, say, shown_path
from utils.models import copy_tokenizer, load_model, load_tokenizer, model_fingerprint, resolve_device
from utils.performance_functions.evaluation import MeasurableModel
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import label_hidden_states
from utils.settings import PositiveFloat, PositiveInt, Seed, Settings, run_step

# ------------------------------------------------------------------------------------------------ constants
BASE_MODEL: str = "pythia-demo"  # hub id, local folder, or a bare architecture of ARCHITECTURES
TOKENIZER: str | None = "data/demo/tokenizer"  # for a bare architecture: whose tokenizer; else the base's own
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
SFT_MODEL_DIR: str = "data/demo/pythia-demo-sft"  # where the model goes
NUM_EPOCHS: PositiveInt = 4  # passes over the training split
BATCH_SIZE: PositiveInt = 16  # dialogues in an optimizer step
LEARNING_RATE: PositiveFloat = 2e-3  # peak; 1e-5 suits a pretrained base
SAVE_EVERY: PositiveInt = 500  # optimizer steps between the checkpoints that a killed run goes on from
SEED: Seed = 42  # of the random weights and of the order of the dialogues
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace a model that was made with other settings
# -----------------------------------------------------------------------------------------------------------

# Bare architectures: the configuration's class and its sizes.
ARCHITECTURES = {
    "pythia-demo": (
        GPTNeoXConfig,
        {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    ),
    "pythia-14m": (
        GPTNeoXConfig,
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
    ),
    "pythia-70m": (
        GPTNeoXConfig,
        {"hidden_size": 512, "intermediate_size": 2_048, "num_hidden_layers": 6, "num_attention_heads": 8},
    ),
    "qwen-demo": (
        Qwen2Config,
        {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}
VOCABULARY_MULTIPLE = 64  # output embeddings are padded to a multiple, which matrix units like


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


class CompletionTrainer(Trainer):
    """A Trainer whose loss is the mean over the label tokens, with logits computed at those alone."""

    def compute_loss(self, model: PreTrainedModel, inputs: Batch, *_: object, **__: object) -> torch.Tensor:
        """Mean cross-entropy over the completions of the batch."""
        targets = inputs["labels"][:, 1:]
        is_label = targets != IGNORED_LABEL
        hidden, _ = label_hidden_states(model, inputs, is_label)
        return F.cross_entropy(model.get_output_embeddings()(hidden), targets[is_label])


class ProgressBar(TrainerCallback):
    """One bar over the optimizer steps, as every other step of the project shows it."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: object, **__: object) -> None:
        """Open the bar."""
        self.bar = progress_bar(state.max_steps, "fine-tuning", "steps")
        self.bar.update(state.global_step)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Move it."""
        self.bar.update()

    def on_train_end(self, *_: object, **__: object) -> None:
        """Close it."""
        self.bar.close()


def start_model(settings: Settings, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, or a bare architecture with random weights, and its tokenizer.

    Raises:
        UserError: a bare architecture without TOKENIZER, or a base that cannot be loaded.
    """
    if settings.BASE_MODEL not in ARCHITECTURES:
        return load_model(settings.BASE_MODEL, device), load_tokenizer(settings.BASE_MODEL)
    if settings.TOKENIZER is None:
        raise UserError(
            f"TOKENIZER = None: the bare architecture {settings.BASE_MODEL} needs a tokenizer's folder or hub id"
        )
    tokenizer = load_tokenizer(settings.TOKENIZER)
    config_class, sizes = ARCHITECTURES[settings.BASE_MODEL]
    vocabulary = -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    config = config_class(
        **sizes, vocab_size=vocabulary, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    config.pad_token_id, config.tie_word_embeddings = tokenizer.pad_token_id, False
    return AutoModelForCausalLM.from_config(config).float().to(device), tokenizer


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[LabelledSequence],
    settings: Settings,
    folder: Path,
) -> None:
    """Train with transformers' Trainer: AdamW, linear warm-up and decay, gradient clipping at 1.

    Args:
        folder: keeps the last checkpoint while training lasts; one that is there is where a killed run goes on.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.NUM_EPOCHS,
        per_device_train_batch_size=settings.BATCH_SIZE,
        learning_rate=settings.LEARNING_RATE,
        warmup_steps=max(1, len(examples) * settings.NUM_EPOCHS // settings.BATCH_SIZE // 20),
        save_strategy="steps",
        save_steps=settings.SAVE_EVERY,
        save_total_limit=1,
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        seed=settings.SEED,
        use_cpu=model.device.type == "cpu",
        bf16=model.device.type == "cuda" and torch.cuda.is_bf16_supported(),
        remove_unused_columns=False,
        dataloader_pin_memory=model.device.type == "cuda",
    )
    trainer = CompletionTrainer(
        model=model,
        args=arguments,
        train_dataset=DialogueDataset(examples),
        data_collator=PadToLongest(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[ProgressBar()],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = get_last_checkpoint(str(folder))
    if checkpoint:
        say(f"   going on from {shown_path(Path(checkpoint))}")
        # The Trainer loads tensors by the names they have in memory, which some models rename when they are saved.
        model.load_state_dict(load_model(checkpoint, model.device).state_dict())
    trainer.train(resume_from_checkpoint=checkpoint)
    for used in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(used)


def main(settings: Settings) -> None:
    """Make the model, unless it is there."""
    banner("POST-SFT model", settings.SFT_MODEL_DIR)
    started = time.monotonic()
    device = resolve_device(settings.DEVICE)
    train, test = (load_dialogues(settings.HH_DATASET, split) for split in ("train", "test"))
    base = settings.BASE_MODEL if settings.BASE_MODEL in ARCHITECTURES else model_fingerprint(settings.BASE_MODEL)
    output = Artifact(
        paths.anchored(settings.SFT_MODEL_DIR),
        made_by="data/make_sft_model.py",
        settings=settings.pick("BASE_MODEL", "TOKENIZER", "NUM_EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "SEED"),
        inputs={"base": fingerprint_of(base), "dataset": train.fingerprint},
        is_folder=True,
    )
    if output.is_finished(settings.OVERWRITE):
        return
    set_seed(settings.SEED)
    model, tokenizer = start_model(settings, device)
    measurable = MeasurableModel(model, tokenizer)
    before = measurable.measure("anthropic", "test", test)["perplexity"]
    with output.growing_folder() as folder:
        fine_tune(model, tokenizer, tokenize_dialogues(train, tokenizer), settings, folder)
        model.eval()
        after = measurable.measure("anthropic", "test", test)["perplexity"]
        model.save_pretrained(folder)
        copy_tokenizer(settings.TOKENIZER if settings.BASE_MODEL in ARCHITECTURES else settings.BASE_MODEL, folder)
        output.publish_folder(started, {}, perplexity={"before": before, "after": after})
    say(f"   test perplexity {before:.2f} -> {after:.2f}")
    say(f"next: python compute_factors_and_scores.py --MODEL_NAMES {settings.SFT_MODEL_DIR}")


if __name__ == "__main__":
    run_step(main)
