"""What Adam remembers, as named tensors for a checkpoint, so that a training resumes bit for bit."""

from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

_PREFIX = "adam."


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Shaped[Tensor, "..."]]:
    """The tensors of an optimizer's state, as "adam.3.exp_avg" of the third parameter; none before a step."""
    return {
        f"{_PREFIX}{i}.{name}": value
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
    """Give an optimizer the state that `optimizer_tensors` took, among other tensors that are left alone."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(_PREFIX):
            _, i, field = name.split(".")
            state.setdefault(int(i), {})[field] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
