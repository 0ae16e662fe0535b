"""The same command again: after a kill or a signal the end is that of the run that nobody touched. What is another run."""

import contextlib
import errno
import functools
import io
import json
import os
import random
import re
import signal
import subprocess
import time

import psutil
import pytest
import torch

from conftest import (
    QUICK_CARTPOLE,
    RUNS,
    STOPPED_AT,
    AtStep,
    InEvaluation,
    Started,
    arguments_of,
    assert_same_end,
    equal,
    error_line,
    go_on,
    kill_by,
    kill_when,
    load_script,
    model,
    only_run,
    read_csv,
    rows,
    run_main,
    scalars,
    snapshot,
    stop_when,
)

# ------------------------------------------------------------------------------------------------------- killed, stopped

# Of every script a run that is killed -9 between two checkpoints, stopped by SIGTERM in an evaluation, and by SIGINT between
# two steps, in the middle of games. After the kill it goes on at the checkpoint before.
DISTURBED = {
    "dqn": (AtStep(230), 180, InEvaluation("scheduled", 50), AtStep(370)),
    "sr": (InEvaluation("after_reset", 30), 450, InEvaluation("after_reset", 60), AtStep(530)),
    "rde": (AtStep(430), 360, InEvaluation("before_reset", 30, since=500), AtStep(580)),
    "drq": (InEvaluation("before_reset", 30), 270, InEvaluation("after_reset", 30), AtStep(330)),
    "rnd": (AtStep(350), 270, InEvaluation("final", 30), AtStep(400)),
    "sac": (AtStep(1150), 1000, InEvaluation("after_reset", 500), AtStep(1390)),
    "safety": (InEvaluation("scheduled", 10), 180, InEvaluation("after_reset", 20), AtStep(300)),
    "cartpole": (InEvaluation("after_reset", 5), 150, InEvaluation("before_reset", 8, since=200), AtStep(285)),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTURBED)
def test_killed_and_stopped_it_ends_as_the_run_that_nobody_touched(name, tmp_path, runs):
    killed_at, checkpoint, in_evaluation, at_step = DISTURBED[name]
    script, arguments = load_script(RUNS[name][0]), [*arguments_of(name), "--runs-dir", tmp_path]
    kill_when(killed_at, script, *arguments)
    stopped = stop_when(in_evaluation, script, *arguments)
    path = only_run(tmp_path)
    assert stopped.returncode == 143 and f"continuing {path} at step {checkpoint}, " in stopped.stdout
    stopped_again = stop_when(at_step, script, *arguments, number=signal.SIGINT)
    last = run_main(script, *arguments)
    assert (stopped_again.returncode, last.returncode) == (130, 0), last.stderr
    for before, after in ((stopped, stopped_again), (stopped_again, last)):
        (step,) = re.findall(r"^stopped at step (\d+); the same command goes on from there$", before.stderr, re.MULTILINE)
        assert f"continuing {path} at step {step}, with 1 thread(s) as before\n" in after.stdout
    assert_same_end(path, runs(name).path)
    assert only_run(tmp_path).name == runs(name).path.name


def half_of_a_checkpoint(number: int, script) -> None:
    """Ends the process when half of the so many-th checkpoint is written."""
    save, num_saved = script.torch.save, []

    def half(content, file):
        buffer = io.BytesIO()
        save(content, buffer)
        num_saved.append("checkpoint" in file.name)
        end = len(num_saved) == number
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2 if end else None])
        if end:
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    script.torch.save = half


def model_without_the_removal_of_the_checkpoint(script) -> None:
    """And with a TensorBoard that writes slowly."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    RecordWriter.write = lambda writer, data: (time.sleep(0.5 if b"eval/" in data else 0), write(writer, data))
    script.Run.remove_checkpoint = lambda run: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("number, step", [(1, 0), (4, 150)])
def test_killed_while_a_checkpoint_is_written(number, step, tmp_path, script, runs):
    """The one before stays, and the half of the other one is in nobody's way. Before the first one the run is begun anew."""
    kill_by(functools.partial(half_of_a_checkpoint, number), script, *arguments_of("cartpole"), "--runs-dir", tmp_path)
    path = only_run(tmp_path)
    assert (path / "checkpoint.pt.tmp").exists() and (path / "checkpoint.pt").exists() == (number > 1)
    result = go_on("cartpole", path)
    assert (result.returncode, f"at step {step}," in result.stdout) == (0, number > 1), result.stderr
    assert_same_end(path, runs("cartpole").path)


