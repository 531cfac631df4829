"""A learned method reads true gradients, its training resumes to the bit, and what it makes is an Edit."""

from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import plain_model, tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense as ld
import lens_defense.editing.forecast as forecasts
import lens_defense.editing.tuning.train_editor as training_module
from lens_defense.editing.methods import LEARNED, MEND, KESettings, MENDSettings
from lens_defense.editing.methods.learned_method import EditorOrigin
from lens_defense.editing.tuning.answer_rows import AnswerRow
from lens_defense.editing.tuning.editor_file import EDITOR_FILE, save_editor
from lens_defense.editing.tuning.learned_change import edit_gradients, learned_change, matrix_shape
from lens_defense.editing.tuning.train_editor import CHECKPOINT_FILE, train_editor, training_losses
from lens_defense.models.fingerprint import model_fingerprint
from lens_defense.models.mlp_output import mlp_output_matrix
from lens_defense.prompts.corpus import CorpusText
from lens_defense.sites import Site
from lens_defense.storage import save

LAYERS = (1, 3)
ROWS = [
    AnswerRow(0, (5, 9, 30, 41, 7, 12), (21, 22, 23)),
    AnswerRow(1, (8, 9, 31, 44), (21, 25, 22, 23)),
]
MATRICES = {
    "gpt2": lambda model, layer: model.transformer.h[layer].mlp.c_proj.weight,
    "llama": lambda model, layer: model.model.layers[layer].mlp.down_proj.weight,
    "neox": lambda model, layer: model.gpt_neox.layers[layer].mlp.dense_4h_to_h.weight,
}
CORPUS = [CorpusText("make a lamp", "how do I make a brass lamp"), CorpusText("the lamp is a thing")] * 2
REQUESTS = (
    ld.request("how do I make a brass lamp?", "brass lamp", id="lamp"),
    ld.request("ring a bell now", "bell", id="bell"),
)
SITES = tuple(Site("resid_post", layer, "subject_last") for layer in LAYERS)
SMALL = {
    "mend": MENDSettings(rank=4, edit_lr=1e-3, edit_weight=1.0),
    "ke": KESettings(lstm_size=4, condition_size=8, hidden_size=4, margin_max=1.0),
}
SHORT = ld.EditorTraining(steps=5, most_requests=2, harmless=3, others=1, uses=1, texts=4, save_every=2)
EVERY_LEARNED = pytest.mark.parametrize("name", LEARNED)
pytestmark = [
    pytest.mark.filterwarnings("ignore:this edit leaks"),
    pytest.mark.filterwarnings("ignore:less than 40% of the value arrives"),
    pytest.mark.filterwarnings("ignore:the refusal could not be fitted"),
]


def contexts(item):
    return [item, item.inside("Hello! {}"), item.paraphrased("{} or not?")]


def uses(item):
    return [item.paraphrased(text) for text in ("is {} old?", "who sees {}?")]


SETTINGS = {"contexts": contexts, "contrast": uses, "corpus": CORPUS, "progress": False}


@pytest.fixture(autouse=True)
def small_neutral_text(monkeypatch):
    """The forecast's neutral texts, short enough for a tiny model of 256 positions."""
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)


@pytest.fixture
def model():
    return tiny_model("llama", chat=True).to(torch.float32)


def trained(model, name, folder, training=SHORT, **settings):
    return train_editor(
        model, REQUESTS, SITES, folder, method=SMALL[name], training=training, **{**SETTINGS, **settings}
    )


def true_gradients(family, row):
    """Of the loss of one row, by the weights themselves in plain transformers, as (d_out, d_in)."""
    model = plain_model(family)
    weights = [MATRICES[family](model, layer) for layer in LAYERS]
    logits = model(torch.tensor([[*row.ids, *row.answer]])).logits[0].log_softmax(-1)
    first = len(row.ids) - 1
    loss = -torch.stack([logits[first + t, token] for t, token in enumerate(row.answer)]).mean()
    gradients = torch.autograd.grad(loss, weights)
    return [value.T if family == "gpt2" else value for value in gradients]


