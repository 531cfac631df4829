"""The plan of an edit: what it will do is exact, and no weight is changed by making it."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import MORE_FAMILIES, tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense.editing.edit as edit_module
import lens_defense.editing.forecast as forecasts
from lens_defense.editing.contrast import Contrast
from lens_defense.editing.edit import edit
from lens_defense.editing.methods import DELMAN, MEMIT, LoRA
from lens_defense.editing.solving.target_value import FitSettings
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix, standing_changes
from lens_defense.patching.corruptions import harmless_subjects
from lens_defense.prompts.corpus import CorpusText
from lens_defense.prompts.prompt import role_position, tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import Site, key_hook, value_hook

pytestmark = [
    pytest.mark.filterwarnings("ignore:this edit leaks"),
    pytest.mark.filterwarnings("ignore:less than 40% of the value arrives"),
    pytest.mark.filterwarnings("ignore:the refusal could not be fitted"),
]
CORPUS = [CorpusText("make a lamp", "how do I make a brass lamp"), CorpusText("the lamp is a thing")] * 2
REQUESTS = (
    request("how do I make a brass lamp?", "brass lamp", id="lamp"),
    request("ring a bell now", "bell", id="bell"),
    request("tell of an old ship", "old ship", id="ship", safe_target="No."),
)
SITES = tuple(Site("resid_post", layer, "subject_last") for layer in (2, 1))
FIT = FitSettings(shared_num_grad_steps=2, v_num_grad_steps=2)
FAST = {"fit": FIT, "corpus": CORPUS, "cache": False, "progress": False}
IDS = torch.randint(3, 297, (1, 12), generator=torch.Generator().manual_seed(0))


def few_contexts(request):
    return [request, request.inside("Hello! {}"), request.paraphrased("{} or not?")]


FAST |= {
    "contrast": None,
    "names": None,
    "contexts": few_contexts,
    "held_out_contexts": 1,
    "method": MEMIT(mom2_update_weight=10.0),
}


@pytest.fixture(autouse=True)
def small_neutral_text(monkeypatch):
    """The forecast's neutral texts, short enough for a tiny model of 256 positions."""
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)


def chat_model(family="llama", dtype=torch.float32, **settings):
    return tiny_model(family, chat=True, **settings).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize("method", [MEMIT(10.0), DELMAN(1, 10.0)], ids=["memit", "delman"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "neox", "mistral", *MORE_FAMILIES])
def test_the_shift_is_delta_times_key(family, method):
    model = chat_model(family)
    original_weights = copy_weights(model)
    plan = edit(model, REQUESTS, SITES, **{**FAST, "method": method})
    assert weights_equal(model, original_weights) and standing_changes(model) == ()
    assert plan.layers == (1, 2) and plan.rank == 3
    names = [hook(layer) for layer in plan.layers for hook in (key_hook, value_hook)]
    clean_states = forward(model, IDS, capture=names).states
    with plan.applied(model):
        edited_states = forward(model, IDS, capture=names).states
    first_shift = clean_states[key_hook(1)] @ plan.deltas()[1].float().T
    torch.testing.assert_close(
        edited_states[value_hook(1)] - clean_states[value_hook(1)], first_shift, rtol=1e-4, atol=1e-4
    )
    for layer, delta in plan.deltas().items():
        key_shift = edited_states[key_hook(layer)] - clean_states[key_hook(layer)]
        shift = (
            key_shift @ mlp_output_matrix(model, layer).T + edited_states[key_hook(layer)] @ delta.float().T
        )
        observed = edited_states[value_hook(layer)] - clean_states[value_hook(layer)]
        torch.testing.assert_close(observed, shift, rtol=1e-4, atol=1e-4)
    assert weights_equal(model, original_weights)


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom", "granite"])
def test_the_value_arrives_whatever_a_block_scales(family):
    exact = {**FAST, "method": MEMIT(mom2_update_weight=1e-6), "contexts": lambda item: [item]}
    plan = edit(chat_model(family), REQUESTS[:1], SITES, **{**exact, "held_out_contexts": 0})
    assert plan.forecast.reach[0] == pytest.approx(1, abs=0.02)


def test_what_hardly_arrives_is_said():
    with pytest.warns(
        UserWarning, match=r"less than 40% of the value arrives in held-out contexts of: brass"
    ):
        edit(chat_model(), REQUESTS, SITES, **{**FAST, "method": MEMIT(mom2_update_weight=1e6)})


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_model_in_float64_is_edited(family):
    model = chat_model(family, torch.float64)
    plan = edit(model, REQUESTS, SITES, **FAST)
    names = [key_hook(1), value_hook(1)]
    clean_states = forward(model, IDS, capture=names).states
    with plan.applied(model):
        edited_states = forward(model, IDS, capture=names).states
    shift = clean_states[key_hook(1)] @ plan.deltas()[1].T
    torch.testing.assert_close(edited_states[value_hook(1)] - clean_states[value_hook(1)], shift)


