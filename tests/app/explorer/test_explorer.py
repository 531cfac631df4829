"""What the page's buttons do, and that what is shown is what is used. No browser here."""

import json
import threading
import time
from base64 import b64decode
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense as ld
from lens_defense.app.explorer import explorer as explorers
from lens_defense.app.explorer.explorer import Explorer
from lens_defense.editing.solving.target_value import FitSettings

pytestmark = pytest.mark.filterwarnings("ignore:the refusal could not be fitted")
SETTINGS = {
    "fit": FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1),
    "contrast": None,
    "contexts": lambda item: [item, item.paraphrased("tell me of {}")],
    "held_out_contexts": 1,
    "cache": False,
    "progress": False,
}
SUITE = ld.suite("core").small(paraphrases=1, jailbreaks=1, frames=0, names=0, same_subject=1, harmless=2)
SUITE = replace(SUITE, neutral=())


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@pytest.fixture(scope="module")
def traced(model):
    requests = [ld.request(f"how do I make a {thing} now", thing, id=thing) for thing in ("lamp", "bell")]
    return ld.trace(model, requests, positions="all", layers=2, min_difference=0.0, progress=False)


@pytest.fixture
def explorer(model, traced):
    requests = [prompt.request for prompt in traced.prompts]
    made = Explorer(model, requests, traced, settings=SETTINGS, small_suite=SUITE, max_new_tokens=3)
    yield made
    made.worker.stop()
    assert made.worker.wait(60)
    while made.ledger.edits:
        made.ledger.undo()


def done(explorer, command, **values):
    """Press a button, and wait; the page's message."""
    explorer.do(command, **values)
    assert explorer.worker.wait(120), "the work did not end"
    return explorer.parts["message"]


def cell(layer, role="subject_last", component="resid_post"):
    return {"component": component, "layer": layer, "role": role}


def listed(explorer):
    return [(s["component"], s["layer"], s["role"]) for s in explorer.parts["sites"]["sites"]]


def test_what_the_page_lists_is_what_is_chosen_and_what_is_edited(explorer):
    assert done(explorer, "choose", cells=[cell(0), cell(1), cell(2)]) == ""
    assert listed(explorer) == [("resid_post", layer, "subject_last") for layer in (0, 1, 2)]
    assert [site.layer for site in explorer.sites] == [0, 1, 2]
    explorer.do("choose", cells=[cell(1)], how="toggle")
    explorer.do("choose", cells=[cell(3)], how="add")
    assert [layer for _, layer, _ in listed(explorer)] == [0, 2, 3]
    assert done(explorer, "plan") == ""
    assert explorer.edit.layers == (0, 2, 3) and explorer.parts["plan"]["layers"] == "0, 2, 3"
    explorer.do("choose", cells=[cell(1)])
    assert explorer.edit is None and explorer.parts["plan"] == {}, "a plan is of the cells that are marked"


def test_a_click_after_suggest_leaves_only_the_clicked_cell(explorer):
    explorer.do("suggest")
    assert len(explorer.sites) > 1 and "plateau" in explorer.parts["sites"]["reason"]
    assert explorer.sites == ld.locate(explorer.trace)
    explorer.do("choose", cells=[cell(2)])
    assert listed(explorer) == [("resid_post", 2, "subject_last")]
    assert explorer.parts["sites"]["reason"] == ""


def test_every_layer_of_the_model_is_a_row_also_one_that_was_not_traced(explorer, model):
    assert explorer.trace.layers == (0, 2)
    grid = explorer.parts["map"]["views"][0]["grids"]["resid_post"]
    assert len(grid) == model.cfg.n_layers == 4
    assert all(cell is None for cell in grid[1]) and any(cell is not None for cell in grid[2])


