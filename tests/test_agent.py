"""The DQN agents in numbers: gradient step, selection, reset. DQN and SR+DQN where they have a text of their own."""

import copy

import copies
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import ACTION_DIM, CPU, FRAMES, NUM_ACTIONS, OBSERVATION_DIM, box, dqn_agent, networks, targets, updated
from conftest import equal, load_script, tensors

rde, sr, dqn = (load_script(name) for name in ("rde_dqn_atari", "sr_dqn_atari", "dqn_atari"))


def next_batch(agent):
    """The mini-batch that the agent's next update will draw, without drawing it from its generator."""
    generator_state = agent.buffer.generator.get_state()
    batch = agent.buffer.sample(agent.args.batch_size)
    agent.buffer.generator.set_state(generator_state)
    return batch


def reference_forward(weights: dict, observations: torch.Tensor) -> torch.Tensor:
    """Nature DQN in float64 by plain function calls, (batch, 4, 84, 84) in [0, 1] to (batch, actions)."""
    x = F.conv2d(observations, weights["convolutions.0.weight"], weights["convolutions.0.bias"], stride=4).relu()
    x = F.conv2d(x, weights["convolutions.2.weight"], weights["convolutions.2.bias"], stride=2).relu()
    x = F.conv2d(x, weights["convolutions.4.weight"], weights["convolutions.4.bias"]).relu().flatten(1)
    x = (x @ weights["hidden.weight"].T + weights["hidden.bias"]).relu()
    return x @ weights["output.weight"].T + weights["output.bias"]


@pytest.mark.parametrize("script, arguments", [(rde, {"num_agents": 3}), (dqn, {})])
def test_one_update_against_float64(script, arguments):
    # With this seed no ReLU's input is so close to 0 that float32 rounds it to the other side (with seed 1 one is, and
    # the gradients below it differ by 1e-3 from float64's, in plain float32 as well).
    agent = dqn_agent(script, seed=2, max_grad_norm=0.02, gamma=0.9, tau=0.3, **arguments)
    for target in targets(agent):  # targets that differ from the online networks
        for parameter in target.parameters():
            parameter.data.mul_(1.1)
    before = copy.deepcopy((networks(agent), targets(agent)))
    frames, actions, rewards, terminated = next_batch(agent)
    metrics = updated(agent).reshape(3, -1)
    observations, next_observations = frames[:, :4].double() / 255, frames[:, 1:].double() / 255
    assert 0 < terminated.sum() < len(terminated)
    for i, (network, target) in enumerate(zip(*before, strict=True)):
        weights = {name: value.detach().double().requires_grad_() for name, value in network.state_dict().items()}
        target_weights = {name: value.double() for name, value in target.state_dict().items()}
        target_values = rewards.double() + 0.9 * reference_forward(target_weights, next_observations).max(1).values * (
            1 - terminated.double()
        )
        q_values = reference_forward(weights, observations)[torch.arange(32), actions]
        error = (q_values - target_values).abs()
        loss = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
        assert metrics[0, i].item() == pytest.approx(loss.item(), rel=1e-5)
        assert metrics[1, i].item() == pytest.approx(q_values.mean().item(), rel=1e-4, abs=1e-6)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        assert norm > 0.02  # the clipping is at work
        assert metrics[2, i].item() == pytest.approx(norm.item(), rel=1e-4)  # before it
        for name, parameter in networks(agent)[i].named_parameters():
            expected = gradients[name] * 0.02 / norm
            assert (parameter.grad.double() - expected).norm() < 1e-5 * expected.norm() + 1e-12
            # Adam's first step: m / sqrt(v) = sign of the gradient, in float64 from the gradient that the agent has.
            gradient = parameter.grad.double()
            stepped = weights[name].detach() - 1e-4 * gradient / (gradient.abs() + 1e-8)
            assert (parameter.double() - stepped).abs().max() < 2e-7
            moved = target_weights[name] + 0.3 * (parameter.detach().double() - target_weights[name])
            assert (targets(agent)[i].get_parameter(name).double() - moved).abs().max() < 1e-7


