"""What a trace must be true of on any model, and what it refuses; the sweep itself has its own tests."""

import itertools
import re
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.handmade import HOSTILE, a_prompt, a_request, a_trace, lamp_prompts
from helpers.listener import Listener
from helpers.reference_tracing import trace_one_by_one
from helpers.tiny_models import FAMILIES, tiny_model
from helpers.trace_cases import ALL_CELLS, BELL, LAMP, tiny_chat_model
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_defense.models import devices
from lens_defense.models import forward as patches
from lens_defense.models.forward import forward
from lens_defense.patching import activation_patching as sweeps
from lens_defense.patching import attribution_patching as attributions
from lens_defense.patching import clean_corrupted as runs
from lens_defense.patching.clean_corrupted import read_metrics
from lens_defense.patching.corruptions import (
    CounterfactualPrompt,
    GaussianNoise,
    MeanAblation,
    ResampleAblation,
    TokenReplacement,
    ZeroAblation,
    harmless_subjects,
)
from lens_defense.patching.metrics import (
    answer_logprob,
    answer_probability,
    kl_to_clean,
    refusal_logit_diff,
)
from lens_defense.patching.patch_cell import PatchCell, PatchPoint
from lens_defense.progress import progress_listener
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import EMBEDDING_HOOK
from lens_defense.statistics import mean_interval
from lens_defense.tracing import trace as tracers
from lens_defense.tracing.trace import trace, trace_metrics
from lens_defense.tracing.trace_result import Trace


def logprob(model, prompt):
    """Log probability of a prompt's answer by one plain forward."""
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]])
    result = model(ids)[0, -len(prompt.answer_ids) :].log_softmax(-1)
    return result.gather(1, torch.tensor(prompt.answer_ids)[:, None]).sum()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox"])
def test_zero_and_whole_effects(family):
    model = tiny_chat_model(family)
    result = trace(model, [LAMP, BELL], **{**ALL_CELLS, "answer_tokens": 1})
    for one in (result[0], result[1]):
        (prompt,), effects = one.prompts, one.effects[0, 0]
        first, last = min(prompt.subject_positions), len(prompt.ids) - 1
        assert effects.isfinite().all()
        assert effects[:, :first].abs().max() < 1e-9, "before the subject nothing was corrupted"
        assert effects[-1, :last].abs().max() < 1e-9, "the last layer is read at the last token only"
        assert effects[-1, last] == pytest.approx(1.0, abs=1e-9)
        assert effects[0, first:last].abs().max() > 1e-3


@torch.no_grad()
def test_clean_is_the_log_probability_of_the_models_own_answer():
    model = tiny_chat_model()
    result = trace(model, [LAMP, BELL], **ALL_CELLS)
    for prompt, clean in zip(result.prompts, result.clean, strict=True):
        assert len(prompt.answer_ids) <= 3
        assert float(clean) == pytest.approx(float(logprob(model, prompt)), abs=1e-6)
    given = trace(model, [LAMP, BELL], answers=["a brass lamp", "the lamp"], **ALL_CELLS)
    assert given.answers == ("a brass lamp", "the lamp")
    assert float(given.clean[1]) == pytest.approx(float(logprob(model, given.prompts[1])), abs=1e-6)
    known = trace(model, [replace(LAMP, target="a lamp")], **ALL_CELLS)
    assert known.answers == ("a lamp",)


def test_order_of_requests_changes_nothing():
    model = tiny_chat_model()
    there, back = (trace(model, some, **ALL_CELLS) for some in ([LAMP, BELL], [BELL, LAMP]))
    torch.testing.assert_close(back.effects.flip(0), there.effects, equal_nan=True)
    torch.testing.assert_close(trace(model, [BELL], **ALL_CELLS).effects, there[1].effects)


