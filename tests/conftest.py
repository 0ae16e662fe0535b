"""What several test files need: the scripts as modules and as commands, small runs of them, and what runs leave behind."""

import contextlib
import csv
import fcntl
import functools
import importlib.util
import io
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: two workers share the cores

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Breakout's games are short as long as nobody plays well; the mini-batches are small, and few, for the sake of time.
QUICK = (
    "--env-id BreakoutNoFrameskip-v4 --total-timesteps 600 --learning-starts 200 --replay-ratio 0.1 --batch-size 4 "
    "--buffer-size 300 --eval-interval 300 --eval-episodes 2"
).split()
# Two environments, a reset between two evaluations at step 1,300, and the ends of two episodes at step 2,000.
QUICK_SAC = (
    "--env-id fish-swim --total-timesteps 2050 --learning-starts 100 --replay-ratio 0.25 --num-envs 2 --batch-size 16 "
    "--hidden-dim 8 --buffer-size 1500 --eval-interval 1400 --eval-episodes 1"
).split()

# The cheapest there is. Two environments; agents are reset at steps 180 and 260, evaluations at 160 and 300.
QUICK_CARTPOLE = (
    "--env-id CartPole-v1 --total-timesteps 300 --learning-starts 100 --replay-ratio 0.5 --num-envs 2 --batch-size 8 "
    "--hidden-dim 8 --num-hidden-layers 2 --buffer-size 200 --eval-interval 160 --eval-episodes 2 --reset-interval 80"
).split()

QUICK_SAFETY = (
    "--env-id SafetyPointMaze-v0 --cost-limit 0 --total-timesteps 420 --learning-starts 60 --replay-ratio 0.25 --num-envs 2 "
    "--batch-size 16 --hidden-dim 8 --buffer-size 300 --eval-interval 250 --eval-episodes 1 --reset-interval 100"
).split()

# Whole runs that tests look at, by their names: the script, and its arguments. In Atari gradient steps begin after 200 steps,
# one every 10 steps: SR is reset at 460, and RDE's two agents at 380 and 560.
SR, RDE = "--reset-interval 26 --eval-episodes 1", "--reset-interval 36 --num-envs 2 --eval-episodes 1"
SHORT = "--num-envs 2 --total-timesteps 400 --eval-interval 0 --eval-episodes 1"
TO_PLAY = "--eval-interval 0 --batch-size 16 --learning-starts 100 --hidden-dim 8 --replay-ratio 0.25 --buffer-size 500"
RUNS = {
    "dqn": ("dqn_atari", QUICK),
    "sr": ("sr_dqn_atari", [*QUICK, *f"{SR} --reset-depth last2".split()]),
    "sr never": ("sr_dqn_atari", [*QUICK, "--reset-interval", "0"]),
    "rde": ("rde_dqn_atari", [*QUICK, *RDE.split()]),
    "rde of one": ("rde_dqn_atari", [*QUICK, *f"{SR} --num-agents 1 --reset-depth last2".split()]),
    "rde never": ("rde_dqn_atari", [*QUICK, *"--num-agents 1 --reset-interval 0".split()]),
    "drq": ("rde_drq_atari", [*QUICK, *f"{SHORT} --width 0.1 --exploration-steps 50 --reset-interval 20 --anneal".split()]),
    "rnd": ("rnd_dqn_atari", [*QUICK, *f"{SHORT} --exploration-steps 200".split()]),
    "sac": ("rde_sac_dmc", [*QUICK_SAC, "--reset-interval", "600"]),
    "safety": ("rde_sac_safety", QUICK_SAFETY),
    "cartpole": ("rde_dqn", QUICK_CARTPOLE),
    "cartpole other seed": ("rde_dqn", [*QUICK_CARTPOLE, "--seed", "2"]),
    # To be played: with two resets each, so that the agents differ and the choice is not uniform.
    "play minigrid": ("rde_dqn", f"{TO_PLAY} --env-id MiniGrid-LavaGapS5-v0 --total-timesteps 600 --reset-interval 80 "
                      "--eval-episodes 3 --keep-models 3 --num-agents 3 --eval-epsilon 0.3".split()),
    "play one agent": ("rde_dqn", f"{TO_PLAY} --env-id CartPole-v1 --total-timesteps 500 --reset-interval 80 "
                       "--eval-episodes 4 --eval-epsilon 0.5 --num-agents 1".split()),
    "play safety": ("rde_sac_safety", f"{TO_PLAY} --env-id SafetyPointMaze-v0 --total-timesteps 400 --reset-interval 60 "
                    "--eval-episodes 2".split()),
}  # fmt: skip
CHECKPOINT_INTERVAL = {"sac": 250, "cartpole": 50}  # of runs that are stopped on their way, else 90. It changes nothing.


# ---------------------------------------------------------------------------------------------- scripts, and their commands


