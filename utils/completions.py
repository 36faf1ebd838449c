"""Greedy completions of test prompts, before and after a repair, for a reader of the report."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from utils.evaluation import EvaluationModel, Evaluator
from utils.files import fingerprint_of
from utils.processes import shared_map
from utils.repair_record import RepairRecord
from utils.settings import task_weights

MAX_NEW_TOKENS = 48


@torch.no_grad()
def greedy_completions(evaluated: EvaluationModel, prompts: Sequence[str]) -> list[str]:
    """The greedy completion of each prompt, at most MAX_NEW_TOKENS tokens."""
    from transformers import GenerationConfig

    model, tokenizer = evaluated.model, evaluated.tokenizer

    def complete(prompt: str) -> str:
        start = prompt or tokenizer.eos_token  # a model cannot go on from no token at all
        inputs = tokenizer(start, return_tensors="pt").to(model.device)
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(MAX_NEW_TOKENS, tokenizer.model_max_length - length),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.decode(output[0, length:], skip_special_tokens=True)

    # The model's own may ask for beams or penalties, or for code of the hub.
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id)
    try:
        return shared_map(complete, prompts)
    finally:
        model.generation_config = own


def write_completions(
    repair: RepairRecord, learning_rate: float, model_at: Callable[[float], EvaluationModel], evaluator: Evaluator
) -> None:
    """Completions of the first NUM_COMPLETIONS test prompts of each repaired task, unless as many are stored.

    Args:
        model_at: gives the model, updated at a learning rate; 0 is the POST-SFT model.
    """
    settings = repair.artifacts.settings
    pairs = {task: evaluator.data(task) for task in task_weights(settings, repair.task)}
    prompts = {
        task: list(dict.fromkeys(pair.prompt for pair in of_task))[: settings.NUM_COMPLETIONS]
        for task, of_task in pairs.items()
    }
    fingerprint = fingerprint_of({task: of_task.fingerprint for task, of_task in pairs.items()})
    output = repair.artifacts.completions(repair.checkpoint(learning_rate), evaluator.split, fingerprint)
    if output.is_finished(settings.OVERWRITE):
        stored = Counter(row["task"] for row in output.load_json())
        if all(stored[task] >= len(of_task) for task, of_task in prompts.items()):
            return
    started = time.monotonic()
    rows = [{"task": task, "prompt": prompt} for task, of_task in prompts.items() for prompt in of_task]
    for when, rate in (("before", 0.0), ("after", learning_rate)):
        completions = greedy_completions(model_at(rate), [row["prompt"] for row in rows])
        for row, completion in zip(rows, completions, strict=True):
            row[when] = completion
    output.save_json(rows, started)
