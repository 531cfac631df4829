"""Edit: a change of MLP output matrices, planned but not made.

The change of a layer is left @ right. It is made by `Edit.applied` for a while, or by a Ledger for good.
"""

import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.display import card
from lens_defense.editing.export.lora_adapter import AdapterOrigin, write_adapter
from lens_defense.editing.forecast import Forecast
from lens_defense.editing.methods.method import refuse_unfit_factors
from lens_defense.models.fingerprint import Fingerprint, Part, model_fingerprint
from lens_defense.models.mlp_output import OutputModule, apply_change_, mlp_output_matrix, take_back_
from lens_defense.models.restoring_block import RestoringBlock
from lens_defense.models.weight_journal import Maker
from lens_defense.prompts.request import Request, Role
from lens_defense.shown_text import shown, shown_names
from lens_defense.storage import load as load_file
from lens_defense.storage import require_shapes
from lens_defense.storage import save as save_file

WEAK_REACH = 0.4
"""The share of a value below which it counts as not delivered."""
UNFITTED_LOSS = 0.3
"""Nats per token from which on a refusal counts as not fitted. In a demo run a subject at .40 was answered as
asked, and those up to .23 were refused."""


_KEEPS_AWAY = ("mom2_update_weight", "l2")
"""Settings of methods that let an edit write less where it is not meant; a method may have none of them."""


_TENSORS = ("left", "right", "key_rows")
"""Fields of an edit that a file keeps as tensors, by layer."""