def test_killed_between_model_and_the_removal_of_the_checkpoint(tmp_path, script, runs):
    """All points are there, from a slow writer, too. The next call takes the checkpoint away; the run is finished."""
    kill_by(model_without_the_removal_of_the_checkpoint, script, *arguments_of("cartpole"), "--runs-dir", tmp_path)
    path = only_run(tmp_path)
    assert (path / "model.pt").exists() and (path / "checkpoint.pt").exists()
    before = snapshot(path)
    result = go_on("cartpole", path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"the run in {path} is finished\n", "")
    del before["checkpoint.pt"]
    assert snapshot(path) == before
    assert_same_end(path, runs("cartpole").path)


@pytest.mark.slow
@pytest.mark.parametrize("name", DISTURBED)
def test_killed_at_20_random_moments(name, tmp_path, runs):
    """Five runs, each killed four times on its way, wherever it is."""
    random.seed(name)
    for i in range(5):
        arguments = [*arguments_of(name), "--runs-dir", tmp_path / f"{i}"]
        for number in range(4):
            started = Started(RUNS[name][0], *arguments, log=tmp_path / f"log{i}{number}.txt")
            started.wait_for(started.begun)
            time.sleep(random.uniform(0, 3))
            started.end(signal.SIGKILL)
        assert run_main(load_script(RUNS[name][0]), *arguments).returncode == 0
        assert_same_end(only_run(tmp_path / f"{i}"), runs(name).path)


# ------------------------------------------------------------------------------------------------- the same command again


@pytest.fixture(scope="module")
def script():
    return load_script("rde_dqn")


def test_the_same_command_three_times(copy_of_stopped_run, runs):
    """It was begun and stopped, between two points of the curves; it goes on; it is finished. The clock goes on, too."""
    path = copy_of_stopped_run
    content = torch.load(path / "checkpoint.pt", weights_only=True)
    content["parts"]["run"]["wall_seconds"] += 1_000  # as if it had taken longer
    torch.save(content, path / "checkpoint.pt")
    num_before = len(rows(path, "episodes.csv"))
    result = go_on("cartpole", path)
    assert result.returncode == 0, result.stderr
    first, second, *_, last = result.stdout.splitlines()
    assert first == f"continuing {path} at step {STOPPED_AT}, with 1 thread(s) as before"
    assert re.search(r"parameters, .*, 00:\d\d left; in ", second) and last == f"the run is in {path}"
    assert "| 300/300 [" in result.stderr  # the bar, too, goes on
    assert_same_end(path, runs("cartpole").path)
    seconds = [float(row["wall_seconds"]) for row in read_csv(path / "episodes.csv")]
    assert all(1_000 < time < 2_000 for time in seconds[num_before:]) and len(seconds) > num_before

    before = snapshot(path)
    result = go_on("cartpole", path)
    assert (result.returncode, result.stdout) == (0, f"the run in {path} is finished\n")
    assert snapshot(path) == before and only_run(path.parent) == path


