"""stable-baselines3's SAC in the place of rde_sac_dmc.py with --num-agents 1 --reset-interval 0, to compare the two.

    python tests/stable_baselines3_sac.py --env-id cheetah-run --seed 1 --replay-ratio 4 --total-timesteps 50000

The arguments are those of rde_sac_dmc.py that have an effect; the environment and the evaluations are its own, too, at the same steps, from the
same starts. What comes out is a run folder's evaluations.csv.
"""

import dataclasses
import pathlib
import sys

import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import rde_sac_dmc as sac

DEFAULTS = sac.Args(num_agents=1, reset_interval=0)
WITHOUT_EFFECT = ("cuda", "cuda_graphs", "torch_deterministic", "bf16", "track", "wandb_project_name", "wandb_entity", "capture_video",
                  "checkpoint_interval", "resume", "exp_name", "beta")  # fmt: skip


class Evaluations(BaseCallback):
    def __init__(self, args: sac.Args, run: sac.RunFolder, stop: sac.StopSignal):
        super().__init__()
        self.args, self.run, self.stop = args, run, stop
        self.envs = [sac.make_env(args.env_id) for _ in range(args.eval_episodes)]

    def _on_step(self) -> bool:
        step = self.num_timesteps
        if step < self.args.total_timesteps and sac.interval_has_passed(self.args.eval_interval, step, 1):
            self.evaluate("scheduled")
        return not self.stop.received

    def evaluate(self, phase: str) -> None:
        policy = lambda observations: torch.from_numpy(self.model.predict(observations.numpy(), deterministic=True)[0])
        scores = sac.evaluate(policy, self.envs, self.args.seed, self.num_timesteps, torch.device("cpu"), self.stop)
        if scores is not None:
            self.run.log_evaluation(self.num_timesteps, phase, scores)


def main() -> None:
    args = tyro.cli(sac.Args, description=__doc__, default=DEFAULTS)
    for name in WITHOUT_EFFECT:
        if getattr(args, name) != getattr(DEFAULTS, name):
            sac.fail(f"--{name.replace('_', '-')} has no effect on stable-baselines3's SAC; leave it out")
    args = dataclasses.replace(args, exp_name="stable_baselines3_sac", cuda=False)
    if args.num_agents != 1 or args.reset_interval or args.num_envs != 1 or args.replay_ratio % 1:
        sac.fail(
            "stable-baselines3's SAC has one agent, which is never reset, and here one environment and a whole replay ratio"
        )
    sac.check_args(args)
    run = sac.RunFolder(args, torch.device("cpu"))
    run.open({})
    model = SAC(
        "MlpPolicy", sac.make_env(args.env_id), learning_rate=args.learning_rate, buffer_size=args.buffer_size,
        learning_starts=args.learning_starts, batch_size=args.batch_size, tau=args.tau, gamma=args.gamma, train_freq=1,
        gradient_steps=int(args.replay_ratio), policy_kwargs={"net_arch": [args.hidden_dim] * args.num_hidden_layers},
        seed=args.seed, device="cpu",
    )  # fmt: skip
    evaluations = Evaluations(args, run, sac.StopSignal())
    model.learn(args.total_timesteps, callback=evaluations)
    evaluations.evaluate("final")
    if evaluations.stop.received:
        print(f"stopped at step {model.num_timesteps}, without a final evaluation; it cannot be continued", file=sys.stderr)
        sys.exit(128 + evaluations.stop.received)
    print(f"the evaluations are in {run.path}")


if __name__ == "__main__":
    main()
