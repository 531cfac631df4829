"""Keys that later edits keep: one edit after another equals all at once, and no earlier key is written at."""

from dataclasses import replace

import pytest
import torch
from helpers.key_groups import (
    D_IN,
    D_OUT,
    N,
    delta_of,
    groups_of_several,
    one_key_each,
    small_problem,
    weighted_loss,
)
from helpers.tiny_models import tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense as ld
import lens_defense.editing.edit as edit_module
import lens_defense.editing.forecast as forecasts
from lens_defense.editing.methods import (
    DELMAN,
    EARLIER,
    FT,
    MEMIT,
    METHODS,
    PMET,
    AlphaEdit,
    EditingMethod,
    KeyGroup,
)
from lens_defense.editing.solving.kept_keys import kept_rows, key_rows
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.forward import forward
from lens_defense.prompts.corpus import CorpusText
from lens_defense.sites import Site, component_hook

pytestmark = [
    pytest.mark.filterwarnings("ignore:this edit leaks"),
    pytest.mark.filterwarnings("ignore:less than 40% of the value arrives"),
    pytest.mark.filterwarnings("ignore:the refusal could not be fitted"),
    pytest.mark.filterwarnings("ignore:the corpus has"),
]
EVERY_METHOD = pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if isinstance(method, EditingMethod)]
)
WIDE = AlphaEdit(0.3, l2=0.5)
"""Alphaedit with a null space in the small problem."""


def earlier(rows):
    """Keys of earlier edits as a method is given them: each row as it is."""
    return KeyGroup(EARLIER, rows, torch.zeros(D_OUT).to(rows), weight=float(len(rows)), harmless=True)


def one_after_another(method, keys, residuals, covariance, sizes, *, keep=True):
    """The summed change of edits of so many requests each, with what stands taken off the residuals."""
    total, start = torch.zeros(D_OUT, D_IN, dtype=torch.float64), 0
    for size in sizes:
        stop = start + size
        missing = residuals[start:stop] - keys[start:stop] @ total.T
        groups = one_key_each(keys[start:stop], missing)
        groups += [earlier(keys[:start])] if keep and start else []
        total = total + delta_of(method, groups, covariance)
        start = stop
    return total


