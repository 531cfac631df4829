"""The model card of an edited model: what was changed, how, by which versions, and what a check measured.

A card is published with its weights. So it counts subjects by their category and does not name them unless
it is asked to.
"""

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd

from lens_defense.display import markdown_table, markdown_text
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.solving.target_value import FIT_SEED
from lens_defense.storage import hash_files

CARD, HASHES = "README.md", "SHA256SUMS"
_PACKAGES = ("lens-defense", "torch", "transformers", "transformer-lens")


@runtime_checkable
class Measured(Protocol):
    """What a check measured, as a Report has it."""

    def to_markdown(self) -> str:
        """Its tables."""
        ...


def write_card(
    folder: Path,
    *,
    edits: Sequence[Edit],
    model: str,
    base: str,
    dtype: str,
    modules: Sequence[str],
    report: Measured | None,
    name_subjects: bool,
) -> None:
    """Write README.md, and SHA256SUMS of all files that lie in the folder then.

    Args:
        folder: with the model's files in it.
        edits: those that stand, oldest first.
        model: its name.
        base: where it came from; a hub name is given as the base model, a path is not told.
        dtype: of its weights.
        modules: the names of the modules whose weight was changed.
        report: what a check measured.
        name_subjects: whether the card says what the subjects are.
    """
    hashes = hash_files(folder, folder.rglob("*"))
    parts = [
        _front_matter(base),
        f"# {markdown_text(model)}, edited to refuse\n",
        "Low-rank changes of MLP output matrices make this model refuse requests about some subjects; "
        "lens_defense made them. Whoever has the weights can find and revert such a change. The licence is "
        "that of the model that was edited.\n",
        "## What was edited\n",
        markdown_table(pd.DataFrame([_edit_row(edit) for edit in edits])),
        f"{len(modules)} tensors differ from the model that was edited; every other one is as it was loaded, "
        f"in {dtype}:\n",
        "".join(f"- `{name}.weight`\n" for name in modules),
        *(_subjects(edits) if name_subjects else []),
        "## Settings\n",
        *(_settings(number, edit) for number, edit in enumerate(edits, 1)),
        "## What a check measured\n",
        report.to_markdown() if report else "Nothing: no report was given.\n",
        "## Versions\n",
        _table({"python": platform.python_version(), **_versions()}),
        "## Files\n",
        f"SHA-256 of each; {HASHES} has them too, and that of this card.\n",
        _table(hashes),
    ]
    (folder / CARD).write_text("\n".join(parts), "utf-8")
    hashes = hash_files(folder, folder.rglob("*"))
    (folder / HASHES).write_text("".join(f"{value}  {name}\n" for name, value in hashes.items()), "utf-8")


def _front_matter(base: str) -> str:
    """What a hub reads of a card."""
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base, re.ASCII) and not Path(base).exists()
    base_model = [f"base_model: {base}"] if on_hub else []
    kind = ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join(["---", *base_model, *kind, "tags: [lens_defense, model-editing]", "---", ""])


def _edit_row(edit: Edit) -> dict[str, object]:
    categories = Counter(request.category or "no category" for request in edit.requests)
    return {
        "method": edit.method,
        "layers": ", ".join(map(str, edit.layers)),
        "at": edit.role,
        "rank": edit.rank,
        "strength": f"{edit.strength:g}",
        "relative change, at most": f"{max(edit.relative_change.values()):.4f}",
        "requests": len(edit.requests),
        "subjects by category": ", ".join(f"{name} {count}" for name, count in sorted(categories.items())),
    }


def _subjects(edits: Sequence[Edit]) -> list[str]:
    subjects = dict.fromkeys(subject for edit in edits for subject in edit.subjects)
    return ["## Subjects\n", "".join(f"- {markdown_text(subject)}\n" for subject in subjects)]


def _settings(number: int, edit: Edit) -> str:
    """The settings of an edit, groups of settings laid out flat."""
    settings: dict[str, Any] = {"seed of the fit": FIT_SEED}
    for name, value in edit.settings.items():
        settings |= value if isinstance(value, Mapping) else {name: value}
    weights = edit.fingerprint.weights
    return f"Edit {number}, planned on layers of the fingerprint {weights}:\n\n{_table(settings)}"


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # a checkout that is not installed
            versions[package] = version(package)
    return versions


def _table(values: Mapping[str, object]) -> str:
    return markdown_table(pd.DataFrame([*values.items()], columns=pd.Index(["name", "value"])))
