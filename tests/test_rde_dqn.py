"""rde_dqn.py: networks, agent, schedules, whole runs, resuming, and what it refuses. Its environments: test_minigrid.py."""

import copy
import importlib.metadata
import importlib.util
import json
import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import ValidationError
from test_capture import watched

from agents import CPU, NUM_ACTIONS, OBSERVATION_DIM, mlp_agent
from conftest import (
    assert_same_end,
    equal,
    error_line,
    load_script,
    model,
    only_run,
    read_csv,
    rows,
    run_main,
    scalars,
    stop_when,
)

# Two resets of one of two agents each, at steps 340 and 460, and a scheduled evaluation at 300.
TINY = (
    "--total-timesteps 500 --learning-starts 220 --replay-ratio 0.5 --batch-size 16 --hidden-dim 8 --num-hidden-layers 2 "
    "--buffer-size 400 --target-update-interval 7 --reset-interval 120 --eval-interval 300 --eval-episodes 2 --num-envs 2"
).split()


@pytest.fixture(scope="module")
def script():
    return load_script("rde_dqn")


def sequential(network, double: bool = True) -> nn.Sequential:
    """The same network out of PyTorch's layers alone; the script's own `forward` is not used."""
    layers = nn.Sequential(*copy.deepcopy(list(network)))
    return layers.double() if double else layers


def sequentials(networks) -> list[nn.Sequential]:
    return [sequential(network) for network in networks]


def values(network) -> torch.Tensor:
    """All parameters of a network, one after another."""
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def gradients(network) -> torch.Tensor:
    return torch.cat([parameter.grad.ravel() for parameter in network.parameters()])


def next_batch(agent) -> list[torch.Tensor]:
    """The mini-batch that the next update will draw, in float64."""
    state = agent.buffer.generator.get_state()
    batch = agent.buffer.sample(agent.args.batch_size)
    agent.buffer.generator.set_state(state)
    return [part.double() for part in batch]


# --------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("num_hidden_layers", [1, 4])
def test_the_network_is_linear_layers_with_relu_in_between(script, num_hidden_layers):
    """The same numbers as PyTorch's own layers have when they are built in this order."""
    args = script.Args(hidden_dim=16, num_hidden_layers=num_hidden_layers)
    torch.manual_seed(4)
    network = script.QNetwork(args, 5, 3)
    torch.manual_seed(4)
    widths = [5, *[16] * num_hidden_layers, 3]
    layers = [layer for fan_in, fan_out in zip(widths, widths[1:]) for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    expected = nn.Sequential(*layers[:-1])
    assert network.state_dict().keys() == expected.state_dict().keys() and torch.equal(values(network), values(expected))
    inputs = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(inputs), expected(inputs))


@pytest.mark.parametrize("num_agents", [1, 3])
@pytest.mark.parametrize("max_grad_norm, optimizer", [(0.05, "adam"), (1e6, "rmsprop")])
def test_update_against_a_float64_reference(script, num_agents, max_grad_norm, optimizer):
    """Gradients, losses and Q-values of the first update, against autograd on separate networks."""
    agent = mlp_agent(script, num_agents, max_grad_norm=max_grad_norm, optimizer=optimizer)
    observations, actions, rewards, terminated, next_observations = next_batch(agent)
    assert 0 < terminated.mean() < 1
    networks, targets = sequentials(agent.q_networks), sequentials(agent.target_networks)
    values_before, targets_before = values(agent.q_networks), values(agent.target_networks)
    agent.update()
    clipped = []
    for i, (q_network, target_network) in enumerate(zip(networks, targets)):
        with torch.no_grad():
            td_targets = rewards + agent.args.gamma * target_network(next_observations).amax(1) * (1 - terminated)
        q_values = q_network(observations).gather(1, actions.long()).squeeze(1)
        loss = F.smooth_l1_loss(q_values, td_targets)
        assert (q_values - td_targets).abs().max() > 1 > (q_values - td_targets).abs().min()  # both parts of the loss
        q_network.requires_grad_().zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(q_network.parameters(), max_grad_norm)
        clipped.append(norm.item() > max_grad_norm)
        ours, expected = gradients(agent.q_networks[i]).double(), gradients(q_network)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6 * expected.abs().max())
        torch.testing.assert_close(
            agent.metrics[:, i].double(), torch.stack([loss, q_values.mean(), norm]).detach(), rtol=1e-5, atol=1e-6
        )
    assert all(clipped) == (max_grad_norm == 0.05)
    assert not torch.equal(values(agent.q_networks), values_before)
    assert torch.equal(values(agent.target_networks), targets_before)  # the copies are not in the update
    agent.copy_to_targets()
    assert torch.equal(values(agent.target_networks), values(agent.q_networks))


