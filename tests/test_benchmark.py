"""benchmark.sh against quick stand-ins of the training scripts."""

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

from conftest import ROOT, load_script

BENCHMARK = ROOT / "benchmark.sh"

# A training script that does nothing, and keeps the scripts' promises: a command is its run, and goes on from its checkpoint,
# or says that it is finished; 75 if another process is at it; a checkpoint at SIGTERM and SIGINT. It writes what happens to
# the file $JOURNAL. Of its own are --seconds, --save-seconds, --wait-at STEP (for a signal, or for the file $JOURNAL.go) and
# --failing-seed, which fails.
FAKE_SCRIPT = """
import fcntl, hashlib, json, os, signal, sys, time

args = {"exp_name": os.path.basename(__file__)[: -len(".py")], "env_id": "its-own-v0", "replay_ratio": "1"}
for name, value in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    args[name.removeprefix("--").replace("-", "_")] = value
received = []

def journal(event, **more):
    line = args | more | {"event": event, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}
    open(os.environ["JOURNAL"], "a").write(json.dumps(line | {"options": sys.argv[1:]}) + "\\n")

def end(message, code):
    print(message, file=sys.stderr if code else sys.stdout)
    sys.exit(code)

def save(step):
    open(folder + "/checkpoint.new", "w").write(str(step))
    os.replace(folder + "/checkpoint.new", folder + "/checkpoint.pt")
    journal("saved", step=step)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: (received.append(number), journal("signal", number=number)))
folder = f"{os.path.expanduser(args['runs_dir'])}/{hashlib.sha256(json.dumps(args).encode()).hexdigest()[:8]}"
os.makedirs(folder, exist_ok=True)
lock = open(folder + "/lock", "w")
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    end(f"error: another process is at work in {folder}", 75)
if os.path.exists(folder + "/model.pt"):
    journal("skipped")
    end(f"the run in {folder} is finished", 0)
print("it begins")
if args["seed"] == args.get("failing_seed"):
    journal("failing")
    end("the emulator caught fire", 7)
step = int(open(folder + "/checkpoint.pt").read()) if os.path.exists(folder + "/checkpoint.pt") else 0
journal("start", step=step)
time.sleep(float(args.get("seconds", 0)))
while step < 10:
    step += 1
    if step == int(args.get("wait_at", -1)):
        save(step)
        journal("waiting")
        while not received and not os.path.exists(os.environ["JOURNAL"] + ".go"):
            time.sleep(0.02)
    if received:
        time.sleep(float(args.get("save_seconds", 0)))
        save(step)
        end(f"stopped at step {step}", 128 + received[0])
json.dump(args, open(folder + "/args.json", "w"))
open(folder + "/model.pt", "w").close()
journal("end")
end(f"the run is in {folder}", 0)
"""


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path)


class Study:
    """A folder with stand-ins of the scripts and of plot_benchmark.py, and benchmark.sh beside them."""

    def __init__(self, path: pathlib.Path, scripts_name: str = "scripts"):
        self.path, self.scripts, self.runs, self.journal = path, path / scripts_name, path / "runs", path / "journal"
        self.scripts.mkdir()
        shutil.copy(BENCHMARK, self.scripts)
        for name in ("dqn_atari", "sr_dqn_atari", "rde_dqn_atari", "rde_dqn", "rde_drq_atari"):
            (self.scripts / f"{name}.py").write_text(FAKE_SCRIPT)
        (self.scripts / "plot_benchmark.py").write_text("import sys\nprint('PLOT', *sys.argv[1:])\n")
        self.environment = {name: os.environ[name] for name in os.environ if name[:5] not in ("SLURM", "OMP_N")}
        self.environment |= {"PYTHON": sys.executable, "JOURNAL": str(self.journal)}

    def command(self, *options: str) -> list[str]:
        return ["bash", str(self.scripts / "benchmark.sh"), "--runs-dir", str(self.runs), *options]

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
        return self.call(self.command(*options), **environment)

    def call(self, command: list[str], **environment: str) -> subprocess.CompletedProcess:
        settings = {"env": self.environment | environment, "cwd": self.path, "timeout": 300}
        return subprocess.run(command, text=True, capture_output=True, check=False, **settings)

    def end(self, process: subprocess.Popen) -> str:
        """Lets its waiting runs go on, and those that come; what it says until its end."""
        self.go()
        return process.communicate(timeout=100)[0]

    def go(self) -> None:
        pathlib.Path(f"{self.journal}.go").touch()

    def events(self, *kinds: str) -> list[dict]:
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        return [event for event in map(json.loads, lines) if not kinds or event["event"] in kinds]

    def wait_for(self, kind: str, count: int = 1) -> list[dict]:
        wait_until(lambda: len(self.events(kind)) >= count)
        return self.events(kind)

    def finished(self) -> list[tuple]:
        """(environment, name, replay ratio, seed) of every finished run folder."""
        return sorted(names([json.loads((path.parent / "args.json").read_text()) for path in self.runs.glob("*/model.pt")]))


