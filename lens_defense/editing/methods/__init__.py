"""Editing methods, one file each: how keys and residuals become a low-rank change of a matrix.

In: groups of keys with residuals, covariance. Out: the factors of the change. Pure algebra in float64; no
model, no file. `memit`, `delman`, `rome`, `emmet`, `alphaedit` and `pmet` have the defaults;
`MEMIT(mom2_update_weight=...)` has others. Your own is any object of the protocol in method.py: pass it to
`ld.edit(method=...)`.
"""

from lens_defense.editing.methods.alphaedit import AlphaEdit
from lens_defense.editing.methods.delman import DELMAN
from lens_defense.editing.methods.emmet import EMMET
from lens_defense.editing.methods.memit import MEMIT
from lens_defense.editing.methods.method import EARLIER, EditingMethod, Factors, KeyGroup
from lens_defense.editing.methods.pmet import PMET
from lens_defense.editing.methods.rome import ROME

__all__ = [
    "DELMAN",
    "EARLIER",
    "EMMET",
    "MEMIT",
    "METHODS",
    "PMET",
    "ROME",
    "AlphaEdit",
    "EditingMethod",
    "Factors",
    "KeyGroup",
    "alphaedit",
    "delman",
    "emmet",
    "find_method",
    "memit",
    "pmet",
    "rome",
]

memit = MEMIT()
delman = DELMAN()
rome = ROME()
emmet = EMMET()
alphaedit = AlphaEdit()
pmet = PMET()
METHODS: dict[str, EditingMethod] = {
    method.name: method for method in (memit, delman, rome, emmet, alphaedit, pmet)
}


def find_method(method: EditingMethod | str) -> EditingMethod:
    """A method by its name; an object is returned as it is.

    Raises:
        ValueError: there is no method of that name, or the object is no method.
    """
    editing_method = METHODS.get(method) if isinstance(method, str) else method
    if isinstance(editing_method, type) or not isinstance(editing_method, EditingMethod):
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or an object with name, paper, equation and solve, "
            f"got {method!r}"
        )
    return editing_method
