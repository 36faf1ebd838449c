"""How much of an improvement is truth, and how much the style of good answers: test pairs told apart by style alone."""

from __future__ import annotations

import numpy as np

from utils.performance_functions.pairs import AnswerPairs

CLOSE_IN_LENGTH = 0.2  # relative difference of the words of two answers that counts as the same length


def answers_only_probabilities(train: AnswerPairs, test: AnswerPairs) -> np.ndarray:
    """The probability that the chosen answer is the trustworthy one, from the two answers without their question.

    A logistic regression on words, word pairs and length, fitted on the training pairs' answers. TruthfulQA's answers
    are known to give their label away in this way, by negations and hedges.

    Returns:
        (P,) of the test pairs, in [0, 1]; below 1/2 style points to the wrong answer.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"(?u)\b\w+\b")
    words.fit(_answers(train))

    def features(pairs: AnswerPairs):  # noqa: ANN202
        answers = _answers(pairs)
        return hstack([words.transform(answers), np.log1p([[len(answer.split())] for answer in answers])]).tocsr()

    model = LogisticRegression(max_iter=1_000).fit(features(train), np.repeat([1, 0], len(train)))
    chosen, rejected = np.split(model.decision_function(features(test)), 2)
    return 1 / (1 + np.exp(rejected - chosen))


def is_close_in_length(pairs: AnswerPairs) -> np.ndarray:
    """(P,) whether the two answers of each pair have nearly as many words."""
    counts = np.array([[len(pair.chosen.split()), len(pair.rejected.split())] for pair in pairs])
    return np.abs(counts[:, 0] - counts[:, 1]) <= CLOSE_IN_LENGTH * counts.max(axis=1)


def _answers(pairs: AnswerPairs) -> list[str]:
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
