"""The screen is the first order of the sweep: a finite difference, and TransformerLens's own tool, say so."""

import pytest
import torch
from helpers.tiny_models import FAMILIES
from helpers.trace_cases import ALL_CELLS, BELL, LAMP, tiny_chat_model
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

from lens_defense.models.forward import forward
from lens_defense.sites import EMBEDDING_HOOK, component_hook
from lens_defense.tracing.corruptions import noise
from lens_defense.tracing.map_statistics import agreement
from lens_defense.tracing.metrics import answer_logprob
from lens_defense.tracing.trace import trace
from lens_defense.tracing.trace_result import join_traces

PARTS = ("resid_post", "mlp_out", "attn_out", "z.1")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_screen_is_the_slope_of_the_sweep(family, direction):
    """With tiny noise both maps move by the same amount: their relative gap shrinks with the noise."""
    model = tiny_chat_model(family)
    gaps = []
    for scale in (1e-1, 1e-2):
        some = {**ALL_CELLS, "corruption": noise(model, scale=scale, samples=2), "window": 1, "floor": 0.0}
        told = [
            trace(model, [BELL], components=PARTS, direction=direction, exact=exact, **some)
            for exact in (True, False)
        ]
        moved = [(one.patched - _base(one)).nan_to_num() for one in told]
        gaps.append(float((moved[0] - moved[1]).norm() / moved[0].norm()))
    assert gaps[1] < 0.1
    assert gaps[1] < 0.3 * gaps[0]


def _base(told):
    """What the run that is patched gives, in the shape of the map."""
    wide = told.clean[:, None, None, None, None]
    return told.corrupted[:, None, None, None] if told.direction == "denoising" else wide


@pytest.mark.parametrize("component", PARTS[:3])  # of heads that tool gives no gradient
def test_it_is_transformer_lens_attribution_patching(component):
    model = tiny_chat_model("llama")
    told = trace(
        model, [BELL], components=[component], exact=False, corruption=_swapped(model), window=1, **ALL_CELLS
    )
    (met,) = told.prompts
    clean = torch.tensor([[*met.ids, *met.answer_ids[:-1]]])
    spoiled = clean.clone()
    spoiled[0, met.subject_positions[0]] += 1
    names = [component_hook(component, layer) for layer in range(4)]

    def metric(logits):
        answer = logits[:, -len(met.answer_ids) :]
        return answer_logprob(answer, met, answer).sum()

    grads = cache_activation_and_gradient(model, spoiled, metric, names)
    held = cache_activation_and_gradient(model, clean, metric, names, compute_gradient=False)
    for layer, name in enumerate(names):
        product = (held.activations[name] - grads.activations[name]) * grads.gradients[name]
        wanted = product.sum(-1)[0, : len(met.ids)] + told.corrupted[0, 0]
        torch.testing.assert_close(told.patched[0, 0, layer, :, 0], wanted.detach(), rtol=1e-8, atol=1e-8)


def _swapped(model):
    """The subject's first token becomes the next one of the vocabulary."""

    def corrupt(_embeddings, met):
        ids = torch.tensor([met.ids])
        ids[0, met.subject_positions[0]] += 1
        return forward(model, ids, capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK].detach()

    return corrupt


def test_the_strongest_cells_are_measured_after_all():
    model = tiny_chat_model()
    exact = trace(model, [LAMP, BELL], **ALL_CELLS)
    told = trace(model, [LAMP, BELL], exact=False, verify=5, **ALL_CELLS)
    guess = trace(model, [LAMP, BELL], exact=False, **ALL_CELLS)
    assert len(told.verified) == 10 and not told.exact and not guess.verified
    for r in range(2):
        strongest = guess.effects[r].nan_to_num().abs().flatten().sort(descending=True).values[:5]
        mine = [one for one in told.verified if one.cell[0] == r]
        assert sorted(abs(one.estimated) for one in mine) == pytest.approx(sorted(strongest.tolist()))
        for one in mine:
            assert one.measured == pytest.approx(float(exact.effects[one.cell]))
            assert one.measured == pytest.approx(float(told.effects[one.cell]))
            assert one.estimated == pytest.approx(float(guess.effects[one.cell]))
    assert agreement(told, exact, k=5) == agreement(guess, exact, k=5), "what was verified is no estimate"
    assert agreement(exact, exact) == (pytest.approx(1.0), 1.0)
    values = exact.effects.flatten(1).nan_to_num(-9)
    shares = [
        len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
        for a, b in zip(guess.effects.flatten(1).nan_to_num(-9), values, strict=True)
    ]
    assert agreement(guess, exact, k=5)[1] == pytest.approx(sum(shares) / 2)
    assert join_traces([told[0], told[1]]).verified == told.verified
    assert len(told[1].verified) == 5 and {one.cell[0] for one in told[1].verified} == {0}
    assert told.only("resid_post").verified == told.verified
    both = trace(model, [LAMP], components=("resid_post", "mlp_out"), exact=False, verify=8, **ALL_CELLS)
    assert sum(len(both.only(part).verified) for part in both.components) == 8
    with pytest.raises(ValueError, match="not of the same requests"):
        agreement(told[0], exact)


def test_a_severed_screen_is_refused():
    with pytest.raises(ValueError, match="measured exactly"):
        trace(tiny_chat_model(), [LAMP], severed="mlp_out", exact=False, **ALL_CELLS)
