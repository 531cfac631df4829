"""Subjects for requests that have none marked: the words whose corruption changes the model's answer most."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any, overload

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.display import card
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.devices import memory_budget
from lens_defense.models.forward import forward, model_device
from lens_defense.patching.clean_corrupted import prompts_with_answers, rows_that_fit
from lens_defense.patching.corruptions import Corruption, GaussianNoise
from lens_defense.patching.metrics import answer_logprob
from lens_defense.patching.trace_settings import MIN_DIFFERENCE
from lens_defense.progress import ProgressBar
from lens_defense.prompts.prompt import Prompt, tokenize
from lens_defense.prompts.request import Request, UnfitRequest, request
from lens_defense.prompts.resolve_requests import Requests, resolve_requests
from lens_defense.sites import EMBEDDING_HOOK

_CALL = "ld.mark_subjects(model, requests)"
MAX_WORDS = 4
"""The most words of a proposed subject."""
NEIGHBOUR_SHARES = {"before": 0.15, "after": 0.05}
"""The shares of the best word's effect from which on a word beside it belongs to the subject. One behind it
needs less: in English compounds ("mustard gas") the first word tells more."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class MarkedRequest:
    """A proposal for one request."""

    request: Request
    """With its subject marked; without one, where no word changes the answer by MIN_DIFFERENCE."""
    effect: float
    """Nats of the answer's log probability that the subject's corruption takes in every sample (the least of
    them); NaN where the request came with a subject."""
    others: tuple[tuple[str, float], ...]
    """The next words that take MIN_DIFFERENCE or more, and what they take, strongest first."""


class MarkedRequests(Sequence[Request]):
    """Proposed subjects, to be looked at: a list of requests that shows what was marked, and why."""

    def __init__(self, marked: Sequence[MarkedRequest]) -> None:
        """Hold the proposals, in the order of the requests."""
        self.marked = tuple(marked)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | Sequence[Request]:
        return [item.request for item in self.marked][index]

    def __len__(self) -> int:
        return len(self.marked)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per request: id, text, subject, effect in nats, and the next words with theirs."""
        rows = [
            (
                item.request.id,
                item.request.text,
                item.request.subject or "",
                item.effect,
                ", ".join(f"{word} {effect:.1f}" for word, effect in item.others),
            )
            for item in self.marked
        ]
        return pd.DataFrame(rows, columns=pd.Index(["id", "text", "subject", "effect", "other words"]))

    def __repr__(self) -> str:
        head = "Proposed subjects; look at them before you trace or edit, and name those left blank.\n"
        return head + self.to_dataframe().drop(columns="id").round(2).to_string(index=False, max_rows=20)

    def _repr_html_(self) -> str:
        title = "Proposed subjects: look at them, and name those left blank"
        return card(title, {"requests": len(self)}, self.to_dataframe().drop(columns="id").round(2), rows=50)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Words of a request that may be its subject."""

    start: int
    stop: int
    """Characters of the request's text."""
    effect: float = 0.0


def mark_subjects(
    model: Model,
    requests: Requests,
    *,
    corruption: Corruption | None = None,
    answer_tokens: int = 24,
    chat: bool = True,
    progress: bool = True,
) -> MarkedRequests:
    """Propose the subjects of requests that have none marked.

    Each word but those that ask ("how do I make") is corrupted by itself, as a trace corrupts a subject. The
    subject is the word that takes most of the model's own answer, with its neighbours that take nearly as
    much. Requests with a subject are passed on. Look at what is proposed:

        marked = ld.mark_subjects(model, texts)
        marked  # in a notebook, a table
        trace = ld.trace(model, marked)

    Args:
        model: what `load` gave, or a name for it.
        requests: texts, rows, the name of a set, or requests; in English, since that is what the list of
            words that ask is in.
        corruption: of each word; None is GaussianNoise().
        answer_tokens: how much of the model's own answer is read.
        chat: False asks without the model's chat template.
        progress: shows a bar.

    Raises:
        ValueError: there are no requests.
    """
    model, items = resolve_model(model, _CALL), resolve_requests(requests, _CALL)
    if not items:
        raise ValueError("no requests were given; ld.requests('core') has some")
    corruption = corruption or GaussianNoise()
    without_subject = [item for item in items if item.subject is None]
    prompts = iter(prompts_with_answers(model, without_subject, None, answer_tokens=answer_tokens, chat=chat))
    marked = []
    with ProgressBar("subjects", len(items), unit="request", shown=progress) as bar:
        for item in items:
            marked.append(
                MarkedRequest(item, float("nan"), ())
                if item.subject is not None
                else _propose_subject(model, next(prompts), corruption)
            )
            bar.update()
    return MarkedRequests(marked)


