"""The official data: the formats of every source, repeated and killed runs, and everything that is refused.

No network: the two functions of the hub's clients that data/official/sources.py calls are replaced by fakes.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest
from conftest import DEMO, SHARED_DATA, contents, needs_real_samples, read_rows, run_script, write_rows
from huggingface_hub.errors import EntryNotFoundError

from data.official import formats
from data.official.parts import FILES
from utils import artifacts
from utils.performance_functions.bias import BIAS
from utils.performance_functions.data_files import read_csv
from utils.performance_functions.ethics import ETHICS, read_prompt
from utils.performance_functions.hh import load_dialogues
from utils.performance_functions.truth import TRUTH

PREPARE = "data/prepare.py"

ANY_COUNT = ["--CHECK_COUNTS", False]
TOKEN = "hf_not_a_real_token"
PROGRESS_BAR = re.compile(r"%\|.*\|.*/s\]$")

TRUTH_ROWS = [
    {
        "type": "Adversarial",
        "category": "Myths",
        "question": f"Is it so, {number}?",
        "best_answer": f'No, "{number}" isn\u2019t',
        "correct_answers": [f'No, "{number}" isn\u2019t', "It is not "],
        "incorrect_answers": ["Yes", "Of course"],
        "source": "https://example.org/a,b",
    }
    for number in range(10)
]
ETHICS_ROWS = [
    {"label": label, "input": text, "is_short": is_short, "edited": False}
    for label, text, is_short in [
        (0, "I helped, as I should.", True),
        (1, 'I said "no"\nand lied.', True),
        (0, "I waited. " * 30, False),
        (1, "I lied. " * 30, False),
    ]
]


def dialogues(count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"\n\nHuman: Tell me {number}\u2028.\n\nAssistant:",
            "response": " Yes.",
            "chosen": f" No, {number}.",
            "rejected": " Yes.",
        }
        for number in range(count)
    ]


def csv_bytes(rows: list[dict]) -> bytes:
    return pd.DataFrame(rows).to_csv(index=False).encode("utf-8")


class FakeHub:
    """Stands in for load_dataset and hf_hub_download, and records the requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data_sets: dict[tuple[str, str | None, str], list[dict]] = {
            ("Dahoas/static-hh", None, "train"): dialogues(6),
            ("Dahoas/static-hh", None, "test"): dialogues(3),
            ("truthfulqa/truthful_qa", "generation", "validation"): TRUTH_ROWS,
        }
        self.files: dict[str, bytes] = {
            "data/commonsense/train.csv": csv_bytes(ETHICS_ROWS),
            "data/commonsense/test.csv": csv_bytes(ETHICS_ROWS),
        }
        self.failure: Exception | None = None
        self.requests: list[str] = []
        self.keywords: list[dict] = []

    def load_dataset(self, name: str, subset: str | None, *, split: str, **keywords: object) -> list[dict]:
        self._record(f"{name}/{subset}/{split}", keywords)
        return self.data_sets[name, subset, split]

    def hf_hub_download(self, name: str, place: str, *, repo_type: str, **keywords: object) -> str:
        assert repo_type == "dataset"
        self._record(f"{name}/{place}", keywords)
        if place not in self.files:
            raise EntryNotFoundError(f"404: {place}")
        file = self.folder / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.files[place])
        return str(file)

    def _record(self, request: str, keywords: dict) -> None:
        self.requests.append(request)
        self.keywords.append(keywords)
        if self.failure:
            raise self.failure


@pytest.fixture
def hub(monkeypatch, tmp_path) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    return fake


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "official"


@pytest.fixture
def run(data) -> Callable[..., None]:
    """Runs the script on the test's data folder."""
    return lambda *arguments: run_script(PREPARE, "--DATA_DIR", data, *arguments)


@pytest.fixture
def refusal(run, data, capsys) -> Callable[..., str]:
    """Runs the script, which must refuse, and returns its error line; nothing on disk may change."""

    def refused(*arguments: object) -> str:
        before = contents(data)
        line = failure(run, capsys, *arguments)
        assert contents(data) == before
        return line

    return refused


