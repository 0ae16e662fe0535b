"""The agents of the DQN scripts in numbers: gradient step, reset, first weights. What only one of them has: test_rde_dqn.py,
test_drq.py, test_rnd.py. The choice: test_selection.py.
"""

import copy

import copies
import numpy as np
import pytest
import torch
import torch.nn as nn

from agents import (
    NUM_ACTIONS,
    bare_agent,
    dqn_agent,
    make_agent,
    make_observations,
    mlp_agent,
    networks,
    next_batch,
    parameters,
    reference_features,
    reset_in_turn,
    targets,
    updated,
)
from conftest import equal, load_script, tensors

rde, sr, dqn, drq, mlp = map(load_script, ("rde_dqn_atari", "sr_dqn_atari", "dqn_atari", "rde_drq_atari", "rde_dqn"))


def reference_q_values(weights: dict, x: torch.Tensor) -> torch.Tensor:
    """Of Nature DQN, (batch, 4, 84, 84) in [0, 1], or of an MLP of three hidden layers, by plain function calls."""
    linear = lambda name: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
    if "0.weight" not in weights:
        x = reference_features(weights, x)
        return linear("output")
    for layer in (0, 2, 4):
        x = linear(layer).relu()
    return linear(6)


@pytest.mark.parametrize(
    "script, max_grad_norm, arguments",
    [(rde, 0.02, {"num_agents": 3}), (dqn, 0.02, {}), (sr, 1e6, {}), (mlp, 0.02, {"num_agents": 1}),
     (mlp, 0.02, {"num_agents": 3}), (mlp, 1e6, {"num_agents": 3, "optimizer": "rmsprop"})],
)  # fmt: skip
def test_one_update_against_float64(script, max_grad_norm, arguments):
    """Losses, Q-values, the gradients and their norm, the optimizer's first step and its moments, and the targets."""
    # With this seed no ReLU's input is so close to 0 that float32 rounds it to the other side (with seed 1 one is, and
    # the gradients below it differ by 1e-3 from float64's, in plain float32 as well).
    arguments = dict(seed=2, max_grad_norm=max_grad_norm, gamma=0.9, tau=0.3, **arguments)
    if script is mlp:
        agent = mlp_agent(script, target_update_interval=0, **arguments)
    else:
        agent = dqn_agent(script, **arguments)
    for target in targets(agent):  # targets that differ from the online networks
        for parameter in target.parameters():
            parameter.data.mul_(1.1)
    before, learning_rate = copy.deepcopy((networks(agent), targets(agent))), agent.args.learning_rate
    observations, actions, rewards, terminated, *next_observations = (part.double() for part in next_batch(agent))
    if script is mlp:
        (next_observations,) = next_observations
    else:  # five frames of each transition
        observations, next_observations = observations[:, :4] / 255, observations[:, 1:] / 255
    if len(networks(agent)) == 1:  # an ensemble's choice: test_selection.py
        raw = observations.float() if script is mlp else (255 * observations).round().byte()
        greedy = agent.act(raw, torch.Generator())[0] if script is mlp else agent.act(raw)
        expected = reference_q_values(dict(before[0][0].double().state_dict()), observations).argmax(1)
        assert torch.equal(greedy, expected) and (script is mlp or len(greedy.unique()) > 1)
    metrics = updated(agent).reshape(3, -1)
    assert 0 < terminated.sum() < len(terminated)
    for i, (network, target) in enumerate(zip(*before, strict=True)):
        weights = {name: value.detach().double().requires_grad_() for name, value in network.state_dict().items()}
        target_weights = {name: value.double() for name, value in target.state_dict().items()}
        next_values = reference_q_values(target_weights, next_observations).amax(1)
        td_targets = rewards + 0.9 * next_values * (1 - terminated)
        q_values = reference_q_values(weights, observations).gather(1, actions.long().view(-1, 1)).squeeze(1)
        error = (q_values - td_targets).abs()
        assert error.min() < 1 and (error.max() > 1 or script is not mlp)  # both parts of the loss
        loss = torch.where(error < 1, 0.5 * error**2, error - 0.5).mean()
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
        assert 0.02 < norm < 1e3  # the clipping is at work, or not
        expected = [loss.item(), q_values.mean().item(), norm.item()]
        np.testing.assert_allclose(metrics[:, i], expected, rtol=1e-5, atol=1e-6)
        for name, parameter in networks(agent)[i].named_parameters():
            expected = gradients[name] * min(1, max_grad_norm / norm)
            assert (parameter.grad.double() - expected).norm() < 1e-5 * expected.norm() + 1e-12
            # In float64 from the gradient that the agent has. In Adam's first step m / sqrt(v) is the sign of the gradient.
            gradient, factor = parameter.grad.double(), 1.0
            moments = {"exp_avg": 0.1 * gradient, "exp_avg_sq": 0.001 * gradient**2}
            if "optimizer" in arguments:
                factor, moments = 0.1, {"square_avg": 0.01 * gradient**2}
            stepped = weights[name].detach() - learning_rate * gradient / (factor * gradient.abs() + 1e-8)
            assert (parameter.double() - stepped).abs().max() < (2e-7 if factor == 1 else 1e-6)
            state = agent.optimizer.state[parameter]
            assert state.keys() == {"step", *moments} and state["step"] == 1
            for moment, value in moments.items():
                torch.testing.assert_close(state[moment].double(), value, rtol=1e-5, atol=1e-12)
            moved = target_weights[name] + 0.3 * (parameter.detach().double() - target_weights[name])
            assert (targets(agent)[i].get_parameter(name).double() - moved).abs().max() < 1e-7


