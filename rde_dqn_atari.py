"""Reset deep ensemble of DQN agents (RDE+DQN) on Atari.

    python rde_dqn_atari.py --env-id AlienNoFrameskip-v4 --reset-depth last1

N agents learn from one replay buffer. They are reset one after another against primacy bias, and act as one: every agent
proposes its greedy action, and the oldest agent, whose reset lies longest back, judges the proposals with its Q-values.

Kim, Shin, Park, Sung, "Sample-Efficient and Safe Deep RL via Reset Deep Ensemble Agents", NeurIPS 2023 (arXiv 2310.20287).
DQN: Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015.
"""

import atexit
import contextlib
import copy
import csv
import dataclasses
import difflib
import fcntl
import glob
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import struct
import sys
import time
import zlib
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import ale_py
import cv2
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

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gym.register_envs(ale_py)


# ---------------------------------------------------------------------------------------------------------- arguments


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """name of the experiment, a part of the run folder's name"""
    seed: int = 1
    """seed of every random generator of the run"""
    torch_deterministic: bool = True
    """CUDA: let cuDNN choose deterministic kernels only"""
    cuda: bool = True
    """train on the GPU if there is one"""
    cuda_graphs: bool = True
    """CUDA: capture acting and learning as CUDA graphs"""
    bf16: bool = False
    """compute the networks in bfloat16 (parameters and targets stay float32)"""
    track: bool = False
    """log to Weights & Biases as well"""
    wandb_project_name: str = "rde"
    """the project's name in Weights & Biases"""
    wandb_entity: str | None = None
    """the entity (team) of the project in Weights & Biases"""
    capture_video: bool = False
    """record the first game of every evaluation as a video in the run folder"""
    runs_dir: str = "runs"
    """the folder in which the run's own folder is made"""
    checkpoint_interval: int = 25_000
    """environment steps between two checkpoints; 0 = only when the run is stopped by SIGTERM or SIGINT (Ctrl-C)"""
    resume: str = ""
    """a run folder to continue exactly, with its own arguments (--total-timesteps may be raised);
    "auto" = the newest unfinished run with the same arguments, or a new one"""

    env_id: str = "AlienNoFrameskip-v4"
    """the game, as <Game>NoFrameskip-v4"""
    total_timesteps: int = 100_000
    """environment steps (agent actions, 4 emulator frames each) of the whole run"""
    num_envs: int = 1
    """environments that are advanced together, once in a loop step"""
    learning_rate: float = 1e-4
    """learning rate of Adam"""
    buffer_size: int = 100_000
    """transitions in the replay buffer"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """how far the target network moves towards the online network after a gradient step"""
    batch_size: int = 32
    """transitions in a mini-batch"""
    replay_ratio: float = 1.0
    """gradient steps per environment step; fractions are allowed"""
    learning_starts: int = 10_000
    """environment steps before the first gradient step"""
    start_e: float = 1.0
    """epsilon at the start"""
    end_e: float = 0.01
    """epsilon at the end of its decay"""
    exploration_fraction: float = 0.1
    """fraction of the run in which epsilon decays"""
    max_grad_norm: float = 10.0
    """the norm at which an agent's gradient is clipped"""
    eval_interval: int = 5_000
    """environment steps between two evaluations; 0 = only at the end"""
    eval_episodes: int = 10
    """whole games in an evaluation"""

    reset_interval: int = 80_000
    """gradient steps of one agent between two of its own resets (the paper's Freeway: 40,000); 0 = never"""
    reset_depth: Literal["last1", "last2", "full"] = "last1"
    """what a reset re-initialises: the output layer, the last two layers, or everything"""

    num_agents: int = 2
    """agents in the ensemble"""
    beta: float = 50.0
    """how strongly the choice of the acting agent prefers a high Q-value; 0 = uniform"""


