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

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import paths
from utils.artifacts import Artifact, fingerprint_of, write_atomically
from utils.cards import sft_card
from utils.console import UserError, banner, say
from utils.fine_tuning import fine_tune, last_checkpoint, micro_batch
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
from utils.settings import PositiveFloat, PositiveInt, Seed, Settings, TrackerName, run_step
from utils.steps import next_command
from utils.tracker import tracking

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
VOCABULARY_MULTIPLE = 64  # output embeddings are padded to a multiple, which matrix units like


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