def test_another_process_is_at_work(script, tmp_path):
    """It is left alone. As a command it saves and says how to go on when a signal comes."""
    arguments = "--total-timesteps 500000 --eval-interval 0 --reset-interval 0 --runs-dir".split()
    arguments = [*QUICK_CARTPOLE, *arguments, tmp_path]
    started = Started("rde_dqn", *arguments, log=tmp_path.parent / f"{tmp_path.name}.txt")
    started.wait_for(lambda: started.begun() and rows(only_run(tmp_path), "episodes.csv"))
    started.process.send_signal(signal.SIGSTOP)  # time to look at it from outside
    path = only_run(tmp_path)
    before, other = snapshot(path), run_main(script, *arguments)
    assert error_line(other, 75) == f"error: another process is at work in {path}"
    assert other.stdout == "" and snapshot(path) == before
    started.process.send_signal(signal.SIGTERM)
    assert started.end(signal.SIGCONT) == 143
    line = started.printed().strip().splitlines()[-1]
    step = int(re.fullmatch(r"stopped at step (\d+); the same command goes on from there", line)[1])
    result = stop_when(lambda run: True, script, *arguments)
    assert f"continuing {path} at step {step}, " in result.stdout and not (path / "model.pt").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(copy_of_stopped_run, script, runs, number, monkeypatch):
    """One warning, and the run goes on."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(script.fcntl, "flock", flock)
        result = go_on("cartpole", copy_of_stopped_run)
    warning = f"warning: {copy_of_stopped_run} knows no locks ({os.strerror(number)}); let only one process work there"
    assert result.returncode == 0 and [line for line in result.stderr.splitlines() if "lock" in line] == [warning]
    assert_same_end(copy_of_stopped_run, runs("cartpole").path)


def test_signals_that_come_again_and_again_destroy_nothing(script, runs, tmp_path):
    """The second one, and more while the checkpoint is written; before the first step, too."""

    def impatient(run):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return False

    with pytest.MonkeyPatch.context() as patch:
        write = script.Run.write
        patch.setattr(script.Run, "write", lambda run, *rest: (impatient(run), write(run, *rest), impatient(run))[1])
        result = stop_when(impatient, script, *arguments_of("cartpole"), "--runs-dir", tmp_path)
    assert result.returncode == 130 and "stopped at step 0; the same command goes on" in result.stderr
    result = go_on("cartpole", only_run(tmp_path))
    assert f"continuing {only_run(tmp_path)} at step 0, " in result.stdout
    assert_same_end(only_run(tmp_path), runs("cartpole").path)


def test_weights_kept_during_a_run_are_the_same_after_a_kill(script, runs, tmp_path):
    """At 4 times of the run, rounded up to a loop step; nothing else changes. Killed between one and the next checkpoint."""
    arguments = [*arguments_of("cartpole"), "--keep-models", 4, "--runs-dir"]
    names = [f"models/step_{step:08d}.pt" for step in (76, 150, 226, 300)]
    assert run_main(script, *arguments, tmp_path / "undisturbed").returncode == 0
    kill_when(AtStep(230), script, *arguments, tmp_path / "killed")
    undisturbed, killed = (only_run(tmp_path / name) for name in ("undisturbed", "killed"))
    assert (killed / names[2]).exists()
    result = run_main(script, *arguments, tmp_path / "killed")
    assert result.returncode == 0 and "at step 200, " in result.stdout
    assert_same_end(killed, undisturbed)
    for path in (undisturbed, killed):
        assert sorted(str(file.relative_to(path)) for file in path.glob("models/*")) == names
    models = [model(undisturbed, name) for name in names]
    assert equal(models, [model(killed, name) for name in names]) and equal(models[-1], model(undisturbed))
    assert not any(equal(ours, theirs) for i, ours in enumerate(models) for theirs in models[:i])
    for name in ("episodes.csv", "evaluations.csv"):
        assert rows(undisturbed, name) == rows(runs("cartpole").path, name)


def test_the_video_of_an_evaluation_that_was_stopped_is_written_anew(script, runs, tmp_path, monkeypatch):
    """It is written when the evaluation is over, with a picture for every step; the run is the same."""
    moviepy, lengths = pytest.importorskip("moviepy"), []
    make_clip = moviepy.ImageSequenceClip
    count = lambda frames, fps: lengths.append(len(frames)) or make_clip(frames, fps=fps)
    monkeypatch.setattr(moviepy, "ImageSequenceClip", count)
    arguments = [*arguments_of("cartpole"), "--capture-video", "--runs-dir", tmp_path]
    for number, end in ((5, lambda: stop_when(InEvaluation("final", 4), script, *arguments)),
                        (6, lambda: run_main(script, *arguments))):  # fmt: skip
        assert end().returncode == (143 if number == 5 else 0)
        path = only_run(tmp_path)
        first = [row for row in read_csv(path / "evaluations.csv") if row["episode"] == "0"]
        videos = [f"step-{row['global_step']}-{row['phase']}.mp4" for row in first]
        assert sorted(video.name for video in path.glob("videos/*")) == sorted(videos) and len(videos) == number
    assert lengths == [1 + float(row["episodic_return"]) for row in first]  # a point for every step
    for video in path.glob("videos/*"):
        with moviepy.VideoFileClip(str(video)) as clip:  # which leaves out a frame now and then
            assert clip.fps == 50 and clip.reader.n_frames == pytest.approx(clip.duration * 50, abs=1) and clip.duration > 0.1
    assert_same_end(path, runs("cartpole").path)


def test_a_resumed_run_has_as_many_threads_as_before(copy_of_stopped_run, script):
    """OMP_NUM_THREADS is 1 here. It is stopped again at once: the next checkpoint says the same."""
    checkpoint, said = copy_of_stopped_run / "checkpoint.pt", []
    content = torch.load(checkpoint, weights_only=True)
    content["parts"]["run"]["num_threads"] = 2
    torch.save(content, checkpoint)
    try:
        arguments = [*arguments_of("cartpole"), "--runs-dir", copy_of_stopped_run.parent]
        result = stop_when(lambda run: said.append(torch.get_num_threads()) or True, script, *arguments)
    finally:
        torch.set_num_threads(1)
    assert said == [2] and "with 2 thread(s) as before" in result.stdout and "on CPU (2 thread(s))" in result.stdout
    assert torch.load(checkpoint, weights_only=True)["parts"]["run"]["num_threads"] == 2


def test_an_environment_that_raises(script, tmp_path, runs, monkeypatch):
    """Python's own exception. What the files were told is there; and with a sound environment the run goes on."""
    step = script.Task.step

    def failing(env, action):
        if script.Run.progress is not None and script.Run.progress.n >= 240:
            raise RuntimeError("out of order")
        return step(env, action)

    with monkeypatch.context() as patch:
        patch.setattr(script.Task, "step", failing)
        result = run_main(script, *arguments_of("cartpole"), "--runs-dir", tmp_path)
    assert result.returncode == 1 and "\nRuntimeError: out of order\n" in result.stderr
    path, undisturbed = only_run(tmp_path), runs("cartpole").path
    logged, expected = scalars(path), scalars(undisturbed)
    assert len(rows(path, "episodes.csv")) == len(logged["charts/episodic_return"]) > 1
    for tag, points in logged.items():
        assert points == [point for point in expected[tag] if point[0] <= 240], tag
    result = go_on("cartpole", path)
    assert result.returncode == 0 and f"continuing {path} at step 200, " in result.stdout
    assert_same_end(path, undisturbed)


