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


@pytest.mark.parametrize("n_layers, width", SIZES)
def test_controls_are_as_wide_and_inside_the_model(n_layers, width):
    sites = sites_at(range(width))
    for name, control in control_sites(sites, n_layers).items():
        first = layers(control)[0]
        assert layers(control) == list(range(first, first + width)), name
        assert first >= 0 and first + width <= n_layers, name


@pytest.mark.parametrize(
    "n_layers, width", [(n_layers, width) for n_layers, width in SIZES if width <= n_layers // 3]
)
def test_they_stand_where_they_say(n_layers, width):
    controls = control_sites(sites_at(range(width)), n_layers)
    below = layers(controls["middle layers"])[0]
    above = n_layers - 1 - layers(controls["middle layers"])[-1]
    assert abs(below - above) <= 1
    assert min(layers(controls["late layers"])) >= n_layers - n_layers // 3


def test_role_and_component_stay_but_for_the_other_role():
    sites = sites_at((4, 5), component="mlp_out")
    controls = control_sites(sites, 12)
    for name in ("middle layers", "late layers"):
        assert {(site.role, site.component) for site in controls[name]} == {("subject_last", "mlp_out")}
    assert {(site.role, site.component) for site in controls["at next"]} == {("next", "mlp_out")}
    assert layers(controls["at next"]) == [4, 5]


def test_no_effect_is_carried_over():
    sites = sites_at((4, 5, 6))
    assert all(site.effect is not None for site in sites)
    for control in control_sites(sites, 12).values():
        assert all(site.effect is None and site.interval is None for site in control)


def test_the_order_of_sites_changes_no_layer():
    ascending, shuffled = (control_sites(sites_at(order), 12) for order in ((4, 5, 6), (6, 4, 5)))
    assert all(sorted(layers(ascending[name])) == sorted(layers(shuffled[name])) for name in ascending)
