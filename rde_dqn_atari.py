# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1", "gymnasium==1.4.0", "numpy>=2.0,<3", "opencv-python-headless>=4.10,<6", "pydantic>=2.10,<3",
#     "tensorboard>=2.20,<3", "torch==2.13.0", "tqdm>=4.67", "tyro>=1.0,<2",
# ]
# ///
r"""Reset deep ensemble of DQN agents (RDE+DQN) on Atari.

N agents learn from one replay buffer. They are reset one after another against primacy bias, and
act as one: every agent proposes its greedy action, and the oldest agent, whose last reset is
longest ago, judges the proposals with its Q-values.

    python rde_dqn_atari.py --env-id AlienNoFrameskip-v4 --reset-depth last1

In two minutes, to see everything happen once (with three resets):

    python rde_dqn_atari.py --env-id BreakoutNoFrameskip-v4 --total-timesteps 3000 \
        --learning-starts 500 --reset-interval 1600 --eval-interval 1000 --eval-episodes 2

Kim, Shin, Park, Sung, "Sample-Efficient and Safe Deep RL via Reset Deep Ensemble Agents", NeurIPS
    2023 (arXiv 2310.20287).
DQN: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015.

Where is what:
    Args                          every argument, its meaning and its range
    QNetwork                      the network
    selection_probabilities, ...  which agent acts
    Agent                         act, update, reset
    gradient_steps_due, ...       when there is a gradient step, a reset, an evaluation
    train                         the training loop
    -- the line --                below it nothing is of the algorithm; equal in all Atari scripts
    AtariGame, AtariView          the environment
    plasticity                    what is measured of a network beside its scores
    ReplayBuffer                  transitions; every frame once
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
import functools
import hashlib
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
import zipfile
from fractions import Fraction
from typing import Annotated, Literal

# Threads that wait for each other by spinning are 12 to 80 times slower as soon as another process competes for a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # in what it says of wrong arguments

import ale_py
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
import tyro
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch.overrides import TorchFunctionMode
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
    env_id: str = "AlienNoFrameskip-v4"
    """the game, as <Game>NoFrameskip-v4"""
    total_timesteps: PositiveInt = 100_000
    """environment steps (agent actions, 4 emulator frames each) of the whole run"""
    num_envs: PositiveInt = 1
    """environments that are advanced together, once in a loop step"""

    # ------------------------------------------------------------ learning
    replay_ratio: PositiveFloat = 1.0
    """gradient steps per environment step; fractions are allowed (sensible: 0.25 to 8)"""
    learning_starts: PositiveInt = 10_000
    """environment steps before the first gradient step"""
    buffer_size: PositiveInt = 100_000
    """transitions in the replay buffer"""
    batch_size: PositiveInt = 32
    """transitions in a mini-batch"""
    learning_rate: PositiveFloat = 1e-4
    """learning rate of Adam (sensible: 5e-5 to 5e-4)"""
    gamma: UnitInterval = 0.99
    """discount factor"""
    tau: UnitInterval = 0.005
    """how far the target network moves towards the online network after a gradient step (sensible: 0.001 to 0.02)"""
    max_grad_norm: PositiveFloat = 10.0
    """the norm at which an agent's gradient is clipped"""

    # ------------------------------------------------------------ exploration
    start_e: UnitInterval = 1.0
    """epsilon at the start"""
    end_e: UnitInterval = 0.01
    """epsilon at the end of its decay"""
    exploration_fraction: UnitInterval = 0.1
    """fraction of the run in which epsilon decays"""

    # ------------------------------------------------------------ evaluation
    eval_interval: NonNegativeInt = 5_000
    """environment steps between two evaluations; 0 = only at the end (and around resets, if there are any)"""
    eval_episodes: PositiveInt = 10
    """whole games in an evaluation"""
    eval_epsilon: UnitInterval = 0.0
    """epsilon in evaluations (Dopamine, SPR and BBF: 0.001; DQN's paper: 0.05)"""
    capture_video: bool = False
    """record the first game of every evaluation as a video in the run folder"""

    # ------------------------------------------------------------ resets
    reset_interval: NonNegativeInt = 80_000
    """gradient steps of one agent between two of its own resets (the paper's Freeway: 40,000); 0 = never"""
    reset_depth: Literal["last1", "last2", "full"] = "last1"
    """what a reset re-initialises: the output layer, the last two layers, or everything"""

    # ------------------------------------------------------------ the ensemble
    num_agents: PositiveInt = 2
    """agents in the ensemble (sensible: 2 to 4; 1 = SR+DQN)"""
    selection: Literal["value", "advantage"] = "value"
    """what the judged Q-values of the proposals are divided by: the largest of them (value, the paper's rule), or what is at
    stake in the state, the best action's lead over a random one (advantage)"""
    beta: Annotated[float | None, Field(ge=0)] = None
    """how strongly the choice prefers a high Q-value: 0 = uniform, 1e9 = the highest; not given: 50 by value, 5 by advantage"""


