"""The fused pass against kronfluence's own, against plain autograd, across batchings, and in float64."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEMO, OWN_LOGITS, Workspace, make_model
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.constants import GRADIENT_COVARIANCE_MATRIX_NAME
from kronfluence.utils.dataset import DataLoaderKwargs
from safetensors.torch import load_file
from torch.utils.data import Dataset

from tasks import TRUST_TASKS, BackwardTask
from utils.batching import BatchLoader, LabelledSequence
from utils.console import UserError
from utils.influence import factors as factors_module
from utils.influence import label_gradients
from utils.influence.factors import fit_covariances, fit_eigenbases, fit_factors
from utils.influence.preconditioning import Preconditioner, require_invertible
from utils.influence.scores import (
    mean_measurement_gradient,
    require_representable,
    score_training_examples,
    weigh_by_score,
)
from utils.influence.token_scores import score_tokens
from utils.influence.traced_model import Curvature, TracedModel, traced_linears
from utils.models import load_model, load_tokenizer
from utils.performance_functions import losses
from utils.performance_functions.hh import load_dialogues, tokenize_dialogues
from utils.performance_functions.losses import sampled_label_loss, sequence_nll
from utils.performance_functions.pairs import TokenizedPairs, tokenize_pairs

CPU = torch.device("cpu")
SMALL_BATCHES = 300
ONE_BATCH = 1 << 30


@dataclass
class Subject:
    """A tiny model with its examples."""

    model: torch.nn.Module
    linears: dict[str, torch.nn.Linear]
    tasks: dict[str, BackwardTask]
    train: list[LabelledSequence]
    queries: dict[str, TokenizedPairs]

    def traced(self, curvature: Curvature) -> TracedModel:
        return TracedModel(self.model, self.linears, curvature, tokenizer=None, tokens_per_batch=SMALL_BATCHES)

    def loader(self, examples: list[LabelledSequence], budget: int = SMALL_BATCHES, **keywords: object) -> BatchLoader:
        return BatchLoader(examples, budget, pad_token_id=0, **keywords)

    def analyzer(self, task: BackwardTask, folder: Path) -> Analyzer:
        """kronfluence on a copy of the model that it wraps."""
        model = prepare_model(copy.deepcopy(self.model), task)
        return Analyzer("analysis", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True, log_level=50)

    def stacked_gradients(self, curvature: Curvature, budget: int = SMALL_BATCHES) -> dict[str, torch.Tensor]:
        each = [
            mean_measurement_gradient(
                self.traced(curvature), task, self.loader(pairs.sequences, budget, weights=pairs.weights)
            )
            for task, pairs in ((task, self.queries[name]) for name, task in self.tasks.items())
        ]
        return {module: torch.cat([gradients[module] for gradients in each]) for module in each[0]}

    def precondition(self, gradients: dict[str, torch.Tensor], curvature: Curvature, factors: Path) -> dict:
        return Preconditioner(curvature, factors, self.traced(curvature).gradient_shapes())(gradients)

    def scores(self, curvature: Curvature, factors: Path, budget: int = SMALL_BATCHES) -> torch.Tensor:
        ready = self.precondition(self.stacked_gradients(curvature, budget), curvature, factors)
        task, loader = next(iter(self.tasks.values())), self.loader(self.train, budget)
        return score_training_examples(self.traced(curvature), task, loader, ready)


def make_subject(model_path: Path, data: Path, num_blocks: int = 1, dtype: torch.dtype = torch.float32) -> Subject:
    model, tokenizer = load_model(str(model_path), CPU).to(dtype), load_tokenizer(str(model_path))
    linears = traced_linears(model, "auto", num_blocks)
    tasks = {name: task(list(linears)) for name, task in TRUST_TASKS.items()}
    train = tokenize_dialogues(load_dialogues(str(data / "hh"), "train"), tokenizer)
    queries = {
        name: tokenize_pairs(task.measurement.load_pairs(data, "train"), tokenizer, task.measurement.max_tokens)
        for name, task in tasks.items()
    }
    return Subject(model, linears, tasks, train, queries)


class Padded(Dataset):
    """Examples one at a time, as kronfluence's own loaders want them."""

    def __init__(self, examples: list[LabelledSequence], weights: np.ndarray | None = None) -> None:
        self.examples, self.weights = examples, weights

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> int:
        return position

    @property
    def collation(self) -> dict:
        return {"collate_fn": BatchLoader(self.examples, ONE_BATCH, 0, weights=self.weights).collate}


