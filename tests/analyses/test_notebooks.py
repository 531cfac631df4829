"""The committed notebook is its script, executed; it runs from top to bottom."""

import time
from pathlib import Path

import nbformat
import pytest
from helpers.real_model import needs_smollm2

import notebooks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=notebooks.NAMES)
def name(request):
    return request.param


def committed(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_committed_notebook_is_its_script(name):
    cells, script = committed(name).cells, notebooks.cells_of(name).cells
    assert [(c.cell_type, c.source) for c in cells] == [(c.cell_type, c.source) for c in script]
    counts = [c.execution_count for c in cells if c.cell_type == "code"]
    assert counts == [*range(1, 1 + len(counts))], "executed once, from top to bottom"


def test_a_picture_stands_beside_each_interactive_figure(name):
    figures = [
        o.data for o in outputs(committed(name)) if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    assert len(figures) >= 2
    assert all("image/png" in figure for figure in figures)


def test_the_form_is_there_as_a_picture(name):
    form = outputs(committed(name))[-1].data
    html = form["text/html"]
    assert "data:image/png;base64," in html and "selected: resid_post" in html
    assert "reach" in html and "<th>before</th><th>now</th>" in html
    assert not any("widget" in kind for kind in form), "a form is dead without a kernel"


def test_it_stays_small(name):
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 500_000


@pytest.mark.slow
@needs_smollm2
@pytest.mark.timeout(1800)
def test_it_runs_from_top_to_bottom(name):
    start = time.monotonic()
    made = outputs(notebooks.executed(name, pictures=False))
    print(f"{name}: {time.monotonic() - start:.0f} s")
    assert not [output for output in made if output.output_type == "error"]
    (hashes,) = [text for o in made if (text := o.get("data", {}).get("text/plain", "")).startswith("('")]
    before, during, after = eval(hashes)
    assert before == after != during
