"""The training loop on Atari: what is played, learned and stored, in which order, looked at from outside.

It is RDE+DQN's. Runs of DQN and of SR+DQN equal some of it to the bit (test_runs.py), and so do their loops.
"""

import gymnasium as gym
import numpy as np
import pytest

from conftest import load_script, only_run, put_environments, rows, run_main

# The decay of epsilon takes half of the run; a reset is due at gradient step 300 of 360.
OPTIONS = (
    "--env-id BreakoutNoFrameskip-v4 --num-envs 2 --total-timesteps 640 --learning-starts 160 --replay-ratio 0.75 --batch-size 4 "
    "--buffer-size 1000 --start-e 0.9 --end-e 0.1 --exploration-fraction 0.5 --eval-interval 0 --eval-episodes 1 "
    "--reset-interval 600"
).split()


class Recorder(gym.Wrapper):
    """Notes every step of an environment, and its last observation."""

    KEPT = ("env",)

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.steps, self.resets, self.seeds = [], [], []
        self.news = {}  # what so many-th resets say beside their observation

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.steps.append((int(action), reward, terminated, truncated, observation.copy()))
        self.observation = observation.copy()
        return observation, reward, terminated, truncated, info

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.observation = observation.copy()
        self.resets.append(self.observation)
        self.seeds.append(kwargs.get("seed"))
        return observation, info | self.news.get(len(self.resets), {})


class Loop:
    """A run of 320 loop steps of two environments, whose games are cut after 500 frames, and everything that it did."""

    def __init__(self, runs_dir, monkeypatch):
        self.script = script = load_script("rde_dqn_atari")
        self.envs, self.added, self.starts, self.updates, self.acts, self.epsilons = [], [], [], [], [], []
        self.events, self.counts = [], []  # what is logged of the acting agents, with the step
        self.seeds = {"train": set(), "evaluate": set(), "learn": set()}  # of the generators that are drawn from

        def spy(owner, method, note):
            """Notes the call and its result, and lets it happen. `note` gets the result after the arguments."""
            real = getattr(owner, method)

            def call(*args, **kwargs):
                result = real(*args, **kwargs)
                note(result, *args, **kwargs)
                return result

            monkeypatch.setattr(owner, method, call)

        real_make_env, real_scalars = script.make_env, script.Agent.scalars

        def make_env(*args, **kwargs):
            self.envs.append(Recorder(real_make_env(*args, **kwargs, max_num_frames_per_episode=500)))
            return self.envs[-1]

        def acted(result, agent, observations, generator, counted=False):
            training = len(observations) == 2  # an evaluation plays one game
            assert counted == training
            self.seeds["train" if training else "evaluate"].add(generator.initial_seed())
            if training:
                greedy_actions, acting_agents = result.numpy().copy()
                self.acts.append((len(self.added), greedy_actions, acting_agents))
                assert np.array_equal(observations.numpy(), np.stack([env.observation for env in self.envs[:2]]))

        def updated(_, agent):
            self.updates.append(len(self.added))
            self.seeds["learn"].add(agent.buffer.generator.initial_seed())

        def scalars(agent):
            self.counts.append((len(self.added), agent.acting_counts.tolist()))
            return real_scalars(agent)

        put_environments(monkeypatch, script, make_env)
        spy(script.ReplayBuffer, "add", lambda _, buffer, i, action, reward, next_frame, terminated: self.added.append(
            (i, int(action), reward, terminated, next_frame.copy())))  # fmt: skip
        spy(
            script.ReplayBuffer,
            "start_episode",
            lambda _, buffer, i, frame: self.starts.append((len(self.added), i, frame.copy())),
        )
        spy(script.Agent, "act", acted)
        spy(script.Agent, "update", updated)
        spy(script, "linear_schedule", lambda epsilon, *_: self.epsilons.append((len(self.added), epsilon)))
        spy(script.Run, "log_evaluation", lambda _, run, phase, episodes: self.events.append((phase, len(self.updates))))
        monkeypatch.setattr(script.Agent, "scalars", scalars)
        spy(script.Agent, "reset", lambda *_: self.events.append(("reset", len(self.updates))))
        result = run_main(script, *OPTIONS, "--runs-dir", runs_dir)
        assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Loop(tmp_path_factory.mktemp("runs"), monkeypatch)


