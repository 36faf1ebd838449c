"""DEVICE = "spread": a model too large for one GPU, over all GPUs, then CPU memory, then disk, in one process.

Only the trunk's blocks (utils/trunk.py) are spread: they never change and need no gradients. All else (the traced
blocks, the embeddings, the final norm) stays whole on the main device. When a spread block runs, accelerate brings its
inputs to its GPU, or its weights from CPU memory or disk to the main device.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import warnings
from collections import Counter

import torch
from torch import nn

from utils.console import UserError, say

SPREAD = "spread"
SHARE_OF_MAIN_DEVICE = 0.5  # of what is free beside what stays there; the rest is for activations, factors and caches
SHARE_OF_OTHER_DEVICES = 0.8  # of what is free; the rest is for activations on GPUs, for data and factors on the CPU
GIB = 1 << 30

Device = int | str  # the number of a GPU, "cpu" or "disk"


def free_memory() -> dict[Device, int]:
    """Free bytes of every GPU and of the CPU."""
    import psutil

    gc.collect()  # a spread model that is no longer used is freed only here: its hooks refer to it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    gpus = {number: torch.cuda.mem_get_info(number)[0] for number in range(torch.cuda.device_count())}
    return {**gpus, "cpu": psutil.virtual_memory().available}


def place_modules(skeleton: nn.Module, blocks: str, first: int, main_device: torch.device) -> dict[str, Device]:
    """The device of every module with tensors of its own, by dotted name; a block of the trunk is one module.

    The trunk's blocks fill the GPUs in their order, then CPU memory, then disk.

    Args:
        skeleton: the model, in float32, on the meta device.
        blocks: dotted name of its list of blocks.
        first: position of the first block above the trunk.
        main_device: the first GPU, or the CPU if there is none.

    Raises:
        UserError: what stays on the main device does not fit there, with room for one block of the trunk.
    """
    main = "cpu" if main_device.type == "cpu" else main_device.index
    sizes = {f"{blocks}.{i}": num_bytes(block) for i, block in enumerate(skeleton.get_submodule(blocks)[:first])}
    needed = num_bytes(skeleton) - sum(sizes.values()) + max(sizes.values(), default=0)
    free = free_memory()
    if needed > free[main]:
        raise UserError(
            f"DEVICE = {SPREAD!r}: what is not spread (all but the first {first} block(s)) and room for one block take "
            f"{needed / GIB:.3g} GiB, and {main_device} has {free[main] / GIB:.3g} GiB free; free some memory, trace "
            "fewer blocks (NUM_BLOCKS in step 1), or take a smaller model"
        )
    room = {device: SHARE_OF_OTHER_DEVICES * free_bytes for device, free_bytes in free.items()}
    room |= {main: SHARE_OF_MAIN_DEVICE * (free[main] - needed), "disk": math.inf}
    devices = iter(room)
    device, placed = next(devices), {}
    for name, size in sizes.items():
        while size > room[device]:
            device = next(devices)
        room[device] -= size
        placed[name] = device
    if placed:
        counts = Counter(f"cuda:{device}" if isinstance(device, int) else device for device in placed.values())
        say(f"   blocks that are spread: {', '.join(f'{count} on {where}' for where, count in counts.items())}")
    for name, module in skeleton.named_modules():
        has_tensors = any(True for _ in tensors_of(module, recurse=False))
        if has_tensors and not f"{name}.".startswith(tuple(f"{block}." for block in sizes)):
            placed[name] = main
    return placed


def tensors_of(module: nn.Module, recurse: bool = True) -> itertools.chain[torch.Tensor]:
    """A module's parameters and buffers, each once."""
    return itertools.chain(module.parameters(recurse), module.buffers(recurse))


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in tensors_of(module))


def keep_hooks_on_trunk(model: nn.Module, blocks: str, first: int, main_device: torch.device) -> None:
    """Leave accelerate's hooks on the trunk's blocks alone, and let these return their output on the main device.

    accelerate replaces the forward of every module by one that is bound to that very module: a copy of a model without
    some of its blocks (utils/trunk.py) would still run the model that it is a copy of.
    """
    from accelerate.hooks import remove_hook_from_module  # takes seconds, which --help and refusals need not wait for
    from accelerate.utils import send_to_device

    trunk = [f"{blocks}.{block}" for block in range(first)]
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") and not f"{name}.".startswith(tuple(f"{block}." for block in trunk)):
            remove_hook_from_module(module)
            del module.forward  # what accelerate puts back is bound to the module too; its class has the same
    for name in trunk:
        model.get_submodule(name).register_forward_hook(lambda _, __, output: send_to_device(output, main_device))


def silence_accelerate() -> None:
    """Switch off warnings of what is intended: that weights are on disk, and are read from there to be saved."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
