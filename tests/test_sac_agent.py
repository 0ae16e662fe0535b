"""The quantities of RDE+SAC against references that share no code with the script, mostly in float64."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from agents import ACTION_DIM, OBSERVATION_DIM, Float64Networks, sac_agent, safety_agent, state_per_agent, updated
from conftest import load_script

BATCH_SIZE = 32


# ------------------------------------------------------------------------------------------------- the squashed Gaussian


def test_log_probabilities_against_torch_distributions(sac):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 50, ACTION_DIM, generator=generator, dtype=torch.float64)
    log_std = torch.rand(4, 50, ACTION_DIM, generator=generator, dtype=torch.float64) * 3 - 2.5
    noise = torch.randn(4, 50, ACTION_DIM, generator=generator, dtype=torch.float64)
    actions, log_probs = sac.squashed_gaussian(mean, log_std, noise)
    assert actions.shape == (4, 50, ACTION_DIM) and log_probs.shape == (4, 50)
    # The transform keeps the unsquashed value in its cache, so the distribution does not lose it either.
    distribution = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    transform = distribution.transforms[0]
    expected_actions = transform(mean + log_std.exp() * noise)
    torch.testing.assert_close(actions, expected_actions)
    torch.testing.assert_close(log_probs, Independent(distribution, 1).log_prob(expected_actions), rtol=1e-10, atol=1e-10)


def test_density_integrates_to_one(sac):
    """Probability per action, not per unsquashed value: the correction has the right sign."""
    noise = torch.linspace(-8, 8, 40_001, dtype=torch.float64).unsqueeze(1)
    actions, log_probs = sac.squashed_gaussian(torch.full_like(noise, 0.3), torch.full_like(noise, -0.2), noise)
    assert torch.trapezoid(log_probs.exp(), actions.squeeze(1)).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mean", [-60.0, -20.0, -9.5, 9.5, 20.0, 60.0])
@pytest.mark.parametrize("log_std", [-20.0, -3.0, 0.0, 2.0])
def test_saturated_actions(sac, mean, log_std):
    """In float32 tanh rounds to 1 there. The reference is -2 * log cosh(u), in float64."""
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(1))
    means, log_stds = torch.full_like(noise, mean).requires_grad_(), torch.full_like(noise, log_std).requires_grad_()
    actions, log_probs = sac.squashed_gaussian(means, log_stds, noise)
    gradients = torch.autograd.grad(log_probs.sum(), [means, log_stds])

    wide_mean, wide_log_std = means.detach().double().requires_grad_(), log_stds.detach().double().requires_grad_()
    unsquashed = wide_mean + wide_log_std.exp() * noise.double()
    log_cosh = torch.logaddexp(unsquashed, -unsquashed) - math.log(2)
    gaussian = -0.5 * noise.double() ** 2 - wide_log_std - 0.5 * math.log(2 * math.pi)
    expected = (gaussian + 2 * log_cosh).sum(1)
    expected_gradients = torch.autograd.grad(expected.sum(), [wide_mean, wide_log_std])
    assert actions.abs().max() <= 1
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-4)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert gradient.isfinite().all()
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- one gradient step


def layer_gradients(stacked_parameters, networks):
    """The gradients that an optimizer's group holds, as {(layer, "weight" or "bias", network): gradient}."""
    depth, gradients = len(stacked_parameters) // 2, {}
    for k in range(networks):
        for layer in range(depth):
            gradients[layer, "weight", k] = stacked_parameters[layer][k].T.double()
            gradients[layer, "bias", k] = stacked_parameters[depth + layer][k, 0].double()
    return gradients


