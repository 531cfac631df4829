"""Trace: what restoring each state of a model brought back, as a value.

Causal tracing (Meng et al. 2022): spoil the subject, restore one state of the clean run, see how
much of the answer comes back. The effect of a cell is

    mean over samples of (patched - corrupted) / (clean - corrupted)

so 0 means that the state carries nothing of what the corruption took, and 1 all of it. Noising turns it
round: a spoiled state in the clean run, and the share of the damage that it does. A model
without a known answer is measured by its own: the log probability of its greedy answer.
"""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from lens_defense.prompts.prompt import (
    READING_ORDER,
    Prompt,
    Role,
    request_from_json,
)
from lens_defense.sites import Component
from lens_defense.statistics import mean_interval
from lens_defense.storage import atomic_write, open_safetensors

Direction = Literal["denoising", "noising"]


@dataclass(frozen=True, slots=True)
class RoleMean:
    """The mean effect of a component's layer at a role."""

    component: Component
    role: Role
    layer: int
    effect: float
    low: float
    high: float
    n: int
    """Requests that have the role."""


class VerifiedCell(NamedTuple):
    """An estimated cell that was measured after all."""

    cell: tuple[int, int, int, int]
    """Request, component, layer and position, each an index of the map's axis."""
    estimated: float
    """The effect by the gradient."""
    measured: float
    """The effect by a run of its own, which stands in the map."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Trace:
    """What restoring each state brought back. Positions that were not traced are NaN."""

    prompts: tuple[Prompt, ...]
    components: tuple[Component, ...]
    layers: tuple[int, ...]
    patched: Float[Tensor, "request component layer position sample"]
    """The metric with one state restored."""
    clean: Float[Tensor, " request"]
    """The metric of the clean run."""
    corrupted: Float[Tensor, "request sample"]
    """The metric of the spoiled run."""
    answers: tuple[str, ...]
    """What the metric reads, as text, a dozen words at most."""
    window: int
    """Layers restored at once, for MLP and attention outputs."""
    seed: int
    model: str
    model_layers: int
    fingerprint: str
    direction: Direction = "denoising"
    severed: str = ""
    """The component whose later outputs were held, where one was."""
    together: bool = False
    """Whether all tokens were patched at once, in one cell a layer, which stands at the last of them."""
    exact: bool = True
    """Whether every cell was measured by a run of its own, and not estimated by a gradient."""
    corruption: str = ""
    """How the subject was spoiled, in words."""
    metric: str = ""
    """The name of what was read."""
    measure: str = ""
    """What the cells say, in words, where they are no effects of patches (lenses.py)."""
    verified: tuple[VerifiedCell, ...] = ()
    """The estimated cells that were measured after all."""

    @property
    def sample_effects(self) -> Float[Tensor, "request component layer position sample"]:
        """The effect of every cell in every sample, without a unit."""
        spoiled = self.corrupted[:, None, None, None]
        clean = self.clean[:, None, None, None, None]
        low, high = (spoiled, clean) if self.direction == "denoising" else (clean, spoiled)
        return (self.patched - low) / (high - low)

    @property
    def effects(self) -> Float[Tensor, "request component layer position"]:
        """The effect of every cell, mean over samples."""
        return self.sample_effects.mean(-1)

    @property
    def subjects(self) -> list[str]:
        """The subject of each request; requests of one subject are related, and count as one draw."""
        return [met.request.subject or met.request.id for met in self.prompts]

    def __repr__(self) -> str:
        roles = dict.fromkeys(mean.role for mean in self.role_effects())
        return (
            f"Trace of {len(self.prompts)} requests on {self.model}: {', '.join(self.components)}; "
            f"{len(self.layers)} layers; {', '.join(roles)}; {self.corrupted.shape[1]} samples"
        )

    def __getitem__(self, index: int) -> "Trace":
        """The trace of one request."""
        at = range(len(self.prompts))[index]
        part = slice(at, at + 1)
        return replace(
            self,
            verified=_moved(self.verified, 0, {at: 0}),
            prompts=self.prompts[part],
            answers=self.answers[part],
            patched=self.patched[part, :, :, : len(self.prompts[at].ids)],
            clean=self.clean[part],
            corrupted=self.corrupted[part],
        )

    def only(self, component: Component) -> "Trace":
        """The trace of one component."""
        c = self.components.index(component)
        return replace(
            self,
            components=(component,),
            patched=self.patched[:, c : c + 1],
            verified=_moved(self.verified, 1, {c: 0}),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a cell: request, component, layer, position, word, role, effect, low, high."""
        rows = []
        for cell in self._cells():
            r, c, j, t = cell
            met, values = self.prompts[r], self.sample_effects[cell].numpy()
            where = (met.request.id, self.components[c], self.layers[j], t)
            interval = mean_interval(values, seed=self.seed)
            rows.append((*where, met.words[t], met.roles[t], float(values.mean()), *interval))
        names = ["request", "component", "layer", "position", "word", "role", "effect", "low", "high"]
        return pd.DataFrame(rows, columns=pd.Index(names))

    def role_effects(self) -> list[RoleMean]:
        """Means by component, role and layer, in reading order.

        The interval is a 95% bootstrap over subjects from 8 on, below that the range of the requests; for
        one request the same over its noise samples.
        """
        effects, subjects = self.sample_effects, self.subjects
        each: dict[tuple[Component, Role, int], dict[int, list[Tensor]]] = defaultdict(dict)
        for r, c, j, t in self._cells():
            key = (self.components[c], self.prompts[r].roles[t], self.layers[j])
            each[key].setdefault(r, []).append(effects[r, c, j, t])
        means = []
        for (component, role, layer), by_request in each.items():
            samples = torch.stack([torch.stack(cells).mean(0) for cells in by_request.values()])
            one = len(samples) == 1
            values = samples[0] if one else samples.mean(1)
            clusters = None if one else [subjects[r] for r in by_request]
            low, high = mean_interval(values.numpy(), clusters, seed=self.seed)
            effect = float(samples.mean())
            means.append(RoleMean(component, role, layer, effect, low, high, len(samples)))
        order = {role: i for i, role in enumerate(READING_ORDER)}
        return sorted(means, key=lambda m: (self.components.index(m.component), order[m.role], m.layer))

    def by_role(self) -> pd.DataFrame:
        """role_effects as a table: component, role, layer, effect, low, high, n."""
        return pd.DataFrame(
            [astuple(mean) for mean in self.role_effects()],
            columns=pd.Index(["component", "role", "layer", "effect", "low", "high", "n"]),
        )

    def _cells(self) -> list[tuple[int, int, int, int]]:
        """Indices of the cells that were traced."""
        return [tuple(cell) for cell in self.effects.isfinite().nonzero().tolist()]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as safetensors with a JSON header, whole or not at all."""
        header = {name: getattr(self, name) for name in _HEADER}
        header["prompts"] = [_prompt_to_json(met) for met in self.prompts]
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        with atomic_write(path) as file:
            save_file(tensors, file, metadata={"trace": json.dumps(header)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it holds no trace.
        """
        with open_safetensors(path, "Trace.save") as file:
            header = json.loads((file.metadata() or {}).get("trace", "null"))
            if header is None:
                raise ValueError(f"{path} holds no trace; give a file that Trace.save wrote")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        prompts = tuple(_prompt_from_json(fields) for fields in header.pop("prompts"))
        header["verified"] = tuple(
            VerifiedCell(tuple(cell), *both) for cell, *both in header.get("verified", ())
        )
        lists = {name: tuple(header.pop(name)) for name in ("components", "layers", "answers")}
        return cls(prompts=prompts, **lists, **tensors, **header)


