"""MEMIT: least squares over all requests at once (Meng et al. 2023, equation 14).

    Delta = R^T K (lambda C + K^T K)^-1

with keys K and residuals R as rows, and lambda = mom2_update_weight. A group of several keys is a row for
each, all with the group's residual and together with its weight; a group of one key is MEMIT's own row.

The keys K_1 ... K_s of earlier edits that are kept are rows with the residual 0:

    Delta_t = R_t^T K_t (lambda C + sum over s <= t of K_s^T K_s)^-1

which is recursive least squares. With one layer, one key per request and R_t what the edits before have left
of the targets, the changes one by one sum up to the change of all at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.method import Factors, KeyGroup

MOM2_UPDATE_WEIGHT = 1000.0
"""The weight of C against one key, unless a method is given another."""


@dataclass(frozen=True, slots=True)
class MEMIT:
    """One least-squares problem over all requests."""

    mom2_update_weight: float = MOM2_UPDATE_WEIGHT
    """The weight of C against one key, MEMIT's lambda."""

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, equation 14"
    equation: ClassVar[str] = "R^T K (lambda C + K^T K)^-1"

    def __post_init__(self) -> None:
        refuse_weight(self.mom2_update_weight)

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of one layer; every group has a rank of its own."""
        left, right = least_squares(groups, self.mom2_update_weight * covariance)
        return Factors(left, right, tuple(frozenset([group.owner]) for group in groups))


def least_squares(
    groups: Sequence[KeyGroup], weighted_covariance: Float[Tensor, "d_in d_in"]
) -> tuple[Float[Tensor, "d_out group"], Float[Tensor, "group d_in"]]:
    """R^T K (C + K^T K)^-1 in float64, for a covariance that is weighted already.

    The rows of a group of n keys k with weight w are sqrt(w / n) k, with the residual sqrt(w / n) r: so R^T K
    is the sum over groups of w r (mean k)^T, and the rank is the number of groups.
    """
    residuals = torch.stack([group.residual for group in groups]).double()
    sums = torch.stack([group.weight * group.keys.double().mean(0) for group in groups])
    rows = torch.cat([group.rows for group in groups])
    moments = weighted_covariance.double() + rows.T @ rows
    solution, failed = torch.linalg.solve_ex(moments, sums.T)
    if failed:  # a neuron that no text wakes, as OPT has them
        moments.diagonal().add_(_RIDGE * moments.diagonal().mean())
        solution = torch.linalg.solve(moments, sums.T)
    right = solution.T
    return residuals.T.contiguous(), right.contiguous()


_RIDGE = 1e-6
"""Added to the diagonal of a singular matrix, as a share of its mean."""


def refuse_weight(weight: float) -> None:
    """One sentence for a weight of C with which the least squares have no solution.

    Raises:
        ValueError: it is not above 0.
    """
    if not weight > 0:
        raise ValueError(f"mom2_update_weight must be above 0, got {weight}")