def wait_until(condition, explanation=lambda: "it does not come") -> None:
    deadline = time.time() + 100
    while not condition():
        assert time.time() < deadline, explanation()
        time.sleep(0.02)


def names(events: list[dict]) -> list[tuple]:
    return [(event["env_id"], event["exp_name"], event["replay_ratio"], event["seed"]) for event in events]


SMALL = ("--games", "Pong,Alien", "--methods", "rde_dqn_atari", "--replay-ratios", "1,2", "--seeds", "2")
PONG, ALIEN = "PongNoFrameskip-v4", "AlienNoFrameskip-v4"
SMALL_RUNS = [(game, "rde_dqn_atari", ratio, seed) for seed in "12" for ratio in "12" for game in (PONG, ALIEN)]
ONE_GAME = ("--games", "Pong", "--methods", "dqn_atari")


# ------------------------------------------------------------------------------------------------- the list of commands


def commands(result: subprocess.CompletedProcess) -> list[list[str]]:
    """Those that --dry-run prints."""
    assert (result.returncode, result.stderr) == (0, "")
    return [shlex.split(line) for line in result.stdout.splitlines()]


SMOKE = "--total-timesteps 300 --learning-starts 100 --buffer-size 5000 --eval-interval 150 --eval-episodes 1"
LISTS = {  # by the options
    "": [f"{script}.py --seed {seed}" for seed in (1, 2, 3) for script in ("dqn_atari", "sr_dqn_atari", "rde_dqn_atari")],
    "--smoke --methods rde_dqn": [f"rde_dqn.py --replay-ratio 0.5 --seed {seed} {SMOKE}" for seed in (1, 2)],
    "--smoke --games Pong --seeds 1 -- --total-timesteps 400": [
        f"{name}_atari.py --env-id {PONG} --replay-ratio 0.5 --seed 1{own_name} {SMOKE} --total-timesteps 400{end}"
        for name, own_name, end in (
            ("dqn", "", ""),
            ("sr_dqn", " --exp-name sr_dqn_atari_reset-interval_80", " --reset-interval 80"),
            ("rde_dqn", " --exp-name rde_dqn_atari_reset-interval_80", " --reset-interval 80"))],
    "--methods rde_dqn --seeds=9,2-4": [f"rde_dqn.py --seed {seed}" for seed in (9, 2, 3, 4)],
    "--methods rde_dqn --seeds=08,10-11": [f"rde_dqn.py --seed {seed}" for seed in (8, 10, 11)],
    "--methods rde_dqn --seeds=5-5 --replay-ratios=0.25,4": [
        "rde_dqn.py --replay-ratio 0.25 --seed 5", "rde_dqn.py --replay-ratio 4 --seed 5"],
    "--methods dqn_atari --seeds 1 --games atari100k,Zaxxon": [
        f"dqn_atari.py --env-id {game}NoFrameskip-v4 --seed 1"
        for game in [*load_script("rde_dqn_atari").RANDOM_AND_HUMAN_SCORES, "Zaxxon"]],
    "--methods 'dqn_atari, rde_dqn --beta 1e-3 --num-agents 4,./my_idea_atari.py --exp-name half' --seeds 5-5 "
    "--games Pong,CartPole-v1,ALE/Pong-v5 -- --note x": [
        line.format(game=game, atari=PONG if game == "Pong" else game)
        for game in ("Pong", "CartPole-v1", "ALE/Pong-v5") for line in (
            "dqn_atari.py --env-id {atari} --seed 5 --note x",
            "rde_dqn.py --env-id {game} --seed 5 --exp-name rde_dqn_beta_1e-3_num-agents_4 --note x --beta 1e-3 --num-agents 4",
            # The last --exp-name is the one that holds.
            "my_idea_atari.py --env-id {atari} --seed 5 --exp-name my_idea_atari_exp-name_half --note x --exp-name half")],
}  # fmt: skip