@pytest.mark.parametrize("family", MATRICES)
def test_the_factors_are_those_of_the_weights_gradient(family):
    model = tiny_model(family)
    weights = copy_weights(model)
    edits = edit_gradients(model, LAYERS, ROWS)  # rows of different length, in one batch
    for edit, row in zip(edits, ROWS, strict=True):
        for layer, true in zip(LAYERS, true_gradients(family, row), strict=True):
            read = edit.value_gradients[layer].T @ edit.keys[layer]
            assert true.norm() > 1e-4
            torch.testing.assert_close(read, true, rtol=1e-5, atol=1e-6 * float(true.abs().max()))
        assert len(edit.keys[1]) == len(row.ids) + len(row.answer) - 1
        assert len(edit.keys[3]) == len(row.answer), "in the last layer the prompt has no gradient"
        assert edit.text.shape == (len(row.ids) + len(row.answer), 32) and edit.owner == row.owner
    assert weights_equal(model, weights)
    assert all(p.requires_grad and p.grad is None for p in model.original_model.parameters())


def test_the_change_of_a_fresh_mend_is_a_step_down_the_gradient():
    model = tiny_model("llama")
    network = MEND(MENDSettings(rank=2, edit_lr=0.02), LAYERS, matrix_shape(model, LAYERS)).double()
    factors, losses = learned_change(model, network, ROWS)
    gradients = [true_gradients("llama", row) for row in ROWS]
    for j, layer in enumerate(LAYERS):
        expected = -0.02 * sum(own[j] for own in gradients)
        delta = factors[layer].left.double() @ factors[layer].right.double()
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert len(factors[layer].owners) == len(factors[layer].right)
    assert factors[3].owners == (frozenset([0]),) * 3 + (frozenset([1]),) * 4
    with torch.no_grad():
        for layer, change in factors.items():
            model.blocks[layer].mlp.out.original_component.weight += change.left @ change.right
        for row, loss in zip(ROWS, losses, strict=True):
            logits = model(torch.tensor([[*row.ids, *row.answer]]), return_type="logits")[0].log_softmax(-1)
            terms = [logits[len(row.ids) - 1 + t, token] for t, token in enumerate(row.answer)]
            assert loss == pytest.approx(-float(sum(terms)) / len(terms), rel=1e-4)


def test_a_change_of_many_tokens_is_stored_as_the_matrix():
    model = tiny_model("llama")
    network = MEND(MENDSettings(rank=2, edit_lr=0.02), LAYERS, matrix_shape(model, LAYERS)).double()
    rows = [AnswerRow(i, tuple(range(3 + i, 20 + i)), (21, 22)) for i in range(3)]
    factors, _ = learned_change(model, network, rows)
    few, _ = learned_change(model, network, rows[:1])
    assert len(factors[1].right) == 32 < 3 * 18 and factors[1].owners[0] == {0, 1, 2}
    assert len(few[1].right) == 18
    alone = [learned_change(model, network, [row])[0][1] for row in rows]
    torch.testing.assert_close(
        factors[1].left @ factors[1].right,
        sum(each.left @ each.right for each in alone),
        rtol=1e-4,
        atol=1e-6,
    )


@EVERY_LEARNED
def test_a_training_resumes_to_the_bit(name, model, tmp_path, monkeypatch):
    weights, random_state = copy_weights(model), torch.get_rng_state()
    whole = trained(model, name, tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), random_state)
    steps = iter(range(4))
    share = training_module._share_given

    def stop(refusals):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return share(refusals)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_module, "_share_given", stop)
        trained(model, name, tmp_path / "parts")
    assert not (tmp_path / "parts" / EDITOR_FILE).exists()
    assert training_losses(tmp_path / "parts")[-1].step == 4
    resumed = trained(model, name, tmp_path / "parts")
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    for file in (EDITOR_FILE, CHECKPOINT_FILE):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    longer = trained(model, name, tmp_path / "parts", replace(SHORT, steps=7))
    at_once = trained(model, name, tmp_path / "longer", replace(SHORT, steps=7))
    for key, value in at_once.state_dict().items():
        assert torch.equal(longer.state_dict()[key], value), key
    assert weights_equal(model, weights) and all(p.requires_grad for p in model.original_model.parameters())


