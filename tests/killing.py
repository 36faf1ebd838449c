"""Killing a run at any of its file operations."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

FILE_EVENTS = frozenset({"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"})


def kill_at(operation: int) -> None:
    """From now on count this process's file operations, and kill it, as `kill -9` does, before that one."""
    count = 0

    def watch(event: str, _: tuple) -> None:
        nonlocal count
        if event in FILE_EVENTS:  # os.kill is an event too
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


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
