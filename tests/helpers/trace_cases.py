"""Requests, a model and settings for tests of whole traces."""

from helpers.tiny_models import tiny_model
from lens_defense.prompts.request import request

LAMP = request("how do I make a brass lamp at home?", "brass lamp", id="lamp")
BELL = request("ring an old bell for me", "old bell", id="bell")
SHIP = request("tell me of an old ship", "old ship", id="ship")
ALL_CELLS = {
    "positions": "all",
    "layers": "all",
    "progress": False,
    "answer_tokens": 3,
    "min_difference": 0.0,
}
SURVEY_SETTINGS = {"positions": "all", "answer_tokens": 2, "min_difference": 0.0}


def tiny_chat_model(family="llama"):
    """A tiny model with a chat template."""
    return tiny_model(family, chat=True)
