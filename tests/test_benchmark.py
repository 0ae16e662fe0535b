"""benchmark.sh against quick stand-ins of the training scripts."""

import ast
import fcntl
import json
import os
import pathlib
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from itertools import accumulate

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "benchmark.sh"

# A training script that does nothing, and keeps the scripts' promises: --check-only, --resume auto with the exit codes, a
# checkpoint when a signal comes, the end at once when a second one comes. It writes what happens to the file $JOURNAL.
# Of its own are --wait-at STEP (for a signal, or for the file $JOURNAL.go), --save-seconds, and seeds that are special:
# --slow-seed takes 2.5 s, --failing-seed fails, at --busy-seed is another process.
FAKE_SCRIPT = """
import glob, json, os, signal, sys, time

options = sys.argv[1:]
check_only = options[-1] == "--check-only" and bool(options.pop())
args = {"exp_name": os.path.basename(__file__)[: -len(".py")]}
args |= {name.removeprefix("--").replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)}
refused = [name for name in args if "refused" in args[name] and name != "exp_name"]
if refused:
    sys.exit(f"error: {refused[0]} is {args[refused[0]]}")
args |= {"seed": int(args["seed"]), "replay_ratio": float(args["replay_ratio"])}

def special(kind):
    return args["seed"] == int(args.get(f"{kind}_seed", -1))

def journal(event, **more):
    line = {name: args[name] for name in ("env_id", "exp_name", "seed", "replay_ratio")} | more
    line |= {"event": event, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "options": sys.argv[1:]}
    with open(os.environ["JOURNAL"], "a") as file:
        file.write(json.dumps(line) + "\\n")

if special("busy"):
    print("another process is at work", file=sys.stderr)
    sys.exit(75)
if check_only:
    journal("checked")
    sys.exit(0)
received = []

def handle(number, frame):
    received.append(number)
    journal("signal")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)

signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
if special("failing"):
    journal("failing")
    print("the emulator caught fire", file=sys.stderr)
    sys.exit(7)

folder, step = None, 0
for path in glob.glob(glob.escape(args["runs_dir"]) + "/*/args.json"):
    path = os.path.dirname(path)
    if json.load(open(path + "/args.json"))["args"] == args:
        if os.path.exists(path + "/model.pt"):
            print(f"the run in {path} is finished already")
            journal("skipped")
            sys.exit(0)
        if os.path.exists(path + "/checkpoint.pt"):
            folder, step = path, int(open(path + "/checkpoint.pt").read())
if folder is None:
    folder = f"{args['runs_dir']}/{time.time_ns()}-{os.getpid()}"
    os.makedirs(folder)
    json.dump({"args": args}, open(folder + "/args.new", "w"))
    os.replace(folder + "/args.new", folder + "/args.json")
journal("start", step=step)

def save():
    open(folder + "/checkpoint.new", "w").write(str(step))
    os.replace(folder + "/checkpoint.new", folder + "/checkpoint.pt")
    journal("saved", step=step)

time.sleep(2.5 if special("slow") else 0)
while step < 10:
    step += 1
    if step == int(args.get("wait_at", -1)):
        save()
        journal("waiting")
        while not received and not os.path.exists(os.environ["JOURNAL"] + ".go"):
            time.sleep(0.02)
    if received:
        time.sleep(float(args.get("save_seconds", 0)))
        save()
        sys.exit(128 + received[0])
open(folder + "/model.pt", "w").close()
journal("end")
"""


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


