"""Where: a Site is a component of one layer at one role of a prompt. Only this file spells hook names."""

from dataclasses import dataclass
from typing import Literal

from lens_defense.prompts import Role

Component = Literal["residual", "mlp", "attention"]

_OUTPUT = {
    "residual": "blocks.{}.hook_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "attention": "blocks.{}.hook_attn_out",
}

EMBEDDING = "embed.hook_out"
"""The token embeddings, before positions are added [batch, token, d_model]."""


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """An address in a model: which component, which layer, and at which role of the prompt."""

    component: Component
    layer: int
    role: Role
    effect: float | None = None
    """The share of the answer that restoring this site brings back, where a trace measured it."""
    interval: tuple[float, float] | None = None
    """The effect's 95% interval."""

    def __str__(self) -> str:
        seen = "" if self.effect is None else f" ({self.effect:.2f})"
        return f"{self.component} {self.layer} at {self.role}{seen}"


def output_hook(component: Component, layer: int) -> str:
    """The hook of what a component adds to, or holds in, the residual stream [batch, token, d_model]."""
    return _OUTPUT[component].format(layer)


def entry_hook(layer: int) -> str:
    """The hook of the residual stream that enters a block [batch, token, d_model]."""
    return f"blocks.{layer}.hook_in"


def key_hook(layer: int) -> str:
    """The hook of the MLP output matrix's input [batch, token, d_in]."""
    return f"blocks.{layer}.mlp.out.hook_in"


def value_hook(layer: int) -> str:
    """The hook of the MLP output matrix's output [batch, token, d_out]."""
    return f"blocks.{layer}.mlp.out.hook_out"
