"""The quantities of safe RDE against references that share no code with the script, and its runs from outside."""

import copy
import io
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from pydantic import ValidationError

from agents import ACTION_DIM, CPU, OBSERVATION_DIM, Float64Networks, safety_agent, state_per_agent
from conftest import (
    Started,
    assert_same_end,
    error_line,
    load_script,
    model,
    only_run,
    read_csv,
    rows,
    run_main,
    scalars,
    stop_when,
)  # fmt: skip

BATCH_SIZE = 32
MAZE, CHEETAH = "SafetyPointMaze-v0", "SafetyHalfCheetahVelocity-v1"


@pytest.fixture(scope="module")
def safety():
    return load_script("rde_sac_safety")


# --------------------------------------------------------------------------------------------------- one gradient step


@pytest.mark.parametrize("num_agents, multiplier", [(1, 0.0), (1, 0.7), (3, 2.5), (3, 1e6)])
def test_gradient_step_against_float64(safety, num_agents, multiplier):
    """Cost target, all losses, all gradients, targets. With a multiplier without end the actor's loss becomes the cost."""
    gamma, gamma_cost = 0.97, 0.9
    agent = safety_agent(safety, num_agents, gamma=gamma, gamma_cost=gamma_cost)
    agent.multiplier.value.fill_(multiplier)
    for _ in range(3):  # so that targets differ from critics and alpha from 1
        agent.update()
    with torch.no_grad():
        agent.log_alphas += 0.3 * torch.arange(num_agents) - 0.5
        for target in agent.target_critics.parameters():
            target += 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(4))

    # What update() will draw: the mini-batch, the noise of the policy, the noise of the policy in the next state.
    generator = torch.Generator()
    generator.set_state(agent.buffer.generator.get_state())
    buffer = copy.copy(agent.buffer)
    buffer.generator = generator
    batch = buffer.sample(BATCH_SIZE)
    assert [tensor.shape[1:] for tensor in batch] == [(OBSERVATION_DIM,), (ACTION_DIM,), (), (), (), (OBSERVATION_DIM,)]
    noise = torch.empty(num_agents, BATCH_SIZE, ACTION_DIM).normal_(generator=generator).double()
    next_noise = torch.empty(num_agents, BATCH_SIZE, ACTION_DIM).normal_(generator=generator).double()
    observations, actions, rewards, costs, terminated, next_observations = (tensor.double() for tensor in batch)
    assert 0 < terminated.sum() < BATCH_SIZE and 0 < costs.sum() < BATCH_SIZE and set(costs.tolist()) == {0, 1}

    references = [Float64Networks(agent, i, 3) for i in range(num_agents)]
    agent.update()
    metrics = dict(zip(agent.METRICS, agent.metrics.double()))
    assert agent.multiplier.value == multiplier, "no gradient step moves it"
    assert torch.equal(generator.get_state(), agent.buffer.generator.get_state())
    close = lambda ours, theirs: torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-4, atol=3e-6)

    for i, reference in enumerate(references):
        alpha = reference.log_alpha.detach().exp()
        policy_actions, log_probs = reference.policy(observations, noise[i])
        (-(reference.log_alpha * (log_probs.detach() - ACTION_DIM)).mean()).backward()
        with torch.no_grad():
            next_actions, next_log_probs = reference.policy(next_observations, next_noise[i])
            first, second, cost = reference.values(reference.targets, next_observations, next_actions)
            td_target = torch.where(
                terminated == 1, rewards, rewards + gamma * (torch.min(first, second) - alpha * next_log_probs)
            )
            cost_target = torch.where(terminated == 1, costs, costs + gamma_cost * cost)
        first, second, cost = reference.values(reference.critics, observations, actions)
        critic_loss = (((first - td_target) ** 2).mean() + ((second - td_target) ** 2).mean()) / 2
        cost_critic_loss = ((cost - cost_target) ** 2).mean() / 2
        (critic_loss + cost_critic_loss).backward()
        for name, expected in [("critic_loss", critic_loss), ("cost_critic_loss", cost_critic_loss), ("alpha", alpha),
                               ("q_values", (first + second).mean() / 2), ("cost_values", cost.mean())]:  # fmt: skip
            close(metrics[name][i], expected)

        # The actor's loss is taken with the critics after their step.
        updated_critics = [Float64Networks.copy_layers(agent.critics, 3 * i + k) for k in range(3)]
        first, second, cost = reference.values(updated_critics, observations, policy_actions)
        actor_loss = ((alpha * log_probs - torch.min(first, second) + multiplier * cost) / (1 + multiplier)).mean()
        actor_loss.backward()
        close(metrics["actor_loss"][i], actor_loss)
        if multiplier == 1e6:
            close(metrics["actor_loss"][i], cost.mean())
        assert actor_loss.abs() < 10

        close(agent.alpha_optimizer.param_groups[i]["params"][0].grad[0], reference.log_alpha.grad)
        for k, layers in enumerate([*reference.critics, reference.actor]):
            optimizer, network = (agent.critic_optimizer, k) if k < 3 else (agent.actor_optimizer, 0)
            slices = optimizer.param_groups[i]["params"]
            for layer, (weight, bias) in enumerate(layers):
                close(slices[layer].grad[network].T, weight.grad)
                close(slices[len(layers) + layer].grad[network, 0], bias.grad)
        for k in range(3):
            moved = Float64Networks.copy_layers(agent.target_critics, 3 * i + k)
            for before, critic, after in zip(reference.targets[k], updated_critics[k], moved):
                for old, new, target in zip(before, critic, after):
                    torch.testing.assert_close(target, 0.995 * old + 0.005 * new, rtol=1e-6, atol=1e-7)


