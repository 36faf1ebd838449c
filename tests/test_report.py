"""The report holds everything in one file, shows hostile texts as texts, and sorts and searches as it says."""

from __future__ import annotations

import base64
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import hostile
import numpy
import pytest
from conftest import DEMO, read_rows
from matplotlib.image import imsave
from selenium import webdriver
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from utils.console import UserError
from utils.reporting import html
from utils.reporting.html import (
    CUT_MARK,
    LARGEST_BYTES,
    TEMPLATE,
    Completion,
    Example,
    Picture,
    Report,
    Subset,
    cut,
    render,
    write_report,
)
from utils.reporting.tables import Table, is_number_column, leading_number

TASKS = ("bias", "ethics", "truth")
METHODS = ("pure_ekfac", "dpp", "random")
HOSTILE = (
    '</script><script>window.ran = 1; alert(1)</script><img src=x onerror="alert(2)"><!--<script> & \' \u2028 \u2029 '
    "{{ dialogues }} {% endif %} {# --> ]]> \\u003c ${alert(3)}"
)
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LAPTOP, PHONE = (1440, 900), (390, 844)


# -- reports to test with ----------------------------------------------------------------------------------------------


def make_picture(folder: Path, name: str = "picture", width: int = 300, height: int = 100) -> Picture:
    path = folder / f"{name}.png"
    noise = numpy.random.default_rng(0).random((height, width, 3))
    imsave(path, noise)
    return Picture("Improvement against perplexity change. Each point is one repair.", path)


def make_table(caption: str = "What every repair did") -> Table:
    """27 repairs; the improvement of one is missing."""
    generator = random.Random(0)
    rows = [
        [
            f"{task}, {method}",
            str(k),
            f"{generator.uniform(-2, 40):+.1f} %",
            f"{generator.uniform(-1, 1):.4f}",
            f"{generator.randrange(21)} of 20",
            f"{generator.uniform(1, 2_000):,.1f} ± 0.4",
        ]
        for task in TASKS
        for method in METHODS
        for k in (20, 100, 1_000)
    ]
    rows[4][2] = "–"
    return Table(caption, ["repair", "K", "improvement", "after", "planted", "seconds"], rows)


def make_example(rank: int = 1, prompt: str = "\n\nHuman: Why?\n\nAssistant:", completion: str = " So.", **changes):
    example = Example(rank, 10 * rank, {"bias": -0.5}, {}, None, prompt, completion)
    return replace(example, **changes)


def demo_subsets(count: int = 20) -> list[Subset]:
    """Nine subsets of the demo's dialogues: made-up scores, gains for dpp alone, known harm among the first."""
    rows = read_rows(DEMO / "hh" / "train.jsonl")
    generator = random.Random(1)
    subsets = []
    for task in TASKS:
        for method in METHODS:
            picks = generator.sample(range(len(rows)), count)
            examples = [
                Example(
                    rank=rank,
                    row=pick,
                    scores={name: generator.uniform(-0.05, 0.01) for name in TASKS},
                    gains={"diversity": 1 / (rank + 0.3), "influence": 2 / rank} if method == "dpp" else {},
                    known_harm=task if rank <= 3 and method != "random" else None,
                    prompt=rows[pick]["prompt"],
                    completion=rows[pick]["chosen"],
                )
                for rank, pick in enumerate(picks, start=1)
            ]
            subsets.append(Subset(f"{task}, chosen by {method}", f"The {count} dialogues of {task}.", examples))
    return subsets


def make_report(folder: Path, **changes) -> Report:
    report = Report(
        title="Repairs of demo-sft",
        introduction="The first paragraph.\nIts second line.\n\nThe second paragraph.",
        facts={"model": "data/demo-sft", "hardware": "2 CPU cores"},
        tables=[make_table(), make_table("The same again, under a caption that is long " + "very " * 30)],
        pictures=[make_picture(folder), make_picture(folder, "square", 90, 100)],
        subsets=demo_subsets(),
        completions=[
            Completion("bias", "dpp", "\n\nHuman: Who are they?\n\nAssistant:", " All bad.", " All kinds of people."),
            Completion("bias", "random", "\n\nHuman: Who are they?\n\nAssistant:", " All bad.", " All bad."),
            Completion("truth", "truth_dpp", "\n\nHuman: Is it?\n\nAssistant:", " Yes.", " No."),
        ],
    )
    return replace(report, **changes)


