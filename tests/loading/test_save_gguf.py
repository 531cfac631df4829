"""A GGUF file is read back, by transformers and by us, as the same weights, tokens and logits."""

import gguf
import pytest
import torch
import transformers as hf
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import GATED, byte_tokenizer, tiny_model
from helpers.weights import copy_weights, weights_equal
from tokenizers import Regex, normalizers, pre_tokenizers, processors

import lens_defense as ld
from lens_defense.loading.load import load
from lens_defense.loading.save_gguf import save_gguf
from lens_defense.prompts.gguf_vocabulary import _SPLITS, gguf_vocabulary

IDS = torch.randint(3, 297, (2, 9), generator=torch.Generator().manual_seed(0))
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**GATED),
    "tied llama": lambda: hf.LlamaConfig(**GATED, tie_word_embeddings=True),
    "wide llama": lambda: hf.LlamaConfig(**GATED, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**GATED, sliding_window=None),
    "qwen2": lambda: hf.Qwen2Config(**GATED, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
}
TEXTS = [
    "How do I make a brass lamp?",
    "12345 lamps  and\n\n\tHÄUSER, it's <|im_start|>a thing",
    " a",
    "日本 🔥",
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path / "cache"))


def model_of(config, tokenizer=None):
    """A random model in single precision, with weights large enough that every part matters."""
    torch.manual_seed(0)
    plain = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.3)
    return load(plain, tokenizer or byte_tokenizer(True))


def rounded(weight, kind):
    """What a kind of file keeps of a matrix; vectors are kept."""
    if weight.dim() < 2 or kind == "f32":
        return weight
    if kind == "f16":
        return weight.half().float()
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), q8_0), q8_0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("family", CONFIGS)
def test_the_edited_weights_and_logits_come_back(family, kind, tmp_path):
    model = model_of(CONFIGS[family]())
    before, weights = model(IDS), copy_weights(model)
    with handmade_edit(model, (1, 2)).applied(model):
        file = ld.save_gguf(model, tmp_path / "edited.gguf", kind=kind)
        ld.save_folder(model, tmp_path / "edited")
    assert weights_equal(model, weights)
    expected = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "edited", attn_implementation="eager")
    for parameter in expected.parameters():
        parameter.copy_(rounded(parameter, kind))
    plain = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    read = dict(plain.named_parameters())
    assert all(torch.equal(read[name], weight) for name, weight in expected.named_parameters())
    logits = expected(IDS).logits
    assert torch.equal(plain(IDS).logits, logits)
    again = load(file, device="cpu")
    torch.testing.assert_close(again(IDS), logits, rtol=1e-5, atol=1e-5)
    assert (logits - before).abs().max() > 0.1
    assert again.original_model.config.tie_word_embeddings == (family == "tied llama")


def tokenizer_with(split=None, normalizer=None, bos=False):
    """The tests' byte-level BPE, cutting text into words as others do."""
    tokenizer = byte_tokenizer(True)
    core = tokenizer.backend_tokenizer
    if split is not None:
        core.pre_tokenizer = split
    if normalizer is not None:
        core.normalizer = normalizer
    if bos:
        tokenizer.bos_token = "<|end|>"
        token = ("<|end|>", tokenizer.convert_tokens_to_ids("<|end|>"))
        core.post_processor = processors.TemplateProcessing("<|end|> $A", "$A $B", [token])
    return tokenizer


def split_by(pattern, **settings):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), **{"behavior": "isolated", **settings}),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
LLAMA3, QWEN2 = _SPLITS


