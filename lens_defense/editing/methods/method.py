"""What an editing method is: how keys and residuals become a low-rank change of a matrix.

A change Delta (d_out, d_in) shall add the residual r where the keys of a group come in, and little elsewhere.
The covariance C = E[k k^T] says what comes in elsewhere. A method returns factors: Delta = left @ right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

EARLIER = -1
"""The owner of the keys of earlier edits, which belong to no request of this one."""


@dataclass(frozen=True, slots=True, eq=False)
class KeyGroup:
    """Keys that belong together: of one request under one name, or of the harmless uses of its subject.

    The keys of earlier edits that are to be kept are one more group, for a method as harmless uses are: at
    them nothing new is to be written.
    """

    owner: int
    """The request's index, or EARLIER."""
    keys: Float[Tensor, "context d_in"]
    residual: Float[Tensor, " d_out"]
    """What the change shall add, mean over the contexts; of harmless uses, what undoes the leak so far."""
    weight: float = 1.0
    """Of the whole group, in the least squares."""
    harmless: bool = False
    first_key: Float[Tensor, " d_in"] | None = None
    """The key in the first of its prompts, by default the request as asked."""

    @property
    def rows(self) -> Float[Tensor, "context d_in"]:
        """The group's rows of the least squares, in float64: of n keys k with the weight w, sqrt(w / n) k."""
        return (self.weight / len(self.keys)) ** 0.5 * self.keys.double()


class Factors(NamedTuple):
    """The change of one layer, left @ right, in float64."""

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]
    owners: tuple[frozenset[int], ...]
    """Of each rank, the indices of the requests that it belongs to."""


def refuse_unfit_factors(layer: int, left: Any, right: Any) -> None:
    """One sentence for factors that are no change of a matrix.

    Raises:
        ValueError: they are no tensors of two dimensions and of real numbers, have no values, or their ranks
            differ.
    """
    for name, factor in (("left", left), ("right", right)):
        if not isinstance(factor, Tensor):
            kind = f"of the type {type(factor).__name__}"
        elif factor.is_meta:
            kind = "on the meta device, without values"
        elif factor.layout != torch.strided or factor.dim() != 2:
            kind = f"a tensor of the shape {list(factor.shape)} ({factor.layout})"
        elif not factor.is_floating_point():
            kind = f"of {str(factor.dtype).removeprefix('torch.')} numbers"
        else:
            continue
        raise ValueError(
            f"the {name} factor of layer {layer} is {kind}; give a dense matrix of real numbers (floats)"
        )
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"the factors of layer {layer} have different ranks: left is {list(left.shape)} and right is "
            f"{list(right.shape)}; give left as [d_out, rank] and right as [rank, d_in]"
        )


@runtime_checkable
class EditingMethod(Protocol):
    """Any object with these. The fields of a dataclass are saved with the edit, as the method's settings."""

    name: ClassVar[str]
    """What the method is called in files and figures."""
    paper: ClassVar[str]
    equation: ClassVar[str]

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of one layer."""
        ...


@runtime_checkable
class SharesLayers(Protocol):
    """A method that spreads a value otherwise than MEMIT: by other shares, or over fewer layers."""

    def layer_shares(self, layers: Sequence[int]) -> Mapping[int, float]:
        """Of what is still missing of a value, the share that each layer takes.

        Args:
            layers: those of the sites, lowest first.

        Returns:
            By layer; one that is left out stays as it is.
        """
        ...


def middle_layer(layers: Sequence[int]) -> int:
    """The middle one of the sites' layers, which are lowest first; of two the lower."""
    return layers[(len(layers) - 1) // 2]