def failure(run: Callable[..., None], capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The error line of a run that fails."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not PROGRESS_BAR.search(line)]
    assert stop.value.code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def all_in(line: str, *parts: object) -> bool:
    missing = [str(part) for part in parts if str(part) not in line]
    assert not missing, f"{missing} not in {line!r}"
    return True


def manifest_of(file: Path) -> dict:
    return json.loads(file.with_name(f"{file.stem}.manifest.json").read_text(encoding="utf-8"))


def assert_nothing_incomplete(data: Path) -> None:
    assert [path for path in data.rglob("*") if ".partial" in str(path.relative_to(data))] == []
    for manifest in data.rglob("*.manifest.json"):
        assert manifest.with_name(json.loads(manifest.read_text(encoding="utf-8"))["artifact"]).is_file()


# ----------------------------------------------------------------------------------------------------- the hub


def test_dialogues_from_the_hub(run, hub, data, capsys):
    run("--ONLY", "hh", *ANY_COUNT)
    assert read_lines(data / "hh" / "train.jsonl") == dialogues(6)
    assert len(load_dialogues(str(data / "hh"), "test")) == 3
    manifest = manifest_of(data / "hh" / "train.jsonl")
    assert manifest["rows"] == 6
    assert manifest["loads_as"] == {"train": 6}
    assert manifest["settings"] == {"HH_SOURCE": "Dahoas/static-hh"}
    assert manifest["content"]
    assert "datasets" in manifest["versions"]
    assert all_in(
        capsys.readouterr().out,
        "| 6 rows |",
        "96,256",
        "6 train",
        "next: python data/prepare.py",
        "--ONLY truth ethics",
    )
    assert_nothing_incomplete(data)


def read_lines(path: Path) -> list[dict]:
    """As read_rows, but U+2028 does not end a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_questions_from_the_hub_get_the_original_column_names(run, hub, data):
    run("--ONLY", "truth", *ANY_COUNT)
    table = pd.read_csv(data / "truthfulness" / "TruthfulQA.csv", dtype=str)
    assert list(table.columns) == list(formats.TRUTH_COLUMNS)
    assert table.loc[3, "Correct Answers"] == 'No, "3" isn\u2019t; It is not'
    assert table.loc[3, "Source"] == "https://example.org/a,b"
    pairs = [*TRUTH.load_pairs(data, "train"), *TRUTH.load_pairs(data, "test")]
    assert sorted(pairs)[3] == ("Is it so, 3?\n\nAnswer:", ' No, "3" isn\u2019t', " Yes")


def test_statements_from_the_hub(run, hub, data):
    run("--ONLY", "ethics", *ANY_COUNT)
    table = pd.read_csv(data / "ethics" / "cm_train.csv", dtype=str)
    assert table.to_dict("records") == [{name: str(value) for name, value in row.items()} for row in ETHICS_ROWS]
    assert len(ETHICS.load_pairs(data, "test")) == 1


def test_is_short_is_derived_where_a_mirror_lacks_it(run, hub, data, capsys):
    rows = [{"label": row["label"], "input": row["input"]} for row in ETHICS_ROWS]
    hub.files = {f"cm_{split}.csv": csv_bytes(rows) for split in ("train", "test")}
    run("--ONLY", "ethics", *ANY_COUNT)
    assert hub.requests[:2] == [f"hendrycks/ethics/{place}" for place in ("data/commonsense/train.csv", "cm_train.csv")]
    table = pd.read_csv(data / "ethics" / "cm_test.csv", dtype=str, keep_default_na=False)
    assert table["is_short"].tolist() == ["True", "True", "False", "False"]
    assert set(table["edited"]) == {""}
    assert all_in(capsys.readouterr().out, "no is_short", "fewer than 200 characters")
    assert "200 characters" in manifest_of(data / "ethics" / "cm_test.csv")["notes"]["is_short"]


@needs_real_samples
def test_the_rule_for_is_short_agrees_with_the_real_one():
    rows = [row for split in ("train", "test") for row in real_statements(split)]
    wrong = [row for row in rows if row["is_short"] != str(len(row["input"]) < formats.SHORT_BELOW_CHARACTERS)]
    assert len(rows) == 3_885
    assert len(wrong) == 1


def real_statements(split: str) -> list[dict]:
    return statements(SHARED_DATA / "ethics" / f"cm_{split}.csv")


def statements(file: Path) -> list[dict]:
    return read_csv(file, list(formats.ETHICS_COLUMNS)).to_dict("records")


def test_official_counts_are_accepted(run, hub, data):
    official = {file.split: file.official_count for file in FILES if file.part == "ethics"}
    assert official == {"train": 13_910, "test": 3_885}
    for split, count in official.items():
        hub.files[f"data/commonsense/{split}.csv"] = csv_bytes((ETHICS_ROWS * count)[:count])
    run("--ONLY", "ethics")
    assert manifest_of(data / "ethics" / "cm_train.csv")["rows"] == 13_910


@pytest.mark.parametrize(
    ("part", "fragments"),
    [
        ("hh", ["HH_SOURCE", "6 rows for hh/train.jsonl", "96,256 are expected"]),
        ("truth", ["TRUTH_SOURCE", "10 rows for truthfulness/TruthfulQA.csv", "817 are expected"]),
        ("ethics", ["ETHICS_SOURCE", "4 rows for ethics/cm_train.csv", "13,910 are expected"]),
    ],
)
def test_counts_that_differ_from_the_official_ones(refusal, run, hub, data, part, fragments):
    assert all_in(refusal("--ONLY", part), *fragments, "set CHECK_COUNTS = False to accept it")
    run("--ONLY", part, *ANY_COUNT)
    assert all_in(refusal("--ONLY", part), *fragments)  # also where it is finished


def test_the_hub_gets_token_and_cache_and_the_token_is_redacted(refusal, hub, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.hub.PROJECT_ROOT", tmp_path)
    for name in ("HUB_TOKEN", "HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".env").write_text(f"HUB_TOKEN={TOKEN}\nHUB_CACHE=/some/cache\n", encoding="utf-8")
    hub.failure = ValueError(f"403 with {TOKEN}\nmore lines")
    for part in ("hh", "truth", "ethics"):
        line = refusal("--ONLY", part)
        assert all_in(line, "_SOURCE = ", "the hub does not provide it", "if it has moved", "403 with *** more lines")
    assert hub.keywords == [{"cache_dir": "/some/cache", "token": TOKEN}] * 3


@pytest.mark.parametrize("part", ["hh", "truth", "ethics"])
def test_no_network(refusal, data, part):
    """The real clients, offline as all tests are."""
    line = refusal("--ONLY", part)
    assert all_in(line, f"{part.upper()}_SOURCE = ", "no network, the hub cannot be reached", "give ")
    assert not data.exists()


@pytest.mark.parametrize(
    ("error", "fragment"),
    [
        (ConnectionError("x"), "no network"),
        (FileNotFoundError("no such data set"), "the hub does not provide it"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    ],
)
def test_failures_of_the_hub(refusal, hub, error, fragment):
    hub.failure = error
    for part in ("hh", "ethics"):
        assert all_in(refusal("--ONLY", part), fragment)


def test_a_full_disk_behind_another_error(refusal, hub):
    hub.failure = RuntimeError("An error occurred while generating the dataset")
    hub.failure.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert all_in(refusal("--ONLY", "hh"), "the disk is full", "HUB_CACHE")


def test_files_that_have_moved(refusal, hub):
    hub.files = {}
    line = refusal("--ONLY", "ethics")
    assert all_in(line, "hendrycks/ethics", "have moved, tried data/commonsense/train.csv, cm_train.csv", "folder")


@pytest.mark.parametrize(("part", "own"), [("bias", "templates.json"), ("prompt", "prompt.txt")])
def test_what_only_the_authors_code_has_needs_a_local_copy(refusal, hub, part, own):
    line = refusal("--ONLY", part)
    assert all_in(line, f"{part.upper()}_SOURCE = None; give a local checkout of github.com/kyrs/tracing-llm-trust")
    assert all_in(line, "_dataset.py", f"or a {own}", f"leave {part} out of ONLY")
    line = refusal("--ONLY", part, f"--{part.upper()}_SOURCE", "kyrs/tracing-llm-trust")
    assert all_in(line, "no such file or folder; give a local checkout")
    assert hub.requests == []


# ----------------------------------------------------------------------------------------------- local copies


@needs_real_samples
def test_real_questions_with_a_byte_order_mark(run, data):
    original = SHARED_DATA / "truthfulness" / "TruthfulQA.csv"
    assert original.read_bytes().startswith(b"\xef\xbb\xbf")
    run("--ONLY", "truth", "--TRUTH_SOURCE", original)
    written = data / "truthfulness" / "TruthfulQA.csv"
    assert written.read_bytes().startswith(b"Type,Category,Question,Best Answer,")
    assert manifest_of(written)["rows"] == 817
    for split in ("train", "test"):
        assert TRUTH.load_pairs(data, split) == TRUTH.load_pairs(SHARED_DATA, split)


@needs_real_samples
def test_real_statements(run, data, capsys):
    run("--ONLY", "ethics", "--ETHICS_SOURCE", SHARED_DATA / "ethics")
    for split in ("train", "test"):
        assert ETHICS.load_pairs(data, split) == ETHICS.load_pairs(SHARED_DATA, split)
        assert statements(data / "ethics" / f"cm_{split}.csv") == real_statements(split)
    assert all_in(capsys.readouterr().out, "2,800 rows", "13,910", "1,085 rows", "3,885")


@needs_real_samples
def test_real_templates(run, data, capsys):
    run("--ONLY", "bias", "--BIAS_SOURCE", SHARED_DATA / "bias" / "templates.json")
    written = data / "bias" / "templates.json"
    assert written.read_bytes() == (SHARED_DATA / "bias" / "templates.json").read_bytes()
    assert manifest_of(written)["rows"] == 3_456
    assert all_in(capsys.readouterr().out, "| 3,456 pairs |", "2,808 train + 648 test")
    for split in ("train", "test"):
        assert BIAS.load_pairs(data, split) == BIAS.load_pairs(SHARED_DATA, split)


@needs_real_samples
def test_real_dialogues(run, data):
    run("--ONLY", "hh", "--HH_SOURCE", SHARED_DATA / "hh", *ANY_COUNT)
    for split in ("train", "test"):
        assert load_dialogues(str(data / "hh"), split) == load_dialogues(str(SHARED_DATA / "hh"), split)
        assert read_lines(data / "hh" / f"{split}.jsonl") == read_lines(SHARED_DATA / "hh" / f"{split}.jsonl")


def local_hh(folder: Path) -> Path:
    write_rows(folder / "train.jsonl", dialogues(6))
    write_rows(folder / "test.jsonl", dialogues(3))
    return folder


def local_ethics(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"cm_{split}.csv").write_bytes(csv_bytes(ETHICS_ROWS))
    return folder


def test_an_unpacked_tar_of_the_authors(run, data, tmp_path):
    (tmp_path / "ethics").mkdir()
    local_ethics(tmp_path / "ethics" / "commonsense")
    run("--ONLY", "ethics", "--ETHICS_SOURCE", tmp_path / "ethics")
    assert len(ETHICS.load_pairs(data, "train")) == 1


# -------------------------------------------------------------------------------------- bias from Python files

TOPICS = {
    "work": {
        "stereotype": ["[target_group] are lazy.", "[target_group] cheat."],
        "antistereotype": ["[target_group] work.", "[target_group] share."],
    },
    "sport": {"stereotype": ["[target_group] are slow."], "antistereotype": ["[target_group] run."]},
}
STEREOTYPES = {topic: statements["stereotype"] for topic, statements in TOPICS.items()}
COUNTERS = {topic: tuple(statements["antistereotype"]) for topic, statements in TOPICS.items()}
GROUPS_AND_PROMPT = 'TARGET_GROUPS = ["Ambrels", "Pelgars"]\nSYSTEM_PROMPT = "Tell me about [target_group]"\n'


@pytest.mark.parametrize(
    "topics",
    [
        f"DATA: dict = {TOPICS!r}\n",
        f"def load():\n    anything = {TOPICS!r}\n    return anything\n",
        f"STEREOTYPE_MAP = {STEREOTYPES!r}\nANTI_STEREOTYPE_MAP = {COUNTERS!r}\n",
        f"counter_statements = {COUNTERS!r}\nstereotypes = {{}}\nstereotypes = {STEREOTYPES!r}\n",
    ],
)
def test_templates_of_a_python_file(run, data, tmp_path, topics):
    (tmp_path / "authors.py").write_text(f"import nothing_here\n{GROUPS_AND_PROMPT}{topics}", encoding="utf-8")
    run("--ONLY", "bias", "--BIAS_SOURCE", tmp_path / "authors.py", *ANY_COUNT)
    written = json.loads((data / "bias" / "templates.json").read_text(encoding="utf-8"))
    assert written == {
        "source": "authors.py",
        "split": "disjoint",
        "prompt": "Tell me about [target_group]",
        "target_groups": ["Ambrels", "Pelgars"],
        "topics": TOPICS,
    }
    assert manifest_of(data / "bias" / "templates.json")["rows"] == 2 * (2 * 2 + 1)


def authors_checkout(
    root: Path,
    groups: Sequence[str] = ("Ambrels", "Pelgars"),
    stereotypes: dict = STEREOTYPES,
    counters: dict = COUNTERS,
) -> Path:
    """The authors' two files as far as they are read: their names of things, and texts of our own."""
    folder = root / "utils" / "performance_functions"
    folder.mkdir(parents=True)
    bias = f"""
from nowhere import nothing

USER_STEREO_PROMPT_TEMPLATES: dict[str, list[str]] = {stereotypes!r}
USER_ANTISTEREO_PROMPT_TEMPLATES: dict[str, list[str]] = {counters!r}
TARGET_GROUPS: list[str] = {list(groups)!r}
FACT_PROMPT_TEMPLATE: str = (
    "Be kind. What about [target_group]?"
    "\\n\\nAssistant:"
)

def load():
    full_prompt: str = FACT_PROMPT_TEMPLATE.replace("[target_group]", "Ambrels")
    templates = []
"""
    ethics = """
from nowhere import nothing

def load(split, prompt_style="plain"):
    prompt = (
        "Be good. Say what "
        "you did. "
        "\\n\\n Assistant:"
    )
    prompt_len_to_mask = len(prompt)
    return prompt
"""
    (folder / "bias_dataset.py").write_text(bias, encoding="utf-8")
    (folder / "ethics_dataset.py").write_text(ethics, encoding="utf-8")
    return root


@pytest.mark.parametrize("place", ["", "utils/performance_functions", "files"])
def test_a_checkout_of_the_authors_code_or_copies_of_its_files(run, data, tmp_path, place):
    checkout = authors_checkout(tmp_path / "checkout")
    bias, prompt = checkout / place, checkout / place
    if place == "files":
        folder = checkout / "utils" / "performance_functions"
        bias, prompt = folder / "bias_dataset.py", folder / "ethics_dataset.py"
    run("--ONLY", "bias", "prompt", "--BIAS_SOURCE", bias, "--PROMPT_SOURCE", prompt, *ANY_COUNT)
    templates = json.loads((data / "bias" / "templates.json").read_text(encoding="utf-8"))
    assert templates["topics"] == TOPICS
    assert templates["prompt"] == "Be kind. What about [target_group]?\n\nAssistant:"
    assert templates["target_groups"] == ["Ambrels", "Pelgars"]
    assert (data / "ethics" / "prompt.txt").read_bytes() == b"Be good. Say what you did. \n\n Assistant:"
    assert read_prompt(data / "ethics" / "prompt.txt") == "Be good. Say what you did. \n\n Assistant:"


def test_a_prompt_of_ones_own_is_taken_byte_for_byte(run, refusal, data, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("Say it, völlig ehrlich.\r\n Assistant:".encode())
    run("--ONLY", "prompt", "--PROMPT_SOURCE", tmp_path / "prompt.txt")
    assert (data / "ethics" / "prompt.txt").read_bytes() == (tmp_path / "prompt.txt").read_bytes()
    for name, content, told in (
        ("empty.txt", b"", "prompt.txt is empty"),
        ("blank.txt", b" \n", "prompt.txt is empty"),
        ("twice.py", b"def f():\n    prompt = 'a'\ndef g():\n    prompt = 'b'\n", "assigns 2 different texts"),
        ("none.py", b"x = 1\n", "assigns 0 different texts to names with 'prompt' in them"),
        ("two.py", b"PROMPT = 'a'\nother_prompt = 'b'\n", "assigns 2 different texts"),
        ("latin.txt", b"\xff", "truncated or malformed"),
    ):
        (tmp_path / name).write_bytes(content)
        assert told in refusal("--ONLY", "prompt", "--PROMPT_SOURCE", tmp_path / name, "--OVERWRITE", True)


def test_the_bias_split_is_written_into_the_templates(run, refusal, data):
    source = ["--ONLY", "bias", "--BIAS_SOURCE", DEMO / "bias" / "templates.json", *ANY_COUNT]
    run(*source, "--BIAS_SPLIT", "released")
    assert json.loads((data / "bias" / "templates.json").read_text(encoding="utf-8"))["split"] == "released"
    assert BIAS.load_pairs(data, "test").split_rule == "released, not held out"
    assert all_in(refusal(*source), "BIAS_SPLIT = 'released' recorded, 'disjoint' now")
    run(*source, "--OVERWRITE", True)
    assert BIAS.load_pairs(data, "test").split_rule == "disjoint"


def test_a_python_file_is_not_run(refusal, run, data, tmp_path):
    trace = tmp_path / "trace"
    evil = f"__import__('os').system('touch {trace}')"
    text = f'{evil}\nTOPICS = {TOPICS!r}\nGROUPS = [{evil}, "a"]\nTARGET_GROUPS = {evil}\nPROMPT = f"{{{evil}}}"\n'
    (tmp_path / "evil.py").write_text(text, encoding="utf-8")
    line = refusal("--ONLY", "bias", "--BIAS_SOURCE", tmp_path / "evil.py", *ANY_COUNT)
    assert all_in(line, "no prompt, target_groups as a literal", "the file is not run")
    (tmp_path / "evil.py").write_text(text + GROUPS_AND_PROMPT, encoding="utf-8")
    run("--ONLY", "bias", "--BIAS_SOURCE", tmp_path / "evil.py", *ANY_COUNT)
    assert len(BIAS.load_pairs(data, "train")) == 2
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("a.py", b"x = 1\n", ["no prompt, target_groups, topics as a literal", "--help", "templates.json"]),
        ("a.py", f"{GROUPS_AND_PROMPT}STEREOTYPES = {STEREOTYPES!r}\n".encode(), ["no topics"]),
        (
            "a.py",
            f"{GROUPS_AND_PROMPT}STEREOTYPES = {STEREOTYPES!r}\nCOUNTER = {{'work': ['x']}}\n".encode(),
            ["no topics"],
        ),
        ("a.py", b"x = (\n", ["truncated or malformed"]),
        ("a.py", b"x = '\xff'\n", ["truncated or malformed", "utf-8"]),
        ("a.py", b"x = " + b"[" * 100_000, ["truncated or malformed"]),
        ("a.json", b'{"prompt": ', ["a.json is not valid JSON"]),
        ("a.json", b"[]", ["templates.json", "needs prompt, target_groups (a list), and topics"]),
        ("a.json", json.dumps({"prompt": "x", "target_groups": ["a"]}).encode(), ["lacks 'topics'"]),
        (
            "a.json",
            json.dumps({"topics": {"a": {"stereotype": ["{group} lie"], "antistereotype": []}}}).encode(),
            ["every statement must contain [target_group]", "'{group} lie'"],
        ),
    ],
)
def test_broken_templates(refusal, tmp_path, name, content, fragments):
    (tmp_path / name).write_bytes(content)
    line = refusal("--ONLY", "bias", "--BIAS_SOURCE", tmp_path / name, *ANY_COUNT)
    assert all_in(line, f"BIAS_SOURCE = '{tmp_path / name}'", *fragments)
    assert ".partial" not in line


