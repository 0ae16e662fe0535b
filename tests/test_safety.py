"""What safe RDE has beside RDE+SAC: multiplier, costs, the choice with them, its runs. Its agent's gradient step and reset:
test_sac_agent.py; the choice in all scripts: test_selection.py.
"""

import copy
import io
import math
import re

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents import CPU, OBSERVATION_DIM, reset_in_turn, sac_agent
from conftest import (
    QUICK_SAFETY,
    assert_same_end,
    load_script,
    model,
    only_run,
    read_csv,
    rows,
    run_main,
    run_script,
    scalars,
    stop_when,
)

MAZE, CHEETAH = "SafetyPointMaze-v0", "SafetyHalfCheetahVelocity-v1"


@pytest.fixture(scope="module")
def safety():
    return load_script("rde_sac_safety")


# --------------------------------------------------------------------------------------------------------- the baseline


def pair_with_sac(safety, sac, num_agents, **arguments):
    """An agent of rde_sac_dmc.py and one of this script with the same networks, transitions and random numbers."""
    ours, theirs = sac_agent(safety, num_agents, **arguments), sac_agent(sac, num_agents)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours.actors.parameters(), theirs.actors.parameters()))
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(ours.critics.parameters(), theirs.critics.parameters()))
    ours.actors.load_state_dict(theirs.actors.state_dict())
    for name in ("critics", "target_critics"):
        for parameter, source in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters()):
            for i in range(num_agents):
                parameter.data[3 * i : 3 * i + 2] = source.data[2 * i : 2 * i + 2]
    for agent in (ours, theirs):
        reset_in_turn(agent, 1)  # so that there is a judge
    return ours, theirs


@pytest.mark.parametrize("num_agents", [1, 3])
def test_without_a_limit_it_is_rde_sac(safety, sac, num_agents):
    """Step for step, to the bit: actions, weights, alphas. What differs are the cost critics, which then move nothing, and the
    numbers that they take from the generator of initial weights: later agents, and agents after a reset, begin elsewhere."""
    ours, theirs = pair_with_sac(safety, sac, num_agents, cost_limit=math.inf)
    constrained, _ = pair_with_sac(safety, sac, num_agents, cost_limit=25.0)
    constrained.multiplier.update(30.0)
    ours.multiplier.update(30.0)
    generators = [torch.Generator().manual_seed(5) for _ in range(3)]
    before, differs = ours.critics.weights[0][2::3].clone(), False
    for step in range(40):
        observations = torch.randn(4, OBSERVATION_DIM, generator=torch.Generator().manual_seed(step))
        actions, expected, others = (
            agent.act(observations, generator, torch.Generator())
            for agent, generator in zip((ours, theirs, constrained), generators)
        )
        assert torch.equal(actions, expected)
        differs |= not torch.equal(others, expected)
        for agent in (ours, theirs, constrained):
            agent.update()
    for i in range(num_agents):
        for parameter, source in zip(ours.critics.parameters(), theirs.critics.parameters()):
            assert torch.equal(parameter[3 * i : 3 * i + 2], source[2 * i : 2 * i + 2])
    assert torch.equal(ours.log_alphas, theirs.log_alphas)
    assert all(map(torch.equal, ours.actors.parameters(), theirs.actors.parameters()))
    assert differs and (ours.critics.weights[0][2::3] != before).any(), "the cost critics learn, and a limit is felt"


# -------------------------------------------------------------------------------------------------------- the multiplier

# Costs of episodes; what 0.05 * error + 0.0005 * integral + 0.1 * rise then is, with the limit 25, worked out by hand.
SERIES = [
    (25, 0.0),  # at the limit
    (125, 5 + 0.05 + 10),  # rises: error 100, integral 100, rise 100
    (125, 5 + 0.1),  # the integral grows on, nothing rises any more
    (225, 10 + 0.2 + 10),
    (25, 0.2),  # at the limit the integral, 400, is what is left
    (25, 0.2),  # and stays
    (20, 0.0),  # -0.25 + 0.1975
    (25, 0.1975 + 0.5),  # a rise, though not above the limit
    *[(0, 0.0)] * 40,  # the integral falls to 0, and not below
    (26, 0.05 + 0.0005 + 2.6),
    (26, 0.05 + 0.001),
]