def test_update_in_bfloat16_is_near_that_in_float32(script):
    exact, rounded = (mlp_agent(script, 2, bf16=bf16) for bf16 in (False, True))
    exact.update(), rounded.update()
    assert gradients(rounded.q_networks).dtype == torch.float32
    difference = (gradients(exact.q_networks) - gradients(rounded.q_networks)).norm() / gradients(exact.q_networks).norm()
    assert 0 < difference < 0.1


def test_with_bfloat16_values_that_differ_by_a_thousandth_are_told_apart(script):
    """Between 8 and 8.06 there is no number in bfloat16."""
    agent = mlp_agent(script, 2, bf16=True)
    for network in agent.q_networks:
        network[-1].weight.data.zero_(), network[-1].bias.data.fill_(8.0)
        network[-1].bias.data[-1] = 8.008
    actions, _ = agent.act(torch.randn(3, OBSERVATION_DIM), torch.Generator())
    assert actions.tolist() == [NUM_ACTIONS - 1] * 3


def test_the_target_moves_by_tau(script):
    agent = mlp_agent(script, 2, tau=0.25, target_update_interval=0)
    for _ in range(3):
        before = values(agent.target_networks)
        agent.update()
        torch.testing.assert_close(values(agent.target_networks), 0.75 * before + 0.25 * values(agent.q_networks))


@pytest.mark.parametrize("optimizer, reference", [("adam", torch.optim.Adam), ("rmsprop", torch.optim.RMSprop)])
def test_the_optimizer_is_one_per_agent(script, optimizer, reference):
    """Against separate optimizers, one of which starts anew in the middle."""
    agent, rng = mlp_agent(script, 2, optimizer=optimizer, learning_rate=1e-2), torch.Generator().manual_seed(3)

    def separate(index):
        copied = values(agent.q_networks[index])
        return copied, reference([copied], lr=1e-2)

    others = [separate(i) for i in range(2)]
    for round_number in range(8):
        if round_number == 5:
            assert agent.reset() == 0
            others[0] = separate(0)
        for network, (copied, other) in zip(agent.q_networks, others):
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=rng)
            copied.grad = gradients(network)
            other.step()
        agent.optimizer.step()
        for network, (copied, _) in zip(agent.q_networks, others):
            torch.testing.assert_close(values(network), copied, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ reset, and choice


def state_of_agent(agent, index: int) -> dict[str, torch.Tensor]:
    state = {}
    for name, parameter in agent.q_networks[index].named_parameters():
        state |= {name: parameter.detach(), f"target {name}": agent.target_networks[index].get_parameter(name)}
        state |= {f"optimizer {name} {moment}": tensor for moment, tensor in agent.optimizer.state[parameter].items()}
    return state


@pytest.mark.parametrize("optimizer, num_moments", [("adam", 3), ("rmsprop", 2)])
def test_reset_renews_one_agent_and_nothing_of_the_others(script, optimizer, num_moments):
    agent = mlp_agent(script, 3, optimizer=optimizer)
    for _ in range(4):
        agent.update()
    for expected_index in (0, 1, 2, 0):
        agent.update()
        states = [state_of_agent(agent, i) for i in range(3)]
        before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
        assert agent.reset() == expected_index
        for i, state in enumerate(states):
            assert len(state) == 8 * (2 + num_moments)
            assert {name: tensor.data_ptr() for name, tensor in state.items()} == {
                name: tensor.data_ptr() for name, tensor in state_of_agent(agent, i).items()
            }
            for name, tensor in state.items():
                if i != expected_index:
                    assert torch.equal(tensor, before[i][name]), (i, name)
                elif "optimizer" in name:
                    assert before[i][name].any() and not tensor.any(), name
                else:
                    assert (tensor != before[i][name]).all(), name
        assert torch.equal(values(agent.q_networks[expected_index]), values(agent.target_networks[expected_index]))
        assert agent.oldest.item() == agent.num_resets % 3 and agent.beta.item() == 50
    agent.update()
    assert [state_of_agent(agent, i)["optimizer 0.weight step"].item() for i in range(3)] == [1, 3, 2]


def test_agents_begin_differently_and_the_first_as_if_it_were_alone(script):
    (one,), three = mlp_agent(script, 1).q_networks, [values(network) for network in mlp_agent(script, 3).q_networks]
    assert torch.equal(values(one), three[0]) and (three[0] != three[1]).all() and (three[1] != three[2]).all()
    assert not torch.equal(values(one), values(mlp_agent(script, 1, seed=2).q_networks[0]))


@pytest.mark.parametrize("num_resets", [0, 1, 2, 3])
def test_the_oldest_agent_judges_the_proposals(script, num_resets):
    agent, num_draws = mlp_agent(script, 3, beta=3.0), 20_000
    for _ in range(num_resets):
        agent.reset()
    for parameter in agent.q_networks.parameters():
        parameter.data *= 3  # so that proposals and judgements differ
    observation = torch.randn(OBSERVATION_DIM, generator=torch.Generator().manual_seed(5))
    actions, acting_agents = agent.act(observation.expand(num_draws, -1), torch.Generator().manual_seed(6))
    with torch.no_grad():
        q_values = torch.stack([network(observation.double()) for network in sequentials(agent.q_networks)])  # (N, actions)
    proposals = q_values.argmax(1)
    assert torch.equal(actions, proposals[acting_agents]) and len(proposals.unique()) > 1
    expected = np.full(3, 1 / 3)
    if num_resets:
        judgement = q_values[num_resets % 3, proposals].numpy()
        exponents = np.exp(3.0 * judgement / np.abs(judgement).max())
        expected = exponents / exponents.sum()
        assert np.ptp(expected) > 0.02  # so that another judge would be noticed
    frequencies = np.bincount(acting_agents.numpy(), minlength=3) / num_draws
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / math.sqrt(num_draws))


