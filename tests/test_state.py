"""What a checkpoint keeps of the parts of a run: nothing is forgotten, and a fresh part that is restored goes on the same."""

import collections
import enum
import io
import random

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import dqn_agent, reset_in_turn, sac_agent
from conftest import QUICK_CARTPOLE, assert_same_end, error_line, load_script, only_run, put_environments, run_main, stop_when

rde, sr, dqn, sac, mlp = map(load_script, ("rde_dqn_atari", "sr_dqn_atari", "dqn_atari", "rde_sac_dmc", "rde_dqn"))


def through_a_file(state):
    """The state as `torch.load` reads it, which executes nothing."""
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


# --------------------------------------------------------------------------------------------- `state_of` and `restored`


class Inner:
    KEPT = ("number",)

    def __init__(self, number: int):
        self.number = number


class Everything:
    """One attribute of every kind, and one that is not kept."""

    KEPT = ("module", "optimizer", "generator", "numpy_generator", "tensor", "array", "mirrored", "single", "plain", "inner",
            "inners", "doubled", "empty")  # fmt: skip

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.module = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)
        self.generator, self.numpy_generator = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.memory = torch.full((1_000_000,), float(seed))
        self.tensor, self.array, self.single = self.memory[:3], np.full(3, seed), np.array(seed)
        self.mirrored = np.arange(seed, seed + 6).reshape(2, 3)[:, ::-1]  # its memory runs backwards
        self.plain: list = [seed, None, "text", (1.5, [True])]
        self.inner, self.inners, self.empty = Inner(seed), [Inner(seed), Inner(seed + 1)], []
        self.not_kept, self.doubled = seed, 2 * seed
        self.module(torch.ones(2)).sum().backward()
        self.optimizer.step()

    @property
    def doubled(self) -> int:
        return self.half * 2

    @doubled.setter
    def doubled(self, doubled: int) -> None:
        self.half = doubled // 2


def test_every_kind_of_part_is_restored_in_place():
    first, second = Everything(1), Everything(2)
    in_place = "module optimizer generator numpy_generator tensor array mirrored single inner inners".split()
    objects = {name: getattr(second, name) for name in in_place}
    weight, moment = second.module.weight, second.inners[1]
    state = through_a_file(rde.state_of(first))
    assert state.keys() == set(Everything.KEPT) and rde.restored(second, state) is second
    assert all(getattr(second, name) is kept for name, kept in objects.items())
    assert second.module.weight is weight and torch.equal(weight, first.module.weight)
    assert second.inners[1] is moment and [inner.number for inner in second.inners] == [1, 2] and second.inner.number == 1
    for parameter, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        ours, theirs = first.optimizer.state[parameter], second.optimizer.state[other]
        assert ours["step"] == theirs["step"] == 1 and torch.equal(ours["exp_avg"], theirs["exp_avg"])
    assert first.generator.get_state().equal(second.generator.get_state())
    assert first.numpy_generator.random() == second.numpy_generator.random()
    assert second.tensor.tolist() == second.memory[:3].tolist() == [1, 1, 1] and second.array.tolist() == [1, 1, 1]
    assert second.mirrored.tolist() == [[3, 2, 1], [6, 5, 4]] and second.single == 1
    assert second.memory[3] == 2  # what lies behind the view is not kept
    assert second.plain == [1, None, "text", (1.5, [True])] and second.empty == []
    assert (second.doubled, second.half) == (2, 1) and second.not_kept == 2


def test_of_a_view_only_the_view_is_written():
    file = io.BytesIO()
    torch.save(rde.state_of(Everything(1).tensor), file)
    assert len(file.getvalue()) < 5_000


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError):
        rde.restored([Inner(4), Inner(5)], rde.state_of([Inner(1), Inner(2), Inner(3)]))


GENERATORS = [
    np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64, np.random.default_rng, np.random.RandomState,
    lambda seed: np.random.Generator(np.random.MT19937(seed)),
]  # fmt: skip


@pytest.mark.parametrize("make", GENERATORS)
def test_generators_of_numpy_go_on_in_place(make):
    """Also between the two numbers that some of them make at once."""
    generator, fresh = make(1), make(2)
    numbers = lambda one: (one if hasattr(one, "normal") else np.random.Generator(one)).normal(size=3).tolist()
    numbers(generator)
    if isinstance(generator, np.random.RandomState):
        assert generator.get_state()[3] == 1  # a number is left over
    assert rde.restored(fresh, through_a_file(rde.state_of(generator))) is fresh
    assert numbers(fresh) == numbers(generator)


mlp_make_env = mlp.make_env


class Noise(gym.Wrapper):
    """A wrapper of somebody who knows nothing of checkpoints: what it adds depends on all that it has."""

    def __init__(self, env):
        super().__init__(env)
        self.generator, self.device = np.random.RandomState(3), torch.device("cpu")
        self.old_generator, self.new_generator = np.random.Generator(np.random.MT19937(5)), np.random.default_rng(1)
        self.seen: list[float] = []
        self.mean, self.counts = np.zeros(4), {"steps": 0, "by_action": [0, 0], "pair": (np.float32(1), None)}
        self.transform, self.kinds = lambda observation: observation.astype(np.float32), {1}

    def step(self, action):
        observation, reward, *rest = self.env.step(action)
        self.counts["steps"] += 1
        self.counts["by_action"][int(action)] += 1
        self.counts["pair"] = (np.float32(self.counts["pair"][0] + 1), None)
        self.mean = 0.9 * self.mean + 0.1 * observation
        self.seen = [*self.seen[-3:], float(observation[0])]
        self.kinds |= {round(5 * float(observation[0]))}
        noise = self.generator.normal() + self.old_generator.normal() + self.new_generator.normal()
        noise += sum(self.seen) + self.mean.sum() + sum(self.kinds) + self.counts["by_action"][1]
        observation = self.transform(observation + 0.01 * noise)
        return observation, reward + 0.001 * self.counts["steps"] + 0.001 * float(self.counts["pair"][0]), *rest


class Walk(gym.Env):
    """An environment of somebody who knows nothing of checkpoints; its generator is made at its first reset."""

    spec = gym.spec("CartPole-v1")
    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.num_steps = self.np_random.normal(size=4), 0
        return self.place.astype(np.float32), {}

    def step(self, action):
        self.place = self.place + self.np_random.normal(size=4) * (1 + action)
        self.num_steps += 1
        over = self.num_steps == 30
        info = {"episode": {"r": float(self.place.sum()), "l": 30}} if over else {}
        return self.place.astype(np.float32), float(self.place[0]), False, over, info


def noisy(args, render=False):
    return Noise(mlp_make_env(args, render))


@pytest.mark.parametrize("make", [noisy, lambda args, render=False: Walk()])
def test_an_environment_or_a_wrapper_without_kept_is_kept(make, tmp_path, monkeypatch):
    """In a run, which is stopped in the middle of episodes."""
    put_environments(monkeypatch, mlp, make)
    undisturbed, stopped = ([*QUICK_CARTPOLE, "--runs-dir", tmp_path / name] for name in ("undisturbed", "stopped"))
    assert run_main(mlp, *undisturbed).returncode == 0
    for step in (110, 206):
        assert stop_when(lambda run: run.global_step >= step, mlp, *stopped).returncode == 143
    assert run_main(mlp, *stopped).returncode == 0
    assert_same_end(only_run(tmp_path / "stopped"), only_run(tmp_path / "undisturbed"))


def test_gymnasiums_own_wrappers_are_kept():
    """Running means in objects of their own, two wrappers deep."""
    envs = [mlp.make_env(mlp.Args(env_id="CartPole-v1")) for _ in range(2)]
    env, other = (gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(env)) for env in envs)
    env.reset(seed=1), other.reset(seed=1)
    play = lambda one, steps: [(one.step(i % 2), one.reset() if i % 9 == 8 else None) for i in range(steps)]
    play(env, 40)
    mlp.restored(other, mlp.state_of(env))
    for (ours, _), (theirs, _) in zip(play(other, 30), play(env, 30)):
        assert np.array_equal(ours[0], theirs[0]) and ours[1:4] == theirs[1:4]


