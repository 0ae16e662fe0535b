"""Reset deep ensemble of SAC agents (RDE+SAC) on the DeepMind Control Suite.

    python rde_sac_dmc.py --env-id hopper-hop

N agents learn from one replay buffer. They are reset one after another against primacy bias, and act as one: every agent
proposes an action of its policy, and the oldest agent, whose reset lies longest back, judges the proposals with the smaller
of its two critics. The baselines are this script, too: SR+SAC is `--num-agents 1`, SAC `--num-agents 1 --reset-interval 0`.
The paper's sizes are made for a GPU; without one, `--hidden-dim 256 --batch-size 256` are sizes to wait for.

Kim, Shin, Park, Sung, "Sample-Efficient and Safe Deep RL via Reset Deep Ensemble Agents", NeurIPS 2023 (arXiv 2310.20287).
SAC: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018 (arXiv 1812.05905).
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
import warnings
import zlib
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

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
    """record the first episode of every evaluation as a video in the run folder"""
    runs_dir: str = "runs"
    """the folder in which the run's own folder is made"""
    checkpoint_interval: int = 25_000
    """environment steps between two checkpoints; 0 = only when the run is stopped by SIGTERM or SIGINT (Ctrl-C)"""
    resume: str = ""
    """a run folder to continue exactly, with its own arguments (--total-timesteps may be raised);
    "auto" = the newest unfinished run with the same arguments, or a new one"""

    env_id: str = "hopper-hop"
    """the task of the DeepMind Control Suite, as domain-task"""
    total_timesteps: int = 1_000_000
    """environment steps (actions, none is repeated) of the whole run"""
    num_envs: int = 1
    """environments that are advanced together, once in a loop step"""
    learning_rate: float = 3e-4
    """learning rate of the three Adams: actors, critics, entropy coefficients"""
    buffer_size: int = 1_000_000
    """transitions in the replay buffer"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """how far the target critics move towards the critics after a gradient step"""
    batch_size: int = 1_024
    """transitions in a mini-batch"""
    replay_ratio: float = 1.0
    """gradient steps per environment step; fractions are allowed"""
    learning_starts: int = 5_000
    """environment steps, with uniformly random actions, before the first gradient step"""
    hidden_dim: int = 1_024
    """width of the hidden layers of actors and critics"""
    num_hidden_layers: int = 2
    """hidden layers of actors and critics"""
    eval_interval: int = 10_000
    """environment steps between two evaluations; 0 = only at the end"""
    eval_episodes: int = 10
    """whole episodes in an evaluation"""

    reset_interval: int = 400_000
    """gradient steps of one agent between two of its own resets; 0 = never"""

    num_agents: int = 2
    """agents in the ensemble"""
    beta: float = 50.0
    """how strongly the choice of the acting agent prefers a high Q-value; 0 = uniform"""


def fail(message: str) -> None:
    """Ends the program because of a wrong argument: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args: Args) -> None:
    """Refuses what cannot work before anything is created; what needs no dm_control, which is slow to import, comes first."""
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
                 "hidden_dim", "num_hidden_layers", "eval_episodes"):  # fmt: skip
        if getattr(args, name) == 0:
            fail(f"--{name.replace('_', '-')} is 0, but must be positive")
    for name in ("gamma", "tau"):
        if getattr(args, name) > 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must lie between 0 and 1")

    if args.learning_starts >= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} leaves nothing of --total-timesteps {args.total_timesteps} to learn in")
    if gradient_steps_due(args, args.total_timesteps) == 0:
        fail(f"--replay-ratio {args.replay_ratio} leaves --total-timesteps {args.total_timesteps} without a gradient step")
    if args.batch_size > min(args.learning_starts, args.buffer_size):
        fail(f"--batch-size {args.batch_size} is more than the {min(args.learning_starts, args.buffer_size)} transitions "
             "that are stored when learning starts; raise --learning-starts or --buffer-size")  # fmt: skip
    if args.buffer_size < args.num_envs:
        fail(f"--buffer-size {args.buffer_size} is too small for one step of {args.num_envs} environments")
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
    for flag, wanted, package in (("--track", args.track, "wandb"), ("--capture-video", args.capture_video, "moviepy")):
        if wanted and importlib.util.find_spec(package) is None:
            fail(f"{flag} needs the package {package}: pip install {package}")

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
        fail(f"--env-id {args.env_id} is not a task of the DeepMind Control Suite, as domain-task; {hint}")
    if args.env_id.startswith("lqr-"):
        fail(f"--env-id {args.env_id} has actions without bounds and episodes without end; use one of the other domains")
    env = make_env(args.env_id)
    if draws:
        try:
            env.reset()
            env.render()
        except Exception as error:
            fail_to_draw(error)

    on_gpu = args.cuda and torch.cuda.is_available()
    free_bytes = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    for flag, value, needed_bytes in (
        ("--buffer-size", args.buffer_size, ReplayBuffer.num_bytes(args.buffer_size, *dims)),
        (f"--num-agents {args.num_agents} of --hidden-dim", args.hidden_dim, Agent.num_bytes(args, *dims)),
    ):
        if needed_bytes > free_bytes:
            fail(f"{flag} {value} needs {needed_bytes / 1e9:.2f} GB, but only {free_bytes / 1e9:.2f} GB "
                 f"are free {'on the GPU' if on_gpu else 'in memory'}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ seeding

# One random generator per purpose, so that a baseline and its RDE variant stay paired where they do the same thing.
ENVIRONMENT, EXPLORATION, MINI_BATCHES, INITIALISATION, SELECTION, EVALUATION = range(6)


def derive_seed(seed: int, purpose: int, *indices: int) -> int:
    """An independent 32-bit seed for a purpose (and the environment, the step, ... within it)."""
    return int(np.random.SeedSequence([seed, purpose, *indices]).generate_state(1)[0])


# ------------------------------------------------------------------------------------------------------- environments


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

    def __init__(self, env_id: str, render_mode: str | None = None):
        self.env = import_suite().load(*env_id.split("-"))
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / self.env.control_timestep())}
        observation_dim = sum(math.prod(spec.shape) for spec in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32)
        self.action_spec = self.env.action_spec()
        self.action_space = gym.spaces.Box(-1.0, 1.0, self.action_spec.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
        self.episodic_return, self.episodic_length = 0.0, 0
        return self.flatten(self.env.reset().observation), {}

    def step(self, action: np.ndarray):
        low, high = self.action_spec.minimum, self.action_spec.maximum
        try:
            timestep = self.env.step(low + (action.astype(np.float64) + 1) / 2 * (high - low))
        except RuntimeError as error:  # dm_control's PhysicsError: a state that is not finite any more
            raise RunError(f"the physics failed: {error}; {WHAT_STAYS}") from error
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


def make_env(env_id: str, video_folder: str | None = None) -> gym.Env:
    """The task, in [-1, 1]; with a video of every episode if there is a folder for it."""
    env = DeepMindControl(env_id, render_mode="rgb_array" if video_folder else None)
    if video_folder:
        env = gym.wrappers.RecordVideo(
            env, video_folder, episode_trigger=lambda episode: True, name_prefix="evaluation", disable_logger=True
        )
    return env


# What the tasks write into the model of the physics at the start of an episode: targets, terrain, tendons, colors.
MODEL_ARRAYS = ("body_pos", "body_quat", "dof_damping", "geom_pos", "geom_rgba", "geom_size", "hfield_data", "light_pos",
                "site_pos", "site_rgba", "site_size", "wrap_prm")  # fmt: skip


def environment_state(env: gym.Env) -> dict:
    """The exact state of an environment in the middle of an episode, in plain values and tensors."""
    import mujoco  # late, as in `import_suite`

    control, physics, task = env.env, env.env.physics, env.env.task
    _, random_key, *random_rest = task.random.get_state()
    return {
        # With the time, the controls and the solver's warm start, which `physics.get_state()` alone lacks.
        "physics": torch.from_numpy(physics.get_state(int(mujoco.mjtState.mjSTATE_INTEGRATION))),
        "model": {name: torch.from_numpy(np.array(getattr(physics.model, name))) for name in MODEL_ARRAYS},
        "task": {name: value.item() if isinstance(value, np.generic) else value
                 for name, value in vars(task).items() if isinstance(value, (int, float, np.generic))},
        "random_generator": (torch.from_numpy(random_key.astype(np.int64)), *random_rest),
        "step_count": control._step_count,
        "reset_next_step": control._reset_next_step,
        "episodic_return": env.episodic_return,
        "episodic_length": env.episodic_length,
    }  # fmt: skip


def restore_environment(env: gym.Env, state: dict) -> None:
    import mujoco  # late, as in `import_suite`

    env.reset()
    control, physics, task = env.env, env.env.physics, env.env.task
    for name, array in state["model"].items():
        getattr(physics.model, name)[:] = array.numpy()
    physics.set_state(state["physics"].numpy(), int(mujoco.mjtState.mjSTATE_INTEGRATION))
    warm_start = physics.data.qacc_warmstart.copy()
    physics.forward()  # all that follows from the state; it starts the solver anew
    physics.data.qacc_warmstart[:] = warm_start
    for name, value in state["task"].items():
        setattr(task, name, value)
    random_key, *random_rest = state["random_generator"]
    task.random.set_state(("MT19937", random_key.numpy().astype(np.uint32), *random_rest))
    control._step_count, control._reset_next_step = state["step_count"], state["reset_next_step"]
    env.episodic_return, env.episodic_length = state["episodic_return"], state["episodic_length"]


# ------------------------------------------------------------------------------------------------------ replay buffer


class ReplayBuffer:
    """The last `capacity` transitions, to be drawn uniformly; each is one row of float32 on `device`.

    A row is observation, action, reward, terminated, next observation. The next observation is stored with every
    transition, so that a truncated one bootstraps from its own last observation and not from the next episode's first.
    """

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device, generator: torch.Generator):
        self.capacity, self.device, self.generator = capacity, device, generator
        self.widths = [observation_dim, action_dim, 1, 1, observation_dim]
        self.rows = torch.zeros((capacity, sum(self.widths)), dtype=torch.float32, device=device)
        self.num_added = 0
        self.size = torch.zeros((), dtype=torch.int64, device=device)  # on the device: a captured CUDA graph draws from it

    @staticmethod
    def num_bytes(capacity: int, observation_dim: int, action_dim: int) -> int:
        return capacity * 4 * (2 * observation_dim + action_dim + 2)

    def add(
        self, observation: np.ndarray, action: np.ndarray, reward: float, terminated: bool, next_observation: np.ndarray
    ) -> None:
        """Stores a transition, over the oldest one if there is no room left."""
        row = np.concatenate([observation, action, [reward, terminated], next_observation], dtype=np.float32)
        upload(row, self.rows[self.num_added % self.capacity])
        self._count_added(self.num_added + 1)

    def _count_added(self, num_added: int) -> None:
        self.num_added = num_added
        self.size.fill_(min(num_added, self.capacity))

    def state(self) -> dict:
        """Everything but the rows, which a checkpoint holds apart from the rest."""
        return {"num_added": self.num_added}

    def restore(self, state: dict, row_bytes: torch.Tensor) -> None:
        self._count_added(state["num_added"])
        used_rows = self.used_rows()
        used_rows.copy_(row_bytes.view_as(used_rows))

    def used_rows(self) -> torch.Tensor:
        """The bytes of the rows that have been written (the first one in any case), (rows, 4 * width) uint8, without a copy."""
        return self.rows[: max(1, min(self.num_added, self.capacity))].view(torch.uint8)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draws transitions uniformly, with replacement, all float32.

        Returns observations (batch_size, observation_dim), actions (batch_size, action_dim), rewards (batch_size,),
        terminated (batch_size,) and next observations (batch_size, observation_dim).
        """
        draws = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=self.generator)
        rows = self.rows.index_select(0, (draws * self.size).long())  # (batch_size, sum of the widths)
        observations, actions, rewards, terminated, next_observations = rows.split(self.widths, dim=1)
        return observations, actions, rewards.squeeze(1), terminated.squeeze(1), next_observations


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


class StackedMLP(nn.Module):
    """Several MLPs of one shape with ReLU, computed together: (num_networks, batch, inputs) to (num_networks, batch, outputs).

    A matrix product for all networks at once fills a GPU that one network leaves half idle, and for small networks it saves
    most of the time on a CPU, too. The weights are stacked, (num_networks, inputs, outputs) in every layer.
    """

    def __init__(self, num_networks: int, widths: list[int]):
        super().__init__()
        layers = list(zip(widths, widths[1:]))
        self.weights = nn.ParameterList(torch.zeros(num_networks, fan_in, fan_out) for fan_in, fan_out in layers)
        self.biases = nn.ParameterList(torch.zeros(num_networks, 1, fan_out) for _, fan_out in layers)
        self.layers = list(zip(self.weights, self.biases))  # on a CPU ParameterLists cost 4 % of the training loop

    @torch.no_grad()
    def initialise(self, network: int) -> None:
        """Gives one of the networks, in place, the values of freshly built `nn.Linear` layers."""
        for weight, bias in self.layers:
            layer = nn.Linear(weight.shape[1], weight.shape[2])
            weight[network] = layer.weight.T
            bias[network, 0] = layer.bias

    def forward(self, inputs: torch.Tensor, networks: torch.Tensor | None = None) -> torch.Tensor:
        """All networks, or those whose numbers are given on the device."""
        for depth, (weight, bias) in enumerate(self.layers):
            if networks is not None:
                weight, bias = weight.index_select(0, networks), bias.index_select(0, networks)
            if depth:
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


def selection_probabilities(q_values: torch.Tensor, beta: torch.Tensor | float) -> torch.Tensor:
    """p_i = softmax_i(beta * q_i / max_j |q_j|), uniform if all q are 0: (batch, N) to (batch, N).

    Dividing by the largest absolute value, not by the largest value, keeps the order of proposals whose values are
    negative (the official code clips there, and chooses uniformly).
    """
    scale = q_values.abs().amax(dim=1, keepdim=True)
    return torch.softmax(beta * torch.where(scale > 0, q_values / scale, 0.0), dim=1)


class Agent:
    """The reset deep ensemble: N SAC agents that learn from the same mini-batches, are reset in turn, and act as one.

    Actor i is agent i's; its two critics, and their targets, are 2 * i and 2 * i + 1.
    """

    def __init__(self, args: Args, observation_dim: int, action_dim: int, buffer: ReplayBuffer, device: torch.device):
        self.args, self.action_dim, self.buffer, self.device = args, action_dim, buffer, device
        self.target_entropy = -float(action_dim)
        hidden = [args.hidden_dim] * args.num_hidden_layers
        self.actors = StackedMLP(args.num_agents, [observation_dim, *hidden, 2 * action_dim]).to(device)
        self.critics = StackedMLP(2 * args.num_agents, [observation_dim + action_dim, *hidden, 1]).to(device)
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
        self.beta = torch.zeros((), device=device)  # before the first reset 0: a uniform choice
        self._count_resets(0)

    @staticmethod
    def num_bytes(args: Args, observation_dim: int, action_dim: int) -> int:
        """Parameters, gradients, Adam's two moments and, of the two critics, targets: float32."""
        width, inner = args.hidden_dim, (args.num_hidden_layers - 1) * (args.hidden_dim + 1) * args.hidden_dim
        actor = (observation_dim + 1) * width + inner + (width + 1) * 2 * action_dim
        critic = (observation_dim + action_dim + 1) * width + inner + (width + 1)
        return args.num_agents * 4 * (4 * actor + 2 * 5 * critic)

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
    def act(self, observations: torch.Tensor, generator: torch.Generator, deterministic: bool = False) -> torch.Tensor:
        """The ensemble's actions and, in the last column, the agents that proposed them, (num_envs, action_dim + 1).

        For observations (num_envs, observation_dim). The agents propose samples of their policies, or their modes.
        """
        num_envs, num_agents = len(observations), self.args.num_agents
        mean, log_std = self.policies(observations)
        noise = torch.zeros_like(mean) if deterministic else torch.empty_like(mean).normal_(generator=generator)
        proposals = squashed_gaussian(mean, log_std, noise)[0].transpose(0, 1)  # (num_envs, N, action_dim)
        if num_agents == 1:  # nothing to choose, and so nothing to judge
            return torch.cat([proposals[:, 0], torch.zeros_like(proposals[:, 0, :1])], dim=1)
        inputs = torch.cat([observations.unsqueeze(1).expand(-1, num_agents, -1), proposals], dim=2).flatten(0, 1)
        with self.autocast():
            judging_critics = 2 * self.oldest + torch.arange(2, device=self.device)
            judgements = self.critics(inputs.expand(2, -1, -1), judging_critics)  # (2, num_envs * N, 1)
        judgement = judgements.float().amin(dim=0).view(num_envs, num_agents)
        probabilities = selection_probabilities(judgement, self.beta)
        # An exponential race: the first of N clocks with rates p_i is clock i with probability p_i.
        clocks = torch.empty_like(probabilities).exponential_(generator=generator) / probabilities
        acting_agents = clocks.argmin(dim=1)  # (num_envs,)
        actions = proposals[torch.arange(num_envs, device=self.device), acting_agents]  # (num_envs, action_dim)
        return torch.cat([actions, acting_agents.unsqueeze(1)], dim=1)

    def update(self) -> torch.Tensor:
        """One gradient step of every agent on one mini-batch, in stable-baselines3's order: alpha, critics, actor, targets.

        Returns critic losses, mean Q-values, actor losses and alphas, (4, N).
        """
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
        return torch.stack([critic_losses.detach(), mean_q_values, actor_losses.detach(), alphas.squeeze(1)])

    def reset(self) -> int:
        """Resets the oldest agent, in place (captured CUDA graphs hold the addresses), and returns its number."""
        index = self.num_resets % self.args.num_agents
        self.initialise(index)
        for optimizer in (self.actor_optimizer, self.critic_optimizer, self.alpha_optimizer):
            for parameter in optimizer.param_groups[index]["params"]:
                for moment_or_step in optimizer.state[parameter].values():
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
            "actors": self.actors.state_dict(),
            "critics": self.critics.state_dict(),
            "target_critics": self.target_critics.state_dict(),
            "log_alphas": self.log_alphas,
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "alpha_optimizer": self.alpha_optimizer.state_dict(),
            "num_resets": self.num_resets,
            "initialisation": torch.get_rng_state(),
        }

    @torch.no_grad()
    def restore(self, state: dict) -> None:
        """In place: the optimizers hold slices of the parameters."""
        for name in ("actors", "critics", "target_critics", "actor_optimizer", "critic_optimizer", "alpha_optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.log_alphas.copy_(state["log_alphas"])
        self._count_resets(state["num_resets"])
        torch.set_rng_state(state["initialisation"])

    def weights(self) -> dict:
        """What model.pt holds, on the CPU: so it can be loaded without a GPU, too."""
        return {
            "actors": copy.deepcopy(self.actors).cpu().state_dict(),
            "critics": copy.deepcopy(self.critics).cpu().state_dict(),
            "log_alphas": self.log_alphas.cpu(),
            "oldest_agent": self.oldest.item(),
        }


# --------------------------------------------------------------------------------------------------------- evaluation


def evaluate(
    policy, envs: list[gym.Env], seed: int, global_step: int, device: torch.device, stop: "StopSignal"
) -> list[float] | None:
    """Plays one whole episode in each environment, side by side, and returns the scores (None if stopped).

    `policy` maps observations (batch, observation_dim) to actions (batch, action_dim). The scores depend on the policy, the
    seed and the step alone: the random numbers are their own. So an evaluation changes nothing in the training, and the two
    around a reset play from the same starts.
    """
    observations = [env.reset(seed=derive_seed(seed, EVALUATION, global_step, i))[0] for i, env in enumerate(envs)]
    scores, playing = [0.0] * len(envs), list(range(len(envs)))
    while playing:
        if stop.received:
            return None
        actions = policy(torch.from_numpy(np.stack([observations[i] for i in playing])).to(device)).cpu().numpy()
        for i, action in zip(tuple(playing), actions):
            observations[i], _, _, _, info = envs[i].step(action)
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
        mean = float(np.mean(scores))
        self.writer.add_scalar("eval/episodic_return", mean, global_step)
        line = f"step {global_step}: evaluation ({phase.replace('_', ' ')}) mean {mean:.1f}"
        tqdm.write(f"{line}, episodes {' '.join(f'{score:.1f}' for score in scores)}")

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
    packages = ("torch", "numpy", "gymnasium", "dm-control", "mujoco")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


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
    """The state and the bytes of the replay buffer's rows. Nothing in the file is executed; `RunError` if it is not this run's, or damaged."""
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
    return state, torch.from_numpy(content[state_size:])


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
            f"Q-values {metrics[1].tolist()}); try a lower --learning-rate"
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

    observation_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, observation_dim, action_dim, device, mini_batches)
    agent = Agent(args, observation_dim, action_dim, buffer, device)
    device_observations = torch.zeros((args.num_envs, observation_dim), device=device)
    capture = args.cuda_graphs and device.type == "cuda"
    act = CudaGraph(lambda: agent.act(device_observations, selection), selection, capture)
    update = CudaGraph(agent.update, mini_batches, capture)

    observations = np.zeros((args.num_envs, observation_dim), np.float32)
    global_step, gradient_steps, agenda, metrics = 0, 0, [], None
    speed_steps, speed_seconds, wall_seconds = 0, 0.0, 0.0  # the speed since learning began, without evaluations
    last_returns, acting_counts = deque(maxlen=10), np.zeros(args.num_agents, np.int64)
    if os.path.exists(run.checkpoint_path):
        state, row_bytes = load_checkpoint(run.checkpoint_path, args, device)
        buffer.restore(state["buffer"], row_bytes)
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
        del state, row_bytes
    else:
        for i, env in enumerate(envs):
            observations[i], _ = env.reset(seed=derive_seed(args.seed, ENVIRONMENT, i))
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
        save_checkpoint(run.checkpoint_path, state, buffer.used_rows())

    def evaluate_and_log(phase: str) -> bool:
        """False if a signal stopped it, and nothing was logged."""
        generator = torch.Generator(device).manual_seed(derive_seed(args.seed, EVALUATION, global_step))
        policy = lambda observations: agent.act(observations, generator, deterministic=True)[:, :-1]
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
                tqdm.write(f"step {global_step}: reset of agent {reset_agent} after {gradient_steps} gradient steps")
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

        # Act: uniformly random until learning starts, then the ensemble's sample.
        warm_up = global_step < args.learning_starts
        if warm_up:
            actions = exploration.uniform(-1, 1, (args.num_envs, action_dim)).astype(np.float32)
        else:
            upload(observations, device_observations)
            choice = Download(act())

        # Learn. Launched before the environment runs, so that the GPU trains while the CPU plays.
        previous_metrics = metrics
        if not warm_up:
            new_gradient_steps = gradient_steps_due(args, global_step + args.num_envs) - gradient_steps
            for _ in range(new_gradient_steps):
                metrics = update()
            if new_gradient_steps:
                metrics = Download(metrics)
                gradient_steps += new_gradient_steps

        # Step the environments and store what happened.
        if not warm_up:
            actions, acting_agents = np.split(choice.numpy(), [action_dim], axis=1)
            if not np.isfinite(actions).all():  # the physics would stop with an error of its own
                raise FloatingPointError(f"an action is not finite any more at step {global_step}; try a lower --learning-rate")
            acting_counts += np.bincount(acting_agents[:, 0].astype(np.int64), minlength=args.num_agents)
        global_step += args.num_envs
        for i, env in enumerate(envs):
            next_observation, reward, terminated, truncated, info = env.step(actions[i])
            buffer.add(observations[i], actions[i], reward, terminated, next_observation)
            if terminated or truncated:
                next_observation, _ = env.reset()
                last_returns.append(info["episode"]["r"])
                run.log_episode(global_step, info["episode"], time.time() - start_time)
            observations[i] = next_observation
        if gradient_steps:
            speed_steps, speed_seconds = speed_steps + args.num_envs, speed_seconds + time.perf_counter() - step_started

        # Log. The losses are those of the loop step before: they are on the host by now, and cost no wait.
        if previous_metrics is not None:
            check_finite(previous_metrics.numpy(), global_step - args.num_envs)
        if interval_has_passed(LOG_INTERVAL, global_step, args.num_envs):
            scalars = {"rde/oldest_agent": agent.num_resets % args.num_agents}
            if previous_metrics is not None:
                scalars["charts/SPS"] = speed_steps / speed_seconds
                for i, (critic_loss, q_value, actor_loss, alpha) in enumerate(previous_metrics.numpy().T):
                    scalars |= {f"losses/critic_loss_{i}": critic_loss, f"losses/q_values_{i}": q_value}
                    scalars |= {f"losses/actor_loss_{i}": actor_loss, f"losses/alpha_{i}": alpha}
            for i, count in enumerate(acting_counts):
                scalars[f"rde/acting_fraction_{i}"] = count / max(1, acting_counts.sum())
            acting_counts[:] = 0
            run.log_scalars(global_step, scalars)
            mean_return = f"{np.mean(last_returns):.1f}" if last_returns else "-"
            progress.set_postfix_str(f"return={mean_return} SPS={scalars.get('charts/SPS', 0):.0f}", refresh=False)
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
