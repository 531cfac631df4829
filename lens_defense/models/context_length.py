"""How many tokens a model reads: what is longer is refused by name, before anything is run."""

from collections.abc import Iterable
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.prompts.request import UnfitRequest

_CONFIG_FIELDS = ("max_position_embeddings", "max_seq_len")
"""What configs call it; one without either has no end (BLOOM)."""


def context_length(model: TransformerBridge) -> int | None:
    """The most tokens of a prompt and its answer; None where there is no end."""
    config: Any = model.original_model.config
    config = config.get_text_config()
    return next((length for name in _CONFIG_FIELDS if (length := getattr(config, name, None))), None)


def refuse_too_long(model: TransformerBridge, tokens: Iterable[tuple[str, int]]) -> None:
    """Refuse what the model cannot read whole.

    Args:
        model: the model.
        tokens: what would be run, each by a name and with its number of tokens, the answer's among them.

    Raises:
        UnfitRequest: names what is too long, and how long it is.
    """
    limit = context_length(model)
    too_long = dict(sorted((name, number) for name, number in tokens if limit is not None and number > limit))
    if too_long:
        listed = ", ".join(f"{name} ({number})" for name, number in list(too_long.items())[:5])
        more = f" and {len(too_long) - 5} more" if len(too_long) > 5 else ""
        raise UnfitRequest(
            f"{model.cfg.model_name} reads {limit} tokens, a prompt and its answer together, and these have "
            f"more: {listed}{more}; shorten them or their answers, or leave them out"
        )
