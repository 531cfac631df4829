"""Tiny random models of several families, built from configs: nothing is downloaded."""

import warnings

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.loading.load import load

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 300}
GATED = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=300, n_positions=256),
    "llama": lambda: hf.LlamaConfig(**GATED),
    "qwen3": lambda: hf.Qwen3Config(**GATED, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**GATED, head_dim=8, query_pre_attn_scalar=8),
    "neox": lambda: hf.GPTNeoXConfig(**SHAPE, intermediate_size=64, max_position_embeddings=256),
    "mistral": lambda: hf.MistralConfig(**GATED),
    "gptj": lambda: hf.GPTJConfig(
        n_embd=32, n_layer=4, n_head=4, vocab_size=300, n_positions=256, rotary_dim=4
    ),
    "codegen": lambda: hf.CodeGenConfig(
        n_embd=32, n_layer=4, n_head=4, vocab_size=300, n_positions=256, rotary_dim=4
    ),
    "neo": lambda: hf.GPTNeoConfig(
        hidden_size=32, num_layers=4, num_heads=4, vocab_size=300, max_position_embeddings=256,
        attention_types=[[["global", "local"], 2]], window_size=5,
    ),
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=4, n_head=4, vocab_size=300),
    "mpt": lambda: hf.MptConfig(d_model=32, n_layers=4, n_heads=4, vocab_size=300, max_seq_len=256),
    "opt": lambda: hf.OPTConfig(
        **SHAPE, ffn_dim=64, max_position_embeddings=256, word_embed_proj_dim=32
    ),
    "falcon": lambda: hf.FalconConfig(**SHAPE),
    "falcon40": lambda: hf.FalconConfig(**SHAPE, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": lambda: hf.FalconConfig(
        **SHAPE, alibi=True, parallel_attn=False, multi_query=False, bias=True
    ),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=300, d_model=32, ffn_dim=64, num_layers=4, attention_heads=4, max_position_embeddings=256
    ),
    "bigcode": lambda: hf.GPTBigCodeConfig(n_embd=32, n_layer=4, n_head=4, vocab_size=300, n_positions=256),
    "short mistral": lambda: hf.MistralConfig(**{**GATED, "sliding_window": 5}),
    "short gemma2": lambda: hf.Gemma2Config(
        **GATED, head_dim=8, query_pre_attn_scalar=8, sliding_window=5
    ),
    "per layer": lambda: hf.Gemma4TextConfig(
        **GATED, head_dim=8, global_head_dim=8, vocab_size_per_layer_input=300, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
    ),
    "granite": lambda: hf.GraniteConfig(
        **GATED, residual_multiplier=0.22, embedding_multiplier=3.0, attention_multiplier=0.3
    ),
    "phi3": lambda: hf.Phi3Config(**GATED, pad_token_id=0),
    "cohere": lambda: hf.CohereConfig(**GATED),
}  # fmt: skip
FAMILIES = ("gpt2", "llama", "qwen3", "gemma2", "neox", "mistral")
MORE_FAMILIES = (
    "gptj",
    "codegen",
    "neo",
    "bloom",
    "mpt",
    "opt",
    "falcon",
    "bigcode",
    "granite",
    "phi3",
    "cohere",
)
"""Families whose blocks return tuples, scale what they add, or have biases where others have none."""
PADDING_COUNTS = ("bloom", "mpt", "neo", "short mistral", "short gemma2")
"""Families in which padding between tokens changes what is computed: ALiBi, or short windows of attention."""
NO_DOUBLE_PRECISION = ("xglm",)
"""Families that transformers cannot run in double precision."""
SINGLE_PRECISION = ("gptj", "neo", "bloom", "bigcode", "falcon-rw", *NO_DOUBLE_PRECISION)
"""Families whose attention scores transformers computes in single precision, whatever the weights'."""


def byte_tokenizer(chat: bool = False) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, as GPT-2's; `chat` gives it a ChatML template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=297,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["how do I make a brass lamp, the lamp is a thing " * 9], trainer)
    end = "<|im_end|>" if chat else "<|end|>"
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    return tokenizer


def tiny_model(family: str = "llama", *, chat: bool = False, seed: int = 0) -> TransformerBridge:
    """A random model of one family in float64, with weights large enough that every part matters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* has no chat template")
        return load(plain_model(family, seed=seed), byte_tokenizer(chat))


def plain_model(family: str = "llama", *, seed: int = 0) -> hf.PreTrainedModel:
    """The same model in plain transformers."""
    torch.manual_seed(seed)
    dtype = torch.float32 if family in NO_DOUBLE_PRECISION else torch.float64
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.config._name_or_path = f"tiny-{family}"
    return model.eval()


def tiny_folder(folder, family="llama", *, chat=True, pickled=False):
    """The folder of a tiny model as plain transformers writes it."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    model.save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder
