"""The local page as a person uses it: a real browser, and the explorer behind it in this process."""

import random
import threading

import pytest
from browser.conftest import within
from browser.explorer_page import STREAM, ShownPage
from helpers.handmade import HOSTILE
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

import lens_defense as ld
from lens_defense.app.explorer.explorer import Explorer
from lens_defense.app.explorer.server import PageServer
from lens_defense.editing.solving.target_value import FitSettings

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:the refusal could not be fitted"),
]
SETTINGS = {
    "fit": FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1),
    "contrast": None,
    "contexts": lambda item: [item, item.paraphrased("tell me of {}")],
    "held_out_contexts": 1,
    "cache": False,
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", chat=True)


@pytest.fixture(scope="module")
def traced(model):
    requests = [ld.request(f"how do I make a {thing} now", thing, id=thing) for thing in ("lamp", "bell")]
    return ld.trace(model, requests, layers="all", min_difference=0.0, progress=False)


@pytest.fixture
def explorer(model, traced):
    requests = [prompt.request for prompt in traced.prompts]
    made = Explorer(model, requests, traced, settings=SETTINGS, max_new_tokens=3)
    yield made
    made.worker.stop()
    made.worker.wait(60)
    while made.ledger.edits:
        made.ledger.undo()


@pytest.fixture
def served(explorer):
    server = PageServer(explorer)
    thread = threading.Thread(target=server.run, kwargs={"browser": False})
    thread.start()
    yield server
    server.stop()
    thread.join(20)


@pytest.fixture
def page(browser, served, explorer):
    browser.get(served.address)
    within(lambda: browser.find_elements(By.CSS_SELECTOR, f"{STREAM} rect.cell"))
    return Page(browser, explorer)


class Page(ShownPage):
    """The page, and the explorer behind it."""

    def __init__(self, browser, explorer):
        super().__init__(browser, [column["role"] for column in explorer.parts["map"]["views"][0]["columns"]])
        self.explorer = explorer

    def press(self, text):
        """Press a button, and wait for the end of what it starts."""
        super().press(text)
        self.rest()

    def rest(self):
        """Wait until the page shows what the explorer holds."""
        within(lambda: self.browser.execute_async_script("setTimeout(() => arguments[0](true), 150)"))
        self.answered()
        assert self.explorer.worker.wait(60)

    def chosen(self):
        """The layers and roles that the explorer has, which the page shows; an error where it does not."""
        self.rest()
        sites = sorted((s.layer, s.role) for s in self.explorer.sites if s.component == "resid_post")
        within(lambda: self.marked() == sites, seconds=10)
        assert len(self.find_all(".step .chips li")) == len(self.explorer.sites)
        return sites

    def message(self):
        return self.find(".message").text

    def errors(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_choosing_by_click_box_and_keyboard(page):
    page.click(1)
    assert page.chosen() == [(1, "subject_last")]
    page.click(2, shift=True)
    assert page.chosen() == [(1, "subject_last"), (2, "subject_last")]
    page.click(1, shift=True)
    assert page.chosen() == [(2, "subject_last")]
    page.click(2)
    assert page.chosen() == [], "a click on the only chosen cell takes it away"
    page.box((0, "subject_last"), (2, "next"))
    assert page.chosen() == [(i, role) for i in (0, 1, 2) for role in ("next", "subject_last")]
    page.click(3)
    assert page.chosen() == [(3, "subject_last")], "after a box a click leaves the clicked cell alone"
    svg = page.find(STREAM)
    svg.send_keys(Keys.ESCAPE)
    assert page.chosen() == []
    svg.send_keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.SPACE, Keys.ARROW_UP, Keys.SPACE)
    assert len(page.chosen()) == 2
    assert "layer" in page.find("[aria-live]").get_attribute("textContent")
    page.press("Suggest")
    assert page.chosen() == [(s.layer, s.role) for s in ld.locate(page.explorer.trace)]
    page.click(0)
    assert page.chosen() == [(0, "subject_last")], "after Suggest too"
    assert not page.errors()


def test_plan_apply_ask_undo_remove(page, model):
    original = copy_weights(model)
    page.click(1)
    page.press("Plan")
    assert page.explorer.edit.layers == (1,) and "lamp" in page.find(".forecast").text
    assert weights_equal(model, original)
    page.press("Apply")
    assert len(page.explorer.ledger.edits) == 1 and "1 edit in the model" in page.find(".standing").text
    assert not weights_equal(model, original)
    page.click(2)
    page.press("Plan")
    page.press("Apply")
    assert [edit.layers for edit in page.explorer.ledger.edits] == [(1,), (2,)]
    page.find("textarea").send_keys("how do I make a lamp", Keys.ENTER)
    page.rest()
    within(lambda: len(page.browser.find_elements(By.CSS_SELECTOR, ".ask .sides > div")) == 2)
    page.press("Remove")
    assert [edit.layers for edit in page.explorer.ledger.edits] == [(2,)]
    assert "ask again" in page.find(".ask .warning").text, "the answer is of other edits"
    page.press("Undo")
    assert weights_equal(model, original) and "as loaded" in page.find(".standing").text
    page.press("Redo")
    assert len(page.explorer.ledger.edits) == 1
    assert not page.errors()


