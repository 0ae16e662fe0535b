"""How new the screens of a game are to Random Network Distillation, over a run of rnd_dqn_atari.py.

    python rnd_dqn_atari.py --env-id MontezumaRevengeNoFrameskip-v4 --total-timesteps 100000 --keep-models 20
    python plot_bonus.py runs/MontezumaRevengeNoFrameskip-v4__rnd_dqn_atari__1__0a1b2c3d

The trained agent plays on, with some random actions, and those screens of its games are taken that differ most from each other. For
every model that the run has kept, the predictor's error on them is computed, and the bonus, which is the error divided by the running
deviation: high until training has seen a screen, falling as it is seen again. The same screens upside down (dashed), which no game
ever shows, say how high it is for a new one. Writes bonus.png and bonus.csv into the run folder, or into --out-dir.
"""

import json
import pathlib
from dataclasses import dataclass

import rnd_dqn_atari as rnd  # isort: skip  (first: it says how threads wait, before PyTorch is imported)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLORS = ["#0072B2", "#D55E00", "#007F5F", "#A8487F", "#B37400", "#000000", "#6A51A3", "#777777"]


@dataclass
class Args:
    run_folder: tyro.conf.Positional[str]
    """the folder of a run with --keep-models"""
    screens: int = 5
    """how many screens are shown, at most 8"""
    steps: int = 5_000
    """environment steps that are played to find them"""
    epsilon: float = 0.3
    """probability of a random action meanwhile: without any, the same few games would be played"""
    out_dir: str | None = None
    """where the files are written; by default the run folder"""


