"""DELMAN: one rank-one change per batch of requests, from its mean key and mean residual (Wang et al. 2025).

    Delta = sum over batches of r k^T (lambda C + k k^T)^-1

As in the release, each batch asks for what the ones before it have not written at its key yet.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.memit import least_squares, refuse_weight
from lens_defense.editing.methods.method import Factors


@dataclass(frozen=True, slots=True)
class DELMAN:
    """One rank per batch of requests."""

    batch_size: int = 1
    """Requests per batch; 1 gives every request its own rank."""
    mom2_update_weight: float = 1000.0
    """The weight of C against one key."""

    name: ClassVar[str] = "delman"
    paper: ClassVar[str] = "Wang et al. 2025"
    equation: ClassVar[str] = "sum over batches of r k^T (lambda C + k k^T)^-1"

    def __post_init__(self) -> None:
        refuse_weight(self.mom2_update_weight)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def solve(
        self,
        keys: Float[Tensor, "request d_in"],
        residuals: Float[Tensor, "request d_out"],
        covariance: Float[Tensor, "d_in d_in"],
    ) -> Factors:
        """The factors of the change of one layer."""
        weighted = self.mom2_update_weight * covariance
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for start in range(0, len(keys), self.batch_size):
            key = keys[start : start + self.batch_size].double().mean(0, keepdim=True)
            missing = residuals[start : start + self.batch_size].double().mean(0, keepdim=True)
            for left, right in zip(lefts, rights, strict=True):
                missing = missing - (key @ right.T) @ left.T
            left, right = least_squares(key, missing, weighted)
            lefts.append(left)
            rights.append(right)
        return torch.cat(lefts, 1), torch.cat(rights, 0)

    def rank_of(self, request_index: int) -> int:
        """The rank of the request's batch."""
        return request_index // self.batch_size
