"""plot_benchmark.py on run folders made here: its numbers against ones worked out by hand, and against rliable's."""

import ast
import csv
import itertools
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rliable import library, metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot_benchmark as plot  # noqa: E402

ALIEN, PONG, FREEWAY = "AlienNoFrameskip-v4", "PongNoFrameskip-v4", "FreewayNoFrameskip-v4"
DQN = {"exp_name": "dqn_atari"}
SR = {"exp_name": "sr_dqn_atari", "reset_interval": 80, "reset_depth": "last1"}
RDE = SR | {"exp_name": "rde_dqn_atari", "num_agents": 2, "beta": 50.0}
FINAL = (100, "final", (1.0, 2.0))
NOTHING_PUBLISHED = pd.DataFrame({"env_id": [], "method": [], "score": [], "normalized": []})


def write_run(parent, evaluations, name="", games=(), extra="", script_sha256=None, **args) -> pathlib.Path:
    """A finished run. `evaluations`: (step, phase, scores of the games); `games` of training: (step, score).

    With a column `extra` (success or cost) a score is a pair of the score and its value.
    """
    args = {"env_id": ALIEN, "seed": 1, "replay_ratio": 1.0, "total_timesteps": 100, "eval_episodes": 2, **DQN} | args
    start_time = f"20260101-{args['replay_ratio'] * 100:06.0f}"
    folder = parent / (name or f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{start_time}")
    folder.mkdir(parents=True)
    version = {"script_sha256": script_sha256} if script_sha256 else {}
    (folder / "args.json").write_text(json.dumps({"args": args, "versions": {}, "device": "cpu"} | version))
    headings = [extra] if extra else []
    with open(folder / "evaluations.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["global_step", "phase", "episode", "episodic_return", *headings])
        for step, phase, scores in evaluations:
            rows.writerows((step, phase, i, *(score if extra else (score,))) for i, score in enumerate(scores))
    with open(folder / "episodes.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["global_step", "episodic_return", "episodic_length", "wall_seconds", *headings])
        for step, score in games:
            score, *value = score if extra else (score,)
            rows.writerow((step, score, 400, f"{step}.25", *value))
    (folder / "model.pt").write_bytes(b"weights")
    return folder


def read(folder) -> pd.DataFrame:
    """The games of a study from which nothing is left out."""
    games, left_out, notes = plot.read_games(str(folder))
    assert left_out == [] and notes == []
    return games


def tables(games: pd.DataFrame, **args) -> dict:
    args = plot.Args(bootstrap_samples=50, **args)
    collapses = plot.collapses_of(plot.resets_of(games, args.reset_window), args)
    return plot.tables_of(games, plot.comparable(games)[0], collapses, NOTHING_PUBLISHED, args)


def pictures(games: pd.DataFrame, published: pd.DataFrame = NOTHING_PUBLISHED, window: int = 2000) -> dict:
    args = plot.Args(bootstrap_samples=50)
    collapses = plot.collapses_of(plot.resets_of(games, window), args)
    figures = dict(plot.pictures_of(games, plot.comparable(games)[0], collapses, published, args))
    for figure in figures.values():
        figure.canvas.draw()
        plot.plt.close(figure)
    return figures


def lines_of(axes) -> dict:
    """Of every method the points of its thick line."""
    return {line.get_label(): np.array(line.get_data()) for line in axes.lines if line.get_label()[0] != "_"}


def band_of(axes, i: int = 0) -> np.ndarray:
    """The corners of a method's band, (corners, 2)."""
    return axes.collections[i].get_paths()[0].vertices


def table_of(folder: pathlib.Path) -> str:
    """table.md, its cells without the spaces that line them up."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", (folder / "table.md").read_text()))


def read_csv(path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def call(monkeypatch):
    """The program, called in this process: importing its packages takes longer than its work."""

    def call(runs_dir: pathlib.Path, out_dir: pathlib.Path, *options: str) -> None:
        folders = ["--runs-dir", str(runs_dir), "--out-dir", str(out_dir)]
        monkeypatch.setattr(sys, "argv", ["plot_benchmark.py", *folders, "--bootstrap-samples", "50", *options])
        plot.main()

    return call


@pytest.fixture
def numbers_only(monkeypatch):
    """Pictures take most of the time."""
    monkeypatch.setattr(plot, "pictures_of", lambda *arguments: iter(()))


RESET_CURVE = [
    (50, "scheduled", (100.0, 300.0)),
    (60, "before_reset", (400.0, 600.0)),
    (60, "after_reset", (900.0, 1100.0)),  # higher than anything else, and no part of the learning curve
    (80, "before_reset", (100.0, 300.0)),
    (80, "after_reset", (0.0, 100.0)),
    (100, "final", (300.0, 310.0)),
]


# --------------------------------------------------------------------------------------------------------- what is read


def test_run_by_hand(tmp_path):
    write_run(tmp_path, RESET_CURVE, games=[(30, 7.0)], **SR)
    games = read(tmp_path)
    assert len(games) == 13 and set(zip(games.env_id, games.replay_ratio, games.method)) == {(ALIEN, 1.0, "SR+DQN")}
    assert games[games.phase == "training"][["step", "score"]].values.tolist() == [[30, 7.0]]
    (run,) = plot.runs_of(games).itertuples()
    assert run.score == 305.0 and run.best == 500.0  # not the 1,000 right after a reset
    evaluations = plot.evaluations_of(games)
    assert list(zip(evaluations.step, evaluations.phase, evaluations.score, evaluations.episodes)) == [
        (50, "scheduled", 200.0, 2), (60, "before_reset", 500.0, 2), (60, "after_reset", 1000.0, 2),
        (80, "before_reset", 200.0, 2), (80, "after_reset", 50.0, 2), (100, "final", 305.0, 2),
    ]  # fmt: skip
    resets = plot.resets_of(games, 10)
    assert resets[["step", "different_before", "different_after"]].values.tolist() == [[60, 500.0, 1000.0], [80, 200.0, 50.0]]


def test_arguments_without_an_effect_do_not_tell_runs_apart(tmp_path):
    """Without resets it says nothing what they do, for one agent nothing is chosen; where they have an effect, they do."""
    settings = lambda **args: plot.parse_args(json.dumps({"args": args | {"env_id": ALIEN, "seed": 1, "total_timesteps": 9}}))[
        1
    ]
    common = {"exp_name": "rde", "replay_ratio": 1.0, "eval_episodes": 2, "num_agents": 1, "reset_interval": 0}
    both = lambda name, values, **args: [settings(**common | args | {name: value}) for value in values]
    for name, values, with_effect in [
        ("reset_depth", ("last1", "full"), {"reset_interval": 9}), ("shrink", (0.8, 0.5), {"reset_interval": 9}),
        ("beta", (50.0, 1e9), {"num_agents": 2}), ("beta_cost", (50.0, 1.0), {"num_agents": 2}), ("kappa", (0.5, 1.0), {"num_agents": 2}),
    ]:  # fmt: skip
        assert len(set(both(name, values))) == 1 and len(set(both(name, values, **with_effect))) == 2, name


LABELS = [
    (DQN, "DQN"), (SR, "SR+DQN"), (RDE, "RDE+DQN"), (SR | {"reset_interval": 0}, "DQN"), (RDE | {"num_agents": 1}, "SR+DQN"),
    (RDE | {"reset_interval": 0}, "Ensemble+DQN"), (RDE | {"exp_name": "rde_sac_dmc"}, "RDE+SAC"),
    (SR | {"exp_name": "rde_sac_dmc"}, "SR+SAC"), (DQN | {"exp_name": "rde_sac_dmc"}, "SAC"),
    (RDE | {"exp_name": "my idea"}, "my idea"),
    (DQN | {"exp_name": "dqn"}, "DQN"), (SR | {"exp_name": "sr_dqn"}, "SR+DQN"), (RDE | {"exp_name": "rde_dqn"}, "RDE+DQN"),
    (DQN | {"exp_name": "rde_dqn"}, "DQN"), (DQN | {"exp_name": "sac_lag"}, "SAC-Lag"),
    (SR | {"exp_name": "sr_sac_lag"}, "SR+SAC-Lag"), (RDE | {"exp_name": "rde_sac_lag"}, "RDE+SAC-Lag"),
    (RDE | {"exp_name": "rde_sac_safety"}, "RDE+SAC-Lag"), (DQN | {"exp_name": "dqnx"}, "dqnx"),
    (RDE | {"exp_name": "rde_sac_lag_kappa_1"}, "RDE+SAC-Lag kappa 1"), (DQN | {"exp_name": "rnd_dqn_atari"}, "RND-DQN"),
    (RDE | {"exp_name": "rde_drq_atari"}, "RDE+DrQ"), (SR | {"exp_name": "rde_drq_atari"}, "SR+DrQ"),
    (DQN | {"exp_name": "rde_drq_atari"}, "DrQ"), (DQN | {"exp_name": "drq_num-atoms_1"}, "DrQ num-atoms 1"),
]  # fmt: skip


@pytest.mark.parametrize("args, label", LABELS)
def test_method_labels(args, label):
    assert plot.method_label(plot.OPTIONAL | args) == label


def test_methods_in_their_order():
    methods = ["my idea", "RDE+DQN@b", "DQN", "SR+DQN", "RDE+DQN kappa 1", "RDE+DQN@a", "Ensemble+DQN"]
    ordered = ["DQN", "SR+DQN", "Ensemble+DQN", "RDE+DQN@a", "RDE+DQN@b", "RDE+DQN kappa 1", "my idea"]
    assert plot.methods_of(pd.DataFrame({"method": methods})) == ordered


def test_scores_are_those_of_the_scripts():
    """The table, and what a script logs as its human-normalized score."""
    script = ast.parse((ROOT / "rde_dqn_atari.py").read_text()).body
    (table,) = (node.value for node in script if isinstance(node, ast.Assign) and "RANDOM_AND" in ast.unparse(node.targets[0]))
    assert ast.literal_eval(table) == plot.RANDOM_AND_HUMAN_SCORES
    (function,) = (
        node for node in script if isinstance(node, ast.FunctionDef) and "RANDOM_AND_HUMAN_SCORES[" in ast.unparse(node)
    )
    names = {"RANDOM_AND_HUMAN_SCORES": plot.RANDOM_AND_HUMAN_SCORES}
    exec(compile(ast.Module([function], []), "script", "exec"), names)
    for game in [*plot.RANDOM_AND_HUMAN_SCORES, "Tennis"]:
        of_script = names[function.name](f"{game}NoFrameskip-v4", 12.5)
        of_script = of_script.get("human_normalized_score") if isinstance(of_script, dict) else of_script
        assert (plot.suite_of(f"{game}NoFrameskip-v4") == plot.ATARI) == (of_script is not None) == (game != "Tennis")
        assert of_script is None or of_script == plot.normalized_score(f"{game}NoFrameskip-v4", 12.5)


def test_scales():
    assert plot.normalized_score(ALIEN, 227.8 + 0.25 * (7127.7 - 227.8)) == pytest.approx(0.25)
    assert plot.normalized_score("hopper-hop", 250.0) == 0.25
    env_ids = (ALIEN, "finger-turn_hard", "lander-v13", "MiniGrid-LavaGapS7-v0", "TennisNoFrameskip-v4")
    assert [plot.suite_of(env_id) for env_id in env_ids] == [plot.ATARI, plot.DMC, None, None, None]


def test_seeds_may_differ_in_what_does_not_matter(tmp_path):
    write_run(tmp_path, [FINAL], **SR, seed=1, cuda=True, runs_dir="a")
    write_run(tmp_path, [FINAL], **RDE | {"num_agents": 1}, seed=2, cuda=False, runs_dir="b")  # the same method
    assert read(tmp_path).run.nunique() == 2


def test_most_runs_decide_which_arguments_count(tmp_path):
    for seed, tau in ((1, 0.1), (2, 0.2), (3, 0.2)):
        write_run(tmp_path, [FINAL], seed=seed, tau=tau)
    games, left_out, _ = plot.read_games(str(tmp_path))
    assert list(games.seed.unique()) == [2, 3] and len(left_out) == 1 and "tau 0.1 instead of 0.2" in left_out[0]


@pytest.fixture
def two_versions(tmp_path):
    write_run(tmp_path, [FINAL], seed=1, script_sha256="0123456789")
    write_run(tmp_path, [FINAL], seed=2, script_sha256="abcdefabcd")
    write_run(tmp_path, [FINAL], seed=3)  # made before hashes were written
    for seed, sha256 in ((1, "1" * 64), (2, "1" * 64)):
        write_run(tmp_path, [FINAL], **SR, seed=seed, script_sha256=sha256)
    return tmp_path


def test_versions_of_a_script_are_methods_of_their_own(two_versions, capsys, call, numbers_only):
    games, left_out, notes = plot.read_games(str(two_versions))
    assert plot.methods_of(games) == ["DQN@0123456", "DQN@abcdefa", "DQN@unknown", "SR+DQN"] and left_out == []
    (note,) = notes
    assert note == "DQN is of different versions of the script: @0123456, @abcdefa, @unknown"
    call(two_versions, two_versions / "out")
    assert capsys.readouterr().err == f"{note}\n" and f"- {note}\n" in (two_versions / "out" / "table.md").read_text()


def test_merged_versions(two_versions):
    games, left_out, notes = plot.read_games(str(two_versions), merge_versions=True)
    assert plot.methods_of(games) == ["DQN", "SR+DQN"] and left_out == notes == []


def test_the_same_method_by_another_script_is_another_version(tmp_path):
    write_run(tmp_path, [FINAL], **SR, seed=1, script_sha256="1" * 64)
    write_run(tmp_path, [FINAL], **RDE | {"num_agents": 1}, seed=2, script_sha256="2" * 64)
    assert plot.methods_of(plot.read_games(str(tmp_path))[0]) == ["SR+DQN@1111111", "SR+DQN@2222222"]
    assert plot.methods_of(plot.read_games(str(tmp_path), merge_versions=True)[0]) == ["SR+DQN"]


# ------------------------------------------------------------------------------------------------------------ statistics


def test_interquartile_mean_by_hand_and_by_rliable():
    scores = np.array([[1.0, 100.0], [3.0, 4.0], [5.0, 6.0], [-50.0, 8.0]])  # sorted: -50 1 | 3 4 5 6 | 8 100
    assert plot.interquartile_means(scores[..., np.newaxis]).tolist() == [4.5]
    random = np.random.default_rng(0)
    for shape in ((2, 1, 3), (3, 2, 5), (5, 26, 4), (1, 1, 1), (7, 3, 2)):
        scores = random.normal(size=shape)
        expected = [metrics.aggregate_iqm(scores[..., i]) for i in range(shape[-1])]
        np.testing.assert_allclose(plot.interquartile_means(scores), expected, rtol=1e-12)


def test_profiles_are_rliables(tmp_path):
    random = np.random.default_rng(1)
    final = {env_id: random.uniform(-20, 30, 3).round(2) for env_id in (FREEWAY, PONG)}
    for env_id, scores in final.items():
        for seed, score in enumerate(scores):
            write_run(tmp_path, [(100, "final", (score, score))], env_id=env_id, seed=seed)
    figure = pictures(read(tmp_path))["performance_profiles"]
    thresholds, profile = lines_of(figure.axes[0])["DQN"]
    scores = np.array([plot.normalized_score(env_id, scores) for env_id, scores in final.items()]).T
    np.testing.assert_allclose(profile, library.score_distributions(scores, thresholds), atol=1e-15)
    assert profile[0] == 1 and profile[-1] == 0 and len(set(profile)) == 7


def test_interval_is_rliables():
    """The same draws, written out: from the global generator, seeds drawn anew for every game."""
    args = plot.Args(bootstrap_samples=300, seed=7)
    scores = np.random.default_rng(2).normal(size=(5, 3))
    point, interval = plot.bootstrap(plot.interquartile_means, scores[..., np.newaxis], args)
    np.random.seed(7)
    samples = []
    for _ in range(300):
        seeds = np.random.choice(5, (5, 3, 1))
        samples.append(metrics.aggregate_iqm(scores[..., np.newaxis][seeds, np.arange(3)[:, np.newaxis], [0]]))
    assert point[0] == pytest.approx(metrics.aggregate_iqm(scores))
    np.testing.assert_allclose(interval[:, 0], np.percentile(samples, [2.5, 97.5]), rtol=1e-12)
    again = plot.bootstrap(plot.interquartile_means, scores[..., np.newaxis], args)[1]
    assert (interval == again).all()
    assert np.isnan(plot.bootstrap(plot.interquartile_means, scores[:1, :, np.newaxis], args)[1]).all()


def test_the_interval_covers_the_truth():
    """Of 95 % intervals, about 95 % hold the true value (fewer with few seeds): not 50 %, not 100 %."""
    random, args = np.random.default_rng(3), plot.Args(bootstrap_samples=200)
    hits = 0
    for i in range(100):
        args.seed = i
        _, (low, high) = plot.bootstrap(plot.interquartile_means, random.normal(size=(10, 4, 1)), args)
        hits += low[0] <= 0 <= high[0]
    assert 85 <= hits <= 99


@pytest.mark.parametrize(
    "value, text",
    [(1234.5, "1234"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (0.01234, "0.012"), (0.0, "0.00"),
     (-20.66, "-20.7")],
)  # fmt: skip
def test_numbers(value, text):
    assert plot.number(value) == text


def test_mean_and_std_by_hand():
    assert plot.number(200.0, [100.0, 200.0, 300.0]) == "200 ± 100" and plot.number(2.0, [2.0]) == "2.00"
    assert plot.number(1.5, [1.0, 2.0]) == f"1.50 ± {math.sqrt(0.5):.2f}" and plot.number(math.nan) == "-"


# ------------------------------------------------------------------------------------------------------------ over games


def test_a_comparison_is_made_of_what_every_method_has(tmp_path):
    for exp in (DQN, SR):
        for env_id, seeds in (
            (ALIEN, (1, 2, 3)),
            (PONG, (1, 2) if exp is DQN else (2, 3)),
            (FREEWAY, (1,) if exp is DQN else ()),
        ):
            for seed in seeds:
                write_run(tmp_path, [(100, "final", (seed, seed))], **exp, env_id=env_id, seed=seed)
    games, notes = plot.comparable(read(tmp_path))
    of = {method: games[games.method == method] for method in ("DQN", "SR+DQN")}
    assert set(zip(of["DQN"].env_id, of["DQN"].seed)) == {(env_id, seed) for env_id in (ALIEN, PONG) for seed in (1, 2)}
    assert set(zip(of["SR+DQN"].env_id, of["SR+DQN"].seed)) == {(env_id, seed) for env_id in (ALIEN, PONG) for seed in (2, 3)}
    expected = [[(seed - 227.8) / (7127.7 - 227.8), (seed + 20.7) / 35.3] for seed in (2, 3)]
    np.testing.assert_allclose(plot.final_scores(of["SR+DQN"]), expected)
    where = "Atari, human-normalized score, replay ratio 1: "
    assert [note.removeprefix(where) for note in notes] == [
        "Freeway is not finished by every method",
        "DQN, seed 3 is not finished in every game", "SR+DQN, seed 1 is not finished in every game",
    ]  # fmt: skip


def test_suites_and_replay_ratios_are_not_mixed(tmp_path, call, numbers_only):
    sac = {"exp_name": "rde_sac_dmc", "num_agents": 1, "reset_interval": 0}
    write_run(tmp_path, [(100, "final", (500.0, 500.0))], **sac, env_id="hopper-hop")
    write_run(tmp_path, [FINAL], env_id=ALIEN)
    write_run(tmp_path, [FINAL], env_id=ALIEN, replay_ratio=4)
    write_run(tmp_path, [FINAL], env_id="TennisNoFrameskip-v4")
    shared = plot.comparable(read(tmp_path))[0].groupby(["suite", "replay_ratio"])
    assert [(*key, list(rows.env_id.unique())) for key, rows in shared] == [
        (plot.ATARI, 1.0, [ALIEN]), (plot.ATARI, 4.0, [ALIEN]), (plot.DMC, 1.0, ["hopper-hop"])]  # fmt: skip
    assert plot.final_scores(shared.get_group((plot.DMC, 1.0))).tolist() == [[0.5]]
    call(tmp_path, tmp_path / "out")
    assert "- Tennis: no scale in common with other games" in (tmp_path / "out" / "table.md").read_text()


def test_curve_over_games_is_without_the_dips_and_at_shared_steps(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    freeway = [(50, "scheduled", (0.0, 0.0)), (60, "before_reset", (3.0, 3.0)), (60, "after_reset", (2.0, 2.0)),
               (70, "scheduled", (0.0, 0.0)), (100, "final", (1.0, 1.0))]  # fmt: skip
    write_run(tmp_path, freeway, **SR, env_id=FREEWAY)
    shared = plot.comparable(read(tmp_path))[0]
    (curve,) = plot.curves_of("aggregate_curves", shared, NOTHING_PUBLISHED, plot.Args())
    assert curve.x.tolist() == [0.05, 0.06, 0.1] and not curve.dip.any()
    alien, freeway = (np.array([200, 500, 305]) - 227.8) / 6899.9, np.array([0, 3, 1]) / 29.6
    np.testing.assert_allclose(curve.y, (alien + freeway) / 2)


def test_training_curves_over_games_are_of_the_games_means(tmp_path):
    """As published scores are: means over seeds, then the interquartile mean over games, here of 4 the middle two."""
    means = []
    for env_id, seeds in ((ALIEN, (500, 900)), (FREEWAY, (3, 7)), (PONG, (-20, 20)), ("HeroNoFrameskip-v4", (2000, 3000))):
        means.append(plot.normalized_score(env_id, sum(seeds) / 2))
        for seed, score in enumerate(seeds):
            write_run(tmp_path, [FINAL], env_id=env_id, seed=seed, games=[(93, float(score))])
    figure = pictures(read(tmp_path))["aggregate_training_games"]
    np.testing.assert_allclose(lines_of(figure.axes[0])["DQN"], [[0.095, 0.1], [np.mean(sorted(means)[1:3])] * 2])


def test_probability_of_improvement_is_rliables(tmp_path):
    random, final = np.random.default_rng(4), {}
    for exp, num_seeds in ((DQN, 3), (SR, 4), (RDE, 5)):
        for env_id in (ALIEN, FREEWAY, "MiniGrid-LavaGapS5-v0"):  # no scale is needed
            if exp is SR and env_id == FREEWAY:
                continue  # then it is compared by the other two
            scores = random.integers(0, 4, num_seeds).astype(float)  # with ties
            final[exp["exp_name"], env_id] = scores
            for seed, score in enumerate(scores):
                write_run(tmp_path, [(100, "final", (score, score))], **exp, env_id=env_id, seed=seed)
    rows = tables(read(tmp_path), seed=3)["Probability of improvement"]
    assert [row[:4] for row in rows] == [(1.0, "RDE+DQN", "DQN", 3), (1.0, "RDE+DQN", "SR+DQN", 2)]
    for row, (other, env_ids) in zip(rows, (("dqn_atari", (ALIEN, FREEWAY)), ("sr_dqn_atari", (ALIEN,)))):
        env_ids = sorted([*env_ids, "MiniGrid-LavaGapS5-v0"])
        pair = [np.array([final[exp, env_id] for env_id in env_ids]).T for exp in ("rde_dqn_atari", other)]
        by_hand = np.mean([[(x > y) + 0.5 * (x == y) for x in pair[0][:, game] for y in pair[1][:, game]]
                           for game in range(len(env_ids))])  # fmt: skip
        np.random.seed(3)
        function = lambda *scores: np.array([metrics.probability_of_improvement(*scores)])
        _, intervals = library.get_interval_estimates({"pair": pair}, function, reps=50)
        assert row[4:] == (f"{by_hand:.3f}", "{:.3f} to {:.3f}".format(*intervals["pair"].ravel()))


# -------------------------------------------------------------------------------------------------------------- collapse


def collapse_rows(games: pd.DataFrame, window: int = 2000) -> list:
    return list(plot.collapses_of(plot.resets_of(games, window), plot.Args(bootstrap_samples=50)).itertuples())


def test_collapse_by_hand(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    write_run(tmp_path, [(60, "before_reset", (0.0, 0.0)), (60, "after_reset", (10.0, 10.0)), FINAL], **SR, seed=2)
    games = read(tmp_path)
    (first,), (second,), (both,) = (collapse_rows(games[games.seed.isin(seeds)]) for seeds in ((1,), (2,), (1, 2)))
    assert (first.before, first.after, first.resets, first.ratio) == (350.0, 525.0, 2, 1.5) and first.source == "evaluations"
    assert math.isnan(second.ratio)  # 10 over 0
    assert both.resets == 3 and both.ratio == pytest.approx((1000 + 50 + 10) / (500 + 200 + 0))
    cells = [row[4:] for row in tables(games)["Collapse of a reset"]]
    assert cells == [(3, pytest.approx(700 / 3), pytest.approx(1060 / 3), "1.51", "-")]
    cells = [row[4:] for row in tables(games[games.seed == 2])["Collapse of a reset"]]
    assert cells == [(1, 0.0, 10.0, "-", "-")]
    assert tables(games[games.seed == 1])["Collapse of a reset"][0][7:] == ("1.50", "-")
    resets = [(60, "before_reset", (-21.0, -19.0)), (60, "after_reset", (-21.0, -21.0)), FINAL]
    write_run(tmp_path / "pong", resets, **SR, env_id=PONG)
    assert math.isnan(collapse_rows(read(tmp_path / "pong"))[0].ratio)
    assert collapse_rows(games[games.phase == "final"]) == []


def test_the_same_game_played_again_counts_once(tmp_path):
    """Five games, four of them one and the same: the evaluation is two samples, not five."""
    before, after = (60, "before_reset", (10.0, 10.0, 10.0, 10.0, 30.0)), (60, "after_reset", (5.0, 5.0, 5.0, 5.0, 5.0))
    final = (100, "final", (1.0, 1.0, 1.0, 1.0, 4.0))
    write_run(tmp_path, [before, after, final], **SR, eval_episodes=5)
    (row,) = collapse_rows(read(tmp_path))
    assert (row.before, row.after) == (20.0, 5.0)
    assert plot.runs_of(read(tmp_path)).score.tolist() == [1.6]  # scores are means over all games


def test_games_with_success_are_all_counted(tmp_path):
    """Their tasks are drawn anew: two failures are not the same game."""
    before, after = (60, "before_reset", ((0, 0), (0, 0), (0.9, 1))), (60, "after_reset", ((0, 0), (0, 0), (0, 0)))
    final = (100, "final", ((0, 0), (0, 0), (0, 0)))
    write_run(tmp_path, [before, after, final], **SR, eval_episodes=3, extra="success")
    (row,) = collapse_rows(read(tmp_path))
    assert row.before == pytest.approx(0.3) and row.after == 0


def test_training_games_around_a_reset_by_hand(tmp_path):
    """Those that ended in the window before it (its own step included), and in the window after it."""
    resets = [(5000, "before_reset", (1.0, 2.0)), (5000, "after_reset", (1.0, 3.0)), (9000, "before_reset", (1.0, 2.0)),
              (9000, "after_reset", (1.0, 3.0)), (10_000, "final", (1.0, 2.0))]  # fmt: skip
    games = [(2999, 1000.0), (3000, 900.0), (3001, 10.0), (5000, 30.0), (5001, 8.0), (7000, 4.0), (7001, 90.0), (9000, 500.0)]
    write_run(tmp_path, resets, games=games, **SR, total_timesteps=10_000)
    table = plot.resets_of(read(tmp_path), 2000)
    assert table[["training_score_before", "training_score_after"]].fillna(-1).values.tolist() == [[20.0, 6.0], [295.0, -1]]
    of_training = [row for row in collapse_rows(read(tmp_path)) if row.source == "training games"]
    assert [(row.resets, row.before, row.after) for row in of_training] == [(1, 20.0, 6.0)]  # the second has none after it
    assert plot.resets_of(read(tmp_path), 1).training_score_before.tolist() == [30.0, 500.0]  # another window


def test_intervals_of_a_collapse_are_the_bootstrap_over_seeds(tmp_path):
    """Every seed's resets stay together, and ratios are of means."""
    random, sums = np.random.default_rng(5), []
    for seed in range(4):
        scores = random.uniform(10, 100, size=(2, 2)).round(1)  # (resets, before and after)
        sums.append(scores.sum(axis=0))
        games = [(step + 5 * side, score) for step, row in zip((50, 80), scores) for side, score in enumerate(row)]
        resets = [(step, phase, (1.0, 2.0)) for step in (50, 80) for phase in ("before_reset", "after_reset")]
        write_run(tmp_path, [*resets, FINAL], games=games, **SR, seed=seed)
    args = plot.Args(bootstrap_samples=200, seed=11)
    row = plot.collapses_of(plot.resets_of(read(tmp_path), 10), args).iloc[1]
    np.random.seed(11)
    samples = []
    for _ in range(200):
        before, after = np.array(sums)[np.random.choice(4, (4, 1))[:, 0]].sum(axis=0)
        samples.append(after / before)
    assert row.source == "training games" and row.resets == 8
    assert row.ratio == pytest.approx(np.sum(sums, axis=0)[1] / np.sum(sums, axis=0)[0])
    np.testing.assert_allclose(row.of_seeds, [after / before for before, after in sums])
    np.testing.assert_allclose([row.low, row.high], np.percentile(samples, [2.5, 97.5]), rtol=1e-12)


def test_picture_of_a_collapse(tmp_path):
    """Beside every game's name a short line for every method, around it its seeds and its interval, none cut off."""
    for seed, after in ((1, 0.0), (2, 100.0)):  # ratios 0 and 1, together 0.5
        for exp in (SR, RDE):
            resets = [(60, "before_reset", (100.0, 100.0)), (60, "after_reset", (after, after)), FINAL]
            write_run(tmp_path, resets, **exp, seed=seed)
    (axes,) = pictures(read(tmp_path))["collapse"].axes
    means, low = lines_of(axes), axes.get_ylim()[0]
    assert set(means) == {"SR+DQN", "RDE+DQN"} and [text.get_text() for text in axes.get_xticklabels()] == ["Alien"]
    assert means["SR+DQN"][0, :2].max() <= 0 <= means["RDE+DQN"][0, :2].min()
    for i, ((left, right, _), ratios) in enumerate(means.values()):
        assert ratios.tolist() == [0.5] * 3 and low < 0
        seeds = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()[:2]) == [left, right]]
        assert sorted(seeds) == [0.0, 0.5, 1.0]
        assert sorted(set(band_of(axes, i)[:, 1])) == [0.0, 1.0]
    assert any(list(line.get_ydata()) == [1, 1] for line in axes.lines)


@pytest.mark.parametrize(
    "env_ids",
    [
        ["SafetyHalfCheetahVelocity-v1", "SafetyPointMaze-v0"],
        [f"MiniGrid-{name}-v0" for name in ("GoToDoor-5x5", "LavaGapS5", "LavaGapS6", "LavaGapS7")],
        [f"{game}NoFrameskip-v4" for game in ("CrazyClimber", "Freeway", "Gopher", "MsPacman")],
        [f"{game}NoFrameskip-v4" for game in list(plot.RANDOM_AND_HUMAN_SCORES)[:7]],
    ],
)
def test_names_below_a_collapse_stand_apart(env_ids, tmp_path):
    for env_id in env_ids:
        write_run(tmp_path, [(60, "before_reset", (9.0, 9.0)), (60, "after_reset", (4.0, 4.0)), FINAL], **SR, env_id=env_id)
    figure = pictures(read(tmp_path))["collapse"]
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.get_xticklabels()]
    assert len(boxes) == len(env_ids)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert axes.get_window_extent().height > figure.bbox.height / 3  # and they leave room for the picture


