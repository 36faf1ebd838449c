"""The benchmark's workload: a Pythia-70m architecture with random weights, on part of the real dialogues and pairs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from dpp.greedy_dpp import center
from utils.batching import IGNORED_LABEL, LabelledSequence
from utils.models import load_tokenizer
from utils.paths import PROJECT_ROOT
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.pairs import tokenize_pairs
from utils.performance_functions.truth import TRUTH
from utils.rankings import min_max_normalise

PAPER_TRAIN, PAPER_TEST, PAPER_FACTORS = 96_256, 5_103, 10_000
TRAIN_SHARE_OF_ETHICS = 0.72  # of the short pairs, in the official split
BIAS_PAIRS_PER_TOPIC = 9  # per group: 3 stereotypes x 3 counter-statements
PYTHIA_70M_HIDDEN, PYTHIA_70M_BLOCKS, VOCABULARY = 512, 6, 50_304
SOURCES = (PROJECT_ROOT.parent / "shared" / "data", PROJECT_ROOT / "data", PROJECT_ROOT / "data" / "demo")


@dataclass(frozen=True)
class Workload:
    """A folder with the model and the data in the official layout."""

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
        """The paper's share of the training dialogues."""
        return max(1, round(self.num_train * PAPER_FACTORS / PAPER_TRAIN))


def find_source() -> Path:
    """The first folder with data in the official layout; the embedded data come last."""
    return next(folder for folder in SOURCES if (folder / "hh" / "train.jsonl").is_file())


def make_model(folder: Path, source: Path, hidden: int) -> None:
    """A Pythia architecture of 6 blocks with random weights and the real tokenizer, saved as a checkpoint."""
    if (folder / "config.json").is_file() and AutoConfig.from_pretrained(folder).hidden_size == hidden:
        return
    file = source / "pythia_tokenizer" / "tokenizer.json"
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file if file.is_file() else PROJECT_ROOT / "data" / "demo" / "tokenizer" / "tokenizer.json"),
        bos_token=end,
        eos_token=end,
        unk_token=end,
    )
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=PYTHIA_70M_BLOCKS,
        num_attention_heads=hidden // 64,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_greedy_inputs(folder: Path, num_examples: int, hidden: int) -> None:
    """Write centred representations in 300 Gaussian clusters, and min-max normalised Gaussian scores."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(300, hidden, generator=generator)
    cluster = torch.randint(300, (num_examples,), generator=generator)
    representations = centres[cluster] + torch.randn(num_examples, hidden, generator=generator)
    quality = min_max_normalise(torch.randn(num_examples, generator=generator, dtype=torch.float64))
    save_file({"representations": center(representations), "quality": quality}, folder / "greedy.safetensors")


def save_rows(sequences: Iterable[LabelledSequence], folder: Path) -> None:
    """Write sequences as a data set that bergson takes: ids, labels of the same length, and that length."""
    from datasets import Dataset

    rows = []
    for sequence in sequences:
        labels = [IGNORED_LABEL] * len(sequence.input_ids)
        counted = slice(sequence.label_start, sequence.label_end)
        labels[counted] = sequence.input_ids[counted].tolist()
        rows.append({"input_ids": sequence.input_ids.tolist(), "labels": labels, "length": len(labels)})
    Dataset.from_list(rows).save_to_disk(folder)


def save_tokenized(work: Workload) -> None:
    """Write the training dialogues and the truth task's chosen answers as token ids and labels, for bergson_side.py."""
    tokenizer = load_tokenizer(work.model)
    pairs = tokenize_pairs(TRUTH.load_pairs(Path(work.data_dir), "train"), tokenizer, TRUTH.max_tokens)
    texts = {
        "train": tokenize_dialogues(load_dialogues(work.hh_dataset, "train"), tokenizer),
        "queries": [pairs.sequences[position] for position in pairs.chosen],
    }
    for name, sequences in texts.items():
        save_rows(sequences, work.folder / f"tokenized_{name}")


def make_workload(
    folder: Path, train: int, test: int, pairs: dict[str, int], source: Path, hidden: int = PYTHIA_70M_HIDDEN
) -> Workload:
    """Make the model, and cut the data down to the first rows.

    Args:
        train, test: dialogues of each split.
        pairs: least number of pairs of each measurement, over both splits.
    """
    make_model(folder / "model", source, hidden)
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
        share = TRAIN_SHARE_OF_ETHICS if split == "train" else 1 - TRAIN_SHARE_OF_ETHICS
        short.groupby("label").head(max(1, round(share * pairs["ethics"]))).to_csv(
            folder / "ethics" / f"cm_{split}.csv", index=False
        )
    questions = pd.read_csv(source / "truthfulness" / "TruthfulQA.csv", dtype=str, encoding="utf-8-sig")
    questions.head(pairs["truth"]).to_csv(folder / "truthfulness" / "TruthfulQA.csv", index=False)
    return Workload(folder)
