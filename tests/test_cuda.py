"""The CUDA path: captured and plain calls give the same numbers. Skipped, and so not tested, where there is no GPU."""

import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch

from conftest import QUICK, command, load_script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the CUDA path is NOT tested here")
DEVICE = torch.device("cuda")
ATARI = [("dqn_atari", {}), ("sr_dqn_atari", {}), *(("rde_dqn_atari", {"num_agents": n}) for n in (1, 2, 3))]
SAC = [("rde_sac_dmc", {"num_agents": n}) for n in (1, 3)]


def make_atari(script, generator: torch.Generator, arguments: dict):
    """An agent, observations for it to act on, and a function that stores the next transition."""
    if "num_agents" in arguments:
        arguments = arguments | {"reset_depth": "full"}
    buffer, rng = script.ReplayBuffer(300, 1, DEVICE, generator), np.random.default_rng(0)
    picture = lambda: rng.integers(0, 256, (84, 84), dtype=np.uint8)
    buffer.start_episode(0, picture())
    agent = script.Agent(script.Args(buffer_size=300, **arguments), 6, buffer, DEVICE)

    def store(step: int) -> None:
        buffer.add(0, int(rng.integers(6)), 1.0, picture(), step == 105)
        if step == 105:
            buffer.start_episode(0, picture())

    return agent, torch.from_numpy(rng.integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)).to(DEVICE), store


def make_sac(script, generator: torch.Generator, arguments: dict):
    buffer, rng = script.ReplayBuffer(300, 5, 2, DEVICE, generator), np.random.default_rng(0)
    agent = script.Agent(script.Args(hidden_dim=64, batch_size=32, **arguments), 5, 2, buffer, DEVICE)

    def store(step: int) -> None:
        buffer.add(rng.normal(size=5), rng.uniform(-1, 1, 2), 1.0, step == 105, rng.normal(size=5))

    return agent, torch.from_numpy(rng.normal(size=(8, 5)).astype(np.float32)).to(DEVICE), store


def learn(name: str, captured: bool, arguments: dict):
    """12 updates and 12 choices, with a reset in between: metrics, choices and weights."""
    script = load_script(name)
    torch.backends.cudnn.deterministic = True
    mini_batches, selection = (torch.Generator(DEVICE).manual_seed(seed) for seed in (1, 2))
    make = make_sac if name == "rde_sac_dmc" else make_atari
    agent, observations, store = make(script, mini_batches, arguments)
    draws = name in ("rde_dqn_atari", "rde_sac_dmc")  # one greedy agent draws nothing
    update = script.CudaGraph(agent.update, mini_batches, captured)
    act = script.CudaGraph(lambda: agent.act(observations, *[selection] * draws), *([selection] if draws else [None]), captured)
    for step in range(100):
        store(step)
    metrics, choices = [], []
    for step in range(100, 112):
        metrics.append(update().clone())
        choices.append(act().clone())
        store(step)  # what can be drawn grows under the captured graph
        if step == 107 and hasattr(agent, "reset"):
            agent.reset()
    assert (update.graph is not None) == (act.graph is not None) == captured
    networks = ("q_network", "q_networks", "actors", "critics")
    parameters = [p.detach().clone() for n in networks if hasattr(agent, n) for p in getattr(agent, n).parameters()]
    return torch.stack(metrics), torch.stack(choices), parameters


@pytest.mark.parametrize("name, arguments", ATARI + SAC)
@pytest.mark.parametrize("bf16", [False, True])
def test_captured_and_plain_calls_give_the_same_numbers(name, arguments, bf16):
    captured, plain = (learn(name, captured, arguments | {"bf16": bf16}) for captured in (True, False))
    torch.testing.assert_close(captured[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(captured[1], plain[1], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(captured[2], plain[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def run(tmp_path: pathlib.Path, script: str, *arguments) -> tuple[list[str], dict]:
    """The training games of a run on the GPU, without their seconds, and its model, as loaded without a GPU."""
    before = set(tmp_path.iterdir())
    result = subprocess.run(command(script, *arguments, "--runs-dir", tmp_path), env=os.environ | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder,) = set(tmp_path.iterdir()) - before
    assert '"device": "cpu"' not in (folder / "args.json").read_text()
    games = [row.rsplit(",", 1)[0] for row in (folder / "episodes.csv").read_text().splitlines()]
    model = torch.load(folder / "model.pt", weights_only=True)
    for values in model.values():
        for value in values if isinstance(values, list) else [values]:
            for tensor in value.values() if isinstance(value, dict) else [value]:
                assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cpu"
    return games, model


SHORT_SAC = (
    "--env-id cartpole-balance --hidden-dim 32 --batch-size 32 --buffer-size 2000 --learning-starts 500 --total-timesteps 1100 "
    "--eval-interval 0 --eval-episodes 1 --reset-interval 300"
).split()


@pytest.mark.parametrize(
    "script, arguments",
    [("dqn_atari", QUICK), ("sr_dqn_atari", [*QUICK, "--reset-interval", "60"]),
     ("rde_dqn_atari", [*QUICK, "--reset-interval", "120"]), ("rde_sac_dmc", SHORT_SAC)],
)  # fmt: skip
def test_a_whole_run_captured_and_not(tmp_path, script, arguments):
    captured, plain = run(tmp_path, script, *arguments), run(tmp_path, script, *arguments, "--no-cuda-graphs")
    assert captured[0] == plain[0] and len(captured[0]) > 1