def test_one_agent_learns_and_acts_alike_in_all_three_scripts():
    """To the bit, with clipped gradients: so what the test above shows of DQN holds for SR+DQN, too."""
    arguments = dict(seed=2, max_grad_norm=0.02, gamma=0.9, tau=0.3)
    reference, *others = dqn_agent(dqn, **arguments), dqn_agent(sr, **arguments), dqn_agent(rde, num_agents=1, **arguments)
    for _ in range(3):
        expected = updated(reference)
        for agent in others:
            assert torch.equal(updated(agent).flatten(), expected)
            for ours, theirs in zip(networks(agent) + targets(agent), networks(reference) + targets(reference), strict=True):
                assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    brightness = torch.arange(0, 256, 8, dtype=torch.uint8)
    observations = brightness.view(-1, 1, 1, 1).expand(-1, 4, 84, 84).contiguous()
    actions = reference.act(observations)
    assert len(actions.unique()) > 1 and torch.equal(others[0].act(observations), actions)
    assert torch.equal(others[1].act(observations, torch.Generator())[0], actions)


def test_a_small_gradient_is_not_clipped():
    agent = dqn_agent(rde, num_agents=1, max_grad_norm=1e6)
    agent.update()
    assert 0.01 < torch.sqrt(sum((p.grad.double() ** 2).sum() for p in agent.q_networks.parameters())) < 1e3


def test_agents_do_not_leak_into_one_another():
    """Whatever the others are, and however many, agent 0 makes the same steps."""
    pair, disturbed, triple = dqn_agent(rde, num_agents=2), dqn_agent(rde, num_agents=2), dqn_agent(rde, num_agents=3)
    for parameter in disturbed.q_networks[1].parameters():
        parameter.data.mul_(3)
    for agent in (pair, disturbed, triple):
        for _ in range(3):
            agent.update()
    for name, parameter in pair.q_networks[0].named_parameters():
        assert torch.equal(parameter, disturbed.q_networks[0].get_parameter(name))
        assert torch.equal(parameter, triple.q_networks[0].get_parameter(name))
        assert not torch.equal(parameter, pair.q_networks[1].get_parameter(name))


def test_bf16_is_close_and_keeps_float32_parameters():
    exact, rounded = dqn_agent(rde, num_agents=2), dqn_agent(rde, num_agents=2, bf16=True)
    a, b = updated(exact), updated(rounded)
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.05, atol=0.02)
    assert {p.dtype for p in rounded.q_networks.parameters()} == {torch.float32}


@pytest.mark.parametrize("script", [dqn, sr, rde], ids=lambda script: script.__name__)
def test_with_bf16_values_that_differ_by_a_thousandth_are_told_apart(script):
    """Between 8 and 8.06 there is no number in bfloat16."""
    agent, arguments = dqn_agent(script, bf16=True), [torch.Generator()] if script is rde else []
    for network in networks(agent):
        network.output.weight.data.zero_()
        network.output.bias.data[:] = torch.tensor([8.000, 8.008, 8.016, 8.024, 8.012])
    actions = agent.act(torch.zeros((3, 4, 84, 84), dtype=torch.uint8), *arguments)
    assert (actions[0] if script is rde else actions).tolist() == [3] * 3


# ---------------------------------------------------------------------------------------------------------- selection


def formula(q_values: np.ndarray, beta: float) -> np.ndarray:
    """SPEC's formula in float64, state by state."""
    rows = []
    for q in np.asarray(q_values, np.float64):
        scale = np.abs(q).max()
        z = beta * (q / scale if scale > 0 else q)
        e = np.exp(z - z.max())
        rows.append(e / e.sum())
    return np.array(rows)


def probabilities_by_value(q_values: list[list[float]], beta: torch.Tensor | float) -> torch.Tensor:
    q_values = torch.tensor(q_values)
    return rde.selection_probabilities(q_values, rde.value_scale(q_values), beta)


@pytest.mark.parametrize(
    "q_values",
    [
        [[3.0]],
        [[-3.0]],
        [[0.0]],
        [[2.0, 2.0, 2.0]],
        [[-2.0, -2.0]],
        [[-1.0, -1.01, -2.0]],
        [[1.0, -1.0]],
        [[0.0, 0.0, 0.0, 0.0]],
        [[0.0, -1e-30]],
        [[1e30, 0.99e30, -1e30]],
        [[1e-30, 0.98e-30]],
        [[5.0, 4.9], [-5.0, -4.9], [0.0, 0.0]],
    ],
)
@pytest.mark.parametrize("beta", [0.0, 1.0, 50.0])
def test_selection_probabilities_are_those_of_the_formula(q_values, beta):
    ours = probabilities_by_value(q_values, torch.tensor(beta)).numpy()
    np.testing.assert_allclose(ours, formula(q_values, beta), rtol=2e-4, atol=1e-7)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.floats(0, 100))
