"""The agents of RDE+SAC and of safe RDE, also with --critic-norm layer, against references that share no code with them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from agents import ACTION_DIM, OBSERVATION_DIM, make_observations, next_batch, reset_in_turn, sac_agent, updated
from conftest import equal, load_script

BATCH_SIZE = 32
NUM_CRITICS = {"rde_sac_dmc": 2, "rde_sac_safety": 3}  # of an agent: safe RDE has one of cost


@pytest.fixture(params=NUM_CRITICS)
def script(request):
    return load_script(request.param)


def state_per_agent(agent) -> list[dict[str, torch.Tensor]]:
    """Every tensor of SAC agents' state, split into what belongs to each agent: [{name: tensor}, ...]."""
    state = [{} for _ in range(agent.args.num_agents)]
    modules = {"actors": agent.actors, "critics": agent.critics, "target_critics": agent.target_critics}
    stacked = {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}
    stacked["log_alphas"] = agent.log_alphas.detach()
    for name, tensor in stacked.items():
        for i, part in enumerate(tensor.chunk(agent.args.num_agents)):
            state[i][name] = part
    for name in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
        optimizer = getattr(agent, name)
        for i, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                for key, tensor in optimizer.state[parameter].items():
                    state[i][f"{name}.{number}.{key}"] = tensor
    return state


# ------------------------------------------------------------------------------------------------- the squashed Gaussian


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


