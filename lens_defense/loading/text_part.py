"""The text part of a model that reads images too: the same decoder and head, as a causal language model."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def reads_more_than_text(config: PretrainedConfig) -> bool:
    """Whether the model of a config reads images or sounds beside text, which a part of it reads."""
    return config.get_text_config() is not config and not getattr(config, "is_encoder_decoder", False)


def has_text_model(config: PretrainedConfig) -> bool:
    """Whether transformers knows a causal language model that is the text part alone."""
    return type(config.get_text_config()) in MODEL_FOR_CAUSAL_LM_MAPPING


def text_part(hf_model: PreTrainedModel) -> PreTrainedModel:
    """A causal language model of the decoder and the head of a model that reads images too; else the model.

    The weights are shared, not copied, and what reads images is no part of it.

    Raises:
        ValueError: the text part is built otherwise than the family's language models.
    """
    config: Any = hf_model.config
    if not reads_more_than_text(config):
        return hf_model
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(config.get_text_config(), attn_implementation="eager")
    decoder = hf_model.get_decoder()
    if type(getattr(text, text.base_model_prefix, None)) is not type(decoder):
        raise ValueError(
            f"the text part of {type(hf_model).__name__} is no {type(text).__name__}; "
            "load a model that reads text alone"
        )
    setattr(text, text.base_model_prefix, decoder)
    head: Any = hf_model.get_output_embeddings()
    text.set_output_embeddings(head)
    text.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    text.generation_config = hf_model.generation_config
    text.config._name_or_path = config._name_or_path
    return text.eval()
