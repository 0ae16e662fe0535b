"""plot_benchmark.py on run folders made here: its numbers against pandas', numpy's and rliable's, and against ones by hand."""

import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tarfile

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from rliable import library, metrics

from conftest import ROOT, load_script, read_csv

sys.path.insert(0, str(ROOT))

import plot_benchmark as plot  # noqa: E402

ALIEN, PONG, FREEWAY = "AlienNoFrameskip-v4", "PongNoFrameskip-v4", "FreewayNoFrameskip-v4"
LAVA = "MiniGrid-LavaGapS5-v0"
DQN = {"exp_name": "dqn_atari"}
SR = {"exp_name": "sr_dqn_atari", "reset_interval": 80, "reset_depth": "last1"}
RDE = SR | {"exp_name": "rde_dqn_atari", "num_agents": 2, "beta": 50.0}
ADVANTAGE = RDE | {"exp_name": "rde_dqn_selection_advantage", "selection": "advantage", "beta": None}
OLDEST = RDE | {"exp_name": "rde_dqn_beta_1e9", "beta": 1e9}
ARGS = plot.Args(bootstrap_samples=50)
NOTHING_PUBLISHED = pd.DataFrame({"env_id": [], "method": [], "score": [], "normalized": []})


def final(*scores, step: int = 100) -> tuple:
    return step, "final", scores


def reset(step: int, before: tuple, after: tuple) -> list[tuple]:
    return [(step, "before_reset", before), (step, "after_reset", after)]


FINAL = final(1.0, 2.0)
RESET_CURVE = [(50, "scheduled", (100.0, 300.0)), *reset(60, (400.0, 600.0), (900.0, 1100.0)),
               *reset(80, (100.0, 300.0), (0.0, 100.0)), final(300.0, 310.0)]  # fmt: skip


def write_run(parent, evaluations=(FINAL,), name="", games=(), extra="", content=None, **args) -> pathlib.Path:
    """A finished run. `evaluations`: (step, phase, scores of the games); `games` of training: (step, score).

    With a column `extra` (success or cost) a score is a pair of the score and its value. `content`: more of args.json.
    """
    args = {"env_id": ALIEN, "seed": 1, "replay_ratio": 1.0, "total_timesteps": 100, "eval_episodes": 2, **DQN} | args
    folder = parent / (name or f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{args['replay_ratio'] * 100:08.0f}")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": args, "versions": {}, "device": "cpu"} | (content or {})))
    columns = ["episodic_return", extra] if extra else ["episodic_return"]
    values = lambda score: score if extra else (score,)
    rows = [(step, phase, *values(score)) for step, phase, scores in evaluations for score in scores]
    pd.DataFrame(rows, columns=["global_step", "phase", *columns]).to_csv(folder / "evaluations.csv", index=False)
    rows = [(step, *values(score)) for step, score in games]
    pd.DataFrame(rows, columns=["global_step", *columns]).to_csv(folder / "episodes.csv", index=False)
    return folder


def read(*folders) -> pd.DataFrame:
    """The games of a study from which nothing is left out."""
    games, left_out, notes = plot.read_games([*map(pathlib.Path, folders)])
    assert left_out == [] and notes == []
    return games


def tables(games: pd.DataFrame, **args) -> dict:
    args = plot.Args(bootstrap_samples=50, **args)
    return plot.tables_of(games, plot.comparable(games)[0], plot.collapses_of(games, args), NOTHING_PUBLISHED, args)


def collapse_rows(games: pd.DataFrame, source: str = "evaluations", args: plot.Args = ARGS) -> list:
    return list(plot.collapses_of(games, args)[lambda rows: rows.source == source].itertuples())


def pictures(games: pd.DataFrame, *names: str, published: pd.DataFrame = NOTHING_PUBLISHED) -> dict:
    """All of them, or those of these names."""
    args = plot.Args(bootstrap_samples=50, pictures=names)
    figures = dict(plot.pictures_of(games, plot.comparable(games)[0], plot.collapses_of(games, args), published, args))
    for figure in figures.values():
        FigureCanvasAgg(figure).draw()
    return figures


def picture(games: pd.DataFrame, name: str, **options):
    return pictures(games, name, **options)[name]


def lines_of(axes) -> dict:
    """Of every method the points of its thick line."""
    return {line.get_label(): np.array(line.get_data()) for line in axes.lines if line.get_label()[0] != "_"}


def thin_lines(axes) -> list:
    return [line for line in axes.lines if line.get_linewidth() == 0.8]


