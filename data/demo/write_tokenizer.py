"""Train the demo's tokenizer on the demo's training dialogues: byte-level BPE with one special token.

python data/demo/write_tokenizer.py
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

FOLDER = Path(__file__).resolve().parent
VOCABULARY = 1_500
END_OF_TEXT = "<|endoftext|>"


def main() -> None:
    """Write `tokenizer/`, which `AutoTokenizer.from_pretrained` loads."""
    rows = map(json.loads, (FOLDER / "hh" / "train.jsonl").read_text(encoding="utf-8").splitlines())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainer)
    folder = FOLDER / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    # A class name that both transformers 4 and 5 know.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