# ------------------------------------------------------------------------------------------------------ success and cost


@pytest.fixture
def minigrid(tmp_path):
    """Success 0.5, 0.9, 0.95 at 20, 40, 60 steps of a seed; another gets to 0.9 at the end, a third never."""
    for seed, rates in enumerate(((10, 18, 20, 19), (0, 2, 4, 18), (0, 0, 0, 2))):
        evaluations = [(step, "final" if step == 80 else "scheduled", [(0.5, 1)] * rate + [(0, 0)] * (20 - rate))
                       for step, rate in zip((20, 40, 60, 80), rates)]  # fmt: skip
        args = {"env_id": "MiniGrid-LavaGapS5-v0", "exp_name": "rde_dqn", "total_timesteps": 80, "eval_episodes": 20}
        write_run(tmp_path, evaluations, games=[(10, (0.5, 1))], extra="success", seed=seed, **args)
    return tmp_path


def test_success_by_hand(minigrid):
    runs = plot.runs_of(read(minigrid))
    assert runs.success.tolist() == [0.95, 0.9, 0.1] and runs.steps_to_success.fillna(-1).tolist() == [40, 80, -1]
    (row,) = tables(read(minigrid))["Success"]
    np.random.seed(0)
    samples = [np.mean(np.array([0.95, 0.9, 0.1])[np.random.choice(3, (3, 1))]) for _ in range(50)]
    interval = "{:.3f} to {:.3f}".format(*np.percentile(samples, [2.5, 97.5]))
    assert row == ("MiniGrid-LavaGapS5-v0", 1.0, "DQN", 3, "0.650", interval, "2 of 3", "80")
    assert tables(read(minigrid)[lambda games: games.seed > 0])["Success"][0][-2:] == ("1 of 2", "inf")


