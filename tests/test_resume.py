"""Killed, stopped, resumed: the end is that of the run that was never touched. And --resume auto, and changed scripts."""

import contextlib
import fcntl
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from conftest import (
    CHECKPOINTS,
    QUICK_SAC,
    ROOT,
    RUNS,
    STOPS,
    Started,
    assert_same_end,
    command,
    environment,
    equal,
    error_line,
    load_script,
    model,
    only_run,
    read_csv,
    refused,
    restored_signal_handlers,
    rows,
    run_main,
    run_script,
    scalars,
    snapshot,
    stop_when,
)


def arguments_of(name: str) -> list[str]:
    script, arguments = RUNS[name]
    return [*arguments, "--checkpoint-interval", CHECKPOINTS[script]]


# ------------------------------------------------------------------------------------------------------- killed, stopped


def when_a_checkpoint_is_being_written(started: Started, runs_dir: pathlib.Path):
    return lambda: any(runs_dir.glob("*/checkpoint.pt.tmp"))


def when_a_checkpoint_has_been_written(started: Started, runs_dir: pathlib.Path):
    times = lambda: [path.stat().st_mtime_ns for path in runs_dir.glob("*/checkpoint.pt")]
    before = times()
    return lambda: times() not in ([], before)


def when_a_reset_happens(started: Started, runs_dir: pathlib.Path):
    return lambda: re.search(r"step \d+: reset", started.printed())


def when_a_game_has_ended(started: Started, runs_dir: pathlib.Path):
    lines = lambda: sum(path.read_bytes().count(b"\n") for path in runs_dir.glob("*/episodes.csv"))
    before = lines()
    return lambda: lines() > before + 1


def when_an_evaluation_has_ended(started: Started, runs_dir: pathlib.Path):
    before = started.printed().count("evaluation (")
    return lambda: started.printed().count("evaluation (") > before


def after(seconds: float):
    def when(started: Started, runs_dir: pathlib.Path):
        deadline = time.monotonic() + seconds
        return lambda: time.monotonic() > deadline

    return when


def kill_and_resume(name: str, folder: pathlib.Path, moments: list) -> tuple[pathlib.Path, int]:
    """Starts the run, kills its process at each moment and starts it again, and lets it finish in the end.

    Returns the run's folder, and how often it was killed before it was finished.
    """
    script, runs_dir, num_killed = RUNS[name][0], folder / "runs", 0
    arguments = [*arguments_of(name), "--runs-dir", runs_dir, "--resume", "auto"]
    folder.mkdir(exist_ok=True)
    for number, moment in enumerate(moments):
        started = Started(script, *arguments, log=folder / f"log{number}.txt")
        started.wait_for(lambda: "step/s" in started.printed())  # the progress bar: the training has begun
        started.wait_for(moment(started, runs_dir))
        if started.end(signal.SIGKILL) == 0:  # it was faster
            break
        num_killed += not any(runs_dir.glob("*/model.pt"))
    result = run_script(script, *arguments)
    assert result.returncode == 0, result.stderr
    return only_run(runs_dir), num_killed


