"""The speed of the training loops, of their parts, and of other people's loops, on a real game and a real task.

    python benchmark_speed.py                     # prints one table, all rows measured in this process and in turn
    python benchmark_speed.py --csv speed.csv --rounds 5
    python benchmark_speed.py --suites dmc safety --hidden-dim 1024 --batch-size 1024

Every row is measured in every round, for about --seconds each; a row's figure is the median over the rounds, and a ratio is
the median of the ratios within a round. So what else goes on on the machine hits all rows alike.
"""

import contextlib
import copy
import csv
import datetime
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import deque
from typing import Annotated, Literal

import rde_dqn_atari as rde  # isort: skip  (first: it says how threads wait, before PyTorch is imported)
import rde_dqn as mlp  # isort: skip
import rde_drq_atari as drq  # isort: skip
import rde_sac_dmc as sac  # isort: skip
import rde_sac_safety as safety  # isort: skip
import rnd_dqn_atari as rnd  # isort: skip

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@dataclass(config={"allow_inf_nan": False})
class Args:
    env_id: str = "AlienNoFrameskip-v4"
    """the game, as <Game>NoFrameskip-v4"""
    task: str = "walker-run"
    """the task of the DeepMind Control Suite, as domain-task"""
    suites: tuple[Literal["atari", "dmc", "safety", "minigrid"], ...] = ("atari", "dmc", "safety", "minigrid")
    """what is measured: DQN, RND and DrQ on the game; SAC on the task; SAC with costs; DQN on MiniGrid"""
    hidden_dim: PositiveInt = 256
    """SAC: width of the hidden layers"""
    batch_size: Annotated[int, Field(gt=0, le=500)] = 256
    """SAC: transitions in a mini-batch, at most the 500 that the loops begin with"""
    rounds: PositiveInt = 5
    """how often every row is measured"""
    seconds: PositiveFloat = 2.0
    """how long a row is measured in a round, about"""
    num_agents: Counts = (1, 2, 4, 8)
    """ensemble sizes of DQN"""
    num_sac_agents: Counts = (1, 2, 5, 10)
    """ensemble sizes of SAC"""
    replay_ratios: Counts = (1, 2, 4)
    """gradient steps per environment step"""
    cuda: bool = True
    """measure on the GPU if there is one"""
    csv: str | None = None
    """write the table to this file, too"""


class EmulatorAlone:
    """Four frames a step, random actions, nothing looked at: what no wrapper can beat."""

    def __init__(self, env_id: str):
        self.ale = gym.make(env_id).unwrapped.ale
        self.actions = self.ale.getMinimalActionSet()
        self.generator = np.random.default_rng(0)

    def step(self) -> None:
        action = self.actions[self.generator.integers(len(self.actions))]
        for _ in range(4):
            self.ale.act(action)
        if self.ale.game_over():
            self.ale.reset_game()


class RandomPlay:
    """The emulator and the wrappers with random actions: the ceiling of every training loop with one environment."""

    def __init__(self, env_id: str):
        self.env, self.generator = rde.make_env(rde.Args(env_id=env_id)), np.random.default_rng(0)
        self.env.reset(seed=0)

    def step(self) -> None:
        _, _, terminated, truncated, _ = self.env.step(self.generator.integers(self.env.action_space.n))
        if terminated or truncated:
            self.env.reset()


