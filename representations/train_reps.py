"""Step 2: represent every training dialogue by the mean of its last hidden states.

    python representations/train_reps.py

Reads the model and the training split of HH_DATASET. Writes `representations` (N_train, hidden), float32.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.batching import BatchLoader, LabelledSequence, token_budget
from utils.console import banner, say
from utils.models import last_hidden_state, load_model, load_tokenizer, resolve_device
from utils.performance_functions.hh import Dialogues
from utils.pipeline import Pipeline
from utils.settings import Family, PositiveInt, Seed, Settings, run_step

# ------------------------------------------------------------------------------------------------ constants
MODEL_NAME: str = "data/demo/pythia-demo-sft"  # POST-SFT model: hub id or local folder
MODEL_FAMILY: Family = "auto"  # architecture; "auto" finds it from the model's config
HH_DATASET: str = "data/demo/hh"  # dialogues: hub id or a folder with train.jsonl and test.jsonl
DATA_DIR: str = "data/demo"  # folder with bias/, ethics/ and truthfulness/
OUTPUT_DIR: str = "."  # where artefacts go; relative paths start at the repository
SEED: Seed = 42  # unused here: nothing in this step is random
DEVICE: str = "auto"  # "auto", "cpu", "cuda", "cuda:N"
OVERWRITE: bool = False  # replace artefacts that were made with other settings

MAX_LENGTH: PositiveInt = 1_024  # tokens after which a dialogue is cut
TOKENS_PER_BATCH: PositiveInt | Literal["auto"] = "auto"  # padded tokens in a batch
# -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def represent(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Dialogues,
    max_length: int,
    tokens_per_batch: int | Literal["auto"],
) -> torch.Tensor:
    """Mean over the non-padding tokens of the last hidden state after the final norm; text = prompt + " " + chosen.

    Returns:
        (N, hidden) float32, in dataset order.
    """
    texts = [f"{prompt} {chosen}" for prompt, chosen in zip(dialogues.prompts, dialogues.completions, strict=True)]
    input_ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    sequences = [LabelledSequence(np.asarray(ids, dtype=np.int32), 0, len(ids)) for ids in input_ids]
    budget = token_budget(model, tokens_per_batch)
    loader = BatchLoader(sequences, budget, tokenizer.pad_token_id, model.device, description="representations")
    representations = torch.zeros(len(sequences), model.config.hidden_size)
    for batch in loader:
        hidden = last_hidden_state(model, batch)  # (B, T, hidden)
        mask = batch["attention_mask"].unsqueeze(2)  # (B, T, 1)
        representations[batch["index"].cpu()] = ((hidden * mask).sum(dim=1) / mask.sum(dim=1)).float().cpu()
    return representations


def main(settings: Settings) -> None:
    """Represent the training dialogues, unless that is done."""
    banner("step 2: representations", settings.MODEL_NAME)
    started = time.monotonic()
    device = resolve_device(settings.DEVICE)
    pipeline = Pipeline.of(settings, settings.MODEL_NAME)
    output = pipeline.representations()
    if not output.is_finished(settings.OVERWRITE):
        model, tokenizer = load_model(settings.MODEL_NAME, device), load_tokenizer(settings.MODEL_NAME)
        representations = represent(
            model, tokenizer, pipeline.dialogues, settings.MAX_LENGTH, settings.TOKENS_PER_BATCH
        )
        output.save_tensors({"representations": representations}, started)
    say("next: python dpp/greedy_dpp.py")


if __name__ == "__main__":
    run_step(main)
