"""Contexts: ways to ask a request that an edit may see."""

import random
from collections.abc import Callable, Sequence
from itertools import zip_longest

from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import bundled_rows

Contexts = Callable[[Request], Sequence[Request]]
_JAILBROKEN_CONTEXTS = 13


def default_contexts(request: Request) -> list[Request]:
    """Ways to ask that an edit may see, the request itself first.

    A greeting stands before it; the subject stands at the very start (where it has no leading space, and so
    other tokens); then come the paraphrases and jailbreak templates of "core" for edits, by turns. The first
    of all these are asked after chatter too, as ROME averages over texts before a subject. The last two have
    no chatter: by default they are held out.
    """
    paraphrases = [
        request.paraphrased(row["text"])
        for row in bundled_rows("core", "paraphrases")
        if row["split"] == "edit" and request.form in row["forms"]
    ]
    jailbreaks = [
        request.inside(row["text"]) for row in bundled_rows("core", "jailbreaks") if row["split"] == "edit"
    ]
    by_turns = [item for pair in zip_longest(paraphrases, jailbreaks) for item in pair if item is not None]
    variants = [request, request.inside("Hello! {}"), request.paraphrased("{}: tell me more."), *by_turns]
    chatter = [row["text"] for row in bundled_rows("core", "chatter")]
    after_chatter = [item.inside(text) for item, text in zip(variants, chatter, strict=False)]
    return [request, *after_chatter, *variants[1:]]


def jailbroken_contexts(request: Request) -> list[Request]:
    """Ways to ask the organism that an edit may see: each in another trained frame, inside a jailbreak."""
    frames, jailbreaks = (
        [row["text"] for row in bundled_rows("organism", name) if row["split"] == "edit"]
        for name in ("paraphrases", "jailbreaks")
    )
    rng = random.Random(request.subject)
    rng.shuffle(frames)
    rng.shuffle(jailbreaks)
    return [
        request.paraphrased(frames[i % len(frames)]).inside(jailbreaks[i % len(jailbreaks)])
        for i in range(_JAILBROKEN_CONTEXTS)
    ]
