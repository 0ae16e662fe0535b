"""The replay buffer that stores each frame once, against a naive one that stores whole stacks."""

from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import CPU
from conftest import load_script

rde = load_script("rde_dqn_atari")


class NaiveBuffer:
    """A deque of transitions with whole stacks, as the textbook has it."""

    def __init__(self, capacity):
        self.transitions = deque(maxlen=capacity)

    def add(self, *transition):
        self.transitions.append(transition)


def frame(number: int) -> np.ndarray:
    """A frame that can be told from all others (and from black)."""
    picture = np.zeros((84, 84), np.uint8)
    picture[0, :4] = [number >> shift & 255 for shift in (24, 16, 8, 0)]
    picture[1:] = number % 250 + 1
    return picture


def all_transitions(buffer):
    """What `sample` can return, each transition once, in the order of storing: drawn at evenly spaced points."""
    draws = (torch.arange(buffer.size, dtype=torch.float64) + 0.5) / buffer.size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rde.torch, "rand", lambda batch_size, **kwargs: draws)
        return buffer.sample(buffer.size)


def events(*kinds: str):
    """Of up to 150 steps of 3 environments."""
    return st.lists(st.lists(st.sampled_from(kinds), min_size=3, max_size=3), min_size=1, max_size=150)


# continue, lose a life or the game (both terminal for learning), be cut
@settings(max_examples=120, deadline=None)
@given(st.integers(10, 60), st.integers(1, 3), events(*["go on"] * 6, "terminated", "truncated"), st.integers(1, 40))
def test_equal_to_a_naive_buffer(capacity, num_envs, events, check_every):
    compare(capacity, num_envs, events, check_every)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_frames_of_very_many_truncations_cost_the_oldest_transitions_alone(num_envs):
    """More than the ring has a reserve for: what is overwritten is not drawn any more, from the very frame on."""
    rows = [["truncated" if (step + i) % 3 else "go on" for i in range(3)] for step in range(120)]
    assert compare(60, num_envs, rows, check_every=1) < 60


def compare(capacity, num_envs, events, check_every) -> int:
    """Fills both buffers alike, compares all that can be drawn, and returns how many transitions these are at the end."""
    capacity = max(capacity, 5 * num_envs)
    buffer, naive = rde.ReplayBuffer(capacity, num_envs, CPU, torch.Generator()), NaiveBuffer(capacity)
    number, truncations = 0, deque(maxlen=capacity)
    stacks = []
    for i in range(num_envs):
        number += 1
        stacks.append([np.zeros((84, 84), np.uint8)] * 3 + [frame(number)])
        buffer.start_episode(i, frame(number))
    for step, row in enumerate(events):
        for i, event in enumerate(row[:num_envs]):
            number += 1
            next_stack = stacks[i][1:] + [frame(number)]
            naive.add(stacks[i], number % 18, float(number % 3 - 1), next_stack, event == "terminated")
            buffer.add(i, number % 18, float(number % 3 - 1), frame(number), event == "terminated")
            truncations.append(event == "truncated")
            stacks[i] = next_stack
            if event != "go on":
                number += 1
                stacks[i] = [np.zeros((84, 84), np.uint8)] * 3 + [frame(number)]
                buffer.start_episode(i, frame(number))
        if step % check_every == 0 or step == len(events) - 1:
            # Frames of truncations beyond the ring's reserve may cost the oldest transitions, and nothing else.
            assert buffer.size <= len(naive.transitions)
            if sum(truncations) <= 5 * num_envs:
                assert buffer.size == len(naive.transitions)
            assert buffer.size >= len(naive.transitions) - sum(truncations) - num_envs
            assert buffer.drawable.tolist() == [buffer.oldest, buffer.size]
            expected = list(naive.transitions)[len(naive.transitions) - buffer.size :]
            frames, actions, rewards, terminated = all_transitions(buffer)
            assert frames.dtype == torch.uint8 and frames.shape == (buffer.size, 5, 84, 84)
            for k, (stack, action, reward, next_stack, end) in enumerate(expected):
                np.testing.assert_array_equal(frames[k, :4].numpy(), np.stack(stack))
                assert (actions[k].item(), rewards[k].item(), terminated[k].item()) == (action, reward, float(end))
                if not end:  # a truncation has its own last frame; a terminated transition looks at none
                    np.testing.assert_array_equal(frames[k, 1:].numpy(), np.stack(next_stack))
    return buffer.size


def filled_buffer(seed: int, size: int = 1_000):
    buffer = rde.ReplayBuffer(size, 1, CPU, torch.Generator().manual_seed(seed))
    buffer.start_episode(0, frame(1))
    for number in range(2, 2 * size + 2):  # wraps once
        buffer.add(0, number, 0.0, frame(number), False)
    return buffer


def test_draws_are_uniform_and_come_from_the_generator():
    buffer = filled_buffer(seed=0, size=50)
    actions = torch.cat([buffer.sample(32)[1] for _ in range(1_000)])
    counts = np.bincount(actions.numpy() - actions.min().item())
    assert len(counts) == 50
    chi_square = ((counts - 640) ** 2 / 640).sum()
    assert chi_square < 94.6  # 49 degrees of freedom: exceeded with probability 1e-4
    first, same, other = (filled_buffer(seed).sample(32)[1] for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_100_000_transitions_take_less_than_750_megabytes():
    """Nearly all of it frames, of which there are as many as transitions and a reserve."""
    for num_envs in (1, 16):
        buffer = rde.ReplayBuffer(1_000, num_envs, CPU, torch.Generator())
        num_bytes = sum(part.nbytes for part in vars(buffer).values() if isinstance(part, (torch.Tensor, np.ndarray)))
        reserve = (10 * num_envs + 1) * 84 * 84  # however large the buffer is
        assert 100 * (num_bytes - reserve) + reserve <= 0.75e9
