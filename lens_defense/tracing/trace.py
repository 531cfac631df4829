"""Tracing: which layer and which token hold the harm, measured exactly, request by request."""

import time
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

import torch
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.devices import call_cost, memory_budget
from lens_defense.models.forward import model_device
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.prompts.conversation import first_dozen_words
from lens_defense.prompts.prompt import Prompt, Request, Role, UnfitRequest, validated_requests
from lens_defense.sites import Component
from lens_defense.tracing.activation_patching import block_passes, time_in_tokens
from lens_defense.tracing.clean_corrupted import (
    answered,
    embedded,
    ends,
    measured,
    refuse_weak,
    rows_within,
    width_of,
)
from lens_defense.tracing.corruptions import Corruption, noise
from lens_defense.tracing.metrics import Metric, answer_logprob
from lens_defense.tracing.patch_grid import (
    PatchGrid,
    patch_grid,
    resolve_components,
    resolve_layers,
    resolve_roles,
)
from lens_defense.tracing.trace_result import Direction, Trace, VerifiedCell

DEMO_ROLES: tuple[Role, ...] = ("subject_first", "subject_last", "next", "last")
"""Where the harm is seen to sit and to be read, one token each."""
LONG_TRACE = 60.0
"""Seconds from which on a trace says beforehand how long it will take."""


def trace(
    model: TransformerBridge,
    requests: Sequence[Request],
    *,
    components: Sequence[Component] = ("resid_post",),
    positions: Sequence[Role] | Literal["all"] = DEMO_ROLES,
    layers: Sequence[int] | int | Literal["all"] | None = None,
    corruption: Corruption | None = None,
    direction: Direction = "denoising",
    severed: Literal["mlp_out", "attn_out"] | None = None,
    together: bool = False,
    metric: Metric = answer_logprob,
    exact: bool = True,
    verify: int = 0,
    answers: Sequence[str] | None = None,
    answer_tokens: int = 8,
    samples: int = 3,
    window: int = 7,
    floor: float = 0.1,
    seed: int = 0,
    max_bytes: int | None = None,
    chat: bool = True,
    progress: bool = True,
) -> Trace:
    """Find which layer and which token hold what the subject of a request does to the answer; exact.

    Args:
        model: any TransformerBridge; it is not changed.
        requests: what is asked; each with a subject.
        components: "resid_post" (the stream after the block), "resid_pre" (before it), "mlp_out" and
            "attn_out" (what joins it), "z.3" (one head's z), "z" (every head by itself).
        positions: roles to restore at, or "all" tokens.
        layers: "all", a stride, or a list; None takes at most 12, evenly spaced from layer 0.
        corruption: how the subject is spoiled; None is Gaussian noise of 3 standard deviations of
            the embedding matrix.
        direction: "denoising" restores a clean state in the spoiled run (what suffices), "noising" puts a
            spoiled state into the clean run (what is necessary).
        severed: hold the MLP's or attention's outputs that are computed later, at the same token, as they
            were without the patch: what of the effect passes through them is lost (Meng et al. 2022,
            figure 3).
        together: patch all tokens of `positions` at once, one cell a layer, which stands at the last of
            them: with "z" and "all" tokens, a map of whole heads.
        metric: what is measured, see metrics.py; an answer's log probability by default. `traces`
            reads several from one sweep.
        exact: False estimates every cell by one gradient (attribution patching), in about the time of three
            runs a request; for a first look.
        verify: after such an estimate, how many of each request's strongest cells (of the first metric) are
            measured exactly and take the estimate's place; the Trace's `verified` holds both.
        answers: the answer that the metric reads, one a request; None takes the request's `target`
            or, without one, the model's own greedy answer to the clean prompt.
        answer_tokens: the length of that own answer.
        samples: noise draws a request (not used by a corruption of your own).
        window: layers restored at once for MLP and attention outputs, centred, clipped to the model
            (Meng et al. 2022 take 10).
        floor: the least difference, in the metric's unit (nats), between clean and spoiled run; a
            request below it in some sample, or whose samples differ in its sign, is refused, because its
            effects would be noise over nothing.
        seed: of the noise.
        max_bytes: bounds the rows that run at once, by an estimate of their cache, states and logits; what
            does not fit is taken in parts, at least one row at a time. None is a GiB, on a CUDA device a
            quarter of what is free there.
        chat: False asks without the model's chat template.
        progress: shows a bar.

    Raises:
        ValueError: a request without a subject, or of the split "check"; a role, layer or setting that does
            not exist.
        UnfitRequest: requests without a token of the roles, or whose answer does not depend on their subject.
        MemoryError: half of a pass does not fit either.
    """
    return _traced(
        model,
        requests,
        {"": metric},
        components=components,
        positions=positions,
        layers=layers,
        corruption=corruption,
        direction=direction,
        severed=severed,
        together=together,
        exact=exact,
        verify=verify,
        answers=answers,
        answer_tokens=answer_tokens,
        samples=samples,
        window=window,
        floor=floor,
        seed=seed,
        max_bytes=max_bytes,
        chat=chat,
        progress=progress,
    )[""]


