"""What `lens-defense train-editor` does: find the layers, train MEND or KE there, and say how it went."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from lens_defense.app.traced_requests import trace_answered
from lens_defense.editing.tuning.editor_file import EDITOR_FILE
from lens_defense.editing.tuning.train_editor import EditorTraining, train_editor, training_losses
from lens_defense.loading.load import load
from lens_defense.models.language import language
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import requests as bundled_requests
from lens_defense.shown_text import shown
from lens_defense.sites import Site
from lens_defense.tracing.locate import locate


def train_to_folder(
    console: Console,
    *,
    name: str,
    requests: Sequence[Request] | None,
    layers: Sequence[int] | None,
    out: Path,
    method: str,
    training: EditorTraining,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Train an editor, or go on where a training in the same folder was stopped.

    Args:
        console: where progress goes.
        name: the model.
        requests: what the editor learns to make refused, each with a subject; None takes all of the model's
            own set that an edit may see.
        layers: whose matrices it changes; None takes those that a trace of the first requests finds.
        out: the folder of the checkpoint and the editor.
        method: "mend" or "ke".
        training: how long, and on how much.
        device: as of `load`.
        dtype: as of `load`.

    Returns:
        The editor's file.

    Raises:
        ValueError: as of `train_editor`; or no request can be traced.
    """
    model = load(name, device=device, dtype=dtype)
    own = requests or [item for item in bundled_requests(language(model)) if item.concrete]
    if layers is None:
        console.rule("[bold]trace")
        sites = locate(trace_answered(model, own))
    else:
        sites = tuple(Site("mlp_out", layer, "subject_last") for layer in layers)
    edited = ", ".join(str(layer) for layer in sorted({site.layer for site in sites}))
    console.rule("[bold]train")
    console.print(f"{method} for the layers {edited}, on {len(own)} requests", markup=False)
    train_editor(model, own, sites, out, method=method, training=training)
    last, editor = training_losses(out)[-1], out / EDITOR_FILE
    console.print(
        f"{last.step} steps; in the last ones: refusals given in unseen wordings {last.succeeded:.0%}, "
        f"{last.edit:.3f} nats per token of a refusal left, KL on all that is not edited {last.locality:.4f}",
        markup=False,
    )
    console.print(
        f"Written: {shown(editor, 2000)}; edit with ld.edit(..., method=ld.load_editor({str(out)!r}))",
        markup=False,
    )
    return editor