def _propose_subject(model: TransformerBridge, prompt: Prompt, corruption: Corruption) -> MarkedRequest:
    """The proposal for one request; one without a subject where no word takes anything of the answer."""
    item = prompt.request
    words = [_Candidate(*word.span()) for word in _WORD.finditer(item.text) if _may_be_subject(word[0])]
    words = _with_effects(model, prompt, words, corruption)
    if not words or max(word.effect for word in words) < MIN_DIFFERENCE:
        return MarkedRequest(item, 0.0, ())
    best = max(words, key=lambda word: word.effect)
    phrase = _with_neighbours(item.text, words, best)
    (phrase,) = _with_effects(model, prompt, [phrase], corruption) or (best,)
    others = sorted(
        (word for word in words if not phrase.start <= word.start < phrase.stop),
        key=lambda word: -word.effect,
    )
    return MarkedRequest(
        _with_subject(item, phrase),
        phrase.effect,
        tuple(
            (item.text[word.start : word.stop], word.effect)
            for word in others[:3]
            if word.effect >= MIN_DIFFERENCE
        ),
    )


def _may_be_subject(word: str) -> bool:
    return word.lower() not in _words_that_ask() and not word.isdigit()


@cache
def _words_that_ask() -> frozenset[str]:
    """English words that ask, and words that stand with any subject: none is part of one."""
    file = files("lens_defense").joinpath("data/words_that_ask.txt")
    return frozenset(file.read_text("utf-8").split())


def _with_subject(item: Request, words: _Candidate) -> Request:
    fields: dict[str, Any] = {
        name: getattr(item, name)
        for name in Request.__slots__
        if name not in ("pieces", "subject", "spelled")
    }
    return request(item.text, item.text[words.start : words.stop], **fields)


def _with_neighbours(text: str, words: Sequence[_Candidate], best: _Candidate) -> _Candidate:
    """The best word with the words beside it that take nearly as much, MAX_WORDS at most."""
    chosen = [best]
    index = words.index(best)
    for word in words[index + 1 :]:
        text_between = text[chosen[-1].stop : word.start].strip()
        if text_between or word.effect < NEIGHBOUR_SHARES["after"] * best.effect or len(chosen) == MAX_WORDS:
            break
        chosen.append(word)
    for word in reversed(words[:index]):
        text_between = text[word.stop : chosen[0].start].strip()
        if text_between or word.effect < NEIGHBOUR_SHARES["before"] * best.effect or len(chosen) == MAX_WORDS:
            break
        chosen.insert(0, word)
    return replace(best, start=chosen[0].start, stop=chosen[-1].stop)


@torch.no_grad()
def _with_effects(
    model: TransformerBridge, prompt: Prompt, words: Sequence[_Candidate], corruption: Corruption
) -> list[_Candidate]:
    """Words with what their corruption takes of the answer's log probability: the least of all samples.

    Those whose tokens hold letters of other words cannot be corrupted by themselves, and are left out.
    """
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]], device=model_device(model))
    keep = len(prompt.answer_ids)
    clean = forward(model, ids, capture=[EMBEDDING_HOOK], logits_to_keep=keep)
    embeddings = clean.states[EMBEDDING_HOOK]
    clean_logprob = float(answer_logprob(clean.logits.float(), prompt, clean.logits))
    fitting, rows = [], []
    for word in words:
        try:
            of_word = tokenize(model.tokenizer, _with_subject(prompt.request, word), chat=prompt.chat)
        except UnfitRequest:
            continue
        fitting.append(word)
        rows.append(corruption(model, embeddings[:, : len(prompt.ids)], of_word).to(embeddings))
    if not rows:
        return []
    samples = len(rows[0])
    prompt_part = torch.cat(rows)
    answer_part = embeddings[:, len(prompt.ids) :].expand(len(prompt_part), -1, -1)
    changes = []
    for part in torch.cat([prompt_part, answer_part], 1).split(_rows_per_batch(model, prompt)):
        run = forward(
            model,
            ids.expand(len(part), -1),
            patches={EMBEDDING_HOOK: lambda _, part=part: part},
            logits_to_keep=keep,
        )
        changes.append(clean_logprob - answer_logprob(run.logits.float(), prompt, clean.logits))
    smallest_effects = torch.cat(changes).view(-1, samples).min(1).values
    return [
        replace(word, effect=float(effect)) for word, effect in zip(fitting, smallest_effects, strict=True)
    ]


def _rows_per_batch(model: TransformerBridge, prompt: Prompt) -> int:
    return rows_that_fit(model, prompt, memory_budget(model_device(model)))
