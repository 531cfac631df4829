"""A chat template with its arguments bound, so that every text that is rendered by it has them.

Templates take arguments (`enable_thinking` of Qwen3) and a system prompt. Set once in the template itself,
they hold for traces, edits, checks and a saved folder alike.
"""

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


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
    tokenizer.chat_template = "".join(settings) + _END_OF_SETTINGS + template
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello."}], tokenize=False)
    except TemplateError as error:
        tokenizer.chat_template = template
        raise ValueError(f"the chat template does not take this: {error}") from error


_END_OF_SETTINGS = "{#- end of bound arguments -#}"


def _literal(value: Any) -> str:
    """In Jinja, whose literals are JSON's but for None."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
