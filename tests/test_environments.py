"""Other people's environments in the three scripts that take them: odd ones work, broken ones are one line."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_play import played, scores

from conftest import ROOT, assert_same_end, error_line, load_module, load_script, only_run, read_csv, run_main, stop_when

LENGTH = 48  # of an episode


class Foreign(gym.Env):
    """A walk of 48 steps, a point each. Its constructor takes no `render_mode`. `fault` is what is odd or broken in it."""

    def __init__(self, continuous: bool, fault: str = ""):
        self.fault, self.place, self.generator = fault, 0.0, None
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
        if fault == "boards":
            self.observation_space = gym.spaces.Box(0, 1, (10, 10, 4), np.bool_)
        self.action_space = gym.spaces.Box(-2.0, 3.0, (1,), np.float32) if continuous else gym.spaces.Discrete(2)
        if fault == "integers as actions":
            self.action_space = gym.spaces.Box(-2, 2, (1,), np.int64)
        elif fault == "actions without bounds":
            self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def observation(self, when: str) -> np.ndarray:
        if self.fault == "boards":
            return np.arange(400).reshape(10, 10, 4) % 7 == self.num_steps % 7
        if self.fault == f"another shape from {when}":
            return np.zeros(3, np.float32)
        return np.array([self.place, self.num_steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.generator = np.random.RandomState(seed)
        self.place, self.num_steps = self.generator.standard_normal(), 0
        observation = self.observation("reset")
        return observation if self.fault == "reset without info" else (observation, {"episode": {"r": 0.0, "l": 0}})

    def step(self, action):
        self.place += 0.1 * float(np.ravel(action)[0]) + self.generator.standard_normal()
        self.num_steps += 1
        told = {"episode": {"r": float(self.num_steps), "l": self.num_steps}, "cost": 1.0}  # as some do it, in every step
        reward, terminated = np.array([1.0]), self.num_steps == LENGTH and self.fault != "no end"
        if self.fault == "four values from step":
            return self.observation("step"), reward, terminated, told
        return self.observation("step"), reward, terminated, False, told


class Gray(Foreign):
    """Draws in gray."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, continuous: bool, render_mode=None):
        super().__init__(continuous)
        self.render_mode = render_mode

    def render(self):
        return np.zeros((20, 30), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def registered():
    before = dict(gym.registry)
    for name, continuous in (("Discrete", False), ("Box", True)):
        for fault in ("", *REFUSED, "boards", "no end", "integers as actions", "actions without bounds"):
            title = "".join(word.capitalize() for word in fault.split())
            gym.register(f"Foreign{name}{title}-v0", Foreign, kwargs={"continuous": continuous, "fault": fault})
        gym.register(f"Gray{name}-v0", Gray, kwargs={"continuous": continuous})
    yield
    gym.registry.clear()
    gym.registry.update(before)


REFUSED = {
    "four values from step": "not enough values to unpack",
    "reset without info": "(1,), but its observations are (2,)",  # two numbers: one is taken for the observation
    "another shape from reset": "(3,), but its observations are (2,)",
    "another shape from step": "(3,), but its observations are (2,)",
}
QUICK = (
    "--total-timesteps 200 --learning-starts 100 --replay-ratio 0.25 --batch-size 8 --hidden-dim 8 --num-hidden-layers 1 "
    "--buffer-size 150 --eval-interval 0 --eval-episodes 2 --reset-interval 16 --checkpoint-interval 0"
).split()
SCRIPTS = {"rde_dqn": "Discrete", "rde_sac_dmc": "Box", "rde_sac_safety": "Box"}  # and the actions that they take


def id_of(script: str, fault: str = "") -> str:
    return f"Foreign{SCRIPTS[script]}{''.join(word.capitalize() for word in fault.split())}-v0"


# ------------------------------------------------------------------------------------------------------ odd ones, broken ones


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_odd_environment_is_trained_in_and_evaluated_to_the_end(tmp_path, script):
    """An "episode" of its own in every info, rewards as arrays of one number, a constructor without `render_mode`."""
    result = run_main(load_script(script), *QUICK, "--env-id", id_of(script), "--runs-dir", tmp_path)
    assert result.returncode == 0 and "DeprecationWarning" not in result.stderr, result.stderr
    evaluations = read_csv(only_run(tmp_path) / "evaluations.csv")
    assert len(evaluations) == 2 * 7 and {float(row["episodic_return"]) for row in evaluations} == {LENGTH}
    episodes = read_csv(only_run(tmp_path) / "episodes.csv")
    assert [(int(row["global_step"]), float(row["episodic_return"]), float(row["episodic_length"])) for row in episodes] == [
        (48, 48, 48), (96, 48, 48), (144, 48, 48), (192, 48, 48)
    ]  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", REFUSED)
def test_a_broken_environment_is_one_line(tmp_path, script, fault):
    env_id = id_of(script, fault)
    line = error_line(run_main(load_script(script), *QUICK, "--env-id", env_id, "--runs-dir", tmp_path / "runs"), code=2)
    assert f"--env-id {env_id}" in line and REFUSED[fault] in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_pictures_that_no_video_can_be_made_of(tmp_path, script):
    """In gray, or none at all."""
    options = [*QUICK, "--capture-video", "--runs-dir", tmp_path / "runs", "--env-id"]
    line = error_line(run_main(load_script(script), *options, f"Gray{SCRIPTS[script]}-v0"), code=2)
    assert "draws no pictures in colour, (height, width, 3) uint8, but uint8 (20, 30)" in line
    line = error_line(run_main(load_script(script), *options, id_of(script)), code=2)
    assert "render_mode" in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["rde_sac_dmc", "rde_sac_safety"])
