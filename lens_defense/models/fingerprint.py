"""Which model it is: hashes of its weights, its config, its tokenizer and its chat template, by name.

Who keeps something for later compares the parts that it depends on, so that a refusal says what differs:

- Covariances and fitted values, in the cache: weights and config. The same weights with another activation or
  epsilon have other keys. What the tokenizer and the template do is in the token ids, which are in the key.
- A survey: all four. The tokenizer and the template decide how a request reads and where its roles lie.
- An edit: weights (of the edited layers), config and tokenizer. Under another tokenizer its subjects have
  other ids, and so other keys. Not the template: whether an edit holds under another system prompt is a
  question that `check` should be able to ask.
- A trace and an edit on one page: config, tokenizer and template. Their weights are hashes of different sets:
  a trace's of all, an edit's of its layers, so that edits of other layers may stand beneath it.

An edit that stands is undone by the layers' weights alone: the model is in hand.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.prompts.tokenizer_hash import chat_template_hash, tokenizer_hash

Part = Literal["weights", "config", "tokenizer", "chat_template"]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Hashes of what makes a model the one that it is."""

    weights: str
    """With dtypes and shapes; of all parameters and buffers, or of some layers' MLP output matrices."""
    config: str = ""
    """Of what the config says on how to compute: not of names, versions, token ids or dtypes."""
    tokenizer: str = ""
    chat_template: str = ""

    def parts(self, *names: Part) -> dict[str, str]:
        """Some of the hashes by name."""
        return {name: getattr(self, name) for name in names}

    def differing(self, other: "Fingerprint", *names: Part) -> str:
        """Which of some parts differ from another's, in words; empty where none does."""
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        return " and ".join(name.replace("_", " ") for name in differing)

    def __str__(self) -> str:
        named = {"config": self.config, "tokenizer": self.tokenizer, "chat template": self.chat_template}
        return ", ".join([self.weights, *(f"{name} {value}" for name, value in named.items() if value)])


def model_fingerprint(model: TransformerBridge, layers: Iterable[int] | None = None) -> Fingerprint:
    """The fingerprint of a model as it is now.

    Args:
        model: the model.
        layers: the layers whose MLP output matrices are hashed; None takes every parameter and buffer.
    """
    return Fingerprint(
        weights=weights_fingerprint(model, layers),
        config=_config_hash(model),
        tokenizer=tokenizer_hash(model.tokenizer),
        chat_template=chat_template_hash(model.tokenizer),
    )


_WITHOUT_EFFECT = {
    *("name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "attn_implementation"),
}
"""Fields of a config that do not change what a forward pass computes, or that the weights' hash has; so are
those whose names begin with an underscore, and ids of tokens."""


def _config_hash(model: TransformerBridge) -> str:
    config: Any = model.original_model.config
    fields = config.to_diff_dict()
    text = json.dumps(_effective(fields), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _effective(fields: Any) -> Any:
    """Fields without those that have no effect, in nested configs too."""
    if not isinstance(fields, dict):
        return fields
    return {
        str(name): _effective(value)
        for name, value in fields.items()
        if not (name in _WITHOUT_EFFECT or str(name).startswith("_") or str(name).endswith("_token_id"))
    }