@pytest.mark.parametrize("options", LISTS)
def test_list_of_commands(study, options):
    """Of scripts that lie beside benchmark.sh, or where one stands."""
    (study.path / "my_idea_atari.py").touch()
    found = commands(study.run("--dry-run", *shlex.split(options)))
    lines = [" ".join([pathlib.Path(command[1]).name, *command[2:]]) for command in found]
    assert [line.replace(f" --runs-dir {study.runs}", "") for line in lines] == LISTS[options]
    assert {command[0] for command in found} == {sys.executable}
    assert {os.path.dirname(command[1]) for command in found} <= {str(study.scripts), "."}
    assert study.run("--count", *shlex.split(options)).stdout == f"{len(found)}\n"


def test_it_is_short_and_help_names_every_option(study):
    lines, text = BENCHMARK.read_text().splitlines(), study.run("--help").stdout
    assert len(lines) <= 100 and max(map(len, lines)) <= 120
    options = set(re.findall(r"--[a-z][a-z-]+", BENCHMARK.read_text().split("case $1 in")[1].split("esac")[0])) - {"--help"}
    assert len(options) == 9
    for option in options:
        assert len(re.findall(rf"^  (?:--dry-run, )?{option}[ ,]", text, re.MULTILINE)) == 1, option


@pytest.mark.parametrize("options, num_runs, runs_dir", [
    ("", 9, "runs/benchmark"), ("--smoke", 6, "runs/smoke"),
    ("--methods rde_dqn,rde_sac_dmc --games x --replay-ratios 1", 6, "runs/benchmark"),
])  # fmt: skip
def test_the_real_scripts_have_the_options(study, options, num_runs, runs_dir):
    found = commands(study.call(["bash", str(BENCHMARK), "--dry-run", *options.split()]))
    assert [command[command.index("--runs-dir") + 1] for command in found] == [runs_dir] * num_runs
    for _, script, *words in found:
        fields = vars(load_script(pathlib.Path(script).stem).Args()).keys()
        assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= fields


BAD_OPTIONS = {  # by what is said
    " is not an option": ["--frobnicate 3", "Alien", "--setting official"], "--games needs a value": ["--games", "--games ''"],
    "the script ": ["--methods missing", "--methods missing.py", "--methods ,", "--methods dqn_atari,,rde_dqn"],
    "--seeds is ": ["--seeds x", "--seeds -1", "--seeds 1,", "--seeds 1-2-3", "--seeds '1 2'", "--seeds 20261130"],
    "the list has 0 runs": ["--seeds 0", "--seeds 5-1"],
    "--jobs is ": ["--jobs 0", "--jobs two", "--jobs -1", "--jobs 1000"],
    "cannot create directory": ["--runs-dir /dev/null/x"],
}  # fmt: skip


@pytest.mark.parametrize("message, options", [(message, one) for message in BAD_OPTIONS for one in BAD_OPTIONS[message]])
def test_bad_options_are_one_message(study, message, options):
    result = study.run(*shlex.split(options))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and message in result.stderr and ": line " not in result.stderr
    assert not study.runs.exists() and not study.events()


# ------------------------------------------------------------------------------------------------------------- running


def test_runs_in_order_then_skips_and_plots(study):
    result = study.run(*SMALL)
    assert result.returncode == 0, result.stdout + result.stderr
    assert names(study.events("start")) == SMALL_RUNS and study.finished() == sorted(SMALL_RUNS)
    assert all(event["threads"] is None for event in study.events("start"))
    lines = result.stdout.splitlines()
    assert lines[0] == f"8 run(s), 1 at a time; what they say is in {study.runs}/logs"
    assert lines[-1] == f"PLOT --runs-dir {study.runs}"
    name = "rde_dqn_atari__Pong__ratio_1__seed_1"
    assert lines[1] == f"[1/8] {name} begins"
    assert re.fullmatch(rf"\[1/8\] {name}: the run is in {study.runs}/\w+; 7 left, about 1 min", lines[2])
    assert re.fullmatch(rf"\[8/8\] rde_dqn_atari__Alien__ratio_2__seed_2: the run is in {study.runs}/\w+", lines[-2])

    again = study.run(*SMALL)
    assert again.returncode == 0 and len(re.findall(r"is finished$", again.stdout, re.MULTILINE)) == 8  # no time is known
    assert len(study.events("start")) == 8 == len(study.events("skipped"))


