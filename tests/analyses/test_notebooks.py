"""Each committed notebook is its script, executed; it runs, and reads well without a kernel."""

import ast
import re
import time
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from helpers.real_model import needs_smollm2

import notebooks
from lens_defense.plotting.theme import find_chromium

ROOT = Path(__file__).parents[2]
LINKS = re.compile(r"\]\(([^)#]+)\)")
SECONDS = 180
"""What a notebook may take on two idle cores; the test allows for busy ones."""
WITH_EXPLORER = {"explore_sites", "edit_interactively", "your_own_model"}


@pytest.fixture(scope="module", params=notebooks.NAMES)
def name(request):
    return request.param


def committed(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_is_a_script_for_each_notebook_and_no_other():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(notebooks.NAMES)


def test_the_committed_notebook_is_its_script(name):
    cells, script = committed(name).cells, notebooks.cells_of(name).cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in script]
    counts = [c.execution_count for c in cells if c.cell_type == "code"]
    assert counts == [*range(1, 1 + len(counts))], "executed once, from top to bottom"


def test_it_asks_one_question_first(name):
    first = notebooks.cells_of(name).cells[0]
    heading = first.source.split("\n")[0]
    assert first.cell_type == "markdown" and heading.startswith("# ") and heading.endswith("?")


def test_what_it_links_to_is_there(name):
    for cell in notebooks.cells_of(name).cells:
        if cell.cell_type == "markdown":
            for link in LINKS.findall(cell.source):
                assert (ROOT / "notebooks" / link).is_file(), link


def test_nothing_that_was_said_on_the_side_is_kept(name):
    """No warning, no error, no progress bar, and nothing of the machine that ran it."""
    for output in outputs(committed(name)):
        assert output.output_type != "error" and output.get("name") != "stderr"
        assert notebooks.WIDGET not in output.get("data", {}), "a widget is dead without a kernel"
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/| object at 0x", text)


def test_a_picture_stands_beside_each_interactive_figure(name):
    figures = [
        o.data for o in outputs(committed(name)) if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    assert figures or name in WITH_EXPLORER
    assert all("image/png" in figure for figure in figures)


def test_the_explorer_is_there_as_a_picture(name):
    pages = [
        o.data["text/html"]
        for o in outputs(committed(name))
        if "<b>In the model:</b>" in o.get("data", {}).get("text/html", "")
    ]
    assert bool(pages) == (name in WITH_EXPLORER)
    for html in pages:
        (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
        assert b64decode(picture, validate=True).endswith(b"IEND\xaeB`\x82"), "the picture is cut off"


def test_it_stays_small(name):
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 700_000


def _run(name):
    start = time.monotonic()
    made = outputs(notebooks.executed(name, pictures=False))
    seconds = time.monotonic() - start
    assert not [o for o in made if o.output_type == "error"]
    said = "".join(o.text for o in made if o.get("name") == "stderr")  # kaleido logs there on a busy machine
    assert "Warning:" not in said, said
    assert seconds < 4 * SECONDS, f"{name} took {seconds:.0f} s"
    print(f"{name}: {seconds:.0f} s")
    return made


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "small",
    ["explore_sites", pytest.param("paper_figures", marks=pytest.mark.slow), "your_own_model"],
)
def test_it_runs_from_top_to_bottom_on_the_organism(small):
    if small == "paper_figures":
        try:
            find_chromium()
        except ValueError as error:
            pytest.skip(str(error))
    _run(small)


@pytest.mark.slow
@needs_smollm2
@pytest.mark.timeout(1800)
def test_an_edit_by_hand_refuses_and_is_taken_back_bit_for_bit():
    texts = [o.get("data", {}).get("text/plain", "") for o in _run("edit_interactively")]
    (hashes,) = [ast.literal_eval(text) for text in texts if text.startswith("{'original'")]
    assert hashes["original"] == hashes["undone"] != hashes["edited"]
    answers = [ast.literal_eval(text) for text in texts if text.startswith("(") and "Site(" not in text]
    assert answers[0][1] == "", "before, no edit stands"
    assert answers[1][1].startswith("I'm sorry") and not answers[1][0].startswith("I'm sorry")


@pytest.mark.slow
@needs_smollm2
@pytest.mark.timeout(1800)
def test_a_check_runs_from_top_to_bottom():
    _run("check_the_result")
