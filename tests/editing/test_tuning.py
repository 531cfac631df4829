"""Methods that tune: each loss and its descent against a plain writing in float64; no weight is touched."""

from dataclasses import dataclass
from typing import ClassVar

import peft
import pytest
import torch
from helpers.tiny_models import plain_model, tiny_model
from helpers.weights import copy_weights, weights_equal

import lens_defense.editing.forecast as forecasts
from lens_defense.editing.edit import edit
from lens_defense.editing.ledger.ledger import Ledger
from lens_defense.editing.methods import DINM, FT, FTL, LED, LoRA, TuningMethod, find_method
from lens_defense.editing.methods.answer_losses import AnswerLogits, kl_from, teacher_forced_losses
from lens_defense.editing.methods.tuning_method import LayerChange
from lens_defense.editing.tuning.answer_rows import AnswerRow, harmless_rows
from lens_defense.editing.tuning.tuning import tune
from lens_defense.models.mlp_output import mlp_output_matrix, standing_changes
from lens_defense.prompts.corpus import CorpusText
from lens_defense.prompts.prompt import tokenize
from lens_defense.prompts.request import request
from lens_defense.sites import Site

LAYERS = (1, 2)
REFUSALS = [
    AnswerRow(0, (5, 9, 30, 41, 7, 12), (21, 22, 23)),
    AnswerRow(1, (8, 9, 31, 44, 6, 12), (21, 22, 23)),
]
HARMLESS = [
    AnswerRow(0, (5, 9, 33, 47, 7), (61, 62, 63, 64)),
    AnswerRow(-1, (90, 91, 4, 6, 7), (70, 71, 72, 73)),
]
CORPUS = [CorpusText("make a lamp", "how do I make a brass lamp"), CorpusText("the lamp is a thing")] * 2
REQUESTS = (
    request("how do I make a brass lamp?", "brass lamp", id="lamp"),
    request("ring a bell now", "bell", id="bell"),
)
SITES = tuple(Site("resid_post", layer, "subject_last") for layer in (2, 1))
FAST = {"corpus": CORPUS, "cache": False, "progress": False, "contrast": None, "held_out_contexts": 1}
pytestmark = [
    pytest.mark.filterwarnings("ignore:this edit leaks"),
    pytest.mark.filterwarnings("ignore:less than 40% of the value arrives"),
    pytest.mark.filterwarnings("ignore:the refusal could not be fitted"),
]


def few_contexts(item):
    return [item, item.inside("Hello! {}"), item.paraphrased("{} or not?")]


def harmless_uses(item):
    return [item.paraphrased(text) for text in ("is {} old?", "who sees {}?", "a book about {}")]


@pytest.fixture(autouse=True)
def small_neutral_text(monkeypatch):
    """The forecast's neutral texts, short enough for a tiny model of 256 positions."""
    monkeypatch.setattr(forecasts, "read_corpus", lambda _: CORPUS)


class Plain:
    """The same model in plain transformers, whose own output matrices are tuned.

    GPT-2's: others take norms in single precision, and Adam makes whole steps of gradients that are noise.
    """

    def __init__(self, layers=LAYERS):
        self.model = plain_model("gpt2").requires_grad_(False)
        self.layers = {layer: self.model.transformer.h[layer].mlp.c_proj for layer in layers}
        self.originals = {layer: module.weight.clone() for layer, module in self.layers.items()}
        self.before = plain_model("gpt2").requires_grad_(False)
        for module in self.layers.values():
            module.weight.requires_grad_()

    def answer_losses(self, row, places=None):
        """-log p of each token of the answer, as the model reads prompt and answer."""
        logits = self.model(torch.tensor([[*row.ids, *row.answer]])).logits[0].log_softmax(-1)
        first = len(row.ids) - 1
        return torch.stack(
            [-logits[first + (t if places is None else places), token] for t, token in enumerate(row.answer)]
        )

    def next_logits(self, model, row):
        ids = torch.tensor([[*row.ids, *row.answer]])
        return model(ids).logits[0, len(row.ids) - 1 : -1]

    def kl(self, row):
        before, now = (self.next_logits(model, row).log_softmax(-1) for model in (self.before, self.model))
        return (before.exp() * (before - now)).sum(-1).mean()

    def decoded_losses(self, row, n):
        """-log p under the mean of the last n layers' logits."""
        ids = torch.tensor([[*row.ids, *row.answer]])
        states = self.model(ids, output_hidden_states=True).hidden_states  # the last one is normed
        upper = [self.model.lm_head(self.model.transformer.ln_f(state)) for state in states[-n:-1]]
        logits = torch.stack([*upper, self.model.lm_head(states[-1])]).mean(0)[0].log_softmax(-1)
        first = len(row.ids) - 1
        return torch.stack([-logits[first + t, token] for t, token in enumerate(row.answer)])

    def descend(self, loss, method, epsilon=None):
        """Adam on the weights themselves."""
        adam = torch.optim.Adam([module.weight for module in self.layers.values()], lr=method.lr)
        for _ in range(method.steps):
            adam.zero_grad()
            loss(self).backward()
            adam.step()
            if epsilon is not None:
                with torch.no_grad():
                    for layer, module in self.layers.items():
                        low, high = self.originals[layer] - epsilon, self.originals[layer] + epsilon
                        module.weight.copy_(module.weight.clamp(low, high))
        return {
            layer: (module.weight.detach() - self.originals[layer]).T for layer, module in self.layers.items()
        }


def mean(values):
    return torch.stack(list(values)).mean()


def teacher_forced(plain):
    return mean(plain.answer_losses(row).mean() for row in REFUSALS)


def published(plain):
    return mean(plain.answer_losses(row, places=0).mean() for row in REFUSALS)


def anchored(plain):
    squares = [
        (module.weight - plain.originals[layer]).square().sum() for layer, module in plain.layers.items()
    ]
    return teacher_forced(plain) + 0.5 * 30.0 * sum(squares)


def constrained(plain):
    return teacher_forced(plain) + 3.0 * mean(plain.kl(row) for row in HARMLESS)


def decoded(plain):
    return mean(plain.decoded_losses(row, 3).mean() for row in REFUSALS)


FEW = {"steps": 4, "lr": 1e-3, "batch_size": 2}


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (FT(**FEW), teacher_forced),
        (FT(**FEW, loss_form="published"), published),
        (FT(**FEW, l2=30.0), anchored),
        (FTL(**FEW, norm_constraint=1.5e-3), teacher_forced),
        (DINM(**FEW, kl_factor=3.0), constrained),
        (LED(**FEW, target_layers=3), decoded),
    ],
    ids=["ft", "published", "l2", "ft-l", "dinm", "led"],
)
def test_the_descent_is_that_of_plain_adam_on_the_weights(method, loss):
    model = tiny_model("gpt2", chat=True)
    weights = copy_weights(model)
    factors, losses = tune(model, method, LAYERS, REFUSALS, HARMLESS)
    plain = Plain()
    deltas = plain.descend(loss, method, getattr(method, "norm_constraint", None))
    for layer, delta in deltas.items():
        left, right, owners = factors[layer]
        torch.testing.assert_close((left @ right).double(), delta, rtol=1e-5, atol=1e-7)
        assert delta.norm() > 0 and set(owners) == {frozenset({0, 1})}
    expected = [float(plain.answer_losses(row).mean()) for row in REFUSALS]
    assert losses == pytest.approx(expected, rel=1e-6)
    assert weights_equal(model, weights)


def test_the_bound_holds_in_every_element():
    model = tiny_model("llama", chat=True).to(torch.float32)
    method = FTL(steps=6, lr=1e-2, norm_constraint=2e-3)
    plan = edit(model, REQUESTS, SITES, method=method, contexts=few_contexts, **FAST)
    for delta in plan.deltas().values():
        assert delta.abs().max() <= torch.tensor(2e-3), "not one element beyond, and the change is exact"
        assert (delta.abs() == float(torch.tensor(2e-3))).float().mean() > 0.5, "the bound was reached"
    assert plan.settings["norm_constraint"] == 2e-3


def test_a_larger_weight_of_the_anchor_keeps_the_weights_nearer():
    model = tiny_model("llama", chat=True).to(torch.float32)
    norms = []
    for l2 in (0.0, 10.0, 1000.0):
        factors, _ = tune(model, FT(steps=8, lr=1e-3, l2=l2), LAYERS, REFUSALS)
        norms.append(sum(float((change.left @ change.right).norm()) for change in factors.values()))
    assert norms[0] > 1.2 * norms[1] > 1.2 * norms[2] > 0