def fail(message: str) -> None:
    """Ends the program because of a wrong argument: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args: Args) -> None:
    """Refuses what cannot work before anything is created."""
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{flag} is {value}, but must be a finite number")
        if isinstance(value, (int, float)) and value < 0:
            fail(f"{flag} is {value}, but must not be negative")
        if isinstance(value, (int, float)) and value > 1e30:
            fail(f"{flag} is larger than 1e30")
    if not args.exp_name or "/" in args.exp_name:
        fail(f"--exp-name is {args.exp_name!r}, but must be a part of a folder's name")
    for name in ("total_timesteps", "num_envs", "learning_rate", "buffer_size", "batch_size", "replay_ratio",
                 "max_grad_norm", "eval_episodes"):  # fmt: skip
        if getattr(args, name) == 0:
            fail(f"--{name.replace('_', '-')} is 0, but must be positive")
    for name in ("gamma", "tau", "start_e", "end_e", "exploration_fraction"):
        if getattr(args, name) > 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must lie between 0 and 1")

    games = sorted(env_id for env_id in gym.registry if env_id.endswith("NoFrameskip-v4"))
    if args.env_id not in games:
        stem = args.env_id.removeprefix("ALE/").split("-v")[0].removesuffix("NoFrameskip")
        known = f"{stem}NoFrameskip-v4"
        near = [known] if known in games else difflib.get_close_matches(known, games, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "an example is AlienNoFrameskip-v4"
        if args.env_id in gym.registry and str(gym.spec(args.env_id).entry_point).startswith("ale_py") and near:
            fail(f"--env-id {args.env_id} skips frames by itself or has sticky actions, and either would be applied twice or "
                 f"against the protocol; use {near[0]}")  # fmt: skip
        fail(f"--env-id {args.env_id} is not a game of the form <Game>NoFrameskip-v4; {hint}")

    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} leaves nothing of --total-timesteps {args.total_timesteps} to learn in")
    if gradient_steps_due(args, args.total_timesteps) == 0:
        fail(f"--replay-ratio {args.replay_ratio} leaves --total-timesteps {args.total_timesteps} without a gradient step")
    if args.batch_size > min(args.learning_starts, args.buffer_size):
        fail(f"--batch-size {args.batch_size} is more than the {min(args.learning_starts, args.buffer_size)} transitions "
             "that are stored when learning starts; raise --learning-starts or --buffer-size")  # fmt: skip
    if args.buffer_size < 5 * args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for stacks of 4 frames and the next one in {args.num_envs} "
             f"environment(s); it must be at least {5 * args.num_envs}")  # fmt: skip
    for name in ("eval_interval", "checkpoint_interval"):
        if 0 < getattr(args, name) < args.num_envs:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} is shorter than one loop step of {args.num_envs} "
                 f"environments; use at least {args.num_envs}, or 0")  # fmt: skip
    if args.num_agents < 1:
        fail(f"--num-agents is {args.num_agents}, but an ensemble has at least 1 agent")
    shortest = math.ceil(args.num_envs * args.replay_ratio * args.num_agents)
    if 0 < args.reset_interval < shortest:
        fail(f"--reset-interval {args.reset_interval} asks for more than one reset in a loop step; "
             f"use at least {shortest}, or 0 for never")  # fmt: skip

    on_gpu = args.cuda and torch.cuda.is_available()
    free_bytes = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    needed_bytes = ReplayBuffer.num_bytes(args.buffer_size, args.num_envs) + Agent.num_bytes(args.num_agents)
    if needed_bytes > free_bytes:
        fail(f"--buffer-size {args.buffer_size} and --num-agents {args.num_agents} need {needed_bytes / 1e9:.2f} GB, but only "
             f"{free_bytes / 1e9:.2f} GB are free {'on the GPU' if on_gpu else 'in memory'}")  # fmt: skip
    for flag, wanted, package in (("--track", args.track, "wandb"), ("--capture-video", args.capture_video, "moviepy")):
        if wanted and importlib.util.find_spec(package) is None:
            fail(f"{flag} needs the package {package}: pip install {package}")


# ------------------------------------------------------------------------------------------------------------ seeding

# One random generator per purpose, so that a baseline and its RDE variant stay paired where they do the same thing.
ENVIRONMENT, EXPLORATION, MINI_BATCHES, INITIALISATION, SELECTION, EVALUATION = range(6)


def derive_seed(seed: int, purpose: int, *indices: int) -> int:
    """An independent 32-bit seed for a purpose (and the environment, the step, ... within it)."""
    return int(np.random.SeedSequence([seed, purpose, *indices]).generate_state(1)[0])


# ------------------------------------------------------------------------------------------------------- environments


class AtariGame(gym.Wrapper):
    """The emulator, one frame a step, and the statistics of whole games.

    `step` returns None for the observation: of four frames two are looked at, and `MaxAndSkip` reads those itself. At the
    end of a game `info["episode"]` holds the unclipped return "r" and the length "l" in emulator frames, the no-ops
    included (as stable-baselines3's Monitor counts it).
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.ale = env.unwrapped.ale
        self.ale_actions = self.ale.getMinimalActionSet()

    def reset(self, **kwargs):
        self.episodic_return, self.episodic_length = 0.0, 0
        return self.env.reset(**kwargs)

    def step(self, action: int):
        try:
            reward = self.ale.act(self.ale_actions[action])
        except RuntimeError as error:
            raise RunError(f"the emulator failed: {error}; {WHAT_STAYS}") from error
        self.episodic_return += reward
        self.episodic_length += 1
        terminated, truncated = self.ale.game_over(with_truncation=False), self.ale.game_truncated()
        info = {}
        if terminated or truncated:
            info["episode"] = {"r": self.episodic_return, "l": self.episodic_length}
        return None, reward, terminated, truncated, info


class NoopReset(gym.Wrapper):
    """Starts a game with 1 to 30 no-ops."""

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        for _ in range(self.unwrapped.np_random.integers(1, 31)):
            _, _, terminated, truncated, _ = self.env.step(0)
            if terminated or truncated:
                self.env.reset()
        return None, info


class MaxAndSkip(gym.Wrapper):
    """Repeats an action for 4 frames; the observation is the maximum of the last two RGB screens, (210, 160, 3) uint8.

    The cut of a game at its frame cap can fall into the four frames. Then the last two frames before the cut are taken,
    because a truncation bootstraps from them. (At a game's end the screens are stale: nothing looks at them.)
    """

    def __init__(self, env: gym.Env, skip: int = 4):
        super().__init__(env)
        self.skip = skip
        self.ale = env.unwrapped.ale
        self.frame_cap = self.ale.getInt("max_num_frames_per_episode")  # 108,000; 0 = none
        height, width = self.ale.getScreenDims()
        self.screen, self.previous_screen = np.zeros((2, height, width, 3), np.uint8)

    def read_screen(self) -> None:
        self.screen, self.previous_screen = self.previous_screen, self.screen
        self.ale.getScreenRGB(self.screen)

    def reset(self, **kwargs):
        _, info = self.env.reset(**kwargs)
        self.read_screen()
        return self.screen, info

    def step(self, action: int):
        num_frames = self.skip
        if self.frame_cap:
            num_frames = min(num_frames, self.frame_cap - self.ale.getEpisodeFrameNumber())
        total_reward = 0.0
        for frame in range(num_frames):
            _, reward, terminated, truncated, info = self.env.step(action)
            total_reward += reward
            if terminated or truncated:
                break
            if frame == num_frames - 2:
                self.read_screen()
        self.read_screen()
        return np.maximum(self.screen, self.previous_screen), total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper):
    """Makes the loss of a life terminal for learning; the game itself is only reset when it is over."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.ale = env.unwrapped.ale
        self.lives, self.game_is_over = 0, True

    def step(self, action: int):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.game_is_over = terminated or truncated
        lives = self.ale.lives()
        if 0 < lives < self.lives:  # Qbert stays at 0 lives for some frames before its game is over
            terminated = True
        self.lives = lives
        return observation, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Goes on after a lost life with a no-op. If that ends the game, info["episode"] says so and a new one begins."""
        if self.game_is_over or seed is not None:
            observation, info = self.env.reset(seed=seed, options=options)
        else:
            observation, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                observation, _ = self.env.reset()
        self.lives = self.ale.lives()
        return observation, info


class FireReset(gym.Wrapper):
    """Presses FIRE (and the action after it) at the start of a game or life, in games that wait for it."""

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        for action in (1, 2):
            observation, _, terminated, truncated, step_info = self.env.step(action)
            info = info | step_info
            if terminated or truncated:
                observation, reset_info = self.env.reset()
                info = info | reset_info
        return observation, info


