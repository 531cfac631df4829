"""Patch cells of every kind on a tiny model, and the sweep over them."""

import torch

from helpers.reference_tracing import corrupted_run
from helpers.tiny_models import tiny_model
from lens_defense.models.forward import forward
from lens_defense.patching.activation_patching import sweep
from lens_defense.patching.patch_cell import PatchCell, PatchPoint, base_hooks, donor_hooks
from lens_defense.sites import COMPONENTS, EMBEDDING_HOOK

KEEP, LAYERS, TOKENS = 3, 4, 9


def measure(logits):
    """Summed log probability of token 7 at the last positions: [row, 1]."""
    return logits.log_softmax(-1)[:, :, 7].sum(-1, keepdim=True)


def grid(component, width=1, *, severed=()):
    """All layers by three positions, in windows of some layers; above them components may be severed."""
    cells = []
    for position in (0, 3, TOKENS - KEEP):
        for layer in range(LAYERS):
            layers = range(max(0, layer - width // 2), min(LAYERS, layer + (width + 1) // 2))
            points = tuple(PatchPoint(component, x, position) for x in layers)
            above = range(layers[-1] + 1, LAYERS)
            severed_points = tuple(PatchPoint(name, x, position) for name in severed for x in above)
            cells.append(PatchCell(points, severed_points))
    return cells


def cells_of(kind):
    """The cells of one of CELL_KINDS."""
    return {
        "components": [c for name in COMPONENTS for c in grid(name)],
        "windows": [c for name in ("mlp_out", "attn_out") for w in (2, 3) for c in grid(name, w)],
        "z": [c for h in (0, 3) for c in grid(f"z.{h}")],
        "severed": [c for name in ("mlp_out", "attn_out") for c in grid("resid_post", severed=[name])]
        + grid("mlp_out", 2, severed=["attn_out"]),
        "several tokens": [
            PatchCell(tuple(PatchPoint(name, layer, t) for t in (2, 3, 5)))
            for name in ("resid_post", "z.1")
            for layer in range(LAYERS)
        ],
    }[kind]


CELL_KINDS = ("components", "windows", "z", "severed", "several tokens")


def sweep_inputs(family, samples=2):
    """A tiny model, ids [1, token] and embeddings [sample, token, d_model] with noise on two tokens."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (1, TOKENS), generator=generator)
    clean = forward(model, ids, capture=[EMBEDDING_HOOK]).states[EMBEDDING_HOOK]
    embeddings = clean.repeat(samples, 1, 1)
    noise = torch.randn(samples, 2, 32, generator=generator, dtype=torch.float64)
    embeddings[:, 2:4] += noise
    return model, ids, embeddings


def run_sweep(model, ids, embeddings, cells, *, noising=False, read=measure, **settings):
    """The sweep over cells, with the base run and the donor run that it needs."""
    names = tuple(dict.fromkeys((*base_hooks(cells), *donor_hooks(cells))))
    corrupted = corrupted_run(model, ids, embeddings, names, KEEP)
    rows = ids.expand(len(embeddings), -1) if noising else ids
    clean = forward(model, rows, capture=names, logits_to_keep=KEEP)
    base, donor = (clean, corrupted) if noising else (corrupted, clean)
    settings = {"max_rows": 1000, **settings}
    return sweep(model, ids, base, donor, cells, read, keep=KEEP, **settings)
