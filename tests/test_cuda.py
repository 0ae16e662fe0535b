"""The CUDA path: captured and plain calls give the same numbers. Skipped, and so not tested, where there is no GPU."""

import numpy as np
import pytest
import torch

from conftest import QUICK, load_script, run_script

rde = load_script("rde_dqn_atari")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: the CUDA path is NOT tested here")


def learn(captured: bool, num_agents: int, bf16: bool):
    """12 updates and 12 choices with a reset in between. Returns weights, metrics, actions and acting agents."""
    device = torch.device("cuda")
    torch.backends.cudnn.deterministic = True
    args = rde.Args(num_agents=num_agents, buffer_size=300, bf16=bf16, reset_depth="full")
    mini_batches, selection = (torch.Generator(device).manual_seed(seed) for seed in (1, 2))
    buffer, rng = rde.ReplayBuffer(300, 1, device, mini_batches), np.random.default_rng(0)
    picture = lambda: rng.integers(0, 256, (84, 84), dtype=np.uint8)
    buffer.start_episode(0, picture())
    agent = rde.Agent(args, 6, buffer, device)
    observations = torch.from_numpy(rng.integers(0, 256, (8, 4, 84, 84), dtype=np.uint8)).to(device)
    update = rde.CudaGraph(agent.update, mini_batches, captured)
    act = rde.CudaGraph(lambda: agent.act(observations, selection), selection, captured)
    for _ in range(100):
        buffer.add(0, int(rng.integers(6)), 1.0, picture(), False)
    metrics, choices = [], []
    for step in range(12):
        metrics.append(update().clone())
        choices.append(act().clone())
        buffer.add(0, int(rng.integers(6)), 1.0, picture(), step == 5)  # what can be drawn grows under the captured graph
        if step == 5:
            buffer.start_episode(0, picture())
        if step == 7:
            agent.reset()
    assert (update.graph is not None) == (act.graph is not None) == captured
    return torch.stack(metrics), torch.stack(choices), [p.detach().clone() for p in agent.q_networks.parameters()]


@pytest.mark.parametrize("num_agents", [1, 2, 3])
@pytest.mark.parametrize("bf16", [False, True])
def test_captured_and_plain_calls_give_the_same_numbers(num_agents, bf16):
    (metrics, choices, weights), (plain_metrics, plain_choices, plain_weights) = (
        learn(captured, num_agents, bf16) for captured in (True, False)
    )
    torch.testing.assert_close(metrics, plain_metrics, rtol=1e-5, atol=1e-6)
    assert torch.equal(choices, plain_choices)
    for ours, theirs in zip(weights, plain_weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_whole_run_on_the_gpu(tmp_path):
    arguments = [*QUICK, "--reset-interval", "120", "--runs-dir", tmp_path]
    captured, plain = run_script("rde_dqn_atari", *arguments), run_script("rde_dqn_atari", *arguments, "--no-cuda-graphs")
    for result in (captured, plain):
        assert result.returncode == 0, result.stderr
    first, second = sorted(tmp_path.iterdir())
    read = lambda path: [row.rsplit(",", 1)[0] for row in (path / "episodes.csv").read_text().splitlines()]
    assert read(first) == read(second)
