"""The reset ensemble on the base of DrQ and C51, in numbers."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import CPU, FRAMES, NUM_ACTIONS, n_step_agent, reference_features, screens
from conftest import QUICK, equal, load_script, model, only_run, run_main

drq = load_script("rde_drq_atari")


def make_agent(**arguments):
    return n_step_agent(drq, **arguments)


# ---------------------------------------------------------------------------------------------------- references, in float64


def reference_logits(weights: dict, x: torch.Tensor, num_atoms: int) -> torch.Tensor:
    features = reference_features(weights, x)
    value = features @ weights["value.weight"].T + weights["value.bias"]
    advantages = (features @ weights["advantage.weight"].T + weights["advantage.bias"]).view(len(x), -1, num_atoms)
    return torch.stack([value + advantages[:, a] - advantages.mean(1) for a in range(advantages.shape[1])], dim=1)


def reference_projection(target_atoms, probabilities, low: float, high: float, num_atoms: int) -> np.ndarray:
    projection, spacing = np.zeros(num_atoms), (high - low) / (num_atoms - 1)
    for atom, probability in zip(target_atoms, probabilities, strict=True):
        place = (min(max(atom, low), high) - low) / spacing
        below = min(int(np.floor(place)), num_atoms - 1)
        projection[below] += probability * (1 - (place - below))
        projection[min(below + 1, num_atoms - 1)] += probability * (place - below)
    return projection


def reference_augmentation(frames: torch.Tensor, shifts: torch.Tensor, brightness: torch.Tensor) -> torch.Tensor:
    padded = np.pad(frames.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    moved = [stack[:, 8 - down : 92 - down, 8 - right : 92 - right] for stack, (down, right) in zip(padded, shifts.T.tolist())]
    return torch.from_numpy(np.stack(moved)).double() * brightness.double() / 255


def augmented_by(generator: torch.Generator, frames: torch.Tensor) -> torch.Tensor:
    shifts = torch.randint(0, 9, (2, len(frames)), generator=generator)
    noise = torch.randn((len(frames), 1, 1, 1), generator=generator).clamp(-2, 2)
    return reference_augmentation(frames, shifts, 1 + 0.05 * noise)


def reference_horizons(steps: list[int], first_n: int) -> tuple[list[int], list[float]]:
    """Straight lines between the logarithms of n and of 1 - gamma, 10,000 steps long."""
    parts = [min(step / 10_000, 1) for step in steps]
    n = [round(np.exp((1 - part) * np.log(first_n) + part * np.log(3))) for part in parts]
    return n, [1 - np.exp((1 - part) * np.log(0.03) + part * np.log(0.003)) for part in parts]


# -------------------------------------------------------------------------------------------------------------- projection


@settings(max_examples=150, deadline=None)
@given(
    num_atoms=st.integers(2, 60), low=st.floats(-50, 0, width=32), high=st.floats(0.5, 50, width=32),
    places=st.lists(st.integers(-5, 65) | st.floats(-5, 65), min_size=1, max_size=20), seed=st.integers(0, 99),
)  # fmt: skip
def test_projection_is_that_of_loops_over_atoms(num_atoms, low, high, places, seed):
    """Targets on atoms (whole places), between them, and outside of the support; the mass stays."""
    atoms = torch.linspace(low, high, num_atoms)
    spacing = (high - low) / (num_atoms - 1)
    target_atoms = torch.tensor([[low + spacing * place for place in places]] * 2)
    for place_number, place in enumerate(places):
        if place in range(num_atoms):
            target_atoms[:, place_number] = atoms[int(place)]
    probabilities = torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(len(places)), size=2)).float()
    ours = drq.projected(target_atoms, probabilities, atoms)
    expected = [reference_projection(*row, low, high, num_atoms) for row in zip(target_atoms.tolist(), probabilities.tolist())]
    np.testing.assert_allclose(ours.numpy(), expected, atol=3e-5)
    np.testing.assert_allclose(ours.sum(1).numpy(), 1, atol=3e-5)


# ------------------------------------------------------------------------------------------------------------------ update


def reference_losses(agent, online, targets, batch, observations, next_observations):
    """Per agent: the loss, which can be differentiated, and the mean Q-value of the actions that were taken."""
    args, count, rows = agent.args, agent.args.batch_size, torch.arange(agent.args.batch_size)
    atoms = torch.linspace(args.v_min, args.v_max, args.num_atoms, dtype=torch.float64)
    expectation = lambda logits: logits[..., 0] if args.num_atoms == 1 else (logits.softmax(-1) * atoms).sum(-1)
    logits_of = lambda network, x: reference_logits(dict(network.named_parameters()), x, args.num_atoms)
    results = []
    for i in range(args.num_agents):
        own = lambda x: (x[i] if args.anneal else x).double()  # noqa: B023
        next_x = next_observations.view(-1, count, 4, 84, 84)[i if args.anneal else 0]
        with torch.no_grad():
            best, others = (expectation(logits_of(network, next_x)).argmax(1) for network in (online[i], targets[i]))
            assert (best != others).sum() > 2 and len(set(best.tolist())) > 1  # so double selection is seen
            next_logits = logits_of(targets[i], next_x)[rows, best]
        logits = logits_of(online[i], observations)[rows, batch.actions]
        discounts = own(batch.discounts) * (1 - own(batch.terminated))
        if args.num_atoms == 1:
            distance = (logits[:, 0] - own(batch.returns) - discounts * next_logits[:, 0]).abs()
            loss = torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).mean()
        else:
            wanted = [
                reference_projection((ret + discount * atoms).tolist(), row.tolist(), args.v_min, args.v_max, args.num_atoms)
                for ret, discount, row in zip(own(batch.returns), discounts, next_logits.softmax(1))
            ]
            loss = -(torch.from_numpy(np.stack(wanted)) * logits.log_softmax(1)).sum(1).mean()
        results.append((loss, expectation(logits).mean().item()))
    return results


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_agents": 1, "num_atoms": 1, "augmentation": False}, {"num_agents": 1, "num_atoms": 51},
        {"num_agents": 2, "num_atoms": 1}, {"num_agents": 2, "num_atoms": 51, "augmentation": False},
        {"num_agents": 2, "num_atoms": 51, "anneal": True, "n_step": 10},
    ],
)  # fmt: skip
def test_two_updates_against_float64(arguments):
    """Losses, Q-values, clipped gradients, Adam's steps (whose moments come in with the second one), target networks."""
    agent = make_agent(seed=2, gamma=0.9, tau=0.3, learning_rate=1e-3, max_grad_norm=0.02, **arguments)
    args, generator, total = agent.args, agent.buffer.generator, agent.args.num_agents
    for seed, network in enumerate([*agent.q_networks, *agent.target_networks]):  # all of them others, and decided ones
        noise = torch.Generator().manual_seed(seed)
        for layer in (*network.convolutions[:6:2], network.hidden, network.value, network.advantage):
            layer.weight.data = torch.randn(layer.weight.shape, generator=noise) * (2 / layer.weight[0].numel()) ** 0.5
        network.convolutions[0].weight.data.mul_(4)
    agent.steps_since_reset.copy_(torch.tensor([0, 6_000][:total]))
    online, targets = copy.deepcopy(agent.q_networks).double(), copy.deepcopy(agent.target_networks).double()
    adams = [torch.optim.Adam(n.parameters(), lr=1e-3, eps=args.adam_eps, fused=False, foreach=False) for n in online]
    for step in range(2):
        horizons = 3, 0.9
        if args.anneal:
            n, gamma = reference_horizons([step, 6_000 + step], 10)
            assert n[0] != n[1]
            horizons = torch.tensor(n), torch.tensor(gamma, dtype=torch.float64)
        state = generator.get_state()
        batch = agent.buffer.sample(8, *horizons)
        prepare = (lambda x: augmented_by(generator, x)) if args.augmentation else (lambda x: x.double() / 255)
        observations, next_observations = prepare(batch.observations), prepare(batch.next_observations.view(-1, 4, 84, 84))
        after = generator.get_state()
        generator.set_state(state)
        assert agent.update() is None and torch.equal(generator.get_state(), after)
        assert 0 < batch.terminated.mean() < 1
        results = reference_losses(agent, online, targets, batch, observations, next_observations)
        norms = []
        for i, (loss, _) in enumerate(results):
            gradients = torch.autograd.grad(loss, list(online[i].parameters()))
            norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
            assert norm > 2 * args.max_grad_norm
            norms.append(norm)
            for parameter, ours, gradient in zip(online[i].parameters(), agent.q_networks[i].parameters(), gradients):
                parameter.grad = gradient * args.max_grad_norm / norm
                assert (ours.grad - parameter.grad).norm() < 1e-3 * parameter.grad.norm() + 1e-9
            adams[i].step()
            for parameter, target in zip(online[i].parameters(), targets[i].parameters()):
                target.data += 0.3 * (parameter.data - target.data)
        expected = [[loss.item() for loss, _ in results], [q_value for _, q_value in results], norms]
        np.testing.assert_allclose(agent.metrics.numpy(), expected, rtol=2e-4, atol=1e-5)
        for ours, exact in ((agent.q_networks, online), (agent.target_networks, targets)):
            for a, b in zip(ours.parameters(), exact.parameters(), strict=True):
                assert (a - b).abs().max() < 1e-5  # of steps of up to 1e-3
    assert agent.steps_since_reset.tolist() == [2, 6_002][:total]


