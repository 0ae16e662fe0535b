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

from agents import dqn_agent, mlp_agent, networks, reset_in_turn, sac_agent, targets
from conftest import ROOT, equal, load_module, load_script, only_run, run_main, scalars

atari, sr = load_script("rde_dqn_atari"), load_script("sr_dqn_atari")


# ------------------------------------------------------------------------------------------------------------------ a norm


class NormedAtari(atari.QNetwork):
    """With a LayerNorm before the last ReLU."""

    def __init__(self, num_actions: int):
        super().__init__(num_actions)
        self.norm = nn.LayerNorm(512)

    def forward(self, observations):
        features = F.relu(self.norm(self.hidden(self.convolutions(observations))))
        return self.output(features)


def normed_agent(script, monkeypatch, **arguments):
    """An agent whose norms are not those that they began with."""
    monkeypatch.setattr(script, "QNetwork", NormedAtari)
    agent, generator = dqn_agent(script, seed=2, **arguments), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for network in (*networks(agent), *targets(agent)):
            for parameter in network.norm.parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return agent


def normed_q_values(weights: dict, x: torch.Tensor) -> torch.Tensor:
    """By plain function calls, in float64."""
    part = lambda name: (weights[f"{name}.weight"], weights[f"{name}.bias"])
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.conv2d(x, *part(f"convolutions.{layer}"), stride).relu()
    x = F.linear(x.flatten(1), *part("hidden"))
    deviation = x - x.mean(dim=1, keepdim=True)
    gain, shift = part("norm")
    x = deviation / (deviation.square().mean(dim=1, keepdim=True) + 1e-5).sqrt() * gain + shift
    return F.linear(x.relu(), *part("output"))


def test_the_gradients_of_a_norm_are_right(monkeypatch):
    """Of all parameters, against float64, and the gradient's norm; the targets are computed with the norm, too."""
    agent = normed_agent(atari, monkeypatch, max_grad_norm=1e6)
    before, state = copy.deepcopy((networks(agent), targets(agent))), agent.buffer.generator.get_state()
    frames, actions, rewards, terminated = (part.double() for part in agent.buffer.sample(agent.args.batch_size))
    agent.buffer.generator.set_state(state)
    agent.update()
    for i, (network, target) in enumerate(zip(*before, strict=True)):
        weights = {key: value.double().requires_grad_() for key, value in network.state_dict().items()}
        target_weights = {key: value.double() for key, value in target.state_dict().items()}
        next_values = normed_q_values(target_weights, frames[:, 1:] / 255).amax(1)
        td_targets = rewards + agent.args.gamma * (1 - terminated) * next_values
        q_values = normed_q_values(weights, frames[:, :4] / 255).gather(1, actions.long().view(-1, 1)).squeeze(1)
        gradients = torch.autograd.grad(F.smooth_l1_loss(q_values, td_targets), list(weights.values()))
        for (key, parameter), gradient in zip(networks(agent)[i].named_parameters(), gradients, strict=True):
            assert gradient.any() and (parameter.grad - gradient).norm() < 1e-4 * gradient.norm(), key
            assert not torch.equal(parameter, network.get_parameter(key)), key
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert agent.metrics[2, i].item() == pytest.approx(norm.item(), rel=1e-4)
    assert {"norm.weight", "norm.bias"} <= weights.keys() & agent.weights()["q_networks"][1].keys()


@pytest.mark.parametrize("script, depth", [(atari, "full"), (atari, "last1"), (atari, "last2"), (sr, "full")])
def test_a_full_reset_takes_a_norm_too(script, depth, monkeypatch):
    """last1 and last2 take the layers that they name."""
    agent = normed_agent(script, monkeypatch, reset_depth=depth)
    for _ in range(2):
        agent.update()
    (network, *others), (target, *other_targets) = networks(agent), targets(agent)
    before, untouched = copy.deepcopy(network.norm), copy.deepcopy([*others, *other_targets])
    assert (before.weight != 1).all() and (before.bias != 0).all()
    agent.reset()
    if depth == "full":
        assert (network.norm.weight == 1).all() and (network.norm.bias == 0).all()
    else:
        assert torch.equal(network.norm.weight, before.weight)
    assert torch.equal(target.norm.weight, network.norm.weight) and torch.equal(target.norm.bias, network.norm.bias)
    for parameter in network.norm.parameters():
        assert not any(moment.any() for moment in agent.optimizer.state[parameter].values())
    for other, expected in zip([*others, *other_targets], untouched, strict=True):
        assert equal(other.state_dict(), expected.state_dict())


