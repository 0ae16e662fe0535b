"""The tasks of rde_sac_safety.py: their costs against other computations. That episodes go on elsewhere: test_environments.py."""

import math
import os
import types

import gymnasium as gym
import numpy as np
import pytest

from conftest import load_script

# Safety-Gymnasium's code, version 1: m/s along x, or in the plane.
ALONG_X = {"HalfCheetah": 3.2096, "Hopper": 0.7402, "Walker2d": 2.3415, "Swimmer": 0.2282}
IN_PLANE = {"Ant": 2.6222, "Humanoid": 1.4149}
MAZE = "SafetyPointMaze-v0"


@pytest.fixture(scope="module")
def safety():
    return load_script("rde_sac_safety")


def task(safety, env_id):
    return safety.make_env(safety.Args(env_id=env_id))


def robot_id(robot):
    return f"Safety{robot}Velocity-v1"


def random_action(env, rng):
    return rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ velocities


def cost_at(safety, robot, **velocities):
    """The cost of a step at which the robot's own environment reports these velocities."""
    cost = safety.make_task(robot_id(robot), None)
    cost.env = types.SimpleNamespace(step=lambda action: (np.zeros(3), 1.5, False, False, dict(velocities)))
    observation, reward, terminated, truncated, info = cost.step(np.zeros(3))
    assert reward == 1.5 and not terminated and not truncated and not observation.any()
    assert type(info["cost"]) is float
    return info["cost"]


@pytest.mark.parametrize("robot, limit", (ALONG_X | IN_PLANE).items())
def test_the_limit_of_the_velocity(safety, robot, limit):
    """Of that along x, forwards; or of that in the plane, whatever its direction."""
    at = lambda x, y=0.0: cost_at(safety, robot, x_velocity=np.float64(x), y_velocity=np.float64(y))
    above, below = np.nextafter(limit, math.inf), np.nextafter(limit, 0)
    assert [at(below), at(limit), at(above), at(10 * limit)] == [0, 0, 1, 1]
    if robot in ALONG_X:
        assert [at(-above), at(-10 * limit)] == [0, 0], "running backwards is free"
        assert [at(0.9 * limit, y=limit), at(above, y=-limit), at(0, y=10 * limit)] == [0, 1, 0], "to the side, too"
    else:
        for sign in (1, -1):
            assert [at(-below), at(-limit), at(-above)] == [0, 0, 1]
            assert [at(0, sign * below), at(0, sign * limit), at(0, sign * above)] == [0, 0, 1]
            assert [at(sign * 0.70 * limit, 0.70 * limit), at(sign * 0.71 * limit, 0.71 * limit)] == [0, 1]


@pytest.mark.parametrize("robot", [*ALONG_X, *IN_PLANE])
def test_a_robot_is_gymnasiums_robot(safety, robot):
    """Observations, rewards and ends are those of the v4 robot that is driven directly; costs follow from its report."""
    env = task(safety, robot_id(robot))
    bare = gym.make(f"{robot}-v4", disable_env_checker=True)
    rng, threshold, rewards, costs = np.random.default_rng(3), (ALONG_X | IN_PLANE)[robot], [], []
    observation, _ = env.reset(seed=5)
    expected, _ = bare.reset(seed=env.episode_seed)
    assert env.observation_space.shape == bare.observation_space.shape and observation.dtype == np.float32
    np.testing.assert_array_equal(observation, expected.astype(np.float32))
    terminated = truncated = False
    while not terminated and not truncated and (len(rewards) < 60 or robot == "Swimmer"):
        action = random_action(env, rng)
        observation, reward, terminated, truncated, info = env.step(action)
        expected, expected_reward, *ends, report = bare.step(action * bare.action_space.high)
        np.testing.assert_allclose(observation, expected.astype(np.float32), rtol=1e-5, atol=1e-5)
        assert reward == pytest.approx(float(expected_reward), rel=1e-5, abs=1e-5) and [terminated, truncated] == ends
        speed = report["x_velocity"] if robot in ALONG_X else math.sqrt(report["x_velocity"] ** 2 + report["y_velocity"] ** 2)
        rewards.append(reward)
        costs.append(float(speed > threshold))
        assert info["cost"] == costs[-1] and ("episode" in info) == (terminated or truncated)
    assert robot != "Hopper" or terminated and len(rewards) < 60  # a fall
    if robot == "Swimmer":  # it is fast, and slow, when it plays at random, and cut off after 1,000 steps
        assert truncated and 0 < sum(costs) < 1_000
        assert info["episode"] == {"r": pytest.approx(sum(rewards)), "l": 1_000, "cost": sum(costs)}
        env.reset()
        *_, info = env.step(random_action(env, rng))
        assert "episode" not in info and env.episodic_cost == info["cost"]


