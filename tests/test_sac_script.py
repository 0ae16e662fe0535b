"""What only rde_sac_dmc.py has: its loop, its evaluations, the ways to draw, and what diverges. The rest is tested elsewhere:
whole runs in test_runs.py, resuming in test_resume.py, arguments in test_arguments.py.
"""

import subprocess

import numpy as np
import pytest
import torch

from conftest import command, environment, error_line, only_run, read_csv, restored_signal_handlers, run_main

TINY = {
    "env_id": "cartpole-balance", "hidden_dim": 8, "batch_size": 16, "buffer_size": 2_000, "learning_starts": 100,
    "total_timesteps": 300, "replay_ratio": 0.5, "eval_interval": 0, "eval_episodes": 1, "reset_interval": 0,
}  # fmt: skip


def flags(options: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def train(sac, options: dict, runs_dir):
    """A run in this process; returns its folder."""
    with restored_signal_handlers():
        sac.train(sac.Args(**options, runs_dir=str(runs_dir)))
    return only_run(runs_dir)


def test_the_loop_stores_and_trains_what_it_should(sac, tmp_path, monkeypatch):
    """Two environments side by side, over the end of an episode, which bootstraps from its own last observation."""
    added, updates, acted = [], [], []
    real_add, real_update, real_act = sac.ReplayBuffer.add, sac.Agent.update, sac.Agent.act

    def add(buffer, *transition):
        added.append(tuple(np.copy(part) for part in transition))
        real_add(buffer, *transition)

    def update(agent):
        updates.append(len(added))
        real_update(agent)

    def act(agent, observations, *generators, deterministic=False, counted=False):
        if not deterministic:
            acted.append(len(added))
        assert counted != deterministic  # what evaluations choose is not counted
        return real_act(agent, observations, *generators, deterministic=deterministic, counted=counted)

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
    first_episodes = read_csv(folder / "episodes.csv")
    assert [row["global_step"] for row in first_episodes] == ["2000", "2000"]
    for i, row in enumerate(first_episodes):
        assert float(row["episodic_return"]) == pytest.approx(sum(float(transition[2]) for transition in added[i:2_000:2]))


def test_evaluation_depends_on_weights_seed_and_step_alone(sac):
    """Neither on what the environments played before nor on their number."""
    policy = lambda observations: torch.sin(observations[:, :2].sum(dim=1, keepdim=True))
    used, fresh = ([sac.make_env(sac.Args(env_id="cartpole-swingup")) for _ in range(2)] for _ in range(2))
    evaluate = lambda envs, seed, step: sac.evaluate(policy, envs, seed, step, torch.device("cpu"), lambda env: None)
    first = evaluate(used, 1, 500)
    other_step = evaluate(used, 1, 1_000)
    other_seed = evaluate(used, 2, 500)
    assert first == evaluate(used, 1, 500) == evaluate(fresh, 1, 500)
    assert len({episode["r"] for episode in [*first, *other_step, *other_seed]}) == 6
    assert evaluate(fresh[:1], 1, 500) == first[:1]


@pytest.mark.parametrize("options", [{}, {"capture_video": None}, {"env_id": "quadruped-escape"}])
def test_a_way_to_draw_that_does_not_exist(options, tmp_path):
    """MuJoCo reads MUJOCO_GL when it is imported, and raises an error of its own."""
    arguments = [f"--{name.replace('_', '-')}" + (f"={value}" if value else "") for name, value in options.items()]
    result = subprocess.run(
        command("rde_sac_dmc", *arguments), capture_output=True, text=True, cwd=tmp_path,
        env=environment() | {"MUJOCO_GL": "nonsense"}, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "finds no way to draw with MUJOCO_GL=nonsense" in result.stderr
    assert result.stderr.endswith("and set MUJOCO_GL=egl\n" if options else "unset it\n")
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_says_so(sac, tmp_path, monkeypatch):
    """At the next point of the curves, whose losses they are; the rewards are too large for float32."""
    real_step = sac.DeepMindControl.step
    monkeypatch.setattr(sac.DeepMindControl, "step", lambda env, action: (real_step(env, action)[0], 1e30, False, False, {}))
    line = error_line(run_main(sac, *flags(TINY), "--runs-dir", tmp_path))
    assert line.startswith("error: cartpole-balance: not finite any more at step 200: {'critic_loss': [inf")
    assert line.endswith("try a lower --learning-rate")


def test_a_policy_that_diverges_says_so(sac, tmp_path):
    """Before the physics would stop with an error of its own."""
    line = error_line(run_main(sac, *flags(TINY | {"learning_rate": 1e29}), "--runs-dir", tmp_path))
    assert line.startswith("error: cartpole-balance: an action is not finite at step 10") and line.endswith(
        "try a lower --learning-rate"
    )


@pytest.mark.slow
def test_plain_sac_learns_to_balance(sac, tmp_path):
    """About a minute on one core. Seeds 1, 2, 3 ended with 765, 911, 664; new policies score between 270 and 390."""
    options = {
        "env_id": "cartpole-balance", "num_agents": 1, "reset_interval": 0, "total_timesteps": 6_000, "learning_starts": 1_000,
        "buffer_size": 20_000, "hidden_dim": 64, "batch_size": 64, "learning_rate": 1e-3, "tau": 0.02, "replay_ratio": 4.0,
        "eval_interval": 1_000, "eval_episodes": 5, "seed": 1,
    }  # fmt: skip
    evaluations = read_csv(train(sac, options, tmp_path) / "evaluations.csv")
    before, after = (
        np.mean([float(row["episodic_return"]) for row in evaluations if row["global_step"] == step])
        for step in ("1000", "6000")
    )
    assert before < 450
    assert after > 550
