"""The watchdog of several processes: if one fails or dies, all end, within seconds and with one line. For processes.py.

Every process holds a connection to the first one. The operating system closes it when a process dies, however deep in a
computation or a collective the others are; a process that fails sends its line through it first.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, BinaryIO

from utils.console import say_error

if TYPE_CHECKING:
    import torch

HANDSHAKE_SECONDS = 10.0  # for a process that has connected to say which it is
EXIT_SECONDS = 20.0  # after which a failed process exits, whatever it waits for
# Of a machine that vanished without closing its connections, which the system probes.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}

Connection = tuple[socket.socket, BinaryIO]  # and what reads from it


class Watchdog:
    """Connections between the first process and each of the others, and a thread that watches each.

    The others send one message: that they have finished, or the line with which they fail. The first one answers that
    all have finished, or with the code with which all exit. A connection that closes without a message is a death.

    Args:
        store: where the first process leaves its address.
        timeout: for all processes to connect.
    """

    def __init__(
        self, store: torch.distributed.Store, rank: int, local_rank: int, size: int, timeout: timedelta
    ) -> None:
        self._rank, self._size = rank, size
        # A death of the first process is told by the second one, and on other machines by the first one there.
        self._tells_of_first = rank == 1 or (rank > 0 and local_rank == 0)
        self._lock, self._is_ending = threading.Lock(), False
        self._connections: dict[int, Connection] = {}
        self._finished = {peer: threading.Event() for peer in (range(1, size) if rank == 0 else [0])}
        if rank == 0:
            self._accept(store, time.monotonic() + timeout.total_seconds())
        else:
            self._connect(store, timeout.total_seconds())

    def _accept(self, store: torch.distributed.Store, deadline: float) -> None:
        """Wait for the connections of all other processes, and watch each from its beginning."""
        is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self._size)
        is_dual = not is_one_machine and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        address, secret = ("127.0.0.1" if is_one_machine else ""), secrets.token_hex(16)
        with socket.create_server((address, 0), family=family, dualstack_ipv6=is_dual) as server:
            store.set("watchdog", f"{server.getsockname()[1]} {int(is_one_machine)} {secret}")
            while len(self._connections) < self._size - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                connection, _ = server.accept()
                connection.settimeout(HANDSHAKE_SECONDS)
                reader = connection.makefile("rb")
                with contextlib.suppress(OSError, ValueError):  # of a stranger
                    word, peer = reader.readline().split()
                    if secrets.compare_digest(word, secret.encode()):
                        self._watch(int(peer), connection, reader)

    def _connect(self, store: torch.distributed.Store, timeout: float) -> None:
        """Connect to the first process."""
        port, is_one_machine, secret = store.get("watchdog").decode().split()
        host = "127.0.0.1" if int(is_one_machine) else os.environ["MASTER_ADDR"]
        connection = socket.create_connection((host, int(port)), timeout)
        connection.sendall(f"{secret} {self._rank}\n".encode())
        self._watch(0, connection, connection.makefile("rb"))

    def _watch(self, peer: int, connection: socket.socket, reader: BinaryIO) -> None:
        """Start the thread that waits for the message of another process, or for its death."""
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._connections[peer] = connection, reader

        def wait_for_message() -> None:
            message = {
                "line": f"error: process {peer} (of 0 to {self._size - 1}) was killed, or ran out of memory; finished "
                "work is kept, run the same command to continue",
                "code": 1,
                "is_death": True,
            }
            with contextlib.suppress(OSError, ValueError):
                message = json.loads(reader.readline())
            if message.get("code") is None:
                self._finished[peer].set()
            else:
                self._exit(message)

        threading.Thread(target=wait_for_message, daemon=True).start()

    def _exit(self, message: dict[str, Any]) -> None:
        """Exit now, from whatever the main thread is doing: it may be waiting for a process that is no more."""
        with self._lock:
            if self._is_ending:
                return
            self._is_ending = True
            try:
                if self._rank == 0 or (message.get("is_death") and self._tells_of_first):
                    say_error(message["line"])
                if self._rank == 0:
                    self._send({"code": message["code"]})
            finally:
                os._exit(message["code"])

    def _send(self, message: dict[str, Any]) -> None:
        for connection, _ in self._connections.values():
            with contextlib.suppress(OSError):  # of a dead process
                connection.sendall(f"{json.dumps(message)}\n".encode())

    def fail(self, line: str, code: int) -> None:
        """Have all processes exit with a code; the first one prints the line. Returns in the first one alone."""
        if self._rank:
            self._send({"line": line, "code": code})
            time.sleep(EXIT_SECONDS)  # the answer ends this process
            os._exit(code)
        with self._lock:
            if not self._is_ending:
                self._is_ending = True
                say_error(line)
                self._send({"code": code})
                timer = threading.Timer(EXIT_SECONDS, os._exit, [code])  # if something does not let the process end
                timer.daemon = True
                timer.start()

    @contextlib.contextmanager
    def time_limit(self, limit: timedelta, line: str) -> Iterator[None]:
        """All processes exit with a line if this context takes longer."""
        timer = threading.Timer(limit.total_seconds(), self._exit, [{"line": line, "code": 1}])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def finish(self) -> None:
        """Return when every process has come here; then nobody is watched any more."""
        if self._rank:
            self._send({})
        for event in self._finished.values():
            event.wait()
        if self._rank == 0:
            self._send({})
        for connection, reader in self._connections.values():
            reader.close()
            connection.close()
