"""Killing a run at any of its file operations."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

FILE_EVENTS = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"})


def at_each_file_operation(act: Callable[[int], None]) -> None:
    """From now on call a function before each of this process's file operations, with the operation's number."""
    count = 0

    def watch(event: str, _: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS:  # os.kill, say, is an event too
            count += 1
            act(count)

    sys.addaudithook(watch)


def kill_at(operation: int, rank: int = 0) -> None:
    """Kill this process, as `kill -9` does, before that file operation."""

    def act(count: int) -> None:
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    at_each_file_operation(act)


def count_into(file: Path, rank: int = 0) -> None:
    """Keep in a file how many file operations this process has done."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    at_each_file_operation(lambda count: os.pwrite(descriptor, str(count).encode(), 0))


def was_killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Run in a forked process that is killed before that file operation; whether it came so far."""
    pid = os.fork()
    if not pid:
        try:
            kill_at(operation)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"it failed in another way: {code}"
    return code != 0