@pytest.mark.parametrize("num_agents", [1, 3])
def test_gradient_step_against_float64(sac, num_agents):
    agent = sac_agent(sac, num_agents)
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
    assert [tensor.shape for tensor in batch] == [
        (BATCH_SIZE, OBSERVATION_DIM), (BATCH_SIZE, ACTION_DIM), (BATCH_SIZE,), (BATCH_SIZE,), (BATCH_SIZE, OBSERVATION_DIM)
    ]  # fmt: skip
    assert 0 < batch[3].sum() < BATCH_SIZE
    noise = torch.empty(num_agents, BATCH_SIZE, ACTION_DIM).normal_(generator=generator).double()
    next_noise = torch.empty(num_agents, BATCH_SIZE, ACTION_DIM).normal_(generator=generator).double()
    observations, actions, rewards, terminated, next_observations = (tensor.double() for tensor in batch)

    references = [Float64Networks(agent, i, 2) for i in range(num_agents)]
    metrics = updated(agent)
    assert metrics.shape == (4, num_agents) and not metrics.requires_grad
    assert torch.equal(generator.get_state(), agent.buffer.generator.get_state())

    for i, reference in enumerate(references):
        alpha = reference.log_alpha.detach().exp()
        policy_actions, log_probs = reference.policy(observations, noise[i])
        alpha_loss = -(reference.log_alpha * (log_probs.detach() - ACTION_DIM)).mean()
        alpha_loss.backward()
        with torch.no_grad():
            next_actions, next_log_probs = reference.policy(next_observations, next_noise[i])
            smaller_q = torch.min(*reference.values(reference.targets, next_observations, next_actions))
            next_value = smaller_q - alpha * next_log_probs
            td_target = torch.where(terminated == 1, rewards, rewards + 0.99 * next_value)
        assert td_target.shape == (BATCH_SIZE,)
        q_values = reference.values(reference.critics, observations, actions)
        critic_loss = sum(((q_value - td_target) ** 2).mean() for q_value in q_values) / 2
        critic_loss.backward()
        # The actor's loss is taken with the critics after their step.
        updated_critics = [Float64Networks.copy_layers(agent.critics, 2 * i + k) for k in range(2)]
        policy_q_values = torch.min(*reference.values(updated_critics, observations, policy_actions))
        actor_loss = (alpha * log_probs - policy_q_values).mean()
        actor_loss.backward()

        expected = torch.stack([critic_loss, sum(q_values).mean() / 2, actor_loss, alpha]).detach()
        torch.testing.assert_close(metrics[:, i].double(), expected, rtol=1e-5, atol=1e-5)
        slices = agent.alpha_optimizer.param_groups[i]["params"]
        torch.testing.assert_close(slices[0].grad[0].double(), reference.log_alpha.grad, rtol=1e-5, atol=1e-5)
        actor_gradients = layer_gradients([s.grad for s in agent.actor_optimizer.param_groups[i]["params"]], 1)
        critic_gradients = layer_gradients([s.grad for s in agent.critic_optimizer.param_groups[i]["params"]], 2)
        assert len(actor_gradients) == 6 and len(critic_gradients) == 12
        for (layer, kind, _), gradient in actor_gradients.items():
            torch.testing.assert_close(gradient, reference.actor[layer][kind == "bias"].grad, rtol=1e-4, atol=3e-6)
        for (layer, kind, k), gradient in critic_gradients.items():
            torch.testing.assert_close(gradient, reference.critics[k][layer][kind == "bias"].grad, rtol=1e-4, atol=3e-6)
        for k in range(2):
            targets = zip(
                reference.targets[k], updated_critics[k], Float64Networks.copy_layers(agent.target_critics, 2 * i + k)
            )
            for before, critic, after in targets:
                for old, new, moved in zip(before, critic, after):
                    torch.testing.assert_close(moved, 0.995 * old + 0.005 * new, rtol=1e-6, atol=1e-7)


def test_metrics_with_bfloat16_are_near_those_without(sac):
    exact, rounded = updated(sac_agent(sac, 2)), updated(sac_agent(sac, 2, bf16=True))
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=0.05, atol=0.05)


def test_log_std_is_clamped(sac):
    agent = sac_agent(sac, 2)
    with torch.no_grad():
        agent.actors.biases[-1][0, 0, ACTION_DIM:] = 100.0
        agent.actors.biases[-1][1, 0, ACTION_DIM:] = -100.0
    mean, log_std = agent.policies(torch.zeros(4, OBSERVATION_DIM))
    assert mean.shape == log_std.shape == (2, 4, ACTION_DIM)
    assert (log_std[0] == 2).all() and (log_std[1] == -20).all()


def test_terminated_does_not_bootstrap(sac):
    """The critics' loss of terminated transitions does not know the next observation; that of all others does."""
    losses = {}
    for terminated in (True, False):
        for shift in (0.0, 1.0):
            agent = sac_agent(sac, 2, terminated=terminated)
            agent.buffer.rows[:, -OBSERVATION_DIM:] += shift
            losses[terminated, shift] = updated(agent)[0]
    assert torch.equal(losses[True, 0.0], losses[True, 1.0])
    assert (losses[False, 0.0] != losses[False, 1.0]).all()


def test_agents_do_not_leak_into_one_another(sac):
    untouched, changed = sac_agent(sac, 3), sac_agent(sac, 3)
    with torch.no_grad():
        for name, tensor in state_per_agent(changed)[1].items():
            tensor += 0.1 * torch.ones_like(tensor)
    for _ in range(3):
        untouched.update()
        changed.update()
    for i, (expected, state) in enumerate(zip(state_per_agent(untouched), state_per_agent(changed))):
        assert len(state) > 40
        for name in state:
            assert torch.equal(expected[name], state[name]) == (i != 1 or name.endswith(".step")), (i, name)