class Colour(enum.Enum):
    RED = 1


UNKNOWN = [frozenset({1, 2}), Colour.RED, range(3), np.array([None]), open("/dev/null"), np.datetime64("now"), random.Random(1),
           collections.OrderedDict(a=1), collections.deque([1]), np.random.default_rng(1), torch.nn.Linear(1, 1)]  # fmt: skip


@pytest.mark.parametrize("thing", UNKNOWN, ids=lambda thing: type(thing).__name__)
def test_what_cannot_be_kept_is_said_before_the_first_step(thing, tmp_path, monkeypatch):
    """Class and attribute, and what is to be done."""
    made = []

    def make(args, render=False):
        made.append(noisy(args, render))
        made[-1].counts["thing"] = [thing]
        return made[-1]

    put_environments(monkeypatch, mlp, make)
    line = error_line(run_main(mlp, *QUICK_CARTPOLE, "--runs-dir", tmp_path))
    assert line == (f"error: Noise.counts['thing'] is of the class {type(thing).__name__}, which a checkpoint cannot keep: let "
                    "the class that has it name in KEPT what has to be kept, as the classes here do")  # fmt: skip
    assert sum(env.counts["steps"] for env in made) == 1  # of the check of the environment


# ------------------------------------------------------------------------------------------------- nothing is forgotten