class EditWarning(UserWarning):
    """What to know of a plan before it is applied: one of `Edit.warnings`."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Edit:
    """A plan: what would be added to which matrices, from what, and what is to be expected of it."""

    layers: tuple[int, ...]
    left: Mapping[int, Float[Tensor, "d_out rank"]]
    right: Mapping[int, Float[Tensor, "rank d_in"]]
    """The change of a layer is left @ right."""
    role: Role
    method: str
    settings: Mapping[str, Any]
    requests: tuple[Request, ...]
    contexts: tuple[tuple[str, ...], ...]
    """For each request, the conversations whose keys and values were used, harmless uses too."""
    losses: tuple[float, ...]
    """For each request, what is left of the fit: nats per token of the refusal."""
    relative_change: Mapping[int, float]
    """For each layer, the norm of the change over the norm of the matrix."""
    forecast: Forecast
    model: str
    fingerprint: Fingerprint
    """Of the model that the plan was made on; its weights are the layers' matrices."""
    request_names: tuple[tuple[str, ...], ...] = ()
    """For each request, the other spellings and names of its subject that were used."""
    modules: Mapping[int, OutputModule] = field(default_factory=dict)
    """By layer, the module of the matrix in plain transformers."""
    tuned: bool = False
    """Whether no rank is keyed on the tokens of the role: a method made it that tunes or is learned, or it
    writes everywhere."""
    key_rows: Mapping[int, Float[Tensor, "row d_in"]] = field(default_factory=dict)
    """By layer, the keys that the change was made for, for later edits that keep them: see kept_keys.py.

    Without a contrast a row per request; with one a row per context and harmless use, at most d_in. They are
    most of an edit's file: d_in rows of smollm2 are 9.4 MB per layer. Empty where an older version planned.
    """

    def __post_init__(self) -> None:
        if self.left or self.right:  # in a file the factors stand beside the rest
            self._refuse_malformed()

    def _refuse_malformed(self) -> None:
        """One sentence where layers and factors are no edit.

        Raises:
            ValueError: so it is.
        """
        wrong = [layer for layer in self.layers if type(layer) is not int or layer < 0]
        if wrong or not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"the layers of an edit are different whole numbers from 0, got {tuple(self.layers)}"
            )
        for layer in self.layers:
            if layer not in self.left or layer not in self.right:
                raise ValueError(f"this edit has no factors of layer {layer}; make it again with ld.edit")
            refuse_unfit_factors(layer, self.left[layer], self.right[layer])
        for layer, rows in self.key_rows.items():
            if layer not in self.layers or rows.dim() != 2 or rows.shape[1] != self.right[layer].shape[1]:
                raise ValueError(
                    f"the keys of layer {layer} do not fit this edit; make it again with ld.edit"
                )

    @property
    def rank(self) -> int:
        """The rank of the change in each layer."""
        return len(self.right[self.layers[0]])

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that the edit is about."""
        return tuple(item.subject or "" for item in self.requests)

    @property
    def texts(self) -> frozenset[str]:
        """Every conversation that the edit has seen."""
        return frozenset(text for texts in self.contexts for text in texts)

    @property
    def names(self) -> frozenset[str]:
        """Every other spelling and name of its subjects that the edit has seen."""
        return frozenset(name for names in self.request_names for name in names)

    @property
    def strength(self) -> float:
        """The factor of the values that it was planned with, times what it was scaled by since."""
        return float(self.settings.get("strength", 1.0)) * self.forecast.strength

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before the edit is applied, a sentence each; `ld.edit` warns with these."""
        sentences = []
        lever = next((name for name in _KEEPS_AWAY if name in self.settings), None)
        lowers = lever is not None and bool(self.settings[lever])
        weak = [
            f"{shown(subject)} ({reach:.2f})"
            for subject, reach in zip(self.forecast.subjects, self.forecast.reach, strict=True)
            if reach < WEAK_REACH
        ]
        if weak:
            sentences.append(
                f"less than {WEAK_REACH:.0%} of the value arrives in held-out contexts of: "
                f"{shown_names(weak)}; give other contexts or sites, "
                + (f"a lower {lever}, " if lowers else "")
                + "or more strength"
            )
        if self.forecast.risky:
            sentences.append(
                f"this edit leaks {self.forecast.leak_safe:.2f} of a value's norm into harmless text, where "
                f"{self.forecast.threshold} is much"
                + (
                    "; "  # every rank is of all requests
                    if self.tuned
                    else f"; most of it from: {shown_names(self.forecast.worst(3))}. Leave them out, "
                )
                + f"{f'raise {lever}, ' if lever else ''}or take less strength"
            )
        if not self.tuned and len(self.layers) > 1 and self.forecast.strength != 1:
            sentences.append(
                "this plan was scaled after its layers were solved for one another, so its forecast is to "
                f"first order alone; plan it with ld.edit(..., strength={self.strength:g})"
            )
        if not self.tuned and not self.role.startswith("subject"):
            sentences.append(
                f"keys at {self.role!r} hardly tell requests apart, so an edit there can refuse harmless "
                "ones too, whatever the forecast says; take sites at the subject, as "
                "ld.Site('mlp_out', 5, 'subject_last')"
            )
        unfitted = [
            subject for subject, loss in zip(self.subjects, self.losses, strict=True) if loss > UNFITTED_LOSS
        ]
        if unfitted:
            if "trained_steps" in self.settings:  # of a learned method
                advice = "train the editor for more steps or on more requests, or take more strength"
            elif self.tuned:
                advice = "raise steps or lr, or choose other sites"
            else:
                advice = "raise v_num_grad_steps or contexts_per_step, or choose other sites"
            sentences.append(
                f"the refusal could not be fitted for: {shown_names(unfitted)} (more than {UNFITTED_LOSS} "
                f"nats per token are left); {advice}"
            )
        return tuple(sentences)

    def scaled(self, strength: int | float) -> "Edit":
        """The same plan with its change times a strength; of several layers only nearby strengths are sound.

        Each layer is solved for keys that the layers below it have changed, so a change that is scaled as a
        whole fits less and less: on smollm2 an edit with a contrast lost most of its refusals at .85, and at
        1.2 refused harmless requests too. `ld.edit(..., strength=)` solves for a strength, from the values as
        they are cached, and did neither (docs/guides/edit.md).

        The strength is relative to this edit: `edit.scaled(2).scaled(0.5)` is this one. The forecast keeps
        what was measured (`forecast.measured`) and follows from it: leaks exactly, reach to first order
        (editing/forecast.py). What the fit left, `losses`, is of strength 1.

        Args:
            strength: finite, at least 0; 1 changes nothing, 0 makes an edit that does nothing.

        Raises:
            ValueError: it is another number, or none.
        """
        if not isinstance(strength, Real) or not math.isfinite(strength) or strength < 0:
            raise ValueError(f"strength must be a finite number of at least 0, got {strength!r}")
        strength = float(strength)
        return replace(
            self,
            left={layer: (left.double() * strength).to(left.dtype) for layer, left in self.left.items()},
            relative_change={layer: change * strength for layer, change in self.relative_change.items()},
            forecast=self.forecast.scaled(strength),
        )

    def deltas(self) -> dict[int, Float[Tensor, "d_out d_in"]]:
        """The change of each layer, in float64."""
        self._refuse_malformed()
        return {layer: self.left[layer].double() @ self.right[layer].double() for layer in self.layers}

    def require_same_model(self, model: TransformerBridge, *, weights: bool = True) -> None:
        """One sentence where the model is not the one that the edit was planned on.

        Args:
            model: the model.
            weights: False leaves the weights out, where a ledger knows that they are right.

        Raises:
            ValueError: the layers' weights, the config or the tokenizer differ.
        """
        now = model_fingerprint(model, self.layers if weights else ())
        parts: list[Part] = ["weights", "config", "tokenizer"] if weights else ["config", "tokenizer"]
        differing = self.fingerprint.differing(now, *parts)
        if differing:
            raise ValueError(
                f"this edit was planned on other {differing} of {shown(self.model)} than this model has now; "
                "undo what stands in the way, load the model it was planned on, or plan it again with ld.edit"
            )

    def applied(self, model: TransformerBridge) -> RestoringBlock[TransformerBridge]:
        """Make the change for the length of a `with` block; afterwards no bit differs.

        Raises:
            ValueError: the model is not the one that the edit was planned on, or another thread is inside
                such a block of the same model.
        """
        maker = Maker(threading.get_ident())

        def apply() -> TransformerBridge:
            apply_change_(model, self.deltas(), refuse=partial(self.require_same_model, model), maker=maker)
            return model

        return RestoringBlock(apply, partial(take_back_, model, maker), maker)

    def summary(self) -> pd.DataFrame:
        """One row per layer: rank, relative norm of the change."""
        rows = [(layer, self.rank, self.relative_change[layer]) for layer in self.layers]
        return pd.DataFrame(rows, columns=pd.Index(["layer", "rank", "relative change"]))

    def __repr__(self) -> str:
        strength = "" if self.strength == 1 else f"strength {self.strength:g}, "
        return (
            f"Edit ({shown(self.method)}) of {shown(self.model)}, not applied: "
            f"layers {', '.join(map(str, self.layers))} at {self.role}, rank {self.rank}, {strength}"
            f"relative change {max(self.relative_change.values()):.3f} at most\n{self.forecast}"
        )

    def _repr_html_(self) -> str:
        facts = {"model": self.model, "sites at": self.role, "requests": len(self.requests)}
        facts |= {} if self.strength == 1 else {"strength": f"{self.strength:g}"}
        tables = self.summary().round(4), self.forecast.shown_table()
        return card(f"Edit by {self.method}, not applied", facts, *tables, rows=24)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write as safetensors with a JSON header, whole or not at all."""
        tensors = {
            f"{name}.{layer}": tensor
            for name in _TENSORS
            for layer, tensor in sorted(getattr(self, name).items())
        }
        return save_file(path, "edit", replace(self, left={}, right={}, key_rows={}), tensors)

    def to_peft(self, folder: str | os.PathLike[str]) -> Path:
        """Write the change as a LoRA adapter, which peft loads onto the model that it was planned on.

        The folder holds factors and no request. peft is not needed here, nor by `ld.load_adapter`, which
        reads it back.

        Args:
            folder: a new or empty folder.

        Raises:
            ValueError: the folder exists and is not empty; or the edit does not know its modules, since an
                older version planned it.
        """
        return adapter_of((self,), folder, self.fingerprint)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TransformerBridge | None = None) -> "Edit":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: the model it is meant for, to be refused at once where it is another one.

        Raises:
            ValueError: there is no such file, it holds no edit or is damaged, or it was planned on another
                model.
        """
        edit, tensors = load_file(path, "edit", cls)
        shapes: dict[str, tuple[str, str]] = {}
        for layer in edit.layers:
            shapes[f"left.{layer}"], shapes[f"right.{layer}"] = (
                ("d_out", f"rank {layer}"),
                (f"rank {layer}", "d_in"),
            )
            if (name := f"key_rows.{layer}") in tensors:  # older versions wrote none
                shapes[name] = (f"key row {layer}", "d_in")
        require_shapes(path, tensors, shapes)
        if model is not None:
            edit.require_same_model(model)
        by_layer = {
            name: {layer: tensors[key] for layer in edit.layers if (key := f"{name}.{layer}") in tensors}
            for name in _TENSORS
        }
        loaded = replace(edit, **by_layer)
        loaded._refuse_malformed()
        return loaded


