"""Small agents on small replay buffers of random transitions, for the tests of several files."""

import gymnasium as gym
import numpy as np
import torch

CPU = torch.device("cpu")
FRAMES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
NUM_ACTIONS = 5
OBSERVATION_DIM, ACTION_DIM = 5, 3


def box(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1.0, 1.0, shape, np.float32)


class AtariTransitions:
    """Random pictures, actions and rewards; every so often a life is lost."""

    def __init__(self, buffer, seed: int, terminated: float):
        self.buffer, self.terminated, self.rng = buffer, terminated, np.random.default_rng(seed)
        buffer.start_episode(0, self.picture())

    def picture(self) -> np.ndarray:
        return self.rng.integers(0, 256, (84, 84), dtype=np.uint8)

    def store(self, count: int) -> None:
        for _ in range(count):
            terminated = self.rng.random() < self.terminated
            action, reward = int(self.rng.integers(NUM_ACTIONS)), float(self.rng.integers(-1, 2))
            self.buffer.add(0, action, reward, self.picture(), terminated)
            if terminated:
                self.buffer.start_episode(0, self.picture())


class VectorTransitions:
    """Random vectors; every fifth transition is terminated, or all, or none."""

    def __init__(self, buffer, terminated: bool | None):
        self.buffer, self.terminated, self.rng = buffer, terminated, np.random.default_rng(7)

    def store(self, count: int) -> None:
        for i in range(count):
            self.buffer.add(
                self.rng.normal(size=OBSERVATION_DIM), self.rng.uniform(-1, 1, ACTION_DIM), self.rng.normal(),
                i % 5 == 0 if self.terminated is None else self.terminated, self.rng.normal(size=OBSERVATION_DIM),
            )  # fmt: skip


def dqn_agent(script, seed: int = 1, size: int = 200, stored: int = 200, device: torch.device = CPU, **arguments):
    """An agent of an Atari script, with a fifth of its transitions terminated. `agent.transitions.store` adds some."""
    args = script.Args(buffer_size=size, seed=seed, **arguments)
    buffer = script.ReplayBuffer(size, 1, device, torch.Generator(device).manual_seed(seed))
    agent = script.Agent(args, FRAMES, gym.spaces.Discrete(NUM_ACTIONS), buffer, device)
    agent.transitions = AtariTransitions(buffer, seed, terminated=0.2)
    agent.transitions.store(stored)
    return agent


def sac_agent(
    script, num_agents: int, stored: int = 200, terminated: bool | None = None, device: torch.device = CPU, **arguments
):
    """A small agent of a script for the DeepMind Control Suite."""
    args = script.Args(**{"num_agents": num_agents, "hidden_dim": 16, "batch_size": 32} | arguments)
    buffer = script.ReplayBuffer(200, box(OBSERVATION_DIM), box(ACTION_DIM), device, torch.Generator(device).manual_seed(11))
    agent = script.Agent(args, box(OBSERVATION_DIM), box(ACTION_DIM), buffer, device)
    agent.transitions = VectorTransitions(buffer, terminated)
    agent.transitions.store(stored)
    return agent


def networks(agent) -> list:
    """The Q-networks of an Atari agent, of whichever script."""
    return list(agent.q_networks) if hasattr(agent, "q_networks") else [agent.q_network]


def targets(agent) -> list:
    return list(agent.target_networks) if hasattr(agent, "target_networks") else [agent.target_network]


def updated(agent) -> torch.Tensor:
    """The metrics of one gradient step, which fills them in place and returns nothing."""
    address = agent.metrics.data_ptr()
    assert agent.update() is None and agent.metrics.data_ptr() == address
    return agent.metrics.clone()
