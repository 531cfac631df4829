# %% [markdown]
# # What severing and an edit change of a map
# ROME's question (Meng et al. 2022, figure 3) on smollm2: of what restoring a state of the subject's last token brings
# back, how much passes through later MLPs, how much through later attention? And the map before and after an edit of
# eight subjects, both by the answers of before. That one is in nats, patched less corrupted: after an edit the clean
# prompt may give the old answer less than the corrupted one does, and a share of such a difference says nothing.
# Committed are effects and roles, no request and no answer. Traces that are there are not made again.
#
#     python analyses/map_changes.py

# %%
from pathlib import Path
from typing import Any

from storage_sites import without_texts
from tune import traced_requests

import lens_defense as ld
from lens_defense.tracing.site_map import ScoreMap

OUT = Path(__file__).parent / "results" / "map_changes"
SEVERED = {"severed_nothing": None, "severed_mlp_out": "mlp_out", "severed_attn_out": "attn_out"}
EDITED = 8
"""Subjects of "core" that are edited together, and traced before and after."""
NATS = "nats that one restored state adds to the answer of before"


# %%
def trace_severed(model: Any) -> None:
    """The residual stream at the subject's last token: with nothing severed, later MLPs, later attention."""
    for name, severed in SEVERED.items():
        file = OUT / f"{name}.safetensors"
        if not file.is_file():
            positions = ("subject_last",)
            trace = ld.trace(model, traced_requests(), layers="all", positions=positions, severed=severed)
            without_texts(trace).save(file)


def trace_edited(model: Any) -> None:
    """Residual stream and MLP outputs by role, of the model as it is and as it is edited."""
    requests = ld.requests("core")[:EDITED]
    settings = ld.TraceSettings(components=("resid_post", "mlp_out"), layers="all", min_difference=0.0)
    before = ld.trace(model, requests, settings)
    edit = ld.edit(model, requests, ld.locate(before))
    with edit.applied(model):
        after = ld.trace(model, requests, settings, answers=before)
    without_texts(before).save(OUT / "before.safetensors")
    for name, trace in {"before": before, "after": after}.items():
        in_nats(trace).save(OUT / f"{name}_nats.safetensors")


def in_nats(trace: ld.Trace) -> ScoreMap:
    """What restoring each state adds to the log probability of the answer; no words."""
    common: dict[str, Any] = {name: getattr(trace, name) for name in ("components", "layers", "model")}
    return ScoreMap(
        **common,
        prompts=without_texts(trace).prompts,
        model_layers=trace.model_layers,
        fingerprint=trace.fingerprint,
        scores=(trace.patched - trace.corrupted[:, None, None, None]).mean(-1),
        quantity=NATS,
    )


# %%
def main() -> None:
    """Make what is missing."""
    model = ld.load("smollm2")
    trace_severed(model)
    if not (OUT / "after_nats.safetensors").is_file():
        trace_edited(model)


if __name__ == "__main__":
    main()
