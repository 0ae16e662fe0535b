"""The scripts that train stable-baselines3's agents beside ours: the same steps, and one line for what they cannot do."""

import json
import signal
import sys

import pytest
import torch

from conftest import ROOT, Started, load_script, only_run, rows, run_script, snapshot

DQN = (
    "--env-id BreakoutNoFrameskip-v4 --num-envs 4 --replay-ratio 0.25 --total-timesteps 1200 --learning-starts 1000 "
    "--batch-size 4 --buffer-size 400 --eval-interval 600 --eval-episodes 2 --eval-epsilon 0.05"
).split()
SAC = (
    "--env-id cartpole-balance --total-timesteps 1100 --learning-starts 1050 --hidden-dim 8 --batch-size 8 --buffer-size 400 "
    "--eval-interval 550 --eval-episodes 2"
).split()


@pytest.mark.parametrize("script, arguments, interval", [("dqn", DQN, 600), ("sac", SAC, 550)])
def test_a_run_is_evaluated_at_the_steps_of_ours(tmp_path, monkeypatch, capsys, script, arguments, interval):
    name = f"stable_baselines3_{script}"
    result = run_script(f"baselines/{name}", *arguments, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    folder = only_run(tmp_path)
    steps = [(str(step), phase) for step, phase in ((interval, "scheduled"), (2 * interval, "final"))]
    assert [row[:3] for row in rows(folder, "evaluations.csv")] == [(*step, episode) for step in steps for episode in "01"]
    games = rows(folder, "episodes.csv")
    assert games and all(0 < int(step) <= 2 * interval and float(length) > 0 for step, _, length in games)
    if script == "sac":  # an episode of the suite, of 1,000 points at most
        assert [row[0] for row in games] == ["1000"] and 0 < float(games[0][1]) <= 1_000
    # A finished run, and no other script's.
    content = json.loads((folder / "args.json").read_text())
    assert content["script"] == f"{name}.py" and content["args"]["exp_name"] == name
    assert torch.load(folder / "model.pt", weights_only=True) and not (folder / "checkpoint.pt").exists()
    assert (folder / f"{name}.py").read_text() == (ROOT / "baselines" / f"{name}.py").read_text()
    before = snapshot(folder)
    monkeypatch.setattr(sys, "argv", [str(ROOT / f"baselines/{name}.py"), *arguments, "--runs-dir", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        load_script(f"baselines/{name}").main()
    assert not end.value.code and "is finished" in capsys.readouterr().out and snapshot(folder) == before


@pytest.mark.parametrize(
    "script, argument, message",
    [
        ("dqn", "--replay-ratio=2", "--replay-ratio must be 1 / --num-envs here"),
        ("dqn", "--bf16", "--bf16 has no effect on stable-baselines3's DQN"),
        ("sac", "--num-agents=2", "stable-baselines3's SAC has one agent"),
        ("sac", "--replay-ratio=0.5", "and here one environment and a whole replay ratio"),
        ("sac", "--checkpoint-interval=10", "--checkpoint-interval has no effect on stable-baselines3's SAC"),
    ],
)
def test_what_it_cannot_do_is_one_line(tmp_path, script, argument, message, monkeypatch, capsys):
    arguments = {"dqn": DQN, "sac": SAC}[script]
    monkeypatch.setattr(sys, "argv", ["", *arguments, argument, "--runs-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit) as end:
        load_script(f"baselines/stable_baselines3_{script}").main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_stopped(tmp_path):
    arguments = [*SAC, "--total-timesteps", "1000000", "--runs-dir", tmp_path / "runs"]
    started = Started("baselines/stable_baselines3_sac", *arguments, log=tmp_path / "log.txt")
    evaluated = lambda: any("550," in path.read_text() for path in tmp_path.glob("runs/*/evaluations.csv"))
    started.wait_for(evaluated, 200)
    assert started.end(signal.SIGINT) == 130
    assert "without a final evaluation; it cannot be continued" in started.printed()
    assert not list(tmp_path.glob("runs/*/model.pt"))
