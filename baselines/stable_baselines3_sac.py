"""stable-baselines3's SAC in the place of rde_sac_dmc.py with --num-agents 1 --reset-interval 0, to compare the two.

    python baselines/stable_baselines3_sac.py --env-id cheetah-run --seed 1 --replay-ratio 4 --total-timesteps 50000

The arguments are those of rde_sac_dmc.py that have an effect; the environment and the evaluations are its own, too, at the
same steps, from the same starts. It trains on the CPU. What comes out is a run folder as rde_sac_dmc.py's, without checkpoints:
a run that was stopped cannot be continued.
"""

import dataclasses
import os
import pathlib
import sys
import types

import torch
import tyro
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import rde_sac_dmc as sac

DEFAULTS = sac.Args(num_agents=1, reset_interval=0)
WITHOUT_EFFECT = ("exp_name", "checkpoint_interval", "keep_models", "cuda", "torch_deterministic", "cuda_graphs", "bf16",
                  "critic_norm", "selection", "beta")  # fmt: skip


class Run(sac.Run):
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
        run.progress.update(1)
        for info in self.locals["infos"]:
            if "episode" in info:
                run.log_episode(info["episode"])
        if run.global_step < args.total_timesteps and sac.interval_has_passed(args.eval_interval, run.global_step, 1):
            self.evaluate("scheduled")
        run.goes_on()  # looks at the clock, and whether to stop
        return True

    def evaluate(self, phase: str) -> None:
        self.run.agenda = [phase]
        self.run.evaluate(self)

    def evaluation_policy(self, generator: torch.Generator):
        """What `Run.evaluate` asks an agent for."""
        return lambda observations: torch.from_numpy(self.model.predict(observations.numpy(), deterministic=True)[0])


def train(args: sac.Args) -> None:
    # The folder is of this script: no other one is to go on with it or to load its weights.
    sac.SCRIPT, sac.SCRIPT_TEXT = os.path.basename(__file__), pathlib.Path(__file__).read_bytes()
    run = Run(args)
    run.restore({"agent": types.SimpleNamespace(METRICS=(), metrics=torch.zeros(0)), "envs": []})
    model = SAC(
        "MlpPolicy", sac.make_env(args), learning_rate=args.learning_rate, buffer_size=args.buffer_size,
        learning_starts=args.learning_starts, batch_size=args.batch_size, tau=args.tau, gamma=args.gamma, train_freq=1,
        gradient_steps=int(args.replay_ratio), policy_kwargs={"net_arch": [args.hidden_dim] * args.num_hidden_layers},
        seed=args.seed, device="cpu",
    )  # fmt: skip
    logs = Logs(run)
    model.learn(args.total_timesteps, callback=logs)
    logs.evaluate("final")
    run.finish(model.policy.state_dict())


def main() -> None:
    sac.show_ranges()
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
    train(args)


if __name__ == "__main__":
    main()
