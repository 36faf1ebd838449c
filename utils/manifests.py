"""Manifests: what an artifact was made from, and with which software."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from utils.console import UserError, shown_path
from utils.files import fingerprint_of_text, read_json
from utils.paths import PROJECT_ROOT

VERSIONED_PACKAGES = ("torch", "transformers", "kronfluence", "accelerate", "datasets", "numpy")
MANIFEST_NAME = "manifest.json"  # of a folder
STAGING_MARKER = "settings.json"  # in a folder that is not complete yet: what it is being made from


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


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """Read a manifest that this project wrote.

    Raises:
        UserError: it is not valid JSON, or its `checksum` shows that it is not as it was written.
    """
    manifest = read_json(path, remedy)
    try:
        is_whole = isinstance(manifest, dict) and manifest.pop("checksum", None) == checksum_of(manifest)
    except RecursionError:
        is_whole = False
    if not is_whole:
        raise UserError(f"{shown_path(path)} is not a valid manifest, or has been edited; {remedy}")
    return manifest


def checksum_of(manifest: dict[str, Any]) -> str:
    """Fingerprint of all that a manifest says but the seconds."""
    return fingerprint_of_text(json.dumps(manifest))


def differing_values(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str = "there") -> list[str]:
    """Both values of every name that differs, in words; a missing one is None."""
    return [
        f"{name} = {theirs.get(name)!r} {where}, {ours.get(name)!r} now"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
    ]
