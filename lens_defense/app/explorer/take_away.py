"""What a person takes away: files as bytes for the browser, or a folder on this machine."""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformer_lens.model_bridge import TransformerBridge

from lens_defense.editing.edit_plan import Edit
from lens_defense.loading.save import save_folder
from lens_defense.plotting.heatmap import heatmap
from lens_defense.plotting.theme import save_figure
from lens_defense.sites import Site
from lens_defense.tracing.trace_result import Trace


def edit_file(edit: Edit) -> bytes:
    """An edit as `Edit.load` reads it."""
    with TemporaryDirectory() as folder:
        return edit.save(Path(folder) / "edit.safetensors").read_bytes()


def figure_file(trace: Trace, sites: tuple[Site, ...], suffix: str) -> bytes:
    """The map as a paper figure, the chosen cells outlined."""
    with TemporaryDirectory() as folder:
        return save_figure(heatmap(trace, sites), Path(folder) / f"map.{suffix}").read_bytes()


def model_folder(model: TransformerBridge, path: str) -> Path:
    """Write the model with the edits that stand as a Hugging Face folder.

    Raises:
        ValueError: no path was given, or something is there already.
    """
    if not path.strip():
        raise ValueError("type the path of a new folder first")
    return save_folder(model, Path(path).expanduser())
