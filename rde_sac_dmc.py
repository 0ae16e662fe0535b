# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "box2d==2.3.10; python_version < '3.14'", "dm_control==1.0.50; python_version < '3.13'",
#     "gymnasium[classic-control,mujoco]==1.4.0", "mujoco==3.17.0", "numpy>=2.0,<3", "pydantic>=2.10,<3",
#     "tensorboard>=2.20,<3", "torch==2.13.0", "tqdm>=4.67", "tyro>=1.0,<2",
# ]
# ///
r"""Reset deep ensemble of SAC agents (RDE+SAC) on the DeepMind Control Suite, and on any Gymnasium task with
continuous actions.

N agents learn from one replay buffer. They are reset one after another against primacy bias, and
act as one: every agent proposes an action of its policy, and the oldest agent, whose last reset
is longest ago, judges the proposals with the smaller of its two critics. The baselines are this
script, too: SR+SAC is `--num-agents 1`, SAC `--num-agents 1 --reset-interval 0`.

    python rde_sac_dmc.py --env-id hopper-hop
    python rde_sac_dmc.py --env-id HalfCheetah-v5

The paper's sizes are made for a GPU; without one, `--hidden-dim 256 --batch-size 256` are sizes
to wait for. In two minutes, to see everything happen once (with two resets):

    python rde_sac_dmc.py --env-id cartpole-swingup --hidden-dim 64 --batch-size 64 \
        --total-timesteps 8000 --learning-starts 1000 --reset-interval 5000 \
        --eval-interval 2000 --eval-episodes 2

Kim, Shin, Park, Sung, "Sample-Efficient and Safe Deep RL via Reset Deep Ensemble Agents", NeurIPS
    2023 (arXiv 2310.20287).
SAC: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv 1812.05905).

Where is what:
    Args                          every argument, its meaning and its range
    StackedMLP, squashed_gaussian the networks, and what the policy draws
    selection_probabilities, ...  which agent acts
    Agent                         act, update, reset
    gradient_steps_due, ...       when there is a gradient step, a reset, an evaluation
    train                         the training loop
    -- the line --                below it nothing is of the algorithm
    DeepMindControl, ...          the environments
    ReplayBuffer                  transitions
    -- the second line --         equal in all scripts
    derive_seed, CudaGraph, ...   seeds, devices, evaluation
    Run                           folder, logs, checkpoints, signals
    check_args, main              what is refused; the start
"""

import contextlib
import copy
import csv
import difflib
import enum
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
import textwrap
import time
import types
import warnings
import zipfile
from fractions import Fraction
from typing import Annotated, Literal

# Threads that wait for each other by spinning are 12 to 80 times slower as soon as another process competes for a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # in what it says of wrong arguments

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

UnitInterval = Annotated[float, Field(ge=0, le=1)]


@dataclass(config={"allow_inf_nan": False})
class Args:
    # ------------------------------------------------------------ the run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of the experiment, a part of the run folder's name"""
    seed: NonNegativeInt = 1
    """seed of every random generator of the run"""
    runs_dir: str = "runs"
    """the folder in which the run's own folder is made"""
    checkpoint_interval: NonNegativeInt = 25_000
    """environment steps between two checkpoints; 0 = only at the end and when the run is stopped by SIGTERM or SIGINT (Ctrl-C)"""
    keep_models: Annotated[int, Field(ge=0, le=10_000)] = 0
    """how many times during the run the weights are kept, as models/step_00050000.pt"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "rde"
    """the project's name in Weights & Biases"""
    wandb_entity: str | None = None
    """the entity (team) of the project in Weights & Biases"""

    # ------------------------------------------------------------ the machine
    cuda: bool = True
    """train on the GPU if there is one"""
    torch_deterministic: bool = True
    """CUDA: let cuDNN choose deterministic kernels only"""
    cuda_graphs: bool = True
    """CUDA: capture acting and learning as CUDA graphs"""
    bf16: bool = False
    """compute the networks in bfloat16 (parameters and targets stay float32)"""

    # ------------------------------------------------------------ the environment
    env_id: str = "hopper-hop"
    """the task of the DeepMind Control Suite, as domain-task; or one of Gymnasium's with continuous actions, as HalfCheetah-v5,
    or module:MyTask-v0, registered by a module of yours"""
    max_episode_steps: NonNegativeInt = 0
    """Gymnasium's tasks: steps after which an episode is cut off; 0 = the task's own limit"""
    total_timesteps: PositiveInt = 1_000_000
    """environment steps (actions, none is repeated) of the whole run"""
    num_envs: PositiveInt = 1
    """environments that are advanced together, once in a loop step"""

    # ------------------------------------------------------------ learning
    replay_ratio: PositiveFloat = 1.0
    """gradient steps per environment step; fractions are allowed (sensible: 0.25 to 8)"""
    learning_starts: PositiveInt = 5_000
    """environment steps, with uniformly random actions, before the first gradient step"""
    buffer_size: PositiveInt = 1_000_000
    """transitions in the replay buffer"""
    batch_size: PositiveInt = 1_024
    """transitions in a mini-batch (sensible: 256 to 1,024)"""
    learning_rate: PositiveFloat = 3e-4
    """learning rate of the three Adams: actors, critics, entropy coefficients (sensible: 1e-4 to 1e-3)"""
    gamma: UnitInterval = 0.99
    """discount factor"""
    tau: UnitInterval = 0.005
    """how far the target critics move towards the critics after a gradient step (sensible: 0.001 to 0.02)"""
    hidden_dim: PositiveInt = 1_024
    """width of the hidden layers of actors and critics"""
    num_hidden_layers: PositiveInt = 2
    """hidden layers of actors and critics"""
    critic_norm: Literal["none", "layer"] = "none"
    """LayerNorm after every hidden layer of the critics, before the ReLU (layer: the base of BRO and SimBa), or none"""

    # ------------------------------------------------------------ evaluation
    eval_interval: NonNegativeInt = 10_000
    """environment steps between two evaluations; 0 = only at the end (and around resets, if there are any)"""
    eval_episodes: PositiveInt = 10
    """whole episodes in an evaluation"""
    capture_video: bool = False
    """record the first episode of every evaluation as a video in the run folder"""

    # ------------------------------------------------------------ resets
    reset_interval: NonNegativeInt = 400_000
    """gradient steps of one agent between two of its own resets; 0 = never"""

    # ------------------------------------------------------------ the ensemble
    num_agents: PositiveInt = 2
    """agents in the ensemble (sensible: 2 to 4; 1 = SR+SAC)"""
    selection: Literal["value", "advantage"] = "value"
    """what the judged Q-values of the proposals are divided by: the largest of them (value, the paper's rule), or what is at
    stake in the state, the best action's lead over a random one (advantage)"""
    beta: Annotated[float | None, Field(ge=0)] = None
    """how strongly the choice prefers a high Q-value: 0 = uniform, 1e9 = the highest; not given: 50 by value, 5 by advantage"""


# ------------------------------------------------------------------------------------------------- network, selection


class StackedMLP(nn.Module):
    """Several MLPs of one shape with ReLU, computed together: (num_networks, batch, inputs) to (num_networks, batch, outputs).

    A matrix product for all networks at once fills a GPU that one network leaves half idle, and for small networks it saves
    most of the time on a CPU, too. The weights are stacked, (num_networks, inputs, outputs) in every layer. With `layer_norm`
    there is a LayerNorm after every hidden layer, before the ReLU, with a gain and a shift of every network's own.
    """

    def __init__(self, num_networks: int, widths: list[int], layer_norm: bool = False):
        super().__init__()
        self.arguments = (widths, layer_norm)
        layers = list(zip(widths, widths[1:]))
        self.weights = nn.ParameterList(torch.zeros(num_networks, fan_in, fan_out) for fan_in, fan_out in layers)
        self.biases = nn.ParameterList(torch.zeros(num_networks, 1, fan_out) for _, fan_out in layers)
        normed = widths[1:-1] if layer_norm else []
        self.gains = nn.ParameterList(torch.ones(num_networks, 1, width) for width in normed)
        self.shifts = nn.ParameterList(torch.zeros(num_networks, 1, width) for width in normed)
        # On a CPU ParameterLists cost 4 % of the training loop.
        self.layers, self.norms = list(zip(self.weights, self.biases)), list(zip(self.gains, self.shifts))

    @torch.no_grad()
    def initialise(self, network: int) -> None:
        """Gives one of the networks, in place, all values of a freshly built one; in the layers they are those of `nn.Linear`."""
        fresh = StackedMLP(1, *self.arguments)
        for weight, bias in fresh.layers:
            layer = nn.Linear(weight.shape[1], weight.shape[2])
            weight[0], bias[0, 0] = layer.weight.T, layer.bias
        for parameter, value in zip(self.parameters(), fresh.parameters()):
            parameter[network] = value[0]

    def forward(self, inputs: torch.Tensor, networks: torch.Tensor | None = None) -> torch.Tensor:
        """All networks, or those whose numbers are given on the device."""
        for depth, (weight, bias) in enumerate(self.layers):
            if networks is not None:
                weight, bias = weight.index_select(0, networks), bias.index_select(0, networks)
            if depth:
                if self.norms:
                    gain, shift = self.norms[depth - 1]
                    if networks is not None:
                        gain, shift = gain.index_select(0, networks), shift.index_select(0, networks)
                    inputs = torch.addcmul(shift, F.layer_norm(inputs, inputs.shape[2:]), gain)
                inputs = F.relu_(inputs)
            if weight.shape[2] > 1:
                inputs = torch.baddbmm(bias, inputs, weight)
            else:  # the same, but on a CPU several times faster where the matrix is a single column
                inputs = (inputs * weight.transpose(1, 2)).sum(dim=2, keepdim=True) + bias
        return inputs


