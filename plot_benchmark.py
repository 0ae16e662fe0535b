"""The table and the pictures of a study: reads run folders, writes CSV, Markdown and pictures.

    python plot_benchmark.py --runs-dir runs/benchmark

Writes into --out-dir (without it, into the subfolder results of --runs-dir)
    results.csv                 a row for every evaluation of every run, the last one of phase "final", and one of phase
                                "training": the mean of the training games that ended in the last fifth of the run
    training_games.csv          a row for every training game
    table.md                    final and best score of every game, its last training games, interquartile means over games,
                                collapse of a reset
    learning_curves_<game>      evaluations of every run and the mean over seeds; a triangle is the score right after a reset
    training_games_<game>       the same of the training games, a moving mean over a tenth of the run
    aggregate_curves            interquartile mean over games, with 95 % intervals
    performance_profiles        fraction of final scores above a threshold
    collapse                    score right after a reset over the score right before it

Only finished runs count (model.pt is there, and a complete "final" evaluation). Every folder that is left out is named, with
the reason. The statistics are those of Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021, by
rliable. The same runs give the same files, to the byte.
"""

import csv
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.patheffects import withStroke
from rliable import library


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"
    """the folder of the run folders; those in its subfolders are read as well"""
    out_dir: str | None = None
    """where the files are written; by default the subfolder results of --runs-dir"""
    picture_format: Literal["png", "pdf", "svg"] = "png"
    """format of the pictures"""
    bootstrap_samples: int = 2_000
    """samples of the stratified bootstrap behind every interval"""
    seed: int = 0
    """seed of the bootstrap"""


