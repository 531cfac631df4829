"""Controls: places to edit that the trace did not choose; above the readers an edit cannot act at all."""

from collections.abc import Sequence
from dataclasses import replace

from lens_defense.prompts.request import Role
from lens_defense.sites import Site


def control_sites(sites: Sequence[Site], depth: int, *, other: Role = "next") -> dict[str, tuple[Site, ...]]:
    """Sites of the same width elsewhere: the middle of the model, its late third, and another role.

    Args:
        sites: what locate gave.
        depth: the model's number of layers.
        other: the role of the third control, at the located layers.
    """
    width = len({site.layer for site in sites})
    starts = {"middle": (depth - width) // 2, "late": min(depth - (depth // 3 + width) // 2, depth - width)}
    moved = {
        f"{name} layers": tuple(
            replace(sites[0], layer=layer, effect=None, interval=None)
            for layer in range(start, start + width)
        )
        for name, start in starts.items()
    }
    elsewhere = tuple(replace(site, role=other, effect=None, interval=None) for site in sites)
    return {**moved, f"at {other}": elsewhere}
