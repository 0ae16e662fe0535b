"""What people add to a script that they copied: a norm, an encoder, a metric, another order of resets.

It is ordinary PyTorch and works at once, or it fails at the start. What is added to SAC's stacked networks: test_sac_agent.py.
Whole runs of such copies: test_your_own_variant.py.
"""

import copy
import io

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from agents import dqn_agent, mlp_agent, networks, sac_agent, safety_agent, targets
from conftest import ROOT, load_module, load_script, only_run, run_main, scalars

atari, mlp = load_script("rde_dqn_atari"), load_script("rde_dqn")


# ------------------------------------------------------------------------------------------------------------------ a norm


class NormedAtari(atari.QNetwork):
    """With a LayerNorm before the last ReLU."""

    def __init__(self, num_actions: int):
        super().__init__(num_actions)
        self.norm = nn.LayerNorm(512)

    def forward(self, observations):
        features = F.relu(self.norm(self.hidden(self.convolutions(observations))))
        return self.output(features)


class NormedMLP(mlp.QNetwork):
    """With a LayerNorm after the first layer."""

    def __init__(self, args, observation_dim: int, num_actions: int):
        super().__init__(args, observation_dim, num_actions)
        self.insert(1, nn.LayerNorm(args.hidden_dim))


def normed_agent(script, monkeypatch, **arguments):
    """An agent of two whose norms are not those that they began with, and the name of the norm."""
    is_atari = script is atari
    monkeypatch.setattr(script, "QNetwork", NormedAtari if is_atari else NormedMLP)
    agent = dqn_agent(script, seed=2, num_agents=2, **arguments) if is_atari else mlp_agent(script, 2, **arguments)
    generator, name = torch.Generator().manual_seed(3), "norm" if is_atari else "1"
    with torch.no_grad():
        for network in (*networks(agent), *targets(agent)):
            for parameter in network.get_submodule(name).parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return agent, name