@pytest.mark.parametrize(
    "name, moments",
    [
        ("dqn", [when_a_checkpoint_is_being_written]),
        ("sr", [when_a_reset_happens]),
        ("rde", [when_a_game_has_ended, when_a_reset_happens]),
        ("sac", [when_a_checkpoint_has_been_written, when_a_reset_happens]),
    ],
)
def test_killed_and_resumed(name, moments, tmp_path, runs):
    path, num_killed = kill_and_resume(name, tmp_path, moments)
    assert num_killed > 0
    assert_same_end(path, runs(name).path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dqn", "sr", "rde", "rde qbert", "sac"])
def test_killed_at_20_random_moments(name, tmp_path, runs):
    """Five runs, each killed four times on its way."""
    random.seed(name)
    moments = [when_a_checkpoint_is_being_written, when_a_checkpoint_has_been_written]
    moments += [when_a_game_has_ended, when_an_evaluation_has_ended]
    moments += [when_a_reset_happens] if name != "dqn" else []
    for i in range(5):
        sequence = [random.choice(moments + [after(random.uniform(0, 2))] * 3) for _ in range(4)]
        path, _ = kill_and_resume(name, tmp_path / f"{i}", sequence)
        assert_same_end(path, runs(name).path)


@pytest.mark.parametrize("copy_of_stopped_run", list(STOPS), indirect=True)
def test_stopped_between_two_steps_and_resumed(copy_of_stopped_run, runs, request):
    """In the middle of games, between two points of the curves, after a reset: everything that a run consists of goes on."""
    name = request.node.callspec.params["copy_of_stopped_run"]
    content = torch.load(copy_of_stopped_run / "checkpoint.pt", weights_only=True)
    content["parts"]["run"]["wall_seconds"] += 1_000  # as if it had taken longer
    torch.save(content, copy_of_stopped_run / "checkpoint.pt")
    num_before = len(rows(copy_of_stopped_run, "episodes.csv"))
    result = run_main(load_script(RUNS[name][0]), "--resume", copy_of_stopped_run)
    assert result.returncode == 0, result.stderr
    assert f"continuing {copy_of_stopped_run} at step {STOPS[name]}, with 1 thread(s) as before" in result.stdout
    assert re.search(r"parameters, .*, about \d+ min left; in ", result.stdout)
    assert_same_end(copy_of_stopped_run, runs(name).path)
    seconds = [float(row["wall_seconds"]) for row in read_csv(copy_of_stopped_run / "episodes.csv")]
    assert all(1_000 < time < 2_000 for time in seconds[num_before:]) and len(seconds) > num_before  # the clock goes on, too


@pytest.mark.parametrize("name, number, code, step", [("sr", signal.SIGTERM, 143, 460), ("sac", signal.SIGINT, 130, 1300)])
def test_a_signal_saves_and_says_how_to_go_on(name, number, code, step, tmp_path, runs):
    """In the evaluation after a reset, which is abandoned and played again. Meanwhile no other process may touch the run."""
    script, runs_dir = RUNS[name][0], tmp_path / "runs"
    module = load_script(script)
    started = Started(script, *arguments_of(name), "--runs-dir", runs_dir, log=tmp_path / "log.txt")
    started.wait_for(when_a_reset_happens(started, runs_dir))
    started.process.send_signal(signal.SIGSTOP)  # time to look at it from outside
    path = only_run(runs_dir)
    for arguments in (["--resume", path], [*arguments_of(name), "--runs-dir", runs_dir, "--resume", "auto"]):
        other = run_main(module, *arguments)
        assert (other.returncode, other.stdout) == (75, "")
        assert other.stderr == f"another process is at work in {path}\n"
    started.process.send_signal(number)
    assert started.end(signal.SIGCONT) == code
    last_line = started.printed().strip().splitlines()[-1]
    assert re.fullmatch(
        rf"stopped at step {step}; to continue: python .*{script}\.py --resume {re.escape(str(path))}", last_line
    )
    assert (path / "checkpoint.pt").exists() and not (path / "model.pt").exists() and "Traceback" not in started.printed()
    result = run_main(module, "--resume", path)
    assert result.returncode == 0, result.stderr
    assert f"continuing {path} at step {step}" in result.stdout
    assert_same_end(path, runs(name).path)


def test_a_second_signal_ends_at_once(sac):
    with restored_signal_handlers():
        stop = sac.StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL] * 2


def test_a_signal_among_very_many_gradient_steps(tmp_path):
    """There is no state to save between them. 10 seconds after the signal the process ends."""
    arguments = [*QUICK_SAC, "--replay-ratio", 1_000_000, "--reset-interval", 0, "--runs-dir", tmp_path / "runs"]
    started = Started("rde_sac_dmc", *arguments, log=tmp_path / "log.txt")
    episodes = lambda: list(tmp_path.glob("runs/*/events.*"))
    started.wait_for(lambda: "step/s" in started.printed() and episodes())
    time.sleep(1)
    since = time.monotonic()
    assert started.end(signal.SIGTERM) == 143
    assert time.monotonic() - since < 15
    path = only_run(tmp_path / "runs")
    assert started.printed().strip().splitlines()[-1] == (
        "stopped in the middle of step 100; what was written stays, and the run can be continued from its last checkpoint "
        f"with --resume {path}"
    )


