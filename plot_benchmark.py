"""The table and the pictures of a study: reads run folders, writes CSV, Markdown and pictures.

    python plot_benchmark.py --runs-dir runs/benchmark

writes into --out-dir the numbers (table.md, results.csv with a row for every evaluation, training_games.csv) and the pictures:
learning_curves_<game> (evaluations), training_games_<game>, aggregate_curves and performance_profiles (interquartile means over
games, final scores), collapse and collapse_training_games (what a reset costs); where runs log it success_curves_<game> and
cost_curves_<game>; with --references aggregate_training_games. A triangle is the score right after a reset.

Only finished runs count (model.pt is there, and a complete "final" evaluation); every other folder is named, with the reason.
Everything is computed from one table with a row for every game that was played (read_games). The statistics are those of
Agarwal et al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021, by rliable. The same runs give the same files,
to the byte.
"""

import csv
import errno
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"
    """the folder of the run folders; those in its subfolders are read as well"""
    out_dir: str | None = None
    """where the files are written; by default the subfolder results of --runs-dir"""
    references: str | None = None
    """a CSV file of published scores (columns game, method, score), drawn and listed beside the training games"""
    merge_versions: bool = False
    """take the runs of a method as one, even if different versions of its script made them"""
    reset_window: int = 2_000
    """environment steps before and after a reset whose training games are compared"""
    picture_format: Literal["png", "pdf", "svg"] = "png"
    """format of the pictures"""
    bootstrap_samples: int = 2_000
    """samples of the stratified bootstrap behind every interval, at most 100,000"""
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


# Scores are averaged over games only within a suite, on the suite's own scale.
ATARI, DMC = "Atari", "DeepMind Control"
SCORE_NAMES = {ATARI: "human-normalized score", DMC: "score / 1,000"}


def suite_of(env_id: str) -> str | None:
    """Atari-100k, DeepMind Control (domain-task, without a version), or None: no common scale."""
    if game_name(env_id) in RANDOM_AND_HUMAN_SCORES:
        return ATARI
    return DMC if re.fullmatch(r"[a-z0-9_]+-[a-z0-9_]+", env_id) and not re.search(r"-v\d+$", env_id) else None


def normalized_score(env_id: str, score):
    """On the scale of its suite: (score - random) / (human - random), or score / 1,000. Of a score or of an array of them."""
    random_score, human_score = RANDOM_AND_HUMAN_SCORES.get(game_name(env_id), (0, 1000))
    return (score - random_score) / (human_score - random_score)


def game_name(env_id: str) -> str:
    return env_id.removesuffix("NoFrameskip-v4")


def names_of(env_id: str, replay_ratio: float, method: str) -> tuple[str, str, str]:
    return game_name(env_id), f"{replay_ratio:g}", method


# ------------------------------------------------------------------------------------------------- from folders to games

GROUP = ["env_id", "replay_ratio", "method"]  # the columns that the seeds of a method share
RUN = [*GROUP, "seed", "run"]
BASES = {
    "dqn_atari": "DQN", "sr_dqn_atari": "DQN", "rde_dqn_atari": "DQN", "rde_dqn_minigrid": "DQN", "rde_sac_dmc": "SAC",
    "rde_sac_safety": "Safe SAC", "rnd_dqn_atari": "RND-DQN",
}  # fmt: skip
RUN_FOLDER = re.compile(r".+__.+__-?\d+__\d{8}-\d{6}")  # <env_id>__<exp_name>__<seed>__<start time>
# What may differ between the seeds of a method: it does not change what is computed.
INCIDENTAL = {"seed", "exp_name", "runs_dir", "resume", "checkpoint_interval", "keep_models", "cuda", "cuda_graphs",
              "torch_deterministic", "track", "wandb_project_name", "wandb_entity", "capture_video"}  # fmt: skip
KINDS = {"env_id": str, "exp_name": str, "seed": int, "replay_ratio": (int, float), "total_timesteps": int,
         "eval_episodes": int, "reset_interval": int, "num_agents": int, "cost_limit": (int, float)}  # fmt: skip
OPTIONAL = ("reset_interval", "num_agents", "cost_limit")  # not every method has them


class RunError(Exception):
    """Why a run folder is left out."""


def clean(text: str) -> str:
    """What cannot be written in one line, or not at all (half a surrogate pair), as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def method_label(args: dict) -> str:
    """DQN, SR+DQN, RDE+DQN, SAC, ...: by what the arguments do. Any other --exp-name is a method of that name."""
    if args["exp_name"] not in BASES:
        return args["exp_name"]
    prefix = "SR+" if args.get("reset_interval") else ""
    if args.get("num_agents", 1) > 1:
        prefix = "RDE+" if args.get("reset_interval") else "Ensemble+"
    return prefix + BASES[args["exp_name"]]


def method_order(label: str) -> tuple:
    """Baseline, then SR, then RDE, then the rest; the versions of a method (after the @) beside one another."""
    method = label.partition("@")[0]
    prefix = method.partition("+")[0] if "+" in method else ""
    return {"": 0, "SR": 1, "Ensemble": 2, "RDE": 3}.get(prefix, 4) + 5 * (method not in COLORS), label


def methods_of(rows: pd.DataFrame) -> list[str]:
    return sorted(rows.method.unique(), key=method_order)


# Kind of a column, and what is allowed in it. Of larger numbers sums would overflow or be wrong.
WHOLE, REAL = (int, lambda value: 0 <= value <= 1e15), (float, lambda value: abs(value) <= 1e15)
PHASE = (str, ("scheduled", "before_reset", "after_reset", "final").__contains__)
EVALUATION_COLUMNS = {"global_step": WHOLE, "phase": PHASE, "episode": WHOLE, "episodic_return": REAL}
EPISODE_COLUMNS = {"global_step": WHOLE, "episodic_return": REAL, "episodic_length": WHOLE, "wall_seconds": REAL}
EXTRA_COLUMNS = {"success": (float, (0, 1).__contains__), "cost": REAL}  # at the end, of some scripts


def read_text(folder: str, name: str) -> str:
    path = os.path.join(folder, name)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for ever
        raise RunError(f"{name} is not a regular file")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        raise RunError(f"{name} is missing") from None
    except (OSError, ValueError):
        raise RunError(f"{name} is not a readable text") from None


def read_args(folder: str) -> tuple[dict, str, str]:
    """The arguments of a run, those of them that its seeds must have in common, and the version of its script."""
    text = read_text(folder, "args.json")
    try:
        content = json.loads(text)
        args, version = content["args"], content.get("script_sha256") or "unknown"
        args = args if isinstance(args, dict) else {}
        settings = {name: str(value) for name, value in args.items() if name not in INCIDENTAL}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunError('args.json is not readable as JSON with a part "args"') from None
    for name, kind in KINDS.items():
        value = args.get(name)
        if name in OPTIONAL and name not in args or name == "cost_limit" and value in (None, math.inf):
            continue
        if not isinstance(value, kind) or isinstance(value, bool) or not isinstance(value, str) and not abs(value) <= 1e18:
            raise RunError(f"args.json has no {name}, or one of a wrong kind")
    if not args.get("reset_interval"):  # without resets their depth says nothing, for one agent nothing is chosen
        settings.pop("reset_depth", None)
    if args.get("num_agents", 1) == 1:
        settings.pop("beta", None)
    settings = {"reset_interval": "0", "num_agents": "1"} | settings
    return args, json.dumps(settings, sort_keys=True), clean(str(version))[:7]


def read_rows(folder: str, name: str, columns: dict) -> pd.DataFrame:
    """A CSV file, each value as its column's kind; success and cost are NaN where the file does not have them."""
    text = read_text(folder, name)
    try:
        heading, *rows = list(csv.reader(text.splitlines())) or [[]]
    except csv.Error as error:
        raise RunError(f"{name} is not readable as CSV: {error}") from None
    kinds = columns | {column: EXTRA_COLUMNS[column] for column in EXTRA_COLUMNS if column in heading}
    if heading != list(kinds):
        raise RunError(f"{name} does not begin with {','.join(columns)}")
    values = []
    for line, row in enumerate(rows, start=2):
        try:
            values.append([kind(cell) for (kind, _), cell in zip(kinds.values(), row, strict=True)])
            allowed = all(is_allowed(value) for (_, is_allowed), value in zip(kinds.values(), values[-1]))
            if not allowed or line == len(rows) + 1 and not text.endswith("\n"):
                raise ValueError
        except ValueError:
            row = clean(",".join(row)[:60])
            raise RunError(f'{name}, line {line}: "{row}" is not a row, or is cut off, or holds a number beyond 1e15') from None
    return pd.DataFrame(values, columns=heading).reindex(columns=[*columns, *EXTRA_COLUMNS])