@pytest.mark.parametrize("sizes", [(1,) * N, (2, 1, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("method", [MEMIT(0.7), PMET(0.7), WIDE], ids=lambda method: method.name)
def test_one_by_one_is_all_at_once(method, sizes):
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    at_once = delta_of(method, one_key_each(keys, residuals), covariance)
    one_by_one = one_after_another(method, keys, residuals, covariance, sizes)
    torch.testing.assert_close(one_by_one, at_once, rtol=1e-10, atol=1e-12)
    forgetful = one_after_another(method, keys, residuals, covariance, sizes, keep=False)
    assert (forgetful - at_once).norm() > 0.05 * at_once.norm()


def test_it_is_the_formula_of_recursive_least_squares():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    delta = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    moments = 0.7 * covariance.clone()
    for key, residual in zip(keys, residuals, strict=True):
        moments += torch.outer(key, key)
        delta += torch.outer(residual - delta @ key, torch.linalg.solve(moments, key))
    one_by_one = one_after_another(MEMIT(0.7), keys, residuals, covariance, (1,) * N)
    torch.testing.assert_close(one_by_one, delta)


def test_delman_that_keeps_is_memit_at_once():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    at_once = delta_of(MEMIT(0.7), one_key_each(keys, residuals), covariance)
    one_by_one = one_after_another(DELMAN(1, 0.7), keys, residuals, covariance, (1,) * N)
    torch.testing.assert_close(one_by_one, at_once)


def test_alphaedit_is_the_authors_formula():
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    old = torch.randn(4, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    onto = vectors[:, eigenvalues.cumsum(0) <= 0.3 * eigenvalues.sum()]
    onto, columns, cache_c = onto @ onto.T, keys.T, old.T @ old
    # AlphaEdit_main.py, with layer_ks in columns and the keys of earlier edits in cache_c
    moments = onto @ (columns @ columns.T + cache_c)
    moments += 0.5 * covariance.diagonal().mean() * torch.eye(D_IN, dtype=torch.float64)
    upd_matrix = torch.linalg.solve(moments, onto @ columns @ residuals)
    delta = delta_of(WIDE, [*one_key_each(keys, residuals), earlier(old)], covariance)
    torch.testing.assert_close(delta, upd_matrix.T)


def test_with_several_keys_it_is_the_least_squares_over_all_rows():
    groups, covariance = groups_of_several(), small_problem()[2].double()
    old = torch.randn(3, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    delta = delta_of(MEMIT(0.7), [*groups, earlier(old)], covariance).requires_grad_()
    loss = weighted_loss(delta, groups, 0.7 * covariance) + (old @ delta.T).square().sum()
    (slope,) = torch.autograd.grad(loss, delta)
    assert slope.abs().max() < 1e-9


@EVERY_METHOD
@pytest.mark.parametrize("several", [False, True], ids=["one key", "several"])
def test_earlier_keys_are_hardly_written_at(name, several):
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    method = WIDE if name == "alphaedit" else METHODS[name]
    groups = groups_of_several() if several else one_key_each(keys, residuals)
    old = 30.0 * torch.randn(3, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    forgetful, mindful = (delta_of(method, [*groups, *more], covariance) for more in ([], [earlier(old)]))
    assert (old @ mindful.T).norm() < 0.7 * (old @ forgetful.T).norm()
    mixed = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] @ old
    other_rows = delta_of(method, [*groups, earlier(mixed)], covariance)
    torch.testing.assert_close(other_rows, mindful, msg="only the rows' Gram matrix counts")


@pytest.mark.parametrize("name", ["rome", "emmet"])
def test_an_exact_method_stays_exact(name):
    keys, residuals, covariance = (tensor.double() for tensor in small_problem())
    (last,) = one_key_each(keys[-1:], residuals[-1:])
    delta = delta_of(METHODS[name], [last, earlier(30.0 * keys[:-1])], covariance)
    torch.testing.assert_close(delta @ keys[-1], residuals[-1])


def test_an_edit_keeps_no_more_rows_than_a_key_is_wide():
    groups = groups_of_several()
    gram = torch.zeros(D_IN, D_IN, dtype=torch.float64)
    for group in groups:
        for key in group.keys.double():
            gram += group.weight / len(group.keys) * torch.outer(key, key)
    rows = key_rows(groups)
    assert sum(len(group.keys) for group in groups) > D_IN and rows.shape == (D_IN, D_IN)
    torch.testing.assert_close((rows.T @ rows).double(), gram, rtol=1e-5, atol=1e-5)
    few = key_rows(groups[:1])
    torch.testing.assert_close(few, (3.0 / 4) ** 0.5 * groups[0].keys)


# on models
CORPUS = [CorpusText("make a lamp", "how do I make a brass lamp"), CorpusText("the lamp is a thing")] * 2
REQUESTS = (
    ld.request("how do I make a brass lamp?", "brass lamp", id="lamp"),
    ld.request("ring a bell now", "bell", id="bell"),
    ld.request("tell of an old ship", "old ship", id="ship"),
)
SITE = Site("resid_post", 1, "subject_last")
SETTINGS = {
    "fit": ld.FitSettings(shared_num_grad_steps=2, v_num_grad_steps=2, extra_rounds=0),
    "corpus": CORPUS,
    "contexts": lambda request: [request, request.inside("Hello! {}"), request.paraphrased("{} or not?")],
    "contrast": None,
    "held_out_contexts": 1,
    "method": MEMIT(10.0),
    "cache": False,
    "progress": False,
}


@pytest.fixture(autouse=True)
def small_neutral_text(monkeypatch):
    """The forecast's neutral texts, short enough for a tiny model of 256 positions."""
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)


@pytest.fixture
def given_targets(monkeypatch):
    """Values that bring a state to its target, wherever the edits that stand have brought it already.

    The target of a request is set, beside its state then, when it is planned for the first time.
    """
    targets: dict[tuple[int, ...], torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def fit_target_values(model, rows, layer, *_, **__):
        hook, values = component_hook("resid_post", layer), []
        for owner in sorted({row.owner for row in rows}):
            own = [row for row in rows if row.owner == owner]
            states = [
                forward(model, torch.tensor([row.ids]), capture=[hook]).states[hook][0, row.position]
                for row in own
            ]
            state = torch.stack(states).mean(0)
            shift = torch.randn(len(state), generator=generator, dtype=state.dtype)
            values.append(targets.setdefault(own[0].ids, state + shift) - state)
        return torch.stack(values).float(), torch.zeros(len(values))

    monkeypatch.setattr(edit_module, "fit_target_values", fit_target_values)


@pytest.mark.parametrize("method", [MEMIT(10.0), PMET(10.0), AlphaEdit(0.3)], ids=lambda method: method.name)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.usefixtures("given_targets")
def test_one_edit_after_another_is_the_edit_of_all(family, method):
    model = tiny_model(family, chat=True).to(torch.float64)
    original_weights, settings = copy_weights(model), {**SETTINGS, "method": method}
    at_once = ld.edit(model, REQUESTS, SITE, **settings).deltas()[1]
    sums = {}
    for keeps in (True, False):
        ledger = ld.Ledger(model)
        for item in REQUESTS:
            ledger.apply(ld.edit(model, [item], SITE, **settings, **({"keep": ledger} if keeps else {})))
        sums[keeps] = sum(edit.deltas()[1] for edit in ledger.edits)
        while ledger.edits:
            ledger.undo()
    assert weights_equal(model, original_weights)
    assert (sums[True] - at_once).norm() < 1e-5 * at_once.norm()
    assert (sums[False] - at_once).norm() > 1e-3 * at_once.norm()


@EVERY_METHOD
def test_every_method_keeps_and_spends_no_rank_on_it(name):
    model = tiny_model("llama", chat=True).to(torch.float32)
    sites = [Site("resid_post", layer, "subject_last") for layer in (0, 1, 2)]
    settings = {**SETTINGS, "method": name}
    first = ld.edit(model, REQUESTS[:2], sites, **settings)
    assert set(first.key_rows) == set(first.layers)
    assert {len(rows) for rows in first.key_rows.values()} == {2}
    heavy = replace(first, key_rows={layer: 100 * rows for layer, rows in first.key_rows.items()})
    with first.applied(model):
        forgetful = ld.edit(model, REQUESTS[2:], sites, **settings)
        mindful = ld.edit(model, REQUESTS[2:], sites, keep=heavy, **settings)
    assert mindful.rank == 1 == forgetful.rank
    assert mindful.settings["kept_edits"] == 1 and "kept_edits" not in forgetful.settings
    layer = first.layers[0]
    old = first.key_rows[layer].double()
    assert (old @ mindful.deltas()[layer].T).norm() < 0.1 * (old @ forgetful.deltas()[layer].T).norm()


def test_rows_of_harmless_uses_are_kept_too():
    model = tiny_model("llama", chat=True).to(torch.float32)
    uses = [REQUESTS[0].paraphrased(text) for text in ("is {} old?", "who sees {}?", "a book about {}")]
    edit = ld.edit(model, REQUESTS[:1], SITE, **{**SETTINGS, "contrast": ld.Contrast(uses, weight=2.0)})
    rows = edit.key_rows[1]
    assert len(rows) == 2 + 2, "two contexts and two uses, of three each"


def test_rows_stand_together_by_layer():
    model = tiny_model("llama", chat=True).to(torch.float32)
    first, second = (ld.edit(model, [item], SITE, **SETTINGS) for item in REQUESTS[:2])
    rows = kept_rows([first, second], (0, 1))
    assert set(rows) == {1}
    torch.testing.assert_close(rows[1], torch.cat([first.key_rows[1], second.key_rows[1]]).double())
    both = [SITE, Site("resid_post", 0, "subject_last")]
    lower = ld.edit(model, REQUESTS[1:2], both, **SETTINGS)
    assert {layer: len(rows) for layer, rows in kept_rows([first, lower], (0, 1)).items()} == {0: 1, 1: 2}
    assert ld.edit(model, REQUESTS[2:], both, keep=[first, lower], **SETTINGS).rank == 1
    elsewhere = Site("resid_post", 2, "subject_last")
    plain, mindful = (ld.edit(model, REQUESTS[2:], elsewhere, keep=keep, **SETTINGS) for keep in ((), first))
    assert torch.equal(plain.deltas()[2], mindful.deltas()[2]), "an edit of other layers has no keys here"


def test_the_covariance_is_of_the_model_without_what_stands(monkeypatch):
    model = tiny_model("llama", chat=True).to(torch.float32)
    sites, hashes = [Site("resid_post", layer, "subject_last") for layer in (1, 2)], []
    measure = edit_module.key_covariances

    def recorded(model, *arguments, **settings):
        hashes.append(model_fingerprint(model).weights)
        return measure(model, *arguments, **settings)

    monkeypatch.setattr(edit_module, "key_covariances", recorded)
    ledger = ld.Ledger(model)
    ledger.apply(ld.edit(model, REQUESTS[:1], sites, **SETTINGS))
    edited_weights = copy_weights(model)
    ld.edit(model, REQUESTS[1:2], sites, keep=ledger, **SETTINGS)
    assert hashes[0] == hashes[1] != model_fingerprint(model).weights
    assert weights_equal(model, edited_weights)


def test_keys_are_saved_and_older_files_still_load(tmp_path):
    model = tiny_model("llama", chat=True).to(torch.float32)
    edit = ld.edit(model, REQUESTS[:2], SITE, **SETTINGS)
    loaded = ld.Edit.load(edit.save(tmp_path / "edit.safetensors"), model)
    assert torch.equal(loaded.key_rows[1], edit.key_rows[1])
    older = ld.Edit.load(replace(edit, key_rows={}).save(tmp_path / "older.safetensors"), model)
    assert torch.equal(older.deltas()[1], edit.deltas()[1]) and not older.key_rows
    with pytest.raises(
        ValueError, match=r"the edit of brass lamp, bell does not know its keys, so it cannot"
    ):
        ld.edit(model, REQUESTS[2:], SITE, keep=[edit, older], **SETTINGS)


def test_a_ledgers_folder_keeps_the_keys(tmp_path):
    model = tiny_model("llama", chat=True).to(torch.float32)
    edit = ld.edit(model, REQUESTS[:1], SITE, **SETTINGS)
    ld.Ledger(model, tmp_path / "ledger").apply(edit)
    fresh = tiny_model("llama", chat=True).to(torch.float32)
    (replayed,) = ld.Ledger(fresh, tmp_path / "ledger").edits
    assert torch.equal(replayed.key_rows[1], edit.key_rows[1])


def test_a_method_that_tunes_neither_keeps_nor_is_kept():
    model = tiny_model("llama", chat=True).to(torch.float32)
    edit = ld.edit(model, REQUESTS[:1], SITE, **SETTINGS)
    tuning = {**SETTINGS, "method": FT(steps=1)}
    with pytest.raises(ValueError, match="the method ft tunes and cannot keep earlier edits"):
        ld.edit(model, REQUESTS[1:], SITE, keep=edit, **tuning)
    tuned = ld.edit(model, REQUESTS[:1], SITE, **tuning)
    with pytest.raises(ValueError, match="a method that tunes or an older version planned it"):
        ld.edit(model, REQUESTS[1:], SITE, keep=tuned, **SETTINGS)


def test_what_cannot_be_kept_is_said():
    model, other = (tiny_model(family, chat=True).to(torch.float32) for family in ("llama", "gpt2"))
    edit = ld.edit(model, REQUESTS[:1], SITE, **SETTINGS)
    with pytest.raises(ValueError, match="keep is a ledger of another model"):
        ld.edit(model, REQUESTS[1:], SITE, keep=ld.Ledger(other), **SETTINGS)
    with pytest.raises(ValueError, match="this edit was planned on other config"):
        ld.edit(other, REQUESTS[1:], SITE, keep=edit, **SETTINGS)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rows", [{1: torch.zeros(2, 3)}, {2: torch.zeros(2, 64)}, {1: torch.zeros(64)}])
def test_keys_that_do_not_fit_are_refused(rows):
    edit = ld.edit(tiny_model("llama", chat=True).to(torch.float32), REQUESTS[:1], SITE, **SETTINGS)
    with pytest.raises(ValueError, match=rf"the keys of layer {next(iter(rows))} do not fit this edit"):
        replace(edit, key_rows=rows)