class Study:
    """A folder with stand-ins of the scripts and of plot_benchmark.py, and benchmark.sh called on it."""

    def __init__(self, path: pathlib.Path, scripts_name: str = "scripts"):
        self.path, self.scripts, self.runs, self.journal = path, path / scripts_name, path / "runs", path / "journal"
        self.scripts.mkdir()
        (self.scripts / "dqn_atari.py").write_text(FAKE_SCRIPT)
        for name in ("sr_dqn_atari", "rde_dqn_atari", "rde_sac_dmc", "rde_dqn", "rde_drq_atari", "rde_sac_safety"):
            (self.scripts / f"{name}.py").write_text("class Args:\n    reset_interval: int = 80_000\n" + FAKE_SCRIPT)
        (self.scripts / "plot_benchmark.py").write_text("import sys\nprint('PLOT', *sys.argv[1:])\n")
        self.environment = {name: os.environ[name] for name in os.environ if name[:5] not in ("SLURM", "OMP_N")}
        self.environment |= {"PYTHON": sys.executable, "SCRIPTS_DIR": str(self.scripts), "JOURNAL": str(self.journal)}

    def command(self, *options: str) -> list[str]:
        return ["bash", str(BENCHMARK), "--runs-dir", str(self.runs), *options]

    def start(self, *options: str, terminal: int | None = None, before: tuple = (), **environment: str) -> subprocess.Popen:
        """In a session of its own, with the terminal if one is given, and no signal ignored as under nohup."""

        def prepare():
            for number in (signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            if terminal is not None:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        settings = {"env": self.environment | environment, "cwd": self.path, "text": True, "stdin": terminal}
        settings |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen([*before, *self.command(*options)], **settings, preexec_fn=prepare)

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*options), env=self.environment | environment, cwd=self.path, text=True,
                              capture_output=True, timeout=300)  # fmt: skip

    def events(self, *kinds: str) -> list[dict]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in map(json.loads, lines) if not kinds or event["event"] in kinds]

    def wait_for(self, kind: str, count: int = 1) -> list[dict]:
        wait_until(lambda: len(self.events(kind)) >= count)
        return self.events(kind)

    def go(self) -> None:  # lets the waiting runs go on, and those that come
        pathlib.Path(f"{self.journal}.go").touch()

    def finished(self) -> list[tuple]:
        """(game, script, replay ratio, seed) of every finished run folder."""
        folders = [model.parent for model in self.runs.glob("*/model.pt")]
        return sorted(names([json.loads((folder / "args.json").read_text())["args"] for folder in folders]))


def wait_until(condition) -> None:
    deadline = time.time() + 100
    while not condition():
        assert time.time() < deadline, "it does not come"
        time.sleep(0.02)


def names(events: list[dict]) -> list[tuple]:
    return [(event["env_id"], event["exp_name"], event["replay_ratio"], event["seed"]) for event in events]


SMALL = ("--games", "Pong,Alien", "--methods", "rde_dqn", "--replay-ratios", "1,2", "--seeds", "2")
PONG, ALIEN = "PongNoFrameskip-v4", "AlienNoFrameskip-v4"
SMALL_RUNS = [(game, "rde_dqn_atari", ratio, seed) for ratio in (1.0, 2.0) for seed in (1, 2) for game in (PONG, ALIEN)]
ONE_GAME = ("--games", "Pong", "--methods", "dqn", "--replay-ratios", "1")


# ------------------------------------------------------------------------------------------------- the list of commands


def dry_run(study: Study, *options: str) -> list[list[str]]:
    result = study.run("--dry-run", *options)
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line, comments=False) for line in result.stdout.splitlines()]


def in_short(commands: list[list[str]]) -> list[str]:
    """As "dqn_atari.py MsPacmanNoFrameskip-v4 1 0.5 --options", with the seed and the replay ratio."""
    return [" ".join([pathlib.Path(c[1]).name, c[3], c[5], c[7], *c[8:-4]]) for c in commands]


ONCE = ("--seeds", "1", "--replay-ratios", "1")


def test_default_study(study):
    commands = dry_run(study)
    assert study.run("--count").stdout == "60\n" and len(commands) == 60 == len(set(map(tuple, commands)))
    line = f"{study.scripts}/dqn_atari.py --env-id FreewayNoFrameskip-v4 --seed 1 --replay-ratio 1"
    assert commands[0] == [sys.executable, *line.split(), "--runs-dir", str(study.runs), "--resume", "auto"]
    assert in_short(commands)[:4] == [
        "dqn_atari.py FreewayNoFrameskip-v4 1 1", "sr_dqn_atari.py FreewayNoFrameskip-v4 1 1 --reset-interval 40000",
        "rde_dqn_atari.py FreewayNoFrameskip-v4 1 1 --reset-interval 40000", "dqn_atari.py MsPacmanNoFrameskip-v4 1 1"]  # fmt: skip
    assert [tuple(c[5:8:2]) for c in commands[::6]] == [(str(seed), ratio) for ratio in "14" for seed in range(1, 6)]