class Float64Networks:
    """One SAC agent's networks in float64, a copy, computed with plain functions of PyTorch."""

    def __init__(self, agent, index: int, num_critics: int):
        self.actor = self.copy_layers(agent.actors, index)
        numbers = range(num_critics * index, num_critics * (index + 1))
        self.critics = [self.copy_layers(agent.critics, number) for number in numbers]
        self.targets = [self.copy_layers(agent.target_critics, number) for number in numbers]
        self.log_alpha = agent.log_alphas.detach()[index].double().requires_grad_()

    @staticmethod
    def copy_layers(stacked, network: int) -> list[list[torch.Tensor]]:
        """Of every layer weight and bias, and gain and shift of the norm behind it if there is one."""
        norms = [*stacked.norms, *[()] * (len(stacked.layers) - len(stacked.norms))]
        layers = [(*layer, *norm) for layer, norm in zip(stacked.layers, norms, strict=True)]
        parameters = [[parameter.detach()[network].double() for parameter in layer] for layer in layers]
        return [[weight.T.clone().requires_grad_(), *(vector[0].clone().requires_grad_() for vector in vectors)]
                for weight, *vectors in parameters]  # fmt: skip

    @staticmethod
    def mlp(layers, inputs: torch.Tensor) -> torch.Tensor:
        for weight, bias, *norm in layers[:-1]:
            inputs = F.linear(inputs, weight, bias)
            inputs = torch.clamp(F.layer_norm(inputs, inputs.shape[-1:], *norm) if norm else inputs, min=0)
        return F.linear(inputs, *layers[-1])

    def policy(self, observations: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (batch, action_dim) and their log-probabilities (batch,)."""
        output = self.mlp(self.actor, observations)
        mean, log_std = output[:, :ACTION_DIM], output[:, ACTION_DIM:].clamp(-20, 2)
        distribution = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
        actions = distribution.transforms[0](mean + log_std.exp() * noise)
        return actions, distribution.log_prob(actions).sum(dim=1)

    def values(self, critics, observations: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """What each of the critics says, (batch,)."""
        values = [self.mlp(critic, torch.cat([observations, actions], dim=1))[:, 0] for critic in critics]
        assert {value.shape for value in values} == {(len(observations),)}
        return values


def move_norms(agent) -> None:
    """To gains and shifts that are not those that it began with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (*agent.critics.gains, *agent.critics.shifts):
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "name, num_agents, multiplier, critic_norm",
    [("rde_sac_dmc", 1, 0.0, "none"), ("rde_sac_dmc", 3, 0.0, "none"), ("rde_sac_dmc", 2, 0.0, "layer"),
     ("rde_sac_safety", 1, 0.0, "none"), ("rde_sac_safety", 1, 0.7, "none"), ("rde_sac_safety", 3, 2.5, "none"),
     ("rde_sac_safety", 3, 1e6, "none"), ("rde_sac_safety", 2, 2.5, "layer")],
)  # fmt: skip
def test_gradient_step_against_float64(name, num_agents, multiplier, critic_norm):
    """All targets, losses and gradients. With a multiplier without end the actor's loss becomes the cost."""
    script, num_critics = load_script(name), NUM_CRITICS[name]
    safe = num_critics == 3
    agent = sac_agent(script, num_agents, gamma=0.97, critic_norm=critic_norm, **{"gamma_cost": 0.9} if safe else {})
    move_norms(agent)
    if safe:
        agent.multiplier.value.fill_(multiplier)
    for _ in range(3):  # so that targets differ from critics and alpha from 1
        agent.update()
    with torch.no_grad():
        agent.log_alphas += 0.3 * torch.arange(num_agents) - 0.5
        for target in agent.target_critics.parameters():
            target += 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(4))

    # What update() will draw: the mini-batch, the noise of the policy, the noise of the policy in the next state.
    batch, generator = next_batch(agent), torch.Generator()
    generator.set_state(agent.buffer.generator.get_state())
    torch.rand(BATCH_SIZE, dtype=torch.float64, generator=generator)
    noise, next_noise = torch.empty(2, num_agents, BATCH_SIZE, ACTION_DIM).double()
    for draws in (noise, next_noise):
        draws.copy_(torch.empty(num_agents, BATCH_SIZE, ACTION_DIM).normal_(generator=generator))
    assert [tensor.shape[1:] for tensor in batch] == [
        (OBSERVATION_DIM,), (ACTION_DIM,), *[()] * num_critics, (OBSERVATION_DIM,)
    ]  # fmt: skip
    observations, actions, rewards, *costs, terminated, next_observations = (tensor.double() for tensor in batch)
    assert 0 < terminated.sum() < BATCH_SIZE and (not safe or set(costs[0].tolist()) == {0, 1})

    references = [Float64Networks(agent, i, num_critics) for i in range(num_agents)]
    computed = updated(agent)
    assert computed.shape == (len(agent.METRICS), num_agents) and not computed.requires_grad
    metrics = dict(zip(agent.METRICS, computed.double()))
    assert not safe or agent.multiplier.value == multiplier, "no gradient step moves it"
    assert torch.equal(generator.get_state(), agent.buffer.generator.get_state())
    close = lambda ours, theirs: torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-4, atol=3e-6)

    for i, reference in enumerate(references):
        alpha = reference.log_alpha.detach().exp()
        policy_actions, log_probs = reference.policy(observations, noise[i])
        (-(reference.log_alpha * (log_probs.detach() - ACTION_DIM)).mean()).backward()
        with torch.no_grad():
            next_actions, next_log_probs = reference.policy(next_observations, next_noise[i])
            *pair, last = reference.values(reference.targets, next_observations, next_actions)
            next_q_values = torch.min(*(pair if safe else (*pair, last))) - alpha * next_log_probs
            targets = [torch.where(terminated == 1, rewards, rewards + 0.97 * next_q_values)] * 2
            targets += [torch.where(terminated == 1, costs[0], costs[0] + 0.9 * last)] if safe else []
        values = reference.values(reference.critics, observations, actions)
        losses = [((value - target) ** 2).mean() / 2 for value, target in zip(values, targets, strict=True)]
        sum(losses).backward()
        # The actor's loss is taken with the critics after their step.
        updated_critics = [Float64Networks.copy_layers(agent.critics, num_critics * i + k) for k in range(num_critics)]
        first, second, *cost = reference.values(updated_critics, observations, policy_actions)
        actor_loss = (alpha * log_probs - torch.min(first, second)).mean()
        if safe:
            actor_loss = (actor_loss + multiplier * cost[0].mean()) / (1 + multiplier)
        actor_loss.backward()

        expected = {"critic_loss": losses[0] + losses[1], "q_values": (values[0] + values[1]).mean() / 2, "alpha": alpha,
                    "actor_loss": actor_loss}  # fmt: skip
        if safe:
            expected |= {"cost_critic_loss": losses[2], "cost_values": values[2].mean()}
        assert metrics.keys() == expected.keys()
        for metric, value in expected.items():
            torch.testing.assert_close(metrics[metric][i], value.detach(), rtol=1e-5, atol=1e-5)
        if multiplier == 1e6:
            close(metrics["actor_loss"][i], cost[0].mean())
        assert actor_loss.abs() < 10

        close(agent.alpha_optimizer.param_groups[i]["params"][0].grad[0], reference.log_alpha.grad)
        for k, layers in enumerate([*reference.critics, reference.actor]):
            optimizer, network = (agent.critic_optimizer, k) if k < num_critics else (agent.actor_optimizer, 0)
            slices = optimizer.param_groups[i]["params"]
            depth, normed = len(layers), critic_norm == "layer" and k < num_critics
            assert depth == 3 and len(slices) == 2 * depth + 2 * (depth - 1) * normed
            for layer, (weight, bias, *norm) in enumerate(layers):
                close(slices[layer].grad[network].T, weight.grad)
                close(slices[depth + layer].grad[network, 0], bias.grad)
                assert len(norm) == 2 * (normed and layer < depth - 1)
                for number, parameter in enumerate(norm):  # gains stand behind all biases, and then shifts
                    close(slices[2 * depth + number * (depth - 1) + layer].grad[network, 0], parameter.grad)
        for k in range(num_critics):
            moved = Float64Networks.copy_layers(agent.target_critics, num_critics * i + k)
            for before, critic, after in zip(reference.targets[k], updated_critics[k], moved):
                for old, new, target in zip(before, critic, after):
                    torch.testing.assert_close(target, 0.995 * old + 0.005 * new, rtol=1e-6, atol=1e-7)


