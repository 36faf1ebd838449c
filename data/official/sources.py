"""Where official data come from: a data set on the hub, or a local copy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from utils.console import UserError, is_disk_full
from utils.hub import HubAccess, decide_on_dataset_code, hub_access
from utils.paths import may_be_hub_id, require_not_here, resolve_path
from utils.settings import Settings


class Source(NamedTuple):
    """Where the files of one part come from."""

    setting: str  # the constant that names it
    value: str  # that constant's value
    local_form: str  # what a local copy must be, for messages
    path: Path | None  # the local file or folder; None for a hub id

    def __str__(self) -> str:
        return f"{self.setting} = {self.value!r}"

    def file(self, candidates: Sequence[str]) -> Path:
        """The source itself if it is a file, otherwise the first candidate path that the hub or the folder has.

        Raises:
            UserError: none of the candidates exists, or the hub cannot be reached.
        """
        if self.path is None:
            return hub_file(self, candidates)
        for file in (self.path, *(self.path / candidate for candidate in candidates)):
            if file.is_file():
                return file
        raise UserError(f"{self}: the folder has none of {', '.join(candidates)}; give {self.local_form}")


def find_source(part: str, settings: Settings, local_form: str, may_be_file: bool, is_on_hub: bool = True) -> Source:
    """The source that a part's SOURCE constant names.

    Raises:
        UserError: neither a local path nor a hub id, a hub id where the hub lacks the part, or a file where the part
            needs a folder.
    """
    setting = f"{part.upper()}_SOURCE"
    value = getattr(settings, setting)
    if value is None or not (is_on_hub or resolve_path(value).exists()):
        what = f"{setting} = {value!r}" + ("" if value is None else ": no such file or folder")
        raise UserError(f"{what}; give {local_form}, or leave {part} out of ONLY")
    source = Source(setting, value, local_form, resolve_path(value))
    if source.path.is_file() and not may_be_file:
        raise UserError(f"{source} is a file; give {local_form}")
    if source.path.exists():
        return source
    if not may_be_hub_id(value):
        raise UserError(f"{source}: no such file or folder; give {local_form}, or a hub id")
    require_not_here(value)
    return source._replace(path=None)


def hub_rows(source: Source, subset: str | None, split: str) -> Sequence[dict[str, Any]]:
    """The rows of a hub data set.

    Raises:
        UserError: the hub cannot be reached or does not have it.
    """
    from datasets import load_dataset

    decide_on_dataset_code()
    with readable_hub_errors(source) as access:
        return load_dataset(source.value, subset, split=split, cache_dir=access.cache, token=access.token)


def hub_file(source: Source, candidates: Sequence[str]) -> Path:
    """Download the first candidate path that a hub data set has, where datasets 4 can no longer load the data set.

    Raises:
        UserError: the hub cannot be reached, or has none of them.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with readable_hub_errors(source) as access:
        keywords = {"repo_type": "dataset", "cache_dir": access.cache, "token": access.token}
        for candidate in candidates:
            try:
                return Path(hf_hub_download(source.value, candidate, **keywords))
            except LocalEntryNotFoundError:  # a subclass of EntryNotFoundError, but it means that there is no network
                raise
            except EntryNotFoundError:
                continue
    raise UserError(f"{source}: its files have moved, tried {', '.join(candidates)}; give {source.local_form}")


@contextmanager
def readable_hub_errors(source: Source) -> Iterator[HubAccess]:
    """Turn any error from the hub's clients into one line: no network, a full disk, or a source that does not exist.

    Raises:
        UserError: anything within failed; says whether it was the network, the disk or the source.
    """
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # without a network the client would warn at every retry
    access = hub_access()
    try:
        yield access
    except Exception as error:  # requests, httpx, huggingface_hub, datasets and Python each raise their own types
        types = " ".join(kind.__name__ for kind in type(error).__mro__)
        if is_disk_full(error):
            problem = "the disk is full; free some space, or set HUB_CACHE to a folder on a larger disk"
        elif re.search("Connect|Timeout|LocalEntryNotFound", types):
            problem = f"no network, the hub cannot be reached; give {source.local_form}"
        else:
            problem = f"the hub does not provide it; if it has moved, give its new id, or {source.local_form}"
        raise UserError(f"{source}: {problem} ({access.reason(error)})") from error
