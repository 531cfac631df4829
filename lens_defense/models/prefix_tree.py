"""States at the last token of many rows, read again and again while some blocks change.

Prompts of an edit begin alike: all with the chat template, and each template with every subject. So a batch
runs in three segments, each behind the keys and values of the one before: what all rows begin with, what each
group of rows begins with, and the rest of each row. Blocks below the changed ones run once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import ForwardPass, KeyValues, forward, model_device, start_after_block
from lens_defense.models.prefix_batch import TokenRows, common_length, left_pad, padding_counts
from lens_defense.sites import component_hook

ReadStates = Callable[[Sequence[str]], dict[str, Float[Tensor, "row width"]]]
"""From hook names to the states at every row's last token."""


@torch.no_grad()
def last_token_reader(
    model: TransformerBridge,
    rows: TokenRows,
    *,
    first_changed: int,
    stop_at_layer: int,
    batch_rows: int = 128,
) -> ReadStates:
    """Read states of a model whose blocks from `first_changed` on will change.

    Args:
        model: the model.
        rows: token ids, of any lengths.
        first_changed: the lowest block that may change; those below run during this call.
        stop_at_layer: the first block that is not run.
        batch_rows: rows that run together, unless a single group of like rows is larger.

    Returns:
        A function from hook names of blocks from `first_changed` on to their states at the time of its call.
    """
    apart = padding_counts(model, max(map(len, rows)))
    groups = [[i] for i in range(len(rows))] if apart else _groups_with_like_beginnings(rows)
    batches: list[list[list[int]]] = []
    for group in sorted(groups, key=lambda group: len(rows[group[0]])):
        if batches and sum(map(len, batches[-1])) + len(group) <= batch_rows:
            batches[-1].append(group)
        else:
            batches.append([group])
    device = model_device(model)
    segmented = _whole_rows if apart else _segments
    trees = [_Tree(model, segmented(rows, batch, device), first_changed, stop_at_layer) for batch in batches]
    order = torch.tensor([i for batch in batches for group in batch for i in group])

    @torch.no_grad()
    def read(hooks: Sequence[str]) -> dict[str, Tensor]:
        states = [tree.read(hooks) for tree in trees]
        return {hook: torch.cat([of_tree[hook] for of_tree in states])[order.argsort()] for hook in hooks}

    return read


@dataclass(frozen=True, slots=True, eq=False)
class _Segment:
    """Tokens of a batch that run together."""

    ids: Int[Tensor, "branch token"]
    """Padded on the left."""
    mask: Int[Tensor, "branch past_and_token"]
    parents: Int[Tensor, " branch"]
    """Of each branch, the branch of the segment before that it continues."""


@dataclass(slots=True, eq=False)
class _Tree:
    """A batch, and what its unchanged blocks give."""

    model: TransformerBridge
    segments: Sequence[_Segment]
    first_changed: int
    stop_at_layer: int
    inputs: list[Tensor] = field(default_factory=list)
    """By segment, what enters the first block that changes."""
    unchanged: list[KeyValues] = field(default_factory=list)
    """By segment, keys and values of the blocks below, of one branch. They are skipped, but the cache takes
    its length from them."""

    def __post_init__(self) -> None:
        if not self.first_changed:
            return
        hook, key_values = component_hook("resid_post", self.first_changed - 1), ()
        for segment in self.segments:
            below = self._forward(segment, key_values, [hook], self.first_changed)
            key_values = below.key_values
            self.inputs.append(below.states[hook])
            self.unchanged.append(tuple((keys[:1], values[:1]) for keys, values in key_values))

    def read(self, hooks: Sequence[str]) -> dict[str, Float[Tensor, "row width"]]:
        """States at the last token of every row, in the order of the groups."""
        changed: KeyValues = ()
        states: Mapping[str, Tensor] = {}
        for i, segment in enumerate(self.segments):
            capture = hooks if segment is self.segments[-1] else ()
            if self.first_changed:
                unchanged = self.unchanged[i - 1] if i else ()
                with start_after_block(self.model, self.first_changed - 1, lambda i=i: self.inputs[i]):
                    run = self._forward(segment, changed, capture, self.stop_at_layer, unchanged)
            else:
                run = self._forward(segment, changed, capture, self.stop_at_layer)
            # the first segment's cache lacks skipped blocks, the others' has them: count from the end
            changed, states = run.key_values[self.first_changed - self.stop_at_layer :], run.states
        return {hook: of_tokens[:, -1].float() for hook, of_tokens in states.items()}

    def _forward(
        self,
        segment: _Segment,
        key_values: KeyValues,
        capture: Sequence[str],
        stop_at_layer: int,
        unchanged: KeyValues = (),
    ) -> ForwardPass:
        """Run a segment behind what the one before left; `unchanged` stands for blocks that are skipped."""
        branches = len(segment.ids)
        skipped = tuple(
            (keys.expand(branches, -1, -1, -1), values.expand(branches, -1, -1, -1))
            for keys, values in unchanged
        )
        past = tuple((keys[segment.parents], values[segment.parents]) for keys, values in key_values)
        return forward(
            self.model,
            segment.ids,
            capture=capture,
            attention_mask=segment.mask,
            past_key_values=(*skipped, *past),
            stop_at_layer=stop_at_layer,
        )


def _groups_with_like_beginnings(rows: TokenRows) -> list[list[int]]:
    """Indices of rows. Behind what all rows begin with, a row shares half with the first of its group."""
    shared = common_length(rows)
    groups: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: tuple(rows[i])):
        alike = common_length([rows[groups[-1][0]], rows[i]]) - shared if groups else 0
        if groups and 2 * alike >= len(rows[i]) - shared:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _whole_rows(rows: TokenRows, groups: Sequence[Sequence[int]], device: torch.device) -> list[_Segment]:
    """Every row as one piece, padded in front."""
    ids, mask = left_pad([rows[i] for group in groups for i in group], device)
    return [_Segment(ids, mask, torch.zeros(len(ids), dtype=torch.long, device=device))]


def _segments(rows: TokenRows, groups: Sequence[Sequence[int]], device: torch.device) -> list[_Segment]:
    """What all rows begin with, what each group begins with, and the rest; segments without a token left out.

    The rest of a row has its last token at least.
    """
    in_order = [list(rows[i]) for group in groups for i in group]
    group_of_row = [g for g, group in enumerate(groups) for _ in group]
    shared = common_length([row[:-1] for row in in_order])
    lengths = [common_length([rows[i][shared:-1] for i in group]) for group in groups]
    beginnings = [list(rows[group[0]][shared : shared + n]) for group, n in zip(groups, lengths, strict=True)]
    rest = [row[shared + lengths[g] :] for row, g in zip(in_order, group_of_row, strict=True)]
    parts = [([in_order[0][:shared]], [0]), (beginnings, [0] * len(groups)), (rest, group_of_row)]
    segments: list[_Segment] = []
    for part, parents in parts:
        if not any(part):
            continue
        ids, mask = left_pad(part, device)
        branches_before = len(segments[-1].ids) if segments else 1
        branches = torch.tensor(parents if branches_before > 1 else [0] * len(part), device=device)
        if segments:
            mask = torch.cat([segments[-1].mask[branches], mask], 1)
        segments.append(_Segment(ids, mask, branches))
    return segments
