"""Token rows of any length as one batch: their shared prefix runs once, the suffixes are padded on the left.

Chat prompts begin with the same tokens (SmolLM2: 24 of its system prompt). Every row ends at the last
column, so the last columns of the logits are the ones that predict the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import ForwardPass, KeyValues, forward, model_device

TokenRows = Sequence[Sequence[int]]
States = dict[str, list[Float[Tensor, "token width"]]]
"""By hook name, one state [token, width] per row."""


@dataclass(frozen=True, slots=True, eq=False)
class SharedPrefix:
    """The tokens that all rows begin with, and their forward pass."""

    ids: tuple[int, ...]
    forward_pass: ForwardPass | None
    """None where the rows share nothing."""

    def past_key_values(self, rows: int) -> KeyValues:
        """Its keys and values, for a batch of so many rows."""
        key_values = self.forward_pass.key_values if self.forward_pass else ()
        return tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in key_values)

    def pad_suffixes(self, rows: TokenRows, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows without the prefix, padded on the left.

        Returns:
            ids [row, token] and attention mask [row, prefix + token].
        """
        ids, mask = left_pad([row[len(self.ids) :] for row in rows], device)
        return ids, torch.cat([mask.new_ones(len(rows), len(self.ids)), mask], 1)


@torch.no_grad()
def run_shared_prefix(
    model: TransformerBridge,
    rows: TokenRows,
    *,
    capture: Sequence[str] = (),
    stop_at_layer: int | None = None,
) -> SharedPrefix:
    """Run the tokens that all rows begin with; at least the last token of each row is left.

    `capture` and `stop_at_layer` are those of `forward`. Nothing is shared where padding behind it would
    change the rows.
    """
    shared = 0 if padding_counts(model, max(map(len, rows))) else common_length([row[:-1] for row in rows])
    ids = tuple(rows[0][:shared])
    if not ids:
        return SharedPrefix((), None)
    batch = torch.tensor([ids], device=model_device(model))
    return SharedPrefix(ids, forward(model, batch, capture=capture, stop_at_layer=stop_at_layer))


@torch.no_grad()
def states_of_rows(
    model: TransformerBridge, rows: TokenRows, capture: Sequence[str], *, stop_at_layer: int | None = None
) -> States:
    """States by hook name, and per row those of its own tokens; the rows run as one batch.

    `capture` names hooks of blocks below `stop_at_layer`, which is that of `forward`.
    """
    prefix = run_shared_prefix(model, rows, capture=capture, stop_at_layer=stop_at_layer)
    suffixes = _run_suffixes(model, rows, prefix, capture=capture, stop_at_layer=stop_at_layer)
    return _split_by_row(rows, prefix, suffixes)


def stack_caches(
    caches: Sequence[KeyValues], masks: Sequence[Int[Tensor, "_ _"]]
) -> tuple[KeyValues, Int[Tensor, "row token"]]:
    """Join the keys and values of several batches, and their attention masks, padded on the left."""
    if len(caches) == 1:
        return caches[0], masks[0]
    width = max(mask.shape[1] for mask in masks)

    def stack(layer: int, side: int) -> Tensor:
        tensors = [cache[layer][side] for cache in caches]
        return torch.cat([pad(tensor, (0, 0, width - tensor.shape[2], 0)) for tensor in tensors])

    key_values = tuple((stack(layer, 0), stack(layer, 1)) for layer in range(len(caches[0])))
    return key_values, torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in masks])


def padding_counts(model: TransformerBridge, longest: int) -> bool:
    """Whether padding between two tokens of a row would change what the model computes; rows up to that long.

    It does where distances are counted in columns (ALiBi), and where a window of attention is so short that
    padding pushes tokens out of it. In front of a row padding never counts.
    """
    config: Any = model.original_model.config
    config = getattr(config, "text_config", None) or config
    attention = getattr(config, "attn_config", None) or config  # MPT keeps it apart
    if getattr(attention, "alibi", False) or config.model_type in _ALIBI_FAMILIES:
        return True
    windows = [getattr(config, name, None) for name in _WINDOWS]
    return longest + _ROOM_FOR_ANSWERS > min(filter(None, windows), default=float("inf"))


_ALIBI_FAMILIES = ("bloom", "mpt", "jais", "baichuan")
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "attention_window_size")
"""What configs call the number of tokens that a layer looks back."""
_ROOM_FOR_ANSWERS = 1024
"""Tokens that a row may grow by."""


def common_length(rows: TokenRows) -> int:
    """How many tokens all rows begin with."""
    lowest, highest = min(map(tuple, rows)), max(map(tuple, rows))
    differing = (i for i, (a, b) in enumerate(zip(lowest, highest, strict=False)) if a != b)
    return next(differing, min(len(lowest), len(highest)))


def left_pad(
    rows: TokenRows, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "batch token"], Int[Tensor, "batch token"]]:
    """Rows of any length as one batch that ends together, and its attention mask (1 for tokens)."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _run_suffixes(
    model: TransformerBridge, rows: TokenRows, prefix: SharedPrefix, **settings: Any
) -> ForwardPass:
    ids, mask = prefix.pad_suffixes(rows, model_device(model))
    past = prefix.past_key_values(len(rows))
    return forward(model, ids, attention_mask=mask, past_key_values=past, **settings)


def _split_by_row(rows: TokenRows, prefix: SharedPrefix, suffixes: ForwardPass) -> States:
    def states_of_row(i: int, name: str) -> Tensor:
        suffix = suffixes.states[name][i, -(len(rows[i]) - len(prefix.ids)) :]
        if prefix.forward_pass is None:
            return suffix
        return torch.cat([prefix.forward_pass.states[name][0], suffix])

    return {name: [states_of_row(i, name) for i in range(len(rows))] for name in suffixes.states}
