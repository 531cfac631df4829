"""A number at every site that was looked at: the base of a Trace, and of maps that are no patching effects.

A SiteMap knows its axes (request, component, layer, position) and what can be said of any such map: means by
role, tables, parts. A Trace fills it with effects of patches; a ScoreMap with shares of something else.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.display import card
from lens_defense.models.fingerprint import Fingerprint
from lens_defense.prompts.prompt import Prompt
from lens_defense.prompts.request import READING_ORDER, Role
from lens_defense.shown_text import shown, shown_names
from lens_defense.sites import Component
from lens_defense.statistics import mean_interval
from lens_defense.storage import load as load_file
from lens_defense.storage import require_shapes
from lens_defense.storage import save as save_file

AnyMap = TypeVar("AnyMap", bound="SiteMap")


@dataclass(frozen=True, slots=True)
class RoleMean:
    """The mean value of a component's layer at a role, with its interval."""

    component: Component
    role: Role
    layer: int
    effect: float
    low: float
    high: float
    n: int
    """Requests that have the role."""


@dataclass(frozen=True, eq=False, repr=False)
class SiteMap:
    """Where the numbers of a map belong. The numbers are NaN at positions that were not looked at."""

    prompts: tuple[Prompt, ...]
    components: tuple[Component, ...]
    layers: tuple[int, ...]
    model: str
    model_layers: int
    fingerprint: Fingerprint
    """Of the model."""

    @cached_property
    def values(self) -> Float[Tensor, "request component layer position sample"]:
        """The number of every cell in every sample."""
        raise NotImplementedError

    @cached_property
    def effects(self) -> Float[Tensor, "request component layer position"]:
        """The number of every cell, mean over samples."""
        return self.values.mean(-1)

    @property
    def subjects(self) -> list[str]:
        """The subject of each request; requests of one subject are related, and count as one draw."""
        return [prompt.request.subject or prompt.request.id for prompt in self.prompts]

    def only(self: AnyMap, component: Component) -> AnyMap:
        """The map of one component."""
        index = self.components.index(component)
        return self._part(slice(None), slice(index, index + 1), self.values.shape[3])

    def __len__(self) -> int:
        """How many requests there are."""
        return len(self.prompts)

    def __getitem__(self: AnyMap, index: int | slice) -> AnyMap:
        """The map of one request, or of some in a row."""
        if isinstance(index, slice):
            index = slice(*index.indices(len(self)))
            width = max((len(prompt.ids) for prompt in self.prompts[index]), default=0)
            if not width:
                raise IndexError(f"there is no request in {index} of {len(self)}")
            return self._part(index, slice(None), width)
        request = range(len(self))[index]
        return self._part(slice(request, request + 1), slice(None), len(self.prompts[request].ids))

    def __sub__(self, other: Any) -> "ScoreMap":
        """What changed: this map less another one of the same requests, components and layers.

        To see what an edit changed, trace the edited model with the answers of before:

            with edit.applied(model):
                after = ld.trace(model, requests, answers=before)
            ld.heatmap(after - before)

        Raises:
            ValueError: the maps differ in their requests, answers, components or layers.
        """
        if not isinstance(other, SiteMap):
            return NotImplemented
        names = ("prompts", "components", "layers", "quantity")
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        if differing:
            hint = "; trace the second model with answers=, the first trace" if "prompts" in differing else ""
            raise ValueError(
                f"the maps have other {', '.join(differing).replace('prompts', 'prompts or answers')}{hint}"
            )
        common: dict[str, Any] = {name: getattr(self, name) for name in SiteMap.__annotations__}
        words = f"change of the {_quantity(self)}"
        return ScoreMap(**common, scores=self.effects - other.effects, quantity=words)

    def plot(self, *sites: Any, **options: Any) -> Any:
        """The map as a figure: `ld.heatmap(self, sites)`."""
        draw = import_module("lens_defense.plotting.heatmap").heatmap  # figures stand above maps
        return draw(self, *sites, **options)

    def _part(self: AnyMap, requests: slice, components: slice, width: int) -> AnyMap:
        """The map of some requests and components, on the first `width` positions."""
        raise NotImplementedError

    def to_dataframe(self) -> pd.DataFrame:
        """One row per cell: request, component, layer, position, token, role, effect, low, high."""
        rows = []
        for cell in self._cells():
            request, component, layer, position = cell
            prompt, samples = self.prompts[request], self.values[cell].numpy()
            rows.append(
                (
                    prompt.request.id,
                    self.components[component],
                    self.layers[layer],
                    position,
                    prompt.token_texts[position],
                    prompt.roles[position],
                    float(samples.mean()),
                    *mean_interval(samples),
                )
            )
        names = ["request", "component", "layer", "position", "token", "role", "effect", "low", "high"]
        return pd.DataFrame(rows, columns=pd.Index(names))

    def role_means(self) -> list[RoleMean]:
        """Means by component, role and layer, in reading order.

        The interval is a 95% bootstrap over subjects from 8 on, below that the range of the requests; for
        one request the same over its samples.
        """
        values, subjects = self.values, self.subjects
        groups: dict[tuple[Component, Role, int], dict[int, list[Tensor]]] = defaultdict(dict)
        for request, component, layer, position in self._cells():
            role = self.prompts[request].roles[position]
            group = groups[self.components[component], role, self.layers[layer]]
            group.setdefault(request, []).append(values[request, component, layer, position])
        means = []
        for address, by_request in groups.items():
            samples = torch.stack([torch.stack(cells).mean(0) for cells in by_request.values()])
            single = len(samples) == 1
            clusters = None if single else [subjects[request] for request in by_request]
            low, high = mean_interval((samples[0] if single else samples.mean(1)).numpy(), clusters)
            component, role, layer = address
            means.append(RoleMean(component, role, layer, float(samples.mean()), low, high, len(samples)))
        order = {role: i for i, role in enumerate(READING_ORDER)}
        return sorted(
            means, key=lambda mean: (self.components.index(mean.component), order[mean.role], mean.layer)
        )

    def by_role(self) -> pd.DataFrame:
        """role_means as a table: component, role, layer, effect, low, high, n."""
        names = ["component", "role", "layer", "effect", "low", "high", "n"]
        return pd.DataFrame([astuple(mean) for mean in self.role_means()], columns=pd.Index(names))

    def _cells(self) -> list[tuple[int, int, int, int]]:
        """Indices of the cells that were looked at."""
        return [tuple(cell) for cell in self.effects.isfinite().nonzero().tolist()]

    def __repr__(self) -> str:
        roles = dict.fromkeys(mean.role for mean in self.role_means())
        return (
            f"{type(self).__name__} of {len(self.prompts)} requests on {shown(self.model)}: "
            f"{shown_names(self.components)}; {len(self.layers)} layers; {', '.join(roles)}; "
            f"{self.values.shape[-1]} samples"
        )

    def _repr_html_(self) -> str:
        facts = {
            "model": self.model,
            "requests": len(self),
            "components": ", ".join(self.components),
            "layers": len(self.layers),
            "samples": self.values.shape[-1],
        }
        strongest = self.by_role().sort_values("effect", ascending=False).round(3)
        return card(f"{type(self).__name__}: {_quantity(self)}", facts, strongest.head(8))


