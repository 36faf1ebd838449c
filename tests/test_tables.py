"""Sweeps, tables and the report: numbers as in the steps' results, in every format, whatever stops the run."""

from __future__ import annotations

import json
import math
import re
import shutil
import typing
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Workspace, contents, load_script, run_script, write_rows
from matplotlib.figure import Figure
from safetensors.torch import load_file

from evaluation_scripts import paper_tables
from evaluation_scripts.paper_tables import RepairConfig, fewest_task_names, mean_improvement
from utils import artifacts, paths
from utils.artifacts import FileArtifact
from utils.console import UserError
from utils.files import read_json
from utils.methods import METHODS
from utils.models import load_tokenizer
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.rankings import load_token_scores
from utils.repairs import RepairChoice
from utils.reporting import grid_report
from utils.reporting.figures import FIGURE_STYLES, ablation_figure
from utils.reporting.sweeps import draw_overview, earlier_rates, write_sweep
from utils.reporting.tables import Table, ablation_table, main_table, mean_std
from utils.results import improvement_percent
from utils.settings import ScoresType, Settings

STEP_1, STEP_4, STEP_5 = "compute_factors_and_scores.py", "make_gradients.py", "gradient_ascent_and_save.py"
TABLES = "evaluation_scripts/paper_tables.py"
SMALL = [
    *("--SEEDS", 42, 7, "--TASKS", "bias", "combined", "--SCORES_TYPES", "dpp", "direct", "--BOTTOM_K", 4, 6),
    *("--IF_WEIGHT", 10, 1, "--ABLATED_SCORES_TYPES", "pure_ekfac", "--SWEPT_RATES", 0.01, 0.1),
    *("--NUM_COMPLETIONS", 1),
]


# ------------------------------------------------------------------------------------------------------ sweeps


def test_a_sweep_grows_and_says_what_the_results_say(make_workspace):
    workspace = make_workspace("qwen")
    workspace.run(STEP_1)
    common = ("--TASK_NAME", "ethics", "--BOTTOM_K", 4)
    workspace.run(STEP_4, *common)
    sweep = ("--SAVE_TO_DISK", "False", "--LEARNING_RATE")
    workspace.run(STEP_5, *common, *sweep, 0.1, 0.01)
    workspace.run(STEP_5, *common, *sweep, 0.05, 0.1)
    results = workspace.output / "results"
    file = results / "ethics_qwen-tiny_pure_ekfac_bottom4_sweep.json"
    rows = read_json(file)["rates"]
    assert [row["learning_rate"] for row in rows] == [0.01, 0.05, 0.1]
    for row in rows:
        name = f"ethics_qwen-tiny_pure_ekfac_bottom4_lr{row['learning_rate']:g}"
        for task in ("bias", "ethics", "truth"):
            before, after = (read_json(results / f"{m}_{task}_test.json")["loss"] for m in ("qwen-tiny", name))
            assert row[task] == after
            assert row[f"{task}_improvement"] == pytest.approx(before - after, abs=1e-9)
            assert row[f"{task}_improvement_low"] < before - after < row[f"{task}_improvement_high"]
            if row[f"{task}_improvement_percent"] is not None:
                assert row[f"{task}_improvement_percent"] == pytest.approx(improvement_percent(before, after))
        before, after = (read_json(results / f"{m}_anthropic_test.json")["perplexity"] for m in ("qwen-tiny", name))
        assert row["perplexity_change_percent"] == pytest.approx(100 * (after - before) / before)
        losses = [load_file(results / "losses" / f"{m}_bias_test_losses.safetensors") for m in ("qwen-tiny", name)]
        changes = losses[0]["loss"] - losses[1]["loss"]
        assert row["bias_improvement"] == pytest.approx(float(changes.mean()), rel=1e-6)
    table = pd.read_csv(file.with_suffix(".csv"))
    for shown, row in zip(table.to_dict("records"), rows, strict=True):
        assert {name: value for name, value in shown.items() if value == value} == pytest.approx(
            {name: value for name, value in row.items() if value is not None}
        )
    picture = results / "ethics_qwen-tiny_sweep.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = contents(workspace.output)
    workspace.run(STEP_5, *common, *sweep, 0.05, 0.1)
    assert contents(workspace.output) == before

    workspace.run(STEP_4, *common, "--GRADIENT_REDUCTION_TYPE", "sum", "--OVERWRITE", "True")
    workspace.run(STEP_5, *common, *sweep, 0.2, 0.3, "--OVERWRITE", "True")
    assert [row["learning_rate"] for row in read_json(file)["rates"]] == [0.2, 0.3], "another gradient, another sweep"


