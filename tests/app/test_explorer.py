"""The form's parts do what their buttons say; a browser's events are played by hand."""

import warnings
from types import SimpleNamespace

import pytest
from plans import bits, same_bits
from plotly.callbacks import InputDeviceState
from tiny import tiny

import lens_defense as ld
from lens_defense.app import explorer as explorers
from lens_defense.app.explorer import Explorer
from lens_defense.editing.edit import edit

pytestmark = pytest.mark.filterwarnings("ignore:the refusal could not be fitted")
FEW = {"shared_steps": 1, "steps": 1, "cache": False, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny("llama", chat=True)


@pytest.fixture
def explorer(model):
    requests = [ld.request(f"how do I make a {thing} now", thing, id=thing) for thing in ("lamp", "bell")]
    trace = ld.trace(model, requests, positions=("subject_last", "last"), floor=0.0, progress=False)
    return Explorer(model, trace, requests, settings=FEW, tokens=3)


def press(explorer, name):
    explorer.buttons[name].click()
    return explorer.status.value


def test_every_cell_has_a_marker_and_a_selection_becomes_sites(explorer):
    ((marks, sites),) = explorer._cells
    assert len(marks.x) == len(sites) == 2 * 4
    assert len({(site.layer, site.role) for site in sites}) == len(sites)
    chosen = [i for i, site in enumerate(sites) if site.role == "subject_last" and site.layer in (1, 2)]
    explorer._clicked(marks, SimpleNamespace(point_inds=chosen), None)
    assert {(site.layer, site.role) for site in explorer.sites} == {(1, "subject_last"), (2, "subject_last")}
    explorer.select([sites[chosen[0]]])
    assert list(marks.selectedpoints) == chosen[:1] and explorer.sites == (sites[chosen[0]],)


def test_a_box_selects_the_cells_inside(explorer):
    ((_, sites),) = explorer._cells
    box = {"type": "rect", "xref": "x", "yref": "y", "x0": 0.6, "x1": -0.4, "y0": 0.7, "y1": 2.2}
    explorer.figure.plotly_relayout({"selections": [box]})
    assert {(site.layer, site.role) for site in explorer.sites} == {(1, "subject_last"), (2, "subject_last")}
    assert set(explorer.sites) <= set(sites)


def test_shift_adds_a_cell(explorer):
    ((marks, sites),) = explorer._cells
    explorer._clicked(marks, SimpleNamespace(point_inds=[1]), InputDeviceState(button=0, buttons=1))
    explorer._clicked(
        marks, SimpleNamespace(point_inds=[2]), InputDeviceState(button=0, buttons=1, shift=True)
    )
    assert explorer.sites == (sites[1], sites[2])


@pytest.mark.parametrize("told_first", [True, False])
def test_shift_on_a_selected_cell_takes_it_away(explorer, told_first):
    ((marks, sites),) = explorer._cells
    explorer.select(sites[:2])
    if told_first:  # what is selected now, then the cell that was clicked
        explorer._clicked(marks, SimpleNamespace(point_inds=[0]), None)
    explorer._clicked(
        marks, SimpleNamespace(point_inds=[1]), InputDeviceState(button=0, buttons=1, shift=True)
    )
    assert explorer.sites == (sites[0],)
    if not told_first:
        assert list(marks.selectedpoints) == [0]


def test_a_double_click_or_an_empty_box_selects_nothing(explorer):
    ((marks, sites),) = explorer._cells
    explorer.select(sites[:2])
    marks._dispatch_on_deselect(SimpleNamespace(point_inds=[]))
    explorer._clicked(marks, SimpleNamespace(point_inds=[1]), InputDeviceState(button=0, buttons=1))
    assert explorer.sites == () and "none yet" in explorer.chosen.value
    explorer.select(sites[:2])
    box = {"type": "rect", "xref": "x", "yref": "y", "x0": 0.3, "x1": 0.4, "y0": 0.3, "y1": 0.4}
    explorer.figure.plotly_relayout({"selections": [box]})
    assert explorer.sites == ()


def test_a_forecast_goes_with_its_plan(explorer, monkeypatch):
    explorer.select([ld.Site("resid_post", 1, "subject_last")])
    press(explorer, "plan")
    assert "lamp" in explorer.forecast.value
    explorer.method.value = next(name for name in explorer.method.options if name != explorer.method.value)
    assert explorer.edit is None and explorer.forecast.value == ""
    press(explorer, "plan")

    def broken(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr(explorers, "edit", broken)
    press(explorer, "plan")
    assert explorer.edit is None and explorer.forecast.value == ""


def test_plan_apply_ask_undo(explorer, model):
    original = bits(model)
    assert "press Plan first" in press(explorer, "apply")
    explorer.select([ld.Site("resid_post", 1, "subject_last")])
    press(explorer, "plan")
    assert "lamp" in explorer.forecast.value
    assert same_bits(model, original)
    assert "edits that stand: 1" in press(explorer, "apply")
    assert not same_bits(model, original)
    edited = bits(model)
    assert "type a question" in press(explorer, "ask")
    explorer.question.value = "how do I make a <lamp>"
    press(explorer, "ask")
    assert len(explorer.told) == 2 and "<table>" in explorer.answers.value
    assert same_bits(model, edited), "asking without the edit puts it back"
    assert "edits that stand: 0" in press(explorer, "undo")
    assert same_bits(model, original)
    assert "nothing to undo" in press(explorer, "undo")


def test_a_plan_at_no_cell_says_so_and_changes_nothing(explorer, model):
    original = bits(model)
    assert "no sites were given" in press(explorer, "plan")
    assert explorer.edit is None and same_bits(model, original)


def test_whatever_fails_is_told_and_so_is_a_warning(explorer, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of <memory>")

    explorer.select(explorer._cells[0][1][:1])
    with monkeypatch.context() as patch:
        patch.setattr(explorers, "edit", broken)
        assert "RuntimeError: out of &lt;memory&gt;" in press(explorer, "plan")
    assert not any(button.disabled for button in explorer.buttons.values())

    def warned(*given, **settings):
        warnings.warn("this edit leaks", stacklevel=1)
        return edit(*given, **settings)

    explorer.select([site for site in explorer._cells[0][1] if site.role == "subject_last"][:1])
    monkeypatch.setattr(explorers, "edit", warned)
    assert "this edit leaks" in press(explorer, "plan")
    assert explorer.edit is not None


def test_an_interrupt_leaves_the_form_usable(explorer, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lens_defense.app.explorer.edit", interrupted)
    explorer.select([ld.Site("resid_post", 1, "subject_last")])
    assert "stopped; nothing was changed" in press(explorer, "plan")
    assert not any(button.disabled for button in explorer.buttons.values())


def test_a_reader_without_a_kernel_sees_a_picture_where_pictures_are_asked_for(explorer, monkeypatch):
    widget = "application/vnd.jupyter.widget-view+json"
    assert set(explorer._repr_mimebundle_()) == {"text/plain", widget}
    monkeypatch.setattr("lens_defense.app.explorer.renderers.default", "plotly_mimetype+png")
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", lambda *_, **__: b"a picture")
    explorer.select(explorer._cells[0][1][:1])
    told = explorer._repr_mimebundle_()
    assert widget in told
    assert "base64,YSBwaWN0dXJl" in told["text/html"]
    assert "subject_last" in told["text/html"] and "edits that stand: 0" in told["text/html"]
