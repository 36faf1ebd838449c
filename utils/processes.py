"""Several processes: the only module that knows there may be more than one.

`torchrun --nproc_per_node N script.py` and `accelerate launch` start N processes with one command line, and every one
runs the same script. In a pass over data each takes its `share` of the batches, and `all_reduce` adds up at the end
what they found; what is decided or written once is `first_process_only`. There is no collective inside a loop. Started
without a launcher, a script is one process, and everything here passes through.

If a process fails or dies, a watchdog (utils/watchdog.py) ends all of them within seconds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from utils.console import UserError, progress_bar, say, say_error, silence
from utils.watchdog import Watchdog

if TYPE_CHECKING:
    import torch

P, T = ParamSpec("P"), TypeVar("T")

START_TIMEOUT = timedelta(minutes=10)  # for the last process to start, which on a cluster may have to wait its turn
# A process may wait for as long as another works; that one of them died is known from the watchdog, not from this.
COLLECTIVE_TIMEOUT = timedelta(days=7)
LARGEST_PORT = 65_535
ECHO_SECONDS = 1.0  # between the death of a process and the errors of others that it causes, at most


@dataclass
class _World:
    """This process among the others. `is_alone` while the first one runs something by itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    is_alone: bool = False
    watchdog: Watchdog | None = None
    bytes_reduced: int = 0
    num_collectives: int = 0


_world = _World()


def count() -> int:
    """How many processes divide the work at hand: 1 while the first one works alone."""
    return 1 if _world.is_alone else _world.size


def launched() -> int:
    """How many processes this run has, whoever works at the moment."""
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
            with _alone():
                result = [function(*arguments, **keywords)]
        dist.broadcast_object_list(result, src=0)
        return result[0]

    return on_first


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """This process works by itself, with the threads of all processes of its machine, which wait."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(min(os.cpu_count() or 1, threads * _number("LOCAL_WORLD_SIZE", 1)))
    _world.is_alone = True
    try:
        yield
    finally:
        _world.is_alone = False
        torch.set_num_threads(threads)


@first_process_only
def wait_for_all() -> None:
    """Return when every process has come here: the first one waits for all, and all for the first one."""


# -- beginning and end -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started with this one, and leave at the end, when all have come to it.

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
        if not stop.code:  # otherwise all are ending
            _leave()
        raise
    _leave()


def end_all(line: str, code: int) -> NoReturn:
    """End every process with an exit code and one line.

    Raises:
        SystemExit: with the code.
    """
    if _world.watchdog:
        _world.watchdog.fail(line, code)
    else:
        say_error(line)
    raise SystemExit(code)


def wait_for_watchdog() -> None:
    """Give the watchdog a moment to end this process: an unexpected error may be the echo of another one's death."""
    if _world.size > 1:
        time.sleep(ECHO_SECONDS)


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
    """Form a process group with the others, each under the eye of the watchdog."""
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
    if _number("MASTER_PORT") > LARGEST_PORT:
        raise UserError(f"MASTER_PORT = {_number('MASTER_PORT')} in the environment: must be at most {LARGEST_PORT}")
    own_local_rank = _number("LOCAL_RANK", own_rank)
    if own_rank:
        silence()
    import torch
    import torch.distributed as dist

    # Imported later, by transformers, it would keep the process group of now as a default argument of its functions:
    # gloo's threads would live until the interpreter is no more, which they now and then crash on (pytorch#179291).
    import torch.distributed.nn.functional

    # Fine-tuning alone sends tensors from GPU to GPU; everything else is added up in main memory.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    trouble = f"process {own_rank} of {size} could not join the others at {address} within {START_TIMEOUT}"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank=own_rank, world_size=size, timeout=START_TIMEOUT))
        _world.watchdog = Watchdog(store, own_rank, own_local_rank, size, START_TIMEOUT)
        with _world.watchdog.time_limit(
            START_TIMEOUT, f"error: {trouble}; see GLOO_SOCKET_IFNAME in docs/REFERENCE.md"
        ):
            dist.init_process_group(backend, store=store, rank=own_rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
            _world.rank, _world.size, _world.local_rank = own_rank, size, own_local_rank
            wait_for_all()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{trouble} ({error})") from error
    say(f"{size} processes")


def _leave() -> None:
    """Wait until all have come to the end of their work, then leave the process group."""
    global _world
    if not _world.watchdog:
        return
    import torch.distributed as dist

    wait_for_all()
    reduced, tensors = traffic()
    if tensors:
        say(f"   {_world.size} processes added up {reduced / 1e6:,.1f} MB in {tensors} tensors")
    _world.watchdog.finish()
    dist.destroy_process_group()
    _world = _World()
