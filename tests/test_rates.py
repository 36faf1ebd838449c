"""LEARNING_RATE = "auto": the search on made-up curves, and on a real repair against a sweep under the same rule."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import load_script

from utils.console import UserError
from utils.evaluation import EvaluationModel
from utils.files import read_json
from utils.intervals import ClusterSums
from utils.learning_rate_search import (
    PRECISION,
    Search,
    Trial,
    largest_gain_within,
    perplexity_change,
    say_noise,
    search_learning_rate,
)
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues
from utils.registry import ModelArtifacts
from utils.repair_record import RepairRecord
from utils.repairs import RepairChoice
from utils.results import quantities
from utils.selection import MOST_SHARED, held_out_rows, shared_portions
from utils.settings import load_settings

STEP_4, STEP_5 = "make_gradients.py", "gradient_ascent_and_save.py"
BUDGET = 0.01


def curves(cost, gain):
    """Probes of a made-up repair's cost and gain, and a list of the rates that were asked for."""
    asked = []

    def cost_at(rate):
        asked.append(rate)
        return Trial(rate, cost(rate), 0.0)

    return (cost_at, gain), asked


@pytest.mark.parametrize("scale", [1e-5, 0.01, 1.0, 3_000.0])
def test_the_largest_step_within_the_budget_is_found(scale):
    probes, asked = curves(lambda rate: (rate / scale) ** 2, lambda rate: rate / scale)
    found = largest_gain_within(BUDGET, *probes)
    assert 1 / (1 + PRECISION) <= found.learning_rate / (0.1 * scale) <= 1
    assert "exceeds the perplexity budget" in found.stopped
    assert len(asked) == len(set(asked)) == len(found.trials)
    with_gain = [trial.learning_rate for trial in found.trials if trial.gain is not None]
    assert len(with_gain) <= 2, "the largest within the budget, and the next, which gains less"
    assert with_gain[-1] == found.learning_rate


@pytest.mark.parametrize("peak", [1e-3, 0.02, 0.07])
def test_a_peak_before_the_budget_is_found(peak):
    probes, _ = curves(lambda rate: rate**2, lambda rate: rate / peak * math.exp(1 - rate / peak))
    found = largest_gain_within(BUDGET, *probes)
    assert found.learning_rate == pytest.approx(peak, rel=0.06)
    assert "peaks before the budget" in found.stopped


def test_a_repair_that_never_helps_is_no_repair():
    probes, asked = curves(lambda rate: rate**2, lambda rate: -rate)
    found = largest_gain_within(BUDGET, *probes)
    assert (found.learning_rate, found.stopped) == (0.0, "no step within the budget improves the training pairs")
    assert len(asked) < 25


@pytest.mark.parametrize("damage", [-math.inf, -3.0])
def test_a_budget_that_allows_for_damage_does_not_hide_a_step_that_helps(damage):
    """Of the rates within the budget the largest gain ever less, and the smallest alone gain anything."""
    probes, _ = curves(lambda rate: rate / 100, lambda rate: rate if rate < 0.02 else damage - rate)
    found = largest_gain_within(BUDGET, *probes)
    assert found.learning_rate == pytest.approx(0.02, rel=0.06)
    assert all(row["gain"] is None or math.isfinite(row["gain"]) for row in (trial.as_row() for trial in found.trials))


def test_a_repair_that_always_costs_too_much_is_no_repair():
    probes, _ = curves(lambda rate: 1.0, lambda rate: rate)
    found = largest_gain_within(BUDGET, *probes)
    assert found.learning_rate == 0
    assert "stays within the budget" in found.stopped


def test_a_repair_that_costs_nothing_ends_somewhere():
    probes, _ = curves(lambda rate: -0.1, lambda rate: math.log(rate))
    found = largest_gain_within(BUDGET, *probes)
    assert math.isfinite(found.learning_rate)
    assert found.stopped == "no step that was tried exceeds the budget"


