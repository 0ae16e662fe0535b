"""stable-baselines3's DQN in the place of dqn_atari.py, to compare the two.

    python baselines/stable_baselines3_dqn.py --env-id MsPacmanNoFrameskip-v4 --seed 1 --num-envs 4 --replay-ratio 0.25

The arguments are those of dqn_atari.py that have an effect, and its evaluations are played at the same steps, from the same
starts; everything else is stable-baselines3's: wrappers, replay buffer, network, exploration, loop. It trains on the CPU. What
comes out is a run folder as dqn_atari.py's, without checkpoints: a run that was stopped cannot be continued.
"""

import dataclasses
import os
import pathlib
import sys
import types

import torch
import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import dqn_atari as dqn

WITHOUT_EFFECT = ("exp_name", "checkpoint_interval", "keep_models", "cuda", "torch_deterministic", "cuda_graphs", "bf16")


class Run(dqn.Run):
    """A run folder without checkpoints."""

    def stop_if_asked(self) -> None:
        if self.stopped_by:
            self.progress.close()
            print(f"stopped at step {self.global_step}, without a final evaluation; it cannot be continued", file=sys.stderr)
            sys.exit(128 + self.stopped_by)


class Logs(BaseCallback):
    """Writes what happens at a step into the run's folder, and evaluates when it is due."""

    def __init__(self, run: Run):
        super().__init__()
        self.run = run

    def _on_step(self) -> bool:
        run, args = self.run, self.run.args
        run.global_step = self.num_timesteps
        run.progress.update(args.num_envs)
        for info in self.locals["infos"]:
            if "episode" in info:
                run.log_episode(info["episode"])
        if run.global_step < args.total_timesteps:
            if dqn.interval_has_passed(args.eval_interval, run.global_step, args.num_envs):
                self.evaluate("scheduled")
        run.goes_on()  # looks at the clock, and whether to stop
        return True

    def evaluate(self, phase: str) -> None:
        self.run.agenda = [phase]
        self.run.evaluate(self)

    def evaluation_policy(self, generator: torch.Generator):
        """What `Run.evaluate` asks an agent for."""
        epsilon, num_actions = self.run.args.eval_epsilon, int(self.model.action_space.n)
        greedy = lambda observations: torch.from_numpy(self.model.predict(observations.numpy(), deterministic=True)[0])
        return lambda observations: dqn.epsilon_greedy(greedy(observations), epsilon, num_actions, generator)


def train(args: dqn.Args) -> None:
    # The folder is of this script: no other one is to go on with it or to load its weights.
    dqn.SCRIPT, dqn.SCRIPT_TEXT = os.path.basename(__file__), pathlib.Path(__file__).read_bytes()
    dqn.evaluation_scalars = lambda agent: {}  # plasticity is that of our network
    run = Run(args)
    run.restore({"agent": types.SimpleNamespace(METRICS=(), metrics=torch.zeros(0)), "envs": []})
    envs = VecFrameStack(make_atari_env(args.env_id, n_envs=args.num_envs, seed=args.seed), n_stack=4)
    model = DQN(
        "CnnPolicy", envs, learning_rate=args.learning_rate, buffer_size=args.buffer_size, batch_size=args.batch_size,
        learning_starts=args.learning_starts, tau=args.tau, gamma=args.gamma, train_freq=1, gradient_steps=1,
        target_update_interval=1, exploration_fraction=args.exploration_fraction, exploration_initial_eps=args.start_e,
        exploration_final_eps=args.end_e, max_grad_norm=args.max_grad_norm, seed=args.seed, device="cpu",
    )  # fmt: skip
    logs = Logs(run)
    model.learn(args.total_timesteps, callback=logs)
    logs.evaluate("final")
    run.finish(model.policy.state_dict())


def main() -> None:
    dqn.show_ranges()
    args = tyro.cli(dqn.Args, description=__doc__)
    for name in WITHOUT_EFFECT:
        if getattr(args, name) != getattr(dqn.Args(), name):
            dqn.fail(f"--{name.replace('_', '-')} has no effect on stable-baselines3's DQN; leave it out")
    args = dataclasses.replace(args, exp_name="stable_baselines3_dqn", cuda=False)
    if args.replay_ratio * args.num_envs != 1:
        dqn.fail("stable-baselines3's DQN moves its target once in a loop step; --replay-ratio must be 1 / --num-envs here")
    dqn.check_args(args)
    train(args)


if __name__ == "__main__":
    main()