def test_settings(study):
    options = "7 0.25 --num-envs 4 --learning-starts 2000 --end-e 0.1 --tau 0.005"
    expected = []
    for game, interval in (("FreewayNoFrameskip-v4", 10000), ("MsPacmanNoFrameskip-v4", 20000)):
        expected += [f"dqn_atari.py {game} {options}"]
        expected += [f"{method}_dqn_atari.py {game} {options} --reset-interval {interval}" for method in ("sr", "rde")]
    assert in_short(dry_run(study, "--setting", "official", "--seeds", "7-7"))[:6] == expected
    assert study.run("--setting", "official", "--count").stdout == "60\n"  # replay ratios 0.25 and 1
    one_run = ("--setting", "official", "--seeds", "1", "--games", "MsPacman", "--methods", "dqn")
    of_the_ratio = dry_run(study, *one_run, "--replay-ratios", "0.25,0.5,1,2,3")
    assert [c[c.index("--tau") + 1] for c in of_the_ratio] == ["0.005", "0.0025", "0.00125", "0.000625", "0.000416667"]
    assert "--tau" not in dry_run(study, *ONCE)[0] and "--tau" not in dry_run(study, "--smoke")[0]
    [own] = dry_run(study, *one_run, "--replay-ratios", "1", "--", "--tau", "0.01")
    assert own.count("--tau") == 2 and own.index("0.01") > own.index("0.00125")  # the last one holds

    commands = dry_run(study, "--smoke", "--total-timesteps", "400")
    options = "--total-timesteps 300 --learning-starts 100 --buffer-size 5000 --eval-interval 150 --eval-episodes 1"
    first = f"dqn_atari.py MsPacmanNoFrameskip-v4 1 0.5 {options} --total-timesteps 400"
    assert len(commands) == 6 and in_short(commands)[:2] == [first, f"sr_{first} --reset-interval 80"]
    result = subprocess.run(["bash", BENCHMARK, "--smoke", "--dry-run"], env=study.environment, capture_output=True, text=True)
    assert result.stdout.count(" --runs-dir runs/smoke ") == 6


def test_reset_options_go_to_the_methods_that_reset(study):
    for line in in_short(dry_run(study, "--reset-interval", "123", "--reset-depth", "last2", "--games", "Freeway")):
        assert line.endswith(" --reset-interval 123 --reset-depth last2") == (not line.startswith("dqn_atari.py"))
    sac, rde_sac = in_short(dry_run(study, "--methods", "sac,rde_sac", "--reset-depth", "full", "--games", "hopper-hop", *ONCE))
    assert sac == "rde_sac_dmc.py hopper-hop 1 1 --num-agents 1 --reset-interval 0"
    assert rde_sac == "rde_sac_dmc.py hopper-hop 1 1 --reset-depth full"


def test_suites(study):
    for suite, script, game in (
        ("dmc", "rde_sac_dmc.py", "walker-run"),
        ("minigrid", "rde_dqn.py", "MiniGrid-LavaGapS5-v0"),
        ("safety", "rde_sac_safety.py", "SafetyHalfCheetahVelocity-v1"),
    ):
        expected = [f"{script} {game} 1 1{more}" for more in (" --num-agents 1 --reset-interval 0", " --num-agents 1", "")]
        assert in_short(dry_run(study, "--suite", suite, *ONCE))[:3] == expected
    assert dry_run(study, "--methods", "sac,sr_sac,rde_sac") == dry_run(study, "--suite", "dmc")
    assert dry_run(study, "--methods", "sac_lag,sr_sac_lag,rde_sac_lag") == dry_run(study, "--suite", "safety")
    assert in_short(dry_run(study, "--methods", "rde_sac_lag --kappa 1", *ONCE)) == [
        "rde_sac_safety.py SafetyHalfCheetahVelocity-v1 1 1 --kappa 1 --exp-name rde_sac_lag_kappa_1"]  # fmt: skip
    assert [command[3] for command in dry_run(study, "--methods", "rde_sac", *ONCE)] == ["walker-run", "hopper-hop"]
    expected = [
        f"rde_drq_atari.py BoxingNoFrameskip-v4 1 1{more}"
        for more in (" --num-agents 1 --reset-interval 0", " --num-agents 1", "")
    ]
    assert in_short(dry_run(study, "--methods", "drq,sr_drq,rde_drq", "--games", "Boxing", *ONCE)) == expected