def test_one_agent_is_greedy(script):
    agent = mlp_agent(script, 1)
    agent.reset()
    observations = torch.randn(50, OBSERVATION_DIM, generator=torch.Generator().manual_seed(5))
    actions, acting_agents = agent.act(observations, torch.Generator())
    assert torch.equal(actions, sequentials(agent.q_networks)[0](observations.double()).argmax(1))
    assert not acting_agents.any() and len(actions.unique()) > 1


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"tau": 0.1, "target_update_interval": 0}])
@pytest.mark.parametrize("num_agents", [1, 3])
def test_update_and_act_can_be_captured_as_a_cuda_graph(script, num_agents, arguments):
    agent, selection = mlp_agent(script, num_agents, **arguments), torch.Generator().manual_seed(2)
    for _ in range(2):  # the first one sets up the optimizer
        watch = watched(agent.update, agent.buffer.generator)
    assert watch.cannot_be_captured == [] and watch.num_draws == 1
    watch = watched(lambda: agent.act(torch.ones(2, OBSERVATION_DIM), selection), selection)
    assert watch.cannot_be_captured == [] and watch.num_draws == (num_agents > 1)


# -------------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, {(0, 9): 1.0, (1, 9): 1 - 0.9 / 50_000, (25_000, 9): 0.55, (50_000, 9): 0.1, (99_999, 9): 0.1}),
        ({"epsilon_unit": "episode", "exploration_episodes": 200},
         {(9, 0): 1.0, (9, 1): 1 - 0.9 / 200, (9, 100): 0.55, (9, 200): 0.1, (9, 900): 0.1}),
        ({"epsilon_schedule": "exponential", "epsilon_decay": 0.999},
         {(0, 9): 1.0, (1, 9): 0.999, (1_000, 9): 0.999**1_000, (2_301, 9): 0.999**2_301, (2_302, 9): 0.1, (50_000, 9): 0.1}),
        ({"epsilon_schedule": "exponential", "epsilon_unit": "episode", "start_e": 0.8, "end_e": 0.01},
         {(9, 0): 0.8, (9, 1): 0.8 * 0.995, (9, 500): 0.8 * 0.995**500, (9, 874): 0.8 * 0.995**874, (9, 875): 0.01}),
        ({"epsilon_schedule": "exponential", "epsilon_decay": 1.0}, {(0, 0): 1.0, (90_000, 900): 1.0}),
        ({"exploration_fraction": 0.0}, {(0, 0): 0.1}),
    ],
)  # fmt: skip
def test_epsilon(script, arguments, expected):
    args = script.Args(**arguments)
    for (step, episodes), epsilon in expected.items():
        assert script.epsilon_at(args, step, episodes) == pytest.approx(epsilon, abs=1e-12)