def test_a_cell_of_the_page_is_the_effect_of_the_trace(explorer):
    view = explorer.parts["map"]["views"][2]
    for layer in explorer.trace.layers:
        for column, about in enumerate(view["columns"]):
            if about["position"] is not None:
                effect = explorer.trace.effects[1, 0, explorer.trace.layers.index(layer), about["position"]]
                assert view["grids"]["resid_post"][layer][column][0] == pytest.approx(float(effect), abs=6e-4)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"cells": [cell(9)]}, "layers 0 to 3"),
        ({"cells": [cell(-1)]}, "counted from 0"),
        ({"cells": [cell(1, component="attn_out")]}, "cannot be edited"),
        ({"cells": [cell(1, role="template")]}, "layers"),
        ({"cells": [cell("1")]}, "whole number"),
        ({"cells": [cell(True)]}, "whole number"),
        ({"cells": ["x"]}, "cells are wanted"),
        ({"cells": [{}]}, "a cell has"),
        ({"cells": [cell(1, component="<script>")]}, "cannot be edited"),
    ],
)
def test_a_cell_that_does_not_exist_is_refused_and_nothing_is_lost(explorer, values, sentence):
    explorer.do("choose", cells=[cell(1)])
    assert sentence in done(explorer, "choose", **values)
    assert listed(explorer) == [("resid_post", 1, "subject_last")]


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("nothing", {}),
        ("__init__", {}),
        ("choose", {"cell": 1}),
        ("set_plan", {"model": "x"}),
        ("set_plan", {"strength": "1"}),
        ("set_plan", {"strength": float("nan")}),
        ("set_plan", {"strength": 0}),
        ("set_plan", {"method": "nothing"}),
        ("set_plan", {"requests": ["lamp"]}),
        ("set_plan", {"requests": [2]}),
        ("set_plan", {"requests": [True]}),
        ("set_trace", {"number": 0}),
        ("set_trace", {"components": [1]}),
        ("set_trace", {"components": ["nothing"]}),
        ("set_trace", {"metric": "nothing"}),
        ("set_trace", {"direction": "sideways"}),
        ("remove", {"index": 0}),
        ("remove", {"index": "0"}),
        ("ask", {"question": ""}),
        ("ask", {"question": 3}),
        ("ask", {"question": "x", "template": "nothing"}),
        ("ask", {"question": "\ud800"}),
        ("control", {"which": "nothing"}),
        ("take", {"what": "nothing"}),
        ("take", {"what": "folder", "path": ""}),
        ("apply", {}),
        ("check", {}),
        ("trace_after", {}),
        ("undo", {}),
        ("redo", {}),
    ],
)
def test_what_cannot_be_done_is_a_sentence(explorer, model, command, values):
    original, before = copy_weights(model), {**explorer.parts, "message": "", "job": {}}
    message = done(explorer, command, **values)
    assert message and "Traceback" not in message and len(message) < 400
    assert {**explorer.parts, "message": "", "job": {}} == before
    assert weights_equal(model, original)


def test_plan_apply_undo_redo_and_remove_from_the_middle(explorer, model):
    original = copy_weights(model)
    stages = []
    for layer in (0, 1, 2):
        explorer.do("choose", cells=[cell(layer)])
        assert done(explorer, "plan") == ""
        assert weights_equal(model, original if not stages else stages[-1])
        assert done(explorer, "apply") == ""
        assert explorer.edit is None, "a plan is made once"
        stages.append(copy_weights(model))
    assert [edit["layers"] for edit in explorer.parts["stack"]["edits"]] == ["0", "1", "2"]
    assert done(explorer, "remove", index=1) == ""
    assert [edit["layers"] for edit in explorer.parts["stack"]["edits"]] == ["0", "2"]
    assert done(explorer, "undo") == "" and done(explorer, "undo") == ""
    assert weights_equal(model, original) and explorer.parts["stack"]["edits"] == []
    assert done(explorer, "redo") == ""
    assert len(explorer.parts["stack"]["edits"]) == 1


@pytest.mark.filterwarnings("ignore::lens_defense.editing.edit_plan.EditWarning")
def test_strength_is_shown_to_first_order_at_once_and_solved_for_by_apply(explorer, monkeypatch):
    explorer.do("choose", cells=[cell(1), cell(2)])
    assert done(explorer, "plan") == ""
    whole, plan = explorer.parts["plan"], explorers.plan_edit

    def refuse(*_, **__):
        raise AssertionError("it was planned again")

    monkeypatch.setattr(explorers, "plan_edit", refuse)
    explorer.do("set_plan", strength=0.5)
    half = explorer.parts["plan"]
    assert (half["strength"], half["scaled"], whole["scaled"]) == (0.5, True, False)
    assert half["change"] == pytest.approx(whole["change"] / 2, abs=1e-3)
    assert half["leak"] == pytest.approx(whole["leak"] / 2, abs=2e-3)
    assert "strength=0.5" in explorer.parts["code"] and ".scaled(" not in explorer.parts["code"]
    monkeypatch.setattr(explorers, "plan_edit", plan)
    assert done(explorer, "apply") == ""
    (standing,) = explorer.ledger.edits
    assert standing.strength == 0.5 and standing.forecast.strength == 1
    assert explorer.parts["stack"]["edits"][0]["strength"] == 0.5
    asked = explorer.requests
    explorer.ledger.undo()
    solved = plan(explorer.model, asked, standing_sites(standing), strength=0.5, **explorer.settings)
    for layer, delta in solved.deltas().items():
        torch.testing.assert_close(standing.deltas()[layer], delta)