@pytest.mark.parametrize("fault", ["integers as actions", "actions without bounds"])
def test_actions_that_sac_cannot_take(tmp_path, script, fault):
    env_id = id_of(script, fault)
    line = error_line(run_main(load_script(script), *QUICK, "--env-id", env_id, "--runs-dir", tmp_path / "runs"), code=2)
    assert f"--env-id {env_id} has actions in Box(" in line and "continuous ones within bounds" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_boards_are_flattened(script):
    """As MinAtar's: 10 x 10 x 4 of yes and no."""
    script, env_id = load_script(script), id_of(script, "boards")
    env, plain = script.make_env(script.Args(env_id=env_id)), gym.make(env_id)
    assert env.observation_space.shape == (400,)
    env.reset(seed=5), plain.reset(seed=5)
    action = np.zeros(env.action_space.shape, np.float32 if env.action_space.shape else np.int64)
    for _ in range(10):
        ours, theirs = env.step(action)[0], plain.step(action)[0]
        assert ours.dtype == np.float32 and (ours == theirs.ravel()).all() and 0 < ours.sum() < 400


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_environment_without_an_end(tmp_path, capsys, script):
    """Is warned of, unless --max-episode-steps gives it one: a truncation."""
    script, env_id = load_script(script), id_of(script, "no end")
    for limit in (0, 20):
        args = script.Args(env_id=env_id, max_episode_steps=limit)
        script.check_environment(args)
        assert ("--max-episode-steps sets one" in capsys.readouterr().err) == (limit == 0)
    env = script.make_env(args)
    for _ in range(2):
        env.reset(seed=1)
        for step in range(1, 21):
            _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
            assert reward == 1 and not terminated and truncated == (step == 20) == ("episode" in info)
        assert (info["episode"]["r"], info["episode"]["l"]) == (20, 20)
    result = run_main(script, *QUICK, "--env-id", env_id, "--max-episode-steps", 20, "--runs-dir", tmp_path)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    assert {row["episodic_return"] for row in read_csv(only_run(tmp_path) / "evaluations.csv")} == {"20.0"}


def test_an_episode_is_played_to_its_end(tmp_path):
    """By play.py, too: an "episode" of the environment's own ends nothing there either."""
    options = ["--env-id", id_of("rde_dqn"), "--max-episode-steps", 100, "--runs-dir", tmp_path]
    assert run_main(load_script("rde_dqn"), *QUICK, *options).returncode == 0
    lines = played(load_module("play", ROOT / "play.py"), only_run(tmp_path), "--episodes", 2)
    assert scores(lines) == [("48", "48")] * 2  # return and length


# --------------------------------------------------------------------------------------- an episode is its seed and its actions