def test_what_an_optimizer_reached_is_found_behind_a_part_that_costs_more():
    """On the straight way to trained weights the cost may rise and fall again, and the gain begin below 0."""

    def cost(rate: float) -> float:
        return 5 * BUDGET * math.sin(math.pi * rate) if rate < 1 else BUDGET * (rate - 0.9)

    probes, asked = curves(cost, lambda rate: rate - 0.3)
    assert largest_gain_within(BUDGET, *probes).learning_rate == 0
    first = RepairChoice("npo", 20).first_rate
    found = largest_gain_within(BUDGET, *probes, first)
    assert found.learning_rate == pytest.approx(1.9, rel=0.011)
    assert first in asked
    assert RepairChoice("pure_ekfac", 20).first_rate == 0.012, "of the paper"


def test_numbers_that_are_none_count_as_too_dear():
    probes, _ = curves(lambda rate: math.inf if rate > 0.03 else 0.0, lambda rate: rate)
    assert largest_gain_within(BUDGET, *probes).learning_rate == pytest.approx(0.03, rel=0.011)


def change_and_jackknife_error(before, after):
    """The change of perplexity, and its standard error from leaving each dialogue out in turn."""

    def change(kept):
        tokens = before.count[kept].sum()
        return math.exp((after.total[kept].sum() - before.total[kept].sum()) / tokens) - 1

    everything = torch.ones(len(before.total), dtype=torch.bool)
    without = torch.tensor([change(everything & (torch.arange(len(everything)) != i)) for i in range(len(everything))])
    n = len(without)
    return change(everything), float(((n - 1) / n * (without - without.mean()).square().sum()).sqrt())


def test_the_standard_error_of_a_change_is_the_jackknifes():
    generator = torch.Generator().manual_seed(0)
    num_tokens = torch.randint(1, 60, (400,), generator=generator)
    noise = torch.randn(400, generator=generator, dtype=torch.float64)
    before = ClusterSums(3.0 * num_tokens, num_tokens)
    after = ClusterSums(before.total + 0.01 * num_tokens + 0.2 * num_tokens.sqrt() * noise, num_tokens)
    change, error = perplexity_change(before, after)
    plain_change, plain_error = change_and_jackknife_error(before, after)
    assert change == pytest.approx(plain_change)
    assert error == pytest.approx(plain_error, rel=0.02)
    assert perplexity_change(before, before) == (0.0, 0.0)


@pytest.mark.parametrize("broken", [math.inf, math.nan, 1e9])
def test_a_loss_that_is_no_number_costs_infinitely_much(broken):
    before = ClusterSums(torch.tensor([3.0, 4.0]), torch.tensor([1, 2]))
    after = before._replace(total=torch.tensor([3.0, broken]))
    assert perplexity_change(before, after) == (math.inf, 0.0)


def test_a_cost_that_is_not_known_well_leaves_room():
    """Of two repairs with the same measured cost, the one with the larger standard error takes the smaller step."""

    def rate_with(standard_error):
        return largest_gain_within(
            BUDGET, lambda rate: Trial(rate, rate**2, standard_error(rate)), lambda rate: rate
        ).learning_rate

    assert rate_with(lambda rate: 0.0) == pytest.approx(0.1, rel=0.011)
    assert rate_with(lambda rate: rate**2 / 4) == pytest.approx(math.sqrt(0.01 / 1.25), rel=0.011)