def test_a_norm_all_of_whose_units_died_is_counted(monkeypatch):
    """512 of 672 units; the convolutions are as they were. Without the norm they would be alive."""
    network = networks(normed_agent(atari, monkeypatch))[0]
    observations, channels = torch.randint(0, 256, (32, 4, 84, 84), dtype=torch.uint8), []
    x = atari.network_input(observations)
    for layer in network.convolutions:
        x = layer(x)
        channels += [x] if isinstance(layer, nn.ReLU) else []
    alive = atari.plasticity(network, observations)
    active = sum((layer > 0).double().mean(dim=(0, 2, 3)).sum() for layer in channels).item() / 672
    assert alive["plasticity/active_units"] > active + 0.2
    assert alive["plasticity/effective_rank"] > 1 and alive["plasticity/stable_rank"] >= 1
    network.norm.weight.data.zero_()
    network.norm.bias.data.fill_(-1)
    dead = atari.plasticity(network, observations)
    assert dead["plasticity/dormant_units"] == pytest.approx((160 * atari.dormant_units(channels) + 512) / 672)
    assert dead["plasticity/active_units"] == pytest.approx(active, rel=1e-5)
    assert dead["plasticity/effective_rank"] == 1 and dead["plasticity/stable_rank"] == 0


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


@pytest.mark.parametrize("name, layer", [("rde_dqn_atari", "outptu"), ("sr_dqn_atari", "head")])
def test_a_wrong_name_of_a_layer_fails_at_the_start(tmp_path, name, layer):
    """And not hours later, at the first reset."""
    script = changed(tmp_path, name, ('"last1": ["output"]', f'"last1": ["{layer}"]'))
    result = run_main(script, "--env-id", "BreakoutNoFrameskip-v4", "--runs-dir", tmp_path / "runs")
    assert result.returncode == 1 and layer in result.stderr.splitlines()[-1]
    assert not (only_run(tmp_path / "runs") / "checkpoint.pt").exists()


def test_one_more_metric_is_a_name_and_a_value(tmp_path):
    """From learning on to the log, over a checkpoint. (In a script of networks that are not stacked: test_your_own_variant.py)"""
    script = changed(
        tmp_path, "rde_sac_dmc", ('"actor_loss", "alpha")', '"actor_loss", "alpha", "largest_q_value")'),
        ("actor_losses.detach(), alphas.squeeze(1)]", "actor_losses.detach(), alphas.squeeze(1), q_values.detach().amax((1, 2))]"),
    )  # fmt: skip
    arguments = "--env-id cartpole-swingup --total-timesteps 300 --learning-starts 100 --batch-size 8 --buffer-size 200"
    arguments += " --hidden-dim 8 --eval-interval 0 --eval-episodes 1 --checkpoint-interval 100"
    result = run_main(script, *arguments.split(), "--runs-dir", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    curves = scalars(only_run(tmp_path / "runs"))
    for agent in (0, 1):
        largest, mean = (dict(curves[f"losses/{name}_{agent}"]) for name in ("largest_q_value", "q_values"))
        assert largest.keys() == mean.keys() and len(largest) >= 1
        assert all(largest[step] > mean[step] for step in mean)


# ----------------------------------------------------------------------------------------------- another order of resets


AGENTS = {"rde_dqn_atari": dqn_agent, "rde_dqn": mlp_agent, "rde_sac_dmc": sac_agent, "rde_sac_safety": sac_agent}


@pytest.mark.parametrize("name", AGENTS)
def test_the_oldest_agent_is_what_the_weights_say(name):
    """In a copy that resets its agents in another order, for example those that act least, their number does not tell it."""
    agent, other = (AGENTS[name](load_script(name), num_agents=3, seed=seed) for seed in (1, 5))
    reset_in_turn(agent, 4)  # in the scripts' own order agent 1 would be the oldest
    agent.oldest.fill_(2)
    file = io.BytesIO()
    torch.save(agent.weights(), file)
    file.seek(0)
    weights, address = torch.load(file, weights_only=True), other.oldest.data_ptr()
    assert (weights["oldest_agent"], weights["num_resets"]) == (2, 4)
    other.load_weights(weights)
    assert other.oldest.tolist() == [2] and other.oldest.data_ptr() == address and len(other.resets) == 4