def load(folder: pathlib.Path) -> tuple[rnd.Args, dict[int, dict]]:
    """The arguments of a run, and its models by the steps at which they were kept, the final one among them."""
    try:
        args = rnd.Args(**json.loads((folder / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        rnd.fail(f"{folder} is not a run folder of {rnd.SCRIPT}: {type(error).__name__}: {error}")
    files = {int(file.stem[5:]): file for file in (folder / "models").glob("step_*.pt") if file.stem[5:].isdigit()}
    files[args.total_timesteps] = folder / "model.pt"
    # Before learning starts there is no bonus yet, but only what it is made of.
    files, models = {step: file for step, file in sorted(files.items()) if step >= args.learning_starts}, {}
    for step, file in files.items():
        try:
            models[step] = torch.load(file, weights_only=True)
        except FileNotFoundError:
            rnd.fail(f"{folder} is not the folder of a finished run: {file.name} is not there")
        except Exception:  # damaged, a file can have any consequence
            rnd.fail(f"{file} is damaged, cut off, or holds more than weights")
    if not args.intrinsic_coef or len(models) < 2:
        rnd.fail(f"the run in {folder} had no bonus, or kept no models on its way (--keep-models 20)")
    return args, models


def different_screens(frames: np.ndarray, count: int) -> np.ndarray:
    """The places of frames (many, 84, 84) that are far from each other: the first one, and always the one whose nearest neighbour
    among those taken is farthest (Gonzalez 1985).
    """
    flat = frames.reshape(len(frames), -1).astype(np.float32)
    taken, distances = [0], np.full(len(flat), np.inf)
    while len(taken) < min(count, len(flat)):
        distances = np.minimum(distances, np.square(flat - flat[taken[-1]]).sum(axis=1))
        taken.append(int(distances.argmax()))
    return np.array(taken)


def played_screens(args: rnd.Args, agent: rnd.Agent, num_steps: int, epsilon: float) -> np.ndarray:
    """The newest frame after every step, (num_steps, 84, 84) uint8; the same whenever it is called."""
    env, generator, frames = rnd.make_env(args), torch.Generator().manual_seed(0), []
    policy = rnd.epsilon_greedy(agent.act, epsilon, agent.num_actions, generator)
    observation, _ = env.reset(seed=0)
    for _ in range(num_steps):
        observation, _, terminated, truncated, _ = env.step(policy(torch.from_numpy(observation[None])).item())
        frames.append(observation[-1])
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()
    return np.stack(frames)


@torch.no_grad()
def errors_and_bonus(agent: rnd.Agent, frames: np.ndarray) -> np.ndarray:
    """The predictor's errors on frames (count, 84, 84) uint8, and their bonus, (count, 2), with the weights that the agent has."""
    inputs = agent.rnd.network_input(torch.from_numpy(frames))
    errors = agent.rnd.errors(inputs, agent.rnd.target(inputs))
    return torch.stack([errors, errors / agent.rnd.return_moments.deviation.float()], dim=1).numpy()


def logged(folder: pathlib.Path, tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a scalar in the run's TensorBoard files."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    events = accumulator.Scalars(tag) if tag in accumulator.Tags()["scalars"] else []
    return [event.step for event in events], [event.value for event in events]


def picture(args: rnd.Args, screens: np.ndarray, table: pd.DataFrame, folder: pathlib.Path) -> plt.Figure:
    """Above the screens; below, over the run, the predictor's error on them, and their bonus beside that of the mini-batches."""
    figure = plt.figure(figsize=(10, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2.2])
    for i, axes in enumerate(above.subplots(1, len(screens), squeeze=False)[0]):
        axes.imshow(screens[i], cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=COLORS[i], linewidth=4)
    for axes, column in zip(below.subplots(1, 2), ("error", "bonus")):
        for (i, kind), rows in table.groupby(["screen", "kind"]):
            style = {"linestyle": "-"} if kind == "screen" else {"linestyle": "--", "alpha": 0.6}
            axes.plot(rows.step / 1000, rows[column], color=COLORS[i], **style)
        for step, room in zip(*logged(folder, "charts/new_room")):
            axes.axvline(step / 1000, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(
                f"room {room:.0f}", (step / 1000, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=7
            )
        axes.set(yscale="log", xlabel="environment steps (thousands)")
        axes.set_title(f"{column} (dashed: upside down, never seen)", fontsize=9, loc="left")
    steps, values = logged(folder, "rnd/bonus")
    axes.plot(np.array(steps) / 1000, values, color="grey", linewidth=0.7, alpha=0.6, zorder=0, label="mini-batches")
    axes.legend(fontsize=8)
    figure.suptitle(f"{args.env_id.removesuffix('NoFrameskip-v4')}, seed {args.seed}", fontsize=10)
    return figure


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not (1 <= args.screens <= len(COLORS) and args.steps >= args.screens and 0 <= args.epsilon <= 1):
        rnd.fail(f"--screens must be 1 to {len(COLORS)}, --steps at least as many, --epsilon in [0, 1]")
    folder = pathlib.Path(args.run_folder)
    run_args, models = load(folder)
    env = rnd.make_env(run_args)
    agent = rnd.Agent(run_args, env.observation_space, env.action_space, None, torch.device("cpu"))
    agent.load_weights(models[run_args.total_timesteps])
    frames = played_screens(run_args, agent, args.steps, args.epsilon)
    screens = frames[different_screens(frames, args.screens)]
    rows = []
    for step, weights in models.items():
        agent.load_weights(weights)
        for kind, shown in (("screen", screens), ("upside down", screens[:, ::-1].copy())):
            rows += [(step, i, kind, *values) for i, values in enumerate(errors_and_bonus(agent, shown))]
    table = pd.DataFrame(rows, columns=["step", "screen", "kind", "error", "bonus"])
    out = pathlib.Path(args.out_dir or folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "bonus.csv", index=False, float_format="%.5g")
        picture(run_args, screens, table, folder).savefig(out / "bonus.png", dpi=130, metadata={"Software": None})
    except OSError as error:
        rnd.fail(f"--out-dir {out} cannot be written: {error.strerror}")
    print(f"written to {out}: bonus.png, bonus.csv")


if __name__ == "__main__":
    main()