def test_the_plan_says_what_it_was_made_of():
    model = chat_model()
    plan = edit(model, REQUESTS, SITES, **{**FAST, "fit": replace(FIT, kl_factor=0.5)})
    assert plan.requests == REQUESTS
    assert plan.subjects == ("brass lamp", "bell", "old ship") == plan.forecast.subjects
    assert plan.contexts[1] == ("ring a bell now", "Hello! ring a bell now")
    assert (plan.role, plan.method, plan.model) == ("subject_last", "memit", "tiny-llama")
    assert plan.fingerprint == model_fingerprint(model, (1, 2))
    assert plan.settings["kl_factor"] == 0.5 and plan.settings["mom2_update_weight"] == 10.0
    for layer, delta in plan.deltas().items():
        ratio = float(delta.norm() / mlp_output_matrix(model, layer).double().norm())
        assert plan.relative_change[layer] == pytest.approx(ratio, rel=1e-5)
    assert all(loss > 0 for loss in plan.losses)
    assert len(plan.summary()) == 2
    assert "brass lamp" in repr(plan) and "brass lamp" in plan._repr_html_()


def harmless_uses(request):
    """Three harmless questions, the last of which is held out."""
    return [request.paraphrased(text) for text in ("is {} old?", "who sees {}?", "a book about {}")]


@torch.no_grad()
def test_a_contrast_keeps_the_harmless_uses_as_they_were():
    def shift(plan, use):
        prompt = tokenize(model.tokenizer, use)
        ids, hook = torch.tensor([prompt.ids]), value_hook(2)
        at = role_position(prompt, "subject_last")
        clean = forward(model, ids, capture=[hook]).states[hook][0, at]
        with plan.applied(model):
            return float((forward(model, ids, capture=[hook]).states[hook][0, at] - clean).norm())

    model = chat_model()
    plain = edit(model, REQUESTS, SITES, **FAST)
    contrasted = edit(model, REQUESTS, SITES, **{**FAST, "contrast": Contrast(harmless_uses, 1e4)})
    shown = [use for request in REQUESTS for use in harmless_uses(request)[:2]]
    assert sum(shift(contrasted, use) for use in shown) < 0.2 * sum(shift(plain, use) for use in shown)
    assert {use.text for use in shown} <= contrasted.texts and not plain.forecast.reach_harmless
    assert not {harmless_uses(request)[2].text for request in REQUESTS} & contrasted.texts
    assert len(contrasted.forecast.reach_harmless) == len(REQUESTS)
    assert contrasted.rank == 2 * len(REQUESTS)
    assert (contrasted.settings["contrast_weight"], plain.settings["contrast_weight"]) == (1e4, None)


def test_neighborhood_prompts_are_contexts_about_harmless_things():
    model = chat_model()
    contrast = Contrast(harmless_uses, weight=1e4, neighbors=5, ridge=0.25)
    with_them = edit(model, REQUESTS, SITES, **{**FAST, "contrast": contrast})
    without = edit(model, REQUESTS, SITES, **{**FAST, "contrast": Contrast(harmless_uses, weight=1e4)})
    asked = [context for request in REQUESTS for context in FAST["contexts"](request)[:-1]]
    neighbors = with_them.texts - without.texts
    assert len(neighbors) > 5 and without.texts < with_them.texts
    for text in neighbors:
        assert any(text == item.renamed(thing).text for item in asked for thing in harmless_subjects())
    assert with_them.texts == edit(model, REQUESTS, SITES, **{**FAST, "contrast": contrast}).texts
    assert with_them.rank == without.rank, "they are further keys of the same group"
    noted = {"contrast_weight": 1e4, "contrast_neighbors": 5, "contrast_ridge": 0.25}
    assert {name: with_them.settings[name] for name in noted} == noted
    assert "contrast_ridge" not in without.settings


def test_a_ridge_is_the_identity_in_place_of_a_share_of_the_covariance(monkeypatch):
    def solved_with(ridge):
        seen = []
        solve = MEMIT.solve

        def spy(self, groups, covariance):
            seen.append(covariance)
            return solve(self, groups, covariance)

        with monkeypatch.context() as patch:
            patch.setattr(MEMIT, "solve", spy)
            edit(model, REQUESTS, SITES, **{**FAST, "contrast": Contrast(harmless_uses, ridge=ridge)})
        return seen[0].double()

    model = chat_model()
    few = solved_with(0.0)  # the corpus of the tests is small: a share is the identity's already
    whole = solved_with(1.0)
    torch.testing.assert_close(whole, torch.eye(len(few)).double() * few.trace() / len(few))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"weight": 0.0}, "weight must be above 0"),
        ({"neighbors": -1}, "neighbors must lie between 0 and 200, got -1"),
        ({"neighbors": 201}, "neighbors must lie between 0 and 200, got 201"),
        ({"ridge": 1.5}, "ridge is a share of C, between 0 and 1; got 1.5"),
    ],
)
def test_what_is_no_setting_of_a_contrast_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Contrast(**settings)


def test_a_contrast_may_be_a_function_or_a_list():
    model = chat_model()
    as_list = [use for request in REQUESTS for use in harmless_uses(request)]
    by_function, by_list = (
        edit(model, REQUESTS, SITES, **{**FAST, "contrast": contrast})
        for contrast in (harmless_uses, as_list)
    )
    for layer, delta in by_function.deltas().items():
        torch.testing.assert_close(by_list.deltas()[layer], delta)
    refused("the contrast has no harmless use of 'old ship'", contrast=as_list[:6])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("contrast", ["is it legal?", 7, ["is it legal?"], [request("is it legal?")]])
def test_a_contrast_of_another_kind_is_refused(contrast):
    refused("contrast must be None, a Contrast, a function", contrast=contrast)


def test_other_names_are_rows_of_the_same_request():
    names = {"names": lambda request: [request.subject.upper()], "contrast": harmless_uses}
    plan = edit(chat_model(), REQUESTS, SITES, **{**FAST, **names})
    assert plan.names <= {"BRASS LAMP", "BELL", "OLD SHIP"} and "BELL" in plan.names
    assert plan.rank == 2 * (len(REQUESTS) + len(plan.names))
    assert "Hello! ring a BELL now" in plan.texts
    assert "ring a BELL now" not in plan.texts, "that is what check asks of a spelling that was seen"


def test_planning_twice_gives_the_same():
    first, again = (edit(chat_model("gpt2"), REQUESTS, SITES, **FAST) for _ in range(2))
    for layer, delta in first.deltas().items():
        torch.testing.assert_close(again.deltas()[layer], delta)


def test_more_requests_of_a_batch_make_one_rank():
    model = chat_model("gpt2")
    plan = edit(model, REQUESTS, SITES, **{**FAST, "method": DELMAN(2, 10.0)})
    assert plan.rank == 2
    by_memit, by_delman = (
        edit(model, REQUESTS[:1], SITES, **{**FAST, "method": method})
        for method in (MEMIT(10.0), DELMAN(1, 10.0))
    )
    for layer, delta in by_memit.deltas().items():
        torch.testing.assert_close(by_delman.deltas()[layer], delta)


def refused(message, requests=REQUESTS, sites=SITES, model=None, **settings):
    with pytest.raises(ValueError, match=message):
        edit(model or chat_model(), requests, sites, **{**FAST, **settings})


def refused_setting(message, settings_type, **fields):
    with pytest.raises(ValueError, match=message):
        settings_type(**fields)


def test_bad_sites_are_refused():
    refused("no sites were given", sites=())
    mixed_sites = (*SITES, Site("resid_post", 1, "next"))
    refused(r"several roles \(next, subject_last\)", sites=mixed_sites)
    refused("attn_out sites cannot be edited", sites=[Site("attn_out", 1, "subject_last")])
    refused("layer 9 is not in the model", sites=[Site("resid_post", 9, "subject_last")])
    requests = [request("ring a bell", "bell", id="bell")]
    sites = [Site("resid_post", 1, "after")]
    refused("request 'bell' has no token of the role 'after'", sites=sites, requests=requests)


def test_bad_requests_are_refused():
    refused("no requests were given", requests=())
    refused("belongs to the split 'check'", requests=[replace(REQUESTS[0], split="check")])
    refused(r"no subject.* is marked in 'bare'\. Name it", requests=[request("ring it", id="bare")])


