"""What is asked: a Request is text with its harmful subject marked, a Prompt is a Request met by a tokenizer.

Spans come from offset mappings, so they hold on
any fast tokenizer: leading-space merges, BOS, several bytes a character, subjects that occur twice.

Every token of a Prompt has one role, in this precedence:
last, subject_last, subject_first, subject_mid, next, template, before, after.
A role carries over to other prompts, where a position does not.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from transformers import PreTrainedTokenizerBase

Role = Literal["last", "subject_last", "subject_first", "subject_mid", "next", "template", "before", "after"]
Kind = Literal["harmful", "benign", "safe"]
Form = Literal["noun", "gerund", "verb phrase"]
Split = Literal["edit", "tune", "check"]
ROLES: tuple[Role, ...] = get_args(Role)
"""Every role, in order of precedence."""
READING_ORDER: tuple[Role, ...] = (
    "before",
    "subject_first",
    "subject_mid",
    "subject_last",
    "next",
    "after",
    "template",
    "last",
)
"""Every role, in the order in which a prompt is read."""


class UnfitRequest(ValueError):
    """A request that one model cannot be asked, or not traced on, as it is; others can be."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a model, with the subject marked that carries the harm."""

    id: str
    pieces: tuple[str, ...]
    """The text around the subject: one piece more than the subject has occurrences."""
    subject: str | None = None
    kind: Kind = "harmful"
    """safe means dangerous words and a harmless meaning."""
    category: str = ""
    form: Form = "noun"
    concrete: bool = True
    """A thing ("ricin"), not an act ("shoplifting")."""
    split: Split = "edit"
    target: str | None = None
    """The known answer, where there is one (ROME's facts)."""
    safe_target: str | None = None
    """The refusal to plant; None takes the editor's own."""
    counterfactual: str | None = None
    """A harmless subject of the same token length, for token replacement."""

    def __post_init__(self) -> None:
        for value, allowed in ((self.kind, Kind), (self.form, Form), (self.split, Split)):
            if value not in get_args(allowed):
                raise ValueError(f"request {self.id!r}: {value!r} is none of {', '.join(get_args(allowed))}")
        if self.subject is None and len(self.pieces) != 1:
            raise ValueError(f"request {self.id!r} has {len(self.pieces)} pieces and no subject")
        if self.subject is not None and (not self.subject.strip() or len(self.pieces) < 2):
            raise ValueError(
                f"request {self.id!r}: the subject {self.subject!r} must be some text that occurs "
                "in the request"
            )

    @property
    def text(self) -> str:
        """The request as the user types it."""
        return (self.subject or "").join(self.pieces)

    def reworded(self, template: str) -> "Request":
        """The same subject in other words; `{}` in the template stands for the subject."""
        if self.subject is None:
            raise ValueError(f"request {self.id!r} has no subject to put into {template!r}")
        return replace(self, pieces=tuple(template.split("{}")))

    def wrapped(self, wrapper: str) -> "Request":
        """The same request inside other text; `{}` in the wrapper stands for the request."""
        if wrapper.count("{}") != 1:
            raise ValueError(f"a wrapper holds {{}} once, in the request's place; got {wrapper!r}")
        start, end = wrapper.split("{}")
        pieces = (start + self.pieces[0], *self.pieces[1:])
        return replace(self, pieces=(*pieces[:-1], pieces[-1] + end))

    def to_json(self) -> dict[str, Any]:
        """Plain fields; `Request(**fields)` with a tuple of pieces gives the request back."""
        return asdict(self)


def request(text: str, subject: str | None = None, *, id: str = "", **fields: Any) -> Request:
    """A Request from plain text; the subject is found at word boundaries, wherever it occurs.

    Raises:
        ValueError: the subject does not occur in the text as a word or phrase of its own.
    """
    name = id or text[:40]
    if subject is None:
        return Request(id=name, pieces=(text,), **fields)
    pieces = tuple(re.split(_at_word_boundaries(subject), text)) if subject.strip() else (text,)
    if len(pieces) < 2:
        raise ValueError(
            f"request {name!r}: the subject {subject!r} does not occur in the text {text!r}; mark "
            "the words of the text that carry the harm"
        )
    return Request(id=name, pieces=pieces, subject=subject, **fields)


def request_from_json(fields: dict[str, Any]) -> Request:
    """The inverse of Request.to_json."""
    return Request(**{**fields, "pieces": tuple(fields["pieces"])})


def _at_word_boundaries(subject: str) -> str:
    return rf"(?<!\w){re.escape(subject)}(?!\w)"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A Request met by one tokenizer: the tokens that the model reads, and what each one is."""

    request: Request
    ids: tuple[int, ...]
    words: tuple[str, ...]
    """The text of each token, spaces and newlines included."""
    subjects: tuple[tuple[int, int], ...]
    """Token spans (start, stop) of the subject's occurrences; empty where there is no subject."""
    roles: tuple[Role, ...]
    chat: bool = False
    """Whether a chat template stands around the request."""
    answer: tuple[int, ...] = ()
    """Token ids of the answer that a metric reads; none until trace() or a caller sets them."""

    def positions(self, role: Role) -> tuple[int, ...]:
        """The positions of a role, in order; empty where the prompt has none."""
        return tuple(i for i, r in enumerate(self.roles) if r == role)

    @property
    def corrupted(self) -> tuple[int, ...]:
        """The positions of all the subject's occurrences."""
        return tuple(i for start, stop in self.subjects for i in range(start, stop))


