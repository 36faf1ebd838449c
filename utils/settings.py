"""The constants at the top of a script, overridden from the command line and checked before anything loads.

A script annotates its constants; the annotation is the schema:

    TASK_NAME: Literal["bias", "ethics", "truth", "all"] = "all"  # which measurement to trace
    BOTTOM_K: PositiveInt = 20  # training examples to select

`python script.py --TASK_NAME ethics --BOTTOM_K 50` overrides them for one run. Lists are separated by spaces, or
written as in Python: `[0.02]` is a list of one. `None`, `True` and `False` as in Python. `--help` lists every constant
with its comment. Of the constants that most steps share, those that a script does not use are passed over, so that the
same words can be given to every step.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from utils.console import UserError, say
from utils.paths import model_short_name

LARGEST_FLOAT = 3.4e38  # of float32
LARGEST_INT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # of numpy


@dataclass(frozen=True)
class Between:
    """Bounds of a number, the bounds themselves allowed, but for the lower one if `is_above`."""

    minimum: float
    maximum: float
    is_above: bool = False

    def allows(self, value: float) -> bool:
        """Whether the value is within the bounds; NaN is not."""
        return (value > self.minimum if self.is_above else value >= self.minimum) and value <= self.maximum

    def __str__(self) -> str:
        maximum = f"{self.maximum:,}" if isinstance(self.maximum, int) else f"{self.maximum:g}"
        return f"{'above' if self.is_above else 'of at least'} {self.minimum} and at most {maximum}"


@dataclass(frozen=True)
class Distinct:
    """Requires members of a list that differ as file names show them, numbers with six digits."""

    def allows(self, values: Sequence[Any]) -> bool:
        """Whether no two members have the same name."""
        names = [self.name_of(value) for value in values]
        return len(set(names)) == len(names)

    def name_of(self, value: Any) -> str:  # noqa: ANN401
        """A member as file names show it."""
        return f"{value:g}" if isinstance(value, float) else str(value)

    def __str__(self) -> str:
        return "without repetition (numbers that agree in six digits count as one)"


class DistinctModels(Distinct):
    """Requires models whose artifacts have different names."""

    def name_of(self, value: str) -> str:
        """The model's last part."""
        return model_short_name(value)

    def __str__(self) -> str:
        return "that differ in the last part, by which artifacts are named"


def require_distinct_models(models: Sequence[str], constants: str) -> None:
    """Check models of several constants, whose results have one folder.

    Raises:
        UserError: two of them have one name there.
    """
    if not DistinctModels().allows(models):
        raise UserError(f"{constants} = {', '.join(models)}: allowed are models {DistinctModels()}")


PositiveInt = Annotated[int, Between(1, LARGEST_INT)]
NonNegativeInt = Annotated[int, Between(0, LARGEST_INT)]
Seed = Annotated[int, Between(0, LARGEST_SEED)]
NonNegativeFloat = Annotated[float, Between(0, LARGEST_FLOAT)]
PositiveFloat = Annotated[float, Between(0, LARGEST_FLOAT, is_above=True)]
Member = TypeVar("Member")
Choices = Annotated[list[Member], Distinct()]
ModelNames = Annotated[list[str], DistinctModels()]

TraceTask = Literal["bias", "ethics", "truth", "all"]
OneTask = Literal["bias", "ethics", "truth", "combined"]
RepairTask = Literal["bias", "ethics", "truth", "combined", "all"]
Family = Literal["auto", "pythia", "qwen"]
Strategy = Literal["ekfac", "kfac", "diagonal", "identity", "ekfac_cg"]
RankingType = Literal["pure_ekfac", "ekfac_cg", "identity", "representation", "mean_difference", "bm25"]
ScoresType = Literal[
    "pure_ekfac",
    "dpp",
    "random",
    "contrast",
    "weighted",
    "fitted",
    "dpp_weighted",
    "direct",
    "ekfac_cg",
    "identity",
    "representation",
    "mean_difference",
    "bm25",
    "ga",
    "ga_kl",
    "npo",
    "task_vector",
    "dpo",
    "sft_pairs",
    "descent",
    "direct_shuffled",
    "npo_random",
    "sft_retained",
]
TrackerName = Literal["trackio", "wandb"]


TASK_NAMES = ("bias", "ethics", "truth")  # the trust measurements
COMMON_CONSTANTS = frozenset(
    {"MODEL_FAMILY", "HH_DATASET", "DATA_DIR", "OUTPUT_DIR", "SEED", "DEVICE", "TRUST_REMOTE_CODE", "OVERWRITE"}
)


class Settings(types.SimpleNamespace):
    """The checked constants of one run, as attributes under the constants' own names."""

    def pick(self, *names: str) -> dict[str, Any]:
        """The named constants as a dictionary, for a manifest."""
        return {name: getattr(self, name) for name in names}


def tasks_of(task_name: str) -> list[str]:
    """The tasks that TASK_NAME stands for; "all" is bias, ethics and truth."""
    return list(TASK_NAMES) if task_name == "all" else [task_name]


def task_weights(settings: Settings, task: str) -> dict[str, float]:
    """The weight of each measurement in `task`; "combined" is all three, weighted by TASK_WEIGHTS.

    Raises:
        UserError: TASK_WEIGHTS does not have three numbers, or all are zero.
    """
    if task != "combined":
        return {task: 1.0}
    weights = settings.TASK_WEIGHTS
    if len(weights) != len(TASK_NAMES) or not any(weights):
        raise UserError(
            f"TASK_WEIGHTS = {weights}: allowed are {len(TASK_NAMES)} numbers, for {', '.join(TASK_NAMES)}, "
            "not all zero"
        )
    return dict(zip(TASK_NAMES, weights, strict=True))


