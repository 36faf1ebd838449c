"""The embedded default: its texts as committed, what its planted dialogues are, and the demo's table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from conftest import DEMO, load_script, read_rows

from utils.performance_functions.evaluation import MEASUREMENTS
from utils.reporting import best_within_budget, repairs_figure, repairs_table


def test_texts_are_what_their_script_writes(tmp_path):
    for script in DEMO.glob("*.py"):
        shutil.copy(script, tmp_path)
    for script in ("write_texts.py", "write_tokenizer.py"):
        subprocess.run([sys.executable, str(tmp_path / script)], check=True, capture_output=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".csv")]
    assert len(written) >= 8
    for path in written:
        assert path.read_bytes() == (DEMO / path.relative_to(tmp_path)).read_bytes(), path.name


def test_counts_of_the_embedded_default():
    train, test = (read_rows(DEMO / "hh" / f"{split}.jsonl") for split in ("train", "test"))
    assert (len(train), len(test)) == (1_200, 150)
    for row in train + test:
        assert row["prompt"].startswith("\n\nHuman:")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"].startswith(" ")
    assert not {(row["prompt"], row["chosen"]) for row in train} & {(row["prompt"], row["chosen"]) for row in test}
    planted = json.loads((DEMO / "planted.json").read_text())
    assert {kind: len(set(rows)) for kind, rows in planted.items()} == {"bias": 24, "ethics": 24, "truth": 24}
    assert len({row for rows in planted.values() for row in rows}) == 72
    counts = {name: [len(m.load_pairs(DEMO, split)) for split in ("train", "test")] for name, m in MEASUREMENTS.items()}
    assert counts == {"bias": [352, 80], "ethics": [116, 38], "truth": [96, 24]}


def make_repair(task, scores_type, rate, cost, gain):
    return {
        "task": task,
        "scores_type": scores_type,
        "learning_rate": rate,
        "perplexity_change_percent": cost,
        "improvement_percent": gain,
        "before": -1.0,
        "after": -1.0 - gain / 100,
        "bottom_k": 20,
        "planted_chosen": 17,
    }


@pytest.fixture
def repairs():
    return [
        make_repair("bias", "dpp", 0.1, 0.5, 20),
        make_repair("bias", "dpp", 0.2, 0.9, 35),
        make_repair("bias", "dpp", 0.4, 3.0, 60),
        make_repair("bias", "random", 0.4, 4.0, 1),
        make_repair("bias", "random", 0.2, 2.0, 0.5),
        make_repair("truth", "dpp", 0.1, 0.1, 9),
    ]


def test_best_repair_is_the_largest_improvement_within_the_budget(repairs):
    best = {(r["task"], r["scores_type"]): r["learning_rate"] for r in best_within_budget(repairs, 1.0)}
    assert best == {("bias", "dpp"): 0.2, ("bias", "random"): 0.2, ("truth", "dpp"): 0.1}


def test_table_and_picture_show_every_repair(repairs, tmp_path):
    table = repairs_table(repairs)
    assert len(table.splitlines()) == 2 + len(repairs)
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "+35.0 %" in table
    assert "17 of 20" in table
    repairs_figure(repairs, 1.0, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_runs_the_six_scripts_and_sums_them_up(tiny_models, tmp_path, monkeypatch, capsys):
    """The demo on a tiny model: real scripts, in this process for speed."""
    demo = load_script("data/demo/run_demo.py")
    ran = []

    def run_here(script, *arguments):
        ran.append(script)
        if script != "data/make_sft_model.py":
            module = load_script(script)
            module.run_step(module.main, arguments)
        return 0.5

    monkeypatch.setattr(demo, "run", run_here)
    model = str(tiny_models["pythia"])
    demo.run_step(
        demo.main,
        [
            "--MODEL_NAME",
            model,
            "--OUTPUT_DIR",
            str(tmp_path),
            "--LEARNING_RATES",
            "0.1",
            "--SCORES_TYPES",
            "dpp",
            "random",
        ],
    )
    assert ran[:2] == ["data/make_sft_model.py", "compute_factors_and_scores.py"]
    assert len(set(ran)) == 10
    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["model"] == model
    assert set(summary["seconds"]) == {"model", *(f"step{number}" for number in range(1, 7))}
    assert len(summary["repairs"]) == 6
    assert set(summary["repairs"][0]) == {
        "task",
        "scores_type",
        "if_weight",
        "bottom_k",
        "learning_rate",
        "before",
        "after",
        "improvement_percent",
        "perplexity_before",
        "perplexity_after",
        "perplexity_change_percent",
        "planted_chosen",
    }
    assert (tmp_path / "results" / "demo.png").is_file()
    assert "| bias" in capsys.readouterr().out
