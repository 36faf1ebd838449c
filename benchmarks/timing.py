"""Timing, with the standard library alone: bergson_side.py runs in an environment of its own."""

from __future__ import annotations

import contextlib
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def timed(work: Callable[[], Any], output: Path, repetitions: int) -> dict[str, Any]:
    """Time some work, after a warm-up if it is repeated.

    Imports are not counted; loading the model, tokenizing and writing the artifacts are.

    Args:
        work: what is timed; its output to the terminal goes to stderr.
        output: folder that it writes to, deleted before and after every repetition.

    Returns:
        seconds of each repetition, their median, the peak memory of the process, and what the work returned.
    """
    seconds, result = [], None
    for number in range(repetitions + (repetitions > 1)):
        shutil.rmtree(output, ignore_errors=True)
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            result = work()
        if number or repetitions == 1:
            seconds.append(time.perf_counter() - started)
    shutil.rmtree(output, ignore_errors=True)
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_bytes": _peak_bytes(),
        "result": result,
    }


def _peak_bytes() -> int:
    """Largest resident memory of this process; getrusage would include that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1_024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
