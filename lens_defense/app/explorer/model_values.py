"""What the page is given of the model and its requests: all that can be chosen, and what could be asked."""

from collections.abc import Sequence
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.app.explorer import page_values
from lens_defense.app.explorer.choices import METRICS, STRONGEST
from lens_defense.app.explorer.map_values import component_choices
from lens_defense.editing.methods import METHODS
from lens_defense.models.language import language
from lens_defense.prompts.harmless_uses import same_subject_requests
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import bundled_rows
from lens_defense.shown_text import shown, truncate

_COMPONENTS = ("resid_post", "mlp_out", "attn_out")
_QUESTION_LETTERS = 400


def model_values(model: TransformerBridge, name: str, requests: Sequence[Request]) -> dict[str, Any]:
    """What does not change: the model, and what can be chosen."""
    rows = bundled_rows(language(model), "jailbreaks")
    return {
        "name": name,
        "layers": model.cfg.n_layers,
        "requests": page_values.request_values(requests),
        "methods": list(METHODS),
        "metrics": list(METRICS),
        "components": [choice for choice in component_choices() if choice[0] in _COMPONENTS],
        "strongest": STRONGEST,
        "templates": [(row["id"], row["family"]) for row in rows],
        "suggestions": _suggested_questions(language(model), requests),
    }


def template_texts(model: TransformerBridge) -> dict[str, str]:
    """The jailbreak templates of the model's set, by id."""
    return {row["id"]: row["text"] for row in bundled_rows(language(model), "jailbreaks")}


def _suggested_questions(name: str, requests: Sequence[Request]) -> list[dict[str, Any]]:
    """For each request, the request itself and harmless questions about the same subject."""
    return [
        {
            "id": shown(item.id),
            "harmful": truncate(item.text, _QUESTION_LETTERS),
            "harmless": [
                truncate(question.text, _QUESTION_LETTERS)
                for _, question in same_subject_requests(name, [item], "check")[:4]
            ],
        }
        for item in requests
    ]
