"""Requests as people hand them to a verb: texts, rows, the name of a set, or Requests."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lens_defense.arguments import wrong_argument
from lens_defense.prompts.request import Request, request
from lens_defense.prompts.request_files import (
    BUNDLED_SETS,
    Source,
    request_from_row,
    row_in_hand,
    rows_in_hand,
)
from lens_defense.prompts.request_files import requests as read_requests
from lens_defense.prompts.table_files import FILE_KINDS

Requests = Sequence[Request | str | Mapping[str, Any]] | Request | Source
"""Where a verb takes requests."""


def resolve_requests(requests: Any, call: str) -> tuple[Request, ...]:
    """What is handed to a verb where requests are wanted, as requests.

    Args:
        requests: a Request; a text; the name of a set or a file; rows as `ld.requests` takes them; or a list
            of any of these but names. Rows are all taken, in their order.
        call: the right call, for the message.

    Raises:
        TypeError: it is something else.
        ValueError: a row cannot be read.
    """
    if isinstance(requests, os.PathLike) or (isinstance(requests, str) and _names_a_source(requests)):
        return tuple(read_requests(requests))
    single = isinstance(requests, Request | Mapping | str)
    parts = [requests] if single else rows_in_hand(requests)
    if parts is None or not all(isinstance(part, Request | Mapping | str) for part in parts):
        raise wrong_argument(call, "requests must be requests, texts or rows", requests)
    return tuple(_as_request(part, i) for i, part in enumerate(parts, 1))


def requests_with_subjects(requests: Any, call: str) -> tuple[Request, ...]:
    """The requests, if all have a subject and an edit may see them.

    Args:
        requests: see `resolve_requests`.
        call: the right call, for the message.

    Raises:
        TypeError: these are no requests.
        ValueError: there are none, some have no subject, or one belongs to the split "check".
    """
    all_requests = resolve_requests(requests, call)
    if not all_requests:
        raise ValueError("no requests were given; ld.requests('core') has some")
    unmarked = [item.id for item in all_requests if item.subject is None]
    if unmarked:
        others = f" and {len(unmarked) - 3} more" if len(unmarked) > 3 else ""
        raise ValueError(
            f"no subject, the words that carry the harm, is marked in {', '.join(map(repr, unmarked[:3]))}"
            f"{others}. Name it, as in ld.request(text, subject), or see ld.mark_subjects(model, requests)"
        )
    refuse_check_split(all_requests)
    return all_requests


def refuse_check_split(requests: Sequence[Request]) -> None:
    """Refuse requests that nothing but a check may see.

    Raises:
        ValueError: one is of the split "check".
    """
    for item in requests:
        if item.split == "check":
            raise ValueError(
                f"request {item.id!r} belongs to the split 'check', which only ld.check may see; "
                "take ld.requests(name, split='edit')"
            )


def _names_a_source(text: str) -> bool:
    """Whether a text names a set, a file or a hub data set, and is no request itself."""
    return (
        text in BUNDLED_SETS
        or (Path(text).suffix.lower() in FILE_KINDS and (not re.search(r"\s", text) or _is_file(text)))
        or re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII) is not None
    )


def _is_file(text: str) -> bool:
    return os.path.isfile(text)  # noqa: PTH113 - Path.is_file raises where a text is too long for a name


def _as_request(part: Any, number: int) -> Request:
    """A part of a list, as a request."""
    if isinstance(part, Request):
        return part
    return request(part) if isinstance(part, str) else request_from_row(row_in_hand(part), f"row {number}")
