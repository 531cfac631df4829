"""Gradients of edits drawn at random, for networks without a model."""

import torch

from lens_defense.editing.methods.learned_method import EditGradients, MatrixShape

SHAPE = MatrixShape(d_out=5, d_in=7, d_model=4)
LAYERS = (1, 3)


def random_edits(tokens=(3, 6), seed=0):
    """One edit for each number of tokens, in float64; the upper layer has a gradient at fewer tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return [
        EditGradients(
            owner,
            draw(n + 2, SHAPE.d_model),
            {layer: draw(n - (layer == 3), SHAPE.d_in) for layer in LAYERS},
            {layer: draw(n - (layer == 3), SHAPE.d_out) for layer in LAYERS},
        )
        for owner, n in enumerate(tokens)
    ]


def gradient(edits, layer):
    """dL/dW: the sum over tokens of delta u^T, one by one."""
    total = torch.zeros(SHAPE.d_out, SHAPE.d_in, dtype=torch.float64)
    for edit in edits:
        for key, value_gradient in zip(edit.keys[layer], edit.value_gradients[layer], strict=True):
            total += torch.outer(value_gradient, key)
    return total


def with_random_parameters(network, seed=1):
    """The network in float64, with no parameter where it began."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 3)
    return network