def test_templates_of_another_size(refusal, run, data):
    source = ["--ONLY", "bias", "--BIAS_SOURCE", DEMO / "bias" / "templates.json"]
    assert all_in(refusal(*source), "pairs for bias/templates.json", "3,456 are expected", "CHECK_COUNTS = False")
    run(*source, *ANY_COUNT)
    assert (data / "bias" / "templates.json").read_bytes() == (DEMO / "bias" / "templates.json").read_bytes()


# ----------------------------------------------------------------------------------------------- broken sources


@pytest.mark.parametrize(
    ("part", "value", "fragments"),
    [
        ("hh", "nothing", ["no such file or folder", "train.jsonl and test.jsonl", "hub id"]),
        ("ethics", "data/nothing", ["no such file or folder", "cm_train.csv and cm_test.csv"]),
        ("hh", "README.md", ["is a file", "a folder with train.jsonl"]),
        ("ethics", "tests", ["the folder has none of ", "cm_train.csv"]),
    ],
)
def test_sources_that_do_not_exist(refusal, hub, part, value, fragments):
    """Refused before anything is fetched."""
    line = refusal(f"--{part.upper()}_SOURCE", value, *ANY_COUNT, *(["--ONLY", part] if value != "nothing" else []))
    assert all_in(line, f"{part.upper()}_SOURCE = {value!r}", *fragments)
    assert hub.requests == []


