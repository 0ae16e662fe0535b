"""The table and the pictures of a study: reads run folders, writes CSV, Markdown and pictures.

    python plot_benchmark.py --runs-dir runs/benchmark

writes into --out-dir table.md, results.csv (a row for every evaluation), training_games.csv, and the pictures: of every game
learning_curves (evaluations), training_games; where logged, success_curves, cost_curves, cost_evaluations; over games (interquartile
means) aggregate_curves, aggregate_training_games, performance_profiles; of resets collapse and collapse_training_games.

Only finished runs count (they have model.pt and a complete "final" evaluation); every other folder is named, with the reason.
All is computed from one table with a row for every game that was played (read_games). The statistics are those of Agarwal et
al., "Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021, by rliable. The same runs give the same files.
"""

import io
import itertools
import json
import math
import os
import pathlib
import re
import sys
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tyro
from rliable import library, metrics
from scipy import stats


@dataclass
class Args:
    runs_dir: str = "runs/benchmark"
    """the folder of the run folders; those in its subfolders are read as well"""
    out_dir: str | None = None
    """where the files are written; by default the subfolder results of --runs-dir"""
    references: str | None = None
    """a CSV file of published scores (columns game, method, score), listed and (over games) drawn beside training games"""
    merge_versions: bool = False
    """take the runs of a method as one, even if different versions of its script made them"""
    reset_window: int = 2_000
    """environment steps before and after a reset whose training games are compared"""
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

# Suites: scores are averaged over games only within one, on its own scale.
ATARI, DMC = "Atari, human-normalized score", "DeepMind Control, score / 1,000"


def game_name(env_id: str) -> str:
    return env_id.removesuffix("NoFrameskip-v4")


def suite_of(env_id: str) -> str | None:
    """Atari-100k, DeepMind Control (domain-task, without a version), or None: no common scale."""
    if game_name(env_id) in RANDOM_AND_HUMAN_SCORES:
        return ATARI
    return DMC if re.fullmatch(r"[a-z0-9_]+-(?!v\d+$)[a-z0-9_]+", env_id) else None


def normalized_score(env_id: str, score):
    """On the scale of its suite: (score - random) / (human - random), or score / 1,000. Of a score or of an array of them."""
    random_score, human_score = RANDOM_AND_HUMAN_SCORES.get(game_name(env_id), (0, 1000))
    return (score - random_score) / (human_score - random_score)


# ------------------------------------------------------------------------------------------------- from folders to games

GROUP = ["env_id", "replay_ratio", "method"]  # the columns that the seeds of a method share
RUN = [*GROUP, "seed", "run"]
RUN_FOLDER = re.compile(r".+__.+__-?\d+__\d{8}-\d{6}")  # <env_id>__<exp_name>__<seed>__<start time>
# Scripts and methods of benchmark.sh. A method with options of its own has an --exp-name that goes on with them.
BASES = {"dqn": "DQN", "dqn_atari": "DQN", "sac": "SAC", "sac_dmc": "SAC", "sac_lag": "SAC-Lag",
         "sac_safety": "SAC-Lag", "rnd_dqn": "RND-DQN", "rnd_dqn_atari": "RND-DQN", "drq": "DrQ",
         "drq_atari": "DrQ"}  # fmt: skip
PREFIXES = ["", "SR", "Ensemble", "RDE"]  # in the order of the tables
# What may differ between the seeds of a method: it does not change what is computed.
INCIDENTAL = {"seed", "exp_name", "runs_dir", "resume", "allow_changed_script", "check_only", "checkpoint_interval",
              "keep_models", "cuda", "cuda_graphs", "torch_deterministic", "track", "wandb_project_name", "wandb_entity",
              "capture_video"}  # fmt: skip
KINDS = {"env_id": [str], "exp_name": [str], "seed": [int], "replay_ratio": [int, float], "total_timesteps": [int],
         "eval_episodes": [int], "reset_interval": [int], "num_agents": [int], "cost_limit": [int, float]}  # fmt: skip
OPTIONAL = {"reset_interval": 0, "num_agents": 1, "cost_limit": math.inf}  # not every method has them
EPISODE_COLUMNS = ["global_step", "episodic_return", "episodic_length", "wall_seconds"]
KINDS_OF_COLUMNS = {"global_step": int, "episode": int, "episodic_return": float, "episodic_length": int, "wall_seconds": float,
                    "phase": pd.CategoricalDtype(["scheduled", "before_reset", "after_reset", "final"]),
                    "success": pd.CategoricalDtype([0.0, 1.0]), "cost": float}  # fmt: skip


def clean(text: str) -> str:
    """What cannot be written in one line, or not at all (half a surrogate pair), as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def method_label(args: dict) -> str:
    """DQN, SR+DQN, RDE+SAC-Lag kappa 1: by what the arguments do. Any other --exp-name is a method of that name."""
    name = re.sub("^(sr|rde)_", "", args["exp_name"])
    base = max((base for base in BASES if f"{name}_".startswith(f"{base}_")), key=len, default=None)
    if base is None:
        return args["exp_name"]
    prefix = ("RDE+" if args["num_agents"] > 1 else "SR+") if args["reset_interval"] else "Ensemble+" * (args["num_agents"] > 1)
    return prefix + BASES[base] + name.removeprefix(base).replace("_", " ")


def rank_of(label: str) -> int:
    """Place of a method's prefix in PREFIXES; the methods that are not those of the scripts as they are come last."""
    prefix, _, base = label.partition("@")[0].rpartition("+")  # a version of the script stands after the @
    return PREFIXES.index(prefix) if base in BASES.values() and prefix in PREFIXES else len(PREFIXES)