def test_selection_prefers_higher_values_whatever_their_sign(q_values, beta):
    ours = probabilities_by_value([q_values], beta)[0].double().numpy()
    assert ours.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(ours, formula([q_values], beta)[0], rtol=1e-3, atol=1e-6)
    order = np.argsort(q_values)
    assert (np.diff(ours[order]) >= -1e-6).all()


class FixedQValues(torch.nn.Module):
    """A network with the same Q-values in every state."""

    def __init__(self, q_values):
        super().__init__()
        self.q_values = torch.tensor(q_values)

    def forward(self, observations):
        return self.q_values.expand(len(observations), -1)


def fixed_q_values(agent, table):
    agent.q_networks = torch.nn.ModuleList(FixedQValues(q_values) for q_values in table)


# Agent 0 proposes action 0, agent 1 action 1, agent 2 action 2.
TABLE = [[1.0, 0.96, 0.93, 0.0, 0.0], [0.5, 0.51, 0.49, 0.0, 0.0], [-1.0, -0.99, -0.96, -2.0, -2.0]]


@pytest.mark.parametrize("num_resets", [0, 1, 2, 3])
def test_draws_follow_the_probabilities(num_resets):
    """Chi-square of 6,000 draws against the formula on the judge's values of the proposals; uniform before any reset."""
    agent = dqn_agent(rde, num_agents=3)
    fixed_q_values(agent, TABLE)
    agent.num_resets = num_resets
    judge = num_resets % 3
    expected = formula([TABLE[judge][:3]], 50.0 if num_resets else 0.0)[0] * 6_000
    generator = torch.Generator().manual_seed(num_resets)
    actions, acting = agent.act(torch.zeros((6_000, 4, 1, 1), dtype=torch.uint8), generator)
    assert torch.equal(actions, acting)  # here the action has its agent's number
    counts = np.bincount(acting.numpy(), minlength=3)
    assert (expected > 5).all()
    assert ((counts - expected) ** 2 / expected).sum() < 18.4  # 2 degrees of freedom: exceeded with probability 1e-4