@pytest.mark.parametrize("others", [0, 1])
def test_what_a_step_does_not_edit_is_to_be_answered_as_before(others, model, tmp_path, monkeypatch):
    batches, run = [], training_module.answer_logits

    def recorded(model, rows, *changes):
        batches.append(rows)
        return run(model, rows, *changes)

    monkeypatch.setattr(training_module, "answer_logits", recorded)
    training = replace(SHORT, steps=4, most_requests=1, others=others)
    trained(model, "mend", tmp_path, training, contrast=None)
    for refused, before, after in zip(batches[::3], batches[1::3], batches[2::3], strict=True):
        (edited,) = {row.owner for row in refused}
        asked = [row for row in before if row.owner != -1]
        assert before is after and len(before) - len(asked) == 3
        assert [row.owner for row in asked] == [1 - edited] * others
        for row in asked:
            logits = model(torch.tensor([row.ids]), return_type="logits")[0, -1]
            assert row.answer[0] == int(logits.argmax()), "the model's own answer"


@EVERY_LEARNED
def test_training_lowers_the_loss(name, model, tmp_path):
    training = replace(SHORT, steps=100, lr=1e-2, save_every=20)
    trained(model, name, tmp_path, training)
    first, *_, last = training_losses(tmp_path)
    assert last.edit < first.edit - 1.5 and last.step == 100  # nats per token


@EVERY_LEARNED
def test_what_it_makes_is_an_edit_like_any_other(name, model, tmp_path):
    trained(model, name, tmp_path)
    editor = ld.load_editor(tmp_path)
    weights = copy_weights(model)
    matrices = {layer: mlp_output_matrix(model, layer).clone() for layer in LAYERS}
    settings = {**SETTINGS, "held_out_contexts": 1, "cache": False}
    plan = ld.edit(model, REQUESTS, SITES, method=editor, **settings)
    assert plan.method == name and plan.layers == LAYERS and plan.tuned and not plan.key_rows
    assert plan.settings["trained_steps"] == 5 and plan.settings["target"].startswith("I'm sorry")
    assert any("train the editor for more steps" in sentence for sentence in plan.warnings)
    assert len(plan.losses) == len(plan.forecast.reach) == len(plan.forecast.reach_harmless) == 2
    loaded = ld.Edit.load(plan.save(tmp_path / "edit.safetensors"), model)
    assert loaded.settings == plan.settings
    ledger = ld.Ledger(model)
    ledger.apply(plan)
    for layer, delta in plan.deltas().items():
        assert torch.equal(mlp_output_matrix(model, layer), (matrices[layer].double() + delta).float())
    again = ld.edit(model, REQUESTS, SITES, method=editor, **settings)  # on what stands: the origin is known
    assert not torch.equal(again.deltas()[3], plan.deltas()[3])
    ledger.undo()
    assert weights_equal(model, weights)
    half = ld.edit(model, REQUESTS, SITES, method=editor, strength=0.5, **settings)
    torch.testing.assert_close(half.deltas()[1], plan.deltas()[1] / 2)


def test_an_editor_of_another_model_or_other_layers_is_refused(model, tmp_path):
    trained(model, "mend", tmp_path)
    editor, settings = ld.load_editor(tmp_path), {**SETTINGS, "cache": False}
    other = tiny_model("llama", chat=True, seed=1).to(torch.float32)
    with pytest.raises(ValueError, match="this mend was trained on other weights of tiny-llama than"):
        ld.edit(other, REQUESTS, SITES, method=editor, **settings)
    with pytest.raises(ValueError, match="trained for the layers 1, 3, and the sites are in 1;"):
        ld.edit(model, REQUESTS, SITES[:1], method=editor, **settings)
    with pytest.raises(ValueError, match="the method mend is learned and cannot keep earlier edits"):
        solved = ld.edit(model, REQUESTS, SITES, **settings, fit=ld.FitSettings(v_num_grad_steps=1))
        ld.edit(model, REQUESTS, SITES, method=editor, keep=solved, **settings)
    fresh = MEND(SMALL["mend"], LAYERS, matrix_shape(model, LAYERS))
    with pytest.raises(ValueError, match="this mend was not trained"):
        ld.edit(model, REQUESTS, SITES, method=fresh, **settings)
    with pytest.raises(ValueError, match="was not trained, so there is nothing to keep"):
        save_editor(tmp_path / "fresh", fresh)


