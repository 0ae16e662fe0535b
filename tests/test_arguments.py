"""Wrong command lines: exit code 2, what is wrong and what would be right, nothing created. And what --help says."""

import math
import operator
import os
import re
import typing

import copies
import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, load_script, run_main

SCRIPTS = [path.stem for path in copies.scripts()]

# Of values, in tyro's frame: the argument and what pydantic says, of all wrong ones at once; their ranges are tested below.
WRONG_VALUES = [
    ("--seed -1 --gamma 2 --num-agents 0", "3 validation errors for Args seed Input should be greater than or equal to 0"),
    ("--learning-rate nan", "learning_rate Input should be a finite number"),
    ("--selection best", "invalid choice 'best'"),
    ("--seed one", "invalid literal"),
    ("--sed 1", "Perhaps you meant"),
    ("extra", "Unrecognized options: extra"),
]


# Of arguments that do not go together, in one line, with what would be right. Of a text that scripts share one is asked.
NO_GAME = " is not a game of the form <Game>NoFrameskip-v4 (others skip frames or repeat actions by themselves)"
MANY_AGENTS = "--reset-interval 15 --num-envs 4 --replay-ratio 2 --num-agents 2"
SMALL_BUFFER = "--num-envs 70 --buffer-size 69 --batch-size 64"
TOO_SMALL = "--buffer-size 69 is too small for one step of 70 environments"
NO_STEP = "--replay-ratio 1e-07 leaves --total-timesteps 100000 without a gradient step"
WRONG_TOGETHER = {
    "rde_dqn": [
        ("--total-timesteps 1000", "--learning-starts 1000 leaves nothing of --total-timesteps 1000 to learn in"),
        ("--batch-size 2000", "--batch-size 2000 is more than --learning-starts 1000 or --buffer-size 100000: so many"),
        ("--buffer-size 50", "--batch-size 64 is more than --learning-starts 1000 or --buffer-size 50: so many"),
        ("--num-envs 200 --buffer-size 150", "--buffer-size 150 is too small for one step of 200 environments"),
        ("--replay-ratio 0.0000001", NO_STEP),
        ("--reset-interval 3 --num-envs 4", "--reset-interval 3 asks for more than one reset in a loop step; use at least 4"),
        ("--tau 0.1", "--target-update-interval 100 and --tau 0.1: the target network follows by one of the two"),
        ("--track", "--track needs the package wandb: pip install wandb"),
        ("--capture-video", "--capture-video needs the package moviepy: pip install moviepy"),
        ("--env-id ALE/Pong-v5", "--env-id ALE/Pong-v5 is an Atari game, and its observations are pictures; use"),
    ],
    "dqn_atari": [
        *[(f"--env-id {env_id}", f"--env-id {env_id}{NO_GAME}; did you mean AlienNoFrameskip-v4") for env_id in
          "Alien AlienNoFrameskip Alien-v4 AllienNoFrameskip-v4 ALE/Alien-v5 AlienNoFrameskip-v0".split()],
        ("--env-id ../../etc/passwd", "--env-id ../../etc/passwd is not a game"),
        ("--env-id pong", "did you mean PongNoFrameskip-v4"),
        ("--buffer-size 4 --batch-size 2", "--buffer-size 4 is too small for stacks of 4 frames and the next one in 1 "
         "environment(s); it must be at least 5"),
        ("--num-envs 8 --buffer-size 39", "it must be at least 40"),
        ("--replay-ratio 0.0000001", NO_STEP),
    ],
    "sr_dqn_atari": [("--reset-interval 1 --replay-ratio 2", "more than one reset in a loop step; use at least 2, or 0 for never")],
    "rde_dqn_atari": [(MANY_AGENTS, "use at least 16")],
    "rde_sac_dmc": [
        ("--env-id walker_run", "did you mean walker-run"),
        ("--env-id hoper-hop", "did you mean hopper-hop"),
        ("--env-id lqr-lqr_2_1", "actions without bounds"),
        (SMALL_BUFFER, TOO_SMALL),
        (MANY_AGENTS, "use at least 16"),
        ("--replay-ratio 0.0000001", "without a gradient step"),
    ],
    "rde_sac_safety": [(SMALL_BUFFER, TOO_SMALL)],
}  # fmt: skip


