"""What an editing method is: how keys and residuals of requests become a low-rank change of a matrix.

A change Delta (d_out, d_in) shall add the residual r_i where the key k_i comes in, and little elsewhere. The
covariance C = E[k k^T] says what comes in elsewhere. A method returns factors: Delta = left @ right.
"""

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]


@runtime_checkable
class EditingMethod(Protocol):
    """Any object with these. The fields of a dataclass are saved with the edit, as the method's settings."""

    name: ClassVar[str]
    """What the method is called in files and figures."""
    paper: ClassVar[str]
    equation: ClassVar[str]

    def solve(
        self,
        keys: Float[Tensor, "request d_in"],
        residuals: Float[Tensor, "request d_out"],
        covariance: Float[Tensor, "d_in d_in"],
    ) -> Factors:
        """The factors (left, right) of the change of one layer, in float64."""
        ...

    def rank_of(self, request_index: int) -> int:
        """Which rank of the change belongs to a request."""
        ...