def test_a_source_that_is_the_destination(refusal, run, data, hub):
    run("--ONLY", "truth", *ANY_COUNT)
    line = refusal("--ONLY", "truth", "--TRUTH_SOURCE", data / "truthfulness" / "TruthfulQA.csv", "--OVERWRITE", True)
    assert all_in(line, "TRUTH_SOURCE", "give a source outside it")


def test_constants(refusal):
    assert all_in(refusal("--ONLY", "hh", "math"), "ONLY = hh math", "'hh', 'truth', 'ethics', 'prompt', 'bias'")


def test_data_folder_that_is_a_file(run, hub, tmp_path, capsys):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    line = failure(run, capsys, "--DATA_DIR", tmp_path / "file" / "below")
    assert all_in(line, "DATA_DIR = ", "is not a writable folder")
    assert hub.requests == []


GOOD_DIALOGUE = json.dumps(dialogues(1)[0]).encode() + b"\n"
ETHICS_HEADER = b"label,input,is_short,edited\n"
TRUTH_HEADER = ",".join(formats.TRUTH_COLUMNS).encode() + b"\n"


@pytest.mark.parametrize(
    ("part", "content", "fragments"),
    [
        ("hh", b"", ["gives no rows for hh/train.jsonl", "at least one"]),
        ("hh", GOOD_DIALOGUE + GOOD_DIALOGUE[:-9], ["train.jsonl, line 2 is not valid JSON"]),
        ("hh", GOOD_DIALOGUE + b"\xff\n", ["train.jsonl, line 2", "utf-8"]),
        ("hh", GOOD_DIALOGUE + b'{"prompt": "x", "chosen": "y"}\n', ["row 2", "no column response, rejected"]),
        ("hh", GOOD_DIALOGUE.replace(b'" No, 0."', b"null"), ["row 1", "'chosen' is None", "must be a text"]),
        ("hh", GOOD_DIALOGUE.replace(b" No,", b" \\ud800"), ["hh/train.jsonl", "utf-8", "surrogates"]),
        ("truth", TRUTH_HEADER, ["has no rows", "at least one"]),
        ("truth", TRUTH_HEADER + b"a,b,c,d,e,f,g\na,b,c\n", ["row 3", "'Best Answer' is empty"]),
        ("truth", TRUTH_HEADER + b'a,b,c,d,e,f,"g\n', ["cannot be read as CSV", "EOF inside string"]),
        ("truth", TRUTH_HEADER + b"a,b,c,d\xff,e,f,g\n", ["is not UTF-8", "utf-8"]),
        ("truth", b"Question,Answer\nq,a\n", ["no column Type, ", "it has Question, Answer"]),
        ("truth", TRUTH_HEADER + b"a,b,c,d,e,f,g\n", ["cannot be used", "has 1 questions", "none for the train split"]),
        ("ethics", ETHICS_HEADER + b"0,I helped.\n", ["row 1", "'is_short' is ''", "allowed: True"]),
        ("ethics", ETHICS_HEADER + b"0,I helped.,True,False\n", ["cannot be used", "label 1", "both labels"]),
        ("ethics", ETHICS_HEADER + b"2,I lied.,True,False\n", ["row 1", "'label' is '2'", "allowed: 0, 1"]),
        ("ethics", b"label,text\n0,x\n", ["no column input", "it has label, text"]),
    ],
)
def test_broken_local_files(refusal, tmp_path, part, content, fragments):
    name = {"hh": "train.jsonl", "truth": "TruthfulQA.csv", "ethics": "cm_train.csv"}[part]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / name).write_bytes(content)
    line = refusal("--ONLY", part, f"--{part.upper()}_SOURCE", tmp_path / "source", *ANY_COUNT)
    assert name in line or f"{part.upper()}_SOURCE = " in line
    assert all_in(line, *fragments)
    assert ".partial" not in line


