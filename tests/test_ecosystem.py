"""A repaired checkpoint in other people's tools: model cards, lm-evaluation-harness, experiment trackers."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from types import SimpleNamespace

import accelerate.tracking
import pandas as pd
import pytest
from accelerate.utils import LoggerType
from conftest import Workspace, contents, load_script, write_rows
from huggingface_hub import ModelCard

from utils import processes
from utils.console import UserError
from utils.files import read_json
from utils.reporting.cards import repair_card
from utils.tracker import tracking

STEP_1, STEP_4, STEP_5 = "compute_factors_and_scores.py", "make_gradients.py", "gradient_ascent_and_save.py"
LOCAL_TASK = """\
task: local_truth
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def repaired(make_workspace) -> Workspace:
    workspace = make_workspace("pythia")
    workspace.run(STEP_1)
    workspace.run(STEP_4, "--BOTTOM_K", 5)
    workspace.run(STEP_5, "--BOTTOM_K", 5, "--TASK_NAME", "truth", "--LEARNING_RATE", 0.05)
    return workspace


def checkpoint(workspace: Workspace):
    return workspace.output / "gradient_ascent_models" / "truth_pythia-tiny_pure_ekfac_bottom5_lr0.05"


# ---------------------------------------------------------------------------------------------- model cards


def test_the_card_says_what_was_done_and_what_it_cost(repaired):
    card = ModelCard.load(checkpoint(repaired) / "README.md")
    report = read_json(checkpoint(repaired) / "repair.json")
    assert card.data.pipeline_tag == "text-generation"
    assert {"model-repair", "influence-functions"} <= set(card.data.tags)
    perplexity = report["measurements"]["perplexity"]
    for told in (
        "repaired for truth",
        "5 training dialogues, chosen by `pure_ekfac`, at learning rate 0.05",
        f"Perplexity on the test dialogues: change {perplexity['change_percent']:+.2f} % [",
        "`FACTOR_STRATEGY`: ekfac",
        "Intended use and limits",
    ):
        assert told in card.text
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]]
        for line in card.text.splitlines()
        if line.startswith("|")
    }
    for task in ("bias", "ethics", "truth"):
        row = report["measurements"][task]
        low, high = (row[f"improvement_{end}"] for end in ("low", "high"))
        change = f"improvement {row['improvement']:+.4f} [{low:+.4f}, {high:+.4f}]"
        assert cells[task][:2] == [f"{row['before']:.4f}", f"{row['after']:.4f}"]
        assert cells[task][2].startswith(change)
    assert "were split: bias disjoint, ethics by files, truth seeded 80/20." in card.text
    alone = repair_card({**report, "measurements": {"perplexity": perplexity}, "split_rules": {}})
    assert "Perplexity on the test dialogues" in alone
    assert "log-odds" not in alone
    assert report["settings"]["NUM_BLOCKS"] == 1


def test_a_card_links_to_the_base_and_the_dialogues_of_the_hub(repaired):
    report = read_json(checkpoint(repaired) / "repair.json")
    assert ModelCard(repair_card(report)).data.base_model is None
    card = ModelCard(repair_card({**report, "model": "owner/model", "dataset": "Dahoas/static-hh"}))
    assert card.data.base_model == "owner/model"
    assert card.data.datasets == ["Dahoas/static-hh"]


# ------------------------------------------------------------------------------------ lm-evaluation-harness


