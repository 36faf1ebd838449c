"""Artifacts on disk: written whole or not at all, with a manifest that says what they were made from.

A manifest is written last and everything goes to a temporary name first, so "the manifest exists" means "the
artifact is complete". Its `fingerprint` covers the settings and the fingerprints of the inputs, so that a change
anywhere upstream is noticed by every step below it.

Of several processes the first one alone decides whether an artifact is finished, and writes; all of them read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.console import UserError, say, say_read, shown_path
from utils.hub import allows_remote_code
from utils.paths import PROJECT_ROOT
from utils.processes import first_process_only, launched

VERSIONED_PACKAGES = ("torch", "transformers", "kronfluence", "accelerate", "datasets", "numpy")
FINGERPRINT_BYTES = 16
FINGERPRINT_PIECE_BYTES = 16 << 20
STAGING_MARKER = "settings.json"  # in a folder that is not complete yet: what it is being made from


def fingerprint_of(value: Any) -> str:  # noqa: ANN401
    """Fingerprint of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=FINGERPRINT_BYTES).hexdigest()


def fingerprint_of_files(files: Iterable[Path]) -> str:
    """Fingerprint of the names and contents of files, hashed in pieces by as many threads as there are cores.

    The hash of the pieces is not cryptographic: it detects changes, at the speed of the disk.
    """

    def digest_of(piece: tuple[Path, int]) -> bytes:
        file, offset = piece
        with file.open("rb") as stream:
            stream.seek(offset)
            return xxhash.xxh3_128_digest(stream.read(FINGERPRINT_PIECE_BYTES))

    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for file in sorted(files):
            pieces = [(file, offset) for offset in range(0, file.stat().st_size, FINGERPRINT_PIECE_BYTES)]
            digest.update(file.name.encode("utf-8"))
            for piece in threads.map(digest_of, pieces):
                digest.update(piece)
    return digest.hexdigest()


@functools.cache
def software_versions() -> dict[str, str]:
    """Versions of python, of the packages that the numbers depend on, and this repository's git commit."""
    versions = {"python": platform.python_version()}
    versions.update({name: metadata.version(name) for name in VERSIONED_PACKAGES})
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
        )
        versions["git_commit"] = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        versions["git_commit"] = "unknown"
    return versions


@first_process_only
def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


@first_process_only
def write_if_changed(path: Path, text: str) -> None:
    """Write a text file, unless it says the same already."""
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def to_json(value: Any) -> str:  # noqa: ANN401
    """Readable JSON; NaN and infinity are refused, since JSON has neither."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def require_finite(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Check tensors for NaN and infinity.

    Raises:
        UserError: names the source and the first tensor that is not finite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{source}: tensor {name!r} has {count} values that are NaN or infinite of {tensor.numel()}"
            )


def read_json(path: Path, remedy: str = "delete it and run the step again") -> Any:  # noqa: ANN401
    """Read a JSON file.

    Args:
        remedy: what the user is told to do where it is broken.

    Raises:
        UserError: the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{shown_path(path)} is not valid JSON ({error}); {remedy}") from None


def differing_values(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str = "there") -> list[str]:
    """Both values of every name that differs, in words; a missing one is None."""
    return [
        f"{name} = {theirs.get(name)!r} {where}, {ours.get(name)!r} now"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]


def _shape_in_words(shapes: dict[str, list[int]]) -> str:
    return " x ".join(map(str, next(iter(shapes.values())))) if len(shapes) == 1 else f"{len(shapes)} tensors"