# ------------------------------------------------------------------------------------------------------------ augmentation


def test_every_shift_is_a_window_of_the_picture_with_repeated_edges():
    shifts = torch.cartesian_prod(torch.arange(9), torch.arange(9)).T  # (2, 81)
    frames = screens(0, 81, 4)
    shifted = drq.random_shift(frames, shifts).double() / 255
    assert torch.equal(shifted, reference_augmentation(frames, shifts, torch.ones(81, 1, 1, 1)))
    assert torch.equal(drq.random_shift(frames, torch.full((2, 81), 4)), frames)


def test_acting_is_not_augmented():
    agents, observations = [make_agent(), make_agent(augmentation=False)], screens(3, 30, 4)
    states_before = [agent.buffer.generator.get_state() for agent in agents]
    ours, theirs = (agent.act(observations, torch.Generator().manual_seed(1)) for agent in agents)
    assert torch.equal(ours, theirs) and len(set(ours[1].tolist())) == 2
    assert [torch.equal(a.buffer.generator.get_state(), s) for a, s in zip(agents, states_before)] == [True, True]


# ----------------------------------------------------------------------------------------------------------------- network


def test_width_is_of_the_convolutions_alone():
    for width, channels in [(1.0, [32, 64, 64]), (0.5, [16, 32, 32]), (2.0, [64, 128, 128]), (0.001, [1, 1, 1])]:
        network = drq.QNetwork(4, 51, width)
        assert [layer.out_channels for layer in network.convolutions if isinstance(layer, nn.Conv2d)] == channels
        assert (network.hidden.in_features, network.hidden.out_features) == (49 * channels[2], 512)


