import importlib.util
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
ATARI_SCRIPTS = ["dqn_atari", "sr_dqn_atari", "rde_dqn_atari"]


def load_script(name: str):
    """The script as a module. Scripts stand in the repository's root, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def rde():
    return load_script("rde_dqn_atari")
