"""The baseline: the recipe of the released code, rewritten for this benchmark with kronfluence and transformers.

Every dialogue is padded to 1,024 tokens and every answer to 128, 256 or 512; logits are computed at every position;
batches hold 2 examples (factors 8, evaluation 8, representations 16 padded to the longest). Every task fits its own
factors and makes its own pass over the training data, Fisher labels are sampled at every position, the gradients of the
subset are taken one dialogue at a time, every learning rate evaluates the whole model, and the greedy is a lazy one
with a heap, on random Fourier features. Everything is float32 like ours, in place of the released mixture of
precisions: bfloat16 is far slower on a CPU.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from utils.models import DTYPE_KEYWORD
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import MAX_DIALOGUE_TOKENS, load_dialogues
from utils.transformer_blocks import traced_linear_names

FACTOR_BATCH, SCORE_BATCH, REPRESENTATION_BATCH, EVALUATION_BATCH = 8, 2, 16, 8
DAMPING_OF_MEAN = 0.1
BRANCHES = ("chosen", "rejected")

Tensors = dict[str, torch.Tensor]


def load(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer, padding with the end-of-sequence token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(model, **{DTYPE_KEYWORD: torch.float32}).eval(), tokenizer


def _padded(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, length: int) -> Tensors:
    """One text, padded to `length`; labels are the answer's tokens, without any end-of-sequence token."""
    prompt_length = len(tokenizer(prompt)["input_ids"])
    encoded = tokenizer(prompt + answer, padding="max_length", truncation=True, max_length=length)
    input_ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    labels = input_ids.masked_fill(input_ids == tokenizer.eos_token_id, -100)
    labels[:prompt_length] = -100
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def dialogue_rows(hh_dataset: str, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensors]:
    """Dialogues, each padded to 1,024 tokens."""
    dialogues = load_dialogues(hh_dataset, split)
    return [
        _padded(prompt, answer + tokenizer.eos_token, tokenizer, MAX_DIALOGUE_TOKENS)
        for prompt, answer in zip(dialogues.prompts, dialogues.completions, strict=True)
    ]


def pair_rows(data_dir: str, task: str, split: str, tokenizer: PreTrainedTokenizerBase) -> list[Tensors]:
    """The answer pairs of one measurement, each answer padded to the measurement's length."""
    measurement = MEASUREMENTS[task]
    return [
        {
            f"{branch}_{name}": tensor
            for branch in BRANCHES
            for name, tensor in _padded(pair.prompt, getattr(pair, branch), tokenizer, measurement.max_tokens).items()
        }
        for pair in measurement.load_pairs(Path(data_dir), split)
    ]