class TrainingLoop:
    """The meat of the script's loop: act, learn, step, store. Exploration and logging are left out."""

    def __init__(self, env_id: str, device: torch.device, script=rde, **arguments):
        self.args = args = script.Args(env_id=env_id, buffer_size=10_000, **arguments)
        self.env, self.device = script.make_env(args), device
        n_step = (args.n_step,) if hasattr(args, "n_step") else ()
        self.buffer = script.ReplayBuffer(args.buffer_size, 1, torch.Generator(device).manual_seed(0), *n_step)
        self.agent = script.Agent(args, self.env.observation_space, self.env.action_space, self.buffer, device)
        if script is not rnd:
            self.agent.reset()  # so that the oldest agent judges
        selection = torch.Generator(device).manual_seed(1)
        self.device_observations = torch.zeros((1, 4, 84, 84), dtype=torch.uint8, device=device)
        capture = args.cuda_graphs and device.type == "cuda"
        self.act = rde.CudaGraph(lambda: self.agent.act(self.device_observations, selection), [selection], capture)
        self.update = rde.CudaGraph(self.agent.update, [self.buffer.generator], capture)
        self.observations = np.zeros((1, 4, 84, 84), np.uint8)
        self.observations[0], _ = self.env.reset(seed=0)
        self.buffer.start_episode(0, self.observations[0, -1])
        generator = np.random.default_rng(0)
        for _ in range(500):
            self.play(int(generator.integers(self.env.action_space.n)))

    def play(self, action: int) -> None:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.buffer.add(0, action, reward, observation[-1], terminated)
        if terminated or truncated:
            observation, _ = self.env.reset()
            self.buffer.start_episode(0, observation[-1])
        self.observations[0] = observation

    def step(self) -> None:
        rde.upload(self.observations, self.device_observations)
        choice = rde.Download(self.act())
        for _ in range(int(self.args.replay_ratio)):
            self.update()
        self.play(choice.numpy()[0, 0])


class UpdateAlone:
    """Nothing but the gradient steps of all agents: in a loop a GPU does them while the emulator runs."""

    def __init__(self, loop):
        self.step = loop.update


class NaiveLoop:
    """The common form: a deque of tuples, np.stack, an update of its own for every agent."""

    def __init__(self, env_id: str, device: torch.device, num_agents: int):
        self.env, self.device = rde.make_env(rde.Args(env_id=env_id)), device
        self.networks = [rde.QNetwork(int(self.env.action_space.n)).to(device) for _ in range(num_agents)]
        self.targets = [copy.deepcopy(network) for network in self.networks]
        self.optimizers = [torch.optim.Adam(network.parameters(), lr=1e-4) for network in self.networks]
        self.transitions = deque(maxlen=10_000)
        self.observation, _ = self.env.reset(seed=0)
        for _ in range(500):
            self.play(self.env.action_space.sample())

    def play(self, action: int) -> None:
        observation, reward, terminated, truncated, _ = self.env.step(action)
        self.transitions.append((self.observation, action, reward, observation, float(terminated)))
        if terminated or truncated:
            observation, _ = self.env.reset()
        self.observation = observation

    def step(self) -> None:
        with torch.no_grad():
            observation = torch.tensor(self.observation, device=self.device).float().unsqueeze(0) / 255
            q_values = [network(observation) for network in self.networks]
            proposals = [values.argmax(1).item() for values in q_values]
            judgement = np.array([q_values[0][0, action].item() for action in proposals])
            probabilities = np.exp(50 * judgement / np.abs(judgement).max() - 50)
            action = proposals[np.random.choice(len(proposals), p=probabilities / probabilities.sum())]
        self.play(action)
        batch = random.sample(self.transitions, 32)
        columns = [torch.tensor(np.stack(column), device=self.device) for column in zip(*batch, strict=True)]
        observations, next_observations = columns[0].float() / 255, columns[3].float() / 255
        actions, rewards, terminated = columns[1], columns[2].float(), columns[4].float()
        for network, target, optimizer in zip(self.networks, self.targets, self.optimizers, strict=True):
            with torch.no_grad():
                td_targets = rewards + 0.99 * target(next_observations).max(1).values * (1 - terminated)
            loss = F.smooth_l1_loss(network(observations).gather(1, actions.unsqueeze(1)).squeeze(1), td_targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10)
            optimizer.step()
            for target_parameter, parameter in zip(target.parameters(), network.parameters(), strict=True):
                target_parameter.data.copy_(0.005 * parameter.data + 0.995 * target_parameter.data)


