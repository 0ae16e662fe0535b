"""Reset deep ensemble of DQN agents (RDE+DQN) with MLPs: MiniGrid, LunarLander, CartPole, and other flat observations.

N agents learn from one replay buffer. They are reset one after another against primacy bias, and act as one: every agent
proposes its greedy action, and the oldest agent, whose last reset is longest ago, judges the proposals with its Q-values. The
baselines are this script, too: SR+DQN is `--num-agents 1`, DQN `--num-agents 1 --reset-interval 0`.

    python rde_dqn.py --env-id MiniGrid-LavaGapS5-v0

In two minutes, to see everything happen once (with two resets):

    python rde_dqn.py --env-id MiniGrid-LavaGapS5-v0 --total-timesteps 15000 --reset-interval 6000 --eval-interval 3000

The defaults are MiniGrid's. To land on the moon:

    python rde_dqn.py --env-id LunarLander-v3 --num-hidden-layers 2 --learning-rate 6.3e-4 --batch-size 128
        --buffer-size 50000 --gamma 0.99 --target-update-interval 250 --replay-ratio 1 --exploration-fraction 0.12
        --eval-epsilon 0 --reset-interval 80000

Kim, Shin, Park, Sung, "Sample-Efficient and Safe Deep RL via Reset Deep Ensemble Agents", NeurIPS 2023 (arXiv 2310.20287).
DQN: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015.

Where is what:
    Args                          every argument, its meaning and its range
    QNetwork                      the network
    selection_probabilities, ...  which agent acts
    Agent                         act, update, reset
    epsilon_at, ...               how much is explored; when there is a gradient step, a reset, an evaluation
    train                         the training loop
    -- the line --                below it nothing is of the algorithm
    MiniGridView, Task            the environment
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
import functools
import glob
import hashlib
import importlib
import importlib.metadata
import importlib.util
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
    env_id: str = "MiniGrid-LavaGapS5-v0"
    """the environment; one that is registered by a module of yours: module:MyTask-v0"""
    actions: Literal["all", "move"] = "all"
    """MiniGrid: all seven actions, or left, right and forward alone, where they suffice (not in GoToDoor)"""
    max_episode_steps: Annotated[int, "[-1, inf)"] = -1
    """steps after which an episode is cut off; 0 = the task's own limit, -1 = 100 in MiniGrid (the paper's), elsewhere as 0"""
    total_timesteps: Annotated[int, "[1, inf)"] = 100_000
    """environment steps of the whole run"""
    num_envs: Annotated[int, "[1, inf)"] = 1
    """environments that are advanced together, once in a loop step"""

    # ------------------------------------------------------------ learning
    replay_ratio: Annotated[float, "(0, inf)"] = 0.5
    """gradient steps per environment step; fractions are allowed (sensible: 0.25 to 8)"""
    learning_starts: Annotated[int, "[1, inf)"] = 1_000
    """environment steps before the first gradient step"""
    buffer_size: Annotated[int, "[1, inf)"] = 100_000
    """transitions in the replay buffer"""
    batch_size: Annotated[int, "[1, inf)"] = 64
    """transitions in a mini-batch (sensible: 32 to 256)"""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """the optimizer (the paper's MiniGrid: rmsprop)"""
    learning_rate: Annotated[float, "(0, inf)"] = 3e-4
    """learning rate of the optimizer (sensible: 1e-4 to 1e-3)"""
    gamma: Annotated[float, "[0, 1]"] = 0.95
    """discount factor (sensible: 0.95 in MiniGrid, 0.99 elsewhere)"""
    target_update_interval: Annotated[int, "[0, inf)"] = 100
    """gradient steps between two copies of the online into the target network; 0 = none, the target moves by --tau
    (sensible: 100 to 1,000)"""
    tau: Annotated[float, "[0, 1]"] = 0.0
    """how far the target network moves towards the online network after a gradient step; 0 = not at all, it is copied
    every --target-update-interval (sensible: 0.001 to 0.02)"""
    max_grad_norm: Annotated[float, "(0, inf)"] = 10.0
    """the norm at which an agent's gradient is clipped"""
    hidden_dim: Annotated[int, "[1, inf)"] = 256
    """width of the hidden layers"""
    num_hidden_layers: Annotated[int, "[1, inf)"] = 4
    """hidden layers; there is one linear layer more"""

    # ------------------------------------------------------------ exploration
    start_e: Annotated[float, "[0, 1]"] = 1.0
    """epsilon at the start"""
    end_e: Annotated[float, "[0, 1]"] = 0.1
    """epsilon at the end of its decay"""
    epsilon_schedule: Literal["linear", "exponential"] = "linear"
    """whether epsilon falls by the same amount or by the same factor, --epsilon-decay, each time"""
    epsilon_unit: Literal["step", "episode"] = "step"
    """whether epsilon falls at every environment step or at the end of every training episode"""
    exploration_fraction: Annotated[float, "[0, 1]"] = 0.5
    """linear per step: fraction of the run in which epsilon decays"""
    exploration_episodes: Annotated[int, "[0, inf)"] = 500
    """linear per episode: training episodes in which epsilon decays"""
    epsilon_decay: Annotated[float, "(0, 1]"] = 0.995
    """exponential: what epsilon is multiplied with at every step or episode (sensible: 0.9999 per step, 0.995 per episode)"""

    # ------------------------------------------------------------ evaluation
    eval_interval: Annotated[int, "[0, inf)"] = 5_000
    """environment steps between two evaluations; 0 = only at the end (and around resets, if there are any)"""
    eval_episodes: Annotated[int, "[1, inf)"] = 20
    """whole episodes in an evaluation"""
    eval_epsilon: Annotated[float, "[0, 1]"] = 0.05
    """epsilon in evaluations: without memory a greedy policy can turn for ever between two views of MiniGrid"""
    capture_video: bool = False
    """record the first episode of every evaluation as a video in the run folder"""

    # ------------------------------------------------------------ resets
    reset_interval: Annotated[int, "[0, inf)"] = 20_000
    """gradient steps of one agent between two of its own resets (the paper's MiniGrid: 200,000, in longer runs); 0 = never"""

    # ------------------------------------------------------------ the ensemble
    num_agents: Annotated[int, "[1, inf)"] = 2
    """agents in the ensemble (sensible: 2 to 4; 1 = SR+DQN)"""
    selection: Literal["value", "advantage"] = "value"
    """what the judged Q-values of the proposals are divided by: the largest of them (value, the paper's rule), or what is at
    stake in the state, the best action's lead over a random one (advantage)"""
    beta: Annotated[float | None, "[0, inf)"] = None
    """how strongly the choice of the acting agent prefers a high Q-value; 0 = uniform, 1e9 = the highest; not given: 50 with
    --selection value, 5 with advantage"""


# ------------------------------------------------------------------------------------------------- network, selection


class QNetwork(nn.Sequential):
    """An MLP with ReLU: (batch, observation_dim) to (batch, num_actions), with PyTorch's initialisation."""

    def __init__(self, args: Args, observation_dim: int, num_actions: int):
        widths, layers = [observation_dim, *[args.hidden_dim] * args.num_hidden_layers], []
        for fan_in, fan_out in zip(widths, widths[1:]):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_actions))

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        features, (*hidden_layers, output) = observations, self
        for layer in hidden_layers:
            features = layer(features)  # (batch, hidden_dim)
        # In float32 with --bf16, too: in bfloat16 values of actions that differ by less than 0.4 % would be the same.
        with torch.autocast(features.device.type, enabled=False):
            return output(features.float())


