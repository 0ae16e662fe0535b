"""Files of a run that are not what they should be: one line, exit code 1, and nothing is changed; never a stack trace."""

import contextlib
import json
import os
import pathlib
import random
import shutil

import pytest
import torch

from conftest import RUNS, assert_same_end, equal, load_script, refused, run_main, snapshot

# ------------------------------------------------------------------------------------------------------------ checkpoint.pt


def flip_a_byte(path):
    with open(path / "checkpoint.pt", "r+b") as file:
        position = os.path.getsize(path / "checkpoint.pt") // 2
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


def rewrite(path, **changes):
    content = torch.load(path / "checkpoint.pt", weights_only=True)
    torch.save(content | changes, path / "checkpoint.pt")


def rewrite_versions(path, **changes):
    rewrite(path, versions=torch.load(path / "checkpoint.pt", weights_only=True)["versions"] | changes)


def a_part_is_missing(path):
    parts = torch.load(path / "checkpoint.pt", weights_only=True)["parts"]
    del parts["buffer"]
    rewrite(path, parts=parts)


def a_part_of_another_size(path):
    parts = torch.load(path / "checkpoint.pt", weights_only=True)["parts"]
    rewrite(path, parts=parts | {"observations": torch.zeros(7, 3)})


@pytest.mark.parametrize("copy_of_stopped_run", ["rde", "sac"], indirect=True)
@pytest.mark.parametrize(
    "damage, message",
    [
        (flip_a_byte, "checkpoint.pt is damaged, cut off, or of another version of the scripts"),
        (cut_off, "checkpoint.pt is damaged, cut off, or of another version of the scripts"),
        (empty, "checkpoint.pt is damaged, cut off, or of another version of the scripts"),
        (garbage, "checkpoint.pt is damaged, cut off, or of another version of the scripts"),
        (
            lambda path: torch.save({"actors": 1}, path / "checkpoint.pt"),
            "checkpoint.pt is damaged, cut off, or of another version",
        ),
        (lambda path: torch.save([1], path / "checkpoint.pt"), "checkpoint.pt is damaged, cut off, or of another version"),
        (lambda path: change_argument(path, num_agents=3), "was written with num_agents = 2, but args.json says 3"),
        (lambda path: rewrite(path, script="dqn_atari.py"), "was written by dqn_atari.py, not by rde_"),
        (lambda path: rewrite_versions(path, torch="1.0"), "was written with torch 1.0, but here is"),
        (lambda path: rewrite_versions(path, device="cuda"), "was written with device cuda, but here is cpu"),
        (a_part_is_missing, "does not fit this version of the script"),
        (a_part_of_another_size, "does not fit this version of the script"),
    ],
)
def test_a_checkpoint_that_does_not_fit(copy_of_stopped_run, damage, message):
    """It is refused, also with a raised total, which args.json must not hold then."""
    damage(copy_of_stopped_run)
    script = copy_of_stopped_run.name.split("__")[1]
    line = refused(load_script(script), copy_of_stopped_run, "--total-timesteps", 2_100)
    assert message in line


@pytest.mark.parametrize("where", ["load_checkpoint", "restored"])
@pytest.mark.parametrize("error", [RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"), MemoryError(),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried")], ids=["mmap", "host", "cuda"])  # fmt: skip
def test_lack_of_memory_is_not_called_damage(where, error, copy_of_stopped_run, sac, monkeypatch):
    """Who reads that a checkpoint is damaged may delete it."""

    def lack(*arguments, **options):
        raise error

    monkeypatch.setattr(*((sac.torch, "load") if where == "load_checkpoint" else (sac, "restored")), lack)
    before = snapshot(copy_of_stopped_run)["checkpoint.pt"]
    result = run_main(sac, "--resume", copy_of_stopped_run)
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: out of memory (")
    assert snapshot(copy_of_stopped_run)["checkpoint.pt"] == before


def test_a_bit_that_is_flipped_anywhere(stopped_runs, sac, tmp_path):
    """The checkpoint is refused, or loaded as it was (there are bits that hold nothing), wherever it is damaged."""
    original = stopped_runs("sac") / "checkpoint.pt"
    args, device = sac.read_args(str(original.parent)), torch.device("cpu")
    expected, content = sac.load_checkpoint(str(original), args, device), bytearray(original.read_bytes())
    random_numbers, path = random.Random(1), tmp_path / "checkpoint.pt"
    # Many at both ends: there are the pickled program and the directory of the archive.
    positions = [random_numbers.randrange(len(content)) for _ in range(60)]
    positions += [random_numbers.randrange(1_000) for _ in range(40)]
    positions += [len(content) - 1 - random_numbers.randrange(3_000) for _ in range(100)]
    num_refused = 0
    for position in positions:
        damaged = content.copy()
        damaged[position] ^= 1 << random_numbers.randrange(8)
        path.write_bytes(damaged)
        try:
            assert equal(sac.load_checkpoint(str(path), args, device), expected), position
        except sac.RunError as error:
            assert str(error).startswith(f"{path} ")
            num_refused += 1
    assert num_refused > 100


def test_nothing_in_a_checkpoint_is_executed(copy_of_stopped_run, sac):
    """An archive with right checksums and a pickle that would run a command: refused, not run."""

    class Command:
        def __reduce__(self):
            return os.system, (f"touch {copy_of_stopped_run}/executed",)

    torch.save({"script": Command()}, copy_of_stopped_run / "checkpoint.pt")
    line = refused(sac, copy_of_stopped_run)
    assert line.endswith("checkpoint.pt holds more than numbers and tensors, and was not loaded")
    assert not (copy_of_stopped_run / "executed").exists()


# ---------------------------------------------------------------------------------------------------------------- args.json


def change(path, **changes):
    content = json.loads((path / "args.json").read_text())
    (path / "args.json").write_text(json.dumps(content | changes))


def change_argument(path, **changes):
    change(path, args=json.loads((path / "args.json").read_text())["args"] | changes)


def without_argument(path, name):
    arguments = json.loads((path / "args.json").read_text())["args"]
    del arguments[name]
    change(path, args=arguments)


DOES_NOT_FIT = "is not a run folder of {script}: its args.json does not fit"
NOT_ANY_MORE = "is not a run folder any more: in its args.json "


@pytest.mark.parametrize("without_checkpoint", [False, True])
@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: change_argument(path, num_agents="2"), NOT_ANY_MORE + "--num-agents is '2', but must be of the type int"),
        (
            lambda path: change_argument(path, num_agents=True),
            NOT_ANY_MORE + "--num-agents is True, but must be of the type int",
        ),
        (lambda path: change_argument(path, num_agents=2.0), NOT_ANY_MORE + "--num-agents is 2.0, but must be of the type int"),
        (
            lambda path: change_argument(path, num_agents=None),
            NOT_ANY_MORE + "--num-agents is None, but must be of the type int",
        ),
        (lambda path: change_argument(path, num_agents=0), NOT_ANY_MORE + "--num-agents is 0, but must lie in [1, inf)"),
        (lambda path: change_argument(path, cuda=1), NOT_ANY_MORE + "--cuda is 1, but must be of the type bool"),
        (lambda path: change_argument(path, gamma=False), NOT_ANY_MORE + "--gamma is False, but must be of the type float"),
        (lambda path: change_argument(path, gamma=float("nan")), NOT_ANY_MORE + "--gamma is nan, but must be a finite number"),
        (lambda path: change_argument(path, beta=float("inf")), NOT_ANY_MORE + "--beta is inf, but must be a finite number"),
        (lambda path: change_argument(path, seed=10**400), NOT_ANY_MORE + "--seed is a number, but must be a finite number"),
        (lambda path: change_argument(path, env_id=["a"]), NOT_ANY_MORE + "--env-id is ['a'], but must be of the type str"),
        (lambda path: change_argument(path, wandb_entity=1), NOT_ANY_MORE + "--wandb-entity is 1, but must be of the type"),
        (lambda path: without_argument(path, "seed"), DOES_NOT_FIT),  # a default would take its place
        (lambda path: without_argument(path, "keep_models"), DOES_NOT_FIT),
        (lambda path: change_argument(path, unknown=1), DOES_NOT_FIT),
        (lambda path: change_argument(path, resume="auto"), DOES_NOT_FIT),
        (lambda path: change(path, args=[1, 2]), DOES_NOT_FIT),
        (lambda path: change(path, args=None), DOES_NOT_FIT),
        (lambda path: change(path, script=None), "is a run folder of None, not of {script}"),
        (lambda path: change(path, script_sha256=None), "is of another version of {script}"),
        (lambda path: (path / "args.json").write_text("[]"), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_text('{"args": {}}'), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_text(""), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_text("{"), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_text("[" * 100_000), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_text('{"script":' * 100_000), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_text('{"args": ' + "9" * 10_000 + "}"), DOES_NOT_FIT),
        (lambda path: (path / "args.json").write_bytes(b"\xff\xfe\x00"), DOES_NOT_FIT),
        (lambda path: (path / "args.json").unlink(), "is not a run folder: args.json: No such file or directory"),
    ],
)
def test_an_args_json_that_does_not_fit(copy_of_stopped_run, damage, message, without_checkpoint, sac):
    """It is read before anything else: whether there is a checkpoint makes no difference. --resume auto passes such folders by."""
    if without_checkpoint:
        (copy_of_stopped_run / "checkpoint.pt").unlink()
    damage(copy_of_stopped_run)
    line = refused(sac, copy_of_stopped_run)
    assert line.startswith(f"error: {copy_of_stopped_run} {message.format(script='rde_sac_dmc.py')}")
    arguments = [*RUNS["sac"][1], "--checkpoint-interval", "250", "--runs-dir", str(copy_of_stopped_run.parent)]
    assert sac.find_run(sac.tyro.cli(sac.Args, args=arguments)) is None


