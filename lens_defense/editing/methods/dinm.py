"""DINM: the output matrix of one toxic layer is tuned to refuse, and to keep harmless answers as likely.

    loss = -log p(refusal | adversarial prompt) + kl_factor * KL(original || edited) on harmless uses

Wang et al. 2024, "Detoxifying large language models via knowledge editing". In the release the second term is
computed without a gradient, so that it keeps nothing; here it has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.answer_losses import kl_from, teacher_forced_losses
from lens_defense.editing.methods.method import middle_layer
from lens_defense.editing.methods.tuning_method import TuningMethod, TuningStep


@dataclass(frozen=True, slots=True, kw_only=True)
class DINM(TuningMethod):
    """Refusal tuning of one layer with a constraint on general knowledge."""

    steps: int = 100
    """Adam steps; the KL holds the refusal back."""
    kl_factor: float = 10.0
    """The weight of the KL, in nats per token, against the refusal's loss; 0 leaves it out. The paper gives
    the KL the weight 1 and the refusal .1, which Adam cannot tell from these."""

    name: ClassVar[str] = "dinm"
    paper: ClassVar[str] = "Wang et al. 2024"
    equation: ClassVar[str] = "argmin -log p(refusal | prompt) + kl_factor KL(original || edited)"

    def __post_init__(self) -> None:
        TuningMethod.__post_init__(self)
        if self.kl_factor < 0:
            raise ValueError(f"kl_factor must be at least 0, got {self.kl_factor}")

    @property
    def uses_harmless(self) -> bool:
        """Unless they weigh nothing."""
        return self.kl_factor > 0

    def tuned_layers(self, layers: Sequence[int], n_layers: int) -> Sequence[int]:
        """One: of several the middle one, as ROME's."""
        del n_layers
        return [middle_layer(layers)]

    def loss(self, step: TuningStep) -> Float[Tensor, ""]:
        """Nats per token of the refusal, and how far harmless answers have moved."""
        loss = teacher_forced_losses(step.refusals()).mean()
        if self.kl_factor:
            loss = loss + self.kl_factor * kl_from(step.harmless_before(), step.harmless()).mean()
        return loss