@pytest.mark.parametrize("how", [{}, {"exact": False}, {"direction": "noising"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_bounded_memory_bounds_the_rows_and_changes_nothing(monkeypatch, family, how):
    model, some = (
        tiny_chat_model(family),
        {**ALL_CELLS, "positions": ["subject_last", "last"], "corruption": GaussianNoise(samples=4), **how},
    )
    whole = trace(model, [BELL], **some)
    rows, forward = [], patches.forward
    for module in (sweeps, attributions, runs):
        monkeypatch.setattr(
            module,
            "forward",
            lambda model, ids, **more: rows.append(len(ids)) or forward(model, ids, **more),
        )
    one = trace(model, [BELL], max_bytes=1, **some)
    assert set(rows) == {1}
    torch.testing.assert_close(one.patched, whole.patched, equal_nan=True)
    torch.testing.assert_close(one.corrupted, whole.corrupted)


def announced(monkeypatch, call, **settings):
    """The minutes that a trace announces where the runs before its sweeps took two hours."""
    clock, listener = itertools.count(0, 7200), Listener()
    monkeypatch.setattr(devices, "CPU_CALL_COST", devices.CallCost(call, 2**20))
    monkeypatch.setattr(tracers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with progress_listener(listener):
        trace(tiny_chat_model(), [LAMP], **{**ALL_CELLS, **settings, "progress": True})
    (words,) = listener.sentences
    return int(re.search(r"about (\d+) minutes", words)[1])


def test_a_long_trace_says_beforehand_how_long(monkeypatch):
    """Where a call is all that counts, one pass of all positions takes half as long as the two runs before;
    where it is nothing, more layers and positions take longer."""
    assert announced(monkeypatch, 10**9) == 60
    some, every = (announced(monkeypatch, 0, layers=layers) for layers in ([3], "all"))
    assert every > 2 * some > 0


def test_a_window_wider_than_the_model_fills_every_layer():
    result = trace(
        tiny_chat_model(), [LAMP], components=("resid_post", "mlp_out", "attn_out"), window=7, **ALL_CELLS
    )
    assert result.effects.shape[1:3] == (3, 4)
    assert result.effects.isfinite().all()


def test_positions_and_layers_bound_the_map():
    few = {"progress": False, "min_difference": 1e-9}
    result = trace(tiny_chat_model(), [LAMP, BELL], layers=2, positions=["subject_last"], **few)
    assert result.layers == (0, 2)
    assert {mean.role for mean in result.role_means()} == {"subject_last"}
    assert trace(tiny_chat_model(), [LAMP], layers=[3, 1, 1], **few).layers == (1, 3)
    assert trace(tiny_chat_model(), [LAMP], **few).layers == (0, 1, 2, 3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "bad, what",
    [
        ({"layers": 0}, "layers must be 'all', a stride or layers 0 to 3"),
        ({"layers": [1, 9]}, "layers must be"),
        ({"layers": []}, "layers must be"),
        ({"layers": "some"}, "layers must be"),
        ({"positions": "lst"}, "positions must be 'all' or a list"),
        ({"positions": ["middle"]}, "positions must be"),
        ({"components": ["head"]}, "components must be of"),
        ({"components": ["z.4"]}, "'z.0' to 'z.3'"),
        ({"components": []}, "components must be of"),
        ({"answers": ["one", "two"]}, "there are 1 requests and 2 answers"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"window": 0, "components": ["mlp_out"]}, "window"),
        ({"direction": "both"}, "direction must be one of 'denoising', 'noising', got 'both'"),
        ({"severed": "resid_post"}, "severed must be one of None, 'mlp_out', 'attn_out'"),
        ({"verify": 3}, "verify is a number of cells to measure after exact=False"),
        ({"verify": -1, "exact": False}, "got -1"),
    ],
)
def test_bad_arguments_are_refused(bad, what):
    with pytest.raises(ValueError, match=what):
        trace(tiny_chat_model(), [LAMP], progress=False, **bad)


def test_requests_that_a_trace_may_not_see_are_refused():
    for one, what in (
        (request("make it", id="bare"), r"no subject.* is marked in 'bare'\. Name it"),
        (replace(LAMP, split="check"), "belongs to the split 'check'"),
    ):
        with pytest.raises(ValueError, match=what):
            trace(tiny_chat_model(), [one], progress=False)


def test_weak_requests_are_refused_by_name():
    model = tiny_chat_model()
    with pytest.raises(ValueError, match=r"hardly changes the answer to: lamp \(.*\), bell \("):
        trace(model, [LAMP, BELL], corruption=GaussianNoise(scale=0.0), progress=False)
    with pytest.raises(ValueError, match=r"a change of 1000\.0"):
        trace(model, [LAMP], min_difference=1000.0, progress=False)


def difference(model, length, item=LAMP):
    """The least difference that the corruption makes to the model's own answer of a length."""
    plain = trace(model, [item], **{**ALL_CELLS, "answer_tokens": length})
    changes = plain.clean[0] - plain.corrupted[0]
    return float(changes.abs().min()) if len(set(changes.sign().tolist())) == 1 else 0.0


def test_an_answer_is_lengthened_until_its_subject_matters(capsys):
    """The length is the first of 1, 2, 4, ... with a large enough difference, and so is the map."""
    model = tiny_chat_model()
    differences = {length: difference(model, length) for length in (1, 2, 4, 8)}
    least_difference = (max(differences[1], differences[2]) + max(differences[4], differences[8])) / 2
    found = next(length for length, change in differences.items() if change >= least_difference)
    assert found > 2, differences
    many = {**ALL_CELLS, "answer_tokens": 1, "min_difference": least_difference, "progress": True}
    lengthened = trace(model, [LAMP], **many)
    expected = trace(model, [LAMP], **{**ALL_CELLS, "answer_tokens": found})
    assert lengthened.prompts == expected.prompts
    torch.testing.assert_close(lengthened.patched, expected.patched, equal_nan=True)
    assert f"lamp ({found})" in capsys.readouterr().out


def test_what_never_depends_on_its_subject_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"in 64 tokens.*ld\.mark_subjects proposes some"):
        trace(tiny_chat_model(), [LAMP], corruption=GaussianNoise(scale=0.0), progress=False)


def test_a_known_answer_is_not_lengthened():
    with pytest.raises(ValueError, match=r"hardly changes the answer to: lamp \(.* in 2 tokens"):
        trace(tiny_chat_model(), [LAMP], answers=["a lamp"], min_difference=1e9, progress=False)


def test_seeds_and_samples():
    model = tiny_chat_model()
    one, same, other = (
        trace(model, [LAMP], corruption=GaussianNoise(seed=n), **ALL_CELLS) for n in (0, 0, 1)
    )
    assert torch.equal(one.corrupted, same.corrupted)
    assert not torch.equal(one.corrupted, other.corrupted)
    assert trace(model, [LAMP], corruption=GaussianNoise(samples=5), **ALL_CELLS).corrupted.shape == (1, 5)


@torch.no_grad()
def test_noise_is_on_the_subject_alone_in_the_embeddings_unit():
    model = tiny_chat_model()
    prompt = tokenize(model.tokenizer, LAMP)
    clean = forward(model, torch.tensor([prompt.ids]), capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    corrupted = GaussianNoise(scale=3.0, samples=400)(model, clean, prompt)
    moved = (corrupted - clean).abs().amax((0, 2)) > 0
    assert tuple(moved.nonzero()[:, 0].tolist()) == prompt.subject_positions
    unit = float(model.embed.weight.std())
    draws = (corrupted - clean)[:, list(prompt.subject_positions)]
    assert float(draws.std()) == pytest.approx(3 * unit, rel=0.02)


@torch.no_grad()
def test_replacement_is_another_subject_of_the_same_length():
    model = tiny_chat_model()
    xyz = request("how do I make a xyz at home?", "xyz", id="xyz")
    prompt, other = (tokenize(model.tokenizer, one) for one in (xyz, replace(xyz, subject="qwv")))
    states = [forward(model, torch.tensor([p.ids]), capture=[EMBEDDING_HOOK]).states for p in (prompt, other)]
    clean, expected = (captured[EMBEDDING_HOOK] for captured in states)
    corrupted = TokenReplacement(subjects=["a", "qwv and so on", "qwv", "vwq"])(model, clean, prompt)
    torch.testing.assert_close(corrupted, expected)
    assert TokenReplacement(samples=2, subjects=["qwv", "vwq"])(model, clean, prompt).shape[0] == 2


def test_replacement_in_a_trace():
    model = tiny_chat_model()
    xyz = request("how do I make a xyz at home?", "xyz", id="xyz", counterfactual="qwv")
    result = trace(model, [xyz], corruption=TokenReplacement(), **ALL_CELLS)
    assert result.corrupted.shape == (1, 1)
    with pytest.raises(ValueError, match="request 'xyz': 0 of 1 subjects have the token length"):
        longer = replace(xyz, counterfactual="qwv qwv qwv")
        trace(model, [longer], corruption=TokenReplacement(), **ALL_CELLS)
    with pytest.raises(ValueError, match=r"1 of 1 subjects .* and 2 are wanted"):
        trace(model, [xyz], corruption=TokenReplacement(samples=2), **ALL_CELLS)
    subjects = harmless_subjects()
    assert len(subjects) == len(set(subjects)) == 200 and all(subjects)


@torch.no_grad()
def test_other_metrics():
    model = tiny_chat_model()
    first = trace(model, [LAMP], metric=answer_probability, **ALL_CELLS)
    (prompt,) = first.prompts
    logits = model(torch.tensor([prompt.ids]))[0, -1]
    assert float(first.clean) == pytest.approx(float(logits.softmax(-1)[prompt.answer_ids[0]]), abs=1e-7)
    metric = refusal_logit_diff(model, refusals=["how"], compliances=["a", "the"])
    result = trace(model, [LAMP], metric=metric, **ALL_CELLS)
    ids = [model.tokenizer(text)["input_ids"][0] for text in ("how", "a", "the")]
    expected_difference = logits[ids[0]] - logits[ids[1:]].mean()
    assert float(result.clean) == pytest.approx(float(expected_difference), abs=1e-6)


def test_effect_is_the_share_of_the_loss_recovered():
    result = a_trace(samples=3)
    result = replace(result, clean=result.clean + 2.0, corrupted=result.corrupted * 3)
    low = result.corrupted.numpy()[:, None, None, None]
    share = (result.patched.numpy() - low) / (2.0 - low)
    np.testing.assert_allclose(result.effects.numpy(), share.mean(-1))


def test_dataframe_has_a_row_a_traced_cell():
    prompts = [a_prompt(), a_prompt(("a", " pipe", " bomb", "?"), subject=(1, 3), template=())]
    result = a_trace(prompts, components=("resid_post", "mlp_out"), samples=3)
    table = result.to_dataframe()
    assert len(table) == 2 * 4 * (10 + 4)
    assert list(table.columns[:6]) == [*("request", "component", "layer", "position", "token", "role")]
    row = table[(table.component == "mlp_out") & (table.layer == 2) & (table.token == " bomb")].iloc[0]
    assert row.effect == pytest.approx(float(result.effects[0, 1, 2, 6]))
    assert (row.low, row.high) == mean_interval(result.values[0, 1, 2, 6].numpy())


@pytest.mark.parametrize("number", [1, 3, 9])
def test_by_role_is_the_mean_over_requests(number):
    result = a_trace(lamp_prompts(number), samples=4)
    table = result.by_role()
    last = result.values[:, 0, 1, 6]
    row = table[(table.role == "subject_last") & (table.layer == 1)].iloc[0]
    assert row.effect == pytest.approx(float(last.mean()))
    assert row.n == number
    values = last[0] if number == 1 else last.mean(1)
    assert (row.low, row.high) == pytest.approx(mean_interval(values.numpy()))
    whole = table[(table.role == "template") & (table.layer == 1)].iloc[0]
    assert whole.effect == pytest.approx(float(result.effects[:, 0, 1, [0, 1, 2, 8]].mean()))


def test_one_request_of_a_trace():
    result = a_trace([a_prompt(), a_prompt(("a", " pipe", " bomb"), subject=(1, 3), template=())])
    assert result[-1].effects.shape == (1, 1, 4, 3)
    assert torch.equal(result[1].effects[0], result.effects[1, :, :, :3])
    with pytest.raises(IndexError):
        result[2]


@settings(deadline=None, max_examples=50)
@given(
    words=st.lists(st.sampled_from(HOSTILE) | st.text(max_size=5), min_size=4, max_size=7),
    number=st.integers(1, 3),
    layers=st.sets(st.integers(0, 9), min_size=1, max_size=4).map(sorted),
    samples=st.integers(1, 4),
    roles=st.none() | st.just(("subject_last",)),
    text=st.text(max_size=9),
)
def test_a_trace_survives_its_file(tmp_path_factory, words, number, layers, samples, roles, text):
    asked = a_request(f"{text} a lamp", "lamp")
    prompts = [a_prompt(words, subject=(1, 3), request=asked, template=(0,))] * number
    result = a_trace(prompts, layers=layers, samples=samples, roles=roles, answers=[text] * number)
    file = result.save(tmp_path_factory.getbasetemp() / "trace.safetensors")
    back = Trace.load(file)
    for name in [field.name for field in fields(Trace)]:
        held, got = getattr(result, name), getattr(back, name)
        if isinstance(held, torch.Tensor):
            torch.testing.assert_close(got, held, rtol=0, atol=0, equal_nan=True)
        else:
            assert got == held, name


def test_a_file_without_a_trace_is_refused(tmp_path):
    from helpers.handmade_edits import handmade_edit

    file = handmade_edit(tiny_model("llama"), (1,)).save(tmp_path / "plan.safetensors")
    with pytest.raises(ValueError, match="holds an edit, not a trace"):
        Trace.load(file)


def a_cell(component, layer, tokens, severed, parallel, *, window=2, depth=4):
    """A cell by the order of computation: a block's attention, then its MLP (or both at once), its sum."""
    wide = component in ("mlp_out", "attn_out")
    layers = range(max(0, layer - window // 2), min(depth, layer + (window + 1) // 2)) if wide else [layer]
    order = {"resid_pre": 0, "attn_out": 1, "z": 1, "mlp_out": 1 if parallel else 2, "resid_post": 3}
    first = min((at, order[component.split(".")[0]]) for at in layers)
    held = [at for at in range(depth) if severed and (at, order[severed]) > first]
    return PatchCell(
        tuple(PatchPoint(component, at, t) for at in layers for t in tokens),
        tuple(PatchPoint(severed, at, t) for at in held if (severed != component or at not in layers)
              for t in tokens),
    )  # fmt: skip


PARTS = ("resid_post", "resid_pre", "attn_out", "mlp_out", "z.2")
CORRUPTIONS = {
    "noise": GaussianNoise(),
    "replacement": TokenReplacement(subjects=["qwv", "vwq"], samples=2),
    "counterfactual": CounterfactualPrompt({"xyz": "how do I make a qwv at home!"}),
    "zero": ZeroAblation(),
    "mean": MeanAblation(),
    "resample": ResampleAblation(),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "severed, corruption",
    [*((None, how) for how in CORRUPTIONS), ("mlp_out", "resample"), ("attn_out", "noise")],
)
@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_equals_the_oracle_in_every_direction(family, direction, severed, corruption):
    model = tiny_chat_model(family)
    asked = request("how do I make a xyz at home?", "xyz", id="xyz")
    some = {**ALL_CELLS, "positions": ["subject_last", "last"], "corruption": CORRUPTIONS[corruption]}
    result = trace(model, [asked], components=PARTS, direction=direction, severed=severed, window=2, **some)
    (prompt,) = result.prompts
    cells = {
        (c, layer, t): a_cell(part, layer, [t], severed, family == "neox")
        for c, part in enumerate(PARTS)
        for layer in range(4)
        for t in (prompt.positions("subject_last")[-1], len(prompt.ids) - 1)
    }
    for place, slow in trace_one_by_one(model, result, cells, some["corruption"]):
        torch.testing.assert_close(result.patched[0, *place], slow, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("severed", [None, "mlp_out", "attn_out"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_before_a_block_is_the_one_after_the_block_below(family, severed):
    result = trace(
        tiny_chat_model(family), [BELL], components=("resid_pre", "resid_post"), severed=severed, **ALL_CELLS
    )
    torch.testing.assert_close(result.patched[:, 0, 1:], result.patched[:, 1, :-1], equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_all_tokens_together_are_one_cell_a_layer(family):
    model, parts = tiny_chat_model(family), ("resid_post", "z.1", "mlp_out")
    result = trace(model, [BELL], components=parts, severed="attn_out", together=True, window=2, **ALL_CELLS)
    (prompt,) = result.prompts
    last = len(prompt.ids) - 1
    assert result.settings.together and result.effects[0, :, :, :last].isnan().all()
    cells = {
        (c, layer, last): a_cell(part, layer, range(last + 1), "attn_out", family == "neox")
        for c, part in enumerate(parts)
        for layer in range(4)
    }
    for place, slow in trace_one_by_one(model, result, cells, GaussianNoise()):
        torch.testing.assert_close(result.patched[0, *place], slow, rtol=1e-9, atol=1e-9)
    whole = trace(model, [BELL], together=True, **{**ALL_CELLS, "answer_tokens": 1})
    torch.testing.assert_close(whole.effects[0, 0, :, last], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("how", [{}, {"direction": "noising"}, {"exact": False}], ids=str)
def test_a_run_that_does_not_fit_is_told_in_a_sentence(monkeypatch, how):
    forward = patches.forward

    def full(model, ids, **more):
        if len(ids) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return forward(model, ids, **more)

    for module in (runs, attributions):
        monkeypatch.setattr(module, "forward", full)
    with pytest.raises(MemoryError, match=r"3 rows of .* do not fit into memory; lower max_bytes"):
        trace(tiny_chat_model(), [BELL], **ALL_CELLS, **how)


def test_half_precision_is_read_in_single():
    generator = torch.Generator().manual_seed(0)
    logits = (10 * torch.randn((3, 2, 300), generator=generator)).bfloat16()
    prompt = replace(a_prompt(), answer_ids=(7, 9))
    for metric in (answer_logprob, answer_probability, kl_to_clean):
        result = read_metrics([metric], prompt, logits[:1])(logits)[:, 0]
        torch.testing.assert_close(result, metric(logits.float(), prompt, logits[:1].float()), rtol=0, atol=0)


def test_samples_that_do_not_go_one_way_are_refused():
    model = tiny_chat_model()
    signs = iter(range(9))

    def metric(_logits, _met, _clean):  # the clean run is read first, then the two samples
        return torch.tensor([[0.0], [1.0, -1.0]][next(signs) % 2], dtype=torch.float64)

    with pytest.raises(
        ValueError, match=r"hardly changes the answer to: lamp \(0 .* one way in every sample"
    ):
        trace(model, [LAMP], metric=metric, corruption=GaussianNoise(samples=2), progress=False)


def test_noising_is_the_share_of_the_damage():
    result = trace(tiny_chat_model(), [LAMP, BELL], direction="noising", **{**ALL_CELLS, "answer_tokens": 1})
    for one in (result[0], result[1]):
        (prompt,), effects = one.prompts, one.effects[0, 0]
        torch.testing.assert_close(
            effects[-1, len(prompt.ids) - 1].item(), 1.0
        )  # alone decides the first token
        assert effects[:, : min(prompt.subject_positions)].abs().max() < 1e-9


def test_several_metrics_read_from_one_sweep():
    model = tiny_chat_model()
    metrics = {"log": answer_logprob, "first": answer_probability, "kl": kl_to_clean}
    several = trace_metrics(model, [LAMP, BELL], metrics, **ALL_CELLS)
    assert list(several) == list(metrics)
    for name, metric in metrics.items():
        alone = trace(model, [LAMP, BELL], metric=metric, **ALL_CELLS)
        torch.testing.assert_close(several[name].patched, alone.patched, equal_nan=True)
        torch.testing.assert_close(several[name].clean, alone.clean)
    assert several["kl"].clean.abs().max() < 1e-9


def test_heads_are_components_of_their_own():
    result = trace(
        tiny_chat_model(), [LAMP], components=["z"], **{**ALL_CELLS, "positions": ["subject_last"]}
    )
    assert result.components == ("z.0", "z.1", "z.2", "z.3")


@torch.no_grad()
def test_ablations_spoil_only_the_subject():
    model = tiny_chat_model("gemma2")
    prompt = tokenize(model.tokenizer, BELL)
    clean = forward(model, torch.tensor([prompt.ids]), capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    for ablation, number in ((ZeroAblation(), 1), (MeanAblation(), 1), (ResampleAblation(samples=4), 4)):
        result = ablation(model, clean, prompt)
        moved = (result != clean).any(-1)
        assert len(result) == number
        assert {i for row in moved for i in row.nonzero()[:, 0].tolist()} <= set(prompt.subject_positions)
        assert moved.any()
    assert (ZeroAblation()(model, clean, prompt)[0, list(prompt.subject_positions)] == 0).all()
    drawn = ResampleAblation(samples=1)(model, clean, prompt)[0, prompt.subject_positions[0]]
    every = forward(model, torch.arange(300)[None], capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK][0]
    assert (every - drawn).abs().amax(1).min() < 1e-9, "a token's embedding, as the model scales it"
