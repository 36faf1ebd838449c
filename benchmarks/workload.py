"""The benchmark's work: a Pythia-70m architecture with random weights, and real dialogues and answer pairs, cut down.

The proportions are the paper's: 96,256 training dialogues, 10,000 for the factors, 2,784 / 710 / 653 pairs to trace,
5,103 dialogues and 672 / 273 / 164 pairs to evaluate. `Workload.share` says which part of that is measured.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from utils.paths import PROJECT_ROOT
from utils.performance_functions.hh import load_dialogues

PAPER_TRAIN, PAPER_FACTORS, PAPER_TEST = 96_256, 10_000, 5_103
PAPER_PAIRS = {
    "train": {"bias": 2_784, "ethics": 710, "truth": 653},
    "test": {"bias": 672, "ethics": 273, "truth": 164},
}
BIAS_PAIRS_PER_TOPIC = 9  # of one group: 3 stereotypes x 3 counter-statements
PYTHIA_70M = {"hidden_size": 512, "intermediate_size": 2_048, "num_hidden_layers": 6, "num_attention_heads": 8}
VOCABULARY = 50_304
SOURCES = (PROJECT_ROOT.parent / "shared" / "data", PROJECT_ROOT / "data", PROJECT_ROOT / "data" / "demo")


@dataclass(frozen=True)
class Workload:
    """Where the model and the data lie, and how much of them there is.

    Attributes:
        folder: holds model/ and the data in the official layout.
    """

    folder: Path

    @property
    def model(self) -> str:
        """Folder of the model."""
        return str(self.folder / "model")

    @property
    def hh_dataset(self) -> str:
        """Folder of the dialogues."""
        return str(self.folder / "hh")

    @property
    def data_dir(self) -> str:
        """Folder of the pairs."""
        return str(self.folder)

    @property
    def num_train(self) -> int:
        """Training dialogues."""
        return len(load_dialogues(self.hh_dataset, "train"))

    @property
    def num_factor_examples(self) -> int:
        """As many as the paper's share of the training dialogues."""
        return max(1, round(self.num_train * PAPER_FACTORS / PAPER_TRAIN))


def find_source() -> Path:
    """The first folder that has real data in the official layout; the embedded default comes last."""
    return next(folder for folder in SOURCES if (folder / "hh" / "train.jsonl").is_file())


def make_model(folder: Path, source: Path, seed: int = 0, **sizes: int) -> None:
    """A Pythia architecture with random weights and the real tokenizer, saved as a checkpoint."""
    if (folder / "config.json").is_file() and AutoConfig.from_pretrained(folder).hidden_size == sizes["hidden_size"]:
        return
    file = source / "pythia_tokenizer" / "tokenizer.json"
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file if file.is_file() else PROJECT_ROOT / "data" / "demo" / "tokenizer" / "tokenizer.json"),
        bos_token=end,
        eos_token=end,
        unk_token=end,
    )
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_workload(folder: Path, train: int, test: int, pairs: dict[str, int], source: Path) -> Workload:
    """Cut the data down to the first rows.

    Args:
        pairs: how many pairs of each measurement, of both splits together, at least.
    """
    make_model(folder / "model", source, **PYTHIA_70M)
    for split, count in (("train", train), ("test", test)):
        lines = (source / "hh" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "hh").mkdir(parents=True, exist_ok=True)
        (folder / "hh" / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    templates = json.loads((source / "bias" / "templates.json").read_text(encoding="utf-8"))
    topics = -(-pairs["bias"] // BIAS_PAIRS_PER_TOPIC)
    templates["target_groups"] = sorted(templates["target_groups"])[: -(-topics // len(templates["topics"]))]
    templates["topics"] = dict(list(templates["topics"].items())[:topics])
    for name in ("bias", "ethics", "truthfulness"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "bias" / "templates.json").write_text(json.dumps(templates), encoding="utf-8")
    for split in ("train", "test"):
        table = pd.read_csv(source / "ethics" / f"cm_{split}.csv", dtype=str)
        short = table[table["is_short"].str.lower() == "true"]
        share = pairs["ethics"] * PAPER_PAIRS[split]["ethics"] / sum(PAPER_PAIRS[s]["ethics"] for s in PAPER_PAIRS)
        short.groupby("label").head(max(1, round(share))).to_csv(folder / "ethics" / f"cm_{split}.csv", index=False)
    questions = pd.read_csv(source / "truthfulness" / "TruthfulQA.csv", dtype=str, encoding="utf-8-sig")
    questions.head(pairs["truth"]).to_csv(folder / "truthfulness" / "TruthfulQA.csv", index=False)
    return Workload(folder)
