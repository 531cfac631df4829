"""LoRA: a low-rank adapter on the MLP outputs, trained to refuse and to answer harmless uses as before.

    Delta = (alpha / r) B A
    loss  = -log p(refusal | context) - keep_weight * log p(own answer | harmless use)

Hu et al. 2021, "LoRA: Low-rank adaptation of large language models". A and B start as in `peft`: A uniform by
Kaiming's rule, B zero, so that the change starts at 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.answer_losses import teacher_forced_losses
from lens_defense.editing.methods.tuning_method import LayerChange, TuningMethod, TuningStep


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA(TuningMethod):
    """Refusal tuning of an adapter: the baseline that everybody would try first."""

    steps: int = 100
    """Adam steps; a refusal and harmless answers together take more than a refusal alone."""
    lr: float = 1e-3
    """Adam's learning rate."""
    r: int = 8
    """The rank of the change in each layer."""
    lora_alpha: float = 16.0
    """The change is lora_alpha / r times B A."""
    keep_weight: float = 1.0
    """The weight of harmless uses against refusals; 0 leaves them out."""
    all_layers: bool = False
    """Whether every layer of the model gets an adapter, and not only those of the sites."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021"
    equation: ClassVar[str] = "(alpha / r) B A, argmin -log p(refusal) - keep_weight log p(harmless answer)"

    def __post_init__(self) -> None:
        TuningMethod.__post_init__(self)
        if self.r < 1 or not self.lora_alpha > 0 or self.keep_weight < 0:
            raise ValueError(
                "r must be at least 1, lora_alpha above 0 and keep_weight at least 0, got "
                f"{self.r}, {self.lora_alpha} and {self.keep_weight}"
            )

    @property
    def uses_harmless(self) -> bool:
        """Unless they weigh nothing."""
        return self.keep_weight > 0

    def tuned_layers(self, layers: Sequence[int], n_layers: int) -> Sequence[int]:
        """Those of the sites, or all."""
        return range(n_layers) if self.all_layers else layers

    def start(self, weight: Float[Tensor, "d_out d_in"], generator: torch.Generator) -> LayerChange:
        """B of zeros, A uniform within 1 / sqrt(d_in)."""
        a = torch.empty(self.r, weight.shape[1], dtype=weight.dtype)
        torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = weight.new_zeros(weight.shape[0], self.r)
        return LayerChange(b, a.to(weight.device), self.lora_alpha / self.r)

    def loss(self, step: TuningStep) -> Float[Tensor, ""]:
        """Nats per token of the refusal, and of the harmless answers."""
        loss = teacher_forced_losses(step.refusals()).mean()
        if self.keep_weight:
            loss = loss + self.keep_weight * teacher_forced_losses(step.harmless()).mean()
        return loss
