"""rde_sac_dmc.py as a whole: what a run does and leaves behind, that it can be repeated, and what it refuses."""

import contextlib
import csv
import json
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ROOT, environment

TINY = {
    "env_id": "cartpole-balance", "hidden_dim": 8, "batch_size": 16, "buffer_size": 2_000, "learning_starts": 100,
    "total_timesteps": 300, "replay_ratio": 0.5, "eval_interval": 0, "eval_episodes": 1, "reset_interval": 0,
}  # fmt: skip


def read_csv(folder, name):
    with open(f"{folder}/{name}") as file:
        return list(csv.DictReader(file))


def run_outcome(folder):
    """What a run computed: its evaluations, its episodes without the wall clock, and all weights."""
    columns = ("global_step", "episodic_return", "episodic_length")
    episodes = [[row[column] for column in columns] for row in read_csv(folder, "episodes.csv")]
    with open(f"{folder}/evaluations.csv") as file:
        return file.read(), episodes, torch.load(f"{folder}/model.pt")


def flat_weights(model):
    tensors = [*model["actors"].values(), *model["critics"].values(), model["log_alphas"]]
    return torch.cat([tensor.ravel() for tensor in tensors])


def command(options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, str(ROOT / "rde_sac_dmc.py"), *flags]


def run_script(options, folder):
    """With one thread, so that tests that run side by side don't fight for the cores."""
    return subprocess.run(command(options), capture_output=True, text=True, cwd=folder, env=environment(), check=False)


@contextlib.contextmanager
def restored_signal_handlers():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(sac, options, runs_dir):
    """A run in this process; returns its folder."""
    with restored_signal_handlers():
        sac.train(sac.Args(**options, runs_dir=str(runs_dir)))
    (folder,) = runs_dir.iterdir()
    return folder