def test_first_agent_starts_like_the_baseline(sac):
    """RDE and SAC with the same seed are paired: agent 0 has the same weights; the other agents have weights of their own."""
    baseline, ensemble = state_per_agent(sac_agent(sac, 1)), state_per_agent(sac_agent(sac, 3))
    weights = [name for name in baseline[0] if "weights" in name]
    for name in weights:
        assert torch.equal(baseline[0][name], ensemble[0][name])
        assert not torch.equal(ensemble[0][name], ensemble[1][name])
    first, second = ensemble[0]["critics.weights.0"]
    assert not torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------- the reset


def test_reset_renews_one_agent_and_nothing_of_the_others(sac):
    agent = sac_agent(sac, 3)
    for _ in range(4):
        agent.update()
    for expected_index in (0, 1, 2, 0):
        agent.update()
        state = state_per_agent(agent)
        before = copy.deepcopy(state)
        addresses = [{name: tensor.data_ptr() for name, tensor in part.items()} for part in state]
        assert agent.reset() == expected_index
        after = state_per_agent(agent)
        assert addresses == [{name: tensor.data_ptr() for name, tensor in part.items()} for part in after]
        for i in range(3):
            assert len(after[i]) == 3 * 6 + 1 + 3 * (6 + 6 + 1)
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
    steps = [part["actor_optimizer.0.step"].item() for part in state_per_agent(agent)]
    assert steps == [1, 3, 2]


@pytest.mark.parametrize("name", ["rde_sac_dmc", "rde_sac_safety"])
def test_what_somebody_adds_to_the_networks_is_reset_too(name, monkeypatch):
    """A factor per network, here with a value of its own at the start: in every network of the agent, and in no other one."""
    script = load_script(name)
    build, forward = script.StackedMLP.__init__, script.StackedMLP.forward

    def build_with_a_factor(stack, num_networks, *arguments):
        build(stack, num_networks, *arguments)
        stack.factor = torch.nn.Parameter(torch.full((num_networks, 1, 1), 0.7))

    def multiplied(stack, inputs, networks=None):
        return forward(stack, inputs, networks) * (stack.factor if networks is None else stack.factor[networks])

    monkeypatch.setattr(script.StackedMLP, "__init__", build_with_a_factor)
    monkeypatch.setattr(script.StackedMLP, "forward", multiplied)
    agent = (safety_agent if name == "rde_sac_safety" else sac_agent)(script, 3)
    num_critics = len(agent.critics.factor) // 3
    for _ in range(3):
        agent.update()
    before, start = state_per_agent(agent), torch.tensor(0.7)
    for state in before:
        for network in ("actors", "critics", "target_critics"):
            assert (state[f"{network}.factor"] != start).all(), "it learns"
    before = copy.deepcopy(before)
    assert agent.reset() == 0
    after = state_per_agent(agent)
    for network, count in (("actors", 1), ("critics", num_critics), ("target_critics", num_critics)):
        factor = after[0][f"{network}.factor"]
        assert len(factor) == count and (factor == start).all()
    for i in (1, 2):
        assert all(torch.equal(tensor, before[i][part]) for part, tensor in after[i].items())
    moments = [tensor for part, tensor in after[0].items() if "optimizer" in part]
    assert len(moments) == 3 * (7 + 7 + 1) and not any(tensor.any() for tensor in moments)
    assert {"factor"} <= agent.weights()["actors"].keys() & agent.weights()["critics"].keys()


def test_new_weights_are_those_of_linear_layers(sac):
    """Uniform within 1 / sqrt(inputs), and different in every reset."""
    mlp = sac.StackedMLP(2, [64, 400, 10])
    torch.manual_seed(0)
    mlp.initialise(1)
    first = [parameter.detach().clone() for parameter in mlp.parameters()]
    mlp.initialise(1)
    for parameter, earlier, inputs in zip(mlp.parameters(), first, (64, 400, 64, 400)):
        bound = 1 / math.sqrt(inputs)
        assert not parameter[0].any()
        assert (parameter[1] != earlier[1]).all()
        assert parameter[1].abs().max() <= bound
        if parameter[1].numel() > 1_000:
            assert parameter[1].abs().max() > 0.99 * bound
            assert parameter[1].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


