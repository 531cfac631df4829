"""AlphaEdit: MEMIT within the null space of what is to be kept (Fang et al. 2025).

    Delta = R^T K P (P K^T K P + l2 c I)^-1,    P = U U^T

with keys K and residuals R as rows. U are the eigenvectors of C whose eigenvalues count as zero: the
smallest that together hold no more than `nullspace_share` of tr C = E|k|^2. So of the squared norm of the
keys that C knows the change sees that share at most, and what lies within the other eigenvectors it maps to
0. c is the mean eigenvalue of C. Both settings are relative to C, where the release's are absolute.

The keys of earlier edits that are kept are rows of the least squares with the residual 0, as the paper's K_p:

    Delta = R^T K P (P K_p^T K_p P + P K^T K P + l2 c I)^-1

and so are harmless uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.memit import least_squares
from lens_defense.editing.methods.method import Factors, KeyGroup


@dataclass(frozen=True, slots=True)
class AlphaEdit:
    """Least squares over all requests, in the directions that C hardly has."""

    nullspace_share: float = 0.05
    """The share of tr C that the directions which are written into hold together; the release has a bound of
    2e-2 for each eigenvalue instead, on the scale of its own keys."""
    l2: float = 100.0
    """The weight of the change's squared norm, in units of C's mean eigenvalue; the release's is 10, and the
    paper's 1, in units of its own keys."""

    name: ClassVar[str] = "alphaedit"
    paper: ClassVar[str] = "Fang et al. 2025"
    equation: ClassVar[str] = "R^T K P (P K^T K P + l2 c I)^-1, P onto the null space of C"

    def __post_init__(self) -> None:
        if not 0 < self.nullspace_share < 1:
            raise ValueError(f"nullspace_share must be above 0 and below 1, got {self.nullspace_share}")
        if not self.l2 > 0:
            raise ValueError(f"l2 must be above 0, got {self.l2}")

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of one layer; every group has a rank of its own.

        Raises:
            ValueError: every direction of C holds more than `nullspace_share`.
        """
        basis = self._null_space(covariance)
        projected = [replace(group, keys=group.keys.double() @ basis, first_key=None) for group in groups]
        ridge = self.l2 * covariance.diagonal().double().mean()
        left, right = least_squares(projected, ridge * torch.eye(basis.shape[1]).to(basis))
        return Factors(left, right @ basis.T, tuple(frozenset([group.owner]) for group in groups))

    def _null_space(self, covariance: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_in free"]:
        """An orthonormal basis of the directions that are written into."""
        eigenvalues, vectors = torch.linalg.eigh(covariance.double())
        shares = eigenvalues.clamp(min=0).cumsum(0) / eigenvalues.clamp(min=0).sum()
        basis = vectors[:, shares <= self.nullspace_share]
        if not basis.shape[1]:
            raise ValueError(
                f"every direction of C holds more than the share {self.nullspace_share:g} of it, so there is "
                f"no null space to write into; give AlphaEdit a nullspace_share above {float(shares[0]):.2g}"
            )
        return basis
