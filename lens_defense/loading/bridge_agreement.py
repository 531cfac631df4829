"""A bridge must compute what transformers computes: measured once per model, when it is loaded.

The same few tokens run through transformers alone, then through the bridge: as a whole, as a prefix, and as
what follows behind the prefix's keys and values. A family that TransformerLens wraps wrongly, or whose layers
keep something else, is refused in one sentence and never traced with false numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from lens_defense.models.devices import explain_out_of_memory
from lens_defense.models.forward import forward
from lens_defense.sites import component_hook

_PROBE_TOKENS = 6
_TOLERANCE, _HALF_TOLERANCE = 0.01, 0.2
"""Relative; sums in half precision, in another order, differ by more."""
_ERROR_LETTERS = 160
"""Characters of a library's error that are shown."""


@torch.no_grad()
def transformers_logits(name: str, hf_model: PreTrainedModel) -> Float[Tensor, "1 token vocab"] | None:
    """Logits of a few tokens by transformers alone; None on the meta device, where there are no numbers.

    Raises:
        ValueError: transformers cannot run the model in its precision.
    """
    if hf_model.device.type == "meta":
        return None
    dtype = str(hf_model.dtype).removeprefix("torch.")
    with library_errors_as_value_error(
        f"transformers cannot run {name} in {dtype}", "load it with another dtype"
    ):
        return hf_model(_probe_ids(hf_model).to(hf_model.device), use_cache=False).logits


def refuse_disagreement(
    name: str, model: TransformerBridge, logits: Float[Tensor, "1 token vocab"] | None
) -> None:
    """Refuse a bridge that computes something else than transformers.

    Args:
        name: of the model.
        model: the bridge.
        logits: what `transformers_logits` gave before the model was wrapped.

    Raises:
        ValueError: it cannot run them, or gives other logits.
    """
    if logits is None:
        return
    hf_model: Any = model.original_model
    ids, half = _probe_ids(hf_model).to(logits.device), _PROBE_TOKENS // 2
    family = hf_model.config.model_type
    with library_errors_as_value_error(
        f"TransformerLens does not run {name}, of the family {family!r}, as tracing needs it"
    ):
        whole = forward(model, ids, capture=_stream_hooks(model), logits_to_keep=_PROBE_TOKENS).logits
        prefix = forward(model, ids[:, :half], logits_to_keep=half)
        past = prefix.key_values
        rest = forward(model, ids[:, half:], past_key_values=past, logits_to_keep=_PROBE_TOKENS - half).logits
    logits = logits.double()
    scale = (logits - logits.mean(-1, keepdim=True)).norm()
    tolerance = _TOLERANCE if hf_model.dtype in (torch.float32, torch.float64) else _HALF_TOLERANCE
    for where, observed, expected in (
        ("", whole, logits),
        (" before a later token is read", prefix.logits, logits[:, :half]),
        (" behind a prefix's keys and values", rest, logits[:, half:]),
    ):
        difference = float((observed.double() - expected).norm() / scale)
        if not difference <= tolerance:
            raise ValueError(
                f"{name}, of the family {family!r}, gives other logits in TransformerLens than in "
                f"transformers{where} (relative difference {difference:.2g}); load a model of another family"
            )


@contextmanager
def library_errors_as_value_error(
    sentence: str, instead: str = "load a model of another family"
) -> Iterator[None]:
    """Inside, whatever a library raises becomes one sentence; what does not fit into memory stays so.

    Args:
        sentence: what failed.
        instead: what to do about it.

    Raises:
        ValueError: something was raised.
        MemoryError: it does not fit into memory.
    """
    try:
        with explain_out_of_memory(
            "the weights and states of the model", "give device='cpu', or a smaller dtype"
        ):
            yield
    except MemoryError:
        raise
    except Exception as error:
        words = " ".join(str(error).split()).split(". ")[0].split("; ")[0] or type(error).__name__
        raise ValueError(f"{sentence} ({words[:_ERROR_LETTERS]}); {instead}") from error


def _stream_hooks(model: TransformerBridge) -> list[str]:
    """The residual stream before and after every block: what tracing cannot do without."""
    return [
        component_hook(name, layer)
        for layer in range(model.cfg.n_layers)
        for name in ("resid_pre", "resid_post")
    ]


def _probe_ids(hf_model: Any) -> Int[Tensor, "1 token"]:
    """A few tokens, spread over the vocabulary."""
    vocabulary = hf_model.get_input_embeddings().weight.shape[0]
    return torch.arange(1, _PROBE_TOKENS + 1)[None] * (vocabulary // (_PROBE_TOKENS + 2))
