"""What rde_dqn.py has of its own: targets, epsilon, and what it refuses. Its agent: test_agent.py; its environments:
test_minigrid.py and test_environments.py.
"""

import importlib.metadata
import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn

from conftest import error_line, load_script, only_run, read_csv, run_main, scalars, stop_when

# Two resets of one of two agents each, at steps 340 and 460, and a scheduled evaluation at 300.
TINY = (
    "--total-timesteps 500 --learning-starts 220 --replay-ratio 0.5 --batch-size 16 --hidden-dim 8 --num-hidden-layers 2 "
    "--buffer-size 400 --target-update-interval 7 --reset-interval 120 --eval-interval 300 --eval-episodes 2 --num-envs 2"
).split()


@pytest.fixture(scope="module")
def script():
    return load_script("rde_dqn")


def values(network) -> torch.Tensor:
    """All parameters of a network, one after another."""
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


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


@pytest.mark.parametrize("unit", ["step", "episode"])
def test_epsilon_of_a_run_also_across_a_resume(script, tmp_path, unit):
    """What is logged at step t is epsilon before the step, after t - 2 steps of two environments; and so many are explored."""
    decay = 0.99 if unit == "step" else 0.9
    arguments = [*TINY, *f"--env-id CartPole-v1 --epsilon-schedule exponential --epsilon-unit {unit}".split()]
    arguments += ["--epsilon-decay", decay, "--end-e", 0.02, "--reset-interval", 0, "--runs-dir", tmp_path]
    assert stop_when(lambda run: run.global_step >= 262, script, *arguments).returncode == 143
    assert run_main(script, *arguments).returncode == 0
    ends = [int(row["global_step"]) for row in read_csv(only_run(tmp_path) / "episodes.csv")]
    expected = []
    for step in range(100, 501, 100):
        exponent = step - 2 if unit == "step" else sum(end <= step - 2 for end in ends)
        expected.append((step, max(0.02, decay**exponent)))
    logged = scalars(only_run(tmp_path))["charts/epsilon"]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    np.testing.assert_allclose([value for _, value in logged], [value for _, value in expected], rtol=1e-6)
    assert len({value for _, value in expected}) > 3


# -------------------------------------------------------------------------------------------------------------- whole runs


def test_success_stands_in_the_files_and_curves(script, tmp_path):
    result = run_main(script, *TINY, "--runs-dir", tmp_path, "--max-episode-steps", "30")
    assert result.returncode == 0, result.stderr
    path = only_run(tmp_path)
    episodes, evaluations, curves = read_csv(path / "episodes.csv"), read_csv(path / "evaluations.csv"), scalars(path)
    assert len(episodes) > 10 and len(evaluations) == 2 * 6
    for row in episodes + evaluations:
        assert row["success"] == str(int(float(row["episodic_return"]) > 0))
    assert {"charts/episodic_success", "eval/episodic_success", "eval_after_reset/episodic_success"} <= curves.keys()


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


# --------------------------------------------------------------------------------------------------------------- bad input


def test_the_target_network_follows_by_one_of_the_two(script, capsys):
    with pytest.raises(SystemExit):
        script.check_args(script.Args(target_update_interval=0))
    assert "--target-update-interval 0 and --tau 0: the target network follows by one of the two" in capsys.readouterr().err


@pytest.fixture
def registry(monkeypatch):
    """Gymnasium's, as it was when the test is over."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)


class Screen(gym.Env):
    """Observations of any shape."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, shape, dtype, render_mode=None):
        self.observation_space = gym.spaces.Box(0, 255, shape, dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        return self.reset()[0], 1.0, False, False, {}


@pytest.mark.parametrize(
    "shape, dtype, is_picture",
    [
        ((), np.float32, False), ((100, 100, 1), np.uint8, False), ((101, 100, 1), np.uint8, True),
        ((101, 100, 1), np.float32, False), ((101, 100), np.uint8, False),
    ],
)  # fmt: skip
def test_arrays_are_flattened_and_only_pictures_refused(script, registry, capsys, shape, dtype, is_picture):
    """Pictures are arrays of bytes with three dimensions and more than 10,000 numbers."""
    gym.register("Screen-v0", Screen, max_episode_steps=5, kwargs={"shape": shape, "dtype": dtype})
    args = script.Args(env_id="Screen-v0")
    if is_picture:
        with pytest.raises(SystemExit) as end:
            script.check_environment(args)
        assert end.value.code == 2 and f"has pictures as observations, of shape {shape}" in capsys.readouterr().err
    else:
        script.check_environment(args)
        space = script.make_env(args).observation_space
        assert space.shape == (math.prod(shape),) and space.dtype == np.float32


def test_environments_of_plugins_are_found_and_a_broken_plugin_stops_nobody(script, registry, monkeypatch, tmp_path):
    """As MinAtar offers its own; Gymnasium does not load plugins by itself."""
    register = lambda: gym.register("Plugin/Cart-v1", gym.spec("CartPole-v1").entry_point, max_episode_steps=5)
    plugins = [types.SimpleNamespace(name="old", load=lambda: register.no_such_name),
               types.SimpleNamespace(name="carts", load=lambda: register)]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins if group == "gymnasium.envs" else [])
    result = run_main(script, *TINY, "--env-id", "Plugin/Cart-v1", "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: ") == 1
    assert "warning: the plugin old cannot be loaded: AttributeError(" in result.stderr
    assert len(read_csv(only_run(tmp_path) / "episodes.csv")) == 2 * 50
    assert "did you mean Plugin/Cart-v1" in error_line(run_main(script, "--env-id", "Plugin/Cart-v2"), code=2)


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
