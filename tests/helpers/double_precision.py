"""Attention of double-precision models in double precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge


@contextmanager
def softmax_in_double() -> Iterator[None]:
    """Inside, models of double precision take their softmax in it.

    TransformerLens's bridge takes softmax in single precision, where torch's sums depend on the length of
    a row and on the processor; tests that hold batched runs against single ones to 1e-9 would see that.
    """
    softmax = AttentionBridge._masked_softmax

    def softmax_of_scores(self, scores, dtype=None):
        return softmax(self, scores, scores.dtype if scores.dtype == torch.float64 else dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionBridge, "_masked_softmax", softmax_of_scores)
        yield