def test_a_method_with_options_of_its_own(study):
    def own(methods, *options):
        return [" ".join(c[8:-4]) for c in dry_run(study, *ONE_GAME, "--seeds", "1", "--methods", methods, *options)]

    assert own("dqn,rde_dqn --beta 1e9", "--", "--note", "x") == ["--note x", "--note x --beta 1e9 --exp-name rde_dqn_beta_1e9"]
    assert own("rde_dqn --beta 1e-3 --num-agents 4, rde_dqn --bf16 --exp-name half,rde_dqn --exp_name=b") == [
        "--beta 1e-3 --num-agents 4 --exp-name rde_dqn_beta_1e-3_num-agents_4", "--bf16 --exp-name half", "--exp_name=b"]  # fmt: skip
    assert own("sr_dqn --reset-interval 7,rde_dqn", "--games", "Freeway", "--reset-depth", "full") == [
        "--reset-interval 40000 --reset-depth full --reset-interval 7 --exp-name sr_dqn_reset-interval_7",
        "--reset-interval 40000 --reset-depth full"]  # fmt: skip

    (study.scripts / "my_idea.py").symlink_to("rde_dqn_atari.py")
    assert own("my_idea.py --note a/b") == ["--note a/b --exp-name my_idea_note_a_b"]
    command = dry_run(study, "--methods", "my_idea.py", "--games", "Freeway,walker-run", *ONCE)
    assert command[0][1] == f"{study.scripts}/my_idea.py" and in_short(command) == [
        "my_idea.py FreewayNoFrameskip-v4 1 1 --reset-interval 40000", "my_idea.py walker-run 1 1"]  # fmt: skip
    (study.path / "elsewhere.py").touch()
    assert dry_run(study, "--methods", f"{study.path}/elsewhere.py", *ONCE)[0][1] == f"{study.path}/elsewhere.py"


def test_seeds_and_lists(study):
    for option, seeds in (("--seeds=3", "1 2 3"), ("--seeds=9,2-4", "9 2 3 4"), ("--seeds=08 10-11", "8 10 11")):
        assert [command[5] for command in dry_run(study, *ONE_GAME, option)] == seeds.split()
    assert study.run("--seeds", "100000", *ONE_GAME, "--count").stdout == "100000\n"
    games = [command[3] for command in dry_run(study, *ONE_GAME, "--games", "Alien, Pong  ALE/Pong-v5", "--seeds", "1")]
    assert games == [ALIEN, PONG, "ALE/Pong-v5"]

    games = {command[3] for command in dry_run(study, "--games", "atari100k", "--seeds", "1")}
    nodes = [node for node in ast.parse((ROOT / "rde_dqn_atari.py").read_text()).body if isinstance(node, ast.Assign)]
    [scores] = [node.value for node in nodes if ast.unparse(node.targets[0]) == "RANDOM_AND_HUMAN_SCORES"]
    assert games == {f"{game}NoFrameskip-v4" for game in ast.literal_eval(scores)}
    assert study.run("--games", "atari100k", "--count").stdout == f"{26 * 3 * 2 * 5}\n"


def test_help_names_every_option(study):
    text = study.run("--help").stdout
    options = set(re.findall(r"--[a-z][a-z-]+", BENCHMARK.read_text().split("case $1 in")[1].split("esac")[0])) - {"--help"}
    assert len(options) == 15 and all(len(re.findall(f"^  {option} ", text, re.MULTILINE)) == 1 for option in options)
    assert len(text.splitlines()) <= 22 and max(map(len, text.splitlines())) <= 128


@pytest.mark.parametrize("options", [(), ("--setting", "official"), ("--smoke",), ("--reset-depth", "last2")])
def test_the_real_scripts_have_the_options(study, options):
    study.environment["SCRIPTS_DIR"] = str(ROOT)
    for command in dry_run(study, *options, "--seeds", "1"):
        tree = ast.parse(pathlib.Path(command[1]).read_text())
        args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
        fields = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
        assert {option[2:].replace("-", "_") for option in command if option.startswith("--")} <= fields


