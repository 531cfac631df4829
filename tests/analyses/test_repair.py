"""Taking the refusal direction out leaves nothing of it, and an edit brings the refusals back."""

from repair import refused, without_direction

import lens_defense as ld
from lens_defense.prompts.contexts import jailbroken_contexts
from lens_defense.steering.refusal_direction import last_token_states


def asked_and_jailbroken(request):
    return [request, *jailbroken_contexts(request)[:6]]


def test_the_direction_goes_and_refusals_with_it_and_an_edit_brings_them_back():
    model = ld.load("organism")
    harmful = ld.requests("organism", split="tune")
    benign = ld.requests("organism", split="tune", kind="benign")[: len(harmful)]
    direction = ld.refusal_direction(model, harmful, benign, 4)
    bare, unit = without_direction(direction), direction / direction.norm()
    assert (last_token_states(model, harmful, 6) @ unit).abs().max() > 1
    assert (last_token_states(bare, harmful, 6) @ unit).abs().max() < 1e-4
    assert refused(model, harmful) > 0.9 and refused(bare, harmful) < 0.1
    assert refused(bare, benign) < 0.1
    edited = ld.requests("organism")[:4]
    sites = [ld.Site("mlp_out", layer, "subject_last") for layer in range(5)]
    edit = ld.edit(bare, edited, sites, contexts=asked_and_jailbroken, progress=False)
    with edit.applied(bare):
        assert refused(bare, edited) >= 0.75
    assert refused(bare, edited) < 0.1
