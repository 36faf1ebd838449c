"""Text that came from outside, such as a model's name, made safe to stand in LaTeX, in Markdown or in CSV."""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

LATEX_CHARACTERS = {
    **{special: f"\\{special}" for special in "{}$&#_%"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"},
    **{"±": r"$\pm$", "–": "--", "—": "---", "−": "$-$", "‡": r"$\ddagger$"},
}
LATEX_ACCENTS = {  # combining characters and the commands of any LaTeX font
    **{"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": "."},
    **{"\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c"},
}
LATEX_LIGATURES = {"-": "-", ",": ",", "`": "`", "'": "'", "?": "`", "!": "`"}  # a character, and what would change it
# What begins code, emphasis, a cell or the target of a link; an underscore only beside a blank or punctuation; and what
# makes a bare address a link.
MARKDOWN_SPECIALS = re.compile(r"[\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=\()|:(?=//)|(?<=www)\.", re.IGNORECASE)
# At the beginning of a cell, or after a semicolon, which separates cells in some countries; full-width ones too.
FORMULA_START = re.compile(r"(^|;)(\s*)(?=[=+\-@＝＋－＠])")  # noqa: RUF001


def one_line(text: object) -> str:
    """The text on one line: spaces for whatever is not printed, such as line breaks and other control characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in str(text)).split())


def latex_text(text: str) -> str:
    """Text as LaTeX that pdflatex typesets with its standard fonts, on one line.

    Accented letters become commands; any other character that those fonts lack becomes its number: `[U+4E2D]`.
    """
    characters = unicodedata.normalize("NFC", one_line(text))
    escaped = "".join(map(_latex_character, characters, f"{characters[1:]} "))
    # At the beginning of a row, these two would belong to the \\ before it.
    return f"{{{escaped[0]}}}{escaped[1:]}" if escaped.startswith(("[", "*")) else escaped


def _latex_character(character: str, following: str) -> str:
    if character in LATEX_CHARACTERS:
        return LATEX_CHARACTERS[character]
    if character.isascii():
        return f"{character}{{}}" if LATEX_LIGATURES.get(character) == following else character  # -- becomes a dash
    letter, *accents = unicodedata.normalize("NFD", character)
    if letter.isascii() and len(accents) == 1 and accents[0] in LATEX_ACCENTS:
        return rf"\{LATEX_ACCENTS[accents[0]]}{{{letter}}}"
    return f"[U+{ord(character):04X}]"


def markdown_text(text: object) -> str:
    """Text as Markdown that shows it as it is, on one line: no markup, no HTML, and no end of a table's cell."""
    return MARKDOWN_SPECIALS.sub(r"\\\g<0>", html.escape(one_line(text), quote=False))


def csv_cell(value: Any) -> Any:  # noqa: ANN401
    """A value that no spreadsheet takes for a formula: a text that looks like one gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return text if _is_number(text) else FORMULA_START.sub(r"\1\2'", text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
