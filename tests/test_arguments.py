"""Wrong command lines: exit code 2, one line that says what is wrong and what would be right, nothing created."""

import dataclasses
import math
import os
import re
import subprocess
import sys
import typing

import copies
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import QUICK_SAC, ROOT, environment, error_line, load_script, run_main, run_script

SCRIPTS = [path.stem for path in copies.scripts()]

# arguments, what the line must say; the checks are the same in all scripts
WRONG = [
    ("--seed -1", "--seed is -1, but must lie in [0, inf)"),
    ("--total-timesteps 0", "--total-timesteps is 0, but must lie in [1, inf)"),
    ("--total-timesteps -5", "--total-timesteps is -5"),
    ("--learning-starts 0", "--learning-starts is 0, but must lie in [1, inf)"),
    ("--batch-size 0", "--batch-size is 0, but must lie in [1, inf)"),
    ("--buffer-size 0", "--buffer-size is 0"),
    ("--buffer-size 9000000000", "GB are free"),
    (f"--buffer-size {10**400}", "--buffer-size is a number, but must be a finite number below 1e30"),
    (f"--total-timesteps {10**400}", "--total-timesteps is a number, but must be a finite number below 1e30"),
    ("--replay-ratio 1e308", "--replay-ratio is 1e+308, but must be a finite number below 1e30"),
    ("--exp-name a/b", "--exp-name is 'a/b', but must be a part of a folder's name"),
    ("--exp-name=", "--exp-name is '', but must be a part of a folder's name"),
    ("--num-envs 0", "--num-envs is 0, but must lie in [1, inf)"),
    ("--num-envs -2", "--num-envs is -2"),
    ("--num-envs 50000 --eval-episodes 1000000 --eval-interval 0 --checkpoint-interval 0 --buffer-size 1000000 --reset-interval 0",
     "the environments of --num-envs and --eval-episodes"),
    ("--eval-episodes 10000000", "the environments of --num-envs and --eval-episodes"),
    ("--learning-rate 0", "--learning-rate is 0.0, but must lie in (0, inf)"),
    ("--learning-rate nan", "--learning-rate is nan, but must be a finite number"),
    ("--learning-rate inf", "--learning-rate is inf, but must be a finite number"),
    ("--learning-rate -1e-4", "--learning-rate is -0.0001, but must lie in (0, inf)"),
    ("--gamma 1.5", "--gamma is 1.5, but must lie in [0, 1]"),
    ("--gamma -0.1", "--gamma is -0.1, but must lie in [0, 1]"),
    ("--tau 2", "--tau is 2.0, but must lie in [0, 1]"),
    ("--replay-ratio 0", "--replay-ratio is 0.0, but must lie in (0, inf)"),
    ("--replay-ratio -1", "--replay-ratio is -1.0"),
    ("--replay-ratio nan", "--replay-ratio is nan, but must be a finite number"),
    ("--eval-interval -1", "--eval-interval is -1, but must lie in [0, inf)"),
    ("--eval-episodes 0", "--eval-episodes is 0, but must lie in [1, inf)"),
    ("--keep-models -1", "--keep-models is -1, but must lie in [0, 10000]"),
    ("--keep-models 10001", "--keep-models is 10001, but must lie in [0, 10000]"),
    ("--checkpoint-interval -1", "--checkpoint-interval is -1, but must lie in [0, inf)"),
    ("--checkpoint-interval 3 --num-envs 4", "--checkpoint-interval 3 is shorter than one loop step of 4 environments"),
    ("--track", "--track needs the package wandb: pip install wandb"),
    ("--capture-video", "--capture-video needs the package moviepy: pip install moviepy"),
    ("--env-id ../../etc/passwd", "--env-id ../../etc/passwd is not a"),
    ("--env-id=", "error: --env-id is not a"),
    # by tyro: in a frame, with near matches
    ("--seed one", "invalid literal"),
    ("--seed 1.5", "invalid literal"),
    ("--sed 1", "Perhaps you meant"),
    ("--seed", "Missing value for argument '--seed'"),
    ("--gamma high", "could not convert"),
    ("extra", "Unrecognized options: extra"),
]  # fmt: skip
WRONG_ATARI = [
    ("--env-id Alien", "did you mean AlienNoFrameskip-v4"),
    ("--env-id AlienNoFrameskip", "did you mean AlienNoFrameskip-v4"),
    ("--env-id AllienNoFrameskip-v4", "did you mean AlienNoFrameskip-v4"),
    ("--env-id ALE/Alien-v5", "skips frames by itself or has sticky actions"),
    ("--env-id Alien-v4", "use AlienNoFrameskip-v4"),
    ("--env-id Alien-v0", "use AlienNoFrameskip-v4"),
    ("--env-id AlienNoFrameskip-v0", "use AlienNoFrameskip-v4"),
    ("--env-id CartPole-v1", "not a game of the form <Game>NoFrameskip-v4"),
    ("--env-id pong", "PongNoFrameskip-v4"),
    ("--total-timesteps 10000", "--learning-starts 10000 leaves nothing of --total-timesteps 10000"),
    ("--learning-starts 200000", "leaves nothing of --total-timesteps 100000"),
    (
        "--learning-starts 31",
        "--batch-size 32 is more than the 31 transitions that are stored when learning starts; lower it, or raise --learning-starts",
    ),
    ("--batch-size 20000", "more than the 10000 transitions that are stored"),
    (
        "--buffer-size 20",
        "--batch-size 32 is more than the 20 transitions that are stored when learning starts; lower it, or raise --buffer-size",
    ),
    ("--buffer-size 4 --batch-size 2", "too small for stacks of 4 frames"),
    ("--num-envs 8 --buffer-size 39", "it must be at least 40"),
    ("--num-envs 6000", "--eval-interval 5000 is shorter than one loop step of 6000 environments"),
    ("--start-e 1.1", "--start-e is 1.1, but must lie in [0, 1]"),
    ("--end-e -0.1", "--end-e is -0.1, but must lie in [0, 1]"),
    ("--eval-epsilon 2", "--eval-epsilon is 2.0, but must lie in [0, 1]"),
    ("--replay-ratio 0.0000001", "--replay-ratio 1e-07 leaves --total-timesteps 100000 without a gradient step"),
    ("--exploration-fraction 3", "--exploration-fraction is 3.0, but must lie in [0, 1]"),
    ("--max-grad-norm 0", "--max-grad-norm is 0.0, but must lie in (0, inf)"),
    ("--max-grad-norm inf", "--max-grad-norm is inf, but must be a finite number"),
]
WRONG_SAC = [
    ("--env-id walker_run", "did you mean walker-run"),
    ("--env-id hoper-hop", "did you mean hopper-hop"),
    ("--env-id dm_control/cheetah-run-v0", "did you mean cheetah-run"),
    ("--env-id AlienNoFrameskip-v4", "an example is hopper-hop"),
    ("--env-id lqr-lqr_2_1", "actions without bounds"),
    ("--total-timesteps 5000", "--learning-starts 5000 leaves nothing of --total-timesteps 5000"),
    ("--learning-starts 2000000", "leaves nothing of --total-timesteps 1000000"),
    ("--learning-starts 1000", "--batch-size 1024 is more than the 1000 transitions"),
    ("--batch-size 20000", "more than the 5000 transitions that are stored"),
    ("--buffer-size 1000", "--batch-size 1024 is more than the 1000 transitions"),
    ("--buffer-size 100000000000", "the replay buffer of --buffer-size"),
    ("--num-envs 200 --buffer-size 150 --batch-size 100", "--buffer-size 150 is too small for one step of 200 environments"),
    ("--num-envs 20000", "--eval-interval 10000 is shorter than one loop step of 20000 environments"),
    ("--replay-ratio 0.0000001", "--replay-ratio 1e-07 leaves --total-timesteps 1000000 without a gradient step"),
    ("--hidden-dim 0", "--hidden-dim is 0, but must lie in [1, inf)"),
    ("--hidden-dim -1", "--hidden-dim is -1"),
    ("--hidden-dim 10000000", "the agents"),
    ("--num-hidden-layers 0", "--num-hidden-layers is 0, but must lie in [1, inf)"),
    ("--num-hidden-layers 1000000", "GB are free"),
    ("--start-e 1.0", "Unrecognized options: --start-e"),
    ("--reset-depth last1", "Unrecognized options: --reset-depth"),
]
WRONG_DEPTHS = [("--reset-depth last3", "invalid choice 'last3'"), ("--reset-depth 1", "invalid choice '1'")]
WRONG_RESETS = [
    ("--reset-interval -1", "--reset-interval is -1, but must lie in [0, inf)"),
    ("--reset-interval 3 --num-envs 4", "asks for more than one reset in a loop step; use at least"),
    ("--reset-interval 1 --replay-ratio 2", "asks for more than one reset in a loop step; use at least"),
]
WRONG_ENSEMBLES = [
    ("--num-agents 0", "--num-agents is 0, but must lie in [1, inf)"),
    ("--num-agents -1", "--num-agents is -1"),
    ("--num-agents 1000000 --reset-interval 0", "GB are free"),
    ("--beta nan", "--beta is nan, but must be a finite number"),
    ("--beta inf", "--beta is inf, but must be a finite number"),
    ("--beta -1", "--beta is -1.0, but must lie in [0, inf)"),
    ("--beta 1e39", "--beta is 1e+39, but must be a finite number below 1e30"),  # no float32
    ("--selection best", "invalid choice 'best'"),
    ("--reset-interval 15 --num-envs 4 --replay-ratio 2 --num-agents 2", "use at least 16"),
]
# What a script shares with another one is checked in one of them: its text is the same (test_copies.py).
TABLES = {
    "dqn_atari": [("--replay-ratio 0.0000001", "without a gradient step"), ("--reset-interval 5", "Unrecognized options")],
    "sr_dqn_atari": WRONG_RESETS
    + [("--num-agents 2", "Unrecognized options"), ("--replay-ratio 0.0000001", "a gradient step")],
    "rde_dqn_atari": WRONG + WRONG_ATARI + WRONG_RESETS + WRONG_DEPTHS + WRONG_ENSEMBLES,
    "rde_sac_dmc": WRONG_SAC + WRONG_RESETS + WRONG_ENSEMBLES,
}
CASES = [(script, arguments, message) for script, table in TABLES.items() for arguments, message in table]


