"""The table and the pictures of a study: reads run folders, writes Markdown, CSV files and pictures.

    python plot_benchmark.py                                  # of runs/benchmark, into runs/benchmark/results
    python plot_benchmark.py runs/mine runs/yours --out-dir comparison
    python plot_benchmark.py results/minigrid/runs.tar.xz     # of an archive of run folders, into its folder

writes table.md, of which a part is printed; of run folders results.csv (a row for every evaluation) and training_games.csv; and
the pictures learning_curves (evaluations), training_games, over games (interquartile means) aggregate_curves and
aggregate_training_games, and of resets collapse and collapse_training_games.

A run counts if its final evaluation is complete; every other folder is named, with the reason. Where all runs of a game log
success, that is what is compared there, in every table and picture, else the score. The statistics are those of Agarwal et al.,
"Deep RL at the Edge of the Statistical Precipice", NeurIPS 2021, by rliable. The same runs give the same files.
"""

import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass

os.environ["MPLBACKEND"] = "agg"  # only files are written, and a notebook hands on a backend of its own

import matplotlib
import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rliable import library, metrics
from scipy import stats


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders, folders of them, archives (runs.tar.xz) or a results.csv that this program wrote; without any, --runs-dir"""
    runs_dir: str = "runs/benchmark"
    """the folder of the run folders, if none are named; those in its subfolders are read as well"""
    out_dir: str | None = None
    """where the files are written; by default the subfolder results of the first folder, or the folder of the first archive"""
    pictures: tuple[str, ...] = ()
    """the pictures that are drawn, by default all for which there is something"""
    references: str | None = None
    """a CSV file of published scores (columns game, method, score), listed and (over games) drawn beside training games"""
    merge_versions: bool = False
    """take the runs of a method as one, even if different versions of its script made them"""
    reset_window: int = 2_000
    """environment steps before and after a reset whose training games are compared"""
    bootstrap_samples: int = 2_000
    """samples of the bootstrap behind every interval"""


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

ATARI_SUFFIX = "NoFrameskip-v4"
# Suites: scores are averaged over games only within one, on its own scale.
ATARI, DMC = "human-normalized", "score / 1,000"


def game_name(env_id: str) -> str:
    return env_id.removesuffix(ATARI_SUFFIX)


def short_names(env_ids) -> dict[str, str]:
    """Names without what all of them have in common: MiniGrid-LavaGapS5-v0 is LavaGapS5 among its like."""
    names = {env_id: game_name(env_id) for env_id in env_ids}
    for part in ("^MiniGrid-", "^MinAtar/", "^Safety", r"-v\d+$"):
        shorter = {env_id: re.sub(part, "", name) for env_id, name in names.items()}
        if all(shorter[env_id] != names[env_id] for env_id in names) and len(set(shorter.values())) == len(names):
            names = shorter
    return names


def suite_of(env_id: str) -> str | None:
    """The scale of Atari-100k, of DeepMind Control (domain-task, without a version), or None: no common scale."""
    if game_name(env_id) in RANDOM_AND_HUMAN_SCORES:
        return ATARI
    return DMC if re.fullmatch(r"[a-z0-9_]+-(?!v\d+$)[a-z0-9_]+", env_id) else None


def normalized_score(env_id: str, score):
    """On the scale of its suite: (score - random) / (human - random), or score / 1,000. Of a score or of an array of them."""
    random_score, human_score = RANDOM_AND_HUMAN_SCORES.get(game_name(env_id), (0, 1000))
    return (score - random_score) / (human_score - random_score)


# ------------------------------------------------------------------------------------------------------------- methods

# An --exp-name begins with the name of a script, or of one of its methods, and goes on with the options that make a variant.
FAMILIES = {"dqn": "DQN", "dqn_atari": "DQN", "sac": "SAC", "sac_dmc": "SAC", "sac_lag": "SAC-Lag", "sac_safety": "SAC-Lag",
            "rnd_dqn": "RND-DQN", "rnd_dqn_atari": "RND-DQN", "drq": "DrQ", "drq_atari": "DrQ"}  # fmt: skip
DEFAULT_BETA = {"value": 50, "advantage": 5}
# The prefix and the rule in a method's name, in the order of tables and legends, and how it looks in every picture:
# Okabe and Ito's colours, which colour-blind people can tell apart.
LOOKS = {
    ("", ""): ("#0072B2", "-"),
    ("SR+", ""): ("#D55E00", (0, (5, 1.5))),
    ("RDE+", " value"): ("#007F5F", (0, (6, 1.5, 1.5, 1.5))),
    ("RDE+", " advantage"): ("#A8487F", "-"),
    ("RDE+", " oldest alone"): ("#000000", (0, (2, 1.2))),
    ("Ensemble+", ""): ("#8C6D1F", (0, (4, 1, 1, 1, 1, 1))),
}
SPARE_LOOKS = [("#B37400", "-"), ("#56B4E9", (0, (5, 1.5))), ("#6A51A3", (0, (2, 1.2))), ("#777777", "-")]
NAME = re.compile(rf"(SR\+|RDE\+|Ensemble\+|)(?:{'|'.join(FAMILIES.values())})( value| advantage| oldest alone|)(?![\w-])")


def method_name(args: dict) -> str:
    """DQN, SR+DQN, RDE+SAC-Lag value kappa 1: by what the arguments do. Any other --exp-name is a method of that name."""
    name = re.sub("^(sr|rde)_", "", args["exp_name"])
    family = max((family for family in FAMILIES if f"{name}_".startswith(f"{family}_")), key=len, default=None)
    if family is None:
        return args["exp_name"]
    options = name.removeprefix(family)
    # What the name says anyway.
    options = re.sub(r"_(selection_[a-z]+|beta_[^_]+|num-agents_1|reset-interval_0)(?=_|$)", "", options).replace("_", " ")
    if args["num_agents"] == 1:
        return ("SR+" if args["reset_interval"] else "") + FAMILIES[family] + options
    if not args["reset_interval"]:
        return "Ensemble+" + FAMILIES[family] + options
    rule, beta = args["selection"], args["beta"]
    if rule == "value" and beta >= 1e6:  # the best value alone counts, which is the oldest agent's own proposal
        return f"RDE+{FAMILIES[family]} oldest alone{options}"
    return f"RDE+{FAMILIES[family]} {rule}{options}" + (f" β = {beta:g}" if beta != DEFAULT_BETA.get(rule) else "")


def rank_of(method: str) -> int:
    """Place in LOOKS; methods with names of their own come last."""
    match = NAME.match(method)
    return [*LOOKS].index(match.groups()) if match and match.groups() in LOOKS else len(LOOKS)


def in_order(methods) -> list[str]:
    return sorted(set(methods), key=lambda method: (rank_of(method), method.split("@")))


def looks_of(methods) -> dict[str, tuple]:
    """Colour and dash of every method of a study. Of several variants of one the first, the plain one, has its look."""
    looks, spare = {}, itertools.cycle(SPARE_LOOKS)
    for method in in_order(methods):
        own = [*LOOKS.values(), None][rank_of(method)]
        looks[method] = next(spare) if own is None or own in looks.values() else own
    return looks


# ------------------------------------------------------------------------------------------------- from folders to games

GROUP = ["env_id", "replay_ratio", "method"]  # the columns that the seeds of a method share
RUN = [*GROUP, "seed", "run"]
# What may differ between the seeds of a method: it does not change what is learned.
INCIDENTAL = {"seed", "exp_name", "runs_dir", "checkpoint_interval", "keep_models", "cuda", "cuda_graphs", "torch_deterministic",
              "track", "wandb_project_name", "wandb_entity", "capture_video", "eval_interval"}  # fmt: skip
OPTIONAL = {"reset_interval": 0, "num_agents": 1, "selection": "value", "cost_limit": math.inf}  # not every script has them


def read_table(file: pathlib.Path, columns: list[str]) -> pd.DataFrame:
    """success and cost are NaN where the file does not have them."""
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    text = file.read_text(encoding="utf-8")
    rows = pd.read_csv(io.StringIO(text)).reindex(columns=[*columns, "success", "cost"])
    numbers = [column for column in rows if column != "phase"]
    rows[numbers] = rows[numbers].astype(float)  # text is an error
    wrong = rows[columns].replace([math.inf, -math.inf], math.nan).isna().any(axis=1)
    if wrong.any() or not text.endswith("\n"):
        line = wrong.argmax() + 2 if wrong.any() else len(rows) + 1
        raise ValueError(f"{file.name}: line {line} is cut off, or lacks one of {', '.join(columns)}")
    return rows.rename(columns={"global_step": "step", "episodic_return": "score"})


def read_run(folder: pathlib.Path, name: str) -> dict:
    """A finished run: the columns RUN, what its seeds must share, and its games as a table. Else a ValueError says why not."""
    content = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    args = OPTIONAL | {key: value for key, value in content["args"].items() if value is not None}
    args = {"beta": DEFAULT_BETA.get(args["selection"], math.nan)} | args
    num_episodes, total_timesteps = int(args["eval_episodes"]), int(args["total_timesteps"])
    evaluations = read_table(folder / "evaluations.csv", ["global_step", "phase", "episodic_return"])
    last = evaluations.tail(num_episodes)
    if len(last) < num_episodes or (last.phase != "final").any() or last.step.min() < total_timesteps:
        raise ValueError("not finished: there is no complete final evaluation")
    evaluations["evaluation"] = np.arange(len(evaluations)) // num_episodes
    if len(evaluations) % num_episodes or (evaluations.groupby("evaluation")[["step", "phase"]].nunique() > 1).any(axis=None):
        raise ValueError(f"evaluations.csv: an evaluation does not have {num_episodes} episodes")
    training = read_table(folder / "episodes.csv", ["global_step", "episodic_return"]).assign(phase="training", evaluation=-1)
    games = pd.concat([rows for rows in (evaluations, training) if len(rows)], ignore_index=True)
    games = games.assign(total_timesteps=total_timesteps, cost_limit=float(args["cost_limit"]))
    idle = ["reset_depth", "shrink"] * (not args["reset_interval"])  # they have no effect
    idle += ["selection", "beta", "beta_cost", "kappa"] * (args["num_agents"] == 1)
    settings = {key: value for key, value in args.items() if key not in INCIDENTAL.union(idle)}
    script = folder / str(content.get("script"))  # newer runs have its text, older ones its hash
    version = hashlib.sha256(script.read_bytes()).hexdigest() if script.is_file() else content.get("script_sha256", "unknown")
    identity = (args["env_id"], float(args["replay_ratio"]), method_name(args), args["seed"], name)
    of_run = {"num_agents": args["num_agents"], "settings": settings, "version": version[:7], "games": games}
    return dict(zip(RUN, identity)) | of_run


def read_results(file: pathlib.Path) -> list[dict]:
    """The runs of a results.csv, in which an evaluation is one row, and of the training_games.csv beside it."""
    evaluations, training = pd.read_csv(file), pd.read_csv(file.with_name("training_games.csv"))
    evaluations = evaluations[evaluations.phase != "training"].assign(evaluation=lambda rows: np.arange(len(rows)))
    training = training.rename(columns={"episodic_return": "score"}).assign(phase="training", evaluation=-1)
    training = training.merge(evaluations[RUN].drop_duplicates(), on=RUN[:4])
    rows, runs = pd.concat([evaluations, training]).rename(columns={"global_step": "step"}), []
    for identity, games in rows.groupby(RUN, sort=False):
        games = games.reindex(columns=["step", "phase", "evaluation", "score", "success", "cost"])
        games = games.assign(total_timesteps=games.step.max(), cost_limit=math.inf)
        run = dict(zip(RUN, identity)) | {"num_agents": 1, "settings": {}, "version": "unknown", "games": games}
        run["method"] = re.sub(r"^(RDE\+[\w-]+)$", r"\1 value", run["method"])  # when there was one rule, it had no name
        runs.append(run)
    return runs


def read_runs(paths: list[pathlib.Path]) -> tuple[list[dict], list[str]]:
    """All finished runs, and a line for every folder that is left out."""
    runs, left_out = [], []
    for path in paths:
        if path.suffix == ".csv":
            runs += read_results(path)
            continue
        with tempfile.TemporaryDirectory() as folder:
            if path.is_dir():
                folder = path
            else:
                with tarfile.open(path) as archive:
                    archive.extractall(folder, filter="data")
            for file in sorted(pathlib.Path(folder).rglob("args.json")):
                name = os.path.relpath(file.parent, folder)
                name = str(path / name) if len(paths) > 1 or name == "." else name
                try:
                    runs.append(read_run(file.parent, name))
                except KeyError as error:
                    left_out.append(f"{name}: args.json has no {error}")
                except (OSError, ValueError, TypeError, AttributeError) as error:
                    left_out.append(f"{name}: {error}")
    return runs, left_out


def other_arguments(runs: pd.DataFrame) -> pd.Series:
    """Of every run in what it differs from most runs of its method, "" if in nothing: in arguments that both scripts have."""
    as_text = runs.settings.map(lambda settings: json.dumps(settings, sort_keys=True))
    usual = as_text.groupby([runs[name] for name in GROUP]).transform(lambda texts: Counter(texts).most_common(1)[0][0])
    differences = []
    for own, most in zip(runs.settings, usual.map(json.loads)):
        names = [name for name in sorted(own.keys() & most.keys()) if own[name] != most[name]]
        differences.append(", ".join(f"{name} {own[name]} instead of {most[name]}" for name in names))
    return pd.Series(differences, runs.index)


def read_games(paths: list[pathlib.Path], merge_versions: bool = False) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The study as one table with a row for every game, a line for every folder that is left out, and notes.

    Columns: RUN; at (what is compared: runs of one replay ratio, or of one cost); total_timesteps, cost_limit; phase (of the
    evaluation, or "training"), evaluation (its number; -1: training), step (in training: at the game's end); score, success,
    cost (NaN: not logged); value (what is compared), measure (success or score), normalized (score on its suite's scale).
    """
    (runs, left_out), notes = read_runs(paths), []
    if not runs:
        return pd.DataFrame(), left_out, notes
    runs = pd.DataFrame(runs)
    for method, versions in runs.groupby("method").version.unique().items():
        if len(versions) > 1 and not merge_versions:
            runs.loc[runs.method == method, "method"] += "@" + runs.version
            notes.append(f"{method} is of different versions of the script: {', '.join(f'@{one}' for one in sorted(versions))}")
    runs = runs.assign(other=other_arguments(runs)).sort_values("run")
    left_out += [f"{run.run}: unlike most runs of {run.method}: {run.other}" for run in runs[runs.other != ""].itertuples()]
    runs = runs[runs.other == ""]
    left_out += [f"{run}: another run of the same seed counts" for run in runs.run[runs.duplicated([*GROUP, "seed"])]]
    runs = runs.drop_duplicates([*GROUP, "seed"])
    runs = runs.assign(cost=runs.replay_ratio * runs.num_agents, rank=runs.method.map(rank_of))
    # If for every ensemble there are single agents of the same cost, runs of one cost are compared, else of one replay ratio.
    ensembles, single = runs[runs.num_agents > 1], runs[runs.num_agents == 1]
    by_cost = len(ensembles) and set(zip(ensembles.env_id, ensembles.cost)) <= set(zip(single.env_id, single.cost))
    title, column = ("replay ratio × agents = ", "cost") if by_cost else ("replay ratio ", "replay_ratio")
    runs = runs.assign(at=title + runs[column].map("{:g}".format)).sort_values(["env_id", column, "rank", "method", "seed"])
    games = pd.concat([run.games.assign(**run[[*RUN, "at"]]) for _, run in runs.iterrows()], ignore_index=True)
    games = games.astype({name: float for name in ("step", "score", "success", "cost")})
    with_success = games.success.notna().groupby(games.env_id).transform("all")
    games["measure"] = np.where(with_success, "success", "score")
    games["value"] = games.success.where(with_success, games.score)
    games["normalized"] = [normalized_score(env_id, score) for env_id, score in zip(games.env_id, games.score)]
    return games, sorted(left_out), notes


