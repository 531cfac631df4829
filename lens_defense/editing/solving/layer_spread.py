"""MEMIT's spread: a value fitted at the top layer, written by several layers, lowest first."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.methods import EARLIER, EditingMethod, Factors, KeyGroup
from lens_defense.editing.methods.method import SharesLayers, refuse_unfit_factors
from lens_defense.editing.solving.kept_keys import key_rows
from lens_defense.models.forward import forward, model_device
from lens_defense.models.mlp_output import apply_change_, mlp_output_matrix, temporary_changes
from lens_defense.models.prefix_tree import last_token_reader
from lens_defense.prompts.prompt import Prompt, role_position
from lens_defense.prompts.request import Role
from lens_defense.sites import component_hook, key_hook

ReadGroups = Callable[[Sequence[str]], dict[str, list[Float[Tensor, "context width"]]]]
"""From hook names to states, a tensor per group."""


@dataclass(frozen=True, slots=True, eq=False)
class PromptGroup:
    """Prompts in which one value shall arrive: contexts of a request; or its harmless uses, and nothing."""

    owner: int
    """The request's index."""
    prompts: Sequence[Prompt]
    weight: float = 1.0
    harmless: bool = False


class Spread(NamedTuple):
    """What a spread gives."""

    factors: dict[int, Factors]
    """By layer."""
    reach: list[float]
    """Of each measured group, the share of its request's value that arrives."""
    key_rows: dict[int, Float[Tensor, "_ d_in"]]
    """By layer, the keys that the change was made for, as later edits may keep them: see kept_keys.py."""


@torch.no_grad()
def spread_over_layers(
    model: TransformerBridge,
    groups: Sequence[PromptGroup],
    role: Role,
    shares: Mapping[int, float],
    values: Float[Tensor, "request d_model"],
    covariances: Mapping[int, Float[Tensor, "d_in d_in"]],
    method: EditingMethod,
    *,
    mean_keys: bool = False,
    measured: Sequence[PromptGroup] = (),
    earlier_rows: Mapping[int, Float[Tensor, "_ d_in"]] | None = None,
) -> Spread:
    """MEMIT's algorithm 1: lowest layer first, each takes its share of what is still missing.

    Of harmless uses nothing is missing at first; once lower layers have leaked into them, the higher ones
    take that back.

    Args:
        model: the model; it is as before afterwards.
        groups: the prompts whose keys are written.
        role: at which the keys stand.
        shares: of the layers that are changed, lowest first: see `layer_shares`.
        values: what shall be added to the residual stream after the highest of the layers.
        covariances: C of each layer.
        method: makes the change of a layer.
        mean_keys: whether a group is its mean key, as in MEMIT's release, or a row for each prompt.
        measured: groups whose reach is measured at the end.
        earlier_rows: by layer, weighted keys of earlier edits, at which nothing new is to be written.
    """
    layers = tuple(shares)
    top = component_hook("resid_post", layers[-1])
    read_states = _reader_at_role(model, groups, role, layers)
    read_measured = _reader_at_role(model, measured, role, layers)
    clean_measured, clean_top = read_measured([top])[top], None
    factors: dict[int, Factors] = {}
    written_rows: dict[int, Tensor] = {}
    with temporary_changes(model) as maker:
        for layer in layers:
            states = read_states([key_hook(layer), top])
            scale = residual_scale(model, layer)
            clean_top = clean_top or states[top]
            key_groups = []
            for group, keys, now, clean in zip(
                groups, states[key_hook(layer)], states[top], clean_top, strict=True
            ):
                target_shift = torch.zeros_like(clean[0]) if group.harmless else values[group.owner]
                missing = target_shift - (now - clean).mean(0)
                residual = missing * (shares[layer] / scale)
                rows = keys.mean(0, keepdim=True) if mean_keys else keys
                key_groups.append(
                    KeyGroup(group.owner, rows, residual, group.weight, group.harmless, keys[0])
                )
            written_rows[layer] = key_rows(key_groups)
            if earlier_rows and layer in earlier_rows:
                key_groups.append(
                    _earlier_group(earlier_rows[layer].to(values.device), key_groups[0].residual)
                )
            left, right, owners = _written_ranks(
                layer, method.solve(key_groups, covariances[layer].to(values.device))
            )
            factors[layer] = Factors(
                left.float().cpu().contiguous(), right.float().cpu().contiguous(), owners
            )
            delta = factors[layer].left.double() @ factors[layer].right.double()
            apply_change_(model, {layer: delta}, maker=maker)
        shifted = read_measured([top])[top]
    reach = _reach(measured, _mean_shifts(shifted, clean_measured), values)
    return Spread(factors, reach, written_rows)


