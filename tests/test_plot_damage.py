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


def rows(name: str, old: str, new: str):
    return rewrite(name, lambda text: text.replace(old, new))


def twice(text: str) -> str:
    return text.replace("50,scheduled,1,2.0\n", "50,scheduled,1,2.0\n50,scheduled,0,1.0\n50,scheduled,1,2.0\n")


EVALUATIONS, EPISODES, KIND = "evaluations.csv", "episodes.csv", "or one of a wrong kind"
LINE = "line 2 is cut off, or a value in it is not allowed"
ORDER = ": an evaluation is cut off, doubled, out of order, or misses before_reset"
SPOILED = {
    "no args": (lambda f: (f / "args.json").unlink(), "args.json is missing"),
    "cut args": (rewrite("args.json", lambda text: text[:20]), "args.json is damaged"),
    "args without args": (rewrite("args.json", lambda text: "[]"), "args.json is damaged"),
    "args that are none": (rewrite("args.json", lambda text: '{"args": 3}'), "args.json is damaged"),
    "nested args": (rewrite("args.json", lambda text: "[" * 100_000), "args.json is damaged"),
    "nested value": (rewrite("args.json", lambda text: '{"args": {"a": ' + "[" * 900 + "]" * 900 + "}}"), "args.json "),
    "no seed": (rewrite_args(seed=None), "args.json is damaged: no seed"),
    "seed as text": (rewrite_args(seed="2"), f"no seed, {KIND}"),
    "seed of 100 digits": (rewrite_args(seed=10**100), f"no seed, {KIND}"),
    "agents as text": (rewrite_args(num_agents="2"), f"no num_agents, {KIND}"),
    "interval as list": (rewrite_args(reset_interval=[1]), f"no reset_interval, {KIND}"),
    "replay ratio nan": (rewrite_args(replay_ratio=math.nan), f"no replay_ratio, {KIND}"),
    "replay ratio of 400 digits": (rewrite_args(replay_ratio=10**400), f"no replay_ratio, {KIND}"),
    "steps as bool": (rewrite_args(total_timesteps=True), f"no total_timesteps, {KIND}"),
    "no episodes wanted": (rewrite_args(eval_episodes=0), "evaluations.csv is damaged"),
    "limit as text": (rewrite_args(cost_limit="25"), f"no cost_limit, {KIND}"),
    "limit nan": (rewrite_args(cost_limit=math.nan), f"no cost_limit, {KIND}"),
    "no evaluations": (lambda f: (f / EVALUATIONS).unlink(), "evaluations.csv is missing"),
    "empty evaluations": (rewrite(EVALUATIONS, lambda text: ""), "evaluations.csv is damaged: No columns"),
    "heading alone": (rewrite(EVALUATIONS, lambda text: text.split("\n")[0] + "\n"), "no final evaluation"),
    "other columns": (rows(EVALUATIONS, "phase", "stage"), "does not begin with global_step,phase"),
    "unknown column": (rows(EVALUATIONS, "return", "return,luck"), "does not begin with"),
    "column without values": (rows(EVALUATIONS, "return", "return,cost"), LINE),
    "rows too long": (rewrite(EVALUATIONS, lambda text: text.replace("\n", ",1\n").replace("return,1", "return")), "damaged"),
    "success of 0.5": (rewrite(EPISODES, lambda text: text.strip() + ",success\n90,1.0,4,3.5,0.5\n"), LINE),
    "binary": (lambda f: (f / EVALUATIONS).write_bytes(b"\xff\xfe\x00"), "evaluations.csv is damaged"),
    "cut row": (rewrite(EVALUATIONS, lambda text: text[:-3]), "line 5 is cut off"),
    "short row": (rows(EVALUATIONS, "50,scheduled,0,1.0", "50,scheduled"), "evaluations.csv is damaged"),
    "text score": (first_score("many"), "evaluations.csv is damaged: could not convert string to float: 'many'"),
    "nan score": (first_score("nan"), LINE),
    "score that overflows": (first_score("1e308"), LINE),
    "step of 30 digits": (rows(EVALUATIONS, "100,final", "1" * 30 + ",final"), "evaluations.csv is damaged"),
    "negative step": (rows(EVALUATIONS, "50,", "-50,"), LINE),
    "huge cell": (first_score("1" * 200_000), "evaluations.csv is damaged"),
    "other phase": (rows(EVALUATIONS, "scheduled", "midnight"), LINE),
    "episode lost": (rows(EVALUATIONS, "50,scheduled,1,2.0\n", ""), f"line 3{ORDER}"),
    "first episode lost": (rows(EVALUATIONS, "50,scheduled,0,1.0\n", ""), f"line 2{ORDER}"),
    "episode doubled": (rows(EVALUATIONS, "50,scheduled,1,2.0\n", "50,scheduled,1,2.0\n" * 2), f"line 4{ORDER}"),
    "evaluation doubled": (rewrite(EVALUATIONS, twice), f"line 4{ORDER}"),
    "phase changes": (rows(EVALUATIONS, "50,scheduled,1", "50,before_reset,1"), f"line 3{ORDER}"),
    "steps go back": (rows(EVALUATIONS, "50,", "500,"), f"line 4{ORDER}"),
    "after without before": (rows(EVALUATIONS, "scheduled", "after_reset"), f"line 2{ORDER}"),
    "final cut off": (rewrite(EVALUATIONS, lambda text: text.split("100,final,1")[0]), f"line 4{ORDER}"),
    "no final": (rows(EVALUATIONS, "final", "scheduled"), "damaged: there is a model.pt, but no final evaluation at the end"),
    "final too early": (rewrite_args(total_timesteps=200), "damaged: there is a model.pt, but no final evaluation at the end"),
    "no games": (lambda f: (f / EPISODES).unlink(), "episodes.csv is missing"),
    "empty games": (rewrite(EPISODES, lambda text: ""), "episodes.csv is damaged"),
    "cut game": (rewrite(EPISODES, lambda text: text + "90,1.0"), "episodes.csv is damaged"),
    "cut in its time": (rewrite(EPISODES, lambda text: text + "90,1.0,4,3"), LINE),
    "nan game": (rewrite(EPISODES, lambda text: text + "90,nan,4,3.5\n"), LINE),
    "no model": (lambda f: (f / "model.pt").unlink(), "not finished: there is no model.pt"),
    "other arguments": (rewrite_args(tau=0.5), "other arguments than most runs of DQN there: tau 0.5 instead of None"),
    "same seed": (rewrite_args(seed=1), "another run of the same seed counts"),
    "pipe as args": (replace_by_pipe("args.json"), "args.json is missing, or not a regular file"),
    "pipe as evaluations": (replace_by_pipe(EVALUATIONS), "evaluations.csv is missing, or not a regular file"),
    "pipe as games": (replace_by_pipe(EPISODES), "episodes.csv is missing, or not a regular file"),
    "pipe as model": (replace_by_pipe("model.pt"), "not finished: there is no model.pt"),
    "folder as games": (lambda f: ((f / EPISODES).unlink(), (f / EPISODES).mkdir()), "not a regular file"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_folder_has_a_named_line(tmp_path, case):
    change, message = SPOILED[case]
    left_out = broken(tmp_path, change)
    assert len(left_out) == 1 and left_out[0].startswith("spoiled: ") and message in left_out[0], left_out
    assert "\n" not in left_out[0] and len(left_out[0]) < 300


def test_an_empty_run_folder_is_named_and_other_folders_are_not(tmp_path):
    write_run(tmp_path, [FINAL])
    for seed in (2, -1):
        (tmp_path / f"AlienNoFrameskip-v4__dqn_atari__{seed}__20260101-120000").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    write_run(tmp_path / "deeper" / "still", [FINAL], seed=3)
    games, left_out, _ = plot.read_games(str(tmp_path))
    assert list(games.seed.unique()) == [1, 3]
    assert left_out == [
        f"AlienNoFrameskip-v4__dqn_atari__{seed}__20260101-120000: args.json is missing, or not a regular file"
        for seed in (-1, 2)
    ]


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
    assert output.err == "left out: odd__\\udcff__1__20260101-120000: args.json is missing, or not a regular file\n"
    lines = good.table_of(tmp_path / "out").splitlines()
    rows = [line.replace("\\\\", "").replace("\\|", "") for line in lines if line.startswith(("| Alien", "| a"))]
    assert rows and {row.count("|") for row in rows if "replay" not in row} == {9}
    assert any("| \\$_\\$ |" in line for line in lines) and not any("| $" in line for line in lines)
    names = {row["method"] for row in good.read_csv(tmp_path / "out" / "results.csv")}
    assert {"$_$", "a|b", "two\\nlines", "half \\ud800 a pair"} <= names
    assert sum(file.name.startswith("learning_curves_") for file in (tmp_path / "out").iterdir()) == 5


def test_a_formula_in_a_picture_is_its_text(tmp_path):
    write_run(tmp_path, RESET_CURVE, **SR | {"exp_name": "$_$"}, env_id="$x^{$")
    figure = good.pictures(good.read(tmp_path))["learning_curves_%24x%5E%7B%24"]  # a formula that is none would be an error
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$_$"]


def test_games_of_the_same_file_name_do_not_overwrite_each_other(tmp_path, call):
    write_run(tmp_path / "runs", [FINAL], env_id="my/game", name="1")
    write_run(tmp_path / "runs", [FINAL], env_id="my game", name="2")
    call(tmp_path / "runs", tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "out").glob("learning*"))
    assert names == ["learning_curves_my%20game.png", "learning_curves_my%2Fgame.png"]


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
        (("--references", "nowhere"), "--references nowhere: nowhere is missing"),
        (("--references", "piped/table.md"), "--references piped/table.md: table.md is missing, or not a regular file"),
        (("--references", "file"), "--references file: file is damaged: No columns"),
        (("--references", "half.csv"), "--references half.csv: half.csv is damaged: could not convert string to float: 'many'"),
        (("--references", "other.csv"), "--references other.csv: other.csv is damaged: Usecols do not match columns"),
        (("--references", "binary.csv"), "--references binary.csv: binary.csv is damaged"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, call, numbers_only, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "half.csv").write_text("game,method,score\nAlien,BBF,3\nAlien,DER,many\n")
    (tmp_path / "other.csv").write_text("game,who,score\nAlien,BBF,3\n")
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