def check(name: str, arguments: list[str], monkeypatch) -> subprocess.CompletedProcess:
    """The script's main with these arguments, without the training itself, and without two packages that not all have."""
    module = load_script(name)
    find_spec = module.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *args: None)
        patch.setattr(
            module.importlib.util,
            "find_spec",
            lambda name, *rest: None if name in ("wandb", "moviepy") else find_spec(name, *rest),
        )
        return run_main(module, *arguments)


@pytest.mark.parametrize("script, arguments, message", CASES, ids=lambda value: str(value).replace("/", "|")[:80])
def test_wrong_arguments(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = check(script, arguments.split(), monkeypatch)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr
    if result.stderr.startswith("error: "):
        assert result.stderr.count("\n") == 1
    else:  # what cannot be parsed at all is tyro's to say, in a frame of a few lines
        assert "For full helptext" in result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", ["rde_dqn_atari", "rde_sac_dmc"])
def test_good_arguments_are_accepted(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = check(script, ["--buffer-size", "20000"], monkeypatch)
    assert (result.returncode, result.stderr, os.listdir(tmp_path)) == (0, "", [])


@pytest.mark.parametrize(
    "script", ["rde_dqn_atari", "rde_drq_atari", "rde_dqn", "rde_sac_dmc", "rde_sac_safety", "sr_dqn_atari"]
)
def test_the_shortest_reset_interval_is_computed_exactly(script, capsys):
    """3 * 0.1 * 10 is more than 3 in floating point."""
    module, agents = load_script(script), {} if script == "sr_dqn_atari" else {"num_agents": 10}
    args = lambda interval: module.Args(num_envs=3 if agents else 30, replay_ratio=0.1, reset_interval=interval, **agents)
    module.check_schedules(args(3))
    with pytest.raises(SystemExit):
        module.check_schedules(args(2))
    assert "use at least 3, or 0 for never" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, arguments, line",
    [
        ("rde_dqn_atari", ["--env-id", "ALE/Alien-v5"], "error: --env-id ALE/Alien-v5 skips frames by itself or has sticky "
         "actions, and either would be applied twice or against the protocol; use AlienNoFrameskip-v4\n"),
        ("rde_sac_dmc", ["--tau", "2"], "error: --tau is 2.0, but must lie in [0, 1]\n"),
    ],
)  # fmt: skip
def test_a_wrong_argument_as_a_command(script, arguments, line, tmp_path):
    """As a person sees it."""
    result = run_script(script, *arguments, "--runs-dir", tmp_path / "runs")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made(sac, tmp_path):
    (tmp_path / "file").write_text("")
    for runs_dir, *arguments in ([tmp_path / "file"], [tmp_path / "file" / "deeper", "--resume", "auto"]):
        line = error_line(run_main(sac, *QUICK_SAC, "--runs-dir", runs_dir, *arguments), 2)
        assert line.startswith(f"error: a run folder in --runs-dir {runs_dir} cannot be made: ")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_argument_and_what_it_is_for(script):
    result = run_main(load_script(script), "--help")
    assert result.returncode == 0
    for name in vars(load_script(script).Args()):
        assert "--" + name.replace("_", "-") in result.stdout
    source = (ROOT / f"{script}.py").read_text()
    body = re.search(r"^class Args:\n(.*?)\n\n\n", source, re.DOTALL | re.MULTILINE)[1]
    assert len(re.findall(r"^    \w+: .*\n    \"\"\"", body, re.MULTILINE)) == len(vars(load_script(script).Args()))


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from(["", "x", "1e", "-", "None", "[]", "∞"]),
).map(str)


