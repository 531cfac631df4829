"""A `with` block that restores what it changed, wherever an interrupt hits.

An interrupt is raised between two steps of Python: also in a `finally`, and before the first line of an
`__exit__`. So what restores can be called again, an interrupt calls it again, and between the end of the
block and the `try` around it there is no step of Python.
"""

import io
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class RestoringBlock(io.IOBase, Generic[Value]):
    """A context manager of two functions: one that changes something, and one that restores it.

    The `__exit__` of io.IOBase is written in C and calls `close`, here that of a generator which waits inside
    its `try`. An `__exit__` of Python could be interrupted before it has restored anything.
    """

    def __init__(self, enter: Callable[[], Value], restore: Callable[[], object], mark: Any = None) -> None:
        """Make a block; nothing happens before it is entered.

        Args:
            enter: makes the change; what it returns is the value of `with ... as`.
            restore: takes back what `enter` has done, all or a part of it; harmless where there is nothing.
            mark: its attribute `left` is set to True first of all when the block is left.
        """
        self._steps = _enter_and_restore(enter, restore, mark or SimpleNamespace())
        self.close = self._steps.close

    def __enter__(self) -> Value:  # pyright: ignore[reportIncompatibleMethodOverride]
        try:
            return next(self._steps)
        except BaseException:
            self._steps.close()
            raise


def finish(action: Callable[[], object]) -> None:
    """Call an action until it comes to its end; an interrupt starts it again, and is raised afterwards."""
    interrupt = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _enter_and_restore(
    enter: Callable[[], Value], restore: Callable[[], object], mark: Any
) -> Generator[Value, None, None]:
    try:
        try:
            yield enter()
        finally:
            mark.left = True
            finish(restore)
    finally:  # an interrupt can come before the first line of the call above
        finish(restore)