# ------------------------------------------------------------------------------------------------- what is another run


@pytest.fixture
def changed_script(tmp_path):
    """A copy in another folder, with one more comment."""
    path = tmp_path / "changed" / "rde_dqn.py"
    path.parent.mkdir()
    path.write_bytes(open(load_script("rde_dqn").__file__, "rb").read() + b"#")
    return load_script("changed", path)


def test_a_changed_script_is_another_run_and_a_note_says_how_to_go_on_with_it(copy_of_stopped_run, changed_script, runs):
    """One byte is enough. What the note says is done here, and the run ends as it would have (it was but a comment).

    The folder's name has a blank: pasted without quotes, `rm -r` would remove something else.
    """
    runs_dir = copy_of_stopped_run.parent / "my runs"
    arguments = [*arguments_of("cartpole"), "--runs-dir", runs_dir]
    runs_dir.mkdir()
    path = copy_of_stopped_run.rename(runs_dir / copy_of_stopped_run.name)
    before = snapshot(path)
    result = stop_when(AtStep(20), changed_script, *arguments)
    (other,) = set(runs_dir.iterdir()) - {path}
    line = (f"note: {path} is not finished, and not continued: its script or arguments are others. To go on "
            f"with it in place of this run, stop and: rm -r '{other}' && mv '{path}' '{other}'")  # fmt: skip
    assert result.returncode == 143 and result.stdout.splitlines()[0] == line and snapshot(path) == before
    assert other.name[:-8] == path.name[:-8] and re.fullmatch("[0-9a-f]{8}", other.name[-8:])
    assert (other / "rde_dqn.py").read_bytes() == before["rde_dqn.py"] + b"#"
    # Typed again it goes on, and says nothing of the other one.
    assert "note:" not in stop_when(AtStep(40), changed_script, *arguments).stdout

    subprocess.run(["bash", "-c", line.split("stop and: ")[1]], check=True)
    result = run_main(changed_script, *arguments)
    assert result.returncode == 0 and f"continuing {other} at step" in result.stdout
    assert_same_end(only_run(runs_dir), runs("cartpole").path)
    assert (other / "rde_dqn.py").read_bytes().endswith(b"#")
    hashes = [json.loads(text)["script_sha256"] for text in (before["args.json"], (other / "args.json").read_text())]
    assert hashes[0] != hashes[1]
    # A finished run beside it is no news.
    assert "note:" not in stop_when(AtStep(20), load_script("rde_dqn"), *arguments).stdout


