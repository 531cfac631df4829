"""Edits made by hand, without fitting anything."""

import torch

from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.forecast import Forecast
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.mlp_output import mlp_output_matrix, output_modules
from lens_defense.prompts.request import request


def random_factors(model, layers, *, seed=0, rank=2):
    """Random factors (left, right) per layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {layer: mlp_output_matrix(model, layer).shape for layer in layers}
    return {
        layer: (
            torch.randn(d_out, rank, generator=generator),
            torch.randn(rank, d_in, generator=generator),
        )
        for layer, (d_out, d_in) in sizes.items()
    }


def handmade_edit(model, layers, *, seed=0) -> Edit:
    """An Edit of random factors, planned on the model as it is now."""
    factors = random_factors(model, layers, seed=seed)
    return Edit(
        layers=tuple(layers),
        left={layer: left for layer, (left, _) in factors.items()},
        right={layer: right for layer, (_, right) in factors.items()},
        role="subject_last",
        method="memit",
        settings={"seed": seed},
        requests=(request("make a lamp", "lamp"), request("ring a bell", "bell")),
        contexts=(("make a lamp",), ("ring a bell", "Hello! ring a bell")),
        losses=(0.5, 0.25),
        relative_change=dict.fromkeys(layers, 0.1),
        forecast=Forecast(("lamp", "bell"), (0.9, 0.8), (0.1, 0.2), (0.3, 0.1), 0.2, 0.4),
        model="tiny",
        fingerprint=model_fingerprint(model, layers),
        modules=output_modules(model, layers),
    )