def _quantity(site_map: Any) -> str:
    """What a cell says; every kind of map has it, as a field or a property."""
    return site_map.quantity


@dataclass(frozen=True, eq=False, repr=False)
class ScoreMap(SiteMap):
    """A map of other numbers than effects: the logit lens, DINM's and LED's layers, what an edit changed."""

    scores: Float[Tensor, "request component layer position"]
    quantity: str
    """What a cell says, in words."""

    @cached_property
    def values(self) -> Float[Tensor, "request component layer position sample"]:
        """The score of every cell, as one sample."""
        return self.scores[..., None]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as safetensors with a JSON header, whole or not at all."""
        fields = {name: getattr(self, name) for name in _ScoreHeader.__annotations__}
        return save_file(path, "score map", _ScoreHeader(**fields), {"scores": self.scores})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ScoreMap":
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it holds no score map, or it is damaged.
        """
        header, tensors = load_file(path, "score map", _ScoreHeader)
        cells = (len(header.prompts), len(header.components), len(header.layers), longest(header.prompts))
        require_shapes(path, tensors, {"scores": cells})
        fields: dict[str, Any] = {name: getattr(header, name) for name in _ScoreHeader.__annotations__}
        return cls(scores=tensors["scores"], **fields)

    def _part(self, requests: slice, components: slice, width: int) -> "ScoreMap":
        return replace(
            self,
            prompts=self.prompts[requests],
            components=self.components[components],
            scores=self.scores[requests, components, :, :width],
        )


def longest(prompts: Sequence[Prompt]) -> int:
    """The number of tokens of the longest prompt: positions that a map has."""
    return max((len(prompt.ids) for prompt in prompts), default=0)


@dataclass(frozen=True, slots=True)
class _ScoreHeader:
    """The fields of a ScoreMap that are no tensors, as they are saved."""

    prompts: tuple[Prompt, ...]
    components: tuple[Component, ...]
    layers: tuple[int, ...]
    model: str
    model_layers: int
    fingerprint: Fingerprint
    quantity: str
