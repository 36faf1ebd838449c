"""An experiment tracker of the user's, where TRACKER names one: trackio or wandb, through accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from utils.console import UserError, is_first_process

PROJECT = "tracing-llm-trust"


class Tracker:
    """Takes numbers as they come; without a backend they go nowhere."""

    def __init__(self, backend: GeneralTracker | None = None) -> None:
        self._backend = backend

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        """Send named numbers of one moment; `step` is the x axis."""
        if self._backend:
            self._backend.log(values, step=step)


@contextmanager
def tracking(name: str | None, run: str, config: dict[str, Any]) -> Iterator[Tracker]:
    """A run in the tracker, closed at the end; of several processes the first alone has one.

    Args:
        name: a TRACKER; None tracks nothing.
        run: what the run is called.
        config: the constants that it is made with.

    Raises:
        UserError: the tracker's package is not installed, or unknown to accelerate.
    """
    if name and name not in {tracker.value for tracker in get_available_trackers()}:
        raise UserError(
            f"TRACKER = {name!r}: its package is not here, or accelerate is too old for it; "
            f"pip install -U {name} accelerate, or set it to None"
        )
    if not name or not is_first_process():
        yield Tracker()
        return
    PartialState()  # accelerate's trackers ask it which process they are in
    backend = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=run)
    if hasattr(backend, "start"):  # accelerate 1.7 starts a tracker when it is made
        backend.start()
    backend.store_init_configuration(config)
    try:
        yield Tracker(backend)
    finally:
        backend.finish()