def test_which_arguments_make_another_run(script, copy_of_stopped_run):
    """All but those that change no result; whatever the current folder, and the form of --runs-dir, is."""
    args_with = lambda words: script.tyro.cli(script.Args, args=[*map(str, arguments_of("cartpole")), *words.split()])
    name_with = lambda words: script.run_name(args_with(words))
    name = name_with("")
    assert name == copy_of_stopped_run.name and re.fullmatch(r"CartPole-v1__rde_dqn__1__[0-9a-f]{8}", name)
    for words in ("--runs-dir elsewhere", "--checkpoint-interval 7", "--track --wandb-project-name a --wandb-entity b"):
        assert name_with(words) == name
    differences = ["--seed 5", "--gamma 0.9", "--total-timesteps 2052", "--exp-name a", "--no-cuda", "--capture-video",
                   "--bf16", "--keep-models 2", "--eval-episodes 3", "--beta 50"]  # fmt: skip
    assert len({*map(name_with, differences), name}) == len(differences) + 1
    # The name has characters that file systems and W&B take.
    name = script.run_name(script.Args(env_id="mine.tasks:Odd/Täsk#1?%", exp_name="a b:c\\d"))
    assert re.fullmatch(r"mine\.tasks-Odd-T-sk-1--__a-b-c-d__1__[0-9a-f]{8}", name)


@pytest.mark.parametrize("runs_dir", ["~/mine", "a [b]*"])
def test_the_folder_of_runs_may_be_in_the_home_directory_or_have_odd_characters(script, runs, runs_dir, tmp_path, monkeypatch):
    """Its checkpoints and leftovers are found there, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = [*arguments_of("cartpole"), f"--runs-dir={runs_dir}"]
    assert stop_when(AtStep(100), script, *arguments).returncode == 143
    path = only_run(tmp_path / runs_dir.removeprefix("~/"))
    (path / "checkpoint.pt.tmp").touch()
    assert only_run(tmp_path) == path.parent and run_main(script, *arguments).returncode == 0
    assert_same_end(path, runs("cartpole").path)


# ------------------------------------------------------------------------------------------------------------ a long run


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """50,000 steps on a cheap setting: resident memory at the end within 3 % of that after the buffer is full."""
    arguments = "--env-id BreakoutNoFrameskip-v4 --total-timesteps 50000 --learning-starts 1000 --replay-ratio 0.02 "
    arguments += "--batch-size 8 --buffer-size 2000 --eval-interval 0 --eval-episodes 1 --reset-interval 100 --reset-depth full"
    arguments += " --num-envs 2 --checkpoint-interval 5000 --runs-dir"
    started, samples = Started("rde_dqn_atari", *arguments.split(), tmp_path / "runs", log=tmp_path / "log.txt"), []
    resident = psutil.Process(started.process.pid)
    while started.process.poll() is None:
        with contextlib.suppress(psutil.Error, OSError, ValueError):
            last_step = int((only_run(tmp_path / "runs") / "episodes.csv").read_text().splitlines()[-1].split(",")[0])
            samples.append((last_step, resident.memory_info().rss))
        time.sleep(0.5)
    assert started.end() == 0
    full = [memory for step, memory in samples if 6_000 < step < 12_000]  # after the first checkpoint and resets as well
    end = [memory for step, memory in samples if step > 44_000]
    assert full and end and max(end) <= 1.03 * max(full), (max(full), max(end))
