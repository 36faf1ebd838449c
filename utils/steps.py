"""Running the step scripts from a program, in this process: as a user does, with constants in place of words."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from types import ModuleType
from typing import Any

from utils.console import say
from utils.paths import PROJECT_ROOT
from utils.settings import run_step


def load_script(name: str) -> ModuleType:
    """Import a script by its path in the repository, once."""
    module_name = name.removesuffix(".py").replace("/", ".")
    if module_name not in sys.modules:
        specification = importlib.util.spec_from_file_location(module_name, PROJECT_ROOT / name)
        module = importlib.util.module_from_spec(specification)
        sys.modules[module_name] = module
        specification.loader.exec_module(module)
    return sys.modules[module_name]


def run_script(name: str, constants: dict[str, Any], **more: Any) -> None:  # noqa: ANN401
    """Run a script, with those of the constants that it has; its process would end where this raises SystemExit.

    Args:
        constants: what all scripts of a run share; a script takes what it knows. A MODEL_NAME also serves scripts that
            take MODEL_NAMES.
        more: constants that the script must have.
    """
    script = load_script(name)
    model = constants.get("MODEL_NAME")
    shared = {"MODEL_NAMES": [model], **constants} if model else constants
    known = {constant: value for constant, value in shared.items() if hasattr(script, constant)}
    words = []
    for constant, value in {**known, **more}.items():
        if getattr(script, constant, None) != value:  # what stands in the script need not be said
            words += [f"--{constant}", *map(str, value if isinstance(value, list) else [value])]
    say(f"\n$ python {name} {shlex.join(words)}")
    run_step(script.main, words)
