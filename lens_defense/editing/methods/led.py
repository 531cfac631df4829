"""LED: the layers that refusals need are tuned until the upper layers, not the last alone, decode to one.

    o = mean over target layers t of  unembed(norm(h_t)),    loss = -log softmax(o)[refusal]

Zhao et al. 2024, "Defending large language models against jailbreak attacks via layer-specific editing". The
paper tunes safety layers (ld.lenses.safety_layers) and some others, and takes as targets the layers whose
states decode to a harmful answer; these are the uppermost.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.answer_losses import teacher_forced_losses
from lens_defense.editing.methods.tuning_method import TuningMethod, TuningStep


@dataclass(frozen=True, slots=True, kw_only=True)
class LED(TuningMethod):
    """Fine-tuning of safety layers against what the upper layers decode to."""

    target_layers: int = 3
    """How many layers, from the last one down, shall decode to the refusal; 1 is FT."""

    name: ClassVar[str] = "led"
    paper: ClassVar[str] = "Zhao et al. 2024"
    equation: ClassVar[str] = "argmin -log softmax(mean over target layers of decode(h))[refusal]"

    def __post_init__(self) -> None:
        TuningMethod.__post_init__(self)
        if self.target_layers < 1:
            raise ValueError(f"target_layers must be at least 1, got {self.target_layers}")

    def loss(self, step: TuningStep) -> Float[Tensor, ""]:
        """Nats per token of the refusal under the mean of what the target layers decode to."""
        return teacher_forced_losses(step.refusals(self.target_layers)).mean()
