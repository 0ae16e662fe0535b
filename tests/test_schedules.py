"""What happens when: gradient steps, resets, evaluations, checkpoints."""

import types
from fractions import Fraction

import pytest

from conftest import load_script

rde, sr, dqn = map(load_script, ("rde_dqn_atari", "sr_dqn_atari", "dqn_atari"))


def test_the_three_scripts_explore_and_learn_alike_by_default():
    names = [name for name in vars(dqn.Args()) if name != "exp_name"]
    assert {"start_e", "end_e", "exploration_fraction", "replay_ratio", "learning_starts", "eval_interval"} < set(names)
    for name in names:
        assert getattr(dqn.Args(), name) == getattr(sr.Args(), name) == getattr(rde.Args(), name), name


@pytest.mark.parametrize(
    "replay_ratio, global_step, expected",
    [
        (1.0, 10_000, 0), (1.0, 10_001, 1), (1.0, 100_000, 90_000), (4.0, 10_001, 4), (4.0, 100_000, 360_000),
        (0.25, 10_003, 0), (0.25, 10_004, 1), (0.25, 10_007, 1), (0.25, 100_000, 22_500), (1.5, 10_001, 1),
        (1.5, 10_002, 3), (0.1, 10_030, 3), (0.29, 10_100, 29), (0.7, 10_010, 7), (1.0, 500, 0),
    ],
)  # fmt: skip
def test_gradient_steps(replay_ratio, global_step, expected):
    """Also in the text of rde_dqn.py, which remembers the fraction."""
    for script in (rde, load_script("rde_dqn")):
        args = script.Args(replay_ratio=replay_ratio, learning_starts=10_000)
        assert script.gradient_steps_due(args, global_step) == expected


def simulate(script, **arguments):
    """The loop's bookkeeping without the learning. Returns [(global_step, gradient_steps, events)] where something is due."""
    args = script.Args(**arguments)
    global_step, gradient_steps, num_resets, found = 0, 0, 0, []
    while global_step < args.total_timesteps:
        if global_step >= args.learning_starts:
            gradient_steps = script.gradient_steps_due(args, global_step + args.num_envs)
        global_step += args.num_envs
        progress = () if script is dqn else (gradient_steps, num_resets)
        events = script.events_due(args, global_step, *progress)
        num_resets += "reset" in events
        if events:
            found.append((global_step, gradient_steps, events))
    return found


def resets(events):
    return [(global_step, gradient_steps) for global_step, gradient_steps, due in events if "reset" in due]


AROUND_A_RESET = ["before_reset", "reset", "after_reset"]


def test_events_of_the_default_run():
    events = simulate(rde)
    assert resets(events) == [(50_000, 40_000), (90_000, 80_000)] and resets(simulate(sr)) == [(90_000, 80_000)]
    assert [step for step, _, due in events if due == ["scheduled"]] == [
        step for step in range(5_000, 100_000, 5_000) if step not in (50_000, 90_000)
    ]
    assert [due for step, _, due in events if step in (50_000, 90_000)] == [AROUND_A_RESET] * 2
    assert events[-1] == (100_000, 90_000, ["final"])


def test_at_the_end_there_is_no_reset():
    """Nothing would learn from it; also where one is due at that very step."""
    arguments = dict(learning_starts=1_000, reset_interval=2_000, total_timesteps=4_000, eval_interval=500)
    for script, num_before in ((rde, 2), (sr, 1)):
        events = simulate(script, **arguments)
        assert len(resets(events)) == num_before and events[-1] == (4_000, 3_000, ["final"])
        assert script.resets_due(script.Args(**arguments), 3_000) == num_before + (script is rde)


