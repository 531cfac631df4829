"""The table of families is what the code does: some rows here, all of them among the slow tests."""

import re

import families
import pytest
from tidy import read_table

TABLE = read_table(families.RESULTS / "families.csv").fillna("").astype(str).set_index("family")
QUICK = ("gpt2", "falcon, 40b", "jetmoe", "gemma3")
REFUSED = list(TABLE.index[TABLE["load"] != "yes"])


def row_of(name):
    measured = families.measure_family(name)
    return {column: _without_digits(measured.get(column, "")) for column in TABLE.columns}


def committed_row(name):
    return {column: _without_digits(text) for column, text in TABLE.loc[name].items()}


def _without_digits(text):
    """A difference has other digits on another processor."""
    return re.sub(r"relative difference [\d.e+-]+", "relative difference", text)


def test_every_family_has_a_row_and_no_row_is_wrong():
    assert list(TABLE.index) == list(families.families())
    assert not TABLE.apply(lambda column: column.str.startswith("WRONG")).any(axis=None)
    loaded = TABLE[TABLE["load"] == "yes"]
    assert len(loaded) > 60 and (loaded != "").all(axis=None)
    for sentence in {text for text in TABLE.to_numpy().flat if text not in ("", "yes")}:
        assert ";" in sentence or sentence.startswith("not measured"), f"it says what to do: {sentence}"


@pytest.mark.parametrize("name", [*QUICK, *REFUSED])
def test_a_row_is_as_committed(name):
    assert row_of(name) == committed_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*TABLE.index} - {*QUICK, *REFUSED}))
def test_every_row_is_as_committed(name):
    assert row_of(name) == committed_row(name)


def test_of_a_model_of_ones_own_a_row_is_printed(tmp_path, capsys):
    families.save_tiny_model(tmp_path, "jetmoe", {})
    families.main(str(tmp_path))
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["load"] == lines["resid_post"] == lines["batched"] == "yes"
    assert "leave it out of components" in lines["heads"]
