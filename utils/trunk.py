"""The trunk: everything below the first traced block. It never changes, so its output is computed once and cached.

Steps that see the same tokens several times (covariance, Lambda and scores; the learning rates of a sweep) cache the
hidden states that enter the first traced block and run the tail alone.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from utils.batching import Batch, LabelledSequence
from utils.console import say
from utils.files import fingerprint_of_arrays
from utils.forward import PROBE_TOKENS, last_hidden_state, probe
from utils.performance_functions.hh import MAX_DIALOGUE_TOKENS
from utils.transformer_blocks import first_traced_block

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CACHE_BYTES_ON_CPU = 4 << 30  # hidden states beyond this are computed again
CACHE_SHARE_OF_GPU_MEMORY = 0.25  # of the memory that is free
# Numbers in config.json that are no reach of attention; any other of the right size may be one, whatever its name.
SIZE_SETTING = re.compile(
    "hidden|intermediate|vocab|head|dim|rank|expert|_id$|num_|^n_|layer|ffn|position|top_k|length|beam|size_per|rope"
)


def _with_blocks(module: nn.Module, path: list[str], part: slice) -> nn.Module:
    """A shallow copy of a module with some of its blocks alone; all weights are shared.

    The module that runs the blocks looks some of their settings up by position (their layer types, say), so it gets a
    copy of its configuration whose lists of one entry a block are cut alike.
    """
    name, *rest = path
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    if rest:
        clone._modules[name] = _with_blocks(module._modules[name], rest, part)
        return clone
    blocks = module._modules[name]
    clone._modules[name] = blocks[part]
    if hasattr(module, "config"):
        clone.config = copy.copy(module.config)
        for setting, values in _settings_by_block(module.config, len(blocks)).items():
            setattr(clone.config, setting, values[part])
    return clone


def _settings_by_block(config: PretrainedConfig, num_blocks: int) -> dict[str, list]:
    """The settings that have one entry for each block."""
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == num_blocks}


def _guard_length(config: PretrainedConfig, num_blocks: int) -> int:
    """Tokens on which trunk and tail are compared with the whole model.

    As many as the longest dialogue if blocks differ by position, or if attention may reach less far; otherwise few.
    """
    differ = any(entry != values[0] for values in _settings_by_block(config, num_blocks).values() for entry in values)
    reaches = [value for name, value in vars(config).items() if type(value) is int and not SIZE_SETTING.search(name)]
    is_windowed = any(PROBE_TOKENS <= reach < MAX_DIALOGUE_TOKENS for reach in reaches)
    return MAX_DIALOGUE_TOKENS if differ or is_windowed else PROBE_TOKENS


class Trunk:
    """A causal language model cut in two below its last blocks, without a copy of its weights.

    Attributes:
        tail: the model with its last blocks alone; `last_hidden_state` runs it on a batch with `trunk_states`.
        keeps_all: whether everything is kept for the next step of the same process (utils/kept_model.py).
        free_bytes: memory left for cached states; one budget for all caches of this trunk.
        caches, clock: all caches, and the time of their last use.

    Args:
        model: the whole model; the tail shares its weights.
        family: MODEL_FAMILY.
        num_blocks: how many blocks the tail has. If that is all of them, or if trunk and tail together do not give
            what the model gives, there is no trunk, and batches pass unchanged.
        half_precision: run the trunk under bfloat16 autocast, as the caller runs the tail.
    """

    def __init__(self, model: PreTrainedModel, family: str, num_blocks: int, half_precision: bool = False) -> None:
        self.half_precision = half_precision
        path, first = first_traced_block(model, family, num_blocks)
        self.is_empty = first == 0
        self.tail = model
        if not self.is_empty:
            blocks = model.get_submodule(path)
            self.tail = _with_blocks(model, path.split("."), slice(first, None))
            self._below = _with_blocks(model, path.split("."), slice(first))
            self._last_block = blocks[first - 1]
            if not self._equals_whole(model):
                say("   the last blocks alone do not give what the model gives: every pass runs all of the model")
                self.is_empty, self.tail = True, model
        self.keeps_all = False
        self._by_content: dict[str, HiddenStateCache] = {}
        self.caches: list[HiddenStateCache] = []
        self.clock = itertools.count()
        self.free_bytes = CACHE_BYTES_ON_CPU
        if model.device.type == "cuda":
            self.free_bytes = int(CACHE_SHARE_OF_GPU_MEMORY * torch.cuda.mem_get_info(model.device)[0])

    @torch.no_grad()
    def _equals_whole(self, model: PreTrainedModel) -> bool:
        """Whether trunk and tail together give what the model gives at every token of a long sequence.

        Some models scale or shift embeddings outside of the blocks, or look their blocks up by position in other ways.
        """
        length = _guard_length(model.config.get_text_config(), model.config.get_text_config().num_hidden_layers)
        tokens = {"input_ids": probe(model, length)}
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=self.half_precision):
            whole = last_hidden_state(model, tokens)
            halves = last_hidden_state(self.tail, {"trunk_states": self.states(tokens)})
        tolerance = 1e-2 if self.half_precision else 1e-4
        return bool(((halves - whole).norm(dim=-1) <= tolerance * whole.norm(dim=-1)).all())

    @torch.no_grad()
    def states(self, batch: Batch) -> torch.Tensor:
        """The hidden states that enter the first traced block, (B, T, hidden)."""
        output = []
        hook = self._last_block.register_forward_hook(lambda _, __, result: output.append(result))
        try:
            with torch.autocast(batch["input_ids"].device.type, dtype=torch.bfloat16, enabled=self.half_precision):
                last_hidden_state(self._below, batch)
        finally:
            hook.remove()
        return output[0][0] if isinstance(output[0], tuple) else output[0]  # a tuple until transformers 4.5x

    def cache_for(self, sequences: Sequence[LabelledSequence], keep: bool = True) -> HiddenStateCache:
        """The cache of a list of sequences, the same one for the same tokens.

        Args:
            keep: False for sequences that are seen once, whose states are computed and dropped.
        """
        if not (keep or self.keeps_all):
            return HiddenStateCache(self, keep=False)
        lengths = np.array([len(sequence.input_ids) for sequence in sequences])
        tokens = np.concatenate([sequence.input_ids for sequence in sequences])
        key = fingerprint_of_arrays(lengths, tokens)
        if key not in self._by_content:
            self._by_content[key] = HiddenStateCache(self)
        cache = self._by_content[key]
        cache.made = next(self.clock)  # it may take memory from what was used last before now
        return cache

    def forget(self, cache: HiddenStateCache) -> None:
        """Give a cache's memory back, unless everything is kept."""
        if not self.keeps_all:
            cache.release()