def test_a_signal_while_environments_are_made(tmp_path):
    arguments = [*QUICK_SAC, "--eval-episodes", "2000", "--runs-dir", tmp_path / "runs"]
    started = Started("rde_sac_dmc", *arguments, log=tmp_path / "log.txt")
    started.wait_for(lambda: any(tmp_path.glob("runs/*/args.json")))
    time.sleep(0.5)
    since = time.monotonic()
    assert started.end(signal.SIGTERM) == 143 and time.monotonic() - since < 30  # of minutes
    path = only_run(tmp_path / "runs")
    line = f"stopped before the run went on; to continue: python {ROOT / 'rde_sac_dmc.py'} --resume {path}\n"
    assert started.printed() == line and [file.name for file in path.iterdir()] == ["args.json"]


def test_stopped_before_the_first_step_and_in_the_final_evaluation(sac, runs, tmp_path, monkeypatch):
    """With an empty replay buffer, and at the end, which is postponed then: it is evaluated as any other step."""
    result = stop_when(lambda run: True, sac, *arguments_of("sac"), "--runs-dir", tmp_path)
    assert result.returncode == 143 and "stopped at step 0; to continue" in result.stderr
    path = only_run(tmp_path)

    real = sac.evaluate

    def evaluate(policy, envs, seed, global_step, *rest):
        if global_step == 2_050:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(policy, envs, seed, global_step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sac, "evaluate", evaluate)
        result = run_main(sac, "--resume", path)
    assert result.returncode == 143 and "stopped at step 2050; to continue" in result.stderr
    assert not (path / "model.pt").exists()
    result = run_main(sac, "--resume", path, "--total-timesteps", 2_100)
    assert result.returncode == 0, result.stderr
    evaluations, others = rows(path, "evaluations.csv"), rows(runs("sac").path, "evaluations.csv")
    assert [row[:2] for row in evaluations[-2:]] == [("2050", "scheduled"), ("2100", "final")]
    assert evaluations[:-2] == others[:-1] and evaluations[-2][2:] == others[-1][2:]  # the same weights play the same


def test_a_raised_total_goes_on(copy_of_stopped_run, sac, runs):
    """Nothing before the run's old end differs."""
    result = run_main(sac, "--resume", copy_of_stopped_run, "--total-timesteps", 2_100)
    assert result.returncode == 0, result.stderr
    assert "warning: with --total-timesteps 2100 instead of 2050 what is a fraction of the run" in result.stderr
    assert rows(copy_of_stopped_run, "episodes.csv") == rows(runs("sac").path, "episodes.csv")
    *evaluations, last = rows(copy_of_stopped_run, "evaluations.csv")
    *others, other_last = rows(runs("sac").path, "evaluations.csv")
    assert evaluations == others and last[:2] == ("2100", "final") and other_last[:2] == ("2050", "final")
    assert json.loads((copy_of_stopped_run / "args.json").read_text())["args"]["total_timesteps"] == 2_100


def test_weights_kept_during_a_run_are_the_same_after_a_kill(sac, runs, tmp_path):
    """Killed between the weights of step 1,538 and the next checkpoint: they are written again, and are the same."""
    arguments = [*arguments_of("sac kept"), "--runs-dir", tmp_path / "runs"]
    started = Started("rde_sac_dmc", *arguments, log=tmp_path / "log.txt")
    started.wait_for(lambda: any(tmp_path.glob("runs/*/models/step_00001538.pt")))
    assert started.end(signal.SIGKILL) == -signal.SIGKILL
    path, undisturbed = only_run(tmp_path / "runs"), runs("sac kept").path
    result = run_main(sac, "--resume", path)
    assert result.returncode == 0, result.stderr
    assert_same_end(path, undisturbed)
    names = [f"models/step_{step:08d}.pt" for step in (514, 1026, 1538, 2050)]
    assert sorted(str(file.relative_to(path)) for file in path.glob("models/*")) == names
    assert all(equal(model(path, name), model(undisturbed, name)) for name in names)