class StableBaselines3:
    """Its DQN with CnnPolicy, on its own wrappers, one gradient step per environment step."""

    def __init__(self, env_id: str, device: torch.device):
        env = VecFrameStack(make_atari_env(env_id, n_envs=1, seed=0), n_stack=4)
        self.model = DQN("CnnPolicy", env, learning_rate=1e-4, buffer_size=10_000, learning_starts=100, batch_size=32, tau=0.005,
                         train_freq=1, gradient_steps=1, target_update_interval=1, exploration_fraction=1e-9,
                         exploration_final_eps=0.01, device=device)  # fmt: skip
        self.model.learn(150)

    def steps(self, count: int) -> None:
        self.model.learn(count, reset_num_timesteps=False)


class RandomMotion:
    """The physics with random actions: the ceiling of SAC's loop with one environment."""

    def __init__(self, task: str):
        self.env, self.generator = sac.make_env(sac.Args(env_id=task)), np.random.default_rng(0)
        self.env.reset(seed=0)

    def step(self) -> None:
        action = self.generator.uniform(-1, 1, self.env.action_space.shape).astype(np.float32)
        _, _, terminated, truncated, _ = self.env.step(action)
        if terminated or truncated:
            self.env.reset()


class SACTrainingLoop:
    """The meat of SAC's loop: act, learn, step, store."""

    def __init__(self, task: str, device: torch.device, script=sac, **arguments):
        args = script.Args(env_id=task, buffer_size=10_000, **arguments)
        self.env, self.device = script.make_env(args), device
        spaces = self.env.observation_space, self.env.action_space
        self.buffer = script.ReplayBuffer(args.buffer_size, *spaces, torch.Generator(device).manual_seed(0))
        self.agent = script.Agent(args, *spaces, self.buffer, device)
        self.agent.reset()  # so that the oldest agent judges
        generators = [torch.Generator(device).manual_seed(seed) for seed in (1, 2)]  # of the choice, and of random actions
        self.device_observations = torch.zeros((1, *spaces[0].shape), device=device)
        capture = args.cuda_graphs and device.type == "cuda"
        self.act = sac.CudaGraph(lambda: self.agent.act(self.device_observations, *generators), generators, capture)
        self.update = sac.CudaGraph(self.agent.update, [self.buffer.generator], capture)
        self.observation, _ = self.env.reset(seed=0)
        generator = np.random.default_rng(0)
        for _ in range(500):
            self.play(generator.uniform(-1, 1, spaces[1].shape).astype(np.float32))

    def play(self, action: np.ndarray) -> None:
        next_observation, reward, terminated, truncated, info = self.env.step(action)
        cost = (info["cost"],) if "cost" in info else ()
        self.buffer.add(self.observation, action, reward, *cost, terminated, next_observation)
        self.observation = self.env.reset()[0] if terminated or truncated else next_observation

    def step(self) -> None:
        sac.upload(self.observation[None], self.device_observations)
        choice = sac.Download(self.act())
        self.update()
        self.play(choice.numpy()[0, :-1])


class StableBaselines3SAC:
    """Its SAC with networks and mini-batches of the same sizes, one gradient step per environment step."""

    def __init__(self, task: str, device: torch.device, hidden_dim: int, batch_size: int):
        self.model = SAC("MlpPolicy", sac.make_env(sac.Args(env_id=task)), buffer_size=10_000, learning_starts=500, batch_size=batch_size,
                         policy_kwargs={"net_arch": [hidden_dim, hidden_dim]}, device=device, seed=0)  # fmt: skip
        self.model.learn(550)

    def steps(self, count: int) -> None:
        self.model.learn(count, reset_num_timesteps=False)