def hostile_report(folder: Path) -> Report:
    """The hostile text wherever a report takes a text."""
    example = make_example(
        scores={HOSTILE: -1.0}, gains={HOSTILE: 1.0}, known_harm=HOSTILE, prompt=HOSTILE, completion=HOSTILE
    )
    return Report(
        title=HOSTILE,
        introduction=HOSTILE,
        facts={HOSTILE: HOSTILE},
        tables=[Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE, "2" + HOSTILE], ["", HOSTILE]])],
        pictures=[replace(make_picture(folder), caption=HOSTILE)],
        subsets=[Subset(HOSTILE, HOSTILE, [example]), Subset("other", "", [make_example()])],
        completions=[Completion(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
    )


class PageParser(HTMLParser):
    """The tags of a page with their attributes, its texts, and what its scripts contain."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.texts.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if attributes.get(name) is not None]


def page_data(page: str) -> dict:
    return json.loads(PageParser(page).scripts[0])


# -- the file ----------------------------------------------------------------------------------------------------------


def test_texts_never_become_markup(tmp_path):
    page = PageParser(render(hostile_report(tmp_path)))
    kinds = [tag for tag, _ in page.tags]
    assert kinds.count("script") == 2
    assert kinds.count("img") == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    data = json.loads(page.scripts[0])
    assert data["texts"][0] == [HOSTILE, HOSTILE]
    assert data["subsets"][0] == [HOSTILE, HOSTILE]
    assert not set("<>&\u2028\u2029") & set(page.scripts[0])
    # Title, heading, introduction, caption and its link, header, cells, picture, task, prompt, completions, fact.
    assert sum(HOSTILE.strip() in text for text in page.texts) >= 14
    assert HOSTILE in page.attributes("alt")


def test_the_page_refers_to_nothing_outside(tmp_path):
    page = render(make_report(tmp_path))
    assert "http://" not in page
    assert "https://" not in page
    parsed = PageParser(page)
    references = [*parsed.attributes("src"), *parsed.attributes("href"), *parsed.attributes("srcset")]
    assert len(references) >= 2 + 5
    assert [reference[:40] for reference in references if not reference.startswith(("data:", "#"))] == []
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
    policy = parsed.attributes("content")[0]
    assert {part.strip() for part in policy.split(";")} >= {
        "default-src 'none'",
        "img-src data:",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline'",
    }


def test_the_script_builds_text_nodes_only():
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\("
    assert not re.search(unsafe, TEMPLATE.read_text(encoding="utf-8"))


def test_every_link_leads_to_a_part_of_the_page(tmp_path):
    page = PageParser(render(make_report(tmp_path)))
    links = [link[1:] for link in page.attributes("href") if link.startswith("#")]
    assert links == ["pictures", "tables", "dialogues", "completions", "facts", "table-1", "table-2"]
    identifiers = page.attributes("id")
    assert set(links) <= set(identifiers)
    assert len(identifiers) == len(set(identifiers))
    labels = [name for names in page.attributes("aria-labelledby") for name in names.split()]
    assert set(labels) <= set(identifiers)


def test_parts_that_are_empty_are_left_out(tmp_path):
    empty = Report("Nothing", "", {}, [], [], [], [])
    page = PageParser(render(empty))
    sections = [attributes for tag, attributes in page.tags if tag == "section"]
    assert sections == [{"id": "dialogues", "hidden": None}]
    assert [link for link in page.attributes("href") if link.startswith("#")] == []
    page = PageParser(render(make_report(tmp_path)))
    sections = [attributes for tag, attributes in page.tags if tag == "section"]
    assert [attributes["id"] for attributes in sections] == ["pictures", "tables", "dialogues", "completions", "facts"]
    assert not any("hidden" in attributes for attributes in sections)


def test_without_javascript_tables_pictures_and_completions_remain(tmp_path):
    report = make_report(tmp_path)
    page = render(report)
    without_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    texts = " ".join(PageParser(without_scripts).texts)
    for shown in (report.tables[0].rows[7][2], "Improvement against", "All kinds of people.", "2 CPU cores"):
        assert shown in texts
    assert re.search(r"<noscript><p>[^<]*needs JavaScript", without_scripts)
    assert report.subsets[0].examples[0].completion.strip() not in texts


def test_the_sign_of_a_score_and_other_columns_are_explained_where_they_occur(tmp_path):
    page = render(make_report(tmp_path))
    assert "positive means that training on the dialogue lowers the measurement" in page
    assert "Gains:" in page
    assert "Known harm:" in page
    plain = make_report(tmp_path, subsets=[Subset("random", "", [make_example(scores={})])])
    page = render(plain)
    assert "sign of a score" not in page
    assert "Gains:" not in page
    assert "Known harm:" not in page


def test_paragraphs_follow_blank_lines(tmp_path):
    page = render(make_report(tmp_path))
    assert "<p>The first paragraph.\nIts second line.</p>\n<p>The second paragraph.</p>" in page


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("+38.8 %", 38.8),
        ("-1.57", -1.57),
        ("−1.57", -1.57),
        ("20 of 20", 20),
        ("12.3 ± 0.4", 12.3),
        ("1,200", 1200),
        ("1e-05", 1e-5),
        ("3.2x", 3.2),
        (".5", 0.5),
        ("–", None),
        ("-", None),
        ("dpp", None),
        ("", None),
    ],
)
def test_leading_number(cell, number):
    assert leading_number(cell) == number


def test_columns_of_numbers_are_told_from_columns_of_words(tmp_path):
    assert is_number_column(["1", "–", "3 of 4"])
    assert not is_number_column(["1", "pure_ekfac"])
    assert not is_number_column(["–", ""])
    table = Table("t", ["model", "improvement"], [["a", "+1.5 %"], ["b", "–"]])
    page = render(make_report(tmp_path, tables=[table]))
    assert '<tr><th scope="row">a</th><td class="number" data-value="1.5">+1.5 %</td></tr>' in page
    assert '<tr><th scope="row">b</th><td class="number missing">–</td></tr>' in page


def test_a_row_of_the_wrong_length_is_refused(tmp_path):
    with pytest.raises((ValueError, IndexError)):
        render(make_report(tmp_path, tables=[Table("t", ["a", "b"], [["1", "2"], ["1"]])]))


def test_pictures_are_embedded_whole_with_their_size(tmp_path):
    report = make_report(tmp_path)
    images = [attributes for tag, attributes in PageParser(render(report)).tags if tag == "img"]
    assert [(image["width"], image["height"]) for image in images] == [("300", "100"), ("90", "100")]
    for image, picture in zip(images, report.pictures, strict=True):
        assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == picture.png.read_bytes()
        assert image["alt"] == picture.caption
    assert [kind for kind in PageParser(render(report)).attributes("class") if kind.startswith("picture")] == [
        "picture wide",
        "picture",
    ]


def test_completions_of_a_prompt_stand_side_by_side(tmp_path):
    page = PageParser(render(make_report(tmp_path)))
    assert sum(attributes.get("class") == "completion" for _, attributes in page.tags) == 2
    labels = [text for text in page.texts if re.match("before|after:", text)]
    assert labels == ["before", "after: dpp", "after: random, unchanged", "before", "after: truth_dpp"]


def test_a_text_of_several_subsets_is_stored_once():
    subsets = [Subset(name, "", [make_example(prompt="the same prompt")]) for name in "abc"]
    page = render(Report("t", "", {}, [], [], subsets, []))
    assert page.count("the same prompt") == 1
    assert [example[-2] for example in page_data(page)["examples"]] == [0, 0, 0]


def test_lone_surrogates_and_zero_bytes_can_be_written(tmp_path):
    example = make_example(prompt="a\ud800b", completion="c\x00d")
    report = make_report(tmp_path, title="a\udc00b", subsets=[Subset("s", "", [example])])
    write_report(report, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page_data(page)["texts"] == [["a?b", "c\x00d"]]


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        render(make_report(tmp_path, subsets=[Subset("s", "", [make_example(scores={"bias": float("nan")})])]))


def test_the_file_is_written_whole_and_its_path_said(tmp_path, capsys):
    path = tmp_path / "results" / "report.html"
    report = make_report(tmp_path)
    write_report(report, path)
    assert path.read_text(encoding="utf-8") == render(report)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert re.search(rf"wrote {re.escape(str(path))} \(0\.\d MB\)", capsys.readouterr().out)


def test_a_report_above_the_limit_loses_the_ends_of_its_longest_texts(tmp_path):
    generator = random.Random(0)
    texts = ["".join(generator.choices("aé漢<x ", k=generator.choice((40, 3_000)))) for _ in range(1_200)]
    examples = [make_example(rank, prompt=text, completion=f"short {rank}") for rank, text in enumerate(texts, start=1)]
    report = make_report(tmp_path, subsets=[Subset("all", "", examples)])
    page = render(report)
    assert LARGEST_BYTES == 3_000_000
    assert 0.99 * LARGEST_BYTES < len(page.encode("utf-8")) <= LARGEST_BYTES
    data = page_data(page)
    longest = data["longest"]
    assert 40 < longest < 3_000
    for (prompt, completion), text, example in zip(data["texts"], texts, examples, strict=True):
        assert completion == example.completion
        assert prompt == cut(text, longest)
        assert (prompt == text) == (len(text) <= longest)
    embedded = [source for source in PageParser(page).attributes("src") if source.startswith("data:image/png;base64,")]
    assert [base64.b64decode(source.partition(",")[2]) for source in embedded] == [
        picture.png.read_bytes() for picture in report.pictures
    ]


def test_a_report_below_the_limit_is_left_whole(tmp_path):
    report = make_report(tmp_path)
    data = page_data(render(report))
    assert data["longest"] is None
    expected = {(example.prompt, example.completion) for subset in report.subsets for example in subset.examples}
    assert set(map(tuple, data["texts"])) == expected


def test_a_report_that_cannot_fit_is_refused_and_nothing_written(tmp_path, monkeypatch):
    report = make_report(tmp_path)
    monkeypatch.setattr(html, "LARGEST_BYTES", report.pictures[0].png.stat().st_size)
    with pytest.raises(UserError, match="fewer or smaller pictures"):
        write_report(report, tmp_path / "results" / "report.html")
    assert not (tmp_path / "results").exists()


def test_cut():
    assert cut("twelve chars", 12) == "twelve chars"
    assert cut("twelve chars", 11) == "twelve" + CUT_MARK
    assert cut("twelve chars", 0) == CUT_MARK
    assert cut("twelve chars", None) == "twelve chars"


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, WCAG 2.2."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_have_enough_contrast(scheme):
    block = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), flags=re.DOTALL)[scheme]
    colours = dict(re.findall(r"--(\w+): (#\w{6});", block))
    for background in ("page", "card", "head"):
        for text in ("ink", "quiet", "accent", "harm"):
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
        assert contrast(colours["border"], colours[background]) >= 3, background
    assert contrast(colours["ink"], colours["mark"]) >= 4.5


# -- the page in a browser ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Debian's Chromium without a window. It logs every request and every console message of the page."""
    missing = [name for name, path in (("chromium", CHROMIUM), ("chromedriver", CHROMEDRIVER)) if path is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    folder = tmp_path_factory.mktemp("report")
    report = make_report(folder)
    write_report(report, folder / "report.html")
    return report, folder / "report.html"


def set_size(browser: webdriver.Chrome, size: tuple[int, int]) -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_page(browser: webdriver.Chrome, path: Path, fragment: str = "", size: tuple[int, int] = LAPTOP) -> None:
    """Open a page afresh: a change of the fragment alone would not load it again."""
    browser.get("about:blank")
    set_size(browser, size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri() + fragment)


def texts_of(browser: webdriver.Chrome, selector: str) -> list[str]:
    """What the visible elements say."""
    visible = "[...document.querySelectorAll(arguments[0])].filter((each) => each.checkVisibility())"
    return browser.execute_script(f"return {visible}.map((each) => each.textContent)", selector)


def listed(browser: webdriver.Chrome) -> dict[str, list[str]]:
    """The list of dialogues as it stands, by column."""
    headers = texts_of(browser, "#list thead th")
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#list tbody tr')].map((row) => [...row.cells].map((c) => c.textContent))"
    )
    return dict(zip(headers, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}


def click_header(browser: webdriver.Chrome, table: str, name: str) -> str:
    """Click a column's header; return the direction that it then announces."""
    header = browser.find_element(By.XPATH, f"//table[@{table}]/thead//th[button[text()='{name}']]")
    header.find_element(By.TAG_NAME, "button").click()
    return header.get_attribute("aria-sort")


def count_of(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "count").text


def wait_for_hash(browser: webdriver.Chrome, *parts: str) -> None:
    def has_all(driver: webdriver.Chrome) -> bool:
        return all(part in driver.execute_script("return location.hash") for part in parts)

    WebDriverWait(browser, 5).until(has_all, f"no {parts} in the address")


def search(browser: webdriver.Chrome, text: str) -> None:
    box = browser.find_element(By.ID, "search")
    box.clear()
    box.send_keys(text)


def severe_messages(browser: webdriver.Chrome) -> list[dict]:
    return [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def requested_urls(browser: webdriver.Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("column", ["improvement", "after", "planted", "seconds", "repair"])
def test_a_click_on_a_header_sorts_a_table(browser, demo, column):
    report, path = demo
    table = report.tables[0]
    cells = [row[table.header.index(column)] for row in table.rows]
    open_page(browser, path)

    def shown() -> list[str]:
        position = table.header.index(column) + 1
        return texts_of(browser, f"#table-1 tbody tr > :nth-child({position})")

    def key(cell: str) -> float | str:
        return cell if column == "repair" else float(cell.split()[0].rstrip("%").replace(",", ""))

    present, missing = [cell for cell in cells if cell != "–"], [cell for cell in cells if cell == "–"]
    assert shown() == cells
    where = "aria-labelledby='table-1-caption'"
    assert click_header(browser, where, column) == "ascending"
    assert shown() == sorted(present, key=key) + missing
    assert shown() != cells or column == "repair"
    assert click_header(browser, where, column) == "descending"
    assert shown() == sorted(present, key=key, reverse=True) + missing
    assert click_header(browser, where, column) == "none"
    assert shown() == cells
    other = "K" if column != "K" else "after"
    click_header(browser, where, column)
    click_header(browser, where, other)
    directions = browser.execute_script(
        "return [...document.querySelectorAll('#table-1 thead th')].map((header) => header.getAttribute('aria-sort'))"
    )
    assert directions.count("ascending") == 1
    assert directions.count("none") == len(directions) - 1


def test_the_list_shows_all_dialogues_in_order_and_sorts_them(browser, demo):
    report, path = demo
    open_page(browser, path)
    examples = [(subset.title, example) for subset in report.subsets for example in subset.examples]
    assert count_of(browser) == "180 of 180 dialogues"
    columns = listed(browser)
    assert columns["subset"] == [title for title, _ in examples]
    assert columns["row"] == [str(example.row) for _, example in examples]
    assert columns["known harm"] == [example.known_harm or "" for _, example in examples]
    assert columns["bias score"] == [f"{example.scores['bias']:.5f}" for _, example in examples]
    assert {len(gain) > 0 for gain in columns["diversity gain"]} == {True, False}

    by_score = sorted(examples, key=lambda pair: pair[1].scores["bias"])
    assert click_header(browser, "id='list'", "bias score") == "ascending"
    assert listed(browser)["row"] == [str(example.row) for _, example in by_score]
    assert click_header(browser, "id='list'", "bias score") == "descending"
    assert listed(browser)["row"] == [str(example.row) for _, example in reversed(by_score)]

    click_header(browser, "id='list'", "diversity gain")
    assert click_header(browser, "id='list'", "diversity gain") == "descending"
    gains = listed(browser)["diversity gain"]
    assert gains[:60] == [f"{1 / (rank + 0.3):.4f}" for rank in range(1, 21) for _ in TASKS]
    assert gains[60:] == [""] * 120


def test_search_finds_dialogues_with_all_words_and_marks_them(browser, demo):
    report, path = demo
    open_page(browser, path)
    examples = [example for subset in report.subsets for example in subset.examples]

    def found(*words: str) -> list[str]:
        texts = [(str(example.row), (example.prompt + "\n" + example.completion).lower()) for example in examples]
        return [row for row, text in texts if all(word in text for word in words)]

    assert 0 < len(found("how", "then")) < len(found("how")) < len(examples)
    search(browser, "HOW")
    assert listed(browser)["row"] == found("how")
    assert count_of(browser) == f"{len(found('how'))} of 180 dialogues"
    search(browser, "then hOw")
    assert listed(browser)["row"] == found("how", "then")
    assert count_of(browser) == f"{len(found('how', 'then'))} of 180 dialogues"
    assert {text.lower() for text in texts_of(browser, "#list mark")} == {"how", "then"}
    browser.find_element(By.CSS_SELECTOR, "#list summary").click()
    WebDriverWait(browser, 5).until(lambda driver: texts_of(driver, "#list .speech mark"))
    search(browser, ".*(")
    assert count_of(browser) == "0 of 180 dialogues"
    assert listed(browser) == {}
    browser.find_element(By.ID, "reset").click()
    assert count_of(browser) == "180 of 180 dialogues"
    assert texts_of(browser, "#list mark") == []


def test_a_subset_is_chosen_and_known_harm_alone(browser, demo):
    report, path = demo
    open_page(browser, path)
    Select(browser.find_element(By.ID, "subset")).select_by_visible_text("bias, chosen by dpp")
    assert count_of(browser) == "20 of 180 dialogues"
    assert browser.find_element(By.ID, "subset-note").text == "The 20 dialogues of bias."
    columns = listed(browser)
    assert columns["row"] == [str(example.row) for example in report.subsets[1].examples]
    assert "subset" not in columns
    assert "diversity gain" in columns
    browser.find_element(By.ID, "only-harm").click()
    assert count_of(browser) == "3 of 180 dialogues"
    assert listed(browser)["known harm"] == ["bias"] * 3
    Select(browser.find_element(By.ID, "subset")).select_by_visible_text("truth, chosen by random")
    assert count_of(browser) == "0 of 180 dialogues"
    browser.find_element(By.ID, "only-harm").click()
    assert set(listed(browser)) == {"rank", "row", "bias score", "ethics score", "truth score", "dialogue"}


def test_a_view_can_be_linked_to(browser, demo):
    _, path = demo
    open_page(browser, path)
    Select(browser.find_element(By.ID, "subset")).select_by_visible_text("ethics, chosen by dpp")
    search(browser, "how")
    click_header(browser, "id='list'", "truth score")
    click_header(browser, "id='list'", "truth score")
    wait_for_hash(browser, "subset=ethics", "search=how", "sort=truth", "direction=descending")
    before, count = listed(browser), count_of(browser)
    rows = [int(row) for row in before["row"]]
    assert 1 < len(rows) < 20
    browser.refresh()
    assert listed(browser) == before
    assert count_of(browser) == count
    assert browser.find_element(By.ID, "search").get_attribute("value") == "how"
    selected = Select(browser.find_element(By.ID, "subset")).first_selected_option.text
    assert selected == "ethics, chosen by dpp"
    fragment = browser.execute_script("return location.hash")
    open_page(browser, path)
    assert listed(browser) != before
    browser.execute_script("location.hash = arguments[0]", fragment)
    WebDriverWait(browser, 5).until(lambda driver: listed(driver) == before)
    browser.find_element(By.CSS_SELECTOR, "nav a[href='#tables']").click()
    assert listed(browser) == before


def test_a_link_to_what_is_not_there_shows_everything(browser, demo):
    _, path = demo
    open_page(browser, path, "#dialogues?subset=gone&sort=gone&direction=sideways")
    assert count_of(browser) == "180 of 180 dialogues"
    top = browser.execute_script("return document.getElementById('dialogues').getBoundingClientRect().top")
    assert 0 <= top < 50
    assert severe_messages(browser) == []


def test_the_folded_line_shows_where_the_match_is(browser, tmp_path):
    prompt = f"\n\nHuman: {'straw ' * 100}needle{' straw' * 100}\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant:"
    path = tmp_path / "report.html"
    write_report(Report("t", "", {}, [], [], [Subset("s", "", [make_example(prompt=prompt)])], []), path)
    open_page(browser, path)
    assert texts_of(browser, "#list summary .asked") == ["Why?"]
    search(browser, "needle")
    [asked] = texts_of(browser, "#list summary .asked")
    assert asked.startswith("… ")
    assert asked.index("needle") < 40


def test_a_dialogue_unfolds_and_stays_so_while_the_list_is_sorted(browser, demo):
    report, path = demo
    open_page(browser, path, "#dialogues?subset=bias%2C+chosen+by+dpp")
    example = report.subsets[1].examples[0]
    assert texts_of(browser, "#list .speech") == []
    browser.find_element(By.CSS_SELECTOR, "#list summary").click()
    WebDriverWait(browser, 5).until(lambda driver: texts_of(driver, "#list .speech"))
    expected = [example.prompt.strip(), example.completion.strip()]
    assert texts_of(browser, "#list .speech .text") == expected
    click_header(browser, "id='list'", "rank")
    click_header(browser, "id='list'", "rank")
    assert texts_of(browser, "#list .speech .text") == expected
    assert listed(browser)["rank"][0] == "20"


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_hostile_texts_are_shown_and_not_run(browser, tmp_path, size):
    path = tmp_path / "report.html"
    write_report(hostile_report(tmp_path), path)
    open_page(browser, path, size=size)
    for summary in browser.find_elements(By.CSS_SELECTOR, "#list summary"):
        summary.click()
    WebDriverWait(browser, 5).until(lambda driver: len(texts_of(driver, "#list .speech .text")) == 4)
    search(browser, "<img")
    WebDriverWait(browser, 5).until(lambda driver: texts_of(driver, "#list mark"))
    assert count_of(browser) == "1 of 2 dialogues"
    assert texts_of(browser, "#list .speech .text") == [HOSTILE, HOSTILE]
    assert HOSTILE in texts_of(browser, "h1")
    Select(browser.find_element(By.ID, "subset")).select_by_index(1)
    assert browser.execute_script("return document.getElementById('subset-note').textContent") == HOSTILE
    assert browser.execute_script("return window.ran") is None
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert browser.execute_script("return document.querySelectorAll('script, img').length") == 3
    assert severe_messages(browser) == []


def test_no_name_runs_or_asks_for_anything(browser, tmp_path):
    """Of models, tasks, methods, kinds of harm, and in dialogues, captions, cells and completions."""
    names = hostile.NAMES
    examples = [
        make_example(rank, scores={name: -1.0}, gains={name: 1.0}, known_harm=name, prompt=name, completion=name)
        for rank, name in enumerate(names, start=1)
    ]
    report = Report(
        title=names[0],
        introduction="\n\n".join(names),
        facts=dict(zip(names, names, strict=True)),
        tables=[Table(name, [name, "x"], [[name, name]]) for name in names],
        pictures=[replace(make_picture(tmp_path, "small", 2, 2), caption=name) for name in names],
        subsets=[Subset(name, name, [example]) for name, example in zip(names, examples, strict=True)],
        completions=[Completion(name, name, name, name, name) for name in names],
    )
    path = tmp_path / "report.html"
    write_report(report, path)
    for name in ("", *names[:10]):
        open_page(browser, path, f"#dialogues?search={quote(name.encode('utf-8', 'replace'))}&subset={quote(names[1])}")
        assert browser.execute_script("return window.ran") is None
        outside = [url for url in requested_urls(browser) if not url.startswith(("data:", path.as_uri()))]
        assert outside == []
        assert browser.execute_script("return document.querySelectorAll('script').length") == 2
        assert (
            browser.execute_script("return document.querySelectorAll('iframe, svg, meta[http-equiv=refresh]').length")
            == 0
        )
    for summary in browser.find_elements(By.CSS_SELECTOR, "#list summary")[: len(names)]:
        browser.execute_script("arguments[0].click()", summary)
    assert browser.execute_script("return window.ran") is None
    with pytest.raises(NoAlertPresentException):
        _ = browser.switch_to.alert.text
    assert severe_messages(browser) == []


@pytest.mark.parametrize("size", [LAPTOP, PHONE, (320, 640), (800, 1_000)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("kind", ["demo", "hostile", "unbroken"])
def test_nothing_is_wider_than_the_window(browser, demo, tmp_path, size, kind):
    path = demo[1]
    if kind != "demo":
        report = hostile_report(tmp_path)
        if kind == "unbroken":
            word = "unbroken" * 40
            example = make_example(
                prompt=word, completion=word, scores={word: -1.0}, gains={word: 1.0}, known_harm=word
            )
            report = Report(
                title=word,
                introduction=word,
                facts={word: word},
                tables=[Table(word, [word, word], [[word, word]])],
                pictures=[Picture(word, report.pictures[0].png)],
                subsets=[Subset(word, word, [example]), Subset("other", word, [example])],
                completions=[Completion(word, word, word, word, word)],
            )
        path = tmp_path / "report.html"
        write_report(report, path)
    open_page(browser, path, size=size)
    browser.find_element(By.CSS_SELECTOR, "#list summary").click()
    WebDriverWait(browser, 5).until(lambda driver: texts_of(driver, "#list .speech"))
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert inner == size[0]
    assert width <= inner


def test_the_page_asks_for_nothing_and_could_not(browser, demo):
    _, path = demo
    open_page(browser, path)
    assert [url for url in requested_urls(browser) if not url.startswith("data:")] == [path.as_uri()]
    entries = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [name for name in entries if not name.startswith("data:")] == []
    assert severe_messages(browser) == []
    blocked = browser.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/picture.png" }));
        """
    )
    assert blocked == "img-src"


def test_two_thousand_dialogues_are_shown_a_page_at_a_time(browser, tmp_path):
    examples = [
        make_example(rank, prompt=f"\n\nHuman: question {rank}\n\nAssistant:", completion=" word" * 150)
        for rank in range(1, 2_001)
    ]
    path = tmp_path / "report.html"
    write_report(Report("Many", "", {}, [], [], [Subset("all", "", examples)], []), path)
    open_page(browser, path)
    assert count_of(browser) == "2,000 of 2,000 dialogues, the first 200 shown"
    assert len(listed(browser)["rank"]) == 200
    assert "subset" not in listed(browser)
    browser.find_element(By.ID, "more").click()
    assert listed(browser)["rank"] == [str(rank) for rank in range(1, 401)]
    search(browser, "question 19")
    assert count_of(browser) == "139 of 2,000 dialogues"
    assert texts_of(browser, "#more") == []
    milliseconds = browser.execute_script(
        "const start = performance.now(); view.search = 'word'; show(); return performance.now() - start"
    )
    assert count_of(browser).startswith("2,000 of 2,000")
    assert milliseconds < 1_000  # a tenth of it is usual


def test_scores_of_every_size_keep_four_digits(browser, tmp_path):
    subsets = [
        Subset("small", "", [make_example(scores={"bias": -1.23456e-6}), make_example(scores={"bias": 0.0})]),
        Subset("large", "", [make_example(scores={"bias": -123_456.0}), make_example(scores={"bias": 7.0})]),
        Subset("none", "", [make_example(scores={})]),
    ]
    path = tmp_path / "report.html"
    write_report(Report("Scales", "", {}, [], [], subsets, []), path)
    open_page(browser, path)
    assert listed(browser)["bias score"] == ["-0.000001235", "0.000000000", "-123456", "7", ""]
    Select(browser.find_element(By.ID, "subset")).select_by_visible_text("none")
    assert set(listed(browser)) == {"rank", "row", "dialogue"}
    assert not browser.find_element(By.ID, "harm-control").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colour_scheme_and_pictures_stay_light(browser, demo, scheme):
    _, path = demo
    open_page(browser, path)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page, card = browser.execute_script(
        """
        const colour = (selector) => getComputedStyle(document.querySelector(selector)).backgroundColor;
        return [colour("body"), colour(".picture .card")];
        """
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    brightness = sum(map(int, re.findall(r"\d+", page)[:3])) / 3
    assert (brightness > 200) == (scheme == "light")
    assert (brightness < 50) == (scheme == "dark")
    assert card == "rgb(255, 255, 255)"


def test_sorting_and_folding_work_from_the_keyboard(browser, demo):
    _, path = demo
    open_page(browser, path)
    button = browser.find_element(By.XPATH, "//table[@id='list']//th/button[text()='row']")
    browser.execute_script("arguments[0].focus()", button)
    button.send_keys(" ")
    rows = [int(row) for row in listed(browser)["row"]]
    assert rows == sorted(rows)
    assert browser.switch_to.active_element == button
    summary = browser.find_element(By.CSS_SELECTOR, "#list summary")
    summary.send_keys("\n")
    WebDriverWait(browser, 5).until(lambda driver: texts_of(driver, "#list .speech"))


def test_the_page_prints(browser, demo):
    _, path = demo
    open_page(browser, path)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = browser.execute_script(
        "return ['.controls', 'nav'].map((name) => getComputedStyle(document.querySelector(name)).display)"
    )
    overflow = browser.execute_script("return getComputedStyle(document.querySelector('.scroll')).overflowX")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert hidden == ["none", "none"]
    assert overflow == "visible"


def test_the_words_of_a_completion_are_coloured_by_their_token_scores(browser, tmp_path):
    """Orange for harmful, blue for helpful, nothing for 0; by characters, not UTF-16; a search marks instead."""
    pieces = [(3, 0), (5, -9), (1, 4), (2, 9)]
    example = make_example(completion=" So 𝒃adly! ok", pieces=pieces)
    report = make_report(tmp_path, subsets=[Subset("s", "", [example, make_example(2)])])
    write_report(report, tmp_path / "report.html")
    open_page(browser, tmp_path / "report.html")
    assert any("Colour on the words" in note for note in texts_of(browser, "ul.notes li"))
    browser.execute_script("document.querySelectorAll('#list details').forEach((each) => { each.open = true; })")
    WebDriverWait(browser, 5).until(lambda _: texts_of(browser, ".unlearned .text"))
    coloured = browser.execute_script(
        "return [...document.querySelectorAll('#list .token')].map((each) => "
        "[each.className, each.textContent, each.title, getComputedStyle(each).backgroundColor])"
    )
    assert [one[:2] for one in coloured] == [
        ["token harmful", " 𝒃adl"],
        ["token helpful", "y"],
        ["token helpful", "! "],
    ]
    assert coloured[0][2] == "harmful: -1.0 of the largest score in this dialogue"
    assert coloured[0][3].startswith("rgba(230, 97, 1")
    assert coloured[1][3] != coloured[2][3]
    assert texts_of(browser, ".unlearned .text")[0] == "So 𝒃adly! ok"
    open_page(browser, tmp_path / "report.html", "#dialogues?search=adly")
    browser.execute_script("document.querySelectorAll('#list details').forEach((each) => { each.open = true; })")
    WebDriverWait(browser, 5).until(lambda _: texts_of(browser, ".unlearned mark"))
    assert not texts_of(browser, "#list .token")


def test_without_token_scores_nothing_is_said_of_colour(tmp_path):
    page = render(make_report(tmp_path, subsets=[Subset("s", "", [make_example()])]))
    assert "Colour on the words" not in page


def test_pieces_of_cut_texts_are_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "LARGEST_BYTES", 100_000)
    long = make_example(completion=" word" * 20_000, pieces=[(5, -3)] * 20_000)
    data = page_data(render(Report("t", "", {}, [], [], [Subset("s", "", [long])], [])))
    assert data["longest"] is not None
    shown = data["examples"][0][-1]
    assert data["longest"] <= sum(shown[::2]) <= data["longest"] + 5
