"""The files in DATA_DIR: written whole or not at all, with manifests, and noticed when they change."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.artifacts import Artifact, fingerprint_of_files, write_atomically
from utils.console import UserError, say, shown_path


class PreparedFile(Artifact):
    """A file below DATA_DIR with its manifest, which records the fingerprint of the bytes that were written."""

    @property
    def staging_dir(self) -> Path:
        """A DATA_DIR of its own, where the loader tries the file."""
        return self.path.parents[1] / f"{self.path.parent.name}.partial"

    @property
    def partial_path(self) -> Path:
        """Where the file lies until it has passed."""
        return self.staging_dir / self.path.parent.name / self.path.name

    def is_finished(self, overwrite: bool = False) -> bool:
        """Whether the file is there, complete, from this source, and as it was written.

        Raises:
            UserError: it came from another source, or was changed since, and is not to be overwritten.
        """
        if not self.manifest_path.exists() or not self.path.exists():
            return False
        manifest = self._read_manifest()
        recorded = {**manifest["settings"], **manifest["inputs"], "content": manifest.get("content")}
        ours = {**self.settings, **self.inputs, "content": fingerprint_of_files([self.path])}
        differences = [
            f"{name} = {recorded.get(name)!r} recorded, {ours.get(name)!r} now"
            for name in sorted({*ours, *recorded})
            if ours.get(name) != recorded.get(name)
        ]
        if not differences:
            say(f"   finished before: {shown_path(self.path)}")
        elif not overwrite:
            raise UserError(
                f"{shown_path(self.path)} was truncated or edited, or has another source: {'; '.join(differences)}. "
                "Set OVERWRITE = True to fetch it again, or give another DATA_DIR, or leave it out with ONLY"
            )
        return not differences

    @contextmanager
    def staged(self, text: str) -> Iterator[Path]:
        """Write the text to the staging folder, to be tried and published; afterwards nothing is left there."""
        try:
            write_atomically(self.partial_path, text)
            yield self.staging_dir
        finally:
            shutil.rmtree(self.staging_dir, ignore_errors=True)
            self.manifest_path.with_name(f"{self.manifest_path.name}.partial").unlink(missing_ok=True)

    def publish(self, started: float, overwrite: bool, **details: Any) -> None:  # noqa: ANN401
        """Give the staged file its name and write the manifest.

        Raises:
            UserError: another file of that name is there, which no manifest says was written here.
        """
        content = fingerprint_of_files([self.partial_path])
        is_foreign = self.path.exists() and not self.manifest_path.exists()
        if is_foreign and not overwrite and fingerprint_of_files([self.path]) != content:
            raise UserError(
                f"{shown_path(self.path)} is there, has no manifest and differs from what {self.settings} gives; set "
                "OVERWRITE = True to replace it, or leave it out with ONLY"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._publish_file(started, {}, {"content": content, **details})