def sweep_report(learning_rate):
    perplexity, bias = {"after": 5.0, "change_percent": 0.5}, {"after": -1.0, "improvement": 0.3}
    measurements = {"perplexity": perplexity, "bias": bias}
    return {"learning_rate": learning_rate, "measurements": measurements, "split_rules": {"bias": "disjoint"}}


def test_a_sweep_from_other_inputs_is_refused_unless_it_is_to_be_replaced(tmp_path):
    where = (str(tmp_path), "m", "bias", "dpp_ifweight10_bottom5")
    old, new = {"model": "a", "gradient": "b"}, {"model": "a", "gradient": "c"}
    assert earlier_rates(*where, old, overwrite=False) == {}
    write_sweep(*where, old, {}, [sweep_report(0.1), sweep_report(0.01)], 1.0)
    rates = earlier_rates(*where, old, overwrite=True)
    assert list(rates) == [0.01, 0.1]
    assert earlier_rates(*where, old, overwrite=False) == rates
    write_sweep(*where, old, rates, [sweep_report(0.05)], 1.0)
    assert list(earlier_rates(*where, old, overwrite=False)) == [0.01, 0.05, 0.1]

    with pytest.raises(UserError) as refused:
        earlier_rates(*where, new, overwrite=False)
    message = str(refused.value)
    file = "bias_m_dpp_ifweight10_bottom5_sweep.json"
    for told in (file, "gradient = 'b' there, 'c' now", "OVERWRITE = True", "another OUTPUT_DIR"):
        assert told in message
    assert "model = " not in message
    assert "\n" not in message
    assert earlier_rates(*where, new, overwrite=True) == {}


@pytest.mark.parametrize("left", [0, 7, 2_000, -1])
def test_a_picture_that_is_cut_short_is_drawn_again_and_never_shown(tmp_path, left):
    sweep = (str(tmp_path), "m", "bias", "random_bottom5", {"model": "a"}, {}, [sweep_report(0.1)], 1.0)
    write_sweep(*sweep)
    figure = tmp_path / "results" / "bias_m_sweep.png"
    whole = figure.read_bytes()
    figure.write_bytes(whole[:left])
    grid = {"MODEL_NAMES": ["o/m"], "TASKS": ["bias"], "BOTTOM_K": [5], "IF_WEIGHT": [10.0]}
    settings = Settings(OUTPUT_DIR=str(tmp_path), PPL_BUDGET=0.01, **grid)
    assert grid_report._pictures(settings) == []
    write_sweep(*sweep)
    assert len(figure.read_bytes()) == len(whole)
    assert [picture.png for picture in grid_report._pictures(settings)] == [figure]


def test_the_report_shows_no_ablation_of_an_earlier_grid(tmp_path):
    grid = {"MODEL_NAMES": ["o/m"], "TASKS": ["bias"], "BOTTOM_K": [5, 7], "IF_WEIGHT": [10.0]}
    settings = Settings(OUTPUT_DIR=str(tmp_path), PPL_BUDGET=0.01, **grid)
    write_sweep(str(tmp_path), "m", "bias", "random_bottom5", {"model": "a"}, {}, [sweep_report(0.1)], 1.0)
    sweep, folder = tmp_path / "results" / "bias_m_sweep.png", paths.tables_dir(tmp_path)
    folder.mkdir()
    for name in ("bottom_k", "if_weight"):
        shutil.copy(sweep, folder / f"{name}.png")
    assert [picture.png for picture in grid_report._pictures(settings)] == [sweep, folder / "bottom_k.png"]