@pytest.mark.parametrize("task", ["bias", "combined"])
def test_search_against_a_sweep_of_thirty_rates_under_the_same_rule(make_workspace, task):
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py")
    workspace.run(STEP_4, "--TASK_NAME", task, "--BOTTOM_K", 8)
    arguments = [*workspace.arguments(STEP_5), "--TASK_NAME", task, "--BOTTOM_K", "8", "--LEARNING_RATE", "auto"]
    settings = load_settings(load_script(STEP_5), arguments)
    repair = RepairRecord(ModelArtifacts(settings, settings.MODEL_NAME), task)
    model = load_script(STEP_5).SteppableModel(settings, num_blocks=1)
    found = search_learning_rate(repair.artifacts, task, repair.gradient, lambda rate: model.at(repair, rate))
    chosen = next(trial for trial in found["trials"] if trial["learning_rate"] == found["learning_rate"])
    assert 0 < chosen["perplexity_change"] + chosen["standard_error"] <= BUDGET
    assert chosen["standard_error"] > 0

    # The same rule, straight from its definition, on a whole model at each rate.
    dialogues = load_dialogues(settings.HH_DATASET, "train")
    rows = held_out_rows("validation", set(repair.gradient["indices"]), len(dialogues), 500, 42)
    tasks = ["bias", "ethics", "truth"] if task == "combined" else [task]
    pairs = {name: _train_pairs(name, workspace) for name in tasks}

    def losses(rate):
        stepped = model.at(repair, rate)
        whole = EvaluationModel(stepped.model, stepped.tokenizer)
        of_pairs = {name: float(whole.measure(name, some)["loss"].mean()) for name, some in pairs.items()}
        return quantities(whole.measure("anthropic", dialogues.at(rows)))["loss"], of_pairs

    nll_before, before = losses(0.0)
    nll, _ = losses(found["learning_rate"])
    cost = (chosen["perplexity_change"], chosen["standard_error"])
    assert cost == pytest.approx(perplexity_change(nll_before, nll), rel=1e-3), "of these very dialogues"
    best = 0.0
    for step in range(1, 31):
        nll, after = losses(1.5 * found["learning_rate"] * step / 30)
        gain = sum(before[name] - after[name] for name in tasks) / len(tasks)
        if sum(change_and_jackknife_error(nll_before, nll)) <= BUDGET:
            best = max(best, gain)
    assert best > 0
    assert chosen["gain"] >= 0.95 * best


def test_the_search_for_trained_weights_begins_where_the_optimizer_ended(make_workspace, capsys):
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py")
    common = ("--TASK_NAME", "truth", "--BOTTOM_K", 5, "--SCORES_TYPE", "task_vector")
    workspace.run(STEP_4, *common, "--BASELINE_STEPS", 2)
    capsys.readouterr()
    workspace.run(STEP_5, *common, "--LEARNING_RATE", "auto")
    tried = [line for line in capsys.readouterr().out.splitlines() if "tried" in line]
    assert tried[0].strip().startswith("tried 1:")


def _train_pairs(name, workspace):
    return MEASUREMENTS[name].load_pairs(workspace.data, "train")


def test_the_search_never_looks_at_the_test_split_and_is_not_repeated(make_workspace, monkeypatch, capsys):
    workspace = make_workspace("pythia")
    workspace.run("compute_factors_and_scores.py")
    common = ("--TASK_NAME", "bias", "--BOTTOM_K", 5, "--PRESERVE_PERPLEXITY", "True")
    workspace.run(STEP_4, *common, "--NUM_RETAIN_EXAMPLES", 12)
    test_data = [load_dialogues(str(workspace.data / "hh"), "test")]
    test_data += [
        measurement.load_pairs(workspace.data, "test", questions=True) for measurement in MEASUREMENTS.values()
    ]
    of_test = {data.fingerprint for data in test_data}
    looked = []
    original = EvaluationModel._input

    def spy(self, metric, data):
        looked.append((metric, data.fingerprint in of_test))
        return original(self, metric, data)

    monkeypatch.setattr(EvaluationModel, "_input", spy)
    workspace.run(STEP_5, *common, "--LEARNING_RATE", "auto")
    first_test = [is_test for _, is_test in looked].index(True)
    assert {metric for metric, _ in looked[:first_test]} == {"anthropic", "bias"}, "the search comes first"
    assert all(is_test for _, is_test in looked[first_test:]), "and is over then"
    assert looked.count(("bias", True)) == 2, "once before, once after"
    (folder,) = workspace.output.glob("gradient_ascent_models/bias_*_preserve_lr*")
    report = read_json(folder / "repair.json")
    assert report["search"]["learning_rate"] == report["learning_rate"] > 0
    assert report["search"]["stopped"]
    assert report["search"]["stopped"] in (folder / "README.md").read_text()

    looked.clear()
    workspace.run(STEP_5, *common, "--LEARNING_RATE", "auto")
    assert not looked
    capsys.readouterr()
    workspace.run(STEP_5, *common, "--LEARNING_RATE", "auto", "--PPL_BUDGET", 0.5)
    results = workspace.output / "results"
    of_budget = {
        budget: next(iter(results.glob(f"bias_*_preserve_search{name}.json")))
        for budget, name in ((0.01, ""), (0.5, "_budget0.5"))
    }
    rates = {budget: read_json(file)["learning_rate"] for budget, file in of_budget.items()}
    assert rates[0.01] == report["learning_rate"] < rates[0.5], "budgets stand side by side"


