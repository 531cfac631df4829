"""How much memory the states of a run may take."""

import os

import torch

from lens_defense.models.devices import free_memory, memory_budget


def test_the_budget_is_a_gib_or_a_quarter_of_what_is_free_on_a_gpu(monkeypatch):
    """What torch keeps unused on a GPU counts as free."""
    assert memory_budget(torch.device("cpu")) == 2**30
    for name, result in (("mem_get_info", (600, 9999)), ("memory_reserved", 500), ("memory_allocated", 300)):
        monkeypatch.setattr(torch.cuda, name, lambda _, result=result: result)
    assert memory_budget(torch.device("cuda:1")) == 200


def test_free_memory_is_less_than_the_machine_has():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_free_memory_without_a_system_that_says_it_is_unknown(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", missing)
    assert free_memory(torch.device("cpu")) is None
