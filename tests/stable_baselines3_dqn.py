"""stable-baselines3's DQN in the place of dqn_atari.py, to compare the two.

    python tests/stable_baselines3_dqn.py --env-id MsPacmanNoFrameskip-v4 --seed 1 --num-envs 4 --replay-ratio 0.25

The arguments are those of dqn_atari.py that have an effect, and its evaluations are played at the same steps, from the same starts; everything
else is stable-baselines3's: wrappers, replay buffer, network, exploration, loop. What comes out is a run folder's
evaluations.csv and episodes.csv.
"""

import dataclasses
import pathlib
import sys
import time

import torch
import tyro
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.vec_env import VecFrameStack

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import dqn_atari as dqn

WITHOUT_EFFECT = ("cuda", "cuda_graphs", "torch_deterministic", "bf16", "track", "wandb_project_name", "wandb_entity", "capture_video",
                  "checkpoint_interval", "resume", "exp_name")  # fmt: skip


class Logs(BaseCallback):
    def __init__(self, args: dqn.Args, run: dqn.RunFolder, stop: dqn.StopSignal):
        super().__init__()
        self.args, self.run, self.stop, self.start_time = args, run, stop, time.time()
        self.envs = [dqn.make_env(args.env_id) for _ in range(args.eval_episodes)]

    def _on_step(self) -> bool:
        step = self.num_timesteps
        for info in self.locals["infos"]:
            if "episode" in info:
                self.run.log_episode(step, info["episode"], time.time() - self.start_time)
        if step < self.args.total_timesteps and dqn.interval_has_passed(self.args.eval_interval, step, self.args.num_envs):
            self.evaluate("scheduled")
        return not self.stop.received

    def evaluate(self, phase: str) -> None:
        policy = lambda observations: torch.from_numpy(self.model.predict(observations.numpy(), deterministic=True)[0])
        scores = dqn.evaluate(policy, self.envs, self.args.seed, self.num_timesteps, torch.device("cpu"), self.stop)
        if scores is not None:
            self.run.log_evaluation(self.num_timesteps, phase, scores)


def main() -> None:
    args = tyro.cli(dqn.Args, description=__doc__)
    for name in WITHOUT_EFFECT:
        if getattr(args, name) != getattr(dqn.Args(), name):
            dqn.fail(f"--{name.replace('_', '-')} has no effect on stable-baselines3's DQN; leave it out")
    args = dataclasses.replace(args, exp_name="stable_baselines3_dqn", cuda=False)
    if args.replay_ratio * args.num_envs != 1:
        dqn.fail("stable-baselines3's DQN moves its target once in a loop step; --replay-ratio must be 1 / --num-envs here")
    dqn.check_args(args)
    run = dqn.RunFolder(args, torch.device("cpu"))
    run.open({})
    envs = VecFrameStack(make_atari_env(args.env_id, n_envs=args.num_envs, seed=args.seed), n_stack=4)
    model = DQN(
        "CnnPolicy", envs, learning_rate=args.learning_rate, buffer_size=args.buffer_size, batch_size=args.batch_size,
        learning_starts=args.learning_starts, tau=args.tau, gamma=args.gamma, train_freq=1, gradient_steps=1,
        target_update_interval=1, exploration_fraction=args.exploration_fraction, exploration_initial_eps=args.start_e,
        exploration_final_eps=args.end_e, max_grad_norm=args.max_grad_norm, seed=args.seed, device="cpu",
    )  # fmt: skip
    logs = Logs(args, run, dqn.StopSignal())
    model.learn(args.total_timesteps, callback=logs)
    logs.evaluate("final")
    if logs.stop.received:
        print(f"stopped at step {model.num_timesteps}, without a final evaluation; it cannot be continued", file=sys.stderr)
        sys.exit(128 + logs.stop.received)
    print(f"the evaluations are in {run.path}")


if __name__ == "__main__":
    main()
