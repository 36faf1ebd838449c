"""Artifacts on disk: written whole or not at all, with a manifest that says what they were made from.

A manifest is written last and everything goes to a temporary name first, so "the manifest exists" means "the
artifact is complete". Its `fingerprint` covers the settings and the fingerprints of the inputs, so that a change
anywhere upstream is noticed by every step below it. It also lists the files with their sizes, and for a single file a
fingerprint of its content, so that what was changed, cut short or deleted since is not taken for what was written.

Whoever makes an artifact holds its lock (utils/locks.py) from the question whether it is finished until it is. Of
several processes the first one alone decides whether an artifact is finished, and writes; all of them read.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from utils.console import UserError, say, say_read, shown_path
from utils.files import (
    fingerprint_of,
    fingerprint_of_content,
    partial_of,
    read_json,
    remove,
    to_json,
    write_whole,
    written_whole,
)
from utils.hub import allows_remote_code
from utils.locks import locked
from utils.manifests import checksum_of, differing_values, read_manifest, software_versions
from utils.processes import first_process_only, launched
from utils.tensors import Shapes, require_finite, require_shapes


def _shape_in_words(shapes: dict[str, list[int]]) -> str:
    return " x ".join(map(str, next(iter(shapes.values())))) if len(shapes) == 1 else f"{len(shapes)} tensors"


@dataclass(frozen=True)
class Artifact(ABC):
    """One artifact of a step, a `FileArtifact` or a `FolderArtifact`, and what it is made from.

    Attributes:
        path: the file or folder.
        made_by: the script that writes it, named when it is missing.
        settings: the constants that its content depends on.
        inputs: fingerprints of what it was made from, by name ("model", "dataset", upstream artifacts).
        quiet: print nothing about it.
        placed_by: the constant that says where it goes.
    """

    path: Path
    made_by: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    quiet: bool = False
    placed_by: str = "OUTPUT_DIR"

    @property
    @abstractmethod
    def manifest_path(self) -> Path:
        """Where its manifest lies."""

    @abstractmethod
    def require_place(self) -> None:
        """Check, before the work, that nothing else is where the artifact goes.

        Raises:
            UserError: something else is there.
        """

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the settings and inputs."""
        return fingerprint_of({"settings": self.settings, "inputs": self.inputs})

    @property
    def remedy(self) -> str:
        """What the user is told to do where the artifact is broken."""
        return f"delete it and run {self.made_by} again"

    # -- is it there? --------------------------------------------------------------------------------------------------

    @first_process_only
    def is_finished(self, overwrite: bool = False) -> bool:
        """Whether a complete artifact made with these settings and inputs is there already.

        With `overwrite`, one made with others counts as unfinished, and is replaced when the new one is complete.

        Raises:
            UserError: the artifact was made with other settings or inputs (shows both values), or is damaged; or, with
                `overwrite` too, as `require_place`.
        """
        self.require_place()
        if not self._is_there():
            return False
        try:
            manifest = self._read_manifest()
            self._require_undamaged(manifest)
        except UserError:
            if overwrite:
                return False
            raise
        differences = differing_values(manifest["settings"], self.settings)
        differences += differing_values(manifest["inputs"], self.inputs)
        if differences and not overwrite:
            raise UserError(
                f"{shown_path(self.path)} was made with other settings: {'; '.join(differences)}"
                f"{self._hint(manifest)}. "
                f"Set OVERWRITE = True to replace it, or choose another {self.placed_by} to keep both"
            )
        if differences:
            return False
        with locked(self.path):  # another run may be about to replace it
            self._tidy()
        if not self.quiet:
            say(f"   finished before: {shown_path(self.path)}")
        return True

    def require(self) -> dict[str, Any]:
        """The manifest of an artifact that a later step reads.

        Raises:
            UserError: it is missing, incomplete or damaged, or was made from another model or dataset.
        """
        if not self._is_there():
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
                    f"{name} = {value!r}{self._hint(manifest)}; make them agree or run {self.made_by} again with "
                    "OVERWRITE = True"
                )
        self._require_undamaged(manifest)
        return manifest

    def _hint(self, manifest: Mapping[str, Any]) -> str:
        """What the fingerprints are of that differ."""
        meanings = {
            "model": "another model, or a file of its folder was changed, added or removed",
            "dataset": "other dialogues in HH_DATASET",
            "measured": "other pairs in DATA_DIR, or other test dialogues",
            "rows": "other dialogues are left out: by other constants, or other scores",
        }
        ours, theirs = {**self.settings, **self.inputs}, {**manifest["settings"], **manifest["inputs"]}
        differing = [name for name, value in ours.items() if theirs.get(name) != value]
        hints = [meanings[name] for name in differing if name in meanings]
        return f" ({'; '.join(hints)})" if hints else ""

    def _is_there(self) -> bool:
        return self.manifest_path.is_file()

    def _read_manifest(self) -> dict[str, Any]:
        return read_manifest(self.manifest_path, self.remedy)

    def _require_undamaged(self, manifest: Mapping[str, Any]) -> None:
        """Check that all files are there and as long as they were.

        Raises:
            UserError: names the first file that is not.
        """
        folder = self.manifest_path.parent
        for name, size in manifest["files"].items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{shown_path(self.path)} is incomplete: {name} is missing; {self.remedy}")
            if file.stat().st_size != size:
                raise UserError(
                    f"{shown_path(file)} has changed: it has {file.stat().st_size:,} bytes, and was written with "
                    f"{size!r}; {self.remedy}"
                )

    def _tidy(self) -> None:
        """Remove what a run that was killed at its last rename left."""
        for leftover in self._leftovers():
            remove(leftover)

    def _leftovers(self) -> list[Path]:
        return [partial_of(self.path), partial_of(self.manifest_path)]

    def _manifest(
        self, started: float, shapes: dict[str, list[int]], files: dict[str, int], details: dict[str, Any]
    ) -> dict[str, Any]:
        manifest = {
            "artifact": self.path.name,
            "made_by": self.made_by,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "inputs": self.inputs,
            "shapes": shapes,
            "files": files,
            "seconds": round(time.monotonic() - started, 3),
            "versions": software_versions(),
            "processes": launched(),
            "trust_remote_code": allows_remote_code(),
            **details,
        }
        return {**manifest, "checksum": checksum_of(manifest)}

    def _say_written(self, started: float, shapes: dict[str, list[int]]) -> None:
        content = f": {_shape_in_words(shapes)}," if shapes else ""
        if not self.quiet:
            say(f"   wrote {shown_path(self.path)}{content} in {time.monotonic() - started:.1f} s")


