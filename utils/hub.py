"""The Hugging Face hub: access from `.env`, whose code may run, and uploading a repaired checkpoint."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dotenv import dotenv_values

from utils.console import UserError, say
from utils.paths import PROJECT_ROOT
from utils.processes import first_process_only
from utils.settings import Settings


@dataclass(frozen=True)
class HubAccess:
    """HUB_CACHE and HUB_TOKEN from the environment or `.env`. The token is never shown."""

    cache: str | None = None
    token: str | None = field(default=None, repr=False)

    def redact(self, text: str) -> str:
        """The text with every occurrence of the token replaced by ***."""
        return text.replace(self.token, "***") if self.token else text

    def reason(self, error: Exception) -> str:
        """An error's message as one redacted line of at most 300 characters."""
        return " ".join(self.redact(str(error)).split())[:300] or type(error).__name__


def hub_access() -> HubAccess:
    """Read HUB_CACHE and HUB_TOKEN; the environment takes precedence over the repository's `.env`."""
    values = {**dotenv_values(PROJECT_ROOT / ".env"), **os.environ}
    return HubAccess(cache=values.get("HUB_CACHE") or None, token=values.get("HUB_TOKEN") or None)


_allows_remote_code = False


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Whether a model may run code that comes with it (TRUST_REMOTE_CODE) while a step runs; otherwise it may not."""
    global _allows_remote_code
    before, _allows_remote_code = _allows_remote_code, allowed
    try:
        yield
    finally:
        _allows_remote_code = before


def allows_remote_code() -> bool:
    """Whether a model may run code that comes with it."""
    return _allows_remote_code


def require_hub_access(settings: Settings) -> HubAccess:
    """Check, before any work, that everything an upload needs is there.

    Raises:
        UserError: HUB_USERNAME, HUB_TOKEN or SAVE_TO_DISK is not set.
    """
    access = hub_access()
    if not settings.HUB_USERNAME:
        raise UserError("HUB_USERNAME = None: PUSH_TO_HUB needs the name of the hub account that will own the model")
    if not access.token:
        raise UserError("HUB_TOKEN is not set: PUSH_TO_HUB needs it in .env (see .env.example) or in the environment")
    if not settings.SAVE_TO_DISK:
        raise UserError("SAVE_TO_DISK = False: PUSH_TO_HUB uploads the saved checkpoint; set it to True")
    return access


@first_process_only
def push_folder(folder: Path, files: Sequence[str], username: str, access: HubAccess) -> None:
    """Upload a checkpoint to `username/folder-name`, which is created if it does not exist.

    Args:
        files: those that belong to it; whatever else lies in the folder stays where it is.

    Raises:
        UserError: the hub refused or could not be reached; the message does not contain the token.
    """
    from huggingface_hub import HfApi  # only an upload pays for importing it

    repo_id = f"{username}/{folder.name}"
    try:
        api = HfApi(token=access.token)
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            folder_path=str(folder),
            repo_id=repo_id,
            commit_message="Upload repaired model",
            allow_patterns=[glob.escape(file) for file in files],
        )
    except Exception as error:  # the hub's client raises many types; all become one redacted line
        raise UserError(f"pushing to {repo_id} failed: {access.reason(error)}") from None
    say(f"   pushed to {repo_id}")
