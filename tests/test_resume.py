"""Killed, stopped, resumed: the end is that of the run that was never touched. And files that are not what they should be."""

import contextlib
import csv
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types

import numpy as np
import psutil
import pytest
import torch

from conftest import ATARI_SCRIPTS, QUICK, ROOT, command, environment, load_script, run_script

ARGUMENTS = {
    "dqn_atari": [],
    "sr_dqn_atari": ["--reset-interval", "60", "--reset-depth", "last2"],
    "rde_dqn_atari": ["--reset-interval", "120", "--num-envs", "2"],
    # Two environments, a reset between two evaluations at step 1,300, and the ends of two episodes at step 2,000.
    "rde_sac_dmc": "--total-timesteps 2050 --learning-starts 100 --replay-ratio 0.25 --num-envs 2 --reset-interval 600 "
    "--batch-size 16 --hidden-dim 8 --buffer-size 1500 --eval-interval 700 --eval-episodes 1".split(),
}
GAMES = ["BreakoutNoFrameskip-v4", "QbertNoFrameskip-v4"]
TASK = "reacher-hard"
PAIRS = [(script, game) for script in ATARI_SCRIPTS for game in GAMES] + [("rde_sac_dmc", TASK)]
RDES = ["rde_dqn_atari", "rde_sac_dmc"]


def first_game(script: str) -> str:
    return TASK if script == "rde_sac_dmc" else GAMES[0]


def arguments_of(script: str, game: str | None = None) -> list[str]:
    quick, interval = ([], "250") if script == "rde_sac_dmc" else (QUICK, "90")
    return [*quick, *ARGUMENTS[script], "--env-id", game or first_game(script), "--checkpoint-interval", interval]


def rows(path: pathlib.Path, name: str) -> list[tuple]:
    """The rows of a CSV file, wall-clock times left out."""
    with open(path / name, newline="") as file:
        return [tuple(value for key, value in row.items() if key != "wall_seconds") for row in csv.DictReader(file)]


def scalars(path: pathlib.Path) -> dict:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag != "charts/SPS"
    }


def assert_equal(ours, theirs) -> None:
    """Of two models, to the bit."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        assert_equal(list(ours.values()), list(theirs.values()))
    elif isinstance(ours, list):
        for a, b in zip(ours, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert ours == theirs


def assert_same_end(path: pathlib.Path, undisturbed: pathlib.Path) -> None:
    for name in ("episodes.csv", "evaluations.csv"):
        assert rows(path, name) == rows(undisturbed, name)
    assert scalars(path) == scalars(undisturbed)
    assert_equal(*(torch.load(folder / "model.pt", weights_only=True) for folder in (path, undisturbed)))
    assert not (path / "checkpoint.pt").exists() and not list(path.glob("*.tmp"))


def only_run(runs_dir: pathlib.Path) -> pathlib.Path:
    (path,) = runs_dir.iterdir()
    return path


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a run that nobody stopped, by script and game. It has no checkpoints: they must not matter."""
    done = {}

    def get(script: str, game: str | None = None) -> pathlib.Path:
        if (script, game := game or first_game(script)) not in done:
            runs_dir = tmp_path_factory.mktemp("undisturbed")
            result = run_script(script, *arguments_of(script, game), "--checkpoint-interval", "0", "--runs-dir", runs_dir)
            assert result.returncode == 0, result.stderr
            done[script, game] = only_run(runs_dir)
        return done[script, game]

    return get


class Started:
    """A training process in a run folder of its own, to be killed when something has happened."""

    def __init__(self, script: str, arguments: list[str], runs_dir: pathlib.Path):
        self.log = open(runs_dir.parent / "log.txt", "w+")
        arguments = [*arguments, "--runs-dir", runs_dir, "--resume", "auto"]
        self.process = subprocess.Popen(
            command(script, *arguments), env=environment(), stdout=self.log, stderr=subprocess.STDOUT
        )
        self.runs_dir = runs_dir

    def wait_for(self, condition) -> None:
        """Until the condition holds, or the process has ended."""
        while self.process.poll() is None and not condition():
            time.sleep(0.005)

    def printed(self) -> str:
        return pathlib.Path(self.log.name).read_text().replace("\r", "\n")

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(timeout=120)
        self.log.close()
        return code


