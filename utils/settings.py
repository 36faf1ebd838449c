"""The constants at the top of a script, overridden from the command line and checked before anything loads.

A script annotates its constants; the annotation is the schema:

    TASK_NAME: Literal["bias", "ethics", "truth", "all"] = "all"  # which measurement to trace
    BOTTOM_K: PositiveInt = 20  # training examples to select

`python script.py --TASK_NAME ethics --BOTTOM_K 50` overrides them for one run. Lists are separated by spaces;
`None`, `True` and `False` are spelled so. `--help` lists every constant with its comment.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from dotenv import dotenv_values
from safetensors import SafetensorError

from utils.console import UserError, remedy_for, say
from utils.paths import PROJECT_ROOT, anchored


@dataclass(frozen=True)
class AtLeast:
    """Lower bound of a number, the bound itself allowed unless `exclusive`."""

    minimum: float
    exclusive: bool = False

    def allows(self, value: float) -> bool:
        """Whether the value is finite and within the bound."""
        return math.isfinite(value) and (value > self.minimum if self.exclusive else value >= self.minimum)

    def __str__(self) -> str:
        return f"{'above' if self.exclusive else 'at least'} {self.minimum:g}"


PositiveInt = Annotated[int, AtLeast(1)]
NonNegativeInt = Annotated[int, AtLeast(0)]
Seed = NonNegativeInt
NonNegativeFloat = Annotated[float, AtLeast(0)]
PositiveFloat = Annotated[float, AtLeast(0, exclusive=True)]

TraceTask = Literal["bias", "ethics", "truth", "all"]
RepairTask = Literal["bias", "ethics", "truth", "combined", "all"]
Family = Literal["auto", "pythia", "qwen"]
Strategy = Literal["ekfac", "kfac", "diagonal", "identity"]
ScoresType = Literal["pure_ekfac", "dpp", "random", "identity", "representation", "direct"]
TrackerName = Literal["trackio", "wandb"]


class Settings(types.SimpleNamespace):
    """The checked constants of one run, as attributes under the constants' own names."""

    def pick(self, *names: str) -> dict[str, Any]:
        """The named constants as a dictionary, for a manifest."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class HubAccess:
    """HUB_CACHE and HUB_TOKEN from the environment or `.env`. The token is never shown."""

    cache: str | None = None
    token: str | None = field(default=None, repr=False)

    def without_token(self, text: str) -> str:
        """The text with the token, should it occur in it, blotted out."""
        return text.replace(self.token, "***") if self.token else text

    def reason(self, error: Exception) -> str:
        """One line of at most 300 characters from an error's message, without the token."""
        return " ".join(self.without_token(str(error)).split())[:300] or type(error).__name__


def hub_access() -> HubAccess:
    """Read HUB_CACHE and HUB_TOKEN; the environment wins over the file `.env` in the repository."""
    values = {**dotenv_values(PROJECT_ROOT / ".env"), **os.environ}
    return HubAccess(cache=values.get("HUB_CACHE") or None, token=values.get("HUB_TOKEN") or None)


def _allowed(annotation: Any) -> str:  # noqa: ANN401
    """Say in words what an annotation allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(repr(choice) for choice in arguments)
    if origin is Annotated:
        return f"{_allowed(arguments[0])} {arguments[1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(argument) for argument in arguments)
    if origin is list:
        return f"a list of {_allowed(arguments[0])}"
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}[
        annotation
    ]


def _matches(value: Any, annotation: Any) -> bool:  # noqa: ANN401
    """Whether a Python value satisfies an annotation. A whole number is also a float; True is not a number."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return value in arguments
    if origin is Annotated:
        return _matches(value, arguments[0]) and arguments[1].allows(value)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and bool(value) and all(_matches(item, arguments[0]) for item in value)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _parse_word(word: str, annotation: Any) -> Any:  # noqa: ANN401
    """Turn one word of the command line into the Python value that the annotation asks for.

    Raises:
        ValueError: the word is nothing that the annotation allows.
    """
    readings: list[Any] = [{"None": None, "True": True, "False": False}.get(word, word)]
    for number in (int, float):
        try:
            readings.append(number(word))
        except ValueError:
            continue
    readings.append(word)
    for reading in readings:
        if _matches(reading, annotation):
            return reading
    raise ValueError(word)


def _choices(annotation: Any) -> Sequence[Any]:  # noqa: ANN401
    """The members of a union; an annotation that is none is its own only member."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else [annotation]


def _parse_words(words: Sequence[str], annotation: Any) -> Any:  # noqa: ANN401
    """Turn the words after `--NAME` into a value; several words, or a lone list annotation, make a list."""
    if len(words) == 1:
        with contextlib.suppress(ValueError):
            return _parse_word(words[0], annotation)
    for choice in _choices(annotation):
        if typing.get_origin(choice) is list and words:
            return [_parse_word(word, typing.get_args(choice)[0]) for word in words]
    raise ValueError(" ".join(words))


def _widened(value: Any, annotation: Any) -> Any:  # noqa: ANN401
    """A checked value with floats where the annotation asks for them: 10 and 10.0 must have one fingerprint."""
    annotation = next(choice for choice in _choices(annotation) if _matches(value, choice))
    if typing.get_origin(annotation) is Annotated:
        return _widened(value, typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is list:
        return [_widened(item, typing.get_args(annotation)[0]) for item in value]
    return float(value) if annotation is float else value


def _constant_comments(module: types.ModuleType) -> dict[str, str]:
    """The comment behind each annotated constant of a script, read from its source."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Z][A-Z0-9_]*): .*?  # (.*)$", source, flags=re.MULTILINE))