def test_agents_do_not_leak_into_one_another(safety):
    untouched, changed = safety_agent(safety, 3), safety_agent(safety, 3)
    with torch.no_grad():
        for tensor in state_per_agent(changed)[1].values():
            tensor += 0.1 * torch.ones_like(tensor)
    for agent in (untouched, changed):
        agent.multiplier.value.fill_(0.5)
        for _ in range(3):
            agent.update()
    for i, (expected, state) in enumerate(zip(state_per_agent(untouched), state_per_agent(changed))):
        for name in state:
            assert torch.equal(expected[name], state[name]) == (i != 1 or name.endswith(".step")), (i, name)


# --------------------------------------------------------------------------------------------------------- the baseline


def pair_with_sac(safety, sac, num_agents, **arguments):
    """An agent of rde_sac_dmc.py and one of this script with the same networks, transitions and random numbers."""
    ours = safety_agent(safety, num_agents, **arguments)
    theirs = safety_agent(sac, num_agents, costs=False)
    ours.actors.load_state_dict(theirs.actors.state_dict())
    for name in ("critics", "target_critics"):
        for parameter, source in zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters()):
            for i in range(num_agents):
                parameter.data[3 * i : 3 * i + 2] = source.data[2 * i : 2 * i + 2]
    ours.num_resets = theirs.num_resets = 1  # so that there is a judge
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


def test_the_first_agent_begins_as_the_baselines(safety, sac):
    ours, theirs = safety_agent(safety, 2), safety_agent(sac, 2, costs=False)
    for parameter, source in zip(ours.actors.parameters(), theirs.actors.parameters()):
        assert torch.equal(parameter[0], source[0])
    for parameter, source in zip(ours.critics.parameters(), theirs.critics.parameters()):
        assert torch.equal(parameter[:2], source[:2])


# ------------------------------------------------------------------------------------------------------------- the reset


