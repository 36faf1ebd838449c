"""Influence scores by bergson (https://github.com/EleutherAI/bergson), on texts that lds_of_others.py has tokenized.

    ANOTHER_ENVIRONMENT/bin/python benchmarks/bergson_scores.py MODEL runs/others/tokenized runs/others [--cg-steps 30]

A comparison, never a dependency: it runs in an environment of its own that has bergson.

For every task the query is f = mean over the pairs of NLL(chosen) - NLL(rejected), each NLL a mean over label tokens; a
training dialogue's loss is a sum over label tokens; only the Linears of the last block count, biases included. EKFAC
factors are those of all training dialogues, with bergson's default damping. With --cg-steps, the solution for each
query is also refined by conjugate gradients on the Gauss-Newton matrix of all training dialogues, with the EKFAC
inverse as preconditioner.

Writes OUTPUT/bergson_scores.safetensors, and OUTPUT/bergson_cg_scores.safetensors: a tensor (N_train,) for each task.
Positive: training on the dialogue lowers f. bergson's own files stay in OUTPUT/runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from importlib import metadata
from pathlib import Path

import bergson.hessians.astra
import numpy as np
import torch
from bergson.build import build_query
from bergson.config.config import (
    AstraConfig,
    DataConfig,
    HessianConfig,
    HessianPipelineConfig,
    IndexConfig,
    InversionConfig,
    PreprocessConfig,
    QuerySetConfig,
    ScoreConfig,
)
from bergson.data import create_index, load_gradients, load_scores
from bergson.hessians.pipeline import hessian_pipeline
from datasets import load_from_disk
from safetensors.torch import save_file

TASKS = ("bias", "ethics", "truth")
TOKENS_PER_BATCH = 2_048
DOCUMENTS_PER_PRODUCT = 16  # that a Gauss-Newton product runs at once; changes only memory and time


def index_config(model: Path, run: Path, data: Path, reduction: str) -> IndexConfig:
    """Which gradients: the Linears of the last block with their biases, float32, NLL summed or averaged over labels."""
    blocks = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    return IndexConfig(
        run_path=str(run),
        model=str(model),
        data=DataConfig(dataset=str(data)),
        precision="fp32",
        loss_reduction=reduction,
        include_bias=True,
        token_batch_size=TOKENS_PER_BATCH,
        filter_modules=",".join(f"layers.{block}.*" for block in range(blocks - 1)),  # those to leave out
    )


def build_queries(model: Path, prepared: Path, runs: Path) -> Path:
    """grad f of every task, one row each in a single index, so that one pass over the dialogues scores all tasks.

    bergson builds mean(chosen) - mean(rejected) itself (`contrast`), a task at a time, with the mean over label tokens;
    only putting the rows together is done here.
    """
    folders = []
    for task in TASKS:
        config = index_config(model, runs / f"query_{task}", prepared / f"{task}_chosen", "mean")
        query = QuerySetConfig(
            dataset=str(prepared / f"{task}_chosen"),
            aggregation="mean",
            contrast=DataConfig(dataset=str(prepared / f"{task}_rejected")),
        )
        folders.append(Path(build_query(config, query, PreprocessConfig())))
    rows = [load_gradients(folder) for folder in folders]
    sizes = json.loads((folders[0] / "info.json").read_text(encoding="utf-8"))["grad_sizes"]
    merged = runs / "queries"
    index = create_index(merged, len(rows), sizes, rows[0].dtype)
    index[:] = np.concatenate(rows)
    index.flush()
    shutil.copy(folders[0] / "processor_config.yaml", merged)
    return merged


def load_writable_gradients(folder: str) -> np.ndarray:
    """A copy of an index in memory."""
    return np.array(load_gradients(folder))


# bergson 2.5.1 updates the CG solution in place. On a GPU that is a copy; on a CPU it still is the file, mapped into
# memory as read-only, and the first step ends in a segmentation fault.
bergson.hessians.astra.load_gradients = load_writable_gradients


def trace(index: IndexConfig, queries: Path, astra: AstraConfig) -> None:
    """Factors, inverse, scores; steps whose output is there already are skipped."""
    hessian_pipeline(
        index,
        HessianConfig(method="kfac", ev_correction=True),
        ScoreConfig(),
        PreprocessConfig(),
        HessianPipelineConfig(query=QuerySetConfig(path=str(queries)), astra=astra, resume=True),
    )


def read_scores(folder: Path) -> dict[str, torch.Tensor]:
    """The scores of every task: positive where training on the dialogue lowers f, bergson's own sign."""
    scores = np.asarray(load_scores(folder)[:], dtype=np.float32)
    if scores.shape[1:] != (len(TASKS),) or not np.isfinite(scores).all():
        raise ValueError(f"{folder}: scores of shape {scores.shape}, or some are not finite")
    return {task: torch.from_numpy(scores[:, column].copy()) for column, task in enumerate(TASKS)}


def main(model: Path, prepared: Path, output: Path, seed: int, cg_steps: int) -> None:
    """Score, and print what it took as one line of JSON."""
    runs, seconds = output / "runs", {}
    if runs.exists():
        raise FileExistsError(f"{runs} is there already: remove it, or give another OUTPUT")
    torch.manual_seed(seed)  # bergson samples the labels of its curvature from the global generator
    started = time.perf_counter()
    queries = build_queries(model, prepared, runs)
    index = index_config(model, runs / "trace", prepared / "train", "sum")
    trace(index, queries, AstraConfig())
    seconds["ekfac"] = time.perf_counter() - started
    scores = runs / "trace" / "scores"
    save_file(read_scores(scores), output / "bergson_scores.safetensors")
    if cg_steps:
        started = time.perf_counter()
        scores.rename(runs / "trace" / "scores_ekfac")  # or the pipeline would not score again
        documents = len(load_from_disk(prepared / "train"))
        trace(index, queries, AstraConfig(cg_steps, "cg", batch_size=documents, micro_batch_size=DOCUMENTS_PER_PRODUCT))
        seconds["cg"] = time.perf_counter() - started
        save_file(read_scores(scores), output / "bergson_cg_scores.safetensors")
    facts = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "damping": vars(InversionConfig()),
        "seed": seed,
        "cg_steps": cg_steps,
        "versions": {name: metadata.version(name) for name in ("bergson", "torch", "transformers", "datasets")},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("prepared", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0, help="of the sampled labels")
    parser.add_argument("--cg-steps", type=int, default=0, help="conjugate gradient steps; 0: none")
    arguments = parser.parse_args()
    folders = (path.resolve() for path in (arguments.model, arguments.prepared, arguments.output))
    main(*folders, arguments.seed, arguments.cg_steps)