DEFAULT_BETA = {"value": 50.0, "advantage": 5.0}  # of --selection


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


# -------------------------------------------------------------------------------------------------------------- agent


class Agent:
    """The reset deep ensemble: N DQN agents that learn from the same mini-batches, are reset in turn, and act as one."""

    KEPT = ("q_networks", "target_networks", "optimizer", "num_resets", "metrics", "acting_counts", "choices")
    METRICS = ("td_loss", "q_values", "gradient_norm")

    def __init__(
        self, args: Args, observation_space: gym.Space, action_space: gym.Space, buffer: "ReplayBuffer", device: torch.device
    ):
        self.args, self.num_actions, self.buffer, self.device = args, int(action_space.n), buffer, device
        self.observation_dim = observation_space.shape[0]
        # PyTorch's global generator initialises networks and serves no other purpose.
        torch.manual_seed(derive_seed(args.seed, INITIALISATION))
        self.q_networks = nn.ModuleList(self.fresh_network() for _ in range(args.num_agents)).to(device)
        self.target_networks = copy.deepcopy(self.q_networks).requires_grad_(False)
        # One optimizer for all agents: a step count per parameter, so that a reset can start one agent's anew.
        options = {"lr": args.learning_rate, "capturable": device.type == "cuda"}
        if args.optimizer == "rmsprop":
            self.optimizer = optim.RMSprop(self.q_networks.parameters(), foreach=True, **options)
        else:
            self.optimizer = optim.Adam(self.q_networks.parameters(), fused=True, **options)
        self.oldest = torch.zeros(1, dtype=torch.int64, device=device)  # the judge, and the next to be reset
        self.chosen_beta = DEFAULT_BETA[args.selection] if args.beta is None else args.beta
        self.beta = torch.zeros((), device=device)  # see `num_resets`
        self.num_resets = 0
        self.metrics = torch.zeros((len(self.METRICS), args.num_agents), device=device)  # of the last mini-batch
        self.acting_counts = np.zeros(args.num_agents, np.int64)  # whose proposals were taken since the last log
        self.choices = torch.zeros(2, device=device)  # since the last log: how many, and the sum of their entropies

    def fresh_network(self) -> QNetwork:
        return QNetwork(self.args, self.observation_dim, self.num_actions)

    @staticmethod
    def num_bytes(args: Args, observation_space: gym.Space, action_space: gym.Space) -> int:
        """Parameters, targets, gradients, and the moments of the optimizer (Adam two, RMSprop one), float32."""
        network = QNetwork(args, observation_space.shape[0], int(action_space.n))
        num_parameters = sum(parameter.numel() for parameter in network.parameters())
        return args.num_agents * 4 * num_parameters * (5 if args.optimizer == "adam" else 4)

    @property
    def num_parameters(self) -> int:
        """Of one agent's network."""
        return sum(parameter.numel() for parameter in self.q_networks[0].parameters())

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

    @torch.no_grad()
    def act(self, observations: torch.Tensor, generator: torch.Generator, counted: bool = False) -> torch.Tensor:
        """The ensemble's greedy actions and the agents that proposed them, (2, num_envs), for (num_envs, observation_dim).

        With `counted` it is noted for the log how undecided the choice was.
        """
        with self.autocast():
            q_values = torch.stack([q_network(observations) for q_network in self.q_networks])  # (N, num_envs, actions)
        proposals = q_values.argmax(dim=2).T  # (num_envs, N)
        if self.args.num_agents == 1:  # nothing to choose, and so nothing to judge
            return torch.stack([proposals[:, 0], torch.zeros_like(proposals[:, 0])])
        judged = q_values.index_select(0, self.oldest).squeeze(0)  # (num_envs, actions), all actions by the oldest agent
        judgement = judged.gather(1, proposals)  # (num_envs, N)
        scale = advantage_scale(judged, judged) if self.args.selection == "advantage" else value_scale(judgement)
        probabilities = selection_probabilities(judgement, scale, self.beta)
        # An exponential race: the first of N clocks with rates p_i is clock i with probability p_i.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        acting_agents = clocks.argmin(dim=1)  # (num_envs,)
        if counted:
            entropies = torch.special.entr(probabilities).sum(dim=1)  # (num_envs,)
            self.choices.add_(torch.stack([torch.ones_like(entropies), entropies], dim=1).sum(dim=0))
        return torch.stack([proposals.gather(1, acting_agents.unsqueeze(1)).squeeze(1), acting_agents])

    def update(self) -> None:
        """One gradient step of every agent on one mini-batch. The copies into the targets are not in it, see `train`."""
        args = self.args
        observations, actions, rewards, terminated, next_observations = self.buffer.sample(args.batch_size)
        self.optimizer.zero_grad()
        metrics = []
        for q_network, target_network in zip(self.q_networks, self.target_networks):
            with self.autocast():
                with torch.no_grad():
                    next_q_values = target_network(next_observations).amax(dim=1)  # (batch_size,)
                    td_targets = rewards + args.gamma * next_q_values * (1 - terminated)  # (batch_size,)
                q_values = q_network(observations).gather(1, actions.long()).squeeze(1)  # (batch_size,)
            loss = F.smooth_l1_loss(q_values, td_targets)
            loss.backward()
            gradient_norm = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)
            metrics.append(torch.stack([loss.detach(), q_values.detach().mean(), gradient_norm]))
        self.optimizer.step()
        if args.tau:
            with torch.no_grad():  # all target networks in one call
                torch._foreach_lerp_(list(self.target_networks.parameters()), list(self.q_networks.parameters()), args.tau)
        self.metrics.copy_(torch.stack(metrics, dim=1))

    @torch.no_grad()
    def copy_to_targets(self) -> None:
        torch._foreach_copy_(list(self.target_networks.parameters()), list(self.q_networks.parameters()))

    def reset(self) -> int:
        """Resets the oldest agent, in place (captured CUDA graphs hold the addresses), and returns its number."""
        index = self.num_resets % self.args.num_agents
        q_network, target_network = self.q_networks[index], self.target_networks[index]
        q_network.load_state_dict(self.fresh_network().state_dict())
        target_network.load_state_dict(q_network.state_dict())
        for parameter in q_network.parameters():
            for moment_or_step in self.optimizer.state[parameter].values():
                moment_or_step.zero_()
        self.num_resets += 1
        return index

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def evaluation_policy(self, generator: torch.Generator):
        """What evaluations play: (batch, observation_dim) to (batch,) actions."""
        greedy = lambda observations: self.act(observations, generator)[0]
        return epsilon_greedy(greedy, self.args.eval_epsilon, self.num_actions, generator)

    def scalars(self) -> dict[str, float]:
        """For TensorBoard: who judges, and since the last call how often an agent's proposal was taken, and how undecided the
        choice was (at most log N).
        """
        fractions = self.acting_counts / max(1, self.acting_counts.sum())
        num_choices, entropy = self.choices.tolist()
        self.acting_counts[:] = 0
        self.choices.zero_()
        scalars = {"rde/oldest_agent": self.num_resets % self.args.num_agents}
        scalars |= {f"rde/acting_fraction_{i}": fraction for i, fraction in enumerate(fractions)}
        if self.num_resets:
            scalars["rde/youngest_fraction"] = fractions[(self.num_resets - 1) % self.args.num_agents]
        return scalars | {"rde/choice_entropy": entropy / max(1, num_choices)}

    def weights(self) -> dict:
        """What model.pt holds, on the CPU: so it can be loaded without a GPU, too."""
        q_networks = copy.deepcopy(self.q_networks).cpu()
        return {
            "q_networks": [q_network.state_dict() for q_network in q_networks],
            "oldest_agent": self.oldest.item(),
            "num_resets": self.num_resets,
        }

    def load_weights(self, weights: dict) -> None:
        for q_network, state in zip(self.q_networks, weights["q_networks"], strict=True):
            q_network.load_state_dict(state)
        self.num_resets = weights["num_resets"]
        self.oldest.fill_(weights["oldest_agent"])  # in a copy the order of resets may be another one