# ------------------------------------------------------------------------------------------------ from games to numbers

EVALUATIONS, TRAINING = "evaluations", "training games"
COLUMNS = ["value", "score", "normalized", "success", "cost"]  # those that are averaged


def evaluations_of(games: pd.DataFrame) -> pd.DataFrame:
    """The means over the games. `different`: in an emulator without chance equal scores are one game, played again."""
    games = games[games.phase != "training"]
    same = games.duplicated(["run", "evaluation", "score"]) & games.env_id.str.endswith(ATARI_SUFFIX)
    games = games.assign(different=games.value.mask(same))
    by_evaluation = games.groupby([*RUN, "at", "evaluation", "step", "phase"], sort=False)
    return by_evaluation[[*COLUMNS, "different"]].mean().assign(episodes=by_evaluation.size()).reset_index()


def points_of(games: pd.DataFrame, source: str) -> pd.DataFrame:
    """What curves are made of: evaluations, or at the twentieths of a run the means over the last tenth's training games."""
    if source == EVALUATIONS:
        return evaluations_of(games)
    runs, training = games[[*RUN, "total_timesteps"]].drop_duplicates("run"), games[games.phase == "training"]
    twentieth = np.ceil(20 * training.step / training.total_timesteps)
    windows = pd.concat([training.assign(twentieth=twentieth), training.assign(twentieth=twentieth + 1)])
    means = windows.groupby(["run", "twentieth"])[COLUMNS].mean()
    points = runs.merge(pd.DataFrame({"twentieth": np.arange(1.0, 21)}), how="cross").join(means, on=["run", "twentieth"])
    return points.assign(phase="training", step=points.twentieth * points.total_timesteps / 20)