def test_success_curves_have_bands(minigrid, call):
    (axes,) = pictures(read(minigrid))["success_curves_MiniGrid-LavaGapS5-v0"].axes
    np.testing.assert_allclose(lines_of(axes)["DQN"], [[0.02, 0.04, 0.06, 0.08], [1 / 6, 1 / 3, 0.4, 0.65]])
    scores = np.array([[0.5, 0.9, 1.0, 0.95], [0, 0.1, 0.2, 0.9], [0, 0, 0, 0.1]])[:, np.newaxis]
    interval = plot.bootstrap(lambda scores: scores.mean(axis=(0, 1)), scores, plot.Args(bootstrap_samples=50))[1]
    assert {*zip([0.02, 0.04, 0.06, 0.08] * 2, interval.ravel())} <= {*map(tuple, band_of(axes))}
    call(minigrid, minigrid / "out")
    names = {file.name for file in (minigrid / "out").iterdir()}
    assert "success_curves_MiniGrid-LavaGapS5-v0.png" in names and not any("cost" in name for name in names)
    table = (minigrid / "out" / "table.md").read_text()
    assert "## Success" in table and "cost" not in table.lower()
    rows = read_csv(minigrid / "out" / "results.csv")
    assert [row["success"] for row in rows[:4]] == ["0.5", "0.9", "1", "0.95"] and "cost" not in rows[0]
    assert read_csv(minigrid / "out" / "training_games.csv")[0]["success"] == "1"


