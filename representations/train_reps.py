"""Step 2: represent every training dialogue by the mean of its last hidden states.

    python representations/train_reps.py
    python representations/train_reps.py --ANSWERS_OF all

Reads the model and the training split of HH_DATASET. Writes `representations` (N_train, hidden), float32. With
ANSWERS_OF also the representations of a measurement's answers: the untrustworthy ones, which SCORES_TYPE
"representation" of step 4 needs, and the trustworthy ones for "mean_difference".
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from steps import next_command, run_step
from utils.batching import BatchLoader, LabelledSequence, token_budget
from utils.console import banner, say
from utils.devices import resolve_device
from utils.forward import last_hidden_state
from utils.kept_model import open_model
from utils.labels import require_embeddings
from utils.locks import locked
from utils.models import load_model, load_tokenizer
from utils.paths import STEP_3, STEP_4, resolve_path
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import Dialogues
from utils.performance_functions.pairs import AnswerPairs
from utils.processes import all_reduce
from utils.registry import ModelArtifacts, Side
from utils.settings import Family, PositiveInt, Settings, TraceTask, tasks_of
from utils.spreading import SPREAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture: "auto" (from the model's config), "pythia", "qwen"
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # for ANSWERS_OF: folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artifacts go; relative paths start at the repository
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N", "spread" (too large for one GPU: all GPUs, CPU, disk)
TRUST_REMOTE_CODE: bool = False  # True runs code that a model brings along; read it first
OVERWRITE: bool = False  # True replaces artifacts that were made with other settings

ANSWERS_OF: TraceTask | None = None  # also the training answers of: "bias", "ethics", "truth", "all"
MAX_LENGTH: PositiveInt = 1_024  # tokens after which a dialogue is cut
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch: a number or "auto"
# -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def represent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    max_length: int,
    tokens_per_batch: int | Literal["auto"],
) -> torch.Tensor:
    """Mean over the non-padding tokens of the last hidden state, after the final norm.

    Returns:
        (N, hidden) float32, in the texts' order.
    """
    if tokenizer.model_max_length < max_length:
        max_length = tokenizer.model_max_length
        say(f"   texts are cut at {max_length:,} tokens, the model's max_position_embeddings")
    input_ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    sequences = [LabelledSequence(np.asarray(ids, dtype=np.int32), 0, len(ids)) for ids in input_ids]
    require_embeddings(sequences, tokenizer)
    budget = token_budget(model, tokens_per_batch)
    loader = BatchLoader(sequences, budget, tokenizer.pad_token_id, model.device, description="representations")
    representations = torch.zeros(len(sequences), model.config.get_text_config().hidden_size)
    for batch in loader:
        hidden = last_hidden_state(model, batch)  # (B, T, hidden)
        mask = batch["attention_mask"].unsqueeze(2)  # (B, T, 1)
        representations[batch["index"].cpu()] = ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).float().cpu()
    all_reduce(representations)
    return representations


def dialogue_texts(dialogues: Dialogues) -> list[str]:
    """prompt + " " + chosen, as released."""
    return [f"{prompt} {chosen}" for prompt, chosen in zip(dialogues.prompts, dialogues.completions, strict=True)]


def answer_texts(pairs: AnswerPairs, side: Side) -> list[str]:
    """Every distinct prompt with an answer of one side."""
    return list(dict.fromkeys(pair.prompt + getattr(pair, side) for pair in pairs))


def main(settings: Settings) -> None:
    """Represent the training dialogues, and the answers of ANSWERS_OF, unless that is finished."""
    banner("step 2: representations", settings.MODEL_NAME)
    device = resolve_device(settings.DEVICE)
    artifacts = ModelArtifacts(settings, settings.MODEL_NAME)
    outputs = [(artifacts.representations(), dialogue_texts(artifacts.dialogues))]
    for task in tasks_of(settings.ANSWERS_OF) if settings.ANSWERS_OF else []:
        pairs = MEASUREMENTS[task].load_pairs(resolve_path(settings.DATA_DIR), "train")
        for side in get_args(Side):
            output = artifacts.answer_representations(task, side, pairs=pairs.fingerprint)
            outputs.append((output, answer_texts(pairs, side)))
    with locked(*(output.path for output, _ in outputs)):
        unfinished = [(output, texts) for output, texts in outputs if not output.is_finished(settings.OVERWRITE)]
        if unfinished:
            if settings.DEVICE == SPREAD:  # all blocks, since none changes
                model = load_model(settings.MODEL_NAME, device, is_spread=True)
                tokenizer = load_tokenizer(settings.MODEL_NAME, model)
            else:
                model, tokenizer, _ = open_model(settings, settings.MODEL_NAME, device, num_blocks=1)
        for output, texts in unfinished:
            started = time.monotonic()
            representations = represent(model, tokenizer, texts, settings.MAX_LENGTH, settings.TOKENS_PER_BATCH)
            output.save_tensors({"representations": representations}, started)


def next_step(settings: Settings) -> str:
    """The command that uses these representations; with those of the answers, dialogues can be ranked at once."""
    if settings.ANSWERS_OF:
        return next_command(STEP_4, settings, TASK_NAME=settings.ANSWERS_OF, SCORES_TYPE="representation")
    return next_command(STEP_3, settings)


if __name__ == "__main__":
    run_step(main, hint=next_step)