# --------------------------------------------------------------------------------------------------------------- the judge


@pytest.mark.parametrize("value, saturated", [(-0.8, 1), (-0.6, 0), (0.0, 0), (9.7, 0), (9.8, 1)])
def test_saturated_is_what_lies_in_the_outermost_fortieth_at_either_end(value, saturated, monkeypatch):
    """Of a support from -1 to 10: below -0.725, beyond 9.725. It is a fraction of the proposals as the judge sees them."""
    agent, q_values = make_agent(v_min=-1.0, v_max=10.0), torch.full((2, 2, NUM_ACTIONS), -0.5)
    q_values[0, :, 3] = q_values[1, :, 4] = 1.0  # agent 0, which judges, proposes action 3, and agent 1 action 4
    q_values[0, :, 3 if value > 1 else 4] = value
    monkeypatch.setattr(agent, "q_values", lambda logits: q_values)
    for _ in range(2):
        agent.act(screens(0, 2, 4), torch.Generator(), counted=True)
    assert agent.scalars()["rde/saturated_values"] == saturated / 2
    assert agent.scalars()["rde/saturated_values"] == 0
    assert "rde/saturated_values" not in make_agent(num_atoms=1).scalars()


# --------------------------------------------------------------------------------------------------------------- annealing


def test_horizons_after_a_reset_are_those_of_bbf():
    steps = [0, 1_000, 2_500, 5_000, 9_000, 10_000, 10_001, 10**7]
    agent = make_agent(num_agents=len(steps), width=0.01, anneal=True, n_step=10, gamma=0.5)
    agent.steps_since_reset.copy_(torch.tensor(steps))
    n, gamma = agent.horizons()
    expected = reference_horizons(steps, 10)
    assert n.dtype == torch.int64 and n.tolist() == expected[0]
    np.testing.assert_allclose(1 - gamma.numpy(), 1 - np.array(expected[1]), rtol=1e-9)
    assert (n.tolist()[0], n.tolist()[5:]) == (10, [3, 3, 3])
    np.testing.assert_allclose(gamma[[0, 3, 5, 6, 7]], [0.97, 1 - np.sqrt(0.03 * 0.003), 0.997, 0.997, 0.997], rtol=1e-12)


