"""Disks that are full: Python's own exception, and what is there stays. On real file systems of a few megabytes."""

import contextlib
import pathlib
import shutil
import subprocess

import pytest

from conftest import arguments_of, assert_same_end, go_on, load_script, only_run, run_main, run_script


@contextlib.contextmanager
def small_disk(path: pathlib.Path, size: str):
    """A real file system of that size; needs the right to mount."""
    path.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(disk: pathlib.Path, free_kilobytes: int = 0) -> None:
    """Leaves so much of it."""
    free = shutil.disk_usage(disk).free - 1024 * free_kilobytes
    with open(disk / "filler", "ab") as file:
        file.write(bytes(free))
    assert shutil.disk_usage(disk).free <= 1024 * free_kilobytes


# Checkpoints are of steps 50, 100, ... 300, then the weights follow; the fifth write is the checkpoint at 250.
@pytest.mark.parametrize("number, kilobytes, written, step", [(5, 0, "checkpoint", 200), (5, 16, "checkpoint", 200),
                                                              (7, 0, "model", 300)])  # fmt: skip
def test_full_while_a_file_is_written(number, kilobytes, written, step, tmp_path, runs, monkeypatch):
    """The new checkpoint fits not at all or only in part, or there is no room for the weights: the last checkpoint stays, and
    with more room the run goes on from it.
    """
    script, calls = load_script("rde_dqn"), []
    write = script.Run.write

    def filling(run, name, content):
        calls.append(name)
        if len(calls) == number:
            fill(disk, kilobytes)
        write(run, name, content)

    with small_disk(tmp_path / "disk", "10m") as disk:
        with monkeypatch.context() as patch:
            patch.setattr(script.Run, "write", filling)
            result = run_main(script, *arguments_of("cartpole"), "--runs-dir", disk / "runs")
        path = only_run(disk / "runs")
        assert result.returncode == 1 and calls[-1] == f"{written}.pt" and len(calls) == number
        error = f"OSError: {path}/{written}.pt was not written. Is the disk full?"
        assert error in result.stderr or "OSError: [Errno 28] No space left on device" in result.stderr
        assert (path / "checkpoint.pt").exists() and not (path / "model.pt").exists()
        (disk / "filler").unlink()
        if step == 300:
            monkeypatch.setattr(script.Agent, "update", None)  # nothing is left to do but the final evaluation
        result = go_on("cartpole", path)
        assert result.returncode == 0 and f"continuing {path} at step {step}, " in result.stdout, result.stderr
        monkeypatch.undo()
        assert_same_end(path, runs("cartpole").path)


@pytest.mark.parametrize("free_kilobytes", [0, 100])
def test_full_while_logs_are_written(free_kilobytes, tmp_path, runs):
    """At the script's text, at the CSV files, at TensorBoard's pages. In a process of its own, which ends and does not hang."""
    with small_disk(tmp_path / "disk", "400k") as disk:
        fill(disk, free_kilobytes)
        arguments = [*arguments_of("cartpole"), "--runs-dir", disk / "runs"]
        result = run_script("rde_dqn", *arguments)
        assert result.returncode == 1 and "No space left on device" in result.stderr
        assert not list(disk.glob("runs/*/model.pt*")) and not list(disk.glob("runs/*/checkpoint.pt"))
        (disk / "filler").unlink()
        assert run_main(load_script("rde_dqn"), *arguments).returncode == 0
        assert_same_end(only_run(disk / "runs"), runs("cartpole").path)
