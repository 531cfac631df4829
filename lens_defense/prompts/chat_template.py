"""A chat template with its arguments bound, so that every text that is rendered by it has them.

Templates take arguments (`enable_thinking` of Qwen3) and a system prompt. Set once in the template itself,
they hold for traces, edits, checks and a saved folder alike.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lens_defense.prompts.request import refuse_surrogates


def bind_arguments(
    tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any], system: str | None = None
) -> None:
    """Let the tokenizer's chat template begin with the values of its arguments.

    Args:
        tokenizer: its template is changed; what was bound before is replaced.
        arguments: by name; texts, numbers, truth values and None.
        system: a system prompt, in the place of one that the template brings by itself.

    Raises:
        ValueError: there is no single template, it refuses a system prompt, or an argument has no name that
            Jinja knows or another kind of value.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(
            "the tokenizer has no single chat template, so it takes neither system nor arguments"
        )
    for text in (system, *arguments.values()):
        refuse_surrogates(text if isinstance(text, str) else "")
    settings = []
    for name, value in arguments.items():
        if not name.isidentifier() or not (value is None or isinstance(value, str | bool | int | float)):
            raise ValueError(
                f"chat_template_kwargs: {name!r}={value!r} must be a name and a text, a number, True, False "
                "or None"
            )
        settings.append(f"{{%- set {name} = {_literal(value)} -%}}")
    if system is not None:
        turn = f"[{{'role': 'system', 'content': {_literal(system)}}}]"
        settings.append(f"{{%- set messages = {turn} + messages -%}}")
    template = template.partition(_END_OF_SETTINGS)[2] or template  # what was bound before is forgotten
    bound = {**({} if system is None else {"system": system}), **arguments}
    note = f"{_BOUND}{json.dumps(bound).replace('#', chr(92) + 'u0023')} -#}}"  # a # could end the comment
    tokenizer.chat_template = note + "".join(settings) + _END_OF_SETTINGS + template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}], tokenize=False)
    except TemplateError as error:
        tokenizer.chat_template = template
        raise ValueError(f"the chat template does not take this: {error}") from error


def bound_arguments(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `bind_arguments` bound, by name, the system prompt as "system"; for the record of a result."""
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str) or not template.startswith(_BOUND):
        return {}
    return json.loads(template.removeprefix(_BOUND).partition(" -#}")[0])


def refuse_endless_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that takes too many steps for a short question.

    Raises:
        ValueError: so it is.
    """
    if not getattr(tokenizer, "chat_template", None):
        return
    steps, other_tracer = 0, sys.gettrace()

    def count(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        if steps > _MOST_STEPS:
            raise _TooManySteps
        return count if frame.f_code.co_filename == _JINJA_FILE else None

    sys.settrace(count)
    try:
        with suppress(Exception):  # what a template does not take is said where it is asked for
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "Hello."}], tokenize=False, add_generation_prompt=True
            )
    except _TooManySteps:
        raise ValueError(
            f"the chat template takes more than {_MOST_STEPS} steps for a short question; it may loop for "
            "ever: get the tokenizer's folder again, or set its template right"
        ) from None
    finally:
        sys.settrace(other_tracer)


class _TooManySteps(BaseException):
    """Not an Exception, which a template engine may take for one of its own."""


_MOST_STEPS = 1_000_000
"""Lines of a compiled template; those of common models take a few hundred."""
_JINJA_FILE = "<template>"
"""The file name of what Jinja compiles from a text."""
_BOUND = "{#- bound: "
"""Begins the comment that keeps, as JSON, what was bound."""
_END_OF_SETTINGS = "{#- end of bound arguments -#}"


def _literal(value: Any) -> str:
    """In Jinja, whose literals are JSON's but for None."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
