"""The DeepMind Control wrapper of RDE+SAC."""

import io
import os
import subprocess
import sys

import dm_env
import numpy as np
import pytest
import torch
from dm_control import suite

from conftest import ROOT, environment

BENCHMARKING = ["-".join(names) for names in suite.BENCHMARKING]


def play(env, seed, num_steps, first=None):
    """Observations and rewards of an episode's first steps with random actions."""
    rng = np.random.default_rng(0)
    trace = [env.reset(seed=seed)[0]] if first is None else [first]
    for _ in range(num_steps):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation.dtype == np.float32 and observation.shape == env.observation_space.shape
        assert type(reward) is float and type(terminated) is bool and type(truncated) is bool
        assert not (terminated or truncated or info)
        trace += [observation, np.float32(reward)]
    return np.concatenate([np.ravel(part) for part in trace])


@pytest.mark.parametrize("env_id", [*BENCHMARKING, "quadruped-walk", "humanoid_CMU-run"])
def test_every_task_of_the_benchmark(sac, env_id):
    """Constructs and steps; an episode depends on its seed alone, also in an environment that played before."""
    env, other = sac.make_env(sac.Args(env_id=env_id)), sac.make_env(sac.Args(env_id=env_id))
    first = play(env, 3, 10)
    assert np.isfinite(first).all()
    different = play(env, 4, 10)
    assert not np.array_equal(first, different)
    np.testing.assert_array_equal(play(env, 3, 10), first)
    np.testing.assert_array_equal(play(other, 3, 10), first)
    env.close()


def test_there_are_28_tasks():
    assert len(BENCHMARKING) == 28


def test_equal_to_dm_control(sac):
    """Rewards and observations of an environment that is driven directly, over the end of an episode."""
    env, plain = sac.make_env(sac.Args(env_id="walker-run")), suite.load("walker", "run", task_kwargs={"random": 9})
    observation, _ = env.reset(seed=9)
    timestep = plain.reset()
    rng, episodic_return = np.random.default_rng(1), 0.0
    for step in range(1, 1_051):
        expected = np.concatenate([np.ravel(timestep.observation[name]) for name in plain.observation_spec()])
        np.testing.assert_array_equal(observation, expected.astype(np.float32))
        action = rng.uniform(-1, 1, 6).astype(np.float32)
        timestep = plain.step(action.astype(np.float64))
        observation, reward, terminated, truncated, info = env.step(action)
        assert reward == timestep.reward
        episodic_return += reward
        assert not terminated
        assert truncated == timestep.last() == (step == 1_000)
        assert info == ({"episode": {"r": episodic_return, "l": 1_000}} if truncated else {})
        if truncated:
            observation, _ = env.reset()
            timestep = plain.reset()
            episodic_return = 0.0


@pytest.mark.parametrize(
    "discount, last, expected", [(1.0, True, (False, True)), (0.0, True, (True, False)), (1.0, False, (False, False))]
)
def test_terminated_only_where_the_discount_is_zero(sac, discount, last, expected):
    env = sac.make_env(sac.Args(env_id="hopper-hop"))
    env.reset(seed=0)
    observation = env.env.step(np.zeros(4)).observation
    step_type = dm_env.StepType.LAST if last else dm_env.StepType.MID
    env.env.step = lambda action: dm_env.TimeStep(step_type, 0, discount, observation)  # hopper's reward can be the int 0
    _, reward, terminated, truncated, info = env.step(np.zeros(4, np.float32))
    assert (terminated, truncated) == expected and ("episode" in info) == last
    assert reward == 0 and type(reward) is float
    env.env.step = lambda action: dm_env.TimeStep(step_type, None, discount, observation)
    assert env.step(np.zeros(4, np.float32))[1] == 0.0


