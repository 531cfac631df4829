"""Small problems for editing methods: keys, residuals and a covariance."""

import torch

from lens_defense.editing.methods import KeyGroup

N, D_IN, D_OUT = 5, 12, 7


def small_problem():
    """A key and a residual for each of some requests, and C."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(N, D_IN, generator=generator)
    residuals = torch.randn(N, D_OUT, generator=generator)
    corpus = torch.randn(40, D_IN, generator=generator)
    moments = 3.0 * corpus.T @ corpus / 40
    return keys, residuals, (moments + moments.T) / 2  # rounding leaves a product a little skew


def one_key_each(keys, residuals):
    """The groups of requests with one key each."""
    return [KeyGroup(i, key[None], r) for i, (key, r) in enumerate(zip(keys, residuals, strict=True))]


def groups_of_several():
    """Two requests with some contexts each, and harmless uses of both."""
    generator = torch.Generator().manual_seed(1)
    sizes = {(0, False): 4, (1, False): 2, (0, True): 3, (1, True): 5}
    return [
        KeyGroup(
            owner,
            torch.randn(size, D_IN, generator=generator),
            torch.randn(D_OUT, generator=generator) * (0.1 if harmless else 1.0),
            2.0 if harmless else 3.0,
            harmless,
        )
        for (owner, harmless), size in sizes.items()
    ]


def delta_of(method, groups, covariance):
    """The change that a method makes of one layer."""
    left, right, owners = method.solve(groups, covariance)
    assert left.dtype == right.dtype == torch.float64
    assert left.shape[1] == right.shape[0] == len(owners)
    return left @ right


def weighted_loss(delta, groups, elsewhere):
    """Row by row: the weighted squared error in every context, and what is written elsewhere."""
    errors = [
        group.weight * (delta @ key - group.residual).square().sum() / len(group.keys)
        for group in groups
        for key in group.keys.double()
    ]
    return sum(errors) + torch.einsum("oi,ij,oj->", delta, elsewhere, delta)
