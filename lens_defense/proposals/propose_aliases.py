"""Other names of a subject, as the model knows them: proposals for `Request.aliases`, to be confirmed."""

import re
from collections import Counter
from collections.abc import Iterator

from lens_defense.arguments import wrong_argument
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.generate import generate
from lens_defense.prompts.conversation import decode_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request

_QUESTIONS = (
    "What is another word for {}? List the synonyms, separated by commas.",
    "List other names for {}, separated by commas.",
    "How else do people call {}? Give me only the names, separated by commas.",
    "What is {} called in slang? Give me only the words, separated by commas.",
    "Translate {} into Spanish, French, German and Italian. Give me only the four words.",
)
_SEPARATORS = re.compile(r"[,;\n]|\bor\b|\band\b|\d+[.)]|(?<=[.:])\s")
_MOST_WORDS = 4
_ANSWER_TOKENS = 48


def propose_aliases(model: Model, request: Request) -> tuple[str, ...]:
    """What the model itself calls a request's subject. Read them, and keep those that are right.

    The model is asked for synonyms, slang and translations, greedily. Names in more than one answer come
    first. A small model proposes little that is right (smollm2 is no thesaurus). No edit uses one unread:

        print(ld.propose_aliases(model, request))
        request = dataclasses.replace(request, aliases=("those", "that are right"))

    Args:
        model: the model that will be edited; what it does not know, it need not forget.
        request: one with a subject.

    Returns:
        Names of at most four words, in lower case where the model wrote a capital only at the start.

    Raises:
        ValueError: the request has no subject.
    """
    call = "ld.propose_aliases(model, request)"
    model = resolve_model(model, call)
    if not isinstance(request, Request):
        raise wrong_argument(call, "request must be a Request", request)
    if not request.subject:
        raise ValueError(f"request {request.id!r} has no subject; give one: ld.request(text, subject)")
    asked = [request.paraphrased(question) for question in _QUESTIONS]
    prompts = [tokenize(model.tokenizer, question).ids for question in asked]
    answers = generate(model, prompts, max_new_tokens=_ANSWER_TOKENS)
    counts = Counter(
        name
        for answer in answers
        for name in dict.fromkeys(_names_in(decode_answer(model.tokenizer, answer), request.subject))
    )
    return tuple(name for name, _ in counts.most_common())


def _names_in(answer: str, subject: str) -> Iterator[str]:
    """The short pieces of a list; not those that hold the subject, or are part of it."""
    for piece in _SEPARATORS.split(answer):
        name = re.sub(r"^\W+|\W+$", "", re.sub(r"^(an?|the)\s", "", piece.strip(), flags=re.IGNORECASE))
        said, known = name.lower(), subject.lower()
        if name and len(name.split()) <= _MOST_WORDS and known not in said and said not in known:
            yield name if any(letter.isupper() for letter in name[1:]) else name.lower()
