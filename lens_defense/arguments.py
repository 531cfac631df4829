"""Arguments as people give them: what is wrong meets one sentence that shows the right call."""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


def wrong_argument(call: str, requirement: str, value: Any, hint: str = "") -> TypeError:
    """The error for an argument of another type, to be raised.

    Args:
        call: the right call, as in "ld.trace(model, requests)".
        requirement: which argument it is and what it should be.
        value: what came.
        hint: what to do, where there is more to say than the call.
    """
    return TypeError(f"{requirement}, not {in_words(value)}; the call is {call}{'; ' if hint else ''}{hint}")


def refuse_strength(strength: int | float) -> None:
    """Refuse a strength that is not a finite number above 0.

    Raises:
        ValueError: it is not finite, or not above 0.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength < math.inf:
        raise ValueError(f"strength must be a finite number above 0, got {strength!r}")


def in_words(value: Any) -> str:
    """What a value is, for a message: "a Trace", "a list of Request", "the text 'all'"."""
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, int | float):
        return f"the number {value}"
    name = type(value).__name__
    if isinstance(value, list | tuple | set):
        parts = sorted({type(part).__name__ for part in value})
        return f"{_a(type(value).__name__)} of {' and '.join(parts)}" if parts else f"an empty {name}"
    return _a(name)


def did_you_mean(name: object, names: Sequence[str]) -> str:
    """A question to end a message with, where a name is close to a known one; else nothing."""
    close = get_close_matches(str(name), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