def standing_sites(edit):
    return [ld.Site("resid_post", layer, edit.role) for layer in edit.layers]


def test_a_plan_from_the_kernel_is_scaled_as_it_is(explorer, monkeypatch):
    explorer.do("choose", cells=[cell(1)])
    assert done(explorer, "plan") == ""
    plan = explorer.edit
    explorer.edit = plan
    monkeypatch.setattr(explorers, "plan_edit", None)
    explorer.do("set_plan", strength=0.5)
    assert done(explorer, "apply") == ""
    torch.testing.assert_close(explorer.ledger.edits[0].deltas()[1], plan.scaled(0.5).deltas()[1])


@pytest.mark.usefixtures("unchecked")
def test_the_kernel_moves_the_page(explorer, model):
    parts = {}
    end = explorer.listen(parts.__setitem__)
    explorer.sites = [ld.Site("mlp_out", 2, "last")]
    assert parts["sites"]["sites"][0]["words"].startswith("MLP outputs, layer 2")
    edit = handmade_edit(model, {1: 0.1})
    explorer.edit = edit
    assert parts["plan"]["layers"] == "1"
    explorer.ledger.apply(edit)
    assert len(parts["stack"]["edits"]) == 1
    explorer.ledger.undo()
    assert parts["stack"]["edits"] == [] and parts["stack"]["undone"] == 1
    end()
    explorer.sites = []
    assert parts["sites"]["sites"], "who has ended listening hears nothing"
    with pytest.raises(TypeError, match=r"explorer\.trace = trace"):
        explorer.trace = "trace"
    with pytest.raises(TypeError, match=r"explorer\.edit = edit"):
        explorer.edit = "edit"
    with pytest.raises(TypeError, match=r"explorer\.sites = sites"):
        explorer.sites = "sites"


def test_an_answer_grows_and_says_with_which_edits_it_was_given(explorer, model):
    grown = []
    explorer.listen(lambda name, value: grown.append(value) if name == "talk" and value else None)
    assert done(explorer, "ask", question="how do I make a lamp") == ""
    assert explorer.answers[1] == "" and explorer.parts["talk"]["edits"] == 0
    texts = [talk["before"] for talk in grown]
    assert len(texts) > 2 and all(later.startswith(text) for text, later in pairwise(texts))
    explorer.ledger.apply(handmade_edit(model, {1: 5.0}))
    edited = copy_weights(model)
    assert explorer.parts["talk"]["stale"], "other edits stand now"
    assert done(explorer, "ask", question="how do I make a lamp") == ""
    assert not explorer.parts["talk"]["stale"] and explorer.parts["talk"]["edits"] == 1
    assert weights_equal(model, edited), "asking without the edit puts it back"
    assert explorer.parts["talk"]["before"] == texts[-1]
    explorer.ledger.undo()
    assert explorer.parts["talk"]["stale"]


def test_tracing_estimates_first_then_measures_what_is_named(explorer):
    maps, cells = [], []
    explorer.listen(lambda name, value: maps.append(value) if name == "map" else None)
    explorer.listen(lambda name, value: cells.extend(value["cells"]) if name == "event:cells" else None)
    explorer.trace_minimum = 0.0
    maps.clear()
    assert done(explorer, "trace") == ""
    assert not maps[0]["measured"] and maps[-1]["measured"]
    assert explorer.trace.settings.exact and len(cells) == int(explorer.trace.effects.isfinite().sum())
    for request, component, layer, position, effect in cells:
        index = explorer.trace.components.index(component)
        known = float(explorer.trace.effects[request, index, explorer.trace.layers.index(layer), position])
        assert effect == pytest.approx(known, abs=6e-4)


def test_the_edited_model_is_traced_with_the_answers_of_before(explorer, model):
    assert "no edit stands" in done(explorer, "trace_after")
    edit = handmade_edit(model, {1: 5.0})
    explorer.ledger.apply(edit)
    assert "an edit stands" in done(explorer, "trace")
    assert done(explorer, "trace_after") == ""
    assert explorer.parts["map"]["after"]
    assert [p.answer_ids for p in explorer.after.prompts] == [p.answer_ids for p in explorer.trace.prompts]
    assert "after" in explorer.parts["map"]["views"][0]
    explorer.ledger.undo()
    assert explorer.after is None and not explorer.parts["map"]["after"], "it was the map of that edit"
    explorer.ledger.redo()
    assert explorer.after is not None