def test_videos_of_a_run_that_was_stopped(runs, tmp_path):
    """The video of an evaluation is whole when the evaluation is over, and its name is not given again after a resume.

    Stopped right after an evaluation, and in the middle of the last one, whose video is written anew.
    """
    pytest.importorskip("moviepy")
    script, path = load_script("dqn_atari"), tmp_path / "runs"
    arguments = [*arguments_of("dqn"), "--capture-video", "--runs-dir", path]
    result = stop_when(lambda run: run.global_step == 300 and not run.agenda, script, *arguments)
    assert result.returncode == 143, result.stderr
    path = only_run(path)
    (video,) = path.glob("videos/*")
    assert video.name == "step-300-scheduled-episode-0.mp4" and num_frames(video) > 100
    content = video.read_bytes()

    num_steps, step = [], script.AtariView.step

    def stopped_in_the_last_evaluation(env, action):
        if (path / "evaluations.csv").read_text().count("scheduled") and "step-600-final" in str(
            env.env.__dict__.get("name_prefix")
        ):
            num_steps.append(action)
            if len(num_steps) == 20:
                os.kill(os.getpid(), signal.SIGTERM)
        return step(env, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.AtariView, "step", stopped_in_the_last_evaluation)
        result = run_main(script, "--resume", path)
    assert result.returncode == 143 and "stopped at step 600;" in result.stderr
    assert [num_frames(file) for file in path.glob("videos/step-600-*")] == [1 + 2 + 20]  # with FIRE, and what follows it
    result = run_main(script, "--resume", path)
    assert result.returncode == 0, result.stderr
    names = {"step-300-scheduled-episode-0.mp4", "step-600-final-episode-0.mp4"}
    assert {file.name for file in path.glob("videos/*")} == names
    assert video.read_bytes() == content and num_frames(path / "videos" / "step-600-final-episode-0.mp4") > 100
    assert_same_end(path, runs("dqn").path)


def num_frames(video: pathlib.Path) -> int:
    import moviepy

    with moviepy.VideoFileClip(str(video)) as clip:
        return round(clip.duration * clip.fps)


@pytest.mark.parametrize(
    "game", ["BreakoutNoFrameskip-v4", "QbertNoFrameskip-v4", "FreewayNoFrameskip-v4", "KungFuMasterNoFrameskip-v4"]
)
def test_an_environment_goes_on_in_another_process_of_the_emulator(rde, game):
    """Saved at several moments of a game and restored into a fresh environment: the next 200 steps are the same bytes."""
    args = rde.Args(env_id=game)
    rng, env = np.random.default_rng(1), rde.make_env(args)
    env.reset(seed=4)
    for _ in range(4):
        for _ in range(int(rng.integers(20, 120))):
            _, _, terminated, truncated, _ = env.step(int(rng.integers(3)))
            if terminated or truncated:
                env.reset()
        file = io.BytesIO()
        torch.save(rde.state_of(env), file)
        fresh = rde.make_env(args)
        rde.restored(fresh, torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        for action in np.random.default_rng(2).integers(3, size=200):
            outcomes = [one.step(int(action)) for one in (env, fresh)]
            assert np.array_equal(outcomes[0][0], outcomes[1][0]) and outcomes[0][1:] == outcomes[1][1:]
            if outcomes[0][2] or outcomes[0][3]:
                resets = [one.reset() for one in (env, fresh)]
                assert np.array_equal(resets[0][0], resets[1][0]) and resets[0][1].keys() == resets[1][1].keys()


def test_a_resumed_run_has_as_many_threads_as_before(copy_of_stopped_run, tmp_path):
    """OMP_NUM_THREADS is 1 here. In a process of its own, that is stopped again at once: the next checkpoint says the same."""
    checkpoint = copy_of_stopped_run / "checkpoint.pt"
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content | {"num_threads": 2}, checkpoint)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, signal, torch, rde_sac_dmc as script\n"
        "announce = script.Run.announce\n"
        "def announce_and_stop(run, agents, num_resets):\n"
        "    print('threads:', torch.get_num_threads())\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    announce(run, agents, num_resets)\n"
        "print('threads:', torch.get_num_threads())\n"
        "script.Run.announce = announce_and_stop\n"
        "script.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--resume", copy_of_stopped_run],
        capture_output=True, text=True, env=environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 143 and "with 2 thread(s) as before" in result.stdout, result.stderr
    assert re.findall(r"threads: (\d)", result.stdout) == ["1", "2"]
    assert torch.load(checkpoint, weights_only=True)["num_threads"] == 2


