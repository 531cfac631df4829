"""Control sites: places to edit that the trace did not choose, to compare an edit with."""

from collections.abc import Sequence
from dataclasses import replace

from lens_defense.prompts.request import Role
from lens_defense.sites import Site, resolve_sites


def control_sites(
    sites: Sequence[Site], n_layers: int, *, other: Role = "next"
) -> dict[str, tuple[Site, ...]]:
    """Sites of the same width elsewhere: in the middle of the model, in its late third, and at another role.

    Args:
        sites: what locate returned.
        n_layers: of the model.
        other: the role of the third control, at the located layers.
    """
    sites = resolve_sites(sites, "ld.control_sites(sites, model.cfg.n_layers)")
    width = len({site.layer for site in sites})
    starts = {
        "middle": (n_layers - width) // 2,
        "late": min(n_layers - (n_layers // 3 + width) // 2, n_layers - width),
    }
    controls = {
        f"{name} layers": tuple(
            replace(sites[0], layer=layer, effect=None, interval=None)
            for layer in range(start, start + width)
        )
        for name, start in starts.items()
    }
    at_other = tuple(replace(site, role=other, effect=None, interval=None) for site in sites)
    return {**controls, f"at {other}": at_other}
