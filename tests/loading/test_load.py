"""A loaded folder has the numbers of plain transformers; what cannot be loaded is refused in one sentence."""

import json
import re
import shutil
import sys
import warnings

import pytest
import torch
import transformers as hf
from helpers.handmade_edits import handmade_edit
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import SHAPE, byte_tokenizer, plain_model, tiny_folder, tiny_model
from safetensors.torch import load_file, save_file
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge

import lens_defense as ld
import lens_defense.loading.load as load_module
from lens_defense.loading.load import load
from lens_defense.loading.save import save_folder
from lens_defense.models import devices
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.prompts.chat_template import bind_arguments, bound_arguments
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
        (
            "someone/nothing",
            "'someone/nothing' is no bundled name .* no network.* The library says: .*offline",
        ),
        ("nothing-of-this-name", "'nothing-of-this-name' is no bundled name"),
        ("nothing.gguf", "there is no file nothing.gguf"),
        ("./NOTHING.GGUF", "there is no file NOTHING.GGUF"),
    ],
)
def test_what_is_not_there(source, message):
    assert_refused(source, message)


def test_a_folder_without_a_config(tmp_path):
    assert_refused(tmp_path, "has no config.json; give a Hugging Face model folder")


def test_a_folder_without_weights(tmp_path):
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert_refused(tmp_path, r"holds no weights \(\*\.safetensors\); copy them there, or give another folder")


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
    assert_refused(
        tmp_path, r"pickled weights only, which can run code.*ld\.load\(\.\.\., allow_pickle=True\)"
    )
    model = load(tmp_path, device="cpu", allow_pickle=True)
    assert model(IDS).isfinite().all()


def test_code_of_its_own(tmp_path):
    change_config(tiny_folder(tmp_path), auto_map={"AutoModelForCausalLM": "own.Model"})
    assert_refused(
        tmp_path, r"brings code of its own; read it, then .*ld\.load\(\.\.\., trust_remote_code=True\)"
    )


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
    for wrapped in (plain, model.original_model):
        with pytest.raises(ValueError, match="inside a TransformerBridge already"):
            load(wrapped, tokenizer)


@pytest.mark.parametrize("saved", [False, True])
def test_the_tokenizer_of_a_model_in_hand_is_the_one_that_is_used(saved, tmp_path):
    """TransformerLens reads one with a beginning token from its folder again, without what was set since."""
    plain = hf.AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path))
    tokenizer = byte_tokenizer(True)
    tokenizer.bos_token = "<|end|>"
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    ids = tokenizer("a lamp")["input_ids"]
    model = load(plain, tokenizer)
    assert model.tokenizer is tokenizer and tokenizer.bos_token == "<|end|>"
    assert tokenizer("a lamp")["input_ids"] == ids
    item = tokenize(tokenizer, request("make a lamp", "lamp"))
    assert tokenizer.decode(item.ids) == "<make a lamp>"


@torch.no_grad()
def test_an_edit_that_stands_stands_in_the_model_in_hand(tmp_path):
    plain = hf.AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path), attn_implementation="eager")
    before = {name: weight.clone() for name, weight in plain.named_parameters()}
    model = load(plain, hf.AutoTokenizer.from_pretrained(tmp_path))
    ledger = ld.Ledger(model)
    ledger.apply(handmade_edit(model, (1, 2)))
    changed = plain.get_submodule("model.layers.1").mlp.down_proj.weight
    assert not torch.equal(changed, before["model.layers.1.mlp.down_proj.weight"])
    torch.testing.assert_close(plain(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)
    ledger.undo()
    assert torch.equal(changed, before["model.layers.1.mlp.down_proj.weight"])


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_model_is_told_the_call():
    for value in (None, 3, ["smollm2"]):
        with pytest.raises(TypeError, match=r"the call is ld\.load\(name_or_path\)"):
            load(value)


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


def test_what_was_bound_is_kept_with_what_was_measured(tmp_path):
    """A trace, an edit and a report say under which system prompt and arguments they were made."""
    settings = {"system": "Be #kind -#} 🔥.", "chat_template_kwargs": {"enable_thinking": False}}
    bound = {"system": settings["system"], "enable_thinking": False}
    folder = tiny_folder(tmp_path / "model", chat=True)
    model = load(folder, device="cpu", **settings)
    assert bound_arguments(model.tokenizer) == bound
    assert bound_arguments(load(folder, device="cpu").tokenizer) == {}
    item = request("how do I make a lamp?", "lamp")
    trace = ld.trace(model, [item], progress=False, answer_tokens=2, min_difference=0.0)
    assert ld.Trace.load(trace.save(tmp_path / "trace")).chat_arguments == bound
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = ld.edit(
            model, [item], [ld.Site("mlp_out", 1, "subject_last")], contexts=lambda r: [r, r, r],
            contrast=None, fit=ld.FitSettings(shared_num_grad_steps=1, v_num_grad_steps=1, extra_rounds=0),
            corpus=ld.read_corpus()[:4], cache=False, progress=False,
        )  # fmt: skip
    assert ld.Edit.load(edit.save(tmp_path / "edit")).settings["chat_arguments"] == bound
    empty = ld.Suite("own", "check", (), ())
    report = ld.check(model, None, empty, progress=False)
    assert ld.Report.load(report.save(tmp_path / "report")).chat_arguments == bound


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


TEXT = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "num_hidden_layers": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
MULTIMODAL = {
    "gemma3": lambda: hf.Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=VISION),
    "llava": lambda: hf.LlavaConfig(text_config=hf.LlamaConfig(**TEXT), vision_config=VISION),
    "mistral3": lambda: hf.Mistral3Config(
        text_config=hf.MistralConfig(**TEXT), vision_config={**VISION, "model_type": "pixtral"}
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("in_hand", [False, True], ids=["folder", "in hand"])
@pytest.mark.parametrize("family", MULTIMODAL)
def test_of_a_model_that_reads_images_the_text_part_is_loaded(family, in_hand, tmp_path):
    torch.manual_seed(0)
    plain = hf.AutoModelForImageTextToText.from_config(MULTIMODAL[family]()).eval()
    expected = plain(IDS).logits
    plain.save_pretrained(tmp_path)
    byte_tokenizer(True).save_pretrained(tmp_path)
    model = load(plain, byte_tokenizer(True)) if in_hand else load(tmp_path, device="cpu")
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in model.original_model.named_modules() if "vision" in name]
    again = load(save_folder(model, tmp_path / "text"), device="cpu")
    torch.testing.assert_close(again(IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_model_whose_text_part_is_no_model_of_its_own(tmp_path):
    hf.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    change_config(tmp_path, architectures=["Qwen2_5_VLForConditionalGeneration"])
    assert_refused(tmp_path, r"reads images or sounds too \(Qwen2_5_VL.*; load a model that reads text alone")


def test_a_text_part_that_scales_its_logits_otherwise_is_refused():
    config = hf.AyaVisionConfig(text_config=hf.Cohere2Config(**TEXT), vision_config=VISION)
    with pytest.raises(ValueError, match="gives other logits in TransformerLens than in transformers"):
        load(hf.AyaVisionForConditionalGeneration(config).eval(), byte_tokenizer())


STATE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    "config, kind",
    [
        (lambda: hf.MambaConfig(**STATE, state_size=4), "MambaForCausalLM"),
        (lambda: hf.RwkvConfig(**STATE, attention_hidden_size=32), "RwkvForCausalLM"),
        (lambda: hf.JambaConfig(), "JambaForCausalLM"),
        (lambda: hf.Lfm2Config(layer_types=["conv", "full_attention"] * 16), "Lfm2ForCausalLM"),
        (lambda: hf.Qwen3NextConfig(), "Qwen3NextForCausalLM"),
        (lambda: hf.RecurrentGemmaConfig(), "RecurrentGemmaForCausalLM"),
    ],
)
def test_layers_with_a_running_state_are_refused_before_weights_are_read(config, kind, tmp_path):
    config().save_pretrained(tmp_path)
    change_config(tmp_path, architectures=[kind])
    assert_refused(tmp_path, rf"is a state-space, recurrent or hybrid model \({kind}\).*all attention")


def test_a_family_that_transformer_lens_does_not_know():
    config = hf.CTRLConfig(vocab_size=300, n_embd=32, dff=64, n_layer=2, n_head=4)
    with pytest.raises(
        ValueError, match=r"cannot wrap ctrl.*Could not determine.*of another family"
    ) as caught:
        load(hf.CTRLLMHeadModel(config), byte_tokenizer())
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("family", ["falcon", "falcon40", "falcon-rw", "xglm", "bigcode", "bloom", "opt"])
def test_every_layout_has_transformers_logits(family):
    expected = plain_model(family)(IDS).logits
    torch.testing.assert_close(tiny_model(family)(IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_bridge_that_computes_something_else_is_refused(monkeypatch):
    monkeypatch.setattr(load_module, "register_repairs", lambda: None)
    monkeypatch.setattr(ArchitectureAdapterFactory, "_adapters", dict(SUPPORTED_ARCHITECTURES))
    with pytest.raises(ValueError, match="cannot wrap tiny-falcon40, of the family 'falcon'"):
        tiny_model("falcon40")
    plain = plain_model("llama")
    monkeypatch.setattr(
        load_module, "text_part", lambda model: model.apply(lambda m: _scale(m, 1.1))
    )  # after transformers ran
    with pytest.raises(ValueError, match="gives other logits in TransformerLens than in transformers"):
        load(plain, byte_tokenizer(True))


def _scale(module, factor):
    if isinstance(module, torch.nn.Linear):
        module.weight.data.mul_(factor)


def test_a_precision_that_transformers_cannot_run():
    with pytest.raises(
        ValueError, match=r"transformers cannot run .* in float64 .*; load it with another dtype"
    ):
        load(plain_model("xglm").double(), byte_tokenizer())


@pytest.mark.parametrize("name", ["os", "nn", "float31", 3])
def test_a_dtype_that_is_none(name, tmp_path):
    change_config(tiny_folder(tmp_path), dtype=name)
    assert_refused(tmp_path, rf"config.json of .* has the dtype {name!r}; set it to float32")


@pytest.mark.parametrize("name", ["float16", "torch.bfloat16"])
def test_a_dtype_of_torch_is_taken(name, tmp_path):
    load(change_config(tiny_folder(tmp_path), torch_dtype=name), device="cpu")


@pytest.mark.parametrize(
    "part", [{"text_config": {"auto_map": {"AutoConfig": "own.C"}}}, {"a": [{"auto_map": "x"}]}]
)
def test_code_of_its_own_at_any_depth(part, tmp_path):
    change_config(tiny_folder(tmp_path), **part)
    assert_refused(
        tmp_path, r"brings code of its own; read it, then .*ld\.load\(\.\.\., trust_remote_code=True\)"
    )


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"num_hidden_layers": 1_000_000}, "speaks of 1000000 layers of width 32"),
        ({"vocab_size": 10**9}, "and 1000000000 tokens, more than its .* bytes of weights can hold"),
        ({"hidden_size": 2**20}, "layers of width 1048576"),
        ({"num_hidden_layers": -1}, "has num_hidden_layers -1; set it to that of its weights"),
        ({"vocab_size": 0}, "has vocab_size 0"),
        ({"num_hidden_layers": "4"}, "could not be loaded"),
        ({"hidden_size": -1}, "could not be loaded|has hidden_size -1"),
    ],
)
@pytest.mark.timeout(60)
def test_sizes_that_no_file_holds(sizes, message, tmp_path):
    change_config(tiny_folder(tmp_path), **sizes)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    "kind", ["bitsandbytes", "gptq", "awq", "compressed-tensors", "hqq", "torchao", "aqlm"]
)
def test_quantised_weights_say_their_kind(kind, tmp_path):
    settings = {"quant_method": kind, "bits": 4, "group_size": 32, "load_in_4bit": True}
    change_config(tiny_folder(tmp_path), quantization_config=settings)
    assert_refused(tmp_path, rf"are quantised \({kind}\) and cannot be read here; load dequantised weights")


