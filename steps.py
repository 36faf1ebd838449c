"""Running the step scripts: by a user from the command line, or by another script in the same process."""

from __future__ import annotations

import ast
import importlib.util
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

from utils import interruptions, processes
from utils.console import UserError, guard_streams, printable, redact, remedy_for, say
from utils.hub import hub_access, remote_code
from utils.paths import PROJECT_ROOT, STEP_1, resolve_path
from utils.settings import Settings, load_settings

LONGEST_LINE = 1_500  # characters of an error
LONGEST_REASON = 300  # of what a library said


def run_step(
    main: Callable[[Settings], None],
    arguments: Sequence[str] | None = None,
    hint: Callable[[Settings], str] | None = None,
) -> None:
    """Run a script's `main` with its checked constants; a user's mistake is one line and exit code 1.

    Started by `torchrun` or `accelerate launch`, every process runs `main`, and they divide its work; a `main` with no
    work to divide is `first_process_only`.

    Args:
        main: the script's main function; the constants are those of the module that defines it.
        arguments: the command line, by default that of the process.
        hint: gives the command that the user is told to run next.
    """
    guard_streams()
    try:
        hub_access()  # from here on no token is printed
        with interruptions.as_exceptions(), processes.joined():
            settings = load_settings(sys.modules[main.__module__], sys.argv[1:] if arguments is None else arguments)
            require_no_token(settings)
            if hasattr(settings, "OUTPUT_DIR"):
                require_writable("OUTPUT_DIR", settings.OUTPUT_DIR)
            with remote_code(getattr(settings, "TRUST_REMOTE_CODE", False)):
                main(settings)
            if hint:
                say(f"next: {hint(settings)}")
        if arguments is None:
            interruptions.ignore()
    except UserError as error:
        _exit_with(f"error: {error}")
    except Exception as error:
        if remedy := remedy_for(error):
            _exit_with(f"error: {remedy} ({_one_line(str(error), LONGEST_REASON)})")
        _exit_with_traceback(error)
    except KeyboardInterrupt as stop:
        _exit_with(interruptions.STOPPED, getattr(stop, "exit_code", 130))


def require_no_token(settings: Settings) -> None:
    """Refuse a token that was given as a constant by mistake: constants go into manifests, cards, names and trackers.

    Raises:
        UserError: names the constant.
    """
    for name, value in vars(settings).items():
        if redact(repr(value)) != repr(value):
            raise UserError(
                f"{name} = {value!r}: holds an access token, which belongs in .env or the environment; set the "
                "constant to its own value"
            )


def require_writable(constant: str, value: str) -> None:
    """Fail before the work, not after it, if the output folder is not writable.

    Raises:
        UserError: the folder that a constant names is a file, or may not be written to.
    """
    if not value.strip():
        raise UserError(f"{constant} = {value!r}: is empty; give a folder, '.' for this repository")
    folder = resolve_path(value)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{constant} = {value!r}: {existing} is not a writable folder")


def _one_line(text: str, longest: int) -> str:
    """The text for one line of a terminal: redacted first, then without control characters, then cut in its middle."""
    line = printable(" ".join(redact(text).split()))
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} [...] {line[-half:]}"


def _exit_with(line: str, code: int = 1) -> NoReturn:
    processes.end_all(_one_line(line, LONGEST_LINE), code)


def _exit_with_traceback(error: Exception) -> NoReturn:
    """What nobody expected is one line for the user, with the traceback in a file for whoever fixes it."""
    processes.wait_for_watchdog()
    trace = redact("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("wb", prefix="traceback-", suffix=".txt", delete=False) as f:
            f.write(trace.encode("utf-8", "backslashreplace"))  # a message may hold half a character
        where = f"the traceback is in {f.name}"
    except OSError as reason:
        where = f"the traceback cannot be written ({reason}): {trace}"
    # A file that may not be read, a network that is down: the machine's fault, not this project's.
    blame = "" if isinstance(error, OSError) else "this is a bug in tracing-llm-trust, please report it; "
    process = f"process {processes.rank()}: " if processes.launched() > 1 else ""
    reason = _one_line(str(error), LONGEST_REASON)
    _exit_with(f"error: {process}{type(error).__name__}: {reason}; {blame}{where}")


def load_script(name: str) -> ModuleType:
    """Import a script by its path in the repository, once."""
    module_name = name.removesuffix(".py").replace("/", ".")
    if module_name not in sys.modules:
        specification = importlib.util.spec_from_file_location(module_name, PROJECT_ROOT / name)
        module = importlib.util.module_from_spec(specification)
        sys.modules[module_name] = module
        try:
            specification.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]  # a half-imported module would be taken for the script next time
            raise
    return sys.modules[module_name]


