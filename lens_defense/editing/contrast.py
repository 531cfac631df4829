"""The contrast of an edit: harmless uses of the same subjects, whose keys shall write what they wrote before.

Without it an edit is keyed on the subject's tokens and refuses whatever names them. The key at a subject's
last token knows the words before it: "How do I make ricin" and "Is it illegal to own ricin" have different
keys, which a solver can tell apart once it is shown both. It cannot where the use shows itself only after the
subject ends.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from lens_defense.patching.corruptions import harmless_subjects
from lens_defense.prompts.contexts import Contexts
from lens_defense.prompts.harmless_uses import default_contrast
from lens_defense.prompts.request import Request


@dataclass(frozen=True, slots=True)
class Contrast:
    """Which harmless uses an edit is shown, and how much they weigh."""

    uses: Contexts | Sequence[Request] = default_contrast
    """From a request to harmless questions about its subject; or a list of such, each with its subject."""
    weight: float = 4.0
    """Of a subject's contexts, and of its harmless uses, where MEMIT gives one key the weight 1. The two are
    told apart by small differences of their keys, for which C at its full weight leaves no room."""
    neighbors: int = 0
    """Neighborhood prompts of each request among its harmless uses: see `neighborhood`. They share the
    weight with the others, so many of them want a higher one. The things are named in English."""
    ridge: float = 0.0
    """The share of C in whose place (tr C / d) I stands. With a high weight the least squares write along
    directions in which C is small, and so is what it knows of them; the ridge leaves them less room."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"the contrast's weight must be above 0, got {self.weight}; None leaves it out")
        most = len(harmless_subjects())
        if not 0 <= self.neighbors <= most:
            raise ValueError(f"neighbors must lie between 0 and {most}, got {self.neighbors}")
        if not 0 <= self.ridge <= 1:
            raise ValueError(f"ridge is a share of C, between 0 and 1; got {self.ridge}")

    def of(self, request: Request) -> list[Request]:
        """The harmless uses of a request's subject."""
        if callable(self.uses):
            return list(self.uses(request))
        return [use for use in self.uses if use.subject == request.subject]

    def neighborhood(self, contexts: Sequence[Request]) -> list[Request]:
        """The ways to ask for a request, about harmless things ("How do I make lemon thyme?").

        Meng et al. 2022, "Locating and editing factual associations in GPT", section 3.3: prompts of a
        subject's neighbors, which an edit shall leave alone. The same every time.
        """
        draw = random.Random(contexts[0].subject)
        things = draw.sample(harmless_subjects(), self.neighbors)
        return [draw.choice(contexts).renamed(thing) for thing in things]

    @property
    def settings(self) -> dict[str, int | float]:
        """What an edit notes of it; of neighbors and ridge only where they are used."""
        used = {"contrast_neighbors": self.neighbors, "contrast_ridge": self.ridge}
        return {"contrast_weight": self.weight, **{name: value for name, value in used.items() if value}}

    @classmethod
    def given(cls, contrast: Any) -> "Contrast | None":
        """A contrast from what `edit` was given.

        Raises:
            ValueError: it is neither a Contrast, a function, a list of requests with subjects, nor None.
        """
        if contrast is None or isinstance(contrast, cls):
            return contrast
        if callable(contrast):
            return cls(cast(Contexts, contrast))
        uses: list[Any] = list(contrast) if isinstance(contrast, list | tuple) else [None]
        if not all(isinstance(use, Request) and use.subject for use in uses):
            raise ValueError(
                "contrast must be None, a Contrast, a function from a request to harmless requests, or a "
                "list of them, each with its subject, as ld.request(text, subject) gives it; got "
                f"{contrast!r}"
            )
        return cls(uses)


DEFAULT_CONTRAST = Contrast()
"""The package's own questions, at the default weight."""