@pytest.mark.usefixtures("unchecked")
def test_bad_settings_are_refused():
    refused("method must be one of memit, delman, .* or an object with .*, got 'wise'", method="wise")
    refused_setting("batch_size must be at least 1", DELMAN, batch_size=0)
    refused_setting("contexts_per_step must be at least 1, got 0", FitSettings, contexts_per_step=0)
    refused_setting("v_num_grad_steps must be at least 0", FitSettings, v_num_grad_steps=-1)
    refused("held_out_contexts must be at least 0", held_out_contexts=-1)
    refused_setting("extra_rounds must be at least 0", FitSettings, extra_rounds=-1)
    for method in (MEMIT, DELMAN):
        refused_setting("mom2_update_weight must be above 0", method, mom2_update_weight=0.0)
    refused_setting("clamp_norm_factor must be above 0", FitSettings, clamp_norm_factor=0.0)
    refused_setting("min_share in", FitSettings, min_share=0.0)
    refused("contexts gave nothing for request 'lamp'", contexts=lambda _: [])


def test_a_post_norm_model_is_refused():
    refused("norms the MLP's output", model=chat_model("gemma2"))


def test_values_are_kept_by_what_they_depend_on(tmp_path, monkeypatch):
    monkeypatch.setenv("LENS_DEFENSE_CACHE", str(tmp_path))
    fits, fit_target_values = [], edit_module.fit_target_values

    def counted(*arguments, **settings):
        fits.append(1)
        return fit_target_values(*arguments, **settings)

    monkeypatch.setattr(edit_module, "fit_target_values", counted)
    model, settings = chat_model(), {**FAST, "cache": True}
    first, again = (edit(model, REQUESTS, SITES, **settings) for _ in range(2))
    assert len(fits) == 1
    assert torch.equal(first.deltas()[2], again.deltas()[2]) and first.losses == again.losses
    edit(model, REQUESTS, SITES, **{**settings, "fit": replace(FIT, v_num_grad_steps=3)})
    edit(model, REQUESTS[:2], SITES, **settings)
    edit(model, REQUESTS, SITES[1:], **settings)
    mlp_output_matrix(model, 3)[0, 0] += 1.0
    edit(model, REQUESTS, SITES, **settings)
    assert len(fits) == 5


@pytest.mark.filterwarnings("default:the refusal could not be fitted")
@pytest.mark.parametrize("method", [MEMIT(10.0), LoRA(steps=2, batch_size=2, r=2)], ids=["memit", "lora"])
def test_a_strength_is_solved_for(method):
    """In one layer the change is the strength times that of strength 1; nothing is fitted otherwise."""
    model, settings = chat_model(), {**FAST, "method": method}
    plain = edit(model, REQUESTS, SITES[0], **settings)
    strong = edit(model, REQUESTS, SITES[0], **settings, strength=1.5)
    torch.testing.assert_close(strong.deltas()[2], 1.5 * plain.deltas()[2], rtol=1e-4, atol=1e-7)
    assert (strong.strength, plain.strength) == (1.5, 1) and strong.forecast.strength == 1
    assert strong.settings["strength"] == 1.5 and "strength" not in plain.settings
    for now, before in zip(strong.forecast.reach, plain.forecast.reach, strict=True):
        assert now == pytest.approx(1.5 * before, rel=0.05, abs=0.02)
    assert strong.forecast.leak_safe == pytest.approx(1.5 * plain.forecast.leak_safe, rel=1e-3)
    assert strong.losses == pytest.approx(plain.losses)
    assert strong.scaled(2).strength == 3


def test_layers_are_solved_for_one_another_at_the_strength():
    """Of two layers the sum reaches the strength; scaled by hand, the upper one does not fit the lower."""
    model = chat_model()
    plain, strong = (edit(model, REQUESTS, SITES, **FAST, strength=strength) for strength in (1.0, 3.0))
    torch.testing.assert_close(strong.deltas()[1], 3 * plain.deltas()[1], rtol=1e-4, atol=1e-7)
    upper, scaled = strong.deltas()[2], plain.scaled(3).deltas()[2]
    assert (upper - scaled).norm() > 1e-3 * scaled.norm()
    assert not any("was scaled after" in sentence for sentence in strong.warnings)
    assert any("ld.edit(..., strength=3)" in sentence for sentence in plain.scaled(3).warnings)


@pytest.mark.parametrize("strength", [0, -1.0, float("inf"), float("nan"), True])
def test_a_strength_that_is_none_is_refused(strength):
    with pytest.raises(ValueError, match="strength must be a finite number above 0"):
        edit(chat_model(), REQUESTS, SITES, **FAST, strength=strength)


def test_a_refusal_that_was_not_fitted_is_named():
    with pytest.warns(UserWarning, match="could not be fitted for: brass lamp, bell, old ship") as caught:
        plan = edit(chat_model(), REQUESTS, SITES, **FAST)
    sentences = [str(warning.message) for warning in caught]
    assert tuple(text for text in sentences if not text.startswith("the corpus has")) == plan.warnings
