"""The explorer's page as a person sees and uses it, whatever serves it."""

from browser.conftest import within
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By

STREAM = "svg[data-component='resid_post'][data-frame='before']"


class ShownPage:
    """One page in a window; its columns are those of the mean map."""

    def __init__(self, browser, roles, *, number=0):
        """Take the page with this number in the window; `roles` are the roles of its columns."""
        self.browser, self.roles, self.number = browser, roles, number

    @property
    def root(self):
        return self.browser.find_elements(By.CSS_SELECTOR, ".lens-explorer")[self.number]

    def find(self, selector):
        return self.root.find_element(By.CSS_SELECTOR, selector)

    def find_all(self, selector):
        return self.root.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.find(selector).get_attribute("textContent")

    def button(self, text):
        return next(button for button in self.find_all("button") if button.text.startswith(text))

    def press(self, text):
        """Press a button as soon as it can be pressed."""
        within(lambda: self.button(text).is_enabled())
        self.button(text).click()

    def answered(self):
        """Wait until Python has done, or refused, all that the page has asked for; then no work shows."""
        within(lambda: self.root.get_attribute("aria-busy") != "true")
        within(lambda: self.find(".job").get_attribute("hidden") is not None)

    def cell(self, layer, role="subject_last"):
        return self.find(f"{STREAM} rect.cell[data-l='{layer}'][data-c='{self.roles.index(role)}']")

    def click(self, layer, role="subject_last", *, shift=False):
        actions = ActionChains(self.browser)
        if shift:
            actions.key_down(Keys.SHIFT)
        actions.move_to_element(self.cell(layer, role)).click()
        if shift:
            actions.key_up(Keys.SHIFT)
        actions.perform()

    def box(self, first, last):
        actions = ActionChains(self.browser).move_to_element(self.cell(*first)).click_and_hold()
        actions.move_to_element(self.cell(*last)).release().perform()

    def keys(self, *keys):
        """Press keys where the focus is."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def marked(self, kind="mark"):
        """The layers and roles of the cells that the map marks, by where the marks lie."""
        places = self.browser.execute_script(
            """
            const svg = arguments[0].querySelector(arguments[1]);
            const cells = [...svg.querySelectorAll('rect.cell')];
            return [...svg.querySelectorAll(`.marks .${arguments[2]}`)].map((mark) => {
              const cell = cells.find((c) => Math.abs(c.x.baseVal.value + 1 - mark.x.baseVal.value) < .1
                && Math.abs(c.y.baseVal.value + 1 - mark.y.baseVal.value) < .1);
              return [+cell.dataset.l, +cell.dataset.c];
            });
            """,
            self.root,
            STREAM,
            kind,
        )
        return sorted((layer, self.roles[column]) for layer, column in places)
