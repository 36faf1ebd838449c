"""The Hugging Face hub: access from `.env`, whose code may run, and uploading a repaired checkpoint."""

from __future__ import annotations

import glob
import html
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import quote, quote_plus

from dotenv import dotenv_values

from utils.console import UserError, redact_with, say, shown_path
from utils.paths import PROJECT_ROOT, STEP_5
from utils.processes import first_process_only
from utils.settings import Settings

# The first is ours, the others belong to the hub's client and to a tracker; none of them may be shown.
TOKEN_VARIABLES = ("HUB_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
SHORTEST_TOKEN = 6  # what is shorter is no token, and redacting "no" or "none" would spoil every message
HUB_TOKEN_SHAPE = r"\b(?:hf|api_org)_[a-z0-9]{20,}"  # of tokens that nobody told us, such as a login's; or parts of one


@dataclass(frozen=True)
class HubAccess:
    """HUB_CACHE and HUB_TOKEN from the environment or `.env`, and every token that must not be shown."""

    cache: str | None = None
    token: str | None = field(default=None, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @cached_property
    def _secret(self) -> re.Pattern:
        tokens = {token for token in (self.token, *self.secrets) if token and len(token) >= SHORTEST_TOKEN}
        spellings = sorted({spelling for token in tokens for spelling in _spellings(token)}, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, spellings), HUB_TOKEN_SHAPE]), re.IGNORECASE)

    def redact(self, text: str) -> str:
        """The text with every occurrence of a token replaced by ***."""
        return self._secret.sub("***", text)

    def reason(self, error: Exception) -> str:
        """An error's message as one redacted line of at most 300 characters."""
        text = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)  # which says the key alone
        return " ".join(self.redact(text).split())[:300] or type(error).__name__


def _spellings(token: str) -> set[str]:
    """A token as it is, and as addresses, Python, JSON and HTML spell it."""
    in_addresses = {quote(token), quote(token, safe=""), quote_plus(token)}
    return {
        token,
        *in_addresses,
        repr(token)[1:-1],
        repr(token.encode())[2:-1],
        json.dumps(token)[1:-1],
        html.escape(token),
    }


def _tokens(values: Mapping[str, str | None]) -> dict[str, str]:
    """The tokens by their variables, without what is often copied too: quotes, or a newline, which no header takes."""
    stripped = {name: (values.get(name) or "").strip().strip("\"'").strip() for name in TOKEN_VARIABLES}
    return {name: token for name, token in stripped.items() if token}


def hub_access() -> HubAccess:
    """Read HUB_CACHE and the tokens, which are printed nowhere from then on.

    The environment takes precedence over the repository's `.env`.

    Raises:
        UserError: `.env` is there and cannot be read.
    """
    ours = _tokens(os.environ)
    redact_with(HubAccess(secrets=tuple(ours.values())).redact)  # in case `.env` cannot be read
    file = PROJECT_ROOT / ".env"
    try:
        in_file = dotenv_values(file, encoding="utf-8-sig")  # editors of Windows begin it with a byte-order mark
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); correct, move or delete it") from None
    values = {**in_file, **os.environ}
    secrets = (*ours.values(), *_tokens(in_file).values())
    access = HubAccess(values.get("HUB_CACHE") or None, _tokens(values).get("HUB_TOKEN"), secrets)
    redact_with(access.redact)
    return access


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


def decide_on_dataset_code() -> None:
    """Let a data set run a script that comes with it where a model may; `datasets` before version 4 would ask."""
    import datasets  # slow to import

    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = allows_remote_code()


def require_hub_access(settings: Settings, folder_names: Sequence[str]) -> HubAccess:
    """Check, before any work, that everything an upload needs is there.

    Args:
        folder_names: of the checkpoints to come.

    Raises:
        UserError: HUB_USERNAME, HUB_TOKEN or SAVE_TO_DISK is not set; the hub has no repositories of such names; or it
            refuses the token, or cannot be reached.
    """
    access, username = hub_access(), settings.HUB_USERNAME
    if not username:
        raise UserError("HUB_USERNAME = None: PUSH_TO_HUB needs the name of the hub account that will own the model")
    if not access.token:
        raise UserError("HUB_TOKEN is not set: PUSH_TO_HUB needs it in .env (see .env.example) or in the environment")
    if not settings.SAVE_TO_DISK:
        raise UserError("SAVE_TO_DISK = False: PUSH_TO_HUB uploads the saved checkpoint; set it to True")
    if _refusal_of_name(username) or "/" in username:
        raise UserError(
            f"HUB_USERNAME = {username!r}: allowed is the name of a hub account alone, as in huggingface.co/NAME"
        )
    for name in folder_names:
        if reason := _refusal_of_name(f"{username}/{name}"):
            raise UserError(
                f"MODEL_NAME = {settings.MODEL_NAME!r}: the hub allows no repository {username}/{name} ({reason}); "
                "rename the model's folder"
            )
    _require_valid_token(access)
    return access


def _refusal_of_name(repo_id: str) -> str | None:
    """Why the hub allows no repository of this name; None if it does."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        return str(error).partition(":")[0]
    return None


@first_process_only
def _require_valid_token(access: HubAccess) -> None:
    from huggingface_hub import HfApi

    try:
        HfApi(token=access.token).whoami()
    except Exception as error:  # as in push_folder
        raise UserError(
            "HUB_TOKEN: PUSH_TO_HUB cannot use it, since the hub refuses it or cannot be reached: "
            f"{access.reason(error)}"
        ) from None


@first_process_only
def push_folder(folder: Path, files: Sequence[str], username: str, access: HubAccess) -> None:
    """Upload a checkpoint to `username/folder-name`, which is created if it does not exist.

    Args:
        files: those that belong to it; whatever else lies in the folder stays where it is.

    Raises:
        UserError: one of the files is a link or lies elsewhere; or the hub refused or could not be reached.
    """
    from huggingface_hub import HfApi  # only an upload pays for importing it

    for file in files:
        if Path(file).name != file or file in ("", "..") or (folder / file).is_symlink():
            raise UserError(
                f"{shown_path(folder / file)} is not uploaded: it is a link, or lies in another folder; "
                f"delete the checkpoint and run {STEP_5} again"
            )
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
