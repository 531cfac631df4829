"""The explorer in a notebook, without a browser: what is shown by which form, what is saved, who listens."""

import logging
import subprocess
import sys
import time
from base64 import b64encode

import IPython.display
import pytest
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model

import lens_defense as ld
from lens_defense.app.explorer import take_away
from lens_defense.app.explorer.explorer import Explorer
from lens_defense.app.explorer.page_state import hand_over
from lens_defense.app.explorer.page_values import talk_values, visible
from lens_defense.app.explorer.talk import Talk
from lens_defense.app.explorer.widget import ExplorerWidget

PAGE = "application/vnd.jupyter.widget-view+json"
PICTURE = bytes(16) + (975).to_bytes(4, "big") + bytes(range(256)) * 100
"""The width stands at the 17th byte of a PNG: a column of 3.25 inches."""
LONG = " ".join(f"word{i}" for i in range(40))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@pytest.fixture
def explorer(model):
    made = Explorer(model, [ld.request("how do I make a lamp", "lamp", id="lamp")], max_new_tokens=3)
    yield made
    made.worker.stop()
    assert made.worker.wait(60)
    while made.ledger.edits:
        made.ledger.undo()


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: (id, bundle), renewed ones too."""
    outputs = []

    def display(bundle, *, raw, display_id=None):
        assert raw
        outputs.append((display_id, bundle))

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython.display, "update_display", display)
    return outputs


def talk_of(explorer, answer, question="how do I make a lamp"):
    explorer.talk = Talk(question, "", explorer.ledger.edits, before=answer)
    explorer.publish("talk")


def test_the_one_line_says_what_stands_and_what_is_chosen(explorer, model):
    assert repr(explorer) == "Explorer(tiny-llama, 1 request, model as loaded, no cell chosen)"
    explorer.sites = [ld.Site("resid_post", 1, "last")]
    explorer.ledger.apply(handmade_edit(model, {1: 0.1}))
    assert "1 edit in the model, chosen: residual stream, layer 1" in repr(explorer)
    explorer.sites = [ld.Site("resid_post", layer, role) for layer in range(4) for role in ("last", "next")]
    assert len(repr(explorer)) < 400


def test_the_bundle_has_the_page_and_what_reads_well_without_it(explorer, model):
    explorer.sites = [ld.Site("resid_post", 1, "last")]
    explorer.ledger.apply(handmade_edit(model, {1: 0.1}))
    talk_of(explorer, "<b>bold</b>")
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {PAGE, "text/html", "text/plain"}
    assert bundle[PAGE]["model_id"] == explorer._notebook.widget.model_id
    assert bundle["text/plain"] == repr(explorer)
    html = bundle["text/html"]
    assert "residual stream, layer 1, last prompt token" in html and "memit at layers 1 (lamp, bell)" in html
    assert "&lt;b&gt;bold&lt;/b&gt;" in html and "<script" not in html


def test_readers_without_a_kernel_see_the_whole_picture_and_what_is_chosen(model, monkeypatch):
    monkeypatch.setattr("lens_defense.app.explorer.notebook_form.wants_pictures", lambda: True)
    monkeypatch.setattr(take_away, "figure_file", lambda *_: PICTURE)
    requests = [ld.request("how do I make a lamp now", "lamp")]
    trace = ld.trace(model, requests, layers="all", min_difference=0.0, progress=False)
    explorer = Explorer(model, requests, trace, sites=[ld.Site("resid_post", 1, "subject_last")])
    html = explorer._repr_mimebundle_()["text/html"]
    assert f"data:image/png;base64,{b64encode(PICTURE).decode()}" in html
    assert "width: 380px" in html, "as large as its letters were drawn for"
    assert "residual stream, layer 1, last subject token" in html


def test_a_notebook_gets_the_page_and_a_static_form_that_follows_who_uses_the_page(explorer, model, shown):
    explorer._ipython_display_()
    explorer._ipython_display_()
    (form, first), (_, page), (again, _), (_, same) = shown
    assert form == again and set(first) == {"text/html", "text/plain"}
    assert set(page) == {PAGE} and page == same
    assert explorer._notebook.widget.static_form == form and form in first["text/html"]
    shown.clear()
    explorer.sites = [ld.Site("resid_post", 2, "last")]
    assert not shown, "a reader of the notebook sees what stood there when the cell ran"
    cells = [{"component": "resid_post", "layer": 1, "role": "last"}]
    hand_over(explorer, {"command": "choose", "values": {"cells": cells}, "ticket": "a 0"})
    explorer.ledger.apply(handmade_edit(model, {1: 0.1}))
    assert {id for id, _ in shown} == {form}
    assert "layer 1, last prompt token" in shown[-1][1]["text/html"] and "memit" in shown[-1][1]["text/html"]
    shown.clear()
    explorer.do("ask", question="how do I make a lamp")
    assert explorer.worker.wait(60)
    assert len(shown) == 1, "it is renewed at the end of the work alone"


def test_live_answers_are_not_saved_with_the_notebook(explorer):
    explorer._repr_mimebundle_()
    widget = explorer._notebook.widget
    sent = []
    widget.send = sent.append
    talk_of(explorer, LONG)
    assert sent == [{"event": "whole", "part": "talk", "value": explorer.parts["talk"]}]
    assert sent[0]["value"]["before"] == LONG
    assert "word11" in widget.talk["before"] and "word12" not in repr(widget.get_state())
    assert "word12" not in explorer._repr_mimebundle_()["text/html"]
    sent.clear()
    widget._asked(widget, {"tell": "whole"}, [])
    assert [message["value"]["before"] for message in sent] == [LONG], "a page that was loaded again asks"
    explorer._notebook.widget.close()
    assert "word12" not in repr(ExplorerWidget(explorer).get_state())


def test_without_anywidget_the_explorer_works_and_says_what_to_install(explorer, monkeypatch, shown):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "lens_defense.app.explorer.widget")
    explorer.do("choose", cells=[{"component": "resid_post", "layer": 1, "role": "last"}])
    assert [site.layer for site in explorer.sites] == [1]
    explorer._ipython_display_()
    ((_, bundle),) = shown
    assert "pip install &#39;lens-defense[notebook]&#39;" in bundle["text/html"]
    assert set(explorer._repr_mimebundle_()) == {"text/html", "text/plain"}


def test_the_package_is_imported_without_anything_for_notebooks():
    code = (
        "import sys; sys.modules.update({'anywidget': None, 'ipywidgets': None})\n"
        "import lens_defense as ld; print(ld.Explorer.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "Explorer\n", ran.stderr


def test_a_closed_widget_stops_listening_and_a_new_one_takes_its_place(explorer):
    explorer._repr_mimebundle_()
    closed = explorer._notebook.widget
    assert explorer._published.listeners
    closed.close()
    assert not explorer._published.listeners
    explorer.sites = [ld.Site("resid_post", 1, "last")]
    assert closed.sites["sites"] == []
    explorer._repr_mimebundle_()
    assert explorer._notebook.widget is not closed and len(explorer._notebook.widget.sites["sites"]) == 1


def test_a_listener_that_fails_hurts_neither_the_others_nor_the_work(explorer, caplog):
    def broken(*_):
        raise RuntimeError("the page is gone")

    seen = {}
    explorer.listen(broken)
    explorer.listen(seen.__setitem__)
    with caplog.at_level(logging.ERROR):
        explorer.do("ask", question="how do I make a lamp")
        assert explorer.worker.wait(60)
    assert explorer.parts["message"] == "" and explorer.answers[0]
    assert seen["talk"] == explorer.parts["talk"] and seen["job"] == {}


def test_the_log_says_which_page_failed(explorer, caplog):
    explorer.listen(lambda name, _: 1 / 0 if name == "sites" else None)
    assert "a page could not be told of its sites" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_page_hears_when_what_it_asked_for_is_done_or_refused(explorer):
    heard = []
    explorer.listen(lambda name, value: heard.append((name, value)) if name.startswith("event") else None)
    cells = [{"component": "resid_post", "layer": 1, "role": "last"}]
    hand_over(explorer, {"command": "choose", "values": {"cells": cells}, "ticket": "a 0"})
    hand_over(explorer, {"command": "choose", "values": {"cells": cells}, "ticket": "a 1"})
    hand_over(explorer, {"command": "choose", "values": {"cells": "x"}, "ticket": "b 0"})
    assert heard == [("event:done", {"ticket": ticket}) for ticket in ("a 0", "a 1", "b 0")]


def test_stop_never_cuts_what_a_page_is_told(explorer):
    begun, ended = [], []

    def slow(name, value):
        if name == "talk" and value:
            begun.append(value)
            time.sleep(0.03)
            ended.append(value)

    explorer.listen(slow)
    explorer.max_new_tokens = 60
    explorer.do("ask", question="how do I make a lamp")
    while len(begun) < 3:
        time.sleep(0.001)
    explorer.stop()
    assert explorer.worker.wait(60)
    assert begun == ended
    assert (
        ended[-1] == explorer.parts["talk"] == visible(talk_values(explorer.talk, explorer.ledger.edits))
    ), "the last state is told"
