"""Saving a model as a Hugging Face folder, which appears whole or not at all."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lens_defense.models.mlp_output import settle
from lens_defense.models.weight_journal import journal_of


def save_folder(model: TransformerBridge, path: str | os.PathLike[str]) -> Path:
    """Write the model as it is now as a Hugging Face folder that plain transformers loads.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists and is not empty, now or when everything is written; nothing is written
            over.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; name a new folder")
    try:
        with journal_of(model).lock:  # another thread's change of the weights waits
            settle(model)
            _write_folder(model, folder)
    except FileExistsError as error:
        raise ValueError(
            f"{folder} was written by something else while this model was saved, and that was left as it is; "
            "name a new folder"
        ) from error
    return folder


def _write_folder(model: TransformerBridge, folder: Path) -> None:
    original = model.original_model
    weights = {
        name.replace("._original_component", ""): tensor for name, tensor in original.state_dict().items()
    }
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(original.config)
    if getattr(original, "generation_config", None) is not None:
        plain.generation_config = original.generation_config
    with atomic_folder(folder) as unfinished, quiet_transformers():
        plain.save_pretrained(unfinished, state_dict={name: weights[name] for name in plain.state_dict()})
        model.tokenizer.save_pretrained(unfinished)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields:
        The folder to write to; it is renamed to `folder` at the end.

    Raises:
        FileExistsError: something was written there meanwhile; it stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError as error:  # a rename replaces nothing but an empty folder
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FileExistsError(f"{folder} exists and is not empty") from error
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bars, notices or warnings; its settings are restored."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
