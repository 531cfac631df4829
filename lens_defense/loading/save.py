"""Saving a model as a Hugging Face folder, which appears whole or not at all, with its files' hashes."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lens_defense.loading.loaded_model import loaded_model
from lens_defense.models.mlp_output import settle
from lens_defense.models.weight_journal import journal_of
from lens_defense.storage import new_folder


def save_folder(model: TransformerBridge, path: str | os.PathLike[str]) -> Path:
    """Write the model as it is now as a Hugging Face folder that plain transformers loads.

    The folder's lens_defense.json has the hashes of its files; `load` checks them.

    Returns:
        The folder.

    Raises:
        ValueError: the folder exists and is not empty, now or when everything is written; nothing is written
            over.
    """
    return write_folder(loaded_model(model, "ld.save_folder(model, folder)"), path)


def write_folder(
    model: TransformerBridge,
    path: str | os.PathLike[str],
    add_files: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Write a model's folder as `save_folder` does.

    Args:
        model: the model.
        path: the folder.
        add_files: is handed the folder before it appears in its place, with the model's files in it.
    """
    about = {"model": str(model.cfg.model_name)}
    with new_folder(path, about) as unfinished, journal_of(model).lock:  # another thread's change waits
        settle(model)
        _write_model(model, unfinished)
        add_files(unfinished)
    return Path(path)


def plain_weights(model: TransformerBridge) -> dict[str, Tensor]:
    """The weights by their names in plain transformers, not copied."""
    return _weights_of(model, _plain_model(model))


def _write_model(model: TransformerBridge, folder: Path) -> None:
    plain, generation_config = _plain_model(model), getattr(model.original_model, "generation_config", None)
    with quiet_transformers():
        if generation_config is not None:
            plain.generation_config = generation_config
        plain.save_pretrained(folder, state_dict=_weights_of(model, plain))
        model.tokenizer.save_pretrained(folder)


def _plain_model(model: TransformerBridge) -> Any:
    """The model in plain transformers, without its weights."""
    with quiet_transformers(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.original_model.config)


def _weights_of(model: TransformerBridge, plain: Any) -> dict[str, Tensor]:
    state = model.original_model.state_dict()
    weights = {name.replace("._original_component", ""): tensor for name, tensor in state.items()}
    return {name: weights[name] for name in plain.state_dict()}


_ONE_THREAD = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bars, notices or warnings; its settings are restored.

    One thread at a time: these settings, and PyTorch's default dtype, which transformers changes while it
    builds a model, belong to the whole process. Two that restore them in turn would leave the wrong ones.
    """
    with _ONE_THREAD:
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
