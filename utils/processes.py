"""Several processes: the only module that knows there may be more than one.

`torchrun --nproc_per_node N script.py` and `accelerate launch` start N processes with one command line, and every one
runs the same script. In a pass over data each takes its `share` of the batches, and `all_reduce` adds up at the end
what they found; what is decided or written once is `first_process_only`. There is no collective inside a loop. Started
without a launcher, a script is one process, and everything here passes through.

Every process also holds a connection to the first one (the lifeline). The operating system closes it when a process
dies, however deep in a computation the others are, and a process that fails sends its line through it first; either
way all of them end within seconds, with one line and the same exit code.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TextIO, TypeVar

from utils.console import UserError, progress_bar, say, say_error, silence

if TYPE_CHECKING:
    import torch

P, T = ParamSpec("P"), TypeVar("T")

START_TIMEOUT = timedelta(minutes=10)  # for the last process to start, which on a cluster may have to wait its turn
HANDSHAKE_SECONDS = 10.0  # for a process that has started
# A process may wait for as long as another works; that one of them died is known from the lifeline, not from this.
COLLECTIVE_TIMEOUT = timedelta(days=7)
KEEPALIVE_SECONDS, KEEPALIVE_PROBES = 5, 3  # of a machine that vanished without closing its connections
PATIENCE_SECONDS = 20.0  # of a failed process, for the first one to tell the others


@dataclass
class _World:
    """This process among the others. `is_alone` while the first one runs something by itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_alone: bool = False
    lifeline: _Lifeline | None = None
    bytes_reduced: int = 0
    num_collectives: int = 0


_world = _World()


def count() -> int:
    """How many processes divide the work: 1 while the first one works alone."""
    return 1 if _world.is_alone else _world.size


def launched() -> int:
    """How many processes this run has."""
    return _world.size


def rank() -> int:
    """The number of this process, from 0; 0 while the first one works alone."""
    return _world.rank


def local_rank() -> int:
    """The number of this process among those of its machine, which is also the number of its GPU."""
    return _world.local_rank


def is_first() -> bool:
    """Whether this process is the one that decides, writes and prints."""
    return _world.rank == 0


def launcher() -> list[str]:
    """The words before a script's name that start it as this run was started; on one machine, that is."""
    if os.environ.get("LOCAL_WORLD_SIZE") != str(_world.size) or _world.size == 1:
        return ["python"]
    return ["torchrun", "--nproc_per_node", str(_world.size)]


def traffic() -> tuple[int, int]:
    """Bytes that this process has all-reduced, and in how many tensors."""
    return _world.bytes_reduced, _world.num_collectives


# -- dividing the work -------------------------------------------------------------------------------------------------


