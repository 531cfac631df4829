"""Where: a Site is a component of one layer at one role of a prompt. Only this file spells hook names.

Components are named as TransformerLens names its activations: resid_pre, resid_post, mlp_out, attn_out, and
z for the output of an attention head ("z.3" is head 3).
"""

import operator
from dataclasses import dataclass, field
from typing import Any

from lens_defense.arguments import did_you_mean, wrong_argument
from lens_defense.prompts.request import ROLES, Role
from lens_defense.shown_text import shown

Component = str
"""One of COMPONENTS, or a single attention head, as in "z.3"."""
COMPONENTS = ("resid_pre", "resid_post", "mlp_out", "attn_out")
"""The residual stream before and after a block, and what the MLP and attention add to it."""

_HOOKS = {
    "resid_pre": "blocks.{}.hook_in",
    "resid_post": "blocks.{}.hook_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "attn_out": "blocks.{}.hook_attn_out",
    "z": "blocks.{}.attn.hook_z",
}

EMBEDDING_HOOK = "embed.hook_out"
"""The token embeddings, before positions are added [batch, token, d_model]."""


@dataclass(frozen=True, slots=True, order=True, repr=False)
class Site:
    """An address in a model: which component, which layer, and at which role of the prompt.

    Sites are equal, and sort, by their address alone.

    Raises:
        ValueError: there is no such component or role, or no model has such a layer.
        TypeError: the layer is no integer.
    """

    component: Component
    layer: int
    role: Role
    effect: float | None = field(default=None, compare=False)
    """The share of the answer that restoring this site brings back, where a trace measured it."""
    interval: tuple[float, float] | None = field(default=None, compare=False)
    """The effect's 95% interval."""

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS and head_index(self.component) is None:
            raise ValueError(
                f"there is no component {shown(self.component)!r}, as in {_CALL}; there are "
                f"{', '.join(COMPONENTS)} and heads as in 'z.3'{did_you_mean(self.component, COMPONENTS)}"
            )
        if self.role not in ROLES:
            raise ValueError(
                f"there is no role {shown(self.role)!r}, as in {_CALL}; there are {', '.join(ROLES)}"
                f"{did_you_mean(self.role, ROLES)}"
            )
        if isinstance(self.layer, bool) or not hasattr(self.layer, "__index__"):
            raise wrong_argument(_CALL, "layer must be an integer from 0", self.layer)
        if self.layer < 0:
            raise ValueError(f"a layer is counted from 0, got {self.layer}")
        object.__setattr__(self, "layer", operator.index(self.layer))

    def __repr__(self) -> str:
        address = f"Site({self.component!r}, {self.layer}, {self.role!r}"
        measured = "" if self.effect is None else f", effect={self.effect:.3g}"
        return f"{address}{measured})"

    def __str__(self) -> str:
        effect = "" if self.effect is None else f" ({self.effect:.2f})"
        return shown(f"{self.component} {self.layer} at {self.role}{effect}")


def resolve_sites(sites: Any, call: str) -> tuple[Site, ...]:
    """What is handed to a verb where sites are wanted: one, or several.

    Raises:
        TypeError: it is something else; says what to do.
    """
    if isinstance(sites, Site):
        return (sites,)
    if isinstance(sites, list | tuple | set) and all(isinstance(site, Site) for site in sites):
        return tuple(sites)
    hint = f"ld.locate(trace) finds some, and {_CALL} is one"
    raise wrong_argument(call, "sites must be a list of Site", sites, hint)


_CALL = 'ld.Site("mlp_out", 3, "subject_last")'


def head_index(component: Component) -> int | None:
    """The index of a single head; None for what is no head."""
    name, _, index = str(component).partition(".")
    return int(index) if name == "z" and index.isdigit() else None


def component_hook(component: Component, layer: int) -> str:
    """The hook of what a component adds to, or holds in, the residual stream [batch, token, d_model].

    Of a head: the z of all heads of the layer [batch, token, head, d_head].
    """
    return _HOOKS[component.partition(".")[0]].format(layer)


def block_input_hook(layer: int) -> str:
    """The hook of the residual stream that enters a block [batch, token, d_model]."""
    return component_hook("resid_pre", layer)


def key_hook(layer: int) -> str:
    """The hook of the MLP output matrix's input, ROME's key [batch, token, d_in]."""
    return f"blocks.{layer}.mlp.out.hook_in"


def value_hook(layer: int) -> str:
    """The hook of the MLP output matrix's output, ROME's value [batch, token, d_out]."""
    return f"blocks.{layer}.mlp.out.hook_out"
