"""Small agents on small replay buffers of random transitions, for the tests of several files."""

import inspect

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F

from conftest import load_script

CPU = torch.device("cpu")
FRAMES = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
NUM_ACTIONS = 5
OBSERVATION_DIM, ACTION_DIM = 5, 3


def box(*shape: int) -> gym.spaces.Box:
    return gym.spaces.Box(-1.0, 1.0, shape, np.float32)


def screens(seed: int, *shape: int) -> torch.Tensor:
    """Frames (*shape, 84, 84) of blocks of 12 x 12 pixels, the upper of which never change: more like screens than noise is."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape, 7, 7), dtype=np.uint8).repeat(12, -1).repeat(12, -2)
    blocks[..., :12, :] = 77
    return torch.from_numpy(blocks)


class AtariTransitions:
    """Random pictures, noise or screens, actions and rewards; every so often a life is lost, or an episode cut."""

    def __init__(self, buffer, seed: int, terminated: float, truncated: float = 0.0, of_screens: bool = False):
        self.buffer, self.rng, self.of_screens = buffer, np.random.default_rng(seed), of_screens
        self.events = [terminated, truncated, 1 - terminated - truncated]
        buffer.start_episode(0, self.picture())

    def picture(self) -> np.ndarray:
        if self.of_screens:
            return screens(self.rng, 1)[0].numpy()
        return self.rng.integers(0, 256, (84, 84), dtype=np.uint8)

    def store(self, count: int) -> None:
        for _ in range(count):
            event = self.rng.choice(["terminated", "truncated", "go on"], p=self.events)
            action, reward = int(self.rng.integers(NUM_ACTIONS)), float(self.rng.integers(-1, 2))
            self.buffer.add(0, action, reward, self.picture(), event == "terminated")
            if event != "go on":
                self.buffer.start_episode(0, self.picture())


class VectorTransitions:
    """Random vectors, in rde_sac_safety.py with costs; every fifth transition is terminated, or all, or none."""

    def __init__(self, buffer, terminated: bool | None):
        self.buffer, self.terminated, self.rng = buffer, terminated, np.random.default_rng(7)
        self.costs = np.random.default_rng(8) if "cost" in inspect.signature(buffer.add).parameters else None

    def store(self, count: int) -> None:
        for i in range(count):
            cost = [] if self.costs is None else [float(self.costs.integers(2))]
            self.buffer.add(
                self.rng.normal(size=OBSERVATION_DIM), self.rng.uniform(-1, 1, ACTION_DIM), self.rng.normal(), *cost,
                i % 5 == 0 if self.terminated is None else self.terminated, self.rng.normal(size=OBSERVATION_DIM),
            )  # fmt: skip


def dqn_agent(script, seed: int = 1, size: int = 200, stored: int = 200, device: torch.device = CPU, **arguments):
    """An agent of an Atari script, with a fifth of its transitions terminated. `agent.transitions.store` adds some."""
    args = script.Args(buffer_size=size, seed=seed, **arguments)
    buffer = script.ReplayBuffer(size, 1, torch.Generator(device).manual_seed(seed))
    agent = script.Agent(args, FRAMES, gym.spaces.Discrete(NUM_ACTIONS), buffer, device)
    agent.transitions = AtariTransitions(buffer, seed, terminated=0.2)
    agent.transitions.store(stored)
    return agent


def n_step_agent(script, seed: int = 1, num_frames: int = 20, **arguments):
    """An agent of a script whose buffer sums over n steps: of DrQ a narrow one, with a support in which Q-values do not lie in
    the middle; of RND one with statistics of so many frames, and of their bonus."""
    narrow = {"width": 0.1, "batch_size": 8, "v_min": -2.0, "v_max": 3.0, "n_step": 3} if "drq" in script.__name__ else {}
    args = script.Args(**{"buffer_size": 200, "seed": seed} | narrow | arguments)
    buffer = script.ReplayBuffer(200, 1, torch.Generator().manual_seed(seed), args.n_step)
    AtariTransitions(buffer, seed, terminated=0.15, truncated=0.1, of_screens=True).store(200)
    agent = script.Agent(args, FRAMES, gym.spaces.Discrete(NUM_ACTIONS), buffer, CPU)
    if getattr(agent, "rnd", None) is not None:
        for observations in screens(seed + 100, num_frames, args.num_envs, 4):
            agent.rnd.follow(observations, count_returns=True)
    return agent


def sac_agent(
    script, num_agents: int, stored: int = 200, terminated: bool | None = None, device: torch.device = CPU, **arguments
):
    """A small agent of a script for continuous actions."""
    args = script.Args(**{"num_agents": num_agents, "hidden_dim": 16, "batch_size": 32} | arguments)
    buffer = script.ReplayBuffer(200, box(OBSERVATION_DIM), box(ACTION_DIM), torch.Generator(device).manual_seed(11))
    agent = script.Agent(args, box(OBSERVATION_DIM), box(ACTION_DIM), buffer, device)
    agent.transitions = VectorTransitions(buffer, terminated)
    agent.transitions.store(stored)
    return agent


def reset_in_turn(agent, num_resets: int) -> None:
    """As after so many resets, of the oldest agent each time: it judges, and is the next; the networks stay as they are."""
    agent.resets = [number % agent.args.num_agents for number in range(num_resets)]


def mlp_agent(script, num_agents: int, stored: int = 200, terminated: float = 0.3, **arguments):
    """A small agent of rde_dqn.py on random transitions. `learning_rate` and the like are those of the script, if not given."""
    args = script.Args(**{"num_agents": num_agents, "hidden_dim": 16, "num_hidden_layers": 3, "batch_size": 32} | arguments)
    spaces = box(OBSERVATION_DIM), gym.spaces.Discrete(NUM_ACTIONS)
    buffer, rng = script.ReplayBuffer(200, *spaces, torch.Generator().manual_seed(11)), np.random.default_rng(7)
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


def make_agent(name: str, **arguments):
    """A small agent of any script, on its replay buffer."""
    script = load_script(name)
    if name in ("rde_drq_atari", "rnd_dqn_atari"):
        return n_step_agent(script, **arguments)
    if name.endswith("atari"):
        return dqn_agent(script, **arguments)
    make = mlp_agent if name == "rde_dqn" else sac_agent
    return make(script, **{"num_agents": 2} | arguments)


def bare_agent(name: str, **arguments):
    """An agent of any script, without a replay buffer."""
    script = load_script(name)
    observation_space = FRAMES if name.endswith("atari") else box(OBSERVATION_DIM)
    action_space = box(ACTION_DIM) if "sac" in name else gym.spaces.Discrete(NUM_ACTIONS)
    return script.Agent(script.Args(**arguments), observation_space, action_space, None, CPU)


def make_observations(name: str, count: int) -> torch.Tensor:
    """What an agent of a script acts on."""
    if name.endswith("atari"):
        return screens(3, count, 4)
    return torch.randn(count, OBSERVATION_DIM, generator=torch.Generator().manual_seed(3))


def next_batch(agent, *horizons):
    """The mini-batch that the agent's next update will draw, without drawing it from its generator."""
    generator_state = agent.buffer.generator.get_state()
    batch = agent.buffer.sample(agent.args.batch_size, *horizons)
    agent.buffer.generator.set_state(generator_state)
    return batch


def reference_features(weights: dict, x: torch.Tensor) -> torch.Tensor:
    """Of Nature DQN's hidden layer, for (batch, 4, 84, 84) in [0, 1], by plain function calls."""
    for layer, stride in ((0, 4), (2, 2), (4, 1)):
        x = F.conv2d(x, weights[f"convolutions.{layer}.weight"], weights[f"convolutions.{layer}.bias"], stride).relu()
    return (x.flatten(1) @ weights["hidden.weight"].T + weights["hidden.bias"]).relu()


def parameters(module) -> list[torch.Tensor]:
    """Copies of a network's parameters, or of several networks'."""
    return [parameter.detach().clone() for parameter in module.parameters()]


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


def shortened(env, num_steps: int):
    """The environment with episodes of at most so many steps, where the script has its own way to end them."""
    inner = env.unwrapped
    if hasattr(inner, "action_spec"):  # the DeepMind Control Suite
        inner.env._step_limit = num_steps
    if hasattr(inner, "time_limit"):  # constrained tasks
        inner.time_limit = num_steps
    return env
