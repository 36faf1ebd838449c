"""The constants at the top of the scripts: overriding them, refusing what is wrong, and keeping them alike."""

from __future__ import annotations

import re
import typing
from typing import Literal

import pytest
from conftest import load_script, run_script

from utils import hub
from utils import settings as settings_module
from utils.console import UserError
from utils.hub import HubAccess, hub_access
from utils.paths import PROJECT_ROOT
from utils.settings import load_settings

STEPS = {
    1: "compute_factors_and_scores.py",
    2: "representations/train_reps.py",
    3: "dpp/greedy_dpp.py",
    4: "make_gradients.py",
    5: "gradient_ascent_and_save.py",
}
EVALUATIONS = [f"evaluation_scripts/{name}.py" for name in ("anthropic_eval", "bias_loss", "ethics_loss", "truth_loss")]
PIPELINE = [*STEPS.values(), *EVALUATIONS]
SCRIPTS = ["data/make_sft_model.py", *PIPELINE]

FACTORS = {"NUM_BLOCKS", "FACTOR_STRATEGY", "NUM_FACTOR_EXAMPLES", "DAMPING_FACTOR", "USE_HALF_PRECISION"}
COMMON = {"MODEL_FAMILY", "HH_DATASET", "OUTPUT_DIR", "TRUST_REMOTE_CODE", "OVERWRITE"}
PROMISED = {
    1: {
        *{"MODEL_NAMES", "DATA_DIR", "SEED", "DEVICE", "TASK_NAME", *FACTORS, "FISHER_POSITIONS"},
        *{"COMPUTE_PER_TOKEN_SCORES", "TOKENS_PER_BATCH", "CG_ITERATIONS", "CG_TOLERANCE"},
    },
    2: {"MODEL_NAME", "DATA_DIR", "DEVICE", "MAX_LENGTH", "TOKENS_PER_BATCH"},
    3: {"MODEL_NAME", "SEED", "TASK_NAME", "BOTTOM_K", "IF_WEIGHT", "KERNEL", "NUM_FEATURES", "GAMMA"},
    4: {
        *{"MODEL_NAMES", "DATA_DIR", "SEED", "DEVICE", "TASK_NAME", "BOTTOM_K", "SCORES_TYPE", "IF_WEIGHT"},
        *{"GRADIENT_REDUCTION_TYPE", "TASK_WEIGHTS", "FACTOR_STRATEGY", "DAMPING_FACTOR", "USE_HALF_PRECISION"},
    },
    5: {
        *{"MODEL_NAME", "DATA_DIR", "SEED", "DEVICE", "TASK_NAME", "SCORES_TYPE", "BOTTOM_K", "IF_WEIGHT"},
        *{"LEARNING_RATE", "SAVE_TO_DISK"},
        *{"PUSH_TO_HUB", "HUB_USERNAME", "COMPUTE_ANTHROPIC_EVAL", "COMPUTE_TASK_EVAL"},
    },
}
AFTER = [f"evaluation_scripts/{name}.py" for name in ("list_harmful", "paper_tables", "validate_scores", "robustness")]
FAKE_TOKEN = "hf_not_a_real_token"


def schema_of(script: str) -> dict[str, typing.Any]:
    hints = typing.get_type_hints(load_script(script), include_extras=True)
    return {name: hint for name, hint in hints.items() if name.isupper()}


def settings_of(script: str, *arguments: str) -> settings_module.Settings:
    return load_settings(load_script(script), arguments)


