"""Products with the Gauss-Newton matrix and conjugate gradients, against dense matrices made by plain autograd."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import OWN_LOGITS, make_model
from safetensors.torch import load_file
from test_influence import ONE_BATCH, SMALL_BATCHES, Subject, make_subject

from utils.batching import IGNORED_LABEL
from utils.console import UserError
from utils.influence.conjugate_gradient import conjugate_gradients, inner_products
from utils.influence.factors import fit_factors
from utils.influence.gauss_newton import gauss_newton_product, hidden_tangents, require_forward_mode
from utils.influence.preconditioning import Preconditioner
from utils.influence.traced_model import Curvature

STEP_1 = "compute_factors_and_scores.py"
NUM_DIALOGUES = 4


def small_subject(model, data, linear: str, dtype: torch.dtype = torch.float32) -> Subject:
    """A tiny model of which one Linear is traced, and a few dialogues."""
    subject = make_subject(model, data, dtype=dtype)
    name = next(name for name in subject.linears if name.endswith(linear))
    subject.linears = {name: subject.linears[name]}
    subject.train = subject.train[:NUM_DIALOGUES]
    return subject


def dense_gauss_newton(subject: Subject, pad_to: int | None = None) -> torch.Tensor:
    """1/N sum over labels of J^T (diag(p) - p p^T) J, J the Jacobian of the model's own logits, row by row; float64.

    With `pad_to`, over all positions of texts that are padded to this length.
    """
    (name, linear), *_ = subject.linears.items()
    size = linear.out_features * (linear.in_features + (linear.bias is not None))
    total = torch.zeros(size, size, dtype=torch.float64)
    weights = [parameter for parameter in (linear.weight, linear.bias) if parameter is not None]
    for parameter in weights:
        parameter.requires_grad_(True)
    for batch in subject.loader(subject.train, 1, pad_to=pad_to):
        mask = batch.get("padding_mask")
        hidden = subject.model.base_model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state[0, :-1]
        hidden = hidden if pad_to else hidden[batch["labels"][0, 1:] != IGNORED_LABEL]
        logits = subject.model.get_output_embeddings()(hidden).double()
        for row, token in zip(hidden, logits.softmax(dim=1), strict=True):
            jacobian = []
            for value in row:
                of_value = torch.autograd.grad(value, weights, retain_graph=True)
                jacobian.append(torch.cat([part.reshape(len(part), -1) for part in of_value], dim=1).flatten())
            embedding, token = subject.model.get_output_embeddings().weight.double().detach(), token.detach()
            of_hidden = embedding.T @ (token.diag() - torch.outer(token, token)) @ embedding
            jacobian = torch.stack(jacobian).double()
            total += jacobian.T @ of_hidden @ jacobian
    for parameter in weights:
        parameter.requires_grad_(False)
    return total.detach() / len(subject.train)


@pytest.fixture(scope="module")
def models(tiny_models, tmp_path_factory):
    """By architecture: the tiny models, and those that scale, cap or transform on the way to their logits."""

    def model(family: str):
        if family in tiny_models:
            return tiny_models[family]
        config_name, more = OWN_LOGITS[family]
        return make_model(tmp_path_factory.mktemp("models") / family, config_name, **more)

    return model


def random_vectors(subject: Subject, count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = subject.traced(Curvature()).gradient_shapes()
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.norm(a.double() - b.double()) / torch.norm(b.double()))


@pytest.mark.parametrize(("family", "linear"), [("pythia", "attention.dense"), ("qwen", "o_proj"), ("qwen", "k_proj")])
def test_the_product_is_that_of_the_dense_matrix(tiny_models, small_data, family, linear):
    subject = small_subject(tiny_models[family], small_data, linear)
    vectors = random_vectors(subject, 2)
    products = gauss_newton_product(subject.traced(Curvature()), subject.loader(subject.train), vectors)
    for name, product in products.items():
        expected = vectors[name].flatten(1).double() @ dense_gauss_newton(subject)
        assert relative(product.flatten(1), expected) <= 1e-4


@pytest.mark.parametrize("family", ["pythia", "qwen", *OWN_LOGITS])
def test_the_matrix_is_symmetric_and_batches_do_not_matter(models, small_data, family):
    """<u, G v> = <v, G u> over all Linears of two blocks; soft caps, scales and prediction heads included."""
    subject = make_subject(models(family), small_data, num_blocks=2)
    traced, vectors = subject.traced(Curvature()), random_vectors(subject, 2)
    products = gauss_newton_product(traced, subject.loader(subject.train, SMALL_BATCHES), vectors)
    swapped = {name: v.flip(0) for name, v in vectors.items()}
    there, back = inner_products(swapped, products)
    assert there == pytest.approx(float(back), rel=1e-3, abs=1e-3 * float(inner_products(vectors, products).max()))
    assert (inner_products(vectors, products) > 0).all()
    reordered = subject.loader(subject.train, ONE_BATCH, indices=list(range(len(subject.train)))[::-1])
    for name, product in gauss_newton_product(traced, reordered, vectors).items():
        assert relative(product, products[name]) <= 1e-4


@pytest.mark.parametrize("family", ["pythia", "qwen", *OWN_LOGITS])
def test_a_tangent_is_the_difference_that_a_small_step_makes(models, small_data, family):
    subject = make_subject(models(family), small_data, dtype=torch.float64)
    curvature = Curvature(dtype=torch.float64)
    directions = {name: v.double() for name, v in random_vectors(subject, 1).items()}
    (batch, *_) = subject.loader(subject.train[:3], ONE_BATCH)
    is_label = batch["labels"][:, 1:] != IGNORED_LABEL
    hidden, tangents = hidden_tangents(subject.traced(curvature), batch, is_label, directions)

    def step(size: float) -> None:
        for name, linear in subject.linears.items():
            linear.weight.data += size * directions[name][0][:, : linear.in_features]
            if linear.bias is not None:
                linear.bias.data += size * directions[name][0][:, -1]

    sides = []
    for size in (1e-4, -2e-4):  # some norms compute in float32 whatever the model
        step(size)
        sides.append(hidden_tangents(subject.traced(curvature), batch, is_label, directions)[0])
    assert relative((sides[0] - sides[1]) / 2e-4, tangents[0]) <= 1e-3
    assert hidden.dtype == torch.float64


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_conjugate_gradients_solve_the_damped_system(tiny_models, small_data, tmp_path, family):
    """Against torch.linalg.solve on the dense matrix, in float64: 1e-4, with the factors as preconditioner."""
    subject = small_subject(tiny_models[family], small_data, "dense" if family == "pythia" else "o_proj")
    curvature = Curvature("ekfac", None)
    fit_factors(subject.traced(curvature), subject.tasks["bias"], subject.loader(subject.train), tmp_path)
    traced = subject.traced(curvature)
    precondition = Preconditioner(curvature, tmp_path, traced.gradient_shapes())
    right_sides, solutions = random_vectors(subject, 3), []
    for loader in (subject.loader(subject.train, SMALL_BATCHES), subject.loader(subject.train, ONE_BATCH)):

        def product(vectors: dict[str, torch.Tensor], loader=loader) -> dict[str, torch.Tensor]:
            products = gauss_newton_product(traced, loader, vectors)
            return {name: products[name] + precondition.dampings[name] * vectors[name] for name in vectors}

        solutions.append(conjugate_gradients(product, right_sides, precondition, max_iterations=200, tolerance=1e-6))
    (name,) = right_sides
    dense = dense_gauss_newton(subject)
    damped = dense + precondition.dampings[name] * torch.eye(len(dense), dtype=torch.float64)
    expected = torch.linalg.solve(damped, right_sides[name].flatten(1).double().T).T
    for solution in solutions:
        for query in range(3):
            assert relative(solution.vectors[name][query].flatten(), expected[query]) <= 1e-4
            assert max(solution.final_residuals) <= 1e-4  # of float32; the recursion believes 1e-6
            assert len(solution.of_query(query)) == len(solution.residuals) <= 201


def test_more_iterations_never_end_farther_from_the_solution():
    """In the norm of the matrix, which is what conjugate gradients minimise; a solved query rests meanwhile."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    matrix = basis @ torch.linspace(0.01, 10, 30, dtype=torch.float64).diag() @ basis.T
    right = torch.randn(2, 30, 1, generator=generator, dtype=torch.float64)
    right[0] = basis[:, :1]  # an eigenvector: solved in one iteration
    right = torch.cat([right, torch.zeros(1, 30, 1, dtype=torch.float64)])
    expected = torch.linalg.solve(matrix, right)

    def product(v: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"w": matrix @ v["w"]}

    distances = []
    for iterations in (1, 5, 20, 60):
        solution = conjugate_gradients(product, {"w": right}, dict, iterations, 1e-9)
        error = solution.vectors["w"] - expected
        distances.append((error * (matrix @ error)).flatten(1).sum(dim=1))
    distances = torch.stack(distances)
    assert (distances[1:, 1] <= distances[:-1, 1]).all()
    assert distances[-1, 1] <= 1e-12
    assert (distances[:, [0, 2]] <= 1e-12).all()


