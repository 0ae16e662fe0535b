"""Wrong command lines: exit code 2, one line that says what is wrong and what would be right, nothing created."""

import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import ROOT, load_script, run_script

# arguments, what the line must say
WRONG = [
    ("--seed -1", "--seed is -1, but must not be negative"),
    ("--total-timesteps 0", "--total-timesteps is 0, but must be positive"),
    ("--total-timesteps -5", "must not be negative"),
    ("--learning-starts -1", "must not be negative"),
    ("--batch-size 0", "--batch-size is 0, but must be positive"),
    ("--buffer-size 0", "--buffer-size is 0"),
    ("--buffer-size 9000000000", "GB are free"),
    (f"--buffer-size {10**400}", "--buffer-size is larger than 1e30"),
    (f"--total-timesteps {10**400}", "--total-timesteps is larger than 1e30"),
    ("--replay-ratio 1e308", "--replay-ratio is larger than 1e30"),
    ("--exp-name a/b", "--exp-name is 'a/b', but must be a part of a folder's name"),
    ("--exp-name=", "--exp-name is '', but must be a part of a folder's name"),
    ("--num-envs 0", "--num-envs is 0"),
    ("--num-envs -2", "must not be negative"),
    ("--learning-rate 0", "--learning-rate is 0"),
    ("--learning-rate nan", "--learning-rate is nan, but must be a finite number"),
    ("--learning-rate inf", "must be a finite number"),
    ("--learning-rate -1e-4", "must not be negative"),
    ("--gamma 1.5", "--gamma is 1.5, but must lie between 0 and 1"),
    ("--gamma -0.1", "must not be negative"),
    ("--tau 2", "must lie between 0 and 1"),
    ("--replay-ratio 0", "--replay-ratio is 0"),
    ("--replay-ratio -1", "must not be negative"),
    ("--replay-ratio nan", "must be a finite number"),
    ("--eval-interval -1", "must not be negative"),
    ("--eval-episodes 0", "--eval-episodes is 0"),
    ("--checkpoint-interval -1", "must not be negative"),
    ("--checkpoint-interval 3 --num-envs 4", "--checkpoint-interval 3 is shorter than one loop step"),
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
]
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
    ("--learning-starts 31", "--batch-size 32 is more than the 31 transitions"),
    ("--batch-size 20000", "more than the 10000 transitions that are stored"),
    ("--buffer-size 20", "--batch-size 32 is more than the 20 transitions"),
    ("--buffer-size 4 --batch-size 2", "too small for stacks of 4 frames"),
    ("--num-envs 8 --buffer-size 39", "it must be at least 40"),
    ("--num-envs 6000", "--eval-interval 5000 is shorter than one loop step of 6000 environments"),
    ("--start-e 1.1", "must lie between 0 and 1"),
    ("--end-e -0.1", "must not be negative"),
    ("--replay-ratio 0.0000001", "--replay-ratio 1e-07 leaves --total-timesteps 100000 without a gradient step"),
    ("--exploration-fraction 3", "must lie between 0 and 1"),
    ("--max-grad-norm 0", "--max-grad-norm is 0"),
    ("--max-grad-norm inf", "must be a finite number"),
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
    ("--num-envs 200 --buffer-size 150 --batch-size 100", "--buffer-size 150 is too small for one step of 200 environments"),
    ("--num-envs 20000", "--eval-interval 10000 is shorter than one loop step of 20000 environments"),
    ("--replay-ratio 0.0000001", "--replay-ratio 1e-07 leaves --total-timesteps 1000000 without a gradient step"),
    ("--hidden-dim 0", "--hidden-dim is 0"),
    ("--hidden-dim -1", "must not be negative"),
    ("--hidden-dim 10000000", "--num-agents 2 of --hidden-dim 10000000 needs"),
    ("--num-hidden-layers 0", "--num-hidden-layers is 0"),
    ("--num-hidden-layers 1000000", "GB are free"),
    ("--start-e 1.0", "Unrecognized options: --start-e"),
    ("--reset-depth last1", "Unrecognized options: --reset-depth"),
]
WRONG_DEPTHS = [("--reset-depth last3", "invalid choice 'last3'"), ("--reset-depth 1", "invalid choice '1'")]
WRONG_RESETS = [
    ("--reset-interval -1", "must not be negative"),
    ("--reset-interval 3 --num-envs 4", "asks for more than one reset in a loop step; use at least"),
    ("--reset-interval 1 --replay-ratio 2", "asks for more than one reset in a loop step; use at least"),
]
WRONG_ENSEMBLES = [
    ("--num-agents 0", "an ensemble has at least 1 agent"),
    ("--num-agents -1", "must not be negative"),
    ("--num-agents 1000000 --reset-interval 0", "GB are free"),
    ("--beta nan", "must be a finite number"),
    ("--beta -50", "must not be negative"),
    ("--beta 1e39", "--beta is larger than 1e30"),  # no float32
    ("--reset-interval 15 --num-envs 4 --replay-ratio 2 --num-agents 2", "use at least 16"),
]
TABLES = {
    "dqn_atari": WRONG + WRONG_ATARI,
    "sr_dqn_atari": WRONG + WRONG_ATARI + WRONG_RESETS + WRONG_DEPTHS,
    "rde_dqn_atari": WRONG + WRONG_ATARI + WRONG_RESETS + WRONG_DEPTHS + WRONG_ENSEMBLES,
    "rde_sac_dmc": WRONG + WRONG_SAC + WRONG_RESETS + WRONG_ENSEMBLES,
}
SCRIPTS = list(TABLES)
CASES = [(script, arguments, message) for script, table in TABLES.items() for arguments, message in table]