def mean_over_run(evaluations: pd.DataFrame) -> float:
    """The area under the curve of a run by its length: the number of evaluations at a place has no weight."""
    length = evaluations.step.iloc[-1] - evaluations.step.iloc[0]
    return np.trapezoid(evaluations.value, evaluations.step) / length if length else evaluations.value.iloc[-1]


def runs_of(games: pd.DataFrame) -> pd.DataFrame:
    """A row for every run: its value at the end, over the run and in training; its cost."""
    evaluations = evaluations_of(games).groupby([*RUN, "at"], sort=False)
    runs = evaluations[["value", "normalized"]].last()  # the last evaluation is the final one
    runs["whole_run"] = evaluations[["step", "value"]].apply(mean_over_run)
    training = games[games.phase == "training"]
    last = training[training.step > 0.8 * training.total_timesteps].groupby([*RUN, "at"])  # the last fifth
    runs["training"], runs["normalized_training"] = last.value.mean(), last.normalized.mean()
    training = training.assign(violation=training.cost > training.cost_limit).groupby([*RUN, "at"])
    runs = runs.assign(total_cost=training.cost.sum(min_count=1), violations=training.violation.sum(), games=training.size())
    return runs.join(games.groupby([*RUN, "at"])[["cost_limit", "measure"]].first()).reset_index()


