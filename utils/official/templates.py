"""The stereotype templates of bias, from a templates.json or the authors' Python file, which is parsed, never run."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Sequence
from typing import Any

from utils.artifacts import to_json
from utils.console import UserError, shown_path
from utils.official.formats import Content
from utils.official.sources import Source
from utils.performance_functions.bias import PLACEHOLDER

SIDES = ("stereotype", "antistereotype")


def bias_content(source: Source, _: str, places: Sequence[str]) -> Content:
    """A templates.json as it is, or one made of what the authors' Python file assigns.

    Raises:
        UserError: a hub id, which gives only a part; the file is malformed, or a statement does not name the group.
    """
    if source.path is None:
        raise UserError(
            f"{source}: the hub has the stereotypes but not the counter-statements, which are in the authors' code; "
            f"give {source.local_form}, or leave bias out with ONLY"
        )
    file = source.file(places)
    content = file.read_bytes()
    try:
        if file.suffix.lower() == ".py":
            text = to_json({"source": file.name, **find_templates(assigned_literals(content), source)})
        else:
            text = content.decode("utf-8-sig")
        templates = json.loads(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: {shown_path(file)} is cut off or malformed ({error})") from None
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # of another structure the loader says what is wrong
        for statement in [text for topic in templates["topics"].values() for side in SIDES for text in topic[side]]:
            if PLACEHOLDER not in statement:
                raise UserError(f"{source}: every statement must name {PLACEHOLDER}, this one does not: {statement!r}")
    return Content(text, None, {})


def assigned_literals(content: bytes) -> dict[str, Any]:
    """Names and values of a Python file's assignments of literals; outer and earlier ones first. Nothing is run.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: it is not Python, or nested too deeply.
    """
    literals: dict[str, Any] = {}
    for node in ast.walk(ast.parse(content)):  # breadth first
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                value = ast.literal_eval(node.value)
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and value:  # `topics = {}` waits for what fills it
                        literals.setdefault(target.id, value)
    return literals


def find_templates(literals: dict[str, Any], source: Source) -> dict[str, Any]:
    """Find prompt, target groups and topics among assigned literals, by the rules in data/prepare.py's docstring.

    Raises:
        UserError: names what is missing.
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
            f"{source} assigns no {missing} as a literal, and the file is not run; data/prepare.py --help says under "
            "which names they are looked for; or give a templates.json"
        )
    return found


def find_topics(literals: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Topics with both sides in one dictionary, or in two that have the same topics."""
    for topics in literals.values():
        if all(isinstance(topic, dict) and are_texts(topic.get(side)) for topic in topics.values() for side in SIDES):
            return topics
    names = [name for name, by_topic in literals.items() if all(map(are_texts, by_topic.values()))]
    counters = [name for name in names if re.search("(?i)anti|counter", name)]
    stereotypes = [name for name in names if "stereotype" in name.lower() and name not in counters]
    sides = [literals[names[0]] for names in (stereotypes, counters) if names]
    if len(sides) < 2 or set(sides[0]) != set(sides[1]):
        return None
    return {topic: {side: texts[topic] for side, texts in zip(SIDES, sides, strict=True)} for topic in sides[0]}


def are_texts(value: object) -> bool:
    """Whether it is a list of texts that has one."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)
