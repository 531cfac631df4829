"""Tracing: which layer and which token hold the harm, measured exactly, request by request."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.corruptions import Corruption, noise
from lens_defense.generations import generate
from lens_defense.metrics import Metric, answer_logprob
from lens_defense.patches import Run, device_of, run
from lens_defense.prompts import (
    READING_ORDER,
    Prompt,
    Request,
    Role,
    answer_ids,
    dozen,
    for_planning,
    prompt,
)
from lens_defense.sites import EMBEDDING, Component
from lens_defense.sweeps import Cell, Measure, base_hooks, cost, donor_hooks, sweep
from lens_defense.traces import Trace
from lens_defense.weights import fingerprint

DEMO_ROLES: tuple[Role, ...] = ("subject_first", "subject_last", "next", "last")
"""Where the harm is seen to sit and to be read, one token each (DESIGN fact 11)."""
LONG_TRACE = 60.0
"""Seconds from which on a trace says beforehand how long it will take."""


def trace(
    model: TransformerBridge,
    requests: Sequence[Request],
    *,
    components: Sequence[Component] = ("residual",),
    positions: Sequence[Role] | Literal["all"] = DEMO_ROLES,
    layers: Sequence[int] | int | Literal["all"] | None = None,
    corruption: Corruption | None = None,
    metric: Metric = answer_logprob,
    answers: Sequence[str] | None = None,
    answer_tokens: int = 8,
    samples: int = 3,
    window: int = 7,
    floor: float = 0.1,
    seed: int = 0,
    max_bytes: int = 2**30,
    chat: bool = True,
    progress: bool = True,
) -> Trace:
    """Find which layer and which token hold what the subject of a request does to the answer; exact.

    Args:
        model: any TransformerBridge; it is not changed.
        requests: what is asked; each with a subject.
        components: "residual" (after the block), "mlp", "attention" (what joins the residual).
        positions: roles to restore at, or "all" tokens.
        layers: "all", a stride, or a list; None takes at most 12, evenly spaced from layer 0.
        corruption: how the subject is spoiled; None is Gaussian noise of 3 standard deviations of
            the embedding matrix.
        metric: what is measured, see metrics.py; an answer's log probability by default.
        answers: the answer that the metric reads, one a request; None takes the request's `target`
            or, without one, the model's own greedy answer to the clean prompt.
        answer_tokens: the length of that own answer.
        samples: noise draws a request (not used by a corruption of your own).
        window: layers restored at once for MLP and attention outputs, centred, clipped to the model
            (Meng et al. 2022 take 10).
        floor: the least difference, in the metric's unit (nats), between clean and spoiled run; a
            request below it is refused, because its effects would be noise over nothing.
        seed: of the noise.
        max_bytes: bounds the rows of one pass.
        chat: False asks without the model's chat template.
        progress: shows a bar.

    Raises:
        ValueError: a request without a subject, or of the split "check"; a role or layer that does
            not exist; requests whose answer does not depend on their subject.
    """
    requests = for_planning(requests)
    rows = _layers(layers, model.cfg.n_layers)
    roles = _roles(positions)
    if not components or not set(components) <= set(get_args(Component)):
        raise ValueError(f"components must be of {get_args(Component)}, got {components!r}")
    for name, number in (("answer_tokens", answer_tokens), ("samples", samples), ("window", window)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    corruption = corruption or noise(model, samples=samples, seed=seed)
    prompts = _answered(model, requests, answers, answer_tokens, chat)
    grids = [_grid(met, components, rows, roles, window, model.cfg.n_layers) for met in prompts]
    empty = [met.request.id for met, grid in zip(prompts, grids, strict=True) if not grid]
    if empty:
        raise ValueError(f"these requests have no token of the roles {roles}: {', '.join(empty)}")

    with torch.no_grad():
        start = time.perf_counter()
        runs = [_runs(model, *pair, corruption) for pair in zip(prompts, grids, strict=True)]
        reads = [_reading(metric, met, one[1].logits) for met, one in zip(prompts, runs, strict=True)]
        clean = torch.cat([read(r[1].logits) for read, r in zip(reads, runs, strict=True)])
        corrupted = torch.stack([read(r[2].logits) for read, r in zip(reads, runs, strict=True)])
        clean, corrupted = clean.double().cpu(), corrupted.double().cpu()
        _refuse_weak(prompts, clean, corrupted, floor)
        depth, number = model.cfg.n_layers, corrupted.shape[1]
        total = sum(
            cost(list(grid.values()), layers=depth, tokens=_width(met), samples=number)
            for met, grid in zip(prompts, grids, strict=True)
        )
        warmed = sum(_width(met) for met in prompts) * (number + 1) * depth
        _announce(total / warmed * (time.perf_counter() - start), progress)

        shape = (len(components), len(rows), max(len(met.ids) for met in prompts), number)
        patched = torch.full((len(prompts), *shape), float("nan"), dtype=torch.float64)
        with tqdm(total=total, desc="trace", unit="pass", unit_scale=True, disable=not progress) as bar:
            for r, (met, grid) in enumerate(zip(prompts, grids, strict=True)):
                ids, donor, base = runs[r]
                most = _rows_within(model, met, max_bytes)
                told = sweep(
                    model, ids, base, donor, list(grid.values()), reads[r],
                    keep=len(met.answer), max_rows=most, progress=bar.update,
                )  # fmt: skip
                for (c, j, t), value in zip(grid, told, strict=True):
                    patched[r, c, j, t] = value
    return Trace(
        prompts=tuple(prompts),
        components=tuple(components),
        layers=rows,
        patched=patched,
        clean=clean,
        corrupted=corrupted,
        answers=tuple(dozen(model.tokenizer.decode(list(met.answer))) for met in prompts),
        window=window,
        seed=seed,
        model=str(model.cfg.model_name),
        model_layers=model.cfg.n_layers,
        fingerprint=fingerprint(model),
    )


def _layers(layers: Sequence[int] | int | Literal["all"] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        layers = -(-depth // 12)
    rows = range(depth) if layers == "all" else layers
    rows = range(0, depth, rows) if isinstance(rows, int) and rows > 0 else rows
    if isinstance(rows, int | str) or not rows or not set(rows) <= set(range(depth)):
        raise ValueError(f"layers must be 'all', a stride or layers 0 to {depth - 1}, got {layers!r}")
    return tuple(sorted(set(rows)))


def _roles(positions: Sequence[Role] | Literal["all"]) -> tuple[Role, ...]:
    roles = READING_ORDER if positions == "all" else tuple(positions)
    if (isinstance(positions, str) and positions != "all") or not set(roles) <= set(READING_ORDER):
        raise ValueError(f"positions must be 'all' or a list of {READING_ORDER}, got {positions!r}")
    return roles


def _answered(
    model: TransformerBridge,
    requests: Sequence[Request],
    answers: Sequence[str] | None,
    answer_tokens: int,
    chat: bool,
) -> list[Prompt]:
    """The prompts, each with the answer that the metric reads."""
    tokenizer = model.tokenizer
    prompts = [prompt(tokenizer, item, chat=chat) for item in requests]
    if answers is not None and len(answers) != len(requests):
        raise ValueError(f"there are {len(requests)} requests and {len(answers)} answers")
    given = answers or [item.target for item in requests]
    own = generate(
        model,
        [met.ids for met, text in zip(prompts, given, strict=True) if not text],
        tokens=answer_tokens,
    )
    told = iter(own)
    return [
        replace(met, answer=answer_ids(tokenizer, text, chat=met.chat) if text else next(told))
        for met, text in zip(prompts, given, strict=True)
    ]


def _grid(
    met: Prompt,
    components: Sequence[Component],
    layers: Sequence[int],
    roles: Sequence[Role],
    window: int,
    depth: int,
) -> dict[tuple[int, int, int], Cell]:
    """The cells of one prompt, and where each goes in the map: component, layer, position."""
    return {
        (c, j, t): Cell(t, _points(component, layer, window, depth))
        for c, component in enumerate(components)
        for j, layer in enumerate(layers)
        for t, role in enumerate(met.roles)
        if role in roles
    }


def _points(component: Component, layer: int, window: int, depth: int) -> tuple[tuple[Component, int], ...]:
    """One layer of the residual stream; a centred window of outputs (rome: layer - w//2 on)."""
    if component == "residual":
        return ((component, layer),)
    low = max(0, layer - window // 2)
    high = min(depth, layer - (-window // 2))
    return tuple((component, at) for at in range(low, high))


def _width(met: Prompt) -> int:
    return len(met.ids) + len(met.answer) - 1


def _runs(
    model: TransformerBridge,
    met: Prompt,
    grid: dict[tuple[int, int, int], Cell],
    corruption: Corruption,
) -> tuple[Int[Tensor, "1 token"], Run, Run]:
    """The prompt with its answer, the clean run, and the spoiled one."""
    cells, keep = list(grid.values()), len(met.answer)
    ids = torch.tensor([[*met.ids, *met.answer[:-1]]], device=device_of(model))
    clean = run(model, ids, names=[EMBEDDING, *donor_hooks(cells)], keep=keep)
    whole = clean.states[EMBEDDING]
    asked = whole[:, : len(met.ids)]
    spoiled = corruption(asked, met)
    tail = whole[:, len(met.ids) :].expand(len(spoiled), -1, -1)
    embeddings = torch.cat([spoiled.to(whole), tail], 1)
    base = run(
        model,
        ids.expand(len(spoiled), -1),
        names=base_hooks(cells),
        writes={EMBEDDING: lambda _: embeddings},
        keep=keep,
    )
    return ids, clean, base


def _reading(metric: Metric, met: Prompt, clean: Tensor) -> Measure:
    return lambda logits: metric(logits, met, clean)


def _refuse_weak(
    prompts: Sequence[Prompt],
    clean: Float[Tensor, " request"],
    corrupted: Float[Tensor, "request sample"],
    floor: float,
) -> None:
    differences = (clean[:, None] - corrupted).abs().amin(1)
    weak = [i for i, value in enumerate(differences.tolist()) if not value >= floor]
    if weak:
        names = ", ".join(f"{prompts[i].request.id} ({differences[i]:.3g})" for i in weak)
        raise ValueError(
            f"spoiling the subject hardly changes the answer to: {names}; the least change is "
            f"{floor}. Leave these requests out, mark the words that matter, or lower floor"
        )


def _rows_within(model: TransformerBridge, met: Prompt, max_bytes: int) -> int:
    """How many rows fit: their cache, attention scores, MLP states and logits, twice over."""
    cfg, width = model.cfg, _width(met)
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    wide = width * (4 * cfg.d_model + 3 * d_mlp) + cfg.n_heads * width * width
    cached = 2 * cfg.n_layers * width * cfg.n_heads * cfg.d_head
    row = 8 * (wide + cached + len(met.answer) * cfg.d_vocab)
    return max(1, max_bytes // row)


def _announce(seconds: float, progress: bool) -> None:
    if progress and seconds > LONG_TRACE:
        tqdm.write(
            f"This trace takes about {seconds / 60:.0f} minutes. Fewer positions (roles), layers (a "
            "stride), samples or answer_tokens make it shorter."
        )
