"""What a saved notebook keeps of the explorer, for readers without a kernel."""

from base64 import b64encode

import pytest
from helpers.tiny_models import tiny_model

import lens_defense as ld
from lens_defense.app.explorer import take_away
from lens_defense.app.explorer.explorer import Explorer

PICTURE = bytes(16) + (975).to_bytes(4, "big") + bytes(range(256)) * 100
"""The width stands at the 17th byte of a PNG: a column of 3.25 inches."""


@pytest.fixture
def explorer(monkeypatch):
    monkeypatch.setattr("lens_defense.app.explorer.widget.wants_pictures", lambda: True)
    monkeypatch.setattr(take_away, "figure_file", lambda *_: PICTURE)
    model, requests = tiny_model("llama", chat=True), [ld.request("how do I make a lamp now", "lamp")]
    trace = ld.trace(model, requests, layers="all", min_difference=0.0, progress=False)
    return Explorer(model, requests, trace, sites=[ld.Site("resid_post", 1, "subject_last")])


def test_readers_without_a_kernel_see_the_whole_picture_and_what_is_chosen(explorer):
    data = explorer._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert f"data:image/png;base64,{b64encode(PICTURE).decode()}" in data["text/html"]
    assert "width: 380px" in data["text/html"], "as large as its letters were drawn for"
    assert "residual stream, layer 1, last subject token" in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_as_plain_text_it_says_what_it_is(explorer):
    data = explorer._repr_mimebundle_()
    data = data[0] if isinstance(data, tuple) else data
    assert data["text/plain"] == repr(explorer) and " object at 0x" not in repr(explorer)
    assert "cells chosen 1, edits that stand 0" in repr(explorer)