@pytest.mark.parametrize(
    "settings, name",
    [
        ({}, "gpt-2"),
        ({"bos": True}, "gpt-2"),
        ({"split": DIGITS}, "smollm"),
        ({"split": split_by(LLAMA3), "bos": True}, "llama-bpe"),
        ({"split": split_by(QWEN2), "normalizer": normalizers.NFC()}, "qwen2"),
    ],
)
def test_the_tokenizer_comes_back(settings, name, tmp_path):
    tokenizer = tokenizer_with(**settings)
    tokenizer.add_tokens(["<think>"])
    model = model_of(CONFIGS["llama"](), tokenizer)
    file = save_gguf(model, tmp_path / "model.gguf")
    again = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert gguf_vocabulary(tokenizer, 300).split == name
    for text in [*TEXTS, "<think>a lamp"]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    for turns in ([{"role": "user", "content": text}] for text in TEXTS):
        ids = [
            one.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            for one in (tokenizer, again, load(file, device="cpu").tokenizer)
        ]
        assert ids[0] == ids[1] == ids[2]
    assert (again.eos_token, again.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_the_split_expressions_are_those_of_transformers():
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    assert all(GGUF_PRE_TOKENIZER_SPLITS[name] == pattern for pattern, name in _SPLITS.items())


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizer_with(split_by(QWEN2, invert=True)),
        tokenizer_with(split_by(QWEN2, behavior="removed")),
        tokenizer_with(split_by("[a-z]+")),
        tokenizer_with(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer_with(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        tokenizer_with(pre_tokenizers.Metaspace()),
        tokenizer_with(normalizer=normalizers.Lowercase()),
    ],
)
def test_a_tokenizer_that_gguf_cannot_name_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match=r"this model's tokenizer is another; save a folder, and convert it with"
    ):
        save_gguf(model_of(CONFIGS["llama"](), tokenizer), tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("family", ["gpt2", "neox", "gemma2", "qwen3"])
def test_another_family_is_refused(family, tmp_path):
    with pytest.raises(
        ValueError, match=rf"the family '{family.replace('ne', 'gpt_ne')}', and GGUF is written of"
    ):
        save_gguf(tiny_model(family, chat=True), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "config, message",
    [
        (hf.LlamaConfig(**GATED, attention_bias=True), "has attention_bias True, which is not written"),
        (hf.LlamaConfig(**GATED, mlp_bias=True), "has mlp_bias True"),
        (hf.LlamaConfig(**GATED, hidden_act="gelu"), "has hidden_act 'gelu'"),
        (
            hf.LlamaConfig(
                **GATED, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
            ),
            "has rope_type 'linear'",
        ),
        (hf.MistralConfig(**{**GATED, "sliding_window": 64}), "has sliding_window 64"),
    ],
)
def test_a_setting_that_gguf_cannot_hold_is_refused(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_gguf(model_of(config), tmp_path / "model.gguf")


def test_a_number_too_large_for_f16_is_refused(tmp_path):
    model = model_of(CONFIGS["llama"]())
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[0, 0] = 1e5
    with pytest.raises(
        ValueError, match=r"token_embd.weight has numbers that f16 cannot hold; take kind='f32'"
    ):
        save_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*gguf*")), "whole or not at all"
    save_gguf(model, tmp_path / "model.gguf", kind="f32")


def test_rows_that_q8_0_cannot_cut_stay_f16(tmp_path):
    model = model_of(hf.LlamaConfig(**{**GATED, "intermediate_size": 48}))
    file = save_gguf(model, tmp_path / "model.gguf", kind="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_written_is_one_sentence(tmp_path):
    model = model_of(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"has to end in \.gguf"):
        save_gguf(model, tmp_path / "model")
    with pytest.raises(ValueError, match=r"kind is one of f32, f16, q8_0, not 'q8'"):
        save_gguf(model, tmp_path / "model.gguf", kind="q8")
    with pytest.raises(TypeError, match=r"the call is ld\.save_gguf\("):
        save_gguf("model.gguf", model)
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ValueError, match="exists; name a new file"):
        save_gguf(model, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


def test_a_damaged_file_is_refused(tmp_path):
    file = save_gguf(model_of(CONFIGS["llama"]()), tmp_path / "model.gguf")
    data = bytearray(file.read_bytes())
    data[-40] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged: its bytes do not match their hash"):
        load(file, device="cpu")