FAILING_ENVIRONMENT = """
import sys
sys.path.insert(0, {root!r})
import {script} as script

class Failing:
    # Does what the emulator (the physics) does, until it fails in one of the training's environments.
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
script.main()
"""


@pytest.mark.parametrize(
    "name, wrapped, number, calls, step",
    [("dqn", ("AtariGame", "ale"), 2, 1_900, 360), ("sac", ("DeepMindControl", "env"), 3, 700, 1_250)],
)
def test_an_emulator_that_raises(name, wrapped, number, calls, step, tmp_path, runs):
    """One line; what TensorBoard and the CSV files were told is there; and with a sound emulator the run goes on.

    The first environment is that of the check of the arguments.
    """
    script, undisturbed = RUNS[name][0], runs(name).path
    code = FAILING_ENVIRONMENT.format(root=str(ROOT), script=script, wrapped=wrapped, number=number, calls=calls)
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments_of(name), "--runs-dir", tmp_path],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert error_line(result) == (
        f"error: the {'emulator' if name == 'dqn' else 'physics'} failed: out of order; what was written stays, and the run can "
        "be continued from its last checkpoint with --resume"
    )
    path = only_run(tmp_path)
    logged, expected = scalars(path), scalars(undisturbed)
    last_step = max(at for points in logged.values() for at, _ in points)
    assert last_step > step - 100 and len(rows(path, "episodes.csv")) == len(logged.get("charts/episodic_return", []))
    for tag, points in logged.items():  # a point every 100 steps
        assert points == [point for point in expected[tag] if point[0] <= last_step], tag
    result = run_main(load_script(script), "--resume", path)
    assert result.returncode == 0, result.stderr
    assert f"continuing {path} at step {step}" in result.stdout
    assert_same_end(path, undisturbed)


# --------------------------------------------------------------------------------------------------------- --resume auto


def auto(script, name: str, runs_dir: pathlib.Path, *arguments) -> subprocess.CompletedProcess:
    return run_main(script, *arguments_of(name), "--runs-dir", runs_dir, "--resume", "auto", *arguments)


@pytest.fixture
def copy_of_finished_run(copy_of_stopped_run, sac):
    assert run_main(sac, "--resume", copy_of_stopped_run).returncode == 0
    return copy_of_stopped_run


def test_auto_of_a_finished_run_says_so(copy_of_finished_run, sac, runs):
    runs_dir = copy_of_finished_run.parent
    before = snapshot(runs_dir)
    for result in (auto(sac, "sac", runs_dir), run_main(sac, "--resume", copy_of_finished_run)):
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"the run in {copy_of_finished_run} is finished already\n"
        assert snapshot(runs_dir) == before
    result = run_main(sac, "--resume", copy_of_finished_run, "--total-timesteps", "2060")
    assert error_line(result, 2).endswith("its replay buffer is gone: --total-timesteps cannot be raised any more")
    assert snapshot(runs_dir) == before
    assert_same_end(copy_of_finished_run, runs("sac").path)