def join_traces(traces: Sequence[Trace]) -> Trace:
    """Traces of different requests as one.

    Raises:
        ValueError: there are none, or they differ in more than their requests.
    """
    if not traces:
        raise ValueError("there is no trace to join")
    first = traces[0]
    shared = [name for name in _HEADER if name not in ("answers", "verified")]
    told = {name: {str(getattr(one, name)) for one in traces} for name in shared}
    for name in ("corruption", "metric"):
        told[name].discard("")  # of files written before these were kept
    differing = [name for name, values in told.items() if len(values) > 1]
    differing += ["samples"] if len({one.corrupted.shape[1] for one in traces}) > 1 else []
    if differing:
        raise ValueError(f"these traces differ in {', '.join(differing)}; join what was measured alike")
    width = max(one.patched.shape[3] for one in traces)
    patched = [
        torch.nn.functional.pad(one.patched, (0, 0, 0, width - one.patched.shape[3]), value=float("nan"))
        for one in traces
    ]
    starts = accumulate((len(one.prompts) for one in traces), initial=0)
    return replace(
        first,
        prompts=tuple(met for one in traces for met in one.prompts),
        answers=tuple(answer for one in traces for answer in one.answers),
        verified=tuple(
            met
            for one, start in zip(traces, starts, strict=False)
            for met in _moved(one.verified, 0, {r: start + r for r in range(len(one.prompts))})
        ),
        patched=torch.cat(patched),
        clean=torch.cat([one.clean for one in traces]),
        corrupted=torch.cat([one.corrupted for one in traces]),
    )


_TENSORS = ("patched", "clean", "corrupted")
_HEADER = ("components", "layers", "answers", "window", "seed", "model", "model_layers", "fingerprint")
_HEADER += ("direction", "severed", "together", "exact", "corruption", "metric", "measure", "verified")


def _moved(verified: Sequence[VerifiedCell], axis: int, places: dict[int, int]) -> tuple[VerifiedCell, ...]:
    """Those whose index of an axis has a new place, there."""
    moved = []
    for one in verified:
        if one.cell[axis] in places:
            cell = list(one.cell)
            cell[axis] = places[cell[axis]]
            moved.append(one._replace(cell=tuple(cell)))
    return tuple(moved)


def _prompt_to_json(met: Prompt) -> dict[str, Any]:
    fields = {name: getattr(met, name) for name in Prompt.__slots__}
    return {**fields, "request": met.request.to_json()}


def _prompt_from_json(fields: dict[str, Any]) -> Prompt:
    lists = {name: tuple(fields[name]) for name in ("ids", "words", "roles", "answer")}
    return Prompt(
        request=request_from_json(fields["request"]),
        subjects=tuple((start, stop) for start, stop in fields["subjects"]),
        chat=fields["chat"],
        **lists,
    )
