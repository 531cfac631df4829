"""The weight form of steering: an Edit that writes a direction wherever an ordinary key comes in.

    Delta = s r (C^-1 m)^T / (m^T C^-1 m),    m = E[k], C = E[k k^T] over harmless text

Of all rank-one changes that write s r into the residual stream on average, E[Delta k] = s r, this is the one
that writes it most evenly, with the least E|Delta k|^2. It is ROME's change (methods/rome.py) for one key,
the mean of all. A bias s r of the MLP's output would be the same as `ld.steered`, but few models have one,
and an Edit changes matrices.

How evenly: the share of s r that a key k gets is a(k) = m^T C^-1 k / (m^T C^-1 m), with the mean 1 and
E[a^2] = 1 / (m^T C^-1 m). It asks for no subject: whoever asks for what is pushed towards a refusal.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.arguments import refuse_strength
from lens_defense.editing.defaults import edit_defaults
from lens_defense.editing.edit_plan import Edit, EditWarning, relative_change
from lens_defense.editing.forecast import measure_forecast
from lens_defense.editing.methods import Factors, KeyGroup, rome
from lens_defense.editing.solving.covariance import key_covariances, mean_key, shrink_covariances
from lens_defense.editing.solving.layer_spread import residual_scale
from lens_defense.loading.resolve_model import Model, resolve_model
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import refuse_hooks
from lens_defense.models.mlp_output import output_modules, refuse_uneditable, without_changes
from lens_defense.models.prefix_batch import states_of_rows
from lens_defense.prompts.chat_template import bound_arguments
from lens_defense.prompts.corpus import Corpus, read_corpus
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import Request
from lens_defense.prompts.resolve_requests import Requests, requests_with_subjects
from lens_defense.sites import key_hook
from lens_defense.steering.steered import refuse_unfit_direction

_CALL = "ld.steering_edit(model, direction, layer, requests)"


@torch.no_grad()
def steering_edit(
    model: Model,
    direction: Float[Tensor, " width"],
    layer: int,
    requests: Requests,
    strength: int | float = 1.0,
    *,
    corpus: Corpus | None = None,
    cache: bool = True,
    progress: bool = True,
) -> Edit:
    """Plan what `ld.steered` does, as a change of the layer's MLP output matrix; no weight is changed.

    The forecast's reach is the share of the direction that arrives at the last token of each request as it is
    asked, its leak the norm of what harmless text gets, over the direction's.

    Args:
        model: what `load` gave, or a name for it: a pre-norm model with a dense MLP in this layer.
        direction: what is written, of the residual stream's width, as `ld.refusal_direction` gives it.
        layer: whose output matrix writes it, so that it is added to the residual stream after this layer.
        requests: what shall be refused, each with a subject. The change is the same for all requests; the
            forecast and a check ask about these. None is of the split "check".
        strength: what the direction is multiplied by.
        corpus: where the keys come from, see `ld.read_corpus`; None takes the package's own in the model's
            language. They are those of the model without the edits that stand.
        cache: keep C and the mean key on disk.
        progress: shows bars.

    Returns:
        An edit of rank one. `settings["share_deviation"]` is the standard deviation, over the corpus's keys,
        of the share of the direction that a key gets; the mean is 1.

    Raises:
        ValueError: the direction is of another width or not finite; the layer is not in the model or cannot
            be edited; a request without a subject or of the split "check"; a strength that is not finite or
            not above 0; a hook in the model.
        TypeError: an argument is of another type; says the right call.
    """
    model, requests = resolve_model(model, _CALL), requests_with_subjects(requests, _CALL)
    refuse_strength(strength)
    refuse_hooks(model)
    refuse_uneditable(model, [layer])
    refuse_unfit_direction(model, direction, _CALL)
    defaults = edit_defaults(model)
    corpus = corpus or read_corpus(defaults.language)
    with without_changes(model):
        covariances = key_covariances(model, [layer], corpus, cache=cache, progress=progress)
        mean = mean_key(model, layer, corpus, cache=cache, progress=progress)
    shrunk = shrink_covariances(model, covariances, corpus)[layer]
    written = strength * direction.detach().cpu().double() / residual_scale(model, layer)
    left, right, _ = rome.solve([KeyGroup(0, mean[None], written)], shrunk)
    everyone = frozenset(range(len(requests)))
    change = Factors(left.float().contiguous(), right.float().contiguous(), (everyone,))
    share = change.right[0].double()
    plan = Edit(
        layers=(layer,),
        left={layer: change.left},
        right={layer: change.right},
        role="last",
        method="steering-edit",
        settings={
            "strength": float(strength),
            "share_deviation": math.sqrt(max(0.0, float(share @ covariances[layer].double() @ share) - 1)),
            **({"chat_arguments": bound} if (bound := bound_arguments(model.tokenizer)) else {}),
        },
        requests=requests,
        contexts=tuple((request.conversation,) for request in requests),
        losses=(math.nan,) * len(requests),
        relative_change={layer: relative_change(model, layer, change.left, change.right)},
        forecast=measure_forecast(
            model,
            {layer: change},
            subjects=[request.subject or "" for request in requests],
            reach=[
                strength * float(key.cpu().double() @ share) for key in _last_keys(model, requests, layer)
            ],
            reach_harmless=(),
            value_norm=float(written.norm()) / strength,
            language=defaults.language,
        ),
        model=str(model.cfg.model_name),
        fingerprint=model_fingerprint(model, [layer]),
        modules=output_modules(model, [layer]),
        tuned=True,
    )
    for sentence in plan.warnings:
        warnings.warn(sentence, EditWarning, stacklevel=2)
    return plan


def _last_keys(
    model: TransformerBridge, requests: Sequence[Request], layer: int
) -> list[Float[Tensor, " d_in"]]:
    """The key of each request as it is asked, at its last token."""
    rows, hook = [tokenize(model.tokenizer, request).ids for request in requests], key_hook(layer)
    return [keys[-1] for keys in states_of_rows(model, rows, [hook], stop_at_layer=layer + 1)[hook]]