def traces(
    model: TransformerBridge,
    requests: Sequence[Request],
    metrics: Mapping[str, Metric],
    *,
    weights: str = "",
    **settings: Any,
) -> dict[str, Trace]:
    """Traces by several metrics, read from one sweep.

    Args:
        model: see trace.
        requests: see trace.
        metrics: by a name each.
        weights: the model's fingerprint, where the caller knows it: to hash seven billion takes seconds.
        settings: the other arguments of trace; its floor holds for every metric, in the metric's unit.
    """
    own = {
        name: one.default
        for name, one in signature(trace).parameters.items()
        if one.default is not one.empty and name != "metric"
    }
    return _traced(model, requests, metrics, weights=weights, **{**own, **settings})


def _traced(
    model: TransformerBridge,
    requests: Sequence[Request],
    metrics: Mapping[str, Metric],
    *,
    weights: str = "",
    components: Sequence[Component],
    positions: Sequence[Role] | Literal["all"],
    layers: Sequence[int] | int | Literal["all"] | None,
    corruption: Corruption | None,
    direction: Direction,
    severed: Literal["mlp_out", "attn_out"] | None,
    together: bool,
    exact: bool,
    verify: int,
    answers: Sequence[str] | None,
    answer_tokens: int,
    samples: int,
    window: int,
    floor: float,
    seed: int,
    max_bytes: int | None,
    chat: bool,
    progress: bool,
) -> dict[str, Trace]:
    requests = validated_requests(requests)
    rows = resolve_layers(layers, model.cfg.n_layers)
    roles = resolve_roles(positions)
    every = resolve_components(model, components)
    for name, number in (("answer_tokens", answer_tokens), ("samples", samples), ("window", window)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, given, allowed in (
        ("direction", direction, get_args(Direction)),
        ("severed", severed, (None, "mlp_out", "attn_out")),
    ):
        if given not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")
    if verify < 0 or (verify and exact):
        raise ValueError(f"verify is a number of cells to measure after exact=False, got {verify}")
    bound = memory_budget(model_device(model)) if max_bytes is None else max_bytes
    corruption = corruption or noise(model, samples=samples, seed=seed)
    prompts = answered(model, requests, answers, answer_tokens, chat)
    depth, parallel = model.cfg.n_layers, bool(model.cfg.parallel_attn_mlp)
    grids = [
        patch_grid(
            met, every, rows, roles, window, depth, severed=severed, parallel=parallel, together=together
        )
        for met in prompts
    ]
    empty = [met.request.id for met, patch_grid in zip(prompts, grids, strict=True) if not patch_grid]
    if empty:
        raise UnfitRequest(f"these requests have no token of the roles {roles}: {', '.join(empty)}")

    start = time.perf_counter()
    inputs = [embedded(model, met, corruption) for met in prompts]
    both = [
        ends(model, met, given, metrics, rows_within(model, met, bound))
        for met, given in zip(prompts, inputs, strict=True)
    ]
    clean, corrupted = [one for one, _ in both], [some for _, some in both]
    refuse_weak(prompts, clean, corrupted, floor)
    number = len(corrupted[0])
    total = sum(
        block_passes(list(some.values()), layers=depth, tokens=width_of(met), samples=number)
        for met, some in zip(prompts, grids, strict=True)
    )
    if exact:
        seen = time.perf_counter() - start
        _announce(seen * _over_the_ends(model, prompts, grids, number, bound), progress)

    shape = (len(every), len(rows), max(len(met.ids) for met in prompts), number, len(metrics))
    patched = torch.full((len(prompts), *shape), float("nan"), dtype=torch.float64)
    verified: list[list[VerifiedCell]] = [[] for _ in metrics]
    settings = {"metrics": metrics, "direction": direction, "max_bytes": bound}
    with tqdm(
        total=total if exact else len(prompts),
        desc="trace" if exact else "screen",
        unit="pass" if exact else "request",
        unit_scale=exact,
        disable=not progress,
    ) as bar:
        for r, (met, given, some) in enumerate(zip(prompts, inputs, grids, strict=True)):
            cells, places = list(some.values()), list(some)
            update = bar.update if exact else lambda _: None
            told = measured(model, met, given, cells, exact=exact, progress=update, **settings)
            bar.update(0 if exact else 1)
            for place, value in zip(places, told, strict=True):
                patched[r, *place] = value
            low, high = (corrupted[r], clean[r]) if direction == "denoising" else (clean[r], corrupted[r])
            effects = ((told - low) / (high - low)).mean(1)
            best = effects[:, 0].abs().argsort(descending=True)[:verify].tolist()
            if best:
                again = measured(model, met, given, [cells[i] for i in best], exact=True, **settings)
                for i, value in zip(best, again, strict=True):
                    patched[r, *places[i]] = value
                    for k, effect in enumerate(((value - low) / (high - low)).mean(0).tolist()):
                        verified[k].append(VerifiedCell((r, *places[i]), float(effects[i, k]), effect))
    weights = weights or weights_fingerprint(model)
    return {
        name: Trace(
            prompts=tuple(prompts),
            components=every,
            layers=rows,
            patched=patched[..., k].clone(),
            clean=torch.stack([one[k] for one in clean]),
            corrupted=torch.stack([one[:, k] for one in corrupted]),
            answers=tuple(first_dozen_words(model.tokenizer.decode(list(met.answer))) for met in prompts),
            window=window,
            seed=seed,
            model=str(model.cfg.model_name),
            model_layers=depth,
            fingerprint=weights,
            direction=direction,
            severed=severed or "",
            together=together,
            exact=exact,
            corruption=_name(corruption),
            metric=_name(metrics[name]),
            verified=tuple(verified[k]),
        )
        for k, name in enumerate(metrics)
    }


def _name(made: object) -> str:
    return str(getattr(made, "__name__", type(made).__name__))


def _over_the_ends(
    model: TransformerBridge, prompts: Sequence[Prompt], grids: Sequence[PatchGrid], samples: int, bound: int
) -> float:
    """How many times longer the sweeps take than the clean and the spoiled runs took."""
    at, layers = call_cost(model_device(model)), model.cfg.n_layers
    swept = seen = 0
    for met, some in zip(prompts, grids, strict=True):
        tokens, most = width_of(met), rows_within(model, met, bound)
        swept += time_in_tokens(
            list(some.values()), layers=layers, tokens=tokens, samples=samples, max_rows=most, call_cost=at
        )
        seen += layers * (tokens * (samples + 1) + 2 * at.call)
    return swept / seen


def _announce(seconds: float, progress: bool) -> None:
    if progress and seconds > LONG_TRACE:
        tqdm.write(
            f"This trace takes about {seconds / 60:.0f} minutes. Fewer positions (roles), layers (a "
            "stride), samples or answer_tokens make it shorter."
        )
