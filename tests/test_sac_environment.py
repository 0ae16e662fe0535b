"""The DeepMind Control Suite in RDE+SAC: its wrapper, the ways to draw, and what diverges. That episodes depend on their seeds and
go on elsewhere: test_environments.py.
"""

import os
import subprocess
import sys

import dm_env
import numpy as np
import pytest
from dm_control import suite

from conftest import ROOT, command, environment, error_line, only_run, read_csv, run_main

TINY = (
    "--env-id cartpole-balance --hidden-dim 8 --batch-size 16 --buffer-size 2000 --learning-starts 100 --total-timesteps 300 "
    "--replay-ratio 0.5 --eval-interval 0 --eval-episodes 1 --reset-interval 0"
).split()


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


# ------------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("options", [[], ["--capture-video"], ["--env-id", "quadruped-escape"]])
def test_a_way_to_draw_that_does_not_exist(options, tmp_path):
    """MuJoCo reads MUJOCO_GL when it is imported, and raises an error of its own."""
    result = subprocess.run(
        command("rde_sac_dmc", *options), capture_output=True, text=True, cwd=tmp_path,
        env=environment() | {"MUJOCO_GL": "nonsense"}, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "finds no way to draw with MUJOCO_GL=nonsense" in result.stderr
    assert result.stderr.endswith("and set MUJOCO_GL=egl\n" if options else "unset it\n")
    assert not list(tmp_path.iterdir())


def test_a_policy_that_diverges_says_so(sac, tmp_path):
    """Before the physics would stop with an error of its own."""
    line = error_line(run_main(sac, *TINY, "--learning-rate", "1e29", "--runs-dir", tmp_path))
    assert line.startswith("error: cartpole-balance: an action is not finite at step 10") and line.endswith(
        "try a lower --learning-rate"
    )


@pytest.mark.slow
def test_plain_sac_learns_to_balance(sac, tmp_path):
    """About a minute on one core. Seeds 1, 2, 3 ended with 765, 911, 664; new policies score between 270 and 390."""
    options = (
        "--env-id cartpole-balance --num-agents 1 --reset-interval 0 --total-timesteps 6000 --learning-starts 1000 --hidden-dim 64 "
        "--buffer-size 20000 --batch-size 64 --learning-rate 1e-3 --tau 0.02 --replay-ratio 4 --eval-interval 1000 --eval-episodes 5"
    ).split()
    assert run_main(sac, *options, "--runs-dir", tmp_path).returncode == 0
    evaluations = read_csv(only_run(tmp_path) / "evaluations.csv")
    before, after = (
        np.mean([float(row["episodic_return"]) for row in evaluations if row["global_step"] == step])
        for step in ("1000", "6000")
    )
    assert before < 450
    assert after > 550