def fail(message: str) -> None:
    """Ends the program because of a wrong argument: one line, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------------------- scores

# Mean scores of a random player and of a human, the 26 games of Atari-100k (as in Dopamine, SPR, BBF and DreamerV3).
RANDOM_AND_HUMAN_SCORES = {
    "Alien": (227.8, 7127.7), "Amidar": (5.8, 1719.5), "Assault": (222.4, 742.0), "Asterix": (210.0, 8503.3),
    "BankHeist": (14.2, 753.1), "BattleZone": (2360.0, 37187.5), "Boxing": (0.1, 12.1), "Breakout": (1.7, 30.5),
    "ChopperCommand": (811.0, 7387.8), "CrazyClimber": (10780.5, 35829.4), "DemonAttack": (152.1, 1971.0),
    "Freeway": (0.0, 29.6), "Frostbite": (65.2, 4334.7), "Gopher": (257.6, 2412.5), "Hero": (1027.0, 30826.4),
    "Jamesbond": (29.0, 302.8), "Kangaroo": (52.0, 3035.0), "Krull": (1598.0, 2665.5), "KungFuMaster": (258.5, 22736.3),
    "MsPacman": (307.3, 6951.6), "Pong": (-20.7, 14.6), "PrivateEye": (24.9, 69571.3), "Qbert": (163.9, 13455.0),
    "RoadRunner": (11.5, 7845.0), "Seaquest": (68.4, 42054.7), "UpNDown": (533.4, 11693.2),
}  # fmt: skip


def human_normalized_score(env_id: str, score: float) -> float | None:
    """(score - random) / (human - random), or None for a game that is not one of the 26."""
    if (game := env_id.removesuffix("NoFrameskip-v4")) not in RANDOM_AND_HUMAN_SCORES:
        return None
    random_score, human_score = RANDOM_AND_HUMAN_SCORES[game]
    return (score - random_score) / (human_score - random_score)


# Scores are averaged over games only within a suite, on the suite's own scale.
ATARI, DMC = "Atari", "DeepMind Control"
SCORE_NAMES = {ATARI: "human-normalized score", DMC: "score / 1,000"}


def suite_of(env_id: str) -> str | None:
    """Atari-100k, DeepMind Control (domain-task, without a version), or None: no common scale."""
    if env_id.removesuffix("NoFrameskip-v4") in RANDOM_AND_HUMAN_SCORES:
        return ATARI
    return DMC if re.fullmatch(r"[a-z0-9_]+-[a-z0-9_]+", env_id) and not re.search(r"-v\d+$", env_id) else None


def normalized_score(env_id: str, score: float) -> float:
    return human_normalized_score(env_id, score) if suite_of(env_id) == ATARI else score / 1000


# ---------------------------------------------------------------------------------------------------------- run folders


class RunError(Exception):
    """Why a run folder is left out."""


@dataclass(frozen=True)
class Evaluation:
    global_step: int
    phase: str  # scheduled, before_reset, after_reset or final
    scores: tuple[float, ...]  # a whole game each

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


@dataclass
class Run:
    name: str
    args: dict
    evaluations: list[Evaluation] = field(repr=False)
    training_games: list[tuple[int, float]] = field(repr=False)  # (step at its end, unclipped return)

    @property
    def key(self) -> tuple[str, float, str]:
        """What its seeds share."""
        return self.args["env_id"], float(self.args["replay_ratio"]), method_label(self.args)

    @property
    def curve(self) -> list[Evaluation]:
        """The learning curve: without the dips right after the resets."""
        return [evaluation for evaluation in self.evaluations if evaluation.phase != "after_reset"]

    @property
    def final(self) -> float:
        return self.evaluations[-1].mean

    @property
    def best(self) -> float:
        return max(evaluation.mean for evaluation in self.curve)

    @property
    def last_training_games(self) -> list[float]:
        """The returns of the games that ended in the last fifth of training, played with its exploration."""
        return [score for step, score in self.training_games if step > 0.8 * self.args["total_timesteps"]]

    @property
    def resets(self) -> list[tuple[Evaluation, Evaluation]]:
        """(right before, right after) for every reset."""
        pairs = zip(self.evaluations, self.evaluations[1:])
        return [(before, after) for before, after in pairs if after.phase == "after_reset"]


BASES = {
    "dqn_atari": "DQN", "sr_dqn_atari": "DQN", "rde_dqn_atari": "DQN", "rde_dqn_minigrid": "DQN", "rde_sac_dmc": "SAC",
    "rde_sac_safety": "Safe SAC", "rnd_dqn_atari": "RND-DQN",
}  # fmt: skip


def method_label(args: dict) -> str:
    """DQN, SR+DQN, RDE+DQN, SAC, ...: by what the arguments do. Any other --exp-name is a method of that name."""
    if args["exp_name"] not in BASES:
        return args["exp_name"]
    prefix = "SR+" if args.get("reset_interval") else ""
    if args.get("num_agents", 1) > 1:
        prefix = "RDE+" if args.get("reset_interval") else "Ensemble+"
    return prefix + BASES[args["exp_name"]]


def method_order(label: str) -> tuple:
    """Baseline, then SR, then RDE, then the rest."""
    prefix = label.partition("+")[0] if "+" in label else ""
    return {"": 0, "SR": 1, "Ensemble": 2, "RDE": 3}.get(prefix, 4) + 5 * (label not in COLORS), label


PHASES = ("scheduled", "before_reset", "after_reset", "final")


def phase_name(text: str) -> str:
    if text not in PHASES:
        raise ValueError
    return text


def finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError
    return value


EVALUATION_COLUMNS = {"global_step": int, "phase": phase_name, "episode": int, "episodic_return": finite}
EPISODE_COLUMNS = {"global_step": int, "episodic_return": finite, "episodic_length": int, "wall_seconds": finite}


def read_args(folder: str) -> dict:
    try:
        with open(os.path.join(folder, "args.json"), encoding="utf-8") as file:
            args = json.load(file)["args"]
    except FileNotFoundError:
        raise RunError("args.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise RunError('args.json is not readable as JSON with a part "args"') from None
    kinds = {"env_id": str, "exp_name": str, "seed": int, "replay_ratio": (int, float), "total_timesteps": int,
             "eval_episodes": int, "reset_interval": int, "num_agents": int}  # fmt: skip
    for name, kind in kinds.items():
        value = args.get(name) if isinstance(args, dict) else None
        if name in ("reset_interval", "num_agents") and name not in args:
            continue  # not every method has them
        if not isinstance(value, kind) or isinstance(value, bool) or isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"args.json has no {name}, or one of a wrong kind")
    return args


def read_rows(folder: str, name: str, columns: dict) -> list[tuple]:
    """The values of a CSV file below its heading, each as its column's kind."""
    try:
        with open(os.path.join(folder, name), newline="", encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        raise RunError(f"{name} is missing") from None
    except (OSError, ValueError):
        raise RunError(f"{name} is not a readable text") from None
    rows = list(csv.reader(text.splitlines()))
    if not rows or rows[0] != list(columns):
        raise RunError(f"{name} does not begin with {','.join(columns)}")
    values = []
    for line, row in enumerate(rows[1:], start=2):
        try:
            values.append(tuple(kind(cell) for kind, cell in zip(columns.values(), row, strict=True)))
            if line == len(rows) and not text.endswith("\n"):
                raise ValueError
        except ValueError:
            raise RunError(f'{name}, line {line}: "{",".join(row)[:60]}" is not a row, or is cut off') from None
    return values


def read_evaluations(folder: str, num_episodes: int) -> list[Evaluation]:
    evaluations = []
    for line, (step, phase, episode, score) in enumerate(read_rows(folder, "evaluations.csv", EVALUATION_COLUMNS), start=2):
        if episode == 0:
            if evaluations and step < evaluations[-1][0]:
                raise RunError(f"evaluations.csv, line {line}: step {step} comes after step {evaluations[-1][0]}")
            evaluations.append((step, phase, []))
        if not evaluations or evaluations[-1][:2] != (step, phase) or episode != len(evaluations[-1][2]):
            raise RunError(f"evaluations.csv, line {line}: step {step}, {phase}: episode {episode} is doubled or out of order")
        evaluations[-1][2].append(score)
    for i, (step, phase, scores) in enumerate(evaluations):
        if len(scores) != num_episodes:
            raise RunError(f"evaluations.csv: step {step}, {phase}, has {len(scores)} of {num_episodes} episodes")
        if phase == "after_reset" and (not i or evaluations[i - 1][:2] != (step, "before_reset")):
            raise RunError(f"evaluations.csv: step {step}: the reset has no evaluation before it")
        if evaluations[i - 1][:2] == (step, phase) and i:
            raise RunError(f"evaluations.csv: step {step}, {phase}, is there twice")
    return [Evaluation(step, phase, tuple(scores)) for step, phase, scores in evaluations]


def read_run(folder: str, name: str) -> Run:
    args = read_args(folder)
    evaluations = read_evaluations(folder, args["eval_episodes"])
    num_final = sum(evaluation.phase == "final" for evaluation in evaluations)
    if not num_final or not os.path.exists(os.path.join(folder, "model.pt")):
        step = evaluations[-1].global_step if evaluations else 0
        raise RunError(f"not finished: the last evaluation is of step {step} of {args['total_timesteps']}")
    if num_final > 1 or evaluations[-1].phase != "final" or evaluations[-1].global_step < args["total_timesteps"]:
        raise RunError("evaluations.csv: the final evaluation is not the one of the last step")
    episodes = read_rows(folder, "episodes.csv", EPISODE_COLUMNS)
    return Run(name, args, evaluations, [(step, score) for step, score, _, _ in episodes])


RUN_FOLDER = re.compile(r".+__.+__\d+__\d{8}-\d{6}")  # <env_id>__<exp_name>__<seed>__<start time>
# What may differ between the seeds of a method: it does not change what is computed.
INCIDENTAL = {"seed", "exp_name", "runs_dir", "resume", "checkpoint_interval", "cuda", "cuda_graphs", "torch_deterministic",
              "track", "wandb_project_name", "wandb_entity", "capture_video"}  # fmt: skip


def read_runs(runs_dir: str) -> tuple[list[Run], list[str]]:
    """The runs that count, and a line for every folder that is left out."""
    runs, left_out = [], []
    for folder, subfolders, files in os.walk(runs_dir):
        subfolders.sort()
        is_run = {"args.json", "evaluations.csv"} & set(files) or RUN_FOLDER.fullmatch(os.path.basename(folder))
        if not is_run:
            continue
        subfolders.clear()
        name = os.path.relpath(folder, runs_dir)
        try:
            runs.append(read_run(folder, name))
        except RunError as error:
            left_out.append(f"{name}: {error}")
    runs, other_settings = keep_one_setting(runs)
    runs, doubled = keep_one_of_a_seed(runs)
    runs.sort(key=lambda run: (run.key[0], run.key[1], method_order(run.key[2]), run.args["seed"]))
    return runs, sorted(left_out + other_settings + doubled)


def settings_of(args: dict) -> dict:
    """What the seeds of a method must have in common; an ensemble of one agent is the method without an ensemble, and so on."""
    settings = {"reset_interval": 0, "num_agents": 1} | {name: value for name, value in args.items() if name not in INCIDENTAL}
    if not settings["reset_interval"]:
        settings.pop("reset_depth", None)
    if settings["num_agents"] == 1:
        settings.pop("beta", None)
    return settings


def keep_one_setting(runs: list[Run]) -> tuple[list[Run], list[str]]:
    """The seeds of a method must have the same arguments. Of several sets of them the one with most runs is kept."""
    groups, kept, left_out = defaultdict(list), [], []
    for run in runs:
        groups[run.key].append(run)
    for group in groups.values():
        settings = [json.dumps(settings_of(run.args), sort_keys=True) for run in group]
        usual = Counter(settings).most_common(1)[0][0]
        for run, setting in zip(group, settings):
            if setting == usual:
                kept.append(run)
                continue
            setting, usual_setting = json.loads(setting), json.loads(usual)
            names = sorted(k for k in setting | usual_setting if setting.get(k) != usual_setting.get(k))
            differences = ", ".join(f"{k} {setting.get(k)} instead of {usual_setting.get(k)}" for k in names)
            left_out.append(f"{run.name}: other arguments than most runs of {describe(run.key)}: {differences}")
    return kept, left_out


def keep_one_of_a_seed(runs: list[Run]) -> tuple[list[Run], list[str]]:
    kept, left_out = {}, []
    for run in sorted(runs, key=lambda run: run.name):
        first = kept.setdefault((run.key, run.args["seed"]), run)
        if first is not run:
            left_out.append(f"{run.name}: the same as {first.name}, which counts")
    return list(kept.values()), left_out


def describe(key: tuple) -> str:
    env_id, replay_ratio, method = key
    return f"{method} on {game_name(env_id)}, replay ratio {replay_ratio:g}"


def game_name(env_id: str) -> str:
    return env_id.removesuffix("NoFrameskip-v4")


def group_seeds(runs: list[Run]) -> dict[tuple, list[Run]]:
    groups = defaultdict(list)
    for run in runs:
        groups[run.key].append(run)
    return dict(groups)


# ---------------------------------------------------------------------------------------------------------- statistics


def bootstrap(function, scores: np.ndarray, args: Args) -> tuple[np.ndarray, np.ndarray | None]:
    """`function` of scores (seeds, games, ...), and its 95 % interval (2, ...) by the bootstrap stratified over games.

    One seed has no spread to estimate: then the interval is None.
    """
    if len(scores) < 2:
        return function(scores), None
    np.random.seed(args.seed)  # rliable draws from the global generator, whatever random_state it is given
    points, intervals = library.get_interval_estimates({"": scores}, function, reps=args.bootstrap_samples)
    return points[""], intervals[""]


def interquartile_means(scores: np.ndarray) -> np.ndarray:
    """Over seeds and games, for every step: (seeds, games, steps) to (steps,). (rliable's aggregate_iqm does one at a time.)"""
    scores = np.sort(scores.reshape(-1, scores.shape[-1]), axis=0)
    cut = int(0.25 * len(scores))
    return scores[cut : len(scores) - cut].mean(axis=0)


def fractions_above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """(seeds, games) to the fraction of them above every threshold. (rliable's score_distributions, in one call.)"""
    return 1 - np.searchsorted(np.sort(scores, axis=None), thresholds, side="right") / scores.size


@dataclass
class Aggregate:
    """The runs that a comparison over games is made of: for every method the same games, and for every game the same seeds."""

    suite: str
    replay_ratio: float
    env_ids: list[str]
    runs: dict[str, list[list[Run]]]  # method -> [seed][game]
    notes: list[str]

    def final_scores(self, method: str) -> np.ndarray:
        """(seeds, games), normalized."""
        return np.array([[normalized_score(run.args["env_id"], run.final) for run in row] for row in self.runs[method]])

    def curves(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps at which every run was evaluated, and the normalized scores (seeds, games, steps)."""
        curves = [
            [{e.global_step: normalized_score(run.args["env_id"], e.mean) for e in run.curve} for run in row]
            for row in self.runs[method]
        ]  # [seed][game]: step -> score
        steps = sorted(set.intersection(*(set(curve) for row in curves for curve in row)))
        return np.array(steps), np.array([[[curve[step] for step in steps] for curve in row] for row in curves])


def aggregate_over_games(runs: list[Run]) -> list[Aggregate]:
    aggregates = []
    groups = group_seeds(runs)
    for suite in (ATARI, DMC):
        for replay_ratio in sorted({key[1] for key in groups if suite_of(key[0]) == suite}):
            keys = [key for key in groups if suite_of(key[0]) == suite and key[1] == replay_ratio]
            methods = sorted({key[2] for key in keys}, key=method_order)
            env_ids = sorted({key[0] for key in keys})
            shared = [env_id for env_id in env_ids if all((env_id, replay_ratio, method) in groups for method in methods)]
            where, notes, rows = f"{suite}, replay ratio {replay_ratio:g}", [], {}
            if len(shared) < len(env_ids):
                names = ", ".join(game_name(env_id) for env_id in env_ids if env_id not in shared)
                notes.append(f"{where}: without {names}, which not every method has finished")
            for method in methods if shared else []:
                by_seed = [{run.args["seed"]: run for run in groups[env_id, replay_ratio, method]} for env_id in shared]
                seeds = sorted(set.intersection(*map(set, by_seed)))
                if unused := sorted(set.union(*map(set, by_seed)) - set(seeds)):
                    names = ", ".join(map(str, unused))
                    notes.append(f"{where}: {method} without the seeds {names}, which not every game has finished")
                rows[method] = [[by_seed[i][seed] for i in range(len(shared))] for seed in seeds]
            aggregates.append(Aggregate(suite, replay_ratio, shared, {m: row for m, row in rows.items() if row}, notes))
    return aggregates


@dataclass
class Collapse:
    """The mean score right before and right after the resets of some runs."""

    before: float
    after: float
    num_resets: int

    @property
    def ratio(self) -> float | None:
        """Score right after over score right before; None where the scores before are not positive (as in Pong)."""
        return self.after / self.before if self.before > 0 else None


def collapse_of(runs: list[Run]) -> Collapse | None:
    """Means first, then their ratio: single ratios are noise where a score before is close to 0."""
    resets = [reset for run in runs for reset in run.resets]
    if not resets:
        return None
    before, after = np.mean([[before.mean, after.mean] for before, after in resets], axis=0)
    return Collapse(float(before), float(after), len(resets))


# ---------------------------------------------------------------------------------------------------------- CSV, table


def write_results(path: str, runs: list[Run]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        columns = "run env_id method replay_ratio seed global_step phase episodes score human_normalized_score"
        rows.writerow(columns.split())
        for run in runs:
            env_id, replay_ratio, method = run.key
            names = (run.name, env_id, method, f"{replay_ratio:g}", run.args["seed"])
            rows_of_run = [(e.global_step, e.phase, e.scores) for e in run.evaluations]
            if run.last_training_games:
                rows_of_run.append((run.args["total_timesteps"], "training", run.last_training_games))
            for step, phase, scores in rows_of_run:
                mean = float(np.mean(scores))
                normalized = human_normalized_score(env_id, mean)
                means = (f"{mean:.10g}", "" if normalized is None else f"{normalized:.10g}")
                rows.writerow((*names, step, phase, len(scores), *means))


def write_training_games(path: str, runs: list[Run]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow("env_id method replay_ratio seed global_step episodic_return".split())
        for run in runs:
            env_id, replay_ratio, method = run.key
            names = (env_id, method, f"{replay_ratio:g}", run.args["seed"])
            rows.writerows((*names, step, f"{score:.10g}") for step, score in run.training_games)


def decimals(value: float) -> int:
    """So that three digits or so are shown: 1234, 123, 12.3, 1.23, 0.123, 0.012."""
    return 2 if value == 0 else max(0, min(3, 2 - math.floor(math.log10(abs(value)))))


def number(value: float, spread: list[float] = ()) -> str:
    """The value, and ± the standard deviation of `spread` if that holds at least two."""
    text = f"{value:.{decimals(value)}f}"
    return f"{text} ± {np.std(spread, ddof=1):.{decimals(value)}f}" if len(spread) > 1 else text


def mean_and_std(values: list[float]) -> str:
    return number(float(np.mean(values)), values)


TABLES = """\
## Scores

Mean ± standard deviation over seeds, each seed the mean of its evaluation's games. Final is the evaluation at the end; best is
the run's highest evaluation, picked afterwards, and so biased upwards. Training games are those that ended in the last fifth of
training, played with its exploration; where they differ much from the evaluations, a single evaluation says little.

| game | replay ratio | method | seeds | final score | best score | training games | final, human-normalized |
|---|---|---|---|---|---|---|---|
{scores}

## Over games

Interquartile mean of the final scores over all games and seeds, with its 95 % interval by the bootstrap stratified over games
({bootstrap_samples} samples).

| scale | replay ratio | method | games | seeds | IQM | 95 % interval |
|---|---|---|---|---|---|---|
{aggregates}
{notes}
## Collapse of a reset

Mean score right before and right after the resets of all seeds, and after / before (± standard deviation over seeds): 1 is no
collapse. Where the scores before are not positive, the ratio is not defined.

| game | replay ratio | method | resets | before | after | after / before |
|---|---|---|---|---|---|---|
{collapses}

{num_runs} runs, {num_left_out} folders left out.
"""


def table_row(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table_text(runs: list[Run], aggregates: list[Aggregate], left_out: list[str], args: Args) -> str:
    scores, over_games, collapses = [], [], []
    for key, group in group_seeds(runs).items():
        env_id, replay_ratio, method = key
        final, best = [run.final for run in group], [run.best for run in group]
        normalized = [human_normalized_score(env_id, score) for score in final]
        normalized = "-" if None in normalized else mean_and_std(normalized)
        training = [float(np.mean(run.last_training_games)) for run in group if run.last_training_games]
        training = mean_and_std(training) if training else "-"
        names = game_name(env_id), f"{replay_ratio:g}", method
        scores.append(table_row(*names, len(group), mean_and_std(final), mean_and_std(best), training, normalized))

        if (collapse := collapse_of(group)) is not None:
            of_seeds = [single.ratio for run in group if (single := collapse_of([run]))]
            num_undefined = of_seeds.count(None)
            ratio = "not defined" if collapse.ratio is None else number(collapse.ratio, [] if num_undefined else of_seeds)
            if num_undefined and collapse.ratio is not None:
                ratio += f", not defined for {num_undefined} of {len(of_seeds)} seeds"
            collapses.append(table_row(*names, collapse.num_resets, number(collapse.before), number(collapse.after), ratio))

    for aggregate in aggregates:
        for method in aggregate.runs:
            final = aggregate.final_scores(method)
            iqm, interval = bootstrap(interquartile_means, final[..., np.newaxis], args)
            interval = "needs 2 seeds" if interval is None else f"{interval[0, 0]:.3f} to {interval[1, 0]:.3f}"
            names = f"{aggregate.suite}, {SCORE_NAMES[aggregate.suite]}", f"{aggregate.replay_ratio:g}", method
            over_games.append(table_row(*names, final.shape[1], final.shape[0], f"{iqm[0]:.3f}", interval))

    notes = [note for aggregate in aggregates for note in aggregate.notes]
    without_scale = sorted({game_name(run.args["env_id"]) for run in runs if suite_of(run.args["env_id"]) is None})
    notes += [f"{game}: no scale in common with other games" for game in without_scale]
    text = TABLES.format(
        scores="\n".join(scores), aggregates="\n".join(over_games), collapses="\n".join(collapses), num_runs=len(runs),
        notes="".join(f"\n- {note}" for note in notes) + "\n" * bool(notes), num_left_out=len(left_out),
        bootstrap_samples=args.bootstrap_samples,
    )  # fmt: skip
    return text + "".join(f"\n- {line}" for line in left_out) + "\n" * bool(left_out)


# ------------------------------------------------------------------------------------------------------------ pictures

# Okabe and Ito's colours, which colour-blind people can tell apart; dashes tell the methods apart in grey as well.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#007F5F", "#A8487F", "#B37400", "#2A8CC0"
COLORS = {
    "DQN": BLUE, "SR+DQN": VERMILLION, "RDE+DQN": GREEN, "Ensemble+DQN": PURPLE, "RND-DQN": BLUE,
    "SAC": BLUE, "SR+SAC": VERMILLION, "RDE+SAC": GREEN, "Ensemble+SAC": PURPLE,
    "Safe SAC": BLUE, "SR+Safe SAC": VERMILLION, "RDE+Safe SAC": GREEN, "Ensemble+Safe SAC": PURPLE,
}  # fmt: skip
DASHES = {BLUE: (0, (5, 2)), VERMILLION: (0, (1.5, 1.2)), PURPLE: (0, (5, 1.5, 1, 1.5)), ORANGE: (0, (8, 2))}
FILE_METADATA = {  # without the time and matplotlib's version
    "png": {"Software": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
    "svg": {"Creator": None, "Date": None},
}
MARKERS = "sD^o"
WHITE_EDGE = [withStroke(linewidth=3, foreground="white")]


def color_of(method: str, methods: list[str]) -> str:
    others = [label for label in sorted(methods) if label not in COLORS]
    return COLORS[method] if method in COLORS else (PURPLE, ORANGE, SKY, "#000000")[others.index(method) % 4]


def set_style(args: Args) -> None:
    plt.rcdefaults()
    plt.rcParams |= {
        "font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#e4e4e4", "axes.axisbelow": True, "savefig.dpi": 200, "svg.hashsalt": "benchmark", "pdf.fonttype": 42,
    }  # fmt: skip


def new_figure(num_panels: int, height: float = 3.2) -> tuple[plt.Figure, list[plt.Axes]]:
    """Panels side by side, at most 2 in a row."""
    columns = min(2, num_panels)
    rows = math.ceil(num_panels / columns)
    size = (3.9 * columns + 0.4, height * rows + 0.2)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for empty in axes.flat[num_panels:]:
        empty.set_axis_off()
    return figure, list(axes.flat[:num_panels])


def draw_curve(axes: plt.Axes, x, y, interval: np.ndarray | None, color: str) -> None:
    axes.plot(x, y, color=color, linewidth=1.8, linestyle=DASHES.get(color, "-"))
    if interval is not None:
        axes.fill_between(x, *interval, color=color, alpha=0.1, linewidth=0)
        for edge in interval:
            axes.plot(x, edge, color=color, alpha=0.5, linewidth=0.6)


def write_below(figure: plt.Figure, *notes: str) -> None:
    separator = " · " if figure.get_figwidth() > 5 else "\n"  # a single panel is narrow
    figure.supxlabel(separator.join(notes), fontsize=9, color="#555555")


def save(figure: plt.Figure, out_dir: str, name: str, args: Args) -> str:
    path = os.path.join(out_dir, f"{name}.{args.picture_format}")
    figure.savefig(path, metadata=FILE_METADATA[args.picture_format])
    plt.close(figure)
    return path


def label_ends(axes: plt.Axes, ends: dict[str, tuple[float, float]], methods: list[str]) -> None:
    """Writes the methods' names to the right of their curves' ends, pushed apart where they would overlap."""
    axes.figure.draw_without_rendering()  # the layout decides how many pixels a line of text is worth
    bottom, top = axes.get_ylim()
    line = (top - bottom) * 15 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    order = sorted(ends, key=lambda method: (ends[method][1], method_order(method)))
    heights = [ends[method][1] for method in order]
    for _ in range(200):
        for i in range(len(heights) - 1):
            if (overlap := line - (heights[i + 1] - heights[i])) > 0:
                heights[i], heights[i + 1] = heights[i] - overlap / 2, heights[i + 1] + overlap / 2
        heights = [min(max(height, bottom + line / 2), top - line / 4) for height in heights]
    for method, height in zip(order, heights):
        x, y = ends[method]
        color = color_of(method, methods)
        line_to_end = {"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(method, (x, y), (1.03, height), textcoords=("axes fraction", "data"), color=color, va="center",
                      arrowprops=line_to_end, annotation_clip=False)  # fmt: skip


def thousands(axes: plt.Axes, last_step: float) -> None:
    axes.set_xlim(0, last_step)
    axes.xaxis.set_major_locator(plt.MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}")
    axes.set_xlabel("environment steps (thousands)")


def plot_learning_curves(env_id: str, runs: list[Run], args: Args) -> plt.Figure:
    """A panel for every replay ratio."""
    groups = {key: group for key, group in group_seeds(runs).items() if key[0] == env_id}
    methods = sorted({key[2] for key in groups}, key=method_order)
    replay_ratios = sorted({key[1] for key in groups})
    figure, panels = new_figure(len(replay_ratios))
    for axes, replay_ratio in zip(panels, replay_ratios):
        ends, last_step = {}, 1
        for method in methods:
            if not (group := groups.get((env_id, replay_ratio, method))):
                continue
            color = color_of(method, methods)
            curves = [{(e.global_step, e.phase): e.mean for e in run.evaluations} for run in group]
            # The same arguments give the same steps, so all seeds have the same points. A dip is a part of the curve.
            points = [point for point in curves[0] if all(point in curve for curve in curves)]
            steps, scores = [step for step, _ in points], np.array([[curve[point] for point in points] for curve in curves])
            for seed_scores in scores if len(scores) > 1 else []:
                axes.plot(steps, seed_scores, color=color, alpha=0.25, linewidth=0.7)
            mean = scores.mean(axis=0)
            draw_curve(axes, steps, mean, None, color)
            after = [i for i, (_, phase) in enumerate(points) if phase == "after_reset"]
            axes.plot([steps[i] for i in after], mean[after], "v", color=color, markersize=6, mec="white", mew=0.6, zorder=3)
            ends[method], last_step = (steps[-1], mean[-1]), max(last_step, steps[-1])
        axes.set_title(f"{game_name(env_id)}, replay ratio {replay_ratio:g}", loc="left")
        axes.set_ylabel("score")
        thousands(axes, last_step)
        label_ends(axes, ends, methods)
    notes = ["▼ right after a reset"] * any(run.resets for group in groups.values() for run in group)
    notes += ["thin lines: single seeds"] * any(len(group) > 1 for group in groups.values())
    write_below(figure, *notes)
    return figure


def training_curve(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the twentieths of a run, (20,), and the mean returns of the games of the last tenth up to there, (seeds, 20).

    NaN where no game of a seed ended.
    """
    total = runs[0].args["total_timesteps"]
    ends, means = np.linspace(0, total, 21)[1:], np.full((len(runs), 20), np.nan)
    for row, run in zip(means, runs):
        steps, scores = np.array(run.training_games).reshape(-1, 2).T
        for i, end in enumerate(ends):
            if (in_window := (end - total / 10 < steps) & (steps <= end)).any():
                row[i] = scores[in_window].mean()
    return ends, means


def plot_training_games(env_id: str, runs: list[Run], args: Args) -> plt.Figure:
    """A panel for every replay ratio."""
    groups = {key: group for key, group in group_seeds(runs).items() if key[0] == env_id}
    methods = sorted({key[2] for key in groups}, key=method_order)
    replay_ratios = sorted({key[1] for key in groups})
    figure, panels = new_figure(len(replay_ratios))
    for axes, replay_ratio in zip(panels, replay_ratios):
        ends, last_step = {}, 1
        for method in methods:
            if not (group := groups.get((env_id, replay_ratio, method))):
                continue
            color = color_of(method, methods)
            steps, scores = training_curve(group)
            for seed_scores in scores if len(scores) > 1 else []:
                axes.plot(steps, seed_scores, color=color, alpha=0.25, linewidth=0.7)
            mean = scores.mean(axis=0)  # only where every seed has games
            draw_curve(axes, steps, mean, None, color)
            last_step = max(last_step, group[0].args["total_timesteps"])
            if np.isfinite(mean).any():
                last = np.flatnonzero(np.isfinite(mean))[-1]
                ends[method] = (steps[last], mean[last])
        axes.set_title(f"{game_name(env_id)}, replay ratio {replay_ratio:g}", loc="left")
        axes.set_ylabel("return of the training games")
        thousands(axes, last_step)
        label_ends(axes, ends, methods)
    notes = ["thin lines: single seeds"] * any(len(group) > 1 for group in groups.values())
    write_below(figure, "moving mean over a tenth of the run", *notes)
    return figure


def plot_aggregate_curves(aggregates: list[Aggregate], args: Args) -> plt.Figure:
    figure, panels = new_figure(len(aggregates))
    for axes, aggregate in zip(panels, aggregates):
        methods, ends, last_step = list(aggregate.runs), {}, 1
        for method in reversed(methods):  # dashed lines on top of whole ones
            color = color_of(method, methods)
            steps, scores = aggregate.curves(method)
            iqm, interval = bootstrap(interquartile_means, scores, args)
            draw_curve(axes, steps, iqm, interval, color)
            ends[method], last_step = (steps[-1], iqm[-1]), max(last_step, steps[-1])
        axes.set_title(panel_title(aggregate), loc="left")
        axes.set_ylabel(f"IQM of {SCORE_NAMES[aggregate.suite]}")
        thousands(axes, last_step)
        label_ends(axes, ends, methods)
    write_below(figure, "bands: 95 % bootstrap intervals", "without the evaluations right after a reset")
    return figure


def panel_title(aggregate: Aggregate) -> str:
    games = f"{len(aggregate.env_ids)} game{'s' * (len(aggregate.env_ids) > 1)}"
    return f"{games}, replay ratio {aggregate.replay_ratio:g}"


def plot_performance_profiles(aggregates: list[Aggregate], args: Args) -> plt.Figure:
    figure, panels = new_figure(len(aggregates))
    for axes, aggregate in zip(panels, aggregates):
        methods = list(aggregate.runs)
        final = {method: aggregate.final_scores(method) for method in methods}
        low, high = min(scores.min() for scores in final.values()), max(scores.max() for scores in final.values())
        room_for_names = 0.5 * (high - low) or 0.5
        left, right = low - room_for_names, high + room_for_names
        thresholds = np.linspace(left, right, 401)
        for i, method in reversed(list(enumerate(methods))):  # dashed lines on top of whole ones
            color = color_of(method, methods)
            profile, interval = bootstrap(lambda scores: fractions_above(scores, thresholds), final[method], args)
            draw_curve(axes, thresholds, profile, interval, color)
            middle, half_range = 0.95 - 0.9 * (i + 0.5) / len(methods), 0.27 / len(methods)
            height, x, side = place_beside(method, final, left, right, middle, half_range)
            offset = (6, 0) if side == "left" else (-6, 0)
            axes.annotate(method, (x, height), offset, textcoords="offset points", color=color, ha=side, va="center",
                          path_effects=WHITE_EDGE)  # fmt: skip
        axes.set_title(panel_title(aggregate), loc="left")
        axes.set_xlabel(f"final {SCORE_NAMES[aggregate.suite]}")
        axes.set_ylabel("fraction of runs above")
        axes.set_xlim(left, right)
        axes.xaxis.set_major_locator(plt.MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda threshold, _: f"{threshold:g}")
        axes.set_ylim(0, 1.03)
    return figure


def place_beside(
    method: str, final: dict[str, np.ndarray], left: float, right: float, height: float, half_range: float
) -> tuple[float, float, str]:
    """Where a name stands beside its profile: at about `height`, to the left or right of the curve, where there is most room.

    Returns the height, the place there, and the text's alignment.
    """
    places, half_line = [], 0.05  # half a line of text, as a fraction of the picture's height
    for candidate in np.linspace(height - half_range, height + half_range, 9):
        low_line, high_line = np.clip([candidate - half_line, candidate + half_line], 0, 1)
        start = {"left": np.quantile(final[method], 1 - low_line, method="higher"),
                 "right": np.quantile(final[method], 1 - high_line, method="lower")}  # fmt: skip
        own = np.quantile(final[method], 1 - candidate)
        others = [np.quantile(final[m], 1 - line) for m in final if m != method for line in (low_line, candidate, high_line)]
        room = {"left": min([x for x in others if x >= own], default=right) - start["left"],
                "right": start["right"] - max([x for x in others if x <= own], default=left)}  # fmt: skip
        enough = 0.24 * (right - left)
        places += [(min(room[side], enough), -abs(candidate - height), candidate, start[side], side) for side in room]
    return max(places)[2:]


def plot_collapse(runs: list[Run], args: Args) -> plt.Figure:
    """Games from top to bottom; a small circle is a seed, the large marker all seeds together."""
    groups = {key: group for key, group in group_seeds(runs).items() if (c := collapse_of(group)) and c.ratio is not None}
    methods = sorted({key[2] for key in groups}, key=method_order)
    replay_ratios, env_ids = sorted({key[1] for key in groups}), sorted({key[0] for key in groups})
    figure, panels = new_figure(len(replay_ratios), height=1.3 + 0.5 * len(env_ids))
    for axes, replay_ratio in zip(panels, replay_ratios):
        axes.vlines(1, -0.5, len(env_ids) - 0.5, color="#555555", linewidth=1, linestyle=(0, (3, 2)))  # below the labels
        for row, env_id in enumerate(env_ids):
            for i, method in enumerate(methods):
                if not (group := groups.get((env_id, replay_ratio, method))):
                    continue
                color = color_of(method, methods)
                y = row + 0.5 * ((i + 0.5) / len(methods) - 0.5)
                seeds = [c.ratio for c in map(collapse_of, [[run] for run in group]) if c and c.ratio is not None]
                collapse = collapse_of(group)
                on_top = {"clip_on": False, "zorder": 3}  # a marker at 0 lies on the axis
                axes.plot([collapse.ratio], [y], MARKERS[i % 4], color=color, markersize=8, mec="white", **on_top)
                if len(group) > 1:
                    axes.plot(seeds, [y] * len(seeds), "o", color="white", markersize=4, mec=color, mew=1, **on_top)
                if suite_of(env_id) == ATARI and (random_score := RANDOM_AND_HUMAN_SCORES[game_name(env_id)][0]) > 0:
                    axes.plot([random_score / collapse.before], [y], "|", color="#555555", markersize=10)
        axes.set_title(f"replay ratio {replay_ratio:g}", loc="left")
        axes.set_yticks(range(len(env_ids)), [game_name(env_id) for env_id in env_ids])
        axes.set_ylim(len(env_ids) - 0.5, -0.85)
        axes.set_xlim(0, max(1.1, axes.get_xlim()[1]))
        axes.set_xlabel("score right after / right before a reset")
        axes.grid(axis="y", visible=False)
    for axes in panels:
        label_markers(axes, [(method, color_of(method, methods), MARKERS[i % 4]) for i, method in enumerate(methods)])
    notes = ["small circles: single seeds"] * any(len(group) > 1 for group in groups.values())
    notes += ["grey bar: a random player"] * any(suite_of(env_id) == ATARI for env_id in env_ids)
    write_below(figure, *notes, "dashed line: no collapse")
    return figure


def label_markers(axes: plt.Axes, labels: list[tuple[str, str, str]]) -> None:
    """The methods' names in a line above the first row, each behind its marker."""
    for i, (method, color, marker) in enumerate(labels):
        x = 0.02 + i / max(2, len(labels))
        place = axes.get_yaxis_transform()  # x as a fraction of the panel's width, y as a row
        axes.plot([x], [-0.65], marker, color=color, markersize=7, mec="white", transform=place, clip_on=False)
        axes.annotate(method, (x, -0.65), (6, 0), xycoords=place, textcoords="offset points", color=color, va="center")


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not os.path.isdir(args.runs_dir):
        fail(f"--runs-dir {args.runs_dir} is not a folder")
    if args.bootstrap_samples < 1:
        fail(f"--bootstrap-samples is {args.bootstrap_samples}, but must be positive")
    runs, left_out = read_runs(args.runs_dir)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not runs:
        fail(f"there is no finished run in {args.runs_dir}")
    args.out_dir = args.out_dir or os.path.join(args.runs_dir, "results")
    try:
        table = write_all(runs, left_out, args)
    except OSError as error:
        fail(f"--out-dir {args.out_dir} cannot be written: {error.strerror}: {error.filename}")
    print(table)
    print(f"written to {args.out_dir}")


def write_all(runs: list[Run], left_out: list[str], args: Args) -> str:
    """Writes the files of the study, and returns its table."""
    os.makedirs(args.out_dir, exist_ok=True)
    aggregates = aggregate_over_games(runs)
    write_results(os.path.join(args.out_dir, "results.csv"), runs)
    write_training_games(os.path.join(args.out_dir, "training_games.csv"), runs)
    table = table_text(runs, aggregates, left_out, args)
    with open(os.path.join(args.out_dir, "table.md"), "w", encoding="utf-8") as file:
        file.write(table)
    set_style(args)
    for env_id in sorted({run.args["env_id"] for run in runs}):
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", game_name(env_id))
        save(plot_learning_curves(env_id, runs, args), args.out_dir, f"learning_curves_{name}", args)
        if any(run.training_games for run in runs if run.args["env_id"] == env_id):
            save(plot_training_games(env_id, runs, args), args.out_dir, f"training_games_{name}", args)
    if comparable := [aggregate for aggregate in aggregates if aggregate.runs]:
        save(plot_aggregate_curves(comparable, args), args.out_dir, "aggregate_curves", args)
        save(plot_performance_profiles(comparable, args), args.out_dir, "performance_profiles", args)
    if any((collapse := collapse_of([run])) and collapse.ratio is not None for run in runs):
        save(plot_collapse(runs, args), args.out_dir, "collapse", args)
    return table


if __name__ == "__main__":
    main()
