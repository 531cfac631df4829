"""KE, KnowledgeEditor: a network reads the edit and gates its gradient (De Cao et al. 2021).

    h = tanh(A [LSTM forwards, LSTM backwards] + a)          over the request and its refusal
    alpha, beta (d_out), gamma, epsilon (d_in), eta = a network of h, per layer
    Delta = max_scale * sigmoid(eta) * ( (softmax(alpha) gamma^T) * dL/dW  +  softmax(beta) epsilon^T )

"Editing factual knowledge in language models", section 3.2; * between matrices is element by element. As
dL/dW = sum delta_t u_t^T, the gate is taken into its factors: the change has a rank per token and one more.
It is trained to refuse under a bound on the KL of other texts, by a Lagrange multiplier; the bound is drawn
in while the edits succeed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import LSTM, Linear, ModuleList, Parameter, Sequential, Tanh

from lens_defense.editing.methods.learned_method import EditGradients, LearnedMethod, MatrixShape
from lens_defense.editing.methods.tuning_method import LayerChange

_ENOUGH_SUCCESS, _DRAWN_IN = 0.9, 0.8
"""The share of edits that succeed from which on the bound is drawn in, and by which factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KESettings:
    """The network of KE, and its bound."""

    lstm_size: int = 32
    """Of the LSTM in each direction; the release's is 128."""
    condition_size: int = 64
    """Of h; the release's is 1024."""
    hidden_size: int = 16
    """Between h and the gates; the release's is 128."""
    max_scale: float = 1.0
    """The largest scale of a change."""
    margin_max: float = 1e-2
    """The bound on the KL at the beginning, in nats per token."""
    margin_min: float = 1e-3
    """The least bound."""
    anneal_every: int = 50
    """Steps after which the bound may be drawn in."""
    multiplier_lr: float = 0.1
    """The rate of the Lagrange multiplier."""

    def __post_init__(self) -> None:
        sizes = (self.lstm_size, self.condition_size, self.hidden_size, self.anneal_every)
        if min(sizes) < 1:
            raise ValueError(f"the sizes and anneal_every must be at least 1, got {sizes}")
        if not (0 < self.margin_min <= self.margin_max and self.max_scale > 0 and self.multiplier_lr > 0):
            raise ValueError(
                "margin_min must be above 0 and at most margin_max, and max_scale and multiplier_lr above 0, "
                f"got {self.margin_min}, {self.margin_max}, {self.max_scale} and {self.multiplier_lr}"
            )


class KE(LearnedMethod):
    """Gradients gated by a reading of the edit."""

    name: ClassVar[str] = "ke"
    paper: ClassVar[str] = "De Cao et al. 2021"
    equation: ClassVar[str] = (
        "sigmoid(eta) ((softmax(alpha) gamma^T) * dL/dW + softmax(beta) epsilon^T), all of the edit's text"
    )
    Settings: ClassVar[type[Any]] = KESettings
    settings: KESettings

    def __init__(self, settings: KESettings, layers: Sequence[int], shape: MatrixShape) -> None:
        """Build the network, drawn as torch draws its layers."""
        super().__init__(settings, layers, shape)
        gates = 2 * (shape.d_out + shape.d_in) + 1
        self.lstm = LSTM(shape.d_model, settings.lstm_size, bidirectional=True)
        self.condition = Sequential(Linear(2 * settings.lstm_size, settings.condition_size), Tanh())
        self.gates = ModuleList(
            Sequential(
                Linear(settings.condition_size, settings.hidden_size),
                Tanh(),
                Linear(settings.hidden_size, gates),
            )
            for _ in self.layers
        )
        self.multiplier = Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(settings.margin_max))
        self.register_buffer(
            "successes", torch.zeros(2)
        )  # their sum since the bound was looked at, and steps
        self.margin: Tensor
        self.successes: Tensor

    def changes(self, edits: Sequence[EditGradients]) -> dict[int, LayerChange]:
        """Of each edit the gated factors of its gradient, and a rank of its own."""
        conditions = [self._condition(edit) for edit in edits]
        changes = {}
        for layer, network in zip(self.layers, self.gates, strict=True):
            left, right = [], []
            for edit, condition in zip(edits, conditions, strict=True):
                d_out, d_in = self.shape.d_out, self.shape.d_in
                alpha, beta, gamma, epsilon, eta = network(condition).split([d_out, d_out, d_in, d_in, 1])
                scale = self.settings.max_scale * eta.sigmoid()
                value_gradients = edit.value_gradients[layer].to(alpha.dtype)
                left += [scale * alpha.softmax(0) * value_gradients, scale * beta.softmax(0)[None]]
                right += [gamma * edit.keys[layer].to(gamma.dtype), epsilon[None]]
            changes[layer] = LayerChange(torch.cat(left).T, torch.cat(right))
        return changes

    def _condition(self, edit: EditGradients) -> Float[Tensor, " condition"]:
        """The reading h of an edit: the LSTM's last states of both directions, squeezed."""
        _, (last, _) = self.lstm(edit.text.to(self.multiplier.dtype))
        return self.condition(last.flatten())

    def owners(self, edits: Sequence[EditGradients]) -> dict[int, tuple[int, ...]]:
        """Each token's, and one more."""
        return {
            layer: tuple(edit.owner for edit in edits for _ in range(len(edit.keys[layer]) + 1))
            for layer in self.layers
        }

    def objective(self, edit_loss: Float[Tensor, ""], locality_kl: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """L_edit + multiplier (KL - margin), which the multiplier goes up."""
        return edit_loss + self.multiplier * (locality_kl - self.margin)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The network, which goes down, and the multiplier, which goes up."""
        network = [value for name, value in self.named_parameters() if name != "multiplier"]
        ascent = {"params": [self.multiplier], "lr": self.settings.multiplier_lr, "maximize": True}
        return [{"params": network, "lr": lr}, ascent]

    @torch.no_grad()
    def finish_step(self, succeeded: float) -> None:
        """Keep the multiplier from falling below 0; now and then draw the bound in, if edits succeed."""
        self.multiplier.clamp_(min=0)
        self.successes += self.successes.new_tensor([succeeded, 1.0])
        total, steps = self.successes.tolist()
        if steps >= self.settings.anneal_every:
            if total > _ENOUGH_SUCCESS * steps:
                self.margin.mul_(_DRAWN_IN).clamp_(min=self.settings.margin_min)
            self.successes.zero_()
