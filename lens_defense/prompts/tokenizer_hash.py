"""Hashes of a tokenizer: of how it cuts texts, and of its chat template."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A hash of how a tokenizer cuts text into ids: vocabulary, merges, normalisation, special tokens.

    Padding, truncation and the special tokens that are put around a plain text are not in it: they are a
    call's settings, and TransformerLens sets the last ones by itself.
    """
    if tokenizer is None:
        return ""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = [str(tokenizer.get_vocab())]
    else:
        added = sorted((i, str(token)) for i, token in backend.get_added_tokens_decoder().items())
        stages = (backend.normalizer, backend.pre_tokenizer, backend.model)
        parts = [str(added), *(stage.__getstate__().decode() if stage else "" for stage in stages)]
    return _hash([*parts, tokenizer.eos_token_id])


def chat_template_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A hash of the chat template, with the arguments and the system prompt that are bound to it."""
    return _hash(getattr(tokenizer, "chat_template", None))


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
