"""Evaluations: what is played, from which starts, with which random numbers, and what is returned."""

import numpy as np
import pytest
import torch

from agents import CPU, dqn_agent
from conftest import load_script

rde = load_script("rde_dqn_atari")


def test_an_evaluation_depends_on_policy_seed_and_step_alone():
    """Assault keeps state from one game to the next: without loading it anew, the second evaluation would differ."""
    args = rde.Args(env_id="AssaultNoFrameskip-v4")
    make_envs = lambda: [rde.make_env(args, max_num_frames_per_episode=2_400) for _ in range(2)]

    def play(envs, seed, global_step):
        generator, calls = torch.Generator().manual_seed(3), iter(range(1_000))

        def policy(observations):
            next(calls)  # the games are cut after 600 steps: an evaluation without an end fails here
            return torch.randint(7, (len(observations),), generator=generator)

        watched.clear()
        return rde.evaluate(policy, envs, seed, global_step, CPU, watched.append)

    envs, watched = make_envs(), []
    first, other_step, other_seed, again = (play(envs, *case) for case in ((1, 500), (1, 1_000), (2, 500), (1, 500)))
    assert first == again == play(make_envs(), 1, 500)
    assert first != other_step and first != other_seed
    assert all(episode.keys() == {"r", "l"} and episode["r"] > 0 for episode in first)


class Countdown:
    """Ends after `length` steps; every third one only loses a life, and the end can come in the reset after one."""

    def __init__(self, length: int, ends_in_reset: bool = False):
        self.length, self.ends_in_reset, self.seeds = length, ends_in_reset, []

    def reset(self, seed: int | None = None):
        if seed is not None:
            self.seeds.append(seed)
            self.steps, self.total = 0, 0.0
        elif self.ends_in_reset and self.steps >= self.length - 1:
            return np.full(2, self.steps, np.float32), {"episode": self.episode()}
        return np.full(2, self.steps, np.float32), {}

    def step(self, action):
        self.steps += 1
        self.total += float(action)
        over = self.steps == self.length
        observation = np.full(2, self.steps, np.float32)
        return observation, 0.0, over or self.steps % 3 == 0, False, {"episode": self.episode()} if over else {}

    def episode(self) -> dict:
        return {"r": self.total, "l": self.steps}


def test_every_environment_plays_one_whole_episode_beside_the_others():
    """Of the lengths 5, 2 and 9, the last with an end in the reset after a lost life. Who has ended is not asked again."""
    envs, batches = [Countdown(5), Countdown(2), Countdown(10, ends_in_reset=True)], []

    def policy(observations):
        batches.append(observations[:, 0].tolist())
        assert len(batches) < 20
        return observations[:, 0] + 1  # so the return is 1 + 2 + ... + length

    watched = []
    episodes = rde.evaluate(policy, envs, 7, 300, CPU, watched.append)
    assert [watched.count(env) for env in envs] == [1 + 5, 1 + 2, 1 + 9]  # every start and every step
    assert episodes == [{"r": 15.0, "l": 5}, {"r": 3.0, "l": 2}, {"r": 45.0, "l": 9}]
    assert batches == [[k] * 3 for k in range(2)] + [[k] * 2 for k in range(2, 5)] + [[k] for k in range(5, 9)]
    assert [env.seeds for env in envs] == [[rde.derive_seed(7, rde.EVALUATION, 300, i)] for i in range(3)]


# ---------------------------------------------------------------------------------------------------- epsilon-greedy play

NUM_ACTIONS = 6


def play(epsilon: float, seed: int = 1):
    """Actions for 30,000 states, in all of which the greedy one is 2, and whether the generator was drawn from."""
    generator = torch.Generator().manual_seed(seed)
    before, global_state = generator.get_state(), torch.get_rng_state()
    actions = rde.epsilon_greedy(torch.full((30_000,), 2), epsilon, NUM_ACTIONS, generator)
    assert torch.equal(torch.get_rng_state(), global_state)
    return actions, not torch.equal(before, generator.get_state())


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0])
def test_a_fraction_epsilon_of_the_actions_is_random(epsilon):
    """Uniformly among all actions, the greedy one too; every state draws for itself, from the generator that was given."""
    actions, is_drawn_from = play(epsilon)
    assert actions.shape == (30_000,) and actions.dtype == torch.int64 and is_drawn_from
    expected = np.full(NUM_ACTIONS, epsilon / NUM_ACTIONS) + (1 - epsilon) * (np.arange(NUM_ACTIONS) == 2)
    counts = np.bincount(actions.numpy(), minlength=NUM_ACTIONS)
    assert ((counts - 30_000 * expected) ** 2 / (30_000 * expected)).sum() < 25.7  # 5 degrees: probability 1e-4
    explored = (actions != 2).float().numpy()  # neighbours do not hang together
    assert abs(np.corrcoef(explored[:-1], explored[1:])[0, 1]) < 0.03
    assert torch.equal(actions, play(epsilon)[0]) and not torch.equal(actions, play(epsilon, seed=2)[0])
    greedy_actions, is_drawn_from = play(0.0)
    assert (greedy_actions == 2).all() and not is_drawn_from


@pytest.mark.parametrize("script, more", [("dqn_atari", {}), ("rde_dqn_atari", {"num_agents": 1})])
def test_eval_epsilon_is_that_of_the_evaluations(script, more):
    """Of all scripts' policies; at 0 they play what the agent acts."""
    observations = torch.zeros(200, 4, 84, 84, dtype=torch.uint8)
    for eval_epsilon, num_actions in ((0.0, 1), (1.0, 5)):
        agent = dqn_agent(load_script(script), stored=0, eval_epsilon=eval_epsilon, **more)
        generator = torch.Generator().manual_seed(1)
        assert len(agent.evaluation_policy(generator)(observations).unique()) == num_actions
        untouched = torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())
        assert untouched == (eval_epsilon == 0 and not more)  # an ensemble draws who acts
