"""What the options of a command mean: the requests of a source, and the settings of a trace."""

from collections.abc import Sequence
from typing import Any

import typer

from lens_defense.patching.trace_settings import TraceSettings
from lens_defense.prompts.request import Request
from lens_defense.prompts.request_files import chosen_requests, every_request


def read_harmful_requests(
    source: str,
    *,
    text_field: str | None,
    subject_field: str,
    limit: int | None,
    strict: bool,
    distinct: bool = False,
) -> list[Request]:
    """The harmful requests of a source that have a subject; how many others there are is said.

    Raises:
        ValueError: there are none.
    """
    rows = every_request(source, text=text_field, subject=subject_field, strict=strict)
    harmful = chosen_requests(rows, "edit", "harmful", distinct)
    traceable = [request for request in harmful if request.subject is not None]
    if not harmful:
        raise ValueError(
            f"{source} has no harmful request of the split edit among its {len(rows)} rows; set "
            "kind to harmful and split to edit, or leave both columns out"
        )
    if not traceable:
        raise ValueError(
            f"no request of {source} has a subject, the words of it that carry the harm: there is none in "
            f"the column {subject_field!r}; name the right one with --subject-field, or let "
            "ld.mark_subjects propose subjects in Python"
        )
    left_out = {
        "without a subject": len(harmful) - len(traceable),
        "about a subject that is there already": len(chosen_requests(rows, "edit", "harmful", False))
        - len(harmful),
        "benign or safe": sum(row.kind != "harmful" for row in rows),
        "of the splits tune and check": sum(row.kind == "harmful" and row.split != "edit" for row in rows),
    }
    counts = [f"{number} {what}" for what, number in left_out.items() if number]
    if counts:
        typer.echo(f"left out: {', '.join(counts)}")
    return traceable[:limit]


def trace_settings(
    everything: bool,
    layers: str | None,
    components: str | None,
    positions: str | None,
    min_difference: float,
) -> TraceSettings:
    """The settings of a trace; what is named changes what `everything` takes.

    Raises:
        ValueError: there is no such layer, component or role in any model.
    """
    changes: dict[str, Any] = {"min_difference": min_difference}
    if everything:
        changes |= {"positions": "all", "layers": "all"}
        changes["components"] = ["resid_post", "mlp_out", "attn_out"]
    if layers is not None:
        changes["layers"] = _layers(layers)
    if components is not None:
        changes["components"] = [name.strip() for name in components.split(",")]
    if positions is not None:
        changes["positions"] = (
            "all" if positions == "all" else [role.strip() for role in positions.split(",")]
        )
    return TraceSettings(**changes)


def listed_layers(text: str) -> list[int]:
    """Layers that are named one by one or from first to last.

    Raises:
        ValueError: they are not.
    """
    layers = _layers(text)
    if not isinstance(layers, list):
        raise ValueError(f"--layers names layers here, as in 3-7 or 4,6; got {text!r}")
    return layers


def _layers(text: str) -> Sequence[int] | int | str:
    """Layers as TraceSettings takes them."""
    if text == "all":
        return text
    try:
        if text.startswith("every-"):
            return int(text.removeprefix("every-"))
        chosen: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers = range(int(first), int(last or first) + 1)
            if not layers:
                raise ValueError
            chosen += layers
    except ValueError:
        raise ValueError(
            f"--layers is all, every-2, or layers as in 0,4,8-12, the lower one first; got {text!r}"
        ) from None
    return chosen