# -------------------------------------------------------------------------------------------------------------- the maze


@pytest.fixture(scope="module")
def maze(safety):
    return inner(task(safety, MAZE))


def inner(env):
    """The wrapper with the hazards."""
    return env.env


def lidar_by_hand(position, hazards):
    """Sector by sector, with angles in degrees."""
    lidar = []
    for sector in range(16):
        nearness = [0.0]
        for x, y in hazards:
            distance = math.hypot(x - position[0], y - position[1])
            angle = math.degrees(math.atan2(y - position[1], x - position[0])) % 360
            if sector * 22.5 <= angle < (sector + 1) * 22.5:
                nearness.append(1 - distance / 3)
        lidar.append(max(nearness))
    return lidar


def test_hazards_lie_in_the_field_and_apart(safety):
    env, seen = task(safety, MAZE), set()
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        position, goal = observation[:2].astype(float), (observation[:2] + observation[4:6]).astype(float)
        hazards = inner(env).hazards
        assert hazards.shape == (8, 2) and (np.abs(hazards) <= 2.5 - 0.3).all()
        points = [position, goal, *hazards]
        for i, hazard in enumerate(hazards):
            others = [point for j, point in enumerate(points) if j != i + 2]
            assert min(math.dist(hazard, other) for other in others) > 0.6 - 1e-6
        seen.update(map(tuple, hazards))
    assert len(seen) == 8 * 30
    assert min(x for x, _ in seen) < -1.9 and max(y for _, y in seen) > 1.9  # all over the field