@pytest.mark.parametrize("family", ["pythia", "qwen"])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_fused_pass_equals_kronfluence(tiny_models, small_data, tmp_path, family, num_blocks):
    subject = make_subject(tiny_models[family], small_data, num_blocks)
    curvature = Curvature(damping=None)
    factors = tmp_path / "analysis" / "factors_ours"
    fit_factors(subject.traced(curvature), subject.tasks["bias"], subject.loader(subject.train), factors)
    ours = subject.scores(curvature, factors)
    train = Padded(subject.train)
    for query, (name, task) in enumerate(subject.tasks.items()):
        analyzer = subject.analyzer(task, tmp_path)
        arguments = ScoreArguments(damping_factor=curvature.damping, aggregate_query_gradients=True)
        queries = Padded(subject.queries[name].sequences, subject.queries[name].weights)
        original = analyzer._get_dataloader

        def loader_of(dataset, *, original=original, dataloader_params, **keywords):
            """kronfluence takes one collate function for queries and training examples; each here has its own."""
            return original(dataset=dataset, dataloader_params={**dataloader_params, **dataset.collation}, **keywords)

        analyzer._get_dataloader = loader_of
        analyzer.compute_pairwise_scores(
            scores_name=name,
            factors_name="ours",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=7,
            per_device_train_batch_size=7,
            score_args=arguments,
        )
        theirs = analyzer.load_pairwise_scores(name)["all_modules"][0]
        assert torch.norm(ours[query] - theirs) / torch.norm(theirs) < 1e-4


@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
def test_factors_equal_kronfluence(tiny_models, small_data, tmp_path, strategy):
    """Batches of similar length against kronfluence's loader, which pads neighbours in the data set together."""
    subject = make_subject(tiny_models["pythia"], small_data)
    task, curvature = subject.tasks["truth"], Curvature(strategy)
    ours = tmp_path / "analysis" / f"factors_{strategy}"
    fit_factors(subject.traced(curvature), task, subject.loader(subject.train), ours)
    analyzer = subject.analyzer(task, tmp_path)
    train = Padded(subject.train)
    analyzer.fit_all_factors(
        "theirs",
        train,
        per_device_batch_size=8,
        dataloader_kwargs=DataLoaderKwargs(**train.collation),
        factor_args=FactorArguments(strategy=strategy),
    )
    names = {"ekfac": ["lambda_matrix"], "kfac": ["activation_covariance", "gradient_covariance"]}
    for name in names.get(strategy, ["lambda_matrix"]):
        for module, tensor in analyzer.load_file(
            tmp_path / "analysis" / "factors_theirs" / f"{name}.safetensors"
        ).items():
            mine = analyzer.load_file(ours / f"{name}.safetensors")[module]
            if name == "lambda_matrix" and strategy == "ekfac":
                # Eigenvectors are unique only up to sign and rotation among equal eigenvalues; the sum is not.
                mine, tensor = mine.sum(), tensor.sum()
            assert torch.norm(mine - tensor) <= 1e-5 * torch.norm(tensor)