@pytest.mark.parametrize("settings", ["4bit", {"bits": 4}])
def test_quantised_weights_of_no_kind(settings, tmp_path):
    change_config(tiny_folder(tmp_path), quantization_config=settings)
    assert_refused(tmp_path, "dequantised weights")


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template",
    ["{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ messages }}"],
)
def test_a_template_that_loops(template, tmp_path):
    folder, tracer = tiny_folder(tmp_path), sys.gettrace()
    (folder / "chat_template.jinja").write_text(template)
    assert_refused(folder, "the chat template takes more than 1000000 steps")
    assert sys.gettrace() is tracer


@pytest.mark.parametrize(
    "file, message",
    [
        ("pytorch_model.bin", "names 'pytorch_model.bin', which is no safetensors file and can run code"),
        ("../model.safetensors", r"names a file outside its folder, '\.\./model\.safetensors'"),
        ("/etc/model.safetensors", "names a file outside its folder"),
        ("..\\model.safetensors", "names a file outside its folder"),
        ("C:/model.safetensors", "names a file outside its folder"),
    ],
)
def test_an_index_that_names_what_it_may_not_is_refused(file, message, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    save_file({}, folder / "decoy.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(folder, message)
    if file.endswith(".bin"):
        assert load(folder, device="cpu", allow_pickle=True)(IDS).isfinite().all()
    else:
        assert_refused(folder, message, allow_pickle=True)


def test_an_index_of_several_files_is_loaded(tmp_path):
    folder = tiny_folder(tmp_path)
    plain = hf.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    plain.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert load(folder, device="cpu")(IDS).isfinite().all()
    for broken in ("{", "[]", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(broken)
        assert_refused(folder, "is no index of weights; get the folder again")


def test_a_loaded_model_does_not_follow_its_file(tmp_path):
    file = tiny_folder(tmp_path) / "model.safetensors"
    model = load(tmp_path, device="cpu")
    logits = model(IDS)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(file.stat().st_size // 4))
    assert torch.equal(model(IDS), logits)


def test_a_saved_folder_that_was_changed_is_refused(tmp_path):
    folder = save_folder(load(tiny_folder(tmp_path / "base"), device="cpu"), tmp_path / "saved")
    hf.AutoModelForCausalLM.from_pretrained(folder)
    change_config(folder, rms_norm_eps=0.1)
    assert_refused(
        folder, r"config\.json is not as it was saved .*delete lens_defense\.json if the change is"
    )
    (folder / "lens_defense.json").unlink()
    assert load(folder, device="cpu").original_model.config.rms_norm_eps == 0.1


@pytest.fixture
def gguf_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/gguf"


def test_a_damaged_conversion_is_made_anew(gguf_cache, tmp_path, caplog):
    file = write_gguf(tmp_path / "model.gguf", sealed=False)
    fingerprint = model_fingerprint(load(file, device="cpu"))
    (folder,) = gguf_cache.iterdir()
    weights = folder / "model.safetensors"
    for damage in (lambda: weights.write_bytes(weights.read_bytes()[:-4] + b"1234"), weights.unlink):
        damage()
        assert model_fingerprint(load(file, device="cpu")) == fingerprint
        assert f"{folder} is damaged; it is made anew" in caplog.text
        caplog.clear()
    load(file, device="cpu")
    assert not caplog.text and list(gguf_cache.iterdir()) == [folder]


def test_a_gguf_is_loaded_without_a_cache_that_can_be_written(gguf_cache, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", sealed=False)
    fingerprint = model_fingerprint(load(file, device="cpu"))
    shutil.rmtree(gguf_cache)
    gguf_cache.write_text("in the folder's place")
    assert model_fingerprint(load(file, device="cpu")) == fingerprint


@pytest.mark.usefixtures("gguf_cache")
def test_a_gguf_that_lost_a_tensor_or_has_a_broken_seal_is_refused(tmp_path):
    file = write_gguf(tmp_path / "sealed.gguf", sealed=True)
    load(file, device="cpu")
    intact = file.read_bytes()
    file.write_bytes(intact[:-8] + b"12345678")
    assert_refused(file, "is damaged: its bytes do not match their hash")
    file.write_bytes(
        write_gguf(tmp_path / "plain.gguf", sealed=False).read_bytes().replace(b"ffn_up", b"ffn_pu", 1)
    )
    assert_refused(file, "missing: .*up_proj|could not be read")
    file.write_bytes(b"")
    assert_refused(file, "could not be read as a GGUF")
