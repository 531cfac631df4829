"""A tokenizer as a GGUF file has it: a byte-level BPE, with llama.cpp's name for how it cuts text into words.

The name matters: under another one llama.cpp would read a text as other tokens, and nothing would say so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import msgspec
from transformers import PreTrainedTokenizerBase

CONVERT_INSTEAD = "save a folder, and convert it with llama.cpp's convert_hf_to_gguf.py"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS: Mapping[str, str] = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
"""Regular expressions of tokenizers, and llama.cpp's names for them."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """A byte-level BPE."""

    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    """By gguf.TokenType."""
    merges: tuple[str, ...]
    split: str
    """llama.cpp's name for how text is cut into words before the merges."""
    special_ids: Mapping[str, int]
    """By "bos", "eos", "unk" and "pad", those that the tokenizer has."""
    adds_bos: bool
    """Whether a text begins with it by itself."""
    adds_eos: bool
    chat_template: str | None


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> GgufVocabulary:
    """The tokenizer as GGUF has it.

    Args:
        tokenizer: a fast one.
        size: how many tokens the model knows; what the tokenizer lacks is filled up with unused ones.

    Raises:
        ValueError: it is another kind than a byte-level BPE, or cuts text in a way that we have no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core: Any = msgspec.json.decode(backend.to_str()) if backend is not None else {"model": {}}
    split = _split_name(core.get("pre_tokenizer") or {})
    is_bpe = core["model"].get("type") == "BPE" and not core["model"].get("byte_fallback")
    normalizer = (core.get("normalizer") or {}).get("type")
    if split is None or not is_bpe or normalizer not in (None, "NFC"):
        raise ValueError(
            "GGUF is written with a byte-level BPE that cuts text as GPT-2's, SmolLM's, Llama 3's or Qwen2's "
            f"does, and this model's tokenizer is another; {CONVERT_INSTEAD}"
        )
    types = gguf.TokenType
    by_id = {index: (token, types.NORMAL) for token, index in core["model"]["vocab"].items()}
    for token in core["added_tokens"]:
        by_id[token["id"]] = token["content"], types.CONTROL if token["special"] else types.USER_DEFINED
    if max(by_id) >= size:
        raise ValueError(f"the tokenizer has {max(by_id) + 1} tokens, and the model knows only {size}")
    rows = [by_id.get(index, (f"[PAD{index}]", types.UNUSED)) for index in range(size)]
    merges = core["model"]["merges"]
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    read = tokenizer("a")["input_ids"]
    return GgufVocabulary(
        tokens=tuple(token for token, _ in rows),
        token_types=tuple(int(token_type) for _, token_type in rows),
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in merges),
        split=split,
        special_ids={name: token_id for name, token_id in ids.items() if token_id is not None},
        adds_bos=ids["bos"] is not None and read[0] == ids["bos"],
        adds_eos=ids["eos"] is not None and read[-1] == ids["eos"],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _split_name(pre_tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer cuts text into words; None where we know none."""
    *before, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    words = last.get("use_regex", True)
    if not before:
        return "gpt-2" if words else None
    if len(before) > 1:
        return None
    (first,) = before
    if first["type"] == "Digits":
        return "smollm" if words and first["individual_digits"] else None
    if first["type"] == "Split" and not words and first["behavior"] == "Isolated" and not first["invert"]:
        return _SPLITS.get(first["pattern"].get("Regex", ""))
    return None