def relative_change(
    model: TransformerBridge, layer: int, left: Float[Tensor, "d_out rank"], right: Float[Tensor, "rank d_in"]
) -> float:
    """The norm of a layer's change over that of its matrix.

    |B A|^2 = tr(B^T B A A^T), so the product itself is not made.
    """
    left, right = left.double(), right.double()
    squared = ((left.T @ left) * (right @ right.T)).sum().clamp(min=0)
    return float(squared.sqrt().cpu() / mlp_output_matrix(model, layer).double().norm().cpu())


def adapter_of(edits: Sequence[Edit], folder: str | os.PathLike[str], fingerprint: Fingerprint) -> Path:
    """Write edits that stand on one another as one LoRA adapter.

    Args:
        edits: at least one, of one model.
        folder: a new or empty folder.
        fingerprint: of the model without them, over all of their layers.

    Raises:
        ValueError: the folder exists and is not empty; or an edit does not know its modules.
    """
    if any(layer not in edit.modules for edit in edits for layer in edit.layers):
        raise ValueError(
            "this edit does not name the modules that it changes, as those that ld.edit plans do; plan it "
            "again"
        )
    modules = {layer: edit.modules[layer] for edit in edits for layer in edit.layers}
    origin = AdapterOrigin(
        model=edits[0].model,
        method=" and ".join(dict.fromkeys(edit.method for edit in edits)),
        role=edits[0].role,
        fingerprint=fingerprint,
    )
    return write_adapter(
        folder, dict(sorted(modules.items())), [(edit.left, edit.right) for edit in edits], origin
    )