class GrayResize(gym.ObservationWrapper):
    """Grayscale, then 84x84 by area interpolation: (84, 84) uint8."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        gray = cv2.cvtColor(observation, cv2.COLOR_RGB2GRAY)
        return cv2.resize(gray, (84, 84), interpolation=cv2.INTER_AREA)


class ClipReward(gym.RewardWrapper):
    """The sign of the reward."""

    def reward(self, reward: float) -> float:
        return float(np.sign(reward))


class FrameStack(gym.Wrapper):
    """The last 4 frames, oldest first, (4, 84, 84) uint8, with zeros before the first frame of an episode or life."""

    def __init__(self, env: gym.Env, num_frames: int = 4):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (num_frames, 84, 84), np.uint8)
        self.frames = np.zeros((num_frames, 84, 84), np.uint8)

    def reset(self, **kwargs):
        frame, info = self.env.reset(**kwargs)
        self.frames[:] = 0
        self.frames[-1] = frame
        return self.frames.copy(), info

    def step(self, action: int):
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.frames[:-1] = self.frames[1:]
        self.frames[-1] = frame
        return self.frames.copy(), reward, terminated, truncated, info


# What a checkpoint has to know of every wrapper, beside the emulator and its random generator.
WRAPPER_STATE = {
    AtariGame: ("episodic_return", "episodic_length"),
    MaxAndSkip: ("screen", "previous_screen"),
    EpisodicLife: ("lives", "game_is_over"),
    FrameStack: ("frames",),
}


def environment_state(env: gym.Env) -> dict:
    """The exact state of an environment in the middle of a game, in plain values and tensors."""
    state = {
        "emulator": env.unwrapped.ale.cloneSystemState().serialize(),
        "random_generator": env.unwrapped.np_random.bit_generator.state,
    }
    while env is not env.unwrapped:
        for name in WRAPPER_STATE.get(type(env), ()):
            value = getattr(env, name)
            state[name] = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        env = env.env
    return state


def restore_environment(env: gym.Env, state: dict) -> None:
    env.reset()
    env.unwrapped.ale.act(0)  # sets a flag that the emulator's state lacks: without it Qbert goes on wrongly
    env.unwrapped.ale.restoreSystemState(ale_py.ALEState(state["emulator"]))
    env.unwrapped.np_random.bit_generator.state = state["random_generator"]
    while env is not env.unwrapped:
        for name in WRAPPER_STATE.get(type(env), ()):
            value = state[name]
            setattr(env, name, value.numpy().copy() if isinstance(value, torch.Tensor) else value)
        env = env.env


def make_env(env_id: str, video_folder: str | None = None, **kwargs) -> gym.Env:
    """The game with the wrappers of stable-baselines3's `make_atari_env` and `VecFrameStack`, in their order."""
    env = gym.make(env_id, render_mode="rgb_array" if video_folder else None, **kwargs)
    env = AtariGame(env)
    env = NoopReset(env)
    env = MaxAndSkip(env)
    if video_folder:
        env = gym.wrappers.RecordVideo(
            env, video_folder, episode_trigger=lambda episode: True, name_prefix="evaluation", fps=15, disable_logger=True
        )
    env = EpisodicLife(env)
    if "FIRE" in env.unwrapped.get_action_meanings():
        env = FireReset(env)
    env = GrayResize(env)
    env = ClipReward(env)
    return FrameStack(env)