@torch.no_grad()
def reach_of_change(
    model: TransformerBridge,
    factors: Mapping[int, Factors],
    groups: Sequence[PromptGroup],
    role: Role,
    measured: Sequence[PromptGroup],
) -> tuple[Float[Tensor, "request d_model"], list[float]]:
    """What a change that was made without values writes, and how much of it arrives elsewhere.

    Args:
        model: the model; it is as before afterwards.
        factors: the change of each layer.
        groups: the prompts that it was made on, of every request one group or more.
        role: at which the residual stream after the highest of the layers is read.
        measured: groups whose reach is measured.

    Returns:
        For each request, the mean shift over its first group, which stands for its value; and of each
        measured group, the share of that value that arrives.
    """
    first = {group.owner: group for group in reversed(groups) if not group.harmless}
    seen, layers = [first[owner] for owner in sorted(first)], tuple(sorted(factors))
    top = component_hook("resid_post", layers[-1])
    read = _reader_at_role(model, [*seen, *measured], role, layers)
    clean = read([top])[top]
    deltas = {layer: change.left.double() @ change.right.double() for layer, change in factors.items()}
    with temporary_changes(model) as maker:
        apply_change_(model, deltas, maker=maker)
        shifts = _mean_shifts(read([top])[top], clean)
    values = torch.stack(shifts[: len(seen)]).float()
    return values, _reach(measured, shifts[len(seen) :], values)


def _mean_shifts(
    now: Sequence[Float[Tensor, "_ width"]], clean: Sequence[Float[Tensor, "_ width"]]
) -> list[Float[Tensor, " width"]]:
    """Of each group, how far its states have moved, mean over its prompts."""
    return [(after - before).mean(0) for after, before in zip(now, clean, strict=True)]


def _reach(
    groups: Sequence[PromptGroup],
    shifts: Sequence[Float[Tensor, " d_model"]],
    values: Float[Tensor, "request d_model"],
) -> list[float]:
    """Of each group, the share of its request's value that its shift has."""
    owned = [values[group.owner] for group in groups]
    return [
        float(shift.to(value.dtype) @ value / value.square().sum().clamp(min=1e-12))
        for shift, value in zip(shifts, owned, strict=True)
    ]


def layer_shares(method: EditingMethod, layers: Sequence[int]) -> dict[int, float]:
    """The layers that a method changes, lowest first, each with its share of what is still missing.

    MEMIT's is 1 / (layers that are left), so that all write as much. A method may have `layer_shares` of its
    own.

    Args:
        method: the method.
        layers: those of the sites, lowest first.

    Raises:
        ValueError: the method's shares are of other layers, of none, or not above 0 and at most 1.
    """
    if not isinstance(method, SharesLayers):
        return {layer: 1 / (len(layers) - j) for j, layer in enumerate(layers)}
    shares = method.layer_shares(layers)
    if not shares or not set(shares) <= set(layers) or not all(0 < share <= 1 for share in shares.values()):
        raise ValueError(
            f"layer_shares of the method {method.name!r} must give some of the layers {tuple(layers)} a "
            f"share above 0 and at most 1, got {dict(shares)}"
        )
    return {layer: float(shares[layer]) for layer in layers if layer in shares}


def _earlier_group(rows: Float[Tensor, "row d_in"], like: Float[Tensor, " d_out"]) -> KeyGroup:
    """The weighted keys of earlier edits as a group: each row counts as it is, and nothing is to arrive."""
    return KeyGroup(EARLIER, rows, torch.zeros_like(like), weight=float(len(rows)), harmless=True)


def _written_ranks(layer: int, factors: Factors) -> Factors:
    """The factors without the rank that a method may have given the keys of earlier edits, which adds 0."""
    left, right, owners = factors
    refuse_unfit_factors(layer, left, right)
    ranks = [j for j, own in enumerate(owners) if own != {EARLIER} or bool(left[:, j].any())]
    return Factors(left[:, ranks], right[ranks], tuple(owners[j] for j in ranks))


@torch.no_grad()
def residual_scale(model: TransformerBridge, layer: int) -> float:
    """What a block multiplies its MLP's output by before it joins the residual stream (Granite); mostly 1.

    Measured: the block runs twice, with its keys as they are and doubled.
    """
    key, resid_post = key_hook(layer), component_hook("resid_post", layer)
    ids = torch.ones(1, 1, dtype=torch.long, device=model_device(model))
    stop = layer + 1
    clean = forward(model, ids, capture=[key, resid_post], stop_at_layer=stop).states
    patches = {key: lambda state: 2 * state}
    doubled = forward(model, ids, capture=[resid_post], patches=patches, stop_at_layer=stop).states
    written = clean[key].double() @ mlp_output_matrix(model, layer).T.double()
    added = (doubled[resid_post] - clean[resid_post]).double()
    scale = float((added * written).sum() / written.square().sum().clamp(min=1e-30))
    return 1.0 if abs(scale - 1) < _ROUNDING_OF_SCALE else scale


_ROUNDING_OF_SCALE = 0.02
"""Half precision measures a scale of 1 that well."""


def _reader_at_role(
    model: TransformerBridge, groups: Sequence[PromptGroup], role: Role, layers: Sequence[int]
) -> ReadGroups:
    """States at the role of every prompt, from the tokens up to it, as the layers are when they are read."""
    rows = [prompt.ids[: role_position(prompt, role) + 1] for group in groups for prompt in group.prompts]
    if not rows:
        return lambda hooks: {hook: [] for hook in hooks}
    read = last_token_reader(model, rows, first_changed=layers[0], stop_at_layer=layers[-1] + 1)
    sizes = [len(group.prompts) for group in groups]
    return lambda hooks: {hook: list(states.split(sizes)) for hook, states in read(hooks).items()}
