"""A finished step is not computed again, and a step that was killed and run again ends as if it never had been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conftest import Workspace, contents, load_script
from transformers import PreTrainedModel

import tasks.backward_task
from utils import evaluation
from utils.influence import factors, traced_model
from utils.paths import PROJECT_ROOT

STEP_1, STEP_2 = "compute_factors_and_scores.py", "representations/train_reps.py"
STEP_3, STEP_4, STEP_5 = "dpp/greedy_dpp.py", "make_gradients.py", "gradient_ascent_and_save.py"
EVALUATIONS = [f"evaluation_scripts/{name}.py" for name in ("anthropic_eval", "bias_loss", "ethics_loss", "truth_loss")]
SUBSET = ["--BOTTOM_K", 5]
DPP = [*SUBSET, "--SCORES_TYPE", "dpp"]
ARGUMENTS: dict[str, list] = {
    STEP_1: [],
    STEP_2: [],
    STEP_3: SUBSET,
    STEP_4: DPP,
    STEP_5: [*DPP, "--LEARNING_RATE", 0.01, 0.02],
    **{script: ["--SPLIT", "train"] for script in EVALUATIONS},
}
FACTORS = "ekfac_experiments/influence_results/pythia-tiny/factors_ekfac"
STAGES = {
    "covariances": "fit_covariances",
    "eigenbases": "fit_eigenbases",
    "lambdas": "fit_lambdas",
}


class Reference:
    """The output folder before and after each script of a run that nothing stopped."""

    def __init__(self, workspace: Workspace, root: Path) -> None:
        self.model, self.data, self.root = workspace.model, workspace.data, root
        scripts = list(ARGUMENTS)
        for script in scripts:
            workspace.run(script, *ARGUMENTS[script])
            shutil.copytree(workspace.output, self.after(script))
        self.final = workspace

    def after(self, script: str) -> Path:
        return self.root / Path(script).stem

    def before(self, script: str, output: Path) -> Workspace:
        """A workspace of its own, in which this script is the next to run."""
        position = list(ARGUMENTS).index(script)
        if position:
            shutil.copytree(self.after(list(ARGUMENTS)[position - 1]), output)
        return Workspace(self.model, self.data, output)


@pytest.fixture(scope="module")
def reference(make_workspace, tmp_path_factory) -> Reference:
    return Reference(make_workspace("pythia"), tmp_path_factory.mktemp("reference"))


def results(folder: Path) -> dict[str, object]:
    """Every file in a folder, by relative path; manifests without the seconds that the work took."""
    found: dict[str, object] = {}
    for name, (content, _) in contents(folder).items():
        if name.endswith("manifest.json"):
            found[name] = {key: value for key, value in json.loads(content).items() if key != "seconds"}
        else:
            found[name] = content
    return found


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = results(folder), results(expected)
    assert sorted(found) == sorted(wanted)
    assert [name for name in found if found[name] != wanted[name]] == []


# ----------------------------------------------------------------------------------------------- finished steps


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("script", ARGUMENTS)
def test_a_second_run_computes_nothing_and_changes_nothing(reference, monkeypatch, script, overwrite):
    for loader in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *_, **__: pytest.fail("a model or tokenizer is loaded"))
    monkeypatch.setattr(load_script(STEP_3), "greedy_dpp", lambda *_: pytest.fail("the greedy runs"))
    before = contents(reference.final.output)
    reference.final.run(script, *ARGUMENTS[script], "--OVERWRITE", overwrite)
    assert contents(reference.final.output) == before


def test_an_evaluation_reads_what_step_5_measured(reference, monkeypatch):
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )
    before = contents(reference.final.output)
    for script in EVALUATIONS:
        reference.final.run(script, "--SPLIT", "test")
    assert contents(reference.final.output) == before


def test_a_repaired_model_is_evaluated_from_what_step_5_measured(reference, monkeypatch):
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model is loaded")
    )
    folder = reference.final.output / "gradient_ascent_models" / "bias_pythia-tiny_dpp_ifweight10_bottom5_lr0.01"
    repaired = Workspace(folder, reference.final.data, reference.final.output)
    before = contents(repaired.output)
    repaired.run(EVALUATIONS[1])
    assert contents(repaired.output) == before


# ------------------------------------------------------------------------------------------------ killed steps

Kill = Callable[[pytest.MonkeyPatch, type[BaseException]], None]


def at_call(owner: Callable[[], object], name: str, number: int = 1) -> Kill:
    """Stop where a function is called for the n-th time."""

    def install(monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
        original, calls = getattr(owner(), name), Counter()

        def counted(*arguments, **keywords):
            calls[name] += 1
            if calls[name] == number:
                raise stop
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner(), name, counted)

    return install


def at_rename(target: str, number: int = 1) -> Kill:
    """Stop where a file or folder is to get its final name, for the n-th time under that name."""

    def install(monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]) -> None:
        original, renames = Path.replace, Counter()

        def counted(path: Path, to: Path) -> Path:
            renames[Path(to).name] += 1
            if Path(to).name == target and renames[target] == number:
                raise stop
            return original(path, to)

        monkeypatch.setattr(Path, "replace", counted)

    return install


def in_script(script: str) -> Callable[[], object]:
    return lambda: load_script(script)


REPAIRED = "bias_pythia-tiny_dpp_ifweight10_bottom5_lr0.02"
KILLS: dict[str, tuple[str, Kill]] = {
    "while the covariances are summed": (STEP_1, at_call(lambda: traced_model.BatchLoader, "collate", 2)),
    "between two covariance files": (STEP_1, at_rename("gradient_covariance.safetensors")),
    "before the eigendecompositions": (STEP_1, at_call(lambda: factors, STAGES["eigenbases"])),
    "before the Lambda matrices": (STEP_1, at_call(lambda: factors, STAGES["lambdas"])),
    "before the Lambda matrices are saved": (STEP_1, at_rename("lambda_matrix.safetensors")),
    "before the manifest of the factors": (STEP_1, at_rename("manifest.json")),
    "before the factors get their name": (STEP_1, at_rename("factors_ekfac")),
    "after the factors": (STEP_1, at_call(in_script(STEP_1), "pairs_gradient")),
    "in the middle of the scores": (STEP_1, at_call(lambda: tasks.backward_task, "sequence_nll", 2)),
    "before the first scores are saved": (STEP_1, at_rename("pairwise_scores.safetensors")),
    "between scores and manifest": (STEP_1, at_rename("pairwise_scores.manifest.json")),
    "between the tasks' scores": (STEP_1, at_rename("pairwise_scores.manifest.json", 2)),
    "in the middle of the representations": (STEP_2, at_call(in_script(STEP_2), "last_hidden_state", 2)),
    "before the representations are saved": (STEP_2, at_rename("pythia-tiny_sumreps.safetensors")),
    "between representations and manifest": (STEP_2, at_rename("pythia-tiny_sumreps.manifest.json")),
    "between two tasks' subsets": (STEP_3, at_call(in_script(STEP_3), "greedy_dpp", 2)),
    "between subset and manifest": (STEP_3, at_rename("ethics_pythia-tiny_indices_5_ifweight10.manifest.json")),
    "between two tasks' gradients": (STEP_4, at_call(in_script(STEP_4), "make_gradient", 2)),
    "between gradient and manifest": (STEP_4, at_rename("aggregated_query_grads.manifest.json", 3)),
    "before a checkpoint is saved": (STEP_5, at_call(lambda: PreTrainedModel, "save_pretrained", 2)),
    "before a checkpoint gets its name": (STEP_5, at_rename(REPAIRED)),
    "before a checkpoint is measured": (STEP_5, at_call(lambda: evaluation, "evaluate_dialogues", 3)),
    "between losses and their manifest": (STEP_5, at_rename("pythia-tiny_bias_test_losses.manifest.json")),
    "between losses and the result": (STEP_5, at_rename("pythia-tiny_bias_test.json")),
    "between a result and its manifest": (STEP_5, at_rename("pythia-tiny_bias_test.manifest.json")),
    "before the report": (STEP_5, at_rename("repair.json", 2)),
    "before the model card": (STEP_5, at_rename("README.md")),
    "before an evaluation": (EVALUATIONS[0], at_call(lambda: evaluation, "evaluate_dialogues")),
    "between an evaluation and its manifest": (EVALUATIONS[2], at_rename("pythia-tiny_ethics_train.manifest.json")),
}


@pytest.mark.parametrize("point", KILLS)
def test_killed_and_run_again(reference, tmp_path, monkeypatch, capsys, point):
    script, kill = KILLS[point]
    workspace = reference.before(script, tmp_path / "output")
    with monkeypatch.context() as patch:
        kill(patch, KeyboardInterrupt)
        with pytest.raises(SystemExit) as stop:
            workspace.run(script, *ARGUMENTS[script])
    assert stop.value.code == 130
    assert "stopped; finished work is kept, run the same command to continue" in capsys.readouterr().err
    workspace.run(script, *ARGUMENTS[script])
    assert_same(workspace.output, reference.after(script))


@pytest.mark.parametrize("point", ["before the Lambda matrices are saved", "before a checkpoint gets its name"])
def test_failed_and_run_again(reference, tmp_path, monkeypatch, point):
    """As with a full disk: the error is shown, and nothing half-made is taken for whole."""
    script, kill = KILLS[point]
    workspace = reference.before(script, tmp_path / "output")
    with monkeypatch.context() as patch:
        kill(patch, OSError)
        with pytest.raises((OSError, SystemExit)):
            workspace.run(script, *ARGUMENTS[script])
    workspace.run(script, *ARGUMENTS[script])
    assert_same(workspace.output, reference.after(script))


def counting_stages(monkeypatch: pytest.MonkeyPatch) -> Counter:
    fitted = Counter()
    for stage, name in STAGES.items():
        original = getattr(factors, name)

        def counted(*arguments, stage=stage, original=original, **keywords):
            fitted[stage] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(factors, name, counted)
    return fitted


@pytest.mark.parametrize(
    ("point", "fitted_again"),
    [
        ("while the covariances are summed", {"covariances", "eigenbases", "lambdas"}),
        ("between two covariance files", {"covariances", "eigenbases", "lambdas"}),
        ("before the eigendecompositions", {"eigenbases", "lambdas"}),
        ("before the Lambda matrices", {"lambdas"}),
        ("before the manifest of the factors", set()),
        ("before the factors get their name", set()),
        ("in the middle of the scores", set()),
    ],
)
def test_finished_stages_of_the_factors_are_not_fitted_again(reference, tmp_path, monkeypatch, point, fitted_again):
    workspace = reference.before(STEP_1, tmp_path / "output")
    with monkeypatch.context() as patch:
        KILLS[point][1](patch, KeyboardInterrupt)
        with pytest.raises(SystemExit):
            workspace.run(STEP_1)
    fitted = counting_stages(monkeypatch)
    workspace.run(STEP_1)
    assert fitted == dict.fromkeys(fitted_again, 1)


def test_finished_scores_are_not_computed_again(reference, tmp_path, monkeypatch):
    workspace = reference.before(STEP_1, tmp_path / "output")
    with monkeypatch.context() as patch:
        at_rename("pairwise_scores.manifest.json", 2)(patch, KeyboardInterrupt)
        with pytest.raises(SystemExit):
            workspace.run(STEP_1)
    script, measured = load_script(STEP_1), []
    original = script.pairs_gradient
    monkeypatch.setattr(
        script,
        "pairs_gradient",
        lambda traced, task, *rest: (measured.append(task.name), original(traced, task, *rest))[1],
    )
    workspace.run(STEP_1)
    assert measured == ["ethics", "truth"]


def test_what_other_settings_left_unfinished_is_not_used(reference, tmp_path, monkeypatch):
    workspace = reference.before(STEP_1, tmp_path / "output")
    with monkeypatch.context() as patch:
        KILLS["before the Lambda matrices"][1](patch, KeyboardInterrupt)
        with pytest.raises(SystemExit):
            workspace.run(STEP_1, "--NUM_FACTOR_EXAMPLES", 20)
    assert (tmp_path / "output" / f"{FACTORS}.partial" / "gradient_eigenvectors.safetensors").exists()
    workspace.run(STEP_1)
    assert_same(workspace.output, reference.after(STEP_1))


@pytest.mark.parametrize(
    ("script", "others", "kill"),
    [
        (STEP_1, ["--NUM_BLOCKS", 2], KILLS["before the Lambda matrices"][1]),
        (STEP_2, ["--MAX_LENGTH", 9], at_call(in_script(STEP_2), "last_hidden_state")),
        (STEP_4, ["--GRADIENT_REDUCTION_TYPE", "sum"], at_call(in_script(STEP_4), "make_gradient")),
    ],
)
def test_what_is_being_replaced_stays_whole_until_then(reference, tmp_path, monkeypatch, script, others, kill):
    workspace = Workspace(reference.model, reference.data, tmp_path / "output")
    shutil.copytree(reference.after(script), workspace.output)
    with monkeypatch.context() as patch:
        kill(patch, KeyboardInterrupt)
        with pytest.raises(SystemExit) as stop:
            workspace.run(script, *ARGUMENTS[script], *others, "--OVERWRITE", True)
    assert stop.value.code == 130
    before, after = contents(reference.after(script)), contents(workspace.output)
    assert {name: after[name] for name in before} == before
    assert all(".partial" in name for name in set(after) - set(before))

    workspace.run(script, *ARGUMENTS[script], *others, "--OVERWRITE", True)
    fresh = reference.before(script, tmp_path / "fresh")
    fresh.run(script, *ARGUMENTS[script], *others)
    assert_same(workspace.output, fresh.output)


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_stray_or_truncated_file_in_an_unfinished_folder_is_made_again(reference, tmp_path, monkeypatch, content):
    """None stands for a link to a file of somebody's."""
    workspace = reference.before(STEP_1, tmp_path / "output")
    with monkeypatch.context() as patch:
        patch.setattr(factors, "fit_lambdas", stop_here)
        with pytest.raises(SystemExit):
            workspace.run(STEP_1)
    partial = workspace.output / f"{FACTORS}.partial"
    precious = tmp_path / "precious"
    precious.write_text("kept", encoding="utf-8")
    for name in ("activation_covariance.safetensors", "lambda_matrix.safetensors", ".tmp123", "stray"):
        (partial / name).unlink(missing_ok=True)
        if content is None:
            (partial / name).symlink_to(precious)
        else:
            (partial / name).write_bytes(content)
    (partial / "lambda_matrix.safetensors.partial").mkdir()
    workspace.run(STEP_1)
    assert_same(workspace.output, reference.after(STEP_1))
    assert precious.read_text(encoding="utf-8") == "kept"