def methods_of(rows: pd.DataFrame) -> list[str]:
    return sorted(rows.method.unique(), key=lambda label: (rank_of(label), label))


def read(folder: str, name: str, parse):
    """`parse` of a file's text. Why a run folder is left out is a ValueError, here and in the functions below."""
    path = pathlib.Path(folder, name)
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError(f"{name} is missing, or not a regular file")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {clean(str(error))[:200]}") from None


def parse_args(text: str) -> tuple[dict, str, str]:
    """The arguments of a run, those of them that its seeds must have in common, and the version of its script."""
    content = json.loads(text)
    args = OPTIONAL | {name: value for name, value in content["args"].items() if value is not None}
    version = clean(str(content.get("script_sha256") or "unknown"))[:7]
    for name, kinds in KINDS.items():
        value, most = args.get(name), math.inf if name == "cost_limit" else 1e18
        if type(value) not in kinds or kinds != [str] and not abs(value) <= most:
            raise ValueError(f"no {name}, or one of a wrong kind")
    # Without resets it says nothing what they do, for one agent nothing is chosen.
    idle = ["reset_depth", "shrink"] * (not args["reset_interval"]) + ["beta", "beta_cost", "kappa"] * (args["num_agents"] == 1)
    settings = {name: str(value) for name, value in args.items() if name not in INCIDENTAL.union(idle)}
    return args, json.dumps(settings, sort_keys=True), version


def parse_rows(text: str, columns: list[str]) -> pd.DataFrame:
    """success and cost are NaN where the file does not have them."""
    rows = pd.read_csv(io.StringIO(text), dtype=KINDS_OF_COLUMNS)
    if [*rows] != [*columns, *rows.columns.intersection(["success", "cost"])] or rows.index.nlevels > 1:
        raise ValueError(f"it does not begin with {','.join(columns)}")
    too_large = (rows.select_dtypes("number").abs() > 1e15).any(axis=1)  # sums would overflow
    wrong = rows.isna().any(axis=1) | too_large | (rows.global_step < 0)
    wrong |= (rows.index == len(rows) - 1) & (not text.endswith("\n"))
    if wrong.any():
        raise ValueError(f"line {wrong.argmax() + 2} is cut off, or a value in it is not allowed")
    return rows.reindex(columns=[*columns, "success", "cost"]).astype({"success": float})


def parse_evaluations(text: str, num_episodes: int) -> pd.DataFrame:
    """A row for every game of evaluations.csv; `evaluation` counts the evaluations."""
    rows = parse_rows(text, ["global_step", "phase", "episode", "episodic_return"]).astype({"phase": str})
    whole, own = len(rows) // num_episodes, rows[["global_step", "phase"]]
    rows["evaluation"], place = np.divmod(np.arange(len(rows)), num_episodes)
    first = own.groupby(rows.evaluation).transform("first")
    before = first.shift(num_episodes)  # of the evaluation before
    has_before = (first.global_step == before.global_step) & (before.phase == "before_reset")
    wrong = (own != first).any(axis=1) | (rows.episode != place) | (first == before).all(axis=1)
    wrong |= (first.global_step < before.global_step) | (first.phase == "after_reset") & ~has_before
    wrong |= rows.evaluation == whole  # that is there only if it is incomplete
    if wrong.any():
        raise ValueError(f"line {wrong.argmax() + 2}: an evaluation is cut off, doubled, out of order, or misses before_reset")
    return rows


def read_run(folder: str, name: str) -> dict:
    """A finished run: the columns RUN, its settings and version, and its games as a table."""
    args, settings, version = read(folder, "args.json", parse_args)
    if not os.path.isfile(os.path.join(folder, "model.pt")):  # what the training scripts call finished
        raise ValueError("not finished: there is no model.pt")
    evaluations = read(folder, "evaluations.csv", lambda text: parse_evaluations(text, args["eval_episodes"]))
    final = evaluations[evaluations.phase == "final"]
    if set(final.evaluation) != {evaluations.evaluation.max()} or final.global_step.max() < args["total_timesteps"]:
        raise ValueError("damaged: there is a model.pt, but no final evaluation at the end")
    episodes = read(folder, "episodes.csv", lambda text: parse_rows(text, EPISODE_COLUMNS))
    episodes = episodes.assign(phase="training", evaluation=-1)
    games = pd.concat([rows for rows in (evaluations, episodes) if len(rows)], join="inner", ignore_index=True)
    games = games.rename(columns={"global_step": "step", "episodic_return": "score"})
    games = games.assign(total_timesteps=args["total_timesteps"], cost_limit=float(args["cost_limit"]))
    identity = (clean(args["env_id"]), float(args["replay_ratio"]), clean(method_label(args)), args["seed"], name)
    return dict(zip(RUN, identity)) | {"settings": settings, "version": version, "games": games}


