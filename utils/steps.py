"""Running the step scripts from a program, in this process: as a user does, with constants in place of words."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from types import ModuleType
from typing import Any

from utils.console import say
from utils.paths import PROJECT_ROOT
from utils.settings import Settings, run_step


def load_script(name: str) -> ModuleType:
    """Import a script by its path in the repository, once."""
    module_name = name.removesuffix(".py").replace("/", ".")
    if module_name not in sys.modules:
        specification = importlib.util.spec_from_file_location(module_name, PROJECT_ROOT / name)
        module = importlib.util.module_from_spec(specification)
        sys.modules[module_name] = module
        specification.loader.exec_module(module)
    return sys.modules[module_name]


def command_of(name: str, constants: dict[str, Any], **more: Any) -> list[str]:  # noqa: ANN401
    """The words that run a script with those of the constants that it has; what stands in the script is not said.

    Args:
        constants: what all scripts of a run share. MODEL_NAME also serves scripts that take MODEL_NAMES.
        more: constants that the script must have.
    """
    script = load_script(name)
    model = constants.get("MODEL_NAME")
    shared = {"MODEL_NAMES": [model], **constants} if model else constants
    known = {constant: value for constant, value in shared.items() if hasattr(script, constant)}
    words = []
    for constant, value in {**known, **more}.items():
        if getattr(script, constant, None) != value:
            words += [f"--{constant}", *map(str, value if isinstance(value, list) else [value])]
    return words


def shown_command(name: str, words: list[str]) -> str:
    """A command as a user types it."""
    return shlex.join(["python", name, *words])


def next_command(name: str, settings: Settings, **more: Any) -> str:  # noqa: ANN401
    """The command of the step that comes next, with the constants of this one; a line for each model."""
    constants = {constant: value for constant, value in vars(settings).items() if constant != "OVERWRITE"}
    models = constants.pop("MODEL_NAMES", [None]) if hasattr(load_script(name), "MODEL_NAME") else [None]
    commands = [command_of(name, {**constants, **({"MODEL_NAME": model} if model else {})}, **more) for model in models]
    return "\n      ".join(shown_command(name, words) for words in commands)


def run_script(name: str, constants: dict[str, Any], **more: Any) -> None:  # noqa: ANN401
    """Run a script, told what `command_of` says; its process would end where this raises SystemExit."""
    words = command_of(name, constants, **more)
    say(f"\n$ {shown_command(name, words)}")
    run_step(load_script(name).main, words)
