"""Before step 1: make the POST-SFT model that the steps start from.

    python data/make_sft_model.py
    python data/make_sft_model.py --BASE_MODEL EleutherAI/pythia-160m --HH_DATASET Dahoas/static-hh \
        --SFT_MODEL_DIR models/pythia-160m-hh-sft --LEARNING_RATE 1e-5 --NUM_EPOCHS 1
    accelerate launch --num_processes 4 data/make_sft_model.py ...

Fine-tunes a causal language model on the dialogues of HH_DATASET with completion-only loss. The base is a hub id, a
folder, or the name of a bare architecture below, which starts from random weights with TOKENIZER's tokenizer. The
final EOS is trained too, so that the model learns to stop.
"""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import MethodType

import torch
from accelerate import PartialState
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import Dataset
from tqdm import tqdm
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
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import paths
from utils.artifacts import Artifact, fingerprint_of, write_atomically
from utils.batching import IGNORED_LABEL, LabelledSequence
from utils.cards import sft_card
from utils.console import UserError, banner, progress_bar, say, shown_path
from utils.models import (
    copy_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    require_supported,
    resolve_device,
    silence_transformers,
)
from utils.paths import STEP_1
from utils.performance_functions.evaluation import MeasurableModel
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import label_hidden_states
from utils.settings import PositiveFloat, PositiveInt, Seed, Settings, TrackerName, run_step
from utils.steps import next_command
from utils.tracker import Tracker, tracking

# ------------------------------------------------------------------------------------------------ constants
BASE_MODEL: str = "pythia-demo"  # hub id, local folder, or a bare architecture of ARCHITECTURES
TOKENIZER: str | None = "data/demo/tokenizer"  # for a bare architecture: whose tokenizer; else the base's own
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
SFT_MODEL_DIR: str = "data/demo/pythia-demo-sft"  # where the model goes
NUM_EPOCHS: PositiveInt = 4  # passes over the training split
BATCH_SIZE: PositiveInt = 16  # dialogues in an optimizer step, of all processes together
BATCH_SIZE_PER_DEVICE: PositiveInt = 16  # dialogues that a GPU runs at once, at most; less takes less memory
GRADIENT_CHECKPOINTING: bool = False  # run each block again in the backward pass: less memory, a third more time
LEARNING_RATE: PositiveFloat = 2e-3  # peak; 1e-5 suits a pretrained base
SAVE_EVERY: PositiveInt = 500  # optimizer steps between the checkpoints that a killed run goes on from
SEED: Seed = 42  # of the random weights and of the order of the dialogues
DEVICE: str = "auto"  # "auto", "cpu", "cuda"
TRACKER: TrackerName | None = None  # also send the training curve to this experiment tracker, if it is installed
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
STEPS_BETWEEN_LOGS = 10
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


def choose_device(settings: Settings) -> torch.device:
    """The device of this process; `accelerate launch` gives each process a GPU of its own.

    Raises:
        UserError: DEVICE names one GPU of several.
    """
    device = resolve_device(settings.DEVICE)
    if device.index is not None:
        raise UserError(
            f"DEVICE = {settings.DEVICE!r}: allowed here are auto, cpu and cuda; CUDA_VISIBLE_DEVICES={device.index} "
            "in the environment chooses the GPU"
        )
    PartialState(cpu=device.type == "cpu")
    return device


def sft_artifact(settings: Settings, dataset: str) -> Artifact:
    """The model that is to be made, with what it depends on.

    Args:
        dataset: fingerprint of the training split.

    Raises:
        UserError: the base is not found or of a kind that the steps could not repair later, or something else is
            where the model goes.
    """
    if settings.BASE_MODEL in ARCHITECTURES:
        base = settings.BASE_MODEL
    else:
        require_supported(settings.BASE_MODEL, "auto")
        base = model_fingerprint(settings.BASE_MODEL)
    artifact = Artifact(
        paths.anchored(settings.SFT_MODEL_DIR),
        made_by="data/make_sft_model.py",
        settings=settings.pick("BASE_MODEL", "TOKENIZER", "NUM_EPOCHS", "BATCH_SIZE", "LEARNING_RATE", "SEED"),
        inputs={"base": fingerprint_of(base), "dataset": dataset},
        is_folder=True,
    )
    if artifact.path.exists() and not artifact.manifest_path.exists() and not settings.OVERWRITE:
        raise UserError(
            f"SFT_MODEL_DIR = {settings.SFT_MODEL_DIR!r}: is there and has no manifest that says it was made here; "
            "give a new folder, or set OVERWRITE = True to replace it"
        )
    return artifact


def main(settings: Settings) -> None:
    """Make the model, unless it is there."""
    banner("POST-SFT model", settings.SFT_MODEL_DIR)
    started = time.monotonic()
    device = choose_device(settings)
    train, test = (load_dialogues(settings.HH_DATASET, split) for split in ("train", "test"))
    output = sft_artifact(settings, train.fingerprint)
    if output.is_finished(settings.OVERWRITE):
        return
    processes = PartialState()
    micro_batch(settings, processes.num_processes)
    set_seed(settings.SEED)
    silence_transformers()
    model, tokenizer = start_model(settings, device)
    measurable = MeasurableModel(model, tokenizer)
    if settings.BASE_MODEL in ARCHITECTURES:
        say(f"   {settings.BASE_MODEL} with random weights: {model.num_parameters():,} parameters")
    with ExitStack() as stack:
        tracker = stack.enter_context(tracking(settings.TRACKER, settings.SFT_MODEL_DIR, vars(settings)))
        with processes.main_process_first():
            folder = stack.enter_context(output.growing_folder())
            checkpoint = last_checkpoint(folder)
        before = measurable.measure("anthropic", "test", test)["perplexity"]
        fine_tune(model, tokenizer, tokenize_dialogues(train, tokenizer), settings, folder, checkpoint, tracker)
        perplexity = {"before": before, "after": measurable.measure("anthropic", "test", test)["perplexity"]}
        tracker.log({"perplexity": perplexity["after"]})
        if processes.is_main_process:
            for used in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(used)
            model.save_pretrained(folder)
            copy_tokenizer(settings.TOKENIZER if settings.BASE_MODEL in ARCHITECTURES else settings.BASE_MODEL, folder)
            write_atomically(folder / "README.md", sft_card(vars(settings), len(train), perplexity))
            output.publish_folder(started, {}, perplexity=perplexity, processes=processes.num_processes)
        processes.wait_for_everyone()
    say(f"   test perplexity {before:.2f} -> {perplexity['after']:.2f}")


def first_step(settings: Settings) -> str:
    """The command of step 1 on the model."""
    return next_command(STEP_1, settings, MODEL_NAMES=[settings.SFT_MODEL_DIR])


if __name__ == "__main__":
    run_step(main, next_command=first_step, several_processes=True)