@pytest.fixture
def safety(tmp_path):
    for seed in (1, 2):
        evaluations = [(50, "before_reset", ((100.0 * seed, 30.0), (200.0, 10.0))),
                       (50, "after_reset", ((20.0, 40.0), (20.0, 60.0))),
                       (100, "final", ((300.0, 5.0), (310.0, 5.0)))]  # fmt: skip
        games = [(10, (1.0, 50.0)), (41, (3.0, 25.0)), (60, (5.0, 26.0 * seed)), (100, (7.0, 0.0))]  # at the limit is not above
        args = {"env_id": "SafetyHopperVelocity-v1", "exp_name": "rde_sac_safety", "cost_limit": 25.0}
        args |= {"num_agents": 2, "reset_interval": 5, "beta": 50.0}
        write_run(tmp_path, evaluations, games=games, extra="cost", seed=seed, **args)
    return tmp_path


def test_cost_by_hand(safety):
    games = read(safety)
    runs = plot.runs_of(games)
    assert runs.total_cost.tolist() == [101.0, 127.0] and runs.violations.tolist() == [2, 2] and runs.games.tolist() == [4, 4]
    names = ("SafetyHopperVelocity-v1", 1.0, "RDE+SAC-Lag")
    assert tables(games)["Cost"] == [(*names, 2, "25", "114 ± 18", "4.00 ± 0.00", "2.00 ± 0.00")]
    without_limit = games.assign(cost_limit=math.inf)
    assert tables(without_limit)["Cost"][0][4:6] == ("inf", "114 ± 18")


