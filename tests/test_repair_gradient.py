"""Step 4's directions against plain autograd on the whole model, and the subsets against their definitions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import Workspace, contents
from safetensors.torch import load_file

from utils.batching import LabelledSequence
from utils.console import UserError
from utils.files import read_json
from utils.influence.conjugate_gradient import inner_products
from utils.influence.preconditioning import Preconditioner
from utils.influence.repair_gradient import preserving_direction, with_harmful_tokens
from utils.influence.traced_model import Curvature
from utils.models import load_model, load_tokenizer
from utils.performance_functions import MEASUREMENTS
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues

STEP_1, STEP_2, STEP_4 = "compute_factors_and_scores.py", "representations/train_reps.py", "make_gradients.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["pythia", "qwen"])
def traced(request, make_workspace) -> Workspace:
    """Factors and scores with and without curvature, and representations of dialogues and answers."""
    workspace = make_workspace(request.param)
    workspace.run(STEP_1)
    workspace.run(STEP_1, "--FACTOR_STRATEGY", "identity")
    workspace.run(STEP_2, "--ANSWERS_OF", "all")
    return workspace


def gradient_of(workspace: Workspace, task: str, repair: str) -> tuple[dict[str, torch.Tensor], dict]:
    folder = f"ekfac_experiments/influence_results/{task}_{workspace.model.name}/query_grads_{repair}"
    file = workspace.output / folder / "aggregated_query_grads.safetensors"
    return load_file(file), read_json(file.with_name("aggregated_query_grads.manifest.json"))


def inner_product(a, b) -> float:
    return float(inner_products(a, b).sum())


def token_losses(model, sequence) -> torch.Tensor:
    """Plain cross-entropies of one sequence's label tokens, unpadded, from full logits."""
    input_ids = torch.tensor(sequence.input_ids[None].astype("int64"))
    losses = torch.nn.functional.cross_entropy(model(input_ids).logits[0, :-1], input_ids[0, 1:], reduction="none")
    return losses[max(sequence.label_start, 1) - 1 : sequence.label_end - 1]


def autograd(model, loss: torch.Tensor, names) -> dict[str, torch.Tensor]:
    """(1, out, in [+ 1]) gradients of a loss, the bias as a last column."""
    model.zero_grad()
    loss.backward()
    gradients = {}
    for name in names:
        module = model.get_submodule(name)
        parts = [module.weight.grad] + ([] if module.bias is None else [module.bias.grad[:, None]])
        gradients[name] = torch.cat(parts, dim=1)[None]
    return gradients


def relative_difference(ours, plain) -> float:
    apart = {name: ours[name] - plain[name] for name in plain}
    return (inner_product(apart, apart) / inner_product(plain, plain)) ** 0.5


def test_preserving_direction_is_its_formula():
    torch.manual_seed(0)
    gradients = {"a": torch.randn(2, 4, 3), "b": torch.randn(2, 2, 5)}
    metric = {name: torch.rand(tensor.shape[1:]) + 0.1 for name, tensor in gradients.items()}
    preconditioned = {name: tensor * metric[name] for name, tensor in gradients.items()}
    direction, (alpha,) = preserving_direction(gradients, preconditioned)
    flat = {i: torch.cat([g[i].flatten() for g in gradients.values()]).double() for i in (0, 1)}
    step = {i: torch.cat([g[i].flatten() for g in preconditioned.values()]).double() for i in (0, 1)}
    assert alpha == pytest.approx(float(flat[1] @ step[0] / (flat[1] @ step[1])), rel=1e-6)
    plain = step[0] - alpha * step[1]
    torch.testing.assert_close(torch.cat([d.flatten() for d in direction.values()]).double(), plain)


@pytest.mark.parametrize("scores_type", ["pure_ekfac", "direct"])
def test_the_retained_loss_stays_to_first_order(traced, scores_type):
    """<R, D> = 0 with R by plain autograd on the whole model: relative to |R| |D|."""
    common = ("--TASK_NAME", "bias", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 6)
    traced.run(STEP_4, *common, "--PRESERVE_PERPLEXITY", "True", "--NUM_RETAIN_EXAMPLES", 15)
    subset = "" if scores_type == "direct" else "_bottom6"
    direction, manifest = gradient_of(traced, "bias", f"{scores_type}{subset}_preserve")
    assert not set(manifest["indices"]) & set(manifest["retained"])
    assert len(manifest["retained"]) == 15
    model = load_model(str(traced.model), CPU)
    examples = tokenize_dialogues(load_dialogues(str(traced.data / "hh"), "train"), load_tokenizer(str(traced.model)))
    losses = torch.cat([token_losses(model, examples[row]) for row in manifest["retained"]])
    retained = autograd(model, losses.mean(), direction)
    scale = (inner_product(retained, retained) * inner_product(direction, direction)) ** 0.5
    assert abs(inner_product(retained, direction)) <= 1e-4 * scale
    traced.run(STEP_4, *common)
    faithful, _ = gradient_of(traced, "bias", f"{scores_type}{subset}")
    moved, kept = (abs(inner_product(retained, step)) for step in (faithful, direction))
    assert moved > 20 * kept, "the paper's direction does move it"