def stop_here(*_: object) -> None:
    raise KeyboardInterrupt


def test_killed_for_good_in_step_1(reference, tmp_path, monkeypatch):
    """A real process and a real SIGKILL, sent when the covariances are there."""
    workspace = reference.before(STEP_1, tmp_path / "output")
    command = [sys.executable, str(PROJECT_ROOT / STEP_1), *workspace.arguments(STEP_1)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the sums depend on it
    last_covariance = workspace.output / f"{FACTORS}.partial" / "num_gradient_covariance_processed.safetensors"
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **threads}
    ) as process:
        while process.poll() is None and not last_covariance.exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (workspace.output / FACTORS).exists()
    fitted = counting_stages(monkeypatch)
    workspace.run(STEP_1)
    assert fitted["covariances"] == 0
    assert_same(workspace.output, reference.after(STEP_1))


# ------------------------------------------------------------------------------------------------------ sweeps


def test_a_stopped_sweep_goes_on(reference, tmp_path, monkeypatch):
    workspace = reference.before(STEP_5, tmp_path / "output")
    with monkeypatch.context() as patch:
        at_rename(REPAIRED)(patch, KeyboardInterrupt)
        with pytest.raises(SystemExit):
            workspace.run(STEP_5, *ARGUMENTS[STEP_5])
    done = contents(workspace.output / "gradient_ascent_models" / REPAIRED.replace("0.02", "0.01"))
    assert {"repair.json", "README.md", "model.safetensors"} <= set(done)
    workspace.run(STEP_5, *ARGUMENTS[STEP_5])
    assert contents(workspace.output / "gradient_ascent_models" / REPAIRED.replace("0.02", "0.01")) == done
    assert_same(workspace.output, reference.after(STEP_5))


