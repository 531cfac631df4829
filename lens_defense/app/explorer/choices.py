"""What a person chooses on the page: how to trace, what to plan, which cells.

A page may send anything, so each function here takes what came, and gives choices that can be used or one
sentence that says why they cannot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.explorer.map_values import ROLES_OF_SITES, editable
from lens_defense.editing.methods import METHODS
from lens_defense.patching import metrics
from lens_defense.patching.metrics import Metric
from lens_defense.patching.patch_grid import resolve_components
from lens_defense.patching.trace_settings import Direction, TraceSettings
from lens_defense.prompts.request import Role
from lens_defense.sites import Component, Site

FIRST_TRACED = 3
"""So many of the requests are traced, unless told otherwise."""
METRICS: Mapping[str, Metric] = {
    "answer_logprob": metrics.answer_logprob,
    "answer_probability": metrics.answer_probability,
    "kl_to_clean": metrics.kl_to_clean,
}
STRONGEST = 2.0
"""The greatest factor of a plan's change that the page offers."""


@dataclass(frozen=True, slots=True)
class TraceChoices:
    """How the page traces."""

    components: Sequence[Component] = ("resid_post", "mlp_out", "attn_out")
    direction: Direction = "denoising"
    metric: str = "answer_logprob"
    number: int = FIRST_TRACED
    """So many of the requests, the first ones: a map takes as many times as long."""

    def changed(self, changes: Mapping[str, Any], model: TransformerBridge, requests: int) -> "TraceChoices":
        """These choices with the changes that a page asks for.

        Args:
            changes: by the names of the fields above.
            model: the model that is to be traced.
            requests: how many there are.

        Raises:
            ValueError: there is no such choice.
        """
        values = {**asdict(self), **_known(changes, TraceChoices)}
        if not isinstance(values["metric"], str) or values["metric"] not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}")
        components = values["components"]
        if not isinstance(components, tuple) or not all(isinstance(name, str) for name in components):
            raise ValueError("a list of components is wanted")
        number = values["number"]
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError("a number of requests is wanted, at least 1")
        if values["direction"] not in get_args(Direction):
            raise ValueError(f"direction must be one of {', '.join(get_args(Direction))}")
        components = resolve_components(model, TraceSettings(components).components)
        return TraceChoices(components, values["direction"], values["metric"], min(number, requests))


@dataclass(frozen=True, slots=True)
class PlanChoices:
    """What the page plans at the chosen cells."""

    method: str = "memit"
    strength: float = 1.0
    requests: tuple[int, ...] = ()
    """Indices of those that are edited."""

    def changed(self, changes: Mapping[str, Any], requests: int) -> "PlanChoices":
        """These choices with the changes that a page asks for.

        Args:
            changes: by the names of the fields above.
            requests: how many there are.

        Raises:
            ValueError: there is no such choice.
        """
        values = {**asdict(self), **_known(changes, PlanChoices)}
        strength, method = values["strength"], values["method"]
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}")
        if isinstance(strength, bool) or not isinstance(strength, int | float):
            raise ValueError("strength must be a number")
        if not 0 < strength <= STRONGEST:
            raise ValueError(f"strength must be above 0 and at most {STRONGEST:g}")
        chosen, known = values["requests"], range(requests)
        if not isinstance(chosen, tuple) or not all(type(i) is int and i in known for i in chosen):
            raise ValueError("a list of requests is wanted, by their indices")
        return PlanChoices(method, float(strength), chosen)


def chosen_sites(cells: Any, how: Any, chosen: Sequence[Site], layers: int) -> list[Site]:
    """The sites that are chosen after a page has asked for cells.

    Args:
        cells: a list, each with the fields component, layer and role.
        how: "set" chooses these alone, "add" and "toggle" change what is chosen.
        chosen: what is chosen now.
        layers: of the model.

    Raises:
        ValueError: a cell is none, or none that an edit can address.
    """
    if not isinstance(cells, list) or not all(isinstance(cell, Mapping) for cell in cells):
        raise ValueError("cells are wanted, each with a component, a layer and a role")
    if how not in ("set", "add", "toggle"):
        raise ValueError("cells are set, added or toggled")
    sites = [_site(cell, layers) for cell in cells]
    if how == "add":
        return [*chosen, *sites]
    if how == "toggle":
        return [site for site in chosen if site not in sites] + [site for site in sites if site not in chosen]
    return sites


def _site(cell: Mapping[str, Any], layers: int) -> Site:
    component, layer, role = (cell.get(name) for name in ("component", "layer", "role"))
    if not (isinstance(component, str) and isinstance(role, str)):
        raise ValueError("a cell has a component, a layer and a role")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ValueError("a layer is a whole number")
    if not editable(component):
        raise ValueError("attention outputs cannot be edited; choose the residual stream or MLP outputs")
    if layer >= layers or role not in ROLES_OF_SITES:
        raise ValueError(f"the model has the layers 0 to {layers - 1}")
    address: Role = role  # type: ignore[assignment]
    return Site(component, layer, address)


def _known(changes: Mapping[str, Any], choices: type) -> dict[str, Any]:
    """The changes of a page, if there are such choices; lists become tuples."""
    fields = choices.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = [name for name in changes if name not in fields]
    if unknown:
        raise ValueError(f"there is nothing like {unknown[0]!r} to choose")
    lists = {name: value for name, value in changes.items() if isinstance(value, list)}
    return {**changes, **{name: tuple(value) for name, value in lists.items()}}
