"""Names and texts of a user's own, as they stand in a document: every character means itself."""

from __future__ import annotations

import html
import re

MARKDOWN_SPECIAL = re.compile(r"[\\`*\[\]#|~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word means nothing


def one_line(text: object) -> str:
    """The text on one line: spaces for whatever is not printed, line breaks and control characters among them."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def markdown_text(text: object) -> str:
    """The text for a paragraph, a heading or a table's cell in Markdown, without markup, raw HTML or a second line."""
    return html.escape(MARKDOWN_SPECIAL.sub(r"\\\g<0>", one_line(text)), quote=False)
