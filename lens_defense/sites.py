"""Where: a Site is a component of one layer at one role of a prompt. Only this file spells hook names."""

from dataclasses import dataclass

from lens_defense.prompts.prompt import Role

Component = str
"""One of COMPONENTS, or a single attention head, as in "head 3"."""
COMPONENTS = ("residual", "residual_pre", "mlp", "attention")
"""The residual stream after and before a block, and what joins it from the MLP and from attention."""

_OUTPUT = {
    "residual": "blocks.{}.hook_out",
    "residual_pre": "blocks.{}.hook_in",
    "mlp": "blocks.{}.hook_mlp_out",
    "attention": "blocks.{}.hook_attn_out",
    "head": "blocks.{}.attn.hook_z",
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


def head_of(component: Component) -> int | None:
    """The number of a single head; None for what is no head."""
    name, _, number = component.partition(" ")
    return int(number) if name == "head" and number.isdigit() else None


def output_hook(component: Component, layer: int) -> str:
    """The hook of what a component adds to, or holds in, the residual stream [batch, token, d_model].

    Of a head: of what all heads of the layer give before the output matrix [batch, token, head, d_head].
    """
    return _OUTPUT[component.partition(" ")[0]].format(layer)


def entry_hook(layer: int) -> str:
    """The hook of the residual stream that enters a block [batch, token, d_model]."""
    return output_hook("residual_pre", layer)


def key_hook(layer: int) -> str:
    """The hook of the MLP output matrix's input [batch, token, d_in]."""
    return f"blocks.{layer}.mlp.out.hook_in"


def value_hook(layer: int) -> str:
    """The hook of the MLP output matrix's output [batch, token, d_out]."""
    return f"blocks.{layer}.mlp.out.hook_out"
