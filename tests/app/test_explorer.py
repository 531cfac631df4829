"""The form's parts do what their buttons say; a browser's events are played by hand."""

import sys
import warnings
from types import SimpleNamespace

import pytest
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from plotly.callbacks import InputDeviceState

import lens_defense as ld
from lens_defense.app import explorer as explorers
from lens_defense.app.explorer import Explorer
from lens_defense.editing.edit import edit
from lens_defense.editing.target_value import FitSettings

pytestmark = pytest.mark.filterwarnings("ignore:the refusal could not be fitted")
FIT = FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1)
SETTINGS = {"fit": FIT, "cache": False, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@pytest.fixture
def explorer(model):
    requests = [ld.request(f"how do I make a {thing} now", thing, id=thing) for thing in ("lamp", "bell")]
    trace = ld.trace(model, requests, positions=("subject_last", "last"), min_difference=0.0, progress=False)
    return Explorer(model, trace, requests, settings=SETTINGS, max_new_tokens=3)


def press(explorer, name):
    explorer.buttons[name].click()
    return explorer.status_html.value


def test_every_cell_has_a_marker_and_a_selection_becomes_sites(explorer):
    ((markers, sites),) = explorer._panels
    assert len(markers.x) == len(sites) == 2 * 4
    assert len({(site.layer, site.role) for site in sites}) == len(sites)
    chosen = [i for i, site in enumerate(sites) if site.role == "subject_last" and site.layer in (1, 2)]
    explorer._clicked(markers, SimpleNamespace(point_inds=chosen), None)
    assert {(site.layer, site.role) for site in explorer.sites} == {(1, "subject_last"), (2, "subject_last")}
    explorer.select([sites[chosen[0]]])
    assert list(markers.selectedpoints) == chosen[:1] and explorer.sites == (sites[chosen[0]],)


def test_a_box_selects_the_cells_inside(explorer):
    ((_, sites),) = explorer._panels
    box = {"type": "rect", "xref": "x", "yref": "y", "x0": 0.6, "x1": -0.4, "y0": 0.7, "y1": 2.2}
    explorer.figure.plotly_relayout({"selections": [box]})
    assert {(site.layer, site.role) for site in explorer.sites} == {(1, "subject_last"), (2, "subject_last")}
    assert set(explorer.sites) <= set(sites)


def test_shift_adds_a_cell(explorer):
    ((markers, sites),) = explorer._panels
    explorer._clicked(markers, SimpleNamespace(point_inds=[1]), InputDeviceState(button=0, buttons=1))
    explorer._clicked(
        markers, SimpleNamespace(point_inds=[2]), InputDeviceState(button=0, buttons=1, shift=True)
    )
    assert explorer.sites == (sites[1], sites[2])


@pytest.mark.parametrize("selection_came_first", [True, False])
def test_shift_on_a_selected_cell_takes_it_away(explorer, selection_came_first):
    ((markers, sites),) = explorer._panels
    explorer.select(sites[:2])
    if selection_came_first:  # what is selected now, then the cell that was clicked
        explorer._clicked(markers, SimpleNamespace(point_inds=[0]), None)
    explorer._clicked(
        markers, SimpleNamespace(point_inds=[1]), InputDeviceState(button=0, buttons=1, shift=True)
    )
    assert explorer.sites == (sites[0],)
    if not selection_came_first:
        assert list(markers.selectedpoints) == [0]


def test_a_double_click_or_an_empty_box_selects_nothing(explorer):
    ((markers, sites),) = explorer._panels
    explorer.select(sites[:2])
    markers._dispatch_on_deselect(SimpleNamespace(point_inds=[]))
    explorer._clicked(markers, SimpleNamespace(point_inds=[1]), InputDeviceState(button=0, buttons=1))
    assert explorer.sites == () and "none yet" in explorer.selected_html.value
    explorer.select(sites[:2])
    box = {"type": "rect", "xref": "x", "yref": "y", "x0": 0.3, "x1": 0.4, "y0": 0.3, "y1": 0.4}
    explorer.figure.plotly_relayout({"selections": [box]})
    assert explorer.sites == ()


def test_a_forecast_goes_with_its_plan(explorer, monkeypatch):
    explorer.select([ld.Site("resid_post", 1, "subject_last")])
    press(explorer, "plan")
    assert "lamp" in explorer.forecast_html.value
    explorer.method.value = next(name for name in explorer.method.options if name != explorer.method.value)
    assert explorer.edit is None and explorer.forecast_html.value == ""
    press(explorer, "plan")

    def broken(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr(explorers, "edit", broken)
    press(explorer, "plan")
    assert explorer.edit is None and explorer.forecast_html.value == ""


def test_plan_apply_ask_undo(explorer, model):
    original = copy_weights(model)
    assert "press Plan first" in press(explorer, "apply")
    explorer.select([ld.Site("resid_post", 1, "subject_last")])
    press(explorer, "plan")
    assert "lamp" in explorer.forecast_html.value
    assert weights_equal(model, original)
    assert "edits that stand: 1" in press(explorer, "apply")
    assert not weights_equal(model, original)
    edited = copy_weights(model)
    assert "type a question" in press(explorer, "ask")
    explorer.question.value = "how do I make a <lamp>"
    press(explorer, "ask")
    assert len(explorer.answers) == 2 and "<table>" in explorer.answers_html.value
    assert weights_equal(model, edited), "asking without the edit puts it back"
    assert "edits that stand: 0" in press(explorer, "undo")
    assert weights_equal(model, original)
    assert "nothing to undo" in press(explorer, "undo")


def test_a_plan_at_no_cell_says_so_and_changes_nothing(explorer, model):
    original = copy_weights(model)
    assert "no sites were given" in press(explorer, "plan")
    assert explorer.edit is None and weights_equal(model, original)


def test_whatever_fails_is_said_and_so_is_a_warning(explorer, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of <memory>")

    explorer.select(explorer._panels[0][1][:1])
    with monkeypatch.context() as patch:
        patch.setattr(explorers, "edit", broken)
        assert "RuntimeError: out of &lt;memory&gt;" in press(explorer, "plan")
    assert not any(button.disabled for button in explorer.buttons.values())

    def warned(*arguments, **settings):
        warnings.warn("this edit leaks", stacklevel=1)
        return edit(*arguments, **settings)

    explorer.select([site for site in explorer._panels[0][1] if site.role == "subject_last"][:1])
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


def test_an_interrupted_question_keeps_the_edits(explorer, model, monkeypatch):
    original, answers = copy_weights(model), []
    explorer.ledger.apply(handmade_edit(model, (1, 2)))
    edited = copy_weights(model)

    def interrupted(self, _):
        answers.append(weights_equal(self.model, original))
        if len(answers) == 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(Explorer, "_answer", interrupted)
    explorer.question.value = "how do I make a lamp"
    status = press(explorer, "ask")
    assert answers == [False, True], "the second answer is that of the weights without the edit"
    assert "stopped; nothing was changed" in status and "edits that stand: 1" in status
    assert weights_equal(model, edited) and len(explorer.ledger.edits) == 1
    explorer.ledger.undo()
    assert weights_equal(model, original)


def test_an_interrupt_after_a_change_is_not_called_none(explorer, model, monkeypatch):
    explorer.edit = handmade_edit(model, (1, 2))
    apply = explorer.ledger.apply

    def late(plan):
        apply(plan)
        raise KeyboardInterrupt

    monkeypatch.setattr(explorer.ledger, "apply", late)
    status = press(explorer, "apply")
    assert "stopped after the change" in status and "edits that stand: 1" in status
    explorer.ledger.undo()


def test_a_reader_without_a_kernel_sees_a_picture_where_pictures_are_asked_for(explorer, monkeypatch):
    widget = "application/vnd.jupyter.widget-view+json"
    assert set(explorer._repr_mimebundle_()) == {"text/plain", widget}
    monkeypatch.setattr("lens_defense.app.explorer.renderers.default", "plotly_mimetype+png")
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", lambda *_, **__: b"a picture")
    explorer.select(explorer._panels[0][1][:1])
    bundle = explorer._repr_mimebundle_()
    assert widget in bundle
    assert "base64,YSBwaWN0dXJl" in bundle["text/html"]
    assert "subject_last" in bundle["text/html"] and "edits that stand: 0" in bundle["text/html"]


@pytest.mark.parametrize("missing", ["ipywidgets", "anywidget"])
def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "lens_defense.app.explorer")
    with pytest.raises(ImportError, match=rf"needs {missing}, .* pip install 'lens-defense\[notebook\]'"):
        _ = ld.Explorer
