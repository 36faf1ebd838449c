"""No token in any output, however a run fails: nothing printed, no file written, no name given."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import huggingface_hub
import pytest
import transformers
from conftest import run_script
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from tqdm import tqdm

from data.official.sources import Source, hub_file, hub_rows
from steps import load_script, run_step
from utils import hub, processes
from utils.console import UserError, redact
from utils.hub import hub_access, push_folder, require_hub_access
from utils.model_fingerprints import model_fingerprint, tokenizer_fingerprint
from utils.models import load_config, load_model, load_tokenizer
from utils.paths import PROJECT_ROOT
from utils.performance_functions.hh import read_dialogues
from utils.settings import Settings
from utils.tracker import tracking

TOKEN = "not-a-real-token-0123456789-abcdefg"  # without the shape by which any token of the hub is known
ODD_TOKEN = "odd+token/with=\"quotes'&<signs>\\é 0123456789"
HUB_SHAPED = f"hf_{'AbCdEfGhIj' * 3}WxYz"
PART = 10  # characters of a token that are too many
STEP_5 = "gradient_ascent_and_save.py"


@pytest.fixture(autouse=True)
def output(monkeypatch, tmp_path) -> Path:
    """Where everything is written; no token is known, and there is no `.env`."""
    monkeypatch.setattr(hub, "PROJECT_ROOT", tmp_path / "repository")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for name in (*hub.TOKEN_VARIABLES, "HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for folder in ("repository", "temporary"):
        (tmp_path / folder).mkdir()
    return tmp_path


@pytest.fixture
def token(monkeypatch) -> str:
    monkeypatch.setenv("HUB_TOKEN", TOKEN)
    return TOKEN


def leaked(token: str, text: str) -> list[str]:
    """The parts of a token, in any spelling, that a text has."""
    spellings = hub._spellings(token)
    parts = {spelling[i : i + PART] for spelling in spellings for i in range(len(spelling) - PART + 1)}
    return sorted(part for part in parts if part in text)


def assert_not_told(token: str, capsys: pytest.CaptureFixture, output: Path) -> str:
    """Neither on the terminal nor in a file or its name; gives what was printed."""
    shown = capsys.readouterr()
    assert leaked(token, shown.out + shown.err) == []
    for file in output.rglob("*"):
        assert leaked(token, file.name) == []
        if file.is_file() and file.name != ".env":
            assert leaked(token, file.read_text("utf-8")) == []
    return shown.out + shown.err


def fail_with(failure: BaseException | Callable[[], object], code: int = 1, is_run: bool = True) -> None:
    """A step that fails."""

    ran = []

    def main(_: Settings) -> None:
        ran.append(True)
        if isinstance(failure, BaseException):
            raise failure
        failure()

    with pytest.raises(SystemExit) as stop:
        run_step(main, [])
    assert (bool(ran), stop.value.code) == (is_run, code)


# ------------------------------------------------------------------------------------------ where it comes from

SPELLED = ["{}", "{}\n", "  {}  ", '"{}"', "'{}'", "{}\r\n", '"{}\n"', "\t{}\n\n"]


@pytest.mark.parametrize("name", hub.TOKEN_VARIABLES)
@pytest.mark.parametrize("spelled", SPELLED)
def test_a_token_of_the_environment_is_not_told(monkeypatch, capsys, output, name, spelled):
    monkeypatch.setenv(name, spelled.format(TOKEN))
    assert hub_access().token == (TOKEN if name == "HUB_TOKEN" else None)
    fail_with(RuntimeError(f"401 for Bearer {spelled.format(TOKEN)!r} and {TOKEN}"))
    assert "***" in assert_not_told(TOKEN, capsys, output)


@pytest.mark.parametrize(
    "content",
    [
        "HUB_TOKEN={}",
        "HUB_TOKEN={}\n",
        "HUB_TOKEN={}\r\nHUB_CACHE=/x\r\n",
        "\ufeffHUB_TOKEN={}\n",
        'export HUB_TOKEN = "{}"  # mine\n',
        "HUB_TOKEN='{}'\n",
        'HUB_TOKEN="{}\\n"\n',
        "HUB_TOKEN=\"'{}'\"\n",
    ],
)
def test_a_token_of_the_env_file_is_read_and_not_told(capsys, output, content):
    (output / "repository" / ".env").write_bytes(content.format(TOKEN).encode())
    assert hub_access().token == TOKEN
    fail_with(RuntimeError(f"401 for Bearer {TOKEN}"))
    assert "***" in assert_not_told(TOKEN, capsys, output)


def test_both_are_hidden_where_the_environment_overrides_the_env_file(capsys, output, token):
    (output / "repository" / ".env").write_text(f"HUB_TOKEN={HUB_SHAPED}", encoding="utf-8")
    fail_with(RuntimeError(f"{token} {HUB_SHAPED}"))
    assert "*** ***" in assert_not_told(TOKEN, capsys, output)


def test_an_env_file_that_cannot_be_read_is_one_line(capsys, output, token):
    (output / "repository" / ".env").write_bytes(b"HUB_TOKEN=\xff\xfe" + token.encode())
    fail_with(RuntimeError(), is_run=False)
    assert ".env cannot be read" in assert_not_told(token, capsys, output)


def test_a_token_that_nobody_told_us_is_known_by_its_shape(capsys, output):
    fail_with(RuntimeError(f"of the login: {HUB_SHAPED}, and cut: {HUB_SHAPED[:25]}..."))
    assert_not_told(HUB_SHAPED, capsys, output)


def test_words_that_are_no_tokens_stay(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "none")
    hub_access()
    text = "none of hf_internal_testing/a-model_hf_12345678901234567890 and data/hf_small"
    assert redact(text) == text


# ------------------------------------------------------------------------------------------ ways to fail

POSITIONS = {
    "beginning": "{0} is refused",
    "middle": "for {0} it is refused",
    "end": "refused: {0}",
    **{f"across {cut}": f"{'x' * (cut - 17)}{{0}}{'y' * 3_000}" for cut in (150, 300, 750, 1_500)},
    **{f"{cut} before the end": f"{'x' * 3_000}{{0}}{'y' * (cut - 17)}" for cut in (150, 300, 750)},
    "address": "https://user:{0}@hub.example/api?token={0}&x=1",
    "header": "headers: {{'authorization': 'Bearer {0}'}}\nbody: {{\"token\": \"{0}\"}}",
    "many lines": "first\n\n{0}\r\n{0}\tlast",
    "without blanks": "a{0}{0}b",
    "escaped newline": "{0}\\n",
    "upper case": "{1}",
}


@pytest.mark.parametrize("position", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("kind", [RuntimeError, UserError, OSError], ids=["bug", "mistake", "machine"])
def test_wherever_it_stands_in_a_message(capsys, output, token, kind, position):
    fail_with(kind(position.format(token, token.upper())))
    told = assert_not_told(token, capsys, output)
    assert len(told.splitlines()) == 1
    assert leaked(token, told.lower()) == []


def chained(token: str) -> Exception:
    try:
        try:
            raise KeyError(token)
        except KeyError as cause:
            raise ValueError(f"from {token}") from cause
    except ValueError as error:
        error.__context__ = OSError(errno.ENOSPC + 1_000, token, token)
        return error


def with_note(token: str) -> Exception:
    error = RuntimeError("the note says more")
    error.__notes__ = [f"the header was {token}"]
    return error


def odd_code(token: str) -> None:
    """Code of a file whose name holds the token, with the token in its source."""
    exec(compile(f"secret = {token!r}\nraise RuntimeError(secret)", f"/tmp/{token}.py", "exec"))


class Careless(Exception):  # noqa: N818
    """An error that shows the request it belongs to."""

    def __init__(self, token: str) -> None:
        super().__init__({"token": token}, token.encode(), [token], 401)
        self.token = token

    def __repr__(self) -> str:
        return f"Careless({self.token})"


FAILURES = {
    "arguments": Careless,
    "key": KeyError,
    "bytes": lambda token: RuntimeError(f"{token}\r\n".encode()),
    "repr": lambda token: RuntimeError(repr(f"Bearer {token}\n")),
    "quoted": lambda token: RuntimeError(quote(f"https://{token}@hub", safe="")),
    "object": lambda token: RuntimeError(SimpleNamespace(token=token)),
    "file": lambda token: FileNotFoundError(errno.ENOENT, "no such file", f"/cache/{token}/x"),
    "denied": lambda token: PermissionError(errno.EACCES, "denied", f"/cache/{token}"),
    "disk": lambda token: OSError(errno.ENOSPC, f"No space left for {token}", f"/cache/{token}"),
    "unicode": lambda token: UnicodeDecodeError("utf-8", token.encode(), 0, 1, f"in {token}"),
    "memory": lambda token: MemoryError(token),
    "chain": chained,
    "note": with_note,
    "validation": lambda token: HFValidationError(f"Repo id must be a name: '{token}'"),
    "offline": lambda token: LocalEntryNotFoundError(f"cannot find {token}"),
    "stop": lambda token: StopIteration(token),
    "surrogate": lambda token: RuntimeError(f"half a character \udc80 {token}"),
    "terminal": lambda token: RuntimeError(f"\x1b[31m{token}\x07\x00"),
}


@pytest.mark.parametrize("make", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("secret", [TOKEN, ODD_TOKEN, HUB_SHAPED], ids=["plain", "odd", "hub"])
def test_whatever_error_holds_it(monkeypatch, capsys, output, make, secret):
    monkeypatch.setenv("HF_TOKEN", secret)
    fail_with(make(secret))
    assert_not_told(secret, capsys, output)


def test_the_traceback_shows_neither_source_nor_file_with_it(capsys, output, token):
    fail_with(lambda: odd_code(token))
    assert_not_told(token, capsys, output)
    (trace,) = (output / "temporary").iterdir()
    assert "RuntimeError: ***" in trace.read_text(encoding="utf-8")


def test_a_traceback_that_cannot_be_written(monkeypatch, capsys, output, token):
    monkeypatch.setattr(tempfile, "tempdir", str(output / token))
    fail_with(RuntimeError(token))
    assert "the traceback cannot be written" in assert_not_told(token, capsys, output)


def test_an_interruption(capsys, output, token):
    fail_with(KeyboardInterrupt(token), 130)
    assert_not_told(token, capsys, output)


def test_what_another_process_is_told_to_print(monkeypatch, token):
    lines = []
    watchdog = SimpleNamespace(fail=lambda line, code: lines.append(line))
    monkeypatch.setattr(processes._world, "watchdog", watchdog)
    monkeypatch.setattr(processes, "_join", lambda: None)
    fail_with(UserError(f"{'x' * 740}{token}{'y' * 3_000}"))
    assert leaked(token, "".join(lines)) == []


# ------------------------------------------------------------------------------------------ what libraries print


def print_all_of(token: str) -> None:
    """Everything but errors."""
    print(token, f"[{token}]", file=sys.stderr)
    sys.stdout.writelines([f"a {token}\n", f"b {token}\n"])
    tqdm.write(token)
    tqdm(range(1), desc=token).close()
    warnings.warn(token, stacklevel=1)
    thread = threading.Thread(target=int, args=[token])
    thread.start()
    thread.join()


def test_loggers_that_were_made_before_the_step(capsys, output, token):
    handler = logging.StreamHandler()
    logger = logging.getLogger("a.library")
    logger.addHandler(handler)
    try:

        def main(_: Settings) -> None:
            logger.warning("%s", token)
            try:
                raise RuntimeError(token)
            except RuntimeError:
                logger.exception("trouble")

        run_step(main, [])
    finally:
        logger.removeHandler(handler)
    assert "RuntimeError: ***" in assert_not_told(token, capsys, output)


SCRIPT = """
import logging, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
import huggingface_hub, transformers
from steps import run_step
from test_secrets import print_all_of

