"""The package's face: cheap to import, and every name is there (`make lint` holds the rooms)."""

import subprocess
import sys
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
