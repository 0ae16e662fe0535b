r"""Plays what a run has learned: its scores, a video, or a window.

    python play.py runs/LunarLander-v3__rde_dqn__1__0a1b2c3d --episodes 5
    python play.py runs/LunarLander-v3__rde_dqn__1__0a1b2c3d --video videos --show-choice

Environment, network and policy come from the script that args.json names, as it lies beside this
program; or, with --run-script, as it lies in the run folder. Nothing of the run is changed. Of an
ensemble one member can play alone (--agent 0), or each in turn beside the ensemble (--agent all):
what the composition is worth. What a reset costs, and what another rule of choice would make of it:

    python play.py results/lunar_lander --reset oldest --fresh-seeds 12 --episodes 20
    python play.py results/lunar_lander --reset oldest --fresh-seeds 12 --episodes 20 \
        --selection advantage --beta 5
"""

import csv
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import sys
import zipfile
from typing import Annotated, Literal

# Threads that wait for each other by spinning are 12 to 80 times slower as soon as another process competes for a core.
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
# A window that draws with OpenGL gets into the way of MuJoCo, which draws with it too: the X server ends the program.
os.environ.setdefault("SDL_FRAMEBUFFER_ACCELERATION", "0")
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # in what it says of wrong arguments

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass


@dataclass(config={"allow_inf_nan": False})
class Options:
    run_folder: tyro.conf.Positional[str]
    """the folder of a run"""
    episodes: PositiveInt = 1
    """whole episodes to play"""
    seed: NonNegativeInt = 0
    """seed of the episodes: episode i is the same however many there are, and for every --agent begins the same"""
    checkpoint: str = "final"
    """final = model.pt; newest = the newest weights, also of a run that goes on; or the step of a file in models/"""
    video: str = ""
    """a folder, in which every episode becomes a video"""
    window: bool = False
    """show the episodes in a window; closing it ends the program"""
    epsilon: Annotated[float, Field(ge=0, le=1)] | None = None
    """play a random action with this probability (discrete actions only); without it: the run's --eval-epsilon"""
    agent: str = "ensemble"
    """who plays: the ensemble; the number of one of its members; or all = the ensemble and each member alone, in a table"""
    show_choice: bool = False
    """write under the picture who acts, and what the judge thinks of each proposal (ensembles only)"""
    like_evaluation: bool = False
    """play the run's own evaluation at the step of the weights again (its seeds, its --eval-episodes): scores only"""
    selection: Literal["value", "advantage"] | None = None
    """the rule by which an ensemble chooses who acts; without it: the run's --selection"""
    beta: NonNegativeFloat | None = None
    """the rule's beta; without it: the run's --beta, or with --selection the default of the rule (as for --beta-cost)"""
    reset: Literal["none", "oldest"] = "none"
    """oldest = play the ensemble as it would be right after its next reset, the episodes side by side: scores only"""
    fresh_seeds: PositiveInt = 1
    """with --reset: so many freshly drawn networks, each in episodes of its own; one alone says little"""
    scripts_dir: str = os.path.dirname(os.path.abspath(__file__))
    """the folder in which the script of the run lies"""
    run_script: bool = False
    """play with the script's text in the run folder, which made the run; it is executed, so the folder has to be trusted"""


