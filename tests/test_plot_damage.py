"""plot_benchmark.py on run folders that are damaged, odd or hostile: each is named in one line, and the rest is read."""

import json
import math
import os
import pathlib

import pytest
import test_plot_benchmark as good
from test_plot_benchmark import ALIEN, DQN, FINAL, FREEWAY, RDE, RESET_CURVE, SR, plot, write_run

call, numbers_only = good.call, good.numbers_only


def broken(tmp_path, change) -> list[str]:
    """The lines for a folder with a good run and one that `change` spoiled."""
    write_run(tmp_path, [FINAL], seed=1)
    change(write_run(tmp_path, [(50, "scheduled", (1.0, 2.0)), FINAL], name="spoiled", seed=2))
    games, left_out, _ = plot.read_games(str(tmp_path))
    assert list(games.seed.unique()) == [1]
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


def replace_by_pipe(name: str):
    def apply(folder: pathlib.Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def first_score(text: str):
    return rewrite("evaluations.csv", lambda old: old.replace("50,scheduled,0,1.0", f"50,scheduled,0,{text}"))


SPOILED = {
    "no args": (lambda f: (f / "args.json").unlink(), "args.json is missing"),
    "cut args": (rewrite("args.json", lambda text: text[:20]), "args.json is not readable"),
    "args without args": (rewrite("args.json", lambda text: "[]"), "args.json is not readable"),
    "args that are none": (rewrite("args.json", lambda text: '{"args": 3}'), "args.json has no env_id"),
    "nested args": (rewrite("args.json", lambda text: "[" * 100_000), "args.json is not readable"),
    "nested value": (rewrite("args.json", lambda text: '{"args": {"a": ' + "[" * 900 + "]" * 900 + "}}"), "args.json "),
    "no seed": (rewrite_args(seed=None), "args.json has no seed"),
    "seed as text": (rewrite_args(seed="2"), "args.json has no seed, or one of a wrong kind"),
    "seed of 100 digits": (rewrite_args(seed=10**100), "args.json has no seed, or one of a wrong kind"),
    "agents as text": (rewrite_args(num_agents="2"), "args.json has no num_agents, or one of a wrong kind"),
    "interval as list": (rewrite_args(reset_interval=[1]), "args.json has no reset_interval, or one of a wrong kind"),
    "replay ratio nan": (rewrite_args(replay_ratio=math.nan), "args.json has no replay_ratio, or one of a wrong kind"),
    "replay ratio of 400 digits": (rewrite_args(replay_ratio=10**400), "args.json has no replay_ratio"),
    "steps as bool": (rewrite_args(total_timesteps=True), "args.json has no total_timesteps, or one of a wrong kind"),
    "limit as text": (rewrite_args(cost_limit="25"), "args.json has no cost_limit, or one of a wrong kind"),
    "limit nan": (rewrite_args(cost_limit=math.nan), "args.json has no cost_limit, or one of a wrong kind"),
    "no evaluations": (lambda f: (f / "evaluations.csv").unlink(), "evaluations.csv is missing"),
    "empty evaluations": (rewrite("evaluations.csv", lambda text: ""), "does not begin with global_step,phase"),
    "heading alone": (rewrite("evaluations.csv", lambda text: text.split("\n")[0] + "\n"), "last evaluation is of step 0"),
    "other columns": (rewrite("evaluations.csv", lambda text: text.replace("phase", "stage")), "does not begin with"),
    "unknown column": (rewrite("evaluations.csv", lambda text: text.replace("return", "return,luck")), "does not begin with"),
    "column without values": (rewrite("evaluations.csv", lambda text: text.replace("return", "return,cost")), "line 2"),
    "success of 0.5": (
        rewrite("episodes.csv", lambda text: text.strip() + ",success\n90,1.0,4,3.5,0.5\n"),
        'episodes.csv, line 2: "90,1.0,4,3.5,0.5" is not a row',
    ),
    "binary": (lambda f: (f / "evaluations.csv").write_bytes(b"\xff\xfe\x00"), "not a readable text"),
    "cut row": (rewrite("evaluations.csv", lambda text: text[:-3]), 'line 5: "100,final,1,2" is not a row, or is cut off'),
    "short row": (rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,0,1.0", "50,scheduled")), "line 2"),
    "text score": (first_score("many"), "line 2"),
    "nan score": (first_score("nan"), "line 2"),
    "score that overflows": (first_score("1e308"), 'line 2: "50,scheduled,0,1e308" is not a row'),
    "step of 30 digits": (rewrite("evaluations.csv", lambda text: text.replace("100,final", "1" * 30 + ",final")), "line 4"),
    "negative step": (rewrite("evaluations.csv", lambda text: text.replace("50,", "-50,")), "line 2"),
    "huge cell": (first_score("1" * 200_000), "evaluations.csv is not readable as CSV: field larger than field limit"),
    "other phase": (rewrite("evaluations.csv", lambda text: text.replace("scheduled", "midnight")), "line 2"),
    "episode lost": (rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,1,2.0\n", "")), "has 1 of 2 episodes"),
    "first episode lost": (rewrite("evaluations.csv", lambda text: text.replace("50,scheduled,0,1.0\n", "")), "out of order"),
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
    "no final": (  # the training script calls it finished, and does not go on with it
        rewrite("evaluations.csv", lambda text: text.replace("final", "scheduled")),
        "damaged: there is a model.pt, but the last evaluation is of step 100, and none is final",
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
    "pipe as args": (replace_by_pipe("args.json"), "args.json is not a regular file"),
    "pipe as evaluations": (replace_by_pipe("evaluations.csv"), "evaluations.csv is not a regular file"),
    "pipe as games": (replace_by_pipe("episodes.csv"), "episodes.csv is not a regular file"),
    "pipe as model": (replace_by_pipe("model.pt"), "not finished: the last evaluation is of step 100 of 100"),
    "folder as games": (lambda f: ((f / "episodes.csv").unlink(), (f / "episodes.csv").mkdir()), "not a regular file"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_has_a_named_line(tmp_path, case):
    change, message = SPOILED[case]
    left_out = broken(tmp_path, change)
    assert len(left_out) == 1 and left_out[0].startswith("spoiled: ") and message in left_out[0], left_out
    assert "\n" not in left_out[0] and len(left_out[0]) < 300


def test_an_evaluation_under_way_is_no_damage(tmp_path):
    def stop_in_an_evaluation(folder: pathlib.Path) -> None:
        (folder / "model.pt").unlink()
        rewrite("evaluations.csv", lambda text: text.replace("100,final,1,2.0\n", ""))(folder)

    (line,) = broken(tmp_path, stop_in_an_evaluation)
    assert line.startswith("spoiled: not finished: ") and "has 1 of 2 episodes" in line


def test_an_empty_run_folder_is_named_and_other_folders_are_not(tmp_path):
    write_run(tmp_path, [FINAL])
    for seed in (2, -1):
        (tmp_path / f"AlienNoFrameskip-v4__dqn_atari__{seed}__20260101-120000").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    write_run(tmp_path / "deeper" / "still", [FINAL], seed=3)
    games, left_out, _ = plot.read_games(str(tmp_path))
    assert list(games.seed.unique()) == [1, 3]
    assert left_out == [f"AlienNoFrameskip-v4__dqn_atari__{seed}__20260101-120000: args.json is missing" for seed in (-1, 2)]


def test_a_negative_seed_is_a_seed(tmp_path):
    write_run(tmp_path, [FINAL], seed=-1)
    assert list(good.read(tmp_path).seed.unique()) == [-1]


def test_links_are_followed_once(tmp_path):
    runs, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    inside = write_run(runs, [FINAL], seed=1)
    outside = write_run(elsewhere, [FINAL], seed=2)
    write_run(elsewhere / "many", [FINAL], seed=3)
    (runs / "a link to a run").symlink_to(inside)
    (runs / "z link to a run").symlink_to(inside)
    (runs / "link to another run").symlink_to(outside)
    (runs / "link to runs").symlink_to(elsewhere / "many")
    (runs / "circle").symlink_to(runs)
    (elsewhere / "many" / "circle").symlink_to(runs)
    (runs / "link to nothing").symlink_to(tmp_path / "nothing")
    games = good.read(runs)
    assert sorted(games.drop_duplicates("run").seed) == [1, 2, 3]
    assert games[games.seed == 2].run.iloc[0] == "link to another run"


ODD_NAMES = ["$_$", "a|b", "a\\|b", "$\\frac{", "two\nlines", "half \ud800 a pair", "<b>", "x" * 300]


def test_odd_names_stop_nothing(tmp_path, call, capsys):
    """As the name of an environment and of a method: in the table, in the CSV files and in the pictures."""
    for i, name in enumerate(ODD_NAMES):
        write_run(tmp_path / "runs", [FINAL], name=f"run{i}", env_id=name if i % 2 else ALIEN, exp_name=name, seed=i)
    os.makedirs(os.fsencode(tmp_path / "runs") + b"/odd__\xff__1__20260101-120000")
    call(tmp_path / "runs", tmp_path / "out")
    output = capsys.readouterr()
    assert output.err == "left out: odd__\\udcff__1__20260101-120000: args.json is missing\n"
    lines = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [line.replace("\\\\", "").replace("\\|", "") for line in lines if line.startswith(("| Alien", "| a"))]
    assert rows and {row.count("|") for row in rows if "replay" not in row} == {9}
    assert any("| \\$_\\$ |" in line for line in lines) and not any("| $" in line for line in lines)
    names = {row["method"] for row in good.read_csv(tmp_path / "out" / "results.csv")}
    assert {"$_$", "a|b", "two\\nlines", "half \\ud800 a pair"} <= names
    assert sum(file.name.startswith("learning_curves_") for file in (tmp_path / "out").iterdir()) == 5


def test_a_formula_in_a_picture_is_its_text(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR | {"exp_name": "$_$"}, env_id="$x^{$")
    plot.set_style()
    figure = plot.plot_game("learning_curves", good.read(tmp_path), good.NO_REFERENCES, plot.Args())
    figure.canvas.draw()  # a formula that is none would be an error
    assert "$_$" in {text.get_text() for text in figure.axes[0].texts}
    plot.plt.close(figure)


def test_games_of_the_same_file_name_do_not_overwrite_each_other(tmp_path, call):
    write_run(tmp_path / "runs", [FINAL], env_id="my/game", name="1")
    write_run(tmp_path / "runs", [FINAL], env_id="my game", name="2")
    call(tmp_path / "runs", tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").glob("learning*"))
    assert names == ["learning_curves_my_game.png", "learning_curves_my_game_2.png"]


# ----------------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (("--runs-dir", "nowhere"), "--runs-dir nowhere is not a folder"),
        (("--runs-dir", "empty"), "there is no finished run in empty"),
        (("--bootstrap-samples", "0"), "--bootstrap-samples is 0"),
        (("--bootstrap-samples", "1000000000000"), "--bootstrap-samples is 1000000000000, but must be from 1 to 100,000"),
        (("--seed", "-1"), "--seed is -1, but must be from 0 to 4,294,967,295"),
        (("--seed", "4294967296"), "--seed is 4294967296"),
        (("--reset-window", "0"), "--reset-window is 0"),
        (("--out-dir", "file"), "--out-dir file cannot be written: File exists"),
        (("--out-dir", "taken"), "--out-dir taken cannot be written: Is a directory: taken/results.csv"),
        (("--out-dir", "piped"), "--out-dir piped cannot be written: not a regular file: piped/table.md"),
        (("--references", "nowhere"), "--references nowhere is not a file"),
        (("--references", "piped/table.md"), "--references piped/table.md is not a file"),
        (("--references", "file"), "--references file"),
        (("--references", "half.csv"), "--references half.csv: row 2 is not one of the columns game, method and score"),
        (("--references", "binary.csv"), "--references binary.csv: row 1 is not one of"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, call, numbers_only, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "half.csv").write_text("game,method,score\nAlien,BBF,3\nAlien,DER,many\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe")
    (tmp_path / "taken" / "results.csv").mkdir(parents=True)
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped" / "table.md")
    names = sorted(path.name for path in tmp_path.iterdir())
    write_run(tmp_path / "runs", [FINAL])
    with pytest.raises(SystemExit) as end:
        call(tmp_path / "runs", tmp_path / "out", *options)
    output = capsys.readouterr()
    assert end.value.code == 2 and output.out == ""
    assert output.err.startswith(f"error: {message}") and output.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "runs"])


def test_the_rest_of_a_study_is_written(tmp_path, call, capsys, numbers_only):
    """Every kind of damage at once, and runs of three methods."""
    for exp in (DQN, SR, RDE):
        write_run(tmp_path, [FINAL], **exp, env_id=FREEWAY)
    for case, (change, _) in SPOILED.items():
        if case not in ("other arguments", "same seed"):
            change(write_run(tmp_path, [(50, "scheduled", (1.0, 2.0)), FINAL], name=f"spoiled {case}", seed=2))
    call(tmp_path, tmp_path / "out")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(SPOILED) - 2 and all(line.startswith("left out: spoiled ") for line in errors)
    assert f"3 runs, {len(errors)} folders left out." in (tmp_path / "out" / "table.md").read_text()
