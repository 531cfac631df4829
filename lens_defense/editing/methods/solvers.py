"""Pure algebra: from keys, residuals and the keys' second moment to a low-rank change of a matrix.

A change Delta (d_out, d_in) shall add the residual r_i where the key k_i comes in, and little
elsewhere, as C = E[k k^T] measures elsewhere. Factors are returned, so that Delta = left @ right.

No model and no file: float64 throughout.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]
Solver = Callable[
    [Float[Tensor, "request d_in"], Float[Tensor, "request d_out"], Float[Tensor, "d_in d_in"]],
    Factors,
]
"""Keys, residuals and the second moment, already weighed against one key, to the factors."""


def memit(
    keys: Float[Tensor, "request d_in"],
    residuals: Float[Tensor, "request d_out"],
    moment: Float[Tensor, "d_in d_in"],
) -> Factors:
    """Least squares over all requests at once (Meng et al. 2023, equation 14).

    Delta = R^T K (C + K^T K)^-1, with keys and residuals as rows.
    """
    keys, residuals, moment = keys.double(), residuals.double(), moment.double()
    right = torch.linalg.solve(moment + keys.T @ keys, keys.T).T
    return residuals.T.contiguous(), right.contiguous()


def delman(batch: int) -> Solver:
    """DELMAN's release: one rank-one change a batch, from its mean key and mean residual.

    Delta = sum over batches of r k^T (C + k k^T)^-1 (Wang et al. 2025); each batch asks for what the
    ones before it have not written at its key yet.

    Args:
        batch: requests a batch; 1 gives every request its own.
    """

    def solve(
        keys: Float[Tensor, "request d_in"],
        residuals: Float[Tensor, "request d_out"],
        moment: Float[Tensor, "d_in d_in"],
    ) -> Factors:
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        for start in range(0, len(keys), batch):
            key = keys[start : start + batch].double().mean(0, keepdim=True)
            wanted = residuals[start : start + batch].double().mean(0, keepdim=True)
            for left, right in zip(lefts, rights, strict=True):
                wanted = wanted - (key @ right.T) @ left.T
            left, right = memit(key, wanted, moment)
            lefts.append(left)
            rights.append(right)
        return torch.cat(lefts, 1), torch.cat(rights, 0)

    return solve
