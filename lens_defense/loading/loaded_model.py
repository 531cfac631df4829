"""The check that a model is one that `load` gave."""

from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from lens_defense.arguments import wrong_argument


def loaded_model(model: Any, call: str) -> TransformerBridge:
    """The model, if it is one that is loaded.

    Args:
        model: what was given.
        call: the right call, for the message.

    Raises:
        TypeError: it is something else; says what to do.
    """
    if isinstance(model, TransformerBridge):
        return model
    if isinstance(model, PreTrainedModel):
        hint = "wrap it first: model = ld.load(hf_model, tokenizer)"
    else:
        hint = 'model = ld.load("smollm2") gives one'
    raise wrong_argument(call, "model must be a model that ld.load gave", model, hint)