def test_every_checkpoint_of_a_sweep_has_the_models_own_tokenizer(reference):
    checkpoints = list((reference.final.output / "gradient_ascent_models").iterdir())
    assert len(checkpoints) == 6
    for checkpoint in checkpoints:
        assert (checkpoint / "tokenizer.json").read_bytes() == (reference.model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("saved_first", [False, True])
def test_a_repair_may_be_measured_first_and_saved_later_and_the_other_way_round(
    reference, tmp_path, monkeypatch, saved_first
):
    workspace = reference.before(STEP_5, tmp_path / "output")
    workspace.run(STEP_5, *ARGUMENTS[STEP_5], "--SAVE_TO_DISK", saved_first)
    assert (workspace.output / "gradient_ascent_models").exists() == saved_first
    for name in ("evaluate_dialogues", "evaluate_pairs"):
        monkeypatch.setattr(evaluation, name, lambda *_: pytest.fail("it is measured again"))
    workspace.run(STEP_5, *ARGUMENTS[STEP_5], "--SAVE_TO_DISK", not saved_first)
    workspace.run(STEP_5, *ARGUMENTS[STEP_5])
    assert_same(workspace.output, reference.after(STEP_5))


def test_scores_of_tokens_are_added_to_finished_scores(reference, tmp_path):
    workspace = Workspace(reference.model, reference.data, tmp_path / "output")
    shutil.copytree(reference.after(STEP_1), workspace.output)
    workspace.run(STEP_1, "--COMPUTE_PER_TOKEN_SCORES", True)
    before, after = contents(reference.after(STEP_1)), contents(workspace.output)
    assert {name: after[name] for name in before} == before
    added = sorted(Path(name).name for name in set(after) - set(before))
    assert added == ["per_token_scores.manifest.json"] * 3 + ["per_token_scores.safetensors"] * 3


def test_a_longer_sweep_computes_only_what_is_new(reference, tmp_path):
    workspace = Workspace(reference.model, reference.data, tmp_path / "output")
    shutil.copytree(reference.after(STEP_5), workspace.output)
    workspace.run(STEP_5, *DPP, "--LEARNING_RATE", 0.01, 0.03, 0.02)
    before, after = contents(reference.after(STEP_5)), contents(workspace.output)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {name for name in before if "_sweep." in name}
    assert {name for name in set(after) - set(before) if "lr0.03" not in name} == set()
    assert len([name for name in after if name.endswith("lr0.03/model.safetensors")]) == 3
