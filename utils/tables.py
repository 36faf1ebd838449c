"""The paper's tables from a grid of repairs: mean and spread over seeds, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from utils.artifacts import write_if_changed
from utils.performance_functions.evaluation import MEASUREMENTS
from utils.reporting import FIGURE_STYLES, markdown_table

Row = dict[str, Any]
LATEX_ESCAPES = {"%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#", "±": r"$\pm$", "–": "--"}


@dataclass(frozen=True)
class ShownTable:
    """A table for people, and the rows behind it for programs."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    data: list[Row]

    def write(self, path: Path) -> None:
        """Write it beside `path` as .md, .tex and .csv; what says the same already is left untouched."""
        write_if_changed(path.with_suffix(".md"), f"{self.caption}\n\n{markdown_table(self.header, self.rows)}\n")
        write_if_changed(path.with_suffix(".tex"), latex_table(self.caption, self.header, self.rows))
        write_if_changed(path.with_suffix(".csv"), pd.DataFrame(self.data).to_csv(index=False))


def latex_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A booktabs table; the first columns of words are left-aligned, the others right-aligned."""

    def escaped(text: str) -> str:
        return "".join(LATEX_ESCAPES.get(character, character) for character in text)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(map(escaped, cells)) + r" \\"

    columns = "".join("r" if all(_leads_with_number(row[i]) for row in rows) else "l" for i in range(len(header)))
    body = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(caption)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        line(header),
        r"\midrule",
        *map(line, rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(body) + "\n"


def _leads_with_number(cell: str) -> bool:
    return cell in ("", "–") or cell.lstrip("+-")[:1].isdigit()


def spread(values: Sequence[float], form: str = "+.1f", unit: str = "") -> str:
    """`mean ± standard deviation` over seeds; the mean alone for one seed, a dash for none."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}{unit}" if len(values) > 1 else f"{mean}{unit}"


def _by_repair(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of the same repair with different seeds, together."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "task", "method", "bottom_k", "if_weight"))
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def main_table(
    baselines: Sequence[tuple[str, Mapping[str, Row]]],
    repairs: Sequence[Row],
    known_harm: Mapping[str, Collection[int]] | None,
) -> ShownTable:
    """For each model: before fine-tuning (if given), POST-SFT, and every repair.

    Args:
        baselines: a label and the measurements of each model that is not repaired.
        repairs: `grid.repair_row` of every cell and seed.
        known_harm: rows of each kind of known harm; adds how many of them a repair unlearned.
    """
    header = ["model", "repaired for", "method", "perplexity", "change", *MEASUREMENTS, "improvement"]
    header += ["step size", "seconds"] + (["known harm"] if known_harm else [])
    rows = []
    for label, results in baselines:
        losses = [spread([results[task]["loss"]] if task in results else [], ".4f") for task in MEASUREMENTS]
        perplexity = [results["anthropic"]["perplexity"]] if "anthropic" in results else []
        cells = [label, "–", "–", spread(perplexity, ".3f"), "–", *losses]
        rows.append(cells + ["–"] * (len(header) - len(cells)))
    for group in _by_repair(repairs):
        first = group[0]

        def values(name: str, group: list[Row] = group) -> list[float]:
            return [row[name] for row in group if name in row and row[name] is not None]

        cells = [
            first["model"],
            first["task"],
            first["method"],
            spread(values("perplexity"), ".3f"),
            spread(values("perplexity_change_percent"), "+.2f", " %"),
            *(
                f"{spread(values(task), '.4f')} ({spread(values(f'{task}_improvement_percent'), '+.1f', ' %')})"
                for task in MEASUREMENTS
            ),
            spread(values("improvement_percent"), "+.1f", " %"),
            spread(values("learning_rate"), ".3g"),
            spread(values("seconds"), ".1f"),
        ]
        if known_harm:
            cells.append(_known_harm_found(group, known_harm))
        rows.append(cells)
    caption = (
        "What each repair did. Perplexity on the HH test split; log-odds losses on the test pairs in nats per token, "
        "lower is better, and their improvement. Combined: the improvement is the mean over the three tasks."
    )
    return ShownTable(caption, header, rows, [flat(row) for row in repairs])


def flat(row: Row) -> Row:
    """A repair's row without the list of what it unlearned."""
    return {name: value for name, value in row.items() if name != "indices"}


def _known_harm_found(group: Sequence[Row], known_harm: Mapping[str, Collection[int]]) -> str:
    harmful = {row for kind, rows in known_harm.items() if group[0]["task"] in (kind, "combined") for row in rows}
    found = [len(harmful & set(row["indices"])) for row in group]
    return f"{spread(found, '.3g')} of {len(group[0]['indices'])}" if group[0]["indices"] else "–"


def ablation_table(repairs: Sequence[Row], varied: str) -> ShownTable:
    """One line for each task, method and value of the constant that is varied ("bottom_k" or "if_weight")."""
    header = ["repaired for", "method", varied.upper(), "improvement", "perplexity change", "step size"]
    groups = sorted(_by_repair(repairs), key=lambda group: [group[0][name] for name in ("task", "method", varied)])
    rows = [
        [
            group[0]["task"],
            group[0]["method"],
            f"{group[0][varied]:g}",
            spread([row["improvement_percent"] for row in group], "+.1f", " %"),
            spread([row["perplexity_change_percent"] for row in group], "+.2f", " %"),
            spread([row["learning_rate"] for row in group], ".3g"),
        ]
        for group in groups
    ]
    caption = f"What {varied.upper()} does, the other constants as in the main table."
    return ShownTable(caption, header, rows, [flat(row) for row in repairs])


def ablation_figure(repairs: Sequence[Row], varied: str, path: Path) -> None:
    """Improvement and perplexity change against the varied constant: a column for each task, a line for each method."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row["task"] for row in repairs))
    figure = Figure(figsize=(3.6 * len(tasks), 5.4), layout="constrained")
    panels = figure.subplots(2, len(tasks), sharex=True, sharey="row", squeeze=False)
    labels = {"improvement_percent": "improvement, %", "perplexity_change_percent": "perplexity change, %"}
    for column, task in enumerate(tasks):
        for panel, (measured, label) in zip(panels[:, column], labels.items(), strict=True):
            for method in dict.fromkeys(row["method"] for row in repairs):
                groups = _by_repair([row for row in repairs if (row["task"], row["method"]) == (task, method)])
                groups.sort(key=lambda group: group[0][varied])
                means = [statistics.fmean(row[measured] for row in group) for group in groups]
                spreads = [
                    statistics.stdev(row[measured] for row in group) if len(group) > 1 else 0 for group in groups
                ]
                colour, marker = next(style for name, style in FIGURE_STYLES.items() if method.startswith(name))
                values = [group[0][varied] for group in groups]
                panel.errorbar(
                    values, means, spreads, color=colour, marker=marker, ms=5, lw=1.2, capsize=2, label=method
                )
            panel.set_xscale("symlog" if any(row[varied] == 0 for row in repairs) else "log")
            panel.axhline(0, color="#999999", lw=0.8)
            panel.grid(alpha=0.25)
            if column == 0:
                panel.set_ylabel(label)
        ticks = sorted({row[varied] for row in repairs})
        panels[1, column].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panels[1, column].minorticks_off()
        panels[1, column].set_xlabel(varied.upper())
        panels[0, column].set_title(task)
    panels[0, 0].legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