@pytest.mark.parametrize(("cost", "is_told"), [(0.9, False), (1.1, True)])
def test_a_step_that_costs_more_on_the_test_dialogues_says_so(capsys, cost, is_told):
    row = {"before": 10.0, "after": 10.0 * (1 + cost / 100), "change_percent": cost, "improvement": 0.0}
    search = {"budget": 0.01, "validation_dialogues": 50}
    for made_by, advice in (
        (search, "for less give a smaller one"),
        (None, "--LEARNING_RATE auto looks for a step within"),
    ):
        load_script(STEP_5).say_report({"measurements": {"perplexity": row}}, made_by, 0.01, is_sweep=False)
        assert (advice in capsys.readouterr().out) == is_told
    load_script(STEP_5).say_report({"measurements": {"perplexity": row}}, None, 0.01, is_sweep=True)
    assert "PPL_BUDGET" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "next_rate", "is_told"), [(0.008, 0.0101, True), (0.004, 0.0101, False), (0.008, None, False)]
)
def test_a_step_that_noise_keeps_small_says_so(capsys, error, next_rate, is_told):
    chosen = Trial(0.01, 0.009 - error, error, 0.1)
    beyond = [] if next_rate is None else [Trial(next_rate, 0.011 - error, error)]
    say_noise(Search(0.01, "", [Trial(0.005, 0.0, error), chosen, *beyond]), BUDGET, 25)
    told = capsys.readouterr().out
    assert ("known to ± 0.80 % alone, on 25 dialogues" in told) == is_told
    say_noise(Search(0.0, "", [chosen]), BUDGET, 25)  # no step at all
    assert capsys.readouterr().out == ""


def test_rows_apart_are_disjoint_seeded_and_nearly_the_same_for_every_subset():
    first, second = ({1, 2, 3}, {7, 8, 9})
    retained = held_out_rows("retain", first, 100, 20, 42)
    validation = held_out_rows("validation", {*first, *retained}, 100, 20, 42)
    assert len({*first, *retained, *validation}) == 43
    assert retained == held_out_rows("retain", first, 100, 20, 42) != held_out_rows("retain", first, 100, 20, 1)
    assert len(set(retained) & set(held_out_rows("retain", second, 100, 20, 42))) >= 16
    assert len(held_out_rows("retain", first, 100, 500, 42)) == 48, "half of those left: validation has the rest"
    with pytest.raises(UserError, match="leaves none for retain; set BOTTOM_K, or TOP_K, to less"):
        held_out_rows("retain", range(9), 10, 5, 42)


@pytest.mark.parametrize("count", [300, 5_000])
def test_shared_portions_hold_the_held_out_rows_and_are_the_same_for_every_subset(count):
    found = []
    for used in (range(20), range(50, 170), ()):
        rows = held_out_rows("validation", used, 1_000, count, 42)
        portions = shared_portions(rows, "validation", 1_000, count, 42)
        measured = [row for portion in portions for row in portion]
        assert set(rows) <= set(measured)
        assert len(measured) == len(set(measured)) <= MOST_SHARED * len(rows)
        found.append(portions)
    longest = max(found, key=len)
    assert len(longest) > 1 or count > 300, "half of all are few enough for one"
    assert all(portions == longest[: len(portions)] for portions in found)
    assert sorted(found[-1][0]) == rows, "nothing more where nothing is used"


@pytest.mark.parametrize(
    ("num_examples", "count", "used"), [(1_000, 5, ()), (60, 500, range(9)), (1_000, 500, range(900))]
)
def test_where_sharing_would_not_pay_the_rows_are_the_only_portion(num_examples, count, used):
    rows = held_out_rows("validation", used, num_examples, count, 42)
    assert shared_portions(rows, "validation", num_examples, count, 42) == [rows]
