"""A Prompt is a Request tokenized: the tokens that the model reads, and the role of each.

Spans come from offset mappings, so they hold on any fast tokenizer: leading-space merges, BOS, several bytes
per character, subjects that occur twice.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from lens_defense.prompts.request import Request, Role, UnfitRequest

PLACEHOLDER = "\ue000"
"""Stands for a text in a rendered chat template, to be found again."""

_OPEN_REASONING = re.compile(r"<(think|thinking|thought|reasoning)>(\s*\n)?[ \t]*$")


@dataclass(frozen=True, slots=True, repr=False)
class Prompt:
    """A request as one tokenizer reads it: its tokens, and what each of them is."""

    request: Request
    ids: tuple[int, ...]
    token_texts: tuple[str, ...]
    """The text of each token, spaces and newlines included."""
    subject_spans: tuple[tuple[int, int], ...]
    """Token spans (start, stop) of the subject's occurrences; empty where there is no subject."""
    roles: tuple[Role, ...]
    chat: bool = False
    """Whether a chat template stands around the request."""
    answer_ids: tuple[int, ...] = ()
    """Token ids of the answer that a metric reads; none until trace() or a caller sets them."""

    def __repr__(self) -> str:
        return f"Prompt of {len(self.ids)} tokens{' in a chat template' * self.chat}: {self.request!r}"

    def positions(self, role: Role) -> tuple[int, ...]:
        """The positions of a role, in order; empty where the prompt has none."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)

    @property
    def subject_positions(self) -> tuple[int, ...]:
        """The positions of all the subject's occurrences."""
        return tuple(i for start, stop in self.subject_spans for i in range(start, stop))


def tokenize(tokenizer: PreTrainedTokenizerBase, request: Request, *, chat: bool = True) -> Prompt:
    """Tokenize a request with what was said before it, in the tokenizer's chat template where it has one.

    Args:
        tokenizer: a fast tokenizer (it must give offset mappings).
        request: what is asked.
        chat: False leaves the chat template out, as for a base model.

    Raises:
        ValueError: the tokenizer gives no offsets.
        UnfitRequest: the chat template changes the request's text; or a subject's edge falls inside a token.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offset mappings; load the fast tokenizer of the "
            "model (AutoTokenizer with use_fast=True)"
        )
    chat = chat and not request.plain and has_chat_template(tokenizer)
    text, start = render(tokenizer, request, chat=chat)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not chat)
    length = _length_without_end(tokenizer, encoded["input_ids"], encoded["offset_mapping"])
    offsets: list[tuple[int, int]] = encoded["offset_mapping"][:length]
    ids: list[int] = encoded["input_ids"][:length]
    spans = tuple(_token_span(text, offsets, *span, request) for span in _subject_chars(request, start))
    return Prompt(
        request=request,
        ids=tuple(ids),
        token_texts=_token_texts(tokenizer, text, ids, offsets),
        subject_spans=spans,
        roles=_roles(offsets, start, start + len(request.text), spans),
        chat=chat,
    )


def role_position(prompt: Prompt, role: Role) -> int:
    """The last position of a role in a prompt.

    A subject of one token has no first or middle token, and a subject that ends a plain prompt has the role
    "last" there: the subject's last token stands for them.
    """
    positions = prompt.positions(role)
    if not positions and role.startswith("subject") and prompt.subject_spans:
        positions = (prompt.subject_spans[-1][1] - 1,)
    if not positions:
        raise ValueError(
            f"request {prompt.request.id!r} has no token of the role {role!r} in {prompt.request.text!r}; "
            "choose sites at subject_last"
        )
    return positions[-1]


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can render a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: PreTrainedTokenizerBase, request: Request, *, chat: bool) -> tuple[str, int]:
    """The whole text that the model reads, and where the request starts in it.

    Raises:
        UnfitRequest: the chat template changes the request's text.
    """
    if not chat:
        before = "".join(f"{user}\n\n{assistant}\n\n" for user, assistant in request.earlier)
        return before + request.text + (f" {request.prefill}" if request.prefill else ""), len(before)
    earlier = [
        {"role": role, "content": content}
        for turn in request.earlier
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]

    def rendered(content: str) -> str:
        messages = [*earlier, {"role": "user", "content": content}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    text, start = rendered(request.text), rendered(PLACEHOLDER).find(PLACEHOLDER)
    stripped = request.text.strip()  # many templates strip a message
    if start >= 0 and text.startswith(request.text, start):
        shift = 0
    elif start >= 0 and text.startswith(stripped, start):
        shift = request.text.index(stripped)
    else:
        raise UnfitRequest(
            f"the chat template changes the text of request {request.id!r}; ask it without the "
            "template (chat=False)"
        )
    prefill = answer_lead(tokenizer) + request.prefill if request.prefill else ""
    return text + prefill, start - shift


def answer_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts between its header and an answer: mostly nothing, a space in Llama 2's.

    A header that opens the model's reasoning ("<think>") is closed: the answer stands after it.
    """
    return _answer_lead(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=16)
