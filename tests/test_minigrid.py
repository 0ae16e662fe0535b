"""rde_dqn.py's environments: what the agent sees of MiniGrid, rewards and ends. That they go on elsewhere: test_environments.py."""

import itertools

import gymnasium as gym
import minigrid  # noqa: F401  (registers its environments)
import numpy as np
import pytest
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX

from conftest import load_script

COLOURS = ["blue", "green", "grey", "purple", "red", "yellow"]  # in the order of the one-hot vector
KINDS = ["key", "ball", "box", "door"]


@pytest.fixture(scope="module")
def script():
    return load_script("rde_dqn")


def make(script, env_id, **arguments):
    return script.make_env(script.Args(env_id=env_id, **arguments))


# -------------------------------------------------------------------------------------------------------------- encoding


def test_every_object_colour_and_state_has_its_number(script):
    """A view made by hand: each of the 11 x 6 x 3 cells that there can be, in views of 49."""
    cells = list(itertools.product(range(11), range(6), range(3)))
    assert len(OBJECT_TO_IDX) == 11 and len(COLOR_TO_IDX) == 6  # MiniGrid has no more of them
    for start in range(0, len(cells), 49):
        part = cells[start : start + 49]
        image = np.zeros((49, 3), np.uint8)
        image[: len(part)] = part
        encoded = script.MiniGridView.encode({"image": image.reshape(7, 7, 3), "mission": ""})
        assert encoded.shape == (147 + 20,) and encoded.dtype == np.float32
        for i, (kind, colour, state) in enumerate(part):
            expected = np.array([kind / 10, colour / 5, state / 2], np.float32)
            assert (encoded[3 * i : 3 * i + 3] == expected).all()
        assert not encoded[3 * len(part) :].any()


def things_named(*things) -> np.ndarray:
    """(colour or None, kind or None) of at most two things, encoded by hand: (2 * 10,) float32."""
    encoded = np.zeros((2, 10), np.float32)
    for row, (colour, kind) in zip(encoded, things):
        row[:6] = [colour == other for other in COLOURS]
        row[6:] = [kind == other for other in KINDS]
    return encoded.ravel()


@pytest.mark.parametrize(
    "mission, things",
    [
        ("", []), ("reach the goal", []), ("go through the unlocked, numbered doors", []), ("find the matching object", []),
        ("avoid the lava and get to the green goal square", [("green", None)]), ("blue", [("blue", None)]),
        ("go to the matching box", [(None, "box")]), ("pick up the purple ball, now", [("purple", "ball")]),
        ("you must fetch a red key", [("red", "key")]),
        ("put the grey box near the grey ball", [("grey", "box"), ("grey", "ball")]),
        ("put the ball near the box", [(None, "ball"), (None, "box")]),
        ("open the blue door then the red door", [("blue", "door"), ("red", "door")]),
        # The third thing is not seen; here it has the colour of the first.
        ("get the yellow key from the red room, unlock the yellow door and go to the goal", [("yellow", "key"), ("red", None)]),
    ],
)  # fmt: skip
def test_what_a_mission_names(script, mission, things):
    encoded = script.MiniGridView.encode({"image": np.zeros((7, 7, 3), np.uint8), "mission": mission})
    assert not encoded[:147].any() and (encoded[147:] == things_named(*things)).all()


@pytest.mark.parametrize("env_id, num_missions", [
    ("MiniGrid-Fetch-6x6-N2-v0", 6 * 2), ("MiniGrid-GoToObject-6x6-N2-v0", 6 * 3), ("MiniGrid-GoToDoor-5x5-v0", 6),
    ("MiniGrid-LavaGapS5-v0", 1), ("MiniGrid-LockedRoom-v0", 6 * 5),
])  # fmt: skip
def test_missions_look_different_if_and_only_if_they_name_different_things(script, env_id, num_missions):
    """As GoToDoor's colours; Fetch's five ways to say it look alike. A mission is seen in every step of its episode."""
    env, seen = make(script, env_id), {}
    for seed in range(300):
        observation, _ = env.reset(seed=seed)
        assert (env.step(0)[0][147:] == observation[147:]).all()
        words = env.unwrapped.mission.replace(",", "").split()
        named = tuple(word for word in words if word in COLOURS + KINDS)
        assert seen.setdefault(observation[147:].tobytes(), named) == named
    assert len(seen) == len(set(seen.values())) == num_missions


# ------------------------------------------------------------------------------------------- rewards, ends, limits, actions


