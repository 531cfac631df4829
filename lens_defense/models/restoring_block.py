"""A `with` block that restores what it changed, wherever an interrupt hits.

An interrupt is raised between two steps of Python: also in a `finally`, and before the first line of an
`__exit__`. So what restores can be called again, an interrupt calls it again, and between the end of the
block and the `try` around it there is no step of Python.
"""

import io
from collections.abc import Callable, Generator
from typing import Any, Generic, TypeVar
from weakref import ref

Value = TypeVar("Value")


class RestoringBlock(io.IOBase, Generic[Value]):
    """A context manager of two functions: one that changes something, and one that restores it.

    The `__exit__` of io.IOBase is written in C and calls `close`, here that of a generator which waits inside
    its `try`. An `__exit__` of Python could be interrupted before it has restored anything.
    """

    def __init__(self, enter: Callable[[], Value], restore: Callable[[], object], owner: Any = None) -> None:
        """Make a block; nothing happens before it is entered.

        Args:
            enter: makes the change; what it returns is the value of `with ... as`.
            restore: takes back what `enter` has done, all or a part of it; harmless where there is nothing.
            owner: gets a weak reference to the generator that the block runs, as `steps`; so it can
                tell when the block is over, whatever was interrupted.
        """
        self._steps = _enter_and_restore(enter, restore)
        if owner is not None:
            owner.steps = ref(self._steps)
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
    enter: Callable[[], Value], restore: Callable[[], object]
) -> Generator[Value, None, None]:
    try:
        try:
            yield enter()
        finally:
            finish(restore)
    finally:  # an interrupt can come before the first line of the call above
        finish(restore)
