"""The training loops on Atari: what is played, learned and stored, in which order, looked at from outside.

The loops are texts of their own in five scripts. Of RDE+DQN's more is looked at: runs of DQN and of SR+DQN equal some of it to
the bit (test_runs.py).
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
SHORT = (
    "--env-id BreakoutNoFrameskip-v4 --total-timesteps 120 --learning-starts 114 --replay-ratio 1 --batch-size 4 "
    "--eval-interval 0 --eval-episodes 1 --buffer-size 200"
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
        self.observation = observation.copy()
        self.steps.append((int(action), reward, terminated, truncated, self.observation))
        return observation, reward, terminated, truncated, info

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        self.observation = observation.copy()
        self.resets.append(self.observation)
        self.seeds.append(kwargs.get("seed"))
        return observation, info | self.news.get(len(self.resets), {})


class Loop:
    """A run whose games are cut after so many frames, and everything that its loop did."""

    def __init__(self, name: str, arguments: list, num_frames: int, monkeypatch):
        self.script = script = load_script(name)
        self.envs, self.added, self.starts, self.updates = [], [], [], []
        real_make_env = script.make_env

        def make_env(*args, **kwargs):
            self.envs.append(Recorder(real_make_env(*args, **kwargs, max_num_frames_per_episode=num_frames)))
            # A game that ended in the no-op or FIRE of a reset is logged; here the third reset says so.
            self.envs[-1].news = {3: {"episode": {"r": 77.0, "l": 9}}} if len(self.envs) == 1 else {}
            return self.envs[-1]

        def added(_, buffer, i, action, reward, next_frame, terminated):
            self.added.append((i, int(action), reward, terminated, next_frame.copy()))

        def started(_, buffer, i, frame):
            self.starts.append((len(self.added), i, frame.copy()))

        put_environments(monkeypatch, script, make_env)
        monkeypatch.setattr(script, "evaluation_scalars", lambda agent: {})  # which would play on its own
        self.spy(monkeypatch, script.ReplayBuffer, "add", added)
        self.spy(monkeypatch, script.ReplayBuffer, "start_episode", started)
        self.spy(monkeypatch, script.Agent, "update", lambda _, agent: self.updates.append(len(self.added)))
        self.watch(monkeypatch)
        result = run_main(script, *arguments)
        assert result.returncode == 0, result.stderr

    @staticmethod
    def spy(monkeypatch, owner, method: str, note) -> None:
        """Notes the call and its result, and lets it happen. `note` gets the result before the arguments."""
        real = getattr(owner, method)

        def call(*args, **kwargs):
            result = real(*args, **kwargs)
            note(result, *args, **kwargs)
            return result

        monkeypatch.setattr(owner, method, call)

    def watch(self, monkeypatch) -> None:
        """More of it."""

    def check_transitions(self, num_envs: int) -> tuple[int, int]:
        """Every transition is stored as it was played; how many are terminated, and truncated alone.

        In particular a cut game is not terminated, and its own last frame, not the next game's first, is the next frame. An
        episode is begun after every end, and nowhere else, with the frame that the next action is chosen on.
        """
        envs, num_terminated, num_truncated = self.envs[:num_envs], 0, 0
        expected = [(0, i, env.resets.pop(0)[-1]) for i, env in enumerate(envs)]
        steps = [step for steps in zip(*(env.steps for env in envs), strict=True) for step in steps]
        for number, (stored, step) in enumerate(zip(self.added, steps, strict=True)):
            (i, *transition, next_frame), (action, reward, terminated, truncated, observation) = stored, step
            assert i == number % num_envs and transition == [action, reward, terminated]
            assert np.array_equal(next_frame, observation[-1])
            if terminated or truncated:
                expected.append((number + 1, i, envs[i].resets.pop(0)[-1]))
            num_terminated += terminated
            num_truncated += truncated and not terminated
        assert [start[:2] for start in self.starts] == [start[:2] for start in expected]
        assert all(np.array_equal(start[2], other[2]) for start, other in zip(self.starts, expected))
        assert not any(env.resets for env in envs)
        return num_terminated, num_truncated


class LoopOfEnsemble(Loop):
    """RDE+DQN's, with two environments: also who acts, the epsilons, evaluations and resets."""

    def watch(self, monkeypatch) -> None:
        self.acts, self.epsilons, self.events = {}, [], []
        self.counts = []  # what is logged of the acting agents, with the step
        self.seeds = {"train": set(), "evaluate": set(), "learn": set()}  # of the generators that are drawn from
        script = self.script

        def acted(result, agent, observations, generator, counted=False):
            training = len(observations) == 2  # an evaluation plays one game
            assert counted == training
            self.seeds["train" if training else "evaluate"].add(generator.initial_seed())
            if training:
                self.acts[len(self.added)] = result.numpy().copy()  # greedy actions, acting agents
                assert np.array_equal(observations.numpy(), np.stack([env.observation for env in self.envs[:2]]))

        def scalars(agent, real=script.Agent.scalars):
            self.counts.append((len(self.added), agent.acting_counts.tolist()))
            return real(agent)

        monkeypatch.setattr(script.Agent, "scalars", scalars)
        for owner, method, note in (
            (script.Agent, "act", acted),
            (script.Agent, "update", lambda _, agent: self.seeds["learn"].add(agent.buffer.generator.initial_seed())),
            (script.Agent, "reset", lambda *_: self.events.append(("reset", len(self.updates)))),
            (script, "linear_schedule", lambda epsilon, *_: self.epsilons.append((len(self.added), epsilon))),
            (script.Run, "log_evaluation", lambda _, run, agent, phase, *rest: self.events.append((phase, len(self.updates)))),
        ):
            self.spy(monkeypatch, owner, method, note)


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """320 loop steps of two environments."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return LoopOfEnsemble("rde_dqn_atari", [*OPTIONS, "--runs-dir", tmp_path_factory.mktemp("runs")], 500, monkeypatch)


def test_every_transition_is_stored_as_it_was_played(loop):
    num_terminated, num_truncated = loop.check_transitions(num_envs=2)
    assert len(loop.added) == 640 and num_terminated >= 5 and num_truncated >= 2


@pytest.mark.parametrize("name", ["dqn_atari", "sr_dqn_atari", "rde_drq_atari", "rnd_dqn_atari", "rde_dqn_atari"])
def test_ends_of_games_and_the_first_gradient_step_in_every_loop(name, tmp_path, monkeypatch):
    """No other run of the scripts is long enough for a game to be cut."""
    loop = Loop(name, [*SHORT, "--runs-dir", tmp_path], 140, monkeypatch)
    assert loop.check_transitions(num_envs=1)[1] >= 2
    assert [row[1:] for row in rows(only_run(tmp_path), "episodes.csv")].count(("77.0", "9")) == 1
    assert loop.updates == list(range(114, 120))  # the first in the loop step that begins when learning starts


def explored(loop) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Of every loop step its number and the draws: where chance chooses, and what."""
    exploration = np.random.default_rng(loop.script.derive_seed(1, loop.script.EXPLORATION))
    return [(number, exploration.random(2) < epsilon, exploration.integers(4, size=2)) for number, epsilon in loop.epsilons]