@pytest.mark.parametrize("jobs", [1, 20])
def test_time_left_is_that_of_the_runs_of_this_call(study, jobs):
    """Runs that were finished before, or fail, say nothing of it. A run takes 2 seconds: 400 of them 14 minutes, 20 at a time 1."""
    options = ("--", "--failing-seed", "2", "--seconds", "2")
    assert study.run(*ONE_GAME, "--seeds", "1", *options).returncode == 0
    start, before = time.time(), ""
    process = study.start(*ONE_GAME, "--seeds", "1-2,1001-1400", "--jobs", str(jobs), *options)
    for line in process.stdout:
        if ": the run is in" in line:
            break
        before += line
    longest = time.time() - start + 1  # bash counts whole seconds
    process.terminate()
    process.communicate(timeout=100)
    assert " is finished\n" in before and "caught fire\n" in before and " min" not in before
    left, minutes = map(int, re.search(r"; (\d+) left, about (\d+) min$", line).groups())
    assert left in (399, 398) and left // jobs // 60 + 1 <= minutes <= left * longest / jobs / 60 + 1


def test_failures_are_listed_and_stop_nothing(study):
    """Of a run that fails, of one that cannot be started, and of the plots."""
    options = (*ONE_GAME, "--seeds", "4", "--", "--failing-seed", "2")
    (study.runs / "logs" / "dqn_atari__Pong__seed_3.log").mkdir(parents=True)
    result = study.run(*options)
    first, second, third = result.stderr.splitlines()[-3:]
    assert (result.returncode, first) == (1, "2 FAILED:") and "PLOT" in result.stdout
    assert second == "  dqn_atari__Pong__seed_2, exit code 7: the emulator caught fire"
    assert third.startswith("  dqn_atari__Pong__seed_3, exit code 1: ")
    command, *said = (study.runs / "logs" / "dqn_atari__Pong__seed_2.log").read_text().splitlines()
    assert said == ["it begins", "the emulator caught fire"]
    assert shlex.split(command)[:3] == ["$", sys.executable, str(study.scripts / "dqn_atari.py")]

    (study.scripts / "plot_benchmark.py").write_text("raise SystemExit(3)")
    result = study.run(*options)
    assert result.returncode == 1 and "3 FAILED:" in result.stderr and "\n  plot_benchmark.py\n" in result.stderr
    assert [event["seed"] for event in study.events("end", "failing")] == ["1", "2", "4", "2"]
    result = study.run(*ONE_GAME, "--seeds", "1", PYTHON="/no/such/python")
    assert result.returncode == 1 and "exit code 127: setsid: failed to execute /no/such/python: No such file" in result.stderr


def test_parallel_jobs(study):
    process = study.start(*SMALL, "--jobs", "3", "--", "--wait-at", "3")
    study.wait_for("waiting", 3)
    time.sleep(1)  # a fourth would have begun by now
    assert len(study.events("start")) == 3
    output = study.end(process)
    assert process.returncode == 0 and study.finished() == sorted(SMALL_RUNS), output
    assert sorted(names(study.events("start"))) == sorted(SMALL_RUNS)
    assert max(accumulate({"start": 1, "end": -1}[event["event"]] for event in study.events("start", "end"))) == 3
    assert {event["threads"] for event in study.events("start")} == {"1"}
    assert study.run(*ONE_GAME, "--seeds", "9-9", "--jobs", "2", OMP_NUM_THREADS="5").returncode == 0
    assert study.events("start")[-1]["threads"] == "5"


def test_a_free_place_is_taken_while_others_run_and_the_file_may_change(study):
    """As an editor changes it that writes into the same file."""
    process = study.start("--methods", "dqn_atari --wait-at 3,rde_dqn", "--games", "x", "--seeds", "2", "--jobs", "2")
    study.wait_for("waiting", 2)
    assert [event["seed"] for event in study.events("end")] == ["1"]
    (study.scripts / "benchmark.sh").write_text("exit 55\n" * 10_000)
    assert "PLOT" in study.end(process) and process.returncode == 0 and len(study.finished()) == 4


def test_odd_names(tmp_path):
    study = Study(tmp_path, "my scripts'")
    study.runs = tmp_path / 'runs [of] $HOME; "a" *'
    (tmp_path / "starlight").mkdir()  # a * in the list must not become this name
    games = ["$(touch-hacked)-v0", "it's-v0", '"q"-v1', "*", "a;b&c|d-v0", "ALE/Pong-v5", "Übung-v0", "back\\slash-v0"]
    options = ("--games", ",".join(games), *ONE_GAME[2:], "--seeds", "1", "--", "--note", "a b\"'$x\n*")
    result = study.run("--jobs", "2", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    starts = study.events("start")
    assert sorted(event["env_id"] for event in starts) == sorted([*set(games) - {"*"}, "*NoFrameskip-v4"])
    assert all(event["options"][-1] == "a b\"'$x\n*" for event in starts)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["journal", "my scripts'", study.runs.name, "starlight"])
    lines = study.run("--dry-run", *options).stdout  # finished or not, they are commands, and can be piped
    subprocess.run(["bash"], input=lines, env=study.environment, text=True, check=True)
    assert len(study.events("start")) == len(games) == len(study.events("skipped"))

    study.runs = "~/study"
    assert study.run(*ONE_GAME, "--seeds", "1", HOME=str(tmp_path)).returncode == 0
    assert len([*(tmp_path / "study").glob("*/model.pt")]) == 1 == len([*(tmp_path / "study" / "logs").iterdir()])


