"""All output to the terminal goes through this file: lines, banners, progress bars and readable errors."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

# A log file wants a line now and then, a terminal wants a bar that moves.
SECONDS_BETWEEN_UPDATES = 0.2 if sys.stderr.isatty() else 10.0


class UserError(Exception):
    """A mistake the user can mend. Shown as one line that says what was wrong, what is allowed and what to do."""


def say(message: str = "") -> None:
    """Print one line."""
    print(message, flush=True)


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
    )
