"""Environments in the three scripts that take any: what is stored, episodes that go on elsewhere, odd and broken ones."""

import importlib.util
import io
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from dm_control import suite

from agents import shortened
from conftest import (
    ROOT,
    environment,
    error_line,
    load_script,
    only_run,
    read_csv,
    run_main,
)

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
            self.generator = np.random.RandomState(None if self.fault == "unrepeatable" else seed)
        self.place, self.num_steps = self.generator.standard_normal(), 0
        observation = self.observation("reset")
        return observation if self.fault == "reset without info" else (observation, {"episode": {"r": 0.0, "l": 0}})

    def step(self, action):
        self.place += 0.1 * float(np.ravel(action)[0]) + self.generator.standard_normal()
        self.num_steps += 1
        told = {"episode": {"r": float(self.num_steps), "l": self.num_steps}}  # as some do it, in every step
        told |= {} if self.fault == "no cost" else {"cost": float(self.num_steps % 2)}
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
    for name, continuous in (("Discrete", False), ("Box", True)):
        for fault in ("", *REFUSED, *ODD):
            title = "".join(word.capitalize() for word in fault.split())
            gym.register(f"Foreign{name}{title}-v0", Foreign, kwargs={"continuous": continuous, "fault": fault})
        gym.register(f"Gray{name}-v0", Gray, kwargs={"continuous": continuous})
    yield
    for env_id in [env_id for env_id in gym.registry if env_id.startswith(("Foreign", "Gray"))]:
        del gym.registry[env_id]


REFUSED = {
    "four values from step": "not enough values to unpack",
    "reset without info": "(1,), but its observations are (2,)",  # two numbers: one is taken for the observation
    "another shape from reset": "(3,), but its observations are (2,)",
    "another shape from step": "(3,), but its observations are (2,)",
}
ODD = ("boards", "no end", "no cost", "unrepeatable", "integers as actions", "actions without bounds")
QUICK = (
    "--total-timesteps 200 --learning-starts 100 --replay-ratio 0.25 --batch-size 8 --hidden-dim 8 --num-hidden-layers 1 "
    "--buffer-size 150 --eval-interval 0 --eval-episodes 2 --reset-interval 16 --checkpoint-interval 0"
).split()
SCRIPTS = {"rde_dqn": "Discrete", "rde_sac_dmc": "Box", "rde_sac_safety": "Box"}  # and the actions that they take


def id_of(script, fault: str = "") -> str:
    return f"Foreign{SCRIPTS[getattr(script, '__name__', script)]}{''.join(word.capitalize() for word in fault.split())}-v0"


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


CANNOT_BE_USED = [
    *((script, id_of(script, fault), message) for script in SCRIPTS for fault, message in REFUSED.items()),
    *((script, id_of(script, fault), "continuous ones within bounds") for script in ("rde_sac_dmc", "rde_sac_safety")
      for fault in ("integers as actions", "actions without bounds")),
    # Pictures that no video can be made of: in gray, or none at all.
    *((script, f"Gray{actions}-v0 --capture-video", "draws no pictures in colour, (height, width, 3) uint8, but uint8 (20, 30)")
      for script, actions in SCRIPTS.items()),
    *((script, f"{id_of(script)} --capture-video", " with pictures (render_mode rgb_array): ") for script in SCRIPTS),
    ("rde_dqn", "LunarLander-v2", "is not registered with Gymnasium; did you mean LunarLander-v3"),
    ("rde_dqn", "LavaGapS5", "did you mean MiniGrid-LavaGapS5-v0"),
    ("rde_dqn", "nothing-like-it", "examples are MiniGrid-LavaGapS5-v0 and LunarLander-v3"),
    ("rde_dqn", "no_module:Task-v0", "does not work here: No module named 'no_module'"),
    ("rde_dqn", "Pendulum-v1", "has continuous actions, Box(-2.0, 2.0, (1,), float32)"),
    ("rde_dqn", "CarRacing-v3", "has pictures as observations, of shape (96, 96, 3)"),
    ("rde_dqn", "AlienNoFrameskip-v4", "is an Atari game, and its observations are pictures; use rde_dqn_atari.py"),
    ("rde_dqn", "Blackjack-v1", "has observations in Tuple(Discrete(32), Discrete(11), Discrete(2))"),
    ("rde_dqn", "Reacher-v2", "does not work here: "),
    ("rde_dqn", "MiniGrid-GoToDoor-5x5-v0 --actions move", "without an action that it needs; use --actions all"),
    ("rde_dqn", "MiniGrid-DoorKey-5x5-v0 --actions move", "without an action that it needs; use --actions all"),
    ("rde_dqn", "CartPole-v1 --actions move", "has a meaning in MiniGrid alone"),
    ("rde_sac_safety", "ForeignBoxNoCost-v0", 'reports no cost: its step() gives neither info["cost"] nor six values'),
    ("rde_sac_safety", "Pendulum-v1", "Pendulum-v1 reports no cost"),
    ("rde_sac_safety", "CartPole-v1", "has actions in Discrete(2), and this script takes continuous ones within bounds (Box)"),
    ("rde_sac_safety", "SafetyHalfCheetahVelocity-v0", "did you mean SafetyHalfCheetahVelocity-v1?"),
    ("rde_sac_safety", "hopper-hop", "is no environment"),
    ("rde_sac_safety", "nowhere:Walk-v0", "does not start: No module named 'nowhere'"),
]  # fmt: skip


