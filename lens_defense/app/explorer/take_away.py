"""What a person takes away: files as bytes for the browser, or a folder on this machine."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.save import save_folder
from lens_defense.plotting.heatmap import heatmap
from lens_defense.plotting.theme import save_figure
from lens_defense.sites import Site
from lens_defense.tracing.trace_result import Trace


def edit_file(standing: Sequence[Edit], plan: Edit | None) -> tuple[str, bytes]:
    """The plan where there is one, else the last edit that stands, as `Edit.load` reads it; and its name.

    Raises:
        ValueError: there is neither.
    """
    if plan is None and not standing:
        raise ValueError("nothing is planned and nothing stands; plan an edit first")
    edit, number = plan or standing[-1], len(standing)
    name = "plan" if plan else "edit" if number == 1 else f"edit_{number}_of_{number}"
    with TemporaryDirectory() as folder:
        return f"{name}.safetensors", edit.save(Path(folder) / "edit.safetensors").read_bytes()


def figure_file(trace: Trace, sites: tuple[Site, ...], suffix: str) -> bytes:
    """The map as a paper figure, the chosen cells outlined."""
    with TemporaryDirectory() as folder:
        return save_figure(heatmap(trace, sites), Path(folder) / f"map.{suffix}").read_bytes()


def model_folder(ledger: Ledger, path: str) -> Path:
    """Write the model with the edits that stand as a Hugging Face folder.

    Raises:
        ValueError: no path was given, or something is there already.
    """
    return save_folder(ledger.model, _new_folder(path))


def adapter_folder(ledger: Ledger, path: str) -> Path:
    """Write all edits that stand as one LoRA adapter.

    Raises:
        ValueError: no path was given, something is there already, or no edit stands.
    """
    return ledger.to_peft(_new_folder(path))


def _new_folder(path: str) -> Path:
    if not path.strip():
        raise ValueError("type the path of a new folder first")
    return Path(path).expanduser()
