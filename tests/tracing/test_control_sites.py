"""Controls are the same edit elsewhere: as wide, inside the model, and with no effect of their own."""

import pytest
from helpers.handmade import sites_at

from lens_defense.tracing.control_sites import control_sites

SIZES = [
    (1, 1),
    (2, 1),
    (4, 2),
    (4, 4),
    (6, 2),
    (6, 5),
    (12, 4),
    (12, 5),
    (30, 1),
    (30, 10),
    (30, 11),
    (31, 5),
]


def layers(sites):
    return [site.layer for site in sites]


def test_there_are_three():
    assert list(control_sites(sites_at((9, 10, 11)), 30)) == ["middle layers", "late layers", "at next"]
    assert list(control_sites(sites_at(), 30, other="last"))[-1] == "at last"


@pytest.mark.parametrize("depth, width", SIZES)
def test_controls_are_as_wide_and_inside_the_model(depth, width):
    sites = sites_at(range(width))
    for name, moved in control_sites(sites, depth).items():
        assert len(set(layers(moved))) == len(moved) == width, name
        assert layers(moved) == list(range(layers(moved)[0], layers(moved)[0] + width)), name
        assert min(layers(moved)) >= 0 and max(layers(moved)) < depth, name


@pytest.mark.parametrize("depth, width", [(depth, width) for depth, width in SIZES if width <= depth // 3])
def test_they_stand_where_they_say(depth, width):
    told = control_sites(sites_at(range(width)), depth)
    below = layers(told["middle layers"])[0]
    above = depth - 1 - layers(told["middle layers"])[-1]
    assert abs(below - above) <= 1
    assert min(layers(told["late layers"])) >= depth - depth // 3


def test_role_and_component_stay_but_for_the_other_role():
    sites = sites_at((4, 5), component="mlp_out")
    told = control_sites(sites, 12)
    for name in ("middle layers", "late layers"):
        assert {(site.role, site.component) for site in told[name]} == {("subject_last", "mlp_out")}
    assert {(site.role, site.component) for site in told["at next"]} == {("next", "mlp_out")}
    assert layers(told["at next"]) == [4, 5]


def test_no_effect_is_carried_over():
    sites = sites_at((4, 5, 6))
    assert all(site.effect is not None for site in sites)
    for moved in control_sites(sites, 12).values():
        assert all(site.effect is None and site.interval is None for site in moved)


def test_the_order_of_sites_changes_no_layer():
    there, back = (control_sites(some, 12) for some in (sites_at((4, 5, 6)), sites_at((6, 4, 5))))
    assert all(sorted(layers(there[name])) == sorted(layers(back[name])) for name in there)
