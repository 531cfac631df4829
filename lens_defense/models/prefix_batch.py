"""Rows of any length as one batch: behind the prefix that they share, and padded on the left.

Chat prompts begin with the same tokens (SmolLM2: 24 of its system prompt); these run once for all
rows. Every row ends at the last column: answers line up, and the last `keep` columns of the logits
are the ones that predict them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import ForwardPass, KeyValues, forward, model_device, start_after_block
from lens_defense.sites import component_hook

TokenRows = Sequence[Sequence[int]]
States = dict[str, list[Float[Tensor, "token width"]]]
"""By hook name, for each row [token, width]."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """The tokens that all rows begin with, run once."""

    ids: tuple[int, ...]
    ran: ForwardPass | None
    """None where nothing is shared."""

    def past(self, rows: int) -> KeyValues:
        """Its keys and values, for a batch of so many rows."""
        cache = self.ran.cache if self.ran else ()
        return tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in cache)

    def batch(self, rows: TokenRows, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the rows add to it, padded between, and the mask over both.

        Returns:
            ids [row, token] and mask [row, prefix + token].
        """
        ids, mask = left_pad([row[len(self.ids) :] for row in rows], device)
        return ids, torch.cat([mask.new_ones(len(rows), len(self.ids)), mask], 1)


@torch.no_grad()
def run_shared_prefix(
    model: TransformerBridge, rows: TokenRows, *, names: Sequence[str] = (), stop: int | None = None
) -> SharedPrefix:
    """Run what all rows begin with; at least the last token of each is left.

    Args:
        model: the model.
        rows: token ids.
        names: hooks whose states are kept.
        stop: see `run`.
    """
    first, last = min(map(tuple, rows)), max(map(tuple, rows))
    most = min(map(len, rows)) - 1
    differs = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    ids = tuple(rows[0][: min(most, next(differs, most))])
    if not ids:
        return SharedPrefix((), None)
    return SharedPrefix(
        ids, forward(model, torch.tensor([ids], device=model_device(model)), names=names, stop=stop)
    )


@torch.no_grad()
def states_of_rows(
    model: TransformerBridge, rows: TokenRows, names: Sequence[str], *, stop: int | None = None
) -> States:
    """States by hook name, for each row those of its own tokens.

    Args:
        model: the model.
        rows: token ids, which run as one batch.
        names: hooks of blocks below `stop`.
        stop: see `run`.
    """
    before = run_shared_prefix(model, rows, names=names, stop=stop)
    ids, mask = before.batch(rows, model_device(model))
    told = forward(model, ids, names=names, mask=mask, past=before.past(len(rows)), stop=stop)
    return _by_row(rows, before, told, names)


@torch.no_grad()
def state_reader(
    model: TransformerBridge, rows: TokenRows, *, low: int, stop: int
) -> Callable[[Sequence[str]], States]:
    """`states` of one batch for a model whose blocks from `low` on change: those below run once, now.

    Returns:
        From names of hooks of blocks from `low` on and below `stop` to their states as they are then.
    """
    if low == 0:
        return lambda names: states_of_rows(model, rows, names, stop=stop)
    hook = component_hook("resid_post", low - 1)
    before = run_shared_prefix(model, rows, names=[hook], stop=stop)
    ids, mask = before.batch(rows, model_device(model))
    below = forward(model, ids, names=[hook], mask=mask, past=before.past(len(rows)), stop=stop)

    @torch.no_grad()
    def read(names: Sequence[str]) -> States:
        now = before
        if before.ran:
            held = before.ran
            with start_after_block(model, low - 1, lambda: held.states[hook]):
                told = forward(model, torch.tensor([before.ids], device=ids.device), names=names, stop=stop)
            now = replace(before, ran=replace(told, cache=(*held.cache[:low], *told.cache)))
        with start_after_block(model, low - 1, lambda: below.states[hook]):
            told = forward(model, ids, names=names, mask=mask, past=now.past(len(rows)), stop=stop)
        return _by_row(rows, now, told, names)

    return read


def _by_row(rows: TokenRows, before: SharedPrefix, told: ForwardPass, names: Sequence[str]) -> States:
    def of_row(i: int, name: str) -> Tensor:
        own = told.states[name][i, -(len(rows[i]) - len(before.ids)) :]
        return torch.cat([before.ran.states[name][0], own]) if before.ran else own

    return {name: [of_row(i, name) for i in range(len(rows))] for name in names}


def stack_caches(
    pasts: Sequence[KeyValues], masks: Sequence[Int[Tensor, "_ _"]]
) -> tuple[KeyValues, Int[Tensor, "row seen"]]:
    """Caches of several batches and their masks as of one, padded on the left."""
    if len(pasts) == 1:
        return pasts[0], masks[0]
    width = max(mask.shape[1] for mask in masks)

    def side(layer: int, which: int) -> Tensor:
        states_of_rows = [past[layer][which] for past in pasts]
        return torch.cat([pad(one, (0, 0, width - one.shape[2], 0)) for one in states_of_rows])

    past = tuple((side(layer, 0), side(layer, 1)) for layer in range(len(pasts[0])))
    return past, torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])


def left_pad(
    rows: TokenRows, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Rows of any length as one batch that ends together, and its mask (1 for tokens)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask
