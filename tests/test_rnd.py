"""Random Network Distillation and the dueling DQN that follows it, in numbers."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import CPU, NUM_ACTIONS, n_step_agent, next_batch, parameters, reference_features, screens
from conftest import QUICK, equal, load_script, model, only_run, run_main, scalars

rnd = load_script("rnd_dqn_atari")
# Two heads, one head, and without a bonus: dueling DQN.
KINDS = [{}, {"num_heads": 1}, {"intrinsic_coef": 0.0}]


def make_agent(**arguments):
    return n_step_agent(rnd, **arguments)


# ------------------------------------------------------------------------------------------- references, in float64


def doubles(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().double() for name, value in module.state_dict().items()}


def reference_q_values(weights: dict, observations: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(batch, 4, 84, 84) in [0, 1] to (num_heads, batch, actions), by plain function calls."""
    x, heads = reference_features(weights, observations), []
    for i in range(num_heads):
        value, advantage = (
            x @ weights[f"heads.{i}.{part}.weight"].T + weights[f"heads.{i}.{part}.bias"] for part in ("value", "advantage")
        )
        heads.append(value + advantage - advantage.mean(1, keepdim=True))
    return torch.stack(heads)


def reference_embedding(weights: dict, inputs: torch.Tensor, num_linear: int) -> torch.Tensor:
    x = inputs
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.leaky_relu(F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], stride), 0.2)
    x = x.flatten(1)
    for i in range(num_linear):
        x = x.relu() if i else x
        x = x @ weights[f"{7 + 2 * i}.weight"].T + weights[f"{7 + 2 * i}.bias"]
    return x


def reference_errors(bonus, frames: torch.Tensor, seen: np.ndarray, predictor: dict | None = None) -> torch.Tensor:
    """The error on frames (batch, 84, 84), normalized by what NumPy says of the frames (count, 84, 84) that were seen."""
    mean, deviation = seen.astype(np.float64).mean(0), seen.astype(np.float64).std(0)
    inputs = ((frames.double() - torch.from_numpy(mean)) / torch.from_numpy(np.maximum(deviation, 1e-4))).clamp(-5, 5)
    predicted = reference_embedding(predictor or doubles(bonus.predictor), inputs.unsqueeze(1), 3)
    wanted = reference_embedding(doubles(bonus.target), inputs.unsqueeze(1), 1)
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


@pytest.mark.parametrize("arguments, max_grad_norm", [*((kind, 1e6) for kind in KINDS), (KINDS[2], 0.01)])
def test_one_update_against_float64(arguments, max_grad_norm, monkeypatch):
    """Targets of both heads, losses, gradients, Adam's first step, bonus and predictor's loss; with another target network."""
    if "intrinsic_coef" in arguments:  # whatever uses the bonus fails
        monkeypatch.delattr(rnd, "RandomNetworkDistillation")
        monkeypatch.delattr(rnd, "RunningMoments")
    agent = make_agent(num_envs=2, gamma=0.9, tau=0.3, n_step=3, max_grad_norm=max_grad_norm, extrinsic_coef=1.5, **arguments)
    args = agent.args
    for parameter in agent.target_network.parameters():
        parameter.data.mul_(1.2)
    online, target = (copy.deepcopy(network).double() for network in (agent.q_network, agent.target_network))
    num_heads, before, stream = len(online.heads), copy.deepcopy(agent.rnd), screens(101, 20, 2, 4)
    batch, generator = next_batch(agent, 3, 0.9), torch.Generator()
    generator.set_state(agent.buffer.generator.get_state())
    draws = [torch.rand(32, dtype=torch.float64, generator=generator)]  # of the mini-batch
    if agent.rnd is not None:
        draws.append(torch.rand(32, dtype=torch.float64, generator=generator))  # of the steps whose bonus is looked at
    agent.update()
    assert torch.equal(generator.get_state(), agent.buffer.generator.get_state())

    weights = {name: value.detach().requires_grad_() for name, value in online.state_dict().items()}
    observations, next_observations = batch.observations.double() / 255, batch.next_observations.double() / 255
    assert 3 < batch.terminated.sum() < 29 and set(batch.num_steps.tolist()) == {1, 2, 3}
    discounts, extrinsic, alive = 0.9**batch.num_steps, batch.returns.double(), 1 - batch.terminated.double()
    weight = torch.tensor([1.5, 1.0][:num_heads] if num_heads == 2 else [1.0])[:, None, None]
    best = (weight * reference_q_values(weights, next_observations, num_heads)).sum(0).argmax(1)
    values = reference_q_values(dict(target.state_dict()), next_observations, num_heads)[:, torch.arange(32), best]
    if agent.rnd is not None:
        steps = (draws[1] * batch.num_steps).floor().long()
        frames = agent.buffer.next_frames(batch.positions, steps)
        predictor = {name: value.requires_grad_() for name, value in doubles(before.predictor).items()}
        errors = reference_errors(before, frames, stream[:, :, -1].reshape(-1, 84, 84).numpy(), predictor)
        learned = torch.autograd.grad(errors[:8].mean(), list(predictor.values()))  # from a quarter of 32 transitions
        for (name, parameter), gradient in zip(agent.rnd.predictor.named_parameters(), learned, strict=True):
            assert (parameter.grad - gradient).norm() < 2e-4 * gradient.norm() + 1e-12, name
            stepped = predictor[name] - 1e-4 * parameter.grad / (parameter.grad.abs() + 1e-8)
            assert (parameter - stepped).abs().max() < 2e-7, name
        assert equal(parameters(agent.rnd.target), parameters(before.target))
        errors = errors.detach()
        bonus = errors / reference_moments(before, stream)
        assert bonus.min() > 0  # never centred
        assert agent.scalars() == pytest.approx({
            "rnd/bonus": bonus.mean().item(), "rnd/bonus_largest": bonus.max().item(),
            "rnd/predictor_loss": errors[:8].mean().item(),
            "rnd/intrinsic_return_std": reference_moments(before, stream),
        }, rel=1e-4)  # fmt: skip
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
    assert 0.02 < norm < 1e6
    losses, means = losses.tolist(), q_values.mean(dim=1).tolist()
    expected = {"td_loss": losses[0], "q_values": means[0], "gradient_norm": norm}
    if num_heads == 2:
        expected |= {"intrinsic_td_loss": losses[1], "intrinsic_q_values": means[1]}
    computed = dict(zip(agent.METRICS, agent.metrics.tolist(), strict=True))
    assert computed == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for (name, parameter), gradient in zip(agent.q_network.named_parameters(), gradients, strict=True):
        gradient *= min(1, max_grad_norm / norm)
        assert (parameter.grad.double() - gradient).norm() < 2e-4 * gradient.norm() + 1e-12, name
        stepped = online.get_parameter(name) - 1e-4 * parameter.grad / (parameter.grad.abs() + 1.5e-4)
        assert (parameter - stepped).abs().max() < 2e-7, name
        moved = target.get_parameter(name) + 0.3 * (parameter.detach().double() - target.get_parameter(name))
        assert (agent.target_network.get_parameter(name).double() - moved).abs().max() < 1e-6


