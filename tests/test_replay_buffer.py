"""The replay buffers against lists: those of Atari, which store each frame once and sum over n steps, and that of vectors."""

import dataclasses
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agents import box
from conftest import equal, load_script

rnd, dqn = load_script("rnd_dqn_atari"), load_script("dqn_atari")
BLACK = np.zeros((84, 84), np.uint8)


def frame(number: int) -> np.ndarray:
    """A frame that can be told from all others (and from black)."""
    picture = np.full((84, 84), number % 250 + 1, np.uint8)
    picture[0, :4] = [number >> shift & 255 for shift in (24, 16, 8, 0)]
    return picture


def one_step_buffer(capacity: int, num_envs: int = 1, seed: int = 0):
    return dqn.ReplayBuffer(capacity, num_envs, torch.Generator().manual_seed(seed))


def n_step_buffer(capacity: int, num_envs: int, max_n: int, seed: int = 0):
    return rnd.ReplayBuffer(capacity, num_envs, torch.Generator().manual_seed(seed), max_n)


@dataclasses.dataclass
class Step:
    stack: list
    action: int
    reward: float
    last_stack: list  # the episode's own
    next_stack: list  # after a terminal step the first one of the next episode or life
    event: str


class Player:
    """Plays made-up episodes into a buffer and into lists that are never cut; every frame is another one."""

    def __init__(self, buffer, num_envs: int):
        self.buffer, self.number = buffer, 0
        self.steps = [[] for _ in range(num_envs)]  # of every environment
        self.order = []  # (environment, number of its step), as they were stored
        self.events = deque(maxlen=buffer.capacity)
        self.stacks = [self.start(i) for i in range(num_envs)]

    def start(self, env_index: int) -> list:
        self.number += 1
        self.buffer.start_episode(env_index, frame(self.number))
        return [BLACK] * 3 + [frame(self.number)]

    def play(self, env_index: int, event: str) -> None:
        self.number += 1
        number, stack = self.number, self.stacks[env_index]
        action, reward = number % 18, float(number % 7 - 3)
        self.buffer.add(env_index, action, reward, frame(number), event == "terminated")
        last_stack = next_stack = self.stacks[env_index] = stack[1:] + [frame(number)]
        if event != "go on":
            self.stacks[env_index] = self.start(env_index)
        if event == "terminated":
            next_stack = self.stacks[env_index]
        self.events.append(event)
        self.order.append((env_index, len(self.steps[env_index])))
        self.steps[env_index].append(Step(stack, action, reward, last_stack, next_stack, event))

    def stored(self) -> list[tuple[int, int]]:
        """Which steps the buffer holds: all, or the last ones. Frames of truncations beyond the ring's reserve may cost the
        oldest transitions, and nothing else."""
        num_truncations, num_envs = self.events.count("truncated"), len(self.steps)
        assert len(self.events) - num_truncations - num_envs <= self.buffer.size <= len(self.events)
        if num_truncations <= 5 * num_envs:
            assert self.buffer.size == len(self.events)
        return self.order[len(self.order) - self.buffer.size :]

    def drawn(self, env_index: int, number: int, n: int, gamma: float):
        """Return, next stack, gamma^k, terminated, k and the last frames on the way of the sum from that step on."""
        total, frames = 0.0, []
        for k in range(n):
            step = self.steps[env_index][number + k]
            total += gamma**k * step.reward
            frames.append(step.next_stack[-1])
            if step.event != "go on":
                break
        return total, step.next_stack, gamma ** (k + 1), step.event == "terminated", k + 1, frames


def all_drawn(buffer, *horizons):
    """What `sample` can return, each transition once, in the order of storing: drawn at evenly spaced points."""
    count = buffer.drawable[1].item()
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda batch_size, **kwargs: draws)
        return buffer.sample(count, *horizons)


def events(max_size: int):
    """Of steps of 3 environments: go on, lose a life or the game (both terminal for learning), be cut."""
    kinds = st.sampled_from(["go on"] * 6 + ["terminated", "truncated"])
    return st.lists(st.lists(kinds, min_size=3, max_size=3), min_size=1, max_size=max_size)


# ------------------------------------------------------------------------------------------------------------- one step