def read_evaluations(folder: str, num_episodes: int) -> pd.DataFrame:
    """A row for every game of evaluations.csv; `evaluation` counts the evaluations."""
    rows = read_rows(folder, "evaluations.csv", EVALUATION_COLUMNS)
    step, phase, episode = rows.global_step, rows.phase, rows.episode
    goes_on = (step == step.shift()) & (phase == phase.shift()) & (episode == episode.shift() + 1)
    for i in rows.index[np.where(episode == 0, step < step.shift(), ~goes_on)]:
        where = f"evaluations.csv, line {i + 2}: step {step[i]}"
        if episode[i] == 0:
            raise RunError(f"{where} comes after step {step[i - 1]}")
        raise RunError(f"{where}, {phase[i]}: episode {episode[i]} is doubled or out of order")
    rows["evaluation"] = (episode == 0).cumsum() - 1
    before = None
    for (_, *this), size in rows.groupby(["evaluation", "global_step", "phase"]).size().items():
        where = f"evaluations.csv: step {this[0]}"
        if size != num_episodes:
            raise RunError(f"{where}, {this[1]}, has {size} of {num_episodes} episodes")
        if this[1] == "after_reset" and before != [this[0], "before_reset"]:
            raise RunError(f"{where}: the reset has no evaluation before it")
        if this == before:
            raise RunError(f"{where}, {this[1]}, is there twice")
        before = this
    return rows


def read_run(folder: str, name: str) -> dict:
    """A finished run: the columns RUN, its settings and version, and its games as a table."""
    args, settings, version = read_args(folder)
    finished = os.path.isfile(os.path.join(folder, "model.pt"))  # what the training scripts call finished
    try:
        evaluations = read_evaluations(folder, args["eval_episodes"])
    except RunError as error:
        raise RunError(error if finished else f"not finished: {error}") from None
    step, phase = (0, "") if evaluations.empty else evaluations[["global_step", "phase"]].iloc[-1]
    if not finished:
        raise RunError(f"not finished: the last evaluation is of step {step} of {args['total_timesteps']}")
    num_final = evaluations[evaluations.phase == "final"].evaluation.nunique()
    if not num_final:
        raise RunError(f"damaged: there is a model.pt, but the last evaluation is of step {step}, and none is final")
    if num_final > 1 or phase != "final" or step < args["total_timesteps"]:
        raise RunError("evaluations.csv: the final evaluation is not the one of the last step")
    episodes = read_rows(folder, "episodes.csv", EPISODE_COLUMNS).assign(phase="training", evaluation=-1)
    games = pd.concat([rows for rows in (evaluations, episodes) if len(rows)], join="inner", ignore_index=True)
    games = games.rename(columns={"global_step": "step", "episodic_return": "score"})
    limit = math.inf if args.get("cost_limit") is None else float(args["cost_limit"])
    games = games.assign(total_timesteps=args["total_timesteps"], cost_limit=limit)
    identity = (clean(args["env_id"]), float(args["replay_ratio"]), clean(method_label(args)), args["seed"], name)
    return dict(zip(RUN, identity)) | {"settings": settings, "version": version, "games": games}


def find_run_folders(runs_dir: str) -> Iterator[str]:
    """Every run folder once, also one that only a link leads to."""
    seen = set()
    for folder, subfolders, files in os.walk(runs_dir, followlinks=True):
        subfolders.sort()
        known = (place := os.path.realpath(folder)) in seen
        is_run = {"args.json", "evaluations.csv"} & set(files) or RUN_FOLDER.fullmatch(os.path.basename(folder))
        seen.add(place)
        if is_run or known:
            subfolders.clear()
        if is_run and not known:
            yield folder