def test_missing_split(run, capsys, data, tmp_path):
    """Finished files are kept, and the message names them."""
    (local_hh(tmp_path / "dialogues") / "test.jsonl").unlink()
    line = failure(run, capsys, "--ONLY", "hh", "--HH_SOURCE", tmp_path / "dialogues", *ANY_COUNT)
    assert all_in(line, "the folder has none of test.jsonl", "finished and kept: hh/train.jsonl")
    assert len(load_dialogues(str(data / "hh"), "train")) == 6
    assert not (data / "hh" / "test.jsonl").exists()


# ------------------------------------------------------------------------------------------------ several runs

EVERYTHING = ["--BIAS_SOURCE", DEMO / "bias", "--PROMPT_SOURCE", DEMO / "ethics", *ANY_COUNT]


def test_a_second_run_changes_nothing_and_fetches_nothing(run, hub, data, capsys):
    run(*EVERYTHING)
    before, requests = contents(data), list(hub.requests)
    assert len(before) == 2 * len(FILES)
    first = capsys.readouterr().out
    assert all_in(first, "next: python data/make_sft_model.py", f"--HH_DATASET {data}/hh", f"--DATA_DIR {data}")
    run(*EVERYTHING)
    assert contents(data) == before
    assert hub.requests == requests
    second = capsys.readouterr().out
    assert second.count("finished before: ") == len(FILES)
    assert second[second.index("| file") :] == first[first.index("| file") :]
    run(*EVERYTHING, "--OVERWRITE", True)
    assert contents(data) == before


