"""A fingerprint names what differs, and is the same for one model however it was loaded."""

import pytest
import torch
import transformers as hf
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import CONFIGS, byte_tokenizer, tiny_folder, tiny_model

from lens_defense.editing.edit_plan import Edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.loading.load import load
from lens_defense.loading.save import save_folder
from lens_defense.models.fingerprint import Fingerprint, model_fingerprint

PARTS = ("weights", "config", "tokenizer", "chat_template")


def loaded(weights=0.0, tokens=0, template="", config=CONFIGS["llama"], **fields):
    """A model with the same random weights each time but for what is asked for."""
    torch.manual_seed(0)
    settings = config()
    for name, value in fields.items():
        setattr(settings, name, value)
    hf_model = hf.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        hf_model.lm_head.weight[0, 0] += weights
        hf_model.model.layers[1].mlp.down_proj.weight[0, 0] += weights
    tokenizer = byte_tokenizer(chat=True)
    if tokens:
        tokenizer.add_tokens(["lamp-of-brass"])
    tokenizer.chat_template += template
    return load(hf_model, tokenizer)


CHANGES = {
    "weights": {"weights": 1.0},
    "config": {"hidden_act": "gelu"},
    "tokenizer": {"tokens": 1},
    "chat_template": {"template": "{# another #}"},
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_sees_its_own_change_alone(part):
    base, other = model_fingerprint(loaded()), model_fingerprint(loaded(**CHANGES[part]))
    assert base.differing(other, *PARTS) == part.replace("_", " ")
    assert not base.differing(model_fingerprint(loaded()), *PARTS)
    assert not base.differing(other, *(name for name in PARTS if name != part))


@pytest.mark.parametrize(
    "fields", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}]
)
def test_what_changes_the_pass_is_in_the_config(fields):
    assert "config" in model_fingerprint(loaded()).differing(model_fingerprint(loaded(**fields)), *PARTS)


@pytest.mark.parametrize("fields", [{"use_cache": False}, {"_name_or_path": "x"}, {"eos_token_id": 5}])
def test_what_leaves_the_pass_as_it_is_is_not(fields):
    assert model_fingerprint(loaded()) == model_fingerprint(loaded(**fields))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_saved_folder_a_model_in_hand_and_a_used_tokenizer_have_one_fingerprint(family, tmp_path):
    model = load(tiny_folder(tmp_path / "base", family), device="cpu")
    fingerprint = model_fingerprint(model)
    assert model_fingerprint(load(save_folder(model, tmp_path / "saved"), device="cpu")) == fingerprint
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    in_hand = load(plain, hf.AutoTokenizer.from_pretrained(tmp_path / "saved"))
    in_hand.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert model_fingerprint(in_hand) == fingerprint


@pytest.mark.parametrize("part", PARTS)
def test_an_edit_is_refused_where_weights_config_or_tokenizer_differ(part, tmp_path):
    file = handmade_edit(loaded(), (1, 2)).save(tmp_path / "edit.safetensors")
    other = loaded(**CHANGES[part])
    if part == "chat_template":
        with Edit.load(file, other).applied(other):
            return
    edit = Edit.load(file)
    for use in (lambda: Edit.load(file, other), lambda: Ledger(other).apply(edit)):
        with pytest.raises(ValueError, match=f"planned on other {part} of tiny than this model has now"):
            use()


def test_a_fingerprint_reads_as_its_parts():
    assert str(Fingerprint("1", "2", "3", "4")) == "1, config 2, tokenizer 3, chat template 4"
    assert str(Fingerprint("1")) == "1"


def test_a_model_without_a_tokenizer_has_one_too():
    model = tiny_model("llama")
    model.tokenizer = None
    assert not model_fingerprint(model).tokenizer