def fail(message: str) -> None:
    """Ends the program because of a wrong argument or run folder: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------------ run and weights

API = ("Agent", "Args", "EVALUATION", "SCRIPT", "check_environment", "derive_seed", "evaluate", "make_env")


def import_script(folder: str, options: Options):
    """The script that the run was made by, as a module, and the run's arguments."""
    if not os.path.isdir(folder):
        fail(f"{folder} is not a folder")
    try:
        content = json.loads(pathlib.Path(folder, "args.json").read_text())
        name, sha256, saved = content["script"], content["script_sha256"], dict(content["args"])
    except OSError as error:
        fail(f"{folder} is not the folder of a run: args.json: {error.strerror}")
    except (ValueError, KeyError, TypeError, RecursionError):
        fail(f"{folder} is not the folder of a run: its args.json does not fit")
    place, remedy = options.scripts_dir, "say with --scripts-dir where it is"
    if options.run_script:
        place, remedy = folder, "leave out --run-script"
    if not re.fullmatch(r"\w[\w.-]*\.py", str(name)) or not os.path.isfile(path := os.path.join(place, name)):
        fail(f"the run's script {name} is not in {place}; {remedy}")
    spec = importlib.util.spec_from_file_location(f"played_{name[: -len('.py')]}", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(script)
    except Exception as error:  # a package is missing, a sentence of Python is not finished, ...
        fail(f"{path} cannot be imported: {one_line(error)}")
    if missing := [part for part in API if not hasattr(script, part)]:
        fail(f"{path} is not a script that can be played: it has no {', '.join(missing)}")
    if hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() != sha256:
        has_own = not options.run_script and os.path.isfile(os.path.join(folder, name))
        hint = "; --run-script plays with the run's own text" if has_own else ""
        print(f"warning: {path} is not the text that made the run, and is played as it is{hint}", file=sys.stderr)
    try:
        return script, script.Args(**saved)
    except (TypeError, ValueError) as error:
        fail(f"the arguments in {folder}/args.json do not fit {path}: {one_line(error)[:200]}")


def find_weights(folder: str, checkpoint: str) -> tuple[str, int | None]:
    """The file that --checkpoint means, and its step (None: the end of the run)."""
    kept = sorted(int(path.stem[5:]) for path in pathlib.Path(folder, "models").glob("step_*.pt") if path.stem[5:].isdigit())
    file_of_step = lambda step: os.path.join(folder, "models", f"step_{step:08d}.pt")
    final = os.path.join(folder, "model.pt")
    if checkpoint == "newest" and not os.path.isfile(final) and kept:
        return file_of_step(kept[-1]), kept[-1]
    if checkpoint in ("final", "newest"):
        if os.path.isfile(final):
            return final, None
        fail(f"the run in {folder} is not finished, there is no model.pt"
             + (f"; --checkpoint newest plays the weights of step {kept[-1]}" if kept else
                ", and no weights were kept on the way (--keep-models)"))  # fmt: skip
    if not checkpoint.isdecimal() or int(checkpoint) not in kept:
        steps = f"of the steps {', '.join(map(str, kept))}" if kept else "of no step (--keep-models)"
        fail(f"--checkpoint {checkpoint} is neither final nor newest, and in {folder}/models are weights {steps}")
    return file_of_step(int(checkpoint)), int(checkpoint)


def load_weights(agent, file: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:  # PyTorch does not look at the checksums
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        weights = torch.load(file, weights_only=True, map_location="cpu")
    except Exception:  # a flipped bit can have any consequence
        fail(f"{file} is damaged, cut off, or holds more than weights")
    try:
        agent.load_weights(weights)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        fail(f"the weights in {file} are not those of this script's agent: {one_line(error)[:200]}")


# -------------------------------------------------------------------------------------------------- who acts, the picture


def selection_function(script, args) -> str | None:
    """The name of the function by which an ensemble's script chooses; None if there is nothing to choose."""
    names = [name for name in ("safe_selection_probabilities", "selection_probabilities") if hasattr(script, name)]
    return names[0] if names and getattr(args, "num_agents", 1) > 1 else None


class Composition:
    """How the ensemble comes to its action while it is played: made visible, and on demand replaced by one member alone.

    All scripts choose by a function that makes probabilities, (batch, N), of what the judge thinks of the N proposals. It is
    replaced by one that asks it, remembers its answer and, if a member plays alone, returns 1 for that member.
    """

    def __init__(self, script, agent):
        self.agent, self.member, self.acting, self.counts = agent, None, None, 0
        self.num_agents = getattr(agent.args, "num_agents", 1)
        if (name := selection_function(script, agent.args)) is None:
            return
        select, act, has_cost = getattr(script, name), agent.act, name.startswith("safe")

        def selected(*judgements_and_betas):
            probabilities = select(*judgements_and_betas)
            if self.member is not None:
                alone = torch.full(probabilities.shape[:1], self.member, device=probabilities.device)
                probabilities = F.one_hot(alone, self.num_agents).to(probabilities.dtype)
            self.values = {"Q": judgements_and_betas[0][0].tolist()}
            self.values |= {"cost": judgements_and_betas[1][0].tolist()} if has_cost else {}
            self.values["p"] = probabilities[0].tolist()
            return probabilities

        def acted(*arguments, **options):
            result = act(*arguments, **options)  # discrete actions: (2, batch); continuous: (batch, action_dim + 1)
            acting = result[:, -1] if result.is_floating_point() else result[1]  # (batch,)
            self.acting = int(acting[0])
            self.counts = self.counts + torch.bincount(acting.long(), minlength=self.num_agents)
            return result

        setattr(script, name, selected)
        agent.act = acted

    def lines(self) -> list[str]:
        """What stands under the picture: every member's proposal in the judge's eyes, and whose was taken."""
        if self.acting is None:
            return []
        judge, lines = self.agent.oldest.item(), []
        for i in range(self.num_agents):
            values = "".join(f"  {name} {of_all[i]:.3g}" for name, of_all in self.values.items())
            lines.append(f"agent {i}:{values}{'  judges' if i == judge else ''}{'  acts' if i == self.acting else ''}")
        return lines


def picture(frame: np.ndarray, composition: Composition | None) -> np.ndarray:
    """A picture of the environment, (height, width, 3) uint8, made larger, and below it what the composition says."""
    factor = max(1, -(-400 // frame.shape[0]))
    frame = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    if composition is None:
        return frame
    text = np.zeros((20 * composition.num_agents + 8, frame.shape[1], 3), np.uint8)
    for i, line in enumerate(composition.lines()):
        cv2.putText(text, line, (6, 20 * i + 17), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([frame, text])


class Window:
    """Shows pictures at the speed of the environment; to close it ends the program."""

    def __init__(self, fps: int):
        import pygame

        self.pygame, self.fps, self.clock, self.screen = pygame, fps, pygame.time.Clock(), None

    def show(self, frame: np.ndarray) -> None:
        if self.screen is None:
            self.screen = self.pygame.display.set_mode((frame.shape[1], frame.shape[0]))
        if self.pygame.event.get(self.pygame.QUIT):
            sys.exit(0)
        self.screen.blit(self.pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        self.pygame.display.flip()
        self.clock.tick(self.fps)


def write_video(path: str, frames: list[np.ndarray], fps: int) -> None:
    from moviepy import ImageSequenceClip  # late: only --video needs the package

    ImageSequenceClip(frames, fps=fps).write_videofile(path, logger=None)


# ----------------------------------------------------------------------------------------------------------------- play


def play(script, policy, generator: torch.Generator, envs: list[gym.Env], seed: int, step: int, watch) -> list[dict]:
    """As the script plays an evaluation at a step: one episode in each environment, side by side; their `info["episode"]`."""
    generator.manual_seed(script.derive_seed(seed, script.EVALUATION, step))
    return script.evaluate(policy, envs, seed, step, torch.device("cpu"), watch)


def play_in_turn(script, policy, generator: torch.Generator, env: gym.Env, options: Options, composition, name: str):
    """The episodes of --episodes one after another, each of its own seed, recorded or shown; their `info["episode"]`."""
    fps, episodes = env.metadata.get("render_fps", 30), []
    window = Window(fps) if options.window else None
    for i in range(options.episodes):
        composition.acting, frames = None, []

        def watch(env: gym.Env) -> None:
            if env.render_mode:
                frame = picture(env.render(), composition if options.show_choice else None)
                window.show(frame) if window else frames.append(frame)

        episodes += play(script, policy, generator, [env], options.seed, i, watch)
        if frames:
            write_video(os.path.join(options.video, f"{name}-episode-{i}.mp4"), frames, fps)
    return episodes


def play_after_resets(script, policy, generator, agent, file: str, envs: list[gym.Env], options: Options, composition) -> None:
    """What the ensemble scores right after its oldest agent is reset, for one fresh network after another.

    Each plays episodes of its own: in the same ones all could have the same luck, and the standard error would not know of it.
    """
    means, fractions = [], []
    for seed in range(options.fresh_seeds):
        load_weights(agent, file)
        torch.manual_seed(script.derive_seed(seed, script.INITIALISATION))
        fresh, composition.counts = agent.reset(), 0
        episodes = play(script, policy, generator, envs, options.seed, seed, lambda env: None)
        columns = {"return": "r"} | {key: key for key in episodes[0] if key not in ("r", "l")}  # and success or cost
        scores = {title: [episode[key] for episode in episodes] for title, key in columns.items()}
        means.append({title: np.mean(values) for title, values in scores.items()})
        fractions.append((composition.counts[fresh] / composition.counts.sum()).item())
        numbers = "".join(f"{title} {np.mean(values):.4g} ± {np.std(values):.4g}, " for title, values in scores.items())
        print(f"fresh network {seed} as agent {fresh}: {numbers}acts in {fractions[-1]:.0%}")
    numbers = ""
    for title in columns:
        values = [mean[title] for mean in means]
        error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f} (standard error)" if len(values) > 1 else ""
        numbers += f"{title} {np.mean(values):.4g}{error}, "
    print(f"{len(means)} fresh network(s), {len(envs)} episode(s) each: {numbers}"
          f"the fresh agent acts in {np.mean(fractions):.0%}")  # fmt: skip


def last_step(folder: str) -> int:
    """The step of the run's final evaluation."""
    try:
        with open(os.path.join(folder, "evaluations.csv"), newline="") as file:
            return [int(row["global_step"]) for row in csv.DictReader(file) if row["phase"] == "final"][-1]
    except (OSError, ValueError, KeyError, IndexError):
        fail(f"--like-evaluation finds no final evaluation in {folder}/evaluations.csv")


def summary(episodes: list[dict]) -> dict[str, str]:
    """Of everything that the episodes tell: the mean and the standard deviation (of a sample), or of one episode the value."""
    columns = {}
    for key in episodes[0]:
        values = [episode[key] for episode in episodes]
        many = len(values) > 1
        text = f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if many else f"{values[0]:.6g}"
        columns[{"r": "return", "l": "length"}.get(key, key)] = text
    return columns


def check_options(options: Options) -> None:
    if options.video and options.window:
        fail("--video and --window exclude each other")
    if options.reset != "none" and (options.video or options.window or options.like_evaluation or options.agent != "ensemble"):
        fail("--reset plays the whole ensemble, and scores only; leave out --video, --window, --like-evaluation and --agent")
    if options.fresh_seeds > 1 and options.reset == "none":
        fail("--fresh-seeds are for networks after a reset; add --reset oldest")
    if options.show_choice and not (options.video or options.window):
        fail("--show-choice writes into the picture; add --video FOLDER or --window")
    if options.like_evaluation and (options.video or options.window):
        fail("--like-evaluation plays many episodes side by side and shows none; leave out --video and --window")
    if options.video and importlib.util.find_spec("moviepy") is None:
        fail("--video needs the package moviepy: pip install moviepy")
    if options.window:
        try:
            import pygame

            pygame.display.init()
        except ImportError:
            fail("--window needs the package pygame: pip install pygame-ce")
        except pygame.error as error:
            fail(f"--window finds no display ({one_line(error)}); --video FOLDER needs none")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    check_options(options)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    folder, visible = options.run_folder, bool(options.video or options.window)
    script, args = import_script(folder, options)
    file, step = find_weights(folder, options.checkpoint)
    members = [str(i) for i in range(args.num_agents)] if selection_function(script, args) else []
    if options.agent not in ("ensemble", *(["all"] if members else []), *members):
        fail(f"--agent is {options.agent}, but must be one of ensemble, all, {', '.join(members)}" if members else
             f"--agent is {options.agent}, but the run has one agent alone")  # fmt: skip
    if options.show_choice and not members:
        fail("--show-choice: the run has one agent alone, and nothing is chosen")
    if (options.selection or options.beta is not None or options.reset != "none") and not members:
        fail("--selection, --beta, --reset: the run has one agent alone, and nothing is chosen")
    if options.selection:
        if not hasattr(args, "selection"):
            fail(f"--selection: {script.SCRIPT}, as it lies there, has one rule alone")
        betas = {name: None for name in ("beta", "beta_cost") if hasattr(args, name)}  # by each rule they mean something else
        args = dataclasses.replace(args, selection=options.selection, **betas)
    if options.beta is not None:
        args = dataclasses.replace(args, beta=options.beta)
    script.check_environment(dataclasses.replace(args, capture_video=visible))
    env = script.make_env(args, render=visible)
    if options.epsilon is not None:
        if not isinstance(env.action_space, gym.spaces.Discrete) or not hasattr(args, "eval_epsilon"):
            fail(f"--epsilon is for discrete actions, and {script.SCRIPT} has none")
        args = dataclasses.replace(args, eval_epsilon=options.epsilon)
    torch.set_flush_denormal(True)  # as in the run
    agent = script.Agent(args, env.observation_space, env.action_space, None, torch.device("cpu"))
    load_weights(agent, file)
    if options.like_evaluation:
        step = last_step(folder) if step is None else step
        envs = [script.make_env(args) for _ in range(args.eval_episodes)]
    composition, generator = Composition(script, agent), torch.Generator()
    policy = agent.evaluation_policy(generator)
    if options.video:
        try:
            os.makedirs(options.video, exist_ok=True)
        except OSError as error:
            fail(f"--video {options.video}: {error.strerror}")

    epsilon = f", epsilon {args.eval_epsilon:g}" if hasattr(args, "eval_epsilon") else ""
    role = "judges" if options.reset == "none" else "is reset"
    judge = f"; agent {agent.oldest.item()} of {len(members)} {role}" if members else ""
    rule = f", selection by {args.selection} (beta {agent.chosen_beta:g})" if members and hasattr(agent, "chosen_beta") else ""
    print(f"{args.env_id}, {script.SCRIPT}, {os.path.relpath(file, folder)}{epsilon}{judge}{rule}")
    if options.reset != "none":
        envs = [script.make_env(args) for _ in range(options.episodes)]
        play_after_resets(script, policy, generator, agent, file, envs, options, composition)
        return
    table = {}
    for player in ["ensemble", *members] if options.agent == "all" else [options.agent]:
        composition.member = int(player) if player in members else None
        who = f"__agent{player}" if player in members else ""
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}{who}__seed{options.seed}"
        if options.like_evaluation:
            episodes = play(script, policy, generator, envs, args.seed, step, lambda env: None)
        else:
            episodes = play_in_turn(script, policy, generator, env, options, composition, name)
        player = f"agent {player}" if player in members else player
        for i, episode in enumerate(episodes):
            columns = ", ".join(" ".join(column) for column in summary([episode]).items())
            print(f"{player + ', ' if members else ''}episode {i}: {columns}")
        table[player] = summary(episodes)
    if len(episodes) > 1 or len(table) > 1:
        print("".join(f"{title:<22}" for title in (f"{len(episodes)} episode(s)", *summary(episodes))).rstrip())
        for player, columns in table.items():
            print("".join(f"{value:<22}" for value in (player if members else "mean", *columns.values())).rstrip())
    env.close()


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without "±"
    main()
