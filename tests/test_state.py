"""What a checkpoint keeps of the parts of a run: nothing is forgotten, and a fresh part that is restored goes on the same."""

import io

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import dqn_agent, sac_agent
from conftest import load_script, restored_signal_handlers

rde, sr, dqn, sac = (load_script(name) for name in ("rde_dqn_atari", "sr_dqn_atari", "dqn_atari", "rde_sac_dmc"))


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

    KEPT = (
        "module",
        "optimizer",
        "generator",
        "numpy_generator",
        "tensor",
        "array",
        "plain",
        "inner",
        "inners",
        "doubled",
        "empty",
    )

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.module = torch.nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=0.1)
        self.generator, self.numpy_generator = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        self.memory = torch.full((1_000_000,), float(seed))
        self.tensor, self.array = self.memory[:3], np.full(3, seed)
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


IN_PLACE = ("module", "optimizer", "generator", "numpy_generator", "tensor", "array", "inner", "inners")


def test_every_kind_of_part_is_restored_in_place():
    first, second = Everything(1), Everything(2)
    objects = {name: getattr(second, name) for name in IN_PLACE}
    weight, moment = second.module.weight, second.inners[1]
    state = through_a_file(rde.state_of(first))
    assert state.keys() == set(Everything.KEPT)
    assert rde.restored(second, state) is second
    assert all(getattr(second, name) is kept for name, kept in objects.items())
    assert second.module.weight is weight and torch.equal(weight, first.module.weight)
    assert second.inners[1] is moment and [inner.number for inner in second.inners] == [1, 2] and second.inner.number == 1
    for parameter, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        ours, theirs = first.optimizer.state[parameter], second.optimizer.state[other]
        assert ours["step"] == theirs["step"] == 1 and torch.equal(ours["exp_avg"], theirs["exp_avg"])
    assert first.generator.get_state().equal(second.generator.get_state())
    assert first.numpy_generator.random() == second.numpy_generator.random()
    assert second.tensor.tolist() == second.memory[:3].tolist() == [1, 1, 1] and second.array.tolist() == [1, 1, 1]
    assert second.memory[3] == 2  # what lies behind the view is not kept
    assert second.plain == [1, None, "text", (1.5, [True])] and second.empty == []
    assert (second.doubled, second.half) == (2, 1) and second.not_kept == 2


def test_of_a_view_only_the_view_is_written():
    file = io.BytesIO()
    torch.save(rde.state_of(Everything(1).tensor), file)
    assert len(file.getvalue()) < 5_000


def test_a_list_of_another_length_is_refused():
    three = [Inner(1), Inner(2), Inner(3)]
    with pytest.raises(ValueError):
        rde.restored([Inner(4), Inner(5)], rde.state_of(three))


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
    if isinstance(value, (gym.Space, torch.device, rde.Args, sr.Args, dqn.Args, sac.Args)):
        return repr(value)
    assert value is None or isinstance(value, (bool, int, float, str, bytes, np.generic)), f"what is in a {type(value)}?"
    return value


def changed_attributes(part, elsewhere: set[str], play) -> set[str]:
    """The names of the attributes that are not always the same while it is played. What is `elsewhere` is not looked at."""
    look = lambda: {name: snapshot(value) for name, value in vars(part).items() if name not in elsewhere}
    before, changed = look(), set()
    assert elsewhere <= vars(part).keys()
    for _ in play:
        after = look()
        changed |= {name for name in before.keys() | after.keys() if before.get(name, play) != after.get(name, play)}
    return changed


# A case: a part, its attributes that are other parts (or never change, and cannot be compared), those that follow from what is
# kept, by the name of what they follow from, and a generator that plays, with a stop wherever it is to be looked at.


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


def agent_case(agent, derived: dict[str, str]):
    return agent, {"buffer", "transitions"}, derived, learn(agent)


def buffer_case(agent, derived: dict[str, str]):
    return agent.buffer, {"generator"}, derived, learn(agent)


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


def atari_environment():
    view = rde.make_env(rde.Args(env_id="BreakoutNoFrameskip-v4"))
    view.reset(seed=1)
    return view


def game_case():
    view = atari_environment()
    return view.game, {"env", "ale", "ale_actions"}, {}, play_breakout(view)


def view_case():
    view = atari_environment()
    return view, {"env", "game"}, {}, play_breakout(view)


def control_case():
    env, rng = sac.make_env(sac.Args(env_id="walker-walk")), np.random.default_rng(1)
    env.reset(seed=1)
    play = (env.step(rng.uniform(-1, 1, 6).astype(np.float32)) for _ in range(50))
    return env, {"env", "action_spec"}, {}, play


CASES = {
    "Agent of dqn_atari": lambda: agent_case(dqn_agent(dqn, stored=20, batch_size=4), {}),
    "Agent of sr_dqn_atari": lambda: agent_case(dqn_agent(sr, stored=20, batch_size=4), {}),
    "Agent of rde_dqn_atari": lambda: agent_case(dqn_agent(rde, stored=20, batch_size=4), RESETS),
    "Agent of rde_sac_dmc": lambda: agent_case(sac_agent(sac, 2, stored=20), RESETS | LISTS),
    "ReplayBuffer of Atari": lambda: buffer_case(dqn_agent(rde, size=40, stored=20, batch_size=4), {"frames": "used_frames"}),
    "ReplayBuffer of vectors": lambda: buffer_case(sac_agent(sac, 1, stored=20), {"rows": "used_rows"}),
    "AtariGame": game_case,
    "AtariView": view_case,
    "DeepMindControl": control_case,
}