def read_games(runs_dir: str, merge_versions: bool = False) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The study as one table with a row for every game, a line for every folder that is left out, and notes.

    Columns: RUN; total_timesteps, cost_limit; phase (of the evaluation, or "training"), evaluation (its number; -1: training),
    step (in training: at the game's end), score, normalized (on its suite's scale), success, cost (NaN: not logged).
    """
    runs, left_out, notes, seen = [], [], [], set()  # seen: folders, as links may lead in circles
    for folder, subfolders, files in os.walk(runs_dir, followlinks=True):
        subfolders.sort()
        name, place = clean(os.path.relpath(folder, runs_dir)), os.path.realpath(folder)
        is_run = {"args.json", "evaluations.csv"} & set(files) or RUN_FOLDER.fullmatch(os.path.basename(folder))
        if is_run or place in seen:
            subfolders.clear()
        if is_run and place not in seen:
            try:
                runs.append(read_run(folder, name))
            except ValueError as error:
                left_out.append(f"{name}: {error}")
        seen.add(place)
    if not runs:
        return pd.DataFrame(), sorted(left_out), []
    runs = pd.DataFrame(runs)
    for method, versions in runs.groupby("method").version.unique().items():
        if len(versions) > 1 and not merge_versions:
            runs.loc[runs.method == method, "method"] += "@" + runs.version
            notes.append(f"{method} is of different versions of the script: {', '.join(f'@{one}' for one in sorted(versions))}")
    # The seeds of a method must have the same arguments. Of several sets of them the one with most runs is kept.
    usual = runs.groupby(GROUP).settings.transform(lambda settings: Counter(settings).most_common(1)[0][0])
    for run, settings in zip(runs[runs.settings != usual].itertuples(), usual[runs.settings != usual]):
        own, most = json.loads(run.settings), json.loads(settings)
        names = [name for name in sorted(own | most) if own.get(name) != most.get(name)]
        differences = ", ".join(f"{name} {str(own.get(name))[:60]} instead of {str(most.get(name))[:60]}" for name in names)
        left_out.append(f"{run.run}: other arguments than most runs of {run.method} there: {clean(differences)}")
    runs = runs[runs.settings == usual].sort_values("run")
    left_out += [f"{run}: another run of the same seed counts" for run in runs.run[runs.duplicated([*GROUP, "seed"])]]
    runs = runs.drop_duplicates([*GROUP, "seed"]).assign(rank=runs.method.map(rank_of))
    runs = runs.sort_values(["env_id", "replay_ratio", "rank", "method", "seed"])
    games = pd.concat([run.games.assign(**run[RUN]) for _, run in runs.iterrows()], ignore_index=True)
    games["normalized"] = [normalized_score(env_id, score) for env_id, score in zip(games.env_id, games.score)]
    return games, sorted(left_out), notes


# ------------------------------------------------------------------------------------------------ from games to numbers

EVALUATIONS, TRAINING = "evaluations", "training games"


def evaluations_of(games: pd.DataFrame) -> pd.DataFrame:
    """The means over the games. `different`: equal scores are one game played again, unless success is logged (new tasks)."""
    games = games[games.phase != "training"]
    same = games.duplicated(["run", "evaluation", "score"]) & games.success.isna()
    games = games.assign(different=games.score.mask(same))
    by_evaluation = games.groupby([*RUN, "evaluation", "step", "phase"], sort=False)
    means = by_evaluation[["score", "normalized", "success", "cost", "different"]].mean()
    return means.assign(episodes=by_evaluation.size()).reset_index()


def points_of(games: pd.DataFrame, source: str) -> pd.DataFrame:
    """What curves are made of: evaluations, or at the twentieths of a run the means over the last tenth's training games."""
    if source == EVALUATIONS:
        return evaluations_of(games)
    runs, training = games[[*RUN, "phase", "total_timesteps"]].drop_duplicates("run"), games[games.phase == "training"]
    twentieth = np.ceil(20 * training.step / training.total_timesteps)
    windows = pd.concat([training.assign(twentieth=twentieth), training.assign(twentieth=twentieth + 1)])
    means = windows.groupby(["run", "twentieth"])[["score", "normalized", "success", "cost"]].mean()
    points = runs.merge(pd.DataFrame({"twentieth": np.arange(1.0, 21)}), how="cross").join(means, on=["run", "twentieth"])
    return points.assign(phase="training", step=points.twentieth * points.total_timesteps / 20)


def runs_of(games: pd.DataFrame) -> pd.DataFrame:
    """A row for every run: its scores, its success, its cost."""
    evaluations, training = evaluations_of(games), games[games.phase == "training"]
    curve = evaluations[evaluations.phase != "after_reset"].groupby(RUN, sort=False)
    runs = curve[["score", "normalized", "success"]].last().assign(best=curve.score.max())  # the last is the final one
    last = training[training.step > 0.8 * training.total_timesteps].groupby(RUN)  # the last fifth, with its exploration
    runs = runs.assign(training=last.score.mean(), normalized_training=last.normalized.mean(), num_training=last.size())
    runs["steps_to_success"] = evaluations[evaluations.success >= 0.9].groupby(RUN).step.min()  # NaN: not reached
    training = training.assign(violation=training.cost > training.cost_limit).groupby(RUN)
    runs = runs.assign(total_cost=training.cost.sum(min_count=1), violations=training.violation.sum(), games=training.size())
    return runs.join(games.groupby(RUN)[["total_timesteps", "cost_limit"]].first()).reset_index()


