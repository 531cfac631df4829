"""Who watches a trace sees every cell once, with the effect that stands in the trace to the bit."""

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.trace_cases import ALL_CELLS, BELL, LAMP, SHIP, tiny_chat_model

from lens_defense.patching import activation_patching
from lens_defense.patching.corruptions import GaussianNoise
from lens_defense.patching.metrics import answer_logprob, answer_probability
from lens_defense.tracing.measured_cell import MeasuredCell
from lens_defense.tracing.trace import trace, trace_metrics

HOW = {
    "one sample": {"corruption": GaussianNoise(samples=1)},
    "nine samples": {"corruption": GaussianNoise(samples=9)},
    "noising": {"direction": "noising", "layers": 2},
    "together": {"together": True, "positions": ["subject_first", "subject_last"]},
    "severed": {"severed": "mlp_out", "positions": ["subject_last"]},
    "windows and heads": {"components": ("mlp_out", "z", "attn_out"), "window": 3, "positions": ["last"]},
    "parts of one sample": {"max_bytes": 1, "positions": ["subject_last", "last"]},
    "estimated": {"exact": False},
    "estimated in parts": {"exact": False, "max_bytes": 1, "positions": ["subject_last", "last"]},
    "verified": {"exact": False, "verify": 5},
}


def watched(model, requests, **settings):
    """A trace, and the batches of cells that were watched."""
    batches = []
    return trace(model, requests, watch=batches.append, **{**ALL_CELLS, **settings}), batches


def assert_all_once(result, batches):
    cells = [cell for batch in batches for cell in batch]
    assert all(isinstance(cell, MeasuredCell) for cell in cells)
    effects = torch.full_like(result.effects, float("nan"))
    for cell in cells:
        place = (
            cell.request,
            result.components.index(cell.component),
            result.layers.index(cell.layer),
            cell.position,
        )
        assert effects[place].isnan(), "a cell came twice"
        effects[place] = cell.effect
    assert torch.equal(effects.nan_to_num(nan=-9.0), result.effects.nan_to_num(nan=-9.0))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_watched_cells_are_the_traces(family, how):
    model, settings = tiny_chat_model(family), {**ALL_CELLS, **HOW[how]}
    result, batches = watched(model, [LAMP, BELL], **settings)
    assert_all_once(result, batches)
    unwatched = trace(model, [LAMP, BELL], **settings)
    assert torch.equal(unwatched.patched.nan_to_num(), result.patched.nan_to_num())


def test_cells_come_pass_by_pass(monkeypatch):
    model, passes, patched_logits = tiny_chat_model(), [], activation_patching._patched_logits

    def counted(*arguments):
        passes.append(len(arguments[4]))
        return patched_logits(*arguments)

    monkeypatch.setattr(activation_patching, "_patched_logits", counted)
    sizes = []
    trace(model, [LAMP, SHIP], watch=lambda cells: sizes.append((len(passes), len(cells))), **ALL_CELLS)
    assert sizes == list(enumerate(passes, 1)), "each batch came before the next pass began"


def test_a_pass_that_is_halved_tells_its_cells_once(monkeypatch):
    patched_logits, failed = activation_patching._patched_logits, []

    def too_much(*arguments):
        if len(arguments[4]) > 6 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return patched_logits(*arguments)

    monkeypatch.setattr(activation_patching, "_patched_logits", too_much)
    result, batches = watched(tiny_chat_model(), [LAMP])
    assert failed == [1]
    assert_all_once(result, batches)


def test_the_first_of_several_metrics_is_watched():
    batches = []
    metrics = {"logprob": answer_logprob, "probability": answer_probability}
    results = trace_metrics(tiny_chat_model(), [LAMP], metrics, watch=batches.append, **ALL_CELLS)
    assert_all_once(results["logprob"], batches)
    with pytest.raises(AssertionError):
        assert_all_once(results["probability"], batches)


def test_what_a_watcher_raises_ends_the_trace():
    def stop(_):
        raise KeyboardInterrupt

    model = tiny_model("llama", chat=True)
    with pytest.raises(KeyboardInterrupt):
        trace(model, [LAMP], watch=stop, **ALL_CELLS)
    assert trace(model, [LAMP], **ALL_CELLS).effects.isfinite().any()
