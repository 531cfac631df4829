"""What a method that tunes is: a loss, whose gradient changes MLP output matrices, and bounds of the change.

Where other methods solve for a change (method.py), these go down a loss by Adam (tuning/tuning.py). Yours is
a dataclass that inherits from TuningMethod and has a name, a paper, an equation and a `loss`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.answer_losses import AnswerLogits
from lens_defense.editing.methods.method import Factors


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """The change of one matrix while it is tuned: `left` itself, or scale * left @ right."""

    left: Float[Tensor, "d_out columns"]
    right: Float[Tensor, "columns d_in"] | None = None
    scale: float = 1.0

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What is tuned."""
        return (self.left,) if self.right is None else (self.left, self.right)

    def written(self, keys: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the change adds where keys come in."""
        rows = keys if self.right is None else self.scale * (keys @ self.right.T)
        return rows @ self.left.T

    def factors(self, owners: frozenset[int]) -> Factors:
        """The change as factors, of float32 on the CPU, every rank of all owners.

        Adam moves every element of a whole matrix, which leaves no low rank to be found. So a whole matrix is
        kept as it is, beside an identity on its shorter side: no larger than its singular vectors would be,
        and without their rounding.
        """
        left, right = self.left.detach().float().cpu(), self.right
        if right is not None:
            left, right = self.scale * left, right.detach().float().cpu()
        elif left.shape[0] <= left.shape[1]:
            left, right = torch.eye(left.shape[0]), left
        else:
            right = torch.eye(left.shape[1])
        return Factors(left.contiguous(), right.contiguous(), (owners,) * len(right))


@runtime_checkable
class TuningStep(Protocol):
    """What a loss may ask for: a batch of requests with refusals, and one of harmless uses with answers.

    Each is run when it is first asked for, with the changes as they are. Gradients reach the changes alone.
    """

    @property
    def changes(self) -> Mapping[int, LayerChange]:
        """By layer."""
        ...

    def refusals(self, decoded_layers: int = 1) -> AnswerLogits:
        """The requests' contexts, each with the refusal that it shall meet.

        Args:
            decoded_layers: how many layers, from the last one down, are read by the final norm and the
                unembedding; the logits are their mean. 1: the model's own.
        """
        ...

    def harmless(self) -> AnswerLogits:
        """Harmless uses with the unchanged model's answers, and general texts with the corpus's."""
        ...

    def harmless_before(self) -> Float[Tensor, "row token vocab"]:
        """The unchanged model's logits of the same batch; no gradient."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningMethod(ABC):
    """A loss, the settings of its descent, and what may be changed."""

    steps: int = 50
    """Adam steps."""
    lr: float = 5e-4
    """Adam's learning rate."""
    batch_size: int = 4
    """Contexts, and as many harmless uses where they are used, that one step sees."""
    enough: float = 0.01
    """A loss, in nats, below which a step is not taken, as in ROME's release; 0 takes all."""

    name: ClassVar[str]
    """What the method is called in files and figures."""
    paper: ClassVar[str]
    equation: ClassVar[str]

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0 or self.enough < 0:
            raise ValueError(
                "steps and batch_size must be at least 1, lr above 0 and enough at least 0, got "
                f"{self.steps}, {self.batch_size}, {self.lr} and {self.enough}"
            )

    @property
    def uses_harmless(self) -> bool:
        """Whether the loss asks for harmless uses."""
        return False

    def tuned_layers(self, layers: Sequence[int], n_layers: int) -> Sequence[int]:
        """The layers whose output matrices are changed, lowest first: those of the sites.

        Args:
            layers: those of the sites, lowest first.
            n_layers: how many the model has.
        """
        del n_layers
        return layers

    def start(self, weight: Float[Tensor, "d_out d_in"], generator: torch.Generator) -> LayerChange:
        """The change of a layer before the first step: a whole matrix of zeros."""
        del generator
        return LayerChange(torch.zeros_like(weight))

    @abstractmethod
    def loss(self, step: TuningStep) -> Float[Tensor, ""]:
        """What a step goes down, in nats."""

    def project_(self, change: LayerChange) -> None:
        """Move a change back into what is allowed, after each step; here everything is."""
        del change
