"""The replay buffer that sums rewards over n steps and stores each frame once, against lists of whole stacks."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_capture import watched

from conftest import load_script

rnd, dqn = load_script("rnd_dqn_atari"), load_script("dqn_atari")
CPU = torch.device("cpu")
BLACK = np.zeros((84, 84), np.uint8)


def frame(number: int) -> np.ndarray:
    """A frame that can be told from all others (and from black)."""
    picture = np.full((84, 84), number % 250 + 1, np.uint8)
    picture[0, :4] = [number >> shift & 255 for shift in (24, 16, 8, 0)]
    return picture


@dataclasses.dataclass
class Step:
    stack: list
    action: int
    reward: float
    next_stack: list  # after a terminal step the first one of the next episode or life
    event: str


class NaiveBuffer:
    """All steps of every environment, in lists that are never cut."""

    def __init__(self, num_envs: int):
        self.steps = [[] for _ in range(num_envs)]
        self.order = []  # (environment, number of its step), as they were stored

    def add(self, env_index: int, step: Step) -> None:
        self.order.append((env_index, len(self.steps[env_index])))
        self.steps[env_index].append(step)

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


class Player:
    """Plays made-up episodes into a buffer and a naive one; every frame is another one."""

    def __init__(self, buffer, num_envs: int):
        self.buffer, self.naive, self.number = buffer, NaiveBuffer(num_envs), 0
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
        next_stack = self.stacks[env_index] = stack[1:] + [frame(number)]
        if event != "go on":
            self.stacks[env_index] = self.start(env_index)
        if event == "terminated":
            next_stack = self.stacks[env_index]
        self.naive.add(env_index, Step(stack, action, reward, next_stack, event))


def all_drawn(buffer, n, gamma):
    """What `sample` can return, each transition once, in the order of storing: drawn at evenly spaced points."""
    count = buffer.drawable[1].item()
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda batch_size, **kwargs: draws)
        return buffer.sample(count, n, gamma)


# go on, lose a life or the game (both terminal for learning), be cut
EVENTS = st.sampled_from(["go on"] * 6 + ["terminated", "truncated"])


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(10, 60),
    num_envs=st.integers(1, 3),
    max_n=st.integers(1, 12),
    n=st.integers(1, 12),
    gamma=st.sampled_from([0.9, 0.99, 1.0, 0.0]),
    events=st.lists(st.lists(EVENTS, min_size=3, max_size=3), min_size=1, max_size=120),
    check_every=st.integers(7, 60),
)
@example(capacity=23, num_envs=2, max_n=9, n=9, gamma=0.9, check_every=10,
         events=[["terminated" if i % 4 == 0 else "go on", "truncated" if i % 5 == 0 else "go on", "go on"] for i in range(60)])  # fmt: skip
def test_equal_to_lists_of_steps(capacity, num_envs, max_n, n, gamma, events, check_every):
    capacity, n = max(capacity, (max_n + 4) * num_envs), min(n, max_n)
    buffer = rnd.NStepReplayBuffer(capacity, num_envs, CPU, torch.Generator(), max_n)
    player, num_truncations = Player(buffer, num_envs), 0
    for time, row in enumerate(events):
        for i, event in enumerate(row[:num_envs]):
            player.play(i, event)
            num_truncations += event == "truncated"
        if time % check_every and time != len(events) - 1:
            continue
        naive = player.naive
        stored = min(capacity, len(naive.order))
        # Frames of truncations beyond the ring's reserve may cost the oldest transitions, and nothing else.
        assert stored - num_truncations - num_envs <= buffer.size <= stored
        if num_truncations <= 5 * num_envs:
            assert buffer.size == stored
        assert buffer.drawable.tolist() == [buffer.oldest, max(0, buffer.size - (max_n - 1) * num_envs)]
        count = buffer.drawable[1].item()
        starts = naive.order[len(naive.order) - buffer.size :][:count]
        if not count:
            continue
        per_agent = torch.tensor([n, 1, max_n]), torch.tensor([gamma, 0.5, 0.97])
        together, alone = all_drawn(buffer, *per_agent), all_drawn(buffer, n, gamma)
        assert together.next_observations.shape == (3, count, 4, 84, 84) and alone.next_observations.shape == (count, 4, 84, 84)
        assert together.returns.shape == together.discounts.shape == together.num_steps.shape == (3, count)
        for k, (env_index, number) in enumerate(starts):
            step = naive.steps[env_index][number]
            for batch in (together, alone):
                np.testing.assert_array_equal(batch.observations[k].numpy(), np.stack(step.stack))
                assert batch.actions[k].item() == step.action
            for drawn, agent_n, agent_gamma in [
                ([value[k] for value in alone[3:]], n, gamma),
                *(([value[j, k] for value in together[3:]], *(x[j].item() for x in per_agent)) for j in range(3)),
            ]:
                total, next_stack, discount, terminated, num_steps, frames = naive.drawn(
                    env_index, number, agent_n, agent_gamma
                )
                returns, next_observations, discounts, *others = drawn
                np.testing.assert_array_equal(next_observations.numpy(), np.stack(next_stack))
                assert [other.item() for other in others] == [terminated, num_steps]
                assert returns.item() == pytest.approx(total, rel=1e-5, abs=1e-5)
                assert discounts.item() == pytest.approx(discount, rel=1e-5)
            for later, expected in enumerate(frames):  # those of max_n steps, the last of the loop above
                seen = buffer.next_frames(together.positions[k : k + 1], torch.tensor([later]))
                np.testing.assert_array_equal(seen[0].numpy(), expected)


def test_a_made_up_life_by_hand():
    """Rewards 1, 2, 4, 8, gamma 1/2, n = 3; the fourth step is terminal, and a life of one cut step follows."""
    buffer = rnd.NStepReplayBuffer(20, 1, CPU, torch.Generator(), 3)
    buffer.start_episode(0, frame(1))
    for i, reward in enumerate([1.0, 2.0, 4.0, 8.0]):
        buffer.add(0, i, reward, frame(2 + i), terminated=reward == 8)
    buffer.start_episode(0, frame(100))
    buffer.add(0, 4, 16.0, frame(101), terminated=False)
    buffer.start_episode(0, frame(200))
    for i in range(2):
        buffer.add(0, 5, 32.0, frame(201 + i), terminated=False)
    batch = all_drawn(buffer, 3, 0.5)
    assert batch.actions.tolist() == [0, 1, 2, 3, 4]  # the last two have not got their three rewards yet
    assert batch.returns.tolist() == [1 + 1 + 1, 2 + 2 + 2, 4 + 4, 8, 16]
    assert batch.num_steps.tolist() == [3, 3, 2, 1, 1]
    assert batch.discounts.tolist() == [0.125, 0.125, 0.25, 0.5, 0.5]
    assert batch.terminated.tolist() == [0, 1, 1, 1, 0]
    values = batch.next_observations[:, :, 5, 5].tolist()
    first_of_the_next_life = [0, 0, 0, 101]
    assert values == [[2, 3, 4, 5], *[first_of_the_next_life] * 3, [0, 0, 101, 102]]


def test_with_one_step_it_is_the_one_step_buffer():
    """The same transitions by the same draws as dqn_atari.py's, but for the next frames of terminal ones, which it has not got."""
    one, other = rnd.NStepReplayBuffer(50, 2, CPU, torch.Generator(), 1), dqn.ReplayBuffer(50, 2, CPU, torch.Generator())
    for buffer in (one, other):
        player = Player(buffer, 2)
        for time in range(90):
            for i in range(2):
                player.play(i, "terminated" if time % 8 == i else "truncated" if time % 11 == 3 * i else "go on")
        buffer.generator.manual_seed(4)
    batch, (frames, actions, rewards, terminated) = one.sample(500, 1, 0.9), other.sample(500)
    assert torch.equal(batch.observations, frames[:, :4]) and torch.equal(batch.actions, actions)
    assert torch.equal(batch.returns, rewards) and torch.equal(batch.terminated, terminated)
    assert 0.05 < terminated.mean() < 0.5
    assert torch.equal(batch.next_observations[terminated == 0], frames[terminated == 0, 1:])
    assert torch.equal(one.generator.get_state(), other.generator.get_state())


