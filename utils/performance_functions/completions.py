"""What a model says: greedy completions of a measurement's prompts, for reading before and after a repair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from utils.performance_functions.pairs import AnswerPair

MAX_NEW_TOKENS = 48


def first_prompts(pairs: Sequence[AnswerPair], count: int) -> list[str]:
    """The first distinct prompts of answer pairs; a measurement with one prompt for all has one."""
    return list(dict.fromkeys(pair.prompt for pair in pairs))[:count]


@torch.no_grad()
def greedy_completions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The likeliest next token, again and again, at most MAX_NEW_TOKENS of them; one text for each prompt."""
    completions = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        completions.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return completions