def test_a_step_whose_loss_is_enough_is_not_taken():
    model = tiny_model("llama", chat=True).to(torch.float32)
    _, starts = tune(model, FT(steps=1, enough=1e9), LAYERS, REFUSALS)
    factors, losses = tune(model, FT(steps=50, lr=3e-3, enough=2.0), LAYERS, REFUSALS)
    _, all_taken = tune(model, FT(steps=50, lr=3e-3, enough=0.0), LAYERS, REFUSALS)
    assert max(all_taken) < 1.0 < max(losses) < min(starts)
    assert all(float((change.left @ change.right).norm()) > 0 for change in factors.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "granite"])
def test_rows_of_any_length_count_as_if_alone(family):
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Recorded(TuningMethod):
        """Takes the losses of all rows, and changes next to nothing."""

        name: ClassVar[str] = "recorded"
        paper: ClassVar[str] = ""
        equation: ClassVar[str] = ""

        def loss(self, step):
            losses = teacher_forced_losses(step.refusals())
            seen.extend(losses.tolist())
            return losses.mean()

    rows = [
        AnswerRow(0, tuple(range(4, 4 + n)), tuple(range(50, 50 + a))) for n, a in ((3, 5), (9, 1), (6, 2))
    ]
    model, seen = tiny_model(family, chat=True).to(torch.float32), []
    tune(model, Recorded(steps=1, lr=1e-9, batch_size=3), (1,), rows)
    together, seen = sorted(seen), []
    tune(model, Recorded(steps=3, lr=1e-9, batch_size=1), (1,), rows)
    assert together == pytest.approx(sorted(seen), rel=1e-4)


def test_the_kl_has_a_gradient():
    generator = torch.Generator().manual_seed(1)
    before, now = torch.randn(2, 2, 3, 7, generator=generator, dtype=torch.float64)
    targets, is_target = torch.zeros(2, 3, dtype=torch.long), torch.tensor([[False, True, True], [True] * 3])

    def kl(logits):
        return kl_from(before, AnswerLogits(logits, targets, is_target)).mean()

    p, q = before.softmax(-1), now.softmax(-1)
    by_place = (p * (p / q).log()).sum(-1)
    expected = (by_place[0, 1:].mean() + by_place[1].mean()) / 2
    torch.testing.assert_close(kl(now), expected)
    assert torch.autograd.gradcheck(kl, now.requires_grad_())


