"""A decoder's transformer blocks: where they are, and which Linears of the last ones are traced and repaired.

Only this file, forward.py and trunk.py know a model's inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from utils.console import UserError

if TYPE_CHECKING:
    import transformers

# `model_type` in config.json of the families that MODEL_FAMILY can insist on; "auto" takes any decoder that fits.
FAMILY_TYPES = {"pythia": ("gpt_neox",), "qwen": ("qwen2", "qwen3")}


def find_blocks(model: transformers.PreTrainedModel, family: str, num_blocks: int = 1) -> str:
    """Dotted name of a decoder's list of transformer blocks, after checking that its last blocks can be traced.

    Raises:
        UserError: the model is not of MODEL_FAMILY, it has no list of as many blocks as config.json says, or one of
            the last `num_blocks` has weight matrices outside of nn.Linear (Conv1D as in GPT-2, fused experts) or
            shares a weight with another module.
    """
    config = model.config
    if family != "auto" and config.model_type not in FAMILY_TYPES[family]:
        raise UserError(
            f"MODEL_FAMILY = {family!r}, but {config.name_or_path} is of type {config.model_type!r}; allowed: auto"
            + "".join(f", {name}" for name, types in FAMILY_TYPES.items() if config.model_type in types)
        )

    def refusal(reason: str) -> UserError:
        return UserError(
            f"{config.name_or_path}: model type {config.model_type!r} is not supported: {reason}; supported are "
            "decoders whose blocks are a list and whose weight matrices are nn.Linear, such as GPT-NeoX, Qwen2 or Llama"
        )

    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not names:
        raise refusal(f"it has no list of {count} transformer blocks")
    traced = tuple(f"{names[0]}.{block}." for block in range(max(0, count - num_blocks), count))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for parameter_owners in owners.values():
        own = [name for name in parameter_owners if name.startswith(traced)]
        if own and len(parameter_owners) > 1:
            raise refusal(f"{own[0]} is shared with {next(n for n in parameter_owners if n != own[0])}")
    for name, parameter in model.named_parameters():
        if name.startswith(traced) and parameter.ndim > 1 and name.rpartition(".")[0] not in linears:
            owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
            raise refusal(f"{name} is the weight of a {owner}")
    return names[0]


def first_traced_block(model: transformers.PreTrainedModel, family: str, num_blocks: int) -> tuple[str, int]:
    """Dotted name of the list of transformer blocks, and the position of the first of the last `num_blocks`.

    Raises:
        UserError: the model is unsupported, or NUM_BLOCKS exceeds the number of blocks.
    """
    prefix = find_blocks(model, family, num_blocks)
    total = len(model.get_submodule(prefix))
    if num_blocks > total:
        raise UserError(f"NUM_BLOCKS = {num_blocks}: the model has {total} transformer blocks; allowed: 1 to {total}")
    return prefix, total - num_blocks


def traced_linear_names(model: transformers.PreTrainedModel, family: str, num_blocks: int) -> list[str]:
    """Dotted names of every Linear in the last transformer blocks, in the model's order.

    Raises:
        UserError: as `first_traced_block`.
    """
    prefix, first = first_traced_block(model, family, num_blocks)
    last = tuple(f"{prefix}.{block}." for block in range(first, first + num_blocks))
    return [name for name, module in model.named_modules() if name.startswith(last) and isinstance(module, nn.Linear)]
