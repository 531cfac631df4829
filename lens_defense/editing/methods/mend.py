"""MEND: a small network rewrites the factors of an edit's gradient (Mitchell et al. 2022, section 3).

    z   = [ (u - mean_u) / std_u,  (delta - mean_delta) / std_delta ]           per layer and token
    h   = z + relu(s1 * (U1 V1 z + b1) + o1)
    [u~, delta~] = h + s2 * (U2 V2 h + b2) + o2
    Delta = -alpha sum over tokens of  delta~ u~^T

"Fast model editing at scale". U, V and b are shared by the layers; means, standard deviations, s, o and the
rate alpha are each layer's own. U begins at 0, so that the untrained network is the identity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from lens_defense.editing.methods.learned_method import EditGradients, LearnedMethod, MatrixShape
from lens_defense.editing.methods.tuning_method import LayerChange


@dataclass(frozen=True, slots=True, kw_only=True)
class MENDSettings:
    """The network of MEND, and the weight of its losses."""

    rank: int = 32
    """Of U V; the paper's is 1920, of matrices that are wider."""
    edit_lr: float = 1e-4
    """What alpha begins at."""
    edit_weight: float = 0.1
    """The weight of the edit's loss against the KL, c_edit in the paper."""
    rate_speed: float = 10.0
    """How much faster than all else the logarithm of alpha is trained."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not (self.edit_lr > 0 and self.edit_weight > 0 and self.rate_speed > 0):
            raise ValueError(
                "rank must be at least 1, and edit_lr, edit_weight and rate_speed above 0, got "
                f"{self.rank}, {self.edit_lr}, {self.edit_weight} and {self.rate_speed}"
            )


class MEND(LearnedMethod):
    """Gradients decomposed by token, and rewritten."""

    name: ClassVar[str] = "mend"
    paper: ClassVar[str] = "Mitchell et al. 2022"
    equation: ClassVar[str] = "-alpha sum over tokens of delta~ u~^T, [u~, delta~] = g(u, delta)"
    Settings: ClassVar[type[Any]] = MENDSettings
    settings: MENDSettings

    def __init__(self, settings: MENDSettings, layers: Sequence[int], shape: MatrixShape) -> None:
        """Build the network: the identity on normed factors; before `observe` the norms do nothing."""
        super().__init__(settings, layers, shape)
        width, n = shape.d_in + shape.d_out, len(self.layers)
        self.up = Parameter(torch.zeros(2, width, settings.rank))  # U
        self.down = Parameter(torch.randn(2, settings.rank, width) / math.sqrt(width))  # V
        self.bias = Parameter(torch.zeros(2, width))
        self.scale = Parameter(torch.ones(n, 2, width))  # s
        self.offset = Parameter(torch.zeros(n, 2, width))  # o
        self.log_rate = Parameter(torch.full((n,), math.log(settings.edit_lr)))
        self.register_buffer("mean", torch.zeros(n, width))
        self.register_buffer("std", torch.ones(n, width))
        self.mean: Tensor
        self.std: Tensor

    @torch.no_grad()
    def observe(self, edits: Sequence[EditGradients]) -> None:
        """Take means and standard deviations of keys and value gradients over the tokens of some edits."""
        for j, layer in enumerate(self.layers):
            factors = _factors(edits, layer).to(self.mean.dtype)
            self.mean[j] = factors.mean(0)
            self.std[j] = factors.std(0).clamp(min=_LEAST_STD)

    def changes(self, edits: Sequence[EditGradients]) -> dict[int, LayerChange]:
        """-alpha delta~ times u~, a rank per token."""
        changes = {}
        for j, layer in enumerate(self.layers):
            factors = (_factors(edits, layer).to(self.mean.dtype) - self.mean[j]) / self.std[j]
            keys, value_gradients = self._rewritten(factors, j).split([self.shape.d_in, self.shape.d_out], 1)
            changes[layer] = LayerChange(-self.log_rate[j].exp() * value_gradients.T, keys)
        return changes

    def _rewritten(self, factors: Float[Tensor, "token width"], j: int) -> Float[Tensor, "token width"]:
        """The normed factors of the j-th layer, rewritten: g of the paper."""

        def linear(i: int, state: Float[Tensor, "token width"]) -> Float[Tensor, "token width"]:
            product = state @ self.down[i].T @ self.up[i].T + self.bias[i]
            return self.scale[j, i] * product + self.offset[j, i]

        state = factors + linear(0, factors).clamp(min=0)  # a clamp has a gradient at 0, where relu has none
        return state + linear(1, state)

    def owners(self, edits: Sequence[EditGradients]) -> dict[int, tuple[int, ...]]:
        """Each token's."""
        return {layer: tuple(edit.owner for edit in edits for _ in edit.keys[layer]) for layer in self.layers}

    def objective(self, edit_loss: Float[Tensor, ""], locality_kl: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """c_edit L_edit + L_locality."""
        return self.settings.edit_weight * edit_loss + locality_kl

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The rates alpha, and all else."""
        others = [value for name, value in self.named_parameters() if name != "log_rate"]
        return [
            {"params": others, "lr": lr},
            {"params": [self.log_rate], "lr": self.settings.rate_speed * lr},
        ]


def _factors(edits: Sequence[EditGradients], layer: int) -> Float[Tensor, "token width"]:
    """Keys and value gradients of all tokens side by side."""
    return torch.cat(
        [torch.cat([edit.keys[layer], edit.value_gradients[layer]], dim=1) for edit in edits], dim=0
    )


_LEAST_STD = 1e-7
"""A width that never differs is not divided by 0."""