def compare(capacity: int, num_envs: int, events: list[list[str]], check_every: int) -> int:
    """Compares all that can be drawn again and again, and returns how many transitions these are at the end."""
    buffer = one_step_buffer(max(capacity, 5 * num_envs), num_envs)
    player = Player(buffer, num_envs)
    for time, row in enumerate(events):
        for i, event in enumerate(row[:num_envs]):
            player.play(i, event)
        if time % check_every and time != len(events) - 1:
            continue
        stored = player.stored()
        assert buffer.drawable.tolist() == [buffer.oldest, buffer.size]
        frames, actions, rewards, terminated = all_drawn(buffer)
        assert frames.dtype == torch.uint8 and frames.shape == (buffer.size, 5, 84, 84)
        for k, (env_index, number) in enumerate(stored):
            step = player.steps[env_index][number]
            end = step.event == "terminated"
            np.testing.assert_array_equal(frames[k, :4].numpy(), np.stack(step.stack))
            assert (actions[k].item(), rewards[k].item(), terminated[k].item()) == (step.action, step.reward, float(end))
            if not end:  # a truncation has its own last frame; a terminated transition looks at none
                np.testing.assert_array_equal(frames[k, 1:].numpy(), np.stack(step.last_stack))
    return buffer.size


@settings(max_examples=120, deadline=None)
@given(st.integers(10, 60), st.integers(1, 3), events(150), st.integers(1, 40))
def test_equal_to_a_naive_buffer(capacity, num_envs, events, check_every):
    compare(capacity, num_envs, events, check_every)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_frames_of_very_many_truncations_cost_the_oldest_transitions_alone(num_envs):
    """More than the ring has a reserve for: what is overwritten is not drawn any more, from the very frame on."""
    rows = [["truncated" if (step + i) % 3 else "go on" for i in range(3)] for step in range(120)]
    assert compare(60, num_envs, rows, check_every=1) < 60


# -------------------------------------------------------------------------------------------------------------- n steps


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(10, 60), num_envs=st.integers(1, 3), max_n=st.integers(1, 12), n=st.integers(1, 12),
    gamma=st.sampled_from([0.9, 0.99, 1.0, 0.0]), events=events(120), check_every=st.integers(7, 60),
)  # fmt: skip
@example(capacity=23, num_envs=2, max_n=9, n=9, gamma=0.9, check_every=10,
         events=[["terminated" if i % 4 == 0 else "go on", "truncated" if i % 5 == 0 else "go on", "go on"] for i in range(60)])  # fmt: skip
def test_equal_to_lists_of_steps(capacity, num_envs, max_n, n, gamma, events, check_every):
    capacity, n = max(capacity, (max_n + 4) * num_envs), min(n, max_n)
    buffer = n_step_buffer(capacity, num_envs, max_n)
    player = Player(buffer, num_envs)
    for time, row in enumerate(events):
        for i, event in enumerate(row[:num_envs]):
            player.play(i, event)
        if time % check_every and time != len(events) - 1:
            continue
        assert buffer.drawable.tolist() == [buffer.oldest, max(0, buffer.size - (max_n - 1) * num_envs)]
        count = buffer.drawable[1].item()
        starts = player.stored()[:count]
        if not count:
            continue
        per_agent = torch.tensor([n, 1, max_n]), torch.tensor([gamma, 0.5, 0.97])
        together, alone = all_drawn(buffer, *per_agent), all_drawn(buffer, n, gamma)
        assert together.next_observations.shape == (3, count, 4, 84, 84) and alone.next_observations.shape == (count, 4, 84, 84)
        assert together.returns.shape == together.discounts.shape == together.num_steps.shape == (3, count)
        for k, (env_index, number) in enumerate(starts):
            step = player.steps[env_index][number]
            for batch in (together, alone):
                np.testing.assert_array_equal(batch.observations[k].numpy(), np.stack(step.stack))
                assert batch.actions[k].item() == step.action
            for drawn, agent_n, agent_gamma in [
                ([value[k] for value in alone[3:]], n, gamma),
                *(([value[j, k] for value in together[3:]], *(x[j].item() for x in per_agent)) for j in range(3)),
            ]:
                total, next_stack, discount, *expected, frames = player.drawn(env_index, number, agent_n, agent_gamma)
                returns, next_observations, discounts, *others = drawn
                np.testing.assert_array_equal(next_observations.numpy(), np.stack(next_stack))
                assert [other.item() for other in others] == expected
                assert returns.item() == pytest.approx(total, rel=1e-5, abs=1e-5)
                assert discounts.item() == pytest.approx(discount, rel=1e-5)
            for later, expected in enumerate(frames):  # those of max_n steps, the last of the loop above
                seen = buffer.next_frames(together.positions[k : k + 1], torch.tensor([later]))
                np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_environments_have_to_take_turns():
    player = Player(n_step_buffer(50, 2, 3), 2)
    player.play(0, "go on")
    with pytest.raises(ValueError, match="environment 0 is out of turn"):
        player.play(0, "go on")


