"""PMET: MEMIT's least squares with a square-root spread over layers (Li et al. 2024).

    Delta = R^T K (lambda C + K^T K)^-1,    R = what is still missing / sqrt(layers that are left)

So lower layers write more than in MEMIT, and the last one still makes up for the rest.

The paper fits two vectors at the highest layer, one added to what attention writes and one to what the MLP
writes, and gives the MLPs only the second. That is not done here: a value is one vector, added to the
residual stream behind both (target_value.py), and what is still missing of it is measured there. The keys of
earlier edits are kept as in MEMIT.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.memit import MEMIT, MOM2_UPDATE_WEIGHT, refuse_weight
from lens_defense.editing.methods.method import Factors, KeyGroup


@dataclass(frozen=True, slots=True)
class PMET:
    """MEMIT with a square-root spread."""

    mom2_update_weight: float = MOM2_UPDATE_WEIGHT
    """The weight of C against one key."""

    name: ClassVar[str] = "pmet"
    paper: ClassVar[str] = "Li et al. 2024"
    equation: ClassVar[str] = "R^T K (lambda C + K^T K)^-1, R over the root of the layers left"

    def __post_init__(self) -> None:
        refuse_weight(self.mom2_update_weight)

    def layer_shares(self, layers: Sequence[int]) -> Mapping[int, float]:
        """One over the square root of the number of layers that are left."""
        return {layer: (len(layers) - j) ** -0.5 for j, layer in enumerate(layers)}

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of one layer: MEMIT's."""
        return MEMIT(self.mom2_update_weight).solve(groups, covariance)