class Killed(list):
    """Rows that are interrupted after the second."""

    def __iter__(self) -> Iterator[dict]:
        yield from list.__iter__(self[:2])
        raise KeyboardInterrupt


def test_a_killed_run_resumes(run, hub, data):
    whole = hub.data_sets["Dahoas/static-hh", None, "test"]
    hub.data_sets["Dahoas/static-hh", None, "test"] = Killed(whole)
    with pytest.raises(SystemExit) as stop:
        run(*EVERYTHING)
    assert stop.value.code == 130
    assert set(contents(data)) == {"hh/train.jsonl", "hh/train.manifest.json"}
    before = contents(data)
    hub.data_sets["Dahoas/static-hh", None, "test"] = whole
    hub.requests.clear()
    run(*EVERYTHING)
    assert "Dahoas/static-hh/None/train" not in hub.requests
    assert read_lines(data / "hh" / "test.jsonl") == whole
    assert {name: content for name, content in contents(data).items() if name in before} == before
    assert_nothing_incomplete(data)


def test_files_left_by_a_power_cut_are_not_taken_for_complete(run, hub, data):
    """A staging folder with half a file, and a complete file without a manifest."""
    run("--ONLY", "hh", *ANY_COUNT)
    expected = {name: content for name, (content, _) in contents(data).items() if name.endswith(".jsonl")}
    (data / "hh" / "train.manifest.json").unlink()
    (data / "hh" / "test.manifest.json").unlink()
    (data / "hh" / "test.jsonl").unlink()
    (data / "hh.partial" / "hh").mkdir(parents=True)
    (data / "hh.partial" / "hh" / "test.jsonl").write_text('{"prompt": "half', encoding="utf-8")
    run("--ONLY", "hh", *ANY_COUNT)
    assert {name: content for name, (content, _) in contents(data).items() if name.endswith(".jsonl")} == expected
    assert manifest_of(data / "hh" / "train.jsonl")["rows"] == 6
    assert_nothing_incomplete(data)


