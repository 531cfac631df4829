"""Slow, obvious implementations of causal tracing, which the fast ones must equal."""

import torch

from lens_defense.models.forward import forward
from lens_defense.patching.metrics import answer_logprob
from lens_defense.sites import EMBEDDING_HOOK, component_hook, head_index


def one_forward_per_cell(model, ids, corrupted, cells, measure, keep, *, noising=False):
    """Causal tracing as ROME's appendix writes it: corrupt, restore one cell, run the whole model.

    ids [1, token]; corrupted: embeddings [sample, token, d_model]; noising runs the clean prompt and
    puts in the corrupted states instead. Returns [cell, sample].
    """
    points = [point for cell in cells for point in (*cell.points, *cell.severed)]
    names = {component_hook(point.component, point.layer) for point in points}
    rows = ids.expand(len(corrupted), -1)

    def states_of(embeddings):
        states = {}

        def capture_hook(name):
            return lambda state, **_: states.__setitem__(name, state.clone())

        hooks = [(EMBEDDING_HOOK, lambda _state, **_: embeddings)] if embeddings is not None else []
        with model.hooks(fwd_hooks=[*hooks, *((name, capture_hook(name)) for name in names)]):
            model(rows)
        return states

    clean_states, corrupted_states = states_of(None), states_of(corrupted)
    base, donor = (clean_states, corrupted_states) if noising else (corrupted_states, clean_states)

    def patch_hook(point, states):
        name = component_hook(point.component, point.layer)

        def write(state, **_):
            state = state.clone()
            head = head_index(point.component)
            if head is None:
                state[:, point.position] = states[name][:, point.position]
            else:
                state[:, point.position, head] = states[name][:, point.position, head]
            return state

        return name, write

    readings = []
    for cell in cells:
        hooks = [] if noising else [(EMBEDDING_HOOK, lambda _state, **_: corrupted)]
        hooks += [patch_hook(point, donor) for point in cell.points]
        hooks += [patch_hook(point, base) for point in cell.severed]
        with model.hooks(fwd_hooks=hooks):
            readings.append(measure(model(rows)[:, -keep:])[:, 0])
    return torch.stack(readings)


def trace_one_by_one(model, trace, cells, corruption):
    """Cells of a trace of one request, measured by the log probability of its answer, one run per cell.

    cells: by their index in the map. Yields the index and the readings [sample].
    """
    (prompt,), noising = trace.prompts, trace.settings.direction == "noising"
    ids = torch.tensor([[*prompt.ids, *prompt.answer_ids[:-1]]])
    clean = forward(model, ids, capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    corrupted = corruption(model, clean[:, : len(prompt.ids)], prompt).to(clean)
    answer = clean[:, len(prompt.ids) :].expand(len(corrupted), -1, -1)
    corrupted = torch.cat([corrupted, answer], 1)

    def measure(logits):
        return answer_logprob(logits, prompt, logits[:1])[:, None]

    keep = len(prompt.answer_ids)
    readings = one_forward_per_cell(
        model, ids, corrupted, list(cells.values()), measure, keep, noising=noising
    )
    yield from zip(cells, readings, strict=True)


def corrupted_run(model, ids, embeddings, names, keep):
    """The forward pass over corrupted embeddings [sample, token, d_model], with these states captured."""
    rows = ids.expand(len(embeddings), -1)
    return forward(
        model, rows, capture=names, patches={EMBEDDING_HOOK: lambda _: embeddings}, logits_to_keep=keep
    )
