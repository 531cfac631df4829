"""The package's face: cheap to import, and every name is there (`make lint` holds the rooms)."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import lens_defense

PACKAGE = Path(lens_defense.__file__).parent
HEAVY = {"torch", "transformers", "transformer_lens"}


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    return set(ran.stdout.split())


@pytest.mark.parametrize("statement", ["import lens_defense", "import lens_defense.app.command_line"])
def test_importing_loads_nothing_heavy(statement):
    heavy = HEAVY | {"plotly", "pandas", "numpy", "scipy", "datasets"}
    assert not loaded_by(statement) & heavy


def test_dir_and_unknown_names():
    assert set(lens_defense.__all__) <= set(dir(lens_defense))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lens_defense.nothing


@pytest.mark.parametrize("name", lens_defense.__all__)
def test_every_name_is_there(name):
    named = getattr(lens_defense, name).__name__
    assert named.rpartition(".")[2] == name


BROUGHT_BY = {
    "markupsafe": "jinja2",
    "huggingface-hub": "transformers",
    "tokenizers": "transformers",
    "traitlets": "anywidget",
    "choreographer": "kaleido",
}
"""What is imported beside a library that declares it."""


def test_what_the_package_imports_is_declared():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirement_lines = [*project["dependencies"], *extras["notebook"], *extras["figures"]]
    declared = {re.split(r"[\[<>=]", line)[0] for line in requirement_lines}
    known = declared | {name for name, library in BROUGHT_BY.items() if library in declared}
    distributions = packages_distributions()
    for module in _imported(PACKAGE) - sys.stdlib_module_names - {PACKAGE.name}:
        names = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions[module]}
        assert names & known, f"{module} is imported and {', '.join(names)} is not declared"


def _imported(folder: Path) -> set[str]:
    """Top-level modules that the files of a folder import."""
    nodes = [node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in plain | froms}
