"""What a host needs of an explorer: parts to show, changes to follow, commands to hand over."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class PageState(Protocol):
    """An Explorer, as its hosts see it."""

    @property
    def parts(self) -> dict[str, Any]:
        """By name, what the page shows: plain values, safe to show."""
        ...

    def listen(self, listener: Callable[[str, Any], object]) -> Callable[[], None]:
        """Call a function with each part, now and when it changes, and each event; returns what ends that."""
        ...

    def do(self, command: str, **arguments: Any) -> None:
        """Do what a page asks for."""
        ...

    def done(self, ticket: str) -> None:
        """Tell the pages that the command that has this ticket has been done, or refused."""
        ...


EVENT = "event:"
"""How the names of events begin, that are no parts."""


def hand_over(state: PageState, message: Any) -> None:
    """Do what a message of a page says; one of another form is dropped: no page of ours sends it."""
    if not isinstance(message, dict) or not isinstance(message.get("command"), str):
        return
    values = message.get("values")
    if isinstance(values, dict) and "command" not in values:
        state.do(message["command"], **values)
        if isinstance(ticket := message.get("ticket"), str):
            state.done(ticket)
