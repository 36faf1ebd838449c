"""The experiment tracker named by TRACKER, trackio or wandb, through accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from utils.console import UserError
from utils.processes import is_first

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "tracing-llm-trust"


class Tracker:
    """Logs numbers to a backend, or drops them if there is none."""

    def __init__(self, backend: GeneralTracker | None = None) -> None:
        self._backend = backend

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Log named numbers; `step` is their position on the x axis."""
        if self._backend:
            self._backend.log(values, step=step)


@contextmanager
def tracking(name: str | None, run: str, config: dict[str, Any]) -> Iterator[Tracker]:
    """A tracker run that is closed at the end; of several processes only the first logs.

    Args:
        name: a TRACKER; None tracks nothing.
        run: name of the run.
        config: the constants of the run.

    Raises:
        UserError: the tracker's package is not installed, or accelerate does not support it.
    """
    if name is None:
        yield Tracker()
        return
    from accelerate import PartialState  # only a run with a tracker pays for importing accelerate
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in {tracker.value for tracker in get_available_trackers()}:
        raise UserError(
            f"TRACKER = {name!r}: the package {name} is not installed, or this version of accelerate does not support "
            f"it; run pip install -U {name} accelerate, or set TRACKER = None"
        )
    if not is_first():
        yield Tracker()
        return
    PartialState()  # accelerate's trackers look up which process they are in
    backend = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=run)
    if hasattr(backend, "start"):  # accelerate 1.7 starts a tracker in its constructor
        backend.start()
    backend.store_init_configuration(config)
    try:
        yield Tracker(backend)
    finally:
        backend.finish()
