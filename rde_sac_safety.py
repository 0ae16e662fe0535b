"""Safe RDE: a reset deep ensemble of SAC agents under a limit on cost, on Safety-Gymnasium's velocity tasks and in a maze.

N agents learn from one replay buffer, are reset one after another against primacy bias, and act as one. Beside its reward
critics every agent has a cost critic; one Lagrange multiplier, a PID controller on the cost of the training episodes, keeps
that cost at the limit. Every agent proposes an action of its policy; the oldest agent, whose last reset is longest ago, judges
the proposals by its reward critics and by its cost critic, so that a new agent is kept from acting where it would be
dangerous. The baselines are this script, too: SAC-Lagrangian with resets (SR) is `--num-agents 1`, SAC-Lagrangian
`--num-agents 1 --reset-interval 0`, RDE without the safety-aware selection `--kappa 1`, RDE+SAC that only counts cost
`--cost-limit inf`.

    python rde_sac_safety.py --env-id SafetyHalfCheetahVelocity-v1
    python rde_sac_safety.py --env-id SafetyPointMaze-v0 --cost-limit 5

In two minutes, to see everything happen once (with four resets):

    python rde_sac_safety.py --env-id SafetyPointMaze-v0 --cost-limit 5 --hidden-dim 64 --batch-size 64
        --total-timesteps 8000 --learning-starts 1000 --reset-interval 3000 --eval-interval 2000 --eval-episodes 2

Kim, Shin, Park, Sung, "Sample-Efficient and Safe Deep RL via Reset Deep Ensemble Agents", NeurIPS 2023 (arXiv 2310.20287).
SAC: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv 1812.05905).
Cost critics: Yang et al., "WCSAC: Worst-Case Soft Actor Critic for Safety-Constrained RL", AAAI 2021.
PID multiplier: Stooke, Achiam, Abbeel, "Responsive Safety in RL by PID Lagrangian Methods", ICML 2020 (arXiv 2007.03964).
Velocity tasks: Ji et al., "Safety-Gymnasium", NeurIPS 2023 (arXiv 2310.12567).

Where is what:
    Args                          every argument, its meaning and its range
    StackedMLP, squashed_gaussian the networks, and what the policy draws
    selection_probabilities, ...  which agent acts
    LagrangeMultiplier            what cost is worth
    Agent                         act, update, reset
    gradient_steps_due, ...       when there is a gradient step, a reset, an evaluation
    train                         the training loop
    -- the line --                below it nothing is of the algorithm
    VelocityCost, HazardMaze      the tasks and their costs
    ConstrainedTask               what the algorithm sees of any task
    ReplayBuffer                  transitions
    -- the second line --         equal in all scripts
    derive_seed, CudaGraph, ...   seeds, devices, evaluation
    Run                           folder, logs, checkpoints, signals
    check_args, main              what is refused; the start
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing
import warnings
import zipfile
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

# Threads that wait for each other by spinning are 12 to 80 times slower as soon as another process competes for a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1500")

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ------------------------------------------------------------ the run
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of the experiment, a part of the run folder's name"""
    seed: Annotated[int, "[0, inf)"] = 1
    """seed of every random generator of the run"""
    runs_dir: str = "runs"
    """the folder in which the run's own folder is made"""
    resume: str = ""
    """a run folder to continue exactly, with its own arguments (--total-timesteps may be raised);
    "auto" = the run of this script with these arguments: reported if it is finished, continued if not, begun if there is none"""
    allow_changed_script: bool = False
    """resume also a run that another version of this script has begun"""
    check_only: bool = False
    """check the arguments, and end"""
    checkpoint_interval: Annotated[int, "[0, inf)"] = 25_000
    """environment steps between two checkpoints; 0 = only at the end and when the run is stopped by SIGTERM or SIGINT (Ctrl-C)"""
    keep_models: Annotated[int, "[0, 10000]"] = 0
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
    env_id: str = "SafetyHalfCheetahVelocity-v1"
    """the task: Safety<robot>Velocity-v1 (HalfCheetah, Hopper, Walker2d, Swimmer, Ant, Humanoid), SafetyPointMaze-v0, or any
    environment that is registered in Gymnasium and reports info["cost"]; with "module:id" the module is imported before"""
    total_timesteps: Annotated[int, "[1, inf)"] = 100_000
    """environment steps (actions, none is repeated) of the whole run"""
    num_envs: Annotated[int, "[1, inf)"] = 1
    """environments that are advanced together, once in a loop step"""

    # ------------------------------------------------------------ learning
    replay_ratio: Annotated[float, "(0, inf)"] = 1.0
    """gradient steps per environment step; fractions are allowed (sensible: 0.25 to 8)"""
    learning_starts: Annotated[int, "[1, inf)"] = 5_000
    """environment steps, with uniformly random actions, before the first gradient step"""
    buffer_size: Annotated[int, "[1, inf)"] = 1_000_000
    """transitions in the replay buffer"""
    batch_size: Annotated[int, "[1, inf)"] = 256
    """transitions in a mini-batch (sensible: 128 to 1,024)"""
    learning_rate: Annotated[float, "(0, inf)"] = 3e-4
    """learning rate of the three Adams: actors, critics, entropy coefficients (sensible: 1e-4 to 1e-3)"""
    gamma: Annotated[float, "[0, 1]"] = 0.99
    """discount factor of rewards"""
    tau: Annotated[float, "[0, 1]"] = 0.005
    """how far the target critics move towards the critics after a gradient step (sensible: 0.001 to 0.02)"""
    hidden_dim: Annotated[int, "[1, inf)"] = 256
    """width of the hidden layers of actors and critics"""
    num_hidden_layers: Annotated[int, "[1, inf)"] = 2
    """hidden layers of actors and critics"""
    critic_norm: Literal["none", "layer"] = "none"
    """LayerNorm after every hidden layer of the critics, before the ReLU (layer: the base of BRO and SimBa), or none"""

    # ------------------------------------------------------------ the constraint
    cost_limit: Annotated[float, "[0, inf]"] = 25.0
    """the cost that an episode may have, undiscounted; inf = no constraint, cost is only counted"""
    gamma_cost: Annotated[float, "[0, 1]"] = 0.99
    """discount factor of costs"""
    lambda_kp: Annotated[float, "[0, inf)"] = 0.05
    """proportional part of the Lagrange multiplier, per unit of an episode's cost above the limit"""
    lambda_ki: Annotated[float, "[0, inf)"] = 0.0005
    """integral part of the Lagrange multiplier, of the sum over the training episodes, which is never negative"""
    lambda_kd: Annotated[float, "[0, inf)"] = 0.1
    """derivative part of the Lagrange multiplier, of the rise of cost since the episode before; a fall counts as none"""

    # ------------------------------------------------------------ evaluation
    eval_interval: Annotated[int, "[0, inf)"] = 10_000
    """environment steps between two evaluations; 0 = only at the end (and around resets, if there are any)"""
    eval_episodes: Annotated[int, "[1, inf)"] = 10
    """whole episodes in an evaluation"""
    capture_video: bool = False
    """record the first episode of every evaluation as a video in the run folder"""

    # ------------------------------------------------------------ resets
    reset_interval: Annotated[int, "[0, inf)"] = 40_000
    """gradient steps of one agent between two of its own resets; 0 = never"""

    # ------------------------------------------------------------ the ensemble
    num_agents: Annotated[int, "[1, inf)"] = 2
    """agents in the ensemble (sensible: 2 to 4; 1 = SR)"""
    selection: Literal["value", "advantage"] = "value"
    """what the judged Q-values of the proposals are divided by: the largest of them (value, the paper's rule), or what is at
    stake in the state, the best action's lead over a random one (advantage)"""
    beta: Annotated[float | None, "[0, inf)"] = None
    """how strongly the choice of the acting agent prefers a high Q-value; 0 = uniform, 1e9 = the highest; not given: 50 with
    --selection value, 5 with advantage"""
    beta_cost: Annotated[float | None, "[0, inf)"] = None
    """how strongly the choice of the acting agent prefers a low expected cost; 0 = uniform, 1e9 = the lowest; not given: as
    the default of --beta"""
    kappa: Annotated[float, "[0, 1]"] = 0.5
    """the weight of reward in the choice of the acting agent; the rest is the weight of cost (1 = RDE's own choice)"""


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

    The absolute value, not the value, keeps the order of proposals whose values are negative (the official code clips
    there, and chooses uniformly).
    """
    return q_values.abs().amax(dim=1, keepdim=True)


def advantage_scale(q_values: torch.Tensor, random_q_values: torch.Tensor) -> torch.Tensor:
    """The scale of `--selection advantage`: what is at stake, max q - mean q of random actions: (batch, ...) to (batch, 1).

    A proposal as bad as a random action is exp(beta) times less likely than the best, wherever the zero of the values lies
    and whatever their unit. The scale is not less than a millionth of the largest |q|: below that float32 has only noise.
    """
    stake = q_values.amax(dim=1, keepdim=True) - random_q_values.mean(dim=1, keepdim=True)
    return torch.maximum(stake, 1e-6 * value_scale(q_values))


def safe_selection_probabilities(
    q_values: torch.Tensor,
    cost_values: torch.Tensor,
    scale: torch.Tensor,
    cost_scale: torch.Tensor,
    beta: torch.Tensor | float,
    beta_cost: torch.Tensor | float,
    kappa: float,
) -> torch.Tensor:
    """p_safe = kappa * p + (1 - kappa) * p_cost, where p_cost_i = softmax_i(-beta_cost * cost_i / cost_scale): all (batch, N)."""
    cost_probabilities = selection_probabilities(-cost_values, cost_scale, beta_cost)
    return kappa * selection_probabilities(q_values, scale, beta) + (1 - kappa) * cost_probabilities


def discounted_limit(cost_limit: float, gamma: float, num_steps: int) -> float:
    """The limit of an episode of `num_steps` as a discounted sum: of a cost that is the same at every step (WCSAC)."""
    return cost_limit * math.fsum(gamma**step for step in range(num_steps)) / num_steps


# ---------------------------------------------------------------------------------------------------------- multiplier


class LagrangeMultiplier:
    """What one unit of cost is worth in reward: a PID controller on the cost of the training episodes (Stooke et al. 2020).

    error = cost of the episode - limit; the multiplier is max(0, kp * error + ki * integral + kd * rise), where neither the
    integral of the error nor its rise since the last episode is negative. Without a limit (inf) it stays 0. It answers for
    the composed agent, so the whole ensemble has one, and no reset touches it.
    """

    KEPT = ("value", "integral", "last_error")

    def __init__(self, args: Args, device: torch.device):
        self.cost_limit, self.gains = args.cost_limit, (args.lambda_kp, args.lambda_ki, args.lambda_kd)
        self.value = torch.zeros((), device=device)  # on the device: a captured CUDA graph learns with it
        self.integral, self.last_error = 0.0, 0.0

    def update(self, episodic_cost: float) -> None:
        """Takes in the undiscounted cost of a finished training episode, or the mean of those that end together."""
        if math.isinf(self.cost_limit):
            return
        error = episodic_cost - self.cost_limit
        self.integral = max(0.0, self.integral + error)
        terms = error, self.integral, max(0.0, error - self.last_error)
        self.last_error = error
        self.value.fill_(max(0.0, sum(gain * term for gain, term in zip(self.gains, terms))))


# -------------------------------------------------------------------------------------------------------------- agent


class Agent:
    """The reset deep ensemble: N SAC agents that learn from the same mini-batches, are reset in turn, and act as one.

    Actor i is agent i's; its two reward critics, and their targets, are 3 * i and 3 * i + 1, its cost critic is 3 * i + 2.
    """

    KEPT = ("actors", "critics", "target_critics", "log_alphas", "actor_optimizer", "critic_optimizer", "alpha_optimizer",
            "multiplier", "num_resets", "metrics", "acting_counts", "choices", "total_cost", "num_violations")  # fmt: skip
    METRICS = ("critic_loss", "q_values", "actor_loss", "alpha", "cost_critic_loss", "cost_values")

    def __init__(
        self, args: Args, observation_space: gym.Space, action_space: gym.Space, buffer: "ReplayBuffer", device: torch.device
    ):
        observation_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        self.args, self.action_dim, self.buffer, self.device = args, action_dim, buffer, device
        self.target_entropy = -float(action_dim)
        hidden = [args.hidden_dim] * args.num_hidden_layers
        self.actors = StackedMLP(args.num_agents, [observation_dim, *hidden, 2 * action_dim]).to(device)
        self.critics = StackedMLP(
            3 * args.num_agents, [observation_dim + action_dim, *hidden, 1], args.critic_norm == "layer"
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
        self.chosen_beta, self.chosen_beta_cost = (
            DEFAULT_BETA[args.selection] if beta is None else beta for beta in (args.beta, args.beta_cost)
        )
        self.beta, self.beta_cost = torch.zeros(2, device=device)  # see `num_resets`
        self.kappa = args.kappa if math.isfinite(args.cost_limit) else 1.0  # without a limit cost is no reason
        self.cost_scale = discounted_limit(args.cost_limit, args.gamma_cost, episode_limit(args.env_id) or 1_000)
        self.num_resets = 0
        self.multiplier = LagrangeMultiplier(args, device)
        self.total_cost, self.num_violations = 0.0, 0  # of the whole training; episodes above the limit
        self.metrics = torch.zeros((len(self.METRICS), args.num_agents), device=device)  # of the last mini-batch
        self.acting_counts = np.zeros(args.num_agents, np.int64)  # whose proposals were taken since the last log
        self.choices = torch.zeros(2, device=device)  # since the last log: how many, and the sum of their entropies

    @staticmethod
    def num_bytes(args: Args, observation_space: gym.Space, action_space: gym.Space) -> int:
        """Parameters, gradients, Adam's two moments and, of the three critics, targets: float32."""
        observation_dim, action_dim = observation_space.shape[0], action_space.shape[0]
        width, inner = args.hidden_dim, (args.num_hidden_layers - 1) * (args.hidden_dim + 1) * args.hidden_dim
        actor = (observation_dim + 1) * width + inner + (width + 1) * 2 * action_dim
        critic = (observation_dim + action_dim + 1) * width + inner + (width + 1)
        return args.num_agents * 4 * (4 * actor + 3 * 5 * critic)

    @property
    def num_parameters(self) -> int:
        """Of one agent: actor, critics, entropy coefficient."""
        parameters = [*self.actor_parameters, *self.critic_parameters, self.log_alphas]
        return sum(parameter.numel() for parameter in parameters) // self.args.num_agents

    def summary(self) -> str:
        """For the line in which a run says what it will do."""
        agents = f"{self.args.num_agents} agent(s) x {self.num_parameters:,} parameters"
        choice = f", selection by {self.args.selection} (beta {self.chosen_beta:g})" if self.args.num_agents > 1 else ""
        return agents + choice

    @property
    def num_resets(self) -> int:
        return self._num_resets

    @num_resets.setter
    def num_resets(self, num_resets: int) -> None:
        self._num_resets = num_resets
        self.oldest.fill_(num_resets % self.args.num_agents)
        # By the paper's rule the choice is uniform before the first reset; by the other one agent 0 judges from the start.
        judges = num_resets > 0 or self.args.selection == "advantage"
        self.beta.fill_(self.chosen_beta if judges else 0.0)
        self.beta_cost.fill_(self.chosen_beta_cost if judges else 0.0)

    @torch.no_grad()
    def initialise(self, index: int) -> None:
        """A new agent in the place of agent `index`, in place (captured CUDA graphs hold the addresses)."""
        self.actors.initialise(index)
        for critic in range(3 * index, 3 * index + 3):
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

    def values(self, critics: StackedMLP, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """The three critics of every agent, (N, 3, batch), reward, reward and cost, for (batch, observation_dim) and the
        agents' (N, batch, action_dim)."""
        num_agents, batch_size, _ = actions.shape
        inputs = torch.cat([observations.expand(num_agents, -1, -1), actions], dim=2)
        with self.autocast():
            outputs = critics(inputs.unsqueeze(1).expand(-1, 3, -1, -1).flatten(0, 1))  # (3 * N, batch, 1)
        return outputs.float().view(num_agents, 3, batch_size)

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
        judgement, costs = self.judge(observations, proposals)  # (num_envs, N) both
        scale, cost_scale, least = value_scale(judgement), value_scale(costs), self.cost_scale
        if self.args.selection == "advantage":
            random_actions = self.random_actions(num_envs, random_actions_generator)
            random_judgement, random_costs = self.judge(observations, random_actions)  # (num_envs, NUM_RANDOM_ACTIONS) both
            scale, cost_scale = advantage_scale(judgement, random_judgement), advantage_scale(-costs, -random_costs)
            least = self.cost_scale * DEFAULT_BETA["advantage"] / DEFAULT_BETA["value"]  # as hard a choice as by value
        # Divided by itself alone, the noise of costs near zero would make a hard choice where no cost is in sight.
        cost_scale = cost_scale.clamp(min=least)
        probabilities = safe_selection_probabilities(judgement, costs, scale, cost_scale, self.beta, self.beta_cost, self.kappa)
        # An exponential race: the first of N clocks with rates p_i is clock i with probability p_i.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        acting_agents = clocks.argmin(dim=1)  # (num_envs,)
        if counted:
            entropies = torch.special.entr(probabilities).sum(dim=1)  # (num_envs,)
            self.choices.add_(torch.stack([torch.ones_like(entropies), entropies], dim=1).sum(dim=0))
        actions = proposals[torch.arange(num_envs, device=self.device), acting_agents]  # (num_envs, action_dim)
        return torch.cat([actions, acting_agents.unsqueeze(1)], dim=1)

    def judge(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the oldest agent thinks of K actions in every state, the smaller of its reward critics, and its cost critic:
        (batch, observation_dim) and (batch, K, action_dim) to (batch, K) both."""
        inputs = torch.cat([observations.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], dim=2).flatten(0, 1)
        with self.autocast():
            judging_critics = 3 * self.oldest + torch.arange(3, device=self.device)
            judgements = self.critics(inputs.expand(3, -1, -1), judging_critics)  # (3, batch * K, 1)
        judgements = judgements.float().view(3, *actions.shape[:2])
        return judgements[:2].amin(dim=0), judgements[2]

    def random_actions(self, num_envs: int, generator: torch.Generator) -> torch.Tensor:
        """Uniformly drawn, (num_envs, NUM_RANDOM_ACTIONS, action_dim)."""
        actions = torch.empty((num_envs, NUM_RANDOM_ACTIONS, self.action_dim), device=self.device)
        return actions.uniform_(-1, 1, generator=generator)

    def update(self) -> None:
        """One gradient step of every agent on one mini-batch, in stable-baselines3's order: alpha, critics, actor, targets."""
        args, generator = self.args, self.buffer.generator
        observations, actions, rewards, costs, terminated, next_observations = self.buffer.sample(args.batch_size)
        alphas = self.log_alphas.exp().unsqueeze(1)  # (N, 1), of before this step

        # The agents' losses are summed: none depends on another agent's parameters, so the gradients stay their own.
        mean, log_std = self.policies(observations)
        policy_actions, log_probs = squashed_gaussian(mean, log_std, torch.empty_like(mean).normal_(generator=generator))
        # The loss of alpha, -log(alpha) * (log_prob + target entropy), is linear in log(alpha): its gradient is the factor.
        self.step(self.alpha_optimizer, [-(log_probs.detach().mean(dim=1) + self.target_entropy)])

        with torch.no_grad():
            mean, log_std = self.policies(next_observations)
            next_actions, next_log_probs = squashed_gaussian(mean, log_std, torch.empty_like(mean).normal_(generator=generator))
            next_values = self.values(self.target_critics, next_observations, next_actions)  # (N, 3, batch_size)
            next_q_values = next_values[:, :2].amin(dim=1) - alphas * next_log_probs  # (N, batch_size)
            td_targets = rewards + args.gamma * (1 - terminated) * next_q_values
            cost_targets = costs + args.gamma_cost * (1 - terminated) * next_values[:, 2]  # no entropy, no minimum
            targets = torch.stack([td_targets, td_targets, cost_targets], dim=1)  # (N, 3, batch_size)
        values = self.values(self.critics, observations, actions.expand(args.num_agents, -1, -1))  # (N, 3, batch_size)
        losses = 0.5 * (values - targets).square().mean(dim=2)  # (N, 3)
        self.step(self.critic_optimizer, torch.autograd.grad(losses.sum(), self.critic_parameters))

        policy_values = self.values(self.critics, observations, policy_actions)  # (N, 3, batch_size)
        objective = alphas * log_probs - policy_values[:, :2].amin(dim=1)  # (N, batch_size)
        # Divided, so that a large multiplier does not make large steps.
        actor_losses = (objective + self.multiplier.value * policy_values[:, 2]).mean(dim=1) / (1 + self.multiplier.value)
        self.step(self.actor_optimizer, torch.autograd.grad(actor_losses.sum(), self.actor_parameters))

        with torch.no_grad():
            torch._foreach_lerp_(self.target_parameters, self.critic_parameters, args.tau)
        losses, means = losses.detach(), values.detach().mean(dim=2)  # (N, 3)
        self.metrics.copy_(torch.stack([
            losses[:, :2].sum(dim=1), means[:, :2].mean(dim=1), actor_losses.detach(), alphas.squeeze(1), losses[:, 2], means[:, 2]
        ]))  # fmt: skip

    def reset(self) -> int:
        """Resets the oldest agent, in place (captured CUDA graphs hold the addresses), and returns its number."""
        index = self.num_resets % self.args.num_agents
        self.initialise(index)
        for optimizer in (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer):
            for parameter in optimizer.param_groups[index]["params"]:
                for moment_or_step in optimizer.state[parameter].values():
                    moment_or_step.zero_()
        self.num_resets += 1
        return index

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def evaluation_policy(self, generator: torch.Generator):
        """What evaluations play: (batch, observation_dim) to (batch, action_dim), the modes of the policies."""
        return lambda observations: self.act(observations, generator, generator, deterministic=True)[:, :-1]

    def end_episodes(self, episodic_costs: list[float]) -> None:
        """What the training episodes that end in a loop step teach beside their transitions.

        The multiplier is moved once, by their mean: moved by each of them, it would hang on the order of the environments.
        """
        if episodic_costs:
            self.num_violations += sum(cost > self.args.cost_limit for cost in episodic_costs)
            self.multiplier.update(float(np.mean(episodic_costs)))

    def scalars(self) -> dict[str, float]:
        """For TensorBoard: what the training costs, who judges, and since the last call how often an agent's proposal was taken,
        and how undecided the choice was (at most log N).
        """
        fractions = self.acting_counts / max(1, self.acting_counts.sum())
        num_choices, entropy = self.choices.tolist()
        self.acting_counts[:] = 0
        self.choices.zero_()
        scalars = {"safety/lambda": self.multiplier.value.item(), "safety/total_cost": self.total_cost}
        scalars |= {"safety/violations": self.num_violations, "rde/oldest_agent": self.num_resets % self.args.num_agents}
        scalars |= {f"rde/acting_fraction_{i}": fraction for i, fraction in enumerate(fractions)}
        if self.num_resets:
            scalars["rde/youngest_fraction"] = fractions[(self.num_resets - 1) % self.args.num_agents]
        return scalars | {"rde/choice_entropy": entropy / max(1, num_choices)}

    def weights(self) -> dict:
        """What model.pt holds, on the CPU: so it can be loaded without a GPU, too."""
        return {
            "actors": copy.deepcopy(self.actors).cpu().state_dict(),
            "critics": copy.deepcopy(self.critics).cpu().state_dict(),
            "log_alphas": self.log_alphas.cpu(),
            "oldest_agent": self.oldest.item(),
            "num_resets": self.num_resets,
            "lagrange_multiplier": self.multiplier.value.item(),
        }

    def load_weights(self, weights: dict) -> None:
        self.actors.load_state_dict(weights["actors"])
        self.critics.load_state_dict(weights["critics"])
        self.log_alphas.copy_(weights["log_alphas"])
        self.num_resets = weights["num_resets"]
        self.oldest.fill_(weights["oldest_agent"])  # in a copy the order of resets may be another one
        self.multiplier.value.fill_(weights["lagrange_multiplier"])


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


def train(args: Args, path: str | None = None) -> None:
    """A whole run, or (in the folder `path`) the rest of one."""
    run = Run(args, path)
    envs = run.make_envs(args.num_envs)
    spaces = envs[0].observation_space, envs[0].action_space
    exploration = np.random.default_rng(derive_seed(args.seed, EXPLORATION))
    mini_batches = torch.Generator(run.device).manual_seed(derive_seed(args.seed, MINI_BATCHES))
    selection = torch.Generator(run.device).manual_seed(derive_seed(args.seed, SELECTION))
    random_actions = torch.Generator(run.device).manual_seed(derive_seed(args.seed, RANDOM_ACTIONS))
    buffer = ReplayBuffer(args.buffer_size, *spaces, run.device, mini_batches)
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
        # Between two steps: an evaluation, a reset of the oldest agent, a checkpoint.
        if run.agenda:
            if run.agenda[0] == "reset":
                reset_agent = agent.reset()
                run.log_scalars({"rde/reset_agent": reset_agent})
                run.say(f"reset of agent {reset_agent} after {run.gradient_steps} gradient steps")
                run.agenda.pop(0)
            else:
                run.attend(agent)
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
            run.count_gradient_step()

        # Step the environments and store what happened.
        if not warm_up:
            actions, acting_agents = np.split(choice.numpy(), [agent.action_dim], axis=1)
            if not np.isfinite(actions).all():  # the physics would stop with an error of its own
                raise FloatingPointError(f"an action is not finite at step {run.global_step}; try a lower --learning-rate")
            agent.acting_counts += np.bincount(acting_agents[:, 0].astype(np.int64), minlength=args.num_agents)
        run.global_step += args.num_envs
        episodic_costs = []
        for i, env in enumerate(envs):
            next_observation, reward, terminated, truncated, info = env.step(actions[i])
            buffer.add(observations[i], actions[i], reward, info["cost"], terminated, next_observation)
            agent.total_cost += info["cost"]
            if terminated or truncated:
                next_observation, _ = env.reset()
                episodic_costs.append(info["episode"]["cost"])
                run.log_episode(info["episode"])
            observations[i] = next_observation
        agent.end_episodes(episodic_costs)

        # Log, and see what is due.
        run.count_step()
        if run.log_is_due():
            run.log(agent, agent.scalars())
        run.agenda = run.upkeep_due() + events_due(args, run.global_step, run.gradient_steps, agent.num_resets)

    run.finish(agent.weights())


# =========================================================================================================== the line
# Above it stands the algorithm. Below it stands what it is built on.


# ------------------------------------------------------------------------------------------------------- environments

ENVIRONMENT_BYTES = 5_000_000  # what an environment adds to the memory of the process, about

# Safety-Gymnasium's velocity tasks, version 1: Gymnasium's robot, and the speed in m/s above which a step costs 1. The
# robots are the v4 that Safety-Gymnasium has: v5 observes more of Ant and Humanoid, and Walker2d has other feet.
VELOCITY_TASKS = {
    "SafetyHalfCheetahVelocity-v1": ("HalfCheetah-v4", 3.2096),
    "SafetyHopperVelocity-v1": ("Hopper-v4", 0.7402),
    "SafetyWalker2dVelocity-v1": ("Walker2d-v4", 2.3415),
    "SafetySwimmerVelocity-v1": ("Swimmer-v4", 0.2282),
    "SafetyAntVelocity-v1": ("Ant-v4", 2.6222),
    "SafetyHumanoidVelocity-v1": ("Humanoid-v4", 1.4149),
}
MAZE_TASK, MAZE_STEPS = "SafetyPointMaze-v0", 300


def environment_versions() -> dict[str, str]:
    versions = {}
    for name in ("mujoco", "gymnasium-robotics"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # not every task needs both
            versions[name] = importlib.metadata.version(name)
    return versions


def episode_columns(args: Args) -> tuple[str, ...]:
    """What `info["episode"]` holds beside the return "r" and the length "l"."""
    return ("cost",)


def evaluation_scalars(agent: "Agent") -> dict[str, float]:
    """What is logged with every evaluation, beside its scores."""
    return {}


def episode_limit(env_id: str) -> int | None:
    """The steps after which an episode is truncated."""
    if env_id == MAZE_TASK:
        return MAZE_STEPS
    if env_id in VELOCITY_TASKS:
        return gym.spec(VELOCITY_TASKS[env_id][0]).max_episode_steps
    module, _, name = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    return gym.spec(name).max_episode_steps


class VelocityCost(gym.Wrapper):
    """A robot that may not be fast: a step with more than `limit` m/s costs 1.

    The rule is that of Safety-Gymnasium's code: the velocity along x counts with its sign, so running backwards is free, but
    of Ant and Humanoid, which run to any side, it is the speed in the plane.
    """

    def __init__(self, env: gym.Env, limit: float):
        super().__init__(env)
        self.limit, self.in_plane = limit, env.spec.name in ("Ant", "Humanoid")

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = self.env.step(action)
        velocity = float(info["x_velocity"])
        if self.in_plane:
            velocity = math.hypot(velocity, info["y_velocity"])
        info["cost"] = float(velocity > self.limit)
        return observation, reward, terminated, truncated, info


class HazardMaze(gym.Wrapper):
    """A point robot, driven by forces, in a closed field of 5 x 5 m: it seeks goals, and a step inside a hazard costs 1.

    The reward of a step is 10 for each m by which the goal came nearer, and 10 for a goal that is reached, from 0.45 m; then a
    new one is drawn. (That is the rule of Safety-Gymnasium's goals, ten times as much: SAC's entropy coefficient begins at 1,
    and a step is 5 cm at most. With PointMaze's own reward for being near, robots learn to wait beside the first goal.) The
    hazards are circles on the ground, drawn anew in every episode, apart from each other, from the start and from the first
    goal; a later goal may lie in one, but can be reached from outside.

    The observation, (22,), is position, velocity, goal - position, and a lidar: 16 sectors around the robot, each with the
    nearness of the nearest hazard's center, 1 here, 0 at 3 m. It is WCSAC's StaticEnv on Gymnasium-Robotics' PointMaze.
    """

    MAP = [[1] * 7] + [[1, 0, 0, 0, 0, 0, 1]] * 5 + [[1] * 7]  # 1 is a wall, a cell is 1 x 1 m, the origin is the center
    NUM_HAZARDS, RADIUS, NUM_SECTORS, RANGE = 8, 0.3, 16, 3.0

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (6 + self.NUM_SECTORS,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        state, info = self.env.reset(seed=seed, options=options)
        apart, hazards = [state["achieved_goal"], state["desired_goal"]], []
        while len(hazards) < self.NUM_HAZARDS:
            hazard = self.unwrapped.np_random.uniform(self.RADIUS - 2.5, 2.5 - self.RADIUS, 2)
            if all(math.dist(hazard, other) > 2 * self.RADIUS for other in apart + hazards):
                hazards.append(hazard)
        self.hazards = np.array(hazards)  # (NUM_HAZARDS, 2)
        self.way = math.dist(state["achieved_goal"], self.unwrapped.goal)
        return self.observe(state), info

    def step(self, action: np.ndarray):
        state, _, terminated, truncated, info = self.env.step(action)
        position = state["achieved_goal"]
        reward = 10 * (self.way - math.dist(position, state["desired_goal"]) + info["success"])
        self.way = math.dist(position, self.unwrapped.goal)  # which is a new one after a success
        info["cost"] = float(self.distances(position).min() < self.RADIUS)
        return self.observe(state), reward, terminated, truncated, info

    def distances(self, position: np.ndarray) -> np.ndarray:
        return np.linalg.norm(self.hazards - position, axis=1)

    def observe(self, state: dict) -> np.ndarray:
        position, goal = state["achieved_goal"], self.unwrapped.goal  # the state keeps a goal that was just reached
        offsets = self.hazards - position
        angles = np.arctan2(offsets[:, 1], offsets[:, 0])
        sectors = np.floor(angles / (2 * np.pi) * self.NUM_SECTORS).astype(int) % self.NUM_SECTORS
        lidar = np.zeros(self.NUM_SECTORS)
        np.maximum.at(lidar, sectors, 1 - self.distances(position) / self.RANGE)
        return np.concatenate([state["observation"], goal - position, lidar])

    def render(self):
        import mujoco  # late, as in `make_task`

        viewer = self.unwrapped.point_env.mujoco_renderer._get_viewer(self.render_mode)
        for hazard in self.hazards:  # the next picture shows them, and forgets them; of a cylinder, radius and half its height
            viewer.add_marker(type=mujoco.mjtGeom.mjGEOM_CYLINDER, size=np.array([self.RADIUS, 0.01, 0.0]),
                              pos=np.array([*hazard, 0.0]), rgba=np.array([0.9, 0.6, 0.1, 1.0]), label="")  # fmt: skip
        return self.env.render()


def make_task(env_id: str, render_mode: str | None) -> gym.Env:
    """The environment with that id, without a time limit of its own, and without what its packages print on the way."""
    # A cluster node has no display, but it can draw with EGL. MuJoCo reads MUJOCO_GL when it is imported.
    if render_mode and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    options = {"render_mode": render_mode, "max_episode_steps": -1, "disable_env_checker": True}
    if env_id != MAZE_TASK and env_id not in VELOCITY_TASKS:
        return gym.make(env_id, **options)
    import mujoco

    warn = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)  # HalfCheetah's file has an attribute that MuJoCo will drop
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # "v4 is out of date", and news of the maze's package
            if env_id in VELOCITY_TASKS:
                robot, limit = VELOCITY_TASKS[env_id]
                return VelocityCost(gym.make(robot, **options), limit)
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
            env = gym.make("PointMaze_Open-v3", maze_map=HazardMaze.MAP, reset_target=True, **options)
            os.remove(env.unwrapped.tmp_xml_file_path)  # which the package leaves behind
            return HazardMaze(env)
    finally:
        mujoco.set_mju_user_warning(warn)


class ConstrainedTask(gym.Env):
    """What the algorithm sees of an environment: vectors of float32, actions in [-1, 1], and `info["cost"]` at every step.

    The cost is `info["cost"]` of the environment, or the third of six values, as Safety-Gymnasium's own interface has it. At
    the end of an episode `info["episode"]` holds the return "r", the length "l" and the sum of the costs "cost". The time
    limit truncates, and so bootstraps.

    Every episode begins from a seed of its own. So a checkpoint keeps no state of the physics, but that seed and the actions
    since; played again, they bring the environment exactly to where it was, whatever it is made of.
    """

    KEPT = ("np_random", "episode")

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.env_id, self.env, self.render_mode = env_id, make_task(env_id, render_mode), render_mode
        self.metadata, self.time_limit = self.env.metadata, episode_limit(env_id) or math.inf
        if not (isinstance(self.env.action_space, gym.spaces.Box) and self.env.action_space.is_bounded()):
            raise RunError(f"{env_id} has no continuous actions within bounds")
        observation_dim = gym.spaces.flatdim(self.env.observation_space)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.low, self.high = (bound.astype(np.float64) for bound in (self.env.action_space.low, self.env.action_space.high))
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.low.size,), np.float32)
        self.episode_seed, self.actions, self.observation = 0, [], np.zeros(observation_dim, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return self.begin(int(self.np_random.integers(2**31))), {}

    def begin(self, seed: int) -> np.ndarray:
        """A new episode; returns its first observation."""
        self.episode_seed, self.actions, self.episodic_return, self.episodic_cost = seed, [], 0.0, 0.0
        return self.observe(self.env.reset(seed=seed)[0])

    def step(self, action: np.ndarray):
        self.actions.append(np.array(action, np.float32))
        action = self.low + (action.reshape(self.low.shape).astype(np.float64) + 1) / 2 * (self.high - self.low)
        observation, reward, *costs, terminated, truncated, info = self.env.step(action.astype(self.env.action_space.dtype))
        if not costs and "cost" not in info:
            raise RunError(f'{self.env_id} reports no cost: its step() gives neither info["cost"] nor six values')
        cost = float(costs[0] if costs else info["cost"])
        self.episodic_return += float(reward)
        self.episodic_cost += cost
        terminated, truncated = bool(terminated), bool(truncated) or len(self.actions) >= self.time_limit
        info = {"cost": cost}
        if terminated or truncated:
            info["episode"] = {"r": self.episodic_return, "l": len(self.actions), "cost": self.episodic_cost}
        return self.observe(observation), float(reward), terminated, truncated, info

    def observe(self, observation) -> np.ndarray:
        """The observation as a vector, (observation_dim,) float32."""
        self.observation = gym.spaces.flatten(self.env.observation_space, observation).astype(np.float32)
        return self.observation

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()

    @property
    def episode(self) -> dict:
        """What leads to the present moment of the episode, in plain values and tensors."""
        actions = np.array(self.actions, np.float32).reshape(-1, *self.action_space.shape)
        return {"seed": self.episode_seed, "actions": torch.from_numpy(actions), "observation": torch.tensor(self.observation)}

    @episode.setter
    def episode(self, episode: dict) -> None:
        self.begin(episode["seed"])
        for action in episode["actions"].numpy():
            self.step(action)
        if not np.array_equal(self.observation, episode["observation"].numpy(), equal_nan=True):
            raise RunError(f"{self.env_id} does not play the same episode again from its seed: the run would not go on exactly")


def make_env(args: Args, video_folder: str | None = None) -> gym.Env:
    """The task, with actions in [-1, 1]."""
    env = ConstrainedTask(args.env_id, "rgb_array" if video_folder else None)
    return record_video(env, video_folder) if video_folder else env


def check_environment(args: Args) -> tuple[gym.Space, gym.Space]:
    """Refuses what is no task, has no cost, or cannot be drawn where that is asked for, and returns the spaces."""
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for one step of {args.num_envs} environments")
    if args.env_id == MAZE_TASK and importlib.util.find_spec("gymnasium_robotics") is None:
        fail(f"--env-id {args.env_id} needs the package gymnasium-robotics: pip install gymnasium-robotics")
    try:
        env = ConstrainedTask(args.env_id, "rgb_array" if args.capture_video else None)
        env.reset(seed=args.seed)
        env.step(np.zeros(env.action_space.shape, np.float32))
    except RunError as error:
        fail(f"--env-id {error}")
    except gym.error.UnregisteredEnv:
        tasks = [MAZE_TASK, *VELOCITY_TASKS]
        near = difflib.get_close_matches(args.env_id, tasks, n=1, cutoff=0.5)
        fail(
            f"--env-id {args.env_id} is no environment; "
            + (f"did you mean {near[0]}?" if near else f"examples are {tasks[0]} and {tasks[1]}")
        )
    except Exception as error:  # of another package, or of one that is missing
        fail(f"--env-id {args.env_id} does not start: {one_line(error)}")
    if args.capture_video:
        try:
            env.render()
        except Exception as error:  # MuJoCo's three ways to draw have an error of their own each
            fail(f"--capture-video finds no way to draw with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({one_line(error)}); "
                 "install EGL (Debian: libegl1, libgl1-mesa-dri) and set MUJOCO_GL=egl")  # fmt: skip
    env.close()
    return env.observation_space, env.action_space


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def normalized_scores(env_id: str, score: float) -> dict[str, float]:
    """None: return means little without cost, and no task has a score that everybody is measured by."""
    return {}


# ------------------------------------------------------------------------------------------------------ replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, to be drawn uniformly; each is one row of float32 on `device`.

    A row is observation, action, reward, cost, terminated, next observation. The next observation is stored with every
    transition, so that a truncated one bootstraps from its own last observation and not from the next episode's first.
    """

    # num_added before used_rows, whose length it decides.
    KEPT = ("num_added", "size", "used_rows")

    def __init__(
        self,
        capacity: int,
        observation_space: gym.Space,
        action_space: gym.Space,
        device: torch.device,
        generator: torch.Generator,
    ):
        self.capacity, self.device, self.generator = capacity, device, generator
        self.widths = self.row_widths(observation_space, action_space)
        self.rows = torch.zeros((capacity, sum(self.widths)), dtype=torch.float32, device=device)
        self.num_added = 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device: a captured CUDA graph draws from it

    @staticmethod
    def row_widths(observation_space: gym.Space, action_space: gym.Space) -> list[int]:
        return [observation_space.shape[0], action_space.shape[0], 1, 1, 1, observation_space.shape[0]]

    @staticmethod
    def num_bytes(args: Args, observation_space: gym.Space, action_space: gym.Space) -> int:
        return args.buffer_size * 4 * sum(ReplayBuffer.row_widths(observation_space, action_space))

    @property
    def used_rows(self) -> torch.Tensor:
        """The rows that have been written, without a copy."""
        return self.rows[: min(self.num_added, self.capacity)]

    def add(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: float,
        cost: float,
        terminated: bool,
        next_observation: np.ndarray,
    ) -> None:
        """Stores a transition, over the oldest one if there is no room left."""
        row = np.concatenate([observation, action, [reward, cost, terminated], next_observation], dtype=np.float32)
        upload(row, self.rows[self.num_added % self.capacity])
        self.num_added += 1
        self.size.fill_(min(self.num_added, self.capacity))

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """Draws transitions uniformly, with replacement, all float32.

        Returns observations (batch_size, observation_dim), actions (batch_size, action_dim), rewards, costs and terminated
        (batch_size,) and next observations (batch_size, observation_dim).
        """
        draws = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=self.generator)
        rows = self.rows.index_select(0, (draws * self.size).long())  # (batch_size, sum of the widths)
        observations, actions, rewards, costs, terminated, next_observations = rows.split(self.widths, dim=1)
        return observations, actions, rewards.squeeze(1), costs.squeeze(1), terminated.squeeze(1), next_observations


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
        self.tensor, self.event = tensor, None
        if tensor.is_cuda:
            self.tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.tensor.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

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


def evaluate(
    policy, envs: list[gym.Env], seed: int, global_step: int, device: torch.device, stop: "StopSignal"
) -> list[dict] | None:
    """Plays one whole episode in each environment, side by side, and returns their `info["episode"]` (None if stopped).

    `policy` maps observations (batch, ...) to actions (batch, ...). The results depend on the policy, the seed and the step
    alone: the environments are seeded anew (Atari games are loaded anew: some keep state from one game to the next), and the
    random numbers are their own. So an evaluation changes nothing in the training, and the two around a reset play from
    the same starts.
    """
    observations, episodes, playing = [], [{}] * len(envs), list(range(len(envs)))
    for i, env in enumerate(envs):
        if stop.received:
            return None
        observations.append(env.reset(seed=derive_seed(seed, EVALUATION, global_step, i))[0])
    while playing:
        if stop.received:
            return None
        actions = policy(torch.from_numpy(np.stack([observations[i] for i in playing])).to(device)).cpu().numpy()
        for i, action in zip(tuple(playing), actions):
            observations[i], _, terminated, truncated, info = envs[i].step(action)
            if (terminated or truncated) and "episode" not in info:  # a life is lost, the game goes on
                observations[i], info = envs[i].reset()
            if "episode" in info:
                episodes[i] = info["episode"]
                playing.remove(i)
    return episodes


def record_video(env: gym.Env, folder: str, fps: int | None = None) -> gym.Env:
    """The environment, of which `Run.evaluate` records the first episode of every evaluation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "overwriting existing videos": an evaluation that is played again does
        return gym.wrappers.RecordVideo(env, folder, episode_trigger=lambda episode: True, fps=fps, disable_logger=True)


# ------------------------------------------------------------------------------------------------- what a run consists of

SCRIPT = os.path.basename(__file__)
with open(__file__, "rb") as script_file:
    SCRIPT_SHA256 = hashlib.sha256(script_file.read()).hexdigest()

LOG_INTERVAL = 100  # environment steps between two points of the training curves
NOT_SAVED = ("resume", "allow_changed_script", "check_only")  # arguments of a command, not of a run
WHAT_STAYS = "what was written stays, and the run can be continued from its last checkpoint with --resume"
FINISHED, INTERRUPTED, UNDER_WAY = range(3)
EXIT_CODE_UNDER_WAY = 75  # another process is at the run (EX_TEMPFAIL of sysexits.h)


class RunError(Exception):
    """Something that its message explains to the person who typed the command, without a stack trace."""


def state_of(part):
    """What a checkpoint keeps of a part of a run, as `torch.load` reads it without executing anything.

    A class names the attributes that have to be kept in KEPT, in the order in which they are restored. PyTorch's modules,
    optimizers and generators, NumPy's generators, arrays and tensors keep themselves; everything else has to be a plain value.
    """
    if hasattr(part, "KEPT"):
        return {name: state_of(getattr(part, name)) for name in part.KEPT}
    if isinstance(part, list) and part and hasattr(part[0], "KEPT"):
        return [state_of(item) for item in part]
    if isinstance(part, (nn.Module, optim.Optimizer)):
        return part.state_dict()
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, np.random.Generator):
        return part.bit_generator.state
    if isinstance(part, torch.Tensor):  # through NumPy, because of a view torch.save would write the whole memory
        return torch.from_numpy(part.detach().cpu().numpy())
    return torch.from_numpy(part) if isinstance(part, np.ndarray) else part


def restored(part, state):
    """The part as it was kept: the same object, in place (captured CUDA graphs hold addresses), or a plain value."""
    if hasattr(part, "KEPT"):
        for name in part.KEPT:
            attribute = getattr(part, name)
            if (value := restored(attribute, state[name])) is not attribute:
                setattr(part, name, value)
    elif isinstance(part, list) and part and hasattr(part[0], "KEPT"):
        for item, item_state in zip(part, state, strict=True):
            restored(item, item_state)
    elif isinstance(part, (nn.Module, optim.Optimizer)):
        part.load_state_dict(state)
    elif isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, np.random.Generator):
        part.bit_generator.state = state
    elif isinstance(part, torch.Tensor):
        part.copy_(state)
    elif isinstance(part, np.ndarray):
        part[...] = state.numpy()
    else:
        return state
    return part


