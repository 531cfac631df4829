"""Any other defense, to be checked as an edit is: a `with` block in which a model has it."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.prompts.request import Request


@dataclass(frozen=True, slots=True, eq=False)
class Defense:
    """What changes a model for a while, and what it is about: what `ld.check` asks of an Edit as well.

    A rival is whatever can be written as a block: steering (`ld.steered`), an adapter that is switched on, a
    filter in a hook.
    """

    method: str
    """What it is called in reports and figures."""
    applied: Callable[[TransformerBridge], AbstractContextManager[object]]
    """From a model to a `with` block in which it has the defense, and after which it is as before."""
    requests: Sequence[Request] = ()
    """What shall be refused. None: it is not about some subjects, and a check asks about the suite's own."""
    texts: Collection[str] = ()
    """The conversations that it has seen; a check leaves them out."""
    names: Collection[str] = ()
    """The other spellings and names of its subjects that it has seen."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that it is about."""
        return tuple(item.subject or "" for item in self.requests)