def test_cost_around_a_reset_by_hand(safety):
    games, names = read(safety), ("SafetyHopperVelocity-v1", 1.0, "RDE+SAC-Lag")
    expected = [(*names, "evaluations", 2, 20.0, 50.0), (*names, "training games", 2, 37.5, 19.5)]
    assert tables(games)["Cost around a reset"] == expected
    assert tables(games, reset_window=10)["Cost around a reset"][1][5:] == (25.0, 39.0)
    assert tables(games.assign(cost=math.nan))["Cost around a reset"] == []
    _, costs = pictures(games)["cost_evaluations_SafetyHopperVelocity-v1"].axes
    assert "cost of the evaluations" in costs.get_ylabel() and 50.0 in lines_of(costs)["RDE+SAC-Lag"][1]


def test_cost_beside_return_with_its_limit(safety, call):
    returns, costs = pictures(read(safety))["cost_curves_SafetyHopperVelocity-v1"].axes
    assert "return" in returns.get_ylabel() and "cost" in costs.get_ylabel()
    assert set(lines_of(returns)) == {"RDE+SAC-Lag"} and set(lines_of(costs)) == {"RDE+SAC-Lag", "limit 25"}
    assert lines_of(costs)["limit 25"][1].tolist() == [25.0, 25.0] and lines_of(costs)["RDE+SAC-Lag"][1, -1] == 0.0
    figure = pictures(read(safety).assign(cost_limit=math.inf))["cost_curves_SafetyHopperVelocity-v1"]
    assert set(lines_of(figure.axes[1])) == {"RDE+SAC-Lag"}
    call(safety, safety / "out", "--reset-window", "10")
    names = {file.name for file in (safety / "out").iterdir()}
    assert "cost_curves_SafetyHopperVelocity-v1.png" in names and not any("success" in name for name in names)
    assert "uccess |" not in (safety / "out" / "table.md").read_text()
    assert [row["cost"] for row in read_csv(safety / "out" / "training_games.csv")][:3] == ["50", "25", "26"]


