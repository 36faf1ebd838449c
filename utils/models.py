"""Models and tokenizers: loading, checking and saving them."""

from __future__ import annotations

import copy
import re
import sys
import weakref
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from utils.console import UserError, say, say_read, shows_bars
from utils.files import read_json, remove, to_json, write_whole
from utils.forward import position_limit, require_own_logits
from utils.hub import allows_remote_code, hub_access
from utils.manifests import STAGING_MARKER
from utils.paths import may_be_hub_id, require_not_here, resolve_path
from utils.processes import is_first
from utils.spreading import keep_hooks_on_trunk, place_modules, silence_accelerate
from utils.tensors import require_finite
from utils.transformer_blocks import find_blocks, first_traced_block

if TYPE_CHECKING:
    import transformers

# The keyword for the precision of the weights was renamed in transformers 5.
DTYPE_KEYWORD = "torch_dtype" if int(metadata.version("transformers").split(".")[0]) < 5 else "dtype"

# Keys of config.json and tokenizer_config.json that may hold a path of the machine that a model was made on.
LOCAL_PATH_KEY = re.compile(r".*_(file|path|dir)")

LARGEST_NUM_BLOCKS = 10_000

TOKENIZER_MARKER = "tokenizer_config.json"


# Tensors that a checkpoint may hold and a model may not: buffers that transformers computes itself.
HARMLESS_TENSORS = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention|self_attn)\.(masked_)?bias)$")


