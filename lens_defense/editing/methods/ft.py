"""FT: the output matrices are fine-tuned until the refusal is likely, whatever else that does.

    Delta = argmin  mean over contexts of  -log p(refusal | context)  +  l2/2 |Delta|^2
    FT-L:           the same under  |Delta_ij| <= epsilon

Zhu et al. 2020, "Modifying memories in transformer models", bound every element of the change by epsilon,
here `norm_constraint`: after each step what exceeds it is cut off. `l2` draws the weights back to where they
began (L2-SP, Li et al. 2018, "Explicit inductive bias for transfer learning"). Plain FT has neither.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.answer_losses import first_place_losses, teacher_forced_losses
from lens_defense.editing.methods.tuning_method import LayerChange, TuningMethod, TuningStep

_LOSSES = {"teacher_forced": teacher_forced_losses, "published": first_place_losses}


@dataclass(frozen=True, slots=True, kw_only=True)
class FT(TuningMethod):
    """Fine-tuning of the layers' output matrices on the refusal alone."""

    norm_constraint: float | None = None
    """The largest change of an element, epsilon; None leaves it free."""
    l2: float = 0.0
    """The weight of the change's squared norm over all layers, halved; 0 leaves it out."""
    loss_form: Literal["teacher_forced", "published"] = "teacher_forced"
    """How a refusal of several tokens is scored: every token behind those before it, or, as in ROME's
    release, every token as the first one."""

    name: ClassVar[str] = "ft"
    paper: ClassVar[str] = "Zhu et al. 2020; Meng et al. 2022 (the baseline of ROME)"
    equation: ClassVar[str] = "argmin -log p(refusal | context) + l2/2 |Delta|^2"

    def __post_init__(self) -> None:
        TuningMethod.__post_init__(self)
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise ValueError(f"norm_constraint must be above 0 or None, got {self.norm_constraint}")
        if self.l2 < 0:
            raise ValueError(f"l2 must be at least 0, got {self.l2}")
        if self.loss_form not in _LOSSES:
            raise ValueError(f"loss_form must be one of {', '.join(_LOSSES)}, got {self.loss_form!r}")

    def loss(self, step: TuningStep) -> Float[Tensor, ""]:
        """Nats per token of the refusal, and the weight of the change."""
        loss = _LOSSES[self.loss_form](step.refusals()).mean()
        if self.l2:
            squares = [change.left.square().sum() for change in step.changes.values()]
            loss = loss + self.l2 / 2 * torch.stack(squares).sum()
        return loss

    def project_(self, change: LayerChange) -> None:
        """Cut every element off at `norm_constraint`."""
        if self.norm_constraint is not None:
            change.left.clamp_(-self.norm_constraint, self.norm_constraint)


@dataclass(frozen=True, slots=True, kw_only=True)
class FTL(FT):
    """FT with a bound on every element, as it stands in ROME's comparison."""

    norm_constraint: float | None = 5e-4
    """The largest change of an element, epsilon."""

    name: ClassVar[str] = "ft-l"
    paper: ClassVar[str] = "Zhu et al. 2020"
    equation: ClassVar[str] = "argmin -log p(refusal | context), |Delta_ij| <= epsilon"