def test_lm_evaluation_harness_measures_a_repaired_checkpoint(repaired, tmp_path):
    """The command of the README, on a local task in place of those that must be downloaded."""
    pytest.importorskip("lm_eval")
    rows = [
        {"question": f"Is {number} a number?", "choices": [" Yes, it is.", " No."], "label": number % 2}
        for number in range(4)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "local_truth.yaml").write_text(LOCAL_TASK.format(rows=tmp_path / "rows.jsonl"), encoding="utf-8")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={checkpoint(repaired)}"]
    local = ["--tasks", "local_truth", "--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "out"]
    finished = subprocess.run([*command, *map(str, local)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["local_truth"]["acc,none"] <= 1


HARNESS = "evaluation_scripts/harness_eval.py"


@pytest.fixture
def local_tasks(tmp_path):
    """A folder with a task of 12 documents, whose second choice is right in every other one."""
    rows = [
        {
            "question": f"Is {number} an even number?",
            "choices": [" Yes, it is.", " No, it is odd."],
            "label": number % 2,
        }
        for number in range(12)
    ]
    write_rows(tmp_path / "tasks" / "rows.jsonl", rows)
    task = LOCAL_TASK.format(rows=tmp_path / "tasks" / "rows.jsonl")
    (tmp_path / "tasks" / "local_truth.yaml").write_text(task, encoding="utf-8")
    return ["--HARNESS_TASKS", "local_truth", "--INCLUDE_PATH", tmp_path / "tasks"]


def test_the_harness_before_and_after_a_repair(repaired, local_tasks, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    repaired.run(HARNESS, *local_tasks, "--DEVICE", "cpu")
    assert re.search(r"\| +local_truth \| +acc \|", capsys.readouterr().out)
    results = repaired.output / "results"
    names = (repaired.model.name, checkpoint(repaired).name)
    before, after = (read_json(results / f"{name}_harness_local_truth.json")["metrics"]["acc"] for name in names)
    assert len(before["documents"]) == 12
    assert before["higher_is_better"]
    assert before["value"] == pytest.approx(sum(before["documents"]) / 12)
    (row,) = pd.read_csv(results / "tables" / "harness.csv").to_dict("records")
    assert (row["model"], row["before"], row["after"]) == (names[1], before["value"], after["value"])
    changes = [new - old for old, new in zip(before["documents"], after["documents"], strict=True)]
    assert row["difference"] == pytest.approx(sum(changes) / 12)
    assert row["difference_standard_error"] == pytest.approx(statistics.stdev(changes) / 12**0.5)

    spread = Workspace(repaired.model, repaired.data, tmp_path / "output")
    little = int(1.1 * (repaired.model / "model.safetensors").stat().st_size)  # room for one block of three
    monkeypatch.setattr("utils.spreading.free_memory", lambda: {"cpu": little})
    spread.run(HARNESS, *local_tasks, "--DEVICE", "spread", "--REPAIRED_MODEL_NAMES", checkpoint(repaired))
    for name in names:
        result = f"{name}_harness_local_truth.json"
        assert read_json(spread.output / "results" / result) == read_json(results / result)

    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: pytest.fail("it is evaluated again"))
    unchanged = contents(repaired.output)
    repaired.run(HARNESS, *local_tasks, "--DEVICE", "cpu")
    assert contents(repaired.output) == unchanged


def test_the_paired_standard_error_is_that_of_the_differences():
    script = load_script(HARNESS)
    old, new = [0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0, 1.0]
    results = [{"value": sum(values) / 5, "documents": values} for values in (old, new)]
    change, error, _ = script.difference(*results)
    assert change == pytest.approx(0.2)
    assert error == pytest.approx(statistics.stdev([1, 0, -1, 1, 0]) / 5**0.5)
    not_a_mean = {"value": 0.9, "documents": new}
    assert script.difference(results[0], not_a_mean).fields("d")["d_low"] is None
    assert script.difference(results[0], not_a_mean).value == pytest.approx(0.3)


def test_metrics_that_are_no_numbers_are_left_out_and_filters_kept_apart(monkeypatch):
    """bbq's categories are NaN where LIMIT leaves no document of theirs."""
    pytest.importorskip("lm_eval")
    results = {"alias": "t", "acc,none": 0.5, "acc_age,none": float("nan"), "em,strict": 0.1, "em,flexible": 0.4}
    documents = [{"doc_id": n, "filter": "none", "acc": n, "acc_age": float("nan")} for n in (0, 1)]
    evaluated = {"results": {"t": results}, "samples": {"t": documents}, "higher_is_better": {}}
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda *_, **__: evaluated)
    written = []
    output = SimpleNamespace(save_json=lambda content, _: written.append(content))
    load_script(HARNESS).evaluate_task(SimpleNamespace(LIMIT=2), None, "t", None, output)
    metrics = written[0]["metrics"]
    assert {name: metric["value"] for name, metric in metrics.items()} == {
        "acc": 0.5,
        "em,strict": 0.1,
        "em,flexible": 0.4,
    }
    assert metrics["acc"]["documents"] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--HARNESS_TASKS", "truthfulqa_mc3"], "has no task 'truthfulqa_mc3'; similar names: truthfulqa_mc"),
        (["--HARNESS_TASKS", "truthfulqa_mc1", "--OUTPUT_DIR", "EMPTY"], "run gradient_ascent_and_save.py first"),
        (["--HARNESS_TASKS", "truthfulqa_mc1"], "truthfulqa_mc1 cannot be evaluated ("),
    ],
)
def test_what_the_harness_cannot_do_is_one_line(repaired, tmp_path, capsys, arguments, told):
    pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit) as stop:
        repaired.run(HARNESS, *(str(tmp_path) if word == "EMPTY" else word for word in arguments))
    assert stop.value.code == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert told in error[0]


