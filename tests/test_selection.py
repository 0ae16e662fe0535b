"""Which agent acts, by the paper's rule (`--selection value`) and by `advantage`, in numbers, over all scripts of ensembles.

That the functions are one text in all scripts is seen in test_copies.py.
"""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from agents import ACTION_DIM, NUM_ACTIONS, OBSERVATION_DIM, bare_agent, make_observations, reset_in_turn
from conftest import load_script, scalars

DISCRETE, CONTINUOUS = ["rde_dqn_atari", "rde_drq_atari", "rde_dqn"], ["rde_sac_dmc", "rde_sac_safety"]
NAMES = DISCRETE + CONTINUOUS
script = load_script("rde_dqn")  # whose functions are those of all


# ----------------------------------------------------------------------------------------------------------- the functions


def softmax(exponents: np.ndarray) -> np.ndarray:
    """Of the last axis, in float64."""
    weights = np.exp(exponents - exponents.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def by_value(q_values: np.ndarray, beta: float, least: float = 0.0) -> np.ndarray:
    """The paper's rule in float64: (..., N) to (..., N)."""
    scale = np.maximum(np.abs(q_values).max(axis=-1, keepdims=True), least)
    return softmax(beta * q_values / np.where(scale > 0, scale, 1))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.floats(0, 100))
@example([3.0], 50.0)
@example([2.0, 2.0, 2.0], 1.0)
@example([-1.0, -1.01, -2.0], 50.0)
@example([0.0, 0.0], 50.0)
@example([0.0, -1e-30], 50.0)
@example([1e30, 0.99e30, -1e30], 50.0)
@example([1e-30, 0.98e-30], 50.0)
def test_the_papers_rule_prefers_higher_values_whatever_their_sign(q_values, beta):
    """In two states at once, of which the other one has equal values."""
    tensor = torch.tensor([q_values, [-7.0] * len(q_values)])
    ours, equal = script.selection_probabilities(tensor, script.value_scale(tensor), torch.tensor(beta)).double().numpy()
    assert ours.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(ours, by_value(np.array(q_values), beta), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(equal, 1 / len(q_values), rtol=1e-5)
    assert (np.diff(ours[np.argsort(q_values)]) >= -1e-6).all()


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
    expected = softmax(beta * np.array(q_values) / (stake or 1))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3, atol=1e-7)


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
    return bare_agent(name, **{"num_agents": 3} | small.get(name, {"hidden_dim": 2, "num_hidden_layers": 1}) | arguments)


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
        if name == "rde_drq_atari":
            tables = logits_of(tables, agent.args)
        agent.q_networks = [lambda inputs, q=table: q.expand(len(inputs), *q.shape) for table in tables]
    reset_in_turn(agent, num_resets)
    return agent


def logits_of(q_values: torch.Tensor, args) -> torch.Tensor:
    """(..., num_atoms): one atom that is the value, or a distribution of which it is the expectation, half of it even."""
    if args.num_atoms == 1:
        return q_values.unsqueeze(-1)
    lowest, highest = args.v_min, args.v_max
    upper = (2 * q_values - (lowest + highest) / 2 - lowest) / (highest - lowest)  # of the other half, what lies on the highest
    probabilities = torch.full((*q_values.shape, args.num_atoms), 0.5 / args.num_atoms)
    probabilities[..., 0] += 0.5 * (1 - upper)
    probabilities[..., -1] += 0.5 * upper
    return torch.log(probabilities)


def act(name: str, agent, count: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """So many choices in one state: the acting agents, their probabilities (count, 3), the places of random actions (count, K)."""
    made, seen = load_script(name), []
    function = "safe_selection_probabilities" if name == "rde_sac_safety" else "selection_probabilities"
    select, generators = getattr(made, function), [torch.Generator().manual_seed(seed + i) for i in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, function, lambda *numbers: seen.append(select(*numbers)) or seen[-1])
        if name in CONTINUOUS:
            choice = agent.act(torch.zeros(count, OBSERVATION_DIM), *generators, deterministic=True, counted=True)
            acting_agents = choice[:, -1].long()
            proposed = torch.from_numpy(places(len(agent.resets) % 3)).float()[acting_agents]
            torch.testing.assert_close(choice[:, 0], proposed)
            random_actions = torch.empty(count, 16, ACTION_DIM)
            random_actions.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed + 1))
            random_places = random_actions[..., 0].double().numpy()
        else:
            observation = torch.zeros(OBSERVATION_DIM) if name == "rde_dqn" else torch.zeros((4, 1, 1), dtype=torch.uint8)
            actions, acting_agents = agent.act(observation.expand(count, *observation.shape), generators[0], counted=True)
            assert torch.equal(actions, acting_agents)
            random_places = np.tile([*PROPOSED, *NOT_PROPOSED], (count, 1))
    return acting_agents.numpy(), seen[-1].double().numpy(), random_places


