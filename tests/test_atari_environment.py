"""The wrappers against stable-baselines3's make_atari_env + VecFrameStack, byte for byte."""

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage


def make_env(rde, env_id: str, **kwargs):
    return rde.make_env(rde.Args(env_id=env_id), **kwargs)


def play_ours(rde, env_id, seed, actions, **kwargs):
    """One row per step: observation to act on next, reward, end, truncation, (return, length) of a finished game."""
    env = make_env(rde, env_id, **kwargs)
    observation, _ = env.reset(seed=seed)
    yield observation, None, None, None, None
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(int(action))
        if terminated or truncated:
            observation, reset_info = env.reset()
            info = info | reset_info
        game = (info["episode"]["r"], info["episode"]["l"]) if "episode" in info else None
        yield observation, reward, terminated or truncated, truncated and not terminated, game


def play_stable_baselines3(env_id, seed, actions, **kwargs):
    """The same rows. Games are read off the Monitor, because one that ends inside a reset is in nobody's info."""
    vec_env = make_atari_env(env_id, n_envs=1, seed=seed, env_kwargs=kwargs)
    monitor = vec_env.envs[0]
    while type(monitor).__name__ != "Monitor":
        monitor = monitor.env
    envs = VecTransposeImage(VecFrameStack(vec_env, n_stack=4))
    observations = envs.reset()
    yield observations[0], None, None, None, None
    for action in actions:
        games_before = len(monitor.get_episode_rewards())
        observations, rewards, dones, infos = envs.step([int(action)])
        game = None
        if len(monitor.get_episode_rewards()) > games_before:
            game = (monitor.get_episode_rewards()[-1], monitor.get_episode_lengths()[-1])
        yield observations[0], rewards[0], bool(dones[0]), infos[0]["TimeLimit.truncated"], game


# Breakout waits for FIRE; Freeway has no lives; BankHeist plays its last life at 0 lives; the last two are cut.
@pytest.mark.parametrize(
    "env_id, num_steps, kwargs",
    [
        ("AlienNoFrameskip-v4", 1_500, {}),
        ("BreakoutNoFrameskip-v4", 1_500, {}),
        ("QbertNoFrameskip-v4", 1_500, {}),
        ("BankHeistNoFrameskip-v4", 1_500, {}),
        ("FreewayNoFrameskip-v4", 2_200, {}),
        ("MsPacmanNoFrameskip-v4", 1_500, {}),
        ("PongNoFrameskip-v4", 1_500, {"max_num_frames_per_episode": 2_001}),
        ("SeaquestNoFrameskip-v4", 1_500, {"max_num_frames_per_episode": 1_000}),
    ],
)
def test_equal_to_stable_baselines3(rde, env_id, num_steps, kwargs):
    num_actions = gym.make(env_id).action_space.n
    actions = np.random.default_rng(3).integers(num_actions, size=num_steps)
    ends, truncations, games = 0, 0, 0
    ours, theirs = play_ours(rde, env_id, 7, actions, **kwargs), play_stable_baselines3(env_id, 7, actions, **kwargs)
    for step, (our_row, their_row) in enumerate(zip(ours, theirs, strict=True)):
        assert our_row[0].dtype == their_row[0].dtype == np.uint8
        np.testing.assert_array_equal(our_row[0], their_row[0], err_msg=f"observation at step {step}")
        assert our_row[1:4] == their_row[1:4], f"reward, end, truncation at step {step}"
        assert our_row[4] == their_row[4], f"return and length of the finished game at step {step}"
        ends, truncations, games = ends + bool(our_row[2]), truncations + bool(our_row[3]), games + (our_row[4] is not None)
    assert (truncations > 0) == bool(kwargs)
    assert games > 0 and (ends > games or env_id.startswith(("Freeway", "Pong")))


@pytest.mark.parametrize("frame_cap", [400, 401, 402, 403])
def test_truncated_game_ends_in_its_own_last_two_frames(rde, frame_cap):
    """Wherever the cap falls within the four frames of a step, against a plain emulator that plays the same frames."""
    env = make_env(rde, "AlienNoFrameskip-v4", max_num_frames_per_episode=frame_cap)
    env.reset(seed=5)
    plain = gym.make("AlienNoFrameskip-v4", max_num_frames_per_episode=frame_cap)
    plain.reset(seed=5)
    for _ in range(env.unwrapped.ale.getEpisodeFrameNumber()):
        screen = plain.step(0)[0]
    rng, truncated = np.random.default_rng(0), False
    while not truncated:
        action = int(rng.integers(18))
        observation, _, terminated, truncated, _ = env.step(action)
        assert not terminated
        while plain.unwrapped.ale.getEpisodeFrameNumber() < env.unwrapped.ale.getEpisodeFrameNumber():
            previous_screen, screen = screen, plain.step(action)[0]
    assert env.unwrapped.ale.getEpisodeFrameNumber() == frame_cap
    np.testing.assert_array_equal(observation[-1], env.gray(np.maximum(screen, previous_screen)))


def test_frames_that_are_thrown_away_are_not_read(rde):
    """Two screens per step of four frames, and no observation of the inner environment at all."""
    env = make_env(rde, "AlienNoFrameskip-v4")
    env.reset(seed=1)
    reads = []

    class CountingEmulator:
        def __init__(self, ale):
            self.ale = ale

        def __getattr__(self, name):
            if name.startswith("getScreen"):
                reads.append(name)
            return getattr(self.ale, name)

    env.unwrapped._get_obs = lambda: pytest.fail("the inner environment made an observation")
    layer = env
    while layer is not env.unwrapped:
        if "ale" in vars(layer):
            layer.ale = CountingEmulator(layer.ale)
        layer = layer.env
    for _ in range(50):
        env.step(0)
    assert reads == ["getScreenRGB"] * 100


def test_what_is_shown_is_a_copy(rde):
    """An observation that was handed out stays as it was."""
    env = make_env(rde, "BreakoutNoFrameskip-v4")
    shown = [env.reset(seed=1)[0], *(env.step(1)[0] for _ in range(3))]
    kept = [observation.copy() for observation in shown]
    env.step(2), env.reset()
    np.testing.assert_array_equal(shown, kept)


def test_a_seed_begins_a_new_game_wherever_the_old_one_is(rde):
    """Evaluations are seeded, and the game before may not be over: its last reset may have begun it."""
    played, fresh = (make_env(rde, "BreakoutNoFrameskip-v4") for _ in range(2))
    played.reset(seed=1)
    for _ in range(5):
        assert not any(played.step(1)[2:4])
    assert np.array_equal(played.reset(seed=2)[0], fresh.reset(seed=2)[0])
    assert played.ale.getEpisodeFrameNumber() == fresh.ale.getEpisodeFrameNumber()
    for action in [1, 2, 2, 3, 0] * 10:
        (ours, *others, _), (theirs, *expected, _) = played.step(action), fresh.step(action)
        assert np.array_equal(ours, theirs) and others == expected


def test_human_normalized_scores(rde):
    normalized = lambda game, score: rde.normalized_scores(f"{game}NoFrameskip-v4", score)
    assert normalized("Alien", 227.8) == {"human_normalized_score": 0}
    assert normalized("Alien", 7127.7) == {"human_normalized_score": 1}
    assert normalized("Pong", 14.6 + 35.3) == {"human_normalized_score": pytest.approx(2)}
    assert normalized("Tetris", 10) == {}
    assert len(rde.RANDOM_AND_HUMAN_SCORES) == 26
    assert all(gym.spec(f"{game}NoFrameskip-v4") for game in rde.RANDOM_AND_HUMAN_SCORES)
