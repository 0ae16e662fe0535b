"""How new the screens of a game are to Random Network Distillation, over a run of rnd_dqn_atari.py.

    python rnd_dqn_atari.py --env-id MontezumaRevengeNoFrameskip-v4 --total-timesteps 100000 --keep-models 20
    python plot_bonus.py runs/MontezumaRevengeNoFrameskip-v4__rnd_dqn_atari__1__*
    python plot_bonus.py results/rnd_100k/bonus_Gravitar_seed_1.csv    # the picture again, from what was written then

The trained agent plays on, with some random actions, and those screens of its games are taken that differ most from each other. For
every model that the run has kept, the predictor's error on them is computed, and the bonus, which is the error divided by the running
deviation: high until training has seen a screen, falling as it is seen again. The same screens upside down (dashed), which no game
ever shows, say how high it is for a new one. Writes bonus.png, bonus.csv and screens.png into the run folder, or into --out-dir.
"""

import dataclasses
import json
import os
import pathlib
import sys
from dataclasses import dataclass

import rnd_dqn_atari as rnd  # isort: skip  (first: it says how threads wait, before PyTorch is imported)

os.environ["MPLBACKEND"] = "agg"  # only files are written, and a notebook hands on a backend of its own

import matplotlib.image
import numpy as np
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from plot_benchmark import STYLE, explain

COLORS = ["#0072B2", "#D55E00", "#007F5F", "#A8487F", "#B37400", "#000000", "#6A51A3", "#777777"]


@dataclass
class Args:
    run_folder: tyro.conf.Positional[str]
    """the folder of a run with --keep-models, or a bonus.csv with its screens.png beside it: what this program wrote"""
    screens: int = 5
    """how many screens are shown, at most 8"""
    steps: int = 5_000
    """environment steps that are played to find them"""
    epsilon: float = 0.3
    """probability of a random action meanwhile: without any, the same few games would be played"""
    out_dir: str | None = None
    """where the files are written; by default the run folder"""


