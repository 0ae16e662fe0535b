"""The replay buffer of RDE+SAC against a naive one."""

from collections import deque

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import CPU, box


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 12), num_transitions=st.integers(1, 40), observation_dim=st.integers(1, 5),
    action_dim=st.integers(1, 4), seed=st.integers(0, 1_000),
)  # fmt: skip
def test_equal_to_a_naive_buffer(sac, capacity, num_transitions, observation_dim, action_dim, seed):
    rng = np.random.default_rng(seed)
    buffer = sac.ReplayBuffer(capacity, box(observation_dim), box(action_dim), CPU, torch.Generator().manual_seed(seed))
    naive = deque(maxlen=capacity)
    for number in range(num_transitions):
        observation, next_observation = rng.normal(size=(2, observation_dim)).astype(np.float32)
        action, terminated = rng.uniform(-1, 1, action_dim).astype(np.float32), bool(rng.integers(2))
        buffer.add(observation, action, float(number), terminated, next_observation)
        naive.append((observation.copy(), action, float(number), terminated, next_observation.copy()))
        observation[:] = next_observation[:] = np.nan  # the buffer must hold copies

    by_reward = {transition[2]: transition for transition in naive}
    sample = buffer.sample(500)
    assert [tensor.dtype for tensor in sample] == [torch.float32] * 5
    assert [tensor.shape for tensor in sample] == [
        (500, observation_dim), (500, action_dim), (500,), (500,), (500, observation_dim)
    ]  # fmt: skip
    drawn = set()
    for observation, action, reward, terminated, next_observation in zip(*(tensor.numpy() for tensor in sample)):
        expected = by_reward[float(reward)]
        drawn.add(float(reward))
        np.testing.assert_array_equal(observation, expected[0])
        np.testing.assert_array_equal(action, expected[1])
        assert terminated == expected[3]
        np.testing.assert_array_equal(next_observation, expected[4])
    assert drawn == set(by_reward)


def test_draws_are_uniform_and_those_of_the_generator(sac):
    buffers = [sac.ReplayBuffer(10, box(1), box(1), CPU, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    for buffer in buffers:
        for number in range(17):
            buffer.add(np.zeros(1), np.zeros(1), number, False, np.zeros(1))
    first, same, other = (buffer.sample(20_000)[2] for buffer in buffers)
    assert torch.equal(first, same) and not torch.equal(first, other)
    counts = torch.bincount(first.long())
    assert not counts[:7].any()
    assert (counts[7:] - 2_000).abs().max() < 5 * np.sqrt(2_000)
