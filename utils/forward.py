"""A model's forward pass in two parts, last hidden states and logits, checked against the model's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from utils.batching import Batch
from utils.console import UserError, remedy_for

if TYPE_CHECKING:
    import transformers

PROBE_TOKENS = 16
LOGIT_TOLERANCE = 1e-5  # relative, in float32, between this project's logits and the model's own on a probe
CAUSAL_TOLERANCE = 1e-3  # relative change of hidden states when tokens follow; that of rounding is far smaller


def last_hidden_state(model: transformers.PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Hidden states after the final norm.

    Sequences are padded on the right and attention is causal, so no token ever attends to padding, and no mask is
    needed unless the states of the padding itself count.

    Args:
        model: whole, or a tail (utils/trunk.py) where the batch has `trunk_states`.
        batch: `input_ids` (B, T), or `trunk_states` (B, T, hidden) in their place; optionally `padding_mask`.

    Returns:
        (B, T, hidden).
    """
    name, key = ("inputs_embeds", "trunk_states") if "trunk_states" in batch else ("input_ids", "input_ids")
    inputs = {name: batch[key], "attention_mask": batch.get("padding_mask")}
    return model.base_model(**inputs, use_cache=False).last_hidden_state


class LogitMap(NamedTuple):
    """What a model's forward pass makes of the output embedding's product z = W h + b before it is called logits.

    logits = scale z, or cap tanh(scale z / cap) where there is a cap (Bello et al. 2016; Gemma Team 2024, section 2).
    """

    scale: float = 1.0
    cap: float | None = None

    def apply(self, product: torch.Tensor) -> torch.Tensor:
        """The model's logits at z."""
        logits = product if self.scale == 1 else self.scale * product
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d logits / dz at the model's logits: scale (1 - (logits / cap)^2)."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap).square())


PLAIN_LOGITS = LogitMap()


def logit_map(config: transformers.PretrainedConfig) -> LogitMap:
    """The scale and the soft cap that config.json gives a model's logits.

    Cohere multiplies by logit_scale; Granite and MiniCPM3 divide by logits_scaling, HyperCLOVA X multiplies by it;
    Gemma 2 and later cap at final_logit_softcapping.
    """
    config = config.get_text_config()
    scale = getattr(config, "logits_scaling", None) or 1.0
    scale = scale if config.model_type == "hyperclovax" else 1 / scale
    scale *= getattr(config, "logit_scale", None) or 1.0
    return LogitMap(scale, getattr(config, "final_logit_softcapping", None) or None)


def output_logits(model: transformers.PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """The model's own logits (..., vocabulary) at `prediction_states`, differentiable in everything."""
    return logit_map(model.config).apply(model.get_output_embeddings()(states))


def prediction_states(model: transformers.PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the output embedding is applied to: last hidden states (..., hidden) after the prediction head, if any.

    ModernBertDecoder has a dense layer, an activation and a norm there, under the name that others give to the output
    embedding itself.
    """
    head = getattr(model, "lm_head", None)
    has_transform = head is not None and model.get_output_embeddings() not in set(head.modules())
    return head(hidden) if has_transform else hidden


def position_limit(model: transformers.PreTrainedModel) -> int | None:
    """How many tokens a model with a table of positions can read (OPT, GPT-2); None if it computes them (rotary)."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings()]
    # Some tables have rows in front that no token uses: 2 in OPT's, those up to the padding's in RoBERTa's.
    limits = [
        min(limit, table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))
        for table in tables
        if limit <= table.num_embeddings <= limit + 2
    ]
    # GPT-J and CodeGen compute their table once.
    limits += [len(table) for name, table in model.named_buffers() if name.endswith("embed_positions")]
    return min(limits, default=None)


def probe(model: transformers.PreTrainedModel, length: int) -> torch.Tensor:
    """Different tokens to compare two ways through a model on, (1, T): at most `length`, within its positions."""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(min(length, position_limit(model) or length), device=model.device)[None] % vocabulary


@torch.no_grad()
def require_own_logits(model: transformers.PreTrainedModel) -> None:
    """Check on a probe that this project's logits are those of the model's own forward pass.

    Raises:
        UserError: they differ or are not finite, or a token's hidden state depends on those after it, such as padding.
    """

    def refusal(reason: str) -> UserError:
        return UserError(
            f"{model.config.name_or_path}: model type {model.config.model_type!r} is not supported: {reason}"
        )

    embedding, tokens = model.get_output_embeddings(), probe(model, PROBE_TOKENS)
    if not isinstance(embedding, nn.Linear):
        raise refusal("its output embedding is not an nn.Linear")
    try:
        hidden = last_hidden_state(model, {"input_ids": tokens})
        states, own = prediction_states(model, hidden), model(input_ids=tokens, use_cache=False).logits
    except Exception as error:  # a class may need more than tokens, or have other names for its parts
        if remedy_for(error):  # out of memory
            raise
        reason = " ".join(str(error).split())[:200]
        raise refusal(f"its forward pass cannot be run on tokens alone ({reason})") from error
    if not own.isfinite().all():
        raise UserError(f"{model.config.name_or_path}: its logits are NaN or infinite; the weights may be broken")
    difference = math.inf  # of widths that do not fit
    if (states.shape[-1], own.shape[-1]) == (embedding.in_features, embedding.out_features):
        ours = output_logits(model, states).double()
        difference = float(torch.norm(ours - own.double()) / torch.norm(own.double()))
    if not difference <= LOGIT_TOLERANCE:  # nor where it is NaN, as of logits that are all 0
        raise refusal(
            "its forward pass does other things between its last hidden state and its logits than this project knows "
            f"from config.json, so that logits differ from the model's own by {difference:.2g} (relative)"
        )
    half = tokens.shape[1] // 2
    alone = last_hidden_state(model, {"input_ids": tokens[:, :half]})
    if not torch.norm(alone - hidden[:, :half]) <= CAUSAL_TOLERANCE * torch.norm(alone):
        raise refusal("its attention is not causal: what it says of a token depends on the tokens that follow")
