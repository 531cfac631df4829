"""Whether rows may enter a batch between two blocks of a model.

Most blocks look at nothing but their input. Some families compute what their blocks share from the batch that
the model was called with (ALiBi by row, masks by row, the shape of the output, what each block reads of the
embeddings): there all rows must run from the first block on.
"""

from weakref import WeakKeyDictionary

import torch
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.forward import forward, model_device
from lens_defense.sites import block_input_hook, component_hook

_MAY_GROW: WeakKeyDictionary[TransformerBridge, bool] = WeakKeyDictionary()


def batch_may_grow(model: TransformerBridge) -> bool:
    """Whether a batch may grow between two blocks; measured once per model."""
    if model not in _MAY_GROW:
        try:
            _MAY_GROW[model] = _grown_equals_whole(model)
        except (MemoryError, torch.OutOfMemoryError):
            return False  # not remembered: it says nothing of the family
        except Exception:  # whatever a family raises of a batch that grows
            _MAY_GROW[model] = False
    return _MAY_GROW[model]


@torch.no_grad()
def _grown_equals_whole(model: TransformerBridge) -> bool:
    """Two rows behind one token: the second enters at the second block, or both run from the start."""
    layer = min(1, model.cfg.n_layers - 1)
    entry, mlp_out = block_input_hook(layer), component_hook("mlp_out", layer)
    ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=model_device(model))
    whole = forward(model, ids, capture=[entry, mlp_out], logits_to_keep=2)
    second_row = whole.states[entry][1:, 1:]
    grown = forward(
        model,
        ids[:1, 1:],
        capture=[mlp_out],
        patches={entry: lambda state: torch.cat([state, second_row])},
        past_key_values=tuple(
            (keys[: 1 + (i >= layer), :, :1], values[: 1 + (i >= layer), :, :1])
            for i, (keys, values) in enumerate(whole.key_values)
        ),
        logits_to_keep=2,
    )
    pairs = ((grown.logits, whole.logits), (grown.states[mlp_out], whole.states[mlp_out][:, 1:]))
    tolerance = 100 * torch.finfo(whole.logits.dtype).eps
    return all(
        observed.shape == expected.shape and float((observed - expected).norm() / expected.norm()) < tolerance
        for observed, expected in pairs
    )
