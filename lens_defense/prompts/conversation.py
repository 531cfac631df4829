"""A conversation as tokens: answers, what ends them, running text; and tokens as text again."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from lens_defense.prompts.prompt import (
    PLACEHOLDER,
    Prompt,
    answer_lead,
    has_chat_template,
    render,
    tokenize,
)
from lens_defense.prompts.request import Request, is_unspaced, refuse_surrogates


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
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str, *, end: bool = False
) -> tuple[int, ...]:
    """Tokens of an answer behind a prompt, as the model would produce them there.

    Prompt and answer are tokenized as one text, because in many tokenizers a token depends on what stands
    before it. Spaces at the answer's start are set right: behind a chat header as the template has it, behind
    plain text one space, none where the text ends in white space or the answer begins with punctuation or
    in a script without spaces.

    Args:
        tokenizer: the model's.
        prompt: what stands before the answer.
        text: the answer.
        end: whether the token that ends an answer follows it.
    """
    refuse_surrogates(text)
    before, _ = render(tokenizer, prompt.request, chat=prompt.chat)
    text = text.lstrip()
    headed = prompt.chat and not prompt.request.prefill
    answer = (answer_lead(tokenizer) if headed else _plain_lead(before, text)) + text
    ids: list[int] = tokenizer(before + answer, add_special_tokens=False)["input_ids"]
    known: list[int] = tokenizer(before, add_special_tokens=False)["input_ids"]
    if ids[: len(known)] != known:  # the last token before the answer merges with its first letters
        known = tokenizer(_LINE_END, add_special_tokens=False)["input_ids"]
        ids = tokenizer(_LINE_END + answer, add_special_tokens=False)["input_ids"]
    answer_ids = tuple(ids[len(known) :])
    return (*answer_ids, *end_token_ids(tokenizer)[:1]) if end else answer_ids


def _plain_lead(before: str, answer: str) -> str:
    """The space between plain text and its continuation, where there is one."""
    touches = not before or before[-1].isspace() or before[-1] in _OPENING
    return "" if touches or answer[:1] in _CLOSING or is_unspaced(answer[:1]) else " "


_LINE_END = "\n"
"""Stands before an answer in place of its prompt: no tokenizer merges it with a letter."""
_OPENING = "([{\u201c\u2018\u00ab"
_CLOSING = (*",.;:!?)]}%", "\u201d", "\u2019", "\u00bb")


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Tokens of running text, with the special tokens that the tokenizer adds by itself."""
    refuse_surrogates(text)
    return tuple(tokenizer(text)["input_ids"])


def tokenize_conversation(tokenizer: PreTrainedTokenizerBase, user: str, assistant: str) -> tuple[int, ...]:
    """Tokens of a user's turn and its answer, in the chat template where there is one."""
    if not has_chat_template(tokenizer):
        return tokenize_text(tokenizer, f"{user}\n\n{assistant}")
    prompt = tokenize(tokenizer, Request(id="conversation", pieces=(user,)))
    return (*prompt.ids, *tokenize_answer(tokenizer, prompt, assistant, end=True))


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, up to and without the token that ends it."""
    end_ids = end_token_ids(tokenizer)
    answer_ids = list(takewhile(lambda token: token not in end_ids, ids))
    return str(tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()


def decode_growing_answer(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer that is still being written, up to its last whole character.

    The bytes of a character may be several tokens: until the last one is there, none of it is shown. So the
    text only grows, as long as a model writes characters. An answer that has ended is `decode_answer`'s.
    """
    for end in range(len(ids), 0, -1):  # token by token: some decoders spoil the characters before as well
        text = decode_answer(tokenizer, ids[:end])
        if not text.endswith(_INCOMPLETE):
            return text
    return ""


_INCOMPLETE = "\ufffd"
"""What a decoder puts in the place of bytes that are no character, or none yet."""


def first_dozen_words(text: str) -> str:
    """At most twelve words and 120 letters: what may be kept of an answer to a harmful request."""
    words = text.split()
    start = " ".join(words[:12])[:120]
    return start + (" ..." if len(start) < len(" ".join(words)) else "")
