"""From texts to labelled sequences: the labels are the tokens whose characters end after the prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from utils.batching import LabelledSequence
from utils.console import UserError, say

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

TEXTS_AT_ONCE, CHARACTERS_AT_ONCE = 1_000, 4_000_000  # bound the memory of their encodings
SPACE_IN_BYTE_LEVEL = "Ġ"  # how byte-level tokenizers spell a space
SHOWN_CHARACTERS = 80  # of a prompt in a message

LabelledIds = tuple[list[int], int, int]  # token ids, first label, one past the last label


def label_texts(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    special_tokens: bool,
    suffix: Sequence[int] = (),
) -> list[LabelledSequence]:
    """Tokenize each prompt + completion as one text; labels are the tokens whose characters end after the prompt.

    A token that merges the end of a prompt with the beginning of its completion is a label. Special tokens that the
    tokenizer adds at either end, and the suffix, are not.

    Args:
        max_tokens: where a text is cut, its suffix included. If the model has fewer positions, it is cut there, and
            the user is told.
        special_tokens: whether the tokenizer adds its special tokens.
        suffix: token ids to append.

    Raises:
        UserError: a token has no embedding in the model; or the tokenizer gives no offsets, and a prompt's tokens are
            not the first of the text's.
    """
    max_tokens, num_cut = min(max_tokens, tokenizer.model_max_length), 0
    labelled = _labels_by_offsets if tokenizer.is_fast else _labels_by_counting
    sequences = []
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    for chunk in _chunks(lengths):
        for ids, first, end in labelled(prompts[chunk], completions[chunk], tokenizer, special_tokens):
            cut = np.asarray([*ids, *suffix][:max_tokens], dtype=np.int32)
            sequences.append(LabelledSequence(cut, first, min(end, max_tokens)))
            num_cut += len(ids) > max_tokens
    require_embeddings(sequences, tokenizer)
    if num_cut and max_tokens == tokenizer.model_max_length:
        say(f"   {num_cut:,} of {len(prompts):,} texts are cut: the model's max_position_embeddings is {max_tokens:,}")
    return sequences


def _chunks(lengths: Sequence[int]) -> Iterator[slice]:
    """Texts that are tokenized together, by the numbers of their characters."""
    start = characters = 0
    for end, length in enumerate(lengths, start=1):
        characters += length
        if end - start == TEXTS_AT_ONCE or characters >= CHARACTERS_AT_ONCE or end == len(lengths):
            yield slice(start, end)
            start, characters = end, 0


def require_embeddings(sequences: Iterable[LabelledSequence], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens without an embedding; tokens of the tokenizer that never occur (an added pad token) do no harm.

    Raises:
        UserError: a token was added to the tokenizer, the model's embedding was not resized, and the token occurs.
    """
    num_embeddings = getattr(tokenizer, "num_embeddings", None)  # known for tokenizers loaded with their model
    if num_embeddings is None:
        return
    largest = max((int(sequence.input_ids.max(initial=0)) for sequence in sequences), default=0)
    if largest >= num_embeddings:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has {len(tokenizer):,} tokens and the model {num_embeddings:,} "
            f"embeddings; the data use {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), which has none; "
            "resize the model's embedding (resize_token_embeddings) and train it, or give the tokenizer that the model "
            "was trained with"
        )


def _labels_by_offsets(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> Iterator[LabelledIds]:
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    encoded = tokenizer(
        texts,
        add_special_tokens=special_tokens,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about long texts: they are cut
    )
    adds_any = special_tokens and tokenizer.num_special_tokens_to_add() > 0
    for prompt, encoding in zip(prompts, encoded.encodings, strict=True):
        ids, first, end = encoding.ids, 0, len(encoding)
        if adds_any:
            is_added = encoding.special_tokens_mask
            while first < end and is_added[first]:
                first += 1
            while end > first and is_added[end - 1]:
                end -= 1
        label = first + _tokens_within(prompt, encoding, range(first, end))
        if label > first:
            token = tokenizer.convert_ids_to_tokens(ids[label - 1])
            label -= _reaches_over(prompt, encoding.token_to_chars(label - 1)[1], token)
        yield ids, label, end


def _tokens_within(prompt: str, encoding: Encoding, positions: range) -> int:
    """How many of the tokens end within the prompt: asks few of them, since a list of all offsets takes longer."""
    return bisect_right(positions, len(prompt), key=lambda position: encoding.token_to_chars(position)[1])


def _reaches_over(prompt: str, end: int, token: str) -> bool:
    """Whether a token whose offsets end within the prompt has more spaces at its end, which reach over the prompt's.

    Byte-level tokenizers with `trim_offsets` leave them out: the newline of a prompt and the first spaces of its
    completion can be one token, whose offsets hold the newline alone.
    """
    trailing = len(token) - len(token.rstrip(SPACE_IN_BYTE_LEVEL))
    is_trimmed = 0 < trailing < len(token) and prompt[end - 1] != " "
    return is_trimmed and end + trailing > len(prompt)


def _labels_by_counting(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, special_tokens: bool
) -> Iterator[LabelledIds]:
    """For tokenizers without offsets: the tokens after as many as the prompt alone has."""

    def tokenize(texts: list[str], with_special_tokens: bool = False) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=with_special_tokens, verbose=False)["input_ids"]

    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    bare_ids = tokenize(texts)
    full_ids = tokenize(texts, with_special_tokens=True) if special_tokens else bare_ids
    for prompt, prompt_ids, bare, full in zip(prompts, tokenize(list(prompts)), bare_ids, full_ids, strict=True):
        starts = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
        before = next(starts, None)  # special tokens in front of the text
        if before is None or bare[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"{tokenizer.name_or_path}: its tokenizer has no character offsets, and a prompt's tokens change with "
                "the completion behind it, so that nothing says which tokens are the completion's; give a fast "
                f"tokenizer (tokenizer.json), or end prompts without a space; prompt: {prompt[-SHOWN_CHARACTERS:]!r}"
            )
        yield full, before + len(prompt_ids), before + len(bare)
