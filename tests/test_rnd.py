"""Random Network Distillation and the dueling DQN that follows it, in numbers."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_capture import watched

from conftest import QUICK, load_script, model, only_run, run_main, scalars

rnd = load_script("rnd_dqn_atari")
CPU = torch.device("cpu")
NUM_ACTIONS = 5
# Two heads, one head, and without a bonus: dueling DQN.
KINDS = [{}, {"num_heads": 1}, {"intrinsic_coef": 0.0}]


def pictures(seed: int, *shape: int) -> torch.Tensor:
    """Frames of blocks of 12 x 12 pixels, some of which never change: more like screens than noise is."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape, 7, 7), dtype=np.uint8).repeat(12, -1).repeat(12, -2)
    blocks[..., :12, :] = 77
    return torch.from_numpy(blocks)


def make_agent(seed: int = 1, num_frames: int = 20, **arguments):
    """An agent on a buffer of 200 transitions, with statistics of some frames and their bonus."""
    args = rnd.Args(**{"buffer_size": 200, "seed": seed} | arguments)
    buffer = rnd.ReplayBuffer(200, 1, CPU, torch.Generator().manual_seed(seed), args.n_step)
    rng, frames = np.random.default_rng(seed), iter(pictures(seed, 402).numpy())
    buffer.start_episode(0, next(frames))
    for _ in range(200):
        event = rng.choice(["go on", "terminated", "truncated"], p=[0.75, 0.15, 0.1])
        buffer.add(0, int(rng.integers(NUM_ACTIONS)), float(rng.integers(-1, 2)), next(frames), event == "terminated")
        if event != "go on":
            buffer.start_episode(0, next(frames))
    agent = rnd.Agent(args, None, gym.spaces.Discrete(NUM_ACTIONS), buffer, CPU)
    for observations in pictures(seed + 100, num_frames, args.num_envs, 4) if agent.rnd is not None else ():
        agent.rnd.follow(observations, count_returns=True)
    return agent


def parameters(network: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(ours, theirs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------- references, in float64


def doubles(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() for name, value in module.state_dict().items()}


def reference_q_values(weights: dict, observations: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(batch, 4, 84, 84) in [0, 1] to (num_heads, batch, actions), by plain function calls."""
    x = observations
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.conv2d(x, weights[f"convolutions.{layer}.weight"], weights[f"convolutions.{layer}.bias"], stride).relu()
    x = (x.flatten(1) @ weights["hidden.weight"].T + weights["hidden.bias"]).relu()
    heads = []
    for i in range(num_heads):
        value, advantage = (
            x @ weights[f"heads.{i}.{part}.weight"].T + weights[f"heads.{i}.{part}.bias"] for part in ("value", "advantage")
        )
        heads.append(value + advantage - advantage.mean(1, keepdim=True))
    return torch.stack(heads)


def reference_features(weights: dict, inputs: torch.Tensor, num_linear: int) -> torch.Tensor:
    x = inputs
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.leaky_relu(F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride), 0.2)
    x = x.flatten(1)
    for i in range(num_linear):
        x = x.relu() if i else x
        x = x @ weights[f"{7 + 2 * i}.weight"].T + weights[f"{7 + 2 * i}.bias"]
    return x


def reference_errors(bonus, frames: torch.Tensor, seen: np.ndarray) -> torch.Tensor:
    """The error on frames (batch, 84, 84), normalized by what NumPy says of the frames (count, 84, 84) that were seen."""
    mean, deviation = seen.astype(np.float64).mean(0), seen.astype(np.float64).std(0)
    inputs = ((frames.double() - torch.from_numpy(mean)) / torch.from_numpy(np.maximum(deviation, 1e-4))).clamp(-5, 5)
    predicted, wanted = (
        reference_features(doubles(network), inputs.unsqueeze(1), num_linear)
        for network, num_linear in ((bonus.predictor, 3), (bonus.target, 1))
    )
    return ((predicted - wanted) ** 2).mean(1)


def reference_moments(bonus, stream: torch.Tensor) -> np.ndarray:
    """Deviation of the discounted sums of the bonus of a stream (steps, num_envs, 4, 84, 84), as `follow` goes along it."""
    frames = stream[:, :, -1].numpy()
    total, totals = np.zeros(stream.shape[1]), []
    for step in range(len(stream)):
        errors = reference_errors(bonus, stream[step, :, -1], frames[: step + 1].reshape(-1, 84, 84))
        total = bonus.gamma * total + errors.numpy()
        totals.append(total)
    return np.std(totals)


# ----------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("arguments", KINDS)
def test_one_update_against_float64(arguments):
    """Targets of both heads, losses, gradients, bonus and predictor's loss; with a target network that is another one."""
    agent = make_agent(gamma=0.9, tau=0.3, n_step=3, max_grad_norm=1e6, extrinsic_coef=1.5, **arguments)
    args = agent.args
    for parameter in agent.target_network.parameters():
        parameter.data.mul_(1.2)
    online, target = (copy.deepcopy(network).double() for network in (agent.q_network, agent.target_network))
    num_heads, before, stream = len(online.heads), copy.deepcopy(agent.rnd), pictures(101, 20, 1, 4)

    state = agent.buffer.generator.get_state()
    batch = agent.buffer.sample(32, 3, 0.9)
    draws = torch.rand(32, dtype=torch.float64, generator=agent.buffer.generator)
    agent.buffer.generator.set_state(state)
    agent.update()

    weights = {name: value.detach().requires_grad_() for name, value in online.state_dict().items()}
    observations, next_observations = batch.observations.double() / 255, batch.next_observations.double() / 255
    assert 3 < batch.terminated.sum() < 29 and set(batch.num_steps.tolist()) == {1, 2, 3}
    discounts, extrinsic, alive = 0.9**batch.num_steps, batch.returns.double(), 1 - batch.terminated.double()
    weight = torch.tensor([1.5, 1.0][:num_heads] if num_heads == 2 else [1.0])[:, None, None]
    followed = (weight * reference_q_values(weights, next_observations, num_heads)).sum(0)
    best = followed.argmax(1)
    values = reference_q_values(dict(target.state_dict()), next_observations, num_heads)[:, torch.arange(32), best]
    if agent.rnd is not None:
        steps = (draws * batch.num_steps).floor().long()
        frames = agent.buffer.next_frames(batch.positions, steps)
        errors = reference_errors(before, frames, stream[:, 0, -1].numpy())
        bonus = errors / reference_moments(before, stream)
        assert bonus.min() > 0  # never centred
        scalars = agent.scalars()
        assert scalars["rnd/bonus"] == pytest.approx(bonus.mean().item(), rel=1e-4)
        assert scalars["rnd/bonus_largest"] == pytest.approx(bonus.max().item(), rel=1e-4)
        assert scalars["rnd/predictor_loss"] == pytest.approx(errors[:8].mean().item(), rel=1e-4)  # a quarter of 32
        assert scalars["rnd/intrinsic_return_std"] == pytest.approx(reference_moments(before, stream), rel=1e-4)
        intrinsic = bonus * 0.9**steps * batch.num_steps
    if num_heads == 2:  # the bonus goes on at a terminal step, the rewards do not
        td_targets = torch.stack([extrinsic + discounts * alive * values[0], intrinsic + discounts * values[1]])
    elif agent.rnd is not None:
        td_targets = (1.5 * extrinsic + args.intrinsic_coef * intrinsic + discounts * alive * values[0]).unsqueeze(0)
    else:
        td_targets = (extrinsic + discounts * alive * values[0]).unsqueeze(0)

    q_values = reference_q_values(weights, observations, num_heads)[:, torch.arange(32), batch.actions]
    distance = (q_values - td_targets.detach()).abs()
    losses = torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean(1)
    gradients = torch.autograd.grad(losses.sum(), list(weights.values()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    expected = [*losses.tolist(), *q_values.mean(1).tolist(), norm]
    np.testing.assert_allclose(agent.metrics.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert len(agent.METRICS) == len(expected)
    for (name, parameter), gradient in zip(agent.q_network.named_parameters(), gradients, strict=True):
        assert (parameter.grad.double() - gradient).norm() < 2e-4 * gradient.norm() + 1e-12, name
        moved = target.get_parameter(name) + 0.3 * (parameter.detach().double() - target.get_parameter(name))
        assert (agent.target_network.get_parameter(name).double() - moved).abs().max() < 1e-6


def test_the_bonus_of_one_step_stands_for_that_of_all(monkeypatch):
    """On average over the draws it is the discounted sum over the steps up to the end, of each step's next last frame."""
    agent = make_agent(gamma=0.8, n_step=4)
    brightness = lambda frames: frames.float().mean(dim=(1, 2)) / 100
    monkeypatch.setattr(agent.rnd, "learn", brightness)
    batch = agent.buffer.sample(64, 4, 0.8)
    sums = torch.zeros(64)
    for _ in range(3_000):
        sums += agent.rewards(batch)[0][1]
    expected = torch.zeros(64)
    for step in range(4):
        frames = agent.buffer.next_frames(batch.positions, torch.full((64,), step))
        expected += torch.where(step < batch.num_steps, 0.8**step * brightness(frames), 0.0)
    assert (sums / 3_000 / expected - 1).abs().max() < 0.05
    exact = batch.num_steps == 1
    assert 3 < exact.sum() < 60
    assert torch.allclose(sums[exact] / 3_000, expected[exact], rtol=1e-4)


def test_the_bonus_is_of_the_next_observations_last_frame(monkeypatch):
    """After a terminal step that is the first frame of the next life, after a truncation the cut episode's own last one."""
    agent, looked_at = make_agent(n_step=1, batch_size=200), []
    monkeypatch.setattr(agent.rnd, "learn", lambda frames: looked_at.append(frames) or torch.ones(len(frames)))
    batch = agent.buffer.sample(200, 1, 0.99)
    rewards, goes_on = agent.rewards(batch)
    assert torch.equal(looked_at[0], batch.next_observations[:, -1])
    assert batch.terminated.sum() > 5 and (looked_at[0][batch.terminated == 1] != 0).flatten(1).any(1).all()
    assert torch.equal(rewards, torch.stack([batch.returns, torch.ones(200)]))
    assert torch.equal(goes_on, torch.stack([1 - batch.terminated, torch.ones(200)]))


def test_actions_follow_the_weighted_sum_of_both_heads():
    agent = make_agent(extrinsic_coef=2.0, intrinsic_coef=3.0)
    observations = pictures(5, 300, 4)
    q_values = reference_q_values(doubles(agent.q_network), observations.double() / 255, 2)
    actions = agent.act(observations)
    assert torch.equal(actions, (2 * q_values[0] + 3 * q_values[1]).argmax(1))
    for other in (q_values[0], q_values[1], q_values.sum(0)):
        assert (actions != other.argmax(1)).any()


# ------------------------------------------------------------------------------------------ the bonus and its statistics


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 255), min_size=2, max_size=80),
    cuts=st.lists(st.integers(1, 79), max_size=10, unique=True),
    offset=st.sampled_from([0, 10_000_000]),
)
def test_mean_and_deviation_do_not_depend_on_the_portions(values, cuts, offset):
    """Also of values that are far from 0 and close together, where float32 or a sum of squares would lose all digits."""
    array = np.array(values, np.float64)[:, None] + np.array([0.0, offset])
    moments = rnd.RunningMoments((2,), CPU)
    for portion in np.split(array, sorted(cut for cut in cuts if cut < len(values))):
        moments.add(torch.from_numpy(portion))
    assert moments.count.item() == len(values)
    np.testing.assert_allclose(moments.mean.numpy(), array.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.deviation.numpy(), array.std(0), rtol=1e-6, atol=1e-6)


def test_statistics_are_of_the_last_frames_and_of_sums_that_never_end():
    stream = pictures(7, 12, 2, 4)
    agent = make_agent(num_envs=2, num_frames=0, gamma=0.9)
    for step, observations in enumerate(stream):
        agent.rnd.count_frames(observations) if step < 5 else agent.rnd.follow(observations, count_returns=step >= 8)
    frames = stream[:, :, -1].reshape(-1, 84, 84).double().numpy()
    np.testing.assert_allclose(agent.rnd.frame_moments.mean.numpy(), frames.mean(0), rtol=1e-12)
    np.testing.assert_allclose(agent.rnd.frame_moments.deviation.numpy(), frames.std(0), rtol=1e-9, atol=1e-9)
    total, totals = np.zeros(2), []
    for step in range(5, 12):
        seen = stream[: step + 1, :, -1].reshape(-1, 84, 84).numpy()
        total = 0.9 * total + reference_errors(agent.rnd, stream[step, :, -1], seen).numpy()
        totals += [total] if step >= 8 else []
    np.testing.assert_allclose(agent.rnd.returns.numpy(), total, rtol=1e-5)
    assert agent.rnd.return_moments.count.item() == 8
    assert agent.rnd.return_moments.deviation.item() == pytest.approx(np.std(totals), rel=1e-4)


def test_inputs_are_deviations_clipped_at_5_and_a_pixel_that_never_changed_is_0():
    agent = make_agent()
    frames = pictures(101, 20, 1, 4)[:, 0, -1]  # those that the statistics are of
    frames[3, 0, 0] = 78  # 77 always, so far
    inputs = agent.rnd.network_input(frames)
    assert inputs.shape == (20, 1, 84, 84) and inputs.dtype == torch.float32
    assert inputs[3, 0, 0, 0] == 5
    inputs[3, 0, 0, 0] = 0
    assert (inputs[:, :, :12] == 0).all() and inputs.abs().max() < 5
    moving = inputs[:, 0, 12:]
    assert moving.mean(0).abs().max() < 1e-5 and (moving.std(0, correction=0) - 1).abs().max() < 1e-4


def test_networks_begin_orthogonal_with_gain_root_2():
    agent = make_agent()
    for network in (agent.rnd.predictor, agent.rnd.target):
        for layer in network:
            if hasattr(layer, "weight"):
                rows = layer.weight.detach().flatten(1).double()
                gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
                assert (gram - 2 * torch.eye(len(gram))).abs().max() < 1e-5
                assert (layer.bias == 0).all()
    assert [type(layer) for layer in agent.rnd.target][-2:] == [nn.Flatten, nn.Linear]


def test_the_error_falls_on_frames_that_come_again_and_stays_on_others_while_the_target_stays():
    agent = make_agent(batch_size=16, update_proportion=1.0, predictor_learning_rate=3e-4)
    target, initial = parameters(agent.rnd.target), parameters(agent.rnd.predictor)
    known, new = pictures(1_000, 16), pictures(1_001, 16)

    def error(frames: torch.Tensor) -> float:
        inputs = agent.rnd.network_input(frames)
        return agent.rnd.errors(inputs, agent.rnd.target(inputs)).mean().item()

    before = error(known), error(new)
    first = agent.rnd.learn(known).mean()
    for _ in range(40):
        last = agent.rnd.learn(known).mean()
    assert last < 0.2 * first
    assert error(known) < 0.2 * before[0] and error(new) > 2 * error(known)
    assert same(parameters(agent.rnd.target), target)
    assert not same(parameters(agent.rnd.predictor), initial)
    assert all(parameter.grad is None for parameter in agent.rnd.target.parameters())


@pytest.mark.parametrize("batch_size, proportion, share", [(16, 0.25, 4), (10, 0.25, 2), (4, 0.01, 1), (6, 1.0, 6)])
def test_the_predictor_learns_from_its_share_of_the_mini_batch_alone(batch_size, proportion, share):
    frames, others = pictures(1, batch_size), pictures(2, batch_size)

    def learned(frames) -> tuple[list, torch.Tensor]:
        agent = make_agent(batch_size=batch_size, update_proportion=proportion)
        bonus = agent.rnd.learn(frames)
        return parameters(agent.rnd.predictor), bonus

    weights, bonus = learned(frames)
    assert bonus.shape == (batch_size,) and not bonus.requires_grad
    same_share = learned(torch.cat([frames[:share], others[share:]]))
    assert same(same_share[0], weights)
    assert torch.equal(same_share[1][share:], bonus[share:]) == (share == batch_size)
    assert not same(learned(torch.cat([frames[: share - 1], others[share - 1 :]]))[0], weights)


def test_with_bfloat16_the_bonus_is_the_same():
    exact, rounded = make_agent(), make_agent(bf16=True)
    for agent in (exact, rounded):
        agent.update()
    assert torch.equal(exact.rnd.metrics, rounded.rnd.metrics)
    assert not torch.equal(exact.metrics, rounded.metrics) and torch.allclose(
        exact.metrics, rounded.metrics, rtol=0.1, atol=0.02
    )


def test_with_bfloat16_values_that_differ_by_a_thousandth_are_told_apart():
    """Between 8 and 8.06 there is no number in bfloat16."""
    agent = make_agent(bf16=True)
    for head in agent.q_network.heads:
        head["value"].weight.data.zero_(), head["value"].bias.data.fill_(8.0)
        head["advantage"].weight.data.zero_(), head["advantage"].bias.data.zero_()
        head["advantage"].bias.data[NUM_ACTIONS - 1] = 0.008
    assert agent.act(pictures(1, 3, 4)).tolist() == [NUM_ACTIONS - 1] * 3


# -------------------------------------------------------------------------------------------------------- coefficient 0


class DuelingDQN:
    """Dueling double DQN with n-step returns by the textbook, on the script's network and buffer: nothing of RND."""

    def __init__(self, args, buffer):
        torch.manual_seed(rnd.derive_seed(args.seed, rnd.INITIALISATION))
        self.args, self.buffer = args, buffer
        self.q_network = rnd.QNetwork(NUM_ACTIONS, 1).to(memory_format=torch.channels_last)
        self.target_network = copy.deepcopy(self.q_network)
        self.optimizer = torch.optim.Adam(self.q_network.parameters(), lr=1e-4, eps=1.5e-4, fused=True)

    def update(self) -> float:
        batch = self.buffer.sample(32, 3, 0.99)
        observations, next_observations = (rnd.network_input(x) for x in (batch.observations, batch.next_observations))
        with torch.no_grad():
            best = self.q_network(next_observations)[0].argmax(1, keepdim=True)
            next_values = self.target_network(next_observations)[0].gather(1, best).squeeze(1)
        td_targets = batch.returns + batch.discounts * (1 - batch.terminated) * next_values
        q_values = self.q_network(observations)[0].gather(1, batch.actions.unsqueeze(1)).squeeze(1)
        loss = F.smooth_l1_loss(q_values, td_targets)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.q_network.parameters(), 10.0)
        self.optimizer.step()
        for target, online in zip(self.target_network.parameters(), self.q_network.parameters(), strict=True):
            target.data.lerp_(online.data, 0.005)
        return loss.item()


def test_with_coefficient_0_it_is_dueling_dqn_to_the_bit(monkeypatch):
    monkeypatch.delattr(rnd, "RandomNetworkDistillation")  # whatever uses it fails
    monkeypatch.delattr(rnd, "RunningMoments")
    agent = make_agent(intrinsic_coef=0.0, extrinsic_coef=7.0, update_proportion=0.9)
    plain = DuelingDQN(agent.args, copy.deepcopy(agent.buffer))
    plain.buffer.generator = torch.Generator().manual_seed(1)  # nothing has been drawn from the agent's either
    for _ in range(5):
        agent.update()
        assert agent.metrics[0].item() == pytest.approx(plain.update(), rel=1e-6)
        assert same(parameters(agent.q_network), parameters(plain.q_network))
        assert same(parameters(agent.target_network), parameters(plain.target_network))
    assert torch.equal(agent.buffer.generator.get_state(), plain.buffer.generator.get_state())
    observations = pictures(3, 50, 4)
    assert torch.equal(agent.act(observations), plain.q_network(rnd.network_input(observations))[0].argmax(1))
    assert agent.num_parameters == sum(parameter.numel() for parameter in plain.q_network.parameters())
    assert agent.KEPT == ("q_network", "target_network", "optimizer", "metrics") and agent.scalars() == {}


def test_the_rewards_head_begins_equal_with_and_without_a_bonus():
    ours, theirs = make_agent(), make_agent(intrinsic_coef=0.0)
    assert same(parameters(ours.q_network)[: len(parameters(theirs.q_network))], parameters(theirs.q_network))


def whole_run(tmp_path, **arguments):
    """A run in this process; what is counted at which step, and the weights that it leaves."""
    calls = []
    arguments = {"env_id": "BreakoutNoFrameskip-v4", "total_timesteps": 160, "learning_starts": 100, "batch_size": 4,
                 "buffer_size": 120, "exploration_steps": 20, "eval_interval": 0, "eval_episodes": 1, "num_envs": 2,
                 "runs_dir": tmp_path} | arguments  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in ("count_frames", "follow", "learn") if hasattr(rnd, "RandomNetworkDistillation") else ():

            def noted(self, seen, name=name, real=getattr(rnd.RandomNetworkDistillation, name), **flags):
                calls.append((name, *flags.values(), seen.numpy().copy()))
                return real(self, seen, **flags)

            patch.setattr(rnd.RandomNetworkDistillation, name, noted)
        result = run_main(rnd, *(f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()))
    assert result.returncode == 0, result.stderr
    path = only_run(tmp_path)
    return path, calls, model(path)


def test_a_run_with_coefficient_0_is_one_in_which_the_bonus_does_not_exist(tmp_path, monkeypatch):
    with_arguments = whole_run(tmp_path / "a", intrinsic_coef=0.0, num_heads=1, update_proportion=1.0, extrinsic_coef=9.0)
    monkeypatch.delattr(rnd, "RandomNetworkDistillation")
    without = whole_run(tmp_path / "b", intrinsic_coef=0.0)
    assert with_arguments[1] == without[1] == []
    assert with_arguments[2].keys() == without[2].keys() == {"q_network"}
    assert same(with_arguments[2]["q_network"].values(), without[2]["q_network"].values())


def test_a_run_counts_every_observation_once_and_gets_the_bonus_ready_in_three_phases(tmp_path):
    """100 steps before learning, 2 a loop step: 25 loop steps, then 13 and 12. Then the predictor learns at the pace of later."""
    path, calls, weights = whole_run(tmp_path / "runs")
    following = [call[:-1] for call in calls if call[0] == "follow"]
    assert following == [("follow", False)] * 13 + [("follow", True)] * 42
    counted = [number for number, call in enumerate(calls) if call[0] == "count_frames"]
    assert len(counted) == 80 and all(calls[number - 1][0] == "follow" for number in counted[25:])
    learned = [number for number, call in enumerate(calls) if call[0] == "learn"]
    steps = [2 * (sum(number > other for other in counted) - 1) for number in learned]  # at which a loop step began
    every_fourth = lambda first, last: [
        step + 2 for step in range(first, last - 3, 4)
    ]  # where 0.25 a step comes to a whole number
    assert steps == every_fourth(50, 100) + every_fourth(100, 160)
    moments = weights["rnd"]["frame_moments"]
    frames = np.concatenate([calls[number][-1][:, -1] for number in counted]).astype(np.float64)  # (160, 84, 84)
    assert moments["count"] == 160 and weights["rnd"]["return_moments"]["count"] == 84
    np.testing.assert_allclose(moments["mean"].numpy(), frames.mean(0), rtol=1e-9)
    np.testing.assert_allclose((moments["squares"] / 160).sqrt().numpy(), frames.std(0), rtol=1e-6, atol=1e-6)
    assert len({frame.tobytes() for frame in frames[:100]}) > 40  # and not the same one again and again


def test_what_comes_before_learning_leaves_the_q_network_alone():
    agent = make_agent(num_frames=20)
    before = parameters(agent.q_network), parameters(agent.target_network), parameters(agent.rnd.predictor)
    agent.prepare()
    assert same(parameters(agent.q_network), before[0]) and same(parameters(agent.target_network), before[1])
    assert not same(parameters(agent.rnd.predictor), before[2]) and not agent.optimizer.state


# ---------------------------------------------------------------------------------------- kept, captured, read and written


@pytest.mark.parametrize("arguments", KINDS)
def test_an_agent_goes_on_from_its_state(arguments):
    """Restored into an agent of another seed that has learned otherwise, it makes the same steps as if nothing had been."""
    agent = make_agent(**arguments)
    for _ in range(3):
        agent.update()
    state = copy.deepcopy(rnd.state_of(agent))
    generator_state = agent.buffer.generator.get_state()
    fresh = make_agent(seed=9, num_frames=3, **arguments)
    fresh.update()
    fresh.buffer = agent.buffer
    rnd.restored(fresh, state)
    results = []
    for one in (agent, fresh):
        agent.buffer.generator.set_state(generator_state)
        for observations in pictures(50, 3, 1, 4):
            one.update()
            if one.rnd is not None:
                one.rnd.follow(observations, count_returns=True)
        results.append(one)
    assert same(parameters(agent.q_network), parameters(fresh.q_network)) and torch.equal(agent.metrics, fresh.metrics)
    if agent.rnd is not None:
        for network in ("predictor", "target"):
            assert same(parameters(getattr(agent.rnd, network)), parameters(getattr(fresh.rnd, network)))
        assert agent.rnd.return_moments.deviation == fresh.rnd.return_moments.deviation
        assert torch.equal(agent.rnd.returns, fresh.rnd.returns)
        assert torch.equal(agent.rnd.frame_moments.deviation, fresh.rnd.frame_moments.deviation)


@pytest.mark.parametrize("arguments", KINDS)
def test_weights_go_to_another_agent(arguments):
    agent, other = make_agent(**arguments), make_agent(seed=9, num_frames=3, **arguments)
    agent.update()
    other.load_weights(agent.weights())
    observations, frames = pictures(60, 40, 4), pictures(61, 32)
    assert torch.equal(agent.act(observations), other.act(observations))
    if agent.rnd is not None:
        assert torch.equal(agent.rnd.learn(frames), other.rnd.learn(frames))


def test_what_a_run_logs_and_leaves(runs):
    """Points of the curves once it learns; networks and statistics."""
    path = runs("rnd").path
    assert len(torch.utils._pytree.tree_leaves(model(path))) == 42
    points = scalars(path)
    steps = [step for step, _ in points["losses/td_loss"]]
    assert len(steps) >= 2 and steps == list(range(steps[0], steps[-1] + 1, 100))
    for name in ("rnd/bonus", "rnd/bonus_largest", "rnd/predictor_loss", "rnd/intrinsic_return_std", "losses/td_loss",
                 "losses/intrinsic_td_loss", "losses/q_values", "losses/intrinsic_q_values", "losses/gradient_norm"):  # fmt: skip
        values = dict(points[name])
        assert set(steps) <= values.keys() and all(math.isfinite(values[step]) and values[step] != 0 for step in steps)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("arguments", KINDS)
def test_what_is_captured_reads_nothing_back(arguments, bf16):
    agent = make_agent(batch_size=4, bf16=bf16, **arguments)
    for _ in range(2):  # the first one sets up the optimizers
        watch = watched(agent.update, agent.buffer.generator)
        assert watch.cannot_be_captured == []
        assert watch.num_draws == (1 if agent.rnd is None else 2)
    observations = pictures(0, 1, 4)
    watches = [watched(lambda: agent.act(observations))]
    if agent.rnd is not None:
        watches += [
            watched(lambda: agent.rnd.count_frames(observations)),
            watched(lambda: agent.rnd.follow(observations, count_returns=True)),
        ]
        watches += [watched(lambda: agent.rnd.follow(observations, count_returns=False))]
        prepared = watched(agent.prepare, agent.buffer.generator)
        assert prepared.cannot_be_captured == [] and prepared.num_draws == 2
    assert [watch.cannot_be_captured for watch in watches] == [[]] * len(watches)
    assert [watch.num_draws for watch in watches] == [0] * len(watches)


@pytest.mark.parametrize("arguments", KINDS)
def test_the_metrics_have_a_name_each(arguments):
    agent = make_agent(**arguments)
    agent.update()
    values = dict(zip(agent.METRICS, agent.metrics.tolist(), strict=True))
    intrinsic = {"intrinsic_td_loss", "intrinsic_q_values"} if arguments == {} else set()
    assert values.keys() == {"td_loss", "q_values", "gradient_norm"} | intrinsic
    gradients = torch.cat([parameter.grad.flatten() for parameter in agent.q_network.parameters()]).double()
    assert values["gradient_norm"] == pytest.approx(gradients.norm().item(), rel=1e-4)  # nothing is clipped here


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_step": 100, "num_envs": 2, "learning_starts": 396, "buffer_size": 300}, "--n-step 100 in 2 environment(s) leaves"),
        ({"n_step": 31, "learning_starts": 100, "buffer_size": 30, "batch_size": 8}, "of the 30 transitions"),
    ],
)
def test_refused_schedules_have_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        rnd.check_args(rnd.Args(**arguments))
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.startswith("error: ") and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize("name, value", [
    ("n_step", 0), ("num_heads", 3), ("num_heads", 0), ("update_proportion", 0.0), ("update_proportion", 1.1),
    ("intrinsic_coef", -1.0), ("intrinsic_coef", math.inf), ("extrinsic_coef", -1.0), ("predictor_learning_rate", 0.0),
])  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValidationError, match=f"1 validation error for Args\n{name}\n"):
        rnd.Args(**{name: value})


