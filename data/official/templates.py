"""The templates of bias and the prompt of ethics, from the authors' Python files, which are parsed, not run."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.official.formats import Content
from data.official.sources import Source
from utils.console import UserError, shown_path
from utils.files import to_json
from utils.performance_functions.bias import DEFAULT_SPLIT, PLACEHOLDER
from utils.performance_functions.data_files import parse_json, read_text, shown_value

SIDES = ("stereotype", "antistereotype")


def bias_content(source: Source, _: str, candidates: Sequence[str], split_rule: str) -> Content:
    """A templates.json, or one made from the literals that the authors' Python file assigns.

    Args:
        split_rule: goes in as "split"; a file that says so already, if only by default, is left unchanged.

    Raises:
        UserError: the file is malformed, or a statement does not name the group.
    """
    file = source.file(candidates)
    with readable_errors(source, file):
        if file.suffix.lower() == ".py":
            text = to_json(
                {
                    "source": file.name,
                    "split": split_rule,
                    **find_templates(assigned_literals(file.read_bytes()), source),
                }
            )
        else:
            text = read_text(file)
        templates = parse_json(text, shown_path(file))
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # the loader reports a wrong structure
        for statement in [text for topic in templates["topics"].values() for side in SIDES for text in topic[side]]:
            if PLACEHOLDER not in statement:
                raise UserError(
                    f"{source}: every statement must contain {PLACEHOLDER}; one does not: {shown_value(statement)}"
                )
        if templates.get("split", DEFAULT_SPLIT) != split_rule:
            text = to_json({**templates, "split": split_rule})
    return Content(text, None, {})


def prompt_content(source: Source, _: str, candidates: Sequence[str]) -> Content:
    """The prompt of ethics: a text file byte for byte, or the literal that the authors' Python file assigns.

    Raises:
        UserError: the file is malformed or empty, or does not have exactly one prompt.
    """
    file = source.file(candidates)
    with readable_errors(source, file):
        if file.suffix.lower() != ".py":
            return Content(file.read_bytes().decode("utf-8"), 1, {})
        literals = list(literal_assignments(file.read_bytes()))
    prompts = {value for name, value in literals if isinstance(value, str) and "prompt" in name.lower()}
    if len(prompts) != 1:
        raise UserError(
            f"{source}: {shown_path(file)} assigns {len(prompts)} different texts to names with 'prompt' in them, and "
            "exactly one is needed (the file is not run); or give a prompt.txt"
        )
    return Content(prompts.pop(), 1, {})


@contextlib.contextmanager
def readable_errors(source: Source, file: Path) -> Iterator[None]:
    """Turn what a broken file raises into one line."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: {shown_path(file)} is truncated or malformed ({error})") from None


def literal_assignments(content: bytes) -> Iterator[tuple[str, Any]]:
    """Names and values of the literals that a Python file assigns, outer ones first. Nothing is run.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: the file is not Python, or nested too deeply.
    """
    for node in ast.walk(ast.parse(content)):  # breadth first
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                value = ast.literal_eval(node.value)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and value:  # skips an empty `topics = {}`
                        yield target.id, value


def assigned_literals(content: bytes) -> dict[str, Any]:
    """The first value of each name; raises as `literal_assignments`."""
    literals: dict[str, Any] = {}
    for name, value in literal_assignments(content):
        literals.setdefault(name, value)
    return literals


def find_templates(literals: dict[str, Any], source: Source) -> dict[str, Any]:
    """Find prompt, target groups and topics among assigned literals, by the rules in data/prepare.py's docstring.

    Raises:
        UserError: one of the three is missing.
    """
    texts = {name: value for name, value in literals.items() if isinstance(value, str)}
    rank = {name: (PLACEHOLDER in value) + ("prompt" in name.lower()) for name, value in texts.items()}
    found = {
        "prompt": texts[max(rank, key=rank.__getitem__)] if any(rank.values()) else None,
        "target_groups": next((v for name, v in literals.items() if "group" in name.lower() and are_texts(v)), None),
        "topics": find_topics({name: value for name, value in literals.items() if isinstance(value, dict)}),
    }
    missing = ", ".join(name for name, value in found.items() if value is None)
    if missing:
        raise UserError(
            f"{source} assigns no {missing} as a literal, and the file is not run; data/prepare.py --help lists the "
            "names that are recognised; or give a templates.json"
        )
    return found


def find_topics(literals: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Topics with both sides from one dictionary, or from two dictionaries with the same topics."""
    for topics in literals.values():
        if all(isinstance(topic, dict) and are_texts(topic.get(side)) for topic in topics.values() for side in SIDES):
            return topics
    names = [name for name, by_topic in literals.items() if all(map(are_texts, by_topic.values()))]
    counters = [name for name in names if re.search("(?i)anti|counter", name)]
    stereotypes = [name for name in names if "stereo" in name.lower() and name not in counters]
    sides = [literals[names[0]] for names in (stereotypes, counters) if names]
    if len(sides) < 2 or set(sides[0]) != set(sides[1]):
        return None
    return {topic: {side: texts[topic] for side, texts in zip(SIDES, sides, strict=True)} for topic in sides[0]}


def are_texts(value: object) -> bool:
    """Whether a value is a non-empty list of texts."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