def test_the_direct_gradient_is_minus_that_of_the_measurement(traced):
    """Without curvature, so that nothing but the gradient is in the file."""
    traced.run(STEP_4, "--TASK_NAME", "truth", "--SCORES_TYPE", "direct", "--FACTOR_STRATEGY", "identity")
    ours, manifest = gradient_of(traced, "truth", "direct")
    assert manifest["indices"] == []
    assert "BOTTOM_K" not in manifest["settings"]
    model, tokenizer = load_model(str(traced.model), CPU), load_tokenizer(str(traced.model))
    pairs = MEASUREMENTS["truth"].load_pairs(traced.data, "train")
    total = 0.0
    for pair in pairs:
        start = len(tokenizer(pair.prompt)["input_ids"])
        for answer, sign in ((pair.chosen, 1), (pair.rejected, -1)):
            input_ids = tokenizer(pair.prompt + answer, return_tensors="pt")["input_ids"]
            losses = torch.nn.functional.cross_entropy(
                model(input_ids).logits[0, :-1], input_ids[0, 1:], reduction="none"
            )
            total = total + sign * losses[start - 1 :].mean() / len(pairs)
    plain = autograd(model, -total, ours)
    assert relative_difference(ours, plain) < 1e-4


def test_direct_combined_is_the_weighted_sum_of_the_tasks(traced):
    common = ("--SCORES_TYPE", "direct", "--OVERWRITE", "True")
    traced.run(STEP_4, *common)
    alone = {task: gradient_of(traced, task, "direct")[0] for task in MEASUREMENTS}
    traced.run(STEP_4, *common, "--TASK_NAME", "combined", "--TASK_WEIGHTS", 1, 0.5, 0)
    both, _ = gradient_of(traced, "combined", "direct")
    plain = {name: alone["bias"][name] + 0.5 * alone["ethics"][name] for name in both}
    assert relative_difference(both, plain) < 1e-5


def test_identity_takes_the_smallest_gradient_dot_products(traced):
    traced.run(STEP_4, "--TASK_NAME", "ethics", "--SCORES_TYPE", "identity", "--BOTTOM_K", 7)
    _, manifest = gradient_of(traced, "ethics", "identity_bottom7")
    folder = f"ekfac_experiments/influence_results/ethics_{traced.model.name}"
    scores = load_file(traced.output / folder / "scores_identity" / "pairwise_scores.safetensors")["all_modules"][0]
    assert manifest["indices"] == scores.argsort(stable=True)[:7].tolist()
    assert manifest["settings"]["FACTOR_STRATEGY"] == "ekfac", "the direction has the curvature of the other methods"


def test_representation_takes_those_most_like_the_untrustworthy_answers(traced):
    traced.run(STEP_4, "--TASK_NAME", "truth", "--SCORES_TYPE", "representation", "--BOTTOM_K", 4)
    _, manifest = gradient_of(traced, "truth", "representation_bottom4")
    model, tokenizer = load_model(str(traced.model), CPU), load_tokenizer(str(traced.model))

    def representation(text):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            return model(**inputs, output_hidden_states=True).hidden_states[-1][0].mean(dim=0)

    dialogues = load_dialogues(str(traced.data / "hh"), "train")
    examples = torch.stack(
        [representation(f"{p} {c}") for p, c in zip(dialogues.prompts, dialogues.completions, strict=True)]
    )
    pairs = MEASUREMENTS["truth"].load_pairs(traced.data, "train")
    answers = torch.stack([representation(text) for text in dict.fromkeys(p.prompt + p.rejected for p in pairs)])
    mean = examples.mean(dim=0)
    likeness = torch.stack(
        [torch.cosine_similarity(example - mean, answers - mean, dim=1).mean() for example in examples]
    )
    assert manifest["indices"] == likeness.argsort(descending=True)[:4].tolist()


@pytest.mark.parametrize(
    ("scores_type", "told"),
    [("identity", "--FACTOR_STRATEGY identity"), ("representation", "--ANSWERS_OF bias")],
)
def test_what_a_method_needs_is_named_where_it_is_missing(make_workspace, capsys, scores_type, told):
    workspace = make_workspace("pythia")
    workspace.run(STEP_1)
    workspace.run(STEP_2)
    with pytest.raises(SystemExit):
        workspace.run(STEP_4, "--TASK_NAME", "bias", "--SCORES_TYPE", scores_type, "--BOTTOM_K", 3)
    assert f"{told} first" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["ethics", "combined"])