@dataclass(frozen=True)
class Artifact:
    """One artifact of a step, a file or a folder, and what it is made from.

    Attributes:
        path: the file or folder.
        made_by: the script that writes it, named when it is missing.
        settings: the constants that its content depends on.
        inputs: fingerprints of what it was made from, by name ("model", "dataset", upstream artifacts).
        is_folder: whether the artifact is a folder; its manifest then lies inside.
        quiet: print nothing about it.
    """

    path: Path
    made_by: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    is_folder: bool = False
    quiet: bool = False

    @property
    def manifest_path(self) -> Path:
        """`x.safetensors` has `x.manifest.json` beside it, a folder `manifest.json` inside."""
        if self.is_folder:
            return self.path / "manifest.json"
        return self.path.with_name(f"{self.path.stem}.manifest.json")

    @property
    def partial_path(self) -> Path:
        """Where the artifact grows until it is complete."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the settings and inputs."""
        return fingerprint_of({"settings": self.settings, "inputs": self.inputs})

    @first_process_only
    def is_finished(self, overwrite: bool = False) -> bool:
        """Whether a complete artifact made with these settings and inputs is there already.

        With `overwrite`, one made with others counts as unfinished, and is replaced when the new one is complete.

        Raises:
            UserError: the artifact was made with other settings or inputs; shows both values.
        """
        if not self.manifest_path.exists() or not self.path.exists():
            return False
        manifest = self._read_manifest()
        differences = differing_values(manifest["settings"], self.settings)
        differences += differing_values(manifest["inputs"], self.inputs)
        if differences and not overwrite:
            raise UserError(
                f"{shown_path(self.path)} was made with other settings: {'; '.join(differences)}. "
                "Set OVERWRITE = True to replace it, or choose another OUTPUT_DIR to keep both"
            )
        if not differences and not self.quiet:
            say(f"   finished before: {shown_path(self.path)}")
        return not differences

    def require(self) -> dict[str, Any]:
        """The manifest of an artifact that a later step reads.

        Raises:
            UserError: it is missing or incomplete, or was made from another model or dataset.
        """
        if not self.manifest_path.exists() or not self.path.exists():
            constants = ", ".join(f"{name} = {value!r}" for name, value in self.settings.items())
            raise UserError(
                f"{shown_path(self.path)} is missing or incomplete; run {self.made_by} first"
                + (f", with {constants}" if constants else "")
            )
        manifest = self._read_manifest()
        recorded = {**manifest["settings"], **manifest["inputs"]}
        for name, value in {**self.settings, **self.inputs}.items():
            if recorded.get(name) != value:
                raise UserError(
                    f"{shown_path(self.path)} was made with {name} = {recorded.get(name)!r}, but this step has "
                    f"{name} = {value!r}; make them agree or run {self.made_by} again with OVERWRITE = True"
                )
        return manifest

    def _read_manifest(self) -> dict[str, Any]:
        manifest = read_json(self.manifest_path, f"delete it and run {self.made_by} again")
        if not isinstance(manifest, dict) or not {"fingerprint", "settings", "inputs"} <= set(manifest):
            raise UserError(
                f"{shown_path(self.manifest_path)} is not a valid manifest; delete it and run {self.made_by} again"
            )
        return manifest

    def load_tensors(self) -> dict[str, torch.Tensor]:
        """Read a safetensors artifact.

        Raises:
            UserError: missing, made from something else, unreadable or truncated, or not finite.
        """
        self.require()
        try:
            tensors = load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{shown_path(self.path)} cannot be read ({error}); delete it and run {self.made_by} again"
            ) from None
        require_finite(tensors, f"{shown_path(self.path)} (delete it and run {self.made_by} again)")
        if not self.quiet:
            say_read(shown_path(self.path), _shape_in_words({name: list(t.shape) for name, t in tensors.items()}))
        return tensors

    def load_json(self) -> Any:  # noqa: ANN401
        """Read a JSON artifact.

        Raises:
            UserError: missing, made from something else, or not valid JSON.
        """
        self.require()
        return read_json(self.path, f"delete it and run {self.made_by} again")

    @first_process_only
    def save_tensors(self, tensors: dict[str, torch.Tensor], started: float, **details: Any) -> None:  # noqa: ANN401
        """Write a safetensors artifact and its manifest.

        Args:
            tensors: checked to be finite before anything is written.
            started: `time.monotonic()` when the work on it began.
            details: further facts for the manifest.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        require_finite(tensors, shown_path(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, self.partial_path)
        self._publish_file(started, {name: list(tensor.shape) for name, tensor in tensors.items()}, details)

    @first_process_only
    def save_json(self, content: Any, started: float, **details: Any) -> None:  # noqa: ANN401
        """Write a JSON artifact and its manifest.

        Raises:
            UserError: a number is NaN or infinite; then nothing is written.
        """
        try:
            text = to_json(content)
        except ValueError as error:
            raise UserError(f"{shown_path(self.path)} is not written: a number is NaN or infinite ({error})") from None
        write_atomically(self.partial_path, text)
        self._publish_file(started, {}, details)

    def _publish_file(self, started: float, shapes: dict[str, list[int]], details: dict[str, Any]) -> None:
        self.manifest_path.unlink(missing_ok=True)
        self.partial_path.replace(self.path)
        write_atomically(self.manifest_path, to_json(self._manifest(started, shapes, details)))
        self._say_written(started, shapes)

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A temporary folder, which keeps what a killed run with the same settings and inputs left."""
        self._prepare_staging_folder()
        yield self.partial_path

    @first_process_only
    def _prepare_staging_folder(self) -> None:
        marker = self.partial_path / STAGING_MARKER
        if not marker.exists() or read_json(marker)["fingerprint"] != self.fingerprint:
            shutil.rmtree(self.partial_path, ignore_errors=True)
            write_atomically(marker, to_json({"fingerprint": self.fingerprint, **self.settings}))

    @first_process_only
    def publish_folder(self, started: float, shapes: dict[str, list[int]], **details: Any) -> None:  # noqa: ANN401
        """Put the manifest into the staging folder and give the folder its name."""
        manifest = to_json(self._manifest(started, shapes, details))
        write_atomically(self.partial_path / self.manifest_path.name, manifest)
        if self.path.exists():
            self.manifest_path.unlink(missing_ok=True)  # half removed, the old folder must not look finished
            shutil.rmtree(self.path)
        self.partial_path.replace(self.path)
        (self.path / STAGING_MARKER).unlink()  # until here a killed run resumes
        self._say_written(started, shapes)

    def _manifest(self, started: float, shapes: dict[str, list[int]], details: dict[str, Any]) -> dict[str, Any]:
        return {
            "artifact": self.path.name,
            "made_by": self.made_by,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "inputs": self.inputs,
            "shapes": shapes,
            "seconds": round(time.monotonic() - started, 3),
            "versions": software_versions(),
            "processes": launched(),
            "trust_remote_code": allows_remote_code(),
            **details,
        }

    def _say_written(self, started: float, shapes: dict[str, list[int]]) -> None:
        content = f": {_shape_in_words(shapes)}," if shapes else ""
        if not self.quiet:
            say(f"   wrote {shown_path(self.path)}{content} in {time.monotonic() - started:.1f} s")
