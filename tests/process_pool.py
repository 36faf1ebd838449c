"""Runs of several processes, started as a launcher does, but forked from a server that has imported everything once."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest

from steps import load_script, run_step
from utils import processes
from utils.paths import PROJECT_ROOT

Call = tuple[str, Sequence[object]]  # a script and its command line
SERVER = multiprocessing.get_context("forkserver")


@functools.cache
def start_server() -> None:
    """Start the server that the processes are forked from."""
    SERVER.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(PROJECT_ROOT)]))
        forkserver.ensure_running()


@dataclass
class Ended:
    """A process at its end: the exit code (minus the signal that killed it), its output, and when it ended."""

    code: int
    out: str
    err: str
    seconds: float


class Launch:
    """Processes that run the same scripts, one after another, as one run.

    Args:
        folder: for their output.
        spoil: called in each process with its rank before anything else; a function of a module.
    """

    def __init__(
        self, folder: Path, count: int, calls: Sequence[Call], spoil: Callable[[int], None] | None = None
    ) -> None:
        start_server()
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.processes = [
            SERVER.Process(target=_run, args=(folder, rank, count, port, calls, spoil)) for rank in range(count)
        ]
        for process in self.processes:
            process.start()
        self.started = time.monotonic()

    def joined(self) -> float:
        """Wait until they have joined each other; gives the moment."""
        while not (file := self.folder / "0.out").exists() or "processes" not in file.read_text(encoding="utf-8"):
            time.sleep(0.005)
        return time.monotonic()

    def kill(self, rank: int) -> None:
        """kill -9 of one of them, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def ended(self, timeout: float = 120) -> list[Ended]:
        """Wait for all of them; one that does not end is killed, and has the code of that."""
        ends, give_up = [], time.monotonic() + timeout
        for rank, process in enumerate(self.processes):
            process.join(max(0.1, give_up - time.monotonic()))
            seconds = time.monotonic() - self.started
            if process.exitcode is None:
                process.kill()
                process.join()
            out, err = (self.folder / f"{rank}.{name}" for name in ("out", "err"))
            texts = [file.read_text(encoding="utf-8") if file.exists() else "" for file in (out, err)]
            ends.append(Ended(process.exitcode, *texts, seconds))
        return ends


def _run(
    folder: Path, rank: int, count: int, port: int, calls: Sequence[Call], spoil: Callable[[int], None] | None
) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    launcher = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    if spoil:
        spoil(rank)
    with processes.joined():
        for name, arguments in calls:
            run_step(load_script(name).main, [str(argument) for argument in arguments])