def _answer_lead(tokenizer: PreTrainedTokenizerBase, _template: str) -> str:
    """The same, remembered as long as the tokenizer has this template."""
    user, answer = (
        {"role": "user", "content": PLACEHOLDER},
        {"role": "assistant", "content": PLACEHOLDER},
    )
    header = str(tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True))
    if opened := _OPEN_REASONING.search(header):
        return f"{'' if opened[2] else chr(10)}</{opened[1]}>\n\n"
    whole = str(tokenizer.apply_chat_template([user, answer], tokenize=False))
    return whole[len(header) : whole.rindex(PLACEHOLDER)] if whole.startswith(header) else ""


def _length_without_end(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], offsets: list[tuple[int, int]]
) -> int:
    """How many tokens stand before the end tokens that a tokenizer may append by itself, as T5's does."""
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    length = len(ids)
    while length > 1 and ids[length - 1] in ends and offsets[length - 1][0] == offsets[length - 1][1]:
        length -= 1
    return length


def _subject_chars(request: Request, start: int) -> list[tuple[int, int]]:
    """Character spans of the subject's occurrences in the rendered text; the request starts at `start`."""
    spans, end = [], start
    for piece, subject in zip(request.pieces, request.occurrences, strict=False):
        subject_start = end + len(piece)
        end = subject_start + len(subject)
        spans.append((subject_start, end))
    return spans


def _token_span(
    text: str, offsets: list[tuple[int, int]], start: int, stop: int, request: Request
) -> tuple[int, int]:
    """The span of the tokens that carry the characters start to stop; what else they carry is white space."""
    tokens = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    if not tokens:
        raise UnfitRequest(f"request {request.id!r}: no token carries {request.subject!r}")
    left = text[min(offsets[tokens[0]][0], start) : start]
    right = text[stop : max(offsets[tokens[-1]][1], stop)]
    if left.strip() or right.strip():
        raise UnfitRequest(
            f"request {request.id!r}: the subject {request.subject!r} does not end where a token "
            f"ends (the token holds {left + '|' + (request.subject or '') + '|' + right!r}); mark a "
            "longer or a shorter subject"
        )
    return tokens[0], tokens[-1] + 1


def _token_texts(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[str, ...]:
    """What each token adds to the text; a token that adds nothing shows its name."""
    texts, end = [], 0
    for token, (_, stop) in zip(ids, offsets, strict=True):
        texts.append(text[end:stop] if stop > end else str(tokenizer.convert_ids_to_tokens(token)))
        end = max(end, stop)
    return tuple(texts)


def _roles(
    offsets: list[tuple[int, int]], start: int, stop: int, subject_spans: tuple[tuple[int, int], ...]
) -> tuple[Role, ...]:
    """The role of each token; of a subject that occurs twice, the last occurrence has the subject's roles.

    Args:
        offsets: the characters of each token.
        start: the request's first character.
        stop: the character after the request.
        subject_spans: the tokens of the subject's occurrences.
    """
    first, after = subject_spans[-1] if subject_spans else (len(offsets), len(offsets))

    def role(i: int) -> Role:
        if i == len(offsets) - 1:
            return "last"
        if first <= i < after:
            return "subject_last" if i == after - 1 else "subject_first" if i == first else "subject_mid"
        if i == after:
            return "next"
        if offsets[i][1] <= start or offsets[i][0] >= stop:
            return "template"
        return "before" if i < first else "after"

    return tuple(role(i) for i in range(len(offsets)))