class FileArtifact(Artifact):
    """A safetensors or JSON file, with its manifest beside it."""

    @property
    def manifest_path(self) -> Path:
        """`x.safetensors` has `x.manifest.json`."""
        return self.path.with_name(f"{self.path.stem}.manifest.json")

    @property
    def _is_json(self) -> bool:
        return self.path.suffix == ".json"

    def _is_there(self) -> bool:
        return super()._is_there() and self.path.is_file()

    @first_process_only
    def require_place(self) -> None:
        """Check, before the work, that no folder is where the file or its manifest goes.

        Raises:
            UserError: names the folder.
        """
        for path in (self.path, self.manifest_path):
            if path.is_dir():
                raise UserError(f"{shown_path(path)} is a folder where a file is written; move it away")

    def _require_undamaged(self, manifest: Mapping[str, Any]) -> None:
        """As for any artifact, and that a JSON file, whose length depends on the seconds, says what it said."""
        if self._is_json:
            self._require_content(manifest)
        super()._require_undamaged(manifest)

    # -- reading -------------------------------------------------------------------------------------------------------

    def load_tensors(
        self, shapes: Shapes | None = None, counts: Collection[str] = (), fingerprint: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Read a safetensors artifact.

        Args:
            shapes, counts: what it must hold, as for `require_shapes`.
            fingerprint: that of the manifest that was read before; what another run has put there since is refused.

        Raises:
            UserError: missing, made from something else, changed since it was written, unreadable, not finite, or not
                of these shapes.
        """
        with locked(self.path, to_read=True):
            manifest = self.require()
            if fingerprint and manifest["fingerprint"] != fingerprint:
                raise UserError(f"{shown_path(self.path)} was replaced by another run meanwhile; run this step again")
            self._require_content(manifest)
            try:
                tensors = load_file(self.path)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{shown_path(self.path)} cannot be read ({error}); {self.remedy}") from None
        if shapes is not None:
            require_shapes(tensors, shapes, shown_path(self.path), self.remedy, counts)
        require_finite(tensors, f"{shown_path(self.path)} ({self.remedy})")
        if not self.quiet:
            say_read(shown_path(self.path), _shape_in_words({name: list(t.shape) for name, t in tensors.items()}))
        return tensors

    def load_json(self) -> Any:  # noqa: ANN401
        """Read a JSON artifact.

        Raises:
            UserError: missing, made from something else, changed since it was written, or not valid JSON.
        """
        with locked(self.path, to_read=True):
            self.require()
            return read_json(self.path, self.remedy)

    def _require_content(self, manifest: Mapping[str, Any]) -> None:
        if manifest.get("content") != fingerprint_of_content(self.path):
            raise UserError(f"{shown_path(self.path)} has been changed since it was written; {self.remedy}")

    # -- writing -------------------------------------------------------------------------------------------------------

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
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        with self._publishing(started, shapes, details) as partial:
            save_file(tensors, partial)

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
        with self._publishing(started, {}, details) as partial:
            partial.write_text(text, encoding="utf-8")

    @contextmanager
    def _publishing(self, started: float, shapes: dict[str, list[int]], details: dict[str, Any]) -> Iterator[Path]:
        """Gives the path at which to write the file; then it gets its name, and after that its manifest."""
        with locked(self.path):
            with written_whole(self.path) as partial:
                yield partial
                details = {"content": fingerprint_of_content(partial), **details}
                self.manifest_path.unlink(missing_ok=True)
            files = {} if self._is_json else {self.path.name: self.path.stat().st_size}
            manifest = self._manifest(started, shapes, files, details)
            write_whole(self.manifest_path, to_json(manifest))
            self._say_written(started, shapes)