def test_a_run_that_another_process_finishes_meanwhile(copy_of_finished_run, sac, monkeypatch):
    """Between the first look at the folder and the lock: it is not begun anew, which would take its files away."""
    before, answers, is_finished = snapshot(copy_of_finished_run), iter([False]), sac.is_finished
    monkeypatch.setattr(sac, "is_finished", lambda path: next(answers, None) is not False and is_finished(path))
    result = run_main(sac, "--resume", copy_of_finished_run)
    assert (result.returncode, result.stdout) == (0, f"the run in {copy_of_finished_run} is finished already\n")
    assert next(answers, None) is None and snapshot(copy_of_finished_run) == before


def test_auto_looks_at_script_and_arguments(copy_of_stopped_run, sac):
    """Of an interrupted run; whatever the current folder, and the form of --runs-dir, is."""
    runs_dir = copy_of_stopped_run.parent
    args = lambda *words, script=sac: script.tyro.cli(
        script.Args, args=[*map(str, arguments_of("sac")), "--resume", "auto", "--runs-dir", *map(str, words)]
    )
    assert sac.find_run(args(runs_dir)) == (str(copy_of_stopped_run), sac.INTERRUPTED)
    assert sac.find_run(args(os.path.relpath(runs_dir))) == (os.path.relpath(copy_of_stopped_run), sac.INTERRUPTED)
    for difference in (
        "--seed 5",
        "--gamma 0.9",
        "--total-timesteps 2052",
        "--checkpoint-interval 0",
        "--exp-name a",
        "--no-cuda",
    ):
        assert sac.find_run(args(runs_dir, *difference.split())) is None, difference
    assert sac.find_run(args(runs_dir.parent)) is None
    # Of several the newest interrupted one; one that is at work goes before it, a finished one before both.
    older, newer = (runs_dir / f"{copy_of_stopped_run.name[:-15]}{time}" for time in ("20000101-000000", "20990101-000000"))
    for path in (older, newer):
        shutil.copytree(copy_of_stopped_run, path)
    assert sac.find_run(args(runs_dir)) == (str(newer), sac.INTERRUPTED)
    lock = os.open(copy_of_stopped_run, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert sac.find_run(args(runs_dir)) == (str(copy_of_stopped_run), sac.UNDER_WAY)
    (older / "model.pt").touch()
    assert sac.find_run(args(runs_dir)) == (str(older), sac.FINISHED)
    os.close(lock)


def test_of_two_processes_at_the_same_moment_one_trains(tmp_path):
    """Both are held up at the lock of the folder of runs, and then let go."""
    runs_dir = tmp_path / "runs"
    runs_dir.mkdir()
    lock = os.open(runs_dir, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    arguments = [*QUICK_SAC, "--total-timesteps", "400", "--runs-dir", runs_dir, "--resume", "auto"]
    both = [Started("rde_sac_dmc", *arguments, log=tmp_path / f"log{i}.txt") for i in range(2)]
    waiting = lambda: [line.split()[5] for line in open("/proc/locks") if "-> FLOCK" in line]
    both[0].wait_for(lambda: {str(started.process.pid) for started in both} <= set(waiting()))
    assert [started.process.poll() for started in both] == [None, None]
    os.close(lock)
    codes = [started.end() for started in both]
    assert sorted(codes) == [0, 75], [started.printed() for started in both]
    path = only_run(runs_dir)
    assert both[codes.index(75)].printed() == f"another process is at work in {path}\n"
    assert (path / "model.pt").exists() and not (path / "checkpoint.pt").exists()


def test_killed_between_model_and_the_removal_of_the_checkpoint(copy_of_stopped_run, sac, runs):
    """All points are there, from a slow writer, too. The next --resume auto takes the checkpoint away; the run is finished."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import os, signal, time, rde_sac_dmc as script\n"
        "from tensorboard.summary.writer.record_writer import RecordWriter\n"
        "write = RecordWriter.write\n"
        "RecordWriter.write = lambda self, data: (time.sleep(1 if b'eval/' in data else 0), write(self, data))\n"
        "script.remove_leftovers = lambda path: os.kill(os.getpid(), signal.SIGKILL)\n"
        "script.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--resume", copy_of_stopped_run], capture_output=True, env=environment(), check=False
    )
    assert result.returncode == -signal.SIGKILL
    assert (copy_of_stopped_run / "model.pt").exists() and (copy_of_stopped_run / "checkpoint.pt").exists()
    before = snapshot(copy_of_stopped_run)
    result = auto(sac, "sac", copy_of_stopped_run.parent)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"the run in {copy_of_stopped_run} is finished already\n"
    del before["checkpoint.pt"]
    assert snapshot(copy_of_stopped_run) == before
    assert_same_end(copy_of_stopped_run, runs("sac").path)


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_check_only_creates_nothing(sac, resume, tmp_path):
    result = run_main(sac, *QUICK_SAC, "--runs-dir", tmp_path / "runs", "--check-only", *resume)
    assert (result.returncode, result.stderr, list(tmp_path.iterdir())) == (0, "", [])
    result = run_main(sac, *QUICK_SAC, "--runs-dir", tmp_path / "runs", "--check-only", "--gamma", "2", *resume)
    assert error_line(result, 2) == "error: --gamma is 2.0, but must lie in [0, 1]" and list(tmp_path.iterdir()) == []


def test_check_only_of_an_interrupted_run_changes_nothing(copy_of_stopped_run, sac):
    before = snapshot(copy_of_stopped_run.parent)
    for result in (
        run_main(sac, "--resume", copy_of_stopped_run, "--check-only"),
        auto(sac, "sac", copy_of_stopped_run.parent, "--check-only"),
    ):
        assert (result.returncode, result.stderr) == (0, "") and snapshot(copy_of_stopped_run.parent) == before


def test_two_runs_in_the_same_second_get_folders_of_their_own(rde, tmp_path, monkeypatch):
    times = iter(["20260101-000000", "20260101-000000", "20260101-000000", "20260101-000001"])
    monkeypatch.setattr(rde.time, "strftime", lambda _: next(times))
    paths = []
    for _ in range(2):
        with rde.new_run_folder(rde.Args(runs_dir=str(tmp_path))) as path:
            paths.append(path)
    assert [path[-15:] for path in paths] == ["20260101-000000", "20260101-000001"]
    assert sorted(map(str, tmp_path.iterdir())) == paths


# -------------------------------------------------------------------------------------- what may change at a resume, and not


def test_only_the_total_may_be_changed(copy_of_stopped_run, sac):
    assert refused(sac, copy_of_stopped_run, "--seed", "7", code=2) == (
        f"error: --seed 7 differs from the 1 of the run in {copy_of_stopped_run}; a resumed run keeps its arguments, "
        "only --total-timesteps may be raised"
    )
    line = refused(sac, copy_of_stopped_run, "--total-timesteps", "600", code=2)
    assert "--total-timesteps 600 is less than the run's 2050; it may only be raised" in line


@pytest.fixture
def changed_sac(tmp_path):
    """The script with one more comment, in another folder."""
    path = tmp_path / "changed" / "rde_sac_dmc.py"
    path.parent.mkdir()
    path.write_bytes((ROOT / "rde_sac_dmc.py").read_bytes() + b"#")
    return load_script("changed", path)


def test_a_changed_script_does_not_go_on_unasked(copy_of_stopped_run, changed_sac, sac, runs):
    """One byte is enough. By args.json and, once that is the changed script's, by the checkpoint itself."""
    runs_dir = copy_of_stopped_run.parent
    line = refused(changed_sac, copy_of_stopped_run)
    assert line == (
        f"error: {copy_of_stopped_run} is of another version of rde_sac_dmc.py: the run would go on with changed code; "
        "if that is meant: --allow-changed-script"
    )
    args_json = (copy_of_stopped_run / "args.json").read_text()
    (copy_of_stopped_run / "args.json").write_text(args_json.replace(sac.SCRIPT_SHA256, changed_sac.SCRIPT_SHA256))
    line = refused(changed_sac, copy_of_stopped_run)
    assert line == (
        f"error: {copy_of_stopped_run}/checkpoint.pt is of another version of rde_sac_dmc.py: the run would go on with changed "
        "code; if that is meant: --allow-changed-script"
    )
    (copy_of_stopped_run / "args.json").write_text(args_json)

    result = run_main(changed_sac, "--resume", copy_of_stopped_run, "--allow-changed-script")
    assert result.returncode == 0, result.stderr
    assert_same_end(copy_of_stopped_run, runs("sac").path)  # it was but a comment
    content = json.loads((copy_of_stopped_run / "args.json").read_text())
    assert content["script_sha256"] == changed_sac.SCRIPT_SHA256 != sac.SCRIPT_SHA256
    assert "finished already" in auto(changed_sac, "sac", runs_dir).stdout
    # What is finished for the one is not for the other, which begins a run of its own.
    assert error_line(run_main(sac, "--resume", copy_of_stopped_run)).endswith("--allow-changed-script")
    result = auto(sac, "sac", runs_dir, "--check-only")
    assert (result.returncode, result.stdout) == (0, "")
    assert "finished already" in auto(sac, "sac", runs_dir, "--allow-changed-script").stdout


def test_auto_goes_on_with_a_changed_script_where_that_is_allowed(copy_of_stopped_run, changed_sac, runs):
    result = auto(changed_sac, "sac", copy_of_stopped_run.parent, "--allow-changed-script")
    assert result.returncode == 0 and f"continuing {copy_of_stopped_run} at step {STOPS['sac']}" in result.stdout
    assert_same_end(copy_of_stopped_run, runs("sac").path)


def test_two_scripts_of_one_name_are_not_taken_for_each_other(changed_sac, sac, tmp_path):
    """Of two checkouts, with one folder of runs; the other one is run as a command."""
    arguments = [*QUICK_SAC, "--total-timesteps", "300", "--runs-dir", tmp_path / "runs", "--resume", "auto"]
    assert run_main(sac, *arguments).returncode == 0
    other = [sys.executable, changed_sac.__file__, *map(str, arguments)]
    result = subprocess.run(other, capture_output=True, text=True, env=environment(), check=False)
    assert result.returncode == 0 and "the run is in" in result.stdout, result.stderr
    for script in (sac, changed_sac):
        result = run_main(script, *arguments)
        assert result.returncode == 0 and "is finished already" in result.stdout, result.stderr
    assert len(list((tmp_path / "runs").iterdir())) == 2
    hashes = {json.loads(path.read_text())["script_sha256"] for path in tmp_path.glob("runs/*/args.json")}
    assert hashes == {sac.SCRIPT_SHA256, changed_sac.SCRIPT_SHA256}


@pytest.mark.parametrize("copy_of_stopped_run", ["sr"], indirect=True)
@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_folder_of_another_script_is_not_taken_over(copy_of_stopped_run, with_checkpoint, rde):
    """Although every argument of SR+DQN is one of RDE+DQN, too, and the checkpoint may be gone."""
    if not with_checkpoint:
        (copy_of_stopped_run / "checkpoint.pt").unlink()
    for arguments in ([], ["--allow-changed-script"]):
        line = refused(rde, copy_of_stopped_run, *arguments)
        assert line == f"error: {copy_of_stopped_run} is a run folder of sr_dqn_atari.py, not of rde_dqn_atari.py"
    arguments = [*arguments_of("sr"), "--exp-name", "sr_dqn_atari", "--runs-dir", str(copy_of_stopped_run.parent)]
    assert rde.find_run(rde.tyro.cli(rde.Args, args=arguments)) is None


# ------------------------------------------------------------------------------------------------------------ a long run


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