def test_observation_and_cost_by_hand(safety):
    """Of a robot that runs through hazards to goals: cost, lidar, reward, and the next goal, from positions alone."""
    env, rng = task(safety, MAZE), np.random.default_rng(2)
    env_ends = costs = goals = 0
    observation, _ = env.reset(seed=11)
    assert observation.shape == (22,) == env.observation_space.shape and observation.dtype == np.float32
    for step in range(900):
        hazards, goal, start = inner(env).hazards.copy(), env.env.unwrapped.goal.copy(), observation[:2].astype(float)
        target = hazards[step // 40 % 8] if step % 300 < 160 else goal
        action = np.clip(2 * (target - observation[:2]) - 0.4 * observation[2:4] + 0.2 * rng.normal(size=2), -1, 1)
        observation, reward, terminated, truncated, info = env.step(action.astype(np.float32))
        data = env.env.unwrapped.data  # of MuJoCo
        position, velocity = data.qpos.copy(), data.qvel.copy()
        inside = any((x - position[0]) ** 2 + (y - position[1]) ** 2 < 0.3**2 for x, y in hazards)
        assert info["cost"] == float(inside)
        reached = math.dist(position, goal) <= 0.45
        assert reward == pytest.approx(10 * (math.dist(start, goal) - math.dist(position, goal) + reached), abs=1e-5)
        new_goal = env.env.unwrapped.goal
        assert reached == (not np.array_equal(new_goal, goal))
        expected = [*position, *velocity, *(new_goal - position), *lidar_by_hand(position, hazards)]
        np.testing.assert_allclose(observation, expected, atol=1e-6)
        costs, goals = costs + inside, goals + reached
        assert not terminated and truncated == (step % 300 == 299)
        if truncated:
            env_ends += 1
            assert info["episode"]["l"] == 300
            observation, _ = env.reset()
            assert not np.array_equal(inner(env).hazards, hazards)
    assert env_ends == 3 and 50 < costs < 850 and goals > 3


@pytest.mark.parametrize("angle", [0.0, 1e-12, -1e-12, 22.5, 90.0, 179.9999, 180.0, -180.0, -90.0, 359.0])
@pytest.mark.parametrize("distance", [0.1, 1.5, 2.999, 3.001, 6.0])
def test_the_lidar_in_every_direction(maze, angle, distance):
    maze.reset(seed=0)
    position = np.array([0.25, -0.5])
    maze.hazards = position + distance * np.array([[math.cos(math.radians(angle)), math.sin(math.radians(angle))]])
    state = {"observation": np.zeros(4), "achieved_goal": position, "desired_goal": np.ones(2)}
    lidar = maze.observe(state)[6:]
    np.testing.assert_allclose(lidar, lidar_by_hand(position, maze.hazards), atol=1e-12)
    assert np.count_nonzero(lidar) == (distance < 3)
    # A farther hazard in the same direction changes nothing.
    maze.hazards = np.concatenate([maze.hazards, position + 1.5 * (maze.hazards - position)])
    np.testing.assert_array_equal(maze.observe(state)[6:], lidar)


def test_the_package_leaves_no_file_behind(safety):
    env = task(safety, MAZE)
    assert not os.path.exists(env.env.unwrapped.tmp_xml_file_path)


# ---------------------------------------------------------------------------------------------- environments of somebody else


class Foreign(gym.Env):
    """A walk on a line, of which each step costs the distance that was asked for."""

    observation_space = gym.spaces.Dict({"place": gym.spaces.Box(-9, 9, (2, 1)), "side": gym.spaces.Discrete(2)})
    action_space = gym.spaces.Box(np.array([[0.0], [-3.0]], np.float32), np.array([[4.0], [-1.0]], np.float32))

    def __init__(self, values=5, cost=True, render_mode=None):
        self.values, self.cost = values, cost

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=(2, 1))
        return self.observe(), {}

    def observe(self):
        return {"place": self.place, "side": int(self.place[0, 0] > 0)}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.asked = action
        self.place = 0.9 * self.place + 0.01 * action + 0.01 * self.np_random.normal(size=(2, 1))
        info = {"cost": float(action[0, 0])} if self.cost else {}
        cost = (float(action[0, 0]),) if self.values == 6 else ()
        return (self.observe(), 1.0, *cost, False, False, info)


@pytest.mark.parametrize("values, cost", [(5, True), (6, False)])
def test_an_environment_of_somebody_else(safety, values, cost):
    """With a dictionary of observations, its own bounds, a time limit, and a cost of either kind."""
    gym.register(f"Foreign{values}-v0", Foreign, max_episode_steps=50, kwargs={"values": values, "cost": cost})
    env = task(safety, f"Foreign{values}-v0")
    assert env.observation_space.shape == (4,) and env.action_space.shape == (2,)
    observation, _ = env.reset(seed=1)
    assert observation.dtype == np.float32 and sorted(observation[2:]) == [0, 1]
    np.testing.assert_array_equal(observation[:2], env.env.unwrapped.place.ravel().astype(np.float32))
    for action, asked in [([-1, -1], [0, -3]), ([0, 0], [2, -2]), ([1, 1], [4, -1]), ([-0.5, 0.5], [1, -1.5])]:
        *_, info = env.step(np.array(action, np.float32))
        np.testing.assert_allclose(env.env.unwrapped.asked, np.reshape(asked, (2, 1)))
        assert info == {"cost": asked[0]}
    for step in range(5, 51):
        *_, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert not terminated and truncated == (step == 50)
    assert info["episode"] == {"r": 50.0, "l": 50, "cost": 7 + 46 * 2}
