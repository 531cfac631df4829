"""Turns of a conversation as tokens: answers, what ends them, running text; and tokens as text again."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from lens_defense.prompts.prompt import PLACEHOLDER, Request, has_chat_template, prompt


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: first the one that the chat template puts after it, then end-of-text.

    They are one for many models, and two where turns end by a token of their own (Gemma's <end_of_turn>).
    """
    of_text = tokenizer.eos_token_id
    of_turn = _closing(tokenizer) if has_chat_template(tokenizer) else None
    return tuple(dict.fromkeys(token for token in (of_turn, of_text) if isinstance(token, int)))


@lru_cache(maxsize=16)
def _closing(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an answer; None where it puts none."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLACEHOLDER}, {"role": "assistant", "content": PLACEHOLDER}],
        tokenize=False,
    )
    behind = str(text).rpartition(PLACEHOLDER)[2].strip()
    found: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return found[0] if found and found[0] in tokenizer.added_tokens_decoder else None


def tokenize_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, end: bool = False
) -> tuple[int, ...]:
    """Tokens of an answer as it follows a prompt: after a chat header as it stands, else after a space.

    Args:
        tokenizer: the model's.
        text: the answer.
        chat: whether the prompt before it is rendered by a chat template.
        end: whether the token that ends an answer closes it.
    """
    ids: list[int] = tokenizer(text if chat else f" {text}", add_special_tokens=False)["input_ids"]
    return (*ids, *end_token_ids(tokenizer)[:1]) if end else tuple(ids)


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of running text, with the special tokens that the tokenizer adds by itself."""
    return tuple(tokenizer(text)["input_ids"])


def tokenize_conversation(tokenizer: PreTrainedTokenizerBase, user: str, assistant: str) -> tuple[int, ...]:
    """Tokens of one turn and its answer, in the chat template where there is one."""
    if not has_chat_template(tokenizer):
        return tokenize_text(tokenizer, f"{user}\n\n{assistant}")
    asked = prompt(tokenizer, Request(id="corpus", pieces=(user,)))
    return (*asked.ids, *tokenize_answer(tokenizer, assistant, chat=True, end=True))


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, up to and without the token that ends it."""
    last = end_token_ids(tokenizer)
    kept = takewhile(lambda token: token not in last, ids)
    return str(tokenizer.decode(list(kept), skip_special_tokens=True)).strip()


def first_dozen_words(text: str) -> str:
    """At most twelve words: what may be kept of an answer to a harmful request."""
    words = text.split()
    kept = " ".join(words[:12])[:120]
    return kept + (" ..." if len(kept) < len(" ".join(words)) else "")