def read_games(runs_dir: str, merge_versions: bool = False) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The study as one table, a line for every folder that is left out, and notes.

    A row is a game. Its columns: RUN; total_timesteps and cost_limit of the run; phase (of the evaluation, or "training"),
    evaluation (its number, -1 in training), step (in training: at the game's end), score, normalized (the score on its suite's
    scale), success, cost (NaN where they are not logged). The runs are sorted as they are listed everywhere.
    """
    runs, left_out = [], []
    for folder in find_run_folders(runs_dir):
        name = clean(os.path.relpath(folder, runs_dir))
        try:
            runs.append(read_run(folder, name))
        except RunError as error:
            left_out.append(f"{name}: {error}")
    if not runs:
        return pd.DataFrame(), sorted(left_out), []
    runs, notes = pd.DataFrame(runs), []
    for method, versions in sorted(runs.groupby("method").version.unique().items()):
        if len(versions) > 1 and not merge_versions:
            runs.loc[runs.method == method, "method"] += "@" + runs.version
            labels = ", ".join(f"{method}@{version}" for version in sorted(versions))
            notes.append(f"{method}: its runs were made by different versions of the script and count as {labels}")
    # The seeds of a method must have the same arguments. Of several sets of them the one with most runs is kept.
    usual = runs.groupby(GROUP).settings.transform(lambda all: Counter(all).most_common(1)[0][0])
    for i, run in runs[runs.settings != usual].iterrows():
        own, most = json.loads(run.settings), json.loads(usual[i])
        names = [name for name in sorted(own | most) if own.get(name) != most.get(name)]
        differences = ", ".join(f"{name} {str(own.get(name))[:60]} instead of {str(most.get(name))[:60]}" for name in names)
        group = "{2} on {0}, replay ratio {1}".format(*names_of(*run[GROUP]))
        left_out.append(f"{run.run}: other arguments than most runs of {group}: {clean(differences)}")
    runs = runs[runs.settings == usual]
    first = runs.groupby([*GROUP, "seed"]).run.transform("min")
    left_out += [f"{run}: the same as {other}, which counts" for run, other in zip(runs.run, first) if run != other]
    runs = runs[runs.run == first]
    runs = runs.sort_values(RUN, key=lambda column: column.map(method_order) if column.name == "method" else column)
    games = pd.concat([run.games.assign(**run[RUN]) for _, run in runs.iterrows()], ignore_index=True)
    games["normalized"] = [normalized_score(env_id, score) for env_id, score in zip(games.env_id, games.score)]
    return games, sorted(left_out), notes


# ------------------------------------------------------------------------------------------------ from games to numbers


def evaluations_of(games: pd.DataFrame) -> pd.DataFrame:
    """A row for every evaluation: the means over its games, and over its different games (of equal scores one counts).

    A policy without exploration plays the same game again and again in an emulator without chance. Where success is logged,
    the tasks are drawn anew, and equal scores are not one game.
    """
    games = games[games.phase != "training"]
    same = games.duplicated(["run", "evaluation", "score"]) & games.success.isna()
    games = games.assign(different=games.score.mask(same))
    by_evaluation = games.groupby([*RUN, "evaluation", "step", "phase"], sort=False)
    means = by_evaluation[["score", "normalized", "success", "cost", "different"]].mean()
    return means.assign(episodes=by_evaluation.size()).reset_index()


def runs_of(games: pd.DataFrame) -> pd.DataFrame:
    """A row for every run: its scores, its success, its cost."""
    evaluations, training = evaluations_of(games), games[games.phase == "training"]
    curve = evaluations[evaluations.phase != "after_reset"].groupby(RUN, sort=False)
    runs = curve[["score", "normalized", "success"]].last()  # checked while reading: the final one
    runs["best"] = curve.score.max()
    # The last fifth of training, played with its exploration.
    last = training[training.step > 0.8 * training.total_timesteps].groupby(RUN)
    runs = runs.assign(training=last.score.mean(), normalized_training=last.normalized.mean(), num_training=last.size())
    runs["steps_to_success"] = evaluations[evaluations.success >= 0.9].groupby(RUN).step.min()  # NaN: not reached
    training = training.assign(violation=training.cost > training.cost_limit).groupby(RUN)
    runs = runs.assign(total_cost=training.cost.sum(min_count=1), violations=training.violation.sum(), games=training.size())
    return runs.join(games.groupby(RUN)[["total_timesteps", "cost_limit"]].first()).reset_index()


def resets_of(games: pd.DataFrame, window: int) -> pd.DataFrame:
    """A row for every reset: what was played right before and right after it.

    Of its two evaluations: score, different, cost; of the training games that ended at most `window` steps away:
    training, training_cost; each with _before and _after. (So a training game that a reset interrupts counts as after it.)
    """
    evaluations, training = evaluations_of(games), games[games.phase == "training"]
    after = evaluations[evaluations.phase == "after_reset"]
    resets, columns = after[[*RUN, "step"]].reset_index(drop=True), ["score", "different", "cost"]
    for side, rows in (("before", evaluations.loc[after.index - 1]), ("after", after)):
        resets[[f"{column}_{side}" for column in columns]] = rows[columns].to_numpy()
        means = []
        for run, step in zip(resets.run, resets.step):
            first, last = (step - window, step) if side == "before" else (step, step + window)
            near = training[(training.run == run) & (first < training.step) & (training.step <= last)]
            means.append((near.score.mean(), near.cost.mean()))
        resets[[f"training_{side}", f"training_cost_{side}"]] = np.reshape(means, (-1, 2))
    return resets


def collapses_of(resets: pd.DataFrame, args: Args) -> pd.DataFrame:
    """By the different games of the evaluations, and by the training games; a row for every game, replay ratio and method.

    Mean score before and after the resets of all seeds, their ratio (NaN where the score before is not positive), the ratios of
    the seeds, and the interval by the bootstrap over seeds (NaN without one). Means first, then their ratio: single ratios are
    noise where a score before is close to 0.
    """
    ratio_of = lambda sums: np.where(sums[..., 0] > 0, sums[..., 1] / np.where(sums[..., 0] > 0, sums[..., 0], 1), math.nan)
    rows = []
    for source, column in (("evaluations", "different"), ("training games", "training")):
        sides = [f"{column}_before", f"{column}_after"]
        for group, of_group in resets.dropna(subset=sides).groupby(GROUP, sort=False):
            sums, seeds = of_group.groupby("seed")[sides].sum().to_numpy(), np.arange(of_group.seed.nunique())[:, np.newaxis]
            interval = bootstrap(lambda drawn: ratio_of(sums[drawn.ravel()].sum(axis=0)[np.newaxis]), seeds, args)[1]
            means = sums.sum(axis=0) / len(of_group)
            rows.append((*group, source, len(of_group), *means, float(ratio_of(means)), ratio_of(sums), interval))
    return pd.DataFrame(rows, columns=[*GROUP, "source", "resets", "before", "after", "ratio", "of_seeds", "interval"])


def comparable(games: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """What a comparison over games is made of, with the column suite; and notes on what it leaves out.

    In every suite and replay ratio every method has the same games, and each of its games the same seeds.
    """
    games, parts, notes = games.assign(suite=games.env_id.map(suite_of)), [], []
    for (suite, replay_ratio), rows in games.groupby(["suite", "replay_ratio"]):  # those without a suite fall out
        where, methods, of_game = f"{suite}, replay ratio {replay_ratio:g}", methods_of(rows), rows.groupby("env_id").method
        shared = of_game.nunique() == len(methods)
        if others := sorted(map(game_name, shared.index[~shared])):
            notes.append(f"{where}: without {', '.join(others)}, which not every method has finished")
        rows = rows[rows.env_id.map(shared)]
        for method in methods_of(rows):
            own = rows[rows.method == method]
            in_all = own.groupby("seed").env_id.nunique() == shared.sum()
            if not in_all.all():
                seeds = ", ".join(map(str, in_all.index[~in_all]))
                notes.append(f"{where}: {method} without the seeds {seeds}, which not every game has finished")
            parts.append(own[own.seed.map(in_all)])
    return pd.concat(parts) if parts else games[:0], notes


# ----------------------------------------------------------------------------------------------------------- statistics


def bootstrap(function, scores: np.ndarray | list[np.ndarray], args: Args) -> tuple[np.ndarray, np.ndarray | None]:
    """`function` of scores (seeds, games, ...), and its 95 % interval (2, ...) by the bootstrap stratified over games.

    A list holds the arguments of a function of several methods, each with seeds of its own. One seed has no spread to estimate:
    then the interval is None.
    """
    arrays = scores if isinstance(scores, list) else [scores]
    if min(map(len, arrays)) < 2:
        return function(*arrays), None
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


def final_scores(games: pd.DataFrame, column: str = "normalized") -> np.ndarray:
    """Of one method: (seeds, games), of the seeds that every game has."""
    return runs_of(games).pivot(index="seed", columns="env_id", values=column).dropna().to_numpy()


def improvements_of(games: pd.DataFrame, args: Args) -> list[tuple]:
    """(replay ratio, reset ensemble, other method, games, how probably a run of the one ends better, interval), ..."""
    rows, function = [], lambda *scores: np.array([metrics.probability_of_improvement(*scores)])
    for replay_ratio, group in games.groupby("replay_ratio"):
        for ensemble, other in itertools.permutations(methods_of(group), 2):
            pair = [group[group.method == method] for method in (ensemble, other)]
            env_ids = set(pair[0].env_id) & set(pair[1].env_id)
            scores = [final_scores(one[one.env_id.isin(env_ids)], "score") for one in pair if env_ids]
            if ensemble.startswith("RDE+") and env_ids and all(map(len, scores)):
                rows.append((replay_ratio, ensemble, other, len(env_ids), *bootstrap(function, scores, args)))
    return rows


def evaluation_curve(games: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one method on one game: steps, means (seeds, steps), and which of them are right after a reset.

    Only the points that every seed has: all of them, as the same arguments give the same steps.
    """
    rows = evaluations_of(games)
    table = rows.pivot_table(index=["step", "phase"], columns="seed", values=column, aggfunc="last").dropna()
    order = rows[rows.run == rows.run.iloc[0]].set_index(["step", "phase"]).index.drop_duplicates()
    table = table.loc[order[order.isin(table.index)]]
    return table.index.get_level_values(0), table.to_numpy().T, table.index.get_level_values(1) == "after_reset"


