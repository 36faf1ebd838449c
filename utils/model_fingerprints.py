"""Fingerprints of models: of all in a folder that can change a number, or of a commit on the hub."""

from __future__ import annotations

import re
from pathlib import Path

from utils.console import UserError
from utils.files import fingerprint_of, fingerprint_of_files, read_json
from utils.hub import hub_access
from utils.manifests import MANIFEST_NAME, STAGING_MARKER
from utils.models import TOKENIZER_MARKER, cannot_load, locate
from utils.paths import STEP_5
from utils.processes import first_process_only

# Files of a model's folder that change no number: hidden and unfinished ones, texts and pictures for readers, weights
# for other software, what this project writes beside a model, and what the Trainer needs to go on.
WITHOUT_EFFECT = re.compile(
    r"\..*|.*\.(partial|tmp|md|rst|pdf|png|jpe?g|gif|svg|webp|log|csv)|(README|LICEN[CS]E|NOTICE|USE_POLICY)(\..*)?"
    r"|.*\.(gguf|onnx|onnx_data|h5|msgpack|ot|tflite|mlmodel)"
    rf"|manifest\.json|repair\.json|{re.escape(STAGING_MARKER)}"
    r"|training_args\.bin|trainer_state\.json|(optimizer|scheduler|scaler)\.pt|rng_state.*\.pth|.*_results\.json",
    re.IGNORECASE,
)


@first_process_only
def model_fingerprint(model: str) -> str:
    """Fingerprint of a model, its tokenizer and its settings: of the files of a folder, or of the hub commit.

    A repaired checkpoint that is as it was saved has the fingerprint of its manifest, so that it is the same model
    before and after it is saved.

    Raises:
        UserError: the model is not found or has no weights.
    """
    located = locate(model)
    folder = Path(located)
    if not folder.is_dir():
        return _hub_fingerprint(model, "configuration", "config.json")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder}: the folder has no weights (*.safetensors or pytorch_model*.bin)")
    content = content_fingerprint(folder)
    manifest_path = folder / MANIFEST_NAME
    if manifest_path.is_file():
        manifest = read_json(manifest_path)
        if isinstance(manifest, dict) and (manifest.get("made_by"), manifest.get("content")) == (STEP_5, content):
            return manifest.get("fingerprint", content)
    return content


@first_process_only
def tokenizer_fingerprint(tokenizer: str) -> str:
    """Fingerprint of a tokenizer that comes without a model: of the files of its folder, or of the hub commit.

    Raises:
        UserError: it is not found.
    """
    folder = Path(locate(tokenizer, TOKENIZER_MARKER))
    if folder.is_dir():
        return content_fingerprint(folder)
    return _hub_fingerprint(tokenizer, "tokenizer", TOKENIZER_MARKER)


def _hub_fingerprint(model: str, what: str, marker: str) -> str:
    """Fingerprint of a hub id and its commit, which the cache has as a folder: snapshots/COMMIT/config.json."""
    from transformers.utils.hub import cached_file

    access = hub_access()
    try:
        file = cached_file(model, marker, cache_dir=access.cache, token=access.token)
    except Exception as error:  # as in _from_hub_or_folder
        raise cannot_load(model, what, error) from error
    return fingerprint_of([model, Path(file).parent.name])


def content_fingerprint(folder: Path) -> str:
    """Fingerprint of everything in a model's folder that can change a number: weights, settings, tokenizer, code."""
    return fingerprint_of_files(model_files(folder))


def model_files(folder: Path) -> list[Path]:
    """The files of a model. What one is for is not always known by its name, so all count but those of no effect."""
    files = [file for file in folder.iterdir() if file.is_file() and not WITHOUT_EFFECT.fullmatch(file.name)]
    has_safetensors = any(file.suffix == ".safetensors" for file in files)  # which are loaded rather than the others
    return [file for file in files if not (has_safetensors and file.name.startswith("pytorch_model"))]