@pytest.mark.parametrize("script, env_id, message", CANNOT_BE_USED)
def test_what_cannot_be_used_is_one_line_and_nothing_is_created(tmp_path, monkeypatch, script, env_id, message):
    monkeypatch.chdir(tmp_path)
    result = run_main(load_script(script), *QUICK, "--env-id", *env_id.split())
    line = error_line(result, code=2)
    assert message in line and (f"--env-id {env_id.split()[0]}" in line or "has a meaning" in line)
    assert not result.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, env_id, package, other", [
    ("rde_dqn", "MiniGrid-LavaGapS5-v0", "minigrid", "CartPole-v1"),
    ("rde_sac_safety", "SafetyPointMaze-v0", "gymnasium-robotics", "SafetyHalfCheetahVelocity-v1"),
])  # fmt: skip
def test_a_package_that_is_missing(monkeypatch, script, env_id, package, other):
    """Is named, if the environment needs it."""
    script, find_spec = load_script(script), importlib.util.find_spec
    missing = lambda name, *more: None if name == package.replace("-", "_") else find_spec(name, *more)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    line = error_line(run_main(script, "--env-id", env_id), code=2)
    assert line.endswith(f"--env-id {env_id} needs the package {package}: pip install {package}")
    script.check_args(script.Args(env_id=other))


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


# ----------------------------------------------------------------------------------------------- what is played and stored


class Diary:
    """All episodes of a script's tasks, (task, seed, actions, observations, ends), and what a run does with them."""

    def __init__(self, monkeypatch, script, task: type):
        self.episodes, self.stored, self.updates, self.acts, self.envs = [], [], [], [], []
        begin, step, add, update = task.begin, task.step, script.ReplayBuffer.add, script.Agent.update
        act, restore = script.Agent.act, script.Run.restore

        def begun(env, seed):
            result = begin(env, seed)
            self.episodes.append((env, seed, [], [env.observation.copy()], []))
            return result

        def stepped(env, action):
            result = step(env, action)
            _, _, actions, observations, ends = next(e for e in reversed(self.episodes) if e[0] is env)
            actions.append(np.array(action))
            observations.append(result[0].copy())
            ends.append([*result[1:4], result[4].get("cost")])
            return result

        def acted(agent, *arguments, counted=False, **more):
            self.acts += [len(self.stored)] if counted else []
            return act(agent, *arguments, counted=counted, **more)

        monkeypatch.setattr(task, "begin", begun)
        monkeypatch.setattr(task, "step", stepped)
        monkeypatch.setattr(script.Agent, "act", acted)
        monkeypatch.setattr(script.Agent, "update", lambda agent: (self.updates.append(len(self.stored)), update(agent)))
        monkeypatch.setattr(
            script.ReplayBuffer, "add", lambda _, *row: (self.stored.append([np.copy(part) for part in row]), add(_, *row))
        )
        monkeypatch.setattr(script.Run, "restore", lambda run, parts: (self.envs.extend(parts["envs"]), restore(run, parts))[1])


# The number of steps, and a limit of episodes, or none.
PLAYED = [
    ("rde_dqn", "CartPole-v1", 300, 0), ("rde_dqn", "LunarLander-v3", 400, 60), ("rde_dqn", "ForeignDiscrete-v0", 200, 0),
    ("rde_dqn", "MinAtar/Breakout-v1", 300, 0), ("rde_dqn", "MiniGrid-LavaGapS5-v0", 300, 12),
    ("rde_sac_dmc", "Pendulum-v1", 250, 30), ("rde_sac_dmc", "ForeignBox-v0", 200, 0), ("rde_sac_dmc", "BipedalWalker-v3", 400, 60),
    ("rde_sac_safety", "ForeignBox-v0", 200, 0), ("rde_sac_safety", "SafetyHopperVelocity-v1", 300, 12),
]  # fmt: skip


