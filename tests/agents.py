"""Small agents on small replay buffers of random transitions, for the tests of several files."""

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch.distributions import Normal, TanhTransform, TransformedDistribution

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


def safety_agent(script, num_agents: int, costs: bool = True, **arguments):
    """A small agent whose buffer holds random transitions, every fifth of them terminated; without costs as SAC's has them."""
    args = script.Args(**{"num_agents": num_agents, "hidden_dim": 16, "batch_size": 32} | arguments)
    buffer = script.ReplayBuffer(200, box(OBSERVATION_DIM), box(ACTION_DIM), CPU, torch.Generator().manual_seed(11))
    rng = np.random.default_rng(7)
    for i in range(200):
        observation, next_observation = rng.normal(size=(2, OBSERVATION_DIM))
        action, reward, cost = rng.uniform(-1, 1, ACTION_DIM), rng.normal(), float(rng.integers(2))
        buffer.add(observation, action, reward, *([cost] if costs else []), i % 5 == 0, next_observation)
    return script.Agent(args, box(OBSERVATION_DIM), box(ACTION_DIM), buffer, CPU)


def mlp_agent(script, num_agents: int, stored: int = 200, terminated: float = 0.3, **arguments):
    """A small agent of rde_dqn.py on random transitions. `learning_rate` and the like are those of the script, if not given."""
    args = script.Args(**{"num_agents": num_agents, "hidden_dim": 16, "num_hidden_layers": 3, "batch_size": 32} | arguments)
    spaces = box(OBSERVATION_DIM), gym.spaces.Discrete(NUM_ACTIONS)
    buffer, rng = script.ReplayBuffer(200, *spaces, CPU, torch.Generator().manual_seed(11)), np.random.default_rng(7)
    for _ in range(stored):
        observation, next_observation = rng.normal(size=(2, OBSERVATION_DIM))
        buffer.add(
            observation, rng.integers(NUM_ACTIONS, size=1), 3 * rng.normal(), rng.random() < terminated, next_observation
        )
    agent = script.Agent(args, *spaces, buffer, CPU)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():  # as after a while of learning: the targets are behind
        for parameter in agent.target_networks.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
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


def state_per_agent(agent) -> list[dict[str, torch.Tensor]]:
    """Every tensor of SAC agents' state, split into what belongs to each agent: [{name: tensor}, ...]."""
    state = [{} for _ in range(agent.args.num_agents)]
    modules = {"actors": agent.actors, "critics": agent.critics, "target_critics": agent.target_critics}
    stacked = {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}
    stacked["log_alphas"] = agent.log_alphas.detach()
    for name, tensor in stacked.items():
        for i, part in enumerate(tensor.chunk(agent.args.num_agents)):
            state[i][name] = part
    for name in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        optimizer = getattr(agent, name)
        for i, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                for key, tensor in optimizer.state[parameter].items():
                    state[i][f"{name}.{number}.{key}"] = tensor
    return state


class Float64Networks:
    """One SAC agent's networks in float64, a copy, computed with plain functions of PyTorch."""

    def __init__(self, agent, index: int, num_critics: int):
        self.actor = self.copy_layers(agent.actors, index)
        numbers = range(num_critics * index, num_critics * (index + 1))
        self.critics = [self.copy_layers(agent.critics, number) for number in numbers]
        self.targets = [self.copy_layers(agent.target_critics, number) for number in numbers]
        self.log_alpha = agent.log_alphas.detach()[index].double().requires_grad_()

    @staticmethod
    def copy_layers(stacked, network: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        parameters = [
            (weight.detach()[network].T.double().clone(), bias.detach()[network, 0].double().clone())
            for weight, bias in zip(stacked.weights, stacked.biases)
        ]
        return [(weight.requires_grad_(), bias.requires_grad_()) for weight, bias in parameters]

    @staticmethod
    def mlp(layers, inputs: torch.Tensor) -> torch.Tensor:
        for weight, bias in layers[:-1]:
            inputs = torch.clamp(F.linear(inputs, weight, bias), min=0)
        return F.linear(inputs, *layers[-1])

    def policy(self, observations: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (batch, action_dim) and their log-probabilities (batch,)."""
        output = self.mlp(self.actor, observations)
        mean, log_std = output[:, :ACTION_DIM], output[:, ACTION_DIM:].clamp(-20, 2)
        distribution = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        actions = distribution.transforms[0](mean + log_std.exp() * noise)
        return actions, distribution.log_prob(actions).sum(dim=1)

    def values(self, critics, observations: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """What each of the critics says, (batch,)."""
        values = [self.mlp(critic, torch.cat([observations, actions], dim=1))[:, 0] for critic in critics]
        assert {value.shape for value in values} == {(len(observations),)}
        return values
