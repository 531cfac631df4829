"""Why an edit does not go where a map is reddest.

An effect says where a state carries the answer. A site is also an address: an edit looks it up in other
prompts, so it must be one token there, with a key that belongs to the subject alone (`tracing.locate` has the
rules).
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lens_defense.plotting.theme import ROLE_WORDS
from lens_defense.prompts.request import Role
from lens_defense.sites import Site

_MANY_TOKENS = "these are many tokens, and an edit needs the address of one"
_SHARED = "subjects that begin alike share it"
_WHY_NOT: Mapping[Role, str] = {
    "template": _MANY_TOKENS,
    "before": _MANY_TOKENS,
    "subject_first": _SHARED,
    "subject_mid": _SHARED,
    "next": "it holds what was moved there from the subject, and is another token in other prompts",
    "after": _MANY_TOKENS,
    "last": "it collects what was moved there from the subject, and every prompt has it",
}
"""By role of a column. The subject's last token is an address like any other."""


def why_not_reddest(
    effects: Float[NDArray[np.float64], "layer column"], roles: Sequence[Role | None], sites: Sequence[Site]
) -> str:
    """A sentence on the column with the largest effect, where the sites stand at another one; else nothing.

    Args:
        effects: of one component.
        roles: of the columns; None is a gap.
        sites: of the component.
    """
    finite = np.nan_to_num(effects, nan=-np.inf)
    if not sites or not np.isfinite(finite).any():
        return ""
    role = roles[int(finite.max(0).argmax())]
    if role is None or role in {site.role for site in sites} or role not in _WHY_NOT:
        return ""
    return f"The reddest column, “{ROLE_WORDS[role]}”, is no site: {_WHY_NOT[role]}."