# ---------------------------------------------------------------------------------------------------------- schedules


def epsilon_at(args: Args, global_step: int, num_episodes: int) -> float:
    """Epsilon after so many environment steps and finished training episodes."""
    progress, duration = global_step, args.exploration_fraction * args.total_timesteps
    if args.epsilon_unit == "episode":
        progress, duration = num_episodes, args.exploration_episodes
    if args.epsilon_schedule == "exponential":
        return max(args.end_e, args.start_e * args.epsilon_decay**progress)
    return linear_schedule(args.start_e, args.end_e, duration, progress)


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """`start` at step 0, `end` from step `duration` on."""
    return end if step >= duration else start + (end - start) * step / duration


def gradient_steps_due(args: Args, global_step: int) -> int:
    """Gradient steps that belong to the first `global_step` environment steps; exact for fractions such as 0.29."""
    return math.floor(exact_fraction(args.replay_ratio) * max(0, global_step - args.learning_starts))


@functools.cache
def exact_fraction(number: float) -> Fraction:
    """Of the decimal number that was typed. Remembered: where a step takes a millisecond, reading it anew would be felt."""
    return Fraction(str(number))


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
    if bool(args.target_update_interval) == bool(args.tau):
        fail(f"--target-update-interval {args.target_update_interval} and --tau {args.tau:g}: the target network follows by "
             "one of the two, and the other one has to be 0")  # fmt: skip
    shortest = math.ceil(exact_fraction(args.replay_ratio) * args.num_envs * args.num_agents)
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
    buffer = ReplayBuffer(args.buffer_size, *spaces, run.device, mini_batches)
    agent = Agent(args, *spaces, buffer, run.device)

    observations = np.zeros((args.num_envs, *spaces[0].shape), np.float32)
    device_observations = torch.from_numpy(observations).to(run.device, copy=True)
    act = CudaGraph(lambda: agent.act(device_observations, selection, counted=True), [selection], run.captures)
    update = CudaGraph(agent.update, [mini_batches], run.captures)

    parts = {"agent": agent, "buffer": buffer, "envs": envs, "observations": observations, "exploration": exploration,
             "mini_batches": mini_batches, "selection": selection}  # fmt: skip
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

        # Act: the ensemble's greedy actions, and on top, per environment, random ones with probability epsilon.
        epsilon = epsilon_at(args, run.global_step, run.num_episodes)
        explore = exploration.random(args.num_envs) < epsilon  # (num_envs,)
        actions = exploration.integers(agent.num_actions, size=args.num_envs)
        if not explore.all():
            upload(observations, device_observations)
            choice = Download(act())

        # Learn. Launched before the environment runs, so that the GPU trains while the CPU plays.
        learns = run.global_step >= args.learning_starts
        while learns and run.gradient_steps < gradient_steps_due(args, run.global_step + args.num_envs):
            update()
            run.count_gradient_step()
            # Outside of the captured update, because a captured graph does the same at every step.
            if args.target_update_interval and run.gradient_steps % args.target_update_interval == 0:
                agent.copy_to_targets()

        # Step the environments and store what happened.
        if not explore.all():
            greedy_actions, acting_agents = choice.numpy()
            actions = np.where(explore, actions, greedy_actions)
            agent.acting_counts += np.bincount(acting_agents[~explore], minlength=args.num_agents)
        run.global_step += args.num_envs
        for i, env in enumerate(envs):
            next_observation, reward, terminated, truncated, info = env.step(actions[i])
            buffer.add(observations[i], actions[i : i + 1], reward, terminated, next_observation)
            if terminated or truncated:
                next_observation, _ = env.reset()
                run.log_episode(info["episode"])
            observations[i] = next_observation

        # Log, and see what is due.
        run.count_step()
        if run.log_is_due():
            run.log(agent, {"charts/epsilon": epsilon} | agent.scalars())
        run.agenda = run.upkeep_due() + events_due(args, run.global_step, run.gradient_steps, agent.num_resets)

    run.finish(agent.weights())


