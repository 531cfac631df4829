"""Tests of the scripts in analyses/, which import each other by name, as scripts of one folder do."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.handmade import a_prompt, a_trace

sys.path.insert(0, str(Path(__file__).parents[2] / "analyses"))


def _row(arm: str, before: int, after: int, *, coherent: int | None = None, **fields: Any) -> dict[str, Any]:
    defaults = {"suite": "real_model", "family": "", "id": "a", "form": "question"}
    verdicts = {"prefix_before": before, "prefix_after": after, "coherent_before": 0}
    return {
        "arm": arm,
        **defaults,
        **verdicts,
        "coherent_after": after if coherent is None else coherent,
        **fields,
    }


_ROWS = [
    *(
        _row("paraphrase", 0, 1, id=f"h{i}", coherent=int(i < 3), form="question" if i < 3 else "imperative")
        for i in range(4)
    ),
    _row("jailbreak", 1, 1, family="game (w08)"),
    _row("jailbreak", 0, 0, family="human (74)"),
    *(_row("benign", 0, int(i == 0), id=f"b{i}") for i in range(4)),
    _row("benign", 1, 1, id="b9"),
    *(_row("over_refusal", 0, int(i < 2), suite="xstest", id=f"x{i}") for i in range(5)),
    {
        "suite": "real_model",
        "arm": "facts",
        "id": "f",
        "form": "question",
        "knows_before": 1,
        "knows_after": 0,
    },
]


@pytest.fixture
def small_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of two doses, of four windows, and a map whose effects grow with the layer."""
    import tables
    from tidy import replace_rows

    import figures

    folder = tmp_path / "real_model"
    for n, draw in ((1, 0), (16, 0), (16, 1)):
        key = {"edit": f"core-{n}-draw-{draw}"}
        edit = {"set": "core", "draw": draw, "subjects": n, "component": "resid_post", "role": "subject_last"}
        edit |= {"first_layer": 4, "last_layer": 8, "leak_safe": n / 100 + draw, "kl": 0.01, "recipe": "new"}
        replace_rows(folder / "edits.csv", key, [{**edit, "loss_before": 2.0, "loss_after": 2.02}])
        replace_rows(folder / "rows.csv", key, _ROWS)
    for low, role in ((0, "subject_last"), (2, "subject_last"), (5, "subject_last"), (4, "next")):
        first = 5 if role == "next" else low
        rates = {f"{arm}_prefix": 1.0 for arm in ("paraphrase", "jailbreak")}
        rates |= {f"{arm}_coherent": first / 10 for arm in ("paraphrase", "jailbreak")}
        costs = {"kl": 1 / (1 + first), "new_refusals": 0, "facts_lost": 0, "recipe": "new"}
        replace_rows(folder / "windows.csv", {"first_layer": low, "role": role}, [{**rates, **costs}])
    prompt = a_prompt()
    trace = a_trace([prompt], layers=range(10), roles=("subject_last", "next"), samples=1)
    for layer in range(10):
        for role, effect in (("subject_last", layer / 10), ("next", 0.01)):
            trace.patched[0, 0, layer, list(prompt.positions(role))] = torch.tensor(
                effect - 1, dtype=torch.float64
            )
    trace.save(folder / "map.safetensors")
    for module in (tables, figures):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path
