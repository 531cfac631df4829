"""A loaded folder has the numbers of plain transformers; what cannot be loaded is refused in one sentence."""

import json
import re

import pytest
import torch
import transformers as hf
from helpers.tiny_models import SHAPE, byte_tokenizer, tiny_folder
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge

from lens_defense.models import devices
from lens_defense.models.load import load
from lens_defense.prompts.chat_template import bind_arguments
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request

IDS = torch.randint(3, 297, (2, 9), generator=torch.Generator().manual_seed(0))


def change_config(folder, **changes):
    """Put other fields into the folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def assert_refused(source, message, **settings):
    with pytest.raises(ValueError, match=message) as caught:
        load(source, device="cpu", **settings)
    assert "\n" not in str(caught.value), "one sentence, not a page"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2", "neox", "mistral"])
def test_a_folder_is_loaded_with_transformers_numbers(family, tmp_path):
    model = load(tiny_folder(tmp_path, family), device="cpu")
    assert type(model) is TransformerBridge
    assert not model.training
    assert model.embed.weight.dtype == torch.float32
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    torch.testing.assert_close(model(IDS), plain(IDS).logits, rtol=1e-4, atol=1e-4)
    assert tokenize(model.tokenizer, request("make a lamp", "lamp")).chat


def test_without_a_device_it_goes_where_the_bridge_says_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "get_device", lambda: "meta")
    model = load(tiny_folder(tmp_path))
    assert torch.device(model.cfg.device).type == model.embed.weight.device.type == "meta"


def test_weights_that_do_not_fit_on_the_device_are_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 13 GiB")

    monkeypatch.setattr(hf.LlamaForCausalLM, "to", full)
    with pytest.raises(MemoryError, match=r"the weights of .* do not fit into memory; give device='cpu'"):
        load(tiny_folder(tmp_path))


def test_a_device_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the device 'abacus' cannot be used here .*; give 'cpu'") as caught:
        load(tiny_folder(tmp_path), device="abacus")
    assert "\n" not in str(caught.value)


def test_dtype_is_the_callers(tmp_path):
    model = load(str(tiny_folder(tmp_path)), device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in model.original_model.parameters()} == {torch.bfloat16}


def test_no_chat_template_is_said(tmp_path):
    with pytest.warns(UserWarning, match="has no chat template: requests are asked as plain text"):
        model = load(tiny_folder(tmp_path, chat=False), device="cpu")
    assert not tokenize(model.tokenizer, request("make a lamp", "lamp")).chat


def test_transformers_settings_are_as_before(tmp_path):
    level = hf.logging.get_verbosity()
    load(tiny_folder(tmp_path), device="cpu")
    assert_refused("someone/nothing", "the hub does not give it")
    assert hf.logging.get_verbosity() == level
    assert hf.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    "source, message",
    [
        ("./nothing", "there is no folder './nothing'; give a model folder"),
        (__file__, "is a file and no model: give a model folder, or a .gguf file"),
        ("/nothing/at/all", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("", "there is no folder ''"),
        ("someone/nothing", "'someone/nothing' is no bundled name .* no network"),
        ("nothing-of-this-name", "'nothing-of-this-name' is no bundled name"),
        ("nothing.gguf", "there is no file nothing.gguf"),
    ],
)
def test_what_is_not_there(source, message):
    assert_refused(source, message)


def test_a_folder_without_a_config(tmp_path):
    assert_refused(tmp_path, "has no config.json; give a Hugging Face model folder")


def test_a_folder_without_weights(tmp_path):
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_refused(tmp_path, "holds no weights")


def test_a_folder_without_a_tokenizer(tmp_path):
    tiny_folder(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    assert_refused(tmp_path, "tokenizer|could not be loaded")


def test_torn_weights(tmp_path):
    file = tiny_folder(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert_refused(tmp_path, "could not be loaded")


def test_pickled_weights_only(tmp_path):
    tiny_folder(tmp_path, pickled=True)
    assert_refused(tmp_path, "pickled weights only, which can run code.*allow_pickle=True")
    model = load(tmp_path, device="cpu", allow_pickle=True)
    assert model(IDS).isfinite().all()


def test_code_of_its_own(tmp_path):
    change_config(tiny_folder(tmp_path), auto_map={"AutoModelForCausalLM": "own.Model"})
    assert_refused(tmp_path, "brings code of its own; read it, then load with trust_remote_code=True")


def test_a_kind_that_nobody_knows(tmp_path):
    change_config(tiny_folder(tmp_path), model_type="abacus")
    assert_refused(tmp_path, r"of a kind that this transformers does not know \(abacus\)")


def test_a_broken_config(tmp_path):
    (tiny_folder(tmp_path) / "config.json").write_text("{")
    assert_refused(tmp_path, re.escape(str(tmp_path)))


def test_an_encoder(tmp_path):
    config = hf.BertConfig(**SHAPE, intermediate_size=64)
    hf.BertModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert_refused(tmp_path, r"is not a causal language model \(BertModel\).*decoder-only chat model")


def test_an_encoder_decoder(tmp_path):
    config = hf.T5Config(vocab_size=300, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert_refused(tmp_path, r"is not a causal language model \(T5ForConditionalGeneration\)")


def test_a_gguf_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "torn.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    assert_refused(file, "could not be read as a GGUF causal language model")
    assert not list((tmp_path / "cache/gguf").iterdir())


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_a_model_in_hand_is_taken_as_it_is(family, tmp_path):
    folder = tiny_folder(tmp_path, family)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    wanted = plain(IDS).logits
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = load(plain, tokenizer)
    assert type(model) is TransformerBridge
    torch.testing.assert_close(model(IDS), wanted, rtol=1e-4, atol=1e-4)
    assert tokenize(model.tokenizer, request("make a lamp", "lamp")).chat
    with pytest.raises(ValueError, match=r"needs its tokenizer: ld\.load\(hf_model, tokenizer\)"):
        load(plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", r"missing: model\.layers\.1\.mlp\.down_proj\.weight \(1\)"),
        ("renamed", r"missing: model\.norm\.weight \(1\); not expected: model\.nrom\.weight \(1\)"),
        ("shape", r"of another shape: model\.norm\.weight \(1\)"),
        ("layers", r"missing: model\.layers\."),
    ],
)
def test_incomplete_weights_are_refused_by_name(change, message, tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["model.layers.1.mlp.down_proj.weight"]
    elif change == "renamed":
        tensors["model.nrom.weight"] = tensors.pop("model.norm.weight")
    elif change == "shape":
        tensors["model.norm.weight"] = torch.ones(3)
    else:
        fields = json.loads((folder / "config.json").read_text())
        change_config(folder, num_hidden_layers=fields["num_hidden_layers"] + 1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert_refused(folder, message)


def test_system_and_arguments_reach_every_rendered_prompt(tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% if enable_thinking is not defined or enable_thinking %}"
        "<think>{% endif %}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    item = request("make a lamp", "lamp")

    def text(**settings):
        model = load(folder, device="cpu", **settings)
        return model.tokenizer.decode(tokenize(model.tokenizer, item).ids)

    assert text() == "[user]make a lamp[assistant]<think>"
    assert text(chat_template_kwargs={"enable_thinking": False}) == "[user]make a lamp[assistant]"
    both = text(system='Say "no".\n', chat_template_kwargs={"enable_thinking": False, "note": None})
    model = load(folder, device="cpu", system="one")
    bind_arguments(model.tokenizer, {}, "two 🔥")
    assert model.tokenizer.decode(tokenize(model.tokenizer, item).ids).startswith("[system]two 🔥[user]make")
    assert both == '[system]Say "no".\n[user]make a lamp[assistant]'


@pytest.mark.parametrize(
    "template, settings, message",
    [
        ("{{ raise_exception('no system') }}", {"system": "Be kind."}, "does not take this: no system"),
        ("{{ messages }}", {"chat_template_kwargs": {"a b": 1}}, "'a b'=1 must be a name and"),
        ("{{ messages }}", {"chat_template_kwargs": {"a": [1]}}, "must be a name and"),
        (None, {"system": "Be kind."}, "no single chat template"),
    ],
)
def test_a_template_that_takes_none_says_so(template, settings, message, tmp_path):
    folder = tiny_folder(tmp_path, "llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert_refused(folder, message, **settings)