class HiddenStateCache:
    """The trunk's output for the batches of one list of sequences, cached while memory allows.

    A batch that recurs, the same sequences in the same order, is found; any other is computed. So no number ever
    depends on the contents of the cache. If memory is short, a cache takes it from those that were last used before it
    was made.

    Args:
        keep: False caches nothing, for sequences that are seen once.
    """

    def __init__(self, trunk: Trunk, keep: bool = True) -> None:
        self.trunk, self.keep = trunk, keep
        self.made = self.last_used = next(trunk.clock)
        self._cached: dict[tuple[int, ...], torch.Tensor] = {}  # width, then positions in the list -> (B, T, hidden)
        if keep:
            trunk.caches.append(self)

    def add_to(self, batch: Batch) -> Batch:
        """The batch with `trunk_states` (B, T, hidden)."""
        if self.trunk.is_empty:
            return batch
        self.last_used = next(self.trunk.clock)
        key = (batch["input_ids"].shape[1], *batch["index"].tolist())
        states = self._cached.get(key)
        if states is None:
            states = self.trunk.states(batch)
            if self.keep and self._reserve(states.nbytes):
                self._cached[key] = states
        return {**batch, "trunk_states": states}

    def release(self) -> None:
        """Give the memory back; states that are needed again are computed again."""
        self.trunk.free_bytes += sum(states.nbytes for states in self._cached.values())
        self._cached.clear()

    def _reserve(self, num_bytes: int) -> bool:
        for other in sorted(self.trunk.caches, key=lambda cache: cache.last_used):
            if self.trunk.free_bytes < num_bytes and other.last_used < self.made:
                other.release()
        has_room = self.trunk.free_bytes >= num_bytes
        self.trunk.free_bytes -= num_bytes * has_room
        return has_room
