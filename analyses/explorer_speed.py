# %% [markdown]
# # How fast the page answers
# The explorer of smollm2 on its local page, in a headless Chromium on the same machine, pressed as a person
# presses it. Each time is the browser's own: from the event to the frame in which the page shows the answer.
# So it holds the way to Python and back. "While tracing" is the same while the worker thread runs an exact trace.
#
#     python analyses/explorer_speed.py [--model smollm2] [--out FILE]

# %%
import argparse
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from tidy import replace_rows

import lens_defense as ld
from lens_defense.app.explorer.server import PageServer

OUT = Path(__file__).parent / "results" / "explorer_speed.csv"
CLICKS = 20
BARS = {
    "first picture": 5.0,
    "exact map of the subject's and the last token": 60.0,
    "click to highlight": 0.1,
    "click to highlight, while tracing": 0.1,
    "forecast after a change of strength": 1.0,
    "first token of an answer": 1.0,
    "stop of a trace": 1.0,
}
"""Seconds that are aimed at, on two cores."""

# %% [markdown]
# In the page: do something, then look at every frame until a condition holds.

# %%
UNTIL = """
const [action, condition] = [new Function(arguments[0]), new Function(`return ${arguments[1]}`)];
const done = arguments[arguments.length - 1], start = performance.now();
action();
const look = () => (condition() ? done(performance.now() - start) : requestAnimationFrame(look));
requestAnimationFrame(look);
"""
PRESS = "[...document.querySelectorAll('.lens-explorer button')].find((b) => b.textContent.startsWith('{}')).click()"
CLICK = """
const panel = document.querySelector("svg[data-component='resid_post'][data-frame='before']");
const cells = [...panel.querySelectorAll('rect.cell.site')];
window.cell = cells[(window.place = ((window.place ?? 0) + 7) % cells.length)];
const {{ x, y, width, height }} = window.cell.getBoundingClientRect();
for (const kind of ['pointerdown', 'pointerup'])
  window.cell.dispatchEvent(new PointerEvent(kind, {{ bubbles: true, button: 0, pointerId: 1,
    clientX: x + width / 2, clientY: y + height / 2 }}));
""".replace("{{", "{").replace("}}", "}")
MARKED = """[...document.querySelectorAll("svg[data-component='resid_post'] .marks .mark")].some((mark) =>
  Math.abs(mark.x.baseVal.value - 1 - window.cell.x.baseVal.value) < .1 &&
  Math.abs(mark.y.baseVal.value - 1 - window.cell.y.baseVal.value) < .1)"""
IDLE = "document.querySelector('.job').hidden"


@contextmanager
def open_page(explorer: ld.Explorer) -> Iterator[webdriver.Chrome]:
    """A browser that shows an explorer."""
    server = PageServer(explorer)
    thread = threading.Thread(target=server.run, kwargs={"browser": False})
    thread.start()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    with tempfile.TemporaryDirectory() as folder:
        for flag in ("--headless=new", "--no-sandbox", "--disable-quic", "--disable-background-networking"):
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={folder}")
        options.add_argument("--window-size=1440,1200")
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        browser.set_script_timeout(900)
        try:
            browser.get(server.address)
            browser.execute_async_script(
                UNTIL, "", "document.querySelector('.lens-explorer h1')?.textContent"
            )
            yield browser
        finally:
            browser.quit()
            server.stop()
            thread.join()


def measure(name: str) -> dict[str, list[float]]:
    """Seconds of each thing that a person waits for, a list of repetitions each."""
    explorer = ld.Explorer(ld.load(name))
    with open_page(explorer) as browser:

        def seconds(action: str, condition: str) -> float:
            return browser.execute_async_script(UNTIL, action, condition) / 1000

        def clicks(number: int) -> list[float]:
            return [seconds(CLICK, MARKED) for _ in range(number)]

        times: dict[str, list[float]] = {}
        trace = PRESS.format("Trace")
        first = seconds(trace, "document.querySelector('rect.cell')")
        times["first picture"] = [first]
        times["click to highlight, while tracing"] = clicks(CLICKS)
        start = time.perf_counter()
        seconds("", IDLE)
        rest = time.perf_counter() - start
        times["exact map of the subject's and the last token"] = [
            first + sum(times["click to highlight, while tracing"]) + rest
        ]
        times["click to highlight"] = clicks(CLICKS)
        seconds(PRESS.format("Suggest"), "document.querySelectorAll('.step .chips li').length > 1")
        seconds(PRESS.format("Plan"), "document.querySelector('.forecast table')")
        seconds("", IDLE)
        slide = "const s = document.querySelector('input[type=range]'); s.value = {}; s.dispatchEvent(new Event('input'))"
        times["forecast after a change of strength"] = [
            seconds(
                slide.format(strength),
                f"document.querySelector('.forecast').textContent.includes('{strength}%')",
            )
            for strength in (50, 75, 125, 150)
        ]
        seconds(PRESS.format("Apply"), "document.querySelector('.standing').textContent.includes('1 edit')")
        seconds("document.querySelector('.chip.harmful').click()", IDLE)
        times["first token of an answer"] = [
            seconds(PRESS.format("Ask"), "document.querySelector('.prose.answer')?.textContent")
        ]
        seconds("", IDLE)
        seconds(PRESS.format("Trace again"), "!document.querySelector('.job').hidden")
        time.sleep(2)
        times["stop of a trace"] = [seconds(PRESS.format("Stop"), IDLE)]
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    for what, times in measure(arguments.model).items():
        row = {
            "n": len(times),
            "median": statistics.median(times),
            "largest": max(times),
            "bar": BARS[what],
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        }
        replace_rows(arguments.out, {"model": arguments.model, "what": what}, [row], digits=4)
        print(f"{what}: {row['median']:.3f} s, at most {row['largest']:.3f} s (bar {row['bar']} s)")


if __name__ == "__main__":
    main()
