"""Files: written whole or not at all, read with one line for what is broken, and fingerprinted."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from utils.console import UserError, shown_path
from utils.locks import locked
from utils.processes import first_process_only

FINGERPRINT_BYTES = 16
FINGERPRINT_PIECE_BYTES = 16 << 20
SECONDS = re.compile(r'"seconds": \d+(\.\d+)?')

# -- writing -----------------------------------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete a file, a link (not what it points to) or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def has_links(folder: Path) -> bool:
    """Whether a folder is a symbolic link or holds one, at any depth: what is written there may land elsewhere."""
    return folder.is_symlink() or any(
        os.path.islink(os.path.join(parent, name))
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )


def partial_of(path: Path) -> Path:
    """The temporary folder beside a file or folder, in which it grows until it is complete."""
    return path.with_name(f"{path.name}.partial")


def give_usual_mode(file: Path) -> None:
    """Let others read a file as far as the umask allows: safetensors makes its own for the owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to, in a folder of its own; at the end the file there becomes `path`.

    So `path` is the old file or the whole new one at any moment. What a killed writer leaves, its library's own
    temporary files included, is in that folder, which the next writer of `path` removes. The caller holds a lock.
    """
    folder = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(folder)
    folder.mkdir()
    try:
        yield folder / path.name
        give_usual_mode(folder / path.name)
        (folder / path.name).replace(path)
    finally:
        remove(folder)


@first_process_only
def write_whole(path: Path, text: str) -> None:
    """Write a text file whole, to the disk itself. The caller holds a lock."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@first_process_only
def write_locked(path: Path, text: str) -> None:
    """Write a text file whole, while no other run writes it."""
    with locked(path):
        write_whole(path, text)


@first_process_only
def write_if_changed(path: Path, text: str) -> None:
    """Write a text file as `write_locked`, unless it says the same already."""
    with locked(path):
        if path.is_file() and path.read_bytes() == text.encode("utf-8"):
            remove(partial_of(path))  # a run may have been killed at its last rename
        else:
            write_whole(path, text)


def to_json(value: Any) -> str:  # noqa: ANN401
    """Readable JSON; NaN and infinity are refused, since JSON has neither."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# -- reading -----------------------------------------------------------------------------------------------------------


def read_json(path: Path, remedy: str = "delete it and run the step again") -> Any:  # noqa: ANN401
    """Read a JSON file.

    Args:
        remedy: what the user is told to do where it is broken.

    Raises:
        UserError: it is no file, not valid JSON, or not JSON that Python takes: too deep, numbers of too many digits.
    """
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise UserError(f"{shown_path(path)} is a folder, a pipe or a device, and must be a file; {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{shown_path(path)} is not valid JSON ({error}); {remedy}") from None


# -- fingerprints ------------------------------------------------------------------------------------------------------


def fingerprint_of(value: Any) -> str:  # noqa: ANN401
    """Fingerprint of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8"), digest_size=FINGERPRINT_BYTES).hexdigest()


def fingerprint_of_arrays(*arrays: np.ndarray) -> str:
    """Fingerprint of the bytes of arrays, for keys in memory: fast, and not cryptographic."""
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def fingerprint_of_text(text: str) -> str:
    """Fingerprint of a JSON text that does not depend on how many `seconds` the work took."""
    return fingerprint_of(SECONDS.sub('"seconds": 0', text))


def fingerprint_of_content(path: Path) -> str:
    """Fingerprint of what a file holds; of JSON without `seconds`, as `fingerprint_of_text`."""
    if path.suffix == ".json":
        return fingerprint_of_text(path.read_text(encoding="utf-8", errors="backslashreplace"))
    return fingerprint_of_files([path])


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