def test_a_limit_may_be_infinite_or_absent(tmp_path):
    for seed, limit in ((1, {}), (2, {"cost_limit": None}), (3, {"cost_limit": math.inf})):
        write_run(tmp_path / str(seed), [(100, "final", ((1.0, 0.0), (2.0, 0.0)))], extra="cost", seed=seed, **limit)
        assert set(read(tmp_path / str(seed)).cost_limit) == {math.inf}


# ------------------------------------------------------------------------------------------------------------ references


@pytest.fixture
def published(tmp_path):
    """Published scores of two games, of one a single method's."""
    file = tmp_path / "published.csv"
    file.write_text(
        "# A comment.\ngame,method,score,source\nAlien,BBF,1173.2,somewhere\nAlien,DER,802.3,\nFreeway,BBF,25.5,\nPong,BBF,1,\n"
    )
    for env_id, score in ((ALIEN, 500.0), (FREEWAY, 10.0)):
        for seed in (1, 2):
            write_run(tmp_path / "runs", [FINAL], games=[(50, 1.0), (90, score * seed)], env_id=env_id, seed=seed)
    return file


def test_published_scores_stand_beside_training_games(published, tmp_path, call):
    call(tmp_path / "runs", tmp_path / "out", "--references", str(published))
    table = (tmp_path / "out" / "table.md").read_text()
    part = table[table.index("## Published scores, beside training games") :]
    assert "beside the TRAINING games" in part and "not beside its evaluations" in part
    own, bbf = [(750 - 227.8) / 6899.9, 15 / 29.6], [(1173.2 - 227.8) / 6899.9, 25.5 / 29.6]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")]
    over_games = "IQM, Atari, human-normalized score, replay ratio 1, games: 2"
    assert rows[1:] == [
        ["Alien", "DQN, replay ratio 1", "750", f"{own[0]:.3f}"],
        ["Alien", "BBF (published)", "1173", f"{bbf[0]:.3f}"],
        ["Alien", "DER (published)", "802", f"{(802.3 - 227.8) / 6899.9:.3f}"],
        ["Freeway", "DQN, replay ratio 1", "15.0", f"{own[1]:.3f}"],
        ["Freeway", "BBF (published)", "25.5", f"{bbf[1]:.3f}"],
        [over_games, "DQN", "-", f"{np.mean(own):.3f}"],
        [over_games, "BBF (published)", "-", f"{np.mean(bbf):.3f}"],  # DER is not known of Freeway
    ]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert "aggregate_training_games.png" in names


def test_published_scores_are_lines_in_the_picture_over_games(published, tmp_path):
    """Also of a published method of the same name."""
    scores = [
        (ALIEN, "DQN (published)", 600.0, 0.1),
        (FREEWAY, "DQN (published)", 9.0, 0.3),
        (ALIEN, "DER (published)", 8.0, 0.0),
    ]
    published = pd.DataFrame(scores, columns=["env_id", "method", "score", "normalized"])
    (axes,) = pictures(read(tmp_path / "runs"), published)["aggregate_training_games"].axes
    assert set(lines_of(axes)) == {"DQN", "DQN (published)"}
    np.testing.assert_allclose(lines_of(axes)["DQN (published)"], [[0, 0.1], [0.2, 0.2]])
    own, level = (next(line for line in axes.lines if line.get_label() == name) for name in ("DQN", "DQN (published)"))
    assert own.get_color() != level.get_color() and level.get_linestyle() == ":"


