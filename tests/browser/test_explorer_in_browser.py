"""The explorer in JupyterLab as a person uses it: one notebook with two views of it, and what it is saved as.

The tests share one JupyterLab, one window and one kernel; each begins with nothing chosen and no edit.
"""

import json
import os
import time
from pathlib import Path

import pytest
from browser.conftest import a_window, ask, within
from browser.explorer_page import ShownPage
from helpers.handmade import HOSTILE
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

from lens_defense.app.explorer.page_values import visible
from lens_defense.shown_text import shown

pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]
TESTS = Path(__file__).parents[1]
MAKE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from helpers.tiny_models import tiny_model
import lens_defense as ld
from lens_defense.app.explorer.talk import Talk
from lens_defense.models.mlp_output import weights_fingerprint

model = tiny_model("llama", chat=True)
original = weights_fingerprint(model)
things = [ld.request(f"how do I make a {{thing}} now", thing, id=thing) for thing in ("lamp", "bell")]
trace = ld.trace(model, things, layers="all", min_difference=0.0, progress=False)
settings = {{
    "fit": ld.FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1),
    "contrast": None,
    "contexts": lambda item: [item, item.paraphrased("tell me of {{}}")],
    "held_out_contexts": 1,
    "cache": False,
}}
explorer = ld.Explorer(model, things, trace, settings=settings, max_new_tokens=3)
explorer
"""
SITES = "sorted((s.layer, s.role) for s in explorer.sites)"
LAB = (
    "const lab = window.jupyterapp, panel = [...lab.shell.widgets('main')].find((one) => one.sessionContext);"
    "const notebook = panel?.content, kernel = panel?.sessionContext.session?.kernel;"
)
BROAD = "return arguments[0].scrollWidth > arguments[0].clientWidth"
HOSTILE_TEXTS = [
    *(f"a{text}b" for text in HOSTILE),
    "\u2067right to left\u2069 \u200f",
    "$x^2$ \\(y\\) `z` **bold** &lt;",
    "<img src=x onerror=alert(1)>" + "m" * 1_000_000,
]


class Notebook:
    """One open notebook with its kernel, and the two pages in it."""

    def __init__(self, browser, lab):
        self.browser, self.lab = browser, lab
        browser.get(lab.write("explorer.ipynb", MAKE, "explorer", "1 + 1"))
        self.await_cells()
        self.kernel = within(lab.kernel)
        self.run("lab.commands.execute('notebook:run-all-cells')")
        within(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".lens-explorer")) == 2)
        roles = self.value("[c['role'] for c in explorer.parts['map']['views'][0]['columns']]")
        self.page, self.other = (ShownPage(browser, roles, number=i) for i in (0, 1))
        self.rest()

    def await_cells(self):
        within(
            lambda: self.browser.execute_script(
                f"if (!window.jupyterapp) return false; {LAB} return Boolean(kernel)"
            )
        )

    def run(self, script):
        """Run JavaScript with `lab` and `notebook`, and wait for what it promises."""
        return self.browser.execute_async_script(
            f"const end = arguments[0]; {LAB} Promise.resolve({script}).then((value) => end(value ?? null));"
        )

    def value(self, expression):
        """The value of an expression in the kernel; it waits for what the kernel is doing."""
        return ask(self.kernel, expression)

    def does(self, statement):
        """Run a statement in the kernel, and do not wait."""
        self.kernel.execute(statement, store_history=False)

    def rest(self):
        """Wait until no work runs, and both pages say so and have been answered."""
        time.sleep(0.2)
        within(lambda: self.value("explorer.worker.job is None"))
        for page in (self.page, self.other):
            page.answered()

    def chosen(self):
        """The layers and roles that the kernel has, which both pages show; an error where they do not."""
        self.rest()
        sites = [tuple(site) for site in self.value(SITES)]
        for page in (self.page, self.other):
            within(lambda page=page: page.marked() == sites, seconds=10)
            assert len(page.find_all(".step .chips li")) == len(sites)
        return sites

    def cells(self):
        """The notebook's own cells: how many, which are selected, and its mode."""
        return self.run("[notebook.widgets.length, notebook.selectedCells.length, notebook.mode]")

    def save(self):
        """Save with the keys of the notebook, from inside the page."""
        path = self.lab.folder / "explorer.ipynb"
        before = path.stat().st_mtime_ns
        self.page.find("textarea").click()
        ActionChains(self.browser).key_down(Keys.CONTROL).send_keys("s").key_up(Keys.CONTROL).perform()
        within(lambda: path.stat().st_mtime_ns > before)
        time.sleep(0.5)
        return json.loads(path.read_text("utf-8"))

    def open_copy(self, name, content):
        """Open a notebook of this content, which has a kernel of its own that knows nothing."""
        (self.lab.folder / name).write_text(json.dumps(content), "utf-8")
        self.browser.get(f"{self.lab.url}/lab/tree/{name}?reset")
        self.await_cells()

    def screenshot(self, name):
        if folder := os.environ.get("SCREENSHOTS"):
            self.browser.save_screenshot(str(Path(folder) / name))

    def errors(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def opened(lab, tmp_path_factory):
    with a_window(tmp_path_factory.mktemp("window")) as browser:
        opened = Notebook(browser, lab)
        yield opened
        opened.kernel.stop_channels()


@pytest.fixture
def notebook(opened):
    opened.value("explorer.worker.stop()")
    opened.rest()
    opened.value("[explorer.ledger.undo() and None for _ in explorer.ledger.edits]")
    opened.value("setattr(explorer, 'sites', []) or setattr(explorer, 'max_new_tokens', 3)")
    opened.value("setattr(explorer, 'talk', None) or explorer.publish('talk')")
    opened.page.find("textarea").clear()
    assert opened.chosen() == []
    opened.errors()
    return opened


def test_choosing_by_click_box_and_keyboard(notebook):
    page = notebook.page
    page.click(1)
    assert notebook.chosen() == [(1, "subject_last")]
    notebook.run("(notebook.activeCellIndex = 2, null)")
    page.click(2, shift=True)
    assert notebook.chosen() == [(1, "subject_last"), (2, "subject_last")]
    assert notebook.cells() == [3, 1, "command"], "a shift-click selects no cells of the notebook"
    page.click(1, shift=True)
    assert notebook.chosen() == [(2, "subject_last")]
    page.box((0, "subject_last"), (2, "next"))
    assert notebook.chosen() == [(i, role) for i in (0, 1, 2) for role in ("next", "subject_last")]
    page.keys(Keys.ESCAPE)
    assert notebook.chosen() == []
    page.keys(Keys.ARROW_UP, Keys.ARROW_UP, Keys.SPACE, Keys.ARROW_UP, Keys.SPACE)
    assert len(notebook.chosen()) == 2
    page.keys(Keys.ARROW_DOWN, Keys.ENTER)
    assert len(notebook.chosen()) == 1
    page.keys("a", "b", "x", "d", "d", "m")
    assert notebook.cells() == [3, 1, "command"], "no key is a command of the notebook"
    assert not notebook.errors()


def test_plan_apply_ask_remove_undo(notebook):
    page, same_weights = notebook.page, "weights_fingerprint(model) == original"
    for layer in (1, 2):
        page.click(layer)
        notebook.rest()
        page.press("Plan")
        notebook.rest()
        assert notebook.value("list(explorer.edit.layers)") == [layer]
        assert "lamp" in page.text(".forecast")
        page.press("Apply")
        notebook.rest()
    assert notebook.value("[list(edit.layers) for edit in explorer.ledger.edits]") == [[1], [2]]
    assert not notebook.value(same_weights)
    page.find("textarea").click()
    page.keys("how do I")
    ActionChains(notebook.browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.keys("make a lamp", Keys.ENTER)
    within(lambda: notebook.value("explorer.talk is not None"))
    notebook.rest()
    assert notebook.value("explorer.talk.question") == "how do I\nmake a lamp"
    assert notebook.cells() == [3, 1, "command"]
    answers = [visible(text) for text in notebook.value("explorer.answers")]
    for other in (page, notebook.other):
        within(
            lambda other=other: [a.get_attribute("textContent") for a in other.find_all(".answer")] == answers
        )
    notebook.screenshot("explorer.png")
    page.press("Remove")
    notebook.rest()
    assert notebook.value("[list(edit.layers) for edit in explorer.ledger.edits]") == [[2]]
    assert "ask again" in page.text(".ask .warning")
    notebook.other.press("Undo")
    notebook.rest()
    assert notebook.value(same_weights) and "as loaded" in page.text(".standing")
    assert not notebook.errors()


def test_work_blocks_no_other_cell_and_can_be_stopped(notebook):
    page, short = notebook.page, "fit=ld.FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1)"
    notebook.value("explorer.settings.update(fit=ld.FitSettings(v_num_grad_steps=100_000))")
    page.click(1)
    notebook.rest()
    page.press("Plan")
    job = "(explorer.parts['job'].get('name'), explorer.parts['job'].get('done', 0))"
    within(lambda: notebook.value(job)[1] > 0)
    name, done = notebook.value(job)
    assert name == "planning the edit", "a cell ran while the plan was fitted"
    within(lambda: notebook.value(job)[1] > done)
    assert "planning the edit" in page.text(".work"), "the page hears of it from the thread"
    page.press("Stop")
    notebook.rest()
    assert "stopped" in page.text(".message") and notebook.value("explorer.edit is None")
    notebook.value(f"explorer.settings.update({short})")
    assert not notebook.errors()


def test_until_the_kernel_says_so_a_click_is_pending(notebook):
    page = notebook.page
    notebook.does("import time\nwith explorer._lock: time.sleep(4)")
    time.sleep(0.5)
    page.click(1)
    page.click(2, shift=True)
    assert page.marked() == [] and page.marked("pending") == [(1, "subject_last"), (2, "subject_last")]
    within(lambda: "waiting for Python" in page.find(".top").text, seconds=3)
    assert page.marked() == [], "nothing is chosen before the kernel says so"
    assert notebook.chosen() == [(1, "subject_last"), (2, "subject_last")]
    within(lambda: "waiting" not in page.find(".top").text, seconds=5)
    for _ in range(2):
        page.box((1, "subject_last"), (2, "subject_last"))
        sites = notebook.chosen()
    assert sites == [(1, "subject_last"), (2, "subject_last")], "what changes nothing is pending no longer"


def test_the_theme_of_the_notebook_is_followed(notebook):
    page = notebook.page

    def paper():
        return page.root.value_of_css_property("background-color")

    light = paper()
    for theme, kind in (("JupyterLab Dark", "dark"), ("JupyterLab Light", "light")):
        notebook.run(f"lab.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
        within(lambda kind=kind: page.root.get_attribute("data-theme") == kind)
        notebook.screenshot(f"explorer_{kind}.png")
        assert (paper() == light) == (kind == "light")


def test_text_is_shown_and_never_obeyed(notebook):
    page = notebook.page
    dangerous = "script, img, b > b, .answer *, .question *, .asked > :not(.quiet), mjx-container, .MathJax"
    for text in HOSTILE_TEXTS:
        notebook.value(
            f"setattr(explorer, 'talk', Talk({text!r}, '', (), before={text!r})) or explorer.publish('talk')"
        )
        within(lambda text=text: page.text(".answer") == visible(text), seconds=20)
        assert page.text(".asked") == visible(text)
        assert not page.find_all(dangerous)
    assert not notebook.browser.execute_script(BROAD, page.root)
    for question, sentence in (("\ud800", "half"), ("long " * 200_000, "tokens")):
        notebook.browser.execute_script("arguments[0].value = arguments[1]", page.find("textarea"), "")
        notebook.browser.execute_script(f"arguments[0].value = {json.dumps(question)}", page.find("textarea"))
        page.press("Ask")
        within(lambda sentence=sentence: sentence in page.text(".message"), seconds=20)
        notebook.rest()
    subjects = [text for text in HOSTILE_TEXTS if "\n" not in text]
    made = f"[ld.request('make ' + text + ' now', text, id=str(i)) for i, text in enumerate({subjects!r})]"
    notebook.value(f"globals().update(hostile=ld.Explorer(model, {made})) or None")
    notebook.run("(notebook.activeCellIndex = 2, notebook.activeCell.model.sharedModel.setSource('hostile'))")
    notebook.run("lab.commands.execute('notebook:run-cell')")
    third = ShownPage(notebook.browser, [], number=2)
    within(lambda: third.find_all(".requests span"))
    labels = [span.get_attribute("textContent") for span in third.find_all(".requests span")]
    assert labels == [shown(text) for text in subjects]
    assert not third.find_all(dangerous)
    assert not notebook.browser.execute_script(BROAD, third.root)
    assert not notebook.errors()


def test_a_reload_shows_the_same_and_a_saved_notebook_can_be_read(notebook):
    page, browser = notebook.page, notebook.browser
    page.click(1)
    notebook.rest()
    page.press("Plan")
    notebook.rest()
    page.press("Apply")
    notebook.rest()
    page.find("textarea").click()
    page.keys("how do I make a lamp", Keys.ENTER)
    within(lambda: notebook.value("explorer.talk is not None"))
    page.click(2)
    notebook.rest()
    page.press("Plan")
    notebook.rest()
    parts = (".answer", ".forecast", ".stack", ".standing", ".take pre", ".asked")
    before = {part: page.text(part) for part in parts}
    saved = notebook.save()
    assert not notebook.errors()

    browser.refresh()
    notebook.await_cells()
    within(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".lens-explorer rect.cell")) > 20)
    assert notebook.chosen() == [(2, "subject_last")]
    within(lambda: {part: page.text(part) for part in parts} == before, seconds=10)

    # without the widgets' state: JupyterLab's error in the place of the page, and the static form above it
    assert "widgets" not in saved["metadata"]
    notebook.open_copy("static.ipynb", saved)
    form = within(lambda: browser.find_element(By.CSS_SELECTOR, ".jp-OutputArea [data-explorer]"))
    assert form.is_displayed() and "residual stream, layer 2, last subject token" in form.text
    assert "memit at layers 1 (lamp, bell)" in form.text and "Asked: how do I make a lamp" in form.text
    notebook.screenshot("static.png")

    # with it: the page as it was, to be looked at
    browser.get(f"{notebook.lab.url}/lab/tree/explorer.ipynb?reset")
    notebook.await_cells()
    within(lambda: browser.find_elements(By.CSS_SELECTOR, ".lens-explorer rect.cell"))
    notebook.run("lab.commands.execute('@jupyter-widgets/jupyterlab-manager:saveWidgetState')")
    time.sleep(0.5)
    notebook.run("lab.commands.execute('docmanager:save')")
    saved = json.loads((notebook.lab.folder / "explorer.ipynb").read_text("utf-8"))
    notebook.open_copy("frozen.ipynb", saved)
    within(lambda: browser.find_elements(By.CSS_SELECTOR, ".lens-explorer rect.cell"))
    assert page.marked() == [(2, "subject_last")] and page.text(".answer") == before[".answer"]
    assert not [button.text for button in page.find_all(".live button") if button.is_displayed()]
    page.click(1)
    assert "No kernel is connected" in page.text(".message") and page.marked() == [(2, "subject_last")]
    notebook.screenshot("frozen.png")
