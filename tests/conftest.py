"""Small real models, dialogues and pairs that the tests share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from steps import load_script, run_step
from utils import completions, learning_rate_search
from utils.files import fingerprint_of_content
from utils.manifests import checksum_of
from utils.paths import PROJECT_ROOT
from utils.performance_functions.pairs import AnswerPair, AnswerPairs

DEMO = PROJECT_ROOT / "data" / "demo"
SHARED_DATA = PROJECT_ROOT.parent / "shared" / "data"
SHARED_CASES = PROJECT_ROOT.parent / "shared" / "cases"
SIZES = {
    "vocab_size": 1_536,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Architectures whose forward pass scales, caps or transforms on the way to its logits; weights large enough to show it.
OWN_LOGITS = {
    "gemma2": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 5.0, "initializer_range": 0.3}),
    "granite": ("GraniteConfig", {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "initializer_range": 0.3}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25, "initializer_range": 0.3}),
    "modernbert": ("ModernBertDecoderConfig", {"local_attention": 16, "initializer_range": 0.3}),
}

LONGEST_FILES = (
    "test_studies",
    "test_validation",
    "test_readme",
    "test_tables",
    "test_ecosystem",
    "test_demo",
    "test_benchmarks",
    "test_resume",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one of them at the end."""
    position = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: position.get(item.path.stem, len(position)))


needs_real_samples = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason="the folder with real samples (../shared/data) is not here"
)

needs_cases = pytest.mark.skipif(
    not SHARED_CASES.is_dir(), reason="the folder with inputs and their right values (../shared/cases) is not here"
)


def make_tiny_model(family: str, folder: Path, seed: int = 0) -> Path:
    """A model of 3 blocks, hidden 32, trained a little so that its loss has a slope to speak of, saved to disk."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer" / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 1_536,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family == "pythia":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=False))
    texts = [row["prompt"] + row["chosen"] for row in read_rows(DEMO / "hh" / "train.jsonl")[:128]]
    tokenizer.pad_token = tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in list(range(0, 128, 16)) * 4:
        batch = tokenizer(texts[start : start + 16], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model(folder: Path, config_name: str, **more: object) -> Path:
    """An untrained model of 3 blocks, hidden 32, of any architecture, saved to disk with the demo's tokenizer.

    Args:
        more: for the configuration; with `text_config`, whose parts have sizes of their own, all of it.
    """
    torch.manual_seed(0)
    if not hasattr(transformers, config_name):
        pytest.skip(f"this version of transformers has no {config_name}")
    config = getattr(transformers, config_name)(**(more if "text_config" in more else {**SIZES, **more}))
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_file=str(DEMO / "tokenizer" / "tokenizer.json"), bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(folder)
    return folder


def answer_pairs(pairs: list[AnswerPair]) -> AnswerPairs:
    """Pairs that a test made up, each a cluster of its own."""
    return AnswerPairs(list(pairs), [str(number) for number in range(len(pairs))], "made up")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file in a folder, by relative path."""
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def quick_repairs() -> Iterator[None]:
    """Searches for a learning rate end after a few trials, completions after a few tokens; for tests of the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning_rate_search, "PRECISION", 0.5)
        patch.setattr(completions, "MAX_NEW_TOKENS", 4)
        yield


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny pythia and a tiny qwen model, read-only for the tests."""
    root = tmp_path_factory.mktemp("models")
    return {family: make_tiny_model(family, root / f"{family}-tiny") for family in ("pythia", "qwen")}


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data cut to 60 training and 12 test dialogues, 2 groups, 20 questions and 40 statements."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 60), ("test", 12)):
        write_rows(root / "hh" / f"{split}.jsonl", read_rows(DEMO / "hh" / f"{split}.jsonl")[:count])
    templates = json.loads((DEMO / "bias" / "templates.json").read_text(encoding="utf-8"))
    templates["target_groups"] = templates["target_groups"][:2]
    templates["topics"] = dict(list(templates["topics"].items())[:2])
    (root / "bias").mkdir()
    (root / "bias" / "templates.json").write_text(json.dumps(templates), encoding="utf-8")
    for source, count in (
        ("truthfulness/TruthfulQA.csv", 20),
        ("ethics/cm_train.csv", 40),
        ("ethics/cm_test.csv", 20),
    ):
        target = root / source
        target.parent.mkdir(exist_ok=True)
        lines = (DEMO / source).read_text(encoding="utf-8").splitlines(keepends=True)
        target.write_text("".join(lines[: count + 1]), encoding="utf-8")
    return root


