"""The refusal direction: what tells harmful requests from harmless ones in the residual stream.

    r = mean over harmful requests of x - mean over harmless requests of x

with x the residual stream after a layer, at the last token of the prompt, where the answer begins. Arditi et
al. 2024, "Refusal in language models is mediated by a single direction", section 2.3.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.context_length import refuse_too_long
from lens_defense.models.mlp_output import refuse_missing_layer
from lens_defense.models.prefix_batch import states_of_rows
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request
from lens_defense.prompts.resolve_requests import Requests, refuse_check_split, resolve_requests
from lens_defense.sites import component_hook

_CALL = "ld.refusal_direction(model, harmful, harmless, layer)"


def refusal_direction(
    model: Model, harmful: Requests, harmless: Requests, layer: int
) -> Float[Tensor, " d_model"]:
    """The mean state of harmful requests less that of harmless ones (Arditi et al. 2024, section 2.3).

    It has the length that it has: added once (`ld.steered` with strength 1) it takes the mean of the harmless
    to the mean of the harmful. To take a direction out, divide it by its norm.

    Args:
        model: what `load` gave, or a name for it; it is not changed.
        harmful: requests, texts or rows, or the name of a set; no subject is needed. None is of the split
            "check".
        harmless: likewise, of the same form: else the direction tells questions from commands.
        layer: it is read from the residual stream after this one, at the last token of each prompt.

    Returns:
        A vector of the residual stream, of the model's dtype and on its device.

    Raises:
        ValueError: there are no requests, or one is of the split "check" or too long for the model; the model
            has no such layer.
        TypeError: an argument is of another type; says the right call.
    """
    model = resolve_model(model, _CALL)
    refuse_missing_layer(model, layer)
    sides = [resolve_requests(requests, _CALL) for requests in (harmful, harmless)]
    for name, requests in zip(("harmful", "harmless"), sides, strict=True):
        if not requests:
            raise ValueError(f"no {name} requests were given; a direction needs some of both kinds")
        refuse_check_split(requests)
    states = [last_token_states(model, requests, layer) for requests in sides]
    means = [rows.double().mean(0) for rows in states]
    return (means[0] - means[1]).to(states[0].dtype)


@torch.no_grad()
def last_token_states(
    model: TransformerBridge, requests: Sequence[Request], layer: int, *, batch_size: int = 32
) -> Float[Tensor, "request d_model"]:
    """The residual stream after a layer, at the last token of each prompt.

    Raises:
        ValueError: a prompt is too long for the model.
    """
    hook = component_hook("resid_post", layer)
    rows = [tokenize(model.tokenizer, request).ids for request in requests]
    names = (request.id for request in requests)
    refuse_too_long(model, zip(names, map(len, rows), strict=True))
    states: list[Tensor] = []
    for start in range(0, len(rows), batch_size):
        batch = states_of_rows(model, rows[start : start + batch_size], [hook], stop_at_layer=layer + 1)
        states += [tokens[-1] for tokens in batch[hook]]
    return torch.stack(states)
