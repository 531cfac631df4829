"""No damaged file of any kind is believed: the short form of analyses/damage.py."""

import damage
import pytest

NUMBERS = {"edit": 200, "trace": 200, "score map": 200, "report": 200, "cache": 200, "model folder": 100}
"""Damaged files of each kind that the package writes and checks."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENS_DEFENSE_CACHE", str(folder / "cache"))
        yield damage.kinds(folder)


@pytest.mark.filterwarnings("ignore:less than 40%", "ignore:the refusal could not be fitted")
@pytest.mark.parametrize("name", [*NUMBERS, "GGUF, sealed"])
def test_every_damaged_file_is_refused_in_a_sentence(kinds, name):
    number = NUMBERS.get(name, 50)
    assert damage.count_outcomes(kinds[name], number, seed=1) == {"refused": number}


def test_a_damaged_gguf_of_others_is_loaded_or_refused_in_a_sentence(kinds):
    counts = damage.count_outcomes(kinds["GGUF, not ours"], 40, seed=1)
    assert counts.keys() <= {"refused", "different", "equal"}