BAD_OPTIONS = {  # by what is said
    " is not an option": ["--frobnicate 3", "Alien"], "--games needs a value": ["--games", "--games ''"],
    "--suite is chess": ["--suite chess"], "make 0 runs": ["--games ,"], "the script ": ["--methods missing.py"],
    "atari has no ppo, but dqn drq ": ["--methods ppo"], "atari has no , but": ["--methods ,"], "dmc has no dqn": ["--methods dqn,sac", "--suite dmc --methods dqn"],
    "commas separate methods": ["--methods 'dqn rde_dqn'", "--methods 'dqn\nrde_dqn'"],
    "--seed is set by benchmark.sh itself for every run (see --games, --seeds,": ["-- --seed 3", "--methods 'rde_dqn --seed 3'"],
    "--runs-dir is set": ["-- --runs-dir X", "--methods 'rde_dqn --beta 2 --runs_dir=x'"],
    "--env-id is set": ["-- --env-id X", "-- --env_id=X"], "--replay-ratio is set": ["-- --replay-ratio=3"],
    "--resume is set": ["-- --resume auto"], "--check-only is set": ["-- --note x --check-only"],
    "holds no seed, or more than 100,000": ["--seeds 5-1", "--seeds 0", "--seeds 9999999999"],
    "neither a seed nor a range": ["--seeds x", "--seeds 99999999999999999999"],
    "the lists make 1200000 runs, but 1 to 100,000": ["--seeds 100000"],
    "but must be a number from 1 to 999": ["--jobs 0", "--jobs two", "--jobs 1000", "--jobs 9223372036854775808"],
    "atari has no setting unofficial; --setting official and": ["--setting unofficial"],
    "dmc has no setting": ["--setting official --methods sac", "--smoke --methods sac"],
}  # fmt: skip


@pytest.mark.parametrize("message, options", [(message, line) for message in BAD_OPTIONS for line in BAD_OPTIONS[message]])
def test_bad_options(study, message, options):
    result = study.run(*shlex.split(options))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert not study.runs.exists() and not study.events()


