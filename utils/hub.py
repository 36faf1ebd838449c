"""Uploading a repaired checkpoint to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from utils.console import UserError, say
from utils.settings import HubAccess, Settings, hub_access


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


def push_folder(folder: Path, username: str, access: HubAccess) -> str:
    """Upload a checkpoint to `username/folder-name`, created where it does not exist.

    Returns:
        The repository's id.

    Raises:
        UserError: the hub refused or could not be reached; the token is not in the message.
    """
    repo_id = f"{username}/{folder.name}"
    try:
        api = HfApi(token=access.token)
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo_id, commit_message="Upload repaired model")
    except Exception as error:  # the hub's client raises many kinds; all end as one line without the token
        raise UserError(f"pushing to {repo_id} failed: {access.reason(error)}") from None
    say(f"   pushed to {repo_id}")
    return repo_id
