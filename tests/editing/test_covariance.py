"""C equals a double loop over single texts; the cache knows the weights and the corpus."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, PADDING_COUNTS, tiny_model
from safetensors import safe_open
from safetensors.torch import save_file

import lens_defense.editing.solving.covariance as covariance_module
from lens_defense.editing.solving.covariance import key_covariances, shrink_covariances
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.corpus import CorpusText
from lens_defense.sites import key_hook

CORPUS = [
    CorpusText("make a lamp", "how do I make a brass lamp, a thing"),
    CorpusText("a brass lamp is a thing that I make", "how"),
    CorpusText("the lamp is a thing", ""),
    CorpusText("x", "y"),
    CorpusText("how do I make a lamp, a lamp, a lamp?", ""),
]


def rendered(model, user, assistant):
    """One text as the model reads it."""
    if not assistant:
        return user
    if not model.tokenizer.chat_template:
        return f"{user}\n\n{assistant}"
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>"


@torch.no_grad()
def by_double_loop(model, layer):
    total, count = torch.zeros(model.cfg.d_mlp, model.cfg.d_mlp, dtype=torch.float64), 0
    for text in CORPUS:
        ids = torch.tensor([model.tokenizer(rendered(model, text.user, text.assistant))["input_ids"]])
        for key in forward(model, ids, capture=[key_hook(layer)]).states[key_hook(layer)][0]:
            total += torch.outer(key, key)
            count += 1
    return total / count


@pytest.mark.parametrize("repeats", [1, 20])
def test_few_keys_are_mixed_with_the_identity(repeats):
    model = tiny_model("llama")
    texts, width = CORPUS * repeats, 64
    keys = sum(len(model.tokenizer(rendered(model, *text))["input_ids"]) for text in texts)
    share = max(0.0, 1 - keys / (2 * width))
    assert (share == 0) == (repeats == 20)
    covariance = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    covariance = covariance @ covariance.T
    if not share:
        assert shrink_covariances(model, {1: covariance}, texts)[1] is covariance
        return
    with pytest.warns(UserWarning, match=f"the corpus has {keys} tokens, too few for keys of width 64"):
        mixed = shrink_covariances(model, {1: covariance}, texts)[1]
    wanted = (1 - share) * covariance + share * torch.eye(width) * covariance.trace() / width
    torch.testing.assert_close(mixed, wanted)


@pytest.mark.parametrize("repeats", [1, 20])
def test_a_ridge_is_mixed_in_however_many_keys_there_are(recwarn, repeats):
    model, width = tiny_model("llama"), 64
    covariance = torch.diag(torch.arange(1.0, width + 1))
    mixed = shrink_covariances(model, {1: covariance}, CORPUS * repeats, 0.95)[1]
    torch.testing.assert_close(mixed, 0.05 * covariance + 0.95 * torch.eye(width) * (width + 1) / 2)
    assert not recwarn, "few keys are no news where the ridge takes more of C"


@pytest.mark.parametrize("family", [*FAMILIES, *PADDING_COUNTS])
@pytest.mark.parametrize("chat", [True, False])
def test_streamed_is_a_double_loop(family, chat):
    model = tiny_model(family, chat=chat).to(torch.float32)
    covariances = key_covariances(model, (0, 2), CORPUS, batch_size=3, cache=False, progress=False)
    assert list(covariances) == [0, 2]
    for layer, covariance in covariances.items():
        slow = by_double_loop(model, layer)
        torch.testing.assert_close(covariance.double(), slow, rtol=1e-4, atol=1e-5 * float(slow.max()))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_padding_is_without_effect_in_float64_too(family):
    model = tiny_model(family)
    covariance = key_covariances(model, (2,), CORPUS, batch_size=3, cache=False, progress=False)[2]
    slow = by_double_loop(model, 2)
    torch.testing.assert_close(covariance.double(), slow, rtol=1e-5, atol=1e-6 * float(slow.max()))


@pytest.fixture
def passes(monkeypatch, tmp_path):
    """The layers of each pass over a corpus; the cache is an empty one."""
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path))
    passes, stream = [], covariance_module._stream

    def counted(model, layers, *arguments):
        passes.append(list(layers))
        return stream(model, layers, *arguments)

    monkeypatch.setattr(covariance_module, "_stream", counted)
    return passes


def covariances_of(model, layers=(1, 2), corpus=CORPUS, **settings):
    return key_covariances(model.to(torch.float32), layers, corpus, progress=False, **settings)


def test_what_was_made_is_taken_from_the_cache(passes):
    model = tiny_model("llama", chat=True)
    first, again = covariances_of(model), covariances_of(tiny_model("llama", chat=True))
    assert passes == [[1, 2]]
    assert all(torch.equal(first[layer], again[layer]) for layer in (1, 2))
    covariances_of(model, (2, 3))
    assert passes == [[1, 2], [3]]
    covariances_of(model, cache=False)
    assert passes[-1] == [1, 2]


def test_other_weights_or_texts_are_made_anew(passes):
    model = tiny_model("gpt2", chat=True)
    first = covariances_of(model)
    mlp_output_matrix(model, 0)[0, 0] += 1.0
    assert not torch.equal(covariances_of(model)[1], first[1])
    covariances_of(model, corpus=CORPUS[1:])
    assert passes == [[1, 2]] * 3


def test_the_same_weights_with_another_epsilon_are_made_anew(passes):
    model = tiny_model("llama", chat=True)
    first = covariances_of(model)
    model.original_model.config.rms_norm_eps = 0.1
    for module in model.original_model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1
    assert not torch.equal(covariances_of(model)[1], first[1])
    assert len(passes) == 2


@pytest.mark.parametrize("damage", ["negated", "zeroed", "scaled", "rows swapped", "of another layer"])
def test_a_cached_covariance_that_was_changed_is_not_believed(passes, damage, tmp_path, caplog):
    """Whatever a changed entry holds, it was not written by `cached` under this key."""
    model = tiny_model("llama", chat=True)
    intact = covariances_of(model)
    files = sorted((tmp_path / "covariances").iterdir())
    if damage == "of another layer":
        first, second = (file.read_bytes() for file in files)
        files[0].write_bytes(second), files[1].write_bytes(first)
    else:
        changes = {"negated": lambda c: -c, "zeroed": lambda c: 0 * c, "scaled": lambda c: 2 * c}
        changes["rows swapped"] = lambda c: c.flip(0).contiguous()
        for file in files:
            with safe_open(file, framework="pt") as stored:
                metadata, covariance = stored.metadata(), stored.get_tensor("covariance").clone()
            save_file({"covariance": changes[damage](covariance)}, file, metadata=metadata)
    again = covariances_of(model)
    assert passes == [[1, 2]] * 2
    assert all(torch.equal(again[layer], intact[layer]) for layer in intact)
    assert "made anew" in caplog.text
    caplog.clear()
    covariances_of(model)
    assert len(passes) == 2 and not caplog.text


def test_another_tokenizer_or_template_is_made_anew(passes):
    covariances_of(tiny_model("llama", chat=True))
    covariances_of(tiny_model("llama", chat=False))
    assert len(passes) == 2
