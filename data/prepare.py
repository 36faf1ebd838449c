"""Before step 1: fetch the official data.

    python data/prepare.py --BIAS_SOURCE path/to/checkout --PROMPT_SOURCE path/to/checkout
    python data/prepare.py --ONLY hh truth ethics
    python data/prepare.py --ONLY truth --TRUTH_SOURCE path/to/TruthfulQA.csv

Puts the dialogues (hh), TruthfulQA (truth), ETHICS commonsense (ethics), the prompt of its statements (prompt) and the
stereotype templates (bias) into DATA_DIR, from the hub or from local copies, in the formats that the steps read. Each
file is written under a temporary name and loaded with the project's own loader; only then does it get its final name,
and last of all its manifest. So a manifest means that the file is complete: a finished file is not fetched again, a
killed run resumes, and a file that was truncated or edited since is noticed.

The stereotypes and counter-statements of bias and the prompt of ethics are in the code of the paper's authors. Give a
local checkout of github.com/kyrs/tracing-llm-trust as BIAS_SOURCE and PROMPT_SOURCE, or copies of its bias_dataset.py
and ethics_dataset.py, which are parsed, never imported or run; or a templates.json as in data/demo/bias, and a
prompt.txt. Of a Python file's assignments of a literal to a name, at any depth, these are recognised, in upper or lower
case, and all others are ignored:

    topics         {topic: {"stereotype": [...], "antistereotype": [...]}} under any name; or two dictionaries
                   {topic: [...]} with the same topics: one whose name contains "anti" or "counter", and another
                   whose name contains "stereo"
    target groups  a list of texts whose name contains "group"
    prompt         of bias: a text that contains [target_group] or whose name contains "prompt", preferably both;
                   of ethics: the one text whose name contains "prompt"

BIAS_SPLIT is written into templates.json. "disjoint" keeps all pairs of a (group, topic) together. "released" is the
split of the paper's numbers: both texts of each of its test pairs are in training pairs too.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import time
from typing import Any, Literal

from data.official.files import PreparedFile
from data.official.parts import FILES, PARTS, OfficialFile, PartName
from data.official.sources import Source, find_source
from steps import require_writable, run_step
from utils.console import UserError, banner, is_disk_full, remedy_for, say, shown_path
from utils.files import fingerprint_of_files
from utils.locks import locked
from utils.paths import resolve_path
from utils.processes import first_process_only
from utils.reporting.tables import markdown_table
from utils.settings import Choices, Settings

# ------------------------------------------------------------------------------------------------ constants
DATA_DIR: str = "data"  # folder to put the files into, as hh/, truthfulness/, ethics/ and bias/
ONLY: Choices[PartName] = ["hh", "truth", "ethics", "prompt", "bias"]  # parts to fetch, of these five
HH_SOURCE: str = "Dahoas/static-hh"  # hub id, or a local folder with train.jsonl and test.jsonl
TRUTH_SOURCE: str = "truthfulqa/truthful_qa"  # hub id, or the original TruthfulQA.csv
ETHICS_SOURCE: str = "hendrycks/ethics"  # hub id, or a local folder with cm_train.csv and cm_test.csv
PROMPT_SOURCE: str | None = None  # a checkout of the authors' code, its ethics_dataset.py, or a prompt.txt
BIAS_SOURCE: str | None = None  # a checkout of the authors' code, its bias_dataset.py, or a templates.json
BIAS_SPLIT: Literal["disjoint", "released"] = "disjoint"  # of the bias pairs: "disjoint", "released" (leaks)
CHECK_COUNTS: bool = True  # refuse row counts that differ from the official ones
OVERWRITE: bool = False  # replace files that come from another source or have changed since
# -----------------------------------------------------------------------------------------------------------


@first_process_only
def main(settings: Settings) -> None:
    """Fetch the parts in ONLY; stop at the first that fails, and say what is finished."""
    banner("official data", settings.DATA_DIR)
    data_dir = resolve_path(settings.DATA_DIR)
    require_writable("DATA_DIR", settings.DATA_DIR)
    sources = {
        part: find_source(part, settings, PARTS[part].local_form, PARTS[part].may_be_file, PARTS[part].is_on_hub)
        for part in settings.ONLY
    }
    manifests: dict[str, dict[str, Any]] = {}
    for file in (file for file in FILES if file.part in sources):
        source = sources[file.part]
        try:
            manifests[file.name] = prepare(file, source, data_dir, settings)
        except (UserError, OSError, UnicodeEncodeError) as error:
            message = str(error)
            if not isinstance(error, UserError):
                reason = "it cannot be read or written; give another source or DATA_DIR"
                if is_disk_full(error):
                    reason = "the disk is full; give another source or DATA_DIR"
                elif isinstance(error, OSError):
                    reason = remedy_for(error) or reason
                message = f"{source}, {file.name}: {reason} ({error})"
            finished = f"; finished and kept: {', '.join(manifests)}" if manifests else ""
            raise UserError(f"{message}{finished}") from error
    say_summary(manifests, data_dir)
    say_next(data_dir, settings.DATA_DIR)


def prepare(file: OfficialFile, source: Source, data_dir: Path, settings: Settings) -> dict[str, Any]:
    """Put one file into DATA_DIR, unless it is there.

    Returns:
        Its manifest.

    Raises:
        UserError: the source lacks the file, or its content is not what the steps need.
        OSError, UnicodeEncodeError: it cannot be read or written.
    """
    started = time.monotonic()
    inputs = {} if source.path is None else {"source": fingerprint_of_files([source.file(file.candidates)])}
    options = settings.pick(*PARTS[file.part].options)
    constants = {source.setting: source.value, **options}
    output = PreparedFile(data_dir / file.name, "data/prepare.py", constants, inputs)
    if source.path is not None and output.path.is_relative_to(source.path):
        raise UserError(f"{source} is where {shown_path(output.path)} is written; give a source outside it")
    if output.is_finished(settings.OVERWRITE):
        if settings.CHECK_COUNTS:
            file.check_count(source, output.require()["rows"])
        return output.require()
    say(f"   fetching {file.name} from {source.value}")
    content = PARTS[file.part].content(source, file.split, file.candidates, *options.values())
    if content.num_rows == 0:
        raise UserError(f"{source} gives no rows for {file.name}; it needs at least one")
    with locked(output.path.parent), output.staged(content.text) as staging_dir:
        loaded = file.count_loaded(source, staging_dir)
        count = content.num_rows or sum(loaded.values())
        if settings.CHECK_COUNTS:
            file.check_count(source, count)
        output.publish(started, settings.OVERWRITE, rows=count, loads_as=loaded, notes=content.notes)
    return output.require()


def say_summary(manifests: dict[str, dict[str, Any]], data_dir: Path) -> None:
    """Print a table of the files."""
    rows = []
    for file in (file for file in FILES if file.name in manifests):
        manifest = manifests[file.name]
        loaded = " + ".join(f"{count:,} {split}" for split, count in manifest["loads_as"].items())
        counts = [f"{manifest['rows']:,} {PARTS[file.part].unit}", f"{file.official_count:,}", loaded]
        rows.append([shown_path(data_dir / file.name), *counts, next(iter(manifest["settings"].values()))])
    say(markdown_table(["file", "holds", "official", "loads as", "from"], rows))


def say_next(data_dir: Path, shown: str) -> None:
    """Print the next command: this script again for missing parts, otherwise the first step."""
    missing = dict.fromkeys(file.part for file in FILES if not (data_dir / file.name).exists())
    if missing:
        sources = [f" --{part.upper()}_SOURCE path/to/checkout" for part in missing if not PARTS[part].is_on_hub]
        say(f"next: python data/prepare.py --DATA_DIR {shown} --ONLY {' '.join(missing)}{''.join(sources)}")
        return
    say(
        f"next: python data/make_sft_model.py --BASE_MODEL EleutherAI/pythia-160m --HH_DATASET {shown}/hh "
        "--SFT_MODEL_DIR models/pythia-160m-hh-sft --LEARNING_RATE 1e-5 --NUM_EPOCHS 1\n"
        "   or, with a POST-SFT model from the hub: python compute_factors_and_scores.py --MODEL_NAMES "
        f"lomahony/pythia-1.4b-helpful-sft --HH_DATASET {shown}/hh --DATA_DIR {shown}"
    )


if __name__ == "__main__":
    run_step(main)
