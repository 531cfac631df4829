"""The package's face and house: cheap to import, every name there, imports down the floors only."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lens_defense

PACKAGE = Path(lens_defense.__file__).parent
FLOORS = {
    **dict.fromkeys(("prompts", "sites", "solvers", "weights", "intervals", "judges", "files", "devices"), 1),
    **dict.fromkeys(("turns", "models", "patches", "batches", "readers", "metrics"), 2),
    **dict.fromkeys(
        ("sweeps", "moments", "rows", "values", "generations", "corruptions", "suites", "attributions"), 3
    ),
    **dict.fromkeys(
        (
            "traces",
            "tracers",
            "grids",
            "runs",
            "lenses",
            "edits",
            "editors",
            "forecasts",
            "spreads",
            "inferences",
        ),
        4,
    ),
    **dict.fromkeys(("locators", "ledgers", "controls", "surveys"), 5),
    **dict.fromkeys(("reports", "checks"), 6),
    **dict.fromkeys(("themes", "markup", "marks", "comparisons", "plots", "pages", "explorers"), 7),
    **dict.fromkeys(("demos", "cli"), 8),
    "organisms.phrasings": 1,
    **dict.fromkeys(("organisms.world", "organisms.questions"), 2),
    **dict.fromkeys(("organisms.interchanges", "organisms.exams", "organisms.truths"), 3),
    **dict.fromkeys(("organisms.training", "organisms.releases"), 4),
}
HEAVY = {"torch", "transformers", "transformer_lens"}


def modules() -> dict[str, Path]:
    """The modules that exist, by name."""
    found = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    within = {f"organisms.{path.stem}": path for path in PACKAGE.glob("organisms/[!_]*.py")}
    return {**found, **within, "suites": PACKAGE / "suites/__init__.py"}


def imports(path: Path) -> set[str]:
    """What a module imports at any depth: top-level names, and this package's by their own."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "lens_defense":
            names |= {f"lens_defense.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names.add(node.module)
    own = {n.removeprefix("lens_defense.") for n in names if n.startswith("lens_defense.")}
    return own | {name.split(".")[0] for name in names}


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    code = f"import sys; {statement}; print(*sorted(sys.modules))"
    ran = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=PACKAGE.parent
    )
    return set(ran.stdout.split())


@pytest.mark.parametrize("statement", ["import lens_defense", "import lens_defense.cli"])
def test_importing_loads_nothing_heavy(statement):
    heavy = HEAVY | {"plotly", "pandas", "numpy", "scipy", "datasets"}
    assert not loaded_by(statement) & heavy


def test_dir_and_unknown_names():
    assert set(lens_defense.__all__) <= set(dir(lens_defense))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lens_defense.nothing


@pytest.mark.parametrize("name", lens_defense.__all__)
def test_every_name_is_there(name):
    assert getattr(lens_defense, name).__name__ == name


def test_every_module_stands_on_a_floor():
    assert set(modules()) <= set(FLOORS), "a new file: which floor does it stand on?"


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_down_the_floors(name):
    used = imports(modules()[name]) & set(FLOORS) - {name}
    assert not {other for other in used if FLOORS[other] > FLOORS[name]}


def test_no_circle():
    graph = {name: imports(path) & set(FLOORS) - {name} for name, path in modules().items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph)


def test_who_never_imports_whom():
    own = {name: imports(path) for name, path in modules().items()}
    assert not own["solvers"] & set(FLOORS)
    assert not {"traces", "tracers"} & (own["edits"] | own["editors"])
    assert not {name for name, used in own.items() if "plots" in used} - {"pages", "explorers", "cli"}
    for name in {"themes", "marks", "comparisons", "plots", "pages"} & set(own):
        assert not own[name] & (HEAVY | {"models", "patches"})
