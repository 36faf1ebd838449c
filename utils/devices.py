"""The device that DEVICE names."""

from __future__ import annotations

import torch

from utils.console import UserError
from utils.processes import launched, local_rank
from utils.spreading import SPREAD


def resolve_device(device: str) -> torch.device:
    """The device that DEVICE names; "auto" takes a GPU where there is one, and so does "spread" for its main device.

    Each of several processes takes the GPU of its number.

    Raises:
        UserError: the device does not exist here, or several processes would share it.
    """
    # cuDNN attention gives NaN gradients on Hopper GPUs for some masked lengths (torch 2.11 and later).
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device == SPREAD and launched() > 1:
        raise UserError(
            f"DEVICE = {SPREAD!r}: is for one process, and there are {launched()}; start the script with python"
        )
    if device in ("auto", SPREAD):
        gpu = "cuda:0" if device == SPREAD else "cuda"
        device = gpu if torch.cuda.is_available() else "cpu"
    if launched() > 1 and device.startswith("cuda"):
        device = _own_gpu(device)
    try:
        resolved = torch.device(device)
        if resolved.type not in ("cpu", "cuda"):
            raise RuntimeError("not supported")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"DEVICE = {device!r}: not available here ({reason}); allowed: auto, cpu, cuda, cuda:N, {SPREAD}"
        ) from None
    return resolved


def _own_gpu(device: str) -> str:
    """The GPU of this process, one of several.

    Raises:
        UserError: DEVICE names one GPU for all, or this machine has fewer GPUs than processes.
    """
    if device != "cuda":
        raise UserError(
            f"DEVICE = {device!r}: several processes take a GPU each; allowed with several are auto, cpu and cuda; to "
            "choose the GPUs, set CUDA_VISIBLE_DEVICES in the environment"
        )
    if local_rank() >= torch.cuda.device_count():
        raise UserError(
            f"DEVICE = {device!r}: process {local_rank()} of this machine needs a GPU of its own, and there are "
            f"{torch.cuda.device_count()}; start fewer processes, or set DEVICE to cpu"
        )
    torch.cuda.set_device(local_rank())
    return f"cuda:{local_rank()}"