@pytest.mark.parametrize("resumed_after", [None, 0, 1, 4, 7, 30, len(SERIES) - 1])
def test_the_multiplier_over_a_series_of_costs(safety, resumed_after):
    multiplier = safety.LagrangeMultiplier(safety.Args(), CPU)
    address = multiplier.value.data_ptr()
    for number, (cost, expected) in enumerate(SERIES):
        if number == resumed_after:
            file = io.BytesIO()
            torch.save(safety.state_of(multiplier), file)
            multiplier = safety.LagrangeMultiplier(safety.Args(), CPU)
            address = multiplier.value.data_ptr()
            safety.restored(multiplier, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        multiplier.update(float(cost))
        assert multiplier.value.data_ptr() == address, "a captured CUDA graph reads it there"
        assert multiplier.value.item() == pytest.approx(expected, abs=1e-6), number
        assert multiplier.integral >= 0 and multiplier.value.dtype == torch.float32 and multiplier.value.shape == ()


def test_the_gains_and_the_limit_are_the_arguments(safety):
    args = safety.Args(cost_limit=2.0, lambda_kp=1.0, lambda_ki=10.0, lambda_kd=100.0)
    multiplier = safety.LagrangeMultiplier(args, CPU)
    for cost, expected in [(3, 1 + 10 + 100), (5, 3 + 40 + 200), (4, 2 + 60), (0, max(0, -2 + 40)), (2, 0 + 40 + 200)]:
        multiplier.update(cost)
        assert multiplier.value.item() == expected
    endless = safety.LagrangeMultiplier(safety.Args(cost_limit=math.inf), CPU)
    for cost in (0.0, 1e6, 1e30):
        endless.update(cost)
        assert endless.value.item() == 0 and endless.integral == 0


def test_violations_are_above_the_limit(safety):
    agent = sac_agent(safety, 1, cost_limit=25.0)
    for costs in ([24.0], [], [25.0, 25.5, 0.0], [100.0]):
        agent.end_episodes(costs)
    assert agent.num_violations == 2
    endless = sac_agent(safety, 1, cost_limit=math.inf)
    endless.end_episodes([1e9, 0.0])
    assert endless.num_violations == 0 and endless.scalars()["safety/lambda"] == 0


@pytest.mark.parametrize("costs", [(100.0, 0.0, 0.0), (0.0, 100.0, 0.0), (0.0, 0.0, 100.0), (100 / 3,)])
def test_episodes_that_end_together_move_the_multiplier_once_by_their_mean(safety, costs):
    """Whatever the order of the environments. By hand, with the limit 25: error 25 / 3, which is also the integral and the rise."""
    agent = sac_agent(safety, 1)
    agent.end_episodes(list(costs))
    assert agent.multiplier.value.item() == pytest.approx((0.05 + 0.0005 + 0.1) * 25 / 3)
    before = copy.deepcopy(vars(agent.multiplier))
    agent.end_episodes([])  # no episode ends in most steps
    assert agent.num_violations == 1 and vars(agent.multiplier) == before


def test_the_smallest_scale_of_costs_in_the_choice_is_the_limit_as_a_discounted_sum(safety):
    """WCSAC's d * (1 - gamma^H) / (1 - gamma) / H; 2.5 for 25 and 1,000 steps."""
    assert safety.discounted_limit(25, 0.99, 1_000) == pytest.approx(25 * (1 - 0.99**1_000) / 0.01 / 1_000)
    assert safety.discounted_limit(25, 1.0, 1_000) == 25 and safety.discounted_limit(25, 0.0, 1_000) == 0.025
    assert sac_agent(safety, 2, env_id=CHEETAH).cost_scale == pytest.approx(2.5, 1e-3)
    agent = sac_agent(safety, 2, env_id=MAZE, cost_limit=5.0, gamma_cost=0.9)
    assert agent.cost_scale == pytest.approx(5 * 10 / 300)


# ---------------------------------------------------------------------------------------------------------- whole runs


class Walk(gym.Env):
    """Episodes of 20 steps, each of which costs what the episode's seed says."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.price = float(self.np_random.integers(4))
        return self.np_random.uniform(-1, 1, 2), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 2), float(action[0]), False, False, {"cost": self.price}


gym.register("Walk-v0", entry_point=lambda render_mode=None: Walk(), max_episode_steps=20)
WALK = (
    "--env-id Walk-v0 --cost-limit 15 --total-timesteps 610 --learning-starts 90 --replay-ratio 0.2 --batch-size 16 "
    "--hidden-dim 8 --num-envs 2 --eval-interval 150 --eval-episodes 3 --reset-interval 60"
).split()


def test_what_a_run_counts(safety, tmp_path):
    """Costs in the files and in TensorBoard, and a multiplier that knows of the training's episodes alone."""
    result = run_main(safety, *WALK, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    path = only_run(tmp_path)
    episodes, evaluations, curves = read_csv(path / "episodes.csv"), read_csv(path / "evaluations.csv"), scalars(path)
    costs = [float(row["cost"]) for row in episodes]
    assert len(costs) == 2 * 15 and set(costs) == {0, 20, 40, 60}, "20 steps at 0, 1, 2 or 3: undiscounted sums"
    assert {row["phase"] for row in evaluations} == {"scheduled", "before_reset", "after_reset", "final"}
    evaluated = {}
    for row in evaluations:
        if row["phase"] != "after_reset":
            evaluated.setdefault(int(row["global_step"]), []).append(float(row["cost"]))
    assert {cost for of_step in evaluated.values() for cost in of_step} <= {0, 20, 40, 60}
    assert curves["eval/episodic_cost"] == [(step, pytest.approx(np.mean(of_step))) for step, of_step in evaluated.items()]
    assert any(map(any, evaluated.values()))
    assert curves["charts/episodic_cost"] == sorted({(int(row["global_step"]), float(row["cost"])) for row in episodes})
    assert "eval_after_reset/episodic_cost" in curves

    for step, value in curves["safety/lambda"]:
        integral = error = multiplier = 0.0
        finished = [row for row in episodes if int(row["global_step"]) <= step]
        for end in sorted({int(row["global_step"]) for row in finished}):  # both environments' episodes end together
            together = [float(row["cost"]) for row in finished if int(row["global_step"]) == end]
            assert len(together) == 2
            previous, error = error, sum(together) / 2 - 15
            integral = max(0.0, integral + error)
            multiplier = max(0.0, 0.05 * error + 0.0005 * integral + 0.1 * max(0.0, error - previous))
        assert value == pytest.approx(multiplier, abs=1e-5)
        violations = dict(curves["safety/violations"])[step]
        assert violations == sum(float(row["cost"]) > 15 for row in finished)
        # The episodes under way count, too: two environments, of which both began at step 40 * n.
        under_way = [float(row["cost"]) for row in episodes if step < int(row["global_step"]) <= step - step % 40 + 40]
        assert dict(curves["safety/total_cost"])[step] == (
            sum(float(row["cost"]) for row in finished) + sum(under_way) * (step % 40 // 2) / 20
        )
    assert len({value for _, value in curves["safety/lambda"]}) > 2
    for name in ("cost_critic_loss", "cost_values", "critic_loss", "q_values", "actor_loss", "alpha"):
        assert {f"losses/{name}_0", f"losses/{name}_1"} <= curves.keys()
    weights = model(path)
    assert weights["num_resets"] == 3 and weights["critics"]["weights.0"].shape == (6, 4, 8)


@pytest.mark.parametrize("step, arguments", [(250, WALK), (410, [*WALK, "--cost-limit", "inf"])])
def test_a_stopped_run_goes_on(safety, tmp_path, step, arguments):
    """With a multiplier above 0, counters, and the curves of TensorBoard, between episodes' ends; also without a limit."""
    assert run_main(safety, *arguments, "--runs-dir", tmp_path / "undisturbed").returncode == 0
    result = stop_when(lambda run: run.global_step >= step, safety, *arguments, "--runs-dir", tmp_path / "stopped")
    assert result.returncode == 143 and f"stopped at step {step}" in result.stderr
    result = run_main(safety, *arguments, "--runs-dir", tmp_path / "stopped")
    assert result.returncode == 0 and "continuing" in result.stdout
    path = only_run(tmp_path / "stopped")
    assert_same_end(path, only_run(tmp_path / "undisturbed"))
    assert len(rows(path, "episodes.csv")) > 0
    if "inf" in arguments:
        curves = scalars(path)
        assert {value for name in ("lambda", "violations") for _, value in curves[f"safety/{name}"]} == {0}
        assert curves["safety/total_cost"][-1][1] > 0, "counted all the same"


def test_no_package_complains(tmp_path):
    """As a command. Gymnasium-Robotics and old versions of robots would."""
    result = run_script("rde_sac_safety", *QUICK_SAFETY, "--total-timesteps", 80, "--runs-dir", tmp_path)
    assert result.returncode == 0 and not re.search("WARN|out of date|Adroit", result.stdout + result.stderr), result.stderr