def test_a_model_without_forward_mode_is_refused_in_one_line(tiny_models, small_data, monkeypatch):
    subject = make_subject(tiny_models["pythia"], small_data)
    traced = dataclasses.replace(subject.traced(Curvature()), tokenizer=SimpleNamespace(pad_token_id=0))
    require_forward_mode(traced, subject.train)

    def broken(*_: object, **__: object) -> None:
        raise NotImplementedError("Trying to use forward AD with some_kernel that does not support it")

    monkeypatch.setattr(subject.model.base_model, "forward", broken)
    with pytest.raises(UserError, match="gpt_neox.*no derivative in forward mode; set FACTOR_STRATEGY.*some_kernel"):
        require_forward_mode(traced, subject.train)


def test_step_1_solves_and_reports_its_residuals(make_workspace):
    workspace = make_workspace("pythia")
    workspace.run(STEP_1)
    workspace.run(STEP_1, "--FACTOR_STRATEGY", "ekfac_cg", "--CG_ITERATIONS", "60", "--CG_TOLERANCE", "0.05")
    folders = list((workspace.output / "ekfac_experiments").rglob("scores_ekfac_cg"))
    assert len(folders) == 3
    assert not list((workspace.output / "ekfac_experiments").rglob("factors_ekfac_cg"))
    for folder in folders:
        manifest = json.loads((folder / "pairwise_scores.manifest.json").read_text(encoding="utf-8"))
        assert manifest["settings"]["CG_ITERATIONS"] == 60
        assert manifest["residuals"][0] == 1
        assert manifest["residuals"][-1] <= 0.051
        assert len(manifest["residuals"]) <= 61
        solved = load_file(folder / "pairwise_scores.safetensors")["all_modules"][0]
        approximate = load_file(folder.with_name("scores_ekfac") / "pairwise_scores.safetensors")["all_modules"][0]
        correlation = torch.corrcoef(torch.stack([solved, approximate]))[0, 1]
        assert 0.3 < correlation < 0.99999
    workspace.run("make_gradients.py", "--SCORES_TYPE", "ekfac_cg", "--BOTTOM_K", 5)


