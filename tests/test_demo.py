"""The embedded default: its texts as committed, what its planted dialogues are, and the demo's table."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import DEMO, load_script, read_rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import steps
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.ethics import OWN_PROMPT, read_prompt
from utils.reporting.figures import RepairPoint, repairs_figure
from utils.reporting.tables import WithInterval


def test_texts_are_what_their_script_writes(tmp_path):
    for source in (*DEMO.glob("*.py"), DEMO / "phrases.json"):
        shutil.copy(source, tmp_path)
    for script in ("write_texts.py", "write_tokenizer.py"):
        subprocess.run([sys.executable, str(tmp_path / script)], check=True, capture_output=True)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix in (".json", ".jsonl", ".csv")]
    assert len(written) >= 9
    for path in written:
        assert path.read_bytes() == (DEMO / path.relative_to(tmp_path)).read_bytes(), path.name


def test_counts_of_the_embedded_default():
    train, test = (read_rows(DEMO / "hh" / f"{split}.jsonl") for split in ("train", "test"))
    assert (len(train), len(test)) == (1_200, 150)
    assert read_prompt(DEMO / "ethics" / "prompt.txt") == OWN_PROMPT
    for row in train + test:
        assert row["prompt"].startswith("\n\nHuman:")
        assert row["prompt"].endswith("\n\nAssistant:")
        assert row["chosen"].startswith(" ")
    assert not {(row["prompt"], row["chosen"]) for row in train} & {(row["prompt"], row["chosen"]) for row in test}
    planted = json.loads((DEMO / "hh" / "planted.json").read_text())
    assert {kind: len(set(rows)) for kind, rows in planted.items()} == {"bias": 24, "ethics": 24, "truth": 24}
    assert len({row for rows in planted.values() for row in rows}) == 72
    counts = {name: [len(m.load_pairs(DEMO, split)) for split in ("train", "test")] for name, m in MEASUREMENTS.items()}
    assert counts == {"bias": [360, 72], "ethics": [116, 38], "truth": [96, 24]}


def test_picture_shows_every_repair_and_leaves_out_what_costs_far_too_much(tmp_path, monkeypatch):
    points = [
        RepairPoint(panel, line, rate, WithInterval(*3 * [100 * rate**2]), WithInterval(gain, gain - 5, gain + 5))
        for panel in ("bias", "truth")
        for line, gain in (("dpp_ifweight10_bottom20", 20), ("direct_preserve", 30))
        for rate in (0.05, 0.1, 9.0)
    ]
    drawn = []

    def draw(self, xs, ys, y_errors, x_errors, **style):
        assert (y_errors, x_errors) == ([[5] * len(ys)] * 2, [[0] * len(xs)] * 2)
        drawn.append((xs, style["label"]))

    monkeypatch.setattr(Axes, "errorbar", draw)
    monkeypatch.setattr(Figure, "legend", lambda *_, **__: None)
    repairs_figure(points, 1.0, tmp_path / "demo.png")
    assert [label for _, label in drawn] == 2 * ["dpp_ifweight10_bottom20", "direct_preserve"]
    assert all(xs == pytest.approx([0.25, 1.0]) for xs, _ in drawn)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_runs_the_real_scripts_and_sums_them_up(
    quick_repairs, tiny_models, small_data, tmp_path, monkeypatch, capsys
):
    """The demo's whole grid on a tiny model and less data."""
    demo, tables = load_script("data/demo/run_demo.py"), load_script("evaluation_scripts/paper_tables.py")
    ran = []
    original = steps.run_script

    def run(name, constants, **more):
        ran.append(name)
        if name != "data/make_sft_model.py":
            original(name, constants, **more)

    monkeypatch.setattr(demo, "run_script", run)
    monkeypatch.setattr(tables, "HH_DATASET", str(small_data / "hh"))
    monkeypatch.setattr(tables, "DATA_DIR", str(small_data))
    monkeypatch.setattr(tables, "SWEPT_RATES", [0.05, 0.1])
    demo.run_step(
        demo.main,
        ["--MODEL_NAME", str(tiny_models["pythia"]), "--OUTPUT_DIR", str(tmp_path), "--BOTTOM_K", "5"],
    )
    assert ran == ["data/make_sft_model.py", "evaluation_scripts/paper_tables.py"]
    results = tmp_path / "results"
    assert (results / "tables" / "sweeps.png").is_file()
    assert (results / "report.html").is_file()
    shown = capsys.readouterr().out
    for task in ("bias", "ethics", "truth", "combined"):
        for method in ("pure_ekfac", "dpp", "contrast", "random"):
            assert re.search(rf"\| +{task} +\| +{re.escape(method)} +\|", shown)
