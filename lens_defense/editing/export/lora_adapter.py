"""The folder of a LoRA adapter, as `peft` reads and writes it: low-rank changes by the name of their module.

A module's change is scaling * B @ A, with A as (rank, d_in) and B as (d_out, rank), however the module stores
its weight. Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". peft itself is not needed.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from lens_defense.models.fingerprint import Fingerprint
from lens_defense.models.mlp_output import OutputModule
from lens_defense.prompts.request import Role
from lens_defense.storage import check_manifest, new_folder
from lens_defense.storage import load as load_file
from lens_defense.storage import save as save_file

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MERGE_INSTEAD = "merge it with peft (merge_and_unload), then ld.load(merged, tokenizer)"
_BEFORE_NAME = "base_model.model."
"""What peft puts before a module's name: the path of the model inside its own wrappers."""
_FACTOR = re.compile(re.escape(_BEFORE_NAME) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_KIND = "adapter"


@dataclass(frozen=True, slots=True)
class AdapterOrigin:
    """What an adapter of ours says of itself beside its config: no request and no subject."""

    model: str
    method: str
    role: Role
    fingerprint: Fingerprint
    """Of the model that it belongs on; its weights are those of the changed matrices."""


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Low-rank changes by the name of their module: left @ right each."""

    left: Mapping[str, Float[Tensor, "d_out rank"]]
    right: Mapping[str, Float[Tensor, "rank d_in"]]
    origin: AdapterOrigin | None
    """None where others wrote it."""


def write_adapter(
    path: str | os.PathLike[str],
    modules: Mapping[int, OutputModule],
    changes: Sequence[tuple[Mapping[int, Float[Tensor, "d_out _"]], Mapping[int, Float[Tensor, "_ d_in"]]]],
    origin: AdapterOrigin,
) -> Path:
    """Write changes as one adapter: in each layer, their ranks stand one after another.

    All layers get the rank of the largest, filled up with zeros, since some programs that serve adapters
    read one rank alone. Alpha is the rank, so that nothing is scaled.

    Args:
        path: a new or empty folder.
        modules: by layer, the module of the output matrix.
        changes: (left, right) by layer, of each edit.
        origin: what the adapter says of itself.

    Raises:
        ValueError: the folder exists and is not empty; a layer has no module.
    """
    left = {layer: _joined([one[layer] for one, _ in changes if layer in one], 1) for layer in modules}
    right = {layer: _joined([one[layer] for _, one in changes if layer in one], 0) for layer in modules}
    rank = max(len(factor) for factor in right.values())
    tensors: dict[str, Tensor] = {}
    for layer, module in modules.items():
        missing = rank - len(right[layer])
        before = f"{_BEFORE_NAME}{module.name}.lora_"
        tensors[f"{before}A.weight"] = torch.nn.functional.pad(right[layer], (0, 0, 0, missing))
        tensors[f"{before}B.weight"] = torch.nn.functional.pad(left[layer], (0, missing))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module in modules.values()),
        "target_modules": [module.name for module in modules.values()],
    }
    with new_folder(path) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        save_file(folder / WEIGHTS_FILE, _KIND, origin, tensors)
    return Path(path)


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's folder, of ours or of peft's.

    Raises:
        ValueError: it is no folder of a plain LoRA adapter, or it is damaged.
    """
    folder = Path(path)
    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"{folder} is no folder of a LoRA adapter: it wants {CONFIG_FILE} and {WEIGHTS_FILE}; "
            "edit.to_peft(folder) and peft's save_pretrained write both"
        )
    check_manifest(folder)
    scaling = _scaling(folder / CONFIG_FILE)
    tensors, origin = _read_weights(folder / WEIGHTS_FILE)
    factors: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in tensors.items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise ValueError(f"{folder} changes more than a LoRA adapter's A and B ({name}); {MERGE_INSTEAD}")
        factors[found["side"]][found["module"]] = tensor
    right, left = factors["A"], factors["B"]
    if not left or left.keys() != right.keys():
        raise ValueError(f"{folder} has an A without a B, or none at all; get the adapter again")
    for module in left:
        shapes = tuple(left[module].shape), tuple(right[module].shape)
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
            raise ValueError(
                f"{folder} has factors of {module} that do not fit together ({shapes[1]} and {shapes[0]}); "
                "get the adapter again"
            )
        if not (left[module].isfinite().all() and right[module].isfinite().all()):
            raise ValueError(f"{folder} has factors of {module} that are not finite; get the adapter again")
    return Adapter({module: scaling * factor for module, factor in left.items()}, right, origin)


_BEYOND_LORA = (
    *("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern"),
    "trainable_token_indices",
)
"""Fields of a config under which an adapter is more than one scaled product per module."""


def _scaling(file: Path) -> float:
    try:
        config: Any = json.loads(file.read_text("utf-8"))
        kind, beyond = config.get("peft_type"), [name for name in _BEYOND_LORA if config.get(name)]
        beyond += ["bias"] if config.get("bias", "none") != "none" else []
        rank, alpha = float(config["r"]), float(config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is no config of a LoRA adapter ({error}); get it again") from error
    if kind != "LORA" or beyond:
        raise ValueError(
            f"{file} is of more than a plain LoRA ({', '.join(beyond) or kind}); {MERGE_INSTEAD}"
        )
    return scaling


def _read_weights(file: Path) -> tuple[dict[str, Tensor], AdapterOrigin | None]:
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            ours = "lens_defense" in (opened.metadata() or {})
        if not ours:
            return safetensors.torch.load_file(file), None
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} could not be read as safetensors ({error}); get it again") from error
    origin, tensors = load_file(file, _KIND, AdapterOrigin)
    return tensors, origin


def _joined(factors: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat([factor.detach().float().cpu() for factor in factors], dim)
