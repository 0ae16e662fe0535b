"""What is measured of a network beside its scores: dormant units, effective rank, norm."""

import math

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete

from agents import CPU, FRAMES, NUM_ACTIONS, AtariTransitions, dqn_agent
from conftest import load_script, scalars

SCRIPTS = ["dqn_atari", "sr_dqn_atari", "rde_dqn_atari", "rde_drq_atari", "rnd_dqn_atari"]
dqn = load_script("dqn_atari")


def network(name: str) -> tuple:
    """A script, and a Q-network of it."""
    script = load_script(name)
    if name in ("rnd_dqn_atari", "rde_drq_atari"):  # their buffers sum over n steps
        args = script.Args(buffer_size=200, n_step=3)
        buffer = script.ReplayBuffer(200, 1, CPU, torch.Generator().manual_seed(0), 3)
        AtariTransitions(buffer, 0, terminated=0.2).store(50)
        agent = script.Agent(args, FRAMES, Discrete(NUM_ACTIONS), buffer, CPU)
    else:
        agent = dqn_agent(script)
    return script, agent.q_networks[0] if hasattr(agent, "q_networks") else agent.q_network


def pictures(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 4, 84, 84), dtype=np.uint8))


def test_dormant_units_by_hand():
    """Layer by layer: a unit counts as a fraction of the mean of its own layer, whatever its sign, over space as well."""
    linear = torch.tensor([[0.0, 0.0, 2.0, -4.0], [0.0, 0.1, 2.0, 4.0]])  # scores 0, 0.05, 2, 4; mean 1.5125
    convolution = torch.zeros((2, 3, 2, 2))
    convolution[0, 1, 0, 0], convolution[:, 2] = 8.0, 9.0  # scores 0, 1, 9; mean 3.33
    assert dqn.dormant_units([linear]) == 1 / 4
    assert dqn.dormant_units([convolution]) == 1 / 3
    assert dqn.dormant_units([linear, convolution]) == 2 / 7
    assert dqn.dormant_units([linear, convolution], threshold=0.035) == 3 / 7
    assert dqn.dormant_units([linear * 1e3, convolution]) == 2 / 7
    assert dqn.dormant_units([torch.zeros(5, 2)]) == 1.0


@pytest.mark.parametrize("values, rank", [
    ([100.0, 1.0, 0.5], 2), ([100.0, 2.0], 2), ([100.0, 0.9], 1), ([1.0] * 50, 50), ([5.0, 0.0, 0.0], 1), ([1.0] * 200, 198),
])  # fmt: skip
def test_effective_rank_of_known_singular_values(values, rank):
    """The fewest of them that make up 99 % of the sum: of 200 equal ones 198."""
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (210, len(values)))
    features = left[:, : len(values)] * np.array(values) @ right
    if len(set(values)) == 1 and len(values) == 200:  # 198 of them are 99 % but for rounding
        assert dqn.effective_rank(torch.from_numpy(features)) in (198, 199)
    else:
        assert dqn.effective_rank(torch.from_numpy(features)) == rank


@pytest.mark.parametrize("name", SCRIPTS)
def test_plasticity_of_a_network(name, monkeypatch):
    """The layers are those that the network itself computes with; the norm is that of all weights together."""
    script, q_network = network(name)
    observations, inputs = pictures(8), []
    heads = [module for module in q_network.modules() if isinstance(module, torch.nn.Linear) and module.in_features == 512]
    hooks = [head.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0])) for head in heads]
    q_network(script.network_input(observations))
    for hook in hooks:
        hook.remove()
    seen = {}
    for function in ("dormant_units", "effective_rank"):
        monkeypatch.setattr(script, function, lambda x, name=function: seen.update({name: x}) or 7)
    result = script.plasticity(q_network, observations)
    assert torch.equal(seen["effective_rank"], inputs[0]) and inputs[0].shape == (8, 512)
    assert [layer.shape[0] for layer in seen["dormant_units"]] == [8] * 4
    assert [layer.shape[1] for layer in seen["dormant_units"]] == [32, 64, 64, 512]
    assert all(layer.min() == 0 for layer in seen["dormant_units"])  # after the ReLU
    squares = [parameter.double().square().sum().item() for parameter in q_network.parameters()]
    assert result["plasticity/weight_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-4)


def test_a_layer_that_died_is_counted():
    """None of the 512 units answers any more; what the 160 channels of the convolutions do is as it was."""
    q_network, observations = network("dqn_atari")[1], pictures(32)
    channels, x = [], dqn.network_input(observations)
    for layer in q_network.convolutions:
        x = layer(x)
        channels += [x] if isinstance(layer, torch.nn.ReLU) else []
    q_network.hidden.weight.data.zero_()
    q_network.hidden.bias.data.fill_(-1)
    result = dqn.plasticity(q_network, observations)
    assert result["plasticity/dormant_units"] == pytest.approx((160 * dqn.dormant_units(channels) + 512) / 672)
    assert result["plasticity/effective_rank"] == 1


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


@pytest.mark.parametrize("name, suffixes", [("sr", [""]), ("rde", ["_0", "_1"])])
def test_a_run_logs_it_with_its_evaluations(runs, name, suffixes):
    """One point at every evaluation, but for those right after a reset; of the networks as they are then."""
    curves = scalars(runs(name).path)
    steps = [step for step, _ in curves["eval/episodic_return"]]
    for suffix in suffixes:
        for tag, low, high in (("dormant_units", 0, 1), ("effective_rank", 1, 256), ("weight_norm", 1, 1000)):
            points = curves[f"plasticity/{tag}{suffix}"]
            assert [step for step, _ in points] == steps
            assert all(low <= value <= high for _, value in points)
    script, weights = load_script(runs(name).script), torch.load(runs(name).path / "model.pt")
    states = weights.get("q_networks") or [weights["q_network"]]
    observations = script.random_observations("BreakoutNoFrameskip-v4")
    for suffix, state in zip(suffixes, states, strict=True):
        q_network = script.QNetwork(len(state["output.bias"])).to(memory_format=torch.channels_last)
        q_network.load_state_dict(state)
        for tag, value in script.plasticity(q_network, observations).items():
            assert curves[tag + suffix][-1][1] == pytest.approx(value, rel=1e-3)