def test_harmful_tokens_alone_are_ascended(traced, task):
    """G is the preconditioned mean, over dialogues that have any, of the mean loss of tokens with negative scores."""
    traced.run(STEP_1, "--COMPUTE_PER_TOKEN_SCORES", True)
    traced.run(STEP_4, "--TASK_NAME", task, "--BOTTOM_K", 6, "--HARMFUL_TOKENS_ONLY", True)
    gradient, manifest = gradient_of(traced, task, "pure_ekfac_bottom6_tokens")
    folder, total = traced.output / "ekfac_experiments" / "influence_results", 0
    for name in ("bias", "ethics", "truth") if task == "combined" else (task,):
        scores = folder / f"{name}_{traced.model.name}" / "scores_ekfac"
        tokens = load_file(scores / "per_token_scores.safetensors")
        of_dialogues = load_file(scores / "pairwise_scores.safetensors")["all_modules"].double()
        total = total + tokens["scores"].double() / float(of_dialogues.max() - of_dialogues.min())
    model, tokenizer = load_model(str(traced.model), CPU), load_tokenizer(str(traced.model))
    examples = tokenize_dialogues(load_dialogues(str(traced.data / "hh"), "train"), tokenizer)
    means, harmful, of = [], 0, 0
    for row in manifest["indices"]:
        losses, example = token_losses(model, examples[row]), examples[row]
        begin = tokens["offsets"][row]
        is_harmful = total[begin + max(example.label_start, 1) : begin + example.label_end] < 0
        harmful, of = harmful + int(is_harmful.sum()), of + len(is_harmful)
        means += [losses[is_harmful].mean()] * bool(is_harmful.any())
    assert manifest["tokens"] == {"harmful": harmful, "of": of}
    weighed = {name for name in manifest["inputs"] if name.startswith("scores_")}
    assert weighed == ({"scores_bias", "scores_ethics", "scores_truth"} if task == "combined" else set())
    assert 0 < harmful < of
    plain = autograd(model, torch.stack(means).mean(), gradient)
    shapes = {name: tuple(value.shape[1:]) for name, value in plain.items()}
    expected = Preconditioner(Curvature(), folder / traced.model.name / "factors_ekfac", shapes)(plain)
    assert relative_difference(gradient, expected) <= 1e-4


def test_harmful_tokens_need_token_scores_and_dialogues(traced, capsys, tmp_path):
    output = tmp_path / "fresh"
    fresh = type(traced)(traced.model, traced.data, output)
    fresh.run(STEP_1, "--TASK_NAME", "bias")
    common = ["--TASK_NAME", "bias", "--BOTTOM_K", 5, "--HARMFUL_TOKENS_ONLY", True]
    for more, line in (
        ([], "per_token_scores.safetensors is missing or incomplete; run compute_factors_and_scores.py"),
        (["--SCORES_TYPE", "direct"], "HARMFUL_TOKENS_ONLY = True: SCORES_TYPE = 'direct' does not take single tokens"),
    ):
        with pytest.raises(SystemExit) as stop:
            fresh.run(STEP_4, *common, *more)
        assert stop.value.code == 1
        assert line in capsys.readouterr().err
    assert not list(output.rglob("query_grads*"))


def test_a_gradient_of_harmful_tokens_notices_other_token_scores(make_workspace, capsys):
    workspace = make_workspace("pythia")
    arguments = ["--TASK_NAME", "bias", "--BOTTOM_K", 4, "--SCORES_TYPE", "random", "--HARMFUL_TOKENS_ONLY", True]
    workspace.run(STEP_1, "--TASK_NAME", "bias", "--COMPUTE_PER_TOKEN_SCORES", True)
    workspace.run(STEP_4, *arguments)
    before = contents(workspace.output)
    workspace.run(STEP_4, *arguments)
    assert contents(workspace.output) == before
    bias = workspace.data / "bias" / "templates.json"
    templates = read_json(bias)
    bias.write_text(json.dumps({**templates, "prompt": templates["prompt"] + " "}), encoding="utf-8")
    workspace.run(STEP_1, "--TASK_NAME", "bias", "--COMPUTE_PER_TOKEN_SCORES", True, "--OVERWRITE", True)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        workspace.run(STEP_4, *arguments)  # the dialogues are the same: a seeded sample
    assert "tokens_bias" in capsys.readouterr().err
    workspace.run(STEP_4, *arguments, "--OVERWRITE", True)


def test_a_dialogue_without_harmful_tokens_does_not_dilute_the_mean():
    examples = [LabelledSequence(np.arange(4, dtype=np.int32), 1, 4)] * 3
    scores, offsets = torch.full((12,), -1.0), torch.tensor([0, 4, 8, 12])
    scores[4:8] = 1.0
    harmful, counts = with_harmful_tokens(examples, [2, 1, 0], scores, offsets)
    assert list(harmful) == [2, 0]
    assert counts == {"harmful": 6, "of": 9}


def test_without_a_harmful_token_there_is_nothing_to_ascend():
    example = LabelledSequence(np.arange(6, dtype=np.int32), 2, 5)
    offsets = torch.tensor([0, 6])
    scores = torch.tensor([-1.0, -1.0, 0.5, 0.0, -2.0, -1.0])
    harmful, counts = with_harmful_tokens([example], [0], scores, offsets)
    assert harmful[0].is_counted.tolist() == [False, False, True]
    assert counts == {"harmful": 1, "of": 3}
    with pytest.raises(UserError, match="no token of the 1 chosen dialogues has a negative score"):
        with_harmful_tokens([example], [0], scores.abs(), offsets)
    with pytest.raises(UserError, match="7 tokens, and it has 6"):
        with_harmful_tokens([example], [0], scores, torch.tensor([0, 7]))