def resets_of(games: pd.DataFrame, window: int) -> pd.DataFrame:
    """A row for every reset: mean score and cost right before and right after it, in columns with _before and _after.

    different, cost: of its two evaluations; training_*: of the training games that ended at most `window` steps away.
    """
    evaluations, training = evaluations_of(games), games[games.phase == "training"]
    of_evaluation = evaluations[["different", "cost"]]
    resets = evaluations[RUN + ["step"]].join([of_evaluation.shift().add_suffix("_before"), of_evaluation.add_suffix("_after")])
    resets = resets[evaluations.phase == "after_reset"]
    near = resets[["run", "step"]].drop_duplicates().merge(training, on="run", suffixes=("", "_of_game"))
    distance = near.step_of_game - near.step
    for side, inside in (("before", distance.between(1 - window, 0)), ("after", distance.between(1, window))):
        means = near[inside].groupby(["run", "step"])[["score", "cost"]].mean()
        resets = resets.join(means.add_prefix("training_").add_suffix(f"_{side}"), on=["run", "step"])
    return resets


def collapses_of(resets: pd.DataFrame, args: Args) -> pd.DataFrame:
    """Means before and after the resets of all seeds, by the evaluations and by the training games, and the scores' ratio.

    Of means, as single ratios are noise; NaN where the score before is not positive. With those of the seeds, and an interval.
    """
    ratio_of = lambda sums: np.where(sums[..., 0] > 0, sums[..., 1], math.nan) / sums[..., 0]
    rows = []
    for source, column, cost in ((EVALUATIONS, "different", "cost"), (TRAINING, "training_score", "training_cost")):
        sides = [f"{column}_before", f"{column}_after"]
        for group, of_group in resets.dropna(subset=sides).groupby(GROUP, sort=False):
            sums, seeds = of_group.groupby("seed")[sides].sum().to_numpy(), np.arange(of_group.seed.nunique())[:, np.newaxis]
            ratio, interval = bootstrap(lambda drawn: ratio_of(sums[drawn.ravel()].sum(axis=0, keepdims=True)), seeds, args)
            scores, costs = sums.sum(axis=0) / len(of_group), of_group[[f"{cost}_before", f"{cost}_after"]].mean()
            rows.append((*group, source, len(of_group), *scores, ratio[0], ratio_of(sums), *interval.ravel(), *costs))
    names = "source resets before after ratio of_seeds low high cost_before cost_after"
    return pd.DataFrame(rows, columns=GROUP + names.split())