# =========================================================================================================== the line
# Above it stands the algorithm. Below it stands what it is built on.


# ------------------------------------------------------------------------------------------------------- environments

ENVIRONMENT_BYTES = 100_000  # what an environment adds to the memory of the process (LunarLander; the others less)


def environment_versions() -> dict[str, str]:
    """Of the packages that environments come from, where they are installed."""
    versions = {}
    for name in ("box2d", "minigrid"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def is_minigrid(env_id: str) -> bool:
    return env_id.split(":")[-1].startswith("MiniGrid-")


def episode_columns(args: Args) -> tuple[str, ...]:
    """What `info["episode"]` holds beside the return "r" and the length "l"."""
    return ("success",) if is_minigrid(args.env_id) else ()


def evaluation_scalars(agent: "Agent") -> dict[str, float]:
    """What is logged with every evaluation, beside its scores."""
    return {}


COLOURS = ("blue", "green", "grey", "purple", "red", "yellow")  # all that MiniGrid has
VIEW_RANGES = np.array([10, 5, 2], np.float32)  # the largest object, colour and state of a cell


@functools.cache
def mission_colour(mission: str) -> np.ndarray:
    """The first colour that the text names, one-hot, (6,) float32. Zeros if it names none."""
    named = [word for word in re.findall(r"\w+", mission) if word in COLOURS]
    return np.array([named[:1] == [colour] for colour in COLOURS], np.float32)


class MiniGridView(gym.Wrapper):
    """What the agent sees of MiniGrid: its 7x7 view, each channel divided by its range, and the mission's colour, (153,).

    The view holds object, colour and state of every cell as small numbers. The colour is the only place where it is said
    which door GoToDoor's target is. At the end of an episode `info["success"]` is 1 if there was a reward, else 0. With
    `actions` "move" the actions are left, right and forward.
    """

    def __init__(self, env: gym.Env, actions: str):
        super().__init__(env)
        observation_dim = math.prod(env.observation_space["image"].shape) + len(COLOURS)
        self.observation_space = gym.spaces.Box(0.0, np.inf, (observation_dim,), np.float32)
        if actions == "move":
            self.action_space = gym.spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        return self.encode(observation), info

    def step(self, action: int):
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info = info | {"success": int(reward > 0)}
        return self.encode(observation), reward, terminated, truncated, info

    @staticmethod
    def encode(observation: dict) -> np.ndarray:
        view = observation["image"] / VIEW_RANGES  # (7, 7, 3) float32
        return np.concatenate([view.ravel(), mission_colour(observation["mission"])])


class Task(gym.Wrapper):
    """A task with float32 vectors as observations and actions from 0 on, which can be saved in the middle of an episode.

    Numbers as observations become one-hot vectors, arrays are flattened. At the end of an episode `info["episode"]` holds the
    return "r", the length "l" and, if the environment tells it, the "success".

    Some worlds cannot be saved (Box2D's). So none is: kept are the beginning of the episode (a seed, or the state of the
    environment's random generator) and its actions, and it is played again. That is exact for every environment that depends on
    nothing else. Options of `reset` are not kept.
    """

    KEPT = ("episode",)

    def __init__(self, env: gym.Env):
        super().__init__(env)
        space = env.observation_space
        self.one_hot = np.eye(space.n, dtype=np.float32) if isinstance(space, gym.spaces.Discrete) else None
        observation_dim = math.prod(space.shape) if self.one_hot is None else int(space.n)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.first_action, self.action_space = int(env.action_space.start), gym.spaces.Discrete(int(env.action_space.n))
        self.start: int | dict | None = None  # the seed, the state of the random generator, or (before the first reset) None
        self.actions: list[int] = []  # since then
        self.observation, self.episodic_return = np.zeros(observation_dim, np.float32), 0.0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.start = self.unwrapped.np_random.bit_generator.state if seed is None else seed
        self.actions, self.episodic_return = [], 0.0
        observation, info = self.env.reset(seed=seed, options=options)
        self.observation = self.encode(observation)
        return self.observation, info

    def step(self, action: int):
        self.actions.append(int(action))
        observation, reward, terminated, truncated, info = self.env.step(self.first_action + self.actions[-1])
        self.observation = self.encode(observation)
        self.episodic_return += float(reward)
        if terminated or truncated:
            episode = {"r": self.episodic_return, "l": len(self.actions)}
            info = info | {"episode": episode | {name: info[name] for name in ("success",) if name in info}}
        return self.observation, float(reward), terminated, truncated, info

    def encode(self, observation) -> np.ndarray:
        if self.one_hot is not None:
            return self.one_hot[observation - self.env.observation_space.start]
        return np.array(observation, np.float32).ravel()

    @property
    def episode(self) -> dict:
        return {"start": self.start, "actions": self.actions, "observation": torch.from_numpy(self.observation.copy())}

    @episode.setter
    def episode(self, state: dict) -> None:
        if isinstance(state["start"], dict):
            self.unwrapped.np_random.bit_generator.state = state["start"]
        if state["start"] is not None:
            self.reset(seed=state["start"] if isinstance(state["start"], int) else None)
        for action in state["actions"]:
            self.step(action)
        if not np.array_equal(self.observation, state["observation"].numpy(), equal_nan=True):
            raise RunError(f"the episode of the checkpoint went another way when its {len(self.actions)} steps were played "
                           "again: this environment does not repeat itself, or not on this computer")  # fmt: skip


def make_env(args: Args, video_folder: str | None = None) -> gym.Env:
    """The task, with observations (observation_dim,) float32 and discrete actions."""
    env = make_bare_env(args, "rgb_array" if video_folder else None)
    if video_folder:
        env = record_video(env, video_folder)
    return Task(MiniGridView(env, args.actions) if is_minigrid(args.env_id) else env)


def make_bare_env(args: Args, render_mode: str | None = None) -> gym.Env:
    """The environment as it is registered, with the limit of --max-episode-steps."""
    limit, options = args.max_episode_steps, {}
    if is_minigrid(args.env_id):
        import minigrid  # noqa: F401  (registers its environments; LunarLander does without the package)

        if limit:  # MiniGrid cuts its episodes off itself, and its reward is a part of the limit that was left over
            options["max_steps"] = 100 if limit == -1 else limit
    elif limit > 0:
        options["max_episode_steps"] = limit
    return gym.make(args.env_id, render_mode=render_mode, disable_env_checker=True, **options)


# The tasks of MiniGrid in which nothing has to be picked up, opened, or declared to be done.
MOVES_SUFFICE = ("DistShift", "Dynamic-Obstacles", "Empty", "FourRooms", "LavaCrossing", "LavaGap", "Memory", "SimpleCrossing")


def check_environment(args: Args) -> tuple[gym.Space, gym.Space]:
    """Refuses what is no environment, or none for this script, and returns the spaces of observations and actions."""
    env_id, given = args.env_id, f"--env-id {args.env_id}"
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for one step of {args.num_envs} environments")
    if env_id.startswith("ALE/") or "NoFrameskip-v" in env_id:
        fail(f"{given} is an Atari game, and its observations are pictures; use rde_dqn_atari.py")
    if is_minigrid(env_id) and importlib.util.find_spec("minigrid") is None:
        fail(f"{given} needs the package minigrid: pip install minigrid")
    if args.actions == "move" and not is_minigrid(env_id):
        fail(f"--actions move has a meaning in MiniGrid alone, and {given} is none of its tasks; leave it out")
    if args.actions == "move" and not env_id.split("MiniGrid-")[-1].startswith(MOVES_SUFFICE):
        fail(f"--actions move leaves {given} without an action that it needs; use --actions all")
    if env_id not in known_environments(env_id):
        near = difflib.get_close_matches(env_id, gym.registry, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "examples are MiniGrid-LavaGapS5-v0 and LunarLander-v3"
        fail(f"{given} is not registered with Gymnasium; {hint}")
    try:
        env = make_bare_env(args, "rgb_array" if args.capture_video else None)
        env.reset(seed=0)
        if args.capture_video:
            env.render()
    except Exception as error:  # a package or a file is missing, an argument is not taken, ...: every environment has its own
        fail(f"{given} does not work here: {' '.join(str(error).split()) or repr(error)}")
    observation_space, action_space = env.observation_space, env.action_space
    if not is_minigrid(env_id) and not isinstance(observation_space, gym.spaces.Discrete):
        shape = getattr(observation_space, "shape", None)
        if not isinstance(observation_space, gym.spaces.Box):
            fail(f"{given} has observations in {observation_space}, and this script takes arrays (Box) or single numbers "
                 "(Discrete)")  # fmt: skip
        if observation_space.dtype == np.uint8 and len(shape) == 3 and math.prod(shape) > 10_000:
            fail(f"{given} has pictures as observations, of shape {shape}, and this script takes vectors or single numbers; "
                 "for Atari's pictures there is rde_dqn_atari.py")  # fmt: skip
    if not isinstance(action_space, gym.spaces.Discrete):
        kind = "continuous actions" if isinstance(action_space, gym.spaces.Box) else "more than one action at a time"
        fail(f"{given} has {kind}, {action_space}, and this script takes discrete ones (Discrete)")
    if args.capture_video and "rgb_array" not in env.metadata.get("render_modes", ()):
        fail(f"--capture-video: {given} draws no pictures (rgb_array)")
    if env.spec.max_episode_steps is None and args.max_episode_steps < 1 and not is_minigrid(env_id):
        print(f"warning: {given} has no limit of its own: if an episode never ends, an evaluation does not either; "
              "--max-episode-steps sets one", file=sys.stderr)  # fmt: skip
    env.close()
    env = make_env(args)
    return env.observation_space, env.action_space


def known_environments(env_id: str) -> list[str]:
    """All that are registered, MiniGrid's among them, and those of the module in module:MyTask-v0, with its name."""
    module = env_id.partition(":")[0] if ":" in env_id else ""
    if env_id not in gym.registry:  # MinAtar and others offer their environments as plugins, which Gymnasium 1.x does not load
        for plugin in importlib.metadata.entry_points(group="gymnasium.envs"):
            try:
                plugin.load()()
            except Exception as error:  # somebody's own package, which may have nothing to do with this run
                print(f"warning: the plugin {plugin.name} cannot be loaded: {error!r}", file=sys.stderr)
    minigrid = "minigrid" if env_id not in gym.registry and importlib.util.find_spec("minigrid") else ""
    for name in filter(None, (minigrid, module)):
        try:
            importlib.import_module(name)
        except Exception as error:  # somebody's own module
            fail(f"--env-id {env_id}: the module {name} cannot be imported: {' '.join(str(error).split()) or repr(error)}")
    return [f"{module}:{name}" if module else name for name in gym.registry]


def normalized_scores(env_id: str, score: float) -> dict[str, float]:
    """None: the returns of these tasks are looked at as they are."""
    return {}


def epsilon_greedy(greedy, epsilon: float, num_actions: int, generator: torch.Generator):
    """The policy that plays as `greedy` does, (batch, ...) to (batch,), but a random action with probability epsilon."""
    if epsilon == 0:
        return greedy

    def policy(observations: torch.Tensor) -> torch.Tensor:
        actions = greedy(observations)
        explore = torch.rand(actions.shape, device=actions.device, generator=generator) < epsilon
        return torch.where(explore, torch.randint_like(actions, num_actions, generator=generator), actions)

    return policy


# ------------------------------------------------------------------------------------------------------ replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, to be drawn uniformly; each is one row of float32 on `device`.

    A row is observation, action, reward, terminated, next observation. The next observation is stored with every
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
        return [observation_space.shape[0], math.prod(action_space.shape), 1, 1, observation_space.shape[0]]

    @staticmethod
    def num_bytes(args: Args, observation_space: gym.Space, action_space: gym.Space) -> int:
        return args.buffer_size * 4 * sum(ReplayBuffer.row_widths(observation_space, action_space))

    @property
    def used_rows(self) -> torch.Tensor:
        """The rows that have been written, without a copy."""
        return self.rows[: min(self.num_added, self.capacity)]

    def add(
        self, observation: np.ndarray, action: np.ndarray, reward: float, terminated: bool, next_observation: np.ndarray
    ) -> None:
        """Stores a transition, over the oldest one if there is no room left."""
        row = np.concatenate([observation, action, [reward, terminated], next_observation], dtype=np.float32)
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
