"""The baselines among the scores: text similarity and directions between representations, against plain loops."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from conftest import answer_pairs

from utils.performance_functions.hh import Dialogues
from utils.performance_functions.pairs import AnswerPair
from utils.rankings import bm25_scores, mean_difference_projection

COMPLETIONS = [" all cats are lazy cats", " dogs like honest people", " honest work", " nothing shared", ""]
PAIRS = [
    AnswerPair("Q:", " honest people", " lazy people"),
    AnswerPair("Q:", " good dogs work", " lazy lazy cats of unknown words"),
]


def plain_bm25(query: list[str], documents: list[list[str]]) -> list[float]:
    """BM25 as Lucene counts it (k1 1.5, b 0.75), one word of the query after the other."""
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            containing = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            count = Counter(document)[word]
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))
        scores.append(score)
    return scores


def test_text_scores_are_bm25_of_chosen_less_rejected_answers():
    dialogues = Dialogues(["Human: hi\n\nAssistant:"] * len(COMPLETIONS), COMPLETIONS)
    documents = [[word for word in text.split() if len(word) > 1] for text in COMPLETIONS]
    expected = torch.zeros(len(COMPLETIONS), dtype=torch.float64)
    for _, chosen, rejected in PAIRS:
        expected += torch.tensor(plain_bm25(chosen.split(), documents), dtype=torch.float64) / len(PAIRS)
        expected -= torch.tensor(plain_bm25(rejected.split(), documents), dtype=torch.float64) / len(PAIRS)
    scores = bm25_scores(dialogues, answer_pairs(PAIRS))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert scores.argmin() == 0
    assert scores[3] == scores[4] == 0


@pytest.mark.parametrize("completions", [["", " ?"], ["a b", "c"]])
def test_completions_without_a_word_score_0(completions):
    scores = bm25_scores(Dialogues(["p"] * 2, completions), answer_pairs(PAIRS))
    assert scores.tolist() == [0, 0]


def test_the_mean_difference_is_a_projection_on_the_direction_to_the_trustworthy_answers():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator) - 1
    dialogues = torch.randn(6, 8, generator=generator)
    direction = [
        sum(float(row[i]) for row in chosen) / 5 - sum(float(row[i]) for row in rejected) / 7 for i in range(8)
    ]
    norm = math.sqrt(sum(value * value for value in direction))
    mean = dialogues.mean(dim=0)
    expected = [sum(float(row[i] - mean[i]) * direction[i] for i in range(8)) / norm for row in dialogues]
    projection = mean_difference_projection(chosen, rejected, dialogues)
    assert projection.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert mean_difference_projection(chosen, chosen, dialogues).abs().max() == 0


@pytest.mark.parametrize("scores_type", ["bm25", "mean_difference"])
def test_step_4_ranks_by_them(make_workspace, scores_type):
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py", "--TASK_NAME", "bias")
    if scores_type == "mean_difference":
        with pytest.raises(SystemExit):
            workspace.run("make_gradients.py", "--TASK_NAME", "bias", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 5)
        workspace.run("representations/train_reps.py", "--ANSWERS_OF", "bias")
    workspace.run("make_gradients.py", "--TASK_NAME", "bias", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 5)
    assert list(workspace.output.rglob(f"query_grads_{scores_type}_bottom5/aggregated_query_grads.safetensors"))