def formula(values: np.ndarray, random_values: np.ndarray, beta: float, floor: float) -> np.ndarray:
    """The rule of advantage in float64, for values of the proposals (3,) and of random actions (count, K): (count, 3)."""
    best = np.maximum(values.max(), random_values.max(axis=1, keepdims=True))
    return softmax(beta * values / np.maximum(best - random_values.mean(axis=1, keepdims=True), floor))


@pytest.mark.parametrize("num_resets", [0, 1, 2, 3])
@pytest.mark.parametrize("selection", ["value", "advantage"])
@pytest.mark.parametrize("name, arguments", [*((name, {}) for name in NAMES), ("rde_drq_atari", {"num_atoms": 6})])
def test_the_oldest_agent_judges(name, arguments, selection, num_resets):
    """Probabilities and frequencies: by what is at stake from the first step on, by value from the first reset on. To the
    paper's rule the values of the other one, near 200, would be almost alike."""
    betas = {"beta": 1.5, "beta_cost": 2.5, "kappa": 0.7} if name == "rde_sac_safety" else {"beta": 1.5}
    offset = 200.0 if selection == "advantage" else -0.5
    support = {"v_min": -offset - 10, "v_max": 3 * offset + 10} if "num_atoms" in arguments else {}
    cost, its_slope = (7.0, 3.0) if num_resets < 2 else (0.5, 0.2)  # the latter are divided by the limit, not by themselves
    agent = composed(name, num_resets, offset, 2.0, (cost, its_slope), selection=selection, **betas, **arguments, **support)
    acting_agents, probabilities, random_places = act(name, agent, 20_000)
    proposed, beta, beta_cost = places(num_resets % 3), 1.5, 2.5
    if selection == "advantage":
        expected = formula(offset + 2 * proposed, offset + 2 * random_places, beta, 1e-6 * offset)
        costs = formula(
            -cost - its_slope * proposed, -cost - its_slope * random_places, beta_cost, getattr(agent, "cost_scale", 0) / 10
        )
    else:
        beta, beta_cost = (beta, beta_cost) if num_resets else (0, 0)
        expected = np.tile(by_value(offset + 2 * proposed, beta), (20_000, 1))
        costs = by_value(-cost - its_slope * proposed, beta_cost, getattr(agent, "cost_scale", 0))
    if name == "rde_sac_safety":
        expected = 0.7 * expected + 0.3 * costs
    np.testing.assert_allclose(probabilities, expected, rtol=2e-3, atol=1e-6)
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert agent.choices[:2].tolist() == pytest.approx([20_000, entropy], rel=1e-4)
    if beta:
        assert probabilities.mean(axis=0).argmax() == num_resets % 3
    frequencies = np.bincount(acting_agents, minlength=3) / len(acting_agents)
    np.testing.assert_allclose(frequencies, expected.mean(axis=0), atol=4 * 0.5 / math.sqrt(len(acting_agents)))
    again, other = (act(name, agent, 64, seed)[0] for seed in (1, 3))
    assert np.array_equal(again, act(name, agent, 64)[0]) and not np.array_equal(again, other)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_agents, selection, beta, first, later", [
    (3, "value", None, 0, 50), (2, "advantage", None, 5, 5), (5, "value", 7.0, 0, 7), (3, "advantage", 7.0, 7, 7),
    (1, "advantage", 0.0, 0, 0),
])  # fmt: skip
def test_the_resets_say_who_judges_and_how(name, num_agents, selection, beta, first, later):
    """Through three rounds. The default of beta is that of the rule. Set in place: a captured CUDA graph reads the tensors
    where they are."""
    agent = make_agent(name, num_agents=num_agents, selection=selection, beta=beta)
    betas = [agent.beta] if name != "rde_sac_safety" or beta is not None else [agent.beta, agent.beta_cost]
    addresses = [tensor.data_ptr() for tensor in (agent.oldest, *betas)]
    last_reset = {i: i - num_agents for i in range(num_agents)}  # agent 0 counts as the oldest at the start
    for event in range(3 * num_agents):
        oldest = min(last_reset, key=last_reset.get)
        assert (len(agent.resets), agent.oldest.item()) == (event, oldest)
        assert [number.item() for number in betas] == [later if event else first] * len(betas)
        assert agent.reset() == oldest
        last_reset[oldest] = event
    for num_resets in (5, 1, 0):
        reset_in_turn(agent, num_resets)
        assert agent.oldest.item() == num_resets % num_agents
        assert [number.item() for number in betas] == [later if num_resets else first] * len(betas)
    assert addresses == [tensor.data_ptr() for tensor in (agent.oldest, *betas)]
    choice = f", selection by {selection} (beta {later})" if num_agents > 1 else ""
    assert re.fullmatch(rf"{num_agents} agent\(s\) x [\d,]+ parameters{re.escape(choice)}", agent.summary())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_logged_of_the_choice(name):
    """The oldest agent, the fractions of the acting ones and the mean entropy since the last point, which then begin anew."""
    agent = make_agent(name)
    logged_of_the_choice = lambda: {tag: value for tag, value in agent.scalars().items() if tag.startswith("rde/")}
    tags = ["rde/oldest_agent", *(f"rde/acting_fraction_{i}" for i in range(3)), "rde/choice_entropy"]
    assert logged_of_the_choice() == dict.fromkeys(tags, 0)  # before the first reset no agent is the youngest
    reset_in_turn(agent, 6)  # agent 2 was the last one
    tags.append("rde/youngest_fraction")
    for counts, choices, logged in (([2, 0, 6], [5, 2], [0.25, 0.0, 0.75, 0.4, 0.75]), ([0, 0, 0], [0, 0], [0] * 5)):
        agent.acting_counts += counts
        agent.choices[:2] += torch.tensor(choices)
        assert logged_of_the_choice() == pytest.approx(dict(zip(tags, [0, *logged], strict=True)))


