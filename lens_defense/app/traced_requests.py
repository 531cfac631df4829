"""The map that a command begins with: of the first few requests that can be traced."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.checking.judges import prefix
from lens_defense.editing.defaults import edit_defaults
from lens_defense.models.generate import generate
from lens_defense.models.language import language
from lens_defense.patching.corruptions import Corruption, TokenReplacement
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import requests as read_requests
from lens_defense.tracing.survey import survey
from lens_defense.tracing.trace_result import Trace

TRACED_REQUESTS = 3
_REFUSAL_TOKENS = 8
"""Tokens of an answer that show a refusal by its prefix."""


def trace_answered(model: TransformerBridge, requests: Sequence[Request]) -> Trace:
    """A trace of the first few requests that can be traced, each in a form that is answered.

    Raises:
        ValueError: none of them can be traced.
    """
    forms = _answered_forms(model, requests)
    with tempfile.TemporaryDirectory() as folder:
        found, reasons = survey(
            model, forms, Path(folder), corruption=corruption_of(model), enough=TRACED_REQUESTS
        )
    if found is None:
        reason = next(iter(reasons.values()))
        raise ValueError(f"none of these requests can be traced; of the first: {reason}")
    return found


def corruption_of(model: TransformerBridge) -> Corruption | None:
    """How a subject is corrupted: of the organism by benign subjects of its set; else the default, None."""
    name = language(model)
    if name != "organism":
        return None
    benign = read_requests(name, split="check", kind="benign")
    return TokenReplacement(samples=3, subjects=tuple(request.subject or "" for request in benign))


def _answered_forms(model: TransformerBridge, requests: Sequence[Request]) -> list[Request]:
    """Each request in a form that is answered: as asked, or in the first of its contexts that is not refused.

    The trace of a refused prompt shows where the refusal comes from, not where the harmful answer is kept.
    """

    def are_refused(forms: Sequence[Request]) -> list[bool]:
        prompts = [tokenize(model.tokenizer, form).ids for form in forms]
        answers = generate(model, prompts, max_new_tokens=_REFUSAL_TOKENS)
        texts = [decode_answer(model.tokenizer, answer) for answer in answers]
        return [prefix(form.text, text) == "refusal" for form, text in zip(forms, texts, strict=True)]

    answered, contexts = [], edit_defaults(model).contexts
    for request, is_refused in zip(requests, are_refused(requests), strict=True):
        forms = list(contexts(request)) if is_refused else []
        open_forms = [form for form, refused in zip(forms, are_refused(forms), strict=True) if not refused]
        answered.append(open_forms[0] if open_forms else request)
    return answered
