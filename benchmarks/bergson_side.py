"""Step 1 for one task by bergson (https://github.com/EleutherAI/bergson): same model, rows, modules, float32.

    ANOTHER_ENVIRONMENT/bin/python benchmarks/bergson_side.py runs/bench 3

A comparison, never a dependency: it runs in an environment of its own that has bergson, on texts that bench.py has
tokenized. Its query is the mean loss of the truth task's chosen answers, half of our query, which is a small part of
the work (bergson_scores.py asks for the difference). Prints the same JSON line as measure.py.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

from bergson.config.config import (
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.hessians.pipeline import hessian_pipeline
from timing import timed  # Python puts the folder of the script itself on the import path

TOKENS_PER_BATCH = 2_048


def run(work: Path, output: Path) -> None:
    """EKFAC factors of the last block on all training rows, and the scores of all rows."""
    blocks = json.loads((work / "model" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    index = IndexConfig(
        run_path=str(output),
        model=str(work / "model"),
        data=DataConfig(dataset=str(work / "tokenized_train")),
        include_bias=True,
        token_batch_size=TOKENS_PER_BATCH,
        filter_modules=",".join(f"layers.{block}.*" for block in range(blocks - 1)),
    )
    query = QuerySetConfig(dataset=str(work / "tokenized_queries"), aggregation="mean")
    hessian_pipeline(
        index,
        HessianConfig(method="kfac", ev_correction=True),
        ScoreConfig(),
        PreprocessConfig(),
        HessianPipelineConfig(query=query),
    )


if __name__ == "__main__":
    folder, repetitions = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    output = folder / "output_bergson"
    versions = {name: metadata.version(name) for name in ("bergson", "torch", "transformers")}
    print(json.dumps({**timed(lambda: run(folder, output), output, repetitions), "versions": versions}))