def test_gradient_steps_and_resets_of_the_default_run(script):
    args = script.Args()
    assert [script.gradient_steps_due(args, step) for step in (1_000, 1_001, 1_002, 100_000)] == [0, 0, 1, 49_500]
    events = [step for step in range(1, 100_000) if script.resets_due(args, script.gradient_steps_due(args, step))
              > script.resets_due(args, script.gradient_steps_due(args, step - 1))]  # fmt: skip
    assert events == [21_000, 41_000, 61_000, 81_000]


@pytest.mark.parametrize(
    "env_id, unit", [("CartPole-v1", "step"), ("CartPole-v1", "episode"), ("MiniGrid-Empty-5x5-v0", "step")]
)
def test_epsilon_of_a_run_also_across_a_resume(script, tmp_path, env_id, unit):
    """What is logged at step t is epsilon before the step, after t - 2 steps of two environments; and so many are explored."""
    arguments = [*TINY, "--env-id", env_id, "--epsilon-schedule", "exponential", "--epsilon-unit", unit, "--epsilon-decay",
                 "0.99" if unit == "step" else "0.9", "--end-e", "0.02", "--reset-interval", "0"]  # fmt: skip
    runs_dir = tmp_path / "runs"
    arguments += ["--runs-dir", runs_dir]
    assert stop_when(lambda run: run.global_step >= 262, script, *arguments).returncode == 143
    assert run_main(script, *arguments).returncode == 0
    ends = [int(row["global_step"]) for row in read_csv(only_run(runs_dir) / "episodes.csv")]
    expected = []
    for step in range(100, 501, 100):
        exponent = step - 2 if unit == "step" else sum(end <= step - 2 for end in ends)
        expected.append((step, max(0.02, (0.99 if unit == "step" else 0.9) ** exponent)))
    logged = scalars(only_run(runs_dir))["charts/epsilon"]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    np.testing.assert_allclose([value for _, value in logged], [value for _, value in expected], rtol=1e-6)
    assert len({value for _, value in expected}) > 3


# -------------------------------------------------------------------------------------------------------------- whole runs


def test_a_whole_run_and_what_it_leaves_behind(script, tmp_path):
    result = run_main(script, *TINY, "--runs-dir", tmp_path, "--max-episode-steps", "30", "--keep-models", "2")
    assert result.returncode == 0, result.stderr
    path = only_run(tmp_path)
    assert path.name.startswith("MiniGrid-LavaGapS5-v0__rde_dqn__1__")
    evaluations = read_csv(path / "evaluations.csv")
    phases = [(300, "scheduled"), (340, "before_reset"), (340, "after_reset"), (460, "before_reset"), (460, "after_reset"),
              (500, "final")]  # fmt: skip
    assert [(int(row["global_step"]), row["phase"], int(row["episode"])) for row in evaluations] == [
        (*phase, episode) for phase in phases for episode in range(2)
    ]
    episodes = read_csv(path / "episodes.csv")
    assert len(episodes) > 10
    for row in episodes + evaluations:
        assert row["success"] == str(int(float(row["episodic_return"]) > 0))
    keys = scalars(path).keys()
    assert {"charts/epsilon", "charts/episodic_success", "eval/episodic_success", "eval_after_reset/episodic_success",
            "losses/td_loss_0", "losses/td_loss_1", "losses/q_values_1", "losses/gradient_norm_0", "rde/oldest_agent",
            "rde/acting_fraction_1"} <= keys  # fmt: skip
    assert [value for _, value in scalars(path)["rde/reset_agent"]] == [0, 1]
    final = model(path)
    assert final["num_resets"] == 2 and final["oldest_agent"] == 0 and len(final["q_networks"]) == 2
    assert {file.name for file in (path / "models").iterdir()} == {"step_00000250.pt", "step_00000500.pt"}
    assert equal(final, model(path, "models/step_00000500.pt"))

    # The weights make the same agent again.
    args = script.Args(**json.loads((path / "args.json").read_text())["args"])
    env = script.make_env(args)
    agent = script.Agent(args, env.observation_space, env.action_space, None, CPU)
    agent.load_weights(final)
    assert equal(agent.weights(), final) and agent.oldest.item() == 0


