"""On a device in single precision everything is as on the CPU in double: maps, edits, answers, checks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.patch_cases import CELL_KINDS, cells_of, run_sweep, sweep_inputs
from helpers.tiny_models import FAMILIES
from helpers.weights import copy_weights, weights_equal

import lens_defense as ld
from lens_defense.app.traced_requests import corruption_of
from lens_defense.editing.solving.covariance import key_covariances
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.patching import activation_patching
from lens_defense.patching.corruptions import GaussianNoise
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.prompts.corpus import read_corpus
from lens_defense.tracing.lenses import logit_lens, safety_layers, toxic_layers

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))
"""On the CPU too, single precision is held against double."""
assert_close = torch.testing.assert_close
assert_maps_close = partial(assert_close, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def single(device):
    return ld.load("organism", device=device)


@pytest.fixture(scope="module")
def double():
    return ld.load("organism", device="cpu", dtype=torch.float64)


def wrapped_requests(n=2):
    """Requests as the organism answers them: each inside its first jailbreak template."""
    return [jailbroken_contexts(request)[0] for request in ld.requests("organism")[:n]]


def traces_of(models, **settings):
    """The same trace of each model, corrupted alike."""
    return [ld.trace(model, wrapped_requests(), progress=False, **settings) for model in models]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "screen"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_maps(single, double, direction, exact):
    settings = {"components": ("resid_post", "resid_pre", "mlp_out", "attn_out", "z.1"), "layers": 3}
    trace, expected = traces_of((single, double), direction=direction, exact=exact, **settings)
    answers, expected_answers = ([p.answer_ids for p in result.prompts] for result in (trace, expected))
    assert answers == expected_answers
    assert_maps_close(trace.effects, expected.effects)


def test_severed_maps_by_replacement(single, double):
    corruption = corruption_of(ld.load("organism"))
    trace, expected = traces_of((single, double), corruption=corruption, severed="mlp_out", layers=3)
    assert_maps_close(trace.effects, expected.effects)


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("kind", CELL_KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_of_every_family(family, kind):
    """Random tiny models in double, but for norms and rotations that transformers computes in single."""
    model, ids, embeddings = sweep_inputs(family)
    cells = cells_of(kind)
    expected = run_sweep(model, ids, embeddings, cells)
    model.original_model.to("cuda")
    readings = run_sweep(model, ids.to("cuda"), embeddings.to("cuda"), cells)
    assert_close(readings, expected, rtol=1e-5, atol=1e-5)


def test_lens_and_other_locators(single, double):
    wrapped, plain = wrapped_requests(), ld.requests("organism")[:2]
    for locator, requests in (
        (logit_lens, wrapped),
        (partial(toxic_layers, safe="I cannot help"), wrapped),
        (partial(safety_layers, judge=ld.judges.prefix, progress=False), plain),
    ):
        scores, expected = (locator(model, requests).effects for model in (single, double))
        assert_maps_close(scores, expected)


def test_covariances_edit_undo_and_check(single, double):
    corpus = read_corpus("organism")[:64]
    requests = ld.requests("organism")[:3]
    sites = [ld.Site("resid_post", layer, "subject_last", 1.0) for layer in (1, 2)]
    settings = {
        "contrast": None,
        "contexts": jailbroken_contexts,
        "corpus": corpus,
        "fit": ld.FitSettings(v_lr=0.4, shared_lr=0.4),
    }
    suite = ld.suite("organism").small(jailbreaks=1)
    suite = replace(suite, items=suite.for_requests(requests).items[:40], neutral=suite.neutral[:4])
    covariances, deltas, reports = [], [], []
    for model in (single, double):
        covariances.append(key_covariances(model, [1, 2], corpus, cache=False, progress=False))
        edit = ld.edit(model, requests, sites, cache=False, progress=False, **settings)
        deltas.append(edit.deltas())
        weights, fingerprint = copy_weights(model), weights_fingerprint(model)
        ledger = ld.Ledger(model)
        ledger.apply(edit)
        assert weights_fingerprint(model) != fingerprint
        ledger.undo()
        assert weights_equal(model, weights)
        reports.append(ld.check(model, edit, suite, progress=False))
        assert weights_equal(model, weights)
    for layer in (1, 2):
        covariance, expected_covariance = (by_layer[layer] for by_layer in covariances)
        assert_close(covariance, expected_covariance, rtol=1e-4, atol=1e-5)
        delta, expected = (by_layer[layer].double() for by_layer in deltas)
        assert (delta - expected).norm() < 0.01 * expected.norm()
    answers, expected_answers = ([(row.before, row.after) for row in report.rows] for report in reports)
    assert answers == expected_answers
    assert_close(reports[0].kl, reports[1].kl, rtol=1e-2, atol=1e-4)


@pytest.mark.filterwarnings("ignore:less than 40% of the value")
def test_a_saved_edit_goes_to_another_device(single, tmp_path):
    """Planned on one device, saved, loaded, and applied on another to the same weights."""
    corpus = read_corpus("organism")[:16]
    settings = {
        "contrast": None,
        "contexts": jailbroken_contexts,
        "corpus": corpus,
        "fit": ld.FitSettings(v_lr=0.4, shared_lr=0.4),
    }
    sites = [ld.Site("resid_post", 1, "subject_last", 1.0)]
    requests = ld.requests("organism")[:1]
    edit = ld.edit(single, requests, sites, cache=False, progress=False, **settings)
    cpu_model = ld.load("organism", device="cpu")
    loaded = ld.Edit.load(edit.save(tmp_path / "edit.safetensors"), cpu_model)
    with edit.applied(single), loaded.applied(cpu_model):
        assert weights_fingerprint(single) == weights_fingerprint(cpu_model)


def test_half_precision(device, double):
    half = ld.load("organism", device=device, dtype=torch.bfloat16)
    trace, expected = traces_of((half, double), layers=3)
    for mean, expected_mean in zip(trace.role_means(), expected.role_means(), strict=True):
        assert abs(mean.effect - expected_mean.effect) < 0.1, mean


@needs_cuda
def test_what_does_not_fit_on_the_device_is_halved(monkeypatch):
    """The card's own allocator refuses; test_activation_patching shows that a failed pass is freed."""
    model = ld.load("organism", device="cuda")
    requests, corruption = wrapped_requests(1), GaussianNoise(samples=32)
    settings = {"corruption": corruption, "positions": "all", "layers": "all", "progress": False}
    expected = ld.trace(model, requests, **settings)
    run_pass, rows = activation_patching._patched_logits, []

    def run_small_pass(*arguments):
        rows.append(len(arguments[4]))
        if rows[-1] > 8:
            torch.empty(2**50, device="cuda", dtype=torch.uint8)
        return run_pass(*arguments)

    monkeypatch.setattr("lens_defense.tracing.trace.rows_that_fit", lambda *_, **__: 32 * 16)
    monkeypatch.setattr(activation_patching, "_patched_logits", run_small_pass)
    trace = ld.trace(model, requests, **settings)
    assert_maps_close(trace.effects, expected.effects)
    assert max(rows) == 16 and 8 in rows
    monkeypatch.setattr("lens_defense.tracing.trace.rows_that_fit", lambda *_, **__: 32 * 32)
    with pytest.raises(MemoryError, match="do not fit into memory; lower max_bytes"):
        ld.trace(model, requests, **settings)
