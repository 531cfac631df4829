"""The language of a model: the bundled set that is written in it. The package's defaults follow it."""

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.prompts.request_files import BUNDLED_SETS

LANGUAGE_KEY = "lens_defense_language"
"""The field of a config that names a bundled set; the organism, which knows invented words alone, has it."""


def language(model: TransformerBridge) -> str:
    """The bundled set in a model's language: what its config says, else "core", which is English."""
    name = getattr(model.original_model.config, LANGUAGE_KEY, None)
    return name if name in BUNDLED_SETS else BUNDLED_SETS[0]
