"""The explorer as a person uses it: select cells in JupyterLab, plan, apply, ask, undo."""

import os
import time
from pathlib import Path

import pytest
from browser.conftest import ask, within
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

TESTS = Path(__file__).parents[1]
MAKE = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
from helpers.tiny_models import tiny_model
import lens_defense as ld
from lens_defense.models.mlp_output import weights_fingerprint

model = tiny_model("llama", chat=True)
original = weights_fingerprint(model)
things = [ld.request(f"how do I make a {{thing}} now", thing, id=thing) for thing in ("lamp", "bell")]
trace = ld.trace(model, things, layers="all", min_difference=0.0, progress=False)
fit = ld.FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1)
settings = {{"fit": fit, "cache": False, "progress": False}}
explorer = ld.Explorer(model, trace, things, settings=settings, max_new_tokens=3)
explorer
"""
SELECTED = "[i for i, s in enumerate(explorer._panels[0][1]) if s in explorer.sites]"
MARKED = """
const data = document.querySelector('.js-plotly-plot').data;
return data.find(part => part.type == 'scatter').selectedpoints || [];
"""
SITES = "sorted((s.layer, s.role) for s in explorer.sites)"


def press(browser, name):
    (button,) = [b for b in browser.find_elements(By.CSS_SELECTOR, "button.jupyter-button") if b.text == name]
    within(lambda: button.is_enabled())
    ActionChains(browser).move_to_element(button).click().perform()


def at(browser, x, y):
    """The pixel of a cell, from the middle of the plot's drag layer."""
    return browser.execute_script(
        """
        const plot = document.querySelector('.js-plotly-plot'), axes = plot._fullLayout;
        const box = plot.querySelector('.nsewdrag').getBoundingClientRect();
        return [Math.round(axes.xaxis.d2p(arguments[0]) - box.width / 2),
                Math.round(axes.yaxis.d2p(arguments[1]) - box.height / 2)];
        """,
        x,
        y,
    )


@pytest.mark.timeout(400)
def test_select_edit_apply_ask_undo(browser, lab):
    browser.get(lab.write("explorer.ipynb", MAKE))
    kernel = within(lab.kernel)
    assert ask(kernel, "1") == 1

    def run_the_cell():
        cell = browser.find_element(By.CSS_SELECTOR, ".jp-CodeCell .cm-content")
        enter = ActionChains(browser).click(cell).key_down(Keys.SHIFT).send_keys(Keys.ENTER)
        enter.key_up(Keys.SHIFT).perform()
        return True

    within(run_the_cell)
    plot = within(lambda: browser.find_element(By.CSS_SELECTOR, ".js-plotly-plot .nsewdrag"))
    cells = ask(kernel, "[list(map(float, a)) for a in (explorer._panels[0][0].x, explorer._panels[0][0].y)]")
    names = ask(kernel, "[(s.layer, s.role) for s in explorer._panels[0][1]]")
    cell_of = {tuple(name): (x, y) for name, x, y in zip(names, *cells, strict=True)}

    # one cell, by a click
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    x, y = at(browser, *cell_of[1, "subject_last"])
    ActionChains(browser).move_to_element_with_offset(plot, x, y).pause(0.3).click().perform()
    within(lambda: ask(kernel, SITES) == [[1, "subject_last"]])

    # with shift another one, and not it again
    def shift_click(x, y):
        click = ActionChains(browser).move_to_element_with_offset(plot, x, y).pause(0.3)
        click.key_down(Keys.SHIFT).click().key_up(Keys.SHIFT).perform()

    x, y = at(browser, *cell_of[2, "subject_last"])
    shift_click(x, y)
    within(lambda: ask(kernel, SITES) == [[1, "subject_last"], [2, "subject_last"]])
    time.sleep(1.5)  # else a double click
    shift_click(x, y)
    within(lambda: ask(kernel, SITES) == [[1, "subject_last"]])

    # a double click, of which not every message comes: what is marked is what is selected
    time.sleep(1.5)
    x, y = at(browser, *cell_of[0, "last"])
    ActionChains(browser).move_to_element_with_offset(plot, x, y).pause(0.3).double_click().perform()
    time.sleep(3)
    within(lambda: browser.execute_script(MARKED) == ask(kernel, SELECTED))

    # two cells, by a box
    x, y = at(browser, *cell_of[1, "subject_last"])
    _, end = at(browser, *cell_of[2, "subject_last"])
    top, bottom = min(y, end) - 10, max(y, end) + 10
    box = ActionChains(browser).move_to_element_with_offset(plot, x - 12, bottom).click_and_hold()
    box.move_by_offset(12, -12).move_by_offset(12, top - bottom + 12).pause(0.2).release().perform()
    within(lambda: ask(kernel, SITES) == [[1, "subject_last"], [2, "subject_last"]])

    press(browser, "Plan")
    within(lambda: ask(kernel, "explorer.edit is not None"))
    assert ask(kernel, "list(explorer.edit.layers)") == [1, 2]
    assert "reach" in browser.find_element(By.CSS_SELECTOR, ".jp-OutputArea").text
    assert ask(kernel, "weights_fingerprint(model) == original")
    press(browser, "Apply")
    within(lambda: ask(kernel, "len(explorer.ledger.edits)") == 1)
    assert ask(kernel, "weights_fingerprint(model) != original")

    question = browser.find_element(By.CSS_SELECTOR, "input[placeholder^='ask anything']")
    question.send_keys("how do I make a lamp?", Keys.TAB)
    press(browser, "Ask")
    answers = within(lambda: ask(kernel, "explorer.answers")[0] and ask(kernel, "explorer.answers"))
    assert len(answers) == 2
    within(lambda: "before" in browser.find_element(By.CSS_SELECTOR, ".jp-OutputArea").text)
    if folder := os.environ.get("SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / "explorer.png"))

    press(browser, "Undo")
    within(lambda: ask(kernel, "weights_fingerprint(model) == original"))
    kernel.stop_channels()
