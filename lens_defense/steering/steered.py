"""Steering: a direction is added to the residual stream of every token, as long as a block lasts.

    x' = x + strength * r        after one layer, at every token of prompts and answers

Arditi et al. 2024, "Refusal in language models is mediated by a single direction", section 2.4 ("activation
addition"). No weight is changed.
"""

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import refuse_strength, wrong_argument
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.forward import model_device, temporary_hooks
from lens_defense.models.mlp_output import refuse_missing_layer
from lens_defense.models.restoring_block import RestoringBlock
from lens_defense.sites import component_hook

_CALL = "ld.steered(model, direction, layer)"


def steered(
    model: Model, direction: Float[Tensor, " width"], layer: int, strength: int | float = 1.0
) -> RestoringBlock[TransformerBridge]:
    """Add a direction to the residual stream after a layer, at every token, for the length of a `with` block.

    Whatever runs inside meets it: answers, checks, traces, other hooks that read the stream there. Blocks add
    up. Edits are planned outside.

    Args:
        model: what `load` gave, or a name for it. It is the value of `with ... as`.
        direction: what is added, of the residual stream's width, as `ld.refusal_direction` gives it.
        layer: after which one.
        strength: what the direction is multiplied by; with 1 it is added as it is, as in the paper.

    Raises:
        ValueError: the direction is of another width or not finite, the model has no such layer, or the
            strength is not finite or not above 0.
        TypeError: an argument is of another type; says the right call.
    """
    model = resolve_model(model, _CALL)
    refuse_strength(strength)
    refuse_missing_layer(model, layer)
    refuse_unfit_direction(model, direction, _CALL)
    added = (strength * direction.detach().cpu().double()).to(model_device(model), model.embed.weight.dtype)

    def add(state: Tensor, **_: object) -> Tensor:
        return state + added.to(state.device, state.dtype)

    return temporary_hooks(model, [(component_hook("resid_post", layer), add)])


def refuse_unfit_direction(model: TransformerBridge, direction: Tensor, call: str) -> None:
    """Refuse what is no direction of a model's residual stream.

    Raises:
        ValueError: it is of another shape, of whole numbers, or not finite.
        TypeError: it is no tensor.
    """
    if not isinstance(direction, Tensor):
        raise wrong_argument(call, "direction must be a tensor, as ld.refusal_direction gives it", direction)
    width = model.cfg.d_model
    if direction.shape != (width,) or not direction.is_floating_point():
        kind = str(direction.dtype).removeprefix("torch.")
        raise ValueError(
            f"a direction of {model.cfg.model_name} is a vector of {width} real numbers, got "
            f"{list(direction.shape)} of {kind}"
        )
    if not direction.isfinite().all():
        raise ValueError("the direction is not finite; read it again with ld.refusal_direction")
