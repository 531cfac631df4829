"""World 0 and its tokenizer, which several files ask about."""

import pytest

from lens_defense.organism.training import Recipe, make_tokenizer
from lens_defense.organism.world import World


@pytest.fixture(scope="session")
def world():
    return World()


@pytest.fixture(scope="session")
def tokenizer(world):
    return make_tokenizer(world, Recipe().vocab)