# -------------------------------------------------------------------------------------------------------------- whole runs


def test_one_agent_without_resets_is_a_loop_written_out(tmp_path):
    options = (
        "--total-timesteps 210 --learning-starts 100 --replay-ratio 0.5 --eval-interval 0 --num-agents 1 --reset-interval 0 "
        "--width 0.1 --eval-episodes 1 --exploration-steps 50"
    ).split()
    result = run_main(drq, *QUICK, *options, "--runs-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    weights = model(only_run(tmp_path))
    args = drq.Args(env_id="BreakoutNoFrameskip-v4", num_agents=1, width=0.1, batch_size=4)
    exploration = np.random.default_rng(drq.derive_seed(1, drq.EXPLORATION))
    generator = torch.Generator().manual_seed(drq.derive_seed(1, drq.MINI_BATCHES))
    buffer, env = drq.ReplayBuffer(300, 1, generator, 10), drq.make_env(args)
    agent = drq.Agent(args, FRAMES, env.action_space, buffer, CPU)
    observation, _ = env.reset(seed=drq.derive_seed(1, drq.ENVIRONMENT, 0))
    buffer.start_episode(0, observation[-1])
    num_greedy = 0
    for step in range(210):
        explores = exploration.random() < 1 - 0.99 * min(1, max(0, step - 100) / 50)
        action = int(exploration.integers(agent.num_actions))
        if not explores:
            num_greedy += 1
            with torch.no_grad():
                logits = agent.q_networks[0](drq.network_input(torch.from_numpy(observation[None])))
            action = int((logits.softmax(2) * torch.linspace(-10, 10, 51)).sum(2).argmax())
        if step >= 100 and step % 2:
            agent.update()
        observation, reward, terminated, truncated, _ = env.step(action)
        buffer.add(0, action, reward, observation[-1], terminated)
        if terminated or truncated:
            observation, _ = env.reset()
            buffer.start_episode(0, observation[-1])
    assert num_greedy > 50 and equal(weights, agent.weights()) and weights["num_resets"] == 0


# ------------------------------------------------------------------------------------------------------------ arguments


REFUSED = [
    ("--v-min 0 --v-max 0", "--num-atoms 51 need a --v-min below --v-max"), ("--reset-interval 1", "use at least 2, or 0 for never"),
    ("--n-step 101 --learning-starts 100", "--n-step 101 in 1 environment(s) leaves nothing to draw of the 100"),
    ("--n-step 41 --buffer-size 40", "leaves nothing to draw of the 40"), ("--anneal --n-step 2", "--n-step 2 is below 3"),
    ("--n-step 51 --num-envs 2 --learning-starts 100", "--n-step 51 in 2 environment(s)"),
]  # fmt: skip
ACCEPTED = [
    "", "--num-atoms 1 --v-min 0 --v-max 0", "--v-min 0 --v-max 1", "--v-min -1 --v-max 0", "--n-step 100 --learning-starts 100",
    "--n-step 50 --num-envs 2 --learning-starts 100", "--reset-interval 2", "--n-step 40 --buffer-size 40", "--anneal --n-step 3",
]  # fmt: skip


@pytest.mark.parametrize("arguments, message", [*REFUSED, *((arguments, None) for arguments in ACCEPTED)])
def test_refused_arguments_have_a_line_and_what_is_just_right_is_accepted(arguments, message, capsys):
    args = tyro.cli(drq.Args, args=arguments.split())
    if message is None:
        drq.check_args(args)
    else:
        with pytest.raises(SystemExit) as end:
            drq.check_args(args)
        printed = capsys.readouterr().err
        assert end.value.code == 2 and printed.startswith("error: ") and message in printed and printed.count("\n") == 1
