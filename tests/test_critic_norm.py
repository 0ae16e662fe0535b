"""--critic-norm layer: LayerNorm in the critics, network by network, against torch.nn.LayerNorm; resets, targets, model.pt."""

import copy
import io

import pytest
import torch
import torch.nn as nn

from agents import sac_agent, safety_agent, updated
from conftest import load_script

CRITICS_PER_AGENT = {"rde_sac_dmc": 2, "rde_sac_safety": 3}


@pytest.fixture(params=CRITICS_PER_AGENT)
def script(request):
    return load_script(request.param)


def normed_agent(script, num_agents: int = 2, **arguments):
    """An agent whose gains and shifts are not those that it began with."""
    if script.__name__.endswith("safety"):
        agent = safety_agent(script, num_agents, critic_norm="layer", **arguments)
    else:
        agent = sac_agent(script, num_agents, critic_norm="layer", **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*agent.critics.gains, *agent.critics.shifts):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return agent


def reference(stacked, network: int) -> nn.Sequential:
    """The same network out of PyTorch's own layers, in float64."""
    layers = []
    for depth, (weight, bias) in enumerate(stacked.layers):
        linear = nn.Linear(weight.shape[1], weight.shape[2])
        linear.weight.data, linear.bias.data = weight[network].T.clone(), bias[network, 0].clone()
        layers.append(linear)
        if depth < len(stacked.norms):
            gain, shift = stacked.norms[depth]
            norm = nn.LayerNorm(weight.shape[2])
            norm.weight.data, norm.bias.data = gain[network, 0].clone(), shift[network, 0].clone()
            layers += [norm, nn.ReLU()]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("networks", [None, [3, 1]])
def test_forward_and_gradients_are_those_of_layer_norm(script, networks):
    stacked = normed_agent(script).critics
    count, inputs_dim = len(stacked.weights[0]) if networks is None else 2, stacked.weights[0].shape[1]
    inputs = torch.randn(count, 7, inputs_dim, generator=torch.Generator().manual_seed(0))
    outputs = stacked(inputs, None if networks is None else torch.tensor(networks))
    factors = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    gradients = dict(zip(stacked.state_dict(), torch.autograd.grad((outputs * factors).sum(), list(stacked.parameters()))))
    for i, network in enumerate(range(count) if networks is None else networks):
        expected = reference(stacked, network)
        output = expected(inputs[i].double())
        torch.testing.assert_close(outputs[i].double(), output, rtol=1e-4, atol=1e-5)
        (output * factors[i]).sum().backward()
        linears = [layer for layer in expected if isinstance(layer, nn.Linear)]
        norms = [layer for layer in expected if isinstance(layer, nn.LayerNorm)]
        assert len(norms) == len(linears) - 1 == 2
        of_layers = [(f"weights.{k}", layer.weight.grad.T) for k, layer in enumerate(linears)]
        of_layers += [(f"biases.{k}", layer.bias.grad) for k, layer in enumerate(linears)]
        of_layers += [(f"gains.{k}", layer.weight.grad) for k, layer in enumerate(norms)]
        of_layers += [(f"shifts.{k}", layer.bias.grad) for k, layer in enumerate(norms)]
        assert {name for name, _ in of_layers} == gradients.keys()
        for name, gradient in of_layers:
            ours = gradients[name][network].double()
            torch.testing.assert_close(ours.view(gradient.shape), gradient, rtol=1e-3, atol=1e-5)


def test_gains_and_shifts_learn_and_the_targets_follow(script):
    agent = normed_agent(script, tau=0.25)
    before = copy.deepcopy(agent.critics), copy.deepcopy(agent.target_critics)
    updated(agent)
    critics, targets = agent.critics, agent.target_critics
    for name in ("gains", "shifts"):
        for k, parameter in enumerate(getattr(critics, name)):
            old = getattr(before[0], name)[k]
            moved = (parameter - old).abs().amax(dim=(1, 2))
            assert (moved > 1e-6).all(), "of every network"
            expected = torch.lerp(getattr(before[1], name)[k], parameter, 0.25)
            torch.testing.assert_close(getattr(targets, name)[k], expected)
    assert not agent.actors.norms, "the actors have none"


def test_a_reset_takes_gains_and_shifts_too(script):
    """All of the oldest agent's critics, and of no other; Adam's moments of them as well."""
    agent, per_agent = normed_agent(script), CRITICS_PER_AGENT[script.__name__.split(".")[-1]]
    updated(agent)
    before = copy.deepcopy(agent.critics)
    assert agent.reset() == 0
    for values, name in ((1.0, "gains"), (0.0, "shifts")):
        for k, parameter in enumerate(getattr(agent.critics, name)):
            assert (parameter[:per_agent] == values).all() and torch.equal(
                parameter[per_agent:], getattr(before, name)[k][per_agent:]
            )
            assert (getattr(agent.target_critics, name)[k][:per_agent] == values).all()
    num_tensors = len(list(agent.critics.parameters()))
    for index, group in enumerate(agent.critic_optimizer.param_groups):
        assert len(group["params"]) == num_tensors
        for parameter in group["params"]:
            assert all(bool(state.any()) == (index == 1) for state in agent.critic_optimizer.state[parameter].values())


def test_the_weights_of_a_model_hold_them(script):
    agent = normed_agent(script, seed=1)
    file = io.BytesIO()
    torch.save(agent.weights(), file)
    file.seek(0)
    weights, other = torch.load(file, weights_only=True), normed_agent(script, seed=5)
    other.load_weights(weights)
    for name, value in agent.critics.state_dict().items():
        assert torch.equal(other.critics.state_dict()[name], value)
    assert sum(name.startswith(("gains", "shifts")) for name in weights["critics"]) == 4


def test_without_a_norm_there_is_nothing_more(script):
    critics = script.StackedMLP(2, [3, 4, 1])
    assert [name.split(".")[0] for name in critics.state_dict()] == ["weights"] * 2 + ["biases"] * 2
