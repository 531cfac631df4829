"""A copy of a model's weights, and the comparison with it to the bit."""

import torch


def copy_weights(model) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, copied."""
    return {name: tensor.clone() for name, tensor in model.original_model.state_dict().items()}


def weights_equal(model, weights) -> bool:
    """Whether no bit of the model differs; NaN equals NaN of the same bits."""
    current = model.original_model.state_dict()
    return current.keys() == weights.keys() and all(
        current[name].dtype == tensor.dtype
        and torch.equal(current[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for name, tensor in weights.items()
        if tensor.dim()
    )