def test_states_draw_independently_and_the_generator_decides():
    agent = dqn_agent(rde, num_agents=3)
    fixed_q_values(agent, TABLE)
    observations = torch.zeros((64, 4, 1, 1), dtype=torch.uint8)
    draws = [agent.act(observations, torch.Generator().manual_seed(seed))[1] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert len(draws[0].unique()) == 3


@pytest.mark.parametrize("num_agents", [1, 2, 3, 5])
def test_the_oldest_agent_through_three_rounds(num_agents):
    agent = dqn_agent(rde, num_agents=num_agents)
    last_reset = {i: i - num_agents for i in range(num_agents)}  # agent 0 counts as the oldest at the start
    for event in range(3 * num_agents):
        oldest = min(last_reset, key=last_reset.get)
        assert agent.oldest.item() == oldest
        assert agent.beta.item() == (50.0 if event else 0.0)
        assert agent.reset() == oldest
        last_reset[oldest] = event


def test_the_number_of_resets_says_who_judges_and_how():
    """Set as a checkpoint sets it, and in place: a captured CUDA graph reads the two tensors where they are."""
    agent = dqn_agent(rde, num_agents=3, beta=7.0)
    addresses = agent.oldest.data_ptr(), agent.beta.data_ptr()
    for num_resets, oldest, beta in ((0, 0, 0.0), (1, 1, 7.0), (2, 2, 7.0), (3, 0, 7.0), (100, 1, 7.0), (0, 0, 0.0)):
        agent.num_resets = num_resets
        assert (agent.num_resets, agent.oldest.tolist(), agent.beta.item()) == (num_resets, [oldest], beta)
    assert addresses == (agent.oldest.data_ptr(), agent.beta.data_ptr())


def test_what_is_logged_of_the_choice():
    """The oldest agent, the fractions of the acting ones and the mean entropy since the last point, which then begin anew."""
    agent = dqn_agent(rde, num_agents=3)
    names = ["rde/oldest_agent", *(f"rde/acting_fraction_{i}" for i in range(3)), "rde/choice_entropy"]
    assert agent.scalars() == dict.fromkeys(names, 0)  # before the first reset no agent is the youngest
    agent.num_resets = 6  # agent 2 was the last one
    names.append("rde/youngest_fraction")
    for counts, choices, logged in (([2, 0, 6], [5, 2], [0.25, 0.0, 0.75, 0.4, 0.75]), ([0, 0, 0], [0, 0], [0] * 5)):
        agent.acting_counts += counts
        agent.choices += torch.tensor(choices)
        assert agent.scalars() == pytest.approx(dict(zip(names, [0, *logged], strict=True)))


# -------------------------------------------------------------------------------------------------------------- reset

RESET_PARAMETERS = {
    "last1": {"output"},
    "last2": {"output", "hidden"},
    "full": {"output", "hidden", "convolutions"},
}


@pytest.mark.parametrize("depth", ["last1", "last2", "full"])
@pytest.mark.parametrize("script", [rde, sr])
def test_reset_touches_the_named_layers_of_one_agent_and_nothing_else(script, depth):
    agent = dqn_agent(script, reset_depth=depth)
    for _ in range(3):
        agent.update()
    buffer = copy.deepcopy({name: value for name, value in vars(agent.buffer).items() if name != "generator"})
    before, targets_before = copy.deepcopy((networks(agent), targets(agent)))
    moments_before = copy.deepcopy(agent.optimizer.state_dict()["state"])
    addresses = [p.data_ptr() for network in networks(agent) + targets(agent) for p in network.parameters()]
    agent.reset()
    assert addresses == [p.data_ptr() for network in networks(agent) + targets(agent) for p in network.parameters()]
    for i, (network, target) in enumerate(zip(networks(agent), targets(agent), strict=True)):
        for name, parameter in network.named_parameters():
            changed = not torch.equal(parameter, before[i].get_parameter(name))
            assert changed == (i == 0 and name.split(".")[0] in RESET_PARAMETERS[depth]), name
            state = agent.optimizer.state[parameter]
            if i == 0:
                assert torch.equal(target.get_parameter(name), parameter)
                assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
            else:
                assert torch.equal(target.get_parameter(name), targets_before[i].get_parameter(name))
                old = moments_before[
                    len(list(networks(agent)[0].parameters())) * i + [n for n, _ in network.named_parameters()].index(name)
                ]
                assert state["step"] == 3 and torch.equal(state["exp_avg"], old["exp_avg"])
                assert torch.equal(state["exp_avg_sq"], old["exp_avg_sq"])
    for name, value in buffer.items():
        now = getattr(agent.buffer, name)
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else np.array_equal(now, value), name
    # The first step after the reset is Adam's first step: every weight with a gradient moves by the learning rate.
    weight = networks(agent)[0].output.weight
    frozen = weight.detach().clone()
    agent.update()
    moved, strong = (weight - frozen).abs(), weight.grad.abs() > 1e-5
    assert strong.any() and torch.allclose(moved[strong], torch.tensor(1e-4), rtol=0.02)


@pytest.mark.parametrize("script", [rde, sr])
def test_two_resets_draw_different_values_with_the_initial_distribution(script):
    agent = dqn_agent(script, reset_depth="full", **({"num_agents": 1} if script is rde else {}))
    draws = [networks(agent)[0].hidden.weight.detach().clone()]
    for _ in range(2):
        agent.reset()
        draws.append(networks(agent)[0].hidden.weight.detach().clone())
    bound = 1 / np.sqrt(3136)  # PyTorch's uniform initialisation of a linear layer with 3,136 inputs
    for i, draw in enumerate(draws):
        assert draw.abs().max() <= bound and draw.std().item() == pytest.approx(bound / np.sqrt(3), rel=0.01)
        assert all(not torch.equal(draw, other) for other in draws[:i])


def test_agents_start_different_and_agent_0_starts_like_dqn():
    ensemble, single = dqn_agent(rde, num_agents=2), dqn_agent(dqn)
    for name, parameter in single.q_network.named_parameters():
        assert torch.equal(parameter, ensemble.q_networks[0].get_parameter(name))
        assert torch.equal(parameter, single.target_network.get_parameter(name))
        assert not torch.equal(parameter, ensemble.q_networks[1].get_parameter(name))


@pytest.mark.parametrize("name", [path.stem for path in copies.scripts()])
def test_the_first_weights_are_those_of_the_seed(name):
    """Whatever was drawn before from PyTorch's own generator."""
    script, made = load_script(name), []
    observations = FRAMES if "atari" in name else box(OBSERVATION_DIM)
    actions = box(ACTION_DIM) if "sac" in name else gym.spaces.Discrete(NUM_ACTIONS)
    for seed in (1, 2, 1):
        made.append(script.Agent(script.Args(seed=seed), observations, actions, None, CPU).weights())
        torch.rand(seed)
    one, other, again = made
    assert equal(one, again)
    ours, theirs = ([value for value in tensors(weights) if value.ndim > 1 and value.std() > 0] for weights in (one, other))
    assert len(ours) >= 5 and not any(map(torch.equal, ours, theirs))
