"""Artifacts that anything may have happened to: whatever is read is as it was written, or refused in one line.

FUZZ=500 pytest tests/test_fuzz.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from conftest import Workspace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_resume import ARGUMENTS, DPP, FACTORS, STEP_1, STEP_2, STEP_3, STEP_4, STEP_5

from utils.artifacts import Artifact, FileArtifact
from utils.console import UserError
from utils.files import to_json
from utils.folder_artifacts import FolderArtifact
from utils.paths import PAPER_TABLES

FUZZ = int(os.environ.get("FUZZ", "60"))
FUZZED = settings(
    max_examples=FUZZ,
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
SLOW = settings(FUZZED, max_examples=max(3, FUZZ // 12))  # whole steps

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
JSON = st.recursive(SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4))
BYTES = st.binary(max_size=64)


def places_in(value: object, path: tuple = ()) -> list[tuple]:
    """Where in a JSON value something can be changed."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places_in(part, (*path, key)))]


@st.composite
def changed_json(draw: st.DrawFn, value: object) -> bytes:
    """The JSON with one value replaced or deleted, a number changed, nested deep, or with many digits."""
    place = draw(st.sampled_from(places_in(value)))
    holder = {"root": json.loads(json.dumps(value))}
    part, keys = holder, ("root", *place)
    for key in keys[:-1]:
        part = part[key]
    what = draw(st.sampled_from(["replace", "delete", "double", "deep", "digits"]))
    if what == "delete" and place:
        del part[keys[-1]]
    elif what == "double" and isinstance(part[keys[-1]], (list, int, str)) and not isinstance(part[keys[-1]], bool):
        part[keys[-1]] = part[keys[-1]] * 2
    else:
        part[keys[-1]] = draw(JSON)
    text = json.dumps(holder["root"])
    if what == "deep":
        text = "[" * 100_000 + text
    if what == "digits":
        text = f"[{'9' * 5_000}, {text}]"
    return text.encode("utf-8", "surrogatepass")


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes cut short, overwritten in the middle, or continued."""
    position = draw(st.integers(0, len(data)))
    return data[:position] + draw(BYTES) + draw(st.sampled_from([b"", data[position:], data[position + 8 :]]))


@st.composite
def changed_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header says something else, as long as it was or not."""
    (length,) = struct.unpack("<Q", data[:8])
    header = draw(changed_json(json.loads(data[8 : 8 + length])))
    if draw(st.booleans()):
        header = header[:length].ljust(length)
    return struct.pack("<Q", draw(st.sampled_from([len(header), length, 2**63, 0]))) + header + data[8 + length :]


def changed(data: bytes, suffix: str) -> st.SearchStrategy[bytes]:
    if suffix == ".json":
        return changed_json(json.loads(data)) | changed_bytes(data)
    return changed_tensors(data) | changed_bytes(data)


# ------------------------------------------------------------------------------------------------------- one artifact


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Artifact]:
    folder, inputs = tmp_path_factory.mktemp("stored"), {"model": "m0"}
    tensors = FileArtifact(folder / "scores.safetensors", STEP_1, {"NUM_BLOCKS": 1}, inputs)
    tensors.save_tensors({"all_modules": torch.arange(6.0).reshape(1, 6)}, time.monotonic(), indices=[1, 2])
    text = FileArtifact(folder / "indices.json", STEP_3, {"BOTTOM_K": 2}, inputs)
    text.save_json({"indices": [1, 2], "seconds": 1.5}, time.monotonic())
    whole = FolderArtifact(folder / "factors", STEP_1, {"NUM_BLOCKS": 1}, inputs)
    with whole.staging_folder() as staging:
        (staging / "lambda.safetensors").write_bytes(tensors.path.read_bytes())
        whole.publish_folder(time.monotonic(), {"lambda": [1, 6]})
    return {"tensors": tensors, "json": text, "folder": whole}