def table_of(folder: pathlib.Path) -> str:
    """table.md, its cells without the spaces that line them up."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", (folder / "table.md").read_text(encoding="utf-8")))


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.fixture
def call(monkeypatch):
    """The program, called in this process: importing its packages takes longer than its work."""

    def call(*options) -> None:
        monkeypatch.setattr(sys, "argv", ["plot_benchmark.py", "--bootstrap-samples", "50", *map(str, options)])
        plot.main()

    return call


# --------------------------------------------------------------------------------------------------------- what is read


def test_run_by_hand(tmp_path):
    """More evaluations at a reset have no weight in the mean over the run; a run with one evaluation has a mean, too."""
    write_run(tmp_path, RESET_CURVE, games=[(30, 7.0)], **SR)
    write_run(tmp_path)
    games = read(tmp_path)
    assert games[games.phase == "training"][["step", "score", "value"]].values.tolist() == [[30, 7.0, 7.0]]
    one, several = plot.runs_of(games).itertuples()
    # Ten steps from 200 to 500, twenty from 1000 to 200, twenty from 50 to 305.
    assert several.value == 305.0 and several.whole_run == pytest.approx((10 * 350 + 20 * 600 + 20 * 177.5) / 50)
    assert one.value == one.whole_run == 1.5


def test_an_archive_and_a_results_csv_give_what_their_folders_give(tmp_path, call):
    """Without the CSV files, which they are. (A results.csv knows no single games; here nothing depends on them.)"""
    for seed, env_id in itertools.product((1, 2), ("cheetah-run", "walker-run")):
        curve = [*reset(50, (20.0, 20.0), (3.0 + seed, 3.0 + seed)), final(9.0, 9.0)]
        write_run(tmp_path / "runs", curve, games=[(40, 8.0), (90, 5.0)], **SR, seed=seed, env_id=env_id)
    with tarfile.open(tmp_path / "runs.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "runs", ".")
    call(tmp_path / "runs")
    call(tmp_path / "runs.tar.xz")
    call(tmp_path / "runs" / "results" / "results.csv", "--out-dir", tmp_path / "of_csv")
    expected = files_of(tmp_path / "runs" / "results")
    assert expected.pop("results.csv") and expected.pop("training_games.csv") and "table.md" in expected
    assert expected.keys() > {"learning_curves.png", "training_games.png", "aggregate_curves.png", "collapse.png"}
    assert files_of(tmp_path / "of_csv") == expected
    assert files_of(tmp_path) == expected | {"runs.tar.xz": (tmp_path / "runs.tar.xz").read_bytes()}


def test_several_folders_are_one_study(tmp_path):
    write_run(tmp_path / "a", name="run")
    write_run(tmp_path / "b" / "deeper", name="run", seed=2)
    write_run(tmp_path, name="alone", seed=3)
    games = read(tmp_path / "a", tmp_path / "b", tmp_path / "alone")
    names = {f"{tmp_path}/a/run": 1, f"{tmp_path}/b/deeper/run": 2, f"{tmp_path}/alone": 3}
    assert {os.path.normpath(run): seed for run, seed in zip(games.run, games.seed)} == names


def test_a_file_of_a_time_with_one_rule(tmp_path):
    """Its methods get their names of today, and its rows of training means are passed over."""
    row = "run,env_id,method,replay_ratio,seed,global_step,phase,episodes,score\n"
    row += "r,Alien,RDE+DQN,1,1,100,final,5,7\nr,Alien,RDE+DQN,1,1,100,training,5,3\n"
    (tmp_path / "results.csv").write_text(row)
    (tmp_path / "training_games.csv").write_text("env_id,method,replay_ratio,seed,global_step,episodic_return\n")
    games = read(tmp_path / "results.csv")
    assert games[["method", "phase", "score"]].values.tolist() == [["RDE+DQN value", "final", 7]]


LABELS = [
    (DQN, "DQN"), (SR, "SR+DQN"), (RDE, "RDE+DQN value"), (SR | {"reset_interval": 0}, "DQN"),
    (RDE | {"num_agents": 1}, "SR+DQN"), (RDE | {"reset_interval": 0}, "Ensemble+DQN"),
    (RDE | {"exp_name": "rde_sac_dmc"}, "RDE+SAC value"), (SR | {"exp_name": "rde_sac_dmc"}, "SR+SAC"),
    (DQN | {"exp_name": "rde_sac_dmc"}, "SAC"), (RDE | {"exp_name": "my idea"}, "my idea"), (DQN | {"exp_name": "dqn"}, "DQN"),
    (DQN | {"exp_name": "rde_dqn"}, "DQN"), (SR | {"exp_name": "sr_sac_lag"}, "SR+SAC-Lag"),
    (RDE | {"exp_name": "rde_sac_safety"}, "RDE+SAC-Lag value"), (DQN | {"exp_name": "dqnx"}, "dqnx"),
    (RDE | {"exp_name": "rde_sac_lag_kappa_1"}, "RDE+SAC-Lag value kappa 1"), (DQN | {"exp_name": "rnd_dqn_atari"}, "RND-DQN"),
    (RDE | {"exp_name": "rde_drq_atari"}, "RDE+DrQ value"), (SR | {"exp_name": "rde_drq_atari"}, "SR+DrQ"),
    (DQN | {"exp_name": "drq_num-atoms_1"}, "DrQ num-atoms 1"), (ADVANTAGE, "RDE+DQN advantage"),
    (RDE | {"selection": "advantage", "beta": 5.0}, "RDE+DQN advantage"),
    (RDE | {"selection": "value", "beta": None}, "RDE+DQN value"), (RDE | {"beta": 3.0}, "RDE+DQN value β = 3"),
    (ADVANTAGE | {"exp_name": "rde_dqn_selection_advantage_beta_2", "beta": 2}, "RDE+DQN advantage β = 2"),
    (OLDEST, "RDE+DQN oldest alone"),
    (OLDEST | {"exp_name": "rde_dqn_selection_value_beta_1e9_tau_1"}, "RDE+DQN oldest alone tau 1"),
    (SR | {"exp_name": "rde_dqn_num-agents_1"}, "SR+DQN"), (DQN | {"exp_name": "rde_dqn_num-agents_1_reset-interval_0"}, "DQN"),
    (RDE | {"exp_name": "rde_dqn_num-agents_3", "num_agents": 3}, "RDE+DQN value num-agents 3"),
]  # fmt: skip


@pytest.mark.parametrize("args, label", LABELS)
def test_method_names(args, label, tmp_path):
    write_run(tmp_path, **args)
    assert read(tmp_path).method.unique().tolist() == [label]


def test_methods_in_their_order_and_their_looks():
    """A method looks alike beside whatever else there is; a variant looks otherwise beside the plain one, like it alone."""
    methods = ["DQN", "SR+DQN", "RDE+DQN value@a", "RDE+DQN value@b", "RDE+DQN value β = 3", "RDE+DQN advantage",
               "RDE+DQN oldest alone", "Ensemble+DQN", "my idea"]  # fmt: skip
    assert plot.in_order(reversed(methods)) == methods
    roles = plot.looks_of(["DQN", "SR+DQN", "RDE+DQN value", "RDE+DQN advantage", "RDE+DQN oldest alone"])
    assert len({color for color, _ in roles.values()}) == 5 == len(set(map(str, roles.values())))
    for family, (role, look) in itertools.product(("DQN", "SAC", "SAC-Lag", "DrQ", "RND-DQN"), roles.items()):
        method = role.replace("DQN", family)
        variant = f"{method} tau 0.1"
        assert plot.looks_of([method]) == {method: look} and plot.looks_of([variant]) == {variant: look}
        looks = plot.looks_of([method, variant, "my idea", f"Ensemble+{family}"])
        assert looks[method] == look and looks[variant] not in roles.values()


def test_scales_and_names():
    """The scores of random players and humans are those of the scripts."""
    script = load_script("rde_dqn_atari")
    assert script.RANDOM_AND_HUMAN_SCORES == plot.RANDOM_AND_HUMAN_SCORES
    for env_id in (f"{game}NoFrameskip-v4" for game in plot.RANDOM_AND_HUMAN_SCORES):
        assert script.normalized_scores(env_id, 12.5) == {"human_normalized_score": plot.normalized_score(env_id, 12.5)}
        assert plot.suite_of(env_id) == plot.ATARI
    assert script.normalized_scores("TennisNoFrameskip-v4", 12.5) == {}
    assert plot.normalized_score("hopper-hop", 250.0) == 0.25
    env_ids = ("finger-turn_hard", "lander-v13", "MiniGrid-LavaGapS7-v0", "TennisNoFrameskip-v4")
    assert [plot.suite_of(env_id) for env_id in env_ids] == [plot.DMC, None, None, None]
    for names, short in (
        ("MiniGrid-LavaGapS5-v0 MiniGrid-GoToDoor-5x5-v0", "LavaGapS5 GoToDoor-5x5"),
        ("MiniGrid-LavaGapS5-v0 LunarLander-v3", "MiniGrid-LavaGapS5 LunarLander"),
        (f"{ALIEN} cheetah-run", "Alien cheetah-run"), ("MinAtar/Asterix-v1", "Asterix"),
        ("Pendulum-v0 Pendulum-v1", "Pendulum-v0 Pendulum-v1"),  # not one name for two
    ):  # fmt: skip
        assert [*plot.short_names(names.split()).values()] == short.split()


# ------------------------------------------------------------------------------------------------------ what counts as one


def test_seeds_may_differ_in_what_does_not_matter(tmp_path):
    """Where runs are kept, what has no effect, what an older script did not know, and null for a default."""
    alone = RDE | {"num_agents": 1, "beta": 7.0, "selection": "advantage"}
    write_run(tmp_path, **SR, cuda=True, runs_dir="a", beta=50.0)
    write_run(tmp_path / "b", **alone, seed=2, cuda=False, runs_dir="b")
    write_run(tmp_path, reset_depth="last1", reset_interval=0)
    write_run(tmp_path, seed=2, reset_depth="full", reset_interval=0, critic_norm="none")
    write_run(tmp_path, **RDE)
    write_run(tmp_path, **RDE | {"beta": None}, seed=2, selection="value")
    assert read(tmp_path).drop_duplicates("run").method.value_counts().to_dict() == {"DQN": 2, "SR+DQN": 2, "RDE+DQN value": 2}


@pytest.mark.parametrize("name, rare, usual", [("kappa", 0.5, 1.0), ("reset_depth", "last1", "full")])
def test_most_runs_decide_which_arguments_count(tmp_path, name, rare, usual):
    for seed, value in ((1, rare), (2, usual), (3, usual)):
        write_run(tmp_path, **RDE | {"seed": seed, name: value})
    games, (left_out,), _ = plot.read_games([tmp_path])
    assert list(games.seed.unique()) == [2, 3] and f"{name} {rare} instead of {usual}" in left_out


def test_versions_of_a_script_are_methods_of_their_own(tmp_path, capsys, call):
    """By the hash that older runs have, and by the script's text, which newer runs have."""
    write_run(tmp_path, content={"script_sha256": "0123456789"})
    write_run(tmp_path, seed=2)  # of neither
    for seed, text in ((3, "one"), (4, "one"), (5, "other")):
        (write_run(tmp_path, seed=seed, content={"script": "dqn.py"}) / "dqn.py").write_text(text)
    write_run(tmp_path, **SR, content={"script_sha256": "1" * 64})
    games, left_out, (note,) = plot.read_games([tmp_path])
    seeds = games.drop_duplicates("run").groupby("method").seed.apply(list)
    assert sorted(seeds) == [[1], [1], [2], [3, 4], [5]] and left_out == []
    assert [name.split("@")[0] for name in plot.in_order(games.method)] == ["DQN"] * 4 + ["SR+DQN"]
    assert re.fullmatch(r"DQN is of different versions of the script: @0123456, @\w{7}, @\w{7}, @unknown", note)
    call(tmp_path, "--pictures", "learning_curves")
    assert capsys.readouterr().err == f"{note}\n" and f"- {note}\n" in (tmp_path / "results" / "table.md").read_text()
    games, left_out, notes = plot.read_games([tmp_path], merge_versions=True)
    assert plot.in_order(games.method) == ["DQN", "SR+DQN"] and left_out == notes == []


