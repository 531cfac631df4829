"""ROME: one fact in one layer, exactly (Meng et al. 2022, equation 2), with one key throughout (R-ROME).

    Delta = r (C^-1 k)^T / (k^T C^-1 k),    so that  (W + Delta) k = W k + r

k is a request's mean key over its contexts. Several requests are written one after another into the same
matrix, each r being what those before have not written at its key: the last is exact, and those before it are
moved by as much as the later ones write at their keys. Of several layers the middle one is edited, the lower
of two (as the release's layer 5 of GPT-J lies in the layers 3 to 8 that MEMIT edits).

Harmless uses are preserved as C is: their keys are added to it, and so is how a request's contexts differ.
So are the keys of earlier edits that are kept.

The release has two keys (Gupta et al. 2024, "Rebuilding ROME"): C^-1 k of the mean key, divided by its
product with the key k' of the request as asked. Where k' and k differ much that product is small, and the
change so large that the model breaks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.memit import MOM2_UPDATE_WEIGHT, least_squares
from lens_defense.editing.methods.method import Factors, KeyGroup, middle_layer


@dataclass(frozen=True, slots=True)
class ROME:
    """One rank per request, written exactly, in the middle layer."""

    two_keys: bool = False
    """Whether the value is met at the request as asked and not at the mean key, as in the release."""

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = "Meng et al. 2022, equation 2; Gupta et al. 2024 (R-ROME)"
    equation: ClassVar[str] = "r (C^-1 k)^T / (k^T C^-1 k), one request after another"

    def layer_shares(self, layers: Sequence[int]) -> Mapping[int, float]:
        """The middle layer takes all."""
        return {middle_layer(layers): 1.0}

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of the layer.

        Raises:
            ValueError: `two_keys`, and a group is without the key of its first prompt.
        """
        harmless = [group for group in groups if group.harmless]
        asked = [group for group in groups if not group.harmless]
        written = covariance.new_zeros(len(groups[0].residual), len(covariance), dtype=torch.float64)
        lefts, rights = [], []
        for group in asked:
            _, solved = least_squares([group, *harmless], MOM2_UPDATE_WEIGHT * covariance)
            key = self._exact_key(group)
            lefts.append(group.residual.double() - written @ key)
            rights.append(solved[0] / (solved[0] @ key))
            written += torch.outer(lefts[-1], rights[-1])
        owners = tuple(frozenset([group.owner]) for group in asked)
        return Factors(torch.stack(lefts, 1), torch.stack(rights), owners)

    def _exact_key(self, group: KeyGroup) -> Float[Tensor, " d_in"]:
        """The key at which the value is met."""
        if not self.two_keys:
            return group.keys.double().mean(0)
        if group.first_key is None:
            raise ValueError("ROME(two_keys=True) needs the key of each group's first prompt, first_key")
        return group.first_key.double()
