"""Disks that are full, or cannot be written: one line, and what is there stays. On real file systems of a few megabytes."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess

import pytest

from conftest import (
    QUICK_SAC,
    RUNS,
    assert_same_end,
    equal,
    error_line,
    load_script,
    model,
    only_run,
    refused,
    run_main,
    run_script,
)


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


def fill(disk: pathlib.Path, free_kilobytes: int = 0) -> None:
    """Leaves so much of it."""
    free = shutil.disk_usage(disk).free - 1024 * free_kilobytes
    with open(disk / "filler", "ab") as file:
        file.write(bytes(free))
    assert shutil.disk_usage(disk).free <= 1024 * free_kilobytes


def full_at(monkeypatch, disk: pathlib.Path, cls, method: str, call: int, free_kilobytes: int) -> None:
    """Fills the disk before a method is called for the so many-th time."""
    real, calls = getattr(cls, method), []

    def filling(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            fill(disk, free_kilobytes)
        return real(*arguments)

    monkeypatch.setattr(cls, method, filling)


@pytest.mark.parametrize("name, kilobytes", [("dqn", 8_000), ("sac", 40)])
def test_full_while_a_checkpoint_is_written(name, kilobytes, tmp_path, runs, monkeypatch):
    """The second one fits only in part: the first one stays, and with more room the run goes on."""
    script, arguments = RUNS[name]
    module = load_script(script)
    with small_disk(tmp_path / "disk", "100m") as disk, monkeypatch.context() as patch:
        full_at(patch, disk, module.Run, "save", 2, kilobytes)
        arguments = [*arguments, "--checkpoint-interval", "400" if name == "sac" else "250", "--runs-dir", disk / "runs"]
        line = error_line(run_main(module, *arguments))
        path = only_run(disk / "runs")
        # A full disk is an OSError or PyTorch's RuntimeError.
        assert re.search(
            r"checkpoint\.pt was not written: .*, \d+ MB are free; what was written stays, and the run can be", line
        )
        assert (path / "checkpoint.pt").exists() and not (path / "checkpoint.pt.tmp").exists()
        patch.undo()
        (disk / "filler").unlink()
        result = run_main(module, "--resume", path)
        assert result.returncode == 0, result.stderr
        assert f"continuing {path} at step {400 if name == 'sac' else 250}" in result.stdout
        assert_same_end(path, runs(name).path)


def test_full_when_the_weights_are_written(tmp_path, runs, sac, monkeypatch):
    """The checkpoint of the end stays. With more room there is nothing left to do but the final evaluation."""
    with small_disk(tmp_path / "disk", "100m") as disk, monkeypatch.context() as patch:
        full_at(patch, disk, sac.Run, "write", 2, 0)  # after the last checkpoint
        line = error_line(run_main(sac, *RUNS["sac"][1], "--runs-dir", disk / "runs"))
        path = only_run(disk / "runs")
        assert "No space left on device" in line or f"{path}/model.pt was not written: 0 MB are free" in line
        assert line.endswith("; what was written stays, and the run can be continued from its last checkpoint with --resume")
        assert (path / "checkpoint.pt").exists() and not list(path.glob("model.pt*"))
        patch.undo()
        (disk / "filler").unlink()
        updates = []
        patch.setattr(sac.Agent, "update", updates.append)
        result = run_main(sac, "--resume", path)
        assert result.returncode == 0, result.stderr
        assert f"continuing {path} at step 2050" in result.stdout and updates == []
        assert_same_end(path, runs("sac").path)


def test_full_at_the_last_checkpoint_but_not_for_the_weights(tmp_path, runs, sac, monkeypatch):
    """The weights are smaller than a checkpoint: a warning, and the run comes to its end."""
    with small_disk(tmp_path / "disk", "100m") as disk, monkeypatch.context() as patch:
        full_at(patch, disk, sac.Run, "save", 1, 60)
        result = run_main(sac, *RUNS["sac"][1], "--runs-dir", disk / "runs")
        assert result.returncode == 0, result.stderr
        path = only_run(disk / "runs")
        assert re.search(r"warning: .*checkpoint\.pt was not written", result.stderr)
        assert equal(model(path), model(runs("sac").path))
        assert_same_end(path, runs("sac").path)


@pytest.mark.parametrize("free_kilobytes", [0, 4, 20])
def test_full_while_files_are_written(free_kilobytes, tmp_path):
    """At the folder's first file, at the CSV files, at TensorBoard's pages, at model.pt: one line, also when the process ends."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk, free_kilobytes)
        arguments = [*QUICK_SAC, "--total-timesteps", "700", "--checkpoint-interval", "0"]
        line = error_line(run_script("rde_sac_dmc", *arguments, "--runs-dir", disk / "runs"))
        assert "No space left on device" in line or "was not written: 0 MB are free" in line
        assert not list(disk.glob("runs/*/model.pt*")) and not list(disk.glob("runs/*/*.tmp"))


def test_a_run_that_is_read_only(tmp_path, stopped_runs, sac):
    with small_disk(tmp_path / "disk", "200m") as disk:
        path = pathlib.Path(shutil.copytree(stopped_runs("sac"), disk / stopped_runs("sac").name))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert "Read-only file system" in refused(sac, path)


@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
@pytest.mark.parametrize("folder", ["", "new"])
def test_a_folder_of_runs_that_is_read_only(tmp_path, sac, folder, resume):
    """A wrong argument as any other."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        line = error_line(run_main(sac, *QUICK_SAC, "--runs-dir", disk / folder, *resume), 2)
        assert line == f"error: a run folder in --runs-dir {disk / folder} cannot be made: Read-only file system"
        assert os.listdir(disk) == []