def test_log_std_is_clamped(sac):
    agent = sac_agent(sac, 2)
    with torch.no_grad():
        agent.actors.biases[-1][0, 0, ACTION_DIM:] = 100.0
        agent.actors.biases[-1][1, 0, ACTION_DIM:] = -100.0
    mean, log_std = agent.policies(torch.zeros(4, OBSERVATION_DIM))
    assert mean.shape == log_std.shape == (2, 4, ACTION_DIM)
    assert (log_std[0] == 2).all() and (log_std[1] == -20).all()


# ------------------------------------------------------------------------------------------------------------- the reset


@pytest.mark.parametrize("critic_norm", ["none", "layer"])
def test_reset_renews_one_agent_and_nothing_of_the_others(script, critic_norm):
    """In safe RDE the multiplier and the counts of the whole training are nobody's."""
    agent, shared, num_norms = sac_agent(script, 3, critic_norm=critic_norm), dict, 4 * (critic_norm == "layer")
    move_norms(agent)
    if script.__name__ == "rde_sac_safety":
        agent.end_episodes([100.0])
        agent.total_cost = 321.0
        shared = lambda: (
            copy.deepcopy(vars(agent.multiplier))
            | {"counts": (agent.total_cost, agent.num_violations, agent.multiplier.value.data_ptr())}
        )
        assert shared()["value"] > 0 and shared()["integral"] == 75 and agent.num_violations == 1
    for _ in range(4):
        agent.update()
    kept = shared()
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
            assert len(after[i]) == 3 * 6 + 1 + 3 * (6 + 6 + 1) + 5 * num_norms  # critics, targets, three of their moments
            assert len(after[i]["critics.weights.0"]) == NUM_CRITICS[script.__name__]
            for name, tensor in after[i].items():
                if i != expected_index:
                    assert torch.equal(tensor, before[i][name]), (i, name)
                elif "optimizer" in name or name == "log_alphas":
                    assert before[i][name].any() and not tensor.any(), name
                elif "gains" in name or "shifts" in name:  # some are still as new
                    assert (tensor != before[i][name]).any(), name
                else:
                    assert (tensor != before[i][name]).all(), name
        for name, tensor in after[expected_index].items():
            if name.startswith("target_critics"):
                assert torch.equal(tensor, after[expected_index][name.removeprefix("target_")])
            if name.startswith(("critics.gains", "critics.shifts")):
                assert (tensor == float("gains" in name)).all()
    agent.update()
    for optimizer in ("actor", "critic"):
        assert [part[f"{optimizer}_optimizer.0.step"].item() for part in state_per_agent(agent)] == [1, 3, 2]


