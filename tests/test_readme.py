"""Every command in README.md and docs/ as it stands there, run in this process; of RESULTS.md, only checked.

A folder stands for the repository. It has what the texts speak of: a model and dialogues of the user's, and small
stand-ins under the names of hub ids, which are local folders there. A command that is not run says why below.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from conftest import DEMO, load_script, read_rows, run_script, write_rows
from test_prepare import ETHICS_ROWS, PREPARE, TRUTH_ROWS, FakeHub, authors_checkout, csv_bytes, dialogues

from utils import paths
from utils.paths import PROJECT_ROOT
from utils.settings import Settings, load_settings

DOCUMENTS = [PROJECT_ROOT / "README.md", *sorted((PROJECT_ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "source .venv/bin/activate": "the tests run in an environment already",
    "git clone": "needs a network; a stand-in for the checkout is there",
    "pip install": "Makefile and continuous integration install",
    "make": "a target is looked at: its commands must be scripts that are here",
    "accelerate launch": "test_processes.py launches two processes",
    "torchrun": "test_processes.py launches two processes",
    "lm_eval": "test_ecosystem.py runs it on a local task",
    "python benchmarks/": "takes most of an hour; test_benchmarks.py runs its parts",
    "ANOTHER_ENVIRONMENT/": "another library's, which is not installed here",
}
CHECKED = {  # their constants alone
    "python evaluation_scripts/validate_scores.py": "takes half an hour; test_validation.py runs it on less",
    "python data/make_sft_model.py --BASE_MODEL EleutherAI/pythia-160m": "belongs to a command that is not run",
}
TABLES = "evaluation_scripts/paper_tables.py"


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def commands(document: Path) -> list[str]:
    """The commands of a document in their order: lines of `sh` blocks, and whole commands within the text."""
    text = document.read_text(encoding="utf-8")
    found = []
    for block, inline in re.findall(
        r"^```sh\n(.*?)^```|`((?:python|make|accelerate) [^`\n]+)`", text, flags=re.M | re.S
    ):
        found += block.replace("\\\n", " ").splitlines() if block else [inline]
    return [" ".join(command.partition(" #")[0].split()) for command in found]


EVERY = [(document.name, command) for document in DOCUMENTS for command in commands(document)]


@pytest.fixture(scope="module")
def repository(tiny_models, small_data, tmp_path_factory) -> Path:
    """What a user's copy of the repository holds by the time of these commands; all of it small."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(small_data, root / "data" / "demo")
    shutil.copytree(DEMO / "tokenizer", root / "data" / "demo" / "tokenizer")
    rows = read_rows(DEMO / "hh" / "train.jsonl")
    for folder, count in (("my/dialogues", 125), ("small/hh", 240), ("path/to/hh", 80), ("data/demo/hh", 125)):
        write_rows(root / folder / "train.jsonl", rows[:count])
        write_rows(root / folder / "test.jsonl", read_rows(small_data / "hh" / "test.jsonl"))
    for folder, family in (
        ("my/base", "pythia"),
        ("my/model", "qwen"),
        ("lomahony/pythia-1.4b-helpful-sft", "pythia"),
        ("EleutherAI/pythia-1.4b", "pythia"),
    ):
        shutil.copytree(tiny_models[family], root / folder)
    for part in ("bias", "ethics", "truthfulness"):
        shutil.copytree(small_data / part, root / "small" / part)
    for place in ("path/to", "path/to/data"):
        shutil.copytree(small_data, root / place, dirs_exist_ok=True)
    shutil.copytree(DEMO / "tokenizer", root / "path" / "to" / "pythia-tokenizer")
    write_official_copies(root / "path" / "to")
    return root


def write_official_copies(folder: Path) -> None:
    """Local copies of as many rows as the official ones have."""
    questions = pd.read_csv(DEMO / "truthfulness" / "TruthfulQA.csv", encoding="utf-8-sig")
    questions.sample(817, replace=True, random_state=0).to_csv(folder / "TruthfulQA.csv", index=False)
    kinds = ("stereotype", "antistereotype")
    templates = {
        "prompt": "About the [target_group]:",
        "target_groups": [f"Group {n}" for n in range(24)],
        "topics": {
            f"topic {topic}": {kind: [f"[target_group] are {kind} {topic}.{n}." for n in range(3)] for kind in kinds}
            for topic in range(16)
        },
    }
    (folder / "templates.json").write_text(json.dumps(templates), encoding="utf-8")
    sides = ({topic: texts[kind] for topic, texts in templates["topics"].items()} for kind in kinds)
    checkout = authors_checkout(folder / "checkout", templates["target_groups"], *sides)
    shutil.copy(checkout / "utils" / "performance_functions" / "ethics_dataset.py", folder)