def test_the_product_at_all_positions_is_that_of_the_dense_matrix(tiny_models, small_data):
    """As FISHER_POSITIONS = "all": labels at prompt and padding too, of texts padded to one length."""
    subject = small_subject(tiny_models["pythia"], small_data, "attention.dense")
    subject.train = subject.train[:2]
    vectors, longest = random_vectors(subject, 2), max(len(sequence.input_ids) for sequence in subject.train) + 3
    padded = subject.loader(subject.train, ONE_BATCH, pad_to=longest)
    products = gauss_newton_product(subject.traced(Curvature()), padded, vectors, all_positions=True)
    everywhere = dense_gauss_newton(subject, longest)
    for name, product in products.items():
        assert relative(product.flatten(1), vectors[name].flatten(1).double() @ everywhere) <= 1e-4
        at_labels = gauss_newton_product(subject.traced(Curvature()), subject.loader(subject.train), vectors)
        assert relative(at_labels[name], product) > 0.1


def test_a_residual_that_is_not_finite_is_refused():
    vectors = {"w": torch.ones(1, 3, 1)}
    with pytest.raises(UserError, match="set DAMPING_FACTOR to more"):
        conjugate_gradients(lambda v: {"w": v["w"] * float("nan")}, vectors, dict, 5, 1e-3)