def main_in_process(script: str, arguments: list[str], monkeypatch, capsys):
    """The script's main with these arguments: exit code and what was printed. Training itself is not started."""
    module = load_script(script)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
    monkeypatch.setattr(module, "train", lambda *args: None)
    find_spec = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *rest: None if name in ("wandb", "moviepy") else find_spec(name, *rest)
    )
    try:
        module.main()
    except SystemExit as end:
        return end.code, capsys.readouterr()
    return 0, capsys.readouterr()


@pytest.mark.parametrize("script, arguments, message", CASES, ids=lambda value: str(value).replace("/", "|")[:80])
def test_wrong_arguments(script, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, printed = main_in_process(script, arguments.split(), monkeypatch, capsys)
    assert code == 2
    assert message in " ".join(printed.err.replace("│", " ").split()), printed.err
    assert printed.out == "" and "Traceback" not in printed.err
    if printed.err.startswith("error: "):
        assert printed.err.count("\n") == 1
    else:  # what cannot be parsed at all is tyro's to say, in a frame of a few lines
        assert "For full helptext" in printed.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_there_is_a_message_for_every_kind_of_mistake(script):
    """At least 40 a script, none twice."""
    assert len(dict(TABLES[script])) == len(TABLES[script]) >= 40


def test_a_wrong_argument_as_a_command(tmp_path):
    """As a person sees it."""
    result = run_script("rde_dqn_atari", "--env-id", "ALE/Alien-v5", "--runs-dir", tmp_path / "runs")
    assert result.returncode == 2
    assert result.stderr == (
        "error: --env-id ALE/Alien-v5 skips frames by itself or has sticky actions, and either would be applied twice or "
        "against the protocol; use AlienNoFrameskip-v4\n"
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["rde_dqn_atari", "rde_sac_dmc"])
def test_a_folder_that_cannot_be_made(script, tmp_path):
    (tmp_path / "file").write_text("")
    for arguments in (["--runs-dir", tmp_path / "file"], ["--runs-dir", tmp_path / "file" / "deeper", "--resume", "auto"]):
        result = run_script(script, *arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert (
            result.stderr.startswith(f"error: the run folder {arguments[1]}/") and "cannot be made: Not a dir" in result.stderr
        )


@pytest.mark.parametrize("script", ["rde_dqn_atari", "rde_sac_dmc"])
def test_help_names_every_argument(script):
    result = run_script(script, "--help")
    assert result.returncode == 0
    for name in vars(load_script(script).Args()):
        assert "--" + name.replace("_", "-") in result.stdout


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.sampled_from(["", "x", "1e", "-", "None", "[]", "∞"]),
).map(str)


@pytest.mark.parametrize("script", SCRIPTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_arguments_never_show_a_stack_trace(script, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fields = [name for name, value in vars(load_script(script).Args()).items() if not isinstance(value, bool)]
    names = data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=4, unique=True))
    arguments = [f"--{name.replace('_', '-')}={data.draw(NUMBERS)}" for name in names]
    with pytest.MonkeyPatch.context() as patch:
        code, printed = main_in_process(script, arguments, patch, capsys)
    assert code in (0, 1, 2) or isinstance(code, str) and code.startswith("error: ")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_an_effect(script):
    """Every argument is read somewhere in the script beside its definition."""
    source = (ROOT / f"{script}.py").read_text()
    for name in vars(load_script(script).Args()):
        assert re.search(rf"args\.{name}\b", source), name