def resets_of(games: pd.DataFrame, window: int) -> pd.DataFrame:
    """Two rows for every reset: mean value and cost right before and after it in its two evaluations, and in training games.

    Training games are those that ended at most `window` steps away; NaN where there are none.
    """
    evaluations, training = evaluations_of(games), games[games.phase == "training"]
    own = evaluations[["different", "cost"]].set_axis(["value", "cost"], axis=1)
    resets = evaluations[[*RUN, "step"]].join([own.shift().add_suffix("_before"), own.add_suffix("_after")])
    resets = resets[evaluations.phase == "after_reset"].assign(source=EVALUATIONS)
    in_training = resets[[*RUN, "step"]].assign(source=TRAINING)
    near = in_training[["run", "step"]].merge(training[["run", "step", "value", "cost"]], on="run", suffixes=("", "_of_game"))
    distance = near.step_of_game - near.step
    for side, inside in (("before", distance.between(1 - window, 0)), ("after", distance.between(1, window))):
        means = near[inside].groupby(["run", "step"])[["value", "cost"]].mean()
        in_training = in_training.join(means.add_suffix(f"_{side}"), on=["run", "step"])
    return pd.concat([resets, in_training], ignore_index=True)


RATIO, DIFFERENCE = "after / before", "after − before"


def collapses_of(games: pd.DataFrame, args: Args) -> pd.DataFrame:
    """Means before and after the resets of all seeds and their change, with the changes of the seeds, and an interval.

    The change is the ratio of the means, as single ratios are noise (NaN: nothing before); in games with values below zero,
    where a ratio has no meaning, the difference. `each`: the means of the seeds at every reset.
    """
    rows, below_zero = [], games.groupby("env_id").value.min() < 0
    resets = resets_of(games, args.reset_window).dropna(subset=["value_before", "value_after"])
    for (source, *group), of_group in resets.groupby(["source", *GROUP], sort=False):
        kind, by_seed = DIFFERENCE if below_zero[group[0]] else RATIO, of_group.groupby("seed")
        sums = by_seed[["value_before", "value_after"]].sum().assign(resets=by_seed.size()).to_numpy()  # (seeds, 3)

        def change(seeds: np.ndarray) -> np.ndarray:
            before, after, number = sums[seeds.ravel()].sum(axis=0)
            return np.array([(after - before) / number if kind == DIFFERENCE else after / before if before > 0 else math.nan])

        point, interval = bootstrap(change, np.arange(len(sums))[:, np.newaxis], args)
        before, after, number = sums.sum(axis=0)
        each = of_group.groupby("step")[["value_before", "value_after"]].mean().to_numpy()
        costs = of_group[["cost_before", "cost_after"]].mean().to_numpy()[np.newaxis]
        of_seeds = np.concatenate([*map(change, np.arange(len(sums)))])
        means = (len(of_group), before / number, after / number, kind, point[0])
        rows.append((source, *group, *means, of_seeds, *interval.ravel(), each if source == EVALUATIONS else [], costs))
    names = "resets before after kind change of_seeds low high each costs"
    return pd.DataFrame(rows, columns=["source", *GROUP, *names.split()])