def load_settings(module: types.ModuleType, arguments: Sequence[str]) -> Settings:
    """Check a script's constants, overridden by the command line.

    Args:
        module: the script; its annotated UPPER_CASE names are the constants.
        arguments: `--NAME value [value ...]` or `--NAME=value`, any number of times.

    Raises:
        UserError: an unknown name, a missing value, or a value of a wrong type or choice; the line lists what
            is allowed.
    """
    schema = {
        name: annotation
        for name, annotation in typing.get_type_hints(module, include_extras=True).items()
        if name.isupper()
    }
    values = {name: getattr(module, name) for name in schema}
    overrides: dict[str, list[str]] = {}
    words: list[str] | None = None
    for argument in arguments:
        if re.match(r"--[A-Za-z]", argument):
            name, equals, first = argument[2:].partition("=")
            if name == "help":
                _say_help(module, schema, values)
                raise SystemExit(0)
            if name not in schema:
                alike = difflib.get_close_matches(name.upper(), schema, n=1)
                hint = f", did you mean --{alike[0]}?" if alike else ";"
                raise UserError(
                    f"unknown constant --{name}{hint} {Path(module.__file__).name} has: {', '.join(sorted(schema))}"
                )
            words = overrides[name] = [first] if equals else []
        elif words is None:
            raise UserError(f"cannot read {argument!r}: write --NAME value; constants: {', '.join(sorted(schema))}")
        else:
            words.append(argument)
    for name, words in overrides.items():
        try:
            values[name] = _parse_words(words, schema[name])
        except ValueError:
            shown = " ".join(words) or "nothing"
            raise UserError(f"{name} = {shown}: allowed is {_allowed(schema[name])}") from None
    for name, value in values.items():
        if not _matches(value, schema[name]):
            raise UserError(f"{name} = {value!r}: allowed is {_allowed(schema[name])}")
    return Settings(**{name: _widened(value, schema[name]) for name, value in values.items()})


def _say_help(module: types.ModuleType, schema: dict[str, Any], values: dict[str, Any]) -> None:
    """Print a script's docstring and every constant: its value, its comment, what is allowed."""
    comments = _constant_comments(module)
    say((module.__doc__ or "").strip() + "\n\nConstants (override with --NAME value):")
    for name, annotation in schema.items():
        say(f"  {name} = {values[name]!r}\n      {comments.get(name, '')} [{_allowed(annotation)}]")


def run_step(
    main: Callable[[Settings], None],
    arguments: Sequence[str] | None = None,
    next_command: Callable[[Settings], str] | None = None,
    several_processes: bool = False,
) -> None:
    """Run a script's `main` with its checked constants; a user's mistake is one line and exit code 1.

    Args:
        main: the script's main function; the constants are those of the module that defines it.
        arguments: the command line, by default that of the process.
        next_command: what the user is told to run next, where the script is what they ran.
        several_processes: whether the script knows what to do when `accelerate launch` starts it several times.
    """
    if not several_processes:
        refuse_several_processes()
    try:
        settings = load_settings(sys.modules[main.__module__], sys.argv[1:] if arguments is None else arguments)
        _refuse_unwritable_output(settings)
        main(settings)
        if next_command:
            say(f"next: {next_command(settings)}")
    except UserError as error:
        _exit_with(hub_access().without_token(f"error: {error}"))
    except (OSError, RuntimeError, SafetensorError) as error:
        remedy = remedy_for(error)
        if remedy is None:
            raise
        _exit_with(hub_access().without_token(f"error: {remedy} ({str(error)[:300]})"))
    except KeyboardInterrupt:
        _exit_with("stopped; what was finished is kept, run the same command to go on", code=130)


def _refuse_unwritable_output(settings: Settings) -> None:
    """Find out before the work, not after it, that its result cannot be written."""
    if hasattr(settings, "OUTPUT_DIR"):
        folder = anchored(settings.OUTPUT_DIR)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"OUTPUT_DIR = {settings.OUTPUT_DIR!r}: {existing} is no folder that can be written to")


def _exit_with(line: str, code: int = 1) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    raise SystemExit(code)


def refuse_several_processes() -> None:
    """Refuse `torchrun` / `accelerate launch` with several processes instead of being silently wrong."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        _exit_with(f"error: WORLD_SIZE = {world_size}: the steps run as one process; start them with plain python")