@pytest.mark.parametrize("name", NAMES)
def test_evaluations_choose_as_acting_does_and_are_not_counted(name):
    agent, observations = make_agent(name, **{} if name in CONTINUOUS else {"eval_epsilon": 0.0}), make_observations(name, 20)
    reset_in_turn(agent, 1)
    ours = agent.evaluation_policy(torch.Generator().manual_seed(3))(observations)
    assert not agent.choices.any() and not agent.acting_counts.any()
    generator = torch.Generator().manual_seed(3)
    if name in CONTINUOUS:
        expected = agent.act(observations, generator, generator, deterministic=True, counted=True)[:, :-1]
    else:
        expected = agent.act(observations, generator, counted=True)[0]
    assert torch.equal(ours, expected) and agent.choices[0] == 20


# ---------------------------------------------------------------------------------------------------------- random actions


@pytest.mark.parametrize("name", CONTINUOUS)
def test_random_actions_have_a_generator_of_their_own(name):
    """So with either rule the actors' noise is the same, and the clocks that draw the agent are."""
    choices, states = {}, {}
    for selection in ("value", "advantage"):
        agent, generators = make_agent(name, selection=selection), [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        reset_in_turn(agent, 1)
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


# -------------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", ["rde", "drq", "cartpole", "sac", "safety"])
def test_what_a_run_logs_of_the_choice(name, runs):
    """Before the first reset the paper's rule is a coin, whose entropy is log 2."""
    logged = scalars(runs(name).path)
    resets, acting = logged["rde/reset_agent"], [dict(logged[f"rde/acting_fraction_{i}"]) for i in (0, 1)]
    entropies = [(step, entropy) for step, entropy in logged["rde/choice_entropy"] if acting[0][step] or acting[1][step]]
    before = [entropy for step, entropy in entropies if step <= resets[0][0]]
    after = [entropy for step, entropy in entropies if step > resets[0][0]]
    assert before == pytest.approx([math.log(2)] * len(before), abs=1e-6) and len(before) > 0
    assert 0 <= min(after) and max(after) < math.log(2) + 1e-6
    assert min(after) < math.log(2) - 1e-3 or name == "drq"  # whose values have hardly moved away from one another


@pytest.mark.parametrize("name", NAMES)
def test_with_one_agent_both_rules_are_one_to_the_bit(name):
    """The same actions, and the same numbers are drawn; nothing is said of a choice."""
    choices, states = [], []
    for selection in ("value", "advantage"):
        agent = make_agent(name, num_agents=1, selection=selection)
        generators = [torch.Generator().manual_seed(i) for i in (1, 2)[: 1 + (name in CONTINUOUS)]]
        reset_in_turn(agent, 1)
        choices.append(agent.act(make_observations(name, 50), *generators, counted=True))
        states.append(torch.cat([generator.get_state() for generator in generators]))
    assert torch.equal(*choices) and torch.equal(*states) and len(choices[0].unique(dim=0)) > 1