# ------------------------------------------------------------------------------------------------- network, selection


class QNetwork(nn.Module):
    """Nature DQN: (batch, 4, 84, 84) in [0, 1] to (batch, num_actions), with PyTorch's initialisation."""

    def __init__(self, num_actions: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1), nn.ReLU(),
            nn.Flatten(),
        )  # fmt: skip
        self.hidden = nn.Linear(3136, 512)
        self.output = nn.Linear(512, num_actions)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        features = F.relu(self.hidden(self.convolutions(observations)))  # (batch, 512)
        # In float32 with --bf16, too: in bfloat16 values of actions that differ by less than 0.4 % would be the same.
        with torch.autocast(features.device.type, enabled=False):
            return self.output(features.float())


RESET_LAYERS = {"last1": ["output"], "last2": ["hidden", "output"], "full": [""]}  # "": the whole network


def network_input(frames: torch.Tensor) -> torch.Tensor:
    """Stacks of frames, uint8, as the network wants them: float32 in [0, 1], channels last (faster convolutions)."""
    return frames.float().div_(255).contiguous(memory_format=torch.channels_last)


DEFAULT_BETA = {"value": 50.0, "advantage": 5.0}  # of --selection


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
    """The reset deep ensemble: N DQN agents that learn from the same mini-batches, are reset in turn, and act as one."""

    KEPT = ("q_networks", "target_networks", "optimizer", "resets", "metrics", "acting_counts", "choices")
    METRICS = ("td_loss", "q_values", "gradient_norm")

    def __init__(
        self, args: Args, observation_space: gym.Space, action_space: gym.Space, buffer: "ReplayBuffer", device: torch.device
    ):
        self.args, self.num_actions, self.buffer, self.device = args, int(action_space.n), buffer, device
        # PyTorch's global generator initialises networks and serves no other purpose.
        torch.manual_seed(derive_seed(args.seed, INITIALISATION))
        self.q_networks = nn.ModuleList(QNetwork(self.num_actions) for _ in range(args.num_agents))
        self.q_networks.to(device, memory_format=torch.channels_last)
        self.target_networks = copy.deepcopy(self.q_networks).requires_grad_(False)
        for layer in RESET_LAYERS[args.reset_depth]:
            self.q_networks[0].get_submodule(layer)  # a wrong name fails here, and not at the first reset
        # One Adam for all agents: a step count per parameter, so that a reset can start one agent's anew.
        self.optimizer = optim.Adam(
            self.q_networks.parameters(), lr=args.learning_rate, fused=True, capturable=device.type == "cuda"
        )
        self.oldest = torch.zeros(1, dtype=torch.int64, device=device)  # the judge, and the next to be reset
        self.chosen_beta = DEFAULT_BETA[args.selection] if args.beta is None else args.beta
        self.beta = torch.zeros((), device=device)  # see `resets`
        self.resets = []
        self.metrics = torch.zeros((len(self.METRICS), args.num_agents), device=device)  # of the last mini-batch
        self.acting_counts = np.zeros(args.num_agents, np.int64)  # whose proposals were taken since the last log
        self.choices = torch.zeros(2, device=device)  # since the last log: how many, and the sum of their entropies

    def summary(self) -> str:
        """For the line in which a run says what it will do."""
        num_parameters = sum(parameter.numel() for parameter in self.q_networks[0].parameters())
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
    def act(self, observations: torch.Tensor, generator: torch.Generator, counted: bool = False) -> torch.Tensor:
        """The ensemble's greedy actions and the agents that proposed them, (2, num_envs), for (num_envs, 4, 84, 84) uint8.

        With `counted` it is noted for the log how undecided the choice was.
        """
        observations = network_input(observations)
        with self.autocast():
            q_values = torch.stack([q_network(observations) for q_network in self.q_networks])  # (N, num_envs, actions)
        proposals = q_values.argmax(dim=2).T  # (num_envs, N)
        judged = q_values.index_select(0, self.oldest).squeeze(0)  # (num_envs, actions), all actions by the oldest agent
        judgement = judged.gather(1, proposals)  # (num_envs, N)
        scale = advantage_scale(judged, judged) if self.args.selection == "advantage" else value_scale(judgement)
        probabilities = selection_probabilities(judgement, scale, self.beta)
        # An exponential race: the first of N clocks with rates p_i is clock i with probability p_i.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        acting_agents = clocks.argmin(dim=1)  # (num_envs,)
        if counted:
            entropy = torch.special.entr(probabilities).sum()
            self.choices.add_(torch.stack([torch.full_like(entropy, len(probabilities)), entropy]))
        return torch.stack([proposals.gather(1, acting_agents.unsqueeze(1)).squeeze(1), acting_agents])

    def update(self) -> None:
        """One gradient step of every agent on one mini-batch."""
        args = self.args
        frames, actions, rewards, terminated = self.buffer.sample(args.batch_size)
        observations, next_observations = network_input(frames[:, :4]), network_input(frames[:, 1:])
        self.optimizer.zero_grad()
        metrics = []
        for q_network, target_network in zip(self.q_networks, self.target_networks):
            with self.autocast():
                with torch.no_grad():
                    next_q_values = target_network(next_observations).amax(dim=1)  # (batch_size,)
                    td_targets = rewards + args.gamma * next_q_values * (1 - terminated)  # (batch_size,)
                q_values = q_network(observations).gather(1, actions.unsqueeze(1)).squeeze(1)  # (batch_size,)
            loss = F.smooth_l1_loss(q_values, td_targets)
            loss.backward()
            gradient_norm = nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)
            metrics.append(torch.stack([loss.detach(), q_values.detach().mean(), gradient_norm]))
        self.optimizer.step()
        with torch.no_grad():  # all target networks in one call
            torch._foreach_lerp_(list(self.target_networks.parameters()), list(self.q_networks.parameters()), args.tau)
        self.metrics.copy_(torch.stack(metrics, dim=1))

    def reset(self) -> int:
        """Resets the oldest agent, in place (captured CUDA graphs hold the addresses), and returns its number."""
        index = self.oldest.item()
        q_network, target_network = self.q_networks[index], self.target_networks[index]
        fresh_network = QNetwork(self.num_actions)
        for layer in RESET_LAYERS[self.args.reset_depth]:
            q_network.get_submodule(layer).load_state_dict(fresh_network.get_submodule(layer).state_dict())
        target_network.load_state_dict(q_network.state_dict())
        for parameter in q_network.parameters():
            for moment_or_step in self.optimizer.state[parameter].values():
                moment_or_step.zero_()
        self.resets = [*self.resets, index]
        return index

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def evaluation_policy(self, generator: torch.Generator):
        """What evaluations play: (batch, 4, 84, 84) uint8 to (batch,) actions."""
        epsilon, num_actions = self.args.eval_epsilon, self.num_actions
        return lambda observations: epsilon_greedy(self.act(observations, generator)[0], epsilon, num_actions, generator)

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
            "q_networks": [q_network.state_dict() for q_network in copy.deepcopy(self.q_networks).cpu()],
            "oldest_agent": self.oldest.item(),
            "num_resets": len(self.resets),
        }

    def load_weights(self, weights: dict) -> None:
        for q_network, state in zip(self.q_networks, weights["q_networks"], strict=True):
            q_network.load_state_dict(state)
        self.resets = [number % self.args.num_agents for number in range(weights["num_resets"])]
        self.oldest.fill_(weights["oldest_agent"])  # in a copy the order of resets may be another one


# ---------------------------------------------------------------------------------------------------------- schedules


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """`start` at step 0, `end` from step `duration` on."""
    return end if step >= duration else start + (end - start) * step / duration


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
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, mini_batches)
    agent = Agent(args, *spaces, buffer, run.device)

    observations = np.zeros((args.num_envs, *spaces[0].shape), np.uint8)
    device_observations = torch.from_numpy(observations).to(run.device, copy=True)
    act = CudaGraph(lambda: agent.act(device_observations, selection, counted=True), [selection], run.captures)
    update = CudaGraph(agent.update, [mini_batches], run.captures)

    parts = {"agent": agent, "buffer": buffer, "envs": envs, "observations": observations, "exploration": exploration,
             "mini_batches": mini_batches, "selection": selection}  # fmt: skip
    if not run.restore(parts):
        for i, env in enumerate(envs):
            observations[i], _ = env.reset(seed=derive_seed(args.seed, ENVIRONMENT, i))
            buffer.start_episode(i, observations[i, -1])
    run.announce(agent.summary(), resets_due(args, gradient_steps_due(args, run.last_loop_step)))

    while run.goes_on():
        # Between two steps: an evaluation, a reset of the oldest agent.
        if run.agenda:
            if run.agenda[0] == "reset":
                reset_agent = agent.reset()
                run.log_scalars({"rde/reset_agent": reset_agent})
                run.say(f"reset {args.reset_depth} of agent {reset_agent} after {run.gradient_steps} gradient steps")
                run.agenda.pop(0)
            else:
                run.evaluate(agent)
            continue

        # Act: the ensemble's greedy actions, and on top, per environment, random ones with probability epsilon.
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, run.global_step)
        explore = exploration.random(args.num_envs) < epsilon  # (num_envs,)
        actions = exploration.integers(agent.num_actions, size=args.num_envs)
        if not explore.all():
            upload(observations, device_observations)
            choice = Download(act())

        # Learn. Launched before the emulator runs, so that the GPU trains while the CPU plays.
        learns = run.global_step >= args.learning_starts
        while learns and run.gradient_steps < gradient_steps_due(args, run.global_step + args.num_envs):
            update()
            run.gradient_steps += 1

        # Step the environments and store what happened.
        if not explore.all():
            greedy_actions, acting_agents = choice.numpy()
            actions = np.where(explore, actions, greedy_actions)
            agent.acting_counts += np.bincount(acting_agents[~explore], minlength=args.num_agents)
        run.global_step += args.num_envs
        for i, env in enumerate(envs):
            next_observation, reward, terminated, truncated, info = env.step(actions[i])
            buffer.add(i, actions[i], reward, next_observation[-1], terminated)
            if terminated or truncated:
                next_observation, reset_info = env.reset()
                buffer.start_episode(i, next_observation[-1])
                info = info | reset_info
            observations[i] = next_observation
            if "episode" in info:
                run.log_episode(info["episode"])

        # Log, and see what is due.
        run.count_step()
        if interval_has_passed(LOG_INTERVAL, run.global_step, args.num_envs):
            run.log(agent, {"charts/epsilon": epsilon} | agent.scalars())
        run.agenda = events_due(args, run.global_step, run.gradient_steps, len(agent.resets))
        run.keep_what_is_due(agent)

    run.finish(agent.weights())


# =========================================================================================================== the line
# Above it stands the algorithm. Below it stands what it is built on, equal to the byte in all Atari scripts.


# ------------------------------------------------------------------------------------------------------- environments

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gym.register_envs(ale_py)
ENVIRONMENT_VERSIONS = {"ale-py": ale_py.__version__, "opencv": cv2.__version__}


def episode_columns(args: Args) -> tuple[str, ...]:
    """What `info["episode"]` holds beside the return "r" and the length "l"."""
    return ()


class AtariGame(gym.Wrapper):
    """Whole games, 4 emulator frames a step, after 1 to 30 no-ops; the last two RGB screens' maximum, (210, 160, 3) uint8.

    At the end of a game `info["episode"]` holds the unclipped return "r" and the length "l" in emulator frames, the no-ops
    included (as stable-baselines3's Monitor counts it). The cut of a game at its frame cap can fall into the four frames: then
    the last two before it are taken, because a truncation bootstraps from them. (At a game's end nothing looks at them.)
    """

    KEPT = ("emulator", "np_random", "episodic_return", "episodic_length", "screen", "previous_screen")

    def __init__(self, env: gym.Env, frame_skip: int = 4):
        super().__init__(env)
        self.ale, self.frame_skip = env.unwrapped.ale, frame_skip
        self.ale_actions = self.ale.getMinimalActionSet()
        self.frame_cap = self.ale.getInt("max_num_frames_per_episode") or math.inf  # 108,000; 0 = none
        height, width = self.ale.getScreenDims()
        self.screen, self.previous_screen = np.zeros((2, height, width, 3), np.uint8)
        self.episodic_return, self.episodic_length = 0.0, 0

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.episodic_return, self.episodic_length = 0.0, 0
        for _ in range(self.np_random.integers(1, 31)):
            _, terminated, truncated = self.act(0)
            if terminated or truncated:
                self.env.reset()
                self.episodic_return, self.episodic_length = 0.0, 0
        self.read_screen()
        return self.screen, info

    def step(self, action: int):
        num_frames, total_reward = min(self.frame_skip, self.frame_cap - self.ale.getEpisodeFrameNumber()), 0.0
        for frame in range(num_frames):
            reward, terminated, truncated = self.act(action)
            total_reward += reward
            if terminated or truncated:
                break
            if frame == num_frames - 2:
                self.read_screen()
        self.read_screen()
        info = {"episode": {"r": self.episodic_return, "l": self.episodic_length}} if terminated or truncated else {}
        return np.maximum(self.screen, self.previous_screen), total_reward, terminated, truncated, info

    def act(self, action: int) -> tuple[float, bool, bool]:
        """One frame. Of four frames two are looked at, so the screen is read elsewhere."""
        reward = self.ale.act(self.ale_actions[action])
        self.episodic_return += reward
        self.episodic_length += 1
        return reward, self.ale.game_over(with_truncation=False), self.ale.game_truncated()

    def read_screen(self) -> None:
        self.screen, self.previous_screen = self.previous_screen, self.screen
        self.ale.getScreenRGB(self.screen)

    @property
    def emulator(self) -> bytes:
        """The exact state of the emulator in the middle of a game."""
        return self.ale.cloneSystemState().serialize()

    @emulator.setter
    def emulator(self, state: bytes) -> None:
        self.env.reset()
        self.ale.act(0)  # sets a flag that the emulator's state lacks: without it Qbert goes on wrongly
        self.ale.restoreSystemState(ale_py.ALEState(state))


class AtariView(gym.Wrapper):
    """What the agent sees and earns of a game: (4, 84, 84) uint8, the sign of the reward, and lives as episodes.

    The last 4 frames, oldest first, in grayscale and resized by area interpolation, with zeros before the first frame of an
    episode or life. The loss of a life is terminal for learning; `reset` goes on with the game then, which is itself only
    reset when it is over. Games that wait for FIRE get it, and the action after it, at the start of a game or life.
    """

    KEPT = ("env", "lives", "game_is_over", "frames")

    def __init__(self, env: gym.Env, num_frames: int = 4):
        super().__init__(env)
        self.ale = env.unwrapped.ale
        self.observation_space = gym.spaces.Box(0, 255, (num_frames, 84, 84), np.uint8)
        self.frames = np.zeros((num_frames, 84, 84), np.uint8)
        self.lives, self.game_is_over = 0, True
        self.first_actions = (1, 2) if "FIRE" in env.unwrapped.get_action_meanings() else ()

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Begins a game, or goes on after a lost life. If a no-op or FIRE ends a game, info["episode"] says so."""
        screen, info = self.begin(seed, options)
        for action in self.first_actions:
            screen, _, terminated, truncated, step_info = self.play(action)
            info = info | step_info
            if terminated or truncated:
                screen, reset_info = self.begin()
                info = info | reset_info
        self.frames[:] = 0
        self.frames[-1] = self.gray(screen)
        return self.frames.copy(), info

    def step(self, action: int):
        screen, reward, terminated, truncated, info = self.play(action)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = self.gray(screen)
        return self.frames.copy(), float(np.sign(reward)), terminated, truncated, info

    def begin(self, seed: int | None = None, options: dict | None = None):
        """A new game, or the next life of the present one, with a no-op (which can end it)."""
        if self.game_is_over or seed is not None:
            screen, info = self.env.reset(seed=seed, options=options)
        else:
            screen, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                screen, _ = self.env.reset()
        self.lives = self.ale.lives()
        return screen, info

    def play(self, action: int):
        """A step of the game, in which the loss of a life terminates."""
        screen, reward, terminated, truncated, info = self.env.step(action)
        self.game_is_over = terminated or truncated
        lives = self.ale.lives()
        if 0 < lives < self.lives:  # not at 0: BankHeist plays its last life there, and its end is the end of the game
            terminated = True
        self.lives = lives
        return screen, reward, terminated, truncated, info

    def gray(self, screen: np.ndarray) -> np.ndarray:
        return cv2.resize(cv2.cvtColor(screen, cv2.COLOR_RGB2GRAY), (84, 84), interpolation=cv2.INTER_AREA)


def make_env(args: Args, render: bool = False, **kwargs) -> gym.Env:
    """The game as stable-baselines3's `make_atari_env` and `VecFrameStack` show it, to the byte."""
    env = AtariView(AtariGame(gym.make(args.env_id, render_mode="rgb_array" if render else None, **kwargs)))
    env.metadata = env.metadata | {"render_fps": 15}
    return env


def check_environment(args: Args) -> None:
    """Refuses what is no game."""
    games = sorted(env_id for env_id in gym.registry if env_id.endswith("NoFrameskip-v4"))
    if args.env_id not in games:
        stem = args.env_id.removeprefix("ALE/").split("-v")[0].removesuffix("NoFrameskip")
        near = difflib.get_close_matches(f"{stem}NoFrameskip-v4", games, n=3) or ["AlienNoFrameskip-v4"]
        fail(f"--env-id {args.env_id} is not a game of the form <Game>NoFrameskip-v4 (others skip frames or repeat actions by "
             f"themselves); did you mean {' or '.join(near)}?")  # fmt: skip
    if args.buffer_size < 5 * args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for stacks of 4 frames and the next one in {args.num_envs} "
             f"environment(s); it must be at least {5 * args.num_envs}")  # fmt: skip


# Mean scores of a random player and of a human, the 26 games of Atari-100k (as in Dopamine, SPR, BBF and DreamerV3).
RANDOM_AND_HUMAN_SCORES = {
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5), "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8), "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0), "Seaquest": (68.4, 42054.7), "UpNDown": (533.4, 11693.2),
}  # fmt: skip


def normalized_scores(env_id: str, score: float) -> dict[str, float]:
    """The human-normalized score (score - random) / (human - random), where the game is one of the 26."""
    if (game := env_id.removesuffix("NoFrameskip-v4")) not in RANDOM_AND_HUMAN_SCORES:
        return {}
    random_score, human_score = RANDOM_AND_HUMAN_SCORES[game]
    return {"human_normalized_score": (score - random_score) / (human_score - random_score)}


def epsilon_greedy(actions: torch.Tensor, epsilon: float, num_actions: int, generator: torch.Generator) -> torch.Tensor:
    """The actions (batch,), each with probability epsilon replaced by a random one."""
    if epsilon == 0:
        return actions
    explore = torch.rand(actions.shape, device=actions.device, generator=generator) < epsilon
    return torch.where(explore, torch.randint_like(actions, num_actions, generator=generator), actions)


# --------------------------------------------------------------------------------------------------------- plasticity


@functools.cache
def random_observations(env_id: str, count: int = 256) -> torch.Tensor:
    """What random play shows at every fourth step, (count, 4, 84, 84) uint8: the same in all runs of a game."""
    env, generator, observations = make_env(Args(env_id=env_id)), np.random.default_rng(0), []
    observation, _ = env.reset(seed=0)
    for step in range(4 * count):
        if step % 4 == 0:
            observations.append(observation)
        observation, _, terminated, truncated, _ = env.step(generator.integers(env.action_space.n))
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()
    return torch.from_numpy(np.stack(observations))


def dormant_units(activations: list[torch.Tensor], threshold: float = 0.025) -> float:
    """The fraction of the units of all layers that hardly ever answer (Sokar et al., "The Dormant Neuron Phenomenon", 2023).

    A unit's score is its mean activation over the batch, as a fraction of its layer's mean; up to the threshold it is dormant.
    Activations are (batch, units) or, of a convolution, (batch, units, height, width).
    """
    num_dormant, num_units = 0, 0
    for activation in activations:
        scores = activation.abs().transpose(0, 1).flatten(1).mean(dim=1)  # (units,)
        num_dormant += (scores <= threshold * scores.mean()).sum().item()
        num_units += len(scores)
    return num_dormant / num_units


def active_units(activations: list[torch.Tensor]) -> float:
    """How often a unit is active (> 0), over the batch and its places, as the mean of all units of all layers."""
    return torch.cat([(layer > 0).float().transpose(0, 1).flatten(1).mean(dim=1) for layer in activations]).mean().item()


class Activations(TorchFunctionMode):
    """While it is entered, what every activation function returns, in the order of the computation.

    So it sees whatever network somebody builds, as modules or by calls, with normalisation, residual blocks, ...
    """

    NAMES = ("relu", "relu_", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "tanh")  # of F, torch, and tensors' methods

    def __init__(self):
        super().__init__()
        self.seen: list[torch.Tensor] = []  # (batch, units), or of a convolution (batch, units, height, width)

    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if getattr(function, "__name__", "") in self.NAMES:
            self.seen.append(result.clone())  # the network may change it in place
        return result


def effective_rank(singular_values: torch.Tensor, rest: float = 0.01) -> int:
    """How many of them make up 1 - rest of their sum (Kumar et al., ICLR 2021)."""
    return int((singular_values.cumsum(dim=0) < (1 - rest) * singular_values.sum()).sum()) + 1


def stable_rank(singular_values: torch.Tensor) -> float:
    """The sum of their squares over the largest square (Rudelson and Vershynin, 2007): it is not moved by small ones."""
    squares = singular_values.square()
    return (squares.sum() / squares.max().clamp_min(torch.finfo(squares.dtype).tiny)).item()


@torch.no_grad()
def plasticity(q_network: nn.Module, observations: torch.Tensor) -> dict[str, float]:
    """How well a network can still learn, measured on observations (batch, 4, 84, 84) uint8.

    The ranks are those of the last activations, (batch, units).
    """
    with Activations() as activations:
        q_network(network_input(observations))
    singular_values = torch.linalg.svdvals(activations.seen[-1].flatten(1).double())
    return {
        "plasticity/dormant_units": dormant_units(activations.seen),
        "plasticity/active_units": active_units(activations.seen),
        "plasticity/effective_rank": effective_rank(singular_values),
        "plasticity/stable_rank": stable_rank(singular_values),
        "plasticity/weight_norm": torch.stack([parameter.norm() for parameter in q_network.parameters()]).norm().item(),
    }


def evaluation_scalars(agent: "Agent") -> dict[str, float]:
    """What is logged with every evaluation; of every agent of an ensemble under its number."""
    observations = random_observations(agent.args.env_id).to(agent.device)
    if hasattr(agent, "q_network"):
        return plasticity(agent.q_network, observations)
    scalars = [plasticity(q_network, observations) for q_network in agent.q_networks]
    return {f"{name}_{i}": value for i, of_agent in enumerate(scalars) for name, value in of_agent.items()}


