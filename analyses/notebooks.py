"""Notebooks are made of the scripts beside this file: the same cells, executed, with a picture of each figure.

python analyses/notebooks.py [NAME ...]
"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

from lens_defense.storage import atomic_write

HERE = Path(__file__).parent
NAMES = ("explore_sites", "edit_interactively", "check_the_result", "paper_figures", "your_own_model")
WIDGET = "application/vnd.jupyter.widget-view+json"


def cells_of(name: str) -> nbformat.NotebookNode:
    """The notebook of a script, not executed."""
    notebook = jupytext.read(HERE / f"{name}.py")
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
        cell.metadata = {}
    return notebook


def executed(name: str, *, pictures: bool = True, seconds: int = 900) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a folder that is thrown away; pictures want a Chromium."""
    notebook = cells_of(name)
    renderer = "plotly_mimetype+png" if pictures else "plotly_mimetype"
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=seconds, resources={"metadata": {"path": folder}})
        client.execute(env={**os.environ, "PLOTLY_RENDERER": renderer})
    notebook.metadata.pop(
        "widgets", None
    )  # the state of bars and forms: megabytes, and dead without a kernel
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times differ from run to run
        if cell.cell_type == "code":
            for output in cell.outputs:  # of a form its picture is left; of a bar nothing
                if output.get("data", {}).pop(WIDGET, None) and "text/html" not in output.data:
                    output.data.clear()
            shown_outputs = [output for output in cell.outputs if output.get("data", True)]
            cell.outputs = [output for output in shown_outputs if not _of_a_busy_machine(output)]
    return notebook


def _of_a_busy_machine(output: nbformat.NotebookNode) -> bool:
    """Whether it is the announcement of a long trace, which says how busy the machine was."""
    return output.output_type == "stream" and output.text.startswith("This trace takes about")


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        notebook = executed(name)
        with atomic_write(HERE.parent / "notebooks" / f"{name}.ipynb") as file:
            nbformat.write(notebook, file)
        print(f"notebooks/{name}.ipynb")