@pytest.mark.parametrize("copy_of_stopped_run", ["sr"], indirect=True)
@pytest.mark.parametrize("value", ["foo", None, ["last1"], 1])
def test_a_choice_that_does_not_exist_in_args_json(copy_of_stopped_run, value):
    change_argument(copy_of_stopped_run, reset_depth=value)
    line = refused(load_script("sr_dqn_atari"), copy_of_stopped_run)
    assert line.endswith(f"in its args.json --reset-depth is {value!r}, but must be one of last1, last2, full")


def test_a_folder_that_is_none(tmp_path, sac):
    line = refused(sac, tmp_path / "nothing")
    assert line == f"error: {tmp_path}/nothing is not a run folder: args.json: No such file or directory"
    (tmp_path / "file").touch()
    assert refused(sac, tmp_path / "file").endswith("is not a run folder: args.json: Not a directory")


# ------------------------------------------------------------------------------------------------------ files that grow, others


@pytest.mark.parametrize("name", ["episodes.csv", "evaluations.csv", "events.*"])
@pytest.mark.parametrize("gone", [False, True])
def test_a_file_that_is_shorter_than_at_the_checkpoint(copy_of_stopped_run, name, gone, sac):
    """Nothing is filled up (with zeros), and nothing is begun anew."""
    (file,) = copy_of_stopped_run.glob(name)
    if gone:
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size - 1)
    line = refused(sac, copy_of_stopped_run)
    assert line == f"error: {file} is shorter than it was at the checkpoint, or gone: it is damaged"


def test_what_was_written_after_the_checkpoint_is_cut_off(copy_of_stopped_run, sac, runs):
    """Rows in the CSVs and events: of a process that was killed. The rest is as if it had never been there."""
    for file in copy_of_stopped_run.glob("e*"):
        with open(file, "ab") as opened:
            opened.write(b"1400,half a row")
    late = copy_of_stopped_run / "events.out.tfevents.9999999999.host.1.0"
    late.write_bytes(b"of a process that came to no checkpoint")
    result = run_main(sac, "--resume", copy_of_stopped_run)
    assert result.returncode == 0, result.stderr
    assert not late.exists()
    assert_same_end(copy_of_stopped_run, runs("sac").path)
    for name in ("episodes.csv", "evaluations.csv"):
        content = (copy_of_stopped_run / name).read_bytes()
        assert b"half a row" not in content and b"\0" not in content


def a_dangling_link(path: pathlib.Path):
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [a_dangling_link, os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    "name", ["args.json", "args.json.tmp", "episodes.csv", "evaluations.csv", "checkpoint.pt", "checkpoint.pt.tmp", "model.pt"]
)
def test_something_else_in_the_place_of_a_file(copy_of_stopped_run, name, make, sac):
    """Refused at the start, and not when the run has come to the file (or has waited for ever for what a pipe brings)."""
    path = copy_of_stopped_run / name
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    make(path)
    line = refused(sac, copy_of_stopped_run)
    assert line == f"error: {path} is in the way: it is not a file, or a link to nothing"
    assert os.path.lexists(path)


def test_a_link_to_a_folder_is_a_folder(copy_of_stopped_run, sac, tmp_path):
    """Nothing in a run depends on where its folder lies: moved to another disk, and linked."""
    moved = shutil.move(copy_of_stopped_run, tmp_path / "elsewhere")
    copy_of_stopped_run.symlink_to(moved)
    before = snapshot(tmp_path / "elsewhere")
    result = run_main(sac, "--resume", copy_of_stopped_run)
    assert result.returncode == 0, result.stderr
    assert before.keys() - {"checkpoint.pt"} < snapshot(tmp_path / "elsewhere").keys()