def load_script(name: str, path: pathlib.Path | None = None):
    """The script as a module. Scripts stand in the repository's root, which is no package. With a path: another copy of it."""
    if path is not None:
        return load_module(f"{name}_{len(sys.modules)}", path)
    return sys.modules[name] if name in sys.modules else load_module(name, ROOT / f"{name}.py")


def load_module(name: str, path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def put_environments(monkeypatch: pytest.MonkeyPatch, script, make_env) -> None:
    """Other environments for a script. Observations that it keeps for the whole process are then made and kept apart."""
    monkeypatch.setattr(script, "make_env", make_env)
    if hasattr(script, "random_observations"):
        monkeypatch.setattr(script, "random_observations", functools.cache(script.random_observations.__wrapped__))


def command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of the commands that are tested: on the CPU, also where there is a GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(autouse=True)
def denormal_numbers():
    """A run in the process of the tests makes 0 of them; hypothesis wants them."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module", autouse=True)
def no_gpu(request):
    """What runs in the process of the tests runs on the CPU, too. What needs a GPU stands in test_cuda.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.module.__name__ != "test_cuda":
            monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        yield


def run_script(script: str, *arguments, **variables: str) -> subprocess.CompletedProcess:
    settings = {"env": environment() | variables, "capture_output": True, "text": True, "timeout": 300, "check": False}
    return subprocess.run(command(script, *arguments), **settings)


@contextlib.contextmanager
def restored_signal_handlers():
    """Runs in the process of the tests take SIGTERM and SIGINT for themselves."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def call_main(module, *arguments) -> subprocess.CompletedProcess:
    """As `run_script`, but in this process, without the seconds of the imports: `main` of a program's module."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        except Exception:  # as the interpreter does it
            traceback.print_exc()
            code = 1
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


def run_main(script, *arguments) -> subprocess.CompletedProcess:
    """The same of a script that trains, with what its process would give back when it ends."""
    begun, begin = [], script.Run.__init__
    with pytest.MonkeyPatch.context() as monkeypatch, restored_signal_handlers():
        monkeypatch.setattr(script.Run, "__init__", lambda run, args: (begun.append(run), begin(run, args))[1])
        result = call_main(script, *arguments)
    for run in begun:
        run.lock.close()
        if hasattr(run, "writer"):
            run.writer.close()
    script.Run.progress = None
    return result


def error_line(result: subprocess.CompletedProcess, code: int = 1) -> str:
    """The one line of a command that failed for a reason that it explains."""
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    (line,) = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="session")
def rde():
    return load_script("rde_dqn_atari")


@pytest.fixture(scope="session")
def sac():
    return load_script("rde_sac_dmc")


# ------------------------------------------------------------------------------------------------ what a run leaves behind


def only_run(runs_dir: pathlib.Path) -> pathlib.Path:
    (path,) = runs_dir.iterdir()
    return path


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows(path: pathlib.Path, name: str) -> list[tuple]:
    """The rows of a CSV file of a run, wall-clock times left out."""
    return [tuple(value for key, value in row.items() if key != "wall_seconds") for row in read_csv(path / name)]


def scalars(path: pathlib.Path, with_speed: bool = False) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows, as (step, value); the speed, which no two runs share, is left out.

    A run that went on has several files, in which later points take the place of earlier ones. TensorBoard reads them by their
    names, in which seconds stand; here by their times, because in tests a run goes on within a second. An evaluation that was
    played again after a kill stands there twice, with the same value.
    """
    files = sorted(path.glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns)
    with tempfile.TemporaryDirectory() as folder:
        for number, file in enumerate(files):
            shutil.copy(file, f"{folder}/events.out.tfevents.{number:010d}")
        events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if with_speed or tag != "charts/SPS"]
    return {tag: sorted({(event.step, event.value) for event in events.Scalars(tag)}) for tag in tags}


def model(path: pathlib.Path, name: str = "model.pt") -> dict:
    return torch.load(path / name, weights_only=True)


def tensors(content) -> list[torch.Tensor]:
    """All of a model, or of a part of it."""
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def equal(ours, theirs) -> bool:
    """Of two models, or parts of them, to the bit."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and equal(list(ours.values()), list(theirs.values()))
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return ours == theirs


def assert_same_end(path: pathlib.Path, undisturbed: pathlib.Path) -> None:
    """That a finished run is what another one is: games, evaluations, curves, weights."""
    for name in ("episodes.csv", "evaluations.csv"):
        assert rows(path, name) == rows(undisturbed, name)
    assert scalars(path) == scalars(undisturbed)
    assert equal(model(path), model(undisturbed))
    assert not (path / "checkpoint.pt").exists() and not list(path.glob("**/*.tmp"))