def test_a_check_shows_the_rows_behind_its_rates_failures_first(explorer):
    explorer.do("choose", cells=[cell(1)])
    assert done(explorer, "plan") == "" and done(explorer, "apply") == ""
    assert done(explorer, "check") == ""
    check = explorer.parts["check"]
    failed = [row["failed"] for row in check["answers"]]
    assert failed == sorted(failed, reverse=True) and len(check["answers"]) == len(explorer.report.rows)
    assert {rate["arm"] for rate in check["rates"]} <= {row["arm"] for row in check["answers"]}
    assert all(row["question"] == "" for row in check["answers"] if row["arm"] == "jailbreak")
    assert any(row["question"] for row in check["answers"] if row["arm"] == "paraphrase")
    assert not check["stale"]
    explorer.ledger.undo()
    assert explorer.parts["check"]["stale"]


@pytest.mark.parametrize("command", ["trace", "plan", "ask", "check"])
def test_stopping_in_the_middle_leaves_the_model_as_it_was(explorer, model, command):
    explorer.do("choose", cells=[cell(1)])
    if command == "check":
        explorer.ledger.apply(handmade_edit(model, {1: 0.1}))
    before, standing = copy_weights(model), explorer.ledger.edits
    explorer.max_new_tokens = 150
    values = {"ask": {"question": "how do I make a lamp"}}.get(command, {})
    explorer.do(command, **values)
    time.sleep(0.05)
    explorer.do("stop")
    assert explorer.worker.wait(60)
    assert explorer.parts["job"] == {} and explorer.ledger.edits == standing
    assert weights_equal(model, before)
    assert threading.active_count() < 20
    explorer.max_new_tokens = 3
    assert done(explorer, "ask", question="and now?") == "", "the next command works"


def test_one_job_at_a_time_and_the_page_stays_usable(explorer):
    explorer.max_new_tokens = 150
    explorer.do("ask", question="how do I make a lamp")
    explorer.do("ask", question="and a bell")
    assert "still answering" in explorer.parts["message"]
    explorer.do("choose", cells=[cell(2)])
    assert [site.layer for site in explorer.sites] == [2]
    assert explorer.parts["job"]["name"] == "answering"
    explorer.do("stop")
    assert explorer.worker.wait(60)


def test_an_error_is_a_sentence_and_leaves_the_model_as_it_was(explorer, model, monkeypatch):
    original = copy_weights(model)

    def broken(*_, **__):
        raise RuntimeError("out of <memory>\nat line 3")

    explorer.do("choose", cells=[cell(1)])
    monkeypatch.setattr(explorers, "plan_edit", broken)
    assert done(explorer, "plan") == "RuntimeError: out of <memory> at line 3"
    assert weights_equal(model, original) and explorer.parts["job"] == {}


def test_hostile_text_is_given_a_shape_before_it_is_sent(model):
    hostile = "a lamp \x1b[31m<script>alert(1)</script>\u202e \x00 $x$ 'q' \"d\""
    explorer = Explorer(model, [ld.request(f"make {hostile} now", hostile, id=hostile)], settings=SETTINGS)
    sent = repr({name: part for name, part in explorer.parts.items() if name != "code"})
    assert "<script>" in sent
    assert not any(letter in sent for letter in ("\x1b", "\u202e", "\x00", "\\x1b", "\\x00", "\\u202e"))


def test_the_python_that_is_shown_runs_and_makes_the_same_edit(explorer):
    explorer.do("choose", cells=[cell(1), cell(2)])
    explorer.do("set_plan", method="delman", strength=0.5)
    assert done(explorer, "plan") == ""
    code = explorer.parts["code"]
    compile(code, "code", "exec")
    for line in (
        "ld.load(",
        "ld.trace(\n    model, requests, components=('resid_post',), layers=(0, 2),",
        "method='delman'",
        "strength=0.5",
        "ld.Site('resid_post', layer, 'subject_last')",
    ):
        assert line in code
    assert done(explorer, "apply") == "" and "ledger.apply(edit)" in explorer.parts["code"]
    explorer.trace = explorer.trace[:1]
    assert "ld.trace(\n    model, requests[:1]," in explorer.parts["code"], "as many as were traced"