class MLPTrainingLoop:
    """The meat of the MLPs' loop on MiniGrid: act, learn, step, store; one gradient step per environment step."""

    def __init__(self, device: torch.device, num_agents: int):
        self.args = args = mlp.Args(buffer_size=10_000, num_agents=num_agents)
        self.env = mlp.make_env(args)
        spaces = self.env.observation_space, self.env.action_space
        self.buffer = mlp.ReplayBuffer(args.buffer_size, *spaces, torch.Generator(device).manual_seed(0))
        self.agent = mlp.Agent(args, *spaces, self.buffer, device)
        self.agent.reset()  # so that the oldest agent judges
        selection = torch.Generator(device).manual_seed(1)
        self.device_observations = torch.zeros((1, *spaces[0].shape), device=device)
        capture = args.cuda_graphs and device.type == "cuda"
        self.act = mlp.CudaGraph(lambda: self.agent.act(self.device_observations, selection), [selection], capture)
        self.update = mlp.CudaGraph(self.agent.update, [self.buffer.generator], capture)
        self.num_updates = 0
        self.observation, _ = self.env.reset(seed=0)
        generator = np.random.default_rng(0)
        for _ in range(500):
            self.play(generator.integers(spaces[1].n, size=1))

    def play(self, action: np.ndarray) -> None:
        next_observation, reward, terminated, truncated, _ = self.env.step(action[0])
        self.buffer.add(self.observation, action, reward, terminated, next_observation)
        self.observation = self.env.reset()[0] if terminated or truncated else next_observation

    def step(self) -> None:
        mlp.upload(self.observation[None], self.device_observations)
        choice = mlp.Download(self.act())
        self.update()
        self.num_updates += 1
        if self.num_updates % self.args.target_update_interval == 0:
            self.agent.copy_to_targets()
        self.play(choice.numpy()[0])


class StableBaselines3MLP:
    """Its DQN with MlpPolicy, with networks and mini-batches of the same sizes, one gradient step per environment step."""

    def __init__(self, device: torch.device):
        args = mlp.Args()
        self.model = DQN("MlpPolicy", mlp.make_env(args), learning_rate=args.learning_rate, buffer_size=10_000, learning_starts=500,
                         batch_size=args.batch_size, train_freq=1, gradient_steps=1, target_update_interval=args.target_update_interval,
                         exploration_fraction=1e-9, exploration_final_eps=0.01, device=device, seed=0,
                         policy_kwargs={"net_arch": [args.hidden_dim] * args.num_hidden_layers})  # fmt: skip
        self.model.learn(550)

    def steps(self, count: int) -> None:
        self.model.learn(count, reset_num_timesteps=False)


class Contended:
    """Another row, while one process of one thread competes with this one, as on a shared machine."""

    def __init__(self, row):
        self.row = row
        self.steps = row.steps if hasattr(row, "steps") else self.repeat

    def repeat(self, count: int) -> None:
        for _ in range(count):
            self.row.step()

    @contextlib.contextmanager
    def competition(self):
        # In a session of its own: Linux shares the processor among sessions first.
        program = "print(flush=True)\nwhile True: pass"
        competitor = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
        try:
            competitor.stdout.readline()
            yield
        finally:
            competitor.kill()
            competitor.wait()


def seconds_per_step(row, count: int, device: torch.device) -> float:
    with row.competition() if isinstance(row, Contended) else contextlib.nullcontext():
        start = time.perf_counter()
        if hasattr(row, "steps"):
            row.steps(count)
        else:
            for _ in range(count):
                row.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / count


def steps_in(row, seconds: float, device: torch.device) -> int:
    """How many steps of the row take so long. The first calls, in which a CUDA graph is captured, are not typical."""
    seconds_per_step(row, 5, device)
    count = 1
    while (per_step := seconds_per_step(row, count, device)) * count < seconds / 4:
        count *= 2
    return max(3, round(seconds / per_step))


def update_gflop(num_actions: int) -> float:
    """One agent's update on a batch of 32: two forward passes, and a backward pass that costs two but for the first layer."""
    layers = [20 * 20 * 32 * 4 * 64, 9 * 9 * 64 * 32 * 16, 7 * 7 * 64 * 64 * 9, 3136 * 512, 512 * num_actions]
    return 32 * 2 * (4 * sum(layers) - layers[0]) / 1e9