def test_actions_are_rescaled(sac):
    """The bounds of quadruped-walk are not -1 and 1 everywhere."""
    env = sac.make_env(sac.Args(env_id="quadruped-walk"))
    env.reset(seed=0)
    spec = env.env.action_spec()
    assert env.action_space.shape == (12,) and (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert spec.maximum.max() > 1
    received, inner_step = [], env.env.step
    env.env.step = lambda action: received.append(action) or inner_step(action)
    for action in (-1, 1, 0, 0.5):
        env.step(np.full(12, action, np.float32))
    low, high = spec.minimum, spec.maximum
    for action, expected in zip(received, (low, high, (low + high) / 2, low + 0.75 * (high - low)), strict=True):
        assert action.dtype == np.float64
        np.testing.assert_allclose(action, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "env_id",
    ["hopper-hop", "quadruped-run", "reacher-hard", "finger-turn_hard", "cartpole-balance", "fish-swim",
     "manipulator-insert_peg", "point_mass-hard", "swimmer-swimmer6"],
)  # fmt: skip
def test_an_environment_goes_on_in_a_fresh_one(sac, env_id):
    """Saved in the middle of its second episode: the next 300 steps, over the episode's end, are the same bytes."""
    env, rng = sac.make_env(sac.Args(env_id=env_id)), np.random.default_rng(1)
    env.reset(seed=4)
    env.env._step_count = 900  # a short first episode
    random_action = lambda: rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
    while not env.step(random_action())[3]:
        pass
    env.reset()
    for _ in range(100):
        env.step(random_action())
    env.env._step_count += 700
    file = io.BytesIO()
    torch.save(sac.state_of(env), file)
    fresh = sac.make_env(sac.Args(env_id=env_id))
    fresh.reset(seed=5)
    assert sac.restored(fresh, torch.load(io.BytesIO(file.getvalue()), weights_only=True)) is fresh
    ends = 0
    for _ in range(300):
        action = random_action()
        (ours, *our_outcome), (theirs, *their_outcome) = fresh.step(action), env.step(action)
        assert ours.tobytes() == theirs.tobytes() and our_outcome == their_outcome
        if our_outcome[1] or our_outcome[2]:
            ends += 1
            assert our_outcome[3]["episode"]["l"] == 300
            (ours, _), (theirs, _) = fresh.reset(), env.reset()
            assert ours.tobytes() == theirs.tobytes()
    assert ends == 1


@pytest.mark.slow
def test_no_task_writes_anything_else_into_its_model(sac):
    """Every array that an episode's start changes is saved. (quadruped-escape starts only where there is OpenGL.)"""
    changed = set()
    for env_id in ["-".join(names) for names in suite.ALL_TASKS]:
        if env_id.startswith(("lqr", "dog", "humanoid")) or env_id == "quadruped-escape":  # the big ones change nothing
            continue
        env = sac.make_env(sac.Args(env_id=env_id))
        model = env.env.physics.model.ptr
        names = [name for name in dir(model) if isinstance(getattr(model, name), np.ndarray)]
        before = {name: getattr(model, name).copy() for name in names}
        for seed in (1, 2):
            env.reset(seed=seed)
            env.step(np.zeros(env.action_space.shape, np.float32))
        changed |= {name for name in names if not np.array_equal(getattr(model, name), before[name])}
    assert changed == set(sac.MODEL_ARRAYS) - {"hfield_data"}


def test_mujoco_gl_is_set_for_pictures_alone(sac, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    sac.import_suite()
    assert "MUJOCO_GL" not in os.environ
    if sys.platform == "linux":
        sac.import_suite(for_pictures=True)
        assert os.environ["MUJOCO_GL"] == "egl"
        monkeypatch.setenv("MUJOCO_GL", "osmesa")
        sac.import_suite(for_pictures=True)
        assert os.environ["MUJOCO_GL"] == "osmesa"


PICTURES = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import rde_sac_dmc as sac
env = sac.make_env(sac.Args(env_id="hopper-hop"), render=True)
env.reset(seed=0)
try:
    pictures = [env.render()]
except Exception as error:
    sys.exit(f"no way to draw: {error}")
for _ in range(7):
    env.step(np.ones(4, np.float32))
    pictures.append(env.render())
print(env.metadata["render_fps"], *np.shape(pictures), np.std(pictures[0]), np.abs(pictures[0] - 1.0 * pictures[7]).max())
"""


def test_pictures():
    """In a process of its own, because MuJoCo chooses how to draw when it is imported."""
    variables = {name: value for name, value in environment().items() if name not in ("MUJOCO_GL", "DISPLAY")}
    command = [sys.executable, "-c", PICTURES, str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    if "no way to draw" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    fps, *shape, deviation, change = map(float, result.stdout.split())
    assert fps == 50  # hopper's control step is 20 ms
    assert shape == [8, 192, 256, 3] and deviation > 10 and change > 10