class StopSignal:
    """Remembers SIGTERM (from a cluster's scheduler) or SIGINT (Ctrl-C); the second one ends the process at once."""

    def __init__(self):
        self.received, self.time = 0, math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        self.received, self.time = number, time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


class Run:
    """A run: its folder, logs, checkpoints and counters, its evaluations, and the signal that stops it.

    In the folder: args.json, TensorBoard events, episodes.csv, evaluations.csv, checkpoint.pt, model.pt, models/, videos/.
    """

    KEPT = ("global_step", "gradient_steps", "num_episodes", "agenda", "last_returns", "speed_steps", "speed_seconds",
            "wall_seconds")  # fmt: skip
    progress: tqdm | None = None  # a process has one bar, and closes it before it says its last line

    def __init__(self, args: Args, path: str | None = None):
        """Makes the folder, or takes that of an interrupted run, in which nothing is changed before `restore`."""
        self.args, self.stop = args, StopSignal()
        self.device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
        self.captures = args.cuda_graphs and self.device.type == "cuda"
        torch.backends.cudnn.deterministic = args.torch_deterministic
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # Where a unit is dead, Adam's moments fade into denormal numbers, with which a CPU is ten times slower. They become 0.
        torch.set_flush_denormal(True)
        self.columns = episode_columns(args)
        self.global_step, self.gradient_steps, self.num_episodes = 0, 0, 0
        self.agenda: list[str] = []  # what is to be done before the next step, see `attend` and `train`
        self.last_returns: list[float] = []
        self.speed_steps, self.speed_seconds = 0, 0.0  # since learning began, without evaluations
        self.wall_seconds = 0.0
        self.eval_envs: list[gym.Env] = []
        if path is None:
            with new_run_folder(args) as self.path:
                self.lock = lock_folder(self.path)
                self.write_args()
        else:
            self.path, self.lock = path, lock_folder(path)
            if self.lock is None:
                leave_to_another_process(path)
            check_files(path)
            if is_finished(path):  # by a process that was at it when `resume_args` looked
                print(f"the run in {path} is finished already")
                sys.exit(0)

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    @property
    def wall_seconds(self) -> float:
        return time.time() - self.start_time

    @wall_seconds.setter
    def wall_seconds(self, seconds: float) -> None:
        self.start_time = time.time() - seconds

    @property
    def last_loop_step(self) -> int:
        """The environment steps before the last loop step, after which there is nothing but the final evaluation."""
        return (self.args.total_timesteps - 1) // self.args.num_envs * self.args.num_envs

    def make_envs(self, count: int, video_folder: str | None = None) -> list[gym.Env]:
        """That many environments, of which the first one can be recorded."""
        envs: list[gym.Env] = []
        while len(envs) < count:
            if self.stop.received:
                self.end(f"stopped before the run went on; to continue: {self.command_to_continue()}")
            envs.append(make_env(self.args, video_folder if not envs else None))
        return envs

    # ------------------------------------------------------------ begin, go on, end

    def restore(self, parts: dict) -> bool:
        """Opens the run's files for all that is to be logged. True if there is a checkpoint; all parts are then as at it."""
        self.eval_envs = self.make_envs(self.args.eval_episodes, self.file("videos") if self.args.capture_video else None)
        self.parts = {"run": self, "initialisation": torch.default_generator} | parts
        checkpoint = self.file("checkpoint.pt")
        if resumed := os.path.exists(checkpoint):
            content = load_checkpoint(checkpoint, self.args, self.device)
            for name, size in content["file_sizes"].items():
                if not os.path.exists(self.file(name)) or os.path.getsize(self.file(name)) < size:
                    raise RunError(f"{self.file(name)} is shorter than it was at the checkpoint, or gone: it is damaged")
            try:
                for name, part in self.parts.items():
                    restored(part, content["parts"][name])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                if is_lack_of_memory(error):
                    raise
                raise RunError(f"{checkpoint} does not fit this version of the script: {error!r}") from None
            if self.global_step < self.args.total_timesteps:  # if that was the end, it was postponed
                self.agenda = ["scheduled" if item == "final" else item for item in self.agenda]
            torch.set_num_threads(content["num_threads"])  # with another number sums are rounded in another order
        self.open(content["file_sizes"] if resumed else {})
        if resumed:
            tqdm.write(f"continuing {self.path} at step {self.global_step}, with {torch.get_num_threads()} thread(s) as before")
        Run.progress = tqdm(total=self.args.total_timesteps, initial=self.global_step, unit="step", smoothing=0.02,
                             mininterval=0.5 if sys.stderr.isatty() else 60)  # fmt: skip
        return resumed

    def open(self, file_sizes: dict[str, int]) -> None:
        """Opens the files, cut to the sizes that they had at the checkpoint ({} = from the beginning), to go on writing."""
        self.write_args()  # --total-timesteps may have been raised
        if self.args.track:
            import wandb

            identity = os.path.basename(os.path.normpath(self.path))
            wandb.init(project=self.args.wandb_project_name, entity=self.args.wandb_entity, name=identity, id=identity,
                       resume="allow", config=saved_arguments(self.args), sync_tensorboard=True)  # fmt: skip
        for path in filter(os.path.exists, self.growing_files()):
            if os.path.basename(path) in file_sizes:
                os.truncate(path, file_sizes[os.path.basename(path)])
            else:
                os.remove(path)
        columns = ("global_step", "episodic_return", "episodic_length", "wall_seconds", *self.columns)
        self.episodes = self.open_csv("episodes.csv", columns)
        columns = ("global_step", "phase", "episode", "episodic_return", *self.columns)
        self.evaluations = self.open_csv("evaluations.csv", columns)
        self.writer = SummaryWriter(self.path)
        atexit.register(self.flush_at_exit)

    def flush_at_exit(self) -> None:
        """However the process ends (but for a kill), what TensorBoard was told is written."""
        with contextlib.suppress(OSError):  # a full disk has been reported already
            self.writer.flush()

    def open_csv(self, name: str, columns: tuple[str, ...]):
        file = open(self.file(name), "a", newline="", buffering=1)  # every row is written as it ends
        rows = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            rows.writerow(columns)
        return rows

    def announce(self, agents: str, num_resets: int) -> None:
        """Says in one line what the run will do."""
        args, buffer_bytes = self.args, ReplayBuffer.num_bytes(self.args, *self.spaces())
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        threads = "" if self.device.type == "cuda" else f" ({torch.get_num_threads()} thread(s))"
        gradient_steps = gradient_steps_due(args, self.last_loop_step + args.num_envs)
        line = (f"{args.env_id}: {args.total_timesteps:,} steps on {device}{threads}, {agents}, "
                f"{gradient_steps:,} gradient steps, {num_resets} reset(s), "
                f"replay buffer {buffer_bytes / 1e9:.2f} GB")  # fmt: skip
        if self.speed_steps:  # of a run that goes on the speed is known
            seconds = (args.total_timesteps - self.global_step) * self.speed_seconds / self.speed_steps
            line += f", about {seconds / 60:.0f} min left"
        tqdm.write(f"{line}; in {self.path}")

    def spaces(self) -> tuple[gym.Space, gym.Space]:
        return self.eval_envs[0].observation_space, self.eval_envs[0].action_space

    def goes_on(self) -> bool:
        """Whether anything is left to do. Ends the process, after a checkpoint, if a signal asks for it."""
        if self.stop.received:
            self.save()
            self.end(f"stopped at step {self.global_step}; to continue: {self.command_to_continue()}")
        self.turn_started = time.perf_counter()
        return bool(self.agenda) or self.global_step < self.args.total_timesteps

    def command_to_continue(self) -> str:
        return f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(self.path)}"

    def end(self, message: str) -> None:
        """Ends the process as a shell expects of one that a signal ended."""
        self.close_progress()
        print(message, file=sys.stderr)
        sys.exit(128 + self.stop.received)

    @staticmethod
    def close_progress() -> None:
        if Run.progress is not None:
            Run.progress.close()

    def finish(self, weights: dict) -> None:
        """Leaves the weights and takes away the checkpoint, which is of no use any more."""
        self.close_progress()
        self.wait_for_disk()  # with model.pt the run is finished, and nothing is added any more
        self.write("model.pt", weights)
        remove_leftovers(self.path)
        self.writer.close()
        for env in self.parts["envs"] + self.eval_envs:
            env.close()
        tqdm.write(f"the run is in {self.path}")

    # ------------------------------------------------------------ what happens at a step

    def count_gradient_step(self) -> None:
        self.gradient_steps += 1
        if time.monotonic() > self.stop.time + 10:  # too many for one step: there is no state to save between them
            self.end(f"stopped in the middle of step {self.global_step}; {WHAT_STAYS} {shlex.quote(self.path)}")

    def count_step(self) -> None:
        self.progress.update(self.args.num_envs)
        if self.gradient_steps:
            self.speed_steps += self.args.num_envs
            self.speed_seconds += time.perf_counter() - self.turn_started

    def log_is_due(self) -> bool:
        return interval_has_passed(LOG_INTERVAL, self.global_step, self.args.num_envs)

    def upkeep_due(self) -> list[str]:
        """What `attend` has to do for the folder after the loop step that ends at the present step."""
        args, step, due = self.args, self.global_step, []
        if args.keep_models and interval_has_passed(Fraction(args.total_timesteps, args.keep_models), step, args.num_envs):
            due.append("weights")
        # A checkpoint at the end, too: a full disk or a kill before model.pt is written then loses nothing.
        if step >= args.total_timesteps or interval_has_passed(args.checkpoint_interval, step, args.num_envs):
            due.append("checkpoint")
        return due

    def attend(self, agent: "Agent") -> None:
        """Does the first item of the agenda, unless a signal stops it: keep weights, save a checkpoint, or evaluate."""
        if self.agenda[0] == "weights":
            os.makedirs(self.file("models"), exist_ok=True)
            self.write(f"models/step_{self.global_step:08d}.pt", agent.weights())
        elif self.agenda[0] == "checkpoint":
            self.agenda.pop(0)  # so that the checkpoint does not ask for itself
            try:
                self.save()
            except RunError as error:
                if self.global_step < self.args.total_timesteps:
                    raise
                tqdm.write(f"warning: {error}", file=sys.stderr)  # model.pt is smaller, and may fit
            return
        else:
            generator = torch.Generator(self.device).manual_seed(derive_seed(self.args.seed, EVALUATION, self.global_step))
            if not self.evaluate(self.agenda[0], agent.evaluation_policy(generator)):
                return
            if self.agenda[0] != "after_reset":  # a curve has one point at a step
                self.log_scalars(evaluation_scalars(agent))
        self.agenda.pop(0)

    def evaluate(self, phase: str, policy) -> bool:
        """False if a signal stopped it, and nothing was logged."""
        self.finite_metrics()
        recorder = self.eval_envs[0] if self.args.capture_video else None
        if recorder is not None:
            recorder.set_wrapper_attr("name_prefix", f"step-{self.global_step}-{phase}")
            recorder.set_wrapper_attr("episode_id", -1)
        try:
            episodes = evaluate(policy, self.eval_envs, self.args.seed, self.global_step, self.device, self.stop)
        finally:
            if recorder is not None and recorder.get_wrapper_attr("recording"):
                recorder.get_wrapper_attr("stop_recording")()
        if episodes is not None:
            self.log_evaluation(phase, episodes)
        return episodes is not None

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
        mean_return = f"{np.mean(self.last_returns):.1f}" if self.last_returns else "-"
        epsilon = f" epsilon={scalars['charts/epsilon']:.2f}" if "charts/epsilon" in scalars else ""
        speed = f"{scalars['charts/SPS']:.0f}" if "charts/SPS" in scalars else "-"
        self.progress.set_postfix_str(f"return={mean_return}{epsilon} SPS={speed}", refresh=False)

    def finite_metrics(self) -> np.ndarray:
        """The agent's metrics, on the host. Nothing is evaluated or saved once one of them is not finite."""
        agent = self.parts["agent"]
        metrics = agent.metrics.cpu().numpy()
        for name, values in zip(agent.METRICS, metrics):
            if not np.isfinite(values).all():
                raise FloatingPointError(
                    f"{name} is not finite any more at step {self.global_step} ({values.tolist()}); try a lower --learning-rate"
                )
        return metrics

    def log_episode(self, episode: dict) -> None:
        extra = {name: episode[name] for name in self.columns}
        wall_seconds = f"{self.wall_seconds:.2f}"
        self.episodes.writerow((self.global_step, episode["r"], episode["l"], wall_seconds, *extra.values()))
        self.num_episodes += 1
        self.last_returns = [*self.last_returns[-9:], episode["r"]]
        self.log_scalars({"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]})
        self.log_scalars({f"charts/episodic_{name}": value for name, value in extra.items()})

    def log_evaluation(self, phase: str, episodes: list[dict]) -> None:
        for i, episode in enumerate(episodes):
            extra = [episode[name] for name in self.columns]
            self.evaluations.writerow((self.global_step, phase, i, episode["r"], *extra))
        returns = [episode["r"] for episode in episodes]
        scalars = normalized_scores(self.args.env_id, float(np.mean(returns)))
        scalars |= {f"episodic_{name}": float(np.mean([episode[name] for episode in episodes])) for name in self.columns}
        line = f"evaluation ({phase.replace('_', ' ')}) mean {np.mean(returns):.1f}"
        for name, value in scalars.items():
            line += f", {name.replace('_', ' ')} {value:.3f}"
        self.say(f"{line}, episodes {' '.join(f'{score:g}' for score in returns)}")
        scalars["episodic_return"] = float(np.mean(returns))
        # A curve has one point at a step: what a reset cost stands in curves of its own.
        if phase in ("before_reset", "after_reset"):
            self.log_scalars({f"eval_{phase}/{name}": value for name, value in scalars.items()})
        if phase != "after_reset":
            self.log_scalars({f"eval/{name}": value for name, value in scalars.items()})

    def write_args(self) -> None:
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        content = {"script": SCRIPT, "script_sha256": SCRIPT_SHA256} | commit_of_script()
        content |= {"args": saved_arguments(self.args), "versions": package_versions(), "device": device}
        with replaced_when_written(self.file("args.json")) as file:
            file.write(json.dumps(content, indent=2).encode())

    def write(self, name: str, content: dict) -> None:
        """Replaces model.pt, models/... or the checkpoint; the old one stays until the new one is on the disk."""
        try:
            with replaced_when_written(self.file(name)) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # a full disk is the one or the other
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise RunError(f"{self.file(name)} was not written: {reason}, {free_space(self.path)}; {WHAT_STAYS}") from error

    # ------------------------------------------------------------ checkpoints

    def growing_files(self) -> list[str]:
        events = sorted(glob.glob(os.path.join(glob.escape(self.path), "events.out.tfevents.*")))
        return events + [self.file("episodes.csv"), self.file("evaluations.csv")]

    def wait_for_disk(self) -> None:
        """Until all that was logged is on the disk."""
        self.writer.flush()
        for path in self.growing_files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def file_sizes(self) -> dict[str, int]:
        """The sizes of the files that grow, so much of which is on the disk."""
        self.wait_for_disk()
        return {os.path.basename(path): os.path.getsize(path) for path in self.growing_files()}

    def save(self) -> None:
        """Replaces the checkpoint."""
        self.finite_metrics()
        self.write("checkpoint.pt", {
            "script": SCRIPT, "script_sha256": SCRIPT_SHA256, "args": saved_arguments(self.args),
            "versions": package_versions() | {"device": self.device.type}, "num_threads": torch.get_num_threads(),
            "file_sizes": self.file_sizes(), "parts": {name: state_of(part) for name, part in self.parts.items()},
        })  # fmt: skip


def load_checkpoint(path: str, args: Args, device: torch.device) -> dict:
    """What `Run.save` wrote. Nothing in the file is executed; `RunError` if it is not this run's, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch does not look at the checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        for name in ("script", "script_sha256", "args", "versions", "num_threads", "file_sizes", "parts"):
            content[name]
    except pickle.UnpicklingError:
        raise RunError(f"{path} holds more than numbers and tensors, and was not loaded") from None
    except Exception as error:  # a flipped bit can have any consequence
        if is_lack_of_memory(error):
            raise
        reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise RunError(f"{path} is damaged, cut off, or of another version of the scripts{reason}") from None
    if content["script"] != SCRIPT:
        raise RunError(f"{path} was written by {content['script']}, not by {SCRIPT}")
    if content["script_sha256"] != SCRIPT_SHA256 and not args.allow_changed_script:
        refuse_changed_script(path)
    for name, value in saved_arguments(args).items():
        if name not in ("runs_dir", "total_timesteps") and content["args"].get(name) != value:
            raise RunError(f"{path} was written with {name} = {content['args'].get(name)}, but args.json says {value}")
    for name, value in (package_versions() | {"device": device.type}).items():
        if (written := content["versions"].get(name)) != value:
            raise RunError(f"{path} was written with {name} {written}, but here is {value}: the run would not go on exactly")
    return content


@contextlib.contextmanager
def replaced_when_written(path: str):
    """A binary file that takes the place of `path` when it is wholly on the disk; until then the old one stays."""
    try:
        with open(path + ".tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)  # the new name, too
        os.close(folder)
    except BaseException:
        if os.path.isfile(path + ".tmp"):
            os.remove(path + ".tmp")
        raise


def free_space(path: str) -> str:
    return f"{shutil.disk_usage(path).free / 1e6:.0f} MB are free"


# ---------------------------------------------------------------------------------------------------- folders of runs


@contextlib.contextmanager
def new_run_folder(args: Args):
    """A new folder. Until the context is left, in which it gets its args.json, no other process begins a run there.

    Runs of one script, environment and seed that start in the same second wait for the next.
    """
    try:
        os.makedirs(args.runs_dir, exist_ok=True)
        lock = lock_folder(args.runs_dir, wait=True)
        if args.resume == "auto" and (found := find_run(args)) is not None:  # begun since `main` looked
            leave_to_another_process(found[0])
        while os.path.lexists(path := os.path.join(args.runs_dir, f"{run_name(args)}__{time.strftime('%Y%m%d-%H%M%S')}")):
            time.sleep(0.2)
        os.mkdir(path)
    except OSError as error:
        fail(f"a run folder in --runs-dir {args.runs_dir} cannot be made: {error.strerror}")
    try:
        yield path
    finally:
        os.close(lock)


def run_name(args: Args) -> str:
    return f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}"


def lock_folder(path: str, wait: bool = False) -> int | None:
    """Keeps other processes out for as long as the descriptor is open. None if another process was first."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(folder)
        return None
    return folder


def leave_to_another_process(path: str) -> None:
    print(f"another process is at work in {path}", file=sys.stderr)
    sys.exit(EXIT_CODE_UNDER_WAY)


def check_files(path: str) -> None:
    """Refuses a folder in which something else stands in the place of a run's files: a folder, a link to nothing, ..."""
    for name in ("args.json", "episodes.csv", "evaluations.csv", "checkpoint.pt", "model.pt"):
        for file in (os.path.join(path, name), os.path.join(path, f"{name}.tmp")):
            if os.path.lexists(file) and not os.path.isfile(file):
                raise RunError(f"{file} is in the way: it is not a file, or a link to nothing")


def is_finished(path: str) -> bool:
    return os.path.isfile(os.path.join(path, "model.pt"))


def remove_leftovers(path: str) -> None:
    """Of a finished run, also of one that was killed after it had written its weights."""
    for name in ("checkpoint.pt", "checkpoint.pt.tmp"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, name))


def saved_arguments(args: Args) -> dict:
    return {name: value for name, value in vars(args).items() if name not in NOT_SAVED}


def find_run(args: Args) -> tuple[str, int] | None:
    """The run folder with the same script and arguments, and its state; the newest interrupted one if none is finished."""
    pattern = os.path.join(glob.escape(args.runs_dir), f"{glob.escape(run_name(args))}__*", "args.json")
    paths, found = glob.glob(pattern), []
    for path in sorted(map(os.path.dirname, paths)):  # the names end in the time of the start
        try:
            saved = read_args(path, args.allow_changed_script)
        except RunError:
            continue
        if saved_arguments(dataclasses.replace(saved, runs_dir=args.runs_dir)) == saved_arguments(args):
            state = FINISHED if is_finished(path) else UNDER_WAY if is_locked(path) else INTERRUPTED
            found.append((path, state))
    for wanted in (FINISHED, UNDER_WAY, INTERRUPTED):
        for path, state in reversed(found):
            if state == wanted:
                return path, state
    return None


def is_locked(path: str) -> bool:
    if (lock := lock_folder(path)) is None:
        return True
    os.close(lock)
    return False


def read_args(path: str, allow_changed_script: bool = False) -> Args:
    """The arguments of the run in a folder; `RunError` if it is not one of this script."""
    try:
        check_files(path)
        with open(os.path.join(path, "args.json")) as file:
            content = json.load(file)
        script, sha256, saved = content["script"], content["script_sha256"], content["args"]
        if script != SCRIPT:
            raise RunError(f"{path} is a run folder of {script}, not of {SCRIPT}")
        if sha256 != SCRIPT_SHA256 and not allow_changed_script:
            refuse_changed_script(path)
        args = Args(**saved)
        if saved_arguments(args).keys() != saved.keys():
            raise KeyError
        if message := wrong_value(args):
            raise RunError(f"{path} is not a run folder any more: in its args.json {message}")
        return args
    except OSError as error:
        raise RunError(f"{path} is not a run folder: args.json: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunError(f"{path} is not a run folder of {SCRIPT}: its args.json does not fit") from None


def refuse_changed_script(path: str) -> None:
    raise RunError(f"{path} is of another version of {SCRIPT}: the run would go on with changed code; "
                   "if that is meant: --allow-changed-script")  # fmt: skip


def resume_args(args: Args, path: str) -> Args:
    """The arguments of the run in the folder. Only --total-timesteps may be given anew, and only be raised."""
    command = {name: getattr(args, name) for name in NOT_SAVED}
    saved = dataclasses.replace(read_args(path, args.allow_changed_script), **command)
    args = dataclasses.replace(tyro.cli(Args, description=__doc__, default=saved), runs_dir=saved.runs_dir)
    for name, value in vars(saved).items():
        if name != "total_timesteps" and getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} differs from the {value} of the run in {path}; "
                 "a resumed run keeps its arguments, only --total-timesteps may be raised")  # fmt: skip
    if args.total_timesteps < saved.total_timesteps:
        fail(f"--total-timesteps {args.total_timesteps} is less than the run's {saved.total_timesteps}; it may only be raised")
    if is_finished(path):
        if args.total_timesteps > saved.total_timesteps:
            fail(f"the run in {path} is finished, and its replay buffer is gone: --total-timesteps cannot be raised any more")
        remove_leftovers(path)
        print(f"the run in {path} is finished already")
        sys.exit(0)
    if args.total_timesteps > saved.total_timesteps:
        print(f"warning: with --total-timesteps {args.total_timesteps} instead of {saved.total_timesteps} what is a fraction of "
              "the run, as the decay of epsilon, is another one from here on", file=sys.stderr)  # fmt: skip
    return args


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__}
    return versions | {"gymnasium": gym.__version__} | environment_versions()


def commit_of_script() -> dict:
    """The commit that the script lies at, and whether it was changed since; None outside of a git checkout."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        git = lambda *words: subprocess.run(
            ["git", "--no-optional-locks", "-C", folder, *words], capture_output=True, text=True, timeout=10, check=True
        )
        commit = git("rev-parse", "HEAD").stdout.strip()
        return {"commit": commit, "changed_since_commit": bool(git("status", "--porcelain", "--", SCRIPT).stdout)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed_since_commit": None}


# ----------------------------------------------------------------------------------------------- arguments, and the start


def interval_has_passed(interval: int | Fraction, global_step: int, num_envs: int) -> bool:
    """Whether the loop step that ends at `global_step` reached or passed a multiple of the interval; 0 = never."""
    return interval > 0 and global_step // interval > (global_step - num_envs) // interval


def fail(message: str) -> None:
    """Ends the program because of a wrong argument: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def wrong_value(args: Args) -> str | None:
    """What is wrong with the first value that is not of its argument's type, or not in the interval written beside it."""
    for name, hint in typing.get_type_hints(Args, include_extras=True).items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        kind, *intervals = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if typing.get_origin(kind) is Literal:
            if value not in typing.get_args(kind):
                return f"{flag} is {value!r}, but must be one of {', '.join(typing.get_args(kind))}"
        elif type(value) not in {float: (float, int)}.get(kind, typing.get_args(kind) or (kind,)):
            return f"{flag} is {value!r}, but must be of the type {getattr(kind, '__name__', kind)}"
        endless = value == math.inf and any(interval.endswith("inf]") for interval in intervals)
        if isinstance(value, (float, int)) and not abs(value) < 1e30 and not endless:
            return f"{flag} is {value if isinstance(value, float) else 'a number'}, but must be a finite number below 1e30"
        for interval in intervals if value is not None else ():  # as "[0, 1)"
            low, high = map(float, interval[1:-1].split(", "))
            if not (low <= value <= high and (value > low or interval[0] == "[") and (value < high or interval[-1] == "]")):
                return f"{flag} is {value}, but must lie in {interval}"
    return None


