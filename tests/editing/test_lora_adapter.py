"""An adapter does in peft what its edit does here, merged and unmerged, and comes back as the same edit."""

import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers as hf
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import FAMILIES, MORE_FAMILIES, byte_tokenizer, plain_model, tiny_folder, tiny_model
from helpers.weights import copy_weights, weights_equal
from safetensors.torch import load_file, save_file

import lens_defense as ld
from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.export.load_adapter import load_adapter
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.load import load
from lens_defense.models.mlp_output import output_modules

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks
IDS = torch.randint(3, 297, (2, 9), generator=torch.Generator().manual_seed(0))


def small(edit, share=0.02):
    """The edit so small that the model after it still depends on what it reads."""
    return replace(edit, left={layer: share * left for layer, left in edit.left.items()})


def logits(model):
    with torch.no_grad():
        result = model(IDS)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("family", [name for name in (*FAMILIES, *MORE_FAMILIES) if name != "gemma2"])
@pytest.mark.usefixtures("unchecked")
def test_peft_computes_what_the_edit_does(family, tmp_path):
    model = tiny_model(family)
    before, edit = logits(model), small(handmade_edit(model, (1, 2)))
    with edit.applied(model):
        expected = logits(model)
    assert (expected - before).abs().max() > 0.01
    edit.to_peft(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(plain_model(family), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"ld\.load\(peft_model\.merge_and_unload\(\), tokenizer\)"):
        load(loaded)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    again = load(merged, byte_tokenizer(True))
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_module_has_its_name_in_plain_transformers(family):
    model, plain = tiny_model(family), plain_model(family)
    for layer, module in output_modules(model, range(4)).items():
        assert f".{layer}." in module.name
        weight = plain.get_submodule(module.name).weight
        assert torch.equal(weight, model.blocks[layer].mlp.out.original_component.weight)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_edits_of_a_ledger_become_one_adapter(family, tmp_path):
    model, ledger = load(tiny_folder(tmp_path / "base", family), device="cpu"), None
    ledger = Ledger(model)
    for seed, layers in enumerate([(1, 2), (0,), (2, 3)]):
        ledger.apply(small(handmade_edit(model, layers, seed=seed)))
    edited, weights = logits(model), copy_weights(model)
    ledger.to_peft(tmp_path / "adapter")
    assert weights_equal(model, weights)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 4, 4)
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), edited, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="planned on other weights"):
        load_adapter(tmp_path / "adapter", model)
    while ledger.edits:
        ledger.undo()
    with load_adapter(tmp_path / "adapter", model).applied(model):
        torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"no edit stands in this ledger; apply one before ledger\.to_peft"):
        ledger.to_peft(tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_adapter_comes_back_as_an_edit(family, tmp_path):
    model = tiny_model(family)
    edit = handmade_edit(model, (1, 2))
    again = ld.load_adapter(edit.to_peft(tmp_path / "adapter"), model, requests=edit.requests)
    for layer, delta in edit.deltas().items():
        torch.testing.assert_close(again.deltas()[layer], delta, rtol=1e-6, atol=1e-6)
        wanted = delta.norm() / output_weight(model, layer).norm()
        assert again.relative_change[layer] == pytest.approx(float(wanted), rel=1e-6)
    same = ("layers", "role", "method", "requests", "model", "fingerprint", "modules")
    assert all(getattr(again, name) == getattr(edit, name) for name in same)
    assert repr(again) and again.warnings == () and again._repr_html_()
    saved = Edit.load(again.save(tmp_path / "edit"), model)
    assert saved.relative_change == again.relative_change
    report = ld.check(model, again, ld.Suite("own", "check", (), ()), max_new_tokens=2, progress=False)
    assert [row.id for row in report.rows] == [row.id for row in edit.requests]
    without = ld.load_adapter(tmp_path / "adapter", model)
    assert without.requests == () and repr(without) and without._repr_html_()
    for file in (tmp_path / "adapter").iterdir():
        assert b"lamp" not in file.read_bytes() and b"bell" not in file.read_bytes()


def output_weight(model, layer):
    return model.blocks[layer].mlp.out.original_component.weight


@pytest.mark.parametrize("family, target", [("gpt2", "mlp.c_proj"), ("llama", "down_proj")])
def test_an_adapter_that_peft_wrote_is_read(family, target, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=12, use_rslora=True, target_modules=[target], layers_to_transform=[1, 3],
        init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2",
        layers_pattern="h" if family == "gpt2" else "layers",
    )  # fmt: skip
    trained = peft.get_peft_model(plain_model(family), config).eval()
    trained.save_pretrained(tmp_path)
    model = tiny_model(family)
    edit = load_adapter(tmp_path, model)
    assert (edit.layers, edit.rank, edit.method) == ((1, 3), 3, "LoRA")
    with edit.applied(model):
        torch.testing.assert_close(logits(model), logits(trained), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"target_modules": ["q_proj", "down_proj"]},
            r"changes model\.layers\.0\.self_attn\.q_proj, which is no",
        ),
        ({"use_dora": True}, r"is of more than a plain LoRA \(use_dora\); merge it with peft"),
        ({"rank_pattern": {"layers.1.mlp.down_proj": 3}}, r"more than a plain LoRA \(rank_pattern\)"),
        ({"modules_to_save": ["lm_head"]}, r"more than a plain LoRA \(modules_to_save\)"),
        ({"bias": "all"}, r"more than a plain LoRA \(bias\)"),
    ],
)
def test_an_adapter_that_is_no_edit_is_refused(settings, message, tmp_path):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["down_proj"], **settings})
    peft.get_peft_model(plain_model(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(tmp_path, tiny_model())
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    config = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    peft.get_peft_model(plain_model(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no config of a LoRA adapter"):
        load_adapter(tmp_path, tiny_model())


def foreign(folder, tensors, **changes):
    """An adapter of some tensors, of nobody's."""
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.model.layers.1.mlp.down_proj.{name}": t for name, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


A, B = {"lora_A.weight": torch.ones(2, 64)}, {"lora_B.weight": torch.ones(32, 2)}


@pytest.mark.parametrize(
    "tensors, changes, message",
    [
        (A, {}, "has an A without a B, or none at all"),
        ({}, {}, "has an A without a B, or none at all"),
        ({**A, "lora_B.weight": torch.ones(32, 3)}, {}, "do not fit together"),
        ({**A, "lora_B.weight": torch.ones(32)}, {}, "do not fit together"),
        (
            {**A, "lora_B.weight": torch.ones(31, 2)},
            {},
            r"a matrix of \(31, 64\) in layer 1, .* is \(32, 64\)",
        ),
        ({**A, **B, "lora_C.weight": torch.ones(2)}, {}, "changes more than a LoRA adapter's A and B"),
        ({**A, "lora_B.weight": torch.full((32, 2), torch.nan)}, {}, "that are not finite"),
        ({**A, **B}, {"r": 0}, "no config of a LoRA adapter"),
        ({**A, **B}, {"r": "two"}, "no config of a LoRA adapter"),
        ({**A, **B}, {"lora_alpha": None}, "no config of a LoRA adapter"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_broken_adapter_is_refused(tensors, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_adapter(foreign(tmp_path / "adapter", tensors, **changes), tiny_model())


def test_files_that_are_no_adapter_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"is no folder of a LoRA adapter: it wants adapter_config\.json"):
        load_adapter(tmp_path, model)
    foreign(tmp_path, {**A, **B})
    load_adapter(tmp_path, model)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="could not be read as safetensors"):
        load_adapter(tmp_path, model)
    for text in ("{", "[]", "null"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match="no config of a LoRA adapter"):
            load_adapter(tmp_path, model)


def test_an_adapter_is_refused_on_another_model_and_where_it_was_changed(tmp_path):
    model = tiny_model()
    folder = handmade_edit(model, (1, 2)).to_peft(tmp_path / "adapter")
    with pytest.raises(ValueError, match="planned on other weights of tiny"):
        load_adapter(folder, tiny_model(seed=1))
    with pytest.raises(ValueError, match="exists and is not empty; name a new folder"):
        handmade_edit(model, (1, 2)).to_peft(folder)
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="is not as it was saved"):
        load_adapter(folder, model)


def test_an_edit_without_the_names_of_its_modules_says_so(tmp_path):
    edit = replace(handmade_edit(tiny_model(), (1, 2)), modules={})
    with pytest.raises(ValueError, match="does not name the modules that it changes"):
        edit.to_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_planned_edit_keeps_its_modules(tmp_path):
    edit = handmade_edit(tiny_model("gpt2"), (1, 2))
    assert Edit.load(edit.save(tmp_path / "edit")).modules == edit.modules
    assert edit.modules[1].name == "transformer.h.1.mlp.c_proj" and edit.modules[1].transposed
