"""What objects show of themselves: short in a terminal, legible and escaped in a notebook."""

import pytest
import torch
from helpers.handmade import a_request, an_edit
from helpers.tiny_models import tiny_model
from helpers.trace_cases import ALL_CELLS, BELL, LAMP

import lens_defense as ld
from lens_defense.display import card


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@pytest.fixture(scope="module")
def trace(model):
    return ld.trace(model, [LAMP, BELL], **ALL_CELLS)


def test_reprs_are_short(trace):
    shown = {
        "suite": ld.suite("core"),
        "request": ld.request("word " * 10_000 + "lamp", "lamp"),
        "prompt": trace.prompts[0],
        "trace": trace,
        "site": ld.Site("mlp_out", 3, "subject_last", 0.5, (0.4, 0.6)),
        "corpus": ld.read_corpus(),
        "item": ld.suite("core").items[0],
    }
    lengths = {name: len(repr(value)) for name, value in shown.items()}
    assert max(lengths.values()) < 500, lengths
    assert repr(LAMP) == "Request('lamp', 'how do I make a [brass lamp] at home?')"
    assert repr(shown["site"]) == "Site('mlp_out', 3, 'subject_last', effect=0.5)"


def test_a_suite_counts_its_arms():
    suite = ld.suite("organism").small()
    counts = suite.counts().set_index("arm")["items"]
    assert counts.sum() == len(suite.items)
    assert counts["edited"] == sum(item.arm == "edited" for item in suite.items)
    assert f"edited {counts['edited']}" in repr(suite)


def test_control_characters_do_not_reach_the_terminal():
    nasty = ld.request("make a lamp \x1b]0;owned\x07 \u202e now", "lamp", id="\x1b[31m")
    assert not set(repr(nasty)) & {"\x1b", "\x07", "\u202e"}


def test_notebook_views_are_escaped(trace):
    hostile = a_request("a <script>alert(1)</script> b", "<script>alert(1)</script>")
    for view in (trace, ld.suite("organism"), an_edit(requests=(hostile,))):
        html = view._repr_html_()
        assert 'class="ld-card"' in html and "<script" not in html
    assert "&lt;b&gt;" in card("<b>", {"<i>": "<u>"}) and "<u>" not in card("<b>", {"<i>": "<u>"})


def test_a_trace_is_a_sequence_of_requests(trace):
    assert len(trace) == 2 and len(list(trace)) == 2
    assert trace[-1].prompts == trace.prompts[1:]
    assert trace[:1].prompts == trace.prompts[:1] and trace[:].effects.shape == trace.effects.shape
    torch.testing.assert_close(trace[1:].effects, trace[1].effects, equal_nan=True)
    for outside in (2, slice(2, 3)):
        with pytest.raises(IndexError):
            trace[outside]
    figure = trace.plot(ld.locate(trace), significant=None)
    assert figure.to_json() == ld.heatmap(trace, ld.locate(trace)).to_json()


def test_a_difference_of_maps_is_a_map(model, trace, tmp_path):
    """The same answers are read, token by token, though the other model would answer otherwise."""
    other = tiny_model("llama", chat=True, seed=1)
    after = ld.trace(other, [LAMP, BELL], answers=trace, **ALL_CELLS)
    assert [p.answer_ids for p in after.prompts] == [p.answer_ids for p in trace.prompts]
    change = after - trace
    torch.testing.assert_close(change.effects, after.effects - trace.effects, equal_nan=True)
    assert (trace - trace).effects.nan_to_num().abs().max() == 0
    assert "change of the effect" in ld.heatmap(change).layout.title.text
    file = change.save(tmp_path / "change.safetensors")
    torch.testing.assert_close(type(change).load(file).scores, change.scores, equal_nan=True)
    with pytest.raises(ValueError, match=r"other prompts or answers.*answers="):
        ld.trace(other, [LAMP, BELL], **ALL_CELLS) - trace
    with pytest.raises(ValueError, match="is of other requests"):
        ld.trace(model, [BELL, LAMP], answers=trace, **ALL_CELLS)
    with pytest.raises(TypeError):
        trace - 1