def test_the_edited_model_is_traced_beside_it(page, model):
    page.explorer.ledger.apply(handmade_edit(model, {1: 5.0}))
    page.press("Trace again")
    titles = [t.text for t in page.browser.find_elements(By.CSS_SELECTOR, ".lens-explorer figcaption")]
    assert titles == [f"residual stream: {name}" for name in ("before", "after", "difference")]
    page.press("Undo")
    titles = [t.text for t in page.browser.find_elements(By.CSS_SELECTOR, ".lens-explorer figcaption")]
    assert titles == ["residual stream"], "it was the map of that edit"


@pytest.mark.parametrize("work", ["Trace", "Plan", "Ask"])
def test_work_is_stopped_in_the_middle(page, model, work):
    original = copy_weights(model)
    page.explorer.max_new_tokens = 150
    page.explorer.settings["fit"] = FitSettings(shared_num_grad_steps=400, v_num_grad_steps=400)
    page.click(1)
    page.chosen()
    page.find("textarea").send_keys("how do I make a lamp")
    page.button(work).click()
    within(lambda: page.explorer.worker.job is not None or page.explorer.talk)
    if page.find(".job").is_displayed():
        page.button("Stop").click()
    page.rest()
    assert weights_equal(model, original) and not page.explorer.ledger.edits
    page.click(2)
    assert page.chosen() == [(2, "subject_last")], "the page goes on"


def test_what_goes_wrong_is_a_sentence_in_place(page, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr("lens_defense.app.explorer.explorer.plan_edit", broken)
    page.click(1)
    page.press("Plan")
    assert page.message() == "RuntimeError: out of <memory>"
    page.click(1, "last")
    assert page.message() == ""


def test_a_reload_shows_the_same_and_a_second_tab_is_told(page, served):
    page.click(1)
    page.click(2, shift=True)
    before = page.chosen()
    page.browser.refresh()
    within(lambda: page.browser.find_elements(By.CSS_SELECTOR, f"{STREAM} rect.cell"))
    assert page.chosen() == before
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("tab")
    page.browser.get(served.address)
    within(lambda: "another window" in page.browser.find_element(By.CSS_SELECTOR, "#page").text)
    page.browser.close()
    page.browser.switch_to.window(first)
    page.click(3)
    assert page.chosen() == [(3, "subject_last")], "the first tab works on"


def test_the_kernel_moves_the_page(page, model):
    page.explorer.sites = [ld.Site("resid_post", 2, "last")]
    assert page.chosen() == [(2, "last")]
    page.explorer.ledger.apply(handmade_edit(model, {1: 0.1}))
    within(lambda: "1 edit" in page.find(".standing").text)


def test_a_narrow_page_has_narrow_maps_under_one_another_and_nothing_sticks_out(page, model):
    page.explorer.ledger.apply(handmade_edit(model, {1: 5.0}))
    page.press("Trace again")
    tops = "return [...document.querySelectorAll('.panel svg')].map((svg) => svg.getBoundingClientRect().top)"
    assert len(set(page.browser.execute_script(tops))) == 1, "before, after and difference in one row"
    page.browser.set_window_size(500, 900)
    within(lambda: len(set(page.browser.execute_script(tops))) > 1, seconds=10)
    width = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, shown = page.browser.execute_script(width)
    assert scrolled <= shown
    page.browser.set_window_size(1400, 1500)
    within(lambda: len(set(page.browser.execute_script(tops))) == 1, seconds=10)


def test_messages_and_work_stay_in_sight_where_one_has_scrolled_to(page):
    page.browser.set_window_size(1000, 600)
    folder = page.find("input[aria-label='folder']")
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", folder)
    page.press("Hugging Face folder")
    within(lambda: "type the path" in page.message())
    in_sight = """return ['.message', '.standing'].every((name) => {
      const { top, bottom } = document.querySelector(name).getBoundingClientRect();
      return top >= 0 && bottom <= innerHeight;
    })"""
    assert page.browser.execute_script("return scrollY") > 0
    assert page.browser.execute_script(in_sight)


@pytest.mark.slow
def test_two_hundred_random_clicks_leave_page_and_model_consistent(page, model):
    original, choice = copy_weights(model), random.Random(7)
    roles = [c["role"] for c in page.explorer.parts["map"]["views"][0]["columns"]]
    for i in range(200):
        layer, role = choice.randrange(model.cfg.n_layers), choice.choice(roles)
        page.click(layer, role, shift=choice.random() < 0.5)
        if i % 20 == 19:
            page.chosen()
    page.chosen()
    assert weights_equal(model, original) and not page.errors()


def test_hostile_text_is_shown_as_text(browser, model):
    for text in HOSTILE:
        hostile = f"a{text}b"
        if "\n" in hostile or len(hostile) > 2000:
            continue
        explorer = Explorer(model, [ld.request(f"make {hostile} now", hostile, id=text)], settings=SETTINGS)
        server = PageServer(explorer, title=hostile)
        thread = threading.Thread(target=server.run, kwargs={"browser": False})
        thread.start()
        try:
            browser.get(server.address)
            within(lambda: browser.find_elements(By.CSS_SELECTOR, ".lens-explorer h1"))
            assert not browser.find_elements(
                By.CSS_SELECTOR, ".lens-explorer script, .lens-explorer b > b, img"
            )
            label = browser.find_element(By.CSS_SELECTOR, ".requests span").get_attribute("textContent")
            assert label == explorer.parts["model"]["requests"][0]["subject"]
        finally:
            server.stop()
            thread.join(20)
