"""Code that comes with a model: it runs where TRUST_REMOTE_CODE allows it, and nowhere else."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import pytest
import torch
from conftest import Workspace, run_process, run_script

from data.official.sources import Source, hub_rows
from utils.completions import greedy_completions
from utils.console import UserError
from utils.evaluation import EvaluationModel
from utils.files import read_json
from utils.fine_tuning import Progress
from utils.hub import remote_code
from utils.model_fingerprints import model_fingerprint, tokenizer_fingerprint
from utils.models import load_model, load_tokenizer
from utils.performance_functions.hh import read_dialogues

STEP_0, STEP_1, STEP_4 = "data/make_sft_model.py", "compute_factors_and_scores.py", "make_gradients.py"
STEP_5, BIAS, PREPARE = "gradient_ascent_and_save.py", "evaluation_scripts/bias_loss.py", "data/prepare.py"
IDENTITY = ["--FACTOR_STRATEGY", "identity", "--TASK_NAME", "bias"]
REPAIR = ["--TASK_NAME", "bias", "--BOTTOM_K", 5]
TRUST = ["--TRUST_REMOTE_CODE", True]

OWN_CODE = """
from transformers import Qwen2Config, Qwen2ForCausalLM

open({mark!r}, "w").close()


class OwnConfig(Qwen2Config):
    model_type = {model_type!r}


