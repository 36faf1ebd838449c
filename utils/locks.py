"""Locks: no two runs make the same artifact, or write the same file, at the same time.

The lock of `x.json` is the file `.x.json.lock` beside it, which is there while a run holds it. The operating system
releases the locks of a process that has died (flock), also on another machine where the shared file system supports it.
Where it does not, filelock leaves a marker instead, which names the process: a dead owner's marker on this machine is
taken over, and one of another machine is for the user to delete, as the waiting line says.

Upstream artifacts are locked within downstream ones and several at once in the order of their paths, so that no two
runs wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from utils.console import say, shown_path
from utils.processes import first_process_only

SECONDS_BETWEEN_TRIES = 0.1

_held: dict[Path, BaseFileLock] = {}  # by what is locked; of several processes the first one holds them
_has_flock_on: dict[int, bool] = {}  # by the device of a folder


@contextlib.contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """Hold the locks of files or folders, after waiting for other runs that hold them.

    What this run holds already, or lies in a folder that it holds, is not locked again.
    """
    acquired = _acquire(paths)
    try:
        yield
    finally:  # no process waits here for another one, which may have failed
        for path in reversed(acquired):
            _release(path)


@first_process_only
def _acquire(paths: Sequence[Path]) -> list[Path]:
    acquired: list[Path] = []
    try:
        for path in sorted({path.absolute() for path in paths}):
            if _held.keys() & {path, *path.parents}:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            _held[path] = _acquire_one(path)
            acquired.append(path)
    except BaseException:
        for path in reversed(acquired):
            _release(path)
        raise
    return acquired


def _acquire_one(path: Path) -> BaseFileLock:
    kind = FileLock if _has_flock(path.parent) else SoftFileLock
    lock = kind(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(
            f"   waiting for another run, which works on {shown_path(path)} (if there is none, on no machine, delete "
            f"{shown_path(Path(lock.lock_file))})"
        )
        lock.acquire(poll_interval=SECONDS_BETWEEN_TRIES)
    return lock


def _has_flock(folder: Path) -> bool:
    """Whether the file system of a folder can lock files."""
    device = folder.stat().st_dev
    if device not in _has_flock_on:
        with tempfile.TemporaryFile(dir=folder) as probe:
            try:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _has_flock_on[device] = True
            except OSError:
                _has_flock_on[device] = False
    return _has_flock_on[device]


def _release(path: Path) -> None:
    lock = _held.pop(path, None)
    if lock is None:  # not the first process
        return
    # While it is held: whoever waits for the deleted file notices, and locks a new one.
    with contextlib.suppress(OSError):
        Path(lock.lock_file).unlink()
    lock.release()