def official_hub(folder: Path) -> FakeHub:
    """A hub whose data sets have as many rows as the official ones."""
    hub = FakeHub(folder)
    for split, count in (("train", 96_256), ("test", 5_103)):
        hub.data_sets["Dahoas/static-hh", None, split] = dialogues(count)
    questions = [{**TRUTH_ROWS[0], "question": f"Is it so, {number}?"} for number in range(817)]
    hub.data_sets["truthfulqa/truthful_qa", "generation", "validation"] = questions
    for split, count in (("train", 13_910), ("test", 3_885)):
        rows = (ETHICS_ROWS * count)[:count]
        hub.files[f"data/commonsense/{split}.csv"] = csv_bytes(rows)
    return hub


@pytest.fixture
def run(repository, quick_repairs, monkeypatch, tmp_path):
    """Runs one command as if the folder were the repository."""
    monkeypatch.setattr(paths, "PROJECT_ROOT", repository)
    monkeypatch.setattr(load_script(TABLES), "SWEPT_RATES", [0.05, 0.1])  # where a command does not say which
    monkeypatch.setattr(load_script("compute_factors_and_scores.py"), "CG_ITERATIONS", 2)
    hub = official_hub(tmp_path / "hub")
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)

    def run_command(command: str) -> None:
        program, script, *words = shlex.split(command)
        assert program == "python"
        run_script(script, *words)
        if script == PREPARE:  # what was brought has been counted; the steps go on with less
            data = repository / (words[words.index("--DATA_DIR") + 1] if "--DATA_DIR" in words else "data")
            for part in (repository / "small").iterdir():
                if (data / part.name).exists():
                    shutil.copytree(part, data / part.name, dirs_exist_ok=True)

    return run_command


def is_run(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in NOT_RUN)


def constants_of(command: str) -> Settings:
    """The checked constants of a command that is not run."""
    program, script, *words = shlex.split(command)
    assert program == "python"
    return load_settings(load_script(script), words)


def test_there_are_commands_and_every_exception_is_needed():
    assert len([command for _, command in EVERY if is_run(command)]) >= 20
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for _, command in EVERY), beginning


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_commands_run_word_for_word(document, run, repository, monkeypatch):
    done = set()
    for command in commands(document):
        if is_run(command) and command not in done:
            # The studies take minutes even here, and differ from the commands of the other texts in constants alone.
            is_checked = document.name == "RESULTS.md" or command.startswith(tuple(CHECKED))
            (constants_of if is_checked else run)(command)
            done.add(command)
    if document.name == "README.md":
        monkeypatch.chdir(repository)
        use_the_repaired_model(document)


def use_the_repaired_model(document: Path) -> None:
    """The text's Python code, run where its commands were."""
    (code,) = blocks(document, "python")
    answer: list[str] = []
    names = {"print": answer.append}
    exec(code, names)
    assert answer[0].startswith("\n\nHuman: Is the earth flat?\n\nAssistant:")
    assert (names["folder"] / "README.md").is_file()


@pytest.mark.parametrize("target", sorted({command.split()[1] for _, command in EVERY if command.startswith("make ")}))
def test_make_targets_run_what_is_here(target):
    shown = subprocess.run(["make", "-n", target], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True).stdout
    scripts = re.findall(r"bin/python ([\w/]+\.py)", shown)
    assert scripts or "-m pytest" in shown
    for script in scripts:
        load_script(script)


def test_every_constant_that_the_texts_name_exists():
    scripts = list(PROJECT_ROOT.glob("*.py"))
    for folder in ("representations", "dpp", "evaluation_scripts", "data", "studies", "benchmarks"):
        scripts += (PROJECT_ROOT / folder).glob("*.py")
    known = set(re.findall(r"^([A-Z][A-Z0-9_]+):", "\n".join(path.read_text() for path in scripts), flags=re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"--([A-Z][A-Z0-9_]+)", document.read_text(encoding="utf-8")))
        assert named <= known, f"{document.name}: {named - known}"


def headings_of(document: Path) -> set[str]:
    """The anchors of a document's headings."""
    lines = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


def test_links_within_the_texts_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                file, _, anchor = target.partition("#")
                linked = document.parent / file if file else document
                assert linked.exists(), target
                assert not anchor or anchor in headings_of(linked), target