def squashed_gaussian(mean: torch.Tensor, log_std: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample tanh(mean + std * noise), (..., action_dim), and its log-probability, (...), for standard normal noise.

    log(1 - tanh(u)^2) is written as 2 * (log 2 - u - softplus(-2 * u)): the same number, but finite and exact where tanh(u)
    rounds to 1. The Gaussian's part takes the noise itself, because (u - mean) / std has lost it where std is tiny. What is
    the same for all samples, log(sqrt(2 * pi)) and 2 * log 2 of every dimension, is subtracted at the end.
    """
    unsquashed = torch.addcmul(mean, log_std.exp(), noise)
    log_probs = torch.add(-0.5 * noise.square() - log_std, unsquashed + F.softplus(-2 * unsquashed), alpha=2)
    return unsquashed.tanh(), log_probs.sum(dim=-1) - mean.shape[-1] * math.log(4 * math.sqrt(2 * math.pi))


DEFAULT_BETA = {"value": 50.0, "advantage": 5.0}  # of --selection
NUM_RANDOM_ACTIONS = 16  # by which --selection advantage estimates what a random action is worth


def selection_probabilities(q_values: torch.Tensor, scale: torch.Tensor, beta: torch.Tensor | float) -> torch.Tensor:
    """p_i = softmax_i(beta * q_i / scale), uniform where the scale is 0: (batch, N) and (batch, 1) to (batch, N)."""
    return torch.softmax(beta * torch.where(scale > 0, q_values / scale, 0.0), dim=1)


def value_scale(q_values: torch.Tensor) -> torch.Tensor:
    """The scale of `--selection value`, the largest |q| of the proposals: (batch, N) to (batch, 1).

    The absolute value keeps the order of negative values, too (the official code clips there, and chooses uniformly).
    """
    return q_values.abs().amax(dim=1, keepdim=True)


def advantage_scale(q_values: torch.Tensor, random_q_values: torch.Tensor) -> torch.Tensor:
    """The scale of `--selection advantage`: what is at stake, max q - mean q of random actions: (batch, ...) to (batch, 1).

    A proposal as bad as a random action is exp(beta) times less likely than the best, wherever the zero of the values lies
    and whatever their unit. The best may be one of the random actions, so that the stake is never negative. The scale is not
    less than a millionth of the largest |q|: below that float32 has only noise.
    """
    best = torch.cat([q_values, random_q_values], dim=1).amax(dim=1, keepdim=True)
    stake = best - random_q_values.mean(dim=1, keepdim=True)
    return torch.maximum(stake, 1e-6 * value_scale(q_values))


# -------------------------------------------------------------------------------------------------------------- agent


class Agent:
    """The reset deep ensemble: N SAC agents that learn from the same mini-batches, are reset in turn, and act as one.

    Actor i is agent i's; its two critics, and their targets, are 2 * i and 2 * i + 1.
    """

    KEPT = ("actors", "critics", "target_critics", "log_alphas", "actor_optimizer", "critic_optimizer", "alpha_optimizer",
            "resets", "metrics", "acting_counts", "choices")  # fmt: skip
    METRICS = ("critic_loss", "q_values", "actor_loss", "alpha")

    def __init__(
        self, args: Args, observation_space: gym.Space, action_space: gym.Space, buffer: "ReplayBuffer", device: torch.device
    ):
        observation_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        self.args, self.action_dim, self.buffer, self.device = args, action_dim, buffer, device
        self.target_entropy = -float(action_dim)
        hidden = [args.hidden_dim] * args.num_hidden_layers
        self.actors = StackedMLP(args.num_agents, [observation_dim, *hidden, 2 * action_dim]).to(device)
        self.critics = StackedMLP(
            2 * args.num_agents, [observation_dim + action_dim, *hidden, 1], args.critic_norm == "layer"
        ).to(device)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alphas = torch.zeros(args.num_agents, device=device)
        # PyTorch's global generator initialises networks and serves no other purpose.
        torch.manual_seed(derive_seed(args.seed, INITIALISATION))
        for index in range(args.num_agents):
            self.initialise(index)
        self.actor_parameters, self.critic_parameters = list(self.actors.parameters()), list(self.critics.parameters())
        self.target_parameters = list(self.target_critics.parameters())
        self.actor_optimizer = self.make_optimizer(self.actor_parameters)
        self.critic_optimizer = self.make_optimizer(self.critic_parameters)
        self.alpha_optimizer = self.make_optimizer([self.log_alphas])
        self.oldest = torch.zeros(1, dtype=torch.int64, device=device)  # the judge, and the next to be reset
        self.chosen_beta = DEFAULT_BETA[args.selection] if args.beta is None else args.beta
        self.beta = torch.zeros((), device=device)  # see `resets`
        self.resets = []
        self.metrics = torch.zeros((len(self.METRICS), args.num_agents), device=device)  # of the last mini-batch
        self.acting_counts = np.zeros(args.num_agents, np.int64)  # whose proposals were taken since the last log
        self.choices = torch.zeros(2, device=device)  # since the last log: how many, and the sum of their entropies

    def summary(self) -> str:
        """For the line in which a run says what it will do."""
        parameters = [*self.actor_parameters, *self.critic_parameters, self.log_alphas]
        num_parameters = sum(parameter.numel() for parameter in parameters) // self.args.num_agents
        agents = f"{self.args.num_agents} agent(s) x {num_parameters:,} parameters"
        choice = f", selection by {self.args.selection} (beta {self.chosen_beta:g})" if self.args.num_agents > 1 else ""
        return agents + choice

    @property
    def resets(self) -> list[int]:
        """The agents that were reset, one after another, whatever the rule is: from it follows who is the oldest."""
        return self._resets

    @resets.setter
    def resets(self, resets: list[int]) -> None:
        self._resets = resets
        last_resets = {index: number for number, index in enumerate(resets)}
        self.oldest.fill_(min(range(self.args.num_agents), key=lambda index: last_resets.get(index, -1)))
        # By the paper's rule the choice is uniform before the first reset; by the other one agent 0 judges from the start.
        judges = len(resets) > 0 or self.args.selection == "advantage"
        self.beta.fill_(self.chosen_beta if judges else 0.0)

    @torch.no_grad()
    def initialise(self, index: int) -> None:
        """A new agent in the place of agent `index`, in place (captured CUDA graphs hold the addresses)."""
        self.actors.initialise(index)
        for critic in (2 * index, 2 * index + 1):
            self.critics.initialise(critic)
            for target, parameter in zip(self.target_critics.parameters(), self.critics.parameters()):
                target[critic] = parameter[critic]
        self.log_alphas[index] = 0.0

    def make_optimizer(self, parameters: list[torch.Tensor]) -> optim.Adam:
        """Adam with a parameter group per agent, which holds the agent's slices of the stacked parameters.

        Over the stacked parameters themselves Adam would have one step count for all agents, and after a reset the bias
        correction of the new agent would be that of an old one. The slices share the memory of the parameters.
        """
        groups = [{"params": slices} for slices in self.slices_per_agent([parameter.detach() for parameter in parameters])]
        return optim.Adam(groups, lr=self.args.learning_rate, fused=True, capturable=self.device.type == "cuda")

    def slices_per_agent(self, stacked: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """For every agent its slices of the stacked tensors, as views."""
        return list(zip(*(tensor.chunk(self.args.num_agents) for tensor in stacked)))

    def step(self, optimizer: optim.Adam, gradients: list[torch.Tensor]) -> None:
        """One step of Adam with the gradients of the stacked parameters."""
        for group, slices in zip(optimizer.param_groups, self.slices_per_agent(gradients)):
            for parameter, gradient in zip(group["params"], slices):
                parameter.grad = gradient
        optimizer.step()

    def policies(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log standard deviations before the squashing, each (N, batch, action_dim), for (batch, observation_dim)."""
        with self.autocast():
            outputs = self.actors(observations.expand(self.args.num_agents, -1, -1))
        mean, log_std = outputs.float().chunk(2, dim=2)
        return mean, log_std.clamp(-20, 2)

    def q_values(self, critics: StackedMLP, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Both critics of every agent, (N, 2, batch), for (batch, observation_dim) and the agents' (N, batch, action_dim)."""
        num_agents, batch_size, _ = actions.shape
        inputs = torch.cat([observations.expand(num_agents, -1, -1), actions], dim=2)
        with self.autocast():
            outputs = critics(inputs.unsqueeze(1).expand(-1, 2, -1, -1).flatten(0, 1))  # (2 * N, batch, 1)
        return outputs.float().view(num_agents, 2, batch_size)

    @torch.no_grad()
    def act(
        self,
        observations: torch.Tensor,
        generator: torch.Generator,
        random_actions_generator: torch.Generator,
        deterministic: bool = False,
        counted: bool = False,
    ) -> torch.Tensor:
        """The ensemble's actions and, in the last column, the agents that proposed them, (num_envs, action_dim + 1).

        For observations (num_envs, observation_dim). The agents propose samples of their policies, or their modes. With
        `counted` it is noted for the log how undecided the choice was.
        """
        num_envs, num_agents = len(observations), self.args.num_agents
        mean, log_std = self.policies(observations)
        noise = torch.zeros_like(mean) if deterministic else torch.empty_like(mean).normal_(generator=generator)
        proposals = squashed_gaussian(mean, log_std, noise)[0].transpose(0, 1)  # (num_envs, N, action_dim)
        if num_agents == 1:  # nothing to choose, and so nothing to judge
            return torch.cat([proposals[:, 0], torch.zeros_like(proposals[:, 0, :1])], dim=1)
        judgement = self.judge(observations, proposals)  # (num_envs, N)
        scale = value_scale(judgement)
        if self.args.selection == "advantage":
            random_actions = self.random_actions(num_envs, random_actions_generator)
            scale = advantage_scale(judgement, self.judge(observations, random_actions))
        probabilities = selection_probabilities(judgement, scale, self.beta)
        # An exponential race: the first of N clocks with rates p_i is clock i with probability p_i.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        acting_agents = clocks.argmin(dim=1)  # (num_envs,)
        if counted:
            entropy = torch.special.entr(probabilities).sum()
            self.choices.add_(torch.stack([torch.full_like(entropy, len(probabilities)), entropy]))
        actions = proposals[torch.arange(num_envs, device=self.device), acting_agents]  # (num_envs, action_dim)
        return torch.cat([actions, acting_agents.unsqueeze(1)], dim=1)

    def judge(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """What the oldest agent thinks of K actions in every state, the smaller of its critics: (batch, observation_dim) and
        (batch, K, action_dim) to (batch, K)."""
        inputs = torch.cat([observations.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], dim=2).flatten(0, 1)
        with self.autocast():
            judging_critics = 2 * self.oldest + torch.arange(2, device=self.device)
            judgements = self.critics(inputs.expand(2, -1, -1), judging_critics)  # (2, batch * K, 1)
        return judgements.float().amin(dim=0).view(actions.shape[:2])

    def random_actions(self, num_envs: int, generator: torch.Generator) -> torch.Tensor:
        """Uniformly drawn, (num_envs, NUM_RANDOM_ACTIONS, action_dim)."""
        actions = torch.empty((num_envs, NUM_RANDOM_ACTIONS, self.action_dim), device=self.device)
        return actions.uniform_(-1, 1, generator=generator)

    def update(self) -> None:
        """One gradient step of every agent on one mini-batch, in stable-baselines3's order: alpha, critics, actor, targets."""
        args, generator = self.args, self.buffer.generator
        observations, actions, rewards, terminated, next_observations = self.buffer.sample(args.batch_size)
        alphas = self.log_alphas.exp().unsqueeze(1)  # (N, 1), of before this step

        # The agents' losses are summed: none depends on another agent's parameters, so the gradients stay their own.
        mean, log_std = self.policies(observations)
        policy_actions, log_probs = squashed_gaussian(mean, log_std, torch.empty_like(mean).normal_(generator=generator))
        # The loss of alpha, -log(alpha) * (log_prob + target entropy), is linear in log(alpha): its gradient is the factor.
        self.step(self.alpha_optimizer, [-(log_probs.detach().mean(dim=1) + self.target_entropy)])

        with torch.no_grad():
            mean, log_std = self.policies(next_observations)
            next_actions, next_log_probs = squashed_gaussian(mean, log_std, torch.empty_like(mean).normal_(generator=generator))
            next_q_values = self.q_values(self.target_critics, next_observations, next_actions).amin(dim=1)  # (N, batch_size)
            td_targets = rewards + args.gamma * (1 - terminated) * (next_q_values - alphas * next_log_probs)  # (N, batch_size)
        q_values = self.q_values(self.critics, observations, actions.expand(args.num_agents, -1, -1))  # (N, 2, batch_size)
        critic_losses = 0.5 * (q_values - td_targets.unsqueeze(1)).square().mean(dim=2).sum(dim=1)  # (N,)
        self.step(self.critic_optimizer, torch.autograd.grad(critic_losses.sum(), self.critic_parameters))

        policy_q_values = self.q_values(self.critics, observations, policy_actions).amin(dim=1)  # (N, batch_size)
        actor_losses = (alphas * log_probs - policy_q_values).mean(dim=1)  # (N,)
        self.step(self.actor_optimizer, torch.autograd.grad(actor_losses.sum(), self.actor_parameters))

        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, args.tau)
        mean_q_values = q_values.detach().mean(dim=(1, 2))
        self.metrics.copy_(torch.stack([critic_losses.detach(), mean_q_values, actor_losses.detach(), alphas.squeeze(1)]))

    def reset(self) -> int:
        """Resets the oldest agent, in place (captured CUDA graphs hold the addresses), and returns its number."""
        index = self.oldest.item()
        self.initialise(index)
        for optimizer in (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer):
            for parameter in optimizer.param_groups[index]["params"]:
                for moment_or_step in optimizer.state[parameter].values():
                    moment_or_step.zero_()
        self.resets = [*self.resets, index]
        return index

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def evaluation_policy(self, generator: torch.Generator):
        """What evaluations play: (batch, observation_dim) to (batch, action_dim), the modes of the policies."""
        return lambda observations: self.act(observations, generator, generator, deterministic=True)[:, :-1]

    def scalars(self) -> dict[str, float]:
        """For TensorBoard: who judges; since the last call, whose proposals were taken and how undecided the choice was."""
        fractions = self.acting_counts / max(1, self.acting_counts.sum())
        num_choices, entropy = self.choices.tolist()
        self.acting_counts[:] = 0
        self.choices.zero_()
        scalars = {"rde/oldest_agent": self.oldest.item()}
        scalars |= {f"rde/acting_fraction_{i}": fraction for i, fraction in enumerate(fractions)}
        if self.resets:
            scalars["rde/youngest_fraction"] = fractions[self.resets[-1]]
        return scalars | {"rde/choice_entropy": entropy / max(1, num_choices)}

    def weights(self) -> dict:
        """What model.pt holds, on the CPU: so it can be loaded without a GPU, too."""
        return {
            "actors": copy.deepcopy(self.actors).cpu().state_dict(),
            "critics": copy.deepcopy(self.critics).cpu().state_dict(),
            "log_alphas": self.log_alphas.cpu(),
            "oldest_agent": self.oldest.item(),
            "num_resets": len(self.resets),
        }

    def load_weights(self, weights: dict) -> None:
        self.actors.load_state_dict(weights["actors"])
        self.critics.load_state_dict(weights["critics"])
        self.log_alphas.copy_(weights["log_alphas"])
        self.resets = [number % self.args.num_agents for number in range(weights["num_resets"])]
        self.oldest.fill_(weights["oldest_agent"])  # in a copy the order of resets may be another one


# ---------------------------------------------------------------------------------------------------------- schedules


def gradient_steps_due(args: Args, global_step: int) -> int:
    """Gradient steps that belong to the first `global_step` environment steps; exact for fractions such as 0.29."""
    return math.floor(Fraction(str(args.replay_ratio)) * max(0, global_step - args.learning_starts))


def resets_due(args: Args, gradient_steps: int) -> int:
    """Reset events that belong to so many gradient steps: one every T / N, so that each agent has T between its own."""
    return gradient_steps * args.num_agents // args.reset_interval if args.reset_interval else 0


def events_due(args: Args, global_step: int, gradient_steps: int, num_resets: int) -> list[str]:
    """The evaluations (by their phase) and the reset that follow the loop step that ends at `global_step`."""
    if global_step >= args.total_timesteps:
        return ["final"]  # and no reset: nothing would learn from it
    if resets_due(args, gradient_steps) > num_resets:
        return ["before_reset", "reset", "after_reset"]
    return ["scheduled"] if interval_has_passed(args.eval_interval, global_step, args.num_envs) else []


def check_schedules(args: Args) -> None:
    """Refuses schedules that cannot work."""
    if gradient_steps_due(args, args.total_timesteps) == 0:
        fail(f"--replay-ratio {args.replay_ratio} leaves --total-timesteps {args.total_timesteps} without a gradient step")
    shortest = math.ceil(Fraction(str(args.replay_ratio)) * args.num_envs * args.num_agents)
    if 0 < args.reset_interval < shortest:
        fail(f"--reset-interval {args.reset_interval} asks for more than one reset in a loop step; "
             f"use at least {shortest}, or 0 for never")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- training loop


def train(args: Args) -> None:
    """A whole run, or the rest of one that was interrupted."""
    run = Run(args)
    envs = [make_env(args) for _ in range(args.num_envs)]
    spaces = envs[0].observation_space, envs[0].action_space
    exploration = np.random.default_rng(derive_seed(args.seed, EXPLORATION))
    mini_batches = torch.Generator(run.device).manual_seed(derive_seed(args.seed, MINI_BATCHES))
    selection = torch.Generator(run.device).manual_seed(derive_seed(args.seed, SELECTION))
    random_actions = torch.Generator(run.device).manual_seed(derive_seed(args.seed, RANDOM_ACTIONS))
    buffer = ReplayBuffer(args.buffer_size, *spaces, mini_batches)
    agent = Agent(args, *spaces, buffer, run.device)

    observations = np.zeros((args.num_envs, *spaces[0].shape), np.float32)
    device_observations = torch.from_numpy(observations).to(run.device, copy=True)
    act = CudaGraph(
        lambda: agent.act(device_observations, selection, random_actions, counted=True),
        [selection, random_actions],
        run.captures,
    )
    update = CudaGraph(agent.update, [mini_batches], run.captures)

    parts = {"agent": agent, "buffer": buffer, "envs": envs, "observations": observations, "exploration": exploration,
             "mini_batches": mini_batches, "selection": selection, "random_actions": random_actions}  # fmt: skip
    if not run.restore(parts):
        for i, env in enumerate(envs):
            observations[i], _ = env.reset(seed=derive_seed(args.seed, ENVIRONMENT, i))
    run.announce(agent.summary(), resets_due(args, gradient_steps_due(args, run.last_loop_step)))

    while run.goes_on():
        # Between two steps: an evaluation, a reset of the oldest agent.
        if run.agenda:
            if run.agenda[0] == "reset":
                reset_agent = agent.reset()
                run.log_scalars({"rde/reset_agent": reset_agent})
                run.say(f"reset of agent {reset_agent} after {run.gradient_steps} gradient steps")
                run.agenda.pop(0)
            else:
                run.evaluate(agent)
            continue

        # Act: uniformly random until learning starts, then the ensemble's sample.
        warm_up = run.global_step < args.learning_starts
        if warm_up:
            actions = exploration.uniform(-1, 1, (args.num_envs, agent.action_dim)).astype(np.float32)
        else:
            upload(observations, device_observations)
            choice = Download(act())

        # Learn. Launched before the environment runs, so that the GPU trains while the CPU plays.
        while not warm_up and run.gradient_steps < gradient_steps_due(args, run.global_step + args.num_envs):
            update()
            run.gradient_steps += 1

        # Step the environments and store what happened.
        if not warm_up:
            actions, acting_agents = np.split(choice.numpy(), [agent.action_dim], axis=1)
            if not np.isfinite(actions).all():  # the physics would stop with an error of its own
                raise FloatingPointError(f"an action is not finite at step {run.global_step}; try a lower --learning-rate")
            agent.acting_counts += np.bincount(acting_agents[:, 0].astype(np.int64), minlength=args.num_agents)
        run.global_step += args.num_envs
        for i, env in enumerate(envs):
            next_observation, reward, terminated, truncated, info = env.step(actions[i])
            buffer.add(observations[i], actions[i], reward, terminated, next_observation)
            if terminated or truncated:
                next_observation, _ = env.reset()
                run.log_episode(info["episode"])
            observations[i] = next_observation

        # Log, and see what is due.
        run.count_step()
        if interval_has_passed(LOG_INTERVAL, run.global_step, args.num_envs):
            run.log(agent, agent.scalars())
        run.agenda = events_due(args, run.global_step, run.gradient_steps, len(agent.resets))
        run.keep_what_is_due(agent)

    run.finish(agent.weights())


# =========================================================================================================== the line
# Above it stands the algorithm. Below it stands what it is built on.


# ------------------------------------------------------------------------------------------------------- environments

ENVIRONMENT_VERSIONS = {}
for package in ("dm-control", "mujoco", "box2d"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not every task needs all of them
        ENVIRONMENT_VERSIONS[package] = importlib.metadata.version(package)


def is_gymnasium(env_id: str) -> bool:
    """Whether the name is one of Gymnasium's (Pendulum-v1, module:MyTask-v0), and not the suite's (hopper-hop)."""
    return ":" in env_id or re.search(r"-v\d+$", env_id) is not None


def episode_columns(args: Args) -> tuple[str, ...]:
    """What `info["episode"]` holds beside the return "r" and the length "l"."""
    return ()


def evaluation_scalars(agent: "Agent") -> dict[str, float]:
    """What is logged with every evaluation, beside its scores."""
    return {}


# What the tasks write into the model of the physics at the start of an episode: targets, terrain, tendons, colors.
MODEL_ARRAYS = ("body_pos", "body_quat", "dof_damping", "geom_pos", "geom_rgba", "geom_size", "hfield_data", "light_pos",
                "site_pos", "site_rgba", "site_size", "wrap_prm")  # fmt: skip


def import_suite(for_pictures: bool = False):
    """dm_control's suite, imported late, because MuJoCo reads MUJOCO_GL when it is imported.

    A cluster node has no display, but it can draw with EGL. Without pictures nothing must depend on OpenGL at all.
    """
    if for_pictures and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # GLFW's complaint that there is no display
        from dm_control import suite
    return suite


class DeepMindControl(gym.Env):
    """A task of the DeepMind Control Suite.

    Observations are flattened to float32, actions lie in [-1, 1] whatever the task's own bounds are. An episode ends after
    1,000 steps; the suite ends it with discount 1 then, so it is a truncation, which bootstraps. It is terminated only where
    the discount is 0. At the end of an episode `info["episode"]` holds the return "r" and the length "l".
    """

    KEPT = ("world", "random_state", "episodic_return", "episodic_length")

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.env = import_suite().load(*env_id.split("-"))
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self.env.control_timestep())}
        observation_dim = sum(math.prod(spec.shape) for spec in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.action_spec = self.env.action_spec()
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.action_spec.shape, np.float32)
        self.episodic_return, self.episodic_length = 0.0, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
        self.episodic_return, self.episodic_length = 0.0, 0
        return self.flatten(self.env.reset().observation), {}

    def step(self, action: np.ndarray):
        low, high = self.action_spec.minimum, self.action_spec.maximum
        timestep = self.env.step(low + (action.astype(np.float64) + 1) / 2 * (high - low))
        reward = float(timestep.reward or 0)  # None after a reset, an int in some tasks
        terminated = bool(timestep.last() and timestep.discount == 0)
        truncated = timestep.last() and not terminated
        self.episodic_return += reward
        self.episodic_length += 1
        info = {"episode": {"r": self.episodic_return, "l": self.episodic_length}} if timestep.last() else {}
        return self.flatten(timestep.observation), reward, terminated, truncated, info

    def flatten(self, observation: dict) -> np.ndarray:
        """The parts one after another, (observation_dim,) float32. Some parts are numbers without a dimension."""
        return np.concatenate([np.ravel(part) for part in observation.values()], dtype=np.float32)

    def render(self) -> np.ndarray:
        return self.env.physics.render(height=192, width=256, camera_id=0)

    def close(self) -> None:
        self.env.close()

    @property
    def random_state(self) -> np.random.RandomState:
        return self.env.task.random

    @property
    def world(self) -> dict:
        """The exact state of the physics and the task in the middle of an episode, in plain values and arrays."""
        import mujoco  # late, as in `import_suite`

        control, physics, task = self.env, self.env.physics, self.env.task
        return {
            # With the time, the controls and the solver's warm start, which `physics.get_state()` alone lacks.
            "physics": physics.get_state(int(mujoco.mjtState.mjSTATE_INTEGRATION)),
            "model": {name: np.array(getattr(physics.model, name)) for name in MODEL_ARRAYS},
            "task": {name: value for name, value in vars(task).items() if isinstance(value, (int, float, np.generic))},
            "step_count": control._step_count,
            "reset_next_step": control._reset_next_step,
        }  # fmt: skip

    @world.setter
    def world(self, state: dict) -> None:
        import mujoco  # late, as in `import_suite`

        self.env.reset()
        control, physics, task = self.env, self.env.physics, self.env.task
        for name, array in state["model"].items():
            getattr(physics.model, name)[:] = array
        physics.set_state(state["physics"], int(mujoco.mjtState.mjSTATE_INTEGRATION))
        warm_start = physics.data.qacc_warmstart.copy()
        physics.forward()  # all that follows from the state; it starts the solver anew
        physics.data.qacc_warmstart[:] = warm_start
        for name, value in state["task"].items():
            setattr(task, name, value)
        control._step_count, control._reset_next_step = state["step_count"], state["reset_next_step"]


class FreshWorld(gym.Wrapper):
    """BipedalWalker, with a new world in every episode, as LunarLander has it: an old one remembers earlier contacts."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        walker = self.unwrapped
        walker._destroy()  # the bodies in the old world
        walker.world = type(walker.world)()
        return self.env.reset(seed=seed, options=options)


class GymnasiumTask(gym.Wrapper):
    """A task of Gymnasium's: vectors of float32 as observations, actions in [-1, 1] whatever the task's own bounds are.

    At the end of an episode `info["episode"]` holds the return "r" and the length "l". A time limit truncates, and so bootstraps.

    Every episode begins from a seed of its own. So a checkpoint keeps nothing of the world (Box2D's cannot be saved), but that
    seed and the actions since; played again, they bring the environment exactly to where it was, whatever it is made of.
    """

    KEPT = ("seeds", "episode")

    def __init__(self, env: gym.Env):
        super().__init__(env)
        observation_dim = gym.spaces.flatdim(env.observation_space)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.low, self.high = (bound.astype(np.float64) for bound in (env.action_space.low, env.action_space.high))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.low.size,), np.float32)
        self.seeds = np.random.default_rng(0)  # of the episodes after the first

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if seed is not None:
            self.seeds = np.random.default_rng(seed)
        self.begin(int(self.seeds.integers(2**31)) if seed is None else seed)
        return self.observation, {}

    def begin(self, seed: int) -> None:
        """A new episode."""
        self.episode_seed, self.actions, self.episodic_return = seed, [], 0.0
        observation, _ = self.env.reset(seed=seed)
        self.observation = self.encode(observation)

    def step(self, action: np.ndarray):
        self.actions.append(np.array(action, np.float32))
        action = self.low + (action.reshape(self.low.shape).astype(np.float64) + 1) / 2 * (self.high - self.low)
        observation, reward, terminated, truncated, _ = self.env.step(action.astype(self.env.action_space.dtype))
        self.observation, reward = self.encode(observation), np.asarray(reward).item()  # some are arrays of one number
        self.episodic_return += reward
        ended = {"episode": {"r": self.episodic_return, "l": len(self.actions)}}
        return self.observation, reward, terminated, truncated, ended if terminated or truncated else {}

    def encode(self, observation) -> np.ndarray:
        return gym.spaces.flatten(self.env.observation_space, observation).astype(np.float32)  # (observation_dim,)

    @property
    def episode(self) -> dict:
        """What leads to the present moment of the episode."""
        actions = np.array(self.actions, np.float32).reshape(-1, *self.action_space.shape)
        return {"seed": self.episode_seed, "actions": actions, "observation": self.observation}

    @episode.setter
    def episode(self, episode: dict) -> None:
        self.begin(episode["seed"])
        for action in episode["actions"]:
            self.step(action)
        if not np.array_equal(self.observation, episode["observation"], equal_nan=True):
            raise ValueError(f"{self.spec.id} does not play the same episode again from its seed")


def make_env(args: Args, render: bool = False) -> gym.Env:
    """The task, with actions in [-1, 1]."""
    if not is_gymnasium(args.env_id):
        return DeepMindControl(args.env_id, render_mode="rgb_array" if render else None)
    return GymnasiumTask(make_bare_env(args, render))


def make_bare_env(args: Args, render: bool = False) -> gym.Env:
    """Gymnasium's environment as it is registered, with the limit of --max-episode-steps."""
    options = {"max_episode_steps": args.max_episode_steps} if args.max_episode_steps else {}
    if render:  # else not a word of it: not every environment's constructor takes it
        options["render_mode"] = "rgb_array"
        if sys.platform == "linux":
            os.environ.setdefault("MUJOCO_GL", "egl")  # a cluster node has no display
    env = gym.make(args.env_id, disable_env_checker=True, **options)
    return FreshWorld(env) if args.env_id.startswith("BipedalWalker") else env


def check_environment(args: Args) -> None:
    """Refuses what is no task, or cannot be drawn where that is asked for."""
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for one step of {args.num_envs} environments")
    if is_gymnasium(args.env_id):
        check_gymnasium(args)
    else:
        check_suite(args)


def check_gymnasium(args: Args) -> None:
    given = f"--env-id {args.env_id}"
    drawn = " with pictures (render_mode rgb_array)" if args.capture_video else ""
    try:
        space = make_bare_env(args, args.capture_video).action_space
        if not (isinstance(space, gym.spaces.Box) and space.is_bounded() and np.issubdtype(space.dtype, np.floating)):
            fail(f"{given} has actions in {space}, and this script takes continuous ones within bounds (Box); for discrete "
                 "ones there is rde_dqn.py")  # fmt: skip
        env = make_env(args, args.capture_video)
        for observation in (env.reset(seed=0)[0], env.step(np.zeros(env.action_space.shape, np.float32))[0]):
            if observation.shape != env.observation_space.shape:
                raise ValueError(f"it shows {observation.shape}, but its observations are {env.observation_space.shape}")
        frame = np.asarray(env.render() if args.capture_video else None)
    except Exception as error:  # not registered, a package or a file is missing, ...: every environment has its own
        fail(f"{given} does not work here{drawn}: {one_line(error)}")
    if args.capture_video and not (frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8):
        fail(f"--capture-video: {given} draws no pictures in colour, (height, width, 3) uint8, but {frame.dtype} {frame.shape}")
    if env.spec.max_episode_steps is None and not args.max_episode_steps:
        print(f"warning: {given} has no limit of its own: if an episode never ends, an evaluation does not either; "
              "--max-episode-steps sets one", file=sys.stderr)  # fmt: skip
    env.close()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or repr(error)


def check_suite(args: Args) -> None:
    if args.max_episode_steps:
        fail("--max-episode-steps is for Gymnasium's tasks; an episode of the DeepMind Control Suite has 1,000 steps")
    if importlib.util.find_spec("dm_control") is None:
        fail(f"--env-id {args.env_id} needs the package dm_control (pip install dm_control), which takes Python 3.12 at most; "
             "Gymnasium's tasks do without it, as HalfCheetah-v5")  # fmt: skip
    draws = args.capture_video or args.env_id == "quadruped-escape"  # which shows its terrain to OpenGL

    def fail_to_draw(error: Exception) -> None:
        remedy = "install EGL (Debian: libegl1, libgl1-mesa-dri) and set MUJOCO_GL=egl" if draws else "unset it"
        asked = ("--capture-video" if args.capture_video else f"--env-id {args.env_id}") if draws else "dm_control"
        fail(f"{asked} finds no way to draw with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}); {remedy}")

    try:
        tasks = ["-".join(names) for names in import_suite(draws).ALL_TASKS]
    except Exception as error:  # MuJoCo's three ways to draw have an error of their own each
        fail_to_draw(error)
    if args.env_id not in tasks:
        stem = args.env_id.removeprefix("dm_control/").removesuffix("-v0")
        near = difflib.get_close_matches(stem, tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "an example is hopper-hop"
        fail(f"--env-id {args.env_id} is not a task of the DeepMind Control Suite, as domain-task, and no environment of "
             f"Gymnasium, as HalfCheetah-v5; {hint}")  # fmt: skip
    if args.env_id.startswith("lqr-"):
        fail(f"--env-id {args.env_id} has actions without bounds and episodes without end; use one of the other domains")
    if draws:
        try:
            env = make_env(args)
            env.reset()
            env.render()
        except Exception as error:
            fail_to_draw(error)


def normalized_scores(env_id: str, score: float) -> dict[str, float]:
    """None: a perfect episode has 1,000 points in every task."""
    return {}


# ------------------------------------------------------------------------------------------------------ replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, to be drawn uniformly; each is one row of float32 on the generator's device.

    A row is observation, action, reward, terminated, next observation. The next observation is stored with every
    transition, so that a truncated one bootstraps from its own last observation and not from the next episode's first.
    """

    # num_added before used_rows, whose length it decides.
    KEPT = ("num_added", "size", "used_rows")

    def __init__(self, capacity: int, observation_space: gym.Space, action_space: gym.Space, generator: torch.Generator):
        self.capacity, self.device, self.generator = capacity, generator.device, generator
        self.widths = [observation_space.shape[0], math.prod(action_space.shape), 1, 1, observation_space.shape[0]]
        self.rows = torch.zeros((capacity, sum(self.widths)), dtype=torch.float32, device=self.device)
        self.num_added = 0
        self.size = torch.zeros((), dtype=torch.int64, device=self.device)  # on the device: a captured CUDA graph draws from it

    @property
    def used_rows(self) -> torch.Tensor:
        """The rows that have been written, without a copy."""
        return self.rows[: min(self.num_added, self.capacity)]

    def add(
        self, observation: np.ndarray, action: np.ndarray, reward: float, terminated: bool, next_observation: np.ndarray
    ) -> None:
        """Stores a transition, over the oldest one if there is no room left."""
        row = np.concatenate([observation, action, [reward, terminated], next_observation], dtype=np.float32)
        if not np.isfinite(row).all():
            raise FloatingPointError("the environment gave an observation or reward that is not finite")
        upload(row, self.rows[self.num_added % self.capacity])
        self.num_added += 1
        self.size.fill_(min(self.num_added, self.capacity))

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws transitions uniformly, with replacement, all float32.

        Returns observations (batch_size, observation_dim), actions (batch_size, action_dim), rewards (batch_size,),
        terminated (batch_size,) and next observations (batch_size, observation_dim).
        """
        draws = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=self.generator)
        rows = self.rows.index_select(0, (draws * self.size).long())  # (batch_size, sum of the widths)
        observations, actions, rewards, terminated, next_observations = rows.split(self.widths, dim=1)
        return observations, actions, rewards.squeeze(1), terminated.squeeze(1), next_observations


# ==================================================================================================== the second line
# Below it all scripts are equal to the byte.


# -------------------------------------------------------------------------------------------- seeds, devices, copying

# One random generator per purpose, so that a baseline and its RDE variant stay paired where they do the same thing.
ENVIRONMENT, EXPLORATION, MINI_BATCHES, INITIALISATION, SELECTION, EVALUATION, RANDOM_ACTIONS = range(7)


def derive_seed(seed: int, purpose: int, *indices: int) -> int:
    """An independent 32-bit seed for a purpose (and the environment, the step, ... within it; a last index 0 is as none)."""
    return int(np.random.SeedSequence([seed, purpose, *indices]).generate_state(1)[0])


def upload(array: np.ndarray, destination: torch.Tensor) -> None:
    """Copies the array into the tensor. On CUDA asynchronously, from pinned memory, which PyTorch keeps until it is done."""
    source = torch.from_numpy(array)
    destination.copy_(source.pin_memory() if destination.is_cuda else source, non_blocking=True)


class Download:
    """The copy of a tensor on its way to the host; `numpy` waits for it, and for nothing that was launched after it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.to("cpu", non_blocking=True)  # from CUDA into pinned memory, which PyTorch takes by itself
        self.event = torch.cuda.current_stream().record_event() if tensor.is_cuda else None

    def numpy(self) -> np.ndarray:
        if self.event is not None:
            self.event.synchronize()
        return self.tensor.numpy()


class CudaGraph:
    """A function without arguments that reads and writes fixed tensors, captured as a CUDA graph and replayed.

    The first calls run as they are, for PyTorch to set itself up, and count like all others; the capture itself computes
    nothing. A result is overwritten by the next call. Not `enabled`: a plain call, with the same numbers.
    """

    def __init__(self, function, generators: list[torch.Generator], enabled: bool):
        self.function, self.generators, self.enabled = function, generators, enabled
        self.graph, self.warm_up_calls = None, 3

    def __call__(self):
        if not self.enabled:
            return self.function()
        if self.warm_up_calls:
            self.warm_up_calls -= 1
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.function()
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.result = self.function()
        self.graph.replay()
        return self.result


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate(policy, envs: list[gym.Env], seed: int, global_step: int, device: torch.device, watch) -> list[dict]:
    """Plays one whole episode in each environment, side by side, and returns their `info["episode"]`.

    `policy` maps observations (batch, ...) to actions (batch, ...); `watch(env)` follows every reset and step. The results
    depend on the policy, the seed and the step alone: the environments are seeded anew (Atari games are loaded anew: some keep
    state from one game to the next), and the random numbers are their own. So an evaluation changes nothing in the training,
    and the two around a reset play from the same starts.
    """
    observations, episodes, playing = [], [{}] * len(envs), list(range(len(envs)))
    for i, env in enumerate(envs):
        observations.append(env.reset(seed=derive_seed(seed, EVALUATION, global_step, i))[0])
        watch(env)
    while playing:
        actions = policy(torch.from_numpy(np.stack([observations[i] for i in playing])).to(device)).cpu().numpy()
        for i, action in zip(tuple(playing), actions):
            observations[i], _, terminated, truncated, info = envs[i].step(action)
            watch(envs[i])
            if (terminated or truncated) and "episode" not in info:  # a life is lost, the game goes on
                observations[i], info = envs[i].reset()
            if "episode" in info:
                episodes[i] = info["episode"]
                playing.remove(i)
    return episodes


# ------------------------------------------------------------------------------------------------ what a checkpoint keeps

# Of objects that know it themselves: what is kept of them, and how they take it back, in place.
KINDS = {
    (nn.Module, optim.Optimizer): (lambda part: part.state_dict(), lambda part, state: part.load_state_dict(state)),
    torch.Generator: (lambda part: part.get_state(), lambda part, state: part.set_state(state)),
    # Through NumPy, because of a view torch.save would write the whole memory.
    torch.Tensor: (lambda part: torch.from_numpy(part.detach().cpu().numpy()), lambda part, state: part.copy_(state)),
    np.random.Generator: (lambda part: state_of(part.bit_generator), lambda part, state: restored(part.bit_generator, state)),
    np.random.BitGenerator: (lambda part: state_of(part.state), lambda part, state: setattr(part, "state", value_of(state))),
    np.random.RandomState: (lambda part: state_of(part.get_state()), lambda part, state: part.set_state(value_of(state))),
}
CONSTANT = (gym.Space, gym.envs.registration.EnvSpec, torch.device, types.FunctionType, types.MethodType, type)


def kept_names(part) -> list[str]:
    """The attributes of an object that a checkpoint keeps, in the order in which they are restored: those in its class's KEPT.

    Without KEPT (a wrapper of yours, say) they are all that can change; and none if the object is more than its attributes, as
    what is written in C: random.Random, a file.
    """
    if hasattr(part, "KEPT"):
        return list(part.KEPT)
    if not hasattr(part, "__dict__") or type(part).__basicsize__ > Run.__basicsize__ or isinstance(part, enum.Enum):
        return []
    return [name for name, value in vars(part).items() if not isinstance(value, CONSTANT)]


def state_of(part, where: str = "a part"):
    """What a checkpoint keeps of a part of a run, as `torch.load` reads it without executing anything."""
    for kind, (state, _) in KINDS.items():
        if isinstance(part, kind):
            return state(part)
    if names := kept_names(part):
        return {name: state_of(getattr(part, name), f"{type(part).__name__}.{name}") for name in names}
    if isinstance(part, list) and part and kept_names(part[0]):
        return [state_of(item, where) for item in part]
    return plain_state(part, where)


def plain_state(value, where: str):
    """A number, a text, an array, or a container of such; arrays become tensors."""
    if isinstance(value, np.generic) and value.dtype.kind in "biufSU":
        return value.item()
    if value is None or type(value) in (bool, int, float, str, bytes):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    if type(value) in (list, tuple, set):
        return type(value)(plain_state(item, where) for item in value)
    if type(value) is dict:
        return {plain_state(key, where): plain_state(item, f"{where}[{key!r}]") for key, item in value.items()}
    fail(f"{where} is of the class {type(value).__name__}, which a checkpoint cannot keep: let the class that has it name in "
         "KEPT what has to be kept, as the classes here do", code=1)  # fmt: skip


def value_of(state):
    """A plain value as it was."""
    if isinstance(state, torch.Tensor):
        return state.numpy().copy()
    if isinstance(state, (list, tuple, set)):
        return type(state)(map(value_of, state))
    return {name: value_of(value) for name, value in state.items()} if isinstance(state, dict) else state


def restored(part, state):
    """The part as it was kept: the same object, in place (captured CUDA graphs hold addresses), or a plain value."""
    for kind, (_, restore) in KINDS.items():
        if isinstance(part, kind):
            restore(part, state)
            return part
    if kept_names(part):
        for name in getattr(part, "KEPT", state):
            attribute = getattr(part, name, None)
            if (value := restored(attribute, state[name])) is not attribute:
                setattr(part, name, value)
    elif isinstance(part, list) and part and kept_names(part[0]):
        for item, item_state in zip(part, state, strict=True):
            restored(item, item_state)
    elif isinstance(part, np.ndarray) and isinstance(state, torch.Tensor) and part.shape == state.shape:
        part[...] = state.numpy()
    else:
        return value_of(state)
    return part


# ------------------------------------------------------------------------------------------------- what a run consists of

SCRIPT, SCRIPT_TEXT = os.path.basename(__file__), pathlib.Path(__file__).read_bytes()
LOG_INTERVAL = 100  # environment steps between two points of the training curves
CHANGE_NO_RESULT = ("runs_dir", "checkpoint_interval", "track", "wandb_project_name", "wandb_entity")
CSV_FILES = ("episodes.csv", "evaluations.csv")


def run_name(args: Args) -> str:
    """The name of the run's folder: the same command finds it again, and what changes results, the script too, another."""
    arguments = {name: value for name, value in vars(args).items() if name not in CHANGE_NO_RESULT}
    digits = hashlib.sha256(SCRIPT_TEXT + json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:8]
    # Characters that every file system and Weights & Biases take.
    return re.sub(r"[^\w.-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}__{digits}", flags=re.ASCII)


class Run:
    """A run: its folder, logs, checkpoints and counters, its evaluations, and the signal that stops it.

    In the folder: the script's text, args.json, TensorBoard's events, episodes.csv, evaluations.csv, models/, videos/, and
    checkpoint.pt or, when the run is finished, model.pt.
    """

    KEPT = ("global_step", "gradient_steps", "num_episodes", "agenda", "last_returns", "speed_steps", "speed_seconds",
            "wall_seconds", "num_threads", "csv_sizes")  # fmt: skip
    progress: tqdm | None = None  # a process has one bar, and closes it before it says its last line

    def __init__(self, args: Args):
        """Takes the run's folder. Ends the process if the run is finished, or another process is at it."""
        self.args, self.stopped_by = args, 0
        for number in (signal.SIGTERM, signal.SIGINT):  # from a cluster's scheduler; Ctrl-C
            signal.signal(number, self.remember_signal)
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.captures = args.cuda_graphs and self.device.type == "cuda"
        torch.backends.cudnn.deterministic = args.torch_deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # Where a unit is dead, Adam's moments fade into denormal numbers, with which a CPU is ten times slower. They become 0.
        torch.set_flush_denormal(True)
        self.versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
                         "gymnasium": gym.__version__, "device": self.device.type} | ENVIRONMENT_VERSIONS  # fmt: skip
        self.columns = episode_columns(args)
        # Environment steps before the last loop step, after which there is nothing but the final evaluation.
        self.last_loop_step = (args.total_timesteps - 1) // args.num_envs * args.num_envs
        self.global_step, self.gradient_steps, self.num_episodes = 0, 0, 0
        self.agenda: list[str] = []  # evaluations (by their phase) and resets that come before the next step
        self.last_returns: list[float] = []
        self.speed_steps, self.speed_seconds = 0, 0.0  # since learning began, without evaluations
        self.wall_seconds, self.turn_started = 0.0, time.perf_counter()
        self.num_threads, self.csv_sizes = 0, {}  # at the checkpoint

        self.path = pathlib.Path(args.runs_dir).expanduser() / run_name(args)
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.path / "lock", "w")  # a file: of a folder's lock other nodes know nothing on NFS
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another process is at work in {self.path}", code=75)  # EX_TEMPFAIL of sysexits.h
        except OSError as error:
            print(f"warning: {self.path} knows no locks ({error.strerror}); let only one process work there", file=sys.stderr)
        if (self.path / "model.pt").exists():
            self.remove_checkpoint()
            print(f"the run in {self.path} is finished")
            sys.exit(0)

    # ------------------------------------------------------------ begin, go on, end

    def restore(self, parts: dict) -> bool:
        """Opens the run's files for all that is to be logged. True if there is a checkpoint; all parts are then as at it."""
        args, resumed = self.args, (self.path / "checkpoint.pt").exists()
        self.eval_envs = [make_env(args, render=args.capture_video and i == 0) for i in range(args.eval_episodes)]
        self.parts = {"run": self, "initialisation": torch.default_generator} | parts
        if resumed:
            self.load()
            print(f"continuing {self.path} at step {self.global_step}, with {self.num_threads} thread(s) as before")
        for file in () if resumed else self.path.parent.glob(f"{self.path.name[:-8]}*/checkpoint.pt"):
            new, old = shlex.quote(str(self.path)), shlex.quote(str(file.parent))  # to be pasted, also with blanks in it
            print(f"note: {file.parent} is not finished, and not continued: its script or arguments are others. To go on with it "
                  f"in place of this run, stop and: rm -r {new} && mv {old} {new}")  # fmt: skip
        (self.path / SCRIPT).write_bytes(SCRIPT_TEXT)
        content = {"script": SCRIPT, "script_sha256": hashlib.sha256(SCRIPT_TEXT).hexdigest(), "args": vars(args),
                   "versions": self.versions, "device": self.device_name}  # fmt: skip
        (self.path / "args.json").write_text(json.dumps(content, indent=2))  # for people and tools
        if args.track:
            import wandb  # late: only --track needs the package

            try:
                wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=self.path.name, id=self.path.name,
                           resume="allow", config=vars(args), sync_tensorboard=True)  # fmt: skip
            except wandb.errors.Error as error:
                fail(f"Weights & Biases: {' '.join(str(error).split())}", code=1)
        # TensorBoard leaves out what was logged after the checkpoint. Rows are written as they end.
        self.writer = SummaryWriter(str(self.path), purge_step=self.global_step + 1 if resumed else 0)
        files = [open(self.path / name, "a" if resumed else "w", newline="", buffering=1) for name in CSV_FILES]
        self.episodes, self.evaluations = (csv.writer(file, lineterminator="\n") for file in files)
        if not resumed:
            rows = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
            self.writer.add_text("hyperparameters", f"|argument|value|\n|-|-|\n{rows}")
            self.episodes.writerow(("global_step", "episodic_return", "episodic_length", "wall_seconds", *self.columns))
            self.evaluations.writerow(("global_step", "phase", "episode", "episodic_return", *self.columns))
        bar_format = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
        seconds = 0.5 if sys.stderr.isatty() else 60
        steps = self.last_loop_step + args.num_envs
        Run.progress = tqdm(total=steps, initial=self.global_step, bar_format=bar_format, mininterval=seconds)
        return resumed

    def announce(self, agents: str, num_resets: int) -> None:
        """Says in one line what the run will do, once it is sure that a checkpoint can be taken."""
        self.states()
        args, buffer = self.args, vars(self.parts["buffer"]).values()
        buffer_bytes = sum(part.nbytes for part in buffer if isinstance(part, (torch.Tensor, np.ndarray)))
        threads = f" ({torch.get_num_threads()} thread(s))" if self.device.type == "cpu" else ""
        gradient_steps = gradient_steps_due(args, self.last_loop_step + args.num_envs)
        tqdm.write(f"{args.env_id}: {args.total_timesteps:,} steps on {self.device_name}{threads}, {agents}, "
                   f"{gradient_steps:,} gradient steps, {num_resets} reset(s), replay buffer "
                   f"{buffer_bytes / 1e9:.2f} GB, {self.time_left()}; in {self.path}")  # fmt: skip

    def time_left(self) -> str:
        """From the speed since learning began: random play is many times faster."""
        if not self.speed_steps:
            return "time left is known once learning runs"
        seconds = (self.args.total_timesteps - self.global_step) * self.speed_seconds / self.speed_steps
        return f"{tqdm.format_interval(seconds)} left"

    def remember_signal(self, number: int, frame) -> None:
        """All that a signal does, the second one, too: at no moment anything is destroyed."""
        self.stopped_by = number

    def stop_if_asked(self) -> None:
        """Called between two turns of the loop, and in evaluations: they change nothing, and are played again."""
        if self.stopped_by:
            self.save()
            self.close()
            print(f"stopped at step {self.global_step}; the same command goes on from there", file=sys.stderr)
            sys.exit(128 + self.stopped_by)  # as a shell expects it

    def goes_on(self) -> bool:
        """Whether anything is left to do."""
        self.stop_if_asked()
        now = time.perf_counter()
        self.wall_seconds, self.turn_started = self.wall_seconds + now - self.turn_started, now
        return bool(self.agenda) or self.global_step < self.args.total_timesteps

    def finish(self, weights: dict) -> None:
        """Leaves the weights and takes away the checkpoint, which is of no use any more."""
        self.wait_for_disk()  # with model.pt the run is finished, and nothing is added any more
        self.write("model.pt", weights)
        self.remove_checkpoint()
        self.writer.close()
        self.close()
        print(f"the run is in {self.path}")

    def close(self) -> None:
        for part in (*self.parts["envs"], *self.eval_envs, self.progress):
            part.close()

    # ------------------------------------------------------------ what happens at a step

    def count_step(self) -> None:
        self.progress.update(self.args.num_envs)
        if self.gradient_steps:
            self.speed_steps += self.args.num_envs
            self.speed_seconds += time.perf_counter() - self.turn_started

    def keep_what_is_due(self, agent: "Agent") -> None:
        """The weights of --keep-models, and a checkpoint; when what follows the loop step is on the agenda."""
        args, step = self.args, self.global_step
        if args.keep_models and interval_has_passed(Fraction(args.total_timesteps, args.keep_models), step, args.num_envs):
            (self.path / "models").mkdir(exist_ok=True)
            self.write(f"models/step_{step:08d}.pt", agent.weights())
        # At the end, too: a full disk or a kill before model.pt is written then loses nothing.
        if step >= args.total_timesteps or interval_has_passed(args.checkpoint_interval, step, args.num_envs):
            self.save()

    def evaluate(self, agent: "Agent") -> None:
        """Does the evaluation that the agenda begins with."""
        self.finite_metrics()
        phase, frames, recorded = self.agenda[0], [], self.eval_envs[0] if self.args.capture_video else None

        def watch(env: gym.Env) -> None:
            self.stop_if_asked()
            if env is recorded:
                frames.append(env.render())

        generator = torch.Generator(self.device).manual_seed(derive_seed(self.args.seed, EVALUATION, self.global_step))
        policy = agent.evaluation_policy(generator)
        episodes = evaluate(policy, self.eval_envs, self.args.seed, self.global_step, self.device, watch)
        if frames:
            from moviepy import ImageSequenceClip  # late: only --capture-video needs the package

            (self.path / "videos").mkdir(exist_ok=True)
            clip = ImageSequenceClip(frames, fps=recorded.metadata.get("render_fps", 30))
            clip.write_videofile(str(self.path / f"videos/step-{self.global_step}-{phase}.mp4"), logger=None)
        self.log_evaluation(agent, phase, episodes)
        self.agenda.pop(0)

    # ------------------------------------------------------------ logs

    def say(self, message: str) -> None:
        tqdm.write(f"step {self.global_step}: {message}")

    def log_scalars(self, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, self.global_step)

    def log(self, agent: "Agent", scalars: dict[str, float]) -> None:
        """A point of the training curves. Only here, and before evaluations and checkpoints, the losses are looked at."""
        if self.gradient_steps:
            scalars["charts/SPS"] = self.speed_steps / self.speed_seconds
            for name, values in zip(agent.METRICS, self.finite_metrics()):
                for i, value in enumerate(np.atleast_1d(values)):
                    scalars[f"losses/{name}_{i}" if values.ndim else f"losses/{name}"] = value
        self.log_scalars(scalars)
        mean_return = f"{np.mean(self.last_returns):g}" if self.last_returns else "-"
        epsilon = f", epsilon={scalars['charts/epsilon']:.2f}" if "charts/epsilon" in scalars else ""
        speed = f", SPS={scalars['charts/SPS']:.0f}" if "charts/SPS" in scalars else ""
        self.progress.set_postfix_str(f"{self.time_left()}, return={mean_return}{epsilon}{speed}", refresh=False)

    def finite_metrics(self) -> np.ndarray:
        """The agent's metrics, on the host. Nothing is evaluated or saved once one of them is not finite."""
        agent = self.parts["agent"]
        metrics = agent.metrics.cpu().numpy()
        if not np.isfinite(metrics).all():
            values = dict(zip(agent.METRICS, metrics.tolist()))
            raise FloatingPointError(f"not finite any more at step {self.global_step}: {values}; try a lower --learning-rate")
        return metrics

    def log_episode(self, episode: dict) -> None:
        extra = {name: episode[name] for name in self.columns}
        self.episodes.writerow((self.global_step, episode["r"], episode["l"], f"{self.wall_seconds:.2f}", *extra.values()))
        self.num_episodes += 1
        self.last_returns = [*self.last_returns[-9:], episode["r"]]
        self.log_scalars({"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]})
        self.log_scalars({f"charts/episodic_{name}": value for name, value in extra.items()})

    def log_evaluation(self, agent: "Agent", phase: str, episodes: list[dict]) -> None:
        for i, episode in enumerate(episodes):
            self.evaluations.writerow((self.global_step, phase, i, episode["r"], *(episode[name] for name in self.columns)))
        returns = [episode["r"] for episode in episodes]
        scalars = normalized_scores(self.args.env_id, float(np.mean(returns)))
        scalars |= {f"episodic_{name}": float(np.mean([episode[name] for episode in episodes])) for name in self.columns}
        others = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in scalars.items())
        self.say(f"evaluation ({phase.replace('_', ' ')}) mean {np.mean(returns):g} +- {np.std(returns):.4g}, "
                 f"lowest {min(returns):g}, highest {max(returns):g}{others}")  # fmt: skip
        scalars["episodic_return"] = float(np.mean(returns))
        # A curve has one point at a step: what a reset cost stands in curves of its own.
        if phase in ("before_reset", "after_reset"):
            self.log_scalars({f"eval_{phase}/{name}": value for name, value in scalars.items()})
        if phase != "after_reset":
            self.log_scalars({f"eval/{name}": value for name, value in scalars.items()} | evaluation_scalars(agent))

    # ------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Replaces the checkpoint."""
        self.finite_metrics()
        self.wait_for_disk()
        self.num_threads = torch.get_num_threads()  # with another number sums are rounded in another order
        self.csv_sizes = {name: (self.path / name).stat().st_size for name in CSV_FILES}
        self.write("checkpoint.pt", {"versions": self.versions, "parts": self.states()})

    def states(self) -> dict:
        return {name: state_of(part, name) for name, part in self.parts.items()}

    def load(self) -> None:
        """Brings all parts to where they were at the checkpoint. Nothing in the file is executed."""
        path = self.path / "checkpoint.pt"
        try:
            with zipfile.ZipFile(path) as archive:  # PyTorch does not look at the checksums
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile("a checksum is wrong")
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            if content["versions"] != self.versions:
                written, here = content["versions"].items(), self.versions.items()
                raise ValueError(f"it was written with {dict(written - here)}, but here is {dict(here - written)}")
            for env in self.parts["envs"]:
                env.reset(seed=0)  # what an environment makes only now is restored in place, too
            for name, part in self.parts.items():
                if restored(part, content["parts"][name]) is not part:
                    raise ValueError(f"{name} does not fit")
            for name, size in self.csv_sizes.items():
                if (self.path / name).stat().st_size < size:
                    raise ValueError(f"{name} is shorter than it was then")
        except Exception as error:  # a flipped bit can have any consequence
            reason = " ".join(str(error).split()).partition(". ")[0]
            fail(f"the run cannot go on from {path}: {type(error).__name__}: {reason}", code=1)
        torch.set_num_threads(self.num_threads)
        for name, size in self.csv_sizes.items():
            os.truncate(self.path / name, size)

    def write(self, name: str, content: dict) -> None:
        """Replaces a file of numbers and tensors; until the new one is wholly on the disk the old one stays."""
        path = self.path / name
        try:
            with open(f"{path}.tmp", "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        except RuntimeError as error:  # PyTorch's, when the disk is full, does not say so
            raise OSError(f"{path} was not written. Is the disk full?") from error
        os.replace(f"{path}.tmp", path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name, too
        os.close(folder)

    def wait_for_disk(self) -> None:
        """Until all that was logged is written."""
        self.writer.flush()
        for path in (*self.path.glob("events.out.tfevents.*"), *self.path.glob("*.csv")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def remove_checkpoint(self) -> None:
        for path in self.path.glob("checkpoint.pt*"):  # .tmp, too, which a kill has left
            path.unlink()


# ----------------------------------------------------------------------------------------------- arguments, and the start


def interval_has_passed(interval: int | Fraction, global_step: int, num_envs: int) -> bool:
    """Whether the loop step that ends at `global_step` reached or passed a multiple of the interval; 0 = never."""
    return interval > 0 and global_step // interval > (global_step - num_envs) // interval


def fail(message: str, code: int = 2) -> None:
    """Ends the process with one line; exit code 2: because of a wrong argument."""
    if Run.progress is not None:
        Run.progress.close()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def check_args(args: Args) -> None:
    """Refuses what cannot work before anything is created."""
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} leaves nothing of --total-timesteps {args.total_timesteps} to learn in")
    if args.batch_size > min(args.learning_starts, args.buffer_size):
        fail(f"--batch-size {args.batch_size} is more than --learning-starts {args.learning_starts} or "
             f"--buffer-size {args.buffer_size}: so many transitions are not there when learning starts")  # fmt: skip
    check_schedules(args)
    for flag, wanted, package in (("--track", args.track, "wandb"), ("--capture-video", args.capture_video, "moviepy")):
        if wanted and importlib.util.find_spec(package) is None:
            fail(f"{flag} needs the package {package}: pip install {package}")
    check_environment(args)


def show_ranges() -> None:
    """Lets --help show the bounds that pydantic holds the arguments to."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for name, field in Args.__pydantic_fields__.items():
        bounds = [f"{signs[key]} {getattr(bound, key)}" for bound in field.metadata for key in signs if hasattr(bound, key)]
        if bounds:
            metavar = f"{'FLOAT' if 'float' in str(field.annotation) else 'INT'} {', '.join(bounds)}"
            Args.__annotations__[name] = Annotated[Args.__annotations__[name], tyro.conf.arg(metavar=metavar)]


def main() -> None:
    show_ranges()
    # Without the map of the source; and indented, because tyro joins lines that begin with a letter.
    args = tyro.cli(Args, description=textwrap.indent(__doc__.partition("\nWhere is what:")[0], " "))
    check_args(args)
    try:
        train(args)
    except FloatingPointError as error:
        fail(f"{args.env_id}: {error}", code=1)


if __name__ == "__main__":
    main()
