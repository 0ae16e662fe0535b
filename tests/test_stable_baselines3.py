"""The scripts that train stable-baselines3's agents beside ours: the same steps, and one line for what they cannot do."""

import csv
import signal
import subprocess
import time

import pytest

from conftest import command, environment, load_script, run_script

DQN = (
    "--env-id BreakoutNoFrameskip-v4 --num-envs 4 --replay-ratio 0.25 --total-timesteps 600 --learning-starts 200 "
    "--batch-size 4 --buffer-size 400 --eval-interval 300 --eval-episodes 2"
).split()
SAC = (
    "--env-id cartpole-balance --total-timesteps 300 --learning-starts 100 --hidden-dim 8 --batch-size 8 --buffer-size 400 "
    "--eval-interval 150 --eval-episodes 2"
).split()


@pytest.mark.parametrize(
    "script, ours, arguments, interval", [("dqn", "dqn_atari", DQN, 300), ("sac", "rde_sac_dmc", SAC, 150)]
)
def test_a_run_is_evaluated_at_the_steps_of_ours(tmp_path, script, ours, arguments, interval):
    result = run_script(f"tests/stable_baselines3_{script}", *arguments, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    with open(folder / "evaluations.csv", newline="") as file:
        rows = [tuple(row.values()) for row in csv.DictReader(file)]
    steps = [(str(step), phase) for step, phase in ((interval, "scheduled"), (2 * interval, "final"))]
    assert [row[:3] for row in rows] == [(*step, episode) for step in steps for episode in "01"]
    assert load_script(ours).read_run_args(folder).exp_name == f"stable_baselines3_{script}"


@pytest.mark.parametrize(
    "script, argument",
    [
        ("dqn", "--replay-ratio=2"),
        ("dqn", "--bf16"),
        ("dqn", "--resume=auto"),
        ("dqn", "--no-cuda"),
        ("sac", "--num-agents=2"),
        ("sac", "--replay-ratio=0.5"),
        ("sac", "--checkpoint-interval=10"),
        ("sac", "--beta=1"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path, script, argument):
    result = run_script(f"tests/stable_baselines3_{script}", argument, "--runs-dir", tmp_path / "runs")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_stopped(tmp_path):
    process = subprocess.Popen(
        command("tests/stable_baselines3_sac", *SAC, "--total-timesteps", "1000000", "--runs-dir", tmp_path),
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 200
    while not list(tmp_path.glob("*/evaluations.csv")) or "150," not in next(tmp_path.glob("*/evaluations.csv")).read_text():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and "without a final evaluation; it cannot be continued" in errors