def constants_in_source(name: str) -> dict[str, Any]:
    """The annotated constants of a script, read from its source without running it; none if it cannot be parsed."""
    try:
        statements = ast.parse((PROJECT_ROOT / name).read_text(encoding="utf-8")).body
        return {
            ast.unparse(statement.target): ast.literal_eval(statement.value)
            for statement in statements
            if isinstance(statement, ast.AnnAssign) and ast.unparse(statement.target).isupper()
        }
    except (OSError, SyntaxError, ValueError):
        return {}


def arguments_for(
    script_constants: Mapping[str, Any], constants: Mapping[str, Any], required: Mapping[str, Any]
) -> list[str]:
    """The command-line arguments that give a script those of the constants that it has and that differ from its own.

    Args:
        script_constants: the script's own constants, by name.
        constants: shared by several scripts. MODEL_NAME also serves a script that has MODEL_NAMES.
        required: constants that the script must have.
    """
    model = constants.get("MODEL_NAME")
    shared = {"MODEL_NAMES": [model], **constants} if model else constants
    known = {name: value for name, value in shared.items() if name in script_constants}
    arguments = []
    for name, value in {**known, **required}.items():
        if script_constants.get(name) == value:
            continue
        is_lone = isinstance(value, list) and len(value) == 1 and not isinstance(script_constants.get(name), list)
        words = value if isinstance(value, list) and not is_lone else [value]  # [0.02] is a list where 0.02 is a number
        arguments += [f"--{name}", *map(str, words)]
    return arguments


def next_command(name: str, settings: Settings, **required: Any) -> str:  # noqa: ANN401
    """The command of the step that comes next, with the constants of this one; a line for each model.

    The next script is not imported: if it is broken, that is no reason for a finished step to fail. Constants of
    several steps that it has and this script lacks are named, since an earlier step may have set them.
    """
    own = constants_in_source(name)
    constants = {constant: value for constant, value in vars(settings).items() if constant != "OVERWRITE"}
    models = constants.pop("MODEL_NAMES", [None]) if "MODEL_NAME" in own else [None]
    commands = [
        shlex.join(
            [
                *processes.launcher(),
                name,
                *arguments_for(own, constants | ({"MODEL_NAME": model} if model else {}), required),
            ]
        )
        for model in models
    ]
    shared = ["DATA_DIR", "SEED", "DEVICE"]
    if name != STEP_1:  # the first that has them
        shared += ["NUM_BLOCKS", "FACTOR_STRATEGY", "USE_HALF_PRECISION", "DAMPING_FACTOR"]
    unknown = [name for name in shared if name in own and name not in constants]
    if unknown:
        names = " and ".join(filter(None, [", ".join(unknown[:-1]), unknown[-1]]))
        commands.append(f"(and {names} as before, where you have set {'them' if len(unknown) > 1 else 'it'})")
    return "\n      ".join(commands)


def run_script(name: str, constants: Mapping[str, Any], **required: Any) -> None:  # noqa: ANN401
    """Run a script in this process with some of its constants set, and show the equivalent command.

    Raises:
        SystemExit: where a process of its own would have exited with an error.
    """
    script = load_script(name)
    arguments = arguments_for(vars(script), constants, required)
    say(f"\n$ {shlex.join([*processes.launcher(), name, *arguments])}")
    run_step(script.main, arguments)