def test_environments_have_to_take_turns():
    buffer = rnd.NStepReplayBuffer(50, 2, CPU, torch.Generator(), 3)
    player = Player(buffer, 2)
    player.play(0, "go on")
    with pytest.raises(ValueError, match="environment 0 is out of turn"):
        player.play(0, "go on")


def test_draws_are_uniform_over_what_is_complete_and_come_from_the_generator():
    def filled(seed: int):
        buffer = rnd.NStepReplayBuffer(60, 1, CPU, torch.Generator().manual_seed(seed), 11)
        buffer.start_episode(0, frame(1))
        for number in range(2, 122):  # wraps once
            buffer.add(0, number, 0.0, frame(number), False)
        return buffer

    buffer = filled(0)
    actions = torch.cat([buffer.sample(32, 3, 0.9).actions for _ in range(1_000)])
    assert (actions.min().item(), actions.max().item()) == (62, 111)  # of 62 to 121 the last ten are not drawn
    counts = np.bincount(actions.numpy() - 62)
    assert ((counts - 640) ** 2 / 640).sum() < 94.6  # 49 degrees of freedom: exceeded with probability 1e-4
    first, same, other = (filled(seed).sample(32, 3, 0.9).actions for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_draw_can_be_captured_and_follows_what_is_stored_later():
    """Nothing of it is fixed on the host: the same operations on the same tensors draw from what has been stored since."""
    generator = torch.Generator().manual_seed(0)
    buffer = rnd.NStepReplayBuffer(40, 1, CPU, generator, 3)
    player = Player(buffer, 1)
    for _ in range(10):
        player.play(0, "go on")
    n, gamma, steps = torch.tensor([3, 1]), torch.tensor([0.9, 0.8]), torch.zeros(8, dtype=torch.int64)
    for arguments in ((3, 0.9), (n, gamma)):
        watch = watched(lambda: buffer.next_frames(buffer.sample(8, *arguments).positions, steps), generator)  # noqa: B023
        assert watch.cannot_be_captured == [] and watch.num_draws == 1
    drawable = buffer.drawable
    assert drawable.tolist() == [0, 8]
    for _ in range(40):
        player.play(0, "go on")
    assert buffer.drawable is drawable and drawable.tolist() == [10, 38]


def test_100_000_transitions_take_less_than_750_megabytes():
    buffer = rnd.ReplayBuffer(1_000, 1, CPU, torch.Generator(), 3)
    assert 100 * sum(part.nbytes for part in vars(buffer).values() if isinstance(part, (torch.Tensor, np.ndarray))) < 0.75e9


@pytest.mark.parametrize("num_steps", [7, 30])
def test_a_buffer_goes_on_from_its_state(num_steps):
    """Also where the first thing after it is the end of an episode, which is written into the last transition."""
    buffer, fresh = (rnd.NStepReplayBuffer(25, 2, CPU, torch.Generator(), 3) for _ in range(2))
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
        continued.append(all_drawn(target, 3, 0.9))
    for ours, theirs in zip(*continued, strict=True):
        assert torch.equal(ours, theirs)
