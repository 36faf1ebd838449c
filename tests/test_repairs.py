"""Directions beyond the paper, their controls, and repairs in several steps, against plain loops on the whole model."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from conftest import Workspace
from safetensors.torch import load_file
from test_repair_gradient import CPU, STEP_1, STEP_2, STEP_4, autograd, gradient_of, inner_product, token_losses

from utils.console import UserError
from utils.files import read_json
from utils.influence.preconditioning import Preconditioner
from utils.influence.repair_gradient import preserving_direction
from utils.influence.traced_model import Curvature
from utils.methods import METHODS
from utils.models import load_model, load_tokenizer
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.pairs import AnswerPair, AnswerPairs
from utils.repair_sources import with_other_prompts
from utils.repairs import CONSTANTS, RepairChoice
from utils.selection import random_subset
from utils.settings import ScoresType

STEP_3, STEP_5 = "dpp/greedy_dpp.py", "gradient_ascent_and_save.py"
TASKS = ("bias", "ethics", "truth")
BY_ADAMW = ("ga_kl", "npo", "task_vector", "dpo", "sft_pairs", "npo_random", "sft_retained")


class PlainModel:
    """The model of a workspace, and gradients by plain autograd, one text at a time."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.model, self.tokenizer = load_model(str(workspace.model), CPU), load_tokenizer(str(workspace.model))
        self.examples = tokenize_dialogues(load_dialogues(str(workspace.data / "hh"), "train"), self.tokenizer)
        self.folder = workspace.output / "ekfac_experiments" / "influence_results"

    def scores(self, task: str) -> torch.Tensor:
        file = self.folder / f"{task}_{self.workspace.model.name}" / "scores_ekfac" / "pairwise_scores.safetensors"
        return load_file(file)["all_modules"][0].double()

    def of_dialogues(self, weights: dict[int, float], like) -> dict[str, torch.Tensor]:
        loss = sum(weight * token_losses(self.model, self.examples[row]).mean() for row, weight in weights.items())
        return autograd(self.model, loss, like)

    def of_measurement(self, task: str, like, shuffled: bool = False) -> dict[str, torch.Tensor]:
        pairs, total = MEASUREMENTS[task].load_pairs(self.workspace.data, "train"), 0.0
        pairs = with_other_prompts(pairs, 42) if shuffled else pairs
        for pair in pairs:
            start = len(self.tokenizer(pair.prompt)["input_ids"])
            for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
                ids = self.tokenizer(pair.prompt + answer, return_tensors="pt")["input_ids"]
                losses = torch.nn.functional.cross_entropy(self.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
                total = total + sign * losses[start - 1 :].mean() / len(pairs)
        return autograd(self.model, total, like)

    def precondition(self, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shapes = {name: tuple(value.shape[1:]) for name, value in gradient.items()}
        folder = self.folder / self.workspace.model.name / "factors_ekfac"
        return Preconditioner(Curvature(), folder, shapes)(gradient)


@pytest.fixture(scope="module", params=["pythia", "qwen"])
def plain(request, make_workspace) -> PlainModel:
    workspace = make_workspace(request.param)
    workspace.run(STEP_1)
    workspace.run(STEP_2)
    return PlainModel(workspace)


def assert_close(ours, expected, tolerance: float = 1e-4) -> None:
    apart = {name: ours[name] - expected[name] for name in expected}
    assert inner_product(apart, apart) <= tolerance**2 * inner_product(expected, expected)


def minmax(values: torch.Tensor) -> torch.Tensor:
    return (values - values.min()) / (values.max() - values.min())


def weights_of(plain: PlainModel, scores_type: str, task: str) -> dict[int, float]:
    """The weights by their definition, K = 4 and T = 7."""
    scores = {name: plain.scores(name) for name in (TASKS if task == "combined" else (task,))}
    ranking = sum(minmax(values) for values in scores.values()).argsort(stable=True).tolist()
    match scores_type:
        case "contrast":
            return dict.fromkeys(ranking[:4], 1 / 4) | dict.fromkeys(ranking[:-8:-1], -1 / 7)
        case "weighted":
            shares = torch.stack([-values / values.abs().sum() for values in scores.values()]).mean(dim=0)
            return dict(enumerate(shares.tolist()))
        case "descent":
            return dict.fromkeys(random_subset(len(plain.examples), 7, 42), -1 / 7)
        case "dpp_weighted":
            file = plain.workspace.output / "dpp" / f"{task}_{plain.workspace.model.name}_indices_4_ifweight1.json"
            picks = read_json(file)["indices"]
            harm = minmax(-sum(minmax(values) for values in scores.values()))[picks]
            return dict(zip(picks, (harm / harm.sum()).tolist(), strict=True))
        case "ga":
            return dict.fromkeys(ranking[:4], 1 / 4)
    raise ValueError(scores_type)


@pytest.mark.parametrize("task", ["truth", "combined"])
@pytest.mark.parametrize("scores_type", ["contrast", "weighted", "dpp_weighted", "descent", "ga"])
def test_directions_are_weighted_sums_over_dialogues(plain, scores_type, task):
    common = ["--TASK_NAME", task, "--BOTTOM_K", 4, "--IF_WEIGHT", 1]
    if scores_type == "dpp_weighted":
        plain.workspace.run(STEP_3, *common)
    choice = RepairChoice(scores_type, 4, 1.0, 7)
    plain.workspace.run(STEP_4, *common, "--TOP_K", 7, "--SCORES_TYPE", scores_type)
    ours, manifest = gradient_of(plain.workspace, task, choice.name)
    weights = weights_of(plain, scores_type, task)
    expected = plain.of_dialogues(weights, ours)
    assert_close(ours, expected if scores_type == "ga" else plain.precondition(expected))
    harmful = {row for row, weight in weights.items() if weight > 0}
    assert set(manifest["indices"]) == (set() if scores_type in ("weighted", "descent") else harmful)
    helpful = {row for row, weight in weights.items() if weight < 0}
    assert set(manifest["helpful"]) == (helpful if scores_type in ("contrast", "descent") else set())


def test_sums_are_divided_by_a_hundred(plain):
    common = ["--TASK_NAME", "bias", "--BOTTOM_K", 4, "--GRADIENT_REDUCTION_TYPE", "sum", "--OVERWRITE", True]
    plain.workspace.run(STEP_4, *common, "--SCORES_TYPE", "contrast", "--TOP_K", 3)
    ours, manifest = gradient_of(plain.workspace, "bias", "contrast_bottom4_top3")
    weights = dict.fromkeys(manifest["indices"], 0.01) | dict.fromkeys(manifest["helpful"], -0.01)
    assert_close(ours, plain.precondition(plain.of_dialogues(weights, ours)))


def test_shuffled_prompts_are_other_prompts_with_the_same_answers(plain):
    plain.workspace.run(STEP_4, "--TASK_NAME", "truth", "--SCORES_TYPE", "direct_shuffled")
    ours, _ = gradient_of(plain.workspace, "truth", "direct_shuffled")
    minus = {name: -value for name, value in plain.of_measurement("truth", ours, shuffled=True).items()}
    assert_close(ours, plain.precondition(minus))
    pairs = AnswerPairs([AnswerPair(f"q{i // 2}", f" a{i}", f" b{i}") for i in range(6)], list("aabbcc"), "rule")
    shuffled = with_other_prompts(pairs, 0)
    assert [pair[1:] for pair in shuffled] == [pair[1:] for pair in pairs]
    assert all(a.prompt != b.prompt for a, b in zip(pairs, shuffled, strict=True))
    assert len({pair.prompt for pair in shuffled}) == 3


@pytest.mark.parametrize("with_perplexity", [False, True])
def test_other_measurements_stay_to_first_order(plain, with_perplexity):
    """<grad f_other, D> by plain autograd, relative to what the direction without constraints does to it."""
    common = ["--TASK_NAME", "bias", "--SCORES_TYPE", "contrast", "--BOTTOM_K", 6, "--TOP_K", 9]
    common += ["--PRESERVE_PERPLEXITY", with_perplexity, "--NUM_RETAIN_EXAMPLES", 12, "--DAMPING_FACTOR", "None"]
    plain.workspace.run(STEP_4, *common)
    plain.workspace.run(STEP_4, *common, "--PRESERVE_TASKS", True)
    name = "contrast_bottom6_top9" + "_preserve" * with_perplexity
    free, _ = gradient_of(plain.workspace, "bias", name)
    kept, manifest = gradient_of(plain.workspace, "bias", f"{name}_preservetasks")
    losses = {task: plain.of_measurement(task, kept) for task in ("ethics", "truth")}
    assert list(manifest["alphas"]) == ["ethics", "truth", *["retained"] * with_perplexity]
    if with_perplexity:
        of_tokens = torch.cat([token_losses(plain.model, plain.examples[row]) for row in manifest["retained"]])
        losses["retained"] = autograd(plain.model, of_tokens.mean(), kept)
    for task, gradient in losses.items():
        scale = (inner_product(gradient, gradient) * inner_product(free, free)) ** 0.5
        assert abs(inner_product(gradient, kept)) <= 1e-4 * scale, task
    improved = plain.of_measurement("bias", kept)
    assert inner_product(improved, kept) < 0, "bias itself still improves"


def test_constraints_that_say_the_same_are_told_once():
    torch.manual_seed(0)
    gradients = {"a": torch.randn(3, 4, 3), "b": torch.randn(3, 2, 5)}
    metric = {name: torch.rand(rows.shape[1:]) + 0.1 for name, rows in gradients.items()}

    def direction(*order: int) -> dict[str, torch.Tensor]:
        rows = {name: values[list(order)] for name, values in gradients.items()}
        return preserving_direction(rows, {name: values * metric[name] for name, values in rows.items()})[0]

    for name in gradients:
        torch.testing.assert_close(direction(0, 1, 2, 2, 1)[name], direction(0, 1, 2)[name], rtol=1e-4, atol=1e-5)
        gradients[name][2] = 0
    for name, value in direction(0, 1, 2).items():
        torch.testing.assert_close(value, direction(0, 1)[name])
    assert all(bool(torch.isfinite(value).all()) for value in direction(0, 2).values())


@pytest.mark.parametrize("scores_type", ["pure_ekfac", "direct", "ga"])
def test_several_steps_take_the_gradient_again(plain, scores_type):
    """theta_{k+1} = theta_k + (lr / n) G(theta_k), each G by plain autograd, the curvature that of theta_0."""
    common = ["--TASK_NAME", "ethics", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 5]
    rate = 2.0 if scores_type == "ga" else 0.05
    plain.workspace.run(STEP_4, *common)
    plain.workspace.run(STEP_5, *common, "--NUM_STEPS", 3, "--LEARNING_RATE", rate)
    choice = RepairChoice(scores_type, 5, num_steps=3)
    gradient, manifest = gradient_of(plain.workspace, "ethics", choice.gradient_name)
    folder = plain.workspace.output / "gradient_ascent_models"
    name = f"ethics_{plain.workspace.model.name}_{choice.name}_lr{rate:g}"
    repaired = load_model(str(folder / name), CPU)
    walked = PlainModel(plain.workspace)
    for _ in range(3):
        if scores_type == "direct":
            step = {name: -value for name, value in walked.of_measurement("ethics", gradient).items()}
        else:
            step = walked.of_dialogues(dict.fromkeys(manifest["indices"], 1 / 5), gradient)
        step = step if scores_type == "ga" else walked.precondition(step)
        with torch.no_grad():
            for module, value in step.items():
                linear = walked.model.get_submodule(module)
                linear.weight += rate / 3 * value[0, :, : linear.in_features]
                if linear.bias is not None:
                    linear.bias += rate / 3 * value[0, :, -1]
    moved = {module: walked.model.get_submodule(module).weight[None] for module in gradient}
    ours = {module: repaired.get_submodule(module).weight[None] for module in gradient}
    start = {module: plain.model.get_submodule(module).weight[None] for module in gradient}
    expected = {module: moved[module] - start[module] for module in gradient}
    assert_close({module: ours[module] - start[module] for module in gradient}, expected, 2e-3)
    report = read_json(folder / name / "repair.json")
    assert report["num_steps"] == 3
    assert "3 steps" in (folder / name / "README.md").read_text(encoding="utf-8")


def test_several_steps_refuse_other_scores_than_those_of_step_4(make_workspace, capsys):
    workspace = make_workspace("pythia")
    common = ["--TASK_NAME", "bias", "--BOTTOM_K", 5]
    workspace.run(STEP_1, "--TASK_NAME", "bias")
    workspace.run(STEP_4, *common)
    workspace.run(STEP_1, "--TASK_NAME", "bias", "--DAMPING_FACTOR", 1e-3, "--OVERWRITE", True)
    with pytest.raises(SystemExit):
        workspace.run(STEP_5, *common, "--NUM_STEPS", 2)
    assert "DAMPING_FACTOR" in capsys.readouterr().err


def test_every_way_is_in_the_table():
    assert set(METHODS) == set(get_args(ScoresType))


def test_names_hold_what_a_choice_depends_on():
    every = [
        RepairChoice(*values)
        for values in itertools.product(
            ("pure_ekfac", "dpp", "contrast"), (10, 20), (1.0, 10.0), (None, 7), *[(False, True)] * 3, (1, 4)
        )
    ]
    names = [choice.name for choice in every]
    assert "contrast_bottom20_top100_tokens_preserve_preservetasks_steps4" in names
    # The influence weight matters to dpp alone, TOP_K to contrast alone.
    assert len(set(names)) == 16 * (2 + 2 * 2 + 2 * 2)
    assert len({choice.label for choice in every}) == 16 * 3
    assert RepairChoice("direct", 20).name == "direct"
    assert set(RepairChoice("dpp", 3).constants) == set(CONSTANTS.values())


@pytest.mark.parametrize(
    ("choice", "task", "told"),
    [
        (RepairChoice("weighted", 5, harmful_tokens_only=True), "bias", "HARMFUL_TOKENS_ONLY = True"),
        (RepairChoice("contrast", 5, harmful_tokens_only=True), "bias", "HARMFUL_TOKENS_ONLY = True"),
        *[(RepairChoice(name, 5, preserve_tasks=True), "bias", "PRESERVE_TASKS = True") for name in ("ga", *BY_ADAMW)],
        *[(RepairChoice(name, 5, num_steps=2), "bias", "NUM_STEPS = 2") for name in (*BY_ADAMW, "fitted")],
        (RepairChoice("ga", 5, preserve_perplexity=True), "bias", "PRESERVE_PERPLEXITY = True"),
        (RepairChoice("direct", 5, preserve_tasks=True), "combined", "TASK_NAME = 'combined'"),
    ],
)
def test_choices_that_do_not_go_together_are_refused(choice, task, told):
    with pytest.raises(UserError, match=told):
        choice.require_consistent(task)
    assert not choice.fits(task)


def test_options_that_do_not_fit_are_left_out():
    every = RepairChoice("ga", 5, 1.0, 7, True, True, True, 4)
    assert every.nearest("bias") == RepairChoice("ga", 5, 1.0, 7, harmful_tokens_only=True, num_steps=4)
    assert RepairChoice("direct", 5, 1.0, 7, True, True, True, 4).nearest("combined") == RepairChoice(
        "direct", 5, 1.0, 7, preserve_perplexity=True, num_steps=4
    )
    fitting = RepairChoice("pure_ekfac", 5, 1.0, 7, True, True, True, 4)
    assert fitting.nearest("truth") == fitting


def test_more_helpful_dialogues_than_there_are(plain, capsys):
    for scores_type, told in (
        ("contrast", "BOTTOM_K and TOP_K (None: 5 x BOTTOM_K) together = 61"),
        ("descent", "TOP_K = 57"),
    ):
        arguments = ["--TASK_NAME", "bias", "--BOTTOM_K", 4, "--TOP_K", 57]
        if scores_type == "descent":
            arguments[-1] = 61
            told = "TOP_K = 61"
        with pytest.raises(SystemExit):
            plain.workspace.run(STEP_4, *arguments, "--SCORES_TYPE", scores_type)
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("scores_type", BY_ADAMW)
def test_what_baselines_train_is_scaled_like_any_gradient(plain, scores_type):
    workspace, choice = plain.workspace, RepairChoice(scores_type, 5)
    common = ["--TASK_NAME", "combined", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 5, "--TASK_WEIGHTS", 1, 0.5, 0]
    workspace.run(STEP_4, *common, "--BASELINE_STEPS", 3, "--BASELINE_RATE", 1e-3, "--NUM_RETAIN_EXAMPLES", 9)
    change, manifest = gradient_of(workspace, "combined", choice.name)
    assert manifest["settings"]["BASELINE_STEPS"] == 3
    assert len(manifest["indices"]) == (0 if scores_type in ("dpo", "sft_pairs", "sft_retained") else 5)
    assert len(manifest["retained"]) == (9 if scores_type in ("ga_kl", "npo", "npo_random", "sft_retained") else 0)
    workspace.run(STEP_5, *common, "--LEARNING_RATE", 0.5)
    folder = workspace.output / "gradient_ascent_models"
    repaired = load_model(str(folder / f"combined_{workspace.model.name}_{choice.name}_lr0.5"), CPU)
    for module, value in change.items():
        before, after = (model.get_submodule(module) for model in (plain.model, repaired))
        torch.testing.assert_close(after.weight, before.weight + 0.5 * value[0, :, : before.in_features])


def test_the_controls_of_npo_retain_what_it_retains(plain):
    unlearned, retained = {}, {}
    for scores_type in ("npo", "npo_random", "sft_retained", "random"):
        arguments = ["--TASK_NAME", "ethics", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 7]
        plain.workspace.run(STEP_4, *arguments, "--NUM_RETAIN_EXAMPLES", 9)
        _, manifest = gradient_of(plain.workspace, "ethics", RepairChoice(scores_type, 7).name)
        unlearned[scores_type], retained[scores_type] = (set(manifest[name]) for name in ("indices", "retained"))
    assert retained["sft_retained"] == retained["npo"]
    assert not unlearned["sft_retained"]
    assert unlearned["npo_random"] == unlearned["random"] != unlearned["npo"]
    assert not retained["npo_random"] & (unlearned["npo"] | unlearned["random"]), "neither holds the traced ones"
    assert retained["npo"] - unlearned["random"] <= retained["npo_random"], "else the same, as many as are free"


def test_fitted_weights_solve_the_normal_equations(plain):
    """Many iterations give min |grad f + sum w grad Lbar| in the metric P, as a dense solver does; one, "weighted"."""
    common = ["--TASK_NAME", "truth", "--SCORES_TYPE", "fitted", "--OVERWRITE", True]
    plain.workspace.run(STEP_4, "--TASK_NAME", "truth", "--SCORES_TYPE", "weighted")
    by_score, _ = gradient_of(plain.workspace, "truth", "weighted")
    plain.workspace.run(STEP_4, *common, "--FIT_ITERATIONS", 1)
    once, _ = gradient_of(plain.workspace, "truth", "fitted")
    assert float(torch.cosine_similarity(flat(once), flat(by_score), dim=0)) > 1 - 1e-6
    plain.workspace.run(STEP_4, *common, "--FIT_ITERATIONS", 400)
    fitted, manifest = gradient_of(plain.workspace, "truth", "fitted")
    minus = {name: -value for name, value in plain.of_measurement("truth", fitted).items()}
    rows = [plain.of_dialogues({row: 1.0}, fitted) for row in range(len(plain.examples))]
    matrix = torch.stack([flat(row) for row in rows])  # (N, parameters)
    gram = torch.stack([flat(plain.precondition(row)) for row in rows]) @ matrix.T
    right = matrix @ flat(plain.precondition(minus))
    weights = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0]
    expected = plain.precondition(plain.of_dialogues(dict(enumerate(weights.tolist())), fitted))
    assert float(torch.cosine_similarity(flat(fitted), flat(expected), dim=0)) > 0.99
    assert manifest["residuals"][-1] < manifest["residuals"][0]


def flat(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in gradient.values()]).double()