@pytest.mark.parametrize("name, env_id, num_steps, limit", PLAYED)
def test_what_is_played_is_stored_and_is_that_of_the_seeds_in_fresh_environments(
    tmp_path, monkeypatch, name, env_id, num_steps, limit
):
    """Of two environments side by side. A truncation is stored as no end, with its own last observation, from which it
    bootstraps. Gradient steps come before the loop step's transitions; actions before learning are uniform ones in SAC."""
    if env_id.startswith("MinAtar/"):
        pytest.importorskip("minatar")
    script = load_script(name)
    task = {"rde_dqn": "Task", "rde_sac_dmc": "GymnasiumTask", "rde_sac_safety": "ConstrainedTask"}[name]
    options = [*QUICK, "--env-id", env_id, "--num-envs", 2, "--total-timesteps", num_steps, "--eval-episodes", 1]
    options += ["--max-episode-steps", limit] if limit else []
    with monkeypatch.context() as patched:
        diary = Diary(patched, script, getattr(script, task))
        result = run_main(script, *options, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    due = lambda step: max(0, step - 100) // 4
    loop_steps = range(0, num_steps, 2)
    assert diary.updates == [step for step in loop_steps for _ in range(due(step + 2) - due(step))]
    assert name == "rde_dqn" or diary.acts == list(range(100, num_steps, 2))
    cut_off = 0
    for i, env in enumerate(diary.envs):
        episodes = [episode for episode in diary.episodes if episode[0] is env]
        first, rows = script.derive_seed(1, script.ENVIRONMENT, i), iter(diary.stored[i::2])
        seeds = np.random.default_rng(first)
        expected = [] if name == "rde_sac_safety" else [first]
        expected += [int(seeds.integers(2**31)) for _ in range(len(episodes) - len(expected))]
        assert [seed for _, seed, *_ in episodes] == expected and len(episodes) > 2
        for _, _, actions, observations, ends in episodes:
            for k, (action, (reward, terminated, truncated, cost)) in enumerate(zip(actions, ends, strict=True)):
                observation, stored_action, stored_reward, *stored_cost, stored_end, next_observation = next(rows)
                assert np.array_equal(observation, observations[k]) and np.array_equal(next_observation, observations[k + 1])
                assert np.array_equal(stored_action.ravel(), action.ravel())
                assert (stored_reward, stored_end) == (reward, terminated)
                assert stored_cost == ([] if cost is None else [cost])
                cut_off += truncated and not terminated
        assert next(rows, None) is None
    assert cut_off > 0 or not limit
    if name != "rde_dqn":
        exploration = np.random.default_rng(script.derive_seed(1, script.EXPLORATION))
        expected = np.concatenate([exploration.uniform(-1, 1, (2, *env.action_space.shape)) for _ in range(50)])
        assert np.array_equal([row[1] for row in diary.stored[:100]], expected.astype(np.float32))
    fresh = script.make_env(script.Args(env_id=env_id, **{"max_episode_steps": limit} if limit else {}))
    for _, seed, actions, observations, ends in diary.episodes:
        fresh.begin(seed)
        assert np.array_equal(fresh.observation, observations[0])
        for action, expected, end in zip(actions, observations[1:], ends, strict=True):
            observation, *result = fresh.step(action)
            assert np.array_equal(observation, expected) and result[:3] == end[:3]


# --------------------------------------------------------------------------------------- an episode is its seed and its actions


def make(name: str, env_id: str):
    """With episodes of at most 100 steps, but for those of rde_dqn.py, whose own ones are short."""
    return shortened(load_script(name).make_env(load_script(name).Args(env_id=env_id)), 100)


def play(env, rng, num_steps: int) -> bytes:
    """Random steps over the ends of episodes; all that happened."""
    happened = io.BytesIO()
    for _ in range(num_steps):
        if isinstance(env.action_space, gym.spaces.Discrete):
            action = rng.integers(env.action_space.n)
        else:
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation.dtype == env.observation_space.dtype and observation.shape == env.observation_space.shape
        assert np.isfinite(observation).all()
        if env.observation_space.dtype == np.float32:  # in a game of Atari a lost life is an end, too
            assert ("episode" in info) == (terminated or truncated)
        numbers = (reward, terminated, truncated, info.get("episode"), info.get("cost"))
        happened.write(observation.tobytes() + repr(numbers).encode())
        if terminated or truncated:
            observation, info = env.reset()
            happened.write(observation.tobytes() + repr(info.get("episode")).encode())
    return happened.getvalue()


GO_ON = {
    "rde_dqn": ["LunarLander-v3", "MiniGrid-LavaGapS5-v0", "MiniGrid-GoToDoor-5x5-v0", "MiniGrid-DoorKey-5x5-v0",
                "MiniGrid-Dynamic-Obstacles-6x6-v0", "CartPole-v1", "Acrobot-v1", "Taxi-v4", "FrozenLake-v1"],
    "rde_sac_dmc": ["hopper-hop", "quadruped-run", "reacher-hard", "finger-turn_hard", "cartpole-balance", "fish-swim",
                    "manipulator-insert_peg", "point_mass-hard", "swimmer-swimmer6", "Pendulum-v1", "BipedalWalker-v3"],
    "rde_sac_safety": ["SafetyPointMaze-v0", "SafetyHopperVelocity-v1", "SafetySwimmerVelocity-v1"],
    "rde_dqn_atari": [f"{game}NoFrameskip-v4" for game in ("Breakout", "Qbert", "Freeway", "KungFuMaster")],
}  # fmt: skip
BENCHMARKING = ["-".join(names) for names in suite.BENCHMARKING]
SEEDED = [("rde_sac_dmc", env_id, 10) for env_id in [*BENCHMARKING, "quadruped-walk", "humanoid_CMU-run"]]
SEEDED += [
    ("rde_sac_safety", env_id, 130) for env_id in ("SafetyPointMaze-v0", "SafetyHopperVelocity-v1", "SafetySwimmerVelocity-v1")
]


@pytest.mark.parametrize("name, env_id, num_steps", SEEDED)
def test_an_episode_depends_on_its_seed_alone(name, env_id, num_steps):
    """Also in an environment that has played before."""
    env, other = make(name, env_id), make(name, env_id)
    begun = lambda one, seed: one.reset(seed=seed)[0].tobytes() + play(one, np.random.default_rng(0), num_steps)
    first, different, again, elsewhere = begun(env, 3), begun(env, 4), begun(env, 3), begun(other, 3)
    assert first == again == elsewhere != different
    if num_steps > 100:
        assert len({env.reset(seed=3)[0].tobytes(), *(env.reset()[0].tobytes() for _ in range(5))}) == 6, (
            "another one each time"
        )


# After how many steps it is stopped, and how many follow.
MOMENTS = {"rde_dqn": (5, 777, 400), "rde_sac_dmc": (17, 133, 150), "rde_sac_safety": (17, 133, 150),
           "rde_dqn_atari": (57, 333, 200)}  # fmt: skip
AT_THE_START = ("CartPole-v1", "hopper-hop", "SafetyPointMaze-v0")


def outcome_of(key, state, env=None) -> bytes:
    """In this test's process or another one: an environment, else a fresh one, goes on from the state."""
    name, env_id, steps = key
    env = env or make(name, env_id)
    if env.spec is None:
        env.reset(seed=0)
    load_script(name).restored(env, state)
    return play(env, np.random.default_rng(steps), MOMENTS[name][-1])


def test_an_episode_goes_on_in_another_process(tmp_path):
    """Stopped in the middle of the first episode and of a later one, the next steps, over the end of an episode, are equal to
    the last bit. Also in an environment that is somewhere else."""
    states, expected = {}, {}
    for name, env_ids in GO_ON.items():
        for env_id in env_ids:
            for steps in (0,) * (env_id in AT_THE_START) + MOMENTS[name][:2]:
                env, key = make(name, env_id), (name, env_id, steps)
                env.reset(seed=steps)
                play(env, np.random.default_rng(0), steps)
                states[key] = load_script(name).state_of(env)
                torch.save(states, tmp_path / "states.pt")  # as it is now: the environment plays on
                states = torch.load(tmp_path / "states.pt", weights_only=True)
                expected[key] = play(env, np.random.default_rng(steps), MOMENTS[name][-1])
                assert outcome_of(key, states[key], env) == expected[key], key
    code = (
        "import sys, torch, test_environments as here\n"
        "states = torch.load(sys.argv[1] + '/states.pt', weights_only=True)\n"
        "torch.save({key: here.outcome_of(key, state) for key, state in states.items()}, sys.argv[1] + '/outcomes.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT / "tests", env=environment(), check=True)
    outcomes = torch.load(tmp_path / "outcomes.pt", weights_only=True)
    assert outcomes.keys() == expected.keys() and len(outcomes) == 2 * 27 + 3
    for key, outcome in outcomes.items():
        assert outcome == expected[key], key


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_environment_that_does_not_repeat_itself(script):
    """It can be trained in, but a run that would not go on exactly is refused."""
    script, env_id = load_script(script), id_of(script, "unrepeatable")
    env, fresh = (script.make_env(script.Args(env_id=env_id)) for _ in range(2))
    env.reset(seed=1)
    play(env, np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match=f"^{env_id} does not play the same episode again from its seed"):
        script.restored(fresh, script.state_of(env))


# ------------------------------------------------------------------------------------------------- RDE+SAC on Gymnasium's tasks


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