def snapshot(value):
    """A copy of a value that can be compared, of whatever holds state. What is not known raises, so that it is named."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, (torch.nn.Module, torch.optim.Optimizer)):
        return snapshot(value.state_dict())
    if isinstance(value, torch.Generator):
        return snapshot(value.get_state())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    if isinstance(value, (gym.Space, torch.device)) or type(value).__name__ == "Args":
        return repr(value)
    assert value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)), f"what is in a {type(value)}?"
    return value


def attributes(part, elsewhere: set[str]) -> dict:
    assert elsewhere <= vars(part).keys()
    return {name: snapshot(value) for name, value in vars(part).items() if name not in elsewhere}


def changed_attributes(looks: list[dict]) -> set[str]:
    """The names of those that are not always the same, or not always there."""
    names, missing = set.union(*map(set, looks)), object()
    return {name for name in names if any(look.get(name, missing) != looks[0].get(name, missing) for look in looks)}


def learn(agent):
    """50 steps: transitions are stored, every fifth step has an update, and there are two resets, if there are any."""
    for step in range(50):
        agent.transitions.store(1)
        if step % 5 == 0:
            agent.update()
        if step in (21, 31) and hasattr(agent, "reset"):
            agent.reset()
        if hasattr(agent, "acting_counts"):
            agent.acting_counts[step % len(agent.acting_counts)] += 1
            agent.choices[0] += 1
        if step % 10 == 9:
            yield


RESETS = {"_resets": "resets", "oldest": "resets", "beta": "resets"}
# The lists hold the very parameters of the networks.
LISTS = {"actor_parameters": "actors", "critic_parameters": "critics", "target_parameters": "target_critics"}


def play_breakout(env):
    """Two games, with their lives."""
    rng, games = np.random.default_rng(1), 0
    while games < 2:
        _, _, terminated, truncated, info = env.step(int(rng.integers(4)))
        games += "episode" in info
        yield
        if terminated or truncated:
            env.reset()
            yield


def play_walker(env):
    rng = np.random.default_rng(1)
    for _ in range(50):
        yield env.step(rng.uniform(-1, 1, 6).astype(np.float32))


def begun(env: gym.Env) -> gym.Env:
    env.reset(seed=1)
    return env


# A case: what plays, the function that plays it, the part of it that is looked at, the attributes of the part that are other
# parts (or never change, and cannot be compared), and those that follow from what is kept, by what they follow from.
breakout = lambda: begun(rde.make_env(rde.Args(env_id="BreakoutNoFrameskip-v4")))
walker = lambda: begun(sac.make_env(sac.Args(env_id="walker-walk")))
atari_agent = lambda script=rde, size=200: dqn_agent(script, size=size, stored=20, batch_size=4)
the_agent, the_buffer, the_env = lambda agent: agent, lambda agent: agent.buffer, lambda env: env
CASES = {
    "Agent of dqn_atari": (lambda: atari_agent(dqn), learn, the_agent, {"buffer", "transitions"}, {}),
    "Agent of sr_dqn_atari": (lambda: atari_agent(sr), learn, the_agent, {"buffer", "transitions"}, {}),
    "Agent of rde_dqn_atari": (atari_agent, learn, the_agent, {"buffer", "transitions"}, RESETS),
    "Agent of rde_sac_dmc": (lambda: sac_agent(sac, 2, stored=20), learn, the_agent, {"buffer", "transitions"}, RESETS | LISTS),
    "ReplayBuffer of Atari": (lambda: atari_agent(size=40), learn, the_buffer, {"generator"}, {"frames": "used_frames"}),
    "ReplayBuffer of vectors": (lambda: sac_agent(sac, 1, stored=20), learn, the_buffer, {"generator"}, {"rows": "used_rows"}),
    "AtariGame": (breakout, play_breakout, lambda view: view.env, {"env", "ale", "ale_actions"}, {}),
    "AtariView": (breakout, play_breakout, the_env, {"env", "ale"}, {}),
    "DeepMindControl": (walker, play_walker, the_env, {"env", "action_spec"}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_changes_is_kept_or_follows_from_what_is_kept(case):
    make, play, part_of, elsewhere, derived = CASES[case]
    whole = make()
    part = part_of(whole)
    kept = set(type(part).KEPT)
    looks = [attributes(part, elsewhere), *(attributes(part, elsewhere) for _ in play(whole))]
    assert changed_attributes(looks) == (kept & vars(part).keys() - elsewhere) | derived.keys()
    assert set(derived.values()) | kept & elsewhere <= kept


def test_what_changes_in_a_run_is_kept(tmp_path, monkeypatch):
    """Between the turns of the training loop; a run's other attributes are other parts, or files."""
    looks, goes_on = [], mlp.Run.goes_on
    elsewhere = {"args", "parts", "eval_envs", "lock", "path", "writer", "episodes", "evaluations"}
    monkeypatch.setattr(mlp.Run, "goes_on", lambda run: (looks.append(attributes(run, elsewhere)), goes_on(run))[1])
    result = run_main(mlp, *QUICK_CARTPOLE, "--checkpoint-interval", 150, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    # The start of a turn is measured in every turn; wall_seconds is what has gone by since the first one.
    assert changed_attributes(looks) == set(mlp.Run.KEPT) | {"turn_started"}


@pytest.mark.parametrize("script, make", [(rde, dqn_agent), (sac, sac_agent)])
def test_a_number_of_resets_in_a_checkpoint_is_that_of_the_judge(script, make):
    """`oldest` and `beta` are not in the state: they follow from `resets`, which is restored through its setter."""
    agent, fresh = (make(script, num_agents=3, stored=0) for _ in range(2))
    for num_resets, oldest in ((1, 1), (5, 2)):
        reset_in_turn(agent, num_resets)
        state = through_a_file(script.state_of(agent))
        assert state["resets"] == agent.resets and not {"oldest", "beta"} & state.keys()
        addresses = fresh.oldest.data_ptr(), fresh.beta.data_ptr()
        script.restored(fresh, state)
        assert (len(fresh.resets), fresh.oldest.item(), fresh.beta.item()) == (num_resets, oldest, 50.0)
        assert addresses == (fresh.oldest.data_ptr(), fresh.beta.data_ptr())