def owners(costs: Sequence[float]) -> list[int]:
    """The process that each piece of work belongs to: the most expensive first, each to the least loaded process.

    Every process comes to the same answer, so nothing is communicated (Graham 1969: at most 4/3 of the shortest time).
    """
    loads, owner = [0.0] * count(), [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owner[piece] = loads.index(min(loads))
        loads[owner[piece]] += costs[piece]
    return owner


def share(costs: Sequence[float]) -> list[int]:
    """The pieces of work that belong to this process, in order; every piece belongs to one process."""
    return [piece for piece, owner in enumerate(owners(costs)) if owner == rank()]


def iterate_share(
    pieces: Sequence[T], costs: Sequence[float], sizes: Sequence[int], description: str, unit: str
) -> Iterator[T]:
    """This process's share of some pieces of work, under one progress bar over the work of all.

    Args:
        sizes: how far each piece advances the bar.
        description: text of the bar; no bar where it is empty.
    """
    mine = share(costs)
    done, of_mine, of_all = 0, sum(sizes[piece] for piece in mine), sum(sizes)
    with progress_bar(of_all, description, unit) as bar:
        for piece in mine:
            yield pieces[piece]
            done += sizes[piece]
            bar.update(done * of_all // of_mine - bar.n)  # the others have as much to do, and are as far


def all_reduce(*tensors: torch.Tensor) -> None:
    """Add up each tensor over all processes, in place: sums, or results of which each has one owner and is 0 elsewhere.

    In main memory and through gloo, on GPUs too: a pass of minutes or hours ends with one such sum, of megabytes to a
    few gigabytes.
    """
    if count() == 1:
        return
    import torch.distributed as dist

    for tensor in tensors:
        on_cpu = tensor.cpu()
        dist.all_reduce(on_cpu)
        if on_cpu is not tensor:
            tensor.copy_(on_cpu)
        _world.bytes_reduced += tensor.nbytes
        _world.num_collectives += 1


def smallest(value: int) -> int:
    """The smallest of the processes' values."""
    return min(_gather(value))


def shared_map(function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """The function of every item, in order; each is computed by one process."""
    mine = {position: function(items[position]) for position in share([1.0] * len(items))}
    everyone = {position: result for part in _gather(mine) for position, result in part.items()}
    return [everyone[position] for position in range(len(items))]


def _gather(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value)
    return values


def first_process_only(function: Callable[P, T]) -> Callable[P, T]:
    """A function that the first process runs, alone, once all have come to it; all get what it returns.

    For whatever is decided or written once. What it reads has been written by then, and what it writes can be read by
    every process afterwards.
    """

    @functools.wraps(function)
    def on_first(*arguments: P.args, **keywords: P.kwargs) -> T:
        if count() == 1:
            return function(*arguments, **keywords)
        import torch.distributed as dist

        arrived = _gather(function.__qualname__)
        if len(set(arrived)) > 1:
            raise RuntimeError(f"the processes do different things: {arrived}")
        result: list[Any] = [None]
        if is_first():
            _world.is_alone = True
            try:
                result = [function(*arguments, **keywords)]
            finally:
                _world.is_alone = False
        dist.broadcast_object_list(result, src=0)
        return result[0]

    return on_first


@first_process_only
def wait_for_all() -> None:
    """Return when every process has come here."""


# -- beginning and end -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started with this one, and part at the end, when all have come to it.

    Within another such context, only the end counts.

    Raises:
        UserError: the launcher's environment variables make no sense, or some processes never came.
    """
    if _world.size > 1:
        yield
        wait_for_all()
        return
    _join()
    try:
        yield
    except SystemExit as stop:
        if stop.code:  # the others know
            raise
        _part()
        raise
    _part()


def end_all(line: str, code: int) -> NoReturn:
    """End every process with an exit code and one line.

    Raises:
        SystemExit: with the code.
    """
    if _world.lifeline:
        _world.lifeline.fail(line, code)
    else:
        say_error(line)
    raise SystemExit(code)


def _number(name: str, default: int | None = None) -> int:
    """A number that the launcher put into the environment."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(
            f"{name} = {text!r} in the environment: must be a whole number; start the script with plain python, "
            "torchrun or accelerate launch, which set it"
        )
    return int(text)


def _join() -> None:
    """Form a process group with the others, and hold the lifeline."""
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        return
    own_rank = _number("RANK")
    if own_rank >= size:
        raise UserError(f"RANK = {own_rank} in the environment: must be below WORLD_SIZE = {size}")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE = {size} in the environment, but {' and '.join(missing)} not; start the script with torchrun "
            "or accelerate launch, which set all of them, or unset WORLD_SIZE to run one process"
        )
    if own_rank:
        silence()
    import torch
    import torch.distributed as dist

    # Fine-tuning alone sends tensors from GPU to GPU; everything else is added up in main memory.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank=own_rank, world_size=size, timeout=START_TIMEOUT))
        lifeline = _Lifeline(store, own_rank, size)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"process {own_rank} of {size} could not join the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {START_TIMEOUT} ({error})"
        ) from error
    _world.rank, _world.size, _world.lifeline = own_rank, size, lifeline
    _world.local_rank = _number("LOCAL_RANK", own_rank)
    say(f"{size} processes")


def _part() -> None:
    """Wait until all have come to the end of their work, then leave the process group."""
    global _world
    if not _world.lifeline:
        return
    import torch.distributed as dist

    wait_for_all()
    reduced, tensors = traffic()
    if tensors:
        say(f"   {_world.size} processes added up {reduced / 1e6:,.1f} MB in {tensors} tensors")
    _world.lifeline.part()
    dist.destroy_process_group()
    _world = _World()