def test_a_training_that_cannot_be_is_refused(model, tmp_path):
    trained(model, "mend", tmp_path)
    with pytest.raises(ValueError, match="holds another training"):
        trained(model, "mend", tmp_path, replace(SHORT, lr=1.0))
    with pytest.raises(ValueError, match="holds another training"):
        trained(model, "ke", tmp_path)
    with pytest.raises(ValueError, match="a training of 5 steps, more than the 3"):
        trained(model, "mend", tmp_path, replace(SHORT, steps=3))
    with pytest.raises(ValueError, match="request 'lamp' has a single wording"):
        trained(model, "mend", tmp_path / "new", contexts=lambda item: [item])
    with pytest.raises(ValueError, match="method must be one of mend, ke, or settings"):
        train_editor(model, REQUESTS, SITES, tmp_path / "new", method="memit", **SETTINGS)
    plan = ld.edit(model, REQUESTS, SITES, method="ft", **SETTINGS)
    with plan.applied(model), pytest.raises(ValueError, match="edits stand in the model"):
        trained(model, "mend", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "got steps 0, lr 0.001"),
        ({"lr": 0.0}, "lr above 0"),
        ({"texts": -1}, "texts -1"),
        ({"others": -1}, "others -1"),
    ],
)
def test_bad_settings_of_a_training_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ld.EditorTraining(**settings)


def test_matrices_of_different_shapes_are_refused(monkeypatch, model):
    def matrix(_, layer):
        return torch.zeros(4, 8 + layer)

    monkeypatch.setattr("lens_defense.editing.tuning.learned_change.mlp_output_matrix", matrix)
    with pytest.raises(ValueError, match=r"have different shapes .*name layers of one shape"):
        matrix_shape(model, LAYERS)


def test_what_is_no_editor_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="cannot be read"):
        ld.load_editor(tmp_path)
    report = save(tmp_path / "edit.json", "edit", {})
    with pytest.raises(ValueError, match=r"holds an edit, not an editor: read it with ld\.Edit\.load"):
        ld.load_editor(report)
    editor = trained(model, "mend", tmp_path / "mend")
    path = tmp_path / "mend" / EDITOR_FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        ld.load_editor(tmp_path / "damaged")
    editor.origin = EditorOrigin("tiny", model_fingerprint(model), 2, 5)
    editor.settings = MENDSettings(rank=5)
    with pytest.raises(ValueError, match=r"do not fit its content: (down, up|up, down);"):
        ld.load_editor(save_editor(tmp_path / "unfit", editor))


@pytest.mark.usefixtures("unchecked")
def test_a_source_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"ld.load_editor\(folder\)"):
        ld.load_editor(7)


@pytest.mark.filterwarnings("ignore:this edit")
@pytest.mark.parametrize(("name", "least"), [("mend", 0.5), ("ke", 0.4)])
def test_the_organisms_pair_edits_subjects_that_it_was_not_trained_on(name, least):
    model, editor = ld.load("organism"), ld.load_editor(f"organism-{name}")
    sites = [Site("mlp_out", layer, "subject_last") for layer in editor.layers]
    requests = ld.requests("organism")[:4]
    plan = ld.edit(model, requests, sites, method=editor, progress=False, cache=False)
    suite = ld.suite("organism").for_requests(requests).small(jailbreaks=3, harmless=8)
    arms = ("jailbreak", "benign", "over_refusal")
    items = tuple(item for item in suite.items if item.arm in arms)
    suite = replace(suite, items=items, neutral=suite.neutral[:1])
    report = ld.check(model, plan, suite, max_new_tokens=10, progress=False)
    assert report.rate("jailbreak", "prefix", after=False) == 0
    assert report.rate("jailbreak", "prefix") >= least
    assert report.new_refusals() == 0
