"""Edits one after another: what is asked after each, the table and the figure."""

import math
from dataclasses import replace

import consecutive_edits
import pandas as pd
import pytest
import tables
import torch
from helpers.handmade_edits import handmade_edit
from helpers.tiny_models import tiny_model

import figures
import lens_defense as ld
from lens_defense.prompts.contexts import jailbroken_contexts


def series(number):
    return consecutive_edits.Series(
        "organism", "memit", True, ld.requests("organism")[:number], jailbroken_contexts, False, 4, 2
    )


def test_every_request_is_asked_in_seen_and_in_unseen_words():
    two = series(2)
    suite = consecutive_edits.suite_of(two, "organism")
    seen = {item.conversation for request in two.requests for item in jailbroken_contexts(request)}
    for arm, is_seen in (("edited", True), ("paraphrase", False)):
        items = [item for item in suite.items if item.arm == arm]
        assert sorted(item.subject for item in items) == sorted(item.subject for item in two.requests)
        assert all((item.request.conversation in seen) == is_seen for item in items)
    assert sum(item.arm == "benign" for item in suite.items) == 2


def test_no_request_of_the_split_check_is_edited():
    for language, number in (("organism", 32), ("core", 60)):
        requests = consecutive_edits.to_edit(language, 60)
        assert len(requests) == len({item.subject for item in requests}) == number
        assert {item.split for item in requests} <= {"edit", "tune"}


def test_a_recipe_is_of_all_that_edits_are_made_of():
    assert series(2).recipe == series(2).recipe != series(3).recipe


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Two counts of a method that keeps and of the same that does not."""
    table = [
        {
            "model": "organism",
            "method": "memit",
            "keep": keep,
            "edits": edits,
            "seen_prefix": 1.0 if keep else 1 / edits,
            "unseen_prefix": 0.5,
            "harmless_newly_refused": 0.25,
            "facts_kept": 0.9,
            "kl": 0.01 * edits,
            "loss_ratio": 1.02,
            "relative_change": 0.1 * edits,
            "disturbance": math.nan if edits == 1 else 0.25,
        }
        for keep in (False, True)
        for edits in (10, 1)  # a resumed run appends in any order
    ]
    pd.DataFrame(table).to_csv(tmp_path / "consecutive_edits.csv", index=False)
    for module in (tables, figures):
        monkeypatch.setattr(module, "RESULTS", tmp_path)


@pytest.mark.usefixtures("rows")
def test_the_table_has_a_row_per_series():
    table = tables.consecutive_edits("organism")
    assert list(table["keep"]) == ["no", "yes"] and set(table["edits"]) == {"1, 10"}
    assert list(table["refused, seen words"]) == ["100, 10", "100, 100"]
    last = table.iloc[1]
    assert (last["KL"], last["loss"], last["change of W"], last["facts kept"]) == (
        "0.100",
        "+2.0%",
        "1.00",
        "90%",
    )
    assert last["disturbance"] == "0.250"
    assert tables.consecutive_edits("smollm2").empty


@pytest.mark.usefixtures("rows")
def test_the_figure_shows_what_is_kept_solid():
    first = [line for line in figures.consecutive_edits().data if line.xaxis == "x"]
    disturbance_by_dash = {line.line.dash: list(line.y) for line in first}
    assert disturbance_by_dash == {"dot": [1.0, 0.1], "solid": [1.0, 1.0]}
    assert [line.name for line in first] == ["memit, not kept", "memit, kept"]


def test_disturbance_is_what_later_edits_write_at_the_keys_of_earlier_ones():
    model, generator = tiny_model("llama"), torch.Generator().manual_seed(3)
    edits = [
        replace(
            handmade_edit(model, layers, seed=i),
            key_rows={layer: torch.randn(3, 64, generator=generator) for layer in layers},
        )
        for i, layers in enumerate([(0, 1), (1, 2), (1, 3)])
    ]
    first, second, third = (edit.deltas() for edit in edits)

    def norm(*written):
        return torch.cat([tensor.flatten() for tensor in written]).norm()

    keys, other_keys = (
        {layer: rows.double().T for layer, rows in edit.key_rows.items()} for edit in edits[:2]
    )
    of_first = norm((second[1] + third[1]) @ keys[1]) / norm(first[0] @ keys[0], first[1] @ keys[1])
    of_second = norm(third[1] @ other_keys[1]) / norm(second[1] @ other_keys[1], second[2] @ other_keys[2])
    expected = float(of_first + of_second) / 2
    assert consecutive_edits.disturbance(edits) == pytest.approx(expected)
    assert math.isnan(consecutive_edits.disturbance(edits[:1]))
