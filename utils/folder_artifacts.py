"""Artifacts that are folders: factors, models, dialogues. They grow under a temporary name, and stopped runs go on.

As in utils/artifacts.py, a folder is written whole or not at all, and its manifest, inside, comes last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.artifacts import Artifact
from utils.console import UserError, say, shown_path
from utils.files import give_usual_mode, has_links, partial_of, read_json, remove, to_json, write_whole
from utils.locks import locked
from utils.manifests import MANIFEST_NAME, STAGING_MARKER, read_manifest
from utils.processes import first_process_only


class FolderArtifact(Artifact):
    """A folder with its manifest inside."""

    @property
    def manifest_path(self) -> Path:
        """`manifest.json` in the folder."""
        return self.path / MANIFEST_NAME

    @property
    def partial_path(self) -> Path:
        """Where the folder grows until it is complete."""
        return partial_of(self.path)

    @property
    def _replaced_path(self) -> Path:
        """Where a folder of other settings lies while the new one takes its name."""
        return self.path.with_name(f"{self.path.name}.replaced")

    @property
    def remedy(self) -> str:
        """What the user is told to do where the artifact is broken."""
        return f"delete the folder and run {self.made_by} again"

    @first_process_only
    def require_place(self) -> None:
        """Check, before the work, that nothing else is where the folder goes, for OVERWRITE replaces nothing else.

        Raises:
            UserError: anything is there but an empty folder, or one that this script has made; or its manifest is
                broken, so that nobody knows.
        """
        if not os.path.lexists(self.path):
            return
        elsewhere = f"move it away, or choose another {self.placed_by}"
        if not self.path.is_dir():
            raise UserError(
                f"{shown_path(self.path)} is needed as a folder, and is a file, or a link to nothing; {elsewhere}"
            )
        if not any(self.path.iterdir()):
            return
        if not self.manifest_path.is_file():
            raise UserError(
                f"{shown_path(self.path)} already exists and has no {MANIFEST_NAME}, so this project did not make "
                f"it; {elsewhere}"
            )
        remedy = f"{self.remedy} if that made it; else move the folder away, or choose another {self.placed_by}"
        made_by = read_manifest(self.manifest_path, remedy).get("made_by")
        if made_by != self.made_by:
            raise UserError(
                f"{shown_path(self.path)} already exists and was made by {made_by}, not by {self.made_by}; {elsewhere}"
            )

    def _tidy(self) -> None:
        self._remove_replaced()
        super()._tidy()

    def _leftovers(self) -> list[Path]:
        return [*super()._leftovers(), self.path / STAGING_MARKER, *self.path.glob("*.partial")]

    def _remove_replaced(self) -> None:
        """Remove what this folder has replaced, its manifest last; a folder without one is somebody else's."""
        replaced = self._replaced_path
        if replaced.is_symlink():
            remove(replaced)
        elif replaced.is_dir() and (replaced / MANIFEST_NAME).is_file():
            for path in replaced.iterdir():
                if path.name != MANIFEST_NAME:
                    remove(path)
            remove(replaced)
        elif replaced.is_dir() and not any(replaced.iterdir()):
            remove(replaced)

    @contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A temporary folder, which keeps what a killed run with the same settings and inputs left."""
        with locked(self.path):
            self._prepare_staging_folder()
            yield self.partial_path

    @first_process_only
    def _prepare_staging_folder(self) -> None:
        marker = self.partial_path / STAGING_MARKER
        try:
            is_ours = not has_links(self.partial_path) and read_json(marker)["fingerprint"] == self.fingerprint
        except (UserError, OSError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            remove(self.partial_path)
            write_whole(marker, to_json({"fingerprint": self.fingerprint, **self.settings}))
        elif any(path != marker for path in self.partial_path.iterdir()):
            say(f"   going on with {shown_path(self.partial_path)}, which a stopped run left")

    @first_process_only
    def publish_folder(self, started: float, shapes: dict[str, list[int]], **details: Any) -> None:  # noqa: ANN401
        """Put the manifest into the staging folder and give the folder its name.

        What lies there under a temporary name, `*.partial` or hidden, does not belong to the artifact and is removed.
        """
        for leftover in self.partial_path.glob(".*"):
            remove(leftover)
        files = self._files_in(self.partial_path)
        for name in files:
            give_usual_mode(self.partial_path / name)
        manifest = self._manifest(started, shapes, files, details)
        write_whole(self.partial_path / MANIFEST_NAME, to_json(manifest))
        self._remove_replaced()
        self.require_place()  # something may have come there since
        if os.path.lexists(self.path):
            self.path.replace(self._replaced_path)
        self.partial_path.replace(self.path)  # until here a killed run resumes
        self._tidy()
        self._say_written(started, shapes)

    def _files_in(self, folder: Path) -> dict[str, int]:
        """The sizes of the files that belong to a folder, by their paths in it; a README may be edited."""
        apart = (STAGING_MARKER, MANIFEST_NAME, "README.md")
        names = {file: file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()}
        return {
            name.as_posix(): file.stat().st_size
            for file, name in names.items()
            if str(name) not in apart and not name.parts[0].endswith(".partial")
        }
