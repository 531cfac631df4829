"""The estimate is the first order of the sweep: a finite difference, and TransformerLens's tool, say so."""

import pytest
import torch
from helpers.tiny_models import FAMILIES
from helpers.trace_cases import ALL_CELLS, BELL, LAMP, tiny_chat_model
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

from lens_defense.models.forward import forward
from lens_defense.patching.corruptions import GaussianNoise
from lens_defense.patching.metrics import answer_logprob
from lens_defense.sites import EMBEDDING_HOOK, component_hook
from lens_defense.tracing.map_statistics import agreement
from lens_defense.tracing.trace import trace
from lens_defense.tracing.trace_result import join_traces

COMPONENTS = ("resid_post", "mlp_out", "attn_out", "z.1")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_the_slope_of_the_sweep(family, direction):
    """With tiny noise both maps move by the same amount: their relative gap shrinks with the noise."""
    model = tiny_chat_model(family)
    gaps = []
    for scale in (1e-1, 1e-2):
        settings = {**ALL_CELLS, "corruption": GaussianNoise(scale=scale, samples=2), "window": 1}
        traces = [
            trace(model, [BELL], components=COMPONENTS, direction=direction, exact=exact, **settings)
            for exact in (True, False)
        ]
        measured, estimated = ((t.patched - _base_metric(t)).nan_to_num() for t in traces)
        gaps.append(float((measured - estimated).norm() / measured.norm()))
    assert gaps[1] < 0.1
    assert gaps[1] < 0.3 * gaps[0]


def _base_metric(trace):
    """The metric of the run that is patched, in the shape of the map."""
    if trace.settings.direction == "denoising":
        return trace.corrupted[:, None, None, None]
    return trace.clean[:, None, None, None, None]


@pytest.mark.parametrize("component", COMPONENTS[:3])  # of heads that tool gives no gradient
def test_it_is_transformer_lens_attribution_patching(component):
    model = tiny_chat_model("llama")
    result = trace(
        model, [BELL], components=[component], exact=False, corruption=_swap_token, window=1, **ALL_CELLS
    )
    (prompt,) = result.prompts
    clean = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]])
    corrupted = clean.clone()
    corrupted[0, prompt.subject_positions[0]] += 1
    hooks = [component_hook(component, layer) for layer in range(4)]

    def metric(logits):
        answer_logits = logits[:, -len(prompt.answer_ids) :]
        return answer_logprob(answer_logits, prompt, answer_logits).sum()

    base = cache_activation_and_gradient(model, corrupted, metric, hooks)
    donor = cache_activation_and_gradient(model, clean, metric, hooks, compute_gradient=False)
    for layer, hook in enumerate(hooks):
        product = (donor.activations[hook] - base.activations[hook]) * base.gradients[hook]
        expected = product.sum(-1)[0, : len(prompt.ids)] + result.corrupted[0, 0]
        estimate = result.patched[0, 0, layer, :, 0]
        torch.testing.assert_close(estimate, expected.detach(), rtol=1e-8, atol=1e-8)


def _swap_token(model, _embeddings, prompt):
    """The subject's first token becomes the next one of the vocabulary."""
    ids = torch.tensor([prompt.ids])
    ids[0, prompt.subject_positions[0]] += 1
    return forward(model, ids, capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK].detach()


def test_the_strongest_cells_are_measured_after_all():
    model = tiny_chat_model()
    exact = trace(model, [LAMP, BELL], **ALL_CELLS)
    verified = trace(model, [LAMP, BELL], exact=False, verify=5, **ALL_CELLS)
    estimated = trace(model, [LAMP, BELL], exact=False, **ALL_CELLS)
    assert len(verified.verified) == 10 and not verified.settings.exact and not estimated.verified
    for r in range(2):
        strongest = estimated.effects[r].nan_to_num().abs().flatten().sort(descending=True).values[:5]
        cells = [cell for cell in verified.verified if cell.cell[0] == r]
        assert sorted(abs(cell.estimated) for cell in cells) == pytest.approx(sorted(strongest.tolist()))
        for cell in cells:
            assert cell.measured == pytest.approx(float(exact.effects[cell.cell]))
            assert cell.measured == pytest.approx(float(verified.effects[cell.cell]))
            assert cell.estimated == pytest.approx(float(estimated.effects[cell.cell]))
    assert agreement(verified, exact, k=5) == agreement(estimated, exact, k=5), (
        "a verified cell is no estimate"
    )
    assert agreement(exact, exact) == (pytest.approx(1.0), 1.0)
    values = exact.effects.flatten(1).nan_to_num(-9)
    shares = [
        len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
        for a, b in zip(estimated.effects.flatten(1).nan_to_num(-9), values, strict=True)
    ]
    assert agreement(estimated, exact, k=5)[1] == pytest.approx(sum(shares) / 2)
    assert join_traces([verified[0], verified[1]]).verified == verified.verified
    assert len(verified[1].verified) == 5 and {cell.cell[0] for cell in verified[1].verified} == {0}
    assert verified.only("resid_post").verified == verified.verified
    components = trace(
        model, [LAMP], components=("resid_post", "mlp_out"), exact=False, verify=8, **ALL_CELLS
    )
    assert sum(len(components.only(name).verified) for name in components.components) == 8
    with pytest.raises(ValueError, match="not of the same requests"):
        agreement(verified[0], exact)


def test_a_severed_estimate_is_refused():
    with pytest.raises(ValueError, match="measured exactly"):
        trace(tiny_chat_model(), [LAMP], severed="mlp_out", exact=False, **ALL_CELLS)
