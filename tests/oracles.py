"""Slow, obvious implementations that the fast ones are held against."""

import torch

from lens_defense.models.forward import forward
from lens_defense.sites import EMBEDDING_HOOK, component_hook, head_index
from lens_defense.tracing.metrics import answer_logprob


def one_forward_a_cell(model, ids, corrupted, cells, measure, keep, *, noising=False):
    """Causal tracing as ROME's appendix writes it: corrupt, restore one cell, run the whole model.

    ids [1, token]; corrupted: embeddings [sample, token, d_model]; noising runs the clean prompt and
    puts in the corrupted states instead. Returns [cell, sample].
    """
    points = [point for cell in cells for point in (*cell.points, *cell.severed)]
    names = {component_hook(point.component, point.layer) for point in points}
    rows = ids.expand(len(corrupted), -1)

    def states_of(embeddings):
        """All states, looked at one by one."""
        states = {}

        def remember(name):
            return lambda state, **_: states.__setitem__(name, state.clone())

        hooks = [(EMBEDDING_HOOK, lambda _state, **_: embeddings)] if embeddings is not None else []
        with model.hooks(fwd_hooks=[*hooks, *((name, remember(name)) for name in names)]):
            model(rows)
        return states

    clean, spoiled = states_of(None), states_of(corrupted)
    base, donor = (clean, spoiled) if noising else (spoiled, clean)

    def put(point, states):
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

    out = []
    for cell in cells:
        hooks = [] if noising else [(EMBEDDING_HOOK, lambda _state, **_: corrupted)]
        hooks += [put(point, donor) for point in cell.points]
        hooks += [put(point, base) for point in cell.severed]
        with model.hooks(fwd_hooks=hooks):
            out.append(measure(model(rows)[:, -keep:])[:, 0])
    return torch.stack(out)


def traced_one_by_one(model, told, cells, corruption):
    """Cells of a trace of one request by the log probability of its answer, each by a run of its own.

    cells: by place in the map. Yields place and [sample].
    """
    (met,), noising = told.prompts, told.direction == "noising"
    ids = torch.tensor([[*met.ids, *met.answer[:-1]]])
    clean = forward(model, ids, names=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    spoiled = corruption(clean[:, : len(met.ids)], met).to(clean)
    spoiled = torch.cat([spoiled, clean[:, len(met.ids) :].expand(len(spoiled), -1, -1)], 1)

    def measure(logits):
        return answer_logprob(logits, met, logits[:1])[:, None]

    every = list(cells.values())
    slow = one_forward_a_cell(model, ids, spoiled, every, measure, len(met.answer), noising=noising)
    yield from zip(cells, slow, strict=True)


def corrupted_run(model, ids, embeddings, names, keep):
    """The corrupted run as the sweep wants it."""
    rows = ids.expand(len(embeddings), -1)
    return forward(model, rows, names=names, writes={EMBEDDING_HOOK: lambda _: embeddings}, keep=keep)
