"""Edit: a low-rank change of MLP output matrices, planned but not made.

Where the sites' role is, the keys of the requests are made to write what starts a refusal. The value
is fitted at the highest of the sites' layers; then, layer by layer, each takes its share of what is
still missing (MEMIT's spread). `edit` leaves every weight as it was: the change is made by
`Edit.applied` for a while, or by a Ledger for good.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.files import whole
from lens_defense.forecasts import Forecast, forecast_of
from lens_defense.models import cache_folder
from lens_defense.moments import Corpus, second_moments
from lens_defense.patches import device_of
from lens_defense.prompts import (
    Prompt,
    Request,
    Role,
    answer_ids,
    for_planning,
    prompt,
    request_from_json,
)
from lens_defense.readers import bundled_rows
from lens_defense.sites import Site
from lens_defense.solvers import delman, memit
from lens_defense.spreads import position_of, spread
from lens_defense.values import Row, Schedule, fit_values
from lens_defense.weights import change_, fingerprint, output_matrix, refuse_uneditable, unchange_

REFUSAL = "I'm sorry, I can't assist with that."
"""The answer that an edit plants, unless a request brings its own (DELMAN's)."""
METHODS = ("memit", "delman")
Contexts = Callable[[Request], Sequence[Request]]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Edit:
    """A plan: what would be added to which matrices, from what, and what is to be expected of it."""

    layers: tuple[int, ...]
    left: Mapping[int, Float[Tensor, "d_out rank"]]
    right: Mapping[int, Float[Tensor, "rank d_in"]]
    """The change of a layer is left @ right."""
    role: Role
    method: str
    settings: Mapping[str, Any]
    requests: tuple[Request, ...]
    contexts: tuple[tuple[str, ...], ...]
    """For each request, the texts whose keys and values were used."""
    losses: tuple[float, ...]
    """For each request, what is left of the fit: nats a token of the refusal."""
    relative_change: Mapping[int, float]
    """For each layer, the norm of the change over the norm of the matrix."""
    forecast: Forecast
    model: str
    fingerprint: str
    """Of the layers' matrices that the plan was made on."""

    @property
    def rank(self) -> int:
        """The rank of the change in each layer."""
        return len(self.right[self.layers[0]])

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that the edit is about."""
        return tuple(item.subject or "" for item in self.requests)

    def deltas(self) -> dict[int, Float[Tensor, "d_out d_in"]]:
        """The change of each layer, in float64."""
        return {layer: self.left[layer].double() @ self.right[layer].double() for layer in self.layers}

    def refuse_other(self, model: TransformerBridge) -> None:
        """One sentence where the model's weights are not those that the edit was planned on.

        Raises:
            ValueError: so it is.
        """
        if fingerprint(model, self.layers) != self.fingerprint:
            raise ValueError(
                f"this edit was planned on other weights of {self.model} than this model has now; "
                "undo what stands in the way, load the model it was planned on, or plan it again with ld.edit"
            )

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[TransformerBridge]:
        """Make the change for the length of a `with` block; afterwards no bit differs.

        Raises:
            ValueError: the model's weights are not those that the edit was planned on.
        """
        change = change_(model, self.deltas(), expected=self.fingerprint)
        try:
            yield model
        finally:
            unchange_(model, change)

    def summary(self) -> pd.DataFrame:
        """One row a layer: rank, relative norm of the change."""
        rows = [(layer, self.rank, self.relative_change[layer]) for layer in self.layers]
        return pd.DataFrame(rows, columns=pd.Index(["layer", "rank", "relative change"]))

    def __repr__(self) -> str:
        return (
            f"Edit ({self.method}) of {self.model}, not applied: layers {', '.join(map(str, self.layers))} "
            f"at {self.role}, rank {self.rank}, relative change {max(self.relative_change.values()):.3f} at "
            f"most\n{self.forecast}"
        )

    def _repr_html_(self) -> str:
        tables = self.summary().round(4), self.forecast.to_dataframe().round(3)
        return "".join(table.to_html(index=False) for table in tables)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as safetensors with a JSON header, whole or not at all."""
        tensors = {f"left.{layer}": self.left[layer] for layer in self.layers}
        tensors |= {f"right.{layer}": self.right[layer] for layer in self.layers}
        header = {name: getattr(self, name) for name in _HEADER}
        header["requests"] = [item.to_json() for item in self.requests]
        header["forecast"] = self.forecast.to_json()
        with whole(path) as file:
            save_file(tensors, file, metadata={"edit": json.dumps(header)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TransformerBridge | None = None) -> "Edit":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: the model it is meant for, to be refused at once where it is another one.

        Raises:
            ValueError: the file holds no edit, or it was planned on other weights than the model's.
        """
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("edit", "null"))
            if header is None:
                raise ValueError(f"{path} holds no edit; give a file that Edit.save wrote")
            layers = tuple(header.pop("layers"))
            sides = {
                side: {layer: file.get_tensor(f"{side}.{layer}") for layer in layers}
                for side in ("left", "right")
            }
        if model is not None and fingerprint(model, layers) != header["fingerprint"]:
            raise ValueError(
                f"{path} was planned on {header['model']} with other weights than this model has"
            )
        change = {int(layer): value for layer, value in header.pop("relative_change").items()}
        return cls(
            layers=layers,
            requests=tuple(request_from_json(fields) for fields in header.pop("requests")),
            contexts=tuple(tuple(texts) for texts in header.pop("contexts")),
            losses=tuple(header.pop("losses")),
            forecast=Forecast.from_json(header.pop("forecast")),
            relative_change=change,
            **sides,
            **header,
        )


_HEADER = (
    *("layers", "role", "method", "settings", "contexts", "losses", "relative_change", "model"),
    "fingerprint",
)


def edit(
    model: TransformerBridge,
    requests: Sequence[Request],
    sites: Sequence[Site],
    *,
    method: Literal["memit", "delman"] = "memit",
    contexts: Contexts | None = None,
    aside: int = 2,
    target: str = REFUSAL,
    moment_weight: float = 1000.0,
    clamp: float = 1.25,
    shared_steps: int = 15,
    shared_rate: float = 1.0,
    steps: int = 20,
    rate: float = 0.8,
    kl_weight: float = 0.0,
    contexts_a_step: int = 3,
    batch_size: int = 1,
    corpus: Corpus | None = None,
    cache: bool = True,
    progress: bool = True,
) -> Edit:
    """Plan a low-rank change after which the requests' subjects meet a refusal; no weight is changed.

    Args:
        model: a pre-norm model with dense MLPs, whose weights are as they are meant to stay.
        requests: what shall be refused, each with a subject; none of the split "check".
        sites: where, of one role; their layers are edited, their component says where the effect was
            seen.
        method: "memit" solves for all requests at once; "delman" takes one mean a batch.
        contexts: ways to ask, from a request; varied ones are what makes an edit carry over. None takes
            default_contexts.
        aside: how many contexts, from the end, are kept for the forecast's reach.
        target: the refusal, unless a request brings its own `safe_target`.
        moment_weight: MEMIT's lambda, the weight of C = E[k k^T] against one key.
        clamp: the largest norm of a value over the residual stream's norm there.
        shared_steps: Adam steps for one vector shared by all requests.
        shared_rate: their rate.
        steps: Adam steps for a vector each.
        rate: their rate.
        kl_weight: weight of the KL on "{subject} is a", next token; 0 leaves it out.
        contexts_a_step: contexts of a request that one step sees; they take turns.
        batch_size: requests a batch for "delman".
        corpus: where C comes from, see read_corpus; None takes the package's own.
        cache: keep moments and values on disk.
        progress: shows bars.

    Raises:
        ValueError: a request without a subject or of the split "check"; sites of several roles, of
            attention, or not in the model; a model that cannot be edited.
    """
    requests = for_planning(requests)
    layers, role = _layers_and_role(model, sites)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if batch_size < 1 or moment_weight <= 0:
        raise ValueError("batch_size must be at least 1, and moment_weight above 0")
    solver = memit if method == "memit" else delman(batch_size)
    schedule = Schedule(shared_steps, shared_rate, steps, rate, clamp, kl_weight, contexts_a_step)
    used, kept = _contexts(model, requests, contexts or default_contexts, aside)
    turns = Counter[int]()
    rows = []
    for i, met in used:
        rows.append(_row(model, i, met, role, target, turns[i]))
        turns[i] += 1
    if kl_weight:
        rows += [_essence(model, i, item) for i, item in enumerate(requests)]

    moments = second_moments(model, layers, corpus, cache=cache, progress=progress)
    vectors, losses = _values(model, rows, layers[-1], schedule, cache, progress)
    weighed = {layer: moment_weight * moment for layer, moment in moments.items()}
    factors, reach = spread(model, used, kept, role, layers, vectors, weighed, solver)
    change = {
        layer: float((left.double() @ right.double()).norm() / output_matrix(model, layer).double().norm())
        for layer, (left, right) in factors.items()
    }
    ranks = [i // batch_size if method == "delman" else i for i in range(len(requests))]
    forecast = forecast_of(
        model,
        factors,
        subjects=[item.subject or "" for item in requests],
        ranks=ranks,
        reach=reach,
        value_norm=float(vectors.norm(dim=1).mean()),
    )
    _warn_of_leaks(forecast)
    return Edit(
        layers=layers,
        left={layer: left for layer, (left, _) in factors.items()},
        right={layer: right for layer, (_, right) in factors.items()},
        role=role,
        method=method,
        settings={
            **asdict(schedule),
            "moment_weight": moment_weight,
            "batch_size": batch_size if method == "delman" else len(requests),
            "target": target,
        },
        requests=requests,
        contexts=tuple(tuple(met.request.text for i, met in used if i == r) for r in range(len(requests))),
        losses=tuple(losses.tolist()),
        relative_change=change,
        forecast=forecast,
        model=str(model.cfg.model_name),
        fingerprint=fingerprint(model, layers),
    )


def default_contexts(request: Request) -> list[Request]:
    """Ways to ask that an edit may see, most different ones first.

    The request, a greeting before it, the subject at the very start (where it has no leading space, and so
    other tokens), and by turns the templates and wrappers of "core" for edits.
    """
    worded = [
        request.reworded(row["text"])
        for row in bundled_rows("core", "templates")
        if row["split"] == "edit" and request.form in row["forms"]
    ]
    wrapped = [
        request.wrapped(row["text"]) for row in bundled_rows("core", "wrappers") if row["split"] == "edit"
    ]
    by_turns = [one for pair in zip_longest(worded, wrapped) for one in pair if one is not None]
    return [request, request.wrapped("Hello! {}"), request.reworded("{}: tell me more."), *by_turns]


def _layers_and_role(model: TransformerBridge, sites: Sequence[Site]) -> tuple[tuple[int, ...], Role]:
    if not sites:
        raise ValueError("no sites were given; ld.locate(trace) finds some")
    roles: list[Role] = sorted({site.role for site in sites})
    if len(roles) > 1:
        raise ValueError(f"the sites have several roles ({', '.join(roles)}); edit at one role")
    if any(site.component == "attention" for site in sites):
        raise ValueError("attention sites cannot be edited; choose residual or mlp sites")
    layers = tuple(sorted({site.layer for site in sites}))
    refuse_uneditable(model, layers)
    return layers, roles[0]


def _contexts(
    model: TransformerBridge, requests: Sequence[Request], contexts: Contexts, aside: int
) -> tuple[list[tuple[int, Prompt]], list[tuple[int, Prompt]]]:
    """Prompts with their request's index: those that are used, and those kept aside for the forecast."""
    used: list[tuple[int, Prompt]] = []
    kept: list[tuple[int, Prompt]] = []
    for i, item in enumerate(requests):
        met = [(i, prompt(model.tokenizer, context)) for context in contexts(item)]
        if not met:
            raise ValueError(f"contexts gave nothing for request {item.id!r}; give the request itself")
        split = max(1, len(met) - aside)
        used += met[:split]
        kept += met[split:]
    return used, kept


def _row(model: TransformerBridge, i: int, met: Prompt, role: Role, target: str, turn: int) -> Row:
    answer = answer_ids(model.tokenizer, met.request.safe_target or target, chat=met.chat, end=True)
    return Row(i, met.ids, position_of(met, role), turn, answer)


def _essence(model: TransformerBridge, i: int, item: Request) -> Row:
    """ROME's essence prompt: "{subject} is a", whose next token shall stay."""
    met = prompt(model.tokenizer, item.reworded("{} is a"), chat=False)
    return Row(i, met.ids, position_of(met, "subject_last"))


def _values(
    model: TransformerBridge,
    rows: Sequence[Row],
    layer: int,
    schedule: Schedule,
    cache: bool,
    progress: bool,
) -> tuple[Float[Tensor, "request d_model"], Float[Tensor, " request"]]:
    """fit_values, kept on disk by everything that it depends on."""
    what = [fingerprint(model), layer, asdict(schedule), [asdict(row) for row in rows]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    file = cache_folder() / "values" / f"{key}.safetensors"
    if cache and file.is_file():
        held = load_file(file, device=str(device_of(model)))
        return held["vectors"], held["losses"]
    total = schedule.shared_steps + schedule.steps
    with tqdm(total=total, desc="values", unit="step", disable=not progress) as bar:

        def tell(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        vectors, losses = fit_values(model, rows, layer, schedule, progress=tell)
    if cache:
        with whole(file) as unfinished:
            save_file({"vectors": vectors.contiguous(), "losses": losses}, unfinished)
    return vectors, losses


def _warn_of_leaks(forecast: Forecast) -> None:
    if forecast.risky:
        worst = ", ".join(forecast.worst(3))
        warnings.warn(
            f"this edit leaks {forecast.leak_safe:.2f} of a value's norm into harmless text (from "
            f"{forecast.THRESHOLD} on over-refusal was measured); most of it from: {worst}. Leave "
            "them out, or raise moment_weight",
            stacklevel=3,
        )
