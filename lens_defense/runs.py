"""Runs: what the cells of one prompt are measured from, clean and spoiled, and how many rows fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.attributions import screen
from lens_defense.corruptions import Corruption
from lens_defense.generations import generate
from lens_defense.grids import Grid
from lens_defense.metrics import Metric
from lens_defense.patches import Run, Write, device_of, run
from lens_defense.prompts import Prompt, Request, prompt
from lens_defense.sites import EMBEDDING
from lens_defense.sweeps import Cell, Measure, base_hooks, donor_hooks, sweep
from lens_defense.traces import Direction
from lens_defense.turns import answer_ids


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """What the cells of one prompt are measured from."""

    ids: Int[Tensor, "1 token"]
    clean: Run
    base: Run
    """The run that is patched, one row a sample."""
    donor: Run
    """The run whose states are put in."""
    embeddings: Float[Tensor, "sample token d_model"]
    """Of the run that is patched."""
    keep: int

    @torch.no_grad()
    def swept(
        self,
        model: TransformerBridge,
        cells: Sequence[Cell],
        read: Measure,
        most: int,
        progress: Callable[[int], object],
    ) -> Float[Tensor, "cell sample reading"]:
        """Measured, each cell by a run of its own."""
        return sweep(
            model, self.ids, self.base, self.donor, cells, read,
            keep=self.keep, max_rows=most, progress=progress,
        )  # fmt: skip

    def screened(
        self, model: TransformerBridge, cells: Sequence[Cell], read: Measure
    ) -> Float[Tensor, "cell sample reading"]:
        """Estimated, all cells by one gradient."""
        return screen(model, self.ids, self.embeddings, self.donor, cells, read, keep=self.keep)


def answered(
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


@torch.no_grad()
def prepared(
    model: TransformerBridge, met: Prompt, cells: Grid, corruption: Corruption, direction: Direction
) -> Runs:
    """The prompt with its answer, clean and spoiled; the run that is patched has one row a sample."""
    some, keep = list(cells.values()), len(met.answer)
    ids = torch.tensor([[*met.ids, *met.answer[:-1]]], device=device_of(model))
    whole = run(model, ids, names=[EMBEDDING], stop=1).states[EMBEDDING]
    spoiled = corruption(whole[:, : len(met.ids)], met)
    tail = whole[:, len(met.ids) :].expand(len(spoiled), -1, -1)
    embeddings = torch.cat([spoiled.to(whole), tail], 1)
    every = ids.expand(len(spoiled), -1)
    writes: dict[str, Write] = {EMBEDDING: lambda _: embeddings}
    names = base_hooks(some), donor_hooks(some)
    if direction == "denoise":
        clean = run(model, ids, names=names[1], keep=keep)
        base = run(model, every, names=names[0], writes=writes, keep=keep)
        return Runs(ids, clean, base, clean, embeddings, keep)
    clean = run(model, every, names=names[0], keep=keep)
    donor = run(model, every, names=names[1], writes=writes, keep=keep)
    return Runs(ids, clean, clean, donor, whole.expand(len(spoiled), -1, -1), keep)


def reading(metrics: Mapping[str, Metric], met: Prompt, clean: Tensor) -> Measure:
    """All metrics as the columns of one measure."""
    return lambda logits: torch.stack([read(logits, met, clean[:1]) for read in metrics.values()], 1)


def width_of(met: Prompt) -> int:
    """Tokens of a prompt and its answer, but the answer's last."""
    return len(met.ids) + len(met.answer) - 1


def rows_within(model: TransformerBridge, met: Prompt, max_bytes: int) -> int:
    """How many rows fit: their cache, attention scores, MLP states and logits, twice over."""
    cfg, width = model.cfg, width_of(met)
    d_mlp = cfg.d_mlp or 4 * cfg.d_model
    wide = width * (4 * cfg.d_model + 3 * d_mlp) + cfg.n_heads * width * width
    cached = 2 * cfg.n_layers * width * cfg.n_heads * cfg.d_head
    row = 8 * (wide + cached + len(met.answer) * cfg.d_vocab)
    return max(1, max_bytes // row)
