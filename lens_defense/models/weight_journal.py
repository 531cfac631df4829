"""The journal of a model's weights: what stands in them, and what has to be put back before anything else.

It is written before the weights are, and its state is one value that one assignment replaces. So wherever an
interrupt hits, the state says what the weights are to be, and whether they have still to be put back for it.
Ledgers keep no list of their own: they read this one.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge


@dataclass(slots=True, eq=False)
class Maker:
    """Who makes changes: a ledger, or a `with` block."""

    thread: int | None = None
    """The thread of a `with` block; a ledger can be used from any."""
    steps: ref[Any] | None = None
    """The generator that a `with` block runs; a ledger has none."""

    @property
    def left(self) -> bool:
        """Whether this is a `with` block that is over, so that its changes must not stand."""
        steps = self.steps and self.steps()
        return self.steps is not None and (steps is None or steps.gi_frame is None)


@dataclass(frozen=True, slots=True, eq=False)
class WeightChange:
    """A change that stands in a model."""

    saved_weights: Mapping[int, Tensor]
    """By layer, the output matrix before the change."""
    fingerprint: str
    """Of the same layers, after the change."""
    maker: Maker
    edit: Any = None
    """What a ledger applied; None for the change of a `with` block."""


@dataclass(frozen=True, slots=True, eq=False)
class UndoneEdit:
    """An edit that a ledger took back and can make again."""

    maker: Maker
    edit: Any
    original_hashes: Mapping[int, str]
    """By layer, of the output matrix without any change: which weights it may be made on again."""


@dataclass(frozen=True, slots=True, eq=False)
class JournalState:
    """What the weights of a model are to be."""

    standing: tuple[WeightChange, ...] = ()
    """The changes that stand, oldest first."""
    undone: tuple[UndoneEdit, ...] = ()
    """The edits that can be made again; the next one is the last."""
    unfinished: Mapping[int, Tensor] | None = None
    """By layer, the matrices that have to be put back before the weights are what this state says."""


class WeightJournal:
    """The state of one model, and the lock under which it and the weights are changed."""

    def __init__(self) -> None:
        """Begin with a model as it was loaded."""
        self.state = JournalState()
        self.lock = threading.RLock()


_JOURNALS: WeakKeyDictionary[Module, WeightJournal] = WeakKeyDictionary()
"""By the module that holds the weights, so that two bridges over one share its journal; deleted ones go."""


def journal_of(model: TransformerBridge) -> WeightJournal:
    """The journal of a model's weights."""
    return _JOURNALS.setdefault(model.original_model, WeightJournal())