def test_reset_renews_one_agent_and_nothing_of_the_others(safety):
    agent = safety_agent(safety, 3)
    agent.end_episodes([100.0])
    agent.total_cost = 321.0
    for _ in range(4):
        agent.update()
    shared = lambda: copy.deepcopy(
        (safety.state_of(agent.multiplier), agent.total_cost, agent.num_violations, agent.multiplier.value.data_ptr())
    )
    kept = shared()
    assert kept[0]["value"] > 0 and kept[0]["integral"] == 75 and kept[2] == 1
    for expected_index in (0, 1, 2, 0):
        agent.update()
        state = state_per_agent(agent)
        before = copy.deepcopy(state)
        addresses = [{name: tensor.data_ptr() for name, tensor in part.items()} for part in state]
        assert agent.reset() == expected_index
        after = state_per_agent(agent)
        assert addresses == [{name: tensor.data_ptr() for name, tensor in part.items()} for part in after]
        assert shared() == kept
        for i in range(3):
            assert len(after[i]) == 3 * 6 + 1 + 3 * (6 + 6 + 1)
            assert after[i]["critics.weights.0"].shape[0] == 3, "two critics of reward, one of cost"
            for name, tensor in after[i].items():
                if i != expected_index:
                    assert torch.equal(tensor, before[i][name]), (i, name)
                elif "optimizer" in name or name == "log_alphas":
                    assert before[i][name].any() and not tensor.any(), name
                else:
                    assert (tensor != before[i][name]).all(), name
        for name, tensor in after[expected_index].items():
            if name.startswith("target_critics"):
                assert torch.equal(tensor, after[expected_index][name.removeprefix("target_")])
    agent.update()
    assert [part["critic_optimizer.0.step"].item() for part in state_per_agent(agent)] == [1, 3, 2]


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