@pytest.mark.parametrize("num_steps", [7, 30])
def test_a_buffer_goes_on_from_its_state(num_steps):
    """Also where the first thing after it is the end of an episode, which is written into the last transition."""
    buffer, fresh = (n_step_buffer(25, 2, 3) for _ in range(2))
    player = Player(buffer, 2)
    for time in range(num_steps):
        for i in range(2):
            player.play(i, "terminated" if time % 5 == i else "go on")
    state = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, rnd.state_of(buffer))
    continued = []
    for target in (buffer, fresh):
        if target is fresh:
            rnd.restored(fresh, state)
        target.start_episode(0, frame(900))
        target.start_episode(1, frame(901))
        for number in range(8):
            for i in range(2):
                target.add(i, number, 1.0, frame(1_000 + 2 * number + i), number == 5)
                if number == 5:
                    target.start_episode(i, frame(902 + i))
        continued.append(list(all_drawn(target, 3, 0.9)))
    assert equal(*continued)


# --------------------------------------------------------------------------------------------------------------- vectors


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["rde_dqn", "rde_sac_dmc", "rde_sac_safety"]), seed=st.integers(0, 1_000),
    capacity=st.integers(1, 12), num_transitions=st.integers(1, 40), observation_dim=st.integers(1, 5),
    action_dim=st.integers(1, 4),
)  # fmt: skip
def test_of_vectors_equal_to_a_naive_buffer(name, capacity, num_transitions, observation_dim, action_dim, seed):
    rng, script = np.random.default_rng(seed), load_script(name)
    generator = torch.Generator().manual_seed(seed)
    buffer = script.ReplayBuffer(capacity, box(observation_dim), box(action_dim), generator)
    naive = deque(maxlen=capacity)
    for number in range(num_transitions):
        observation, next_observation = rng.normal(size=(2, observation_dim)).astype(np.float32)
        action, terminated = rng.uniform(-1, 1, action_dim).astype(np.float32), bool(rng.integers(2))
        cost = [float(rng.integers(2))] if name == "rde_sac_safety" else []
        buffer.add(observation, action, float(number), *cost, terminated, next_observation)
        naive.append((observation.copy(), action, float(number), *cost, terminated, next_observation.copy()))
        observation[:] = next_observation[:] = np.nan  # the buffer must hold copies

    by_reward, drawn = {transition[2]: transition for transition in naive}, set()
    sample = buffer.sample(500)
    assert {tensor.dtype for tensor in sample} == {torch.float32}
    numbers = [(500,)] * (len(sample) - 3)
    assert [tensor.shape for tensor in sample] == [(500, observation_dim), (500, action_dim), *numbers, (500, observation_dim)]
    for row in zip(*(tensor.numpy() for tensor in sample)):
        for ours, expected in zip(row, by_reward[float(row[2])], strict=True):
            np.testing.assert_array_equal(ours, expected)
        drawn.add(float(row[2]))
    assert drawn == set(by_reward)


# ----------------------------------------------------------------------------------------------------- draws, and memory


def filled(kind: str, seed: int):
    """A buffer that has wrapped once, from which 50 transitions can be drawn, numbered by their actions, and how it is drawn."""
    if kind == "vectors":
        buffer = load_script("rde_sac_dmc").ReplayBuffer(50, box(1), box(1), torch.Generator().manual_seed(seed))
        for number in range(100):
            buffer.add(np.zeros(1), np.array([number]), 0.0, False, np.zeros(1))
        return buffer, lambda: buffer.sample(32)[1][:, 0].long()
    buffer = one_step_buffer(50, 1, seed) if kind == "one step" else n_step_buffer(60, 1, 11, seed)
    buffer.start_episode(0, frame(1))
    for number in range(100 if kind == "one step" else 110):  # of n steps the last ten are not drawn
        buffer.add(0, number, 0.0, frame(number + 2), False)
    return buffer, lambda: buffer.sample(32)[1] if kind == "one step" else buffer.sample(32, 3, 0.9).actions


@pytest.mark.parametrize("kind", ["one step", "n steps", "vectors"])
def test_draws_are_uniform_over_what_is_complete_and_come_from_the_generator(kind):
    _, draw = filled(kind, 0)
    actions = torch.cat([draw() for _ in range(1_000)])
    assert (actions.min().item(), actions.max().item()) == (50, 99)
    counts = np.bincount(actions.numpy() - 50)
    assert ((counts - 640) ** 2 / 640).sum() < 94.6  # 49 degrees of freedom: exceeded with probability 1e-4
    first, same, other = (filled(kind, seed)[1]() for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("num_envs", [1, 16])
def test_100_000_transitions_take_less_than_750_megabytes(num_envs):
    """Nearly all of it frames, of which there are as many as transitions and a reserve, however large the buffer is."""
    for buffer in (one_step_buffer(1_000, num_envs), n_step_buffer(1_000, num_envs, 3)):
        num_bytes = sum(part.nbytes for part in vars(buffer).values() if isinstance(part, (torch.Tensor, np.ndarray)))
        reserve = (10 * num_envs + 1) * 84 * 84
        assert 100 * (num_bytes - reserve) + reserve <= 0.75e9