@pytest.mark.parametrize("num_agents", [1, 2, 3, 5])
@pytest.mark.parametrize("replay_ratio", [0.25, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("num_envs", [1, 3, 4])
def test_every_agent_has_the_same_number_of_gradient_steps_between_its_resets(num_agents, replay_ratio, num_envs):
    interval = 3_001
    events = resets(
        simulate(rde, num_agents=num_agents, replay_ratio=replay_ratio, num_envs=num_envs, reset_interval=interval,
                 learning_starts=101, total_timesteps=30_000)
    )  # fmt: skip
    per_loop_step = Fraction(str(replay_ratio)) * num_envs
    for k, (global_step, gradient_steps) in enumerate(events, start=1):
        # Event k belongs to gradient step k T / N and comes at the end of the loop step that reaches it.
        assert 0 <= gradient_steps - Fraction(k * interval, num_agents) < max(1, per_loop_step) + 1
        # Some agent is reset every T / (N RR) environment steps.
        expected = 101 + k * interval / (num_agents * replay_ratio)
        assert abs(global_step - expected) <= num_envs + 1 / replay_ratio
    last = rde.gradient_steps_due(rde.Args(replay_ratio=replay_ratio, learning_starts=101), 30_000 - num_envs)
    assert len(events) in (last * num_agents // interval, last * num_agents // interval + 1)


@pytest.mark.parametrize("num_envs", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("interval", [16, 50, 99])
def test_an_interval_between_two_multiples_of_num_envs_is_neither_skipped_nor_doubled(num_envs, interval):
    steps = range(num_envs, 2_000, num_envs)
    passed = [step for step in steps if rde.interval_has_passed(interval, step, num_envs)]
    assert passed == [min(step for step in steps if step >= k * interval) for k in range(1, steps[-1] // interval + 1)]
    assert not any(rde.interval_has_passed(0, step, num_envs) for step in steps)


def test_no_reset_without_an_interval():
    arguments = dict(total_timesteps=12_000, eval_interval=5_000, reset_interval=0)
    events = simulate(rde, **arguments)
    assert events == [(5_000, 0, ["scheduled"]), (10_000, 0, ["scheduled"]), (12_000, 2_000, ["final"])]
    assert simulate(sr, **arguments) == simulate(dqn, total_timesteps=12_000, eval_interval=5_000) == events


def test_when_checkpoints_and_weights_are_kept(tmp_path):
    def upkeep(**arguments):
        """{step: what is kept} of a whole run."""
        args, kept = rde.Args(learning_starts=10, **arguments), {}
        run = types.SimpleNamespace(args=args, path=tmp_path)
        run.write = lambda name, weights: kept.setdefault(run.global_step, []).append("weights")
        run.save = lambda: kept.setdefault(run.global_step, []).append("checkpoint")
        for run.global_step in range(args.num_envs, args.total_timesteps + args.num_envs, args.num_envs):
            rde.Run.keep_what_is_due(run, types.SimpleNamespace(weights=dict))
        return kept

    weights, checkpoint = ["weights"], ["checkpoint"]
    assert upkeep(total_timesteps=1_000, checkpoint_interval=0) == {1_000: checkpoint}
    assert upkeep(total_timesteps=1_000, checkpoint_interval=400) == {step: checkpoint for step in (400, 800, 1_000)}
    # As many as asked for, at equal distances, the last one at the end; also where they do not divide the run.
    assert upkeep(total_timesteps=1_000, checkpoint_interval=500, keep_models=4) == {
        250: weights, 500: weights + checkpoint, 750: weights, 1_000: weights + checkpoint
    }  # fmt: skip
    kept = [step for step, due in upkeep(total_timesteps=1_000, num_envs=4, keep_models=7).items() if "weights" in due]
    assert kept == [-(-1_000 * k // (7 * 4)) * 4 for k in range(1, 8)]


def test_derived_seeds_differ_between_purposes_seeds_and_environments():
    seeds = {rde.derive_seed(seed, purpose, i) for seed in range(20) for purpose in range(6) for i in range(10)}
    assert len(seeds) == 20 * 6 * 10
