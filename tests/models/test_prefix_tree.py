"""A tree of prefixes gives each row the last token's states of a plain run, whatever blocks have changed."""

import pytest
import torch
from helpers.tiny_models import FAMILIES, PADDING_COUNTS, SINGLE_PRECISION, tiny_model

from lens_defense.models.forward import forward
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.models.prefix_tree import last_token_reader
from lens_defense.sites import component_hook, key_hook

SHARED = (5, 9, 120, 33)
TEMPLATES = [(7, 8, 41, 3), (99,), (7, 8, 12, 60, 61, 62, 17, 9, 4)]
SUBJECTS = [(14,), (200, 14), (14, 3, 9), (201,)]
FOREST = [SHARED + template + subject for template in TEMPLATES for subject in SUBJECTS]
cases = pytest.mark.parametrize(
    "rows",
    [FOREST, [(7, 8), (9, 8, 7)], [SHARED] * 3, [SHARED, SHARED[:2]], [(7,), (7, 9)], [SHARED]],
    ids=["templates", "nothing shared", "the same", "one inside the other", "one token", "one row"],
)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *PADDING_COUNTS])
@pytest.mark.parametrize("first_changed", [0, 1, 2])
@pytest.mark.parametrize("batch_rows", [3, 128])
@cases
def test_a_reader_sees_blocks_that_changed(family, first_changed, batch_rows, rows):
    model = tiny_model(family)
    hooks = [key_hook(2), component_hook("resid_post", 3)]
    read = last_token_reader(model, rows, first_changed=first_changed, stop_at_layer=4, batch_rows=batch_rows)
    for scale in (1.0, 3.0):
        mlp_output_matrix(model, first_changed).mul_(scale)
        states = read(hooks)
        for i, row in enumerate(rows):
            alone = forward(model, torch.tensor([row]), capture=hooks).states
            for hook in hooks:
                error = 1e-4 if family in SINGLE_PRECISION else 1e-5
                torch.testing.assert_close(
                    states[hook][i].double(), alone[hook][0, -1].double(), rtol=error, atol=error
                )