class Diary:
    """All episodes of a script's tasks: (seed, actions, observations, rewards, end)."""

    def __init__(self, monkeypatch, task: type):
        self.episodes, begin, step = [], task.begin, task.step
        diary = self

        def begun(env, seed):
            begin(env, seed)
            diary.episodes.append((id(env), seed, [], [env.observation.copy()], []))

        def stepped(env, action):
            result = step(env, action)
            _, _, actions, observations, ends = next(e for e in reversed(diary.episodes) if e[0] == id(env))
            actions.append(np.array(action))
            observations.append(result[0].copy())
            ends.append(result[1:4])
            return result

        monkeypatch.setattr(task, "begin", begun)
        monkeypatch.setattr(task, "step", stepped)


TASKS = [
    ("rde_dqn", "CartPole-v1", "Task", "--total-timesteps 300"), ("rde_dqn", "LunarLander-v3", "Task", "--total-timesteps 500"),
    ("rde_dqn", "ForeignDiscrete-v0", "Task", ""), ("rde_dqn", "MinAtar/Breakout-v1", "Task", "--total-timesteps 300"),
    ("rde_sac_dmc", "Pendulum-v1", "GymnasiumTask", "--max-episode-steps 60 --total-timesteps 250"),
    ("rde_sac_dmc", "ForeignBox-v0", "GymnasiumTask", ""),
    ("rde_sac_dmc", "BipedalWalker-v3", "GymnasiumTask", "--max-episode-steps 60 --total-timesteps 400"),
]  # fmt: skip


@pytest.mark.parametrize("name, env_id, task, more", TASKS)
def test_the_episodes_of_a_run_are_those_of_their_seeds_in_fresh_environments(tmp_path, monkeypatch, name, env_id, task, more):
    if env_id.startswith("MinAtar/"):
        pytest.importorskip("minatar")
    script = load_script(name)
    options = [*QUICK, "--env-id", env_id, "--runs-dir", tmp_path, "--eval-episodes", "1", *more.split()]
    with monkeypatch.context() as patched:
        diary = Diary(patched, getattr(script, task))
        result = run_main(script, *options)
    assert result.returncode == 0, result.stderr
    args = script.Args(env_id=env_id, **({"max_episode_steps": 60} if "--max-episode-steps" in more else {}))
    seeds = np.random.default_rng(first := script.derive_seed(1, script.ENVIRONMENT, 0))
    (trained,) = {env for env, seed, actions, *_ in diary.episodes if seed == first and len(actions) > 1}  # not the check's
    training = [(seed, len(actions)) for env, seed, actions, *_ in diary.episodes if env == trained]
    assert len(training) > 2 and sum(length for _, length in training) >= int(options[-1] if more else 200)
    assert [seed for seed, _ in training] == [first] + [int(seeds.integers(2**31)) for _ in training[1:]]
    for _, seed, actions, observations, ends in diary.episodes:
        env = script.make_env(args)
        assert np.array_equal(env.reset(seed=seed)[0], observations[0])
        for action, expected, end in zip(actions, observations[1:], ends, strict=True):
            observation, *result = env.step(action)
            assert np.array_equal(observation, expected) and result[:3] == list(end)
        env.close()


# ------------------------------------------------------------------------------------------------- RDE+SAC on Gymnasium's tasks


@pytest.fixture(scope="module")
def sac():
    return load_script("rde_sac_dmc")


def test_actions_are_scaled_to_the_bounds(sac):
    env = sac.make_env(sac.Args(env_id="ForeignBox-v0"))  # from -2 to 3
    asked, step = [], env.unwrapped.step
    env.unwrapped.step = lambda action: (asked.append(action), step(action))[1]
    env.reset(seed=1)
    for action in (-1.0, 0.0, 1.0, 0.3):
        assert env.action_space.contains(np.array([action], np.float32))
        env.step(np.array([action], np.float32))
    assert [action.dtype for action in asked] == [np.float32] * 4
    np.testing.assert_allclose(np.ravel(asked), [-2, 0.5, 3, 1.25], rtol=1e-6)
    # Pendulum's torque, from -2 to 2, in its own words: what it costs.
    ours, bare = sac.make_env(sac.Args(env_id="Pendulum-v1")), gym.make("Pendulum-v1")
    ours.reset(seed=3), bare.reset(seed=3)
    for action in (-1.0, 0.25, 1.0):
        reward = ours.step(np.array([action], np.float32))[1]
        assert reward == bare.step(np.array([2 * action], np.float32))[1]


