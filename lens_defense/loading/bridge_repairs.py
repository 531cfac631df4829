"""Repairs: families that TransformerLens 4 wraps wrongly, wrapped rightly.

Each is an adapter of ours in the place of TransformerLens's. What cannot be repaired is refused when it is
loaded (bridge_agreement).
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import Linear
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter


class _FalconAdapter(FalconArchitectureAdapter):
    """Falcon of 40 and 180 billion: groups of queries, each with its key and value, lie one after another."""

    def __init__(self, cfg: Any) -> None:
        if getattr(cfg, "new_decoder_architecture", False):
            cfg.multi_query = False  # the checkpoints set it, and transformers does not look at it then
        super().__init__(cfg)

    def _split_falcon_qkv(self, original_attention_component: Any) -> tuple[Linear, Linear, Linear]:
        if self._is_new_arch:
            qkv = original_attention_component.query_key_value
            ordered = SimpleNamespace(
                weight=self._ungrouped(qkv.weight),
                bias=None if qkv.bias is None else self._ungrouped(qkv.bias),
            )
            original_attention_component = SimpleNamespace(query_key_value=ordered)
        return super()._split_falcon_qkv(original_attention_component)

    def _ungrouped(self, rows: torch.Tensor) -> torch.Tensor:
        """All queries, then all keys, then all values."""
        heads = self.cfg.n_heads
        groups = self.cfg.n_key_value_heads or heads
        grouped = rows.detach().view(groups, heads // groups + 2, self.cfg.d_head, *rows.shape[1:])
        parts = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
        return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def register_repairs() -> None:
    """Let TransformerLens wrap these families by the adapters of this file, in this process."""
    ArchitectureAdapterFactory.register_adapter("FalconForCausalLM", _FalconAdapter)