def normed_q_values(script, weights: dict, x: torch.Tensor) -> torch.Tensor:
    """By plain function calls, in float64."""
    linear = lambda name, x: x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        deviation = x - x.mean(dim=1, keepdim=True)
        x = deviation / (deviation.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    if script is mlp:
        x = norm("1", linear("0", x)).relu()
        return linear("7", linear("5", linear("3", x).relu()).relu())
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.conv2d(x, weights[f"convolutions.{layer}.weight"], weights[f"convolutions.{layer}.bias"], stride).relu()
    return linear("output", norm("norm", linear("hidden", x.flatten(1))).relu())


@pytest.mark.parametrize("script", [atari, mlp], ids=lambda script: script.__name__)
def test_the_gradients_of_a_norm_are_right(script, monkeypatch):
    """Of all parameters, against float64, and the gradient's norm; the targets are computed with the norm, too."""
    agent, name = normed_agent(script, monkeypatch, max_grad_norm=1e6)
    before, state = copy.deepcopy((networks(agent), targets(agent))), agent.buffer.generator.get_state()
    batch = agent.buffer.sample(agent.args.batch_size)
    agent.buffer.generator.set_state(state)
    agent.update()
    if script is atari:
        frames, actions, rewards, terminated = (part.double() for part in batch)
        observations, next_observations = frames[:, :4] / 255, frames[:, 1:] / 255
    else:
        observations, actions, rewards, terminated, next_observations = (part.double() for part in batch)
    for i, (network, target) in enumerate(zip(*before, strict=True)):
        weights = {key: value.double().requires_grad_() for key, value in network.state_dict().items()}
        target_weights = {key: value.double() for key, value in target.state_dict().items()}
        next_values = normed_q_values(script, target_weights, next_observations).amax(1)
        td_targets = rewards + agent.args.gamma * (1 - terminated) * next_values
        q_values = normed_q_values(script, weights, observations).gather(1, actions.long().view(-1, 1)).squeeze(1)
        gradients = torch.autograd.grad(F.smooth_l1_loss(q_values, td_targets), list(weights.values()))
        for (key, parameter), gradient in zip(networks(agent)[i].named_parameters(), gradients, strict=True):
            assert gradient.any() and (parameter.grad - gradient).norm() < 1e-4 * gradient.norm(), key
            assert not torch.equal(parameter, network.get_parameter(key)), key
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert agent.metrics[2, i].item() == pytest.approx(norm.item(), rel=1e-4)
    assert {f"{name}.weight", f"{name}.bias"} <= weights.keys() & agent.weights()["q_networks"][1].keys()


@pytest.mark.parametrize("script, arguments, is_reset", [
    (atari, {"reset_depth": "full"}, True), (atari, {"reset_depth": "last1"}, False), (atari, {"reset_depth": "last2"}, False),
    (mlp, {}, True), (load_script("sr_dqn_atari"), {"reset_depth": "full"}, True),
])  # fmt: skip
def test_a_full_reset_takes_a_norm_too(script, arguments, is_reset, monkeypatch):
    """last1 and last2 take the layers that they name."""
    if script not in (atari, mlp):  # SR+DQN, whose network is the same
        monkeypatch.setattr(script, "QNetwork", NormedAtari)
        agent, name = dqn_agent(script, **arguments), "norm"
        networks(agent)[0].norm.weight.data.fill_(2.0)
        networks(agent)[0].norm.bias.data.fill_(2.0)
    else:
        agent, name = normed_agent(script, monkeypatch, **arguments)
    for _ in range(2):
        agent.update()
    norm = lambda which, i=0: which(agent)[i].get_submodule(name)
    before = copy.deepcopy(norm(networks))
    assert (before.weight != 1).all() and (before.bias != 0).all()
    others = copy.deepcopy([which(agent)[1].state_dict() for which in (networks, targets)]) if len(networks(agent)) > 1 else []
    agent.reset()
    assert bool((norm(networks).weight == 1).all() and (norm(networks).bias == 0).all()) == is_reset
    assert is_reset or torch.equal(norm(networks).weight, before.weight)
    assert torch.equal(norm(targets).weight, norm(networks).weight) and torch.equal(norm(targets).bias, norm(networks).bias)
    for parameter in norm(networks).parameters():
        assert not any(moment.any() for moment in agent.optimizer.state[parameter].values())
    for which, other in zip((networks, targets), others):
        assert all(torch.equal(value, other[key]) for key, value in which(agent)[1].state_dict().items())


def test_a_norm_all_of_whose_units_died_is_counted(monkeypatch):
    """512 of 672 units; the convolutions are as they were. Without the norm they would be alive."""
    agent, _ = normed_agent(atari, monkeypatch)
    network, observations = networks(agent)[0], torch.randint(0, 256, (32, 4, 84, 84), dtype=torch.uint8)
    channels, x = [], atari.network_input(observations)
    for layer in network.convolutions:
        x = layer(x)
        channels += [x] if isinstance(layer, nn.ReLU) else []
    alive, rates = (
        atari.plasticity(network, observations),
        [(layer > 0).double().mean(dim=(0, 2, 3)).sum() for layer in channels],
    )
    assert alive["plasticity/active_units"] > sum(rates).item() / 672 + 0.2
    network.norm.weight.data.zero_()
    network.norm.bias.data.fill_(-1)
    dead = atari.plasticity(network, observations)
    assert dead["plasticity/dormant_units"] == pytest.approx((160 * atari.dormant_units(channels) + 512) / 672)
    assert dead["plasticity/active_units"] == pytest.approx(sum(rates).item() / 672, rel=1e-5)
    assert dead["plasticity/effective_rank"] == 1 and dead["plasticity/stable_rank"] == 0
    assert alive["plasticity/effective_rank"] > 1 and alive["plasticity/stable_rank"] >= 1


# -------------------------------------------------------------------------------------------------------------- an encoder


class Residual(nn.Module):
    def __init__(self, channels: int, relu):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.relu = relu

    def forward(self, x):
        return x + self.second(self.relu(self.first(self.relu(x))))


class Impala(nn.Module):
    """A small one, with two residual blocks. `relu` is how it calls its ReLU."""

    def __init__(self, num_actions: int, relu=F.relu):
        super().__init__()
        self.relu = relu
        self.encoder = nn.Sequential(
            nn.Conv2d(4, 6, 8, stride=4), Residual(6, relu), nn.Conv2d(6, 7, 4, stride=2), Residual(7, relu)
        )
        self.hidden, self.output = nn.Linear(7 * 81, 10), nn.Linear(10, num_actions)

    def forward(self, observations):
        features = self.relu(self.encoder(observations)).flatten(1)
        return self.output(self.relu(self.hidden(features)))


RELUS = {
    "F.relu": F.relu, "torch.relu": torch.relu, "a tensor's method": lambda x: x.relu(), "a module": nn.ReLU(),
    "a module, in place": lambda x, relu=nn.ReLU(inplace=True): relu(x.clone()), "then changed in place": lambda x: F.relu(x).add_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", RELUS)
def test_all_activations_of_a_residual_encoder_are_seen(name):
    """Two in each block, one before and one after the layer of 10: 6 + 6 + 7 + 7 + 7 + 10 units, whatever calls the ReLU."""
    torch.manual_seed(1)
    network, observations = Impala(5, RELUS[name]), torch.randint(0, 256, (16, 4, 84, 84), dtype=torch.uint8)
    expected, added = [], int(name == "then changed in place")

    def relu(x):
        expected.append(x.clamp(min=0))
        return expected[-1] + added

    with torch.no_grad():
        x = network.encoder[0](atari.network_input(observations))
        for block, following in ((network.encoder[1], network.encoder[2]), (network.encoder[3], lambda x: x)):
            x = following(x + block.second(relu(block.first(relu(x)))))
        relu(network.hidden(relu(x).flatten(1)))
        with atari.Activations() as activations:
            network(atari.network_input(observations))
    assert [layer.shape[1] for layer in activations.seen] == [6, 6, 7, 7, 7, 10]
    for seen, layer in zip(activations.seen, expected, strict=True):
        torch.testing.assert_close(seen, layer)
    measured = atari.plasticity(network, observations)
    dormant = [layer.abs().transpose(0, 1).flatten(1).mean(dim=1) for layer in expected]
    dormant = sum((scores <= 0.025 * scores.mean()).sum().item() for scores in dormant)
    assert dormant > 0 and measured["plasticity/dormant_units"] == pytest.approx(dormant / 43)
    active = sum((layer > 0).double().transpose(0, 1).flatten(1).mean(dim=1).sum().item() for layer in expected)
    assert measured["plasticity/active_units"] == pytest.approx(active / 43, rel=1e-5)


def test_an_agent_learns_with_a_residual_encoder(monkeypatch):
    monkeypatch.setattr(atari, "QNetwork", Impala)
    agent = dqn_agent(atari, num_agents=2, batch_size=4, reset_depth="full")
    before = [copy.deepcopy(network.state_dict()) for network in networks(agent)]
    agent.update()
    for network, old in zip(networks(agent), before):
        assert all(not torch.equal(value, old[name]) for name, value in network.state_dict().items())
    after = copy.deepcopy(networks(agent)[1].state_dict())
    agent.reset()
    assert all((value != before[0][name]).any() for name, value in networks(agent)[0].state_dict().items())
    assert all(torch.equal(value, after[name]) for name, value in networks(agent)[1].state_dict().items())


# ---------------------------------------------------------------------------------------------------- edits of a whole script


def changed(tmp_path, name: str, *edits: tuple[str, str]):
    """A copy of the script, as a module, with pieces of its text replaced."""
    text = (ROOT / f"{name}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = tmp_path / f"my_{name}.py"
    path.write_text(text)
    return load_module(f"my_{name}_{tmp_path.name}", path)


QUICK_ATARI = (
    "--env-id BreakoutNoFrameskip-v4 --total-timesteps 120 --learning-starts 60 --batch-size 4 --buffer-size 100 "
    "--eval-interval 0 --eval-episodes 1 --eval-epsilon 1 --replay-ratio 0.1"
).split()
QUICK_MLP = (
    "--env-id CartPole-v1 --total-timesteps 300 --learning-starts 100 --batch-size 8 --buffer-size 200 --hidden-dim 8 "
    "--eval-interval 0 --eval-episodes 1"
).split()


@pytest.mark.parametrize("name, layer", [("rde_dqn_atari", "outptu"), ("sr_dqn_atari", "head")])
def test_a_wrong_name_of_a_layer_fails_at_the_start(tmp_path, name, layer):
    """And not hours later, at the first reset."""
    script = changed(tmp_path, name, ('"last1": ["output"]', f'"last1": ["{layer}"]'))
    result = run_main(script, *QUICK_ATARI, "--runs-dir", tmp_path / "runs")
    assert result.returncode == 1 and layer in result.stderr.splitlines()[-1]
    assert not (only_run(tmp_path / "runs") / "checkpoint.pt").exists()


METRIC = 'METRICS = ("td_loss", "q_values", "gradient_norm")'
LARGEST = METRIC.replace(")", ', "largest_q_value")')


@pytest.mark.parametrize("name, arguments, tags, edits", [
    ("dqn_atari", [*QUICK_ATARI, "--replay-ratio", "1"], ["largest_q_value"],
     [("q_values.detach().mean(), gradient_norm]", "q_values.detach().mean(), gradient_norm, q_values.detach().max()]")]),
    ("rde_sac_dmc", [*QUICK_MLP, "--env-id", "cartpole-swingup"], ["largest_q_value_0", "largest_q_value_1"],
     [("METRICS = (\"critic_loss\", \"q_values\", \"actor_loss\", \"alpha\")",
       "METRICS = (\"critic_loss\", \"q_values\", \"actor_loss\", \"alpha\", \"largest_q_value\")"),
      ("actor_losses.detach(), alphas.squeeze(1)]", "actor_losses.detach(), alphas.squeeze(1), q_values.detach().amax((1, 2))]")]),
])  # fmt: skip
def test_one_more_metric_is_a_name_and_a_value(tmp_path, name, arguments, tags, edits):
    """From learning on to the log, over a checkpoint."""
    if name != "rde_sac_dmc":
        edits = [(METRIC, LARGEST), *edits]
    script = changed(tmp_path, name, *edits)
    result = run_main(script, *arguments, "--checkpoint-interval", "100", "--runs-dir", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    curves = scalars(only_run(tmp_path / "runs"))
    for tag in tags:
        largest, mean = (dict(curves[f"losses/{of}"]) for of in (tag, tag.replace("largest_q_value", "q_values")))
        assert largest.keys() == mean.keys() and len(largest) >= 1
        assert all(largest[step] > mean[step] for step in mean)


# ----------------------------------------------------------------------------------------------- another order of resets


AGENTS = {
    "rde_dqn_atari": dqn_agent, "rde_dqn": mlp_agent, "rde_sac_dmc": sac_agent, "rde_sac_safety": safety_agent
}  # fmt: skip


@pytest.mark.parametrize("name", AGENTS)
def test_the_oldest_agent_is_what_the_weights_say(name):
    """In a copy that resets its agents in another order, for example those that act least, `num_resets` does not tell it."""
    script = load_script(name)
    make = lambda seed: dqn_agent(script, seed, num_agents=3) if name == "rde_dqn_atari" else AGENTS[name](script, 3, seed=seed)
    agent = make(1)
    agent.num_resets = 4  # in the scripts' own order agent 1 would be the oldest
    agent.oldest.fill_(2)
    file = io.BytesIO()
    torch.save(agent.weights(), file)
    file.seek(0)
    weights, other = torch.load(file, weights_only=True), make(5)
    assert (weights["oldest_agent"], weights["num_resets"]) == (2, 4)
    address = other.oldest.data_ptr()
    other.load_weights(weights)
    assert other.oldest.tolist() == [2] and other.oldest.data_ptr() == address and other.num_resets == 4