@pytest.mark.parametrize(
    "env_id, options, stop_at",
    [
        ("Pendulum-v1", "--total-timesteps 450", 312),
        # Box2D's world, made anew in every episode; here the fourth and later ones of 40 steps.
        ("BipedalWalker-v3", "--max-episode-steps 40 --total-timesteps 260", 145),
    ],
)
def test_a_stopped_run_goes_on_exactly(tmp_path, sac, env_id, options, stop_at):
    command = [*QUICK, "--env-id", env_id, *options.split(), "--eval-episodes", "1", "--runs-dir"]
    assert run_main(sac, *command, tmp_path / "undisturbed").returncode == 0
    stopped = stop_when(lambda run: run.global_step >= stop_at, sac, *command, tmp_path / "stopped")
    assert stopped.returncode == 143 and f"stopped at step {stop_at};" in stopped.stderr
    result = run_main(sac, *command, tmp_path / "stopped")
    assert result.returncode == 0 and "continuing" in result.stdout, result.stderr
    assert_same_end(only_run(tmp_path / "stopped"), only_run(tmp_path / "undisturbed"))
    assert len(read_csv(only_run(tmp_path / "stopped") / "episodes.csv")) >= 2


def test_a_limit_truncates_and_bootstraps(tmp_path, sac, monkeypatch):
    """The transition that is cut off is stored as no end, with its own last observation, not the next episode's first."""
    stored, add = [], sac.ReplayBuffer.add

    def watched(buffer, *row):
        stored.append([np.copy(part) for part in row])
        add(buffer, *row)

    monkeypatch.setattr(sac.ReplayBuffer, "add", watched)
    options = "--env-id Pendulum-v1 --max-episode-steps 30 --total-timesteps 120".split()
    result = run_main(sac, *QUICK, *options, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(stored) == 120 and not any(terminated for *_, terminated, _ in stored)
    episodes = read_csv(only_run(tmp_path) / "episodes.csv")
    assert [int(row["global_step"]) for row in episodes] == [30, 60, 90, 120]
    for step, (observation, *_, next_observation) in enumerate(stored[:-1], start=1):
        assert np.array_equal(next_observation, stored[step][0]) == (step % 30 != 0)
        # Pendulum turns by 0.05 s * 8 rad/s at most in a step: the last observation is a neighbour.
        angle = np.arctan2(observation[1], observation[0]) - np.arctan2(next_observation[1], next_observation[0])
        assert abs((angle + np.pi) % (2 * np.pi) - np.pi) < 0.41


# ------------------------------------------------------------------------------------------------------ what a checkpoint keeps


def test_arrays_whose_memory_runs_backwards_are_kept(tmp_path):
    script = load_script("rde_dqn")
    arrays = {"mirrored": np.arange(6).reshape(2, 3)[:, ::-1], "turned": np.arange(4.0).reshape(2, 2).T, "number": np.array(3)}
    torch.save(script.state_of(arrays), tmp_path / "state.pt")
    kept = script.value_of(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(np.array_equal(kept[name], array) and kept[name].shape == array.shape for name, array in arrays.items())


def test_gymnasiums_own_wrappers_are_kept():
    """Running means in objects of their own, two wrappers deep."""
    script = load_script("rde_dqn")
    envs = [script.make_env(script.Args(env_id="CartPole-v1")) for _ in range(2)]
    env, other = (gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(env)) for env in envs)
    env.reset(seed=1), other.reset(seed=1)
    play = lambda one, steps: [(one.step(i % 2), one.reset() if i % 9 == 8 else None) for i in range(steps)]
    play(env, 40)
    script.restored(other, script.state_of(env))
    for (ours, _), (theirs, _) in zip(play(other, 30), play(env, 30)):
        assert np.array_equal(ours[0], theirs[0]) and ours[1:4] == theirs[1:4]
