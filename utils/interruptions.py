"""Ctrl-C and SIGTERM: one line and exit code 130 or 143, from a script's first import to the end of the interpreter.

While a step runs they are exceptions, so that what is open is closed; before, they end the process at once. Whatever
is on disk is whole at any moment, so nothing is lost either way. After the step there is nothing left to stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

STOPPED = "stopped; finished work is kept, run the same command to continue"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal to stop; `exit_code` is what shells expect of a process that it ended."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def end_at_once() -> None:
    """From now on a signal to stop ends this process with one line: nothing else has begun."""
    _make_usable()
    for number in SIGNALS:
        signal.signal(number, _end)
    sys.unraisablehook = _unraisable
    sys.excepthook = _exception


def _make_usable() -> None:
    """Give the process what libraries take for granted: open streams, and a working directory that exists."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started it
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    try:
        Path.cwd()
    except OSError:
        os.chdir(Path(__file__).resolve().parent)


def ignore() -> None:
    """From now on a signal to stop does nothing: all is done, and the interpreter takes a moment to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Within, the first signal to stop is an exception; a second one, while that is handled, ends the process."""
    is_main = threading.current_thread() is threading.main_thread()  # which alone gets signals
    if not is_main or signal.getsignal(signal.SIGINT) is _raise:  # a step within a step
        yield
        return
    before = [signal.signal(number, _raise) for number in SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python


def _end(number: int, _: FrameType | None = None) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":  # of several processes one says so
        os.write(2, f"\n{STOPPED}\n".encode())
    os._exit(128 + number)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, _end)
    raise Interrupted(number)


def _exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A package that is missing is a line, too."""
    if isinstance(error, ModuleNotFoundError):
        hint = "make demo installs all packages, into .venv: run it once, then source .venv/bin/activate"
        sys.stderr.write(f"error: {error}; {hint}\n")
    else:
        sys.__excepthook__(kind, error, trace)


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """An interruption that was raised where Python drops exceptions, in a destructor say, ends the process too."""
    if isinstance(unraisable.exc_value, Interrupted):
        _end(unraisable.exc_value.exit_code - 128)
    sys.__unraisablehook__(unraisable)