@pytest.fixture
def env_file(tmp_path, monkeypatch):
    """A repository whose `.env` the test writes, and an environment without the hub's variables."""
    monkeypatch.setattr(hub, "PROJECT_ROOT", tmp_path)
    for name in (*hub.TOKEN_VARIABLES, "HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / ".env"


# -------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("script", "words", "name", "expected"),
    [
        (STEPS[4], ["--BOTTOM_K", "50"], "BOTTOM_K", 50),
        (STEPS[4], ["--BOTTOM_K=50"], "BOTTOM_K", 50),
        (STEPS[4], ["--BOTTOM_K", "7", "--BOTTOM_K", "50"], "BOTTOM_K", 50),
        (STEPS[4], ["--IF_WEIGHT", "0.5"], "IF_WEIGHT", 0.5),
        (STEPS[4], ["--IF_WEIGHT", "1e-3"], "IF_WEIGHT", 0.001),
        (STEPS[4], ["--IF_WEIGHT", "0"], "IF_WEIGHT", 0.0),
        (STEPS[4], ["--USE_HALF_PRECISION", "True"], "USE_HALF_PRECISION", True),
        (STEPS[5], ["--SAVE_TO_DISK=False"], "SAVE_TO_DISK", False),
        (STEPS[1], ["--DAMPING_FACTOR", "None"], "DAMPING_FACTOR", None),
        (STEPS[1], ["--DAMPING_FACTOR", "1e-8"], "DAMPING_FACTOR", 1e-8),
        (STEPS[5], ["--HUB_USERNAME", "None"], "HUB_USERNAME", None),
        (STEPS[5], ["--HUB_USERNAME", "somebody"], "HUB_USERNAME", "somebody"),
        (STEPS[1], ["--MODEL_NAMES", "a/b", "c/d"], "MODEL_NAMES", ["a/b", "c/d"]),
        (STEPS[1], ["--MODEL_NAMES=a/b", "c/d"], "MODEL_NAMES", ["a/b", "c/d"]),
        (STEPS[1], ["--MODEL_NAMES", "a/b"], "MODEL_NAMES", ["a/b"]),
        (STEPS[4], ["--TASK_WEIGHTS", "1", "0.5", "0"], "TASK_WEIGHTS", [1.0, 0.5, 0.0]),
        (STEPS[5], ["--LEARNING_RATE", "0.02"], "LEARNING_RATE", 0.02),
        (STEPS[5], ["--LEARNING_RATE", "0.01", "0.02"], "LEARNING_RATE", [0.01, 0.02]),
        (STEPS[5], ["--LEARNING_RATE", "[0.02]"], "LEARNING_RATE", [0.02]),
        (STEPS[5], ["--LEARNING_RATE", "[0.01, 1]"], "LEARNING_RATE", [0.01, 1.0]),
        ("evaluation_scripts/paper_tables.py", ["--SWEPT_RATES", "0.02"], "SWEPT_RATES", [0.02]),
        (STEPS[3], ["--DATA_DIR", "x", "y", "--DEVICE=cuda", "--BOTTOM_K", "3"], "BOTTOM_K", 3),  # two are not its own
        (STEPS[1], ["--SEED", "4294967295"], "SEED", 4294967295),
        (STEPS[1], ["--TASK_NAME", "ethics"], "TASK_NAME", "ethics"),
        (STEPS[1], ["--TOKENS_PER_BATCH", "auto"], "TOKENS_PER_BATCH", "auto"),
        (STEPS[1], ["--TOKENS_PER_BATCH", "512"], "TOKENS_PER_BATCH", 512),
        (STEPS[1], ["--SEED", "7"], "SEED", 7),
        (STEPS[1], ["--OUTPUT_DIR", "12"], "OUTPUT_DIR", "12"),
        (STEPS[1], ["--OUTPUT_DIR=a=b"], "OUTPUT_DIR", "a=b"),
    ],
)
def test_override(script, words, name, expected):
    value = getattr(settings_of(script, *words), name)
    assert value == expected
    assert type(value) is type(expected)


def test_without_overrides_the_constants_stand():
    module = load_script(STEPS[4])
    assert vars(load_settings(module, [])) == {name: getattr(module, name) for name in schema_of(STEPS[4])}