@pytest.mark.parametrize("family", ["qwen", *OWN_LOGITS])
def test_gradients_and_identity_scores_equal_plain_autograd(tiny_models, small_data, tmp_path, family):
    folder = tiny_models[family] if family == "qwen" else tmp_path / family
    if family in OWN_LOGITS:
        name, more = OWN_LOGITS[family]
        make_model(folder, name, **more)
    subject = make_subject(folder, small_data)
    curvature = Curvature("identity")
    gradients = subject.stacked_gradients(curvature)
    scores = subject.scores(curvature, tmp_path)
    plain = load_model(str(folder), CPU)
    modules = {name: plain.get_submodule(name) for name in next(iter(subject.tasks.values())).tracked_modules}
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    for module in modules.values():
        module.requires_grad_(True)

    def gradient_of(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        plain.zero_grad()
        loss.backward()
        columns = {name: [module.weight.grad.clone()] for name, module in modules.items()}
        for name, module in modules.items():
            if module.bias is not None:
                columns[name].append(module.bias.grad[:, None].clone())
        return {name: torch.cat(parts, dim=1) for name, parts in columns.items()}

    def plain_nll(sequence) -> tuple[torch.Tensor, int]:
        """The NLL of one text, by transformers' own loss on unpadded input with an attention mask."""
        input_ids = torch.from_numpy(sequence.input_ids.astype(np.int64))[None]
        labels = torch.full_like(input_ids, -100)
        labels[:, sequence.label_start : sequence.label_end] = input_ids[:, sequence.label_start : sequence.label_end]
        count = int((labels[:, 1:] != -100).sum())
        loss = plain(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), labels=labels).loss
        return loss * count, count

    train_gradients = [gradient_of(plain_nll(sequence)[0]) for sequence in subject.train]
    for query, name in enumerate(subject.tasks):
        losses = []
        pairs = subject.queries[name]
        for pair in zip(pairs.chosen, pairs.rejected, strict=True):
            chosen, rejected = (pairs.sequences[position] for position in pair)
            (chosen_nll, chosen_count), (rejected_nll, rejected_count) = plain_nll(chosen), plain_nll(rejected)
            losses.append(chosen_nll / chosen_count - rejected_nll / rejected_count)
        expected = gradient_of(torch.stack(losses).mean())
        for module, tensor in expected.items():
            assert torch.norm(gradients[module][query] - tensor) <= 1e-4 * torch.norm(tensor)
        dot_products = torch.stack(
            [sum((expected[module] * gradient[module]).sum() for module in expected) for gradient in train_gradients]
        )
        for position in (0, 17, 59):
            assert scores[query, position] == pytest.approx(float(dot_products[position]), rel=1e-3, abs=1e-5)
        assert spearman(scores[query], dot_products) > 0.9999


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_weighing_by_score_in_one_pass_equals_two(tiny_models, small_data, family):
    subject = make_subject(tiny_models[family], small_data)
    traced, task = subject.traced(Curvature()), subject.tasks["truth"]
    sequences = subject.queries["truth"].sequences
    query = mean_measurement_gradient(traced, task, subject.loader(sequences))
    scores, total = weigh_by_score(
        traced, task, subject.loader(subject.train), query, lambda rows, scores: scores * (rows % 3)
    )
    expected = score_training_examples(traced, task, subject.loader(subject.train), query)[0]
    torch.testing.assert_close(scores, expected)
    # The measurement takes the mean over labels, the training loss their sum.
    weights = expected.double() * (torch.arange(len(expected)) % 3)
    num_labels = np.array([example.num_labels for example in subject.train])
    loader = subject.loader(subject.train, weights=weights.numpy() * num_labels)
    plain = mean_measurement_gradient(traced, task, loader)
    for name, gradient in total.items():
        assert torch.norm(gradient - plain[name]) <= 1e-5 * torch.norm(plain[name])


