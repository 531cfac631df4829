"""Curves of effects as data: means and their intervals, and what cannot be drawn."""

from dataclasses import replace

import pytest
from helpers.handmade import a_trace, lamp_prompts

from lens_defense.plotting.effect_curves import effect_curves
from lens_defense.plotting.print_size import print_pixels
from lens_defense.plotting.theme import save_figure


def test_a_curve_is_the_role_means_and_its_band_the_intervals():
    trace = a_trace(lamp_prompts(9), components=("resid_post", "mlp_out"), layers=(0, 2, 5))
    severed = replace(trace, patched=(trace.patched + 1) / 2 - 1)
    figure = effect_curves({"nothing severed": trace, "<severed>": severed}, "last", component="mlp_out")
    means = trace.by_role().query("role == 'last' and component == 'mlp_out'")
    high, low, _, _, curve, other = figure.data
    assert list(curve.x) == [0, 2, 5] and list(curve.y) == pytest.approx(list(means["effect"]))
    assert list(low.y) == pytest.approx(list(means["low"]))
    assert list(high.y) == pytest.approx(list(means["high"]))
    assert list(other.y) == pytest.approx([y / 2 for y in curve.y])
    assert other.name == "&lt;severed&gt;" and curve.line.dash != other.line.dash
    title = figure.layout.title.text.replace("<br>", " ")
    assert title.endswith("MLP outputs at the last prompt token, mean over 9 requests")
    assert figure.layout.meta["corruption"] == "noise"
    assert figure.layout.width == print_pixels("column")


def test_what_cannot_be_drawn_is_one_sentence():
    with pytest.raises(ValueError, match="no map was given"):
        effect_curves({})
    with pytest.raises(ValueError, match="'a' has no mlp_out at last; it has resid_post at "):
        effect_curves({"a": a_trace()}, "last", component="mlp_out")


@pytest.mark.usefixtures("unchecked")
def test_a_map_that_is_none_is_refused():
    with pytest.raises(TypeError, match="'a' must be a Trace or a ScoreMap"):
        effect_curves({"a": a_trace().effects})  # pyright: ignore[reportArgumentType]


def test_letters_can_be_read_at_its_width(tmp_path, monkeypatch):
    monkeypatch.setattr("lens_defense.plotting.theme._image", lambda *_: b"")
    save_figure(effect_curves({"a": a_trace()}), tmp_path / "curves.svg")
