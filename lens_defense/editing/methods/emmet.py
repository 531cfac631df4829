"""EMMET: ROME for many requests at once, each exact (Gupta et al. 2024, "A unified framework").

    minimise tr(Delta C Delta^T)  so that  Delta K^T = R^T:     Delta = R^T (K C^-1 K^T)^-1 K C^-1

with mean keys K and residuals R as rows. MEMIT tends to this as its lambda tends to 0, and with one request
it is ROME.

With harmless uses it is MEMIT's least squares, over all contexts and uses, under the same constraint: in the
mean of a request's contexts its residual arrives exactly, whatever the uses say, and they get what is left.
The keys of earlier edits that are kept are such rows too. C weighs there as MEMIT's does by default. Keys
that are equal, or dependent, share what is asked of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.memit import MOM2_UPDATE_WEIGHT, least_squares
from lens_defense.editing.methods.method import Factors, KeyGroup

_SAME_KEYS = 1e-10
"""The share of the largest singular value of K C^-1 K^T below which keys count as dependent: what rounding
leaves of a difference of keys in single precision."""


@dataclass(frozen=True, slots=True)
class EMMET:
    """Equality-constrained least squares over all requests."""

    name: ClassVar[str] = "emmet"
    paper: ClassVar[str] = "Gupta et al. 2024"
    equation: ClassVar[str] = "R^T (K C^-1 K^T)^-1 K C^-1"

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of one layer; every group has a rank of its own."""
        left, right = least_squares(groups, MOM2_UPDATE_WEIGHT * covariance)
        exact = [i for i, group in enumerate(groups) if not group.harmless]
        keys = torch.stack([groups[i].keys.double().mean(0) for i in exact])
        constrained = torch.linalg.pinv(right[exact] @ keys.T, rtol=_SAME_KEYS) @ right[exact]
        right = right - right @ keys.T @ constrained  # what the uses' ranks write at the exact keys
        right[exact] = constrained
        return Factors(left, right, tuple(frozenset([group.owner]) for group in groups))