@pytest.mark.parametrize("max_bytes", [0, 1, 1 << 30])  # none, one batch, all
def test_labels_that_are_kept_change_no_bit(tiny_models, small_data, monkeypatch, max_bytes):
    monkeypatch.setattr(label_gradients, "BYTES_ON_CPU", max_bytes)
    calls = []
    chunks = losses.logit_chunks
    monkeypatch.setattr(losses, "logit_chunks", lambda *states: calls.append(1) or chunks(*states))
    subject = make_subject(tiny_models["qwen"], small_data)
    task, train = subject.tasks["truth"], subject.train
    opened = SimpleNamespace(pad_token_id=0)
    traced = dataclasses.replace(subject.traced(Curvature()), tokenizer=opened)
    loader = traced.loader(train, keeps_labels=True)

    def passes(loader: BatchLoader) -> list[torch.Tensor]:
        """Two of the data's labels, between two of sampled ones."""
        sampled = [fit_covariances(traced, task, loader)[GRADIENT_COVARIANCE_MATRIX_NAME]]
        data = [mean_measurement_gradient(traced, task, loader) for _ in range(2)]
        sampled += [fit_covariances(traced, task, loader)[GRADIENT_COVARIANCE_MATRIX_NAME]]
        return [tensor for of_modules in (*sampled, *data) for tensor in of_modules.values()]

    plain = passes(traced.loader(train))
    num_plain = len(calls)
    kept = passes(loader)
    for ours, expected in zip(kept, plain, strict=True):
        assert torch.equal(ours, expected)
    num_batches = num_plain // 4
    assert num_batches > 3
    num_kept = {0: 0, 1: 1}.get(max_bytes, num_batches)
    assert len(calls) - num_plain == num_plain - 2 * num_kept


@pytest.mark.parametrize("family", ["pythia", "qwen"])
def test_batching_and_order_change_nothing(tiny_models, small_data, tmp_path, family):
    subject = make_subject(tiny_models[family], small_data)
    curvature = Curvature()
    fit_factors(subject.traced(curvature), subject.tasks["bias"], subject.loader(subject.train), tmp_path)
    gradients, scores = subject.stacked_gradients(curvature), subject.scores(curvature, tmp_path)
    for module, tensor in subject.stacked_gradients(curvature, ONE_BATCH).items():
        assert torch.norm(gradients[module] - tensor) <= 1e-5 * torch.norm(tensor)
    one_batch = subject.scores(curvature, tmp_path, ONE_BATCH)
    assert torch.norm(scores - one_batch) <= 1e-5 * torch.norm(one_batch)
    order = torch.randperm(len(subject.train), generator=torch.Generator().manual_seed(0)).tolist()
    subject.train = [subject.train[i] for i in order]
    shuffled = subject.scores(curvature, tmp_path)
    assert torch.norm(scores[:, order] - shuffled) <= 1e-5 * torch.norm(shuffled)


def test_padding_changes_nothing(tiny_models, small_data):
    subject = make_subject(tiny_models["pythia"], small_data)
    task = BackwardTask(subject.tasks["bias"].tracked_modules)
    curvature = Curvature()
    tight = mean_measurement_gradient(subject.traced(curvature), task, subject.loader(subject.train))
    padded = mean_measurement_gradient(subject.traced(curvature), task, subject.loader(subject.train, pad_to=256))
    for module, tensor in tight.items():
        assert torch.norm(tensor - padded[module]) <= 1e-5 * torch.norm(tensor)


