"""Where official data come from: a data set of the hub, or a local copy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from utils.console import UserError, is_disk_full
from utils.paths import anchored, may_be_hub_id
from utils.settings import HubAccess, Settings, hub_access


class Source(NamedTuple):
    """Where the files of one part come from."""

    setting: str  # the constant that names it
    value: str  # what the constant says
    local_form: str  # what a local copy must be, for messages
    path: Path | None  # the local file or folder; None for a hub id

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}"

    def file(self, places: Sequence[str]) -> Path:
        """The source itself where it is a file, else the first of the places that the hub or the folder has.

        Raises:
            UserError: there is none of them, or the hub cannot be reached.
        """
        if self.path is None:
            return hub_file(self, places)
        for file in (self.path, *(self.path / place for place in places)):
            if file.is_file():
                return file
        raise UserError(f"{self}: the folder has none of {', '.join(places)}; give {self.local_form}")


def find_source(part: str, settings: Settings, local_form: str, may_be_file: bool) -> Source:
    """Tell a local source from a hub id, by a part's SOURCE constant.

    Raises:
        UserError: it is neither, or a file where the part needs a folder.
    """
    setting = f"{part.upper()}_SOURCE"
    value = getattr(settings, setting)
    source = Source(setting, value, local_form, anchored(value))
    if source.path.is_file() and not may_be_file:
        raise UserError(f"{source} is a file; give {local_form}")
    if source.path.exists():
        return source
    if not may_be_hub_id(value):
        raise UserError(f"{source}: no such file or folder; give {local_form}, or a hub id")
    return source._replace(path=None)


def hub_rows(source: Source, subset: str | None, split: str) -> Sequence[dict[str, Any]]:
    """The rows of a hub data set.

    Raises:
        UserError: the hub cannot be reached or does not have it.
    """
    with hub_errors(source) as access:
        return load_dataset(source.value, subset, split=split, cache_dir=access.cache, token=access.token)


def hub_file(source: Source, places: Sequence[str]) -> Path:
    """Download the first of the places that a hub data set has, for those that datasets 4 no longer loads.

    Raises:
        UserError: the hub cannot be reached, or has none of them.
    """
    with hub_errors(source) as access:
        keywords = {"repo_type": "dataset", "cache_dir": access.cache, "token": access.token}
        for place in places:
            try:
                return Path(hf_hub_download(source.value, place, **keywords))
            except LocalEntryNotFoundError:  # no network, though it is also an EntryNotFoundError
                raise
            except EntryNotFoundError:
                continue
    raise UserError(f"{source}: its files have moved, tried {', '.join(places)}; give {source.local_form}")


@contextmanager
def hub_errors(source: Source) -> Iterator[HubAccess]:
    """One line for whatever the hub's clients raise: no network, a full disk, or a source that is not there.

    Raises:
        UserError: in place of any error within.
    """
    access = hub_access()
    try:
        yield access
    except Exception as error:  # requests, httpx, the hub's client, datasets and python each have kinds of their own
        kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
        if is_disk_full(error):
            told = "the disk is full; make room, or set HUB_CACHE to a place with more"
        elif re.search("Connect|Timeout|LocalEntryNotFound", kinds):
            told = f"no network, the hub cannot be reached; give {source.local_form}"
        else:
            told = f"the hub does not give it; if it has moved, give its new id, or {source.local_form}"
        raise UserError(f"{source}: {told} ({access.reason(error)})") from error