def check_args(args: Args) -> None:
    """Refuses what cannot work before anything is created."""
    if message := wrong_value(args):
        fail(message)
    if not args.exp_name or "/" in args.exp_name:
        fail(f"--exp-name is {args.exp_name!r}, but must be a part of a folder's name")
    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} leaves nothing of --total-timesteps {args.total_timesteps} to learn in")
    limit = "--learning-starts" if args.learning_starts <= args.buffer_size else "--buffer-size"
    if args.batch_size > min(args.learning_starts, args.buffer_size):
        fail(f"--batch-size {args.batch_size} is more than the {min(args.learning_starts, args.buffer_size)} transitions "
             f"that are stored when learning starts; lower it, or raise {limit}")  # fmt: skip
    for name in ("eval_interval", "checkpoint_interval"):
        if 0 < getattr(args, name) < args.num_envs:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is shorter than one loop step of {args.num_envs} "
                 f"environments; use at least {args.num_envs}, or 0")  # fmt: skip
    check_schedules(args)
    for flag, wanted, package in (("--track", args.track, "wandb"), ("--capture-video", args.capture_video, "moviepy")):
        if wanted and importlib.util.find_spec(package) is None:
            fail(f"{flag} needs the package {package}: pip install {package}")

    spaces = check_environment(args)
    on_gpu = args.cuda and torch.cuda.is_available()
    buffer_bytes, agent_bytes = ReplayBuffer.num_bytes(args, *spaces), Agent.num_bytes(args, *spaces)
    environment_bytes = ENVIRONMENT_BYTES * (args.num_envs + args.eval_episodes)
    check_memory(psutil.virtual_memory().available, "in memory", {
        "the environments of --num-envs and --eval-episodes": environment_bytes,
        "the replay buffer of --buffer-size": 0 if on_gpu else buffer_bytes, "the agents": 0 if on_gpu else agent_bytes,
    })  # fmt: skip
    if on_gpu:
        check_memory(torch.cuda.mem_get_info()[0], "on the GPU", {
            "the replay buffer of --buffer-size": buffer_bytes, "the agents": agent_bytes,
        })  # fmt: skip