def update_gigabytes(num_actions: int) -> float:
    """What one agent's update reads and writes of its parameters and of what belongs to them, if nothing stays in a cache.

    Forward of the network and of its target, backward (read the parameters, write the gradients), the gradients' norm and
    scaling, Adam (read parameters, gradients and two moments, write all but the gradients), target (read both, write one).
    """
    passes = 1 + 1 + 2 + 3 + 7 + 3
    return passes * 4 * sum(parameter.numel() for parameter in rde.QNetwork(num_actions).parameters()) / 1e9


def sac_update_gflop(args: Args, observation_dim: int, action_dim: int) -> float:
    """One agent's update. The actor: forward for both observations, and backward. Each of the two critics: forward for its
    target, for the mini-batch and for the policy's actions; backward for its own parameters, and through its inputs for the actor.
    """
    width = args.hidden_dim
    actor = [observation_dim * width, width * width, width * 2 * action_dim]
    critic = [(observation_dim + action_dim) * width, width * width, width]
    products = (4 * sum(actor) - actor[0]) + 2 * (6 * sum(critic) - critic[0])
    return args.batch_size * 2 * products / 1e9


def best_seconds(function, device: torch.device) -> float:
    """Of ten calls at a time: on a GPU a single one is shorter than its launch."""
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return best


def matrix_gflops(device: torch.device) -> float:
    """What the machine does in float32 (TF32 on a GPU): square matrix products, in GFLOP/s."""
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.rand(size, size, device=device)
    product = torch.empty_like(matrix)
    return 2 * size**3 / 1e9 / best_seconds(lambda: torch.mm(matrix, matrix, out=product), device)