@pytest.mark.parametrize("arguments, weights", [({}, [2, 3]), (KINDS[1], [1]), (KINDS[2], [1])])
def test_actions_follow_the_weighted_sum_of_the_heads(arguments, weights):
    agent, observations = make_agent(**{"extrinsic_coef": 2.0, "intrinsic_coef": 3.0} | arguments), screens(5, 300, 4)
    q_values = reference_q_values(doubles(agent.q_network), observations.double() / 255, len(weights))
    actions = agent.act(observations)
    assert torch.equal(actions, (torch.tensor(weights).view(-1, 1, 1) * q_values).sum(0).argmax(1))
    for other in (q_values[0], q_values[1], q_values.sum(0)) if len(weights) == 2 else ():
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


def test_inputs_are_deviations_clipped_at_5_and_a_pixel_that_never_changed_is_0():
    agent = make_agent()
    frames = screens(101, 20, 1, 4)[:, 0, -1]  # those that the statistics are of
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


@pytest.mark.parametrize("batch_size, proportion, share", [(16, 0.25, 4), (10, 0.25, 2), (4, 0.01, 1), (6, 1.0, 6)])
def test_the_predictor_learns_from_its_share_of_the_mini_batch(batch_size, proportion, share):
    assert make_agent(batch_size=batch_size, update_proportion=proportion).rnd.num_trained == share


def test_with_bfloat16_the_bonus_is_the_same():
    exact, rounded = make_agent(), make_agent(bf16=True)
    for agent in (exact, rounded):
        agent.update()
    assert torch.equal(exact.rnd.metrics, rounded.rnd.metrics)
    assert not torch.equal(exact.metrics, rounded.metrics) and torch.allclose(
        exact.metrics, rounded.metrics, rtol=0.1, atol=0.02
    )


# -------------------------------------------------------------------------------------------------------- coefficient 0


def test_with_coefficient_0_nothing_of_the_bonus_is_kept_or_said():
    agent = make_agent(intrinsic_coef=0.0)
    num_parameters = sum(parameter.numel() for parameter in rnd.QNetwork(NUM_ACTIONS, 1).parameters())
    assert agent.summary() == f"1 agent(s) x {num_parameters:,} parameters"
    assert agent.KEPT == ("q_network", "target_network", "optimizer", "metrics") and agent.scalars() == {}
    ours = parameters(agent.q_network)
    assert equal(parameters(make_agent().q_network)[: len(ours)], ours)  # the rewards' head begins as with a bonus


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
    assert equal(with_arguments[2], without[2])


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
    assert equal(parameters(agent.q_network), before[0]) and equal(parameters(agent.target_network), before[1])
    assert not equal(parameters(agent.rnd.predictor), before[2]) and not agent.optimizer.state


# ------------------------------------------------------------------------------------------------ runs, arguments, rooms


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


def test_the_largest_n_that_is_left_is_accepted_and_more_is_refused_in_a_line(capsys):
    """When the predictor begins to learn, after half of --learning-starts, whole loop steps are stored: 200, of which 2 are left."""
    rnd.check_args(rnd.Args(n_step=100, num_envs=2, learning_starts=400, buffer_size=300))
    for arguments, message in (
        ({"n_step": 100, "num_envs": 2, "learning_starts": 398, "buffer_size": 300}, "--n-step 100 in 2 environment(s) leaves"),
        ({"n_step": 31, "learning_starts": 100, "buffer_size": 30, "batch_size": 8}, "of the 30 transitions"),
    ):
        with pytest.raises(SystemExit) as end:
            rnd.check_args(rnd.Args(**arguments))
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.startswith("error: ") and message in printed and printed.count("\n") == 1


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