# ------------------------------------------------------------------------------------------------------- what is left out

LINE = "line 2 is cut off, or lacks one of global_step, phase, episodic_return"
swap = str.replace
SPOILED = {
    "cut args": ("args.json", lambda text: text[:20], "Expecting"),
    "args without args": ("args.json", lambda text: "{}", "args.json has no 'args'"),
    "no seed": ("args.json", lambda text: swap(text, '"seed"', '"root"'), "args.json has no 'seed'"),
    "no number": ("args.json", lambda text: swap(text, "100", '"many"'), "invalid literal for int()"),
    "no evaluations": ("evaluations.csv", lambda text: None, "evaluations.csv is missing"),
    "no games": ("episodes.csv", lambda text: None, "episodes.csv is missing"),
    "empty": ("evaluations.csv", lambda text: "", "No columns to parse"),
    "heading alone": ("evaluations.csv", lambda text: text.split("\n")[0] + "\n", "not finished"),
    "other columns": ("evaluations.csv", lambda text: swap(text, "episodic_return", "score"), LINE),
    "cut row": ("evaluations.csv", lambda text: text[:-2], "evaluations.csv: line 5 is cut off"),
    "text score": ("evaluations.csv", lambda text: swap(text, "1.0", "many"), "could not convert string to float: 'many'"),
    "score that is no number": ("evaluations.csv", lambda text: swap(text, "1.0", "nan", 1), LINE),
    "endless score": ("evaluations.csv", lambda text: swap(text, "1.0", "inf", 1), LINE),
    "episode lost": ("evaluations.csv", lambda text: swap(text, "50,scheduled,2.0\n", ""), "does not have 2 episodes"),
    "episode of another step": ("evaluations.csv", lambda text: swap(text, "50", "40", 1), "does not have 2 episodes"),
    "final cut off": ("evaluations.csv", lambda text: text.split("100,final,2")[0], "there is no complete final evaluation"),
    "final too early": ("args.json", lambda text: swap(text, "100", "200"), "there is no complete final evaluation"),
    "nan game": ("episodes.csv", lambda text: text + "90,nan\n", "episodes.csv: line 2 is cut off, or lacks"),
    "other arguments": ("args.json", lambda text: swap(text, ": 2,", ': 2, "tau": 2,', 1), "runs of DQN: tau 2 instead of 1"),
    "same seed": ("args.json", lambda text: swap(text, '"seed": 2', '"seed": 1'), "another run of the same seed counts"),
}  # fmt: skip


def test_spoiled_folders_have_a_named_line_each(tmp_path):
    for seed in (1, 3):
        write_run(tmp_path, seed=seed, tau=1)
    for case, (name, change, _) in SPOILED.items():
        file = write_run(tmp_path, [(50, "scheduled", (1.0, 2.0)), FINAL], name=case, seed=2) / name
        text = change(file.read_text())
        file.unlink() if text is None else file.write_text(text)
    games, left_out, _ = plot.read_games([tmp_path])
    assert list(games.seed.unique()) == [1, 3] and "\n" not in "".join(left_out)
    for line, case in zip(left_out, sorted(SPOILED), strict=True):
        assert line.startswith(f"{case}: ") and SPOILED[case][2] in line


@pytest.mark.parametrize("options, message", [
    ("nowhere", "nowhere is not a folder, an archive or a results.csv"), ("empty", "there is no finished run in empty"),
    ("file", "file is not a folder"), ("runs --bootstrap-samples 0", "--bootstrap-samples and --reset-window must be"),
    ("runs --reset-window 0", "--bootstrap-samples and --reset-window must be"),
    ("runs --pictures colapse", "--pictures colapse: there are learning_curves, "),
    ("runs --out-dir file", "file cannot be written: File exists"),
    ("runs --references nowhere", "--references nowhere: [Errno 2] No such file"),
    ("runs --references half.csv", "--references half.csv: could not convert string to float: 'many'"),
    ("runs --references other.csv", "--references other.csv: Usecols do not match columns"),
])  # fmt: skip
def test_bad_arguments(tmp_path, monkeypatch, capsys, call, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "half.csv").write_text("game,method,score\nAlien,BBF,3\nAlien,DER,many\n")
    (tmp_path / "other.csv").write_text("game,who,score\nAlien,BBF,3\n")
    write_run(tmp_path / "runs")
    with pytest.raises(SystemExit) as end:
        call(*options.split())
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ statistics


@pytest.mark.parametrize("seeds, games, has_interval", [
    (1, 1, False), (2, 26, False), (3, 10, True), (4, 1, False), (4, 9, False), (5, 1, True), (5, 3, True), (7, 26, True),
])  # fmt: skip
def test_interquartile_means_and_their_intervals_are_rliables(seeds, games, has_interval):
    """The same draws, written out: from the global generator, seeds drawn anew for every game. Few seeds have no interval."""
    scores = np.random.default_rng(0).normal(size=(seeds, games, 2))
    iqms = lambda scores: [metrics.aggregate_iqm(scores[..., i]) for i in range(2)]
    np.random.seed(0)
    draws = [np.random.choice(seeds, scores.shape) for _ in range(50)]
    samples = [iqms(scores[draw, np.arange(games)[:, np.newaxis], np.arange(2)]) for draw in draws]
    expected = np.percentile(samples, [2.5, 97.5], axis=0) if has_interval else np.full((2, 2), math.nan)
    point, interval = plot.bootstrap(plot.interquartile_means, scores, ARGS)
    np.testing.assert_allclose(point, iqms(scores), rtol=1e-12)
    np.testing.assert_allclose(interval, expected, rtol=1e-12)


def mean_over_seeds(*values: float) -> str:
    return plot.mean_over_seeds(pd.Series(values, dtype=float), ARGS)