def memory_gigabytes_per_second(device: torch.device) -> float:
    """Copies of 256 MB, read and written."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / 1e9 / best_seconds(lambda: target.copy_(source), device)


def replay_buffer_gigabytes(device: torch.device) -> float:
    """What the tensors of a replay buffer of 100,000 transitions take on the device."""
    buffer = rde.ReplayBuffer(100_000, 1, torch.Generator(device))
    return sum(value.nbytes for value in vars(buffer).values() if isinstance(value, torch.Tensor)) / 1e9


ATARI_CEILING, DMC_CEILING = "emulator + wrappers (the ceiling)", "physics (the ceiling of SAC)"
CONTENDED = ", with one competing process"


UPDATES = {  # of other scripts for Atari, whose loops differ in this from rde_dqn_atari.py's
    "RND-DQN": (rnd, {}),
    "RND-DQN, --intrinsic-coef 0": (rnd, {"intrinsic_coef": 0.0}),
    "DrQ, N = 1": (drq, {"num_agents": 1}),
    "DrQ, N = 1, --no-augmentation": (drq, {"num_agents": 1, "augmentation": False}),
    "DrQ, N = 1, --width 0.5": (drq, {"num_agents": 1, "width": 0.5}),
    "DrQ, N = 1, --width 0.5 --num-atoms 1": (drq, {"num_agents": 1, "width": 0.5, "num_atoms": 1}),
}


def atari_rows(args: Args, device: torch.device) -> dict:
    rows = {"emulator alone, 4 frames": EmulatorAlone(args.env_id), ATARI_CEILING: RandomPlay(args.env_id)}
    for num_agents in args.num_agents:
        for replay_ratio in args.replay_ratios:
            name = f"training loop, N = {num_agents}, replay ratio {replay_ratio}"
            rows[name] = TrainingLoop(args.env_id, device, num_agents=num_agents, replay_ratio=replay_ratio)
        rows[f"update alone, N = {num_agents}"] = UpdateAlone(TrainingLoop(args.env_id, device, num_agents=num_agents))
    for name, (script, arguments) in UPDATES.items():
        rows[f"update alone, {name}"] = UpdateAlone(TrainingLoop(args.env_id, device, script, **arguments))
    rows["training loop, N = 2, replay ratio 1, --bf16"] = TrainingLoop(args.env_id, device, num_agents=2, bf16=True)
    if device.type == "cuda":
        name = "training loop, N = 2, replay ratio 1, --no-cuda-graphs"
        rows[name] = TrainingLoop(args.env_id, device, num_agents=2, cuda_graphs=False)
    rows["naive loop, N = 1"] = NaiveLoop(args.env_id, device, 1)
    rows["naive loop, N = 2"] = NaiveLoop(args.env_id, device, 2)
    rows["stable-baselines3's DQN (N = 1)"] = StableBaselines3(args.env_id, device)
    return rows | contended(rows)


def contended(rows: dict) -> dict:
    """Some of the rows once more, on a machine that is not alone."""
    names = (
        "update alone, N = 2",
        "SAC training loop, N = 2",
        "stable-baselines3's DQN (N = 1)",
        "stable-baselines3's SAC (N = 1)",
    )
    return {name + CONTENDED: Contended(rows[name]) for name in names if name in rows}


def dmc_rows(args: Args, device: torch.device) -> dict:
    sizes = {"hidden_dim": args.hidden_dim, "batch_size": args.batch_size}
    rows = {DMC_CEILING: RandomMotion(args.task)}
    for num_agents in args.num_sac_agents:
        rows[f"SAC training loop, N = {num_agents}"] = SACTrainingLoop(args.task, device, num_agents=num_agents, **sizes)
    if device.type == "cuda":
        rows["SAC training loop, N = 2, --no-cuda-graphs"] = SACTrainingLoop(args.task, device, cuda_graphs=False, **sizes)
    rows["stable-baselines3's SAC (N = 1)"] = StableBaselines3SAC(args.task, device, **sizes)
    return rows | contended(rows)


def safety_rows(args: Args, device: torch.device) -> dict:
    """Observations and actions of both tasks have the same sizes."""
    sizes = {"num_agents": 1, "hidden_dim": args.hidden_dim, "batch_size": args.batch_size}
    costs = SACTrainingLoop("SafetyHalfCheetahVelocity-v1", device, safety, **sizes)
    return {
        "update alone, SAC (cheetah-run)": UpdateAlone(SACTrainingLoop("cheetah-run", device, **sizes)),
        "update alone, SAC-Lag (SafetyHalfCheetahVelocity-v1)": UpdateAlone(costs),
    }


def minigrid_rows(args: Args, device: torch.device) -> dict:
    rows = {f"MLP training loop, N = {count}": MLPTrainingLoop(device, count) for count in args.num_agents}
    return rows | {"stable-baselines3's DQN with MLPs (N = 1)": StableBaselines3MLP(device)}


ROWS = {"atari": atari_rows, "dmc": dmc_rows, "safety": safety_rows, "minigrid": minigrid_rows}
# Rows that no loop of their suite can be faster than.
CEILINGS = {"atari": ATARI_CEILING, "dmc": DMC_CEILING, "safety": None, "minigrid": None}


def check_args(args: Args) -> None:
    rde.check_args(rde.Args(env_id=args.env_id))
    sac.check_args(sac.Args(env_id=args.task))
    if args.csv:
        try:
            open(args.csv, "a").close()
        except OSError as error:
            rde.fail(f"--csv {args.csv} cannot be written: {error.strerror}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = rde.Args().torch_deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.set_flush_denormal(True)  # as a run does
    suites = {suite: ROWS[suite](args, device) for suite in ROWS if suite in args.suites}
    rows = {name: row for suite in suites.values() for name, row in suite.items()}

    counts = {name: steps_in(row, args.seconds, device) for name, row in rows.items()}
    seconds = {name: [] for name in rows}
    for round_number in range(args.rounds):
        for name, row in rows.items():
            seconds[name].append(seconds_per_step(row, counts[name], device))
        print(f"round {round_number + 1} of {args.rounds}", file=sys.stderr)

    def ratio(name: str, other: str) -> float:
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    table = []
    for name in rows:
        ceiling = CEILINGS[next(suite for suite, names in suites.items() if name in names)]
        per_second = statistics.median(1 / value for value in seconds[name])
        over_ceiling = f"{ratio(name, ceiling):.3f}" if ceiling else "-"
        table.append((name, f"{per_second:.1f}", f"{statistics.median(seconds[name]) * 1e3:.2f}", over_ceiling))
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)),
                            capture_output=True, text=True, check=False).stdout.strip() or "no commit"  # fmt: skip
    measured = [args.env_id] * ("atari" in args.suites)
    measured += [f"{args.task} ({args.hidden_dim} wide, batch {args.batch_size})"] * ("dmc" in args.suites)
    measured += [f"SAC-Lag ({args.hidden_dim} wide, batch {args.batch_size})"] * ("safety" in args.suites)
    measured += [mlp.Args().env_id] * ("minigrid" in args.suites)
    print(f"{', '.join(measured)}, {device_name}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
          f"commit {commit}, {datetime.date.today()}, median of {args.rounds} rounds\n")  # fmt: skip
    print("| row | steps/s | ms per step | over the ceiling |\n|---|---|---|---|")
    for line in table:
        print("| " + " | ".join(line) + " |")

    print()
    for first, second in [
        (ATARI_CEILING, "emulator alone, 4 frames"),
        ("training loop, N = 2, replay ratio 1", "naive loop, N = 2"),
        ("training loop, N = 2, replay ratio 1, --bf16", "naive loop, N = 2"),
        ("training loop, N = 1, replay ratio 1", "stable-baselines3's DQN (N = 1)"),
        ("SAC training loop, N = 1", "stable-baselines3's SAC (N = 1)"),
        ("MLP training loop, N = 1", "stable-baselines3's DQN with MLPs (N = 1)"),
        ("MLP training loop, N = 2", "MLP training loop, N = 1"),
    ]:
        if first in rows and second in rows:
            print(f"{first}, over {second}: {ratio(first, second):.2f}")
    if {"update alone, N = 2", "update alone, N = 8"} <= rows.keys():
        print(f"time of an update, N = 8 over N = 2: {ratio('update alone, N = 2', 'update alone, N = 8'):.2f}")
    for name in [f"update alone, {name}" for name in UPDATES]:
        if {name, "update alone, N = 1"} <= rows.keys():
            print(
                f"time of an update, {name.removeprefix('update alone, ')} over DQN, N = 1: {ratio('update alone, N = 1', name):.2f}"
            )
    if "safety" in suites:
        print(f"time of an update, SAC-Lag over SAC: {ratio(*suites['safety']):.2f}")
    for name in rows:
        if name.endswith(CONTENDED):
            print(f"{name.removesuffix(CONTENDED)}: {ratio(name.removesuffix(CONTENDED), name):.2f} times as long{CONTENDED}")
    gflops = matrix_gflops(device) if {"atari", "dmc"} & {*args.suites} else None
    if "atari" in args.suites:
        gflop = update_gflop(rows[ATARI_CEILING].env.action_space.n)
        print(f"floor of one DQN agent's update: {gflop:.2f} GFLOP at {gflops:.0f} GFLOP/s (matrix product) = "
              f"{gflop / gflops * 1e3:.2f} ms")  # fmt: skip
        gigabytes, rate = update_gigabytes(rows[ATARI_CEILING].env.action_space.n), memory_gigabytes_per_second(device)
        print(f"its parameters' traffic: {gigabytes:.3f} GB at {rate:.0f} GB/s (copying) = {gigabytes / rate * 1e3:.2f} ms")
        print(f"replay buffer of 100,000 transitions: {replay_buffer_gigabytes(device):.3f} GB")
    if "dmc" in args.suites:
        env = rows[DMC_CEILING].env
        gflop = sac_update_gflop(args, env.observation_space.shape[0], env.action_space.shape[0])
        print(f"floor of one SAC agent's update: {gflop:.2f} GFLOP at {gflops:.0f} GFLOP/s (matrix product) = "
              f"{gflop / gflops * 1e3:.2f} ms")  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    print(f"peak memory of this process with all rows: {peak / 1e9:.2f} GB on the host", end="")
    print(f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB on the GPU" if device.type == "cuda" else "")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows([("row", "steps_per_second", "ms_per_step", "over_ceiling"), *table])


if __name__ == "__main__":
    main()