@pytest.mark.parametrize("kind", ["tensors", "json", "folder"])
@pytest.mark.parametrize("part", ["artifact", "manifest"])
@FUZZED
@given(data=st.data())
def test_a_changed_artifact_is_read_as_it_was_or_refused(stored, kind, part, data):
    artifact = stored[kind]
    file = artifact.manifest_path if part == "manifest" else artifact.path
    file = file / "lambda.safetensors" if file.is_dir() else file
    content, manifest = file.read_bytes(), artifact.require()
    read = getattr(artifact, {"tensors": "load_tensors", "json": "load_json", "folder": "require"}[kind])
    expected = read()
    file.write_bytes(data.draw(changed(content, file.suffix)))
    try:
        with contextlib.suppress(UserError):
            assert artifact.is_finished() in (True, False)
        with contextlib.suppress(UserError):
            assert without_seconds(artifact.require()) == without_seconds(manifest)
            got = read()
            if kind == "tensors":
                assert got.keys() == expected.keys()
                assert all(torch.equal(got[name], expected[name]) for name in got)
            else:
                assert without_seconds(got) == without_seconds(expected)
    finally:
        file.write_bytes(content)


def without_seconds(value: dict) -> str:
    return to_json({key: part for key, part in value.items() if key != "seconds"})


# ------------------------------------------------------------------------------------------------------- whole steps

READ_BY = {  # what each step reads
    STEP_2: ["representations/pythia-tiny_sumreps.safetensors"],
    STEP_3: ["representations/pythia-tiny_sumreps.safetensors", "dpp/truth_pythia-tiny_indices_5_ifweight10.json"],
    STEP_4: [f"{FACTORS}/lambda_matrix.safetensors", "dpp/truth_pythia-tiny_indices_5_ifweight10.json"],
    STEP_5: ["ekfac_experiments/influence_results/truth_pythia-tiny/query_grads_dpp_ifweight10_bottom5/*.safetensors"],
    PAPER_TABLES: ["results/*_sweep.json", "results/*_repair.json", "results/losses/*_test_losses.safetensors"],
}
WORDS = {
    **ARGUMENTS,
    STEP_4: [*DPP, "--TASK_NAME", "truth", "--OVERWRITE", True],
    STEP_5: [*ARGUMENTS[STEP_5], "--TASK_NAME", "truth"],
    PAPER_TABLES: ["--TASKS", "truth", "--SCORES_TYPES", "dpp", "--PRESERVE_PERPLEXITY", "False", "--BOTTOM_K", 5]
    + ["--SEEDS", 42, "--IF_WEIGHT", 10, "--NUM_COMPLETIONS", 0, "--LEARNING_RATE", 0.02, "--SWEPT_RATES", 0.01, 0.02],
}


@pytest.fixture(scope="module")
def finished(make_workspace, tmp_path_factory) -> tuple[Workspace, Path]:
    """A workspace in which every step has run, and a copy of its output."""
    workspace = make_workspace("pythia")
    for script in (STEP_1, STEP_2, STEP_3, STEP_4, STEP_5, PAPER_TABLES):
        workspace.run(script, *WORDS[script])
    copy = tmp_path_factory.mktemp("copy") / "output"
    shutil.copytree(workspace.output, copy)
    return workspace, copy


@pytest.mark.parametrize(("script", "pattern"), [(script, file) for script, files in READ_BY.items() for file in files])
@SLOW
@given(data=st.data())
def test_a_step_ends_well_or_in_one_line_whatever_happened_to_what_it_reads(finished, capsys, script, pattern, data):
    workspace, copy = finished
    files = sorted(workspace.output.glob(pattern))
    assert files
    file = data.draw(st.sampled_from(files))
    manifest = file.with_name("manifest.json" if "factors" in pattern else f"{file.stem}.manifest.json")
    spoiled = file if not manifest.exists() or data.draw(st.booleans()) else manifest
    spoiled.write_bytes(data.draw(changed(spoiled.read_bytes(), spoiled.suffix)))
    capsys.readouterr()
    code = 0
    try:
        workspace.run(script, *WORDS[script])
    except SystemExit as stop:
        code = stop.code
    finally:
        shutil.rmtree(workspace.output)
        shutil.copytree(copy, workspace.output)
    told = capsys.readouterr().err
    assert code in (0, 1)
    assert told.count("error: ") == code
    assert "this is a bug" not in told
    assert "traceback" not in told.lower()