@pytest.mark.parametrize("name", ["rde_dqn_atari", "rde_dqn", "rde_sac_dmc"])
def test_bf16_is_close_and_keeps_float32_parameters(name):
    exact, rounded = make_agent(name, num_agents=2), make_agent(name, num_agents=2, bf16=True)
    a, b = updated(exact), updated(rounded)
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.05, atol=0.05 if "sac" in name else 0.02)
    assert {tensor.dtype for tensor in [b, *filter(torch.is_floating_point, tensors(rounded.weights()))]} == {torch.float32}
    if "sac" not in name:
        gradients = [torch.cat([p.grad.flatten() for p in agent.q_networks.parameters()]) for agent in (exact, rounded)]
        assert 0 < (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.1


DQN_SCRIPTS = [path.stem for path in copies.scripts() if "dqn" in path.stem or "drq" in path.stem]


@pytest.mark.parametrize("name", DQN_SCRIPTS)
def test_with_bf16_values_that_differ_by_a_thousandth_are_told_apart(name):
    """Between 8 and 8.06 there is no number in bfloat16."""
    agent = make_agent(name, bf16=True, **{"num_atoms": 1} if "drq" in name else {})
    for network in networks(agent):
        linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
        for layer in linear:
            if layer.out_features in (1, NUM_ACTIONS):  # the last one; where there are values and advantages, both
                layer.weight.data.zero_(), layer.bias.data.fill_(8.0)
            if layer.out_features == NUM_ACTIONS:
                layer.bias.data += torch.tensor([0.000, 0.008, 0.016, 0.024, 0.012])
    ensemble = "rde" in name
    actions = agent.act(make_observations(name, 3), *[torch.Generator()] * ensemble)
    assert (actions[0] if ensemble else actions).tolist() == [3] * 3


# -------------------------------------------------------------------------------------------------------------- reset

RESET_PARAMETERS = {"last1": {"output"}, "last2": {"output", "hidden"}, "full": {"output", "hidden", "convolutions"}}


def state_of_agent(agent, index: int) -> dict[str, torch.Tensor]:
    """All that belongs to one DQN agent: its networks and their moments."""
    state = {}
    for name, parameter in networks(agent)[index].named_parameters():
        state |= {name: parameter.detach(), f"target {name}": targets(agent)[index].get_parameter(name)}
        state |= {f"optimizer {name} {moment}": tensor for moment, tensor in agent.optimizer.state[parameter].items()}
    return state


@pytest.mark.parametrize(
    "script, arguments",
    [(rde, {"reset_depth": depth}) for depth in RESET_PARAMETERS]
    + [(sr, {"reset_depth": depth}) for depth in RESET_PARAMETERS]
    + [(mlp, {"optimizer": optimizer}) for optimizer in ("adam", "rmsprop")]
    + [(drq, {"shrink": shrink, "anneal": True}) for shrink in (0.8, 1.0, 0.0)],
)
def test_reset_touches_the_named_layers_of_one_agent_and_nothing_else(script, arguments):
    agent = make_agent(script.__name__, **arguments, **{} if script is sr else {"num_agents": 3})
    num_agents, num_moments = len(networks(agent)), 2 if arguments.get("optimizer") == "rmsprop" else 3
    for _ in range(3):
        agent.update()
    buffer = copy.deepcopy({name: value for name, value in vars(agent.buffer).items() if name != "generator"})
    for index in [0, 1, 2, 0] if script is mlp else [0]:
        agent.update()
        states = [state_of_agent(agent, i) for i in range(num_agents)]
        before = copy.deepcopy(states)
        addresses = [{name: tensor.data_ptr() for name, tensor in state.items()} for state in states]
        generator_state = torch.get_rng_state()
        agent.reset()
        assert not torch.equal(torch.get_rng_state(), generator_state)  # so the next one draws others
        torch.set_rng_state(generator_state)
        fresh = script.QNetwork(NUM_ACTIONS) if script in (rde, sr) else agent.fresh_network()
        fresh = dict(fresh.named_parameters())
        after = [state_of_agent(agent, i) for i in range(num_agents)]
        assert addresses == [{name: tensor.data_ptr() for name, tensor in state.items()} for state in after]
        assert equal(after[:index] + after[index + 1 :], before[:index] + before[index + 1 :])
        assert len(after[index]) == {mlp: 8, drq: 12}.get(script, 10) * (2 + num_moments)
        for name, tensor in after[index].items():
            if name.startswith("optimizer"):
                assert before[index][name].any() and not tensor.any(), name
            elif name.startswith("target"):
                assert torch.equal(tensor, after[index][name.removeprefix("target ")])
            elif "reset_depth" in arguments and name.split(".")[0] not in RESET_PARAMETERS[arguments["reset_depth"]]:
                assert torch.equal(tensor, before[index][name]), name
            else:  # of DrQ's convolutions a share is left
                share = arguments.get("shrink", 0.0) if name.startswith("convolutions") else 0.0
                expected = share * before[index][name] + (1 - share) * fresh[name]
                assert torch.allclose(tensor, expected, rtol=1e-6, atol=1e-8), name
                assert share == 1 or not torch.equal(tensor, before[index][name]), name
    for name, value in buffer.items():
        now = getattr(agent.buffer, name)
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else np.array_equal(now, value), name
    # The first step after the reset is Adam's first step: every weight with a gradient moves by the learning rate.
    weight = [parameter for parameter in networks(agent)[0].parameters() if parameter.ndim > 1][-1]
    frozen = weight.detach().clone()
    agent.update()
    moved, strong = (weight - frozen).abs(), weight.grad.abs() > 1e-5
    step = agent.args.learning_rate * weight.grad.abs() / (weight.grad.abs() + getattr(agent.args, "adam_eps", 1e-8))
    assert strong.any() and (num_moments == 2 or torch.allclose(moved[strong], step[strong], rtol=0.02))
    if script is drq:
        assert agent.steps_since_reset.tolist() == [1, 5, 5]
    if script is mlp:
        steps = [agent.optimizer.state[next(network.parameters())]["step"].item() for network in networks(agent)]
        assert steps == [1, 3, 2]


@pytest.mark.parametrize("script", [rde, sr])
def test_a_wrong_name_of_a_layer_fails_at_the_start(script, monkeypatch):
    """In a copy of somebody's own; and not hours later, at the first reset."""
    monkeypatch.setitem(script.RESET_LAYERS, "last1", ["outptu"])
    with pytest.raises(AttributeError, match="outptu"):
        dqn_agent(script, stored=0)


@pytest.mark.parametrize("name", ["rde_dqn_atari", "rde_drq_atari", "rde_dqn", "rde_sac_dmc", "rde_sac_safety"])
def test_agents_begin_differently_and_the_first_as_if_it_were_alone(name):
    """In every weight; critics of one agent, too."""
    alone, three = (tensors(make_agent(name, num_agents=count).weights()) for count in (1, 3))
    for ours, theirs in zip(alone, three, strict="sac" in name):
        if "sac" in name:  # the networks of all agents are stacked; the entropy coefficients are 1
            assert torch.equal(*(part[: len(ours)] for part in (ours, theirs)))
            assert ours.ndim == 1 or all((a != b).all() for i, a in enumerate(theirs) for b in theirs[:i])
        else:
            assert torch.equal(ours, theirs)
    assert "sac" in name or not any(map(torch.equal, three, three[len(alone) :]))


WITH_WEIGHTS = [(path.stem, {}) for path in copies.scripts()]
WITH_WEIGHTS += [("rnd_dqn_atari", {"num_heads": 1}), ("rnd_dqn_atari", {"intrinsic_coef": 0.0})]
WITH_WEIGHTS += [(name, {"critic_norm": "layer"}) for name in ("rde_sac_dmc", "rde_sac_safety")]


@pytest.mark.parametrize("name, arguments", WITH_WEIGHTS)
def test_weights_go_to_another_agent(name, arguments, tmp_path):
    """What play.py does: through a file, into an agent of another seed, which then chooses as the one that was saved.

    Also in a copy that resets its agents in another order, in which their number does not tell the oldest one.
    """
    agent, other = make_agent(name, **arguments), make_agent(name, seed=9, **arguments)
    agent.update()
    if hasattr(agent, "reset"):
        agent.reset()
        agent.update()
    if "rde" in name:
        reset_in_turn(agent, 4)  # in the scripts' own order agent 0 would be the oldest of two
        agent.oldest.fill_(1)
        address = other.oldest.data_ptr()
    torch.save(agent.weights(), tmp_path / "model.pt")
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert not equal(other.weights(), weights)
    other.load_weights(weights)
    assert equal(other.weights(), weights) and equal(agent.weights(), weights)
    if "rde" in name:
        assert (weights["num_resets"], weights["oldest_agent"]) == (4, 1) == (len(other.resets), other.oldest.item())
        assert other.oldest.data_ptr() == address  # a captured CUDA graph reads it there
    choices = [one.evaluation_policy(torch.Generator().manual_seed(1))(make_observations(name, 40)) for one in (agent, other)]
    assert torch.equal(*choices)
    if getattr(agent, "rnd", None) is not None:
        frames = make_observations(name, 32)[:, -1]
        assert torch.equal(agent.rnd.learn(frames), other.rnd.learn(frames))


@pytest.mark.parametrize("name", [path.stem for path in copies.scripts()])
def test_the_first_weights_are_those_of_the_seed(name):
    """Whatever was drawn before from PyTorch's own generator; Q-networks' by PyTorch's rule for layers. Targets begin as what
    they follow."""
    made = []
    for seed in (1, 2, 1):
        agent = bare_agent(name, seed=seed)
        (followed,) = [attribute for attribute in ("q_network", "q_networks", "critics") if hasattr(agent, attribute)]
        assert equal(parameters(getattr(agent, followed)), parameters(getattr(agent, "target_" + followed.removeprefix("q_"))))
        made.append(agent.weights())
        torch.rand(seed)
        for layer in getattr(agent, followed).modules():  # of SAC's stacked networks: test_sac_agent.py
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                bound = layer.weight[0].numel() ** -0.5
                assert layer.weight.abs().max() <= bound and layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    one, other, again = made
    assert equal(one, again)
    ours, theirs = ([value for value in tensors(weights) if value.ndim > 1 and value.std() > 0] for weights in (one, other))
    assert len(ours) >= 5 and not any(map(torch.equal, ours, theirs))