@pytest.mark.parametrize("text", ["[]", "null", "{", "{}", '{"inputs": []}'])
def test_the_manifest_of_another_folder_is_refused_in_one_line(tiny_models, tmp_path, text):
    folder = tmp_path / "gradient_ascent_models" / "other"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    settings = SimpleNamespace(
        REPAIRED_MODEL_NAMES=None, OUTPUT_DIR=str(tmp_path), MODEL_NAME=str(tiny_models["pythia"])
    )
    with pytest.raises(
        UserError, match=r"other/manifest.json is not .*; delete the folder and run gradient_ascent_and_save.py"
    ):
        load_script(HARNESS).repaired_models(settings)


def test_the_harness_is_optional(repaired, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    load_script(HARNESS).task_manager.cache_clear()
    with pytest.raises(SystemExit):
        repaired.run(HARNESS)
    assert 'pip install "lm_eval[hf]"' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- trackers


class FakeTracker:
    """Stands for one of accelerate's trackers."""

    def __init__(self, project: str, **keywords: object) -> None:
        self.told = [("project", project, keywords)]
        FakeTracker.last = self

    def start(self) -> None:
        self.told.append(("start",))

    def store_init_configuration(self, config: dict) -> None:
        self.told.append(("config", config))

    def log(self, values: dict, step: int | None) -> None:
        self.told.append(("log", values, step))

    def finish(self) -> None:
        self.told.append(("finish",))


@pytest.fixture
def fake_tracker(monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [LoggerType.WANDB])


def test_a_tracker_gets_every_repair_and_is_closed(repaired, fake_tracker):
    rates = ["--LEARNING_RATE", 0.01, 0.05]
    common = ["--BOTTOM_K", 5, "--TASK_NAME", "truth", "--SAVE_TO_DISK", False, "--TRACKER", "wandb"]
    repaired.run(STEP_5, *common, *rates)
    told = FakeTracker.last.told
    assert told[0] == ("project", "tracing-llm-trust", {"name": str(repaired.model)})
    assert told[2][1]["BOTTOM_K"] == 5
    logged = [values for kind, *rest in told if kind == "log" for values in rest[:1]]
    assert [values["truth/learning_rate"] for values in logged] == [0.01, 0.05]
    assert {"truth/perplexity_change_percent", "truth/bias_improvement"} <= set(logged[0])
    assert told[-1] == ("finish",)


def test_a_tracker_is_closed_when_a_step_fails(fake_tracker):
    with pytest.raises(UserError), tracking("wandb", "run", {}):
        raise UserError("something")
    assert FakeTracker.last.told[-1] == ("finish",)


def test_only_the_first_process_tracks(fake_tracker, monkeypatch):
    FakeTracker.last = None
    monkeypatch.setattr(processes, "_world", processes._World(rank=1, size=2))
    with tracking("wandb", "run", {}) as tracked:
        tracked.log({"loss": 1.0})
    assert FakeTracker.last is None


def test_a_real_tracker_keeps_the_curve(tmp_path, monkeypatch):
    """wandb, where it is installed, without a network."""
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    with tracking("wandb", "run", {"SEED": 42}) as tracked:
        tracked.log({"loss": 1.0}, step=1)
    assert list(tmp_path.rglob("*.wandb"))