@pytest.mark.parametrize(
    "env_id, options",
    [
        ("MiniGrid-LavaGapS5-v0", {"max_steps": 100}), ("MiniGrid-GoToDoor-5x5-v0", {"max_steps": 100}),
        ("MiniGrid-Dynamic-Obstacles-5x5-v0", {"max_steps": 100}), ("LunarLander-v3", {}), ("CartPole-v1", {}),
        ("FrozenLake-v1", {}),
    ],
)  # fmt: skip
def test_rewards_and_ends_are_those_of_the_bare_environment(script, env_id, options):
    """Whose first episode begins with the given seed, and every later one with a seed that follows from it."""
    seeds = np.random.default_rng(7)
    ours, bare, rng = make(script, env_id), gym.make(env_id, **options), np.random.default_rng(3)
    ours.reset(seed=7), bare.reset(seed=7)
    episodic_return, length, num_episodes, successes = 0.0, 0, 0, []
    for _ in range(3_000):
        action = rng.integers(bare.action_space.n)
        observation, reward, terminated, truncated, info = ours.step(action)
        bare_observation, bare_reward, *bare_end, _ = bare.step(int(action))
        assert (reward, terminated, truncated) == (bare_reward, *bare_end)
        episodic_return, length = episodic_return + bare_reward, length + 1
        if isinstance(bare_observation, dict):
            assert (observation == script.MiniGridView.encode(bare_observation)).all()
        elif env_id == "FrozenLake-v1":
            assert (observation == np.eye(16)[bare_observation]).all()
        else:
            assert (observation == bare_observation).all()
        assert observation.dtype == np.float32 and ours.observation_space.contains(observation)
        assert ("episode" in info) == (terminated or truncated)
        if terminated or truncated:
            success = {"success": int(bare_reward > 0)} if "MiniGrid" in env_id else {}
            assert info["episode"] == {"r": episodic_return, "l": length} | success
            successes.append(bare_reward > 0)
            episodic_return, length, num_episodes = 0.0, 0, num_episodes + 1
            ours.reset(), bare.reset(seed=int(seeds.integers(2**31)))
    assert num_episodes > 5 and (env_id != "MiniGrid-GoToDoor-5x5-v0" or 0 < sum(successes) < len(successes))


@pytest.mark.parametrize(
    "env_id, argument, expected",
    [
        ("MiniGrid-LavaGapS7-v0", -1, 100), ("MiniGrid-LavaGapS7-v0", 0, 196), ("MiniGrid-LavaGapS7-v0", 30, 30),
        ("MountainCar-v0", -1, 200), ("MountainCar-v0", 0, 200), ("MountainCar-v0", 30, 30),
    ],
)  # fmt: skip
def test_an_episode_is_cut_off_at_its_limit(script, env_id, argument, expected):
    """Turning left, or doing nothing, ends nothing by itself."""
    env = make(script, env_id, max_episode_steps=argument)
    env.reset(seed=1)
    for step in range(1, expected + 1):
        _, _, terminated, truncated, info = env.step(0)
        assert not terminated and truncated == (step == expected)
    assert info["episode"]["l"] == expected


@pytest.mark.parametrize("argument, limit", [(-1, 100), (0, 100), (40, 40)])
def test_the_reward_of_minigrid_is_a_part_of_the_limit(script, argument, limit):
    """1 - 0.9 * steps / limit, which a limit from outside would leave as it is."""
    env = make(script, "MiniGrid-Empty-5x5-v0", max_episode_steps=argument)
    env.reset(seed=1)
    for action in (2, 2, 1, 2, 2):  # forward twice, to the right, forward twice: the goal
        _, reward, terminated, truncated, info = env.step(action)
    assert terminated and not truncated and reward == pytest.approx(1 - 0.9 * 5 / limit)
    assert info["episode"] == {"r": reward, "l": 5, "success": 1}


def test_actions_that_move(script):
    """Left, right, forward: the first three, and only those."""
    env = make(script, "MiniGrid-Empty-8x8-v0", actions="move")
    env.reset(seed=0)
    world = env.unwrapped
    states = [(world.agent_dir, *map(int, world.agent_pos))]
    for action in (0, 1, 2):
        env.step(action)
        states.append((world.agent_dir, *map(int, world.agent_pos)))
    assert states == [(0, 1, 1), (3, 1, 1), (0, 1, 1), (0, 2, 1)]
    assert make(script, "MiniGrid-Empty-8x8-v0").action_space.n == 7


def test_actions_and_numbers_that_do_not_begin_at_0(script):
    class Shifted(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(3, start=5), gym.spaces.Discrete(2, start=-1)

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            return 5, {}

        def step(self, action):
            assert self.action_space.contains(action)
            return 6 + action, 1.0, False, False, {}

    env = script.Task(Shifted())
    assert (env.reset()[0] == [1, 0, 0]).all() and env.action_space == gym.spaces.Discrete(2)
    assert (env.step(0)[0] == [1, 0, 0]).all() and (env.step(np.int64(1))[0] == [0, 1, 0]).all()