@pytest.fixture
def data_copy(small_data: Path, tmp_path: Path) -> Path:
    """A copy of the small data that a test may spoil."""
    return Path(shutil.copytree(small_data, tmp_path / "data"))


def record(file: Path) -> None:
    """Put a changed file into its artifact's manifest, as if the step had written it so."""
    in_folder = file.with_name("manifest.json")
    manifest = in_folder if in_folder.exists() else file.with_name(f"{file.stem}.manifest.json")
    content = json.loads(manifest.read_text(encoding="utf-8"))
    if file.name in content["files"]:
        content["files"][file.name] = file.stat().st_size
    if "content" in content:
        content["content"] = fingerprint_of_content(file)
    write_manifest(manifest, content)


def write_manifest(path: Path, content: dict) -> None:
    """Write a manifest as a step would, with its checksum."""
    del content["checksum"]
    path.write_text(json.dumps({**content, "checksum": checksum_of(content)}), encoding="utf-8")


def run_script(name: str, *arguments: str) -> None:
    """Run a script's main in this process, as its command line would; SystemExit where it fails."""
    run_step(load_script(name).main, [str(argument) for argument in arguments])


def run_process(name: str, *arguments: str, **keywords: object) -> subprocess.CompletedProcess:
    """Run a script as a process of its own."""
    command = [sys.executable, str(PROJECT_ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **keywords)


class Workspace:
    """A model, data and an output folder, and the six steps on them."""

    def __init__(self, model: Path, data: Path, output: Path) -> None:
        self.model, self.data, self.output = model, data, output

    def arguments(self, script: str) -> list[str]:
        """Those of the common constants that the script has."""
        constants = {
            "MODEL_NAMES": self.model,
            "MODEL_NAME": self.model,
            "HH_DATASET": self.data / "hh",
            "DATA_DIR": self.data,
            "OUTPUT_DIR": self.output,
        }
        known = {name: value for name, value in constants.items() if hasattr(load_script(script), name)}
        return [word for name, value in known.items() for word in (f"--{name}", str(value))]

    def run(self, script: str, *arguments: object) -> None:
        """Run one script on this workspace, in this process."""
        run_script(script, *self.arguments(script), *arguments)

    def run_all(self, scores_type: str = "dpp", *arguments: object) -> None:
        """Steps 1 to 5 with a small subset."""
        self.run("compute_factors_and_scores.py")
        self.run("representations/train_reps.py")
        self.run("dpp/greedy_dpp.py", "--BOTTOM_K", 5, *arguments)
        self.run("make_gradients.py", "--BOTTOM_K", 5, "--SCORES_TYPE", scores_type, *arguments)
        self.run("gradient_ascent_and_save.py", "--BOTTOM_K", 5, "--SCORES_TYPE", scores_type, *arguments)


@pytest.fixture
def workspace(tiny_models: dict[str, Path], data_copy: Path, tmp_path: Path) -> Workspace:
    """A workspace of its own for one test, on the tiny pythia model."""
    return Workspace(tiny_models["pythia"], data_copy, tmp_path / "output")


@pytest.fixture(scope="session")
def make_workspace(
    tiny_models: dict[str, Path], small_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Workspace]:
    """Makes workspaces on the small data (not to be spoilt) for either family."""
    return lambda family: Workspace(tiny_models[family], small_data, tmp_path_factory.mktemp("output"))


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes small file systems, such as one of "64k"; skips where that is not allowed."""
    mounted = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        try:
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system is not allowed here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
