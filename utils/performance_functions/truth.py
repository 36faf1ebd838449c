"""Truth pairs: the best against an incorrect answer (TruthfulQA; Lin, Hilton and Evans 2022)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Literal

from utils.console import UserError, shown_path
from utils.performance_functions.data_files import is_there, read_csv, require_length
from utils.performance_functions.pairs import SPLIT_SEED, AnswerPair, AnswerPairs, Measurement, Question, require_size

QUESTION, BEST, CORRECT, INCORRECT = "Question", "Best Answer", "Correct Answers", "Incorrect Answers"
TRAIN_SHARE = 0.8
MAX_ANSWERS = 1_000  # of a question, correct or incorrect; TruthfulQA has at most 20 of both


def read_pairs(data_dir: Path, split: Literal["train", "test"]) -> AnswerPairs:
    """The best answer of each question against the first incorrect one; each question is a cluster.

    The split is that of `truthfulness/splits/TruthfulQA_SPLIT.csv` where both of them exist, else a seeded 80/20 split
    of `truthfulness/TruthfulQA.csv`. Where a file lists the correct answers, the questions come with all of theirs.

    Raises:
        UserError: the file is missing, lacks a column, is too large, a question lacks an answer or has too many, or one
            split file is there alone.
    """
    folder = data_dir / "truthfulness"
    split_paths = {name: folder / "splits" / f"TruthfulQA_{name}.csv" for name in ("train", "test")}
    missing = [path for path in split_paths.values() if not is_there(path)]
    if not missing:
        return _answer_pairs(_read_questions(split_paths[split]), "by files")
    if len(missing) == 1:
        raise UserError(
            f"{shown_path(missing[0])} is missing, and the other split is there; give both or none: a split of "
            "TruthfulQA.csv has questions of both"
        )
    path = folder / "TruthfulQA.csv"
    questions = _read_questions(path)
    random.Random(SPLIT_SEED).shuffle(questions)
    num_train = int(len(questions) * TRAIN_SHARE)
    chosen = questions[:num_train] if split == "train" else questions[num_train:]
    if not chosen:
        raise UserError(f"{shown_path(path)} has {len(questions)} questions, which leaves none for the {split} split")
    return _answer_pairs(chosen, "seeded 80/20")


def _read_questions(path: Path) -> list[Question]:
    """Every question of a file; the best answer alone where the file has no list of correct ones.

    Raises:
        UserError: as `read_pairs`.
    """
    table = read_csv(path, [QUESTION, BEST, INCORRECT])
    questions = []
    num_answers = num_characters = 0
    for line, row in enumerate(table.to_dict("records"), start=2):
        for column in filter(row.__contains__, (QUESTION, BEST, INCORRECT, CORRECT)):
            require_length(row[column], f"{shown_path(path)}, row {line:,}: {column!r}")
        best, incorrect = _distinct([row[BEST]]), _distinct(row[INCORRECT].split(";"))
        for name, is_given in ((QUESTION, row[QUESTION].strip()), (BEST, best), (INCORRECT, incorrect)):
            if not is_given:
                raise UserError(f"{shown_path(path)}, row {line}: {name!r} is empty; every question needs both answers")
        correct = _distinct([row[BEST], *row[CORRECT].split(";")]) if CORRECT in row else best
        for column, answers in ((CORRECT, correct), (INCORRECT, incorrect)):
            if len(answers) > MAX_ANSWERS:
                raise UserError(
                    f"{shown_path(path)}, row {line:,}: {column!r} has {len(answers):,} answers; allowed are "
                    f"{MAX_ANSWERS:,}: remove some"
                )
        questions.append(Question(f"{row[QUESTION].strip()}\n\nAnswer:", correct, incorrect))
        num_answers += len(correct) + len(incorrect)
        num_characters += sum(len(questions[-1].prompt) + len(answer) for answer in (*correct, *incorrect))
    require_size(path, num_answers, num_characters)
    return questions


def _distinct(answers: list[str]) -> list[str]:
    """The answers that are not empty, once each, after a space."""
    return list(dict.fromkeys(f" {answer.strip()}" for answer in answers if answer.strip()))


def _answer_pairs(questions: list[Question], split_rule: str) -> AnswerPairs:
    pairs = [AnswerPair(prompt, correct[0], incorrect[0]) for prompt, correct, incorrect in questions]
    has_lists = any(len(question.correct) > 1 for question in questions)
    return AnswerPairs(pairs, [pair.prompt for pair in pairs], split_rule, questions if has_lists else [])


TRUTH = Measurement("truth", read_pairs, max_tokens=512)
