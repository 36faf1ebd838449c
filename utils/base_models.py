"""What fine-tuning starts from: a model of the hub or a folder, or a bare architecture with random weights."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from utils.console import UserError
from utils.files import fingerprint_of
from utils.model_fingerprints import model_fingerprint, tokenizer_fingerprint
from utils.models import load_model, load_tokenizer, require_supported
from utils.settings import Settings

# Bare architectures: the configuration's class and sizes. The MLP is four times as wide as the hidden states.
ARCHITECTURES = {
    "pythia-demo": (GPTNeoXConfig, {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}),
    "pythia-14m": (GPTNeoXConfig, {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}),
    "pythia-70m": (GPTNeoXConfig, {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}),
    "qwen-demo": (
        Qwen2Config,
        {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}
VOCABULARY_MULTIPLE = 64  # the vocabulary is padded to a multiple of this, which matrix units handle faster


def start_model(settings: Settings, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model, or a bare architecture with random weights, and its tokenizer.

    Raises:
        UserError: the base or the tokenizer cannot be loaded.
    """
    if settings.BASE_MODEL not in ARCHITECTURES:
        model = load_model(settings.BASE_MODEL, device)
        return model, load_tokenizer(settings.BASE_MODEL, model)
    tokenizer = load_tokenizer(settings.TOKENIZER)
    config_class, sizes = ARCHITECTURES[settings.BASE_MODEL]
    config = config_class(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.pad_token_id, config.tie_word_embeddings = tokenizer.pad_token_id, False
    return AutoModelForCausalLM.from_config(config).float().to(device), tokenizer


def base_fingerprints(settings: Settings) -> dict[str, str]:
    """Fingerprints of BASE_MODEL, and of TOKENIZER where the base comes without one.

    Raises:
        UserError: the base, or a bare architecture's tokenizer, is missing, or later steps could not repair the model.
    """
    if settings.BASE_MODEL not in ARCHITECTURES:
        require_supported(settings.BASE_MODEL, "auto")
        return {"base": model_fingerprint(settings.BASE_MODEL)}
    if settings.TOKENIZER is None:
        raise UserError(
            f"TOKENIZER = None: the bare architecture {settings.BASE_MODEL} needs one; set TOKENIZER to a hub id or a "
            "local folder"
        )
    return {"base": fingerprint_of(settings.BASE_MODEL), "tokenizer": tokenizer_fingerprint(settings.TOKENIZER)}
