"""Hashes of a tokenizer: of how it cuts texts, and of its chat template."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A hash of how a tokenizer turns text into ids: vocabulary, merges, normalisation, special tokens.

    Padding and truncation, which every call may set, are not in it: a fast tokenizer's JSON begins with them.
    """
    if tokenizer is None:
        return ""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        core = backend.to_str().partition('"added_tokens":')[2]
    else:
        core = tokenizer.get_vocab()
    return _hash([core, tokenizer.bos_token_id, tokenizer.eos_token_id])


def chat_template_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A hash of the chat template, with the arguments and the system prompt that are bound to it."""
    return _hash(getattr(tokenizer, "chat_template", None))


def _hash(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
