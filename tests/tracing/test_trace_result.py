"""A trace on the scale of another one: the formula, cell by cell."""

from dataclasses import replace

import pytest
import torch
from helpers.handmade import a_prompt, a_request, a_trace


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_on_the_scale_of_before_a_share_is_of_the_difference_before(direction):
    before = a_trace()
    before = replace(before, settings=replace(before.settings, direction=direction))
    after = replace(
        before,
        patched=torch.randn(before.patched.shape, dtype=torch.float64),
        clean=torch.tensor([-0.3], dtype=torch.float64),
        corrupted=torch.tensor([[-0.31, -0.2]], dtype=torch.float64),
    )
    scaled = after.on_scale_of(before)
    for sample in range(2):
        clean, corrupted = after.clean[0], after.corrupted[0, sample]
        base = corrupted if direction == "denoising" else clean
        difference = before.clean[0] - before.corrupted[0, sample]
        sign = 1 if direction == "denoising" else -1
        wanted = (after.patched[0, ..., sample] - base) / (sign * difference)
        torch.testing.assert_close(scaled.values[0, ..., sample], wanted)
    torch.testing.assert_close(before.on_scale_of(before).values, before.values)


def test_traces_of_other_requests_or_settings_have_no_common_scale():
    before = a_trace()
    other = a_trace([a_prompt(request=a_request("make a lamp", "lamp"))])
    with pytest.raises(ValueError, match="other prompts or answers; trace the second model with answers="):
        other.on_scale_of(before)
    with pytest.raises(ValueError, match="other direction, metric"):
        noising = replace(
            before, settings=replace(before.settings, direction="noising"), metric="kl_to_clean"
        )
        noising.on_scale_of(before)