def _allowed(annotation: Any) -> str:  # noqa: ANN401
    """The values that an annotation allows, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ", ".join(repr(choice) for choice in arguments)
    if origin is Annotated:
        return f"{_allowed(arguments[0])} {arguments[1]}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_allowed(argument) for argument in arguments)
    if origin is list:
        members = _allowed(arguments[0]).removeprefix("a ").replace("number", "numbers").replace("text", "texts")
        return f"a list of {members}"
    return {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
        type(None): "None",
    }[annotation]


def _did_you_mean(value: object, annotation: Any) -> str:  # noqa: ANN401
    """A choice that the annotation allows and that is spelt much like a value, as the end of a message."""
    if typing.get_origin(annotation) is Literal:
        choices = [str(choice) for choice in typing.get_args(annotation)]
        alike = [] if value in choices else difflib.get_close_matches(str(value), choices, n=1)
        return f"; did you mean {alike[0]!r}?" if alike else ""
    members = value if isinstance(value, list) else [value]
    found = (_did_you_mean(member, part) for part in typing.get_args(annotation) for member in members)
    return next(filter(None, found), "")


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
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_FLOAT
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is str:
        return isinstance(value, str)
    return isinstance(value, annotation)


def _require_writable_text(name: str, value: Any) -> None:  # noqa: ANN401
    """Refuse text that no path or file can hold: a zero byte, or a byte of the command line that is no UTF-8.

    Raises:
        UserError: names the constant.
    """
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and (found := re.search("[\0\ud800-\udfff]", text)):
            raise UserError(
                f"{name} = {value!r}: character {found.start() + 1} is a zero byte, or no UTF-8; leave it out"
            )


def _parse_word(word: str, annotation: Any) -> Any:  # noqa: ANN401
    """Turn one word of the command line into the Python value that the annotation asks for.

    Raises:
        ValueError: the annotation allows no reading of the word.
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


def _alternatives(annotation: Any) -> Sequence[Any]:  # noqa: ANN401
    """The members of a union, or the annotation itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if is_union else [annotation]


def _list_of(annotation: Any) -> Any:  # noqa: ANN401
    """The annotation of the members, if an annotation allows a list; otherwise None."""
    for choice in _alternatives(annotation):
        plain = typing.get_args(choice)[0] if typing.get_origin(choice) is Annotated else choice
        if typing.get_origin(plain) is list:
            return typing.get_args(plain)[0]
    return None


def _parse_words(words: Sequence[str], annotation: Any) -> Any:  # noqa: ANN401
    """Turn the words after `--NAME` into a value; several words, or a lone list annotation, make a list."""
    if len(words) == 1:
        with contextlib.suppress(ValueError):
            return _parse_word(words[0], annotation)
    member = _list_of(annotation)
    if member is None or not words:
        raise ValueError(" ".join(words))
    if len(words) == 1 and words[0].startswith("["):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(words[0])
    return [_parse_word(word, member) for word in words]


def _repeated(value: Any, annotation: Any) -> list[Any]:  # noqa: ANN401
    """The members of a list that are there before, where that is not allowed."""
    distinct = [part for choice in _alternatives(annotation) for part in typing.get_args(choice)[1:]]
    if not isinstance(value, list) or not any(isinstance(part, Distinct) for part in distinct):
        return []
    return [item for position, item in enumerate(value) if item in value[:position]]


def _with_floats(value: Any, annotation: Any) -> Any:  # noqa: ANN401
    """A checked value with floats where the annotation asks for them, so that 10 and 10.0 have one fingerprint."""
    annotation = next(choice for choice in _alternatives(annotation) if _matches(value, choice))
    if typing.get_origin(annotation) is Annotated:
        return _with_floats(value, typing.get_args(annotation)[0])
    if typing.get_origin(annotation) is list:
        return [_with_floats(item, typing.get_args(annotation)[0]) for item in value]
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
        if argument == "-h" or re.match(r"--[A-Za-z]", argument):
            name, equals, first = argument[2:].partition("=")
            if name == "help" or argument == "-h":
                _print_help(module, schema, values)
                raise SystemExit(0)
            if name in COMMON_CONSTANTS and name not in schema:
                say(f"   {name} is not used by {Path(module.__file__).name}")
                words = []
                continue
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
        for word in words:
            _require_writable_text(name, word)
        try:
            values[name] = _parse_words(words, schema[name])
        except ValueError:
            shown = " ".join(words) or "nothing"
            is_one = len(words) > 1 and not _list_of(schema[name])
            hint = f"; it takes one value, and {words!r:.300} follow it" if is_one else ""
            hint += _did_you_mean(words, schema[name])
            raise UserError(f"{name} = {shown}: allowed is {_allowed(schema[name])}{hint}") from None
    for name, value in values.items():
        _require_writable_text(name, value)
        if not _matches(value, schema[name]):
            again = next((f"{item!r} is given twice; " for item in _repeated(value, schema[name])), "")
            hint = "" if again else _did_you_mean(value, schema[name])
            raise UserError(f"{name} = {value!r}: {again}allowed is {_allowed(schema[name])}{hint}")
    return Settings(**{name: _with_floats(value, schema[name]) for name, value in values.items()})


def _print_help(module: types.ModuleType, schema: dict[str, Any], values: dict[str, Any]) -> None:
    """Print a script's docstring and every constant: its value, its comment, what is allowed."""
    comments = _constant_comments(module)
    say((module.__doc__ or "").strip() + "\n\nConstants (override with --NAME value):")
    for name, annotation in schema.items():
        say(f"  {name} = {values[name]!r}\n      {comments.get(name, '')} [{_allowed(annotation)}]")