def training_curve(games: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of training: at the ends of the twentieths of a run, means over the games of the last tenth up to there.

    NaN where no game of a seed ended.
    """
    total, ends, means = games.total_timesteps.iloc[0], [], []
    for end in np.linspace(0, total, 21)[1:]:
        window = (games.phase == "training") & (end - total / 10 < games.step) & (games.step <= end)
        ends.append(end)
        means.append(games[column].where(window).groupby(games.seed).mean())
    return np.array(ends), np.array(means).T, np.zeros(20, bool)


def curves_over_games(curve_of, games: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Of one method: the steps that every run has, except those right after a reset, and scores (seeds, games, steps)."""
    frames = []
    for env_id, rows in games.groupby("env_id"):
        steps, scores, dips = curve_of(rows, "normalized")
        frame = pd.DataFrame(scores[:, ~dips].T, index=steps[~dips])
        frames.append(frame[~frame.index.duplicated(keep="last")].dropna())
    table = pd.concat(frames, axis=1, join="inner").sort_index()
    return table.index.to_numpy(), table.to_numpy().reshape(len(table), len(frames), -1).transpose(2, 1, 0)


def published_levels(shared: pd.DataFrame, references: pd.DataFrame) -> dict[str, float]:
    """Interquartile means over the games of a comparison, of the published methods that have all of them."""
    env_ids, levels = {game_name(env_id): env_id for env_id in shared.env_id.unique()}, {}
    for method, rows in references[references.game.isin(env_ids)].groupby("method", sort=False):
        if len(rows) == len(env_ids):
            scores = [normalized_score(env_ids[game], score) for game, score in zip(rows.game, rows.score)]
            levels[method] = float(interquartile_means(np.array(scores)[np.newaxis, :, np.newaxis])[0])
    return levels


# ---------------------------------------------------------------------------------------------------------- CSV, table


def csv_tables(games: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """results.csv and training_games.csv."""
    extra = [column for column in EXTRA_COLUMNS if games[column].notna().any()]
    runs, training = runs_of(games), games[games.phase == "training"].assign(episodic_return=games.score)
    last = runs.dropna(subset="training")
    last = last.assign(phase="training", step=last.total_timesteps, score=last.training)
    results = pd.concat([evaluations_of(games), last.assign(episodes=last.num_training.astype(int), success=math.nan)])
    rows_of_runs = {run: row for row, run in enumerate(runs.run)}
    results = results.sort_values("run", key=lambda names: names.map(rows_of_runs), kind="stable")
    normalized = [normalized_score(env_id, score) for env_id, score in zip(results.env_id, results.score)]
    results["human_normalized_score"] = np.where(results.env_id.map(suite_of) == ATARI, normalized, math.nan)
    names = ["env_id", "method", "replay_ratio", "seed", "global_step"]
    columns = ["run", *names, "phase", "episodes", "score", *extra, "human_normalized_score"]
    for rows in (results, training):
        rows["replay_ratio"], rows["global_step"] = rows.replay_ratio.map("{:g}".format), rows.step
    return {"results.csv": results[columns], "training_games.csv": training[[*names, "episodic_return", *extra]]}


def number(value: float, spread: list[float] = ()) -> str:
    """Three digits or so (1234, 123, 12.3, 1.23, 0.012), ± the standard deviation of `spread` if that holds at least two."""
    decimals = 2 if value == 0 else max(0, min(3, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}" + (f" ± {np.std(spread, ddof=1):.{decimals}f}" if len(spread) > 1 else "")


def mean_and_std(values) -> str:
    known = [value for value in values if math.isfinite(value)]
    return number(float(np.mean(known)), known) if known else "-"


def interval_text(interval: np.ndarray | None) -> str:
    return "needs 2 seeds" if interval is None else "{:.3f} to {:.3f}".format(*interval.ravel())


GAME = "game | replay ratio | method"
SECTIONS = {  # title: columns, text
    "Scores": (f"{GAME} | seeds | final score | best score | training games | final, human-normalized", """\
Mean ± standard deviation over seeds, each seed the mean of its evaluation's games. Final is the evaluation at the end; best is
the run's highest evaluation, picked afterwards, and so biased upwards. Training games are those that ended in the last fifth of
training, played with its exploration; where they differ much from the evaluations, a single evaluation says little."""),
    "Over games": ("scale | replay ratio | method | games | seeds | IQM | 95 % interval", """\
Interquartile mean of the final scores over all games and seeds, with its 95 % interval by the bootstrap stratified over games
({args.bootstrap_samples} samples)."""),
    "Probability of improvement": ("replay ratio | method | over | games | probability | 95 % interval", """\
How probably a run of the reset ensemble ends with a better evaluation than one of the other method (a tie is half of it), mean
over the games that both have, with its interval by the same bootstrap."""),
    "Collapse of a reset": (f"{GAME} | of | resets | before | after | after / before | 95 % interval", """\
Mean score right before and right after the resets of all seeds, and after / before (± standard deviation over seeds) with its
interval by the bootstrap over seeds: 1 is no collapse. Where the scores before are not positive, the ratio is not defined.
Equal scores in one evaluation count once (without exploration they are one game, played again), except where success is logged.
The training games are those that ended in the {args.reset_window:,} steps before and after; resets without some on both sides
do not count."""),
    "Success": (f"{GAME} | seeds | final success | 95 % interval | reached 90 % | steps to 90 %", """\
Rate of success in the final evaluation, mean over seeds, and environment steps to the first evaluation with 90 %, median over
seeds."""),
    "Cost": (f"{GAME} | seeds | limit | total cost | episodes | above the limit", """\
Mean ± standard deviation over seeds: the cost of the whole training, its episodes, and those with a cost above the limit."""),
    "Return and cost of every reset": (f"{GAME} | step | seeds | return | cost | return in training | cost in training", """\
Means over seeds, before → after: the evaluations right before and after, training games of {args.reset_window:,} steps."""),
    "Published scores, beside training games": ("game | whose | score | human-normalized", """\
What is published stands beside the TRAINING games of this study (mean of the last fifth, with exploration), not beside its
evaluations without exploration: the RDE paper's evaluations go on with training games, others have some exploration. Each is
measured as its paper says. Over games: the interquartile mean of the games' means."""),
}  # fmt: skip


def table_text(tables: dict[str, list[tuple]], notes: list[str], num_runs: int, left_out: list[str], args: Args) -> str:
    """table.md. In a name, | would begin a cell and $ a formula."""
    text = ""
    for title, (columns, description) in SECTIONS.items():
        cells = [[re.sub(r"[\\|$]", r"\\\g<0>", str(cell)) for cell in row] for row in tables[title]]
        lines = [f"| {columns} |", "|---" * (columns.count(" | ") + 1) + "|", *(f"| {' | '.join(row)} |" for row in cells)]
        if cells or title == "Over games" and notes:
            text += f"## {title}\n\n{description.format(args=args)}\n\n"
            text += "".join(f"{line}\n" for line in lines if cells) + "\n" * bool(cells)
            text += "".join(f"- {note}\n" for note in notes) + "\n" if title == "Over games" and notes else ""
    text += f"{num_runs} runs, {len(left_out)} folders left out.\n"
    return text + "".join(f"\n- {line}" for line in left_out) + "\n" * bool(left_out)


def tables_of(games: pd.DataFrame, shared: pd.DataFrame, resets: pd.DataFrame, collapses: pd.DataFrame,
              references: pd.DataFrame, args: Args) -> dict[str, list[tuple]]:  # fmt: skip
    """The rows of every section of table.md."""
    tables = {title: [] for title in SECTIONS}
    for group, runs in runs_of(games).groupby(GROUP, sort=False):
        names = names_of(*group)
        scores = [mean_and_std(runs[column]) for column in ("score", "best", "training")]
        normalized = mean_and_std(runs.normalized) if suite_of(group[0]) == ATARI else "-"
        tables["Scores"].append((*names, len(runs), *scores, normalized))
        if runs.success.notna().any():
            rate, interval = bootstrap(lambda rates: rates.mean(axis=(0, 1)), runs.success.to_numpy()[:, None, None], args)
            steps = runs.steps_to_success.fillna(math.inf).median()
            reached = f"{runs.steps_to_success.count()} of {len(runs)}", "not reached" if steps == math.inf else f"{steps:.0f}"
            tables["Success"].append((*names, len(runs), f"{rate[0]:.3f}", interval_text(interval), *reached))
        if runs.total_cost.notna().any():
            costs = [mean_and_std(runs[column]) for column in ("total_cost", "games", "violations")]
            limit = number(runs.cost_limit.iloc[0]) if runs.cost_limit.iloc[0] < math.inf else "none"
            tables["Cost"].append((*names, len(runs), limit, *costs))
    for (*group, step), rows in resets.groupby([*GROUP, "step"], sort=False):
        columns = ("score", "cost", "training", "training_cost")
        means = [rows[[f"{column}_before", f"{column}_after"]].mean() for column in columns]
        if not means[1].isna().all() or not means[3].isna().all():
            pairs = [" → ".join("-" if math.isnan(mean) else number(mean) for mean in pair) for pair in means]
            tables["Return and cost of every reset"].append((*names_of(*group), step, len(rows), *pairs))
    for collapse in collapses.itertuples():
        undefined = int(np.isnan(collapse.of_seeds).sum())
        ratio = "not defined" if math.isnan(collapse.ratio) else number(collapse.ratio, () if undefined else collapse.of_seeds)
        if undefined and not math.isnan(collapse.ratio):
            ratio += f", not defined for {undefined} of {len(collapse.of_seeds)} seeds"
        cells = (collapse.source, collapse.resets, number(collapse.before), number(collapse.after), ratio)
        interval = "not defined" if undefined else interval_text(collapse.interval)
        tables["Collapse of a reset"].append((*names_of(*collapse[1:4]), *cells, interval))
    for (suite, replay_ratio, method), rows in shared.groupby(["suite", "replay_ratio", "method"], sort=False):
        final = final_scores(rows)
        iqm, interval = bootstrap(interquartile_means, final[..., np.newaxis], args)
        cells = (*final.shape[::-1], f"{iqm[0]:.3f}", interval_text(interval))
        tables["Over games"].append((f"{suite}, {SCORE_NAMES[suite]}", f"{replay_ratio:g}", method, *cells))
    for replay_ratio, *names, num_games, point, interval in improvements_of(games, args):
        row = (f"{replay_ratio:g}", *names, num_games, f"{point[0]:.3f}", interval_text(interval))
        tables["Probability of improvement"].append(row)
    runs, title = runs_of(games), "Published scores, beside training games"
    for env_id in sorted(games.env_id.unique()):
        published, own = references[references.game == game_name(env_id)], runs[runs.env_id == env_id]
        rows = [(f"{m}, replay ratio {r:g}", rows.training.mean()) for (_, r, m), rows in own.groupby(GROUP, sort=False)]
        rows += [(f"{method} (published)", score) for method, score in zip(published.method, published.score)]
        for whose, score in rows if len(published) else []:
            normalized = f"{normalized_score(env_id, score):.3f}" if suite_of(env_id) == ATARI else "-"
            tables[title].append((game_name(env_id), whose, number(score), normalized))
    for (suite, replay_ratio), rows in shared.groupby(["suite", "replay_ratio"]) if tables[title] else []:
        levels = published_levels(rows, references)
        own = [rows[rows.method == method] for method in methods_of(rows) if levels]
        means = [final_scores(one, "normalized_training").mean(axis=0, keepdims=True) for one in own]  # (1, games)
        iqms = [interquartile_means(scores[..., np.newaxis])[0] for scores in means]
        names = [f"{one.method.iloc[0]}, replay ratio {replay_ratio:g}" for one in own]
        levels = [*zip(names, iqms), *((f"{method} (published)", iqm) for method, iqm in levels.items())]
        tables[title] += [(f"IQM of {rows.env_id.nunique()} games", whose, "-", f"{iqm:.3f}") for whose, iqm in levels]
    return tables


# ------------------------------------------------------------------------------------------------------------ pictures

# Okabe and Ito's colours, which colour-blind people can tell apart; dashes tell the methods apart in grey as well.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#007F5F", "#A8487F", "#B37400", "#2A8CC0"
GREY, OTHER_COLORS = "#555555", (PURPLE, ORANGE, SKY, "#000000", "#7F4F24", "#6A51A3")
COLORS = {prefix + base: color for base in ("DQN", "SAC", "Safe SAC", "RND-DQN")
          for prefix, color in (("", BLUE), ("SR+", VERMILLION), ("RDE+", GREEN), ("Ensemble+", PURPLE))}  # fmt: skip
DASHES = {BLUE: (0, (5, 2)), VERMILLION: (0, (1.5, 1.2)), PURPLE: (0, (5, 1.5, 1, 1.5)), ORANGE: (0, (8, 2)), GREY: (0, (3, 2))}
FILE_METADATA = {"png": {"Software": None}, "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
                 "svg": dict.fromkeys(("Creator", "Date"))}  # without the time and matplotlib's version  # fmt: skip


def colors_of(methods: list[str]) -> dict[str, str]:
    """The first version of a known method has the method's own colour."""
    first = {method.partition("@")[0]: method for method in reversed(methods) if method.partition("@")[0] in COLORS}
    known = {method: COLORS[name] for name, method in first.items()}
    colors = [color for color in OTHER_COLORS if color not in known.values()]
    return known | {method: colors[i % len(colors)] for i, method in enumerate(sorted(set(methods) - set(known)))}


def set_style() -> None:
    plt.rcdefaults()
    plt.rcParams |= {
        "font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "#e4e4e4", "axes.axisbelow": True, "savefig.dpi": 200, "svg.hashsalt": "benchmark", "pdf.fonttype": 42,
        "text.parse_math": False, "axes.titlelocation": "left", "legend.frameon": False, "legend.labelcolor": "linecolor",
    }  # fmt: skip


def new_figure(num_panels: int, num_levels: int = 0, height: float = 3.2, width: float = 3.9) -> list[plt.Axes]:
    """Panels side by side, at most 2 in a row, with room for the names of so many levels (lines besides the methods')."""
    columns = min(2, num_panels)
    height, width = max(height, 0.21 * num_levels + 1.6 * bool(num_levels)), width + bool(num_levels)
    rows = math.ceil(num_panels / columns)
    size = (width * columns + 0.4, height * rows + 0.2)
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for empty in axes.flat[num_panels:]:
        empty.set_axis_off()
    return list(axes.flat[:num_panels])


def draw_curve(axes: plt.Axes, x, y, interval: np.ndarray | None, color: str, label: str = "") -> None:
    axes.plot(x, y, color=color, linewidth=1.8, linestyle=DASHES.get(color, "-"), label=label)
    if interval is not None:
        axes.fill_between(x, *interval, color=color, alpha=0.1, linewidth=0)
        axes.plot(x, interval.T, color=color, alpha=0.5, linewidth=0.6)


def finish(figure: plt.Figure, *notes: str) -> plt.Figure:
    separator = " · " if figure.get_figwidth() > 6 else "\n"  # a single panel is narrow
    figure.supxlabel(separator.join(filter(None, notes)), fontsize=9, color=GREY)
    return figure


def finish_steps(axes: plt.Axes, last_step: float, ends: dict, levels: dict[str, float], colors: dict[str, str]) -> None:
    """Levels (a published score, a limit) as lines, and all names to the right of their lines' ends, pushed apart there."""
    levels = {f"{name} (published)" if name in ends else name: level for name, level in levels.items()}
    axes.set_xlim(0, last_step)
    axes.xaxis.set_major_locator(plt.MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}")
    axes.set_xlabel("environment steps (thousands)")
    for level in levels.values():
        axes.plot([0, last_step], [level, level], color=GREY, linewidth=0.8, linestyle=DASHES[GREY])
    ends, colors = ends | {name: (last_step, level) for name, level in levels.items()}, dict.fromkeys(levels, GREY) | colors
    axes.figure.draw_without_rendering()  # the layout decides how many pixels a line of text is worth
    bottom, top = axes.get_ylim()
    line = (top - bottom) * 15 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    order = sorted(ends, key=lambda name: (ends[name][1], method_order(name)))
    heights = [ends[name][1] for name in order]
    for _ in range(200):
        for i in range(len(heights) - 1):
            if (overlap := line - (heights[i + 1] - heights[i])) > 0:
                heights[i], heights[i + 1] = heights[i] - overlap / 2, heights[i + 1] + overlap / 2
        heights = [min(max(height, bottom + line / 2), top - line / 4) for height in heights]
    for name, height in zip(order, heights):
        line_to_end = {"arrowstyle": "-", "color": colors[name], "lw": 0.7, "shrinkA": 0, "shrinkB": 1}
        axes.annotate(name, ends[name], (1.03, height), textcoords=("axes fraction", "data"), color=colors[name], va="center",
                      fontsize=8 if name in levels else 11, arrowprops=line_to_end, annotation_clip=False)  # fmt: skip


PICTURES = {  # of a game: what its curves are made of, columns with the names of their axes, whether intervals are drawn
    "learning_curves": (evaluation_curve, {"score": "score of the evaluations"}, False),
    "training_games": (training_curve, {"score": "return of the training games"}, False),
    "success_curves": (evaluation_curve, {"success": "success in the evaluations"}, True),
    "cost_curves": (training_curve, {"score": "return of the training games", "cost": "cost of the training games"}, True),
}


def plot_game(picture: str, games: pd.DataFrame, references: pd.DataFrame, args: Args) -> plt.Figure:
    """A panel for every replay ratio and column."""
    curve_of, columns, with_intervals = PICTURES[picture]
    name, methods, replay_ratios = game_name(games.env_id.iloc[0]), methods_of(games), sorted(games.replay_ratio.unique())
    published = references[references.game == name] if picture == "training_games" else references[:0]
    panels = new_figure(len(replay_ratios) * len(columns), len(published))
    notes = dict.fromkeys(["moving mean over a tenth of the run"] * (curve_of is training_curve))  # a set, in order
    notes |= dict.fromkeys(["bands: 95 % bootstrap intervals"] * with_intervals)
    for axes, (replay_ratio, column) in zip(panels, itertools.product(replay_ratios, columns)):
        shown, ends = games[games.replay_ratio == replay_ratio], {}
        for method in methods_of(shown):
            steps, scores, dips = curve_of(shown[shown.method == method], column)
            mean, interval, color = scores.mean(axis=0), None, colors_of(methods)[method]  # where every seed has some games
            if with_intervals:
                interval = bootstrap(lambda scores: scores.mean(axis=(0, 1)), scores[:, np.newaxis], args)[1]
            elif len(scores) > 1:
                axes.plot(steps, scores.T, color=color, alpha=0.25, linewidth=0.7)
                notes["thin lines: single seeds"] = None
            draw_curve(axes, steps, mean, interval, color)
            axes.plot(steps[dips], mean[dips], "v", color=color, markersize=6, mec="white", mew=0.6, zorder=3)
            notes |= dict.fromkeys(["▼ right after a reset"] * any(dips))
            if len(known := np.flatnonzero(np.isfinite(mean))):
                ends[method] = (steps[known[-1]], mean[known[-1]])
        levels = dict(zip(published.method, published.score))
        if column == "cost":
            levels = {f"limit {limit:g}": limit for limit in shown.cost_limit.unique() if limit < math.inf}
        axes.set_title(f"{name}, replay ratio {replay_ratio:g}")
        axes.set_ylabel(columns[column])
        finish_steps(axes, max(1, shown.step.max()), ends, levels, colors_of(methods))
        notes |= dict.fromkeys(["grey: published scores, by the papers' evaluations"] * len(published))
    return finish(axes.figure, *notes)


def panels_over_games(shared: pd.DataFrame, num_levels: int = 0) -> Iterator[tuple]:
    """For every suite and replay ratio: a panel, the name of its scale, its games, the colours of its methods."""
    groups = list(shared.groupby(["suite", "replay_ratio"]))
    for axes, ((suite, replay_ratio), rows) in zip(new_figure(len(groups), num_levels), groups):
        num_games = rows.env_id.nunique()
        axes.set_title(f"{num_games} game{'s' * (num_games > 1)}, replay ratio {replay_ratio:g}")
        yield axes, SCORE_NAMES[suite], rows, colors_of(methods_of(rows))


def plot_over_games(curve_of, shared: pd.DataFrame, references: pd.DataFrame, args: Args) -> plt.Figure:
    """The interquartile means of the evaluations, or (over the games' means, as the published ones) of the training games."""
    of_training = curve_of is training_curve
    function = lambda scores: interquartile_means(scores.mean(axis=0, keepdims=True) if of_training else scores)
    for axes, scale, rows, colors in panels_over_games(shared, references.method.nunique() if of_training else 0):
        ends = {}
        for method in reversed(methods_of(rows)):  # dashed lines on top of whole ones
            steps, scores = curves_over_games(curve_of, rows[rows.method == method])
            if len(steps):
                iqm, interval = bootstrap(function, scores, args)
                draw_curve(axes, steps, iqm, interval, colors[method])
                ends[method] = (steps[-1], iqm[-1])
        axes.set_ylabel(f"IQM of {scale}" + ",\ntraining games" * of_training)
        levels = published_levels(rows, references) if of_training else {}
        finish_steps(axes, max(1, rows.step.max()), ends, levels, colors)
    notes = ("without the evaluations right after a reset", "grey: published scores, by the papers' evaluations")
    return finish(axes.figure, "bands: 95 % bootstrap intervals", notes[of_training])


def plot_performance_profiles(shared: pd.DataFrame, args: Args) -> plt.Figure:
    for axes, scale, rows, colors in panels_over_games(shared):
        final = {method: final_scores(rows[rows.method == method]) for method in methods_of(rows)}
        low, high = min(scores.min() for scores in final.values()), max(scores.max() for scores in final.values())
        room_for_names = 0.5 * (high - low) or 0.5  # above the right end, where every profile is at 0
        thresholds = np.linspace(low - 0.1 * room_for_names, high + room_for_names, 401)
        for method in reversed(final):  # dashed lines on top of whole ones
            profile, interval = bootstrap(lambda scores: fractions_above(scores, thresholds), final[method], args)
            draw_curve(axes, thresholds, profile, interval, colors[method], method)
        axes.legend(loc="upper right", reverse=True, borderaxespad=0)
        axes.set(xlabel=f"final {scale}", ylabel="fraction of runs above", xlim=thresholds[[0, -1]], ylim=(0, 1.03))
        axes.xaxis.set_major_locator(plt.MaxNLocator(5))
    return axes.figure


def plot_collapse(source: str, collapses: pd.DataFrame) -> plt.Figure:
    """Games from top to bottom; a small circle is a seed, the large marker all seeds together, with its interval."""
    collapses = collapses[(collapses.source == source) & collapses.ratio.notna()]
    env_ids, replay_ratios, methods = sorted(set(collapses.env_id)), sorted(set(collapses.replay_ratio)), methods_of(collapses)
    colors = colors_of(methods)
    long = max(len(game_name(env_id)) for env_id in env_ids)
    panels = new_figure(len(replay_ratios), height=1.3 + 0.5 * len(env_ids), width=3.9 + 0.08 * max(0, long - 10))
    for axes, replay_ratio in zip(panels, replay_ratios):
        axes.vlines(1, -0.5, len(env_ids) - 0.5, color=GREY, linewidth=1, linestyle=DASHES[GREY])  # below the labels
        for collapse in collapses[collapses.replay_ratio == replay_ratio].itertuples():
            env_id, i, color = collapse.env_id, methods.index(collapse.method), colors[collapse.method]
            on_top = {"clip_on": False, "zorder": 3}  # a marker at 0 lies on the axis
            y = env_ids.index(env_id) + 0.5 * ((i + 0.5) / len(methods) - 0.5)
            if collapse.interval is not None:
                axes.plot(collapse.interval.ravel(), [y, y], color=color, linewidth=1, **on_top)
            axes.plot([collapse.ratio], [y], "sD^o"[i % 4], color=color, markersize=8, mec="white", **on_top)
            seeds = collapse.of_seeds[np.isfinite(collapse.of_seeds)]
            if len(collapse.of_seeds) > 1:
                axes.plot(seeds, [y] * len(seeds), "o", color="white", markersize=4, mec=color, mew=1, **on_top)
            if suite_of(env_id) == ATARI and (random_score := RANDOM_AND_HUMAN_SCORES[game_name(env_id)][0]) > 0:
                axes.plot([random_score / collapse.before], [y], "|", color=GREY, markersize=10)
        for i, method in enumerate(methods):
            axes.plot([], [], "sD^o"[i % 4], color=colors[method], markersize=7, mec="white", label=method)
        axes.legend(loc="upper left", ncols=len(methods), handletextpad=0, columnspacing=0.8, borderaxespad=0, fontsize=9)
        axes.set_title(f"replay ratio {replay_ratio:g}")
        axes.set_yticks(range(len(env_ids)), [game_name(env_id) for env_id in env_ids])
        axes.set(xlim=(0, max(1.1, axes.get_xlim()[1])), ylim=(len(env_ids) - 0.5, -0.85))
        axes.set_xlabel("score right after / right before a reset")
        axes.grid(axis="y", visible=False)
    notes = ["small circles: single seeds"] * any(collapses.of_seeds.map(len) > 1)
    notes += ["grey bar: a random player"] * any(suite_of(env_id) == ATARI for env_id in env_ids)
    return finish(axes.figure, f"by the {source}", *notes, "dashed line: no collapse")


# ---------------------------------------------------------------------------------------------------------------- main


def read_references(path: str | None) -> pd.DataFrame:
    """Published scores: game, method, score. Whatever is wrong with the file ends the program."""
    names, rows = ["game", "method", "score"], []
    if path is not None and not os.path.isfile(path):
        fail(f"--references {path} is not a file")
    try:
        with open(path or os.devnull, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(line for line in file if not line.startswith("#")):
                rows.append((clean(row["game"]), clean(row["method"]), float(row["score"])))
                if not abs(rows[-1][2]) <= 1e15:
                    raise ValueError
        if path is not None and not rows:
            raise ValueError
    except OSError as error:
        fail(f"--references {path} cannot be read: {error.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error):
        fail(f"--references {path}: row {len(rows) + 1} is not one of the columns game, method and score (a number)")
    return pd.DataFrame(rows, columns=names).drop_duplicates(["game", "method"])


def save(content: plt.Figure | str, args: Args, name: str) -> str:
    path = os.path.join(args.out_dir, name if isinstance(content, str) else f"{name}.{args.picture_format}")
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a regular file", path)
    if isinstance(content, str):
        with open(path, "w", encoding="utf-8") as file:
            file.write(content)
    else:
        content.savefig(path, metadata=FILE_METADATA[args.picture_format])
        plt.close(content)
    return path


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not os.path.isdir(args.runs_dir):
        fail(f"--runs-dir {args.runs_dir} is not a folder")
    for name, low, high in (("bootstrap_samples", 1, 100_000), ("seed", 0, 2**32 - 1), ("reset_window", 1, 10**15)):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be from {low:,} to {high:,}")
    references = read_references(args.references)
    games, left_out, notes = read_games(args.runs_dir, args.merge_versions)
    for line in [f"left out: {line}" for line in left_out] + notes:
        print(line, file=sys.stderr)
    if games.empty:
        fail(f"there is no finished run in {args.runs_dir}")
    args.out_dir = args.out_dir or os.path.join(args.runs_dir, "results")
    try:
        table = write_all(games, left_out, notes, references, args)
    except OSError as error:
        fail(f"--out-dir {args.out_dir} cannot be written: {error.strerror}: {error.filename}")
    print(table)
    print(f"written to {args.out_dir}")


def write_all(games: pd.DataFrame, left_out: list[str], notes: list[str], references: pd.DataFrame, args: Args) -> str:
    """Writes the files of the study, and returns its table."""
    os.makedirs(args.out_dir, exist_ok=True)
    for name, rows in csv_tables(games).items():
        save(rows.to_csv(index=False, float_format="%.10g", lineterminator="\n"), args, name)
    shared, other_notes = comparable(games)
    resets = resets_of(games, args.reset_window)
    collapses = collapses_of(resets, args)
    without_scale = sorted({game_name(env_id) for env_id in games.env_id.unique() if suite_of(env_id) is None})
    notes = [*notes, *other_notes, *(f"{name}: no scale in common with other games" for name in without_scale)]
    tables = tables_of(games, shared, resets, collapses, references, args)
    table = table_text(tables, notes, games.run.nunique(), left_out, args)
    save(table, args, "table.md")
    set_style()
    names = {}  # of files: different games may look the same there
    for env_id, rows in games.groupby("env_id"):
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", game_name(env_id))[:100]
        names[name] = names.get(name, 0) + 1
        name += f"_{names[name]}" * (names[name] > 1)
        for picture, (curve_of, columns, _) in PICTURES.items():
            kind = rows[(rows.phase == "training") == (curve_of is training_curve)]
            if kind[list(columns)].notna().any().all():
                save(plot_game(picture, rows, references, args), args, f"{picture}_{name}")
    if len(shared):
        save(plot_over_games(evaluation_curve, shared, references, args), args, "aggregate_curves")
        save(plot_performance_profiles(shared, args), args, "performance_profiles")
        if any(published_levels(rows, references) for _, rows in shared.groupby(["suite", "replay_ratio"])):
            save(plot_over_games(training_curve, shared, references, args), args, "aggregate_training_games")
    for source, name in (("evaluations", "collapse"), ("training games", "collapse_training_games")):
        if collapses[collapses.source == source].ratio.notna().any():
            save(plot_collapse(source, collapses), args, name)
    return table


if __name__ == "__main__":
    main()