def prompt(tokenizer: PreTrainedTokenizerBase, request: Request, *, chat: bool = True) -> Prompt:
    """Meet a request with a tokenizer, inside its chat template where it has one.

    Args:
        tokenizer: a fast tokenizer (it must give offset mappings).
        request: what is asked.
        chat: False asks without the chat template, as one does with a base model.

    Raises:
        ValueError: the tokenizer gives no offsets.
        UnfitRequest: the chat template changes the request's text; or a subject's edge falls inside a token.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} gives no offset mappings; load the fast tokenizer of the "
            "model (AutoTokenizer with use_fast=True)"
        )
    chat = chat and has_chat_template(tokenizer)
    text, start = _rendered(tokenizer, request, chat)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=not chat)
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    ids: list[int] = encoded["input_ids"]
    subjects = tuple(_token_span(text, offsets, *span, request) for span in _subject_chars(request, start))
    return Prompt(
        request=request,
        ids=tuple(ids),
        words=_words(tokenizer, text, ids, offsets),
        subjects=subjects,
        roles=_roles(offsets, start, start + len(request.text), subjects),
        chat=chat,
    )


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer knows how to render a conversation."""
    return bool(getattr(tokenizer, "chat_template", None))


def validated_requests(requests: Sequence[Request]) -> tuple[Request, ...]:
    """The requests, if an edit and its settings may see them: each has a subject, none is kept for checks.

    Raises:
        ValueError: there are none, one has no subject, or one belongs to the split "check".
    """
    if not requests:
        raise ValueError("no requests were given; ld.requests('core') has some")
    for item in requests:
        if item.subject is None:
            raise ValueError(
                f"request {item.id!r} has no subject; give request(text, subject) the words that "
                "carry the harm"
            )
        if item.split == "check":
            raise ValueError(
                f"request {item.id!r} belongs to the split 'check', which only ld.check may see; "
                "take ld.requests(name, split='edit')"
            )
    return tuple(requests)


def _rendered(tokenizer: PreTrainedTokenizerBase, request: Request, chat: bool) -> tuple[str, int]:
    """The whole text that the model reads, and where the request starts in it."""
    if not chat:
        return request.text, 0
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": request.text}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    stripped = request.text.strip()
    marked = tokenizer.apply_chat_template(
        [{"role": "user", "content": PLACEHOLDER}], tokenize=False, add_generation_prompt=True
    )
    found = str(marked).find(PLACEHOLDER)
    if found < 0 or not text.startswith(stripped, found):
        raise UnfitRequest(
            f"the chat template changes the text of request {request.id!r}; ask it without the "
            "template (chat=False)"
        )
    return text, found - request.text.index(stripped)


def _subject_chars(request: Request, start: int) -> list[tuple[int, int]]:
    """Character spans of the subject's occurrences in the rendered text."""
    spans, at = [], start
    for piece in request.pieces[:-1]:
        at += len(piece)
        spans.append((at, at + len(request.subject or "")))
        at = spans[-1][1]
    return spans


def _token_span(
    text: str, offsets: list[tuple[int, int]], start: int, stop: int, request: Request
) -> tuple[int, int]:
    """Tokens that carry the characters start to stop; surplus may only be white space."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    if not inside:
        raise UnfitRequest(f"request {request.id!r}: no token carries {request.subject!r}")
    left = text[min(offsets[inside[0]][0], start) : start]
    right = text[stop : max(offsets[inside[-1]][1], stop)]
    if left.strip() or right.strip():
        raise UnfitRequest(
            f"request {request.id!r}: the subject {request.subject!r} does not end where a token "
            f"ends (the token holds {left + '|' + (request.subject or '') + '|' + right!r}); mark a "
            "longer or a shorter subject"
        )
    return inside[0], inside[-1] + 1


def _words(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[str, ...]:
    """What each token adds to the text; a token without text of its own shows its name."""
    words, end = [], 0
    for token, (_, stop) in zip(ids, offsets, strict=True):
        name = tokenizer.convert_ids_to_tokens(token)
        words.append(text[end:stop] if stop > end else str(name))
        end = max(end, stop)
    return tuple(words)


def _roles(
    offsets: list[tuple[int, int]], start: int, stop: int, subjects: tuple[tuple[int, int], ...]
) -> tuple[Role, ...]:
    """One role a token; where the subject occurs twice, its roles are those of the last one."""
    first, after = subjects[-1] if subjects else (len(offsets), len(offsets))

    def role(i: int) -> Role:
        a, b = offsets[i]
        if i == len(offsets) - 1:
            return "last"
        if first <= i < after:
            return "subject_last" if i == after - 1 else "subject_first" if i == first else "subject_mid"
        if i == after:
            return "next"
        if b <= start or a >= stop:
            return "template"
        return "before" if i < first else "after"

    return tuple(role(i) for i in range(len(offsets)))


PLACEHOLDER = "\ue000"
"""Stands for a text in a rendered chat template, to be found again."""