def test_one_seed_repeats_to_the_bit_and_two_differ(script, tmp_path):
    paths = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        assert (
            run_main(script, *TINY, "--env-id", "LunarLander-v3", "--seed", seed, "--runs-dir", tmp_path / name).returncode == 0
        )
        paths.append(only_run(tmp_path / name))
    first, again, other = paths
    assert_same_end(first, again)
    assert not equal(model(first), model(other)) and rows(first, "episodes.csv") != rows(other, "episodes.csv")


@pytest.mark.parametrize("replay_ratio", ["0.5", "3"])
def test_targets_are_copied_at_exactly_the_right_gradient_steps(script, tmp_path, monkeypatch, replay_ratio):
    """Every 7 gradient steps, also where a loop step has six, and also after a stop and a resume."""
    changed, updates, update = [], 0, script.Agent.update

    def watched_update(agent):
        nonlocal updates
        if updates and not torch.equal(values(agent.target_networks), watched_update.targets):
            changed.append(updates)
            assert torch.equal(values(agent.target_networks), values(agent.q_networks))  # of the end of that gradient step
        watched_update.targets = values(agent.target_networks)
        update(agent)
        updates += 1

    monkeypatch.setattr(script.Agent, "update", watched_update)
    arguments = [*TINY, "--env-id", "CartPole-v1", "--replay-ratio", replay_ratio, "--reset-interval", "0"]
    arguments += ["--runs-dir", tmp_path]
    assert stop_when(lambda run: run.global_step >= 330, script, *arguments).returncode == 143
    assert updates > 50
    assert run_main(script, *arguments).returncode == 0
    assert updates == float(replay_ratio) * 280
    assert changed == list(range(7, updates, 7))


def test_truncations_bootstrap_from_their_own_last_observation_and_lava_does_not(script, tmp_path, monkeypatch):
    added, played, add, step, train = [], [], script.ReplayBuffer.add, script.Task.step, script.train

    def watched_add(buffer, *transition):
        added.append([np.copy(part) for part in transition])
        add(buffer, *transition)

    def watched_step(env, action):
        before = env.observation.copy()
        outcome = step(env, action)
        played.append((before, *outcome[:4], int(action)))
        return outcome

    monkeypatch.setattr(script.ReplayBuffer, "add", watched_add)
    monkeypatch.setattr(script.Task, "step", watched_step)
    monkeypatch.setattr(script, "train", lambda args: (played.clear(), train(args)))  # without that of the check
    arguments = [*TINY, "--num-envs", "1", "--max-episode-steps", "12", "--reset-interval", "0", "--eval-interval", "0"]
    assert run_main(script, *arguments, "--runs-dir", tmp_path).returncode == 0
    assert len(added) == 500
    ends = {"truncated": 0, "terminated": 0}
    for i, (observation, action, reward, terminated, next_observation) in enumerate(added):
        before, after, played_reward, ended, cut_off, played_action = played[i]
        assert np.array_equal(observation, before) and np.array_equal(next_observation, after)
        assert (action, reward, terminated) == (played_action, played_reward, ended)
        if i + 1 < len(added) and not ended and not cut_off:
            assert np.array_equal(next_observation, added[i + 1][0])
        ends["truncated"] += cut_off and not ended
        ends["terminated"] += ended
    assert min(ends.values()) > 5


