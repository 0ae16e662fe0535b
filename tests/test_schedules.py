"""What happens when: epsilon, gradient steps, resets, evaluations."""

from fractions import Fraction

import pytest

from conftest import ATARI_SCRIPTS, load_script

rde, sr, dqn = (load_script(name) for name in ("rde_dqn_atari", "sr_dqn_atari", "dqn_atari"))


@pytest.mark.parametrize("script", ATARI_SCRIPTS)
@pytest.mark.parametrize(
    "step, expected", [(0, 1.0), (1, 1 - 0.99 / 10_000), (5_000, 0.505), (9_999, 0.010099), (10_000, 0.01), (99_999, 0.01)]
)
def test_epsilon_of_the_default_run(script, step, expected):
    script = load_script(script)
    args = script.Args()
    duration = args.exploration_fraction * args.total_timesteps
    assert script.linear_schedule(args.start_e, args.end_e, duration, step) == pytest.approx(expected, abs=1e-12)


def test_epsilon_without_a_decay():
    assert dqn.linear_schedule(1.0, 0.1, 0.0, 0) == 0.1


@pytest.mark.parametrize(
    "replay_ratio, global_step, expected",
    [
        (1.0, 10_000, 0), (1.0, 10_001, 1), (1.0, 100_000, 90_000), (4.0, 10_001, 4), (4.0, 100_000, 360_000),
        (0.25, 10_003, 0), (0.25, 10_004, 1), (0.25, 10_007, 1), (0.25, 100_000, 22_500), (1.5, 10_001, 1),
        (1.5, 10_002, 3), (0.1, 10_030, 3), (0.29, 10_100, 29), (0.7, 10_010, 7), (1.0, 500, 0),
    ],
)  # fmt: skip
def test_gradient_steps(replay_ratio, global_step, expected):
    assert rde.gradient_steps_due(rde.Args(replay_ratio=replay_ratio), global_step) == expected


def simulate(script, **arguments):
    """The loop's bookkeeping without the learning. Returns [(global_step, gradient_steps, agenda)] where something is due."""
    args = script.Args(**arguments)
    global_step, gradient_steps, num_resets, events = 0, 0, 0, []
    while global_step < args.total_timesteps:
        if global_step >= args.learning_starts:
            gradient_steps = script.gradient_steps_due(args, global_step + args.num_envs)
        global_step += args.num_envs
        progress = () if script is dqn else (gradient_steps, num_resets)
        agenda = script.agenda_due(args, global_step, *progress)
        num_resets += "reset" in agenda
        if agenda:
            events.append((global_step, gradient_steps, agenda))
    return events


def resets(events):
    return [(global_step, gradient_steps) for global_step, gradient_steps, agenda in events if "reset" in agenda]


AROUND_A_RESET = ["before_reset", "reset", "after_reset"]


def test_agenda_of_the_default_run():
    events = simulate(rde)
    assert resets(events) == [(50_000, 40_000), (90_000, 80_000)]
    assert [step for step, _, agenda in events if agenda == ["scheduled"]] == [
        step for step in range(5_000, 100_000, 5_000) if step not in (50_000, 90_000)
    ]
    assert [agenda for step, _, agenda in events if step in (50_000, 90_000)] == [AROUND_A_RESET] * 2
    assert events[-1] == (100_000, 90_000, ["final"])


def test_agenda_of_the_official_setting():
    official = dict(num_envs=4, replay_ratio=0.25, reset_interval=20_000, learning_starts=2_000)
    assert resets(simulate(rde, **official)) == [(42_000, 10_000), (82_000, 20_000)]
    assert resets(simulate(sr, **official)) == [(82_000, 20_000)]
    # Four times the replay ratio: an event every 10,000 environment steps, and none at the run's end.
    events = resets(simulate(rde, **official | {"replay_ratio": 1.0}))
    assert events == [(2_000 + 10_000 * k, 10_000 * k) for k in range(1, 10)]


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


@pytest.mark.parametrize("script", [rde, sr])
def test_no_reset_without_an_interval(script):
    events = simulate(script, reset_interval=0, eval_interval=0)
    assert events == [(100_000, 90_000, ["final"])]
    assert simulate(dqn, eval_interval=0) == events


def test_derived_seeds_differ_between_purposes_seeds_and_environments():
    seeds = {rde.derive_seed(seed, purpose, i) for seed in range(20) for purpose in range(6) for i in range(10)}
    assert len(seeds) == 20 * 6 * 10
    assert rde.derive_seed(1, 0) == sr.derive_seed(1, 0) == dqn.derive_seed(1, 0)


def test_human_normalized_scores():
    assert rde.human_normalized_score("AlienNoFrameskip-v4", 227.8) == 0
    assert rde.human_normalized_score("AlienNoFrameskip-v4", 7127.7) == 1
    assert rde.human_normalized_score("PongNoFrameskip-v4", 14.6 + 35.3) == pytest.approx(2)
    assert rde.human_normalized_score("TetrisNoFrameskip-v4", 10) is None
    assert len(rde.RANDOM_AND_HUMAN_SCORES) == 26
    assert all(rde.gym.spec(f"{game}NoFrameskip-v4") for game in rde.RANDOM_AND_HUMAN_SCORES)