def check_memory(free_bytes: int, where: str, needed: dict[str, int]) -> None:
    if sum(needed.values()) > free_bytes:
        parts = ", ".join(f"{part} {size / 1e9:.2f} GB" for part, size in needed.items() if size)
        fail(
            f"the run needs {sum(needed.values()) / 1e9:.2f} GB ({parts}), but only {free_bytes / 1e9:.2f} GB are free {where}"
        )


def main() -> None:
    args, path = tyro.cli(Args, description=__doc__), None
    try:
        if args.resume == "auto":
            if (found := find_run(args)) is not None:
                path, state = found
                if state == UNDER_WAY:
                    leave_to_another_process(path)
        elif args.resume:
            path = args.resume
        if path is not None:
            args = resume_args(args, path)
        check_args(args)
        if not args.check_only:
            train(args, path)
    except (RunError, FloatingPointError) as error:
        give_up(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        reason = (str(error) or "MemoryError").splitlines()[0]
        give_up(f"out of memory ({reason}); try a smaller --batch-size, --buffer-size or --num-envs")
    except OSError as error:  # a full disk, a folder that cannot be written
        give_up(f"{error}; {WHAT_STAYS}")


def is_lack_of_memory(error: Exception) -> bool:
    """On a CPU PyTorch raises a plain RuntimeError."""
    known = re.search("out of memory|allocate memory", str(error)) if isinstance(error, RuntimeError) else None
    return isinstance(error, MemoryError) or known is not None


def give_up(message: str) -> None:
    """Ends a run that cannot go on: one line, exit code 1."""
    Run.close_progress()
    sys.exit(f"error: {message}")


if __name__ == "__main__":
    main()