def test_the_published_scores_that_come_along(tmp_path, call):
    """Their means over the 26 games are those that the papers give: of three methods rliable's, of the fourth its own."""
    scores = pd.read_csv(ROOT / "results" / "atari100k_published.csv", comment="#")
    assert set(scores.game) == set(plot.RANDOM_AND_HUMAN_SCORES) and not scores.duplicated(["game", "method"]).any()
    low, high = np.array([plot.RANDOM_AND_HUMAN_SCORES[game] for game in scores.game]).T
    means = ((scores.score - low) / (high - low)).groupby(scores.method).agg(["mean", "size"])
    assert set(means["size"]) == {26}
    for method, mean in {"DER": 0.350, "DrQ(ε)": 0.465, "SPR": 0.616, "SPR with resets": 0.911}.items():
        assert means["mean"][method] == pytest.approx(mean, abs=0.0006)
    write_run(tmp_path / "runs", [FINAL], games=[(90, 500.0)], env_id=ALIEN)
    call(tmp_path / "runs", tmp_path / "out", "--references", str(ROOT / "results" / "atari100k_published.csv"))
    table = re.sub(" +", " ", (tmp_path / "out" / "table.md").read_text(encoding="utf-8"))
    assert f"| Alien | DrQ(ε) (published) | 865 | {(865.2 - 227.8) / 6899.9:.3f} |" in table