def test_actions_are_greedy_but_for_a_fraction_epsilon(loop):
    """The draws are those of a generator of their own; where none is below epsilon the greedy action is played."""
    decay = [(number, pytest.approx(max(0.1, 0.9 - 0.8 * number / 320))) for number in range(0, 640, 2)]  # of steps behind
    assert loop.epsilons == decay
    for number, explore, random_actions in explored(loop):
        assert (number in loop.acts) == (not explore.all())
        greedy_actions, _ = loop.acts.get(number, (random_actions, None))
        played = [action for _, action, *_ in loop.added[number : number + 2]]
        assert played == np.where(explore, random_actions, greedy_actions).tolist()
    assert sum(explore.sum() for _, explore, _ in explored(loop)) == pytest.approx((0.5 + 0.1) * 320, rel=0.15)
    # Otherwise one could not be told from another.
    assert len(np.unique([greedy_actions for greedy_actions, _ in loop.acts.values()])) > 1


def test_gradient_steps_come_before_the_step_and_are_as_many_as_the_replay_ratio_says(loop):
    """0.75 a step: 1 and 2 in turn, from step 160 on, each before the two transitions of its loop step are stored."""
    assert loop.updates == [number for number in range(160, 640, 2) for _ in range(1 if number % 4 == 0 else 2)]


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
    expected, counts = [], np.zeros(2, int)
    for number, explore, _ in explored(loop):
        if not explore.all():
            np.add.at(counts, loop.acts[number][1][~explore], 1)
        if (number + 2) % 100 == 0:
            expected.append((number + 2, counts.tolist()))
            counts[:] = 0
    assert loop.counts == expected and all(min(counts) > 0 for _, counts in expected[2:])