def comparable(games: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """By suite the games that most methods share, and of a method the seeds that have all of them; and notes."""
    parts, notes = [games[:0].assign(suite="")], []
    for (suite, at), rows in games.assign(suite=games.env_id.map(suite_of)).groupby(["suite", "at"], sort=False):
        of_methods = [set(env_ids) for env_ids in rows.groupby("method").env_id.unique()]
        shared = max(of_methods, key=lambda own: (len(own) * sum(own <= other for other in of_methods), len(own)))
        complete = rows[rows.env_id.isin(shared)]
        complete = complete[complete.groupby(["method", "seed"]).env_id.transform("nunique") == len(shared)]
        if len(shared) > 1:
            parts.append(complete)
            notes += [f"not among those over games, {at}: {run}" for run in rows.run[~rows.run.isin(complete.run)].unique()]
    return pd.concat(parts), notes


def bootstrap(function, scores: np.ndarray | list[np.ndarray], args: Args) -> tuple[np.ndarray, np.ndarray]:
    """`function` of scores (seeds, games, ...), or of a list of them; its stratified 95 % interval (2, ...).

    The interval is NaN with fewer than five seeds (three, of ten games or more): it would be little else than their range.
    """
    arrays = scores if isinstance(scores, list) else [scores]
    if any(len(array) < (3 if array.shape[1] >= 10 else 5) for array in arrays):
        return (point := function(*arrays)), np.full((2, *point.shape), math.nan)
    np.random.seed(0)  # rliable draws from the global generator, whatever random_state it is given
    points, intervals = library.get_interval_estimates({"": scores}, function, reps=args.bootstrap_samples)
    return points[""], intervals[""]


def interquartile_means(scores: np.ndarray) -> np.ndarray:
    """Over seeds and games, for every step: (seeds, games, steps) to (steps,). (rliable's aggregate_iqm does one at a time.)"""
    return stats.trim_mean(scores.reshape(-1, scores.shape[-1]), 0.25, axis=0)


def probability_of_improvement(*scores: np.ndarray) -> np.ndarray:
    return np.array([metrics.probability_of_improvement(*scores)])


def scores_of(runs: pd.DataFrame, column: str) -> np.ndarray:
    """Of one method: (seeds, games), of the seeds that every game has."""
    return runs.pivot(index="seed", columns="env_id", values=column).dropna().to_numpy()


def iqms_over_games(scores: pd.DataFrame, env_ids) -> dict[str, float]:
    """Interquartile means over games, of the methods that have all of them (columns env_id, method, normalized)."""
    of_methods = scores[scores.env_id.isin(env_ids)].groupby("method", sort=False).normalized
    return of_methods.agg(lambda values: stats.trim_mean(values, 0.25))[of_methods.size() == len(env_ids)].to_dict()


# ---------------------------------------------------------------------------------------------------------- CSV, table


def csv_tables(games: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """results.csv and training_games.csv."""
    extra = [column for column in ("success", "cost") if games[column].notna().any()]
    names, evaluations = ["env_id", "method", "replay_ratio", "seed", "step"], evaluations_of(games)
    evaluations["human_normalized_score"] = evaluations.normalized.where(evaluations.env_id.map(suite_of) == ATARI)
    evaluations = evaluations[["run", *names, "phase", "episodes", "score", *extra, "human_normalized_score"]]
    training = games[games.phase == "training"][[*names, "score", *extra]].rename(columns={"score": "episodic_return"})
    files = {"results.csv": evaluations, "training_games.csv": training}
    return {name: rows.rename(columns={"step": "global_step"}) for name, rows in files.items()}


def number(value: float) -> str:
    """Three digits or so: 1234, 123, 12.3, 1.23, 0.012."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.{2 if value == 0 else max(0, min(3, 2 - math.floor(math.log10(abs(value)))))}f}"


def spread(of_seeds=(), low: float = math.nan, high: float = math.nan) -> str:
    """What stands in brackets behind a mean."""
    if math.isfinite(low) and math.isfinite(high):
        return f" ({number(low)} to {number(high)})"
    return f" ({', '.join(map(number, of_seeds))})" if len(of_seeds) > 1 else ""


def estimate(function, scores: np.ndarray | list[np.ndarray], args: Args, of_seeds=()) -> str:
    point, interval = bootstrap(function, scores, args)
    return number(point[0]) + spread(of_seeds, *interval.ravel())


def mean_over_seeds(values: pd.Series, args: Args) -> str:
    values = values.dropna().to_numpy(dtype=float)
    return estimate(lambda scores: scores.mean(axis=0), values[:, np.newaxis], args, values) if len(values) else "-"


BRACKETS = "In brackets the 95 % interval by the bootstrap, or, of fewer than five seeds, these."
SECTIONS = {  # title: columns, text
    "Scores": ("game | replay ratio | method | seeds | measure | final | whole run | training games | human-normalized", f"""\
Means over seeds. Final: the evaluation at the end. Whole run: the area under the curve of all evaluations, those right after
resets among them, by its length. Training games: those that ended in the last fifth of the run, with exploration.
Human-normalized: the final score. {BRACKETS}"""),
    "Collapse of a reset": ("game | replay ratio | method | of | resets | before | after | change | each reset | cost", f"""\
Means right before and right after the resets of all seeds. The change is after / before (1: nothing is lost), or, in games with
scores below zero, after − before (0: nothing is lost). {BRACKETS}
In an emulator without chance equal scores of an evaluation are one game and count once. Training games: those that ended in the
{{args.reset_window:,}} steps before and after; resets without some on both sides do not count."""),
    "Probability of improvement": ("at | method | over | games | final | whole run", """\
How probably a run of the one method has a higher value than one of the other (a tie is half of it), mean over the games that
both have: by the final evaluation, and by the mean over the whole run. In brackets the 95 % interval, from five seeds on."""),
    "Over games": ("scale | at | method | games | seeds | IQM", """\
Interquartile mean of the final scores over all games and seeds. In brackets the 95 % interval of the bootstrap stratified over
games ({args.bootstrap_samples} samples), from five seeds on (three, of ten games)."""),
    "Cost": ("game | replay ratio | method | seeds | limit | total cost | episodes | above the limit", f"""\
The cost of the whole training, its episodes, and those with a cost above the limit, means over seeds. {BRACKETS}"""),
    "Published scores, beside training games": ("game | whose | score | human-normalized", """\
Published scores stand beside the TRAINING games of this study (the last fifth, with exploration), not beside its evaluations:
the RDE paper's go on with training games, others explore a little. Over games: the interquartile mean of the games' means."""),
}  # fmt: skip


def table_text(tables: dict[str, list], lines: list[str], args: Args) -> str:
    """table.md."""
    parts, as_text = [], lambda cell: number(cell) if isinstance(cell, float) else str(cell).replace("|", r"\|")
    for title, (columns, description) in SECTIONS.items():
        if tables[title]:
            rows = pd.DataFrame(tables[title], columns=columns.split(" | ")).map(as_text)
            parts += [f"## {title}", description.format(args=args), rows.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]) + "\n"


def short_table(tables: dict[str, list]) -> str:
    """What the terminal shows, in less than 100 columns: no intervals."""
    point, short = lambda text: text.split(" (")[0], lambda text: text if len(text) <= 25 else text[:24] + "…"
    changes = {row[:3]: point(row[7]) for row in tables["Collapse of a reset"] if row[3] == EVALUATIONS}
    rows = [("game", "ratio", "method", "seeds", "final", "whole run", "at resets")]
    for game, ratio, method, seeds, _, final, whole_run, *_ in tables["Scores"]:
        change = changes.get((game, ratio, method), "")
        rows.append((short(game), ratio, short(method), str(seeds), point(final), point(whole_run), change))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def tables_of(games: pd.DataFrame, shared: pd.DataFrame, collapses: pd.DataFrame, published: pd.DataFrame, args: Args) -> dict:
    """The rows of every section of table.md."""
    tables, runs, names = {title: [] for title in SECTIONS}, runs_of(games), short_names(games.env_id.unique())
    runs["human"] = runs.normalized.where(runs.env_id.map(suite_of) == ATARI)
    for (env_id, ratio, method), rows in runs.groupby(GROUP, sort=False):
        identity = (names[env_id], f"{ratio:g}", method, len(rows))
        means = lambda *columns: [mean_over_seeds(rows[column], args) for column in columns]
        tables["Scores"].append((*identity, rows.measure.iloc[0], *means("value", "whole_run", "training"), rows.human.mean()))
        if rows.total_cost.notna().any():
            tables["Cost"].append((*identity, f"{rows.cost_limit.iloc[0]:g}", *means("total_cost", "games", "violations")))
    for row in collapses.itertuples(index=False):
        change = ("+" if row.kind == DIFFERENCE and row.change > 0 else "") + number(row.change)
        change += spread(row.of_seeds, row.low, row.high)
        identity = (names[row.env_id], f"{row.replay_ratio:g}", row.method, row.source, row.resets)
        each, cost = ([f"{number(before)} → {number(after)}" for before, after in pairs] for pairs in (row.each, row.costs))
        tables["Collapse of a reset"].append((*identity, row.before, row.after, change, ", ".join(each), *cost))
    for at, rows in runs.groupby("at", sort=False):
        for other, method in itertools.combinations(in_order(rows.method), 2):
            pair = rows[rows.method.isin([method, other])]
            pair = pair[pair.groupby("env_id").method.transform("nunique") == 2]
            own, others = pair[pair.method == method], pair[pair.method == other]
            if len(scores_of(own, "value")) and len(scores_of(others, "value")):
                cells = [estimate(probability_of_improvement, [scores_of(own, column), scores_of(others, column)], args)
                         for column in ("value", "whole_run")]  # fmt: skip
                tables["Probability of improvement"].append((at, method, other, pair.env_id.nunique(), *cells))
    for (suite, at, method), rows in shared.groupby(["suite", "at", "method"], sort=False):
        scores = scores_of(runs_of(rows), "normalized")[..., np.newaxis]
        tables["Over games"].append((suite, at, method, *scores.shape[1::-1], estimate(interquartile_means, scores, args)))
    title = "Published scores, beside training games"
    means = {"score": ("training", "mean"), "normalized": ("normalized_training", "mean")}
    own = runs[runs.env_id.isin(published.env_id)].groupby(GROUP, sort=False, as_index=False).agg(**means)
    own["method"] += own.replay_ratio.map(", replay ratio {:g}".format)
    for row in pd.concat([own, published]).sort_values("env_id", kind="stable").itertuples():
        tables[title].append((names[row.env_id], row.method, row.score, f"{row.normalized:.3f}"))
    for (_, at), rows in shared.groupby(["suite", "at"], sort=False) if len(published) else []:
        own = runs_of(rows).groupby(["env_id", "method"], sort=False, as_index=False).agg(**means)
        iqms = iqms_over_games(pd.concat([own, published]), rows.env_id.unique())
        over = f"IQM of {rows.env_id.nunique()} games, {at}"
        tables[title] += [(over, method, "-", f"{iqm:.3f}") for method, iqm in iqms.items()]
    return tables


# ------------------------------------------------------------------------------------------------------------ pictures

STYLE = {"text.parse_math": False, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.grid": True,
         "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E4E4E4", "legend.frameon": False}  # fmt: skip
CURVES = {  # picture: what its curves are made of, and whether they are over games
    "learning_curves": (EVALUATIONS, False), "training_games": (TRAINING, False),
    "aggregate_curves": (EVALUATIONS, True), "aggregate_training_games": (TRAINING, True),
}  # fmt: skip
COLLAPSES = {"collapse": EVALUATIONS, "collapse_training_games": TRAINING}
COLORS_OF_LEVELS = ["#777777", "#B37400", "#6A51A3", "#56B4E9"]


@dataclass
class Curve:
    method: str
    steps: np.ndarray  # (points,)
    values: np.ndarray  # (points,)
    dips: np.ndarray  # (points,): right after a reset?
    interval: np.ndarray  # (2, points), or NaN
    seeds: np.ndarray  # (seeds, points), or none where there is an interval


@dataclass
class Panel:
    title: str
    label: str  # of the y axis
    axis: tuple  # panels of the same one share it
    curves: list[Curve]
    levels: dict[str, float]  # horizontal lines


def curves_of(games: pd.DataFrame, source: str, column: str, args: Args, over_games: bool = False) -> list[Curve]:
    """Of every method the mean over seeds, or the interquartile mean over games, at the steps that all of its runs have."""
    function = lambda scores: scores.mean(axis=(0, 1))
    if over_games:  # of training games, as the published ones, over the games' means
        of_means = lambda scores: interquartile_means(scores.mean(axis=0, keepdims=True))
        function = interquartile_means if source == EVALUATIONS else of_means
    points, curves = points_of(games, source), []
    points = points.assign(dip=points.phase == "after_reset").drop_duplicates(["run", "step", "dip"], keep="last")
    for method in in_order(points.method):
        own = points[(points.method == method) & ~(points.dip & over_games)]
        table = own.pivot(index=["step", "dip"], columns=["env_id", "seed"], values=column).sort_index(axis=1).dropna()
        if len(table):
            scores = table.to_numpy().reshape(len(table), own.env_id.nunique(), -1).transpose(2, 1, 0)  # (seeds, games, steps)
            values, interval = bootstrap(function, scores, args)
            seeds = scores[:, 0] if np.isnan(interval).all() and len(scores) > 1 and not over_games else scores[:0, 0]
            steps, dips = (table.index.get_level_values(name).to_numpy() for name in ("step", "dip"))
            curves.append(Curve(method, steps, values, dips, interval, seeds))
    return curves


def panels_of(picture: str, games: pd.DataFrame, published: pd.DataFrame, args: Args) -> list[list[Panel]]:
    """A row of panels for every game, or suite: for each replay ratio (or cost) one, and where costs are logged two."""
    (source, over_games), names, rows = CURVES[picture], short_names(games.env_id.unique()), []
    for key, of_key in games.groupby("suite" if over_games else "env_id", sort=False):
        costs = of_key.cost[(of_key.phase == "training") == (source == TRAINING)]
        columns = ["normalized"] if over_games else ["value", "cost"] if len(costs) and costs.notna().all() else ["value"]
        panels = []
        for (at, own), column in itertools.product(of_key.groupby("at", sort=False), columns):
            measure = {"value": own.measure.iloc[0], "cost": "cost", "normalized": f"IQM, {key}"}[column]
            title = f"{own.env_id.nunique()} games" if over_games else names[key] + ": cost" * (column == "cost")
            title += f", {at}" if games["at"].nunique() > 1 else ""
            limits = own.cost_limit[(own.cost_limit < math.inf) & (column == "cost")].unique()
            levels = {"cost limit" + f" {limit:g}" * (len(limits) > 1): limit for limit in limits}
            levels |= iqms_over_games(published, own.env_id.unique()) if picture == "aggregate_training_games" else {}
            curves = curves_of(own, source, column, args, over_games)
            label = measure if over_games else f"{'evaluation' if source == EVALUATIONS else 'training'} {measure}"
            panels += [Panel(title, label, (key, column), curves, levels)] if curves else []
        rows += [panels] if panels else []
    return rows


def new_figure(rows: list[list], height: float) -> tuple[Figure, list]:
    """A figure of 1,800 pixels, of which a page shows every second, and the places in it of all that is in `rows`."""
    if max(map(len, rows)) == 1:
        columns = min(len(rows), 2 if len(rows) <= 4 else 3 if len(rows) <= 9 else 4)
        rows = [sum(rows[first : first + columns], []) for first in range(0, len(rows), columns)]
    figure = Figure(figsize=(9, 0.6 + height * len(rows)), dpi=200, layout="constrained")
    grid = figure.add_gridspec(len(rows), max(map(len, rows)))
    return figure, [(figure.add_subplot(grid[i, j]), one) for i, row in enumerate(rows) for j, one in enumerate(row)]


def explain(figure: Figure, looks: dict[str, tuple], notes: dict[str, bool]) -> None:
    """The legend above; below, what there is in the picture."""
    handles = [Line2D([], [], color=color, linestyle=dash, linewidth=1.8, label=name) for name, (color, dash) in looks.items()]
    if handles:
        letters = lambda columns: sum(max(map(len, names)) + 11 for names in np.array_split(list(looks), columns))
        columns = max((columns for columns in range(1, len(looks) + 1) if letters(columns) <= 135), default=1)
        figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=3)
    text = "; ".join(note for note, applies in notes.items() if note and applies)
    figure.supxlabel(text, x=0.01, horizontalalignment="left", fontsize=8, color="#555555")


def draw_curves(rows: list[list[Panel]], source: str, looks: dict[str, tuple], at: str) -> Figure:
    figure, places = new_figure(rows, 2.9)
    curves = [curve for _, panel in places for curve in panel.curves]
    levels = dict.fromkeys(name for _, panel in places for name in panel.levels)
    levels = dict(zip(levels, zip(itertools.cycle(COLORS_OF_LEVELS), itertools.repeat(":"))))
    in_thousands, first = bool(max(curve.steps.max() for curve in curves) >= 10_000), {}
    for axes, panel in places:
        if first.setdefault(panel.axis, axes) is not axes:
            axes.sharey(first[panel.axis])
        faded = 0.5 if sum(len(curve.seeds) for curve in panel.curves) <= 5 else 0.25
        for curve in panel.curves:
            (color, dash), steps = looks[curve.method], curve.steps / (1000 if in_thousands else 1)
            axes.fill_between(steps, *curve.interval, color=color, alpha=0.13, linewidth=0)
            axes.plot(steps, curve.seeds.T, color=color, alpha=faded, linewidth=0.8)
            axes.plot(steps, curve.values, color=color, linestyle=dash, linewidth=1.8, label=curve.method)
            axes.plot(steps[curve.dips], curve.values[curve.dips], "v", color=color, markeredgecolor="white", zorder=3)
        for name, level in panel.levels.items():
            axes.axhline(level, color=levels[name][0], linestyle=":", linewidth=1.5, label=name)
        axes.margins(x=0)
        axes.set(title=panel.title, ylabel=panel.label, xlabel="environment steps" + " (thousands)" * in_thousands)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter("{x:,g}")
        if "success" in panel.label:
            axes.set_ylim(-0.03, 1.03)
        elif not axes.dataLim.height:  # all are equal, and a scale around them would be made up
            axes.set_yticks([axes.dataLim.y0])
    drawn = {method: look for method, look in looks.items() if any(curve.method == method for curve in curves)}
    explain(figure, drawn | levels, {
        at: True,
        "bands: 95 % intervals over seeds": any(np.isfinite(curve.interval).any() for curve in curves),
        "thin lines: single seeds": any(len(curve.seeds) for curve in curves),
        "▼ right after a reset": any(curve.dips.any() for curve in curves),
        "training games: means over a tenth of the run": source == TRAINING,
        "published: evaluations": any("(published)" in name for name in levels),
    })  # fmt: skip
    return figure


def draw_collapses(collapses: pd.DataFrame, looks: dict[str, tuple], at: str) -> Figure:
    """A panel for every game, in it a row for every method, with its name beside it."""
    several, names = collapses.replay_ratio.nunique() > 1, short_names(collapses.env_id.unique())
    at_ratio = collapses.replay_ratio.map(", replay ratio {:g}".format) if several else ""
    rows = collapses.assign(label=collapses.method + at_ratio, rank=collapses.method.map(rank_of))
    labels = list(dict.fromkeys(rows.sort_values(["replay_ratio", "rank", "method"]).label))
    ratios_first = sorted(rows.groupby(["kind", "env_id"]), key=lambda panel: (panel[0][0] == DIFFERENCE, panel[0][1]))
    figure, places = new_figure([[panel] for panel in ratios_first], 0.65 + 0.24 * len(labels))
    ratios = rows[rows.kind == RATIO]
    widest = np.nanmax([1, *ratios.change, *ratios.high, *itertools.chain(*ratios.of_seeds)])
    for axes, ((kind, env_id), of_game) in places:
        for row in of_game.itertuples():
            color, height = looks[row.method][0], len(labels) - labels.index(row.label)
            axes.plot([row.low, row.high], [height, height], color=color, linewidth=2.5, alpha=0.5)
            if math.isnan(row.low) and len(row.of_seeds) > 1:
                axes.plot(row.of_seeds, [height] * len(row.of_seeds), "o", markerfacecolor="none", color=color, markersize=5)
            axes.plot([row.change], [height], "o", color=color, markersize=7, label=row.label)
        axes.axvline(1 if kind == RATIO else 0, color="#777777", linewidth=1, linestyle="--")
        axes.set(title=names[env_id], xlabel=kind, ylim=(0.4, len(labels) + 0.6))
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.locator_params("x", nbins=6)
        axes.set_yticks(range(len(labels), 0, -1), labels if axes.get_subplotspec().is_first_col() else [""] * len(labels))
        if kind == RATIO:
            axes.set_xlim(-0.05, 1.05 * min(widest, 3))
    explain(figure, {}, {
        at: True, "dots: all resets of all seeds": True, "lines: 95 % intervals over seeds": rows.low.notna().any(),
        "circles: single seeds": any(rows.low.isna() & (rows.of_seeds.map(len) > 1)), "dashed: nothing is lost": True,
    })  # fmt: skip
    return figure


def pictures_of(games: pd.DataFrame, shared: pd.DataFrame, collapses: pd.DataFrame, published: pd.DataFrame, args: Args):
    """Name and picture, one after the other."""
    matplotlib.rcParams.update(STYLE)
    looks, at = looks_of(games.method), games["at"].iloc[0] if games["at"].nunique() == 1 else ""
    for picture in args.pictures or [*CURVES, *COLLAPSES]:
        if picture in COLLAPSES:
            rows = collapses[(collapses.source == COLLAPSES[picture]) & collapses.change.notna()]
            if len(rows):
                yield picture, draw_collapses(rows, looks, at)
        elif rows := panels_of(picture, shared if CURVES[picture][1] else games, published, args):
            yield picture, draw_curves(rows, CURVES[picture][0], looks, at)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may know less than UTF-8
    args = tyro.cli(Args, description=__doc__)
    paths = [pathlib.Path(path).expanduser() for path in args.runs or [args.runs_dir]]
    for path in paths:
        if not (path.is_dir() or path.is_file() and (path.suffix == ".csv" or tarfile.is_tarfile(path))):
            fail(f"{path} is not a folder, an archive or a results.csv")
    if min(args.bootstrap_samples, args.reset_window) < 1:
        fail("--bootstrap-samples and --reset-window must be at least 1")
    if unknown := set(args.pictures) - {*CURVES, *COLLAPSES}:
        fail(f"--pictures {unknown.pop()}: there are {', '.join([*CURVES, *COLLAPSES])}")
    references = pd.DataFrame(columns=["game", "method", "score"])
    try:
        if args.references:
            file = pathlib.Path(args.references).expanduser()
            references = pd.read_csv(file, comment="#", usecols=[*references], dtype={"score": float})
    except (OSError, ValueError) as error:
        fail(f"--references {args.references}: {error}")
    games, left_out, notes = read_games(paths, args.merge_versions)
    left_out = [f"left out: {line}" for line in left_out]
    print(*left_out, *notes, sep="\n", end="\n" if left_out + notes else "", file=sys.stderr)
    if games.empty:
        fail(f"there is no finished run in {', '.join(map(str, paths))}")
    published = pd.DataFrame({"env_id": games.env_id.unique(), "game": [*map(game_name, games.env_id.unique())]})
    published = published.merge(references.drop_duplicates(["game", "method"]))
    published["normalized"] = [normalized_score(env_id, score) for env_id, score in zip(published.env_id, published.score)]
    published["method"] = published.method + " (published)"
    (shared, more), collapses = comparable(games), collapses_of(games, args)
    tables = tables_of(games, shared, collapses, published, args)
    files = {"table.md": table_text(tables, [f"{games.run.nunique()} runs", *notes, *more, *left_out], args)}
    if all(path.is_dir() for path in paths):  # an archive holds them
        files |= {name: rows.to_csv(index=False, float_format="%.10g") for name, rows in csv_tables(games).items()}
    folder = pathlib.Path(args.out_dir or (paths[0] / "results" if paths[0].is_dir() else paths[0].parent)).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        for name, figure in pictures_of(games, shared, collapses, published, args):
            figure.savefig(folder / f"{name}.png", metadata={"Software": None})  # matplotlib's version
    except OSError as error:
        fail(f"{folder} cannot be written: {error.strerror}: {error.filename}")
    print(f"{short_table(tables)}\n\nwritten to {folder}; with intervals: {folder / 'table.md'}")


if __name__ == "__main__":
    main()
