"""DELMAN: one rank-one change per batch of requests, from its mean key and mean residual (Wang et al. 2025).

    Delta = sum over batches of r k^T (lambda C + k k^T)^-1

As in the release, each batch asks for what the ones before it have not written at its key yet. Where harmless
uses of the subjects are given, a batch solves for its mean and for theirs together, so it has a second rank;
those of other batches count as C does, and so do the keys of earlier edits that are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lens_defense.editing.methods.memit import MOM2_UPDATE_WEIGHT, least_squares, refuse_weight
from lens_defense.editing.methods.method import EARLIER, Factors, KeyGroup


@dataclass(frozen=True, slots=True)
class DELMAN:
    """One rank per batch of requests, and one for its harmless uses."""

    batch_size: int = 1
    """Requests per batch; 1 gives every request its own rank."""
    mom2_update_weight: float = MOM2_UPDATE_WEIGHT
    """The weight of C against one key."""

    name: ClassVar[str] = "delman"
    paper: ClassVar[str] = "Wang et al. 2025"
    equation: ClassVar[str] = "sum over batches of r k^T (lambda C + k k^T)^-1"

    def __post_init__(self) -> None:
        refuse_weight(self.mom2_update_weight)
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def solve(self, groups: Sequence[KeyGroup], covariance: Float[Tensor, "d_in d_in"]) -> Factors:
        """The change of one layer."""
        weighted = self.mom2_update_weight * covariance
        written = covariance.new_zeros(len(groups[0].residual), len(covariance)).double()
        lefts: list[Tensor] = []
        rights: list[Tensor] = []
        owners: list[frozenset[int]] = []
        for batch in self._batches(groups):
            means = [_mean_group(group) for group in batch]
            missing = [_without(mean, written) for mean in means]
            own = {group.owner for members in batch for group in members}
            elsewhere = [group for group in groups if group.harmless and group.owner not in own]
            left, right = least_squares(missing, weighted + _second_moment(elsewhere, weighted))
            written = written + left @ right
            lefts.append(left)
            rights.append(right)
            owners += [frozenset(group.owner for group in members) for members in batch]
        return Factors(torch.cat(lefts, 1), torch.cat(rights, 0), tuple(owners))

    def _batches(self, groups: Sequence[KeyGroup]) -> list[list[list[KeyGroup]]]:
        """Of each batch of requests the harmful groups, and the harmless ones where there are some."""

        def place(group: KeyGroup) -> tuple[int, bool]:
            return group.owner // self.batch_size, group.harmless

        own = [group for group in groups if group.owner != EARLIER]
        ordered = [list(members) for _, members in groupby(sorted(own, key=place), key=place)]
        return [list(batch) for _, batch in groupby(ordered, key=lambda members: place(members[0])[0])]


def _second_moment(
    groups: Sequence[KeyGroup], like: Float[Tensor, "d_in d_in"]
) -> Float[Tensor, "d_in d_in"]:
    """The weighted sum of k k^T over groups, each the mean over its keys."""
    total = torch.zeros_like(like, dtype=torch.float64)
    for group in groups:
        total += group.rows.T @ group.rows
    return total


def _mean_group(groups: Sequence[KeyGroup]) -> KeyGroup:
    """Groups as one: their mean key where each has a single one, as in the paper; else all their keys."""
    residual = torch.stack([group.residual for group in groups]).double().mean(0)
    keys = torch.cat([group.keys.double() for group in groups])
    if len(keys) == len(groups):
        keys = keys.mean(0, keepdim=True)
    return KeyGroup(groups[0].owner, keys, residual, groups[0].weight)


def _without(group: KeyGroup, written: Float[Tensor, "d_out d_in"]) -> KeyGroup:
    """The group with what the batches before have written at its mean key taken off its residual."""
    missing = group.residual - written @ group.keys.mean(0)
    return KeyGroup(group.owner, group.keys, missing, group.weight)
