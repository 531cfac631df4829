"""Refusals: what is wrong with a model, in one sentence; most of it is in its config, before any weights.

A library that is fed a broken folder raises something else at every depth. So what can be told is told here.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import cached_file

from lens_defense.loading.text_part import has_text_model, reads_more_than_text
from lens_defense.shown_text import one_line


def read_config(source: str, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a folder or a hub model.

    Raises:
        ValueError: there is none, it wants code of its own, or it names a dtype or sizes that cannot be.
    """
    try:
        fields, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError) as error:
        raise ValueError(explain_failure(source, error)) from error
    if _values_called(fields, "auto_map") and not trust_remote_code:
        raise ValueError(
            f"{source} brings code of its own; read it, then load it in Python: "
            "ld.load(..., trust_remote_code=True)"
        )
    for dtype in (*_values_called(fields, "dtype"), *_values_called(fields, "torch_dtype")):
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
        raise ValueError(explain_failure(source, error)) from error
    refuse_impossible_sizes(source, config)
    return config


def _values_called(fields: Any, name: str) -> list[Any]:
    """The values of this name, but for empty ones, at any depth of a JSON object."""
    parts = fields.values() if isinstance(fields, dict) else fields if isinstance(fields, list) else ()
    own = [fields[name]] if isinstance(fields, dict) and fields.get(name) else []
    return own + [value for part in parts for value in _values_called(part, name)]


_PARAMETERS_PER_BYTE = 4
"""More than any way of storing weights holds."""


def refuse_impossible_sizes(source: str, config: PretrainedConfig) -> None:
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


def refuse_other_kinds_of_model(source: str, config: PretrainedConfig, allow_pickle: bool) -> None:
    """Refuse what is no causal language model of attention layers, and a folder without weights to be loaded.

    Raises:
        ValueError: so it is; says what it is and what to load instead.
    """
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
            "state, and tracing reuses cached keys and values; load a model whose layers are all attention"
        )
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if not (any(folder.glob("*.bin")) or any(folder.glob("*.pt"))):
        raise ValueError(
            f"the folder {folder} holds no weights (*.safetensors); copy them there, or give another folder"
        )
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds pickled weights only, which can run code when loaded; convert them to "
            "safetensors, or insist in Python: ld.load(..., allow_pickle=True)"
        )


def _keeps_a_running_state(config: Any) -> bool:
    """Whether a layer is something else than attention: a state space, a recurrence, a convolution."""
    layers = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if layers:
        return any("attention" not in layer or layer.startswith("linear") for layer in layers)
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(model_class, "_is_stateful", False))


def refuse_index(source: str, config: PretrainedConfig, allow_pickle: bool) -> None:
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
                        "convert it to safetensors, or insist in Python: ld.load(..., allow_pickle=True)"
                    )


def explain_failure(source: str, error: Exception) -> str:
    """What to say where a library could not load a model."""
    if Path(source).is_dir():
        return f"the folder {source} could not be loaded: {one_line(error)}"
    return (
        f"{source!r} is no bundled name (smollm2, organism) and no folder here, and the hub does not give "
        "it: it is not cached here and there is no network, or there is no such safetensors model; check "
        "the name, or download it on a machine with network and load the folder. The library says: "
        f"{one_line(error)}"
    )


def explain_quantised(source: str, config: PretrainedConfig) -> str:
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


def refuse_incomplete(source: str, loading_report: Mapping[str, Any], quantised: str = "") -> None:
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
