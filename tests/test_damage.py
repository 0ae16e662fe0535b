"""Files of a run that are not what they should be: one line, exit code 1, and nothing is changed; never a stack trace."""

import os
import random
import shutil
import sys

import pytest
import torch

from conftest import assert_same_end, equal, error_line, go_on, load_script, scalars, snapshot


def cut_off(name: str, part: float):
    return lambda path: os.truncate(path / name, int(os.path.getsize(path / name) * part))


def rewritten(change):
    """Saved anew, with a change of its content."""

    def damage(path):
        content = torch.load(path / "checkpoint.pt", weights_only=True)
        change(content)
        torch.save(content, path / "checkpoint.pt")

    return damage


class Command:
    """A pickle that would run a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def write(content):
    return lambda path: torch.save(content, path / "checkpoint.pt")


NOT_A_ZIP = "BadZipFile: File is not a zip file"


@pytest.mark.parametrize("damage, message", [
    (cut_off("checkpoint.pt", 0.5), NOT_A_ZIP),
    (lambda path: (path / "checkpoint.pt").write_bytes(b"not a checkpoint" * 10), NOT_A_ZIP),
    (write({"actors": 1}), "KeyError: 'versions'"),
    (write([1]), "TypeError: "),
    (write(Command()), "UnpicklingError: Weights only load failed"),
    (rewritten(lambda content: content["versions"].update(torch="1")), "it was written with {'torch': '1'}, but here is {'"),
    (rewritten(lambda content: content["versions"].update(device="cuda")), "'device': 'cuda'"),
    (rewritten(lambda content: content["versions"].pop("numpy")), "it was written with {}, but here is {'numpy': '"),
    (rewritten(lambda content: content["parts"].pop("buffer")), "KeyError: 'buffer'"),
    (rewritten(lambda content: content["parts"]["run"].pop("agenda")), "KeyError: 'agenda'"),
    (rewritten(lambda content: content["parts"].update(observations=torch.zeros(7, 3))), "observations does not fit"),
    (rewritten(lambda content: content["parts"]["envs"].pop()), "ValueError: zip() argument 2 is shorter"),
    (rewritten(lambda content: content["parts"]["agent"]["q_networks"].popitem()), "RuntimeError: Error(s) in load"),
    (cut_off("episodes.csv", 0.99), "shorter than it was"),
    (cut_off("evaluations.csv", 0.1), "ValueError: evaluations.csv is shorter than it was then"),
    (lambda path: (path / "evaluations.csv").unlink(), "FileNotFoundError: [Errno 2] No such file or directory: "),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit(copy_of_stopped_run, damage, message, monkeypatch):
    """The line says what is wrong; and nothing in the file is executed."""
    monkeypatch.chdir(copy_of_stopped_run.parent)
    damage(copy_of_stopped_run)
    before = snapshot(copy_of_stopped_run)
    line = error_line(go_on("cartpole", copy_of_stopped_run))
    assert snapshot(copy_of_stopped_run) == before
    assert line.startswith(f"error: the run cannot go on from {copy_of_stopped_run}/checkpoint.pt: ") and message in line
    assert os.listdir(copy_of_stopped_run.parent) == [copy_of_stopped_run.name]


@pytest.mark.parametrize("error", [RuntimeError("unable to mmap 9 bytes:\nCannot allocate memory (12)"), MemoryError("of it")])
def test_lack_of_memory_is_not_called_damage(error, copy_of_stopped_run, monkeypatch):
    """Who reads that a checkpoint is damaged may delete it."""

    def lack(*arguments, **options):
        raise error

    monkeypatch.setattr(load_script("rde_dqn").torch, "load", lack)
    before = snapshot(copy_of_stopped_run)
    line = error_line(go_on("cartpole", copy_of_stopped_run))
    assert line.endswith(f"/checkpoint.pt: {type(error).__name__}: {' '.join(str(error).split())}") and "damage" not in line
    assert snapshot(copy_of_stopped_run) == before


def test_a_bit_that_is_flipped_anywhere(copy_of_stopped_run, monkeypatch, capsys):
    """The checkpoint is refused, or loaded as it was (there are bits that hold nothing), wherever it is damaged."""
    script, found, random_numbers = load_script("rde_dqn"), [], random.Random(1)
    monkeypatch.setattr(script.Run, "announce", lambda run, *rest: (found.append(run), sys.exit()))
    assert go_on("cartpole", copy_of_stopped_run).returncode == 0
    (run,), path, num_refused = found, copy_of_stopped_run / "checkpoint.pt", 0
    expected, content = torch.load(path, weights_only=True)["parts"], path.read_bytes()
    # Many at both ends: there are the pickled program and the directory of the archive.
    ranges = [range(len(content))] * 60 + [range(1_000)] * 40 + [range(len(content) - 3_000, len(content))] * 100
    for position in map(random_numbers.choice, ranges):
        damaged = bytearray(content)
        damaged[position] ^= 1 << random_numbers.randrange(8)
        path.write_bytes(damaged)
        try:
            run.load()
            assert equal({name: script.state_of(part) for name, part in run.parts.items()}, expected), position
        except SystemExit as end:
            assert end.code == 1 and capsys.readouterr().err.startswith(f"error: the run cannot go on from {path}: ")
            num_refused += 1
    assert num_refused > 100


def test_what_was_written_after_the_checkpoint_is_cut_off(copy_of_stopped_run, runs):
    """Rows in the CSVs, and half an event: of a process that was killed. The rest is as if it had never been there."""
    for file in copy_of_stopped_run.glob("e*"):
        file.write_bytes(file.read_bytes() + b"1400,half a row")
    result = go_on("cartpole", copy_of_stopped_run)
    assert result.returncode == 0, result.stderr
    assert_same_end(copy_of_stopped_run, runs("cartpole").path)
    for name in ("episodes.csv", "evaluations.csv"):
        content = (copy_of_stopped_run / name).read_bytes()
        assert b"half a row" not in content and b"\0" not in content


def test_curves_that_were_lost_are_no_reason_to_stop(copy_of_stopped_run):
    """TensorBoard's files are for people: what they still have is shown, and the run goes on."""
    for file in copy_of_stopped_run.glob("events.*"):
        file.unlink()
    assert go_on("cartpole", copy_of_stopped_run).returncode == 0
    assert [step for step, _ in scalars(copy_of_stopped_run)["charts/epsilon"]] == [300]


def test_the_script_never_reads_args_json_and_a_link_to_a_folder_is_a_folder(copy_of_stopped_run, tmp_path, runs):
    """Nothing in a run depends on where its folder lies: moved to another disk, and linked."""
    (copy_of_stopped_run / "args.json").write_text("{")
    moved = shutil.move(copy_of_stopped_run, tmp_path / "elsewhere")
    copy_of_stopped_run.symlink_to(moved)
    result = go_on("cartpole", copy_of_stopped_run)
    assert result.returncode == 0, result.stderr
    assert_same_end(tmp_path / "elsewhere", runs("cartpole").path)
    assert (tmp_path / "elsewhere" / "args.json").read_bytes() != b"{"