def locate(model: str, marker: str = "config.json") -> str:
    """A local folder's full path, or the hub id unchanged.

    Args:
        marker: a file that the folder must hold.

    Raises:
        UserError: neither a folder with the marker nor the form of a hub id.
    """
    if not model.strip():
        raise UserError(f"a model's name is {model!r}, which is empty: give a folder or a hub id like owner/name")
    folder = resolve_path(model)
    if (folder / marker).is_file():
        return str(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{model}: the folder holds an adapter (LoRA), not a model; merge it into its base first "
            "(peft: merge_and_unload, then save_pretrained), and give the merged folder"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{model}: is no folder, and a model is one that save_pretrained made")
    if folder.exists():
        what = "tokenizer" if marker == TOKENIZER_MARKER else "model"
        raise UserError(f"{model}: the folder has no {marker}; save a {what} there with save_pretrained")
    if model.startswith(".") or not may_be_hub_id(model):
        hint = "run data/make_sft_model.py first, or give" if model.startswith("data/") else "give"
        raise UserError(f"no model at {model}: {hint} a folder made by save_pretrained or a hub id like owner/name")
    require_not_here(model)
    return model


def _from_hub_or_folder(loader: str, model: str, what: str, marker: str = "config.json", **keywords: object) -> object:
    """Call `from_pretrained` of one of transformers' classes, turning any failure into one readable line."""
    import transformers  # takes seconds, which --help and refusals need not wait for

    located, access = locate(model, marker), hub_access()
    access_keywords = {"cache_dir": access.cache, "token": access.token, "trust_remote_code": allows_remote_code()}
    try:
        return getattr(transformers, loader).from_pretrained(located, **access_keywords, **keywords)
    except Exception as error:  # transformers and the hub's client raise many types for what they cannot find or read
        if "trust_remote_code=True" in str(error):
            raise _remote_code_refusal(model, _own_code(model, located, marker)) from None
        raise cannot_load(model, what, error) from error


def cannot_load(model: str, what: str, error: Exception) -> UserError:
    """The line for whatever transformers or the hub's client raised."""
    where = "" if resolve_path(model).is_dir() else "no such folder, and not to be had from the hub: "
    return UserError(f"{model}: cannot load the {what}: {where}{hub_access().reason(error)}")


def _own_code(model: str, located: str, marker: str) -> str:
    """The code that comes with a model, in words."""
    if not Path(located).is_dir():
        return f"code from the hub (https://hf.co/{model})"
    return f"code of its own (auto_map in {marker}: {read_json(Path(located) / marker).get('auto_map')!r:.200})"


def _remote_code_refusal(model: str, code: str) -> UserError:
    """Says which code a model wants to run."""
    return UserError(
        f"{model}: needs {code}, which can do anything and is not run; read it, and if you trust it set "
        "TRUST_REMOTE_CODE = True"
    )


def load_config(model: str) -> transformers.PretrainedConfig:
    """The model's config.json.

    Raises:
        UserError: it is not found or cannot be read; it names a kernel of the hub, which is code; or it describes
            several language models, or one of no transformer block, or of so many that building them would take for
            ever.
    """
    config = _from_hub_or_folder("AutoConfig", model, "configuration")
    kernels = [str(value) for name, value in vars(config).items() if "implementation" in name and "/" in str(value)]
    if kernels and not allows_remote_code():
        raise _remote_code_refusal(model, f"a kernel from the hub (config.json: {kernels[0]!r:.200})")
    try:
        count = getattr(config.get_text_config(), "num_hidden_layers", 1)
    except ValueError:  # there are several
        raise UserError(
            f"{model}: model type {config.model_type!r} is not supported: config.json describes several language "
            "models; allowed is one"
        ) from None
    if not (isinstance(count, int) and 1 <= count <= LARGEST_NUM_BLOCKS):
        raise UserError(
            f"{model}: config.json has num_hidden_layers = {count!r}; allowed is a whole number from 1 to "
            f"{LARGEST_NUM_BLOCKS:,}"
        )
    return config


def silence_transformers() -> None:
    """Switch off transformers' own progress bars where they would fill a log file, and the echo of its warnings."""
    import transformers

    if not shows_bars() or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if not is_first():
        transformers.utils.logging.set_verbosity_error()


def load_model(
    model: str, device: torch.device, is_spread: bool = False, num_blocks: int = 0
) -> transformers.PreTrainedModel:
    """Load a causal language model in float32 and evaluation mode.

    Args:
        is_spread: spread all but the last `num_blocks` blocks (utils/spreading.py), with `device` as the main device.

    Raises:
        UserError: the model is not found or cannot be read, its weights are not those that config.json describes,
            `require_own_logits` refuses it, or it cannot be spread.
    """
    silence_transformers()
    load_config(model)
    keywords = {DTYPE_KEYWORD: torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if is_spread:
        silence_accelerate()
        skeleton = _skeleton(model).float()
        blocks, first = first_traced_block(skeleton, "auto", num_blocks)
        folder = TemporaryDirectory(prefix="spread-")  # for weights on disk, if they are not in safetensors already
        keywords |= {"device_map": place_modules(skeleton, blocks, first, device), "offload_folder": folder.name}
    loaded, report = _from_hub_or_folder("AutoModelForCausalLM", model, "weights", **keywords)
    # transformers warns and puts random numbers where a tensor is missing or of another shape.
    misfits = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    unusable = sorted([*report["missing_keys"], *misfits])
    if unusable:
        raise UserError(
            f"{model}: cannot load the weights: {len(unusable)} tensors are missing or do not fit config.json, "
            f"first {unusable[0]}; save the model again with save_pretrained"
        )
    # It drops, with at most a warning, what has no place in the model: blocks beyond config.json's number, biases.
    unused = sorted(key for key in report["unexpected_keys"] if not HARMLESS_TENSORS.search(key))
    if unused:
        raise UserError(
            f"{model}: {len(unused)} tensors have no place in the model that config.json describes, first {unused[0]}; "
            "correct config.json (its number of blocks, say), or save the model again with save_pretrained"
        )
    say_read(model, f"{loaded.num_parameters():,} parameters")
    if getattr(loaded.config, "auto_map", None) and not allows_remote_code():
        say(f"   {model} has code of its own, which is not run: TRUST_REMOTE_CODE = False")
    if is_spread:
        weakref.finalize(loaded, folder.cleanup)
        keep_hooks_on_trunk(loaded, blocks, first, device)
    else:
        loaded = loaded.to(device)
    _require_finite_weights(loaded, model)
    require_own_logits(loaded.eval())
    return loaded


def _require_finite_weights(loaded: transformers.PreTrainedModel, model: str) -> None:
    """Check the weights for NaN and infinity, those on the meta device apart: their sums first, which cost least.

    Raises:
        UserError: names the model and the tensor.
    """
    for name, weight in loaded.named_parameters():
        if not weight.is_meta and not weight.detach().sum().isfinite():
            require_finite({name: weight}, f"{model}: the weights are broken; save the model again")


def load_tokenizer(
    model: str, loaded: transformers.PreTrainedModel | None = None
) -> transformers.PreTrainedTokenizerBase:
    """Load the model's tokenizer; its pad token is its end-of-sequence token.

    Args:
        loaded: the model that will read the tokens; the tokenizer takes on its limits, which utils/labels.py keeps:
            `model_max_length`, the number of its positions, and `num_embeddings`.

    Raises:
        UserError: there is none, it has no end-of-sequence token, or it knows no text.
    """
    tokenizer = _from_hub_or_folder("AutoTokenizer", model, "tokenizer", marker=TOKENIZER_MARKER)
    if not len(tokenizer) > len(tokenizer.all_special_tokens):
        raise UserError(
            f"{model}: its tokenizer has no tokens but special ones; tokenizer.json, or the file of its vocabulary, is "
            "missing or empty"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{model}: its tokenizer has no end-of-sequence token, which ends every training dialogue")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = int(1e30)  # lengths are cut by this project's own limits
    if loaded is not None:
        tokenizer.num_embeddings = loaded.get_input_embeddings().num_embeddings
        tokenizer.model_max_length = position_limit(loaded) or tokenizer.model_max_length
    return tokenizer


def save_model(model: transformers.PreTrainedModel, tokenizer: str, folder: Path, **keywords: object) -> None:
    """Save a model with a tokenizer in a staging folder, in place of all but the Trainer's checkpoints there.

    Args:
        tokenizer: the model whose tokenizer is copied unchanged: without the settings of `load_tokenizer`.
        keywords: of `save_pretrained`.
    """
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    for left in folder.iterdir():
        if left.name != STAGING_MARKER and not left.name.startswith(PREFIX_CHECKPOINT_DIR):
            remove(left)
    model.save_pretrained(folder, **keywords)
    _from_hub_or_folder("AutoTokenizer", tokenizer, "tokenizer", marker=TOKENIZER_MARKER).save_pretrained(folder)
    for file in folder.glob("*config.json"):
        content = read_json(file)
        if (cleaned := _without_local_paths(content)) != content:
            write_whole(file, to_json(cleaned))


def _without_local_paths(value: Any) -> Any:  # noqa: ANN401
    """The content of a JSON file without the places where a model or its parts once were: nobody else has them."""
    if isinstance(value, list):
        return [_without_local_paths(item) for item in value]
    if not isinstance(value, dict):
        return value

    def is_place(key: str, item: object) -> bool:
        is_path = isinstance(item, str) and Path(item).is_absolute() and LOCAL_PATH_KEY.fullmatch(key)
        return key in ("_name_or_path", "name_or_path") or bool(is_path)

    return {key: _without_local_paths(item) for key, item in value.items() if not is_place(key, item)}


def require_supported(model: str, family: str, num_blocks: int = 1) -> None:
    """Check, from the configuration alone, that a model's last blocks can be traced and repaired.

    Raises:
        UserError: as `find_blocks`, or the configuration is not that of a decoder, or the weights are quantised.
    """
    if getattr(load_config(model), "quantization_config", None):
        raise UserError(f"{model}: its weights are quantised, and a repair changes weights; give the model as it was")
    find_blocks(_skeleton(model), family, num_blocks)


def _skeleton(model: str) -> transformers.PreTrainedModel:
    """The model without its weights, on the meta device."""
    import transformers

    config = load_config(model)
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=allows_remote_code()
            )
    except Exception as error:  # the constructors check little: whatever a wrong value leads to is raised
        if "trust_remote_code=True" in str(error):
            raise _remote_code_refusal(model, _own_code(model, locate(model), "config.json")) from None
        what = "is not a causal language model, or" if isinstance(error, ValueError) else "is known, but"
        raise UserError(
            f"{model}: model type {config.model_type!r} {what} cannot be built as config.json says "
            f"({type(error).__name__}: {hub_access().reason(error)})"
        ) from error
