"""How much memory the states of a run may take."""

import torch

from lens_defense.models.devices import memory_budget


def test_the_budget_is_a_gib_or_a_quarter_of_what_is_free_on_a_gpu(monkeypatch):
    """What torch keeps unused on a GPU counts as free."""
    assert memory_budget(torch.device("cpu")) == 2**30
    for name, result in (("mem_get_info", (600, 9999)), ("memory_reserved", 500), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda _, result=result: result)
    assert memory_budget(torch.device("cuda:1")) == 200