def _token_losses(model: PreTrainedModel, batch: Tensors, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy at every position, (B, T - 1), from full logits; without labels they are drawn from the model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    flat = logits.reshape(-1, logits.shape[-1]).float()
    if labels is None:
        with torch.no_grad():
            targets = torch.multinomial(flat.softmax(dim=1), num_samples=1).flatten()
    else:
        targets = labels[:, 1:].flatten()
    return F.cross_entropy(flat, targets, reduction="none", ignore_index=-100).view(logits.shape[:2])


def _log_odds(model: PreTrainedModel, batch: Tensors) -> torch.Tensor:
    """Mean loss of the chosen minus that of the rejected answer, (B,); one pass, as kronfluence's hooks need it."""
    both = {
        name: torch.cat([batch[f"{branch}_{name}"] for branch in BRANCHES])
        for name in ("input_ids", "attention_mask", "labels")
    }
    totals = _token_losses(model, both, both["labels"]).sum(dim=1)
    chosen, rejected = (totals / (both["labels"][:, 1:] != -100).sum(dim=1)).chunk(2)
    return chosen - rejected


class ReleasedTask(Task):
    """The task as released, one for each measurement."""

    def __init__(self, tracked: list[str]) -> None:
        self.tracked = tracked

    def compute_train_loss(self, batch: Tensors, model: PreTrainedModel, sample: bool = False) -> torch.Tensor:
        """Sum of the token losses; with `sample`, on labels drawn at every position."""
        return _token_losses(model, batch, None if sample else batch["labels"]).sum()

    def compute_measurement(self, batch: Tensors, model: PreTrainedModel) -> torch.Tensor:
        """The log-odds loss."""
        return _log_odds(model, batch).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """The Linears of the last block."""
        return self.tracked

    def get_attention_mask(self, batch: Tensors) -> torch.Tensor | None:
        """The mask of the dialogues; a pair has two masks, and kronfluence can use neither."""
        return batch.get("attention_mask")


def step_1(model: str, hh_dataset: str, data_dir: str, output: Path, factor_examples: int) -> Tensors:
    """Factors and scores, one task after the other."""
    scores = {}
    for task_name in MEASUREMENTS:
        loaded, tokenizer = load(model)
        train = dialogue_rows(hh_dataset, "train", tokenizer)
        queries = pair_rows(data_dir, task_name, "train", tokenizer)
        task = ReleasedTask(traced_linear_names(loaded, "auto", 1))
        analyzer = Analyzer(
            task_name, prepare_model(loaded, task), task, cpu=True, output_dir=str(output), disable_tqdm=True
        )
        analyzer.fit_all_factors(
            "ekfac",
            Subset(train, range(factor_examples)),
            per_device_batch_size=FACTOR_BATCH,
            factor_args=FactorArguments(strategy="ekfac"),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=SCORE_BATCH,
            per_device_train_batch_size=SCORE_BATCH,
            score_args=ScoreArguments(damping_factor=None, aggregate_query_gradients=True),
        )
        scores[task_name] = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores


@torch.no_grad()
def step_2(model: str, hh_dataset: str) -> torch.Tensor:
    """Mean last hidden state of every dialogue, (N, hidden), from the causal language model with all hidden states."""
    loaded, tokenizer = load(model)
    dialogues = load_dialogues(hh_dataset, "train")
    texts = [f"{prompt} {answer}" for prompt, answer in zip(dialogues.prompts, dialogues.completions, strict=True)]
    means = []
    for start in range(0, len(texts), REPRESENTATION_BATCH):
        encoded = tokenizer(
            texts[start : start + REPRESENTATION_BATCH],
            padding=True,
            truncation=True,
            max_length=MAX_DIALOGUE_TOKENS,
            return_tensors="pt",
        )
        mask = encoded["attention_mask"]
        hidden = loaded(input_ids=encoded["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[
            -1
        ]
        means.append((hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))
    return torch.cat(means)


def step_3(features: torch.Tensor, quality: torch.Tensor, bottom_k: int, if_weight: float) -> list[int]:
    """Lazy greedy with a heap of stale gains on random Fourier features (N, D), one candidate at a time."""
    quality_list = quality.tolist()
    norms = features.double().square().sum(dim=1).tolist()
    heap = [
        (-(math.log1p(norm) + if_weight * math.log1p(q)), i, 0)
        for i, (norm, q) in enumerate(zip(norms, quality_list, strict=True))
    ]
    heapq.heapify(heap)
    picks: list[int] = []
    picked_features = torch.empty(bottom_k, features.shape[1])
    cholesky = torch.zeros(bottom_k, bottom_k, dtype=torch.float64)
    picked_quality = 0.0
    while len(picks) < bottom_k:
        _, i, age = heapq.heappop(heap)
        k = len(picks)
        kernel = (picked_features[:k] @ features[i]).double()  # (k,)
        row = torch.linalg.solve_triangular(cholesky[:k, :k], kernel[:, None], upper=False)[:, 0]
        schur = max(1.0, 1 + norms[i] - float(row.square().sum()))
        if age < k:
            gain = math.log(schur) + if_weight * math.log1p(quality_list[i] / (1 + picked_quality))
            heapq.heappush(heap, (-gain, i, k))
            continue
        picked_features[k] = features[i]
        cholesky[k, :k], cholesky[k, k] = row, math.sqrt(schur)
        picked_quality += quality_list[i]
        picks.append(i)
    return picks


def step_4(model: str, hh_dataset: str, indices: Sequence[int], factors: Path) -> Tensors:
    """The preconditioned mean gradient of the subset, taken one padded dialogue at a time."""
    loaded, tokenizer = load(model)
    train = dialogue_rows(hh_dataset, "train", tokenizer)
    tracked = traced_linear_names(loaded, "auto", 1)
    loaded.requires_grad_(False)
    for name in tracked:
        loaded.get_submodule(name).requires_grad_(True)
    for index in indices:
        row = {name: tensor[None] for name, tensor in train[index].items()}
        losses = _token_losses(loaded, row, row["labels"])
        (losses.sum() / (row["labels"][:, 1:] != -100).sum() / len(indices)).backward()
    stored = {
        name: Analyzer.load_file(factors / f"{name}.safetensors")
        for name in ("activation_eigenvectors", "gradient_eigenvectors", "lambda_matrix", "num_lambda_processed")
    }
    gradients = {}
    for name in tracked:
        module = loaded.get_submodule(name)
        gradient = torch.cat([module.weight.grad, module.bias.grad[:, None]], dim=1)
        q_a, q_g = stored["activation_eigenvectors"][name], stored["gradient_eigenvectors"][name]
        eigenvalues = stored["lambda_matrix"][name] / stored["num_lambda_processed"][name]
        rotated = (q_g.T @ gradient @ q_a) / (eigenvalues + DAMPING_OF_MEAN * eigenvalues.mean())
        gradients[name] = (q_g @ rotated @ q_a.T)[None]
    return gradients


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, hh_dataset: str, data_dir: str
) -> dict[str, float]:
    """HH loss as the mean over batches of 8 of each batch's mean, and the three log-odds losses."""
    dialogues = dialogue_rows(hh_dataset, "test", tokenizer)
    losses = []
    for batch in DataLoader(dialogues, batch_size=EVALUATION_BATCH):
        token_losses = _token_losses(model, batch, batch["labels"])
        losses.append(float(token_losses.sum() / (batch["labels"][:, 1:] != -100).sum()))
    results = {"anthropic": sum(losses) / len(losses)}
    for task in MEASUREMENTS:
        pairs = DataLoader(pair_rows(data_dir, task, "test", tokenizer), batch_size=EVALUATION_BATCH)
        results[task] = float(torch.cat([_log_odds(model, batch) for batch in pairs]).mean())
    return results


def step_5(
    model: str, hh_dataset: str, data_dir: str, gradients: Tensors, learning_rates: Sequence[float]
) -> list[dict[str, float]]:
    """The whole model, updated and evaluated at each learning rate."""
    results = []
    for learning_rate in learning_rates:
        loaded, tokenizer = load(model)
        with torch.no_grad():
            for name, gradient in gradients.items():
                module = loaded.get_submodule(name)
                module.weight.add_(gradient[0, :, :-1], alpha=learning_rate)
                module.bias.add_(gradient[0, :, -1], alpha=learning_rate)
        results.append(evaluate(loaded, tokenizer, hh_dataset, data_dir))
    return results


def step_6(model: str, hh_dataset: str, data_dir: str) -> dict[str, float]:
    """The four measurements of one model."""
    return evaluate(*load(model), hh_dataset, data_dir)
