"""What `edit` takes where it is not told, by the language of the model."""

from dataclasses import dataclass, field

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.contrast import DEFAULT_CONTRAST, Contrast
from lens_defense.editing.solving.target_value import FitSettings
from lens_defense.models.language import language
from lens_defense.prompts.contexts import Contexts, default_contexts, jailbroken_contexts


@dataclass(frozen=True, slots=True)
class EditDefaults:
    """The defaults for one language."""

    language: str
    """The bundled set that the corpus of C and the forecast's texts come from."""
    contexts: Contexts = default_contexts
    contrast: Contrast | None = DEFAULT_CONTRAST
    fit: FitSettings = field(default_factory=FitSettings)


_ORGANISM = EditDefaults(
    "organism",
    contexts=jailbroken_contexts,  # it refuses harmful requests by itself, unless jailbroken
    contrast=None,  # its world has no harmless use of a harmful subject
    fit=FitSettings(v_lr=0.4, shared_lr=0.4),  # its residual stream is smaller
)


def edit_defaults(model: TransformerBridge) -> EditDefaults:
    """The defaults for a model's language."""
    name = language(model)
    return _ORGANISM if name == "organism" else EditDefaults(name)