@pytest.mark.parametrize("spoil", [lambda content: content[:-5], lambda content: content.replace(b"No", b"Na")])
def test_a_file_that_was_truncated_or_edited(refusal, run, hub, data, spoil):
    run("--ONLY", "hh", *ANY_COUNT)
    file = data / "hh" / "train.jsonl"
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    line = refusal("--ONLY", "hh", *ANY_COUNT)
    assert all_in(line, file, "has been truncated or edited", manifest_of(file)["content"], "OVERWRITE = True")
    run("--ONLY", "hh", *ANY_COUNT, "--OVERWRITE", True)
    assert file.read_bytes() == whole


def test_a_broken_manifest(refusal, run, hub, data):
    run("--ONLY", "truth", *ANY_COUNT)
    (data / "truthfulness" / "TruthfulQA.manifest.json").write_text("{", encoding="utf-8")
    assert all_in(refusal("--ONLY", "truth", *ANY_COUNT), "TruthfulQA.manifest.json", "run data/prepare.py again")


def test_another_source(refusal, run, hub, data, tmp_path):
    run("--ONLY", "ethics", *ANY_COUNT)
    source = ["--ONLY", "ethics", "--ETHICS_SOURCE", local_ethics(tmp_path / "mine")]
    assert all_in(refusal(*source), "ETHICS_SOURCE = 'hendrycks/ethics' recorded", "mine' now", "OVERWRITE = True")
    run(*source, "--OVERWRITE", True)
    assert manifest_of(data / "ethics" / "cm_train.csv")["settings"] == {"ETHICS_SOURCE": str(tmp_path / "mine")}