# ------------------------------------------------------------------------------------------------------ replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, drawn uniformly, on the generator's device; every 84x84 frame is stored once, as uint8.

    A transition is a row of numbers: the places of its five frames (its stack of 4 and the next one), action, reward,
    terminated. Frames before the first one of an episode or life are the place of a black frame. So the boundaries of episodes,
    lives and truncations are settled when a transition is written, and a mini-batch is gathered by two look-ups. The frames are
    written into a ring of their own; a transition leaves the buffer before one of its frames is overwritten.
    """

    # frames_written before used_frames, whose length it decides.
    KEPT = ("frames_written", "used_frames", "rows", "oldest", "size", "drawable", "stacks", "oldest_frames")

    def __init__(self, capacity: int, num_envs: int, generator: torch.Generator):
        self.capacity, self.device, self.generator = capacity, generator.device, generator
        # One frame per transition, the stacks of the oldest ones, and 1 % for the last frames of truncated games.
        self.num_frames = capacity + 10 * num_envs + capacity // 100
        self.frames = torch.zeros((self.num_frames + 1, 84, 84), dtype=torch.uint8, device=self.device)  # the last is black
        self.rows = torch.zeros((capacity, 8), dtype=torch.float64, device=self.device)  # float64 is exact for all of them
        # The transitions that can be drawn. On the device, too, because a captured CUDA graph draws from them.
        self.oldest, self.size = 0, 0
        self.drawable = torch.zeros(2, dtype=torch.int64, device=self.device)  # (oldest, size)
        # Frames are numbered as they are written; None stands for black.
        self.frames_written = 0
        self.stacks: list[list[int | None]] = [[None] * 4 for _ in range(num_envs)]  # of the current observations
        self.oldest_frames = np.zeros(capacity, np.int64)  # no frame before this one is needed by the transition

    @property
    def used_frames(self) -> torch.Tensor:
        """The part of the frames that has been written, (frames, 84, 84) uint8, without a copy."""
        return self.frames[: min(self.frames_written, self.num_frames)]

    def start_episode(self, env_index: int, frame: np.ndarray) -> None:
        """Begins an episode or life with its first frame, (84, 84) uint8."""
        self.stacks[env_index] = [None, None, None, self._write_frame(frame)]

    def add(self, env_index: int, action: int, reward: float, next_frame: np.ndarray, terminated: bool) -> None:
        """Stores a transition. The next frame of a terminated one is not stored: nothing looks at it. After a truncation it is
        the episode's own last frame, from which the transition bootstraps; `start_episode` must follow either.
        """
        if not math.isfinite(reward):
            raise FloatingPointError(f"the environment gave a reward of {reward}")
        stack = self.stacks[env_index]
        oldest_frame = min(number for stack in self.stacks for number in stack if number is not None)
        next_number = None if terminated else self._write_frame(next_frame)
        if self.size == self.capacity:
            self.oldest, self.size = (self.oldest + 1) % self.capacity, self.size - 1
        position = (self.oldest + self.size) % self.capacity
        places = [self.num_frames if number is None else number % self.num_frames for number in (*stack, next_number)]
        upload(np.array([*places, action, reward, terminated], np.float64), self.rows[position])
        self.oldest_frames[position] = oldest_frame
        self.size += 1
        self._publish_drawable()
        self.stacks[env_index] = [*stack[1:], next_number]

    def _write_frame(self, frame: np.ndarray) -> int:
        number = self.frames_written
        while self.size and self.oldest_frames[self.oldest] <= number - self.num_frames:  # only with many truncations
            self.oldest, self.size = (self.oldest + 1) % self.capacity, self.size - 1
            self._publish_drawable()
        upload(frame, self.frames[number % self.num_frames])
        self.frames_written += 1
        return number

    def _publish_drawable(self) -> None:
        upload(np.array([self.oldest, self.size]), self.drawable)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws transitions uniformly, with replacement.

        Returns frames (batch_size, 5, 84, 84) uint8 (the first 4 are the observation, the last 4 the next observation),
        actions (batch_size,) int64, rewards and terminated (batch_size,) float32.
        """
        draws = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=self.generator)
        oldest, size = self.drawable
        positions = (oldest + (draws * size).long()) % self.capacity  # (batch_size,)
        rows = self.rows.index_select(0, positions)  # (batch_size, 8)
        places, actions = rows[:, :5].long(), rows[:, 5].long()
        frames = self.frames.index_select(0, places.flatten()).view(batch_size, 5, 84, 84)
        return frames, actions, rows[:, 6].float(), rows[:, 7].float()


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
