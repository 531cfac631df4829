"""Locate's rules on maps made by hand: the strongest component and role, a band around its peak."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.handmade import a_prompt, a_trace, lamp_prompts

from lens_defense.tracing.locate import locate
from lens_defense.tracing.trace_result import Trace


def trace_of(curves, *, layers=range(12), depth=12) -> Trace:
    """A trace of one request with an effect curve over layers for each (component, role)."""
    components = tuple(dict.fromkeys(component for component, _ in curves))
    trace = a_trace([a_prompt()], components=components, layers=tuple(layers), model_layers=depth)
    patched = torch.full_like(trace.patched, float("nan"))
    for (component, role), curve in curves.items():
        for t in trace.prompts[0].positions(role):
            metrics = torch.tensor(curve, dtype=torch.float64) - 1  # clean 0, corrupted -1
            patched[0, components.index(component), :, t] = metrics[:, None]
    return replace(trace, patched=patched)


def peaked(layer, *, high=0.8, rest=0.1, n=12):
    return [high if i == layer else rest for i in range(n)]


LAST = ("resid_post", "subject_last")


def layers_of(sites):
    return [site.layer for site in sites]


@pytest.mark.parametrize(
    "peak, k, band",
    [
        *((6, 5, [4, 5, 6, 7, 8]), (0, 5, [0, 1, 2, 3, 4]), (11, 5, [7, 8, 9, 10, 11])),
        *((6, 4, [5, 6, 7, 8]), (1, 4, [0, 1, 2, 3]), (6, 1, [6]), (6, 99, list(range(12)))),
    ],
)
def test_a_band_is_centred_on_the_peak_and_clipped(peak, k, band):
    sites = locate(trace_of({LAST: peaked(peak)}), k)
    assert layers_of(sites) == band
    assert {(site.component, site.role) for site in sites} == {LAST}
    assert next(site.effect for site in sites if site.layer == peak) == pytest.approx(0.8)


def test_the_largest_mean_wins_not_the_largest_cell():
    curves = {LAST: [0.5] * 12, ("resid_post", "next"): peaked(9, high=0.9, rest=0.0)}
    (site,) = locate(trace_of(curves), 1)
    assert (site.role, site.layer) == ("subject_last", 3)


def test_a_plateau_is_edited_a_third_of_the_way_up():
    curve = [0.1, 0.5, 0.45, 0.42, 0.48, 0.41, 0.43, 0.2, 0.5, 0.1, 0.1, 0.1]  # its run is 1 to 6
    assert layers_of(locate(trace_of({LAST: curve}), 3)) == [1, 2, 3]


def test_one_layer_that_sticks_out_of_a_flat_top_is_not_the_plateau():
    curve = [0.41, 0.42, 0.43, 0.42, 0.41, 0.42, 0.42, 0.42, 0.55, 0.42, 0.1, 0.1]
    assert layers_of(locate(trace_of({LAST: curve}), 5)) == [1, 2, 3, 4, 5]


def test_the_subjects_first_tokens_are_no_address_of_a_band():
    curves = {LAST: [0.2] * 12, ("resid_post", "subject_first"): [0.9] * 12}
    assert locate(trace_of(curves))[0].role == "subject_last"
    assert locate(trace_of(curves), by="cells")[0].role == "subject_first"
    with pytest.raises(ValueError, match="no role that an edit could address"):
        locate(trace_of({("resid_post", "subject_first"): [0.9] * 12}))


def test_the_component_with_the_largest_mean_wins():
    curves = {LAST: [0.2] * 12, ("mlp_out", "subject_last"): [0.3] * 12}
    assert locate(trace_of(curves))[0].component == "mlp_out"


def test_ties_go_to_the_lower_layer():
    curve = [0.1, 0.1, 0.6, 0.1, 0.1, 0.1, 0.6, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert layers_of(locate(trace_of({LAST: curve}), 3)) == [1, 2, 3]
    assert layers_of(locate(trace_of({LAST: curve}), 2, by="cells")) == [2, 6]


def test_layers_between_traced_ones_take_the_straight_line():
    trace = trace_of({LAST: [0.2, 0.8, 0.5, 0.2]}, layers=(0, 3, 6, 9))
    sites = locate(trace, 5)
    assert layers_of(sites) == [1, 2, 3, 4, 5]
    assert [site.effect for site in sites] == pytest.approx([0.4, 0.6, 0.8, 0.7, 0.6])
    assert all(site.interval == pytest.approx((site.effect,) * 2) for site in sites)


def test_never_a_site_without_a_positive_effect():
    curve = [0.9, 0.8, -0.1, 0.0, *[-0.2] * 8]
    assert layers_of(locate(trace_of({LAST: curve}), 5)) == [0, 1]
    for by in ("band", "cells"):
        with pytest.raises(ValueError, match="nothing in this trace has a positive effect"):
            locate(trace_of({LAST: [-0.1] * 12}), by=by)


def test_roles_of_many_tokens_are_no_address():
    curves = {LAST: [0.2] * 12}
    curves |= {("resid_post", role): [0.9] * 12 for role in ("template", "before")}
    for by in ("band", "cells"):
        assert {site.role for site in locate(trace_of(curves), by=by)} == {"subject_last"}
    del curves[LAST]
    for by in ("band", "cells"):
        with pytest.raises(ValueError, match="trace more"):
            locate(trace_of(curves), by=by)


def test_cells_are_the_raw_top():
    curves = {LAST: peaked(3), ("resid_post", "next"): peaked(9, high=0.7)}
    sites = locate(trace_of(curves), 3, by="cells")
    assert [(site.role, site.layer) for site in sites[:2]] == [("subject_last", 3), ("next", 9)]
    assert [site.effect for site in sites] == pytest.approx([0.8, 0.7, 0.1])


def test_k_is_positive():
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        locate(trace_of({LAST: [0.2] * 12}), 0)


def test_a_threshold_takes_every_cell_from_it_on():
    curves = {LAST: peaked(3), ("resid_post", "next"): peaked(9, high=0.7)}
    sites = locate(trace_of(curves), by="threshold", least=0.65)
    assert [(site.role, site.layer) for site in sites] == [("subject_last", 3), ("next", 9)]
    with pytest.raises(ValueError, match=r"positive effect of 0\.9 and more"):
        locate(trace_of(curves), by="threshold", least=0.9)
    with pytest.raises(ValueError, match=r"with q < 0\.05; fewer than six subjects"):
        locate(trace_of(curves), by="significant")


def test_a_box_bounds_what_is_looked_at():
    curves = {LAST: peaked(3), ("resid_post", "next"): peaked(9, high=0.7)}
    assert {site.role for site in locate(trace_of(curves), roles=["next"])} == {"next"}
    (site,) = locate(trace_of(curves), 1, by="cells", layers=range(5, 12))
    assert (site.role, site.layer) == ("next", 9)


def test_a_band_does_not_leave_its_box_or_what_was_traced():
    curve = [0.9, 0.9, 0.9, 0.5, 0.4, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    trace = trace_of({LAST: curve})
    assert layers_of(locate(trace, 5, layers=range(6, 9))) == [6, 7, 8]
    sites = locate(trace, 2, layers=[1, 4, 5])
    assert [(site.layer, site.effect) for site in sites] == [(1, pytest.approx(0.9))]
    strided = trace_of({LAST: [0.2, 0.3, 0.4, 0.8]}, layers=(0, 3, 6, 9), depth=14)
    assert layers_of(locate(strided, 5)) == [5, 6, 7, 8, 9]
    inside = locate(strided, 5, layers=[7, 8])
    assert [site.effect for site in inside] == pytest.approx([0.4 + 0.4 / 3, 0.4 + 0.8 / 3])
    with pytest.raises(ValueError, match="none of the layers 0 to 9, which were traced"):
        locate(strided, layers=[12])


def test_significant_cells_are_those_that_more_requests_agree_on():
    rng = np.random.default_rng(0)
    effects = rng.normal(0, 0.3, (12, 4))
    effects[:, 2] = rng.normal(0.8, 0.1, 12)
    assert [site.layer for site in locate(trace_of_requests(effects), by="significant")] == [2]


def trace_of_requests(effects):
    """A trace of one role with these effects, [request, layer]."""
    prompts = lamp_prompts(len(effects))
    trace = a_trace(prompts, layers=range(effects.shape[1]), roles=["subject_last"], samples=1)
    position = prompts[0].positions("subject_last")[0]
    trace.patched[:, 0, :, position, 0] = torch.as_tensor(effects) - 1  # clean 0, corrupted -1
    return trace