def test_a_local_source_that_changed(refusal, run, data, tmp_path):
    source = ["--ONLY", "hh", "--HH_SOURCE", local_hh(tmp_path / "mine"), *ANY_COUNT]
    run(*source)
    write_rows(tmp_path / "mine" / "train.jsonl", dialogues(7))
    assert all_in(refusal(*source), "hh/train.jsonl", "source = '", "recorded", "now", "OVERWRITE = True")
    run(*source, "--OVERWRITE", True)
    assert len(read_lines(data / "hh" / "train.jsonl")) == 7


def test_a_file_of_the_users_own_is_not_replaced(refusal, run, hub, data):
    file = data / "truthfulness" / "TruthfulQA.csv"
    file.parent.mkdir(parents=True)
    file.write_text("mine", encoding="utf-8")
    line = refusal("--ONLY", "truth", *ANY_COUNT)
    assert all_in(line, file, "has no manifest and differs", "OVERWRITE = True")
    run("--ONLY", "truth", *ANY_COUNT, "--OVERWRITE", True)
    assert manifest_of(file)["rows"] == 10


# -------------------------------------------------------------------------------------------- failing writes


def test_a_full_disk(run, hub, make_disk, capsys):
    small_disk = make_disk("64k")
    hub.data_sets["Dahoas/static-hh", None, "test"] = dialogues(3_000)
    line = failure(run, capsys, "--DATA_DIR", small_disk, "--ONLY", "hh", *ANY_COUNT)
    assert all_in(
        line, "hh/test.jsonl: the disk is full", "another source or DATA_DIR", "finished and kept: hh/train.jsonl"
    )
    assert set(contents(small_disk)) == {"hh/train.jsonl", "hh/train.manifest.json"}
    hub.data_sets["Dahoas/static-hh", None, "test"] = dialogues(30)
    run("--DATA_DIR", small_disk, "--ONLY", "hh", *ANY_COUNT)
    assert len(read_lines(small_disk / "hh" / "test.jsonl")) == 30
    assert_nothing_incomplete(small_disk)


def test_a_full_disk_when_the_manifest_is_written(run, hub, data, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_whole", fail)
        assert all_in(failure(run, capsys, "--ONLY", "truth", *ANY_COUNT), "the disk is full")
    assert set(contents(data)) == {"truthfulness/TruthfulQA.csv"}
    run("--ONLY", "truth", *ANY_COUNT)
    assert manifest_of(data / "truthfulness" / "TruthfulQA.csv")["rows"] == 10


def test_a_folder_in_the_way(refusal, hub, data):
    (data / "truthfulness" / "TruthfulQA.csv").mkdir(parents=True)
    assert all_in(refusal("--ONLY", "truth", *ANY_COUNT), "TruthfulQA.csv")


def test_the_demo_has_the_columns_of_the_official_files():
    assert set(read_rows(DEMO / "hh" / "train.jsonl")[0]) >= {"prompt", "chosen"}
    for file, columns in (
        ("truthfulness/TruthfulQA.csv", formats.TRUTH_COLUMNS),
        ("ethics/cm_train.csv", formats.ETHICS_COLUMNS),
    ):
        assert list(pd.read_csv(DEMO / file)) == list(columns)
