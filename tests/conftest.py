import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: two workers share the cores

ROOT = pathlib.Path(__file__).resolve().parent.parent
ATARI_SCRIPTS = ["dqn_atari", "sr_dqn_atari", "rde_dqn_atari"]

# Breakout's games are short as long as nobody plays well; the mini-batches are small for the sake of time.
QUICK = (
    "--env-id BreakoutNoFrameskip-v4 --total-timesteps 700 --learning-starts 200 --replay-ratio 0.25 --batch-size 4 "
    "--buffer-size 300 --eval-interval 300 --eval-episodes 2"
).split()


def load_script(name: str):
    """The script as a module. Scripts stand in the repository's root, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def command(script: str, *arguments) -> list[str]:
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of the commands that are tested: on the CPU, also where there is a GPU."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module", autouse=True)
def no_gpu(request):
    """What runs in the process of the tests runs on the CPU, too. What needs a GPU stands in test_cuda.py."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.module.__name__ != "test_cuda":
            monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        yield


def run_script(script: str, *arguments, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(script, *arguments), env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="session")
def rde():
    return load_script("rde_dqn_atari")


@pytest.fixture(scope="session")
def sac():
    return load_script("rde_sac_dmc")
