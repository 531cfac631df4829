"""On a device in single precision everything is as on the CPU in double: maps, edits, answers, checks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from plans import bits, same_bits
from test_activation_patching import PARTS, cells_of, setting, swept
from tiny import FAMILIES

import lens_defense as ld
from lens_defense.app.demo import ORGANISM as BENCH
from lens_defense.editing.covariance import key_covariances, read_corpus
from lens_defense.models.mlp_output import weights_fingerprint
from lens_defense.organism.request_set import contexts
from lens_defense.tracing import activation_patching as sweeps
from lens_defense.tracing import clean_corrupted as runs
from lens_defense.tracing.lenses import logit_lens, safety_layers, toxic_layers

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no accelerator")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))
"""The CPU is one of them: in single precision it is told from double too."""


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def single(device):
    return ld.load("organism", device=device)


@pytest.fixture(scope="module")
def double():
    return ld.load("organism", device="cpu", dtype=torch.float64)


def asked(n=2):
    return [contexts(item)[0] for item in ld.requests("organism")[:n]]


def both(single, double, **settings):
    """The same trace of both, corrupted alike."""
    return [ld.trace(model, asked(), progress=False, **settings) for model in (single, double)]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "screen"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_maps(single, double, direction, exact):
    parts = ("resid_post", "resid_pre", "mlp_out", "attn_out", "z.1")
    told, wanted = both(single, double, components=parts, layers=3, direction=direction, exact=exact)
    assert [met.answer for met in told.prompts] == [met.answer for met in wanted.prompts]
    torch.testing.assert_close(told.effects, wanted.effects, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_severed_maps_by_replacement(single, double):
    told, wanted = (
        ld.trace(
            model, asked(), corruption=BENCH.corruption(model), severed="mlp_out", layers=3, progress=False
        )
        for model in (single, double)
    )
    torch.testing.assert_close(told.effects, wanted.effects, rtol=1e-3, atol=1e-3, equal_nan=True)


@needs_cuda
@torch.no_grad()
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_sweeps_of_every_family(family, part):
    """Random tiny models in double, but for norms and rotations that transformers computes in single."""
    model, ids, embeddings = setting(family)
    cells = cells_of(part)
    wanted = swept(model, ids, embeddings, cells)
    model.original_model.to("cuda")
    told = swept(model, ids.to("cuda"), embeddings.to("cuda"), cells)
    torch.testing.assert_close(told, wanted, rtol=1e-5, atol=1e-5)


def test_lens_and_other_locators(single, double):
    wrapped, plain = asked(), ld.requests("organism")[:2]
    for locator, some in (
        (logit_lens, wrapped),
        (partial(toxic_layers, safe="I cannot help"), wrapped),
        (partial(safety_layers, progress=False), plain),
    ):
        told, wanted = (locator(model, some) for model in (single, double))
        torch.testing.assert_close(told.patched, wanted.patched, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_moments_edit_undo_and_check(single, double):
    corpus = read_corpus("organism")[:64]
    planned = ld.requests("organism")[:3]
    sites = [ld.Site("resid_post", layer, "subject_last", 1.0) for layer in (1, 2)]
    told, reports = [], []
    suite = ld.suite("organism").small(wrappers=1)
    suite = replace(suite, items=suite.for_requests(planned).items[:40], neutral=suite.neutral[:4])
    for model in (single, double):
        moments = key_covariances(model, [1, 2], corpus, cache=False, progress=False)
        settings = {"contexts": BENCH.contexts, "corpus": corpus, "cache": False, **BENCH.settings}
        plan = ld.edit(model, planned, sites, progress=False, **settings)
        told.append((moments, plan.deltas()))
        held, before = bits(model), weights_fingerprint(model)
        ledger = ld.Ledger(model)
        ledger.apply(plan)
        assert weights_fingerprint(model) != before
        ledger.undo()
        assert same_bits(model, held)
        reports.append(ld.check(model, plan, suite, progress=False))
        assert same_bits(model, held)
    (moments, deltas), (wanted, exact) = told
    for layer in (1, 2):
        torch.testing.assert_close(moments[layer], wanted[layer], rtol=1e-4, atol=1e-5)
        difference = deltas[layer].double() - exact[layer].double()
        assert difference.norm() < 0.01 * exact[layer].double().norm()
    first, second = reports
    assert [(row.before, row.after) for row in first.rows] == [(row.before, row.after) for row in second.rows]
    torch.testing.assert_close(first.kl, second.kl, rtol=1e-2, atol=1e-4)


def test_a_saved_plan_goes_to_another_device(single, tmp_path):
    """Planned on one, saved, read, and applied on the other of the same weights."""
    planned = ld.requests("organism")[:1]
    settings = {"contexts": BENCH.contexts, "corpus": read_corpus("organism")[:16], **BENCH.settings}
    where = [ld.Site("resid_post", 1, "subject_last", 1.0)]
    plan = ld.edit(single, planned, where, cache=False, progress=False, **settings)
    other = ld.load("organism", device="cpu")
    again = ld.Edit.load(plan.save(tmp_path / "plan.safetensors"), other)
    with plan.applied(single), again.applied(other):
        assert weights_fingerprint(single) == weights_fingerprint(other)


def test_half_precision(device, double):
    half = ld.load("organism", device=device, dtype=torch.bfloat16)
    told, wanted = both(half, double, layers=3)
    for mean, truth in zip(told.role_effects(), wanted.role_effects(), strict=True):
        assert abs(mean.effect - truth.effect) < 0.1, mean


@needs_cuda
def test_what_does_not_fit_on_the_device_is_halved(monkeypatch):
    """The card's own allocator refuses; test_sweeps shows that what the failed pass held is given back."""
    model = ld.load("organism", device="cuda")
    settings = {"positions": "all", "layers": "all", "samples": 32, "progress": False}
    whole = ld.trace(model, asked(1), **settings)
    grown, tried = sweeps._grown, []

    def small(*given):
        rows = len(given[4])
        tried.append(rows)
        if rows > 8:
            torch.empty(2**50, device="cuda", dtype=torch.uint8)
        return grown(*given)

    monkeypatch.setattr(runs, "rows_within", lambda *_, **__: 32 * 16)
    monkeypatch.setattr(sweeps, "_grown", small)
    told = ld.trace(model, asked(1), **settings)
    torch.testing.assert_close(told.effects, whole.effects, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert max(tried) == 16 and 8 in tried
    monkeypatch.setattr(runs, "rows_within", lambda *_, **__: 32 * 32)
    with pytest.raises(MemoryError, match="do not fit into memory; lower max_bytes"):
        ld.trace(model, asked(1), **settings)