def when_a_checkpoint_is_being_written(started: Started):
    return lambda: any(started.runs_dir.glob("*/checkpoint.pt.tmp"))


def when_a_checkpoint_has_been_written(started: Started):
    times = lambda: [path.stat().st_mtime_ns for path in started.runs_dir.glob("*/checkpoint.pt")]
    before = times()
    return lambda: times() not in ([], before)


def when_a_reset_happens(started: Started):
    return lambda: " of agent 0 after " in started.printed() or "reset last" in started.printed()


def when_a_game_has_ended(started: Started):
    lines = lambda: sum(path.read_bytes().count(b"\n") for path in started.runs_dir.glob("*/episodes.csv"))
    before = lines()
    return lambda: lines() > before + 1


def when_an_evaluation_has_begun(started: Started):
    before = started.printed().count("evaluation (")
    return lambda: started.printed().count("evaluation (") > before


def after(seconds: float):
    def when(started: Started):
        deadline = time.monotonic() + seconds
        return lambda: time.monotonic() > deadline

    return when


def kill_and_resume(script: str, game: str, runs_dir: pathlib.Path, moments: list, number=signal.SIGKILL) -> pathlib.Path:
    """Starts the run, kills it at each moment and starts it again, and lets it finish in the end."""
    runs_dir.mkdir()
    for moment in moments:
        started = Started(script, arguments_of(script, game), runs_dir)
        started.wait_for(lambda: "step/s" in started.printed())  # the progress bar: the training has begun
        started.wait_for(moment(started))
        if started.end(number) == 0:
            return only_run(runs_dir)  # it was faster
        if any(runs_dir.glob("*/model.pt")):  # finished, and killed on its way out: nothing but a checkpoint may be left over
            (only_run(runs_dir) / "checkpoint.pt").unlink(missing_ok=True)
            return only_run(runs_dir)
    result = run_script(script, *arguments_of(script, game), "--runs-dir", runs_dir, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    return only_run(runs_dir)


@pytest.mark.parametrize(
    "script, game, moments",
    [
        ("dqn_atari", GAMES[0], [when_a_game_has_ended, when_a_checkpoint_is_being_written]),
        ("sr_dqn_atari", GAMES[0], [when_a_reset_happens, after(0.3)]),
        ("rde_dqn_atari", GAMES[1], [when_a_checkpoint_is_being_written, when_a_reset_happens]),
        ("rde_sac_dmc", TASK, [when_a_checkpoint_has_been_written, when_a_reset_happens]),
    ],
)
def test_killed_and_resumed(script, game, moments, tmp_path, undisturbed):
    path = kill_and_resume(script, game, tmp_path / "runs", moments)
    assert_same_end(path, undisturbed(script, game))


@pytest.mark.slow
@pytest.mark.parametrize("script, game", PAIRS)
def test_killed_at_20_random_moments(script, game, tmp_path, undisturbed):
    """Five runs, each killed four times on its way."""
    random.seed(f"{script} {game}")
    moments = [when_a_checkpoint_is_being_written, when_a_checkpoint_has_been_written]
    moments += [when_a_game_has_ended, when_an_evaluation_has_begun]
    moments += [when_a_reset_happens] if script != "dqn_atari" else []
    for i in range(5):
        sequence = [random.choice(moments + [after(random.uniform(0, 2))] * 3) for _ in range(4)]
        path = kill_and_resume(script, game, tmp_path / f"runs{i}", sequence)
        assert_same_end(path, undisturbed(script, game))


@pytest.mark.parametrize("number, name", [(signal.SIGTERM, "143"), (signal.SIGINT, "130")])
def test_a_signal_saves_and_says_how_to_go_on(number, name, tmp_path, undisturbed):
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    started = Started("rde_dqn_atari", arguments_of("rde_dqn_atari"), runs_dir)
    started.wait_for(when_a_reset_happens(started))  # an evaluation begins: it is abandoned, and played again
    assert started.end(number) == int(name)
    path = only_run(runs_dir)
    last_line = started.printed().strip().splitlines()[-1]
    step = int(
        re.fullmatch(
            rf"stopped at step (\d+); to continue: python .*rde_dqn_atari.py --resume {re.escape(str(path))}", last_line
        )[1]
    )
    assert step == 440 and (path / "checkpoint.pt").exists() and "Traceback" not in started.printed()
    result = run_script("rde_dqn_atari", "--resume", path)
    assert result.returncode == 0, result.stderr
    assert f"continuing {path} at step 440" in result.stdout + result.stderr
    assert_same_end(path, undisturbed("rde_dqn_atari"))


def test_a_second_signal_ends_at_once(rde, monkeypatch):
    handlers = {}
    monkeypatch.setattr(rde.signal, "signal", handlers.__setitem__)
    stop = rde.StopSignal()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert stop.received == signal.SIGTERM
    assert handlers == {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.SIG_DFL}


@pytest.mark.parametrize(
    "game", ["BreakoutNoFrameskip-v4", "QbertNoFrameskip-v4", "FreewayNoFrameskip-v4", "KungFuMasterNoFrameskip-v4"]
)
def test_an_environment_goes_on_in_another_process_of_the_emulator(rde, game):
    """Saved at several moments of a game and restored into a fresh environment: the next 200 steps are the same bytes."""
    rng, env = np.random.default_rng(1), rde.make_env(game)
    env.reset(seed=4)
    for _ in range(4):
        for _ in range(int(rng.integers(20, 120))):
            _, _, terminated, truncated, _ = env.step(int(rng.integers(3)))
            if terminated or truncated:
                env.reset()
        file = rde.io.BytesIO()
        torch.save(rde.environment_state(env), file)
        fresh = rde.make_env(game)
        rde.restore_environment(fresh, torch.load(rde.io.BytesIO(file.getvalue()), weights_only=True))
        for action in np.random.default_rng(2).integers(3, size=200):
            outcomes = [one.step(int(action)) for one in (env, fresh)]
            assert np.array_equal(outcomes[0][0], outcomes[1][0]) and outcomes[0][1:] == outcomes[1][1:]
            if outcomes[0][2] or outcomes[0][3]:
                resets = [one.reset() for one in (env, fresh)]
                assert np.array_equal(resets[0][0], resets[1][0]) and resets[0][1].keys() == resets[1][1].keys()


# ------------------------------------------------------------------------------------------- what is not as it should be


@pytest.fixture(scope="session")
def stopped_run(tmp_path_factory):
    """The folder of a run that was stopped by SIGTERM after its first checkpoint, by script."""
    done = {}

    def get(script: str) -> pathlib.Path:
        if script not in done:
            runs_dir = tmp_path_factory.mktemp("stopped") / "runs"
            runs_dir.mkdir()
            started = Started(script, arguments_of(script), runs_dir)
            started.wait_for(lambda: any(runs_dir.glob("*/checkpoint.pt")))
            assert started.end(signal.SIGTERM) == 143
            done[script] = only_run(runs_dir)
        return done[script]

    return get


@pytest.fixture
def copy_of_stopped_run(stopped_run, tmp_path, request):
    """Of rde_dqn_atari, or of the script that the test is about."""
    path = stopped_run(getattr(request, "param", "rde_dqn_atari"))
    return pathlib.Path(shutil.copytree(path, tmp_path / "runs" / path.name))


def resume(path, *arguments, script="rde_dqn_atari"):
    """The exit code and the one line of a resume that must be refused, and leave all files as they are."""
    files = {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {}
    result = run_script(script, "--resume", path, *arguments)
    assert "Traceback" not in result.stderr and result.returncode in (1, 2), result.stderr
    (line,) = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert files == ({file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {})
    return result.returncode, line


def flip_a_byte(path):
    with open(path / "checkpoint.pt", "r+b") as file:
        position = random.Random(1).randrange(100, os.path.getsize(path / "checkpoint.pt"))
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def cut_off(path):
    os.truncate(path / "checkpoint.pt", os.path.getsize(path / "checkpoint.pt") // 2)


def empty(path):
    os.truncate(path / "checkpoint.pt", 0)


def garbage(path):
    (path / "checkpoint.pt").write_bytes(b"not a checkpoint" * 10)


def other_number_of_agents(path):
    content = json.loads((path / "args.json").read_text())
    content["args"]["num_agents"] = 3
    (path / "args.json").write_text(json.dumps(content))


def rewrite_state(path, change):
    """Writes the checkpoint anew with a changed state and a right checksum."""
    rde = load_script("rde_dqn_atari")
    content = (path / "checkpoint.pt").read_bytes()
    _, _, size = struct.unpack("<8sIQ", content[:20])
    state = torch.load(rde.io.BytesIO(content[20 : 20 + size]), weights_only=True)
    change(state)
    rde.save_checkpoint(
        str(path / "checkpoint.pt"), state, torch.frombuffer(bytearray(content[20 + size :]), dtype=torch.uint8)
    )


def a_number_as_text(path):
    content = json.loads((path / "args.json").read_text())
    content["args"]["num_agents"] = "2"
    (path / "args.json").write_text(json.dumps(content))


def other_script(path):
    rewrite_state(path, lambda state: state.update(script="dqn_atari.py"))


def other_version(path):
    rewrite_state(path, lambda state: state["versions"].update(torch="1.0"))


def other_device(path):
    rewrite_state(path, lambda state: state["versions"].update(device="cuda"))


@pytest.mark.parametrize("copy_of_stopped_run", RDES, indirect=True)
@pytest.mark.parametrize(
    "damage, code, message",
    [
        (flip_a_byte, 1, "is damaged or cut off: its checksum is wrong"),
        (cut_off, 1, "is damaged or cut off: its checksum is wrong"),
        (empty, 1, "checkpoint.pt is cut off"),
        (garbage, 1, "is not a checkpoint of this version of the scripts"),
        (other_number_of_agents, 1, "was written with num_agents = 2, but args.json says 3"),
        (a_number_as_text, 1, "its args.json does not fit"),
        (other_script, 1, "was written by dqn_atari.py, not by rde_"),
        (other_version, 1, "was written with torch 1.0, but here is"),
        (other_device, 1, "was written with device cuda, but here is cpu"),
    ],
)
def test_a_checkpoint_that_does_not_fit(copy_of_stopped_run, damage, code, message):
    """It is refused, also with a raised total, which args.json must not hold then."""
    damage(copy_of_stopped_run)
    script = copy_of_stopped_run.name.split("__")[1]
    total = json.loads((copy_of_stopped_run / "args.json").read_text())["args"]["total_timesteps"] + 100
    got, line = resume(copy_of_stopped_run, "--total-timesteps", total, script=script)
    assert got == code and message in line


def test_only_the_total_may_be_changed(copy_of_stopped_run):
    assert resume(copy_of_stopped_run, "--seed", "7") == (
        2, f"error: --seed 7 differs from the 1 of the run in {copy_of_stopped_run}; a resumed run keeps its arguments, "
        "only --total-timesteps may be raised",
    )  # fmt: skip
    code, line = resume(copy_of_stopped_run, "--total-timesteps", "600")
    assert code == 2 and "--total-timesteps 600 is less than the run's 700; it may only be raised" in line


def test_folders_that_cannot_be_resumed(copy_of_stopped_run, tmp_path, undisturbed):
    assert "is finished" in resume(undisturbed("dqn_atari"), script="dqn_atari")[1]
    code, line = resume(tmp_path / "nothing")
    assert code == 1 and "is not a run folder: args.json: No such file or directory" in line
    code, line = resume(copy_of_stopped_run, script="dqn_atari")
    assert code == 1 and "is not a run folder of dqn_atari.py: its args.json does not fit" in line


def test_two_processes_in_one_folder(copy_of_stopped_run, rde):
    folder = os.open(copy_of_stopped_run, os.O_RDONLY)
    rde.fcntl.flock(folder, rde.fcntl.LOCK_EX)
    try:
        code, line = resume(copy_of_stopped_run)
        assert code == 1 and line == f"error: another process is at work in {copy_of_stopped_run}"
        args = rde.dataclasses.replace(
            rde.read_run_args(str(copy_of_stopped_run)), runs_dir=str(copy_of_stopped_run.parent), resume="auto"
        )
        assert rde.find_unfinished_run(args) is None
    finally:
        os.close(folder)
    assert rde.find_unfinished_run(args) == str(copy_of_stopped_run)
    assert rde.find_unfinished_run(rde.dataclasses.replace(args, seed=5)) is None


def test_two_runs_in_the_same_second_get_folders_of_their_own(rde, tmp_path, monkeypatch):
    times = iter(["20260101-000000", "20260101-000000", "20260101-000000", "20260101-000001"])
    monkeypatch.setattr(rde.time, "strftime", lambda _: next(times))
    paths = [rde.make_run_folder(rde.Args(runs_dir=str(tmp_path))) for _ in range(2)]
    assert [path[-15:] for path in paths] == ["20260101-000000", "20260101-000001"]
    assert sorted(map(str, tmp_path.iterdir())) == paths


def test_a_raised_total_goes_on(copy_of_stopped_run):
    result = run_script("rde_dqn_atari", "--resume", copy_of_stopped_run, "--total-timesteps", "760")
    assert result.returncode == 0, result.stderr
    assert "warning: with --total-timesteps 760 instead of 700 the decay of epsilon" in result.stderr
    evaluations = rows(copy_of_stopped_run, "evaluations.csv")
    assert [row[:2] for row in evaluations if row[1] == "final"] == [("760", "final")] * 2
    assert json.loads((copy_of_stopped_run / "args.json").read_text())["args"]["total_timesteps"] == 760


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str):
    """A real file system of that size; needs the right to mount."""
    path.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True, check=False
    ).returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def error_line(result) -> str:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("script, size", [("dqn_atari", "45m"), ("rde_sac_dmc", "304k")])
def test_disk_full_while_a_checkpoint_is_written(script, size, tmp_path, undisturbed):
    """The first checkpoint fits, a second beside it does not: the first stays, and with more room the run goes on."""
    with small_disk(tmp_path / "disk", size) as disk:
        result = run_script(script, *arguments_of(script), "--runs-dir", disk)
        line = error_line(result)
        path = only_run(disk)
        assert re.search(r"checkpoint.pt was not written: it needs [\d.]+ MB, the disk has [\d.]+ MB", line)
        assert (path / "checkpoint.pt").exists() and not (path / "checkpoint.pt.tmp").exists()
        subprocess.run(["mount", "-o", "remount,size=300m", disk], check=True)
        result = run_script(script, "--resume", path)
        assert result.returncode == 0, result.stderr
        assert_same_end(path, undisturbed(script))


@pytest.mark.parametrize("free_kilobytes", [0, 8, 16, 24])
def test_disk_full_while_files_are_written(free_kilobytes, tmp_path):
    """At the folder's first file, at the CSV files, at TensorBoard's second page, at model.pt: one line, and what is there stays."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "filler").write_bytes(bytes((64 - free_kilobytes) * 1024))
        arguments = [*QUICK, "--total-timesteps", "400", "--checkpoint-interval", "0"]
        result = run_script("dqn_atari", *arguments, "--runs-dir", disk / "runs")
        assert "No space left on device" in error_line(result)
        assert not list(disk.glob("runs/*/model.pt*"))


@pytest.mark.parametrize("script", RDES)
def test_read_only_folder(script, tmp_path, stopped_run):
    with small_disk(tmp_path / "disk", "200m") as disk:
        path = pathlib.Path(shutil.copytree(stopped_run(script), disk / stopped_run(script).name))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        line = error_line(run_script(script, "--resume", path))
        assert "Read-only file system" in line


FAILING_ENVIRONMENT = """
import sys
sys.path.insert(0, {root!r})
import {script} as script

class Failing:
    # Does what the emulator (the physics) does, until it fails in the training's first environment.
    def __init__(self, real):
        self.real, self.calls = real, 0
    def __getattr__(self, name):
        return getattr(self.real, name)
    def act(self, action):
        return self.failing(self.real.act, action)
    def step(self, action):
        return self.failing(self.real.step, action)
    def failing(self, function, argument):
        self.calls += 1
        if self.calls == {calls}:
            raise RuntimeError("out of order")
        return function(argument)

name, attribute = {wrapped}
wrapper, environments = getattr(script, name), []
real_init = wrapper.__init__
def init(self, *args, **kwargs):
    real_init(self, *args, **kwargs)
    environments.append(self)
    if len(environments) == {number}:
        setattr(self, attribute, Failing(getattr(self, attribute)))
wrapper.__init__ = init
sys.argv = [script.__file__] + sys.argv[1:]
script.main()
"""


@pytest.mark.parametrize(
    "script, wrapped, number, calls, step",
    [("dqn_atari", ("AtariGame", "ale"), 1, 1_900, 360), ("rde_sac_dmc", ("DeepMindControl", "env"), 2, 700, 1_250)],
)
def test_an_emulator_that_raises(script, wrapped, number, calls, step, tmp_path, undisturbed):
    """One line; what TensorBoard and the CSV files were told is there; and with a sound emulator the run goes on."""
    code = FAILING_ENVIRONMENT.format(root=str(ROOT), script=script, wrapped=wrapped, number=number, calls=calls)
    arguments = map(str, [*arguments_of(script), "--runs-dir", tmp_path])
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, check=False
    )
    name = "emulator" if script == "dqn_atari" else "physics"
    assert error_line(result) == (
        f"error: the {name} failed: out of order; what was written stays, and the run can be continued from its last "
        "checkpoint with --resume"
    )
    path = only_run(tmp_path)
    logged, expected = scalars(path), scalars(undisturbed(script))
    last_step = max(at for points in logged.values() for at, _ in points)
    assert last_step > step - 100 and len(rows(path, "evaluations.csv")) > 0  # a point every 100 steps
    for tag, points in logged.items():
        assert points == [point for point in expected[tag] if point[0] <= last_step], tag
    result = run_script(script, "--resume", path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"continuing .* at step (\d+)", result.stdout + result.stderr)[1] == str(step)
    assert_same_end(path, undisturbed(script))


def test_a_resumed_run_has_as_many_threads_as_before(copy_of_stopped_run, rde, monkeypatch, capsys):
    """OMP_NUM_THREADS is 1 here. The run is stopped again at once, and the next checkpoint says the same."""
    rewrite_state(copy_of_stopped_run, lambda state: state.update(num_threads=2))
    before = torch.get_num_threads()
    monkeypatch.setattr(rde, "StopSignal", lambda: types.SimpleNamespace(received=signal.SIGTERM))
    monkeypatch.setattr(sys, "argv", ["rde_dqn_atari.py", "--resume", str(copy_of_stopped_run)])
    try:
        with pytest.raises(SystemExit) as end:
            rde.main()
        assert (end.value.code, before, torch.get_num_threads()) == (143, 1, 2)
    finally:
        torch.set_num_threads(before)
    assert "with 2 thread(s) as before" in capsys.readouterr().out
    threads = []
    rewrite_state(copy_of_stopped_run, lambda state: threads.append(state["num_threads"]))
    assert threads == [2]


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """50,000 steps on a cheap setting: resident memory at the end within 3 % of that after the buffer is full."""
    arguments = "--env-id BreakoutNoFrameskip-v4 --total-timesteps 50000 --learning-starts 1000 --replay-ratio 0.02 "
    arguments += "--batch-size 8 --buffer-size 2000 --eval-interval 0 --eval-episodes 1 --reset-interval 100 --reset-depth full"
    arguments += " --num-envs 2 --checkpoint-interval 5000"
    process = subprocess.Popen(
        command("rde_dqn_atari", *arguments.split(), "--runs-dir", tmp_path),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    samples, resident = [], psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            last_step = int((only_run(tmp_path) / "episodes.csv").read_text().splitlines()[-1].split(",")[0])
            samples.append((last_step, resident.memory_info().rss))
        time.sleep(0.5)
    assert process.returncode == 0
    full = [memory for step, memory in samples if 6_000 < step < 12_000]  # after the first checkpoint and resets as well
    end = [memory for step, memory in samples if step > 44_000]
    assert full and end and max(end) <= 1.03 * max(full), (max(full), max(end))


def test_nothing_in_a_checkpoint_is_executed(copy_of_stopped_run, rde):
    """A file with a right checksum and a pickle that would run a command: refused, not run."""

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {copy_of_stopped_run}/executed",)

    file = rde.io.BytesIO()
    torch.save({"script": Command()}, file)
    content = file.getvalue()
    header = rde.CHECKPOINT_HEADER.pack(rde.CHECKPOINT_MAGIC, rde.zlib.crc32(content), len(content))
    (copy_of_stopped_run / "checkpoint.pt").write_bytes(header + content)
    code, line = resume(copy_of_stopped_run)
    assert code == 1 and line.endswith("checkpoint.pt holds more than numbers and tensors, and was not loaded")
    assert not (copy_of_stopped_run / "executed").exists()