def test_the_largest_n_that_is_left_is_accepted():
    """When the predictor begins to learn, after half of --learning-starts, whole loop steps are stored: 200, of which 2 are left."""
    rnd.check_args(rnd.Args(n_step=100, num_envs=2, learning_starts=400, buffer_size=300))
    with pytest.raises(SystemExit):  # 198 are stored, of which nothing is left
        rnd.check_args(rnd.Args(n_step=100, num_envs=2, learning_starts=398, buffer_size=300))


def test_rooms_of_montezumas_revenge_are_counted_once():
    args = rnd.Args(env_id="MontezumaRevengeNoFrameskip-v4")
    env, rooms = rnd.make_env(args), rnd.RoomsSeen(args)
    env.reset(seed=0)
    assert rooms.look(env) == 1 and rooms.look(env) is None  # where every game begins
    env.unwrapped.ale.setRAM(3, 200)
    assert rooms.look(env) == 200 and rooms.look(env) is None
    assert rooms.scalars() == {"charts/rooms_seen": 2}
    kept = rnd.RoomsSeen(args)
    rnd.restored(kept, copy.deepcopy(rnd.state_of(rooms)))
    assert kept.look(env) is None and kept.scalars() == {"charts/rooms_seen": 2}
    other = rnd.RoomsSeen(rnd.Args())
    assert other.look(env) is None and other.scalars() == {}


def test_a_run_logs_the_rooms(tmp_path):
    arguments = (*QUICK, "--env-id", "MontezumaRevengeNoFrameskip-v4", "--total-timesteps", "300", "--eval-interval", "0",
                 "--eval-episodes", "1", "--eval-epsilon", "1", "--intrinsic-coef", "0")  # fmt: skip
    result = run_main(rnd, *arguments, "--runs-dir", tmp_path)
    assert result.returncode == 0 and "step 1: enters room 1" in result.stdout + result.stderr
    points = scalars(only_run(tmp_path))
    assert points["charts/new_room"] == [(1, 1)]
    assert {value for _, value in points["charts/rooms_seen"]} == {1}
