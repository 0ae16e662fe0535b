"""benchmark_speed.py: what it measures, what it counts, what it prints."""

import csv
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT, environment

sys.path.insert(0, str(ROOT))

import benchmark_speed as speed  # noqa: E402

CPU = torch.device("cpu")


class Row:
    """Slow in its first calls, as where a CUDA graph is captured, then 1 ms."""

    def __init__(self):
        self.num_steps = 0

    def step(self):
        self.num_steps += 1
        time.sleep(0.05 if self.num_steps <= 4 else 0.001)


def test_slow_first_steps_do_not_shorten_the_measurement():
    """0.2 s are 190 steps or fewer, never the 5 or so that the first calls would make of it."""
    assert 60 <= speed.steps_in(Row(), 0.2, CPU) <= 200


@pytest.mark.parametrize("suite", ["dqn", "sac"])
def test_floor_in_flop_is_what_pytorch_counts(suite):
    """PyTorch's counter looks at matrix products and convolutions; SAC's last layer is a sum of products on the CPU."""
    if suite == "dqn":
        agent, gflop = speed.TrainingLoop("AlienNoFrameskip-v4", CPU, num_agents=1).agent, speed.update_gflop(18)
    else:
        args = speed.Args(hidden_dim=64, batch_size=32)
        agent = speed.SACTrainingLoop("walker-run", CPU, num_agents=1, hidden_dim=64, batch_size=32).agent
        gflop = speed.sac_update_gflop(args, 24, 6) - 2 * 32 * 2 * 6 * 64 / 1e9  # without the critics' last layers
    with FlopCounterMode(display=False) as counter:
        agent.update()
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.01)


def test_memory_floor_by_hand():
    """1,693,362 parameters of 4 bytes, read or written 17 times."""
    assert speed.update_gigabytes(18) == pytest.approx(17 * 4 * 1_693_362 / 1e9)


def test_replay_buffer_is_measured():
    """84 x 84 bytes and a row of 8 numbers for every transition, and 1 % more frames."""
    assert speed.replay_buffer_gigabytes(CPU) == pytest.approx(1e5 * (1.01 * 84 * 84 + 64) / 1e9, rel=1e-3)


def test_table(tmp_path):
    """As a command, as short as it can be: every row and ratio is there, and the file holds the same."""
    options = "--num-agents 1 2 --num-sac-agents 1 --replay-ratios 1 --rounds 1 --seconds 0.02 --hidden-dim 8 --batch-size 16"
    command = [sys.executable, ROOT / "benchmark_speed.py", *options.split(), "--csv", tmp_path / "speed.csv"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=500, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line[2:-2].split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")][1:]
    milliseconds_of = {name: float(milliseconds) for name, _, milliseconds, _ in lines}
    assert len(milliseconds_of) == len(lines) == 27
    assert all(float(steps) * float(milliseconds) == pytest.approx(1e3, rel=0.05) for _, steps, milliseconds, _ in lines)
    with open(tmp_path / "speed.csv") as file:
        assert list(csv.reader(file))[1:] == lines
    ratios = re.findall(r"^(.*), over (.*): (.*)$", result.stdout, re.MULTILINE)
    assert len(ratios) == 7
    for first, second, ratio in ratios:
        assert float(ratio) == pytest.approx(milliseconds_of[second] / milliseconds_of[first], rel=0.05, abs=0.01)
    texts = "time of an update, ", " times as long, with one competing process", "floor of one ", "replay buffer of "
    assert [result.stdout.count(text) for text in texts] == [7, 3, 2, 1]


@pytest.mark.parametrize(
    "options, messages",
    [
        ("--rounds 0 --seconds nan", ["rounds", "Input should be greater than 0", "seconds", "Input should be a finite number"]),
        ("--num-agents 1 0 --replay-ratios 0", ["num_agents", "replay_ratios"]), ("--hidden-dim 0", ["hidden_dim"]),
        ("--batch-size 501", ["batch_size", "less than or equal to 500"]), ("--num-agents", ["num_agents"]),
        ("--env-id Pong", ["error: --env-id Pong is not a game of the form"]), ("--task hoper-hop", ["did you mean hopper-hop"]),
        ("--csv nowhere/x.csv", ["error: --csv nowhere/x.csv cannot be written: No such file"]),
    ],
)  # fmt: skip
def test_wrong_arguments(options, messages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark_speed.py", *options.split()])
    with pytest.raises(SystemExit) as end:
        speed.main()
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == "" and os.listdir(tmp_path) == []
    assert [message for message in messages if message not in printed.err] == [], printed.err