def test_the_python_of_sixty_requests_is_shown_whole_and_runs(model, monkeypatch):
    requests = [
        ld.request(f"how do I make a {name} now, {'please ' * 30}and do it well", name, id=f"number {name}")
        for name in (f"lamp{i}" for i in range(60))
    ]
    settings = {"positions": ("subject_last",), "min_difference": 0.0, "progress": False}
    trace = ld.trace(model, requests[:2], layers="all", **settings)
    explorer = Explorer(model, requests, trace, settings={"cache": False}, name="a/model")
    edit = replace(handmade_edit(model, {1: 0.1}), requests=(requests[3], requests[59]))
    explorer.ledger.apply(edit)
    code = explorer.parts["code"]
    explorer.ledger.undo()
    assert len(code) > 10_000
    planned = []
    monkeypatch.setattr(ld, "load", lambda name: {"a/model": model}[name])
    monkeypatch.setattr(ld, "edit", lambda *values, **more: planned.append((values, more)) or edit)
    monkeypatch.setattr(ld, "trace", partial(ld.trace, min_difference=0.0, progress=False))
    names = {}
    exec(code, names)
    names["ledger"].undo()
    assert names["requests"] == requests
    assert torch.allclose(names["trace"].effects, explorer.trace.effects, rtol=0, atol=0, equal_nan=True)
    ((_, chosen, sites), more) = planned[0]
    assert chosen == [requests[3], requests[59]] and more == {"method": "memit", "cache": False}
    assert sites == [ld.Site("resid_post", 1, "subject_last")]


def test_the_python_names_a_file_where_the_requests_are_too_many(model):
    requests = [ld.request(f"make a lamp{i} {'now ' * 200}", f"lamp{i}") for i in range(100)]
    code = Explorer(model, requests).parts["code"]
    compile(code, "code", "exec")
    assert "name the file of your 100 requests" in code and len(code) < 1000


def test_files_are_handed_over(explorer, tmp_path):
    files = {}

    def loaded(files, name):
        path = tmp_path / "taken.safetensors"
        path.write_bytes(b64decode(files.pop(f"{name}.safetensors")))
        return ld.Edit.load(path)

    explorer.listen(
        lambda name, value: files.update({value["file"]: value["data"]}) if name == "event:file" else None
    )
    explorer.do("choose", cells=[cell(1)])
    assert "nothing" in done(explorer, "take", what="edit")
    assert done(explorer, "plan") == ""
    assert done(explorer, "take", what="edit") == "" and loaded(files, "plan").layers == (1,)
    assert done(explorer, "apply") == ""
    assert done(explorer, "take", what="edit") == "" and loaded(files, "edit").layers == (1,)
    message = done(explorer, "take", what="folder", path=str(tmp_path / "model"))
    assert "written" in message and (tmp_path / "model" / "config.json").is_file()
    assert "not empty" in done(explorer, "take", what="folder", path=str(tmp_path / "model"))
    explorer.ledger.apply(handmade_edit(explorer.model, {2: 0.1}))
    assert done(explorer, "take", what="edit") == "" and loaded(files, "edit_2_of_2").layers == (2,)
    assert "written" in done(explorer, "take", what="adapter", path=str(tmp_path / "adapter"))
    explorer.ledger.undo()
    explorer.ledger.undo()
    adapter = ld.load_adapter(tmp_path / "adapter", explorer.model)
    assert adapter.layers == (1, 2), "every edit that stands"


def test_the_report_tells_of_every_edit_that_stood(explorer):
    files = {}
    explorer.listen(
        lambda name, value: files.update({value["file"]: value["data"]}) if name == "event:file" else None
    )
    for layer in (1, 2):
        explorer.do("set_plan", requests=[layer - 1], strength=layer / 2)
        explorer.do("choose", cells=[cell(layer)])
        assert done(explorer, "plan") == "" and done(explorer, "apply") == ""
    assert "press Check" in done(explorer, "take", what="report")
    assert done(explorer, "check") == ""
    explorer.do("choose", cells=[cell(0, "last")])
    explorer.ledger.undo()
    assert done(explorer, "take", what="report") == ""
    page = b64decode(files["report.html"]).decode()
    start = page.index('id="parts">') + len('id="parts">')
    parts = json.loads(page[start : page.index("</script>", start)])
    assert [parts[f"plan{i}"]["layers"] for i in (0, 1)] == ["1", "2"]
    assert [parts[f"plan{i}"]["subjects"] for i in (0, 1)] == [["lamp"], ["bell"]]
    assert [parts[f"plan{i}"]["strength"] for i in (0, 1)] == [0.5, 1.0]
    assert "plan2" not in parts and 'data-of="plan1"' in page
    assert "<td>1</td><td>memit</td><td>1</td><td>last subject token</td><td>50%</td>" in page
    assert [(site["layer"], site["role"]) for site in parts["sites"]["sites"]] == [
        (1, "subject_last"),
        (2, "subject_last"),
    ], "the edits' cells, whatever is chosen now"
    assert any(row["question"] for row in parts["check0"]["answers"])
    assert page.count("ledger.apply(edit)") == 2, "the Python of what was checked"
    assert "and taken back" not in page, "the edits stood"
