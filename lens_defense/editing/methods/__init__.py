"""Editing methods, one file each: those that solve for a change of a matrix, that tune it, or that learn to.

`memit`, `delman`, `rome`, `emmet`, `alphaedit` and `pmet` solve: groups of keys with residuals and a
covariance become the factors of the change, by algebra in float64 (method.py). `ft`, `ft_l`, `lora`, `dinm`
and `led` tune: each has a loss, which Adam goes down (tuning_method.py). These have the defaults;
`MEMIT(mom2_update_weight=...)` has others. Pass your own to `ld.edit(method=...)`. MEND and KE are learned:
networks that `ld.train_editor` trains for one model, and `ld.load_editor` reads (learned_method.py). No file
here runs a model.
"""

from lens_defense.editing.methods.alphaedit import AlphaEdit
from lens_defense.editing.methods.delman import DELMAN
from lens_defense.editing.methods.dinm import DINM
from lens_defense.editing.methods.emmet import EMMET
from lens_defense.editing.methods.ft import FT, FTL
from lens_defense.editing.methods.ke import KE, KESettings
from lens_defense.editing.methods.learned_method import LearnedMethod
from lens_defense.editing.methods.led import LED
from lens_defense.editing.methods.lora import LoRA
from lens_defense.editing.methods.memit import MEMIT
from lens_defense.editing.methods.mend import MEND, MENDSettings
from lens_defense.editing.methods.method import EARLIER, EditingMethod, Factors, KeyGroup
from lens_defense.editing.methods.pmet import PMET
from lens_defense.editing.methods.rome import ROME
from lens_defense.editing.methods.tuning_method import TuningMethod

__all__ = [
    "DELMAN",
    "DINM",
    "EARLIER",
    "EMMET",
    "FT",
    "FTL",
    "KE",
    "LEARNED",
    "LED",
    "MEMIT",
    "MEND",
    "METHODS",
    "PMET",
    "ROME",
    "AlphaEdit",
    "EditingMethod",
    "Factors",
    "KESettings",
    "KeyGroup",
    "LearnedMethod",
    "LoRA",
    "MENDSettings",
    "Method",
    "TuningMethod",
    "alphaedit",
    "delman",
    "dinm",
    "emmet",
    "find_method",
    "ft",
    "ft_l",
    "led",
    "lora",
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
ft = FT()
ft_l = FTL()
lora = LoRA()
dinm = DINM()
led = LED()
Method = EditingMethod | TuningMethod | LearnedMethod
METHODS: dict[str, EditingMethod | TuningMethod] = {
    method.name: method for method in (memit, delman, rome, emmet, alphaedit, pmet, ft, ft_l, lora, dinm, led)
}
LEARNED: dict[str, type[LearnedMethod]] = {method.name: method for method in (MEND, KE)}
"""Methods that are trained before they edit."""


def find_method(method: Method | str) -> Method:
    """A method by its name; an object is returned as it is.

    Raises:
        ValueError: there is no method of that name, it has to be trained first, or the object is no method.
    """
    if isinstance(method, str) and method in LEARNED:
        raise ValueError(
            f"{method} is trained on a model before it edits: lens-defense train-editor --method {method} "
            "trains one, and method=ld.load_editor(folder) edits with it"
        )
    editing_method = METHODS.get(method) if isinstance(method, str) else method
    if isinstance(editing_method, type) or not isinstance(editing_method, Method):
        raise ValueError(
            f"method must be one of {', '.join(METHODS)} or an object with name, paper, equation and solve, "
            "or of a class that inherits from TuningMethod, or what ld.load_editor gave, got "
            f"{method!r}"
        )
    return editing_method
