"""Trace: what patching each state of a model did to the answer, as a value.

Causal tracing (Meng et al. 2022): corrupt the subject, restore one state of the clean run, see how much of
the answer comes back. The effect of a cell is

    mean over samples of (patched - corrupted) / (clean - corrupted)

so 0 means that the state carries nothing of what the corruption took, and 1 all of it. Noising turns it
round: a corrupted state in the clean run, and the share of the damage that it does.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from lens_defense.models.fingerprint import Fingerprint
from lens_defense.patching.trace_settings import Direction, TraceSettings
from lens_defense.prompts.prompt import Prompt
from lens_defense.sites import Component
from lens_defense.storage import load as load_file
from lens_defense.storage import require_shapes
from lens_defense.storage import save as save_file
from lens_defense.tracing.site_map import SiteMap, longest


class VerifiedCell(NamedTuple):
    """An estimated cell that was measured after all."""

    cell: tuple[int, int, int, int]
    """Request, component, layer and position, each an index of the map's axis."""
    estimated: float
    """The effect by the gradient."""
    measured: float
    """The effect by a run of its own, which stands in the map."""


@dataclass(frozen=True, eq=False, repr=False)
class Trace(SiteMap):
    """What patching each state did. Positions that were not traced are NaN."""

    patched: Float[Tensor, "request component layer position sample"]
    """The metric with one state patched."""
    clean: Float[Tensor, " request"]
    """The metric of the clean run."""
    corrupted: Float[Tensor, "request sample"]
    """The metric of the corrupted run."""
    settings: TraceSettings
    corruption: str
    """How the subject was corrupted, in words."""
    metric: str
    """The name of what was read."""
    answers: tuple[str, ...]
    """What the metric reads, as text, a dozen words at most."""
    chat_arguments: Mapping[str, Any] = field(default_factory=dict)
    """What was bound into the chat template: a system prompt ("system"), arguments of the template."""
    estimates: Float[Tensor, "request component layer position"] | None = None
    """Effects by the gradient of the cells that were measured after all, NaN elsewhere."""

    @cached_property
    def values(self) -> Float[Tensor, "request component layer position sample"]:
        """The effect of every cell in every sample, without a unit."""
        clean = self.clean[:, None, None, None, None]
        corrupted = self.corrupted[:, None, None, None]
        return effect_of_patch(self.patched, clean, corrupted, self.settings.direction)

    def on_scale_of(self, before: "Trace") -> "Trace":
        """The same patches as shares of the difference that the subject made in another trace.

        After an edit the subject makes another difference to the answer of before, often nearly none, so that
        a share of it says little. On the scale of before, a cell of 0 brings nothing back any more:

            (patched - corrupted) / (clean before - corrupted before)

        Args:
            before: of the same requests with the same answers, by the same corruption and samples.

        Raises:
            ValueError: it is of other requests, answers, samples, direction or metric.
        """
        names = ("prompts", "direction", "metric", "samples")
        mine, theirs = (
            (trace.prompts, trace.settings.direction, trace.metric, trace.corrupted.shape[1])
            for trace in (self, before)
        )
        differing = [name for name, one, other in zip(names, mine, theirs, strict=True) if one != other]
        if differing:
            raise ValueError(
                f"the traces have other {', '.join(differing).replace('prompts', 'prompts or answers')}; "
                "trace the second model with answers=, the first trace, and the same settings"
            )
        if self.settings.direction == "denoising":
            shift = (before.corrupted - self.corrupted)[:, None, None, None]
        else:
            shift = (before.clean - self.clean)[:, None, None, None, None]
        return replace(self, patched=self.patched + shift, clean=before.clean, corrupted=before.corrupted)

    @property
    def quantity(self) -> str:
        """What a cell says, in words."""
        return "effect of patching one state"

    @property
    def verified(self) -> tuple[VerifiedCell, ...]:
        """The estimated cells that were measured after all."""
        if self.estimates is None:
            return ()
        cells = [tuple(cell) for cell in self.estimates.isfinite().nonzero().tolist()]
        return tuple(VerifiedCell(c, float(self.estimates[c]), float(self.effects[c])) for c in cells)

    def _part(self, requests: slice, components: slice, width: int) -> "Trace":
        cells = (requests, components, slice(None), slice(width))
        return replace(
            self,
            prompts=self.prompts[requests],
            components=self.components[components],
            patched=self.patched[cells],
            clean=self.clean[requests],
            corrupted=self.corrupted[requests],
            answers=self.answers[requests],
            estimates=None if self.estimates is None else self.estimates[cells],
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as safetensors with a JSON header, whole or not at all."""
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        fields = {name: getattr(self, name) for name in _TraceHeader.__annotations__}
        return save_file(path, "trace", _TraceHeader(**fields), tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, it holds no trace, or it is damaged.
        """
        header, tensors = load_file(path, "trace", _TraceHeader)
        cells = (len(header.prompts), len(header.components), len(header.layers), longest(header.prompts))
        shapes = {
            "patched": (*cells, "sample"),
            "clean": cells[:1],
            "corrupted": (*cells[:1], "sample"),
            "estimates": cells,
        }
        if "estimates" not in tensors:
            del shapes["estimates"]
        require_shapes(path, tensors, shapes)
        plain = {name: getattr(header, name) for name in _TraceHeader.__annotations__}
        fields: dict[str, Any] = {**plain, **tensors}
        return cls(**fields)


_TENSORS = ("patched", "clean", "corrupted", "estimates")


@dataclass(frozen=True, slots=True)
class _TraceHeader:
    """The fields of a Trace that are no tensors, as they are saved."""

    prompts: tuple[Prompt, ...]
    components: tuple[Component, ...]
    layers: tuple[int, ...]
    model: str
    model_layers: int
    fingerprint: Fingerprint
    settings: TraceSettings
    corruption: str
    metric: str
    answers: tuple[str, ...]
    chat_arguments: Mapping[str, Any] = field(default_factory=dict)


def effect_of_patch(patched: Tensor, clean: Tensor, corrupted: Tensor, direction: Direction) -> Tensor:
    """The share of the difference between the clean and the corrupted run that a patch makes.

    Denoising: (patched - corrupted) / (clean - corrupted). Noising: (patched - clean) / (corrupted - clean).
    """
    base, donor = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    return (patched - base) / (donor - base)


def join_traces(traces: Sequence[Trace]) -> Trace:
    """Traces of different requests as one.

    Raises:
        ValueError: there are none, or they differ in more than their requests.
    """
    if not traces:
        raise ValueError("there is no trace to join")
    first = traces[0]
    shared = [name for name in _TraceHeader.__annotations__ if name not in ("prompts", "answers")]
    differing = [name for name in shared if len({repr(getattr(trace, name)) for trace in traces}) > 1] + (
        ["samples"] if len({trace.corrupted.shape[1] for trace in traces}) > 1 else []
    )
    if differing:
        raise ValueError(f"these traces differ in {', '.join(differing)}; join what was measured alike")
    width = max(trace.patched.shape[3] for trace in traces)

    def widened(tensor: Tensor) -> Tensor:
        """With NaN at the positions that a shorter prompt lacks."""
        missing = width - tensor.shape[3]
        return pad(tensor, (*((0, 0) * (tensor.dim() - 4)), 0, missing), value=float("nan"))

    estimates = [trace.estimates for trace in traces]
    return replace(
        first,
        prompts=tuple(prompt for trace in traces for prompt in trace.prompts),
        answers=tuple(answer for trace in traces for answer in trace.answers),
        patched=torch.cat([widened(trace.patched) for trace in traces]),
        clean=torch.cat([trace.clean for trace in traces]),
        corrupted=torch.cat([trace.corrupted for trace in traces]),
        estimates=None
        if any(tensor is None for tensor in estimates)
        else torch.cat([widened(tensor) for tensor in estimates if tensor is not None]),
    )