def test_a_whole_number_for_a_float_is_the_same_setting_as_the_float():
    """Else 10 and 10.0 would have different fingerprints."""
    for name, words in {"LEARNING_RATE": ["1", "2"], "IF_WEIGHT": ["10"]}.items():
        value = getattr(settings_of(STEPS[5], f"--{name}", *words), name)
        assert {type(number) for number in (value if isinstance(value, list) else [value])} == {float}


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        (STEPS[4], ["--BOTTOM_K", "0"], ["BOTTOM_K = 0", "whole number of at least 1"]),
        (STEPS[4], ["--BOTTOM_K", "-5"], ["BOTTOM_K = -5", "whole number of at least 1"]),
        (STEPS[4], ["--BOTTOM_K", "2.5"], ["BOTTOM_K = 2.5", "whole number"]),
        (STEPS[4], ["--BOTTOM_K", "many"], ["BOTTOM_K = many", "whole number"]),
        (STEPS[4], ["--BOTTOM_K", "True"], ["BOTTOM_K = True", "whole number"]),
        (STEPS[4], ["--BOTTOM_K"], ["BOTTOM_K = nothing", "whole number"]),
        (STEPS[4], ["--BOTTOM_K", "5", "6"], ["BOTTOM_K = 5 6", "whole number"]),
        (STEPS[4], ["--IF_WEIGHT", "-1"], ["IF_WEIGHT = -1", "number of at least 0"]),
        (STEPS[4], ["--IF_WEIGHT", "nan"], ["IF_WEIGHT = nan", "number of at least 0"]),
        (STEPS[4], ["--IF_WEIGHT", "inf"], ["IF_WEIGHT = inf", "number of at least 0"]),
        (STEPS[4], ["--IF_WEIGHT", "None"], ["IF_WEIGHT = None", "number of at least 0"]),
        (STEPS[3], ["--GAMMA", "0"], ["GAMMA = 0", "number above 0", "None"]),
        (STEPS[5], ["--LEARNING_RATE", "-0.012"], ["LEARNING_RATE = -0.012", "number of at least 0", "list"]),
        (STEPS[5], ["--LEARNING_RATE", "0.1", "fast"], ["LEARNING_RATE = 0.1 fast", "number of at least 0"]),
        (STEPS[5], ["--LEARNING_RATE"], ["LEARNING_RATE = nothing"]),
        (STEPS[4], ["--TASK_WEIGHTS", "1", "-1", "1"], ["TASK_WEIGHTS = 1 -1 1", "list of numbers of at least 0"]),
        (STEPS[1], ["--MODEL_NAMES"], ["MODEL_NAMES = nothing", "list of text"]),
        (STEPS[1], ["--USE_HALF_PRECISION", "yes"], ["USE_HALF_PRECISION = yes", "True or False"]),
        (STEPS[1], ["--USE_HALF_PRECISION", "1"], ["USE_HALF_PRECISION = 1", "True or False"]),
        (STEPS[1], ["--TASK_NAME", "toxicity"], ["TASK_NAME = toxicity", "'bias', 'ethics', 'truth', 'all'"]),
        (STEPS[1], ["--FACTOR_STRATEGY", "EKFAC"], ["FACTOR_STRATEGY = EKFAC", "'ekfac', 'kfac', 'diagonal'"]),
        (
            STEPS[1],
            ["--TOKENS_PER_BATCH", "none"],
            ["TOKENS_PER_BATCH = none", "whole number of at least 1 and at most 2,147,483,647 or 'auto'"],
        ),
        (STEPS[1], ["--SEED", "-1"], ["SEED = -1", "whole number of at least 0"]),
        (STEPS[1], ["--SEED", "4294967296"], ["SEED = 4294967296", "at most 4,294,967,295"]),
        (STEPS[5], ["--LEARNING_RATE", "1e39"], ["LEARNING_RATE = 1e39", "at most 3.4e+38"]),
        (
            STEPS[5],
            ["--LEARNING_RATE", "0.05", "0.0500000001"],
            ["without repetition (numbers that agree in six digits count as one)"],
        ),
        (STEPS[5], ["--LEARNING_RATE", "[0.1, 'x']"], ["LEARNING_RATE", "list of numbers"]),
        (STEPS[5], ["--LEARNING_RATE", "[0.1"], ["LEARNING_RATE", "list of numbers"]),
        (STEPS[5], ["--LEARNING_RATE", f"[{'9' * 5_000}]"], ["LEARNING_RATE", "list of numbers"]),
        (STEPS[1], ["--MODEL_NAMES", "a\0b"], ["MODEL_NAMES", "zero byte"]),
        (STEPS[1], ["--OUTPUT_DIR", "a\udcff"], ["OUTPUT_DIR", "no UTF-8"]),
        (STEPS[1], ["ethics"], ["'ethics'", "--NAME value", "TASK_NAME"]),
        (EVALUATIONS[1], ["--SPLIT", "validation"], ["SPLIT = validation", "'train', 'test'"]),
    ],
)
def test_a_wrong_value_is_refused_and_told_what_is_allowed(script, words, told):
    with pytest.raises(UserError) as refusal:
        settings_of(script, *words)
    for part in told:
        assert part in str(refusal.value)