def through_a_file(safety, part):
    file = io.BytesIO()
    torch.save(safety.state_of(part), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("resumed_after", [None, 0, 1, 4, 7, 30, len(SERIES) - 1])
def test_the_multiplier_over_a_series_of_costs(safety, resumed_after):
    multiplier = safety.LagrangeMultiplier(safety.Args(), CPU)
    address = multiplier.value.data_ptr()
    for number, (cost, expected) in enumerate(SERIES):
        if number == resumed_after:
            state, multiplier = through_a_file(safety, multiplier), safety.LagrangeMultiplier(safety.Args(), CPU)
            address = multiplier.value.data_ptr()
            safety.restored(multiplier, state)
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
    agent = safety_agent(safety, 1, cost_limit=25.0)
    for costs in ([24.0], [], [25.0, 25.5, 0.0], [100.0]):
        agent.end_episodes(costs)
    assert agent.num_violations == 2
    endless = safety_agent(safety, 1, cost_limit=math.inf)
    endless.end_episodes([1e9, 0.0])
    assert endless.num_violations == 0 and endless.scalars()["safety/lambda"] == 0


@pytest.mark.parametrize("costs", [(100.0, 0.0, 0.0), (0.0, 100.0, 0.0), (0.0, 0.0, 100.0), (100 / 3,)])
def test_episodes_that_end_together_move_the_multiplier_once_by_their_mean(safety, costs):
    """Whatever the order of the environments. By hand, with the limit 25: error 25 / 3, which is also the integral and the rise."""
    agent = safety_agent(safety, 1)
    agent.end_episodes(list(costs))
    assert agent.multiplier.value.item() == pytest.approx((0.05 + 0.0005 + 0.1) * 25 / 3)
    before = safety.state_of(agent.multiplier)
    agent.end_episodes([])  # no episode ends in most steps
    assert agent.num_violations == 1 and {name: float(value) for name, value in before.items()} == {
        name: float(value) for name, value in safety.state_of(agent.multiplier).items()
    }


# ------------------------------------------------------------------------------------------------------------ the choice


def p_safe(q_values, costs, beta, beta_cost, kappa, cost_scale):
    """For one state, number by number."""
    softmax = lambda logits: [
        math.exp(logit - max(logits)) / sum(math.exp(x - max(logits)) for x in logits) for logit in logits
    ]
    largest = max(map(abs, q_values)) or 1.0
    scale = max(max(map(abs, costs)), cost_scale) or 1.0
    pairs = zip(softmax([beta * q / largest for q in q_values]), softmax([-beta_cost * cost / scale for cost in costs]))
    return [kappa * p + (1 - kappa) * p_cost for p, p_cost in pairs]


@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("cost_scale", [0.0, 2.5, 40.0])
def test_probabilities_against_the_formula(safety, kappa, cost_scale):
    rng = np.random.default_rng(1)
    q_values, costs = rng.normal(size=(2, 50, 4)) * 10
    q_values[0], costs[0] = 0, 0
    costs[1], q_values[2] = 7, -3
    computed = chosen_with(safety, torch.from_numpy(q_values), torch.from_numpy(costs), kappa, cost_scale, beta_cost=20.0)
    expected = [p_safe(q.tolist(), c.tolist(), 50.0, 20.0, kappa, cost_scale) for q, c in zip(q_values, costs)]
    np.testing.assert_allclose(computed, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(computed.sum(dim=1), 1)
    q_values = torch.from_numpy(q_values)
    by_reward = safety.selection_probabilities(q_values, safety.value_scale(q_values), torch.tensor(50.0))
    assert torch.equal(computed, by_reward) == (kappa == 1)


def chosen_with(safety, q_values, costs, kappa, cost_scale, **arguments) -> torch.Tensor:
    """The probabilities, (num_envs, N), with which `act` draws if the judge thinks this of the proposals."""
    agent, seen = safety_agent(safety, q_values.shape[1], kappa=kappa, **arguments), []
    agent.num_resets, agent.cost_scale, agent.judge = 1, cost_scale, lambda observations, actions: (q_values, costs)
    with pytest.MonkeyPatch.context() as patch:
        select = safety.safe_selection_probabilities
        patch.setattr(safety, "safe_selection_probabilities", lambda *numbers: seen.append(select(*numbers)) or seen[0])
        agent.act(torch.zeros(len(q_values), OBSERVATION_DIM), torch.Generator(), torch.Generator())
    return seen[0]


def choose(safety, q_values, costs, kappa=0.5, cost_scale=2.5):
    return chosen_with(safety, torch.tensor([q_values]), torch.tensor([costs]), kappa, cost_scale)[0].tolist()


def test_tiny_costs_make_no_hard_choice(safety):
    """Without the smallest scale the first of these proposals would never be taken."""
    tiny = [1e-3, 0.0, -1e-3]
    assert choose(safety, [1.0] * 3, tiny, kappa=0.0) == pytest.approx([1 / 3] * 3, abs=0.01)
    assert choose(safety, [1.0] * 3, tiny, kappa=0.0, cost_scale=0.0)[0] < 1e-20
    assert choose(safety, [1.0] * 3, [0.0] * 3, kappa=0.0, cost_scale=0.0) == pytest.approx([1 / 3] * 3)


def test_equal_costs_and_an_expensive_proposal(safety):
    reward_alone = choose(safety, [1.0, 1.02, 0.99], [9.0] * 3, kappa=1.0)
    mixed = choose(safety, [1.0, 1.02, 0.99], [9.0] * 3)
    assert mixed == pytest.approx([0.5 * p + 0.5 / 3 for p in reward_alone])
    # The proposal that pays best is expensive: its share is that of reward, and without reward none.
    q_values, costs = [5.0, 4.0, 3.9], [30.0, 1.0, 1.0]
    assert choose(safety, q_values, costs, kappa=1.0)[0] > 0.99
    assert choose(safety, q_values, costs)[0] == pytest.approx(0.5, abs=0.01)
    assert choose(safety, q_values, costs, kappa=0.0) == pytest.approx([0, 0.5, 0.5], abs=1e-6)


def test_the_smallest_scale_is_the_limit_as_a_discounted_sum(safety):
    """WCSAC's d * (1 - gamma^H) / (1 - gamma) / H; 2.5 for 25 and 1,000 steps."""
    assert (
        safety.discounted_limit(25, 0.99, 1_000)
        == pytest.approx(25 * (1 - 0.99**1_000) / 0.01 / 1_000)
        == pytest.approx(2.5, 1e-3)
    )
    assert safety.discounted_limit(25, 1.0, 1_000) == 25 and safety.discounted_limit(25, 0.0, 1_000) == 0.025
    assert safety_agent(safety, 2, env_id=CHEETAH).cost_scale == pytest.approx(2.5, 1e-3)
    agent = safety_agent(safety, 2, env_id=MAZE, cost_limit=5.0, gamma_cost=0.9)
    assert agent.cost_scale == pytest.approx(5 * 10 / 300)


@pytest.mark.parametrize("num_resets", [0, 1, 2, 3])
@pytest.mark.parametrize("kappa, cost_limit", [(0.5, 3.0), (0.0, 3.0), (0.0, math.inf)])
def test_the_oldest_agent_judges(safety, num_resets, kappa, cost_limit):
    """Frequencies of the choice in one state, against the formula with the judge's networks in float64."""
    agent = safety_agent(safety, 3, kappa=kappa, cost_limit=cost_limit)
    for _ in range(20):
        agent.update()
    agent.num_resets = num_resets
    count, observation = 20_000, torch.linspace(-1, 1, OBSERVATION_DIM)
    selection, random_actions = torch.Generator().manual_seed(num_resets), torch.Generator()
    choice = agent.act(observation.expand(count, -1), selection, random_actions, deterministic=True)
    assert choice.shape == (count, ACTION_DIM + 1)
    frequencies = np.bincount(choice[:, -1].long(), minlength=3) / count

    references = [Float64Networks(agent, i, 3) for i in range(3)]
    state = observation.double().unsqueeze(0)
    proposals = torch.cat([torch.tanh(reference.mlp(reference.actor, state)[:, :ACTION_DIM]) for reference in references])
    for i in range(3):
        for taken in choice[choice[:, -1] == i][:1]:
            np.testing.assert_allclose(taken[:-1], proposals[i].detach(), atol=1e-5)

    def expected(judge):
        if num_resets == 0:
            return [1 / 3] * 3
        first, second, cost = (
            value.tolist() for value in references[judge].values(references[judge].critics, state.expand(3, -1), proposals)
        )
        scale = cost_limit * sum(0.99**step for step in range(1_000)) / 1_000
        weight = 1.0 if math.isinf(cost_limit) else kappa  # without a limit cost is no reason
        return p_safe([min(pair) for pair in zip(first, second)], cost, 50.0, 50.0, weight, 0.0 if weight == 1 else scale)

    distances = [np.abs(frequencies - expected(judge)).max() for judge in range(3)]
    assert distances[num_resets % 3] < 4 * math.sqrt(0.25 / count)
    if num_resets and math.isfinite(cost_limit):
        assert sum(distance > 0.05 for distance in distances) == 2, "another judge would choose otherwise"


# ---------------------------------------------------------------------------------------------------------- whole runs


class Walk(gym.Env):
    """Episodes of 20 steps, each of which costs what the episode's seed says."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, cost=True, render_mode=None):
        self.cost = cost

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.price = float(self.np_random.integers(4))
        return self.np_random.uniform(-1, 1, 2), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 2), float(action[0]), False, False, {"cost": self.price} if self.cost else {}


gym.register("Walk-v0", entry_point=Walk, max_episode_steps=20)
gym.register("FreeWalk-v0", entry_point=lambda **options: Walk(cost=False, **options), max_episode_steps=20)
WALK = (
    "--env-id Walk-v0 --cost-limit 15 --total-timesteps 610 --learning-starts 90 --replay-ratio 0.2 --batch-size 16 "
    "--hidden-dim 8 --num-envs 2 --eval-interval 150 --eval-episodes 3 --reset-interval 60"
).split()


def test_what_a_run_counts(safety, tmp_path):
    """Costs in the files and in TensorBoard, and a multiplier that knows of the training's episodes alone."""
    result = run_main(safety, *WALK, "--runs-dir", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    path = only_run(tmp_path / "runs")
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


def test_the_same_seed_and_another_one(safety, tmp_path):
    paths = {}
    for name, flags in {"first": [], "again": ["--eval-interval", "70"], "other": ["--seed", "2"]}.items():
        assert run_main(safety, *WALK, *flags, "--runs-dir", tmp_path / name).returncode == 0
        paths[name] = only_run(tmp_path / name)
    assert rows(paths["first"], "episodes.csv") == rows(paths["again"], "episodes.csv")
    assert rows(paths["first"], "evaluations.csv")[-3:] == rows(paths["again"], "evaluations.csv")[-3:]
    first, again, other = (model(path)["actors"]["weights.0"] for path in paths.values())
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert rows(paths["first"], "episodes.csv") != rows(paths["other"], "episodes.csv")


def test_costs_reach_the_buffer(safety, tmp_path, monkeypatch):
    stored = []
    add = safety.ReplayBuffer.add
    monkeypatch.setattr(safety.ReplayBuffer, "add", lambda buffer, *row: (stored.append(row), add(buffer, *row)))
    assert run_main(safety, *WALK, "--num-envs", "1", "--runs-dir", tmp_path).returncode == 0
    costs = [float(row["cost"]) for row in read_csv(only_run(tmp_path) / "episodes.csv")]
    assert [row[3] for row in stored[:600]] == [cost / 20 for cost in costs for _ in range(20)]
    assert [row[2] for row in stored] == [pytest.approx(float(row[1][0])) for row in stored]
    assert not any(row[4] for row in stored), "a time limit is not an end"


def test_a_policy_for_evaluations_from_the_weights(safety, tmp_path):
    """What play.py does: an agent of the run's arguments that loads model.pt plays as the one that was saved."""
    agent, fresh = safety_agent(safety, 2), safety_agent(safety, 2, seed=9)
    agent.end_episodes([60.0])
    agent.update()
    agent.reset()
    torch.save(agent.weights(), tmp_path / "model.pt")
    fresh.load_weights(torch.load(tmp_path / "model.pt", weights_only=True))
    observations = torch.randn(50, OBSERVATION_DIM)
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    first, second = (each.act(observations, each_generator, torch.Generator(), True)
                     for each, each_generator in zip((agent, fresh), generators))  # fmt: skip
    assert torch.equal(first, second) and fresh.multiplier.value == agent.multiplier.value > 0


# ------------------------------------------------------------------------------------------------------------- resuming

# Both are killed in the middle of an episode, and agents are reset on the way.
RESUMED = {
    MAZE: "--total-timesteps 760 --cost-limit 0 --num-envs 2 --checkpoint-interval 50",
    CHEETAH: "--total-timesteps 1100 --checkpoint-interval 130",
}
SMALL = (
    "--hidden-dim 8 --batch-size 16 --learning-starts 60 --replay-ratio 0.25 --buffer-size 900 --reset-interval 240 "
    "--eval-interval 0 --eval-episodes 1"
).split()


@pytest.mark.parametrize("env_id", RESUMED)
def test_killed_and_typed_again(safety, tmp_path, env_id):
    """A run that was killed, and goes on in another process, ends as one that nobody disturbed. And no package complains."""
    arguments = ["--env-id", env_id, *SMALL, *RESUMED[env_id].split()]
    undisturbed = run_main(safety, *arguments, "--runs-dir", tmp_path / "undisturbed")
    assert undisturbed.returncode == 0, undisturbed.stderr
    runs_dir = tmp_path / "killed"
    started = Started("rde_sac_safety", *arguments, "--runs-dir", runs_dir, log=tmp_path / "log.txt")
    started.kill_after_checkpoint(runs_dir, 3)
    printed = started.printed()
    assert "WARN" not in printed and "out of date" not in printed and "Adroit" not in printed, printed
    checkpoint = torch.load(only_run(runs_dir) / "checkpoint.pt", weights_only=True)["parts"]
    assert checkpoint["run"]["global_step"] >= 150 and len(checkpoint["envs"][0]["episode"]["actions"]) > 0
    resumed = run_main(safety, *arguments, "--runs-dir", runs_dir)
    assert resumed.returncode == 0 and "continuing" in resumed.stdout, resumed.stderr
    assert_same_end(only_run(runs_dir), only_run(tmp_path / "undisturbed"))
    assert len(rows(only_run(runs_dir), "episodes.csv")) == (2 if env_id == MAZE else 1)


@pytest.mark.parametrize("step, more", [(250, []), (410, ["--cost-limit", "inf"])])
def test_a_stopped_run_goes_on(safety, tmp_path, step, more):
    """With a multiplier above 0, counters, and the curves of TensorBoard, between episodes' ends; also without a limit."""
    arguments = [*WALK, *more, "--runs-dir"]
    assert run_main(safety, *arguments, tmp_path / "undisturbed").returncode == 0
    result = stop_when(lambda run: run.global_step >= step, safety, *arguments, tmp_path / "stopped")
    assert result.returncode == 143 and f"stopped at step {step}" in result.stderr
    result = run_main(safety, *arguments, tmp_path / "stopped")
    assert result.returncode == 0 and "continuing" in result.stdout
    path = only_run(tmp_path / "stopped")
    assert_same_end(path, only_run(tmp_path / "undisturbed"))
    if more:
        curves = scalars(path)
        assert {value for name in ("lambda", "violations") for _, value in curves[f"safety/{name}"]} == {0}
        assert curves["safety/total_cost"][-1][1] > 0, "counted all the same"


# ------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "name, values",
    [
        ("cost_limit", (-1.0, math.nan, -math.inf)), ("kappa", (1.01, -0.1, math.inf)), ("gamma_cost", (1.1, -0.1, math.nan)),
        ("beta_cost", (-1.0, math.inf)), ("lambda_kp", (-1.0, math.inf)), ("lambda_ki", (-1e-9, math.inf)),
        ("lambda_kd", (-0.5, math.nan)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(safety, name, values):
    for value in values:
        with pytest.raises(ValidationError, match=f"1 validation error for Args\n{name}\n"):
            safety.Args(**{name: value})


@pytest.mark.parametrize(
    "env_id, expected",
    [
        ("FreeWalk-v0", 'FreeWalk-v0 reports no cost: its step() gives neither info["cost"] nor six values'),
        ("Pendulum-v1", "Pendulum-v1 reports no cost"),
        ("CartPole-v1", "CartPole-v1 has actions in Discrete(2), and this script takes continuous ones within bounds (Box)"),
        ("SafetyHalfCheetahVelocity-v0", "did you mean SafetyHalfCheetahVelocity-v1?"),
        ("hopper-hop", "--env-id hopper-hop is no environment"),
        ("nowhere:Walk-v0", "--env-id nowhere:Walk-v0 does not start: No module named 'nowhere'"),
    ],
)
def test_environments_that_cannot_be_used_are_refused(safety, tmp_path, monkeypatch, env_id, expected):
    """One line that says what is wrong, exit code 2, and nothing is created."""
    monkeypatch.chdir(tmp_path)
    result = run_main(safety, *WALK, "--env-id", env_id)
    assert expected in error_line(result, code=2) and result.stderr.count("\n") == 1 and not result.stdout
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing(safety, monkeypatch):
    find_spec = safety.importlib.util.find_spec
    monkeypatch.setattr(
        safety.importlib.util, "find_spec", lambda name, *more: None if name == "gymnasium_robotics" else find_spec(name, *more)
    )
    assert error_line(run_main(safety, "--env-id", MAZE), code=2).endswith("pip install gymnasium-robotics")
    safety.check_args(safety.Args(env_id=CHEETAH))


@pytest.mark.parametrize(
    "arguments", ["", f"--env-id {MAZE}", "--cost-limit inf", "--cost-limit 0 --kappa 0 --gamma-cost 1 --lambda-kp 0"]
)
def test_good_arguments_are_accepted(safety, arguments, capsys):
    safety.check_args(tyro.cli(safety.Args, args=arguments.split()))
    assert capsys.readouterr().err == ""