# ------------------------------------------------------------------------------------------- stopped, killed, continued


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


STOPS = ["Ctrl-C", "SIGINT", "SIGINT to the group", "SIGTERM", "SIGTERM twice", "SIGTERM to timeout", "SIGHUP to the group",
         "SIGUSR1"]  # fmt: skip


@pytest.mark.parametrize("how", STOPS)
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
    os.close(terminal)
    os.close(end)
    assert process.returncode == 128 + number
    pids = [event["pid"] for event in study.events("start")]
    assert len(pids) == 2 and not any(map(is_alive, pids))
    assert {event["number"] for event in study.events("signal")} == {signal.SIGTERM}
    assert [event["step"] for event in study.events("saved")] == [3] * 4  # each before it waited, and because of the signal
    assert output.count(" begins\n") == 2 == output.count("stopped at step 3")
    assert "stopped; the same command goes on from here" in output
    assert "FAILED" not in output and "PLOT" not in output and study.finished() == []

    study.go()
    assert study.run(*options).returncode == 0
    assert {event["seed"]: event["step"] for event in study.events("start")[2:]} == {"1": 3, "2": 3, "3": 0, "4": 0}
    assert study.finished() == [(PONG, "dqn_atari", "1", seed) for seed in "1234"]


def test_runs_save_when_the_terminal_is_closed(study):
    terminal, end = pty.openpty()
    process = study.start(*ONE_GAME, "--seeds", "1", "--", "--wait-at", "3", "--save-seconds", "0.5", terminal=end)
    study.wait_for("waiting")
    os.close(end)
    os.close(terminal)
    process.stdout.close()  # nobody reads what it says
    process.wait(100)
    wait_until(lambda: not any(is_alive(event["pid"]) for event in study.events("start")))
    assert len(study.events("saved")) == 2


def test_a_run_that_begins_when_the_signal_comes_is_stopped_too(study):
    """Signals at many moments around the beginning of the runs: none of them goes on."""
    for i in range(8):
        process = study.start(*ONE_GAME, "--seeds", "40", "--jobs", "20", "--", "--wait-at", "3")
        assert "40 run(s)" in process.stdout.readline()
        time.sleep(0.03 * i)
        process.terminate()
        assert "stopped" in process.communicate(timeout=100)[0] and process.returncode == 143
        assert not any(is_alive(event["pid"]) for event in study.events("start"))


def test_a_killed_run_is_a_failure_and_is_continued(study):
    options = (*ONE_GAME, "--seeds", "2", "--", "--wait-at", "3")
    process = study.start(*options)
    os.kill(study.wait_for("waiting")[0]["pid"], signal.SIGKILL)
    output = study.end(process)
    assert process.returncode == 1 and "1 FAILED:\n  dqn_atari__Pong__seed_1, exit code 137: it begins\n" in output
    assert study.run(*options).returncode == 0
    assert [(event["seed"], event["step"]) for event in study.events("start")] == [("1", 0), ("2", 0), ("1", 3)]
    assert len(study.finished()) == 2


def test_a_run_outlives_a_killed_benchmark_and_two_others_share_the_rest(study):
    options = (*SMALL, "--", "--wait-at", "3")
    first = study.start(*options)
    pid = study.wait_for("waiting")[0]["pid"]
    first.kill()
    first.wait()
    assert is_alive(pid)
    others = []
    for count in (2, 3):  # one after the other: they write into the same logs
        others.append(study.start(*options))
        study.wait_for("waiting", count)
    for process in others:
        assert "ratio_1__seed_1: error: another process is at work" in study.end(process) and process.returncode == 0
    wait_until(lambda: not is_alive(pid))
    assert study.run(*options).stdout.count(" is finished\n") == 8
    assert sorted(names(study.events("start"))) == sorted(SMALL_RUNS) == study.finished()
