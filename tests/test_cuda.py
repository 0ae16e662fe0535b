"""The CUDA path: captured and plain calls give the same numbers. Skipped, and so not tested, where there is no GPU."""

import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest
import torch

from agents import OBSERVATION_DIM, dqn_agent, sac_agent
from conftest import QUICK, assert_same_end, command, load_script, model, only_run, rows, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the CUDA path is NOT tested here")
DEVICE = torch.device("cuda")
ATARI = [("dqn_atari", {}), ("sr_dqn_atari", {}), *(("rde_dqn_atari", {"num_agents": n}) for n in (1, 2, 3))]
SAC = [("rde_sac_dmc", {"num_agents": n}) for n in (1, 3)] + [("rde_sac_dmc", {"num_agents": 2, "critic_norm": "layer"})]
BY_ADVANTAGE = [(name, {"num_agents": 3, "selection": "advantage"}) for name in ("rde_dqn_atari", "rde_sac_dmc")]


def learn(name: str, captured: bool, arguments: dict):
    """12 updates and 12 choices, with a reset in between: metrics, choices and weights."""
    script, rng = load_script(name), np.random.default_rng(0)
    torch.backends.cudnn.deterministic = True
    if name == "rde_sac_dmc":
        agent = sac_agent(script, stored=100, hidden_dim=64, device=DEVICE, **arguments)
        observations = torch.from_numpy(rng.normal(size=(8, OBSERVATION_DIM)).astype(np.float32)).to(DEVICE)
    else:
        depth = {"reset_depth": "full"} if name != "dqn_atari" else {}
        agent = dqn_agent(script, size=300, stored=100, device=DEVICE, **depth, **arguments)
        observations = torch.from_numpy(rng.integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)).to(DEVICE)
    # One greedy agent draws nothing; SAC's has a generator for its random actions, too.
    generators = [
        torch.Generator(DEVICE).manual_seed(2 + i) for i in range({"rde_dqn_atari": 1, "rde_sac_dmc": 2}.get(name, 0))
    ]
    update = script.CudaGraph(agent.update, [agent.buffer.generator], captured)
    act = script.CudaGraph(lambda: agent.act(observations, *generators), generators, captured)
    metrics, choices = [], []
    for step in range(12):
        assert update() is None
        metrics.append(agent.metrics.clone())
        choices.append(act().clone())
        agent.transitions.store(1)  # what can be drawn grows under the captured graph
        if step == 7 and hasattr(agent, "reset"):
            agent.reset()
    assert (update.graph is not None) == (act.graph is not None) == captured
    names = ("q_network", "q_networks", "actors", "critics")
    parameters = [p.detach().clone() for n in names if hasattr(agent, n) for p in getattr(agent, n).parameters()]
    return torch.stack(metrics), torch.stack(choices), parameters


@pytest.mark.parametrize("name, arguments", ATARI + SAC + BY_ADVANTAGE)
@pytest.mark.parametrize("bf16", [False, True])
def test_captured_and_plain_calls_give_the_same_numbers(name, arguments, bf16):
    captured, plain = (learn(name, captured, arguments | {"bf16": bf16}) for captured in (True, False))
    torch.testing.assert_close(captured[0], plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(captured[1], plain[1], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(captured[2], plain[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def start(runs_dir: pathlib.Path, script: str, *arguments) -> subprocess.Popen:
    # Without the progress bar: what nobody reads in time fills the pipe, and then the process waits.
    return subprocess.Popen(command(script, *arguments, "--runs-dir", runs_dir),
                            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip


def training_games(process: subprocess.Popen, runs_dir: pathlib.Path) -> list[tuple]:
    """Of a run on the GPU, without their seconds; its model can be loaded without a GPU."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    folder = only_run(runs_dir)
    assert '"device": "cpu"' not in (folder / "args.json").read_text()
    assert {tensor.device.type for tensor in tensors(model(folder))} == {"cpu"}
    return rows(folder, "episodes.csv")


SHORT = "--hidden-dim 32 --batch-size 32 --buffer-size 2000 --eval-interval 0 --eval-episodes 1 --env-id "
SHORT_SAC = f"{SHORT} cartpole-balance --learning-starts 500 --total-timesteps 1100 --reset-interval 300".split()
SHORT_MLP = f"{SHORT} CartPole-v1 --learning-starts 200 --total-timesteps 1000 --reset-interval 200".split()
SHORT_SAFETY = f"{SHORT} SafetyHopperVelocity-v1 --learning-starts 200 --total-timesteps 600 --reset-interval 200".split()


@pytest.mark.parametrize(
    "script, arguments",
    [("dqn_atari", QUICK), ("sr_dqn_atari", [*QUICK, "--reset-interval", "60"]),
     ("rde_dqn_atari", [*QUICK, "--reset-interval", "120"]), ("rde_drq_atari", [*QUICK, "--reset-interval", "40"]),
     ("rde_drq_atari", [*QUICK, "--reset-interval", "40", "--anneal", "--num-atoms", "1"]), ("rnd_dqn_atari", QUICK),
     ("rde_dqn", SHORT_MLP), ("rde_sac_dmc", SHORT_SAC), ("rde_sac_safety", SHORT_SAFETY),
     ("rde_dqn", [*SHORT_MLP, "--selection", "advantage"]), ("rde_sac_safety", [*SHORT_SAFETY, "--selection", "advantage"])],
)  # fmt: skip
def test_a_whole_run_captured_and_not(tmp_path, script, arguments):
    folders = tmp_path / "captured", tmp_path / "plain"
    processes = start(folders[0], script, *arguments), start(folders[1], script, *arguments, "--no-cuda-graphs")
    captured, plain = (training_games(*one) for one in zip(processes, folders, strict=True))
    assert captured == plain and len(captured) > 0


@pytest.mark.parametrize(
    "script, arguments, games",
    [("rde_dqn_atari", [*QUICK, "--reset-interval", "120"], 2), ("rde_dqn", SHORT_MLP, 10),
     ("rde_sac_safety", SHORT_SAFETY, 10)],
)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_same_end(tmp_path, script, arguments, games):
    """Stopped by SIGTERM after so many games; graphs are captured anew, random numbers go on where they were."""
    folders = tmp_path / "undisturbed", tmp_path / "stopped"
    undisturbed, stopped = (start(folder, script, *arguments) for folder in folders)
    deadline = time.monotonic() + 300
    while not any(folders[1].glob("*/episodes.csv")) or len(rows(only_run(folders[1]), "episodes.csv")) < games:
        assert stopped.poll() is None and time.monotonic() < deadline, stopped.stderr.read()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=300)
    assert stopped.returncode == 143, errors
    resumed = start(folders[1], script, *arguments)
    for process in (resumed, undisturbed):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert_same_end(only_run(folders[1]), only_run(folders[0]))
