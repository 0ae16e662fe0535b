"""Which agent acts: `--selection advantage` beside the paper's `value`, in numbers, over all five scripts of ensembles.

What the paper's rule gives is tested with each script's agent (test_agent.py, test_drq.py, test_rde_dqn.py, test_sac_agent.py,
test_safety.py); that the functions are one text in all scripts, in test_copies.py.
"""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from agents import ACTION_DIM, CPU, FRAMES, NUM_ACTIONS, OBSERVATION_DIM, box
from conftest import assert_same_end, load_script, only_run, run_main, scalars

DISCRETE, CONTINUOUS = ["rde_dqn_atari", "rde_drq_atari", "rde_dqn"], ["rde_sac_dmc", "rde_sac_safety"]
NAMES = DISCRETE + CONTINUOUS
script = load_script("rde_dqn")  # whose functions are those of all


# ----------------------------------------------------------------------------------------------------------- the functions


def by_advantage(q_values: list[float], random_q_values: list[float] | None = None, beta: float = 5.0) -> np.ndarray:
    """The probabilities of the proposals in one state. Without `random_q_values` the proposals are all actions there are."""
    q_values = torch.tensor([q_values])
    random_q_values = q_values if random_q_values is None else torch.tensor([random_q_values])
    scale = script.advantage_scale(q_values, random_q_values)
    return script.selection_probabilities(q_values, scale, beta)[0].double().numpy()


EIGHTHS = st.integers(-100, 100).map(lambda number: number / 8)  # which float32 holds, and also their sums


@given(
    st.lists(EIGHTHS, min_size=2, max_size=6), st.none() | st.lists(EIGHTHS, min_size=1, max_size=6),
    st.integers(-1_000, 1_000).map(lambda number: number / 8), st.floats(1e-3, 1e3), st.floats(0, 10),
)  # fmt: skip
def test_where_the_zero_of_the_values_lies_and_their_unit_do_not_matter(q_values, random_q_values, shift, factor, beta):
    """And what is a proposal's loss as a fraction of a random action's loss, in float64, is what counts."""
    all_values = q_values + (random_q_values or [])
    stake = max(all_values) - np.mean(q_values if random_q_values is None else random_q_values)
    assume(stake >= 1 / 8 or len(set(all_values)) == 1)
    moved = lambda values: values and [factor * (value + shift) for value in values]
    probabilities = by_advantage(q_values, random_q_values, beta)
    np.testing.assert_allclose(by_advantage(moved(q_values), moved(random_q_values), beta), probabilities, rtol=1e-2, atol=1e-6)
    loss = max(q_values) - np.array(q_values)
    expected = np.exp(-beta * loss / (stake or 1))
    np.testing.assert_allclose(probabilities, expected / expected.sum(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0, 10.0])
def test_a_proposal_as_bad_as_a_random_action_is_exp_beta_times_less_likely(beta):
    best, mean, *_ = by_advantage([507.0, 504.0, 502.5, 502.5], beta=beta)  # 504 is the mean
    assert best / mean == pytest.approx(math.exp(beta), rel=1e-4)
    best, mean = by_advantage([-7.0, -8.0], [-7.5, -8.5], beta)
    assert best / mean == pytest.approx(math.exp(beta), rel=1e-5)
    # Continuous actions: a random one can be better than all proposals, and all of them together better than each.
    better, worse = by_advantage([0.75, 0.5], [4.0, 3.0], beta)
    assert better / worse == pytest.approx(math.exp(beta / 2), rel=1e-5)


@pytest.mark.parametrize(
    "q_values, beta", [([0.0] * 3, 5.0), ([-123.456] * 3, 5.0), ([1e-30] * 3, 1e9), ([3.0, -2.0, 0.5], 0.0)]
)
def test_equal_values_and_beta_0_are_a_uniform_choice(q_values, beta):
    np.testing.assert_allclose(by_advantage(q_values, beta=beta), [1 / 3] * 3, rtol=1e-6)


