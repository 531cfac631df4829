"""A model as people hand it to a verb: one that is loaded, or what `load` takes."""

import os
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.loading.load import load
from lens_defense.loading.loaded_model import loaded_model

Model = TransformerBridge | str | os.PathLike[str]
"""Where a verb takes a model: one that is loaded, or a name, folder or file for `load`."""


def resolve_model(model: Any, call: str) -> TransformerBridge:
    """The model itself, or the one of that name, loaded for this call.

    Args:
        model: a TransformerBridge, or a name, folder or file as `load` takes it.
        call: the right call, for the message.

    Raises:
        TypeError: it is something else; says what to do.
        ValueError: there is no model of that name.
    """
    return load(model) if isinstance(model, str | os.PathLike) else loaded_model(model, call)
