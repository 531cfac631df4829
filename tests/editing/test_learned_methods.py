"""MEND and KE against their papers' equations, written out token by token in float64."""

import pytest
import torch
from helpers.edit_gradients import LAYERS, SHAPE, gradient, random_edits, with_random_parameters

from lens_defense.editing.methods import KE, LEARNED, MEND, METHODS, KESettings, MENDSettings, find_method

SMALL_KE = KESettings(lstm_size=3, condition_size=6, hidden_size=4, max_scale=0.7, anneal_every=3)
SMALL_MEND = MENDSettings(rank=2, edit_lr=0.01)
NETWORKS = {
    "mend": lambda: MEND(SMALL_MEND, LAYERS, SHAPE),
    "ke": lambda: KE(SMALL_KE, LAYERS, SHAPE),
}
EVERY_LEARNED = pytest.mark.parametrize("name", LEARNED)


def fresh(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def deltas(network, edits):
    return {layer: change.left @ change.right for layer, change in network.changes(edits).items()}


def test_a_fresh_mend_is_one_step_of_fine_tuning():
    edits = random_edits()
    for layer, delta in deltas(fresh("mend"), edits).items():
        torch.testing.assert_close(delta, -0.01 * gradient(edits, layer), rtol=1e-6, atol=1e-8)


def test_mend_is_the_papers_equations():
    network, edits = with_random_parameters(NETWORKS["mend"]()), random_edits(tokens=(4, 5, 6))
    network.observe(edits)
    now = deltas(network, edits)
    for j, layer in enumerate(LAYERS):
        tokens = [
            torch.cat([key, value_gradient])
            for edit in edits
            for key, value_gradient in zip(edit.keys[layer], edit.value_gradients[layer], strict=True)
        ]
        mean = sum(tokens) / len(tokens)
        std = (sum((token - mean) ** 2 for token in tokens) / (len(tokens) - 1)) ** 0.5
        expected = torch.zeros(SHAPE.d_out, SHAPE.d_in, dtype=torch.float64)
        for token in tokens:
            z = (token - mean) / std
            u1, u2 = network.up
            v1, v2 = network.down
            b1, b2 = network.bias
            h = z + torch.relu(network.scale[j, 0] * (u1 @ (v1 @ z) + b1) + network.offset[j, 0])
            g = h + network.scale[j, 1] * (u2 @ (v2 @ h) + b2) + network.offset[j, 1]
            expected -= network.log_rate[j].exp() * torch.outer(g[SHAPE.d_in :], g[: SHAPE.d_in])
        torch.testing.assert_close(now[layer], expected)


def test_every_parameter_of_a_fresh_mend_has_a_gradient_where_it_can():
    network, edits = fresh("mend"), random_edits()
    loss = sum(delta.pow(3).sum() for delta in deltas(network, edits).values())
    loss.backward()
    for name, parameter in network.named_parameters():
        stuck = name in ("down", "scale")  # they stand before U, which is 0
        assert bool(parameter.grad.any()) != stuck, name


def plain_lstm(inputs, w_in, w_state, b_in, b_state):
    """The last state of an LSTM, gate by gate."""
    state = cell = torch.zeros(w_state.shape[1], dtype=torch.float64)
    for token in inputs:
        i, f, g, o = (w_in @ token + b_in + w_state @ state + b_state).chunk(4)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        state = torch.sigmoid(o) * torch.tanh(cell)
    return state


def test_ke_is_the_papers_equations():
    network, edits = with_random_parameters(NETWORKS["ke"]()), random_edits()
    lstm = dict(network.lstm.named_parameters())
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    now = deltas(network, edits)
    for j, layer in enumerate(LAYERS):
        expected = torch.zeros(SHAPE.d_out, SHAPE.d_in, dtype=torch.float64)
        for edit in edits:
            forwards = plain_lstm(edit.text, *(lstm[name] for name in names))
            backwards = plain_lstm(edit.text.flip(0), *(lstm[f"{name}_reverse"] for name in names))
            linear, first, second = network.condition[0], network.gates[j][0], network.gates[j][2]
            h = torch.tanh(linear.weight @ torch.cat([forwards, backwards]) + linear.bias)
            out = second.weight @ torch.tanh(first.weight @ h + first.bias) + second.bias
            alpha, beta, gamma, epsilon, eta = out[:5], out[5:10], out[10:17], out[17:24], out[24]
            gate = torch.outer(torch.softmax(alpha, 0), gamma)
            added = torch.outer(torch.softmax(beta, 0), epsilon)
            expected += 0.7 * torch.sigmoid(eta) * (gate * gradient([edit], layer) + added)
        torch.testing.assert_close(now[layer], expected)


@EVERY_LEARNED
def test_several_edits_are_the_sum_of_each_alone(name):
    network, edits = with_random_parameters(NETWORKS[name]()), random_edits(tokens=(3, 5, 4))
    together, alone = deltas(network, edits), [deltas(network, [edit]) for edit in edits]
    for layer in LAYERS:
        torch.testing.assert_close(together[layer], sum(delta[layer] for delta in alone))


@EVERY_LEARNED
def test_each_rank_belongs_to_its_edit(name):
    network, edits = with_random_parameters(NETWORKS[name]()), random_edits(tokens=(3, 5))
    changes, alone = network.changes(edits), deltas(network, edits[1:])
    for layer, owners in network.owners(edits).items():
        own = [j for j, owner in enumerate(owners) if owner == 1]
        change = changes[layer]
        torch.testing.assert_close(change.left[:, own] @ change.right[own], alone[layer])


def test_the_objectives_are_the_papers():
    edit_loss, kl = torch.tensor(2.0), torch.tensor(0.5)
    assert fresh("mend").objective(edit_loss, kl).item() == pytest.approx(0.1 * 2.0 + 0.5)
    network = fresh("ke")
    with torch.no_grad():
        network.multiplier.fill_(3.0)
    assert network.objective(edit_loss, kl).item() == pytest.approx(2.0 + 3.0 * (0.5 - 0.01))


def test_the_multiplier_of_ke_goes_up_while_the_bound_is_broken_and_never_below_0():
    network, edits = fresh("ke"), random_edits()
    adam = torch.optim.Adam(network.parameter_groups(1e-3))

    def step(kl):
        adam.zero_grad()
        loss = sum(delta.sum() for delta in deltas(network, edits).values())
        network.objective(loss, torch.tensor(kl)).backward()
        adam.step()
        network.finish_step(0.0)
        return network.multiplier.item()

    rising = [step(1.0) for _ in range(20)]
    assert rising[0] > 1 and rising == sorted(set(rising))
    falling = [step(-5.0) for _ in range(100)]
    assert min(falling) == falling[-1] == 0


def test_the_bound_of_ke_is_drawn_in_where_nine_edits_of_ten_succeed():
    network = fresh("ke")
    margins = []
    for succeeded in (1.0, 1.0, 1.0, 1.0, 0.6, 1.0, *[1.0] * 60):
        network.finish_step(succeeded)
        margins.append(round(network.margin.item(), 6))
    assert margins[:9] == [0.01, 0.01, 0.008, 0.008, 0.008, 0.008, 0.008, 0.008, 0.0064]
    assert margins[-1] == pytest.approx(SMALL_KE.margin_min)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MENDSettings(rank=0), "rank must be at least 1"),
        (lambda: MENDSettings(edit_lr=0.0), "edit_lr, edit_weight and rate_speed above 0, got 32, 0.0"),
        (lambda: KESettings(lstm_size=0), "must be at least 1"),
        (lambda: KESettings(margin_min=0.1), "margin_min must be above 0 and at most margin_max"),
        (
            lambda: find_method("mend"),
            "mend is trained on a model before it edits: lens-defense train-editor",
        ),
        (lambda: find_method(MEND), "or what ld.load_editor gave"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_learned_methods_are_a_kind_of_their_own():
    assert not set(LEARNED) & set(METHODS)
    for name, kind in LEARNED.items():
        network = fresh(name)
        assert find_method(network) is network and (network.name, type(network)) == (name, kind)
