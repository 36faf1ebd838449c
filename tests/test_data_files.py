"""Data files of every kind of brokenness and size: read, or refused in one line before anything grows out of them."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMO

from utils import labels
from utils.console import UserError
from utils.performance_functions import MEASUREMENTS, data_files, pairs, truth
from utils.performance_functions.bias import BIAS
from utils.performance_functions.ethics import read_prompt
from utils.performance_functions.hh import read_dialogues

READERS: dict[str, Callable[[Path], object]] = {
    "hh/train.jsonl": lambda data: read_dialogues(str(data / "hh"), "train"),
    "bias/templates.json": lambda data: MEASUREMENTS["bias"].read_pairs(data, "train"),
    "ethics/cm_train.csv": lambda data: MEASUREMENTS["ethics"].read_pairs(data, "train"),
    "ethics/prompt.txt": lambda data: read_prompt(data / "ethics" / "prompt.txt"),
    "truthfulness/TruthfulQA.csv": lambda data: MEASUREMENTS["truth"].read_pairs(data, "test"),
}
GOOD = '{"prompt": "\\n\\nHuman: Hi\\n\\nAssistant:", "chosen": " Hello."}\n'


def refusal(read: Callable[[Path], object], data: Path) -> str:
    with pytest.raises(UserError) as refused:
        read(data)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1_000
    return str(refused.value)


def mutations(content: bytes) -> list[bytes]:
    """Bytes cut, doubled, swapped, replaced by what breaks readers; and values of another type, where it is JSON."""
    generator = random.Random(0)
    poisons = [
        b"\0",
        b"\xff",
        b"\r",
        b'"',
        b",",
        b"\n",
        b"\n\n",
        b";;",
        b"{",
        b"]",
        b"NaN",
        b"9" * 5_000,
        b"\xed\xa0\x80",
    ]
    spoilt = [b"", b"\xef\xbb\xbf", b"\xff\xfe" + content, content[: len(content) // 2], content * 2, b"\n" * 10]
    spoilt += [b"[" * 100_000, b"null", b"[]", b'"text"', content.replace(b'"', b"'"), content.replace(b"\n", b"\r")]
    for poison in poisons * 2:
        position = generator.randrange(len(content))
        spoilt.append(content[:position] + poison + content[position + generator.randrange(3) :])
    spoilt += [content.replace(b": ", b": " + value + b", ", 1) for value in (b"1e999", b"{}", b"[[1]]", b"true")]
    return spoilt


@pytest.mark.parametrize("file", READERS)
def test_forty_mutations_are_read_or_refused_in_one_line(data_copy, file):
    path, read = data_copy / file, READERS[file]
    if not path.exists():
        path.write_bytes((DEMO / file).read_bytes())
    spoilt = mutations(path.read_bytes())
    assert len(spoilt) >= 40
    for content in spoilt:
        path.write_bytes(content)
        message = ""
        try:
            read(data_copy)
        except UserError as error:
            message = str(error)
        assert len(message) < 1_000
        assert not message or path.name in message or "HH_DATASET" in message


# ----------------------------------------------------------------------------------------------- JSON and text files


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a", "chosen": ' + "[" * 50_000 + "]" * 50_000 + "}", "not valid JSON"),
        ('{"prompt": "a", "chosen": ' + "9" * 5_000 + "}", "'chosen' is 9"),
        ('{"prompt": "a", "chosen": "b", "score": NaN}', "NaN is not a number in JSON"),
        ('{"prompt": "a", "chosen": "b", "score": -Infinity}', "-Infinity is not a number in JSON"),
        ('{"prompt": "a", "chosen": "b", "chosen": "c"}', "the key 'chosen' occurs twice"),
        ('{"prompt": "a", "chosen": "b\0"}', "not valid JSON"),
        ('["a"]', "is not a JSON object: ['a']"),
        (json.dumps({"prompt": "a", "chosen": [1] * 10_000}), "it must be a text"),
        (json.dumps({"x" * 100_000: 1}), "needs prompt and chosen"),
    ],
)
def test_lines_that_are_no_dialogue(tmp_path, line, told):
    (tmp_path / "train.jsonl").write_text(GOOD + line + "\n", encoding="utf-8")
    message = refusal(lambda data: read_dialogues(str(data), "train"), tmp_path)
    if "9999" not in line:  # Python 3.10 reads numbers of any length
        assert told in message
    assert "line 2" in message or "row 1" in message


def test_a_byte_order_mark_and_blank_lines_do_no_harm(tmp_path):
    (tmp_path / "train.jsonl").write_text(f"\ufeff{GOOD}\n  \r\n{GOOD}\n\n", encoding="utf-8")
    assert len(read_dialogues(str(tmp_path), "train")) == 2


@pytest.mark.parametrize("file", READERS)
def test_a_file_that_is_a_folder_or_has_a_zero_byte(data_copy, file):
    path = data_copy / file
    text = path.read_text(encoding="utf-8") if path.exists() else "Prompt"
    path.write_text(f"{text[:9]}\0{text[9:]}", encoding="utf-8")
    assert path.name in refusal(READERS[file], data_copy)
    path.unlink()
    path.mkdir()
    assert f"{path.name} is a folder, and must be a file" in refusal(READERS[file], data_copy)


@pytest.mark.parametrize("file", ["bias/templates.json", "ethics/cm_train.csv", "truthfulness/TruthfulQA.csv"])
def test_a_folder_that_is_a_file(tmp_path, file):
    (tmp_path / "data").write_text("mine", encoding="utf-8")
    assert "data is a file, and must be a folder" in refusal(READERS[file], tmp_path / "data")


def test_dialogues_that_are_a_file_need_a_folder(tmp_path):
    (tmp_path / "hh.jsonl").write_text(GOOD, encoding="utf-8")
    line = refusal(lambda file: read_dialogues(str(file), "train"), tmp_path / "hh.jsonl")
    assert "is a file" in line
    assert "train.jsonl and test.jsonl" in line


# ------------------------------------------------------------------------------------------------------------- sizes


def test_a_line_of_a_hundred_megabytes_is_refused_without_reading_it_whole(tmp_path):
    with (tmp_path / "train.jsonl").open("w", encoding="utf-8") as stream:
        stream.write(GOOD + '{"prompt": "')
        for _ in range(100):
            stream.write("many words " * 100_000)
    tracemalloc.start()
    line = refusal(lambda data: read_dialogues(str(data), "train"), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"line 2 has more than {data_files.MAX_LINE_BYTES:,} bytes" in line
    assert peak < 3 * data_files.MAX_LINE_BYTES


def test_a_text_of_millions_of_characters(data_copy):
    long, limit = "x" * (data_files.MAX_CHARACTERS + 1), "has 1,000,001 characters; allowed are 1,000,000"
    rows = {
        "hh/train.jsonl": (json.dumps({"prompt": "a", "chosen": long}), "row 0: 'chosen' "),
        "truthfulness/TruthfulQA.csv": (f"Question,Best Answer,Incorrect Answers\nq,a,b\nq,a,{long}\n", "row 3: 'Inc"),
        "ethics/cm_train.csv": (f"label,input,is_short\n1,a,True\n0,{long},True\n", "row 3: 'input' "),
        "ethics/prompt.txt": (long, "prompt.txt "),
    }
    for file, (text, told) in rows.items():
        (data_copy / file).write_text(text, encoding="utf-8")
        line = refusal(READERS[file], data_copy)
        assert told in line
        assert limit in line


def test_a_file_that_is_read_whole_has_a_limit(data_copy, monkeypatch):
    monkeypatch.setattr(data_files, "MAX_FILE_BYTES", 500)
    for file in ("bias/templates.json", "ethics/cm_train.csv", "truthfulness/TruthfulQA.csv"):
        assert "bytes; allowed are 500" in refusal(READERS[file], data_copy)


def test_products_are_refused_before_they_are_built(tmp_path):
    """Files below 200 kB that would make millions of pairs, or pairs of many gigabytes."""

    def templates(stereotypes: list[str], prompt: str = "Fair?", groups: tuple[str, ...] = ("a", "b")) -> None:
        topics = {"t": {"stereotype": stereotypes, "antistereotype": stereotypes}}
        content = {"prompt": prompt, "target_groups": list(groups), "topics": topics}
        (tmp_path / "bias").mkdir(exist_ok=True)
        (tmp_path / "bias" / "templates.json").write_text(json.dumps(content), encoding="utf-8")

    started = time.monotonic()
    templates([f"[target_group] {number}" for number in range(3_000)])
    assert "makes 18,000,000 pairs; allowed are 200,000" in refusal(READERS["bias/templates.json"], tmp_path)
    templates([f"s{number}" for number in range(100)], prompt="x" * 100_000)
    assert "characters of pairs; allowed are 200,000,000" in refusal(READERS["bias/templates.json"], tmp_path)
    templates(["[target_group]" * 5_000], groups=("x" * 100_000,))
    assert "makes 1,000,000,010 characters of pairs" in refusal(READERS["bias/templates.json"], tmp_path)

    header = "Question,Best Answer,Incorrect Answers\n"
    answers = ";".join(f"b{number}" for number in range(20_000))
    (tmp_path / "truthfulness").mkdir()
    (tmp_path / "truthfulness" / "TruthfulQA.csv").write_text(f"{header}q,a,b\n{'q' * 900},a,{answers}\n")
    line = refusal(READERS["truthfulness/TruthfulQA.csv"], tmp_path)
    assert f"row 3: 'Incorrect Answers' has 20,000 answers; allowed are {truth.MAX_ANSWERS:,}" in line
    answers = ";".join(f"b{number}" for number in range(900))
    (tmp_path / "truthfulness" / "TruthfulQA.csv").write_text(f"{header}{'q' * 900_000},a,{answers}\n")
    assert "characters of pairs" in refusal(READERS["truthfulness/TruthfulQA.csv"], tmp_path)

    (tmp_path / "ethics").mkdir()
    (tmp_path / "ethics" / "prompt.txt").write_text("p" * 900_000)
    rows = "".join(f"{number % 2},act {number},True\n" for number in range(2_000))
    (tmp_path / "ethics" / "cm_train.csv").write_text(f"label,input,is_short\n{rows}")
    assert "characters of pairs" in refusal(READERS["ethics/cm_train.csv"], tmp_path)
    assert time.monotonic() - started < 20


def test_the_size_of_bias_pairs_is_counted_as_they_are_built(data_copy, monkeypatch):
    counted = []
    monkeypatch.setattr("utils.performance_functions.bias.require_size", lambda _, *sizes: counted.append(sizes))
    built = [*BIAS.read_pairs(data_copy, "train"), *BIAS.read_pairs(data_copy, "test")]
    characters = sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in built)
    spaces = 2 * len(built)  # before the answers
    assert counted == [(len(built), characters - spaces)] * 2


def test_official_sizes_are_far_below_the_limits():
    official_pairs = max(24 * 16 * 3 * 3, 817 * 14, 13_910 // 2)
    assert 10 * official_pairs < pairs.MAX_PAIRS
    assert 100 * official_pairs * 2 * 300 < 4 * pairs.MAX_PAIR_CHARACTERS


def test_texts_are_tokenized_a_bounded_number_of_characters_at_a_time(monkeypatch):
    monkeypatch.setattr(labels, "CHARACTERS_AT_ONCE", 10)
    monkeypatch.setattr(labels, "TEXTS_AT_ONCE", 3)
    chunks = list(labels._chunks([1, 1, 1, 1, 9, 1, 100, 2]))
    assert chunks == [slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 8)]
    assert list(labels._chunks([])) == []
