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
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from utils.console import say, shown_path
from utils.processes import first_process_only, wait_for_all

SECONDS_BETWEEN_TRIES = 0.1
FOR_ALL_USERS = 0o666  # of a shared folder, less the umask


@dataclass(frozen=True)
class _Held:
    """A lock that this process holds, and the number of its file."""

    lock: BaseFileLock
    inode: int


_held: dict[Path, _Held] = {}  # by what is locked; of several processes the first one holds them
_has_flock_on: dict[int, bool] = {}  # by the device of a folder


@contextlib.contextmanager
def locked(*paths: Path, to_read: bool = False) -> Iterator[None]:
    """Hold the locks of files or folders, after waiting for other runs that hold them.

    What this run holds already, or lies in a folder that it holds, is not locked again.

    Args:
        to_read: make no folder, and lock nothing where nothing may be written.
    """
    with _held_by_us(_acquire(paths, to_read)):
        yield


@contextlib.contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder, or go on without where another run holds it; says which."""
    acquired = _acquire([path], waits=False)
    with _held_by_us(acquired or []):
        yield acquired is not None


@contextlib.contextmanager
def _held_by_us(acquired: Sequence[Path]) -> Iterator[None]:
    """Release the locks at the end."""
    try:
        yield
    except BaseException:
        _release(acquired)  # without waiting for the other processes, which may not come to this
        raise
    wait_for_all()  # the others may still be reading
    _release(acquired)


@first_process_only
def _acquire(paths: Sequence[Path], to_read: bool = False, waits: bool = True) -> list[Path] | None:
    """The locks that were taken; None where another run holds one and this one does not wait."""
    acquired: list[Path] = []
    try:
        for path in sorted({path.absolute() for path in paths}):
            if _held.keys() & {path, *path.parents} or (to_read and not os.access(path.parent, os.W_OK)):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock_of(path, waits)
            if lock is None:
                _release(acquired)
                return None
            _held[path] = _Held(lock, Path(lock.lock_file).lstat().st_ino)
            acquired.append(path)
    except BaseException:
        _release(acquired)
        raise
    return acquired


def _lock_of(path: Path, waits: bool) -> BaseFileLock | None:
    """The lock of a path, once this process holds it; None where another run does and this one does not wait."""
    file, has_flock = path.with_name(f".{path.name}.lock"), _has_flock(path.parent)
    lock = FileLock(file, mode=FOR_ALL_USERS) if has_flock else SoftFileLock(file, mode=FOR_ALL_USERS)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not waits:
            return None
        hint = "" if has_flock else f" (if there is none, on no machine, delete {shown_path(file)})"
        say(f"   waiting for another run, which works on {shown_path(path)}{hint}")
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


def _release(paths: Sequence[Path]) -> None:
    for held in [_held.pop(path) for path in reversed(paths) if path in _held]:  # none, but in the first process
        file = Path(held.lock.lock_file)
        # While it is held: whoever waits for the deleted file notices, and locks a new one.
        with contextlib.suppress(OSError):
            if file.lstat().st_ino == held.inode:
                file.unlink()
        held.lock.release()
