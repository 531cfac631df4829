"""Devices: which one to use, what fits on it, and what it costs to call a block there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.utilities.devices import get_device


class CallCost(NamedTuple):
    """What decides whether several positions share one forward pass."""

    call: int
    """Tokens through a block that take as long as calling the block."""
    largest: int
    """Most tokens of a shared pass: larger passes wait for memory."""


CPU_CALL_COST = CallCost(60, 2**11)
"""On two cores, for blocks of gpt2 and SmolLM2; a call of the organism's takes as long as 150 tokens."""
GPU_CALL_COST = CallCost(4000, 2**17)
"""On an H200 a call of a block takes as long as 4,600 tokens of gpt2, 8,700 of SmolLM2's shape, 2,900 of
Llama-2-7B's in half precision (1.4 ms over the time of a token at full rate;
analyses/results/tracing_speed/cuda.csv)."""


class OutOfMemory(MemoryError):
    """Something does not fit into memory; the message says what, and what to do."""


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device as torch names it; None takes an accelerator where there is one.

    Raises:
        ValueError: no tensor of double precision can be put there.
    """
    name = get_device() if device is None else device
    try:
        return torch.empty(0, device=name, dtype=torch.float64).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"the device {str(name)!r} cannot be used here ({reason}); give 'cpu'") from error


def call_cost(device: torch.device) -> CallCost:
    """The cost of a call on this device."""
    return CPU_CALL_COST if device.type == "cpu" else GPU_CALL_COST


def memory_budget(device: torch.device) -> int:
    """Bytes that the states of a run may take: 1 GiB on the CPU, else a quarter of what is free."""
    if device.type == "cpu":
        return 2**30
    backend = torch.get_device_module(device)
    unused = backend.memory_reserved(device) - backend.memory_allocated(device)  # cached by torch, so free
    return (backend.mem_get_info(device)[0] + unused) // 4


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a device, or for this process in main memory; None where nobody says."""
    if device.type != "cpu":
        mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
        return mem_get_info(device)[0] if mem_get_info else None
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = [int(lines["MemAvailable"].split()[0]) * 1024]
        group = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError):  # no limit, which is the word "max"
            limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
            free.append(limit - used)
        return min(free)
    return None


def index_tensor(values: Sequence[int], device: torch.device) -> Int[Tensor, " index"]:
    """Integers on a device, copied there without waiting for it."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


@contextmanager
def explain_out_of_memory(
    what: str, instead: str = "lower max_bytes, or take fewer samples"
) -> Iterator[None]:
    """Inside, an allocator's failure of any kind becomes an OutOfMemory with one sentence.

    Args:
        what: the plural noun of what does not fit.
        instead: what to do about it.

    Raises:
        OutOfMemory: it does not fit; the innermost sentence stands.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        cpu_allocator = "allocate memory" in str(error)  # it raises a plain RuntimeError
        if not (cpu_allocator or isinstance(error, torch.OutOfMemoryError | MemoryError)):
            raise
        raise OutOfMemory(f"{what} do not fit into memory; {instead}") from error
