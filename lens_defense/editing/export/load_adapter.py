"""A LoRA adapter read as an Edit, so that it can be checked, applied and undone like one."""

import math
import os
from contextlib import suppress
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import wrong_argument
from lens_defense.editing.edit_plan import Edit, relative_change
from lens_defense.editing.export.lora_adapter import MERGE_INSTEAD, Adapter, read_adapter
from lens_defense.editing.forecast import Forecast
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.mlp_output import mlp_output_matrix, output_modules, refuse_uneditable
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.shown_text import shown

_CALL = "ld.load_adapter(folder, model)"


def load_adapter(folder: str | os.PathLike[str], model: Model, *, requests: Requests = ()) -> Edit:
    """Read the folder of a LoRA adapter, which `Edit.to_peft` or peft wrote, as an edit of a model.

    An adapter says nothing of what it was made from: the losses and the forecast of the edit are NaN.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: what `load` gave, or a name for it: the one that the adapter belongs on, without it.
        requests: what the adapter is about, where that is known, so that a check can ask for it and leaves
            out what was seen.

    Raises:
        ValueError: it is no plain LoRA adapter, it changes something else than MLP output matrices, it does
            not fit the model, or it was written for another one.
        TypeError: an argument is of another type; says the right call.
    """
    if not isinstance(folder, str | os.PathLike):
        raise wrong_argument(_CALL, "folder must be a path", folder)
    model = resolve_model(model, _CALL)
    rows = requests_with_subjects(requests, _CALL) if requests else ()
    adapter = read_adapter(folder)
    left, right = _by_layer(model, folder, adapter)
    layers = tuple(left)
    origin, unknown = adapter.origin, (math.nan,) * len(rows)
    edit = Edit(
        layers=layers,
        left=left,
        right=right,
        role=origin.role if origin else "last",
        method=origin.method if origin else "LoRA",
        settings={"adapter": Path(folder).name},
        requests=rows,
        contexts=tuple((row.conversation,) for row in rows),
        losses=unknown,
        relative_change={layer: relative_change(model, layer, left[layer], right[layer]) for layer in layers},
        forecast=Forecast(
            tuple(row.subject or "" for row in rows), unknown, unknown, unknown, math.nan, math.nan
        ),
        model=origin.model if origin else str(model.cfg.model_name),
        fingerprint=origin.fingerprint if origin else model_fingerprint(model, layers),
        modules=output_modules(model, layers),
    )
    edit.require_same_model(model)
    return edit


def _by_layer(
    model: TransformerBridge, folder: str | os.PathLike[str], adapter: Adapter
) -> tuple[dict[int, Float[Tensor, "d_out _"]], dict[int, Float[Tensor, "_ d_in"]]]:
    """The factors by layer, lowest first, where they fit the model."""
    layers: dict[str, int] = {}
    for layer in range(len(model.blocks)):
        with suppress(ValueError):  # a layer that cannot be edited; the adapter may have nothing there
            layers[output_modules(model, [layer])[layer].name] = layer
    others = sorted(adapter.left.keys() - layers.keys())
    if others:
        raise ValueError(
            f"{folder} changes {shown(others[0])}, which is no MLP output matrix of {model.cfg.model_name} "
            f"that can be edited; {MERGE_INSTEAD}"
        )
    names = sorted(adapter.left, key=lambda name: layers[name])
    refuse_uneditable(model, [layers[name] for name in names])
    for name in names:
        wanted = tuple(mlp_output_matrix(model, layers[name]).shape)
        shape = adapter.left[name].shape[0], adapter.right[name].shape[1]
        if shape != wanted:
            raise ValueError(
                f"{folder} changes a matrix of {shape} in layer {layers[name]}, and that of "
                f"{model.cfg.model_name} is {wanted}; load the model that the adapter belongs on"
            )
    return (
        {layers[name]: adapter.left[name] for name in names},
        {layers[name]: adapter.right[name] for name in names},
    )
