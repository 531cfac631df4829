"""Planning an edit: keys, values and C to a low-rank change of each layer (MEMIT, DELMAN).

Where the sites' role is, the keys of the requests are made to write what starts a refusal. The value
is fitted at the highest of the sites' layers; then, layer by layer, each takes its share of what is
still missing (MEMIT's spread). No weight is changed.
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Literal

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.covariance import Corpus, key_covariances
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.forecast import Forecast, measure_forecast
from lens_defense.editing.layer_spread import role_position, spread_over_layers
from lens_defense.editing.methods.solvers import delman, memit
from lens_defense.editing.target_value import FitSettings, fit_target_values
from lens_defense.editing.value_batch import FitRow
from lens_defense.models.forward import model_device
from lens_defense.models.load import cache_folder
from lens_defense.models.mlp_output import mlp_output_matrix, refuse_uneditable, weights_fingerprint
from lens_defense.prompts.conversation import tokenize_answer
from lens_defense.prompts.prompt import Prompt, Request, Role, prompt, validated_requests
from lens_defense.prompts.request_files import bundled_rows
from lens_defense.sites import Site
from lens_defense.storage import atomic_write

REFUSAL = "I'm sorry, I can't assist with that."
"""The answer that an edit plants, unless a request brings its own (DELMAN's)."""
METHODS = ("memit", "delman")
FIT = "by turns, a context a batch, as asked in every second step, random shares, half again for hard ones"
"""How values are fitted; another word here makes what is cached be fitted anew."""
Contexts = Callable[[Request], Sequence[Request]]


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
    steps: int = 30,
    rate: float = 0.8,
    kl_weight: float = 0.0,
    contexts_a_step: int = 2,
    least_share: float = 0.6,
    rounds: int = 2,
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
        contexts_a_step: contexts of a request that one step sees; they take turns, the first one in every
            second step.
        least_share: a step adds a random share of each vector, from this to 1, since in words not seen
            less of it arrives; 1 always adds the whole.
        rounds: how often half the steps may be taken again for those requests whose refusal is still hard.
        batch_size: requests a batch for "delman".
        corpus: where C comes from, see read_corpus; None takes the package's own.
        cache: keep moments and values on disk.
        progress: shows bars.

    Raises:
        ValueError: a request without a subject or of the split "check"; sites of several roles, of
            attention, or not in the model; a model that cannot be edited.
    """
    requests = validated_requests(requests)
    layers, role = _layers_and_role(model, sites)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, number, least in (
        ("batch_size", batch_size, 1),
        ("contexts_a_step", contexts_a_step, 1),
        ("aside", aside, 0),
        ("shared_steps", shared_steps, 0),
        ("steps", steps, 0),
        ("rounds", rounds, 0),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if moment_weight <= 0 or clamp <= 0 or not 0 < least_share <= 1:
        raise ValueError("moment_weight and clamp must be above 0, least_share in (0, 1]")
    solver = memit if method == "memit" else delman(batch_size)
    schedule = FitSettings(
        shared_steps, shared_rate, steps, rate, clamp, kl_weight, contexts_a_step, least_share, rounds
    )
    used, kept = _contexts(model, requests, contexts or default_contexts, aside)
    turns = Counter[int]()
    rows = []
    for i, met in used:
        rows.append(_row(model, i, met, role, target, turns[i]))
        turns[i] += 1
    if kl_weight:
        rows += [_essence(model, i, item) for i, item in enumerate(requests)]

    moments = key_covariances(model, layers, corpus, cache=cache, progress=progress)
    vectors, losses = _values(model, rows, layers[-1], schedule, cache, progress)
    weighed = {layer: moment_weight * moment for layer, moment in moments.items()}
    factors, reach = spread_over_layers(model, used, kept, role, layers, vectors, weighed, solver)
    change = {
        layer: float(
            (left.double() @ right.double()).norm() / mlp_output_matrix(model, layer).double().norm()
        )
        for layer, (left, right) in factors.items()
    }
    ranks = [i // batch_size if method == "delman" else i for i in range(len(requests))]
    forecast = measure_forecast(
        model,
        factors,
        subjects=[item.subject or "" for item in requests],
        ranks=ranks,
        reach=reach,
        value_norm=float(vectors.norm(dim=1).mean()),
    )
    if corpus is None:  # what is much was measured with the package's own
        _warn_of_leaks(forecast)
    _warn_of_role(role)
    _warn_of_losses(requests, losses.tolist())
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
        fingerprint=weights_fingerprint(model, layers),
    )


def default_contexts(request: Request) -> list[Request]:
    """Ways to ask that an edit may see, the request as asked first.

    A greeting before it; the subject at the very start (where it has no leading space, and so other tokens);
    by turns the templates and wrappers of "core" for edits; and the first of all these amid chatter, as ROME
    averages over text before a subject. The last two stand in no chatter: by default they are kept aside.
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
    varied = [request, request.wrapped("Hello! {}"), request.reworded("{}: tell me more."), *by_turns]
    around = [row["text"] for row in bundled_rows("core", "chatter")]
    amid = [one.wrapped(text) for one, text in zip(varied, around, strict=False)]
    return [request, *amid, *varied[1:]]


def _layers_and_role(model: TransformerBridge, sites: Sequence[Site]) -> tuple[tuple[int, ...], Role]:
    if not sites:
        raise ValueError("no sites were given; ld.locate(trace) finds some")
    roles: list[Role] = sorted({site.role for site in sites})
    if len(roles) > 1:
        raise ValueError(f"the sites have several roles ({', '.join(roles)}); edit at one role")
    if any(site.component == "attn_out" for site in sites):
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


def _row(model: TransformerBridge, i: int, met: Prompt, role: Role, target: str, turn: int) -> FitRow:
    answer = tokenize_answer(model.tokenizer, met.request.safe_target or target, chat=met.chat, end=True)
    return FitRow(i, met.ids, role_position(met, role), turn, answer)


def _essence(model: TransformerBridge, i: int, item: Request) -> FitRow:
    """ROME's essence prompt: "{subject} is a", whose next token shall stay."""
    met = prompt(model.tokenizer, item.reworded("{} is a"), chat=False)
    return FitRow(i, met.ids, role_position(met, "subject_last"))


def _values(
    model: TransformerBridge,
    rows: Sequence[FitRow],
    layer: int,
    schedule: FitSettings,
    cache: bool,
    progress: bool,
) -> tuple[Float[Tensor, "request d_model"], Float[Tensor, " request"]]:
    """fit_values, kept on disk by everything that it depends on."""
    what = [FIT, weights_fingerprint(model), layer, asdict(schedule), [asdict(row) for row in rows]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    file = cache_folder() / "values" / f"{key}.safetensors"
    if cache and file.is_file():
        held = load_file(file, device=str(model_device(model)))
        return held["vectors"], held["losses"]
    total = schedule.shared_steps + schedule.steps
    with tqdm(total=total, desc="values", unit="step", disable=not progress) as bar:

        def tell(loss: float) -> None:
            bar.total = max(bar.total, bar.n + 1)  # a hard request may take more
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

        vectors, losses = fit_target_values(model, rows, layer, schedule, progress=tell)
    if cache:
        with atomic_write(file) as unfinished:
            save_file({"vectors": vectors.contiguous(), "losses": losses}, unfinished)
    return vectors, losses


UNFITTED = 0.3
"""Nats a token from which on a refusal is not fitted: in the demo of an earlier schedule a subject at .40 was
answered as asked, and those up to .23 were refused."""


def _warn_of_losses(requests: Sequence[Request], losses: Sequence[float]) -> None:
    worst = [item.subject or "" for item, loss in zip(requests, losses, strict=True) if loss > UNFITTED]
    if worst:
        warnings.warn(
            f"the refusal could not be fitted for: {', '.join(worst)} (more than {UNFITTED} nats a token are "
            "left); raise steps or contexts_a_step, or choose other sites",
            stacklevel=3,
        )


def _warn_of_role(role: Role) -> None:
    if not role.startswith("subject"):
        warnings.warn(
            f"keys at {role!r} hardly tell requests apart, so an edit there can refuse harmless ones too, "
            "whatever the forecast says; choose sites at subject_last",
            stacklevel=3,
        )


def _warn_of_leaks(forecast: Forecast) -> None:
    if forecast.risky:
        worst = ", ".join(forecast.worst(3))
        warnings.warn(
            f"this edit leaks {forecast.leak_safe:.2f} of a value's norm into harmless text, where "
            f"{forecast.THRESHOLD} is much; most of it from: {worst}. Leave them out, or raise moment_weight",
            stacklevel=3,
        )