def fail(message: str) -> None:
    """Ends the program because of a wrong argument: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load(folder: pathlib.Path) -> tuple[rnd.Args, dict[int, dict]]:
    """The arguments of a run, and its models by the steps at which they were kept, the final one among them."""
    try:
        values = json.loads((folder / "args.json").read_text(encoding="utf-8"))["args"]
        names = {field.name for field in dataclasses.fields(rnd.Args)}
        args = rnd.Args(**{name: value for name, value in values.items() if name in names})  # an older run may have others
        if "intrinsic_coef" not in values:
            raise ValueError("it is not one of rnd_dqn_atari.py")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"{folder} is not the folder of a run: {error}")
    files = {int(file.stem[5:]): file for file in (folder / "models").glob("step_*.pt") if file.stem[5:].isdigit()}
    files[args.total_timesteps] = folder / "model.pt"
    # Before learning starts there is no bonus yet, but only what it is made of.
    files, models = {step: file for step, file in sorted(files.items()) if step >= args.learning_starts}, {}
    for step, file in files.items():
        try:
            models[step] = torch.load(file, weights_only=True)
        except FileNotFoundError:
            fail(f"{folder} is not the folder of a finished run: {file.name} is not there")
        except Exception:  # damaged, a file can have any consequence
            fail(f"{file} is damaged, cut off, or holds more than weights")
    if not args.intrinsic_coef or len(models) < 2:
        fail(f"the run in {folder} had no bonus, or kept no models on its way (--keep-models 20)")
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
    observation, _ = env.reset(seed=0)
    for _ in range(num_steps):
        greedy_action = agent.act(torch.from_numpy(observation[None]))  # (1,)
        action = rnd.epsilon_greedy(greedy_action, epsilon, agent.num_actions, generator).item()
        observation, _, terminated, truncated, _ = env.step(action)
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


def picture(title: str, screens: np.ndarray, table: pd.DataFrame, folder: pathlib.Path | None) -> Figure:
    """Above the screens, framed in their colours; below, over the run, the predictor's error on them, and their bonus.

    With the run's folder also the bonus in the mini-batches, and when a room was entered.
    """
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(9, 6), dpi=200, layout="constrained")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    above, below = figure.subfigures(2, 1, height_ratios=[1, 2.2])
    for i, axes in enumerate(above.subplots(1, len(screens), squeeze=False)[0]):
        axes.imshow(screens[i], cmap="gray")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=COLORS[i], linewidth=4, visible=True)
    unit, thousands = (1000, " (thousands)") if table.step.max() >= 10_000 else (1, "")
    steps, values = logged(folder, "rnd/bonus") if folder else ([], [])
    rooms = list(zip(*logged(folder, "charts/new_room"))) if folder else []
    for axes, column in zip(below.subplots(1, 2), ("error", "bonus")):
        for (i, kind), rows in table.groupby(["screen", "kind"]):
            axes.plot(rows.step / unit, rows[column], color=COLORS[i], linestyle="-" if kind == "screen" else "--")
        for step, room in rooms:
            axes.axvline(step / unit, color="grey", linewidth=0.8, linestyle=":")
            place = {"xy": (step / unit, 1), "xycoords": ("data", "axes fraction")}
            axes.annotate(f"room {room:.0f}", **place, rotation=90, verticalalignment="top", fontsize=7)
        names = {"error": "error of the predictor", "bonus": "bonus: error / deviation of the returns"}
        axes.set(yscale="log", xlabel=f"environment steps{thousands}", ylabel=names[column])
        axes.yaxis.set_major_formatter("{x:g}")  # powers of ten would be mathematics, which STYLE does not parse
        axes.margins(x=0)
        axes.set_xlim(left=0)
    axes.plot(np.array(steps) / unit, values, color="grey", linewidth=0.7, alpha=0.6, zorder=0)
    looks = {"a screen, in the colour of its frame": ("black", "-"), "the same upside down, never seen": ("black", "--")}
    explain(below, looks | ({"the bonus in the mini-batches": ("grey", "-")} if steps else {}), {})
    return figure


def draw_again(file: pathlib.Path) -> Figure:
    """The picture of a table that this program wrote, and of the screens beside it, a row of squares."""
    try:
        table = pd.read_csv(file).astype({"step": int, "screen": int, "kind": str, "error": float, "bonus": float})
        row = matplotlib.image.imread(file.with_name(file.name.replace("bonus", "screens")).with_suffix(".png"))
        row = row if row.ndim == 2 else row[..., 0]  # grey, which may be stored as colours
        screens = np.stack(np.split(row, row.shape[1] // row.shape[0], axis=1))
    except (OSError, ValueError, KeyError) as error:
        fail(f"{file} cannot be drawn: {error}")
    return picture(file.stem.removeprefix("bonus_").replace("_", " "), screens, table, None)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not (1 <= args.screens <= len(COLORS) and args.steps >= args.screens and 0 <= args.epsilon <= 1):
        fail(f"--screens must be 1 to {len(COLORS)}, --steps at least as many, --epsilon in [0, 1]")
    folder = pathlib.Path(args.run_folder).expanduser()
    if folder.suffix == ".csv":
        draw_again(folder).savefig(folder.with_suffix(".png"), metadata={"Software": None})
        print(f"written: {folder.with_suffix('.png')}")
        return
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
    out = pathlib.Path(args.out_dir or folder).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "bonus.csv", index=False, float_format="%.5g")
        matplotlib.image.imsave(out / "screens.png", np.dstack([np.concatenate(screens, axis=1)] * 3))  # as colours: exactly
        title = f"{run_args.env_id.removesuffix('NoFrameskip-v4')}, seed {run_args.seed}"
        picture(title, screens, table, folder).savefig(out / "bonus.png", metadata={"Software": None})
    except OSError as error:
        fail(f"--out-dir {out} cannot be written: {error.strerror}")
    print(f"written to {out}: bonus.png, bonus.csv, screens.png")


if __name__ == "__main__":
    main()
