"""MEMIT's spread: a value fitted at the top layer, written by several layers, lowest first."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods.solvers import Solver
from lens_defense.models.mlp_output import apply_change_, undo_change_
from lens_defense.models.prefix_batch import state_reader
from lens_defense.prompts.prompt import Prompt, Role
from lens_defense.sites import component_hook, key_hook

Contexts = Sequence[tuple[int, Prompt]]
"""Prompts, each with the index of the request that it is a context of."""


@torch.no_grad()
def spread_over_layers(
    model: TransformerBridge,
    used: Contexts,
    aside: Contexts,
    role: Role,
    layers: Sequence[int],
    vectors: Float[Tensor, "request d_model"],
    weighed: Mapping[int, Float[Tensor, "d_in d_in"]],
    solver: Solver,
) -> tuple[dict[int, tuple[Tensor, Tensor]], list[float]]:
    """MEMIT's algorithm 1: lowest layer first, each takes an equal share of what is still missing.

    Returns the factors by layer, and how much of each request's vector arrives in the contexts kept
    aside, as a share (the used ones where none are aside). The model is as before afterwards.
    """
    top = component_hook("resid_post", layers[-1])
    read = _reader_at_role(model, used, role, layers)
    read_kept = _reader_at_role(model, aside, role, layers) if aside else read
    kept = aside or used
    before, before_kept = read([top])[top], read_kept([top])[top]
    changes = []
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        for j, layer in enumerate(layers):
            seen = read([key_hook(layer), top])
            missing = vectors - _mean_by_request(seen[top] - before, used, len(vectors))
            keys = _mean_by_request(seen[key_hook(layer)], used, len(vectors))
            moment = weighed[layer].to(keys.device)
            left, right = solver(keys, missing / (len(layers) - j), moment)
            factors[layer] = (left.float().cpu().contiguous(), right.float().cpu().contiguous())
            delta = factors[layer][0].double() @ factors[layer][1].double()
            changes.append(apply_change_(model, {layer: delta}))
        moved = read_kept([top])[top] - before_kept
    finally:
        for change in reversed(changes):
            undo_change_(model, change)
    shift = _mean_by_request(moved, kept, len(vectors))
    reach = (shift * vectors).sum(1) / vectors.square().sum(1)
    return factors, reach.tolist()


def _reader_at_role(
    model: TransformerBridge,
    some: Contexts,
    role: Role,
    layers: Sequence[int],
    batch: int = 32,
) -> Callable[[Sequence[str]], dict[str, Float[Tensor, "context width"]]]:
    """States at the role of every context, from the tokens up to it, as the layers are when they are read.

    The same context of all requests is a batch, so that what stands before the subject runs once.
    """
    rows = [met.ids[: role_position(met, role) + 1] for _, met in some]
    contexts: dict[int, list[int]] = defaultdict(list)
    met_before = Counter[int]()
    for i, (owner, _) in enumerate(some):
        contexts[met_before[owner]].append(i)
        met_before[owner] += 1
    parts = [
        part[start : start + batch] for part in contexts.values() for start in range(0, len(part), batch)
    ]
    stop = layers[-1] + 1
    readers = [state_reader(model, [rows[i] for i in part], low=layers[0], stop=stop) for part in parts]

    def read(names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, dict[int, Tensor]] = {name: {} for name in names}
        for part, told in zip(parts, (one(names) for one in readers), strict=True):
            for name in names:
                found[name] |= {i: row[-1].float() for i, row in zip(part, told[name], strict=True)}
        return {name: torch.stack([held[i] for i in range(len(rows))]) for name, held in found.items()}

    return read


def _mean_by_request(
    rows: Float[Tensor, "context width"], some: Contexts, n: int
) -> Float[Tensor, "request width"]:
    owners = torch.tensor([i for i, _ in some], device=rows.device)
    sums = torch.zeros(n, rows.shape[1], device=rows.device).index_add_(0, owners, rows)
    return sums / torch.bincount(owners, minlength=n)[:, None].clamp(min=1)


def role_position(met: Prompt, role: Role) -> int:
    """The one position of a role in a prompt.

    A subject of one token has no first or middle of its own, and one that ends a plain prompt has the
    role "last" there: the subject's last token stands for them.
    """
    found = met.positions(role)
    if not found and role.startswith("subject") and met.subjects:
        found = (met.subjects[-1][1] - 1,)
    if not found:
        raise ValueError(
            f"request {met.request.id!r} has no token of the role {role!r} in {met.request.text!r}; "
            "choose sites at subject_last"
        )
    return found[-1]