@pytest.mark.parametrize("word", ["--BOTOM_K", "--bottom_k", "--SUM_IS_DIVIDED_BY=1"])
def test_an_unknown_constant_lists_what_exists(word):
    with pytest.raises(UserError) as refusal:
        settings_of(STEPS[4], word, "5")
    assert word.partition("=")[0] in str(refusal.value)
    for name in schema_of(STEPS[4]):
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("script", "name", "value", "allowed"),
    [
        (STEPS[4], "BOTTOM_K", "20", "whole number"),
        (STEPS[4], "BOTTOM_K", True, "whole number"),
        (STEPS[4], "IF_WEIGHT", None, "a number"),
        (STEPS[4], "TASK_WEIGHTS", [1.0, "2"], "a list of numbers"),
        (STEPS[4], "TASK_WEIGHTS", [], "a list of numbers"),
        (STEPS[1], "MODEL_NAMES", "a/b", "a list of text"),
        (STEPS[1], "TASK_NAME", "toxicity", "'bias', 'ethics', 'truth', 'all'"),
        (STEPS[1], "DAMPING_FACTOR", float("nan"), "a number of at least 0 and at most 3.4e+38 or None"),
        (STEPS[5], "PUSH_TO_HUB", 1, "True or False"),
    ],
)
def test_an_edited_constant_of_a_wrong_type_is_refused(monkeypatch, script, name, value, allowed):
    module = load_script(script)
    monkeypatch.setattr(module, name, value)
    with pytest.raises(UserError) as refusal:
        load_settings(module, [])
    assert f"{name} = {value!r}" in str(refusal.value)
    assert allowed in str(refusal.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_checked_before_a_model_is_looked_for(script, capsys):
    (model,) = {"MODEL_NAME", "MODEL_NAMES", "BASE_MODEL"} & set(schema_of(script))
    with pytest.raises(SystemExit) as stop:
        run_script(script, f"--{model}", "/no/such/model", "--OVERWRITE", "maybe")
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: OVERWRITE = maybe: allowed is True or False")


@pytest.mark.parametrize(
    ("script", "words", "meant"),
    [
        (STEPS[4], ["--SCORES_TYPE", "contarst"], "contrast"),
        (STEPS[4], ["--TASK_NAME", "ethic"], "ethics"),
        ("evaluation_scripts/paper_tables.py", ["--SCORES_TYPES", "pure_ekfac", "fited"], "fitted"),
        (STEPS[4], ["--SCORES_TYPE", "xyz"], None),
        (STEPS[4], ["--OVERWRITE", "maybe"], None),
    ],
)
def test_a_misspelt_choice_is_told_what_was_meant(script, words, meant):
    with pytest.raises(UserError) as refusal:
        load_settings(load_script(script), words)
    told = str(refusal.value)
    assert told.endswith(f"; did you mean {meant!r}?") if meant else "did you mean" not in told


# ------------------------------------------------------------------------------------ the blocks of constants


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_constant_with_its_value_and_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run_script(script, "--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for name in schema_of(script):
        comment = constant_comments(script)[name]
        assert f"{name} = {getattr(load_script(script), name)!r}\n      {comment} [" in shown


def constant_comments(script: str) -> dict[str, str]:
    source = (PROJECT_ROOT / script).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Z_]+): [^#\n]* = [^#\n]*  # (\S[^\n]*)$", source, flags=re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_has_a_comment(script):
    assert set(schema_of(script)) == set(constant_comments(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_pass_their_own_check(script):
    settings_of(script)


def test_constants_that_scripts_share_are_the_same_everywhere():
    first: dict[str, tuple[str, object, object]] = {}
    for script in PIPELINE:
        module = load_script(script)
        for name, annotation in schema_of(script).items():
            value = getattr(module, name)
            where, their_value, their_annotation = first.setdefault(name, (script, value, annotation))
            assert value == their_value, f"{name} in {script} and {where}"
            if name != "TASK_NAME":  # step 1 has no "combined": it scores each task
                assert annotation == their_annotation, f"{name} in {script} and {where}"
    assert [first["MODEL_NAME"][1]] == first["MODEL_NAMES"][1]


def test_the_model_that_is_made_is_the_one_the_steps_start_from():
    made, used = load_script("data/make_sft_model.py"), load_script(STEPS[1])
    assert [made.SFT_MODEL_DIR] == used.MODEL_NAMES
    for name in ("HH_DATASET", "SEED", "DEVICE"):
        assert getattr(made, name) == getattr(used, name)


def test_step_4_reads_from_the_factors_manifest_what_the_factors_were_made_with():
    assert not {"NUM_BLOCKS", "NUM_FACTOR_EXAMPLES", "FISHER_POSITIONS"} & set(schema_of(STEPS[4]))


@pytest.mark.parametrize("script", [*SCRIPTS, *AFTER, "data/prepare.py"])
def test_the_comment_of_a_constant_shows_its_choices(script):
    """The file is what people edit."""
    for name, annotation in schema_of(script).items():
        comment = constant_comments(script)[name]
        as_elsewhere = re.search("as in (step|data)|of SCORES_TYPES", comment)
        line = next(line for line in (PROJECT_ROOT / script).read_text().splitlines() if line.startswith(f"{name}:"))
        missing = [choice for choice in literal_choices(annotation) if f'"{choice}"' not in line]
        if "see above" in comment:
            above = load_script(script).__doc__
            missing = [choice for choice in missing if not re.search(rf"^    {choice} ", above, flags=re.MULTILINE)]
        assert not missing or as_elsewhere, f"{script}: {name} does not show {missing}"


def literal_choices(annotation) -> list[str]:
    """The texts that an annotation allows, in lists and unions too."""
    if typing.get_origin(annotation) is Literal:
        return list(typing.get_args(annotation))
    return [choice for argument in typing.get_args(annotation) for choice in literal_choices(argument)]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_has_the_constants_it_promises(step):
    assert {*COMMON, *PROMISED[step]} <= set(schema_of(STEPS[step]))


@pytest.mark.parametrize("script", EVALUATIONS)
def test_an_evaluation_has_the_constants_it_promises(script):
    data = "HH_DATASET" if script == EVALUATIONS[0] else "DATA_DIR"
    assert {"MODEL_NAMES", data, "OUTPUT_DIR", "DEVICE", "TRUST_REMOTE_CODE", "OVERWRITE", "SPLIT"} == set(
        schema_of(script)
    )


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("TASK_NAME", {"bias", "ethics", "truth", "combined", "all"}),
        ("MODEL_FAMILY", {"auto", "pythia", "qwen"}),
        ("FACTOR_STRATEGY", {"ekfac", "kfac", "diagonal", "identity", "ekfac_cg"}),
        (
            "SCORES_TYPE",
            {
                *{"pure_ekfac", "dpp", "random", "ekfac_cg", "identity", "representation", "mean_difference", "bm25"},
                *{"direct", "contrast", "weighted", "fitted", "dpp_weighted"},
                *{"ga", "ga_kl", "npo", "task_vector", "dpo", "sft_pairs", "descent", "direct_shuffled"},
                *{"npo_random", "sft_retained"},
            },
        ),
        ("GRADIENT_REDUCTION_TYPE", {"mean", "sum"}),
        ("FISHER_POSITIONS", {"completion", "all"}),
    ],
)
def test_choices(name, choices):
    annotation = schema_of(STEPS[1 if name == "FISHER_POSITIONS" else 4])[name]
    assert typing.get_origin(annotation) is Literal
    assert set(typing.get_args(annotation)) == choices


# ------------------------------------------------------------------------------------------------------- .env


def test_hub_access_reads_the_env_file(env_file):
    env_file.write_text(f"HUB_CACHE=/some/cache\nHUB_TOKEN={FAKE_TOKEN}\n", encoding="utf-8")
    assert (hub_access().cache, hub_access().token) == ("/some/cache", FAKE_TOKEN)


def test_the_environment_wins_over_the_env_file(env_file, monkeypatch):
    env_file.write_text("HUB_TOKEN=from_the_file\n", encoding="utf-8")
    monkeypatch.setenv("HUB_TOKEN", FAKE_TOKEN)
    assert hub_access().token == FAKE_TOKEN


def test_the_example_env_file_sets_nothing(env_file):
    env_file.write_text((PROJECT_ROOT / ".env.example").read_text(encoding="utf-8"), encoding="utf-8")
    assert hub_access() == HubAccess(cache=None, token=None)


def test_without_an_env_file_there_is_no_token(env_file):
    assert not env_file.exists()
    assert hub_access() == HubAccess(cache=None, token=None)


def test_the_token_is_not_shown(env_file):
    env_file.write_text(f"HUB_TOKEN={FAKE_TOKEN}\n", encoding="utf-8")
    assert FAKE_TOKEN not in repr(hub_access())
    assert FAKE_TOKEN not in str(hub_access())


def test_the_reason_of_an_error_is_one_short_line_without_the_token():
    access = HubAccess(token=FAKE_TOKEN)
    assert access.reason(OSError(f"\n403 for\n{FAKE_TOKEN}\n")) == "403 for ***"
    assert access.reason(OSError()) == "OSError"
    assert len(access.reason(OSError("long " * 1_000))) <= 300


@pytest.mark.parametrize("name", ["HUB_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_every_token_in_the_environment_is_redacted_however_it_is_padded(env_file, monkeypatch, name):
    monkeypatch.setenv(name, f"  {FAKE_TOKEN}\n")
    access = hub_access()
    assert access.token == (FAKE_TOKEN if name == "HUB_TOKEN" else None)
    assert access.redact(f"Bearer {FAKE_TOKEN}.") == "Bearer ***."
    assert FAKE_TOKEN[:5] not in access.reason(OSError("x" * (300 - 5) + FAKE_TOKEN)), "redacted before it is cut"
    assert FAKE_TOKEN not in repr(access)


def test_a_token_that_begins_with_another_is_redacted_whole(env_file, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", FAKE_TOKEN)
    monkeypatch.setenv("HF_TOKEN", f"{FAKE_TOKEN}-longer")
    assert hub_access().redact(f"{FAKE_TOKEN}-longer") == "***"


def test_the_token_is_redacted_in_error_lines(env_file, capsys):
    env_file.write_text(f"HUB_TOKEN={FAKE_TOKEN}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run_script(STEPS[2], "--MODEL_NAME", f"/no/such/{FAKE_TOKEN}/model")
    shown = capsys.readouterr()
    assert FAKE_TOKEN not in shown.err
    assert "/no/such/***/model" in shown.err
