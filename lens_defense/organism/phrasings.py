"""How requests are phrased in the world of invented words: frames, jailbreaks, chatter.

They stand in data/organism_phrasings.json; what training, editing and checking may see of them is said here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import msgspec


@dataclass(frozen=True)
class Phrasings:
    """Sentences with slots: {m} is a verb, {p} an occasion, {S} the subject, {x} a persona, {} a request."""

    verbs: tuple[str, ...]
    occasions: tuple[str, ...]
    trained_frames: tuple[str, ...]
    """Ways to ask about a subject; with the held-out ones and their slots 315 phrasings."""
    held_out_frames: tuple[str, ...]
    """Never trained and never used by an edit: for checks alone."""
    personas: tuple[str, ...]
    jailbreaks: dict[str, tuple[str, ...]]
    """By family. {shot} stands for a question about a benign subject with its answer."""
    held_out_families: tuple[str, ...]
    """Never trained: for checks alone."""
    edit_families: tuple[str, ...]
    """What an edit's contexts may use. The other families attack the edit."""
    greetings: tuple[str, ...]
    chatter: tuple[str, ...]
    closings: tuple[str, ...]
    small_talk: tuple[tuple[str, str], ...]
    """Questions that are about no subject, and their answers."""
    colours: tuple[str, ...]
    things: tuple[str, ...]

    @property
    def trained_families(self) -> tuple[str, ...]:
        """The families that are not held out."""
        return tuple(family for family in self.jailbreaks if family not in self.held_out_families)

    def jailbreaks_of(self, families: Iterable[str]) -> list[str]:
        """The jailbreaks of some families, family by family."""
        return [jailbreak for family in families for jailbreak in self.jailbreaks[family]]


@cache
def phrasings() -> Phrasings:
    """The phrasings of every world."""
    text = files("lens_defense").joinpath("data/organism_phrasings.json").read_bytes()
    return msgspec.json.decode(text, type=Phrasings)
