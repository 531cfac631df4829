"""Named parts of plain values, and who listens to them: the one way from an explorer to its pages."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lens_defense.app.explorer import page_values
from lens_defense.app.explorer.page_state import EVENT
from lens_defense.shown_text import CODE_LETTERS, TEXT_LETTERS

_log = logging.getLogger("lens_defense")
Listener = Callable[[str, Any], object]


class PublishedParts:
    """The parts as they were last made, and what is to be told of them."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        """Nothing is made yet.

        Args:
            makers: by the name of a part, what makes it.
        """
        self.values: dict[str, Any] = {}
        self.listeners: list[Listener] = []
        self.lock = threading.RLock()
        self._makers = makers

    def publish(self, *names: str) -> None:
        """Make these parts anew, and tell of them."""
        with self.lock:
            for name in names:
                letters = CODE_LETTERS if name == "code" else TEXT_LETTERS
                self.values[name] = value = page_values.visible(self._makers[name](), letters)
                _tell(self.listeners, name, value)

    def event(self, name: str, **value: Any) -> None:
        """Tell of something that has just happened and is no part; its values go as they are."""
        with self.lock:
            _tell(self.listeners, f"{EVENT}{name}", value)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call a function with each part, now and when it changes, and each event; returns what ends that."""
        with self.lock:
            self.listeners.append(listener)
            for name, value in self.values.items():
                _tell([listener], name, value)
        return lambda: self.listeners.remove(listener) if listener in self.listeners else None


def _tell(listeners: Sequence[Listener], name: str, value: Any) -> None:
    for listener in [*listeners]:
        try:
            listener(name, value)
        except Exception:  # a page's own trouble: the work and the other pages go on
            _log.warning("a page could not be told of its %s", name, exc_info=True)