def test_numbers_and_what_stands_in_brackets():
    """The seeds' own values, and from five on the interval."""
    for value, text in ((1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (0.0, "0.00"),
                        (0.01234, "0.012"), (-20.66, "-20.7"), (math.nan, "-")):  # fmt: skip
        assert plot.number(value) == text
    assert mean_over_seeds(2.0) == "2.00" and mean_over_seeds(math.nan) == "-"
    assert mean_over_seeds(1.0, 2.0) == mean_over_seeds(1.0, math.nan, 2.0) == "1.50 (1.00, 2.00)"
    values = np.random.default_rng(6).normal(22, 5, size=5)
    _, ((low,), (high,)) = plot.bootstrap(lambda scores: scores.mean(axis=0), values[:, np.newaxis], ARGS)
    assert mean_over_seeds(*values) == f"{values.mean():.1f} ({low:.1f} to {high:.1f})"


# ------------------------------------------------------------------------------------------------------------ over games


@pytest.mark.parametrize("runs, left_out", [
    # Three games of two methods are more than one game of three; of a method the seeds count that have all of them.
    ("dqn Alien 1, dqn Alien 2, dqn Alien 3, dqn Pong 1, dqn Pong 2, dqn Freeway 1, dqn Freeway 2, dqn_tau_1 Alien 1, "
     "sr_dqn Alien 1, sr_dqn Alien 2, sr_dqn Alien 3, sr_dqn Pong 2, sr_dqn Pong 3, sr_dqn Freeway 2",
     "dqn Alien 3, dqn_tau_1 Alien 1, sr_dqn Alien 1, sr_dqn Alien 3, sr_dqn Pong 3"),
    # A game of one method alone.
    ("dqn Alien 1, dqn Pong 1, dqn Freeway 1, sr_dqn Alien 1, sr_dqn Pong 1, drq Alien 1, drq Pong 1", "dqn Freeway 1"),
])  # fmt: skip
def test_over_games_is_what_most_methods_have(tmp_path, runs, left_out):
    for run in runs.split(", "):
        method, game, seed = run.split()
        options = (SR if "sr" in method else DQN) | {"exp_name": method}
        write_run(tmp_path, **options, env_id=f"{game}NoFrameskip-v4", seed=int(seed), name=run)
    shared, notes = plot.comparable(read(tmp_path))
    assert set(shared.run) == set(runs.split(", ")) - set(left_out.split(", "))
    assert sorted(notes) == [f"not among those over games, replay ratio 1: {run}" for run in sorted(left_out.split(", "))]


def test_suites_and_replay_ratios_are_not_mixed(tmp_path):
    for env_id, replay_ratio in [*itertools.product((ALIEN, PONG), (1, 4)), ("TennisNoFrameskip-v4", 1)]:
        write_run(tmp_path, env_id=env_id, replay_ratio=replay_ratio)
    for env_id in ("hopper-hop", "cheetah-run"):
        write_run(tmp_path, [final(500.0, 500.0)], env_id=env_id, exp_name="rde_sac_dmc")
    shared = plot.comparable(read(tmp_path))[0].groupby(["suite", "at"]).env_id.unique()
    assert [(*key, set(env_ids)) for key, env_ids in shared.items()] == [
        (plot.ATARI, "replay ratio 1", {ALIEN, PONG}), (plot.ATARI, "replay ratio 4", {ALIEN, PONG}),
        (plot.DMC, "replay ratio 1", {"hopper-hop", "cheetah-run"})]  # fmt: skip
    assert tables(read(tmp_path))["Over games"][-1] == (plot.DMC, "replay ratio 1", "SAC", 2, 1, "0.500")


def test_curve_over_games_is_without_the_dips_and_at_shared_steps(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    freeway = [(50, "scheduled", (0.0, 0.0)), *reset(60, (3.0, 3.0), (2.0, 2.0)), (70, "scheduled", (0.0, 0.0)),
               final(1.0, 1.0)]  # fmt: skip
    write_run(tmp_path, freeway, **SR, env_id=FREEWAY)
    (axes,) = picture(read(tmp_path), "aggregate_curves").axes
    alien, freeway = (np.array([200, 500, 305]) - 227.8) / 6899.9, np.array([0, 3, 1]) / 29.6
    np.testing.assert_allclose(lines_of(axes)["SR+DQN"], [[50, 60, 100], (alien + freeway) / 2])
    assert "reset" not in axes.figure.get_supxlabel()


def test_training_curves_over_games_are_of_the_games_means(tmp_path):
    """As published scores are: means over seeds, then the interquartile mean over games."""
    means = []
    for env_id, seeds in ((ALIEN, (500, 900)), (FREEWAY, (3, 7)), (PONG, (-20, 20)), ("HeroNoFrameskip-v4", (2000, 3000))):
        means.append(plot.normalized_score(env_id, np.mean(seeds)))
        for seed, score in enumerate(seeds):
            write_run(tmp_path, env_id=env_id, seed=seed, games=[(93, float(score))])
    figure = picture(read(tmp_path), "aggregate_training_games")
    np.testing.assert_allclose(lines_of(figure.axes[0])["DQN"], [[95, 100], [metrics.aggregate_iqm(np.array([means]))] * 2])


def test_probability_of_improvement_is_rliables(tmp_path):
    """Of every pair once, by the final evaluation and by the mean over the run, over the games that both have. An interval has
    a pair of which both have five seeds."""
    random, values = np.random.default_rng(4), {}
    methods = {"DQN": DQN, "SR+DQN": SR, "RDE+DQN value": RDE, "RDE+DQN advantage": ADVANTAGE, "RDE+DQN oldest alone": OLDEST}
    games = [ALIEN, FREEWAY, LAVA]  # no scale is needed
    for (method, args), num_seeds in zip(methods.items(), (5, 6, 7, 5, 4)):
        for env_id in games if method != "SR+DQN" else games[::2]:
            scores = random.integers(0, 4, (num_seeds, 2)).astype(float)  # with ties
            values["final", method, env_id], values["whole", method, env_id] = scores[:, 1], scores.mean(axis=1)
            for seed, (first, last) in enumerate(scores):
                write_run(tmp_path, [(50, "scheduled", (first, first)), final(last, last)], **args, env_id=env_id, seed=seed)
    rows = tables(read(tmp_path))["Probability of improvement"]
    assert sorted(row[1:3] for row in rows) == sorted((other, one) for one, other in itertools.combinations(methods, 2))
    function = lambda *scores: np.array([metrics.probability_of_improvement(*scores)])
    for at, method, other, num_games, *cells in rows:
        env_ids = games[::2] if "SR+DQN" in (method, other) else games
        assert (at, num_games) == ("replay ratio 1", len(env_ids))
        for cell, kind in zip(cells, ("final", "whole"), strict=True):
            pair = [np.array([values[kind, name, env_id] for env_id in env_ids]).T for name in (method, other)]
            np.random.seed(0)
            point, interval = library.get_interval_estimates({"": pair}, function, reps=50)
            low, high = map(plot.number, interval[""].ravel())
            assert cell == plot.number(point[""][0]) + (f" ({low} to {high})" if min(map(len, pair)) >= 5 else "")


# -------------------------------------------------------------------------------------------------------------- collapse


def test_collapse_by_hand(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    write_run(tmp_path, [*reset(60, (0.0, 0.0), (10.0, 10.0)), FINAL], **SR, seed=2)
    games = read(tmp_path)
    (first,), (second,), (both,) = (collapse_rows(games[games.seed.isin(seeds)]) for seeds in ((1,), (2,), (1, 2)))
    assert (first.before, first.after, first.resets, first.change) == (350.0, 525.0, 2, 1.5)
    assert math.isnan(second.change)  # 10 over 0
    assert both.change == pytest.approx((1000 + 50 + 10) / (500 + 200 + 0)) and both.kind == "after / before"
    (row,) = tables(games)["Collapse of a reset"]
    assert row[:5] == ("Alien", "1", "SR+DQN", "evaluations", 3)
    assert row[5:7] == (pytest.approx(700 / 3), pytest.approx(1060 / 3)) and row[7] == "1.51 (1.50, -)"
    assert row[8:] == ("250 → 505, 200 → 50.0", "- → -")  # means of the seeds at step 60, and at step 80; no cost
    assert tables(games[games.seed == 1])["Collapse of a reset"][0][7] == "1.50"
    assert collapse_rows(games[games.phase == "final"]) == []


def test_where_scores_lie_below_zero_the_difference_counts(tmp_path):
    """A score below zero anywhere in the game decides for all methods in it."""
    write_run(tmp_path, [*reset(60, (10.0, 20.0), (4.0, 6.0)), *reset(80, (-1.0, 2.0), (9.0, 12.0)), FINAL], **SR, env_id=PONG)
    for env_id in (PONG, ALIEN):
        write_run(tmp_path, [*reset(60, (9.0, 10.0), (4.0, 5.0)), FINAL], **RDE, env_id=env_id)
    rows = {(row.env_id, row.method): (row.kind, row.change) for row in collapse_rows(read(tmp_path))}
    assert rows == {
        (PONG, "SR+DQN"): ("after − before", 0.0), (PONG, "RDE+DQN value"): ("after − before", -5.0),
        (ALIEN, "RDE+DQN value"): ("after / before", pytest.approx(4.5 / 9.5)),
    }  # fmt: skip
    alien, pong = picture(read(tmp_path), "collapse").axes
    assert (alien.get_xlabel(), pong.get_xlabel()) == ("after / before", "after − before")
    assert lines_of(pong)["RDE+DQN value"][0].tolist() == [-5.0]


def test_the_same_game_played_again_counts_once_in_an_emulator(tmp_path):
    """Five games, four of them one and the same: on Atari the evaluation is two samples, on CartPole five."""
    curve = [*reset(60, (10.0, 10.0, 10.0, 10.0, 30.0), (5.0,) * 5), final(1.0, 1.0, 1.0, 1.0, 4.0)]
    for env_id, mean in ((ALIEN, 20.0), ("CartPole-v1", 14.0), ("Acrobot-v1", 14.0)):
        write_run(tmp_path / env_id, curve, **SR, eval_episodes=5, env_id=env_id)
        (row,) = collapse_rows(read(tmp_path / env_id))
        assert (row.before, row.after) == (mean, 5.0)
        assert plot.runs_of(read(tmp_path / env_id)).value.tolist() == [1.6]


def test_training_games_around_a_reset_by_hand(tmp_path):
    """Those that ended in the window before it (its own step included), and in the window after it."""
    curve = [*reset(5000, (1.0, 2.0), (1.0, 3.0)), *reset(9000, (1.0, 2.0), (1.0, 3.0)), final(1.0, 2.0, step=10_000)]
    games = [(2999, 1000.0), (3000, 900.0), (3001, 10.0), (5000, 30.0), (5001, 8.0), (7000, 4.0), (7001, 90.0), (9000, 500.0)]
    write_run(tmp_path, curve, games=games, **SR, total_timesteps=10_000)
    of_training = lambda window: plot.resets_of(read(tmp_path), window)[lambda rows: rows.source == "training games"]
    assert of_training(2000)[["value_before", "value_after"]].fillna(-1).values.tolist() == [[20.0, 6.0], [295.0, -1]]
    assert of_training(1).value_before.tolist() == [30.0, 500.0]  # another window
    (row,) = collapse_rows(read(tmp_path), "training games")
    assert (row.resets, row.before, row.after) == (1, 20.0, 6.0)  # the second has none after it


@pytest.mark.parametrize("lowest, kind", [(10, "after / before"), (-100, "after − before")])
def test_intervals_of_a_collapse_are_the_bootstrap_over_seeds(tmp_path, lowest, kind):
    """Every seed's resets stay together, and changes are of means."""
    scores = np.random.default_rng(5).uniform(lowest, 100, size=(6, 2, 2)).round(1)  # (seeds, resets, before and after)
    curve = [*reset(50, (1.0, 2.0), (1.0, 2.0)), *reset(80, (1.0, 2.0), (1.0, 2.0)), FINAL]
    for seed, own in enumerate(scores):
        write_run(tmp_path, curve, games=list(zip((50, 55, 80, 85), own.ravel())), **SR, seed=seed)
    args = plot.Args(bootstrap_samples=200, reset_window=10)
    (row,) = collapse_rows(read(tmp_path), "training games", args)

    def change(scores: np.ndarray) -> np.ndarray:  # (seeds, resets, before and after)
        before, after = scores.mean(axis=(0, 1))
        return np.array([after / before if kind == "after / before" else after - before])

    assert row.resets == 12 and row.kind == kind and row.change == pytest.approx(change(scores)[0])
    np.testing.assert_allclose(row.of_seeds, [change(own[np.newaxis])[0] for own in scores])
    _, interval = plot.bootstrap(lambda seeds: change(scores[seeds.ravel()]), np.arange(6)[:, np.newaxis], args)
    np.testing.assert_allclose([row.low, row.high], interval[:, 0], rtol=1e-12)


def test_picture_of_a_collapse(tmp_path):
    """In the panel of a game a row for every method: its mean, and circles for few seeds, or their interval."""
    for seed, after in enumerate((0.0, 200.0, 50.0, 50.0, 50.0)):
        for exp in (SR, RDE) if seed < 2 else (RDE,):
            write_run(tmp_path, [*reset(60, (100.0, 100.0), (after, after)), FINAL], **exp, seed=seed)
    (axes,) = picture(read(tmp_path), "collapse").axes
    few, many = collapse_rows(read(tmp_path))
    assert [lines_of(axes)[method].tolist() for method in ("SR+DQN", "RDE+DQN value")] == [[[1.0], [2]], [[0.7], [1]]]
    drawn_at = {
        height: [line.get_xdata().tolist() for line in axes.lines if set(line.get_ydata()) == {height}] for height in (1, 2)
    }
    assert few.of_seeds.tolist() in drawn_at[2] and [many.low, many.high] in drawn_at[1] and axes.get_xlim()[1] > 2
    assert "circles: single seeds" in axes.figure.get_supxlabel() and "lines: 95 % intervals" in axes.figure.get_supxlabel()


# ------------------------------------------------------------------------------------------------------ success and cost

SUCCESSES = np.array([(10, 18, 20, 19), (0, 2, 4, 18), (0, 0, 0, 2), (1, 2, 3, 4), (5, 5, 5, 5)])  # of 20, (seeds, evaluations)


@pytest.fixture
def minigrid(tmp_path):
    """Success of five seeds at 20, 40, 60, 80 steps, with a return of 0.5 where there is success."""
    for seed, rates in enumerate(SUCCESSES):
        evaluations = [(step, "final" if step == 80 else "scheduled", [(0.5, 1)] * rate + [(0, 0)] * (20 - rate))
                       for step, rate in zip((20, 40, 60, 80), rates)]  # fmt: skip
        args = {"env_id": LAVA, "exp_name": "rde_dqn", "total_timesteps": 80, "eval_episodes": 20}
        write_run(tmp_path, evaluations, games=[(10, (0.5, 1)), (70, (0.5, 1))], extra="success", seed=seed, **args)
    return tmp_path


def test_where_success_is_logged_it_is_what_is_compared(minigrid, call):
    rates = SUCCESSES / 20
    of_runs = (rates[:, :-1] + rates[:, 1:]).mean(axis=1) / 2  # the area under a curve of equal steps
    (row,) = tables(read(minigrid))["Scores"]
    expected = mean_over_seeds(*rates[:, -1]), mean_over_seeds(*of_runs), "1.00 (1.00 to 1.00)"
    assert row[:8] == ("LavaGapS5", "1", "DQN", 5, "success", *expected)
    (axes,) = picture(read(minigrid), "learning_curves").axes
    assert axes.get_ylabel() == "evaluation success" and axes.get_ylim() == (-0.03, 1.03)
    np.testing.assert_allclose(lines_of(axes)["DQN"], [[20, 40, 60, 80], rates.mean(axis=0)])
    _, interval = plot.bootstrap(lambda scores: scores.mean(axis=(0, 1)), rates[:, np.newaxis], ARGS)
    assert set(interval.ravel()) <= set(axes.collections[0].get_paths()[0].vertices[:, 1])  # the band
    call(minigrid)
    rows = read_csv(minigrid / "results" / "results.csv")
    assert [row["success"] for row in rows[:4]] == ["0.5", "0.9", "1", "0.95"] and "cost" not in rows[0]
    assert rows[0]["score"] == "0.25" and read_csv(minigrid / "results" / "training_games.csv")[0]["success"] == "1"
    assert "## Cost" not in (minigrid / "results" / "table.md").read_text()


def test_resets_and_improvement_are_measured_by_success_as_well(tmp_path):
    """Tasks are drawn anew: two failures are not the same game. Equal success at another return is a tie."""
    for method, score in ((SR, 0.6), (RDE, 0.9)):
        curve = [*reset(60, ((0, 0), (0, 0), (score, 1)), ((0, 0),) * 3), final((score, 1), (0, 0), (0, 0))]
        write_run(tmp_path, curve, **method, eval_episodes=3, extra="success", env_id=LAVA)
    assert [(row.before, row.after) for row in collapse_rows(read(tmp_path))] == [(pytest.approx(1 / 3), 0)] * 2
    improvement = tables(read(tmp_path))["Probability of improvement"]
    assert improvement == [("replay ratio 1", "RDE+DQN value", "SR+DQN", 1, "0.500", "0.500")]


def test_a_run_without_success_beside_one_with_it(minigrid, call):
    """Then the score is what both have, in this game."""
    for env_id in (LAVA, "MiniGrid-LavaGapS6-v0"):
        foreign = {"env_id": env_id, "exp_name": "ppo", "total_timesteps": 80}
        write_run(minigrid, [(40, "scheduled", (0.1, 0.2)), final(0.3, 0.4, step=80)], games=[(60, 0.5)], **foreign)
    assert [row[4:6] for row in tables(read(minigrid))["Scores"]] == [
        ("score", mean_over_seeds(*SUCCESSES[:, -1] / 40)), ("score", "0.350"), ("score", "0.350")]  # fmt: skip
    call(minigrid)
    assert {"learning_curves.png", "training_games.png", "table.md"} <= files_of(minigrid / "results").keys()
    rows = read_csv(minigrid / "results" / "results.csv")
    assert [row["success"] for row in rows if row["method"] == "ppo"] == [""] * 4


@pytest.fixture
def safety(tmp_path):
    for seed in (1, 2):
        evaluations = [*reset(50, ((100.0 * seed, 30.0), (200.0, 10.0)), ((20.0, 40.0), (20.0, 60.0))),
                       final((300.0, 5.0), (310.0, 5.0))]  # fmt: skip
        games = [(10, (1.0, 50.0)), (41, (3.0, 25.0)), (60, (5.0, 26.0 * seed)), (100, (7.0, 0.0))]  # at the limit is not above
        args = RDE | {"env_id": "SafetyHopperVelocity-v1", "exp_name": "rde_sac_safety", "cost_limit": 25.0}
        write_run(tmp_path, evaluations, games=games, extra="cost", seed=seed, **args)
    return tmp_path


def test_cost_by_hand(safety):
    (row,) = tables(read(safety))["Cost"]
    assert row[:5] == ("HopperVelocity", "1", "RDE+SAC-Lag value", 2, "25")
    assert row[5:] == ("114 (101, 127)", "4.00 (4.00, 4.00)", "2.00 (2.00, 2.00)")
    of_resets = lambda **args: [row[-1] for row in tables(read(safety), **args)["Collapse of a reset"]]
    assert of_resets() == ["20.0 → 50.0", "37.5 → 19.5"] and of_resets(reset_window=10)[1] == "25.0 → 39.0"
    for limit in ({}, {"cost_limit": None}, {"cost_limit": math.inf}):  # all of them are none
        folder = write_run(safety / str(limit), [final((1.0, 0.0), (2.0, 0.0))], games=[(9, (1.0, 0.0))], extra="cost", **limit)
        assert tables(read(folder))["Cost"][0][4] == "inf"


def test_cost_beside_return_with_its_limit(safety):
    games, method = read(safety), "RDE+SAC-Lag value"
    for name, label, last in (("training_games", "training", 0.0), ("learning_curves", "evaluation", 5.0)):
        returns, costs = picture(games, name).axes
        assert (returns.get_ylabel(), costs.get_ylabel()) == (f"{label} score", f"{label} cost")
        assert set(lines_of(returns)) == {method} and lines_of(costs)["cost limit"][1].tolist() == [25.0, 25.0]
        assert lines_of(costs)[method][1, -1] == last and 50.0 in lines_of(costs)[method][1]
    assert set(lines_of(picture(games.assign(cost_limit=math.inf), "training_games").axes[1])) == {method}


# ------------------------------------------------------------------------------------------------------------ references


def test_published_scores_stand_beside_training_games(tmp_path, call):
    """In a table, and over games as lines in the picture. Of two games; of one there is a single method's."""
    for (env_id, score), seed in itertools.product(((ALIEN, 500.0), (FREEWAY, 10.0)), (1, 2)):
        write_run(tmp_path / "runs", games=[(50, 1.0), (90, score * seed)], env_id=env_id, seed=seed)
    (tmp_path / "published.csv").write_text("# A comment.\ngame,method,score,source\nAlien,BBF,1173.2,somewhere\n"
                                            "Alien,DER,802.3,\nFreeway,BBF,25.5,\nPong,BBF,1,\n")  # fmt: skip
    call(tmp_path / "runs", "--out-dir", tmp_path / "out", "--references", tmp_path / "published.csv")
    part = table_of(tmp_path / "out").partition("## Published scores, beside training games")[2]
    assert "beside the TRAINING games" in part and "not beside its evaluations" in part
    own, bbf = [(750 - 227.8) / 6899.9, 15 / 29.6], [(1173.2 - 227.8) / 6899.9, 25.5 / 29.6]
    assert [line for line in part.splitlines() if line.startswith("| ")][1:] == [
        f"| Alien | DQN, replay ratio 1 | 750 | {own[0]:.3f} |",
        f"| Alien | BBF (published) | 1173 | {bbf[0]:.3f} |",
        f"| Alien | DER (published) | 802 | {(802.3 - 227.8) / 6899.9:.3f} |",
        f"| Freeway | DQN, replay ratio 1 | 15.0 | {own[1]:.3f} |",
        f"| Freeway | BBF (published) | 25.5 | {bbf[1]:.3f} |",
        f"| IQM of 2 games, replay ratio 1 | DQN | - | {np.mean(own):.3f} |",
        f"| IQM of 2 games, replay ratio 1 | BBF (published) | - | {np.mean(bbf):.3f} |",  # DER is not known of Freeway
    ]
    scores = [(ALIEN, "DQN (published)", 0.1), (FREEWAY, "DQN (published)", 0.3), (ALIEN, "DER (published)", 0.0)]
    published = pd.DataFrame(scores, columns=["env_id", "method", "normalized"])  # also one of the same name
    (axes,) = picture(read(tmp_path / "runs"), "aggregate_training_games", published=published).axes
    assert set(lines_of(axes)) == {"DQN", "DQN (published)"} and lines_of(axes)["DQN (published)"][1].tolist() == [0.2, 0.2]
    assert len({line.get_color() for line in axes.lines if line.get_label() in lines_of(axes)}) == 2
    assert "published: evaluations" in axes.figure.get_supxlabel()


def test_the_published_scores_that_come_along(tmp_path, call):
    """Their means over the 26 games are those that the papers give."""
    scores = pd.read_csv(ROOT / "results" / "atari100k_published.csv", comment="#")
    assert set(scores.game) == set(plot.RANDOM_AND_HUMAN_SCORES) and not scores.duplicated(["game", "method"]).any()
    low, high = np.array([plot.RANDOM_AND_HUMAN_SCORES[game] for game in scores.game]).T
    means = ((scores.score - low) / (high - low)).groupby(scores.method).agg(["mean", "size"])
    assert set(means["size"]) == {26}
    for method, mean in {"DER": 0.350, "DrQ(ε)": 0.465, "SPR": 0.616, "SPR with resets": 0.911}.items():
        assert means["mean"][method] == pytest.approx(mean, abs=0.0006)
    write_run(tmp_path / "runs")
    call(tmp_path / "runs", "--references", ROOT / "results" / "atari100k_published.csv")
    assert "| Alien | DrQ(ε) (published) | 865 |" in table_of(tmp_path / "runs" / "results")


# -------------------------------------------------------------------------------------------------------- the whole of it


METHODS = ["DQN", "SR+DQN", "RDE+DQN value β = 3"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """2 games x 3 methods x 2 replay ratios x 2 seeds, and an unfinished run; and what one call makes of it.

    Called by a notebook, in a terminal that knows ASCII, and with paths in the home folder.
    """
    path, random = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
    for env_id, exp, ratio, seed in itertools.product((ALIEN, FREEWAY), (DQN, SR, RDE | {"beta": 3.0}), (1.0, 4.0), (1, 2)):
        curve = [point for point in RESET_CURVE if exp is not DQN or "reset" not in point[1]]
        evaluations = [(step, phase, random.uniform(10, 20, 2).round(2)) for step, phase, _ in curve]
        games = [(step, random.uniform(10, 20)) for step in range(10, 101, 10)]
        write_run(path / "runs", evaluations, games=games, **exp, env_id=env_id, replay_ratio=ratio, seed=seed)
    write_run(path / "runs", [(50, "scheduled", (1.0, 2.0))], name="stopped", seed=3)
    odd = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii", "HOME": str(path)}
    options = "--runs-dir ~/runs --out-dir ~/out --bootstrap-samples 50".split()
    command = [sys.executable, ROOT / "plot_benchmark.py", *options]
    result = subprocess.run(command, cwd=path, capture_output=True, text=True, env=os.environ | odd, check=False)
    assert result.returncode == 0, result.stderr
    return path, result


def test_the_terminal_shows_a_short_table(study):
    path, result = study
    lines = result.stdout.splitlines()
    assert max(map(len, lines[:13])) < 100 and len(lines) == 1 + 12 + 2
    assert lines[0].split() == "game ratio method seeds final whole run at resets".split()
    assert lines[3].split()[:6] == ["Alien", "1", "RDE+DQN", "value", "?", "="]  # β, in ASCII
    assert lines[-1] == f"written to {path}/out; with intervals: {path}/out/table.md"
    assert result.stderr == "left out: stopped: not finished: there is no complete final evaluation\n"


def test_results_csv(study):
    path, _ = study
    rows = pd.read_csv(path / "out" / "results.csv")
    columns = "run env_id method replay_ratio seed global_step phase episodes score human_normalized_score"
    assert list(rows) == columns.split() and len(rows) == 2 * 2 * 2 * (2 + 6 + 6) and set(rows.episodes) == {2}
    assert rows.run.nunique() == 24 and set(rows.method) == set(METHODS) and set(rows.replay_ratio) == {1, 4}
    for run, own in rows.groupby("run"):
        scores = pd.read_csv(path / "runs" / run / "evaluations.csv").groupby(["global_step", "phase"], sort=False)
        scores = scores.episodic_return.mean()
        assert [*zip(own.global_step, own.phase)] == [*scores.index] and set(own.seed) == {int(run.split("__")[2])}
        np.testing.assert_allclose(own.score, scores)
        np.testing.assert_allclose(own.human_normalized_score, plot.normalized_score(own.env_id.iloc[0], own.score))


def test_table(study):
    """All of its rows: of every method, or pair of methods; and the lines below."""
    path, _ = study
    lines, rows = table_of(path / "out").splitlines(), pd.read_csv(path / "out" / "results.csv")
    methods = [line.split(" | ")[2] for line in lines if line.startswith("| Alien | 1 | ")]
    assert methods == [*METHODS, *METHODS[1:], *METHODS[1:]]  # scores, then collapse, by evaluations and training games
    assert sum(line.startswith(("| replay ratio 1 | ", "| replay ratio 4 | ")) for line in lines) == 6  # three pairs each
    scores = rows.human_normalized_score[(rows.method == "DQN") & (rows.replay_ratio == 1) & (rows.phase == "final")]
    iqm = plot.number(metrics.aggregate_iqm(scores.to_numpy()))
    assert f"| human-normalized | replay ratio 1 | DQN | 2 | 2 | {iqm} |" in lines
    assert lines[-2:] == ["- 24 runs", "- left out: stopped: not finished: there is no complete final evaluation"]
    assert not any(word in "".join(lines) for word in ("## Cost", "success", "Published"))


def test_the_same_runs_give_the_same_files(study, tmp_path, call):
    np.random.seed(99)
    call(study[0] / "runs", "--out-dir", tmp_path)
    assert files_of(tmp_path) == files_of(study[0] / "out")
    drawn = {f"{name}.png" for name in [*plot.CURVES, *plot.COLLAPSES]}
    assert files_of(tmp_path).keys() == {"results.csv", "training_games.csv", "table.md"} | drawn


@pytest.fixture(scope="module")
def figures(study):
    return pictures(plot.read_games([study[0] / "runs"])[0])


def nothing_covers_another(figure) -> None:
    """Panels with their names, the legend, and the explanation below; all of it is inside the picture."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    texts = [text for text in figure.texts if text.get_text()]
    boxes += [text.get_window_extent(renderer) for text in (*figure.legends, *texts)]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert figure.bbox.x0 <= box.x0 + 1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1


@pytest.mark.parametrize("name", [*plot.CURVES, *plot.COLLAPSES])
def test_every_picture_names_its_methods_and_axes_and_nothing_covers_another(figures, name):
    """A method looks alike in all of them; panels that are compared share their axis; below it says what there is."""
    figure, looks = figures[name], plot.looks_of(METHODS)
    assert ("▼ right after a reset" in figure.get_supxlabel()) == (name == "learning_curves")
    assert all(axes.get_xlabel() and axes.get_title(loc="left") for axes in figure.axes)
    if name.startswith("collapse"):
        rows = [f"{method}, replay ratio {ratio}" for ratio in (1, 4) for method in METHODS[1:]]
        assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == rows and not figure.legends
        assert not any(text.get_text() for text in figure.axes[1].get_yticklabels())
    else:
        assert ("means over a tenth of the run" in figure.get_supxlabel()) == name.endswith("training_games")
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == METHODS
        assert len(figure.axes) == (2 if name.startswith("aggregate") else 4)
        for axes, replay_ratio in zip(figure.axes, (1, 4, 1, 4)):
            assert axes.get_title(loc="left").endswith(f", replay ratio {replay_ratio}") and axes.get_ylabel()
            assert list(lines_of(axes)) == METHODS
    if name in ("learning_curves", "training_games"):
        one, four, *freeway = (axes.get_ylim() for axes in figure.axes)
        assert one == four and freeway[0] == freeway[1] and one != freeway[0]
    for line in [line for axes in figure.axes for line in axes.lines if line.get_label()[0] != "_"]:
        assert to_hex(line.get_color()).upper() == looks[line.get_label().split(", replay ratio")[0]][0].upper()
    nothing_covers_another(figure)


def test_learning_curve_is_the_mean_over_seeds(study, figures):
    """With thin lines of the seeds, a triangle right after each reset, and none for DQN."""
    rows = pd.read_csv(study[0] / "out" / "results.csv")
    rows = rows[(rows.env_id == ALIEN) & (rows.replay_ratio == 1) & (rows.method == "SR+DQN")]
    first, second = (own.score.to_numpy() for _, own in rows.groupby("seed"))
    axes = figures["learning_curves"].axes[0]
    np.testing.assert_allclose(lines_of(axes)["SR+DQN"], [[50, 60, 60, 80, 80, 100], (first + second) / 2])
    seeds = [line.get_ydata() for line in thin_lines(axes) if line.get_color() == plot.LOOKS["SR+", ""][0]]
    np.testing.assert_allclose(seeds, [first, second])
    triangles = [line.get_data() for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [list(steps) for steps, _ in triangles] == [[60, 80]] * 2
    np.testing.assert_allclose(triangles[0][1], ((first + second) / 2)[[2, 4]])


@pytest.mark.parametrize("num_seeds, num_thin, alpha", [(1, 0, None), (2, 4, 0.5), (3, 6, 0.25), (4, 8, 0.25), (5, 0, None)])
def test_few_seeds_are_lines_and_many_a_band(tmp_path, num_seeds, num_thin, alpha):
    """And below stands the replay ratio, if there is one."""
    for exp, seed in itertools.product((DQN, SR), range(num_seeds)):
        write_run(tmp_path, [(50, "scheduled", (seed, seed)), FINAL], **exp, seed=seed, replay_ratio=0.25)
    (axes,) = picture(read(tmp_path), "learning_curves").axes
    assert [line.get_alpha() for line in thin_lines(axes)] == [alpha] * num_thin
    assert [len(band.get_paths()) for band in axes.collections] == [num_seeds == 5] * 2
    meaning = "bands: 95 % intervals over seeds" if num_seeds == 5 else "thin lines: single seeds" if num_thin else ""
    assert axes.figure.get_supxlabel() == "; ".join(filter(None, ["replay ratio 0.25", meaning]))


def test_methods_of_equal_cost_stand_in_one_panel(tmp_path):
    """If for every ensemble there are single agents of its cost; else runs of one replay ratio do."""
    for exp, replay_ratio in ((DQN, 1), (SR, 1), (SR, 2), (RDE, 1)):
        write_run(tmp_path, RESET_CURVE, **exp, replay_ratio=replay_ratio)
    compared = lambda games: set(zip(games["at"], games.method, games.replay_ratio))
    assert compared(read(tmp_path)) == {
        ("replay ratio × agents = 1", "DQN", 1), ("replay ratio × agents = 1", "SR+DQN", 1),
        ("replay ratio × agents = 2", "RDE+DQN value", 1), ("replay ratio × agents = 2", "SR+DQN", 2)}  # fmt: skip
    one, two = picture(read(tmp_path), "learning_curves").axes
    assert set(lines_of(one)) == {"DQN", "SR+DQN"} and set(lines_of(two)) == {"SR+DQN", "RDE+DQN value"}
    write_run(tmp_path, RESET_CURVE, **RDE, replay_ratio=2)  # nothing costs 4
    assert compared(read(tmp_path)) == {
        ("replay ratio 1", "DQN", 1), ("replay ratio 1", "RDE+DQN value", 1), ("replay ratio 1", "SR+DQN", 1),
        ("replay ratio 2", "RDE+DQN value", 2), ("replay ratio 2", "SR+DQN", 2)}  # fmt: skip


@pytest.mark.parametrize("total, label, last", [(9_999, "environment steps", 9_999),
                                                (10_000, "environment steps (thousands)", 10)])  # fmt: skip
def test_short_studies_have_plain_steps(tmp_path, total, label, last):
    write_run(tmp_path, [final(1.0, 2.0, step=total)], total_timesteps=total, games=[(total, 1.0)])
    for figure in pictures(read(tmp_path)).values():
        assert figure.axes[0].get_xlabel() == label and figure.axes[0].lines[-2].get_xdata()[-1] == last


def test_points_of_training_games(tmp_path):
    """Of 100 steps: at 5, 10, ..., each the mean of the games that ended in the 10 steps up to there. And the table's score."""
    games = {1: [(4, 1.0), (5, 3.0), (6, 10.0), (15, 6.0), (80, 9.0), (100, 7.0)], 2: [(1, 5.0), (12, 20.0), (96, 1.0)], 3: []}
    for seed, own in games.items():
        write_run(tmp_path, seed=seed, games=own)
    write_run(tmp_path, env_id=FREEWAY)
    points = plot.points_of(read(tmp_path), plot.TRAINING).set_index(["env_id", "seed", "step"]).score
    windows = {(seed, step): [score for at, score in own if step - 10 < at <= step]
               for seed, own in games.items() for step in range(5, 101, 5)}  # fmt: skip
    means = {key: np.mean(window) if window else math.nan for key, window in windows.items()}
    assert points[ALIEN].to_dict() == pytest.approx(means, nan_ok=True) and len(points[FREEWAY]) == 20
    axes = picture(read(tmp_path)[lambda rows: rows.seed < 3], "training_games").axes[0]
    steps = [5, 10, 15, 20, 100]  # only where both seeds have games
    expected = [(means[1, step] + means[2, step]) / 2 for step in steps]
    np.testing.assert_allclose(lines_of(axes)["DQN"], [steps, expected])
    # Those of the last fifth; a seed without such games, and a method without any, have none.
    assert [row[7] for row in tables(read(tmp_path))["Scores"]] == ["4.00 (7.00, 1.00)", "-"]


@pytest.mark.parametrize("num_games", [1, 3, 5, 10])
def test_many_games_and_many_methods_fit(tmp_path, num_games):
    for game in [*plot.RANDOM_AND_HUMAN_SCORES][:num_games]:
        for exp in (SR, RDE, RDE | {"exp_name": "rde_dqn_tau_0.00125_reset-interval_80000"}):
            write_run(tmp_path, RESET_CURVE, **exp, env_id=f"{game}NoFrameskip-v4")
    for figure in pictures(read(tmp_path), "learning_curves", "collapse").values():
        assert len(figure.axes) == num_games
        nothing_covers_another(figure)


def test_odd_names_stop_nothing_and_one_run_is_enough(tmp_path, call, capsys):
    """As the name of an environment and of a method: a formula that is none, a cell's border, a file name, a long one."""
    for i, name in enumerate(["$_$", "a|b", "$\\frac{", "my/odd game-v0", "y" * 26, "x" * 200]):
        write_run(tmp_path / "runs", name=f"run{i}", env_id=name if i % 2 else ALIEN, exp_name=name, seed=i)
    call(tmp_path / "runs")
    table, lines = table_of(tmp_path / "runs" / "results"), capsys.readouterr().out.splitlines()[:7]
    assert "| a\\|b |" in table and "| $_$ |" in table
    shortened = sorted(re.findall(r"x+…|y+…", " ".join(lines)))  # in the short table in the terminal
    assert max(map(len, lines)) < 100 and shortened == ["x" * 24 + "…"] * 2 + ["y" * 24 + "…"]
    assert {"$_$", "a|b"} <= {row["method"] for row in read_csv(tmp_path / "runs" / "results" / "results.csv")}
    call(tmp_path / "runs" / "run3", "--out-dir", tmp_path / "one")
    assert files_of(tmp_path / "one").keys() == {"learning_curves.png", "results.csv", "table.md", "training_games.csv"}


# ---------------------------------------------------------------------------------------------------- results/redraw.sh


def test_a_study_is_drawn_again(tmp_path, call):
    """From its archive, or its results.csv, into its folder, with the pictures that it has and nothing else."""
    (tmp_path / "plot_benchmark.py").symlink_to(ROOT / "plot_benchmark.py")
    results = tmp_path / "results"
    for study in ("mine", "cheetah_run_sac", "lunar_lander"):
        (results / study).mkdir(parents=True)
        (results / study / "collapse_training_games.png").write_text("of another time")
    (results / "redraw.sh").write_text((ROOT / "results" / "redraw.sh").read_text())
    write_run(tmp_path / "runs", RESET_CURVE, games=[(30, 7.0)], **SR)
    with tarfile.open(results / "mine" / "runs.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "runs", ".")
    call(tmp_path / "runs", "--out-dir", results / "cheetah_run_sac")
    subprocess.run(["bash", results / "redraw.sh"], env=os.environ | {"PYTHON": sys.executable}, check=True)
    drawn = {"table.md", "learning_curves.png", "collapse.png"}
    assert files_of(results / "mine").keys() == drawn | {"runs.tar.xz"}
    of_csv = {"results.csv", "training_games.csv", "training_games.png"}
    assert files_of(results / "cheetah_run_sac").keys() == drawn | of_csv
    assert files_of(results / "lunar_lander").keys() == {"collapse_training_games.png"}


def test_the_packed_studies_are_read_whole():
    """What stands in the repository: nothing is left out, and MiniGrid's probability is that of success."""
    games, left_out, _ = plot.read_games([ROOT / "results" / "minigrid" / "runs.tar.xz"], merge_versions=True)
    assert left_out == [] and games.run.nunique() >= 120 and set(games.measure) == {"success"}
    rows = tables(games[games.method.isin(["SR+DQN", "RDE+DQN value"])])["Probability of improvement"]
    assert rows[0][:4] == ("replay ratio 0.5", "RDE+DQN value", "SR+DQN", 4) and rows[0][4].startswith("0.675 (")
