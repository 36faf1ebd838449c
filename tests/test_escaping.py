"""Whatever stands in a name or a caption, tables stay tables in LaTeX, Markdown and CSV."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
import shutil
import string
import subprocess

import hostile
import pytest

from utils.reporting.escaping import csv_cell, latex_text, markdown_text
from utils.reporting.tables import Table, csv_text

HOSTILE = [
    string.punctuation,
    "my_model{v1} 100% $x^2$ \\input{/etc/passwd} a~b & #1 <script>alert(1)</script> |",
    "[3pt] looks like an option",
    "* looks like a star",
    "two\nlines\r\nand\n\na paragraph\x00\x07\x1b[31m\t\u2028",
    "modèle, naïve Ωmega 模型 🤗 \u202eright to left e\u0301 ﬁ \udc80",
    "[click](javascript:alert(1)) ![](x.png) `code` *strong* _weak_ ~~gone~~ &lt;",
    "ends in a backslash\\",
    "a|b\\|c",
    "=1+1",
    "",
    *hostile.NAMES,
]
INVISIBLE = r"[\s\x00-\x1f\x7f-\x9f\u200b\u202c\u202e\u2066\u2069\ufeff]+"
HARMLESS = ["pure_ekfac", "dpp + preserve", "+0.200 ± 0.141 [+0.150, +0.250] (‡)", "–", "20 of 20", "-0.0100"]


def hostile_table(texts: list[str] = HOSTILE) -> Table:
    return Table(" ".join(texts), ["name", *texts], [[text, *texts] for text in texts])


def unescaped(latex: str) -> str:
    """What is left of LaTeX without its commands: only characters that pdflatex takes for text."""
    commands = r"\\(textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar)\{\}"
    commands += r"|\$(\\pm|\\ddagger|-)\$|\\[{}$&#_%]|\\[`'^~\"=.ruvHc]\{[A-Za-z]\}|\{\[\}|\{\*\}|\{\}"
    return re.sub(commands, "", latex)


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_has_no_special_left(text):
    left = unescaped(latex_text(text))
    assert re.fullmatch(r"[ -~]*", left), "one line of ASCII"
    assert not re.search(r"[\\{}$&#_%^~<>|]", left)
    assert not latex_text(text).startswith(("[", "*"))
    assert not re.search("--|,,|``|''|[?!]`", latex_text(text)), "which would become other characters"
    assert "--" not in latex_text("a---b")
    assert latex_text("é 模") == r"\'{e} [U+6A21]"


@pytest.mark.parametrize("text", HARMLESS)
def test_names_and_numbers_of_this_project_stay_as_they_are(text):
    assert markdown_text(text) == text
    assert csv_cell(text) == text or text.startswith("+")
    plain = str.maketrans({"_": r"\_", "±": r"$\pm$", "–": "--", "‡": r"$\ddagger$"})
    assert latex_text(text) == text.translate(plain)


def test_pdflatex_typesets_hostile_names(tmp_path):
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not installed here")
    tables = [Table(text, ["name", text], [[text, "1.0"], [text, text], ["", text]]) for text in HOSTILE]
    lines = [
        r"\documentclass{article}",
        r"\usepackage{booktabs}",
        r"\begin{document}",
        hostile_table(HOSTILE[:11]).latex() + r"\clearpage",
    ]
    lines += [rf"{table.latex()}\clearpage" for table in tables]
    (tmp_path / "t.tex").write_text("\n".join([*lines, r"\end{document}"]), encoding="utf-8")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "-shell-escape", "t.tex"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert ran.returncode == 0, ran.stdout[-2_000:]
    assert f"({len(tables) + 1} pages" in ran.stdout, "each table is one page"
    assert {file.name for file in tmp_path.iterdir()} == {"t.tex", "t.pdf", "t.aux", "t.log"}, "nothing ran"
    assert "(/etc/passwd" not in ran.stdout


def test_markdown_shows_every_text_as_it_is():
    markdown_it = pytest.importorskip("markdown_it")
    table = hostile_table([text for text in HOSTILE if "\udc80" not in text])
    tokens = markdown_it.MarkdownIt("commonmark").enable("table").parse(table.markdown())
    inline = [token for token in tokens if token.type == "inline"]
    assert {child.type for token in inline for child in token.children} <= {"text", "text_special"}
    caption, *cells = ["".join(child.content for child in token.children) for token in inline]
    written = [table.caption, *table.header, *(cell for row in table.rows for cell in row)]
    assert [caption, *cells] == [" ".join(re.split(INVISIBLE, text)).strip() for text in written]


def test_markdown_makes_no_links():
    markdown_it = pytest.importorskip("markdown_it")
    if not importlib.util.find_spec("linkify_it"):
        assert markdown_text("see http://x.y and www.z.com") == r"see http\://x.y and www\.z.com"
        return
    parser = markdown_it.MarkdownIt("gfm-like")
    for text in HOSTILE:
        assert "<a" not in parser.render(markdown_text(text))


def test_markdown_stays_on_its_line_and_has_no_html():
    for line in hostile_table().markdown().split("\n"):
        assert not re.search(r"[<>\x00-\x1f]|(?<!\\)`", line)
    assert markdown_text("a|b") == r"a\|b"
    assert markdown_text("<b>&") == "&lt;b&gt;&amp;"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_no_cell_begins_a_formula_whatever_separates_them(text, separator):
    for line in csv.reader(io.StringIO(csv_text([{"name": text, "n": -1.5}])), delimiter=separator):
        for cell in line:
            bare = cell.strip().partition(",")[0] if separator != "," else cell.strip()
            assert not re.match("[=+@＝＋－＠-]", bare) or bare == "-1.5"  # noqa: RUF001


@pytest.mark.parametrize("text", ["=1+1", "+1+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_no_spreadsheet_runs_a_cell(text):
    (header, cells) = csv.reader(io.StringIO(csv_text([{"name": text, text: 1.0}]), newline=""))
    assert header == ["name", f"'{text.strip()}"]
    assert cells == [f"'{text.strip()}", "1.0"]


def test_numbers_stay_numbers_in_csv():
    row = {"a": -1.5, "b": "-1.5", "c": "+2e-3", "d": None, "e": True, "f": -3}
    assert csv_text([row]) == "a,b,c,d,e,f\n-1.5,-1.5,+2e-3,,True,-3\n"


def test_tables_of_hostile_texts_can_be_written(tmp_path):
    hostile_table([text for text in HOSTILE if text]).write(tmp_path / "t")
    assert len(list(tmp_path.iterdir())) == 3
