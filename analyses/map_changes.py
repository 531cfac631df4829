# %% [markdown]
# # What severing and an edit change of a map
# ROME's question (Meng et al. 2022, figure 3) on smollm2: of what restoring a state of the subject's last token brings
# back, how much passes through later MLPs, how much through later attention? And the map before and after an edit of
# eight subjects, by the answers of before. Committed are effects and roles, no request and no answer.
#
#     python analyses/map_changes.py

# %%
from pathlib import Path

from storage_sites import without_texts
from tune import traced_requests

import lens_defense as ld

OUT = Path(__file__).parent / "results" / "map_changes"
SEVERED = {"severed_nothing": None, "severed_mlp_out": "mlp_out", "severed_attn_out": "attn_out"}
EDITED = 8
"""Subjects of "core" that are edited together, and traced before and after."""


# %%
def main() -> None:
    """Make all five traces."""
    model = ld.load("smollm2")
    for name, severed in SEVERED.items():
        trace = ld.trace(
            model,
            traced_requests(),
            layers="all",
            positions=("subject_last",),
            severed=severed,
            progress=False,
        )
        without_texts(trace).save(OUT / f"{name}.safetensors")
    requests = ld.requests("core")[:EDITED]
    before = ld.trace(model, requests, components=("resid_post", "mlp_out"), layers="all", progress=False)
    edit = ld.edit(model, requests, ld.locate(before))
    with edit.applied(model):
        after = ld.trace(
            model,
            requests,
            components=("resid_post", "mlp_out"),
            layers="all",
            answers=before,
            min_difference=0.0,
            progress=False,
        )
    for name, trace in {"before": before, "after": after}.items():
        without_texts(trace).save(OUT / f"{name}.safetensors")


if __name__ == "__main__":
    main()