def check(name: str, arguments: list[str], monkeypatch):
    """The script's main with these arguments, without the training itself, and without two packages that not all have."""
    module = load_script(name)
    find_spec = module.importlib.util.find_spec
    missing = lambda name, *rest: None if name in ("wandb", "moviepy") else find_spec(name, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train", lambda *args: None)
        patch.setattr(module.importlib.util, "find_spec", missing)
        return run_main(module, *arguments)


@pytest.mark.parametrize("arguments, message", WRONG_VALUES)
def test_wrong_values(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = check("rde_dqn", arguments.split(), monkeypatch)
    assert (result.returncode, result.stdout, os.listdir(tmp_path)) == (2, "", [])
    assert message in " ".join(result.stderr.replace("│", " ").split()), result.stderr
    assert "For full helptext" in result.stderr and "Traceback" not in result.stderr and "http" not in result.stderr


@pytest.mark.parametrize(
    "script, arguments, message",
    [(script, arguments, message) for script, table in WRONG_TOGETHER.items() for arguments, message in table],
    ids=lambda value: str(value).replace("/", "|")[:80],
)
def test_arguments_that_do_not_go_together(script, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = check(script, arguments.split(), monkeypatch)
    assert (result.returncode, result.stdout, os.listdir(tmp_path)) == (2, "", [])
    assert result.stderr.startswith("error: ") and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


ENOUGH = SMALL_BUFFER.replace("69", "70")


@pytest.mark.parametrize("script, arguments", [
    ("rde_dqn", "--total-timesteps 1002 --batch-size 1000 --reset-interval 4 --num-envs 4 --replay-ratio 0.5"),
    ("dqn_atari", "--num-envs 8 --buffer-size 40 --learning-starts 32"), ("rde_dqn_atari", MANY_AGENTS.replace("15", "16")),
    ("rde_sac_dmc", "--beta 0 --keep-models 10000 --gamma 1"), ("rde_sac_dmc", ENOUGH), ("rde_sac_safety", ENOUGH),
    ("rde_dqn", ENOUGH),
])  # fmt: skip
def test_what_is_just_right_is_accepted(script, arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = check(script, arguments.split(), monkeypatch)
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


NUMBERS = st.integers(-(10**9), 10**9) | st.integers(-(10**400), 10**400) | st.floats()
NUMBERS = (NUMBERS | st.sampled_from(["", "x", "1e", "-", "None", "[]", "∞"])).map(str)


@pytest.mark.parametrize("script", ["rde_drq_atari", "rde_sac_dmc"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_arguments_never_show_a_stack_trace(script, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = [name for name, value in vars(load_script(script).Args()).items() if not isinstance(value, bool)]
    names = data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4, unique=True))
    arguments = [f"--{name.replace('_', '-')}={data.draw(NUMBERS)}" for name in names]
    result = check(script, arguments, monkeypatch)
    assert result.returncode in (0, 2) and "Traceback" not in result.stderr and os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------- values and ranges


def ranges(script: str) -> dict[str, list[tuple[str, float]]]:
    """What --help says of every number, as {name: [(sign, bound)]}; without frames, and without breaks of lines."""
    result, found = run_main(load_script(script), "--help"), {}
    text = " ".join(result.stdout.replace("│", " ").split())
    assert result.returncode == 0
    for name, hint in typing.get_type_hints(load_script(script).Args).items():
        flag = "--" + name.replace("_", "-")
        assert re.search(f" {flag}[ ,]", text), flag
        if match := re.search(rf" {flag} (?:INT|FLOAT) ((?:[<>]=? -?[\d.]+(?:, )?)+) ", text):
            found[name] = [(sign, float(bound)) for sign, bound in re.findall(r"([<>]=?) (-?[\d.]+)", match[1])]
        else:  # every number has a range
            assert not {hint, *typing.get_args(hint)} & {int, float}, name
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_the_ranges_that_are_kept_to(name):
    """At their ends, beside them, and between."""
    script, found = load_script(name), ranges(name)
    assert len(found) >= 15
    accepts = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
    for field, bounds in found.items():
        whole = "int" in str(script.Args.__pydantic_fields__[field].annotation)
        values = [-1e31, 1e29, *([] if whole else [math.nan, math.inf, -math.inf])]
        for _, bound in bounds:
            beside = (bound - 1, bound + 1) if whole else (math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf))
            values += [bound, *beside]
        for value in values:
            finite = math.isfinite(value) or (field, value) == ("cost_limit", math.inf)  # no limit
            if finite and all(accepts[sign](value, bound) for sign, bound in bounds):
                script.Args(**{field: int(value) if whole else value})
                continue
            with pytest.raises(pydantic.ValidationError) as error:
                script.Args(**{field: int(value) if whole else value})
            assert [entry["loc"][0] for entry in error.value.errors()] == [field]


def test_an_argument_has_the_same_range_in_all_scripts_that_have_it():
    """So a range that is wrong in one of them is noticed, and what is tested of one script holds for all."""
    kinds = {}
    for script in SCRIPTS:
        for name, field in load_script(script).Args.__pydantic_fields__.items():
            kinds.setdefault(name, {})[script] = f"{field.annotation} {field.metadata}"
    different = {name for name, of_scripts in kinds.items() if len(set(of_scripts.values())) > 1}
    assert different == {"max_episode_steps"}  # in rde_dqn.py it may be -1
    assert sum(len(of_scripts) == 8 for of_scripts in kinds.values()) >= 25


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_argument_has_its_meaning_and_an_effect(script):
    """It is explained below its definition, and read somewhere else in the script. Choices are checked."""
    source, module = (ROOT / f"{script}.py").read_text(), load_script(script)
    body = re.search(r"^class Args:\n(.*?)\n\n\n", source, re.DOTALL | re.MULTILINE)[1]
    assert len(re.findall(r"^    \w+: .*\n    \"\"\"", body, re.MULTILINE)) == len(vars(module.Args()))
    for name, hint in typing.get_type_hints(module.Args).items():
        assert re.search(rf"args\.{name}\b", source), name
        if typing.get_origin(hint) is typing.Literal:
            assert all(getattr(module.Args(**{name: value}), name) == value for value in typing.get_args(hint))
            with pytest.raises(pydantic.ValidationError):
                module.Args(**{name: "other"})
