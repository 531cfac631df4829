"""The report as a person reads it: maps are hovered and chosen, rates open the answers behind them."""

from dataclasses import replace

import pytest
from browser.conftest import within
from helpers.handmade import HOSTILE, a_prompt, a_report, a_request, a_trace, an_edit, sites_at
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By

from lens_defense.app.report_page import Conversation, save_report

pytestmark = pytest.mark.timeout(120)


def opened(browser, path, text="ricin"):
    request = a_request(f"make {text} now", text)
    prompt = a_prompt(["make", f" {text}", " now", text], subject=(1, 2), request=request, template=())
    trace = a_trace(
        [prompt, a_prompt()], model=text, answers=[text, text], components=("resid_post", "mlp_out")
    )
    page = save_report(
        path / "report.html",
        title=text,
        trace=trace,
        sites=sites_at(),
        edit=an_edit([request, a_request()]),
        reports={text: a_report(title=text)},
        conversations=[Conversation(text, text, text, harmful=False)],
        reproduce=text,
        after=replace(trace, patched=trace.patched * 0.5),
    )
    browser.get(page.as_uri())
    within(lambda: browser.find_elements(By.CSS_SELECTOR, "svg rect.cell"))
    return page


def errors(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_map_is_hovered_and_chosen_and_a_rate_opens_its_answers(browser, tmp_path):
    opened(browser, tmp_path)
    assert len(browser.find_elements(By.CSS_SELECTOR, "[data-part='maps'] figure")) == 2 * 3
    marks = browser.find_elements(By.CSS_SELECTOR, "svg[data-component='resid_post'] .mark")
    assert len(marks) == 3 * len(sites_at()), "the chosen sites in before, after and difference"
    cell = browser.find_element(By.CSS_SELECTOR, "svg rect.cell.site[data-l='3']")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", cell)
    ActionChains(browser).move_to_element(cell).perform()
    assert "layer 3" in browser.find_element(By.CSS_SELECTOR, ".tip").text
    ActionChains(browser).click().perform()
    assert len(browser.find_elements(By.CSS_SELECTOR, "svg[data-component='resid_post'] .mark")) == 3
    rate = browser.find_element(By.CSS_SELECTOR, ".rates .link")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", rate)
    answers = browser.find_elements(By.CSS_SELECTOR, ".answers article")
    assert answers
    browser.find_element(By.CSS_SELECTOR, "input[type=search]").send_keys("no such words")
    assert not browser.find_elements(By.CSS_SELECTOR, ".answers article")
    buttons = browser.find_elements(By.CSS_SELECTOR, "main button")
    assert not [
        b.text for b in buttons if b.is_displayed() and b.text in ("Plan", "Apply", "Check these edits")
    ]
    assert not errors(browser)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_text(browser, tmp_path, text):
    opened(browser, tmp_path, text)
    scripts = browser.find_elements(By.CSS_SELECTOR, "script")
    assert len(scripts) == 2 and not browser.find_elements(By.CSS_SELECTOR, "main script")
    assert not errors(browser)