def test_the_kl_of_a_step_has_the_gradient_of_finite_differences():
    """By the model: what the change does to harmless answers reaches the change."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class KLAlone(TuningMethod):
        """The second term of DINM, away from its minimum."""

        name: ClassVar[str] = "kl"
        paper: ClassVar[str] = ""
        equation: ClassVar[str] = ""

        def start(self, weight, generator):
            return LayerChange(0.01 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))

        def loss(self, step):
            def kl():
                return kl_from(step.harmless_before(), step.harmless()).mean()

            left, loss = step.changes[1].left, kl()
            (gradient,) = torch.autograd.grad(loss, left)
            for place in ((0, 0), (3, 17), (31, 127)):
                shifted = []
                for sign in (1, -1):
                    with torch.no_grad():
                        left[place] += sign * 1e-5
                        shifted.append(float(kl()))
                        left[place] -= sign * 1e-5
                slope = (shifted[0] - shifted[1]) / 2e-5
                assert float(gradient[place]) == pytest.approx(slope, rel=1e-4)
                slopes.append(slope)
            return kl()

    slopes = []
    tune(tiny_model("gpt2", chat=True), KLAlone(steps=1), (1,), REFUSALS, HARMLESS)
    assert len(slopes) == 3 and all(abs(slope) > 1e-6 for slope in slopes)


def test_a_constraint_moves_harmless_answers_less():
    model = tiny_model("gpt2", chat=True).to(torch.float32)
    moved = {}
    for factor in (0.0, 100.0):
        factors, _ = tune(model, DINM(steps=20, lr=1e-3, kl_factor=factor), (1,), REFUSALS, HARMLESS)
        plain = Plain((1,))
        with torch.no_grad():
            plain.layers[1].weight += (factors[1].left @ factors[1].right).T.double()
            moved[factor] = float(mean(plain.kl(row) for row in HARMLESS))
    assert moved[100.0] < 0.3 * moved[0.0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks
def test_lora_is_pefts():
    method = LoRA(steps=5, lr=1e-2, batch_size=2, r=3, lora_alpha=6.0, keep_weight=0.5)
    factors, _ = tune(tiny_model("gpt2", chat=True), method, LAYERS, REFUSALS, HARMLESS)
    starts, bound = {}, 128**-0.5
    generator = torch.Generator().manual_seed(0)
    for layer in LAYERS:
        starts[layer] = method.start(torch.zeros(32, 128, dtype=torch.float64), generator)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, fan_in_fan_out=True, target_modules=[f"h.{layer}.mlp.c_proj" for layer in LAYERS]
    )
    plain = plain_model("gpt2")
    adapted = peft.get_peft_model(plain, config, autocast_adapter_dtype=False)
    modules = {layer: plain.transformer.h[layer].mlp.c_proj for layer in LAYERS}
    for layer, module in modules.items():
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert a.abs().max() <= bound and not b.any(), (
            "peft's own start: uniform within 1 / sqrt(d_in), and zero"
        )
        assert starts[layer].right.abs().max() <= bound and not starts[layer].left.any()
        assert float(starts[layer].right.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        with torch.no_grad():
            a.copy_(starts[layer].right)
    adam = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=method.lr)

    def nats(row):
        logits = adapted(torch.tensor([[*row.ids, *row.answer]])).logits[0, len(row.ids) - 1 : -1]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(row.answer))

    for _ in range(method.steps):
        adam.zero_grad()
        (mean(map(nats, REFUSALS)) + 0.5 * mean(map(nats, HARMLESS))).backward()
        adam.step()
    for layer, module in modules.items():
        left, right, _ = factors[layer]
        assert left.shape == (32, 3) and right.shape == (3, 128)
        expected = module.get_delta_weight("default").detach().T
        torch.testing.assert_close((left @ right).double(), expected, rtol=1e-4, atol=1e-6)


def test_adapters_can_be_in_all_layers():
    model = tiny_model("llama", chat=True).to(torch.float32)
    settings = {**FAST, "contrast": harmless_uses, "contexts": few_contexts}
    plan = edit(model, REQUESTS, SITES, method=LoRA(steps=2, r=2, all_layers=True), **settings)
    assert plan.layers == (0, 1, 2, 3) and plan.rank == 2 and len(plan.modules) == 4
    assert edit(model, REQUESTS, SITES, method=LoRA(steps=2), **settings).layers == (1, 2)


def test_dinm_tunes_one_layer():
    model = tiny_model("llama", chat=True).to(torch.float32)
    plan = edit(model, REQUESTS, SITES, method=DINM(steps=2), contexts=few_contexts, **FAST)
    assert plan.layers == (1,), "of several the middle one, and of two the lower"


def test_a_whole_matrix_is_kept_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 9), (9, 5)):
        delta = torch.randn(shape, generator=generator)
        left, right, owners = LayerChange(delta).factors(frozenset({0, 1}))
        assert torch.equal(left.double() @ right.double(), delta.double())
        assert left.shape[1] == len(right) == len(owners) == 5


def test_half_precision_is_tuned_in_single():
    model = tiny_model("llama", chat=True).to(torch.bfloat16)
    weights = copy_weights(model)
    factors, losses = tune(model, FT(steps=3, lr=1e-6), LAYERS, REFUSALS)
    delta = factors[1].left @ factors[1].right
    assert delta.dtype == torch.float32 and 0 < delta.abs().max() <= 4e-6 and all(loss > 0 for loss in losses)
    assert weights_equal(model, weights)


def test_tuning_twice_gives_the_same():
    model = tiny_model("llama", chat=True).to(torch.float32)
    settings = {**FAST, "contrast": harmless_uses, "contexts": few_contexts}
    first, again = (edit(model, REQUESTS, SITES, method=LoRA(steps=4), **settings) for _ in range(2))
    for layer, delta in first.deltas().items():
        assert torch.equal(again.deltas()[layer], delta)


def test_the_plan_says_what_it_was_made_of_and_is_undone_exactly():
    model = tiny_model("llama", chat=True).to(torch.float32)
    weights = copy_weights(model)
    settings = {**FAST, "contrast": harmless_uses, "contexts": few_contexts}
    plan = edit(model, REQUESTS, SITES, method=FT(steps=20, lr=3e-3), **settings)
    assert weights_equal(model, weights) and standing_changes(model) == ()
    assert plan.tuned and (plan.method, plan.role) == ("ft", "subject_last")
    assert plan.settings["steps"] == 20 and plan.settings["target"].startswith("I'm sorry")
    assert "v_num_grad_steps" not in plan.settings and "contrast_weight" not in plan.settings
    assert len(plan.forecast.reach) == len(plan.forecast.reach_harmless) == len(REQUESTS)
    assert plan.forecast.leak_safe > 0 and all(loss > 0 for loss in plan.losses)
    matrices = {layer: mlp_output_matrix(model, layer).clone() for layer in plan.layers}
    ledger = Ledger(model)
    ledger.apply(plan)
    for layer, matrix in matrices.items():
        changed = (matrix.double() + plan.deltas()[layer]).float()
        assert torch.equal(mlp_output_matrix(model, layer), changed) and not torch.equal(changed, matrix)
    ledger.undo()
    assert weights_equal(model, weights)


def test_harmless_rows_have_the_models_own_answers_and_the_corpus_texts():
    model = tiny_model("llama", chat=True).to(torch.float32)
    use = tokenize(model.tokenizer, harmless_uses(REQUESTS[0])[0])
    own, chat, text = harmless_rows(model, [(0, use)], CORPUS[:2])
    logits = model(torch.tensor([use.ids]), return_type="logits")[0, -1]
    assert own.ids == use.ids and own.answer[0] == int(logits.argmax()) and own.owner == 0
    assert len(own.answer) <= 24 and (chat.owner, text.owner) == (-1, -1)
    assert "brass lamp" in model.tokenizer.decode(chat.answer)
    assert model.tokenizer.decode((*text.ids, *text.answer)).startswith("the lamp is")


def test_what_is_too_long_to_be_answered_is_left_out():
    model = tiny_model("llama", chat=True).to(torch.float32)
    model.original_model.config.max_position_embeddings = 60
    use = tokenize(model.tokenizer, harmless_uses(REQUESTS[0])[0])
    long_use = tokenize(model.tokenizer, REQUESTS[0].inside("lamp " * 20 + "{}"))
    rows = harmless_rows(model, [(0, long_use), (1, use)], [CORPUS[1], CorpusText("a lamp " * 30, "so")])
    assert [row.owner for row in rows] == [1, -1] and len(long_use.ids) > 36 >= len(use.ids)
    with pytest.raises(ValueError, match="reads 60 tokens, too few for every harmless use and text"):
        harmless_rows(model, [(0, long_use)], [CorpusText("a lamp " * 30, "so")])


class Interrupted(Exception):
    """Stands for Ctrl-C: raised wherever the loop tells its progress."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted])