class _Lifeline:
    """A connection between the first process and each of the others, watched by threads.

    The others send one message: that they are at their end, or the line with which they fail. The first one answers
    that all are at their end, or the code with which all exit. A connection that closes without a message is a death.
    """

    def __init__(self, store: torch.distributed.Store, own_rank: int, size: int) -> None:
        """Connect; the first process waits for all others."""
        self.rank, self.size = own_rank, size
        self.lock, self.is_ending = threading.Lock(), False
        self.connections = self._accept(store) if own_rank == 0 else {0: self._connect(store)}
        self.parted = {peer: threading.Event() for peer in self.connections}
        for peer, (connection, reader) in self.connections.items():
            _keep_alive(connection)
            threading.Thread(target=self._watch, args=(peer, reader), daemon=True).start()

    def _accept(self, store: torch.distributed.Store) -> dict[int, tuple[socket.socket, TextIO]]:
        """The connections of all other processes, by rank, and what reads from them."""
        is_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)
        secret, connections = secrets.token_hex(16), {}
        is_dual = not is_one_machine and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        address = "127.0.0.1" if is_one_machine else ""
        with socket.create_server((address, 0), family=family, dualstack_ipv6=is_dual) as server:
            server.settimeout(START_TIMEOUT.total_seconds())
            store.set("lifeline", f"{server.getsockname()[1]} {int(is_one_machine)} {secret}")
            while len(connections) < self.size - 1:
                connection, _ = server.accept()
                connection.settimeout(HANDSHAKE_SECONDS)
                reader = connection.makefile("r")
                with contextlib.suppress(OSError, ValueError):  # of a stranger
                    word, peer = reader.readline().split()
                    if secrets.compare_digest(word, secret):
                        connections[int(peer)] = connection, reader
        return connections

    def _connect(self, store: torch.distributed.Store) -> tuple[socket.socket, TextIO]:
        """The connection to the first process, and what reads from it."""
        port, is_one_machine, secret = store.get("lifeline").decode().split()
        host = "127.0.0.1" if int(is_one_machine) else os.environ["MASTER_ADDR"]
        connection = socket.create_connection((host, int(port)), START_TIMEOUT.total_seconds())
        connection.sendall(f"{secret} {self.rank}\n".encode())
        return connection, connection.makefile("r")

    def _watch(self, peer: int, reader: TextIO) -> None:
        """Wait for the message of another process, or for its death."""
        line = (
            f"error: process {peer} (of 0 to {self.size - 1}) was killed, or ran out of memory; finished work is kept, "
            "run the same command to continue"
        )
        message = {"line": line, "code": 1, "is_death": True}
        with contextlib.suppress(OSError, ValueError):
            message = json.loads(reader.readline())
        if message.get("code") is None:
            self.parted[peer].set()
        else:
            self._end(message)

    def _end(self, message: dict[str, Any]) -> None:
        """Exit now, from whatever the main thread is doing, which may be waiting for a process that is no more.

        If it is the first process that died, the second one says so.
        """
        with self.lock:
            if not self.is_ending:
                self.is_ending = True
                try:
                    if self.rank == 0 or (message.get("is_death") and self.rank == 1):
                        say_error(message["line"])
                    if self.rank == 0:
                        self._tell_all({"code": message["code"]})
                finally:
                    os._exit(message["code"])

    def _tell_all(self, message: dict[str, Any]) -> None:
        for connection, _ in self.connections.values():
            with contextlib.suppress(OSError):  # of a dead one
                connection.sendall(f"{json.dumps(message)}\n".encode())

    def fail(self, line: str, code: int) -> None:
        """Have all processes end; the first one prints the line."""
        if self.rank:
            self._tell_all({"line": line, "code": code})
            time.sleep(PATIENCE_SECONDS)  # the answer ends this process
            os._exit(code)
        with self.lock:
            if self.is_ending:
                return
            self.is_ending = True
            say_error(line)
            self._tell_all({"code": code})

    def part(self) -> None:
        """Return when every process is at its end."""
        if self.rank:
            self._tell_all({})
        for event in self.parted.values():
            event.wait()
        if self.rank == 0:
            self._tell_all({})
        for connection, reader in self.connections.values():
            reader.close()
            connection.close()


def _keep_alive(connection: socket.socket) -> None:
    """No time limit on messages; but probe the other machine, which may have lost its power or its network."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
        ("TCP_KEEPCNT", KEEPALIVE_PROBES),
    ):
        if hasattr(socket, option):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
