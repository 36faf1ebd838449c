"""Everything the scripts print: lines, banners, progress bars and readable errors.

Of several processes only the first one prints (utils/processes.py). Under continuous integration (CI is set in the
environment) there are no progress bars.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

SECONDS_BETWEEN_UPDATES = 0.2 if sys.stderr.isatty() else 10.0  # a log file needs far fewer updates than a terminal

REMEDIES = {  # by the number of the operating system's error: what is wrong with the file, and what to do
    errno.EACCES: "may not be read or written; change its permissions, or choose another folder",
    errno.EPERM: "may not be changed; change its permissions, or choose another folder",
    errno.EROFS: "is on a disk that can only be read; choose another folder",
    errno.ENOTDIR: "is needed as a folder, and it or a part of its path is a file; move that away",
    errno.EEXIST: "is in the way, a file where a folder is needed or the reverse; move it away",
    errno.EISDIR: "is a folder where a file is needed; move it away, or choose another folder",
    errno.ENOTEMPTY: "is a folder that is in the way; move it away, or choose another folder",
    errno.ENAMETOOLONG: "is longer than the disk takes; choose a shorter path, or a shorter name of the model",
    errno.ELOOP: "is a link that leads back to itself, or stands where no link may be; remove it",
    errno.EIO: "cannot be read or written, since the disk fails; choose another one",
    errno.ESTALE: "is on a shared disk that has lost it; run the same command again",
    errno.EMFILE: "cannot be opened, since too many files are open; raise the limit (ulimit -n)",
    errno.EPIPE: "is closed: nobody reads the output any more; send it to a file, or leave it on the terminal",
}

_is_silent = False
_redactor: Callable[[str], str] | None = None


class UserError(Exception):
    """An error the user can fix, shown as one line: what is wrong, what is allowed, what to do."""


def silence() -> None:
    """From now on print nothing but errors, warnings of libraries included."""
    global _is_silent
    _is_silent = True
    warnings.filterwarnings("ignore")


def shows_bars() -> bool:
    """Whether to show progress bars: not under continuous integration."""
    return not _is_silent and os.environ.get("CI", "").lower() in ("", "0", "false")


def redact_with(redactor: Callable[[str], str]) -> None:
    """From now on nothing is printed but what this function leaves of it."""
    global _redactor
    _redactor = redactor


def redact(text: str) -> str:
    """The text without the secrets of `redact_with`. Redact before you shorten: a part of a secret is not found."""
    return _redactor(text) if _redactor else text


def guard_streams() -> None:
    """Whatever is printed from now on, also by libraries and their loggers, is redacted, and shown on any terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may not know every character
            # Of the stream itself, not of a new one: loggers that were made before hold on to it.
            stream.write = functools.partial(_write_redacted, stream)


def _write_redacted(stream: io.TextIOWrapper, text: str) -> int:
    type(stream).write(stream, redact(text))
    return len(text)


def printable(text: str, kept: str = "") -> str:
    """The text with the code of every control character and other character that has no shape, but for those `kept`.

    A name or a dialogue could otherwise recolour, retitle or overwrite a terminal.
    """
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def say(message: str = "") -> None:
    """Print a message."""
    if not _is_silent:
        print(printable(redact(message), kept="\n\t"), flush=True)


def say_error(line: str) -> None:
    """Print an error, below any progress bar."""
    tqdm.write(printable(redact(line), kept="\n\t"), file=sys.stderr)
    sys.stderr.flush()


def say_read(source: str, content: str) -> None:
    """Print what a step has read."""
    say(f"   read {source}: {content}")


def banner(step: str, detail: str) -> None:
    """Print the heading of a step: its name and what it works on."""
    say(f"\n== {step} · {detail}")


def shown_path(path: Path) -> str:
    """The path relative to the working directory if it lies below it, otherwise in full."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError, RuntimeError):  # the last two: no working directory any more, a loop of links
        return str(path)


def require_encodable(text: object, where: str) -> None:
    """Refuse half of a character outside the basic plane: JSON can escape one, but no tokenizer can read it.

    Raises:
        UserError: `where` and the half, a lone surrogate.
    """
    if isinstance(text, str) and (half := re.search("[\ud800-\udfff]", text)):
        raise UserError(
            f"{where} has half a character (\\u{ord(half[0]):04x} alone) at position {half.start()}, which is not "
            "valid Unicode; complete the character or delete the half"
        )


def progress_bar(total: int, description: str, unit: str) -> tqdm:
    """A progress bar with a total; use it in a `with` statement and advance it with `update`.

    No bar is shown where the description is empty.
    """
    return tqdm(
        total=total,
        desc=f"   {description}",
        unit=f" {unit}",
        mininterval=SECONDS_BETWEEN_UPDATES,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=not (description and shows_bars()),
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or an exhausted quota caused an error, however many libraries have wrapped it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search("No space left on device|inline_container|iostream error", str(error)):  # the last two: torch.save
            return True
        error = error.__cause__ or error.__context__
    return False


def _os_error_of(error: BaseException) -> tuple[int, str] | None:
    """The number of the operating system's error behind an error, and the file that it is about, if one is named."""
    if isinstance(error, OSError) and error.errno:
        is_in_the_way = error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
        file = error.filename2 if is_in_the_way and error.filename2 else error.filename  # where a rename goes
        return error.errno, str(file or "")
    number = re.search(r"\(os error (\d+)\)|Os \{ code: (\d+)", str(error))  # of a library written in Rust
    if number:
        return int(number[1] or number[2]), ""
    return _os_error_of(error.__cause__) if error.__cause__ else None


def remedy_for(error: BaseException) -> str | None:
    """What to do about an error of the machine: its disk, its memory, files in the way; None for any other error."""
    if is_disk_full(error):
        return "the disk is full; free some space and run the same command to continue"
    is_out_of_memory = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if is_out_of_memory or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return (
            "out of memory; run the same command to continue, with a smaller TOKENS_PER_BATCH (BATCH_SIZE_PER_DEVICE "
            "for data/make_sft_model.py) or another DEVICE"
        )
    number, file = _os_error_of(error) or (0, "")
    if number in REMEDIES:
        return f"{file or ('the output' if number == errno.EPIPE else 'a file')} {REMEDIES[number]}"
    return None
