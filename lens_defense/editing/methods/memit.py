"""MEMIT: least squares over all requests at once (Meng et al. 2023, equation 14).

    Delta = R^T K (lambda C + K^T K)^-1

with keys K and residuals R as rows, and lambda = mom2_update_weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.method import Factors


@dataclass(frozen=True, slots=True)
class MEMIT:
    """One least-squares problem over all requests."""

    mom2_update_weight: float = 1000.0
    """The weight of C against one key, MEMIT's lambda."""

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, equation 14"
    equation: ClassVar[str] = "R^T K (lambda C + K^T K)^-1"

    def __post_init__(self) -> None:
        refuse_weight(self.mom2_update_weight)

    def solve(
        self,
        keys: Float[Tensor, "request d_in"],
        residuals: Float[Tensor, "request d_out"],
        covariance: Float[Tensor, "d_in d_in"],
    ) -> Factors:
        """The factors of the change of one layer."""
        return least_squares(keys, residuals, self.mom2_update_weight * covariance)

    def rank_of(self, request_index: int) -> int:
        """Every request has a rank of its own."""
        return request_index


def least_squares(
    keys: Float[Tensor, "request d_in"],
    residuals: Float[Tensor, "request d_out"],
    weighted_covariance: Float[Tensor, "d_in d_in"],
) -> Factors:
    """R^T K (C + K^T K)^-1 in float64, for a covariance that is weighted already."""
    keys, residuals, covariance = keys.double(), residuals.double(), weighted_covariance.double()
    right = torch.linalg.solve(covariance + keys.T @ keys, keys.T).T
    return residuals.T.contiguous(), right.contiguous()


def refuse_weight(weight: float) -> None:
    """One sentence for a weight of C with which the least squares have no solution.

    Raises:
        ValueError: it is not above 0.
    """
    if not weight > 0:
        raise ValueError(f"mom2_update_weight must be above 0, got {weight}")
