"""Learned methods as files: the network's tensors, and a header that says whose model it edits.

The organism's two come with the package, as "organism-mend" and "organism-ke" (analyses/learned_editors.py).
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from lens_defense.arguments import wrong_argument
from lens_defense.editing.methods import LEARNED, LearnedMethod
from lens_defense.editing.methods.learned_method import EditorOrigin, MatrixShape
from lens_defense.shown_text import shown
from lens_defense.storage import load, require_shapes, save

EDITOR_FILE = "editor.safetensors"
"""The name of a trained editor in its folder."""
_BUNDLED = Path(__file__).parents[2] / "data" / "organism_editors"


@dataclass(frozen=True, slots=True)
class _Header:
    """What a file says beside the tensors."""

    method: str
    settings: Mapping[str, Any]
    layers: tuple[int, ...]
    shape: MatrixShape
    origin: EditorOrigin


def save_editor(path: str | os.PathLike[str], method: LearnedMethod) -> Path:
    """Write a trained method as safetensors with a JSON header, whole or not at all.

    Raises:
        ValueError: it was not trained.
    """
    if method.origin is None:
        raise ValueError(f"this {method.name} was not trained, so there is nothing to keep")
    header = _Header(method.name, asdict(method.settings), method.layers, method.shape, method.origin)
    return save(path, "editor", header, method.state_dict())


def load_editor(source: str | os.PathLike[str]) -> LearnedMethod:
    """Read a learned method, for `ld.edit(model, requests, sites, method=...)`.

    Args:
        source: the folder that `train_editor` wrote, the file in it, or "organism-mend" or "organism-ke".

    Raises:
        ValueError: there is no such file, it holds no editor, or is damaged.
        TypeError: the source is no path.
    """
    if not isinstance(source, str | os.PathLike):
        raise wrong_argument("ld.load_editor(folder)", "folder must be a path", source)
    path = Path(source)
    bundled = _BUNDLED / f"{os.fspath(source).removeprefix('organism-')}.safetensors"
    if os.fspath(source) in {f"organism-{name}" for name in LEARNED}:
        path = bundled
    elif path.is_dir():
        path = path / EDITOR_FILE
    header, tensors = load(path, "editor", _Header)
    if header.method not in LEARNED:
        raise ValueError(
            f"{path} holds an editor of the method {shown(header.method)!r}, and this version knows "
            f"{', '.join(LEARNED)}; make it again"
        )
    kind = LEARNED[header.method]
    try:
        method = kind(msgspec.convert(header.settings, kind.Settings), header.layers, header.shape)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds no {header.method} that this version can build ({error}); train it again"
        ) from error
    require_shapes(path, tensors, {name: tuple(value.shape) for name, value in method.state_dict().items()})
    method.load_state_dict(tensors)
    method.origin = header.origin
    return method.requires_grad_(False)
