"""What a learned method is: a network that turns the gradients of an edit into a change, in one step.

Where other methods solve (method.py) or go down a loss (tuning_method.py), these read the gradient of the
refusal's loss once. At the output matrix of a layer it is a sum of outer products over the tokens t of the
request and its refusal,

    dL/dW = sum over t of  delta_t u_t^T        u: keys,  delta: gradients of the values W u

and the network, trained on many edits of one model (tuning/train_editor.py), rewrites its factors. It is that
model's, and its layers' alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.tuning_method import LayerChange
from lens_defense.models.fingerprint import Fingerprint


@dataclass(frozen=True, slots=True, eq=False)
class EditGradients:
    """The gradients of one edit: of the loss of one request's refusal, in nats per token."""

    owner: int
    """The request's index."""
    text: Float[Tensor, "text d_model"]
    """The model's own embeddings of the request's prompt and the refusal."""
    keys: Mapping[int, Float[Tensor, "_ d_in"]]
    """By layer, of each token whose value has a gradient: u."""
    value_gradients: Mapping[int, Float[Tensor, "_ d_out"]]
    """By layer, of the same tokens: delta."""


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """Of the output matrices that a learned method changes, which are all alike."""

    d_out: int
    d_in: int
    d_model: int
    """The width of the model's embeddings."""


@dataclass(frozen=True, slots=True)
class EditorOrigin:
    """What a learned method was trained on."""

    model: str
    fingerprint: Fingerprint
    """Of the whole model, without edits."""
    requests: int
    """How many it was trained to edit."""
    steps: int


class LearnedMethod(torch.nn.Module, ABC):
    """A network with its settings, for some layers of one model.

    A class for a new one has a dataclass `Settings` of plain values, and is built from an instance of it.
    """

    name: ClassVar[str]
    """What the method is called in files and figures."""
    paper: ClassVar[str]
    equation: ClassVar[str]
    Settings: ClassVar[type[Any]]

    origin: EditorOrigin | None = None
    """What it was trained on; None of an untrained one."""

    def __init__(self, settings: Any, layers: Sequence[int], shape: MatrixShape) -> None:
        """Build an untrained network.

        Args:
            settings: an instance of the class's `Settings`.
            layers: whose output matrices are changed, lowest first.
            shape: of these matrices.
        """
        super().__init__()
        self.settings, self.layers, self.shape = settings, tuple(layers), shape

    @abstractmethod
    def changes(self, edits: Sequence[EditGradients]) -> dict[int, LayerChange]:
        """The change of each layer after several edits: the sum of what each of them makes alone.

        Args:
            edits: at least one; the ranks of a change are in their order.
        """

    @abstractmethod
    def owners(self, edits: Sequence[EditGradients]) -> dict[int, tuple[int, ...]]:
        """By layer, the request of each rank of `changes`."""

    @abstractmethod
    def objective(self, edit_loss: Float[Tensor, ""], locality_kl: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """What training goes down.

        Args:
            edit_loss: nats per token of the refusal after the edit, in words that the edit has not seen.
            locality_kl: KL(original || edited) on what is to be answered as before, in nats per token.
        """

    def observe(self, edits: Sequence[EditGradients]) -> None:
        """Look at some edits before the training; here nothing is to be learnt from that."""
        del edits

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """What is trained, as groups for torch.optim.Adam: here everything, by the same rate."""
        return [{"params": list(self.parameters()), "lr": lr}]

    @torch.no_grad()
    def finish_step(self, succeeded: float) -> None:
        """Do what is to be done after a step of the training; here nothing.

        Args:
            succeeded: of the refusals after the edit, the share that greedy decoding would give.
        """
        del succeeded
