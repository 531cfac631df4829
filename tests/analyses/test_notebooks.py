"""The committed notebook is its script, executed; it runs from top to bottom."""

import sys
import time
from pathlib import Path

import nbformat
import pytest
from helpers.real_model import needs_smollm2

HERE = Path(__file__).parents[2]
sys.path.insert(0, str(HERE / "analyses"))
import notebooks  # noqa: E402


@pytest.fixture(scope="module", params=notebooks.NAMES)
def name(request):
    return request.param


def committed(name):
    return nbformat.read(HERE / "notebooks" / f"{name}.ipynb", as_version=4)


def outputs(made):
    return [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_committed_notebook_is_its_script(name):
    told, script = committed(name), notebooks.cells_of(name)
    assert [(c.cell_type, c.source) for c in told.cells] == [(c.cell_type, c.source) for c in script.cells]
    assert [c.execution_count for c in told.cells if c.cell_type == "code"] == [
        *range(1, 1 + sum(c.cell_type == "code" for c in told.cells))
    ], "executed once, from top to bottom"


def test_a_picture_stands_beside_each_interactive_figure(name):
    figures = [
        o.data for o in outputs(committed(name)) if "application/vnd.plotly.v1+json" in o.get("data", {})
    ]
    assert len(figures) >= 2
    assert all("image/png" in figure for figure in figures)


def test_the_form_is_there_as_a_picture(name):
    told = outputs(committed(name))[-1].data
    assert "data:image/png;base64," in told["text/html"] and "selected: residual" in told["text/html"]
    assert "reach" in told["text/html"] and "<th>before</th><th>now</th>" in told["text/html"]
    assert not any("widget" in kind for kind in told), "a form is dead without a kernel"


def test_it_stays_small(name):
    assert (HERE / "notebooks" / f"{name}.ipynb").stat().st_size < 500_000


@pytest.mark.slow
@needs_smollm2
@pytest.mark.timeout(900)
def test_it_runs_from_top_to_bottom(name):
    start = time.monotonic()
    told = outputs(notebooks.executed(name, pictures=False))
    print(f"{name}: {time.monotonic() - start:.0f} s")
    assert not [output for output in told if output.output_type == "error"]
    (hashes,) = [text for o in told if (text := o.get("data", {}).get("text/plain", "")).startswith("('")]
    before, during, after = eval(hashes)
    assert before == after != during
