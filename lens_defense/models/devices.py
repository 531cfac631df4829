"""Devices: which one there is, what fits on it, and what it costs to call a block there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.utilities.devices import get_device


class CallCost(NamedTuple):
    """What decides whether positions share a pass."""

    call: int
    """Tokens through a block that cost as much as calling it."""
    largest: int
    """Tokens of a pass beyond which positions do not share it: what is larger waits for memory."""


CPU_CALL_COST = CallCost(60, 2**11)
"""On two cores; of gpt2's and SmolLM2's blocks. A call of the organism's costs 150 tokens."""
GPU_CALL_COST = CallCost(4000, 2**17)
"""On an H200 a call of a block costs 4,600 tokens of gpt2, 8,700 of SmolLM2's shape, 2,900 of Llama-2-7B's in
half precision (1.4 ms over the time of a token at full rate; analyses/results/tracing_speed/cuda.csv)."""


class OutOfMemory(MemoryError):
    """Something does not fit into memory, told in a sentence."""


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device, if tensors of double precision can be put there; None takes an accelerator where one is.

    Raises:
        ValueError: they cannot.
    """
    wanted = get_device() if device is None else device
    try:
        return torch.empty(0, device=wanted, dtype=torch.float64).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        why = str(error).splitlines()[0][:200]
        raise ValueError(f"the device {str(wanted)!r} cannot be used here ({why}); give 'cpu'") from error


def call_cost(device: torch.device) -> CallCost:
    """What a call costs there."""
    return CPU_CALL_COST if is_cpu(device) else GPU_CALL_COST


def memory_budget(device: torch.device) -> int:
    """Bytes that a run's states may take: a GiB, on an accelerator a quarter of what is free there."""
    if is_cpu(device):
        return 2**30
    card = torch.get_device_module(device)
    unused = card.memory_reserved(device) - card.memory_allocated(device)  # torch keeps it, and it is free
    return (card.mem_get_info(device)[0] + unused) // 4


def is_cpu(device: torch.device) -> bool:
    """Whether it is no accelerator."""
    return device.type == "cpu"


def index_tensor(values: Sequence[int], device: torch.device) -> Int[Tensor, " index"]:
    """Integers on a device, for which the caller does not wait."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


@contextmanager
def explain_out_of_memory(
    what: str, instead: str = "lower max_bytes, or take fewer samples"
) -> Iterator[None]:
    """What does not fit into memory is told in a sentence, whichever allocator said so.

    Args:
        what: does not fit.
        instead: what to do about it.

    Raises:
        NoRoom: it does not fit; the innermost sentence stands.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        in_words = "allocate memory" in str(error)  # the CPU's allocator has no class for it
        if not (in_words or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        raise OutOfMemory(f"{what} do not fit into memory; {instead}") from error
