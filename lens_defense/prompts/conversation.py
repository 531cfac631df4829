"""A conversation as tokens: answers, what ends them, running text; and tokens as text again."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from lens_defense.prompts.prompt import PLACEHOLDER, has_chat_template, tokenize
from lens_defense.prompts.request import Request


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: first the one that the chat template puts after it, then end-of-text.

    Many models use the same token for both; Gemma ends a turn by <end_of_turn>.
    """
    turn_end = _turn_end_id(tokenizer) if has_chat_template(tokenizer) else None
    ids = (turn_end, tokenizer.eos_token_id)
    return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))


@lru_cache(maxsize=16)
def _turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts after an answer; None where it puts none."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLACEHOLDER}, {"role": "assistant", "content": PLACEHOLDER}],
        tokenize=False,
    )
    after_answer = str(text).rpartition(PLACEHOLDER)[2].strip()
    ids: list[int] = tokenizer(after_answer, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def tokenize_answer(
    tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool, end: bool = False
) -> tuple[int, ...]:
    """Tokens of an answer as it follows a prompt: after a chat header as it stands, else after a space.

    Args:
        tokenizer: the model's.
        text: the answer.
        chat: whether a chat template stands around the prompt before it.
        end: whether the token that ends an answer follows it.
    """
    ids: list[int] = tokenizer(text if chat else f" {text}", add_special_tokens=False)["input_ids"]
    return (*ids, *end_token_ids(tokenizer)[:1]) if end else tuple(ids)


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of running text, with the special tokens that the tokenizer adds by itself."""
    return tuple(tokenizer(text)["input_ids"])


def tokenize_conversation(tokenizer: PreTrainedTokenizerBase, user: str, assistant: str) -> tuple[int, ...]:
    """Tokens of a user's turn and its answer, in the chat template where there is one."""
    if not has_chat_template(tokenizer):
        return tokenize_text(tokenizer, f"{user}\n\n{assistant}")
    prompt = tokenize(tokenizer, Request(id="conversation", pieces=(user,)))
    return (*prompt.ids, *tokenize_answer(tokenizer, assistant, chat=True, end=True))


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, up to and without the token that ends it."""
    end_ids = end_token_ids(tokenizer)
    answer_ids = list(takewhile(lambda token: token not in end_ids, ids))
    return str(tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()


def first_dozen_words(text: str) -> str:
    """At most twelve words and 120 letters: what may be kept of an answer to a harmful request."""
    words = text.split()
    start = " ".join(words[:12])[:120]
    return start + (" ..." if len(start) < len(" ".join(words)) else "")
