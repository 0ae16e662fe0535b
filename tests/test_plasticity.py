"""What is measured of a network beside its scores, also of a network of somebody's own."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.spaces import Discrete

from agents import CPU, FRAMES, make_agent, networks
from conftest import load_script, model, scalars

SCRIPTS = ["dqn_atari", "rde_drq_atari", "rnd_dqn_atari"]  # those whose networks differ
dqn = load_script("dqn_atari")


def layers_by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """What two layers answer to a batch of two."""
    linear = torch.tensor([[0.0, 0.0, 2.0, -4.0], [0.0, 0.1, 2.0, 4.0]])  # mean absolute values 0, 0.05, 2, 4
    convolution = torch.zeros((2, 3, 2, 2))
    convolution[0, 1, 0, 0], convolution[:, 2] = 8.0, 9.0  # 0, 1, 9
    return linear, convolution


def test_dormant_units_by_hand():
    """Layer by layer: a unit counts as a fraction of the mean of its own layer, whatever its sign, over space as well."""
    linear, convolution = layers_by_hand()  # whose means are 1.5125 and 3.33
    assert dqn.dormant_units([linear]) == 1 / 4
    assert dqn.dormant_units([convolution]) == 1 / 3
    assert dqn.dormant_units([linear, convolution]) == 2 / 7
    assert dqn.dormant_units([linear, convolution], threshold=0.035) == 3 / 7
    assert dqn.dormant_units([linear * 1e3, convolution]) == 2 / 7
    assert dqn.dormant_units([torch.zeros(5, 2)]) == 1.0


@pytest.mark.parametrize("values, effective, stable", [
    ([100.0, 1.0, 0.5], 2, 1.000125), ([100.0, 2.0], 2, 1.0004), ([100.0, 0.9], 1, 1.000081), ([1.0] * 50, 50, 50.0),
    ([5.0, 0.0, 0.0], 1, 1.0), ([3.0, 4.0], 2, 25 / 16), ([0.0, 0.0], 1, 0.0), ([1.0] * 210, 208, 210.0),
])  # fmt: skip
def test_ranks_of_known_singular_values(values, effective, stable):
    """The fewest of them that make up 99 % of the sum (of 210 equal ones 207.9); the sum of squares over the largest one."""
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert dqn.effective_rank(values) == effective
    assert dqn.stable_rank(values) == pytest.approx(stable, rel=1e-12)


def test_active_units_by_hand():
    """The mean over all units of how often each is above 0, over the batch and its places."""
    linear, convolution = layers_by_hand()  # 0, 1/2, 1, 1/2 and 0, 1/8, 1
    assert dqn.active_units([linear]) == pytest.approx(2 / 4)
    assert dqn.active_units([convolution]) == pytest.approx((1 / 8 + 1) / 3)
    assert dqn.active_units([linear, convolution]) == pytest.approx((2 + 1 + 1 / 8) / 7)
    assert dqn.active_units([torch.zeros(5, 2)]) == 0.0


@pytest.mark.parametrize("name", SCRIPTS)
def test_plasticity_of_a_network(name):
    """The layers are those that the network itself computes with; the norm is that of all weights together."""
    script, seen = load_script(name), []
    q_network = networks(make_agent(name, **{"width": 1.0} if "drq" in name else {}))[0]
    observations = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 4, 84, 84), dtype=np.uint8))
    layers = [module for module in q_network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][:4]
    hooks = [layer.register_forward_hook(lambda module, inputs, output: seen.append(output.clamp(min=0))) for layer in layers]
    result = script.plasticity(q_network, observations)
    for hook in hooks:
        hook.remove()
    assert [layer.shape[:2] for layer in seen] == [(8, count) for count in (32, 64, 64, 512)]
    assert result["plasticity/dormant_units"] == script.dormant_units(seen)
    assert result["plasticity/active_units"] == script.active_units(seen)
    singular_values = np.linalg.svd(seen[-1].double().detach().numpy(), compute_uv=False)
    assert result["plasticity/stable_rank"] == pytest.approx((singular_values**2).sum() / singular_values[0] ** 2, rel=1e-6)
    assert result["plasticity/effective_rank"] == 1 + (singular_values.cumsum() < 0.99 * singular_values.sum()).sum()
    squares = [parameter.double().square().sum().item() for parameter in q_network.parameters()]
    assert result["plasticity/weight_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)
    assert len(result) == 5


class Counter:
    """An environment whose observations are numbered; every tenth step ends the episode."""

    action_space = Discrete(3)

    def __init__(self):
        self.time, self.seeds, self.actions = 0, [], []

    def reset(self, seed=None):
        self.seeds.append(seed)
        self.time += 100 * (seed is None)  # so that it can be seen
        return np.full((4, 84, 84), self.time, np.uint8), {}

    def step(self, action):
        self.time += 1
        self.actions.append(int(action))
        return np.full((4, 84, 84), self.time, np.uint8), 0.0, self.time % 10 == 0, False, {}

    def close(self):
        self.time = None


def test_the_observations_are_every_fourth_of_random_play(monkeypatch):
    env = Counter()
    monkeypatch.setattr(dqn, "make_env", lambda args: env)
    observations = dqn.random_observations.__wrapped__("a game", 5)
    assert observations[:, 0, 0, 0].tolist() == [0, 4, 8, 112, 116] and env.seeds == [0, None, None] and env.time is None
    assert set(env.actions) == {0, 1, 2}


def test_the_observations_are_those_of_the_game_whatever_the_run():
    observations = dqn.random_observations("BreakoutNoFrameskip-v4")
    assert observations.shape == (256, 4, 84, 84) and observations.dtype == torch.uint8
    assert torch.equal(observations, load_script("rde_drq_atari").random_observations("BreakoutNoFrameskip-v4"))
    assert len(observations.flatten(1).unique(dim=0)) > 200
    assert not torch.equal(observations, dqn.random_observations("QbertNoFrameskip-v4"))


@pytest.mark.parametrize("name, suffixes", [("sr", [""]), ("rde", ["_0", "_1"]), ("drq", ["_0", "_1"]), ("rnd", [""])])
def test_a_run_logs_it_with_its_evaluations(runs, name, suffixes):
    """One point at every evaluation, but for those right after a reset; of the networks as they are then."""
    path, script = runs(name).path, load_script(runs(name).script)
    curves = scalars(path)
    steps = [step for step, _ in curves["eval/episodic_return"]]
    for suffix in suffixes:
        for tag, low, high in (("dormant_units", 0, 1), ("active_units", 0, 1), ("effective_rank", 1, 256),
                               ("stable_rank", 1, 256), ("weight_norm", 1, 1000)):  # fmt: skip
            points = curves[f"plasticity/{tag}{suffix}"]
            assert [step for step, _ in points] == steps
            assert all(low <= value <= high for _, value in points)
    agent = script.Agent(script.Args(**json.loads((path / "args.json").read_text())["args"]), FRAMES, Discrete(4), None, CPU)
    agent.load_weights(model(path))
    observations = script.random_observations("BreakoutNoFrameskip-v4")
    for suffix, q_network in zip(suffixes, networks(agent), strict=True):
        for tag, value in script.plasticity(q_network, observations).items():
            assert curves[tag + suffix][-1][1] == pytest.approx(value, rel=1e-3)


# ------------------------------------------------------------------------------------------------ an encoder of somebody's own


class Residual(nn.Module):
    """With a block whose input is added to its output. `relu` is how it calls its ReLU."""

    def __init__(self, relu):
        super().__init__()
        self.relu, self.start = relu, nn.Conv2d(4, 6, 8, stride=4)
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.hidden, self.output = nn.Linear(6 * 400, 10), nn.Linear(10, 5)

    def forward(self, observations):
        x = self.start(observations)
        x = x + self.second(self.relu(self.first(self.relu(x))))
        return self.output(self.relu(self.hidden(self.relu(x).flatten(1))))


RELUS = {
    "F.relu": F.relu, "torch.relu": torch.relu, "a tensor's method": lambda x: x.relu(), "a module": nn.ReLU(),
    "a module, in place": lambda x, relu=nn.ReLU(inplace=True): relu(x.clone()), "then changed in place": lambda x: F.relu(x).add_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", RELUS)
def test_all_activations_of_a_residual_encoder_are_seen(name):
    """Whatever calls the ReLU: two in the block, one before and one after the layer of 10."""
    torch.manual_seed(1)
    observations, expected = torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8), []

    def relu(x):
        expected.append(x.clamp(min=0))
        return expected[-1] + (name == "then changed in place")

    network, inputs = Residual(relu), dqn.network_input(observations)
    with torch.no_grad():
        network(inputs)
        network.relu = RELUS[name]
        with dqn.Activations() as activations:
            network(inputs)
    assert [layer.shape[1] for layer in activations.seen] == [6, 6, 6, 10]
    for seen, layer in zip(activations.seen, expected, strict=True):
        torch.testing.assert_close(seen, layer)
    measured = dqn.plasticity(network, observations)
    assert measured["plasticity/dormant_units"] == pytest.approx(dqn.dormant_units(expected))
    assert measured["plasticity/active_units"] == pytest.approx(dqn.active_units(expected), rel=1e-5)