@pytest.mark.parametrize("case", CASES)
def test_what_changes_is_kept_or_follows_from_what_is_kept(case):
    part, elsewhere, derived, play = CASES[case]()
    kept, attributes = set(type(part).KEPT), set(vars(part))
    changed = changed_attributes(part, elsewhere, play)
    assert changed == (kept & attributes - elsewhere) | derived.keys()
    assert set(derived.values()) | kept & elsewhere <= kept


def test_what_changes_in_a_run_is_kept(tmp_path, monkeypatch):
    """Between the turns of the training loop; a run's other attributes are other parts, or files."""
    looks = []
    elsewhere = {"args", "stop", "parts", "eval_envs", "device", "progress", "writer", "episodes", "evaluations"}
    real = sac.Run.goes_on

    def goes_on(run):
        looks.append({name: snapshot(value) for name, value in vars(run).items() if name not in elsewhere})
        return real(run)

    monkeypatch.setattr(sac.Run, "goes_on", goes_on)
    args = sac.Args(
        env_id="cartpole-balance", total_timesteps=1_020, learning_starts=1_010, buffer_size=2_000, hidden_dim=8, batch_size=8,
        eval_interval=0, eval_episodes=1, checkpoint_interval=1_015, cuda=False, runs_dir=str(tmp_path),
    )  # fmt: skip
    with restored_signal_handlers():
        sac.train(args)
    names = set.union(*(set(look) for look in looks))
    changed = {name for name in names if any(look.get(name) != looks[1][name] for look in looks[1:])}
    # The start of a turn is measured in every turn; wall_seconds is what has gone by since start_time.
    assert changed == set(sac.Run.KEPT) - {"wall_seconds"} | {"turn_started"}


def test_the_time_that_a_run_has_taken_goes_on():
    run = sac.Run.__new__(sac.Run)
    run.wall_seconds = 100.0
    assert run.wall_seconds == pytest.approx(100, abs=1)


# ----------------------------------------------------------------------------------------- what is restored goes on the same


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: dqn_agent(dqn, seed=seed, batch_size=8),
        lambda seed: dqn_agent(sr, seed=seed, batch_size=8, reset_depth="full"),
        lambda seed: dqn_agent(rde, seed=seed, batch_size=8, reset_depth="full", num_agents=3),
        lambda seed: sac_agent(sac, 3, seed=seed),
    ],
)
def test_an_agent_and_its_buffer_go_on_in_fresh_ones(make):
    """From the middle of learning, between two resets: the next updates, the next reset and the buffer are the same bytes."""
    agent, fresh = make(1), make(9)
    has_resets = hasattr(agent, "reset")
    parts = lambda one: {"agent": one, "buffer": one.buffer, "mini_batches": one.buffer.generator}
    go_on = lambda one: [
        one.transitions.store(3),
        one.update(),
        has_resets and one.reset(),
        one.update(),
        one.transitions.store(1),
    ]
    go_on(agent)
    if hasattr(agent, "acting_counts"):
        agent.acting_counts += [3, 1, 4]
    state = through_a_file({name: rde.state_of(part) for name, part in parts(agent).items()})
    if hasattr(agent, "acting_counts"):
        assert state["agent"]["acting_counts"].tolist() == [3, 1, 4]
    random_state, global_state = agent.transitions.rng.bit_generator.state, torch.get_rng_state()
    addresses = [parameter.data_ptr() for optimizer in optimizers(fresh) for parameter in all_parameters(optimizer)]
    for name, part in parts(fresh).items():
        assert rde.restored(part, state[name]) is part
    assert addresses == [parameter.data_ptr() for optimizer in optimizers(fresh) for parameter in all_parameters(optimizer)]
    outcomes = []
    for one in (agent, fresh):
        one.transitions.rng.bit_generator.state = random_state
        torch.set_rng_state(global_state)
        go_on(one)
        looked_at = {name: snapshot(through_a_file(rde.state_of(part))) for name, part in parts(one).items()}
        if has_resets and hasattr(one, "oldest"):
            assert (one.num_resets, one.oldest.item(), one.beta.item()) == (2, 2, 50.0)
        outcomes.append(looked_at)
    for name in outcomes[0]:
        assert outcomes[0][name] == outcomes[1][name], name


def optimizers(agent) -> list:
    return [value for value in vars(agent).values() if isinstance(value, torch.optim.Optimizer)]


def all_parameters(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("script", [rde, sac])
def test_a_number_of_resets_in_a_checkpoint_is_that_of_the_judge(script):
    """`oldest` and `beta` are not in the state: they follow from `resets`, which is restored through its setter."""
    make = (lambda: dqn_agent(rde, num_agents=3, stored=0)) if script is rde else (lambda: sac_agent(sac, 3, stored=0))
    agent, fresh = make(), make()
    for num_resets, oldest in ((1, 1), (5, 2)):
        agent.num_resets = num_resets
        state = through_a_file(script.state_of(agent))
        assert state["resets"] == agent.resets and not {"oldest", "beta"} & state.keys()
        addresses = fresh.oldest.data_ptr(), fresh.beta.data_ptr()
        script.restored(fresh, state)
        assert (fresh.num_resets, fresh.oldest.item(), fresh.beta.item()) == (num_resets, oldest, 50.0)
        assert addresses == (fresh.oldest.data_ptr(), fresh.beta.data_ptr())