GOOD_SWEEP = {"model": "m", "task": "bias", "repair": "random_bottom5", "inputs": {"model": "a"}, "rates": []}
GOOD_ROW = {"learning_rate": 0.1, "perplexity_change_percent": 1.0, "bias_improvement": 0.1, "bias_split": "disjoint"}
BROKEN_SWEEPS = [
    *(None, [], {}, "text", 7, {**GOOD_SWEEP, "repair": "best"}, {**GOOD_SWEEP, "inputs": None}),
    *({**GOOD_SWEEP, name: value} for name in GOOD_SWEEP for value in (None, 3, [None], {"a": {}}) if name != "inputs"),
    *({**GOOD_SWEEP, "rates": [row]} for row in (None, [], {}, {"learning_rate": None}, {"learning_rate": True})),
    *({**GOOD_SWEEP, "rates": [{**GOOD_ROW, name: value}]} for name in GOOD_ROW for value in (None, [], {}, math.nan)),
    {**GOOD_SWEEP, "rates": [{**GOOD_ROW, "bias_improvement_low": "low"}]},
]


@pytest.mark.parametrize("content", BROKEN_SWEEPS, ids=json.dumps)
def test_a_sweep_of_another_shape_is_refused_in_one_line(tmp_path, content):
    file = paths.sweep_file(tmp_path, "bias", "m", "random_bottom5")
    file.parent.mkdir()
    file.write_text(json.dumps(content), encoding="utf-8")
    told = (
        "random_bottom5_sweep.json is not what this project wrote; delete it and run gradient_ascent_and_save.py again"
    )
    where, other = (str(tmp_path), "m", "bias", "random_bottom5"), "dpp_ifweight10_bottom5"
    for read in (
        lambda: earlier_rates(*where, {"model": "a"}, overwrite=True),
        lambda: write_sweep(*where[:3], other, {"model": "a"}, {}, [sweep_report(0.1)], 1.0),
        lambda: draw_overview(str(tmp_path), ["m"], 1.0),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            read()
        paths.sweep_file(tmp_path, "bias", "m", other).unlink(missing_ok=True)


def test_a_run_killed_while_drawing_leaves_no_truncated_figure(tmp_path, monkeypatch):
    def stop_half_way(self, path, **_):
        Path(path).write_bytes(b"\x89PNG")
        raise KeyboardInterrupt

    sweep = (str(tmp_path), "m", "bias", "random_bottom5", {"model": "a"}, {}, [sweep_report(0.1)], 1.0)
    figure = tmp_path / "results" / "bias_m_sweep.png"
    monkeypatch.setattr(Figure, "savefig", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        write_sweep(*sweep)
    assert not figure.exists()
    monkeypatch.undo()
    write_sweep(*sweep)
    assert figure.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert not list(tmp_path.rglob("*.partial"))


# ------------------------------------------------------------------------------------------------------ tables


def make_row(seed=42, task="bias", method="dpp", gain=30.0, **more):
    row = {"model": "m", "seed": seed, "task": task, "method": method, "bottom_k": 20, "if_weight": 10.0}
    row |= {"learning_rate": 0.1, "perplexity": 5.0, "perplexity_change_percent": 0.5, "bias_split": "disjoint"}
    for name in ("improvement", "bias_improvement", "ethics_improvement", "truth_improvement"):
        ends = {f"{name}_low": gain / 100 - 0.05, f"{name}_high": gain / 100 + 0.05}
        row |= {name: gain / 100, **ends, f"{name}_percent": gain}
    return {**row, "seconds": 2.0, "stopped": None, "indices": [1, 2, 3], **more}


def test_mean_std():
    assert mean_std([], "+.1f", " %") == "–"
    assert mean_std([3.0], "+.1f", " %") == "+3.0 %"
    assert mean_std([1.0, 3.0], "+.1f", " %") == "+2.0 ± 1.4 %"


def test_main_table_has_a_line_for_each_model_and_repair():
    rows = [make_row(42, gain=30), make_row(0, gain=10), make_row(method="random", gain=-1)]
    loss = {"loss": -1.0, "loss_low": -1.25, "loss_high": -0.75, "split_rule": "disjoint", "clusters": 8}
    baseline = {"anthropic": {"perplexity": 5.0, "dialogues": 150}, **dict.fromkeys(("bias", "ethics", "truth"), loss)}
    rows[2]["improvement_percent"] = None
    table = main_table([("m (POST-SFT)", baseline), ("b (pre-SFT)", {})], rows, {"bias": [2, 3, 9], "truth": [1]})
    assert [row[2] for row in table.rows] == ["–", "–", "dpp", "random"]
    assert {len(row) for row in table.rows} == {len(table.header)}
    shown = dict(zip(table.header, table.rows[2], strict=True))
    assert shown["improvement"] == "+0.200 ± 0.141 [+0.150, +0.250] (+20.0 ± 14.1 %)"
    assert shown["ethics"] == "+0.200 ± 0.141 [+0.150, +0.250]"
    assert table.rows[3][table.header.index("improvement")] == "-0.010 [-0.060, +0.040] (‡)"
    assert table.rows[0][table.header.index("bias")] == "-1.0000 [-1.2500, -0.7500]"
    assert "Split of the pairs: bias disjoint. Independent units: dialogues 150, bias 8" in table.caption
    assert "±: standard deviation over seeds" in table.caption
    assert "±" not in main_table([], rows[:1], None).caption
    assert ablation_table(rows, "bottom_k").caption.endswith("Split of the pairs: bias disjoint.")
    assert "‡: no percentage" in table.caption
    assert shown["known harm"] == "2 ± 0 of 3"
    assert dict(zip(table.header, table.rows[1], strict=True))["perplexity"] == "–"


def test_an_unknown_interval_stays_unknown():
    """Of a single cluster; a mean with it has none either."""
    row = make_row() | {"bias_improvement_low": None, "bias_improvement_high": None}
    mean = mean_improvement(row, ["bias", "ethics", "truth"])
    assert mean["improvement"] == pytest.approx(0.3)
    assert mean["improvement_low"] is mean["improvement_high"] is None
    known = mean_improvement(row, ["ethics", "truth"])
    assert known["improvement_high"] == pytest.approx(0.3 + math.hypot(0.05, 0.05) / 2)
    table = main_table([], [row | mean], None)
    assert table.rows[0][table.header.index("improvement")] == "+0.300 (+30.0 %)"


def test_sweeps_measured_on_other_data_are_not_drawn_together(tmp_path, capsys):
    report = sweep_report(0.1)
    for repair, data in (("random_bottom5", "old"), ("dpp_ifweight10_bottom5", "new")):
        write_sweep(
            str(tmp_path), "m", "bias", repair, {"model": "a", "gradient": repair, "bias": data}, {}, [report], 1.0
        )
    assert "bias_m_random_bottom5_sweep.json" in capsys.readouterr().out.split("not drawn")[1]


def test_tables_are_written_in_three_formats(tmp_path):
    table = ablation_table([make_row(bottom_k=k, gain=k) for k in (20, 5)], "bottom_k")
    table.write(tmp_path / "t")
    assert [row[2] for row in table.rows] == ["5", "20"]
    assert "| bias " in (tmp_path / "t.md").read_text()
    assert pd.read_csv(tmp_path / "t.csv")["improvement_percent"].tolist() == [20, 5]
    assert r"+5.0 \%" in (tmp_path / "t.tex").read_text()
    Table("caption", ["name", "value"], [["x", "1.0"]]).write(tmp_path / "plain")
    assert (tmp_path / "plain.csv").read_text() == "name,value\nx,1.0\n"


def test_latex_escapes_and_aligns():
    text = Table("50 % of a_b", ["name", "value"], [["x_1 & y", "1.0 ± 0.2"], ["z", "–"]]).latex()
    assert r"\begin{tabular}{lr}" in text
    assert r"x\_1 \& y & 1.0 $\pm$ 0.2 \\" in text
    assert not re.search(r"(?<!\\)[%_#]", text)


def test_every_way_of_choosing_can_be_drawn_and_explained(tmp_path):
    scores_types = set(typing.get_args(ScoresType))
    assert set(FIGURE_STYLES) == scores_types
    assert set(grid_report.NOTES) == {name for name in scores_types if METHODS[name].subset}
    rows = [make_row(method=f"{name} + preserve", if_weight=w) for name in scores_types for w in (0.0, 10.0)]
    ablation_figure(rows, "if_weight", tmp_path / "figures" / "if_weight.png")
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["if_weight.png"]


def test_the_report_reads_a_score_file_once_however_many_repairs_it_shows(tmp_path, monkeypatch):
    write_rows(tmp_path / "hh" / "train.jsonl", [{"prompt": f"p{i}", "chosen": f"c{i}"} for i in range(5)])
    settings = Settings(
        **{"MODEL_NAMES": ["o/m"], "HH_DATASET": str(tmp_path / "hh"), "OUTPUT_DIR": str(tmp_path)},
        **{"SEEDS": [42, 0], "BOTTOM_K": [3], "IF_WEIGHT": [10.0], "TASKS": ["bias", "truth"]},
        **{"LEARNING_RATE": "auto", "PPL_BUDGET": 0.01, "USE_HALF_PRECISION": False},
        COMPUTE_PER_TOKEN_SCORES=False,
    )
    scores = torch.arange(5.0)[None] / 8
    for task in ("bias", "truth"):
        file = paths.scores_file(tmp_path, task, "m", "ekfac", False, 42)
        FileArtifact(file, STEP_1).save_tensors({"all_modules": scores}, 0.0)
    picks = {"diversity_gains": [3.0, 2.0, 1.0], "influence_gains": [0.5, 0.25, 0.125]}
    FileArtifact(paths.dpp_file(tmp_path, "bias", "m", 3, 10.0), "dpp/greedy_dpp.py").save_json(picks, 0.0)
    read = []
    monkeypatch.setattr(artifacts, "load_file", lambda file: read.append(file) or load_file(file))
    rows = [
        make_row(42, task, method, repair="r", scores_type=method, preserve_perplexity=preserve, bottom_k=3)
        for task, method in (("bias", "dpp"), ("truth", "random"))
        for preserve in (False, True)
    ]
    report = grid_report.report_on(settings, rows, [], {"truth": [2]})
    assert len(read) == len(set(read)) == 2
    assert [subset.title for subset in report.subsets] == ["bias, chosen by dpp", "truth, chosen by random"]
    example = report.subsets[0].examples[1]
    assert (example.rank, example.row, example.prompt, example.known_harm) == (2, 2, "p2", "truth")
    assert example.scores == {"bias": 0.25, "truth": 0.25}
    assert example.gains == {"diversity": 2.0, "influence": 0.25}


def test_as_few_runs_as_name_the_tasks():
    def configs(*tasks):
        return [RepairConfig(task, RepairChoice("dpp", 5, 1.0)) for task in tasks]

    assert fewest_task_names(configs("bias", "ethics", "truth", "combined")) == ["all", "combined"]
    assert fewest_task_names(configs("truth", "bias", "truth")) == ["truth", "bias"]


# ------------------------------------------------------------------------------------------- the whole script


@pytest.fixture(scope="module")
def tabled(make_workspace, quick_repairs) -> Workspace:
    workspace = make_workspace("pythia")
    workspace.run(TABLES, *SMALL)
    return workspace


def test_tables_say_what_the_results_say(tabled):
    results = tabled.output / "results"
    table = pd.read_csv(results / "tables" / "main.csv")
    assert len(table) == 2 * 2 * 2 * 2, "methods x with and without preserving x tasks x seeds"
    for row in table.to_dict("records"):
        folder = results if row["seed"] == 42 else tabled.output / "seed-7" / "results"
        name = f"{row['task']}_pythia-tiny_{row['repair']}_lr{row['learning_rate']:g}"
        for task in ("bias", "ethics", "truth"):
            assert row[task] == pytest.approx(read_json(folder / f"{name}_{task}_test.json")["loss"])
        search = read_json(folder / f"{row['task']}_pythia-tiny_{row['repair']}_search.json")
        assert search["learning_rate"] == row["learning_rate"]
        assert row["stopped"] == search["stopped"]
    combined = table[table["task"] == "combined"]
    gains = combined[[f"{task}_improvement" for task in ("bias", "ethics", "truth")]].mean(axis=1)
    assert combined["improvement"].tolist() == pytest.approx(gains.tolist())
    markdown = (results / "tables" / "main.md").read_text()
    assert "pythia-tiny (POST-SFT)" in markdown
    assert len(re.findall(r"\| +dpp \+ preserve \|", markdown)) == 2
    for name in ("bottom_k", "if_weight"):
        assert (results / "tables" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert set(pd.read_csv(results / "tables" / "bottom_k.csv")["bottom_k"]) == {4, 6}
    assert set(pd.read_csv(results / "tables" / "if_weight.csv")["if_weight"]) == {1, 10}


def test_the_report_shows_subsets_completions_and_pictures(tabled):
    page = (tabled.output / "results" / "report.html").read_text(encoding="utf-8")
    embedded = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])
    picks = read_json(tabled.output / "dpp" / "bias_pythia-tiny_indices_4_ifweight10.json")
    assert "bias, chosen by dpp" in json.dumps(embedded)
    rows = (tabled.data / "hh" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    for index in picks["indices"]:
        assert json.loads(rows[index])["chosen"].strip()[:40] in json.dumps(embedded, ensure_ascii=False)
    assert page.count("data:image/png") == 5, "an overview, a sweep for each task, two ablations"
    (kept,) = (tabled.output / "results").glob("bias_*_dpp_ifweight10_bottom4_lr*_completions_test.json")
    completion = read_json(kept)[0]
    assert completion["before"]
    assert completion["prompt"].startswith("\n\nHuman")
    assert "before" in page.lower()


def test_a_finished_grid_is_not_computed_again(tabled, monkeypatch):
    def refuse(*_):
        raise AssertionError("a model was loaded")

    for module in ("utils.kept_model", "utils.evaluation"):
        monkeypatch.setattr(f"{module}.load_model", refuse)
    before = {name: file for name, file in contents(tabled.output).items() if not name.endswith("sweeps.png")}
    tabled.run(TABLES, *SMALL)
    after = contents(tabled.output)
    assert {name for name, file in before.items() if after[name] != file} <= {"results/report.html"} | {
        f"results/tables/{name}.png" for name in ("bottom_k", "if_weight")
    }


def test_a_killed_grid_goes_on_where_it_was(make_workspace, tabled, monkeypatch):
    workspace = make_workspace("pythia")
    ran = []
    original = paper_tables.run_script

    def stop_after_nine(name, *arguments, **constants):
        ran.append(name)
        if len(ran) == 10:
            raise KeyboardInterrupt
        original(name, *arguments, **constants)

    monkeypatch.setattr(paper_tables, "run_script", stop_after_nine)
    with pytest.raises(SystemExit) as stop:
        workspace.run(TABLES, *SMALL)
    assert stop.value.code == 130
    assert not (workspace.output / "results" / "report.html").exists()
    monkeypatch.setattr(paper_tables, "run_script", original)
    workspace.run(TABLES, *SMALL)
    whole, resumed = (
        pd.read_csv(folder / "results" / "tables" / "main.csv").drop(columns="seconds")
        for folder in (tabled.output, workspace.output)
    )
    pd.testing.assert_frame_equal(whole, resumed)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--PRE_SFT_MODEL_NAMES", "a/b", "c/d"], "PRE_SFT_MODEL_NAMES has 2 names for 1 in MODEL_NAMES"),
        (
            ["--PRE_SFT_MODEL_NAMES", "a/pythia-demo-sft"],
            "PRE_SFT_MODEL_NAMES and MODEL_NAMES = a/pythia-demo-sft, data/demo/pythia-demo-sft: allowed are models",
        ),
        (["--SEEDS", "42", "0", "42"], "SEEDS = [42, 0, 42]: 42 is given twice; allowed is a list of whole numbers"),
        (["--MODEL_NAMES", "a/x", "b/x"], "MODEL_NAMES = ['a/x', 'b/x']: allowed is a list of texts that differ"),
        (["--MODEL_NAMES", "a/x", "a/x/"], "MODEL_NAMES = ['a/x', 'a/x/']: allowed is a list of texts that differ"),
        (["--TASKS", "all"], "TASKS = all: allowed is a list of 'bias', 'ethics', 'truth', 'combined'"),
        (["--SCORES_TYPES", "best"], "SCORES_TYPES = best: allowed is a list of 'pure_ekfac', 'dpp'"),
    ],
)
def test_wrong_constants_are_refused_before_any_work(tmp_path, capsys, arguments, told):
    with pytest.raises(SystemExit) as stop:
        run_script(TABLES, "--OUTPUT_DIR", str(tmp_path), *arguments)
    assert stop.value.code == 1
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "planted.json is not valid JSON"),
        ("[1, 2]", "planted.json must map kinds of harm to lists of rows"),
        ('{"bias": 3}', "planted.json must map kinds of harm to lists of rows"),
        *(
            (f'{{"bias": [0], "truth": [59, {row}]}}', "'truth' has ROW; allowed are rows from 0 to 59, each once")
            for row in ("60", "-1", "1.0", "59", "true", "null", '"3"', "[1]", "1e400", "100000000000000000000")
        ),
    ],
)
def test_broken_known_harm_is_refused_before_any_work(workspace, capsys, text, told):
    (workspace.data / "hh" / "planted.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        workspace.run(TABLES)
    assert stop.value.code == 1
    assert told in re.sub("'truth' has [^;]*;", "'truth' has ROW;", capsys.readouterr().err)
    assert not workspace.output.exists()


def test_more_dialogues_than_there_are_is_found_before_any_work(workspace, capsys):
    with pytest.raises(SystemExit) as stop:
        workspace.run(TABLES, "--BOTTOM_K", 5, 61)
    assert stop.value.code == 1
    assert "BOTTOM_K = 61: there are 60 training examples; allowed: 1 to 60" in capsys.readouterr().err
    assert not workspace.output.exists()


def test_the_constants_pass_their_own_check_and_the_demo_runs_a_part_of_them():
    demo, tables = load_script("data/demo/run_demo.py"), load_script(TABLES)
    assert [demo.MODEL_NAME] == tables.MODEL_NAMES
    assert set(demo.SCORES_TYPES) - set(tables.SCORES_TYPES) == {"contrast"}  # what README recommends
    assert tables.BOTTOM_K[0] == demo.BOTTOM_K


def test_token_pieces_follow_the_completions_characters(tiny_models, tmp_path):
    """Each token's level stands on its own characters, whatever the tokenizer makes of emoji and newlines."""
    prompt, completion = "\n\nHuman: hi\n\nAssistant:", " So 😀 bad\n\nthings, really"
    write_rows(tmp_path / "hh" / "train.jsonl", [{"prompt": prompt, "chosen": completion}])
    model = str(tiny_models["pythia"])
    tokenizer, dialogues = load_tokenizer(model), load_dialogues(str(tmp_path / "hh"), "train")
    (example,) = tokenize_dialogues(dialogues, tokenizer)
    length, name = len(example.input_ids), paths.model_short_name(model)
    first, last = example.label_start, example.label_end - 1
    scores = torch.zeros(length)
    scores[first], scores[last] = -2.0, 1.0
    emoji = [t for t in range(first, last) if "\ufffd" in tokenizer.decode([int(example.input_ids[t])])]
    assert len(emoji) > 1  # several tokens of one character, whose scores add up
    scores[emoji[0]], scores[emoji[-1]] = 0.5, -2.5
    file = paths.token_scores_file(tmp_path, "bias", name, "ekfac", False, 42)
    FileArtifact(file, STEP_1).save_tensors({"scores": scores, "offsets": torch.tensor([0, length])}, 0.0)
    settings = Settings(MODEL_NAMES=[model], OUTPUT_DIR=str(tmp_path), USE_HALF_PRECISION=False, SEEDS=[42])
    settings.COMPUTE_PER_TOKEN_SCORES = True
    colours = grid_report._TokenColours(settings, name, {"bias": torch.tensor([-1.0, 1.0])}, dialogues)
    pieces, words, start = colours.pieces("bias", 0), [], 0
    assert sum(size for size, _ in pieces) == len(completion)
    for size, level in pieces:
        words.append((completion[start : start + size], level))
        start += size
    decoded = [tokenizer.decode([int(example.input_ids[position])]) for position in (first, last)]
    of_emoji, *others = (word for word in words if "😀" in word[0])
    assert (of_emoji[0].strip(), of_emoji[1], others) == ("😀", -9, [])
    assert [word for word in words if word[1] and word != of_emoji] == [(decoded[0], -9), (decoded[1], 4)]
    assert colours.pieces("combined", 0)[0][1] == -9
    assert colours.pieces("truth", 0) == []


def test_harmful_tokens_are_an_axis_of_the_grid():
    defaults = {name: getattr(paper_tables, name) for name in paper_tables.__annotations__}
    chosen = {"HARMFUL_TOKENS_ONLY": [True, False], "SCORES_TYPES": ["pure_ekfac", "direct"]}
    grid = paper_tables.plan_grid(Settings(**{**defaults, **chosen}))
    tokens = {(repair.choice.scores_type, repair.choice.harmful_tokens_only) for repair in grid["main"]}
    assert tokens == {("pure_ekfac", True), ("pure_ekfac", False), ("direct", False)}
    assert all(repair.choice.harmful_tokens_only for repair in grid["bottom_k"])
    assert {repair.choice.label for repair in grid["main"]} >= {"pure_ekfac + tokens", "pure_ekfac", "direct"}


def test_token_scores_that_are_not_of_these_dialogues_are_refused(tmp_path):
    for offsets in ([0, 2, 4], [1, 2, 3], [0, 4, 3]):
        artifact = FileArtifact(
            tmp_path / "scores.safetensors", f"{STEP_1} --COMPUTE_PER_TOKEN_SCORES True", quiet=True
        )
        artifact.save_tensors({"scores": torch.zeros(3), "offsets": torch.tensor(offsets)}, 0.0)
        with pytest.raises(UserError, match=r"3 scores, which its offsets .* --COMPUTE_PER_TOKEN_SCORES True again"):
            load_token_scores(artifact, 2)


def test_only_the_scores_that_are_shown_or_ascended_are_split_over_tokens(monkeypatch):
    ran = []
    monkeypatch.setattr(paper_tables, "run_script", lambda name, common, **own: ran.append((name, {**common, **own})))
    repairs = [
        paper_tables.RepairConfig("bias", RepairChoice(name, 3, harmful_tokens_only=tokens))
        for name, tokens in (("pure_ekfac", True), ("identity", False), ("ekfac_cg", True))
    ]
    common = {"COMPUTE_PER_TOKEN_SCORES": True, "MODEL_NAME": "m", "SEED": 42}
    paper_tables.run_grid(common, repairs, "auto")
    split = [constants["COMPUTE_PER_TOKEN_SCORES"] for name, constants in ran if name == STEP_1]
    assert split == [True, True, False]  # EKFAC's, ekfac_cg's, identity's
    defaults = {name: getattr(paper_tables, name) for name in paper_tables.__annotations__}
    for ascended, needed in (([False], [True, False]), ([False, True], [True, True])):
        settings = Settings(**{**defaults, "SEEDS": [42, 7], "HARMFUL_TOKENS_ONLY": ascended})
        common = [paper_tables.common_constants(settings, "m", seed) for seed in settings.SEEDS]
        assert [constants["COMPUTE_PER_TOKEN_SCORES"] for constants in common] == needed