# -------------------------------------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """2 games x 3 methods x 2 replay ratios x 2 seeds, and an unfinished run; and what one call makes of it."""
    path = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)
    for env_id in (ALIEN, FREEWAY):
        for exp in (DQN, SR, RDE):
            for replay_ratio in (1.0, 4.0):
                for seed in (1, 2):
                    scores = random.uniform(10, 20, size=(6, 2)).round(2)
                    phases = [phase if exp is not DQN or "reset" not in phase else "scheduled" for _, phase, _ in RESET_CURVE]
                    steps = [step for step, _, _ in RESET_CURVE]
                    evaluations = [(s, p, e) for s, p, e in zip(steps, phases, scores, strict=True)]
                    if exp is DQN:
                        evaluations = [evaluations[0], evaluations[1], evaluations[3], evaluations[5]]
                    write_run(path / "runs", evaluations, **exp, env_id=env_id, replay_ratio=replay_ratio, seed=seed)
    (write_run(path / "runs", [(50, "scheduled", (1.0, 2.0))], name="stopped", seed=3) / "model.pt").unlink()
    options = ["--runs-dir", "runs", "--out-dir", "out", "--bootstrap-samples", "50"]
    result = subprocess.run(
        [sys.executable, str(ROOT / "plot_benchmark.py"), *options], cwd=path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return path, result


def test_training_games_by_hand(tmp_path, call, numbers_only):
    write_run(tmp_path / "runs", [FINAL], games=((10, 9.0), (80, 7.0), (81, 1.0), (100, 4.0)), seed=1)  # mean 2.5
    write_run(tmp_path / "runs", [FINAL], games=((30, 9.0), (99, 8.5)), seed=2)  # 8.5
    write_run(tmp_path / "runs", [FINAL], games=((80, 9.0),), seed=3)  # none in the last fifth
    write_run(tmp_path / "runs", [FINAL], seed=1, env_id=FREEWAY)  # none at all
    call(tmp_path / "runs", tmp_path / "out")
    rows = [row for row in read_csv(tmp_path / "out" / "results.csv") if row["phase"] == "training"]
    columns = ("env_id", "seed", "global_step", "episodes", "score")
    assert [[row[name] for name in columns] for row in rows] == [
        [ALIEN, "1", "100", "2", "2.5"], [ALIEN, "2", "100", "1", "8.5"],
    ]  # fmt: skip
    assert float(rows[0]["human_normalized_score"]) == pytest.approx((2.5 - 227.8) / (7127.7 - 227.8))
    table = table_of(tmp_path / "out")
    assert "| Alien | 1 | DQN | 3 | 1.50 ± 0.00 | 1.50 ± 0.00 | 5.50 ± 4.24 |" in table  # (2.5 + 8.5) / 2, 6 / sqrt 2
    assert "| Freeway | 1 | DQN | 1 | 1.50 | 1.50 | - |" in table


def test_results_csv(study):
    path, _ = study
    rows = read_csv(path / "out" / "results.csv")
    columns = "run env_id method replay_ratio seed global_step phase episodes score human_normalized_score"
    assert list(rows[0]) == columns.split() and len(rows) == 2 * 2 * 2 * (4 + 6 + 6)
    assert len({row["run"] for row in rows}) == 24 and sum(row["phase"] == "final" for row in rows) == 24
    for row in rows:
        scores = [float(e["episodic_return"]) for e in read_csv(path / "runs" / row["run"] / "evaluations.csv")
                  if (e["global_step"], e["phase"]) == (row["global_step"], row["phase"])]  # fmt: skip
        low, high = {ALIEN: (227.8, 7127.7), FREEWAY: (0.0, 29.6)}[row["env_id"]]
        assert float(row["score"]) == pytest.approx(sum(scores) / 2) and int(row["episodes"]) == 2 == len(scores)
        assert float(row["human_normalized_score"]) == pytest.approx((sum(scores) / 2 - low) / (high - low))
        assert f"__{row['seed']}__" in row["run"] and row["method"] in ("DQN", "SR+DQN", "RDE+DQN")
        assert row["replay_ratio"] in ("1", "4")


def test_table(study):
    path, result = study
    assert (path / "out" / "table.md").read_text() in result.stdout
    table = table_of(path / "out")
    rows = [row for row in read_csv(path / "out" / "results.csv")
            if (row["env_id"], row["method"], row["replay_ratio"]) == (FREEWAY, "RDE+DQN", "4")]  # fmt: skip
    final = [float(row["score"]) for row in rows if row["phase"] == "final"]
    best = [max(float(r["score"]) for r in rows if r["seed"] == seed and r["phase"] != "after_reset") for seed in "12"]
    before, after = (
        np.mean([float(r["score"]) for r in rows if r["phase"] == phase]) for phase in ("before_reset", "after_reset")
    )

    def both(values):
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"

    assert f"| Freeway | 4 | RDE+DQN | 2 | {both(final)} | {both(best)} | " in table
    collapse = f"{before:.1f} | {after:.1f} | {plot.number(after / before)} ± "
    assert f"| Freeway | 4 | RDE+DQN | evaluations | 4 | {collapse}" in table
    assert "24 runs, 1 folders left out.\n\n- stopped: not finished: there is no model.pt" in table
    assert result.stderr == "left out: stopped: not finished: there is no model.pt\n"

    lines = table.splitlines()
    methods = [line.split(" | ")[2] for line in lines if line.startswith("| Alien | 1 | ")]
    assert methods == ["DQN", "SR+DQN", "RDE+DQN", "SR+DQN", "RDE+DQN"]  # scores, then collapse
    scores = [float(row["human_normalized_score"]) for row in read_csv(path / "out" / "results.csv")
              if (row["method"], row["replay_ratio"], row["phase"]) == ("DQN", "1", "final")]  # fmt: skip
    iqm = sum(sorted(scores)[1:3]) / 2  # of 4 scores, the middle two
    assert any(line.startswith(f"| Atari, human-normalized score | 1 | DQN | 2 | 2 | {iqm:.3f} | ") for line in lines)
    assert sum(line.startswith(("| 1 | RDE+DQN | ", "| 4 | RDE+DQN | ")) for line in lines) == 4  # over DQN, SR+DQN
    assert not any(word in table for word in ("## Success", "## Cost", "Return and cost", "Published"))


def test_the_same_runs_give_the_same_files(study, tmp_path, call):
    path, _ = study
    np.random.seed(99)
    call(path / "runs", tmp_path / "out")
    pictures = ["aggregate_curves", "collapse", "learning_curves_Alien", "learning_curves_Freeway", "performance_profiles"]
    names = sorted([*(f"{name}.png" for name in pictures), "results.csv", "table.md", "training_games.csv"])
    for folder in (path / "out", tmp_path / "out"):
        assert sorted(file.name for file in folder.iterdir()) == names
    for name in names:
        assert (path / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.fixture(scope="module")
def figures(study):
    games = plot.read_games(str(study[0] / "runs"))[0]
    training = [run[plot.RUN + ["total_timesteps", "cost_limit"]].to_dict()
                | {"phase": "training", "evaluation": -1, "step": step, "score": float(step * len(run.method) + run.seed)}
                for _, run in games.drop_duplicates("run").iterrows() for step in range(10, 101, 10)]  # fmt: skip
    return pictures(pd.concat([games, pd.DataFrame(training).assign(normalized=1.0)], ignore_index=True), window=10)


NAMES = ["learning_curves_Alien", "training_games_Alien", "aggregate_curves", "performance_profiles", "aggregate_training_games",
         "collapse", "collapse_training_games"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_names_its_methods_and_axes_and_nothing_covers_another(figures, name):
    figure = figures[name]
    (legend,) = figure.legends
    methods = ["DQN", "SR+DQN", "RDE+DQN"][name.startswith("collapse") :]
    assert [text.get_text() for text in legend.get_texts()] == methods and len(figure.axes) == 2
    for axes, replay_ratio in zip(figure.axes, (1, 4)):
        assert f"replay ratio {replay_ratio}" in axes.get_title(loc="left") and axes.get_ylabel()
        assert axes.get_xlabel() or name.startswith("collapse")
        lines = [line for line in axes.lines if line.get_label() in methods]
        assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == len(methods)
    nothing_covers_another(figure)


def test_a_method_looks_alike_in_all_pictures(tmp_path):
    """Also where another method is missing, as DQN's variant is in the picture of the collapse."""
    for exp in (dict(exp_name="dqn_tau_0.1"), SR | dict(exp_name="sr_dqn_tau_0.1"), RDE | dict(exp_name="rde_dqn_tau_0.1")):
        write_run(tmp_path, RESET_CURVE if "reset_interval" in exp else [FINAL], **exp, tau=0.1)
    looks = {name: {line.get_label(): (line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines
                    if line.get_label()[0] != "_"} for name, figure in pictures(read(tmp_path)).items()}  # fmt: skip
    variants = {"SR+DQN tau 0.1", "RDE+DQN tau 0.1"}
    assert set(looks["collapse"]) == variants and set(looks["learning_curves_Alien"]) == variants | {"DQN tau 0.1"}
    for name, look in looks.items():
        assert look.items() <= looks["learning_curves_Alien"].items(), name
    assert len(set(looks["learning_curves_Alien"].values())) == 3


def nothing_covers_another(figure) -> None:
    """Panels with their names, the legend, and the explanation below."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [text.get_window_extent(renderer) for text in (*figure.legends, *figure.texts)]
    whole = figure.get_tightbbox(renderer)  # in inches; all of it is saved
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert whole.x0 <= box.x0 / figure.dpi + 0.01 and box.x1 / figure.dpi <= whole.x1 + 0.01


def test_collapse_of_many_games(tmp_path):
    for game in ("ChopperCommand", "KungFuMaster", "PrivateEye", "Qbert", "Seaquest"):
        write_run(tmp_path, RESET_CURVE, **SR, env_id=f"{game}NoFrameskip-v4")
    nothing_covers_another(pictures(read(tmp_path))["collapse"])


def test_resets_are_marked(figures):
    """A triangle at the mean over seeds of the score right after each reset, none for DQN."""
    triangles = [line for line in figures["learning_curves_Alien"].axes[0].lines
                 if line.get_marker() == "v" and len(line.get_xdata())]  # fmt: skip
    assert [list(line.get_xdata()) for line in triangles] == [[0.06, 0.08], [0.06, 0.08]]


def test_training_curve_by_hand(tmp_path):
    """Of 100 steps: points at 5, 10, ..., each the mean of the games that ended in the 10 steps up to there."""
    write_run(tmp_path, [FINAL], seed=1, games=[(4, 1.0), (5, 3.0), (6, 10.0), (15, 6.0), (100, 7.0)])
    write_run(tmp_path, [FINAL], seed=2, games=[(1, 5.0), (12, 20.0), (96, 1.0)])
    write_run(tmp_path, [FINAL], seed=3)
    games = read(tmp_path)
    points = plot.points_of(games, plot.TRAINING)
    assert len(points) == 60 and sorted(points.step.unique()) == list(range(5, 101, 5))
    known = {(row.seed, int(row.step)): row.score for row in points.dropna(subset="score").itertuples()}
    assert known == {
        (1, 5): 2.0, (1, 10): 14 / 3, (1, 15): 8.0, (1, 20): 6.0, (1, 100): 7.0,
        (2, 5): 5.0, (2, 10): 5.0, (2, 15): 20.0, (2, 20): 20.0, (2, 100): 1.0,
    }  # fmt: skip
    (axes,) = pictures(games[games.seed < 3])["training_games_Alien"].axes
    steps = [0.005, 0.01, 0.015, 0.02, 0.1]  # only where both seeds have games
    np.testing.assert_allclose(lines_of(axes)["DQN"], [steps, [3.5, (14 / 3 + 5) / 2, 14.0, 13.0, 4.0]])


def test_learning_curve_is_the_mean_over_seeds(study, figures):
    games = plot.read_games(str(study[0] / "runs"))[0]
    rows = plot.evaluations_of(games[(games.env_id == ALIEN) & (games.replay_ratio == 1) & (games.method == "RDE+DQN")])
    mean = np.mean([of_run.score.to_numpy() for _, of_run in rows.groupby("run")], axis=0)
    axes = figures["learning_curves_Alien"].axes[0]
    np.testing.assert_allclose(lines_of(axes)["RDE+DQN"], [[0.05, 0.06, 0.06, 0.08, 0.08, 0.1], mean])
    curves = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 6]
    assert all(any(np.allclose(curve, of_run.score) for curve in curves) for _, of_run in rows.groupby("run"))  # thin ones


def test_files_go_to_the_study_by_default(tmp_path, monkeypatch):
    write_run(tmp_path, [FINAL], games=[(50, 1.0)])
    monkeypatch.setattr(sys, "argv", ["plot_benchmark.py", "--runs-dir", str(tmp_path), "--bootstrap-samples", "20"])
    plot.main()
    assert {"results.csv", "training_games_Alien.png"} <= {file.name for file in (tmp_path / "results").iterdir()}
    assert (tmp_path / "results" / "training_games.csv").read_text() == (
        "env_id,method,replay_ratio,seed,global_step,episodic_return\nAlienNoFrameskip-v4,DQN,1,1,50,1\n"
    )


def test_one_run_is_enough(tmp_path, call):
    """One seed of one game of an unknown scale, with a name that is no file name."""
    write_run(tmp_path / "runs", [FINAL], env_id="my/odd game-v0", name="one")
    call(tmp_path / "runs", tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["learning_curves_my%2Fodd%20game-v0.png", "results.csv", "table.md", "training_games.csv"]