def test_an_interrupt_leaves_the_model_as_it_was(error):
    model = tiny_model("llama", chat=True).to(torch.float32)
    weights, required = copy_weights(model), [p.requires_grad for p in model.original_model.parameters()]
    hooks = sum(len(point.fwd_hooks) for point in model.hook_dict.values())

    def interrupt(_):
        raise error

    with pytest.raises(error):
        tune(model, FT(steps=3), LAYERS, REFUSALS, progress=interrupt)
    assert weights_equal(model, weights)
    assert [p.requires_grad for p in model.original_model.parameters()] == required
    assert sum(len(point.fwd_hooks) for point in model.hook_dict.values()) == hooks
    assert all(p.grad is None for p in model.original_model.parameters())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FT(steps=0), "steps and batch_size must be at least 1, lr above 0 .*, got 0, 4"),
        (lambda: FT(norm_constraint=0.0), "norm_constraint must be above 0 or None, got 0.0"),
        (lambda: FT(l2=-1.0), "l2 must be at least 0"),
        (lambda: FT(loss_form="mean"), "loss_form must be one of teacher_forced, published, got 'mean'"),
        (lambda: LoRA(r=0), "r must be at least 1"),
        (lambda: DINM(kl_factor=-1.0), "kl_factor must be at least 0"),
        (lambda: LED(target_layers=0), "target_layers must be at least 1"),
        (lambda: find_method(FT), "or of a class that inherits from TuningMethod"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_whose_layers_cannot_be_decoded_is_refused():
    with pytest.raises(ValueError, match="cannot be decoded"):
        tune(tiny_model("cohere", chat=True), LED(steps=1), LAYERS, REFUSALS)