def comparable(games: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The games that all methods of a suite and replay ratio have, of a method the seeds with all of them; and notes."""
    games, parts = games.assign(suite=games.env_id.map(suite_of)), []
    others = games.env_id[games.suite.isna()].unique()
    notes = [f"{game_name(env_id)}: no scale in common with other games" for env_id in others]
    for (suite, replay_ratio), rows in games.groupby(["suite", "replay_ratio"]):
        where = f"{suite}, replay ratio {replay_ratio:g}"
        shared = rows.groupby("env_id").method.transform("nunique") == rows.method.nunique()
        notes += [f"{where}: {game_name(env_id)} is not finished by every method" for env_id in rows.env_id[~shared].unique()]
        rows = rows[shared]
        complete = rows.groupby(["method", "seed"]).env_id.transform("nunique") == rows.env_id.nunique()
        others = rows[~complete].drop_duplicates(["method", "seed"])
        notes += [f"{where}: {one.method}, seed {one.seed} is not finished in every game" for one in others.itertuples()]
        parts.append(rows[complete].assign(title=f"{suite}\nreplay ratio {replay_ratio:g}, games: {rows.env_id.nunique()}"))
    return pd.concat(parts) if parts else games[:0].assign(title=""), notes


def bootstrap(function, scores: np.ndarray | list[np.ndarray], args: Args) -> tuple[np.ndarray, np.ndarray]:
    """`function` of scores (seeds, games, ...), or of a list of them; its stratified 95 % interval (2, ...), or NaN."""
    arrays = scores if isinstance(scores, list) else [scores]
    if min(map(len, arrays)) < 2:
        return (point := function(*arrays)), np.full((2, *point.shape), math.nan)
    np.random.seed(args.seed)  # rliable draws from the global generator, whatever random_state it is given
    points, intervals = library.get_interval_estimates({"": scores}, function, reps=args.bootstrap_samples)
    return points[""], intervals[""]


def interquartile_means(scores: np.ndarray) -> np.ndarray:
    """Over seeds and games, for every step: (seeds, games, steps) to (steps,). (rliable's aggregate_iqm does one at a time.)"""
    return stats.trim_mean(scores.reshape(-1, scores.shape[-1]), 0.25, axis=0)


def final_scores(games: pd.DataFrame, column: str = "normalized") -> np.ndarray:
    """Of one method: (seeds, games), of the seeds that every game has."""
    return runs_of(games).pivot(index="seed", columns="env_id", values=column).dropna().to_numpy()


def iqms_over_games(scores: pd.DataFrame, env_ids: np.ndarray) -> dict[str, float]:
    """Interquartile means over games, of the methods that have all of them (columns env_id, method, normalized)."""
    of_methods = scores[scores.env_id.isin(env_ids)].groupby("method", sort=False).normalized
    return of_methods.agg(lambda values: stats.trim_mean(values, 0.25))[of_methods.size() == len(env_ids)].to_dict()


# ---------------------------------------------------------------------------------------------------------- CSV, table


def csv_tables(games: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """results.csv and training_games.csv."""
    runs, extra = runs_of(games), [column for column in ("success", "cost") if games[column].notna().any()]
    last = runs.dropna(subset="training").drop(columns=["score", "normalized", "success"])
    last = last.rename(columns={"training": "score", "normalized_training": "normalized", "total_timesteps": "step"})
    last = last.assign(phase="training", episodes=last.num_training.astype(int))
    results = pd.concat([evaluations_of(games), last]).set_index("run").loc[runs.run].reset_index()
    results["human_normalized_score"] = results.normalized.where(results.env_id.map(suite_of) == ATARI)
    names = ["env_id", "method", "replay_ratio", "seed", "step"]
    results = results[["run", *names, "phase", "episodes", "score", *extra, "human_normalized_score"]]
    training = games[games.phase == "training"][[*names, "score", *extra]].rename(columns={"score": "episodic_return"})
    files = {"results.csv": results, "training_games.csv": training}
    return {name: rows.rename(columns={"step": "global_step"}) for name, rows in files.items()}


def number(value: float, spread=()) -> str:
    """Three digits or so (1234, 123, 12.3, 1.23, 0.012), ± the standard deviation of `spread` if that holds at least two."""
    if not math.isfinite(value):
        return "-"
    decimals = 2 if value == 0 else max(0, min(3, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}" + (f" ± {np.std(spread, ddof=1):.{decimals}f}" if len(spread) > 1 else "")


def estimate(function, scores: np.ndarray | list[np.ndarray], args: Args) -> tuple[str, str]:
    """A number, and its interval."""
    point, interval = bootstrap(function, scores, args)
    return f"{point[0]:.3f}", "-" if np.isnan(interval).any() else "{:.3f} to {:.3f}".format(*interval.ravel())


GAME = "game | replay ratio | method"
SECTIONS = {  # title: columns, text
    "Scores": (f"{GAME} | seeds | final score | best score | training games | final, human-normalized", """\
Mean ± standard deviation over seeds, each seed the mean of its evaluation's games. Final is the evaluation at the end; best is
the highest one, picked afterwards, and so biased upwards. Training games: those that ended in the last fifth, with exploration;
where they differ much from the evaluations, a single evaluation says little."""),
    "Over games": ("scale | replay ratio | method | games | seeds | IQM | 95 % interval", """\
Interquartile mean of the final scores over all games and seeds, with its 95 % interval by the bootstrap stratified over games
({args.bootstrap_samples} samples). An interval needs 2 seeds."""),
    "Probability of improvement": ("replay ratio | method | over | games | probability | 95 % interval", """\
How probably a run of the reset ensemble ends with a better evaluation than one of the other method (a tie is half of it), mean
over the games that both have, with its interval by the same bootstrap."""),
    "Collapse of a reset": (f"{GAME} | of | resets | before | after | after / before | 95 % interval", """\
Mean score right before and right after the resets of all seeds, and after / before (± standard deviation over seeds; 1 is no
collapse) with its interval by the bootstrap over seeds; without a number where a score before is not positive. Equal scores in
an evaluation count once (without exploration they are one game, played again), except where success is logged. Training games:
those that ended in the {args.reset_window:,} steps before and after; resets without some on both sides do not count."""),
    "Success": (f"{GAME} | seeds | final success | 95 % interval | reached 90 % | steps to 90 %", """\
Rate of success in the final evaluation, mean over seeds; steps to the first one with 90 %, median (inf: not reached)."""),
    "Cost": (f"{GAME} | seeds | limit | total cost | episodes | above the limit", """\
Mean ± standard deviation over seeds: the cost of the whole training, its episodes, and those with a cost above the limit."""),
    "Cost around a reset": (f"{GAME} | of | resets | cost before | cost after", "Means, as in the section on collapse."),
    "Published scores, beside training games": ("game | whose | score | human-normalized", """\
Published scores stand beside the TRAINING games of this study (the last fifth, with exploration), not beside its evaluations:
the RDE paper's go on with training games, others explore a little. Over games: the interquartile mean of the games' means."""),
}  # fmt: skip


def table_text(tables: dict[str, list], notes: list[str], num_runs: int, left_out: list[str], args: Args) -> str:
    """table.md. In a name, | would begin a cell and $ a formula."""
    text, formats = "", {"game": game_name, "replay ratio": "{:g}".format}
    as_text = lambda cell: number(cell) if isinstance(cell, float) else re.sub(r"[\\|$]", r"\\\g<0>", str(cell))
    for title, (columns, description) in SECTIONS.items():
        rows = pd.DataFrame(tables[title], columns=columns.split(" | "))
        rows = rows.apply(lambda column: column.map(formats.get(column.name, lambda cell: cell)).map(as_text))
        parts = [rows.to_markdown(index=False, disable_numparse=True)] if len(rows) else []
        parts += ["\n".join(f"- {note}" for note in notes)] if notes and title == "Over games" else []
        text += "\n\n".join([f"## {title}", description.format(args=args), *parts, ""]) if parts else ""
    return text + "\n".join([f"{num_runs} runs, {len(left_out)} folders left out.", "", *(f"- {line}" for line in left_out)])


def tables_of(games: pd.DataFrame, shared: pd.DataFrame, collapses: pd.DataFrame, published: pd.DataFrame, args: Args) -> dict:
    """The rows of every section of table.md."""
    tables, runs = {title: [] for title in SECTIONS}, runs_of(games)
    runs["human"] = runs.normalized.where(runs.env_id.map(suite_of) == ATARI)
    for group, rows in runs.groupby(GROUP, sort=False):
        names, mean_and_std = (*group, len(rows)), lambda column: number(rows[column].mean(), rows[column].dropna())
        tables["Scores"].append((*names, *map(mean_and_std, ("score", "best", "training", "human"))))
        if rows.success.notna().any():
            rate = estimate(lambda rates: rates.mean(axis=0), rows.success.to_numpy()[:, np.newaxis], args)
            reached, steps = rows.steps_to_success.count(), rows.steps_to_success.fillna(math.inf).median()
            tables["Success"].append((*names, *rate, f"{reached} of {len(rows)}", f"{steps:.0f}"))
        if rows.total_cost.notna().any():
            costs = map(mean_and_std, ("total_cost", "games", "violations"))
            tables["Cost"].append((*names, f"{rows.cost_limit.iloc[0]:g}", *costs))
    for row in collapses.itertuples(index=False):
        ratio = number(row.ratio, () if any(np.isnan(row.of_seeds)) else row.of_seeds)
        interval = "-" if math.isnan(row.low) else f"{row.low:.3f} to {row.high:.3f}"
        tables["Collapse of a reset"].append((*row[:7], ratio, interval))
        tables["Cost around a reset"] += [(*row[:5], row.cost_before, row.cost_after)] if row.cost_before >= 0 else []  # or NaN
    for (suite, *group), rows in shared.groupby(["suite", "replay_ratio", "method"], sort=False):
        scores = final_scores(rows)[..., np.newaxis]
        tables["Over games"].append((suite, *group, *scores.shape[1::-1], *estimate(interquartile_means, scores, args)))
    improvement = lambda *scores: np.array([metrics.probability_of_improvement(*scores)])
    for replay_ratio, rows in games.groupby("replay_ratio"):
        for ensemble, other in itertools.permutations(methods_of(rows), 2):
            pair = rows[rows.method.isin([ensemble, other])]
            pair = pair[pair.groupby("env_id").method.transform("nunique") == 2]
            scores = [final_scores(pair[pair.method == method], "score") for method in (ensemble, other)]
            if ensemble.startswith("RDE+") and scores[0].size and scores[1].size:
                row = (replay_ratio, ensemble, other, pair.env_id.nunique(), *estimate(improvement, scores, args))
                tables["Probability of improvement"].append(row)
    title = "Published scores, beside training games"
    means = {"score": ("training", "mean"), "normalized": ("normalized_training", "mean")}
    own = runs.groupby(GROUP, sort=False, as_index=False).agg(**means)
    own["method"] += own.replay_ratio.map(", replay ratio {:g}".format)
    for row in pd.concat([own[own.env_id.isin(published.env_id)], published]).sort_values("env_id", kind="stable").itertuples():
        human = f"{row.normalized:.3f}" if suite_of(row.env_id) == ATARI else "-"
        tables[title].append((row.env_id, row.method, row.score, human))
    for panel, rows in shared.groupby("title", sort=False) if len(published) else []:
        own = runs_of(rows).groupby(["env_id", "method"], sort=False, as_index=False).agg(**means)
        iqms = iqms_over_games(pd.concat([own, published]), rows.env_id.unique())
        tables[title] += [("IQM, " + panel.replace("\n", ", "), whose, "-", f"{iqm:.3f}") for whose, iqm in iqms.items()]
    return tables


# ------------------------------------------------------------------------------------------------------------ pictures

# Okabe and Ito's colours, which colour-blind people can tell apart: of PREFIXES, and of other methods.
COLORS = ["#0072B2", "#D55E00", "#A8487F", "#007F5F", "#000000", "#2A8CC0", "#B37400", "#7F4F24", "#6A51A3", "#777777"]
STYLE = {"text.parse_math": False, "axes.titlelocation": "left", "axes.titlesize": 9, "savefig.dpi": 150}
LEGEND = """bands: 95 % intervals; thin lines: single seeds; ▼ right after a reset (not over games)
training games: moving mean over a tenth of the run"""  # narrower than a panel, beside which the other legend stands
CURVES = {  # picture: what its curves are made of, columns with the names of their axes; the last two are over games
    "learning_curves": (EVALUATIONS, {"score": "score of the evaluations"}),
    "training_games": (TRAINING, {"score": "return of the training games"}),
    "success_curves": (EVALUATIONS, {"success": "success in the evaluations"}),
    "cost_curves": (TRAINING, {"score": "return of the training games", "cost": "cost of the training games"}),
    "cost_evaluations": (EVALUATIONS, {"score": "score of the evaluations", "cost": "cost of the evaluations"}),
    "aggregate_curves": (EVALUATIONS, {"normalized": "IQM of normalized scores"}),
    "aggregate_training_games": (TRAINING, {"normalized": "IQM of normalized returns"}),
}


def new_curve(panel: tuple[str, str, str], method: str, x, y, interval=math.nan, seeds=(), dips=False) -> pd.DataFrame:
    """What draw_curve draws: `panel` is its title and the names of its axes; interval (2, points), seeds (seeds, points)."""
    low, high = np.broadcast_to(interval, (2, len(x)))
    curve = pd.DataFrame({"panel": "\n\n".join(panel), "method": method, "x": x, "y": y, "low": low, "high": high, "dip": dips})
    return curve.assign(**{f"seed {i}": scores for i, scores in enumerate(seeds) if len(seeds) > 1})


def draw_curve(data: pd.DataFrame, color: str, label: str, style: str) -> None:
    plt.plot(data.x, data.filter(like="seed "), color=color, alpha=0.35, linewidth=0.7)
    plt.fill_between(data.x, data.low, data.high, color=color, alpha=0.13, linewidth=0)
    plt.plot(data.x, data.y, color=color, linewidth=1.8, linestyle=style, label=label)
    plt.plot(data.x[data.dip], data.y[data.dip], "v", color=color, markersize=7, markeredgecolor="white", zorder=3)


def draw_panels(curves: list[pd.DataFrame], of_study: list[str], width: float = 4.4) -> sns.FacetGrid:
    """A panel for every value of the column panel, at most 2 in a row; a method of the study looks alike in all pictures."""
    rows, lines, others = pd.concat(curves), itertools.cycle(["-", "--", "-."]), itertools.cycle(COLORS[len(PREFIXES) :])
    methods = [*of_study, *(level for level in methods_of(rows) if level not in of_study)]
    colors = [COLORS[rank] if (rank := rank_of(method)) < len(PREFIXES) else next(others) for method in methods]
    styles = [":" if re.search(r"^limit |\(published\)$", method) else next(lines) for method in methods]
    facets = {"col": "panel", "col_wrap": min(2, rows.panel.nunique()), "sharex": False, "sharey": False}
    facets |= {"hue": "method", "hue_order": methods, "palette": colors, "hue_kws": {"style": styles}}
    grid = sns.FacetGrid(rows, height=3.4, aspect=width / 3.4, **facets).map_dataframe(draw_curve)
    for panel, axes in grid.axes_dict.items():
        axes.set(**dict(zip(("title", "xlabel", "ylabel"), panel.split("\n\n"))))
    grid.tight_layout().add_legend(title="", label_order=methods_of(rows))
    grid.figure.text(0.02, 0, LEGEND, verticalalignment="top", fontsize="small")
    return grid


def curves_of(picture: str, games: pd.DataFrame, published: pd.DataFrame, args: Args) -> list[pd.DataFrame]:
    """A panel for every title and column: means over seeds, or interquartile means over games, at steps that all runs have."""
    (source, columns), curves = CURVES[picture], []
    means = lambda scores: scores.mean(axis=(0, 1))
    # Of training games they are, as the published ones, over the games' means.
    of_means = lambda scores: interquartile_means(scores.mean(axis=0, keepdims=True))
    function = {"aggregate_curves": interquartile_means, "aggregate_training_games": of_means}.get(picture, means)
    for (title, rows), (column, name) in itertools.product(games.groupby("title", sort=False), columns.items()):
        panel, over_games = (title, "environment steps (thousands)", name), column == "normalized"
        points = points_of(rows, source)
        points = points.assign(dip=points.phase == "after_reset").drop_duplicates(["run", "step", "dip"], keep="last")
        for method, of_method in points[~(points.dip & over_games)].groupby("method"):
            table = of_method.pivot(index=["step", "dip"], columns=["env_id", "seed"], values=column)
            table = table.sort_index(axis=1).dropna()
            scores = table.to_numpy().reshape(len(table), rows.env_id.nunique(), -1).transpose(2, 1, 0)  # (seeds, games, steps)
            steps, dips = table.index.get_level_values("step") / 1000, table.index.get_level_values("dip")
            if len(table):
                seeds = () if over_games else scores[:, 0]
                curves.append(new_curve(panel, method, steps, *bootstrap(function, scores, args), seeds, dips))
        levels = {f"limit {limit:g}": limit for limit in rows.cost_limit.unique() if column == "cost" and limit < math.inf}
        levels |= iqms_over_games(published, rows.env_id.unique()) if picture == "aggregate_training_games" else {}
        for level_name, level in levels.items():
            curves.append(new_curve(panel, level_name, [0, rows.step.max() / 1000], [level, level]))
    return curves


def plot_collapse(source: str, collapses: pd.DataFrame, of_study: list[str]) -> plt.Figure:
    """Games from left to right, in each a short line for every method."""
    rows = collapses[(collapses.source == source) & collapses.ratio.notna()].sort_values("replay_ratio", kind="stable")
    names, methods, curves = sorted(map(game_name, rows.env_id.unique())), methods_of(rows), []
    for row in rows.itertuples():
        left = names.index(game_name(row.env_id)) + 0.7 * methods.index(row.method) / len(methods) - 0.35
        ends = [left, left + 0.6 / len(methods), math.nan]
        panel = (f"{source}, replay ratio {row.replay_ratio:g}", "", "score after / before a reset")
        curves.append(new_curve(panel, row.method, ends, row.ratio, [[row.low], [row.high]], row.of_seeds))
    grid = draw_panels(curves, of_study, max(4.4, 0.35 * len(names)))
    for axes in grid.axes_dict.values():
        axes.axhline(1, color="grey", linewidth=1, linestyle="--")
        axes.set_xticks(range(len(names)), [name.replace("-", "-\n") for name in names], rotation=90 if len(names) > 4 else 0)
        axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(min(-0.05, axes.get_ylim()[0]), None))
    return grid.tight_layout().figure


def pictures_of(
    games: pd.DataFrame, shared: pd.DataFrame, collapses: pd.DataFrame, published: pd.DataFrame, args: Args
) -> Iterator[tuple[str, plt.Figure]]:
    """Name and picture."""
    plt.switch_backend("agg")
    sns.set_theme(style="whitegrid", font="DejaVu Sans", font_scale=0.85, rc=STYLE)
    games = games.assign(title=games.env_id.map(game_name) + games.replay_ratio.map(", replay ratio {:g}".format))
    by_game = {f"_{urllib.parse.quote(game_name(env_id), safe='')[:200]}": rows for env_id, rows in games.groupby("env_id")}
    of_study, profiles = methods_of(games), []
    for picture, (source, columns) in CURVES.items():
        for name, rows in {"": shared}.items() if "normalized" in columns else by_game.items():
            logged = rows[(rows.phase == "training") == (source == TRAINING)][list(columns)].notna().any().all()
            if logged and (curves := curves_of(picture, rows, published, args)):
                yield picture + name, draw_panels(curves, of_study).figure
    for title, rows in shared.groupby("title", sort=False):
        final, panel = runs_of(rows).normalized, (title, "final normalized score", "fraction of runs above")
        thresholds = np.linspace(final.min() - 0.01, final.max() + 0.01, 401)
        fractions_above = lambda scores: (scores.reshape(-1, 1) > thresholds).mean(axis=0)
        for method, of_method in rows.groupby("method"):
            profiles.append(new_curve(panel, method, thresholds, *bootstrap(fractions_above, final_scores(of_method), args)))
    if profiles:
        yield "performance_profiles", draw_panels(profiles, of_study).figure
    for source, name in ((EVALUATIONS, "collapse"), (TRAINING, "collapse_training_games")):
        if collapses[collapses.source == source].ratio.notna().any():
            yield name, plot_collapse(source, collapses, of_study)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if not os.path.isdir(args.runs_dir):
        fail(f"--runs-dir {args.runs_dir} is not a folder")
    for name, low, high in (("bootstrap_samples", 1, 100_000), ("seed", 0, 2**32 - 1), ("reset_window", 1, 10**15)):
        if not low <= getattr(args, name) <= high:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be from {low:,} to {high:,}")
    kinds = {"game": str, "method": str, "score": float}
    parse = lambda text: pd.read_csv(io.StringIO(text), comment="#", usecols=[*kinds], dtype=kinds)
    try:
        references = read(*os.path.split(args.references), parse) if args.references else pd.DataFrame(columns=[*kinds])
    except ValueError as error:
        fail(f"--references {args.references}: {error}")
    games, left_out, notes = read_games(args.runs_dir, args.merge_versions)
    for line in [f"left out: {line}" for line in left_out] + notes:
        print(line, file=sys.stderr)
    if games.empty:
        fail(f"there is no finished run in {args.runs_dir}")
    published = pd.DataFrame({"env_id": games.env_id.unique(), "game": [*map(game_name, games.env_id.unique())]})
    published = published.merge(references.drop_duplicates(["game", "method"]))
    published["normalized"] = [normalized_score(env_id, score) for env_id, score in zip(published.env_id, published.score)]
    published["method"] = published.method.map(clean) + " (published)"
    (shared, more), collapses = comparable(games), collapses_of(resets_of(games, args.reset_window), args)
    table = table_text(tables_of(games, shared, collapses, published, args), notes + more, games.run.nunique(), left_out, args)
    folder = pathlib.Path(args.out_dir or os.path.join(args.runs_dir, "results"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(table, encoding="utf-8")
        for name, rows in csv_tables(games).items():
            (folder / name).write_text(rows.to_csv(index=False, float_format="%.10g", lineterminator="\n"), encoding="utf-8")
        for name, figure in pictures_of(games, shared, collapses, published, args):
            figure.savefig(folder / f"{name}.png", bbox_inches="tight", metadata={"Software": None})  # matplotlib's version
            plt.close(figure)
    except OSError as error:
        fail(f"--out-dir {folder} cannot be written: {error.strerror}: {error.filename}")
    print(f"{table}\nwritten to {folder}")


if __name__ == "__main__":
    main()