def snapshot(path: pathlib.Path) -> dict[str, bytes]:
    """Everything in a folder: to see that nothing was changed, made or removed."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# -------------------------------------------------------------------------------------------------- runs that tests share


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Gives a folder of that name which all workers of this test session share, and whether the caller has to fill it."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "shared"
    shared.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def made_once(name: str):
        path, done = shared / name, shared / f"{name}.done"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait meanwhile
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
            yield path, not done.exists()
            done.touch()

    return made_once


@pytest.fixture(scope="session")
def runs(made_once):
    """Gives a finished run of RUNS that nobody stopped: its script, folder and what it printed. Made when it is asked for."""

    def get(name: str) -> types.SimpleNamespace:
        script, arguments = RUNS[name]
        with made_once(name.replace(" ", "-")) as (path, to_be_made):
            if to_be_made:
                result = run_main(load_script(script), *arguments, "--runs-dir", path / "runs")
                assert result.returncode == 0, result.stderr
                (path / "printed.txt").write_text(result.stdout + result.stderr)
        printed = (path / "printed.txt").read_text().replace("\r", "\n")
        return types.SimpleNamespace(script=script, path=only_run(path / "runs"), printed=printed)

    return get


def signal_when(condition, script, number: int = signal.SIGTERM) -> None:
    """Sends this process a signal when the condition on the `Run` holds, between two turns of its loop or in an evaluation."""
    look = script.Run.stop_if_asked

    def signalled(run):
        if not run.stopped_by and condition(run):
            os.kill(os.getpid(), number)
        look(run)

    script.Run.stop_if_asked = signalled


def stop_when(condition, script, *arguments, number: int = signal.SIGTERM) -> subprocess.CompletedProcess:
    """A run in this process that gets a signal, see above."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(script.Run, "stop_if_asked", script.Run.stop_if_asked)
        signal_when(condition, script, number)
        return run_main(script, *arguments)


def kill_when(condition, script, *arguments) -> None:
    """A run in a process of its own that is killed -9, see above."""
    kill_by(functools.partial(signal_when, condition, number=signal.SIGKILL), script, *arguments)


def kill_by(change, script, *arguments) -> None:
    """A run in a process of its own, in which the change of the script's module leads to a kill -9."""

    def changed_main() -> None:
        change(script)
        sys.argv = [script.__file__, *map(str, arguments)]
        script.main()

    process = multiprocessing.get_context("fork").Process(target=changed_main)  # without the seconds of the imports
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == -signal.SIGKILL


class InEvaluation:
    """For `stop_when` and `kill_when`: that an evaluation has come to its so many-th step."""

    def __init__(self, phase: str, num_steps: int, since: int = 0):
        self.phase, self.num_steps, self.since, self.count = phase, num_steps, since, -1  # the first look is before it

    def __call__(self, run) -> bool:
        self.count += run.agenda[:1] == [self.phase] and run.global_step >= self.since
        return self.count >= self.num_steps


class AtStep:
    """For both: that a run has come to a step, and to no evaluation."""

    def __init__(self, step: int):
        self.step = step

    def __call__(self, run) -> bool:
        return run.global_step >= self.step and not run.agenda


STOPPED_AT = 206  # in the middle of episodes, and between points of the curves


@pytest.fixture
def copy_of_stopped_run(made_once, tmp_path):
    """The folder of RDE+DQN on CartPole (the cheapest run of RUNS) that was stopped by SIGTERM at that step."""
    with made_once("stopped") as (path, to_be_made):
        if to_be_made:
            arguments = [*arguments_of("cartpole"), "--runs-dir", path / "runs"]
            result = stop_when(AtStep(STOPPED_AT), load_script("rde_dqn"), *arguments)
            assert result.returncode == 143 and f"stopped at step {STOPPED_AT};" in result.stderr, result.stderr
    path = only_run(path / "runs")
    return pathlib.Path(shutil.copytree(path, tmp_path / "runs" / path.name))


def arguments_of(name: str) -> list:
    """Of a run of RUNS that is to be stopped on its way: it keeps checkpoints, which do not even change its folder's name."""
    return [*RUNS[name][1], "--checkpoint-interval", CHECKPOINT_INTERVAL.get(name, 90)]


def go_on(name: str, path: pathlib.Path) -> subprocess.CompletedProcess:
    """The command of a run of RUNS once more, where its folder lies."""
    return run_main(load_script(RUNS[name][0]), *arguments_of(name), "--runs-dir", path.parent)


class Started:
    """A process that trains, to be killed when something has happened."""

    def __init__(self, script: str, *arguments, log: pathlib.Path):
        self.log, words = log, command(script, *arguments)
        with open(log, "w") as file:
            self.process = subprocess.Popen(words, env=environment(), stdout=file, stderr=subprocess.STDOUT)

    def begun(self) -> bool:
        """Whether it has said what it will do."""
        return "gradient steps, " in self.printed()

    def wait_for(self, condition, seconds: float = 120) -> None:
        """Until the condition holds, or the process has ended."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and not condition():
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(self.printed())
            time.sleep(0.005)

    def printed(self) -> str:
        return self.log.read_text().replace("\r", "\n")

    def end(self, number: int | None = None) -> int:
        """The exit code, after a signal if one is given."""
        if number is not None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=120)
        finally:
            self.process.kill()  # what hangs, too
