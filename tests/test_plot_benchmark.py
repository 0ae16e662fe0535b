"""plot_benchmark.py on run folders made here: its numbers against ones worked out by hand, and against rliable's."""

import ast
import csv
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from rliable import library, metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot_benchmark as plot  # noqa: E402

ALIEN, PONG, FREEWAY = "AlienNoFrameskip-v4", "PongNoFrameskip-v4", "FreewayNoFrameskip-v4"
DQN = {"exp_name": "dqn_atari"}
SR = {"exp_name": "sr_dqn_atari", "reset_interval": 80, "reset_depth": "last1"}
RDE = SR | {"exp_name": "rde_dqn_atari", "num_agents": 2, "beta": 50.0}


def write_run(parent: pathlib.Path, evaluations: list[tuple], name: str = "", games: tuple = (), **args) -> pathlib.Path:
    """A finished run. `evaluations`: (step, phase, scores of the games); `games` of training: (step, score)."""
    args = {"env_id": ALIEN, "seed": 1, "replay_ratio": 1.0, "total_timesteps": 100, "eval_episodes": 2, **DQN} | args
    start_time = f"20260101-{args['replay_ratio'] * 100:06.0f}"
    folder = parent / (name or f"{args['env_id']}__{args['exp_name']}__{args['seed']}__{start_time}")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"args": args, "versions": {}, "device": "cpu"}))
    with open(folder / "evaluations.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["global_step", "phase", "episode", "episodic_return"])
        rows.writerows((step, phase, i, score) for step, phase, scores in evaluations for i, score in enumerate(scores))
    with open(folder / "episodes.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["global_step", "episodic_return", "episodic_length", "wall_seconds"])
        rows.writerows((step, score, 400, f"{step}.25") for step, score in games)
    (folder / "model.pt").write_bytes(b"weights")
    return folder


@pytest.fixture
def call(monkeypatch):
    """The program, called in this process: importing its packages takes longer than its work."""

    def call(runs_dir: pathlib.Path, out_dir: pathlib.Path, *options: str) -> None:
        folders = ["--runs-dir", str(runs_dir), "--out-dir", str(out_dir)]
        monkeypatch.setattr(sys, "argv", ["plot_benchmark.py", *folders, *options])
        plot.main()

    return call


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
    write_run(tmp_path, RESET_CURVE, **SR)
    (run,), left_out = plot.read_runs(str(tmp_path))
    assert left_out == [] and run.key == (ALIEN, 1.0, "SR+DQN")
    assert run.final == 305.0 and run.best == 500.0  # not the 1,000 right after a reset
    assert [(e.global_step, e.phase, e.mean) for e in run.curve] == [
        (50, "scheduled", 200.0), (60, "before_reset", 500.0), (80, "before_reset", 200.0), (100, "final", 305.0),
    ]  # fmt: skip
    assert [(before.mean, after.mean) for before, after in run.resets] == [(500.0, 1000.0), (200.0, 50.0)]


@pytest.mark.parametrize(
    "args, label",
    [
        (DQN, "DQN"), (SR, "SR+DQN"), (RDE, "RDE+DQN"), (SR | {"reset_interval": 0}, "DQN"),
        (RDE | {"num_agents": 1}, "SR+DQN"), (RDE | {"reset_interval": 0}, "Ensemble+DQN"),
        ({"exp_name": "rde_sac_dmc", "num_agents": 2, "reset_interval": 400_000}, "RDE+SAC"),
        ({"exp_name": "rde_sac_dmc", "num_agents": 1, "reset_interval": 400_000}, "SR+SAC"),
        ({"exp_name": "rde_sac_dmc", "num_agents": 1, "reset_interval": 0}, "SAC"),
        ({"exp_name": "rde_dqn_minigrid", "num_agents": 3, "reset_interval": 5}, "RDE+DQN"),
        ({"exp_name": "my idea", "num_agents": 3, "reset_interval": 5}, "my idea"),
    ],
)  # fmt: skip
def test_method_labels(args, label):
    assert plot.method_label(args) == label


def test_scores_are_those_of_the_scripts():
    def definitions(name: str) -> list[str]:
        names = ("RANDOM_AND_HUMAN_SCORES", "human_normalized_score")
        nodes = ast.parse((ROOT / name).read_text()).body
        return [ast.dump(node) for node in nodes if getattr(node, "name", "") in names
                or isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names]  # fmt: skip

    assert len(definitions("plot_benchmark.py")) == 2 and definitions("plot_benchmark.py") == definitions("rde_dqn_atari.py")


def test_scales():
    assert plot.normalized_score(ALIEN, 227.8 + 0.25 * (7127.7 - 227.8)) == pytest.approx(0.25)
    assert plot.normalized_score("hopper-hop", 250.0) == 0.25
    env_ids = (ALIEN, "finger-turn_hard", "LunarLander-v3", "MiniGrid-LavaGapS7-v0", "TennisNoFrameskip-v4")
    assert [plot.suite_of(env_id) for env_id in env_ids] == ["Atari", "DeepMind Control", None, None, None]


# ------------------------------------------------------------------------------------------------------ what is left out

FINAL = (100, "final", (1.0, 2.0))


def broken(tmp_path, change) -> list[str]:
    """The lines for a folder with a good run and one that `change` spoiled."""
    write_run(tmp_path, [FINAL], seed=1)
    change(write_run(tmp_path, [(50, "scheduled", (1.0, 2.0)), FINAL], name="spoiled", seed=2))
    runs, left_out = plot.read_runs(str(tmp_path))
    assert [run.args["seed"] for run in runs] == [1]
    return left_out


def rewrite(name: str, change):
    def apply(folder: pathlib.Path) -> None:
        (folder / name).write_text(change((folder / name).read_text()))

    return apply


def rewrite_args(**changes):
    def change(text: str) -> str:
        args = json.loads(text)["args"] | changes
        return json.dumps({"args": {name: value for name, value in args.items() if value is not None}})

    return rewrite("args.json", change)


SPOILED = {
    "no args": (lambda f: (f / "args.json").unlink(), "args.json is missing"),
    "cut args": (rewrite("args.json", lambda text: text[:20]), "args.json is not readable"),
    "args without args": (rewrite("args.json", lambda text: "[]"), "args.json is not readable"),
    "args that are none": (rewrite("args.json", lambda text: '{"args": 3}'), "args.json has no env_id"),
    "no seed": (rewrite_args(seed=None), "args.json has no seed"),
    "seed as text": (rewrite_args(seed="2"), "args.json has no seed, or one of a wrong kind"),
    "agents as text": (rewrite_args(num_agents="2"), "args.json has no num_agents, or one of a wrong kind"),
    "interval as list": (rewrite_args(reset_interval=[1]), "args.json has no reset_interval, or one of a wrong kind"),
    "replay ratio nan": (rewrite_args(replay_ratio=math.nan), "args.json has no replay_ratio, or one of a wrong kind"),
    "steps as bool": (rewrite_args(total_timesteps=True), "args.json has no total_timesteps, or one of a wrong kind"),
    "no evaluations": (lambda f: (f / "evaluations.csv").unlink(), "evaluations.csv is missing"),
    "empty evaluations": (rewrite("evaluations.csv", lambda text: ""), "does not begin with global_step,phase"),
    "other columns": (rewrite("evaluations.csv", lambda text: text.replace("phase", "stage")), "does not begin with"),
    "binary": (lambda f: (f / "evaluations.csv").write_bytes(b"\xff\xfe\x00"), "not a readable text"),
    "cut row": (rewrite("evaluations.csv", lambda text: text[:-3]), 'line 5: "100,final,1,2" is not a row, or is cut off'),
    "short row": (rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,0,1.0", "50,scheduled")), "line 2"),
    "text score": (rewrite("evaluations.csv", lambda text: text.replace("0,1.0", "0,many")), "line 2"),
    "nan score": (rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,0,1.0", "50,scheduled,0,nan")), "line 2"),
    "other phase": (rewrite("evaluations.csv", lambda text: text.replace("scheduled", "midnight")), "line 2"),
    "episode lost": (rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,1,2.0\n", "")), "has 1 of 2 episodes"),
    "episode doubled": (
        rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,1,2.0\n", "50,scheduled,1,2.0\n" * 2)),
        "line 4",
    ),
    "evaluation doubled": (
        rewrite(
            "evaluations.csv",
            lambda text: text.replace("50,scheduled,0,1.0\n", "50,scheduled,0,1.0\n50,scheduled,1,2.0\n50,scheduled,0,1.0\n"),
        ),
        "is there twice",
    ),
    "steps go back": (rewrite("evaluations.csv", lambda text: text.replace("50,", "500,")), "step 100 comes after step 500"),
    "after without before": (
        rewrite("evaluations.csv", lambda text: text.replace("scheduled", "after_reset")),
        "no evaluation before it",
    ),
    "no final": (
        rewrite("evaluations.csv", lambda text: text.replace("final", "scheduled")),
        "not finished: the last evaluation is of step 100 of 100",
    ),
    "no games": (lambda f: (f / "episodes.csv").unlink(), "episodes.csv is missing"),
    "empty games": (rewrite("episodes.csv", lambda text: ""), "episodes.csv does not begin with global_step,episodic_return"),
    "cut game": (rewrite("episodes.csv", lambda text: text + "90,1.0"), 'episodes.csv, line 2: "90,1.0" is not a row'),
    "cut in its time": (rewrite("episodes.csv", lambda text: text + "90,1.0,4,3"), "episodes.csv, line 2"),
    "nan game": (rewrite("episodes.csv", lambda text: text + "90,nan,4,3.5\n"), "episodes.csv, line 2"),
    "no model": (lambda f: (f / "model.pt").unlink(), "not finished: the last evaluation is of step 100 of 100"),
    "final cut off": (rewrite("evaluations.csv", lambda text: text.split("100,final,1")[0]), "final, has 1 of 2 episodes"),
    "final too early": (rewrite_args(total_timesteps=200), "the final evaluation is not the one of the last step"),
    "other arguments": (
        rewrite_args(tau=0.5),
        "other arguments than most runs of DQN on Alien, replay ratio 1: tau 0.5 instead of None",
    ),
    "same seed": (rewrite_args(seed=1), "the same as AlienNoFrameskip-v4__dqn_atari__1__20260101-000100, which counts"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_has_a_named_line(tmp_path, case):
    change, message = SPOILED[case]
    left_out = broken(tmp_path, change)
    assert len(left_out) == 1 and left_out[0].startswith("spoiled: ") and message in left_out[0], left_out


def test_an_empty_run_folder_is_named_and_other_folders_are_not(tmp_path):
    write_run(tmp_path, [FINAL])
    (tmp_path / "AlienNoFrameskip-v4__dqn_atari__2__20260101-120000").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    write_run(tmp_path / "deeper" / "still", [FINAL], seed=3)
    runs, left_out = plot.read_runs(str(tmp_path))
    assert [run.args["seed"] for run in runs] == [1, 3]
    assert left_out == ["AlienNoFrameskip-v4__dqn_atari__2__20260101-120000: args.json is missing"]


def test_seeds_may_differ_in_what_does_not_matter(tmp_path):
    write_run(tmp_path, [FINAL], **SR, seed=1, cuda=True, runs_dir="a")
    write_run(tmp_path, [FINAL], **RDE | {"num_agents": 1}, seed=2, cuda=False, runs_dir="b")  # the same method
    runs, left_out = plot.read_runs(str(tmp_path))
    assert len(runs) == 2 and left_out == []


def test_most_runs_decide_which_arguments_count(tmp_path):
    for seed, tau in ((1, 0.1), (2, 0.2), (3, 0.2)):
        write_run(tmp_path, [FINAL], seed=seed, tau=tau)
    runs, left_out = plot.read_runs(str(tmp_path))
    assert [run.args["seed"] for run in runs] == [2, 3] and len(left_out) == 1 and "tau 0.1 instead of 0.2" in left_out[0]


# ------------------------------------------------------------------------------------------------------------ statistics


def test_interquartile_mean_by_hand_and_by_rliable():
    scores = np.array([[1.0, 100.0], [3.0, 4.0], [5.0, 6.0], [-50.0, 8.0]])  # sorted: -50 1 | 3 4 5 6 | 8 100
    assert plot.interquartile_means(scores[..., np.newaxis]).tolist() == [4.5]
    random = np.random.default_rng(0)
    for shape in ((2, 1, 3), (3, 2, 5), (5, 26, 4), (1, 1, 1), (7, 3, 2)):
        scores = random.normal(size=shape)
        expected = [metrics.aggregate_iqm(scores[..., i]) for i in range(shape[-1])]
        np.testing.assert_allclose(plot.interquartile_means(scores), expected, rtol=1e-12)


def test_profile_by_hand_and_by_rliable():
    scores = np.array([[0.1, 0.3], [0.3, 0.5]])
    assert plot.fractions_above(scores, np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])).tolist() == [1, 0.75, 0.75, 0.25, 0.25, 0]
    scores, thresholds = np.random.default_rng(1).normal(size=(5, 4)), np.linspace(-3, 3, 50)
    np.testing.assert_allclose(
        plot.fractions_above(scores, thresholds), library.score_distributions(scores, thresholds), atol=1e-15
    )


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
    assert plot.bootstrap(plot.interquartile_means, scores[:1, :, np.newaxis], args)[1] is None


def test_the_interval_covers_the_truth():
    """Of 95 % intervals, about 95 % hold the true value (fewer with few seeds): not 50 %, not 100 %."""
    random, args = np.random.default_rng(3), plot.Args(bootstrap_samples=200)
    hits = 0
    for i in range(100):
        args.seed = i
        _, (low, high) = plot.bootstrap(plot.interquartile_means, random.normal(size=(10, 4, 1)), args)
        hits += low[0] <= 0 <= high[0]
    assert 85 <= hits <= 99


def test_aggregate_uses_what_every_method_has(tmp_path):
    for exp in (DQN, SR):
        for env_id, seeds in (
            (ALIEN, (1, 2, 3)),
            (PONG, (1, 2) if exp is DQN else (2, 3)),
            (FREEWAY, (1,) if exp is DQN else ()),
        ):
            for seed in seeds:
                write_run(tmp_path, [(100, "final", (seed, seed))], **exp, env_id=env_id, seed=seed)
    (aggregate,) = plot.aggregate_over_games(plot.read_runs(str(tmp_path))[0])
    assert aggregate.env_ids == [ALIEN, PONG]
    assert [[run.args["seed"] for run in row] for row in aggregate.runs["DQN"]] == [[1, 1], [2, 2]]
    assert [[run.args["seed"] for run in row] for row in aggregate.runs["SR+DQN"]] == [[2, 2], [3, 3]]
    expected = [[(seed - 227.8) / (7127.7 - 227.8), (seed + 20.7) / 35.3] for seed in (2, 3)]
    np.testing.assert_allclose(aggregate.final_scores("SR+DQN"), expected)
    assert aggregate.notes == [
        "Atari, replay ratio 1: without Freeway, which not every method has finished",
        "Atari, replay ratio 1: DQN without the seeds 3, which not every game has finished",
        "Atari, replay ratio 1: SR+DQN without the seeds 1, which not every game has finished",
    ]


def test_suites_and_replay_ratios_are_not_mixed(tmp_path):
    sac = {"exp_name": "rde_sac_dmc", "num_agents": 1, "reset_interval": 0}
    write_run(tmp_path, [(100, "final", (500.0, 500.0))], **sac, env_id="hopper-hop")
    write_run(tmp_path, [FINAL], env_id=ALIEN)
    write_run(tmp_path, [FINAL], env_id=ALIEN, replay_ratio=4)
    write_run(tmp_path, [FINAL], env_id="TennisNoFrameskip-v4")
    runs = plot.read_runs(str(tmp_path))[0]
    aggregates = plot.aggregate_over_games(runs)
    assert [(a.suite, a.replay_ratio, a.env_ids) for a in aggregates] == [
        ("Atari", 1.0, [ALIEN]), ("Atari", 4.0, [ALIEN]), ("DeepMind Control", 1.0, ["hopper-hop"])]  # fmt: skip
    assert aggregates[2].final_scores("SAC").tolist() == [[0.5]]
    assert "- Tennis: no scale in common with other games" in plot.table_text(runs, aggregates, [], plot.Args())


def test_aggregate_curve_is_without_the_dips_and_at_shared_steps(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    write_run(
        tmp_path,
        [(50, "scheduled", (0.0, 0.0)), (70, "scheduled", (0.0, 0.0)), (100, "final", (1.0, 1.0))],
        **SR,
        env_id=FREEWAY,
    )
    (aggregate,) = plot.aggregate_over_games(plot.read_runs(str(tmp_path))[0])
    steps, scores = aggregate.curves("SR+DQN")
    assert steps.tolist() == [50, 100] and scores.shape == (1, 2, 2)
    np.testing.assert_allclose(scores[0], [[(200 - 227.8) / 6899.9, (305 - 227.8) / 6899.9], [0, 1 / 29.6]])


def test_collapse_by_hand(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    write_run(tmp_path, [(60, "before_reset", (0.0, 0.0)), (60, "after_reset", (10.0, 10.0)), FINAL], **SR, seed=2)
    runs = plot.read_runs(str(tmp_path))[0]
    assert (
        plot.collapse_of(runs[:1]) == plot.Collapse(before=350.0, after=525.0, num_resets=2)
        and plot.collapse_of(runs[:1]).ratio == 1.5
    )
    assert plot.collapse_of(runs[1:]).ratio is None  # 10 over 0
    pooled = plot.collapse_of(runs)
    assert pooled.num_resets == 3 and pooled.ratio == pytest.approx((1000 + 50 + 10) / (500 + 200 + 0))
    assert "| 3 | 233 | 353 | 1.51, not defined for 1 of 2 seeds |" in plot.table_text(runs, [], [], plot.Args())
    assert "| 1 | 0.00 | 10.0 | not defined |" in plot.table_text(runs[1:], [], [], plot.Args())
    write_run(
        tmp_path / "pong", [(60, "before_reset", (-21.0, -19.0)), (60, "after_reset", (-21.0, -21.0)), FINAL], **SR, env_id=PONG
    )
    assert plot.collapse_of(plot.read_runs(str(tmp_path / "pong"))[0]).ratio is None
    assert plot.collapse_of(plot.read_runs(str(tmp_path / "pong"))[0][:0]) is None


@pytest.mark.parametrize(
    "value, text",
    [
        (1234.5, "1234"),
        (123.4, "123"),
        (12.34, "12.3"),
        (1.234, "1.23"),
        (0.1234, "0.123"),
        (0.01234, "0.012"),
        (0.0, "0.00"),
        (-20.66, "-20.7"),
    ],
)
def test_numbers(value, text):
    assert plot.number(value) == text


def test_mean_and_std_by_hand():
    assert plot.mean_and_std([100.0, 200.0, 300.0]) == "200 ± 100" and plot.mean_and_std([2.0]) == "2.00"
    assert plot.mean_and_std([1.0, 2.0]) == f"1.50 ± {math.sqrt(0.5):.2f}"


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


def test_training_games_by_hand(tmp_path, call):
    write_run(tmp_path / "runs", [FINAL], games=((10, 9.0), (80, 7.0), (81, 1.0), (100, 4.0)), seed=1)  # mean 2.5
    write_run(tmp_path / "runs", [FINAL], games=((30, 9.0), (99, 8.5)), seed=2)  # 8.5
    write_run(tmp_path / "runs", [FINAL], games=((80, 9.0),), seed=3)  # none in the last fifth
    write_run(tmp_path / "runs", [FINAL], seed=1, env_id=FREEWAY)  # none at all
    call(tmp_path / "runs", tmp_path / "out")
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "training"]
    columns = ("env_id", "seed", "global_step", "episodes", "score")
    assert [[row[name] for name in columns] for row in rows] == [
        [ALIEN, "1", "100", "2", "2.5"], [ALIEN, "2", "100", "1", "8.5"],
    ]  # fmt: skip
    assert float(rows[0]["human_normalized_score"]) == pytest.approx((2.5 - 227.8) / (7127.7 - 227.8))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| Alien | 1 | DQN | 3 | 1.50 ± 0.00 | 1.50 ± 0.00 | 5.50 ± 4.24 |" in table  # (2.5 + 8.5) / 2, 6 / sqrt 2
    assert "| Freeway | 1 | DQN | 1 | 1.50 | 1.50 | - |" in table


def test_the_seeds_of_a_collapse_lie_on_the_line_of_their_mean_and_none_is_cut_off(tmp_path):
    for seed, after in ((1, 0.0), (2, 100.0)):  # ratios 0 and 1, together 0.5
        resets = [(60, "before_reset", (100.0, 100.0)), (60, "after_reset", (after, after)), FINAL]
        write_run(tmp_path, resets, **SR, seed=seed)
    runs, _ = plot.read_runs(str(tmp_path))
    (axes,) = plot.plot_collapse(runs, plot.Args()).axes
    mean, seeds = (
        next(line for line in axes.lines if line.get_marker() == marker) for marker in "so"
    )  # the label's comes last
    assert list(mean.get_xdata()) == [0.5] and sorted(seeds.get_xdata()) == [0.0, 1.0]
    assert set(seeds.get_ydata()) == set(mean.get_ydata())
    spine = axes.spines["left"].get_zorder()
    assert all(not line.get_clip_on() and line.get_zorder() > spine for line in (mean, seeds))


def test_results_csv(study):
    path, _ = study
    with open(path / "out" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 2 * (4 + 6 + 6)
    assert len({row["run"] for row in rows}) == 24 and sum(row["phase"] == "final" for row in rows) == 24
    for row in rows:
        with open(path / "runs" / row["run"] / "evaluations.csv", newline="") as file:
            scores = [float(e["episodic_return"]) for e in csv.DictReader(file)
                      if (e["global_step"], e["phase"]) == (row["global_step"], row["phase"])]  # fmt: skip
        low, high = {ALIEN: (227.8, 7127.7), FREEWAY: (0.0, 29.6)}[row["env_id"]]
        assert float(row["score"]) == pytest.approx(sum(scores) / 2) and int(row["episodes"]) == 2 == len(scores)
        assert float(row["human_normalized_score"]) == pytest.approx((sum(scores) / 2 - low) / (high - low))
        assert f"__{row['seed']}__" in row["run"] and row["method"] in ("DQN", "SR+DQN", "RDE+DQN")
        assert row["replay_ratio"] in ("1", "4")


def test_table(study):
    path, result = study
    table = (path / "out" / "table.md").read_text()
    assert table in result.stdout
    with open(path / "out" / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file)
                if (row["env_id"], row["method"], row["replay_ratio"]) == (FREEWAY, "RDE+DQN", "4")]  # fmt: skip
    final = [float(row["score"]) for row in rows if row["phase"] == "final"]
    best = [max(float(r["score"]) for r in rows if r["seed"] == seed and r["phase"] != "after_reset") for seed in "12"]
    before, after = (
        np.mean([float(r["score"]) for r in rows if r["phase"] == phase]) for phase in ("before_reset", "after_reset")
    )

    def both(values):
        return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"

    assert f"| Freeway | 4 | RDE+DQN | 2 | {both(final)} | {both(best)} | " in table
    assert f"| Freeway | 4 | RDE+DQN | 4 | {before:.1f} | {after:.1f} | {plot.number(after / before)} ± " in table
    assert "24 runs, 1 folders left out.\n\n- stopped: not finished: the last evaluation is of step 50 of 100\n" in table
    assert result.stderr == "left out: stopped: not finished: the last evaluation is of step 50 of 100\n"

    lines = table.splitlines()
    methods = [line.split(" | ")[2] for line in lines if line.startswith("| Alien | 1 | ")]
    assert methods == ["DQN", "SR+DQN", "RDE+DQN", "SR+DQN", "RDE+DQN"]  # scores, then collapse
    with open(path / "out" / "results.csv", newline="") as file:
        scores = [float(row["human_normalized_score"]) for row in csv.DictReader(file)
                  if (row["method"], row["replay_ratio"], row["phase"]) == ("DQN", "1", "final")]  # fmt: skip
    iqm = sum(sorted(scores)[1:3]) / 2  # of 4 scores, the middle two
    assert any(line.startswith(f"| Atari, human-normalized score | 1 | DQN | 2 | 2 | {iqm:.3f} | ") for line in lines)


def test_the_same_runs_give_the_same_files(study, tmp_path, call):
    path, _ = study
    np.random.seed(99)
    call(path / "runs", tmp_path / "out", "--bootstrap-samples", "50")
    pictures = ["aggregate_curves", "collapse", "learning_curves_Alien", "learning_curves_Freeway", "performance_profiles"]
    names = sorted([*(f"{name}.png" for name in pictures), "results.csv", "table.md", "training_games.csv"])
    for folder in (path / "out", tmp_path / "out"):
        assert sorted(file.name for file in folder.iterdir()) == names
    for name in names:
        assert (path / "out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("picture_format", ["png", "pdf", "svg"])
def test_no_file_holds_a_date_or_a_random_name(study, tmp_path, picture_format):
    args, files = plot.Args(picture_format=picture_format), []
    plot.set_style(args)
    runs = plot.read_runs(str(study[0] / "runs"))[0]
    for name in ("first", "second"):
        files.append(pathlib.Path(plot.save(plot.plot_collapse(runs, args), str(tmp_path), name, args)).read_bytes())
    assert files[0] == files[1] and files[0].startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[picture_format])
    assert b"Date" not in files[0] and b"dc:date" not in files[0] and b"matplotlib.org" not in files[0]


@pytest.fixture
def figures(study):
    args = plot.Args(bootstrap_samples=20)
    plot.set_style(args)
    runs = plot.read_runs(str(study[0] / "runs"))[0]
    for run in runs:
        run.training_games = [(step, float(step * len(run.key[2]) + run.args["seed"])) for step in range(10, 101, 10)]
    aggregates = plot.aggregate_over_games(runs)
    figures = {
        "learning": plot.plot_learning_curves(ALIEN, runs, args), "training": plot.plot_training_games(ALIEN, runs, args),
        "aggregate": plot.plot_aggregate_curves(aggregates, args),
        "profiles": plot.plot_performance_profiles(aggregates, args), "collapse": plot.plot_collapse(runs, args),
    }  # fmt: skip
    yield figures
    for figure in figures.values():
        plot.plt.close(figure)


@pytest.mark.parametrize("name", ["learning", "training", "aggregate", "profiles", "collapse"])
def test_names_stand_in_the_picture_and_apart(figures, name):
    """Every panel names its methods, inside the picture and without covering one another."""
    figure = figures[name]
    figure.canvas.draw()
    whole = figure.get_window_extent()
    for axes in figure.axes:
        names = {text.get_text(): text for text in axes.texts}
        assert set(names) == {"SR+DQN", "RDE+DQN"} | ({"DQN"} if name != "collapse" else set())
        boxes = [text.get_window_extent() for text in names.values()]
        for i, box in enumerate(boxes):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
            assert not any(box.overlaps(other) for other in boxes[:i])
        assert len({text.get_color() for text in names.values()}) == len(names)


def test_the_notes_below_fit_into_one_panel(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR)
    runs, args = plot.read_runs(str(tmp_path))[0], plot.Args(bootstrap_samples=20)
    plot.set_style(args)
    aggregates = plot.aggregate_over_games(runs)
    for figure in (
        plot.plot_learning_curves(ALIEN, runs, args),
        plot.plot_aggregate_curves(aggregates, args),
        plot.plot_collapse(runs, args),
    ):
        figure.canvas.draw()
        note = figure._supxlabel.get_window_extent()
        assert note.x0 >= 0 and note.x1 <= figure.get_window_extent().x1
        plot.plt.close(figure)


def test_resets_are_marked(figures):
    """A triangle at the mean over seeds of the score right after each reset, none for DQN."""
    runs = figures["learning"].axes[0]
    triangles = [line for line in runs.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in triangles] == [[60, 80], [60, 80]]


def test_training_curve_by_hand(tmp_path):
    """Of 100 steps: points at 5, 10, ..., each the mean of the games that ended in the 10 steps up to there."""
    write_run(tmp_path, [FINAL], seed=1, games=[(4, 1.0), (5, 3.0), (6, 10.0), (15, 6.0), (100, 7.0)])
    write_run(tmp_path, [FINAL], seed=2, games=[(1, 5.0), (12, 20.0), (96, 1.0)])
    write_run(tmp_path, [FINAL], seed=3)
    runs = plot.read_runs(str(tmp_path))[0]
    steps, means = plot.training_curve(runs)
    assert list(steps) == list(range(5, 101, 5)) and means.shape == (3, 20)
    known = {(row, int(steps[i])): means[row, i] for row, i in np.argwhere(np.isfinite(means))}
    assert known == {
        (0, 5): 2.0, (0, 10): 14 / 3, (0, 15): 8.0, (0, 20): 6.0, (0, 100): 7.0,
        (1, 5): 5.0, (1, 10): 5.0, (1, 15): 20.0, (1, 20): 20.0, (1, 100): 1.0,
    }  # fmt: skip

    figure = plot.plot_training_games(ALIEN, runs[:2], plot.Args())
    *_, mean = (line for line in figure.axes[0].lines if line.get_linewidth() > 1.5)
    both = [3.5, (14 / 3 + 5) / 2, 14.0, 13.0] + 15 * [np.nan] + [4.0]  # only where both seeds have games
    np.testing.assert_allclose(mean.get_ydata(), both)
    plot.plt.close(figure)


def test_learning_curve_is_the_mean_over_seeds(study, figures):
    runs = [run for run in plot.read_runs(str(study[0] / "runs"))[0] if run.key == (ALIEN, 1.0, "RDE+DQN")]
    mean = np.mean([[evaluation.mean for evaluation in run.evaluations] for run in runs], axis=0)
    drawn = [line for line in figures["learning"].axes[0].lines if line.get_linewidth() > 1.5 and line.get_marker() == "None"]
    assert [list(line.get_xdata()) for line in drawn][-1] == [50, 60, 60, 80, 80, 100]
    np.testing.assert_allclose(drawn[-1].get_ydata(), mean)


# ----------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (("--runs-dir", "nowhere"), "--runs-dir nowhere is not a folder"),
        (("--runs-dir", "empty"), "there is no finished run in empty"),
        (("--bootstrap-samples", "0"), "--bootstrap-samples is 0"),
        (("--out-dir", "file"), "--out-dir file cannot be written: File exists"),
        (("--out-dir", "taken"), "--out-dir taken cannot be written: Is a directory: taken/results.csv"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, call, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "results.csv").mkdir(parents=True)
    write_run(tmp_path / "runs", [FINAL])
    with pytest.raises(SystemExit) as end:
        call(tmp_path / "runs", tmp_path / "out", *options)
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "runs", "taken"]


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
    assert names == ["learning_curves_my_odd_game-v0.png", "results.csv", "table.md", "training_games.csv"]