# What scripts refuse: said by the script, before the first run, for every method, game and replay ratio of the lists.
REFUSED = [
    (("--", "--note", "refused"), "Freeway dqn, replay ratio 1, seed 1: note is refused"),
    (("--total-timesteps", "refused"), "Freeway dqn, replay ratio 1, seed 1: total_timesteps is refused"),
    (("--methods", "dqn,rde_dqn --beta refused"), "rde_dqn --beta refused, replay ratio 4, seed 1: beta is refused"),
    (("--replay-ratios", "1,2,refused"), "replay ratio refused, seed 1: replay_ratio is refused"),
    (("--games", "Pong,Alien,Qbert,Hero,refused"), "refused sr_dqn, replay ratio 1, seed 1: env_id is refused"),
    (("--reset-depth", "last1", "--methods", "my_idea.py"), "my_idea.py, replay ratio 1, seed 1: SyntaxError: "),
    (("--methods", "framed.py"), "framed.py, replay ratio 1, seed 1: Unrecognized options: --x"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_scripts_refuse_is_known_before_the_first_run(study, options, message):
    (study.scripts / "my_idea.py").write_text("if True print(1)\n")
    frame = "╭─ Unrecognized options ─╮\n│ Unrecognized options: --x   │\n╰──────╯"
    (study.scripts / "framed.py").write_text(f"import sys\nprint({frame!r}, file=sys.stderr)\nsys.exit(2)\n")
    result = study.run(*options)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert not study.runs.exists() and not study.events("start")


def test_the_check_costs_one_command_for_each_method_or_game(study):
    options = ("--games", "Pong,Alien,Qbert", "--methods", "dqn,rde_dqn", "--replay-ratios", "1,2", "--seeds", "4")
    assert study.run(*options, "--no-plot").returncode == 0
    assert names(study.events("checked")) == [
        (PONG, "dqn_atari", 1.0, 1), (ALIEN, "rde_dqn_atari", 2.0, 1), ("QbertNoFrameskip-v4", "dqn_atari", 1.0, 1)]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- running


def test_runs_in_order_then_skips_and_plots(study):
    result = study.run(*SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert names(study.events("start")) == SMALL_RUNS and study.finished() == sorted(SMALL_RUNS)
    assert all(event["threads"] is None for event in study.events("start"))
    assert result.stdout.splitlines()[-1] == f"PLOT --runs-dir {study.runs}"
    lines = [line for line in result.stdout.splitlines() if ": finished; " in line]
    pattern = r"\[1/8\] Pong rde_dqn, replay ratio 1, seed 1: finished; 1 of 8 done, about \d+ min left"
    assert re.fullmatch(pattern, lines[0]) and len(lines) == 8
    assert lines[7] == "[8/8] Alien rde_dqn, replay ratio 2, seed 2: finished; 8 of 8 done"

    again = study.run(*SMALL, "--no-plot")
    assert again.returncode == 0 and again.stdout.count(": is finished already; ") == 8 and "PLOT" not in again.stdout
    assert "min left" not in again.stdout and len(study.events("start")) == 8  # nothing is known of the time of a run

    assert study.run(*SMALL, "--seeds", "3").returncode == 0
    runs = [(game, "rde_dqn_atari", ratio, 3) for ratio in (1.0, 2.0) for game in (PONG, ALIEN)]
    assert names(study.events("start"))[8:] == runs


def test_time_left_is_that_of_the_runs_of_this_call(study):
    options = ("--", "--slow-seed", "3", "--failing-seed", "4")
    assert study.run(*ONE_GAME, "--seeds", "2", *options).returncode == 0
    start, done = time.time(), []
    process = study.start(*ONE_GAME, "--seeds", "202", *options)
    for line in process.stdout:
        done += [line.split(": ", 1)[1].rstrip()] if " done" in line else []
        if len(done) == 4:
            break
    longest = time.time() - start + 1
    process.terminate()
    process.communicate(timeout=100)
    assert done[:2] == ["is finished already; 1 of 202 done", "is finished already; 2 of 202 done"]
    left = int(re.fullmatch(r"finished; 3 of 202 done, about (\d+) min left", done[2])[1])
    assert 199 * 2 // 60 + 1 <= left <= 199 * longest / 60 + 1  # finished ones do not count, with a time of nearly 0
    assert int(re.search(r"caught fire; 4 of 202 done, about (\d+) min left", done[3])[1]) in (
        left - 1,
        left,
    )  # nor a failed one


def test_failures_are_listed_and_stop_nothing(study):
    options = (*ONE_GAME, "--seeds", "4", "--", "--busy-seed", "1", "--failing-seed", "2")
    result = study.run(*options)
    assert result.returncode == 1 and [run[3] for run in names(study.events("end"))] == [3, 4]
    title, *listed = result.stderr.splitlines()
    assert title == "1 of 4 runs FAILED:" and len(listed) == 1
    assert "  [2/4] Pong dqn, replay ratio 1, seed 2 (exit code 7), log: " in listed[0]
    log = pathlib.Path(listed[0].split("log: ")[1])
    command, message = log.read_text().splitlines()
    assert message == "the emulator caught fire" and "FAILED (exit code 7): the emulator caught fire" in result.stdout
    assert shlex.split(command)[0] == "$" and shlex.split(command)[2] == str(study.scripts / "dqn_atari.py")
    assert "seed 1: another process is at it, left to that; 1 of 4 done" in result.stdout and "PLOT" in result.stdout

    again = study.run(*options)
    assert again.returncode == 1 and [event["seed"] for event in study.events("start", "failing")] == [2, 3, 4, 2]


def test_a_log_that_cannot_be_written_fails_its_run_and_stops_nothing(study):
    options = ("--games", "Pong,Alien,Freeway", "--methods", "dqn", "--seeds", "1", "--replay-ratios", "1", "--jobs", "2")
    assert study.run(*options).returncode == 0
    log = next((study.runs / "logs").glob("Alien*"))
    for file in study.runs.glob("*/model.pt"):
        file.unlink()
    log.unlink()
    log.mkdir()
    result = study.run(*options)
    assert result.returncode == 1 and "PLOT" in result.stdout
    assert "Alien dqn, replay ratio 1, seed 1: FAILED (exit code 1): its log cannot be written" in result.stdout
    assert "1 of 3 runs FAILED:" in result.stderr and len(study.finished()) == 2
    assert "benchmark.sh: line" not in result.stdout + result.stderr


def test_a_run_that_is_in_the_list_twice_happens_once(study):
    process = study.start(*ONE_GAME, "--seeds", "1,1", "--jobs", "2", "--", "--wait-at", "3")
    study.wait_for("waiting")
    time.sleep(0.5)  # the second one is long started and ended
    study.go()
    assert "another process is at it, left to that; 1 of 2 done" in process.communicate(timeout=100)[0]
    assert "is finished already; 2 of 2 done" in study.run(*ONE_GAME, "--seeds", "2,2").stdout
    assert [event["seed"] for event in study.events("start")] == [1, 2] and len(study.finished()) == 2


def test_programs_that_are_missing_or_fail(study):
    result = study.run(PYTHON="/no/such/python")
    assert result.returncode == 2 and result.stderr.startswith("error: the program /no/such/python") and not study.runs.exists()
    (study.scripts / "plot_benchmark.py").write_text("raise SystemExit(3)")
    assert study.run(*ONE_GAME, "--seeds", "1").returncode == 1


def test_dry_run_can_be_piped(study):
    for again in (False, True):
        lines = study.run(*SMALL, "--dry-run").stdout
        assert lines.count("\n") == 8 and "#" not in lines  # finished or not, they are commands
        subprocess.run(["bash"], input=lines, env=study.environment, text=True, check=True)
        assert names(study.events("start")) == SMALL_RUNS and len(study.events("skipped")) == (8 if again else 0)
    assert not study.events("checked") and not (study.runs / "logs").exists()


def test_parallel_jobs(study):
    process = study.start(*SMALL, "--jobs", "3", "--", "--wait-at", "3")
    study.wait_for("waiting", 3)
    time.sleep(1)  # a fourth would have begun by now
    assert len(study.events("start")) == 3
    study.go()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and study.finished() == sorted(SMALL_RUNS), output
    assert sorted(names(study.events("start"))) == sorted(SMALL_RUNS)
    assert max(accumulate({"start": 1, "end": -1}[event["event"]] for event in study.events("start", "end"))) == 3
    assert {event["threads"] for event in study.events("start")} == {"1"}
    assert study.run(*ONE_GAME, "--seeds", "9-9", "--jobs", "2", OMP_NUM_THREADS="5").returncode == 0
    assert study.events("start")[-1]["threads"] == "5"


def test_odd_names(tmp_path):
    study = Study(tmp_path, "my scripts'")
    study.runs = tmp_path / 'runs [of] $HOME; "a" *'
    (tmp_path / "starlight").mkdir()  # a * in the list must not become this name
    games = ["$(touch-hacked)-v0", "it's-v0", '"q"-v1', "*", "a;b&c|d-v0", "ALE/Pong-v5", "Übung-v0", "back\\slash-v0"]
    options = ("--games", " ".join(games), *ONE_GAME[2:], "--seeds", "1", "--", "--note", "a b\"'$x\n*")
    result = study.run("--jobs", "2", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    starts = study.events("start")
    assert sorted(event["env_id"] for event in starts) == sorted([*set(games) - {"*"}, "*NoFrameskip-v4"])
    assert all(event["options"][-5:-4] == ["a b\"'$x\n*"] for event in starts)
    assert len(list((study.runs / "logs").iterdir())) == len(games)  # each has a log of its own
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["journal", "my scripts'", study.runs.name, "starlight"])
    assert study.run(*options).stdout.count(": is finished already; ") == 8
    subprocess.run(["bash"], input=study.run("--dry-run", *options).stdout, env=study.environment, text=True, check=True)
    assert len(study.events("start")) == len(games)


# ------------------------------------------------------------------------------------------- stopped, killed, continued


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "SIGHUP", "SIGHUP to the group", "SIGTERM to timeout", "SIGTERM twice"])
def test_stopped_and_continued(study, how):
    options = (*ONE_GAME, "--seeds", "4", "--jobs", "2", "--", "--wait-at", "3", "--save-seconds", "0.8")
    terminal, end = pty.openpty()
    before = ("timeout", "1000") if how == "SIGTERM to timeout" else ()  # which sends it to its command, and to the group
    process = study.start(*options, terminal=end, before=before)
    study.wait_for("waiting", 2)
    number = signal.SIGINT if how == "Ctrl-C" else getattr(signal, how.split()[0])
    if how == "Ctrl-C":
        os.write(terminal, b"\x03")  # the terminal sends SIGINT to the group of processes in its foreground
    else:
        (os.killpg if how.endswith("to the group") else os.kill)(process.pid, number)
    if how == "SIGTERM twice":
        time.sleep(0.2)
        process.terminate()
    output, _ = process.communicate(timeout=100)
    os.close(terminal), os.close(end)
    assert process.returncode == 128 + number
    pids = [event["pid"] for event in study.events("start")]
    assert len(pids) == 2 and not any(map(is_alive, pids))
    assert len(study.events("signal")) == 2  # one each; a second one would have kept them from saving
    assert [event["step"] for event in study.events("saved")] == [3] * 4  # each before it waited, and because of the signal
    assert "stopped; the same command goes on from here" in output and "FAILED" not in output and "PLOT" not in output
    assert study.finished() == []

    study.go()
    assert study.run(*options).returncode == 0
    resumed = {event["seed"]: event["step"] for event in study.events("start")[2:]}
    assert resumed == {1: 3, 2: 3, 3: 0, 4: 0}
    assert study.finished() == [(PONG, "dqn_atari", 1.0, seed) for seed in (1, 2, 3, 4)]
    assert len(list(study.runs.glob("*/args.json"))) == 4


def test_runs_save_when_the_terminal_is_closed(study):
    terminal, end = pty.openpty()
    process = study.start(*ONE_GAME, "--seeds", "1", "--", "--wait-at", "3", "--save-seconds", "0.5", terminal=end)
    study.wait_for("waiting")
    os.close(end)
    os.close(terminal)
    process.stdout.close()  # nobody reads what it says
    process.wait(100)
    wait_until(lambda: not any(is_alive(event["pid"]) for event in study.events("start")))
    assert len(study.events("signal")) == 1 and len(study.events("saved")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_twice_ends_at_once(study, number):
    process = study.start(*ONE_GAME, "--seeds", "1", "--", "--wait-at", "3", "--save-seconds", "1000")
    pid = study.wait_for("waiting")[0]["pid"]
    process.send_signal(number)
    study.wait_for("signal")
    time.sleep(2.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + number and "[1/1] Pong dqn, replay ratio 1, seed 1: stopped" in output
    assert not is_alive(pid) and study.finished() == []


def test_a_killed_run_is_a_failure_and_is_continued(study):
    options = (*ONE_GAME, "--seeds", "2", "--", "--wait-at", "3")
    process = study.start(*options)
    os.kill(study.wait_for("waiting")[0]["pid"], signal.SIGKILL)
    study.go()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "1 of 2 runs FAILED:" in output and "seed 1 (exit code 137)" in output
    assert "Killed" not in output and ": line " not in output  # no line of benchmark.sh
    assert study.run(*options).returncode == 0
    assert [(event["seed"], event["step"]) for event in study.events("start")] == [(1, 0), (2, 0), (1, 3)]
    assert len(study.finished()) == 2 == len(list(study.runs.glob("*/args.json")))


def test_a_run_outlives_a_killed_benchmark_and_two_others_share_the_rest(study):
    options = (*SMALL, "--", "--wait-at", "3")
    first = study.start(*options)
    pid = study.wait_for("waiting")[0]["pid"]
    first.kill()
    first.wait()
    assert is_alive(pid)
    others = [study.start(*options), study.start(*options)]
    study.wait_for("waiting", 3)
    study.go()
    for process in others:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0 and "ratio 1, seed 1: another process is at it, left to that" in output
    wait_until(lambda: not is_alive(pid))
    assert study.run(*options).stdout.count(": is finished already; ") == 8
    assert sorted(names(study.events("start"))) == sorted(SMALL_RUNS) == study.finished()


def test_the_file_may_change_while_it_runs(study):
    """As an editor does it that writes into the same file."""
    copy = shutil.copy(BENCHMARK, study.path / "benchmark.sh")
    command = ["bash", copy, *study.command(*ONE_GAME, "--seeds", "2", "--", "--wait-at", "3")[2:]]
    process = subprocess.Popen(command, env=study.environment, cwd=study.path, text=True, stdout=subprocess.PIPE)
    study.wait_for("waiting")
    pathlib.Path(copy).write_text("exit 55\n" * 10_000)
    study.go()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and len(study.finished()) == 2 and "PLOT" in output
