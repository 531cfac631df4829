"""Progress: what long work says while it runs, in bars or to a listener.

Without a listener a bar is tqdm's, in a terminal or a notebook. A page has neither: it sets a listener around
the work, which then hears every bar and every sentence, and nothing is printed. The listener is a context
variable: it is that of the thread which set it, and of no other.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from tqdm.auto import tqdm


@runtime_checkable
class ProgressListener(Protocol):
    """Hears of the work's progress, in the thread that works. What it raises ends the work."""

    def step(self, description: str, done: int, total: int | None) -> object:
        """So much of a piece of work is done; a total of None is not known, and one may grow."""
        ...

    def say(self, sentence: str) -> object:
        """Something to know meanwhile, as how long it will take."""
        ...


@contextmanager
def progress_listener(listener: ProgressListener | None) -> Iterator[None]:
    """Inside, this thread's bars and sentences go to a listener; None prints them, as outside."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def say(sentence: str) -> None:
    """Say something to know while work runs: to the listener, or above the bars."""
    listener = _LISTENER.get()
    if listener is None:
        tqdm.write(sentence)
    else:
        listener.say(sentence)


class ProgressBar:
    """How much of a piece of work is done; a `with` block, at whose end the last state is shown."""

    def __init__(
        self,
        description: str,
        total: int | None,
        *,
        unit: str = "it",
        unit_scale: bool = False,
        done: int = 0,
        shown: bool = True,
    ) -> None:
        """Open the bar, and show it.

        Args:
            description: what the work is called, in a word.
            total: how many steps there are; None where that is not known.
            unit: what a step is called.
            unit_scale: whether many steps are shown as k and M.
            done: steps that were done before.
            shown: False shows nothing and tells nobody.
        """
        self.description, self.done, self._total = description, done, total
        self._listener = _LISTENER.get() if shown else None
        self._tqdm = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            unit_scale=unit_scale,
            disable=not shown or self._listener is not None,
        )
        self._told: tuple[int, int | None] | None = None
        self._told_at = 0.0
        self._tell()

    @property
    def total(self) -> int | None:
        """How many steps there are; it may be set while the work runs."""
        return self._total

    @total.setter
    def total(self, total: int | None) -> None:
        self._total = self._tqdm.total = total

    def update(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self.done += steps
        self._tqdm.update(steps)
        if time.monotonic() - self._told_at >= _SECONDS_BETWEEN_STEPS:
            self._tell()

    def note(self, **values: object) -> None:
        """Figures that stand behind the bar, from its next step on; a listener does not hear them."""
        self._tqdm.set_postfix(values, refresh=False)

    def refresh(self) -> None:
        """Show a printed bar now, whether or not it is its time."""
        self._tqdm.refresh()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._tqdm.close()
        self._tell()

    def _tell(self) -> None:
        state = (self.done, self._total)
        if self._listener is not None and state != self._told:
            self._told, self._told_at = state, time.monotonic()
            self._listener.step(self.description, *state)


_LISTENER: ContextVar[ProgressListener | None] = ContextVar("progress_listener", default=None)
_SECONDS_BETWEEN_STEPS = 0.05
"""A listener hears a bar at most so often, and once at its end."""
