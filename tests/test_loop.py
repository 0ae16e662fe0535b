"""The training loop of the Atari scripts: what is played, learned and stored, in which order, looked at from outside."""

import signal

import gymnasium as gym
import numpy as np
import pytest

from conftest import ATARI_SCRIPTS, load_script

OPTIONS = {
    "env_id": "BreakoutNoFrameskip-v4", "num_envs": 2, "total_timesteps": 800, "learning_starts": 200, "replay_ratio": 0.75,
    "batch_size": 4, "buffer_size": 1_000, "start_e": 0.4, "end_e": 0.4, "eval_interval": 0, "eval_episodes": 1, "cuda": False,
}  # fmt: skip


class Recorder(gym.Wrapper):
    """Notes every step of an environment, and its last observation."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.steps = []

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps.append((int(action), reward, terminated, truncated, observation.copy()))
        self.observation = observation.copy()
        return observation, reward, terminated, truncated, info

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.observation = observation.copy()
        return observation, info


class Loop:
    """A run of 400 loop steps of two environments, whose games are cut after 500 frames, and everything that it did."""

    def __init__(self, name: str, runs_dir, monkeypatch):
        self.script = script = load_script(name)
        self.envs, self.added, self.starts, self.updates, self.acts = [], [], [], [], []
        real = {method: getattr(cls, method) for cls, method in [
            (script.ReplayBuffer, "add"), (script.ReplayBuffer, "start_episode"), (script.Agent, "act"), (script.Agent, "update"),
        ]}  # fmt: skip
        real_make_env = script.make_env

        def make_env(*args, **kwargs):
            self.envs.append(Recorder(real_make_env(*args, **kwargs, max_num_frames_per_episode=500)))
            return self.envs[-1]

        def add(buffer, env_index, action, reward, next_frame, terminated):
            self.added.append((env_index, int(action), reward, terminated, next_frame.copy()))
            real["add"](buffer, env_index, action, reward, next_frame, terminated)

        def start_episode(buffer, env_index, frame):
            self.starts.append((len(self.added), env_index, frame.copy()))
            real["start_episode"](buffer, env_index, frame)

        def act(agent, observations, *generator):
            result = real["act"](agent, observations, *generator)
            if len(observations) == 2:  # an evaluation plays one game
                greedy_actions = result[0] if result.ndim == 2 else result  # the ensemble says who proposed them, too
                self.acts.append((len(self.added), observations.numpy().copy(), greedy_actions.numpy().copy()))
                current = np.stack([env.observation for env in self.envs[:2]])
                assert np.array_equal(observations.numpy(), current)
            return result

        def update(agent):
            self.updates.append(len(self.added))
            return real["update"](agent)

        monkeypatch.setattr(script, "make_env", make_env)
        monkeypatch.setattr(script.ReplayBuffer, "add", add)
        monkeypatch.setattr(script.ReplayBuffer, "start_episode", start_episode)
        monkeypatch.setattr(script.Agent, "act", act)
        monkeypatch.setattr(script.Agent, "update", update)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            script.train(script.Args(**OPTIONS, runs_dir=str(runs_dir)))
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@pytest.fixture(scope="module", params=ATARI_SCRIPTS)
def loop(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Loop(request.param, tmp_path_factory.mktemp("runs"), monkeypatch)


def test_every_transition_is_stored_as_it_was_played(loop):
    """In particular a cut game is not terminated, and its own last frame, not the next game's first, is the next frame."""
    assert len(loop.added) == 800 and [row[0] for row in loop.added] == [0, 1] * 400
    num_terminated, num_truncated, starts = 0, 0, iter(loop.starts[2:])
    for i in range(2):
        assert len(loop.envs[i].steps) == 400
        for (_, *stored, next_frame), (action, reward, terminated, truncated, observation) in zip(
            loop.added[i::2], loop.envs[i].steps, strict=True
        ):
            assert stored == [action, reward, terminated] and np.array_equal(next_frame, observation[-1])
            num_terminated += terminated
            num_truncated += truncated and not terminated
    assert num_terminated >= 5 and num_truncated >= 2

    # An episode is begun after every end, and nowhere else.
    ends = [number for number, row in enumerate(loop.added, start=1) if loop.envs[row[0]].steps[(number - 1) // 2][2]
            or loop.envs[row[0]].steps[(number - 1) // 2][3]]  # fmt: skip
    assert [number for number, _, _ in starts] == ends
    assert [(number, i) for number, i, _ in loop.starts[:2]] == [(0, 0), (0, 1)]


def test_actions_are_greedy_but_for_a_fraction_epsilon(loop):
    """The draws are those of a generator of their own; where none is below epsilon the greedy action is played."""
    script = loop.script
    exploration = np.random.default_rng(script.derive_seed(1, script.EXPLORATION))
    greedy_of = {number: greedy_actions for number, _, greedy_actions in loop.acts}
    num_explored = 0
    for number in range(0, 800, 2):
        explore, random_actions = exploration.random(2) < 0.4, exploration.integers(4, size=2)
        num_explored += explore.sum()
        for i in range(2):
            expected = random_actions[i] if explore[i] else greedy_of[number][i]
            assert loop.added[number + i][1] == expected
    assert num_explored == pytest.approx(0.4 * 800, rel=0.15)
    greedy = np.concatenate(list(greedy_of.values()))
    assert len(np.unique(greedy)) > 1  # otherwise one could not be told from another


def test_gradient_steps_come_before_the_step_and_are_as_many_as_the_replay_ratio_says(loop):
    """0.75 a step: 1 and 2 in turn, from step 200 on, each before the two transitions of its loop step are stored."""
    assert loop.updates == [number for number in range(200, 800, 2) for _ in range(1 if number % 4 == 0 else 2)]
    assert len(loop.updates) == 0.75 * 600
