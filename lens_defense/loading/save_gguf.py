"""Saving a model as one GGUF file, which llama.cpp and what stands on it reads.

Models of the shape of Llama are written: llama, mistral without a window of attention, qwen2. Names and
layout are those of llama.cpp's convert_hf_to_gguf.py: in its "llama" architecture the two halves of a head's
rotary dimensions lie interleaved, so the rows of the query and key matrices are permuted.
"""

import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig

from lens_defense.arguments import did_you_mean
from lens_defense.loading.loaded_model import loaded_model
from lens_defense.loading.save import plain_weights
from lens_defense.models.mlp_output import settle
from lens_defense.models.weight_journal import journal_of
from lens_defense.prompts.gguf_vocabulary import CONVERT_INSTEAD, GgufVocabulary, gguf_vocabulary
from lens_defense.shown_text import shown
from lens_defense.storage import FORMAT, SEAL, UNSEALED, atomic_write, seal

Kind = Literal["f32", "f16", "q8_0"]
"""How matrices are stored; vectors are f32 always."""
_QUANTIZATION: Mapping[str, gguf.GGMLQuantizationType] = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
_FILE_TYPES: Mapping[str, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ARCHITECTURES: Mapping[str, gguf.MODEL_ARCH] = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
}
"""By transformers' name of the family."""
_PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "use_sliding_window": (False, None),
}
"""What fields of a config have to be, since GGUF has no word for others."""
_BLOCK = 32
"""Numbers of a row that share a scale in q8_0."""


def save_gguf(model: TransformerBridge, path: str | os.PathLike[str], *, kind: Kind = "f16") -> Path:
    """Write the model as it is now, with its tokenizer and chat template, as a GGUF file.

    The file's hash is in it; `load` checks it. It is read back with equal logits: f32 to the bit of the
    weights in single precision, f16 and q8_0 of the weights rounded so.

    Args:
        model: what `load` gave.
        path: a new file that ends in .gguf.
        kind: "f32", "f16", or "q8_0", which rounds a matrix to eight bits and a scale for 32 numbers; a
            matrix whose rows 32 does not divide is f16 there.

    Raises:
        ValueError: the path is another file's, or ends otherwise; the family, its settings or its tokenizer
            have no place in such a file; a weight does not fit the kind.
    """
    model, file = loaded_model(model, "ld.save_gguf(model, path)"), Path(path)
    kinds = get_args(Kind)
    if kind not in kinds:
        raise ValueError(f"kind is one of {', '.join(kinds)}, not {kind!r}{did_you_mean(kind, kinds)}")
    if file.suffix.lower() != ".gguf":
        raise ValueError(f"{file} has to end in .gguf, by which such a file is known")
    if file.exists():
        raise ValueError(f"{file} exists; name a new file")
    config: Any = model.original_model.config
    architecture = _architecture(str(model.cfg.model_name), config)
    vocabulary = gguf_vocabulary(model.tokenizer, config.vocab_size)
    with journal_of(model).lock, atomic_write(file) as unfinished:  # another thread's change waits
        settle(model)
        tensors = _named_as_gguf(model, architecture)
        writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[architecture])
        with closing(writer):
            writer.add_string(SEAL, UNSEALED)
            writer.add_uint32("lens_defense_format", FORMAT)
            _add_config(writer, config, model.cfg.model_name, kind)
            _add_vocabulary(writer, vocabulary)
            _write_tensors(writer, tensors, kind)
        seal(unfinished)
    return file


def _architecture(name: str, config: PretrainedConfig) -> gguf.MODEL_ARCH:
    """The architecture that a family is written as.

    Raises:
        ValueError: there is none, or a setting of the model has no place in it.
    """
    family = str(config.model_type)
    if family not in _ARCHITECTURES:
        raise ValueError(
            f"{name} is of the family {family!r}, and GGUF is written of {', '.join(_ARCHITECTURES)} alone; "
            f"{CONVERT_INSTEAD}"
        )
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    settings = {field: getattr(config, field, None) for field in _PLAIN_VALUES}
    odd = [f"{field} {value!r}" for field, value in settings.items() if value not in _PLAIN_VALUES[field]]
    if rope.get("rope_type", "default") != "default":
        odd.append(f"rope_type {rope['rope_type']!r}")
    if family == "mistral" and (window := getattr(config, "sliding_window", None)) is not None:
        odd.append(f"sliding_window {window}")
    if odd:
        raise ValueError(f"{name} has {' and '.join(odd)}, which is not written to GGUF; {CONVERT_INSTEAD}")
    return _ARCHITECTURES[family]


def _named_as_gguf(model: TransformerBridge, architecture: gguf.MODEL_ARCH) -> dict[str, Tensor]:
    """The weights under their names in the file, laid out as llama.cpp reads them."""
    config: Any = model.original_model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    named: dict[str, Tensor] = {}
    for name, weight in plain_weights(model).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{model.cfg.model_name} has a tensor {name}, for which GGUF has no name")
        interleaved = architecture == gguf.MODEL_ARCH.LLAMA and name.split(".")[-2] in ("q_proj", "k_proj")
        if interleaved:
            queries = name.split(".")[-2] == "q_proj"
            heads = config.num_attention_heads if queries else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        named[found] = weight
    return named


def _add_config(writer: gguf.GGUFWriter, config: Any, name: Any, kind: Kind) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Of the name "mistral" alone, transformers makes another family than the file says.
    writer.add_name(f"{shown(name)}, written by lens_defense")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model("gpt2")  # llama.cpp's word for a byte-level BPE
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    add_id = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, token_id in vocabulary.special_ids.items():
        add_id[name](token_id)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(writer: gguf.GGUFWriter, tensors: Mapping[str, Tensor], kind: Kind) -> None:
    """Write the file; one tensor at a time is in memory as it is written."""
    stored = {name: _stored_type(weight, kind) for name, weight in tensors.items()}
    for name, weight in tensors.items():
        shape = tuple(weight.shape)
        size = int(np.prod(gguf.quant_shape_to_byte_shape(shape, stored[name])))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, stored[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, weight in tensors.items():
        writer.write_tensor_data(_stored(name, weight, stored[name]))


def _stored_type(weight: Shaped[Tensor, "..."], kind: Kind) -> gguf.GGMLQuantizationType:
    if weight.dim() < 2:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and weight.shape[-1] % _BLOCK:
        return gguf.GGMLQuantizationType.F16
    return _QUANTIZATION[kind]


def _stored(name: str, weight: Shaped[Tensor, "..."], stored: gguf.GGMLQuantizationType) -> np.ndarray:
    numbers = weight.detach().to("cpu", torch.float32).contiguous().numpy()
    if stored == gguf.GGMLQuantizationType.F16 and np.abs(numbers).max() > np.finfo(np.float16).max:
        raise ValueError(f"{name} has numbers that f16 cannot hold; take kind='f32'")
    return gguf.quantize(numbers, stored)
