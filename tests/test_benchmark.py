"""benchmark.sh against quick stand-ins of the training scripts, and against a real SLURM where there is one."""

import ast
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "benchmark.sh"

# A training script that does nothing, and keeps the scripts' promises: the run folder, --resume auto, a checkpoint when a
# signal comes, the end at once when a second one comes. It writes what happens to the file $JOURNAL.
FAKE_SCRIPT = """
import csv, dataclasses, glob, json, os, signal, sys, time
from dataclasses import dataclass


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    seed: int = 1
    runs_dir: str = "runs"
    resume: str = ""
    env_id: str = "AlienNoFrameskip-v4"
    total_timesteps: int = 10
    num_envs: int = 1
    replay_ratio: float = 1.0
    learning_starts: int = 2
    end_e: float = 0.01
    bf16: bool = False
RESET_AND_ENSEMBLE
    wait_at: int = -1  # the step at which it waits for a signal, or for the file $JOURNAL.go
    save_seconds: float = 0.0
    failing_seed: int = -1
    forgetful_seed: int = -1
    note: str = ""
    games_played: int = 1


args, options = Args(), sys.argv[1:]
while options:
    name = options.pop(0).removeprefix("--").replace("-", "_")
    if name.removeprefix("no_") == "bf16":
        args.bf16 = name == "bf16"
        continue
    if not hasattr(args, name):
        sys.exit(f"error: unknown option {name}")
    setattr(args, name, type(getattr(args, name))(options.pop(0)))


def journal(event, **more):
    line = {"event": event, "pid": os.getpid(), "env_id": args.env_id, "script": Args.exp_name, "seed": args.seed,
            "replay_ratio": args.replay_ratio, "threads": os.environ.get("OMP_NUM_THREADS"), "options": sys.argv[1:]} | more
    with open(os.environ["JOURNAL"], "a") as file:
        file.write(json.dumps(line) + "\\n")


received = []


def handle(number, frame):
    received.append(number)
    journal("signal")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
if args.seed == args.failing_seed:
    journal("failing")
    print("the emulator caught fire", file=sys.stderr)
    sys.exit(7)

saved_args = {name: value for name, value in vars(args).items() if name != "resume"}
folder, step = None, 0
for path in glob.glob(os.path.join(glob.escape(args.runs_dir), "*")) if args.resume == "auto" else []:
    try:
        other = json.load(open(path + "/args.json"))["args"]
    except (OSError, ValueError):
        continue
    if other == saved_args and not os.path.exists(path + "/model.pt") and os.path.exists(path + "/checkpoint.pt"):
        folder, step = path, int(open(path + "/checkpoint.pt").read())
if folder is None:
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}-{os.getpid()}".replace("/", "-")
    folder = os.path.join(args.runs_dir, name)
    os.makedirs(folder)
    json.dump({"args": saved_args}, open(folder + "/args.json", "w"))
journal("start", step=step, folder=folder)


def save():
    open(folder + "/checkpoint.new", "w").write(str(step))
    os.replace(folder + "/checkpoint.new", folder + "/checkpoint.pt")
    journal("saved", step=step)


while step < args.total_timesteps:
    step += 1
    if step == args.wait_at:
        save()
        journal("waiting")
        while not received and not os.path.exists(os.environ["JOURNAL"] + ".go"):
            time.sleep(0.02)
    if received:
        time.sleep(args.save_seconds)
        save()
        sys.exit(128 + received[0])
with open(folder + "/episodes.csv", "w") as file:
    file.write("global_step,episodic_return,episodic_length,wall_seconds\\n")
    file.write(f"{args.total_timesteps},1.0,9,{100 * args.total_timesteps}\\n" * args.games_played)
with open(folder + "/evaluations.csv", "w") as file:
    file.write("global_step,phase,episode,episodic_return\\n")
    if args.seed != args.forgetful_seed:
        file.write(f"{step},final,0,{args.seed}.0\\n")
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
        reset = "    reset_interval: int = 80_000\n    reset_depth: str = 'last1'\n"
        for name, more in (("dqn_atari", ""), ("sr_dqn_atari", reset), ("rde_dqn_atari", reset + "    num_agents: int = 2\n")):
            (self.scripts / f"{name}.py").write_text(FAKE_SCRIPT.replace("RESET_AND_ENSEMBLE\n", more))
        (self.scripts / "rde_sac_dmc.py").write_text((self.scripts / "rde_dqn_atari.py").read_text())
        (self.scripts / "plot_benchmark.py").write_text("import sys\nprint('PLOT', *sys.argv[1:])\n")
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM") and name != "OMP_NUM_THREADS"
        }
        self.environment |= {"PYTHON": sys.executable, "SCRIPTS_DIR": str(self.scripts), "JOURNAL": str(self.journal)}

    def command(self, *options: str) -> list[str]:
        runs_dir = [] if "--runs-dir" in options else ["--runs-dir", str(self.runs)]
        return ["bash", str(BENCHMARK), *runs_dir, *options]

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(self.command(*options), env=self.environment | environment, cwd=self.path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(self.command(*options), env=self.environment | environment, cwd=self.path, text=True,
                              capture_output=True, timeout=300)  # fmt: skip

    def events(self, *kinds: str) -> list[dict]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in map(json.loads, lines) if not kinds or event["event"] in kinds]

    def wait_for(self, kind: str, count: int = 1) -> list[dict]:
        deadline = time.time() + 100
        while len(self.events(kind)) < count:
            assert time.time() < deadline, f"{kind} did not come {count} times: {self.events()}"
            time.sleep(0.02)
        return self.events(kind)

    def go(self) -> None:
        """Lets the waiting runs go on, and those that come."""
        pathlib.Path(f"{self.journal}.go").touch()

    def finished(self) -> list[tuple]:
        """(game, script, replay ratio, seed) of every finished run folder."""
        runs = []
        for model in self.runs.glob("*/model.pt"):
            args = json.loads((model.parent / "args.json").read_text())["args"]
            runs.append((args["env_id"], args["exp_name"], args["replay_ratio"], args["seed"]))
        return sorted(runs)


def names(events: list[dict]) -> list[tuple]:
    return [(event["env_id"], event["script"], event["replay_ratio"], event["seed"]) for event in events]


SMALL = ("--games", "Pong,Alien", "--methods", "rde_dqn", "--replay-ratios", "1,2", "--seeds", "2")
PONG, ALIEN = "PongNoFrameskip-v4", "AlienNoFrameskip-v4"
SMALL_RUNS = [(game, "rde_dqn_atari", ratio, seed) for ratio in (1.0, 2.0) for seed in (1, 2) for game in (PONG, ALIEN)]
ONE_GAME = ("--games", "Pong", "--methods", "dqn", "--replay-ratios", "1")


# ------------------------------------------------------------------------------------------------- the list of commands


def dry_run(study: Study, *options: str) -> list[list[str]]:
    result = study.run("--dry-run", *options)
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line, comments=False) for line in result.stdout.splitlines()]


def test_default_study(study):
    commands = dry_run(study)
    assert study.run("--count").stdout == "60\n" and len(commands) == 60 == len(set(map(tuple, commands)))
    tail = f"--runs-dir {study.runs} --resume auto"
    expected = [
        f"dqn_atari.py --env-id FreewayNoFrameskip-v4 --seed 1 --replay-ratio 1 {tail}",
        f"sr_dqn_atari.py --env-id FreewayNoFrameskip-v4 --seed 1 --replay-ratio 1 --reset-interval 40000 {tail}",
        f"rde_dqn_atari.py --env-id FreewayNoFrameskip-v4 --seed 1 --replay-ratio 1 --reset-interval 40000 {tail}",
        f"dqn_atari.py --env-id MsPacmanNoFrameskip-v4 --seed 1 --replay-ratio 1 {tail}",
    ]
    for command, line in zip(commands, expected):
        assert command == [sys.executable, *f"{study.scripts}/{line}".split()]
    assert sorted({(c[c.index("--replay-ratio") + 1], int(c[c.index("--seed") + 1])) for c in commands}) == [
        (ratio, seed) for ratio in ("1", "4") for seed in range(1, 6)
    ]


def test_official_setting(study):
    by_method = {
        pathlib.Path(command[1]).stem + command[3]: command[4:]
        for command in dry_run(study, "--setting", "official", "--seeds", "7-7")
    }
    shared = "--num-envs 4 --learning-starts 2000 --end-e 0.1".split()
    for script, game, reset in (("dqn", "MsPacman", None), ("sr_dqn", "MsPacman", "20000"), ("rde_dqn", "Freeway", "10000")):
        options = by_method[f"{script}_atari{game}NoFrameskip-v4"]
        assert options == [*"--seed 7 --replay-ratio 1".split(), *shared, *(["--reset-interval", reset] if reset else []),
                           "--runs-dir", str(study.runs), "--resume", "auto"]  # fmt: skip
    assert study.run("--setting", "official", "--count").stdout == "60\n"  # replay ratios 0.25 and 1


def test_reset_options_go_to_the_methods_that_reset(study):
    for command in dry_run(study, "--reset-interval", "123", "--reset-depth", "last2", "--games", "Freeway"):
        resets = not command[1].endswith("/dqn_atari.py")
        assert (" --reset-interval 123 --reset-depth last2" in " ".join(command)) == resets


def test_sac_and_own_scripts(study):
    commands = dry_run(
        study, "--methods", "sac,sr_sac,rde_sac", "--games", "hopper-hop", "--seeds", "1", "--replay-ratios", "1"
    )
    assert [" ".join(command[2:8] + command[8:-4]) for command in commands] == [
        "--env-id hopper-hop --seed 1 --replay-ratio 1 --num-agents 1 --reset-interval 0",
        "--env-id hopper-hop --seed 1 --replay-ratio 1 --num-agents 1",
        "--env-id hopper-hop --seed 1 --replay-ratio 1",
    ]
    shutil.copy(study.scripts / "rde_dqn_atari.py", study.scripts / "my_idea.py")
    command = dry_run(study, "--methods", "my_idea.py", "--games", "Freeway", "--seeds", "1", "--replay-ratios", "1")[0]
    assert command[1] == f"{study.scripts}/my_idea.py" and " --reset-interval 40000 " in " ".join(command)
    command = dry_run(study, "--methods", "my_idea.py", "--games", "walker-run", "--seeds", "1", "--replay-ratios", "1")[0]
    assert command[2:4] == ["--env-id", "walker-run"]


def test_seeds_and_lists(study):
    def seeds(*options):
        return [int(c[c.index("--seed") + 1]) for c in dry_run(study, *ONE_GAME, *options)]

    assert seeds("--seeds", "3") == [1, 2, 3]
    assert seeds("--seeds", "9,2-4") == [9, 2, 3, 4]
    assert seeds("--seeds=08 10-11") == [8, 10, 11]
    assert [c[3] for c in dry_run(study, *ONE_GAME, "--games", "Alien, Pong  ALE/Pong-v5", "--seeds", "1")] == [
        ALIEN,
        PONG,
        "ALE/Pong-v5",
    ]


def script_constant(path: pathlib.Path, name: str):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def test_atari100k_are_the_26_games(study):
    games = {command[3] for command in dry_run(study, "--games", "atari100k", "--seeds", "1")}
    assert games == {f"{game}NoFrameskip-v4" for game in script_constant(ROOT / "rde_dqn_atari.py", "RANDOM_AND_HUMAN_SCORES")}
    assert study.run("--games", "atari100k", "--count").stdout == f"{26 * 3 * 2 * 5}\n"


@pytest.mark.parametrize("options", [(), ("--setting", "official"), ("--smoke",), ("--reset-depth", "last2")])
def test_the_real_scripts_have_the_options(study, options):
    study.environment["SCRIPTS_DIR"] = str(ROOT)
    for command in dry_run(study, *options, "--seeds", "1"):
        tree = ast.parse(pathlib.Path(command[1]).read_text())
        args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
        fields = {node.target.id for node in args.body if isinstance(node, ast.AnnAssign)}
        assert {option[2:].replace("-", "_") for option in command if option.startswith("--")} <= fields


BAD_OPTIONS = [
    (("--frobnicate", "3"), "--frobnicate is not an option"), (("--games",), "--games needs a value"),
    (("--games", ""), "--games needs a value"), (("--games", ","), "empty"), (("Alien",), "Alien is not an option"),
    (("--methods", "ppo"), "ppo"), (("--methods", "missing.py"), "missing.py"), (("--methods", "dqn,sac"), "mixes"),
    (("--replay-ratios", "0"), "0 is not a positive number"), (("--replay-ratios", "fast"), "fast"),
    (("--replay-ratios", "-1"), "-1"), (("--seeds", "5-1"), "5-1 holds no seed"), (("--seeds", "0"), "no seed"),
    (("--seeds", "x"), "x"), (("--jobs", "0"), "--jobs is 0"), (("--jobs", "two"), "two"),
    (("--setting", "unofficial"), "unofficial"), (("--total-timesteps", "1e5"), "1e5"),
    (("--games", "Pong,Pong"), "twice: Pong dqn"), (("--replay-ratios", "1,1.0"), "twice"),
    (("--games", "Pong,PongNoFrameskip-v4"), "twice"), (("--games", "Pong,walker-run", "--methods", "sr_dqn"), "sr_dqn plays Atari"),
    (("--methods", "sac", "--games", "Freeway"), "Freeway is no task of SAC"),
    (("--methods", "sac", "--games", "atari100k"), "atari100k is for Atari"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD_OPTIONS, ids=[" ".join(options) for options, _ in BAD_OPTIONS])
def test_bad_options(study, options, message):
    result = study.run(*options)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and message in result.stderr
    assert not study.runs.exists() and not study.events()


def test_missing_program(study):
    result = study.run(PYTHON="/no/such/python")
    assert result.returncode == 2 and result.stderr.startswith("error: the program /no/such/python") and not study.runs.exists()


# ------------------------------------------------------------------------------------------------------------- running


def test_runs_in_order_then_skips_and_plots(study):
    result = study.run(*SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert names(study.events("start")) == SMALL_RUNS and study.finished() == sorted(SMALL_RUNS)
    assert all(event["threads"] is None for event in study.events("start"))
    assert result.stdout.splitlines()[-1] == f"PLOT --runs-dir {study.runs}"
    assert "to do here: 8 of 8" in result.stdout

    again = study.run(*SMALL, "--no-plot")
    assert again.returncode == 0 and "to do here: 0 of 8" in again.stdout and "PLOT" not in again.stdout
    assert len(study.events("start")) == 8

    more_seeds = study.run(*SMALL, "--seeds", "3")
    assert more_seeds.returncode == 0 and names(study.events("start"))[8:] == [
        (game, "rde_dqn_atari", ratio, 3) for ratio in (1.0, 2.0) for game in (PONG, ALIEN)
    ]


def test_only_a_run_with_the_same_arguments_and_a_final_evaluation_counts(study):
    assert study.run(*ONE_GAME, "--seeds", "2").returncode == 0
    first = next(path.parent for path in study.runs.glob("*/args.json") if json.loads(path.read_text())["args"]["seed"] == 1)

    for options in (["--", "--end-e", "0.2"], ["--", "--bf16"], ["--total-timesteps", "12"]):  # other arguments, other runs
        before = len(study.events("start"))
        assert study.run(*ONE_GAME, "--seeds", "2", *options).returncode == 0 and len(study.events("start")) == before + 2
        assert study.run(*ONE_GAME, "--seeds", "2", *options).returncode == 0 and len(study.events("start")) == before + 2
    for options in (
        ["--", "--end-e", "0.010"],
        ["--", "--no-bf16"],
        ["--total-timesteps", "10"],
        ["--", "--exp-name", "dqn_atari"],
    ):
        before = len(study.events("start"))  # the defaults in other words
        assert study.run(*ONE_GAME, "--seeds", "2", *options).returncode == 0 and len(study.events("start")) == before

    (first / "model.pt").unlink()
    assert (
        "to do here: 1 of 2, 1 at a time; interrupted before, to be continued: 1" in study.run(*ONE_GAME, "--seeds", "2").stdout
    )
    (study.runs / "broken").mkdir()
    (study.runs / "broken" / "args.json").write_text('{"args": ')
    assert "to do here: 0 of 2" in study.run(*ONE_GAME, "--seeds", "2").stdout


def test_a_failure_is_reported_and_stops_nothing(study):
    options = (*ONE_GAME, "--seeds", "4", "--", "--failing-seed", "2", "--forgetful-seed", "3")
    result = study.run(*options)
    assert result.returncode == 1 and [run[3] for run in names(study.events("end"))] == [1, 3, 4]
    title, *listed = result.stderr.splitlines()
    assert title == "2 of 4 runs FAILED:" and len(listed) == 2
    assert "seed 2 (exit code 7), log: " in listed[0] and "seed 3 (exit code 0, but no finished run), log: " in listed[1]
    log = pathlib.Path(listed[0].split("log: ")[1])
    command, message = log.read_text().splitlines()
    assert message == "the emulator caught fire" and "FAILED (exit code 7): the emulator caught fire" in result.stdout
    assert shlex.split(command)[0] == "$" and shlex.split(command)[2] == str(study.scripts / "dqn_atari.py")
    assert "PLOT" in result.stdout

    again = study.run(*options)
    assert again.returncode == 1 and [event["seed"] for event in study.events("start", "failing")] == [1, 2, 3, 4, 2, 3]


def test_a_log_that_cannot_be_written_fails_its_run_and_stops_nothing(study):
    options = ("--games", "Pong,Alien,Freeway", "--methods", "dqn", "--seeds", "1", "--replay-ratios", "1", "--jobs", "2")
    assert study.run(*options).returncode == 0
    log = next((study.runs / "logs").glob("Alien*"))
    shutil.rmtree(study.runs / next(path.name for path in study.runs.glob("Alien*")))
    shutil.rmtree(study.runs / next(path.name for path in study.runs.glob("Freeway*")))
    log.unlink()
    log.mkdir()
    result = study.run(*options)
    assert result.returncode == 1 and "PLOT" in result.stdout
    assert "Alien dqn, replay ratio 1, seed 1: FAILED (exit code 1): its log cannot be read" in result.stdout
    assert "1 of 2 runs FAILED:" in result.stderr and any(study.runs.glob("Freeway*/model.pt"))


def test_a_failing_plot_fails(study):
    (study.scripts / "plot_benchmark.py").write_text("raise SystemExit(3)")
    assert study.run(*ONE_GAME, "--seeds", "1").returncode == 1


def test_dry_run_can_be_piped_and_shows_what_is_finished(study):
    def pipe() -> None:
        commands = study.run(*SMALL, "--dry-run").stdout
        subprocess.run(["bash"], input=commands, env=study.environment, text=True, check=True)

    pipe()
    assert names(study.events("start")) == SMALL_RUNS
    pipe()
    assert names(study.events("start")) == SMALL_RUNS  # the finished ones are comments now
    lines = study.run(*SMALL, "--dry-run").stdout.splitlines()
    assert len(lines) == 8 and all(line.startswith("# finished: ") for line in lines)
    assert study.run(*SMALL, "--count").stdout == "8\n"


def most_at_once(events: list[dict]) -> int:
    at_work = most = 0
    for event in events:
        at_work += {"start": 1, "end": -1}[event["event"]]
        most = max(most, at_work)
    return most


def test_parallel_jobs(study):
    process = study.start(*SMALL, "--jobs", "3", "--", "--wait-at", "3")
    study.wait_for("waiting", 3)
    time.sleep(1)  # a fourth would have begun by now
    assert len(study.events("start")) == 3
    study.go()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0 and study.finished() == sorted(SMALL_RUNS), output
    assert sorted(names(study.events("start"))) == sorted(SMALL_RUNS)
    assert most_at_once(study.events("start", "end")) == 3
    assert {event["threads"] for event in study.events("start")} == {"1"}
    assert study.run(*ONE_GAME, "--seeds", "9-9", "--jobs", "2", OMP_NUM_THREADS="5").returncode == 0
    assert study.events("start")[-1]["threads"] == "5"


def test_odd_names(tmp_path):
    study = Study(tmp_path, "my scripts'")
    study.runs = tmp_path / 'runs [of] $HOME; "a" *'
    (tmp_path / "starlight").mkdir()  # a * in the list must not become this name
    games = ["$(touch-hacked)-v0", "it's-v0", '"q"-v1', "*", "a;b&c|d-v0", "ALE/Pong-v5", "Übung-v0", "back\\slash-v0"]
    options = (
        "--games",
        " ".join(games),
        "--methods",
        "dqn",
        "--replay-ratios",
        "1",
        "--seeds",
        "1",
        "--",
        "--note",
        "a b\"'$x\n*",
    )
    result = study.run("--jobs", "2", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    expected = {game if "-" in game or "/" in game else f"{game}NoFrameskip-v4" for game in games}
    starts = study.events("start")
    assert {event["env_id"] for event in starts} == expected and len(starts) == len(games)
    assert all(event["options"][-5:-4] == ["a b\"'$x\n*"] for event in starts)
    assert len(list((study.runs / "logs").iterdir())) == len(games)  # each has a log of its own
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["journal", "my scripts'", study.runs.name, "starlight"])
    assert "to do here: 0 of 8" in study.run(*options).stdout
    subprocess.run(["bash"], input=study.run("--dry-run", *options).stdout, env=study.environment, text=True, check=True)
    assert len(study.events("start")) == len(games)


# ------------------------------------------------------------------------------------------- stopped, killed, continued


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pids: list[int]) -> None:
    deadline = time.time() + 100
    while any(map(is_alive, pids)):
        assert time.time() < deadline, "a run is still alive"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_and_continued(study, number):
    options = (*ONE_GAME, "--seeds", "4", "--jobs", "2", "--", "--wait-at", "3", "--save-seconds", "0.5")
    process = study.start(*options)
    study.wait_for("waiting", 2)
    os.killpg(process.pid, number)  # as a terminal does it: to the group of processes in the foreground
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    pids = [event["pid"] for event in study.events("start")]
    assert len(pids) == 2 and not any(map(is_alive, pids))
    assert len(study.events("signal")) == 2  # one each; a second one would have kept them from saving
    assert [event["step"] for event in study.events("saved")] == [
        3,
        3,
        3,
        3,
    ]  # each before it waited, and then because of the signal
    assert "stopped; the same command goes on from here" in output and "FAILED" not in output and "PLOT" not in output
    assert study.finished() == []

    study.go()
    assert study.run(*options).returncode == 0
    resumed = {event["seed"]: event["step"] for event in study.events("start")[2:]}
    assert resumed == {1: 3, 2: 3, 3: 0, 4: 0}
    assert study.finished() == [(PONG, "dqn_atari", 1.0, seed) for seed in (1, 2, 3, 4)]
    assert len(list(study.runs.glob("*/args.json"))) == 4


def test_stopped_twice_ends_at_once(study):
    process = study.start(*ONE_GAME, "--seeds", "1", "--", "--wait-at", "3", "--save-seconds", "1000")
    pid = study.wait_for("waiting")[0]["pid"]
    os.killpg(process.pid, signal.SIGINT)
    study.wait_for("signal")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "[1/1] Pong dqn, replay ratio 1, seed 1: stopped" in output
    assert not is_alive(pid) and study.finished() == []


def test_a_killed_run_is_a_failure_and_is_continued(study):
    options = (*ONE_GAME, "--seeds", "2", "--", "--wait-at", "3")
    process = study.start(*options)
    os.kill(study.wait_for("waiting")[0]["pid"], signal.SIGKILL)
    study.go()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "1 of 2 runs FAILED:" in output and "seed 1 (exit code 137)" in output
    assert study.run(*options).returncode == 0
    assert [(event["seed"], event["step"]) for event in study.events("start")] == [(1, 0), (2, 0), (1, 3)]
    assert len(study.finished()) == 2 == len(list(study.runs.glob("*/args.json")))


def test_a_run_outlives_a_killed_benchmark_and_is_not_doubled(study):
    options = ("--games", "Pong", "--methods", "dqn", "--seeds", "1", "--replay-ratios", "1,2", "--", "--wait-at", "3")
    first = study.start(*options)
    pid = study.wait_for("waiting")[0]["pid"]
    first.kill()
    first.wait()
    assert is_alive(pid)
    second = study.start(*options)
    study.wait_for("waiting", 2)
    study.go()
    output, _ = second.communicate(timeout=100)
    assert second.returncode == 0 and "1 run(s) are left to another process" in output
    wait_until_dead([pid])
    assert "to do here: 0 of 2" in study.run(*options).stdout
    assert [event["replay_ratio"] for event in study.events("start")] == [1, 2] and len(study.finished()) == 2


def test_two_benchmarks_share_the_work(study):
    options = (*SMALL, "--", "--wait-at", "3")
    processes = [study.start(*options)]
    study.wait_for("waiting", 1)
    processes.append(study.start(*options))
    study.wait_for("waiting", 2)
    study.go()
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(names(study.events("start"))) == sorted(SMALL_RUNS) == study.finished()


# ------------------------------------------------------------------------------------------------------- estimated time


def test_estimate(study):
    """By hand: DQN, 9,998 updates of 0.02 s + 10,000 steps of 0.003 s + 1 evaluation of 10 games + 5 s."""
    options = (*ONE_GAME, "--seeds", "2", "--total-timesteps", "10000", "--", "--end-e", "0.5")
    one_run = 9_998 * 0.020 + 30 + 10 + 5
    assert (
        f"time: about {int(2 * one_run / 60) + 1} min. Known from finished runs like them: 0 runs" in study.run(*options).stdout
    )
    ensemble = study.run("--games", "Pong", "--methods", "rde_dqn", "--replay-ratios", "4", "--seeds", "2", "--jobs", "2",
                         "--total-timesteps", "50000")  # fmt: skip
    one_run = 49_998 * 4 * 2 * 0.033 + 150 + 10 * (1 + 2 * 49_998 * 4 * 2 / 80_000) + 5  # two at a time: the time of one
    assert f"time: about {round(one_run / 3600)} hours." in ensemble.stdout

    # The runs of this kind took 100 s a step, so the stand-in claims.
    assert "time: about 28 hours. Known from finished runs like them: 1 runs" in study.run(
        *ONE_GAME, "--seeds", "3-3", "--total-timesteps", "1000", "--", "--end-e", "0.5").stdout  # fmt: skip


def test_estimate_with_a_finished_run_that_was_too_short_for_a_game(study):
    options = (*ONE_GAME, "--seeds", "2", "--", "--games-played", "0")
    result = study.run(*options)
    assert result.returncode == 0 and result.stderr == "" and len(study.finished()) == 2
    assert "to do here: 0 of 2" in study.run(*options).stdout


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


def test_estimate_says_what_it_does_not_know(study):
    result = study.run("--methods", "rde_sac", "--games", "hopper-hop", "--seeds", "1", "--replay-ratios", "1")
    times = [line for line in result.stdout.splitlines() if line.startswith("time:")]
    assert times == ["time: not known of 1 runs, and not counted: no run like them is finished yet"] and result.returncode == 0
    shutil.copy(study.scripts / "rde_dqn_atari.py", study.scripts / "my_idea.py")
    result = study.run("--methods", "dqn,my_idea.py", "--games", "Pong", "--seeds", "2", "--replay-ratios", "1")
    times = [line for line in result.stdout.splitlines() if line.startswith("time:")]
    assert times[0].startswith("time: about 1 min. ") and times[1].startswith("time: not known of 2 runs")


# ---------------------------------------------------------------------------------------------------------------- SLURM


def test_array_task_is_the_line_of_the_dry_run(study):
    commands = dry_run(study, *SMALL)
    for index in (0, 5, 7):
        result = study.run(*SMALL, SLURM_ARRAY_TASK_ID=str(index), SLURM_JOB_ID="1")
        assert result.returncode == 0 and "PLOT" not in result.stdout
        assert study.events("start")[-1]["options"] == commands[index][2:]
    assert len(study.events("start")) == 3
    assert study.run(*SMALL, SLURM_ARRAY_TASK_ID="5", SLURM_JOB_ID="1").returncode == 0 and len(study.events("start")) == 3
    beyond = study.run(*SMALL, SLURM_ARRAY_TASK_ID="8", SLURM_JOB_ID="1")
    assert beyond.returncode == 2 and "the runs 0 to 7" in beyond.stderr


def test_copy_in_a_spool_folder_finds_the_checkout(study, tmp_path):
    (tmp_path / "spool").mkdir()
    copy = shutil.copy(BENCHMARK, tmp_path / "spool" / "slurm_script")
    del study.environment["SCRIPTS_DIR"]
    environment = study.environment | {"SLURM_SUBMIT_DIR": str(study.scripts)}
    command = ["bash", copy, "--dry-run", *ONE_GAME]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and shlex.split(result.stdout.splitlines()[0])[1] == f"{study.scripts}/dqn_atari.py"


WAITING = ("--games", "Pong", "--methods", "dqn", "--replay-ratios", "1", "--seeds", "1", "--", "--wait-at", "3")


def test_near_the_time_limit_the_task_requeues_itself(study, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\necho \"$@\" > '{tmp_path}/requeued'\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    path = f"{tmp_path}/bin:{study.environment['PATH']}"
    process = study.start(*WAITING, SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="77", PATH=path)
    study.wait_for("waiting")
    os.kill(process.pid, signal.SIGUSR1)
    process.communicate(timeout=100)
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert len(study.events("signal")) == 1 and len(study.events("saved")) == 2


@pytest.mark.parametrize("to_every_process", [True, False])
def test_sigterm_of_slurm_reaches_the_run_once(study, to_every_process):
    process = study.start(*WAITING, "--save-seconds", "1", SLURM_ARRAY_TASK_ID="0", SLURM_JOB_ID="77")
    pid = study.wait_for("waiting")[0]["pid"]
    os.kill(process.pid, signal.SIGTERM)
    if to_every_process:
        os.kill(pid, signal.SIGTERM)
    process.communicate(timeout=100)
    assert process.returncode == 143 and len(study.events("signal")) == 1 and len(study.events("saved")) == 2


SLURM_CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={control_port}
SlurmdPort={node_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=500 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """SLURM_CONF of a cluster of one node, this machine: munged, slurmctld and slurmd, ended after the test."""
    missing = [
        program
        for program in ("sbatch", "slurmctld", "slurmd", "munged", "runuser")
        if shutil.which(program, path=SBIN) is None
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"the array on a real SLURM is NOT tested: it needs root and apt-get install slurm-wlm munge (not there: {missing})"
        )
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    host, (control_port, node_port) = socket.gethostname().split(".")[0], free_ports(2)
    conf = folder / "slurm.conf"
    conf.write_text(
        SLURM_CONF.format(host=host, folder=folder, control_port=control_port, node_port=node_port, cpus=os.cpu_count())
    )
    environment, daemons = {"SLURM_CONF": str(conf), "PATH": SBIN}, []

    def start(*command: str) -> None:
        log = open(folder / "log" / pathlib.Path(command[-1 if "--" in command else 0]).name, "w")
        daemons.append(subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log))

    def node_state() -> str:
        return subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=os.environ | environment, capture_output=True, text=True
        ).stdout.strip()

    try:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:  # nobody answers
            os.makedirs("/run/munge", exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            start("runuser", "-u", "munge", "--", "munged", "--foreground")
        start("slurmctld", "-D", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf))
        deadline = time.time() + 60
        while node_state() != "idle":
            assert time.time() < deadline, "\n".join(path.read_text()[-2000:] for path in (folder / "log").iterdir())
            time.sleep(0.2)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def test_array_on_a_real_slurm(slurm, study):
    """Each run of an array happens once; a preempted one is queued again and goes on from its checkpoint."""
    environment = study.environment | slurm
    del environment["SCRIPTS_DIR"]  # found through SLURM_SUBMIT_DIR
    shutil.copy(BENCHMARK, study.scripts)

    def call(*command: str) -> str:
        result = subprocess.run(command, env=environment, cwd=study.scripts, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def wait_until_empty() -> None:
        deadline = time.time() + 100
        while queue := call("squeue", "-h"):
            assert time.time() < deadline, queue
            time.sleep(0.3)

    options = ["--games", "Pong", "--methods", "dqn,rde_dqn", "--replay-ratios", "1", "--seeds", "2"]
    options += ["--runs-dir", str(study.runs), "--", "--wait-at", "3", "--save-seconds", "0.5"]
    count = int(call("bash", "benchmark.sh", "--count", *options))
    assert count == 4
    submit = ["sbatch", "--parsable", f"--array=0-{count - 1}", "--cpus-per-task=1", "benchmark.sh", *options]
    job = call(*submit)
    first = study.wait_for("waiting")[0]
    index = [(1, "dqn_atari"), (1, "rde_dqn_atari"), (2, "dqn_atari"), (2, "rde_dqn_atari")].index(
        (first["seed"], first["script"])
    )
    tasks = dict(line.split() for line in call("squeue", "-h", "-r", "-t", "R", "-o", "%K %A").splitlines())
    call("scontrol", "requeue", tasks[str(index)])  # what a preemption does
    study.wait_for("signal")
    study.go()
    deadline = time.time() + 60
    while f"{job}_{index}" not in call("squeue", "-h", "-r", "-t", "PD", "-o", "%i"):
        assert time.time() < deadline, call("squeue")
        time.sleep(0.3)
    call("scontrol", "update", f"jobid={job}_{index}", "StartTime=now")  # else SLURM waits two minutes with it
    wait_until_empty()

    runs = sorted((PONG, script, 1.0, seed) for seed in (1, 2) for script in ("dqn_atari", "rde_dqn_atari"))
    assert study.finished() == runs and len(study.events("end")) == 4 == len(list(study.runs.glob("*/args.json")))
    starts = [(event["seed"], event["script"], event["step"]) for event in study.events("start")]
    assert len(starts) == 5 and (first["seed"], first["script"], 3) in starts  # the preempted one went on from its checkpoint
    assert len(study.events("signal")) == 1

    call(*submit)
    wait_until_empty()
    assert len(study.events("start")) == 5  # all finished, nothing was run again