TOKEN = os.environ["HUB_TOKEN"]

def main(settings):
    print_all_of(TOKEN)
    transformers.utils.logging.get_logger("transformers.x").warning(TOKEN)
    huggingface_hub.utils.logging.get_logger("huggingface_hub.x").error(TOKEN)
    logging.warning(TOKEN)
    if sys.argv[1] == "exit":
        sys.exit(f"the library gives up: {{TOKEN}}")
    raise {{"bug": RuntimeError, "base": BaseException, "group": RuntimeError}}[sys.argv[1]](TOKEN)

run_step(main, [])
"""


@pytest.mark.parametrize("end", ["bug", "exit", "base"])
def test_a_process_of_its_own(output, token, end):
    script = SCRIPT.format(tests=str(Path(__file__).parent), root=str(PROJECT_ROOT))
    environment = os.environ | {"HUB_TOKEN": f"{token}\n", "TMPDIR": str(output)}
    ran = subprocess.run(
        [sys.executable, "-c", script, end], cwd=output, env=environment, capture_output=True, text=True, check=False
    )
    told = ran.stdout + ran.stderr
    assert ran.returncode == 1
    assert told.count("***") >= 10, told
    assert leaked(token, told) == []
    assert not [file for file in output.glob("*.txt") if leaked(token, file.read_text("utf-8"))]


# ------------------------------------------------------------------------------------------ places that load or push

PUSHING = Settings(HUB_USERNAME="somebody", SAVE_TO_DISK=True, MODEL_NAME="a/model")
ON_HUB = Source("ETHICS_SOURCE", "owner/name", "a folder", None)
PLACES = {
    "configuration": ("transformers.AutoConfig.from_pretrained", lambda _: load_config("owner/name")),
    "weights": ("transformers.AutoModelForCausalLM.from_pretrained", lambda _: load_model("owner/name", "cpu")),
    "tokenizer": ("transformers.AutoTokenizer.from_pretrained", lambda _: load_tokenizer("owner/name")),
    "commit": ("transformers.utils.hub.cached_file", lambda _: model_fingerprint("owner/name")),
    "commit of a tokenizer": ("transformers.utils.hub.cached_file", lambda _: tokenizer_fingerprint("owner/name")),
    "dialogues": ("datasets.load_dataset", lambda _: read_dialogues("owner/name", "train")),
    "rows": ("datasets.load_dataset", lambda _: hub_rows(ON_HUB, None, "train")),
    "file": ("huggingface_hub.hf_hub_download", lambda _: hub_file(ON_HUB, ["x.csv"])),
    "token": ("huggingface_hub.HfApi.whoami", lambda _: require_hub_access(PUSHING, ["a"])),
    "repository": (
        "huggingface_hub.HfApi.create_repo",
        lambda folder: push_folder(folder, [], "somebody", hub_access()),
    ),
    "upload": (
        "huggingface_hub.HfApi.upload_folder",
        lambda folder: push_folder(folder, [], "somebody", hub_access()),
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [RuntimeError, OSError, KeyError, Careless, LocalEntryNotFoundError])
def test_every_place_that_loads_or_pushes(monkeypatch, capsys, output, token, place, kind):
    function, use = PLACES[place]

    def refuse(*_: object, **__: object) -> None:
        raise kind(f"{'x' * 290}{token} \n{quote(token)}") from RuntimeError(token)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: transformers.PretrainedConfig())
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(function, refuse)
    fail_with(lambda: use(output))
    told = assert_not_told(token, capsys, output)
    assert told.startswith("error: ")
    assert "bug in" not in told


@pytest.mark.parametrize("kind", [RuntimeError, KeyError])
def test_the_harness(monkeypatch, capsys, output, token, kind):
    pytest.importorskip("lm_eval")
    script = load_script("evaluation_scripts/harness_eval.py")

    def refuse(*_: object, **__: object) -> None:
        raise kind(f"401 with {token}")

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse)
    fail_with(lambda: script.evaluate_task(Settings(LIMIT=None), None, "bbq", None, None))
    assert_not_told(token, capsys, output)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("where", ["__init__", "store_init_configuration", "log", "finish"])
def test_a_tracker(monkeypatch, capsys, output, token, name, where):
    from accelerate import tracking as accelerate_tracking

    def call(method: str) -> None:
        if method == where:
            raise RuntimeError(f"api key {token} is refused")

    class Backend:
        def __init__(self, *_: object, **__: object) -> None:
            call("__init__")

        def store_init_configuration(self, _: object) -> None:
            call("store_init_configuration")

        def log(self, *_: object, **__: object) -> None:
            call("log")

        def finish(self) -> None:
            call("finish")

    def track() -> None:
        with tracking(name, "a-run", {}) as tracker:
            tracker.log({"loss": 1.0})

    kind = SimpleNamespace(value=name)
    monkeypatch.setattr(accelerate_tracking, "get_available_trackers", lambda: [kind])
    monkeypatch.setattr(accelerate_tracking, "LOGGER_TYPE_TO_CLASS", {name: Backend})
    fail_with(track)
    assert_not_told(token, capsys, output)


# ------------------------------------------------------------------------------------------ given by mistake


@pytest.mark.parametrize(
    "words",
    [
        *(["--" + name, "{}"] for name in ("MODEL_NAME", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR", "DEVICE")),
        ["--OUTPUT_DIR", "{output}/{}/deeper"],
        ["--PUSH_TO_HUB", "True", "--HUB_USERNAME", "{}"],
        ["--PUSH_TO_HUB", "True", "--HUB_USERNAME={}"],
        ["--MODEL_NAME", "{}/model"],
        ["--TASK_NAME", "{}"],
        ["--BOTTOM_K", "{}"],
        ["--LEARNING_RATE", "0.1", "{}"],
        ["--HUB_TOKEN", "{}"],
        ["--{}"],
        ["--{}", "1"],
        ["{}"],
        ["HUB_TOKEN={}"],
    ],
)
def test_a_token_as_a_constant(monkeypatch, capsys, output, token, words):
    monkeypatch.chdir(output)
    with pytest.raises(SystemExit):
        run_script(STEP_5, *(word.replace("{output}", str(output)).replace("{}", token) for word in words))
    told = assert_not_told(token, capsys, output)
    assert told.startswith("error: ")
    assert sorted(file.name for file in output.iterdir()) == ["repository", "temporary"], "nothing is made"


def test_a_token_of_somebody_else_as_a_constant(capsys, output):
    with pytest.raises(SystemExit):
        run_script(STEP_5, "--HUB_USERNAME", HUB_SHAPED)
    assert "HUB_USERNAME = '***': holds an access token" in assert_not_told(HUB_SHAPED, capsys, output)


def test_help_on_constants_that_somebody_edited(monkeypatch, capsys, output, token):
    monkeypatch.setattr(load_script(STEP_5), "HUB_USERNAME", token)
    with pytest.raises(SystemExit):
        run_script(STEP_5, "--help")
    assert "HUB_USERNAME = '***'" in assert_not_told(token, capsys, output)