def test_what_somebody_adds_to_the_networks_is_reset_too(script, monkeypatch):
    """A factor per network, here with a value of its own at the start: in every network of the agent, and in no other one."""
    build, forward = script.StackedMLP.__init__, script.StackedMLP.forward

    def build_with_a_factor(stack, num_networks, *arguments):
        build(stack, num_networks, *arguments)
        stack.factor = torch.nn.Parameter(torch.full((num_networks, 1, 1), 0.7))

    def multiplied(stack, inputs, networks=None):
        return forward(stack, inputs, networks) * (stack.factor if networks is None else stack.factor[networks])

    monkeypatch.setattr(script.StackedMLP, "__init__", build_with_a_factor)
    monkeypatch.setattr(script.StackedMLP, "forward", multiplied)
    agent, num_critics = sac_agent(script, 3), NUM_CRITICS[script.__name__]
    for _ in range(3):
        agent.update()
    before, start = copy.deepcopy(state_per_agent(agent)), torch.tensor(0.7)
    for state in before:
        for network in ("actors", "critics", "target_critics"):
            assert (state[f"{network}.factor"] != start).all(), "it learns"
    assert agent.reset() == 0
    after = state_per_agent(agent)
    for network, count in (("actors", 1), ("critics", num_critics), ("target_critics", num_critics)):
        factor = after[0][f"{network}.factor"]
        assert len(factor) == count and (factor == start).all()
    assert equal(after[1:], before[1:])
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
    agent, rng = sac_agent(sac, 2), torch.Generator().manual_seed(3)
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


@pytest.mark.parametrize("critic_norm", ["none", "layer"])
def test_proposals_and_judgement_against_float64(script, critic_norm):
    """Samples of the actors' policies, or their modes, and what the judge thinks of them by its own critics."""
    agent = sac_agent(script, 3, critic_norm=critic_norm)
    move_norms(agent)
    for _ in range(20):
        agent.update()
    observations = make_observations(script.__name__, 50)
    references = [Float64Networks(agent, i, NUM_CRITICS[script.__name__]) for i in range(3)]
    noise = torch.empty(3, 50, ACTION_DIM).normal_(generator=torch.Generator().manual_seed(2)).double()
    for factor in (1, 0):
        with torch.no_grad():
            proposals = [one.policy(observations.double(), factor * noise[i])[0] for i, one in enumerate(references)]
        proposals = torch.stack(proposals, dim=1)
        generators = torch.Generator().manual_seed(2), torch.Generator()
        choice = agent.act(observations, *generators, deterministic=factor == 0)
        acting_agents = choice[:, -1].long()
        assert choice.shape == (50, ACTION_DIM + 1) and len(acting_agents.unique()) == 3
        torch.testing.assert_close(choice[:, :-1].double(), proposals[torch.arange(50), acting_agents], rtol=0, atol=1e-5)
    for num_resets in range(4):
        reset_in_turn(agent, num_resets)
        judge = references[num_resets % 3]
        judged = agent.judge(observations, proposals.float())
        judged = judged if isinstance(judged, tuple) else (judged,)
        for i in range(3):
            first, second, *cost = judge.values(judge.critics, observations.double(), proposals[:, i])
            for ours, expected in zip(judged, (torch.min(first, second), *cost), strict=True):
                torch.testing.assert_close(ours[:, i].double(), expected, rtol=1e-4, atol=1e-5)


def test_layers_are_the_parameters_also_of_a_copy_that_is_moved(sac):
    """The list of layers beside the ParameterLists holds the very same ones, or a network would learn what it does not use."""
    networks = sac.StackedMLP(2, [3, 4, 1])
    for stack in (networks, copy.deepcopy(networks), copy.deepcopy(networks).double(), copy.deepcopy(networks).cpu()):
        assert all(weight is stack.weights[i] and bias is stack.biases[i] for i, (weight, bias) in enumerate(stack.layers))
        assert len(stack.layers) == 2 and len(list(stack.parameters())) == 4
    assert networks.layers[0][0] is not copy.deepcopy(networks).layers[0][0]
