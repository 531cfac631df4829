"""Slow, obvious implementations that the fast ones are held against."""

import torch

from lens_defense.patches import run
from lens_defense.sites import EMBEDDING, output_hook


def one_forward_a_cell(model, ids, corrupted_embeddings, cells, measure, keep):
    """Causal tracing as ROME's appendix writes it: corrupt, restore one cell, run the whole model.

    ids [1, token]; corrupted_embeddings [sample, token, d_model]; returns [cell, sample].
    """
    clean = {}

    def remember(name):
        return lambda state, **_: clean.__setitem__(name, state.clone())

    names = [output_hook(*point) for cell in cells for point in cell.points]
    with model.hooks(fwd_hooks=[(name, remember(name)) for name in set(names)]):
        model(ids)

    def corrupt(_state, **_):
        return corrupted_embeddings

    def restore(position, name):
        def write(state, **_):
            state = state.clone()
            state[:, position] = clean[name][:, position]
            return state

        return write

    out = []
    rows = ids.expand(len(corrupted_embeddings), -1)
    for cell in cells:
        hooks = [(EMBEDDING, corrupt)]
        for point in cell.points:
            name = output_hook(*point)
            hooks.append((name, restore(cell.position, name)))
        with model.hooks(fwd_hooks=hooks):
            out.append(measure(model(rows)[:, -keep:]))
    return torch.stack(out)


def corrupted_run(model, ids, embeddings, names, keep):
    """The corrupted run as the sweep wants it."""
    rows = ids.expand(len(embeddings), -1)
    return run(model, rows, names=names, writes={EMBEDDING: lambda _: embeddings}, keep=keep)
