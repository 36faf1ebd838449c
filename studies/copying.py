"""Taking over what a step made for another output folder, where it would make the same again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from utils.processes import first_process_only


@first_process_only
def copy_new(source: Path, target: Path, *ignored: str) -> None:
    """Copy the files of a folder that the other lacks, or has from another time; a file is there whole or not at all.

    Args:
        ignored: patterns of names that are left out.
    """
    ignore = shutil.ignore_patterns(*ignored) if ignored else None
    shutil.copytree(source, target, ignore=ignore, copy_function=_copy_if_new, dirs_exist_ok=True)


def _copy_if_new(source: str, target: str) -> None:
    def looks(path: Path) -> tuple[int, int]:
        return path.stat().st_size, path.stat().st_mtime_ns

    if not (Path(target).is_file() and looks(Path(source)) == looks(Path(target))):
        partial = f"{target}.copy"
        shutil.copy2(source, partial)
        os.replace(partial, target)