def test_the_noise_of_float32_is_no_stake():
    """Values that are equal but for their last bit: without a floor the larger one would be taken always (1 - e^-10)."""
    value = np.float32(100.0)
    noisy = [float(value), float(np.nextafter(value, np.float32(np.inf)))]
    assert noisy[0] < noisy[1] and by_advantage(noisy)[1] < 0.65
    assert by_advantage(noisy, [50.0])[1] == pytest.approx(0.5, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- agents that choose

# What is made up lies on a line. Actions are places on it, agents propose one place each, and to the judge an action is worth
# offset + slope * place. Discrete actions are five places; of a continuous action the first number is the place.
PROPOSED, NOT_PROPOSED = [0.6, 0.1, -0.4], [-0.5, -0.8]


def places(judge: int) -> np.ndarray:
    """Of the agents' proposals; the judge's own one is the best in its eyes."""
    return np.roll(PROPOSED, judge)


def make_agent(name: str, **arguments):
    """A small one, of three if nothing else is said, without a replay buffer."""
    small = {"rde_dqn_atari": {}, "rde_drq_atari": {"width": 0.1, "num_atoms": 1}}
    arguments = {"num_agents": 3} | small.get(name, {"hidden_dim": 2, "num_hidden_layers": 1}) | arguments
    args = load_script(name).Args(**arguments)
    actions = box(ACTION_DIM) if name in CONTINUOUS else gym.spaces.Discrete(NUM_ACTIONS)
    return load_script(name).Agent(args, FRAMES if name in small else box(OBSERVATION_DIM), actions, None, CPU)


def composed(name: str, num_resets: int, offset: float = 0.0, slope: float = 1.0, costs=(0.0, 0.0), **arguments):
    """An agent of three whose judge thinks so, and the others otherwise. `costs` are the cost critics' offset and slope."""
    agent, judge = make_agent(name, **arguments), num_resets % 3
    if name in CONTINUOUS:
        with torch.no_grad():
            for parameter in [*agent.actors.parameters(), *agent.critics.parameters()]:
                parameter.zero_()
            agent.actors.biases[-1][:, 0, 0] = torch.from_numpy(np.arctanh(places(judge)))
            (first, _), (last, bias) = agent.critics.layers
            first[:, OBSERVATION_DIM] = torch.tensor([1.0, -1.0])  # relu(place), relu(-place)
            count = len(bias) // 3
            for number in range(len(bias)):
                its_slope = slope if number // count == judge else -slope
                its_offset = offset + number % count  # the second critic thinks better of everything
                if number % count == 2:
                    its_offset, its_slope = costs
                last[number, :, 0], bias[number] = torch.tensor([its_slope, -its_slope]), its_offset
    else:
        tables = torch.eye(3, NUM_ACTIONS)  # agent i proposes action i
        tables[judge] = offset + slope * torch.tensor([*places(judge), *NOT_PROPOSED])
        shape = (-1, NUM_ACTIONS, 1) if name == "rde_drq_atari" else (-1, NUM_ACTIONS)  # logits of one atom, or numbers
        agent.q_networks = [lambda inputs, q=table: q.view(shape).expand(len(inputs), *shape[1:]) for table in tables]
    agent.num_resets = num_resets
    return agent


def act(name: str, agent, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many choices in one state: the acting agents, their probabilities (count, 3), the places of random actions (count, K)."""
    made, seen = load_script(name), []
    function = "safe_selection_probabilities" if name == "rde_sac_safety" else "selection_probabilities"
    select, generators = getattr(made, function), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, function, lambda *numbers: seen.append(select(*numbers)) or seen[-1])
        if name in CONTINUOUS:
            choice = agent.act(torch.zeros(count, OBSERVATION_DIM), *generators, deterministic=True)
            acting_agents = choice[:, -1].long()
            proposed = torch.from_numpy(places(agent.num_resets % 3)).float()[acting_agents]
            torch.testing.assert_close(choice[:, 0], proposed)
            random_actions = torch.empty(count, 16, ACTION_DIM).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
            random_places = random_actions[..., 0].double().numpy()
        else:
            observation = torch.zeros(OBSERVATION_DIM) if name == "rde_dqn" else torch.zeros((4, 1, 1), dtype=torch.uint8)
            actions, acting_agents = agent.act(observation.expand(count, *observation.shape), generators[0])
            assert torch.equal(actions, acting_agents)
            random_places = np.tile([*PROPOSED, *NOT_PROPOSED], (count, 1))
    return acting_agents.numpy(), seen[-1].double().numpy(), random_places


def formula(values: np.ndarray, random_values: np.ndarray, beta: float, floor: float) -> np.ndarray:
    """The rule in float64, for values of the proposals (3,) and of random actions (count, K): (count, 3)."""
    best = np.maximum(values.max(), random_values.max(axis=1, keepdims=True))
    stake = np.maximum(best - random_values.mean(axis=1, keepdims=True), floor)
    weights = np.exp(-beta * (best - values) / stake)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("num_resets", [0, 2])
@pytest.mark.parametrize("name", NAMES)
def test_the_oldest_agent_judges_by_what_is_at_stake_from_the_first_step_on(name, num_resets):
    """Probabilities and frequencies. To the paper's rule these values, near 200, would be almost alike."""
    betas = {"beta": 1.5, "beta_cost": 2.5, "kappa": 0.7} if name == "rde_sac_safety" else {"beta": 1.5}
    agent = composed(name, num_resets, 200.0, 2.0, costs=(7.0, 3.0), selection="advantage", **betas)
    acting_agents, probabilities, random_places = act(name, agent, 20_000)
    proposed = places(num_resets % 3)
    expected = formula(200 + 2 * proposed, 200 + 2 * random_places, 1.5, 2e-4)
    if name == "rde_sac_safety":
        costs = formula(-7 - 3 * proposed, -7 - 3 * random_places, 2.5, agent.cost_scale / 10)
        expected = 0.7 * expected + 0.3 * costs
    np.testing.assert_allclose(probabilities, expected, rtol=2e-3, atol=1e-6)
    assert probabilities.mean(axis=0).argmax() == num_resets
    frequencies = np.bincount(acting_agents, minlength=3) / len(acting_agents)
    np.testing.assert_allclose(frequencies, expected.mean(axis=0), atol=4 * 0.5 / math.sqrt(len(acting_agents)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("selection, beta, first, later", [
    ("value", None, 0, 50), ("advantage", None, 5, 5), ("value", 7.0, 0, 7), ("advantage", 7.0, 7, 7), ("advantage", 0.0, 0, 0),
])  # fmt: skip
def test_the_default_of_beta_is_that_of_the_rule_and_is_said(name, selection, beta, first, later):
    agent = make_agent(name, selection=selection, beta=beta)
    betas = [agent.beta] if name != "rde_sac_safety" or beta is not None else [agent.beta, agent.beta_cost]
    for num_resets, expected in ((0, first), (1, later), (5, later)):
        agent.num_resets = num_resets
        assert [number.item() for number in betas] == [expected] * len(betas)
    assert agent.summary() == f"3 agent(s) x {agent.num_parameters:,} parameters, selection by {selection} (beta {later})"


# ---------------------------------------------------------------------------------------------------------- random actions


@pytest.mark.parametrize("name", CONTINUOUS)
def test_random_actions_have_a_generator_of_their_own(name):
    """So with either rule the actors' noise is the same, and the clocks that draw the agent are."""
    choices, states = {}, {}
    for selection in ("value", "advantage"):
        agent, generators = make_agent(name, selection=selection), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        agent.num_resets = 1
        batches = torch.randn(3, 200, OBSERVATION_DIM, generator=torch.Generator().manual_seed(3))
        choices[selection] = torch.cat([agent.act(observations, *generators) for observations in batches])
        states[selection] = [generator.get_state() for generator in generators]
    assert torch.equal(states["value"][0], states["advantage"][0])
    untouched = torch.Generator().manual_seed(2)
    assert torch.equal(states["value"][1], untouched.get_state())
    drawn = torch.cat([agent.random_actions(200, untouched) for _ in range(3)])
    assert torch.equal(states["advantage"][1], untouched.get_state())
    same = choices["value"][:, -1] == choices["advantage"][:, -1]
    assert torch.equal(choices["value"][same], choices["advantage"][same]) and 0.3 < same.float().mean() < 1
    assert drawn.shape == (600, 16, ACTION_DIM) and -1 <= drawn.min() < -0.99 and 0.99 < drawn.max() <= 1
    assert drawn.mean().abs() < 0.02 and drawn.std() == pytest.approx(1 / math.sqrt(3), rel=0.02)


# ------------------------------------------------------------------------------------------------------------------- costs


def by_cost(selection: str, offset: float, slope: float) -> np.ndarray:
    """Of safe RDE with cost alone: the probabilities of proposals at the places 0.6, 0.1 and -0.4, in 100 choices."""
    agent = composed("rde_sac_safety", 3, costs=(offset, slope), kappa=0.0, selection=selection)
    return act("rde_sac_safety", agent, 100)[1]


def test_the_cheapest_is_preferred_whatever_all_of_them_cost():
    cheap = by_cost("advantage", 0.0, 10.0)
    assert (np.diff(cheap, axis=1) > 0).all() and (cheap[:, 2] > 0.8).all()
    assert (np.diff(by_cost("advantage", 0.0, -10.0), axis=1) < 0).all()
    for offset, slope in ((300.0, 10.0), (-40.0, 100.0)):
        np.testing.assert_allclose(by_cost("advantage", offset, slope), cheap, rtol=5e-3)


def test_where_no_cost_is_in_sight_the_choice_is_as_soft_as_by_value():
    tiny = by_cost("advantage", 0.0, 1e-2)
    np.testing.assert_allclose(tiny, by_cost("value", 0.0, 1e-2), rtol=1e-5)
    np.testing.assert_allclose(tiny, 1 / 3, atol=0.05)


# -------------------------------------------------------------------------------------------------------------- whole runs

# With two agents the first is reset at step 200, with one at step 300; a point of the curves every 100 steps.
RUN = (
    "--total-timesteps 320 --learning-starts 100 --replay-ratio 0.2 --batch-size 4 --buffer-size 300 --eval-interval 0 "
    "--eval-episodes 1 --checkpoint-interval 0 --reset-interval 40 "
)
BREAKOUT, EARLY = "--env-id BreakoutNoFrameskip-v4 --eval-epsilon 0.5 ", "--start-e 0.5 --exploration-fraction 0.1 "
RUNS = {
    "rde_dqn_atari": RUN + BREAKOUT + EARLY,
    "rde_drq_atari": RUN + BREAKOUT + "--width 0.1 --exploration-steps 20 --n-step 3",
    "rde_dqn": RUN + EARLY + "--env-id CartPole-v1 --hidden-dim 8",
    "rde_sac_dmc": RUN + "--env-id cartpole-swingup --hidden-dim 8",
    "rde_sac_safety": RUN + "--env-id SafetyHopperVelocity-v1 --hidden-dim 8",
}


@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_says_and_logs_of_the_choice(name, tmp_path):
    """Before the first reset the paper's rule is a coin, whose entropy is log 2; afterwards the agent that was reset is seen."""
    result = run_main(load_script(name), *RUNS[name].split(), "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    assert " parameters, selection by value (beta 50), 44 gradient steps, 2 reset(s), " in result.stdout.splitlines()[0]
    logged = scalars(only_run(tmp_path))
    (_, _), (_, before), (step, after) = logged["rde/choice_entropy"]
    assert before == pytest.approx(math.log(2), abs=1e-6) and 0 <= after < before and step == 300
    assert logged["rde/youngest_fraction"] == logged["rde/acting_fraction_0"][2:]


@pytest.mark.parametrize("name", NAMES)
def test_with_one_agent_both_rules_are_one_to_the_bit(name):
    """The same actions, and the same numbers are drawn; nothing is said of a choice."""
    choices, states = [], []
    for selection in ("value", "advantage"):
        agent, generators = (
            make_agent(name, num_agents=1, selection=selection),
            [torch.Generator().manual_seed(i) for i in (1, 2)],
        )
        assert agent.summary() == f"1 agent(s) x {agent.num_parameters:,} parameters"
        agent.num_resets = 1
        if name in CONTINUOUS or name == "rde_dqn":
            observations = torch.randn(50, OBSERVATION_DIM, generator=torch.Generator().manual_seed(3))
        else:
            pictures = np.random.default_rng(3).integers(0, 256, (10, 4, 84, 84), dtype=np.uint8)
            observations = torch.from_numpy(pictures)
        choices.append(agent.act(observations, *generators[: 1 + (name in CONTINUOUS)], counted=True))
        states.append(torch.cat([generator.get_state() for generator in generators]))
    assert torch.equal(*choices) and torch.equal(*states) and len(choices[0].unique(dim=0)) > 1


@pytest.mark.parametrize("name", ["rde_dqn", "rde_sac_dmc"])
def test_a_run_of_one_agent_is_the_same_by_both_rules(name, tmp_path):
    paths = []
    for selection in ("value", "advantage"):
        arguments = [*RUNS[name].split(), "--num-agents", "1", "--selection", selection, "--runs-dir", tmp_path / selection]
        result = run_main(load_script(name), *arguments)
        assert result.returncode == 0 and "selection by" not in result.stdout, result.stderr
        paths.append(only_run(tmp_path / selection))
    assert_same_end(*paths)