# ---------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "env_id, more",
    [
        ("MiniGrid-GoToDoor-5x5-v0", []), ("LunarLander-v3", ["--optimizer", "rmsprop"]),
        ("CartPole-v1", ["--epsilon-schedule", "exponential", "--epsilon-unit", "episode"]),
    ],
)  # fmt: skip
def test_stopped_and_typed_again(script, tmp_path, env_id, more):
    """Stopped in the middle of episodes; it goes on from there as if nothing had been."""
    arguments = [*TINY, "--env-id", env_id, *more, "--runs-dir"]
    assert run_main(script, *arguments, tmp_path / "undisturbed").returncode == 0
    runs_dir = tmp_path / "runs"
    in_the_middle = lambda run: run.global_step >= 310 and all(len(env.actions) > 2 for env in run.parts["envs"])
    assert stop_when(in_the_middle, script, *arguments, runs_dir).returncode == 143
    kept = torch.load(only_run(runs_dir) / "checkpoint.pt", weights_only=True)["parts"]
    assert 310 <= kept["run"]["global_step"] < 490 and all(len(env["episode"]["actions"]) > 2 for env in kept["envs"])
    result = run_main(script, *arguments, runs_dir)
    assert result.returncode == 0 and f"at step {kept['run']['global_step']}" in result.stdout
    assert_same_end(only_run(runs_dir), only_run(tmp_path / "undisturbed"))


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--env-id LunarLander-v2", "is not registered with Gymnasium; did you mean LunarLander-v3"),
        ("--env-id LavaGapS5", "did you mean MiniGrid-LavaGapS5-v0"),
        ("--env-id nothing-like-it", "examples are MiniGrid-LavaGapS5-v0 and LunarLander-v3"),
        ("--env-id no_module:Task-v0", "the module no_module cannot be imported"),
        ("--env-id Pendulum-v1", "has continuous actions, Box(-2.0, 2.0, (1,), float32)"),
        ("--env-id CarRacing-v3", "has pictures as observations, of shape (96, 96, 3)"),
        ("--env-id CarRacing-v3", "for Atari's pictures there is rde_dqn_atari.py"),
        ("--env-id AlienNoFrameskip-v4", "is an Atari game, and its observations are pictures; use rde_dqn_atari.py"),
        ("--env-id ALE/Alien-v5", "is an Atari game"),
        ("--env-id Blackjack-v1", "has observations in Tuple(Discrete(32), Discrete(11), Discrete(2))"),
        ("--env-id Reacher-v2", "does not work here: "),
        ("--actions move --env-id MiniGrid-GoToDoor-5x5-v0", "without an action that it needs; use --actions all"),
        ("--actions move --env-id MiniGrid-DoorKey-5x5-v0", "without an action that it needs; use --actions all"),
        ("--actions move --env-id CartPole-v1", "has a meaning in MiniGrid alone"),
        ("--tau 0.01", "--target-update-interval 100 and --tau 0.01: the target network follows by one of the two"),
        ("--target-update-interval 0", "--target-update-interval 0 and --tau 0: the target network follows by one of the two"),
        ("--reset-interval 0 --learning-starts 100000", "leaves nothing of --total-timesteps 100000 to learn in"),
        ("--reset-interval 1 --replay-ratio 2", "asks for more than one reset in a loop step; use at least 4"),
        ("--buffer-size 3 --batch-size 3 --num-envs 4", "--buffer-size 3 is too small for one step of 4 environments"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_created(script, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run_main(script, *arguments.split())
    assert message in error_line(result, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, value", [
    ("epsilon_decay", 0.0), ("epsilon_decay", 1.001), ("epsilon_decay", math.nan), ("max_episode_steps", -2), ("actions", "jump"),
    ("optimizer", "sgd"), ("hidden_dim", 0), ("num_hidden_layers", 0),
])  # fmt: skip
def test_values_out_of_range_are_refused(script, name, value):
    with pytest.raises(ValidationError, match=f"1 validation error for Args\n{name}\n"):
        script.Args(**{name: value})


def test_minigrid_without_the_package(script, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "minigrid" else find_spec(name))
    monkeypatch.chdir(tmp_path)
    line = error_line(run_main(script), code=2)
    assert line.endswith("--env-id MiniGrid-LavaGapS5-v0 needs the package minigrid: pip install minigrid")
    script.check_args(script.Args(env_id="CartPole-v1"))
    assert list(tmp_path.iterdir()) == []


class Grid(gym.Env):
    """Observations of any shape: the numbers from 0 on, plus how many steps have been made."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape, dtype, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 1 if dtype is np.bool_ else 255, shape, dtype)

    def observation(self, step: int) -> np.ndarray:
        space = self.observation_space
        return (np.arange(math.prod(space.shape)) % 200 + step).reshape(space.shape).astype(space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.num_steps = 0
        return self.observation(0), {}

    def step(self, action):
        self.num_steps += 1
        return self.observation(self.num_steps), 1.0, self.num_steps == 3, False, {}


@pytest.mark.parametrize(
    "shape, dtype, is_picture",
    [
        ((2, 3), np.float32, False), ((10, 10, 4), np.bool_, False), ((), np.float32, False), ((100, 100, 1), np.uint8, False),
        ((101, 100, 1), np.uint8, True), ((101, 100, 1), np.float32, False), ((101, 100), np.uint8, False),
    ],
)  # fmt: skip
def test_arrays_are_flattened_and_only_pictures_refused(script, monkeypatch, capsys, shape, dtype, is_picture):
    """Pictures are arrays of bytes with three dimensions and more than 10,000 numbers."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)
    gym.register("Grid-v0", Grid, max_episode_steps=5, kwargs={"shape": shape, "dtype": dtype})
    args = script.Args(env_id="Grid-v0")
    if is_picture:
        with pytest.raises(SystemExit) as end:
            script.check_environment(args)
        assert end.value.code == 2 and f"has pictures as observations, of shape {shape}" in capsys.readouterr().err
        return
    script.check_environment(args)
    env, plain = script.make_env(args), Grid(shape, dtype)
    space = env.observation_space
    assert space.shape == (math.prod(shape),) and space.dtype == np.float32
    for ours, theirs in ((env.reset(seed=0), plain.reset(seed=0)), (env.step(1), plain.step(1))):
        assert ours[0].dtype == np.float32 and np.array_equal(ours[0], np.float32(theirs[0]).ravel())


def test_environments_of_plugins_are_found_and_a_broken_plugin_stops_nobody(script, monkeypatch, tmp_path):
    """As MinAtar offers its own; Gymnasium does not load plugins by itself."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)
    register = lambda: gym.register("Plugin/Grid-v1", Grid, max_episode_steps=5, kwargs={"shape": (2, 3), "dtype": np.float32})
    plugins = [types.SimpleNamespace(name="old", load=lambda: register.no_such_name),
               types.SimpleNamespace(name="grids", load=lambda: register)]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins if group == "gymnasium.envs" else [])
    result = run_main(script, *TINY, "--env-id", "Plugin/Grid-v1", "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: ") == 1
    assert "warning: the plugin old cannot be loaded: AttributeError(" in result.stderr
    assert len(read_csv(only_run(tmp_path) / "episodes.csv")) == 166
    assert "did you mean Plugin/Grid-v1" in error_line(run_main(script, "--env-id", "Plugin/Grid-v2"), code=2)


def test_a_task_without_a_limit_is_warned_of(script, capsys):
    script.check_args(script.Args(env_id="CliffWalking-v1"))
    assert "--max-episode-steps sets one" in capsys.readouterr().err
    script.check_args(script.Args(env_id="CliffWalking-v1", max_episode_steps=50))
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_cartpole_is_learned(script, tmp_path):
    """By one agent without resets, with the settings of the docs: 475 of 500, at which CartPole counts as solved."""
    arguments = (
        "--env-id CartPole-v1 --num-agents 1 --reset-interval 0 --num-hidden-layers 2 --learning-rate 6.3e-4 --batch-size 128 "
        "--buffer-size 50000 --gamma 0.99 --target-update-interval 250 --replay-ratio 1 --exploration-fraction 0.12 "
        "--end-e 0.04 --eval-epsilon 0 --total-timesteps 50000 --eval-interval 2500"
    ).split()
    assert run_main(script, *arguments, "--runs-dir", tmp_path).returncode == 0
    returns = {}
    for row in read_csv(only_run(tmp_path) / "evaluations.csv"):
        returns.setdefault(row["global_step"], []).append(float(row["episodic_return"]))
    assert max(map(np.mean, returns.values())) >= 475