def test_every_transition_is_stored_as_it_was_played(loop):
    """In particular a cut game is not terminated, and its own last frame, not the next game's first, is the next frame."""
    assert len(loop.added) == 640 and [row[0] for row in loop.added] == [0, 1] * 320
    num_terminated, num_truncated, starts = 0, 0, iter(loop.starts[2:])
    for i in range(2):
        assert len(loop.envs[i].steps) == 320
        for (_, *stored, next_frame), (action, reward, terminated, truncated, observation) in zip(
            loop.added[i::2], loop.envs[i].steps, strict=True
        ):
            assert stored == [action, reward, terminated] and np.array_equal(next_frame, observation[-1])
            num_terminated += terminated
            num_truncated += truncated and not terminated
    assert num_terminated >= 5 and num_truncated >= 2

    # An episode is begun after every end, and nowhere else, with the frame that the next action is chosen on.
    ends = [number for number, row in enumerate(loop.added, start=1) if loop.envs[row[0]].steps[(number - 1) // 2][2]
            or loop.envs[row[0]].steps[(number - 1) // 2][3]]  # fmt: skip
    assert [number for number, _, _ in starts] == ends
    assert [(number, i) for number, i, _ in loop.starts[:2]] == [(0, 0), (0, 1)]
    resets = [env.resets for env in loop.envs[:2]]
    for _, i, frame in loop.starts:
        assert np.array_equal(frame, resets[i].pop(0)[-1])
    assert resets == [[], []]


def test_actions_are_greedy_but_for_a_fraction_epsilon(loop):
    """The draws are those of a generator of their own; where none is below epsilon the greedy action is played."""
    script = loop.script
    exploration = np.random.default_rng(script.derive_seed(1, script.EXPLORATION))
    greedy_of = {number: greedy_actions for number, greedy_actions, _ in loop.acts}
    num_explored = 0
    for number in range(0, 640, 2):
        epsilon = max(0.1, 0.9 - 0.8 * number / 320)  # of the steps that lie behind
        explore, random_actions = exploration.random(2) < epsilon, exploration.integers(4, size=2)
        num_explored += explore.sum()
        for i in range(2):
            expected = random_actions[i] if explore[i] else greedy_of[number][i]
            assert loop.added[number + i][1] == expected
        assert loop.epsilons[number // 2] == (number, pytest.approx(epsilon))
    assert num_explored == pytest.approx((0.5 + 0.1) * 320, rel=0.15) and len(loop.epsilons) == 320
    greedy = np.concatenate(list(greedy_of.values()))
    assert len(np.unique(greedy)) > 1  # otherwise one could not be told from another


def test_gradient_steps_come_before_the_step_and_are_as_many_as_the_replay_ratio_says(loop):
    """0.75 a step: 1 and 2 in turn, from step 160 on, each before the two transitions of its loop step are stored."""
    assert loop.updates == [number for number in range(160, 640, 2) for _ in range(1 if number % 4 == 0 else 2)]
    assert len(loop.updates) == 0.75 * 480


def test_a_reset_stands_between_two_evaluations(loop):
    assert loop.events == [("before_reset", 300), ("reset", 300), ("after_reset", 300), ("final", 360)]


def test_every_purpose_has_its_own_random_numbers(loop):
    """So evaluating more or less changes nothing in the training."""
    script, seed = loop.script, lambda purpose, *indices: loop.script.derive_seed(1, purpose, *indices)
    for i in range(2):
        first, *others = loop.envs[i].seeds
        assert first == seed(script.ENVIRONMENT, i) and len(others) > 5 and set(others) == {None}
    assert loop.seeds["learn"] == {seed(script.MINI_BATCHES)}
    reset_step = loop.updates[299] + 2  # the end of the loop step of gradient step 300
    assert loop.seeds["train"] == {seed(script.SELECTION)}
    assert loop.seeds["evaluate"] == {seed(script.EVALUATION, step) for step in (reset_step, 640)}


def test_the_acting_agents_are_counted_where_their_actions_are_played(loop):
    """Between two points of the training curves; what chance chose is nobody's."""
    exploration = np.random.default_rng(loop.script.derive_seed(1, loop.script.EXPLORATION))
    acting_of, counts = {number: acting_agents for number, _, acting_agents in loop.acts}, np.zeros(2, int)
    expected = []
    for number in range(0, 640, 2):
        explore, _ = exploration.random(2) < loop.epsilons[number // 2][1], exploration.integers(4, size=2)
        for i in range(2):
            if not explore[i]:
                counts[acting_of[number][i]] += 1
        if (number + 2) % 100 == 0:
            expected.append((number + 2, counts.tolist()))
            counts[:] = 0
    assert loop.counts == expected and all(min(counts) > 0 for _, counts in expected[2:])


@pytest.mark.parametrize("name", ["rde_dqn_atari", "dqn_atari", "sr_dqn_atari", "rde_drq_atari", "rnd_dqn_atari"])
def test_ends_of_games_and_the_first_gradient_step_in_every_loop(name, tmp_path, monkeypatch):
    """The scripts' loops are texts of their own, and no other run of them is long enough for a game to be cut.

    A game that ended in the no-op or FIRE of a reset is logged; here the third reset says so.
    """
    script, envs, stored, starts, updates = load_script(name), [], [], [], []
    real_make_env, real_add, real_start = script.make_env, script.ReplayBuffer.add, script.ReplayBuffer.start_episode
    real_update = script.Agent.update

    def make_env(*args, **kwargs):
        envs.append(Recorder(real_make_env(*args, **kwargs, max_num_frames_per_episode=140)))
        envs[-1].news = {3: {"episode": {"r": 77.0, "l": 9}}} if len(envs) == 1 else {}
        return envs[-1]

    def add(buffer, i, action, reward, next_frame, terminated):
        stored.append((action, reward, terminated, next_frame.copy()))
        real_add(buffer, i, action, reward, next_frame, terminated)

    def start_episode(buffer, i, frame):
        starts.append((len(stored), frame.copy()))
        real_start(buffer, i, frame)

    monkeypatch.setattr(script, "make_env", make_env)
    monkeypatch.setattr(script, "evaluation_scalars", lambda agent: {})  # which would play on its own
    monkeypatch.setattr(script.ReplayBuffer, "add", add)
    monkeypatch.setattr(script.ReplayBuffer, "start_episode", start_episode)
    monkeypatch.setattr(script.Agent, "update", lambda agent: (updates.append(len(stored)), real_update(agent)))
    options = "--env-id BreakoutNoFrameskip-v4 --total-timesteps 120 --learning-starts 114 --replay-ratio 1 --batch-size 4"
    options += " --eval-interval 0 --eval-episodes 1 --buffer-size 200"
    result = run_main(script, *options.split(), "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    played, ends = envs[0].steps, []
    for number, ((*row, next_frame), (action, reward, terminated, truncated, observation)) in enumerate(
        zip(stored, played, strict=True), start=1
    ):
        assert row == [action, reward, terminated] and np.array_equal(next_frame, observation[-1])
        if terminated or truncated:
            ends.append(number)
    num_cut = sum(truncated and not terminated for _, _, terminated, truncated, _ in played)
    assert num_cut >= 2 and [number for number, _ in starts] == [0, *ends]
    assert all(np.array_equal(frame, reset[-1]) for (_, frame), reset in zip(starts, envs[0].resets, strict=True))
    assert [row[1:] for row in rows(only_run(tmp_path), "episodes.csv")].count(("77.0", "9")) == 1
    assert updates == list(range(114, 120))  # the first in the loop step that begins when learning starts
