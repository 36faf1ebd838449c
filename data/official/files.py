"""The files in DATA_DIR: written atomically, each with a manifest that reveals later changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.artifacts import FileArtifact
from utils.console import UserError, say, shown_path
from utils.files import fingerprint_of_content, remove, write_locked
from utils.manifests import differing_values


class PreparedFile(FileArtifact):
    """A file below DATA_DIR with its manifest, which records a fingerprint of the file's content."""

    @property
    def staging_dir(self) -> Path:
        """A temporary DATA_DIR from which the project's loader reads the file before it is published."""
        return self.path.parents[1] / f"{self.path.parent.name}.partial"

    @property
    def staged_path(self) -> Path:
        """Where the file lies until it is published."""
        return self.staging_dir / self.path.parent.name / self.path.name

    def is_finished(self, overwrite: bool = False) -> bool:
        """Whether the complete file is there, comes from this source and has not changed since it was written.

        Raises:
            UserError: it comes from another source or has changed, and `overwrite` is not set.
        """
        if not self.manifest_path.exists() or not self.path.exists():
            return False
        manifest = self._read_manifest()
        recorded = {**manifest["settings"], **manifest["inputs"], "content": manifest.get("content")}
        ours = {**self.settings, **self.inputs, "content": fingerprint_of_content(self.path)}
        differences = differing_values(recorded, ours, "recorded")
        if not differences:
            say(f"   finished before: {shown_path(self.path)}")
        elif not overwrite:
            raise UserError(
                f"{shown_path(self.path)} has been truncated or edited, or was made from another source or with other "
                f"constants: {'; '.join(differences)}. Set OVERWRITE = True to fetch it again, give another DATA_DIR, "
                "or leave it out of ONLY"
            )
        return not differences

    @contextmanager
    def staged(self, text: str) -> Iterator[Path]:
        """Write the text to the staging folder, and delete that folder afterwards."""
        try:
            remove(self.staging_dir)
            write_locked(self.staged_path, text)
            yield self.staging_dir
        finally:
            remove(self.staging_dir)

    def publish(self, started: float, overwrite: bool, **details: Any) -> None:  # noqa: ANN401
        """Move the staged file to its final path and write the manifest.

        Raises:
            UserError: a different file without a manifest is there, and `overwrite` is not set.
        """
        content = fingerprint_of_content(self.staged_path)
        is_foreign = self.path.exists() and not self.manifest_path.exists()
        if is_foreign and not overwrite and fingerprint_of_content(self.path) != content:
            raise UserError(
                f"{shown_path(self.path)} already exists, has no manifest and differs from what {self.settings} gives; "
                "set OVERWRITE = True to replace it, or leave it out of ONLY"
            )
        with self._publishing(started, {}, details) as partial:
            self.staged_path.replace(partial)