def test_end_to_end(tmp_path):
    options = TINY | {
        "env_id": "hopper-hop", "total_timesteps": 1_100, "reset_interval": 800, "eval_interval": 600, "num_agents": 2,
        "eval_episodes": 2, "runs_dir": str(tmp_path), "seed": 3,
    }  # fmt: skip
    result = run_script(options, tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("hopper-hop__rde_sac_dmc__3__")
    assert f"the run is in {folder}" in result.stdout

    # Gradient steps: one every 2 steps after step 100. A reset event every 800 / 2 of them.
    evaluations = read_csv(folder, "evaluations.csv")
    phases = [("600", "scheduled"), ("900", "before_reset"), ("900", "after_reset"), ("1100", "final")]
    assert [(row["global_step"], row["phase"], row["episode"]) for row in evaluations] == [
        (step, phase, episode) for step, phase in phases for episode in ("0", "1")
    ]
    assert all(0 <= float(row["episodic_return"]) <= 1_000 for row in evaluations)
    (episode,) = read_csv(folder, "episodes.csv")
    assert (episode["global_step"], episode["episodic_length"]) == ("1000", "1000")
    assert 0 <= float(episode["episodic_return"]) <= 1_000 and float(episode["wall_seconds"]) > 0

    record = json.loads((folder / "args.json").read_text())
    assert record["args"]["reset_interval"] == 800 and record["args"]["gamma"] == 0.99 and record["device"]
    assert {"python", "torch", "dm-control", "mujoco"} <= record["versions"].keys()

    events = EventAccumulator(str(folder))
    events.Reload()
    keys = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/episodic_length", "charts/SPS"} <= keys
    assert {"eval/episodic_return", "rde/oldest_agent"} <= keys
    assert [event.value for event in events.Scalars("rde/reset_agent")] == [0]
    for name in ("losses/critic_loss", "losses/q_values", "losses/actor_loss", "losses/alpha", "rde/acting_fraction"):
        assert {f"{name}_0", f"{name}_1"} <= keys
    fractions = [[event.value for event in events.Scalars(f"rde/acting_fraction_{i}")] for i in range(2)]
    assert fractions[0][0] == fractions[1][0] == 0  # random actions are no agent's
    np.testing.assert_allclose(np.sum(fractions, axis=0)[1:], 1, rtol=1e-6)

    model = torch.load(folder / "model.pt")
    assert model["oldest_agent"] == 1 and flat_weights(model).isfinite().all()


def test_same_seed_same_files_and_two_seeds_differ(sac, tmp_path):
    options = TINY | {"total_timesteps": 1_050, "learning_starts": 950, "reset_interval": 80, "num_agents": 2}
    outcomes = [
        run_outcome(train(sac, options | {"seed": seed}, tmp_path / f"run{number}")) for number, seed in enumerate((1, 1, 2))
    ]
    assert outcomes[0][:2] == outcomes[1][:2]
    assert outcomes[0][0] != outcomes[2][0] and outcomes[0][1] != outcomes[2][1] and len(outcomes[0][1]) == 1
    first, again, other = (flat_weights(outcome[2]) for outcome in outcomes)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_evaluating_more_changes_nothing_in_the_training(sac, tmp_path):
    outcomes = [run_outcome(train(sac, TINY | {"eval_interval": interval}, tmp_path / str(interval))) for interval in (0, 170)]
    assert len(outcomes[1][0]) > len(outcomes[0][0])
    assert outcomes[0][0].splitlines()[-1] == outcomes[1][0].splitlines()[-1]  # the final evaluation, the same to the digit
    assert torch.equal(flat_weights(outcomes[0][2]), flat_weights(outcomes[1][2]))


def test_the_loop_stores_and_trains_what_it_should(sac, tmp_path, monkeypatch):
    """Two environments side by side, over the end of an episode, which bootstraps from its own last observation."""
    added, updates, acted = [], [], []
    real_add, real_update, real_act = sac.ReplayBuffer.add, sac.Agent.update, sac.Agent.act

    def add(buffer, *transition):
        added.append(tuple(np.copy(part) for part in transition))
        real_add(buffer, *transition)

    def update(agent):
        updates.append(len(added))
        return real_update(agent)

    def act(agent, observations, generator, deterministic=False):
        if not deterministic:
            acted.append(len(added))
        return real_act(agent, observations, generator, deterministic)

    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    monkeypatch.setattr(sac.Agent, "update", update)
    monkeypatch.setattr(sac.Agent, "act", act)
    options = TINY | {"num_envs": 2, "total_timesteps": 2_100, "learning_starts": 1_900, "replay_ratio": 1}
    folder = train(sac, options, tmp_path)

    assert len(added) == 2_100
    assert acted == list(range(1_900, 2_100, 2))
    assert updates == [step for step in range(1_900, 2_100, 2) for _ in range(2)]  # before the step's transitions are stored
    actions = np.array([transition[1] for transition in added[:1_900]])
    assert abs(actions.mean()) < 0.05 and actions.std() == pytest.approx(1 / np.sqrt(3), rel=0.05)
    for i in range(2):
        transitions = added[i::2]
        for step, (transition, following) in enumerate(zip(transitions, transitions[1:]), start=1):
            observation, _, _, terminated, next_observation = transition
            assert not terminated
            assert np.array_equal(next_observation, following[0]) == (step != 1_000)
            assert not np.array_equal(observation, next_observation)
    first_episodes = read_csv(folder, "episodes.csv")
    assert [row["global_step"] for row in first_episodes] == ["2000", "2000"]
    for i, row in enumerate(first_episodes):
        assert float(row["episodic_return"]) == pytest.approx(sum(float(transition[2]) for transition in added[i:2_000:2]))


def test_evaluation_depends_on_weights_seed_and_step_alone(sac):
    """Neither on what the environments played before nor on their number."""
    policy = lambda observations: torch.sin(observations[:, :2].sum(dim=1, keepdim=True))
    used, fresh = ([sac.make_env("cartpole-swingup") for _ in range(2)] for _ in range(2))
    evaluate = lambda envs, seed, step, received=0: sac.evaluate(
        policy, envs, seed, step, torch.device("cpu"), types.SimpleNamespace(received=received)
    )
    first = evaluate(used, 1, 500)
    other_step = evaluate(used, 1, 1_000)
    other_seed = evaluate(used, 2, 500)
    assert first == evaluate(used, 1, 500) == evaluate(fresh, 1, 500)
    assert len({*first, *other_step, *other_seed}) == 6
    assert evaluate(fresh[:1], 1, 500) == first[:1]
    assert evaluate(fresh, 1, 500, signal.SIGTERM) is None


def test_gradient_steps_and_resets_that_are_due(sac):
    args = sac.Args(replay_ratio=0.29, learning_starts=100, num_agents=3, reset_interval=600)
    assert [sac.gradient_steps_due(args, step) for step in (0, 100, 103, 104, 200, 1_100)] == [0, 0, 0, 1, 29, 290]
    assert [sac.resets_due(args, steps) for steps in (0, 199, 200, 599, 600)] == [0, 0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- resuming

# Two environments, a reset between two evaluations at step 1,300, and the ends of two episodes at step 2,000.
RESUMED = TINY | {
    "env_id": "reacher-hard", "total_timesteps": 2_050, "replay_ratio": 0.25, "num_envs": 2, "num_agents": 2,
    "reset_interval": 600, "checkpoint_interval": 250, "buffer_size": 1_500,
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(sac, tmp_path_factory):
    """The folder of a run that nobody stopped. It has no checkpoints: they must not matter."""
    return train(sac, RESUMED | {"checkpoint_interval": 0}, tmp_path_factory.mktemp("undisturbed"))


def resume(sac, monkeypatch, folder):
    """Continues a run in this process."""
    monkeypatch.setattr(sys, "argv", ["rde_sac_dmc.py", "--resume", str(folder)])
    with restored_signal_handlers():
        sac.main()


def stop_when(condition, options, number, folder):
    """Starts a run, sends it the signal when the condition holds, and returns the exit code and what it printed."""
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(command(options), stdout=log, stderr=subprocess.STDOUT, env=environment())
        while process.poll() is None and not condition():
            time.sleep(0.005)
        process.send_signal(number)
        code = process.wait(timeout=120)
        log.seek(0)
        return code, log.read().replace("\r", "\n")


def assert_same_end(folder, undisturbed):
    (evaluations, episodes, model), (other_evaluations, other_episodes, other_model) = map(run_outcome, (folder, undisturbed))
    assert evaluations == other_evaluations and episodes == other_episodes and len(episodes) == 2
    assert torch.equal(flat_weights(model), flat_weights(other_model)) and model["oldest_agent"] == other_model["oldest_agent"]
    assert not (folder / "checkpoint.pt").exists() and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("checkpoints", [1, 5])
def test_killed_and_resumed(checkpoints, tmp_path, undisturbed):
    """After the first checkpoint, of a part of the replay buffer, and after the fifth."""
    runs_dir = tmp_path / "runs"
    options = RESUMED | {"runs_dir": str(runs_dir), "resume": "auto"}
    seen = set()

    def enough_checkpoints():
        seen.update(path.stat().st_mtime_ns for path in runs_dir.glob("*/checkpoint.pt"))
        return len(seen) == checkpoints

    code, printed = stop_when(enough_checkpoints, options, signal.SIGKILL, tmp_path)
    assert code == -signal.SIGKILL, printed
    result = run_script(options, tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = runs_dir.iterdir()
    (step,) = re.findall(rf"continuing {re.escape(str(folder))} at step (\d+)", result.stdout + result.stderr)
    assert int(step) >= 250 * checkpoints and int(step) % 250 == 0
    assert_same_end(folder, undisturbed)


def test_a_signal_saves_and_says_how_to_go_on(sac, tmp_path, undisturbed, monkeypatch, capsys):
    """In the evaluation after a reset, which is abandoned and played again."""
    runs_dir = tmp_path / "runs"
    condition = lambda: "reset of agent 0" in (tmp_path / "log.txt").read_text()
    code, printed = stop_when(condition, RESUMED | {"runs_dir": str(runs_dir)}, signal.SIGTERM, tmp_path)
    assert code == 143 and "Traceback" not in printed
    (folder,) = runs_dir.iterdir()
    last_line = printed.strip().splitlines()[-1]
    assert re.fullmatch(
        rf"stopped at step 1300; to continue: python .*rde_sac_dmc.py --resume {re.escape(str(folder))}", last_line
    )
    assert (folder / "checkpoint.pt").exists() and not (folder / "model.pt").exists()
    resume(sac, monkeypatch, folder)
    assert f"continuing {folder} at step 1300" in capsys.readouterr().out
    assert_same_end(folder, undisturbed)
    with pytest.raises(SystemExit) as exit:
        resume(sac, monkeypatch, folder)
    assert exit.value.code == 2 and capsys.readouterr().err == f"error: the run in {folder} is finished\n"


STOPPED_AT_ONCE = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import rde_sac_dmc as sac
open_files = sac.RunFolder.open
sac.RunFolder.open = lambda *arguments: (open_files(*arguments), os.kill(os.getpid(), signal.SIGTERM))
sac.main()
"""


def test_stopped_before_the_first_step_and_a_raised_total(tmp_path, undisturbed):
    """The replay buffer is empty then. Nothing before the run's old end differs."""
    code = [sys.executable, "-c", STOPPED_AT_ONCE, *command(RESUMED | {"runs_dir": str(tmp_path)})[2:]]
    result = subprocess.run(code, capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 143 and "stopped at step 0; to continue" in result.stderr, result.stderr
    (folder,) = tmp_path.iterdir()
    result = run_script({"resume": str(folder), "total_timesteps": 2_100}, tmp_path)
    assert result.returncode == 0, result.stderr
    (evaluations, episodes, _), (other_evaluations, other_episodes, _) = map(run_outcome, (folder, undisturbed))
    rows, others = evaluations.splitlines(), other_evaluations.splitlines()
    assert episodes == other_episodes and rows[:-1] == others[:-1]
    assert rows[-1].startswith("2100,final,") and others[-1].startswith("2050,final,")


# ------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"env_id": "walker_run"}, "did you mean walker-run"),
        ({"env_id": "hoper-hop"}, "did you mean hopper-hop"),
        ({"env_id": "dm_control/cheetah-run-v0"}, "did you mean cheetah-run"),
        ({"env_id": "AlienNoFrameskip-v4"}, "an example is hopper-hop"),
        ({"env_id": "lqr-lqr_2_1"}, "actions without bounds"),
        ({"num_agents": 0}, "at least 1 agent"),
        ({"num_agents": -1}, "--num-agents is -1"),
        ({"hidden_dim": 0}, "--hidden-dim is 0"),
        ({"num_hidden_layers": 0}, "--num-hidden-layers is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 101}, "the 100 transitions that are stored"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"beta": float("inf")}, "--beta is inf"),
        ({"gamma": 1.5}, "between 0 and 1"),
        ({"tau": -0.1}, "must not be negative"),
        ({"learning_starts": 300}, "leaves nothing of --total-timesteps 300"),
        ({"replay_ratio": 0.004}, "without a gradient step"),
        ({"reset_interval": 3, "num_agents": 4, "replay_ratio": 1.0}, "more than one reset in a loop step; use at least 4"),
        ({"eval_interval": 1, "num_envs": 2}, "--eval-interval 1 is shorter than one loop step"),
        ({"checkpoint_interval": 1, "num_envs": 2}, "--checkpoint-interval 1 is shorter than one loop step"),
        ({"num_envs": 200, "buffer_size": 150}, "--buffer-size 150 is too small"),
        ({"buffer_size": 10**11}, "GB, but only"),
        ({"eval_episodes": 0}, "--eval-episodes is 0"),
    ],
)
def test_bad_arguments_are_refused(sac, options, expected, tmp_path, monkeypatch, capsys):
    """One line that says what is wrong, exit code 2, and nothing is created."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        sac.check_args(sac.Args(**(TINY | options)))
    output = capsys.readouterr()
    assert exit.value.code == 2
    assert expected in output.err and output.err.startswith("error: ") and output.err.count("\n") == 1 and not output.out
    assert not list(tmp_path.iterdir())


def test_good_arguments_are_accepted(sac):
    sac.check_args(sac.Args(buffer_size=10_000))
    sac.check_args(sac.Args(**TINY))


@pytest.mark.parametrize("options, expected", [({"env_id": "walker-runn"}, "walker-run"), ({"tau": 2}, "--tau is 2")])
def test_bad_command_line(options, expected, tmp_path):
    result = run_script(options, tmp_path)
    assert result.returncode == 2
    assert expected in result.stderr and result.stderr.count("\n") == 1 and not result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"capture_video": None}, {"env_id": "quadruped-escape"}])
def test_a_way_to_draw_that_does_not_exist(options, tmp_path):
    """MuJoCo reads MUJOCO_GL when it is imported, and raises an error of its own."""
    flags = [f"--{name.replace('_', '-')}" + (f"={value}" if value else "") for name, value in options.items()]
    result = subprocess.run(
        [*command({}), *flags], capture_output=True, text=True, cwd=tmp_path, env=environment() | {"MUJOCO_GL": "nonsense"}, check=False
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "finds no way to draw with MUJOCO_GL=nonsense" in result.stderr
    assert result.stderr.endswith("and set MUJOCO_GL=egl\n" if options else "unset it\n")
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_says_so(sac, tmp_path, monkeypatch):
    """At the step whose losses they are; the rewards are too large for float32."""
    real_step = sac.DeepMindControl.step
    monkeypatch.setattr(sac.DeepMindControl, "step", lambda env, action: (real_step(env, action)[0], 1e30, False, False, {}))
    monkeypatch.setattr(sys, "argv", ["rde_sac_dmc.py", *command(TINY | {"runs_dir": str(tmp_path)})[2:]])
    with pytest.raises(SystemExit) as exit:
        sac.main()
    message = exit.value.code
    assert message.startswith("error: the loss or a Q-value is not finite any more at step 10") and "--learning-rate" in message


def test_a_policy_that_diverges_says_so(sac, tmp_path, monkeypatch):
    options = TINY | {"learning_rate": 1e30, "runs_dir": str(tmp_path)}
    monkeypatch.setattr(sys, "argv", ["rde_sac_dmc.py", *command(options)[2:]])
    with pytest.raises(SystemExit) as exit:
        sac.main()
    assert exit.value.code.startswith("error: an action is not finite any more at step 10")


@pytest.mark.slow
def test_plain_sac_learns_to_balance(sac, tmp_path):
    """About a minute on one core. Seeds 1, 2, 3 ended with 765, 911, 664; new policies score between 270 and 390."""
    options = {
        "env_id": "cartpole-balance", "num_agents": 1, "reset_interval": 0, "total_timesteps": 6_000, "learning_starts": 1_000,
        "buffer_size": 20_000, "hidden_dim": 64, "batch_size": 64, "learning_rate": 1e-3, "tau": 0.02, "replay_ratio": 4.0,
        "eval_interval": 1_000, "eval_episodes": 5, "seed": 1,
    }  # fmt: skip
    evaluations = read_csv(train(sac, options, tmp_path), "evaluations.csv")
    before, after = (
        np.mean([float(row["episodic_return"]) for row in evaluations if row["global_step"] == step])
        for step in ("1000", "6000")
    )
    assert before < 450
    assert after > 550