# ------------------------------------------------------------------------------------------------------ replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, to be drawn uniformly; every 84x84 frame is stored once, as uint8, on `device`.

    A transition is a row of numbers, written in one copy: the places of its five frames (its stack of 4 and the next one), action,
    reward, terminated. Frames before the first one of an episode or life are the place of a black frame. So the boundaries of
    episodes, lives and truncations are settled once, when a transition is written, and a mini-batch is gathered by two
    look-ups. The frames are written into a ring of their own; a transition leaves the buffer before one of its frames is
    overwritten.
    """

    def __init__(self, capacity: int, num_envs: int, device: torch.device, generator: torch.Generator):
        self.capacity, self.device, self.generator = capacity, device, generator
        self.num_frames = self.frame_capacity(capacity, num_envs)
        self.frames = torch.zeros((self.num_frames + 1, 84, 84), dtype=torch.uint8, device=device)  # the last is black
        self.rows = torch.zeros((capacity, 8), dtype=torch.float64, device=device)  # float64 is exact for all of them
        # The transitions that can be drawn. On the device, too, because a captured CUDA graph draws from them.
        self.oldest, self.size = 0, 0
        self.drawable = torch.zeros(2, dtype=torch.int64, device=device)  # (oldest, size)
        # Frames are numbered as they are written; None stands for black.
        self.frames_written = 0
        self.stacks: list[list[int | None]] = [[None] * 4 for _ in range(num_envs)]  # of the current observations
        self.oldest_frames = np.zeros(capacity, np.int64)  # no frame before this one is needed by the transition

    @staticmethod
    def frame_capacity(capacity: int, num_envs: int) -> int:
        """One frame per transition, the stacks of the oldest ones, and 1 % for the last frames of truncated games."""
        return capacity + 10 * num_envs + capacity // 100

    @staticmethod
    def num_bytes(capacity: int, num_envs: int) -> int:
        return (ReplayBuffer.frame_capacity(capacity, num_envs) + 1) * 84 * 84 + capacity * (8 * 8 + 8)

    def start_episode(self, env_index: int, frame: np.ndarray) -> None:
        """Begins an episode or life with its first frame, (84, 84) uint8."""
        self.stacks[env_index] = [None, None, None, self._write_frame(frame)]

    def add(self, env_index: int, action: int, reward: float, next_frame: np.ndarray, terminated: bool) -> None:
        """Stores a transition. The next frame of a terminated one is never looked at and not stored.

        After a truncation, too, `next_frame` is the episode's own last frame, from which the transition bootstraps;
        `start_episode` must follow.
        """
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

    def state(self) -> dict:
        """Everything but the frames, which a checkpoint holds apart from the rest."""
        state = {name: getattr(self, name) for name in ("rows", "oldest", "size", "frames_written", "stacks")}
        return state | {"oldest_frames": torch.from_numpy(self.oldest_frames)}

    def restore(self, state: dict) -> None:
        self.rows.copy_(state["rows"])
        for name in ("oldest", "size", "frames_written", "stacks"):
            setattr(self, name, state[name])
        self.oldest_frames = state["oldest_frames"].numpy().copy()
        self._publish_drawable()

    def used_frames(self) -> torch.Tensor:
        """The part of the frames that has been written, (frames, 84, 84) uint8, without a copy."""
        return self.frames[: min(self.frames_written, self.num_frames)]

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


# ------------------------------------------------------------------------------------------------ devices and copying


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

    def __init__(self, function, generator: torch.Generator | None, enabled: bool):
        self.function, self.generator, self.enabled = function, generator, enabled
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
            if self.generator is not None:
                self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):
                self.result = self.function()
        self.graph.replay()
        return self.result


# -------------------------------------------------------------------------------------------------------------- agent


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
        return self.output(F.relu(self.hidden(self.convolutions(observations))))


RESET_LAYERS = {"last1": ["output"], "last2": ["hidden", "output"], "full": ["convolutions", "hidden", "output"]}


def network_input(frames: torch.Tensor) -> torch.Tensor:
    """Stacks of frames, uint8, as the network wants them: float32 in [0, 1], channels last (faster convolutions)."""
    return frames.float().div_(255).contiguous(memory_format=torch.channels_last)


def selection_probabilities(q_values: torch.Tensor, beta: torch.Tensor | float) -> torch.Tensor:
    """p_i = softmax_i(beta * q_i / max_j |q_j|), uniform if all q are 0: (batch, N) to (batch, N).

    Dividing by the largest absolute value, not by the largest value, keeps the order of proposals whose values are
    negative (the official code clips there, and chooses uniformly).
    """
    scale = q_values.abs().amax(dim=1, keepdim=True)
    return torch.softmax(beta * torch.where(scale > 0, q_values / scale, 0.0), dim=1)


class Agent:
    """The reset deep ensemble: N DQN agents that learn from the same mini-batches, are reset in turn, and act as one."""

    def __init__(self, args: Args, num_actions: int, buffer: ReplayBuffer, device: torch.device):
        self.args, self.num_actions, self.buffer, self.device = args, num_actions, buffer, device
        # PyTorch's global generator initialises networks and serves no other purpose.
        torch.manual_seed(derive_seed(args.seed, INITIALISATION))
        self.q_networks = nn.ModuleList(QNetwork(num_actions) for _ in range(args.num_agents))
        self.q_networks.to(device, memory_format=torch.channels_last)
        self.target_networks = copy.deepcopy(self.q_networks).requires_grad_(False)
        # One Adam for all agents: a step count per parameter, so that a reset can start one agent's anew.
        self.optimizer = optim.Adam(
            self.q_networks.parameters(), lr=args.learning_rate, fused=True, capturable=device.type == "cuda"
        )
        self.oldest = torch.zeros(1, dtype=torch.int64, device=device)  # the judge, and the next to be reset
        self.beta = torch.zeros((), device=device)  # before the first reset 0: a uniform choice
        self._count_resets(0)

    @staticmethod
    def num_bytes(num_agents: int) -> int:
        """Parameters, targets, gradients and Adam's two moments, float32; the output layer's size hardly matters."""
        return num_agents * 5 * 4 * sum(parameter.numel() for parameter in QNetwork(18).parameters())

    @torch.no_grad()
    def act(self, observations: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The ensemble's greedy actions and the agents that proposed them, (2, num_envs), for (num_envs, 4, 84, 84) uint8."""
        observations = network_input(observations)
        with self.autocast():
            q_values = torch.stack([q_network(observations) for q_network in self.q_networks])  # (N, num_envs, actions)
        proposals = q_values.argmax(dim=2).T  # (num_envs, N)
        judgement = q_values.float().index_select(0, self.oldest).squeeze(0).gather(1, proposals)  # (num_envs, N)
        probabilities = selection_probabilities(judgement, self.beta)
        # An exponential race: the first of N clocks with rates p_i is clock i with probability p_i.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        acting_agents = clocks.argmin(dim=1)  # (num_envs,)
        return torch.stack([proposals.gather(1, acting_agents.unsqueeze(1)).squeeze(1), acting_agents])

    def update(self) -> torch.Tensor:
        """One gradient step of every agent on one mini-batch. Returns TD losses and mean Q-values, (2, N)."""
        args = self.args
        frames, actions, rewards, terminated = self.buffer.sample(args.batch_size)
        observations, next_observations = network_input(frames[:, :4]), network_input(frames[:, 1:])
        self.optimizer.zero_grad()
        losses, mean_q_values = [], []
        for q_network, target_network in zip(self.q_networks, self.target_networks):
            with self.autocast():
                with torch.no_grad():
                    next_q_values = target_network(next_observations).float().amax(dim=1)  # (batch_size,)
                    td_targets = rewards + args.gamma * next_q_values * (1 - terminated)  # (batch_size,)
                q_values = q_network(observations).float().gather(1, actions.unsqueeze(1)).squeeze(1)  # (batch_size,)
            loss = F.smooth_l1_loss(q_values, td_targets)
            loss.backward()
            nn.utils.clip_grad_norm_(q_network.parameters(), args.max_grad_norm, foreach=True)
            losses.append(loss.detach())
            mean_q_values.append(q_values.detach().mean())
        self.optimizer.step()
        with torch.no_grad():  # all target networks in one call
            torch._foreach_lerp_(list(self.target_networks.parameters()), list(self.q_networks.parameters()), args.tau)
        return torch.stack(losses + mean_q_values).view(2, -1)

    def reset(self) -> int:
        """Resets the oldest agent, in place (captured CUDA graphs hold the addresses), and returns its number."""
        index = self.num_resets % self.args.num_agents
        q_network, target_network = self.q_networks[index], self.target_networks[index]
        fresh_network = QNetwork(self.num_actions)
        for layer in RESET_LAYERS[self.args.reset_depth]:
            q_network.get_submodule(layer).load_state_dict(fresh_network.get_submodule(layer).state_dict())
        target_network.load_state_dict(q_network.state_dict())
        for parameter in q_network.parameters():
            for moment_or_step in self.optimizer.state[parameter].values():
                moment_or_step.zero_()
        self._count_resets(self.num_resets + 1)
        return index

    def _count_resets(self, num_resets: int) -> None:
        self.num_resets = num_resets
        self.oldest.fill_(num_resets % self.args.num_agents)
        self.beta.fill_(self.args.beta if num_resets else 0.0)

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.args.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def state(self) -> dict:
        return {
            "q_networks": self.q_networks.state_dict(),
            "target_networks": self.target_networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_resets": self.num_resets,
            "initialisation": torch.get_rng_state(),
        }

    def restore(self, state: dict) -> None:
        self.q_networks.load_state_dict(state["q_networks"])
        self.target_networks.load_state_dict(state["target_networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._count_resets(state["num_resets"])
        torch.set_rng_state(state["initialisation"])

    def weights(self) -> dict:
        """What model.pt holds, on the CPU: so it can be loaded without a GPU, too."""
        q_networks = copy.deepcopy(self.q_networks).cpu()
        return {"q_networks": [q_network.state_dict() for q_network in q_networks], "oldest_agent": self.oldest.item()}


# --------------------------------------------------------------------------------------------------------- evaluation

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


def human_normalized_score(env_id: str, score: float) -> float | None:
    """(score - random) / (human - random), or None for a game that is not one of the 26."""
    if (game := env_id.removesuffix("NoFrameskip-v4")) not in RANDOM_AND_HUMAN_SCORES:
        return None
    random_score, human_score = RANDOM_AND_HUMAN_SCORES[game]
    return (score - random_score) / (human_score - random_score)


def evaluate(
    policy, envs: list[gym.Env], seed: int, global_step: int, device: torch.device, stop: "StopSignal"
) -> list[float] | None:
    """Plays one whole game in each environment, side by side, and returns the unclipped scores (None if stopped).

    `policy` maps observations (batch, 4, 84, 84) uint8 to actions (batch,). The scores depend on the policy, the seed and
    the step alone: the games are loaded anew (some keep state from one game to the next), and the random numbers are
    their own. So an evaluation changes nothing in the training, and the two around a reset play from the same starts.
    """
    observations = [env.reset(seed=derive_seed(seed, EVALUATION, global_step, i))[0] for i, env in enumerate(envs)]
    scores, playing = [0.0] * len(envs), list(range(len(envs)))
    while playing:
        if stop.received:
            return None
        actions = policy(torch.from_numpy(np.stack([observations[i] for i in playing])).to(device)).tolist()
        for i, action in zip(tuple(playing), actions):
            observations[i], _, terminated, truncated, info = envs[i].step(action)
            if (terminated or truncated) and "episode" not in info:  # a life is lost, the game goes on
                observations[i], info = envs[i].reset()
            if "episode" in info:
                scores[i] = info["episode"]["r"]
                playing.remove(i)
    return scores


# ------------------------------------------------------------------------------------------------------------ the run


LOG_INTERVAL = 100  # environment steps between two points of the training curves


class RunFolder:
    """What a run leaves behind: TensorBoard events, args.json, episodes.csv, evaluations.csv, checkpoint.pt, model.pt."""

    def __init__(self, args: Args, device: torch.device, path: str | None = None):
        """Makes the folder, or takes that of an interrupted run, in which nothing is changed before `open`."""
        self.args, self.device, self.path = args, device, path or make_run_folder(args)
        if not self.lock():
            raise RunError(f"another process is at work in {self.path}")
        self.arguments = {name: value for name, value in vars(args).items() if name != "resume"}
        if path is None:
            self.write_args()

    def lock(self) -> bool:
        """Keeps other processes out for as long as this one lives. False if another one was first."""
        self.folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self.folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self.folder)
            return False
        return True

    def write_args(self) -> None:
        device_name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        with replaced_when_written(os.path.join(self.path, "args.json")) as file:
            content = {"args": self.arguments, "versions": package_versions(), "device": device_name}
            file.write(json.dumps(content, indent=2).encode())

    def growing_files(self) -> list[str]:
        events = sorted(glob.glob(os.path.join(glob.escape(self.path), "events.out.tfevents.*")))
        return events + [os.path.join(self.path, name) for name in ("episodes.csv", "evaluations.csv")]

    def file_sizes(self) -> dict[str, int]:
        """The sizes of the files that grow, so much of which is on the disk."""
        self.writer.flush()
        sizes = {}
        for path in self.growing_files():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                sizes[os.path.basename(path)] = os.fstat(file.fileno()).st_size
        return sizes

    def open(self, file_sizes: dict[str, int]) -> None:
        """Opens the files, cut to the sizes that they had at the checkpoint ({} = from the beginning), to go on writing."""
        self.write_args()  # --total-timesteps may have been raised
        if self.args.track:
            import wandb

            identity = os.path.basename(os.path.normpath(self.path))
            wandb.init(project=self.args.wandb_project_name, entity=self.args.wandb_entity, name=identity, id=identity,
                       resume="allow", config=self.arguments, sync_tensorboard=True)  # fmt: skip
        for path in filter(os.path.exists, self.growing_files()):
            if os.path.basename(path) in file_sizes:
                os.truncate(path, file_sizes[os.path.basename(path)])
            else:
                os.remove(path)
        self.episodes = self.open_csv("episodes.csv", "global_step", "episodic_return", "episodic_length", "wall_seconds")
        self.evaluations = self.open_csv("evaluations.csv", "global_step", "phase", "episode", "episodic_return")
        self.writer = SummaryWriter(self.path)
        atexit.register(self.flush_at_exit)

    def flush_at_exit(self) -> None:
        """However the process ends (but for a kill), what TensorBoard was told is written."""
        with contextlib.suppress(OSError):  # a full disk has been reported already
            self.writer.flush()

    def open_csv(self, name: str, *columns: str):
        file = open(os.path.join(self.path, name), "a", newline="", buffering=1)  # every row is written as it ends
        rows = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            rows.writerow(columns)
        return rows

    @property
    def checkpoint_path(self) -> str:
        return os.path.join(self.path, "checkpoint.pt")

    def log_scalars(self, global_step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, global_step)

    def log_episode(self, global_step: int, episode: dict, wall_seconds: float) -> None:
        self.episodes.writerow((global_step, episode["r"], episode["l"], f"{wall_seconds:.2f}"))
        self.log_scalars(global_step, {"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]})

    def log_evaluation(self, global_step: int, phase: str, scores: list[float]) -> None:
        self.evaluations.writerows((global_step, phase, episode, score) for episode, score in enumerate(scores))
        mean, normalized = float(np.mean(scores)), human_normalized_score(self.args.env_id, float(np.mean(scores)))
        line = f"step {global_step}: evaluation ({phase.replace('_', ' ')}) mean {mean:.1f}"
        self.writer.add_scalar("eval/episodic_return", mean, global_step)
        if normalized is not None:
            line += f", human-normalized {normalized:.3f}"
            self.writer.add_scalar("eval/human_normalized_score", normalized, global_step)
        tqdm.write(f"{line}, games {' '.join(f'{score:g}' for score in scores)}")

    def finish(self, weights: dict) -> None:
        """Leaves the weights and takes away the checkpoint, which is of no use any more."""
        weights_file = io.BytesIO()  # torch.save itself does not report a full disk as an OSError
        torch.save(weights, weights_file)
        with replaced_when_written(os.path.join(self.path, "model.pt")) as file:
            file.write(weights_file.getbuffer())
        if os.path.exists(self.checkpoint_path):
            os.remove(self.checkpoint_path)
        self.writer.close()
        tqdm.write(f"the run is in {self.path}")


def make_run_folder(args: Args) -> str:
    """A new folder. Runs of the same script, environment and seed that start in the same second wait for the next one."""
    while True:
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        path = os.path.join(args.runs_dir, name)
        try:
            os.makedirs(path)
            return path
        except FileExistsError:
            time.sleep(0.2)
        except OSError as error:
            fail(f"the run folder {path} cannot be made: {error.strerror}")


def package_versions() -> dict[str, str]:
    packages = ("torch", "numpy", "gymnasium", "ale-py", "opencv-python-headless")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # OpenCV comes in packages of several names
            versions[name] = cv2.__version__
    return versions


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
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise


class RunError(Exception):
    """Something that its message explains to the person who typed the command, without a stack trace."""


WHAT_STAYS = "what was written stays, and the run can be continued from its last checkpoint with --resume"


# -------------------------------------------------------------------------------------------------------- checkpoints


class StopSignal:
    """Remembers SIGTERM (from a cluster's scheduler) or SIGINT (Ctrl-C); the second one ends the process at once."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame) -> None:
        self.received = number
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)


# A checkpoint file: this header (magic, CRC-32 of all that follows, size of the state), the state as torch.save writes it,
# and the replay buffer's frames. They are written straight from memory: torch.save takes 3 times as long for them, copies
# what is a part of a tensor, and torch.load does not notice a flipped bit.
CHECKPOINT_HEADER = struct.Struct("<8sIQ")
CHECKPOINT_MAGIC = b"RDEckpt2"


def save_checkpoint(path: str, state: dict, frames: torch.Tensor) -> None:
    """Replaces the checkpoint; the last one stays until the new one is on the disk."""
    state_file = io.BytesIO()
    torch.save(state, state_file)
    parts = [state_file.getbuffer(), memoryview(frames.cpu().numpy()).cast("B")]
    checksum = zlib.crc32(parts[1], zlib.crc32(parts[0]))
    needed_bytes, free_bytes = sum(map(len, parts)), shutil.disk_usage(os.path.dirname(path)).free
    if needed_bytes > free_bytes:
        raise RunError(f"{path} was not written: it needs {needed_bytes / 1e6:.0f} MB, the disk has {free_bytes / 1e6:.0f} MB")
    with replaced_when_written(path) as file:
        file.write(CHECKPOINT_HEADER.pack(CHECKPOINT_MAGIC, checksum, len(parts[0])))
        for part in parts:
            file.write(part)


def load_checkpoint(path: str, args: Args, device: torch.device) -> tuple[dict, torch.Tensor]:
    """The state and the frames. Nothing in the file is executed; `RunError` if it is not this run's, or damaged."""
    content = np.memmap(path, np.uint8, mode="c") if os.path.getsize(path) else np.zeros(0, np.uint8)
    if len(content) < CHECKPOINT_HEADER.size:
        raise RunError(f"{path} is cut off")
    magic, checksum, state_size = CHECKPOINT_HEADER.unpack(content[: CHECKPOINT_HEADER.size].tobytes())
    if magic != CHECKPOINT_MAGIC:
        raise RunError(f"{path} is not a checkpoint of this version of the scripts")
    content = content[CHECKPOINT_HEADER.size :]
    if zlib.crc32(content) != checksum:
        raise RunError(f"{path} is damaged or cut off: its checksum is wrong")
    try:
        state = torch.load(io.BytesIO(content[:state_size].tobytes()), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError:
        raise RunError(f"{path} holds more than numbers and tensors, and was not loaded") from None
    if state["script"] != os.path.basename(__file__):
        raise RunError(f"{path} was written by {state['script']}, not by {os.path.basename(__file__)}")
    for name, value in vars(args).items():
        if name not in ("resume", "runs_dir", "total_timesteps") and state["args"].get(name) != value:
            raise RunError(f"{path} was written with {name} = {state['args'].get(name)}, but args.json says {value}")
    for name, value in (package_versions() | {"device": device.type}).items():
        if (written := state["versions"].get(name)) != value:
            raise RunError(f"{path} was written with {name} {written}, but here is {value}: the run would not go on exactly")
    return state, torch.from_numpy(content[state_size:]).view(-1, 84, 84)


def linear_schedule(start: float, end: float, duration: float, step: int) -> float:
    """`start` at step 0, `end` from step `duration` on."""
    return end if step >= duration else start + (end - start) * step / duration


def gradient_steps_due(args: Args, global_step: int) -> int:
    """Gradient steps that belong to the first `global_step` environment steps; exact for fractions such as 0.29."""
    return math.floor(Fraction(str(args.replay_ratio)) * max(0, global_step - args.learning_starts))


def resets_due(args: Args, gradient_steps: int) -> int:
    """Reset events that belong to so many gradient steps: one every T / N, so that each agent has T between its own."""
    return gradient_steps * args.num_agents // args.reset_interval if args.reset_interval else 0


def interval_has_passed(interval: int, global_step: int, num_envs: int) -> bool:
    """Whether the loop step that ends at `global_step` reached or passed a multiple of the interval; 0 = never."""
    return interval > 0 and global_step // interval > (global_step - num_envs) // interval


def check_finite(metrics: np.ndarray, global_step: int) -> None:
    if not np.isfinite(metrics).all():
        raise FloatingPointError(
            f"the loss or a Q-value is not finite any more at step {global_step} (losses {metrics[0].tolist()}, "
            f"Q-values {metrics[1].tolist()}); try a lower --learning-rate or --max-grad-norm"
        )


def agenda_due(args: Args, global_step: int, gradient_steps: int, num_resets: int) -> list[str]:
    """The evaluations (by their phase) and the reset that follow the loop step that ends at `global_step`."""
    if global_step >= args.total_timesteps:
        return ["final"]  # and no reset: nothing would learn from it
    if resets_due(args, gradient_steps) > num_resets:
        return ["before_reset", "reset", "after_reset"]
    return ["scheduled"] if interval_has_passed(args.eval_interval, global_step, args.num_envs) else []


def train(args: Args, resume_path: str | None = None) -> None:
    stop = StopSignal()
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    run = RunFolder(args, device, resume_path)

    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    video_folder = os.path.join(run.path, "videos") if args.capture_video else None
    eval_envs = [make_env(args.env_id, video_folder if i == 0 else None) for i in range(args.eval_episodes)]
    exploration = np.random.default_rng(derive_seed(args.seed, EXPLORATION))
    mini_batches = torch.Generator(device).manual_seed(derive_seed(args.seed, MINI_BATCHES))
    selection = torch.Generator(device).manual_seed(derive_seed(args.seed, SELECTION))

    buffer = ReplayBuffer(args.buffer_size, args.num_envs, device, mini_batches)
    num_actions = int(envs[0].action_space.n)
    agent = Agent(args, num_actions, buffer, device)
    device_observations = torch.zeros((args.num_envs, 4, 84, 84), dtype=torch.uint8, device=device)
    capture = args.cuda_graphs and device.type == "cuda"
    act = CudaGraph(lambda: agent.act(device_observations, selection), selection, capture)
    update = CudaGraph(agent.update, mini_batches, capture)

    observations = np.zeros((args.num_envs, 4, 84, 84), np.uint8)
    global_step, gradient_steps, agenda, metrics = 0, 0, [], None
    speed_steps, speed_seconds, wall_seconds = 0, 0.0, 0.0  # the speed since learning began, without evaluations
    last_returns, acting_counts = deque(maxlen=10), np.zeros(args.num_agents, np.int64)
    if os.path.exists(run.checkpoint_path):
        state, frames = load_checkpoint(run.checkpoint_path, args, device)
        buffer.frames[: len(frames)] = frames
        buffer.restore(state["buffer"])
        agent.restore(state["agent"])
        for env, environment in zip(envs, state["environments"], strict=True):
            restore_environment(env, environment)
        exploration.bit_generator.state = state["exploration"]
        mini_batches.set_state(state["mini_batches"])
        selection.set_state(state["selection"])
        observations[:] = state["observations"].numpy()
        global_step, gradient_steps, agenda = state["global_step"], state["gradient_steps"], state["agenda"]
        metrics = None if state["metrics"] is None else Download(state["metrics"])
        speed_steps, speed_seconds, wall_seconds = state["speed_steps"], state["speed_seconds"], state["wall_seconds"]
        last_returns.extend(state["last_returns"])
        acting_counts[:] = state["acting_counts"].numpy()
        if "final" in agenda and global_step < args.total_timesteps:  # the end was postponed
            agenda = agenda_due(args, global_step, gradient_steps, agent.num_resets)
        run.open(state["file_sizes"])
        torch.set_num_threads(state["num_threads"])  # with another number sums are rounded in another order
        tqdm.write(f"continuing {run.path} at step {global_step}, with {state['num_threads']} thread(s) as before")
        del state, frames
    else:
        for i, env in enumerate(envs):
            observations[i], _ = env.reset(seed=derive_seed(args.seed, ENVIRONMENT, i))
            buffer.start_episode(i, observations[i, -1])
        run.open({})
    first_step, start_time = global_step, time.time() - wall_seconds
    progress = tqdm(total=args.total_timesteps, initial=global_step, unit="step", smoothing=0.02,
                    mininterval=0.5 if sys.stderr.isatty() else 60)  # fmt: skip

    def save() -> None:
        state = {
            "script": os.path.basename(__file__), "args": vars(args), "versions": package_versions() | {"device": device.type},
            "buffer": buffer.state(), "agent": agent.state(), "environments": [environment_state(env) for env in envs],
            "exploration": exploration.bit_generator.state, "mini_batches": mini_batches.get_state(),
            "selection": selection.get_state(), "observations": torch.from_numpy(observations),
            "global_step": global_step, "gradient_steps": gradient_steps, "agenda": agenda,
            "metrics": None if metrics is None else torch.from_numpy(metrics.numpy()),
            "speed_steps": speed_steps, "speed_seconds": speed_seconds, "wall_seconds": time.time() - start_time,
            "last_returns": list(last_returns), "acting_counts": torch.from_numpy(acting_counts),
            "file_sizes": run.file_sizes(), "num_threads": torch.get_num_threads(),
        }  # fmt: skip
        save_checkpoint(run.checkpoint_path, state, buffer.used_frames())

    def evaluate_and_log(phase: str) -> bool:
        """False if a signal stopped it, and nothing was logged."""
        generator = torch.Generator(device).manual_seed(derive_seed(args.seed, EVALUATION, global_step))
        policy = lambda observations: agent.act(observations, generator)[0]
        if args.capture_video:
            eval_envs[0].set_wrapper_attr("name_prefix", f"step-{global_step}-{phase}")
        scores = evaluate(policy, eval_envs, args.seed, global_step, device, stop)
        if scores is not None:
            run.log_evaluation(global_step, phase, scores)
        return scores is not None

    while True:
        # Evaluate and reset, if that is due: the oldest agent, between two evaluations.
        if agenda and metrics is not None:
            check_finite(metrics.numpy(), global_step)
        while agenda and not stop.received:
            if agenda[0] == "reset":
                reset_agent = agent.reset()
                run.log_scalars(global_step, {"rde/reset_agent": reset_agent})
                tqdm.write(
                    f"step {global_step}: reset {args.reset_depth} of agent {reset_agent} after {gradient_steps} gradient steps"
                )
            elif not evaluate_and_log(agenda[0]):
                break
            agenda.pop(0)
        finished = global_step >= args.total_timesteps and not agenda
        checkpoint_is_due = (
            interval_has_passed(args.checkpoint_interval, global_step, args.num_envs) and global_step > first_step
        )
        if stop.received or checkpoint_is_due and not finished:
            save()
        if stop.received:
            progress.close()
            print(
                f"stopped at step {global_step}; to continue: python {sys.argv[0]} --resume {shlex.quote(run.path)}",
                file=sys.stderr,
            )
            sys.exit(128 + stop.received)
        if finished:
            break
        step_started = time.perf_counter()

        # Act: the ensemble's greedy actions, and on top, per environment, random ones with probability epsilon.
        epsilon = linear_schedule(args.start_e, args.end_e, args.exploration_fraction * args.total_timesteps, global_step)
        explore = exploration.random(args.num_envs) < epsilon
        actions = exploration.integers(num_actions, size=args.num_envs)
        if not explore.all():
            upload(observations, device_observations)
            choice = Download(act())

        # Learn. Launched before the emulator runs, so that the GPU trains while the CPU plays.
        previous_metrics = metrics
        if global_step >= args.learning_starts:
            new_gradient_steps = gradient_steps_due(args, global_step + args.num_envs) - gradient_steps
            for _ in range(new_gradient_steps):
                metrics = update()
            if new_gradient_steps:
                metrics = Download(metrics)
                gradient_steps += new_gradient_steps

        # Step the environments and store what happened.
        if not explore.all():
            greedy_actions, acting_agents = choice.numpy()
            actions = np.where(explore, actions, greedy_actions)
            acting_counts += np.bincount(acting_agents[~explore], minlength=args.num_agents)
        global_step += args.num_envs
        for i, env in enumerate(envs):
            next_observation, reward, terminated, truncated, info = env.step(actions[i])
            buffer.add(i, actions[i], reward, next_observation[-1], terminated)
            if terminated or truncated:
                next_observation, reset_info = env.reset()
                buffer.start_episode(i, next_observation[-1])
                info = info | reset_info
            observations[i] = next_observation
            if "episode" in info:
                last_returns.append(info["episode"]["r"])
                run.log_episode(global_step, info["episode"], time.time() - start_time)
        if gradient_steps:
            speed_steps, speed_seconds = speed_steps + args.num_envs, speed_seconds + time.perf_counter() - step_started

        # Log. The losses are those of the loop step before: they are on the host by now, and cost no wait.
        if previous_metrics is not None:
            check_finite(previous_metrics.numpy(), global_step - args.num_envs)
        if interval_has_passed(LOG_INTERVAL, global_step, args.num_envs):
            scalars = {"charts/epsilon": epsilon, "rde/oldest_agent": agent.num_resets % args.num_agents}
            if previous_metrics is not None:
                scalars["charts/SPS"] = speed_steps / speed_seconds
                for i, (loss, q_value) in enumerate(previous_metrics.numpy().T):
                    scalars |= {f"losses/td_loss_{i}": loss, f"losses/q_values_{i}": q_value}
            for i, count in enumerate(acting_counts):
                scalars[f"rde/acting_fraction_{i}"] = count / max(1, acting_counts.sum())
            acting_counts[:] = 0
            run.log_scalars(global_step, scalars)
            mean_return = f"{np.mean(last_returns):.1f}" if last_returns else "-"
            progress.set_postfix_str(
                f"return={mean_return} epsilon={epsilon:.2f} SPS={scalars.get('charts/SPS', 0):.0f}", refresh=False
            )
        progress.update(args.num_envs)

        agenda = agenda_due(args, global_step, gradient_steps, agent.num_resets)

    progress.close()
    for env in envs + eval_envs:
        env.close()
    run.finish(agent.weights())


def find_unfinished_run(args: Args) -> str | None:
    """The newest run folder with the same arguments that is not finished and has no process at work in it."""
    paths = glob.glob(os.path.join(glob.escape(args.runs_dir), f"{glob.escape(args.env_id)}__*", "args.json"))
    for path in sorted(map(os.path.dirname, paths), reverse=True):  # the names end in the time of the start
        try:
            saved = dataclasses.replace(read_run_args(path), resume=args.resume, runs_dir=args.runs_dir)
        except RunError:
            continue
        if saved == args and not is_finished(path) and not is_locked(path):
            return path
    return None


def is_locked(path: str) -> bool:
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(folder)
    return False


def is_finished(path: str) -> bool:
    return os.path.exists(os.path.join(path, "model.pt"))


def read_run_args(path: str) -> Args:
    """The arguments of the run in a folder."""
    try:
        with open(os.path.join(path, "args.json")) as file:
            args = Args(**json.load(file)["args"])
        for name, default in vars(Args()).items():
            kind = (int, float) if isinstance(default, float) else type(default)
            if default is not None and not isinstance(getattr(args, name), kind):
                raise TypeError
        return args
    except OSError as error:
        raise RunError(f"{path} is not a run folder: args.json: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is not a run folder of {os.path.basename(__file__)}: its args.json does not fit") from None


def resume_args(args: Args, path: str) -> Args:
    """The arguments of the run in the folder. Only --total-timesteps may be given anew, and only be raised."""
    saved = dataclasses.replace(read_run_args(path), resume=args.resume)
    args = dataclasses.replace(tyro.cli(Args, description=__doc__, default=saved), runs_dir=saved.runs_dir)
    for name, value in vars(saved).items():
        if name != "total_timesteps" and getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} differs from the {value} of the run in {path}; "
                 "a resumed run keeps its arguments, only --total-timesteps may be raised")  # fmt: skip
    if is_finished(path):
        fail(f"the run in {path} is finished")
    if args.total_timesteps < saved.total_timesteps:
        fail(f"--total-timesteps {args.total_timesteps} is less than the run's {saved.total_timesteps}; it may only be raised")
    if args.total_timesteps > saved.total_timesteps:
        print(f"warning: with --total-timesteps {args.total_timesteps} instead of {saved.total_timesteps} the decay of "
              "epsilon, a fraction of the run, is another one from here on", file=sys.stderr)  # fmt: skip
    return args


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    try:
        path = find_unfinished_run(args) if args.resume == "auto" else args.resume or None
        if path is not None:
            args = resume_args(args, path)
        check_args(args)
        train(args, path)
    except (RunError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(f"error: {error}; {WHAT_STAYS}")


if __name__ == "__main__":
    main()