@torch.no_grad()
def test_sampled_labels_do_not_depend_on_the_batch(tiny_models, small_data):
    subject = make_subject(tiny_models["pythia"], small_data)
    losses = [
        sum(float(sampled_label_loss(subject.model, batch, seed=3)) for batch in subject.loader(subject.train, budget))
        for budget in (SMALL_BATCHES, ONE_BATCH)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    other_seed = sum(float(sampled_label_loss(subject.model, b, seed=4)) for b in subject.loader(subject.train))
    assert other_seed != pytest.approx(losses[0], rel=1e-5)


def test_sampled_labels_follow_the_model(tiny_models, small_data):
    """The mean cross-entropy on sampled labels estimates the model's entropy, which the true labels do not."""
    subject = make_subject(tiny_models["pythia"], small_data)
    loader = subject.loader(subject.train)
    entropy, count = 0.0, 0
    with torch.no_grad():
        for batch in loader:
            hidden = subject.model.base_model(batch["input_ids"]).last_hidden_state[:, :-1]
            logits = subject.model.get_output_embeddings()(hidden[batch["labels"][:, 1:] != -100])
            entropy += float(torch.distributions.Categorical(logits=logits).entropy().sum())
            count += len(logits)
        draws = [sum(float(sampled_label_loss(subject.model, b, seed=s)) for b in loader) for s in range(20)]
        true_labels = sum(float(sequence_nll(subject.model, batch).total.sum()) for batch in loader)
    assert np.mean(draws) / count == pytest.approx(entropy / count, abs=4 * np.std(draws) / count / np.sqrt(20))
    assert abs(true_labels - entropy) > 10 * np.std(draws)


def test_all_positions_bring_padding_into_the_fisher(tiny_models, small_data, tmp_path):
    subject = make_subject(tiny_models["pythia"], small_data)
    curvature, counts = Curvature("kfac"), {}
    for positions in ("completion", "all"):
        task = TRUST_TASKS["bias"](subject.tasks["bias"].tracked_modules, fisher_positions=positions)
        loader = subject.loader(subject.train[:4], pad_to=128)
        fit_factors(subject.traced(curvature), task, loader, tmp_path / positions)
        covariances = Analyzer.load_file(tmp_path / positions / "gradient_covariance.safetensors")
        counts[positions] = sum(float(tensor.trace()) for tensor in covariances.values())
    assert counts["all"] > 2 * counts["completion"]


@pytest.mark.parametrize("family", ["pythia", "qwen"])
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_token_scores_are_those_of_each_tokens_own_loss(tiny_models, small_data, tmp_path, family, num_blocks):
    """Against plain autograd of every token's loss by itself; and they add up to the dialogues' scores."""
    subject = make_subject(tiny_models[family], small_data, num_blocks)
    curvature, task = Curvature(), subject.tasks["bias"]
    traced, loader = subject.traced(curvature), subject.loader(subject.train)
    fit_factors(traced, task, loader, tmp_path)
    ready = subject.precondition(subject.stacked_gradients(curvature), curvature, tmp_path)
    tokens = score_tokens(traced, loader, ready)
    smallest = 1e-4 * float(tokens.scores.abs().max())
    again = score_tokens(traced, subject.loader(subject.train, ONE_BATCH), ready)
    torch.testing.assert_close(tokens.scores, again.scores, rtol=1e-3, atol=smallest)
    examples = score_training_examples(traced, task, loader, ready)
    for position, sequence in enumerate(subject.train):
        begin, end = tokens.offsets[position : position + 2]
        assert end - begin == len(sequence.input_ids)
        of_tokens = tokens.scores[:, begin:end]
        torch.testing.assert_close(of_tokens.sum(1), examples[:, position], rtol=1e-3, atol=1e-3)
        assert not of_tokens[:, : max(sequence.label_start, 1)].any()
        assert not of_tokens[:, sequence.label_end :].any()
    parameters = {
        name: [part for part in (linear.weight, linear.bias) if part is not None]
        for name, linear in traced.linears.items()
    }
    for parameter in (one for some in parameters.values() for one in some):
        parameter.requires_grad_(True)
    for position, sequence in enumerate(subject.train[:2]):
        ids = torch.from_numpy(sequence.input_ids).long()[None]
        losses = torch.nn.functional.cross_entropy(subject.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        for t in range(max(sequence.label_start, 1), sequence.label_end):
            expected = torch.zeros(len(tokens.scores))
            for name, some in parameters.items():
                gradients = torch.autograd.grad(losses[t - 1], some, retain_graph=True)
                whole = torch.cat([gradient.reshape(len(gradient), -1) for gradient in gradients], dim=1)
                expected += (ready[name] * whole).flatten(1).sum(1)
            actual = tokens.scores[:, tokens.offsets[position] + t]
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=smallest)


@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal"])
@pytest.mark.parametrize(("num_examples", "damping"), [(1, 1e-6), (1, None), (60, 1e-6), (60, None), (60, 1.0)])
def test_small_dampings_give_scores(tiny_models, small_data, tmp_path, strategy, num_examples, damping):
    subject = make_subject(tiny_models["pythia"], small_data)
    curvature = Curvature(strategy, damping)
    loader = subject.loader(subject.train[:num_examples])
    fit_factors(subject.traced(curvature), subject.tasks["bias"], loader, tmp_path)
    assert float(subject.scores(curvature, tmp_path).abs().max()) < 1e9


@pytest.mark.parametrize(
    ("family", "strategy", "num_examples", "damping"),
    [
        ("pythia", "ekfac", 1, 0.0),
        ("qwen", "ekfac", 1, 0.0),
        ("pythia", "kfac", 1, 0.0),
        ("qwen", "ekfac", 1, 1e-20),
        ("pythia", "ekfac", 60, 0.0),  # a LayerNorm takes directions out, however many examples there are
    ],
)
def test_a_damping_that_leaves_rounding_noise_is_refused(
    tiny_models, small_data, tmp_path, family, strategy, num_examples, damping
):
    """Without damping, one example gave gradients of 4e20."""
    subject = make_subject(tiny_models[family], small_data)
    curvature = Curvature(strategy, damping)
    loader = subject.loader(subject.train[:num_examples])
    fit_factors(subject.traced(curvature), subject.tasks["bias"], loader, tmp_path)
    with pytest.raises(UserError, match=rf"DAMPING_FACTOR = {damping}: .* rounding noise.*; give None"):
        subject.scores(curvature, tmp_path)


def test_no_damping_where_every_direction_has_curvature(tiny_models, small_data, tmp_path):
    subject = make_subject(tiny_models["qwen"], small_data)
    curvature = Curvature("ekfac", 0.0)
    fit_factors(subject.traced(curvature), subject.tasks["bias"], subject.loader(subject.train), tmp_path)
    assert float(subject.scores(curvature, tmp_path).abs().max()) < 1e4


def test_no_curvature_at_all_is_refused():
    with pytest.raises(UserError, match="DAMPING_FACTOR = None: .*; give a larger one, such as 1e-08"):
        require_invertible(torch.zeros(2, 3), Curvature(), "mlp")


@pytest.mark.parametrize("strategy", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("damping", [None, 0.01])
def test_preconditioning_is_the_formula(tiny_models, small_data, tmp_path, strategy, damping):
    """V -> Q_G ((Q_G^T V Q_A) / (eigenvalues + damping)) Q_A^T, from the factor files, in float64."""
    subject = make_subject(tiny_models["pythia"], small_data)
    subject.train = subject.train[:12]
    curvature = Curvature(strategy, damping)
    fit_factors(subject.traced(curvature), subject.tasks["bias"], subject.loader(subject.train), tmp_path)
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(2, module.out_features, module.in_features + 1, generator=generator)
        for name in subject.tasks["bias"].tracked_modules
        for module in [subject.model.get_submodule(name)]
    }
    ready = subject.precondition(gradients, curvature, tmp_path)
    factors = {file.stem: load_file(file) for file in tmp_path.glob("*.safetensors")}
    for name, gradient in gradients.items():
        value = gradient.double()
        if strategy in ("ekfac", "kfac"):
            q_a, q_g = (factors[f"{side}_eigenvectors"][name].double() for side in ("activation", "gradient"))
            value = q_g.T @ value @ q_a
        if strategy == "kfac":
            eigenvalues = torch.outer(
                *(factors[f"{side}_eigenvalues"][name].double() for side in ("gradient", "activation"))
            )
        elif strategy != "identity":
            eigenvalues = factors["lambda_matrix"][name].double() / len(subject.train)
        if strategy != "identity":
            value = value / (eigenvalues + (0.1 * eigenvalues.mean() if damping is None else damping))
        if strategy in ("ekfac", "kfac"):
            value = q_g @ value @ q_a.T
        assert torch.norm(ready[name].double() - value) <= 1e-4 * torch.norm(value)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def test_float32_ranks_as_float64_does(tiny_models, small_data, tmp_path):
    """On 300 dialogues of the demo, every step in float32 against every step in float64."""
    tokenizer = load_tokenizer(str(tiny_models["pythia"]))
    train = tokenize_dialogues(load_dialogues(str(DEMO / "hh"), "train"), tokenizer)[:300]
    scores = []
    for dtype in (torch.float32, torch.float64):
        subject = make_subject(tiny_models["pythia"], small_data, dtype=dtype)
        subject.train = train
        curvature = Curvature(dtype=dtype)
        folder = tmp_path / str(dtype)
        budget = 2_048
        fit_factors(subject.traced(curvature), subject.tasks["bias"], subject.loader(subject.train, budget), folder)
        scores.append(subject.scores(curvature, folder, budget))
    for single, double in zip(*scores, strict=True):
        assert double.dtype == torch.float64
        assert spearman(single, double) > 0.999


def test_not_finite_factor_names_its_module(tiny_models, small_data, tmp_path):
    subject = make_subject(tiny_models["pythia"], small_data)
    name = subject.tasks["bias"].tracked_modules[-1]
    with torch.no_grad():
        subject.model.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="gpt_neox.layers.2"):
        fit_factors(subject.traced(Curvature()), subject.tasks["bias"], subject.loader(subject.train), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_failed_eigendecomposition_moves_one_module_to_the_cpu_not_those_after_it(
    tiny_models, small_data, monkeypatch
):
    """On a GPU, of which the test only has the name."""
    subject = make_subject(tiny_models["pythia"], small_data)
    traced, tried = subject.traced(Curvature()), []
    covariances = fit_covariances(traced, subject.tasks["bias"], subject.loader(subject.train))
    on_gpu = dataclasses.replace(traced, model=SimpleNamespace(device=torch.device("cuda")))

    def decompose(covariances, modules, state, arguments, disable_tqdm):
        tried.append((modules[0].name, state.device.type))
        if tried[-1] == (list(subject.linears)[1], "cuda"):
            raise torch.linalg.LinAlgError("did not converge")
        return original(covariances, modules, dataclasses.replace(state, device=CPU), arguments, disable_tqdm)

    original = factors_module.perform_eigendecomposition
    monkeypatch.setattr(factors_module, "perform_eigendecomposition", decompose)
    eigenbases = fit_eigenbases(on_gpu, covariances)
    first, second, *others = subject.linears
    assert tried == [(first, "cuda"), (second, "cuda"), (second, "cpu"), *((name, "cuda") for name in others)]
    assert all(list(by_module) == list(subject.linears) for by_module in eigenbases.values())


def test_step_1_is_the_same_for_one_task_and_for_three(make_workspace):
    together, alone = make_workspace("pythia"), make_workspace("pythia")
    together.run("compute_factors_and_scores.py")
    alone.run("compute_factors_and_scores.py", "--TASK_NAME", "ethics", "--TOKENS_PER_BATCH", 400)

    def scores(workspace: Workspace) -> torch.Tensor:
        (file,) = workspace.output.rglob("ethics_*/scores_ekfac/pairwise_scores.safetensors")
        return load_file(file)["all_modules"]

    assert scores(together).shape == (1, 60)
    assert torch.norm(scores(together) - scores(alone)) <= 1e-4 * torch.norm(scores(alone))


@pytest.mark.parametrize(
    ("largest", "damping", "reason"),
    [
        (0.0, None, "look whether the loss depends on the last NUM_BLOCKS blocks"),
        (0.0, 1e30, "change DAMPING_FACTOR = 1e+30, or look whether the loss depends on the last NUM_BLOCKS blocks"),
        (float("nan"), None, "check the model's weights"),
        (float("inf"), 0.1, "change DAMPING_FACTOR = 0.1, or check the model's weights"),
        (1e-38, 1e30, "change DAMPING_FACTOR = 1e+30, or check the model's weights"),
    ],
)
def test_numbers_that_cannot_be_computed_with_name_all_that_may_have_done_it(largest, damping, reason):
    with pytest.raises(UserError) as told:
        require_representable([torch.tensor([0.0, largest])], "the scores", {"DAMPING_FACTOR": damping})
    assert str(told.value).endswith(f"which float32 cannot compute with: {reason}")