@pytest.mark.parametrize("script", ["rde_dqn_atari", "rde_drq_atari", "rde_sac_dmc"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_arguments_never_show_a_stack_trace(script, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = [name for name, value in vars(load_script(script).Args()).items() if not isinstance(value, bool)]
    names = data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4, unique=True))
    arguments = [f"--{name.replace('_', '-')}={data.draw(NUMBERS)}" for name in names]
    result = check(script, arguments, monkeypatch)
    assert result.returncode in (0, 1, 2) and "Traceback" not in result.stderr
    assert result.returncode != 1 or result.stderr.startswith("error: ")


# ------------------------------------------------------------------------------------------------------- values and intervals

INTERVAL = re.compile(r"^([\[(])(\S+), (\S+)([\])])$")


def intervals(script) -> dict[str, tuple[type, str]]:
    hints = typing.get_type_hints(script.Args, include_extras=True)
    found = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Annotated}
    # "float | None" is a float that need not be given.
    return {name: (next(iter(typing.get_args(kind)), kind), interval) for name, (kind, interval) in found.items()}


def outside_and_inside(kind: type, interval: str) -> tuple[list, list]:
    """Values that are refused and accepted: the ends, what lies beside them, and what lies between."""
    left, low, high, right = INTERVAL.match(interval).groups()
    low, high = float(low), float(high)
    assert low < high
    beside = (
        (lambda value, way: int(value) + way) if kind is int else (lambda value, way: math.nextafter(value, way * math.inf))
    )
    outside, inside = [beside(low, -1), -1e31, -math.inf, math.nan], [beside(low, 1)]
    (inside if left == "[" else outside).append(kind(low))
    if math.isfinite(high):
        outside += [beside(high, 1), math.inf]
        inside.append(beside(high, -1))
        (inside if right == "]" else outside).append(kind(high))
    else:  # numbers end at 1e30; an endless value is one only where the interval is closed there
        outside.append(10**31 if kind is int else 1e30)
        inside.append(10**29 if kind is int else 1e29)
        (inside if right == "]" else outside).append(math.inf)
    return outside, inside


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_interval_is_kept_to_at_its_ends(name):
    script = load_script(name)
    found, defaults = intervals(script), script.Args()
    assert len(found) >= 15 and script.wrong_value(defaults) is None
    for field, (kind, interval) in found.items():
        outside, inside = outside_and_inside(kind, interval)
        for value in inside:
            assert script.wrong_value(dataclasses.replace(defaults, **{field: value})) is None, (field, value)
        for value in outside:
            message = script.wrong_value(dataclasses.replace(defaults, **{field: value}))
            assert message is not None and message.startswith(f"--{field.replace('_', '-')} is "), (field, value)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_value_is_accepted_if_it_lies_in_its_interval_and_only_then(data):
    """Of any script's arguments; the interval is read here in another way than there."""
    script = load_script(data.draw(st.sampled_from(SCRIPTS)))
    field, (kind, interval) = data.draw(st.sampled_from(sorted(intervals(script).items(), key=str)))
    value = data.draw(st.integers(-20_000, 10**31) if kind is int else st.floats() | st.floats(-1, 2))
    left, low, high, right = INTERVAL.match(interval).groups()
    above = value >= float(low) if left == "[" else value > float(low)
    below = value <= float(high) if right == "]" else value < float(high)
    expected = above and below and (value < 1e30 or value == math.inf)
    assert (script.wrong_value(dataclasses.replace(script.Args(), **{field: value})) is None) == expected


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_an_interval_and_every_choice_is_checked(script):
    module = load_script(script)
    for name, hint in typing.get_type_hints(module.Args, include_extras=True).items():
        if typing.get_origin(hint) is typing.Literal:
            for value in typing.get_args(hint):
                assert module.wrong_value(dataclasses.replace(module.Args(), **{name: value})) is None
            assert "must be one of" in module.wrong_value(dataclasses.replace(module.Args(), **{name: "other"}))
        elif typing.get_origin(hint) is not typing.Annotated:
            assert hint in (str, bool) or set(typing.get_args(hint)) == {str, type(None)}, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_an_effect(script):
    """Every argument is read somewhere in the script beside its definition."""
    source = (ROOT / f"{script}.py").read_text()
    for name in vars(load_script(script).Args()):
        assert re.search(rf"args\.{name}\b", source), name


# ------------------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("what", ["--batch-size", "--buffer-size"])
def test_memory_that_is_out_is_one_line(what, tmp_path):
    """In a process that may use 400 MB beside the modules: at the buffer, and at the first mini-batch."""
    code = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import rde_sac_dmc as script\n"
        "script.import_suite()\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400_000_000, resource.RLIM_INFINITY))\n"
        "script.main()\n"
    )
    arguments = [*QUICK_SAC, "--learning-starts", "400", "--total-timesteps", "600", "--runs-dir", str(tmp_path)]
    if what == "--batch-size":
        arguments += "--batch-size 400 --hidden-dim 64 --num-hidden-layers 500".split()
    else:
        arguments += ["--buffer-size", "5000000"]  # 1.1 GB
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment(), check=False
    )
    line = error_line(result)
    assert line.startswith("error: out of memory (") and what in line
    steps = [int(step) for step in re.findall(r"(\d+)/600 \[", result.stderr)]
    assert max(steps, default=0) == (402 if what == "--batch-size" else 0)
