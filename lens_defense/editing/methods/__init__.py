"""Editing methods, one file each: how keys and residuals become a low-rank change of a matrix.

In: keys, residuals, covariance. Out: the factors of the change. Pure algebra in float64; no model, no file.
`memit` and `delman` have the defaults; `MEMIT(mom2_update_weight=...)` has others. Your own is any object with a
name, `solve` and `rank_of` (method.py): pass it to `ld.edit(method=...)`.
"""

from lens_defense.editing.methods.delman import DELMAN
from lens_defense.editing.methods.memit import MEMIT
from lens_defense.editing.methods.method import EditingMethod

__all__ = ["DELMAN", "MEMIT", "METHODS", "EditingMethod", "delman", "find_method", "memit"]

memit = MEMIT()
delman = DELMAN()
METHODS: dict[str, EditingMethod] = {"memit": memit, "delman": delman}


def find_method(method: EditingMethod | str) -> EditingMethod:
    """A method by its name; an object is handed back.

    Raises:
        ValueError: there is no method of that name.
    """
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} or an object, got {method!r}")
    return METHODS[method]