def test_optimizer_is_an_adam_per_agent(sac):
    """Against separate torch.optim.Adam, one of which starts anew in the middle."""
    agent = sac_agent(sac, 2)
    rng = torch.Generator().manual_seed(3)
    parameters = list(agent.critics.parameters())

    def separate_adams(index):
        copies = [parameter.detach()[2 * index : 2 * index + 2].clone() for parameter in parameters]
        return copies, torch.optim.Adam(copies, lr=agent.args.learning_rate)

    adams = [separate_adams(i) for i in range(2)]
    for round_number in range(8):
        if round_number == 5:
            agent.reset()
            adams[0] = separate_adams(0)
        gradients = [torch.randn(parameter.shape, generator=rng) for parameter in parameters]
        agent.step(agent.critic_optimizer, gradients)
        for i, (copies, adam) in enumerate(adams):
            for parameter, gradient in zip(copies, gradients):
                parameter.grad = gradient[2 * i : 2 * i + 2]
            adam.step()
    for i, (copies, _) in enumerate(adams):
        for parameter, expected in zip(parameters, copies):
            torch.testing.assert_close(parameter.detach()[2 * i : 2 * i + 2], expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------ the choice


def test_selection_probabilities(sac):
    q_values = torch.tensor([[1.0, 2.0, -4.0], [-3.0, -1.0, -2.0], [0.0, 0.0, 0.0], [1e-30, 2e-30, 0.0]])
    probabilities = sac.selection_probabilities(q_values, sac.value_scale(q_values), 5.0)
    exponents = 5.0 * np.array([[0.25, 0.5, -1.0], [-1.0, -1 / 3, -2 / 3], [0.0, 0.0, 0.0], [0.5, 1.0, 0.0]])
    expected = np.exp(exponents) / np.exp(exponents).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("num_resets", [0, 1, 2, 3])
def test_the_oldest_agent_judges_with_its_smaller_critic(sac, num_resets):
    agent = sac_agent(sac, 3, beta=3.0)
    with torch.no_grad():
        for parameter in [*agent.actors.parameters(), *agent.critics.parameters()]:
            parameter *= 3  # so that proposals and judgements differ
    for _ in range(num_resets):
        agent.reset()
    observation = torch.randn(OBSERVATION_DIM, generator=torch.Generator().manual_seed(5))
    num_draws = 20_000
    selection, random_actions = torch.Generator().manual_seed(6), torch.Generator()
    choices = agent.act(observation.expand(num_draws, -1), selection, random_actions, deterministic=True)
    assert choices.shape == (num_draws, ACTION_DIM + 1)
    actions, acting_agents = choices[:, :-1], choices[:, -1].long()

    proposals = []
    for i in range(3):
        mean = Float64Networks.mlp(Float64Networks(agent, i, 2).actor, observation.double())[:ACTION_DIM]
        proposals.append(mean.tanh().detach())
        assert (actions[acting_agents == i].double() - proposals[i]).abs().max() < 1e-5
    expected = np.full(3, 1 / 3)
    if num_resets:
        judge = Float64Networks(agent, num_resets % 3, 2)
        judgement = [
            min(judge.mlp(critic, torch.cat([observation.double(), proposal])).item() for critic in judge.critics)
            for proposal in proposals
        ]
        exponents = np.exp(3.0 * np.array(judgement) / np.abs(judgement).max())
        expected = exponents / exponents.sum()
        assert np.ptp(expected) > 0.02  # so that another judge would be noticed
    frequencies = np.bincount(acting_agents.numpy(), minlength=3) / num_draws
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / math.sqrt(num_draws))


def test_samples_of_the_policy(sac):
    """Without `deterministic` the proposals are samples: unsquashed they have the policy's mean and deviation."""
    agent = sac_agent(sac, 1)
    with torch.no_grad():
        agent.actors.biases[-1][0, 0, ACTION_DIM:] = -1.0
    observation = torch.zeros(OBSERVATION_DIM)
    choices = agent.act(observation.expand(20_000, -1), torch.Generator().manual_seed(2), torch.Generator())
    actions, acting_agents = choices.split([ACTION_DIM, 1], 1)
    mean, log_std = agent.policies(observation.unsqueeze(0))
    unsquashed = torch.atanh(actions.double())
    torch.testing.assert_close(unsquashed.mean(0).float(), mean[0, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(unsquashed.std(0).float(), log_std[0, 0].exp(), rtol=0.03, atol=0)
    correlations = torch.corrcoef(unsquashed.T) - torch.eye(ACTION_DIM)
    assert correlations.abs().max() < 0.05 and not acting_agents.any()


def test_layers_are_the_parameters_also_of_a_copy_that_is_moved(sac):
    """The list of layers beside the ParameterLists holds the very same ones, or a network would learn what it does not use."""
    networks = sac.StackedMLP(2, [3, 4, 1])
    for stack in (networks, copy.deepcopy(networks), copy.deepcopy(networks).double(), copy.deepcopy(networks).cpu()):
        assert all(weight is stack.weights[i] and bias is stack.biases[i] for i, (weight, bias) in enumerate(stack.layers))
        assert len(stack.layers) == 2 and len(list(stack.parameters())) == 4
    assert networks.layers[0][0] is not copy.deepcopy(networks).layers[0][0]
