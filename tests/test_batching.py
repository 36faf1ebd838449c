"""Token-budget batches: every example once, within the budget, results back in order."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig

from utils.batching import IGNORED_LABEL, BatchLoader, LabelledSequence, plan_batches, token_budget


def make_sequences(count: int, seed: int = 0) -> list[LabelledSequence]:
    source = random.Random(seed)

    def sequence() -> LabelledSequence:
        length = source.randint(2, 40)
        start = source.randint(0, length - 1)
        return LabelledSequence(np.arange(1, length + 1, dtype=np.int32), start, length)

    return [sequence() for _ in range(count)]


@pytest.mark.parametrize("tokens", [1, 50, 200, 10_000])
def test_plan_covers_all_within_the_budget(tokens):
    lengths = [random.Random(i).randint(1, 90) for i in range(100)]
    batches = plan_batches(lengths, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    assert max(lengths) == lengths[batches[0][0]], "the longest comes first"


def test_plan_wastes_little():
    lengths = [random.Random(i).randint(20, 400) for i in range(2_000)]
    padded = sum(len(b) * max(lengths[i] for i in b) for b in plan_batches(lengths, 4_096))
    assert padded < 1.05 * sum(lengths)


def test_batches_hold_their_sequences():
    sequences, seen = make_sequences(37), []
    for batch in BatchLoader(sequences, 150, pad_token_id=0):
        index = batch["index"].tolist()
        seen += index
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        assert batch["weight"].tolist() == pytest.approx([1 / 37] * len(index))
        for row, sequence in enumerate(sequences[i] for i in index):
            length = len(sequence.input_ids)
            assert batch["input_ids"][row, :length].tolist() == sequence.input_ids.tolist()
            assert batch["attention_mask"][row].sum() == length
            assert not batch["input_ids"][row, length:].any()
            labels = batch["labels"][row]
            counted = labels != IGNORED_LABEL
            assert counted.nonzero().flatten().tolist() == list(range(sequence.label_start, sequence.label_end))
            assert torch.equal(labels[counted], batch["input_ids"][row][counted])
    assert sorted(seen) == list(range(37))


def test_indices_choose_and_keep_their_positions():
    loader = BatchLoader(make_sequences(20), 100, pad_token_id=0, indices=[3, 17, 5])
    assert sorted(i for batch in loader for i in batch["index"].tolist()) == [3, 5, 17]


def test_the_automatic_budget_on_a_gpu_counts_the_traced_linears(monkeypatch):
    """On a GPU, of which the test only has the name."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 16 << 30))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=GPTNeoXConfig(hidden_size=2_048))
    linears = [torch.nn.Linear(2_048, 8_192, device="meta"), torch.nn.Linear(8_192, 2_048, device="meta")]
    assert token_budget(on_gpu, 512, linears) == 512
    without, with_linears = token_budget(on_gpu, "auto"), token_budget(on_gpu, "auto", linears)
    assert with_linears == int(0.25 * (8 << 30) / (12 * (2 * 10_240 + 32 * 2_048)))
    assert 2_048 <= with_linears < without <= 65_536


def test_padding_to_a_length():
    for batch in BatchLoader(make_sequences(5), 1_000, pad_token_id=0, pad_to=64):
        assert batch["input_ids"].shape[1] == 64


def test_weights_follow_their_sequences():
    weights = np.arange(20) / 7
    for batch in BatchLoader(make_sequences(20), 100, pad_token_id=0, indices=[3, 17, 5], weights=weights):
        assert batch["weight"].tolist() == pytest.approx([i / 7 for i in batch["index"].tolist()])