class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
"""


class Brought(Workspace):
    """A workspace whose model brings code; `mark` exists once that has run."""

    mark: Path


@pytest.fixture
def nobody_is_asked(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody is asked"))


@pytest.fixture
def bring(tiny_models, small_data, tmp_path, nobody_is_asked):
    """Makes a workspace with a model of a type whose code comes with it."""

    def make(model_type: str) -> Brought:
        folder = Path(shutil.copytree(tiny_models["qwen"], tmp_path / "brought"))
        config = read_json(folder / "config.json")
        auto_map = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
        config |= {"model_type": model_type, "auto_map": auto_map}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        brought = Brought(folder, small_data, tmp_path / "output")
        brought.mark = tmp_path / "it ran"
        code = OWN_CODE.format(mark=str(brought.mark), model_type=model_type)
        (folder / "own_code.py").write_text(code, encoding="utf-8")
        return brought

    return make


@pytest.mark.parametrize("script", [STEP_1, "representations/train_reps.py", "dpp/greedy_dpp.py", STEP_4, STEP_5, BIAS])
def test_a_model_that_needs_its_own_code_is_refused_in_one_line(bring, capsys, script):
    brought = bring("a_new_kind")
    with pytest.raises(SystemExit):
        brought.run(script)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {brought.model}: needs code of its own (auto_map in config.json: ")
    assert "own_code.OwnConfig" in line
    assert "set TRUST_REMOTE_CODE = True" in line
    assert not brought.mark.exists()


def test_a_known_type_that_is_no_decoder_without_its_own_code_is_refused_in_one_line(bring, capsys):
    """transformers finds out only when it looks for the class, not when it reads the configuration."""
    brought = bring("t5")
    config = read_json(brought.model / "config.json")
    del config["auto_map"]["AutoConfig"]
    (brought.model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SystemExit):
        brought.run(STEP_1)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {brought.model}: needs code of its own (auto_map in config.json: ")
    assert "own_code.OwnModel" in line
    assert not brought.mark.exists()


def test_fine_tuning_refuses_it_too(bring, capsys):
    brought = bring("a_new_kind")
    arguments = ["--BASE_MODEL", brought.model, "--HH_DATASET", brought.data / "hh"]
    with pytest.raises(SystemExit):
        run_script(STEP_0, *arguments, "--SFT_MODEL_DIR", brought.output / "sft")
    assert "needs code of its own" in capsys.readouterr().err
    assert not brought.mark.exists()


def test_a_model_of_a_known_type_is_loaded_without_its_own_code(bring, capsys):
    brought = bring("qwen2")
    brought.run(BIAS)
    assert "has code of its own, which is not run: TRUST_REMOTE_CODE = False" in capsys.readouterr().out
    assert not brought.mark.exists()
    manifest = read_json(brought.output / "results" / "brought_bias_test.manifest.json")
    assert manifest["trust_remote_code"] is False


def test_code_that_is_allowed_runs_and_its_model_is_repaired(bring):
    brought = bring("a_kind_of_my_own")
    brought.run(STEP_1, *IDENTITY, *TRUST)
    assert brought.mark.exists()
    brought.run(STEP_4, *IDENTITY, *REPAIR, *TRUST)
    brought.run(STEP_5, *REPAIR, *TRUST, "--COMPUTE_ANTHROPIC_EVAL", False)
    (folder,) = (brought.output / "gradient_ascent_models").iterdir()
    assert read_json(folder / "manifest.json")["trust_remote_code"] is True
    assert str(brought.model) not in (folder / "config.json").read_text(encoding="utf-8")
    before = {file: file.stat().st_mtime_ns for file in (brought.output / "results").glob("*.*")}
    Brought(folder, brought.data, brought.output).run(BIAS, *TRUST)  # loads it as a model
    assert before == {file: file.stat().st_mtime_ns for file in (brought.output / "results").glob("*.*")}


def test_permission_ends_with_the_run(bring, capsys):
    brought = bring("another_kind")
    brought.run(BIAS, *TRUST)
    assert brought.mark.exists()
    with pytest.raises(SystemExit):
        brought.run(BIAS, "--SPLIT", "train")
    assert "needs code of its own" in capsys.readouterr().err


def test_a_tokenizers_code_does_not_run_either(workspace, tmp_path, nobody_is_asked):
    folder = Path(shutil.copytree(workspace.model, tmp_path / "brought"))
    config = read_json(folder / "tokenizer_config.json")
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')", encoding="utf-8")
    with suppress(UserError):  # transformers 5 takes a class of its own instead
        load_tokenizer(str(folder))
    assert not (tmp_path / "it ran").exists()


# ------------------------------------------------------------------------------------------ other ways for code to come


class Payload:
    """Leaves its mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path, monkeypatch) -> Iterator[Path]:
    """A file that exists once hostile code has run; whoever asks on the terminal is told "y"."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    yield tmp_path / "it ran"
    assert not (tmp_path / "it ran").exists()


def change_json(file: Path, **more: object) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(content | more), encoding="utf-8")


def marking(mark: Path) -> str:
    """Code of a module that has whatever is looked for in it."""
    return f"open({str(mark)!r}, 'w').close()\n\n\ndef __getattr__(name):\n    return dict\n"


def own_files(folder: Path, mark: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(marking(mark), encoding="utf-8")


def config_of_a_known_type(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "m.py")
    change_json(folder / "config.json", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"})


def config_of_the_hub(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "m.py")
    change_json(folder / "config.json", auto_map={"AutoConfig": "owner/name--m.C", "AutoModelForCausalLM": "a/b--m.M"})


def config_of_a_new_type(folder: Path, mark: Path) -> None:
    config_of_the_hub(folder, mark)
    change_json(folder / "config.json", model_type="new")


def class_names(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "evil.py")
    change_json(folder / "config.json", architectures=["evil.M"], tokenizer_class="evil.T", transformers_version="9")


def tokenizer_of_the_hub(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "m.py")
    auto_map = {"AutoTokenizer": ["owner/name--m.T", "owner/name--m.T"]}
    change_json(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=auto_map)


def tokenizer_of_its_own(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "m.py")
    change_json(folder / "tokenizer_config.json", tokenizer_class="m.T", auto_map={"AutoTokenizer": ["m.T", "m.T"]})


def processors(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "m.py")
    for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        change_json(folder / file, auto_map={"AutoProcessor": "m.P", "AutoImageProcessor": "m.P"})


def generation(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "custom_generate/generate.py")
    change_json(folder / "generation_config.json", custom_generate=str(folder), penalty_alpha=0.6, top_k=4)


def constrained_generation(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "custom_generate/generate.py")
    change_json(folder / "generation_config.json", num_beams=2, num_beam_groups=2, trust_remote_code=True)


def chat_template(folder: Path, mark: Path) -> None:
    template = "{{ ''.__class__.__base__.__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch MARK') }}"
    template = template.replace("MARK", str(mark))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    change_json(folder / "tokenizer_config.json", chat_template=template)


def modules_beside_it(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "torch.py", "sitecustomize.py", "usercustomize.py", "__init__.py", "modeling_qwen2.py")
    own_files(folder, mark, "conftest.py", "setup.py", "tokenization_qwen2.py", "configuration_qwen2.py")


def quantizer(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "evil.py")
    change_json(folder / "config.json", quantization_config={"quant_method": "evil", "auto_map": "evil.Q"})


def adapter(folder: Path, mark: Path) -> None:
    own_files(folder, mark, "evil.py")
    mapping = {"base_model_class": "M", "parent_library": "evil"}
    change_json(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="a/b", auto_mapping=mapping)
    torch.save({"x": Payload(mark)}, folder / "adapter_model.bin")


def pickled_weights(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(mark)}, folder / "pytorch_model.bin")


def old_pickled_weights(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Payload(mark), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def bare_pickle(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))


def pickled_shards(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(mark)}, folder / "pytorch_model-00001-of-00001.bin")
    weights = {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}
    change_json(folder / "pytorch_model.bin.index.json", metadata={"total_size": 1}, weight_map=weights)


def pickles_beside_it(folder: Path, mark: Path) -> None:
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "pytorch_model.bin",
        "model.pkl",
    ):
        torch.save(Payload(mark), folder / name)


TRAPS = [
    *(config_of_a_known_type, config_of_the_hub, config_of_a_new_type, class_names),
    *(tokenizer_of_the_hub, tokenizer_of_its_own, processors, generation, constrained_generation, chat_template),
    *(modules_beside_it, quantizer, adapter),
    *(pickled_weights, old_pickled_weights, bare_pickle, pickled_shards, pickles_beside_it),
]


@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_in_a_models_folder_runs(tiny_models, small_data, tmp_path, monkeypatch, mark, trap):
    folder = Path(shutil.copytree(tiny_models["qwen"], tmp_path / "model"))
    trap(folder, mark)
    monkeypatch.chdir(folder)
    with suppress(SystemExit):  # most are measured, some refused
        Workspace(folder, small_data, tmp_path / "output").run(BIAS)
    with suppress(UserError):
        model = load_model(str(folder), torch.device("cpu"))
        greedy_completions(EvaluationModel(model, load_tokenizer(str(folder), model)), ["Hello"])
    with suppress(UserError):
        tokenizer_fingerprint(str(folder))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_experts_implementation"])
@pytest.mark.parametrize("kernel", ["owner/kernel", "owner/kernel@main:attention", {"": "owner/kernel"}])
def test_no_kernel_of_the_hub_is_loaded(tiny_models, tmp_path, monkeypatch, capsys, mark, key, kernel):
    folder = Path(shutil.copytree(tiny_models["qwen"], tmp_path / "model"))
    change_json(folder / "config.json", **{key: kernel})
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError) as refusal:
        load_model(str(folder), torch.device("cpu"))
    assert "owner/kernel" in str(refusal.value)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"])
def test_no_pickle_runs_where_a_fine_tuning_resumes(small_data, tmp_path, monkeypatch, mark, name):
    arguments = ["--HH_DATASET", small_data / "hh", "--NUM_EPOCHS", 1, "--SAVE_EVERY", 1]
    with monkeypatch.context() as patch:
        steps = []
        patch.setattr(Progress, "on_step_end", lambda *_, **__: steps.append(1) if len(steps) < 2 else stop())
        with pytest.raises(SystemExit):
            run_script(STEP_0, *arguments, "--SFT_MODEL_DIR", tmp_path / "sft")
    (checkpoint,) = (tmp_path / "sft.partial").glob("checkpoint-*")
    torch.save(Payload(mark), checkpoint / name)
    with suppress(SystemExit):  # nobody can go on from some of them
        run_script(STEP_0, *arguments, "--SFT_MODEL_DIR", tmp_path / "sft")


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["{}.py", "hh.py", "dataset.py", "train.py", "__init__.py"])
def test_no_script_of_a_data_set_runs(workspace, monkeypatch, mark, name):
    folder = workspace.data / "hh"
    own_files(folder, mark, name.format(folder.name))
    change_json(folder / "dataset_infos.json", default={})
    monkeypatch.chdir(folder)
    workspace.run(BIAS)
    run_script("evaluation_scripts/anthropic_eval.py", *workspace.arguments("evaluation_scripts/anthropic_eval.py"))


def test_a_script_of_a_data_set_of_the_hub_is_not_asked_about(tmp_path, monkeypatch, nobody_is_asked):
    allowed = []

    def load(*_: object, **__: object) -> None:
        allowed.append(datasets.config.HF_DATASETS_TRUST_REMOTE_CODE)  # what versions before 4 go by
        raise ValueError

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.config.HF_DATASETS_TRUST_REMOTE_CODE", None, raising=False)
    monkeypatch.chdir(tmp_path)
    for is_allowed in (False, True):
        with pytest.raises(UserError), remote_code(is_allowed):
            read_dialogues("owner/name", "train")
    with pytest.raises(UserError):
        hub_rows(Source("HH_SOURCE", "owner/name", "a folder", None), None, "train")
    assert allowed == [False, True, False]


def test_a_folder_in_the_working_directory_is_not_taken_for_the_hubs(tiny_models, tmp_path, monkeypatch, mark):
    shutil.copytree(tiny_models["qwen"], tmp_path / "owner" / "name")
    own_files(tmp_path / "owner" / "name", mark, "name.py")
    monkeypatch.chdir(tmp_path)
    for use in (load_tokenizer, model_fingerprint, tokenizer_fingerprint, lambda name: read_dialogues(name, "train")):
        with pytest.raises(UserError, match="owner/name: is in the working directory"):
            use("owner/name")


def test_the_authors_code_is_parsed_and_never_run(tmp_path, mark):
    code = f"open({str(mark)!r}, 'w')\nPROMPT = __import__('os').system('touch \"{mark}\"')\n"
    for name in ("bias_dataset.py", "ethics_dataset.py"):
        (tmp_path / name).write_text(code, encoding="utf-8")
    for part, name in (("bias", "bias_dataset.py"), ("prompt", "ethics_dataset.py")):
        for source in (tmp_path, tmp_path / name):
            with pytest.raises(SystemExit):
                run_script(PREPARE, "--DATA_DIR", tmp_path / "data", "--ONLY", part, f"--{part.upper()}_SOURCE", source)


NAMES_OF_MODULES = (
    "torch",
    "transformers",
    "datasets",
    "steps",
    "json",
    "sitecustomize",
    "usercustomize",
    "antigravity",
)


@pytest.mark.parametrize("script", [STEP_4, STEP_0, BIAS])
def test_no_module_of_the_working_directory_or_the_output_folder_is_imported(workspace, tmp_path, mark, script):
    here = tmp_path / "here"
    for folder in (here, workspace.output, workspace.data, workspace.data / "hh"):
        folder.mkdir(exist_ok=True)
        own_files(folder, mark, *(f"{name}.py" for name in NAMES_OF_MODULES), "utils/__init__.py", "tasks/__init__.py")
        (folder / ".env").write_text("HUB_TOKEN=of-somebody-else\nPYTHONSTARTUP=torch.py\n", encoding="utf-8")
        (folder / "pyproject.toml").write_text("[", encoding="utf-8")
    ran = run_process(script, "--no_such", "1", cwd=here, input="y\n" * 10)
    assert "error: unknown constant --no_such" in ran.stderr
    if script == BIAS:
        ran = run_process(script, *workspace.arguments(script), cwd=here, input="y\n" * 10)
        assert ran.returncode == 0, ran.stderr


def test_completions_are_greedy_whatever_the_folder_asks_for(tiny_models, tmp_path, mark):
    folder = Path(shutil.copytree(tiny_models["qwen"], tmp_path / "model"))
    completions = []
    for more in ({}, {"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 3, "repetition_penalty": 9.0, "max_length": 3}):
        change_json(folder / "generation_config.json", **more)
        model = load_model(str(folder), torch.device("cpu"))
        before = model.generation_config.to_dict()
        evaluated = EvaluationModel(model, load_tokenizer(str(folder), model))
        completions.append(greedy_completions(evaluated, ["\n\nHuman: Hello\n\nAssistant:"]))
        assert model.generation_config.to_dict() == before, "it is saved with a repaired model"
    assert completions == completions[:1] * 3
