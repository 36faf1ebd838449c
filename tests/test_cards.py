"""Model cards: names of a user's own are text in them, and tell nobody where his folders are."""

from __future__ import annotations

import re
from pathlib import Path

import hostile
import pytest
import yaml
from conftest import Workspace, run_script

from utils.files import read_json
from utils.reporting.cards import repair_card, sft_card
from utils.reporting.escaping import markdown_text

HOSTILE = "x\n# Heading\n\n<script>alert(1)</script>`|*_a_ [a](b) ![c](d) ~~e~~ --- &lt; \\\u2028\u202e\x00"
MEANS_ITSELF = {"pythia-70m_helpful.sft": "pythia-70m_helpful.sft", "data/demo/hh": "data/demo/hh"}


def unescaped(markdown: str) -> str:
    """What a reader sees of text without markup."""
    text = re.sub(r"\\([!-/:-@[-`{-~])", r"\1", markdown)
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_text_is_escaped_and_reads_as_before():
    escaped = markdown_text(HOSTILE)
    assert "\n" not in escaped
    assert not re.search(r"(?<!\\)([`*|~$<>]|\]\()", escaped.replace("\\\\", ""))
    assert unescaped(escaped) == " ".join(
        HOSTILE.replace("\u2028", " ").replace("\u202e", " ").replace("\0", " ").split()
    )


@pytest.mark.parametrize(("text", "expected"), MEANS_ITSELF.items())
def test_ordinary_names_are_left_as_they_are(text, expected):
    assert markdown_text(text) == expected


def assert_only_our_own_markup(card: str, headings: list[str]) -> None:
    _, front, body = card.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert set(metadata) <= {"base_model", "datasets", "library_name", "pipeline_tag", "tags"}
    assert metadata["library_name"] == "transformers"
    found = [line for line in body.splitlines() if re.match(r" {0,3}(#|=+$|-+$|>|```)", line)]
    assert len(found) == len(headings)
    assert all(line.startswith(heading) for line, heading in zip(found, headings, strict=True))
    assert not re.search("[<>]", body)


REPORT = {
    "task": "bias",
    "scores_type": "random",
    "bottom_k": 5,
    "top_k": 0,
    "harmful_tokens_only": False,
    "preserve_perplexity": False,
    "preserve_tasks": False,
    "num_steps": 1,
    "learning_rate": 0.01,
    "num_blocks": 1,
    "search": {"stopped": "at the budget"},
    "split_rules": {},
    "measurements": {},
}


def test_a_hostile_name_is_text_in_the_card_of_a_repair():
    card = repair_card({**REPORT, "model": HOSTILE, "dataset": HOSTILE, "settings": {"NAME": HOSTILE}})
    assert_only_our_own_markup(card, ["# x # Heading", "## How it was made", "## Intended use and limits"])


@pytest.mark.parametrize("name", [name for name in hostile.NAMES if "\udc80" not in name])
def test_hostile_names_and_settings_are_text_in_a_card(name):
    markdown_it = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")

    def kinds(name: str) -> list[str]:
        settings = {"NAME": name, name: name, f"A`\n# {name}": "x"}
        card = repair_card({**REPORT, "model": f"a {name}", "dataset": name, "settings": settings})
        _, front, body = card.split("---\n", 2)
        assert yaml.safe_load(front) == yaml.safe_load(
            repair_card({**REPORT, "model": "m", "dataset": "d", "settings": {}}).split("---\n")[1]
        )
        tokens = markdown_it.parse(body)
        return [
            child.type for token in tokens for child in (token, *(token.children or [])) if "text" not in child.type
        ]

    assert kinds(name) == kinds("a plain name")


def test_a_hostile_name_is_text_in_the_card_of_a_fine_tuned_model():
    constants = {"BASE_MODEL": HOSTILE, "HH_DATASET": f"/somewhere/{HOSTILE}"}
    constants |= {"NUM_EPOCHS": 1, "BATCH_SIZE": 1, "LEARNING_RATE": 0.1, "SEED": 0}
    card = sft_card(constants, 5, {"before": 2.0, "after": 1.5, "after_low": 1.4, "after_high": 1.6})
    assert_only_our_own_markup(card, ["# ", "## Intended use and limits"])


def test_nothing_beside_a_model_says_where_somebodys_folders_are(workspace, tmp_path):
    sft = ["--HH_DATASET", workspace.data / "hh", "--SFT_MODEL_DIR", tmp_path / "sft", "--NUM_EPOCHS", 1]
    run_script("data/make_sft_model.py", *sft, "--BASE_MODEL", workspace.model)
    made = Workspace(tmp_path / "sft", workspace.data, workspace.output)
    made.run("compute_factors_and_scores.py", "--FACTOR_STRATEGY", "identity", "--TASK_NAME", "bias")
    repair = ["--TASK_NAME", "bias", "--BOTTOM_K", 5]
    made.run("make_gradients.py", "--FACTOR_STRATEGY", "identity", *repair)
    made.run("gradient_ascent_and_save.py", *repair, "--COMPUTE_TASK_EVAL", False)
    (repaired,) = (workspace.output / "gradient_ascent_models").iterdir()
    report = read_json(repaired / "repair.json")
    assert (report["model"], report["dataset"]) == ("sft", "hh")
    assert read_json(tmp_path / "sft" / "manifest.json")["settings"]["BASE_MODEL"] == workspace.model.name
    for folder in (tmp_path / "sft", repaired):
        texts = [file for file in folder.iterdir() if file.suffix in (".json", ".md")]
        assert {"README.md", "manifest.json", "config.json"} <= {file.name for file in texts}
        telling = [file for file in texts if re.search(f"{tmp_path.parent}|{Path.home()}/", file.read_text("utf-8"))]
        assert not telling


@pytest.mark.parametrize(
    ("choice", "relation"),
    [
        ({"scores_type": "dpp"}, "The method is that of"),
        ({"scores_type": "contrast"}, "The method extends, or is compared with, that of"),
        ({"scores_type": "dpp", "preserve_tasks": True}, "The method extends, or is compared with, that of"),
        ({"scores_type": "pure_ekfac", "num_steps": 2}, "The method extends, or is compared with, that of"),
        ({"settings": {"FACTOR_STRATEGY": "ekfac_cg"}}, "The method extends, or is compared with, that of"),
    ],
)
def test_a_card_says_whether_the_method_is_the_papers(choice, relation):
    report = {**REPORT, "model": "m", "dataset": "d", "settings": {}, **choice}
    assert f"{relation} *Enhancing Trustworthiness" in repair_card(report)
