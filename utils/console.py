"""All output to the terminal goes through this file: lines, banners, progress bars and readable errors.

Of several processes (`accelerate launch`, `torchrun`) the first alone speaks. Under continuous integration, where CI is
set in the environment, there are lines and no bars.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

# A log file wants a line now and then, a terminal wants a bar that moves.
SECONDS_BETWEEN_UPDATES = 0.2 if sys.stderr.isatty() else 10.0


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of several."""
    return os.environ.get("RANK", "0") == "0"


class UserError(Exception):
    """A mistake the user can mend. Shown as one line that says what was wrong, what is allowed and what to do."""


def shows_bars() -> bool:
    """Whether progress bars are wanted: in the first process, and not under continuous integration."""
    return is_first_process() and os.environ.get("CI", "").lower() in ("", "0", "false")


def say(message: str = "") -> None:
    """Print one line."""
    if is_first_process():
        print(message, flush=True)


def say_read(source: str, what: str) -> None:
    """Print what a step has read, and how much it is."""
    say(f"   read {source}: {what}")


def banner(step: str, subject: str) -> None:
    """Print the heading of a step: what it is and what it works on."""
    say(f"\n== {step} · {subject}")


def shown_path(path: Path) -> str:
    """The path relative to the working directory where it lies below it, else in full."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def progress_bar(total: int, description: str, unit: str) -> tqdm:
    """A progress bar with a total, to be used in a `with` and moved by `update`."""
    return tqdm(
        total=total,
        desc=f"   {description}",
        unit=f" {unit}",
        mininterval=SECONDS_BETWEEN_UPDATES,
        dynamic_ncols=True,
        file=sys.stderr,
        disable=not shows_bars(),
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a full quota, is behind an error that libraries may have wrapped."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search("No space left on device|inline_container|iostream error", str(error)):  # the last two: torch.save
            return True
        error = error.__cause__ or error.__context__
    return False


def remedy_for(error: BaseException) -> str | None:
    """What to do when the machine has run out of something; None where the error is of another kind."""
    if is_disk_full(error):
        return "the disk is full; free some space and run the same command to go on"
    if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return (
            "out of memory; run the same command to go on with a smaller TOKENS_PER_BATCH (BATCH_SIZE_PER_DEVICE for "
            "data/make_sft_model.py), or with another DEVICE"
        )
    return None
