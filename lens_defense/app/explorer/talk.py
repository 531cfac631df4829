"""One question, answered without and with the edits that stand, token by token."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.models.generate import generate
from lens_defense.prompts.conversation import decode_answer, decode_growing_answer
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request


@dataclass(frozen=True, slots=True)
class Talk:
    """A question and its answers, as far as they have come."""

    question: str
    template: str
    """The id of the jailbreak template around it, or ""."""
    standing: tuple[Edit, ...]
    """The edits that stood when it was asked."""
    before: str = ""
    now: str = ""


def question_ids(question: Any, template: Any, templates: Mapping[str, str], tokenizer: Any) -> Sequence[int]:
    """The tokens of what a page asks, inside a jailbreak template or not.

    Args:
        question: the text.
        template: the id of a template, or "".
        templates: the texts of all templates, by id.
        tokenizer: the model's.

    Raises:
        ValueError: there is no question, or no such template.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError("type a question first")
    if not isinstance(template, str) or (template and template not in templates):
        raise ValueError("there is no such jailbreak template")
    asked = request(question)
    if template:
        asked = asked.inside(templates[template])
    return tokenize(tokenizer, asked).ids


def answer_both(
    ledger: Ledger, ids: Sequence[int], talk: Talk, max_new_tokens: int, show: Callable[[Talk], object]
) -> None:
    """Answer with the edits that stand, if any do, then without them.

    Args:
        ledger: of the model.
        ids: the question's tokens.
        talk: the question, without answers.
        max_new_tokens: the most tokens of an answer.
        show: is called with the talk at first, and with each token that comes.
    """

    def stream(side: str) -> None:
        nonlocal talk
        said: list[int] = []

        def hear(_: int, token: int) -> None:
            nonlocal talk
            said.append(token)
            talk = replace(talk, **{side: decode_growing_answer(ledger.model.tokenizer, said)})
            show(talk)

        generate(ledger.model, [ids], max_new_tokens=max_new_tokens, watch=hear)
        talk = replace(talk, **{side: decode_answer(ledger.model.tokenizer, said)})
        show(talk)

    show(talk)
    if talk.standing:
        stream("now")
        with ledger.set_aside():
            stream("before")
    else:
        stream("before")
